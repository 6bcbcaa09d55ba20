//! How a network's pool is cut: the gateway, a slice for requested addresses, and blocks for hosts.
//!
//! The pool is cut into blocks of equal size. The first sixteenth of the blocks, and at least one, is never leased:
//! requested addresses (claims) may come from there, and the gateway lives there. The pool's own first address and
//! the last (network and broadcast) are nobody's.
//!
//! Invariant: an address belongs to at most one block, and a block to at most one host.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net};
use serde::{Deserialize, Serialize};

use crate::{EndpointId, HostId, NetworkId, Revision};

/// A piece of a network's pool leased to one host, from which its agent assigns addresses alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Block {
    /// The network.
    pub network: NetworkId,
    /// The piece.
    #[schema(value_type = String)]
    pub cidr: IpNet,
    /// Who holds it.
    pub host: HostId,
    /// The order of leases: the oldest block of a host in a network holds its router's address.
    pub leased: Revision,
}

/// One address held for one host, outside its blocks: asked for with an endpoint that is to come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Claim {
    /// The network.
    pub network: NetworkId,
    /// The address.
    #[schema(value_type = String)]
    pub address: IpAddr,
    /// The host it is used on.
    pub host: HostId,
    /// The endpoint that was to come. While the host keeps the address, it may give it to another one of its own.
    pub endpoint: EndpointId,
    /// It lies in another host's block, which has not let go of it yet: it is nobody's before that.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub asked: bool,
    /// It is for the router of a host that holds no block, because none is free.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub router: bool,
    /// It outlives its endpoint, for the next one that is called the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retained: Option<Retained>,
    /// Another host asks for it, for that next one; it is this host's until that has let go of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wanted: Option<Wanted>,
}

/// For whom an address is kept, and for how long.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Retained {
    /// What the container is called: `NAME`, or `STACK/NAME`, or `STACK/SERVICE/NAME`.
    pub owner: String,
    /// For how long nobody may have it before it is given up, in seconds.
    pub seconds: u64,
}

/// A host that asks for a retained address.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Wanted {
    /// The host.
    pub host: HostId,
    /// The endpoint that it is for.
    pub endpoint: EndpointId,
    /// What tells this request from others for the same: the revision that it was planned at.
    pub at: Revision,
}

/// A block that was given back, and is not leased to another host before these have heard of it: until then they may send
/// to the host that held it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Withdrawn {
    /// The network.
    pub network: NetworkId,
    /// The block.
    #[schema(value_type = String)]
    pub cidr: IpNet,
    /// Who held it, and may have it again at once.
    pub host: HostId,
    /// The revision that withdrew it.
    pub at: Revision,
    /// Who has not said that it has heard of it.
    pub waits_for: BTreeSet<HostId>,
}

/// Which address of a host's oldest block is its router's.
pub const ROUTER_OFFSET: u32 = 1;

impl Block {
    /// The router's address, if this is its host's oldest block in the network.
    pub fn router_address(&self) -> IpAddr {
        match self.cidr.network() {
            IpAddr::V4(base) => IpAddr::V4(offset(base, ROUTER_OFFSET)),
            IpAddr::V6(base) => IpAddr::V6((u128::from(base) + u128::from(ROUTER_OFFSET)).into()),
        }
    }
}

/// The layout of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    pool: Ipv4Net,
    block_prefix: u8,
}

impl Geometry {
    /// The layout of `pool` in blocks of `/block_prefix`. Both are of a validated network, hence IPv4 and in range.
    pub fn new(pool: IpNet, block_prefix: u8) -> Self {
        let pool = match pool {
            IpNet::V4(pool) => pool.trunc(),
            IpNet::V6(_) => Ipv4Net::default(),
        };
        Self { pool, block_prefix: block_prefix.clamp(pool.prefix_len(), 32) }
    }

    /// The gateway: the first address after the pool's own, the same on each host.
    pub fn gateway(&self) -> IpAddr {
        IpAddr::V4(offset(self.pool.network(), 1))
    }

    /// How many blocks the pool has, those never leased included.
    pub fn blocks(&self) -> u32 {
        1 << (self.block_prefix - self.pool.prefix_len()).min(31)
    }

    /// How many blocks at the pool's start are never leased: the claims slice.
    pub fn claim_blocks(&self) -> u32 {
        (self.blocks() / 16).max(1)
    }

    /// The claims slice as a range of addresses that may be claimed, both ends included.
    pub fn claims(&self) -> (IpAddr, IpAddr) {
        let first = offset(self.pool.network(), 2);
        let last = offset(self.pool.network(), self.claim_blocks() * self.block_size() - 1);
        (first.into(), last.into())
    }

    /// Block number `index`, if it is one that may be leased.
    pub fn block(&self, index: u32) -> Option<IpNet> {
        (self.claim_blocks()..self.blocks()).contains(&index).then(|| self.block_at(index))
    }

    /// Piece number `index` of the pool, leasable or not.
    pub fn piece(&self, index: u32) -> Option<IpNet> {
        (index < self.blocks()).then(|| self.block_at(index))
    }

    /// The block that `address` lies in, leased or not, and whether that block may be leased at all.
    pub fn block_of(&self, address: IpAddr) -> Option<(IpNet, bool)> {
        let IpAddr::V4(address) = address else { return None };
        if !self.pool.contains(&address) {
            return None;
        }
        let index = (u32::from(address) - u32::from(self.pool.network())) / self.block_size();
        Some((self.block_at(index), index >= self.claim_blocks()))
    }

    /// Whether an endpoint may have `address`: it lies in the pool and is not the network's, broadcast or gateway's.
    pub fn assignable(&self, address: IpAddr) -> bool {
        let IpAddr::V4(v4) = address else { return false };
        self.pool.contains(&v4)
            && v4 != self.pool.network()
            && v4 != self.pool.broadcast()
            && address != self.gateway()
    }

    /// The addresses of `block` that endpoints may have.
    pub fn addresses(&self, block: IpNet) -> impl Iterator<Item = IpAddr> + use<> {
        let this = *self;
        let (first, count) = match block {
            IpNet::V4(block) => (u32::from(block.network()), 1u64 << (32 - block.prefix_len())),
            IpNet::V6(_) => (0, 0),
        };
        (0..count)
            .map(move |i| IpAddr::V4(Ipv4Addr::from(first + i as u32)))
            .filter(move |address| this.assignable(*address))
    }

    fn block_size(&self) -> u32 {
        1 << (32 - self.block_prefix).min(31)
    }

    fn block_at(&self, index: u32) -> IpNet {
        let base = offset(self.pool.network(), index * self.block_size());
        IpNet::V4(Ipv4Net::new(base, self.block_prefix).unwrap_or(self.pool))
    }
}

fn offset(base: Ipv4Addr, by: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(base).wrapping_add(by))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn managed() -> Geometry {
        Geometry::new("10.42.0.0/16".parse().unwrap(), 26)
    }

    #[test]
    fn the_managed_pool_has_1024_blocks_of_which_64_are_for_claims() {
        let g = managed();
        assert_eq!((g.blocks(), g.claim_blocks()), (1024, 64));
        assert_eq!(g.block(63), None);
        assert_eq!(g.block(64), Some("10.42.16.0/26".parse().unwrap()));
        assert_eq!(g.block(1023), Some("10.42.255.192/26".parse().unwrap()));
        assert_eq!(g.block(1024), None);
        assert_eq!(g.claims(), ("10.42.0.2".parse().unwrap(), "10.42.15.255".parse().unwrap()));
    }

    #[test]
    fn network_broadcast_gateway_and_strangers_are_not_assignable() {
        let g = managed();
        for bad in ["10.42.0.0", "10.42.0.1", "10.42.255.255", "10.43.0.5", "fd00::1"] {
            assert!(!g.assignable(bad.parse().unwrap()), "{bad}");
        }
        assert!(g.assignable("10.42.0.2".parse().unwrap()));
        assert_eq!(g.addresses(g.block(64).unwrap()).count(), 64);
        assert_eq!(
            g.addresses(g.block(1023).unwrap()).count(),
            63,
            "the last block holds the broadcast address"
        );
    }

    #[test]
    fn every_address_of_the_pool_lies_in_exactly_the_block_that_lists_it() {
        let g = Geometry::new("192.168.4.0/22".parse().unwrap(), 28);
        for index in 0..g.blocks() {
            let block = g.block_at(index);
            for address in g.addresses(block) {
                assert_eq!(g.block_of(address), Some((block, index >= g.claim_blocks())));
            }
        }
    }

    #[test]
    fn the_router_is_at_the_second_address_of_its_block() {
        let block = Block {
            network: NetworkId::from_random([0; 8]),
            cidr: "10.42.64.64/26".parse().unwrap(),
            host: HostId::from_random([0; 8]),
            leased: Revision(1),
        };
        assert_eq!(block.router_address().to_string(), "10.42.64.65");
    }
}
