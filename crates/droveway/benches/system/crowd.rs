//! Hosts that are played: each joins the server with a key of its own, gets a certificate and a block of addresses, has an
//! [`ike::Endpoint`] and the ESP that it agrees on, and answers pings. What they have not is a kernel, an agent and containers.
//!
//! One thread and one UDP socket play them all, on a node of a lab where each has an address; all are peers of host `h1`.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use agent::control::Lessor;
use agent::server::{Join, Server, join};
use anyhow::{Context, Result, anyhow, ensure};
use droveway::lab::Lab;
use esp::{Inbound, InnerPolicy, KeyMaterial, Limits, Opened, Outbound, Sequence, Spi, Suite};
use ike::auth::{Credential, Identity, SigningKey, SpkiHash, Trust};
use ike::crypto::Encr;
use ike::proposal::{EspOffer, IkeOffer};
use ike::wire::{IpSelector, SecurityLabel};
use ike::{ChildConfig, ChildId, ChildSa, Event, Initiate, PeerConfig, PeerId, PeerKind};
use linux::netns::Netns;
use linux::udp;
use model::{
    Block, Candidate, Endpoint, EndpointId, EndpointKind, EnvironmentId, Host, Mac, NetworkId, Object,
    Source, Watch,
};
use packet::{checksum, encap, ipv4, protocol};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tokio::task::JoinSet;

/// The node's address, as the first of a lab's `others`, and the server's and `h1`'s.
const NODE: &str = "10.0.0.201";
const SERVER: &str = "https://10.0.0.2:7443";
const H1: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 5);
/// The only peer of each.
const AGENT: PeerId = PeerId(1);
/// How many join at a time.
const JOINING: usize = 16;
/// How long a step may take that is no subject of a measure.
const LIMIT: Duration = Duration::from_secs(120);
/// Between two looks at deadlines.
const TICK: Duration = Duration::from_millis(20);
/// Where an ICMP echo request lies behind a header without options, and its type (RFC 792).
const ICMP: usize = ipv4::HEADER_LEN;
const ECHO: u8 = 8;

/// Hosts that are played, until it is dropped.
pub struct Crowd {
    node: Netns,
    network: String,
    token: String,
    count: u32,
    hosts: Sender<Far>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    /// Only keys that were agreed after that count as up.
    since: RwLock<Instant>,
    /// How many hosts have keys, and how many pings they answered.
    up: AtomicUsize,
    pings: AtomicUsize,
    stop: AtomicBool,
}

/// One host.
struct Far {
    address: Ipv4Addr,
    ike: ike::Endpoint,
    inbound: Vec<Inbound>,
    outbound: Option<Outbound>,
    /// When it last agreed on keys.
    up: Option<Instant>,
}

impl Crowd {
    /// Nobody yet. `node` is a node of the lab on which nothing runs; `h1` knows the way to all who come. They share
    /// `network` with it.
    pub fn new(lab: &Lab, node: &str, network: &str) -> Result<Self> {
        lab.check(node, &["ip", "route", "add", "local", "10.1.0.0/16", "dev", "lo"])?;
        lab.check("h1", &["ip", "route", "add", "10.1.0.0/16", "via", NODE])?;
        let token = lab.check("server", &["droveway", "token", "create", "--quiet"])?.trim().to_owned();
        let node = Netns::open(Path::new(&format!("/proc/{}/ns/net", lab.pid_of(node)?)))?;
        let socket = node.run(|| udp::Socket::bind(udp::Family::V4, model::TUNNEL_PORT))??;
        let (hosts, added) = channel();
        let shared = Arc::new(Shared {
            since: RwLock::new(Instant::now()),
            up: AtomicUsize::new(0),
            pings: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
        });
        let of_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("crowd".to_owned());
        let thread = thread.spawn(move || play(&socket, &added, &of_thread))?;
        Ok(Self { node, network: network.to_owned(), token, count: 0, hosts, shared, thread: Some(thread) })
    }

    /// Lets hosts join until there are so many.
    pub fn grow(&mut self, count: u32) -> Result<()> {
        let all = self.count..count;
        self.count = self.count.max(count);
        let this = &*self;
        this.node.run(|| -> Result<()> {
            let runtime =
                tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
            runtime.block_on(async {
                let mut joining = JoinSet::new();
                let mut all = all;
                loop {
                    while joining.len() < JOINING
                        && let Some(n) = all.next()
                    {
                        joining.spawn(joined(this.token.clone(), this.network.clone(), n));
                    }
                    let Some(host) = joining.join_next().await else { return Ok(()) };
                    this.hosts.send(host??).map_err(|_| anyhow!("the crowd has ended"))?;
                }
            })
        })?
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.count as usize
    }

    /// Only keys that are agreed from now on count.
    pub fn forget(&self) {
        *self.shared.since.write().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        self.shared.up.store(0, Relaxed);
    }

    /// Waits until all have keys.
    pub fn all_up(&self) -> Result<()> {
        let begun = Instant::now();
        while self.shared.up.load(Relaxed) < self.count() {
            let up = self.shared.up.load(Relaxed);
            ensure!(begun.elapsed() < LIMIT, "{up} of {} tunnels are up after {LIMIT:?}", self.count);
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Pings answered so far.
    pub fn pings(&self) -> usize {
        self.shared.pings.load(Relaxed)
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        self.shared.stop.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

// ---- joining ----

fn address(n: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 1, 0, 1)) + n)
}

/// A host that has joined, has a block and an endpoint, and knows `h1`.
async fn joined(token: String, network: String, n: u32) -> Result<Far> {
    let key = rcgen::KeyPair::generate()?;
    let address = address(n);
    // Given, so that the server does not take the node for a NAT.
    let candidate = Candidate { address: address.into(), port: None, mtu: 1500, source: Source::Given };
    let identity = join(Join {
        key: &key,
        url: SERVER,
        token: &token.parse()?,
        environment: &EnvironmentId::default(),
        name: &format!("crowd{n}").parse()?,
        candidates: vec![candidate],
        labels: BTreeMap::new(),
        routes: Vec::new(),
    })
    .await?;
    let server = Server::of(&identity, &[])?;
    let network = find(&server, |object| match object {
        Object::Network(it) if it.name.as_str() == network => Some(it.id),
        _ => None,
    });
    let network = network.await?.context("the network is not there")?;
    let block = server.lease(network.clone(), 0).await?;
    server.put_endpoint(&endpoint(&block, n)?).await?;
    let agent = find(&server, |object| match object {
        Object::Host(it) if it.name.as_str() == "h1" => Some(it),
        _ => None,
    });
    let agent = agent.await?.context("h1 shares no network with the crowd")?;

    let now = Instant::now();
    let unix = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs();
    let mut ike = ike::Endpoint::new(ike::Config::default(), &rand()?, now, unix);
    let chain = CertificateDer::pem_slice_iter(identity.certificate.as_bytes());
    let chain = chain.map(|it| Ok(it?.to_vec())).collect::<Result<Vec<_>>>()?;
    let credential = Credential::Key { key: Arc::new(SigningKey::from_pkcs8(&key.serialize_der())?), chain };
    ike.add_peer(AGENT, peer_config(&identity.host, address, &agent, &network, credential)?, now);
    Ok(Far { address, ike, inbound: Vec::new(), outbound: None, up: None })
}

fn rand() -> Result<[u8; 32]> {
    let mut seed = [0; 32];
    std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut seed)?;
    Ok(seed)
}

/// The first object of the host's snapshot that is wanted.
async fn find<T>(server: &Server, mut wanted: impl FnMut(Object) -> Option<T>) -> Result<Option<T>> {
    let mut stream = server.watch(None).await?;
    loop {
        if let Watch::Snapshot { objects, .. } = stream.next().await? {
            return Ok(objects.into_iter().find_map(&mut wanted));
        }
    }
}

/// What makes the agent ping the host: one without endpoints has no router.
fn endpoint(block: &Block, n: u32) -> Result<Endpoint> {
    let IpAddr::V4(base) = block.cidr.network() else { anyhow::bail!("not IPv4") };
    let mut id = [0; 8];
    id[4..].copy_from_slice(&n.to_be_bytes());
    Ok(Endpoint {
        id: EndpointId::from_random(id),
        network: block.network.clone(),
        host: block.host.clone(),
        name: Some(format!("c{n}").parse()?),
        stack: None,
        service: None,
        aliases: Vec::new(),
        addresses: vec![Ipv4Addr::from(u32::from(base) + 4).into()],
        mac: Mac::from_random([0, 1, 2, 3, 4, 5]),
        kind: EndpointKind::Socket,
        container: None,
        labels: BTreeMap::new(),
        ports: Vec::new(),
        healthy: true,
        created: 0,
    })
}

/// The agent as this host's peer, as `agent/src/tunnels/wanted.rs` would have it: the lower id begins.
fn peer_config(
    own: &model::HostId,
    address: Ipv4Addr,
    agent: &Host,
    network: &NetworkId,
    credential: Credential,
) -> Result<PeerConfig> {
    let mut key = [0; 32];
    ensure!(agent.key.len() == 64, "h1's key is not known");
    for (byte, digits) in key.iter_mut().zip(agent.key.as_bytes().chunks(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits)?, 16)?;
    }
    let name = |host: &model::HostId| Identity::KeyId(host.as_str().as_bytes().to_vec());
    let everything = vec![IpSelector::prefix(Ipv4Addr::UNSPECIFIED.into(), 0)];
    let child = ChildConfig {
        id: ChildId(1),
        label: Some(SecurityLabel::new(network.to_string().into_bytes())?),
        worker: None,
        local: everything.clone(),
        remote: everything,
        esp: EspOffer::default(),
    };
    let at = |ip: Ipv4Addr| SocketAddr::new(ip.into(), model::TUNNEL_PORT);
    Ok(PeerConfig {
        id: name(&agent.id),
        our_id: name(own),
        trust: Trust::Key(SpkiHash(key)),
        credential,
        paths: vec![ike::Path { local: at(address), remote: at(H1) }],
        initiate: if *own < agent.id { Initiate::First } else { Initiate::Second },
        kind: PeerKind::Native,
        ike: IkeOffer::default(),
        children: vec![child],
    })
}

// ---- playing ----

/// Plays all who come by `added`.
fn play(socket: &udp::Socket, added: &Receiver<Far>, shared: &Shared) {
    let mut hosts: BTreeMap<Ipv4Addr, Far> = BTreeMap::new();
    let (mut buffers, mut received) = (vec![vec![0; 65_536]; 16], Vec::new());
    let mut looked = Instant::now();
    while !shared.stop.load(Relaxed) {
        for mut host in added.try_iter() {
            host.drain(socket, shared);
            hosts.insert(host.address, host);
        }
        let mut fds = [nix::poll::PollFd::new(socket.as_fd(), nix::poll::PollFlags::POLLIN)];
        // Interrupted, or nothing came: the next turn sees.
        let _ = nix::poll::poll(&mut fds, TICK.as_millis() as u16);
        let got = socket.receive(&mut buffers, &mut received).unwrap_or(0);
        for (message, buffer) in received.iter().zip(&mut buffers).take(got) {
            let IpAddr::V4(to) = message.path.local.ip() else { continue };
            let Some(host) = hosts.get_mut(&to) else { continue };
            for datagram in buffer[..message.len].chunks_mut(message.stride) {
                host.datagram(datagram, message.path, socket, shared);
            }
        }
        if looked.elapsed() >= TICK {
            looked = Instant::now();
            for host in hosts.values_mut() {
                if host.ike.poll_timeout().is_some_and(|at| at <= looked) {
                    host.ike.handle_timeout(looked);
                    host.drain(socket, shared);
                }
            }
        }
    }
}

impl Far {
    fn datagram(&mut self, datagram: &mut [u8], path: udp::Path, socket: &udp::Socket, shared: &Shared) {
        match encap::classify(datagram) {
            encap::Kind::Ike(_) => {
                let path = ike::Path { local: path.local, remote: path.remote };
                self.ike.handle_datagram(datagram, path, Instant::now());
                self.drain(socket, shared);
            }
            encap::Kind::Esp(spi) => {
                if let Some(answer) = self.answer(datagram, spi) {
                    send(socket, path, &answer);
                    shared.pings.fetch_add(1, Relaxed);
                }
            }
            encap::Kind::Keepalive | encap::Kind::Runt => {}
        }
    }

    /// The sealed reply to a sealed ICMP echo request.
    fn answer(&self, datagram: &mut [u8], spi: u32) -> Option<Vec<u8>> {
        let inbound = self.inbound.iter().find(|sa| sa.spi().get() == spi)?;
        let all = ["0.0.0.0/0".parse().ok()?];
        let opened = inbound.begin().open(datagram, &InnerPolicy::new(all, all)).ok()?;
        let Opened::Packet(range) = opened else { return None };
        let inner = datagram.get(range)?;
        let request = ipv4::Packet::new_checked(inner).ok()?;
        if request.protocol() != protocol::ICMP || inner.get(ICMP) != Some(&ECHO) {
            return None;
        }
        let mut sealed = vec![0; packet::esp::sealed_len(inner.len())];
        let reply = sealed.get_mut(packet::esp::HEAD_ROOM..)?.get_mut(..inner.len())?;
        reply.copy_from_slice(inner);
        // Addresses change places, which no sum notices.
        reply[12..16].copy_from_slice(&inner[16..20]);
        reply[16..20].copy_from_slice(&inner[12..16]);
        reply[ICMP] = 0;
        reply[ICMP + 2..ICMP + 4].fill(0);
        let sum = checksum::checksum(&reply[ICMP..]);
        reply[ICMP + 2..ICMP + 4].copy_from_slice(&sum.to_be_bytes());
        let length = self.outbound.as_ref()?.begin(1).ok()?.seal(&mut sealed, inner.len()).ok()?;
        sealed.truncate(length);
        Some(sealed)
    }

    /// Does what IKE says.
    fn drain(&mut self, socket: &udp::Socket, shared: &Shared) {
        loop {
            let mut quiet = true;
            while let Some(event) = self.ike.poll_event() {
                quiet = false;
                match event {
                    Event::ChildInbound(sa) => self.inbound.extend(inbound(&sa)),
                    Event::ChildOutbound(sa) => {
                        self.outbound = outbound(&sa);
                        self.count(shared);
                    }
                    Event::ChildDeleted { inbound, .. } => {
                        self.inbound.retain(|sa| sa.spi().get() != inbound.0);
                    }
                    _ => {}
                }
            }
            while let Some(transmit) = self.ike.poll_transmit() {
                quiet = false;
                let path = udp::Path { local: transmit.path.local, remote: transmit.path.remote };
                send(socket, path, &transmit.bytes);
            }
            if quiet {
                return;
            }
        }
    }

    /// It has keys: once for each time that all were forgotten.
    fn count(&mut self, shared: &Shared) {
        let since = *shared.since.read().unwrap_or_else(PoisonError::into_inner);
        if self.up.is_none_or(|up| up < since) {
            shared.up.fetch_add(1, Relaxed);
        }
        self.up = Some(Instant::now());
    }
}

/// What the kernel refuses is lost; IKE sends again.
fn send(socket: &udp::Socket, path: udp::Path, bytes: &[u8]) {
    let _ = socket.send(&[udp::Send { path, bytes, segment: bytes.len(), tos: 0 }]);
}

fn inbound(sa: &ChildSa) -> Option<Inbound> {
    Inbound::new(Spi::new(sa.spi.0)?, &material(sa)?, sequence(sa)).ok()
}

fn outbound(sa: &ChildSa) -> Option<Outbound> {
    let sequence = sequence(sa);
    Outbound::new(Spi::new(sa.spi.0)?, &material(sa)?, sequence, Limits::of(sequence)).ok()
}

fn sequence(sa: &ChildSa) -> Sequence {
    if sa.suite.esn { Sequence::Extended } else { Sequence::Short }
}

/// Key, then salt (RFC 4106 §8.1).
fn material(sa: &ChildSa) -> Option<KeyMaterial> {
    let suite = match sa.key.encr {
        Encr::Aes128Gcm16 => Suite::Aes128Gcm16,
        Encr::Aes256Gcm16 => Suite::Aes256Gcm16,
    };
    KeyMaterial::new(suite, &[sa.key.key.expose(), &sa.key.salt[..]].concat()).ok()
}
