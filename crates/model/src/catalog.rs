//! What an agent holds of the server's state, and the stream that keeps it true.
//!
//! A watch is a sequence of [`Watch`] messages, one JSON text per line: a snapshot first, then deltas. A delta says the
//! revision it leads to; a gap is impossible on one connection, and a new connection resumes by (epoch, revision).
//!
//! Invariant: applying the same messages in the same order gives the same [`Catalog`] on every host.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::{IpNet, Ipv4Net};
use serde::{Deserialize, Serialize};

use crate::{
    Block, Claim, Endpoint, EndpointId, EnvironmentId, Epoch, Host, HostId, Network, NetworkId, Peer, PeerId,
    Revision,
};

/// One line of the watch stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Watch {
    /// Everything the host needs; replaces what it had.
    Snapshot {
        /// The life of the store.
        epoch: Epoch,
        /// The state's number.
        revision: Revision,
        /// The environment.
        environment: EnvironmentId,
        /// Who the server takes the agent for.
        host: HostId,
        /// The domain of names.
        domain: String,
        /// The objects.
        objects: Vec<Object>,
    },
    /// What changed since the previous message.
    Delta {
        /// The state's number after it.
        revision: Revision,
        /// The changes, in order.
        changes: Vec<Change>,
    },
    /// How the servers of the environment are reached, where they say so; replaces what was said before.
    Servers {
        /// Their URLs.
        urls: Vec<String>,
    },
    /// Another agent came with this host's incarnation: the holder shows by a [`crate::Step`] that it lives.
    Prove,
    /// Nothing changed for a while; the connection lives.
    Heartbeat {
        /// The state's number.
        revision: Revision,
    },
}

/// One change of the state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Change {
    /// The object is there, like this.
    Put(Object),
    /// The object is gone, or no longer this host's business.
    Delete(Key),
}

/// One object of the state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "object", rename_all = "lowercase")]
pub enum Object {
    /// A host.
    Host(Host),
    /// A network.
    Network(Network),
    /// A leased block.
    Block(Block),
    /// A claimed address.
    Claim(Claim),
    /// An endpoint.
    Endpoint(Endpoint),
    /// A foreign peer.
    Peer(Peer),
}

/// What names an object of the state.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Key {
    /// A host.
    Host(HostId),
    /// A network.
    Network(NetworkId),
    /// A leased block.
    Block(NetworkId, #[schema(value_type = String)] IpNet),
    /// A claimed address.
    Claim(NetworkId, #[schema(value_type = String)] IpAddr),
    /// An endpoint.
    Endpoint(EndpointId),
    /// A foreign peer.
    Peer(PeerId),
}

impl Change {
    /// What names the object that it is about.
    pub fn key(&self) -> Key {
        match self {
            Self::Put(object) => object.key(),
            Self::Delete(key) => key.clone(),
        }
    }
}

impl Object {
    /// Whether both are one lease or claim, whatever became of it since.
    pub fn is_same_grant(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Claim(one), Self::Claim(other)) => {
                (&one.network, one.address, &one.host, &one.endpoint)
                    == (&other.network, other.address, &other.host, &other.endpoint)
            }
            _ => self == other,
        }
    }

    /// Whether what its host lets go of may come to the server still, given what is known of it `now`: until it is gone or
    /// another's. A retained address that another host asked for is let go of for that one request alone.
    pub fn is_on_its_way(&self, now: Option<&Self>) -> bool {
        match (self, now) {
            (_, None) => false,
            (Self::Claim(one), Some(Self::Claim(now))) if one.wanted.is_some() => one == now,
            (_, Some(now)) => self.is_same_grant(now),
        }
    }

    /// What names it.
    pub fn key(&self) -> Key {
        match self {
            Self::Host(x) => Key::Host(x.id.clone()),
            Self::Network(x) => Key::Network(x.id.clone()),
            Self::Block(x) => Key::Block(x.network.clone(), x.cidr),
            Self::Claim(x) => Key::Claim(x.network.clone(), x.address),
            Self::Endpoint(x) => Key::Endpoint(x.id.clone()),
            Self::Peer(x) => Key::Peer(x.id.clone()),
        }
    }
}

/// The objects, indexed. Those that there may be many of are shared between copies.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Catalog {
    /// All hosts this host has to do with.
    pub hosts: BTreeMap<HostId, Host>,
    /// All networks of the environment.
    pub networks: BTreeMap<NetworkId, Network>,
    /// Blocks of the networks that this host takes part in.
    pub blocks: BTreeMap<(NetworkId, IpNet), Block>,
    /// Claims of the networks that this host takes part in.
    pub claims: BTreeMap<(NetworkId, IpAddr), Claim>,
    /// Endpoints of the networks that this host takes part in.
    pub endpoints: BTreeMap<EndpointId, Arc<Endpoint>>,
    /// Foreign peers of the networks that this host takes part in; with their secrets only at the host that speaks
    /// to them.
    pub peers: BTreeMap<PeerId, Peer>,
}

impl Catalog {
    /// As if no other host and no foreign peer were there.
    #[must_use]
    pub fn alone(&self, host: &HostId) -> Self {
        let mut alone = self.clone();
        alone.hosts.retain(|id, _| id == host);
        alone.blocks.retain(|_, block| block.host == *host);
        alone.claims.retain(|_, claim| claim.host == *host);
        alone.peers.clear();
        alone
    }

    /// A catalog of these objects.
    pub fn from_objects(objects: impl IntoIterator<Item = Object>) -> Self {
        let mut catalog = Self::default();
        for object in objects {
            catalog.put(object);
        }
        catalog
    }

    /// Applies one change.
    pub fn apply(&mut self, change: Change) {
        match change {
            Change::Put(object) => self.put(object),
            Change::Delete(key) => self.delete(&key),
        }
    }

    /// Adds or replaces an object.
    pub fn put(&mut self, object: Object) {
        match object {
            Object::Host(x) => drop(self.hosts.insert(x.id.clone(), x)),
            Object::Network(x) => drop(self.networks.insert(x.id.clone(), x)),
            Object::Block(x) => drop(self.blocks.insert((x.network.clone(), x.cidr), x)),
            Object::Claim(x) => drop(self.claims.insert((x.network.clone(), x.address), x)),
            Object::Endpoint(x) => drop(self.endpoints.insert(x.id.clone(), Arc::new(x))),
            Object::Peer(x) => drop(self.peers.insert(x.id.clone(), x)),
        }
    }

    /// The object of that key.
    pub fn get(&self, key: &Key) -> Option<Object> {
        match key {
            Key::Host(id) => self.hosts.get(id).cloned().map(Object::Host),
            Key::Network(id) => self.networks.get(id).cloned().map(Object::Network),
            Key::Block(id, cidr) => self.blocks.get(&(id.clone(), *cidr)).cloned().map(Object::Block),
            Key::Claim(id, address) => self.claims.get(&(id.clone(), *address)).cloned().map(Object::Claim),
            Key::Endpoint(id) => self.endpoint(id).cloned().map(Object::Endpoint),
            Key::Peer(id) => self.peers.get(id).cloned().map(Object::Peer),
        }
    }

    /// Removes an object, if it is there.
    pub fn delete(&mut self, key: &Key) {
        match key {
            Key::Host(id) => drop(self.hosts.remove(id)),
            Key::Network(id) => drop(self.networks.remove(id)),
            Key::Block(id, cidr) => drop(self.blocks.remove(&(id.clone(), *cidr))),
            Key::Claim(id, address) => drop(self.claims.remove(&(id.clone(), *address))),
            Key::Endpoint(id) => drop(self.endpoints.remove(id)),
            Key::Peer(id) => drop(self.peers.remove(id)),
        }
    }

    /// All objects, hosts and networks first.
    pub fn objects(&self) -> impl Iterator<Item = Object> + '_ {
        let hosts = self.hosts.values().cloned().map(Object::Host);
        let networks = self.networks.values().cloned().map(Object::Network);
        let blocks = self.blocks.values().cloned().map(Object::Block);
        let claims = self.claims.values().cloned().map(Object::Claim);
        let endpoints = self.endpoints().cloned().map(Object::Endpoint);
        let peers = self.peers.values().cloned().map(Object::Peer);
        hosts.chain(networks).chain(blocks).chain(claims).chain(endpoints).chain(peers)
    }

    /// The network of that name.
    pub fn network_named(&self, name: &str) -> Option<&Network> {
        self.networks.values().find(|network| network.name.as_str() == name)
    }

    /// The endpoint of that id.
    pub fn endpoint(&self, id: &EndpointId) -> Option<&Endpoint> {
        self.endpoints.get(id).map(Arc::as_ref)
    }

    /// All endpoints.
    pub fn endpoints(&self) -> impl Iterator<Item = &Endpoint> {
        self.endpoints.values().map(Arc::as_ref)
    }

    /// The blocks of a network, in the order of their addresses.
    pub fn blocks_of<'a>(&'a self, network: &'a NetworkId) -> impl Iterator<Item = &'a Block> + 'a {
        let first = (network.clone(), IpNet::V4(Ipv4Net::default()));
        self.blocks.range(first..).map(|(_, block)| block).take_while(move |block| block.network == *network)
    }

    /// The networks in which `host` speaks to foreign peers. It needs a router there, with or without endpoints.
    pub fn gateway_of<'a>(&'a self, host: &'a HostId) -> impl Iterator<Item = &'a NetworkId> + 'a {
        self.peers.values().filter(move |peer| peer.host == *host).map(|peer| &peer.network)
    }

    /// The address of `host`'s router in `network`: in its oldest block there, or the one it claimed for it while there was
    /// no block to be had.
    pub fn router_address(&self, network: &NetworkId, host: &HostId) -> Option<IpAddr> {
        let oldest = self
            .blocks_of(network)
            .filter(|block| block.host == *host)
            .min_by_key(|block| (block.leased, block.cidr));
        let claimed = || self.claims_of(network).find(|claim| claim.router && claim.host == *host);
        oldest.map(Block::router_address).or_else(|| claimed().map(|claim| claim.address))
    }

    /// The claims of a network that were granted, in the order of their addresses.
    pub fn claims_of<'a>(&'a self, network: &'a NetworkId) -> impl Iterator<Item = &'a Claim> + 'a {
        let first = (network.clone(), IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED));
        let claims = self.claims.range(first..).map(|(_, claim)| claim);
        claims.take_while(move |claim| claim.network == *network).filter(|claim| !claim.asked)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watch_line_reads_back_as_it_was_written() {
        let network = NetworkId::from_random([3; 8]);
        let block = Block {
            network: network.clone(),
            cidr: "10.42.16.0/26".parse().unwrap(),
            host: HostId::from_random([4; 8]),
            leased: Revision(9),
        };
        let endpoint = Endpoint {
            id: EndpointId::from_random([5; 8]),
            network: network.clone(),
            host: HostId::from_random([4; 8]),
            name: Some("db".parse().unwrap()),
            stack: None,
            service: None,
            aliases: vec![],
            addresses: vec!["10.42.16.2".parse().unwrap()],
            mac: crate::Mac([2, 0, 0, 0, 0, 1]),
            kind: crate::EndpointKind::Docker,
            container: None,
            labels: BTreeMap::new(),
            ports: vec![],
            healthy: true,
            created: 1,
        };
        let message = Watch::Delta {
            revision: Revision(10),
            changes: vec![
                Change::Put(Object::Endpoint(endpoint)),
                Change::Put(Object::Block(block.clone())),
                Change::Delete(Key::Block(network.clone(), block.cidr)),
                Change::Delete(Key::Network(network)),
            ],
        };
        let line = serde_json::to_string(&message).unwrap();
        assert!(!line.contains('\n'));
        assert_eq!(serde_json::from_str::<Watch>(&line).unwrap(), message);
    }

    #[test]
    fn the_router_lives_in_the_oldest_block() {
        let (network, host) = (NetworkId::from_random([3; 8]), HostId::from_random([4; 8]));
        let block = |cidr: &str, leased| Block {
            network: network.clone(),
            cidr: cidr.parse().unwrap(),
            host: host.clone(),
            leased: Revision(leased),
        };
        let mut catalog = Catalog::default();
        catalog.put(Object::Block(block("10.42.16.0/26", 20)));
        catalog.put(Object::Block(block("10.42.99.0/26", 10)));
        assert_eq!(catalog.router_address(&network, &host), Some("10.42.99.1".parse().unwrap()));
        catalog.apply(Change::Delete(Key::Block(network.clone(), "10.42.99.0/26".parse().unwrap())));
        assert_eq!(catalog.router_address(&network, &host), Some("10.42.16.1".parse().unwrap()));
    }
}
