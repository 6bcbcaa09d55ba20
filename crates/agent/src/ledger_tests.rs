//! What a ledger keeps, what it leaves no trace of, and what it refuses to be opened from.

use super::*;
use model::{EndpointId, EndpointKind, Mac};

fn record(seed: u8, address: &str) -> Record {
    Record {
        endpoint: Arc::new(Endpoint {
            id: EndpointId::from_random([seed; 8]),
            network: NetworkId::from_random([1; 8]),
            host: HostId::from_random([2; 8]),
            name: None,
            stack: None,
            service: None,
            aliases: vec![],
            addresses: vec![address.parse().unwrap()],
            mac: Mac([2, 0, 0, 0, 0, seed]),
            kind: EndpointKind::Socket,
            container: None,
            labels: BTreeMap::new(),
            ports: vec![],
            healthy: true,
            created: 7,
        }),
        foreign: None,
        sandbox: None,
        bridge: 0,
    }
}

#[test]
fn what_was_written_is_there_when_opened_again() {
    let dir = tempfile::tempdir().unwrap();
    let network = NetworkId::from_random([1; 8]);
    let (one, two) = (record(1, "10.42.16.2"), record(2, "10.42.16.3"));
    {
        let mut ledger = Ledger::open(dir.path()).unwrap();
        ledger.reserve(&network, "10.42.16.2".parse().unwrap()).unwrap();
        ledger.put_record(&one).unwrap();
        ledger.put_record(&two).unwrap();
        ledger.delete_record(&two, false, 99).unwrap();
        ledger.set_slot(&network, 3).unwrap();
    }
    let contents = Ledger::open(dir.path()).unwrap().load().unwrap();
    assert_eq!(contents.records, [one]);
    assert_eq!(contents.reservations, [], "an endpoint's address is not merely reserved");
    assert_eq!(contents.released[&(network.clone(), "10.42.16.3".parse().unwrap())], 99);
    assert_eq!(contents.slots[&network], 3);
}

#[test]
fn of_an_identity_and_a_peers_secret_nothing_is_left_in_the_file_once_they_are_gone() {
    let dir = tempfile::tempdir().unwrap();
    let has = |secret: &str| {
        let files =
            std::fs::read_dir(dir.path()).unwrap().map(|file| std::fs::read(file.unwrap().path()).unwrap());
        files.into_iter().any(|bytes| bytes.windows(secret.len()).any(|part| part == secret.as_bytes()))
    };
    let identity = |key: &str| Identity {
        host: HostId::from_random([2; 8]),
        name: "h1".parse().unwrap(),
        environment: EnvironmentId::default(),
        server: "https://a:1".into(),
        servers: vec![],
        ca: String::new(),
        certificate: String::new(),
        key: key.into(),
        certified: 0,
    };
    let peer = model::Peer {
        id: model::PeerId::from_random([3; 8]),
        name: "office".parse().unwrap(),
        network: NetworkId::from_random([1; 8]),
        host: HostId::from_random([2; 8]),
        address: "192.0.2.1".parse().unwrap(),
        port: None,
        identity: None,
        local_identity: None,
        proof: model::PeerProof::Psk { secret: Some("the secret of the office".into()) },
        remote_cidrs: vec![],
        created: 0,
    };
    let mut ledger = Ledger::open(dir.path()).unwrap();
    ledger.set_identity(&identity("the first private key")).unwrap();
    let object = Object::Peer(peer);
    let key = object.key();
    ledger.apply(Revision(1), &[Change::Put(object)], 0).unwrap();
    assert!(has("the secret of the office") && has("the first private key"));
    ledger.apply(Revision(2), &[Change::Delete(key)], 0).unwrap();
    ledger.wipe().unwrap();
    assert!(!has("the secret of the office"));
    ledger.set_identity(&identity("another private key")).unwrap();
    assert!(has("another private key") && !has("the first private key"));
}

#[test]
fn a_foreign_file_is_refused_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ledger.sqlite");
    let garbage = b"this is no database at all, but long enough to be looked at as one".repeat(40);
    std::fs::write(&path, &garbage).unwrap();
    let error = Ledger::open(dir.path()).err().unwrap();
    assert!(error.to_string().contains("move it away"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), garbage);

    std::fs::remove_file(&path).unwrap();
    Connection::open(&path).unwrap().execute_batch("CREATE TABLE theirs (x)").unwrap();
    assert!(matches!(Ledger::open(dir.path()), Err(LedgerError::Foreign(..))));
}

#[test]
fn a_truncated_ledger_is_refused_with_the_remedy_and_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(FILE);
    {
        let mut ledger = Ledger::open(dir.path()).unwrap();
        for seed in 0..200 {
            ledger.put_record(&record(seed, &format!("10.42.16.{seed}"))).unwrap();
        }
    }
    let whole = std::fs::read(&path).unwrap();
    for part in [whole.len() / 2, whole.len() - 4096, 4096, 1000] {
        std::fs::write(&path, &whole[..part]).unwrap();
        let error = Ledger::open(dir.path()).err().unwrap_or_else(|| panic!("{part} bytes are taken"));
        assert!(error.to_string().contains("move it away"), "{part} bytes: {error}");
        assert_eq!(std::fs::read(&path).unwrap(), whole[..part]);
    }
}

#[test]
fn a_damaged_ledger_that_is_only_looked_at_is_refused_with_the_remedy() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(FILE);
    drop(Ledger::open(dir.path()).unwrap());
    let whole = std::fs::read(&path).unwrap();
    // All but the header, all but the first page, and a table that is not there.
    for from in [0, 200, 4096] {
        let mut damaged = whole.clone();
        damaged[from..].fill(0xa5);
        std::fs::write(&path, &damaged).unwrap();
        let looked = Ledger::look(dir.path())
            .and_then(|ledger| ledger.unwrap().identity().map(drop))
            .err()
            .unwrap_or_else(|| panic!("damaged from {from} on it is taken"));
        assert!(looked.to_string().contains("move it away"), "{looked}");
    }
    std::fs::write(&path, &whole).unwrap();
    Connection::open(&path).unwrap().execute_batch("DROP TABLE meta").unwrap();
    let error = Ledger::look(dir.path()).unwrap().unwrap().identity().err().unwrap();
    assert!(error.to_string().contains("move it away"), "{error}");
}

#[test]
fn two_agents_cannot_share_a_ledger() {
    let dir = tempfile::tempdir().unwrap();
    let _first = Ledger::open(dir.path()).unwrap();
    let error = Ledger::open(dir.path()).err().unwrap();
    assert!(matches!(error, LedgerError::InUse(_)), "{error}");
}
