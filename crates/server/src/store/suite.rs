//! What every store must promise, as one function that each store's tests call.

use model::Revision;

use super::{Compare, Event, Op, Store, StoreError, Txn};

fn put(key: &str, value: &str) -> Op {
    Op::Put(key.into(), value.into())
}

fn always(ops: Vec<Op>) -> Txn {
    Txn::new(vec![], ops)
}

/// Runs all of it; `fresh` makes an empty store each time.
pub(crate) async fn run<S: Store>(mut fresh: impl AsyncFnMut() -> S) {
    revisions_count_changes(&fresh().await).await;
    compares_decide(&fresh().await).await;
    failure_ops_run_when_a_compare_fails(&fresh().await).await;
    only_one_of_many_creates_wins(fresh().await).await;
    prefixes_are_prefixes(&fresh().await).await;
    a_watch_sees_each_revision_whole_and_in_order(&fresh().await).await;
    a_key_put_twice_is_refused(&fresh().await).await;
    a_leader_that_was_replaced_changes_nothing(&fresh().await).await;
    a_watch_ends_with_its_reader_and_another_begins_where_it_left_off(&fresh().await).await;
}

async fn revisions_count_changes<S: Store>(store: &S) {
    let (start, none) = store.range("/").await.unwrap();
    assert!(none.is_empty());
    let first = store.txn(always(vec![put("/a", "1"), put("/b", "1")])).await.unwrap();
    assert!(first.succeeded);
    assert_eq!(first.revision.0, start.0 + 1, "one transaction, one revision");
    let second = store.txn(always(vec![put("/a", "2")])).await.unwrap();
    let nothing = store.txn(always(vec![Op::Delete("/none".into())])).await.unwrap();
    assert!(nothing.revision >= second.revision);
    let (revision, all) = store.range("/").await.unwrap();
    assert_eq!(revision, nothing.revision);
    let a = &all[0];
    assert_eq!(
        (a.key.as_str(), &a.value[..], a.created, a.modified, a.version),
        ("/a", &b"2"[..], first.revision, second.revision, 2)
    );
    assert_eq!((all[1].modified, all[1].version), (first.revision, 1));
    store.txn(always(vec![Op::Delete("/a".into())])).await.unwrap();
    let again = store.txn(always(vec![put("/a", "3")])).await.unwrap();
    let (_, all) = store.range("/a").await.unwrap();
    assert_eq!((all[0].created, all[0].version), (again.revision, 1), "a key made again is a new key");
}

async fn compares_decide<S: Store>(store: &S) {
    let made = store.txn(always(vec![put("/p/a", "1")])).await.unwrap().revision;
    let changed = store.txn(always(vec![put("/p/a", "2")])).await.unwrap().revision;
    let a = || "/p/a".to_owned();
    let none = || "/p/none".to_owned();
    for (compare, holds) in [
        (Compare::Absent(none()), true),
        (Compare::Absent(a()), false),
        (Compare::Present(a()), true),
        (Compare::Present(none()), false),
        (Compare::Value(a(), b"2".to_vec()), true),
        (Compare::Value(a(), b"1".to_vec()), false),
        (Compare::Value(none(), vec![]), false),
        (Compare::Created(a(), made), true),
        (Compare::Created(a(), changed), false),
        (Compare::Modified(a(), changed), true),
        (Compare::Modified(a(), made), false),
        (Compare::Modified(none(), Revision(0)), false),
        (Compare::NonePutSince("/p/".into(), changed), true),
        (Compare::NonePutSince("/p/".into(), made), false),
        (Compare::NonePutSince("/q/".into(), Revision(0)), true),
    ] {
        let outcome = store.txn(Txn::new(vec![compare.clone()], vec![])).await.unwrap();
        assert_eq!(outcome.succeeded, holds, "{compare:?}");
        assert_eq!(outcome.revision, changed);
    }
    let both = Txn::new(vec![Compare::Present(a()), Compare::Present(none())], vec![put("/x", "1")]);
    assert!(!store.txn(both).await.unwrap().succeeded, "every compare must hold");
    assert!(store.range("/x").await.unwrap().1.is_empty());
}

async fn failure_ops_run_when_a_compare_fails<S: Store>(store: &S) {
    let txn = Txn {
        compares: vec![Compare::Present("/none".into())],
        success: vec![put("/yes", "")],
        failure: vec![put("/no", "")],
    };
    assert!(!store.txn(txn).await.unwrap().succeeded);
    let (_, all) = store.range("/").await.unwrap();
    assert_eq!(all.len(), 1);
    assert_eq!(all[0].key, "/no");
}

async fn only_one_of_many_creates_wins<S: Store>(store: S) {
    let tries = (0..32).map(|i| {
        let txn = Txn::new(vec![Compare::Absent("/one".into())], vec![put("/one", &i.to_string())]);
        store.txn(txn)
    });
    let outcomes = futures_util::future::join_all(tries).await;
    assert_eq!(outcomes.into_iter().filter(|outcome| outcome.as_ref().unwrap().succeeded).count(), 1);
}

async fn prefixes_are_prefixes<S: Store>(store: &S) {
    let keys = ["/p", "/p/", "/p/1", "/p/1/x", "/p/é", "/p0", "/q"];
    store.txn(always(keys.iter().map(|key| put(key, "")).collect())).await.unwrap();
    let found = store.range("/p/").await.unwrap().1;
    assert_eq!(found.iter().map(|kv| kv.key.as_str()).collect::<Vec<_>>(), ["/p/", "/p/1", "/p/1/x", "/p/é"]);
    store.txn(always(vec![Op::DeletePrefix("/p/".into())])).await.unwrap();
    let left = store.range("/").await.unwrap().1;
    assert_eq!(left.iter().map(|kv| kv.key.as_str()).collect::<Vec<_>>(), ["/p", "/p0", "/q"]);
}

async fn a_watch_sees_each_revision_whole_and_in_order<S: Store>(store: &S) {
    let first = store.txn(always(vec![put("/w/a", "1")])).await.unwrap().revision;
    store.txn(always(vec![put("/other", "1")])).await.unwrap();
    let mut watch = store.watch("/w/", Revision(first.0 - 1)).await.unwrap();
    let mut late = store.watch("/w/", first).await.unwrap();
    let second = store
        .txn(always(vec![put("/w/b", "1"), Op::Delete("/w/a".into()), put("/other", "2")]))
        .await
        .unwrap();
    let batch = watch.next().await.unwrap();
    assert_eq!(batch.revision, first);
    assert!(matches!(&batch.events[..], [Event::Put(kv)] if kv.key == "/w/a" && kv.created == first));
    let batch = watch.next().await.unwrap();
    assert_eq!(batch.revision, second.revision);
    assert!(matches!(&batch.events[..], [Event::Put(b), Event::Delete(a)] if b.key == "/w/b" && a == "/w/a"));
    assert_eq!(late.next().await.unwrap(), batch, "a watch from later misses the earlier and nothing else");
}

async fn a_key_put_twice_is_refused<S: Store>(store: &S) {
    let txn = always(vec![put("/a", "1"), put("/a", "2")]);
    assert_eq!(store.txn(txn).await.unwrap_err(), StoreError::DuplicateKey("/a".into()));
}

/// Never by a lease alone: what a leader sent while it led may arrive when another does.
async fn a_leader_that_was_replaced_changes_nothing<S: Store>(store: &S) {
    let lead = |name: &str| Txn::new(vec![Compare::Absent("/lead".into())], vec![put("/lead", name)]);
    let first = store.txn(lead("one")).await.unwrap();
    assert!(!store.txn(lead("two")).await.unwrap().succeeded, "one leads");
    let work = |token: Revision, value: &str| {
        Txn::new(vec![Compare::Created("/lead".into(), token)], vec![put("/work", value)])
    };
    assert!(store.txn(work(first.revision, "1")).await.unwrap().succeeded);
    store.txn(always(vec![Op::Delete("/lead".into())])).await.unwrap();
    assert!(!store.txn(work(first.revision, "late")).await.unwrap().succeeded, "nobody leads");
    // Even if it has the same name: the revision tells them apart.
    let second = store.txn(lead("one")).await.unwrap();
    assert!(!store.txn(work(first.revision, "late")).await.unwrap().succeeded);
    assert!(store.txn(work(second.revision, "2")).await.unwrap().succeeded);
    assert_eq!(store.range("/work").await.unwrap().1[0].value, b"2");
}

async fn a_watch_ends_with_its_reader_and_another_begins_where_it_left_off<S: Store>(store: &S) {
    let mut seen = store.range("/").await.unwrap().0;
    for round in 0..20 {
        let mut watch = store.watch("/", seen).await.unwrap();
        let made = store.txn(always(vec![put("/n", &round.to_string())])).await.unwrap().revision;
        store.txn(always(vec![put("/n", "between")])).await.unwrap();
        let batch = loop {
            let batch = watch.next().await.unwrap();
            if batch.revision == made {
                break batch;
            }
            assert!(batch.revision > seen && batch.revision < made, "a gap or a repetition");
        };
        assert!(matches!(&batch.events[..], [Event::Put(kv)] if kv.value == round.to_string().as_bytes()));
        seen = made;
    }
}
