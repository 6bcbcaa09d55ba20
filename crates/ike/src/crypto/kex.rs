//! Key exchange: X25519 (RFC 8031), P-256 and P-384 (RFC 5903).
//!
//! For the ECP groups the public value is x ‖ y and the shared secret is x.

use aws_lc_rs::agreement::{self, PrivateKey, UnparsedPublicKey};
use zeroize::Zeroizing;

use super::{Group, Secret};
use crate::Random;
use crate::error::{Error, Misbehaved, Misuse};
use crate::wire::KeyExchange;

/// The uncompressed point's mark (SEC 1), which the wire leaves out.
const UNCOMPRESSED: u8 = 4;

impl Group {
    fn algorithm(self) -> &'static agreement::Algorithm {
        match self {
            Group::X25519 => &agreement::X25519,
            Group::P256 => &agreement::ECDH_P256,
            Group::P384 => &agreement::ECDH_P384,
        }
    }

    /// Octets of a private key.
    pub fn private_len(self) -> usize {
        match self {
            Group::X25519 | Group::P256 => 32,
            Group::P384 => 48,
        }
    }

    /// Octets of a public value.
    pub fn public_len(self) -> usize {
        match self {
            Group::X25519 => 32,
            Group::P256 => 64,
            Group::P384 => 96,
        }
    }
}

/// Our half of a key exchange.
pub struct KeyPair {
    group: Group,
    private: PrivateKey,
    public: Vec<u8>,
}

impl std::fmt::Debug for KeyPair {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "KeyPair({})", self.group)
    }
}

impl KeyPair {
    /// A fresh key.
    ///
    /// # Errors
    /// [`Misuse::Crypto`] if `random` yields nothing usable.
    pub fn generate(group: Group, random: &mut dyn Random) -> Result<Self, Error> {
        let mut scalar = Zeroizing::new(vec![0; group.private_len()]);
        // A scalar outside the group's order is refused; that happens once in 2^32 for P-256.
        for _ in 0..8 {
            random.fill(&mut scalar);
            if let Ok(pair) = Self::from_private(group, &scalar) {
                return Ok(pair);
            }
        }
        Err(Misuse::Crypto("make a key").into())
    }

    /// The key with this private value.
    ///
    /// # Errors
    /// [`Misuse::Key`] if it is none.
    pub fn from_private(group: Group, private: &[u8]) -> Result<Self, Error> {
        let private = PrivateKey::from_private_key(group.algorithm(), private)
            .map_err(|_| Misuse::Key("not a private key of the group"))?;
        let public = private.compute_public_key().map_err(|_| Misuse::Crypto("compute a public key"))?;
        let public = match group {
            Group::X25519 => public.as_ref().to_vec(),
            Group::P256 | Group::P384 => public.as_ref()[1..].to_vec(),
        };
        Ok(KeyPair { group, private, public })
    }

    /// The group.
    pub fn group(&self) -> Group {
        self.group
    }

    /// Our public value as the wire has it.
    pub fn public(&self) -> &[u8] {
        &self.public
    }

    /// Our KE payload.
    pub fn ke(&self) -> KeyExchange {
        KeyExchange { group: self.group.id(), data: self.public.clone() }
    }

    /// The shared secret with the peer's public value.
    ///
    /// # Errors
    /// [`Misbehaved::PublicValue`]: wrong length, not on the curve, or (X25519) all zero as result.
    pub fn agree(&self, peer: &[u8]) -> Result<Secret, Error> {
        let invalid = Misbehaved::PublicValue(self.group);
        if peer.len() != self.group.public_len() {
            return Err(invalid.into());
        }
        let mut point = Vec::with_capacity(1 + peer.len());
        if self.group != Group::X25519 {
            point.push(UNCOMPRESSED);
        }
        point.extend_from_slice(peer);
        let peer = UnparsedPublicKey::new(self.group.algorithm(), &point);
        agreement::agree(&self.private, peer, Error::from(invalid), |shared| Ok(Secret::from(shared)))
    }
}
