//! The agent of one host: reconcile, attach, names, metadata, ledger, Docker.
//!
//! One thread, the [`reconcile`]r, owns the kernel and the [`book`]s. Everything else is asynchronous and asks it by
//! [`Control`]: the Unix [`socket`], the [`docker`] plugin, the [`link`] to the server. What it knows is published as
//! an immutable [`View`], from which [`names`] and [`metadata`] answer.
//!
//! Invariant: losing the server loses changes, never traffic.

mod accept;
mod book;
mod chores;
pub mod control;
mod counts;
pub mod dataplane;
pub mod docker;
pub mod doctor;
mod incarnation;
pub mod ipam;
mod ledger;
mod link;
pub mod metadata;
mod metrics;
pub mod names;
mod reconcile;
mod renew;
mod room;
mod routers;
mod said;
pub mod server;
pub mod socket;
pub mod tls;
pub mod tunnels;
pub mod underlay;
pub mod view;
mod vital;

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use model::agent_api::{Connection, DockerStatus};
use model::api::{ApiError, ErrorCode, HostReport};
use model::{EnvironmentId, JoinToken, Name, UnixMillis};
use tokio::sync::watch;

pub use control::Control;
pub use ledger::{FILE as LEDGER, Identity};
pub use view::View;

use crate::book::Book;
use crate::control::Command;
use crate::counts::Counts;
use crate::ledger::Ledger;
use crate::reconcile::Reconciler;
use crate::server::Server;

/// The version of the program.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// Where the engine looks for the plugin's socket.
pub const DOCKER_PLUGIN: &str = "/run/docker/plugins/droveway.sock";
/// How often the host's own addresses are looked at.
const UNDERLAY_EVERY: Duration = Duration::from_secs(2);

/// How an agent is to be.
#[derive(Debug, Clone)]
pub struct Config {
    /// The servers' URLs; needed for the first start only. Any of them will do.
    pub servers: Vec<String>,
    /// The join token; needed for the first start only.
    pub token: Option<JoinToken>,
    /// The environment to join.
    pub environment: EnvironmentId,
    /// Where other hosts reach this one, as a person says.
    pub underlay: underlay::Wish,
    /// The name to join with; the machine's host name if left out.
    pub name: Option<Name>,
    /// Labels to join with.
    pub labels: BTreeMap<String, String>,
    /// Where the ledger lives.
    pub state_dir: PathBuf,
    /// Where the agent listens.
    pub socket: PathBuf,
    /// Docker's socket; `None` leaves Docker alone.
    pub docker: Option<PathBuf>,
    /// Where the agent listens for Docker's plugin calls.
    pub docker_plugin: PathBuf,
    /// Resolvers for names that are not ours; those of `/etc/resolv.conf` if empty.
    pub forwarders: Vec<IpAddr>,
    /// How tunnels to other hosts are to be.
    pub tunnels: tunnels::Settings,
    /// Where metrics and health can be asked for, besides the socket.
    pub metrics: Option<SocketAddr>,
    /// Whether packets between containers and other hosts may take a shortcut past the kernel's stack.
    pub shortcut: bool,
}

/// Runs the agent until `shutdown`; calls `ready` once it has joined and listens on its sockets. Networks go on as they are
/// when it ends.
pub async fn run(
    config: Config,
    ready: impl FnOnce(),
    shutdown: impl Future<Output = ()>,
) -> Result<(), ApiError> {
    let mut shutdown = std::pin::pin!(shutdown);
    let mut ledger = Ledger::open(&config.state_dir).map_err(internal)?;
    let known = match ledger.identity().map_err(internal)? {
        Some(identity) if config.token.is_some() && ledger.copied().map_err(internal)?.is_some() => {
            tracing::warn!(host = %identity.host, "this host's state directory was a copy; it joins as a new one");
            None
        }
        Some(identity)
            if config.token.is_some()
                && was_removed(&identity, &ledger.servers().map_err(internal)?).await? =>
        {
            tracing::warn!(host = %identity.host, "this host was removed from its environment; it joins as a new one");
            None
        }
        known => known,
    };
    let identity = match known {
        Some(identity) => identity,
        None => tokio::select! {
            joined = join(&config) => {
                let identity = joined?;
                ledger.set_identity(&identity).map_err(internal)?;
                identity
            }
            () = &mut shutdown => return Ok(()),
        },
    };
    tracing::info!(host = %identity.host, name = %identity.name, server = identity.server, "this host");

    let candidates = underlay::candidates(&config.underlay, config.tunnels.port, Some(&identity.server))?;
    let server = Server::of(&identity, &ledger.servers().map_err(internal)?).map_err(internal)?;
    let kernel = linux::Kernel::open(std::path::Path::new(NETNS_DIR)).map_err(internal)?;
    let waker = kernel.waker();
    let mut book = Book::open(ledger, identity.host.clone(), identity.name.clone()).map_err(internal)?;
    let copied = book.counts().err();
    book.candidates.clone_from(&candidates);
    book.no_shortcut = (!config.shortcut).then(|| "the agent was started with --no-shortcut".to_owned());

    let (requests, inbox) = std::sync::mpsc::channel();
    let (chores_tx, chores) = watch::channel(Arc::default());
    let (view_tx, view) = watch::channel(Arc::new(View::from_book(&book)));
    let control = Control::new(requests, Arc::new(move || waker.wake()), view, Arc::new(server.clone()));
    let (ended_tx, ended) = tokio::sync::oneshot::channel();
    let counts = Arc::new(Counts::default());
    let reconciler = Reconciler::new(kernel, book, inbox, view_tx, chores_tx, counts.clone());
    let thread = std::thread::Builder::new()
        .name("reconcile".to_owned())
        .spawn(move || drop(ended_tx.send(reconciler.run())))
        .map_err(internal)?;

    let (tunnels, running) = tunnels::start(config.tunnels.clone(), &identity, control.views())?;

    let report = HostReport {
        candidates: candidates.clone(),
        routes: underlay::routes()?,
        version: VERSION.to_owned(),
    };
    let (report_tx, report) = watch::channel(report);
    let (candidates_tx, candidates) = watch::channel(candidates);
    let (connection_tx, connection) = watch::channel(Connection::Down {
        since: now_millis(),
        why: copied.as_ref().map_or("connecting for the first time", |error| &error.message).to_owned(),
    });
    let (docker_tx, docker) = watch::channel(match &config.docker {
        Some(_) => DockerStatus::Waiting { why: "its engine has not been asked yet".to_owned() },
        None => DockerStatus::Off,
    });
    let listener = socket::listen(&config.socket).map_err(internal)?;
    let upstreams = if config.forwarders.is_empty() {
        names::Upstreams::File("/etc/resolv.conf".into())
    } else {
        names::Upstreams::Given(config.forwarders.iter().map(|address| (*address, 53).into()).collect())
    };
    let own = candidates.borrow().iter().map(|candidate| candidate.address).collect();
    let forwarder = Arc::new(names::Forwarder::new(upstreams, own));
    let (identity_tx, identity_rx) = watch::channel(identity.clone());
    let context = socket::Context {
        control: control.clone(),
        server: server.clone(),
        connection: connection.clone(),
        candidates,
        docker,
        tunnels: tunnels.clone(),
        identity: identity_rx.clone(),
        counts: counts.clone(),
        forwarder: forwarder.clone(),
        ledger: config.state_dir.join(LEDGER),
    };
    let port = match config.metrics {
        Some(address) => Some(metrics::listen(address).await.map_err(|error| {
            let message = format!("cannot listen on {address}: {error}; choose another --metrics");
            ApiError::new(ErrorCode::Unavailable, message)
        })?),
        None => None,
    };
    let ports = context.clone();

    let addresses = context.candidates.clone();
    let addresses_changed = report.clone();
    let renewal = renew::keep(server.clone(), control.clone(), tunnels.clone(), identity_tx);
    let events = counts.docker_events.clone();
    let link =
        link::Link { server, control: control.clone(), connection: connection_tx, chores, report, counts };

    let ready = async {
        // All the others have been begun when this goes on: Docker's socket is there.
        tokio::task::yield_now().await;
        ready();
        std::future::pending::<()>().await;
    };
    let outcome = tokio::select! {
        () = ready => Ok(()),
        served = socket::serve(listener, context) => served.map_err(internal),
        () = link.keep(identity_rx, addresses) => Ok(()),
        () = renewal => Ok(()),
        () = serve_port(port, ports) => Ok(()),
        () = routers::serve(control.clone(), forwarder) => Ok(()),
        () = tunnels.follow(control.views(), addresses_changed) => Err(internal("the tunnels ended unexpectedly; the log says why")),
        () = follow_underlay(&config, &identity, &control, &candidates_tx, &report_tx) => Ok(()),
        () = follow_docker(&config, control.clone(), docker_tx, events) => Ok(()),
        ended = ended => match ended {
            Ok(Err(error)) => Err(internal(error)),
            Ok(Ok(())) | Err(_) => Err(internal("the reconciler ended unexpectedly; its log says why")),
        },
        () = &mut shutdown => Ok(()),
    };
    drop(tokio::task::spawn_blocking(move || running.stop()).await);
    control.send(Command::Stop);
    drop(tokio::task::spawn_blocking(move || thread.join()).await);
    outcome
}

/// Where namespaces are bound, as `ip netns` has it.
pub const NETNS_DIR: &str = "/run/netns";

/// Whether a server answers, and does not know this host any more. One that does not answer says nothing.
async fn was_removed(identity: &Identity, learned: &[String]) -> Result<bool, ApiError> {
    let server = Server::of(identity, learned).map_err(internal)?;
    for _ in 0..server.count() {
        match server.watch(None).await {
            Err(error) if error.code == ErrorCode::Unavailable => server.turn(),
            answer => return Ok(matches!(answer, Err(error) if error.code == ErrorCode::Unauthenticated)),
        }
    }
    Ok(false)
}

/// Joins, for as long as it takes to reach the server; a refusal ends it.
async fn join(config: &Config) -> Result<Identity, ApiError> {
    let missing = |what: &str| {
        let message = format!(
            "this host has not joined yet and {what} is missing; run the line that `droveway token create` prints on \
             the server"
        );
        ApiError::new(ErrorCode::Invalid, message)
    };
    let mut urls: VecDeque<String> =
        config.servers.iter().map(|url| url.trim_end_matches('/').to_owned()).collect();
    let token = config.token.as_ref().ok_or_else(|| missing("the join token"))?;
    let name = match &config.name {
        Some(name) => name.clone(),
        None => host_name()?,
    };
    let key = rcgen::KeyPair::generate().map_err(internal)?;
    let mut backoff = link::Backoff::new();
    loop {
        let url = &urls.front().ok_or_else(|| missing("--server"))?.clone();
        let attempt = server::join(server::Join {
            key: &key,
            url,
            token,
            environment: &config.environment,
            name: &name,
            candidates: underlay::candidates(&config.underlay, config.tunnels.port, Some(url))?,
            labels: config.labels.clone(),
            routes: underlay::routes()?,
        });
        match attempt.await {
            // All else stays as it is by waiting: a refused token, and a server with another CA.
            Err(error)
                if matches!(error.code, ErrorCode::Unavailable | ErrorCode::TooMany | ErrorCode::TooSlow) =>
            {
                tracing::warn!("{}; trying again", error.message);
                urls.rotate_left(1);
                tokio::time::sleep(backoff.next()).await;
            }
            outcome => {
                urls.pop_front();
                return outcome.map(|identity| Identity { servers: urls.into(), ..identity });
            }
        }
    }
}

/// The machine's name as the system has it, without a domain.
fn host_name() -> Result<Name, ApiError> {
    let text = nix::unistd::gethostname().map_err(internal)?;
    let text = text.to_string_lossy();
    let first = text.split('.').next().unwrap_or_default();
    first.parse().map_err(|_| {
        let message = format!(
            "this machine's host name {text:?} cannot be the host's name in Droveway; give one with --name: 1 to 63 of \
             a-z A-Z 0-9 _ -"
        );
        ApiError::new(ErrorCode::Invalid, message)
    })
}

/// Notices when the host's addresses or routes change.
async fn follow_underlay(
    config: &Config,
    identity: &Identity,
    control: &Control,
    candidates: &watch::Sender<Vec<model::Candidate>>,
    report: &watch::Sender<HostReport>,
) {
    let mut every = tokio::time::interval(UNDERLAY_EVERY);
    every.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        every.tick().await;
        // No address at all, while a cable is out, is no news worth acting on: the last ones stay.
        let Ok(found) = underlay::candidates(&config.underlay, config.tunnels.port, Some(&identity.server))
        else {
            continue;
        };
        let changed = candidates.send_if_modified(|known| {
            let changed = *known != found;
            known.clone_from(&found);
            changed
        });
        if changed {
            tracing::info!(?found, "this host's addresses changed");
            control.send(Command::Underlay(found.clone()));
        }
        let routes = underlay::routes().unwrap_or_default();
        report.send_if_modified(|said| {
            let changed = said.candidates != found || said.routes != routes;
            said.candidates.clone_from(&found);
            said.routes = routes;
            changed
        });
    }
}

/// Serves the port of metrics, if there is to be one.
async fn serve_port(port: Option<tokio::net::TcpListener>, context: socket::Context) {
    match port {
        Some(port) => metrics::serve(port, context).await,
        None => std::future::pending().await,
    }
}

/// Serves Docker. Should that not be possible, all else goes on, and the status says why.
async fn follow_docker(
    config: &Config,
    control: Control,
    status: watch::Sender<DockerStatus>,
    events: Arc<AtomicU64>,
) {
    let Some(engine) = &config.docker else { return std::future::pending().await };
    let docker = docker::Config {
        engine: engine.clone(),
        plugin_socket: config.docker_plugin.clone(),
        ..docker::Config::new(&config.state_dir)
    };
    // An engine that starts sets up its firewall, which may be in our way.
    let mut states = status.subscribe();
    let watcher = control.clone();
    let watch_engine = async move {
        while states.changed().await.is_ok() {
            if matches!(*states.borrow_and_update(), DockerStatus::Up { .. }) {
                watcher.send(Command::EngineFirewall);
            }
        }
    };
    let serve = async {
        let Err(error) = docker::run(docker, control, status.clone(), events).await;
        tracing::error!("{error}");
        status.send_replace(DockerStatus::Waiting { why: error.to_string() });
    };
    tokio::join!(serve, watch_engine);
}

fn internal(error: impl std::fmt::Display) -> ApiError {
    ApiError::new(ErrorCode::Internal, error.to_string())
}

/// The time, for what is stored or sent.
pub(crate) fn now_millis() -> UnixMillis {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// A new endpoint's id.
pub(crate) fn random_endpoint_id() -> model::EndpointId {
    model::EndpointId::from_random(random())
}

/// Random bytes from the operating system by way of the crypto library.
pub(crate) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    // The library's generator is seeded at start and cannot fail afterwards; were it to, ids would collide and the
    // server refuse them.
    let _ = aws_lc_rs::rand::fill(&mut bytes);
    bytes
}
