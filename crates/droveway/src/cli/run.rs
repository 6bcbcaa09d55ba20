//! From the options of `droveway server` and `droveway agent` to the rooms that do the work.

use std::future::Future;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::runtime::Builder;
use tokio::signal::unix::{SignalKind, signal};

use super::agent::{AgentArgs, Settings, token_variable};
use super::exit::{Exit, Failure};
use super::local;
use super::output::{warn, write};
use super::server::{Ready, ServerArgs, greeting};

/// Runs the server until SIGINT or SIGTERM.
pub(super) fn server(args: ServerArgs) -> Result<(), Failure> {
    args.log.start()?;
    // Each agent is a connection; the limit that most systems begin with is for programs that have few.
    if let Ok((_, most)) = getrlimit(Resource::RLIMIT_NOFILE)
        && let Err(error) = setrlimit(Resource::RLIMIT_NOFILE, most, most)
    {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
    super::on(threads(), serve(args))
}

async fn serve(args: ServerArgs) -> Result<(), Failure> {
    let stop = shutdown()?;
    let store = args.store.choice();
    let config = server::Config {
        data_dir: args.data_dir,
        listen: args.listen,
        names: args.names,
        domain: args.domain,
        retain: std::time::Duration::from_secs(args.retain),
        limits: args.limits.settle(),
        lives: args.lives.settle(),
        urls: args.urls.iter().map(|url| url.as_str().trim_end_matches('/').to_owned()).collect(),
        store,
    };
    let ready = |ready: server::Ready| {
        let ready = Ready {
            address: ready.address,
            ca: ready.ca,
            first_start: ready.first_start,
            // As it can be typed from anywhere.
            admin_key_file: std::path::absolute(&ready.admin_key_file).unwrap_or(ready.admin_key_file),
        };
        if let Err(failure) = write(&greeting(&ready, local::address())) {
            warn(&failure.render());
        }
        tell_manager();
    };
    server::run(config, ready, stop).await.map_err(|error| fault(error.into()))
}

/// Runs the agent until SIGINT or SIGTERM. What it made in the kernel stays: containers go on.
pub(super) fn agent(args: AgentArgs) -> Result<(), Failure> {
    args.log.start()?;
    super::on(threads(), host(args.settle(token_variable())?))
}

async fn host(settings: Settings) -> Result<(), Failure> {
    let stop = shutdown()?;
    let config = agent::Config {
        servers: settings.servers,
        token: settings.token,
        environment: model::EnvironmentId::default(),
        underlay: agent::underlay::Wish { address: settings.address, interface: settings.interface },
        name: settings.name,
        labels: settings.labels,
        state_dir: settings.state_dir,
        socket: settings.socket,
        docker: settings.docker,
        docker_plugin: agent::DOCKER_PLUGIN.into(),
        forwarders: settings.forwarders,
        tunnels: settings.tunnels,
        metrics: settings.metrics,
        shortcut: settings.shortcut,
    };
    // Its errors say what to do themselves: the remedies of a refused verb are not the agent's.
    Box::pin(agent::run(config, tell_manager, stop))
        .await
        .map_err(|error| Failure::new(Exit::of(error.code), error.message))
}

/// Tells a service manager that we serve, where it wants to know (`sd_notify(3)`): what is ordered after us begins then.
fn tell_manager() {
    let Some(socket) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let told = match socket.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&socket),
    }
    .and_then(|address| UnixDatagram::unbound()?.send_to_addr(b"READY=1", &address));
    if let Err(error) = told {
        tracing::warn!(%error, socket = %socket.display(), "the service manager cannot be told that we serve");
    }
}

/// Two threads serve thousands of connections; more would only cost memory.
fn threads() -> Builder {
    let mut builder = Builder::new_multi_thread();
    builder.worker_threads(2);
    builder
}

/// Ends with the first SIGINT or SIGTERM after the call.
fn shutdown() -> Result<impl Future<Output = ()> + Send + 'static, Failure> {
    let listen = |kind| signal(kind).map_err(|error| fault(error.into()));
    let (mut interrupt, mut terminate) = (listen(SignalKind::interrupt())?, listen(SignalKind::terminate())?);
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    })
}

fn fault(error: anyhow::Error) -> Failure {
    Failure::new(Exit::Internal, format!("{error:#}"))
}
