//! Keys of an IKE SA (RFC 7296 §2.14, §2.18) and of a CHILD_SA (§2.17).
//!
//! With AEAD there are no integrity keys: SK_ai and SK_ar are empty and have no field here (RFC 5282 §7).

use zeroize::ZeroizeOnDrop;

use super::{Encr, Prf, Secret};
use crate::proposal::IkeSuite;
use crate::wire::{IkeSpis, Nonce};

/// Octets of salt after each AES-GCM key (RFC 4106 §8.1, RFC 5282 §7.1).
pub(super) const SALT_LEN: usize = 4;

/// The keys of an IKE SA.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IkeKeys {
    /// From which CHILD_SA keys and the next IKE SA's keys come.
    pub sk_d: Secret,
    /// Encrypts what the original initiator sends: key, then salt.
    pub sk_ei: Secret,
    /// Encrypts what the original responder sends.
    pub sk_er: Secret,
    /// Binds the initiator's identity into AUTH.
    pub sk_pi: Secret,
    /// Binds the responder's identity into AUTH.
    pub sk_pr: Secret,
}

impl IkeKeys {
    /// After IKE_SA_INIT: SKEYSEED = prf(Ni | Nr, g^ir).
    pub fn initial(suite: &IkeSuite, shared: &Secret, ni: &Nonce, nr: &Nonce, spis: &IkeSpis) -> Self {
        let nonces = [ni.as_bytes(), nr.as_bytes()].concat();
        let skeyseed = suite.prf.compute(&nonces, &[shared.expose()]);
        Self::expand(suite, &skeyseed, ni, nr, spis)
    }

    /// After a rekey: SKEYSEED = prf(SK_d (old), SK(0) | Ni | Nr | SK(1) | …), computed with the *old* SA's PRF. With
    /// one secret that is RFC 7296 §2.18; more are RFC 9370 §2.2.4; called within one SA with its own PRF, SK_d and
    /// SPIs it is the update after an additional key exchange (RFC 9370 §2.2.2).
    pub fn rekeyed(
        old: (Prf, &Secret),
        suite: &IkeSuite,
        shared: &[Secret],
        ni: &Nonce,
        nr: &Nonce,
        spis: &IkeSpis,
    ) -> Self {
        let (first, more) = split(shared);
        let mut parts = vec![first, ni.as_bytes(), nr.as_bytes()];
        parts.extend(more);
        let skeyseed = old.0.compute(old.1.expose(), &parts);
        Self::expand(suite, &skeyseed, ni, nr, spis)
    }

    fn expand(suite: &IkeSuite, skeyseed: &Secret, ni: &Nonce, nr: &Nonce, spis: &IkeSpis) -> Self {
        let (prf_len, encr_len) = (suite.prf.len(), suite.encr.key_len() + SALT_LEN);
        let keymat = suite.prf.plus(
            skeyseed.expose(),
            &[ni.as_bytes(), nr.as_bytes(), &spis.initiator.to_bytes(), &spis.responder.to_bytes()],
            3 * prf_len + 2 * encr_len,
        );
        let mut rest = keymat.expose();
        let mut take = |len| {
            let (taken, tail) = rest.split_at(len);
            rest = tail;
            Secret::from(taken)
        };
        IkeKeys {
            sk_d: take(prf_len),
            sk_ei: take(encr_len),
            sk_er: take(encr_len),
            sk_pi: take(prf_len),
            sk_pr: take(prf_len),
        }
    }
}

/// The key of one direction of a CHILD_SA.
#[derive(Clone, PartialEq, Eq, ZeroizeOnDrop)]
pub struct TrafficKey {
    /// The cipher.
    #[zeroize(skip)]
    pub encr: Encr,
    /// The AES key.
    pub key: Secret,
    /// The first four octets of each nonce.
    pub salt: [u8; SALT_LEN],
}

impl std::fmt::Debug for TrafficKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TrafficKey({})", self.encr)
    }
}

/// The keys of a CHILD_SA, by who sends with them: the initiator of the *exchange* that made it, or its responder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChildKeys {
    /// For traffic from the initiator.
    pub initiator: TrafficKey,
    /// For traffic from the responder.
    pub responder: TrafficKey,
}

impl ChildKeys {
    /// KEYMAT = prf+(SK_d, SK(0) | Ni | Nr | SK(1) | …); `shared` is empty without a key exchange of its own.
    pub fn derive(prf: Prf, sk_d: &Secret, shared: &[Secret], ni: &Nonce, nr: &Nonce, encr: Encr) -> Self {
        let (first, more) = split(shared);
        let mut parts = vec![first, ni.as_bytes(), nr.as_bytes()];
        parts.extend(more);
        let one = encr.key_len() + SALT_LEN;
        let keymat = prf.plus(sk_d.expose(), &parts, 2 * one);
        let direction = |octets: &[u8]| {
            let (key, tail) = octets.split_at(encr.key_len());
            let mut salt = [0; SALT_LEN];
            salt.copy_from_slice(tail);
            TrafficKey { encr, key: Secret::from(key), salt }
        };
        let (initiator, responder) = keymat.expose().split_at(one);
        ChildKeys { initiator: direction(initiator), responder: direction(responder) }
    }
}

/// SK(0), or nothing, and SK(1) … SK(n).
fn split(shared: &[Secret]) -> (&[u8], impl Iterator<Item = &[u8]>) {
    (shared.first().map_or(&[][..], Secret::expose), shared.iter().skip(1).map(Secret::expose))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::{Group, hex, nat_detection_hash};
    use crate::wire::IkeSpi;

    // The expected values here were computed with Python's hmac from the formulas of RFC 7296; that charon computes
    // the same is shown in tests/charon.rs.

    const SUITE: IkeSuite = IkeSuite { encr: Encr::Aes256Gcm16, prf: Prf::HmacSha256, group: Group::X25519 };

    fn inputs() -> (Secret, Nonce, Nonce, IkeSpis) {
        (
            Secret::new((0..32).collect()),
            Nonce::new(vec![0xaa; 32]).unwrap(),
            Nonce::new(vec![0xbb; 32]).unwrap(),
            IkeSpis { initiator: IkeSpi(0x0101_0101_0101_0101), responder: IkeSpi(0x0202_0202_0202_0202) },
        )
    }

    fn all(keys: &IkeKeys) -> Vec<u8> {
        [&keys.sk_d, &keys.sk_ei, &keys.sk_er, &keys.sk_pi, &keys.sk_pr].map(Secret::expose).concat()
    }

    #[test]
    fn prf_plus_runs_over_several_outputs_and_is_cut_where_wanted() {
        let key: Vec<u8> = (0..32).collect();
        let cases = [
            (
                Prf::HmacSha256,
                "5f7b2456bc6878004ca8fd6dbd7ace155c3956ccad5cdc91b91cf9f2663d68f7ce7a2133a970947bb776aeaada293f2fe0fdec7fe1dc8804c4dad022444ae67ec120015c8f193ac8ed650ffbd07d4f3049afe24ecdd07868d3c94dd342aeb703daab45de",
            ),
            (
                Prf::HmacSha384,
                "d66cb8bf52c0cae707bbc97592e2fecf1f8beea936233685366fa3e82dcd1d02ca06116af2533538f7a7f6a4cb1dcbf9df74edb61a8814c1fca60b367c211118be55abb6afa4619b8cf40b7ba1f0029a948b1c98de1384addfc49731e452cf18cc6c786a",
            ),
            (
                Prf::HmacSha512,
                "48e4ffabf83fc9784e0180b53489fa5f652af54acd15bb2fcbc870d4d12e496a1f2cac6e31bbfbb479fd3dc8c5ea86613187b2a903c64a867e2a861c770ee009cd92aac4de925b082122fde9c7c9128a52175e81b26eab0a28961d4e07503e7af61bfa09",
            ),
        ];
        for (prf, expected) in cases {
            let got = prf.plus(&key, &[b"droveway ", b"prf+"], 100);
            assert_eq!(got.expose(), hex(expected), "{prf}");
            assert_eq!(prf.plus(&key, &[b"droveway prf+"], 40).expose(), &hex(expected)[..40]);
        }
    }

    #[test]
    fn the_keys_of_a_new_ike_sa_are_cut_in_the_order_of_rfc_7296_section_2_14() {
        let (shared, ni, nr, spis) = inputs();
        let keys = IkeKeys::initial(&SUITE, &shared, &ni, &nr, &spis);
        let expected = "a239492bf29f8b13a9cf2aedb956fbb8b3e94e768096ea977ed3673f5743944f70a97f234d8d8c95a757eb8b9f11e4a2a6887081a457e88d9283ee0d42b8aefd7c86f6d052fbbf1c364cf8fce0570de2dcd2606e01f9fe7a516091b32eeba5e6221c6965dd1637db16d111f1d8486bb827006559cd04aa938d22b277599ac1cb734e7eff41de621538baf0a0b77648448bf211320c0758a054c47b9f5f724a4775bf24a31f67ddac";
        assert_eq!(all(&keys), hex(expected));
        assert_eq!(keys.sk_ei.expose().len(), 36);
    }

    #[test]
    fn a_rekeyed_ike_sa_takes_its_seed_from_the_old_one() {
        let (shared, ni, nr, spis) = inputs();
        let old = Secret::new(vec![7; 32]);
        let keys = IkeKeys::rekeyed((Prf::HmacSha256, &old), &SUITE, &[shared], &ni, &nr, &spis);
        let expected = "35f4b2b884c0fc1b6f1f4a56ef5dde9ded541820e64a47b6273d232253d6ee5293c9b2f746e8f775360ca4abfaa9b5182e6f8753aacedfce1d999c4ce5cdbe023502d6de0e155a8cf15574a099752b449b47f279573ff4abd09a8efb361d684e01ea94ac275dd7a5f4ba1af33df684e25b8de480eaa2869a3d1c85388f5fde6530a3f765b1f5fb6d670e426361bd976f4ff5978c5c8549009301827cf627e4d8353709ede7cd3561";
        assert_eq!(all(&keys), hex(expected));
    }

    #[test]
    fn the_keys_of_a_child_are_those_of_the_initiator_then_of_the_responder() {
        let (shared, ni, nr, _) = inputs();
        let sk_d = Secret::new(vec![7; 32]);
        let octets = |shared: &[Secret]| {
            let keys = ChildKeys::derive(Prf::HmacSha256, &sk_d, shared, &ni, &nr, Encr::Aes256Gcm16);
            [
                keys.initiator.key.expose(),
                &keys.initiator.salt,
                keys.responder.key.expose(),
                &keys.responder.salt,
            ]
            .concat()
        };
        let without = "fc55553dc11993da5e5662014c982a3c3897f30602099918e7fb80f830523a5bb5cb600671691c229e38e0c0ca961b19f18b4eb94e84fe3d4542c268074b17daa3cc748f51e69144";
        let with = "28c1c7ebd9da9fd4713735e13fa02e4e51c1fb2cafce74a624a2531201bd267caa60e2659b7e726eee228b913ba8055d4e19be2eea7680af91a7316e92c5064783ff07e3808fed41";
        let with_two = "015898085029c00407f3e2e55bc8e720c5b264740cb2a44106d8715386c3ebc08bcc64af9f541de1b6a6a8b37173efdfb0703fb1f13b588dfbd3a76644c8baf21b8804bed44c5def";
        assert_eq!(octets(&[]), hex(without));
        assert_eq!(octets(std::slice::from_ref(&shared)), hex(with));
        assert_eq!(octets(&[shared.clone(), Secret::new(vec![9; 32])]), hex(with_two), "RFC 9370 §2.2.4");
    }

    #[test]
    fn a_nat_is_detected_by_the_hash_of_rfc_7296_section_2_23() {
        let (_, _, _, spis) = inputs();
        let hash = nat_detection_hash(&spis, "10.0.0.6:4500".parse().unwrap());
        assert_eq!(hash[..], hex("b0cc5ace5cb3c0459d68c03fbe00b84e685d8ea9"));
    }

    #[test]
    fn no_key_is_printed() {
        let (shared, ni, nr, spis) = inputs();
        let keys = IkeKeys::initial(&SUITE, &shared, &ni, &nr, &spis);
        let child = ChildKeys::derive(Prf::HmacSha256, &keys.sk_d, &[], &ni, &nr, Encr::Aes256Gcm16);
        let text = format!("{keys:?} {child:?}");
        assert!(!text.contains('['), "{text}");
    }
}
