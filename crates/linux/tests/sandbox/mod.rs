//! Where the tests run: each in network and mount namespaces of its own, as root or in a user namespace.

pub(crate) mod scene;

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, SocketAddrV4};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use linux::Kernel;
use linux::netns::Netns;
use linux::tun::{self, Queue};
use model::{Mac, NetworkId, Protocol};
use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sched::{CloneFlags, unshare};
use plan::object::{
    ContainerEnd, Family, Field, Ifname, Link, LinkKind, Peer, Route, RouteKind, Rule, Set, TABLE_MAIN, Table,
};
use plan::{Key, Object, Place, Scope, State, diff};

/// Another than the kernel's own, to see that it is set.
const GSO: u32 = 60_000;
/// What endpoints' ports let through of IPv4.
pub(crate) const GSO_IPV4: u32 = 200_000;

/// Runs `test` in fresh namespaces, with an empty directory for those that it makes. `name` is the test's own name.
pub(crate) fn run(name: &str, test: impl FnOnce(&Path) + Send + 'static) {
    if !nix::unistd::geteuid().is_root() {
        let status = Command::new("unshare")
            .args(["--user", "--map-root-user", "--net", "--mount"])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", name, "--nocapture"])
            .status()
            .expect("util-linux is installed");
        assert!(status.success(), "{name} in a user namespace");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().to_owned();
    let outcome = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).unwrap();
        let none = None::<&str>;
        mount(none, "/", none, MsFlags::MS_PRIVATE | MsFlags::MS_REC, none).unwrap();
        mount(Some("tmpfs"), &path, Some("tmpfs"), MsFlags::empty(), none).unwrap();
        sh("ip link set lo up");
        test(&path);
    })
    .join();
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
}

/// Whether the kernel takes programs for packets from us: from root of the first user namespace alone.
pub(crate) fn takes_programs() -> bool {
    let ids = std::fs::read_to_string("/proc/self/uid_map").unwrap();
    ids.split_whitespace().eq(["0", "0", "4294967295"])
}

/// Runs a shell command in the calling thread's namespaces; what it prints.
pub(crate) fn sh(command: &str) -> String {
    let output = Command::new("sh").args(["-ec", command]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command}: {said}");
    String::from_utf8(output.stdout).unwrap()
}

pub(crate) fn network() -> NetworkId {
    "n-abcdefghij".parse().unwrap()
}

pub(crate) fn router() -> Place {
    Place::Router(network())
}

/// Runs a shell command in the router.
pub(crate) fn in_router(kernel: &Kernel, command: &str) -> String {
    kernel.router_netns(&network()).unwrap().run(|| sh(command)).unwrap()
}

pub(crate) fn name(text: &str) -> Ifname {
    Ifname::new(text)
}

pub(crate) fn mac(last: u8) -> Mac {
    Mac([2, 0x1f, 0, 0, 0, last])
}

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn link(kind: LinkKind, last: u8, master: Option<&str>) -> Object {
    let master = master.map(name);
    let (mac, mtu, gso_max_size) = (Some(mac(last)), Some(1450), Some(GSO));
    Object::Link(Link { kind, mac, mtu, gso_max_size, gso_ipv4_max_size: None, master, up: true, peer: None })
}

fn table(family: Family, digest: &str) -> Object {
    let text = match family {
        Family::Inet => format!(
            "table inet droveway {{ comment \"{digest}\"
               map publish {{ type inet_proto . inet_service : ipv4_addr . inet_service; }}
               set vtep {{ type ipv4_addr . inet_service; }}
               set vtep6 {{ type ipv6_addr . inet_service; }}
               chain input {{ type filter hook input priority 0; policy accept;
                 ip saddr . udp dport @vtep accept; }}
             }}"
        ),
        Family::Bridge => format!(
            "table bridge droveway {{ comment \"{digest}\"
               set port_mac {{ type ifname . ether_addr; }}
               set port_address {{ type ifname . ether_addr . ipv4_addr; }}
               chain prerouting {{ type filter hook prerouting priority 0; policy accept;
                 iifname \"x*\" iifname . ether saddr != @port_mac drop; }}
             }}"
        ),
    };
    Object::Table(Table { text, digest: digest.to_owned() })
}

/// A router with one of everything, and its foot on the host.
pub(crate) fn desired() -> State {
    let route = |kind, via: Option<&str>, dev: Option<&str>, src: Option<&str>, metric| {
        Object::Route(Route { kind, via: via.map(ip), dev: dev.map(name), src: src.map(ip), metric })
    };
    let net = |text: &str| text.parse().unwrap();
    let r = router();
    let h = Place::Host;
    let vxlan = LinkKind::Vxlan { vni: 77, port: 4799, local: ip("10.9.0.1") };
    let up0 = Object::Link(Link {
        kind: LinkKind::Veth,
        mac: Some(mac(2)),
        mtu: Some(1500),
        gso_max_size: Some(GSO),
        gso_ipv4_max_size: None,
        master: None,
        up: true,
        peer: Some(Peer::Host {
            name: name("dw1"),
            mac: Some(mac(3)),
            mtu: 1500,
            gso_max_size: Some(GSO),
            up: true,
        }),
    });
    let dw1 = Link {
        kind: LinkKind::VethEnd,
        mac: Some(mac(3)),
        mtu: Some(1500),
        gso_max_size: Some(GSO),
        gso_ipv4_max_size: None,
        master: None,
        up: true,
        peer: None,
    };
    [
        (r.clone(), Key::Netns, Object::Netns { name: "droveway-test".to_owned() }),
        (r.clone(), Key::Table(Family::Inet), table(Family::Inet, "aaa")),
        (r.clone(), Key::Table(Family::Bridge), table(Family::Bridge, "bbb")),
        (h.clone(), Key::Table(Family::Inet), table(Family::Inet, "ccc")),
        (r.clone(), Key::Link(name("br0")), link(LinkKind::Bridge { link_local_learning: false }, 1, None)),
        (r.clone(), Key::Link(name("vxlan0")), link(vxlan, 4, None)),
        (r.clone(), Key::Link(name("up0")), up0),
        (h.clone(), Key::Link(name("dw1")), Object::Link(dw1)),
        (r.clone(), Key::Sysctl("ipv4/ip_forward".to_owned()), Object::Sysctl("1".to_owned())),
        (r.clone(), Key::Sysctl("ipv4/conf/br0/proxy_arp".to_owned()), Object::Sysctl("1".to_owned())),
        (r.clone(), Key::Address(name("br0"), net("10.42.64.65/16")), Object::Address),
        (r.clone(), Key::Address(name("br0"), net("10.42.0.1/16")), Object::Address),
        (r.clone(), Key::Address(name("br0"), net("169.254.169.250/32")), Object::Address),
        (r.clone(), Key::Address(name("up0"), net("169.254.1.2/30")), Object::Address),
        (h.clone(), Key::Address(name("dw1"), net("169.254.1.1/30")), Object::Address),
        (
            r.clone(),
            Key::Rule(100),
            Object::Rule(Rule { iif: name("br0"), protocol: Protocol::Udp, dport: 53, table: 53 }),
        ),
        (r.clone(), Key::Neighbour(name("vxlan0"), ip("10.42.65.1")), Object::Neighbour(mac(9))),
        (r.clone(), Key::Fdb(name("vxlan0"), mac(9)), Object::Fdb(ip("10.9.0.2"))),
        (
            r.clone(),
            Key::Route(TABLE_MAIN, net("10.42.0.0/16")),
            route(RouteKind::Unreachable, None, None, None, 0),
        ),
        (
            r.clone(),
            Key::Route(TABLE_MAIN, net("10.42.64.64/26")),
            route(RouteKind::Unicast, None, Some("br0"), Some("10.42.64.65"), 0),
        ),
        (
            r.clone(),
            Key::Route(TABLE_MAIN, net("10.42.65.0/26")),
            route(RouteKind::Unicast, Some("10.42.65.1"), Some("vxlan0"), Some("10.42.64.65"), 0),
        ),
        (
            r.clone(),
            Key::Route(TABLE_MAIN, net("0.0.0.0/0")),
            route(RouteKind::Unicast, Some("169.254.1.1"), Some("up0"), Some("169.254.1.2"), 0),
        ),
        (r.clone(), Key::Route(53, net("0.0.0.0/0")), route(RouteKind::Local, None, Some("lo"), None, 0)),
        (
            h.clone(),
            Key::Route(TABLE_MAIN, net("169.254.1.2/32")),
            route(RouteKind::Unicast, None, Some("dw1"), Some("169.254.1.1"), 0),
        ),
        (
            r.clone(),
            Key::Element(Set::PortMac, vec![Field::Ifname(name("e1")), Field::Mac(mac(20))]),
            Object::Element(vec![]),
        ),
        (
            r.clone(),
            Key::Element(
                Set::PortAddress,
                vec![
                    Field::Ifname(name("e1")),
                    Field::Mac(mac(20)),
                    Field::Ipv4(Ipv4Addr::new(10, 42, 64, 70)),
                ],
            ),
            Object::Element(vec![]),
        ),
        (
            r,
            Key::Element(Set::Publish, vec![Field::Protocol(6), Field::Port(8080)]),
            Object::Element(vec![Field::Ipv4(Ipv4Addr::new(10, 42, 64, 70)), Field::Port(80)]),
        ),
        (
            h.clone(),
            Key::Element(Set::Vtep, vec![Field::Ipv4(Ipv4Addr::new(10, 9, 0, 2)), Field::Port(4799)]),
            Object::Element(vec![]),
        ),
        (
            h.clone(),
            Key::Element(Set::Vtep6, vec![Field::Ipv6("fd00::2".parse().unwrap()), Field::Port(4799)]),
            Object::Element(vec![]),
        ),
    ]
    .into_iter()
    .map(|(place, key, object)| ((place, key), object))
    .collect()
}

/// An underlay for the host, as VXLAN wants one.
pub(crate) fn underlay() {
    // Without a link-local address, whose state would change by itself.
    sh("ip link add und0 type bridge; ip link set und0 addrgenmode none; ip addr add 10.9.0.1/24 dev und0; \
        ip link set und0 up");
}

/// An endpoint's device, leading into the namespace bound at `netns`.
pub(crate) fn endpoint(netns: PathBuf, device: &str, host: u8) -> ((Place, Key), Object) {
    let address = format!("10.42.64.{host}/16").parse().unwrap();
    let end = ContainerEnd {
        netns,
        ifname: name("eth0"),
        mac: mac(host),
        mtu: 1450,
        gso_max_size: Some(GSO),
        addresses: vec![address],
        on_link: vec!["169.254.169.250/32".parse().unwrap()],
        gateway: Some(ip("10.42.0.1")),
    };
    let link = Link {
        kind: LinkKind::Veth,
        mac: None,
        mtu: Some(1450),
        gso_max_size: Some(GSO),
        gso_ipv4_max_size: Some(GSO_IPV4),
        master: Some(name("br0")),
        up: true,
        peer: Some(Peer::Container(Box::new(end))),
    };
    ((router(), Key::Link(name(device))), Object::Link(link))
}

/// A namespace that stands for a container.
pub(crate) fn container(dir: &Path, name: &str) -> (Netns, PathBuf) {
    (Netns::create_bound(dir, name).unwrap(), dir.join(name))
}

/// Diffs and applies until nothing is left; how many rounds that took.
pub(crate) fn converge(kernel: &mut Kernel, desired: &State) -> usize {
    for round in 0..=5 {
        let steps = diff(kernel.observe(desired).unwrap(), desired, &Scope::Everything);
        if steps.is_empty() {
            return round;
        }
        assert!(round < 5, "still to do after five rounds: {steps:#?}");
        for step in steps {
            kernel.apply(&step).unwrap();
        }
    }
    unreachable!()
}

/// Waits, woken by the kernel's events, until a diff is no longer empty; the names of what differs.
pub(crate) fn await_drift(kernel: &mut Kernel, desired: &State) -> BTreeSet<(Place, Key)> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let steps = diff(kernel.observe(desired).unwrap(), desired, &Scope::Everything);
        if !steps.is_empty() {
            return steps
                .into_iter()
                .map(|step| match step {
                    plan::Step::Remove(place, key)
                    | plan::Step::Add(place, key, _)
                    | plan::Step::Change(place, key, ..) => (place, key),
                })
                .collect();
        }
        let left = deadline.saturating_duration_since(Instant::now());
        assert!(!left.is_zero(), "no drift was seen");
        kernel.wait(Some(left)).unwrap();
    }
}

/// Waits for something to read.
pub(crate) fn await_readable(fd: impl AsFd) {
    let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
    assert_eq!(poll(&mut fds, 5_000_u16), Ok(1), "nothing came");
}

/// The next packet from a queue: its header and itself.
pub(crate) fn next_packet(queue: &Queue) -> ([u8; tun::HEADER], Vec<u8>) {
    let mut buffer = vec![0; 70_000];
    await_readable(queue);
    let length = queue.read(&mut buffer).unwrap().unwrap();
    let (header, packet) = buffer[..length].split_at(tun::HEADER);
    (header.try_into().unwrap(), packet.to_vec())
}

/// An IPv4 packet with a UDP datagram, without the latter's checksum (RFC 768).
pub(crate) fn udp_packet(from: &str, to: &str, bytes: &[u8]) -> Vec<u8> {
    let (from, to): (SocketAddrV4, SocketAddrV4) = (from.parse().unwrap(), to.parse().unwrap());
    let ports = [from.port().to_be_bytes(), to.port().to_be_bytes()].concat();
    let length = ((bytes.len() + 8) as u16).to_be_bytes();
    ip_packet(17, *from.ip(), *to.ip(), &[&ports, &length[..], &[0, 0], bytes].concat())
}

/// An IPv4 packet.
pub(crate) fn ip_packet(protocol: u8, from: Ipv4Addr, to: Ipv4Addr, bytes: &[u8]) -> Vec<u8> {
    let length = ((bytes.len() + 20) as u16).to_be_bytes();
    let start = [&[0x45, 0], &length[..], &[0, 0, 0, 0, 64, protocol, 0, 0]].concat();
    let mut packet = [&start[..], &from.octets(), &to.octets()].concat();
    let sum = checksum(&packet);
    packet[10..12].copy_from_slice(&sum);
    packet.extend(bytes);
    packet
}

/// The Internet checksum (RFC 1071) of an even number of bytes.
pub(crate) fn checksum(bytes: &[u8]) -> [u8; 2] {
    let mut sum: u32 = bytes.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}
