//! What a frame is, by its headers.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr};

use ike::wire::{Datagram, ExchangeType, NotifyType, Payload};
use packet::ip::{self, Version};
use packet::{encap, esp, protocol, tcp, udp};
use serde::{Deserialize, Serialize};

const ETHERNET_LEN: usize = 14;
const ARP: u16 = 0x0806;
const IPV4: u16 = 0x0800;
const IPV6: u16 = 0x86dd;
/// IKE without marker (RFC 7296 §2).
const IKE_PORT: u16 = 500;
/// What a tunnel's port is unless someone chose another.
const TUNNEL_PORT: u16 = model::TUNNEL_PORT;
/// RFC 3376 §4: a bridge joins a group of its own.
const IGMP: u8 = 2;
/// How many tunnels' ports are kept.
const PORTS_MAX: usize = 1024;
const VXLAN_PORT: u16 = 4789;
/// The smallest SPI that may be used (RFC 4303 §2.1).
const SPI_MIN: u32 = 256;

/// One end of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Side {
    /// The address; unspecified where there is none.
    pub address: IpAddr,
    /// The port, of tunnels only.
    pub port: Option<u16>,
}

/// What a frame holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum What {
    /// An ESP packet in UDP, or several of one flow.
    Esp {
        /// Its SPI.
        spi: u32,
    },
    /// An IKE message.
    Ike {
        /// RFC 7296 §3.1.
        exchange: u8,
        /// Whether it is a response.
        response: bool,
        /// The first error, cookie or redirection in it that is in clear.
        notify: Option<u16>,
    },
    /// Keeps a NAT's mapping.
    Keepalive,
    /// TCP from or to the server's port.
    Control,
    /// VXLAN: in clear.
    Vxlan,
    /// A later fragment of an IP packet.
    Fragment,
    /// ARP.
    Arp,
    /// ICMP, ICMPv6 or IGMP.
    Icmp,
    /// Anything else.
    Other {
        /// The EtherType.
        ethertype: u16,
        /// The IP protocol, or 0.
        protocol: u8,
        /// The lower port, or 0.
        port: u16,
    },
}

impl What {
    /// Whether it only concerns who is on the same net.
    pub fn is_local(&self) -> bool {
        match self {
            Self::Arp => true,
            Self::Esp { .. }
            | Self::Ike { .. }
            | Self::Keepalive
            | Self::Control
            | Self::Vxlan
            | Self::Fragment
            | Self::Icmp
            | Self::Other { .. } => false,
        }
    }
}

/// A frame's place and kind, and where its transport's payload is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) source: Side,
    pub(super) destination: Side,
    pub(super) what: What,
    /// The stream or packet that this frame is a piece of, if its neighbours are others.
    pub(super) part_of: Option<Whole>,
    /// Where that piece begins in the frame.
    pub(super) payload: usize,
    /// Where it ends.
    pub(super) end: usize,
}

/// Something that comes in several frames.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Whole {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    /// Both ports of a stream; the number of a packet in fragments (RFC 791 §3.1).
    number: (u16, u16),
}

/// The ports that mean something here.
#[derive(Debug)]
pub(super) struct Ports {
    /// The server's.
    control: u16,
    /// Those of tunnels: known ones, and those on which IKE was seen since.
    tunnels: BTreeSet<u16>,
}

impl Ports {
    pub(super) fn new(control: u16) -> Self {
        Self { control, tunnels: [TUNNEL_PORT].into() }
    }

    fn learn(&mut self, seen: &Seen) {
        if matches!(seen.what, What::Ike { .. }) && self.tunnels.len() < PORTS_MAX {
            let both = [seen.source.port, seen.destination.port];
            self.tunnels.extend(both.into_iter().flatten().filter(|port| *port != IKE_PORT));
        }
    }
}

/// Looks at a frame.
pub(super) fn look(frame: &[u8], ports: &mut Ports) -> Seen {
    let ethertype = u16_at(frame, 12).unwrap_or_default();
    let nobody = Side { address: IpAddr::V4(Ipv4Addr::UNSPECIFIED), port: None };
    let unknown = Seen {
        source: nobody,
        destination: nobody,
        what: What::Other { ethertype, protocol: 0, port: 0 },
        part_of: None,
        payload: 0,
        end: frame.len(),
    };
    match ethertype {
        ARP => Seen { what: What::Arp, ..unknown },
        IPV4 | IPV6 => {
            let seen = look_ip(frame, ports, &unknown).unwrap_or(unknown);
            ports.learn(&seen);
            seen
        }
        _ => unknown,
    }
}

fn look_ip(frame: &[u8], known: &Ports, unknown: &Seen) -> Option<Seen> {
    let bytes = frame.get(ETHERNET_LEN..)?;
    let layout = ip::locate(bytes).ok()?;
    let (source, destination) = addresses(bytes, layout.version)?;
    let side = |address| Side { address, port: None };
    let transport = bytes.get(layout.transport..layout.end)?;
    let mut seen = Seen {
        source: side(source),
        destination: side(destination),
        payload: ETHERNET_LEN + layout.transport,
        end: ETHERNET_LEN + layout.end,
        ..*unknown
    };
    let protocol = layout.protocol;
    if layout.fragment {
        let number = (u16_at(bytes, 4)?, 0);
        seen.part_of = Some(Whole { source, destination, protocol, number });
    }
    if layout.later_fragment {
        return Some(Seen { what: What::Fragment, ..seen });
    }
    let ports = (u16_at(transport, 0).unwrap_or_default(), u16_at(transport, 2).unwrap_or_default());
    seen.what = match protocol {
        protocol::UDP => {
            // Only the first fragment is shorter than it says.
            let payload = transport.get(udp::HEADER_LEN..)?;
            let (what, tunnel) = look_udp(ports, payload, known);
            if tunnel {
                seen.source.port = Some(ports.0);
                seen.destination.port = Some(ports.1);
            }
            what
        }
        protocol::TCP => {
            let segment = tcp::Segment::new_checked(transport).ok()?;
            seen.part_of = Some(Whole { source, destination, protocol, number: ports });
            seen.payload += segment.header_len();
            if [ports.0, ports.1].contains(&known.control) {
                What::Control
            } else {
                other(frame, protocol, ports)
            }
        }
        protocol::ICMP | protocol::ICMPV6 | IGMP => What::Icmp,
        _ => other(frame, protocol, (0, 0)),
    };
    Some(seen)
}

fn other(frame: &[u8], protocol: u8, ports: (u16, u16)) -> What {
    let ethertype = u16_at(frame, 12).unwrap_or_default();
    What::Other { ethertype, protocol, port: ports.0.min(ports.1) }
}

/// What a datagram is, and whether it is a tunnel's.
fn look_udp(ports: (u16, u16), payload: &[u8], known: &Ports) -> (What, bool) {
    let on = |port| ports.0 == port || ports.1 == port;
    if on(VXLAN_PORT) {
        return (What::Vxlan, false);
    }
    if on(IKE_PORT)
        && let Some(what) = look_ike(payload)
    {
        return (what, true);
    }
    let ethertype = IPV4;
    let unknown = (What::Other { ethertype, protocol: protocol::UDP, port: ports.0.min(ports.1) }, false);
    let tunnel = known.tunnels.contains(&ports.0) || known.tunnels.contains(&ports.1);
    match encap::classify(payload) {
        encap::Kind::Keepalive if tunnel => (What::Keepalive, true),
        encap::Kind::Ike(message) => look_ike(message).map_or(unknown, |what| (what, true)),
        encap::Kind::Esp(spi) if tunnel && spi >= SPI_MIN && payload.len() >= esp::LEN_MIN => {
            (What::Esp { spi }, true)
        }
        encap::Kind::Keepalive | encap::Kind::Esp(_) | encap::Kind::Runt => unknown,
    }
}

fn look_ike(message: &[u8]) -> Option<What> {
    let of = |exchange: ExchangeType, response, notify: Option<NotifyType>| What::Ike {
        exchange: exchange.into(),
        response,
        notify: notify.map(u16::from),
    };
    Some(match Datagram::parse(message).ok()? {
        Datagram::Clear(message) => {
            let told = |notify: NotifyType| {
                notify.is_error() || matches!(notify, NotifyType::Cookie | NotifyType::Redirect)
            };
            let mut notifies = message.payloads.iter().filter_map(|payload| match payload {
                Payload::Notify(notify) => Some(notify.kind),
                _ => None,
            });
            of(message.header.exchange, message.header.flags.response, notifies.find(|kind| told(*kind)))
        }
        Datagram::Encrypted(message) => of(message.header.exchange, message.header.flags.response, None),
        Datagram::Fragment(message) => of(message.header.exchange, message.header.flags.response, None),
    })
}

fn addresses(packet: &[u8], version: Version) -> Option<(IpAddr, IpAddr)> {
    let both = ip::addresses(packet, version);
    let (source, destination) = both.split_at_checked(both.len() / 2)?;
    Some(match version {
        Version::V4 => {
            (<[u8; 4]>::try_from(source).ok()?.into(), <[u8; 4]>::try_from(destination).ok()?.into())
        }
        Version::V6 => {
            (<[u8; 16]>::try_from(source).ok()?.into(), <[u8; 16]>::try_from(destination).ok()?.into())
        }
    })
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self { address, .. } if address.is_unspecified() => f.pad("-"),
            Self { address, port: None } => f.pad(&address.to_string()),
            Self { address, port: Some(port) } => {
                f.pad(&std::net::SocketAddr::new(*address, *port).to_string())
            }
        }
    }
}

impl fmt::Display for What {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match self {
            Self::Esp { spi } => format!("ESP {spi:08x}"),
            Self::Ike { exchange, response, notify } => {
                let kind = if *response { "response" } else { "request" };
                let notify = notify.map(|notify| format!(" {}", NotifyType::from(notify)));
                format!("IKE {} {kind}{}", ExchangeType::from(*exchange), notify.unwrap_or_default())
            }
            Self::Keepalive => "NAT keepalive".to_owned(),
            Self::Control => "TLS to the server".to_owned(),
            Self::Vxlan => "VXLAN, in clear".to_owned(),
            Self::Fragment => "later IP fragment".to_owned(),
            Self::Arp => "ARP".to_owned(),
            Self::Icmp => "ICMP".to_owned(),
            Self::Other { ethertype, protocol: 0, .. } => format!("EtherType {ethertype:04x}"),
            Self::Other { protocol: protocol::TCP, port, .. } => format!("TCP port {port}"),
            Self::Other { protocol: protocol::UDP, port, .. } => format!("UDP port {port}"),
            Self::Other { protocol, .. } => format!("IP protocol {protocol}"),
        };
        f.pad(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 5);
    const B: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 6);

    fn frame(protocol: u8, offset: u16, transport: &[u8]) -> Vec<u8> {
        let mut frame = vec![2; 12];
        frame.extend(IPV4.to_be_bytes());
        let length = (20 + transport.len()) as u16;
        frame.extend([0x45, 0]);
        frame.extend(length.to_be_bytes());
        frame.extend([0, 77]);
        frame.extend(offset.to_be_bytes());
        frame.extend([64, protocol, 0, 0]);
        frame.extend(A.octets());
        frame.extend(B.octets());
        frame.extend(transport);
        frame
    }

    fn datagram(ports: (u16, u16), payload: &[u8]) -> Vec<u8> {
        let length = (8 + payload.len()) as u16;
        let head = [ports.0, ports.1, length, 0].map(u16::to_be_bytes).concat();
        frame(protocol::UDP, 0, &[&head, payload].concat())
    }

    fn what(frame: &[u8]) -> What {
        look(frame, &mut Ports::new(7443)).what
    }

    /// A header of an IKE_AUTH request with an empty SK payload.
    fn ike() -> Vec<u8> {
        let mut message = vec![7; 16];
        message.extend([46, 0x20, 35, 8, 0, 0, 0, 1, 0, 0, 0, 32, 0, 0, 0, 4]);
        message
    }

    #[test]
    fn each_packet_of_a_tunnel_is_known_for_what_it_is() {
        let esp = [&[0xc0, 1, 2, 3][..], &[9; 60]].concat();
        let frame = datagram((4500, 20_001), &esp);
        let seen = look(&frame, &mut Ports::new(7443));
        assert_eq!(seen.what, What::Esp { spi: 0xc001_0203 });
        assert_eq!(
            (seen.source.to_string(), seen.destination.to_string()),
            ("10.0.0.5:4500".into(), "10.0.0.6:20001".into())
        );
        let auth = What::Ike { exchange: 35, response: false, notify: None };
        assert_eq!(what(&datagram((4500, 4500), &[&[0; 4][..], &ike()].concat())), auth);
        assert_eq!(what(&datagram((500, 500), &ike())), auth);
        assert_eq!(auth.to_string(), "IKE IKE_AUTH request");
        assert_eq!(what(&datagram((4500, 4500), &[0xff])), What::Keepalive);
    }

    #[test]
    fn what_only_looks_like_a_tunnels_packet_is_something_else() {
        let udp = |port| What::Other { ethertype: IPV4, protocol: protocol::UDP, port };
        assert_eq!(what(&datagram((4500, 4500), &[0, 0, 0, 200, 1, 2, 3, 4])), udp(4500), "a reserved SPI");
        assert_eq!(what(&datagram((4500, 4500), b"\xc0\0\0\0short")), udp(4500));
        assert_eq!(what(&datagram((4500, 4500), &[0; 40])), udp(4500), "a marker, and no IKE");
        assert_eq!(what(&datagram((9999, 8888), &[0xc0; 80])), udp(8888));
        assert_eq!(what(&datagram((5000, 4789), &[8; 50])), What::Vxlan);
        assert_eq!(what(&frame(protocol::ICMP, 0, &[8; 8])), What::Icmp);
        assert_eq!(what(&frame(protocol::IPV4, 0, &[8; 28])).to_string(), "IP protocol 4");
        assert_eq!(what(&[1; 60]).to_string(), "EtherType 0101");
        assert_eq!(what(&[]).to_string(), "EtherType 0000");
    }

    #[test]
    fn a_port_on_which_ike_was_seen_is_a_tunnels() {
        let mut ports = Ports::new(7443);
        let esp = datagram((7777, 20_001), &[0xc0; 80]);
        assert!(matches!(look(&esp, &mut ports).what, What::Other { .. }));
        look(&datagram((7777, 20_001), &[&[0; 4][..], &ike()].concat()), &mut ports);
        assert_eq!(look(&esp, &mut ports).what, What::Esp { spi: 0xc0c0_c0c0 });
    }

    #[test]
    fn pieces_of_one_thing_are_known_as_such() {
        let mut ports = Ports::new(7443);
        let mut segment = [0; 24];
        segment[..4].copy_from_slice(&[0x1d, 0x13, 0x9c, 0x40]);
        segment[12] = 0x50;
        let tcp = look(&frame(protocol::TCP, 0, &segment), &mut ports);
        assert_eq!((tcp.what, tcp.source.port), (What::Control, None));
        assert!(tcp.part_of.is_some());
        assert_eq!((tcp.payload, tcp.end), (14 + 20 + 20, 14 + 20 + 24));
        let first = look(
            &frame(protocol::UDP, 0x2000, &[0x11, 0x94, 0x11, 0x94, 0, 100, 0, 0, 0xc0, 0, 0, 0]),
            &mut ports,
        );
        let later = look(&frame(protocol::UDP, 3, &[1; 40]), &mut ports);
        assert_eq!(later.what, What::Fragment);
        assert!(first.part_of.is_some() && first.part_of == later.part_of);
    }
}
