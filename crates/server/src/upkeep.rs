//! What the server keeps about its own running, whatever it serves: limits, counts, the audit log, its certificate, and
//! whether it can do its work.

use std::convert::Infallible;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use model::api::Readiness;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};

use crate::app::{App, now};
use crate::audit::Audit;
use crate::limits::{Doors, Limits, Rates};
use crate::metrics::Metrics;
use crate::store::StoreError;
use crate::tls::ServerCertificate;

/// For how long a failure of the store is news, if nothing was stored since.
const LATELY: Duration = Duration::from_secs(15);
/// How often the disk is tried at most, however often somebody asks.
const TRY_EVERY: Duration = Duration::from_secs(5);
/// How long the store may take to answer.
const STORE_ANSWERS: Duration = Duration::from_secs(3);
/// How often a server looks whether the store that it shares answers, and how often in vain before it says so.
const LOOK: Duration = Duration::from_secs(1);
const IN_VAIN: u32 = 2;
/// How many may follow the audit log.
const FOLLOWERS: usize = 32;

/// See the module.
pub(crate) struct Upkeep {
    pub(crate) limits: Limits,
    pub(crate) rates: Rates,
    pub(crate) doors: Arc<Doors>,
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) audit: Audit,
    pub(crate) certificate: Arc<ServerCertificate>,
    pub(crate) followers: Arc<Semaphore>,
    directory: PathBuf,
    store_failed: Mutex<Option<(Instant, String)>>,
    disk: Mutex<Option<(Instant, Result<(), String>)>>,
}

impl Upkeep {
    /// In the data directory, where the store is, too, if it is a file.
    pub(crate) fn open(
        limits: Limits,
        directory: &Path,
        store: Option<&Path>,
        certificate: Arc<ServerCertificate>,
    ) -> io::Result<Self> {
        let beside = |path: &Path, end: &str| {
            let mut name = path.as_os_str().to_owned();
            name.push(end);
            PathBuf::from(name)
        };
        let store_files = store.map(|path| ["", "-wal"].map(|end| beside(path, end)).to_vec());
        let metrics = Arc::new(Metrics::of(store_files.unwrap_or_default()));
        Ok(Self {
            rates: Rates::new(limits.rate),
            doors: Arc::new(Doors::new(limits.clone(), metrics.clone())),
            limits,
            metrics,
            audit: Audit::open(directory)?,
            certificate,
            followers: Arc::new(Semaphore::new(FOLLOWERS)),
            directory: directory.to_owned(),
            store_failed: Mutex::default(),
            disk: Mutex::default(),
        })
    }

    /// The store was asked for a transaction.
    pub(crate) fn stored<T>(&self, begun: Instant, outcome: &Result<T, StoreError>) {
        self.metrics.stored(begun.elapsed(), outcome.is_ok());
        let failed = outcome.as_ref().err().map(|error| (Instant::now(), error.to_string()));
        *self.store_failed.lock().unwrap_or_else(PoisonError::into_inner) = failed;
    }

    fn store(&self) -> Result<(), String> {
        match &*self.store_failed.lock().unwrap_or_else(PoisonError::into_inner) {
            Some((at, why)) if at.elapsed() < LATELY => Err(why.clone()),
            Some(_) | None => Ok(()),
        }
    }

    /// Whether a file can be written where the store and the audit log are.
    fn disk(&self) -> Result<(), String> {
        let mut disk = self.disk.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, outcome)) = &*disk
            && at.elapsed() < TRY_EVERY
        {
            return outcome.clone();
        }
        let path = self.directory.join(".probe");
        let write = || {
            let mut file = std::fs::OpenOptions::new()
                .create(true)
                .write(true)
                .truncate(true)
                .mode(0o600)
                .open(&path)?;
            file.write_all(&[0; 8192])?;
            file.sync_all()
        };
        let outcome =
            write().map_err(|error: io::Error| format!("cannot write {}: {error}", self.directory.display()));
        // What could not be made need not be removed.
        let _ = std::fs::remove_file(&path);
        *disk = Some((Instant::now(), outcome.clone()));
        outcome
    }
}

/// Whether the server can do its work: its store answers and can be written, its state follows it, its CA is good.
pub(crate) async fn readiness(app: &Arc<App>) -> Readiness {
    let answers = answers(app).await;
    let blocking = app.clone();
    let disk = tokio::task::spawn_blocking(move || blocking.upkeep.disk()).await;
    let ca =
        if app.ca.expires() > now() { Ok(()) } else { Err("the CA's certificate has run out".to_owned()) };
    Readiness::of([
        ("store", answers.and_then(|()| app.upkeep.store())),
        ("disk", disk.unwrap_or_else(|error| Err(error.to_string()))),
        ("ca", ca),
    ])
}

/// Whether the store answers, and the state follows it.
async fn answers(app: &App) -> Result<(), String> {
    match timeout(STORE_ANSWERS, app.store.range(crate::keys::READINESS)).await {
        Ok(Ok((revision, _))) => {
            let mut revisions = app.shared.subscribe();
            let follows = timeout(STORE_ANSWERS, revisions.wait_for(|now| *now >= revision)).await;
            match follows {
                Ok(Ok(_)) => Ok(()),
                Ok(Err(_)) | Err(_) => {
                    Err(format!("the state does not follow the store to revision {revision}"))
                }
            }
        }
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("the store did not answer in {} s", STORE_ANSWERS.as_secs())),
    }
}

/// Notices, for ever, that a store which is shared does not answer this server: its agents are better off at another.
pub(crate) async fn look_after_store(app: &App) -> Infallible {
    if !app.shares_store {
        return std::future::pending().await;
    }
    let mut in_vain = 0;
    loop {
        tokio::time::sleep(LOOK).await;
        let why = answers(app).await.err();
        in_vain = if why.is_some() { in_vain + 1 } else { 0 };
        let severed = in_vain >= IN_VAIN;
        let changed = app.severed.send_if_modified(|was| std::mem::replace(was, severed) != severed);
        match why {
            Some(why) if changed => {
                tracing::error!("{why}; agents are sent to the other servers, if there are any");
            }
            None if changed => tracing::info!("the store answers again"),
            Some(_) | None => {}
        }
    }
}
