//! A container with CAP_NET_RAW cannot be its neighbour.

use std::net::Ipv4Addr;

use droveway::lab::Container;

use crate::frame::{Arp, BROADCAST, Mac, echo, echo_reply, ethernet, ipv4, mac, packet, tagged, udp};
use crate::probe;
use crate::steady::Steady;
use crate::support::{
    Capture, LIMIT, Look, idle, in_router, lab, meet, ping, router, silent, ttl, ttl_of, until,
};
use crate::table::crowd;
use crate::watch::{Watched, canary};

struct Street {
    lab: Watched,
    attacker: Container,
    victim: Container,
    bystander: Container,
    far: Container,
    gateway: Mac,
}

/// With so many others on their host that attacker and victim have a bridge of their own, or none.
fn street(others: usize) -> Street {
    let lab = lab(2);
    let run = |host: &str, name: &str| lab.run(host, &idle(name)).unwrap();
    let (bystander, far) = (run("h1", "bystander"), run("h2", "far"));
    crowd(&lab, "h1", others);
    let (attacker, victim) = (run("h1", "attacker"), run("h1", "victim"));
    for other in [&attacker, &victim, &bystander] {
        meet(&lab, &far, other);
    }
    let gateway = mac(&in_router(&lab, "h1", "managed", &["cat", "/sys/class/net/br0/address"]));
    Street { lab, attacker, victim, bystander, far, gateway }
}

impl Street {
    /// Everything that nobody but somebody else may send.
    fn forgeries(&self) -> Vec<Vec<u8>> {
        let who = |container: &Container| (mac(&container.mac()), container.ip());
        let (me, victim, other, far) =
            (who(&self.attacker), who(&self.victim), who(&self.bystander), who(&self.far));
        let datagram =
            |from: Ipv4Addr, to: Ipv4Addr| ipv4(from, to, 17, &udp(6666, 6666, canary().as_bytes()));
        let mut frames = Vec::new();
        for from in [victim.0, self.gateway, far.0, BROADCAST, [2, 0, 0, 0, 0, 1]] {
            for (to, address) in [other, (self.gateway, far.1), (BROADCAST, other.1)] {
                frames.push(packet(to, from, &datagram(me.1, address)));
                frames.push(packet(to, from, &datagram(victim.1, address)));
            }
        }
        let others = [victim.1, far.1, Ipv4Addr::new(10, 42, 0, 1), Ipv4Addr::new(169, 254, 169, 250)];
        let others = others.into_iter().chain([Ipv4Addr::new(10, 42, 77, 77), Ipv4Addr::UNSPECIFIED]);
        for from in others.clone().chain([Ipv4Addr::new(8, 8, 8, 8)]) {
            for (to, address) in [other, (self.gateway, far.1), (BROADCAST, Ipv4Addr::BROADCAST)] {
                frames.push(packet(to, me.0, &datagram(from, address)));
                frames.push(packet(to, me.0, &ipv4(from, address, 1, &echo(canary().as_bytes()))));
            }
        }
        for operation in [1, 2] {
            for to in [BROADCAST, other.0, victim.0, self.gateway] {
                let mut arp = |sender: (Mac, Ipv4Addr), target: Ipv4Addr, from: Mac| {
                    frames.push(Arp { operation, sender, target: ([0; 6], target) }.frame(to, from));
                };
                for claimed in
                    [victim.1, far.1, Ipv4Addr::new(10, 42, 0, 1), Ipv4Addr::new(169, 254, 169, 250)]
                {
                    arp((me.0, claimed), claimed, me.0);
                    arp((me.0, claimed), other.1, me.0);
                }
                arp(victim, other.1, me.0);
                arp(victim, other.1, victim.0);
                arp((victim.0, me.1), other.1, me.0);
                arp(me, other.1, victim.0);
            }
        }
        let honest = packet(other.0, me.0, &datagram(me.1, other.1));
        let plain = frames.clone();
        frames.extend(plain.iter().chain([&honest]).flat_map(|frame| [0, 5].map(|vlan| tagged(frame, vlan))));
        frames.push(tagged(&tagged(&honest, 5), 6));
        // Other protocols: IPv6, LLDP, spanning tree (to the bridge itself), and one that nobody knows.
        for kind in [0x86dd, 0x88cc, 0x0027, 0x88a8, 0x1234] {
            for to in [other.0, BROADCAST, [1, 0x80, 0xc2, 0, 0, 0]] {
                frames.push(ethernet(to, me.0, kind, &[0x60; 64]));
            }
        }
        // What a bridge keeps to itself does not meet its prerouting hooks: it may teach nobody a MAC, nor be believed.
        for group in [0x00, 0x02, 0x03, 0x0e].map(|last| [1, 0x80, 0xc2, 0, 0, last]) {
            for from in [victim.0, far.0, self.gateway] {
                frames.push(ethernet(group, from, 0x88cc, &[0x60; 64]));
                frames.push(packet(group, from, &datagram(victim.1, other.1)));
            }
            let query = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x06victim\x00\x00\x01\x00\x01";
            for names in [Ipv4Addr::new(169, 254, 169, 250), Ipv4Addr::new(10, 42, 0, 1)] {
                frames.push(packet(group, me.0, &ipv4(victim.1, names, 17, &udp(6666, 53, query))));
                frames.push(packet(group, me.0, &ipv4(victim.1, names, 1, &echo(canary().as_bytes()))));
            }
        }
        frames
    }

    /// Where the router believes that an address is.
    fn router_believes(&self, address: Ipv4Addr) -> String {
        in_router(&self.lab, "h1", "managed", &["ip", "neigh", "show", &address.to_string(), "dev", "br0"])
    }
}

#[test]
fn no_forged_frame_of_a_container_reaches_anyone_and_its_neighbours_traffic_goes_on() {
    no_forged_frame(0, "br0");
}

#[test]
fn no_forged_frame_of_a_container_on_a_leaf_reaches_anyone() {
    no_forged_frame(plan::Bridge::PORTS - 1, "leaf1");
}

fn no_forged_frame(others: usize, bridge: &str) {
    let street = street(others);
    let Street { lab, attacker, victim, bystander, far, .. } = &street;
    let steady = Steady::start(lab, far, victim);
    let at = |container: &Container| {
        let filter = format!("not ip6 and not ether src {}", container.mac());
        Capture::start(lab, &container.path(), &["env"], "eth0", &filter)
    };
    let (at_bystander, at_victim) = (at(bystander), at(victim));
    let overlay = Capture::in_router(lab, "h1", "managed", "tun0", "ip");
    let forgeries = street.forgeries();
    for some in forgeries.chunks(100) {
        probe::send(lab, &attacker.path(), some);
    }
    // The last is honest, and arrives: what it came by works, and nothing is still under way.
    let me = mac(&attacker.mac());
    let honest = |to: &Container, over: Mac| {
        packet(over, me, &ipv4(attacker.ip(), to.ip(), 1, &echo_reply(b"honest")))
    };
    let last = [
        honest(bystander, mac(&bystander.mac())),
        honest(victim, mac(&victim.mac())),
        honest(far, street.gateway),
    ];
    probe::send(lab, &attacker.path(), &last);
    let sign = |to: &Container| format!("{} > {}: ICMP echo reply", attacker.ip(), to.ip());
    for (capture, to) in [(&at_bystander, bystander), (&at_victim, victim), (&overlay, far)] {
        capture.sees(&sign(to));
    }
    let [router, far_router] = ["h1", "h2"].map(|host| router(lab, host, "managed").address.unwrap());
    let asks = format!("Request who-has {} tell {router}", victim.ip());
    let pings = [
        format!("{} > {}: ICMP echo request", far.ip(), victim.ip()),
        format!("{} > {}: ICMP echo reply", victim.ip(), far.ip()),
        // The far agent sees whether the tunnel lives.
        format!("{far_router} > {router}: ICMP echo request"),
        format!("{router} > {far_router}: ICMP echo reply"),
    ];
    let expected = |line: &String, of: &Container| {
        let steady = pings.iter().chain([&asks]).any(|sign| line.contains(sign));
        line.contains(&sign(of)) || (steady && of.name != bystander.name)
    };
    for (capture, of) in [(&at_bystander, bystander), (&at_victim, victim), (&overlay, far)] {
        let lines = capture.lines();
        let forged: Vec<_> = lines.iter().filter(|line| !expected(line, of)).collect();
        assert!(forged.is_empty(), "of {} frames arrived at {}: {forged:#?}", forgeries.len(), of.path());
    }
    // Nobody believes anything new.
    assert!(ttl(lab, &victim.path(), &bystander.ip().to_string()).is_some());
    for (who, knows) in [(victim, bystander), (bystander, victim)] {
        let table = lab.check(&who.path(), &["ip", "neigh", "show", &knows.ip().to_string()]).unwrap();
        assert!(table.contains(&knows.mac()), "{table}");
    }
    assert!(street.router_believes(victim.ip()).contains(&victim.mac()));
    let fdb = in_router(lab, "h1", "managed", &["bridge", "fdb", "show", "br", bridge]);
    let port = format!("p-{}", victim.attached.endpoint.id.short());
    let learned: Vec<_> = fdb.lines().filter(|line| line.contains(&victim.mac())).collect();
    assert!(!learned.is_empty() && learned.iter().all(|line| line.contains(&port)), "{learned:#?}");
    let (sent, received) = steady.end(lab, far);
    assert_eq!(sent, received, "pings to the neighbour meanwhile");
    assert!(sent > 3);
}

#[test]
fn a_container_that_takes_its_neighbours_mac_or_address_only_cuts_itself_off() {
    let street = street(0);
    let Street { lab, attacker, victim, bystander, far, .. } = &street;
    let at = attacker.path();
    let steady = Steady::start(lab, far, victim);
    let others = [bystander.ip().to_string(), far.ip().to_string()];

    lab.check(&at, &["ip", "link", "set", "eth0", "address", &victim.mac()]).unwrap();
    for other in &others {
        assert!(silent(lab, &at, other), "{other} with the neighbour's MAC");
    }
    lab.check(&at, &["ip", "link", "set", "eth0", "address", &attacker.mac()]).unwrap();
    until(LIMIT, "with its own MAC it is back", || ttl(lab, &at, &others[0]).is_some());

    let address = victim.ip().to_string();
    lab.check(&at, &["ip", "addr", "add", &format!("{address}/32"), "dev", "eth0"]).unwrap();
    for other in &others {
        let text = ping(lab, &at, &["-n", "-c", "1", "-W", "0.4", "-I", &address, other]);
        assert!(ttl_of(&text).is_none(), "{other} from the neighbour's address");
    }
    assert!(street.router_believes(victim.ip()).contains(&victim.mac()));
    lab.check(&at, &["ip", "addr", "del", &format!("{address}/32"), "dev", "eth0"]).unwrap();
    assert!(ttl(lab, &at, &others[1]).is_some(), "from its own address it reaches everyone");

    let (sent, received) = steady.end(lab, far);
    assert_eq!(sent, received, "pings to the neighbour meanwhile");
    assert!(sent > 3);
}
