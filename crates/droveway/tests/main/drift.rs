//! What someone deletes is back within a second, and traffic flows again.

use std::time::{Duration, Instant};

use droveway::lab::Container;

use crate::support::{
    LIMIT, Look, idle_in, kernel, lab, meet, network_in_clear, ping, router_words, run_soon, says, spec,
    ttl_of, until,
};
use crate::table::crowd;
use crate::watch::Watched;

/// A second, and as much again for a machine that has others to serve: how long it took is printed.
const BACK: Duration = Duration::from_secs(2);

struct Scene {
    lab: Watched,
    network: &'static str,
    near: Container,
    far: Container,
    /// What the kernel shows while all is well.
    before: String,
}

/// Where something is taken away.
enum At {
    Router,
    Host,
}

/// What is taken away, and how.
struct Case {
    what: &'static str,
    at: At,
    command: String,
}

fn in_router(what: &'static str, command: impl Into<String>) -> Case {
    Case { what, at: At::Router, command: command.into() }
}

fn on_host(what: &'static str, command: impl Into<String>) -> Case {
    Case { what, at: At::Host, command: command.into() }
}

impl Scene {
    fn new(lab: Watched, network: &'static str) -> Self {
        let far = run_soon(&lab, "h2", &idle_in(network, "far"));
        let near = run_soon(&lab, "h1", &idle_in(network, "near"));
        meet(&lab, &near, &far);
        let mut scene = Self { lab, network, near, far, before: String::new() };
        until(LIMIT, "all is well", || scene.flows());
        scene.before = scene.kernel();
        scene
    }

    fn kernel(&self) -> String {
        kernel(&self.lab, "h1", self.network)
    }

    /// Across hosts and to the outside.
    fn flows(&self) -> bool {
        let far = self.far.ip().to_string();
        [far.as_str(), "10.0.0.2"].iter().all(|to| {
            ttl_of(&ping(&self.lab, &self.near.path(), &["-n", "-c", "1", "-W", "0.2", to])).is_some()
        })
    }

    /// The first line of what the kernel shows that is so.
    fn line(&self, is: impl Fn(&str) -> bool) -> &str {
        self.before.lines().find(|line| is(line)).unwrap()
    }

    /// The first word of it.
    fn first_word(&self, is: impl Fn(&str) -> bool) -> &str {
        self.line(is).split(' ').next().unwrap()
    }

    /// Takes away one after the other; all of it comes back.
    fn all_comes_back(&self, cases: &[Case]) {
        let Self { before, lab, .. } = self;
        let mut late = Vec::new();
        for Case { what, at, command } in cases {
            let words: Vec<&str> = command.split(' ').collect();
            let words = match at {
                At::Router => router_words(self.network, &words),
                At::Host => words.into_iter().map(str::to_owned).collect(),
            };
            let deleted = Instant::now();
            lab.check("h1", &words).unwrap();
            let mut now = String::new();
            let back = loop {
                now = if self.flows() { self.kernel() } else { now };
                if now == *before || deleted.elapsed() > LIMIT {
                    break deleted.elapsed();
                }
            };
            println!("{what}: back, and traffic flows, after {} ms", back.as_millis());
            if now != *before {
                now = self.kernel();
                let only = |one: &str, other: &str| {
                    one.lines()
                        .filter(|line| !other.contains(line))
                        .map(str::to_owned)
                        .take(20)
                        .collect::<Vec<_>>()
                };
                let agent = says(lab, "h1", &["droveway", "status"]);
                let (lacks, more) = (only(before, &now), only(&now, before));
                late.push(format!("{what}: never; lacks {lacks:#?}, has {more:#?}; {agent}"));
                println!("{}", late[late.len() - 1]);
                break;
            }
            if back > BACK {
                late.push(format!("{what}: {} ms", back.as_millis()));
            }
        }
        assert!(late.is_empty(), "back later than after {BACK:?}: {late:#?}");
    }
}

/// What every router and host has.
fn common(scene: &Scene) -> Vec<Case> {
    let port = format!("p-{}", scene.near.attached.endpoint.id.short());
    let far_block = scene.first_word(|line| line.contains("/26 dev tun0"));
    let near_block = scene.first_word(|line| line.contains("/26 dev br0"));
    let address =
        scene.line(|line| line.starts_with("br0    inet 10.42.")).split_whitespace().nth(2).unwrap();
    vec![
        in_router("the route to the far block", format!("ip route del {far_block}")),
        in_router("the route to the own block", format!("ip route del {near_block}")),
        in_router("the route to nowhere", "ip route del unreachable 10.42.0.0/16"),
        in_router("the default route", "ip route del default"),
        in_router("the far route, replaced", format!("ip route replace unreachable {far_block}")),
        in_router("the router's address", format!("ip addr del {address} dev br0")),
        in_router("the gateway", "ip addr del 10.42.0.1/32 dev br0"),
        in_router("the service address", "ip addr del 169.254.169.250/32 dev br0"),
        in_router("the uplink's address", "ip addr del 169.254.240.1/31 dev up0"),
        in_router("br0", "ip link del br0"),
        in_router("br0, set down", "ip link set br0 down"),
        in_router("tun0", "ip link del tun0"),
        in_router("tun0, set down", "ip link set tun0 down"),
        in_router("the program at br0", "tc qdisc del dev br0 clsact"),
        in_router("the program at tun0", "tc filter del dev tun0 ingress"),
        in_router("up0", "ip link del up0"),
        in_router("the endpoint's port", format!("ip link del {port}")),
        in_router("the port, freed from the bridge", format!("ip link set {port} nomaster")),
        in_router("the port, set down", format!("ip link set {port} down")),
        in_router("the router's filter", "nft delete table inet droveway"),
        in_router("the bridge's guard", "nft delete table bridge droveway"),
        in_router("one chain of the guard", "nft flush chain bridge droveway guard"),
        in_router("all of the router's nft", "nft flush ruleset"),
        in_router("the guard's elements", "nft flush set bridge droveway port_address"),
        in_router("the capture of queries", "nft delete chain inet droveway translated_in"),
        in_router("a rule that is not ours", "ip rule add priority 200 from 10.0.0.0/8 lookup 53"),
        on_host("the host's table", "nft delete table inet droveway"),
        on_host("all of the host's nft", "nft flush ruleset"),
        on_host("the host's end of the uplink", "ip link del dw0"),
        on_host("its address", "ip addr del 169.254.240.0/31 dev dw0"),
        on_host("the router's namespace, its name", "ip netns del droveway-managed"),
    ]
}

#[test]
fn whatever_is_deleted_of_a_router_or_of_the_host_is_back_within_a_second() {
    let scene = Scene::new(lab(2), "managed");
    scene.all_comes_back(&common(&scene));
}

#[test]
fn what_is_deleted_of_a_vxlan_is_back_within_a_second() {
    let lab = Watched::in_clear(spec(2));
    network_in_clear(&lab, "clear", "10.50.0.0/16");
    let scene = Scene::new(lab, "clear");
    let fdb = scene.line(|line| line.contains("dst 10.0.0.6"));
    let neighbour = scene.first_word(|line| line.ends_with("PERMANENT"));
    let far_block = scene.first_word(|line| line.contains("/26 via "));
    scene.all_comes_back(&[
        in_router("the route to the far block", format!("ip route del {far_block}")),
        in_router("the overlay's entry", format!("bridge fdb del {} dev vxlan0 dst 10.0.0.6", &fdb[..17])),
        in_router("the overlay's neighbour", format!("ip neigh del {neighbour} dev vxlan0")),
        in_router("the program at vxlan0", "tc filter del dev vxlan0 ingress"),
        in_router("vxlan0", "ip link del vxlan0"),
        in_router("vxlan0, set down", "ip link set vxlan0 down"),
        on_host("the host's table", "nft delete table inet droveway"),
    ]);
}

#[test]
fn what_is_deleted_of_a_leaf_is_back_within_a_second() {
    let lab = lab(2);
    crowd(&lab, "h1", plan::Bridge::PORTS);
    let scene = Scene::new(lab, "managed");
    let port = format!("p-{}", scene.near.attached.endpoint.id.short());
    let in_router_of = |words: &[&str]| crate::support::in_router(&scene.lab, "h1", "managed", words);
    assert!(in_router_of(&["ip", "-br", "link", "show", "master", "leaf1"]).contains(&port));
    scene.all_comes_back(&[
        in_router("the leaf", "ip link del leaf1"),
        in_router("the leaf, set down", "ip link set leaf1 down"),
        in_router("its way to br0", "ip link del leaf1-up"),
        in_router("its way to br0, freed from br0", "ip link set leaf1-down nomaster"),
        in_router("its way to br0, set down", "ip link set leaf1-down down"),
        in_router("the port, freed from the leaf", format!("ip link set {port} nomaster")),
        in_router("the port, on the wrong bridge", format!("ip link set {port} master br0")),
        in_router("the bridges' guard", "nft delete table bridge droveway"),
        in_router("br0", "ip link del br0"),
    ]);
    // Made anew with all else, it forwards nothing itself either.
    scene.lab.check("h1", &["ip", "netns", "del", "droveway-managed"]).unwrap();
    until(LIMIT, "the router is back", || scene.flows() && scene.kernel() == scene.before);
    let forwards = ["cat", "/proc/sys/net/ipv4/conf/leaf1/forwarding", "/proc/sys/net/ipv4/ip_forward"];
    assert_eq!(in_router_of(&forwards), "0\n1\n");
}
