//! Which inner packets a peer may send: RFC 4301 §5.2, the check of selectors after decryption.

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use packet::{ipv4, ipv6};

use crate::Reason;

/// Sources and destinations that packets from one peer, in one network, may have. Nothing is allowed but what was
/// given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct InnerPolicy {
    sources: Prefixes,
    destinations: Prefixes,
}

impl InnerPolicy {
    /// The peer's blocks and claims, and what of this network is behind us.
    pub fn new(
        sources: impl IntoIterator<Item = IpNet>,
        destinations: impl IntoIterator<Item = IpNet>,
    ) -> Self {
        Self { sources: Prefixes::new(sources), destinations: Prefixes::new(destinations) }
    }

    /// The length of an IPv4 packet that is allowed, by its own header.
    #[inline]
    pub(crate) fn check_v4(&self, packet: &[u8]) -> Result<usize, Reason> {
        let view = ipv4::Packet::new_checked(packet).map_err(|_| Reason::BadInner)?;
        if !contains(&self.sources.v4, view.source()) {
            return Err(Reason::InnerSource);
        }
        if !contains(&self.destinations.v4, view.destination()) {
            return Err(Reason::InnerDestination);
        }
        Ok(view.total_len())
    }

    /// The length of an IPv6 packet that is allowed, by its own header.
    #[inline]
    pub(crate) fn check_v6(&self, packet: &[u8]) -> Result<usize, Reason> {
        let view = ipv6::Packet::new_checked(packet).map_err(|_| Reason::BadInner)?;
        if !contains(&self.sources.v6, view.source()) {
            return Err(Reason::InnerSource);
        }
        if !contains(&self.destinations.v6, view.destination()) {
            return Err(Reason::InnerDestination);
        }
        Ok(view.total_len())
    }
}

/// Address ranges, apart from each other and sorted, so that a search takes as many steps as their number has bits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Prefixes {
    v4: Box<[(Ipv4Addr, Ipv4Addr)]>,
    v6: Box<[(Ipv6Addr, Ipv6Addr)]>,
}

impl Prefixes {
    fn new(prefixes: impl IntoIterator<Item = IpNet>) -> Self {
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for prefix in prefixes {
            match prefix {
                IpNet::V4(prefix) => v4.push(prefix),
                IpNet::V6(prefix) => v6.push(prefix),
            }
        }
        // Aggregation leaves no prefix inside another, so first addresses and last addresses sort alike.
        let mut v4: Box<[_]> =
            Ipv4Net::aggregate(&v4).iter().map(|net| (net.network(), net.broadcast())).collect();
        let mut v6: Box<[_]> =
            Ipv6Net::aggregate(&v6).iter().map(|net| (net.network(), net.broadcast())).collect();
        v4.sort_unstable();
        v6.sort_unstable();
        Self { v4, v6 }
    }
}

#[inline]
fn contains<A: Ord + Copy>(ranges: &[(A, A)], address: A) -> bool {
    let after = ranges.partition_point(|(first, _)| *first <= address);
    after.checked_sub(1).is_some_and(|index| address <= ranges[index].1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn an_address_is_allowed_exactly_when_a_prefix_holds_it(
            prefixes in proptest::collection::vec((any::<u32>(), 4u8..=32), 0..20),
            addresses in proptest::collection::vec(any::<u32>(), 0..20),
        ) {
            let prefixes: Vec<Ipv4Net> = prefixes
                .into_iter()
                .map(|(address, length)| Ipv4Net::new(address.into(), length).unwrap())
                .collect();
            let set = Prefixes::new(prefixes.iter().copied().map(IpNet::V4));
            let edges = prefixes.iter().flat_map(|net| {
                let (first, last) = (u32::from(net.network()), u32::from(net.broadcast()));
                [first, first.wrapping_sub(1), last, last.wrapping_add(1)]
            });
            for address in addresses.into_iter().chain(edges).map(Ipv4Addr::from) {
                let expected = prefixes.iter().any(|net| net.contains(&address));
                prop_assert_eq!(contains(&set.v4, address), expected, "{}", address);
            }
        }
    }
}
