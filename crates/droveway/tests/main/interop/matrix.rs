//! Every way of beginning, proving and agreeing: 48 cells, twelve a lab. Charon alone is told which suite is a cell's; the
//! gateway offers and accepts all of them.

use super::{BOX, BOX_ID, Field, Trust, proved};
use crate::charon::{Authority, Charon, Key, Settings};
use crate::watch::Watch;

/// AES-GCM, as charon is told it and as it says it.
const CIPHERS: [(&str, &str); 2] = [("aes128gcm16", "AES_GCM_16-128"), ("aes256gcm16", "AES_GCM_16-256")];
const GROUPS: [(&str, &str); 3] = [("x25519", "CURVE_25519"), ("ecp256", "ECP_256"), ("ecp384", "ECP_384")];

/// From now on charon does not hear when it is begun with: IKE_SA_INIT requests to it are dropped (UDP, then RFC 7296 §3.1).
pub(super) const DEAF: &str = "table inet deaf { chain in { type filter hook input priority 0; \
                    udp dport 500 @th,208,8 34 @th,216,8 & 0x20 == 0 counter drop; }; }";

/// It hears again.
pub(super) const HEARS: &str = "delete table inet deaf";

/// All cells of one way of proving.
fn cells(key: Option<Key>) {
    let field = Field::new();
    let trust = key.map_or(Trust::Psk, |key| {
        let ca = Authority::new("CA of the box");
        let certified = ca.certify(BOX_ID, key);
        Trust::Certificates(Box::new((ca, certified)))
    });
    let mut watch = Watch::begin(&field.lab);
    let mut charon = field.charon(Settings::default());
    for it_begins in [false, true] {
        if it_begins {
            field.lab.check(BOX, &["nft", DEAF]).unwrap();
        }
        for cipher in CIPHERS {
            for group in GROUPS {
                let begun = std::time::Instant::now();
                cell(&field, &trust, &mut charon, &mut watch, it_begins, cipher, group);
                let who = if it_begins { "it begins" } else { "we begin" };
                println!("{key:?}, {who}, {}, {}: {:?}", cipher.1, group.1, begun.elapsed());
            }
        }
    }
}

fn cell(
    field: &Field,
    trust: &Trust,
    charon: &mut Charon<'_>,
    watch: &mut Watch,
    it_begins: bool,
    cipher: (&str, &str),
    group: (&str, &str),
) {
    let mut connection = field.connection(trust);
    connection.ike = format!("{}-prfsha256-{}", cipher.0, group.0);
    connection.esp = format!("{}-{}", cipher.0, group.0);
    charon.load(&connection);
    let before = watch.report();
    field.join(trust);
    if it_begins {
        // Not before the gateway has heard of the peer.
        crate::support::until(crate::support::LIMIT, "the gateway knows the peer", || {
            field.tunnel().is_some()
        });
        charon.initiate(BOX).unwrap();
    }
    let fresh = charon.up(BOX);
    let tunnel = field.up();
    assert_eq!(fresh.initiator, it_begins);
    assert_eq!(fresh.suite, format!("{}/PRF_HMAC_SHA2_256/{}", cipher.1, group.1));
    assert_eq!(fresh.children[0].suite, cipher.1);
    assert_eq!(tunnel.ike.as_ref().map(|ike| ike.initiator), Some(!it_begins), "{tunnel:#?}");
    assert!(field.both_ways(watch), "{tunnel:#?}");
    let seen = watch.sealed().since(&before);
    proved(&fresh, &charon.up(BOX), &seen, 2);
    field.part(charon);
}

#[test]
fn with_a_pre_shared_key_every_suite_works_whoever_begins() {
    cells(None);
}

#[test]
fn with_an_ecdsa_peer_every_suite_works_whoever_begins() {
    cells(Some(Key::EcdsaP256));
}

#[test]
fn with_an_ed25519_peer_every_suite_works_whoever_begins() {
    cells(Some(Key::Ed25519));
}

#[test]
fn with_an_rsa_peer_every_suite_works_whoever_begins() {
    cells(Some(Key::Rsa));
}
