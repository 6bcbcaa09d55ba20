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
}

impl fmt::Display for EndpointKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Docker => "docker",
            Self::Socket => "socket",
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
