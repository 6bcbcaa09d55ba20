//! What rtnetlink messages say, in the words of `plan`; `None` is what does not concern us.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use model::{Mac, Protocol};
use netlink_packet_core::{DefaultNla, Nla, parse_ip};
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{
    BridgeBooleanOptionFlags, BridgePortState, InfoBridge, InfoData, InfoTun, InfoVxlan, LinkAttribute,
    LinkFlags, LinkInfo, LinkMessage, LinkProtoInfoBridge,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteMessage, RouteProtocol, RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage};
use netlink_packet_route::{AddressFamily, IpProtocol};
use nix::libc;
use plan::object::{Ifname, LinkKind, RouteKind, Rule};

/// The state in what a bridge says of its port: the one attribute there that the library has no name for.
const IFLA_BRPORT_STATE: u16 = 1;
/// The metric that IPv6 gives to routes made without one (`IP6_RT_PRIO_USER`).
const IP6_RT_PRIO_USER: u32 = 1024;

/// A message about a device, or about its being a port of a bridge.
pub(crate) enum Parsed {
    Link(ParsedLink),
    Port { index: u32, forwarding: bool },
}

pub(crate) struct ParsedLink {
    pub(crate) index: u32,
    pub(crate) name: Ifname,
    /// `None`: of a kind that `plan` has no word for.
    pub(crate) kind: Option<LinkKind>,
    pub(crate) mac: Option<Mac>,
    pub(crate) mtu: Option<u32>,
    pub(crate) gso_max_size: Option<u32>,
    pub(crate) gso_ipv4_max_size: Option<u32>,
    pub(crate) master: Option<u32>,
    pub(crate) flags: LinkFlags,
}

/// A device, or a port.
pub(crate) fn link(message: &LinkMessage) -> Option<Parsed> {
    let (index, flags) = (message.header.index, message.header.flags);
    match message.header.interface_family {
        AddressFamily::Bridge => {
            return Some(Parsed::Port { index, forwarding: message.attributes.iter().any(is_forwarding) });
        }
        AddressFamily::Unspec => {}
        _ => return None,
    }
    let mut parsed = ParsedLink {
        index,
        name: Ifname::new(""),
        kind: None,
        mac: None,
        mtu: None,
        gso_max_size: None,
        gso_ipv4_max_size: None,
        master: None,
        flags,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => parsed.name = Ifname::new(name),
            LinkAttribute::Address(bytes) => parsed.mac = mac(bytes),
            LinkAttribute::Mtu(mtu) => parsed.mtu = Some(*mtu),
            LinkAttribute::GsoMaxSize(size) => parsed.gso_max_size = Some(*size),
            LinkAttribute::GsoIpv4MaxSize(size) => parsed.gso_ipv4_max_size = Some(*size),
            LinkAttribute::Controller(index) => parsed.master = Some(*index).filter(|index| *index != 0),
            LinkAttribute::LinkInfo(info) if !flags.contains(LinkFlags::Loopback) => {
                parsed.kind = link_kind(info);
            }
            _ => {}
        }
    }
    Some(Parsed::Link(parsed))
}

/// Whether this says that the port lets frames through.
fn is_forwarding(attribute: &LinkAttribute) -> bool {
    let LinkAttribute::ProtoInfoBridge(port) = attribute else { return false };
    port.iter().any(|info| match info {
        LinkProtoInfoBridge::Other(state) if state.kind() == IFLA_BRPORT_STATE => {
            value(state) == [u8::from(BridgePortState::Forwarding)]
        }
        _ => false,
    })
}

fn link_kind(info: &[LinkInfo]) -> Option<LinkKind> {
    use netlink_packet_route::link::InfoKind;
    let kind = info.iter().find_map(|info| match info {
        LinkInfo::Kind(kind) => Some(kind),
        _ => None,
    })?;
    match kind {
        InfoKind::Bridge => {
            let told = info.iter().find_map(|info| match info {
                LinkInfo::Data(InfoData::Bridge(data)) => Some(bridge(data)),
                _ => None,
            });
            // A kernel that tells nothing of it always learns.
            Some(LinkKind::Bridge { link_local_learning: told.unwrap_or(true) })
        }
        InfoKind::Veth => Some(LinkKind::Veth),
        InfoKind::Vxlan => info.iter().find_map(|info| match info {
            LinkInfo::Data(InfoData::Vxlan(data)) => vxlan(data),
            _ => None,
        }),
        InfoKind::Tun => info.iter().find_map(|info| match info {
            LinkInfo::Data(InfoData::Tun(data)) => tun(data),
            _ => None,
        }),
        _ => None,
    }
}

/// Whether a bridge learns from link-local frames.
fn bridge(data: &[InfoBridge]) -> bool {
    !data.iter().any(|info| match info {
        InfoBridge::MultiBoolOpt(options) => {
            options.value.contains(BridgeBooleanOptionFlags::NoLinkLocalLearn)
        }
        _ => false,
    })
}

/// A TUN device as ours are: for IP packets with the offload header and nothing else before them, by many queues, to
/// stay. How many queues are open, if any, is not looked at.
fn tun(data: &[InfoTun]) -> Option<LinkKind> {
    // `linux/if_link.h`; the library has no names for them.
    const IFLA_TUN_TYPE: u16 = 3;
    const IFLA_TUN_PI: u16 = 4;
    const IFLA_TUN_VNET_HDR: u16 = 5;
    const IFLA_TUN_PERSIST: u16 = 6;
    const IFLA_TUN_MULTI_QUEUE: u16 = 7;
    let is = |kind: u16, expected: u8| {
        data.iter().any(|info| match info {
            InfoTun::Other(info) => info.kind() == kind && value(info) == [expected],
            _ => false,
        })
    };
    let ours = is(IFLA_TUN_TYPE, libc::IFF_TUN as u8)
        && is(IFLA_TUN_PI, 0)
        && is(IFLA_TUN_VNET_HDR, 1)
        && is(IFLA_TUN_PERSIST, 1)
        && is(IFLA_TUN_MULTI_QUEUE, 1);
    ours.then_some(LinkKind::Tun)
}

fn vxlan(data: &[InfoVxlan]) -> Option<LinkKind> {
    let (mut id, mut udp, mut local) = (None, None, IpAddr::V4(Ipv4Addr::UNSPECIFIED));
    for info in data {
        match info {
            InfoVxlan::Id(vni) => id = Some(*vni),
            InfoVxlan::Port(port) => udp = Some(*port),
            InfoVxlan::Local(address) => local = IpAddr::V4(*address),
            InfoVxlan::Local6(address) => local = IpAddr::V6(*address),
            _ => {}
        }
    }
    Some(LinkKind::Vxlan { vni: id?, port: udp?, local })
}

/// The device's index and the address. Loopback, link-local and multicast ones are the kernel's.
pub(crate) fn address(message: &AddressMessage) -> Option<(u32, IpNet)> {
    let (mut local, mut other) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(address) => local = Some(*address),
            AddressAttribute::Address(address) => other = Some(*address),
            _ => {}
        }
    }
    let address = local.or(other)?;
    let kernels = address.is_loopback() || address.is_multicast() || is_link_local_v6(address);
    if kernels {
        return None;
    }
    Some((message.header.index, IpNet::new(address, message.header.prefix_len).ok()?))
}

/// A neighbour, or a forwarding entry of a VXLAN device.
pub(crate) enum Entry {
    /// No MAC: there is no permanent entry for this address.
    Neighbour {
        index: u32,
        address: IpAddr,
        mac: Option<Mac>,
    },
    Fdb {
        index: u32,
        mac: Mac,
        via: IpAddr,
        permanent: bool,
    },
}

/// An entry; of the bridge family only those of a device's own table are.
pub(crate) fn neighbour(message: &NeighbourMessage) -> Option<Entry> {
    let index = message.header.ifindex;
    let permanent = u16::from(message.header.state) & libc::NUD_PERMANENT != 0;
    let flags = message.header.flags;
    let (mut destination, mut ethernet) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => {
                destination = Some(IpAddr::V4(*address));
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => {
                destination = Some(IpAddr::V6(*address));
            }
            NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => {
                destination = parse_ip(bytes).ok();
            }
            NeighbourAttribute::LinkLayerAddress(bytes) => ethernet = mac(bytes),
            _ => {}
        }
    }
    let address = destination?;
    match message.header.family {
        AddressFamily::Bridge if flags.contains(NeighbourFlags::Own) => {
            Some(Entry::Fdb { index, mac: ethernet?, via: address, permanent })
        }
        AddressFamily::Inet | AddressFamily::Inet6
            if !flags.contains(NeighbourFlags::Proxy)
                && !address.is_multicast()
                && !is_link_local_v6(address) =>
        {
            Some(Entry::Neighbour { index, address, mac: ethernet.filter(|_| permanent) })
        }
        _ => None,
    }
}

/// A neighbour whose Ethernet address is taken for known, whoever said so.
pub(crate) fn known_neighbour(message: &NeighbourMessage) -> Option<(u32, IpAddr, Mac)> {
    const KNOWN: u16 =
        libc::NUD_PERMANENT | libc::NUD_REACHABLE | libc::NUD_STALE | libc::NUD_DELAY | libc::NUD_PROBE;
    if u16::from(message.header.state) & KNOWN == 0
        || !matches!(message.header.family, AddressFamily::Inet | AddressFamily::Inet6)
    {
        return None;
    }
    let (mut destination, mut ethernet) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => {
                destination = Some(IpAddr::V4(*address));
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => {
                destination = Some(IpAddr::V6(*address));
            }
            NeighbourAttribute::LinkLayerAddress(bytes) => ethernet = mac(bytes),
            _ => {}
        }
    }
    Some((message.header.ifindex, destination?, ethernet?))
}

pub(crate) struct ParsedRoute {
    pub(crate) table: u32,
    pub(crate) destination: IpNet,
    pub(crate) kind: RouteKind,
    pub(crate) via: Option<IpAddr>,
    pub(crate) index: Option<u32>,
    pub(crate) src: Option<IpAddr>,
    pub(crate) metric: u32,
}

/// Table `local`, the kernel's own routes and IPv6's link-local and multicast ones are left out.
pub(crate) fn route(message: &RouteMessage) -> Option<ParsedRoute> {
    let kernels = matches!(message.header.protocol, RouteProtocol::Kernel | RouteProtocol::IcmpRedirect);
    if kernels { None } else { any_route(message) }
}

/// As [`route`], with the kernel's own.
pub(crate) fn any_route(message: &RouteMessage) -> Option<ParsedRoute> {
    let header = &message.header;
    let any = match header.address_family {
        AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    if header.flags.contains(RouteFlags::Cloned) {
        return None;
    }
    let mut table = u32::from(header.table);
    let (mut destination, mut index, mut via, mut src, mut metric) = (any, None, None, None, 0);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(number) => table = *number,
            RouteAttribute::Destination(address) => destination = ip(address).unwrap_or(any),
            RouteAttribute::Oif(number) => index = Some(*number),
            RouteAttribute::Gateway(address) => via = ip(address),
            RouteAttribute::PrefSource(address) => src = ip(address),
            RouteAttribute::Priority(number) => metric = *number,
            _ => {}
        }
    }
    if table == u32::from(libc::RT_TABLE_LOCAL)
        || is_link_local_v6(destination)
        || (any.is_ipv6() && destination.is_multicast())
    {
        return None;
    }
    let known = match header.kind {
        RouteType::Unicast => Some(RouteKind::Unicast),
        RouteType::Local => Some(RouteKind::Local),
        RouteType::Unreachable => Some(RouteKind::Unreachable),
        _ => None,
    };
    Some(ParsedRoute {
        table,
        destination: IpNet::new(destination, header.destination_prefix_length).ok()?,
        kind: known.unwrap_or(RouteKind::Unicast),
        via,
        // IPv6 hangs unreachable routes on `lo`. A kind without a word is shown as one that nobody wants: sent nowhere.
        index: index.filter(|_| matches!(known, Some(RouteKind::Unicast | RouteKind::Local))),
        src,
        metric: if any.is_ipv6() && metric == IP6_RT_PRIO_USER { 0 } else { metric },
    })
}

/// Priority and rule. The three that each namespace is born with are left out. A rule of another shape than ours is
/// shown as one that nobody wants: of no device.
pub(crate) fn rule(message: &RuleMessage) -> Option<(u32, Rule)> {
    let header = &message.header;
    if header.family != AddressFamily::Inet {
        return None;
    }
    let (mut priority, mut table) = (0, u32::from(header.table));
    let (mut iif, mut protocol, mut ports) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            RuleAttribute::Priority(number) => priority = *number,
            RuleAttribute::Table(number) => table = *number,
            RuleAttribute::Iifname(name) => iif = Some(Ifname::new(name)),
            RuleAttribute::IpProtocol(IpProtocol::Tcp) => protocol = Some(Protocol::Tcp),
            RuleAttribute::IpProtocol(IpProtocol::Udp) => protocol = Some(Protocol::Udp),
            RuleAttribute::DestinationPortRange(range) => ports = Some(*range),
            _ => {}
        }
    }
    if matches!(priority, 0 | 32766 | 32767) {
        return None;
    }
    let anywhere = (header.dst_len, header.src_len, header.action) == (0, 0, RuleAction::ToTable);
    let rule = match (iif, protocol, ports) {
        (Some(iif), Some(protocol), Some(ports)) if anywhere && ports.start == ports.end => {
            Rule { iif, protocol, dport: ports.start, table }
        }
        _ => Rule { iif: Ifname::new(""), protocol: Protocol::Tcp, dport: 0, table },
    };
    Some((priority, rule))
}

fn mac(value: &[u8]) -> Option<Mac> {
    value.try_into().ok().map(Mac)
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some(IpAddr::V4(*address)),
        RouteAddress::Inet6(address) => Some(IpAddr::V6(*address)),
        _ => None,
    }
}

/// The value of an attribute that the library has no name for.
fn value(attribute: &DefaultNla) -> Vec<u8> {
    let mut value = vec![0; attribute.value_len()];
    attribute.emit_value(&mut value);
    value
}

fn is_link_local_v6(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(address) if address.is_unicast_link_local())
}
