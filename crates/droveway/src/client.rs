//! The clients that the verbs of the command line use: of the server's API, HTTPS with a bearer key, and of the agent's
//! Unix socket.
//!
//! Invariant: the server's client talks to nobody whose certificate the CA file did not sign, and the key leaves by no other way: no
//! proxy, no redirect.

mod socket;

use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use agent::tls::{self, TlsError, Trust, Untrusted, root_cause};
use model::api::{
    ApiError, AuditEntry, ErrorCode, HostPatch, HostView, IpamView, KeyCreated, KeyRequest, KeyView,
    ReleaseClaim, ServerInfo, TokenCreated, TokenRequest, TokenView, UnreportedHost, path,
};
use model::{Block, Endpoint, EnvironmentId, Fingerprint, Network, NetworkSpec, Peer, PeerSpec, UnixMillis};
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue, LINK};
use reqwest::{Method, Url};
use serde::Serialize;
use serde::de::DeserializeOwned;

pub use socket::{AgentSocket, Capture, ask_agent};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
/// How many of a list are asked for at a time.
const PAGE: &str = "500";

/// Where the server is and what proves both sides.
#[derive(Debug, Clone)]
pub struct Settings {
    /// `https://HOST:PORT`.
    pub server: Url,
    /// A file with the API key.
    pub key_file: PathBuf,
    /// A file with the CA's certificate, PEM.
    pub ca_file: PathBuf,
    /// The environment that is meant.
    pub environment: EnvironmentId,
}

/// Why a request has no answer, or has a refusal for an answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The server refused.
    #[error("{0}")]
    Refused(ApiError),
    /// Nobody answers there.
    #[error("nothing answers at {at}: {why}")]
    Unreachable {
        /// The URL.
        at: String,
        /// What the system says.
        why: String,
    },
    /// No agent listens at its socket.
    #[error("no agent answers at {}: {why}", .socket.display())]
    NoAgent {
        /// The socket.
        socket: PathBuf,
        /// What the system says.
        why: String,
    },
    /// Somebody answers, but this CA does not vouch for them.
    #[error("{at} is not trusted: {source}")]
    Untrusted {
        /// The URL.
        at: String,
        /// Why, with fingerprints.
        source: Untrusted,
    },
    /// A file that is needed is not there or cannot be read.
    #[error("cannot read the {what} {path}: {source}")]
    File {
        /// What the file is.
        what: FileKind,
        /// Where it should be.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// A file is there but is not what it should be.
    #[error("{path} is not {expected}")]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What it should hold.
        expected: &'static str,
    },
    /// The answer is not one of ours.
    #[error("{at} gave an answer that this program does not understand: {why}")]
    Foreign {
        /// The URL or the socket.
        at: String,
        /// What is wrong with it.
        why: String,
    },
    /// The client could not be made.
    #[error("the client cannot start: {0}")]
    Setup(String),
}

impl From<TlsError> for Error {
    fn from(error: TlsError) -> Self {
        match error {
            TlsError::Setup(why) => Self::Setup(why),
            TlsError::Ca(_) | TlsError::Identity(_) => Self::Setup(error.to_string()),
        }
    }
}

/// Which file could not be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    /// The API key.
    Key,
    /// The CA's certificate.
    Ca,
    /// The agent's Unix socket.
    Socket,
}

impl fmt::Display for FileKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Key => "API key",
            Self::Ca => "CA certificate",
            Self::Socket => "agent's socket",
        })
    }
}

/// A client of one server and one environment.
#[derive(Debug, Clone)]
pub struct Client {
    http: reqwest::Client,
    settings: Settings,
    ca: Fingerprint,
}

impl Client {
    /// Reads key and CA; connects with the first request.
    pub fn open(settings: Settings) -> Result<Self, Error> {
        let key = read(FileKind::Key, &settings.key_file)?;
        let malformed = |path: &Path, expected| Error::Malformed { path: path.to_owned(), expected };
        let key = std::str::from_utf8(&key).map(str::trim).unwrap_or_default();
        let mut bearer = HeaderValue::from_str(&format!("Bearer {key}"))
            .ok()
            .filter(|_| !key.is_empty() && !key.contains(char::is_whitespace))
            .ok_or_else(|| malformed(&settings.key_file, "an API key: one line of plain text"))?;
        bearer.set_sensitive(true);

        let pem = read(FileKind::Ca, &settings.ca_file)?;
        let no_ca = |error| match error {
            TlsError::Ca(_) => malformed(&settings.ca_file, "a CA certificate in PEM form"),
            error @ (TlsError::Identity(_) | TlsError::Setup(_)) => error.into(),
        };
        let trust = Trust::ca(&pem).map_err(no_ca)?;
        let ca = trust.fingerprint();
        let config = tls::client_config(trust, None).map_err(no_ca)?;
        let http = reqwest::Client::builder()
            .tls_backend_preconfigured(config)
            .default_headers(HeaderMap::from_iter([(AUTHORIZATION, bearer)]))
            .user_agent(concat!("droveway/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            .timeout(REQUEST_TIMEOUT)
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .https_only(true)
            .build()
            .map_err(|error| Error::Setup(chain(&error)))?;
        Ok(Self { http, settings, ca })
    }

    /// What the client was opened with.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The CA that it trusts.
    pub fn ca(&self) -> Fingerprint {
        self.ca
    }

    /// What anyone may know of the server.
    pub async fn info(&self) -> Result<ServerInfo, Error> {
        let url = join(&self.settings.server, path::INFO, &[])?;
        self.send::<ServerInfo>(Method::GET, url, None::<&()>).await
    }

    /// All networks.
    pub async fn networks(&self) -> Result<Vec<Network>, Error> {
        self.list(path::NETWORKS).await
    }

    /// Makes a network.
    pub async fn create_network(&self, spec: &NetworkSpec) -> Result<Network, Error> {
        self.send(Method::POST, self.url(path::NETWORKS, &[])?, Some(spec)).await
    }

    /// All leased blocks.
    pub async fn blocks(&self) -> Result<Vec<Block>, Error> {
        self.list(path::BLOCKS).await
    }

    /// Who may give which addresses.
    pub async fn ipam(&self) -> Result<IpamView, Error> {
        self.get(path::IPAM, &[]).await
    }

    /// All hosts.
    pub async fn hosts(&self) -> Result<Vec<HostView>, Error> {
        self.list(path::HOSTS).await
    }

    /// One host, by name or id.
    pub async fn host(&self, name: &str) -> Result<HostView, Error> {
        self.get(path::HOSTS, &[name]).await
    }

    /// Changes a host's labels.
    pub async fn patch_host(&self, name: &str, patch: &HostPatch) -> Result<(), Error> {
        self.exchange(Method::PATCH, self.url(path::HOSTS, &[name])?, Some(patch)).await.map(drop)
    }

    /// Gives up a retained address, of a network by name or id.
    pub async fn retain_no_more(&self, network: &str, address: IpAddr) -> Result<(), Error> {
        let body = ReleaseClaim { network: network.to_owned(), address, endpoint: None };
        self.exchange(Method::DELETE, self.url(path::RETAINED, &[])?, Some(&body)).await.map(drop)
    }

    /// All endpoints.
    pub async fn endpoints(&self) -> Result<Vec<Endpoint>, Error> {
        self.list(path::ENDPOINTS).await
    }

    /// All foreign peers, without their secrets.
    pub async fn peers(&self) -> Result<Vec<Peer>, Error> {
        self.list(path::PEERS).await
    }

    /// Joins a foreign peer to a network.
    pub async fn create_peer(&self, spec: &PeerSpec) -> Result<Peer, Error> {
        self.send(Method::POST, self.url(path::PEERS, &[])?, Some(spec)).await
    }

    /// All join tokens, without their secrets.
    pub async fn tokens(&self) -> Result<Vec<TokenView>, Error> {
        self.list(path::TOKENS).await
    }

    /// Hosts that have not said what they hold since the store was restored.
    pub async fn unreported(&self) -> Result<Vec<UnreportedHost>, Error> {
        self.get(path::UNREPORTED, &[]).await
    }

    /// Waits no longer for a host to say what it holds.
    pub async fn remove_unreported(&self, name_or_id: &str) -> Result<(), Error> {
        self.delete(path::UNREPORTED, name_or_id).await
    }

    /// Makes a join token.
    pub async fn create_token(&self, request: &TokenRequest) -> Result<TokenCreated, Error> {
        self.send(Method::POST, self.url(path::TOKENS, &[])?, Some(request)).await
    }

    /// All API keys, without their texts.
    pub async fn keys(&self) -> Result<Vec<KeyView>, Error> {
        self.list(path::KEYS).await
    }

    /// Makes an API key.
    pub async fn create_key(&self, request: &KeyRequest) -> Result<KeyCreated, Error> {
        self.send(Method::POST, self.url(path::KEYS, &[])?, Some(request)).await
    }

    /// The audit log from a time on; `follow`ed, it goes on with what comes.
    pub async fn audit(&self, since: UnixMillis, follow: bool) -> Result<Audit, Error> {
        let url = self.url(path::AUDIT, &[])?;
        let at = self.at();
        let query = [("since", since.to_string()), ("follow", follow.to_string())];
        // It may be long, and one that follows has no end: there is a deadline for each piece in place of one for all.
        let request = self.http.get(url).query(&query).timeout(Duration::from_hours(24 * 365));
        let answer = request.send().await.map_err(|error| failed(&error, &at))?;
        Ok(Audit { answer: accepted(answer, &at).await?, follow, buffer: Vec::new(), at })
    }

    /// All of a collection, page by page.
    pub(crate) async fn list<T: DeserializeOwned>(&self, collection: &str) -> Result<Vec<T>, Error> {
        let at = self.at();
        let mut url = self.url(collection, &[])?;
        url.query_pairs_mut().append_pair("limit", PAGE);
        let mut all = Vec::new();
        loop {
            let answer = self.http.get(url.clone()).send().await.map_err(|error| failed(&error, &at))?;
            let answer = accepted(answer, &at).await?;
            let next = next_page(answer.headers()).map(|next| url.join(next));
            let body = answer.bytes().await.map_err(|error| failed(&error, &at))?;
            all.extend(decode::<Vec<T>>(&body, || url.to_string())?);
            url = match next {
                None => return Ok(all),
                // The key goes to nobody else.
                Some(Ok(next)) if next.origin() == url.origin() && next != url => next,
                Some(_) => {
                    let why = "its next page is not one of its own".to_owned();
                    return Err(Error::Foreign { at: url.to_string(), why });
                }
            };
        }
    }

    fn at(&self) -> String {
        self.settings.server.as_str().trim_end_matches('/').to_owned()
    }

    /// What is there in a collection under `rest`: one object, by name or id; with nothing, the collection's own answer.
    pub(crate) async fn get<T: DeserializeOwned>(&self, collection: &str, rest: &[&str]) -> Result<T, Error> {
        self.send(Method::GET, self.url(collection, rest)?, None::<&()>).await
    }

    /// Takes one of a collection away, by name or id.
    pub(crate) async fn delete(&self, collection: &str, name: &str) -> Result<(), Error> {
        self.exchange(Method::DELETE, self.url(collection, &[name])?, None::<&()>).await.map(drop)
    }

    async fn send<T: DeserializeOwned>(
        &self,
        method: Method,
        url: Url,
        body: Option<&impl Serialize>,
    ) -> Result<T, Error> {
        let at = url.to_string();
        decode(&self.exchange(method, url, body).await?, || at)
    }

    /// One request; the body of a good answer, or why there is none.
    async fn exchange(
        &self,
        method: Method,
        url: Url,
        body: Option<&impl Serialize>,
    ) -> Result<Vec<u8>, Error> {
        receive(self.http.request(method, url), body, &self.at()).await
    }

    fn url(&self, collection: &str, rest: &[&str]) -> Result<Url, Error> {
        let base = format!("{}/{}{collection}", path::PREFIX, self.settings.environment);
        join(&self.settings.server, &base, rest)
    }
}

/// Where a list goes on (RFC 8288).
fn next_page(headers: &HeaderMap) -> Option<&str> {
    let link = headers.get(LINK)?.to_str().ok()?;
    let (url, parameters) = link.strip_prefix('<')?.split_once('>')?;
    parameters.contains("rel=\"next\"").then_some(url)
}

/// The audit log as it comes.
#[derive(Debug)]
pub struct Audit {
    answer: reqwest::Response,
    follow: bool,
    buffer: Vec<u8>,
    at: String,
}

impl Audit {
    /// The next line; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<AuditEntry>, Error> {
        loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=end).collect();
                return decode(&line, || self.at.clone()).map(Some);
            }
            let piece = self.answer.chunk();
            let piece = if self.follow {
                piece.await
            } else {
                tokio::time::timeout(REQUEST_TIMEOUT, piece).await.map_err(|_| Error::Unreachable {
                    at: self.at.clone(),
                    why: format!("it said nothing for {} s", REQUEST_TIMEOUT.as_secs()),
                })?
            };
            match piece.map_err(|error| failed(&error, &self.at))? {
                Some(piece) => self.buffer.extend_from_slice(&piece),
                None => return Ok(None),
            }
        }
    }
}

/// Sends, and tells a good answer from a refusal and from no answer at all.
async fn receive(
    mut request: reqwest::RequestBuilder,
    body: Option<&impl Serialize>,
    at: &str,
) -> Result<Vec<u8>, Error> {
    if let Some(body) = body {
        request = request.json(body);
    }
    let answer = request.send().await.map_err(|error| failed(&error, at))?;
    let answer = accepted(answer, at).await?;
    Ok(answer.bytes().await.map_err(|error| failed(&error, at))?.into())
}

/// The answer, if it is no refusal.
async fn accepted(answer: reqwest::Response, at: &str) -> Result<reqwest::Response, Error> {
    let status = answer.status();
    if status.is_success() {
        return Ok(answer);
    }
    let body = answer.bytes().await.map_err(|error| failed(&error, at))?;
    Err(match serde_json::from_slice::<ApiError>(&body) {
        Ok(refusal) => Error::Refused(refusal),
        Err(_) => match bare_refusal(status.as_u16()) {
            Some(code) => Error::Refused(ApiError::new(code, format!("{at} answers {status}"))),
            None => Error::Foreign { at: at.to_owned(), why: format!("HTTP status {status}") },
        },
    })
}

fn decode<T: DeserializeOwned>(body: &[u8], at: impl FnOnce() -> String) -> Result<T, Error> {
    serde_json::from_slice(body).map_err(|error| Error::Foreign { at: at(), why: error.to_string() })
}

/// What a status means when no [`ApiError`] came with it: a layer below the API answered.
fn bare_refusal(status: u16) -> Option<ErrorCode> {
    match status {
        401 => Some(ErrorCode::Unauthenticated),
        403 => Some(ErrorCode::Forbidden),
        408 => Some(ErrorCode::TooSlow),
        413 => Some(ErrorCode::TooLarge),
        429 => Some(ErrorCode::TooMany),
        500 => Some(ErrorCode::Internal),
        502..=504 => Some(ErrorCode::Unavailable),
        _ => None,
    }
}

fn failed(error: &reqwest::Error, at: &str) -> Error {
    let at = at.to_owned();
    if let Some(source) = tls::untrusted(error) {
        return Error::Untrusted { at, source };
    }
    if error.is_decode() {
        return Error::Foreign { at, why: chain(error) };
    }
    let why = match (error.is_timeout(), error.is_connect()) {
        (true, true) => format!("no connection within {} s", CONNECT_TIMEOUT.as_secs()),
        (true, false) => format!("no answer within {} s", REQUEST_TIMEOUT.as_secs()),
        (false, _) => root_cause(error),
    };
    Error::Unreachable { at, why }
}

fn read(what: FileKind, path: &Path) -> Result<Vec<u8>, Error> {
    std::fs::read(path).map_err(|source| Error::File { what, path: path.to_owned(), source })
}

/// `base` with `path` and further segments, each one segment whatever is in it.
fn join(base: &Url, path: &str, rest: &[&str]) -> Result<Url, Error> {
    let mut url = base.clone();
    url.set_path(path);
    let refused = |what: &str| Error::Setup(format!("{what:?} cannot be part of a URL"));
    if let Some(bad) = rest.iter().find(|segment| matches!(**segment, "" | "." | "..")) {
        return Err(refused(bad));
    }
    url.path_segments_mut().map_err(|()| refused(base.as_str()))?.extend(rest);
    Ok(url)
}

/// An error and its causes in one line.
fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.ends_with(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_segment_whatever_is_in_it() {
        let base: Url = "https://h:7443/ignored".parse().unwrap();
        let url = join(&base, "/v1/environments/default/networks", &["a/b?c"]).unwrap();
        assert_eq!(url.as_str(), "https://h:7443/v1/environments/default/networks/a%2Fb%3Fc");
        assert!(join(&base, "/v1", &[".."]).is_err());
    }

    #[test]
    fn the_next_page_is_where_the_link_says() {
        let of = |text: &'static str| HeaderMap::from_iter([(LINK, HeaderValue::from_static(text))]);
        assert_eq!(next_page(&of("</v1/x?continue=a>; rel=\"next\"")), Some("/v1/x?continue=a"));
        assert_eq!(next_page(&of("</v1/x>; rel=\"prev\"")), None);
        assert_eq!(next_page(&of("nonsense")), None);
        assert_eq!(next_page(&HeaderMap::new()), None);
    }

    #[test]
    fn a_missing_key_is_an_error_that_names_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let settings = Settings {
            server: "https://127.0.0.1:1".parse().unwrap(),
            key_file: dir.path().join("admin.key"),
            ca_file: dir.path().join("ca.pem"),
            environment: EnvironmentId::default(),
        };
        let error = Client::open(settings.clone()).unwrap_err();
        assert!(matches!(&error, Error::File { what: FileKind::Key, .. }), "{error}");
        assert!(error.to_string().contains("admin.key"));

        std::fs::write(&settings.key_file, "two words\n").unwrap();
        let error = Client::open(settings.clone()).unwrap_err().to_string();
        assert!(error.contains("admin.key") && !error.contains("two words"), "{error}");

        std::fs::write(&settings.key_file, "key\n").unwrap();
        std::fs::write(&settings.ca_file, "not a certificate").unwrap();
        let error = Client::open(settings).unwrap_err().to_string();
        assert!(error.contains("ca.pem"), "{error}");
    }
}
