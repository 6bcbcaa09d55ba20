//! All IKE SAs of one host: the door of this room.
//!
//! Drain [`Endpoint::poll_transmit`] and [`Endpoint::poll_event`] after each call that changes something, and call
//! [`Endpoint::handle_timeout`] when [`Endpoint::poll_timeout`] says so.
//!
//! Invariant: for each peer at most one IKE SA has children to be made on it ([`peers`] chooses which), and the
//! owner is told of one SA to send on for each slot at any time.

mod effects;
#[cfg(any(test, feature = "fuzzing"))]
mod forge;
mod peers;
mod strangers;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::auth::UnixSeconds;
use crate::config::{ChildConfig, Config, PeerConfig, PeerId, Timing};
use crate::error::{Error, Misbehaved};
use crate::event::{ChildUse, Event, Failure, Path, Slot, Status, Transmit};
use crate::proposal::{EspSuite, IkeSuite};
use crate::random::Seeded;
use crate::sa::{self, CreateChild, Cx, Phase, Sa, Shared, Stage, Task};
use crate::wire::{
    Datagram, EspSpi, ExchangeType, Flags, HEADER_LEN, Header, IkeSpi, IkeSpis, Message, NON_ESP_MARKER,
    Notify, NotifyType, Payload,
};
use peers::Peer;
use strangers::{Strangers, Verdict};

/// Something with a timeout of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Timer {
    Sa(IkeSpi),
    Peer(PeerId),
}

/// All IKE SAs of one host.
pub struct Endpoint {
    config: Config,
    configs: BTreeMap<PeerId, Arc<PeerConfig>>,
    peers: BTreeMap<PeerId, Peer>,
    /// By our SPI.
    sas: BTreeMap<IkeSpi, Box<Sa>>,
    /// Half-open SAs by where their first request came from, and its SPI: to know it when it comes again.
    opened: BTreeMap<(SocketAddr, IkeSpi), IkeSpi>,
    strangers: Strangers,
    shared: Shared,
    clock: (Instant, UnixSeconds),
    timers: BTreeSet<(Instant, Timer)>,
    armed: BTreeMap<Timer, Instant>,
    touched: BTreeSet<Timer>,
}

/// An IKE SA, to be shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SaView {
    /// Both SPIs.
    pub spis: IkeSpis,
    /// Whether we began it.
    pub initiator: bool,
    /// Whether children can be made on it; if not, it is on its way in or out.
    pub up: bool,
    /// Where the peer is.
    pub path: Path,
    /// Whether a NAT is before us, and before the peer.
    pub nat: (bool, bool),
    /// Its suite, once agreed.
    pub suite: Option<IkeSuite>,
    /// When the peer last sent something on it, or on one of its children, that only the peer can send.
    pub heard: Instant,
    /// Its children.
    pub children: Vec<ChildView>,
}

/// A CHILD_SA, to be shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChildView {
    /// What it serves.
    pub slot: Slot,
    /// The SPI that we receive on.
    pub inbound: EspSpi,
    /// The SPI that we send on.
    pub outbound: EspSpi,
    /// Its suite.
    pub suite: EspSuite,
    /// Whether it is in full use; if not, it is on its way in or out.
    pub up: bool,
}

impl Endpoint {
    /// An endpoint without peers. All that must be unpredictable comes from `seed`, which must be so itself; `unix`
    /// is the time of day at `now`, in seconds, for certificates.
    pub fn new(config: Config, seed: &[u8; 32], now: Instant, unix: UnixSeconds) -> Self {
        let mut random = Seeded::new(seed);
        let strangers = Strangers::new(&mut random, now);
        let workers = config.workers;
        Self {
            config,
            configs: BTreeMap::new(),
            peers: BTreeMap::new(),
            sas: BTreeMap::new(),
            opened: BTreeMap::new(),
            strangers,
            shared: Shared::new(random, workers),
            clock: (now, unix),
            timers: BTreeSet::new(),
            armed: BTreeMap::new(),
            touched: BTreeSet::new(),
        }
    }

    /// The time of day has been set anew.
    pub fn set_wall_clock(&mut self, unix: UnixSeconds, now: Instant) {
        self.clock = (now, unix);
    }

    /// Sets how long everything may take. What is under way keeps its times.
    pub fn set_timing(&mut self, timing: Timing) {
        self.config.timing = timing;
    }

    /// Adds a peer, or changes what is known of it. An SA that is up stays up: where the peer's key has changed,
    /// [`Self::reset`] it.
    pub fn add_peer(&mut self, peer: PeerId, config: PeerConfig, now: Instant) {
        self.configs.insert(peer, Arc::new(config));
        self.peers.entry(peer).or_insert_with(|| Peer::new(now));
        // Perhaps it heard of us before we heard of it, and has asked already.
        for spi in self.opened.values().copied().collect::<Vec<_>>() {
            self.with_sa(spi, now, Sa::answer_early);
        }
        self.touch(Timer::Peer(peer));
        self.settle(now);
    }

    /// Forgets a peer; its SAs are closed and it is told.
    pub fn remove_peer(&mut self, peer: PeerId, now: Instant) {
        if self.configs.remove(&peer).is_some() {
            for spi in self.sas_of(peer) {
                self.with_sa(spi, now, |sa, cx| {
                    sa.close(Failure::ClosedByUs, cx);
                    sa.begin_next(cx);
                });
            }
        }
        self.settle(now);
    }

    /// Sets which children are wanted with a peer: missing ones are made, others deleted.
    pub fn set_children(&mut self, peer: PeerId, children: Vec<ChildConfig>, now: Instant) {
        self.change(peer, now, |config| config.children = children);
    }

    /// Sets the ways to where a peer may be, and who begins. An SA that is there keeps its path.
    pub fn set_paths(&mut self, peer: PeerId, paths: Vec<Path>, initiate: crate::Initiate, now: Instant) {
        self.change(peer, now, |config| {
            config.paths = paths;
            config.initiate = initiate;
        });
    }

    /// The SAs with a peer are at another address of ours from now on; see [`Self::set_paths`] for those to come.
    pub fn set_local(&mut self, peer: PeerId, local: SocketAddr, now: Instant) {
        for spi in self.sas_of(peer) {
            self.with_sa(spi, now, |sa, cx| sa.set_local(local, cx));
        }
        self.settle(now);
    }

    /// The SAs with a peer take another path from now on, because the one they have does not exist any more.
    pub fn set_path(&mut self, peer: PeerId, path: Path, now: Instant) {
        for spi in self.sas_of(peer) {
            self.with_sa(spi, now, |sa, cx| sa.take_path(path, cx));
        }
        self.settle(now);
    }

    /// Traffic to this peer gets no answer: asks at once whether it lives and knows our SAs.
    pub fn doubt(&mut self, peer: PeerId, now: Instant) {
        for spi in self.sas_of(peer) {
            self.with_sa(spi, now, |sa, cx| {
                if sa.is_up() {
                    sa.hurry(cx);
                }
            });
        }
        self.settle(now);
    }

    /// Where peers may come from, as far as that is known: strangers who ask for answers in great number leave them theirs.
    pub fn expect(&mut self, addresses: BTreeSet<IpAddr>) {
        self.strangers.expect(addresses);
    }

    fn change(&mut self, peer: PeerId, now: Instant, how: impl FnOnce(&mut PeerConfig)) {
        if let Some(config) = self.configs.get_mut(&peer) {
            how(Arc::make_mut(config));
        }
        self.touch(Timer::Peer(peer));
        self.settle(now);
    }

    /// Traffic waits for this peer: an attempt that waits, be it for the peer to begin, begins now; one under way is
    /// hurried.
    pub fn poke(&mut self, peer: PeerId, now: Instant) {
        if let Some(state) = self.peers.get_mut(&peer) {
            state.poked(&self.config.timing, now);
        }
        for spi in self.sas_of(peer) {
            if self.sas.get(&spi).is_some_and(|sa| matches!(sa.phase, Phase::Init | Phase::Auth)) {
                self.with_sa(spi, now, Sa::hurry);
            }
        }
        self.touch(Timer::Peer(peer));
        self.settle(now);
    }

    /// Rekeys the IKE SA with a peer.
    pub fn rekey_ike(&mut self, peer: PeerId, now: Instant) {
        if let Some(spi) = self.primary(peer) {
            self.with_sa(spi, now, |sa, cx| {
                sa.rekey_now(now);
                sa.handle_timeout(cx);
            });
        }
        self.settle(now);
    }

    /// Rekeys the children with a peer.
    pub fn rekey_children(&mut self, peer: PeerId, now: Instant) {
        if let Some(spi) = self.primary(peer) {
            self.with_sa(spi, now, |sa, cx| {
                let up = sa.children.values().filter(|it| it.stage == Stage::Up);
                let up: Vec<_> = up.map(|it| (it.slot, it.inbound)).collect();
                for (slot, inbound) in up {
                    let known = |task: &Task| matches!(task, Task::Create(it) if it.rekeys == Some(inbound));
                    if !sa.all_tasks().any(known) {
                        sa.push(Task::Create(Box::new(CreateChild::rekey(slot, inbound))));
                    }
                }
                sa.begin_next(cx);
            });
        }
        self.settle(now);
    }

    /// Authenticates anew: a new IKE SA with new children first, then the old one goes.
    pub fn reauthenticate(&mut self, peer: PeerId, now: Instant) {
        if let Some(spi) = self.primary(peer) {
            self.with_sa(spi, now, |sa, _| sa.reauth_at = Some(now));
        }
        self.settle(now);
    }

    /// Closes all SAs with a peer, and begins anew.
    pub fn reset(&mut self, peer: PeerId, now: Instant) {
        for spi in self.sas_of(peer) {
            self.with_sa(spi, now, |sa, cx| {
                sa.close(Failure::ClosedByUs, cx);
                sa.begin_next(cx);
            });
        }
        self.settle(now);
    }

    /// What went over a child so far, by the SPI that we receive on. What was received shows that the peer lives and
    /// has the child; what was used may make a rekey due.
    pub fn child_used(&mut self, peer: PeerId, inbound: EspSpi, used: ChildUse, now: Instant) {
        if let Some(spi) = self.sa_with(peer, inbound) {
            self.with_sa(spi, now, |sa, cx| {
                let received = sa.children.get_mut(&inbound).is_some_and(|it| it.life.used(used, now));
                if received {
                    sa.heard(now);
                    sa.confirm(inbound);
                }
                sa.handle_timeout(cx);
            });
        }
        self.settle(now);
    }

    /// An authenticated packet of this child came by another path than the one we know.
    pub fn child_moved(&mut self, peer: PeerId, inbound: EspSpi, path: Path, now: Instant) {
        if let Some(spi) = self.sa_with(peer, inbound) {
            self.with_sa(spi, now, |sa, cx| sa.follow(path, cx));
        }
        self.settle(now);
    }

    fn sa_with(&self, peer: PeerId, inbound: EspSpi) -> Option<IkeSpi> {
        let has = |spi: &IkeSpi| self.sas.get(spi).is_some_and(|sa| sa.children.contains_key(&inbound));
        self.sas_of(peer).into_iter().find(has)
    }

    /// A UDP payload came by this path. On a port that ESP shares, IKE is what begins with the non-ESP marker; the
    /// rest is not for us.
    pub fn handle_datagram(&mut self, payload: &[u8], path: Path, now: Instant) {
        let bytes = if path.local.port() == sa::IKE_PORT {
            payload
        } else {
            match payload.strip_prefix(&NON_ESP_MARKER) {
                Some(bytes) => bytes,
                None => return,
            }
        };
        match Datagram::parse(bytes) {
            Ok(datagram) => self.dispatch(&datagram, bytes, path, now),
            Err(error) => self.refuse_version(&error, bytes, path, now),
        }
        self.settle(now);
    }

    fn dispatch(&mut self, datagram: &Datagram<'_>, bytes: &[u8], path: Path, now: Instant) {
        let header = *datagram.header();
        let ours = if header.flags.initiator { header.spis.responder } else { header.spis.initiator };
        if ours.is_zero() {
            if let Datagram::Clear(message) = datagram
                && header.exchange == ExchangeType::IkeSaInit
                && header.flags.initiator
                && !header.flags.response
                && header.message_id == 0
                && !header.spis.initiator.is_zero()
            {
                self.first_request(message, bytes, path, now);
            }
            return;
        }
        let known = self.sas.get(&ours).is_some_and(|sa| {
            // The responder's SPI is not known before its first answer.
            let theirs = if header.flags.initiator { header.spis.initiator } else { header.spis.responder };
            sa.remote_spi() == theirs || sa.phase == Phase::Init
        });
        if known {
            if self.with_sa(ours, now, |sa, cx| sa.handle(datagram, bytes, path, cx)) == Some(true) {
                self.settle(now);
                self.with_sa(ours, now, |sa, cx| sa.handle(datagram, bytes, path, cx));
            }
        } else if !header.flags.response && !matches!(datagram, Datagram::Clear(_)) {
            // It speaks of an SA that we do not have, perhaps from before we began (RFC 7296 §2.21.4).
            self.answer_in_clear(&header, Notify::status(NotifyType::InvalidIkeSpi), path, now);
        }
    }

    /// `IKE_SA_INIT` of a stranger.
    fn first_request(&mut self, message: &Message, bytes: &[u8], path: Path, now: Instant) {
        let theirs = message.header.spis.initiator;
        if let Some(spi) = self.opened.get(&(path.remote, theirs)).copied() {
            self.with_sa(spi, now, |sa, cx| sa.repeat_first(bytes, path, cx));
            return;
        }
        let nonce = message.payloads.iter().find_map(|it| match it {
            Payload::Nonce(nonce) => Some(nonce.as_bytes()),
            _ => None,
        });
        let cookie = message.payloads.iter().find_map(|it| match it {
            Payload::Notify(notify) if notify.kind == NotifyType::Cookie => Some(notify.data.as_slice()),
            _ => None,
        });
        let Some(nonce) = nonce else { return };
        let proof = (theirs.0, nonce, cookie);
        match self.strangers.judge(&self.config.limits, &mut self.shared.random, path.remote, proof, now) {
            Verdict::Proceed => {}
            Verdict::Cookie(cookie) => {
                let notify = Notify::with_data(NotifyType::Cookie, cookie);
                self.answer_in_clear(&message.header, notify, path, now);
                return;
            }
            Verdict::Drop => return,
        }
        let config =
            self.configs.values().find(|it| it.paths.iter().any(|at| at.remote.ip() == path.remote.ip()));
        let config = config.cloned();
        let mut cx = Cx {
            now,
            unix: unix(self.clock, now),
            config: &self.config,
            peers: &self.configs,
            shared: &mut self.shared,
        };
        match sa::respond_init(message, bytes, path, config.as_ref(), &mut cx) {
            Ok(sa) => {
                let spi = sa.local_spi();
                self.strangers.opened(spi.0, path.remote, &self.config.timing, now);
                self.opened.insert((path.remote, theirs), spi);
                self.sas.insert(spi, Box::new(sa));
                self.touch(Timer::Sa(spi));
            }
            Err(error) => {
                let Some(notify) = error.notify() else { return };
                // To ask for another group is no refusal.
                let refused = notify.kind != NotifyType::InvalidKePayload;
                if self.answer_in_clear(&message.header, notify, path, now) && refused {
                    self.shared.events.push_back(Event::Refused { path, why: Failure::from(&error) });
                }
            }
        }
    }

    fn refuse_version(&mut self, error: &Error, bytes: &[u8], path: Path, now: Instant) {
        // A later version, in a request: the answer says which is spoken here (RFC 7296 §2.5).
        let (Error::PeerMisbehaved(Misbehaved::MajorVersion(3..)), Some(head)) =
            (error, bytes.get(..HEADER_LEN))
        else {
            return;
        };
        let mut head = head.to_vec();
        head[17] = 0x20;
        if let Ok((header, _, _)) = Header::parse(&head)
            && !header.flags.response
        {
            self.answer_in_clear(&header, Notify::status(NotifyType::InvalidMajorVersion), path, now);
        }
    }

    /// An answer that nothing protects, never longer than what asked for it, and not more often than allowed. Says
    /// whether it was allowed.
    fn answer_in_clear(&mut self, request: &Header, notify: Notify, path: Path, now: Instant) -> bool {
        if !self.strangers.may_answer(&self.config.limits, path.remote, now) {
            return false;
        }
        let flags = Flags { initiator: !request.flags.initiator, version: false, response: true };
        let header = Header { flags, ..*request };
        if let Ok(bytes) = (Message { header, payloads: vec![Payload::Notify(notify)] }).emit_clear() {
            self.shared.send(path, &bytes);
        }
        true
    }

    /// The next datagram to send.
    pub fn poll_transmit(&mut self) -> Option<Transmit> {
        self.shared.transmits.pop_front()
    }

    /// The next thing to tell.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.shared.events.pop_front()
    }

    /// When [`Self::handle_timeout`] is to be called, at the latest.
    pub fn poll_timeout(&self) -> Option<Instant> {
        let first = self.timers.first().map(|(at, _)| *at);
        first.into_iter().chain(self.shared.gone.iter().map(|it| it.at)).min()
    }

    /// Does what is due by now.
    pub fn handle_timeout(&mut self, now: Instant) {
        self.strangers.expire(now);
        let due: Vec<Timer> =
            self.timers.iter().take_while(|(at, _)| *at <= now).map(|(_, timer)| *timer).collect();
        for timer in due {
            if let Timer::Sa(spi) = timer {
                self.with_sa(spi, now, Sa::handle_timeout);
            }
            self.touch(timer);
        }
        self.settle(now);
    }

    /// How it stands with a peer; `None` if it is none.
    pub fn status(&self, peer: PeerId) -> Option<Status> {
        self.configs.contains_key(&peer).then(|| self.status_of(peer))
    }

    /// The IKE SAs with a peer.
    pub fn sas(&self, peer: PeerId) -> Vec<SaView> {
        // Not all SAs of all peers: there may be a thousand of them, and each is asked for.
        let of_peer = self.peers.get(&peer).into_iter().flat_map(|state| &state.sas);
        let of_peer = of_peer.filter_map(|spi| self.sas.get(spi));
        let all = of_peer.filter(|sa| sa.peer == Some(peer) && sa.phase != Phase::Gone);
        all.map(|sa| SaView {
            spis: sa.spis,
            initiator: sa.opener,
            up: sa.is_up() && sa.undecided.is_none(),
            path: sa.path,
            nat: (sa.facts.nat_here, sa.facts.nat_there),
            suite: sa.suite(),
            heard: sa.last_heard(),
            children: sa
                .children
                .values()
                .map(|it| ChildView {
                    slot: it.slot,
                    inbound: it.inbound,
                    outbound: it.outbound,
                    suite: it.suite,
                    up: it.stage == Stage::Up,
                })
                .collect(),
        })
        .collect()
    }

    /// How many IKE SAs strangers have half-open.
    pub fn half_open(&self) -> usize {
        self.strangers.count()
    }

    fn sas_of(&self, peer: PeerId) -> Vec<IkeSpi> {
        self.peers.get(&peer).map(|state| state.sas.iter().copied().collect()).unwrap_or_default()
    }

    fn touch(&mut self, timer: Timer) {
        self.touched.insert(timer);
    }

    fn with_sa<T>(
        &mut self,
        spi: IkeSpi,
        now: Instant,
        then: impl FnOnce(&mut Sa, &mut Cx<'_>) -> T,
    ) -> Option<T> {
        let sa = self.sas.get_mut(&spi)?;
        let mut cx = Cx {
            now,
            unix: unix(self.clock, now),
            config: &self.config,
            peers: &self.configs,
            shared: &mut self.shared,
        };
        let done = then(sa, &mut cx);
        self.touched.insert(Timer::Sa(spi));
        Some(done)
    }
}

/// The time of day at `now`.
fn unix(clock: (Instant, UnixSeconds), now: Instant) -> UnixSeconds {
    let since = now.saturating_duration_since(clock.0);
    clock.1.saturating_add(since.max(Duration::ZERO).as_secs())
}
