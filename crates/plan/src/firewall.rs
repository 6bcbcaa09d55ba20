//! The skeletons of our nft tables, as text for `nft -f`. Endpoints and published ports are elements of their sets and
//! maps ([`crate::object::Set`]), so that an attachment costs the same with a thousand neighbours.
//!
//! Invariant: a table's digest is that of its text, so a table that says another digest is replaced whole.

use std::fmt::Write;

use ipnet::IpNet;

use model::SERVICE_ADDRESS;

use crate::object::{Family, HOST_DEVICE_PREFIX, TABLE, Table};
use crate::transit;

/// The router's filter and NAT: nothing of the pool leaves by `up0`, nothing but the pool comes by the overlay.
///
/// By `up0` goes what NAT gives the router's address: a connection that begins now (not yet confirmed) or one that has been
/// translated. What conntrack finds invalid (a reset or a reply without a connection), or what began while these rules
/// were not there, is neither.
///
/// What most packets do, from container to container, is decided once, before connection tracking: the forward chain
/// believes that. Each chain, each name of a device and each lookup in a set is paid in throughput (`make bench`).
///
/// Queries to port 53 of any address go to the router's own service. This is NAT and not a policy rule with transparent
/// sockets: a namespace that has ever had a policy rule takes the slow way for each routing decision.
pub(crate) fn router(pool: IpNet, internal: bool) -> Table {
    let (inward, outward) = if internal {
        ("", "")
    } else {
        (
            r"
        ct state established,related accept
        ct status dnat accept",
            r#"
        iifname "br0" ip saddr POOL ip daddr != POOL ct status and (confirmed or snat or dnat) != confirmed accept"#,
        )
    };
    let text = format!(
        r#"
    map publish {{
        type inet_proto . inet_service : ipv4_addr . inet_service
    }}
    chain untracked {{
        type filter hook prerouting priority raw; policy accept;
        ip saddr POOL ip daddr POOL th dport != 53 iifname != "up0" notrack
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
        iifname "vxlan0" ip saddr != POOL drop
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
        iifname "br0" oifname "vxlan0" ct state established,related ip daddr POOL accept
    }}
    chain inward {{
        ip saddr POOL drop{inward}
    }}
    chain outward {{{outward}
    }}
    chain output {{
        type filter hook output priority filter; policy accept;
        oifname "up0" ip daddr POOL drop
        oifname "up0" ip saddr POOL drop
    }}
"#
    );
    table(Family::Inet, &text.replace("POOL", &pool.to_string()))
}

/// The bridge's guard: a port sends only from its endpoint's MAC and addresses, ARP included. The first rule is all that
/// good IPv4 frames meet.
pub(crate) fn bridge() -> Table {
    let text = r"
    set port_mac {
        type ifname . ether_addr
    }
    set port_address {
        type ifname . ether_addr . ipv4_addr
    }
    chain guard {
        type filter hook prerouting priority -200; policy drop;
        ether type ip iifname . ether saddr . ip saddr @port_address accept
        iifname . ether saddr != @port_mac drop
        ether type arp iifname . arp saddr ether . arp saddr ip @port_address accept
        ether type arp arp saddr ip 0.0.0.0 iifname . arp saddr ether @port_mac accept
    }
";
    table(Family::Bridge, text)
}

/// The host's part: NAT for the routers, published ports, and who may send to the overlay's ports.
///
/// All that is asked of a packet of the overlay is asked before routing, by one chain: each chain costs throughput. Addresses
/// of loopback are never on the way from a router: of what comes back to them, NAT has yet to say so.
pub(crate) fn host(overlay_ports: &[u16]) -> Table {
    let mut text = format!(
        r#"
    map publish {{
        type inet_proto . inet_service : ipv4_addr . inet_service
    }}
    set vtep {{
        type ipv4_addr . inet_service
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
        oifname != "DEV*" ip saddr {transit} masquerade
    }}
"#,
        transit = transit::RANGE
    );
    let ports = overlay_ports.iter().map(u16::to_string).collect::<Vec<_>>().join(", ");
    let mut arriving = String::new();
    if !overlay_ports.is_empty() {
        let _ = write!(
            text,
            r#"    chain overlay {{
        ip saddr . udp dport @vtep iifname != "DEV*" notrack accept
        iifname "DEV*" drop
        meta nfproto ipv4 fib daddr type != unicast drop
        notrack
    }}
    chain untracked_out {{
        type filter hook output priority raw; policy accept;
        udp dport {{ {ports} }} notrack
    }}
"#
        );
        let _ = writeln!(arriving, "        udp dport {{ {ports} }} goto overlay");
    }
    let _ = write!(
        text,
        r#"    chain arriving {{
        type filter hook prerouting priority raw; policy accept;
{arriving}        iifname "DEV*" ip daddr 127.0.0.0/8 drop
    }}
    chain forward {{
        type filter hook forward priority filter - 10; policy accept;
        oifname "DEV*" ct state established,related accept
        oifname "DEV*" ct status dnat accept
        oifname "DEV*" drop
    }}
"#
    );
    table(Family::Inet, &text.replace("DEV", HOST_DEVICE_PREFIX))
}

fn table(family: Family, body: &str) -> Table {
    let digest = format!("droveway {:016x}", crate::hash(&[family.as_str(), body]));
    let text = format!("table {} {TABLE} {{\n    comment \"{digest}\"\n{body}}}\n", family.as_str());
    Table { text, digest }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_text_is_another_digest_and_the_text_says_it() {
        let (a, b) = (host(&[4789]), host(&[4789, 8472]));
        assert_ne!(a.digest, b.digest);
        assert!(a.text.contains(&a.digest));
        assert!(!router("10.42.0.0/16".parse().unwrap(), true).text.contains("POOL"));
    }

    #[test]
    fn an_internal_network_lets_nothing_through_up0() {
        let open = router("10.42.0.0/16".parse().unwrap(), false).text;
        let internal = router("10.42.0.0/16".parse().unwrap(), true).text;
        assert!(open.contains(r#"iifname "br0" ip saddr 10.42.0.0/16 ip daddr != 10.42.0.0/16 ct status"#));
        assert!(!internal.contains("ip daddr != 10.42.0.0/16 ct status"));
        assert!(!internal.contains("ct status dnat accept"));
    }
}
