//! Foreign peers: joined to networks, looked at, removed.
//!
//! Invariant: no answer and no log line has a peer's secret. It leaves the store for its gateway alone, by the watch.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use ipnet::IpNet;
use model::api::{ApiError, ErrorCode, path};
use model::{Driver, Host, HostId, Network, Peer, PeerId, PeerProof, PeerSpec};
use rustls::RootCertStore;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

use super::extract::{Asked, Item, Person, SecretJson};
use super::networks::{self, collision, random};
use super::page::{Cut, Page};
use super::{Reply, Shared, hosts, refuse};
use crate::app::{Plan, now, put};
use crate::keys::Keys;
use crate::state::Environment;
use crate::store::{Compare, Op, Txn};
use crate::{ipam, request};

/// Lists the foreign peers, without secrets.
#[utoipa::path(get, path = "/v1/environments/{environment}/peers", tag = "peers",
    params(("environment" = String, Path), Page),
    responses((status = 200, body = Vec<Peer>), (status = "default", body = ApiError)))]
pub(super) async fn list(State(app): Shared, person: Person, Asked(page): Asked<Page>) -> Reply<Response> {
    let cut = Cut::new(&app, &page)?;
    let chosen = app.read(&person.environment, |env| {
        let all = env.catalog.peers.values().map(|peer| (peer.name.to_string(), peer));
        let (peers, next) = cut.choose(all);
        Ok((peers.into_iter().cloned().map(Peer::without_secret).collect::<Vec<_>>(), next))
    })?;
    Ok(cut.answer(&person.environment, path::PEERS, chosen))
}

/// Looks at a foreign peer, without its secret.
#[utoipa::path(get, path = "/v1/environments/{environment}/peers/{id}", tag = "peers",
    params(("environment" = String, Path), ("id" = String, Path, description = "Name or id.")),
    responses((status = 200, body = Peer), (status = "default", body = ApiError)))]
pub(super) async fn get(State(app): Shared, person: Person, Item(id): Item) -> Reply<Json<Peer>> {
    Ok(Json(app.read(&person.environment, |env| Ok(find(env, &id)?.clone().without_secret()))?))
}

/// Joins a foreign peer to a network.
#[utoipa::path(post, path = "/v1/environments/{environment}/peers", tag = "peers",
    params(("environment" = String, Path)), request_body = PeerSpec,
    responses((status = 201, body = Peer), (status = "default", body = ApiError)))]
pub(super) async fn create(
    State(app): Shared,
    person: Person,
    SecretJson(spec): SecretJson<PeerSpec>,
) -> Reply<(StatusCode, Json<Peer>)> {
    request::about(|| format!("peer {:?}", spec.name.as_str()));
    let id = PeerId::from_random(random()?);
    let created = now();
    let keys = Keys(&person.environment);
    let turn = app.turn.lock().await;
    let (peer, _) = app
        .change(&person.environment, |env, revision| {
            let peer = plan(env, &spec, &id, created)?;
            let compares = vec![
                Compare::Absent(keys.peer_name(&peer.name)),
                Compare::Absent(keys.host_name(&peer.name)),
                Compare::Present(keys.network(&peer.network)),
                Compare::Present(keys.host(&peer.host)),
                Compare::NonePutSince(keys.peers(), revision),
                Compare::NonePutSince(keys.reports(), revision),
            ];
            let puts = vec![put(keys.peer(&id), &peer)?, put(keys.peer_name(&peer.name), &id)?];
            Ok(Plan::Commit(Txn::new(compares, puts), peer))
        })
        .await?;
    drop(turn);
    let (environment, cidrs) = (&person.environment, &peer.remote_cidrs);
    tracing::info!(%environment, by = %person, peer = %peer.name, address = %peer.address, ?cidrs, "peer made");
    Ok((StatusCode::CREATED, Json(peer.without_secret())))
}

/// Takes a foreign peer away: its gateway closes the tunnel.
#[utoipa::path(delete, path = "/v1/environments/{environment}/peers/{id}", tag = "peers",
    params(("environment" = String, Path), ("id" = String, Path, description = "Name or id.")),
    responses((status = 204), (status = "default", body = ApiError)))]
pub(super) async fn remove(State(app): Shared, person: Person, Item(id): Item) -> Reply<StatusCode> {
    let keys = Keys(&person.environment);
    let (name, _) = app
        .change(&person.environment, |env, _| {
            let peer = find(env, &id)?;
            let key = keys.peer(&peer.id);
            let deletes = vec![Op::Delete(key.clone()), Op::Delete(keys.peer_name(&peer.name))];
            Ok(Plan::Commit(Txn::new(vec![Compare::Present(key)], deletes), peer.name.clone()))
        })
        .await?;
    tracing::info!(environment = %person.environment, by = %person, peer = %name, "peer removed");
    Ok(StatusCode::NO_CONTENT)
}

/// Refuses to remove what these peers need; `whose` is who has them.
pub(super) fn refuse_if_any<'a>(peers: impl Iterator<Item = &'a Peer>, whose: &str) -> Result<(), ApiError> {
    let names: Vec<String> = peers.map(|peer| peer.name.to_string()).collect();
    let Some(first) = names.first() else { return Ok(()) };
    let (plural, them) = if names.len() == 1 { ("", "it") } else { ("s", "them") };
    let remedy = format!("remove {them} first with `droveway peer rm {first}`");
    let message = format!("{whose} foreign peer{plural} {}; {remedy}", ipam::list(names, 10));
    Err(refuse(ErrorCode::InUse, message))
}

/// The peer to make, checked against all that is there.
fn plan(env: &Environment, spec: &PeerSpec, id: &PeerId, created: u64) -> Result<Peer, ApiError> {
    let name = spec.name.as_str();
    let network = networks::find(env, &spec.network)?;
    match network.driver {
        Driver::Ipsec => {}
        Driver::Vxlan { .. } => {
            let message = format!(
                "peer {name:?}: network \"{}\" is vxlan and has no tunnels; choose a --network of driver ipsec",
                network.name
            );
            return Err(refuse(ErrorCode::Invalid, message));
        }
    }
    let host = gateway(env, spec)?;
    let peer = spec
        .validate(id.clone(), network.id.clone(), network.pool(), host.id.clone(), created)
        .map_err(|error| refuse(ErrorCode::Invalid, error.to_string()))?;
    check_ca(&peer)?;
    check_name(env, name)?;
    check_address(env, &peer)?;
    check_cidrs(env, network, &peer)?;
    Ok(peer)
}

/// The host that is to speak to the peer.
fn gateway<'a>(env: &'a Environment, spec: &PeerSpec) -> Result<&'a Host, ApiError> {
    let mut all: Vec<&Host> = env.catalog.hosts.values().collect();
    all.sort_by(|a, b| a.name.cmp(&b.name));
    match (&spec.host, &all[..]) {
        (Some(host), _) => hosts::find(env, host),
        (None, [only]) => Ok(only),
        (None, []) => {
            let message = format!(
                "peer {:?}: there is no host yet that could speak to it; `droveway token create` prints how to join one",
                spec.name.as_str()
            );
            Err(refuse(ErrorCode::Conflict, message))
        }
        (None, _) => {
            let names = ipam::list(all.iter().map(|host| host.name.to_string()), 10);
            let message = format!(
                "peer {:?}: which host speaks to it? Give --host with one of {names}",
                spec.name.as_str()
            );
            Err(refuse(ErrorCode::Invalid, message))
        }
    }
}

fn check_ca(peer: &Peer) -> Result<(), ApiError> {
    let ca = match &peer.proof {
        PeerProof::Psk { .. } => return Ok(()),
        PeerProof::Ca { ca } => ca,
    };
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(ca.as_bytes()).collect();
    let certificates = certificates.unwrap_or_default();
    let mut roots = RootCertStore::empty();
    let good = certificates.iter().all(|certificate| roots.add(certificate.clone()).is_ok());
    if good && !certificates.is_empty() {
        return Ok(());
    }
    let message = format!(
        "peer {:?}: --ca is not a certificate in PEM form; give the file of the CA that signed the peer's certificate",
        peer.name.as_str()
    );
    Err(refuse(ErrorCode::Invalid, message))
}

/// A peer's name stands beside those of hosts where tunnels are listed, and is none of theirs.
fn check_name(env: &Environment, name: &str) -> Result<(), ApiError> {
    let (code, what) = if name.parse::<PeerId>().is_ok() || name.parse::<HostId>().is_ok() {
        (ErrorCode::Invalid, "the name looks like an id; choose another name")
    } else if env.peer(name).is_some() {
        (
            ErrorCode::Conflict,
            "it is there already; choose another name, or remove it first with `droveway peer rm`",
        )
    } else if env.host(name).is_some() {
        (ErrorCode::Conflict, "a host is called so; choose another name")
    } else {
        return Ok(());
    };
    Err(refuse(code, format!("peer {name:?}: {what}")))
}

/// Who answers at an address has to be clear.
fn check_address(env: &Environment, peer: &Peer) -> Result<(), ApiError> {
    let (name, address) = (peer.name.as_str(), peer.address);
    let mut others = env.catalog.peers.values();
    if let Some(other) = others.find(|other| other.address == address && other.host == peer.host) {
        let message = format!(
            "peer {name:?}: host \"{}\" speaks to {address} already, as peer \"{}\"; remove that first, or choose another --host",
            env.host_name(&peer.host),
            other.name
        );
        return Err(refuse(ErrorCode::Conflict, message));
    }
    let has = |host: &&Host| host.candidates.iter().any(|candidate| candidate.address == address);
    if let Some(host) = env.catalog.hosts.values().filter(|host| !host.behind_nat()).find(has) {
        let message = format!(
            "peer {name:?}: {address} is host \"{}\", to which tunnels are made by themselves; give the --address of a foreign box",
            host.name
        );
        return Err(refuse(ErrorCode::Conflict, message));
    }
    Ok(())
}

/// What is behind the peer is nowhere else in its network, and nowhere that a host goes by another way.
fn check_cidrs(env: &Environment, network: &Network, peer: &Peer) -> Result<(), ApiError> {
    let clash = |cidr: IpNet, what: String| {
        let message =
            format!("peer {:?}: {cidr} overlaps {what}; choose another --remote-cidr", peer.name.as_str());
        Err(refuse(ErrorCode::Conflict, message))
    };
    let others = env.catalog.peers.values().filter(|other| other.network == network.id);
    for (other, theirs) in others.flat_map(|other| other.remote_cidrs.iter().map(move |cidr| (other, cidr))) {
        let overlaps = |cidr: &&IpNet| cidr.contains(theirs) || theirs.contains(*cidr);
        if let Some(cidr) = peer.remote_cidrs.iter().find(overlaps) {
            return clash(*cidr, format!("{theirs} behind peer \"{}\" of the same network", other.name));
        }
    }
    for (host, report) in &env.reports {
        if let Some((cidr, route)) = collision(&peer.remote_cidrs, &report.routes) {
            let host = env.host_name(host);
            return clash(cidr, format!("route {} dev {} on host {host}", route.cidr, route.device));
        }
    }
    Ok(())
}

/// The peer of that name or id, or why not.
fn find<'a>(env: &'a Environment, name_or_id: &str) -> Result<&'a Peer, ApiError> {
    env.peer(name_or_id).ok_or_else(|| {
        let message = format!("no peer {name_or_id:?}; `droveway peer ls` lists those there are");
        refuse(ErrorCode::NotFound, message)
    })
}
