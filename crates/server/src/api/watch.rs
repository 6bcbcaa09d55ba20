//! The watch: one line of JSON per message, for as long as the agent listens, compressed if it takes gzip.
//!
//! Lines are made when the connection has room for them, from the state as it is then. Nothing queues for a slow reader:
//! it gets fewer and larger deltas, and one that is further behind than the server remembers is cut off, and begins anew.
//! One whose server is cut off from the store that it shares with others is cut off, too, and goes on at another.
//! A fast one gets a delta every [`PACE`] at most: what happens meanwhile comes together.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::HeaderMap;
use axum::http::header::{ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_TYPE};
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use model::api::{ApiError, ErrorCode};
use model::{Epoch, Revision, Watch};
use serde::Deserialize;
use tokio::sync::watch;
use tokio::time::Instant;

use super::extract::{Agent, Asked};
use super::{Reply, Shared, adopt, hosts, refuse};
use crate::app::App;
use crate::incarnation::Life;
use crate::lines::Piece;
use crate::presence::Watching;
use crate::state;
use crate::view::{Cursor, Step};

/// How often a quiet watch says that it lives.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// The least time between two deltas.
const PACE: Duration = Duration::from_millis(50);
/// How long a server may take to hear from its store of what an agent knows from another server.
const CATCH_UP: Duration = Duration::from_secs(3);

/// Where an agent left off.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
pub(super) struct Resume {
    /// The epoch it has.
    epoch: Option<Epoch>,
    /// The revision it has.
    revision: Option<Revision>,
}

/// What the agent's host should know: a snapshot, then deltas. An agent that says what it has gets the deltas since, from
/// any server of the environment; `compacted` if they are not remembered any more.
#[utoipa::path(get, path = "/v1/environments/{environment}/watch", tag = "agents",
    params(("environment" = String, Path), Resume),
    responses((status = 200, body = model::Watch, content_type = "application/x-ndjson"), (status = "default", body = ApiError)))]
pub(super) async fn watch(
    State(app): Shared,
    agent: Agent,
    headers: HeaderMap,
    Asked(resume): Asked<Resume>,
) -> Reply<Response> {
    app.read(&agent.environment, |env| adopt::has_reported(env, &agent))?;
    adopt::settled(&app, &agent.environment).await?;
    hosts::notice(&app, &agent).await?;
    let revisions = app.shared.subscribe();
    let from = match (resume.epoch, resume.revision) {
        (Some(epoch), Some(revision)) if epoch == app.store.epoch() => {
            known(&app, &agent, revision).await?;
            Some(revision)
        }
        _ => None,
    };
    let (cursor, pieces, urls) = {
        let state = app.shared.read();
        let (cursor, pieces) = match from {
            Some(from) => resumed(&agent, &state, from)?,
            None => fresh(&app, &agent, &state)?,
        };
        (cursor, pieces, urls_of(&state, &agent))
    };
    tracing::info!(environment = %agent.environment, host = %agent.name, revision = %cursor.at, "watch begins");
    let gzip = takes_gzip(&headers);
    let (stopping, severed) = (app.stopping.subscribe(), app.severed.subscribe());
    if *severed.borrow() && has_others(&urls) {
        return Err(
            refuse(ErrorCode::Unavailable, "the store does not answer this server; ask another one").into()
        );
    }
    if *stopping.borrow() {
        return Err(refuse(ErrorCode::Unavailable, "the server is stopping; ask again").into());
    }
    let mut open = Open {
        stopping,
        severed,
        watching: app.presence.watch(&agent.host, agent.incarnation.clone()),
        asked: false,
        beat: Instant::now() + HEARTBEAT,
        pace: Instant::now(),
        ready: VecDeque::new(),
        urls: Vec::new(),
        gzip,
        revisions,
        cursor,
        agent,
        app,
    };
    open.tell_urls(urls);
    open.ready.extend(pieces.into_iter().map(|piece| piece.bytes(gzip)));
    let lines = stream::unfold(open, |mut open| async {
        let bytes = open.next().await?;
        Some((Ok::<_, Infallible>(bytes), open))
    });
    let mut response = ([(CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response();
    if gzip {
        response.headers_mut().insert(CONTENT_ENCODING, axum::http::HeaderValue::from_static("gzip"));
    }
    Ok(response)
}

/// Waits until this server has heard of the revision.
async fn known(app: &App, agent: &Agent, revision: Revision) -> Result<(), ApiError> {
    let mut revisions = app.shared.subscribe();
    let reached = tokio::time::timeout(CATCH_UP, revisions.wait_for(|now| *now >= revision)).await;
    if matches!(reached, Ok(Ok(_))) {
        return Ok(());
    }
    let now = app.shared.read().revision;
    tracing::error!(host = %agent.name, asked = %revision, %now, "an agent knows a revision that the store never had: the \
        store was put back by hand; use `droveway server restore`, which begins a new epoch");
    let message = format!(
        "revision {revision} is not known here: this server's store is at {now}; if it was put back from a copy, put it \
         back with `droveway server restore`"
    );
    Err(refuse(ErrorCode::Conflict, message))
}

/// Goes on after a revision.
fn resumed(
    agent: &Agent,
    state: &state::State,
    from: Revision,
) -> Result<(Cursor, Vec<Arc<Piece>>), ApiError> {
    if Cursor::new(state, &agent.environment, &agent.host).is_none() {
        return Err(removed(agent));
    }
    let resumed = Cursor::resume(state, &agent.environment, &agent.host, from);
    let (cursor, step) = resumed.ok_or_else(|| {
        let message =
            format!("changes since revision {from} are not remembered any more; ask for a snapshot");
        refuse(ErrorCode::Compacted, message)
    })?;
    let changes = match &step {
        Step::Delta(touched) => cursor.changes(state, touched),
        Step::Nothing | Step::Gone | Step::Lost => Vec::new(),
    };
    let line = Piece::line(&Watch::Delta { revision: cursor.at, changes });
    Ok((cursor, vec![Arc::new(line.map_err(|error| App::fault(&error))?)]))
}

/// Begins with a snapshot.
fn fresh(app: &App, agent: &Agent, state: &state::State) -> Result<(Cursor, Vec<Arc<Piece>>), ApiError> {
    let cursor = Cursor::new(state, &agent.environment, &agent.host).ok_or_else(|| removed(agent))?;
    let fault = |error: serde_json::Error| App::fault(&error);
    let write = || Piece::json(&cursor.snapshot(state));
    let objects = match cursor.scope(state) {
        Some(scope) => app.lines.snapshot(cursor.at, scope, write).map_err(fault)?,
        None => Arc::new(write().map_err(fault)?),
    };
    let head = Watch::Snapshot {
        epoch: app.store.epoch(),
        revision: cursor.at,
        environment: agent.environment.clone(),
        host: agent.host.clone(),
        domain: app.domain.clone(),
        objects: Vec::new(),
    };
    // The objects are the last field: the line is written around them.
    let mut head = serde_json::to_vec(&head).map_err(fault)?;
    let tail = b"[]}";
    if !head.ends_with(tail) {
        return Err(refuse(
            ErrorCode::Internal,
            "a fault of the server: a snapshot does not end with its objects",
        ));
    }
    head.truncate(head.len() - tail.len());
    Ok((cursor, vec![Arc::new(Piece::new(head)), objects, Arc::new(Piece::new(b"}\n".to_vec()))]))
}

fn removed(agent: &Agent) -> ApiError {
    refuse(ErrorCode::Unauthenticated, format!("{agent} was removed; join again with a token"))
}

fn urls_of(state: &state::State, agent: &Agent) -> Vec<String> {
    state.environments.get(&agent.environment).map(state::Environment::server_urls).unwrap_or_default()
}

/// Whether there is another server to go to.
fn has_others(urls: &[String]) -> bool {
    urls.len() > 1
}

fn takes_gzip(headers: &HeaderMap) -> bool {
    let accepted = headers.get_all(ACCEPT_ENCODING).into_iter().filter_map(|value| value.to_str().ok());
    accepted.flat_map(|value| value.split(',')).any(|coding| {
        let mut parts = coding.split(';').map(str::trim);
        parts.next() == Some("gzip")
            && !parts.any(|weight| weight.strip_prefix("q=").is_some_and(|q| q.parse() == Ok(0.0)))
    })
}

/// A watch that is open.
struct Open {
    app: Arc<App>,
    agent: Agent,
    cursor: Cursor,
    /// What is to be sent next.
    ready: VecDeque<Bytes>,
    /// The servers' URLs that the agent was told.
    urls: Vec<String>,
    /// Whether the agent was asked to show that it lives.
    asked: bool,
    gzip: bool,
    revisions: watch::Receiver<Revision>,
    stopping: watch::Receiver<bool>,
    severed: watch::Receiver<bool>,
    beat: Instant,
    /// No delta before this.
    pace: Instant,
    watching: Watching,
}

impl Open {
    async fn next(&mut self) -> Option<Bytes> {
        while self.ready.is_empty() {
            self.message().await?;
        }
        self.beat = Instant::now() + HEARTBEAT;
        self.watching.saw();
        self.ready.pop_front()
    }

    /// Makes the next message, or ends the watch.
    async fn message(&mut self) -> Option<()> {
        loop {
            tokio::time::sleep_until(self.pace).await;
            self.revisions.borrow_and_update();
            let (line, urls, contested) = {
                let state = self.app.shared.read();
                let life = self.life(&state);
                if life.is_some_and(|life| Some(&life.current) != self.agent.incarnation.as_ref()) {
                    return None;
                }
                let contested = life.is_some_and(|life| life.contested);
                let line = match self.cursor.advance(&state) {
                    Step::Delta(touched) => {
                        let write = || {
                            let changes = self.cursor.changes(&state, &touched);
                            Piece::line(&Watch::Delta { revision: self.cursor.at, changes })
                        };
                        let line = if self.cursor.is_common(&state, &touched) {
                            self.app.lines.delta(self.cursor.at, &touched, write)
                        } else {
                            write().map(Arc::new)
                        };
                        Some(line.map_err(|error| App::fault(&error)).ok()?)
                    }
                    Step::Gone | Step::Lost => return None,
                    Step::Nothing => None,
                };
                (line, urls_of(&state, &self.agent), contested)
            };
            // Here nothing is heard any more, and nothing can be changed.
            if *self.severed.borrow_and_update() && has_others(&urls) {
                return None;
            }
            self.tell_urls(urls);
            self.ask(contested);
            if let Some(line) = line {
                self.ready.push_back(line.bytes(self.gzip));
                self.pace = Instant::now() + PACE;
            }
            if !self.ready.is_empty() {
                return Some(());
            }
            tokio::select! {
                changed = self.revisions.changed() => changed.ok()?,
                _ = self.stopping.changed() => return None,
                changed = self.severed.changed() => changed.ok()?,
                () = tokio::time::sleep_until(self.beat) => {}
            }
            if Instant::now() >= self.beat {
                self.app.lines.forget_old();
                return self.push(&Watch::Heartbeat { revision: self.cursor.at });
            }
        }
    }

    /// Which life of the host's ledger counts.
    fn life<'a>(&self, state: &'a state::State) -> Option<&'a Life> {
        state.environments.get(&self.agent.environment)?.lives.get(&self.agent.host)
    }

    /// Asks the agent to prove that it lives, once for each time that another comes.
    fn ask(&mut self, contested: bool) {
        if contested && !self.asked {
            self.push(&Watch::Prove);
        }
        self.asked = contested;
    }

    /// Tells how the servers are reached, if that is news.
    fn tell_urls(&mut self, urls: Vec<String>) {
        if urls != self.urls {
            self.urls.clone_from(&urls);
            self.push(&Watch::Servers { urls });
        }
    }

    fn push(&mut self, message: &Watch) -> Option<()> {
        let line = Piece::line(message).map_err(|error| App::fault(&error)).ok()?;
        self.ready.push_back(line.bytes(self.gzip));
        Some(())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        tracing::info!(environment = %self.agent.environment, host = %self.agent.name, "watch ended");
    }
}
