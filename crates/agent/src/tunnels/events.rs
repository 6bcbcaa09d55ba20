//! What IKE's events come to: keys into the packet path, and what is remembered and logged of peers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use esp::{Inbound, Outbound};
use ike::wire::EspSpi;
use ike::{ChildId, ChildSa, ChildUse, Event, Failure, PeerId};
use model::NetworkId;

use super::engine::Engine;
use super::keys;
use super::peer::{Child, Peer, add};

/// How long it takes a peer to handle an answer, amply.
const HOLD: Duration = Duration::from_millis(20);

impl Engine {
    /// Does what IKE says and sends what it has to send, until it has no more. What is to be received on comes before
    /// what is sent, since the peer may use it as soon as it gets that; all else comes after.
    pub(super) fn drain(&mut self, now: Instant) {
        loop {
            let mut later = Vec::new();
            while let Some(event) = self.endpoint.poll_event() {
                match event {
                    Event::ChildInbound(sa) => self.install_inbound(&sa, now),
                    other => later.push(other),
                }
            }
            let mut quiet = later.is_empty();
            while let Some(transmit) = self.endpoint.poll_transmit() {
                self.dataplane.send(udp_path(transmit.path), &transmit.bytes);
                quiet = false;
            }
            for event in later {
                self.event(event, now);
            }
            if quiet {
                return;
            }
        }
    }

    /// Sends on associations whose time has come.
    pub(super) fn release(&mut self, now: Instant) {
        for (_, sa) in self.held.extract_if(.., |(at, _)| *at <= now).collect::<Vec<_>>() {
            self.install_outbound(&sa, now);
        }
    }

    /// Whether an association must not be sent on yet: the first of its network, made by the peer, which has our answer on
    /// the way and does not know the keys before it has handled that.
    fn comes_too_early(&self, sa: &ChildSa) -> bool {
        let Some(peer) = self.by_number.get(&sa.peer.0).and_then(|far| self.peers.get(far)) else {
            return false;
        };
        let worker = worker_of(sa);
        let first =
            peer.slots.values().any(|slot| slot.has(sa.slot.child) && !slot.sending.contains_key(&worker));
        let made_there =
            |it: &ike::SaView| !it.initiator && it.children.iter().any(|it| it.inbound == sa.inbound);
        first && self.endpoint.sas(sa.peer).iter().any(made_there)
    }

    fn event(&mut self, event: Event, now: Instant) {
        match event {
            Event::PeerUp { peer, path } => {
                if let Some(peer) = self.peer(peer) {
                    tracing::info!(peer = %peer.tunnel.name, local = %path.local, remote = %path.remote, "tunnel up");
                    if let Some(search) = &mut peer.search {
                        search.restart(now);
                    }
                }
                self.look_soon(now);
            }
            Event::PeerDown { peer, why } => self.failed(peer, "tunnel down", &why),
            Event::PeerFailed { peer, why, .. } => self.failed(peer, "no tunnel", &why),
            Event::PeerMoved { peer, path } => {
                if let Some(peer) = self.peer(peer) {
                    tracing::info!(peer = %peer.tunnel.name, local = %path.local, remote = %path.remote, "the path moved");
                    let index = peer.index();
                    if let Some(search) = &mut peer.search {
                        search.restart(now);
                    }
                    peer.slots.values_mut().filter_map(|it| it.probes.as_mut()).for_each(|it| it.hurry(now));
                    self.dataplane.set_path(index, udp_path(path));
                }
                self.look_soon(now);
            }
            Event::ChildInbound(sa) => self.install_inbound(&sa, now),
            Event::ChildOutbound(sa) => {
                // The latest of a slot is the one.
                self.held.retain(|(_, held)| (held.peer, held.slot) != (sa.peer, sa.slot));
                if self.comes_too_early(&sa) {
                    self.held.push((now + HOLD, sa));
                } else {
                    self.install_outbound(&sa, now);
                }
            }
            Event::ChildDeleted { peer, inbound, .. } => self.delete_child(peer, inbound),
            Event::Refused { path, why } => self.refused.tell(now, || {
                tracing::warn!(from = %path.remote, "a peer was refused: {why}");
            }),
            Event::ChildFailed { peer, child, why, .. } => {
                let millis = self.clock.millis(now);
                let view = self.view.clone();
                if let Some(peer) = self.peer(peer) {
                    let network = network_of(peer, child).map(|it| super::network_name(&view, &it));
                    let why = format!("network {}: {why}", network.as_deref().unwrap_or("(gone)"));
                    peer.fail(millis, "no keys for a network", why);
                }
            }
        }
    }

    fn failed(&mut self, peer: PeerId, what: &'static str, why: &Failure) {
        let millis = self.clock.millis(Instant::now());
        let Some(peer) = self.peer(peer) else { return };
        match why {
            // What people or plans asked for is no failure.
            Failure::ClosedByUs | Failure::ClosedByPeer | Failure::Replaced => {
                tracing::info!(peer = %peer.tunnel.name, "{what}: {why}");
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
            | Failure::Expired
            | Failure::PeerRestarted => peer.fail(millis, what, why.to_string()),
        }
    }

    // ---- the seam that keys cross ----

    fn install_inbound(&mut self, sa: &ChildSa, now: Instant) {
        let Some(far) = self.by_number.get(&sa.peer.0) else { return };
        let Some(peer) = self.peers.get_mut(far) else { return };
        // A child that nobody wants any more: IKE is about to close it.
        let Some(network) = network_of(peer, sa.slot.child) else { return };
        let inbound = match keys::inbound(sa) {
            Ok(inbound) => Arc::new(inbound),
            Err(error) => return tracing::error!(peer = %peer.tunnel.name, "keys cannot be used: {error}"),
        };
        if peer.children.values().any(|child| child.network == network) {
            peer.rekeys += 1;
        }
        let Some(slot) = peer.slots.get(&network) else { return };
        self.dataplane.add_inbound(inbound.clone(), slot.policy.clone(), peer.index(), slot.device);
        tracing::debug!(peer = %peer.tunnel.name, %network, spi = %inbound.spi(), suite = %sa.suite, "receive");
        let child = Child {
            network,
            inbound,
            outbound: None,
            suite: sa.suite.to_string(),
            installed: now,
            told: ChildUse::default(),
        };
        peer.children.insert(sa.inbound, child);
    }

    fn install_outbound(&mut self, sa: &ChildSa, now: Instant) {
        let Some(far) = self.by_number.get(&sa.peer.0) else { return };
        let Some(peer) = self.peers.get_mut(far) else { return };
        let Some(network) = network_of(peer, sa.slot.child) else { return };
        let Some(child) = peer.children.get_mut(&sa.inbound) else { return };
        let outbound = match &child.outbound {
            Some(known) => known.clone(),
            None => match keys::outbound(sa) {
                Ok(made) => child.outbound.insert(Arc::new(made)).clone(),
                Err(error) => {
                    return tracing::error!(peer = %peer.tunnel.name, "keys cannot be used: {error}");
                }
            },
        };
        tracing::debug!(peer = %peer.tunnel.name, %network, spi = %outbound.spi(), "send");
        let index = peer.index();
        let Some(slot) = peer.slots.get_mut(&network) else { return };
        let worker = worker_of(sa);
        slot.sending.insert(worker, sa.inbound);
        slot.arrange_probes(now);
        if let Some(probes) = &mut slot.probes {
            probes.hurry(now);
        }
        self.dataplane.set_outbound(index, (slot.device, worker as usize), outbound, udp_path(sa.path));
        self.look_soon(now);
    }

    fn delete_child(&mut self, peer: PeerId, inbound: EspSpi) {
        let Some(far) = self.by_number.get(&peer.0) else { return };
        let Some(peer) = self.peers.get_mut(far) else { return };
        let Some(child) = peer.children.remove(&inbound) else { return };
        tracing::debug!(peer = %peer.tunnel.name, spi = %child.inbound.spi(), "a pair of associations is gone");
        self.dataplane.remove_inbound(child.inbound.spi());
        let index = peer.index();
        if let Some(slot) = peer.slots.get_mut(&child.network)
            && let Some(worker) =
                slot.sending.iter().find(|(_, spi)| **spi == inbound).map(|(worker, _)| *worker)
        {
            slot.sending.remove(&worker);
            if slot.sending.is_empty() {
                slot.probes = None;
            }
            self.dataplane.remove_outbound(index, slot.device, worker as usize);
        }
        end(&child.inbound, child.outbound.as_deref());
        peer.past = add(peer.past, child.used());
    }

    pub(super) fn peer(&mut self, id: PeerId) -> Option<&mut Peer> {
        self.peers.get_mut(self.by_number.get(&id.0)?)
    }
}

/// For threads too that still hold them.
fn end(inbound: &Inbound, outbound: Option<&Outbound>) {
    inbound.stop();
    if let Some(outbound) = outbound {
        outbound.stop();
    }
}

/// The worker that seals on an association. One that says nothing is the first's.
fn worker_of(sa: &ChildSa) -> u32 {
    sa.slot.worker.unwrap_or(0)
}

fn network_of(peer: &Peer, child: ChildId) -> Option<NetworkId> {
    peer.slots.iter().find(|(_, slot)| slot.has(child)).map(|(network, _)| network.clone())
}

pub(super) fn udp_path(path: ike::Path) -> linux::udp::Path {
    linux::udp::Path { local: path.local, remote: path.remote }
}

pub(super) fn ike_path(path: linux::udp::Path) -> ike::Path {
    ike::Path { local: path.local, remote: path.remote }
}

impl Peer {
    /// Something failed. The same failure again is not logged again.
    fn fail(&mut self, at: model::UnixMillis, what: &str, why: String) {
        if self.last_failure.as_ref().is_none_or(|(_, before)| *before != why) {
            tracing::warn!(peer = %self.tunnel.name, "{what}: {why}");
        }
        self.last_failure = Some((at, why));
    }
}
