//! The state as all share it, fed by the store's own watch.
//!
//! Invariant: requests read the state; nothing but the feed changes it.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use model::Revision;
use tokio::sync::watch;

use crate::keys;
use crate::state::State;
use crate::store::{Ended, Store, StoreError};

/// The state as all share it.
#[derive(Debug)]
pub(crate) struct Shared {
    state: RwLock<State>,
    revision: watch::Sender<Revision>,
}

impl Shared {
    pub(crate) fn new(state: State) -> Self {
        let revision = watch::Sender::new(state.revision);
        Self { state: RwLock::new(state), revision }
    }

    /// The state as it is now. Hold it briefly, and across no `await`.
    pub(crate) fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells when the state changes.
    pub(crate) fn subscribe(&self) -> watch::Receiver<Revision> {
        self.revision.subscribe()
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        change(&mut state);
        let revision = state.revision;
        drop(state);
        self.revision.send_replace(revision);
    }
}

/// Keeps the state true to the store, for as long as the store lives; why that ended.
pub(crate) async fn feed(store: Arc<dyn Store>, shared: Arc<Shared>) -> Ended {
    loop {
        let error = match follow(&*store, &shared).await {
            StoreError::Compacted { .. } => match State::load(&*store).await {
                Ok(state) => {
                    shared.change(|old| *old = state);
                    continue;
                }
                Err(error) => error,
            },
            error => error,
        };
        match error {
            StoreError::Closed(why) => return why,
            StoreError::Lagged => continue,
            error => tracing::error!(%error, "the store cannot be followed; trying again"),
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
    }
}

async fn follow(store: &dyn Store, shared: &Shared) -> StoreError {
    let from = shared.read().revision;
    let mut watcher = match store.watch(keys::ROOT, from).await {
        Ok(watcher) => watcher,
        Err(error) => return error,
    };
    loop {
        match watcher.next().await {
            Ok(batch) => shared.change(|state| state.apply(&batch)),
            Err(error) => return error,
        }
    }
}

#[cfg(test)]
mod tests {
    use model::{EnvironmentId, Epoch};

    use super::*;
    use crate::keys::Token;
    use crate::store::{Answer, KeyValue, Op, Outcome, SqliteStore, Txn, Watcher};

    /// A store that has forgotten what its reader missed, and that ended meanwhile.
    struct Over;

    impl Store for Over {
        fn epoch(&self) -> Epoch {
            Epoch::from_random([1; 8])
        }
        fn range(&self, _: &str) -> Answer<'_, (Revision, Vec<KeyValue>)> {
            Box::pin(async { Err(StoreError::Closed(Ended::Replaced)) })
        }
        fn txn(&self, _: Txn) -> Answer<'_, Outcome> {
            Box::pin(async { Err(StoreError::Closed(Ended::Replaced)) })
        }
        fn watch(&self, _: &str, asked: Revision) -> Answer<'_, Watcher> {
            Box::pin(async move { Err(StoreError::Compacted { asked, oldest: Revision(9) }) })
        }
    }

    #[tokio::test]
    async fn the_feed_ends_with_its_store_wherever_it_hears_of_that() {
        let shared = Arc::new(Shared::new(State::default()));
        let feed = tokio::time::timeout(Duration::from_secs(20), feed(Arc::new(Over), shared));
        assert_eq!(feed.await.expect("it goes on"), Ended::Replaced);
    }

    #[tokio::test]
    async fn a_state_that_is_behind_the_kept_log_is_read_anew() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store.sqlite");
        let token = Token {
            hash: crate::secret::sha256(b""),
            created: 0,
            expires: 1,
            uses_left: None,
            used: 0,
            revoked: None,
        };
        let key = keys::Keys(&EnvironmentId::default()).token("ab");
        {
            let store = SqliteStore::open(&path, Epoch::from_random([1; 8])).unwrap();
            store.txn(Txn::new(vec![], vec![keys::put(key.clone(), &token).unwrap()])).await.unwrap();
        }
        let forget = "UPDATE meta SET value = '1' WHERE name = 'compacted'; DELETE FROM log";
        rusqlite::Connection::open(&path).unwrap().execute_batch(forget).unwrap();
        let store: Arc<dyn Store> = Arc::new(SqliteStore::open(&path, Epoch::from_random([1; 8])).unwrap());
        let shared = Arc::new(Shared::new(State::default()));
        let feeder = tokio::spawn(feed(store.clone(), shared.clone()));
        let mut revisions = shared.subscribe();
        revisions.wait_for(|revision| *revision == Revision(1)).await.unwrap();
        assert_eq!(shared.read().environments[&EnvironmentId::default()].tokens["ab"], token);
        store.txn(Txn::new(vec![], vec![Op::Delete(key)])).await.unwrap();
        revisions.wait_for(|revision| *revision == Revision(2)).await.unwrap();
        assert!(shared.read().environments[&EnvironmentId::default()].tokens.is_empty());
        feeder.abort();
    }
}
