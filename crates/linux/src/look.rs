//! Looking into a namespace that is not ours to change: a container's.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use model::Mac;
use netlink_packet_route::RouteNetlinkMessage::{self, NewAddress, NewLink, NewNeighbour, NewRoute};
use netlink_packet_route::address::AddressMessage;
use netlink_packet_route::link::LinkFlags;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage::GetAddress};

use crate::error::Error;
use crate::namespace::{links, neighbours, routes};
use crate::netlink::{Requests, request};
use crate::netns::Netns;
use crate::parse::{self, Parsed};

/// What a namespace has.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inside {
    /// Its devices, by name.
    pub devices: BTreeMap<String, Device>,
    /// The next router of its default route.
    pub gateway: Option<IpAddr>,
    /// Neighbours whose Ethernet address it takes for known: device, address, Ethernet address.
    pub neighbours: Vec<(String, IpAddr, Mac)>,
}

/// A device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Its Ethernet address.
    pub mac: Option<Mac>,
    /// Whether it is up.
    pub up: bool,
    /// Its addresses, but loopback and link-local ones.
    pub addresses: Vec<IpNet>,
}

/// Looks into a namespace. Nothing is changed.
pub fn inside(netns: &Netns) -> Result<Inside, Error> {
    netns.run(|| {
        let mut requests = Requests::open()?;
        let mut dump = |query: RouteNetlinkMessage| {
            requests.dump(&request(query, 0)).map_err(|refusal| refusal.to_error("look into a namespace"))
        };
        let mut names = BTreeMap::new();
        let mut inside = Inside::default();
        for reply in dump(links(AddressFamily::Unspec))? {
            let NewLink(link) = reply else { continue };
            let Some(Parsed::Link(link)) = parse::link(&link) else { continue };
            let device =
                Device { mac: link.mac, up: link.flags.contains(LinkFlags::Up), addresses: Vec::new() };
            names.insert(link.index, link.name.to_string());
            inside.devices.insert(link.name.to_string(), device);
        }
        for reply in dump(GetAddress(AddressMessage::default()))? {
            let NewAddress(address) = reply else { continue };
            let Some((index, address)) = parse::address(&address) else { continue };
            if let Some(device) = names.get(&index).and_then(|name| inside.devices.get_mut(name)) {
                device.addresses.push(address);
            }
        }
        for reply in dump(routes())? {
            let NewRoute(route) = reply else { continue };
            let Some(route) = parse::any_route(&route) else { continue };
            if route.destination.prefix_len() == 0 && route.destination.addr().is_ipv4() {
                inside.gateway = inside.gateway.or(route.via);
            }
        }
        for reply in dump(neighbours(AddressFamily::Unspec))? {
            let NewNeighbour(neighbour) = reply else { continue };
            if let Some((index, address, mac)) = parse::known_neighbour(&neighbour)
                && let Some(name) = names.get(&index)
            {
                inside.neighbours.push((name.clone(), address, mac));
            }
        }
        Ok(inside)
    })?
}
