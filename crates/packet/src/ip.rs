//! Either IP version: where the transport is, and the pseudo-header's sum.

use std::net::IpAddr;

use crate::{Malformed, checksum::Sum, field, ipv4, ipv6, protocol};

/// Extension headers that are walked before a packet counts as not readable. Real ones have one or two.
const EXTENSIONS_MAX: usize = 8;

/// IP version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// Where the parts of an IP packet are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// IP version.
    pub version: Version,
    /// Protocol of what begins at `transport`.
    pub protocol: u8,
    /// Offset of the first byte after the IP headers. In a fragment that is not the first, no transport header is
    /// there.
    pub transport: usize,
    /// Where the packet ends by its own length field; bytes after it are padding.
    pub end: usize,
    /// Part of a fragmented packet, the first included.
    pub fragment: bool,
    /// Has a fragment offset: the transport header is elsewhere.
    pub later_fragment: bool,
    /// No options and no extension headers.
    pub plain: bool,
}

/// Finds the transport of an IP packet, over IPv6 extension headers as far as needed.
#[inline]
pub fn locate(packet: &[u8]) -> Result<Layout, Malformed> {
    match packet.first().map(|first| first >> 4) {
        Some(4) => {
            let view = ipv4::Packet::new_checked(packet)?;
            Ok(Layout {
                version: Version::V4,
                protocol: view.protocol(),
                transport: view.header_len(),
                end: view.total_len(),
                fragment: view.is_fragment(),
                later_fragment: view.fragment_offset() != 0,
                plain: view.header_len() == ipv4::HEADER_LEN,
            })
        }
        Some(6) => {
            let view = ipv6::Packet::new_checked(packet)?;
            let layout = Layout {
                version: Version::V6,
                protocol: view.next_header(),
                transport: ipv6::HEADER_LEN,
                end: view.total_len(),
                fragment: false,
                later_fragment: false,
                plain: true,
            };
            walk_extensions(&packet[..layout.end], layout)
        }
        Some(_) => Err(Malformed::Version("IP")),
        None => Err(Malformed::Truncated("IP header")),
    }
}

/// RFC 8200 §4: each header says what follows it.
#[inline]
fn walk_extensions(packet: &[u8], mut layout: Layout) -> Result<Layout, Malformed> {
    for _ in 0..EXTENSIONS_MAX {
        let kind = layout.protocol;
        if !matches!(
            kind,
            protocol::HOP_BY_HOP
                | protocol::ROUTING
                | protocol::DESTINATION
                | protocol::FRAGMENT
                | protocol::AH
        ) {
            return Ok(layout);
        }
        let header = packet
            .get(layout.transport..)
            .filter(|rest| rest.len() >= 8)
            .ok_or(Malformed::Truncated("IPv6 extension header"))?;
        let length = match kind {
            protocol::FRAGMENT => 8,
            protocol::AH => (usize::from(header[1]) + 2) * 4,
            _ => (usize::from(header[1]) + 1) * 8,
        };
        if length > header.len() {
            return Err(Malformed::Length("IPv6 extension header"));
        }
        layout.plain = false;
        layout.protocol = header[0];
        layout.transport += length;
        if kind == protocol::FRAGMENT {
            let offset = field::be16(header, 2);
            // An "atomic" fragment (offset 0, nothing more) is a whole packet: RFC 6946.
            layout.fragment |= offset & 0xfff9 != 0;
            layout.later_fragment |= offset & 0xfff8 != 0;
            if layout.later_fragment {
                return Ok(layout);
            }
        }
    }
    Err(Malformed::Unsupported("IPv6 extension headers"))
}

/// Source and destination of a packet that [`locate`] has read.
#[inline]
pub fn addresses(packet: &[u8], version: Version) -> &[u8] {
    match version {
        Version::V4 => &packet[12..20],
        Version::V6 => &packet[8..40],
    }
}

/// The sum over the pseudo-header (RFC 9293 §3.1, RFC 8200 §8.1) of a packet that [`locate`] has read, for
/// `length` bytes of transport header and payload.
#[inline]
pub fn pseudo_sum(packet: &[u8], version: Version, protocol: u8, length: usize) -> Sum {
    Sum::default().bytes(addresses(packet, version)).u16(u16::from(protocol)).u32(length as u32)
}

/// As [`pseudo_sum`], from addresses. `None` when they are of different families.
pub fn pseudo_header(source: IpAddr, destination: IpAddr, protocol: u8, length: usize) -> Option<Sum> {
    let sum = match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            Sum::default().bytes(&source.octets()).bytes(&destination.octets())
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            Sum::default().bytes(&source.octets()).bytes(&destination.octets())
        }
        _ => return None,
    };
    Some(sum.u16(u16::from(protocol)).u32(length as u32))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn v6(next_header: u8, payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; 40];
        ipv6::Repr { next_header, payload_len: payload.len() as u16, ..ipv6::Repr::default() }
            .emit(&mut packet);
        packet.extend(payload);
        packet
    }

    #[test]
    fn the_transport_is_found_behind_options_and_extension_headers() {
        let mut packet = vec![0; 28];
        ipv4::Repr { protocol: protocol::UDP, payload_len: 8, ..ipv4::Repr::default() }.emit(&mut packet);
        packet[0] = 0x46;
        let layout = locate(&packet).unwrap();
        assert_eq!((layout.transport, layout.end, layout.plain), (24, 28, false));

        let mut chain = vec![43, 0, 0, 0, 0, 0, 0, 0]; // hop-by-hop, then routing
        chain.extend([60, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]); // routing of 16, then destination
        chain.extend([6, 0, 0, 0, 0, 0, 0, 0]); // destination, then TCP
        chain.extend([0; 20]);
        let layout = locate(&v6(protocol::HOP_BY_HOP, &chain)).unwrap();
        assert_eq!((layout.protocol, layout.transport, layout.plain), (protocol::TCP, 72, false));
        assert!(!layout.fragment);
    }

    #[test]
    fn fragments_are_told_apart_and_atomic_ones_are_none() {
        let fragment = |word: u16| {
            let [a, b] = word.to_be_bytes();
            locate(&v6(protocol::FRAGMENT, &[17, 0, a, b, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0])).unwrap()
        };
        assert_eq!((fragment(0).fragment, fragment(0).later_fragment), (false, false));
        assert_eq!((fragment(1).fragment, fragment(1).later_fragment), (true, false));
        assert_eq!((fragment(8).fragment, fragment(8).later_fragment), (true, true));
    }

    #[test]
    fn a_chain_that_does_not_end_or_runs_out_is_refused() {
        let endless: Vec<u8> = [60u8, 0, 0, 0, 0, 0, 0, 0].repeat(9);
        assert_eq!(
            locate(&v6(protocol::DESTINATION, &endless)),
            Err(Malformed::Unsupported("IPv6 extension headers"))
        );
        assert!(locate(&v6(protocol::ROUTING, &[6, 1, 0, 0, 0, 0, 0, 0])).is_err());
        assert!(locate(&v6(protocol::ROUTING, &[6, 0, 0])).is_err());
        assert!(locate(&[]).is_err());
        assert!(locate(&[0x50; 60]).is_err());
    }

    proptest! {
        #[test]
        fn what_is_located_is_inside_the_packet(mut bytes in proptest::collection::vec(any::<u8>(), 1..200), v6 in any::<bool>()) {
            bytes[0] = if v6 { 0x60 } else { 0x45 };
            if let Ok(layout) = locate(&bytes) {
                prop_assert!(layout.transport <= layout.end && layout.end <= bytes.len());
            }
        }
    }
}
