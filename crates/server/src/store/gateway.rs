//! What etcd says over HTTP: its JSON gateway (`/v3/…`), several members, TLS, user and password.
//!
//! Invariant: a transaction is sent to another member only if the first one certainly did not take it. What may have
//! been done is told as such ([`StoreError::Unknown`]).

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use reqwest::{Client, Response};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::StoreError;
use crate::{EtcdConfig, EtcdUrl, OpenEtcdError};

const CONNECT: Duration = Duration::from_secs(2);
const REQUEST: Duration = Duration::from_secs(10);
/// How often all members are asked for what can be asked twice.
const ROUNDS: usize = 3;
const PAUSE: Duration = Duration::from_millis(200);
/// A machine that is gone says nothing: its connections are found dead after three of these.
const KEEPALIVE: Duration = Duration::from_secs(3);

/// A way to the members of an etcd.
pub(crate) struct Gateway {
    client: Client,
    members: Vec<String>,
    /// The member that answered last.
    current: AtomicUsize,
    login: Option<Login>,
    token: RwLock<Option<String>>,
}

struct Login {
    user: String,
    password: String,
}

impl Gateway {
    /// Reads certificates and password; talks to nobody yet.
    pub(crate) fn new(config: &EtcdConfig) -> Result<Self, OpenEtcdError> {
        let scheme = if config.ca.is_some() { "https" } else { "http" };
        // Without TLS it would be shown to nobody.
        if config.ca.is_none() && config.certificate.is_some() {
            return Err(OpenEtcdError::NoCa);
        }
        let login = match (&config.user, &config.password_file) {
            (None, None) => None,
            (Some(_), None) | (None, Some(_)) => return Err(OpenEtcdError::HalfLogin),
            (Some(user), Some(file)) => {
                let password = read(file)?.trim_end_matches(['\r', '\n']).to_owned();
                Some(Login { user: user.clone(), password })
            }
        };
        let mut builder = Client::builder()
            .connect_timeout(CONNECT)
            .tcp_keepalive(KEEPALIVE)
            .tcp_keepalive_interval(KEEPALIVE)
            .tcp_keepalive_retries(3)
            .tcp_user_timeout(KEEPALIVE * 3)
            .no_proxy();
        builder = builder.tls_backend_preconfigured(tls(config)?);
        let client = builder.build().map_err(|error| OpenEtcdError::Tls(error.to_string()))?;
        let EtcdUrl { members, .. } = &config.url;
        Ok(Self {
            client,
            members: members.iter().map(|member| format!("{scheme}://{member}")).collect(),
            current: AtomicUsize::new(0),
            login,
            token: RwLock::new(None),
        })
    }

    /// Asks what may be asked twice.
    pub(crate) async fn read<T: DeserializeOwned>(&self, path: &str, body: &Value) -> Result<T, StoreError> {
        let mut last = StoreError::Unreachable("it has no members".into());
        for round in 0..ROUNDS * self.members.len() {
            if round > 0 && round % self.members.len() == 0 {
                tokio::time::sleep(PAUSE).await;
            }
            match self.once(path, body).await {
                Ok(answer) => return Ok(answer),
                Err(Trouble::Refused(why)) => return Err(StoreError::Refused(why)),
                Err(Trouble::NotTaken(why) | Trouble::Unknown(why)) => {
                    last = StoreError::Unreachable(why);
                    self.next();
                }
            }
        }
        Err(last)
    }

    /// Sends what must be done once at most.
    pub(crate) async fn write<T: DeserializeOwned>(&self, path: &str, body: &Value) -> Result<T, StoreError> {
        let mut last = StoreError::Unreachable("it has no members".into());
        for round in 0..ROUNDS * self.members.len() {
            if round > 0 && round % self.members.len() == 0 {
                tokio::time::sleep(PAUSE).await;
            }
            match self.once(path, body).await {
                Ok(answer) => return Ok(answer),
                Err(Trouble::Refused(why)) => return Err(StoreError::Refused(why)),
                Err(Trouble::Unknown(why)) => {
                    self.next();
                    return Err(StoreError::Unknown(why));
                }
                Err(Trouble::NotTaken(why)) => {
                    last = StoreError::Unreachable(why);
                    self.next();
                }
            }
        }
        Err(last)
    }

    /// Opens a stream of answers. It begins with a session of its own: etcd says of a session that has run out only that the
    /// watch is not permitted, as of a user who may not watch.
    pub(crate) async fn stream(&self, path: &str, body: &Value) -> Result<Stream, StoreError> {
        self.forget_token();
        let mut last = StoreError::Unreachable("it has no members".into());
        for _ in 0..self.members.len() {
            let member = self.current.load(Ordering::Relaxed);
            match self.send(path, body, None).await {
                Ok(response) => return Ok(Stream { response, member, buffer: Vec::new(), searched: 0 }),
                Err(Trouble::Refused(why)) => return Err(StoreError::Refused(why)),
                Err(Trouble::NotTaken(why) | Trouble::Unknown(why)) => {
                    last = StoreError::Unreachable(why);
                    self.next();
                }
            }
        }
        Err(last)
    }

    /// What etcd refused after it had answered: with the remedy, if one is known.
    pub(crate) fn refused(&self, message: &str) -> StoreError {
        match trouble(&format!("{}: {message}", self.member()), false) {
            Trouble::Refused(why) => StoreError::Refused(why),
            Trouble::NotTaken(why) | Trouble::Unknown(why) => StoreError::Unreachable(why),
        }
    }

    /// Turns to another member.
    fn next(&self) {
        self.current.fetch_add(1, Ordering::Relaxed);
    }

    /// Turns from the member that a stream is from, unless somebody did so already.
    pub(crate) fn leave(&self, stream: &Stream) {
        let next = stream.member.wrapping_add(1);
        // An error means that.
        let _ = self.current.compare_exchange(stream.member, next, Ordering::Relaxed, Ordering::Relaxed);
    }

    #[cfg(test)]
    pub(crate) fn session(&self) -> Option<String> {
        self.token.read().unwrap().clone()
    }

    #[cfg(test)]
    pub(crate) fn use_member(&self, n: usize) {
        self.current.store(n, Ordering::Relaxed);
    }

    fn member(&self) -> &str {
        let at = self.current.load(Ordering::Relaxed) % self.members.len().max(1);
        self.members.get(at).map_or("", String::as_str)
    }

    async fn once<T: DeserializeOwned>(&self, path: &str, body: &Value) -> Result<T, Trouble> {
        let response = self.send(path, body, Some(REQUEST)).await?;
        let member = response.url().origin().ascii_serialization();
        response.json().await.map_err(|error| Trouble::Unknown(format!("{member}: {}", cause(&error))))
    }

    /// One request to one member; one more where its session had run out, or was from before users were changed.
    async fn send(&self, path: &str, body: &Value, limit: Option<Duration>) -> Result<Response, Trouble> {
        let old =
            |why: &str| why.contains("invalid auth token") || why.contains("revision of auth store is old");
        match self.attempt(path, body, limit).await {
            Err(Trouble::Refused(why)) if old(&why) && self.login.is_some() => {
                self.forget_token();
                self.attempt(path, body, limit).await
            }
            outcome => outcome,
        }
    }

    async fn attempt(&self, path: &str, body: &Value, limit: Option<Duration>) -> Result<Response, Trouble> {
        let member = self.member().to_owned();
        // A member that lost its cluster must not go on as if nothing happened.
        let mut request =
            self.client.post(format!("{member}{path}")).header("Grpc-Metadata-hasleader", "true").json(body);
        if let Some(limit) = limit {
            request = request.timeout(limit);
        }
        if let Some(token) = self.token(&member).await? {
            request = request.header("Authorization", token);
        }
        // A stream's first answer comes at once; its later ones may take their time.
        let sent = tokio::time::timeout(REQUEST, request.send()).await;
        let response = sent
            .map_err(|_| Trouble::Unknown(format!("{member}: no answer in {} s", REQUEST.as_secs())))?
            .map_err(|error| lost(&member, &error))?;
        if response.status().is_success() {
            return Ok(response);
        }
        let (why, unsure) = refusal(response).await;
        Err(trouble(&format!("{member}: {why}"), unsure))
    }

    async fn token(&self, member: &str) -> Result<Option<String>, Trouble> {
        let Some(login) = &self.login else { return Ok(None) };
        if let Some(token) = self.token.read().unwrap_or_else(PoisonError::into_inner).clone() {
            return Ok(Some(token));
        }
        let request = self.client.post(format!("{member}/v3/auth/authenticate")).timeout(REQUEST);
        let request = request.json(&json!({ "name": login.user, "password": login.password }));
        let not_taken = |error: reqwest::Error| match lost(member, &error) {
            // The login may have been made; what was to be asked was not.
            Trouble::NotTaken(why) | Trouble::Unknown(why) | Trouble::Refused(why) => Trouble::NotTaken(why),
        };
        let response = request.send().await.map_err(not_taken)?;
        if !response.status().is_success() {
            let (why, unsure) = refusal(response).await;
            let why = format!("{member}: user {:?} cannot log in: {why}", login.user);
            return Err(match trouble(&why, unsure) {
                Trouble::NotTaken(why) | Trouble::Unknown(why) => Trouble::NotTaken(why),
                Trouble::Refused(why) => Trouble::Refused(why),
            });
        }
        let session: Session = response.json().await.map_err(not_taken)?;
        *self.token.write().unwrap_or_else(PoisonError::into_inner) = Some(session.token.clone());
        Ok(Some(session.token))
    }

    fn forget_token(&self) {
        *self.token.write().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// Why one member gave no answer.
enum Trouble {
    /// It certainly did nothing.
    NotTaken(String),
    /// It may have done it.
    Unknown(String),
    /// It says no, and so would the others.
    Refused(String),
}

/// What a request that got no answer came to.
fn lost(member: &str, error: &reqwest::Error) -> Trouble {
    match tls_fault(error) {
        Some(why) => Trouble::NotTaken(format!("{member}: {why}")),
        // So ends a handshake with an etcd that waits for requests in clear.
        None if cause(error) == "tls handshake eof" => {
            let remedy = "if it does not speak TLS, leave --store-ca out";
            Trouble::NotTaken(format!("{member}: {}; {remedy}", cause(error)))
        }
        None if error.is_connect() => Trouble::NotTaken(format!("{member}: {}", cause(error))),
        // So ends a request in clear to an etcd that waits for TLS.
        None if member.starts_with("http:") && cause(error).starts_with("connection closed before") => {
            let remedy = "if it speaks TLS, give its CA with --store-ca";
            Trouble::Unknown(format!("{member}: {}; {remedy}", cause(error)))
        }
        None => Trouble::Unknown(format!("{member}: {}", cause(error))),
    }
}

/// Why TLS was not agreed on, and what to do; `None` if that is not the trouble. No request was taken then.
fn tls_fault(error: &reqwest::Error) -> Option<String> {
    use rustls::{AlertDescription, CertificateError, Error};
    let mut next: Option<&(dyn std::error::Error + 'static)> = Some(error);
    let fault = loop {
        let cause = next?;
        if let Some(fault) = cause.downcast_ref::<Error>() {
            break fault;
        }
        // An error of input and output hides the one it wraps from those who ask for its source.
        next = match cause.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref) {
            Some(wrapped) => Some(wrapped),
            None => cause.source(),
        };
    };
    let remedy = match fault {
        Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
            "its certificate is not from the CA in --store-ca; give the CA that made etcd's certificate"
        }
        Error::InvalidCertificate(
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
        ) => "its certificate is for another name or address; name it in --store as its certificate does",
        Error::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. }) => {
            "its certificate has run out; renew it, and look whether the clocks are right"
        }
        Error::AlertReceived(AlertDescription::CertificateRequired) => {
            "it wants a certificate; give one with --store-cert and --store-key"
        }
        Error::AlertReceived(_) => {
            "it refuses our certificate, or that we have none; look at --store-cert, --store-key and etcd's --trusted-ca-file"
        }
        Error::InvalidMessage(_) => "if it does not speak TLS, leave --store-ca out",
        _ => "TLS could not be agreed on",
    };
    Some(format!("{remedy} ({fault})"))
}

/// What etcd says as it refuses, and whether it may be in trouble after it began.
async fn refusal(response: Response) -> (String, bool) {
    let status = response.status();
    let text = match response.text().await {
        Ok(text) => text,
        Err(error) => return (format!("HTTP {status}, and then {}", cause(&error)), true),
    };
    match serde_json::from_str::<Refusal>(&text) {
        Ok(refusal) => (refusal.message(), refusal.is_unsure()),
        Err(_) => {
            let text: String = text.trim().chars().take(200).collect();
            (format!("HTTP {status} {text:?}"), status.is_server_error())
        }
    }
}

/// What etcd's message means for the request.
fn trouble(message: &str, unsure: bool) -> Trouble {
    let says = |text: &str| message.contains(text);
    let why = message.to_owned();
    let refused = |remedy: &str| Trouble::Refused(format!("{message}; {remedy}"));
    if says("no leader") || says("too many requests") || says("not leader") {
        Trouble::NotTaken(why)
    } else if says("database space exceeded") {
        refused("compact and defragment etcd, then clear its alarm with `etcdctl alarm disarm`")
    } else if says("too many operations") {
        refused("start etcd with --max-txn-ops=10000")
    } else if says("user name is empty") {
        refused("its authentication is on: log in with --store-user and --store-password-file")
    } else if says("authentication is not enabled") {
        refused("leave --store-user out, or turn it on")
    } else if says("CommonName of client sending a request against gateway") {
        refused(
            "with its authentication on, its gateway takes no certificate that has a CommonName: give one without in \
             --store-cert",
        )
    } else if says("invalid user ID or password") {
        refused("check --store-user and the password in --store-password-file")
    } else if says("permission denied") {
        refused("grant the role of --store-user readwrite on the keys with the prefix that --store names")
    } else if unsure || says("timed out") || says("leader changed") {
        Trouble::Unknown(why)
    } else {
        Trouble::Refused(why)
    }
}

#[derive(Deserialize)]
struct Session {
    token: String,
}

#[derive(Deserialize)]
struct Refusal {
    #[serde(default)]
    message: String,
    #[serde(default)]
    error: Value,
    /// As gRPC has it.
    #[serde(default)]
    code: u32,
}

impl Refusal {
    fn message(&self) -> String {
        if self.message.is_empty() { self.error.to_string() } else { self.message.clone() }
    }

    /// Cancelled, unknown, deadline exceeded, aborted, internal, unavailable, data loss: a member says so also of what it
    /// had passed on to the others by then.
    fn is_unsure(&self) -> bool {
        matches!(self.code, 1 | 2 | 4 | 10 | 13 | 14 | 15)
    }
}

/// A stream of answers, one per line.
pub(crate) struct Stream {
    response: Response,
    /// Where it is from, as [`Gateway::current`] counts.
    member: usize,
    buffer: Vec<u8>,
    searched: usize,
}

impl Stream {
    /// The next answer.
    pub(crate) async fn next<T: DeserializeOwned>(&mut self) -> Result<T, StoreError> {
        #[derive(Deserialize)]
        struct Line<T> {
            result: Option<T>,
            error: Option<Value>,
        }
        let lost = |why: String| StoreError::Unreachable(format!("the watch ended: {why}"));
        loop {
            if let Some(end) = self.buffer[self.searched..].iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=self.searched + end).collect();
                self.searched = 0;
                let line: Line<T> = serde_json::from_slice(&line)
                    .map_err(|error| lost(format!("it is not understood: {error}")))?;
                return match line {
                    Line { result: Some(result), .. } => Ok(result),
                    Line { error, .. } => {
                        Err(lost(error.map_or_else(String::new, |error| error.to_string())))
                    }
                };
            }
            self.searched = self.buffer.len();
            match self.response.chunk().await {
                Ok(Some(chunk)) => self.buffer.extend_from_slice(&chunk),
                Ok(None) => return Err(lost("etcd closed it".into())),
                Err(error) => return Err(lost(cause(&error))),
            }
        }
    }
}

/// Bytes as the gateway has them.
pub(crate) fn encode(bytes: impl AsRef<[u8]>) -> String {
    BASE64_STANDARD.encode(bytes)
}

/// Bytes from the gateway.
pub(crate) fn decode(text: &str) -> Result<Vec<u8>, StoreError> {
    BASE64_STANDARD.decode(text).map_err(|_| StoreError::Refused("etcd answers what is not base64".into()))
}

/// A number as the gateway has it: text, and left out where it is zero.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Number(pub(crate) u64);

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map(Self).map_err(serde::de::Error::custom)
    }
}

impl Serialize for Number {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0.to_string())
    }
}

/// The innermost cause says most.
fn cause(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    cause.to_string()
}

fn read(file: &Path) -> Result<String, OpenEtcdError> {
    std::fs::read_to_string(file).map_err(|error| OpenEtcdError::File(file.to_owned(), error.to_string()))
}

fn tls(config: &EtcdConfig) -> Result<rustls::ClientConfig, OpenEtcdError> {
    let unreadable =
        |file: &PathBuf| OpenEtcdError::File(file.clone(), "it holds no such thing in PEM".into());
    let failed = |error: rustls::Error| OpenEtcdError::Tls(error.to_string());
    let mut roots = rustls::RootCertStore::empty();
    if let Some(file) = &config.ca {
        for certificate in CertificateDer::pem_slice_iter(read(file)?.as_bytes()) {
            roots.add(certificate.map_err(|_| unreadable(file))?).map_err(failed)?;
        }
        if roots.is_empty() {
            return Err(unreadable(file));
        }
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(failed)?
        .with_root_certificates(roots);
    match (&config.certificate, &config.key) {
        (None, None) => Ok(builder.with_no_client_auth()),
        (Some(certificate), Some(key)) => {
            let chain = CertificateDer::pem_slice_iter(read(certificate)?.as_bytes())
                .collect::<Result<Vec<_>, _>>()
                .map_err(|_| unreadable(certificate))?;
            let key_der =
                PrivateKeyDer::from_pem_slice(read(key)?.as_bytes()).map_err(|_| unreadable(key))?;
            builder.with_client_auth_cert(chain, key_der).map_err(failed)
        }
        _ => Err(OpenEtcdError::HalfIdentity),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_certainly_not_done_is_sent_again() {
        let kind = |answer: &str| {
            let refusal: Refusal = serde_json::from_str(answer).unwrap();
            match trouble(&format!("m: {}", refusal.message()), refusal.is_unsure()) {
                Trouble::NotTaken(_) => "again",
                Trouble::Unknown(_) => "unknown",
                Trouble::Refused(_) => "refused",
            }
        };
        for (message, code, wanted) in [
            ("etcdserver: no leader", 14, "again"),
            ("etcdserver: not leader", 9, "again"),
            ("etcdserver: too many requests", 8, "again"),
            ("etcdserver: request timed out", 14, "unknown"),
            ("etcdserver: leader changed", 14, "unknown"),
            ("etcdserver: server stopped", 14, "unknown"),
            ("transport is closing", 14, "unknown"),
            ("context deadline exceeded", 4, "unknown"),
            ("etcdserver: request cancelled", 2, "unknown"),
            ("etcdserver: mvcc: database space exceeded", 8, "refused"),
            ("etcdserver: duplicate key given in txn request", 3, "refused"),
            ("etcdserver: invalid auth token", 16, "refused"),
        ] {
            let answer = json!({ "error": message, "message": message, "code": code });
            assert_eq!(kind(&answer.to_string()), wanted, "{message}");
        }
        assert_eq!(kind(r#"{"error":{"grpc_code":9}}"#), "refused");
        let login = "m: user \"u\" cannot log in: HTTP 503 Service Unavailable";
        assert!(matches!(trouble(login, true), Trouble::Unknown(_)));
    }
}
