//! How a change comes into the audit log: written down in the transaction that makes it, then in the log, then removed.
//!
//! A transaction that somebody asked for puts an [`Entry`] beside what it changes, under this server's name. The state in
//! memory hears of it as of all else; [`Outbox::run`] writes it to the log, and a later transaction takes it away. What a
//! server that was killed left is written when it starts again, unless the log has it.
//!
//! Invariant: a change that was asked for has one line with its revision, no matter when the server dies. Of several
//! servers, the one that was asked writes it.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use model::api::{ApiError, ErrorCode};
use model::{EnvironmentId, Revision, UnixMillis};
use serde::{Deserialize, Serialize};
use tokio::sync::{oneshot, watch};

use crate::app::put;
use crate::audit::{self, Audit, Line};
use crate::feed::Shared;
use crate::keys::Keys;
use crate::request;
use crate::secret;
use crate::state::{Environment, State};
use crate::store::{Op, Txn};

/// How many changes may wait for the log. After that none is made: what cannot be written down must not happen.
const WAITING: usize = 4096;
/// How many entries one transaction takes away: more than it brings.
const TAKEN: usize = 64;
/// The same for the transaction with which a server ends.
const TAKEN_AT_THE_END: usize = 512;
/// How long to wait before a log that could not be written is tried again.
const AGAIN: Duration = Duration::from_secs(1);

/// A change, as it stands in the store until the log has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Entry {
    pub(crate) at: UnixMillis,
    pub(crate) request: String,
    pub(crate) who: String,
    pub(crate) from: String,
    pub(crate) what: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) about: Option<String>,
}

/// Where an entry is: its environment, and its id there.
type Place = (EnvironmentId, String);

/// This server's changes on their way into its log.
#[derive(Debug)]
pub(crate) struct Outbox {
    server: String,
    /// Entries that the log has and the store still has, too, and whether a transaction is taking them away.
    written: Mutex<BTreeMap<Place, bool>>,
    told: watch::Sender<Told>,
}

/// How far the log is.
#[derive(Debug, Default)]
struct Told {
    /// Changes up to this revision are in it.
    until: Revision,
    /// It could not be written just now.
    failing: bool,
}

/// Entries that a transaction is taking away. When this is dropped, those that are still there may be taken by another.
pub(crate) struct Taking<'a>(&'a Outbox, Vec<Place>);

impl Drop for Taking<'_> {
    fn drop(&mut self) {
        let mut written = self.0.lock();
        for place in &self.1 {
            if let Some(taken) = written.get_mut(place) {
                *taken = false;
            }
        }
    }
}

impl Outbox {
    /// That of the server of that name.
    pub(crate) fn new(server: &str) -> Self {
        Self { server: server.to_owned(), written: Mutex::default(), told: watch::Sender::default() }
    }

    /// Looks which of the changes that the last run of this server left are in the log already. It reads files.
    pub(crate) fn recall(&self, state: &State, directory: &Path) -> io::Result<()> {
        let left = self.waiting(state);
        let wanted: BTreeMap<Revision, &Entry> = left.iter().map(|(_, at, entry)| (*at, entry)).collect();
        let known = audit::known(directory, &wanted)?;
        let places = left.iter().filter(|(_, at, _)| known.contains(at));
        self.lock().extend(places.map(|(place, ..)| (place.clone(), false)));
        if known.len() < left.len() {
            let lines = left.len() - known.len();
            tracing::info!(lines, "the audit log gets what the server could not write before it ended");
        }
        Ok(())
    }

    /// Has the transaction write down who asked for it, and take away what the log has. A transaction that changes nothing,
    /// or that nobody asked for, is left as it is.
    pub(crate) fn enclose(
        &self,
        environment: &EnvironmentId,
        env: &Environment,
        txn: &mut Txn,
    ) -> Result<Taking<'_>, ApiError> {
        let Some(entry) = request::entry().filter(|_| !txn.success.is_empty()) else {
            return Ok(Taking(self, Vec::new()));
        };
        if env.audit.keys().filter(|(server, _)| *server == self.server).count() >= WAITING {
            let message = "the audit log cannot be written, so nothing may be changed; look at the server's log, and free space \
                in its data directory";
            return Err(ApiError::new(ErrorCode::Unavailable, message));
        }
        let random =
            secret::random::<8>().map_err(|error| ApiError::new(ErrorCode::Internal, error.to_string()))?;
        let keys = Keys(environment);
        let id = format!("{:016x}", u64::from_be_bytes(random));
        txn.success.push(put(keys.audit(&self.server, &id), &entry)?);
        let mut written = self.lock();
        let free = written.iter_mut().filter(|((of, _), taken)| of == environment && !**taken).take(TAKEN);
        let mut places = Vec::new();
        for (place, taken) in free {
            *taken = true;
            txn.success.push(Op::Delete(keys.audit(&self.server, &place.1)));
            places.push(place.clone());
        }
        drop(written);
        Ok(Taking(self, places))
    }

    /// Writes what comes, until the other end of `served` is dropped; never in the middle of a line.
    pub(crate) async fn run(&self, shared: &Shared, audit: &Audit, mut served: oneshot::Receiver<()>) {
        let mut revisions = shared.subscribe();
        loop {
            revisions.borrow_and_update();
            let written = self.write(shared, audit).await;
            let more = async {
                if !written {
                    tokio::time::sleep(AGAIN).await;
                } else if revisions.changed().await.is_err() {
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                _ = &mut served => return,
                () = more => {}
            }
        }
    }

    /// Writes what there is; whether all of it is in the log.
    pub(crate) async fn write(&self, shared: &Shared, audit: &Audit) -> bool {
        let (until, new) = {
            let state = shared.read();
            self.lock().retain(|(environment, id), _| {
                let env = state.environments.get(environment);
                env.is_some_and(|env| env.audit.contains_key(&(self.server.clone(), id.clone())))
            });
            (state.revision, self.waiting(&state))
        };
        let mut lines = Vec::new();
        for (place, revision, entry) in new {
            lines.push((place, audit.write(Line::of(entry, revision)).await));
        }
        let mut good = true;
        for (place, line) in lines {
            if line.written().await {
                self.lock().insert(place, false);
            } else {
                good = false;
            }
        }
        self.told.send_modify(|told| {
            told.failing = !good;
            if good {
                told.until = until;
            }
        });
        good
    }

    /// Entries of an environment that the log has and the store still has, too: as many as one transaction takes away.
    pub(crate) fn written(&self, environment: &EnvironmentId) -> Vec<String> {
        let written = self.lock();
        let ids = written.keys().filter(|(of, _)| of == environment).map(|(_, id)| id.clone());
        ids.take(TAKEN_AT_THE_END).collect()
    }

    /// Waits until the log has the changes up to a revision that the state has; not where it cannot be written.
    pub(crate) async fn has(&self, revision: Revision) {
        let mut told = self.told.subscribe();
        // An error means that the server ends; the line is written at its next start.
        drop(told.wait_for(|told| told.until >= revision || told.failing).await);
    }

    /// What is not in the log, in the order in which it happened.
    fn waiting(&self, state: &State) -> Vec<(Place, Revision, Entry)> {
        let written = self.lock();
        let mut waiting = Vec::new();
        for (environment, env) in &state.environments {
            for ((server, id), (revision, entry)) in &env.audit {
                let place = (environment.clone(), id.clone());
                if *server == self.server && !written.contains_key(&place) {
                    waiting.push((place, *revision, entry.clone()));
                }
            }
        }
        waiting.sort_by_key(|(_, revision, _)| *revision);
        waiting
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<Place, bool>> {
        self.written.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys;
    use crate::store::{Batch, Event, KeyValue};

    fn entry(n: u64) -> Entry {
        let text = |what: &str| format!("{what} {n}");
        let (who, from, what) = (text("key"), text("from"), text("PUT"));
        Entry { at: n, request: text("request"), who, from, what, about: None }
    }

    /// A state with so many entries, each of a revision of its own, and one of another server.
    fn state(count: u64) -> State {
        let (environment, mut state) = (EnvironmentId::default(), State::default());
        for n in 1..=count + 1 {
            let server = if n > count { "other" } else { "this" };
            let key =
                Keys(&environment).audit(server, &format!("{:016x}", n.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
            let Op::Put(key, value) = keys::put(key, &entry(n)).unwrap() else { panic!("no put") };
            let revision = Revision(n);
            let kv = KeyValue { key, value, created: revision, modified: revision, version: 1 };
            state.apply(&Batch { revision, events: vec![Event::Put(kv)] });
        }
        state
    }

    #[tokio::test]
    async fn a_log_that_cannot_be_written_keeps_nobody_waiting_and_loses_no_change() {
        let (full, good) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::os::unix::fs::symlink("/dev/full", full.path().join("audit.jsonl")).unwrap();
        let (outbox, shared) = (Outbox::new("this"), Shared::new(state(300)));
        assert!(!outbox.write(&shared, &Audit::open(full.path()).unwrap()).await);
        outbox.has(Revision(300)).await;
        let audit = Audit::open(good.path()).unwrap();
        assert!(outbox.write(&shared, &audit).await && outbox.write(&shared, &audit).await);
        outbox.has(Revision(300)).await;
        let text = std::fs::read_to_string(good.path().join("audit.jsonl")).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str::<model::api::AuditEntry>(line).unwrap());
        let written: Vec<u64> = lines.map(|line| line.revision.unwrap().0).collect();
        assert_eq!(written, (1..=300).collect::<Vec<_>>(), "in order, each once, and none of another server");
    }

    #[tokio::test]
    async fn a_transaction_takes_away_what_the_log_has_and_none_is_made_that_could_not_be_written_down() {
        let (dir, environment) = (tempfile::tempdir().unwrap(), EnvironmentId::default());
        let (outbox, shared) = (Outbox::new("this"), Shared::new(state(100)));
        assert!(outbox.write(&shared, &Audit::open(dir.path()).unwrap()).await);
        let mut txn = Txn::new(vec![], vec![Op::Delete("/a".into())]);
        let known = shared.read();
        let env = &known.environments[&environment];
        request::asked_in_a_test(|| {
            let taking = outbox.enclose(&environment, env, &mut txn).unwrap();
            assert_eq!(txn.success.len(), 2 + TAKEN, "its own, an entry, and those that go");
            let mut other = Txn::new(vec![], vec![Op::Delete("/b".into())]);
            let rest = outbox.enclose(&environment, env, &mut other).unwrap();
            assert_eq!(other.success.len(), 2 + 100 - TAKEN, "none by two at once");
            drop((taking, rest));
            let mut again = Txn::new(vec![], vec![Op::Delete("/c".into())]);
            drop(outbox.enclose(&environment, env, &mut again).unwrap());
            assert_eq!(again.success.len(), 2 + TAKEN, "what was not taken after all");
            let mut look = Txn::default();
            drop(outbox.enclose(&environment, env, &mut look).unwrap());
            assert_eq!(look, Txn::default());
            let many = state(WAITING as u64);
            let refused =
                outbox.enclose(&environment, &many.environments[&environment], &mut txn).err().unwrap();
            assert_eq!(refused.code, ErrorCode::Unavailable);
            assert!(refused.message.contains("free space"), "{refused}");
        });
    }
}
