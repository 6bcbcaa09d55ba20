//! What the ledger holds for the engine and the engine has forgotten: after a crash of the engine, or calls that came
//! while the agent was away.
//!
//! Invariant: something is only taken away if two looks at least [`IN_FLIGHT`] apart, and every look between them, did
//! not find it: the engine knows an endpoint a little after it has asked for it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Instant;

use model::{EndpointKind, NetworkId};

use super::state::IN_FLIGHT;
use crate::control::LocalEndpoint;

/// What may be left over.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Leftover {
    /// An endpoint, by the engine's id.
    Endpoint(String),
    /// An address without endpoint.
    Address(NetworkId, IpAddr),
}

/// What the engine has.
#[derive(Debug, Default)]
pub(super) struct Engine {
    /// Its endpoints' ids.
    pub(super) endpoints: BTreeSet<String>,
    /// The addresses that it uses, per network.
    pub(super) addresses: BTreeSet<(NetworkId, IpAddr)>,
}

/// Remembers since when something has been missing.
#[derive(Debug, Default)]
pub(super) struct Sweep {
    missing: BTreeMap<Leftover, Instant>,
}

impl Sweep {
    /// Takes a look; answers what is to be taken away. What was taken away is not found the next time and forgotten then.
    pub(super) fn look(
        &mut self,
        now: Instant,
        endpoints: &[LocalEndpoint],
        reservations: &[(NetworkId, IpAddr)],
        engine: &Engine,
        in_flight: impl Fn(&NetworkId, IpAddr) -> bool,
    ) -> Vec<Leftover> {
        let endpoints = endpoints
            .iter()
            .filter(|local| local.endpoint.kind == EndpointKind::Docker)
            .filter_map(|local| local.foreign.clone())
            .filter(|foreign| !engine.endpoints.contains(foreign))
            .map(Leftover::Endpoint);
        let addresses = reservations
            .iter()
            .filter(|held| !engine.addresses.contains(held) && !in_flight(&held.0, held.1))
            .map(|(network, address)| Leftover::Address(network.clone(), *address));
        let before = std::mem::take(&mut self.missing);
        self.missing = endpoints
            .chain(addresses)
            .map(|leftover| {
                let since = before.get(&leftover).copied().unwrap_or(now);
                (leftover, since)
            })
            .collect();
        let overdue = self.missing.iter().filter(|(_, since)| now.duration_since(**since) >= IN_FLIGHT);
        overdue.map(|(leftover, _)| leftover.clone()).collect()
    }

    /// Whether another look is due soon.
    pub(super) fn suspects(&self) -> bool {
        !self.missing.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    use model::{Endpoint, EndpointId, HostId, Mac};

    fn network() -> NetworkId {
        NetworkId::from_random([1; 8])
    }

    fn endpoint(foreign: &str, kind: EndpointKind) -> LocalEndpoint {
        LocalEndpoint {
            endpoint: Endpoint {
                id: EndpointId::from_random([2; 8]),
                network: network(),
                host: HostId::from_random([3; 8]),
                name: None,
                stack: None,
                service: None,
                aliases: vec![],
                addresses: vec!["10.42.16.5".parse().unwrap()],
                mac: Mac([2, 0, 0, 0, 0, 1]),
                kind,
                container: None,
                labels: BTreeMap::new(),
                ports: vec![],
                healthy: true,
                created: 0,
            },
            foreign: Some(foreign.to_owned()),
            sandbox: None,
        }
    }

    #[test]
    fn what_the_engine_lost_goes_after_two_looks_and_what_it_has_stays() {
        let mut sweep = Sweep::default();
        let start = Instant::now();
        let ours = [
            endpoint("kept", EndpointKind::Docker),
            endpoint("lost", EndpointKind::Docker),
            endpoint("lab", EndpointKind::Socket),
        ];
        let (used, lost): (IpAddr, IpAddr) = ("10.42.16.6".parse().unwrap(), "10.42.16.7".parse().unwrap());
        let reserved = [(network(), used), (network(), lost)];
        let engine = Engine { endpoints: ["kept".to_owned()].into(), addresses: [(network(), used)].into() };
        let mut look = |after| sweep.look(start + after, &ours, &reserved, &engine, |_, _| false);
        assert_eq!(look(Duration::ZERO), [], "one look is not enough");
        assert_eq!(look(Duration::from_secs(20)), [], "nor are two that follow at once");
        let gone = [Leftover::Endpoint("lost".to_owned()), Leftover::Address(network(), lost)];
        assert_eq!(look(Duration::from_secs(31)), gone);
        assert!(sweep.suspects());
        assert_eq!(sweep.look(start, &[], &[], &engine, |_, _| false), []);
        assert!(!sweep.suspects());
    }

    #[test]
    fn what_was_seen_between_two_looks_begins_anew_and_what_is_in_flight_is_left_alone() {
        let mut sweep = Sweep::default();
        let start = Instant::now();
        let ours = [endpoint("slow", EndpointKind::Docker)];
        let none = Engine::default();
        let has = Engine { endpoints: ["slow".to_owned()].into(), ..Engine::default() };
        sweep.look(start, &ours, &[], &none, |_, _| false);
        sweep.look(start + Duration::from_secs(20), &ours, &[], &has, |_, _| false);
        assert_eq!(sweep.look(start + Duration::from_secs(40), &ours, &[], &none, |_, _| false), []);
        let reserved = [(network(), "10.42.16.6".parse().unwrap())];
        for after in [0, 40] {
            let now = start + Duration::from_secs(after);
            assert_eq!(sweep.look(now, &[], &reserved, &none, |_, _| true), []);
        }
    }
}
