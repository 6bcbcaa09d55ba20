//! The harness itself: what it says of a charon is true of two.

use droveway::lab::capture::What;
use droveway::lab::{Lab, LabSpec};

use super::SECRET;
use crate::charon::{Authority, Charon, Connection, Key, Proof, Settings};
use crate::support::{LIMIT, spec, until};
use crate::watch::Watch;

fn boxes(names: &[&str]) -> Lab {
    let others = names.iter().map(|name| name.parse().unwrap()).collect();
    Lab::up(LabSpec { bare: true, others, ..spec(1) }).unwrap()
}

#[test]
fn two_charons_show_what_the_harness_says_of_a_charon() {
    let lab = boxes(&["left", "right"]);
    let mut watch = Watch::begin(&lab);
    let (mut left, mut right) = (
        Charon::start(&lab, "left", "192.168.77.1/24", Settings::default()),
        Charon::start(&lab, "right", "192.168.78.1/24", Settings::default()),
    );
    let ca = Authority::new("CA");
    let cases = [
        (None, "aes128gcm16", "x25519", "AES_GCM_16-128", "CURVE_25519"),
        (Some(Key::EcdsaP256), "aes256gcm16", "ecp256", "AES_GCM_16-256", "ECP_256"),
        (Some(Key::Ed25519), "aes128gcm16", "ecp384", "AES_GCM_16-128", "ECP_384"),
        (Some(Key::Rsa), "aes256gcm16", "x25519", "AES_GCM_16-256", "CURVE_25519"),
    ];
    for (key, aes, group, encryption, dh) in cases {
        let proofs = |name: &str| match key {
            None => (Proof::Psk(SECRET.to_owned()), Proof::Psk(SECRET.to_owned())),
            Some(key) => (Proof::Certificate(ca.certify(name, key)), Proof::SignedBy(ca.der())),
        };
        let (of_left, of_right) = (proofs("left.example"), proofs("right.example"));
        let ike = format!("{aes}-prfsha256-{group}");
        let esp = format!("{aes}-{group}");
        let one = Connection {
            ike: ike.clone(),
            esp: esp.clone(),
            local_ts: vec!["192.168.77.0/24".to_owned()],
            remote_ts: vec!["192.168.78.0/24".to_owned()],
            ..Connection::new("c", "10.0.0.202", ("left.example", of_left.0), ("right.example", of_right.1))
        };
        let other = Connection {
            ike,
            esp,
            local_ts: vec!["192.168.78.0/24".to_owned()],
            remote_ts: vec!["192.168.77.0/24".to_owned()],
            ..Connection::new("c", "10.0.0.201", ("right.example", of_right.0), ("left.example", of_left.1))
        };
        left.load(&one);
        right.load(&other);
        left.initiate("c").unwrap();
        let (before, there) = (left.up("c"), right.up("c"));
        assert!(before.initiator && !there.initiator);
        assert_eq!(before.suite, format!("{encryption}/PRF_HMAC_SHA2_256/{dh}"));
        assert_eq!(before.children[0].suite, encryption);
        assert_eq!(
            (before.children[0].spi_in, before.children[0].spi_out),
            (there.children[0].spi_out, there.children[0].spi_in)
        );
        let seen = watch.report();
        assert!(left.pings("192.168.77.1", "192.168.78.1"));
        assert!(right.pings("192.168.78.1", "192.168.77.1"));
        let after = left.up("c");
        assert_eq!((after.children[0].packets_in, after.children[0].packets_out), (2, 2), "{after:#?}");
        assert!(after.children[0].bytes_in > 100);
        let seen = watch.sealed().since(&seen);
        let spi = after.children[0].spi_out;
        assert_eq!(seen.count(|flow| flow.what == What::Esp { spi } && flow.node == "left"), 2, "{seen}");
        left.terminate("c").unwrap();
        until(LIMIT, "both are without SAs", || left.sas("c").is_empty() && right.sas("c").is_empty());
    }
    // Killed, it says nothing; begun anew it replaces what the other still has.
    left.initiate("c").unwrap();
    let first = right.up("c");
    left.kill();
    assert_eq!(right.sas("c").len(), 1);
    left.restart();
    left.initiate("c").unwrap();
    until(
        LIMIT,
        "the old SA is replaced",
        || matches!(&right.sas("c")[..], [sa] if sa.unique != first.unique),
    );
    assert!(left.pings("192.168.77.1", "192.168.78.1"));
    // A refusal is in charon's words.
    let wrong = Proof::Psk("incorrect horse".to_owned());
    let mut psk = Connection::new(
        "c",
        "10.0.0.202",
        ("left.example", wrong),
        ("right.example", Proof::Psk(SECRET.to_owned())),
    );
    psk.local_ts = vec!["192.168.77.0/24".to_owned()];
    psk.remote_ts = vec!["192.168.78.0/24".to_owned()];
    left.unload("c");
    psk.ike = "aes128gcm16-prfsha256-ecp256".to_owned();
    left.load(&psk);
    let since = left.log().len();
    let error = left.initiate("c").unwrap_err();
    assert!(error.contains("failed"), "{error}");
    left.says(since, "NO_PROP");
}
