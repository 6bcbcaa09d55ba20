//! The vocabulary of kernel objects: what `desired` wants, what `linux` observes, and what a diff is made of.
//!
//! An object has a [`Place`] (which network namespace), a [`Key`] (what names it there) and a value. Observed and
//! desired objects are the same types, normalised: whatever the kernel adds by itself is not there. A desired value may
//! leave a field `None`: then whatever the kernel shows will do ([`Object::satisfied_by`]).

use std::collections::BTreeMap;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;

use ipnet::IpNet;
use model::{Mac, NetworkId, Protocol};

/// Which network namespace an object lives in.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Place {
    /// The host's own: the namespace the agent runs in.
    Host,
    /// The router of that network on this host.
    Router(NetworkId),
}

/// Everything that is, or should be, in the namespaces of this host.
///
/// The scope of what is observed: in a router, everything but what the kernel makes by itself (loopback, local and
/// link-local routes, protocol-`kernel` routes, IPv6 link-local addresses); on the host, devices named `dw*` and what
/// hangs on them, and the tables named [`TABLE`]. Sysctls are observed where they are desired.
pub type State = BTreeMap<(Place, Key), Object>;

/// The name of every nft table that is ours.
pub const TABLE: &str = "droveway";
/// What the names of a router's further bridges begin with, and of the devices that join them to its first.
pub const LEAF_PREFIX: &str = "leaf";
/// What the names of our devices on the host begin with.
pub const HOST_DEVICE_PREFIX: &str = "dw";

/// The name of a network device: 1 to 15 bytes.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ifname(String);

impl Ifname {
    /// A device name; too long or foreign text is cut to what the kernel takes (`IFNAMSIZ` - 1, no `/` or blank).
    pub fn new(name: &str) -> Self {
        Self(name.chars().filter(|c| c.is_ascii_graphic() && *c != '/').take(15).collect())
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Ifname {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl fmt::Debug for Ifname {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What names an object within its place. The order of variants is the order of making; removing goes backwards.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Key {
    /// The namespace itself.
    Netns,
    /// An nft table of the family.
    Table(Family),
    /// A device.
    Link(Ifname),
    /// A file below `/proc/sys/net`.
    Sysctl(String),
    /// An address of a device.
    Address(Ifname, IpNet),
    /// A policy rule of that priority.
    Rule(u32),
    /// A permanent neighbour (ARP) entry.
    Neighbour(Ifname, IpAddr),
    /// A forwarding entry of a VXLAN device: which underlay address has this MAC.
    Fdb(Ifname, Mac),
    /// A route: table and destination.
    Route(u32, IpNet),
    /// An element of a set or map of our table.
    Element(Set, Vec<Field>),
    /// The program that a router's bridge or overlay device asks about each IPv4 packet that comes in by it.
    Program(Ifname),
}

/// An object's value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Object {
    /// The namespace, with the name under which it is bound (`/run/netns/NAME`).
    Netns {
        /// The file's name.
        name: String,
    },
    /// An nft table.
    Table(Table),
    /// A device.
    Link(Link),
    /// The value of a sysctl, without newline.
    Sysctl(String),
    /// An address is what its key says.
    Address,
    /// A policy rule.
    Rule(Rule),
    /// A neighbour's MAC.
    Neighbour(Mac),
    /// The underlay address of a forwarding entry.
    Fdb(IpAddr),
    /// A route.
    Route(Route),
    /// The value of a map's element; empty for a set.
    Element(Vec<Field>),
    /// A program.
    Program(Program),
}

/// A device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// What it is.
    pub kind: LinkKind,
    /// Its Ethernet address.
    pub mac: Option<Mac>,
    /// Its MTU, bytes.
    pub mtu: Option<u32>,
    /// The longest packet that is handed to it to be cut into segments, bytes (`gso_max_size`).
    pub gso_max_size: Option<u32>,
    /// The same for IPv4 where that is another (`gso_ipv4_max_size`, since Linux 6.3: a kernel that shows none has none). A
    /// bridge gets that of its ports: the kernel refuses it to one without.
    pub gso_ipv4_max_size: Option<u32>,
    /// The bridge it is a port of; `None` means of none.
    pub master: Option<Ifname>,
    /// Whether it is up.
    pub up: bool,
    /// The other end, needed to make a veth and never compared.
    pub peer: Option<Peer>,
}

/// What a device is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LinkKind {
    /// A bridge: no STP, no forward delay, no multicast snooping.
    Bridge {
        /// Whether frames to 01:80:c2:00:00:0x teach it who is at a port (IEEE 802.1Q §8.6.3). They do not meet the guard,
        /// which is a prerouting hook, so a router's bridge must not.
        link_local_learning: bool,
    },
    /// One end of a veth pair; its [`Peer`] is made with it.
    Veth,
    /// The end of a veth pair that is made with its other end: only adjusted, never made or removed.
    VethEnd,
    /// A VXLAN device: no learning. It lives in its place; its underlay socket is the host's.
    Vxlan {
        /// VXLAN network identifier.
        vni: u32,
        /// UDP port, source and destination.
        port: u16,
        /// The underlay address it sends from.
        local: IpAddr,
    },
    /// A TUN device for IP packets with offload headers, made to stay when the agent goes. The agent's data path is its
    /// other end.
    Tun,
}

/// The other end of a veth pair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Peer {
    /// In the host's namespace, under that name. Docker's engine takes it from there into a container.
    Host {
        /// The device's name.
        name: Ifname,
        /// Its Ethernet address.
        mac: Option<Mac>,
        /// Its MTU, bytes.
        mtu: u32,
        /// As of [`Link`].
        gso_max_size: Option<u32>,
        /// Whether to bring it up.
        up: bool,
    },
    /// In a container, fully set up.
    Container(Box<ContainerEnd>),
    /// In the same place, under that name, as a port of another bridge: a device of its own there ([`LinkKind::VethEnd`]).
    Here {
        /// The device's name.
        name: Ifname,
        /// The bridge that it is a port of.
        master: Ifname,
        /// Its MTU, bytes.
        mtu: u32,
        /// As of [`Link`].
        gso_max_size: Option<u32>,
    },
}

/// The container's end of an endpoint's veth pair, and everything to set up around it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerEnd {
    /// The container's namespace: a file for `setns(2)`.
    pub netns: PathBuf,
    /// The interface's name inside.
    pub ifname: Ifname,
    /// Its Ethernet address.
    pub mac: Mac,
    /// Its MTU, bytes.
    pub mtu: u32,
    /// As of [`Link`].
    pub gso_max_size: Option<u32>,
    /// Its addresses, with the network's prefix.
    pub addresses: Vec<IpNet>,
    /// Destinations that are on link besides.
    pub on_link: Vec<IpNet>,
    /// The default gateway.
    pub gateway: Option<IpAddr>,
}

/// A route.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// What happens to packets.
    pub kind: RouteKind,
    /// The next router. Always with `onlink`.
    pub via: Option<IpAddr>,
    /// By which device; `None` for unreachable.
    pub dev: Option<Ifname>,
    /// The preferred source address.
    pub src: Option<IpAddr>,
    /// The metric.
    pub metric: u32,
}

/// What happens to a route's packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RouteKind {
    /// They are sent.
    Unicast,
    /// They are taken as this machine's own (`ip route add local`).
    Local,
    /// They are refused with ICMP host unreachable.
    Unreachable,
}

/// The main routing table.
pub const TABLE_MAIN: u32 = 254;

/// A policy rule: packets from `iif` of `protocol` to port `dport` are looked up in `table`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// The device they come in by.
    pub iif: Ifname,
    /// The transport.
    pub protocol: Protocol,
    /// The destination port.
    pub dport: u16,
    /// The routing table.
    pub table: u32,
}

/// An nft table: replaced whole, by its text, when it is not what it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// The text of the table's skeleton for `nft -f`: sets and maps declared, empty. Never compared.
    pub text: String,
    /// What tells this skeleton from others. `linux` keeps it in the table's comment, and observes `"altered"` when
    /// anything but an element was changed by someone else.
    pub digest: String,
}

/// An eBPF program for packets (`BPF_PROG_TYPE_SCHED_CLS`, direct action), alone at its device's ingress.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    /// Its text: assembly, in which `index(NAME)` is the index of the device of that name. Never compared.
    pub text: String,
    /// What tells this text from others. `linux` keeps it in the filter's name, and observes `"altered"` where the program
    /// is not alone, or a device that it names is another by now.
    pub digest: String,
}

/// A family of nft tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4 and IPv6.
    Inet,
    /// Frames on a bridge.
    Bridge,
}

impl Family {
    /// As `nft` writes it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Inet => "inet",
            Self::Bridge => "bridge",
        }
    }
}

/// The sets and maps whose elements come and go. Their declaration is part of the skeleton.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Set {
    /// Bridge: which Ethernet source a port may use. Key: ifname, MAC.
    PortMac,
    /// Bridge: which address a port may use. Key: ifname, MAC, IPv4.
    PortAddress,
    /// Inet: where a published port leads. Key: protocol, port; value: IPv4, port.
    Publish,
    /// Inet, host: which underlay addresses may send to an overlay port. Key: IPv4, UDP port.
    Vtep,
    /// The same for IPv6. Key: IPv6, UDP port.
    Vtep6,
}

/// The type of a [`Field`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FieldType {
    /// A device name, 16 bytes.
    Ifname,
    /// An Ethernet address, 6 bytes.
    Mac,
    /// An IPv4 address, 4 bytes.
    Ipv4,
    /// An IPv6 address, 16 bytes.
    Ipv6,
    /// A transport port, 2 bytes, network order.
    Port,
    /// An IP protocol number, 1 byte.
    Protocol,
}

impl Set {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::PortMac, Self::PortAddress, Self::Publish, Self::Vtep, Self::Vtep6];

    /// The set's name in the table.
    pub fn name(self) -> &'static str {
        match self {
            Self::PortMac => "port_mac",
            Self::PortAddress => "port_address",
            Self::Publish => "publish",
            Self::Vtep => "vtep",
            Self::Vtep6 => "vtep6",
        }
    }

    /// The family of the table it is in.
    pub fn family(self) -> Family {
        match self {
            Self::PortMac | Self::PortAddress => Family::Bridge,
            Self::Publish | Self::Vtep | Self::Vtep6 => Family::Inet,
        }
    }

    /// The fields of its key, concatenated.
    pub fn key(self) -> &'static [FieldType] {
        use FieldType::{Ifname, Ipv4, Ipv6, Mac, Port, Protocol};
        match self {
            Self::PortMac => &[Ifname, Mac],
            Self::PortAddress => &[Ifname, Mac, Ipv4],
            Self::Publish => &[Protocol, Port],
            Self::Vtep => &[Ipv4, Port],
            Self::Vtep6 => &[Ipv6, Port],
        }
    }

    /// The fields of its value, concatenated; none for a set.
    pub fn value(self) -> &'static [FieldType] {
        use FieldType::{Ipv4, Port};
        match self {
            Self::Publish => &[Ipv4, Port],
            Self::PortMac | Self::PortAddress | Self::Vtep | Self::Vtep6 => &[],
        }
    }
}

/// One field of an element.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Field {
    /// A device name.
    Ifname(Ifname),
    /// An Ethernet address.
    Mac(Mac),
    /// An IPv4 address.
    Ipv4(Ipv4Addr),
    /// An IPv6 address.
    Ipv6(Ipv6Addr),
    /// A port.
    Port(u16),
    /// An IP protocol number.
    Protocol(u8),
}

impl Object {
    /// Whether the kernel shows what is wanted.
    pub fn satisfied_by(&self, observed: &Self) -> bool {
        match (self, observed) {
            (Self::Link(want), Self::Link(have)) => want.satisfied_by(have),
            (Self::Table(want), Self::Table(have)) => want.digest == have.digest,
            (Self::Program(want), Self::Program(have)) => want.digest == have.digest,
            (want, have) => want == have,
        }
    }
}

impl Link {
    fn satisfied_by(&self, have: &Self) -> bool {
        let kind = match (&self.kind, &have.kind) {
            (LinkKind::Veth | LinkKind::VethEnd, LinkKind::Veth | LinkKind::VethEnd) => true,
            (want, have) => want == have,
        };
        kind && self.mac.is_none_or(|mac| have.mac == Some(mac))
            && self.mtu.is_none_or(|mtu| have.mtu == Some(mtu))
            && self.gso_max_size.is_none_or(|size| have.gso_max_size == Some(size))
            && self.gso_ipv4_max_size.zip(have.gso_ipv4_max_size).is_none_or(|(want, have)| want == have)
            && self.master == have.master
            && self.up == have.up
    }

    /// Whether `have` can become `self` by adjusting, without being made anew.
    pub fn adjustable_from(&self, have: &Self) -> bool {
        match (&self.kind, &have.kind) {
            (LinkKind::Veth | LinkKind::VethEnd, LinkKind::Veth | LinkKind::VethEnd)
            | (LinkKind::Bridge { .. }, LinkKind::Bridge { .. }) => true,
            (want, have) => want == have,
        }
    }
}
