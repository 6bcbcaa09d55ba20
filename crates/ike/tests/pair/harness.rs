//! Two endpoints, a network between them, and time that passes only when told.
//!
//! The network loses, delays, reorders and repeats; a host may sit behind a NAT whose mapping changes. Beside each
//! endpoint stands a model of its packet path, fed by events alone, that carries packets between the two and counts
//! those that found no SA: what a real packet path would have lost.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use ike::auth::{Credential, Identity, SigningKey, SpkiHash, Trust};
use ike::proposal::{EspOffer, IkeOffer};
use ike::wire::{EspSpi, IpSelector, SecurityLabel};
use ike::{
    ChildConfig, ChildId, ChildSa, ChildUse, Config, Endpoint, Event, Failure, Initiate, Limits, Path,
    PeerConfig, PeerId, PeerKind, Slot, Status, Timing,
};

/// The peer, as each of the two calls the other.
pub const PEER: PeerId = PeerId(1);

/// Chance for the network and the schedules, from a seed that is printed.
#[derive(Clone)]
pub struct Dice(pub u64);

impl Dice {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound.max(1)
    }

    pub fn percent(&mut self, chance: u64) -> bool {
        self.below(100) < chance
    }
}

/// What the network does to a datagram.
#[derive(Debug, Clone, Copy)]
pub struct Weather {
    pub loss: u64,
    pub repeat: u64,
    /// Milliseconds of delay, from and to.
    pub delay: (u64, u64),
}

pub const FAIR: Weather = Weather { loss: 0, repeat: 0, delay: (5, 5) };

pub struct Host {
    pub endpoint: Endpoint,
    pub config: Config,
    pub address: SocketAddr,
    /// What the world sees of it, if it is behind a NAT.
    pub public: Option<SocketAddr>,
    pub inbound: BTreeMap<EspSpi, ChildSa>,
    pub outbound: BTreeMap<Slot, ChildSa>,
    pub used: BTreeMap<EspSpi, ChildUse>,
    pub log: Vec<String>,
    pub failures: Vec<Failure>,
    pub up: bool,
    pub downs: usize,
    pub moves: usize,
    pub lost: u64,
    pub received: u64,
    pub keepalives: usize,
    pub datagrams: usize,
    pub largest: usize,
    pub made: usize,
}

pub struct Pair {
    pub hosts: [Host; 2],
    pub now: Instant,
    pub begun: Instant,
    pub weather: Weather,
    pub dice: Dice,
    queue: BTreeMap<(Instant, u64), Flying>,
    ordinal: u64,
    /// Drops datagrams on purpose: who sends, and the whole payload.
    pub filter: Option<Filter>,
    steps: u64,
}

/// Whether a datagram is lost: who sends it, and the whole payload.
pub type Filter = Box<dyn FnMut(usize, &[u8]) -> bool>;

struct Flying {
    from: SocketAddr,
    to: SocketAddr,
    load: Load,
}

enum Load {
    Ike(Vec<u8>),
    Esp { from: usize, spi: EspSpi, key: Vec<u8> },
}

fn keys() -> &'static [Arc<SigningKey>; 2] {
    static KEYS: OnceLock<[Arc<SigningKey>; 2]> = OnceLock::new();
    KEYS.get_or_init(|| {
        [(); 2].map(|()| {
            let der =
                aws_lc_rs::signature::Ed25519KeyPair::generate_pkcs8(&aws_lc_rs::rand::SystemRandom::new());
            Arc::new(SigningKey::from_pkcs8(der.unwrap().as_ref()).unwrap())
        })
    })
}

pub fn name(host: usize) -> Identity {
    Identity::KeyId(vec![b'h', b'0' + host as u8])
}

pub fn net(host: usize) -> Vec<IpSelector> {
    vec![IpSelector::prefix(format!("10.42.{host}.0").parse().unwrap(), 24)]
}

/// One wanted child, as `host` sees it. Child 1 is the network without a label.
pub fn child(host: usize, id: u64, worker: Option<u32>) -> ChildConfig {
    ChildConfig {
        id: ChildId(id * 100 + u64::from(worker.unwrap_or(0))),
        label: (id > 1).then(|| SecurityLabel::new(format!("net-{id}").into()).unwrap()),
        worker,
        local: net(host),
        remote: net(1 - host),
        esp: EspOffer::default(),
    }
}

pub fn peer_config(host: usize, addresses: [SocketAddr; 2], children: &[u64]) -> PeerConfig {
    let keys = keys();
    PeerConfig {
        id: name(1 - host),
        our_id: name(host),
        trust: Trust::Key(SpkiHash::of(keys[1 - host].public().spki())),
        credential: Credential::Key { key: keys[host].clone(), chain: Vec::new() },
        paths: vec![Path { local: addresses[host], remote: addresses[1 - host] }],
        initiate: if host == 0 { Initiate::First } else { Initiate::Second },
        kind: PeerKind::Native,
        ike: IkeOffer::default(),
        children: children.iter().map(|id| child(host, *id, None)).collect(),
    }
}

pub fn address(host: usize) -> SocketAddr {
    format!("192.0.2.{}:4500", host + 1).parse().unwrap()
}

impl Pair {
    /// Two hosts that know each other and want child 1.
    pub fn new(seed: u64) -> Self {
        Self::with(seed, Timing::default(), |_, _| {})
    }

    pub fn with(seed: u64, timing: Timing, tune: impl FnMut(usize, &mut PeerConfig)) -> Self {
        Self::with_config(seed, Config { timing, ..Config::default() }, tune)
    }

    pub fn with_limits(seed: u64, limits: Limits, tune: impl FnMut(usize, &mut PeerConfig)) -> Self {
        Self::with_config(seed, Config { limits, ..Config::default() }, tune)
    }

    fn with_config(seed: u64, config: Config, mut tune: impl FnMut(usize, &mut PeerConfig)) -> Self {
        let now = Instant::now();
        let hosts = [0, 1].map(|host| {
            let config = config.clone();
            let mut it = Host::new(host, config, seed, now);
            let mut peer = peer_config(host, [address(0), address(1)], &[1]);
            tune(host, &mut peer);
            it.endpoint.add_peer(PEER, peer, now);
            it
        });
        let mut pair = Self {
            hosts,
            now,
            begun: now,
            weather: FAIR,
            dice: Dice(seed),
            queue: BTreeMap::new(),
            ordinal: 0,
            filter: None,
            steps: 0,
        };
        pair.drain();
        pair
    }

    fn owner(&self, at: SocketAddr) -> Option<usize> {
        (0..2).find(|host| self.hosts[*host].public.unwrap_or(self.hosts[*host].address) == at)
    }

    fn fly(&mut self, flying: Flying) {
        let copies = 1 + u64::from(self.dice.percent(self.weather.repeat));
        let mut flying = Some(flying);
        for copy in 0..copies {
            if self.dice.percent(self.weather.loss) {
                continue;
            }
            let (least, most) = self.weather.delay;
            let delay = least + self.dice.below(most - least + 1);
            self.ordinal += 1;
            let at = (self.now + Duration::from_millis(delay), self.ordinal);
            let it = if copy + 1 == copies { flying.take() } else { flying.as_ref().map(Flying::again) };
            if let Some(it) = it {
                self.queue.insert(at, it);
            }
        }
    }

    /// Takes out what the endpoints have to send and to tell.
    pub fn drain(&mut self) {
        for host in 0..2 {
            while let Some(transmit) = self.hosts[host].endpoint.poll_transmit() {
                let it = &mut self.hosts[host];
                if transmit.path.local != it.address {
                    continue;
                }
                if transmit.bytes == [0xff] {
                    it.keepalives += 1;
                }
                it.datagrams += 1;
                it.largest = it.largest.max(transmit.bytes.len());
                if self.filter.as_mut().is_some_and(|filter| filter(host, &transmit.bytes)) {
                    continue;
                }
                let from = self.hosts[host].public.unwrap_or(self.hosts[host].address);
                self.fly(Flying { from, to: transmit.path.remote, load: Load::Ike(transmit.bytes) });
            }
            let begun = self.begun;
            let now = self.now;
            while let Some(event) = self.hosts[host].endpoint.poll_event() {
                self.hosts[host].take(event, now - begun);
            }
        }
    }

    /// When something happens next.
    pub fn next_at(&self) -> Option<Instant> {
        let timeouts = self.hosts.iter().filter_map(|it| it.endpoint.poll_timeout());
        timeouts.chain(self.queue.keys().next().map(|(at, _)| *at)).min()
    }

    /// One thing that happens, if any does before `until`.
    pub fn step(&mut self, until: Instant) -> bool {
        let Some(at) = self.next_at().filter(|at| *at <= until) else {
            self.now = self.now.max(until);
            return false;
        };
        if at > self.now {
            self.steps = 0;
        }
        self.steps += 1;
        assert!(self.steps < 10_000, "time stands still; {}", self.story());
        self.now = self.now.max(at);
        if let Some(entry) = self.queue.first_entry().filter(|entry| entry.key().0 <= self.now) {
            let flying = entry.remove();
            self.deliver(flying);
        } else {
            for host in 0..2 {
                if self.hosts[host].endpoint.poll_timeout().is_some_and(|at| at <= self.now) {
                    self.hosts[host].endpoint.handle_timeout(self.now);
                }
            }
        }
        self.drain();
        true
    }

    fn deliver(&mut self, flying: Flying) {
        let Some(to) = self.owner(flying.to) else { return };
        let now = self.now;
        match flying.load {
            Load::Ike(bytes) => {
                let path = Path { local: self.hosts[to].address, remote: flying.from };
                self.hosts[to].endpoint.handle_datagram(&bytes, path, now);
            }
            Load::Esp { from, spi, key } => {
                let it = &mut self.hosts[to];
                if let Some(sa) = it.inbound.get(&spi)
                    && sa.key.key.expose() == key
                    && from != to
                {
                    it.received += 1;
                    let used = it.used.entry(spi).or_default();
                    used.packets_in += 1;
                    used.bytes_in += 1000;
                    let used = *used;
                    it.endpoint.child_used(PEER, spi, used, now);
                } else {
                    it.lost += 1;
                }
            }
        }
    }

    /// Lets time pass.
    pub fn run(&mut self, time: Duration) {
        let until = self.now + time;
        while self.step(until) {}
    }

    /// Time passes at once, as for a host that was suspended: all timers are overdue.
    pub fn jump(&mut self, time: Duration) {
        self.now += time;
        self.drain();
    }

    /// Sends one packet from a host on each of its children, as the packet path would.
    pub fn send_packets(&mut self, host: usize) {
        let all: Vec<ChildSa> = self.hosts[host].outbound.values().cloned().collect();
        let from = self.hosts[host].public.unwrap_or(self.hosts[host].address);
        for sa in all {
            let load = Load::Esp { from: host, spi: sa.spi, key: sa.key.key.expose().to_vec() };
            self.fly(Flying { from, to: sa.path.remote, load });
        }
    }

    /// Lets time pass with a packet each way every `gap`.
    pub fn run_with_traffic(&mut self, time: Duration, gap: Duration) {
        let until = self.now + time;
        while self.now < until {
            self.send_packets(0);
            self.send_packets(1);
            self.run(gap.min(until - self.now));
        }
    }

    /// A host loses all that it knew, and begins anew.
    pub fn restart(&mut self, host: usize, children: &[u64]) {
        let seed = self.dice.next();
        let config = self.hosts[host].config.clone();
        let (address, public) = (self.hosts[host].address, self.hosts[host].public);
        let mut fresh = Host::new(host, config, seed, self.now);
        fresh.address = address;
        fresh.public = public;
        fresh.log = std::mem::take(&mut self.hosts[host].log);
        fresh.log.push(format!("{:?} restarted", self.now - self.begun));
        let mut addresses = [self::address(0), self::address(1)];
        addresses[host] = address;
        addresses[1 - host] = self.hosts[1 - host].public.unwrap_or(self.hosts[1 - host].address);
        fresh.endpoint.add_peer(PEER, peer_config(host, addresses, children), self.now);
        self.hosts[host] = fresh;
        self.drain();
    }

    pub fn act(&mut self, host: usize, act: impl FnOnce(&mut Endpoint, Instant)) {
        act(&mut self.hosts[host].endpoint, self.now);
        self.drain();
    }

    pub fn up(&mut self) {
        self.run(Duration::from_secs(3));
        self.expect_settled(&[1]);
    }

    /// Whether both sides have exactly one IKE SA, the same, and on it exactly the wanted children; if not, why.
    pub fn settled(&self, children: &[u64]) -> Result<(), String> {
        let views = [0, 1].map(|host| self.hosts[host].endpoint.sas(PEER));
        for (host, sas) in views.iter().enumerate() {
            let it = &self.hosts[host];
            if !it.up || !matches!(it.endpoint.status(PEER), Some(Status::Up { .. })) {
                return Err(format!("host {host} is not up: {:?}", it.endpoint.status(PEER)));
            }
            if sas.len() != 1 || !sas[0].up {
                return Err(format!("host {host} has {} IKE SAs", sas.len()));
            }
            if sas[0].children.iter().any(|it| !it.up) || sas[0].children.len() != children.len() {
                return Err(format!("host {host} has other children"));
            }
            if it.inbound.len() != children.len() || it.outbound.len() != children.len() {
                let (inbound, outbound) = (it.inbound.keys(), it.outbound.keys());
                return Err(format!("host {host} has the packet path {inbound:?} {outbound:?}"));
            }
            for id in children {
                let slot = Slot { child: ChildId(id * 100), worker: None };
                let Some(out) = it.outbound.get(&slot) else {
                    return Err(format!("host {host} lacks child {id}"));
                };
                let Some(into) = self.hosts[1 - host].inbound.get(&out.spi) else {
                    return Err(format!("host {host} sends on {:?}, where nobody listens", out.spi));
                };
                if into.key != out.key
                    || into.local != out.remote
                    || into.label != out.label
                    || into.suite != out.suite
                {
                    return Err(format!("the two sides of {:?} differ", out.spi));
                }
                let back = &self.hosts[1 - host].outbound[&slot];
                if back.key == out.key || back.spi == out.spi {
                    return Err("both directions have one key".into());
                }
                if out.path != sas[0].path {
                    return Err(format!(
                        "host {host} sends to {:?}, the peer is at {:?}",
                        out.path, sas[0].path
                    ));
                }
            }
        }
        if views[0][0].spis != views[1][0].spis || views[0][0].suite != views[1][0].suite {
            return Err("the two have different IKE SAs".into());
        }
        Ok(())
    }

    pub fn expect_settled(&self, children: &[u64]) {
        if let Err(why) = self.settled(children) {
            panic!("{why}\n{}", self.story());
        }
    }

    /// What happened so far.
    pub fn story(&self) -> String {
        let tell = |host: usize| {
            let log = &self.hosts[host].log;
            let sas = self.hosts[host].endpoint.sas(PEER);
            let sas = sas.iter().map(|it| {
                let children = it.children.iter().map(|it| (it.slot.child.0, it.inbound.0, it.up));
                format!(
                    "{}-{} up: {} {:?}",
                    it.spis.initiator,
                    it.spis.responder,
                    it.up,
                    children.collect::<Vec<_>>()
                )
            });
            let lines = log[log.len().saturating_sub(60)..].iter().cloned().chain(sas);
            lines.collect::<Vec<_>>().join("\n  ")
        };
        format!("at {:?}\nhost 0:\n  {}\nhost 1:\n  {}", self.now - self.begun, tell(0), tell(1))
    }

    /// The inbound SPIs in use.
    pub fn spis(&self, host: usize) -> BTreeSet<EspSpi> {
        self.hosts[host].inbound.keys().copied().collect()
    }

    pub fn ike_spis(&self) -> ike::wire::IkeSpis {
        self.hosts[0].endpoint.sas(PEER).iter().find(|it| it.up).unwrap().spis
    }
}

impl Flying {
    fn again(&self) -> Self {
        let load = match &self.load {
            Load::Ike(bytes) => Load::Ike(bytes.clone()),
            Load::Esp { from, spi, key } => Load::Esp { from: *from, spi: *spi, key: key.clone() },
        };
        Self { from: self.from, to: self.to, load }
    }
}

impl Host {
    fn new(host: usize, config: Config, seed: u64, now: Instant) -> Self {
        let mut bytes = [host as u8; 32];
        bytes[..8].copy_from_slice(&seed.to_be_bytes());
        Self {
            endpoint: Endpoint::new(config.clone(), &bytes, now, 1_800_000_000),
            config,
            address: address(host),
            public: None,
            inbound: BTreeMap::new(),
            outbound: BTreeMap::new(),
            used: BTreeMap::new(),
            log: Vec::new(),
            failures: Vec::new(),
            up: false,
            downs: 0,
            moves: 0,
            lost: 0,
            received: 0,
            keepalives: 0,
            datagrams: 0,
            largest: 0,
            made: 0,
        }
    }

    fn take(&mut self, event: Event, at: Duration) {
        match event {
            Event::PeerUp { path, .. } => {
                assert!(!self.up, "up twice");
                self.up = true;
                self.log.push(format!("{at:?} up, {}", path.remote));
            }
            Event::PeerDown { why, .. } => {
                assert!(self.up, "down twice");
                self.up = false;
                self.downs += 1;
                self.log.push(format!("{at:?} down: {why}"));
                self.failures.push(why);
            }
            Event::PeerFailed { why, .. } => {
                self.log.push(format!("{at:?} failed: {why}"));
                self.failures.push(why);
            }
            Event::PeerMoved { path, .. } => {
                self.moves += 1;
                self.log.push(format!("{at:?} peer moved to {}", path.remote));
                for sa in self.inbound.values_mut().chain(self.outbound.values_mut()) {
                    sa.path = path;
                }
            }
            Event::ChildInbound(sa) => {
                self.made += 1;
                self.log.push(format!("{at:?} receive on {:?} for {:?}", sa.spi, sa.slot.child));
                assert!(self.inbound.insert(sa.spi, sa).is_none(), "an SPI twice");
            }
            Event::ChildOutbound(sa) => {
                self.log.push(format!("{at:?} send on {:?} of {:?}", sa.spi, sa.slot.child));
                assert!(self.inbound.contains_key(&sa.inbound), "send before receive");
                self.outbound.insert(sa.slot, sa);
            }
            Event::ChildDeleted { slot, inbound, outbound, why, .. } => {
                self.log.push(format!("{at:?} deleted {inbound:?}/{outbound:?} of {:?}: {why}", slot.child));
                assert!(self.inbound.remove(&inbound).is_some(), "deleted what is not there");
                if self.outbound.get(&slot).is_some_and(|sa| sa.inbound == inbound) {
                    self.outbound.remove(&slot);
                }
            }
            Event::Refused { path, why } => {
                self.log.push(format!("{at:?} refused {}: {why}", path.remote));
                self.failures.push(why);
            }
            Event::ChildFailed { child, why, .. } => {
                self.log.push(format!("{at:?} child {child:?} failed: {why}"));
                self.failures.push(why);
            }
        }
    }
}
