//! Join tokens: made, listed, revoked. A token's secret is shown once and kept only as its digest.

use std::fmt::Write as _;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use model::JoinToken;
use model::api::{ApiError, ErrorCode, TokenCreated, TokenRequest, TokenView, path};

use super::extract::{self, Asked, Item, Person};
use super::networks::random;
use super::page::{Cut, Page};
use super::{Reply, Shared, refuse};
use crate::app::{Plan, now, put};
use crate::keys::{Keys, Token};
use crate::store::{Compare, Op, Txn};
use crate::{request, secret};

const DAY: u64 = 86_400;
const LONGEST: u64 = 10 * 365 * DAY;

/// Lists the tokens, without their secrets.
#[utoipa::path(get, path = "/v1/environments/{environment}/tokens", tag = "tokens",
    params(("environment" = String, Path), Page),
    responses((status = 200, body = Vec<TokenView>), (status = "default", body = ApiError)))]
pub(super) async fn list(State(app): Shared, person: Person, Asked(page): Asked<Page>) -> Reply<Response> {
    let cut = Cut::new(&app, &page)?;
    let chosen = app.read(&person.environment, |env| {
        let all = env.tokens.iter().map(|(id, token)| (format!("{:016x} {id}", token.created), (id, token)));
        let (tokens, next) = cut.choose(all);
        Ok((tokens.into_iter().map(|(id, token)| view(id, token)).collect::<Vec<_>>(), next))
    })?;
    Ok(cut.answer(&person.environment, path::TOKENS, chosen))
}

fn view(id: &str, token: &Token) -> TokenView {
    TokenView {
        id: id.to_owned(),
        created: token.created,
        expires: token.expires,
        uses_left: token.uses_left,
        used: token.used,
        revoked: token.revoked,
    }
}

/// Makes a token. Those that ran out more than a day ago are cleared away.
#[utoipa::path(post, path = "/v1/environments/{environment}/tokens", tag = "tokens",
    params(("environment" = String, Path)), request_body = TokenRequest,
    responses((status = 201, body = TokenCreated), (status = "default", body = ApiError)))]
pub(super) async fn create(
    State(app): Shared,
    person: Person,
    extract::Json(asked): extract::Json<TokenRequest>,
) -> Reply<(StatusCode, Json<TokenCreated>)> {
    if asked.uses == Some(0) {
        return Err(refuse(
            ErrorCode::Invalid,
            "uses is 0: nobody could join; use 1 or more, or leave it out",
        )
        .into());
    }
    let ttl = asked.ttl_seconds.unwrap_or(DAY);
    if !(1..=LONGEST).contains(&ttl) {
        return Err(refuse(ErrorCode::Invalid, format!("ttl_seconds is {ttl}; use 1 to {LONGEST}")).into());
    }
    let id = random::<5>()?.iter().fold(String::new(), |mut id, octet| {
        // Writing to a String does not fail.
        let _ = write!(id, "{octet:02x}");
        id
    });
    let secret = secret::secret().map_err(|error| refuse(ErrorCode::Internal, error.to_string()))?;
    let created = now();
    let token = Token {
        hash: secret::sha256(secret.as_bytes()),
        created,
        expires: created + ttl * 1000,
        uses_left: asked.uses,
        used: 0,
        revoked: None,
    };
    request::about(|| format!("token {id}"));
    let keys = Keys(&person.environment);
    app.change(&person.environment, |env, _| {
        let old = env.tokens.iter().filter(|(_, token)| token.expires + DAY * 1000 < created);
        let mut ops: Vec<Op> = old.map(|(id, _)| Op::Delete(keys.token(id))).collect();
        ops.push(put(keys.token(&id), &token)?);
        Ok(Plan::Commit(Txn::new(vec![Compare::Absent(keys.token(&id))], ops), ()))
    })
    .await?;
    tracing::info!(environment = %person.environment, by = %person, token = id, uses = ?asked.uses, ttl, "token made");
    let text = JoinToken { id: id.clone(), secret, ca: app.ca.fingerprint() }.reveal();
    Ok((StatusCode::CREATED, Json(TokenCreated { token: text, view: view(&id, &token) })))
}

/// Revokes a token: nobody joins with it any more. It stays in the list until a day after it would have expired. Hosts that joined with it stay.
#[utoipa::path(delete, path = "/v1/environments/{environment}/tokens/{id}", tag = "tokens",
    params(("environment" = String, Path), ("id" = String, Path)),
    responses((status = 204), (status = "default", body = ApiError)))]
pub(super) async fn remove(State(app): Shared, person: Person, Item(id): Item) -> Reply<StatusCode> {
    let keys = Keys(&person.environment);
    app.change(&person.environment, |env, _| {
        let known = env.tokens.get(&id).filter(|token| token.revoked.is_none());
        let known = known.ok_or_else(|| {
            let message = format!("no token {id:?}; `droveway token ls` lists those there are");
            refuse(ErrorCode::NotFound, message)
        })?;
        let key = keys.token(&id);
        let compare = Compare::Modified(key.clone(), env.modified(&key).unwrap_or_default());
        // It is kept, so that whoever comes with it hears why it is refused.
        let revoked = Token { revoked: Some(now()), ..known.clone() };
        Ok(Plan::Commit(Txn::new(vec![compare], vec![put(key, &revoked)?]), ()))
    })
    .await?;
    tracing::info!(environment = %person.environment, by = %person, token = id, "token revoked");
    Ok(StatusCode::NO_CONTENT)
}
