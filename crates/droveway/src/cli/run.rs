//! From the options of `droveway server` and `droveway agent` to the rooms that do the work.

use std::future::Future;

use tokio::signal::unix::{SignalKind, signal};

use super::agent::{AgentArgs, token_variable};
use super::exit::{Exit, Failure};
use super::local;
use super::output::{warn, write};
use super::server::{Ready, ServerArgs, greeting};

/// Runs the server until SIGINT or SIGTERM.
pub(super) async fn server(args: ServerArgs) -> Result<(), Failure> {
    args.log.start()?;
    let stop = shutdown()?;
    let config = server::Config {
        data_dir: args.data_dir,
        listen: args.listen,
        names: args.names,
        domain: args.domain,
    };
    let ready = |ready: server::Ready| {
        let ready = Ready {
            address: ready.address,
            ca: ready.ca,
            first_start: ready.first_start,
            admin_key_file: ready.admin_key_file,
        };
        if let Err(failure) = write(&greeting(&ready, local::address())) {
            warn(&failure.render());
        }
    };
    server::run(config, ready, stop).await.map_err(|error| fault(error.into()))
}

/// Runs the agent until SIGINT or SIGTERM. What it made in the kernel stays: containers go on.
pub(super) async fn agent(args: AgentArgs) -> Result<(), Failure> {
    args.log.start()?;
    let stop = shutdown()?;
    let settings = args.settle(token_variable())?;
    let config = agent::Config {
        server: settings.server,
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
    };
    Ok(agent::run(config, stop).await?)
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
