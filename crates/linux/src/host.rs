//! Facts about the underlay, in the namespace of the calling thread.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use ipnet::IpNet;
use netlink_packet_route::address::AddressMessage;
use netlink_packet_route::link::LinkFlags;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use plan::object::{HOST_DEVICE_PREFIX, TABLE_MAIN};

use crate::error::Error;
use crate::namespace::{links, routes as all_routes};
use crate::netlink::{Requests, request};
use crate::parse::{self, Parsed};

/// An address of the host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostAddress {
    /// The device that has it.
    pub ifname: String,
    /// The address.
    pub address: IpAddr,
    /// The length of its prefix, in bits.
    pub prefix: u8,
    /// The device's MTU, in bytes.
    pub mtu: u32,
    /// Whether the device is up.
    pub up: bool,
    /// Whether the device is loopback. Addresses of 127.0.0.0/8 and `::1` are never listed.
    pub loopback: bool,
    /// Whether the device is made by software: a bridge, veth or VXLAN device.
    pub software: bool,
}

/// A route of the host's main table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostRoute {
    /// Where it leads.
    pub destination: IpNet,
    /// By which device.
    pub dev: String,
}

struct Device {
    name: String,
    mtu: u32,
    up: bool,
    loopback: bool,
    software: bool,
}

/// The host's addresses, but loopback and IPv6 link-local ones and those of our own devices.
pub fn addresses() -> Result<Vec<HostAddress>, Error> {
    let mut requests = Requests::open()?;
    let devices = devices(&mut requests)?;
    let replies = dump(&mut requests, RouteNetlinkMessage::GetAddress(AddressMessage::default()))?;
    let found = replies.iter().filter_map(|reply| {
        let RouteNetlinkMessage::NewAddress(address) = reply else { return None };
        let (index, address) = parse::address(address)?;
        let device = devices.get(&index)?;
        Some(HostAddress {
            ifname: device.name.clone(),
            address: address.addr(),
            prefix: address.prefix_len(),
            mtu: device.mtu,
            up: device.up,
            loopback: device.loopback,
            software: device.software,
        })
    });
    Ok(found.collect())
}

/// The routes of the main table that lead by a device, but those by our own; the kernel's on-link ones too.
pub fn routes() -> Result<Vec<HostRoute>, Error> {
    let mut requests = Requests::open()?;
    let devices = devices(&mut requests)?;
    let replies = dump(&mut requests, all_routes())?;
    let found = replies.iter().filter_map(|reply| {
        let RouteNetlinkMessage::NewRoute(route) = reply else { return None };
        let route = parse::any_route(route).filter(|route| route.table == TABLE_MAIN)?;
        let dev = devices.get(&route.index?)?.name.clone();
        Some(HostRoute { destination: route.destination, dev })
    });
    Ok(found.collect())
}

/// The address that this host sends from to `destination`; `None` if it has no route there. Sends nothing.
pub fn source_for(destination: IpAddr) -> Option<IpAddr> {
    /// Connecting a datagram socket looks up the route; the port is of no matter ("discard", RFC 863).
    const DISCARD: u16 = 9;
    let any = match destination {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
    };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0)).ok()?;
    socket.connect(SocketAddr::new(destination, DISCARD)).ok()?;
    let source = socket.local_addr().ok()?.ip();
    // Where IPv6 has a route but no address that is good for it, it takes one that nobody there can answer to.
    let narrower = match (source, destination) {
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            (source.is_loopback() && !destination.is_loopback())
                || (source.is_unicast_link_local() && !destination.is_unicast_link_local())
        }
        (IpAddr::V4(_) | IpAddr::V6(_), _) => false,
    };
    (!source.is_unspecified() && (!narrower || source == destination)).then_some(source)
}

/// The host's devices, but ours, by index.
fn devices(requests: &mut Requests<RouteNetlinkMessage>) -> Result<BTreeMap<u32, Device>, Error> {
    let replies = dump(requests, links(AddressFamily::Unspec))?;
    let found = replies.iter().filter_map(|reply| {
        let RouteNetlinkMessage::NewLink(link) = reply else { return None };
        let Parsed::Link(link) = parse::link(link)? else { return None };
        let device = Device {
            name: link.name.to_string(),
            mtu: link.mtu.unwrap_or(0),
            up: link.flags.contains(LinkFlags::Up),
            loopback: link.flags.contains(LinkFlags::Loopback),
            software: link.kind.is_some(),
        };
        (!device.name.starts_with(HOST_DEVICE_PREFIX)).then_some((link.index, device))
    });
    Ok(found.collect())
}

fn dump(
    requests: &mut Requests<RouteNetlinkMessage>,
    query: RouteNetlinkMessage,
) -> Result<Vec<RouteNetlinkMessage>, Error> {
    requests
        .dump(&request(query, 0))
        .map_err(|refusal| refusal.to_error("read the host's devices, addresses and routes"))
}
