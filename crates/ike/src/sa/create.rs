//! `CREATE_CHILD_SA` for a child, new or in the place of another, both roles (RFC 7296 §1.3.1, §1.3.3, §2.8, §2.25.1).
//!
//! ```text
//!   HDR, SK {[N(REKEY_SA)], SA, Ni, [KEi], TSi, TSr}  -->
//!                                        <--  HDR, SK {SA, Nr, [KEr], TSi, TSr}
//! ```
//!
//! When both sides rekey the same child at once, the lowest of the four nonces decides: the child made by that
//! exchange is deleted by who made it, and who made the other deletes the old one (§2.8.1).

use std::time::Duration;

use super::body::need;
use super::child::{Life, Narrowed};
use super::{Body, Child, Cx, Effect, Sa, Stage, Task};
use crate::chance;
use crate::config::{ChildConfig, PeerConfig, PeerKind};
use crate::crypto::{ChildKeys, Group, KeyPair, Secret};
use crate::error::{Error, Incompatible, Misbehaved, Misuse};
use crate::event::{Event, Failure, Slot};
use crate::proposal::{ChildExchange, EspSuite, Pfs};
use crate::wire::{
    EspSpi, ExchangeType, Nonce, Notify, NotifyType, Payload, PayloadType, Protocol, SaPayload,
};

/// Wait after an error that time may heal by itself.
const SOON: Duration = Duration::from_millis(1500);
/// Wait after an error that a person must heal.
const LATE: Duration = Duration::from_secs(20);
/// How often a peer may ask for another group in one go.
const GROUPS: u32 = 3;
/// How often another host may refuse a network that it has perhaps not heard of yet, before that is a failure: with waits that
/// double from a tenth of [`SOON`], for about five seconds.
const UNHEARD_OF: u32 = 5;

/// What we asked for.
#[derive(Debug)]
pub(crate) struct Offer {
    pub(crate) slot: Slot,
    /// As it was wanted when we asked.
    child: ChildConfig,
    inbound: EspSpi,
    request: SaPayload,
    exchange: ChildExchange,
}

/// Our `CREATE_CHILD_SA`.
#[derive(Debug)]
pub(crate) struct CreateChild {
    pub(crate) slot: Slot,
    /// The child in whose place it is, by the SPI that we receive on.
    pub(crate) rekeys: Option<EspSpi>,
    group: Option<Group>,
    retries: u32,
    /// How often the peer, one of ours, did not want it (yet).
    unheard_of: u32,
    made: Option<Made>,
    /// The lowest nonce of what the peer made in the same place while we asked.
    collision: Option<Vec<u8>>,
    /// What the peer deleted meanwhile and we do not know: perhaps its answer to this.
    pub(super) deleted: Vec<EspSpi>,
}

#[derive(Debug)]
struct Made {
    offer: Offer,
    nonce: Nonce,
    pair: Option<KeyPair>,
}

impl CreateChild {
    /// A child where there is none.
    pub(crate) fn new(slot: Slot) -> Self {
        Self {
            slot,
            rekeys: None,
            group: None,
            retries: 0,
            unheard_of: 0,
            made: None,
            collision: None,
            deleted: Vec::new(),
        }
    }

    pub(super) fn offer(&self) -> Option<&Offer> {
        self.made.as_ref().map(|made| &made.offer)
    }

    /// A child in the place of this one.
    pub(crate) fn rekey(slot: Slot, old: EspSpi) -> Self {
        Self { rekeys: Some(old), ..Self::new(slot) }
    }
}

/// The payloads that ask for a child: SA, TSi, TSr, and the worker.
pub(crate) fn offer(
    child: &ChildConfig,
    worker: Option<u32>,
    exchange: ChildExchange,
    cx: &mut Cx<'_>,
) -> (Offer, Vec<Payload>) {
    let inbound = cx.shared.esp_spi(worker);
    let request = child.esp.request(exchange, inbound);
    let mut payloads = vec![
        Payload::Sa(request.clone()),
        Payload::TsInitiator(Narrowed::payload(child.label.as_ref(), &child.local)),
        Payload::TsResponder(Narrowed::payload(child.label.as_ref(), &child.remote)),
    ];
    if let Some(worker) = worker {
        // RFC 9611 §5.1: opaque to the peer.
        let data = worker.to_be_bytes().to_vec();
        payloads.push(Payload::Notify(Notify::with_data(NotifyType::SaResourceInfo, data)));
    }
    let slot = Slot { child: child.id, worker };
    (Offer { slot, child: child.clone(), inbound, request, exchange }, payloads)
}

/// An offer that comes to nothing gives its SPI back.
pub(super) fn forget(offer: Option<&Offer>, cx: &mut Cx<'_>) {
    if let Some(offer) = offer {
        cx.shared.esp_spis.remove(&offer.inbound);
    }
}

/// What both want, as the selectors of a message say. `ours`: whether we asked.
fn narrow(child: &ChildConfig, body: &Body, ours: bool) -> Result<Narrowed, Error> {
    let ts_i = body.ts_i.as_ref().ok_or(Misbehaved::Missing(PayloadType::TsInitiator))?;
    let ts_r = body.ts_r.as_ref().ok_or(Misbehaved::Missing(PayloadType::TsResponder))?;
    let (local, remote) = if ours { (ts_i, ts_r) } else { (ts_r, ts_i) };
    Narrowed::of(child, local, remote).ok_or_else(|| Incompatible::TrafficSelectors.into())
}

impl Sa {
    pub(super) fn build_create(&mut self, mut task: Box<CreateChild>, cx: &mut Cx<'_>) -> Result<(), Error> {
        let wanted =
            |config: &PeerConfig| config.children.iter().find(|it| it.id == task.slot.child).cloned();
        let Some(child) = self.config(cx).and_then(|config| wanted(config)) else { return Ok(()) };
        match task.rekeys.map(|old| self.children.get(&old).map(|old| old.stage)) {
            None if self.children.values().any(|it| it.slot == task.slot && it.stage != Stage::Closing) => {
                return Ok(());
            }
            None | Some(Some(Stage::Up)) => {}
            // Replaced by the peer, deleted, or on its way out.
            Some(Some(Stage::Receiving | Stage::Replaced { .. } | Stage::Closing) | None) => return Ok(()),
        }
        let pair = match child.esp.pfs {
            Pfs::Off => None,
            Pfs::Preferred | Pfs::Required => task.group.or(child.esp.groups.first().copied()),
        };
        let pair = pair.map(|group| KeyPair::generate(group, &mut cx.shared.random)).transpose()?;
        let nonce = Nonce::random(&mut cx.shared.random);
        let exchange = ChildExchange::Create(pair.as_ref().map(|pair| pair.group().id()));
        let (offer, rest) = offer(&child, task.slot.worker, exchange, cx);
        let mut payloads = Vec::new();
        if let Some(old) = task.rekeys {
            // Named by the SPI that its sender receives on (RFC 7296 §1.3.3).
            payloads.push(Payload::Notify(Notify::about_esp(NotifyType::RekeySa, old)));
        }
        let mut rest = rest.into_iter();
        payloads.extend(rest.next());
        payloads.push(Payload::Nonce(nonce.clone()));
        payloads.extend(pair.as_ref().map(|pair| Payload::Ke(pair.ke())));
        payloads.extend(rest);
        self.send_request(ExchangeType::CreateChildSa, &payloads, cx)?;
        task.made = Some(Made { offer, nonce, pair });
        self.current = Some(Task::Create(task));
        Ok(())
    }

    pub(super) fn process_create(
        &mut self,
        mut task: Box<CreateChild>,
        body: Body,
        cx: &mut Cx<'_>,
    ) -> Result<(), Error> {
        let made = task.made.take().ok_or(Misuse::Config("an answer before the question"))?;
        if let Some(refusal) = body.error() {
            forget(Some(&made.offer), cx);
            self.create_refused(task, refusal, cx);
            return Ok(());
        }
        let deleted = std::mem::take(&mut task.deleted);
        let nr = need(body.nonce.clone(), PayloadType::Nonce)?;
        let answer = need(body.sa.clone(), PayloadType::Sa)?;
        // Whether it is still wanted or not, the peer has it: take it; it can be deleted then.
        let child = &made.offer.child;
        let selected = child.esp.accept(&made.offer.request, &answer, made.offer.exchange)?;
        let shared = match (selected.suite.group, &made.pair, &body.ke) {
            (None, _, _) => None,
            (Some(group), Some(pair), Some(ke)) if pair.group() == group && ke.group == group.id() => {
                Some(pair.agree(&ke.data)?)
            }
            (Some(_), _, _) => return Err(Misbehaved::NotOffered.into()),
        };
        let agreed = narrow(child, &body, true)?;
        let outbound = selected.peer_spi;
        if deleted.contains(&outbound) {
            // Made, used up and deleted while the answer was under way.
            forget(Some(&made.offer), cx);
            if let Some(old) = task.rekeys {
                self.push(Task::Close(vec![old]));
            }
            return Ok(());
        }
        let (ours, theirs) = self.child_keys(selected.suite, shared, &made.nonce, &nr)?;
        let stage = self.after_rekey(&task, made.nonce.as_bytes().min(nr.as_bytes()));
        let told = stage == Stage::Up;
        self.install(
            Fresh { offer: (made.offer.slot, made.offer.inbound), outbound, suite: selected.suite, agreed },
            (theirs, ours),
            (stage, told),
            cx,
        );
        Ok(())
    }

    /// What our new child is to be, and what becomes of the old one.
    fn after_rekey(&mut self, task: &CreateChild, lowest: &[u8]) -> Stage {
        let inbound = task.rekeys;
        // By the nonces alone: the peer's child may itself have been replaced by the time that our answer comes.
        let lost = task.collision.as_ref().is_some_and(|lowest_of_peer| lowest < &lowest_of_peer[..]);
        if lost {
            // The old one is the peer's to delete; ours is the one too many.
            return Stage::Closing;
        }
        if let Some(old) = inbound.and_then(|old| self.children.get_mut(&old)) {
            old.stage = Stage::Closing;
            let old = old.inbound;
            self.push(Task::Close(vec![old]));
        }
        Stage::Up
    }

    fn create_refused(&mut self, mut task: Box<CreateChild>, refusal: &Notify, cx: &mut Cx<'_>) {
        let Some(config) = self.config(cx).cloned() else { return };
        let old_lives =
            task.rekeys.is_none_or(|old| self.children.get(&old).is_some_and(|old| old.stage == Stage::Up));
        if !old_lives {
            // The peer's rekey, or its delete, was first.
            return;
        }
        let offered = config.children.iter().find(|it| it.id == task.slot.child).map(|it| &it.esp.groups);
        let group = refusal.wanted_group().and_then(Group::from_id);
        match (refusal.kind, group) {
            (NotifyType::InvalidKePayload, Some(group))
                if task.retries < GROUPS && offered.is_some_and(|it| it.contains(&group)) =>
            {
                task.retries += 1;
                task.group = Some(group);
                self.tasks.push_front(Task::Create(task));
            }
            (NotifyType::TemporaryFailure, _) => {
                task.retries = 0;
                let wait = SOON / 10 + chance::within(&mut cx.shared.random, SOON);
                self.push_later(wait, Task::Create(task), cx.now);
            }
            // Two hosts hear of a network at different moments; see also `early`.
            (NotifyType::TsUnacceptable, _)
                if config.kind == PeerKind::Native
                    && task.rekeys.is_none()
                    && task.unheard_of < UNHEARD_OF =>
            {
                let wait = SOON / 10 * (1 << task.unheard_of);
                task.unheard_of += 1;
                self.push_later(wait, Task::Create(task), cx.now);
            }
            (NotifyType::ChildSaNotFound, _) => {
                // It is gone there: forget it here, and make a new one (RFC 7296 §2.25).
                if let Some(old) = task.rekeys {
                    self.drop_child(old, Failure::ClosedByPeer, Duration::ZERO, cx);
                }
            }
            (kind, _) => {
                let why = Failure::from(kind);
                if let Some(peer) = self.peer {
                    cx.effect(Effect::ChildFailed { peer, child: task.slot.child, why, wait: LATE });
                }
                if task.rekeys.is_some() {
                    // The old one lives on until its end; perhaps the peer has better luck, or changes its mind.
                    self.push_later(LATE, Task::Create(task), cx.now);
                }
            }
        }
    }

    /// The first child, as answered in `IKE_AUTH`.
    pub(super) fn accept_child(
        &mut self,
        offer: &Offer,
        (ni, nr): (&Nonce, &Nonce),
        body: &Body,
        cx: &mut Cx<'_>,
    ) -> Result<(), Error> {
        let child = &offer.child;
        let Some(answer) = &body.sa else {
            forget(Some(offer), cx);
            let why = body.error().map_or(Failure::NoSelectors, |it| it.kind.into());
            if let Some(peer) = self.peer {
                cx.effect(Effect::ChildFailed { peer, child: child.id, why, wait: LATE });
            }
            return Ok(());
        };
        let selected = child.esp.accept(&offer.request, answer, offer.exchange)?;
        let agreed = narrow(child, body, true)?;
        let (ours, theirs) = self.child_keys(selected.suite, None, ni, nr)?;
        self.install(
            Fresh {
                offer: (offer.slot, offer.inbound),
                outbound: selected.peer_spi,
                suite: selected.suite,
                agreed,
            },
            (theirs, ours),
            (Stage::Up, true),
            cx,
        );
        Ok(())
    }

    /// `CREATE_CHILD_SA` from the peer.
    pub(super) fn respond_create_child_sa(
        &mut self,
        body: Body,
        cx: &mut Cx<'_>,
    ) -> Result<Vec<Payload>, Error> {
        let sa = body.sa.as_ref().ok_or(Misbehaved::Missing(PayloadType::Sa))?;
        if sa.proposals.iter().any(|it| it.protocol == Protocol::Ike) {
            return self.respond_rekey(body, cx);
        }
        let temporary = || vec![Payload::Notify(Notify::status(NotifyType::TemporaryFailure))];
        // RFC 7296 §2.25.2: not while we rekey the IKE SA.
        if matches!(self.current, Some(Task::Rekey(_))) {
            return Ok(temporary());
        }
        let old = match body.notify(NotifyType::RekeySa) {
            None => None,
            Some(rekey) => {
                let spi = rekey.esp_spi().ok_or(Misbehaved::Syntax("REKEY_SA"))?;
                let old = self.children.values().find(|it| it.outbound == spi);
                match old.map(|old| (old.inbound, old.stage)) {
                    Some((old, Stage::Up)) => Some(old),
                    // The peer made it and has it for certain: now we know.
                    Some((old, Stage::Receiving)) => {
                        self.confirm(old);
                        Some(old)
                    }
                    // We are deleting it (RFC 7296 §2.25.1); or the peer has already replaced it.
                    Some((_, Stage::Closing | Stage::Replaced { .. })) => return Ok(temporary()),
                    // Perhaps what we asked for a moment ago, whose answer is still under way.
                    None if matches!(self.current, Some(Task::Create(_))) => return Ok(temporary()),
                    None => {
                        let notify = Notify::about_esp(NotifyType::ChildSaNotFound, spi);
                        return Ok(vec![Payload::Notify(notify)]);
                    }
                }
            }
        };
        let config = self.config(cx).ok_or(Incompatible::NoAdditionalSas)?.clone();
        // Also in the place of another: the peer may never delete that.
        let most = config.children.len().max(1).saturating_mul(cx.config.limits.children_per_wanted);
        if self.children.len() >= most {
            return Err(Incompatible::NoAdditionalSas.into());
        }
        let ni = need(body.nonce.clone(), PayloadType::Nonce)?;
        let nr = Nonce::random(&mut cx.shared.random);
        let exchange = ChildExchange::Create(body.ke.as_ref().map(|ke| ke.group));
        let (new, mut payloads) = self.respond_child(&config, &body, exchange, (&ni, &nr), old, cx)?;
        payloads.insert(1, Payload::Nonce(nr.clone()));
        if let Some(old) = old {
            if let Some(old) = self.children.get_mut(&old) {
                old.stage = Stage::Replaced { by: new };
                // Should the peer never delete it, we do.
                old.life.expire_at = old.life.expire_at.min(cx.now + super::GIVE_UP);
            }
            if let Some(Task::Create(ours)) = &mut self.current
                && ours.rekeys == Some(old)
            {
                ours.collision = Some(ni.as_bytes().min(nr.as_bytes()).to_vec());
            }
        }
        Ok(payloads)
    }

    /// A child that the peer asks for: our SPI for it, and the payloads of the answer but for the nonce.
    pub(super) fn respond_child(
        &mut self,
        config: &PeerConfig,
        body: &Body,
        exchange: ChildExchange,
        (ni, nr): (&Nonce, &Nonce),
        old: Option<EspSpi>,
        cx: &mut Cx<'_>,
    ) -> Result<(EspSpi, Vec<Payload>), Error> {
        let old = old.and_then(|old| self.children.get(&old)).map(|old| old.slot);
        let worker = body
            .notify(NotifyType::SaResourceInfo)
            .and_then(|it| <[u8; 4]>::try_from(it.data.as_slice()).ok())
            .map(u32::from_be_bytes);
        let mut fitting: Vec<(&ChildConfig, Narrowed)> = config
            .children
            .iter()
            .filter(|child| old.is_none_or(|old| old.child == child.id))
            .filter_map(|child| Some((child, narrow(child, body, false).ok()?)))
            .collect();
        // Its very worker, then one that is not served yet.
        fitting.sort_by_key(|(child, _)| {
            (child.worker != worker, self.children.values().any(|it| it.slot.child == child.id))
        });
        let Some((child, agreed)) = fitting.into_iter().next() else {
            return Err(Incompatible::TrafficSelectors.into());
        };
        let offered = body.sa.as_ref().ok_or(Misbehaved::Missing(PayloadType::Sa))?;
        let selected = child.esp.select(offered, exchange)?;
        let pair = match (selected.suite.group, &body.ke) {
            (None, _) => None,
            (Some(group), Some(ke)) if ke.group == group.id() => {
                let pair = KeyPair::generate(group, &mut cx.shared.random)?;
                let shared = pair.agree(&ke.data)?;
                Some((pair, shared))
            }
            (Some(wanted), _) => return Err(Incompatible::WrongGroup { wanted }.into()),
        };
        let slot = old.unwrap_or(Slot { child: child.id, worker });
        let inbound = cx.shared.esp_spi(slot.worker);
        let mut payloads = vec![
            Payload::Sa(selected.answer(inbound)),
            Payload::TsInitiator(Narrowed::payload(agreed.label.as_ref(), &agreed.remote)),
            Payload::TsResponder(Narrowed::payload(agreed.label.as_ref(), &agreed.local)),
        ];
        let (ke, shared) = pair.map(|(pair, shared)| (Payload::Ke(pair.ke()), shared)).unzip();
        // The order of RFC 7296 §1.3.1; the nonce goes between these two.
        if let Some(ke) = ke {
            payloads.insert(1, ke);
        }
        let (theirs, ours) = self.child_keys(selected.suite, shared, ni, nr)?;
        let stage = if old.is_some() { Stage::Receiving } else { Stage::Up };
        let (suite, outbound) = (selected.suite, selected.peer_spi);
        self.install(
            Fresh { offer: (slot, inbound), outbound, suite, agreed },
            (theirs, ours),
            (stage, true),
            cx,
        );
        Ok((inbound, payloads))
    }

    /// The keys of a new child: of the exchange's initiator, and of its responder.
    fn child_keys(
        &self,
        suite: EspSuite,
        shared: Option<Secret>,
        ni: &Nonce,
        nr: &Nonce,
    ) -> Result<(crate::crypto::TrafficKey, crate::crypto::TrafficKey), Error> {
        let crypt = self.crypt.as_ref().ok_or(Misuse::Config("a child before there are keys"))?;
        let shared: Vec<Secret> = shared.into_iter().collect();
        let keys = ChildKeys::derive(crypt.suite.prf, &crypt.keys.sk_d, &shared, ni, nr, suite.encr);
        Ok((keys.initiator, keys.responder))
    }

    fn install(
        &mut self,
        fresh: Fresh,
        (key_in, key_out): (crate::crypto::TrafficKey, crate::crypto::TrafficKey),
        (stage, told): (Stage, bool),
        cx: &mut Cx<'_>,
    ) {
        let Some(peer) = self.peer else { return };
        let (slot, inbound) = fresh.offer;
        let child = Child {
            slot,
            inbound,
            outbound: fresh.outbound,
            stage,
            told,
            key_in,
            key_out,
            suite: fresh.suite,
            label: fresh.agreed.label,
            local: fresh.agreed.local,
            remote: fresh.agreed.remote,
            ordinal: cx.shared.next_ordinal(),
            life: Life::new(&cx.config.timing, &mut cx.shared.random, cx.now),
            confirm_by: cx.now + super::GIVE_UP + super::REMEMBER,
        };
        if told {
            cx.shared.events.push_back(Event::ChildInbound(child.inbound_sa(peer, self.path)));
        }
        if stage == Stage::Closing {
            self.push(Task::Close(vec![inbound]));
        }
        self.children.insert(inbound, child);
    }

    /// The peer has this child for certain: we send on it from now on.
    pub(crate) fn confirm(&mut self, inbound: EspSpi) {
        if let Some(child) = self.children.get_mut(&inbound)
            && child.stage == Stage::Receiving
        {
            child.stage = Stage::Up;
        }
    }
}

/// What is known of a new child before its keys.
struct Fresh {
    offer: (Slot, EspSpi),
    outbound: EspSpi,
    suite: EspSuite,
    agreed: Narrowed,
}
