//! What a changed view comes to: peers that come, change and go, devices, routes and policies.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Instant;

use ipnet::IpNet;
use model::{HostId, NetworkId};
use plan::{Far, Inside, Tunnel};

use super::engine::{Engine, PATHS_EACH, PATHS_LOOKS, Port500};
use super::peer::{Peer, Slot};
use super::wanted::{self, Own};
use crate::dataplane::{PeerIndex, Sockets};

impl Engine {
    /// Takes in the latest view.
    pub(super) fn apply(&mut self, now: Instant) {
        let view = self.views.borrow_and_update().clone();
        let tunnels_changed = !Arc::ptr_eq(&view.tunnels, &self.view.tunnels);
        let moved = view.moves != self.view.moves;
        self.view = view;
        if tunnels_changed {
            self.apply_tunnels(now);
        }
        if moved {
            self.follow_addresses(now);
        }
        self.devices_open = self.devices.apply(&self.view, &self.dataplane);
        self.devices.route(&self.routes, &self.gateways(), &self.dataplane);
    }

    fn apply_tunnels(&mut self, now: Instant) {
        let wanted = self.view.tunnels.clone();
        let gone: Vec<Far> = self.peers.keys().filter(|far| !wanted.contains_key(far)).cloned().collect();
        for far in gone {
            self.remove(&far, now);
        }
        for (far, tunnel) in wanted.iter() {
            if self.peers.get(far).is_none_or(|peer| peer.tunnel != *tunnel) {
                self.configure(far, tunnel, now);
            }
        }
        let expected: BTreeSet<_> = wanted.values().flat_map(Tunnel::sources).collect();
        self.dataplane.set_expected(expected.clone());
        self.endpoint.expect(expected);
        self.routes = self.find_routes();
        self.open_port_500();
    }

    /// Proves this host by `own` from now on; associations that are there stay.
    pub(super) fn certified(&mut self, own: Own, now: Instant) {
        self.own = own;
        let peers: Vec<_> = self.peers.iter().map(|(far, peer)| (far.clone(), peer.tunnel.clone())).collect();
        for (far, tunnel) in peers {
            self.configure(&far, &tunnel, now);
        }
    }

    /// Port 500 is open while there are foreign peers.
    fn open_port_500(&mut self) {
        let wanted = self.peers.keys().any(|far| matches!(far, Far::Peer(_)));
        match (&self.port_500, wanted) {
            (Port500::Closed, false) | (Port500::Open, true) => {}
            (Port500::Open | Port500::Refused(_), false) => {
                self.dataplane.set_ike_sockets(Sockets::default());
                self.port_500 = Port500::Closed;
            }
            (Port500::Closed | Port500::Refused(_), true) => {
                let opened = super::sockets(wanted::IKE_PORT, 1);
                let now = match opened {
                    Ok(sockets) => {
                        self.dataplane.set_ike_sockets(sockets.into_iter().next().unwrap_or_default());
                        Port500::Open
                    }
                    Err(error) => Port500::Refused(error.to_string()),
                };
                if let Port500::Refused(why) = &now
                    && now != self.port_500
                {
                    tracing::warn!("foreign peers cannot be reached: {why}");
                }
                self.port_500 = now;
            }
        }
    }

    /// The peer is none any more: it is told, and nothing goes to it or is taken from it from now on.
    fn remove(&mut self, far: &Far, now: Instant) {
        let Some(peer) = self.peers.get(far) else { return };
        let (id, index) = (peer.id(), peer.index());
        tracing::info!(peer = %peer.tunnel.name, "the tunnel is wanted no more");
        self.endpoint.remove_peer(id, now);
        self.drain(now);
        self.dataplane.remove_peer(index);
        self.peers.remove(far);
        self.by_number.remove(&id.0);
    }

    /// A peer that is new, or of which something is.
    fn configure(&mut self, far: &Far, tunnel: &Tunnel, now: Instant) {
        let known = self.peers.get(far).map(|peer| peer.tunnel.proof.clone());
        if known.is_none() {
            self.last_number += 1;
            self.by_number.insert(self.last_number, far.clone());
            self.peers.insert(far.clone(), Peer::new(self.last_number, tunnel.clone()));
        }
        self.fill_slots(far, tunnel);
        let paths = wanted::paths(&tunnel.addresses, self.settings.port, linux::host::source_for);
        let ours = paths.first().map(|path| path.local.ip());
        let Some(peer) = self.peers.get_mut(far) else { return };
        peer.tunnel.clone_from(tunnel);
        let children: Result<Vec<_>, String> =
            peer.slots.values().flat_map(|slot| wanted::children(far, slot)).collect();
        let id = peer.id();
        match wanted::who(&self.own, far, tunnel, ours).and_then(|who| Ok((who, children?))) {
            Ok((who, children)) => {
                peer.identity = who.id.to_string();
                peer.impossible = None;
                peer.paths.clone_from(&paths);
                self.endpoint.add_peer(id, who.config(paths, &tunnel.begins, children), now);
                match known {
                    // Keys that were agreed with another proof are worth nothing.
                    Some(proof) if proof != tunnel.proof => self.endpoint.reset(id, now),
                    Some(_) => {}
                    // Peers that had tunnels with us before we began wait for nobody's turn.
                    None if self.begun_lately(now) => self.endpoint.poke(id, now),
                    None => {}
                }
            }
            Err(why) => {
                if peer.impossible.as_ref() != Some(&why) {
                    tracing::warn!(peer = %tunnel.name, "there can be no tunnel: {why}");
                }
                peer.impossible = Some(why);
                self.endpoint.remove_peer(id, now);
            }
        }
        self.drain(now);
    }

    /// A slot for each network that is to be inside; those that go take their associations along.
    fn fill_slots(&mut self, far: &Far, tunnel: &Tunnel) {
        let Some(peer) = self.peers.get_mut(far) else { return };
        let index = peer.index();
        let gone: Vec<NetworkId> =
            peer.slots.keys().filter(|network| !tunnel.inside.contains_key(*network)).cloned().collect();
        for network in gone {
            if let Some(slot) = peer.slots.remove(&network) {
                self.dataplane.remove_all_outbound(index, slot.device);
            }
            let nothing = Slot::policy_of(&Inside { label: None, theirs: Vec::new(), ours: Vec::new() });
            self.dataplane.set_policy(index, self.devices.index(&network), nothing);
        }
        for (network, inside) in &tunnel.inside {
            let known = peer.slots.get(network).filter(|slot| wanted::same_child(far, &slot.inside, inside));
            let child = known.map(|slot| slot.child);
            let more = known.map(|slot| slot.more.clone());
            let device = self.devices.index(network);
            if child.is_none() {
                self.last_child += 1;
                self.dataplane.remove_all_outbound(index, device);
            }
            let child = child.unwrap_or(ike::ChildId(self.last_child));
            let more = more.unwrap_or_else(|| {
                // A foreign peer makes one child: RFC 9611 is ours and few others'.
                let workers = if matches!(far, Far::Host(_)) { self.dataplane.workers() as u64 } else { 1 };
                let first = self.last_child;
                self.last_child += workers - 1;
                (1..workers).map(|worker| ike::ChildId(first + worker)).collect()
            });
            let before = peer.slots.remove(network).filter(|slot| slot.child == child);
            let slot = match before {
                Some(before) if before.inside == *inside => before,
                before => {
                    let policy = Slot::policy_of(inside);
                    self.dataplane.set_policy(index, device, policy.clone());
                    let (sending, ends, probes) = before
                        .map_or((BTreeMap::new(), None, None), |slot| (slot.sending, slot.ends, slot.probes));
                    Slot { child, more, inside: inside.clone(), device, policy, sending, ends, probes }
                }
            };
            peer.slots.insert(network.clone(), slot);
        }
    }

    /// Which peer each destination of a network goes to.
    fn find_routes(&self) -> BTreeMap<NetworkId, Vec<(IpNet, PeerIndex)>> {
        let mut routes: BTreeMap<NetworkId, Vec<(IpNet, PeerIndex)>> = BTreeMap::new();
        for peer in self.peers.values() {
            for (network, slot) in &peer.slots {
                let to = slot.inside.theirs.iter().map(|net| (*net, peer.index()));
                routes.entry(network.clone()).or_default().extend(to);
            }
        }
        routes
    }

    /// The networks that foreign peers are joined to here: what they send goes on to other hosts, and back.
    fn gateways(&self) -> BTreeSet<NetworkId> {
        let foreign = self.peers.iter().filter(|(far, _)| matches!(far, Far::Peer(_)));
        foreign.flat_map(|(_, peer)| peer.slots.keys().cloned()).collect()
    }

    /// Looks again which of our addresses lead to the peers: paths to try, and paths in use.
    pub(super) fn follow_addresses(&mut self, now: Instant) {
        self.try_impossible(now);
        let port = self.settings.port;
        for peer in self.peers.values_mut().filter(|peer| peer.impossible.is_none()) {
            find_paths(peer, port, &mut self.endpoint, now);
            let Some(ike::Status::Up { path, .. }) = self.endpoint.status(peer.id()) else { continue };
            if let Some(other) = moved(path, &peer.tunnel.addresses, port) {
                let name = &peer.tunnel.name;
                tracing::info!(peer = %name, from = %path.local.ip(), to = %other.local.ip(), "we moved");
                self.endpoint.set_path(peer.id(), other, now);
            }
        }
    }

    /// The same for peers that are not up.
    pub(super) fn find_paths(&mut self, now: Instant) {
        self.try_impossible(now);
        let port = self.settings.port;
        for peer in self.peers.values_mut().filter(|peer| peer.impossible.is_none()) {
            if !matches!(self.endpoint.status(peer.id()), Some(ike::Status::Up { .. })) {
                find_paths(peer, port, &mut self.endpoint, now);
            }
        }
    }

    /// What could not be may be possible from where we are now.
    fn try_impossible(&mut self, now: Instant) {
        self.open_port_500();
        let impossible = self.peers.iter().filter(|(_, peer)| peer.impossible.is_some());
        let impossible: Vec<_> = impossible.map(|(far, peer)| (far.clone(), peer.tunnel.clone())).collect();
        for (far, tunnel) in impossible {
            self.configure(&far, &tunnel, now);
        }
    }

    /// Whether one of the next few paths in use should leave from another address of ours.
    pub(super) fn have_moved(&mut self) -> bool {
        let all = self.peers.len();
        let count = PATHS_EACH.max(all.div_ceil(PATHS_LOOKS)).min(all);
        let mut next = self.peers.values().cycle().skip(self.checked).take(count);
        self.checked = (self.checked + count) % self.peers.len().max(1);
        next.any(|peer| match self.endpoint.status(peer.id()) {
            Some(ike::Status::Up { path, .. }) => {
                moved(path, &peer.tunnel.addresses, self.settings.port).is_some()
            }
            Some(ike::Status::Waiting | ike::Status::Connecting | ike::Status::Failed { .. }) | None => false,
        })
    }

    /// Between which routers probes may go: those that are there on both sides. A host without an endpoint in a network
    /// has none.
    pub(super) fn find_ends(&mut self, now: Instant) {
        let view = &self.view;
        let populated: BTreeSet<(&NetworkId, &HostId)> =
            view.catalog.endpoints.values().map(|endpoint| (&endpoint.network, &endpoint.host)).collect();
        for (far, peer) in &mut self.peers {
            for (network, slot) in &mut peer.slots {
                slot.ends = match far {
                    Far::Peer(_) => None,
                    Far::Host(host) => {
                        let ours = view.routers.get(network).filter(|router| router.tun.is_some());
                        let ours = ours.and_then(|router| router.address);
                        let theirs = populated
                            .contains(&(network, host))
                            .then(|| view.catalog.router_address(network, host))
                            .flatten();
                        match (ours, theirs) {
                            (Some(IpAddr::V4(ours)), Some(IpAddr::V4(theirs))) => Some((ours, theirs)),
                            (Some(_) | None, Some(_) | None) => None,
                        }
                    }
                };
                slot.arrange_probes(now);
            }
        }
    }
}

/// Looks which of our addresses lead to a peer.
fn find_paths(peer: &mut Peer, port: u16, endpoint: &mut ike::Endpoint, now: Instant) {
    let paths = wanted::paths(&peer.tunnel.addresses, port, linux::host::source_for);
    if peer.paths != paths {
        peer.paths.clone_from(&paths);
        endpoint.set_paths(peer.id(), paths, wanted::initiate(&peer.tunnel.begins), now);
    }
}

/// The path to take in the place of one in use, if that is not ours any more: to the same address from another of ours; if
/// none of ours leads there, to the first of the peer's that one leads to, of whatever family.
fn moved(path: ike::Path, addresses: &[SocketAddr], port: u16) -> Option<ike::Path> {
    let other = match linux::host::source_for(path.remote.ip()) {
        Some(source) => ike::Path { local: SocketAddr::new(source, path.local.port()), ..path },
        None => *wanted::paths(addresses, port, linux::host::source_for).first()?,
    };
    (other != path).then_some(other)
}
