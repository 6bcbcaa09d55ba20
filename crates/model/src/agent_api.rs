//! What travels over the agent's Unix socket: attach, detach, look. HTTP/1.1 with JSON bodies; errors are
//! [`crate::api::ApiError`]. Whoever may open the socket (mode 0600, root) may do everything.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::{
    Candidate, Endpoint, EndpointId, Epoch, HostId, Name, NetworkId, PublishedPort, Revision, UnixMillis,
};

/// Where the agent listens unless told otherwise.
pub const SOCKET: &str = "/run/droveway/agent.sock";
/// The largest body the agent reads, in bytes.
pub const BODY_MAX: usize = 256 << 10;

/// Where things are.
pub mod path {
    /// `GET` → [`super::AgentStatus`].
    pub const STATUS: &str = "/v1/status";
    /// `POST` [`super::AttachRequest`] → [`super::Attached`]. `GET` → list of [`crate::Endpoint`] of this host.
    pub const ENDPOINTS: &str = "/v1/endpoints";
    /// `DELETE /v1/endpoints/{id}`: detach.
    pub const ENDPOINT: &str = "/v1/endpoints/{id}";
}

/// Asks for an attachment of a network namespace to a network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AttachRequest {
    /// Name or id of the network.
    pub network: String,
    /// The namespace: a file that can be opened with `setns(2)`, as the agent sees it.
    pub netns: PathBuf,
    /// The interface's name inside.
    #[serde(default = "eth0")]
    pub ifname: String,
    /// The container's name.
    #[serde(default)]
    pub name: Option<Name>,
    /// The stack.
    #[serde(default)]
    pub stack: Option<Name>,
    /// The service.
    #[serde(default)]
    pub service: Option<Name>,
    /// Other names.
    #[serde(default)]
    pub aliases: Vec<Name>,
    /// A wish for this address.
    #[serde(default)]
    pub address: Option<IpAddr>,
    /// The container's labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Ports to publish on the host.
    #[serde(default)]
    pub ports: Vec<PublishedPort>,
}

fn eth0() -> String {
    "eth0".to_owned()
}

/// What was attached, and what the caller has to write into the container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// The endpoint.
    pub endpoint: Endpoint,
    /// Its addresses with the network's prefix.
    pub addresses: Vec<IpNet>,
    /// The default gateway, unless the network is internal.
    pub gateway: Option<IpAddr>,
    /// The interface's MTU in bytes.
    pub mtu: u32,
    /// The text for `/etc/resolv.conf`.
    pub resolv_conf: String,
}

/// How the agent is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentStatus {
    /// The version of the program.
    pub version: String,
    /// Who it is.
    pub host: HostId,
    /// Its name.
    pub name: Name,
    /// The server.
    pub server: String,
    /// Since when the watch has been up (`Ok`) or down, and why (`Err`).
    pub connection: Connection,
    /// The life of the store that the snapshot is from.
    pub epoch: Option<Epoch>,
    /// The snapshot's number.
    pub revision: Revision,
    /// Where the host may be reached.
    pub candidates: Vec<Candidate>,
    /// One line per network that has a router here.
    pub routers: Vec<RouterStatus>,
    /// Whether Docker is there.
    pub docker: DockerStatus,
    /// What the kernel refused lately, newest last.
    pub troubles: Vec<String>,
}

/// The watch's state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub enum Connection {
    /// The stream runs.
    Up {
        /// Since when.
        since: UnixMillis,
    },
    /// It does not.
    Down {
        /// Since when.
        since: UnixMillis,
        /// Why.
        why: String,
    },
}

/// Docker's state as the agent sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub enum DockerStatus {
    /// Not asked for.
    Off,
    /// No engine answers; it is tried again.
    Waiting {
        /// Why.
        why: String,
    },
    /// The engine is followed.
    Up {
        /// Its version.
        version: String,
    },
}

/// One router.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouterStatus {
    /// The network.
    pub network: NetworkId,
    /// Its name.
    pub name: Name,
    /// The network namespace's name.
    pub netns: String,
    /// The router's address in the network.
    pub address: Option<IpAddr>,
    /// Blocks held here.
    pub blocks: Vec<IpNet>,
    /// Endpoints attached here.
    pub endpoints: Vec<EndpointId>,
    /// Inner MTU in bytes.
    pub mtu: u32,
    /// Whether the kernel shows all that should be there.
    pub converged: bool,
}
