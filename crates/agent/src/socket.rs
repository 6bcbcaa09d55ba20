//! The agent's Unix socket: attach, detach, look, tunnels (`model::agent_api`).

use std::fmt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::connect_info::Connected;
use axum::extract::{DefaultBodyLimit, Path as UrlPath, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get};
use axum::serve::IncomingStream;
use axum::{Json, Router};
use model::agent_api::{AgentStatus, AttachRequest, Connection, DockerStatus, path};
use model::api::{ApiError, ErrorCode};
use model::{EndpointId, UnixMillis, agent_api};
use tokio::net::UnixListener;
use tokio::net::unix::UCred;
use tokio::sync::watch;

use crate::counts::Counts;
use crate::doctor::Books;
use crate::ledger::Identity;
use crate::names::Forwarder;
use crate::server::Server;
use crate::tunnels::Tunnels;
use crate::{Control, VERSION, metrics, names, renew, tunnels};

/// What the socket tells besides what control knows.
#[derive(Clone)]
pub(crate) struct Context {
    pub(crate) control: Control,
    pub(crate) server: Server,
    pub(crate) connection: watch::Receiver<Connection>,
    pub(crate) candidates: watch::Receiver<Vec<model::Candidate>>,
    pub(crate) docker: watch::Receiver<DockerStatus>,
    pub(crate) tunnels: Tunnels,
    pub(crate) identity: watch::Receiver<Identity>,
    pub(crate) counts: Arc<Counts>,
    pub(crate) forwarder: Arc<Forwarder>,
    /// The ledger's file.
    pub(crate) ledger: PathBuf,
}

impl Context {
    /// When this host's certificate runs out.
    pub(crate) fn certificate_expires(&self) -> UnixMillis {
        renew::expires(&self.identity.borrow())
    }
}

/// The process at the other end of a connection, as the kernel has it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Asker(Option<UCred>);

impl Connected<IncomingStream<'_, UnixListener>> for Asker {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        Self(stream.io().peer_cred().ok())
    }
}

impl fmt::Display for Asker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.map(|it| (it.uid(), it.pid())) {
            Some((uid, Some(pid))) => write!(f, "uid {uid} (process {pid})"),
            Some((uid, None)) => write!(f, "uid {uid}"),
            None => f.write_str("somebody"),
        }
    }
}

/// Makes the socket at `path`, mode 0600; one that a killed agent left behind is replaced.
pub fn listen(path: &Path) -> std::io::Result<UnixListener> {
    if let Some(directory) = path.parent() {
        std::fs::create_dir_all(directory)?;
    }
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        return Err(std::io::Error::new(
            std::io::ErrorKind::AddrInUse,
            format!("another process listens on {}; stop it, or choose another path", path.display()),
        ));
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// Serves the socket until dropped.
pub(crate) async fn serve(listener: UnixListener, context: Context) -> std::io::Result<()> {
    let routes = Router::new()
        .route(path::STATUS, get(status))
        .route(path::ENDPOINTS, get(list).post(attach))
        .route(path::ENDPOINT, delete(detach))
        .route(path::BOOKS, get(books))
        .merge(tunnels::http::routes())
        .merge(metrics::routes())
        .fallback(|| async {
            Refused(ApiError::new(
                ErrorCode::NotFound,
                "there is nothing at this path; see docs/agent-socket.md",
            ))
        })
        .method_not_allowed_fallback(|| async {
            Refused(ApiError::new(
                ErrorCode::Invalid,
                "this path does not know that method; see docs/agent-socket.md",
            ))
        })
        .layer(DefaultBodyLimit::max(agent_api::BODY_MAX))
        .layer(tower_http::timeout::TimeoutLayer::with_status_code(
            StatusCode::REQUEST_TIMEOUT,
            Duration::from_secs(60),
        ))
        .with_state(Arc::new(context));
    axum::serve(listener, routes.into_make_service_with_connect_info::<Asker>()).await
}

pub(crate) struct Refused(ApiError);

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, Json(self.0)).into_response()
    }
}

impl From<ApiError> for Refused {
    fn from(error: ApiError) -> Self {
        Self(error)
    }
}

async fn status(State(context): State<Arc<Context>>) -> Json<AgentStatus> {
    let view = context.control.view();
    Json(AgentStatus {
        version: VERSION.to_owned(),
        host: view.host.clone(),
        name: view.host_name.clone(),
        server: context.server.url(),
        connection: context.connection.borrow().clone(),
        epoch: view.epoch.clone(),
        revision: view.revision,
        candidates: context.candidates.borrow().clone(),
        certificate_expires: context.certificate_expires(),
        routers: view.router_status(),
        docker: context.docker.borrow().clone(),
        troubles: view.troubles.clone(),
    })
}

async fn books(State(context): State<Arc<Context>>) -> Result<Json<Books>, Refused> {
    let engine = !matches!(*context.docker.borrow(), DockerStatus::Off);
    Ok(Json(Books { engine, ..context.control.books().await? }))
}

async fn list(State(context): State<Arc<Context>>) -> Result<Json<Vec<model::Endpoint>>, Refused> {
    let endpoints = context.control.list().await?;
    Ok(Json(endpoints.into_iter().map(|local| local.endpoint).collect()))
}

async fn attach(
    State(context): State<Arc<Context>>,
    body: Result<Bytes, axum::extract::rejection::BytesRejection>,
) -> Result<Json<agent_api::Attached>, Refused> {
    let body = body.map_err(|_| {
        let message = format!("the body is larger than {} bytes, or broke off", agent_api::BODY_MAX);
        ApiError::new(ErrorCode::TooLarge, message)
    })?;
    let request: AttachRequest = serde_json::from_slice(&body).map_err(|error| {
        ApiError::new(ErrorCode::Invalid, format!("the body is no attach request: {error}"))
    })?;
    let mut attached = context.control.attach(request).await?;
    let view = context.control.view();
    let host = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    attached.resolv_conf = names::resolv_conf(&view, &attached.endpoint, &names::Resolv::parse(&host).search);
    Ok(Json(attached))
}

async fn detach(
    State(context): State<Arc<Context>>,
    UrlPath(id): UrlPath<String>,
) -> Result<StatusCode, Refused> {
    let id: EndpointId =
        id.parse().map_err(|e: model::InvalidId| ApiError::new(ErrorCode::Invalid, e.to_string()))?;
    context.control.detach(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}
