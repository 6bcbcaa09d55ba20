//! Hosts: looked at, labelled, removed by people; described by their own agents.

use std::collections::BTreeMap;
use std::net::IpAddr;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use model::api::{
    ApiError, ErrorCode, HostPatch, HostReport, HostRoute, HostView, RenewAnswer, RenewRequest, path,
};
use model::{Candidate, Host, Source};

use super::extract::{self, Agent, Asked, Item, Person};
use super::networks::collision;
use super::page::{Cut, Page};
use super::{Reply, Shared, peers, refuse};
use crate::app::{App, Plan, put};
use crate::ca::Request;
use crate::ipam;
use crate::keys::{Keys, Report};
use crate::presence;
use crate::state::Environment;
use crate::store::{Compare, Op, Txn};

/// The MTU, bytes, of a link of which nothing is known.
const ETHERNET: u32 = 1500;

/// Lists the hosts.
#[utoipa::path(get, path = "/v1/environments/{environment}/hosts", tag = "hosts",
    params(("environment" = String, Path), Page),
    responses((status = 200, body = Vec<HostView>), (status = "default", body = ApiError)))]
pub(super) async fn list(State(app): Shared, person: Person, Asked(page): Asked<Page>) -> Reply<Response> {
    let cut = Cut::new(&app, &page)?;
    let chosen = app.read(&person.environment, |env| {
        let all = env.catalog.hosts.values().map(|host| (host.name.to_string(), host));
        let (hosts, next) = cut.choose(all);
        Ok((hosts.into_iter().map(|host| view(&app, env, host)).collect::<Vec<_>>(), next))
    })?;
    Ok(cut.answer(&person.environment, path::HOSTS, chosen))
}

/// Looks at a host.
#[utoipa::path(get, path = "/v1/environments/{environment}/hosts/{id}", tag = "hosts",
    params(("environment" = String, Path), ("id" = String, Path, description = "Name or id.")),
    responses((status = 200, body = HostView), (status = "default", body = ApiError)))]
pub(super) async fn get(State(app): Shared, person: Person, Item(id): Item) -> Reply<Json<HostView>> {
    Ok(Json(app.read(&person.environment, |env| Ok(view(&app, env, find(env, &id)?)))?))
}

fn view(app: &App, env: &Environment, host: &Host) -> HostView {
    let (connected, seen) = presence::of(app, env, &host.id);
    let life = env.lives.get(&host.id);
    let mut blocks: Vec<_> =
        env.catalog.blocks.values().filter(|block| block.host == host.id).cloned().collect();
    blocks.sort_by(|a, b| (&a.network, a.leased).cmp(&(&b.network, b.leased)));
    let version = env.reports.get(&host.id).map(|report| report.version.clone());
    HostView {
        host: host.clone(),
        connected,
        seen,
        version: version.filter(|version| !version.is_empty()),
        certificate_expires: app.presence.of(&host.id).and_then(|seen| seen.certificate_expires),
        incarnation: life.map(|life| life.current.number),
        copy: life.and_then(|life| life.copy.clone()),
        blocks,
        endpoints: env.endpoint_count(&host.id),
    }
}

/// Sets and removes labels of a host.
#[utoipa::path(patch, path = "/v1/environments/{environment}/hosts/{id}", tag = "hosts",
    params(("environment" = String, Path), ("id" = String, Path, description = "Name or id.")),
    request_body = HostPatch,
    responses((status = 200, body = HostView), (status = "default", body = ApiError)))]
pub(super) async fn patch(
    State(app): Shared,
    person: Person,
    Item(id): Item,
    extract::Json(patch): extract::Json<HostPatch>,
) -> Reply<Json<HostView>> {
    let (name, _) = app
        .change(&person.environment, |env, _| {
            let mut host = find(env, &id)?.clone();
            for (label, value) in &patch.labels {
                match value {
                    Some(value) => drop(host.labels.insert(label.clone(), value.clone())),
                    None => drop(host.labels.remove(label)),
                }
            }
            check_labels(&host.labels)?;
            let name = host.name.clone();
            Ok(update(&Keys(&person.environment), env, &host, None)?
                .map_or_else(|| Plan::Nothing(name.clone()), |txn| Plan::Commit(txn, name.clone())))
        })
        .await?;
    tracing::info!(environment = %person.environment, by = %person, host = %name, "host labelled");
    Ok(Json(app.read(&person.environment, |env| Ok(view(&app, env, find(env, &id)?)))?))
}

/// What a host says of itself. Routes that collide with a network are kept and logged, not refused: the host is there.
#[utoipa::path(put, path = "/v1/environments/{environment}/hosts/self", tag = "agents",
    params(("environment" = String, Path)), request_body = HostReport,
    responses((status = 200, body = Host), (status = "default", body = ApiError)))]
pub(super) async fn report(
    State(app): Shared,
    agent: Agent,
    extract::Json(report): extract::Json<HostReport>,
) -> Reply<Json<Host>> {
    check_report(&report.candidates, &report.routes, &report.version)?;
    let ((host, changed), _) = app
        .change(&agent.environment, |env, _| {
            let candidates = reached_at(&report.candidates, agent.outside);
            let host = Host { candidates, ..find(env, agent.host.as_str())?.clone() };
            let new = Report { routes: report.routes.clone(), version: report.version.clone() };
            Ok(match update(&Keys(&agent.environment), env, &host, Some(&new))? {
                None => Plan::Nothing((host, false)),
                Some(txn) => Plan::Commit(txn, (host, true)),
            })
        })
        .await?;
    if changed {
        tracing::info!(environment = %agent.environment, host = %agent.name, candidates = report.candidates.len(), version = report.version, "host reported");
        warn_of_collisions(&app, &agent, &report.routes)?;
    }
    Ok(Json(host))
}

fn warn_of_collisions(app: &App, agent: &Agent, routes: &[HostRoute]) -> Result<(), ApiError> {
    app.read(&agent.environment, |env| {
        for network in env.catalog.networks.values() {
            if let Some((pool, route)) = collision(&network.cidrs, routes) {
                tracing::warn!(
                    network = %network.name, %pool, route = %route.cidr, device = route.device, host = %agent.name,
                    "the pool of a network overlaps a host's own route; containers there cannot reach both"
                );
            }
        }
        for peer in env.catalog.peers.values() {
            if let Some((cidr, route)) = collision(&peer.remote_cidrs, routes) {
                tracing::warn!(
                    peer = %peer.name, %cidr, route = %route.cidr, device = route.device, host = %agent.name,
                    "what is behind a foreign peer overlaps a host's own route; containers there reach the peer's alone"
                );
            }
        }
        Ok(())
    })
}

/// A new certificate for the key that the agent's host has. The one before stays good until it runs out: there is
/// nothing to revoke, since authority is the key in the store.
#[utoipa::path(post, path = "/v1/environments/{environment}/hosts/self/certificate", tag = "agents",
    params(("environment" = String, Path)), request_body = RenewRequest,
    responses((status = 200, body = RenewAnswer), (status = "default", body = ApiError)))]
pub(super) async fn renew(
    State(app): Shared,
    agent: Agent,
    extract::Json(asked): extract::Json<RenewRequest>,
) -> Reply<Json<RenewAnswer>> {
    let request =
        Request::parse(&asked.csr).map_err(|error| refuse(ErrorCode::Invalid, error.to_string()))?;
    let known = app.read(&agent.environment, |env| Ok(find(env, agent.host.as_str())?.key.clone()))?;
    if request.key().to_string() != known {
        let message = format!(
            "{agent}: the signing request is for another key than the host joined with; a host with a new key joins anew"
        );
        return Err(refuse(ErrorCode::Forbidden, message).into());
    }
    let certificate = app.ca.sign(&request, &agent.host).map_err(|error| {
        tracing::error!(%error, host = %agent.name, "no certificate could be made");
        refuse(ErrorCode::Internal, "a fault of the server; look at its log")
    })?;
    tracing::info!(environment = %agent.environment, host = %agent.name, "certificate renewed");
    Ok(Json(RenewAnswer { certificate }))
}

/// Keeps true what is known of a NAT before the agent's host: its connection may come from elsewhere than when it last
/// reported.
pub(super) async fn notice(app: &App, agent: &Agent) -> Result<(), ApiError> {
    let (changed, _) = app
        .change(&agent.environment, |env, _| {
            let host = find(env, agent.host.as_str())?;
            let host = Host { candidates: reached_at(&host.candidates, agent.outside), ..host.clone() };
            Ok(match update(&Keys(&agent.environment), env, &host, None)? {
                None => Plan::Nothing(false),
                Some(txn) => Plan::Commit(txn, true),
            })
        })
        .await?;
    if changed {
        tracing::info!(environment = %agent.environment, host = %agent.name, from = ?agent.outside, "host comes from elsewhere");
    }
    Ok(())
}

/// Where a host can be reached, given where it says so and where it was seen to come from. An address that is none of its
/// own is that of a NAT, unless its owner said where it is reached.
pub(super) fn reached_at(said: &[Candidate], outside: Option<IpAddr>) -> Vec<Candidate> {
    let own = said.iter().filter(|candidate| candidate.source != Source::Observed);
    let mut candidates: Vec<Candidate> = own.cloned().collect();
    let known = |address| candidates.iter().any(|it| it.source == Source::Given || it.address == address);
    if let Some(address) = outside.filter(|address| !known(*address)) {
        let mtu = candidates.first().map_or(ETHERNET, |candidate| candidate.mtu);
        candidates.push(Candidate { address, port: None, mtu, source: Source::Observed });
    }
    candidates
}

/// A transaction that makes the host, and what it reported, as given; `None` if they are so already.
fn update(
    keys: &Keys<'_>,
    env: &Environment,
    host: &Host,
    report: Option<&Report>,
) -> Result<Option<Txn>, ApiError> {
    let (host_key, report_key) = (keys.host(&host.id), keys.report(&host.id));
    let mut txn = Txn::default();
    if env.catalog.hosts.get(&host.id) != Some(host) {
        txn.success.push(put(host_key.clone(), host)?);
    }
    if let Some(report) = report
        && env.reports.get(&host.id) != Some(report)
    {
        txn.success.push(put(report_key, report)?);
    }
    if txn.success.is_empty() {
        return Ok(None);
    }
    txn.compares.push(Compare::Modified(host_key.clone(), env.modified(&host_key).unwrap_or_default()));
    Ok(Some(txn))
}

/// Removes a host with its blocks, claims and endpoints. Its certificate is worthless from then on, its watch ends.
/// A host that is connected can be removed, too; one that speaks to foreign peers only after these.
#[utoipa::path(delete, path = "/v1/environments/{environment}/hosts/{id}", tag = "hosts",
    params(("environment" = String, Path), ("id" = String, Path, description = "Name or id.")),
    responses((status = 204), (status = "default", body = ApiError)))]
pub(super) async fn remove(State(app): Shared, person: Person, Item(id): Item) -> Reply<StatusCode> {
    let keys = Keys(&person.environment);
    let turn = app.turn.lock().await;
    let (host, _) = app
        .change(&person.environment, |env, revision| {
            let host = find(env, &id)?;
            let peers = env.catalog.peers.values().filter(|peer| peer.host == host.id);
            peers::refuse_if_any(peers, &format!("host \"{}\" speaks to", host.name))?;
            let mut deletes = vec![
                Op::Delete(keys.host(&host.id)),
                Op::Delete(keys.host_name(&host.name)),
                Op::Delete(keys.host_key(&host.key)),
                Op::Delete(keys.report(&host.id)),
                Op::Delete(keys.unreported(&host.id)),
                Op::Delete(keys.life(&host.id)),
            ];
            // Blocks that wait for this host wait no more; its own wait for the others.
            let mut waited_for = Vec::new();
            let heard = ipam::heard(keys, env, &host.id, revision)?.unwrap_or_default();
            for block in env.catalog.blocks.values().filter(|block| block.host == host.id) {
                let (present, ops) = ipam::withdraw(keys, env, block, true)?;
                for compare in present {
                    if !waited_for.contains(&compare) {
                        waited_for.push(compare);
                    }
                }
                deletes.extend(ops);
            }
            let claims = env.catalog.claims.values().filter(|claim| claim.host == host.id);
            deletes.extend(claims.map(|claim| Op::Delete(keys.claim(&claim.network, &claim.address))));
            let endpoints = env.endpoints_of_host(&host.id);
            deletes.extend(endpoints.map(|endpoint| Op::Delete(keys.endpoint(&endpoint.id))));
            deletes.extend(heard.success);
            let mut compares = vec![
                Compare::Present(keys.host(&host.id)),
                Compare::NonePutSince(keys.all_blocks(), revision),
                Compare::NonePutSince(keys.all_claims(), revision),
                Compare::NonePutSince(keys.endpoints(), revision),
                Compare::NonePutSince(keys.peers(), revision),
            ];
            compares.extend(heard.compares);
            compares.extend(waited_for);
            Ok(Plan::Commit(Txn::new(compares, deletes), host.clone()))
        })
        .await?;
    drop(turn);
    app.presence.forget(&host.id);
    tracing::info!(environment = %person.environment, by = %person, host = %host.name, id = %host.id, "host removed");
    Ok(StatusCode::NO_CONTENT)
}

/// The host of that name or id, or why not.
pub(super) fn find<'a>(env: &'a Environment, name_or_id: &str) -> Result<&'a Host, ApiError> {
    env.host(name_or_id).ok_or_else(|| {
        let message = format!("no host {name_or_id:?}; `droveway host ls` lists those there are");
        refuse(ErrorCode::NotFound, message)
    })
}

/// Refuses labels that are too many or too long.
pub(super) fn check_labels(labels: &BTreeMap<String, String>) -> Result<(), ApiError> {
    let bad = |message: String| Err(refuse(ErrorCode::Invalid, message));
    if labels.len() > 64 {
        return bad(format!("{} labels are too many; use at most 64", labels.len()));
    }
    for (label, value) in labels {
        let plain =
            !label.is_empty() && label.len() <= 128 && !label.chars().any(|c| c.is_control() || c == '=');
        if !plain || value.len() > 1024 {
            let label: String = label.chars().take(64).collect();
            return bad(format!(
                "label {label:?}: use 1 to 128 bytes without `=` for the key, at most 1024 for the value"
            ));
        }
    }
    Ok(())
}

/// Refuses reports that no host has reason to send.
pub(super) fn check_report(
    candidates: &[Candidate],
    routes: &[HostRoute],
    version: &str,
) -> Result<(), ApiError> {
    let bad = |message: String| Err(refuse(ErrorCode::Invalid, message));
    if candidates.len() > 64 || routes.len() > 4096 || version.len() > 128 {
        return bad("a host has at most 64 candidates, 4096 routes and 128 bytes of version; report those that matter".into());
    }
    for Candidate { address, port, mtu, .. } in candidates {
        if address.is_unspecified() || address.is_multicast() || *port == Some(0) || *mtu < 576 {
            let port = port.map_or_else(String::new, |port| format!(" port {port}"));
            return bad(format!(
                "candidate {address}{port}, MTU {mtu}: no packet reaches a host there; leave it out"
            ));
        }
    }
    match routes.iter().find(|route| route.device.len() > 64) {
        Some(route) => bad(format!("route {}: the device's name is too long", route.cidr)),
        None => Ok(()),
    }
}
