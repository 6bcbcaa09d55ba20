//! Keys of AES-GCM-16 as ESP uses them (RFC 4106).

use aws_lc_rs::aead::{AES_128_GCM, AES_256_GCM, Aad, Algorithm, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use packet::esp;
use zeroize::Zeroizing;

use crate::{Sequence, Spi};

/// The bytes of a nonce that come from the key exchange (RFC 4106 §4).
const SALT_LEN: usize = 4;
const KEY_LEN_MAX: usize = 32;

/// Cipher of an SA; integrity is part of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suite {
    /// ENCR_AES_GCM_16 with 128 bits.
    Aes128Gcm16,
    /// ENCR_AES_GCM_16 with 256 bits.
    Aes256Gcm16,
}

impl Suite {
    /// Bytes that the key exchange makes for each direction: key, then salt (RFC 4106 §8.1).
    pub fn key_material_len(self) -> usize {
        self.key_len() + SALT_LEN
    }

    fn key_len(self) -> usize {
        self.algorithm().key_len()
    }

    fn algorithm(self) -> &'static Algorithm {
        match self {
            Self::Aes128Gcm16 => &AES_128_GCM,
            Self::Aes256Gcm16 => &AES_256_GCM,
        }
    }
}

impl std::fmt::Display for Suite {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Aes128Gcm16 => "AES_GCM_16-128",
            Self::Aes256Gcm16 => "AES_GCM_16-256",
        })
    }
}

/// Key material whose length is not its suite's, or that the crypto library refuses.
#[derive(thiserror::Error, Clone, Copy, Debug, PartialEq, Eq)]
#[error("{suite} takes {} bytes of key material, {given} were given", suite.key_material_len())]
pub struct BadKey {
    suite: Suite,
    given: usize,
}

/// The secret of one direction of an SA, as the key exchange made it. Zeroed when dropped, never printed.
pub struct KeyMaterial {
    suite: Suite,
    bytes: Zeroizing<[u8; KEY_LEN_MAX + SALT_LEN]>,
}

impl KeyMaterial {
    /// Key, then salt: [`Suite::key_material_len`] bytes. The caller's copy stays the caller's to zero.
    pub fn new(suite: Suite, bytes: &[u8]) -> Result<Self, BadKey> {
        if bytes.len() != suite.key_material_len() {
            return Err(BadKey { suite, given: bytes.len() });
        }
        let mut copy = Zeroizing::new([0; KEY_LEN_MAX + SALT_LEN]);
        copy[..bytes.len()].copy_from_slice(bytes);
        Ok(Self { suite, bytes: copy })
    }

    /// The suite that it is for.
    pub fn suite(&self) -> Suite {
        self.suite
    }
}

impl std::fmt::Debug for KeyMaterial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KeyMaterial").field("suite", &self.suite).finish_non_exhaustive()
    }
}

/// A key ready for use. The crypto library zeroes its schedule when it frees it.
pub(crate) struct Key {
    suite: Suite,
    aead: LessSafeKey,
    salt: Zeroizing<[u8; SALT_LEN]>,
    spi: Spi,
    sequence: Sequence,
}

impl Key {
    pub(crate) fn new(material: &KeyMaterial, spi: Spi, sequence: Sequence) -> Result<Self, BadKey> {
        let suite = material.suite;
        let (key, salt) = material.bytes[..suite.key_material_len()].split_at(suite.key_len());
        let unbound =
            UnboundKey::new(suite.algorithm(), key).map_err(|_| BadKey { suite, given: key.len() })?;
        let mut copy = Zeroizing::new([0; SALT_LEN]);
        copy.copy_from_slice(salt);
        Ok(Self { suite, aead: LessSafeKey::new(unbound), salt: copy, spi, sequence })
    }

    pub(crate) fn suite(&self) -> Suite {
        self.suite
    }

    pub(crate) fn spi(&self) -> Spi {
        self.spi
    }

    pub(crate) fn sequence(&self) -> Sequence {
        self.sequence
    }

    /// Encrypts `plain` in place and writes the ICV. `false` when the library refuses, which it does for no length
    /// that a packet can have.
    #[inline]
    pub(crate) fn seal(
        &self,
        sequence: u64,
        iv: [u8; esp::IV_LEN],
        plain: &mut [u8],
        icv: &mut [u8],
    ) -> bool {
        let (aad, length) = self.aad(sequence);
        self.seal_with(&aad[..length], iv, plain, icv)
    }

    #[inline]
    pub(crate) fn seal_with(
        &self,
        aad: &[u8],
        iv: [u8; esp::IV_LEN],
        plain: &mut [u8],
        icv: &mut [u8],
    ) -> bool {
        self.aead.seal_in_place_scatter(self.nonce(iv), Aad::from(aad), plain, &[], icv).is_ok()
    }

    /// Verifies and decrypts in place; `false` leaves nothing of use in `sealed`, which ends with the ICV.
    #[inline]
    pub(crate) fn open(&self, sequence: u64, iv: [u8; esp::IV_LEN], sealed: &mut [u8]) -> bool {
        let (aad, length) = self.aad(sequence);
        self.open_with(&aad[..length], iv, sealed)
    }

    #[inline]
    pub(crate) fn open_with(&self, aad: &[u8], iv: [u8; esp::IV_LEN], sealed: &mut [u8]) -> bool {
        self.aead.open_in_place(self.nonce(iv), Aad::from(aad), sealed).is_ok()
    }

    /// RFC 4106 §4: salt, then the explicit IV.
    #[inline]
    fn nonce(&self, iv: [u8; esp::IV_LEN]) -> Nonce {
        let mut nonce = [0; NONCE_LEN];
        nonce[..SALT_LEN].copy_from_slice(&*self.salt);
        nonce[SALT_LEN..].copy_from_slice(&iv);
        Nonce::assume_unique_for_key(nonce)
    }

    /// RFC 4106 §5: SPI and the whole sequence number, of which the high half is not sent.
    #[inline]
    fn aad(&self, sequence: u64) -> ([u8; 12], usize) {
        let mut aad = [0; 12];
        aad[..4].copy_from_slice(&self.spi.get().to_be_bytes());
        match self.sequence {
            Sequence::Short => {
                aad[4..8].copy_from_slice(&(sequence as u32).to_be_bytes());
                (aad, 8)
            }
            Sequence::Extended => {
                aad[4..].copy_from_slice(&sequence.to_be_bytes());
                (aad, 12)
            }
        }
    }
}
