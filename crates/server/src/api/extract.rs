//! Who asks, for what, and with which body: the edge where text becomes values.

use std::any::type_name;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body as HttpBody;
use axum::extract::{FromRequest, FromRequestParts, Query, RawPathParams, Request};
use axum::http::header::{AUTHORIZATION, CONTENT_LENGTH};
use axum::http::request::Parts;
use axum::http::{HeaderValue, Method};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use model::api::{ApiError, BODY_MAX, ErrorCode, INCARNATION, Role};
use model::{EnvironmentId, HostId, Incarnation};
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use super::incarnation::{behind, copied};
use super::{Refusal, refuse};
use crate::app::{App, no_environment, now};
use crate::request;
use crate::secret;
use crate::serve::Peer;
use crate::state::State;

/// Each so many bytes of a body that came give the rest more time.
const PIECE: usize = 16 << 10;
/// How long a stranger waits until there is room for its body.
const ROOM: Duration = Duration::from_secs(5);
/// A body that everybody has room for, in bytes: what a host with a hundred routes joins with.
const SMALL: usize = 16 << 10;
/// The largest body read from someone without credentials, in bytes.
const STRANGERS_BODY_MAX: usize = 512 << 10;

/// Anyone with valid credentials for the environment.
#[derive(Debug, Clone)]
pub(super) struct Caller {
    pub(super) environment: EnvironmentId,
    who: Who,
}

#[derive(Debug, Clone)]
enum Who {
    /// A person, by the name of the key, and what it may do.
    Person(String, Role),
    /// An agent, by its host's id and name.
    Agent(HostId, String),
}

/// A person with a key.
#[derive(Debug, Clone)]
pub(super) struct Person {
    pub(super) environment: EnvironmentId,
    pub(super) name: String,
}

/// The agent of a host.
#[derive(Debug, Clone)]
pub(super) struct Agent {
    pub(super) environment: EnvironmentId,
    pub(super) host: HostId,
    pub(super) name: String,
    /// Which life of the host's ledger it says it is of; that counts, or nothing is known of any.
    pub(super) incarnation: Option<Incarnation>,
    /// Where it comes from, as far as that says how the host is reached ([`Peer::outside`]).
    pub(super) outside: Option<IpAddr>,
}

/// The agent of a host, whichever life of its ledger it is of.
pub(super) struct Claimant(pub(super) Agent);

impl fmt::Display for Person {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

impl fmt::Display for Agent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "host {}", self.name)
    }
}

impl FromRequestParts<Arc<App>> for Caller {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, Refusal> {
        let caller = Self::whoever(parts, app).await?;
        if let Who::Agent(host, name) = &caller.who {
            caller.counts(parts, app, host, name)?;
            app.presence.saw(host, parts.extensions.get::<Peer>().and_then(|peer| peer.expires));
        }
        Ok(caller)
    }
}

impl Caller {
    async fn whoever(parts: &mut Parts, app: &Arc<App>) -> Result<Self, Refusal> {
        let wanted = parameter(parts, app, "environment").await?;
        let (environment, who) = authenticate(parts, app, &wanted)?;
        let state = app.shared.read();
        if environment.as_str() != wanted {
            return Err(match state.environments.keys().find(|id| id.as_str() == wanted) {
                Some(_) => refuse(
                    ErrorCode::Forbidden,
                    format!("these credentials are for environment {environment}, not {wanted}"),
                ),
                None => no_environment(&wanted),
            }
            .into());
        }
        drop(state);
        Ok(Self { environment, who })
    }

    /// Refuses an agent of another life of its host's ledger than the one that counts.
    fn counts(&self, parts: &Parts, app: &App, host: &HostId, name: &str) -> Result<(), ApiError> {
        let said = incarnation(parts);
        app.read(&self.environment, |env| match env.lives.get(host) {
            Some(life) if Some(&life.current) != said.as_ref() => {
                match said.filter(|said| life.is_behind(said)) {
                    // Which of its lives counts, it is asked itself after a restore.
                    Some(said) if !env.unreported.contains_key(host) => Err(behind(name, said.number)),
                    Some(_) | None => Err(copied(name)),
                }
            }
            Some(_) | None => Ok(()),
        })
    }
}

/// Which life of its host's ledger an agent says it is of.
fn incarnation(parts: &Parts) -> Option<Incarnation> {
    parts.headers.get(INCARNATION)?.to_str().ok()?.parse().ok()
}

/// Who asks, and that they may ask now. Whoever cannot say is counted by where they come from.
fn authenticate(parts: &Parts, app: &App, wanted: &str) -> Result<(EnvironmentId, Who), ApiError> {
    let peer = parts.extensions.get::<Peer>();
    let found = {
        let state = app.shared.read();
        match parts.headers.get(AUTHORIZATION) {
            Some(header) => person(&state, header, wanted),
            None => agent(&state, peer),
        }
    };
    let (environment, who) = match (found, peer) {
        (Ok(found), _) => found,
        // Without a key the layer around this has counted it.
        (Err(error), Some(peer)) if parts.headers.contains_key(AUTHORIZATION) => {
            app.upkeep.rates.stranger(peer.address.ip())?;
            return Err(error);
        }
        (Err(error), _) => return Err(error),
    };
    if let Some(place) = peer.and_then(|peer| peer.place.as_ref()) {
        place.introduce();
    }
    match &who {
        Who::Person(name, role) => {
            request::by(request::Who::Key(name.clone()));
            app.upkeep.rates.key(name)?;
            if *role == Role::Read && !matches!(parts.method, Method::GET | Method::HEAD) {
                let message = format!("key {name:?} may only look (role read); use a key of role admin");
                return Err(refuse(ErrorCode::Forbidden, message));
            }
        }
        Who::Agent(id, name) => {
            request::by(request::Who::Host(name.clone(), id.to_string()));
            app.upkeep.rates.host(id.as_str())?;
        }
    }
    Ok((environment, who))
}

/// The person whose key is in the header: of the environment that is wanted, if the key is known there.
fn person(state: &State, header: &HeaderValue, wanted: &str) -> Result<(EnvironmentId, Who), ApiError> {
    let unknown = || {
        let message = "the key is not valid; send `Authorization: Bearer KEY` with the key from the server's admin.key file";
        refuse(ErrorCode::Unauthenticated, message)
    };
    let (scheme, key) = header.to_str().ok().and_then(|text| text.split_once(' ')).ok_or_else(unknown)?;
    if !scheme.eq_ignore_ascii_case("bearer") {
        return Err(unknown());
    }
    let hash = secret::sha256(key.trim().as_bytes());
    let keys = state.environments.iter().flat_map(|(id, env)| env.api_keys.iter().map(move |key| (id, key)));
    // All are compared, whichever fits.
    let found: Vec<_> = keys.filter(|(_, (_, key))| secret::same(&key.hash, &hash)).collect();
    let here = found.iter().find(|(id, _)| id.as_str() == wanted).or(found.first());
    let (id, (name, key)) = here.ok_or_else(unknown)?;
    if key.has_ended(now()) {
        let message = format!("the key {name:?} expired; make another with `droveway key create`");
        return Err(refuse(ErrorCode::Unauthenticated, message));
    }
    Ok(((*id).clone(), Who::Person((*name).clone(), key.role)))
}

/// The agent of the host whose key the other side proved to hold.
fn agent(state: &State, peer: Option<&Peer>) -> Result<(EnvironmentId, Who), ApiError> {
    let refused = |message: &str| refuse(ErrorCode::Unauthenticated, message);
    let key = peer.and_then(|peer| peer.key).ok_or_else(|| {
        refused(
            "neither a key nor a client certificate was sent; people send `Authorization: Bearer KEY`, agents show \
             the certificate they got when they joined",
        )
    })?;
    let key = key.to_string();
    let mut found = state.environments.iter().filter_map(|(id, env)| {
        let host = env.by_key.get(&key)?;
        Some((id.clone(), Who::Agent(host.clone(), env.host_name(host).to_owned())))
    });
    found.next().ok_or_else(|| {
        refused(
            "the certificate's key is that of no host: the host was removed, or joined another environment; join \
             again with a token from `droveway token create`",
        )
    })
}

impl FromRequestParts<Arc<App>> for Person {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, Refusal> {
        let Caller { environment, who } = Caller::from_request_parts(parts, app).await?;
        match who {
            Who::Person(name, _) => Ok(Self { environment, name }),
            Who::Agent(_, host) => {
                let message = format!("host {host} may not do this: it is for people, with a key");
                Err(refuse(ErrorCode::Forbidden, message).into())
            }
        }
    }
}

impl FromRequestParts<Arc<App>> for Agent {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, Refusal> {
        Ok(Self::of(Caller::from_request_parts(parts, app).await?, parts)?)
    }
}

impl FromRequestParts<Arc<App>> for Claimant {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, Refusal> {
        Ok(Self(Agent::of(Caller::whoever(parts, app).await?, parts)?))
    }
}

impl Agent {
    fn of(caller: Caller, parts: &Parts) -> Result<Self, ApiError> {
        match caller.who {
            Who::Agent(host, name) => {
                let outside = parts.extensions.get::<Peer>().and_then(Peer::outside);
                let incarnation = incarnation(parts);
                Ok(Self { environment: caller.environment, host, name, incarnation, outside })
            }
            Who::Person(..) => {
                let message = "this is for agents: it needs the client certificate of a host, not a key";
                Err(refuse(ErrorCode::Forbidden, message))
            }
        }
    }
}

/// A person with a key of any environment: for what is the whole server's.
pub(super) struct AnyPerson;

impl FromRequestParts<Arc<App>> for AnyPerson {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, Refusal> {
        match authenticate(parts, app, "")?.1 {
            Who::Person(..) => Ok(Self),
            Who::Agent(_, host) => {
                let message = format!("host {host} may not do this: it is for people, with a key");
                Err(refuse(ErrorCode::Forbidden, message).into())
            }
        }
    }
}

/// The environment of a request whose credentials are elsewhere.
pub(super) struct Environment(pub(super) EnvironmentId);

impl FromRequestParts<Arc<App>> for Environment {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, Refusal> {
        let wanted = parameter(parts, app, "environment").await?;
        let known = app.shared.read().environments.keys().find(|id| id.as_str() == wanted).cloned();
        known.map(Self).ok_or_else(|| no_environment(&wanted).into())
    }
}

/// The `{id}` of a path.
pub(super) struct Item(pub(super) String);

impl FromRequestParts<Arc<App>> for Item {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, app: &Arc<App>) -> Result<Self, Refusal> {
        Ok(Self(parameter(parts, app, "id").await?))
    }
}

async fn parameter(parts: &mut Parts, app: &Arc<App>, name: &str) -> Result<String, Refusal> {
    let bad = |_| refuse(ErrorCode::Invalid, "the path is not UTF-8");
    let parameters = RawPathParams::from_request_parts(parts, app).await.map_err(bad)?;
    let value = parameters.iter().find(|(key, _)| *key == name).map(|(_, value)| value);
    Ok(value.unwrap_or_default().chars().take(100).collect())
}

/// The query of a URL.
pub(super) struct Asked<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequestParts<Arc<App>> for Asked<T> {
    type Rejection = Refusal;

    async fn from_request_parts(parts: &mut Parts, _: &Arc<App>) -> Result<Self, Refusal> {
        match Query::try_from_uri(&parts.uri) {
            Ok(Query(asked)) => Ok(Self(asked)),
            Err(error) => Err(refuse(
                ErrorCode::Invalid,
                format!("the query cannot be understood: {}", error.body_text()),
            )
            .into()),
        }
    }
}

/// A body in JSON.
pub(super) struct Json<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequest<Arc<App>> for Json<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, Refusal> {
        Ok(Self(parse(&read(request, BODY_MAX, app).await?)?))
    }
}

/// A body in JSON that holds a secret: what is wrong with it is told without a word of it.
pub(super) struct SecretJson<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequest<Arc<App>> for SecretJson<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, Refusal> {
        let body = read(request, BODY_MAX, app).await?;
        Ok(Self(serde_json::from_slice(&body).map_err(|error| {
            let (what, line, column) = (schema::<T>(), error.line(), error.column());
            let message = format!(
                "the body is not a {what} in JSON: line {line} column {column} is not as /openapi.json has it"
            );
            refuse(ErrorCode::Invalid, message)
        })?))
    }
}

/// A body in JSON from someone who has shown no credentials: it is smaller, and few large ones are read at a time, so
/// strangers cannot fill the memory. Those that say their length, and say it is small, wait for nobody: whoever sends a
/// byte a second is in nobody's way.
pub(super) struct StrangersJson<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequest<Arc<App>> for StrangersJson<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, Refusal> {
        let _turn = if announced(&request).is_some_and(|length| length <= SMALL as u64) {
            None
        } else {
            let turn = tokio::time::timeout(ROOM, app.strangers.acquire()).await;
            Some(turn.map_err(|_| {
                let message = "too many large requests of others are being read; try again in a moment";
                refuse(ErrorCode::Unavailable, message)
            })?)
        };
        Ok(Self(parse(&read(request, STRANGERS_BODY_MAX, app).await?)?))
    }
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ApiError> {
    let what = schema::<T>();
    serde_json::from_slice(bytes)
        .map_err(|error| refuse(ErrorCode::Invalid, format!("the body is not a {what} in JSON: {error}")))
}

/// What OpenAPI calls a type: the last part of its path.
fn schema<T>() -> &'static str {
    type_name::<T>().rsplit("::").next().unwrap_or_default()
}

/// How long a body says it is.
fn announced(request: &Request<HttpBody>) -> Option<u64> {
    request.headers().get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// The whole body. It has some time to begin with, and more for each piece that came: what comes a byte at a time ends.
async fn read(request: Request<HttpBody>, most: usize, app: &App) -> Result<Vec<u8>, ApiError> {
    let too_large =
        || refuse(ErrorCode::TooLarge, format!("the body is larger than {most} bytes; send less"));
    if announced(&request).is_some_and(|length| length > most as u64) {
        return Err(too_large());
    }
    let (begun, limits) = (Instant::now(), &app.upkeep.limits);
    let mut body = Limited::new(request.into_body(), most);
    let mut bytes = Vec::new();
    loop {
        let pieces = u32::try_from(bytes.len() / PIECE).unwrap_or(u32::MAX);
        let until = begun + limits.body + limits.body_each.saturating_mul(pieces);
        match tokio::time::timeout_at(until, body.frame()).await {
            Ok(None) => return Ok(bytes),
            Ok(Some(Ok(frame))) => bytes.extend(frame.into_data().unwrap_or_default()),
            Ok(Some(Err(error))) if error.is::<LengthLimitError>() => return Err(too_large()),
            Ok(Some(Err(_))) => return Err(refuse(ErrorCode::Invalid, "the body broke off")),
            Err(_) => {
                let message = format!(
                    "the body took too long to arrive: {} bytes in {:.0} s; send it again over a better connection",
                    bytes.len(),
                    begun.elapsed().as_secs_f64()
                );
                return Err(refuse(ErrorCode::TooSlow, message));
            }
        }
    }
}
