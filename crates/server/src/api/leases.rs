//! Blocks and claims: what gives a host's agent authority over addresses.

use std::net::IpAddr;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use model::api::{
    ApiError, ClaimRequest, Consent, ErrorCode, GiveBack, Heard, IpamView, LeaseRequest, ReleaseClaim, path,
};
use model::{Block, Claim, Driver, Network, Retained, Revision};

use super::extract::{self, Agent, Asked, Caller, Person};
use super::hosts::find as find_host;
use super::networks::find;
use super::page::{Cut, Page};
use super::{Reply, Shared, adopt, refuse};
use crate::app::{App, Plan};
use crate::ipam::{self, Grant};
use crate::keys::Keys;
use crate::presence;
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
            let name = network.name.clone();
            request::about(|| format!("a block of network {:?}", name.as_str()));
            Ok(match ipam::lease(keys, env, revision, network, &agent.host, asked.held)? {
                Grant::Held(txn, block) => Plan::Commit(txn, (block, name)),
                Grant::New(txn, block) => {
                    adopt::all_reported(env)?;
                    passes_nat(env, network, &agent)?;
                    request::about(|| format!("block {} of network {:?}", block.cidr, name.as_str()));
                    Plan::Commit(txn, (block, name))
                }
            })
        })
        .await?;
    drop(turn);
    if block.leased == Revision::default() {
        block.leased = revision;
        let (environment, host) = (&agent.environment, &agent.name);
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
            request::about(|| format!("block {} of network {:?}", given.cidr, network.name.as_str()));
            let txn = ipam::give_back(keys, env, revision, network, &agent.host, given.cidr, given.leased)?;
            Ok(txn.map_or(Plan::Nothing(None), |txn| Plan::Commit(txn, Some(network.name.clone()))))
        })
        .await?;
    drop(turn);
    if let Some(network) = name {
        let (environment, host) = (&agent.environment, &agent.name);
        tracing::info!(%environment, %host, %network, block = %given.cidr, "block given back");
    }
    Ok(StatusCode::NO_CONTENT)
}

/// Holds one address for an endpoint of the agent's host, or for its router. One in another host's block is granted when that
/// host has let go of it; if it does not within a few seconds, nothing is changed.
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
        .change(&agent.environment, |env, revision| {
            let network = find(env, &asked.network)?;
            let owner = asked.retain.as_deref().filter(|_| asked.address.is_none() && !asked.router);
            if let Some(claim) = owner.and_then(|owner| ipam::retained(env, network, owner)) {
                about_address(claim.address, network);
                let (host, endpoint) = (&agent.host, &asked.endpoint);
                return Ok(match ipam::move_retained(keys, env, revision, claim, (host, endpoint))? {
                    Grant::Held(txn, claim) => Plan::Commit(txn, (claim, None)),
                    Grant::New(txn, asked) => {
                        adopt::all_reported(env)?;
                        passes_nat(env, network, &agent)?;
                        if !presence::of(&app, env, &claim.host).0 {
                            return Err(not_there(env, claim));
                        }
                        Plan::Commit(txn, (asked, Some(network.name.clone())))
                    }
                });
            }
            let of_endpoint = |claim: &&Claim| claim.endpoint == asked.endpoint && claim.host == agent.host;
            let address = match (asked.address, env.claims_of(&network.id).find(of_endpoint)) {
                (Some(address), _) => address,
                (None, Some(held)) => held.address,
                (None, None) if owner.is_some() => ipam::unretained(env, network)?,
                (None, None) => ipam::single(env, network)?,
            };
            about_address(address, network);
            let retained =
                owner.map(|owner| Retained { owner: owner.to_owned(), seconds: app.retain.as_secs() });
            let claim = Claim {
                network: network.id.clone(),
                address,
                host: agent.host.clone(),
                endpoint: asked.endpoint.clone(),
                asked: false,
                router: asked.router,
                retained,
                wanted: None,
            };
            Ok(match ipam::claim(keys, env, revision, network, &claim)? {
                Grant::Held(txn, claim) => Plan::Commit(txn, (claim, None)),
                Grant::New(txn, claim) => {
                    adopt::all_reported(env)?;
                    passes_nat(env, network, &agent)?;
                    Plan::Commit(txn, (claim, Some(network.name.clone())))
                }
            })
        })
        .await?;
    let claim = if claim.asked {
        granted(&app, &agent, &claim).await?
    } else if claim.host != agent.host {
        moved(&app, &agent, &claim).await?
    } else {
        claim
    };
    if let Some(network) = name {
        let (environment, host) = (&agent.environment, &agent.name);
        tracing::info!(%environment, %host, %network, address = %claim.address, endpoint = %claim.endpoint, "address claimed");
    }
    Ok((StatusCode::CREATED, Json(claim)))
}

fn about_address(address: IpAddr, network: &Network) {
    request::about(|| format!("address {address} of network {:?}", network.name.as_str()));
}

/// How long the holder of a block may take to let go of an address.
const CONSENT: Duration = Duration::from_secs(8);

/// Waits until the holder of the block has let go of the address; takes the claim back if it does not.
async fn granted(app: &App, agent: &Agent, claim: &Claim) -> Result<Claim, ApiError> {
    let name = (claim.network.clone(), claim.address);
    let look = || -> Result<Option<Claim>, ApiError> {
        app.read(&agent.environment, |env| Ok(env.catalog.claims.get(&name).cloned()))
    };
    let holder = app.read(&agent.environment, |env| {
        let block = env.blocks_of(&claim.network).find(|block| block.cidr.contains(&claim.address));
        Ok(block
            .map(|block| (block.cidr.to_string(), block.host.clone(), env.host_name(&block.host).to_owned())))
    })?;
    let (cidr, holder, host) = holder.unwrap_or_else(|| ("?".into(), agent.host.clone(), "?".into()));
    let mut revisions = app.shared.subscribe();
    let deadline = tokio::time::Instant::now() + CONSENT;
    loop {
        revisions.borrow_and_update();
        match look()? {
            Some(now) if now.host != claim.host || now.endpoint != claim.endpoint => break,
            Some(now) if !now.asked => return Ok(now),
            Some(_) => {}
            None => {
                let message = format!(
                    "address {} lies in block {cidr} of host {host}, which uses it; choose another",
                    claim.address
                );
                return Err(refuse(ErrorCode::Conflict, message));
            }
        }
        match tokio::time::timeout_at(deadline, revisions.changed()).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) | Err(_) => break,
        }
    }
    let keys = Keys(&agent.environment);
    let ((), _) = app
        .change(&agent.environment, |env, _| {
            let key = keys.claim(&claim.network, &claim.address);
            Ok(match env.catalog.claims.get(&name) {
                Some(now) if now == claim => {
                    let modified = env.modified(&key).unwrap_or_default();
                    let compares = vec![Compare::Modified(key.clone(), modified)];
                    Plan::Commit(Txn::new(compares, vec![Op::Delete(key)]), ())
                }
                Some(_) | None => Plan::Nothing(()),
            })
        })
        .await?;
    // It may have been granted at the last moment.
    if let Some(now) = look()?.filter(|now| !now.asked && now.host == claim.host) {
        return Ok(now);
    }
    let there = app.read(&agent.environment, |env| Ok(presence::of(app, env, &holder).0))?;
    let how = if there { "does not answer in time" } else { "is not connected" };
    let message = format!(
        "address {} lies in block {cidr} of host {host}, which has to let go of it first and {how}; choose another, or \
         try again later",
        claim.address
    );
    Err(refuse(ErrorCode::Unavailable, message))
}

/// That the host which has a retained address is not there.
fn not_there(env: &Environment, claim: &Claim) -> ApiError {
    let host = env.host_name(&claim.host);
    let message = format!(
        "address {} is retained for it on host {host}, which has to let go of it first and is not connected; \
         `droveway host rm {host}` if it is gone for good",
        claim.address
    );
    refuse(ErrorCode::Unavailable, message)
}

/// Waits until the host that has a retained address has let go of it; asks no more if it does not.
async fn moved(app: &App, agent: &Agent, asked: &Claim) -> Result<Claim, ApiError> {
    let name = (asked.network.clone(), asked.address);
    let look = || app.read(&agent.environment, |env| Ok(env.catalog.claims.get(&name).cloned()));
    let wanted = |claim: &Claim| claim.wanted == asked.wanted;
    let ours = |claim: &Claim| {
        claim.host == agent.host && asked.wanted.as_ref().is_some_and(|it| it.endpoint == claim.endpoint)
    };
    let mut revisions = app.shared.subscribe();
    let deadline = tokio::time::Instant::now() + CONSENT;
    while look()?.is_some_and(|claim| wanted(&claim)) {
        if !matches!(tokio::time::timeout_at(deadline, revisions.changed()).await, Ok(Ok(()))) {
            break;
        }
    }
    let keys = Keys(&agent.environment);
    app.change(&agent.environment, |env, _| {
        Ok(ipam::ask_no_more(keys, env, asked)?.map_or(Plan::Nothing(()), |txn| Plan::Commit(txn, ())))
    })
    .await?;
    // It may have been granted at the last moment.
    match look()?.filter(ours) {
        Some(claim) => Ok(claim),
        None => {
            let message = app.read(&agent.environment, |env| Ok(env.host_name(&asked.host).to_owned()))?;
            let message = format!(
                "address {} is retained for it on host {message}, which has not let go of it: it has given it to a \
                 container again, or does not answer",
                asked.address
            );
            Err(refuse(ErrorCode::Conflict, message))
        }
    }
}

/// Gives up a retained address: nobody gets it back. Whoever has it keeps it.
#[utoipa::path(delete, path = "/v1/environments/{environment}/retained", tag = "addresses",
    params(("environment" = String, Path)), request_body = ReleaseClaim,
    responses((status = 204), (status = "default", body = ApiError)))]
pub(super) async fn retain_no_more(
    State(app): Shared,
    person: Person,
    extract::Json(given): extract::Json<ReleaseClaim>,
) -> Reply<StatusCode> {
    let keys = Keys(&person.environment);
    let (name, _) = app
        .change(&person.environment, |env, _| {
            let network = find(env, &given.network)?;
            about_address(given.address, network);
            let txn = ipam::retain_no_more(keys, env, network, given.address)?.ok_or_else(|| {
                let message = format!(
                    "address {} of network \"{}\" is not retained; `droveway ipam ls` shows those that are",
                    given.address, network.name
                );
                refuse(ErrorCode::NotFound, message)
            })?;
            Ok(Plan::Commit(txn, network.name.clone()))
        })
        .await?;
    tracing::info!(environment = %person.environment, by = %person, network = %name, address = %given.address, "not retained any more");
    Ok(StatusCode::NO_CONTENT)
}

/// Lets go of an address in one of the agent's blocks that another host asked for, or refuses to. One that nobody asks for is
/// no error.
#[utoipa::path(put, path = "/v1/environments/{environment}/claims", tag = "agents",
    params(("environment" = String, Path)), request_body = Consent,
    responses((status = 204), (status = "default", body = ApiError)))]
pub(super) async fn consent(
    State(app): Shared,
    agent: Agent,
    extract::Json(said): extract::Json<Consent>,
) -> Reply<StatusCode> {
    let keys = Keys(&agent.environment);
    app.change(&agent.environment, |env, _| {
        let network = find(env, &said.network)?;
        about_address(said.address, network);
        let (host, address) = (&agent.host, said.address);
        let txn = match said.at {
            Some(at) => ipam::consent_to_move(keys, env, network, host, address, at, said.consents)?,
            None => ipam::consent(keys, env, network, host, address, &said.endpoint, said.consents)?,
        };
        Ok(txn.map_or(Plan::Nothing(()), |txn| Plan::Commit(txn, ())))
    })
    .await?;
    Ok(StatusCode::NO_CONTENT)
}

/// The agent's host has taken in all up to a revision: blocks that were given back before wait for it no more.
#[utoipa::path(put, path = "/v1/environments/{environment}/hosts/self/heard", tag = "agents",
    params(("environment" = String, Path)), request_body = Heard,
    responses((status = 204), (status = "default", body = ApiError)))]
pub(super) async fn heard(
    State(app): Shared,
    agent: Agent,
    extract::Json(said): extract::Json<Heard>,
) -> Reply<StatusCode> {
    // Of another life of the store nothing is known; a snapshot of this one is on its way.
    if said.epoch == app.store.epoch() {
        let turn = app.turn.lock().await;
        app.change(&agent.environment, |env, _| {
            let txn = ipam::heard(Keys(&agent.environment), env, &agent.host, said.revision)?;
            Ok(txn.map_or(Plan::Nothing(()), |txn| Plan::Commit(txn, ())))
        })
        .await?;
        drop(turn);
    }
    Ok(StatusCode::NO_CONTENT)
}

/// Shows who may give which addresses.
#[utoipa::path(get, path = "/v1/environments/{environment}/ipam", tag = "addresses",
    params(("environment" = String, Path)),
    responses((status = 200, body = IpamView), (status = "default", body = ApiError)))]
pub(super) async fn show(State(app): Shared, caller: Caller) -> Reply<Json<IpamView>> {
    Ok(Json(app.read(&caller.environment, |env| {
        let mut networks: Vec<Network> = env.catalog.networks.values().cloned().collect();
        networks.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(IpamView {
            networks,
            blocks: env.catalog.blocks.values().cloned().collect(),
            withdrawn: env.withdrawn.values().cloned().collect(),
            claims: env.catalog.claims.values().cloned().collect(),
        })
    })?))
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
            about_address(given.address, network);
            let txn = ipam::release(
                keys,
                env,
                revision,
                network,
                &agent.host,
                given.address,
                given.endpoint.as_ref(),
            )?;
            Ok(txn.map_or(Plan::Nothing(None), |txn| Plan::Commit(txn, Some(network.name.clone()))))
        })
        .await?;
    if let Some(network) = name {
        let (environment, host) = (&agent.environment, &agent.name);
        tracing::info!(%environment, %host, %network, address = %given.address, "claim released");
    }
    Ok(StatusCode::NO_CONTENT)
}
