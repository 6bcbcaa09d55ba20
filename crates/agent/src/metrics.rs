//! The agent's metrics as text ([`model::exposition`]), whether it is well, and the port where both can be asked for.
//!
//! The port is opened only where `--metrics` says so. It is HTTP without TLS and tells nothing secret; it changes nothing.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use model::agent_api::{Connection, DockerStatus, path};
use model::api::Readiness;
use model::exposition::{CONTENT_TYPE, Exposition, Kind, Value};
use tokio::net::TcpListener;
use tokio::time::timeout;

use crate::accept::accept;
use crate::names::Budget;
use crate::socket::{Context, Refused};
use crate::{VERSION, now_millis};

/// Connections, in all and for one asker.
const CONNECTIONS: (usize, usize) = (64, 16);
/// How long a request's head may take.
const HEAD: Duration = Duration::from_secs(10);
/// How long one connection may last.
const LIFE: Duration = Duration::from_mins(5);
/// How long the reconciler may take to answer.
const ANSWERS: Duration = Duration::from_secs(5);

/// What the socket, and the port if there is one, serve of this.
pub(crate) fn routes() -> Router<Arc<Context>> {
    Router::new()
        .route(path::METRICS, get(metrics))
        .route(path::HEALTH, get(|| async { "ok\n" }))
        .route(path::READY, get(ready))
}

/// Serves the port for as long as it is polled.
pub(crate) async fn serve(listener: TcpListener, context: Context) {
    let service = TowerToHyperService::new(routes().with_state(Arc::new(context)));
    let budget = Budget::new(CONNECTIONS.0, CONNECTIONS.1);
    loop {
        let (stream, from) = accept("metrics", || listener.accept()).await;
        let Some(permit) = budget.take(from.ip().to_canonical()) else { continue };
        let connection = hyper::server::conn::http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD)
            .serve_connection(TokioIo::new(stream), service.clone());
        tokio::spawn(async move {
            // Whoever asks badly or stays too long is not answered.
            drop(timeout(LIFE, connection).await);
            drop(permit);
        });
    }
}

async fn metrics(State(context): State<Arc<Context>>) -> Result<Response, Refused> {
    let mut out = Exposition::default();
    own(&context, &mut out);
    out.append(&context.tunnels.metrics().await?);
    Ok(([(header::CONTENT_TYPE, CONTENT_TYPE)], out.finish()).into_response())
}

async fn ready(State(context): State<Arc<Context>>) -> (StatusCode, Json<Readiness>) {
    let reconciler = match timeout(ANSWERS, context.control.list()).await {
        Ok(Ok(_)) => Ok(()),
        Ok(Err(error)) => Err(error.message),
        Err(_) => Err(format!("the reconciler did not answer in {} s", ANSWERS.as_secs())),
    };
    let view = context.control.view();
    let behind = view.routers.values().filter(|router| !router.converged).map(|router| router.netns.as_str());
    let behind: Vec<&str> = behind.collect();
    let kernel = if behind.is_empty() {
        Ok(())
    } else {
        Err(format!(
            "the kernel does not show all that should be in {}; `droveway status`",
            behind.join(", ")
        ))
    };
    let snapshot =
        view.epoch.as_ref().map(drop).ok_or_else(|| "no snapshot has come from the server yet".to_owned());
    let ledger = context.control.takes().await.map_err(|error| error.message);
    let readiness = Readiness::of([
        ("reconciler", reconciler),
        ("kernel", kernel),
        ("snapshot", snapshot),
        ("ledger", ledger),
    ]);
    let status = if readiness.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(readiness))
}

/// All but the tunnels.
fn own(context: &Context, out: &mut Exposition) {
    let (counts, view) = (&context.counts, context.control.view());
    let count = |count: u64| Value::Count(count);
    out.family("droveway_build_info", Kind::Gauge, "1, with the version of the program.");
    out.sample("droveway_build_info", &[("version", VERSION)], count(1));

    let name = "droveway_reconcile_duration_seconds";
    out.family(name, Kind::Histogram, "How long it took to make the kernel what it should be.");
    out.histogram(name, &[], &counts.reconcile_durations());
    let failures = count(counts.reconcile_failures.load(Ordering::Relaxed));
    let help = "Times that the kernel could not be made what it should be.";
    out.single("droveway_reconcile_failures_total", Kind::Counter, help, failures);
    let routers = view.routers.len();
    let converged = view.routers.values().filter(|router| router.converged).count();
    out.family(
        "droveway_routers",
        Kind::Gauge,
        "Routers, by whether the kernel shows all that should be there.",
    );
    for (state, routers) in [("converged", converged), ("behind", routers - converged)] {
        out.sample("droveway_routers", &[("state", state)], count(routers as u64));
    }
    out.family("droveway_local_endpoints", Kind::Gauge, "Endpoints of this host, by network.");
    for (id, network) in &view.catalog.networks {
        let here = view.local.values().filter(|endpoint| endpoint.network == *id).count();
        out.sample("droveway_local_endpoints", &[("network", network.name.as_str())], count(here as u64));
    }

    let connected = matches!(*context.connection.borrow(), Connection::Up { .. });
    out.single(
        "droveway_connected",
        Kind::Gauge,
        "1 while the watch of the server is open.",
        count(connected.into()),
    );
    let help = "The state's number, as last heard.";
    out.single("droveway_watch_revision", Kind::Gauge, help, count(view.revision.0));
    let messages = count(counts.watch_messages.load(Ordering::Relaxed));
    out.single(
        "droveway_watch_messages_total",
        Kind::Counter,
        "Messages of the watch, heartbeats too.",
        messages,
    );
    let heard = counts.heard.load(Ordering::Relaxed);
    if heard > 0 {
        let silent = Value::Real(Duration::from_millis(now_millis().saturating_sub(heard)).as_secs_f64());
        let help = "How long the watch has said nothing; it does so every ten seconds at least.";
        out.single("droveway_watch_silence_seconds", Kind::Gauge, help, silent);
    }
    let help = "When this host's certificate runs out, in seconds since 1970.";
    out.family("droveway_certificate_expiry_timestamp_seconds", Kind::Gauge, help);
    let expires = context.certificate_expires() / 1000;
    out.sample("droveway_certificate_expiry_timestamp_seconds", &[("certificate", "host")], count(expires));

    out.family("droveway_dns_queries_total", Kind::Counter, "Queries of containers, by what became of them.");
    for (outcome, queries) in context.forwarder.queries() {
        out.sample("droveway_dns_queries_total", &[("outcome", outcome)], count(queries));
    }
    let docker = match &*context.docker.borrow() {
        DockerStatus::Off => None,
        DockerStatus::Waiting { .. } => Some(0),
        DockerStatus::Up { .. } => Some(1),
    };
    if let Some(up) = docker {
        out.single("droveway_docker_up", Kind::Gauge, "1 while Docker's engine is followed.", count(up));
    }
    let events = count(counts.docker_events.load(Ordering::Relaxed));
    out.single(
        "droveway_docker_events_total",
        Kind::Counter,
        "Events of Docker's engine that were taken in.",
        events,
    );
    let sizes =
        files(&context.ledger).into_iter().filter_map(|path| Some(std::fs::metadata(path).ok()?.len()));
    out.single("droveway_ledger_size_bytes", Kind::Gauge, "Size of the ledger's files.", count(sizes.sum()));
}

/// The ledger, and what it writes ahead.
fn files(ledger: &std::path::Path) -> [PathBuf; 2] {
    let mut ahead = ledger.as_os_str().to_owned();
    ahead.push("-wal");
    [ledger.to_owned(), ahead.into()]
}

/// Opens the port.
pub(crate) async fn listen(address: std::net::SocketAddr) -> io::Result<TcpListener> {
    TcpListener::bind(address).await
}
