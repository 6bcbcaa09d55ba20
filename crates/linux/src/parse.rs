//! What rtnetlink messages say, in the words of `plan`; `None` is what does not concern us.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use model::{Mac, Protocol};
use plan::object::{Ifname, LinkKind, RouteKind, Rule};

use crate::message::{attribute, attributes, ip, text, u16_at, u32_at};
use crate::uapi::{
    AF_BRIDGE, AF_INET, AF_INET6, AF_UNSPEC, BR_STATE_FORWARDING, FR_ACT_TO_TBL, FRA_DPORT_RANGE,
    FRA_IIFNAME, FRA_IP_PROTO, FRA_PRIORITY, FRA_TABLE, IFA_ADDRESS, IFA_LOCAL, IFF_LOOPBACK, IFLA_ADDRESS,
    IFLA_BRPORT_STATE, IFLA_IFNAME, IFLA_INFO_DATA, IFLA_INFO_KIND, IFLA_LINKINFO, IFLA_MASTER, IFLA_MTU,
    IFLA_PROTINFO, IFLA_VXLAN_ID, IFLA_VXLAN_LOCAL, IFLA_VXLAN_LOCAL6, IFLA_VXLAN_PORT, IP6_RT_PRIO_USER,
    NDA_DST, NDA_LLADDR, NTF_PROXY, NTF_SELF, NUD_PERMANENT, RT_TABLE_LOCAL, RTA_DST, RTA_GATEWAY, RTA_OIF,
    RTA_PREFSRC, RTA_PRIORITY, RTA_TABLE, RTM_F_CLONED, RTN_LOCAL, RTN_UNICAST, RTN_UNREACHABLE,
    RTPROT_KERNEL, RTPROT_REDIRECT,
};

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
    pub(crate) master: Option<u32>,
    pub(crate) flags: u32,
}

/// `struct ifinfomsg` and its attributes.
pub(crate) fn link(payload: &[u8]) -> Option<Parsed> {
    const HEADER: usize = 16;
    let family = *payload.first()?;
    let index = u32_at(payload, 4)?;
    let flags = u32_at(payload, 8)?;
    let rest = payload.get(HEADER..)?;
    if family == AF_BRIDGE {
        let state = attribute(rest, IFLA_PROTINFO).and_then(|port| attribute(port, IFLA_BRPORT_STATE));
        return Some(Parsed::Port { index, forwarding: state == Some(&[BR_STATE_FORWARDING]) });
    }
    if family != AF_UNSPEC {
        return None;
    }
    let mut parsed =
        ParsedLink { index, name: Ifname::new(""), kind: None, mac: None, mtu: None, master: None, flags };
    for (kind, value) in attributes(rest) {
        match kind {
            IFLA_IFNAME => parsed.name = Ifname::new(&text(value)),
            IFLA_ADDRESS => parsed.mac = mac(value),
            IFLA_MTU => parsed.mtu = u32_at(value, 0),
            IFLA_MASTER => parsed.master = u32_at(value, 0).filter(|index| *index != 0),
            IFLA_LINKINFO if flags & IFF_LOOPBACK == 0 => parsed.kind = link_kind(value),
            _ => {}
        }
    }
    Some(Parsed::Link(parsed))
}

fn link_kind(info: &[u8]) -> Option<LinkKind> {
    let data = attribute(info, IFLA_INFO_DATA).unwrap_or_default();
    match text(attribute(info, IFLA_INFO_KIND)?).as_str() {
        "bridge" => Some(LinkKind::Bridge),
        "veth" => Some(LinkKind::Veth),
        "vxlan" => Some(LinkKind::Vxlan {
            vni: u32_at(attribute(data, IFLA_VXLAN_ID)?, 0)?,
            port: u16::from_be(u16_at(attribute(data, IFLA_VXLAN_PORT)?, 0)?),
            local: attribute(data, IFLA_VXLAN_LOCAL)
                .or_else(|| attribute(data, IFLA_VXLAN_LOCAL6))
                .and_then(ip)
                .unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
        }),
        _ => None,
    }
}

/// `struct ifaddrmsg`: the device's index and the address. Loopback, link-local and multicast ones are the kernel's.
pub(crate) fn address(payload: &[u8]) -> Option<(u32, IpNet)> {
    const HEADER: usize = 8;
    let rest = payload.get(HEADER..)?;
    let address = attribute(rest, IFA_LOCAL).or_else(|| attribute(rest, IFA_ADDRESS)).and_then(ip)?;
    let kernels = address.is_loopback() || address.is_multicast() || is_link_local_v6(address);
    if kernels {
        return None;
    }
    Some((u32_at(payload, 4)?, IpNet::new(address, *payload.get(1)?).ok()?))
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

/// `struct ndmsg`.
pub(crate) fn neighbour(payload: &[u8]) -> Option<Entry> {
    const HEADER: usize = 12;
    let family = *payload.first()?;
    let index = u32_at(payload, 4)?;
    let permanent = u16_at(payload, 8)? & NUD_PERMANENT != 0;
    let flags = *payload.get(10)?;
    let rest = payload.get(HEADER..)?;
    let address = attribute(rest, NDA_DST).and_then(ip)?;
    let mac = attribute(rest, NDA_LLADDR).and_then(mac);
    match family {
        AF_BRIDGE if flags & NTF_SELF != 0 => Some(Entry::Fdb { index, mac: mac?, via: address, permanent }),
        AF_INET | AF_INET6
            if flags & NTF_PROXY == 0 && !address.is_multicast() && !is_link_local_v6(address) =>
        {
            Some(Entry::Neighbour { index, address, mac: mac.filter(|_| permanent) })
        }
        _ => None,
    }
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

/// `struct rtmsg`. Table `local`, the kernel's own routes and IPv6's link-local and multicast ones are left out.
pub(crate) fn route(payload: &[u8]) -> Option<ParsedRoute> {
    let protocol = *payload.get(5)?;
    any_route(payload).filter(|_| protocol != RTPROT_KERNEL && protocol != RTPROT_REDIRECT)
}

/// As [`route`], with the kernel's own.
pub(crate) fn any_route(payload: &[u8]) -> Option<ParsedRoute> {
    const HEADER: usize = 12;
    let (family, length) = (*payload.first()?, *payload.get(1)?);
    let (table, kind) = (*payload.get(4)?, *payload.get(7)?);
    let flags = u32_at(payload, 8)?;
    let any = match family {
        AF_INET => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        AF_INET6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    if flags & RTM_F_CLONED != 0 {
        return None;
    }
    let rest = payload.get(HEADER..)?;
    let number = |kind| attribute(rest, kind).and_then(|value| u32_at(value, 0));
    let address = |kind| attribute(rest, kind).and_then(ip);
    let destination = address(RTA_DST).unwrap_or(any);
    let table = number(RTA_TABLE).unwrap_or(u32::from(table));
    if table == RT_TABLE_LOCAL
        || is_link_local_v6(destination)
        || (family == AF_INET6 && destination.is_multicast())
    {
        return None;
    }
    let known = match kind {
        RTN_UNICAST => Some(RouteKind::Unicast),
        RTN_LOCAL => Some(RouteKind::Local),
        RTN_UNREACHABLE => Some(RouteKind::Unreachable),
        _ => None,
    };
    // IPv6 hangs unreachable routes on `lo`. A kind without a word is shown as one that nobody wants: sent nowhere.
    let index = number(RTA_OIF).filter(|_| matches!(known, Some(RouteKind::Unicast | RouteKind::Local)));
    let metric = number(RTA_PRIORITY).unwrap_or(0);
    Some(ParsedRoute {
        table,
        destination: IpNet::new(destination, length).ok()?,
        kind: known.unwrap_or(RouteKind::Unicast),
        via: address(RTA_GATEWAY),
        index,
        src: address(RTA_PREFSRC),
        metric: if family == AF_INET6 && metric == IP6_RT_PRIO_USER { 0 } else { metric },
    })
}

/// `struct fib_rule_hdr`: priority and rule. The three that each namespace is born with are left out. A rule of another
/// shape than ours is shown as one that nobody wants: of no device.
pub(crate) fn rule(payload: &[u8]) -> Option<(u32, Rule)> {
    const HEADER: usize = 12;
    if *payload.first()? != AF_INET {
        return None;
    }
    let rest = payload.get(HEADER..)?;
    let number = |kind| attribute(rest, kind).and_then(|value| u32_at(value, 0));
    let priority = number(FRA_PRIORITY).unwrap_or(0);
    if matches!(priority, 0 | 32766 | 32767) {
        return None;
    }
    let table = number(FRA_TABLE).unwrap_or_else(|| payload.get(4).copied().unwrap_or(0).into());
    let ours = || {
        let anywhere = payload.get(1..3)? == [0, 0] && *payload.get(7)? == FR_ACT_TO_TBL;
        let ports = attribute(rest, FRA_DPORT_RANGE)?;
        let (first, last) = (u16_at(ports, 0)?, u16_at(ports, 2)?);
        let protocol = match attribute(rest, FRA_IP_PROTO)? {
            [6] => Protocol::Tcp,
            [17] => Protocol::Udp,
            _ => return None,
        };
        let iif = Ifname::new(&text(attribute(rest, FRA_IIFNAME)?));
        (anywhere && first == last).then_some(Rule { iif, protocol, dport: first, table })
    };
    let foreign = || Rule { iif: Ifname::new(""), protocol: Protocol::Tcp, dport: 0, table };
    Some((priority, ours().unwrap_or_else(foreign)))
}

fn mac(value: &[u8]) -> Option<Mac> {
    value.try_into().ok().map(Mac)
}

fn is_link_local_v6(address: IpAddr) -> bool {
    matches!(address, IpAddr::V6(address) if address.is_unicast_link_local())
}
