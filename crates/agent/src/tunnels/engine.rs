//! The thread of the tunnels: waits for what happens and for its deadlines, and keeps IKE, packet path and probes going.
//!
//! Besides IKE's own deadlines there is one: a look at everything, each second, and more often while something is to be
//! found out.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant, SystemTime};

use ike::{Endpoint, PeerId, Timing};
use ipnet::IpNet;
use model::api::{ApiError, ErrorCode};
use model::{NetworkId, UnixMillis};
use plan::Far;
use tokio::sync::watch;

use super::devices::Devices;
use super::events::ike_path;
use super::mtu::Search;
use super::peer::Peer;
use super::probe::{self, Probes};
use super::wanted::Own;
use super::{Captures, Command, Input, Settings, metrics, network_name, unknown};
use crate::dataplane::{Dataplane, PeerIndex, Signal};
use crate::view::{Router, View};

/// Between two looks while all is quiet.
const LOOK: Duration = Duration::from_secs(1);
/// And while something is to be found out, or a key's bytes are soon used up.
const LOOK_CLOSELY: Duration = Duration::from_millis(100);
/// Inputs that are taken before IKE's deadlines are looked at again.
const BURST: usize = 256;
/// How often paths to peers that are not up are looked at again: routes come and go.
const PATHS: Duration = Duration::from_secs(5);
/// Paths in use that are looked at each time, at least: the address of ours that one leaves from may be gone.
pub(super) const PATHS_EACH: usize = 8;
/// After so many looks all were looked at.
pub(super) const PATHS_LOOKS: usize = 30;
/// What is known of the largest packet is tried again once in so many pings, every half minute where there are few peers, and
/// every minute at least.
const MTU_EVERY: u32 = 15;
const MTU_AT_LEAST: Duration = Duration::from_mins(1);
/// For how long after its start the agent does not wait for peers to begin: they may have had tunnels with it.
const BEGINNING: Duration = Duration::from_secs(10);
/// How long saying farewell may take.
const FAREWELL: Duration = Duration::from_millis(300);

/// All that is known of tunnels.
pub(super) struct Engine {
    pub(super) own: Own,
    pub(super) settings: Settings,
    pub(super) timing: Timing,
    pub(super) endpoint: Endpoint,
    pub(super) dataplane: Dataplane,
    inbox: Receiver<Input>,
    pub(super) views: watch::Receiver<Arc<View>>,
    pub(super) view: Arc<View>,
    /// The view for which it was found out who can be probed.
    ends_of: Arc<View>,
    pub(super) peers: BTreeMap<Far, Peer>,
    pub(super) by_number: BTreeMap<u64, Far>,
    pub(super) last_number: u64,
    pub(super) last_child: u64,
    pub(super) devices: Devices,
    /// All devices of the view are open.
    pub(super) devices_open: bool,
    /// Which peer each destination of a network goes to.
    pub(super) routes: BTreeMap<NetworkId, Vec<(IpNet, PeerIndex)>>,
    pub(super) port_500: Port500,
    pub(super) clock: Clock,
    begun: Instant,
    look_at: Instant,
    paths_at: Instant,
    /// The peers whose paths were looked at so far, over and over.
    pub(super) checked: usize,
    last_ping: u32,
    pub(super) refused: Damped,
    /// Associations to send on that the peer does not know yet, and when it does.
    pub(super) held: Vec<(Instant, ike::ChildSa)>,
}

/// IKE's own port, which foreign peers begin at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Port500 {
    /// There are no foreign peers.
    Closed,
    Open,
    /// It cannot be had, and why.
    Refused(String),
}

/// The time of day at a moment of the steady clock.
pub(super) struct Clock {
    at: Instant,
    unix: Duration,
}

/// Something that strangers can cause and that is logged once a second at most.
pub(super) struct Damped {
    quiet_until: Instant,
    unsaid: u64,
}

impl Engine {
    pub(super) fn new(
        own: Own,
        settings: Settings,
        dataplane: Dataplane,
        inbox: Receiver<Input>,
        views: watch::Receiver<Arc<View>>,
    ) -> Self {
        let now = Instant::now();
        let clock = Clock::new(now);
        let timing = settings.timing();
        let workers = u32::try_from(dataplane.workers()).unwrap_or(1);
        let config =
            ike::Config { port: settings.port, timing: timing.clone(), workers, ..ike::Config::default() };
        let endpoint = Endpoint::new(config, &crate::random(), now, clock.unix.as_secs());
        // Whatever is in the view is still to be taken in.
        let view = Arc::new(View { tunnels: Arc::default(), ..View::clone(&views.borrow()) });
        Self {
            own,
            settings,
            timing,
            endpoint,
            dataplane,
            inbox,
            views,
            ends_of: view.clone(),
            view,
            peers: BTreeMap::new(),
            by_number: BTreeMap::new(),
            last_number: 0,
            last_child: 0,
            devices: Devices::default(),
            devices_open: true,
            routes: BTreeMap::new(),
            port_500: Port500::Closed,
            clock,
            begun: now,
            look_at: now,
            paths_at: now + PATHS,
            checked: 0,
            last_ping: u32::from_be_bytes(crate::random()),
            refused: Damped { quiet_until: now, unsaid: 0 },
            held: Vec::new(),
        }
    }

    /// Runs until told to stop, or nobody is left who could.
    pub(super) fn run(mut self) {
        self.apply(Instant::now());
        loop {
            let now = Instant::now();
            if self.endpoint.poll_timeout().is_some_and(|at| at <= now) {
                self.endpoint.handle_timeout(now);
                self.drain(now);
            }
            self.release(now);
            if self.look_at <= now {
                self.look(now);
            }
            let held = self.held.iter().map(|(at, _)| *at);
            let next = self.endpoint.poll_timeout().into_iter().chain([self.look_at]).chain(held).min();
            let wait = next.unwrap_or(self.look_at).saturating_duration_since(Instant::now());
            let mut input = match self.inbox.recv_timeout(wait) {
                Ok(input) => Some(input),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return self.farewell(),
            };
            for _ in 0..BURST {
                match input.take() {
                    None => break,
                    Some(Input::Stop) => return self.farewell(),
                    Some(input) => self.handle(input, Instant::now()),
                }
                input = self.inbox.try_recv().ok();
            }
        }
    }

    fn handle(&mut self, input: Input, now: Instant) {
        match input {
            Input::View => self.apply(now),
            Input::Addresses => self.follow_addresses(now),
            Input::Certified(own) => self.certified(*own, now),
            Input::Signal(signal) => self.signal(signal, now),
            Input::Command(command) => self.command(command, now),
            Input::CaptureEnded(peer) => {
                if let Some(peer) = self.peer(PeerId(peer)) {
                    peer.captured = false;
                    let index = peer.index();
                    self.dataplane.set_capture(index, None);
                }
            }
            Input::Stop => {}
        }
        self.drain(now);
    }

    fn signal(&mut self, signal: Signal, now: Instant) {
        match signal {
            Signal::Ike { path, payload } => self.endpoint.handle_datagram(&payload, ike_path(path), now),
            Signal::Waiting { peer, .. } => self.endpoint.poke(PeerId(peer.0), now),
            Signal::Moved { peer, inbound, path } => {
                let inbound = ike::wire::EspSpi(inbound.get());
                self.endpoint.child_moved(PeerId(peer.0), inbound, ike_path(path), now);
            }
            // Perhaps a peer that does not know yet that we began anew.
            Signal::UnknownSpi { path } => {
                let there = |peer: &&Peer| peer.paths.iter().any(|it| it.remote.ip() == path.remote.ip());
                for peer in self.peers.values().filter(there) {
                    self.endpoint.poke(peer.id(), now);
                }
            }
            Signal::Answer { peer, device, packet } => {
                let Some(number) = probe::number_of(&packet, &self.dataplane.probe_magic()) else { return };
                let Some(peer) = self.peer(PeerId(peer.0)) else { return };
                let probes = peer.slots.values_mut().find(|slot| slot.device == device);
                let probes = probes.and_then(|slot| slot.probes.as_mut());
                if probes.is_some_and(|probes| probes.answered(number, now))
                    || peer.search.as_mut().is_some_and(|search| search.answered(number))
                {
                    peer.last_seen = Some(now);
                }
            }
            Signal::TooBig { peer, path_mtu } => {
                let id = PeerId(peer.0);
                let v6 = match self.endpoint.status(id) {
                    Some(ike::Status::Up { path, .. }) => path.remote.is_ipv6(),
                    Some(_) | None => return,
                };
                let inner = model::esp_mtu(path_mtu, v6).unwrap_or(model::MTU_MIN);
                if let Some(search) = self.peer(id).and_then(|peer| peer.search.as_mut()) {
                    search.too_big(inner, now);
                }
                self.look_soon(now);
            }
        }
    }

    // ---- what people ask ----

    fn command(&mut self, command: Command, now: Instant) {
        // Whoever asked may have gone away; then there is nobody to answer.
        match command {
            Command::List { reply } => {
                let all = self.statuses(now).into_iter().map(|(status, _)| status).collect();
                drop(reply.send(Ok(all)));
            }
            Command::Metrics { reply } => {
                let text = metrics::text(&self.statuses(now), &self.dataplane.total_drops());
                drop(reply.send(Ok(text)));
            }
            Command::Rekey { peer, who, reply } => drop(reply.send(self.rekey(&peer, &who, now))),
            Command::Reset { peer, who, reply } => drop(reply.send(self.reset(&peer, &who, now))),
            Command::Capture { peer, who, tap, reply } => {
                let outcome = self.find(&peer).and_then(|far| {
                    let networks = self.names();
                    let Some(peer) = self.peers.get_mut(&far) else { return Err(unknown(far.as_str(), &[])) };
                    if peer.captured {
                        let message = format!("somebody captures the tunnel to {} already", peer.tunnel.name);
                        return Err(ApiError::new(ErrorCode::Conflict, message));
                    }
                    peer.captured = true;
                    tracing::warn!(peer = %peer.tunnel.name, who, "inner packets are being captured");
                    self.dataplane.set_capture(peer.index(), Some(tap));
                    Ok(Captures { peer: peer.number, networks })
                });
                drop(reply.send(outcome));
            }
        }
    }

    fn rekey(&mut self, name: &str, who: &str, now: Instant) -> Result<(), ApiError> {
        let far = self.find(name)?;
        let id = self.peers.get(&far).map(Peer::id).ok_or_else(|| unknown(name, &[]))?;
        if !matches!(self.endpoint.status(id), Some(ike::Status::Up { .. })) {
            let message = format!(
                "the tunnel to {name} is not up, so it has no keys to change; see `droveway tunnel ls`"
            );
            return Err(ApiError::new(ErrorCode::Conflict, message));
        }
        tracing::info!(peer = name, who, "new keys were asked for");
        self.endpoint.rekey_children(id, now);
        self.endpoint.rekey_ike(id, now);
        Ok(())
    }

    fn reset(&mut self, name: &str, who: &str, now: Instant) -> Result<(), ApiError> {
        let far = self.find(name)?;
        let id = self.peers.get(&far).map(Peer::id).ok_or_else(|| unknown(name, &[]))?;
        tracing::info!(peer = name, who, "the tunnel is made anew, as asked");
        self.endpoint.reset(id, now);
        self.drain(now);
        self.endpoint.poke(id, now);
        Ok(())
    }

    /// Whose name or id it is.
    fn find(&self, name: &str) -> Result<Far, ApiError> {
        let fits = |(far, peer): &(&Far, &Peer)| far.as_str() == name || peer.tunnel.name.as_str() == name;
        let found = self.peers.iter().find(fits).map(|(far, _)| far.clone());
        found.ok_or_else(|| {
            let names: Vec<String> = self.peers.values().map(|peer| peer.tunnel.name.to_string()).collect();
            unknown(name, &names)
        })
    }

    /// The networks of devices.
    fn names(&self) -> Vec<(crate::dataplane::DeviceIndex, String)> {
        let slots = self.peers.values().flat_map(|peer| &peer.slots);
        slots.map(|(network, slot)| (slot.device, network_name(&self.view, network))).collect()
    }

    // ---- the look at everything ----

    /// Does not wait a second for the next look.
    pub(super) fn look_soon(&mut self, now: Instant) {
        self.look_at = self.look_at.min(now);
    }

    pub(super) fn begun_lately(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.begun) < BEGINNING
    }

    fn look(&mut self, now: Instant) {
        self.clock = Clock::new(now);
        self.endpoint.set_wall_clock(self.clock.unix.as_secs(), now);
        if !self.devices_open {
            self.apply(now);
        }
        if !Arc::ptr_eq(&self.ends_of, &self.view) {
            self.ends_of = self.view.clone();
            self.find_ends(now);
        }
        if self.have_moved() {
            self.follow_addresses(now);
        } else if self.paths_at <= now {
            self.paths_at = now + PATHS;
            self.find_paths(now);
        }
        let mut closely = !self.devices_open;
        let every = probe::every(self.peers.len());
        for (far, peer) in &mut self.peers {
            let foreign = matches!(far, Far::Peer(_));
            closely |= count(peer, &mut self.endpoint, self.timing.child_bytes, now);
            take_note(peer, &self.endpoint, now);
            let last = &mut self.last_ping;
            closely |= ping((peer, foreign), every, &mut self.endpoint, &self.dataplane, last, now);
            let mtus = &self.view.routers;
            closely |= measure(peer, &self.dataplane, mtus, every, &mut self.last_ping, now);
        }
        self.look_at = now + if closely { LOOK_CLOSELY } else { LOOK };
        self.drain(now);
    }

    /// Tells all peers that their SAs end, and waits for them a moment.
    fn farewell(&mut self) {
        let now = Instant::now();
        let peers: Vec<PeerId> = self.peers.values().map(Peer::id).collect();
        for peer in &peers {
            self.endpoint.remove_peer(*peer, now);
        }
        self.drain(now);
        let until = now + FAREWELL;
        while peers.iter().any(|peer| !self.endpoint.sas(*peer).is_empty()) {
            let left = until.saturating_duration_since(Instant::now());
            match self.inbox.recv_timeout(left) {
                Ok(Input::Signal(Signal::Ike { path, payload })) => {
                    let now = Instant::now();
                    self.endpoint.handle_datagram(&payload, ike_path(path), now);
                    self.drain(now);
                }
                Ok(
                    Input::View
                    | Input::Addresses
                    | Input::Certified(_)
                    | Input::Signal(_)
                    | Input::Command(_)
                    | Input::CaptureEnded(_)
                    | Input::Stop,
                ) => {}
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return,
            }
        }
    }
}

/// Tells IKE what went over the children. True: a key's bytes are used up soon, look closely.
fn count(peer: &mut Peer, endpoint: &mut Endpoint, bytes: u64, now: Instant) -> bool {
    let id = peer.id();
    let mut soon = false;
    let mut rekey = false;
    for (spi, child) in &mut peer.children {
        let used = child.used();
        if used != child.told {
            let grown = |a: u64, b: u64| a.saturating_sub(b);
            let most =
                grown(used.bytes_in, child.told.bytes_in).max(grown(used.bytes_out, child.told.bytes_out));
            soon |= most > bytes / 20;
            child.told = used;
            endpoint.child_used(id, *spi, used, now);
        }
        // The numbers of packets that can be sealed come to their end, whatever IKE's own limits are.
        rekey |= child.outbound.as_ref().is_some_and(|sa| sa.wants_rekey());
    }
    if rekey {
        endpoint.rekey_children(id, now);
    }
    soon
}

/// What IKE knows of the peer now.
fn take_note(peer: &mut Peer, endpoint: &Endpoint, now: Instant) {
    let all = endpoint.sas(peer.id());
    peer.last_seen = all.iter().filter(|sa| sa.up).map(|sa| sa.heard).chain(peer.last_seen).max();
    peer.ikes.retain(|spis, _| all.iter().any(|sa| sa.spis == *spis));
    for sa in all.iter().filter(|sa| sa.up) {
        peer.ikes.entry(sa.spis).or_insert_with(|| {
            peer.handshakes += 1;
            now
        });
    }
}

/// Pings what is due, and acts on what is not answered; a foreign peer is not pinged, but asked by IKE. True: something is not well, look closely.
fn ping(
    (peer, foreign): (&mut Peer, bool),
    every: Duration,
    endpoint: &mut Endpoint,
    dataplane: &Dataplane,
    last: &mut u32,
    now: Instant,
) -> bool {
    let (id, index) = (peer.id(), peer.index());
    let magic = dataplane.probe_magic();
    let mut closely = false;
    let mut reset = false;
    for slot in peer.slots.values_mut() {
        let (Some((ours, theirs)), Some(probes)) = (slot.ends, &mut slot.probes) else { continue };
        let due = probes.due(every, now);
        if due.ping {
            *last = last.wrapping_add(1);
            dataplane.inject(index, slot.device, &probe::ping(ours, theirs, &magic, *last, 0));
            probes.sent(*last, now);
        }
        if due.doubt {
            endpoint.doubt(id, now);
        }
        reset |= due.reset;
        closely |= !probes.alive();
    }
    if foreign {
        let heard = endpoint.sas(id).iter().filter(|sa| sa.up).map(|sa| sa.heard).max();
        let due = peer.quiet.due(peer.used().packets_out, heard, now);
        if due.doubt {
            endpoint.doubt(id, now);
        }
        reset |= due.reset;
    }
    let silent = peer.silent();
    if silent.is_some() != peer.told_silent {
        peer.told_silent = silent.is_some();
        let peer = &peer.tunnel.name;
        match silent {
            Some(_) => tracing::warn!(%peer, "keys are agreed, but nothing passes"),
            None => tracing::info!(%peer, "it is no longer so that nothing passes"),
        }
    }
    if reset {
        tracing::warn!(peer = %peer.tunnel.name, "nothing passes any more: the tunnel is made anew");
        endpoint.reset(id, now);
        endpoint.poke(id, now);
    }
    closely
}

/// Finds out how large packets may be. True: the next try is due soon.
fn measure(
    peer: &mut Peer,
    dataplane: &Dataplane,
    routers: &BTreeMap<NetworkId, Router>,
    every: Duration,
    last: &mut u32,
    now: Instant,
) -> bool {
    let index = peer.index();
    let alive = peer.slots.iter().find(|(_, slot)| slot.probes.as_ref().is_some_and(Probes::alive));
    let Some((network, slot)) = alive else { return false };
    let (Some((ours, theirs)), Some(router)) = (slot.ends, routers.get(network)) else { return false };
    let search = match &mut peer.search {
        Some(search) if search.wanted() == router.mtu => search,
        other => other.insert(Search::new(router.mtu, now)),
    };
    if let Some(size) = search.due((every * MTU_EVERY).min(MTU_AT_LEAST), now) {
        *last = last.wrapping_add(1);
        let packet = probe::ping(ours, theirs, &dataplane.probe_magic(), *last, size as usize);
        search.sent(*last, now);
        dataplane.inject(index, slot.device, &packet);
    }
    if search.limit() != peer.limit {
        peer.limit = search.limit();
        dataplane.set_mtu(index, peer.limit);
        tracing::info!(peer = %peer.tunnel.name, limit = ?peer.limit, "the largest inner packet is another");
    }
    if search.black_hole() != peer.told_black_hole {
        peer.told_black_hole = search.black_hole();
        if peer.told_black_hole {
            let known = search.known().unwrap_or_default();
            tracing::warn!(
                peer = %peer.tunnel.name,
                "packets of more than {known} bytes vanish on the way without a word: something there has a smaller MTU, \
                 or filters ICMP; senders are told to stay below"
            );
        }
    }
    search.busy()
}

impl Clock {
    pub(super) fn new(at: Instant) -> Self {
        let unix = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        Self { at, unix }
    }

    /// The time of day at that moment, in milliseconds.
    pub(super) fn millis(&self, at: Instant) -> UnixMillis {
        let unix = if at >= self.at {
            self.unix.saturating_add(at - self.at)
        } else {
            self.unix.saturating_sub(self.at - at)
        };
        u64::try_from(unix.as_millis()).unwrap_or(u64::MAX)
    }
}

impl Damped {
    /// Tells it, unless it was told within the last second.
    pub(super) fn tell(&mut self, now: Instant, tell: impl FnOnce()) {
        if now < self.quiet_until {
            self.unsaid += 1;
            return;
        }
        if self.unsaid > 0 {
            tracing::warn!("{} more of the same were not told", self.unsaid);
        }
        self.unsaid = 0;
        self.quiet_until = now + Duration::from_secs(1);
        tell();
    }
}
