//! The client of the local agent's Unix socket: HTTP/1.1, no credentials but the right to open it.
//!
//! Invariant: it starts no thread. The lab asks from processes that have one and need to stay so.

use std::path::{Path, PathBuf};

use agent::doctor::Books;
use model::agent_api::{AgentStatus, AttachRequest, Attached, TunnelStatus, path};
use model::api::{ErrorCode, Readiness};
use model::{Endpoint, EndpointId};
use nix::errno::Errno;
use nix::unistd::{AccessFlags, access};
use reqwest::{Method, RequestBuilder};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{
    CONNECT_TIMEOUT, Error, FileKind, REQUEST_TIMEOUT, accepted, chain, decode, failed, join, receive,
};

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

    /// Whether containers can attach, part by part.
    pub async fn readiness(&self) -> Result<Readiness, Error> {
        let request = self.request(Method::GET, path::READY)?.timeout(REQUEST_TIMEOUT);
        let at = self.path.display().to_string();
        // "Not ready" is an answer, with the status 503.
        let answer = request.send().await.map_err(|error| self.away(failed(&error, &at)))?;
        decode(&answer.bytes().await.map_err(|error| self.away(failed(&error, &at)))?, || at)
    }

    /// What the agent has written down.
    pub async fn books(&self) -> Result<Books, Error> {
        self.send(Method::GET, path::BOOKS, None::<&()>).await
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

    /// The tunnels to other hosts and foreign peers.
    pub async fn tunnels(&self) -> Result<Vec<TunnelStatus>, Error> {
        self.send(Method::GET, path::TUNNELS, None::<&()>).await
    }

    /// One tunnel, by the name or id of its peer.
    pub async fn tunnel(&self, peer: &str) -> Result<TunnelStatus, Error> {
        self.send(Method::GET, &of_peer(path::TUNNEL, peer)?, None::<&()>).await
    }

    /// Asks for new keys of a tunnel.
    pub async fn rekey(&self, peer: &str) -> Result<(), Error> {
        self.exchange(Method::POST, &of_peer(path::TUNNEL_REKEY, peer)?, None::<&()>).await.map(drop)
    }

    /// Closes a tunnel, and has it begin anew.
    pub async fn reset(&self, peer: &str) -> Result<(), Error> {
        self.exchange(Method::POST, &of_peer(path::TUNNEL_RESET, peer)?, None::<&()>).await.map(drop)
    }

    /// The inner packets of a tunnel as pcapng, for as long as they are read.
    pub async fn capture(&self, peer: &str) -> Result<Capture, Error> {
        let request = self.request(Method::GET, &of_peer(path::TUNNEL_CAPTURE, peer)?)?;
        let at = self.path.display().to_string();
        let answer = request.send().await.map_err(|error| self.away(failed(&error, &at)))?;
        Ok(Capture { answer: accepted(answer, &at).await?, at })
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
        let request = self.request(method, path)?.timeout(REQUEST_TIMEOUT);
        receive(request, body, &self.path.display().to_string()).await.map_err(|error| self.away(error))
    }

    fn request(&self, method: Method, path: &str) -> Result<RequestBuilder, Error> {
        // Asked first, because "permission denied" and "not running" have different remedies.
        if let Err(errno @ Errno::EACCES) = access(&self.path, AccessFlags::W_OK) {
            return Err(Error::File {
                what: FileKind::Socket,
                path: self.path.clone(),
                source: errno.into(),
            });
        }
        Ok(self.http.request(method, format!("http://agent{path}")))
    }

    /// Nobody at a socket is another trouble than nobody at an address.
    fn away(&self, error: Error) -> Error {
        match error {
            Error::Unreachable { why, .. } => Error::NoAgent { socket: self.path.clone(), why },
            other => other,
        }
    }
}

/// A capture that runs.
#[derive(Debug)]
pub struct Capture {
    answer: reqwest::Response,
    at: String,
}

impl Capture {
    /// The next piece; `None` at its end.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>, Error> {
        let piece = self.answer.chunk().await.map_err(|error| failed(&error, &self.at))?;
        Ok(piece.map(Into::into))
    }
}

/// A path that names a peer, whatever is in the name.
fn of_peer(template: &str, peer: &str) -> Result<String, Error> {
    let base = "http://agent".parse().map_err(|_| Error::Setup("the agent has no URL".to_owned()))?;
    let segments: Vec<&str> =
        template.split('/').skip(1).map(|it| if it == "{peer}" { peer } else { it }).collect();
    Ok(join(&base, "", &segments)?.path().to_owned())
}

#[cfg(test)]
mod tests {
    use model::api::ApiError;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    /// An agent that gives one answer; what it was asked.
    fn agent(path: &Path, answer: String) -> tokio::task::JoinHandle<String> {
        let listener = tokio::net::UnixListener::bind(path).unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut asked = Vec::new();
            while !asked.ends_with(b"\r\n\r\n") {
                asked.push(stream.read_u8().await.unwrap());
            }
            stream.write_all(answer.as_bytes()).await.unwrap();
            String::from_utf8(asked).unwrap().lines().next().unwrap().to_owned()
        })
    }

    #[tokio::test]
    async fn a_capture_is_read_piece_by_piece_until_the_agent_ends_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        let answer = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n";
        let asked = agent(&path, answer.to_owned());
        let mut capture = AgentSocket::open(&path).unwrap().capture("h2").await.unwrap();
        let mut all = Vec::new();
        while let Some(piece) = capture.next().await.unwrap() {
            all.extend(piece);
        }
        assert_eq!(all, b"abcde");
        assert_eq!(asked.await.unwrap(), "GET /v1/tunnels/h2/capture HTTP/1.1");
    }

    #[tokio::test]
    async fn a_refusal_of_the_agent_keeps_its_kind_and_words() {
        let dir = tempfile::tempdir().unwrap();
        let refusal = ApiError::new(ErrorCode::Conflict, "the tunnel to h2 has no keys to change yet");
        let body = serde_json::to_string(&refusal).unwrap();
        let answer = format!("HTTP/1.1 409 Conflict\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        for (name, verb) in
            [("rekey", "POST /v1/tunnels/h2/rekey"), ("capture", "GET /v1/tunnels/h2/capture")]
        {
            let path = dir.path().join(name);
            let asked = agent(&path, answer.clone());
            let socket = AgentSocket::open(&path).unwrap();
            let error = match name {
                "rekey" => socket.rekey("h2").await.unwrap_err(),
                _ => socket.capture("h2").await.unwrap_err(),
            };
            assert!(matches!(&error, Error::Refused(said) if *said == refusal), "{error}");
            assert!(asked.await.unwrap().starts_with(verb));
        }
    }

    #[test]
    fn a_peer_is_one_segment_whatever_is_in_its_name() {
        assert_eq!(of_peer(path::TUNNEL_REKEY, "h2").unwrap(), "/v1/tunnels/h2/rekey");
        assert_eq!(of_peer(path::TUNNEL, "a/b?c").unwrap(), "/v1/tunnels/a%2Fb%3Fc");
        assert!(of_peer(path::TUNNEL, "..").is_err());
    }

    #[tokio::test]
    async fn a_socket_that_is_not_there_is_unreachable_and_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent.sock");
        let error = AgentSocket::open(&path).unwrap().status().await.unwrap_err();
        assert!(matches!(&error, Error::NoAgent { socket, .. } if *socket == path), "{error}");
    }
}
