//! Routes, policy rules, neighbours and forwarding entries.

use std::net::IpAddr;

use ipnet::IpNet;
use model::Mac;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::RouteNetlinkMessage::{
    self, DelNeighbour, DelRoute, DelRule, NewNeighbour, NewRoute, NewRule,
};
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::{
    RouteAttribute, RouteFlags, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::rule::{RuleAction, RuleAttribute, RuleMessage, RulePortRange};
use netlink_packet_route::{AddressFamily, IpProtocol};
use nix::errno::Errno;
use plan::object::{Route, RouteKind, Rule, TABLE_MAIN};

use crate::error::Error;
use crate::namespace::Namespace;
use crate::netlink::{Refusal, Request, request};

/// The address family of an address.
pub(crate) fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

/// Where a simple route leads.
pub(crate) struct Hop {
    pub(crate) via: Option<IpAddr>,
    pub(crate) index: Option<u32>,
    pub(crate) scope: RouteScope,
}

/// Adds a unicast route to the main table.
pub(crate) fn addition(destination: IpNet, hop: &Hop) -> Request<RouteNetlinkMessage> {
    let mut message = message(destination, TABLE_MAIN);
    message.header.protocol = RouteProtocol::Static;
    message.header.scope = hop.scope;
    message.header.kind = RouteType::Unicast;
    message.attributes.extend(hop.index.map(RouteAttribute::Oif));
    message.attributes.extend(hop.via.map(|via| RouteAttribute::Gateway(via.into())));
    request(NewRoute(message), NLM_F_CREATE | NLM_F_EXCL)
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
        (RouteKind::Unicast, Some(_)) => (RouteType::Unicast, RouteScope::Universe),
        (RouteKind::Unicast, None) => (RouteType::Unicast, RouteScope::Link),
        (RouteKind::Local, _) => (RouteType::Local, RouteScope::Host),
        (RouteKind::Unreachable, _) => (RouteType::Unreachable, RouteScope::Universe),
    };
    let mut message = message(destination, table);
    message.header.protocol = RouteProtocol::Static;
    // IPv6 knows no scopes of routes.
    message.header.scope = if destination.addr().is_ipv6() { RouteScope::Universe } else { scope };
    message.header.kind = kind;
    message.header.flags.set(RouteFlags::Onlink, want.via.is_some());
    message.attributes.extend(index.map(RouteAttribute::Oif));
    message.attributes.extend(want.via.map(|via| RouteAttribute::Gateway(via.into())));
    message.attributes.extend(want.src.map(|src| RouteAttribute::PrefSource(src.into())));
    message.attributes.extend(priority(want));
    let request = request(NewRoute(message), NLM_F_CREATE | NLM_F_REPLACE);
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
    let mut message = message(destination, table);
    message.header.scope = RouteScope::NoWhere;
    message.attributes.extend(index.map(RouteAttribute::Oif));
    message.attributes.extend(have.via.map(|via| RouteAttribute::Gateway(via.into())));
    message.attributes.extend(priority(have));
    let request = request(DelRoute(message), 0);
    gone_is_fine(home.route.request(request).map(drop), &[Errno::ESRCH, Errno::ENODEV])
        .map_err(|refusal| refusal.to_error(format!("remove route {destination} table {table}")))
}

/// Makes the rule the only one of its priority.
pub(crate) fn add_rule(home: &mut Namespace, priority: u32, want: &Rule) -> Result<(), Error> {
    remove_rule(home, priority)?;
    let mut message = rule(priority);
    message.header.action = RuleAction::ToTable;
    message.attributes.extend([
        RuleAttribute::Iifname(want.iif.as_str().to_owned()),
        RuleAttribute::Table(want.table),
        RuleAttribute::IpProtocol(IpProtocol::from(want.protocol.number())),
        RuleAttribute::DestinationPortRange(RulePortRange { start: want.dport, end: want.dport }),
    ]);
    let request = request(NewRule(message), NLM_F_CREATE | NLM_F_EXCL);
    home.route.request(request).map(drop).map_err(|refusal| refusal.to_error(format!("add rule {priority}")))
}

/// Removes all rules of that priority.
pub(crate) fn remove_rule(home: &mut Namespace, priority: u32) -> Result<(), Error> {
    loop {
        match home.route.request(request(DelRule(rule(priority)), 0)) {
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
    let message = entry(family(address), index, Some(address), Some(mac));
    let request = request(NewNeighbour(message), NLM_F_CREATE | NLM_F_REPLACE);
    home.route
        .request(request)
        .map(drop)
        .map_err(|refusal| refusal.to_error(format!("add neighbour {address}")))
}

/// Removes a neighbour entry.
pub(crate) fn remove_neighbour(home: &mut Namespace, index: u32, address: IpAddr) -> Result<(), Error> {
    let request = request(DelNeighbour(entry(family(address), index, Some(address), None)), 0);
    gone_is_fine(home.route.request(request).map(drop), &[Errno::ENOENT, Errno::ENODEV])
        .map_err(|refusal| refusal.to_error(format!("remove neighbour {address}")))
}

/// Makes a forwarding entry of a VXLAN device.
pub(crate) fn add_fdb(home: &mut Namespace, index: u32, mac: Mac, via: IpAddr) -> Result<(), Error> {
    let message = entry(AddressFamily::Bridge, index, Some(via), Some(mac));
    let request = request(NewNeighbour(message), NLM_F_CREATE | NLM_F_REPLACE);
    home.route
        .request(request)
        .map(drop)
        .map_err(|refusal| refusal.to_error(format!("add forwarding entry {mac}")))
}

/// Removes a forwarding entry with all its destinations.
pub(crate) fn remove_fdb(home: &mut Namespace, index: u32, mac: Mac) -> Result<(), Error> {
    let request = request(DelNeighbour(entry(AddressFamily::Bridge, index, None, Some(mac))), 0);
    gone_is_fine(home.route.request(request).map(drop), &[Errno::ENOENT, Errno::ENODEV])
        .map_err(|refusal| refusal.to_error(format!("remove forwarding entry {mac}")))
}

fn gone_is_fine(outcome: Result<(), Refusal>, gone: &[Errno]) -> Result<(), Refusal> {
    match outcome {
        Err(refusal) if gone.contains(&refusal.errno) => Ok(()),
        outcome => outcome,
    }
}

fn message(destination: IpNet, table: u32) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(destination.addr());
    message.header.destination_prefix_length = destination.prefix_len();
    message.attributes.push(RouteAttribute::Table(table));
    if destination.prefix_len() != 0 {
        message.attributes.push(RouteAttribute::Destination(destination.network().into()));
    }
    message
}

fn priority(route: &Route) -> Option<RouteAttribute> {
    (route.metric != 0).then_some(RouteAttribute::Priority(route.metric))
}

fn rule(priority: u32) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = AddressFamily::Inet;
    message.attributes.push(RuleAttribute::Priority(priority));
    message
}

/// A permanent entry. One of the bridge family is the device's own.
fn entry(
    family: AddressFamily,
    index: u32,
    destination: Option<IpAddr>,
    mac: Option<Mac>,
) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family;
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.header.flags.set(NeighbourFlags::Own, family == AddressFamily::Bridge);
    message.attributes.extend(destination.map(|address| NeighbourAttribute::Destination(address.into())));
    message.attributes.extend(mac.map(|mac| NeighbourAttribute::LinkLayerAddress(mac.0.to_vec())));
    message
}
