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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Seeded;
    use crate::crypto::hex;

    /// Private, public of both sides, and the secret.
    fn check(group: Group, [i, gi, r, gr, shared]: [&str; 5]) {
        let initiator = KeyPair::from_private(group, &hex(i)).unwrap();
        let responder = KeyPair::from_private(group, &hex(r)).unwrap();
        assert_eq!(initiator.public(), hex(gi));
        assert_eq!(responder.public(), hex(gr));
        assert_eq!(initiator.agree(&hex(gr)).unwrap().expose(), hex(shared));
        assert_eq!(responder.agree(&hex(gi)).unwrap().expose(), hex(shared));
    }

    #[test]
    fn p256_is_as_in_rfc_5903_section_8_1() {
        check(
            Group::P256,
            [
                "C88F01F510D9AC3F70A292DAA2316DE544E9AAB8AFE84049C62A9C57862D1433",
                "DAD0B65394221CF9B051E1FECA5787D098DFE637FC90B9EF945D0C3772581180
                 5271A0461CDB8252D61F1C456FA3E59AB1F45B33ACCF5F58389E0577B8990BB3",
                "C6EF9C5D78AE012A011164ACB397CE2088685D8F06BF9BE0B283AB46476BEE53",
                "D12DFB5289C8D4F81208B70270398C342296970A0BCCB74C736FC7554494BF63
                 56FBF3CA366CC23E8157854C13C58D6AAC23F046ADA30F8353E74F33039872AB",
                "D6840F6B42F6EDAFD13116E0E12565202FEF8E9ECE7DCE03812464D04B9442DE",
            ],
        );
    }

    #[test]
    fn p384_is_as_in_rfc_5903_section_8_2() {
        check(
            Group::P384,
            [
                "099F3C7034D4A2C699884D73A375A67F7624EF7C6B3C0F160647B67414DCE655E35B538041E649EE3FAEF896783AB194",
                "667842D7D180AC2CDE6F74F37551F55755C7645C20EF73E31634FE72B4C55EE6DE3AC808ACB4BDB4C88732AEE95F41AA
                 9482ED1FC0EEB9CAFC4984625CCFC23F65032149E0E144ADA024181535A0F38EEB9FCFF3C2C947DAE69B4C634573A81C",
                "41CB0779B4BDB85D47846725FBEC3C9430FAB46CC8DC5060855CC9BDA0AA2942E0308312916B8ED2960E4BD55A7448FC",
                "E558DBEF53EECDE3D3FCCFC1AEA08A89A987475D12FD950D83CFA41732BC509D0D1AC43A0336DEF96FDA41D0774A3571
                 DCFBEC7AACF3196472169E838430367F66EEBE3C6E70C416DD5F0C68759DD1FFF83FA40142209DFF5EAAD96DB9E6386C",
                "11187331C279962D93D604243FD592CB9D0A926F422E47187521287E7156C5C4D603135569B9E9D09CF5D4A270F59746",
            ],
        );
    }

    #[test]
    fn x25519_is_as_in_rfc_7748_section_6_1() {
        check(
            Group::X25519,
            [
                "77076d0a7318a57d3c16c17251b26645df4c2f87ebc0992ab177fba51db92c2a",
                "8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a",
                "5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb",
                "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f",
                "4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742",
            ],
        );
    }

    #[test]
    fn a_key_comes_from_the_randomness_given_and_agrees_with_its_peer() {
        for group in [Group::X25519, Group::P256, Group::P384] {
            let make = |seed: &[u8]| KeyPair::generate(group, &mut Seeded::new(seed)).unwrap();
            let (a, again, b) = (make(b"a"), make(b"a"), make(b"b"));
            assert_eq!(a.public(), again.public());
            assert_ne!(a.public(), b.public());
            assert_eq!(a.public().len(), group.public_len());
            assert_eq!(a.agree(b.public()).unwrap(), b.agree(a.public()).unwrap());
        }
    }

    #[test]
    fn a_public_value_off_the_curve_or_of_another_length_is_the_peers_fault() {
        for group in [Group::X25519, Group::P256, Group::P384] {
            let pair = KeyPair::generate(group, &mut Seeded::new(b"a")).unwrap();
            let zero = vec![0; group.public_len()];
            let short = &pair.public()[1..];
            let mut sec1 = vec![4];
            sec1.extend(pair.public());
            for bad in [&zero[..], short, &sec1, &[]] {
                assert_eq!(pair.agree(bad), Err(Misbehaved::PublicValue(group).into()));
            }
        }
    }
}
