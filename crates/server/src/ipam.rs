//! Who gets which addresses: blocks for hosts, single addresses, and how they come back. Pure: it looks at the state and says
//! which transaction should be done.
//!
//! A block that is given back is *withdrawn*: others may still send to the host that held it. It is leased to another host
//! when all that took part in the network have said that they heard of it; its former holder may have it again at once. A
//! host that is removed by a person is not waited for. A claim inside another host's block is *asked* until that host has
//! let go of the address.
//!
//! Invariant: a block is leased to one host at most; an address has one claim at most; a block that is leased has no claim
//! in it that its holder did not consent to.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use model::api::{ApiError, ErrorCode};
use model::{Block, Claim, EndpointId, Geometry, HostId, Network, Revision, Wanted, Withdrawn};

use crate::app::put;
use crate::keys::Keys;
use crate::secret;
use crate::state::Environment;
use crate::store::{Compare, Op, Txn};

/// What a host gets, if this transaction succeeds.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Grant<T> {
    /// It has it already: the answer to an earlier request was lost. The transaction changes nothing, and makes sure that it
    /// still has: what this server knows may be behind what another one did.
    Held(Txn, T),
    /// It has it by this transaction.
    New(Txn, T),
}

/// The block number `held`, from zero and in the order of leases, of `host` in `network`.
pub(crate) fn lease(
    keys: Keys<'_>,
    env: &Environment,
    revision: Revision,
    network: &Network,
    host: &HostId,
    held: usize,
) -> Result<Grant<Block>, ApiError> {
    let mut own: Vec<&Block> = env.blocks_of(&network.id).filter(|block| block.host == *host).collect();
    own.sort_by_key(|block| (block.leased, block.cidr));
    if let Some(block) = own.get(held) {
        let compares = vec![unchanged(env, keys.block(&network.id, &block.cidr))];
        return Ok(Grant::Held(Txn::new(compares, Vec::new()), (*block).clone()));
    }
    let rests = |cidr: &IpNet| env.withdrawn.get(&(network.id.clone(), *cidr));
    let taken = |cidr: &IpNet| {
        env.catalog.blocks.contains_key(&(network.id.clone(), *cidr))
            || rests(cidr).is_some_and(|withdrawn| withdrawn.host != *host)
            || env.claims_of(&network.id).any(|claim| cidr.contains(&claim.address))
    };
    let cidr = first_free(&network.geometry(), host, taken).ok_or_else(|| exhausted(env, network))?;
    let block = Block { network: network.id.clone(), cidr, host: host.clone(), leased: Revision::default() };
    let key = keys.block(&network.id, &cidr);
    let mut compares = vec![
        Compare::Absent(key.clone()),
        Compare::Present(keys.network(&network.id)),
        Compare::Present(keys.host(host)),
        // The same request twice at the same time must not get two blocks, and none with a claim in it.
        Compare::NonePutSince(keys.blocks(&network.id), revision),
        Compare::NonePutSince(keys.claims(&network.id), revision),
        Compare::NonePutSince(keys.all_withdrawn(&network.id), revision),
    ];
    let mut ops = vec![put(key, &block)?];
    if rests(&cidr).is_some() {
        let key = keys.withdrawn(&network.id, &cidr);
        compares.push(Compare::Present(key.clone()));
        ops.push(Op::Delete(key));
    }
    Ok(Grant::New(Txn::new(compares, ops), block))
}

fn exhausted(env: &Environment, network: &Network) -> ApiError {
    let mut holders: BTreeMap<&str, usize> = BTreeMap::new();
    for block in env.blocks_of(&network.id) {
        *holders.entry(env.host_name(&block.host)).or_default() += 1;
    }
    let count: usize = holders.values().sum();
    let holders = list(holders.into_iter().map(|(host, count)| format!("{host}: {count}")), 8);
    let geometry = network.geometry();
    let rest = (geometry.blocks() - geometry.claim_blocks()) as usize;
    let mut why = if count == rest {
        format!("all {count} blocks of {} are leased ({holders})", network.pool())
    } else {
        format!("no block of {} is free: {count} are leased ({holders})", network.pool())
    };
    let withdrawn: Vec<&Withdrawn> = env.withdrawn_of(&network.id).collect();
    if !withdrawn.is_empty() {
        let waits: BTreeSet<&str> =
            withdrawn.iter().flat_map(|one| &one.waits_for).map(|host| env.host_name(host)).collect();
        let waits = list(waits.into_iter().map(str::to_owned), 8);
        why = format!("{why}, {} wait until {waits} have heard that they were given back", withdrawn.len());
    }
    let resting = env.resting(&network.id).len();
    if resting > 0 {
        why = format!("{why}, {resting} single addresses rest for a minute after their last use");
    }
    ApiError::new(
        ErrorCode::Exhausted,
        format!(
            "network \"{}\": {why}; remove containers that are not needed, hosts that are gone (`droveway host rm`), or create a \
             network with a larger --subnet",
            network.name,
        ),
    )
}

/// The first free block, beginning at a place that depends on the host: hosts that ask at the same time rarely clash.
fn first_free(geometry: &Geometry, host: &HostId, taken: impl Fn(&IpNet) -> bool) -> Option<IpNet> {
    let (first, count) = (geometry.claim_blocks(), geometry.blocks() - geometry.claim_blocks());
    let hash = secret::sha256(host.as_str().as_bytes()).0;
    let start = u32::from_be_bytes([hash[0], hash[1], hash[2], hash[3]]) % count.max(1);
    let indices = (0..count).map(|i| first + ((u64::from(start) + u64::from(i)) % u64::from(count)) as u32);
    indices.filter_map(|index| geometry.block(index)).find(|cidr| !taken(cidr))
}

/// That `host` gives a block back. `None` if nobody holds it: an answer may have been lost.
pub(crate) fn give_back(
    keys: Keys<'_>,
    env: &Environment,
    revision: Revision,
    network: &Network,
    host: &HostId,
    cidr: IpNet,
    leased: Option<Revision>,
) -> Result<Option<Txn>, ApiError> {
    let block = env.catalog.blocks.get(&(network.id.clone(), cidr));
    let Some(block) = block.filter(|block| leased.is_none_or(|leased| block.leased == leased)) else {
        return Ok(None);
    };
    if block.host != *host {
        let message = format!(
            "block {} is leased to host {}; host {} may give back its own only",
            block.cidr,
            env.host_name(&block.host),
            env.host_name(host),
        );
        return Err(ApiError::new(ErrorCode::Forbidden, message));
    }
    let inside = |address: &IpAddr| block.cidr.contains(address);
    let users = env.endpoints_of_host(host);
    let users =
        users.filter(|endpoint| endpoint.network == network.id && endpoint.addresses.iter().any(inside));
    let users: Vec<String> =
        users.map(|e| e.name.as_ref().map_or_else(|| e.id.to_string(), ToString::to_string)).collect();
    if !users.is_empty() {
        let message = format!(
            "block {} of network \"{}\" is in use by {}; remove them first",
            block.cidr,
            network.name,
            list(users, 10)
        );
        return Err(ApiError::new(ErrorCode::InUse, message));
    }
    let (mut compares, mut ops) = withdraw(keys, env, block, false)?;
    compares.extend([
        unchanged(env, keys.block(&network.id, &block.cidr)),
        Compare::NonePutSince(keys.endpoints(), revision),
        // Whoever takes part since then would not be waited for.
        Compare::NonePutSince(keys.blocks(&network.id), revision),
        Compare::NonePutSince(keys.claims(&network.id), revision),
    ]);
    // Nobody is left who could consent.
    let asked = env.claims_of(&network.id).filter(|claim| claim.asked && inside(&claim.address));
    ops.extend(asked.map(|claim| Op::Delete(keys.claim(&network.id, &claim.address))));
    Ok(Some(Txn::new(compares, ops)))
}

/// That `host` lets a claimed address go. `None` if nobody holds it: an answer may have been lost.
pub(crate) fn release(
    keys: Keys<'_>,
    env: &Environment,
    revision: Revision,
    network: &Network,
    host: &HostId,
    address: IpAddr,
    endpoint: Option<&EndpointId>,
) -> Result<Option<Txn>, ApiError> {
    let claim = env.catalog.claims.get(&(network.id.clone(), address));
    let Some(claim) = claim.filter(|claim| endpoint.is_none_or(|endpoint| claim.endpoint == *endpoint))
    else {
        return Ok(None);
    };
    if claim.host != *host {
        let (holder, host) = (env.host_name(&claim.host), env.host_name(host));
        let message =
            format!("address {address} is claimed by host {holder}; host {host} may release its own only");
        return Err(ApiError::new(ErrorCode::Forbidden, message));
    }
    if let Some(endpoint) = env.holder(&network.id, address).filter(|endpoint| endpoint.host == *host) {
        let message = format!("address {address} is that of endpoint {}; remove it first", endpoint.id);
        return Err(ApiError::new(ErrorCode::InUse, message));
    }
    if let Some(wanted) = &claim.wanted {
        return consent_to_move(keys, env, network, host, address, wanted.at, true);
    }
    let key = keys.claim(&network.id, &address);
    let compares = vec![unchanged(env, key.clone()), Compare::NonePutSince(keys.endpoints(), revision)];
    Ok(Some(Txn::new(compares, vec![Op::Delete(key)])))
}

/// What takes a block from its host: it is withdrawn until the others have heard of it, and the host itself unless it is
/// `removed`. Nobody who is gone is waited for: that each of them is there is compared.
pub(crate) fn withdraw(
    keys: Keys<'_>,
    env: &Environment,
    block: &Block,
    removed: bool,
) -> Result<(Vec<Compare>, Vec<Op>), ApiError> {
    let mut waits_for: BTreeSet<HostId> = env.hosts_of(&block.network).cloned().collect();
    // Who left the network a moment ago may not have heard of that yet.
    waits_for.extend(env.withdrawn_of(&block.network).flat_map(|other| other.waits_for.iter().cloned()));
    // Who has not said what it holds since a restore may take part without our knowing.
    waits_for.extend(env.unreported.keys().cloned());
    if removed {
        waits_for.remove(&block.host);
    }
    let compares = waits_for.iter().map(|host| Compare::Present(keys.host(host))).collect();
    let mut ops = vec![Op::Delete(keys.block(&block.network, &block.cidr))];
    if !waits_for.is_empty() {
        let (network, cidr, host) = (block.network.clone(), block.cidr, block.host.clone());
        let withdrawn = Withdrawn { network, cidr, host, at: Revision::default(), waits_for };
        ops.push(put(keys.withdrawn(&block.network, &block.cidr), &withdrawn)?);
    }
    Ok((compares, ops))
}

/// That a host has heard of all up to `revision`, or is removed: which withdrawn blocks wait for it no more. `None` if none
/// waited.
pub(crate) fn heard(
    keys: Keys<'_>,
    env: &Environment,
    host: &HostId,
    revision: Revision,
) -> Result<Option<Txn>, ApiError> {
    let mut txn = Txn::default();
    for withdrawn in env.withdrawn.values().filter(|one| one.at <= revision && one.waits_for.contains(host)) {
        let key = keys.withdrawn(&withdrawn.network, &withdrawn.cidr);
        let mut rest = withdrawn.clone();
        rest.waits_for.remove(host);
        txn.compares.push(unchanged(env, key.clone()));
        txn.success.push(if rest.waits_for.is_empty() { Op::Delete(key) } else { put(key, &rest)? });
    }
    Ok((!txn.success.is_empty()).then_some(txn))
}

/// Any address that is in no block and does not rest, where no block is free: of what no block can be made, then of the
/// claims slice.
pub(crate) fn single(env: &Environment, network: &Network) -> Result<IpAddr, ApiError> {
    let geometry = network.geometry();
    let all = (0..geometry.blocks()).rev().filter_map(|index| geometry.piece(index));
    let free = |cidr: &IpNet| {
        let name = (network.id.clone(), *cidr);
        !env.catalog.blocks.contains_key(&name) && !env.withdrawn.contains_key(&name)
    };
    let resting = env.resting(&network.id);
    let unclaimed = |address: &IpAddr| {
        !env.catalog.claims.contains_key(&(network.id.clone(), *address))
            && !resting.contains(address)
            && env.holder(&network.id, *address).is_none()
    };
    all.filter(free)
        .find_map(|cidr| geometry.addresses(cidr).find(unclaimed))
        .ok_or_else(|| exhausted(env, network))
}

/// How a claim may be made.
pub(crate) fn claim(
    keys: Keys<'_>,
    env: &Environment,
    revision: Revision,
    network: &Network,
    wanted: &Claim,
) -> Result<Grant<Claim>, ApiError> {
    let geometry = network.geometry();
    let (name, address) = (&network.name, wanted.address);
    let (first, last) = geometry.claims();
    let refuse = |code, what: String| {
        let remedy = format!("choose one from {first} to {last} or from this host's own blocks");
        Err(ApiError::new(code, format!("address {address} {what}; {remedy}")))
    };
    let Some((cidr, leasable)) = geometry.block_of(address) else {
        return refuse(
            ErrorCode::Invalid,
            format!("is outside the pool {} of network \"{name}\"", network.pool()),
        );
    };
    if !geometry.assignable(address) {
        let what = format!(
            "is the network, broadcast or gateway address of network \"{name}\" ({})",
            network.pool()
        );
        return refuse(ErrorCode::Invalid, what);
    }
    if let Some(claim) = env.catalog.claims.get(&(network.id.clone(), address)) {
        if (&claim.host, &claim.endpoint) == (&wanted.host, &wanted.endpoint) {
            let key = keys.claim(&network.id, &address);
            let compares = vec![unchanged(env, key.clone())];
            return Ok(Grant::Held(Txn::new(compares, Vec::new()), claim.clone()));
        }
        let holder = env.catalog.endpoints.get(&claim.endpoint).and_then(|endpoint| endpoint.name.as_ref());
        let holder = holder.map_or_else(|| claim.endpoint.to_string(), ToString::to_string);
        let host = env.host_name(&claim.host);
        let what = format!("of network \"{name}\" is taken by endpoint {holder} on host {host}");
        return refuse(ErrorCode::Conflict, what);
    }
    if let Some(holder) = env.holder(&network.id, address).filter(|holder| holder.id != wanted.endpoint) {
        let (who, host) = (holder.name.as_ref(), env.host_name(&holder.host));
        let who = who.map_or_else(|| holder.id.to_string(), ToString::to_string);
        let what = format!("of network \"{name}\" is taken by endpoint {who} on host {host}");
        return refuse(ErrorCode::Conflict, what);
    }
    let block_key = keys.block(&network.id, &cidr);
    let mut claim = wanted.clone();
    let mut compares = vec![
        Compare::Absent(keys.claim(&network.id, &address)),
        Compare::Present(keys.network(&network.id)),
        Compare::Present(keys.host(&wanted.host)),
        Compare::NonePutSince(keys.endpoints(), revision),
    ];
    if leasable {
        if env.withdrawn.contains_key(&(network.id.clone(), cidr)) {
            let what = format!("lies in block {cidr}, which was given back and is not free yet");
            return refuse(ErrorCode::Conflict, what);
        }
        match env.catalog.blocks.get(&(network.id.clone(), cidr)) {
            Some(block) if block.host == wanted.host => {
                let what = format!("lies in block {cidr} leased to this host, which assigns it itself");
                return refuse(ErrorCode::Conflict, what);
            }
            Some(block) if block.router_address() == address => {
                let what = format!("is that of the router of host {}", env.host_name(&block.host));
                return refuse(ErrorCode::Conflict, what);
            }
            Some(_) => {
                claim.asked = true;
                compares.push(unchanged(env, block_key));
            }
            None => {
                compares.push(Compare::Absent(block_key));
                compares.push(Compare::Absent(keys.withdrawn(&network.id, &cidr)));
            }
        }
    }
    let txn = Txn::new(compares, vec![put(keys.claim(&network.id, &address), &claim)?]);
    Ok(Grant::New(txn, claim))
}

/// The claim that is retained for somebody in a network.
pub(crate) fn retained<'a>(env: &'a Environment, network: &'a Network, owner: &str) -> Option<&'a Claim> {
    env.claims_of(&network.id)
        .find(|claim| claim.retained.as_ref().is_some_and(|retained| retained.owner == owner))
}

/// How `host` gets an address that is retained for somebody: it has it, or asks the host that has it.
pub(crate) fn move_retained(
    keys: Keys<'_>,
    env: &Environment,
    revision: Revision,
    claim: &Claim,
    (host, endpoint): (&HostId, &EndpointId),
) -> Result<Grant<Claim>, ApiError> {
    let key = keys.claim(&claim.network, &claim.address);
    let compares = vec![unchanged(env, key.clone())];
    if claim.host == *host {
        return Ok(Grant::Held(Txn::new(compares, Vec::new()), claim.clone()));
    }
    if let Some(holder) = env.holder(&claim.network, claim.address) {
        let who = holder.name.as_ref().map_or_else(|| holder.id.to_string(), ToString::to_string);
        let message = format!(
            "address {} is retained for it, and endpoint {who} on host {} has it",
            claim.address,
            env.host_name(&holder.host)
        );
        return Err(ApiError::new(ErrorCode::Conflict, message));
    }
    let wanted = Wanted { host: host.clone(), endpoint: endpoint.clone(), at: revision };
    let asked = Claim { wanted: Some(wanted), ..claim.clone() };
    Ok(Grant::New(Txn::new(compares, vec![put(key, &asked)?]), asked))
}

/// That the holder of a retained address lets go of it, or does not. `None` if nobody asks for it any more.
pub(crate) fn consent_to_move(
    keys: Keys<'_>,
    env: &Environment,
    network: &Network,
    holder: &HostId,
    address: IpAddr,
    at: Revision,
    consents: bool,
) -> Result<Option<Txn>, ApiError> {
    let claim = env.catalog.claims.get(&(network.id.clone(), address)).filter(|claim| claim.host == *holder);
    let Some((claim, wanted)) = claim.and_then(|claim| Some((claim, claim.wanted.as_ref()?))) else {
        return Ok(None);
    };
    if wanted.at != at {
        return Ok(None);
    }
    let key = keys.claim(&network.id, &address);
    let mut compares = vec![unchanged(env, key.clone())];
    let mut next = Claim { wanted: None, ..claim.clone() };
    if consents && env.catalog.hosts.contains_key(&wanted.host) {
        compares.push(Compare::Present(keys.host(&wanted.host)));
        (next.host, next.endpoint) = (wanted.host.clone(), wanted.endpoint.clone());
    }
    Ok(Some(Txn::new(compares, vec![put(key, &next)?])))
}

/// That nobody asks for a retained address any more: who did could wait no longer.
pub(crate) fn ask_no_more(keys: Keys<'_>, env: &Environment, asked: &Claim) -> Result<Option<Txn>, ApiError> {
    let claim = env.catalog.claims.get(&(asked.network.clone(), asked.address));
    let Some(claim) = claim.filter(|claim| claim.wanted.is_some() && claim.wanted == asked.wanted) else {
        return Ok(None);
    };
    let key = keys.claim(&claim.network, &claim.address);
    let next = Claim { wanted: None, ..claim.clone() };
    Ok(Some(Txn::new(vec![unchanged(env, key.clone())], vec![put(key, &next)?])))
}

/// That an address is not retained any more: its host gives it back when nobody has it. `None` if it is not.
pub(crate) fn retain_no_more(
    keys: Keys<'_>,
    env: &Environment,
    network: &Network,
    address: IpAddr,
) -> Result<Option<Txn>, ApiError> {
    let claim = env.catalog.claims.get(&(network.id.clone(), address));
    let Some(claim) = claim.filter(|claim| claim.retained.is_some()) else { return Ok(None) };
    let key = keys.claim(&network.id, &address);
    let next = Claim { retained: None, ..claim.clone() };
    Ok(Some(Txn::new(vec![unchanged(env, key.clone())], vec![put(key, &next)?])))
}

/// An address for somebody for whom none is retained yet: of the slice for claims if one is free there, where no block ever
/// is.
pub(crate) fn unretained(env: &Environment, network: &Network) -> Result<IpAddr, ApiError> {
    let geometry = network.geometry();
    let free = |address: &IpAddr| {
        !env.catalog.claims.contains_key(&(network.id.clone(), *address))
            && env.holder(&network.id, *address).is_none()
    };
    let slice = (0..geometry.claim_blocks()).rev().filter_map(|index| geometry.piece(index));
    let found = slice.flat_map(|cidr| geometry.addresses(cidr)).find(free);
    found.map_or_else(|| single(env, network), Ok)
}

/// That the holder of the block lets go of an address that was asked for, or does not. `None` if nobody asks for it any more.
pub(crate) fn consent(
    keys: Keys<'_>,
    env: &Environment,
    network: &Network,
    holder: &HostId,
    address: IpAddr,
    endpoint: &EndpointId,
    consents: bool,
) -> Result<Option<Txn>, ApiError> {
    let claim = env.catalog.claims.get(&(network.id.clone(), address));
    let Some(claim) = claim.filter(|claim| claim.asked && claim.endpoint == *endpoint) else {
        return Ok(None);
    };
    let block = network.geometry().block_of(address);
    let block = block.and_then(|(cidr, _)| env.catalog.blocks.get(&(network.id.clone(), cidr)));
    let Some(block) = block.filter(|block| block.host == *holder) else {
        let message =
            format!("address {address} of network \"{}\" is in no block of this host", network.name);
        return Err(ApiError::new(ErrorCode::Forbidden, message));
    };
    let key = keys.claim(&network.id, &address);
    let compares = vec![unchanged(env, key.clone()), unchanged(env, keys.block(&network.id, &block.cidr))];
    let op = if consents { put(key, &Claim { asked: false, ..claim.clone() })? } else { Op::Delete(key) };
    Ok(Some(Txn::new(compares, vec![op])))
}

/// That a key is as this server knows it. What a block says of when it was leased may be of an earlier life of the store.
fn unchanged(env: &Environment, key: String) -> Compare {
    let modified = env.modified(&key).unwrap_or_default();
    Compare::Modified(key, modified)
}

/// `a, b, c, … (9 in all)`
pub(crate) fn list(items: impl IntoIterator<Item = String>, most: usize) -> String {
    let items: Vec<String> = items.into_iter().collect();
    if items.len() <= most {
        return items.join(", ");
    }
    format!("{}, … ({} in all)", items[..most].join(", "), items.len())
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn hosts_take_every_leasable_block_once_and_then_there_is_none() {
        let geometry = Geometry::new("10.9.0.0/20".parse().unwrap(), 26);
        let taken = RefCell::new(BTreeSet::new());
        for i in 0..60u8 {
            let host = HostId::from_random([i % 7; 8]);
            let block = first_free(&geometry, &host, |cidr| taken.borrow().contains(cidr)).unwrap();
            assert!(taken.borrow_mut().insert(block), "{block} was given twice");
        }
        assert!(taken.borrow().iter().all(|block: &IpNet| block.network() != geometry.gateway()));
        let host = HostId::from_random([1; 8]);
        assert_eq!(first_free(&geometry, &host, |cidr| taken.borrow().contains(cidr)), None);
    }

    #[test]
    fn long_lists_are_cut_and_counted() {
        assert_eq!(list(["a".into(), "b".into()], 2), "a, b");
        assert_eq!(list((0..9).map(|i| i.to_string()), 2), "0, 1, … (9 in all)");
    }
}
