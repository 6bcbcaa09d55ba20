//! What should be, as a pure function of the snapshot and the agent's own record.
//!
//! Invariant: the same input gives the same objects; nothing here looks at what is.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;

use ipnet::{IpNet, Ipv4Net};
use model::agent_api::Routes;
use model::{
    Candidate, Catalog, Driver, EndpointId, HostId, Mac, Network, NetworkId, PublishedPort, SERVICE_ADDRESS,
    TUNNEL_PORT, esp_mtu, vxlan_mtu,
};

use crate::bridge::Bridge;
use crate::object::{
    ContainerEnd, Family, Field, HOST_DEVICE_PREFIX, Ifname, Key, Link, LinkKind, Object, Peer, Place, Route,
    RouteKind, Set, State, TABLE_MAIN,
};
use crate::shortcut::{self, Shortcut};
use crate::{firewall, hash, transit};

/// The overlay device of a network of driver `ipsec`.
pub const TUN: &str = "tun0";
/// What the name of each router's namespace begins with.
pub const ROUTER_PREFIX: &str = "droveway-";
/// The longest packet that a device of a network takes to cut up, bytes: as long as an IPv4 packet can be, rounded up. The
/// same on both ends of each veth pair, on the bridge and on the overlay device, so that none cuts up what the next would
/// take whole, and none hands on more than the overlay can take.
const GSO_MAX_SIZE: u32 = 65_536;
/// The same for IPv4, of the ports by which endpoints get theirs: the packet path puts together more than fits an IP header's
/// length. Containers send no more than [`GSO_MAX_SIZE`], for that is all a TUN device takes.
pub const GSO_IPV4_MAX_SIZE: u32 = 262_144;

/// What this host is and has, apart from what the server knows.
#[derive(Debug, Clone)]
pub struct Local {
    /// This host.
    pub host: HostId,
    /// The underlay address that tunnels use, with the MTU of its interface.
    pub underlay: Option<Candidate>,
    /// Networks that shall have a router here, each with its slot of transit addresses.
    pub routers: BTreeMap<NetworkId, u16>,
    /// Whether the kernel takes programs that hand packets on past its stack.
    pub shortcut: bool,
    /// Attachments on this host.
    pub attachments: BTreeMap<EndpointId, Attachment>,
    /// Bridges that had endpoints lately.
    pub spare: BTreeSet<(NetworkId, Bridge)>,
}

/// One attachment, as the ledger knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// Its network.
    pub network: NetworkId,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Its Ethernet address.
    pub mac: Mac,
    /// Where the container's end is.
    pub end: End,
    /// Ports published on the host.
    pub ports: Vec<PublishedPort>,
    /// Which bridge of its router it is a port of.
    pub bridge: Bridge,
}

/// Where the container's end of an attachment is, or is to be made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum End {
    /// Nowhere: the endpoint has an address but no device.
    Nowhere,
    /// Made in the host's namespace, for an engine to take it into a container.
    Handed,
    /// Made in a container.
    Inside {
        /// The container's namespace.
        netns: PathBuf,
        /// The interface's name.
        ifname: String,
        /// The routes it brings besides that to the pool.
        routes: Routes,
    },
}

/// The kernel objects of this host.
pub fn desired(catalog: &Catalog, local: &Local) -> State {
    let mut state = State::new();
    for (id, slot) in &local.routers {
        if let Some(network) = catalog.networks.get(id) {
            Router::new(catalog, local, network, *slot).objects(&mut state);
        }
    }
    for (network, bridge) in &local.spare {
        leaf_objects(catalog, local, network, *bridge, &mut state);
    }
    for (id, attachment) in &local.attachments {
        leaf_objects(catalog, local, &attachment.network, attachment.bridge, &mut state);
        attachment_objects(catalog, local, id, attachment, &mut state);
    }
    host_objects(catalog, local, &mut state);
    state
}

/// The objects of one attachment alone, by the same rules: for an attach that does not wait for all the others. Its bridge is
/// not among them: [`desired_bridge()`].
pub fn desired_attachment(catalog: &Catalog, local: &Local, id: &EndpointId) -> State {
    let mut state = State::new();
    if let Some(attachment) = local.attachments.get(id) {
        attachment_objects(catalog, local, id, attachment, &mut state);
    }
    state
}

/// The bridge that an attachment is on, unless it is the router's first.
pub fn desired_bridge(catalog: &Catalog, local: &Local, id: &EndpointId) -> State {
    let mut state = State::new();
    if let Some(attachment) = local.attachments.get(id) {
        leaf_objects(catalog, local, &attachment.network, attachment.bridge, &mut state);
    }
    state
}

/// The inner MTU of `network` on this host in bytes: what was asked for, or what the smallest underlay of those who
/// take part leaves.
pub fn network_mtu(catalog: &Catalog, local: &Local, network: &Network) -> u32 {
    const ETHERNET: u32 = 1500;
    if let Some(mtu) = network.mtu {
        return mtu;
    }
    let members: BTreeSet<&HostId> = catalog.blocks_of(&network.id).map(|block| &block.host).collect();
    let others = catalog.hosts.values().filter(|host| members.contains(&host.id) && host.id != local.host);
    let candidates = others.filter_map(|host| host.underlay()).chain(local.underlay.as_ref());
    let inner = |underlay: u32, v6: bool| match network.driver {
        Driver::Ipsec => esp_mtu(underlay, v6).unwrap_or(model::MTU_MIN),
        Driver::Vxlan { .. } => vxlan_mtu(underlay, v6).unwrap_or(model::MTU_MIN),
    };
    let smallest = candidates.map(|c| inner(c.mtu, c.address.is_ipv6())).min();
    smallest.unwrap_or_else(|| inner(ETHERNET, false))
}

/// The name of a router's port to an endpoint.
pub fn port_name(id: &EndpointId) -> Ifname {
    Ifname::new(&format!("p-{}", id.short()))
}

/// The name under which an endpoint's device waits on the host until an engine takes it.
pub fn handed_name(id: &EndpointId) -> Ifname {
    Ifname::new(&format!("dv{}", id.short()))
}

/// The MAC of a gateway: the same on each host.
pub fn gateway_mac(network: &NetworkId) -> Mac {
    derived_mac(&["gateway", network.as_str()])
}

/// The MAC of an endpoint with that address: the same whoever has the address, so that no neighbour's ARP table is wrong
/// when another container gets it.
pub fn endpoint_mac(network: &NetworkId, address: IpAddr) -> Mac {
    derived_mac(&["endpoint", network.as_str(), &address.to_string()])
}

/// The MAC of a host's overlay device in a network.
pub fn overlay_mac(network: &NetworkId, host: &HostId) -> Mac {
    derived_mac(&["overlay", network.as_str(), host.as_str()])
}

fn derived_mac(parts: &[&str]) -> Mac {
    let [_, _, octets @ ..] = hash(parts).to_be_bytes();
    Mac::from_random(octets)
}

/// One router being drawn (DESIGN §3).
struct Router<'a> {
    catalog: &'a Catalog,
    local: &'a Local,
    network: &'a Network,
    slot: u16,
    mtu: u32,
    address: Option<IpAddr>,
}

impl<'a> Router<'a> {
    fn new(catalog: &'a Catalog, local: &'a Local, network: &'a Network, slot: u16) -> Self {
        let mtu = network_mtu(catalog, local, network);
        let address = catalog.router_address(&network.id, &local.host);
        Self { catalog, local, network, slot, mtu, address }
    }

    fn objects(&self, state: &mut State) {
        let mut draw = Drawing { place: Place::Router(self.network.id.clone()), state };
        draw.put(Key::Netns, Object::Netns { name: format!("{ROUTER_PREFIX}{}", self.network.name) });
        self.bridge(&mut draw);
        if !self.network.internal {
            self.way_out(&mut draw);
        }
        match self.network.driver {
            Driver::Ipsec => self.tun(&mut draw),
            Driver::Vxlan { vni, port } => self.vxlan(&mut draw, vni, port),
        }
        self.shortcut(&mut draw);
    }

    /// The bridge with the router's addresses on it, its guard, and routes to what is attached to it.
    fn bridge(&self, draw: &mut Drawing<'_>) {
        let br0 = Ifname::new("br0");
        let bridge = LinkKind::Bridge { link_local_learning: false };
        draw.link("br0", bridge, gateway_mac(&self.network.id), self.mtu);
        draw.put(Key::Table(Family::Bridge), Object::Table(firewall::bridge()));
        let table = firewall::router(&firewall::Router {
            pool: self.network.pool(),
            remote: self.remote().collect(),
            device: self.network.driver.device(),
            internal: self.network.internal,
        });
        draw.put(Key::Table(Family::Inet), Object::Table(table));

        for (path, value) in [
            // The same as `ip_forward`: before any device's own, which it sets too.
            ("ipv4/conf/all/forwarding", "1"),
            // Nearly all that comes is handed on: no socket need be looked for before that.
            ("ipv4/ip_early_demux", "0"),
            ("ipv4/icmp_ratelimit", "0"),
            // Networks are IPv4. A port would have a link-local address of its own, and the kernel look at all ports for each.
            ("ipv6/conf/all/disable_ipv6", "1"),
            ("ipv6/conf/default/disable_ipv6", "1"),
            // Frames that are only bridged are the guard's business alone.
            ("bridge/bridge-nf-call-iptables", "0"),
            ("bridge/bridge-nf-call-ip6tables", "0"),
            ("bridge/bridge-nf-call-arptables", "0"),
            // The larger of the two holds, and a device begins with what the host's are given.
            ("ipv4/conf/all/rp_filter", "0"),
            ("ipv4/conf/br0/rp_filter", "0"),
            ("ipv4/conf/all/send_redirects", "0"),
            ("ipv4/conf/br0/send_redirects", "0"),
            ("ipv4/conf/br0/proxy_arp", "1"),
            // A device that is not of its bridge, for the moment that it takes to mend that, answers for nobody.
            ("ipv4/conf/default/arp_ignore", "8"),
            ("ipv4/conf/br0/arp_ignore", "0"),
            ("ipv4/neigh/br0/proxy_delay", "0"),
        ] {
            draw.put(Key::Sysctl(path.to_owned()), Object::Sysctl(value.to_owned()));
        }

        if let Some(address) = self.address {
            let on_link =
                IpNet::new(address, self.network.pool().prefix_len()).unwrap_or_else(|_| address.into());
            draw.put(Key::Address(br0.clone(), on_link), Object::Address);
        }
        for address in [self.network.gateway(), IpAddr::V4(SERVICE_ADDRESS)] {
            draw.put(Key::Address(br0.clone(), address.into()), Object::Address);
        }
        // What is in nobody's block goes nowhere, and nobody answers ARP for it.
        draw.route(
            self.network.pool(),
            Route { kind: RouteKind::Unreachable, via: None, dev: None, src: None, metric: 0 },
        );
        let here = self.catalog.blocks_of(&self.network.id).filter(|block| block.host == self.local.host);
        let claimed = self.claims().filter(|claim| claim.host == self.local.host);
        for cidr in here.map(|block| block.cidr).chain(claimed.map(|claim| claim.address.into())) {
            draw.route(cidr, self.unicast("br0", None));
        }
    }

    /// The veth pair to the host and the default route over it.
    fn way_out(&self, draw: &mut Drawing<'_>) {
        let (host_side, own_side) = transit::pair(self.slot);
        let peer = Peer::Host {
            name: host_device(self.slot),
            mac: None,
            mtu: self.mtu,
            gso_max_size: Some(GSO_MAX_SIZE),
            up: true,
        };
        let up0 = Link {
            kind: LinkKind::Veth,
            mac: None,
            mtu: Some(self.mtu),
            gso_max_size: Some(GSO_MAX_SIZE),
            gso_ipv4_max_size: None,
            master: None,
            up: true,
            peer: Some(peer),
        };
        draw.put(Key::Link(Ifname::new("up0")), Object::Link(up0));
        draw.put(Key::Sysctl("ipv4/conf/up0/arp_ignore".to_owned()), Object::Sysctl("0".to_owned()));
        draw.put(Key::Address(Ifname::new("up0"), transit_net(own_side)), Object::Address);
        let dev = Some(Ifname::new("up0"));
        let route =
            Route { kind: RouteKind::Unicast, via: Some(host_side.into()), dev, src: None, metric: 0 };
        draw.route(IpNet::V4(Ipv4Net::default()), route);
    }

    /// The overlay device, and for each peer a forwarding entry, a neighbour and routes: no flooding, no learning.
    fn vxlan(&self, draw: &mut Drawing<'_>, vni: u32, port: u16) {
        let Some(underlay) = &self.local.underlay else { return };
        let device = Ifname::new("vxlan0");
        let kind = LinkKind::Vxlan { vni, port, local: underlay.address };
        draw.link("vxlan0", kind, overlay_mac(&self.network.id, &self.local.host), self.mtu);
        for what in ["arp_ignore", "rp_filter"] {
            draw.put(Key::Sysctl(format!("ipv4/conf/vxlan0/{what}")), Object::Sysctl("0".to_owned()));
        }

        for peer in self.catalog.hosts.values().filter(|host| host.id != self.local.host) {
            let Some(remote) = peer.underlay().filter(|c| c.address.is_ipv4() == underlay.address.is_ipv4())
            else {
                continue;
            };
            let Some(router) = self.catalog.router_address(&self.network.id, &peer.id) else { continue };
            let mac = overlay_mac(&self.network.id, &peer.id);
            draw.put(Key::Fdb(device.clone(), mac), Object::Fdb(remote.address));
            draw.put(Key::Neighbour(device.clone(), router), Object::Neighbour(mac));
            let blocks = self.catalog.blocks_of(&self.network.id).filter(|block| block.host == peer.id);
            let claims = self.claims().filter(|claim| claim.host == peer.id);
            for cidr in blocks.map(|block| block.cidr).chain(claims.map(|claim| claim.address.into())) {
                draw.route(cidr, self.unicast("vxlan0", Some(router)));
            }
        }
    }

    /// The overlay device that the agent's data path is behind, and routes to what is at other hosts and behind foreign
    /// peers. Which tunnel a packet takes is the data path's business ([`crate::tunnels()`]).
    fn tun(&self, draw: &mut Drawing<'_>) {
        let device = Link {
            kind: LinkKind::Tun,
            mac: None,
            mtu: Some(self.mtu),
            gso_max_size: Some(GSO_MAX_SIZE),
            gso_ipv4_max_size: None,
            master: None,
            up: true,
            peer: None,
        };
        draw.put(Key::Link(Ifname::new(TUN)), Object::Link(device));
        for (path, value) in [
            // The data path says in the router's name what is too large for a tunnel.
            ("ipv4/conf/tun0/accept_local", "1"),
            ("ipv4/conf/tun0/rp_filter", "0"),
            // A gateway hands on to other hosts what comes from foreign peers, by the same device.
            ("ipv4/conf/tun0/send_redirects", "0"),
        ] {
            draw.put(Key::Sysctl(path.to_owned()), Object::Sysctl(value.to_owned()));
        }
        let blocks = self.catalog.blocks_of(&self.network.id).filter(|block| block.host != self.local.host);
        let claims = self.claims().filter(|claim| claim.host != self.local.host);
        let far = blocks.map(|block| block.cidr).chain(claims.map(|claim| claim.address.into()));
        for cidr in far.chain(self.remote()) {
            draw.route(cidr, self.unicast(TUN, None));
        }
    }

    /// Between the bridge and the overlay device most packets need no more than a route.
    fn shortcut(&self, draw: &mut Drawing<'_>) {
        let overlay = Ifname::new(self.network.driver.device());
        let IpNet::V4(pool) = self.network.pool() else { return };
        if !self.local.shortcut || !draw.has(&Key::Link(overlay.clone())) {
            return;
        }
        let br0 = Ifname::new("br0");
        let framed = |device: &Ifname| device.as_str() != TUN;
        let own: Vec<_> = [self.address, Some(self.network.gateway())].into_iter().flatten().collect();
        let own: Vec<_> = ipv4(&own).collect();
        for (at, toward) in [(&br0, &overlay), (&overlay, &br0)] {
            let toward = (toward.as_str(), framed(toward));
            let program = shortcut::program(&Shortcut { pool, own: &own, framed: framed(at), toward });
            draw.put(Key::Program(at.clone()), Object::Program(program));
        }
    }

    fn claims(&self) -> impl Iterator<Item = &model::Claim> {
        self.catalog.claims_of(&self.network.id)
    }

    /// What is behind foreign peers.
    fn remote(&self) -> impl Iterator<Item = IpNet> {
        let peers = self.catalog.peers.values().filter(|peer| peer.network == self.network.id);
        peers.flat_map(|peer| peer.remote_cidrs.iter().copied())
    }

    fn unicast(&self, dev: &str, via: Option<IpAddr>) -> Route {
        Route { kind: RouteKind::Unicast, via, dev: Some(Ifname::new(dev)), src: self.address, metric: 0 }
    }
}

/// A bridge that is a leaf: without addresses, deaf to what the router is asked, and joined to `br0`.
fn leaf_objects(catalog: &Catalog, local: &Local, network: &NetworkId, bridge: Bridge, state: &mut State) {
    let Some(network) = catalog.networks.get(network) else { return };
    let name = bridge.name();
    let mut draw = Drawing { place: Place::Router(network.id.clone()), state };
    if bridge == Bridge::ROOT
        || !local.routers.contains_key(&network.id)
        || draw.has(&Key::Link(name.clone()))
    {
        return;
    }
    let mtu = network_mtu(catalog, local, network);
    let mac = derived_mac(&["leaf", network.id.as_str(), name.as_str()]);
    draw.link(name.as_str(), LinkKind::Bridge { link_local_learning: false }, mac, mtu);
    for (what, value) in [("arp_ignore", "8"), ("forwarding", "0"), ("rp_filter", "0")] {
        let path = format!("ipv4/conf/{name}/{what}");
        draw.put(Key::Sysctl(path), Object::Sysctl(value.to_owned()));
    }
    let (up, down) = bridge.joint();
    let end = |kind, master, peer| Link {
        kind,
        mac: None,
        mtu: Some(mtu),
        gso_max_size: Some(GSO_MAX_SIZE),
        gso_ipv4_max_size: Some(GSO_IPV4_MAX_SIZE),
        master: Some(master),
        up: true,
        peer,
    };
    let root = Bridge::ROOT.name();
    let peer = Peer::Here { name: down.clone(), master: root.clone(), mtu, gso_max_size: Some(GSO_MAX_SIZE) };
    draw.put(Key::Link(up), Object::Link(end(LinkKind::Veth, name, Some(peer))));
    draw.put(Key::Link(down), Object::Link(end(LinkKind::VethEnd, root, None)));
}

/// The device, guard entries and published ports of one attachment.
fn attachment_objects(
    catalog: &Catalog,
    local: &Local,
    id: &EndpointId,
    attachment: &Attachment,
    state: &mut State,
) {
    let Some(network) = catalog.networks.get(&attachment.network) else { return };
    let Some(slot) = local.routers.get(&attachment.network) else { return };
    let mtu = network_mtu(catalog, local, network);
    let peer = match &attachment.end {
        End::Nowhere => return,
        End::Handed => Peer::Host {
            name: handed_name(id),
            mac: Some(attachment.mac),
            mtu,
            gso_max_size: Some(GSO_MAX_SIZE),
            up: false,
        },
        End::Inside { netns, ifname, routes } => Peer::Container(Box::new(ContainerEnd {
            netns: netns.clone(),
            ifname: Ifname::new(ifname),
            mac: attachment.mac,
            mtu,
            gso_max_size: Some(GSO_MAX_SIZE),
            addresses: attachment
                .addresses
                .iter()
                .map(|address| {
                    IpNet::new(*address, network.pool().prefix_len()).unwrap_or_else(|_| (*address).into())
                })
                .collect(),
            on_link: match routes {
                Routes::All | Routes::Names => vec![IpAddr::V4(SERVICE_ADDRESS).into()],
                Routes::None => Vec::new(),
            },
            gateway: (*routes == Routes::All && !network.internal).then(|| network.gateway()),
        })),
    };
    let port = port_name(id);
    let mut router = Drawing { place: Place::Router(network.id.clone()), state };
    let link = Link {
        kind: LinkKind::Veth,
        mac: None,
        mtu: Some(mtu),
        gso_max_size: Some(GSO_MAX_SIZE),
        gso_ipv4_max_size: Some(GSO_IPV4_MAX_SIZE),
        master: Some(attachment.bridge.name()),
        up: true,
        peer: Some(peer),
    };
    router.put(Key::Link(port.clone()), Object::Link(link));
    let source = vec![Field::Ifname(port), Field::Mac(attachment.mac)];
    for address in ipv4(&attachment.addresses) {
        let mut key = source.clone();
        key.push(Field::Ipv4(address));
        router.put(Key::Element(Set::PortAddress, key), Object::Element(Vec::new()));
    }
    router.put(Key::Element(Set::PortMac, source), Object::Element(Vec::new()));

    let Some(target) = ipv4(&attachment.addresses).next().filter(|_| !network.internal) else { return };
    for published in &attachment.ports {
        let key = vec![Field::Protocol(published.protocol.number()), Field::Port(published.host_port)];
        let inner = vec![Field::Ipv4(target), Field::Port(published.port)];
        let outer = vec![Field::Ipv4(transit::pair(*slot).1), Field::Port(published.host_port)];
        for (place, value) in [(Place::Router(network.id.clone()), inner), (Place::Host, outer)] {
            state.insert((place, Key::Element(Set::Publish, key.clone())), Object::Element(value));
        }
    }
}

/// What the host itself needs once it has a router.
fn host_objects(catalog: &Catalog, local: &Local, state: &mut State) {
    let networks: Vec<(&Network, u16)> =
        local.routers.iter().filter_map(|(id, slot)| Some((catalog.networks.get(id)?, *slot))).collect();
    if networks.is_empty() {
        return;
    }
    let mut draw = Drawing { place: Place::Host, state };
    draw.put(Key::Sysctl("ipv4/ip_forward".to_owned()), Object::Sysctl("1".to_owned()));

    let mut ports = BTreeSet::new();
    for (network, slot) in networks {
        match network.driver {
            Driver::Ipsec => {}
            Driver::Vxlan { port, .. } => {
                ports.insert(port);
            }
        }
        let members: BTreeSet<&HostId> = catalog.blocks_of(&network.id).map(|block| &block.host).collect();
        let peers = catalog.hosts.values().filter(|host| members.contains(&host.id) && host.id != local.host);
        for address in peers.filter_map(|host| host.underlay()).map(|candidate| candidate.address) {
            let Driver::Vxlan { port, .. } = network.driver else { continue };
            let (set, address) = match address {
                IpAddr::V4(address) => (Set::Vtep, Field::Ipv4(address)),
                IpAddr::V6(address) => (Set::Vtep6, Field::Ipv6(address)),
            };
            draw.put(Key::Element(set, vec![address, Field::Port(port)]), Object::Element(Vec::new()));
        }
        if network.internal {
            continue;
        }
        let (host_side, own_side) = transit::pair(slot);
        let device = host_device(slot);
        let link = Link {
            kind: LinkKind::VethEnd,
            mac: None,
            mtu: Some(network_mtu(catalog, local, network)),
            gso_max_size: Some(GSO_MAX_SIZE),
            gso_ipv4_max_size: None,
            master: None,
            up: true,
            peer: None,
        };
        draw.put(Key::Link(device.clone()), Object::Link(link));
        draw.put(Key::Address(device.clone(), transit_net(host_side)), Object::Address);
        // Ports published on loopback too: the table drops whatever else would come that way.
        let path = format!("ipv4/conf/{device}/route_localnet");
        draw.put(Key::Sysctl(path), Object::Sysctl("1".to_owned()));
        let route = Route { kind: RouteKind::Unicast, via: None, dev: Some(device), src: None, metric: 0 };
        draw.route(IpAddr::V4(own_side).into(), route);
    }
    let ports: Vec<u16> = ports.into_iter().collect();
    let tunnel_port = local.underlay.as_ref().and_then(|candidate| candidate.port).unwrap_or(TUNNEL_PORT);
    draw.put(Key::Table(Family::Inet), Object::Table(firewall::host(&ports, tunnel_port)));
}

fn host_device(slot: u16) -> Ifname {
    Ifname::new(&format!("{HOST_DEVICE_PREFIX}{slot}"))
}

fn transit_net(address: Ipv4Addr) -> IpNet {
    Ipv4Net::new(address, 31).map_or_else(|_| IpAddr::V4(address).into(), IpNet::V4)
}

fn ipv4(addresses: &[IpAddr]) -> impl Iterator<Item = Ipv4Addr> {
    addresses.iter().filter_map(|address| match address {
        IpAddr::V4(address) => Some(*address),
        IpAddr::V6(_) => None,
    })
}

/// Puts objects into one place of a state.
struct Drawing<'a> {
    place: Place,
    state: &'a mut State,
}

impl Drawing<'_> {
    fn has(&self, key: &Key) -> bool {
        self.state.contains_key(&(self.place.clone(), key.clone()))
    }

    fn put(&mut self, key: Key, object: Object) {
        self.state.insert((self.place.clone(), key), object);
    }

    fn link(&mut self, name: &str, kind: LinkKind, mac: Mac, mtu: u32) {
        let link = Link {
            kind,
            mac: Some(mac),
            mtu: Some(mtu),
            gso_max_size: Some(GSO_MAX_SIZE),
            gso_ipv4_max_size: None,
            master: None,
            up: true,
            peer: None,
        };
        self.put(Key::Link(Ifname::new(name)), Object::Link(link));
    }

    fn route(&mut self, cidr: IpNet, route: Route) {
        self.put(Key::Route(TABLE_MAIN, cidr), Object::Route(route));
    }
}

#[cfg(test)]
#[path = "desired_tests.rs"]
mod tests;
