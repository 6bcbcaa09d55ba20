//! What the plugin and the follower know together.
//!
//! Docker has its own ids for networks, and requests about endpoints carry only those. Which Droveway network each one
//! is must survive restarts of either side, and the plugin cannot ask: so it is kept in a small file.
//!
//! Invariant: when `CreateNetwork` is answered, the file holds the network on disk.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use model::NetworkId;
use serde::{Deserialize, Serialize};

use super::Error;

/// How long the engine may take from asking for an address to knowing its endpoint itself.
pub(super) const IN_FLIGHT: Duration = Duration::from_secs(30);

/// Shared by the plugin and the follower.
pub(super) struct State {
    file: PathBuf,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    networks: Record,
    /// Endpoints that this engine is known to have: it made them, or it listed them.
    confirmed: BTreeSet<String>,
    /// By sandbox: the endpoint that brought the on-link routes, `None` if it has left.
    on_link: BTreeMap<PathBuf, Option<String>>,
    /// Addresses lately asked for.
    fresh: BTreeMap<(NetworkId, IpAddr), Instant>,
}

#[derive(Default, Clone, PartialEq, Serialize, Deserialize)]
struct Record {
    /// By Docker's id.
    networks: BTreeMap<String, NetworkId>,
}

impl State {
    /// Reads what was kept. No file is no network.
    pub(super) fn open(dir: &Path) -> Result<Self, Error> {
        let file = dir.join("docker-networks.json");
        let error = |source| Error::State { path: file.clone(), source };
        std::fs::create_dir_all(dir).map_err(error)?;
        let networks = match std::fs::read(&file) {
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_else(|why| {
                tracing::warn!(file = %file.display(), %why, "the record of Docker's networks is damaged; it is learned again from the engine");
                Record::default()
            }),
            Err(why) if why.kind() == io::ErrorKind::NotFound => Record::default(),
            Err(why) => return Err(error(why)),
        };
        Ok(Self { file, inner: Mutex::new(Inner { networks, ..Inner::default() }) })
    }

    /// The Droveway network behind a Docker network.
    pub(super) fn network(&self, docker: &str) -> Option<NetworkId> {
        self.lock().networks.networks.get(docker).cloned()
    }

    /// Keeps it.
    pub(super) fn put_network(&self, docker: &str, network: &NetworkId) -> Result<(), Error> {
        self.change(|networks| {
            networks.insert(docker.to_owned(), network.clone());
        })
    }

    /// Forgets it.
    pub(super) fn delete_network(&self, docker: &str) -> Result<(), Error> {
        self.change(|networks| {
            networks.remove(docker);
        })
    }

    /// Docker's networks that are known.
    pub(super) fn networks(&self) -> BTreeMap<String, NetworkId> {
        self.lock().networks.networks.clone()
    }

    /// The engine, asked after `before` was known, has these. One that was made meanwhile stays.
    pub(super) fn learn_networks(
        &self,
        before: &BTreeMap<String, NetworkId>,
        there: &BTreeMap<String, NetworkId>,
    ) -> Result<(), Error> {
        self.change(|networks| {
            networks.retain(|docker, _| there.contains_key(docker) || !before.contains_key(docker));
            networks.extend(there.iter().map(|(docker, id)| (docker.clone(), id.clone())));
        })
    }

    /// The engine has this endpoint.
    pub(super) fn confirm(&self, endpoint: &str) {
        self.lock().confirmed.insert(endpoint.to_owned());
    }

    /// The engine has no longer this endpoint.
    pub(super) fn forget(&self, endpoint: &str) {
        self.lock().confirmed.remove(endpoint);
    }

    /// The engine has these endpoints.
    pub(super) fn confirm_all<'a>(&self, endpoints: impl Iterator<Item = &'a String>) {
        self.lock().confirmed.extend(endpoints.cloned());
    }

    /// The engine has gone: what it has is not known any more.
    pub(super) fn lose_engine(&self) {
        self.lock().confirmed.clear();
    }

    /// Whether the engine has this endpoint, as far as is known.
    pub(super) fn is_confirmed(&self, endpoint: &str) -> bool {
        self.lock().confirmed.contains(endpoint)
    }

    /// Whether `endpoint`, which joins `sandbox`, is to bring the on-link routes. They are the same on each network, and the
    /// kernel takes a route once: of a container's endpoints one brings them. `others` are the sandboxes of the others.
    pub(super) fn brings_on_link(&self, sandbox: &Path, endpoint: &str, others: &BTreeSet<PathBuf>) -> bool {
        let mut inner = self.lock();
        inner.on_link.retain(|known, _| others.contains(known) || known == sandbox);
        let brings = match inner.on_link.get(sandbox) {
            _ if !others.contains(sandbox) => true,
            Some(holder) => holder.as_deref().is_none_or(|holder| holder == endpoint),
            // From before the agent's restart: one of the others has brought them.
            None => false,
        };
        if brings {
            inner.on_link.insert(sandbox.to_owned(), Some(endpoint.to_owned()));
        }
        brings
    }

    /// The endpoint has left its sandbox, and its routes with it.
    pub(super) fn left(&self, endpoint: &str) {
        for holder in self.lock().on_link.values_mut() {
            if holder.as_deref() == Some(endpoint) {
                *holder = None;
            }
        }
    }

    /// The address was asked for now.
    pub(super) fn asked(&self, network: &NetworkId, address: IpAddr) {
        let mut inner = self.lock();
        inner.fresh.retain(|_, at| at.elapsed() < IN_FLIGHT);
        inner.fresh.insert((network.clone(), address), Instant::now());
    }

    /// Whether the address was asked for so lately that the engine may not know its endpoint yet.
    pub(super) fn in_flight(&self, network: &NetworkId, address: IpAddr) -> bool {
        let key = (network.clone(), address);
        self.lock().fresh.get(&key).is_some_and(|at| at.elapsed() < IN_FLIGHT)
    }

    fn change(&self, change: impl FnOnce(&mut BTreeMap<String, NetworkId>)) -> Result<(), Error> {
        let mut inner = self.lock();
        let mut record = inner.networks.clone();
        change(&mut record.networks);
        if record != inner.networks {
            write(&self.file, &record).map_err(|source| Error::State { path: self.file.clone(), source })?;
            inner.networks = record;
        }
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing between lock and unlock leaves a half-made value.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Replaces the file in one step: a crash leaves the old one or the new one.
fn write(file: &Path, record: &Record) -> io::Result<()> {
    let next = file.with_extension("json.new");
    let mut out = std::fs::File::create(&next)?;
    out.write_all(&serde_json::to_vec(record)?)?;
    out.sync_all()?;
    std::fs::rename(&next, file)?;
    if let Some(dir) = file.parent() {
        std::fs::File::open(dir)?.sync_all()?;
    }
    Ok(())
}
