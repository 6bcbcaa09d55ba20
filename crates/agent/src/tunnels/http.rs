//! Tunnels on the agent's socket: look, rekey, reset, capture.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::extract::{ConnectInfo, Path, State};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use model::agent_api::{TunnelStatus, path};
use model::api::ApiError;
use tokio::sync::{mpsc, oneshot};

use super::pcapng::{Way, Writer};
use super::{CAPTURED, Command, Input, Tunnels};
use crate::dataplane::{Captured, Direction};
use crate::socket::{Asker, Context, Refused};

/// How often it is looked whether someone still reads a capture.
const STILL_THERE: Duration = Duration::from_millis(200);

/// What the socket serves of tunnels.
pub(crate) fn routes() -> Router<Arc<Context>> {
    Router::new()
        .route(path::TUNNELS, get(list))
        .route(path::TUNNEL, get(one))
        .route(path::TUNNEL_REKEY, post(rekey))
        .route(path::TUNNEL_RESET, post(reset))
        .route(path::TUNNEL_CAPTURE, get(capture))
}

async fn list(State(context): State<Arc<Context>>) -> Result<Json<Vec<TunnelStatus>>, Refused> {
    Ok(Json(context.tunnels.list().await?))
}

async fn one(
    State(context): State<Arc<Context>>,
    Path(peer): Path<String>,
) -> Result<Json<TunnelStatus>, Refused> {
    let all = context.tunnels.list().await?;
    let names: Vec<String> = all.iter().map(|tunnel| tunnel.peer.to_string()).collect();
    let found = all.into_iter().find(|tunnel| tunnel.id == peer || tunnel.peer.as_str() == peer);
    Ok(Json(found.ok_or_else(|| super::unknown(&peer, &names))?))
}

async fn rekey(
    State(context): State<Arc<Context>>,
    ConnectInfo(who): ConnectInfo<Asker>,
    Path(peer): Path<String>,
) -> Result<StatusCode, Refused> {
    context.tunnels.rekey(peer, who.to_string()).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn reset(
    State(context): State<Arc<Context>>,
    ConnectInfo(who): ConnectInfo<Asker>,
    Path(peer): Path<String>,
) -> Result<StatusCode, Refused> {
    context.tunnels.reset(peer, who.to_string()).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn capture(
    State(context): State<Arc<Context>>,
    ConnectInfo(who): ConnectInfo<Asker>,
    Path(peer): Path<String>,
) -> Result<Response, Refused> {
    let chunks = context.tunnels.capture(peer, who.to_string()).await?;
    let chunks = futures_util::stream::unfold(chunks, async |mut chunks| {
        chunks.recv().await.map(|chunk| (Ok::<_, Infallible>(chunk), chunks))
    });
    Ok(([(header::CONTENT_TYPE, "application/x-pcapng")], Body::from_stream(chunks)).into_response())
}

impl Tunnels {
    /// The tunnel's inner packets as pcapng, until the receiver is dropped.
    async fn capture(&self, peer: String, who: String) -> Result<mpsc::Receiver<Bytes>, ApiError> {
        let (tap, packets) = std::sync::mpsc::sync_channel::<Captured>(CAPTURED);
        let (reply, answer) = oneshot::channel();
        self.send(Input::Command(Command::Capture { peer, who: who.clone(), tap, reply })).await?;
        let of = answer.await.map_err(|_| super::stopping())??;
        let (chunks, stream) = mpsc::channel(64);
        let inputs = self.inputs.clone();
        tokio::task::spawn_blocking(move || {
            let mut writer = Writer::default();
            let mut chunk = Writer::begin();
            loop {
                if chunks.blocking_send(Bytes::from(chunk)).is_err() {
                    break;
                }
                let captured = loop {
                    match packets.recv_timeout(STILL_THERE) {
                        Ok(captured) => break Some(captured),
                        Err(RecvTimeoutError::Timeout) if chunks.is_closed() => break None,
                        Err(RecvTimeoutError::Timeout) => {}
                        Err(RecvTimeoutError::Disconnected) => break None,
                    }
                };
                let Some(first) = captured else { break };
                // What has come meanwhile goes into the same chunk.
                chunk = Vec::new();
                for captured in std::iter::once(first).chain(packets.try_iter().take(CAPTURED)) {
                    let way = match captured.direction {
                        Direction::In => Way::In,
                        Direction::Out => Way::Out,
                    };
                    let name = || {
                        let known = of.networks.iter().find(|(device, _)| *device == captured.device);
                        known.map_or_else(|| "unknown".to_owned(), |(_, name)| name.clone())
                    };
                    let number = captured.device.0;
                    chunk.extend(writer.packet(number, name, captured.at, way, &captured.packet));
                }
            }
            tracing::info!(who, "the capture has ended");
            // An engine that has ended captures nothing.
            drop(inputs.send(Input::CaptureEnded(of.peer)));
        });
        Ok(stream)
    }
}
