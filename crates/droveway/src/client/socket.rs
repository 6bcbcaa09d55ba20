//! The client of the local agent's Unix socket: HTTP/1.1, no credentials but the right to open it.
//!
//! Invariant: it starts no thread. The lab asks from processes that have one and need to stay so.

use std::path::{Path, PathBuf};

use model::agent_api::{AgentStatus, AttachRequest, Attached, path};
use model::api::ErrorCode;
use model::{Endpoint, EndpointId};
use nix::errno::Errno;
use nix::unistd::{AccessFlags, access};
use reqwest::Method;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{CONNECT_TIMEOUT, Error, FileKind, REQUEST_TIMEOUT, chain, decode, receive};

/// A client of the agent on this machine.
#[derive(Debug, Clone)]
pub struct AgentSocket {
    http: reqwest::Client,
    path: PathBuf,
}

/// Asks the agent at `path` from a thread that is in no runtime.
pub fn ask_agent<T>(path: &Path, ask: impl AsyncFnOnce(AgentSocket) -> Result<T, Error>) -> Result<T, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Error::Setup(error.to_string()))?;
    runtime.block_on(async { ask(AgentSocket::open(path)?).await })
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
        self.send(Method::GET, path::STATUS, None::<&()>).await
    }

    /// What is attached on the host.
    pub async fn endpoints(&self) -> Result<Vec<Endpoint>, Error> {
        self.send(Method::GET, path::ENDPOINTS, None::<&()>).await
    }

    /// Attaches a namespace. It may have to wait for the server's lease of a block.
    pub async fn attach(&self, request: &AttachRequest) -> Result<Attached, Error> {
        self.send(Method::POST, path::ENDPOINTS, Some(request)).await
    }

    /// Detaches an endpoint; one that is not there counts as detached.
    pub async fn detach(&self, id: &EndpointId) -> Result<(), Error> {
        let path = path::ENDPOINT.replace("{id}", id.as_str());
        match self.exchange(Method::DELETE, &path, None::<&()>).await {
            Err(Error::Refused(refusal)) if refusal.code == ErrorCode::NotFound => Ok(()),
            outcome => outcome.map(drop),
        }
    }

    async fn send<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<T, Error> {
        decode(&self.exchange(method, path, body).await?, || self.path.display().to_string())
    }

    async fn exchange(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> Result<Vec<u8>, Error> {
        // Asked first, because "permission denied" and "not running" have different remedies.
        if let Err(errno @ Errno::EACCES) = access(&self.path, AccessFlags::W_OK) {
            return Err(Error::File {
                what: FileKind::Socket,
                path: self.path.clone(),
                source: errno.into(),
            });
        }
        let request = self.http.request(method, format!("http://agent{path}"));
        receive(request, body, &self.path.display().to_string()).await.map_err(|error| match error {
            Error::Unreachable { why, .. } => Error::NoAgent { socket: self.path.clone(), why },
            other => other,
        })
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
