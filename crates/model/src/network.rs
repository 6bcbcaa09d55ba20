//! A network: a named, isolated address space and how it is carried between hosts.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::{Geometry, IKE_PORT, MTU_MIN, Name, NetworkId, TUNNEL_PORT, UnixMillis};

/// The network that is there from the first start.
pub const MANAGED_NETWORK: &str = "managed";
/// Its address space.
pub const MANAGED_CIDR: &str = "10.42.0.0/16";
/// The driver of a network that does not say otherwise.
pub const DRIVER_DEFAULT: &str = "ipsec";
/// Prefix length of a block where a network does not say otherwise.
pub const BLOCK_PREFIX_DEFAULT: u8 = 26;
/// IANA's UDP port for VXLAN (RFC 7348 §5).
pub const VXLAN_PORT: u16 = 4789;

/// What a person asks for when creating a network. What is left out gets a default from the server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkSpec {
    /// Its name, unique in the environment; at most 32 characters.
    pub name: Name,
    /// Address spaces. One IPv4 CIDR today.
    #[schema(value_type = Vec<String>, example = json!(["10.43.0.0/16"]))]
    pub cidrs: Vec<IpNet>,
    /// Prefix length of the blocks leased to hosts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub block_prefix: Option<u8>,
    /// How packets travel between hosts: `ipsec` (encrypted) or `vxlan` (in clear).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub driver: Option<String>,
    /// VXLAN network identifier, 1 to 16777215; chosen by the server if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vni: Option<u32>,
    /// UDP port of the overlay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// Inner MTU in bytes; worked out from the underlay if left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// No way out: containers reach each other and nothing else.
    #[serde(default)]
    pub internal: bool,
    /// What its owner says of it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

/// A network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
pub struct Network {
    /// Its identity.
    pub id: NetworkId,
    /// Its name, unique in the environment.
    pub name: Name,
    /// Address spaces.
    #[schema(value_type = Vec<String>)]
    pub cidrs: Vec<IpNet>,
    /// Prefix length of the blocks leased to hosts.
    pub block_prefix: u8,
    /// How packets travel between hosts.
    #[serde(flatten)]
    pub driver: Driver,
    /// Inner MTU in bytes, where it was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// No way out.
    #[serde(default)]
    pub internal: bool,
    /// What its owner says of it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// When it was made.
    pub created: UnixMillis,
}

/// How packets travel between hosts, with the options of that way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, utoipa::ToSchema)]
#[serde(tag = "driver", rename_all = "lowercase")]
pub enum Driver {
    /// Encrypted: ESP in tunnel mode (RFC 4303) in UDP (RFC 3948), keyed by IKEv2 (RFC 7296).
    Ipsec,
    /// The kernel's VXLAN (RFC 7348), in clear.
    Vxlan {
        /// VXLAN network identifier, 24 bits.
        vni: u32,
        /// UDP port.
        port: u16,
    },
}

impl Driver {
    /// The driver's name, as in `--driver`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Ipsec => "ipsec",
            Self::Vxlan { .. } => "vxlan",
        }
    }

    /// The name of the overlay device in each router.
    pub fn device(&self) -> &'static str {
        match self {
            Self::Ipsec => "tun0",
            Self::Vxlan { .. } => "vxlan0",
        }
    }
}

impl Network {
    /// The pool's layout. The first CIDR is the pool.
    pub fn geometry(&self) -> Geometry {
        Geometry::new(self.pool(), self.block_prefix)
    }

    /// The CIDR that addresses come from.
    pub fn pool(&self) -> IpNet {
        // `NetworkSpec::validate` lets no network through without one.
        self.cidrs.first().copied().unwrap_or_default()
    }

    /// The gateway's address: the first of the pool, the same on each host.
    pub fn gateway(&self) -> IpAddr {
        self.geometry().gateway()
    }
}

/// Why a network cannot be as asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidNetwork {
    /// The name would not fit where it has to.
    #[error("network name {0:?} is longer than 32 characters; choose a shorter one")]
    NameTooLong(String),
    /// No CIDR, or more than one.
    #[error("network {0:?} needs exactly one --subnet")]
    OneCidr(String),
    /// IPv6 is not there yet.
    #[error("network {0:?}: {1} is IPv6, which is not supported yet; choose an IPv4 --subnet")]
    Ipv6(String, IpNet),
    /// Bits after the prefix.
    #[error("network {name:?}: {given} has bits set after its prefix; did you mean {meant}?")]
    HostBits {
        /// The network.
        name: String,
        /// What was given.
        given: IpNet,
        /// What it may have meant.
        meant: IpNet,
    },
    /// Multicast, loopback and the like.
    #[error(
        "network {0:?}: {1} is not usable for hosts ({2}); choose another --subnet, for example 10.43.0.0/16"
    )]
    Unusable(String, IpNet, &'static str),
    /// Too few blocks.
    #[error(
        "network {name:?}: {cidr} has room for {blocks} blocks of /{block}, and at least 4 are needed; choose a larger --subnet or smaller blocks with --block-size"
    )]
    TooSmall {
        /// The network.
        name: String,
        /// Its CIDR.
        cidr: IpNet,
        /// Blocks that fit.
        blocks: u64,
        /// The block's prefix length.
        block: u8,
    },
    /// A block's size is out of range.
    #[error("network {0:?}: blocks of /{1} are not possible; choose --block-size from /20 to /29")]
    BlockPrefix(String, u8),
    /// No such driver.
    #[error("network {0:?}: unknown driver {1:?}; the drivers are: ipsec (encrypted), vxlan (in clear)")]
    Driver(String, String),
    /// An option of another driver.
    #[error(
        "network {0:?}: {1} belongs to --driver vxlan; leave it out (an agent's UDP port is its --tunnel-port)"
    )]
    VxlanOnly(String, &'static str),
    /// VNI out of range.
    #[error("network {0:?}: VNI {1} is out of range; choose 1 to 16777215")]
    Vni(String, u32),
    /// Port out of range.
    #[error("network {0:?}: UDP port 0 is not possible; choose 1 to 65535, or leave --port out for 4789")]
    Port(String),
    /// A port that tunnels need.
    #[error(
        "network {0:?}: UDP port {1} is that of encrypted tunnels; choose another --port, or leave it out for 4789"
    )]
    TunnelPort(String, u16),
    /// MTU out of range.
    #[error(
        "network {0:?}: an MTU of {1} is out of range; choose 576 to 65000, or leave --mtu out to have it worked out"
    )]
    Mtu(String, u32),
}

impl NetworkSpec {
    /// A specification with nothing but a name and a CIDR.
    pub fn new(name: Name, cidr: IpNet) -> Self {
        Self {
            name,
            cidrs: vec![cidr],
            block_prefix: None,
            driver: None,
            vni: None,
            port: None,
            mtu: None,
            internal: false,
            labels: BTreeMap::new(),
        }
    }

    /// Checks everything that can be checked without knowing other networks, and fills in defaults.
    ///
    /// `vni` is used where the specification has none: the caller knows which are taken.
    pub fn validate(&self, id: NetworkId, vni: u32, created: UnixMillis) -> Result<Network, InvalidNetwork> {
        let name = || self.name.to_string();
        if self.name.as_str().len() > 32 {
            return Err(InvalidNetwork::NameTooLong(name()));
        }
        let [cidr] = self.cidrs[..] else { return Err(InvalidNetwork::OneCidr(name())) };
        let IpNet::V4(v4) = cidr else { return Err(InvalidNetwork::Ipv6(name(), cidr)) };
        if v4.addr() != v4.network() {
            return Err(InvalidNetwork::HostBits { name: name(), given: cidr, meant: cidr.trunc() });
        }
        if let Some(why) = unusable(v4) {
            return Err(InvalidNetwork::Unusable(name(), cidr, why));
        }
        let block = self.block_prefix.unwrap_or(BLOCK_PREFIX_DEFAULT);
        if !(20..=29).contains(&block) {
            return Err(InvalidNetwork::BlockPrefix(name(), block));
        }
        let blocks = if block >= cidr.prefix_len() { 1u64 << (block - cidr.prefix_len()) } else { 0 };
        if blocks < 4 {
            return Err(InvalidNetwork::TooSmall { name: name(), cidr, blocks, block });
        }
        let driver = match self.driver.as_deref().unwrap_or(DRIVER_DEFAULT) {
            "vxlan" => {
                let vni = self.vni.unwrap_or(vni);
                if !(1..1 << 24).contains(&vni) {
                    return Err(InvalidNetwork::Vni(name(), vni));
                }
                let port = self.port.unwrap_or(VXLAN_PORT);
                if port == 0 {
                    return Err(InvalidNetwork::Port(name()));
                }
                if [IKE_PORT, TUNNEL_PORT].contains(&port) {
                    return Err(InvalidNetwork::TunnelPort(name(), port));
                }
                Driver::Vxlan { vni, port }
            }
            "ipsec" => {
                let option = self.vni.map(|_| "--vni").or(self.port.map(|_| "--port"));
                if let Some(option) = option {
                    return Err(InvalidNetwork::VxlanOnly(name(), option));
                }
                Driver::Ipsec
            }
            other => return Err(InvalidNetwork::Driver(name(), other.to_owned())),
        };
        if let Some(mtu) = self.mtu.filter(|mtu| !(MTU_MIN..=65_000).contains(mtu)) {
            return Err(InvalidNetwork::Mtu(name(), mtu));
        }
        Ok(Network {
            id,
            name: self.name.clone(),
            cidrs: self.cidrs.clone(),
            block_prefix: block,
            driver,
            mtu: self.mtu,
            internal: self.internal,
            labels: self.labels.clone(),
            created,
        })
    }
}

/// Why no host can have addresses of `cidr`, if so.
pub(crate) fn unusable(cidr: ipnet::Ipv4Net) -> Option<&'static str> {
    let reserved: [(&str, &str); 5] = [
        ("0.0.0.0/8", "\"this network\", RFC 791"),
        ("127.0.0.0/8", "loopback, RFC 1122"),
        ("169.254.0.0/16", "link-local, RFC 3927; Droveway uses it itself"),
        ("224.0.0.0/4", "multicast, RFC 5771"),
        ("240.0.0.0/4", "reserved, RFC 1112"),
    ];
    reserved.into_iter().find_map(|(net, why)| {
        let net: ipnet::Ipv4Net = net.parse().ok()?;
        (net.contains(&cidr.network()) || cidr.contains(&net.network())).then_some(why)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(cidr: &str) -> NetworkSpec {
        NetworkSpec::new("red".parse().unwrap(), cidr.parse().unwrap())
    }

    fn error(spec: &NetworkSpec) -> String {
        spec.validate(NetworkId::from_random([0; 8]), 7, 0).unwrap_err().to_string()
    }

    #[test]
    fn defaults_are_filled_in() {
        let network = spec("10.42.0.0/16").validate(NetworkId::from_random([0; 8]), 7, 0).unwrap();
        assert_eq!(network.block_prefix, 26);
        assert_eq!(network.driver, Driver::Ipsec, "encrypted unless someone says otherwise");
        assert_eq!(network.gateway().to_string(), "10.42.0.1");
        let json = serde_json::to_value(&network).unwrap();
        assert_eq!(json["driver"], "ipsec");
        assert_eq!(serde_json::from_value::<Network>(json).unwrap(), network);
        let clear = NetworkSpec { driver: Some("vxlan".into()), ..spec("10.42.0.0/16") };
        let network = clear.validate(NetworkId::from_random([0; 8]), 7, 0).unwrap();
        assert_eq!(network.driver, Driver::Vxlan { vni: 7, port: 4789 });
        let json = serde_json::to_value(&network).unwrap();
        assert_eq!(json["driver"], "vxlan");
        assert_eq!(serde_json::from_value::<Network>(json).unwrap(), network);
    }

    #[test]
    fn what_cannot_work_is_refused_with_the_remedy() {
        assert!(error(&spec("10.42.3.0/16")).contains("did you mean 10.42.0.0/16"));
        assert!(error(&spec("10.42.0.0/25")).contains("room for 2 blocks of /26"));
        assert!(error(&spec("127.0.0.0/16")).contains("loopback"));
        assert!(error(&spec("0.0.0.0/0")).contains("choose another --subnet"));
        assert!(error(&spec("169.254.0.0/16")).contains("link-local"));
        assert!(error(&spec("fd00::/64")).contains("IPv4"));
        assert!(error(&NetworkSpec { block_prefix: Some(30), ..spec("10.0.0.0/8") }).contains("/20 to /29"));
        assert!(error(&NetworkSpec { driver: Some("gre".into()), ..spec("10.0.0.0/8") }).contains("vxlan"));
        let clear = || NetworkSpec { driver: Some("vxlan".into()), ..spec("10.0.0.0/8") };
        assert!(error(&NetworkSpec { vni: Some(1 << 24), ..clear() }).contains("16777215"));
        assert!(error(&NetworkSpec { vni: Some(7), ..spec("10.0.0.0/8") }).contains("--driver vxlan"));
        assert!(error(&NetworkSpec { mtu: Some(100), ..spec("10.0.0.0/8") }).contains("576"));
        assert!(error(&NetworkSpec { cidrs: vec![], ..spec("10.0.0.0/8") }).contains("exactly one"));
        assert!(error(&NetworkSpec { port: Some(0), ..clear() }).contains("port 0"));
    }
}
