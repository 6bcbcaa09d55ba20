//! The books against a disk that takes nothing, and while addresses go back to the server.

use std::path::Path;

use model::{Block, Change, Claim, EndpointKind, Mac, NetworkSpec, PublishedPort};

use super::*;
use crate::control::Refusal;

fn network() -> Network {
    let spec = NetworkSpec::new("managed".parse().unwrap(), "10.42.0.0/16".parse().unwrap());
    spec.validate(NetworkId::from_random([1; 8]), 1, 0).unwrap()
}

fn host() -> HostId {
    HostId::from_random([2; 8])
}

fn block(cidr: &str) -> Block {
    let network = network().id;
    Block { network, cidr: cidr.parse().unwrap(), host: host(), leased: Revision(1) }
}

fn open(directory: &Path) -> Book {
    Book::open(Ledger::open(directory).unwrap(), host(), "h1".parse().unwrap()).unwrap()
}

fn book(directory: &Path) -> Book {
    let mut book = open(directory);
    let objects = vec![Object::Network(network()), Object::Block(block("10.42.64.0/26"))];
    book.watch(Watch::Snapshot {
        epoch: "abcdefghij".parse().unwrap(),
        revision: Revision(1),
        environment: "default".parse().unwrap(),
        host: host(),
        domain: "droveway.internal".to_owned(),
        objects,
    })
    .unwrap();
    book
}

fn put(revision: u64, cidr: &str) -> Watch {
    Watch::Delta { revision: Revision(revision), changes: vec![Change::Put(Object::Block(block(cidr)))] }
}

#[test]
fn a_change_that_the_disk_does_not_take_is_not_lost() {
    let directory = tempfile::tempdir().unwrap();
    let mut book = book(directory.path());
    book.ledger.refuse_writes(true);
    book.watch(put(2, "10.42.64.64/26")).unwrap_err();
    book.ledger.refuse_writes(false);
    book.watch(put(3, "10.42.64.128/26")).unwrap();

    assert_eq!(book.catalog.blocks.len(), 3);
    let known = book.catalog.clone();
    drop(book);
    let again = open(directory.path());
    assert_eq!((again.catalog, again.revision), (known, Revision(3)));
}

#[test]
fn a_ledger_that_takes_nothing_says_so_until_it_takes_something() {
    let directory = tempfile::tempdir().unwrap();
    let mut book = book(directory.path());
    book.takes().unwrap();
    book.ledger.refuse_writes(true);
    book.watch(put(2, "10.42.64.64/26")).unwrap_err();
    let why = book.takes().unwrap_err().message;
    assert!(why.contains("takes nothing") && why.contains("ledger.sqlite"), "{why}");
    book.ledger.refuse_writes(false);
    book.watch(put(3, "10.42.64.128/26")).unwrap();
    book.takes().unwrap();
    let left: Vec<_> =
        std::fs::read_dir(directory.path()).unwrap().map(|file| file.unwrap().file_name()).collect();
    assert!(left.iter().all(|name| name.to_string_lossy().starts_with("ledger.sqlite")), "{left:?}");
}

#[test]
fn no_address_is_given_from_a_block_that_goes_back_until_it_is_granted_again() {
    let directory = tempfile::tempdir().unwrap();
    let mut book = book(directory.path());
    let (network, leased) = (network().id, block("10.42.64.0/26"));
    let key = Key::Block(network.clone(), leased.cidr);

    let address = book.reserve(&network, None).unwrap();
    assert!(!book.let_go(&key).unwrap(), "it is in use");
    book.unreserve(&network, address).unwrap();
    assert!(book.let_go(&key).unwrap());
    assert!(matches!(book.reserve(&network, None), Err(Refusal::NeedBlock { held: 0, .. })));
    let wish = Some("10.42.64.9".parse().unwrap());
    assert!(matches!(book.reserve(&network, wish), Err(Refusal::NeedBlock { held: 0, .. })));
    let again = open_copy(directory.path()).reserve(&network, None);
    assert!(matches!(again, Err(Refusal::NeedBlock { held: 0, .. })), "a restart does not bring it back");

    book.granted(Object::Block(leased.clone())).unwrap();
    assert!(book.reserve(&network, None).is_err(), "the answer to an older request");
    book.granted(Object::Block(Block { leased: Revision(7), ..leased })).unwrap();
    book.reserve(&network, None).unwrap();
}

#[test]
fn a_gateway_to_a_foreign_peer_fetches_its_first_block_and_keeps_it_until_the_peer_goes() {
    let directory = tempfile::tempdir().unwrap();
    let mut book = book(directory.path());
    let chores =
        |book: &Book| crate::chores::Chores::of(book, &BTreeMap::new(), |_| false, Revision::default());
    let (network, leased) = (network().id, block("10.42.64.0/26"));
    let key = Key::Block(network.clone(), leased.cidr);
    assert_eq!(chores(&book).give_back, std::slice::from_ref(&leased), "nobody needs it");

    let peer: model::Peer = serde_json::from_value(serde_json::json!({
        "id": model::PeerId::from_random([7; 8]), "name": "office", "network": network, "host": host(),
        "address": "192.0.2.1", "proof": {"by": "psk"}, "remote_cidrs": ["192.168.7.0/24"], "created": 0,
    }))
    .unwrap();
    let delta = |revision, change| Watch::Delta { revision: Revision(revision), changes: vec![change] };
    book.watch(delta(2, Change::Put(Object::Peer(peer.clone())))).unwrap();
    assert_eq!(chores(&book), crate::chores::Chores::default());
    assert!(!book.let_go(&key).unwrap());

    book.watch(delta(3, Change::Delete(key.clone()))).unwrap();
    assert_eq!(chores(&book).lease, [(network, 0)]);
    book.granted(Object::Block(leased.clone())).unwrap();
    assert_eq!(chores(&book).lease, []);

    book.watch(delta(4, Change::Delete(Key::Peer(peer.id)))).unwrap();
    assert_eq!(chores(&book).give_back, [leased]);
    assert!(book.let_go(&key).unwrap());
}

#[test]
fn the_server_is_told_of_endpoints_until_its_state_shows_them_and_of_no_others() {
    let directory = tempfile::tempdir().unwrap();
    let mut book = book(directory.path());
    let differing = |book: &Book| book.differing().cloned().collect::<Vec<_>>();
    let address = book.reserve(&network().id, None).unwrap();
    let made = book.create(&network().id, "docker-1", address, None).unwrap();
    let own = [made.id.clone()];
    assert_eq!(differing(&book), own);

    let delta = |changes| Watch::Delta { revision: Revision(2), changes };
    let shown = Change::Put(Object::Endpoint(made.clone()));
    book.watch(delta(vec![shown])).unwrap();
    assert_eq!(differing(&book), []);
    book.set_ports(&made.id, vec![PublishedPort { protocol: model::Protocol::Tcp, host_port: 0, port: 80 }])
        .unwrap();
    assert_eq!(differing(&book), own, "it changed");

    let elsewhere = Endpoint {
        id: EndpointId::from_random([9; 8]),
        host: HostId::from_random([9; 8]),
        kind: EndpointKind::Socket,
        mac: Mac([2; 6]),
        ..made.clone()
    };
    book.watch(delta(vec![Change::Put(Object::Endpoint(elsewhere))])).unwrap();
    assert_eq!(differing(&book), own, "another host's is none of ours");
    book.forget(&made.id, false).unwrap();
    assert_eq!(differing(&book), own, "it is gone and still shown");
    assert_eq!(differing(&open_copy(directory.path())), own, "a restart changes nothing");
    book.watch(delta(vec![Change::Delete(Key::Endpoint(made.id))])).unwrap();
    assert_eq!(differing(&book), []);
}

/// The ledger as an agent would find it after a loss of power.
fn open_copy(directory: &Path) -> Book {
    let copy = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(directory).unwrap().map(Result::unwrap) {
        std::fs::copy(file.path(), copy.path().join(file.file_name())).unwrap();
    }
    open(copy.path())
}

fn retained(seconds: u64) -> Claim {
    Claim {
        network: network().id,
        address: "10.42.15.192".parse().unwrap(),
        host: host(),
        endpoint: EndpointId::from_random([5; 8]),
        asked: false,
        router: false,
        retained: Some(model::Retained { owner: "shop/db".into(), seconds }),
        wanted: None,
    }
}

#[test]
fn a_retained_address_is_for_its_owner_alone_until_its_time_is_over_or_another_host_gets_it() {
    let directory = tempfile::tempdir().unwrap();
    let mut book = book(directory.path());
    let chores =
        |book: &Book| crate::chores::Chores::of(book, &BTreeMap::new(), |_| true, Revision::default());
    let missing = book.retained(&network(), "shop/db");
    assert!(matches!(missing, Err(Refusal::NeedRetained { owner, .. }) if owner == "shop/db"));
    let claim = retained(3600);
    book.granted(Object::Claim(claim.clone())).unwrap();
    let of_owner = |book: &Book| book.retained(&network(), "shop/db").unwrap();
    assert_eq!(of_owner(&book), Some(claim.address));
    assert_eq!(of_owner(&open_copy(directory.path())), Some(claim.address), "a restart does not change that");
    assert!(matches!(book.retained(&network(), "db"), Err(Refusal::NeedRetained { .. })), "another's");
    assert_eq!(chores(&book).release, []);
    book.reserve(&claim.network, Some(claim.address)).unwrap();
    assert_eq!(of_owner(&book), None, "somebody of that name has it");

    // Another host asks for it.
    let wanted = model::Wanted {
        host: HostId::from_random([9; 8]),
        endpoint: EndpointId::from_random([6; 8]),
        at: Revision(4),
    };
    let asked = Claim { wanted: Some(wanted), ..claim.clone() };
    let delta = |claim: &Claim| Watch::Delta {
        revision: Revision(5),
        changes: vec![Change::Put(Object::Claim(claim.clone()))],
    };
    book.watch(delta(&asked)).unwrap();
    assert_eq!(chores(&book).consent, std::slice::from_ref(&asked));
    assert!(!book.consent(&asked).unwrap(), "it is in use");
    book.unreserve(&claim.network, claim.address).unwrap();
    assert!(book.consent(&asked).unwrap());
    for book in [&book, &open_copy(directory.path())] {
        assert!(
            matches!(book.retained(&network(), "shop/db"), Err(Refusal::NeedRetained { .. })),
            "let go of"
        );
        assert_eq!(chores(book).release, [], "it is not the server's to have back");
    }
    // It asks no more.
    book.watch(delta(&claim)).unwrap();
    assert_eq!(of_owner(&book), Some(claim.address));
    assert!(!book.consent(&asked).unwrap(), "an old question");

    book.watch(delta(&retained(0))).unwrap();
    assert_eq!(chores(&book).release, [retained(0)], "its time is over");
}

#[test]
fn a_ledger_that_does_not_count_draws_its_host_alone_and_refuses_what_attaches() {
    let directory = tempfile::tempdir().unwrap();
    let mut book = book(directory.path());
    let other = Block { host: HostId::from_random([9; 8]), ..block("10.42.65.0/26") };
    book.granted(Object::Block(other)).unwrap();
    assert_eq!(book.drawn().blocks.len(), 2);
    let (step, ours) = book.begin().unwrap();
    assert!(ours && step.from.is_none());
    book.begun(&step.to);
    // A start that ended before it heard: the next settles what it told before it begins.
    let (told, _) = book.begin().unwrap();
    let mut next = open_copy(directory.path());
    let (again, ours) = next.begin().unwrap();
    assert_eq!((&again.to, ours), (&told.to, false));
    next.begun(&again.to);
    let (fresh, ours) = next.begin().unwrap();
    assert!(ours && fresh.from.as_ref() == Some(&told.to));

    book.set_copied("a copy".into()).unwrap();
    for book in [&book, &open_copy(directory.path())] {
        assert_eq!(book.drawn().blocks.len(), 1);
        assert_eq!(book.counts().unwrap_err().code, ErrorCode::Copied);
    }
    book.ledger.refuse_writes(true);
    assert_eq!(book.begin().unwrap().0, told, "it is written down already");
}

#[test]
fn an_address_that_goes_back_stays_let_go_of_when_what_was_asked_for_it_is_granted_meanwhile() {
    let directory = tempfile::tempdir().unwrap();
    let mut book = book(directory.path());
    let granted = Claim { retained: None, ..retained(0) };
    let asked = Claim { asked: true, ..granted.clone() };
    let delta = |revision, change| Watch::Delta { revision: Revision(revision), changes: vec![change] };
    book.watch(delta(2, Change::Put(Object::Claim(asked.clone())))).unwrap();
    let key = Key::Claim(asked.network.clone(), asked.address);
    assert!(book.let_go(&key).unwrap());
    book.watch(delta(3, Change::Put(Object::Claim(granted.clone())))).unwrap();
    book.granted(Object::Claim(granted.clone())).unwrap();
    for mut book in [open_copy(directory.path()), book] {
        let given = book.reserve(&granted.network, Some(granted.address));
        assert!(
            matches!(given, Err(Refusal::NeedClaim { .. })),
            "that it goes back may come late: {given:?}"
        );
    }
}

#[test]
fn an_address_rests_after_another_hosts_claim_is_gone_also_when_the_agent_starts_again() {
    let far =
        Claim { host: HostId::from_random([9; 8]), address: "10.42.64.9".parse().unwrap(), ..retained(0) };
    let key = Key::Claim(far.network.clone(), far.address);
    let put = Change::Put(Object::Claim(far.clone()));
    let delta = |revision, change: &Change| Watch::Delta {
        revision: Revision(revision),
        changes: vec![change.clone()],
    };
    let snapshot = |revision| Watch::Snapshot {
        epoch: "abcdefghij".parse().unwrap(),
        revision: Revision(revision),
        environment: "default".parse().unwrap(),
        host: host(),
        domain: "droveway.internal".to_owned(),
        objects: vec![Object::Network(network()), Object::Block(block("10.42.64.0/26"))],
    };
    for how in ["a delta", "a delta that the disk did not take at first", "a snapshot without it"] {
        let directory = tempfile::tempdir().unwrap();
        let mut book = book(directory.path());
        book.watch(delta(2, &put)).unwrap();
        match how {
            "a delta" => book.watch(delta(3, &Change::Delete(key.clone()))).unwrap(),
            "a snapshot without it" => book.watch(snapshot(3)).unwrap(),
            _ => {
                book.ledger.refuse_writes(true);
                book.watch(delta(3, &Change::Delete(key.clone()))).unwrap_err();
                book.ledger.refuse_writes(false);
                book.watch(Watch::Heartbeat { revision: Revision(3) }).unwrap();
            }
        }
        for mut book in [open_copy(directory.path()), book] {
            assert_eq!(book.resting(), [(far.network.clone(), far.address)], "{how}");
            let mut given = 0;
            while let Ok(address) = book.reserve(&far.network, None) {
                assert_ne!(address, far.address, "{how}: others may still send to the host that had it");
                given += 1;
            }
            assert!(given > 50, "{given}");
        }
    }
}

#[test]
fn an_endpoint_whose_block_went_to_another_host_is_a_trouble_until_it_has_the_claim() {
    let directory = tempfile::tempdir().unwrap();
    let mut book = book(directory.path());
    let address = book.reserve(&network().id, None).unwrap();
    let made = book.create(&network().id, "docker-1", address, None).unwrap();
    assert_eq!(book.troubles(), [""; 0]);
    let lost = Block { host: HostId::from_random([9; 8]), ..block("10.42.64.0/26") };
    let delta =
        |revision, object| Watch::Delta { revision: Revision(revision), changes: vec![Change::Put(object)] };
    book.watch(delta(2, Object::Block(lost))).unwrap();
    let troubles = book.troubles();
    let says = |trouble: &String| {
        trouble.contains(made.id.as_str())
            && trouble.contains(&address.to_string())
            && trouble.contains("start it again")
    };
    assert!(troubles.len() == 1 && troubles.iter().all(says), "{troubles:?}");
    let claim = Claim { address, endpoint: made.id, retained: None, ..retained(0) };
    book.watch(delta(3, Object::Claim(Claim { asked: true, ..claim.clone() }))).unwrap();
    assert_eq!(book.troubles().len(), 1, "what is asked for is not granted");
    book.watch(delta(4, Object::Claim(claim))).unwrap();
    assert_eq!(book.troubles(), [""; 0]);
}
