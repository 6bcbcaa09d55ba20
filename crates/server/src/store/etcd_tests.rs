//! The store in a real etcd.

use std::time::{Duration, Instant};

use super::*;
use crate::store::suite;

#[path = "../../tests/server/etcd.rs"]
mod etcd;

use etcd::{Etcd, PASSWORD};

/// Long for whatever is waited for, on a busy machine, too.
const ENOUGH: Duration = Duration::from_secs(60);

fn epoch(seed: u8) -> Epoch {
    Epoch::from_random([seed; 8])
}

fn put(key: &str, value: &str) -> Txn {
    Txn::new(vec![], vec![Op::Put(key.into(), value.into())])
}

#[tokio::test]
async fn etcd_keeps_the_promises_of_every_store() {
    let etcd = Etcd::start(1);
    let mut count = 0;
    suite::run(async || {
        count += 1;
        EtcdStore::open(&etcd.config(&format!("/{count}")), epoch(1)).await.unwrap()
    })
    .await;
}

#[tokio::test]
async fn all_servers_on_one_etcd_share_epoch_revisions_and_changes_and_others_keys_are_theirs() {
    let etcd = Etcd::start(1);
    let (config, elsewhere) = (etcd.config("/blue"), etcd.config("/red"));
    let one = EtcdStore::open(&config, epoch(1)).await.unwrap();
    let two = EtcdStore::open(&config, epoch(2)).await.unwrap();
    let other = EtcdStore::open(&elsewhere, epoch(3)).await.unwrap();
    assert_eq!((one.epoch(), two.epoch(), other.epoch()), (epoch(1), epoch(1), epoch(3)));
    let start = one.range("/").await.unwrap().0;
    let mut watch = two.watch("/", start).await.unwrap();
    let made = one.txn(put("/a", "1")).await.unwrap().revision;
    assert_eq!(watch.next().await.unwrap().revision, made);
    other.txn(put("/a", "2")).await.unwrap();
    let (revision, all) = two.range("/").await.unwrap();
    assert_eq!(
        (revision, all.len(), &all[0].value[..]),
        (made, 1, &b"1"[..]),
        "others' changes are not ours"
    );
    let held = two.txn(Txn::new(vec![Compare::Absent("/a".into())], vec![])).await.unwrap();
    assert_eq!((held.succeeded, held.revision), (false, made));
    assert_eq!(one.txn(put("/b", "1")).await.unwrap().revision, watch.next().await.unwrap().revision);
}

#[tokio::test]
async fn a_state_of_many_pages_and_a_transaction_of_many_keys_come_whole() {
    let etcd = Etcd::start(1);
    let store = EtcdStore::open(&etcd.config(""), epoch(1)).await.unwrap();
    let start = store.range("/").await.unwrap().0;
    let keys = (0..4000).map(|n| Op::Put(format!("/n/{n:05}"), vec![b'x'; 250]));
    let mut watch = store.watch("/n/", start).await.unwrap();
    let made = store.txn(Txn::new(vec![], keys.collect())).await.unwrap();
    let batch = watch.next().await.unwrap();
    assert_eq!((batch.revision, batch.events.len()), (made.revision, 4000), "one revision, one batch");
    let all = store.range("/n/").await.unwrap().1;
    assert!(all.iter().enumerate().all(|(n, kv)| kv.key == format!("/n/{n:05}")) && all.len() == 4000);
    store.txn(Txn::new(vec![], vec![Op::DeletePrefix("/n/".into())])).await.unwrap();
    assert_eq!(watch.next().await.unwrap().events.len(), 4000);
}

#[tokio::test]
async fn a_watch_from_before_a_compaction_is_told_so() {
    let etcd = Etcd::start(1);
    let store = EtcdStore::open(&etcd.config(""), epoch(1)).await.unwrap();
    let start = store.range("/").await.unwrap().0;
    for _ in 0..5 {
        store.txn(put("/a", "1")).await.unwrap();
    }
    let compact = start.0 + 3;
    etcd.ask(0, "/v3/kv/compaction", json!({ "revision": compact.to_string(), "physical": true })).await;
    let mut watch = store.watch("/", start).await.unwrap();
    let error = watch.next().await.unwrap_err();
    assert_eq!(error, StoreError::Compacted { asked: start, oldest: Revision(compact - 1) });
    let mut watch = store.watch("/", Revision(compact)).await.unwrap();
    assert_eq!(watch.next().await.unwrap().revision.0, compact + 1);
}

#[tokio::test]
async fn an_etcd_that_takes_small_transactions_only_is_refused_with_the_remedy() {
    let etcd = Etcd::start_with(1, &["--max-txn-ops=128"]);
    let Err(error) = EtcdStore::open(&etcd.config(""), epoch(1)).await else { panic!("opened") };
    assert!(error.to_string().contains("--max-txn-ops=10000"), "{error}");
    let looked = etcd.ask(0, "/v3/kv/range", json!({ "key": "AA==", "range_end": "AA==" })).await;
    assert!(looked["kvs"].is_null(), "nothing was written: {looked}");
}

#[tokio::test]
async fn keys_without_a_life_are_not_taken_for_a_store() {
    let etcd = Etcd::start(1);
    let config = etcd.config("/x");
    let half = EtcdStore::begin(&config, epoch(9), Revision(1000), false).await.unwrap().unwrap();
    half.txn(put("/droveway/default/environment", "{}")).await.unwrap();
    let Err(error) = EtcdStore::open(&config, epoch(1)).await else { panic!("opened") };
    assert!(error.to_string().contains("cut short"), "{error}");
    assert!(
        EtcdStore::begin(&config, epoch(3), Revision(0), false).await.unwrap().is_none(),
        "not without force"
    );
    // Another restore, which was told to, takes over; the first one is told so and adds nothing more.
    let first = half;
    let half = EtcdStore::begin(&config, epoch(2), Revision(1000), true).await.unwrap().unwrap();
    let late = Txn::new(vec![first.beginning()], vec![Op::Put("/droveway/default/late".into(), vec![])]);
    assert!(!first.txn(late).await.unwrap().succeeded);
    assert!(matches!(first.finish().await.unwrap_err(), OpenEtcdError::TakenOver));
    half.txn(put("/droveway/default/environment", "{}")).await.unwrap();
    half.finish().await.unwrap();
    let store = EtcdStore::open(&config, epoch(1)).await.unwrap();
    assert_eq!(store.epoch(), epoch(2));
    let (revision, all) = store.range("/").await.unwrap();
    assert!(
        revision > Revision(1000) && all[0].created > Revision(1000),
        "above the revisions of the life before"
    );
    let next = Txn::new(
        vec![
            Compare::Modified(all[0].key.clone(), all[0].modified),
            Compare::NonePutSince("/".into(), revision),
        ],
        vec![Op::Delete(all[0].key.clone())],
    );
    assert!(store.txn(next).await.unwrap().succeeded);
    // A store that is replaced under a server ends it.
    let mut watch = store.watch("/droveway/", revision).await.unwrap();
    EtcdStore::begin(&config, epoch(4), Revision(0), true).await.unwrap().unwrap();
    let error = loop {
        match watch.next().await {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert_eq!(error, StoreError::Closed(Ended::Replaced));
    assert_eq!(store.range("/").await.unwrap_err(), error, "also what comes later");
}

/// Whatever may be missing for a moment after etcd was started.
async fn done<T>(mut attempt: impl AsyncFnMut() -> Result<T, StoreError>) -> T {
    let begun = Instant::now();
    loop {
        match attempt().await {
            Ok(done) => return done,
            Err(StoreError::Unreachable(_) | StoreError::Unknown(_)) => {}
            Err(error) => panic!("{error}"),
        }
        assert!(begun.elapsed() < ENOUGH, "it does not come back");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Follows the store from `at` on as a server does, until that has an end.
async fn ends(store: &EtcdStore, at: Revision) -> StoreError {
    let follow = async {
        loop {
            let error = match store.watch("/droveway/", at).await {
                Ok(mut watch) => loop {
                    if let Err(error) = watch.next().await {
                        break error;
                    }
                },
                Err(error) => error,
            };
            match error {
                StoreError::Lagged | StoreError::Unreachable(_) | StoreError::Unknown(_) => {}
                error => return error,
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(ENOUGH, follow).await.expect("it is followed as if nothing had happened")
}

async fn all_are_told(store: &EtcdStore, why: &StoreError) {
    assert!(matches!(why, StoreError::Closed(Ended::SetBack { .. })), "{why}");
    assert_eq!(store.txn(put("/droveway/a", "late")).await.as_ref().unwrap_err(), why);
    assert_eq!(store.range("/").await.as_ref().unwrap_err(), why);
    assert_eq!(store.watch("/", Revision(1)).await.as_ref().unwrap_err(), why);
}

#[tokio::test]
async fn an_etcd_that_was_put_back_ends_the_store_and_one_that_starts_again_does_not() {
    let mut etcd = Etcd::start(1);
    let store = EtcdStore::open(&etcd.config(""), epoch(1)).await.unwrap();
    let saved = etcd.save(0);
    for n in 0..20 {
        done(async || store.txn(put("/droveway/n", &n.to_string())).await).await;
    }
    for _ in 0..3 {
        // It knows what it wrote a while before it is asked for it, and not all of it at once.
        etcd.restart(0);
        let at = done(async || store.range("/").await).await.0;
        let mut watch = done(async || store.watch("/droveway/", at).await).await;
        let made = store.txn(put("/droveway/n", "more")).await.unwrap().revision;
        while watch.next().await.unwrap().revision < made {}
        // So would somebody change it who does not know how.
        let by_hand = json!({ "key": encode("/droveway/by-hand"), "value": "" });
        etcd.ask(0, "/v3/kv/put", by_hand).await;
        let later = watch.next().await.unwrap().revision;
        assert!(later > made);
        drop(store.watch("/droveway/", later).await.unwrap());
    }
    // Asked for nothing, only followed.
    let at = store.range("/").await.unwrap().0;
    etcd.put_back(0, &saved);
    let why = ends(&store, at).await;
    all_are_told(&store, &why).await;
    let fresh = EtcdStore::open(&etcd.config(""), epoch(2)).await.unwrap();
    assert!(fresh.range("/droveway/").await.unwrap().1.is_empty(), "nothing was changed in it");
}

#[tokio::test]
async fn an_etcd_that_was_put_back_is_found_out_whatever_others_wrote_to_it_since() {
    let mut etcd = Etcd::start(1);
    let store = EtcdStore::open(&etcd.config(""), epoch(1)).await.unwrap();
    let saved = etcd.save(0);
    let at = done(async || store.txn(put("/droveway/n", "1")).await).await.revision;
    etcd.put_back(0, &saved);
    let other = EtcdStore::open(&etcd.config("/other"), epoch(2)).await;
    let other = other.unwrap();
    for n in 0..20 {
        other.txn(put("/n", &n.to_string())).await.unwrap();
    }
    let why = ends(&store, at).await;
    all_are_told(&store, &why).await;
}

#[tokio::test]
async fn an_older_answer_ends_the_open_watches_of_a_store_at_once() {
    // What is asked of the second, which knows less, the watch at the first would never hear of.
    let (etcd, older) = (Etcd::start(1), Etcd::start(1));
    let mut config = etcd.config("");
    config.url.members.extend(older.config("").url.members);
    for ask in ["range", "txn"] {
        let store = EtcdStore::open(&config, epoch(1)).await.unwrap();
        for n in 0..20 {
            store.txn(put("/droveway/n", &n.to_string())).await.unwrap();
        }
        let at = store.range("/").await.unwrap().0;
        let mut watch = store.watch("/droveway/", at).await.unwrap();
        store.inner.gateway.use_member(1);
        let why = match ask {
            "range" => store.range("/").await.map(drop),
            _ => store.txn(put("/droveway/a", "1")).await.map(drop),
        };
        let why = why.unwrap_err();
        let told = tokio::time::timeout(ENOUGH, watch.next()).await.unwrap().unwrap_err();
        assert_eq!(told, why, "{ask}");
        store.inner.gateway.use_member(0);
        all_are_told(&store, &why).await;
    }
}

#[tokio::test]
async fn a_watch_leaves_a_member_that_hangs() {
    let etcd = Etcd::start(3);
    let store = EtcdStore::open(&etcd.config(""), epoch(1)).await.unwrap();
    let at = store.range("/").await.unwrap().0;
    store.inner.gateway.use_member(1);
    let mut watch = store.watch("/droveway/", at).await.unwrap();
    etcd.hang(1, true);
    store.inner.gateway.use_member(2);
    let made = done(async || store.txn(put("/droveway/a", "1")).await).await.revision;
    let told = tokio::time::timeout(ENOUGH, watch.next()).await.expect("it waits for a member that hangs");
    assert_eq!(told.unwrap_err(), StoreError::Lagged);
    let mut watch = done(async || store.watch("/droveway/", at).await).await;
    assert_eq!(watch.next().await.unwrap().revision, made);
    etcd.hang(1, false);
}

#[tokio::test]
async fn the_death_of_etcds_leader_loses_nothing_that_was_answered_and_does_nothing_twice() {
    let mut etcd = Etcd::start(3);
    let store = EtcdStore::open(&etcd.config(""), epoch(1)).await.unwrap();
    let start = store.range("/").await.unwrap().0;
    let status = etcd.ask(0, "/v3/maintenance/status", json!({})).await;
    let mut leader = 0;
    for n in 0..3 {
        let own = etcd.ask(n, "/v3/maintenance/status", json!({})).await;
        if own["header"]["member_id"] == status["leader"] {
            leader = n;
        }
    }
    // The one that is spoken to is the one that dies.
    store.inner.gateway.use_member(leader);
    let mut watch = store.watch("/", start).await.unwrap();
    let mut known = Vec::new();
    for n in 0..60u32 {
        if n == 20 {
            etcd.kill(leader);
        }
        let key = format!("/n/{n}");
        loop {
            let once = Txn::new(vec![Compare::Absent(key.clone())], vec![Op::Put(key.clone(), vec![1])]);
            match store.txn(once).await {
                Ok(outcome) => {
                    known.push((key, outcome.succeeded));
                    break;
                }
                Err(StoreError::Unknown(_) | StoreError::Unreachable(_)) => {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                Err(error) => panic!("{error}"),
            }
        }
    }
    let all = store.range("/n/").await.unwrap().1;
    assert_eq!(all.len(), 60);
    assert!(all.iter().all(|kv| kv.version == 1), "done once each");
    assert!(known.iter().filter(|(_, first)| !first).count() <= 1, "one request at most was in the air");
    // The watch goes on at another member from where it was.
    let mut at = start;
    let mut seen = 0;
    while seen < 60 {
        match watch.next().await {
            Ok(batch) => {
                assert!(batch.revision > at);
                at = batch.revision;
                seen += batch.events.len();
            }
            Err(StoreError::Lagged) => watch = store.watch("/", at).await.unwrap(),
            Err(error) => panic!("{error}"),
        }
    }
    assert_eq!(seen, 60);
}

#[tokio::test]
async fn an_etcd_that_nobody_serves_is_said() {
    let mut etcd = Etcd::start(1);
    let store = EtcdStore::open(&etcd.config(""), epoch(1)).await.unwrap();
    etcd.kill(0);
    // The first request may have been on its way when the connection broke.
    let first = store.txn(put("/a", "1")).await.unwrap_err();
    assert!(matches!(&first, StoreError::Unknown(_) | StoreError::Unreachable(_)), "{first}");
    let error = store.txn(put("/a", "1")).await.unwrap_err();
    assert!(matches!(&error, StoreError::Unreachable(why) if why.contains("refused")), "{error}");
}

#[tokio::test]
async fn etcd_with_tls_and_users_keeps_the_promises_of_every_store_and_a_session_that_runs_out_is_renewed() {
    let etcd = Etcd::start_secure("/").await;
    let mut count = 0;
    suite::run(async || {
        count += 1;
        EtcdStore::open(&etcd.config(&format!("/{count}")), epoch(1)).await.unwrap()
    })
    .await;

    let store = EtcdStore::open(&etcd.config("/sessions"), epoch(1)).await.unwrap();
    let start = store.range("/").await.unwrap().0;
    let mut early = store.watch("/", start).await.unwrap();
    let look = json!({ "key": encode("/sessions"), "count_only": true });
    for next in ["watch", "transaction", "look"] {
        let session = store.inner.gateway.session().unwrap();
        // Whoever asks with it prolongs it.
        loop {
            tokio::time::sleep(Duration::from_secs(2)).await;
            let answer = etcd.ask_with(&session, 0, "/v3/kv/range", look.clone()).await;
            if answer["error"].as_str().is_some_and(|error| error.contains("invalid auth token")) {
                break;
            }
        }
        let mut late = if next == "watch" { Some(store.watch("/", start).await.unwrap()) } else { None };
        if next == "look" {
            store.range("/").await.unwrap();
        }
        let made = store.txn(put("/a", next)).await.unwrap().revision;
        assert_eq!(early.next().await.unwrap().revision, made, "a watch outlives the session it began with");
        if let Some(late) = &mut late {
            assert_eq!(late.next().await.unwrap().revision, made);
        }
    }
}

#[tokio::test]
async fn an_etcd_that_lets_us_not_in_is_said_with_the_remedy_and_without_the_password() {
    let (etcd, plain) = (Etcd::start_secure("/ours/").await, Etcd::start(1));
    let good = etcd.config("/ours");
    let file = |name: &str| Some(etcd.file(name));
    let nobody = EtcdConfig { user: None, password_file: None, ..good.clone() };
    let gone = "etcd://127.0.0.1:9".parse().unwrap();
    let clear = EtcdConfig { ca: None, certificate: None, key: None, ..good.clone() };
    for (config, says) in [
        (EtcdConfig { ca: file("other-ca.pem"), ..good.clone() }, "not from the CA in --store-ca"),
        (EtcdConfig { ca: file("password"), ..good.clone() }, "it holds no such thing in PEM"),
        (EtcdConfig { ca: None, ..good.clone() }, "--store-cert needs --store-ca"),
        (clear.clone(), "if it speaks TLS, give its CA with --store-ca"),
        (EtcdConfig { certificate: None, key: None, ..good.clone() }, "--store-cert"),
        (
            EtcdConfig {
                certificate: file("other-client.pem"),
                key: file("other-client.key"),
                ..good.clone()
            },
            "refuses our certificate",
        ),
        (
            EtcdConfig { certificate: file("named.pem"), key: file("named.key"), ..good.clone() },
            "takes no certificate that has a CommonName",
        ),
        (nobody.clone(), "log in with --store-user and --store-password-file"),
        (EtcdConfig { user: Some("who".into()), ..good.clone() }, "check --store-user and the password"),
        (
            EtcdConfig { password_file: file("other-password"), ..good.clone() },
            "check --store-user and the password",
        ),
        (EtcdConfig { password_file: file("none"), ..good.clone() }, "none for etcd: No such file"),
        (EtcdConfig { password_file: None, ..good.clone() }, "go together"),
        (
            EtcdConfig { user: Some("stranger".into()), ..good.clone() },
            "grant the role of --store-user readwrite",
        ),
        (etcd.config("/theirs"), "grant the role of --store-user readwrite"),
        (
            EtcdConfig { url: plain.config("").url, ..good.clone() },
            "if it does not speak TLS, leave --store-ca out",
        ),
        (EtcdConfig { url: plain.config("").url, ..clear }, "leave --store-user out"),
        (EtcdConfig { url: gone, ..nobody }, "https://127.0.0.1:9: Connection refused"),
    ] {
        let Err(error) = EtcdStore::open(&config, epoch(1)).await else { panic!("opened: {says}") };
        let error = error.to_string();
        assert!(error.contains(says), "{says:?} is not said: {error}");
        assert!(!error.contains(PASSWORD) && !error.contains("may have been made"), "{error}");
    }
    assert!(EtcdStore::existing(&good).await.unwrap().is_none(), "nothing was written");
    // A right that is taken away while the store is open.
    let store = EtcdStore::open(&good, epoch(1)).await.unwrap();
    let root = etcd.ask(0, "/v3/auth/authenticate", json!({ "name": "root", "password": PASSWORD })).await;
    let revoke = json!({ "name": etcd::USER, "role": "droveway" });
    etcd.ask_with(root["token"].as_str().unwrap(), 0, "/v3/auth/user/revoke", revoke).await;
    let refused =
        |error: StoreError| matches!(&error, StoreError::Refused(why) if why.contains("grant the role"));
    assert!(refused(store.txn(put("/a", "1")).await.unwrap_err()));
    assert!(refused(store.watch("/", Revision(0)).await.unwrap_err()), "not again and again without a pause");
}
