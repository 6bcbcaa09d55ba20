//! A foreign peer: a box of another make (strongSwan, a cloud's VPN gateway) that a network is joined to by standard IKEv2
//! and ESP. One host, its gateway, speaks to it; the others reach what is behind it through that host.
//!
//! Invariant: a secret is in the object only where it has to be: in the server's store and at the gateway. What the API
//! shows of a peer is [`Peer::without_secret`].

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::network::unusable;
use crate::{HostId, Name, NetworkId, PeerId, UnixMillis};

/// What a person asks for when joining a foreign peer to a network.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PeerSpec {
    /// Its name, unique in the environment.
    pub name: Name,
    /// Name or id of the network.
    pub network: String,
    /// Name or id of the host that speaks to it. May be left out where the environment has one host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// Its address on the underlay.
    #[schema(value_type = String)]
    pub address: IpAddr,
    /// Its UDP port for IKE; 500, and 4500 from then on (RFC 7296 §2.23), if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// The identity that it proves; its address if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<String>,
    /// The identity that the gateway proves to it; if left out, its underlay address, or with a CA the subject of its
    /// certificate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local_identity: Option<String>,
    /// How each proves itself.
    pub proof: PeerProof,
    /// What is behind it.
    #[schema(value_type = Vec<String>)]
    pub remote_cidrs: Vec<IpNet>,
}

/// A foreign peer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Peer {
    /// Its id here.
    pub id: PeerId,
    /// Its name, unique in the environment.
    pub name: Name,
    /// The network that it is joined to.
    pub network: NetworkId,
    /// The host that speaks to it.
    pub host: HostId,
    /// Its address on the underlay.
    #[schema(value_type = String)]
    pub address: IpAddr,
    /// Its UDP port for IKE, where one was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// The identity that it proves; its address if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<String>,
    /// The identity that the gateway proves to it; if left out, its underlay address, or with a CA the subject of its
    /// certificate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local_identity: Option<String>,
    /// How each proves itself.
    pub proof: PeerProof,
    /// What is behind it.
    #[schema(value_type = Vec<String>)]
    pub remote_cidrs: Vec<IpNet>,
    /// When it was made.
    pub created: UnixMillis,
}

/// How a foreign peer and its gateway prove themselves to each other (RFC 7296 §2.15).
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "by", rename_all = "lowercase")]
pub enum PeerProof {
    /// By a secret that both have.
    Psk {
        /// The secret; `None` where it is not shown.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        secret: Option<String>,
    },
    /// The peer by a certificate of this CA, the gateway by its host certificate.
    Ca {
        /// The CA's certificate, PEM.
        ca: String,
    },
}

impl Peer {
    /// The peer as others than its gateway may see it.
    #[must_use]
    pub fn without_secret(mut self) -> Self {
        if let PeerProof::Psk { secret } = &mut self.proof {
            *secret = None;
        }
        self
    }

    /// Whether a text is an identity that IKE can have (RFC 7296 §3.5): an address, a name, `user@name`, `keyid:TEXT`,
    /// `keyid:0xOCTETS`, or a distinguished name with the attributes that certificates have.
    pub fn is_identity(text: &str) -> bool {
        const ATTRIBUTES: [&str; 11] =
            ["CN", "SN", "C", "L", "ST", "O", "OU", "SERIALNUMBER", "E", "EMAILADDRESS", "DC"];
        let plain =
            |text: &str| !text.is_empty() && !text.chars().any(|c| c.is_whitespace() || c.is_control());
        if let Some(id) = text.strip_prefix("keyid:") {
            return match id.strip_prefix("0x") {
                Some(digits) => {
                    !digits.is_empty()
                        && digits.len().is_multiple_of(2)
                        && digits.bytes().all(|b| b.is_ascii_hexdigit())
                }
                None => !id.is_empty(),
            };
        }
        if text.contains('=') {
            // A comma in a value is written `\,`.
            let text = text.replace("\\\\", "x").replace("\\,", "x");
            return text.split(',').all(|part| {
                part.split_once('=').is_some_and(|(name, value)| {
                    let name = name.trim().to_ascii_uppercase();
                    ATTRIBUTES.contains(&name.as_str()) && !value.trim().is_empty()
                })
            });
        }
        let parts_are_there = match text.split_once('@') {
            Some((_, host)) => !host.is_empty(),
            None => true,
        };
        text.parse::<IpAddr>().is_ok() || (plain(text) && parts_are_there)
    }

    /// The identity that it has to prove, as text.
    pub fn expected_identity(&self) -> String {
        self.identity.clone().unwrap_or_else(|| self.address.to_string())
    }
}

impl std::fmt::Debug for PeerProof {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Psk { .. } => "Psk(not shown)",
            Self::Ca { .. } => "Ca",
        })
    }
}

/// Why a foreign peer cannot be as asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPeer {
    /// Nothing behind it.
    #[error("peer {0:?} needs at least one --remote-cidr: the addresses that are behind it")]
    NoCidr(String),
    /// Bits after the prefix.
    #[error("peer {name:?}: {given} has bits set after its prefix; did you mean {meant}?")]
    HostBits {
        /// The peer.
        name: String,
        /// What was given.
        given: IpNet,
        /// What it may have meant.
        meant: IpNet,
    },
    /// What is behind it is in the network already, or everything.
    #[error("peer {name:?}: {cidr} overlaps {other}; choose another --remote-cidr")]
    Overlap {
        /// The peer.
        name: String,
        /// What was given.
        cidr: IpNet,
        /// What is there already.
        other: String,
    },
    /// IPv6 inside is not there yet.
    #[error(
        "peer {0:?}: {1} is IPv6, which is not supported inside networks yet; give an IPv4 --remote-cidr"
    )]
    Ipv6(String, IpNet),
    /// Multicast, loopback and the like.
    #[error("peer {0:?}: {1} is not usable ({2}); choose another --remote-cidr")]
    Unusable(String, IpNet, &'static str),
    /// No packet reaches it there.
    #[error("peer {0:?}: no box has the address {1} on the underlay; give its own --address")]
    Address(String, IpAddr),
    /// An identity that none can prove.
    #[error(
        "peer {0:?}: an identity is 1 to 255 characters of plain text: an address, a name, user@name, keyid:TEXT, or a \
         distinguished name such as \"C=CH, CN=office\""
    )]
    Identity(String),
    /// No usable secret.
    #[error("peer {0:?}: the secret is shorter than 16 characters; make one with `openssl rand -base64 33`")]
    WeakSecret(String),
    /// Port 0.
    #[error("peer {0:?}: UDP port 0 is not possible; choose 1 to 65535, or leave --port out")]
    Port(String),
}

impl PeerSpec {
    /// Checks what can be checked without knowing other peers. `pool` is that of the network.
    pub fn validate(
        &self,
        id: PeerId,
        network: NetworkId,
        pool: IpNet,
        host: HostId,
        created: UnixMillis,
    ) -> Result<Peer, InvalidPeer> {
        let name = || self.name.to_string();
        if self.remote_cidrs.is_empty() {
            return Err(InvalidPeer::NoCidr(name()));
        }
        for (index, cidr) in self.remote_cidrs.iter().enumerate() {
            if cidr.trunc() != *cidr {
                return Err(InvalidPeer::HostBits { name: name(), given: *cidr, meant: cidr.trunc() });
            }
            if matches!(cidr, IpNet::V6(_)) {
                return Err(InvalidPeer::Ipv6(name(), *cidr));
            }
            if overlap(&pool, cidr) {
                let other = format!("the network's own {pool}");
                return Err(InvalidPeer::Overlap { name: name(), cidr: *cidr, other });
            }
            if let IpNet::V4(v4) = cidr
                && let Some(why) = unusable(*v4)
            {
                return Err(InvalidPeer::Unusable(name(), *cidr, why));
            }
            if let Some(other) = self.remote_cidrs[..index].iter().find(|other| overlap(other, cidr)) {
                let other = format!("{other}, which is given too");
                return Err(InvalidPeer::Overlap { name: name(), cidr: *cidr, other });
            }
        }
        let address = self.address;
        if address.is_unspecified()
            || address.is_multicast()
            || address.is_loopback()
            || pool.contains(&address)
        {
            return Err(InvalidPeer::Address(name(), address));
        }
        let identities = self.identity.iter().chain(&self.local_identity);
        if identities.into_iter().any(|id| {
            let text = id.trim() == id && (1..=255).contains(&id.len()) && !id.chars().any(char::is_control);
            !text || !Peer::is_identity(id)
        }) {
            return Err(InvalidPeer::Identity(name()));
        }
        if let PeerProof::Psk { secret } = &self.proof
            && secret.as_ref().is_none_or(|secret| secret.trim().len() < 16)
        {
            return Err(InvalidPeer::WeakSecret(name()));
        }
        if self.port == Some(0) {
            return Err(InvalidPeer::Port(name()));
        }
        Ok(Peer {
            id,
            name: self.name.clone(),
            network,
            host,
            address: self.address,
            port: self.port,
            identity: self.identity.clone(),
            local_identity: self.local_identity.clone(),
            proof: self.proof.clone(),
            remote_cidrs: self.remote_cidrs.clone(),
            created,
        })
    }
}

fn overlap(one: &IpNet, other: &IpNet) -> bool {
    one.contains(other) || other.contains(one)
}

impl std::fmt::Debug for PeerSpec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PeerSpec")
            .field("name", &self.name)
            .field("proof", &self.proof)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> PeerSpec {
        PeerSpec {
            name: "office".parse().unwrap(),
            network: "managed".to_owned(),
            host: None,
            address: "192.0.2.1".parse().unwrap(),
            port: None,
            identity: None,
            local_identity: None,
            proof: PeerProof::Psk { secret: Some("a long enough secret".to_owned()) },
            remote_cidrs: vec!["192.168.7.0/24".parse().unwrap()],
        }
    }

    fn validate(spec: &PeerSpec) -> Result<Peer, String> {
        let (id, network) = (PeerId::from_random([1; 8]), NetworkId::from_random([2; 8]));
        let pool = "10.42.0.0/16".parse().unwrap();
        spec.validate(id, network, pool, HostId::from_random([3; 8]), 0).map_err(|error| error.to_string())
    }

    #[test]
    fn what_cannot_work_is_refused_with_the_remedy() {
        let error = |change: &dyn Fn(&mut PeerSpec)| {
            let mut spec = spec();
            change(&mut spec);
            validate(&spec).unwrap_err()
        };
        assert!(error(&|it| it.remote_cidrs.clear()).contains("--remote-cidr"));
        assert!(
            error(&|it| it.remote_cidrs = vec!["192.168.7.1/24".parse().unwrap()]).contains("192.168.7.0/24")
        );
        assert!(error(&|it| it.remote_cidrs = vec!["10.42.8.0/24".parse().unwrap()]).contains("overlaps"));
        assert!(error(&|it| it.remote_cidrs = vec!["0.0.0.0/0".parse().unwrap()]).contains("overlaps"));
        let cidrs = |cidrs: &[&str]| cidrs.iter().map(|it| it.parse().unwrap()).collect::<Vec<IpNet>>();
        assert!(error(&|it| it.remote_cidrs = cidrs(&["169.254.0.0/24"])).contains("link-local"));
        let twice = cidrs(&["192.168.7.0/24", "192.168.0.0/16"]);
        assert!(error(&|it| it.remote_cidrs.clone_from(&twice)).contains("overlaps 192.168.7.0/24"));
        for address in ["0.0.0.0", "127.0.0.1", "224.0.0.1", "10.42.0.9"] {
            assert!(error(&|it| it.address = address.parse().unwrap()).contains("its own --address"));
        }
        for identity in
            ["", " office", "a\nb", "CN=", "C=CH, X=y", "two words", "me@", "keyid:", "keyid:0xabc"]
        {
            assert!(error(&|it| it.identity = Some(identity.to_owned())).contains("plain text"));
        }
        assert!(error(&|it| it.remote_cidrs = vec!["fd00::/64".parse().unwrap()]).contains("IPv6"));
        assert!(error(&|it| it.proof = PeerProof::Psk { secret: Some("short".into()) }).contains("openssl"));
        assert!(error(&|it| it.port = Some(0)).contains("port 0"));
    }

    #[test]
    fn a_secret_is_never_printed_and_left_out_for_others() {
        let peer = validate(&spec()).unwrap();
        assert!(!format!("{peer:?} {:?}", spec()).contains("long enough"));
        let json = serde_json::to_string(&peer.without_secret()).unwrap();
        assert!(!json.contains("long enough"), "{json}");
    }
}
