//! A host as all others see it.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::{HostId, Name, TUNNEL_PORT, UnixMillis};

/// A machine that runs the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Host {
    /// Its identity, made by the server when it joined. A host joined again gets a new one.
    pub id: HostId,
    /// Its name, unique in the environment.
    pub name: Name,
    /// Where it may be reached on the underlay, best first. The first is the one that tunnels use.
    #[serde(default)]
    pub candidates: Vec<Candidate>,
    /// What its owner says of it.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// SHA-256 of its public key (SubjectPublicKeyInfo, RFC 5280 §4.1), hexadecimal: its authority.
    pub key: String,
    /// When it joined.
    pub joined: UnixMillis,
}

impl Host {
    /// Whether a NAT is between this host and the server: it came from an address that is not its own, and nobody said
    /// at which address it can be reached. Peers cannot begin with it; it begins with them.
    pub fn behind_nat(&self) -> bool {
        let given = self.candidates.iter().any(|candidate| candidate.source == Source::Given);
        !given && self.outside().is_some()
    }

    /// Where the server saw the host come from, if that is not an address of its own.
    pub fn outside(&self) -> Option<&Candidate> {
        self.candidates.iter().find(|candidate| candidate.source == Source::Observed)
    }

    /// Whether its tunnels have that UDP port.
    pub fn tunnels_by(&self, port: u16) -> bool {
        self.candidates.iter().any(|candidate| candidate.port.unwrap_or(TUNNEL_PORT) == port)
    }

    /// The underlay address that peers use.
    pub fn underlay(&self) -> Option<&Candidate> {
        self.candidates.first()
    }
}

/// An underlay address at which a host may be reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Candidate {
    /// The address.
    #[schema(value_type = String)]
    pub address: IpAddr,
    /// The UDP port of its tunnels at that address, where it is not [`crate::TUNNEL_PORT`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// The MTU of the interface that has it, in bytes.
    pub mtu: u32,
    /// How the agent came to know it.
    pub source: Source,
}

/// How a candidate is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// Said by `--address` or `--interface`.
    Given,
    /// The source address of the route to the server.
    Route,
    /// On an interface of the host.
    Interface,
    /// What the server saw the host come from.
    Observed,
}
