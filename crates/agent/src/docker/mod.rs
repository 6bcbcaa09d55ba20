//! Docker: the agent as libnetwork's remote network and IPAM driver, and as the follower of its engine.
//!
//! Two halves that meet only in [`state::State`]:
//! - the plugin ([`plugin`]) answers what the engine asks while it creates networks and starts containers;
//! - the follower ([`follow`]) makes each network appear on the engine, learns names and labels of containers after
//!   they were attached, attaches those that ask for it by a label ([`label`]), and clears away what the engine has
//!   forgotten.
//!
//! Invariant: the plugin never calls the engine. The engine holds locks while it waits for a plugin's answer, so a call
//! back would wait for ever. What the plugin has to know of the engine is learned beforehand by the follower.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use model::agent_api::DockerStatus;
use tokio::sync::watch;

use crate::Control;

mod describe;
mod engine;
mod follow;
mod label;
mod plugin;
mod resolv;
mod state;
mod sweep;
#[cfg(test)]
mod tests;
mod wire;

/// The name of both drivers, on the engine's side.
pub const DRIVER: &str = "droveway";
/// The option and the label that name the Droveway network behind a Docker network.
pub const NETWORK_KEY: &str = "droveway.network";

/// Where the engine and its things are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The engine's API socket.
    pub engine: PathBuf,
    /// Where the engine looks for the plugin. Its name without `.sock` is the driver's name.
    pub plugin_socket: PathBuf,
    /// The resolver configuration that the engine uses for its containers.
    pub resolv_conf: PathBuf,
    /// The agent's directory for what must survive a restart.
    pub state_dir: PathBuf,
}

impl Config {
    /// The places of a common installation.
    pub fn new(state_dir: impl Into<PathBuf>) -> Self {
        Self {
            engine: "/run/docker.sock".into(),
            plugin_socket: "/run/docker/plugins/droveway.sock".into(),
            resolv_conf: "/etc/resolv.conf".into(),
            state_dir: state_dir.into(),
        }
    }
}

/// Why Docker cannot be served at all.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The plugin's socket cannot be made.
    #[error("Docker's plugin socket {path}: {source}; check that its directory can be written to")]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The record of Docker's networks cannot be read or written.
    #[error(
        "the record of Docker's networks {path}: {source}; repair it or delete it, it is learned again from the engine"
    )]
    State {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// No client for the engine can be made.
    #[error("the client for Docker's engine cannot be made: {0}")]
    Client(String),
}

/// Serves the engine until dropped; counts its events in `events`. Returns only where it cannot begin.
pub async fn run(
    config: Config,
    control: Control,
    status: watch::Sender<DockerStatus>,
    events: Arc<AtomicU64>,
) -> Result<std::convert::Infallible, Error> {
    let state = Arc::new(state::State::open(&config.state_dir)?);
    let socket = plugin::Socket::bind(&config.plugin_socket)?;
    let engine = engine::Engine::new(&config.engine)?;
    let plugin = plugin::Plugin::new(control.clone(), state.clone());
    let follower = follow::Follower::new(engine, control, state, status, events, config.resolv_conf);
    tokio::select! {
        never = socket.serve(plugin) => match never {},
        never = follower.run() => match never {},
    }
}
