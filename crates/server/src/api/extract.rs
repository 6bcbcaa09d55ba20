//! Who asks, for what, and with which body: the edge where text becomes values.

use std::any::type_name;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body as HttpBody;
use axum::extract::{FromRequest, FromRequestParts, Query, RawPathParams, Request};
use axum::http::HeaderValue;
use axum::http::header::{AUTHORIZATION, CONTENT_LENGTH};
use axum::http::request::Parts;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use model::api::{ApiError, BODY_MAX, ErrorCode};
use model::{EnvironmentId, HostId};
use serde::de::DeserializeOwned;

use super::{Refusal, refuse};
use crate::app::{App, no_environment};
use crate::secret;
use crate::serve::Peer;
use crate::state::State;

/// How long a body may take to arrive.
const BODY_TIME: Duration = Duration::from_secs(30);
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
    /// A person, by the name of the key.
    Person(String),
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
    /// Where it comes from, as far as that says how the host is reached ([`Peer::outside`]).
    pub(super) outside: Option<IpAddr>,
}

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
        let wanted = parameter(parts, app, "environment").await?;
        let state = app.shared.read();
        let (environment, who) = if let Some(header) = parts.headers.get(AUTHORIZATION) {
            person(&state, header, &wanted)?
        } else {
            agent(&state, parts.extensions.get::<Peer>())?
        };
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
        if let Who::Agent(host, _) = &who {
            app.presence.saw(host);
        }
        Ok(Self { environment, who })
    }
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
    let (id, (name, _)) = here.ok_or_else(unknown)?;
    Ok(((*id).clone(), Who::Person((*name).clone())))
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
            Who::Person(name) => Ok(Self { environment, name }),
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
        let Caller { environment, who } = Caller::from_request_parts(parts, app).await?;
        match who {
            Who::Agent(host, name) => {
                let outside = parts.extensions.get::<Peer>().and_then(Peer::outside);
                Ok(Self { environment, host, name, outside })
            }
            Who::Person(_) => {
                let message = "this is for agents: it needs the client certificate of a host, not a key";
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

    async fn from_request(request: Request, _: &Arc<App>) -> Result<Self, Refusal> {
        Ok(Self(parse(&read(request, BODY_MAX).await?)?))
    }
}

/// A body in JSON that holds a secret: what is wrong with it is told without a word of it.
pub(super) struct SecretJson<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequest<Arc<App>> for SecretJson<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, _: &Arc<App>) -> Result<Self, Refusal> {
        let body = read(request, BODY_MAX).await?;
        Ok(Self(serde_json::from_slice(&body).map_err(|error| {
            let (what, line, column) = (schema::<T>(), error.line(), error.column());
            let message = format!(
                "the body is not a {what} in JSON: line {line} column {column} is not as /openapi.json has it"
            );
            refuse(ErrorCode::Invalid, message)
        })?))
    }
}

/// A body in JSON from someone who has shown no credentials: it is smaller, and few are read at a time, so strangers can
/// neither fill the memory nor stop anybody but those who join.
pub(super) struct StrangersJson<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequest<Arc<App>> for StrangersJson<T> {
    type Rejection = Refusal;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, Refusal> {
        let _turn = app.strangers.acquire().await;
        Ok(Self(parse(&read(request, STRANGERS_BODY_MAX).await?)?))
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

async fn read(request: Request<HttpBody>, most: usize) -> Result<Vec<u8>, ApiError> {
    let too_large =
        || refuse(ErrorCode::TooLarge, format!("the body is larger than {most} bytes; send less"));
    let announced =
        request.headers().get(CONTENT_LENGTH).and_then(|length| length.to_str().ok()?.parse().ok());
    if announced.is_some_and(|length: u64| length > most as u64) {
        return Err(too_large());
    }
    let body = Limited::new(request.into_body(), most).collect();
    match tokio::time::timeout(BODY_TIME, body).await {
        Ok(Ok(body)) => Ok(body.to_bytes().into()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(too_large()),
        Ok(Err(_)) => Err(refuse(ErrorCode::Invalid, "the body broke off")),
        Err(_) => Err(refuse(ErrorCode::Invalid, "the body took too long to arrive")),
    }
}
