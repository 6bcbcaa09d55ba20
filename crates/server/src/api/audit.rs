//! The audit log, read: what this server was asked to change.

use std::io;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use futures_util::stream;
use model::UnixMillis;
use model::api::{ApiError, AuditEntry, ErrorCode};
use serde::Deserialize;
use tokio::sync::{OwnedSemaphorePermit, watch};

use super::extract::{Asked, Person};
use super::{Reply, Shared, refuse};
use crate::audit::Reader;

/// Which lines.
#[derive(Debug, Deserialize, utoipa::IntoParams)]
pub(super) struct Which {
    /// None that are older: milliseconds since 1970.
    #[serde(default)]
    since: UnixMillis,
    /// Whether to go on with what comes, until the connection is closed.
    #[serde(default)]
    follow: bool,
}

/// Lines of the audit log, the oldest first. It is this server's: where there are several, each has its own.
#[utoipa::path(get, path = "/v1/environments/{environment}/audit", tag = "server",
    params(("environment" = String, Path), Which),
    responses((status = 200, body = AuditEntry, content_type = "application/x-ndjson"), (status = "default", body = ApiError)))]
pub(super) async fn list(State(app): Shared, _: Person, Asked(which): Asked<Which>) -> Reply<Response> {
    let place = app.upkeep.followers.clone().try_acquire_owned().map_err(|_| {
        let message = "too many read the audit log at this moment; end one of them, or try again";
        ApiError { retry_after: Some(5), ..refuse(ErrorCode::TooMany, message) }
    })?;
    let open = Open {
        reader: Some(app.upkeep.audit.reader(which.since)),
        follow: which.follow,
        stopping: app.stopping.subscribe(),
        _place: Arc::new(place),
    };
    let lines = stream::unfold(open, |mut open| async {
        let lines = open.next().await?;
        Some((lines, open))
    });
    Ok(([(CONTENT_TYPE, "application/x-ndjson")], Body::from_stream(lines)).into_response())
}

struct Open {
    reader: Option<Reader>,
    follow: bool,
    stopping: watch::Receiver<bool>,
    _place: Arc<OwnedSemaphorePermit>,
}

impl Open {
    async fn next(&mut self) -> Option<io::Result<Bytes>> {
        loop {
            let mut reader = self.reader.take()?;
            let read = tokio::task::spawn_blocking(move || {
                let lines = reader.read();
                (reader, lines)
            });
            let (mut reader, lines) = match read.await {
                Ok((reader, Ok(lines))) => (reader, lines),
                Ok((_, Err(error))) => {
                    tracing::error!(%error, "the audit log cannot be read");
                    return Some(Err(error));
                }
                Err(error) => return Some(Err(io::Error::other(error))),
            };
            if !lines.is_empty() {
                self.reader = Some(reader);
                return Some(Ok(lines.into()));
            }
            if !self.follow {
                return None;
            }
            let more = tokio::select! {
                more = reader.more() => more,
                _ = self.stopping.wait_for(|stopping| *stopping) => false,
            };
            if !more {
                return None;
            }
            self.reader = Some(reader);
        }
    }
}
