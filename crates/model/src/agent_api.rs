//! What travels over the agent's Unix socket: attach, detach, look. HTTP/1.1 with JSON bodies; errors are
//! [`crate::api::ApiError`]. Whoever may open the socket (mode 0600, root) may do everything.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
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
    /// `GET` → what the agent has written down, for `droveway doctor`. Its shape changes with the program.
    pub const BOOKS: &str = "/v1/books";
    /// `GET` → list of [`super::TunnelStatus`].
    pub const TUNNELS: &str = "/v1/tunnels";
    /// `GET /v1/tunnels/{peer}` → [`super::TunnelStatus`]; `peer` is the name or id of a host or foreign peer.
    pub const TUNNEL: &str = "/v1/tunnels/{peer}";
    /// `POST`: new keys for the tunnel (IKE SA and CHILD_SAs) without a gap.
    pub const TUNNEL_REKEY: &str = "/v1/tunnels/{peer}/rekey";
    /// `POST`: close the tunnel and begin anew.
    pub const TUNNEL_RESET: &str = "/v1/tunnels/{peer}/reset";
    /// `GET` → inner packets of the tunnel as pcapng, until the connection is closed.
    pub const TUNNEL_CAPTURE: &str = "/v1/tunnels/{peer}/capture";
    /// `GET` → metrics in Prometheus' text format.
    pub const METRICS: &str = "/metrics";
    /// `GET` → 200 while the process answers at all.
    pub const HEALTH: &str = "/healthz";
    /// `GET` → [`crate::api::Readiness`], 200 or 503: whether containers can attach.
    pub const READY: &str = "/readyz";
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
    /// Which routes it brings besides that to the network's pool. Unless told: all, or none where another attachment of
    /// the same namespace has brought them.
    #[serde(default)]
    pub routes: Option<Routes>,
}

/// Which routes an attachment brings into its namespace, besides that to the network's pool.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Routes {
    /// To names and metadata (169.254.169.250), and the default route unless the network is internal.
    #[default]
    All,
    /// To names and metadata alone: the default route is somebody else's.
    Names,
    /// None of them: somebody else has both.
    None,
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
    /// When this host's certificate runs out. It is renewed long before; one that ran out while the server was away is
    /// shown, not enforced.
    #[serde(default)]
    pub certificate_expires: UnixMillis,
    /// One line per network that has a router here.
    pub routers: Vec<RouterStatus>,
    /// Whether Docker is there.
    pub docker: DockerStatus,
    /// What the kernel refused lately, newest last.
    pub troubles: Vec<String>,
}

/// One tunnel: another host or a foreign peer, as this host sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelStatus {
    /// The peer's name.
    pub peer: Name,
    /// Its id: a host's or a foreign peer's.
    pub id: String,
    /// Whether it is a foreign peer.
    pub foreign: bool,
    /// How it stands.
    pub state: TunnelState,
    /// Our address and port, and the peer's, while there is a path.
    pub path: Option<(SocketAddr, SocketAddr)>,
    /// Whether a NAT is before us, and before the peer, as IKE found (RFC 7296 §2.23).
    pub nat: (bool, bool),
    /// The identity that the peer has to prove.
    pub identity: String,
    /// The IKE SA, once there is one.
    pub ike: Option<IkeStatus>,
    /// The CHILD_SAs, the live one of each network first.
    pub children: Vec<ChildStatus>,
    /// Round-trip time between the routers, microseconds: the median of the last probes.
    pub rtt_us: Option<u64>,
    /// Of the last probes, how many were not answered, per mille.
    pub loss_permille: Option<u16>,
    /// The largest inner packet that is known to pass, bytes.
    pub mtu: Option<u32>,
    /// Packets smaller than the network's MTU and larger than `mtu` vanish on the way without a word.
    pub black_hole: bool,
    /// When something authentic last came from the peer.
    pub last_seen: Option<UnixMillis>,
    /// The last failure and when it was.
    pub last_failure: Option<(UnixMillis, String)>,
    /// IKE SAs made so far.
    pub handshakes: u64,
    /// CHILD_SAs rekeyed so far.
    pub rekeys: u64,
    /// Packets dropped so far, by reason.
    pub drops: BTreeMap<String, u64>,
    /// What the kernel or a device of this host refuses, and what is done instead, which is slower.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub slower: Vec<String>,
}

/// How a tunnel stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub enum TunnelState {
    /// The peer has to begin, or nothing can be tried.
    Waiting {
        /// Why.
        why: String,
    },
    /// An attempt is under way.
    Connecting,
    /// Keys are agreed, and the probes are answered.
    Up {
        /// Since when without a break.
        since: UnixMillis,
    },
    /// Keys are agreed, but probes are not answered: no traffic passes.
    Silent {
        /// Since when.
        since: UnixMillis,
    },
    /// The last attempt failed.
    Failed {
        /// Why, and what to do.
        why: String,
        /// When the next begins.
        retry_at: UnixMillis,
    },
}

/// An IKE SA.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IkeStatus {
    /// The initiator's SPI, 16 hexadecimal digits.
    pub initiator_spi: String,
    /// The responder's SPI.
    pub responder_spi: String,
    /// Whether this host began it.
    pub initiator: bool,
    /// The suite, as in `AES_GCM_16_256/PRF_HMAC_SHA2_256/X25519`.
    pub suite: String,
    /// When it was made.
    pub established: Option<UnixMillis>,
    /// When it is rekeyed at the latest.
    pub rekey_at: Option<UnixMillis>,
}

/// A CHILD_SA: a pair of ESP SAs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChildStatus {
    /// The network's name.
    pub network: Name,
    /// Whether it is in full use; if not, it is on its way in or out.
    pub live: bool,
    /// The SPI that we receive on, 8 hexadecimal digits.
    pub inbound_spi: String,
    /// The SPI that we send on.
    pub outbound_spi: String,
    /// The suite.
    pub suite: String,
    /// When it was made.
    pub installed: Option<UnixMillis>,
    /// When it is rekeyed at the latest.
    pub rekey_at: Option<UnixMillis>,
    /// Bytes of inner packets received.
    pub bytes_in: u64,
    /// Packets received.
    pub packets_in: u64,
    /// Bytes of inner packets sent.
    pub bytes_out: u64,
    /// Packets sent.
    pub packets_out: u64,
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
    /// Why packets between containers and other hosts take no shortcut past the kernel's stack; `None` where most do.
    #[serde(default)]
    pub no_shortcut: Option<String>,
}
