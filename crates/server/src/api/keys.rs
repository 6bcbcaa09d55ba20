//! Keys of people: made, listed, removed. A key's text is shown once and kept only as its digest.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use model::api::{ApiError, ErrorCode, KeyCreated, KeyRequest, KeyView, path};

use super::extract::{self, Asked, Item, Person};
use super::page::{Cut, Page};
use super::{Reply, Shared, refuse};
use crate::app::{Plan, now, put};
use crate::keys::{ApiKey, Keys};
use crate::start::{ADMIN, KEY_PREFIX};
use crate::store::{Compare, Op, Txn};
use crate::{request, secret};

const LONGEST: u64 = 10 * 365 * 86_400;

/// Lists the keys, without their texts.
#[utoipa::path(get, path = "/v1/environments/{environment}/keys", tag = "keys",
    params(("environment" = String, Path), Page),
    responses((status = 200, body = Vec<KeyView>), (status = "default", body = ApiError)))]
pub(super) async fn list(State(app): Shared, person: Person, Asked(page): Asked<Page>) -> Reply<Response> {
    let cut = Cut::new(&app, &page)?;
    let chosen = app.read(&person.environment, |env| {
        let (keys, next) = cut.choose(env.api_keys.iter().map(|(name, key)| (name.clone(), (name, key))));
        Ok((keys.into_iter().map(|(name, key)| view(name, key)).collect::<Vec<_>>(), next))
    })?;
    Ok(cut.answer(&person.environment, path::KEYS, chosen))
}

fn view(name: &str, key: &ApiKey) -> KeyView {
    KeyView { name: name.to_owned(), role: key.role, created: key.created, expires: key.expires }
}

/// Makes a key.
#[utoipa::path(post, path = "/v1/environments/{environment}/keys", tag = "keys",
    params(("environment" = String, Path)), request_body = KeyRequest,
    responses((status = 201, body = KeyCreated), (status = "default", body = ApiError)))]
pub(super) async fn create(
    State(app): Shared,
    person: Person,
    extract::Json(asked): extract::Json<KeyRequest>,
) -> Reply<(StatusCode, Json<KeyCreated>)> {
    if let Some(ttl) = asked.ttl_seconds.filter(|ttl| !(1..=LONGEST).contains(ttl)) {
        return Err(refuse(ErrorCode::Invalid, format!("ttl_seconds is {ttl}; use 1 to {LONGEST}")).into());
    }
    let name = asked.name.as_str();
    request::about(|| format!("key {name:?}, role {}", asked.role.as_str()));
    let secret = secret::secret().map_err(|error| refuse(ErrorCode::Internal, error.to_string()))?;
    let text = format!("{KEY_PREFIX}{secret}");
    let created = now();
    let key = ApiKey {
        hash: secret::sha256(text.as_bytes()),
        created,
        role: asked.role,
        expires: asked.ttl_seconds.map(|ttl| created + ttl * 1000),
    };
    let place = Keys(&person.environment).api_key(name);
    app.change(&person.environment, |env, _| {
        // One that has ended gives its name up.
        if env.api_keys.get(name).is_some_and(|known| !known.has_ended(created)) {
            let message = format!("key {name:?} is there already; choose another name, or remove it with `droveway key rm {name}`");
            return Err(refuse(ErrorCode::Conflict, message));
        }
        let compare = match env.modified(&place) {
            Some(revision) => Compare::Modified(place.clone(), revision),
            None => Compare::Absent(place.clone()),
        };
        Ok(Plan::Commit(Txn::new(vec![compare], vec![put(place.clone(), &key)?]), ()))
    })
    .await?;
    tracing::info!(environment = %person.environment, by = %person, key = name, role = asked.role.as_str(), "key made");
    Ok((StatusCode::CREATED, Json(KeyCreated { key: text, view: view(name, &key) })))
}

/// Removes a key: whoever has it can do nothing with it from then on.
#[utoipa::path(delete, path = "/v1/environments/{environment}/keys/{id}", tag = "keys",
    params(("environment" = String, Path), ("id" = String, Path, description = "Name.")),
    responses((status = 204), (status = "default", body = ApiError)))]
pub(super) async fn remove(State(app): Shared, person: Person, Item(name): Item) -> Reply<StatusCode> {
    if name == ADMIN {
        let message = "key \"admin\" is that of the server's admin.key file; to have another, remove the file and start the server again";
        return Err(refuse(ErrorCode::InUse, message).into());
    }
    let place = Keys(&person.environment).api_key(&name);
    app.change(&person.environment, |env, _| {
        if !env.api_keys.contains_key(&name) {
            let message = format!("no key {name:?}; `droveway key ls` lists those there are");
            return Err(refuse(ErrorCode::NotFound, message));
        }
        let compares = vec![Compare::Present(place.clone())];
        Ok(Plan::Commit(Txn::new(compares, vec![Op::Delete(place.clone())]), ()))
    })
    .await?;
    tracing::info!(environment = %person.environment, by = %person, key = name, "key removed");
    Ok(StatusCode::NO_CONTENT)
}
