//! libnetwork's remote driver and remote IPAM messages, as the engine writes and reads them.
//!
//! Source: moby `libnetwork/drivers/remote/api`, `libnetwork/ipams/remote/api` and `libnetwork/types`. Go writes an
//! absent map or list as `null` and an absent address as `""`; fields that are not named here are ignored.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Where the options of `-o` are within a network's options.
pub(super) const GENERIC: &str = "com.docker.network.generic";
/// Where the published ports are within a sandbox's options.
pub(super) const PORTMAP: &str = "com.docker.network.portmap";
/// The option that says what an address is asked for, and its value where it is the gateway. In a pool's data the latter
/// is the gateway itself.
pub(super) const REQUEST_ADDRESS_TYPE: &str = "RequestAddressType";
/// See [`REQUEST_ADDRESS_TYPE`].
pub(super) const GATEWAY: &str = "com.docker.network.gateway";

/// `types.CONNECTED`: a route on link.
pub(super) const ROUTE_CONNECTED: u8 = 1;

/// Options of any form.
pub(super) type Options = Option<BTreeMap<String, Value>>;

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct CreateNetwork {
    #[serde(rename = "NetworkID")]
    pub(super) network_id: String,
    #[serde(default)]
    pub(super) options: Options,
    #[serde(default, rename = "IPv4Data")]
    pub(super) ipv4: Option<Vec<IpamData>>,
    #[serde(default, rename = "IPv6Data")]
    pub(super) ipv6: Option<Vec<IpamData>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct IpamData {
    #[serde(default)]
    pub(super) address_space: String,
    #[serde(default)]
    pub(super) pool: String,
}

#[derive(Debug, Deserialize)]
pub(super) struct NetworkOnly {
    #[serde(rename = "NetworkID")]
    pub(super) network_id: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct CreateEndpoint {
    #[serde(rename = "NetworkID")]
    pub(super) network_id: String,
    #[serde(rename = "EndpointID")]
    pub(super) endpoint_id: String,
    #[serde(default)]
    pub(super) interface: Option<Interface>,
}

#[derive(Debug, Default, Deserialize, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Interface {
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(super) address: String,
    #[serde(default, rename = "AddressIPv6", skip_serializing_if = "String::is_empty")]
    pub(super) address_ipv6: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(super) mac_address: String,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct EndpointCreated {
    pub(super) interface: Interface,
}

#[derive(Debug, Deserialize)]
pub(super) struct EndpointOnly {
    #[serde(rename = "EndpointID")]
    pub(super) endpoint_id: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Join {
    #[serde(rename = "NetworkID")]
    pub(super) network_id: String,
    #[serde(rename = "EndpointID")]
    pub(super) endpoint_id: String,
    #[serde(default)]
    pub(super) sandbox_key: String,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Joined {
    pub(super) interface_name: InterfaceName,
    pub(super) gateway: String,
    pub(super) static_routes: Vec<StaticRoute>,
    pub(super) disable_gateway_service: bool,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct InterfaceName {
    pub(super) src_name: String,
    pub(super) dst_prefix: &'static str,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct StaticRoute {
    pub(super) destination: String,
    pub(super) route_type: u8,
    pub(super) next_hop: &'static str,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct ExternalConnectivity {
    #[serde(rename = "EndpointID")]
    pub(super) endpoint_id: String,
    #[serde(default)]
    pub(super) options: Options,
}

/// `types.PortBinding`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct PortBinding {
    /// The number in the IP header.
    pub(super) proto: u8,
    #[serde(default, rename = "IP")]
    pub(super) ip: String,
    pub(super) port: u16,
    #[serde(default, rename = "HostIP")]
    pub(super) host_ip: String,
    #[serde(default)]
    pub(super) host_port: u16,
    #[serde(default)]
    pub(super) host_port_end: u16,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct RequestPool {
    #[serde(default)]
    pub(super) pool: String,
    #[serde(default)]
    pub(super) sub_pool: String,
    #[serde(default)]
    pub(super) options: Options,
    #[serde(default)]
    pub(super) v6: bool,
}

#[derive(Debug, Serialize)]
pub(super) struct Pool {
    #[serde(rename = "PoolID")]
    pub(super) id: String,
    #[serde(rename = "Pool")]
    pub(super) cidr: String,
    #[serde(rename = "Data")]
    pub(super) data: BTreeMap<String, String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct RequestAddress {
    #[serde(rename = "PoolID")]
    pub(super) pool_id: String,
    #[serde(default)]
    pub(super) address: String,
    #[serde(default)]
    pub(super) options: Options,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct Address {
    pub(super) address: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(super) struct ReleaseAddress {
    #[serde(rename = "PoolID")]
    pub(super) pool_id: String,
    #[serde(default)]
    pub(super) address: String,
}
