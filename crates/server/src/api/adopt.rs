//! After a restore: hosts say what they hold, and the store takes it over before it gives anything to anyone.
//!
//! The backup is older than what hosts hold: blocks were leased, given back, and leased to others since. So each host that
//! the backup knows is marked, and says what its ledger has before it is told anything. Of two hosts that hold a block, the
//! one that it was leased to later is right. Blocks that were withdrawn rest until all have heard of this life's snapshot;
//! one that its host gave back since the backup rests, too; one that a host holds was heard of by all before it was leased.
//!
//! A host that a copy was taken for ([`crate::incarnation`]) says what it holds in the same way. Others do not wait for that.
//!
//! Invariant: while a host is marked since a restore, no block is leased and no claim is made that it might hold, which is
//! any. What hosts hold already they go on using.

use std::collections::BTreeSet;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use model::api::{ApiError, ErrorCode, Held, HeldAnswer, UnreportedHost};
use model::{Block, Claim, EnvironmentId, Geometry, HostId};
use tokio::time::Instant;

use super::extract::{self, Agent, Item, Person};
use super::hosts::find;
use super::{Reply, Shared, refuse};
use crate::app::{App, Plan, put};
use crate::ipam;
use crate::keys::Keys;
use crate::state::{self, Environment};
use crate::store::{Compare, Op, Txn};

/// For how long after its start a server tells nobody anything while hosts have not said what they hold.
const GRACE: Duration = Duration::from_secs(60);
/// How long a request waits for that; an agent gives up after 20 s.
const HOLD: Duration = Duration::from_secs(10);

/// Lists the hosts that have not said what they hold since the store was restored.
#[utoipa::path(get, path = "/v1/environments/{environment}/unreported", tag = "server",
    params(("environment" = String, Path)),
    responses((status = 200, body = Vec<UnreportedHost>), (status = "default", body = ApiError)))]
pub(super) async fn list(State(app): Shared, person: Person) -> Reply<Json<Vec<UnreportedHost>>> {
    Ok(Json(app.read(&person.environment, |env| {
        let waited_for = env.unreported.iter().filter(|(_, unreported)| !unreported.followed);
        let hosts = waited_for.filter_map(|(id, unreported)| {
            let name = env.catalog.hosts.get(id)?.name.clone();
            Some(UnreportedHost { host: id.clone(), name, since: unreported.since })
        });
        Ok(hosts.collect())
    })?))
}

/// Waits no longer for a host to say what it holds. What the backup knows of it stays its own; what it was given since may
/// be given to others.
#[utoipa::path(delete, path = "/v1/environments/{environment}/unreported/{id}", tag = "server",
    params(("environment" = String, Path), ("id" = String, Path, description = "Name or id of the host.")),
    responses((status = 204), (status = "default", body = ApiError)))]
pub(super) async fn remove(State(app): Shared, person: Person, Item(id): Item) -> Reply<StatusCode> {
    let keys = Keys(&person.environment);
    let (name, _) = app
        .change(&person.environment, |env, _| {
            let host = find(env, &id)?;
            let key = keys.unreported(&host.id);
            let Some(unreported) = env.unreported.get(&host.id) else {
                return Ok(Plan::Nothing(host.name.clone()));
            };
            let mut ops = vec![Op::Delete(key.clone())];
            if !unreported.followed {
                // Of its agent's starts the backup may know too few: should it come, it is taken as it is.
                ops.push(Op::Delete(keys.life(&host.id)));
            }
            Ok(Plan::Commit(Txn::new(vec![Compare::Present(key)], ops), host.name.clone()))
        })
        .await?;
    tracing::warn!(environment = %person.environment, by = %person, host = %name, "not waited for any more");
    Ok(StatusCode::NO_CONTENT)
}

/// Takes over what the agent's host holds. Nothing to do where it was said before.
#[utoipa::path(put, path = "/v1/environments/{environment}/hosts/self/held", tag = "agents",
    params(("environment" = String, Path)), request_body = Held,
    responses((status = 200, body = HeldAnswer), (status = "default", body = ApiError)))]
pub(super) async fn held(
    State(app): Shared,
    agent: Agent,
    extract::Json(held): extract::Json<Held>,
) -> Reply<Json<HeldAnswer>> {
    let keys = Keys(&agent.environment);
    let turn = app.turn.lock().await;
    let ((conflicts, adopted), _) = app
        .change(&agent.environment, |env, revision| {
            let mark = keys.unreported(&agent.host);
            if !env.unreported.contains_key(&agent.host) {
                return Ok(Plan::Nothing((Vec::new(), 0)));
            }
            let mut ops = vec![Op::Delete(mark.clone())];
            let mut conflicts = Vec::new();
            let mut compares = vec![
                Compare::Present(mark),
                Compare::Present(keys.host(&agent.host)),
                Compare::NonePutSince(keys.all_blocks(), revision),
                Compare::NonePutSince(keys.all_claims(), revision),
            ];
            adopt_blocks(keys, env, &agent.host, &held.blocks, &mut compares, &mut ops, &mut conflicts)?;
            adopt_claims(keys, env, &agent.host, &held.claims, &mut ops, &mut conflicts)?;
            let adopted = ops.len() - 1;
            Ok(Plan::Commit(Txn::new(compares, ops), (conflicts, adopted)))
        })
        .await?;
    drop(turn);
    tracing::info!(environment = %agent.environment, host = %agent.name, changes = adopted, "host said what it holds");
    for conflict in &conflicts {
        tracing::warn!(environment = %agent.environment, host = %agent.name, "{conflict}");
    }
    Ok(Json(HeldAnswer { conflicts }))
}

fn adopt_blocks(
    keys: Keys<'_>,
    env: &Environment,
    host: &HostId,
    held: &[Block],
    compares: &mut Vec<Compare>,
    ops: &mut Vec<Op>,
    conflicts: &mut Vec<String>,
) -> Result<(), ApiError> {
    let mut own = BTreeSet::new();
    for block in held {
        let Some(network) = env.catalog.networks.get(&block.network) else {
            conflicts.push(format!(
                "block {} is of network {}, which was made after the backup; make the network anew, and its containers",
                block.cidr, block.network
            ));
            continue;
        };
        if !is_block(&network.geometry(), block) {
            let message = format!("{} is no block of network \"{}\"", block.cidr, network.name);
            return Err(refuse(ErrorCode::Invalid, message));
        }
        let place = (block.network.clone(), block.cidr);
        if !own.insert(place.clone()) {
            continue;
        }
        match env.catalog.blocks.get(&place) {
            Some(known) if known.host == *host => continue,
            Some(known) if known.leased >= block.leased => {
                conflicts.push(format!(
                    "block {} of network \"{}\" was leased to host {} later; containers here that have an address of it \
                     must be attached anew",
                    block.cidr,
                    network.name,
                    env.host_name(&known.host)
                ));
                continue;
            }
            Some(_) | None => {}
        }
        let block = Block { host: host.clone(), ..block.clone() };
        ops.push(put(keys.block(&block.network, &block.cidr), &block)?);
        ops.push(Op::Delete(keys.withdrawn(&block.network, &block.cidr)));
    }
    let gone =
        env.catalog.blocks.iter().filter(|(place, block)| block.host == *host && !own.contains(*place));
    for (_, block) in gone {
        let (present, withdrawn) = ipam::withdraw(keys, env, block, false)?;
        for compare in present {
            if !compares.contains(&compare) {
                compares.push(compare);
            }
        }
        ops.extend(withdrawn);
    }
    Ok(())
}

fn adopt_claims(
    keys: Keys<'_>,
    env: &Environment,
    host: &HostId,
    held: &[Claim],
    ops: &mut Vec<Op>,
    conflicts: &mut Vec<String>,
) -> Result<(), ApiError> {
    let mut own = BTreeSet::new();
    for claim in held {
        let place = (claim.network.clone(), claim.address);
        let Some(network) = env.catalog.networks.get(&claim.network) else { continue };
        if !own.insert(place.clone()) {
            continue;
        }
        match env.catalog.claims.get(&place) {
            Some(known) if known.host == *host => continue,
            // Its holder of old may have let it go since; it says so, or does not, when it reports.
            Some(known) if !env.unreported.contains_key(&known.host) => {
                conflicts.push(format!(
                    "address {} of network \"{}\" is claimed by host {}; attach its container here anew",
                    claim.address,
                    network.name,
                    env.host_name(&known.host)
                ));
                continue;
            }
            Some(_) | None => {}
        }
        let claim = Claim { host: host.clone(), wanted: None, ..claim.clone() };
        ops.push(put(keys.claim(&claim.network, &claim.address), &claim)?);
    }
    let gone =
        env.catalog.claims.iter().filter(|(place, claim)| claim.host == *host && !own.contains(*place));
    ops.extend(gone.map(|((network, address), _)| Op::Delete(keys.claim(network, address))));
    Ok(())
}

fn is_block(geometry: &Geometry, block: &Block) -> bool {
    geometry.block_of(block.cidr.network()) == Some((block.cidr, true))
}

/// Refuses what might give to one what another holds.
pub(super) fn all_reported(env: &Environment) -> Result<(), ApiError> {
    let mut hosts: Vec<String> = env.silent_since_restore().map(|id| env.host_name(id).to_owned()).collect();
    if hosts.is_empty() {
        return Ok(());
    }
    hosts.sort();
    let hosts = ipam::list(hosts, 8);
    Err(refuse(
        ErrorCode::Unavailable,
        format!(
            "the store was restored from a backup, and nothing is leased before all hosts have said what they hold; still \
             silent: {hosts}. Start their agents; remove those that are gone with `droveway host rm`, or wait for one no \
             longer with `droveway server adopt --without HOST`"
        ),
    ))
}

/// Waits until all hosts have said what they hold: a host that is told what it does not know yet that another holds would
/// stop sending there. It waits for as long as a server that has just started may; who is silent for longer is not in the
/// way of what others are told.
pub(super) async fn settled(app: &App, environment: &EnvironmentId) -> Result<(), ApiError> {
    let silent = |state: &state::State| {
        let env = state.environments.get(environment);
        env.is_some_and(|env| env.silent_since_restore().next().is_some())
    };
    let begun = Instant::now();
    let mut revisions = app.shared.subscribe();
    while app.started.elapsed() < GRACE && silent(&app.shared.read()) {
        if begun.elapsed() >= HOLD {
            let message =
                "the store was restored from a backup, and not all hosts have said what they hold; ask again";
            return Err(refuse(ErrorCode::Unavailable, message));
        }
        drop(tokio::time::timeout(Duration::from_secs(1), revisions.changed()).await);
    }
    Ok(())
}

/// Refuses an agent that has not said what its host holds.
pub(super) fn has_reported(env: &Environment, agent: &Agent) -> Result<(), ApiError> {
    let Some(unreported) = env.unreported.get(&agent.host) else { return Ok(()) };
    let why = if unreported.followed {
        "a copy of its state directory was taken for it"
    } else {
        "the store was restored from a backup"
    };
    Err(refuse(ErrorCode::Unreported, format!("{why}: {agent} has to say first what it holds")))
}
