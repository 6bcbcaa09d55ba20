//! The client of the local agent's Unix socket: HTTP/1.1, no credentials but the right to open it.

use std::io;
use std::path::{Path, PathBuf};

use model::agent_api::{AgentStatus, path};

use super::{CONNECT_TIMEOUT, Error, FileKind, REQUEST_TIMEOUT, chain, receive};

/// A client of the agent on this machine.
#[derive(Debug, Clone)]
pub struct AgentSocket {
    http: reqwest::Client,
    path: PathBuf,
}

impl AgentSocket {
    /// Connects with the first request.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let http = reqwest::Client::builder()
            .unix_socket(path)
            .tls_backend_preconfigured(agent::tls::nobody()?)
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(REQUEST_TIMEOUT)
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .build()
            .map_err(|error| Error::Setup(chain(&error)))?;
        Ok(Self { http, path: path.to_owned() })
    }

    /// How the agent is.
    pub async fn status(&self) -> Result<AgentStatus, Error> {
        // Asked first, because "permission denied" and "not running" have different remedies.
        if let Err(source) = tokio::fs::metadata(&self.path).await
            && source.kind() == io::ErrorKind::PermissionDenied
        {
            return Err(Error::File { what: FileKind::Socket, path: self.path.clone(), source });
        }
        let at = self.path.display().to_string();
        let body = receive(self.http.get(format!("http://agent{}", path::STATUS)), &at).await;
        let body = body.map_err(|error| match error {
            Error::Unreachable { why, .. } => Error::NoAgent { socket: self.path.clone(), why },
            other => other,
        })?;
        serde_json::from_slice(&body).map_err(|error| Error::Foreign { at, why: error.to_string() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_that_is_not_there_is_unreachable_and_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        let error = AgentSocket::open(&path).unwrap().status().await.unwrap_err();
        assert!(matches!(&error, Error::NoAgent { socket, .. } if *socket == path), "{error}");
    }
}
