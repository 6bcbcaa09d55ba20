//! What is wanted with each peer, and the way there: an IKE SA, on it each child, and one SA to send on for each
//! slot. Nothing here remembers plans: each time it compares what is with what is wanted.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::{Endpoint, Timer};
use crate::chance;
use crate::config::{ChildId, Initiate, PeerConfig, PeerId, Timing};
use crate::event::{Event, Failure, Slot, Status};
use crate::sa::{CreateChild, Phase, Sa, Shared, Stage, Task};
use crate::wire::{EspSpi, IkeSpi};

/// How long the successor of an SA may take to have all its children, before the old one goes all the same.
const HAND_OVER: Duration = Duration::from_secs(10);

/// How long a second SA may stay, whoever was to delete it.
const SURPLUS: Duration = Duration::from_secs(30);

/// What is known of a peer beyond its configuration.
pub(super) struct Peer {
    pub(super) sas: BTreeSet<IkeSpi>,
    up_since: Option<Instant>,
    /// No attempt to connect before this.
    not_before: Instant,
    last_try: Option<Instant>,
    failures: u32,
    failed: Option<Failure>,
    tries: usize,
    /// Why the last SA went.
    last: Option<Failure>,
    pub(super) child_retry: BTreeMap<ChildId, Instant>,
    /// Since when a wanted child is missing that the peer is to make.
    missing: BTreeMap<Slot, Instant>,
    /// What we send on.
    outbound: BTreeMap<Slot, EspSpi>,
    pub(super) hint_at: Option<Instant>,
    handing_over: Option<Instant>,
    /// Since when there is more than one SA that could have children.
    surplus: Option<Instant>,
    idle_since: Instant,
}

impl Peer {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            sas: BTreeSet::new(),
            up_since: None,
            not_before: now,
            last_try: None,
            failures: 0,
            failed: None,
            tries: 0,
            last: None,
            child_retry: BTreeMap::new(),
            missing: BTreeMap::new(),
            outbound: BTreeMap::new(),
            hint_at: None,
            handing_over: None,
            surplus: None,
            idle_since: now,
        }
    }

    /// Traffic waits: do not.
    pub(super) fn poked(&mut self, timing: &Timing, now: Instant) {
        let lately =
            self.last_try.is_some_and(|at| now.saturating_duration_since(at) < timing.retransmit_first);
        if !lately {
            self.not_before = now;
            // Nor for the peer to begin.
            self.idle_since = now.checked_sub(timing.patience).unwrap_or(now);
        }
    }

    /// One of its SAs is over.
    pub(super) fn buried(
        &mut self,
        sa: &Sa,
        why: Failure,
        timing: &Timing,
        shared: &mut Shared,
        now: Instant,
    ) -> Option<Event> {
        let attempt = sa.opener && sa.established == 0;
        let peer = sa.peer?;
        if attempt && sa.replaces.is_some() {
            // The SA that it was to replace is still there; another time.
            return None;
        }
        if !attempt || why == Failure::Replaced || self.up_since.is_some() {
            self.last = Some(why);
            return None;
        }
        let wait = timing.backoff_first.saturating_mul(1 << self.failures.min(16)).min(timing.backoff_max);
        self.failures += 1;
        self.not_before = now + chance::sooner(&mut shared.random, wait, 5);
        self.failed = Some(why.clone());
        Some(Event::PeerFailed { peer, why, retry_at: Some(self.not_before) })
    }
}

impl Endpoint {
    /// The IKE SA that children are made on: the latest that is up.
    pub(super) fn primary(&self, peer: PeerId) -> Option<IkeSpi> {
        let usable =
            self.sas_of(peer).into_iter().filter_map(|spi| self.sas.get(&spi)).filter(|sa| is_usable(sa));
        usable.max_by_key(|sa| sa.established).map(|sa| sa.local_spi())
    }

    pub(super) fn status_of(&self, peer: PeerId) -> Status {
        let Some(state) = self.peers.get(&peer) else { return Status::Waiting };
        if let (Some(since), Some(sa)) =
            (state.up_since, self.primary(peer).and_then(|spi| self.sas.get(&spi)))
        {
            return Status::Up { since, path: sa.path };
        }
        if self.is_connecting(peer) {
            return Status::Connecting;
        }
        match &state.failed {
            Some(why) => Status::Failed { why: why.clone(), retry_at: state.not_before },
            None => Status::Waiting,
        }
    }

    /// Brings what is with a peer closer to what is wanted.
    pub(super) fn settle_peer(&mut self, peer: PeerId, now: Instant) {
        self.touched.remove(&Timer::Peer(peer));
        let Some(config) = self.configs.get(&peer).cloned() else { return self.settle_removed(peer, now) };
        let primary = self.primary(peer);
        self.tell_up_or_down(peer, primary, now);
        let at = match primary {
            None => self.connect(peer, &config, now),
            Some(primary) => {
                let children = self.make_children(peer, primary, &config, now);
                let handed = self.hand_over(peer, primary, now);
                let surplus = self.end_surplus(peer, primary, now);
                children.into_iter().chain(handed).chain(surplus).min()
            }
        };
        self.choose_outbound(peer);
        self.arm(Timer::Peer(peer), at);
    }

    fn settle_removed(&mut self, peer: PeerId, now: Instant) {
        self.arm(Timer::Peer(peer), None);
        self.tell_up_or_down(peer, None, now);
        if self.peers.get(&peer).is_some_and(|state| state.sas.is_empty()) {
            self.peers.remove(&peer);
        }
    }

    fn tell_up_or_down(&mut self, peer: PeerId, primary: Option<IkeSpi>, now: Instant) {
        let Some(state) = self.peers.get_mut(&peer) else { return };
        let sa = primary.and_then(|spi| self.sas.get(&spi));
        match (sa, state.up_since) {
            (Some(sa), None) => {
                state.up_since = Some(now);
                state.failures = 0;
                state.failed = None;
                self.shared.events.push_back(Event::PeerUp { peer, path: sa.path });
            }
            (None, Some(_)) => {
                let over =
                    state.sas.iter().filter_map(|spi| self.sas.get(spi)).find_map(|sa| sa.over.clone());
                let why = over.or(state.last.take()).unwrap_or(Failure::Silent);
                state.up_since = None;
                state.idle_since = now;
                state.handing_over = None;
                state.missing.clear();
                state.not_before = match why {
                    // It has its reasons, or we had: do not fall over each other.
                    Failure::ClosedByPeer | Failure::ClosedByUs | Failure::Expired => {
                        now + chance::sooner(&mut self.shared.random, self.config.timing.backoff_first, 5)
                    }
                    Failure::Silent
                    | Failure::RefusedUs
                    | Failure::RefusedPeer(_)
                    | Failure::Refused(_)
                    | Failure::Ours(_)
                    | Failure::NoProposal
                    | Failure::NoSelectors
                    | Failure::Misbehaved(_)
                    | Failure::PeerError(_)
                    | Failure::Replaced
                    | Failure::PeerRestarted => now,
                };
                self.shared.events.push_back(Event::PeerDown { peer, why });
            }
            (Some(_), Some(_)) | (None, None) => {}
        }
    }

    /// No IKE SA is up: begin one, if it is ours to begin and time.
    fn connect(&mut self, peer: PeerId, config: &PeerConfig, now: Instant) -> Option<Instant> {
        if self.is_connecting(peer) || config.children.is_empty() {
            return None;
        }
        let state = self.peers.get_mut(&peer)?;
        let path = *config.paths.get(state.tries % config.paths.len().max(1))?;
        let at = match config.initiate {
            Initiate::First => state.not_before,
            Initiate::Second => state.not_before.max(state.idle_since + self.config.timing.patience),
            Initiate::Never => return None,
        };
        if at > now {
            return Some(at);
        }
        state.tries = state.tries.wrapping_add(1);
        state.last_try = Some(now);
        self.initiate(peer, path, None, now);
        None
    }

    /// Makes the children that are missing on the primary SA, and deletes those that nobody wants.
    fn make_children(
        &mut self,
        peer: PeerId,
        primary: IkeSpi,
        config: &PeerConfig,
        now: Instant,
    ) -> Option<Instant> {
        let (state, sa) = (self.peers.get_mut(&peer)?, self.sas.get_mut(&primary)?);
        let mut next: Option<Instant> = None;
        let mut changed = false;
        for child in &config.children {
            let slot = Slot { child: child.id, worker: child.worker };
            let there = sa.children.values().any(|it| it.slot == slot && it.stage != Stage::Closing);
            let making = sa.all_tasks().any(|it| matches!(it, Task::Create(it) if it.slot == slot));
            if there || making {
                state.missing.remove(&slot);
                continue;
            }
            let since = *state.missing.entry(slot).or_insert(now);
            // Who opened the SA makes the children; the other side only what is still missing after a while.
            let patience = if sa.authenticated_by_us { Duration::ZERO } else { self.config.timing.patience };
            let at = state.child_retry.get(&child.id).copied().max(Some(since + patience)).unwrap_or(now);
            if at <= now {
                sa.push(Task::Create(Box::new(CreateChild::new(slot))));
                changed = true;
            } else {
                next = next.into_iter().chain([at]).min();
            }
        }
        state.missing.retain(|slot, _| config.children.iter().any(|it| it.id == slot.child));
        let unwanted: Vec<EspSpi> = unwanted(sa, config);
        if !unwanted.is_empty() {
            for spi in &unwanted {
                if let Some(child) = sa.children.get_mut(spi) {
                    child.stage = Stage::Closing;
                }
            }
            sa.push(Task::Close(unwanted));
            changed = true;
        }
        if changed {
            self.touch(Timer::Sa(primary));
        }
        next
    }

    /// Authentication anew: when it is due, and when the new SA has all that the old one had.
    fn hand_over(&mut self, peer: PeerId, primary: IkeSpi, now: Instant) -> Option<Instant> {
        let sa = self.sas.get(&primary)?;
        if let Some(old) = sa.replaces {
            let ready = self.sas.get(&old).is_none_or(|old| {
                let up = |slot| sa.children.values().any(|it| it.slot == slot && it.stage == Stage::Up);
                old.children.values().all(|it| it.stage == Stage::Closing || up(it.slot))
            });
            let began = *self.peers.get_mut(&peer)?.handing_over.get_or_insert(now);
            if !ready && now.saturating_duration_since(began) < HAND_OVER {
                return Some(began + HAND_OVER);
            }
            self.peers.get_mut(&peer)?.handing_over = None;
            self.with_sa(primary, now, |sa, _| sa.replaces = None);
            // What we send on moves to the new SA before the old one's children go.
            self.choose_outbound(peer);
            self.with_sa(old, now, |sa, cx| sa.close(Failure::Replaced, cx));
            return None;
        }
        let due = sa.reauth_at?;
        if due > now {
            return Some(due);
        }
        let path = sa.path;
        let retry = now + HAND_OVER;
        self.with_sa(primary, now, |sa, _| sa.reauth_at = Some(retry));
        if !self.is_connecting(peer) {
            self.initiate(peer, path, Some(primary), now);
        }
        Some(retry)
    }

    /// A second SA that stays, because its deletion was lost with the peer's memory or is another implementation's
    /// habit not to send, goes in the end.
    fn end_surplus(&mut self, peer: PeerId, primary: IkeSpi, now: Instant) -> Option<Instant> {
        let usable = |it: &IkeSpi| *it != primary && self.sas.get(it).is_some_and(|sa| is_usable(sa));
        let others: Vec<IkeSpi> = self.sas_of(peer).into_iter().filter(usable).collect();
        let state = self.peers.get_mut(&peer)?;
        if others.is_empty() {
            state.surplus = None;
            return None;
        }
        let until = *state.surplus.get_or_insert(now) + SURPLUS;
        if until > now {
            return Some(until);
        }
        state.surplus = None;
        for other in others {
            self.with_sa(other, now, |sa, cx| sa.close(Failure::Replaced, cx));
        }
        None
    }

    /// For each slot the best SA to send on; the owner is told when it is another than before.
    fn choose_outbound(&mut self, peer: PeerId) {
        let Some(state) = self.peers.get_mut(&peer) else { return };
        let mut best = BTreeMap::new();
        for sa in state.sas.iter().filter_map(|spi| self.sas.get(spi)) {
            for child in sa.children.values().filter(|it| it.told) {
                let Some(rank) = child.rank() else { continue };
                let rank = (!is_usable(sa), rank, std::cmp::Reverse(child.ordinal));
                let place = best.entry(child.slot).or_insert((rank, child, sa.path));
                if rank < place.0 {
                    *place = (rank, child, sa.path);
                }
            }
        }
        state.outbound.retain(|slot, _| best.contains_key(slot));
        for (slot, (_, child, path)) in best {
            if state.outbound.insert(slot, child.inbound) != Some(child.inbound) {
                self.shared.events.push_back(Event::ChildOutbound(child.outbound_sa(peer, path)));
            }
        }
    }
}

fn is_usable(sa: &Sa) -> bool {
    sa.phase == Phase::Up && sa.undecided.is_none()
}

/// Children that the configuration no longer has, and of two for one slot the older one: who opened the SA tidies.
fn unwanted(sa: &Sa, config: &PeerConfig) -> Vec<EspSpi> {
    let up = || sa.children.values().filter(|it| it.stage == Stage::Up);
    let newest = |slot| up().filter(|it| it.slot == slot).map(|it| it.ordinal).max();
    let is_unwanted = |it: &&crate::sa::Child| {
        !config.children.iter().any(|wanted| wanted.id == it.slot.child)
            || (sa.authenticated_by_us && newest(it.slot) != Some(it.ordinal))
    };
    up().filter(is_unwanted).map(|it| it.inbound).collect()
}
