//! What all requests share, and the one way in which they change the state.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use model::api::{ApiError, ErrorCode};
use model::{EnvironmentId, Revision, UnixMillis};
use serde::Serialize;
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;

use crate::ca::Ca;
use crate::feed::Shared;
use crate::keys;
use crate::lines::Lines;
use crate::outbox::Outbox;
use crate::presence::Presence;
use crate::request;
use crate::state::Environment;
use crate::store::{Op, Store, StoreError, Txn};
use crate::upkeep::Upkeep;

/// How often a change is planned anew when something else changed at the same time.
const ATTEMPTS: usize = 100;
/// How many bodies of people without credentials are read at a time.
const STRANGERS: usize = 32;
/// How long the state in memory may need to follow the store.
const FOLLOW: Duration = Duration::from_secs(10);

/// What all requests share.
pub(crate) struct App {
    pub(crate) store: Arc<dyn Store>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) ca: Ca,
    pub(crate) domain: String,
    /// For how long addresses are retained for containers that are gone.
    pub(crate) retain: Duration,
    /// What tells this server from others that share its store.
    pub(crate) name: String,
    /// Whether there may be others.
    pub(crate) shares_store: bool,
    pub(crate) presence: Arc<Presence>,
    pub(crate) stopping: watch::Sender<bool>,
    /// Whether the store that this server shares has not answered it for a while.
    pub(crate) severed: watch::Sender<bool>,
    pub(crate) started: tokio::time::Instant,
    /// Held while planning and doing changes that others of this server would make fail. It saves attempts; what keeps
    /// the state right, with other servers too, are the compares.
    pub(crate) turn: tokio::sync::Mutex<()>,
    /// How many bodies of strangers may be read at the same time.
    pub(crate) strangers: Semaphore,
    pub(crate) upkeep: Upkeep,
    /// Changes on their way into the audit log.
    pub(crate) outbox: Outbox,
    /// What watches are told, written once for all.
    pub(crate) lines: Lines,
    /// The API's description, once somebody asked for it.
    pub(crate) description: OnceLock<String>,
}

/// What a change would do, and its answer.
pub(crate) enum Plan<T> {
    /// It is so already.
    Nothing(T),
    /// This.
    Commit(Txn, T),
}

impl App {
    pub(crate) fn new(
        store: Arc<dyn Store>,
        shared: Arc<Shared>,
        ca: Ca,
        (domain, retain): (String, Duration),
        (name, shares_store): (String, bool),
        upkeep: Upkeep,
        outbox: Outbox,
    ) -> Self {
        Self {
            store,
            shared,
            ca,
            domain,
            retain,
            name,
            shares_store,
            presence: Arc::default(),
            stopping: watch::Sender::new(false),
            severed: watch::Sender::new(false),
            started: tokio::time::Instant::now(),
            turn: tokio::sync::Mutex::new(()),
            strangers: Semaphore::new(STRANGERS),
            upkeep,
            outbox,
            lines: Lines::default(),
            description: OnceLock::new(),
        }
    }

    /// Reads an environment as it is now.
    pub(crate) fn read<T>(
        &self,
        environment: &EnvironmentId,
        read: impl FnOnce(&Environment) -> Result<T, ApiError>,
    ) -> Result<T, ApiError> {
        let state = self.shared.read();
        read(state.environments.get(environment).ok_or_else(|| no_environment(environment.as_str()))?)
    }

    /// Plans a change on the state as it is, does it if nothing it compares has changed meanwhile, and plans anew
    /// otherwise. Who asked for it is written down with it. When it answers, the state in memory has the change, too.
    pub(crate) async fn change<T>(
        &self,
        environment: &EnvironmentId,
        plan: impl Fn(&Environment, Revision) -> Result<Plan<T>, ApiError>,
    ) -> Result<(T, Revision), ApiError> {
        for _ in 0..ATTEMPTS {
            let (txn, answer, taking) = {
                let state = self.shared.read();
                let env = state.environments.get(environment);
                let env = env.ok_or_else(|| no_environment(environment.as_str()))?;
                match plan(env, state.revision)? {
                    Plan::Nothing(answer) => return Ok((answer, state.revision)),
                    Plan::Commit(mut txn, answer) => {
                        let taking = self.outbox.enclose(environment, env, &mut txn)?;
                        (txn, answer, taking)
                    }
                }
            };
            let changes = !txn.success.is_empty();
            let begun = Instant::now();
            let outcome = self.store.txn(txn).await;
            self.upkeep.stored(begun, &outcome);
            let outcome = outcome.map_err(|error| store_fault(&error))?;
            if outcome.succeeded && changes {
                request::made(outcome.revision);
            }
            self.reach(outcome.revision).await?;
            drop(taking);
            if outcome.succeeded {
                return Ok((answer, outcome.revision));
            }
        }
        Err(ApiError::new(ErrorCode::Unavailable, "too many changes at the same time; try again"))
    }

    /// A value that cannot be written as JSON.
    pub(crate) fn fault(error: &serde_json::Error) -> ApiError {
        tracing::error!(%error, "a value cannot be written as JSON");
        ApiError::new(ErrorCode::Internal, "a fault of the server; look at its log")
    }

    /// Waits until the state in memory is that of `revision` or a later one.
    async fn reach(&self, revision: Revision) -> Result<(), ApiError> {
        let mut revisions = self.shared.subscribe();
        let reached = tokio::time::timeout(FOLLOW, revisions.wait_for(|now| *now >= revision)).await;
        match reached {
            Ok(Ok(_)) => Ok(()),
            _ => Err(ApiError::new(
                ErrorCode::Unavailable,
                "the change is stored, but the server does not follow its store; look at its log",
            )),
        }
    }
}

/// An operation that puts a value.
pub(crate) fn put(key: String, value: &impl Serialize) -> Result<Op, ApiError> {
    keys::put(key, value).map_err(|error| App::fault(&error))
}

/// There is no such environment.
pub(crate) fn no_environment(name: &str) -> ApiError {
    ApiError::new(ErrorCode::NotFound, format!("no environment {name:?}; there is \"default\""))
}

fn store_fault(error: &StoreError) -> ApiError {
    tracing::error!(%error, "a transaction failed");
    let message = match error {
        StoreError::Io(_) => format!("nothing was changed: {error}"),
        StoreError::Compacted { .. }
        | StoreError::Lagged
        | StoreError::DuplicateKey(_)
        | StoreError::Unreachable(_)
        | StoreError::Unknown(_)
        | StoreError::Refused(_)
        | StoreError::Closed(_) => error.to_string(),
    };
    ApiError::new(ErrorCode::Unavailable, message)
}

/// The time.
pub(crate) fn now() -> UnixMillis {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as UnixMillis)
}
