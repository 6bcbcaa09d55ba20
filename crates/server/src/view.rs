//! What one host sees of its environment, and how that changes.
//!
//! A host sees itself and all networks; and of each network that it takes part in, which is one where it holds a block
//! or a claim or speaks to a foreign peer, all blocks, claims, endpoints, foreign peers and the hosts that take part.
//!
//! Invariant: snapshot plus deltas, applied in order, is always the view at the delta's revision. A reader that is slow
//! gets fewer and larger deltas; nothing queues for it.

use std::collections::BTreeSet;

use model::{Change, EnvironmentId, HostId, Key, NetworkId, Object, Peer, Revision};

use crate::state::{Environment, State};

/// How far one watch has come.
#[derive(Debug)]
pub(crate) struct Cursor {
    environment: EnvironmentId,
    host: HostId,
    /// The revision that the other side has.
    pub(crate) at: Revision,
    networks: BTreeSet<NetworkId>,
    hosts: BTreeSet<HostId>,
}

/// What happened since a cursor last moved.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Nothing that the host sees.
    Nothing,
    /// This.
    Delta(Vec<Change>),
    /// The host was removed.
    Gone,
    /// More than is remembered: begin anew with a snapshot.
    Lost,
}

impl Cursor {
    /// A cursor at the state's revision; `None` if there is no such host.
    pub(crate) fn new(state: &State, environment: &EnvironmentId, host: &HostId) -> Option<Self> {
        let env = state.environments.get(environment)?;
        env.catalog.hosts.get(host)?;
        let networks = env.networks_of(host);
        let hosts = visible_hosts(env, host, &networks);
        Some(Self {
            environment: environment.clone(),
            host: host.clone(),
            at: state.revision,
            networks,
            hosts,
        })
    }

    /// All that the host sees. The state is that of the cursor's making.
    pub(crate) fn snapshot(&self, state: &State) -> Vec<Object> {
        let Some(env) = state.environments.get(&self.environment) else { return Vec::new() };
        let hosts = self.hosts.iter().filter_map(|id| env.catalog.hosts.get(id)).cloned().map(Object::Host);
        let networks = env.catalog.networks.values().cloned().map(Object::Network);
        hosts
            .chain(networks)
            .chain(self.networks.iter().flat_map(|network| objects_of(env, network, &self.host)))
            .collect()
    }

    /// Moves to the state's revision.
    pub(crate) fn advance(&mut self, state: &State) -> Step {
        let Some(env) = state.environments.get(&self.environment) else { return Step::Gone };
        if !env.catalog.hosts.contains_key(&self.host) {
            return Step::Gone;
        }
        let Some(changes) = state.changes_after(self.at, &self.environment) else { return Step::Lost };
        let changes: Vec<_> = changes.collect();
        let shares = |key: &Key| matches!(key, Key::Block(..) | Key::Claim(..) | Key::Peer(_));
        let shares_changed = changes.iter().any(|changed| shares(&changed.key));
        let mut touched = BTreeSet::new();
        let before = self.networks.clone();
        if shares_changed {
            self.networks = env.networks_of(&self.host);
            for network in before.symmetric_difference(&self.networks) {
                touched.extend(objects_of(env, network, &self.host).map(|object| object.key()));
            }
            let hosts = visible_hosts(env, &self.host, &self.networks);
            touched.extend(self.hosts.symmetric_difference(&hosts).cloned().map(Key::Host));
            self.hosts = hosts;
        }
        for changed in changes {
            let seen = match (&changed.key, &changed.network) {
                (Key::Network(_), _) => true,
                (Key::Host(id), _) => self.hosts.contains(id),
                (_, Some(network)) => before.contains(network) || self.networks.contains(network),
                (_, None) => false,
            };
            if seen {
                touched.insert(changed.key.clone());
            }
        }
        self.at = state.revision;
        if touched.is_empty() {
            return Step::Nothing;
        }
        let (mut gone, mut there) = (Vec::new(), Vec::new());
        for key in touched {
            match self.object(env, &key) {
                Some(object) => there.push(Change::Put(object)),
                None => gone.push(Change::Delete(key)),
            }
        }
        // What is gone makes room first; what belongs to something goes before it.
        gone.reverse();
        gone.append(&mut there);
        Step::Delta(gone)
    }

    fn object(&self, env: &Environment, key: &Key) -> Option<Object> {
        let catalog = &env.catalog;
        let sees = |network: &NetworkId| self.networks.contains(network);
        match key {
            Key::Host(id) => {
                catalog.hosts.get(id).filter(|_| self.hosts.contains(id)).cloned().map(Object::Host)
            }
            Key::Network(id) => catalog.networks.get(id).cloned().map(Object::Network),
            Key::Block(network, cidr) => catalog
                .blocks
                .get(&(network.clone(), *cidr))
                .filter(|_| sees(network))
                .cloned()
                .map(Object::Block),
            Key::Claim(network, address) => catalog
                .claims
                .get(&(network.clone(), *address))
                .filter(|_| sees(network))
                .cloned()
                .map(Object::Claim),
            Key::Peer(id) => {
                catalog.peers.get(id).filter(|peer| sees(&peer.network)).map(|peer| seen_by(&self.host, peer))
            }
            Key::Endpoint(id) => {
                catalog.endpoint(id).filter(|e| sees(&e.network)).cloned().map(Object::Endpoint)
            }
        }
    }
}

fn visible_hosts(env: &Environment, host: &HostId, networks: &BTreeSet<NetworkId>) -> BTreeSet<HostId> {
    let others = networks.iter().flat_map(|network| env.hosts_of(network)).cloned();
    others.chain([host.clone()]).collect()
}

/// A foreign peer as `host` may see it: with its secret only where the host speaks to it.
fn seen_by(host: &HostId, peer: &Peer) -> Object {
    Object::Peer(if peer.host == *host { peer.clone() } else { peer.clone().without_secret() })
}

fn objects_of<'a>(
    env: &'a Environment,
    network: &'a NetworkId,
    host: &'a HostId,
) -> impl Iterator<Item = Object> + 'a {
    let blocks = env.blocks_of(network).cloned().map(Object::Block);
    let claims = env.claims_of(network).cloned().map(Object::Claim);
    let endpoints = env.endpoints_of(network).cloned().map(Object::Endpoint);
    let peers = env.catalog.peers.values().filter(move |peer| peer.network == *network);
    blocks.chain(claims).chain(endpoints).chain(peers.map(move |peer| seen_by(host, peer)))
}

#[cfg(test)]
mod tests {
    use model::{Host, Name};

    use super::*;
    use crate::keys::{Keys, put};
    use crate::store::{Batch, Event, KeyValue, Op};

    fn host(seed: u8) -> Host {
        Host {
            id: HostId::from_random([seed; 8]),
            name: format!("h{seed}").parse::<Name>().unwrap(),
            candidates: vec![],
            labels: std::collections::BTreeMap::new(),
            key: format!("key {seed}"),
            joined: 0,
        }
    }

    fn apply(state: &mut State, op: Op) {
        let revision = Revision(state.revision.0 + 1);
        let event = match op {
            Op::Put(key, value) => {
                Event::Put(KeyValue { key, value, created: revision, modified: revision, version: 1 })
            }
            Op::Delete(key) | Op::DeletePrefix(key) => Event::Delete(key),
        };
        state.apply(&Batch { revision, events: vec![event] });
    }

    #[test]
    fn a_watch_that_is_further_behind_than_is_remembered_begins_anew() {
        let environment = EnvironmentId::default();
        let keys = Keys(&environment);
        let mut state = State::default();
        let own = host(1);
        apply(&mut state, put(keys.host(&own.id), &own).unwrap());
        let mut behind = Cursor::new(&state, &environment, &own.id).unwrap();
        let other = host(2);
        for _ in 0..crate::state::REMEMBERED {
            apply(&mut state, put(keys.host(&other.id), &other).unwrap());
        }
        let mut near = Cursor { at: Revision(2), ..Cursor::new(&state, &environment, &own.id).unwrap() };
        assert_eq!(near.advance(&state), Step::Nothing, "another host, in no network of ours");
        apply(&mut state, put(keys.host(&other.id), &other).unwrap());
        assert_eq!(behind.advance(&state), Step::Lost);
    }

    #[test]
    fn a_removed_host_is_gone() {
        let environment = EnvironmentId::default();
        let keys = Keys(&environment);
        let mut state = State::default();
        let own = host(1);
        apply(&mut state, put(keys.host(&own.id), &own).unwrap());
        let mut cursor = Cursor::new(&state, &environment, &own.id).unwrap();
        assert_eq!(cursor.advance(&state), Step::Nothing);
        apply(&mut state, Op::Delete(keys.host(&own.id)));
        assert_eq!(cursor.advance(&state), Step::Gone);
        assert!(Cursor::new(&state, &environment, &own.id).is_none());
    }
}
