//! An underlay of IPv6 alone: server, tunnels and VXLAN go over it as over IPv4.

use std::net::{Ipv6Addr, SocketAddr};

use droveway::lab::capture::What;
use droveway::lab::{Container, LabSpec};
use model::agent_api::{TunnelState, TunnelStatus};

use crate::frame::{Mac, ethernet, icmpv6_too_big, ipv4, mac, packet, udp, vxlan};
use crate::probe;
use crate::support::{
    Capture, LIMIT, Look, idle, idle_in, in_router, meet, network_in_clear, ping, router, run_soon, says,
    spec, ttl, ttl_of, until,
};
use crate::watch::{Watched, canary};

const H1: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 5);
const H2: Ipv6Addr = Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 6);

fn over_ipv6() -> LabSpec {
    LabSpec { underlay: "fd00::/64".parse().unwrap(), ..spec(2) }
}

fn tunnel(lab: &Watched, host: &str, peer: &str) -> TunnelStatus {
    let text = lab.check(host, &["droveway", "tunnel", "inspect", peer, "-o", "json"]).unwrap();
    let [tunnel] = serde_json::from_str(&text).unwrap();
    tunnel
}

fn pair(lab: &Watched) -> (Container, Container) {
    let pair = (lab.run("h1", &idle("near")).unwrap(), lab.run("h2", &idle("far")).unwrap());
    meet(lab, &pair.0, &pair.1);
    pair
}

#[test]
fn over_ipv6_the_walk_is_three_hops_twenty_bytes_narrower_and_a_stream_arrives_whole() {
    let lab = Watched::up(over_ipv6());
    let (near, far) = pair(&lab);
    assert_eq!(ttl(&lab, &near.path(), &far.ip().to_string()), Some(62));
    let text =
        lab.check(&near.path(), &["traceroute", "-n", "-q", "1", "-w", "2", &far.ip().to_string()]).unwrap();
    let hops: Vec<_> = text.lines().skip(1).map(|line| line.split_whitespace().nth(1).unwrap()).collect();
    let routers = ["h1", "h2"].map(|host| router(&lab, host, "managed").address.unwrap().to_string());
    assert_eq!(hops, [routers[0].as_str(), &routers[1], &far.ip().to_string()]);

    let passes = |size: u32| {
        let (size, to) = ((size - 28).to_string(), far.ip().to_string());
        ttl_of(&ping(&lab, &near.path(), &["-M", "do", "-c", "1", "-W", "1", "-s", &size, &to])).is_some()
    };
    assert!(passes(1418), "ESP in UDP over IPv6 takes 82 bytes");
    assert!(!passes(1419));

    // Sixteen megabytes of the canary.
    let listener = lab.spawn(&far.path(), &["sh", "-c", "busybox nc -l -p 99 | sha256sum"]).unwrap();
    until(LIMIT, "the far one listens", || says(&lab, &far.path(), &["ss", "-tln"]).contains(":99 "));
    let text = format!("yes {} | head -c 16000000", canary());
    let send = format!("{text} | busybox nc -w 3 {} 99; {text} | sha256sum", far.ip());
    let sent = lab.check(&near.path(), &["sh", "-c", &send]).unwrap();
    let received = listener.wait_with_output().unwrap();
    assert_eq!(String::from_utf8(received.stdout).unwrap(), sent);

    let status = tunnel(&lab, "h1", "h2");
    assert!(matches!(status.state, TunnelState::Up { .. }), "{status:#?}");
    assert_eq!(status.path, Some((SocketAddr::from((H1, 4500)), SocketAddr::from((H2, 4500)))));
    assert_eq!(status.nat, (false, false), "both see the addresses that the other has");
    until(LIMIT, "the path is measured", || tunnel(&lab, "h1", "h2").mtu == Some(1418));
    let report = lab.report();
    let esp = |flow: &droveway::lab::capture::Flow| matches!(flow.what, What::Esp { .. });
    assert!(report.count(|flow| esp(flow) && flow.source.address.is_ipv6()) > 0, "{report}");
    // But for what a kernel tells of multicast groups.
    let ipv4 = |flow: &droveway::lab::capture::Flow| {
        let groups = flow.destination.address.is_multicast();
        flow.source.address.is_ipv4() && !flow.what.is_local() && !groups
    };
    assert_eq!(report.count(ipv4), 0, "{report}");
}

#[test]
fn over_ipv6_a_host_that_moves_is_followed_and_what_a_router_on_the_way_says_is_believed() {
    let lab = Watched::up(over_ipv6());
    let (near, far) = pair(&lab);
    until(LIMIT, "the path is measured", || tunnel(&lab, "h1", "h2").mtu == Some(1418));
    let handshakes = tunnel(&lab, "h1", "h2").handshakes;
    // From somebody between the two: of what h1 sends to h2, 1400 bytes pass.
    let h1: Mac = [2, 0, 0x0a, 0, 0, 5];
    let server = mac(&lab.check("server", &["cat", "/sys/class/net/eth0/address"]).unwrap());
    let told = icmpv6_too_big("fd00::2".parse().unwrap(), (H1, H2), 4500, 1400);
    until(LIMIT, "the tunnel takes no more than that leaves", || {
        probe::send(&lab, "server", &[ethernet(h1, server, 0x86dd, &told)]);
        let to = far.ip().to_string();
        ping(&lab, &near.path(), &["-n", "-c", "1", "-W", "0.3", "-M", "do", "-s", "1390", &to]);
        tunnel(&lab, "h1", "h2").mtu == Some(1318)
    });
    assert!(!tunnel(&lab, "h1", "h2").black_hole);

    for (host, address) in [("h2", "fd00::77"), ("h1", "fd00::78")] {
        lab.readdress(host, address.parse().unwrap()).unwrap();
        until(LIMIT, "traffic is back", || ttl(&lab, &near.path(), &far.ip().to_string()).is_some());
    }
    let now = tunnel(&lab, "h1", "h2");
    assert_eq!(now.handshakes, handshakes, "by the same IKE SA");
    assert_eq!(now.path.unwrap().1, "[fd00::77]:4500".parse().unwrap());
}

#[test]
fn a_tunnel_goes_over_from_ipv6_to_ipv4_when_a_host_has_that_alone() {
    let lab = Watched::up(over_ipv6());
    let (near, far) = pair(&lab);
    for (host, address) in [("h1", "10.9.0.5/24"), ("h2", "10.9.0.6/24")] {
        lab.check(host, &["ip", "addr", "add", address, "dev", "eth0"]).unwrap();
    }
    until(LIMIT, "each has told of its new address", || {
        let shown = lab.check("server", &["droveway", "host", "ls", "-o", "json"]).unwrap();
        shown.contains("10.9.0.5") && shown.contains("10.9.0.6")
    });
    let before = tunnel(&lab, "h1", "h2");
    assert!(before.path.unwrap().1.is_ipv6());
    lab.check("h2", &["ip", "-6", "addr", "flush", "dev", "eth0"]).unwrap();
    until(LIMIT, "traffic is back", || ttl(&lab, &near.path(), &far.ip().to_string()).is_some());
    let now = tunnel(&lab, "h1", "h2");
    assert_eq!(now.path.unwrap().1, "10.9.0.6:4500".parse().unwrap());
    assert_eq!(now.handshakes, before.handshakes, "by the same IKE SA");
}

#[test]
fn nobody_but_a_peer_can_put_a_frame_into_a_vxlan_over_ipv6() {
    let lab = Watched::in_clear(over_ipv6());
    network_in_clear(&lab, "clear", "10.50.0.0/16");
    let near = run_soon(&lab, "h1", &idle_in("clear", "near"));
    let far = run_soon(&lab, "h2", &idle_in("clear", "far"));
    meet(&lab, &near, &far);
    assert_eq!(lab.check(&near.path(), &["cat", "/sys/class/net/eth0/mtu"]).unwrap().trim(), "1430");
    let capture = Capture::start(&lab, &far.path(), &["env"], "eth0", "udp");
    let overlay =
        |host: &str| mac(&in_router(&lab, host, "clear", &["cat", "/sys/class/net/vxlan0/address"]));
    let shown = lab.check("server", &["droveway", "network", "inspect", "clear", "-o", "json"]).unwrap();
    let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
    let vni = shown.get("vni").or_else(|| shown["network"].get("vni")).or_else(|| shown[0].get("vni"));
    let vni = u32::try_from(vni.unwrap().as_u64().unwrap()).unwrap();
    let inner = |mark: u16| {
        let datagram = ipv4(near.ip(), far.ip(), 17, &udp(mark, mark, b"a frame"));
        vxlan(vni, &packet(overlay("h2"), overlay("h1"), &datagram))
    };
    let to = SocketAddr::from((H2, 4789));
    probe::send_udp(&lab, "server", to, &inner(6666));
    // The same from where a peer is arrives: what was sent was good, and it would have been seen.
    probe::send_udp(&lab, "h1", to, &inner(7777));
    capture.sees(&format!("{}.7777 > {}.7777", near.ip(), far.ip()));
    let seen = capture.lines();
    assert!(!seen.iter().any(|line| line.contains("6666")), "{seen:#?}");
}
