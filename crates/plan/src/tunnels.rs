//! The tunnels wanted: to whom, at which addresses, who begins, and what may be inside. A function of the snapshot, like
//! the kernel objects beside it.
//!
//! Invariant: what a peer may send (and what is sent to it) is what the snapshot says is at that peer, and nothing else
//! (RFC 4301 §5.2). Two peers never have the same address.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use model::{
    Candidate, Catalog, Driver, Host, HostId, MANAGED_NETWORK, Name, Network, NetworkId, Peer, PeerId,
    Source, TUNNEL_PORT,
};

use crate::desired::Local;

/// Who is at the other end of a tunnel.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Far {
    /// Another host.
    Host(HostId),
    /// A foreign peer.
    Peer(PeerId),
}

impl Far {
    /// The id as text.
    pub fn as_str(&self) -> &str {
        match self {
            Self::Host(id) => id.as_str(),
            Self::Peer(id) => id.as_str(),
        }
    }
}

/// A tunnel wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tunnel {
    /// The peer's name.
    pub name: Name,
    /// Where it may be, in the order to try.
    pub addresses: Vec<SocketAddr>,
    /// Who begins.
    pub begins: Begins,
    /// What proves who it is.
    pub proof: Proof,
    /// What may be inside: a CHILD_SA for each network.
    pub inside: BTreeMap<NetworkId, Inside>,
}

impl Tunnel {
    /// Where the peer may come from, as far as that is known.
    pub fn sources(&self) -> impl Iterator<Item = IpAddr> + '_ {
        let observed = match &self.begins {
            Begins::PeerOnly { from, .. } => *from,
            Begins::We | Begins::PeerFirst | Begins::Nobody { .. } => None,
        };
        self.addresses.iter().map(SocketAddr::ip).chain(observed)
    }
}

/// Who sends the first message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Begins {
    /// We do.
    We,
    /// The peer should, and we do if it has not after a moment.
    PeerFirst,
    /// Only the peer can.
    PeerOnly {
        /// Why, for people.
        why: String,
        /// Where it comes from, as the server sees it.
        from: Option<IpAddr>,
    },
    /// Nobody can.
    Nobody {
        /// Why, for people.
        why: String,
    },
}

/// What proves who the peer is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Proof {
    /// The key whose SubjectPublicKeyInfo has this SHA-256, hexadecimal.
    Key(String),
    /// What was agreed with a foreign peer.
    Foreign(Box<Peer>),
}

/// What may be inside a tunnel of one network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inside {
    /// What tells the network from others towards the peer (RFC 9478); `None` for the default one and for foreign
    /// peers.
    pub label: Option<String>,
    /// What is at the peer: sources of what comes, destinations of what goes.
    pub theirs: Vec<IpNet>,
    /// What of the network is at this side.
    pub ours: Vec<IpNet>,
}

/// The tunnels that this host should have.
pub fn tunnels(catalog: &Catalog, local: &Local) -> BTreeMap<Far, Tunnel> {
    let mut wanted = BTreeMap::new();
    let Some(own) = catalog.hosts.get(&local.host) else { return wanted };
    for network in catalog.networks.values().filter(|it| it.driver == Driver::Ipsec) {
        let members: BTreeSet<&HostId> = members(catalog, network);
        if !members.contains(&local.host) {
            continue;
        }
        for host in members.into_iter().filter(|id| **id != local.host) {
            let Some(far) = catalog.hosts.get(host) else { continue };
            let tunnel = wanted.entry(Far::Host(host.clone())).or_insert_with(|| to_host(own, far));
            let inside = Inside {
                label: (network.name.as_str() != MANAGED_NETWORK).then(|| network.id.to_string()),
                theirs: at_host(catalog, network, host),
                ours: at_host(catalog, network, &local.host),
            };
            tunnel.inside.insert(network.id.clone(), inside);
        }
        for peer in peers_of(catalog, network).filter(|peer| peer.host == local.host) {
            let tunnel = Tunnel {
                name: peer.name.clone(),
                addresses: vec![SocketAddr::new(peer.address, peer.port.unwrap_or(IKE_PORT))],
                begins: Begins::We,
                proof: Proof::Foreign(Box::new(peer.clone())),
                inside: BTreeMap::from([(
                    network.id.clone(),
                    Inside { label: None, theirs: peer.remote_cidrs.clone(), ours: network.cidrs.clone() },
                )]),
            };
            wanted.insert(Far::Peer(peer.id.clone()), tunnel);
        }
    }
    wanted
}

/// IKE's own port (RFC 7296 §2).
const IKE_PORT: u16 = 500;

fn members<'a>(catalog: &'a Catalog, network: &'a Network) -> BTreeSet<&'a HostId> {
    let blocks = catalog.blocks_of(&network.id).map(|block| &block.host);
    let claims = catalog.claims_of(&network.id).map(|claim| &claim.host);
    blocks.chain(claims).collect()
}

fn peers_of<'a>(catalog: &'a Catalog, network: &'a Network) -> impl Iterator<Item = &'a Peer> {
    catalog.peers.values().filter(|peer| peer.network == network.id)
}

/// What of a network is at a host: its blocks, its claims, and what is behind the foreign peers it speaks to. A claim of
/// another host inside one of its blocks is more specific, and wins where routes are looked up.
fn at_host(catalog: &Catalog, network: &Network, host: &HostId) -> Vec<IpNet> {
    let blocks = catalog.blocks_of(&network.id).filter(|block| block.host == *host).map(|block| block.cidr);
    let claims = catalog.claims_of(&network.id).filter(|claim| claim.host == *host);
    let behind = peers_of(catalog, network).filter(|peer| peer.host == *host);
    let behind = behind.flat_map(|peer| peer.remote_cidrs.iter().copied());
    blocks.chain(claims.map(|claim| claim.address.into())).chain(behind).collect()
}

fn to_host(own: &Host, far: &Host) -> Tunnel {
    let (addresses, begins) = reach(own, far);
    Tunnel {
        name: far.name.clone(),
        addresses,
        begins,
        proof: Proof::Key(far.key.clone()),
        inside: BTreeMap::new(),
    }
}

/// Where the other host is to be tried, and who begins. The lower id does, unless a NAT decides.
fn reach(own: &Host, far: &Host) -> (Vec<SocketAddr>, Begins) {
    let addresses = |with: &dyn Fn(&Candidate) -> bool| -> Vec<SocketAddr> {
        let candidates = far.candidates.iter().filter(|candidate| with(candidate));
        candidates.map(|it| SocketAddr::new(it.address, it.port.unwrap_or(TUNNEL_PORT))).collect()
    };
    let by_id = if own.id < far.id { Begins::We } else { Begins::PeerFirst };
    let not_observed = |candidate: &Candidate| candidate.source != Source::Observed;
    match (own.behind_nat(), far.behind_nat()) {
        (false, false) => (addresses(&not_observed), by_id),
        (true, false) => (addresses(&not_observed), Begins::We),
        (false, true) => {
            let why = format!("host {} is behind a NAT and begins itself", far.name);
            (Vec::new(), Begins::PeerOnly { why, from: far.outside().map(|candidate| candidate.address) })
        }
        (true, true) => {
            let outside = |host: &Host| host.outside().map(|candidate| candidate.address);
            if outside(own) == outside(far) {
                // Behind the same NAT they reach each other directly.
                return (addresses(&not_observed), by_id);
            }
            let at = |host: &Host| outside(host).map_or_else(String::new, |address| format!(" ({address})"));
            let why = format!(
                "this host{} and host {}{} are behind different NATs, so neither can reach the other; give one of them an \
                 address that can be reached, with `droveway agent --address`",
                at(own),
                far.name,
                at(far)
            );
            (Vec::new(), Begins::Nobody { why })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::{Block, NetworkSpec, Object, Revision};

    fn host(n: u8, addresses: &[(&str, Source)]) -> Host {
        let candidate = |(address, source): &(&str, Source)| Candidate {
            address: address.parse().unwrap(),
            port: None,
            mtu: 1500,
            source: *source,
        };
        Host {
            id: HostId::from_random([n; 8]),
            name: format!("h{n}").parse().unwrap(),
            candidates: addresses.iter().map(candidate).collect(),
            labels: BTreeMap::new(),
            key: "00".repeat(32),
            joined: 0,
        }
    }

    fn local(host: &Host) -> Local {
        let host = host.id.clone();
        Local {
            host,
            underlay: None,
            routers: BTreeMap::new(),
            shortcut: false,
            attachments: BTreeMap::new(),
            spare: BTreeSet::new(),
        }
    }

    fn catalog(hosts: &[&Host], driver: &str) -> Catalog {
        let mut spec = NetworkSpec::new(MANAGED_NETWORK.parse().unwrap(), "10.42.0.0/16".parse().unwrap());
        spec.driver = Some(driver.to_owned());
        let network = spec.validate(NetworkId::from_random([9; 8]), 1, 0).unwrap();
        let mut catalog = Catalog::from_objects([Object::Network(network.clone())]);
        for (index, host) in hosts.iter().enumerate() {
            let cidr = format!("10.42.{index}.0/26").parse().unwrap();
            let (network, host_id) = (network.id.clone(), host.id.clone());
            catalog.put(Object::Block(Block { network, cidr, host: host_id, leased: Revision(1) }));
            catalog.put(Object::Host((*host).clone()));
        }
        catalog
    }

    fn only(catalog: &Catalog, own: &Host) -> Tunnel {
        let mut all = tunnels(catalog, &local(own));
        assert_eq!(all.len(), 1);
        all.pop_first().unwrap().1
    }

    #[test]
    fn hosts_that_share_an_encrypted_network_have_a_tunnel_and_one_side_begins() {
        let (a, b) = (host(1, &[("192.0.2.1", Source::Route)]), host(2, &[("192.0.2.2", Source::Route)]));
        let shared = catalog(&[&a, &b], "ipsec");
        let (of_a, of_b) = (only(&shared, &a), only(&shared, &b));
        assert_eq!(of_a.addresses, ["192.0.2.2:4500".parse().unwrap()]);
        assert_eq!([&of_a.begins, &of_b.begins].iter().filter(|it| ***it == Begins::We).count(), 1);
        let inside = of_a.inside.values().next().unwrap();
        assert_eq!(inside.label, None, "the default network");
        assert_eq!(inside.theirs, ["10.42.1.0/26".parse().unwrap()]);
        assert_eq!(inside.ours, ["10.42.0.0/26".parse().unwrap()]);
        assert!(tunnels(&catalog(&[&a, &b], "vxlan"), &local(&a)).is_empty(), "VXLAN needs none");
    }

    #[test]
    fn the_one_behind_a_nat_begins_and_two_behind_different_nats_say_why_they_wait() {
        let public = host(9, &[("192.0.2.9", Source::Route)]);
        let inside = host(1, &[("10.0.0.1", Source::Route), ("198.51.100.1", Source::Observed)]);
        let beside = host(2, &[("10.0.0.2", Source::Route), ("198.51.100.1", Source::Observed)]);
        let elsewhere = host(3, &[("10.0.0.1", Source::Route), ("198.51.100.3", Source::Observed)]);
        let pair = |own: &Host, far: &Host| only(&catalog(&[own, far], "ipsec"), own);
        assert_eq!(pair(&inside, &public).begins, Begins::We);
        assert!(matches!(pair(&public, &inside).begins, Begins::PeerOnly { .. }));
        assert!(pair(&public, &inside).sources().eq(["198.51.100.1".parse::<IpAddr>().unwrap()]));
        assert_ne!(pair(&inside, &beside).begins, pair(&beside, &inside).begins);
        assert_eq!(pair(&inside, &beside).addresses, ["10.0.0.2:4500".parse().unwrap()]);
        let Begins::Nobody { why } = pair(&inside, &elsewhere).begins else { panic!() };
        assert!(why.contains("--address") && why.contains("198.51.100.3"), "{why}");
    }
}
