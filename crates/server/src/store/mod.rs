//! Where the server's state lives, in etcd's model: keys with revisions, compare-and-set transactions, and a watch that
//! continues from a revision.
//!
//! Invariant: the revision grows with each transaction that changes something, and a watch delivers the changes of each
//! revision whole, in order and without a gap, or says that it cannot ([`StoreError::Compacted`], [`StoreError::Lagged`]).
//!
//! Nobody leads: each change compares what it was planned on, so servers need no lock between them. Whoever needs to be
//! the only one for a while makes a key and compares, in each of its transactions, the revision that made it
//! ([`Compare::Created`]): a lease alone says nothing of a transaction that is late.

mod answers;
mod etcd;
mod gateway;
mod place;
mod sqlite;
#[cfg(test)]
pub(crate) mod suite;

use std::collections::BTreeSet;

use futures_util::future::BoxFuture;
use model::{Epoch, Revision};
use tokio::sync::mpsc;

pub(crate) use etcd::EtcdStore;
pub use etcd::OpenEtcdError;
pub use place::{BadStore, EtcdConfig, EtcdUrl, StoreChoice};
pub(crate) use sqlite::SqliteStore;

/// What a store's verbs give.
pub(crate) type Answer<'a, T> = BoxFuture<'a, Result<T, StoreError>>;

/// A store. Nothing else holds truth.
pub(crate) trait Store: Send + Sync + 'static {
    /// The life of this store.
    fn epoch(&self) -> Epoch;
    /// All keys that begin with `prefix`, in order, and the revision at which they were read.
    fn range(&self, prefix: &str) -> Answer<'_, (Revision, Vec<KeyValue>)>;
    /// Does `success` if every compare holds, else `failure`; all of it or nothing, durable when it answers.
    fn txn(&self, txn: Txn) -> Answer<'_, Outcome>;
    /// All changes to keys that begin with `prefix` at revisions greater than `after`.
    fn watch(&self, prefix: &str, after: Revision) -> Answer<'_, Watcher>;
}

/// A key and what the store knows of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct KeyValue {
    pub(crate) key: String,
    pub(crate) value: Vec<u8>,
    /// The revision that made the key.
    pub(crate) created: Revision,
    /// The revision that last changed it.
    pub(crate) modified: Revision,
    /// How often it was put since it was made, from 1.
    pub(crate) version: u64,
}

/// A condition of a transaction. Each is one that etcd can express.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Compare {
    /// The key is not there.
    Absent(String),
    /// The key is there.
    Present(String),
    /// The key has this value.
    Value(String, Vec<u8>),
    /// The key was made at this revision, and is still there.
    #[cfg_attr(not(test), expect(dead_code, reason = "a part of etcd's model that nothing needs yet"))]
    Created(String, Revision),
    /// The key was last changed at this revision, and is still there.
    Modified(String, Revision),
    /// No key that begins with the prefix was put after this revision. It does not see deletions.
    NonePutSince(String, Revision),
}

/// A change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Op {
    Put(String, Vec<u8>),
    Delete(String),
    DeletePrefix(String),
}

/// A transaction.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Txn {
    pub(crate) compares: Vec<Compare>,
    pub(crate) success: Vec<Op>,
    pub(crate) failure: Vec<Op>,
}

impl Txn {
    /// A transaction that does nothing when a compare fails.
    pub(crate) fn new(compares: Vec<Compare>, success: Vec<Op>) -> Self {
        Self { compares, success, failure: Vec::new() }
    }

    /// etcd refuses a transaction that puts a key twice; so does every store here.
    fn check(&self) -> Result<(), StoreError> {
        for ops in [&self.success, &self.failure] {
            let mut seen = BTreeSet::new();
            for op in ops {
                if let Op::Put(key, _) = op
                    && !seen.insert(key)
                {
                    return Err(StoreError::DuplicateKey(key.clone()));
                }
            }
        }
        Ok(())
    }
}

/// How a transaction went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// Whether every compare held.
    pub(crate) succeeded: bool,
    /// The store's revision after it.
    pub(crate) revision: Revision,
}

/// One change that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    Put(KeyValue),
    Delete(String),
}

/// All changes of one revision. Where nothing under the watch's prefix changed there may be none: the revision moved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Batch {
    pub(crate) revision: Revision,
    pub(crate) events: Vec<Event>,
}

/// A running watch.
#[derive(Debug)]
pub(crate) struct Watcher {
    batches: mpsc::Receiver<Result<Batch, StoreError>>,
}

impl Watcher {
    /// The next revision's changes. After an error, range and watch anew.
    pub(crate) async fn next(&mut self) -> Result<Batch, StoreError> {
        self.batches.recv().await.unwrap_or(Err(StoreError::Lagged))
    }
}

/// Why a store cannot answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum StoreError {
    /// The changes since that revision are no longer kept.
    #[error("changes since revision {asked} are no longer kept (oldest: {oldest}); take a snapshot")]
    Compacted { asked: Revision, oldest: Revision },
    /// The reader was too slow, or the store closed.
    #[error("the watch ended because its reader was too slow or the store closed; watch again")]
    Lagged,
    /// A transaction puts a key twice.
    #[error("a transaction puts key {0:?} twice")]
    DuplicateKey(String),
    /// The store ended, for good.
    #[error("the store is closed: {0}")]
    Closed(Ended),
    /// Nobody answers; nothing was changed.
    #[error("the store does not answer: {0}")]
    Unreachable(String),
    /// A transaction was sent, and no answer came.
    #[error(
        "no answer came from the store, so the change may have been made or not: {0}; look, and try again"
    )]
    Unknown(String),
    /// The store says no; nothing was changed.
    #[error("the store refuses: {0}")]
    Refused(String),
    /// The medium failed.
    #[error("the store cannot read or write: {0}; check the data directory's disk")]
    Io(String),
}

/// Why a store ended under its server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Ended {
    /// The embedded store's thread is gone.
    #[error("its thread is gone")]
    Gone,
    /// It knows less than it did.
    #[error("it went back from revision {before} to {now}: etcd was put back from a snapshot of its own")]
    SetBack { before: Revision, now: Revision },
    /// It is another life's.
    #[error("it was restored, or removed, while this server ran")]
    Replaced,
}

/// The first text after all that begin with `prefix`.
fn prefix_end(prefix: &str) -> String {
    let mut end = prefix.to_owned();
    while let Some(last) = end.pop() {
        if let Some(next) = char::from_u32(u32::from(last) + 1) {
            end.push(next);
            return end;
        }
    }
    char::MAX.to_string()
}
