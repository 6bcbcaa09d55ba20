//! How tunnels stand, in the words of the agent's socket.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use ike::{Endpoint, SaView, Status, Timing};
use model::Name;
use model::agent_api::{ChildStatus, IkeStatus, TunnelState, TunnelStatus};
use plan::{Begins, Far};

use super::engine::{Clock, Engine, Port500};
use super::metrics;
use super::peer::{Child, Peer};
use super::probe::Probes;
use crate::view::View;

impl Engine {
    /// All tunnels with what went over them, by the names of the peers.
    pub(super) fn statuses(&self, now: Instant) -> Vec<metrics::Tunnel> {
        let looking = Looking {
            endpoint: &self.endpoint,
            view: &self.view,
            clock: &self.clock,
            timing: &self.timing,
            port_500: &self.port_500,
            slower: self.dataplane.refused(),
        };
        let one = |(far, peer)| {
            let drops = self.dataplane.drops(Peer::index(peer));
            (looking.status(far, peer, drops, now), peer.used())
        };
        let mut all: Vec<metrics::Tunnel> = self.peers.iter().map(one).collect();
        all.sort_by(|(a, _), (b, _)| (&a.peer, &a.id).cmp(&(&b.peer, &b.id)));
        all
    }
}

/// What it takes to say how a peer stands.
struct Looking<'a> {
    endpoint: &'a Endpoint,
    view: &'a View,
    clock: &'a Clock,
    timing: &'a Timing,
    port_500: &'a Port500,
    slower: Vec<&'static str>,
}

impl Looking<'_> {
    fn status(
        &self,
        far: &Far,
        peer: &Peer,
        drops: BTreeMap<&'static str, u64>,
        now: Instant,
    ) -> TunnelStatus {
        let sas = self.endpoint.sas(peer.id());
        // Of several the one that is up, and of those the youngest.
        let current = sas.iter().max_by_key(|sa| (sa.up, peer.ikes.get(&sa.spis).copied()));
        let (rtt, loss) = measured(peer.slots.values().filter_map(|slot| slot.probes.as_ref()));
        TunnelStatus {
            peer: peer.tunnel.name.clone(),
            id: far.as_str().to_owned(),
            foreign: matches!(far, Far::Peer(_)),
            state: self.state(far, peer, now),
            path: current.map(|sa| (sa.path.local, sa.path.remote)),
            nat: current.map(|sa| sa.nat).unwrap_or_default(),
            identity: peer.identity.clone(),
            ike: current.and_then(|sa| self.ike(peer, sa)),
            children: self.children(peer, &sas),
            rtt_us: rtt.map(|rtt| u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX)),
            loss_permille: loss,
            mtu: peer.search.as_ref().and_then(super::mtu::Search::known),
            black_hole: peer.search.as_ref().is_some_and(super::mtu::Search::black_hole),
            last_seen: peer.last_seen.map(|at| self.clock.millis(at)),
            last_failure: peer.last_failure.clone(),
            handshakes: peer.handshakes,
            rekeys: peer.rekeys,
            drops: drops.into_iter().map(|(reason, count)| (reason.to_owned(), count)).collect(),
            slower: self.slower.iter().map(|what| (*what).to_owned()).collect(),
        }
    }

    fn state(&self, far: &Far, peer: &Peer, now: Instant) -> TunnelState {
        if let Some(why) = &peer.impossible {
            return TunnelState::Waiting { why: why.clone() };
        }
        match (self.endpoint.status(peer.id()), self.port_500, far) {
            // What cannot be tried has not failed.
            (status, Port500::Refused(why), Far::Peer(_)) if !matches!(status, Some(Status::Up { .. })) => {
                TunnelState::Waiting { why: why.clone() }
            }
            (status, _, _) => self.state_of(status, peer, now),
        }
    }

    fn state_of(&self, status: Option<Status>, peer: &Peer, now: Instant) -> TunnelState {
        match status {
            None | Some(Status::Waiting) => TunnelState::Waiting { why: why_waiting(peer) },
            Some(Status::Connecting) => TunnelState::Connecting,
            Some(Status::Up { since, .. }) => match peer.silent() {
                Some(since) => TunnelState::Silent { since: self.clock.millis(since) },
                None => TunnelState::Up { since: self.clock.millis(since) },
            },
            Some(Status::Failed { why, retry_at }) => {
                TunnelState::Failed { why: why.to_string(), retry_at: self.clock.millis(retry_at.max(now)) }
            }
        }
    }

    fn ike(&self, peer: &Peer, sa: &SaView) -> Option<IkeStatus> {
        let established = peer.ikes.get(&sa.spis).copied();
        Some(IkeStatus {
            initiator_spi: format!("{:016x}", sa.spis.initiator.0),
            responder_spi: format!("{:016x}", sa.spis.responder.0),
            initiator: sa.initiator,
            suite: sa.suite?.to_string(),
            established: established.map(|at| self.clock.millis(at)),
            rekey_at: established.map(|at| self.clock.millis(at + self.timing.ike_rekey)),
        })
    }

    /// By network, the one in use first, then the youngest.
    fn children(&self, peer: &Peer, sas: &[SaView]) -> Vec<ChildStatus> {
        let views: BTreeMap<_, _> =
            sas.iter().flat_map(|sa| &sa.children).map(|child| (child.inbound, child)).collect();
        let mut all: Vec<_> = peer
            .children
            .iter()
            .filter_map(|(spi, child)| {
                let network = self.view.catalog.networks.get(&child.network)?.name.clone();
                let slot = peer.slots.get(&child.network);
                let sending = slot.is_some_and(|slot| slot.sending.values().any(|it| it == spi));
                let live = sending && views.get(spi).is_some_and(|view| view.up);
                let outbound = views.get(spi).map(|view| view.outbound.0);
                let outbound = outbound.or(child.outbound.as_ref().map(|sa| sa.spi().get()));
                let order = (network.clone(), !live, Reverse(child.installed));
                Some((order, self.child(network, live, spi.0, outbound, child)))
            })
            .collect();
        all.sort_by(|(a, _), (b, _)| a.cmp(b));
        all.into_iter().map(|(_, child)| child).collect()
    }

    fn child(
        &self,
        network: Name,
        live: bool,
        inbound: u32,
        outbound: Option<u32>,
        child: &Child,
    ) -> ChildStatus {
        let used = child.used();
        ChildStatus {
            network,
            live,
            inbound_spi: format!("{inbound:08x}"),
            outbound_spi: outbound.map_or_else(String::new, |spi| format!("{spi:08x}")),
            suite: child.suite.clone(),
            installed: Some(self.clock.millis(child.installed)),
            rekey_at: Some(self.clock.millis(child.installed + self.timing.child_rekey)),
            bytes_in: used.bytes_in,
            packets_in: used.packets_in,
            bytes_out: used.bytes_out,
            packets_out: used.packets_out,
        }
    }
}

/// What a person can make of it that nothing is under way.
fn why_waiting(peer: &Peer) -> String {
    let name = &peer.tunnel.name;
    match &peer.tunnel.begins {
        Begins::PeerOnly { why, .. } | Begins::Nobody { why } => why.clone(),
        Begins::We | Begins::PeerFirst if peer.paths.is_empty() => {
            let addresses: Vec<String> = peer.tunnel.addresses.iter().map(ToString::to_string).collect();
            if addresses.is_empty() {
                format!("no address of {name} is known")
            } else {
                format!("this host has no route to {name} at {}; see `ip route get`", addresses.join(", "))
            }
        }
        Begins::We => "the next attempt begins in a moment".to_owned(),
        Begins::PeerFirst => format!("it is for {name} to begin; this host does if it has not in a moment"),
    }
}

/// The best round-trip time and the worst loss of a peer's networks.
fn measured<'a>(probes: impl Iterator<Item = &'a Probes>) -> (Option<Duration>, Option<u16>) {
    probes.fold((None, None), |(rtt, loss): (Option<Duration>, Option<u16>), it| {
        (rtt.into_iter().chain(it.rtt()).min(), loss.max(it.loss_permille()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use plan::{Proof, Tunnel};

    fn peer(begins: Begins, addresses: &[&str]) -> Peer {
        let tunnel = Tunnel {
            name: "h2".parse().unwrap(),
            addresses: addresses.iter().map(|it| it.parse().unwrap()).collect(),
            begins,
            proof: Proof::Key("00".repeat(32)),
            inside: BTreeMap::new(),
        };
        Peer::new(1, tunnel)
    }

    #[test]
    fn a_tunnel_that_waits_says_for_what() {
        let nat = Begins::Nobody { why: "both are behind a NAT".to_owned() };
        assert_eq!(why_waiting(&peer(nat, &[])), "both are behind a NAT");
        let lost = why_waiting(&peer(Begins::We, &["192.0.2.7:4500"]));
        assert!(lost.contains("192.0.2.7") && lost.contains("no route"), "{lost}");
        assert!(why_waiting(&peer(Begins::PeerFirst, &[])).contains("no address of h2"));
        let mut second = peer(Begins::PeerFirst, &["192.0.2.7:4500"]);
        second.paths = vec![ike::Path {
            local: "192.0.2.1:4500".parse().unwrap(),
            remote: "192.0.2.7:4500".parse().unwrap(),
        }];
        assert!(why_waiting(&second).contains("for h2 to begin"));
    }

    #[test]
    fn of_several_networks_the_best_time_and_the_worst_loss_are_told() {
        let now = Instant::now();
        let mut probes: Vec<Probes> = (0..3).map(|_| Probes::new(now)).collect();
        for (number, millis) in [(0u32, 9u64), (1, 4)] {
            probes[number as usize].sent(number, now);
            probes[number as usize].answered(number, now + Duration::from_millis(millis));
        }
        probes[2].sent(2, now);
        probes[2].due(crate::tunnels::probe::every(1), now + Duration::from_secs(2));
        assert_eq!(measured(probes.iter()), (Some(Duration::from_millis(4)), Some(1000)));
        assert_eq!(measured(std::iter::empty()), (None, None));
    }
}
