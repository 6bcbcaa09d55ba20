//! The watch: one line of JSON per message, for as long as the agent listens.
//!
//! Lines are made when the connection has room for them, from the state as it is then. Nothing queues for a slow reader.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use model::api::{ApiError, ErrorCode};
use model::{Epoch, Revision, Watch};
use serde::Deserialize;
use tokio::sync::watch;
use tokio::time::Instant;

use super::extract::{Agent, Asked};
use super::{Reply, Shared, hosts, refuse};
use crate::app::{App, Watching};
use crate::view::{Cursor, Step};

/// How often a quiet watch says that it lives.
const HEARTBEAT: Duration = Duration::from_secs(10);

/// Where an agent left off.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
pub(super) struct Resume {
    /// The epoch it has.
    epoch: Option<Epoch>,
    /// The revision it has.
    revision: Option<Revision>,
}

/// What the agent's host should know: a snapshot, then deltas. An agent that has the newest state gets an empty delta
/// in place of the snapshot.
#[utoipa::path(get, path = "/v1/environments/{environment}/watch", tag = "agents",
    params(("environment" = String, Path), Resume),
    responses((status = 200, body = model::Watch, content_type = "application/x-ndjson"), (status = "default", body = ApiError)))]
pub(super) async fn watch(State(app): Shared, agent: Agent, Asked(resume): Asked<Resume>) -> Reply<Response> {
    hosts::notice(&app, &agent).await?;
    let revisions = app.shared.subscribe();
    let epoch = app.store.epoch();
    let (cursor, first) = {
        let state = app.shared.read();
        let gone =
            || refuse(ErrorCode::Unauthenticated, format!("{agent} was removed; join again with a token"));
        let cursor = Cursor::new(&state, &agent.environment, &agent.host).ok_or_else(gone)?;
        let current = resume.epoch.as_ref() == Some(&epoch) && resume.revision == Some(state.revision);
        let first = if current {
            Watch::Delta { revision: state.revision, changes: Vec::new() }
        } else {
            Watch::Snapshot {
                epoch,
                revision: state.revision,
                environment: agent.environment.clone(),
                host: agent.host.clone(),
                domain: app.domain.clone(),
                objects: cursor.snapshot(&state),
            }
        };
        (cursor, first)
    };
    tracing::info!(environment = %agent.environment, host = %agent.name, revision = %cursor.at, "watch begins");
    let open = Open {
        stopping: app.stopping.subscribe(),
        watching: app.presence.watch(&agent.host),
        beat: Instant::now() + HEARTBEAT,
        first: Some(first),
        revisions,
        cursor,
        agent,
        app,
    };
    let lines = stream::unfold(open, |mut open| async {
        let line = open.next().await?;
        Some((Ok::<_, Infallible>(line), open))
    });
    Ok(([(CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response())
}

/// A watch that is open.
struct Open {
    app: Arc<App>,
    agent: Agent,
    cursor: Cursor,
    first: Option<Watch>,
    revisions: watch::Receiver<Revision>,
    stopping: watch::Receiver<bool>,
    beat: Instant,
    watching: Watching,
}

impl Open {
    async fn next(&mut self) -> Option<Bytes> {
        let message = match self.first.take() {
            Some(first) => first,
            None => self.message().await?,
        };
        self.beat = Instant::now() + HEARTBEAT;
        self.watching.saw();
        match serde_json::to_vec(&message) {
            Ok(mut line) => {
                line.push(b'\n');
                Some(line.into())
            }
            Err(error) => {
                tracing::error!(%error, "a watch message cannot be written as JSON");
                None
            }
        }
    }

    async fn message(&mut self) -> Option<Watch> {
        loop {
            self.revisions.borrow_and_update();
            let step = self.cursor.advance(&self.app.shared.read());
            match step {
                Step::Delta(changes) => return Some(Watch::Delta { revision: self.cursor.at, changes }),
                Step::Gone | Step::Lost => return None,
                Step::Nothing => {}
            }
            tokio::select! {
                changed = self.revisions.changed() => changed.ok()?,
                _ = self.stopping.wait_for(|stopping| *stopping) => return None,
                () = tokio::time::sleep_until(self.beat) => {
                    return Some(Watch::Heartbeat { revision: self.cursor.at });
                }
            }
        }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        tracing::info!(environment = %self.agent.environment, host = %self.agent.name, "watch ended");
    }
}
