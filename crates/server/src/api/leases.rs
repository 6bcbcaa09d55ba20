//! Blocks and claims: what gives a host's agent authority over addresses.

use std::net::IpAddr;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use model::api::{ApiError, ClaimRequest, ErrorCode, GiveBack, LeaseRequest, ReleaseClaim, path};
use model::{Block, Claim, Driver, Network, Revision};

use super::extract::{self, Agent, Asked, Caller};
use super::hosts::find as find_host;
use super::networks::find;
use super::page::{Cut, Page};
use super::{Reply, Shared, adopt, refuse};
use crate::app::{Plan, put};
use crate::ipam::{self, Lease};
use crate::keys::Keys;
use crate::request;
use crate::state::Environment;
use crate::store::{Compare, Op, Txn};

/// Lists the leased blocks.
#[utoipa::path(get, path = "/v1/environments/{environment}/blocks", tag = "addresses",
    params(("environment" = String, Path), Page),
    responses((status = 200, body = Vec<Block>), (status = "default", body = ApiError)))]
pub(super) async fn list(State(app): Shared, caller: Caller, Asked(page): Asked<Page>) -> Reply<Response> {
    let cut = Cut::new(&app, &page)?;
    let chosen = app.read(&caller.environment, |env| {
        // In the order of the catalog, whatever addresses look like as text.
        let all = env.catalog.blocks.values().map(|block| (place(block), block));
        let (blocks, next) = cut.choose(all);
        Ok((blocks.into_iter().cloned().collect::<Vec<_>>(), next))
    })?;
    Ok(cut.answer(&caller.environment, path::BLOCKS, chosen))
}

/// A text that sorts as network, family and address do.
fn place(block: &Block) -> String {
    let base = match block.cidr.network() {
        IpAddr::V4(v4) => format!("4-{:08x}", v4.to_bits()),
        IpAddr::V6(v6) => format!("6-{:032x}", v6.to_bits()),
    };
    format!("{} {base}/{:03}", block.network, block.cidr.prefix_len())
}

/// Leases one more block to the agent's host.
#[utoipa::path(post, path = "/v1/environments/{environment}/blocks", tag = "agents",
    params(("environment" = String, Path)), request_body = LeaseRequest,
    responses((status = 201, body = Block), (status = "default", body = ApiError)))]
pub(super) async fn lease(
    State(app): Shared,
    agent: Agent,
    extract::Json(asked): extract::Json<LeaseRequest>,
) -> Reply<(StatusCode, Json<Block>)> {
    let keys = Keys(&agent.environment);
    let turn = app.turn.lock().await;
    let ((mut block, name), revision) = app
        .change(&agent.environment, |env, revision| {
            let network = find(env, &asked.network)?;
            let cidr = match ipam::lease(env, network, &agent.host, asked.held)? {
                Lease::Held(block) => return Ok(Plan::Nothing((block, network.name.clone()))),
                Lease::Free(cidr) => cidr,
            };
            adopt::all_reported(env)?;
            passes_nat(env, network, &agent)?;
            let block = Block {
                network: network.id.clone(),
                cidr,
                host: agent.host.clone(),
                leased: Revision::default(),
            };
            let key = keys.block(&network.id, &cidr);
            let compares = vec![
                Compare::Absent(key.clone()),
                Compare::Present(keys.network(&network.id)),
                Compare::Present(keys.host(&agent.host)),
                // The same request twice at the same time must not get two blocks.
                Compare::NonePutSince(keys.blocks(&network.id), revision),
            ];
            let txn = Txn::new(compares, vec![put(key, &block)?]);
            Ok(Plan::Commit(txn, (block, network.name.clone())))
        })
        .await?;
    drop(turn);
    if block.leased == Revision::default() {
        block.leased = revision;
        let (environment, host) = (&agent.environment, &agent.name);
        request::about(|| format!("block {} of network {:?}", block.cidr, name.as_str()));
        tracing::info!(%environment, %host, network = %name, block = %block.cidr, "block leased");
    }
    Ok((StatusCode::CREATED, Json(block)))
}

/// Refuses a host behind a NAT on a network whose packets pass none. What it holds already it keeps.
fn passes_nat(env: &Environment, network: &Network, agent: &Agent) -> Result<(), ApiError> {
    match network.driver {
        Driver::Ipsec => return Ok(()),
        Driver::Vxlan { .. } => {}
    }
    let host = find_host(env, agent.host.as_str())?;
    match host.outside().filter(|_| host.behind_nat()) {
        None => Ok(()),
        Some(outside) => {
            let message = format!(
                "network \"{}\" is vxlan, whose packets pass no NAT, and {agent} is behind one: it comes from {}, which is \
                 not its own; use a network of --driver ipsec, or run its agent with the --address at which others \
                 reach it",
                network.name, outside.address
            );
            Err(refuse(ErrorCode::Conflict, message))
        }
    }
}

/// Gives a block back. One that nobody holds is no error: an answer may have been lost.
#[utoipa::path(delete, path = "/v1/environments/{environment}/blocks", tag = "agents",
    params(("environment" = String, Path)), request_body = GiveBack,
    responses((status = 204), (status = "default", body = ApiError)))]
pub(super) async fn give_back(
    State(app): Shared,
    agent: Agent,
    extract::Json(given): extract::Json<GiveBack>,
) -> Reply<StatusCode> {
    let keys = Keys(&agent.environment);
    let turn = app.turn.lock().await;
    let (name, _) = app
        .change(&agent.environment, |env, revision| {
            let network = find(env, &given.network)?;
            let Some(block) = env.catalog.blocks.get(&(network.id.clone(), given.cidr)) else {
                return Ok(Plan::Nothing(None));
            };
            if block.host != agent.host {
                let message = format!(
                    "block {} is leased to host {}; {agent} may give back its own only",
                    block.cidr,
                    env.host_name(&block.host)
                );
                return Err(refuse(ErrorCode::Forbidden, message));
            }
            let inside = |address: &std::net::IpAddr| block.cidr.contains(address);
            let users = env.endpoints_of_host(&agent.host);
            let users = users
                .filter(|endpoint| endpoint.network == network.id && endpoint.addresses.iter().any(inside));
            let users: Vec<String> = users
                .map(|e| e.name.as_ref().map_or_else(|| e.id.to_string(), ToString::to_string))
                .collect();
            if !users.is_empty() {
                let users = ipam::list(users, 10);
                let message = format!(
                    "block {} of network \"{}\" is in use by {users}; remove them first",
                    block.cidr, network.name
                );
                return Err(refuse(ErrorCode::InUse, message));
            }
            let key = keys.block(&network.id, &block.cidr);
            let compares = vec![
                Compare::Modified(key.clone(), env.modified(&key).unwrap_or_default()),
                Compare::NonePutSince(keys.endpoints(), revision),
            ];
            Ok(Plan::Commit(Txn::new(compares, vec![Op::Delete(key)]), Some(network.name.clone())))
        })
        .await?;
    drop(turn);
    if let Some(network) = name {
        let (environment, host) = (&agent.environment, &agent.name);
        request::about(|| format!("block {} of network {:?}", given.cidr, network.as_str()));
        tracing::info!(%environment, %host, %network, block = %given.cidr, "block given back");
    }
    Ok(StatusCode::NO_CONTENT)
}

/// Holds one given address for an endpoint of the agent's host.
#[utoipa::path(post, path = "/v1/environments/{environment}/claims", tag = "agents",
    params(("environment" = String, Path)), request_body = ClaimRequest,
    responses((status = 201, body = Claim), (status = "default", body = ApiError)))]
pub(super) async fn claim(
    State(app): Shared,
    agent: Agent,
    extract::Json(asked): extract::Json<ClaimRequest>,
) -> Reply<(StatusCode, Json<Claim>)> {
    let keys = Keys(&agent.environment);
    let ((claim, name), _) = app
        .change(&agent.environment, |env, _| {
            let network = find(env, &asked.network)?;
            let claim = Claim {
                network: network.id.clone(),
                address: asked.address,
                host: agent.host.clone(),
                endpoint: asked.endpoint.clone(),
            };
            if !ipam::claim(env, network, &claim)? {
                return Ok(Plan::Nothing((claim, None)));
            }
            adopt::all_reported(env)?;
            passes_nat(env, network, &agent)?;
            let key = keys.claim(&network.id, &claim.address);
            let compares = vec![
                Compare::Absent(key.clone()),
                Compare::Present(keys.network(&network.id)),
                Compare::Present(keys.host(&agent.host)),
            ];
            let txn = Txn::new(compares, vec![put(key, &claim)?]);
            Ok(Plan::Commit(txn, (claim, Some(network.name.clone()))))
        })
        .await?;
    if let Some(network) = name {
        let (environment, host) = (&agent.environment, &agent.name);
        request::about(|| format!("address {} of network {:?}", claim.address, network.as_str()));
        tracing::info!(%environment, %host, %network, address = %claim.address, endpoint = %claim.endpoint, "address claimed");
    }
    Ok((StatusCode::CREATED, Json(claim)))
}

/// Lets a claimed address go. One that nobody holds is no error: an answer may have been lost.
#[utoipa::path(delete, path = "/v1/environments/{environment}/claims", tag = "agents",
    params(("environment" = String, Path)), request_body = ReleaseClaim,
    responses((status = 204), (status = "default", body = ApiError)))]
pub(super) async fn release(
    State(app): Shared,
    agent: Agent,
    extract::Json(given): extract::Json<ReleaseClaim>,
) -> Reply<StatusCode> {
    let keys = Keys(&agent.environment);
    let (name, _) = app
        .change(&agent.environment, |env, revision| {
            let network = find(env, &given.network)?;
            let Some(claim) = env.catalog.claims.get(&(network.id.clone(), given.address)) else {
                return Ok(Plan::Nothing(None));
            };
            if claim.host != agent.host {
                let host = env.host_name(&claim.host);
                let message = format!(
                    "address {} is claimed by host {host}; {agent} may release its own only",
                    claim.address
                );
                return Err(refuse(ErrorCode::Forbidden, message));
            }
            if let Some(endpoint) = env.holder(&network.id, claim.address) {
                let message =
                    format!("address {} is that of endpoint {}; remove it first", claim.address, endpoint.id);
                return Err(refuse(ErrorCode::InUse, message));
            }
            let key = keys.claim(&network.id, &claim.address);
            let compares = vec![
                Compare::Modified(key.clone(), env.modified(&key).unwrap_or_default()),
                Compare::NonePutSince(keys.endpoints(), revision),
            ];
            Ok(Plan::Commit(Txn::new(compares, vec![Op::Delete(key)]), Some(network.name.clone())))
        })
        .await?;
    if let Some(network) = name {
        let (environment, host) = (&agent.environment, &agent.name);
        request::about(|| format!("address {} of network {:?}", given.address, network.as_str()));
        tracing::info!(%environment, %host, %network, address = %given.address, "claim released");
    }
    Ok(StatusCode::NO_CONTENT)
}
