//! WALK.md: what a packet's day looks like.

use std::ops::Deref;
use std::process::Child;
use std::sync::LazyLock;

use droveway::lab::{Container, Lab, LabSpec, RunSpec};

use crate::probe;
use crate::support::{
    LIMIT, Look, idle, in_router, lab, meet, ping, router, router_words, says, spec, succeeds, ttl, ttl_of,
    until,
};
use crate::watch::Watched;

/// One lab for all that only looks: mongo and hubot on h2, rocketchat on h1, as in the reference. It ends with this process.
struct Walk {
    lab: Watched,
    mongo: Container,
    hubot: Container,
    rocketchat: Container,
    _resolver: Child,
}

static WALK: LazyLock<Walk> = LazyLock::new(|| {
    let resolv_conf = Some("nameserver 10.0.0.2\nsearch lab.example\n".to_owned());
    let lab = Watched::up(LabSpec { resolv_conf, ..spec(2) });
    let resolver = probe::resolver_at(&lab, "server", "10.0.0.2:53".parse().unwrap());
    let member = |host: &str, name: &str| {
        let of = |text: &str| Some(text.parse().unwrap());
        let run = RunSpec { stack: of("rocket-chat"), service: of(name), ..idle(name) };
        lab.run(host, &run).unwrap()
    };
    let (mongo, hubot) = (member("h2", "mongo"), member("h2", "hubot"));
    let rocketchat = member("h1", "rocketchat");
    meet(&lab, &mongo, &rocketchat);
    meet(&lab, &rocketchat, &hubot);
    let walk = Walk { lab, mongo, hubot, rocketchat, _resolver: resolver };
    until(LIMIT, "each knows the others' names", || {
        ["mongo", "hubot", "rocketchat"].iter().all(|name| {
            let name = format!("{name}.droveway.internal");
            ["h1/rocketchat", "h2/mongo"].iter().all(|at| !walk.dig(at, &[&name]).is_empty())
        })
    });
    walk
});

/// The walk, for one test: at its end the canary has not been seen on the underlay.
struct Walker;

fn walk() -> Walker {
    LazyLock::force(&WALK);
    Walker
}

impl Deref for Walker {
    type Target = Walk;

    fn deref(&self) -> &Walk {
        &WALK
    }
}

impl Drop for Walker {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.lab.unseen();
        }
    }
}

impl Walk {
    /// The short answer of `dig`.
    fn dig(&self, from: &str, words: &[&str]) -> String {
        let command: Vec<&str> =
            ["dig", "+short", "+time=2", "+tries=1"].iter().chain(words).copied().collect();
        says(&self.lab, from, &command).trim().to_owned()
    }

    /// The addresses of all hops; `*` for one that does not answer.
    fn hops(&self, from: &str, to: &Container) -> Vec<String> {
        let to = to.ip().to_string();
        let text = self.lab.check(from, &["traceroute", "-n", "-q", "1", "-w", "2", &to]).unwrap();
        let hop = |line: &str| line.split_whitespace().nth(1).unwrap().to_owned();
        text.lines().skip(1).map(hop).collect()
    }

    fn router_of(&self, host: &str) -> String {
        router(&self.lab, host, "managed").address.unwrap().to_string()
    }

    fn router_mac(&self, host: &str) -> String {
        in_router(&self.lab, host, "managed", &["cat", "/sys/class/net/br0/address"]).trim().to_owned()
    }
}

#[test]
fn a_neighbour_on_the_same_host_is_one_hop_away() {
    let walk = walk();
    assert_eq!(walk.hops("h2/mongo", &walk.hubot), [walk.hubot.ip().to_string()]);
    assert_eq!(ttl(&walk.lab, "h2/mongo", &walk.hubot.ip().to_string()), Some(64));
}

#[test]
fn a_container_of_another_host_is_three_hops_away_and_each_answers() {
    let walk = walk();
    let far = walk.rocketchat.ip().to_string();
    assert_eq!(walk.hops("h2/mongo", &walk.rocketchat), [walk.router_of("h2"), walk.router_of("h1"), far]);
    let back = walk.mongo.ip().to_string();
    assert_eq!(walk.hops("h1/rocketchat", &walk.mongo), [walk.router_of("h1"), walk.router_of("h2"), back]);
    assert_eq!(ttl(&walk.lab, "h2/mongo", &walk.rocketchat.ip().to_string()), Some(62));
}

#[test]
fn routers_are_neighbours_on_the_overlay() {
    let walk = walk();
    let far = walk.router_of("h2");
    let text =
        walk.lab.check("h1", &router_words("managed", &["ping", "-n", "-c", "1", "-W", "2", &far])).unwrap();
    assert_eq!(ttl_of(&text), Some(64), "{text}");
}

#[test]
fn a_container_has_one_interface_with_one_address_of_the_network() {
    let walk = walk();
    let text = walk.lab.check("h2/mongo", &["ip", "-o", "-4", "addr"]).unwrap();
    let found: Vec<&str> = text.lines().map(|line| line.split_whitespace().nth(3).unwrap()).collect();
    assert_eq!(found, ["127.0.0.1/8", &format!("{}/16", walk.mongo.ip())]);
    assert!(walk.mongo.ip().to_string().starts_with("10.42."));
    let addresses = in_router(&walk.lab, "h2", "managed", &["ip", "-o", "-4", "addr", "show", "dev", "br0"]);
    for expected in ["10.42.0.1/32", "169.254.169.250/32", &format!("{}/16", walk.router_of("h2"))] {
        assert!(addresses.contains(&format!("inet {expected} ")), "{expected}: {addresses}");
    }
}

#[test]
fn the_arp_table_has_remote_and_service_addresses_at_the_own_routers_mac_and_a_neighbour_at_its_own() {
    let walk = walk();
    let service = "169.254.169.250".to_owned();
    let (near, far) = (walk.hubot.ip().to_string(), walk.rocketchat.ip().to_string());
    for to in [&near, &far, &service] {
        assert!(ttl(&walk.lab, "h2/mongo", to).is_some(), "{to}");
    }
    let table = walk.lab.check("h2/mongo", &["ip", "neigh"]).unwrap();
    let mac_of = |address: &str| {
        let line = table.lines().find(|line| line.starts_with(&format!("{address} "))).unwrap();
        line.split("lladdr ").nth(1).unwrap().split(' ').next().unwrap().to_owned()
    };
    assert_eq!(mac_of(&far), walk.router_mac("h2"));
    assert_eq!(mac_of(&service), walk.router_mac("h2"));
    assert_eq!(mac_of(&near), walk.hubot.mac());
}

#[test]
fn nobody_answers_arp_for_an_address_outside_leased_blocks() {
    let walk = walk();
    let blocks: Vec<_> =
        ["h1", "h2"].iter().flat_map(|host| router(&walk.lab, host, "managed").blocks).collect();
    let outside = (1..250u8).map(|n| std::net::Ipv4Addr::new(10, 42, n, 77));
    let outside =
        outside.filter(|&address| !blocks.iter().any(|block| block.contains(&std::net::IpAddr::V4(address))));
    let arping = |address: &str| {
        succeeds(&walk.lab, "h2/mongo", &["arping", "-c", "1", "-w", "1", "-I", "eth0", address])
    };
    assert!(arping(&walk.rocketchat.ip().to_string()), "arping works");
    for address in outside.take(3) {
        assert!(!arping(&address.to_string()), "{address} is answered");
    }
}

#[test]
fn an_unused_address_of_a_leased_block_is_unreachable_says_the_far_router() {
    let walk = walk();
    let block = router(&walk.lab, "h1", "managed").blocks[0];
    let unused = block.hosts().last().unwrap().to_string();
    let text = says(&walk.lab, "h2/mongo", &["ping", "-n", "-c", "1", "-W", "8", &unused]);
    let expected = format!("From {} icmp_seq=1 Destination Host Unreachable", walk.router_of("h1"));
    assert!(text.contains(&expected), "{text}");
}

#[test]
fn resolv_conf_has_the_hosts_search_domain_then_the_stacks_and_the_routers_resolver() {
    let text = walk().lab.check("h1/rocketchat", &["cat", "/etc/resolv.conf"]).unwrap();
    let domains = [
        "lab.example",
        "rocket-chat.droveway.internal",
        "rocketchat.rocket-chat.droveway.internal",
        "droveway.internal",
    ];
    assert_eq!(text, format!("search {}\nnameserver 169.254.169.250\n", domains.join(" ")));
}

#[test]
fn a_container_is_found_by_short_name_by_service_and_stack_and_in_full_over_udp_and_tcp() {
    let walk = walk();
    let expected = walk.rocketchat.ip().to_string();
    for name in [
        "rocketchat.droveway.internal",
        "rocketchat.h1.droveway.internal",
        "rocketchat.rocket-chat.droveway.internal",
    ] {
        assert_eq!(walk.dig("h2/mongo", &[name]), expected, "{name}");
        assert_eq!(walk.dig("h2/mongo", &["+tcp", name]), expected, "{name} over TCP");
    }
    assert_eq!(walk.dig("h2/mongo", &["+search", "rocketchat"]), expected);
    assert_eq!(walk.dig("h2/mongo", &["+search", "+ndots=2", "rocketchat.rocket-chat"]), expected);
    for name in ["rocketchat", "rocketchat.rocket-chat.droveway.internal"] {
        let text = walk.lab.check("h2/mongo", &["ping", "-c", "1", "-W", "2", name]).unwrap();
        assert!(text.contains(&format!("({expected})")), "{text}");
    }
    let text = walk.lab.check("h2/mongo", &["getent", "hosts", "hubot"]).unwrap();
    assert!(text.starts_with(&walk.hubot.ip().to_string()), "{text}");
}

#[test]
fn an_address_has_its_name_and_a_name_that_is_none_does_not_exist() {
    let walk = walk();
    let name = walk.dig("h2/mongo", &["-x", &walk.rocketchat.ip().to_string()]);
    assert!(name.contains("rocketchat") && name.ends_with(".droveway.internal."), "{name}");
    let text = says(&walk.lab, "h2/mongo", &["dig", "+time=2", "no-such-name.droveway.internal"]);
    assert!(text.contains("status: NXDOMAIN"), "{text}");
    let text = says(&walk.lab, "h2/mongo", &["dig", "+time=2", "mongo.droveway.internal", "AAAA"]);
    assert!(text.contains("status: NOERROR") && text.contains("ANSWER: 0"), "{text}");
}

#[test]
fn a_foreign_name_is_asked_of_the_hosts_resolver() {
    assert_eq!(walk().dig("h2/mongo", &["www.example.com"]), "192.0.2.7");
    assert_eq!(walk().dig("h2/mongo", &["+search", "intranet"]), "192.0.2.7", "by the host's search domain");
}

#[test]
fn a_query_to_any_resolver_is_answered_by_the_router_in_that_ones_name() {
    let walk = walk();
    let expected = walk.rocketchat.ip().to_string();
    // Outside, a container on another host, and the router itself.
    for asked in ["8.8.8.8", &expected, "10.42.0.1"] {
        for way in ["+notcp", "+tcp"] {
            let at = format!("@{asked}");
            let words = ["dig", &at, "+time=2", "+tries=1", way, "rocketchat.droveway.internal"];
            let text = walk.lab.check("h2/mongo", &words).unwrap();
            assert!(text.contains(&format!("\t{expected}")), "{text}");
            assert!(text.contains(&format!("SERVER: {asked}#53")), "{text}");
            assert!(!text.contains("reply from unexpected source"), "{text}");
        }
    }
}

#[test]
fn metadata_tells_a_container_of_itself_and_its_neighbours() {
    let walk = walk();
    let get = |at: &str, path: &str| probe::metadata(&walk.lab, at, &format!("/latest/{path}"));
    assert_eq!(get("h2/mongo", "self/container/name"), "mongo");
    assert_eq!(get("h2/mongo", "self/container/primary_ip"), walk.mongo.ip().to_string());
    assert_eq!(get("h1/rocketchat", "self/container/service_name"), "rocketchat");
    assert_eq!(get("h1/rocketchat", "self/stack/name"), "rocket-chat");
    let all = get("h1/rocketchat", "containers");
    assert!(["mongo", "hubot", "rocketchat"].iter().all(|name| all.contains(name)), "{all}");
}

/// The largest packet passes whole, one byte more does not, and all devices say so.
fn mtu_is(lab: &Lab, from: &Container, to: &Container, mtu: u32) {
    let at = from.path();
    let text = lab.check(&at, &["cat", "/sys/class/net/eth0/mtu"]).unwrap();
    assert_eq!(text.trim(), mtu.to_string());
    for device in ["br0", "tun0", "up0"] {
        let file = format!("/sys/class/net/{device}/mtu");
        assert_eq!(
            in_router(lab, &from.host, "managed", &["cat", &file]).trim(),
            mtu.to_string(),
            "{device}"
        );
    }
    let passes = |size: u32| {
        let (size, to) = ((size - 28).to_string(), to.ip().to_string());
        ttl_of(&ping(lab, &at, &["-M", "do", "-c", "1", "-W", "1", "-s", &size, &to])).is_some()
    };
    assert!(passes(mtu), "a packet of {mtu} bytes passes");
    assert!(!passes(mtu + 1), "a packet of {} bytes does not", mtu + 1);
}

#[test]
fn the_mtu_is_what_the_underlay_leaves() {
    let walk = walk();
    mtu_is(&walk.lab, &walk.mongo, &walk.rocketchat, 1438);
}

#[test]
fn the_mtu_follows_a_larger_underlay() {
    let lab = Watched::up(LabSpec { mtu: 9000, ..spec(2) });
    let (one, other) = (lab.run("h1", &idle("one")).unwrap(), lab.run("h2", &idle("other")).unwrap());
    meet(&lab, &one, &other);
    mtu_is(&lab, &one, &other, 8938);
}

#[test]
fn a_container_that_ends_leaves_nothing() {
    let lab = lab(1);
    let devices = |lab: &Lab| in_router(lab, "h1", "managed", &["ls", "/sys/class/net"]);
    let stays = lab.run("h1", &idle("stays")).unwrap();
    let before = devices(&lab);
    lab.run("h1", &idle("goes")).unwrap();
    assert_ne!(devices(&lab), before);
    lab.kill_container("h1", "goes").unwrap();
    assert_eq!(devices(&lab), before);
    let left: Vec<_> = lab.endpoints("h1").unwrap().into_iter().map(|endpoint| endpoint.id).collect();
    assert_eq!(left, [stays.attached.endpoint.id]);
    until(LIMIT, "the server has forgotten it", || {
        !says(&lab, "server", &["droveway", "endpoint", "ls"]).contains("goes")
    });
}
