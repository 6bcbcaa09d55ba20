//! Routes, policy rules, neighbours and forwarding entries.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;
use model::Mac;
use nix::errno::Errno;
use plan::object::{Route, RouteKind, Rule, TABLE_MAIN};

use crate::error::Error;
use crate::message::{Request, family};
use crate::namespace::Namespace;
use crate::netlink::Refusal;
use crate::uapi::{
    AF_BRIDGE, AF_INET, FR_ACT_TO_TBL, FRA_DPORT_RANGE, FRA_IIFNAME, FRA_IP_PROTO, FRA_PRIORITY, FRA_TABLE,
    NDA_DST, NDA_LLADDR, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, NTF_SELF, NUD_PERMANENT, RT_SCOPE_HOST,
    RT_SCOPE_LINK, RT_SCOPE_NOWHERE, RT_SCOPE_UNIVERSE, RTA_DST, RTA_GATEWAY, RTA_OIF, RTA_PREFSRC,
    RTA_PRIORITY, RTA_TABLE, RTM_DELNEIGH, RTM_DELROUTE, RTM_DELRULE, RTM_NEWNEIGH, RTM_NEWROUTE,
    RTM_NEWRULE, RTN_LOCAL, RTN_UNICAST, RTN_UNREACHABLE, RTNH_F_ONLINK, RTPROT_STATIC,
};

/// Where a simple route leads.
pub(crate) struct Hop {
    pub(crate) via: Option<IpAddr>,
    pub(crate) index: Option<u32>,
    pub(crate) scope: u8,
}

/// Adds a unicast route to the main table.
pub(crate) fn request(destination: IpNet, hop: &Hop, flags: u16) -> Request {
    message(RTM_NEWROUTE, flags, destination, TABLE_MAIN, [RTPROT_STATIC, hop.scope, RTN_UNICAST], 0)
        .put_some(RTA_OIF, hop.index.map(u32::to_ne_bytes))
        .put_some(RTA_GATEWAY, hop.via.map(octets))
}

/// The destination that is everything, of the family of `address`.
pub(crate) fn default_of(address: IpAddr) -> IpNet {
    match address {
        IpAddr::V4(_) => ipnet::Ipv4Net::default().into(),
        IpAddr::V6(_) => ipnet::Ipv6Net::default().into(),
    }
}

/// Makes the route the only one to its destination in that table.
pub(crate) fn add(home: &mut Namespace, table: u32, destination: IpNet, want: &Route) -> Result<(), Error> {
    let attempted = || format!("add route {destination} table {table}");
    let index = want.dev.as_ref().map(|dev| home.index(dev)).transpose()?;
    let others: Vec<_> =
        home.mirror.routes_to(table, destination).filter(|have| *have != want).cloned().collect();
    for other in others {
        remove_one(home, table, destination, &other)?;
    }
    let (kind, scope) = match (want.kind, want.via) {
        (RouteKind::Unicast, Some(_)) => (RTN_UNICAST, RT_SCOPE_UNIVERSE),
        (RouteKind::Unicast, None) => (RTN_UNICAST, RT_SCOPE_LINK),
        (RouteKind::Local, _) => (RTN_LOCAL, RT_SCOPE_HOST),
        (RouteKind::Unreachable, _) => (RTN_UNREACHABLE, RT_SCOPE_UNIVERSE),
    };
    // IPv6 knows no scopes of routes.
    let scope = if destination.addr().is_ipv6() { RT_SCOPE_UNIVERSE } else { scope };
    let onlink = if want.via.is_some() { RTNH_F_ONLINK } else { 0 };
    let flags = NLM_F_CREATE | NLM_F_REPLACE;
    let request = message(RTM_NEWROUTE, flags, destination, table, [RTPROT_STATIC, scope, kind], onlink)
        .put_some(RTA_OIF, index.map(u32::to_ne_bytes))
        .put_some(RTA_GATEWAY, want.via.map(octets))
        .put_some(RTA_PREFSRC, want.src.map(octets))
        .put_some(RTA_PRIORITY, (want.metric != 0).then(|| want.metric.to_ne_bytes()));
    match home.route.request(request) {
        Err(refusal) if refusal.errno != Errno::EEXIST => Err(refusal.to_error(attempted())),
        Ok(_) | Err(_) => Ok(()),
    }
}

/// Removes all routes to the destination from that table.
pub(crate) fn remove(home: &mut Namespace, table: u32, destination: IpNet) -> Result<(), Error> {
    let all: Vec<_> = home.mirror.routes_to(table, destination).cloned().collect();
    all.iter().try_for_each(|route| remove_one(home, table, destination, route))
}

fn remove_one(home: &mut Namespace, table: u32, destination: IpNet, have: &Route) -> Result<(), Error> {
    let index = have.dev.as_ref().and_then(|dev| home.mirror.index(dev));
    let request = message(RTM_DELROUTE, 0, destination, table, [0, RT_SCOPE_NOWHERE, 0], 0)
        .put_some(RTA_OIF, index.map(u32::to_ne_bytes))
        .put_some(RTA_GATEWAY, have.via.map(octets))
        .put_some(RTA_PRIORITY, (have.metric != 0).then(|| have.metric.to_ne_bytes()));
    gone_is_fine(home.route.request(request).map(drop), &[Errno::ESRCH, Errno::ENODEV])
        .map_err(|refusal| refusal.to_error(format!("remove route {destination} table {table}")))
}

/// Makes the rule the only one of its priority.
pub(crate) fn add_rule(home: &mut Namespace, priority: u32, want: &Rule) -> Result<(), Error> {
    remove_rule(home, priority)?;
    let mut ports = [0; 4];
    ports[0..2].copy_from_slice(&want.dport.to_ne_bytes());
    ports[2..4].copy_from_slice(&want.dport.to_ne_bytes());
    let request = rule(RTM_NEWRULE, NLM_F_CREATE | NLM_F_EXCL, priority, FR_ACT_TO_TBL)
        .put_text(FRA_IIFNAME, want.iif.as_str())
        .put_u32(FRA_TABLE, want.table)
        .put(FRA_IP_PROTO, &[want.protocol.number()])
        .put(FRA_DPORT_RANGE, &ports);
    home.route.request(request).map(drop).map_err(|refusal| refusal.to_error(format!("add rule {priority}")))
}

/// Removes all rules of that priority.
pub(crate) fn remove_rule(home: &mut Namespace, priority: u32) -> Result<(), Error> {
    loop {
        match home.route.request(rule(RTM_DELRULE, 0, priority, 0)) {
            Ok(_) => {}
            Err(refusal) if matches!(refusal.errno, Errno::ENOENT | Errno::ESRCH) => return Ok(()),
            Err(refusal) => return Err(refusal.to_error(format!("remove rule {priority}"))),
        }
    }
}

/// Makes a permanent neighbour entry.
pub(crate) fn add_neighbour(
    home: &mut Namespace,
    index: u32,
    address: IpAddr,
    mac: Mac,
) -> Result<(), Error> {
    let request = entry(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, family(address), index, 0)
        .put_ip(NDA_DST, address)
        .put(NDA_LLADDR, &mac.0);
    home.route
        .request(request)
        .map(drop)
        .map_err(|refusal| refusal.to_error(format!("add neighbour {address}")))
}

/// Removes a neighbour entry.
pub(crate) fn remove_neighbour(home: &mut Namespace, index: u32, address: IpAddr) -> Result<(), Error> {
    let request = entry(RTM_DELNEIGH, 0, family(address), index, 0).put_ip(NDA_DST, address);
    gone_is_fine(home.route.request(request).map(drop), &[Errno::ENOENT, Errno::ENODEV])
        .map_err(|refusal| refusal.to_error(format!("remove neighbour {address}")))
}

/// Makes a forwarding entry of a VXLAN device.
pub(crate) fn add_fdb(home: &mut Namespace, index: u32, mac: Mac, via: IpAddr) -> Result<(), Error> {
    let request = entry(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, AF_BRIDGE, index, NTF_SELF)
        .put(NDA_LLADDR, &mac.0)
        .put_ip(NDA_DST, via);
    home.route
        .request(request)
        .map(drop)
        .map_err(|refusal| refusal.to_error(format!("add forwarding entry {mac}")))
}

/// Removes a forwarding entry with all its destinations.
pub(crate) fn remove_fdb(home: &mut Namespace, index: u32, mac: Mac) -> Result<(), Error> {
    let request = entry(RTM_DELNEIGH, 0, AF_BRIDGE, index, NTF_SELF).put(NDA_LLADDR, &mac.0);
    gone_is_fine(home.route.request(request).map(drop), &[Errno::ENOENT, Errno::ENODEV])
        .map_err(|refusal| refusal.to_error(format!("remove forwarding entry {mac}")))
}

fn gone_is_fine(outcome: Result<(), Refusal>, gone: &[Errno]) -> Result<(), Refusal> {
    match outcome {
        Err(refusal) if gone.contains(&refusal.errno) => Ok(()),
        outcome => outcome,
    }
}

/// `struct rtmsg`; `[protocol, scope, type]`.
fn message(kind: u16, flags: u16, destination: IpNet, table: u32, sort: [u8; 3], hop: u32) -> Request {
    let mut header = [0; 12];
    header[0] = family(destination.addr());
    header[1] = destination.prefix_len();
    header[5..8].copy_from_slice(&sort);
    header[8..12].copy_from_slice(&hop.to_ne_bytes());
    let request = Request::new(kind, flags, &header).put_u32(RTA_TABLE, table);
    if destination.prefix_len() == 0 { request } else { request.put_ip(RTA_DST, destination.network()) }
}

/// `struct fib_rule_hdr`.
fn rule(kind: u16, flags: u16, priority: u32, action: u8) -> Request {
    let mut header = [0; 12];
    header[0] = AF_INET;
    header[7] = action;
    Request::new(kind, flags, &header).put_u32(FRA_PRIORITY, priority)
}

/// `struct ndmsg`.
fn entry(kind: u16, flags: u16, family: u8, index: u32, ntf: u8) -> Request {
    let mut header = [0; 12];
    header[0] = family;
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..10].copy_from_slice(&NUD_PERMANENT.to_ne_bytes());
    header[10] = ntf;
    Request::new(kind, flags, &header)
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => Ipv4Addr::octets(&address).to_vec(),
        IpAddr::V6(address) => Ipv6Addr::octets(&address).to_vec(),
    }
}
