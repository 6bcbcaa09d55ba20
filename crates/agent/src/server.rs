//! The agent's side of the server's API: join, watch, leases, and telling it what happened here.
//!
//! Every call has a deadline. A refusal is the server's [`ApiError`]; an unreachable server is `Unavailable`, and what
//! it would have changed is tried again by whoever keeps it. So is one whose certificate is refused: only a server that is
//! believed says of this host that it is `Unauthenticated`. Who joins takes that for final: see [`join`].
//!
//! An environment may have several servers. All calls go to one of them, until whoever watches it turns to the next.

use std::collections::{BTreeMap, VecDeque};
use std::io::Write;
use std::net::IpAddr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use flate2::write::MultiGzDecoder;
use model::api::{
    ApiError, ClaimRequest, Consent, ErrorCode, GiveBack, Heard, Held, HeldAnswer, HostReport, HostRoute,
    INCARNATION, JoinAnswer, JoinRequest, LeaseRequest, ReleaseClaim, RenewAnswer, RenewRequest, path,
};
use model::{
    Block, Candidate, Claim, Endpoint, EndpointId, EnvironmentId, Epoch, Incarnation, JoinToken, Name,
    NetworkId, Object, Revision, StartSecret, Step, Watch,
};
use reqwest::header::{ACCEPT_ENCODING, CONTENT_ENCODING};
use reqwest::{Client, Method, RequestBuilder, Response};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::control::{BoxFuture, Lessor};
use crate::ledger::Identity;
use crate::tls::{ClientIdentity, TlsError, Trust, client_config, root_cause, untrusted};

const CONNECT: Duration = Duration::from_secs(5);
const REQUEST: Duration = Duration::from_secs(20);
/// The server sends a heartbeat every 10 s: a stream silent for longer than this is dead.
const SILENCE: Duration = Duration::from_secs(35);
/// A line of the watch stream is not longer than this, in bytes: a snapshot of a very large environment.
const LINE_MAX: usize = 256 << 20;

/// A connection to the server, made when it is needed. Clones share it.
#[derive(Clone)]
pub struct Server {
    client: Arc<RwLock<Client>>,
    urls: Arc<RwLock<Urls>>,
    environment: EnvironmentId,
    /// The life of the ledger that the server has taken from this start.
    incarnation: Arc<RwLock<Option<Incarnation>>>,
    /// What tells this start from all that have its ledger.
    secret: StartSecret,
}

/// How the servers are reached; the first is the one that is spoken to.
struct Urls {
    /// What this host was started with, or joined at.
    given: Vec<String>,
    all: VecDeque<String>,
}

impl Urls {
    fn learn(&mut self, urls: &[String]) {
        let mut all: VecDeque<String> = self.all.front().cloned().into_iter().collect();
        for url in urls.iter().chain(&self.given) {
            if !all.contains(url) {
                all.push_back(url.clone());
            }
        }
        self.all = all;
    }
}

impl Server {
    /// The servers of the environment that this host has joined: those it joined with, and what it learned since.
    pub fn of(identity: &Identity, learned: &[String]) -> Result<Self, TlsError> {
        let given: Vec<String> = [&identity.server].into_iter().chain(&identity.servers).cloned().collect();
        let mut urls = Urls { all: VecDeque::from([identity.server.clone()]), given };
        urls.learn(learned);
        Ok(Self {
            client: Arc::new(RwLock::new(client_of(identity)?)),
            urls: Arc::new(RwLock::new(urls)),
            environment: identity.environment.clone(),
            incarnation: Arc::default(),
            secret: StartSecret::from_random(crate::random()),
        })
    }

    /// The life of the ledger that all is asked by; none before the server has taken one.
    pub fn incarnation(&self) -> Option<Incarnation> {
        self.incarnation.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Asks by another life of the ledger from now on.
    pub fn set_incarnation(&self, incarnation: Option<Incarnation>) {
        *self.incarnation.write().unwrap_or_else(PoisonError::into_inner) = incarnation;
    }

    /// Takes in how the servers are reached. The one that is spoken to stays so.
    pub fn learn(&self, urls: &[String]) {
        self.urls.write().unwrap_or_else(PoisonError::into_inner).learn(urls);
    }

    /// Turns to the next server, if there is another.
    pub fn turn(&self) {
        self.urls.write().unwrap_or_else(PoisonError::into_inner).all.rotate_left(1);
    }

    /// How many servers are known.
    pub fn count(&self) -> usize {
        self.urls.read().unwrap_or_else(PoisonError::into_inner).all.len()
    }

    /// Leaves the present connection: it was made from an address that this host may not have any more, and would be
    /// found dead only after a while.
    pub fn reconnect(&self, identity: &Identity) -> Result<(), TlsError> {
        *self.client.write().unwrap_or_else(PoisonError::into_inner) = client_of(identity)?;
        Ok(())
    }

    /// The URL of the one that is spoken to.
    pub fn url(&self) -> String {
        let urls = self.urls.read().unwrap_or_else(PoisonError::into_inner);
        urls.all.front().cloned().unwrap_or_default()
    }

    /// Opens the watch stream.
    pub async fn watch(&self, resume: Option<(&Epoch, Revision)>) -> Result<WatchStream, ApiError> {
        let url = &self.url();
        let mut request = self.request(url, Method::GET, path::WATCH).header(ACCEPT_ENCODING, "gzip");
        if let Some((epoch, revision)) = resume {
            request = request.query(&[("epoch", epoch.to_string()), ("revision", revision.to_string())]);
        }
        let answer = tokio::time::timeout(REQUEST, request.send())
            .await
            .map_err(|_| unavailable(url, "no answer in 20 s"))?
            .map_err(|e| unreachable_because(url, &e))?;
        let answer = refused(url, answer).await?;
        let packed = answer.headers().get(CONTENT_ENCODING).is_some_and(|coding| coding == "gzip");
        Ok(WatchStream {
            answer,
            text: if packed {
                Text::Gzip(Box::new(MultiGzDecoder::new(Vec::new())))
            } else {
                Text::Plain(Vec::new())
            },
            searched: 0,
            received: 0,
            url: url.clone(),
        })
    }

    /// Tells that another life of the ledger begins, or that this one lives. It is this start's own, or one that an earlier
    /// start made.
    pub async fn step(&self, step: &Step, own: bool) -> Result<(), ApiError> {
        let secret = own.then(|| self.secret.clone());
        let step = Step { secret, ..step.clone() };
        self.send(Method::PUT, path::INCARNATION, &step).await.map(drop)
    }

    /// Says what this host is.
    pub async fn report(&self, report: &HostReport) -> Result<(), ApiError> {
        self.send(Method::PUT, path::SELF, report).await.map(drop)
    }

    /// Says what this host holds, to a server whose store was restored; what it cannot keep.
    pub async fn held(&self, held: &Held) -> Result<HeldAnswer, ApiError> {
        self.ask(Method::PUT, path::HELD, held).await
    }

    /// A new certificate, PEM, for the host's key, PEM.
    pub async fn renew(&self, key: &str) -> Result<String, ApiError> {
        let unusable = |error: rcgen::Error| {
            ApiError::new(ErrorCode::Internal, format!("this host's key cannot be used: {error}"))
        };
        let key = rcgen::KeyPair::from_pem(key).map_err(unusable)?;
        let csr = rcgen::CertificateParams::default().serialize_request(&key).map_err(unusable)?;
        let body = RenewRequest { csr: csr.pem().map_err(unusable)? };
        let answer: RenewAnswer = self.ask(Method::POST, path::CERTIFICATE, &body).await?;
        Ok(answer.certificate)
    }

    /// Tells an endpoint.
    pub async fn put_endpoint(&self, endpoint: &Endpoint) -> Result<(), ApiError> {
        let path = format!("{}/{}", path::ENDPOINTS, endpoint.id);
        self.send(Method::PUT, &path, endpoint).await.map(drop)
    }

    /// Tells that an endpoint is gone.
    pub async fn delete_endpoint(&self, id: &EndpointId) -> Result<(), ApiError> {
        let path = format!("{}/{id}", path::ENDPOINTS);
        self.send(Method::DELETE, &path, &()).await.map(drop)
    }

    /// Gives a block back.
    pub async fn give_back(&self, block: &Block) -> Result<(), ApiError> {
        let body =
            GiveBack { network: block.network.to_string(), cidr: block.cidr, leased: Some(block.leased) };
        self.send(Method::DELETE, path::BLOCKS, &body).await.map(drop)
    }

    /// Gives a claimed address back.
    pub async fn release(&self, claim: &Claim) -> Result<(), ApiError> {
        let body = ReleaseClaim {
            network: claim.network.to_string(),
            address: claim.address,
            endpoint: Some(claim.endpoint.clone()),
        };
        self.send(Method::DELETE, path::CLAIMS, &body).await.map(drop)
    }

    /// Lets go of an address that another host asked for, or does not.
    pub async fn consent(&self, claim: &Claim, consents: bool) -> Result<(), ApiError> {
        let body = Consent {
            network: claim.network.to_string(),
            address: claim.address,
            endpoint: claim.endpoint.clone(),
            at: claim.wanted.as_ref().map(|wanted| wanted.at),
            consents,
        };
        self.send(Method::PUT, path::CLAIMS, &body).await.map(drop)
    }

    /// Says up to which revision withdrawn blocks are gone from this host.
    pub async fn heard(&self, epoch: &Epoch, revision: Revision) -> Result<(), ApiError> {
        let body = Heard { epoch: epoch.clone(), revision };
        self.send(Method::PUT, path::HEARD, &body).await.map(drop)
    }

    fn request(&self, url: &str, method: Method, path: &str) -> RequestBuilder {
        let client = self.client.read().unwrap_or_else(PoisonError::into_inner).clone();
        let request = client.request(method, format!("{url}{}/{}{path}", path::PREFIX, self.environment));
        match self.incarnation() {
            Some(incarnation) => request.header(INCARNATION, incarnation.to_string()),
            None => request,
        }
    }

    async fn send<B: Serialize + ?Sized>(
        &self,
        method: Method,
        path: &str,
        body: &B,
    ) -> Result<Response, ApiError> {
        loop {
            let (url, incarnation) = (&self.url(), self.incarnation());
            let request = self.request(url, method.clone(), path).timeout(REQUEST).json(body);
            let answer = request.send().await.map_err(|e| unreachable_because(url, &e))?;
            match refused(url, answer).await {
                // It stepped on while this was on its way.
                Err(error) if error.code == ErrorCode::Copied && incarnation != self.incarnation() => {}
                outcome => return outcome,
            }
        }
    }

    async fn ask<B: Serialize + ?Sized, T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &B,
    ) -> Result<T, ApiError> {
        decode(&self.url(), self.send(method, path, body).await?).await
    }
}

impl Lessor for Server {
    fn lease(&self, network: NetworkId, held: usize) -> BoxFuture<Result<Block, ApiError>> {
        let this = self.clone();
        Box::pin(async move {
            let body = LeaseRequest { network: network.to_string(), held };
            this.ask(Method::POST, path::BLOCKS, &body).await
        })
    }

    fn give_back(&self, held: Object) -> BoxFuture<Result<(), ApiError>> {
        let this = self.clone();
        Box::pin(async move {
            match &held {
                Object::Block(block) => Server::give_back(&this, block).await,
                Object::Claim(claim) => this.release(claim).await,
                Object::Host(_) | Object::Network(_) | Object::Endpoint(_) | Object::Peer(_) => Ok(()),
            }
        })
    }

    fn claim(
        &self,
        network: NetworkId,
        address: Option<IpAddr>,
        endpoint: EndpointId,
        router: bool,
    ) -> BoxFuture<Result<Claim, ApiError>> {
        let this = self.clone();
        Box::pin(async move {
            let body = ClaimRequest { network: network.to_string(), address, endpoint, router, retain: None };
            this.ask(Method::POST, path::CLAIMS, &body).await
        })
    }

    fn retained(
        &self,
        network: NetworkId,
        owner: String,
        endpoint: EndpointId,
    ) -> BoxFuture<Result<Claim, ApiError>> {
        let this = self.clone();
        Box::pin(async move {
            let network = network.to_string();
            let body = ClaimRequest { network, address: None, endpoint, router: false, retain: Some(owner) };
            this.ask(Method::POST, path::CLAIMS, &body).await
        })
    }
}

/// What a host joins with.
pub struct Join<'a> {
    /// The key to be certified: the same at each try, so that a lost answer is given again.
    pub key: &'a rcgen::KeyPair,
    /// The server's URL.
    pub url: &'a str,
    /// The token.
    pub token: &'a JoinToken,
    /// The environment.
    pub environment: &'a EnvironmentId,
    /// The name it would like.
    pub name: &'a Name,
    /// Where it may be reached.
    pub candidates: Vec<Candidate>,
    /// What its owner says of it.
    pub labels: BTreeMap<String, String>,
    /// Its own routes.
    pub routes: Vec<HostRoute>,
}

/// Joins: has the key certified, and answers the identity to be kept. A server that the token does not vouch for does not
/// become the right one by waiting: that is `Unauthenticated`, like a token that the server refuses.
pub async fn join(join: Join<'_>) -> Result<Identity, ApiError> {
    let internal = |why: String| ApiError::new(ErrorCode::Internal, why);
    let csr = rcgen::CertificateParams::default()
        .serialize_request(join.key)
        .and_then(|csr| csr.pem())
        .map_err(|e| internal(e.to_string()))?;
    let client = client(Trust::Fingerprint(join.token.ca), None).map_err(|e| internal(e.to_string()))?;
    let body = JoinRequest {
        token: join.token.reveal(),
        csr,
        name: join.name.clone(),
        candidates: join.candidates,
        labels: join.labels,
        routes: join.routes,
    };
    let answer = client
        .post(format!("{}{}/{}{}", join.url, path::PREFIX, join.environment, path::JOIN))
        .timeout(REQUEST)
        .json(&body)
        .send()
        .await
        .map_err(|e| match untrusted(&e) {
            Some(why) => ApiError::new(
                ErrorCode::Unauthenticated,
                format!("server {} is not trusted: {why}", join.url),
            ),
            None => unreachable_because(join.url, &e),
        })?;
    let answer: JoinAnswer = decode(join.url, refused(join.url, answer).await?).await?;
    Ok(Identity {
        host: answer.host,
        name: join.name.clone(),
        environment: answer.environment,
        server: join.url.to_owned(),
        servers: Vec::new(),
        ca: answer.ca,
        certificate: answer.certificate,
        key: join.key.serialize_pem(),
        certified: crate::now_millis(),
    })
}

/// The watch stream, line by line.
pub struct WatchStream {
    answer: Response,
    text: Text,
    /// How much of the text has no end of a line.
    searched: usize,
    received: u64,
    url: String,
}

/// What came and was not read yet.
enum Text {
    Plain(Vec<u8>),
    /// Members of gzip, one after another (RFC 1952 §2.2).
    Gzip(Box<MultiGzDecoder<Vec<u8>>>),
}

impl Text {
    fn buffer(&mut self) -> &mut Vec<u8> {
        match self {
            Self::Plain(text) => text,
            Self::Gzip(decoder) => decoder.get_mut(),
        }
    }

    fn push(&mut self, chunk: &[u8]) -> std::io::Result<()> {
        match self {
            Self::Plain(text) => text.extend_from_slice(chunk),
            Self::Gzip(decoder) => {
                // In pieces, so that little does not become more than a line may be before it is looked at.
                for piece in chunk.chunks(16 << 10) {
                    decoder.write_all(piece)?;
                    decoder.flush()?;
                    if decoder.get_ref().len() > LINE_MAX + (32 << 20) {
                        return Err(std::io::Error::other("a line of more than 256 MiB"));
                    }
                }
            }
        }
        Ok(())
    }
}

impl WatchStream {
    /// How many bytes came, as they were sent.
    pub fn received(&self) -> u64 {
        self.received
    }

    /// The next message; an error is the stream's end.
    pub async fn next(&mut self) -> Result<Watch, ApiError> {
        loop {
            let buffer = self.text.buffer();
            if let Some(end) = buffer[self.searched..].iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = buffer.drain(..=self.searched + end).collect();
                self.searched = 0;
                return serde_json::from_slice(&line).map_err(|e| {
                    unavailable(&self.url, &format!("its watch stream is not understood: {e}"))
                });
            }
            self.searched = buffer.len();
            if self.searched > LINE_MAX {
                return Err(unavailable(&self.url, "its watch stream sent a line of more than 256 MiB"));
            }
            let chunk = tokio::time::timeout(SILENCE, self.answer.chunk())
                .await
                .map_err(|_| unavailable(&self.url, "its watch stream was silent for 35 s"))?
                .map_err(|e| unreachable_because(&self.url, &e))?
                .ok_or_else(|| unavailable(&self.url, "it closed the watch stream"))?;
            self.received += chunk.len() as u64;
            self.text
                .push(&chunk)
                .map_err(|e| unavailable(&self.url, &format!("its watch stream is not understood: {e}")))?;
        }
    }
}

fn client_of(identity: &Identity) -> Result<Client, TlsError> {
    let own = ClientIdentity { certificate: identity.certificate.clone(), key: identity.key.clone() };
    client(Trust::ca(identity.ca.as_bytes())?, Some(own))
}

fn client(trust: Trust, identity: Option<ClientIdentity>) -> Result<Client, TlsError> {
    Client::builder()
        .tls_backend_preconfigured(client_config(trust, identity)?)
        .connect_timeout(CONNECT)
        .http2_keep_alive_interval(Duration::from_secs(10))
        .http2_keep_alive_timeout(Duration::from_secs(10))
        .http2_keep_alive_while_idle(true)
        .no_proxy()
        .build()
        .map_err(|e| TlsError::Setup(e.to_string()))
}

/// Turns an answer that is a refusal into its error.
async fn refused(url: &str, answer: Response) -> Result<Response, ApiError> {
    let status = answer.status();
    if status.is_success() {
        return Ok(answer);
    }
    let text = answer.bytes().await.unwrap_or_default();
    Err(serde_json::from_slice(&text)
        .unwrap_or_else(|_| unavailable(url, &format!("it answered HTTP {status}"))))
}

async fn decode<T: DeserializeOwned>(url: &str, answer: Response) -> Result<T, ApiError> {
    answer.json().await.map_err(|e| unreachable_because(url, &e))
}

fn unavailable(url: &str, why: &str) -> ApiError {
    ApiError::new(ErrorCode::Unavailable, format!("server {url}: {why}"))
}

/// The innermost cause says most: "connection refused" rather than "error sending request".
fn unreachable_because(url: &str, error: &reqwest::Error) -> ApiError {
    if let Some(why) = untrusted(error) {
        return unavailable(url, &format!("not trusted: {why}"));
    }
    unavailable(url, &format!("{} (is it running and reachable from this host?)", root_cause(error)))
}

#[cfg(test)]
mod tests {
    use model::HostId;

    use super::*;
    use crate::tls::tests::{Ca, ca, serve_two};

    fn identity(url: &str, ca: &Ca) -> Identity {
        Identity {
            host: HostId::from_random([1; 8]),
            name: "h1".parse().unwrap(),
            environment: EnvironmentId::default(),
            server: url.to_owned(),
            servers: Vec::new(),
            ca: ca.pem.clone(),
            certificate: ca.leaf_pem.clone(),
            key: ca.key_pem.clone(),
            certified: 0,
        }
    }

    #[tokio::test]
    async fn a_server_with_another_ca_ends_joining_but_is_merely_away_to_a_host_that_has_joined() {
        let (ours, other) = (ca(model::SERVER_NAME), ca(model::SERVER_NAME));
        let url = serve_two(&other);
        let token = format!("dwj1.id.secret.{}", ours.fingerprint()).parse().unwrap();
        let answer = join(Join {
            key: &rcgen::KeyPair::generate().unwrap(),
            url: &url,
            token: &token,
            environment: &EnvironmentId::default(),
            name: &"h1".parse().unwrap(),
            candidates: Vec::new(),
            labels: BTreeMap::new(),
            routes: Vec::new(),
        })
        .await;
        let error = answer.err().unwrap();
        assert_eq!(error.code, ErrorCode::Unauthenticated, "{error}");
        assert!(error.message.contains(&other.fingerprint().to_string()), "{error}");

        let error = Server::of(&identity(&url, &ours), &[]).unwrap().watch(None).await.err().unwrap();
        assert_eq!(error.code, ErrorCode::Unavailable, "{error}");
        assert!(error.message.contains(&other.fingerprint().to_string()), "{error}");
    }

    #[test]
    fn one_server_after_the_other_is_spoken_to_and_what_is_learned_adds_to_what_was_given() {
        let ours = ca(model::SERVER_NAME);
        let mut identity = identity("https://a:1", &ours);
        identity.servers = vec!["https://b:1".into()];
        let server = Server::of(&identity, &["https://c:1".into(), "https://a:1".into()]).unwrap();
        let mut order = Vec::new();
        for _ in 0..4 {
            order.push(server.url());
            server.turn();
        }
        assert_eq!(order, ["https://a:1", "https://c:1", "https://b:1", "https://a:1"]);
        server.learn(&["https://d:1".into()]);
        assert_eq!(
            (server.url().as_str(), server.count()),
            ("https://c:1", 4),
            "the one spoken to, d, a and b"
        );
    }
}
