//! A real server on a port of its own, and clients that speak real TLS with it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use model::api::{
    ApiError, ErrorCode, HostRoute, INCARNATION, JoinAnswer, LeaseRequest, TokenCreated, TokenRequest,
};
use model::{
    Block, Candidate, Change, Endpoint, EndpointId, EndpointKind, Fingerprint, HostId, Incarnation, Mac,
    Network, Object, Revision, SERVER_NAME, Source, Watch,
};
use rcgen::KeyPair;
use reqwest::{Method, StatusCode};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde::Serialize;
use serde::de::DeserializeOwned;
use server::{Config, Ready};
use tempfile::TempDir;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

pub const DEFAULT: &str = "/v1/environments/default";

/// A server, running.
pub struct Server {
    pub dir: TempDir,
    pub ready: Ready,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<Result<(), server::Error>>,
}

pub fn config(dir: PathBuf) -> Config {
    Config {
        data_dir: dir,
        listen: "127.0.0.1:0".parse().unwrap(),
        names: vec!["drove.example".into()],
        domain: model::DEFAULT_DOMAIN.into(),
        retain: server::RETAIN,
        limits: server::Limits::default(),
        lives: server::Lives::default(),
        store: server::StoreChoice::Embedded,
        urls: vec![],
    }
}

impl Server {
    pub async fn start() -> Self {
        Self::start_in(tempfile::tempdir().unwrap()).await
    }

    pub async fn start_in(dir: TempDir) -> Self {
        Self::start_with(dir, |config| config).await.unwrap()
    }

    /// With a configuration of its own; why it did not start.
    pub async fn start_with(
        dir: TempDir,
        change: impl FnOnce(Config) -> Config,
    ) -> Result<Self, server::Error> {
        let (stop, stopped) = oneshot::channel();
        let (tell, told) = oneshot::channel();
        let config = change(config(dir.path().join("data")));
        let task = tokio::spawn(server::run(config, move |ready| drop(tell.send(ready)), async move {
            drop(stopped.await);
        }));
        if let Ok(ready) = told.await {
            return Ok(Self { dir, ready, stop: Some(stop), task });
        }
        task.await.unwrap()?;
        panic!("the server ended before it listened")
    }

    /// Ends it as a crash would, as far as that can be within one process: nothing is finished, nobody is told.
    pub async fn crash(self) -> TempDir {
        self.task.abort();
        drop(self.task.await);
        self.dir
    }

    /// The host's agent, at this server.
    pub fn agent(&self, host: &Agent) -> Agent {
        let key = KeyPair::from_pem(&host.key.serialize_pem()).unwrap();
        let client = self.client(&host.answer.ca, Some((&host.answer.certificate, &key)));
        Agent { id: host.id.clone(), client, key, answer: host.answer.clone() }
    }

    /// Waits until it ends by itself; why it does.
    pub async fn ends(self) -> (TempDir, server::Error) {
        let ended = tokio::time::timeout(Duration::from_secs(60), self.task).await;
        (self.dir, ended.expect("it goes on").unwrap().unwrap_err())
    }

    pub async fn stop(mut self) -> TempDir {
        drop(self.stop.take());
        self.task.await.unwrap().unwrap();
        self.dir
    }

    pub fn file(&self, name: &str) -> String {
        std::fs::read_to_string(self.dir.path().join("data").join(name)).unwrap()
    }

    /// The person with the admin key.
    pub fn admin(&self) -> Client {
        Client { key: Some(self.file("admin.key").trim().to_owned()), ..self.nobody() }
    }

    /// No credentials at all.
    pub fn nobody(&self) -> Client {
        self.client(&self.file("ca.pem"), None)
    }

    pub fn client(&self, ca: &str, identity: Option<(&str, &KeyPair)>) -> Client {
        client(self.ready.address, ca, identity)
    }

    pub async fn token(&self, request: &TokenRequest) -> TokenCreated {
        self.admin().post(&format!("{DEFAULT}/tokens"), request).await.unwrap()
    }

    /// A host that joined.
    pub async fn host(&self, name: &str) -> Agent {
        let token = self.token(&TokenRequest { uses: Some(1), ttl_seconds: None }).await.token;
        self.join(name, &token, &[]).await.unwrap()
    }

    pub async fn join(&self, name: &str, token: &str, routes: &[(&str, &str)]) -> Result<Agent, ApiError> {
        self.join_with(KeyPair::generate().unwrap(), name, token, routes).await
    }

    pub async fn join_with(
        &self,
        key: KeyPair,
        name: &str,
        token: &str,
        routes: &[(&str, &str)],
    ) -> Result<Agent, ApiError> {
        let request = join_request(&key, name, token, routes);
        let answer: JoinAnswer = self.nobody().post(&format!("{DEFAULT}/join"), &request).await?;
        let client = self.client(&answer.ca, Some((&answer.certificate, &key)));
        Ok(Agent { id: answer.host.clone(), client, key, answer })
    }
}

pub fn join_request(key: &KeyPair, name: &str, token: &str, routes: &[(&str, &str)]) -> serde_json::Value {
    let csr = rcgen::CertificateParams::default().serialize_request(key).unwrap().pem().unwrap();
    let routes: Vec<HostRoute> = routes
        .iter()
        .map(|(cidr, device)| HostRoute { cidr: cidr.parse().unwrap(), device: (*device).to_owned() })
        .collect();
    serde_json::json!({ "token": token, "csr": csr, "name": name, "candidates": [candidate(7)], "routes": routes })
}

pub fn candidate(last: u8) -> Candidate {
    Candidate { address: [192, 0, 2, last].into(), port: None, mtu: 1500, source: Source::Route }
}

pub fn client(address: SocketAddr, ca: &str, identity: Option<(&str, &KeyPair)>) -> Client {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca.as_bytes()).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let tls = match identity {
        None => builder.with_no_client_auth(),
        Some((certificate, key)) => builder
            .with_client_auth_cert(
                vec![CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap()],
                PrivateKeyDer::Pkcs8(key.serialize_der().into()),
            )
            .unwrap(),
    };
    let http = reqwest::Client::builder()
        .tls_backend_preconfigured(tls)
        .resolve(SERVER_NAME, address)
        .no_proxy()
        .build()
        .unwrap();
    Client { http, base: format!("https://{SERVER_NAME}:{}", address.port()), key: None, incarnation: None }
}

/// Someone who asks.
#[derive(Clone)]
pub struct Client {
    pub http: reqwest::Client,
    pub base: String,
    pub key: Option<String>,
    /// Which life of its ledger an agent says it is of.
    pub incarnation: Option<Incarnation>,
}

impl Client {
    pub fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        let request = self.http.request(method, format!("{}{path}", self.base));
        let request = match &self.incarnation {
            Some(incarnation) => request.header(INCARNATION, incarnation.to_string()),
            None => request,
        };
        match &self.key {
            Some(key) => request.bearer_auth(key),
            None => request,
        }
    }

    pub async fn raw(
        &self,
        method: Method,
        path: &str,
        body: impl Into<reqwest::Body>,
    ) -> (StatusCode, String) {
        let response = self.request(method, path).body(body).send().await.unwrap();
        (response.status(), response.text().await.unwrap())
    }

    async fn answer<T: DeserializeOwned>(request: reqwest::RequestBuilder) -> Result<T, ApiError> {
        let response = request
            .send()
            .await
            .map_err(|error| ApiError::new(ErrorCode::Unavailable, format!("no answer: {error:?}")))?;
        let (status, text) = (response.status(), response.text().await.unwrap());
        if status.is_success() {
            let text = if text.is_empty() { "null" } else { &text };
            return Ok(serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}")));
        }
        let error: ApiError = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{status}, {e}: {text}"));
        assert_eq!(error.code.status(), status.as_u16(), "{error:?}");
        Err(error)
    }

    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ApiError> {
        Self::answer(self.request(Method::GET, path)).await
    }

    pub async fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, ApiError> {
        Self::answer(self.request(Method::POST, path).json(body)).await
    }

    pub async fn put<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, ApiError> {
        Self::answer(self.request(Method::PUT, path).json(body)).await
    }

    pub async fn patch<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, ApiError> {
        Self::answer(self.request(Method::PATCH, path).json(body)).await
    }

    pub async fn delete(&self, path: &str) -> Result<(), ApiError> {
        Self::answer(self.request(Method::DELETE, path)).await
    }

    pub async fn delete_with(&self, path: &str, body: &impl Serialize) -> Result<(), ApiError> {
        Self::answer(self.request(Method::DELETE, path).json(body)).await
    }

    pub async fn make_network(&self, spec: serde_json::Value) -> Result<Network, ApiError> {
        self.post(&format!("{DEFAULT}/networks"), &spec).await
    }
}

/// The agent of a host.
pub struct Agent {
    pub id: HostId,
    pub client: Client,
    pub key: KeyPair,
    pub answer: JoinAnswer,
}

impl Agent {
    pub async fn lease(&self, network: &str, held: usize) -> Result<Block, ApiError> {
        let request = LeaseRequest { network: network.into(), held };
        self.client.post(&format!("{DEFAULT}/blocks"), &request).await
    }

    pub async fn put(&self, endpoint: &Endpoint) -> Result<Endpoint, ApiError> {
        self.client.put(&format!("{DEFAULT}/endpoints/{}", endpoint.id), endpoint).await
    }

    /// An endpoint in the block, at its address number `n`.
    pub fn endpoint(&self, block: &Block, name: &str, n: u32) -> Endpoint {
        let std::net::IpAddr::V4(base) = block.cidr.network() else { panic!("not IPv4") };
        let address = std::net::Ipv4Addr::from(u32::from(base) + n);
        let mut random = [0; 8];
        random[..4].copy_from_slice(&address.octets());
        random[4..].copy_from_slice(&block.network.as_str().as_bytes()[2..6]);
        Endpoint {
            id: EndpointId::from_random(random),
            network: block.network.clone(),
            host: self.id.clone(),
            name: Some(name.parse().unwrap()),
            stack: None,
            service: None,
            aliases: vec![],
            addresses: vec![address.into()],
            mac: Mac::from_random([0, 1, 2, 3, 4, n as u8]),
            kind: EndpointKind::Socket,
            container: None,
            labels: std::collections::BTreeMap::new(),
            ports: vec![],
            healthy: true,
            created: 1,
        }
    }

    pub async fn watch(&self) -> Watching {
        self.watch_from(None).await
    }

    pub async fn watch_from(&self, from: Option<(&model::Epoch, Revision)>) -> Watching {
        let query =
            from.map_or_else(String::new, |(epoch, revision)| format!("?epoch={epoch}&revision={revision}"));
        let response =
            self.client.request(Method::GET, &format!("{DEFAULT}/watch{query}")).send().await.unwrap();
        assert_eq!(response.status(), 200);
        Watching { response, buffer: Vec::new() }
    }
}

/// An open watch.
pub struct Watching {
    response: reqwest::Response,
    buffer: Vec<u8>,
}

impl Watching {
    /// The next message; `None` at the stream's end.
    pub async fn next(&mut self) -> Option<Watch> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return Some(serde_json::from_slice(&line).unwrap());
            }
            let chunk = tokio::time::timeout(Duration::from_secs(20), self.response.chunk()).await;
            match chunk.expect("the watch said nothing for 20 s") {
                Ok(Some(chunk)) => self.buffer.extend_from_slice(&chunk),
                Ok(None) | Err(_) => return None,
            }
        }
    }

    pub async fn snapshot(&mut self) -> Vec<Object> {
        match self.next().await {
            Some(Watch::Snapshot { objects, .. }) => objects,
            other => panic!("not a snapshot: {other:?}"),
        }
    }

    pub async fn delta(&mut self) -> Vec<Change> {
        match self.next().await {
            Some(Watch::Delta { changes, .. }) => changes,
            other => panic!("not a delta: {other:?}"),
        }
    }
}

pub fn fingerprint_of(pem: &str) -> Fingerprint {
    let der = CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &der);
    Fingerprint(digest.as_ref().try_into().unwrap())
}
