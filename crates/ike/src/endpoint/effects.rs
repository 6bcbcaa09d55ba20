//! What concerns more than one IKE SA, done after each change until nothing is left to do.

use std::time::{Duration, Instant};

use super::{Endpoint, Timer};
use crate::chance;
use crate::config::PeerId;
use crate::event::{Event, Failure};
use crate::sa::{Effect, Phase, Sa, Task};
use crate::wire::IkeSpi;

/// How often a claim without proof that our SA is forgotten may make us begin another beside it.
const HINTS: Duration = Duration::from_secs(5);

impl Endpoint {
    /// Does all that follows from what just happened.
    pub(super) fn settle(&mut self, now: Instant) {
        loop {
            if let Some(effect) = self.shared.effects.pop_front() {
                self.apply(effect, now);
            } else if let Some(timer) = self.touched.pop_last() {
                // SAs sort before peers, so from the end peers would come first: take SAs while there are any.
                let timer = match (timer, self.touched.first().copied()) {
                    (Timer::Peer(_), Some(first @ Timer::Sa(_))) => {
                        self.touched.remove(&first);
                        self.touched.insert(timer);
                        first
                    }
                    (timer, _) => timer,
                };
                match timer {
                    Timer::Sa(spi) => self.settle_sa(spi, now),
                    Timer::Peer(peer) => self.settle_peer(peer, now),
                }
            } else {
                break;
            }
        }
        self.tell_gone(now);
    }

    fn settle_sa(&mut self, spi: IkeSpi, now: Instant) {
        self.with_sa(spi, now, Sa::begin_next);
        self.touched.remove(&Timer::Sa(spi));
        let Some(sa) = self.sas.get(&spi) else { return self.arm(Timer::Sa(spi), None) };
        let (peer, phase) = (sa.peer, sa.phase.clone());
        if let Some(peer) = peer {
            if let Some(state) = self.peers.get_mut(&peer) {
                state.sas.insert(spi);
            }
            self.touch(Timer::Peer(peer));
        }
        if let Phase::Dead(why) = phase {
            self.bury(spi, why, now);
            return self.arm(Timer::Sa(spi), None);
        }
        let at = self.with_sa(spi, now, |sa, cx| sa.timeout(cx)).flatten();
        self.touched.remove(&Timer::Sa(spi));
        self.arm(Timer::Sa(spi), at);
    }

    pub(super) fn arm(&mut self, timer: Timer, at: Option<Instant>) {
        let before = match at {
            Some(at) => self.armed.insert(timer, at),
            None => self.armed.remove(&timer),
        };
        if let Some(before) = before {
            self.timers.remove(&(before, timer));
        }
        if let Some(at) = at {
            self.timers.insert((at, timer));
        }
    }

    fn bury(&mut self, spi: IkeSpi, why: Failure, now: Instant) {
        let Some(sa) = self.sas.remove(&spi) else { return };
        if !sa.opener {
            self.opened.retain(|_, it| *it != spi);
        }
        if let Some(old) = sa.undecided {
            self.with_sa(old, now, |old, _| old.forget_rival(spi));
        }
        let Some(peer) = sa.peer else { return };
        if let Some(state) = self.peers.get_mut(&peer) {
            state.sas.remove(&spi);
            let event = state.buried(&sa, why, &self.config.timing, &mut self.shared, now);
            if self.configs.contains_key(&peer) {
                self.shared.events.extend(event);
            }
        }
    }

    fn apply(&mut self, effect: Effect, now: Instant) {
        match effect {
            Effect::Established { spi, initial_contact } => self.established(spi, initial_contact, now),
            Effect::Made(sa) => {
                let spi = sa.local_spi();
                self.sas.insert(spi, sa);
                self.touch(Timer::Sa(spi));
            }
            Effect::Inherit { from, to } => self.inherit(from, to, now),
            Effect::Redundant(spi) => {
                self.with_sa(spi, now, |sa, cx| {
                    sa.undecided = None;
                    sa.retire(Phase::Redundant, cx);
                });
            }
            Effect::ChildFailed { peer, child, why, wait } => {
                let retry_at = now + chance::sooner(&mut self.shared.random, wait, 5);
                if let Some(state) = self.peers.get_mut(&peer) {
                    state.child_retry.insert(child, retry_at);
                }
                self.shared.events.push_back(Event::ChildFailed { peer, child, why, retry_at });
                self.touch(Timer::Peer(peer));
            }
            Effect::Forgotten(spi) => self.forgotten(spi, now),
        }
    }

    /// The one SA's children and tasks are the other's.
    fn inherit(&mut self, from: IkeSpi, to: IkeSpi, now: Instant) {
        let Some(mut old) = self.sas.remove(&from) else { return };
        let heir = self.with_sa(to, now, |new, _| new.inherit(&mut old));
        if let (Some(()), Some(peer)) = (heir, old.peer) {
            for other in self.sas_of(peer) {
                self.with_sa(other, now, |sa, _| {
                    if sa.replaces == Some(from) {
                        sa.replaces = Some(to);
                    }
                });
            }
        }
        self.sas.insert(from, old);
        self.with_sa(from, now, |old, cx| match heir {
            Some(()) if old.is_up() => old.retire(Phase::Replaced, cx),
            Some(()) => {}
            None => old.die(Failure::ClosedByPeer, cx),
        });
    }

    /// An IKE SA is authenticated: what of the others with the same peer?
    fn established(&mut self, spi: IkeSpi, initial_contact: bool, now: Instant) {
        let Some((peer, born, replaces)) =
            self.sas.get(&spi).and_then(|sa| Some((sa.peer?, sa.born, sa.replaces)))
        else {
            return;
        };
        self.strangers.authenticated(spi.0);
        self.opened.retain(|_, it| *it != spi);
        if let Some(state) = self.peers.get_mut(&peer) {
            state.sas.insert(spi);
        }
        for other in self.sas_of(peer).into_iter().filter(|it| *it != spi) {
            let Some(sa) = self.sas.get(&other) else { continue };
            match sa.phase {
                // Not far enough for the peer to have an SA of it.
                Phase::Init if sa.replaces.is_none() => {
                    self.with_sa(other, now, |sa, cx| sa.die(Failure::Replaced, cx));
                }
                Phase::Up if replaces == Some(other) => {}
                // The peer has no other, so it began anew: but those it made while this was under way, it may not
                // have known of (RFC 7296 §2.4).
                Phase::Up if initial_contact && sa.established < born => {
                    self.with_sa(other, now, |sa, cx| sa.die(Failure::PeerRestarted, cx));
                }
                // Both began at once.
                Phase::Up if born < sa.established => self.choose(spi, other, now),
                // Whoever made the new one with the old one up means to replace it, and deletes the old one.
                Phase::Up
                | Phase::Init
                | Phase::Auth
                | Phase::HalfOpen
                | Phase::Replaced
                | Phase::Redundant
                | Phase::Closing(_)
                | Phase::Gone
                | Phase::Dead(_) => {}
            }
        }
    }

    /// Of two SAs made at once the one with the lowest nonce goes, as for two rekeys (RFC 7296 §2.8.1): who made it
    /// deletes it.
    fn choose(&mut self, a: IkeSpi, b: IkeSpi, now: Instant) {
        let (Some(first), Some(second)) = (self.sas.get(&a), self.sas.get(&b)) else { return };
        if first.authenticated_by_us == second.authenticated_by_us {
            return;
        }
        let loser = if first.lowest < second.lowest { a } else { b };
        self.with_sa(loser, now, |sa, cx| {
            sa.retire(Phase::Redundant, cx);
            if sa.authenticated_by_us {
                // The peer should see the other one up first.
                sa.push_later(cx.config.timing.retransmit_first, Task::Bye, now);
            }
        });
    }

    /// Someone on the path says that the peer does not know our SA. If it is true, a new one beside it will come up;
    /// if not, little is lost.
    fn forgotten(&mut self, spi: IkeSpi, now: Instant) {
        let Some(sa) = self.sas.get(&spi).filter(|sa| sa.is_up()) else { return };
        let (Some(peer), path) = (sa.peer, sa.path) else { return };
        let attempt = self.is_connecting(peer);
        let Some(state) = self.peers.get_mut(&peer) else { return };
        if attempt || state.hint_at.is_some_and(|at| now.saturating_duration_since(at) < HINTS) {
            return;
        }
        state.hint_at = Some(now);
        self.initiate(peer, path, Some(spi), now);
    }

    pub(super) fn is_connecting(&self, peer: PeerId) -> bool {
        self.sas_of(peer).iter().filter_map(|spi| self.sas.get(spi)).any(|sa| {
            // An attempt that failed is under way until the peer has been told.
            let failing = sa.opener && sa.established == 0 && matches!(sa.phase, Phase::Closing(_));
            matches!(sa.phase, Phase::Init | Phase::Auth) || failing
        })
    }

    pub(super) fn initiate(
        &mut self,
        peer: PeerId,
        path: crate::Path,
        replaces: Option<IkeSpi>,
        now: Instant,
    ) {
        let mut cx = crate::sa::Cx {
            now,
            unix: super::unix(self.clock, now),
            config: &self.config,
            peers: &self.configs,
            shared: &mut self.shared,
        };
        let mut sa = Sa::initiate(peer, path, &mut cx);
        sa.replaces = replaces;
        let spi = sa.local_spi();
        self.sas.insert(spi, Box::new(sa));
        if let Some(state) = self.peers.get_mut(&peer) {
            state.sas.insert(spi);
        }
        self.touch(Timer::Sa(spi));
    }

    /// Tells the owner of children that are gone, in the order of their going, after it knows what replaces them.
    fn tell_gone(&mut self, now: Instant) {
        let shared = &mut self.shared;
        for gone in shared.gone.extract_if(.., |it| it.at <= now) {
            shared.esp_spis.remove(&gone.inbound);
            shared.events.push_back(Event::ChildDeleted {
                peer: gone.peer,
                slot: gone.slot,
                inbound: gone.inbound,
                outbound: gone.outbound,
                why: gone.why,
            });
        }
    }
}
