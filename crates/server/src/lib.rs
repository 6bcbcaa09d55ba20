//! The server of Droveway: certificate authority, store, API, enrolment, watch and address leases.
//!
//! One HTTPS port serves people (API key) and agents (client certificate). The store holds the truth; the state in memory
//! follows it and answers what is read; every change is a compare-and-set transaction.
//!
//! Invariant: losing the server loses changes, never traffic. It knows no traffic key and no host's private key.

// The tests of the store and those of the whole server start etcd in one way.
#[cfg(test)]
extern crate self as server;

mod api;
mod app;
mod audit;
mod backup;
mod ca;
mod feed;
mod files;
mod incarnation;
mod ipam;
#[cfg(test)]
mod ipam_model;
mod keys;
mod limits;
mod lines;
mod metrics;
mod name;
mod outbox;
mod presence;
mod request;
mod secret;
mod serve;
mod start;
mod state;
mod store;
mod tls;
mod upkeep;
mod view;

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use model::Fingerprint;

pub use backup::{Backup, backup, restore};
pub use ca::Lives;
pub use limits::Limits;
pub use start::run;
pub use store::{BadStore, EtcdConfig, EtcdUrl, OpenEtcdError, StoreChoice};

/// For how long addresses are retained, unless a server is told otherwise.
pub const RETAIN: std::time::Duration = std::time::Duration::from_hours(30 * 24);

/// How a server is to run.
#[derive(Debug, Clone)]
pub struct Config {
    /// Where its files are; made if it is not there.
    pub data_dir: PathBuf,
    /// Where it listens. Port 0 takes any that is free.
    pub listen: SocketAddr,
    /// More DNS names and addresses for its certificate.
    pub names: Vec<String>,
    /// The domain of names in the environment.
    pub domain: String,
    /// For how long addresses are retained for containers that are gone.
    pub retain: std::time::Duration,
    /// How much it takes on.
    pub limits: Limits,
    /// How long certificates are good for.
    pub lives: Lives,
    /// Where the state is.
    pub store: StoreChoice,
    /// How agents reach this server. What all servers say here, each agent learns.
    pub urls: Vec<String>,
}

/// A server that listens.
#[derive(Debug, Clone)]
pub struct Ready {
    /// Where it listens.
    pub address: SocketAddr,
    /// SHA-256 of its CA certificate.
    pub ca: Fingerprint,
    /// Whether this start made the environment.
    pub first_start: bool,
    /// The file that has the admin key's text.
    pub admin_key_file: PathBuf,
}

/// Why a server cannot start or go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The data directory is a file.
    #[error("{0} is not a directory; choose another --data-dir")]
    NotADirectory(PathBuf),
    /// The data directory belongs to something else.
    #[error(
        "{0} can be read by others and holds other files; choose another --data-dir, or make it private with chmod 700"
    )]
    NotOurs(PathBuf),
    /// Two servers, one directory.
    #[error("another server runs on {0}; stop it, or choose another --data-dir")]
    Locked(PathBuf),
    /// A file cannot be used.
    #[error("cannot {what} {path}: {error}")]
    File {
        /// What was to be done to it.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        error: io::Error,
    },
    /// A file without which hosts could not go on.
    #[error("{0} is missing, but the environment was made with it; restore it from a backup")]
    Missing(PathBuf),
    /// A store that lost what it had.
    #[error(
        "{0} is empty, but the environment was made with it; its newest content is in store.sqlite-wal beside it: put both \
         back, or restore a backup with `droveway server restore --force`"
    )]
    Empty(PathBuf),
    /// Another server made the environment.
    #[error(
        "the environment's CA is there, but not its key: copy ca.key of a server that has it to {0}, mode 0600, and start \
         again"
    )]
    NoCaKey(PathBuf),
    /// Another server made the environment, and this one has a CA of its own.
    #[error(
        "{0} is not the certificate of the environment's CA; move it and ca.key away, copy ca.key of a server of this \
         environment there, and start again"
    )]
    OtherCa(PathBuf),
    /// A restore would replace something.
    #[error("{0} is there already; restore to another --data-dir, or replace what is there with --force")]
    InTheWay(String),
    /// A file that cannot be restored from.
    #[error("{0} cannot be restored from: {1}; nothing was changed")]
    NoBackup(PathBuf, String),
    /// A restore on a disk that is full.
    #[error(
        "{0} cannot be restored: its disk has no room for it; free space, and restore again. Nothing was changed"
    )]
    NoRoom(PathBuf),
    /// A clock that was never set.
    #[error(
        "the clock is wrong: it is before {0}, when this version was made; set it, and start again. Certificates made now \
         would have run out when it is right"
    )]
    Clock(&'static str),
    /// A URL that no agent can use.
    #[error("{0:?} is not a URL of a server; write https://HOST:PORT for --url")]
    BadUrl(String),
    /// An etcd that cannot be the store.
    #[error("store {0}: {1}")]
    Etcd(String, OpenEtcdError),
    /// An etcd that knows less than it did.
    #[error(
        "{0} went back to an earlier state than this server has seen: it was put back from a snapshot of its own, and does not \
         know what hosts hold since then. Stop all servers, begin a new life with what is there by `droveway server backup \
         FILE` and `droveway server restore FILE --force`, both with this --store, or restore an older backup so, and start \
         them again"
    )]
    SetBack(String),
    /// The store ended under the server.
    #[error("the store ended: {0}; look at the log, and start the server again")]
    Ended(String),
    /// The file with its name holds something else.
    #[error("{0} is not as a server wrote it; remove it and start again: the server takes another name")]
    BadId(PathBuf),
    /// Another server goes by its name.
    #[error(
        "another server has gone on with a copy of {0} while this one could not say that it lives; start this one again: it \
         takes another name"
    )]
    Superseded(PathBuf),
    /// A file with foreign content.
    #[error("{0} cannot be understood; restore it from a backup")]
    Unreadable(PathBuf),
    /// A certificate and a foreign key.
    #[error("{0} and {1} do not belong together; restore both from one backup")]
    Mismatch(PathBuf, PathBuf),
    /// The admin key's file holds something else.
    #[error("{0} does not hold a key; restore it, or remove it and start again: a new key is made")]
    BadAdminKey(PathBuf),
    /// A name that no certificate can have.
    #[error("{0:?} is neither a DNS name nor an address; correct --name")]
    BadName(String),
    /// A domain that names cannot have.
    #[error("{0:?} is not a domain; use labels of a-z 0-9 - separated by dots, as in droveway.internal")]
    BadDomain(String),
    /// The store's file or its medium.
    #[error("{0}")]
    Store(String),
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {error}; choose another --listen")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        error: io::Error,
    },
    /// No certificate could be made.
    #[error("cannot make a certificate: {0}")]
    Certificate(rcgen::Error),
    /// TLS could not be set up.
    #[error("cannot set up TLS: {0}")]
    Tls(rustls::Error),
    /// The operating system gives no random bytes.
    #[error("the operating system gives no random bytes")]
    Random,
}
