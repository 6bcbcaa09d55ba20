//! What one host sees of its environment, and how that changes.
//!
//! A host sees itself and all networks; and of each network that it takes part in, which is one where it holds a block
//! or a claim or speaks to a foreign peer, all blocks, claims, endpoints, foreign peers and the hosts that take part.
//!
//! Invariant: snapshot plus deltas, applied in order, is always the view at the delta's revision. A reader that is slow
//! gets fewer and larger deltas; nothing queues for it. A cursor that resumes knows nothing of the server before: what it
//! may have seen then follows from the changes since.

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
    /// These.
    Delta(Touched),
    /// The host was removed.
    Gone,
    /// More than is remembered: begin anew with a snapshot.
    Lost,
}

/// Objects that changed for a host, in the order in which it is told, and whether each is there.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Touched(Vec<(Key, bool)>);

/// What hosts see alike: those of the same networks have the same snapshot, but for what is a host's own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Scope {
    networks: BTreeSet<NetworkId>,
    hosts: BTreeSet<HostId>,
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

    /// A cursor that goes on from `from`, where another one, perhaps of another server, had come to; and what happened since.
    /// `None` if not all of it is remembered.
    pub(crate) fn resume(
        state: &State,
        environment: &EnvironmentId,
        host: &HostId,
        from: Revision,
    ) -> Option<(Self, Step)> {
        let mut cursor = Self::new(state, environment, host)?;
        let env = state.environments.get(environment)?;
        let changes: Vec<_> = state.changes_after(from, environment)?.collect();
        // Networks that the host may have left or come to since, and hosts that may have come into its view or gone out.
        let shares = changes.iter().filter(|changed| is_share(&changed.key));
        let mut turned = BTreeSet::new();
        let mut met = BTreeSet::new();
        for changed in shares {
            met.extend(changed.hosts.iter().cloned());
            if changed.hosts.contains(host) {
                turned.extend(changed.network.iter().cloned());
            }
        }
        let mut touched: BTreeSet<Key> = met.iter().cloned().map(Key::Host).collect();
        for network in &turned {
            touched.extend(objects_of(env, network, host).map(|object| object.key()));
            touched.extend(env.hosts_of(network).cloned().map(Key::Host));
        }
        for changed in changes {
            let seen = match (&changed.key, &changed.network) {
                (Key::Network(_), _) => true,
                // One that is gone may have been in view.
                (Key::Host(id), _) => cursor.hosts.contains(id) || !env.catalog.hosts.contains_key(id),
                (_, Some(network)) => cursor.networks.contains(network) || turned.contains(network),
                (_, None) => false,
            };
            if seen {
                touched.insert(changed.key.clone());
            }
        }
        cursor.at = state.revision;
        let step = cursor.step(env, touched);
        Some((cursor, step))
    }

    /// What it sees; `None` if something of it is this host's alone: a secret shared with a foreign peer.
    pub(crate) fn scope(&self, state: &State) -> Option<Scope> {
        let env = state.environments.get(&self.environment)?;
        let own = env.catalog.peers.values().any(|peer| peer.host == self.host);
        (!own).then(|| Scope { networks: self.networks.clone(), hosts: self.hosts.clone() })
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
        let mut touched = BTreeSet::new();
        let mut before = None;
        if changes.clone().any(|changed| is_share(&changed.key)) {
            let networks = std::mem::replace(&mut self.networks, env.networks_of(&self.host));
            for network in networks.symmetric_difference(&self.networks) {
                touched.extend(objects_of(env, network, &self.host).map(|object| object.key()));
            }
            let hosts = visible_hosts(env, &self.host, &self.networks);
            touched.extend(self.hosts.symmetric_difference(&hosts).cloned().map(Key::Host));
            self.hosts = hosts;
            before = Some(networks);
        }
        let was_in = |network| before.as_ref().is_some_and(|networks| networks.contains(network));
        for changed in changes {
            let seen = match (&changed.key, &changed.network) {
                (Key::Network(_), _) => true,
                (Key::Host(id), _) => self.hosts.contains(id),
                (_, Some(network)) => self.networks.contains(network) || was_in(network),
                (_, None) => false,
            };
            if seen {
                touched.insert(changed.key.clone());
            }
        }
        self.at = state.revision;
        self.step(env, touched)
    }

    fn step(&self, env: &Environment, touched: BTreeSet<Key>) -> Step {
        if touched.is_empty() {
            return Step::Nothing;
        }
        let (there, mut gone): (Vec<Key>, Vec<Key>) =
            touched.into_iter().partition(|key| self.sees(env, key));
        // What is gone makes room first; what belongs to something goes before it.
        gone.reverse();
        let gone = gone.into_iter().map(|key| (key, false));
        Step::Delta(Touched(gone.chain(there.into_iter().map(|key| (key, true))).collect()))
    }

    /// The changes themselves. The state is that of the step.
    pub(crate) fn changes(&self, state: &State, touched: &Touched) -> Vec<Change> {
        let Some(env) = state.environments.get(&self.environment) else { return Vec::new() };
        let change = |(key, there): &(Key, bool)| {
            let object = if *there { self.object(env, key) } else { None };
            object.map_or_else(|| Change::Delete(key.clone()), Change::Put)
        };
        touched.0.iter().map(change).collect()
    }

    /// Whether what was touched looks the same to all who are told of it.
    pub(crate) fn is_common(&self, state: &State, touched: &Touched) -> bool {
        let env = state.environments.get(&self.environment);
        let own = |key: &Key| match key {
            Key::Peer(id) => {
                env.and_then(|env| env.catalog.peers.get(id)).is_some_and(|peer| peer.host == self.host)
            }
            Key::Host(_) | Key::Network(_) | Key::Block(..) | Key::Claim(..) | Key::Endpoint(_) => false,
        };
        !touched.0.iter().any(|(key, _)| own(key))
    }

    fn sees(&self, env: &Environment, key: &Key) -> bool {
        let catalog = &env.catalog;
        match key {
            Key::Host(id) => self.hosts.contains(id) && catalog.hosts.contains_key(id),
            Key::Network(id) => catalog.networks.contains_key(id),
            Key::Block(network, cidr) => {
                self.networks.contains(network) && catalog.blocks.contains_key(&(network.clone(), *cidr))
            }
            Key::Claim(network, address) => {
                self.networks.contains(network) && catalog.claims.contains_key(&(network.clone(), *address))
            }
            Key::Peer(id) => catalog.peers.get(id).is_some_and(|peer| self.networks.contains(&peer.network)),
            Key::Endpoint(id) => catalog.endpoint(id).is_some_and(|e| self.networks.contains(&e.network)),
        }
    }

    fn object(&self, env: &Environment, key: &Key) -> Option<Object> {
        let catalog = &env.catalog;
        match key {
            Key::Host(id) => catalog.hosts.get(id).cloned().map(Object::Host),
            Key::Network(id) => catalog.networks.get(id).cloned().map(Object::Network),
            Key::Block(network, cidr) => {
                catalog.blocks.get(&(network.clone(), *cidr)).cloned().map(Object::Block)
            }
            Key::Claim(network, address) => {
                catalog.claims.get(&(network.clone(), *address)).cloned().map(Object::Claim)
            }
            Key::Peer(id) => catalog.peers.get(id).map(|peer| seen_by(&self.host, peer)),
            Key::Endpoint(id) => catalog.endpoint(id).cloned().map(Object::Endpoint),
        }
    }
}

/// Whether it decides who takes part in a network.
fn is_share(key: &Key) -> bool {
    match key {
        Key::Block(..) | Key::Claim(..) | Key::Peer(_) => true,
        Key::Host(_) | Key::Network(_) | Key::Endpoint(_) => false,
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
