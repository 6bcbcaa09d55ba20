//! Two hosts with a router each, and nothing but the packet path between them: keys are given, not agreed on.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::mpsc::{Receiver, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use agent::dataplane::{Dataplane, DeviceIndex, PeerIndex, Signal, Sockets, Tuning};
use esp::{Inbound, InnerPolicy, KeyMaterial, Limits, Outbound, Sequence, Spi, Suite};
use ipnet::IpNet;
use linux::netns::Netns;
use linux::{tun, udp};

use crate::sandbox::sh;

/// The only device of each host.
pub const DEVICE: DeviceIndex = DeviceIndex(1);
/// The other host, as each calls it.
pub const PEER: PeerIndex = PeerIndex(7);
pub const PORT: u16 = 4500;
const WAIT: Duration = Duration::from_secs(10);

/// One side. What is inside of it is named after the other in shell commands: `10.42.{side}.1`.
pub struct Host {
    pub side: u8,
    pub host: Netns,
    pub router: Netns,
    pub path: Dataplane,
    /// Of all keys that are given from now on.
    pub suite: Suite,
    signals: Mutex<Receiver<Signal>>,
    inbound: Mutex<BTreeMap<u8, Arc<Inbound>>>,
}

pub struct Pair {
    pub a: Host,
    pub b: Host,
}

/// Two hosts, 192.0.2.1 and .2 on the underlay, that know their routes but no key.
pub fn strangers(dir: &Path) -> Pair {
    strangers_tuned(dir, [&Tuning::default(), &Tuning::default()])
}

/// As [`strangers`], with settings of the path on each.
pub fn strangers_tuned(dir: &Path, tunings: [&Tuning; 2]) -> Pair {
    let [a, b] = hosts(dir);
    Pair { a: start(1, a, tunings[0]), b: start(2, b, tunings[1]) }
}

/// Two hosts, each with a namespace for a router, and the underlay between them.
pub fn hosts(dir: &Path) -> [(Netns, Netns); 2] {
    let name = |side: u8, kind: &str| format!("{kind}{side}");
    let make = |side| {
        let host = Netns::create_bound(dir, &name(side, "host")).unwrap();
        let router = Netns::create_bound(dir, &name(side, "router")).unwrap();
        for ns in [&host, &router] {
            ns.run(|| {
                sh("sysctl -qw net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.default.accept_dad=0 \
                net.ipv6.conf.default.addr_gen_mode=1; ip link set lo up")
            })
            .unwrap();
        }
        (host, router)
    };
    let (a, b) = (make(1), make(2));
    sh("ip link add und1 address 02:00:00:00:00:01 gso_max_size 65536 type veth \
        peer name und2 address 02:00:00:00:00:02 gso_max_size 65536");
    for (side, (host, _)) in [(1, &a), (2, &b)] {
        let ns = dir.join(name(side, "host"));
        sh(&format!("ip link set und{side} netns {}", ns.display()));
        let other = 3 - side;
        let commands = format!(
            "ip addr add 192.0.2.{side}/24 dev und{side}; ip addr add 192.0.2.1{side}/24 dev und{side}; \
             ip addr add 2001:db8::{side}/64 dev und{side} nodad; ip link set und{side} up; \
             for to in 192.0.2.{other} 192.0.2.1{other} 2001:db8::{other}; do \
               ip neigh replace $to lladdr 02:00:00:00:00:0{other} dev und{side} nud permanent; done"
        );
        host.run(|| sh(&commands)).unwrap();
    }
    [a, b]
}

/// Two hosts with a security association each way, over IPv4.
pub fn pair(dir: &Path) -> Pair {
    tuned(dir, &Tuning::default())
}

/// As [`pair`], with settings of the path.
pub fn tuned(dir: &Path, tuning: &Tuning) -> Pair {
    let pair = strangers_tuned(dir, [tuning, tuning]);
    pair.connect();
    pair
}

fn start(side: u8, (host, router): (Netns, Netns), tuning: &Tuning) -> Host {
    let (signal, signals) = sync_channel(4096);
    let path = host
        .run(|| {
            let group = |family| {
                udp::Socket::bind_group(family, PORT, tuning.workers.unwrap_or(1)).unwrap().into_iter()
            };
            let sockets = group(udp::Family::V4).zip(group(udp::Family::V6));
            let sockets = sockets.map(|(v4, v6)| Sockets { v4: Some(v4), v6: Some(v6) }).collect();
            let path = Dataplane::start(sockets, signal, tuning.clone()).unwrap();
            path.set_ike_sockets(Sockets {
                v4: Some(udp::Socket::bind(udp::Family::V4, 500).unwrap()),
                v6: None,
            });
            path
        })
        .unwrap();
    let (signals, inbound, suite) = (Mutex::new(signals), Mutex::default(), Suite::Aes256Gcm16);
    let host = Host { side, host, router, path, suite, signals, inbound };
    host.make_device();
    host.add_device();
    host
}

/// What is behind a side.
fn nets(side: u8) -> [IpNet; 2] {
    [format!("10.42.{side}.0/24"), format!("fd42:{side}::/64")].map(|net| net.parse().unwrap())
}

/// The path from one side to the other on the underlay.
pub fn way(from: &str, to: &str) -> udp::Path {
    let socket = |address: &str| SocketAddr::new(address.parse().unwrap(), PORT);
    udp::Path { local: socket(from), remote: socket(to) }
}

impl Pair {
    pub fn connect(&self) {
        self.connect_by(1, way("192.0.2.1", "192.0.2.2"));
    }

    /// New associations in both directions, of which `salt` makes SPIs and keys.
    pub fn connect_by(&self, salt: u8, path: udp::Path) {
        let back = udp::Path { local: path.remote, remote: path.local };
        self.b.receives(&self.a, salt);
        self.a.receives(&self.b, salt);
        self.a.sends(&self.b, salt, path);
        self.b.sends(&self.a, salt, back);
    }
}

impl Host {
    pub fn receives(&self, from: &Host, salt: u8) {
        let policy = Arc::new(InnerPolicy::new(nets(from.side), nets(self.side)));
        for worker in (0..from.path.workers()).rev() {
            let spi = spi_for(from.side, salt, worker, self.path.workers());
            let key = key_for(self.suite, from.side, salt, worker);
            let sa = Arc::new(Inbound::new(spi, &key, Sequence::Extended).unwrap());
            self.path.add_inbound(Arc::clone(&sa), Arc::clone(&policy), PEER, DEVICE);
            self.inbound.lock().unwrap().insert(salt, sa);
        }
    }

    /// Seals what goes to the other on associations that [`Host::receives`] made there, one for each worker.
    pub fn sends(&self, to: &Host, salt: u8, path: udp::Path) {
        for worker in 0..self.path.workers() {
            let spi = spi_for(self.side, salt, worker, to.path.workers());
            let sa = sealing(spi, &key_for(self.suite, self.side, salt, worker));
            self.path.set_outbound(PEER, (DEVICE, worker), sa, path);
        }
    }

    /// The association that [`Host::receives`] made for the first worker.
    pub fn inbound(&self, salt: u8) -> Arc<Inbound> {
        Arc::clone(&self.inbound.lock().unwrap()[&salt])
    }

    /// The device and the routes that lead into it.
    pub fn make_device(&self) {
        let (side, other) = (self.side, 3 - self.side);
        self.sh(&format!(
            "ip tuntap add dev tun0 mode tun vnet_hdr multi_queue; ip link set tun0 mtu 1438 txqueuelen 500 up; \
             ip addr add 10.42.{side}.1/32 dev tun0; ip -6 addr add fd42:{side}::1/128 dev tun0 nodad; \
             ip route add 10.42.{other}.0/24 dev tun0 src 10.42.{side}.1; ip -6 route add fd42:{other}::/64 dev tun0"
        ));
    }

    /// Gives the device to the path.
    pub fn add_device(&self) {
        let workers = u32::try_from(self.path.workers()).unwrap();
        self.path.add_device(DEVICE, tun::Queues::open(&self.router, "tun0", workers).unwrap());
        let routes = nets(3 - self.side).into_iter().map(|net| (net, PEER));
        self.path.set_routes(DEVICE, routes.collect(), false);
    }

    /// As if there were so many other peers, each with an address, a policy and an association each way.
    pub fn crowd(&self, count: u32) {
        let net = |n: u32| IpNet::from(IpAddr::from((0x0a64_0000 + n).to_be_bytes()));
        let ours = nets(self.side);
        let mut routes: Vec<_> = nets(3 - self.side).into_iter().map(|net| (net, PEER)).collect();
        for n in 0..count {
            let (peer, spi) = (PeerIndex(1000 + u64::from(n)), Spi::new(0x0100_0000 + n).unwrap());
            let key = key_for(self.suite, self.side, (n >> 8) as u8, n as usize);
            let policy = Arc::new(InnerPolicy::new([net(n)], ours));
            let sa = Arc::new(Inbound::new(spi, &key, Sequence::Extended).unwrap());
            self.path.add_inbound(sa, policy, peer, DEVICE);
            self.path.set_outbound(peer, (DEVICE, 0), sealing(spi, &key), way("192.0.2.11", "192.0.2.12"));
            routes.push((net(n), peer));
        }
        self.path.set_routes(DEVICE, routes, false);
    }

    /// Runs a shell command in the router.
    pub fn sh(&self, command: &str) -> String {
        self.router.run(|| sh(command)).unwrap()
    }

    /// Waits for a signal that `pick` wants; others are passed over.
    pub fn await_signal<T>(&self, mut pick: impl FnMut(Signal) -> Option<T>) -> T {
        let until = Instant::now() + WAIT;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let signal = self.signals.lock().unwrap().recv_timeout(left).expect("the signal comes in time");
            if let Some(picked) = pick(signal) {
                return picked;
            }
        }
    }

    /// Signals that have come and were not waited for.
    pub fn signals(&self) -> Vec<Signal> {
        self.signals.lock().unwrap().try_iter().collect()
    }

    pub fn dropped(&self, reason: &str) -> u64 {
        self.path.drops(PEER).get(reason).copied().unwrap_or(0)
    }

    pub fn dropped_in_all(&self, reason: &str) -> u64 {
        self.path.total_drops().get(reason).copied().unwrap_or(0)
    }

    /// A socket of a program in the router.
    pub fn socket(&self, port: u16) -> udp::Socket {
        self.router.run(|| udp::Socket::bind(udp::Family::V4, port).unwrap()).unwrap()
    }

    pub fn inner(&self) -> IpAddr {
        IpAddr::from([10, 42, self.side, 1])
    }
}

/// The association of what comes from a side.
pub fn spi(from: u8, salt: u8) -> Spi {
    Spi::new(u32::from_be_bytes([0xc0, 0xde, salt, from])).unwrap()
}

/// Of one of the sender's workers, for one of the receiver's: that which is the remainder.
fn spi_for(from: u8, salt: u8, worker: usize, receivers: usize) -> Spi {
    if receivers == 1 && worker == 0 {
        return spi(from, salt);
    }
    let (worker, receivers) = (worker as u32, receivers as u32);
    let any = spi(from, salt).get() - (worker << 24);
    Spi::new(any - any % receivers + worker % receivers).unwrap()
}

fn key_for(suite: Suite, from: u8, salt: u8, worker: usize) -> KeyMaterial {
    let mut bytes = vec![from ^ (salt << 2); suite.key_material_len()];
    bytes[1] = bytes[1].wrapping_add(worker as u8);
    KeyMaterial::new(suite, &bytes).unwrap()
}

pub fn outbound(from: u8, salt: u8) -> Arc<Outbound> {
    sealing(spi(from, salt), &key_for(Suite::Aes256Gcm16, from, salt, 0))
}

fn sealing(spi: Spi, key: &KeyMaterial) -> Arc<Outbound> {
    let limits = Limits::of(Sequence::Extended);
    Arc::new(Outbound::new(spi, key, Sequence::Extended, limits).unwrap())
}

/// Waits until something is so.
pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let until = Instant::now() + WAIT;
    while !holds() {
        assert!(Instant::now() < until, "not in time: {what}");
        std::thread::yield_now();
    }
}
