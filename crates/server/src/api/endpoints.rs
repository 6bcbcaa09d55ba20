//! Endpoints: looked at by people, kept by the agent of their host.

use std::net::IpAddr;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use model::api::{ApiError, ErrorCode, path};
use model::{Endpoint, EndpointId, Network};

use super::extract::{self, Agent, Asked, Item, Person};
use super::page::{Cut, Page};
use super::{Reply, Shared, refuse};
use crate::app::{Plan, put as put_op};
use crate::keys::Keys;
use crate::state::Environment;
use crate::store::{Compare, Op, Txn};

/// Lists the endpoints.
#[utoipa::path(get, path = "/v1/environments/{environment}/endpoints", tag = "endpoints",
    params(("environment" = String, Path), Page),
    responses((status = 200, body = Vec<Endpoint>), (status = "default", body = ApiError)))]
pub(super) async fn list(State(app): Shared, person: Person, Asked(page): Asked<Page>) -> Reply<Response> {
    let cut = Cut::new(&app, &page)?;
    let chosen = app.read(&person.environment, |env| {
        let all = env.catalog.endpoints().map(|endpoint| (endpoint.id.to_string(), endpoint));
        let (endpoints, next) = cut.choose(all);
        Ok((endpoints.into_iter().cloned().collect::<Vec<_>>(), next))
    })?;
    Ok(cut.answer(&person.environment, path::ENDPOINTS, chosen))
}

/// Looks at an endpoint.
#[utoipa::path(get, path = "/v1/environments/{environment}/endpoints/{id}", tag = "endpoints",
    params(("environment" = String, Path), ("id" = String, Path)),
    responses((status = 200, body = Endpoint), (status = "default", body = ApiError)))]
pub(super) async fn get(State(app): Shared, person: Person, Item(id): Item) -> Reply<Json<Endpoint>> {
    let id = parse(&id)?;
    Ok(Json(app.read(&person.environment, |env| {
        env.catalog.endpoint(&id).cloned().ok_or_else(|| {
            refuse(
                ErrorCode::NotFound,
                format!("no endpoint {id}; `droveway endpoint ls` lists those there are"),
            )
        })
    })?))
}

/// Keeps an endpoint of the agent's own host.
#[utoipa::path(put, path = "/v1/environments/{environment}/endpoints/{id}", tag = "agents",
    params(("environment" = String, Path), ("id" = String, Path)), request_body = Endpoint,
    responses((status = 200, body = Endpoint), (status = "default", body = ApiError)))]
pub(super) async fn put(
    State(app): Shared,
    agent: Agent,
    Item(id): Item,
    extract::Json(endpoint): extract::Json<Endpoint>,
) -> Reply<Json<Endpoint>> {
    let id = parse(&id)?;
    if endpoint.id != id {
        let message = format!("the body is endpoint {}, the path {id}; send it to its own path", endpoint.id);
        return Err(refuse(ErrorCode::Invalid, message).into());
    }
    check(&endpoint)?;
    let keys = Keys(&agent.environment);
    let (made, _) = app
        .change(&agent.environment, |env, _| {
            if endpoint.host != agent.host {
                let message = format!(
                    "endpoint {id} is said to be on host {}; {agent} may keep its own only",
                    env.host_name(&endpoint.host)
                );
                return Err(refuse(ErrorCode::Forbidden, message));
            }
            let Some(network) = env.catalog.networks.get(&endpoint.network) else {
                let message = format!("endpoint {id}: no network {}; it was removed", endpoint.network);
                return Err(refuse(ErrorCode::NotFound, message));
            };
            let key = keys.endpoint(&id);
            let mut compares =
                vec![Compare::Present(keys.host(&agent.host)), Compare::Present(keys.network(&network.id))];
            match env.catalog.endpoint(&id) {
                None => compares.push(Compare::Absent(key.clone())),
                Some(old) if old.host != agent.host => return Err(foreign(env, old, &agent)),
                Some(old) if *old == endpoint => return Ok(Plan::Nothing(None)),
                Some(old) if old.network != endpoint.network => {
                    let message = format!(
                        "endpoint {id} is in network {}; remove it and make another in {}",
                        old.network, network.name
                    );
                    return Err(refuse(ErrorCode::Conflict, message));
                }
                Some(_) => {
                    compares.push(Compare::Modified(key.clone(), env.modified(&key).unwrap_or_default()));
                }
            }
            for address in &endpoint.addresses {
                compares.push(authority(&keys, env, network, &endpoint, *address)?);
            }
            let made = !env.catalog.endpoints.contains_key(&id);
            Ok(Plan::Commit(Txn::new(compares, vec![put_op(key, &endpoint)?]), Some(made)))
        })
        .await?;
    if let Some(made) = made {
        let (environment, host) = (&agent.environment, &agent.name);
        let name = endpoint.name.as_ref().map_or("", |name| name.as_str());
        let what = if made { "endpoint made" } else { "endpoint changed" };
        tracing::info!(%environment, %host, endpoint = %id, name, addresses = ?endpoint.addresses, "{what}");
    }
    Ok(Json(endpoint))
}

/// By what right the endpoint's host uses the address: one of its blocks, or a claim for this endpoint. The compare
/// makes the transaction depend on it.
fn authority(
    keys: &Keys<'_>,
    env: &Environment,
    network: &Network,
    endpoint: &Endpoint,
    address: IpAddr,
) -> Result<Compare, ApiError> {
    let (geometry, name) = (network.geometry(), &network.name);
    if !geometry.assignable(address) {
        let message = format!(
            "endpoint {}: address {address} is outside the pool {} of network \"{name}\", or is its network, broadcast or gateway address",
            endpoint.id,
            network.pool()
        );
        return Err(refuse(ErrorCode::Invalid, message));
    }
    if let Some(holder) = env.holder(&network.id, address).filter(|holder| holder.id != endpoint.id) {
        let who = holder.name.as_ref().map_or(holder.id.as_str(), |name| name.as_str());
        let message = format!(
            "endpoint {}: address {address} of network \"{name}\" is that of endpoint {who} on host {}; use another",
            endpoint.id,
            env.host_name(&holder.host)
        );
        return Err(refuse(ErrorCode::Conflict, message));
    }
    let claim = env.catalog.claims.get(&(network.id.clone(), address)).filter(|claim| !claim.asked);
    if let Some(claim) = claim {
        if claim.host != endpoint.host {
            let message = format!(
                "endpoint {}: address {address} of network \"{name}\" is claimed by host {}; use another",
                endpoint.id,
                env.host_name(&claim.host)
            );
            return Err(refuse(ErrorCode::Conflict, message));
        }
        let key = keys.claim(&network.id, &address);
        let revision = env.modified(&key).unwrap_or_default();
        return Ok(Compare::Modified(key, revision));
    }
    let block =
        geometry.block_of(address).and_then(|(cidr, _)| env.catalog.blocks.get(&(network.id.clone(), cidr)));
    if let Some(block) = block.filter(|block| block.host == endpoint.host) {
        // Not by the revision of its lease, which may be one of a life of the store before this.
        let key = keys.block(&network.id, &block.cidr);
        let revision = env.modified(&key).unwrap_or_default();
        return Ok(Compare::Modified(key, revision));
    }
    let message = format!(
        "endpoint {}: address {address} of network \"{name}\" is neither in a block of its host nor claimed for it; lease a block or claim the address first",
        endpoint.id
    );
    Err(refuse(ErrorCode::Conflict, message))
}

fn check(endpoint: &Endpoint) -> Result<(), ApiError> {
    endpoint.check().map_err(|why| refuse(ErrorCode::Invalid, format!("endpoint {}: {why}", endpoint.id)))
}

/// Takes away an endpoint of the agent's own host. One that is not there is no error: an answer may have been lost.
#[utoipa::path(delete, path = "/v1/environments/{environment}/endpoints/{id}", tag = "agents",
    params(("environment" = String, Path), ("id" = String, Path)),
    responses((status = 204), (status = "default", body = ApiError)))]
pub(super) async fn remove(State(app): Shared, agent: Agent, Item(id): Item) -> Reply<StatusCode> {
    let id = parse(&id)?;
    let key = Keys(&agent.environment).endpoint(&id);
    let (removed, _) = app
        .change(&agent.environment, |env, _| match env.catalog.endpoint(&id) {
            None => Ok(Plan::Nothing(false)),
            Some(endpoint) if endpoint.host != agent.host => Err(foreign(env, endpoint, &agent)),
            Some(_) => {
                let compare = Compare::Modified(key.clone(), env.modified(&key).unwrap_or_default());
                Ok(Plan::Commit(Txn::new(vec![compare], vec![Op::Delete(key.clone())]), true))
            }
        })
        .await?;
    if removed {
        tracing::info!(environment = %agent.environment, host = %agent.name, endpoint = %id, "endpoint removed");
    }
    Ok(StatusCode::NO_CONTENT)
}

fn foreign(env: &Environment, endpoint: &Endpoint, agent: &Agent) -> ApiError {
    let host = env.host_name(&endpoint.host);
    refuse(
        ErrorCode::Forbidden,
        format!("endpoint {} is on host {host}; {agent} may change its own only", endpoint.id),
    )
}

fn parse(id: &str) -> Result<EndpointId, ApiError> {
    id.parse().map_err(|error: model::InvalidId| refuse(ErrorCode::Invalid, error.to_string()))
}
