//! Backup and restore: all that a server has, in one file.
//!
//! A backup is lines of JSON: a head, the files of the data directory that cannot be made again, every key of the store at
//! one revision, and a digest of all lines before it. It holds the CA's key: keep it as secret as the data directory.
//!
//! A restored store is a new life: it has a new epoch, revisions above all that the one before can have had, and a mark
//! for every host that it knows ([`Unreported`]). Until a host has said what it holds, nothing that it may hold is given
//! to another: see `api/adopt`.
//!
//! Invariant: a file is used whole or not at all, and a store that is there is replaced on demand only.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use model::{Block, Epoch, Revision, UnixMillis};
use serde::{Deserialize, Serialize};

use crate::app::now;
use crate::files::{self, DataDir};
use crate::keys::{self, Keys, Slot, Unreported};
use crate::store::{EtcdStore, KeyValue, Op, SqliteStore, Store, StoreError, Txn};
use crate::{Error, OpenEtcdError, StoreChoice, secret};

const FORMAT: u32 = 1;
/// What a backup takes along of the data directory.
const FILES: [&str; 4] = [files::CA_KEY, files::CA_CERTIFICATE, files::SERVER_KEY, files::ADMIN_KEY];
/// How far above its last revision a store goes on in its next life: more than it can have made since the backup.
const LEAP: u64 = 1 << 32;
/// How many keys one transaction restores.
const CHUNK: usize = 1000;

/// What a backup holds, or what was restored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backup {
    /// The life of the store that it was made of, or that begins.
    pub epoch: Epoch,
    /// The revision that it was made at.
    pub revision: Revision,
    /// When it was made.
    pub made: UnixMillis,
    /// How many keys it holds.
    pub keys: usize,
    /// How many hosts it knows.
    pub hosts: usize,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Backup { format: u32, epoch: Epoch, revision: Revision, made: UnixMillis },
    File { name: String, text: String },
    Key { key: String, value: String, created: Revision },
    End { lines: usize, sha256: String },
}

/// Writes all that the server of that data directory has to a new file, mode 0600. The server may run meanwhile.
pub async fn backup(data_dir: &Path, choice: &StoreChoice, file: &Path) -> Result<Backup, Error> {
    let (epoch, revision, all) = match choice {
        StoreChoice::Embedded => SqliteStore::read(&data_dir.join(files::STORE))
            .map_err(|error| Error::Store(error.to_string()))?,
        StoreChoice::Etcd(config) => {
            let fault = |error| Error::Etcd(config.url.to_string(), error);
            let store = EtcdStore::existing(config).await.map_err(fault)?;
            let store = store.ok_or_else(|| Error::Store(format!("{}: there is no store", config.url)))?;
            let (revision, all) = store.range(keys::ROOT).await.map_err(unreadable)?;
            (store.epoch(), revision, all)
        }
    };
    let made = now();
    let mut lines = vec![Line::Backup { format: FORMAT, epoch: epoch.clone(), revision, made }];
    for name in FILES {
        match fs::read_to_string(data_dir.join(name)) {
            Ok(text) => lines.push(Line::File { name: name.to_owned(), text }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound && name != files::CA_KEY => {}
            Err(error) => return Err(Error::File { what: "read", path: data_dir.join(name), error }),
        }
    }
    let hosts = hosts(&all).len();
    let keys = all.len();
    lines.extend(all.into_iter().map(|kv| Line::Key {
        key: kv.key,
        value: BASE64_STANDARD.encode(kv.value),
        created: kv.created,
    }));
    write(file, &lines).map_err(|error| Error::File { what: "write", path: file.to_owned(), error })?;
    Ok(Backup { epoch, revision, made, keys, hosts })
}

/// Makes a data directory and a store from a backup, for a server to begin a new life with. No server runs on that
/// directory; with `force` what is there is replaced, and the embedded store that was there is kept beside it.
pub async fn restore(
    file: &Path,
    data_dir: &Path,
    choice: &StoreChoice,
    force: bool,
) -> Result<Backup, Error> {
    let (head, texts, all) = read(file)?;
    let data = DataDir::open(data_dir)?;
    let there =
        [files::STORE, files::CA_KEY].into_iter().map(|name| data.path(name)).find(|path| path.exists());
    if let Some(path) = there.filter(|_| !force) {
        return Err(Error::InTheWay(path.display().to_string()));
    }
    let epoch = Epoch::from_random(secret::random()?);
    let above = Revision(head.revision.0 + LEAP);
    let ops = ops(&all)?;
    let keys = ops.len();
    match choice {
        StoreChoice::Embedded => {
            let next = data.path(".store.restored");
            remove_store(&next)?;
            let store = SqliteStore::make(&next, epoch.clone(), above);
            let store = store.map_err(|error| Error::Store(error.to_string()))?;
            store.txn(Txn::new(vec![], ops)).await.map_err(unreadable)?;
            // Dropped, it has moved its journal into its file; where there was no room for that, the journal is still there.
            drop(store);
            if with_end(&next, "-wal").exists() {
                return Err(Error::NoRoom(data.path(files::STORE)));
            }
            write_files(&data, &texts)?;
            set_aside(&data)?;
            rename(&next, &data.path(files::STORE))?;
        }
        StoreChoice::Etcd(config) => {
            let fault = |error| Error::Etcd(config.url.to_string(), error);
            let store = EtcdStore::begin(config, epoch.clone(), above, force).await.map_err(fault)?;
            let store = store.ok_or_else(|| Error::InTheWay(format!("a store at {}", config.url)))?;
            write_files(&data, &texts)?;
            for chunk in ops.chunks(CHUNK) {
                let txn = Txn::new(vec![store.beginning()], chunk.to_vec());
                if !store.txn(txn).await.map_err(unreadable)?.succeeded {
                    return Err(fault(OpenEtcdError::TakenOver));
                }
            }
            store.finish().await.map_err(fault)?;
        }
    }
    Ok(Backup { epoch, keys, hosts: hosts(&all).len(), ..head })
}

/// What the restored store holds. A block keeps its place in the order of leases.
fn ops(all: &[KeyValue]) -> Result<Vec<Op>, Error> {
    let unwritable = |error: serde_json::Error| Error::Store(error.to_string());
    let mut ops = Vec::new();
    for kv in all {
        let value = match keys::parse(&kv.key) {
            // Servers say anew where they are, and what a log was to get it got since, or its file is not in the backup.
            Some((_, Slot::Server(_) | Slot::Audit(..))) => continue,
            Some((_, Slot::Block(..))) => {
                let block: Block = serde_json::from_slice(&kv.value).map_err(unwritable)?;
                let leased = if block.leased == Revision::default() { kv.created } else { block.leased };
                serde_json::to_vec(&Block { leased, ..block }).map_err(unwritable)?
            }
            _ => kv.value.clone(),
        };
        ops.push(Op::Put(kv.key.clone(), value));
    }
    let since = now();
    for (environment, host) in hosts(all) {
        let place = Keys(&environment).unreported(&host);
        if !ops.iter().any(|op| matches!(op, Op::Put(key, _) if *key == place)) {
            ops.push(keys::put(place, &Unreported { since, followed: false }).map_err(unwritable)?);
        }
    }
    Ok(ops)
}

fn hosts(all: &[KeyValue]) -> Vec<(model::EnvironmentId, model::HostId)> {
    let parsed = all.iter().filter_map(|kv| keys::parse(&kv.key));
    parsed
        .filter_map(|(environment, slot)| match slot {
            Slot::Host(id) => Some((environment, id)),
            _ => None,
        })
        .collect()
}

fn write_files(data: &DataDir, texts: &[(&'static str, String)]) -> Result<(), Error> {
    texts.iter().try_for_each(|(name, text)| data.write(name, text))
}

/// The store that was there stays, under another name. Its file goes first: a server that is started on what a restore left
/// that was cut short finds no store, rather than one without its journal. A journal that is there alone goes too: it is not
/// that of the store to come.
fn set_aside(data: &DataDir) -> Result<(), Error> {
    let old = data.path(files::STORE);
    let aside = data.path(&format!("{}.replaced-{}", files::STORE, now() / 1000));
    for end in ["", "-wal", "-shm"] {
        let (from, to) = (with_end(&old, end), with_end(&aside, end));
        if from.exists() {
            rename(&from, &to)?;
        }
    }
    Ok(())
}

fn remove_store(path: &Path) -> Result<(), Error> {
    for end in ["-wal", "-shm", ""] {
        let path = with_end(path, end);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(Error::File { what: "remove", path, error });
            }
            _ => {}
        }
    }
    Ok(())
}

fn with_end(path: &Path, end: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(end);
    name.into()
}

fn rename(from: &Path, to: &Path) -> Result<(), Error> {
    let sync = || files::sync(to.parent().unwrap_or(Path::new("/")));
    fs::rename(from, to).and_then(|()| sync()).map_err(|error| Error::File {
        what: "rename",
        path: from.to_owned(),
        error,
    })
}

/// The whole file or none: it is written beside its place, by one at a time.
fn write(file: &Path, lines: &[Line]) -> std::io::Result<()> {
    let fault = |why: &str| Err(std::io::Error::new(std::io::ErrorKind::AlreadyExists, why));
    let temporary = with_end(file, ".part");
    let part = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&temporary)?;
    match part.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return fault("another backup is being written to it"),
        Err(TryLockError::Error(error)) => return Err(error),
    }
    let there = if file.exists() { fault("it is there already") } else { Ok(()) };
    let outcome = there
        .and_then(|()| write_to(part, lines))
        .and_then(|()| fs::rename(&temporary, file))
        .and_then(|()| files::sync(file.parent().unwrap_or(Path::new("/"))));
    if outcome.is_err() {
        drop(fs::remove_file(&temporary));
    }
    outcome
}

fn write_to(part: File, lines: &[Line]) -> std::io::Result<()> {
    // One that was cut short may have left something.
    part.set_len(0)?;
    let mut file = BufWriter::new(part);
    let mut text = Vec::new();
    for line in lines {
        text.extend(serde_json::to_vec(line)?);
        text.push(b'\n');
    }
    let end = Line::End { lines: lines.len(), sha256: secret::sha256(&text).to_string() };
    file.write_all(&text)?;
    file.write_all(&serde_json::to_vec(&end)?)?;
    file.write_all(b"\n")?;
    file.into_inner().map_err(std::io::IntoInnerError::into_error)?.sync_all()
}

type Contents = (Backup, Vec<(&'static str, String)>, Vec<KeyValue>);

fn read(file: &Path) -> Result<Contents, Error> {
    let unusable = |why: &str| Error::NoBackup(file.to_owned(), why.to_owned());
    let fault = |error| Error::File { what: "read", path: file.to_owned(), error };
    let mut reader = BufReader::new(File::open(file).map_err(fault)?);
    let (mut text, mut lines, mut head) = (Vec::new(), 0, None);
    let (mut texts, mut all, mut ended) = (Vec::new(), Vec::new(), false);
    loop {
        let from = text.len();
        if reader.read_until(b'\n', &mut text).map_err(fault)? == 0 {
            break;
        }
        if ended {
            return Err(unusable("there is more after its end"));
        }
        let line = serde_json::from_slice(&text[from..]);
        match line.map_err(|_| unusable("it is no backup, or was changed, or is cut short"))? {
            Line::Backup { format, .. } if format > FORMAT => {
                return Err(unusable("a newer version made it; restore it with that one"));
            }
            Line::Backup { epoch, revision, made, .. } => {
                head = Some(Backup { epoch, revision, made, keys: 0, hosts: 0 });
            }
            Line::File { name, text } => {
                let name = FILES.into_iter().find(|known| *known == name);
                texts.push((name.ok_or_else(|| unusable("it has a file that no backup has"))?, text));
            }
            Line::Key { key, value, created } => {
                let value = BASE64_STANDARD.decode(value).map_err(|_| unusable("a value is not base64"))?;
                all.push(KeyValue { key, value, created, modified: created, version: 1 });
            }
            Line::End { lines: count, sha256 } => {
                if count != lines || secret::sha256(&text[..from]).to_string() != sha256 {
                    return Err(unusable("it was changed: its digest is another"));
                }
                ended = true;
            }
        }
        lines += 1;
    }
    match head {
        Some(head) if ended => Ok((head, texts, all)),
        _ => Err(unusable("it is cut short")),
    }
}

fn unreadable(error: StoreError) -> Error {
    Error::Store(error.to_string())
}
