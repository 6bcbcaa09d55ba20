//! Nothing of a network's addresses leaves a router but through the overlay.

use std::net::Ipv4Addr;

use droveway::lab::Lab;

use crate::frame::{BROADCAST, echo, ipv4, mac, packet, tcp_syn, udp};
use crate::probe;
use crate::support::{
    Capture, LIMIT, Look, idle, in_router, lab, meet, router_words, says, silent, succeeds, ttl, until,
};
use crate::watch::canary;

const POOL: &str = "10.42.";

fn none_of_the_pool(what: &str, capture: &Capture) {
    let lines = capture.lines();
    let leaked: Vec<_> = lines.iter().filter(|line| line.contains(POOL)).collect();
    assert!(leaked.is_empty(), "{what}: {leaked:#?}");
}

/// The host's end of the router's uplink.
fn uplink(lab: &Lab, host: &str) -> String {
    let text = lab.check(host, &["ls", "/sys/class/net"]).unwrap();
    text.split_whitespace().find(|name| name.starts_with("dw")).unwrap().to_owned()
}

#[test]
fn what_goes_out_is_masqueraded_and_no_address_of_the_pool_is_seen_beyond_the_router() {
    let lab = lab(2);
    let (inside, far) = (lab.run("h1", &idle("inside")).unwrap(), lab.run("h2", &idle("far")).unwrap());
    meet(&lab, &inside, &far);
    let at = inside.path();
    let captures = [
        ("up0", Capture::in_router(&lab, "h1", "managed", "up0", "ip or arp or vlan")),
        ("dw0", Capture::start(&lab, "h1", &["env"], &uplink(&lab, "h1"), "ip or arp or vlan")),
        // Not what is inside of VXLAN.
        ("eth0", Capture::start(&lab, "h1", &["env"], "eth0", "net 10.42.0.0/16 or icmp or arp")),
    ];
    // To addresses of the pool that nobody has, from the container and from the router itself.
    let nowhere = ["10.42.255.250", "10.42.77.77", "10.42.255.255"];
    for to in nowhere {
        assert!(silent(&lab, &at, to), "{to}");
    }
    let me = (mac(&inside.mac()), inside.ip());
    let gateway = mac(&in_router(&lab, "h1", "managed", &["cat", "/sys/class/net/br0/address"]));
    let mut frames = Vec::new();
    for to in nowhere.map(|to| to.parse::<Ipv4Addr>().unwrap()) {
        for over in [gateway, BROADCAST] {
            frames.push(packet(over, me.0, &ipv4(me.1, to, 17, &udp(6666, 6666, canary().as_bytes()))));
            frames.push(packet(over, me.0, &ipv4(me.1, to, 1, &echo(canary().as_bytes()))));
        }
    }
    // To the outside from addresses that are not the container's.
    let server = Ipv4Addr::new(10, 0, 0, 2);
    for from in [Ipv4Addr::new(10, 42, 77, 77), far.ip(), Ipv4Addr::new(192, 0, 2, 1)] {
        frames.push(packet(gateway, me.0, &ipv4(from, server, 17, &udp(6666, 6666, canary().as_bytes()))));
    }
    // From ports at which the host itself is asked: its tunnels', IKE's, a service's.
    for own in [4500, 500] {
        frames.push(packet(gateway, me.0, &ipv4(me.1, server, 17, &udp(own, 4500, b"own"))));
    }
    frames.push(packet(gateway, me.0, &ipv4(me.1, server, 6, &tcp_syn((me.1, 7443), (server, 4500)))));
    // Replies and resets that belong to no connection.
    let reset = [0, 80, 0, 90, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x14, 0, 0, 0, 0, 0, 0];
    frames.push(packet(gateway, me.0, &ipv4(me.1, server, 6, &reset)));
    frames.push(packet(gateway, me.0, &ipv4(me.1, server, 1, &[0, 0, 0xff, 0xfe, 0, 0, 0, 1])));
    let at_server =
        Capture::start(&lab, "server", &["env"], "eth0", "icmp or net 10.42.0.0/16 or dst port 4500");
    probe::send(&lab, &at, &frames);
    for to in nowhere {
        let ping = ["ping", "-n", "-c", "1", "-W", "0.4", "-I", "up0", to];
        assert!(!succeeds(
            &lab,
            "h1",
            &router_words("managed", &ping).iter().map(String::as_str).collect::<Vec<_>>()
        ));
    }
    // What is meant for the outside goes there, in the host's name, and is seen at each place.
    assert!(ttl(&lab, &at, "10.0.0.2").is_some(), "{}", says(&lab, &at, &["ping", "-c", "1", "10.0.0.2"]));
    at_server.sees("10.0.0.5 > 10.0.0.2: ICMP echo request");
    let [up0, dw0, eth0] = captures.each_ref().map(|(_, capture)| capture);
    up0.sees("> 10.0.0.2: ICMP echo request");
    dw0.sees("> 10.0.0.2: ICMP echo request");
    eth0.sees("10.0.0.5 > 10.0.0.2: ICMP echo request");
    for (what, capture) in &captures {
        none_of_the_pool(what, capture);
    }
    none_of_the_pool("at the server", &at_server);
    let lent: Vec<u16> = at_server
        .lines()
        .iter()
        .filter(|line| line.contains("> 10.0.0.2.4500"))
        .map(|line| {
            let from = line.split("10.0.0.5.").nth(1).unwrap().split(' ').next().unwrap();
            from.parse().unwrap()
        })
        .collect();
    assert!(lent.len() == 3 && lent.iter().all(|port| *port >= 32_768), "{lent:?}");
}

#[test]
fn nobody_outside_reaches_a_container_by_its_address() {
    let lab = lab(2);
    let (inside, far) = (lab.run("h1", &idle("inside")).unwrap(), lab.run("h2", &idle("far")).unwrap());
    meet(&lab, &inside, &far);
    let capture = Capture::start(&lab, &inside.path(), &["env"], "eth0", "icmp");
    let to = inside.ip().to_string();
    lab.check("server", &["ip", "route", "add", "10.42.0.0/16", "via", "10.0.0.5"]).unwrap();
    for from in ["server", "h1", "h2"] {
        assert!(silent(&lab, from, &to), "from {from}");
    }
    // Even where the host is told to send it in.
    let (device, own) =
        (uplink(&lab, "h1"), in_router(&lab, "h1", "managed", &["ip", "-4", "-o", "addr", "show", "up0"]));
    let router = own.split("inet ").nth(1).unwrap().split('/').next().unwrap();
    lab.check("h1", &["ip", "route", "add", "10.42.0.0/16", "via", router, "dev", &device, "onlink"])
        .unwrap();
    for from in ["server", "h1"] {
        assert!(silent(&lab, from, &to), "from {from} by way of the uplink");
    }
    assert!(ttl(&lab, &far.path(), &to).is_some());
    capture.sees(&format!("{} > {to}: ICMP echo request", far.ip()));
    let lines = capture.lines();
    assert!(lines.iter().all(|line| line.contains(&far.ip().to_string())), "{lines:#?}");
}

#[test]
fn somebody_elses_nat_leads_no_container_to_the_hosts_loopback() {
    let lab = lab(1);
    let inside = lab.run("h1", &idle("inside")).unwrap();
    let rules = "table ip theirs {
        chain pre {
            type nat hook prerouting priority dstnat - 10; policy accept;
            ip daddr 10.0.0.2 udp dport 7001 dnat to 10.0.0.5:9001
            ip daddr 10.0.0.2 udp dport 7002 dnat to 127.0.0.1:9001
        }
    }";
    lab.check("h1", &["nft", rules]).unwrap();
    let seen = Capture::start(&lab, "h1", &["env"], &uplink(&lab, "h1"), "udp");
    let mirrors =
        ["10.0.0.5:9001", "127.0.0.1:9001"].map(|at| probe::mirror_at(&lab, "h1", at.parse().unwrap()));
    let asks =
        |port: u16| probe::seen_as(&lab, &inside.path(), 5000 + port % 10, ([10, 0, 0, 2], port).into());
    assert!(asks(7001).is_some(), "what is not ours is left alone where it harms nobody");
    assert_eq!(asks(7002), None, "loopback is for the host's own programs");
    seen.sees("> 10.0.0.2.7002");
    for mut mirror in mirrors {
        mirror.kill().unwrap();
        mirror.wait().unwrap();
    }
}

#[test]
fn a_connection_that_began_while_the_rules_were_missing_does_not_go_on_in_the_containers_name() {
    let lab = lab(1);
    let inside = lab.run("h1", &idle("inside")).unwrap();
    let gateway = mac(&in_router(&lab, "h1", "managed", &["cat", "/sys/class/net/br0/address"]));
    let server = Ipv4Addr::new(10, 0, 0, 2);
    let frame = |from: u16| {
        vec![packet(gateway, mac(&inside.mac()), &ipv4(inside.ip(), server, 17, &udp(from, 6666, b"flow")))]
    };
    let capture = |what: &str| Capture::in_router(&lab, "h1", "managed", "up0", what);
    // Nobody mends it meanwhile.
    lab.kill_agent("h1").unwrap();
    in_router(&lab, "h1", "managed", &["nft", "delete", "table", "inet", "droveway"]);
    let bare = capture("udp port 6666");
    probe::send(&lab, &inside.path(), &frame(5001));
    bare.sees(&format!("{}.5001 > 10.0.0.2.6666", inside.ip()));
    let tracked = in_router(&lab, "h1", "managed", &["cat", "/proc/net/nf_conntrack"]);
    lab.start_agent("h1").unwrap();
    lab.wait_connected("h1").unwrap();
    until(LIMIT, "the rules are back", || {
        in_router(&lab, "h1", "managed", &["nft", "list", "tables"]).contains("inet droveway")
    });
    let mended = capture("udp port 6666");
    for from in [5001, 5002] {
        probe::send(&lab, &inside.path(), &frame(from));
    }
    mended.sees(".5002 > 10.0.0.2.6666");
    none_of_the_pool(&format!("what was tracked: {tracked}"), &mended);
}
