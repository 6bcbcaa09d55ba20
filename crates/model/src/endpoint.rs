//! One attachment of a container to a network.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::{EndpointId, HostId, Mac, Name, NetworkId, UnixMillis};

/// One attachment of a container to a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Endpoint {
    /// Its identity.
    pub id: EndpointId,
    /// The network it is attached to.
    pub network: NetworkId,
    /// The host it lives on.
    pub host: HostId,
    /// The container's name, once it is known (Docker tells it after the attachment).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<Name>,
    /// The stack it belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stack: Option<Name>,
    /// The service of that stack it is an instance of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub service: Option<Name>,
    /// Other names by which it is known on this network (Docker's `--network-alias`).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub aliases: Vec<Name>,
    /// Its addresses, without prefix.
    #[schema(value_type = Vec<String>)]
    pub addresses: Vec<IpAddr>,
    /// Its Ethernet address, stable for its life.
    pub mac: Mac,
    /// Who attached it.
    pub kind: EndpointKind,
    /// The container's id in its engine, where there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub container: Option<String>,
    /// The container's labels.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// Ports published on the host.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ports: Vec<PublishedPort>,
    /// Whether names may answer with it.
    #[serde(default = "yes")]
    pub healthy: bool,
    /// When it was attached.
    pub created: UnixMillis,
}

impl Endpoint {
    /// For whom its address is retained, where its label asks for that and it has a name to be known by.
    pub fn retained_for(
        labels: &BTreeMap<String, String>,
        stack: Option<&Name>,
        service: Option<&Name>,
        name: Option<&Name>,
    ) -> Option<String> {
        let asks = labels.get(crate::RETAIN).is_some_and(|value| value == "true");
        let parts = [stack, service, Some(name?)].into_iter().flatten().map(Name::as_str);
        asks.then(|| parts.collect::<Vec<_>>().join("/"))
    }

    /// The most other names that an endpoint has.
    pub const ALIASES_MAX: usize = 64;
    /// The most ports that it publishes.
    pub const PORTS_MAX: usize = 1024;
    /// The most labels that it has.
    pub const LABELS_MAX: usize = 256;

    /// Whether it may be kept; if not, why and what to do.
    pub fn check(&self) -> Result<(), String> {
        let addresses = &self.addresses;
        if addresses.is_empty() || addresses.len() > 8 {
            return Err("it needs one address, and has eight at most".to_owned());
        }
        if addresses.iter().enumerate().any(|(i, address)| addresses[..i].contains(address)) {
            return Err("an address is there twice; give it once".to_owned());
        }
        if self.mac.0[0] & 1 != 0 || self.mac.0 == [0; 6] {
            return Err("its MAC address is not that of one device; use a unicast address".to_owned());
        }
        for (what, is, most) in [
            ("aliases", self.aliases.len(), Self::ALIASES_MAX),
            ("ports", self.ports.len(), Self::PORTS_MAX),
            ("labels", self.labels.len(), Self::LABELS_MAX),
        ] {
            if is > most {
                return Err(format!("it has {is} {what}; at most {most} can be kept, leave some out"));
            }
        }
        if self.container.as_ref().is_some_and(|id| id.len() > 128) {
            return Err("the container's id is longer than 128 bytes".to_owned());
        }
        Ok(())
    }
}

fn yes() -> bool {
    true
}

/// Who attached an endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum EndpointKind {
    /// Docker, by its network plugin.
    Docker,
    /// The lab, or anyone else who asked the agent's socket.
    Socket,
    /// The agent, for the label of a Docker container that is on none of our networks.
    Label,
}

impl fmt::Display for EndpointKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Docker => "docker",
            Self::Socket => "socket",
            Self::Label => "label",
        })
    }
}

/// A port of the host that leads to a port of an endpoint.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema)]
pub struct PublishedPort {
    /// The protocol.
    pub protocol: Protocol,
    /// The port on the host.
    pub host_port: u16,
    /// The port in the container.
    pub port: u16,
}

/// A transport that has ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// RFC 9293.
    Tcp,
    /// RFC 768.
    Udp,
}

impl Protocol {
    /// The number in the IP header.
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }
}
