//! Where this host may be reached, and which routes it has of its own. Looked at again whenever asked.

use std::net::{IpAddr, SocketAddr, ToSocketAddrs};

use model::api::{ApiError, ErrorCode, HostRoute};
use model::{Candidate, Source};

/// What a person said about the underlay.
#[derive(Debug, Clone, Default)]
pub struct Wish {
    /// This address, whatever else there is.
    pub address: Option<IpAddr>,
    /// The addresses of this interface.
    pub interface: Option<String>,
}

/// Devices that belong to engines and overlays: their addresses are nobody's underlay.
const VIRTUAL: [&str; 9] = ["lo", "docker", "br-", "veth", "cni", "podman", "dw", "dv", "virbr"];

/// The candidates, best first: what was said, else the source address of the route to the server, else what is on the
/// host's interfaces. `port` is the UDP port of this host's tunnels.
pub fn candidates(wish: &Wish, port: u16, server: Option<&str>) -> Result<Vec<Candidate>, ApiError> {
    let all = linux::host::addresses().map_err(|e| ApiError::new(ErrorCode::Internal, e.to_string()))?;
    let port = (port != model::TUNNEL_PORT).then_some(port);
    let usable = |address: &IpAddr| match address {
        IpAddr::V4(a) => !a.is_loopback() && !a.is_link_local() && !a.is_unspecified() && !a.is_multicast(),
        IpAddr::V6(a) => {
            !a.is_loopback() && !a.is_unicast_link_local() && !a.is_unspecified() && !a.is_multicast()
        }
    };
    let towards = server.and_then(server_address).and_then(linux::host::source_for);
    let mut found: Vec<Candidate> = Vec::new();
    for one in all {
        let given =
            wish.address == Some(one.address) || wish.interface.as_deref() == Some(one.ifname.as_str());
        let virtual_device = VIRTUAL.iter().any(|prefix| one.ifname.starts_with(prefix));
        if !given && (virtual_device || !usable(&one.address)) {
            continue;
        }
        let source = if given {
            Source::Given
        } else if towards == Some(one.address) {
            Source::Route
        } else {
            Source::Interface
        };
        found.push(Candidate { address: one.address, port, mtu: one.mtu, source });
    }
    let said = wish.address.map(|a| a.to_string()).or_else(|| wish.interface.clone());
    if let Some(said) = said
        && !found.iter().any(|candidate| candidate.source == Source::Given)
    {
        // An address behind NAT is on no interface: then the person knows better.
        let Some(address) = wish.address else {
            let message =
                format!("--interface {said}: no such interface, or it has no address; see `ip address`");
            return Err(ApiError::new(ErrorCode::Invalid, message));
        };
        let mtu = found.first().map_or(1500, |candidate| candidate.mtu);
        found.push(Candidate { address, port, mtu, source: Source::Given });
    }
    // IPv4 before IPv6 among equals: most underlays have it, and a mixed pair of hosts needs one in common.
    found.sort_by_key(|candidate| (candidate.source, candidate.address.is_ipv6(), candidate.address));
    if found.is_empty() {
        let message =
            "no address was found that other hosts could reach; give one with --address or --interface";
        return Err(ApiError::new(ErrorCode::Invalid, message));
    }
    Ok(found)
}

/// The host's own routes, for the server to check networks against.
pub fn routes() -> Result<Vec<HostRoute>, ApiError> {
    let all = linux::host::routes().map_err(|e| ApiError::new(ErrorCode::Internal, e.to_string()))?;
    Ok(all
        .into_iter()
        .filter(|route| route.destination.prefix_len() > 0)
        .map(|route| HostRoute { cidr: route.destination, device: route.dev })
        .collect())
}

fn server_address(url: &str) -> Option<IpAddr> {
    let url = reqwest::Url::parse(url).ok()?;
    let target = (url.host_str()?.trim_matches(['[', ']']), url.port_or_known_default()?);
    target.to_socket_addrs().ok()?.next().as_ref().map(SocketAddr::ip)
}
