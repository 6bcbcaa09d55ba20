//! Networks: made, looked at, removed.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use ipnet::IpNet;
use model::api::{ApiError, ErrorCode, HostRoute, path};
use model::{Driver, Network, NetworkId, NetworkSpec, VXLAN_PORT};

use super::extract::{self, Asked, Caller, Item, Person};
use super::hosts::check_labels;
use super::page::{Cut, Page};
use super::{Reply, Shared, peers, refuse};
use crate::app::{Plan, now, put};
use crate::keys::Keys;
use crate::state::Environment;
use crate::store::{Compare, Op, Txn};
use crate::{ipam, request, secret};

/// Lists the networks.
#[utoipa::path(get, path = "/v1/environments/{environment}/networks", tag = "networks",
    params(("environment" = String, Path), Page),
    responses((status = 200, body = Vec<Network>), (status = "default", body = ApiError)))]
pub(super) async fn list(State(app): Shared, caller: Caller, Asked(page): Asked<Page>) -> Reply<Response> {
    let cut = Cut::new(&app, &page)?;
    let chosen = app.read(&caller.environment, |env| {
        let all = env.catalog.networks.values().map(|network| (network.name.to_string(), network));
        let (networks, next) = cut.choose(all);
        Ok((networks.into_iter().cloned().collect::<Vec<_>>(), next))
    })?;
    Ok(cut.answer(&caller.environment, path::NETWORKS, chosen))
}

/// Looks at a network.
#[utoipa::path(get, path = "/v1/environments/{environment}/networks/{id}", tag = "networks",
    params(("environment" = String, Path), ("id" = String, Path, description = "Name or id.")),
    responses((status = 200, body = Network), (status = "default", body = ApiError)))]
pub(super) async fn get(State(app): Shared, caller: Caller, Item(id): Item) -> Reply<Json<Network>> {
    Ok(Json(app.read(&caller.environment, |env| find(env, &id).cloned())?))
}

/// Makes a network.
#[utoipa::path(post, path = "/v1/environments/{environment}/networks", tag = "networks",
    params(("environment" = String, Path)), request_body = NetworkSpec,
    responses((status = 201, body = Network), (status = "default", body = ApiError)))]
pub(super) async fn create(
    State(app): Shared,
    person: Person,
    extract::Json(spec): extract::Json<NetworkSpec>,
) -> Reply<(StatusCode, Json<Network>)> {
    request::about(|| format!("network {:?}", spec.name.as_str()));
    check_labels(&spec.labels)?;
    let id = NetworkId::from_random(random()?);
    let created = now();
    let keys = Keys(&person.environment);
    let turn = app.turn.lock().await;
    let (network, _) = app
        .change(&person.environment, |env, revision| {
            let network = plan(env, &spec, &id, created)?;
            let mut compares = vec![
                Compare::Absent(keys.network_name(&network.name)),
                Compare::NonePutSince(keys.reports(), revision),
            ];
            let mut puts =
                vec![put(keys.network(&id), &network)?, put(keys.network_name(&network.name), &id)?];
            if let Driver::Vxlan { vni, port } = network.driver {
                compares.push(Compare::Absent(keys.vni(port, vni)));
                puts.push(put(keys.vni(port, vni), &id)?);
            }
            Ok(Plan::Commit(Txn::new(compares, puts), network))
        })
        .await?;
    drop(turn);
    let environment = &person.environment;
    tracing::info!(%environment, by = %person, network = %network.name, pool = %network.pool(), "network made");
    Ok((StatusCode::CREATED, Json(network)))
}

/// The network to make, checked against all that is there.
fn plan(env: &Environment, spec: &NetworkSpec, id: &NetworkId, created: u64) -> Result<Network, ApiError> {
    if spec.name.as_str().parse::<NetworkId>().is_ok() {
        let message =
            format!("network {:?}: the name looks like an id; choose another name", spec.name.as_str());
        return Err(refuse(ErrorCode::Invalid, message));
    }
    let port = spec.port.unwrap_or(VXLAN_PORT);
    let taken: BTreeMap<u32, &Network> = env
        .catalog
        .networks
        .values()
        .filter_map(|network| match network.driver {
            Driver::Ipsec => None,
            Driver::Vxlan { vni, port: other } => (other == port).then_some((vni, network)),
        })
        .collect();
    // Where all are taken, the first that is none is refused by the validation.
    let vni = (1..1 << 24).find(|vni| !taken.contains_key(vni)).unwrap_or(1 << 24);
    let network = spec
        .validate(id.clone(), vni, created)
        .map_err(|error| refuse(ErrorCode::Invalid, error.to_string()))?;
    let name = &network.name;
    if env.catalog.network_named(name.as_str()).is_some() {
        let message = format!("network \"{name}\" is there already; choose another name, or remove it first");
        return Err(refuse(ErrorCode::Conflict, message));
    }
    if let Driver::Vxlan { vni, port } = network.driver
        && let Some(other) = taken.get(&vni)
    {
        let message = format!(
            "network \"{name}\": VNI {vni} on port {port} is that of network \"{}\"; choose another --vni, or leave it out",
            other.name
        );
        return Err(refuse(ErrorCode::Conflict, message));
    }
    if let Driver::Vxlan { port, .. } = network.driver
        && let Some(host) = env.catalog.hosts.values().find(|host| host.tunnels_by(port))
    {
        let message = format!(
            "network \"{name}\": UDP port {port} is that of the tunnels of host {}; choose another --port",
            host.name
        );
        return Err(refuse(ErrorCode::Conflict, message));
    }
    for (host, report) in &env.reports {
        if let Some((pool, route)) = collision(&network.cidrs, &report.routes) {
            let host = env.host_name(host);
            let message = format!(
                "network \"{name}\": pool {pool} overlaps route {} dev {} on host {host}; choose another --subnet",
                route.cidr, route.device
            );
            return Err(refuse(ErrorCode::Conflict, message));
        }
    }
    Ok(network)
}

/// The first CIDR and route that overlap. A default route overlaps everything and says nothing.
pub(super) fn collision<'a>(cidrs: &[IpNet], routes: &'a [HostRoute]) -> Option<(IpNet, &'a HostRoute)> {
    cidrs.iter().find_map(|pool| {
        let overlaps = |route: &&HostRoute| {
            let cidr = route.cidr.trunc();
            cidr.prefix_len() > 0 && (pool.contains(&cidr) || cidr.contains(pool))
        };
        Some((*pool, routes.iter().find(overlaps)?))
    })
}

/// Removes a network that nobody uses.
#[utoipa::path(delete, path = "/v1/environments/{environment}/networks/{id}", tag = "networks",
    params(("environment" = String, Path), ("id" = String, Path, description = "Name or id.")),
    responses((status = 204), (status = "default", body = ApiError)))]
pub(super) async fn remove(State(app): Shared, person: Person, Item(id): Item) -> Reply<StatusCode> {
    let keys = Keys(&person.environment);
    let turn = app.turn.lock().await;
    let (name, _) = app
        .change(&person.environment, |env, revision| {
            let network = find(env, &id)?;
            let users = env.endpoints_of(&network.id).map(|endpoint| {
                let name = endpoint.name.as_ref().map_or(endpoint.id.as_str(), |name| name.as_str());
                format!("{name} ({})", env.host_name(&endpoint.host))
            });
            let count = env.endpoints_of(&network.id).count();
            if count > 0 {
                let (plural, them) = if count == 1 { ("", "it") } else { ("s", "them") };
                let message = format!(
                    "network \"{}\" is in use by {count} endpoint{plural}: {}; remove {them} first",
                    network.name,
                    ipam::list(users, 10)
                );
                return Err(refuse(ErrorCode::InUse, message));
            }
            let peers = env.catalog.peers.values().filter(|peer| peer.network == network.id);
            peers::refuse_if_any(peers, &format!("network \"{}\" is joined to", network.name))?;
            let compares = vec![
                Compare::Present(keys.network(&network.id)),
                Compare::NonePutSince(keys.endpoints(), revision),
                Compare::NonePutSince(keys.peers(), revision),
            ];
            let mut deletes = vec![
                Op::DeletePrefix(keys.blocks(&network.id)),
                Op::DeletePrefix(keys.claims(&network.id)),
                Op::DeletePrefix(keys.all_withdrawn(&network.id)),
                Op::Delete(keys.network(&network.id)),
                Op::Delete(keys.network_name(&network.name)),
            ];
            if let Driver::Vxlan { vni, port } = network.driver {
                deletes.push(Op::Delete(keys.vni(port, vni)));
            }
            Ok(Plan::Commit(Txn::new(compares, deletes), network.name.clone()))
        })
        .await?;
    drop(turn);
    tracing::info!(environment = %person.environment, by = %person, network = %name, "network removed");
    Ok(StatusCode::NO_CONTENT)
}

/// The network of that name or id, or why not.
pub(super) fn find<'a>(env: &'a Environment, name_or_id: &str) -> Result<&'a Network, ApiError> {
    env.network(name_or_id).ok_or_else(|| {
        let message = format!("no network {name_or_id:?}; `droveway network ls` lists those there are");
        refuse(ErrorCode::NotFound, message)
    })
}

/// Random bytes, or a refusal.
pub(super) fn random<const N: usize>() -> Result<[u8; N], ApiError> {
    secret::random().map_err(|error| refuse(ErrorCode::Internal, error.to_string()))
}
