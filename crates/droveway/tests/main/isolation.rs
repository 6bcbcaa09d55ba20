//! Two networks of the same address space on the same hosts cannot reach each other by any packet.

use std::net::{Ipv4Addr, SocketAddr};

use droveway::lab::{Container, Lab, RunSpec};

use crate::frame::{Arp, BROADCAST, Mac, echo, ipv4, mac, packet, tcp_syn, udp, vxlan};
use crate::probe;
use crate::support::{
    Capture, LIMIT, Look, idle_in, in_router, lab, meet, router, run_soon, silent, spec, succeeds, ttl, until,
};
use crate::watch::{Watched, canary};

const SPACE: &str = "10.50.0.0/16";
/// An address that both networks use: of the slice that is kept for claims.
const TWIN: Ipv4Addr = Ipv4Addr::new(10, 50, 0, 10);
/// The port that marks what attackers send.
const MARK: u16 = 6666;

/// Everything of one network: a container on each host.
struct Side {
    near: Container,
    far: Container,
    /// Another on the far host, which both networks have at the same address.
    twin: Container,
    /// Another on the near host, whose address the other network does not use.
    own: Container,
}

fn side(lab: &Lab, network: &str, driver: &str) -> Side {
    let create = ["droveway", "network", "create", network, "--subnet", SPACE, "--driver", driver];
    lab.check("server", &create).unwrap();
    let run = |host: &str, name: &str, address: Option<Ipv4Addr>| {
        let run =
            RunSpec { address: address.map(Into::into), ..idle_in(network, &format!("{network}-{name}")) };
        run_soon(lab, host, &run)
    };
    let one = Ipv4Addr::new(10, 50, 0, if network == "red" { 66 } else { 77 });
    let side = Side {
        near: run("h1", "near", None),
        far: run("h2", "far", None),
        twin: run("h2", "twin", Some(TWIN)),
        own: run("h1", "own", Some(one)),
    };
    meet(lab, &side.near, &side.far);
    meet(lab, &side.near, &side.twin);
    meet(lab, &side.own, &side.far);
    side
}

/// What comes in at a container, up to the sentinel that its own side sends last.
fn came_in(lab: &Lab, capture: &Capture, victim: &Container, friend: &Container) -> Vec<String> {
    let seen = |line: &str| line.contains(&format!("{} > {}: ICMP echo request", friend.ip(), victim.ip()));
    assert!(ttl(lab, &friend.path(), &victim.ip().to_string()).is_some(), "{} is reached", victim.path());
    until(LIMIT, "the sentinel is seen", || capture.lines().iter().any(|line| seen(line)));
    capture.lines()
}

fn overlay_mac(lab: &Lab, host: &str, network: &str) -> Mac {
    mac(&in_router(lab, host, network, &["cat", "/sys/class/net/vxlan0/address"]))
}

fn gateway_mac(lab: &Lab, host: &str, network: &str) -> Mac {
    mac(&in_router(lab, host, network, &["cat", "/sys/class/net/br0/address"]))
}

fn vni(lab: &Lab, network: &str) -> u32 {
    let text = lab.check("server", &["droveway", "network", "inspect", network, "-o", "json"]).unwrap();
    let value: serde_json::Value = serde_json::from_str(&text).unwrap();
    let found = value.get("vni").or_else(|| value["network"].get("vni")).or_else(|| value[0].get("vni"));
    u32::try_from(found.unwrap().as_u64().unwrap()).unwrap()
}

#[test]
fn encrypted_networks_of_equal_cidr_on_the_same_hosts_cannot_reach_each_other_by_any_packet() {
    equal_cidrs(&lab(2), "ipsec");
}

#[test]
fn vxlans_of_equal_cidr_on_the_same_hosts_cannot_reach_each_other_by_any_packet() {
    equal_cidrs(&Watched::in_clear(spec(2)), "vxlan");
}

fn equal_cidrs(lab: &Lab, driver: &str) {
    let (red, blue) = (side(lab, "red", driver), side(lab, "blue", driver));
    let overlay = match driver {
        "vxlan" => overlay_mac(lab, "h2", "blue"),
        // A TUN device has none; the far bridge's stands in.
        _ => gateway_mac(lab, "h2", "blue"),
    };
    assert_eq!(red.twin.ip(), blue.twin.ip());
    let attacker = &red.own;
    let at = attacker.path();
    let victims =
        [(&blue.near, &blue.far), (&blue.far, &blue.near), (&blue.twin, &blue.near), (&blue.own, &blue.far)];
    let captures =
        victims.map(|(victim, _)| Capture::start(lab, &victim.path(), &["env"], "eth0", "ip or arp or vlan"));
    let uplinks =
        ["h1", "h2"].map(|host| Capture::in_router(lab, host, "blue", "up0", &format!("net {SPACE}")));

    // The same address in both: one's own is reached.
    let own = Capture::start(lab, &red.twin.path(), &["env"], "eth0", "icmp");
    assert_eq!(ttl(lab, &at, &TWIN.to_string()), Some(62));
    own.sees(&format!("{} > {TWIN}", attacker.ip()));
    // By the ordinary way.
    let to = blue.own.ip().to_string();
    assert!(silent(lab, &at, &to));
    assert!(!succeeds(lab, &at, &["arping", "-c", "1", "-w", "1", "-I", "eth0", &to]));
    // Byte by byte: to their MACs, to everyone, to the gateway.
    let me = (mac(&attacker.mac()), attacker.ip());
    let gateway = gateway_mac(lab, "h1", "red");
    let mut frames = Vec::new();
    for (victim, _) in victims {
        let (there, address) = (mac(&victim.mac()), victim.ip());
        for to in [there, BROADCAST, gateway, gateway_mac(lab, "h1", "blue"), overlay] {
            frames.push(packet(to, me.0, &ipv4(me.1, address, 1, &echo(canary().as_bytes()))));
            frames.push(packet(to, me.0, &ipv4(me.1, address, 17, &udp(MARK, MARK, canary().as_bytes()))));
            let syn = tcp_syn((me.1, MARK), (address, 80));
            frames.push(packet(to, me.0, &ipv4(me.1, address, 6, &syn)));
            frames.push(Arp { operation: 1, sender: me, target: ([0; 6], address) }.frame(to, me.0));
            frames.push(Arp { operation: 2, sender: me, target: (there, address) }.frame(to, me.0));
        }
    }
    // By way of the host: its own addresses, and those of the other router between it and the host.
    for transit in (0..8).map(|n| Ipv4Addr::new(169, 254, 240, n)) {
        frames.push(packet(gateway, me.0, &ipv4(me.1, transit, 17, &udp(MARK, 53, b"attack"))));
        frames.push(packet(gateway, me.0, &ipv4(me.1, transit, 1, &echo(b"attack"))));
    }
    probe::send(lab, &at, &frames);
    let own_router = in_router(lab, "h1", "red", &["ip", "-o", "-4", "addr", "show", "dev", "up0"]);
    let other_router = in_router(lab, "h1", "blue", &["ip", "-o", "-4", "addr", "show", "dev", "up0"]);
    let transit = |text: &str| text.split("inet ").nth(1).unwrap().split('/').next().unwrap().to_owned();
    assert_ne!(transit(&own_router), transit(&other_router));
    assert!(silent(lab, &at, &transit(&other_router)), "the other network's router does not answer");

    for (capture, (victim, friend)) in captures.iter().zip(victims) {
        let lines = came_in(lab, capture, victim, friend);
        let foreign = [attacker.ip().to_string(), attacker.mac()];
        let foreign = lines.iter().filter(|line| foreign.iter().any(|sign| line.contains(sign)));
        assert_eq!(foreign.collect::<Vec<_>>(), Vec::<&String>::new(), "at {}", victim.path());
        assert!(!lines.iter().any(|line| line.contains(&MARK.to_string())), "{lines:#?}");
    }
    for capture in uplinks {
        assert_eq!(capture.lines(), Vec::<String>::new(), "by the uplink");
    }
}

#[test]
fn nobody_but_a_peer_can_put_a_frame_into_the_overlay() {
    let lab = Watched::in_clear(spec(2));
    let (red, blue) = (side(&lab, "red", "vxlan"), side(&lab, "blue", "vxlan"));
    let victim = &blue.far;
    let capture = Capture::start(&lab, &victim.path(), &["env"], "eth0", "udp");
    let inner = |mark: u16, payload: &[u8]| {
        let datagram = ipv4(blue.near.ip(), victim.ip(), 17, &udp(mark, mark, payload));
        let (to, from) = (overlay_mac(&lab, "h2", "blue"), overlay_mac(&lab, "h1", "blue"));
        vxlan(vni(&lab, "blue"), &packet(to, from, &datagram))
    };
    let port = 4789;
    // Somebody else's NAT leads there as well.
    let detour = SocketAddr::from(([10, 0, 0, 2], 7003));
    for (host, to) in [("h1", "10.0.0.5"), ("h2", "10.0.0.6")] {
        let chain = "type nat hook prerouting priority dstnat - 10; policy accept;";
        let rule = format!("ip daddr 10.0.0.2 udp dport 7003 dnat to {to}:{port}");
        let rules = format!("table ip theirs {{ chain pre {{ {chain} {rule}; }}; }}");
        lab.check(host, &["nft", &rules]).unwrap();
    }
    for from in [&red.near, &red.far, &blue.near] {
        probe::send_udp(&lab, &from.path(), detour, &inner(MARK, b"attack"));
    }
    let hosts = [Ipv4Addr::new(10, 0, 0, 5), Ipv4Addr::new(10, 0, 0, 6)];
    for to in hosts.map(|host| SocketAddr::from((host, port))) {
        for from in [&red.near, &red.far, &blue.near] {
            probe::send_udp(&lab, &from.path(), to, &inner(MARK, b"attack"));
            // Larger than the way: it comes in fragments, of which only the first has a port.
            probe::send_udp(&lab, &from.path(), to, &inner(MARK, &[0; 1800]));
        }
        probe::send_udp(&lab, "server", to, &inner(MARK, b"attack"));
    }
    // The same from where a peer is arrives: what was sent was good, and it would have been seen.
    probe::send_udp(&lab, "h1", SocketAddr::from((hosts[1], port)), &inner(7777, b"from a peer"));
    capture.sees(&format!("{}.7777 > {}.7777", blue.near.ip(), victim.ip()));
    let lines = capture.lines();
    assert!(!lines.iter().any(|line| line.contains(&MARK.to_string())), "{lines:#?}");
    assert_eq!(router(&lab, "h2", "blue").endpoints.len(), 2, "the victim and its twin");
}
