//! Which peer an inner destination belongs to: the longest prefix, as ranges that are apart from each other and sorted.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::dataplane::PeerIndex;

/// The routes of one device. Nothing is routed that was not given.
#[derive(Debug, Default)]
pub(super) struct Routes {
    v4: Box<[Range]>,
    v6: Box<[Range]>,
    onward: bool,
}

/// From `first` to `last`, both included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    first: u128,
    last: u128,
    peer: PeerIndex,
}

impl Routes {
    pub fn new(routes: impl IntoIterator<Item = (IpNet, PeerIndex)>, onward: bool) -> Self {
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for (net, peer) in routes {
            match net {
                IpNet::V4(net) => v4.push(Range {
                    first: u32::from(net.network()).into(),
                    last: u32::from(net.broadcast()).into(),
                    peer,
                }),
                IpNet::V6(net) => {
                    v6.push(Range { first: net.network().into(), last: net.broadcast().into(), peer });
                }
            }
        }
        Self { v4: flatten(v4), v6: flatten(v6), onward }
    }

    /// Whether what comes from a peer may leave by the device again, to another.
    pub fn onward(&self) -> bool {
        self.onward
    }

    /// The peer for the destination of an IP packet.
    #[inline]
    pub fn find(&self, packet: &[u8]) -> Option<PeerIndex> {
        let (ranges, address) = match destination(packet)? {
            IpAddr::V4(address) => (&self.v4, u128::from(u32::from(address))),
            IpAddr::V6(address) => (&self.v6, u128::from(address)),
        };
        let after = ranges.partition_point(|range| range.first <= address);
        let range = &ranges[after.checked_sub(1)?];
        (address <= range.last).then_some(range.peer)
    }
}

/// The destination of an IP packet, as far as there is one.
#[inline]
pub(super) fn destination(packet: &[u8]) -> Option<IpAddr> {
    match packet.first()? >> 4 {
        4 => Some(IpAddr::from(*packet.get(16..)?.first_chunk::<4>()?)),
        6 => Some(IpAddr::from(*packet.get(24..)?.first_chunk::<16>()?)),
        _ => None,
    }
}

/// Cuts what is inside of another out of it. Of two that are the same, the later stays.
fn flatten(mut nets: Vec<Range>) -> Box<[Range]> {
    // Prefixes lie inside each other or apart. An outer one comes before those inside of it.
    nets.sort_by_key(|net| (net.first, std::cmp::Reverse(net.last)));
    let (mut out, mut open) = (Vec::with_capacity(nets.len()), Vec::<Range>::new());
    for net in nets {
        while let Some(outer) = open.pop_if(|outer| outer.last < net.first) {
            close(&mut out, &mut open, outer);
        }
        if let Some(outer) = open.last_mut() {
            if net.first > outer.first {
                out.push(Range { last: net.first - 1, ..*outer });
            }
            outer.first = net.first;
        }
        open.push(net);
    }
    while let Some(outer) = open.pop() {
        close(&mut out, &mut open, outer);
    }
    out.into()
}

/// Ends a range; the one around it goes on behind it.
fn close(out: &mut Vec<Range>, open: &mut Vec<Range>, range: Range) {
    if range.first <= range.last {
        out.push(range);
    }
    match range.last.checked_add(1) {
        Some(behind) => {
            if let Some(outer) = open.last_mut() {
                outer.first = behind;
            }
        }
        // Nothing is behind the last address of all: what is around ends here too.
        None => open.clear(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn packet(to: IpAddr) -> Vec<u8> {
        let mut packet = vec![0; 40];
        match to {
            IpAddr::V4(to) => {
                packet[0] = 0x45;
                packet[16..20].copy_from_slice(&to.octets());
            }
            IpAddr::V6(to) => {
                packet[0] = 0x60;
                packet[24..40].copy_from_slice(&to.octets());
            }
        }
        packet
    }

    fn found(routes: &Routes, to: &str) -> Option<u64> {
        routes.find(&packet(to.parse().unwrap())).map(|peer| peer.0)
    }

    #[test]
    fn the_longest_prefix_wins_and_nothing_else_is_routed() {
        let routes = [
            ("10.42.0.0/16", 1),
            ("10.42.64.0/26", 2),
            ("10.42.64.7/32", 3),
            ("fd00::/64", 4),
            ("fd00::7/128", 5),
        ];
        let routes = Routes::new(routes.map(|(net, peer)| (net.parse().unwrap(), PeerIndex(peer))), false);
        assert_eq!(found(&routes, "10.42.64.7"), Some(3));
        assert_eq!(found(&routes, "10.42.64.8"), Some(2));
        assert_eq!(found(&routes, "10.42.64.64"), Some(1));
        assert_eq!(found(&routes, "10.43.0.0"), None);
        assert_eq!(found(&routes, "fd00::7"), Some(5));
        assert_eq!(found(&routes, "fd00::8"), Some(4));
        assert_eq!(found(&routes, "fe80::1"), None);
        for short in [&[][..], &[0x45; 19], &[0x60; 39], &[0x50; 60]] {
            assert_eq!(routes.find(short), None);
        }
    }

    proptest! {
        #[test]
        fn every_address_goes_where_its_longest_prefix_says(
            nets in proptest::collection::vec((any::<u32>(), 0u8..=32), 0..20),
            addresses in proptest::collection::vec(any::<u32>(), 0..20),
        ) {
            let nets: Vec<_> = nets
                .into_iter()
                .zip(0..)
                .map(|((address, length), peer)| {
                    let net = ipnet::Ipv4Net::new(address.into(), length).unwrap().trunc();
                    (net, PeerIndex(peer))
                })
                .collect();
            let routes = Routes::new(nets.iter().map(|(net, peer)| (IpNet::V4(*net), *peer)), false);
            let edges = nets.iter().flat_map(|(net, _)| {
                let (first, last) = (u32::from(net.network()), u32::from(net.broadcast()));
                [first, first.wrapping_sub(1), last, last.wrapping_add(1)]
            });
            for address in addresses.into_iter().chain(edges).map(std::net::Ipv4Addr::from) {
                let expected = nets.iter().filter(|(net, _)| net.contains(&address)).max_by_key(|(net, _)| net.prefix_len());
                prop_assert_eq!(routes.find(&packet(address.into())), expected.map(|(_, peer)| *peer), "{}", address);
            }
        }
    }
}
