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
        let body = receive(self.http.get(format!("http://agent{}", path::STATUS)), &at).await?;
        serde_json::from_slice(&body).map_err(|error| Error::Foreign { at, why: error.to_string() })
    }
}
