//! The embedded store: SQLite in WAL mode with full synchronisation, on a thread of its own.
//!
//! Transactions that wait at the same time share one commit to disk. The log of changes keeps the last [`KEPT`]
//! revisions for watches.
//!
//! Invariant: an answer is sent, and a watch sees a change, only after the change is on disk.

use std::collections::VecDeque;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use model::{Epoch, Revision};
use rusqlite::{Connection, OptionalExtension, Row, params};
use tokio::sync::{mpsc as async_mpsc, oneshot};

use crate::keys::is_secret;

use super::{
    Answer, Batch, Compare, Ended, Event, KeyValue, Op, Outcome, Store, StoreError, Txn, Watcher, prefix_end,
};

/// Marks the file as ours ("drov"), in SQLite's own place for it.
const APPLICATION_ID: i32 = 0x6472_6f76;
const SCHEMA: i64 = 1;
/// How many revisions watches may lag behind.
const KEPT: u64 = 10_000;
/// How many batches a watch may have waiting.
const WATCH_QUEUE: usize = 1024;
/// How long another that has the file open may be in the way.
const BUSY: Duration = Duration::from_secs(5);
/// How many transactions share a commit.
const GROUP: usize = 64;

/// The embedded store.
pub(crate) struct SqliteStore {
    epoch: Epoch,
    commands: Option<mpsc::Sender<Command>>,
    thread: Option<JoinHandle<()>>,
}

/// Why a file cannot be opened as a store. The file is left as it was.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenError {
    #[error(
        "{0} is not a store of Droveway; move it away, restore it from a backup, or choose another --data-dir"
    )]
    Foreign(PathBuf),
    #[error("{0} was written by a newer version (schema {1}, known: {SCHEMA}); run that version")]
    Newer(PathBuf, i64),
    #[error("{0} is damaged ({1}); restore it from a backup")]
    Damaged(PathBuf, String),
    #[error("cannot open the store {0}: {1}")]
    Io(PathBuf, String),
}

enum Command {
    Range(String, oneshot::Sender<Result<(Revision, Vec<KeyValue>), StoreError>>),
    Txn(Txn, oneshot::Sender<Result<Outcome, StoreError>>),
    Watch(String, Revision, oneshot::Sender<Result<Watcher, StoreError>>),
}

impl SqliteStore {
    /// Opens the store at `path`, or makes it with `epoch` where there is none.
    pub(crate) fn open(path: &Path, epoch: Epoch) -> Result<Self, OpenError> {
        let (connection, epoch, revision, compacted) = open(path, &epoch)?;
        let (commands, receiver) = mpsc::channel();
        let worker = Worker { connection, revision, compacted, watches: Vec::new(), unwiped: false };
        let thread = std::thread::Builder::new()
            .name("store".into())
            .spawn(move || worker.run(&receiver))
            .map_err(|error| OpenError::Io(path.to_owned(), error.to_string()))?;
        Ok(Self { epoch, commands: Some(commands), thread: Some(thread) })
    }

    /// Makes a store where there is none, with revisions above `above`.
    pub(crate) fn make(path: &Path, epoch: Epoch, above: Revision) -> Result<Self, OpenError> {
        let io = |error: &dyn std::fmt::Display| OpenError::Io(path.to_owned(), error.to_string());
        let made = OpenOptions::new().create_new(true).write(true).mode(0o600).open(path);
        drop(made.map_err(|error| io(&error))?);
        let (connection, ..) = open(path, &epoch)?;
        connection
            .execute(
                "UPDATE meta SET value = ?1 WHERE name IN ('revision', 'compacted')",
                [above.0.to_string()],
            )
            .map_err(|error| io(&error))?;
        drop(connection);
        Self::open(path, epoch)
    }

    /// Whether the file has nothing in it, as before it was made a store. It is not changed.
    pub(crate) fn is_blank(path: &Path) -> Result<bool, OpenError> {
        let connection = Connection::open_with_flags(path, rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY);
        Ok(!recognize(&connection.map_err(io(path))?, path)?)
    }

    /// All that a store holds at one revision. It may be open elsewhere, and is not changed.
    pub(crate) fn read(path: &Path) -> Result<(Epoch, Revision, Vec<KeyValue>), OpenError> {
        let fault = |error: rusqlite::Error| OpenError::Io(path.to_owned(), error.to_string());
        if !path.exists() {
            return Err(OpenError::Io(path.to_owned(), "there is no such file".into()));
        }
        let mut connection =
            Connection::open_with_flags(path, rusqlite::OpenFlags::SQLITE_OPEN_READ_ONLY).map_err(fault)?;
        let transaction = connection.transaction().map_err(fault)?;
        recognize(&transaction, path)?;
        let (epoch, revision, _) = life(&transaction, path)?;
        let all = transaction
            .prepare("SELECT key, value, created, modified, version FROM kv ORDER BY key")
            .and_then(|mut all| all.query_map([], key_value)?.collect::<rusqlite::Result<Vec<_>>>())
            .map_err(fault)?;
        Ok((epoch, revision, all))
    }

    fn ask<T: Send + 'static>(
        &self,
        command: impl FnOnce(oneshot::Sender<Result<T, StoreError>>) -> Command,
    ) -> Answer<'static, T> {
        let (reply, answer) = oneshot::channel();
        let sent = self.commands.as_ref().is_some_and(|commands| commands.send(command(reply)).is_ok());
        Box::pin(async move {
            let gone = StoreError::Closed(Ended::Gone);
            if sent { answer.await.unwrap_or(Err(gone)) } else { Err(gone) }
        })
    }
}

impl Store for SqliteStore {
    fn epoch(&self) -> Epoch {
        self.epoch.clone()
    }

    fn range(&self, prefix: &str) -> Answer<'_, (Revision, Vec<KeyValue>)> {
        self.ask(|reply| Command::Range(prefix.to_owned(), reply))
    }

    fn txn(&self, txn: Txn) -> Answer<'_, Outcome> {
        if let Err(error) = txn.check() {
            return Box::pin(async { Err(error) });
        }
        self.ask(|reply| Command::Txn(txn, reply))
    }

    fn watch(&self, prefix: &str, after: Revision) -> Answer<'_, Watcher> {
        self.ask(|reply| Command::Watch(prefix.to_owned(), after, reply))
    }
}

impl Drop for SqliteStore {
    fn drop(&mut self) {
        drop(self.commands.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the store's thread panicked");
        }
    }
}

fn io(path: &Path) -> impl Fn(rusqlite::Error) -> OpenError + '_ {
    |error: rusqlite::Error| match error.sqlite_error_code() {
        Some(rusqlite::ErrorCode::NotADatabase) => OpenError::Foreign(path.to_owned()),
        Some(rusqlite::ErrorCode::DatabaseCorrupt) => OpenError::Damaged(path.to_owned(), error.to_string()),
        // The index of its journal has no room: SQLite says no more than that there was an error.
        Some(_)
            if error
                .sqlite_error()
                .is_some_and(|error| error.extended_code == rusqlite::ffi::SQLITE_IOERR_SHMSIZE) =>
        {
            OpenError::Io(path.to_owned(), "its disk is full".to_owned())
        }
        _ => OpenError::Io(path.to_owned(), error.to_string()),
    }
}

/// Whether the file is a store; `false` for one that is empty. Anything else is refused.
fn recognize(connection: &Connection, path: &Path) -> Result<bool, OpenError> {
    let io = io(path);
    let number = |query: &str| connection.query_row(query, [], |row| row.get::<_, i64>(0)).map_err(&io);
    let tables = number("SELECT count(*) FROM sqlite_master")?;
    let application = number("PRAGMA application_id")?;
    if application != i64::from(APPLICATION_ID) {
        return if tables > 0 || application != 0 {
            Err(OpenError::Foreign(path.to_owned()))
        } else {
            Ok(false)
        };
    }
    let schema = number("PRAGMA user_version")?;
    if schema > SCHEMA {
        return Err(OpenError::Newer(path.to_owned(), schema));
    }
    let check: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0)).map_err(&io)?;
    if check == "ok" { Ok(true) } else { Err(OpenError::Damaged(path.to_owned(), check)) }
}

/// Epoch, revision, and the revision up to which the log was cut.
fn life(connection: &Connection, path: &Path) -> Result<(Epoch, Revision, Revision), OpenError> {
    let meta = |name: &str| -> Result<String, OpenError> {
        connection
            .query_row("SELECT value FROM meta WHERE name = ?1", [name], |row| row.get(0))
            .optional()
            .map_err(io(path))?
            .ok_or_else(|| OpenError::Damaged(path.to_owned(), format!("{name} is missing")))
    };
    let damaged = |what: &str| OpenError::Damaged(path.to_owned(), format!("{what} is not readable"));
    let epoch = meta("epoch")?.parse().map_err(|_| damaged("epoch"))?;
    let revision = Revision(meta("revision")?.parse().map_err(|_| damaged("revision"))?);
    let compacted = Revision(meta("compacted")?.parse().map_err(|_| damaged("compacted"))?);
    Ok((epoch, revision, compacted))
}

/// Looks before it writes: a file that is not ours is closed again unchanged.
fn open(path: &Path, fresh: &Epoch) -> Result<(Connection, Epoch, Revision, Revision), OpenError> {
    let io = io(path);
    let connection = Connection::open(path).map_err(&io)?;
    let known = recognize(&connection, path)?;
    connection
        .execute_batch("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA cache_size = -4096; PRAGMA secure_delete = ON;")
        .map_err(&io)?;
    if !known {
        connection
            .execute_batch(&format!(
                "BEGIN IMMEDIATE;
                 CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
                 CREATE TABLE kv (
                     key TEXT PRIMARY KEY, value BLOB NOT NULL,
                     created INTEGER NOT NULL, modified INTEGER NOT NULL, version INTEGER NOT NULL
                 ) WITHOUT ROWID;
                 CREATE TABLE log (
                     revision INTEGER NOT NULL, seq INTEGER NOT NULL, key TEXT NOT NULL,
                     value BLOB, created INTEGER, version INTEGER,
                     PRIMARY KEY (revision, seq)
                 ) WITHOUT ROWID;
                 INSERT INTO meta VALUES ('epoch', '{fresh}'), ('revision', '0'), ('compacted', '0');
                 PRAGMA application_id = {APPLICATION_ID};
                 PRAGMA user_version = {SCHEMA};
                 COMMIT;"
            ))
            .map_err(&io)?;
    }
    let (epoch, revision, compacted) = life(&connection, path)?;
    Ok((connection, epoch, revision, compacted))
}

struct Worker {
    connection: Connection,
    revision: Revision,
    /// Changes up to this revision are no longer in the log.
    compacted: Revision,
    watches: Vec<Watch>,
    /// Something secret was deleted that is in the journal still.
    unwiped: bool,
}

struct Watch {
    prefix: String,
    batches: async_mpsc::Sender<Result<Batch, StoreError>>,
}

/// A transaction and where to answer.
type Waiting = (Txn, oneshot::Sender<Result<Outcome, StoreError>>);

impl Worker {
    fn run(mut self, commands: &mpsc::Receiver<Command>) {
        let mut queue = VecDeque::new();
        while let Some(command) = queue.pop_front().or_else(|| commands.recv().ok()) {
            match command {
                Command::Range(prefix, reply) => drop(reply.send(self.range(&prefix))),
                Command::Watch(prefix, after, reply) => drop(reply.send(self.watch(prefix, after))),
                Command::Txn(txn, reply) => {
                    let mut group = vec![(txn, reply)];
                    while group.len() < GROUP {
                        match commands.try_recv() {
                            Ok(Command::Txn(txn, reply)) => group.push((txn, reply)),
                            Ok(other) => {
                                queue.push_back(other);
                                break;
                            }
                            Err(_) => break,
                        }
                    }
                    self.commit(group);
                }
            }
        }
    }

    fn range(&self, prefix: &str) -> Result<(Revision, Vec<KeyValue>), StoreError> {
        let mut statement = self.connection.prepare_cached(
            "SELECT key, value, created, modified, version FROM kv WHERE key >= ?1 AND key < ?2 ORDER BY key",
        )?;
        let found = statement
            .query_map([prefix, &prefix_end(prefix)], key_value)?
            .collect::<Result<Vec<_>, rusqlite::Error>>()?;
        Ok((self.revision, found))
    }

    fn watch(&mut self, prefix: String, after: Revision) -> Result<Watcher, StoreError> {
        if after < self.compacted {
            return Err(StoreError::Compacted { asked: after, oldest: self.compacted });
        }
        let past = self.log(&prefix, after)?;
        // What is past is wanted whole; only what comes may find the queue full.
        let (sender, receiver) = async_mpsc::channel(WATCH_QUEUE + past.len());
        for batch in past {
            if sender.try_send(Ok(batch)).is_err() {
                return Err(StoreError::Lagged);
            }
        }
        self.watches.push(Watch { prefix, batches: sender });
        Ok(Watcher { batches: receiver })
    }

    fn log(&self, prefix: &str, after: Revision) -> Result<Vec<Batch>, StoreError> {
        let mut statement = self.connection.prepare_cached(
            "SELECT revision, key, value, created, version FROM log
             WHERE revision > ?1 AND key >= ?2 AND key < ?3 ORDER BY revision, seq",
        )?;
        let mut rows = statement.query(params![to_sql(after), prefix, prefix_end(prefix)])?;
        let mut batches: Vec<Batch> = Vec::new();
        while let Some(row) = rows.next()? {
            let revision = revision(row, 0)?;
            let key: String = row.get(1)?;
            let event = match row.get::<_, Option<Vec<u8>>>(2)? {
                None => Event::Delete(key),
                Some(value) => Event::Put(KeyValue {
                    key,
                    value,
                    created: self::revision(row, 3)?,
                    modified: revision,
                    version: row.get::<_, i64>(4)?.unsigned_abs(),
                }),
            };
            match batches.last_mut() {
                Some(batch) if batch.revision == revision => batch.events.push(event),
                _ => batches.push(Batch { revision, events: vec![event] }),
            }
        }
        Ok(batches)
    }

    /// Does all of them in one commit; on failure none of them happened.
    fn commit(&mut self, group: Vec<Waiting>) {
        let before = self.revision;
        match self.try_commit(&group) {
            Ok((outcomes, batches)) => {
                for batch in batches {
                    self.publish(&batch);
                }
                let gone = |op: &Op| matches!(op, Op::Delete(key) if is_secret(key));
                let gone = group.iter().any(|(txn, _)| txn.success.iter().any(gone));
                if gone || self.unwiped {
                    let wiped = self.wipe();
                    self.unwiped = wiped.is_err();
                    if let Some(error) = wiped.err().filter(|_| gone) {
                        tracing::warn!(%error, "what was deleted is in the store's journal still, for a while");
                    }
                }
                for ((_, reply), outcome) in group.into_iter().zip(outcomes) {
                    drop(reply.send(Ok(outcome)));
                }
                if let Err(error) = self.compact() {
                    tracing::warn!(%error, "the store's log could not be compacted");
                }
            }
            Err(error) => {
                self.revision = before;
                for (_, reply) in group {
                    drop(reply.send(Err(error.clone())));
                }
            }
        }
    }

    fn try_commit(&mut self, group: &[Waiting]) -> Result<(Vec<Outcome>, Vec<Batch>), StoreError> {
        let mut revision = self.revision;
        let transaction =
            self.connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        let (mut outcomes, mut batches) = (Vec::new(), Vec::new());
        for (txn, _) in group {
            let mut succeeded = true;
            for compare in &txn.compares {
                succeeded = succeeded && holds(&transaction, compare)?;
            }
            let next = Revision(revision.0 + 1);
            let ops = if succeeded { &txn.success } else { &txn.failure };
            let mut events = Vec::new();
            for op in ops {
                apply(&transaction, op, next, &mut events)?;
            }
            if !events.is_empty() {
                revision = next;
                batches.push(Batch { revision, events });
            }
            outcomes.push(Outcome { succeeded, revision });
        }
        if revision > self.revision {
            transaction
                .prepare_cached("UPDATE meta SET value = ?1 WHERE name = 'revision'")?
                .execute([revision.0.to_string()])?;
            transaction.commit()?;
            self.revision = revision;
        }
        Ok((outcomes, batches))
    }

    fn publish(&mut self, batch: &Batch) {
        self.watches.retain(|watch| {
            let events: Vec<Event> = batch
                .events
                .iter()
                .filter(|event| match event {
                    Event::Put(kv) => kv.key.starts_with(&watch.prefix),
                    Event::Delete(key) => key.starts_with(&watch.prefix),
                })
                .cloned()
                .collect();
            events.is_empty() && !watch.batches.is_closed()
                || watch.batches.try_send(Ok(Batch { revision: batch.revision, events })).is_ok()
        });
    }

    /// Leaves nothing of what was deleted in the journal, where older pages are. Who reads them (a backup) is not waited for.
    fn wipe(&self) -> Result<(), StoreError> {
        self.connection.busy_timeout(Duration::ZERO)?;
        let busy =
            self.connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |row| row.get::<_, i64>(0));
        self.connection.busy_timeout(BUSY)?;
        if busy? == 0 { Ok(()) } else { Err(StoreError::Io("somebody reads the journal".into())) }
    }

    /// Forgets old changes, a thousand revisions at a time.
    fn compact(&mut self) -> Result<(), StoreError> {
        let Some(until) = self.revision.0.checked_sub(KEPT).filter(|until| *until >= self.compacted.0 + 1000)
        else {
            return Ok(());
        };
        let transaction = self.connection.transaction()?;
        transaction.execute("DELETE FROM log WHERE revision <= ?1", [to_sql(Revision(until))])?;
        transaction.execute("UPDATE meta SET value = ?1 WHERE name = 'compacted'", [until.to_string()])?;
        transaction.commit()?;
        self.compacted = Revision(until);
        Ok(())
    }
}

fn holds(connection: &Connection, compare: &Compare) -> Result<bool, StoreError> {
    let find = |key: &str| find(connection, key);
    Ok(match compare {
        Compare::Absent(key) => find(key)?.is_none(),
        Compare::Present(key) => find(key)?.is_some(),
        Compare::Value(key, value) => find(key)?.is_some_and(|kv| kv.value == *value),
        Compare::Created(key, revision) => find(key)?.is_some_and(|kv| kv.created == *revision),
        Compare::Modified(key, revision) => find(key)?.is_some_and(|kv| kv.modified == *revision),
        Compare::NonePutSince(prefix, revision) => !connection
            .prepare_cached("SELECT 1 FROM kv WHERE key >= ?1 AND key < ?2 AND modified > ?3 LIMIT 1")?
            .exists(params![prefix, prefix_end(prefix), to_sql(*revision)])?,
    })
}

fn apply(connection: &Connection, op: &Op, at: Revision, events: &mut Vec<Event>) -> Result<(), StoreError> {
    match op {
        Op::Put(key, value) => {
            let (created, version) =
                find(connection, key)?.map_or((at, 1), |kv| (kv.created, kv.version + 1));
            connection
                .prepare_cached("INSERT OR REPLACE INTO kv VALUES (?1, ?2, ?3, ?4, ?5)")?
                .execute(params![key, value, to_sql(created), to_sql(at), version.cast_signed()])?;
            log(connection, at, events.len(), key, Some((value, created, version)))?;
            events.push(Event::Put(KeyValue {
                key: key.clone(),
                value: value.clone(),
                created,
                modified: at,
                version,
            }));
        }
        Op::Delete(key) => {
            if connection.prepare_cached("DELETE FROM kv WHERE key = ?1")?.execute([key])? > 0 {
                if is_secret(key) {
                    // That it was there is of no use to those who hear that it is gone.
                    connection.prepare_cached("DELETE FROM log WHERE key = ?1")?.execute([key])?;
                }
                log(connection, at, events.len(), key, None)?;
                events.push(Event::Delete(key.clone()));
            }
        }
        Op::DeletePrefix(prefix) => {
            let keys = connection
                .prepare_cached("SELECT key FROM kv WHERE key >= ?1 AND key < ?2 ORDER BY key")?
                .query_map([prefix, &prefix_end(prefix)], |row| row.get(0))?
                .collect::<Result<Vec<String>, rusqlite::Error>>()?;
            for key in keys {
                apply(connection, &Op::Delete(key), at, events)?;
            }
        }
    }
    Ok(())
}

fn log(
    connection: &Connection,
    at: Revision,
    seq: usize,
    key: &str,
    put: Option<(&[u8], Revision, u64)>,
) -> Result<(), StoreError> {
    connection.prepare_cached("INSERT INTO log VALUES (?1, ?2, ?3, ?4, ?5, ?6)")?.execute(params![
        to_sql(at),
        seq.cast_signed() as i64,
        key,
        put.map(|(value, ..)| value),
        put.map(|(_, created, _)| to_sql(created)),
        put.map(|(.., version)| version.cast_signed())
    ])?;
    Ok(())
}

fn find(connection: &Connection, key: &str) -> Result<Option<KeyValue>, StoreError> {
    Ok(connection
        .prepare_cached("SELECT key, value, created, modified, version FROM kv WHERE key = ?1")?
        .query_row([key], key_value)
        .optional()?)
}

fn key_value(row: &Row<'_>) -> rusqlite::Result<KeyValue> {
    Ok(KeyValue {
        key: row.get(0)?,
        value: row.get(1)?,
        created: revision(row, 2)?,
        modified: revision(row, 3)?,
        version: row.get::<_, i64>(4)?.unsigned_abs(),
    })
}

/// SQLite's integers are signed; revisions never reach their end.
fn revision(row: &Row<'_>, column: usize) -> rusqlite::Result<Revision> {
    row.get::<_, i64>(column).map(|value| Revision(value.unsigned_abs()))
}

fn to_sql(revision: Revision) -> i64 {
    revision.0.cast_signed()
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Io(error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::suite;

    fn epoch(seed: u8) -> Epoch {
        Epoch::from_random([seed; 8])
    }

    #[tokio::test]
    async fn the_embedded_store_keeps_the_promises_of_every_store() {
        let dir = tempfile::tempdir().unwrap();
        let mut count = 0;
        suite::run(async || {
            count += 1;
            SqliteStore::open(&dir.path().join(format!("{count}.sqlite")), epoch(1)).unwrap()
        })
        .await;
    }

    #[tokio::test]
    async fn what_was_answered_is_there_after_reopening_with_its_revisions_and_epoch() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("store.sqlite");
        let put = |key: &str| Txn::new(vec![], vec![Op::Put(key.into(), b"1".to_vec())]);
        {
            let store = SqliteStore::open(&path, epoch(1)).unwrap();
            store.txn(put("/a")).await.unwrap();
            store.txn(put("/b")).await.unwrap();
        }
        let store = SqliteStore::open(&path, epoch(2)).unwrap();
        assert_eq!(store.epoch(), epoch(1));
        let (revision, all) = store.range("/").await.unwrap();
        assert_eq!(revision, Revision(2));
        assert_eq!(all.iter().map(|kv| kv.created.0).collect::<Vec<_>>(), [1, 2]);
        let mut watch = store.watch("/", Revision(1)).await.unwrap();
        assert_eq!(watch.next().await.unwrap().revision, Revision(2));
    }

    #[tokio::test]
    async fn of_a_peers_secret_nothing_is_left_in_the_file_once_it_is_deleted() {
        let dir = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&dir.path().join("store.sqlite"), epoch(1)).unwrap();
        let secret = b"the secret of the office";
        let has = || {
            let files = std::fs::read_dir(dir.path()).unwrap();
            let mut files = files.map(|file| std::fs::read(file.unwrap().path()).unwrap());
            files.any(|bytes| bytes.windows(secret.len()).any(|part| part == secret))
        };
        let key = "/droveway/default/peers/p-aaaaaaaaaa".to_owned();
        store.txn(Txn::new(vec![], vec![Op::Put(key.clone(), secret.to_vec())])).await.unwrap();
        assert!(has());
        // While somebody reads what was there before it stays; it goes with the next change after that.
        let reader = Connection::open(dir.path().join("store.sqlite")).unwrap();
        reader.execute_batch("BEGIN; SELECT * FROM kv").unwrap();
        let begun = std::time::Instant::now();
        store.txn(Txn::new(vec![], vec![Op::Delete(key)])).await.unwrap();
        assert!(has() && begun.elapsed() < BUSY, "it waits for whoever reads");
        drop(reader);
        store.txn(Txn::new(vec![], vec![Op::Put("/a".into(), vec![])])).await.unwrap();
        assert!(!has());
        let key = "/droveway/default/peers/p-bbbbbbbbbb".to_owned();
        store.txn(Txn::new(vec![], vec![Op::Put(key.clone(), secret.to_vec())])).await.unwrap();
        store.txn(Txn::new(vec![], vec![Op::Delete(key)])).await.unwrap();
        assert!(!has());
        let mut watch = store.watch("/", Revision(0)).await.unwrap();
        assert_eq!(watch.next().await.unwrap().revision, Revision(2), "who was behind hears that it is gone");
    }

    #[test]
    fn a_file_that_is_not_a_store_is_refused_and_left_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let garbage = dir.path().join("garbage");
        std::fs::write(&garbage, "this is not a database, it is a letter to a friend".repeat(50)).unwrap();
        let foreign = dir.path().join("foreign");
        Connection::open(&foreign).unwrap().execute_batch("CREATE TABLE recipes (name TEXT)").unwrap();
        for path in [garbage, foreign] {
            let before = std::fs::read(&path).unwrap();
            let Err(error) = SqliteStore::open(&path, epoch(1)) else { panic!("{path:?} was opened") };
            assert!(error.to_string().contains("choose another --data-dir"), "{error}");
            assert_eq!(std::fs::read(&path).unwrap(), before);
        }
    }

    #[tokio::test]
    async fn a_truncated_store_and_one_of_a_newer_version_are_refused_with_the_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let make = |name: &str| dir.path().join(name);
        let (short, newer) = (make("short"), make("newer"));
        for path in [&short, &newer] {
            let store = SqliteStore::open(path, epoch(1)).unwrap();
            for n in 0..200 {
                let value = vec![b'v'; 500];
                store.txn(Txn::new(vec![], vec![Op::Put(format!("/{n}"), value)])).await.unwrap();
            }
        }
        let length = std::fs::metadata(&short).unwrap().len();
        OpenOptions::new().write(true).open(&short).unwrap().set_len(length / 2 + 100).unwrap();
        Connection::open(&newer).unwrap().execute_batch("PRAGMA user_version = 99").unwrap();
        for (path, remedy) in [(short, "restore it from a backup"), (newer, "run that version")] {
            let before = std::fs::read(&path).unwrap();
            let Err(error) = SqliteStore::open(&path, epoch(1)) else { panic!("{path:?} was opened") };
            assert!(error.to_string().contains(remedy), "{error}");
            assert_eq!(std::fs::read(&path).unwrap(), before, "left as it was");
        }
    }

    #[tokio::test]
    async fn a_watch_from_before_the_kept_log_is_told_so() {
        let dir = tempfile::tempdir().unwrap();
        let (connection, ..) = open(&dir.path().join("store.sqlite"), &epoch(1)).unwrap();
        let mut worker = Worker {
            connection,
            revision: Revision(KEPT + 5000),
            compacted: Revision(0),
            watches: vec![],
            unwiped: false,
        };
        worker.compact().unwrap();
        let error = worker.watch("/".into(), Revision(4999)).unwrap_err();
        assert_eq!(error, StoreError::Compacted { asked: Revision(4999), oldest: Revision(5000) });
        assert!(worker.watch("/".into(), Revision(5000)).is_ok());
    }

    #[tokio::test]
    async fn a_full_disk_refuses_changes_keeps_what_is_there_and_is_forgotten_when_there_is_room() {
        let dir = tempfile::tempdir().unwrap();
        let (connection, ..) = open(&dir.path().join("store.sqlite"), &epoch(1)).unwrap();
        let mut worker = Worker {
            connection,
            revision: Revision(0),
            compacted: Revision(0),
            watches: vec![],
            unwiped: false,
        };
        let put = |worker: &mut Worker, size: usize| {
            let (reply, mut answer) = oneshot::channel();
            worker.commit(vec![(Txn::new(vec![], vec![Op::Put("/a".into(), vec![7; size])]), reply)]);
            answer.try_recv().unwrap()
        };
        put(&mut worker, 1).unwrap();
        worker.connection.execute_batch("PRAGMA max_page_count = 10").unwrap();
        let error = put(&mut worker, 1 << 20).unwrap_err();
        assert!(error.to_string().contains("check the data directory's disk"), "{error}");
        let (revision, all) = worker.range("/").unwrap();
        assert_eq!((revision, all[0].value.as_slice()), (Revision(1), &[7][..]));
        worker.connection.execute_batch("PRAGMA max_page_count = 100000").unwrap();
        assert_eq!(put(&mut worker, 1 << 20).unwrap().revision, Revision(2));
    }
}
