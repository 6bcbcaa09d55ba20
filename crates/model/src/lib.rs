//! The words of Droveway: ids, specifications, the snapshot that agents hold, and what travels over its APIs.
//!
//! This room is data and rules about data. It does no input or output and holds no policy.
//!
//! Invariant: a value of these types has been validated. Text from outside is parsed once, at the edge.

pub mod agent_api;
pub mod api;
mod catalog;
mod endpoint;
pub mod exposition;
mod host;
mod id;
mod incarnation;
mod lease;
mod mtu;
mod network;
mod peer;
mod token;

pub use catalog::{Catalog, Change, Key, Object, Watch};
pub use endpoint::{Endpoint, EndpointKind, Protocol, PublishedPort};
pub use host::{Candidate, Host, Source};
pub use id::{
    EndpointId, EnvironmentId, Epoch, HostId, InvalidId, Mac, Name, NetworkId, PeerId, RANDOM_LEN, Revision,
};
pub use incarnation::{Incarnation, InvalidIncarnation, InvalidStartSecret, Lineage, StartSecret, Step};
pub use lease::{Block, Claim, Geometry, ROUTER_OFFSET, Retained, Wanted, Withdrawn};
pub use mtu::{IKE_PORT, MTU_MIN, TUNNEL_PORT, VXLAN_OVERHEAD_V4, VXLAN_OVERHEAD_V6, esp_mtu, vxlan_mtu};
pub use network::{
    BLOCK_PREFIX_DEFAULT, DRIVER_DEFAULT, Driver, InvalidNetwork, MANAGED_CIDR, MANAGED_NETWORK, Network,
    NetworkSpec, VXLAN_PORT,
};
pub use peer::{InvalidPeer, Peer, PeerProof, PeerSpec};
pub use token::{Fingerprint, InvalidToken, JoinToken};

/// The address of DNS and metadata in each router.
pub const SERVICE_ADDRESS: std::net::Ipv4Addr = std::net::Ipv4Addr::new(169, 254, 169, 250);

/// The label with which a container, made again under its name, gets the address back that it had.
pub const RETAIN: &str = "droveway.retain";

/// The default domain of names.
pub const DEFAULT_DOMAIN: &str = "droveway.internal";

/// The DNS name in every server's certificate, for which our own clients check it whatever address they connect to. The
/// CA is the environment's own, so a name proves nothing more.
pub const SERVER_NAME: &str = "droveway-server";

/// Milliseconds since the Unix epoch: the only form in which time is stored or sent.
pub type UnixMillis = u64;
