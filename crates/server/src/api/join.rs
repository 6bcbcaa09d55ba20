//! Enrolment: a token and a signing request go in, a host with a certificate comes out.
//!
//! Invariant: the token's use is counted in the transaction that makes the host, so a token for one host lets in one. A
//! host that asks again with the key it joined with (its answer was lost) gets its certificate again, and no use is counted.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::{Extension, Json};
use model::api::{ApiError, ErrorCode, JoinAnswer, JoinRequest};
use model::{Driver, Host, HostId, JoinToken};

use super::extract::{Environment, StrangersJson};
use super::hosts::{check_labels, check_report, reached_at};
use super::networks::{collision, random};
use super::{Reply, Shared, refuse};
use crate::app::{App, Plan, now, put};
use crate::ca::Request;
use crate::keys::{Keys, Report, Token};
use crate::request;
use crate::secret;
use crate::serve::Peer;
use crate::state;
use crate::store::{Compare, Txn};

/// Lets a host in. The token is the credential.
#[utoipa::path(post, path = "/v1/environments/{environment}/join", tag = "agents", security(()),
    params(("environment" = String, Path)), request_body = JoinRequest,
    responses((status = 201, body = JoinAnswer), (status = "default", body = ApiError)))]
pub(super) async fn join(
    State(app): Shared,
    Environment(environment): Environment,
    Extension(peer): Extension<Peer>,
    StrangersJson(asked): StrangersJson<JoinRequest>,
) -> Reply<(StatusCode, Json<JoinAnswer>)> {
    let token: JoinToken = asked
        .token
        .parse()
        .map_err(|error: model::InvalidToken| refuse(ErrorCode::Invalid, error.to_string()))?;
    if token.ca != app.ca.fingerprint() {
        let message = "the join token is for another server: its CA fingerprint is not ours; copy the token from `droveway token create` of this server";
        return Err(refuse(ErrorCode::Unauthenticated, message).into());
    }
    app.read(&environment, |env| {
        known(env, &token)?;
        request::by(request::Who::Token(token.id.clone()));
        request::about(|| format!("host {:?}", asked.name.as_str()));
        valid(env, &token).map(drop)
    })?;
    let csr = Request::parse(&asked.csr).map_err(|error| refuse(ErrorCode::Invalid, error.to_string()))?;
    check_labels(&asked.labels)?;
    check_report(&asked.candidates, &asked.routes, "")?;
    let host = Host {
        id: HostId::from_random(random()?),
        name: asked.name.clone(),
        candidates: reached_at(&asked.candidates, peer.outside()),
        labels: asked.labels.clone(),
        key: csr.key().to_string(),
        joined: now(),
    };
    let keys = Keys(&environment);
    let turn = app.turn.lock().await;
    let ((id, new), _) = app
        .change(&environment, |env, revision| {
            let known = valid(env, &token)?;
            if let Some(id) = env.by_key.get(&host.key)
                && env.host_name(id) == host.name.as_str()
            {
                return Ok(Plan::Nothing((id.clone(), false)));
            }
            let counted = count(known).ok_or_else(|| useless(&token, "it is used up"))?;
            check(env, &host, &asked)?;
            let token_key = keys.token(&token.id);
            let compares = vec![
                Compare::Modified(token_key.clone(), env.modified(&token_key).unwrap_or_default()),
                Compare::Absent(keys.host_name(&host.name)),
                Compare::Absent(keys.host_key(&host.key)),
                Compare::Absent(keys.peer_name(&host.name)),
                Compare::NonePutSince(keys.networks(), revision),
            ];
            let puts = vec![
                put(token_key, &counted)?,
                put(keys.host(&host.id), &host)?,
                put(keys.host_name(&host.name), &host.id)?,
                put(keys.host_key(&host.key), &host.id)?,
                put(keys.report(&host.id), &Report { routes: asked.routes.clone(), version: String::new() })?,
            ];
            Ok(Plan::Commit(Txn::new(compares, puts), (host.id.clone(), true)))
        })
        .await?;
    drop(turn);
    tracing::info!(%environment, host = %host.name, %id, token = token.id, from = %peer.address, new, "host joined");
    Ok((StatusCode::CREATED, Json(answer(&app, &csr, environment, id)?)))
}

fn answer(
    app: &Arc<App>,
    csr: &Request,
    environment: model::EnvironmentId,
    host: HostId,
) -> Result<JoinAnswer, ApiError> {
    let certificate = app.ca.sign(csr, &host).map_err(|error| {
        tracing::error!(%error, %host, "no certificate could be made");
        refuse(ErrorCode::Internal, "a fault of the server; look at its log")
    })?;
    Ok(JoinAnswer { host, environment, certificate, ca: app.ca.pem().to_owned() })
}

/// That a token does not let anybody in.
fn useless(token: &JoinToken, why: &str) -> ApiError {
    let message = format!(
        "the join token is not valid: {why} (token {}); make another with `droveway token create`",
        token.id
    );
    refuse(ErrorCode::Unauthenticated, message)
}

/// The token of that id, if the secret is its.
fn known<'a>(env: &'a state::Environment, token: &JoinToken) -> Result<&'a Token, ApiError> {
    let hash = secret::sha256(token.secret.as_bytes());
    let known = env.tokens.get(&token.id).filter(|known| secret::same(&known.hash, &hash));
    known.ok_or_else(|| {
        useless(token, "it was never made here, or ended more than a day ago and is forgotten")
    })
}

/// The same, if it was not revoked and did not run out.
fn valid<'a>(env: &'a state::Environment, token: &JoinToken) -> Result<&'a Token, ApiError> {
    let known = known(env, token)?;
    if known.revoked.is_some() {
        return Err(useless(token, "it was revoked"));
    }
    if known.expires <= now() { Err(useless(token, "it expired")) } else { Ok(known) }
}

/// The token after one more use; `None` if it has none left.
fn count(token: &Token) -> Option<Token> {
    let mut token = token.clone();
    if let Some(left) = &mut token.uses_left {
        *left = left.checked_sub(1)?;
    }
    token.used = token.used.saturating_add(1);
    Some(token)
}

fn check(env: &state::Environment, host: &Host, asked: &JoinRequest) -> Result<(), ApiError> {
    let name = host.name.as_str();
    if name == "self" || name.parse::<HostId>().is_ok() {
        let message = format!("host {name:?}: the name is reserved; choose another --name");
        return Err(refuse(ErrorCode::Invalid, message));
    }
    if env.host(name).is_some() {
        let message = format!(
            "host \"{name}\" is there already; choose another --name, or remove the old one with `droveway host rm {name}`"
        );
        return Err(refuse(ErrorCode::Conflict, message));
    }
    let alike = |other: &&Host| other.name.as_str().eq_ignore_ascii_case(name);
    if let Some(other) = env.catalog.hosts.values().find(alike) {
        let message = format!(
            "host {name:?}: there is a host \"{}\" already, and names are looked up without regard to case; choose another --name",
            other.name
        );
        return Err(refuse(ErrorCode::Conflict, message));
    }
    if env.peer(name).is_some() {
        let message = format!("host \"{name}\": a foreign peer is called so; choose another --name");
        return Err(refuse(ErrorCode::Conflict, message));
    }
    if let Some(id) = env.by_key.get(&host.key) {
        let message = format!(
            "this host has joined as \"{}\"; start its agent without a token, or remove it with `droveway host rm` first",
            env.host_name(id)
        );
        return Err(refuse(ErrorCode::Conflict, message));
    }
    for network in env.catalog.networks.values() {
        if let Driver::Vxlan { port, .. } = network.driver
            && host.tunnels_by(port)
        {
            let message = format!(
                "host {name:?}: UDP port {port} is that of network \"{}\"; choose another --tunnel-port",
                network.name
            );
            return Err(refuse(ErrorCode::Conflict, message));
        }
        if let Some((pool, route)) = collision(&network.cidrs, &asked.routes) {
            let message = format!(
                "network \"{}\": pool {pool} overlaps route {} dev {} on host {name}; remove that route, or make the network anew with another --subnet",
                network.name, route.cidr, route.device
            );
            return Err(refuse(ErrorCode::Conflict, message));
        }
    }
    Ok(())
}
