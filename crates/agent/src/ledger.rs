//! The agent's own durable record: who it is, the last snapshot, its endpoints and addresses.
//!
//! An SQLite file in WAL mode. What an attach or detach depends on is on disk before the kernel is touched
//! (`synchronous=FULL`: the commit waits for fsync); the snapshot, which the server has anyway, does not wait.
//! Addresses that rest because the snapshot lost their claims are written with it: what a loss of power takes away the
//! server tells again, and they rest again.
//!
//! Invariant: what was written by a call that returned is there after a power loss, or the call concerned the
//! snapshot only.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use model::agent_api::Routes;
use model::{
    Catalog, Change, Endpoint, EnvironmentId, Epoch, HostId, Key, Lineage, Name, NetworkId, Object, Revision,
    UnixMillis,
};
use rusqlite::{Connection, OpenFlags, OptionalExtension, Transaction, params};
use serde::{Deserialize, Serialize};

use crate::room::{self, Room};

/// "DWAL": this file is a Droveway agent's ledger.
const APPLICATION_ID: i64 = 0x4457_414c;
const FORMAT: i64 = 1;
/// Before the keys of what is on its way back to the server.
const LEAVING: &str = "leaving ";
/// The ledger's file in the state directory.
pub const FILE: &str = "ledger.sqlite";

/// The open ledger.
pub struct Ledger {
    db: Connection,
    path: PathBuf,
    room: Room,
}

/// Who this host is, as the server knows it.
#[derive(Clone, Serialize, Deserialize)]
pub struct Identity {
    /// Its id.
    pub host: HostId,
    /// Its name.
    pub name: Name,
    /// Its environment.
    pub environment: EnvironmentId,
    /// The URL of the server it joined at.
    pub server: String,
    /// Other servers' URLs that it was given.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub servers: Vec<String>,
    /// The environment's CA certificate, PEM.
    pub ca: String,
    /// Its own certificate, PEM.
    pub certificate: String,
    /// Its private key, PEM. It leaves this file for nothing but TLS.
    pub key: String,
    /// When it got the certificate.
    #[serde(default)]
    pub certified: UnixMillis,
}

/// One endpoint, with what matters on this host alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The endpoint, as all may know it.
    pub endpoint: Arc<Endpoint>,
    /// What its engine calls it.
    #[serde(default)]
    pub foreign: Option<String>,
    /// The namespace of its container, once it has one.
    #[serde(default)]
    pub sandbox: Option<Sandbox>,
    /// Which bridge of the router its device is a port of: [`plan::Bridge`].
    #[serde(default)]
    pub bridge: u16,
}

/// The namespace of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sandbox {
    /// A file for `setns(2)`.
    pub path: PathBuf,
    /// The interface's name inside, where we put it there ourselves.
    #[serde(default)]
    pub ifname: Option<String>,
    /// The namespace's inode, where it was there at the attach: a path like `/proc/PID/ns/net` may come to mean another.
    #[serde(default)]
    pub inode: Option<(u64, u64)>,
    /// The routes it brought.
    #[serde(default)]
    pub routes: Routes,
}

/// What a ledger says at start.
#[derive(Default)]
pub struct Contents {
    /// The life of the store that the catalog is from.
    pub epoch: Option<Epoch>,
    /// The catalog's revision.
    pub revision: Revision,
    /// The domain of names.
    pub domain: Option<String>,
    /// The last snapshot.
    pub catalog: Catalog,
    /// What is on its way back to the server.
    pub leaving: Vec<Key>,
    /// This host's endpoints.
    pub records: Vec<Record>,
    /// Addresses kept for no endpoint yet.
    pub reservations: Vec<(NetworkId, IpAddr)>,
    /// When addresses were last released.
    pub released: BTreeMap<(NetworkId, IpAddr), UnixMillis>,
    /// Transit slots of networks.
    pub slots: BTreeMap<NetworkId, u16>,
    /// Which lives of this ledger the server knows of.
    pub lineage: Lineage,
    /// Why this ledger does not count any more, once that was said: another agent went on with a copy of it.
    pub copied: Option<String>,
}

/// Why the ledger cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// The file is something else.
    #[error(
        "{0} is not a ledger of this agent ({1}); move it away and join as a new host, with a token (`droveway host rm` the old \
         one first, if the name is to be the same); an old copy of it would be refused"
    )]
    Foreign(PathBuf, String),
    /// Another agent has it.
    #[error("{0} is in use by another agent; stop that one, or choose another --state-dir")]
    InUse(PathBuf),
    /// The disk, or SQLite.
    #[error("ledger {0}: {1}; nothing was changed")]
    Write(PathBuf, String),
    /// The disk has no room.
    #[error("ledger {0}: {1}; nothing was changed; make room on this host's disk, and try again")]
    Full(PathBuf, String),
}

impl Ledger {
    /// Opens the ledger in `directory`, making both where they are missing.
    pub fn open(directory: &Path) -> Result<Self, LedgerError> {
        let path = directory.join(FILE);
        let broken = |why: String| LedgerError::Write(path.clone(), why);
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(directory)
            .map_err(|e| broken(e.to_string()))?;
        // SQLite gives its journals the mode of the file they belong to.
        std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&path)
            .map_err(|e| broken(e.to_string()))?;
        let db = Connection::open(&path).map_err(|e| broken(e.to_string()))?;
        Self::prepare(&db).map_err(|error| match error.sqlite_error_code() {
            Some(rusqlite::ErrorCode::DatabaseBusy | rusqlite::ErrorCode::DatabaseLocked) => {
                LedgerError::InUse(path.clone())
            }
            Some(rusqlite::ErrorCode::NotADatabase | rusqlite::ErrorCode::DatabaseCorrupt) | None => {
                LedgerError::Foreign(path.clone(), error.to_string())
            }
            Some(_) => broken(error.to_string()),
        })?;
        Ok(Self::opened(db, path))
    }

    /// Opens the ledger in `directory` to be read, and changes nothing; `None` if there is none.
    pub fn look(directory: &Path) -> Result<Option<Self>, LedgerError> {
        let path = directory.join(FILE);
        if !path.exists() {
            return Ok(None);
        }
        let flags = OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let opened = Connection::open_with_flags(&path, flags).and_then(|db| {
            let application: i64 = db.query_row("PRAGMA application_id", [], |row| row.get(0))?;
            Ok((db, application))
        });
        match opened {
            Ok((db, APPLICATION_ID)) => Ok(Some(Self::opened(db, path))),
            Ok((_, other)) => Err(LedgerError::Foreign(path, format!("application {other:#x}"))),
            Err(error) => Err(match error.sqlite_error_code() {
                Some(rusqlite::ErrorCode::DatabaseBusy | rusqlite::ErrorCode::DatabaseLocked) => {
                    LedgerError::InUse(path)
                }
                Some(_) | None => LedgerError::Foreign(path, error.to_string()),
            }),
        }
    }

    fn opened(db: Connection, path: PathBuf) -> Self {
        Self { db, path, room: Room::default() }
    }

    fn prepare(db: &Connection) -> rusqlite::Result<()> {
        db.pragma_update(None, "locking_mode", "EXCLUSIVE")?;
        let (application, format): (i64, i64) = (
            db.query_row("PRAGMA application_id", [], |row| row.get(0))?,
            db.query_row("PRAGMA user_version", [], |row| row.get(0))?,
        );
        let tables: i64 = db.query_row("SELECT count(*) FROM sqlite_master", [], |row| row.get(0))?;
        if (tables > 0 || application != 0) && (application != APPLICATION_ID || format != FORMAT) {
            return Err(rusqlite::Error::InvalidParameterName(format!(
                "application {application:#x}, format {format}"
            )));
        }
        db.pragma_update(None, "journal_mode", "WAL")?;
        db.pragma_update(None, "synchronous", "FULL")?;
        db.pragma_update(None, "cache_size", -1024)?;
        // What is deleted may be a secret.
        db.pragma_update(None, "secure_delete", true)?;
        // A ledger that is there is opened without writing: also where the disk is full.
        if application == APPLICATION_ID {
            let whole: String = db.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
            return match whole.as_str() {
                "ok" => Ok(()),
                _ => Err(rusqlite::Error::InvalidParameterName(format!("it is damaged: {whole}"))),
            };
        }
        db.execute_batch(&format!(
            "BEGIN IMMEDIATE;
             PRAGMA application_id = {APPLICATION_ID};
             PRAGMA user_version = {FORMAT};
             CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
             CREATE TABLE object (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
             CREATE TABLE record (id TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
             CREATE TABLE reservation (network TEXT, address TEXT, PRIMARY KEY (network, address))
                 WITHOUT ROWID;
             CREATE TABLE released (network TEXT, address TEXT, at INTEGER NOT NULL,
                 PRIMARY KEY (network, address)) WITHOUT ROWID;
             CREATE TABLE slot (network TEXT PRIMARY KEY, slot INTEGER NOT NULL) WITHOUT ROWID;
             COMMIT;"
        ))
    }

    /// Who this host is, if it has joined.
    pub fn identity(&self) -> Result<Option<Identity>, LedgerError> {
        let text: Option<String> = self
            .db
            .query_row("SELECT value FROM meta WHERE key = 'identity'", [], |row| row.get(0))
            .optional()
            .map_err(|e| self.failed(e))?;
        text.map(|text| self.parse(&text)).transpose()
    }

    /// Writes down who this host is from now on, and forgets what belonged to another identity.
    pub fn set_identity(&mut self, identity: &Identity) -> Result<(), LedgerError> {
        let text = json(identity);
        self.write(true, |tx| {
            for table in ["object", "record", "reservation", "released", "slot", "meta"] {
                tx.execute(&format!("DELETE FROM {table}"), [])?;
            }
            tx.execute("INSERT INTO meta VALUES ('identity', ?1)", [text])?;
            Ok(())
        })?;
        self.wipe()
    }

    /// Leaves nothing of what was deleted in the file's journal, where older pages are.
    pub fn wipe(&mut self) -> Result<(), LedgerError> {
        let checkpoint = |row: &rusqlite::Row<'_>| row.get::<_, i64>(0);
        self.db
            .query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], checkpoint)
            .map(drop)
            .map_err(|e| self.failed(e))
    }

    /// Writes down this host's new certificate.
    pub fn certified(&mut self, identity: &Identity) -> Result<(), LedgerError> {
        let text = json(identity);
        self.write(true, |tx| {
            tx.execute("UPDATE meta SET value = ?1 WHERE key = 'identity'", [text]).map(drop)
        })
    }

    /// Writes down which lives of this ledger the server knows of, or may know of.
    pub fn set_lineage(&mut self, lineage: &Lineage) -> Result<(), LedgerError> {
        let text = json(lineage);
        self.write(true, |tx| {
            tx.execute("INSERT OR REPLACE INTO meta VALUES ('lineage', ?1)", [text]).map(drop)
        })
    }

    /// Writes down that this ledger does not count any more. Only another identity ends that.
    pub fn set_copied(&mut self, why: &str) -> Result<(), LedgerError> {
        self.write(true, |tx| {
            tx.execute("INSERT OR REPLACE INTO meta VALUES ('copied', ?1)", [why]).map(drop)
        })
    }

    /// Why this ledger does not count any more, if so.
    pub fn copied(&self) -> Result<Option<String>, LedgerError> {
        let query = "SELECT value FROM meta WHERE key = 'copied'";
        self.db.query_row(query, [], |row| row.get(0)).optional().map_err(|e| self.failed(e))
    }

    /// How the servers are reached, as they said last.
    pub fn servers(&self) -> Result<Vec<String>, LedgerError> {
        let query = "SELECT value FROM meta WHERE key = 'servers'";
        let text: Option<String> =
            self.db.query_row(query, [], |row| row.get(0)).optional().map_err(|e| self.failed(e))?;
        text.map_or_else(|| Ok(Vec::new()), |text| self.parse(&text))
    }

    /// Writes down how the servers are reached.
    pub fn set_servers(&mut self, urls: &[String]) -> Result<(), LedgerError> {
        let text = json(&urls);
        self.write(true, |tx| {
            tx.execute("INSERT OR REPLACE INTO meta VALUES ('servers', ?1)", [text]).map(drop)
        })
    }

    /// Everything but the identity.
    pub fn load(&self) -> Result<Contents, LedgerError> {
        let mut contents = Contents::default();
        let meta = |key: &str| {
            self.db
                .query_row("SELECT value FROM meta WHERE key = ?1", [key], |row| row.get::<_, String>(0))
                .optional()
                .map_err(|e| self.failed(e))
        };
        contents.epoch = meta("epoch")?.and_then(|text| text.parse().ok());
        contents.revision =
            Revision(meta("revision")?.and_then(|text| text.parse().ok()).unwrap_or_default());
        contents.domain = meta("domain")?;
        contents.copied = self.copied()?;
        if let Some(text) = meta("lineage")? {
            contents.lineage = self.parse(&text)?;
        }
        for text in self.texts("SELECT value FROM object")? {
            contents.catalog.put(self.parse::<Object>(&text)?);
        }
        for text in self.texts("SELECT value FROM record")? {
            contents.records.push(self.parse(&text)?);
        }
        for text in self.texts("SELECT json_array(network, address) FROM reservation")? {
            contents.reservations.push(self.parse(&text)?);
        }
        for text in self.texts("SELECT json_array(network, address, at) FROM released")? {
            let (network, address, at) = self.parse(&text)?;
            contents.released.insert((network, address), at);
        }
        for text in self.texts("SELECT key FROM meta")? {
            if let Some(key) = text.strip_prefix(LEAVING) {
                contents.leaving.push(self.parse(key)?);
            }
        }
        for text in self.texts("SELECT json_array(network, slot) FROM slot")? {
            let (network, slot) = self.parse(&text)?;
            contents.slots.insert(network, slot);
        }
        Ok(contents)
    }

    /// Adds or replaces an endpoint; its addresses are no longer merely reserved.
    pub fn put_record(&mut self, record: &Record) -> Result<(), LedgerError> {
        let text = json(record);
        self.write(true, |tx| {
            let endpoint = &record.endpoint;
            tx.execute("INSERT OR REPLACE INTO record VALUES (?1, ?2)", params![endpoint.id.as_str(), text])?;
            for address in &endpoint.addresses {
                unreserve(tx, &endpoint.network, *address)?;
            }
            Ok(())
        })
    }

    /// Forgets an endpoint. Its addresses are kept reserved, or rest from `now` on.
    pub fn delete_record(&mut self, record: &Record, keep: bool, now: UnixMillis) -> Result<(), LedgerError> {
        self.write(true, |tx| {
            let endpoint = &record.endpoint;
            tx.execute("DELETE FROM record WHERE id = ?1", [endpoint.id.as_str()])?;
            for address in &endpoint.addresses {
                if keep {
                    reserve(tx, &endpoint.network, *address)?;
                } else {
                    release(tx, &endpoint.network, *address, now)?;
                }
            }
            Ok(())
        })
    }

    /// Keeps an address for an endpoint to come.
    pub fn reserve(&mut self, network: &NetworkId, address: IpAddr) -> Result<(), LedgerError> {
        self.write(true, |tx| reserve(tx, network, address))
    }

    /// Gives a reserved address back; it rests from `now` on.
    pub fn unreserve(
        &mut self,
        network: &NetworkId,
        address: IpAddr,
        now: UnixMillis,
    ) -> Result<(), LedgerError> {
        self.write(true, |tx| {
            unreserve(tx, network, address)?;
            release(tx, network, address, now)
        })
    }

    /// Writes a network's transit slot down.
    pub fn set_slot(&mut self, network: &NetworkId, slot: u16) -> Result<(), LedgerError> {
        self.write(true, |tx| {
            tx.execute("INSERT OR REPLACE INTO slot VALUES (?1, ?2)", params![network.as_str(), slot])
                .map(drop)
        })
    }

    /// Forgets what is kept of a network that is gone.
    pub fn forget_network(&mut self, network: &NetworkId) -> Result<(), LedgerError> {
        self.write(true, |tx| {
            for table in ["slot", "released", "reservation"] {
                tx.execute(&format!("DELETE FROM {table} WHERE network = ?1"), [network.as_str()])?;
            }
            Ok(())
        })
    }

    /// Keeps objects that addresses depend on at once (a leased block, a granted claim).
    pub fn put_object(&mut self, object: &Object) -> Result<(), LedgerError> {
        let (key, value) = (json(&object.key()), json(object));
        self.write(true, |tx| {
            tx.execute("INSERT OR REPLACE INTO object VALUES (?1, ?2)", [key, value]).map(drop)
        })
    }

    /// Notes that the server is being given an object back (a block, a claim), or that this is settled.
    pub fn set_leaving(&mut self, key: &Key, leaving: bool) -> Result<(), LedgerError> {
        let name = format!("{LEAVING}{}", json(key));
        self.write(leaving, |tx| {
            if leaving {
                tx.execute("INSERT OR REPLACE INTO meta VALUES (?1, '')", [name]).map(drop)
            } else {
                tx.execute("DELETE FROM meta WHERE key = ?1", [name]).map(drop)
            }
        })
    }

    /// Replaces the snapshot, and notes what rests since then.
    pub fn set_snapshot(
        &mut self,
        epoch: &Epoch,
        revision: Revision,
        domain: &str,
        catalog: &Catalog,
        resting: &[(NetworkId, IpAddr, UnixMillis)],
    ) -> Result<(), LedgerError> {
        self.write(false, |tx| {
            tx.execute("DELETE FROM object", [])?;
            let mut insert = tx.prepare_cached("INSERT INTO object VALUES (?1, ?2)")?;
            for object in catalog.objects() {
                insert.execute([json(&object.key()), json(&object)])?;
            }
            for (key, value) in [
                ("epoch", epoch.to_string()),
                ("revision", revision.to_string()),
                ("domain", domain.to_owned()),
            ] {
                tx.execute("INSERT OR REPLACE INTO meta VALUES (?1, ?2)", [key, &value])?;
            }
            resting.iter().try_for_each(|(network, address, since)| release(tx, network, *address, *since))
        })
    }

    /// Brings the snapshot forward. Addresses whose claims are gone rest from `now` on.
    pub fn apply(
        &mut self,
        revision: Revision,
        changes: &[Change],
        now: UnixMillis,
    ) -> Result<(), LedgerError> {
        self.write(false, |tx| {
            for change in changes {
                if let Change::Delete(Key::Claim(network, address)) = change {
                    release(tx, network, *address, now)?;
                }
                match change {
                    Change::Put(object) => tx
                        .prepare_cached("INSERT OR REPLACE INTO object VALUES (?1, ?2)")?
                        .execute([json(&object.key()), json(object)])?,
                    Change::Delete(key) => {
                        tx.prepare_cached("DELETE FROM object WHERE key = ?1")?.execute([json(key)])?
                    }
                };
            }
            tx.execute("INSERT OR REPLACE INTO meta VALUES ('revision', ?1)", [revision.to_string()])
                .map(drop)
        })
    }

    fn write(
        &mut self,
        durable: bool,
        work: impl FnOnce(&Transaction<'_>) -> rusqlite::Result<()>,
    ) -> Result<(), LedgerError> {
        let level = if durable { "FULL" } else { "NORMAL" };
        let outcome = self.db.pragma_update(None, "synchronous", level).and_then(|()| {
            let tx = self.db.transaction()?;
            work(&tx)?;
            tx.commit()
        });
        self.room.wrote(outcome.is_err());
        outcome.map_err(|e| self.failed(e))
    }

    /// Whether it takes what is to be written; if not, why, and what to do. The answer is some seconds old at most.
    pub(crate) fn takes(&mut self) -> Result<(), String> {
        if let Some(told) = self.room.told() {
            return told;
        }
        let mut answer = self.path.parent().map_or(Ok(()), room::probe);
        if answer.is_ok() && self.room.failed() {
            // Nothing else may be written for long.
            let nothing = self.write(true, |tx| {
                tx.execute("INSERT OR REPLACE INTO meta VALUES ('probe', '')", []).map(drop)
            });
            answer = nothing.map_err(|error| format!("it takes nothing: {error}"));
        }
        self.room.tell(answer)
    }

    /// As if the disk took nothing any more.
    #[cfg(test)]
    pub(crate) fn refuse_writes(&self, refuse: bool) {
        self.db.pragma_update(None, "query_only", refuse).unwrap();
    }

    fn texts(&self, query: &str) -> Result<Vec<String>, LedgerError> {
        let read = || -> rusqlite::Result<Vec<String>> {
            let mut statement = self.db.prepare(query)?;
            statement.query_map([], |row| row.get(0))?.collect()
        };
        read().map_err(|e| self.failed(e))
    }

    fn parse<T: serde::de::DeserializeOwned>(&self, text: &str) -> Result<T, LedgerError> {
        serde_json::from_str(text).map_err(|e| LedgerError::Foreign(self.path.clone(), e.to_string()))
    }

    fn failed(&self, error: rusqlite::Error) -> LedgerError {
        let (path, why) = (self.path.clone(), error.to_string());
        match error.sqlite_error_code() {
            Some(rusqlite::ErrorCode::DiskFull) => LedgerError::Full(path, why),
            // Its content is to blame: damaged, or not what we put there.
            Some(
                rusqlite::ErrorCode::NotADatabase
                | rusqlite::ErrorCode::DatabaseCorrupt
                | rusqlite::ErrorCode::Unknown,
            )
            | None => LedgerError::Foreign(path, why),
            Some(_) => LedgerError::Write(path, why),
        }
    }
}

fn reserve(tx: &Transaction<'_>, network: &NetworkId, address: IpAddr) -> rusqlite::Result<()> {
    tx.execute(
        "INSERT OR IGNORE INTO reservation VALUES (?1, ?2)",
        params![network.as_str(), address.to_string()],
    )
    .map(drop)
}

fn unreserve(tx: &Transaction<'_>, network: &NetworkId, address: IpAddr) -> rusqlite::Result<()> {
    tx.execute(
        "DELETE FROM reservation WHERE network = ?1 AND address = ?2",
        params![network.as_str(), address.to_string()],
    )
    .map(drop)
}

fn release(
    tx: &Transaction<'_>,
    network: &NetworkId,
    address: IpAddr,
    now: UnixMillis,
) -> rusqlite::Result<()> {
    tx.execute(
        "INSERT OR REPLACE INTO released VALUES (?1, ?2, ?3)",
        params![network.as_str(), address.to_string(), i64::try_from(now).unwrap_or(i64::MAX)],
    )
    .map(drop)
}

/// Our own types have no map with foreign keys and no failing serialiser.
fn json<T: Serialize>(value: &T) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

#[cfg(test)]
#[path = "ledger_tests.rs"]
mod tests;
