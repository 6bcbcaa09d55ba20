//! How the verbs find the server, and the agent of this machine.

use std::path::{Path, PathBuf};

use clap::Args;
use model::EnvironmentId;
use model::agent_api::SOCKET;
use reqwest::Url;

use super::exit::Failure;
use super::parse;
use crate::client::{AgentSocket, Client, Settings};

/// The port the server listens on unless told otherwise.
pub(super) const PORT: u16 = 7443;
/// Where the server keeps what it has, unless told otherwise.
pub(super) const DATA_DIR: &str = "/var/lib/droveway/server";
/// Where the verbs look for the server.
pub(super) const SERVER: &str = "https://127.0.0.1:7443";
/// Where the verbs look for the key: where the server leaves it.
pub(super) const KEY_FILE: &str = "/var/lib/droveway/server/admin.key";

/// How to reach the server. On the server's own machine nothing need be given.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Connection")]
pub(super) struct Connection {
    /// Where the server is
    #[arg(long, global = true, env = "DROVEWAY_SERVER", hide_env_values = true, value_name = "URL", default_value = SERVER, value_parser = parse::server_url)]
    pub(super) server: Url,
    /// File with the API key; the server makes admin.key in its --data-dir at first start
    #[arg(long, global = true, env = "DROVEWAY_KEY_FILE", hide_env_values = true, value_name = "FILE", default_value = KEY_FILE)]
    pub(super) key_file: PathBuf,
    /// File with the CA's certificate that the server must prove itself by [default: ca.pem beside the key file]
    #[arg(long, global = true, env = "DROVEWAY_CA_FILE", hide_env_values = true, value_name = "FILE")]
    pub(super) ca_file: Option<PathBuf>,
    /// The environment: a set of hosts and networks that trust one CA
    #[arg(
        long,
        global = true,
        env = "DROVEWAY_ENVIRONMENT",
        hide_env_values = true,
        value_name = "NAME",
        default_value = "default"
    )]
    pub(super) environment: EnvironmentId,
}

impl Connection {
    /// A client of that server.
    pub(super) fn open(self) -> Result<Client, Failure> {
        let ca_file = self.ca_file.unwrap_or_else(|| beside(&self.key_file, "ca.pem"));
        let settings =
            Settings { server: self.server, key_file: self.key_file, ca_file, environment: self.environment };
        Ok(Client::open(settings)?)
    }
}

/// How to reach the agent of this machine.
#[derive(Debug, Clone, Args)]
pub(super) struct LocalAgent {
    /// The agent's socket
    #[arg(long, global = true, env = "DROVEWAY_SOCKET", hide_env_values = true, value_name = "PATH", default_value = SOCKET)]
    socket: PathBuf,
}

impl LocalAgent {
    /// A client of that agent.
    pub(super) fn open(&self) -> Result<AgentSocket, Failure> {
        Ok(AgentSocket::open(&self.socket)?)
    }
}

fn beside(file: &Path, name: &str) -> PathBuf {
    file.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ca_is_looked_for_beside_the_key() {
        assert_eq!(beside(Path::new(KEY_FILE), "ca.pem"), Path::new(DATA_DIR).join("ca.pem"));
        assert_eq!(beside(Path::new("admin.key"), "ca.pem"), Path::new("ca.pem"));
    }
}
