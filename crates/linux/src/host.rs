//! Facts about the underlay, in the namespace of the calling thread.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};

use ipnet::IpNet;
use plan::object::{HOST_DEVICE_PREFIX, TABLE_MAIN};

use crate::error::Error;
use crate::message::Request;
use crate::netlink::{Protocol, Reply, Requests};
use crate::parse::{self, Parsed};
use crate::uapi::{
    IFF_LOOPBACK, IFF_UP, IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS, RTM_GETADDR, RTM_GETLINK, RTM_GETROUTE,
};

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
    let mut requests = Requests::open(Protocol::Route)?;
    let devices = devices(&mut requests)?;
    let replies = dump(&mut requests, RTM_GETADDR, 8)?;
    let found = replies.iter().filter_map(|reply| {
        let (index, address) = parse::address(&reply.payload)?;
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
    let mut requests = Requests::open(Protocol::Route)?;
    let devices = devices(&mut requests)?;
    let replies = dump(&mut requests, RTM_GETROUTE, 12)?;
    let found = replies.iter().filter_map(|reply| {
        let route = parse::any_route(&reply.payload).filter(|route| route.table == TABLE_MAIN)?;
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
    (!source.is_unspecified()).then_some(source)
}

/// The host's devices, but ours, by index.
fn devices(requests: &mut Requests) -> Result<BTreeMap<u32, Device>, Error> {
    let replies = dump(requests, RTM_GETLINK, 16)?;
    let found = replies.iter().filter_map(|reply| match parse::link(&reply.payload)? {
        Parsed::Link(link) if !link.name.as_str().starts_with(HOST_DEVICE_PREFIX) => {
            let device = Device {
                name: link.name.to_string(),
                mtu: link.mtu.unwrap_or(0),
                up: link.flags & IFF_UP != 0,
                loopback: link.flags & IFF_LOOPBACK != 0,
                software: link.kind.is_some(),
            };
            Some((link.index, device))
        }
        Parsed::Link(_) | Parsed::Port { .. } => None,
    });
    Ok(found.collect())
}

fn dump(requests: &mut Requests, kind: u16, header: usize) -> Result<Vec<Reply>, Error> {
    let request = Request::new(kind, 0, &[0; 16][..header]);
    let request =
        if kind == RTM_GETLINK { request.put_u32(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS) } else { request };
    requests
        .dump(&request)
        .map_err(|refusal| refusal.to_error("read the host's devices, addresses and routes"))
}
