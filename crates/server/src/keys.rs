//! How the state is laid out in the store, and back.
//!
//! ```text
//! /droveway/{environment}/environment              made when the environment is
//! /droveway/{environment}/ca                       the CA's certificate, PEM
//! /droveway/{environment}/servers/{id}             Server
//! /droveway/{environment}/unreported/{host}        Unreported: a host that has not said what it holds since a restore
//! /droveway/{environment}/incarnations/{host}      Life: which start of the host's agent counts
//! /droveway/{environment}/presence/{server}        Noted: who was there, as a server saw it
//! /droveway/{environment}/networks/{id}            Network          names/network/{name}, names/vni/{port}-{vni}
//! /droveway/{environment}/hosts/{id}               Host             names/host/{name}, names/key/{key}
//! /droveway/{environment}/reports/{host}           Report
//! /droveway/{environment}/blocks/{network}/{cidr}  Block            `/` of the CIDR written `-`
//! /droveway/{environment}/claims/{network}/{address} Claim
//! /droveway/{environment}/withdrawn/{network}/{cidr} Withdrawn
//! /droveway/{environment}/endpoints/{id}           Endpoint
//! /droveway/{environment}/peers/{id}               Peer, with its secret        names/peer/{name}
//! /droveway/{environment}/tokens/{id}              Token
//! /droveway/{environment}/keys/{name}              ApiKey
//! /droveway/{environment}/audit/{server}/{id}      Entry: a change that is to be in that server's audit log
//! ```
//! Values are JSON. What must be unique has a key of its own under `names`, made in the same transaction.

use std::net::IpAddr;

use ipnet::IpNet;
use model::api::{HostRoute, Role};
use model::{
    Block, Claim, Endpoint, EndpointId, EnvironmentId, Fingerprint, Host, HostId, Name, Network, NetworkId,
    Object, Peer, PeerId, Revision, UnixMillis, Withdrawn,
};
use serde::{Deserialize, Serialize};

use crate::incarnation::Life;
use crate::outbox::Entry;
use crate::presence::Noted;
use crate::store::{KeyValue, Op};

/// Before every key.
pub(crate) const ROOT: &str = "/droveway/";
/// Where nothing is: to ask the store whether it answers.
pub(crate) const READINESS: &str = "/droveway-readiness/";

/// What a host said of itself that is nobody else's business.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Report {
    #[serde(default)]
    pub(crate) routes: Vec<HostRoute>,
    #[serde(default)]
    pub(crate) version: String,
}

/// A join token, without its secret.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Token {
    /// SHA-256 of the secret.
    pub(crate) hash: Fingerprint,
    pub(crate) created: UnixMillis,
    pub(crate) expires: UnixMillis,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) uses_left: Option<u32>,
    pub(crate) used: u32,
    /// Kept until it would have expired: whoever comes with it is told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) revoked: Option<UnixMillis>,
}

impl Token {
    /// Whether it still lets a host in.
    pub(crate) fn is_good(&self, now: UnixMillis) -> bool {
        self.revoked.is_none() && self.expires > now && self.uses_left != Some(0)
    }
}

/// A key that people authenticate with, without the key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ApiKey {
    /// SHA-256 of the key's text.
    pub(crate) hash: Fingerprint,
    pub(crate) created: UnixMillis,
    #[serde(default)]
    pub(crate) role: Role,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) expires: Option<UnixMillis>,
}

impl ApiKey {
    pub(crate) fn has_ended(&self, now: UnixMillis) -> bool {
        self.expires.is_some_and(|expires| expires <= now)
    }
}

/// What a server says of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Server {
    /// How agents reach it.
    pub(crate) urls: Vec<String>,
    /// Which of its starts goes by its name; empty where nobody else can.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(crate) start: String,
    /// Whether that one ended, and said so.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) ended: bool,
    /// That somebody asks whether that one lives: it takes this away.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) asked: Option<String>,
}

/// A host that has not said what it holds since the store was restored, or since a copy of it was taken for it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Unreported {
    /// When that was.
    pub(crate) since: UnixMillis,
    /// A copy was taken for it for a while. Nobody but itself waits for what it says.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) followed: bool,
}

/// What a key of the store names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Slot {
    Environment,
    Ca,
    Server(String),
    Unreported(HostId),
    Life(HostId),
    Presence(String),
    Network(NetworkId),
    Host(HostId),
    Report(HostId),
    Block(NetworkId, IpNet),
    Claim(NetworkId, IpAddr),
    Withdrawn(NetworkId, IpNet),
    Endpoint(EndpointId),
    Peer(PeerId),
    Token(String),
    ApiKey(String),
    /// A change on its way into a server's audit log.
    Audit(String, String),
    /// An index key: read by nobody, compared by transactions.
    Index,
}

/// What a key of the store holds.
#[derive(Debug, Clone)]
pub(crate) enum Record {
    Object(Object),
    Report(HostId, Report),
    Withdrawn(Withdrawn),
    Token(String, Token),
    ApiKey(String, ApiKey),
    Server(String, Server),
    Unreported(HostId, Unreported),
    Audit(String, String, Entry),
    Life(HostId, Life),
    Presence(String, Noted),
    Environment,
    /// The CA's certificate, which is looked at when a server starts.
    Ca,
    Index,
}

/// The keys of one environment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Keys<'a>(pub(crate) &'a EnvironmentId);

impl Keys<'_> {
    fn at(self, rest: &str) -> String {
        format!("{ROOT}{}/{rest}", self.0)
    }
    pub(crate) fn environment(self) -> String {
        self.at("environment")
    }
    pub(crate) fn ca(self) -> String {
        self.at("ca")
    }
    pub(crate) fn server(self, id: &str) -> String {
        self.at(&format!("servers/{id}"))
    }
    pub(crate) fn unreported(self, id: &HostId) -> String {
        self.at(&format!("unreported/{id}"))
    }
    pub(crate) fn life(self, id: &HostId) -> String {
        self.at(&format!("incarnations/{id}"))
    }
    pub(crate) fn presence(self, server: &str) -> String {
        self.at(&format!("presence/{server}"))
    }
    pub(crate) fn network(self, id: &NetworkId) -> String {
        self.at(&format!("networks/{id}"))
    }
    pub(crate) fn networks(self) -> String {
        self.at("networks/")
    }
    pub(crate) fn network_name(self, name: &Name) -> String {
        self.at(&format!("names/network/{name}"))
    }
    pub(crate) fn vni(self, port: u16, vni: u32) -> String {
        self.at(&format!("names/vni/{port}-{vni}"))
    }
    pub(crate) fn host(self, id: &HostId) -> String {
        self.at(&format!("hosts/{id}"))
    }
    pub(crate) fn host_name(self, name: &Name) -> String {
        self.at(&format!("names/host/{name}"))
    }
    pub(crate) fn host_key(self, key: &str) -> String {
        self.at(&format!("names/key/{key}"))
    }
    pub(crate) fn report(self, id: &HostId) -> String {
        self.at(&format!("reports/{id}"))
    }
    pub(crate) fn reports(self) -> String {
        self.at("reports/")
    }
    pub(crate) fn block(self, network: &NetworkId, cidr: &IpNet) -> String {
        self.at(&format!("blocks/{network}/{}-{}", cidr.network(), cidr.prefix_len()))
    }
    pub(crate) fn blocks(self, network: &NetworkId) -> String {
        self.at(&format!("blocks/{network}/"))
    }
    pub(crate) fn claim(self, network: &NetworkId, address: &IpAddr) -> String {
        self.at(&format!("claims/{network}/{address}"))
    }
    pub(crate) fn claims(self, network: &NetworkId) -> String {
        self.at(&format!("claims/{network}/"))
    }
    pub(crate) fn all_blocks(self) -> String {
        self.at("blocks/")
    }
    pub(crate) fn all_claims(self) -> String {
        self.at("claims/")
    }
    pub(crate) fn withdrawn(self, network: &NetworkId, cidr: &IpNet) -> String {
        self.at(&format!("withdrawn/{network}/{}-{}", cidr.network(), cidr.prefix_len()))
    }
    pub(crate) fn all_withdrawn(self, network: &NetworkId) -> String {
        self.at(&format!("withdrawn/{network}/"))
    }
    pub(crate) fn endpoint(self, id: &EndpointId) -> String {
        self.at(&format!("endpoints/{id}"))
    }
    pub(crate) fn endpoints(self) -> String {
        self.at("endpoints/")
    }
    pub(crate) fn peer(self, id: &PeerId) -> String {
        self.at(&format!("peers/{id}"))
    }
    pub(crate) fn peers(self) -> String {
        self.at("peers/")
    }
    pub(crate) fn peer_name(self, name: &Name) -> String {
        self.at(&format!("names/peer/{name}"))
    }
    pub(crate) fn token(self, id: &str) -> String {
        self.at(&format!("tokens/{id}"))
    }
    pub(crate) fn api_key(self, name: &str) -> String {
        self.at(&format!("keys/{name}"))
    }
    pub(crate) fn audit(self, server: &str, id: &str) -> String {
        self.at(&format!("audit/{server}/{id}"))
    }
}

/// Whether what is at a key is secret: nothing of it may be left once it is deleted.
pub(crate) fn is_secret(key: &str) -> bool {
    matches!(parse(key), Some((_, Slot::Peer(_))))
}

/// An operation that puts `value` at `key`.
pub(crate) fn put(key: String, value: &impl Serialize) -> Result<Op, serde_json::Error> {
    Ok(Op::Put(key, serde_json::to_vec(value)?))
}

/// What a key names; `None` for one that this version does not know.
pub(crate) fn parse(key: &str) -> Option<(EnvironmentId, Slot)> {
    let mut parts = key.strip_prefix(ROOT)?.split('/');
    let environment = parts.next()?.parse().ok()?;
    let slot = match (parts.next()?, parts.next(), parts.next()) {
        ("environment", None, None) => Slot::Environment,
        ("ca", None, None) => Slot::Ca,
        ("servers", Some(id), None) => Slot::Server(id.to_owned()),
        ("unreported", Some(id), None) => Slot::Unreported(id.parse().ok()?),
        ("incarnations", Some(id), None) => Slot::Life(id.parse().ok()?),
        ("presence", Some(id), None) => Slot::Presence(id.to_owned()),
        ("networks", Some(id), None) => Slot::Network(id.parse().ok()?),
        ("hosts", Some(id), None) => Slot::Host(id.parse().ok()?),
        ("reports", Some(id), None) => Slot::Report(id.parse().ok()?),
        ("blocks", Some(id), Some(cidr)) => Slot::Block(id.parse().ok()?, block(cidr)?),
        ("withdrawn", Some(id), Some(cidr)) => Slot::Withdrawn(id.parse().ok()?, block(cidr)?),
        ("claims", Some(id), Some(address)) => Slot::Claim(id.parse().ok()?, address.parse().ok()?),
        ("endpoints", Some(id), None) => Slot::Endpoint(id.parse().ok()?),
        ("peers", Some(id), None) => Slot::Peer(id.parse().ok()?),
        ("tokens", Some(id), None) => Slot::Token(id.to_owned()),
        ("keys", Some(name), None) => Slot::ApiKey(name.to_owned()),
        ("audit", Some(server), Some(id)) => Slot::Audit(server.to_owned(), id.to_owned()),
        ("names", Some(_), Some(_)) => Slot::Index,
        _ => return None,
    };
    parts.next().is_none().then_some((environment, slot))
}

fn block(text: &str) -> Option<IpNet> {
    let (base, prefix) = text.split_once('-')?;
    IpNet::new(base.parse().ok()?, prefix.parse().ok()?).ok()
}

/// What a key holds. A block's place in the order of leases is the revision that made its key, or the one in its value if
/// it was leased in a life of the store before this one.
pub(crate) fn decode(slot: &Slot, kv: &KeyValue) -> Result<Record, serde_json::Error> {
    let value = &kv.value;
    Ok(match slot {
        Slot::Environment => Record::Environment,
        Slot::Index => Record::Index,
        Slot::Ca => Record::Ca,
        Slot::Server(id) => Record::Server(id.clone(), serde_json::from_slice(value)?),
        Slot::Unreported(id) => Record::Unreported(id.clone(), serde_json::from_slice(value)?),
        Slot::Life(id) => Record::Life(id.clone(), serde_json::from_slice(value)?),
        Slot::Presence(id) => Record::Presence(id.clone(), serde_json::from_slice(value)?),
        Slot::Network(_) => Record::Object(Object::Network(serde_json::from_slice::<Network>(value)?)),
        Slot::Host(_) => Record::Object(Object::Host(serde_json::from_slice::<Host>(value)?)),
        Slot::Block(..) => {
            let block: Block = serde_json::from_slice(value)?;
            let leased = if block.leased == Revision::default() { kv.created } else { block.leased };
            Record::Object(Object::Block(Block { leased, ..block }))
        }
        Slot::Withdrawn(..) => {
            let withdrawn: Withdrawn = serde_json::from_slice(value)?;
            Record::Withdrawn(Withdrawn { at: kv.created, ..withdrawn })
        }
        Slot::Claim(..) => Record::Object(Object::Claim(serde_json::from_slice::<Claim>(value)?)),
        Slot::Peer(_) => Record::Object(Object::Peer(serde_json::from_slice::<Peer>(value)?)),
        Slot::Endpoint(_) => Record::Object(Object::Endpoint(serde_json::from_slice::<Endpoint>(value)?)),
        Slot::Report(id) => Record::Report(id.clone(), serde_json::from_slice(value)?),
        Slot::Token(id) => Record::Token(id.clone(), serde_json::from_slice(value)?),
        Slot::ApiKey(name) => Record::ApiKey(name.clone(), serde_json::from_slice(value)?),
        Slot::Audit(server, id) => Record::Audit(server.clone(), id.clone(), serde_json::from_slice(value)?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_reads_back_as_what_it_names() {
        let environment = EnvironmentId::default();
        let keys = Keys(&environment);
        let (network, host) = (NetworkId::from_random([1; 8]), HostId::from_random([2; 8]));
        let (endpoint, peer) = (EndpointId::from_random([3; 8]), PeerId::from_random([4; 8]));
        let cidr: IpNet = "10.42.16.0/26".parse().unwrap();
        let address: IpAddr = "fd00::5".parse().unwrap();
        for (key, slot) in [
            (keys.environment(), Slot::Environment),
            (keys.ca(), Slot::Ca),
            (keys.server("ab"), Slot::Server("ab".into())),
            (keys.unreported(&host), Slot::Unreported(host.clone())),
            (keys.life(&host), Slot::Life(host.clone())),
            (keys.presence("ab"), Slot::Presence("ab".into())),
            (keys.network(&network), Slot::Network(network.clone())),
            (keys.host(&host), Slot::Host(host.clone())),
            (keys.withdrawn(&network, &cidr), Slot::Withdrawn(network.clone(), cidr)),
            (keys.report(&host), Slot::Report(host.clone())),
            (keys.block(&network, &cidr), Slot::Block(network.clone(), cidr)),
            (keys.claim(&network, &address), Slot::Claim(network.clone(), address)),
            (keys.endpoint(&endpoint), Slot::Endpoint(endpoint.clone())),
            (keys.peer(&peer), Slot::Peer(peer.clone())),
            (keys.token("ab"), Slot::Token("ab".into())),
            (keys.api_key("admin"), Slot::ApiKey("admin".into())),
            (keys.audit("ab", "cd"), Slot::Audit("ab".into(), "cd".into())),
            (keys.vni(4789, 1), Slot::Index),
            (keys.host_name(&"h1".parse().unwrap()), Slot::Index),
            (keys.peer_name(&"office".parse().unwrap()), Slot::Index),
        ] {
            assert_eq!(parse(&key), Some((environment.clone(), slot)), "{key}");
        }
        assert!(is_secret(&keys.peer(&peer)) && !is_secret(&keys.host(&host)));
        for foreign in ["/other/default/networks/x", "/droveway/default", "/droveway/default/hosts/x/y", ""] {
            assert_eq!(parse(foreign), None, "{foreign}");
        }
    }
}
