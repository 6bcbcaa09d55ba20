//! `CREATE_CHILD_SA` for an IKE SA in the place of another, both roles (RFC 7296 §1.3.2, §2.8.2, §2.18, §2.25.2).
//!
//! ```text
//!   HDR, SK {SA, Ni, KEi}  -->
//!                     <--  HDR, SK {SA, Nr, KEr}
//! ```
//!
//! The new SA has the old one's children. When both sides rekey at once there are two new SAs, and the lowest of the
//! four nonces decides: the SA made by that exchange is deleted by who made it, and who made the other deletes the
//! old one. Until an end knows how that went, the children stay where they are, unless the peer uses its SA for more
//! than to delete it: then it knew.

use std::time::Duration;

use super::body::need;
use super::open::wanted_group;
use super::{Body, Cx, Effect, Phase, Sa, Task};
use crate::chance;
use crate::crypto::{Group, IkeKeys, KeyPair};
use crate::error::{Error, Incompatible, Misbehaved, Misuse};
use crate::wire::{ExchangeType, IkeSpi, IkeSpis, Nonce, Notify, NotifyType, Payload, PayloadType};

/// Wait after an error that time may heal by itself.
const SOON: Duration = Duration::from_millis(1500);
/// Wait after an error that a person must heal.
const LATE: Duration = Duration::from_secs(20);
/// How often a peer may ask for another group in one go.
const GROUPS: u32 = 3;

/// Our rekey of an IKE SA.
#[derive(Debug, Default)]
pub(crate) struct RekeyIke {
    group: Option<Group>,
    retries: u32,
    made: Option<(IkeSpi, Nonce, KeyPair)>,
    /// The SA that the peer made in the same place, and its lowest nonce.
    pub(crate) collision: Option<(IkeSpi, Vec<u8>)>,
}

impl Sa {
    pub(super) fn build_rekey(&mut self, mut task: Box<RekeyIke>, cx: &mut Cx<'_>) -> Result<(), Error> {
        let Some(config) = self.config(cx).cloned().filter(|_| self.is_up()) else { return Ok(()) };
        let group = task.group.or(self.suite().map(|suite| suite.group));
        let group = group.ok_or(Misuse::Config("a rekey before there are keys"))?;
        let pair = KeyPair::generate(group, &mut cx.shared.random)?;
        let (spi, nonce) = (cx.shared.ike_spi(), Nonce::random(&mut cx.shared.random));
        let mut offer = config.ike.clone();
        // The group of the KE payload goes first.
        offer.groups.sort_by_key(|it| *it != group);
        let payloads =
            [Payload::Sa(offer.request(Some(spi))), Payload::Nonce(nonce.clone()), Payload::Ke(pair.ke())];
        self.send_request(ExchangeType::CreateChildSa, &payloads, cx)?;
        task.made = Some((spi, nonce, pair));
        self.current = Some(Task::Rekey(task));
        Ok(())
    }

    pub(super) fn process_rekey(
        &mut self,
        mut task: Box<RekeyIke>,
        body: Body,
        cx: &mut Cx<'_>,
    ) -> Result<(), Error> {
        let (spi, ni, pair) = task.made.take().ok_or(Misuse::Config("an answer before the question"))?;
        if !self.is_up() && self.phase != Phase::Replaced {
            return Ok(());
        }
        if let Some(refusal) = body.error() {
            self.rekey_refused(task, refusal, cx);
            return Ok(());
        }
        let Some(config) = self.config(cx).cloned() else { return Ok(()) };
        let answer = need(body.sa, PayloadType::Sa)?;
        let nr = need(body.nonce, PayloadType::Nonce)?;
        let ke = need(body.ke, PayloadType::Ke)?;
        let selected = config.ike.accept(&config.ike.request(Some(spi)), &answer)?;
        if selected.suite.group != pair.group() || ke.group != pair.group().id() {
            return Err(Misbehaved::NotOffered.into());
        }
        let responder = selected.peer_spi.ok_or(Misbehaved::Protocol("a rekey without an SPI"))?;
        let shared = pair.agree(&ke.data)?;
        let spis = IkeSpis { initiator: spi, responder };
        let mut new = self.successor(spis, true, (&ni, &nr), cx);
        new.set_keys(selected.suite, self.rekeyed_keys(&selected.suite, &shared, (&ni, &nr), &spis)?)?;
        let from = self.local_spi();
        match task.collision {
            Some((theirs, lowest)) if self.heir.is_some() || new.lowest < lowest => {
                // Ours is the one too many, and the old one is the peer's to delete.
                new.retire(Phase::Redundant, cx);
                new.push(Task::Bye);
                cx.effect(Effect::Made(Box::new(new)));
                if self.heir.is_none() {
                    cx.effect(Effect::Inherit { from, to: theirs });
                }
                self.retire(Phase::Replaced, cx);
            }
            collision => {
                if let Some((theirs, _)) = collision {
                    cx.effect(Effect::Redundant(theirs));
                }
                let to = new.local_spi();
                cx.effect(Effect::Made(Box::new(new)));
                cx.effect(Effect::Inherit { from, to });
                self.retire(Phase::Replaced, cx);
                self.push(Task::Bye);
            }
        }
        Ok(())
    }

    fn rekey_refused(&mut self, mut task: Box<RekeyIke>, refusal: &Notify, cx: &mut Cx<'_>) {
        if let Some((theirs, _)) = task.collision.take() {
            // Ours came to nothing, so the peer's it is.
            if self.heir.is_none() {
                let from = self.local_spi();
                cx.effect(Effect::Inherit { from, to: theirs });
            }
            return self.retire(Phase::Replaced, cx);
        }
        let offer = self.config(cx).map(|config| config.ike.clone());
        let group = offer.and_then(|offer| wanted_group(refusal, &offer));
        match (refusal.kind, group) {
            (NotifyType::InvalidKePayload, Some(group)) if task.retries < GROUPS => {
                task.retries += 1;
                task.group = Some(group);
                self.tasks.push_front(Task::Rekey(task));
            }
            (NotifyType::TemporaryFailure, _) => {
                let wait = SOON / 10 + chance::within(&mut cx.shared.random, SOON);
                self.push_later(wait, Task::Rekey(task), cx.now);
            }
            // Not before the SA's end: then all begins anew.
            _ => self.push_later(LATE, Task::Rekey(task), cx.now),
        }
    }

    /// The peer rekeys this SA.
    pub(super) fn respond_rekey(&mut self, body: Body, cx: &mut Cx<'_>) -> Result<Vec<Payload>, Error> {
        match &self.current {
            // RFC 7296 §2.25.2: not while we make, rekey or delete a child.
            Some(Task::Create(_) | Task::Close(_) | Task::Bye) => {
                return Ok(vec![Payload::Notify(Notify::status(NotifyType::TemporaryFailure))]);
            }
            Some(Task::Open(_) | Task::Auth(_) | Task::Rekey(_) | Task::Probe | Task::Move) | None => {}
        }
        let config = self.config(cx).ok_or(Incompatible::NoProposal)?.clone();
        let offered = need(body.sa, PayloadType::Sa)?;
        let ke = need(body.ke, PayloadType::Ke)?;
        let ni = need(body.nonce, PayloadType::Nonce)?;
        let selected = config.ike.select(&offered, ke.group)?;
        let wanted = selected.suite.group;
        if wanted.id() != ke.group {
            return Err(Incompatible::WrongGroup { wanted }.into());
        }
        let initiator = selected.peer_spi.ok_or(Misbehaved::Protocol("a rekey without an SPI"))?;
        let pair = KeyPair::generate(wanted, &mut cx.shared.random)?;
        let shared = pair.agree(&ke.data)?;
        let nr = Nonce::random(&mut cx.shared.random);
        let spis = IkeSpis { initiator, responder: cx.shared.ike_spi() };
        let mut new = self.successor(spis, false, (&ni, &nr), cx);
        new.set_keys(selected.suite, self.rekeyed_keys(&selected.suite, &shared, (&ni, &nr), &spis)?)?;
        let payloads = vec![
            Payload::Sa(selected.answer(Some(spis.responder))),
            Payload::Nonce(nr),
            Payload::Ke(pair.ke()),
        ];
        let (from, to) = (self.local_spi(), new.local_spi());
        if let Some(Task::Rekey(ours)) = &mut self.current {
            ours.collision = Some((to, new.lowest.clone()));
            new.undecided = Some(from);
            cx.effect(Effect::Made(Box::new(new)));
        } else {
            cx.effect(Effect::Made(Box::new(new)));
            cx.effect(Effect::Inherit { from, to });
            self.retire(Phase::Replaced, cx);
        }
        Ok(payloads)
    }

    /// The SA in this one's place, without keys and children yet.
    fn successor(&self, spis: IkeSpis, opener: bool, (ni, nr): (&Nonce, &Nonce), cx: &mut Cx<'_>) -> Sa {
        let mut new = Sa::new(spis, opener, self.path, Phase::Up, cx);
        new.peer = self.peer;
        new.facts = self.facts.clone();
        new.authenticated_by_us = self.authenticated_by_us;
        new.reauth_at = self.reauth_at;
        new.replaces = self.replaces;
        new.established = self.established;
        new.set_nonces(ni, nr);
        new
    }

    fn rekeyed_keys(
        &self,
        suite: &crate::proposal::IkeSuite,
        shared: &crate::crypto::Secret,
        (ni, nr): (&Nonce, &Nonce),
        spis: &IkeSpis,
    ) -> Result<IkeKeys, Error> {
        let old = self.crypt.as_ref().ok_or(Misuse::Config("a rekey before there are keys"))?;
        let shared = std::slice::from_ref(shared);
        Ok(IkeKeys::rekeyed((old.suite.prf, &old.keys.sk_d), suite, shared, ni, nr, spis))
    }
}
