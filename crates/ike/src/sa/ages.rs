//! What time does to an IKE SA: repetitions, liveness, keepalives, renewal and the end.
//!
//! Invariant: [`Sa::handle_timeout`] moves every timer that [`Sa::timeout`] named and that is due.

use std::time::Instant;

use super::window::Due;
use super::{BYE_TRIES, CreateChild, Cx, GIVE_UP, Phase, Sa, Stage, Task};
use crate::event::{Failure, Transmit};

impl Sa {
    /// When [`Self::handle_timeout`] has something to do.
    pub(crate) fn timeout(&self, cx: &Cx<'_>) -> Option<Instant> {
        let mut at: Vec<Instant> = self.later.iter().map(|(at, _)| *at).collect();
        at.extend(self.window.timeout());
        at.extend(self.give_up_at);
        at.extend(self.early_until());
        if self.is_up() {
            let timing = &cx.config.timing;
            at.extend([self.rekey_at, self.expire_at]);
            if !self.is_busy() {
                at.push(self.last_heard + timing.liveness);
            }
            if self.asks_mapping() {
                at.push(self.last_heard);
            }
            if self.facts.nat_here {
                at.push(self.last_sent + timing.keepalive);
            }
            for child in self.children.values() {
                match child.stage {
                    Stage::Up => at.extend([child.life.rekey_at, child.life.expire_at]),
                    Stage::Receiving => at.push(child.confirm_by.min(child.life.expire_at)),
                    Stage::Replaced { .. } | Stage::Closing => at.push(child.life.expire_at),
                }
            }
        }
        at.into_iter().min()
    }

    /// Does what is due.
    pub(crate) fn handle_timeout(&mut self, cx: &mut Cx<'_>) {
        let now = cx.now;
        if self.give_up_at.is_some_and(|at| at <= now) {
            return match self.phase.clone() {
                Phase::HalfOpen => self.die(Failure::Silent, cx),
                Phase::Closing(why) => self.die(why, cx),
                Phase::Init
                | Phase::Auth
                | Phase::Up
                | Phase::Replaced
                | Phase::Redundant
                | Phase::Gone
                | Phase::Dead(_) => {
                    self.die(Failure::Replaced, cx);
                }
            };
        }
        self.answer_early(cx);
        self.resend_or_give_up(cx);
        let due = self.later.extract_if(.., |(at, _)| *at <= now).map(|(_, task)| task);
        self.tasks.extend(due);
        if self.is_up() {
            self.handle_ages(cx);
        }
        self.begin_next(cx);
    }

    fn resend_or_give_up(&mut self, cx: &mut Cx<'_>) {
        let timing = &cx.config.timing;
        let tries = match self.phase {
            Phase::Init | Phase::Auth if self.hint.is_some() => 0,
            Phase::Init | Phase::Auth | Phase::HalfOpen => timing.connect_tries,
            Phase::Up => timing.tries,
            Phase::Replaced | Phase::Redundant | Phase::Closing(_) | Phase::Gone | Phase::Dead(_) => {
                BYE_TRIES
            }
        };
        match self.window.due(tries, timing, cx.now) {
            Due::Nothing => {}
            Due::Resend(datagrams) => {
                self.last_sent = cx.now;
                for datagram in datagrams {
                    cx.shared.send(self.path, datagram);
                }
            }
            Due::GiveUp => {
                let why = match (&self.phase, self.hint.take()) {
                    (Phase::Closing(why), _) => why.clone(),
                    (_, Some(hint)) => hint,
                    (_, None) => Failure::Silent,
                };
                self.die(why, cx);
            }
        }
    }

    fn handle_ages(&mut self, cx: &mut Cx<'_>) {
        let (now, timing) = (cx.now, &cx.config.timing);
        if self.expire_at <= now {
            return self.close(Failure::Expired, cx);
        }
        if self.rekey_at <= now {
            self.rekey_at = self.expire_at;
            self.push(Task::Rekey(Box::default()));
        }
        let (mut expired, mut confirmed) = (Vec::new(), Vec::new());
        for child in self.children.values_mut() {
            let forgotten = child.stage == Stage::Receiving && child.confirm_by <= now;
            if child.life.expire_at <= now || forgotten {
                // Asked again should it still be there: an exchange may have been lost with the SA it was on.
                expired.push(child.inbound);
                child.life.expire_at = now + GIVE_UP;
                if let Stage::Replaced { by } = child.stage {
                    confirmed.push(by);
                }
                child.stage = Stage::Closing;
            } else if child.stage == Stage::Up && child.life.rekey_at <= now {
                child.life.rekey_at = child.life.expire_at;
                self.tasks.push_back(Task::Create(Box::new(CreateChild::rekey(child.slot, child.inbound))));
            }
        }
        for spi in confirmed {
            self.confirm(spi);
        }
        if !expired.is_empty() {
            self.push(Task::Close(expired));
        }
        let silent = now.saturating_duration_since(self.last_heard) >= timing.liveness;
        if self.asks_mapping() || (silent && !self.is_busy()) {
            self.push(Task::Probe);
        }
        if self.facts.nat_here && now.saturating_duration_since(self.last_sent) >= timing.keepalive {
            // One octet without marker (RFC 3948 §2.3).
            self.last_sent = now;
            cx.shared.transmits.push_back(Transmit { path: self.path, bytes: vec![0xff] });
        }
    }

    /// Rekeys this IKE SA now.
    pub(crate) fn rekey_now(&mut self, now: Instant) {
        self.rekey_at = self.rekey_at.min(now);
    }

    /// Asks now whether the peer lives, or asks again what is under way.
    pub(crate) fn hurry(&mut self, cx: &mut Cx<'_>) {
        if let Some(datagrams) = self.window.hurry(&cx.config.timing, cx.now) {
            self.last_sent = cx.now;
            for datagram in datagrams {
                cx.shared.send(self.path, datagram);
            }
        } else if self.is_up() && !self.is_busy() {
            self.push(Task::Probe);
        }
    }
}
