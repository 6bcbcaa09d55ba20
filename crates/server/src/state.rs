//! The state in memory: the store's content, indexed. [`crate::feed`] keeps it true.
//!
//! Invariant: the state is always that of one revision, whole; it never runs ahead of the store.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use model::{
    Block, Catalog, Endpoint, EndpointId, EnvironmentId, Host, HostId, Key, Network, NetworkId, Object, Peer,
    PeerId, Revision, Withdrawn,
};

use crate::incarnation::Life;
use crate::keys::{self, ApiKey, Record, Report, Server, Slot, Token, Unreported};
use crate::outbox::Entry;
use crate::presence::Noted;
use crate::store::{Batch, Event, KeyValue, Store, StoreError};

/// How many changes of objects are remembered for watches that are behind.
pub(crate) const REMEMBERED: usize = 16_384;

/// All environments at one revision.
#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) revision: Revision,
    pub(crate) environments: BTreeMap<EnvironmentId, Environment>,
    changes: VecDeque<Changed>,
    /// Changes after this revision are all remembered.
    remembered_since: Revision,
}

/// How long an address rests that was claimed by itself, before it is given to whoever asks for any: as long as those of blocks.
const REST: Duration = Duration::from_mins(1);

/// One environment.
#[derive(Debug, Default)]
pub(crate) struct Environment {
    pub(crate) catalog: Catalog,
    pub(crate) reports: BTreeMap<HostId, Report>,
    /// Blocks that were given back and are not free yet.
    pub(crate) withdrawn: BTreeMap<(NetworkId, IpNet), Withdrawn>,
    pub(crate) tokens: BTreeMap<String, Token>,
    pub(crate) api_keys: BTreeMap<String, ApiKey>,
    /// What each server says of itself.
    servers: BTreeMap<String, Server>,
    /// Hosts that have not said what they hold since the store was restored.
    pub(crate) unreported: BTreeMap<HostId, Unreported>,
    /// Changes on their way into audit logs, by server and id, with the revision that each made.
    pub(crate) audit: BTreeMap<(String, String), (Revision, Entry)>,
    /// Which start of each host's agent counts.
    pub(crate) lives: BTreeMap<HostId, Life>,
    /// Who was there, as each server saw it.
    pub(crate) noted: BTreeMap<String, Noted>,
    /// Hosts by the SHA-256 of their key.
    pub(crate) by_key: HashMap<String, HostId>,
    /// How many blocks and claims each host has in each network, and how many foreign peers it speaks to there.
    shares: BTreeMap<NetworkId, BTreeMap<HostId, usize>>,
    endpoints: BTreeMap<NetworkId, BTreeSet<EndpointId>>,
    endpoints_of_host: BTreeMap<HostId, BTreeSet<EndpointId>>,
    by_address: BTreeMap<(NetworkId, IpAddr), EndpointId>,
    /// When claims went, while their addresses rest. A server that starts anew knows of none.
    released: BTreeMap<(NetworkId, IpAddr), Instant>,
    /// The revision that last changed each key of the store.
    modified: HashMap<String, Revision>,
}

/// One object that changed.
#[derive(Debug, Clone)]
pub(crate) struct Changed {
    pub(crate) revision: Revision,
    environment: EnvironmentId,
    pub(crate) key: Key,
    /// The network that the object belongs to, where it belongs to one.
    pub(crate) network: Option<NetworkId>,
    /// The hosts that hold it, or held it before, where it decides who takes part in a network.
    pub(crate) hosts: Vec<HostId>,
}

/// What a change of one key of the store means for those who watch.
struct Meaning {
    key: Key,
    network: Option<NetworkId>,
    hosts: Vec<HostId>,
}

/// Where an object belongs.
#[derive(Default)]
struct Place {
    network: Option<NetworkId>,
    /// Who holds it, where it decides who takes part in a network.
    host: Option<HostId>,
}

impl State {
    /// Reads all of the store.
    pub(crate) async fn load(store: &dyn Store) -> Result<Self, StoreError> {
        let (revision, all) = store.range(keys::ROOT).await?;
        let mut state = Self::default();
        for kv in all {
            state.event(&Event::Put(kv), revision);
        }
        state.changes.clear();
        state.revision = revision;
        state.remembered_since = revision;
        Ok(state)
    }

    /// Takes over the changes of one revision.
    pub(crate) fn apply(&mut self, batch: &Batch) {
        for event in &batch.events {
            self.event(event, batch.revision);
        }
        self.revision = batch.revision;
        while self.changes.len() > REMEMBERED
            && let Some(oldest) = self.changes.pop_front()
        {
            self.remembered_since = oldest.revision;
        }
    }

    /// The changes of an environment's objects after `revision`; `None` where not all of them are remembered.
    pub(crate) fn changes_after<'a>(
        &'a self,
        revision: Revision,
        environment: &'a EnvironmentId,
    ) -> Option<impl Iterator<Item = &'a Changed> + Clone> {
        let start = self.changes.partition_point(|changed| changed.revision <= revision);
        (revision >= self.remembered_since)
            .then(|| self.changes.range(start..).filter(move |changed| changed.environment == *environment))
    }

    fn event(&mut self, event: &Event, revision: Revision) {
        let key = match event {
            Event::Put(kv) => &kv.key,
            Event::Delete(key) => key,
        };
        let Some((id, slot)) = keys::parse(key) else {
            tracing::warn!(key, "the store has a key that this version does not know; it is left alone");
            return;
        };
        let environment = self.environments.entry(id.clone()).or_default();
        let changed = match event {
            Event::Put(kv) => {
                environment.modified.insert(kv.key.clone(), kv.modified);
                environment.put(&slot, kv)
            }
            Event::Delete(key) => {
                environment.modified.remove(key);
                environment.delete(&slot)
            }
        };
        if slot == Slot::Environment && matches!(event, Event::Delete(_)) {
            self.environments.remove(&id);
        }
        if let Some(Meaning { key, network, hosts }) = changed {
            self.changes.push_back(Changed { revision, environment: id, key, network, hosts });
        }
    }
}

impl Environment {
    fn put(&mut self, slot: &Slot, kv: &KeyValue) -> Option<Meaning> {
        let record = match keys::decode(slot, kv) {
            Ok(record) => record,
            Err(error) => {
                tracing::error!(key = kv.key, %error, "the store holds a value that cannot be read; it is left out");
                return None;
            }
        };
        match record {
            Record::Environment | Record::Ca | Record::Index => None,
            Record::Server(id, server) => {
                self.servers.insert(id, server);
                None
            }
            Record::Unreported(id, unreported) => {
                self.unreported.insert(id, unreported);
                None
            }
            Record::Audit(server, id, entry) => {
                self.audit.insert((server, id), (kv.modified, entry));
                None
            }
            Record::Life(id, life) => {
                self.lives.insert(id, life);
                None
            }
            Record::Presence(id, noted) => {
                self.noted.insert(id, noted);
                None
            }
            Record::Report(id, report) => {
                self.reports.insert(id, report);
                None
            }
            Record::Withdrawn(withdrawn) => {
                self.withdrawn.insert((withdrawn.network.clone(), withdrawn.cidr), withdrawn);
                None
            }
            Record::Token(id, token) => {
                self.tokens.insert(id, token);
                None
            }
            Record::ApiKey(name, key) => {
                self.api_keys.insert(name, key);
                None
            }
            Record::Object(object) => {
                let key = object.key();
                let before = self.forget(&key);
                let now = self.learn(&object);
                self.catalog.put(object);
                let hosts: BTreeSet<HostId> = before.host.into_iter().chain(now.host).collect();
                Some(Meaning { key, network: now.network, hosts: hosts.into_iter().collect() })
            }
        }
    }

    fn delete(&mut self, slot: &Slot) -> Option<Meaning> {
        let key = match slot {
            Slot::Environment | Slot::Ca | Slot::Index => return None,
            Slot::Server(id) => {
                self.servers.remove(id);
                return None;
            }
            Slot::Unreported(id) => {
                self.unreported.remove(id);
                return None;
            }
            Slot::Audit(server, id) => {
                self.audit.remove(&(server.clone(), id.clone()));
                return None;
            }
            Slot::Life(id) => {
                self.lives.remove(id);
                return None;
            }
            Slot::Presence(id) => {
                self.noted.remove(id);
                return None;
            }
            Slot::Report(id) => {
                self.reports.remove(id);
                return None;
            }
            Slot::Withdrawn(network, cidr) => {
                self.withdrawn.remove(&(network.clone(), *cidr));
                return None;
            }
            Slot::Token(id) => {
                self.tokens.remove(id);
                return None;
            }
            Slot::ApiKey(name) => {
                self.api_keys.remove(name);
                return None;
            }
            Slot::Network(id) => Key::Network(id.clone()),
            Slot::Host(id) => Key::Host(id.clone()),
            Slot::Block(id, cidr) => Key::Block(id.clone(), *cidr),
            Slot::Claim(id, address) => {
                let now = Instant::now();
                self.released.retain(|_, since| now.saturating_duration_since(*since) < REST);
                self.released.insert((id.clone(), *address), now);
                Key::Claim(id.clone(), *address)
            }
            Slot::Endpoint(id) => Key::Endpoint(id.clone()),
            Slot::Peer(id) => Key::Peer(id.clone()),
        };
        let before = self.forget(&key);
        self.catalog.delete(&key);
        Some(Meaning { key, network: before.network, hosts: before.host.into_iter().collect() })
    }

    /// Adds an object to the indexes; where it belongs.
    fn learn(&mut self, object: &Object) -> Place {
        let (network, host) = match object {
            Object::Network(_) => return Place::default(),
            Object::Host(host) => {
                self.by_key.insert(host.key.clone(), host.id.clone());
                return Place::default();
            }
            Object::Block(block) => (&block.network, &block.host),
            Object::Claim(claim) => (&claim.network, &claim.host),
            Object::Peer(peer) => (&peer.network, &peer.host),
            Object::Endpoint(endpoint) => {
                let id = &endpoint.id;
                self.endpoints.entry(endpoint.network.clone()).or_default().insert(id.clone());
                self.endpoints_of_host.entry(endpoint.host.clone()).or_default().insert(id.clone());
                for address in &endpoint.addresses {
                    self.by_address.insert((endpoint.network.clone(), *address), id.clone());
                }
                return Place { network: Some(endpoint.network.clone()), host: None };
            }
        };
        *self.shares.entry(network.clone()).or_default().entry(host.clone()).or_default() += 1;
        Place { network: Some(network.clone()), host: Some(host.clone()) }
    }

    /// Takes what is there under `key` out of the indexes; where it belonged.
    fn forget(&mut self, key: &Key) -> Place {
        self.try_forget(key).unwrap_or_default()
    }

    fn try_forget(&mut self, key: &Key) -> Option<Place> {
        let (network, host) = match key {
            Key::Network(_) => return None,
            Key::Host(id) => {
                if let Some(host) = self.catalog.hosts.get(id) {
                    self.by_key.remove(&host.key);
                }
                return None;
            }
            Key::Block(network, cidr) => {
                let block = self.catalog.blocks.get(&(network.clone(), *cidr))?;
                (&block.network, &block.host)
            }
            Key::Claim(network, address) => {
                let claim = self.catalog.claims.get(&(network.clone(), *address))?;
                (&claim.network, &claim.host)
            }
            Key::Peer(id) => {
                let peer = self.catalog.peers.get(id)?;
                (&peer.network, &peer.host)
            }
            Key::Endpoint(id) => {
                let endpoint = self.catalog.endpoint(id)?;
                remove_from(&mut self.endpoints, &endpoint.network, id);
                remove_from(&mut self.endpoints_of_host, &endpoint.host, id);
                for address in &endpoint.addresses {
                    let place = (endpoint.network.clone(), *address);
                    if self.by_address.get(&place) == Some(id) {
                        self.by_address.remove(&place);
                    }
                }
                return Some(Place { network: Some(endpoint.network.clone()), host: None });
            }
        };
        let place = Place { network: Some(network.clone()), host: Some(host.clone()) };
        if let Some(shares) = self.shares.get_mut(network) {
            if let Some(count) = shares.get_mut(host) {
                *count -= 1;
                if *count == 0 {
                    shares.remove(host);
                }
            }
            if shares.is_empty() {
                self.shares.remove(network);
            }
        }
        Some(place)
    }

    /// The network of that name or id.
    pub(crate) fn network(&self, name_or_id: &str) -> Option<&Network> {
        let by_id = name_or_id.parse().ok().and_then(|id: NetworkId| self.catalog.networks.get(&id));
        by_id.or_else(|| self.catalog.network_named(name_or_id))
    }

    /// The host of that name or id.
    pub(crate) fn host(&self, name_or_id: &str) -> Option<&Host> {
        let by_id = name_or_id.parse().ok().and_then(|id: HostId| self.catalog.hosts.get(&id));
        by_id.or_else(|| self.catalog.hosts.values().find(|host| host.name.as_str() == name_or_id))
    }

    /// The foreign peer of that name or id.
    pub(crate) fn peer(&self, name_or_id: &str) -> Option<&Peer> {
        let by_id = name_or_id.parse().ok().and_then(|id: PeerId| self.catalog.peers.get(&id));
        by_id.or_else(|| self.catalog.peers.values().find(|peer| peer.name.as_str() == name_or_id))
    }

    /// What people call the host.
    pub(crate) fn host_name<'a>(&'a self, id: &'a HostId) -> &'a str {
        self.catalog.hosts.get(id).map_or(id.as_str(), |host| host.name.as_str())
    }

    /// The blocks of a network, in the order of their addresses.
    pub(crate) fn blocks_of<'a>(&'a self, network: &'a NetworkId) -> impl Iterator<Item = &'a Block> + 'a {
        // The smallest of all CIDRs: IPv4 comes before IPv6.
        let first = (network.clone(), ipnet::IpNet::V4(ipnet::Ipv4Net::default()));
        self.catalog
            .blocks
            .range(first..)
            .take_while(move |((id, _), _)| id == network)
            .map(|(_, block)| block)
    }

    /// The claims of a network, in the order of their addresses.
    pub(crate) fn claims_of<'a>(
        &'a self,
        network: &'a NetworkId,
    ) -> impl Iterator<Item = &'a model::Claim> + 'a {
        let first = (network.clone(), IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED));
        self.catalog
            .claims
            .range(first..)
            .take_while(move |((id, _), _)| id == network)
            .map(|(_, claim)| claim)
    }

    /// The blocks of a network that were given back and are not free yet.
    pub(crate) fn withdrawn_of<'a>(
        &'a self,
        network: &'a NetworkId,
    ) -> impl Iterator<Item = &'a Withdrawn> + 'a {
        self.withdrawn.values().filter(move |withdrawn| withdrawn.network == *network)
    }

    /// The endpoints of a network.
    pub(crate) fn endpoints_of(&self, network: &NetworkId) -> impl Iterator<Item = &Endpoint> {
        self.endpoints.get(network).into_iter().flatten().filter_map(|id| self.catalog.endpoint(id))
    }

    /// The endpoints of a host.
    pub(crate) fn endpoints_of_host(&self, host: &HostId) -> impl Iterator<Item = &Endpoint> {
        self.endpoints_of_host.get(host).into_iter().flatten().filter_map(|id| self.catalog.endpoint(id))
    }

    /// How many endpoints a host has.
    pub(crate) fn endpoint_count(&self, host: &HostId) -> usize {
        self.endpoints_of_host.get(host).map_or(0, BTreeSet::len)
    }

    /// The endpoint that has the address in the network.
    pub(crate) fn holder(&self, network: &NetworkId, address: IpAddr) -> Option<&Endpoint> {
        self.by_address.get(&(network.clone(), address)).and_then(|id| self.catalog.endpoint(id))
    }

    /// The addresses of the network that rest: others may have who had them last in a cache.
    pub(crate) fn resting(&self, network: &NetworkId) -> BTreeSet<IpAddr> {
        let now = Instant::now();
        let of = self.released.iter().filter(|((id, _), _)| id == network);
        let resting = of.filter(|(_, since)| now.saturating_duration_since(**since) < REST);
        resting.map(|((_, address), _)| *address).collect()
    }

    /// The networks that a host takes part in: those where it holds a block or a claim, or speaks to a foreign peer.
    pub(crate) fn networks_of(&self, host: &HostId) -> BTreeSet<NetworkId> {
        let shared = self.shares.iter().filter(|(_, hosts)| hosts.contains_key(host));
        shared.map(|(network, _)| network.clone()).collect()
    }

    /// The hosts that take part in a network.
    pub(crate) fn hosts_of(&self, network: &NetworkId) -> impl Iterator<Item = &HostId> {
        self.shares.get(network).into_iter().flat_map(BTreeMap::keys)
    }

    /// How agents reach the servers.
    pub(crate) fn server_urls(&self) -> Vec<String> {
        let mut urls: Vec<String> = Vec::new();
        for url in self.servers.values().flat_map(|server| &server.urls) {
            if !urls.contains(url) {
                urls.push(url.clone());
            }
        }
        urls
    }

    /// The hosts that have not said what they hold since the store was restored.
    pub(crate) fn silent_since_restore(&self) -> impl Iterator<Item = &HostId> {
        self.unreported.iter().filter(|(_, unreported)| !unreported.followed).map(|(host, _)| host)
    }

    /// What the server of that name says of itself.
    pub(crate) fn server(&self, name: &str) -> Option<&Server> {
        self.servers.get(name)
    }

    /// The revision that last changed a key of the store.
    pub(crate) fn modified(&self, key: &str) -> Option<Revision> {
        self.modified.get(key).copied()
    }
}

fn remove_from<K: Ord>(index: &mut BTreeMap<K, BTreeSet<EndpointId>>, key: &K, id: &EndpointId) {
    if let Some(ids) = index.get_mut(key) {
        ids.remove(id);
        if ids.is_empty() {
            index.remove(key);
        }
    }
}
