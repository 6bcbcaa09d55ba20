//! "The packet does not fit": ICMP fragmentation needed (RFC 792, RFC 1191 §4) and ICMPv6 packet too big (RFC 4443
//! §3.2), built and read.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::{
    Malformed,
    checksum::{self, Sum},
    field,
    ip::{self, Layout, Version},
    ipv4, ipv6, protocol,
};

/// ICMP header: type, code, checksum and four bytes more.
const ICMP_LEN: usize = 8;
/// Fragmentation needed: destination unreachable (3), code 4.
const UNREACHABLE_V4: u8 = 3;
const FRAGMENTATION_NEEDED: u8 = 4;
/// Packet too big.
const TOO_BIG_V6: u8 = 2;
/// An ICMP error has at most so many bytes (RFC 1812 §4.3.2.3).
const ERROR_MAX_V4: usize = 576;
/// And an ICMPv6 error no more than the least MTU (RFC 4443 §2.4 (c)).
const ERROR_MAX_V6: usize = 1280;
/// Bytes that the longest message of either family has: how large an `out` is enough.
pub const MESSAGE_LEN_MAX: usize = ERROR_MAX_V6;

/// Says that `original` does not fit into `mtu` bytes: writes the whole IP packet to send back to `out` and returns
/// its length. It begins from `router`, or where that is of the other family, from `original`'s destination.
///
/// `Ok(None)` where no error may be sent: for ICMP errors, later fragments, and packets to many or from nobody (RFC
/// 1122 §3.2.2, RFC 4443 §2.4 (e)), for IPv4 without "don't fragment", and when `out` is too short.
pub fn too_big(
    original: &[u8],
    router: IpAddr,
    mtu: u32,
    out: &mut [u8],
) -> Result<Option<usize>, Malformed> {
    let layout = ip::locate(original)?;
    let original = &original[..layout.end];
    if layout.later_fragment || is_icmp_error(original, layout) {
        return Ok(None);
    }
    Ok(match layout.version {
        Version::V4 => too_big_v4(original, router, mtu, out),
        Version::V6 => too_big_v6(original, router, mtu, out),
    })
}

fn is_icmp_error(packet: &[u8], layout: Layout) -> bool {
    let kind = packet.get(layout.transport);
    match layout.protocol {
        // Anything but the queries: echo, timestamp, and so on.
        protocol::ICMP => kind.is_none_or(|kind| matches!(kind, 3 | 4 | 5 | 11 | 12)),
        protocol::ICMPV6 => kind.is_none_or(|kind| *kind < 128 || *kind == 137),
        _ => false,
    }
}

fn too_big_v4(original: &[u8], router: IpAddr, mtu: u32, out: &mut [u8]) -> Option<usize> {
    let view = ipv4::Packet::new_checked(original).ok()?;
    let (source, destination) = (view.source(), view.destination());
    let nobody = |a: Ipv4Addr| a.is_unspecified() || a.is_multicast() || a.is_broadcast();
    if !view.dont_fragment() || nobody(source) || nobody(destination) || source.is_loopback() {
        return None;
    }
    let from = match router {
        IpAddr::V4(router) => router,
        IpAddr::V6(_) => destination,
    };
    let quoted = original.len().min(ERROR_MAX_V4 - ipv4::HEADER_LEN - ICMP_LEN);
    let length = ipv4::HEADER_LEN + ICMP_LEN + quoted;
    let out = out.get_mut(..length)?;
    let repr = ipv4::Repr {
        // Network control, as routers send their errors (RFC 1812 §4.3.2.5).
        tos: 0xc0,
        protocol: protocol::ICMP,
        source: from,
        destination: source,
        payload_len: (ICMP_LEN + quoted) as u16,
        ..ipv4::Repr::default()
    };
    repr.emit(out);
    let icmp = &mut out[ipv4::HEADER_LEN..];
    icmp[..ICMP_LEN].copy_from_slice(&[UNREACHABLE_V4, FRAGMENTATION_NEEDED, 0, 0, 0, 0, 0, 0]);
    field::put16(icmp, 6, u16::try_from(mtu).unwrap_or(u16::MAX));
    icmp[ICMP_LEN..].copy_from_slice(&original[..quoted]);
    let sum = checksum::checksum(icmp);
    field::put16(icmp, 2, sum);
    Some(length)
}

fn too_big_v6(original: &[u8], router: IpAddr, mtu: u32, out: &mut [u8]) -> Option<usize> {
    let view = ipv6::Packet::new_checked(original).ok()?;
    let (source, destination) = (view.source(), view.destination());
    // To a group, packet too big is the one error that may be sent (RFC 4443 §2.4 (e.3)).
    if source.is_unspecified() || source.is_multicast() {
        return None;
    }
    let from = match router {
        IpAddr::V6(router) => router,
        IpAddr::V4(_) if destination.is_multicast() => return None,
        IpAddr::V4(_) => destination,
    };
    let quoted = original.len().min(ERROR_MAX_V6 - ipv6::HEADER_LEN - ICMP_LEN);
    let length = ipv6::HEADER_LEN + ICMP_LEN + quoted;
    let out = out.get_mut(..length)?;
    let repr = ipv6::Repr {
        next_header: protocol::ICMPV6,
        source: from,
        destination: source,
        payload_len: (ICMP_LEN + quoted) as u16,
        ..ipv6::Repr::default()
    };
    repr.emit(out);
    let pseudo = ip::pseudo_sum(out, Version::V6, protocol::ICMPV6, ICMP_LEN + quoted);
    let icmp = &mut out[ipv6::HEADER_LEN..];
    icmp[..ICMP_LEN].copy_from_slice(&[TOO_BIG_V6, 0, 0, 0, 0, 0, 0, 0]);
    field::put32(icmp, 4, mtu);
    icmp[ICMP_LEN..].copy_from_slice(&original[..quoted]);
    let sum = pseudo.bytes(icmp).checksum();
    field::put16(icmp, 2, sum);
    Some(length)
}

/// A received "does not fit".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooBig<'a> {
    /// Who says so.
    pub router: IpAddr,
    /// The MTU that the next link has; 0 from routers older than RFC 1191.
    pub mtu: u32,
    /// The start of the packet that did not fit, from its IP header on.
    pub original: &'a [u8],
}

impl<'a> TooBig<'a> {
    /// Reads a whole IP packet. `Ok(None)` when it is some other packet.
    pub fn parse(packet: &'a [u8]) -> Result<Option<Self>, Malformed> {
        let layout = ip::locate(packet)?;
        let icmp = &packet[layout.transport..layout.end];
        let wanted = match layout.version {
            Version::V4 => (protocol::ICMP, UNREACHABLE_V4, FRAGMENTATION_NEEDED),
            Version::V6 => (protocol::ICMPV6, TOO_BIG_V6, 0),
        };
        if layout.fragment
            || icmp.len() < ICMP_LEN + ipv4::HEADER_LEN
            || (layout.protocol, icmp[0], icmp[1]) != wanted
        {
            return Ok(None);
        }
        let pseudo = match layout.version {
            Version::V4 => Sum::default(),
            Version::V6 => ip::pseudo_sum(packet, Version::V6, protocol::ICMPV6, icmp.len()),
        };
        if !pseudo.bytes(icmp).is_valid() {
            return Err(Malformed::Checksum("ICMP"));
        }
        let (router, mtu) = match layout.version {
            Version::V4 => (Ipv4Addr::from(field::array(packet, 12)).into(), u32::from(field::be16(icmp, 6))),
            Version::V6 => (Ipv6Addr::from(field::array::<16>(packet, 8)).into(), field::be32(icmp, 4)),
        };
        Ok(Some(Self { router, mtu, original: &icmp[ICMP_LEN..] }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v4(len: usize, repr: ipv4::Repr) -> Vec<u8> {
        let mut packet = vec![0x5a; len];
        ipv4::Repr { payload_len: (len - 20) as u16, ..repr }.emit(&mut packet);
        packet
    }

    fn sent() -> ipv4::Repr {
        ipv4::Repr {
            dont_fragment: true,
            protocol: protocol::UDP,
            source: Ipv4Addr::new(10, 42, 0, 5),
            destination: Ipv4Addr::new(10, 42, 0, 70),
            ..ipv4::Repr::default()
        }
    }

    const ROUTER: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 42, 0, 1));

    #[test]
    fn fragmentation_needed_is_these_bytes() {
        let original = v4(28, sent());
        let mut out = [0; MESSAGE_LEN_MAX];
        let length = too_big(&original, ROUTER, 1438, &mut out).unwrap().unwrap();
        let mut golden = vec![
            0x45, 0xc0, 0x00, 0x38, 0, 0, 0, 0, 64, 1, 0x65, 0xac, 10, 42, 0, 1, 10, 42, 0, 5, // IPv4
            3, 4, 0x8d, 0xf4, 0, 0, 0x05, 0x9e, // ICMP, MTU 1438
        ];
        golden.extend(&original);
        assert_eq!(out[..length], golden);
    }

    #[test]
    fn what_is_built_is_read_back_in_either_family_and_quotes_as_much_as_fits() {
        let original = v4(1500, sent());
        let mut out = [0; MESSAGE_LEN_MAX];
        let length = too_big(&original, ROUTER, 1438, &mut out).unwrap().unwrap();
        assert_eq!(length, 576);
        let read = TooBig::parse(&out[..length]).unwrap().unwrap();
        assert_eq!(read, TooBig { router: ROUTER, mtu: 1438, original: &original[..548] });

        let mut original = vec![0x5a; 1500];
        let source = "fd00::5".parse().unwrap();
        let destination = "fd00::6".parse().unwrap();
        ipv6::Repr { payload_len: 1460, source, destination, next_header: 17, ..ipv6::Repr::default() }
            .emit(&mut original);
        let router: IpAddr = "fd00::1".parse().unwrap();
        let length = too_big(&original, router, 1400, &mut out).unwrap().unwrap();
        assert_eq!(length, 1280);
        let read = TooBig::parse(&out[..length]).unwrap().unwrap();
        assert_eq!(read, TooBig { router, mtu: 1400, original: &original[..1232] });
        out[1279] ^= 1;
        assert_eq!(TooBig::parse(&out[..length]), Err(Malformed::Checksum("ICMP")));
        // A router of the other family answers as the destination would.
        too_big(&original, ROUTER, 1400, &mut out).unwrap().unwrap();
        assert_eq!(ipv6::Packet::new_checked(&out[..]).unwrap().source(), destination);
    }

    #[test]
    fn no_error_answers_an_error_a_group_nobody_or_a_packet_that_may_be_fragmented() {
        let mut out = [0; MESSAGE_LEN_MAX];
        let refused = |repr: ipv4::Repr, kind: u8| {
            let mut packet = v4(100, repr);
            packet[20] = kind;
            too_big(&packet, ROUTER, 1438, &mut [0; MESSAGE_LEN_MAX]).unwrap().is_none()
        };
        assert!(refused(ipv4::Repr { dont_fragment: false, ..sent() }, 0));
        assert!(refused(ipv4::Repr { destination: Ipv4Addr::new(224, 0, 0, 1), ..sent() }, 0));
        assert!(refused(ipv4::Repr { source: Ipv4Addr::UNSPECIFIED, ..sent() }, 0));
        assert!(refused(ipv4::Repr { protocol: protocol::ICMP, ..sent() }, 3));
        assert!(!refused(ipv4::Repr { protocol: protocol::ICMP, ..sent() }, 8));
        assert!(too_big(&[0x45; 10], ROUTER, 1438, &mut out).is_err());
        assert_eq!(too_big(&v4(100, sent()), ROUTER, 1438, &mut [0; 50]), Ok(None));
        assert_eq!(TooBig::parse(&v4(100, sent())), Ok(None));
    }
}
