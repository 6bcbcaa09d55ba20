//! Keys: agreed (`kex`), derived (`prf`, `keys`) and used (`sealer`, `fragment`). All arithmetic is aws-lc-rs's.
//!
//! Room for RFC 9242 and 9370: an additional key exchange updates the keys by the very formula of a rekey, so
//! each step is one more call of [`IkeKeys::rekeyed`] with the SK_d, secret and SPIs of that moment;
//! [`IkeKeys::rekeyed`] and [`ChildKeys::derive`] take a list of secrets, which is what SK(0) … SK(n) of
//! IKE_FOLLOWUP_KE are; and [`crate::auth::SignedOctets`] has a place for IntAuth.
//!
//! Invariant: key material lives in [`Secret`], which is wiped when dropped and never printed.

mod fragment;
mod kex;
mod keys;
mod prf;
mod sealer;

use std::fmt;

pub use fragment::{MAX_FRAGMENTS, Reassembly};
pub use kex::KeyPair;
pub use keys::{ChildKeys, IkeKeys, TrafficKey};
pub use prf::{nat_detection_hash, spki_sha1};
pub use sealer::{OpenedFragment, Opener, Sealer};

use zeroize::{Zeroize, ZeroizeOnDrop};

/// Octets that nobody may see: wiped when dropped, compared in constant time, never printed.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct Secret(Vec<u8>);

impl Secret {
    /// Takes the octets over.
    pub fn new(octets: Vec<u8>) -> Self {
        Secret(octets)
    }

    /// The octets, to compute with.
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl From<&[u8]> for Secret {
    fn from(octets: &[u8]) -> Self {
        Secret(octets.to_vec())
    }
}

impl PartialEq for Secret {
    fn eq(&self, other: &Self) -> bool {
        aws_lc_rs::constant_time::verify_slices_are_equal(&self.0, &other.0).is_ok()
    }
}

impl Eq for Secret {}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secret({} octets)", self.0.len())
    }
}

/// AES-GCM with a tag of 16 octets, for IKE (RFC 5282) and ESP (RFC 4106).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Encr {
    /// With a key of 128 bits.
    Aes128Gcm16,
    /// With a key of 256 bits.
    Aes256Gcm16,
}

impl Encr {
    /// The number of ENCR_AES_GCM_16, whatever the key length.
    pub const AES_GCM_16: u16 = 20;

    /// Octets of the key without the salt.
    pub fn key_len(self) -> usize {
        match self {
            Encr::Aes128Gcm16 => 16,
            Encr::Aes256Gcm16 => 32,
        }
    }

    /// The cipher with this number and key length in bits, if it is spoken here.
    pub fn from_transform(id: u16, key_bits: Option<u16>) -> Option<Self> {
        match (id, key_bits) {
            (Self::AES_GCM_16, Some(128)) => Some(Encr::Aes128Gcm16),
            (Self::AES_GCM_16, Some(256)) => Some(Encr::Aes256Gcm16),
            _ => None,
        }
    }

    pub(crate) fn algorithm(self) -> &'static aws_lc_rs::aead::Algorithm {
        match self {
            Encr::Aes128Gcm16 => &aws_lc_rs::aead::AES_128_GCM,
            Encr::Aes256Gcm16 => &aws_lc_rs::aead::AES_256_GCM,
        }
    }
}

impl fmt::Display for Encr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Encr::Aes128Gcm16 => "AES_GCM_16_128",
            Encr::Aes256Gcm16 => "AES_GCM_16_256",
        })
    }
}

/// HMAC with SHA-2 as pseudo-random function (RFC 4868).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Prf {
    /// PRF_HMAC_SHA2_256.
    HmacSha256,
    /// PRF_HMAC_SHA2_384.
    HmacSha384,
    /// PRF_HMAC_SHA2_512.
    HmacSha512,
}

impl Prf {
    /// Its number.
    pub fn id(self) -> u16 {
        match self {
            Prf::HmacSha256 => 5,
            Prf::HmacSha384 => 6,
            Prf::HmacSha512 => 7,
        }
    }

    /// The function with this number, if it is spoken here.
    pub fn from_id(id: u16) -> Option<Self> {
        [Prf::HmacSha256, Prf::HmacSha384, Prf::HmacSha512].into_iter().find(|p| p.id() == id)
    }

    /// Octets of its output and of its preferred key.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(self) -> usize {
        match self {
            Prf::HmacSha256 => 32,
            Prf::HmacSha384 => 48,
            Prf::HmacSha512 => 64,
        }
    }
}

impl fmt::Display for Prf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Prf::HmacSha256 => "PRF_HMAC_SHA2_256",
            Prf::HmacSha384 => "PRF_HMAC_SHA2_384",
            Prf::HmacSha512 => "PRF_HMAC_SHA2_512",
        })
    }
}

/// A group of the key exchange.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Group {
    /// X25519 (RFC 8031).
    X25519,
    /// The 256-bit random ECP group (RFC 5903).
    P256,
    /// The 384-bit random ECP group (RFC 5903).
    P384,
}

impl Group {
    /// Its number.
    pub fn id(self) -> u16 {
        match self {
            Group::P256 => 19,
            Group::P384 => 20,
            Group::X25519 => 31,
        }
    }

    /// The group with this number, if it is spoken here.
    pub fn from_id(id: u16) -> Option<Self> {
        [Group::X25519, Group::P256, Group::P384].into_iter().find(|g| g.id() == id)
    }
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Group::X25519 => "CURVE_25519",
            Group::P256 => "ECP_256",
            Group::P384 => "ECP_384",
        })
    }
}

#[cfg(test)]
pub(crate) fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.chars().filter_map(|c| c.to_digit(16)).map(|d| d as u8).collect();
    digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}
