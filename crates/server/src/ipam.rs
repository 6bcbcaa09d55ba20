//! Which block a host gets, and which address may be claimed. Pure: it looks at the state and says what should be done.
//!
//! Invariant: a block is leased to one host at most, and a claim lies where no block is ever leased.

use std::collections::BTreeMap;

use ipnet::IpNet;
use model::api::{ApiError, ErrorCode};
use model::{Block, Claim, Geometry, HostId, Network};

use crate::secret;
use crate::state::Environment;

/// The block a host should have next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Lease {
    /// It has it already: the answer to an earlier request was lost.
    Held(Block),
    /// This one is free.
    Free(IpNet),
}

/// The block number `held`, from zero and in the order of leases, of `host` in `network`.
pub(crate) fn lease(
    env: &Environment,
    network: &Network,
    host: &HostId,
    held: usize,
) -> Result<Lease, ApiError> {
    let mut own: Vec<&Block> = env.blocks_of(&network.id).filter(|block| block.host == *host).collect();
    own.sort_by_key(|block| (block.leased, block.cidr));
    if let Some(block) = own.get(held) {
        return Ok(Lease::Held((*block).clone()));
    }
    let taken = |cidr: &IpNet| env.catalog.blocks.contains_key(&(network.id.clone(), *cidr));
    first_free(&network.geometry(), host, taken).map(Lease::Free).ok_or_else(|| {
        let mut holders: BTreeMap<&str, usize> = BTreeMap::new();
        for block in env.blocks_of(&network.id) {
            *holders.entry(env.host_name(&block.host)).or_default() += 1;
        }
        let count: usize = holders.values().sum();
        let holders = list(holders.into_iter().map(|(host, count)| format!("{host}: {count}")), 8);
        ApiError::new(
            ErrorCode::Exhausted,
            format!(
                "network \"{}\": all {count} blocks of {} are leased ({holders}); remove hosts that are gone with \
                 `droveway host rm`, or create a network with a larger --subnet",
                network.name,
                network.pool()
            ),
        )
    })
}

/// The first free block, beginning at a place that depends on the host: hosts that ask at the same time rarely clash.
fn first_free(geometry: &Geometry, host: &HostId, taken: impl Fn(&IpNet) -> bool) -> Option<IpNet> {
    let (first, count) = (geometry.claim_blocks(), geometry.blocks() - geometry.claim_blocks());
    let hash = secret::sha256(host.as_str().as_bytes()).0;
    let start = u32::from_be_bytes([hash[0], hash[1], hash[2], hash[3]]) % count.max(1);
    let indices = (0..count).map(|i| first + ((u64::from(start) + u64::from(i)) % u64::from(count)) as u32);
    indices.filter_map(|index| geometry.block(index)).find(|cidr| !taken(cidr))
}

/// Whether the claim may be made: `false` if it is there already.
pub(crate) fn claim(env: &Environment, network: &Network, wanted: &Claim) -> Result<bool, ApiError> {
    let geometry = network.geometry();
    let (name, address) = (&network.name, wanted.address);
    let (first, last) = geometry.claims();
    let refuse = |code, what: String| {
        let remedy = format!("choose one from {first} to {last} or from this host's own blocks");
        Err(ApiError::new(code, format!("address {address} {what}; {remedy}")))
    };
    let Some((block, leasable)) = geometry.block_of(address) else {
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
    if leasable {
        let whose = match env.catalog.blocks.get(&(network.id.clone(), block)) {
            Some(block) if block.host == wanted.host => {
                "leased to this host, which assigns it itself".to_owned()
            }
            Some(block) => format!("leased to host {}", env.host_name(&block.host)),
            None => "which is kept for leasing to hosts".to_owned(),
        };
        return refuse(ErrorCode::Conflict, format!("lies in block {block} {whose}"));
    }
    match env.catalog.claims.get(&(network.id.clone(), address)) {
        None => Ok(true),
        Some(claim) if claim == wanted => Ok(false),
        Some(claim) => {
            let holder =
                env.catalog.endpoints.get(&claim.endpoint).and_then(|endpoint| endpoint.name.as_ref());
            let holder = holder.map_or_else(|| claim.endpoint.to_string(), ToString::to_string);
            let host = env.host_name(&claim.host);
            let what = format!("of network \"{name}\" is taken by endpoint {holder} on host {host}");
            refuse(ErrorCode::Conflict, what)
        }
    }
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
