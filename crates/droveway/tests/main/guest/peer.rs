//! Our side in the least that can be one: `ike` and `esp` on a node's UDP ports, and echoes instead of a kernel behind
//! them. It has all pieces of the product's tunnels and no policy, so that what a test sees is the protocol's.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use droveway::lab::Lab;
use esp::{Inbound, InnerPolicy, KeyMaterial, Limits, Opened, Outbound, Sequence, Spi, Suite};
use ike::auth::{Credential, Trust};
use ike::crypto::{Encr, Secret, TrafficKey};
use ike::wire::IpSelector;
use ike::{
    ChildConfig, ChildId, ChildSa, Config, Endpoint, Event, Initiate, Path, PeerConfig, PeerId, PeerKind,
};
use ipnet::IpNet;
use packet::{checksum, ipv4, protocol};

use crate::support::{LIMIT, until};

pub const PEER: PeerId = PeerId(1);
pub const PORT: u16 = 4500;
const TICK: Duration = Duration::from_millis(1);
const ECHO: u8 = 8;
const ICMP_LEN: usize = 16;

/// One direction of what a test made or an exchange agreed on.
pub struct Sending {
    pub sa: Outbound,
    pub path: Path,
}

/// What it is at this moment.
pub struct State {
    sockets: [UdpSocket; 2],
    local: Ipv4Addr,
    pub endpoint: Option<Endpoint>,
    inbound: BTreeMap<Spi, (Inbound, InnerPolicy, ChildId)>,
    outbound: BTreeMap<ChildId, Sending>,
    /// All that the endpoint told, in words.
    pub told: Vec<String>,
    /// Children that the endpoint agreed on, as they came in.
    pub agreed: Vec<ChildSa>,
    /// Echo requests that came through a child.
    pub asked: BTreeMap<ChildId, u32>,
    /// Echo replies that came through a child, by their number.
    pub answers: BTreeMap<ChildId, BTreeSet<u16>>,
    /// Why packets were refused.
    pub refused: Vec<String>,
}

/// A thread that moves packets until this value is dropped.
pub struct Peer {
    state: Arc<Mutex<State>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

/// What to agree on with charon.
pub struct Terms {
    pub initiate: Initiate,
    pub remote: SocketAddr,
    pub psk: &'static [u8],
    pub children: Vec<ChildConfig>,
}

impl Peer {
    /// On that node's ports 4500 and 500.
    pub fn on(lab: &Lab, node: &str, local: Ipv4Addr) -> Self {
        let netns = PathBuf::from(format!("/proc/{}/ns/net", lab.pid_of(node).unwrap()));
        let bind = |port| {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap();
            socket.set_nonblocking(true).unwrap();
            socket
        };
        let sockets = linux::netns::Netns::open(&netns).unwrap().run(|| [bind(PORT), bind(500)]).unwrap();
        let state = Arc::new(Mutex::new(State {
            sockets,
            local,
            endpoint: None,
            inbound: BTreeMap::new(),
            outbound: BTreeMap::new(),
            told: Vec::new(),
            agreed: Vec::new(),
            asked: BTreeMap::new(),
            answers: BTreeMap::new(),
            refused: Vec::new(),
        }));
        let stop = Arc::new(AtomicBool::new(false));
        let (its, ends) = (Arc::clone(&state), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            while !ends.load(Ordering::Relaxed) {
                let idle = its.lock().unwrap().turn();
                if idle {
                    std::thread::sleep(TICK);
                }
            }
        });
        Self { state, stop, thread: Some(thread) }
    }

    pub fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        work(&mut self.state.lock().unwrap())
    }

    /// Waits until the state is so; if it never is, all that was told is shown.
    #[track_caller]
    pub fn until(&self, what: &str, mut done: impl FnMut(&State) -> bool) {
        let begin = Instant::now();
        while !self.with(|state| done(state)) {
            let (told, refused) = self.with(|state| (state.told.join("\n"), state.refused.join("\n")));
            assert!(
                begin.elapsed() < LIMIT,
                "not within {LIMIT:?}: {what}; told:\n{told}\nrefused:\n{refused}"
            );
            std::thread::sleep(TICK);
        }
    }

    /// An IKE endpoint with the guest as its only peer.
    pub fn begin(&self, terms: Terms) {
        let mut seed = [0; 32];
        File::open("/dev/urandom").unwrap().read_exact(&mut seed).unwrap();
        let unix = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        self.with(|state| {
            state.clear();
            let config = PeerConfig {
                id: "guest.example".parse().unwrap(),
                our_id: "peer.example".parse().unwrap(),
                trust: Trust::Psk(Secret::new(terms.psk.to_vec())),
                credential: Credential::Psk(Secret::new(terms.psk.to_vec())),
                paths: vec![Path { local: (state.local, PORT).into(), remote: terms.remote }],
                initiate: terms.initiate,
                kind: PeerKind::Foreign,
                ike: ike::proposal::IkeOffer::default(),
                children: terms.children,
            };
            let mut endpoint = Endpoint::new(Config::default(), &seed, Instant::now(), unix);
            endpoint.add_peer(PEER, config, Instant::now());
            state.endpoint = Some(endpoint);
        });
    }

    /// Sends echo requests one by one, each after the answer to the one before, and gives how many were not answered.
    pub fn ping(&self, child: ChildId, from: Ipv4Addr, to: Ipv4Addr, numbers: std::ops::Range<u16>) -> usize {
        let mut lost = 0;
        for number in numbers {
            self.with(|state| state.echo(child, from, to, number));
            let answered = |state: &State| state.answers.get(&child).is_some_and(|it| it.contains(&number));
            let begin = Instant::now();
            while begin.elapsed() < Duration::from_secs(2) && !self.with(|state| answered(state)) {
                std::thread::sleep(TICK);
            }
            lost += usize::from(!self.with(|state| answered(state)));
        }
        lost
    }

    /// Waits until the guest's echo requests are answered: routes and neighbours are there.
    pub fn settle(&self, child: ChildId, from: Ipv4Addr, to: Ipv4Addr) {
        until(LIMIT, "the first echo is answered", || self.ping(child, from, to, 0..1) == 0);
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

impl State {
    /// An SA that a test made by hand.
    pub fn add(&mut self, child: ChildId, inbound: Inbound, policy: InnerPolicy, sending: Sending) {
        self.inbound.insert(inbound.spi(), (inbound, policy, child));
        self.outbound.insert(child, sending);
    }

    /// Forgets all SAs.
    pub fn clear(&mut self) {
        self.inbound.clear();
        self.outbound.clear();
    }

    pub fn sending(&self, child: ChildId) -> &Outbound {
        &self.outbound[&child].sa
    }

    /// The highest number received, of all SAs of a child.
    pub fn highest(&self, child: ChildId) -> u64 {
        let of = self.inbound.values().filter(|(.., it)| *it == child);
        of.map(|(sa, ..)| sa.begin().highest()).max().unwrap_or(0)
    }

    /// We are somewhere else now, and tell the peer.
    pub fn moved(&mut self, local: Ipv4Addr) {
        self.local = local;
        for sending in self.outbound.values_mut() {
            sending.path.local.set_ip(local.into());
        }
        if let Some(endpoint) = &mut self.endpoint {
            endpoint.set_local(PEER, (local, PORT).into(), Instant::now());
        }
    }

    /// Where the packets of a child go.
    pub fn goes_to(&self, child: ChildId) -> SocketAddr {
        self.outbound[&child].path.remote
    }

    /// Whether nothing was there to be done.
    fn turn(&mut self) -> bool {
        let mut idle = true;
        let mut buffer = vec![0; 65_536];
        for index in 0..self.sockets.len() {
            while let Ok((length, from)) = self.sockets[index].recv_from(&mut buffer) {
                idle = false;
                let port = self.sockets[index].local_addr().unwrap().port();
                let path = Path { local: (self.local, port).into(), remote: from };
                self.received(&mut buffer[..length], path);
            }
        }
        let Some(endpoint) = &mut self.endpoint else { return idle };
        endpoint.handle_timeout(Instant::now());
        while let Some(event) = self.endpoint.as_mut().and_then(Endpoint::poll_event) {
            idle = false;
            self.heed(event);
        }
        while let Some(transmit) = self.endpoint.as_mut().and_then(Endpoint::poll_transmit) {
            idle = false;
            let socket = &self.sockets[usize::from(transmit.path.local.port() == 500)];
            // The underlay may be changing: IKE sends again.
            let _ = socket.send_to(&transmit.bytes, transmit.path.remote);
        }
        idle
    }

    fn received(&mut self, datagram: &mut [u8], path: Path) {
        let spi = match packet::encap::classify(datagram) {
            packet::encap::Kind::Esp(spi) if path.local.port() == PORT => Spi::new(spi),
            _ => {
                if let Some(endpoint) = &mut self.endpoint {
                    endpoint.handle_datagram(datagram, path, Instant::now());
                }
                return;
            }
        };
        let Some((inbound, policy, child)) = spi.and_then(|spi| self.inbound.get(&spi)) else {
            self.refused.push(format!("unknown SPI {spi:?}"));
            return;
        };
        let (child, spi) = (*child, inbound.spi());
        let opened = inbound.begin().open(datagram, policy);
        match opened {
            Ok(Opened::Packet(range)) => self.inner(child, &datagram[range]),
            Ok(Opened::Dummy) => {}
            Err(reason) => self.refused.push(format!("{spi}: {reason:?}")),
        }
    }

    fn inner(&mut self, child: ChildId, bytes: &[u8]) {
        let view = ipv4::Packet::new_checked(bytes).unwrap();
        let echo = view.payload();
        let right =
            view.verify_checksum() && view.protocol() == protocol::ICMP && checksum::checksum(echo) == 0;
        assert!(right, "{bytes:x?}");
        let number = u16::from_be_bytes([echo[6], echo[7]]);
        match echo[0] {
            ECHO => {
                *self.asked.entry(child).or_default() += 1;
                let mut reply = echo.to_vec();
                reply[0] = 0;
                self.send(child, view.destination(), view.source(), reply);
            }
            0 => {
                self.answers.entry(child).or_default().insert(number);
            }
            kind => panic!("ICMP of type {kind} from {}: {echo:x?}", view.source()),
        }
    }

    fn echo(&mut self, child: ChildId, from: Ipv4Addr, to: Ipv4Addr, number: u16) {
        if let Some(answers) = self.answers.get_mut(&child) {
            answers.remove(&number);
        }
        // Not all of it zero: a kernel adjusts the checksum of its reply, and of nothing but zeros makes the wrong zero.
        let mut echo = vec![0x5a; ICMP_LEN];
        echo[..2].copy_from_slice(&[ECHO, 0]);
        echo[6..8].copy_from_slice(&number.to_be_bytes());
        self.send(child, from, to, echo);
    }

    fn send(&mut self, child: ChildId, source: Ipv4Addr, destination: Ipv4Addr, mut icmp: Vec<u8>) {
        let Some(sending) = self.outbound.get(&child) else {
            self.refused.push(format!("nothing to send on for {child:?}"));
            return;
        };
        icmp[2..4].fill(0);
        let sum = checksum::checksum(&icmp);
        icmp[2..4].copy_from_slice(&sum.to_be_bytes());
        let payload_len = u16::try_from(icmp.len()).unwrap();
        let header = ipv4::Repr {
            protocol: protocol::ICMP,
            source,
            destination,
            payload_len,
            ..ipv4::Repr::default()
        };
        let inner = ipv4::HEADER_LEN + icmp.len();
        let mut buffer = vec![0; packet::esp::sealed_len(inner)];
        let begin = packet::esp::HEAD_ROOM;
        header.emit(&mut buffer[begin..]);
        buffer[begin + ipv4::HEADER_LEN..][..icmp.len()].copy_from_slice(&icmp);
        let length = sending.sa.begin(1).unwrap().seal(&mut buffer, inner).unwrap();
        let _ = self.sockets[0].send_to(&buffer[..length], sending.path.remote);
    }

    fn heed(&mut self, event: Event) {
        self.told.push(match &event {
            Event::ChildInbound(sa) => format!("receive on {:08x}, {}", sa.spi.0, sa.suite),
            Event::ChildOutbound(sa) => format!("send on {:08x}, {}", sa.spi.0, sa.suite),
            Event::ChildDeleted { inbound, why, .. } => format!("child {:08x} is gone: {why}", inbound.0),
            Event::PeerFailed { why, .. } => format!("failed: {why}"),
            Event::ChildFailed { child, why, .. } => format!("child {} failed: {why}", child.0),
            Event::PeerDown { why, .. } => format!("down: {why}"),
            Event::Refused { why, .. } => format!("refused: {why}"),
            Event::PeerUp { path, .. } => format!("up: {}", path.remote),
            Event::PeerMoved { path, .. } => format!("moved: {}", path.remote),
        });
        match event {
            Event::ChildInbound(sa) => {
                let policy = InnerPolicy::new(nets(&sa.remote), nets(&sa.local));
                let inbound = Inbound::new(spi(&sa), &material(&sa.key), sequence(&sa)).unwrap();
                self.inbound.insert(inbound.spi(), (inbound, policy, sa.slot.child));
                self.agreed.push(sa);
            }
            Event::ChildOutbound(sa) => {
                let limits = Limits::of(sequence(&sa));
                let out = Outbound::new(spi(&sa), &material(&sa.key), sequence(&sa), limits).unwrap();
                self.outbound.insert(sa.slot.child, Sending { sa: out, path: sa.path });
            }
            Event::ChildDeleted { inbound, outbound, .. } => {
                self.inbound.retain(|spi, _| spi.get() != inbound.0);
                self.outbound.retain(|_, sending| sending.sa.spi().get() != outbound.0);
            }
            Event::PeerMoved { path, .. } => {
                self.outbound.values_mut().for_each(|sending| sending.path = path);
            }
            Event::PeerUp { .. }
            | Event::PeerDown { .. }
            | Event::PeerFailed { .. }
            | Event::Refused { .. }
            | Event::ChildFailed { .. } => {}
        }
    }
}

fn spi(sa: &ChildSa) -> Spi {
    Spi::new(sa.spi.0).unwrap()
}

fn sequence(sa: &ChildSa) -> Sequence {
    if sa.suite.esn { Sequence::Extended } else { Sequence::Short }
}

fn material(key: &TrafficKey) -> KeyMaterial {
    let suite = match key.encr {
        Encr::Aes128Gcm16 => Suite::Aes128Gcm16,
        Encr::Aes256Gcm16 => Suite::Aes256Gcm16,
    };
    KeyMaterial::new(suite, &[key.key.expose(), &key.salt].concat()).unwrap()
}

fn nets(selectors: &[IpSelector]) -> Vec<IpNet> {
    let subnets = |it: &IpSelector| match (it.start, it.end) {
        (std::net::IpAddr::V4(start), std::net::IpAddr::V4(end)) => {
            ipnet::Ipv4Subnets::new(start, end, 0).map(IpNet::V4).collect::<Vec<_>>()
        }
        other => panic!("selectors of the guest are IPv4: {other:?}"),
    };
    selectors.iter().flat_map(subnets).collect()
}
