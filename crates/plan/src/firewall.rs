//! The skeletons of our nft tables, as text for `nft -f`. Endpoints and published ports are elements of their sets and
//! maps ([`crate::object::Set`]), so that an attachment costs the same with a thousand neighbours.
//!
//! Invariant: a table's digest is that of its text, so a table that says another digest is replaced whole.

use std::fmt::Write;

use ipnet::IpNet;

use model::SERVICE_ADDRESS;

use crate::object::{Family, HOST_DEVICE_PREFIX, LEAF_PREFIX, TABLE, Table};
use crate::transit;

/// What a router's rules are made of.
pub(crate) struct Router<'a> {
    /// The network's addresses.
    pub(crate) pool: IpNet,
    /// What is behind foreign peers, wherever those are.
    pub(crate) remote: Vec<IpNet>,
    /// The overlay device.
    pub(crate) device: &'a str,
    /// Whether there is no way out.
    pub(crate) internal: bool,
}

/// The router's filter and NAT: nothing of the pool, or of what is behind foreign peers, leaves by `up0` or comes by it,
/// and nothing else comes by the overlay. Foreign peers reach the pool, and not each other.
///
/// By `up0` goes what NAT gives the router's address: a connection that begins now (not yet confirmed) or one that has been
/// translated. What conntrack finds invalid (a reset or a reply without a connection), what began while these rules were
/// not there, and what it does not track (what is for the overlay, but was not routed there) is neither.
///
/// What most packets do, from container to container or to what is behind a foreign peer, is decided once, before
/// connection tracking: the forward chain believes that. Each chain, each name of a device and each lookup in a set is paid
/// in throughput (`make bench`).
///
/// What comes by a port and not by the bridge was sent to a link-local MAC, which the guard does not see (nor does the kernel
/// forward it). A leaf is a bridge alone: nothing is asked of the router by it.
///
/// Queries to port 53 of any address go to the router's own service. This is NAT and not a policy rule with transparent
/// sockets: a namespace that has ever had a policy rule takes the slow way for each routing decision.
pub(crate) fn router(router: &Router<'_>) -> Table {
    let (inward, outward) = if router.internal {
        ("", "")
    } else {
        (
            r"
        ct state established,related accept
        ct status dnat accept",
            r#"
        iifname "br0" ip saddr POOL ip daddr != INSIDE ct status and (confirmed or snat or dnat) != confirmed accept"#,
        )
    };
    let remote = remote(&router.remote);
    let inside = remote.as_ref().map_or("POOL".to_owned(), |remote| format!("{{ POOL, {remote} }}"));
    let text = format!(
        r#"
    map publish {{
        type inet_proto . inet_service : ipv4_addr . inet_service
    }}
    chain untracked {{
        type filter hook prerouting priority raw; policy accept;
        ip saddr POOL ip daddr POOL th dport != 53 iifname != "up0" notrack{untracked}
    }}
    chain translated_in {{
        type nat hook prerouting priority dstnat; policy accept;
        iifname "up0" dnat ip to meta l4proto . th dport map @publish
        iifname "br0" meta l4proto {{ tcp, udp }} th dport 53 dnat ip to {SERVICE_ADDRESS}
    }}
    chain source_nat {{
        type nat hook postrouting priority srcnat; policy accept;
        oifname "up0" masquerade
    }}
    chain input {{
        type filter hook input priority filter; policy accept;
        iifname "DEVICE" ip saddr != INSIDE drop
        iifname "p-*" drop
        iifname "LEAF*" drop
        iifname "up0" ct state established,related accept
        iifname "up0" ip protocol icmp accept
        iifname "up0" drop
    }}
    chain forward {{
        type filter hook forward priority filter; policy drop;
        tcp flags & (syn | rst) == syn tcp option maxseg size set rt mtu
        ct state untracked oifname != "up0" accept
        iifname "up0" goto inward
        oifname "up0" goto outward
        ip saddr POOL ip daddr POOL accept
        iifname "br0" oifname "DEVICE" ct state established,related ip daddr POOL accept{forward}
    }}
    chain inward {{
        ip saddr INSIDE drop{inward}
    }}
    chain outward {{{outward}
    }}
    chain output {{
        type filter hook output priority filter; policy accept;
        oifname "up0" ip daddr INSIDE drop
        oifname "up0" ip saddr INSIDE drop
    }}
"#,
        untracked = rules(
            remote.as_deref(),
            r#"
        ip saddr POOL ip daddr { REMOTE } th dport != 53 iifname != "up0" notrack
        ip saddr { REMOTE } ip daddr POOL iifname "DEVICE" notrack"#
        ),
        forward = rules(
            remote.as_deref(),
            r#"
        oifname "DEVICE" ip saddr POOL ip daddr { REMOTE } accept
        iifname "DEVICE" ip saddr { REMOTE } ip daddr POOL accept"#
        ),
    );
    let text = text
        .replace("INSIDE", &inside)
        .replace("POOL", &router.pool.to_string())
        .replace("LEAF", LEAF_PREFIX);
    table(Family::Inet, &text.replace("DEVICE", router.device))
}

/// What is behind foreign peers, as the elements of a set, which must not overlap. `None` if there is nothing.
fn remote(cidrs: &[IpNet]) -> Option<String> {
    let cidrs = IpNet::aggregate(&cidrs.to_vec());
    let cidrs: Vec<_> = cidrs.iter().filter(|cidr| cidr.addr().is_ipv4()).map(IpNet::to_string).collect();
    (!cidrs.is_empty()).then(|| cidrs.join(", "))
}

/// Rules about what is behind foreign peers, where there is any.
fn rules(remote: Option<&str>, text: &str) -> String {
    remote.map(|remote| text.replace("REMOTE", remote)).unwrap_or_default()
}

/// The bridge's guard: a port sends only from its endpoint's MAC and addresses, ARP included. The first rule is all that
/// good IPv4 frames meet. What comes from another bridge of the router has met the guard there.
pub(crate) fn bridge() -> Table {
    let text = r#"
    set port_mac {
        type ifname . ether_addr
    }
    set port_address {
        type ifname . ether_addr . ipv4_addr
    }
    chain guard {
        type filter hook prerouting priority -200; policy drop;
        ether type ip iifname . ether saddr . ip saddr @port_address accept
        iifname "LEAF*" accept
        iifname . ether saddr != @port_mac drop
        ether type arp iifname . arp saddr ether . arp saddr ip @port_address accept
        ether type arp arp saddr ip 0.0.0.0 iifname . arp saddr ether @port_mac accept
    }
"#;
    table(Family::Bridge, &text.replace("LEAF", LEAF_PREFIX))
}

/// The host's part: NAT for the routers, published ports, and who may send to the overlay's ports.
///
/// What leaves in the host's name has a port that no service of the host has. Otherwise a container that sends from a service's
/// port to where that service will be asked from would get what was sent to the service.
///
/// All that is asked of a packet of the overlay is asked before routing, by one chain: each chain costs throughput. Addresses
/// of loopback are never on the way from a router: of what comes back to them, NAT has yet to say so. What NAT that is not
/// ours sends there nevertheless is tracked, as the overlay's packets never are: it meets the rules of the translated, which
/// cost those nothing.
pub(crate) fn host(overlay_ports: &[u16], tunnel_port: u16) -> Table {
    let (low, high) = lent_ports(tunnel_port);
    let mut text = format!(
        r#"
    map publish {{
        type inet_proto . inet_service : ipv4_addr . inet_service
    }}
    set vtep {{
        type ipv4_addr . inet_service
    }}
    set vtep6 {{
        type ipv6_addr . inet_service
    }}
    chain publish_in {{
        type nat hook prerouting priority dstnat; policy accept;
        fib daddr type local dnat ip to meta l4proto . th dport map @publish
    }}
    chain publish_own {{
        type nat hook output priority -100; policy accept;
        fib daddr type local dnat ip to meta l4proto . th dport map @publish
    }}
    chain source_nat {{
        type nat hook postrouting priority srcnat; policy accept;
        iifname "DEV*" oifname "DEV*" masquerade
        oifname "DEV*" ip saddr 127.0.0.0/8 masquerade
        oifname != "DEV*" ip saddr {transit} meta l4proto {{ tcp, udp }} masquerade to :{low}-{high}
        oifname != "DEV*" ip saddr {transit} masquerade
    }}
"#,
        transit = transit::RANGE
    );
    let ports = overlay_ports.iter().map(u16::to_string).collect::<Vec<_>>().join(", ");
    let (mut arriving, mut translated, mut forward) = (String::new(), String::new(), String::new());
    if !overlay_ports.is_empty() {
        let _ = write!(
            text,
            r#"    chain overlay {{
        ip saddr . udp dport @vtep iifname != "DEV*" notrack accept
        ip6 saddr . udp dport @vtep6 iifname != "DEV*" notrack accept
        iifname "DEV*" drop
        fib daddr type != unicast drop
        notrack
    }}
    chain untracked_out {{
        type filter hook output priority raw; policy accept;
        udp dport {{ {ports} }} notrack
    }}
"#
        );
        let _ = writeln!(arriving, "        udp dport {{ {ports} }} goto overlay");
        let _ = writeln!(translated, "        udp dport {{ {ports} }} drop");
        let _ = writeln!(forward, "        iifname \"DEV*\" udp dport {{ {ports} }} drop");
    }
    let _ = write!(
        text,
        r#"    chain arriving {{
        type filter hook prerouting priority raw; policy accept;
{arriving}        iifname "DEV*" ip daddr 127.0.0.0/8 drop
    }}
    chain translated_here {{
        type nat hook input priority 100; policy accept;
{translated}        iifname "DEV*" ip daddr 127.0.0.0/8 drop
    }}
    chain forward {{
        type filter hook forward priority filter - 10; policy accept;
{forward}        oifname "DEV*" ct state established,related accept
        oifname "DEV*" ct status dnat accept
        oifname "DEV*" drop
    }}
"#
    );
    table(Family::Inet, &text.replace("DEV", HOST_DEVICE_PREFIX))
}

/// The ports that a host lends to what leaves it in its name: those that Linux gives to connections and not to services
/// (`ip_local_port_range` begins here), but for that of its tunnels.
fn lent_ports(tunnel_port: u16) -> (u16, u16) {
    const FIRST: u16 = 32_768;
    match tunnel_port {
        ..FIRST => (FIRST, u16::MAX),
        FIRST..49_152 => (tunnel_port + 1, u16::MAX),
        49_152.. => (FIRST, tunnel_port - 1),
    }
}

fn table(family: Family, body: &str) -> Table {
    let digest = format!("droveway {:016x}", crate::hash(&[family.as_str(), body]));
    let text = format!("table {} {TABLE} {{\n    comment \"{digest}\"\n{body}}}\n", family.as_str());
    Table { text, digest }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(remote: &[&str], device: &str, internal: bool) -> String {
        let pool = "10.42.0.0/16".parse().unwrap();
        let remote = remote.iter().map(|cidr| cidr.parse().unwrap()).collect();
        router(&Router { pool, remote, device, internal }).text
    }

    #[test]
    fn another_text_is_another_digest_and_the_text_says_it() {
        let (a, b) = (host(&[4789], 4500), host(&[4789, 8472], 4500));
        assert_ne!(a.digest, b.digest);
        assert!(a.text.contains(&a.digest));
        let text = of(&["192.168.7.0/24"], "tun0", true);
        assert!(!["POOL", "DEVICE", "REMOTE", "INSIDE"].iter().any(|word| text.contains(word)), "{text}");
    }

    #[test]
    fn what_leaves_in_the_hosts_name_never_has_the_port_of_its_tunnels() {
        for port in [1, 500, 4500, 32_767, 32_768, 40_000, 49_151, 49_152, 65_535] {
            let (low, high) = lent_ports(port);
            assert!(low <= high && low >= 32_768 && !(low..=high).contains(&port), "{port}: {low} to {high}");
            assert!(high - low >= 16_000, "{port}: {low} to {high}");
        }
        assert!(host(&[], 4500).text.contains("masquerade to :32768-65535"));
    }

    #[test]
    fn an_internal_network_lets_nothing_through_up0() {
        let (open, internal) = (of(&[], "tun0", false), of(&[], "tun0", true));
        assert!(open.contains(r#"iifname "br0" ip saddr 10.42.0.0/16 ip daddr != 10.42.0.0/16 ct status"#));
        assert!(!internal.contains("ip daddr != 10.42.0.0/16 ct status"));
        assert!(!internal.contains("ct status dnat accept"));
    }

    #[test]
    fn what_is_behind_foreign_peers_is_told_once_and_costs_nothing_where_there_is_none() {
        assert!(!of(&[], "vxlan0", false).contains("{ 10.42.0.0/16"), "no lookup in a set");
        let text =
            of(&["192.168.7.0/25", "192.168.7.128/25", "172.16.0.0/12", "172.16.1.0/24"], "tun0", false);
        assert!(text.contains("ip saddr != { 10.42.0.0/16, 172.16.0.0/12, 192.168.7.0/24 } drop"), "{text}");
    }
}
