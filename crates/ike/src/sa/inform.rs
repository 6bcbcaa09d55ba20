//! `INFORMATIONAL`, both roles: deletions, whether the peer lives, and moves (RFC 7296 §1.4, §2.4; RFC 4555 §3.5).
//!
//! Each side deletes the half of a pair that it receives on, and the answer deletes the other half. If both begin
//! at once, neither answer repeats what its own request said already (RFC 7296 §1.4.1).

use std::time::Duration;

use super::open::nat_notifies;
use super::{Body, Cx, Effect, Phase, Sa, Stage, Task};
use crate::config::PeerKind;
use crate::error::Error;
use crate::event::Failure;
use crate::wire::{Delete, EspSpi, ExchangeType, Notify, NotifyType, Payload};

impl Sa {
    pub(super) fn build_inform(&mut self, task: Task, cx: &mut Cx<'_>) -> Result<(), Error> {
        let (task, payloads) = match task {
            Task::Close(spis) => {
                let spis: Vec<EspSpi> =
                    spis.into_iter().filter(|it| self.children.contains_key(it)).collect();
                if spis.is_empty() {
                    return Ok(());
                }
                for spi in &spis {
                    if let Some(child) = self.children.get_mut(spi) {
                        child.stage = Stage::Closing;
                    }
                }
                (Task::Close(spis.clone()), vec![Payload::Delete(Delete::Esp(spis))])
            }
            Task::Bye => {
                let parting = self.parting.take().map(Payload::Notify);
                (Task::Bye, parting.into_iter().chain([Payload::Delete(Delete::Ike)]).collect())
            }
            Task::Move => (Task::Move, self.move_payloads(cx)),
            Task::Probe if self.watches_mapping() => {
                (Task::Probe, nat_notifies(&self.spis, self.path, true).into())
            }
            Task::Probe => (Task::Probe, Vec::new()),
            Task::Open(_) | Task::Auth(_) | Task::Create(_) | Task::Rekey(_) => return Ok(()),
        };
        self.send_request(ExchangeType::Informational, &payloads, cx)?;
        self.current = Some(task);
        Ok(())
    }

    pub(super) fn process_inform(&mut self, task: Task, body: &Body, cx: &mut Cx<'_>) {
        match task {
            Task::Close(spis) => {
                for spi in spis {
                    self.drop_replaced(spi, Failure::ClosedByUs, cx);
                }
            }
            Task::Bye => {
                let why = match &self.phase {
                    Phase::Closing(why) => why.clone(),
                    Phase::Init
                    | Phase::Auth
                    | Phase::HalfOpen
                    | Phase::Up
                    | Phase::Replaced
                    | Phase::Redundant
                    | Phase::Gone
                    | Phase::Dead(_) => Failure::Replaced,
                };
                self.die(why, cx);
            }
            Task::Move if body.says(NotifyType::UnexpectedNatDetected) => {}
            Task::Probe | Task::Move if self.watches_mapping() => {
                let seen = body.notify(NotifyType::NatDetectionDestinationIp);
                let seen = seen.map(|it| it.data.clone()).unwrap_or_default();
                let changed = self.mapping.as_ref().is_some_and(|before| *before != seen);
                self.mapping = Some(seen);
                if changed && matches!(task, Task::Probe) {
                    self.push(Task::Move);
                }
            }
            Task::Open(_) | Task::Auth(_) | Task::Create(_) | Task::Rekey(_) | Task::Probe | Task::Move => {}
        }
    }

    /// Whether we have to find out by ourselves that a NAT has given us another mapping: a peer that speaks MOBIKE
    /// follows nothing but what the initiator tells it (RFC 4555 §3.8).
    pub(super) fn watches_mapping(&self) -> bool {
        self.facts.mobike && self.facts.nat_here && self.authenticated_by_us
    }

    /// Whether it is to be asked how it sees us: to know a change one has to know what was before.
    pub(super) fn asks_mapping(&self) -> bool {
        self.watches_mapping() && self.mapping.is_none() && !self.is_busy()
    }

    fn move_payloads(&self, cx: &Cx<'_>) -> Vec<Payload> {
        let feign = self.config(cx).is_some_and(|config| config.kind == PeerKind::Foreign);
        let mut payloads = vec![Payload::Notify(Notify::status(NotifyType::UpdateSaAddresses))];
        payloads.extend(nat_notifies(&self.spis, self.path, feign));
        payloads
    }

    /// Takes a child away that another replaced, if one did: packets under way may still come (RFC 7296 §2.8).
    fn drop_replaced(&mut self, spi: EspSpi, otherwise: Failure, cx: &mut Cx<'_>) {
        if let Some(Stage::Replaced { by }) = self.children.get(&spi).map(|it| it.stage) {
            // Whoever ends it, its successor is what is left.
            self.confirm(by);
        }
        let Some(child) = self.children.get(&spi) else { return };
        let heir = self.children.values().any(|it| {
            // Itself replaced or not by now: it took this one's place.
            it.slot == child.slot
                && it.inbound != spi
                && it.stage != Stage::Closing
                && it.ordinal > child.ordinal
        });
        let (why, linger) =
            if heir { (Failure::Replaced, cx.config.timing.linger) } else { (otherwise, Duration::ZERO) };
        self.drop_child(spi, why, linger, cx);
    }

    pub(super) fn respond_inform(&mut self, body: &Body, cx: &mut Cx<'_>) -> Vec<Payload> {
        if body.says(NotifyType::AuthenticationFailed) {
            // Said of our answer to its first messages, and the SA is no more, deleted or not (RFC 7296 §2.21.2).
            self.linger(Failure::RefusedUs, cx);
            return Vec::new();
        }
        if body.deletes.contains(&Delete::Ike) {
            self.deleted_by_peer(cx);
            return Vec::new();
        }
        let mut payloads = self.respond_deletes(body, cx);
        payloads.extend(self.respond_move(body, cx));
        payloads
    }

    /// The peer deletes this SA: whatever we were about is forgotten (RFC 7296 §2.25.2).
    fn deleted_by_peer(&mut self, cx: &mut Cx<'_>) {
        if let (Some(Task::Rekey(ours)), None) = (&self.current, self.heir)
            && let Some((theirs, _)) = &ours.collision
        {
            // It did not know of our rekey, or decided against it: its own has the children.
            let (from, to) = (self.local_spi(), *theirs);
            cx.effect(Effect::Inherit { from, to });
            return self.retire_now(cx);
        }
        let why = match &self.phase {
            Phase::Replaced | Phase::Redundant => Failure::Replaced,
            Phase::Closing(why) => why.clone(),
            Phase::Init | Phase::Auth | Phase::HalfOpen | Phase::Up | Phase::Gone | Phase::Dead(_) => {
                Failure::ClosedByPeer
            }
        };
        self.linger(why, cx);
    }

    /// Replaced, and deleted: only the answer may be wanted again. The children and tasks are still here to be
    /// taken.
    fn retire_now(&mut self, cx: &mut Cx<'_>) {
        self.current = None;
        self.retire(Phase::Replaced, cx);
        self.window.forget();
    }

    fn respond_deletes(&mut self, body: &Body, cx: &mut Cx<'_>) -> Vec<Payload> {
        let mut ours = Vec::new();
        let mut any = false;
        for delete in &body.deletes {
            let Delete::Esp(spis) = delete else { continue };
            any = true;
            for spi in spis {
                let Some(child) = self.children.values().find(|it| it.outbound == *spi) else {
                    // Perhaps what we asked for a moment ago, whose answer is still under way.
                    if let Some(Task::Create(ours)) = &mut self.current {
                        ours.deleted.push(*spi);
                    }
                    continue;
                };
                let (inbound, stage) = (child.inbound, child.stage);
                match stage {
                    // Our own request says so already.
                    Stage::Closing if self.is_closing_now(inbound) => {}
                    Stage::Closing | Stage::Up | Stage::Receiving | Stage::Replaced { .. } => {
                        ours.push(inbound);
                    }
                }
                self.drop_replaced(inbound, Failure::ClosedByPeer, cx);
            }
        }
        if any && !ours.is_empty() { vec![Payload::Delete(Delete::Esp(ours))] } else { Vec::new() }
    }

    fn is_closing_now(&self, inbound: EspSpi) -> bool {
        matches!(&self.current, Some(Task::Close(spis)) if spis.contains(&inbound))
    }

    /// `UPDATE_SA_ADDRESSES` (RFC 4555 §3.5): the peer is where this message came from. [`Sa::handle`] has already
    /// followed a free peer; for one that moves by MOBIKE alone the endpoint sets the path.
    fn respond_move(&mut self, body: &Body, cx: &mut Cx<'_>) -> Vec<Payload> {
        let mut payloads = Vec::new();
        if body.says(NotifyType::UpdateSaAddresses)
            && self.facts.mobike
            && let Some(path) = self.seen_from
        {
            self.set_path(path, cx);
        }
        // The peer may want to know whether a NAT has changed its mapping (RFC 4555 §3.8).
        if body.says(NotifyType::NatDetectionSourceIp) && self.facts.mobike {
            payloads.extend(nat_notifies(&self.spis, self.seen_from.unwrap_or(self.path), true));
        }
        // A return routability check (RFC 4555 §3.7).
        payloads.extend(body.notify(NotifyType::Cookie2).cloned().map(Payload::Notify));
        payloads
    }
}
