//! What someone deletes is back within a second, and traffic flows again.

use std::time::{Duration, Instant};

use droveway::lab::{Container, Lab};

use crate::support::{LIMIT, Look, idle, kernel, lab, meet, router_words, says, succeeds, until};

/// A second, and as much again for a machine that has others to serve: how long it took is printed.
const BACK: Duration = Duration::from_secs(2);

struct Scene {
    lab: Lab,
    near: Container,
    far: Container,
}

impl Scene {
    fn kernel(&self) -> String {
        kernel(&self.lab, "h1")
    }

    /// Across hosts and to the outside.
    fn flows(&self) -> bool {
        let far = self.far.ip().to_string();
        [far.as_str(), "10.0.0.2"]
            .iter()
            .all(|to| succeeds(&self.lab, &self.near.path(), &["ping", "-n", "-c", "1", "-W", "0.2", to]))
    }
}

#[test]
fn whatever_is_deleted_of_a_router_or_of_the_host_is_back_within_a_second() {
    let lab = lab(2);
    let (near, far) = (lab.run("h1", &idle("near")).unwrap(), lab.run("h2", &idle("far")).unwrap());
    meet(&lab, &near, &far);
    let scene = Scene { lab, near, far };
    until(LIMIT, "all is well", || scene.flows());
    let before = scene.kernel();
    let port = format!("p-{}", scene.near.attached.endpoint.id.short());
    let find = |begin: &str| before.lines().find(|line| line.starts_with(begin)).unwrap().to_owned();
    let far_block = before.lines().find(|line| line.contains("/26 via ")).unwrap().split(' ').next().unwrap();
    let fdb = before.lines().find(|line| line.contains("dst 10.0.0.6")).unwrap();
    let neighbour =
        before.lines().find(|line| line.ends_with("PERMANENT")).unwrap().split(' ').next().unwrap();
    let address = find("br0    inet 10.42.").split_whitespace().nth(2).unwrap().to_owned();
    let near_block =
        before.lines().find(|line| line.contains("/26 dev br0")).unwrap().split(' ').next().unwrap();

    let in_router = |what: &str, command: String| (what.to_owned(), true, command);
    let on_host = |what: &str, command: &str| (what.to_owned(), false, command.to_owned());
    let cases = [
        in_router("the route to the far block", format!("ip route del {far_block}")),
        in_router("the route to the own block", format!("ip route del {near_block}")),
        in_router("the route to nowhere", "ip route del unreachable 10.42.0.0/16".into()),
        in_router("the default route", "ip route del default".into()),
        in_router("the far route, replaced", format!("ip route replace unreachable {far_block}")),
        in_router("the router's address", format!("ip addr del {address} dev br0")),
        in_router("the gateway", "ip addr del 10.42.0.1/32 dev br0".into()),
        in_router("the service address", "ip addr del 169.254.169.250/32 dev br0".into()),
        in_router("the uplink's address", "ip addr del 169.254.240.1/31 dev up0".into()),
        in_router("br0", "ip link del br0".into()),
        in_router("br0, set down", "ip link set br0 down".into()),
        in_router("the overlay's entry", format!("bridge fdb del {} dev vxlan0 dst 10.0.0.6", &fdb[..17])),
        in_router("the overlay's neighbour", format!("ip neigh del {neighbour} dev vxlan0")),
        in_router("vxlan0", "ip link del vxlan0".into()),
        in_router("vxlan0, set down", "ip link set vxlan0 down".into()),
        in_router("up0", "ip link del up0".into()),
        in_router("the endpoint's port", format!("ip link del {port}")),
        in_router("the port, freed from the bridge", format!("ip link set {port} nomaster")),
        in_router("the port, set down", format!("ip link set {port} down")),
        in_router("the router's filter", "nft delete table inet droveway".into()),
        in_router("the bridge's guard", "nft delete table bridge droveway".into()),
        in_router("one chain of the guard", "nft flush chain bridge droveway guard".into()),
        in_router("all of the router's nft", "nft flush ruleset".into()),
        in_router("the guard's elements", "nft flush set bridge droveway port_address".into()),
        in_router("a rule that is not ours", "ip rule add priority 200 from 10.0.0.0/8 lookup 53".into()),
        on_host("the host's table", "nft delete table inet droveway"),
        on_host("all of the host's nft", "nft flush ruleset"),
        on_host("the host's end of the uplink", "ip link del dw0"),
        on_host("its address", "ip addr del 169.254.240.0/31 dev dw0"),
        on_host("the router's namespace, its name", "ip netns del droveway-managed"),
    ];
    let mut late = Vec::new();
    for (what, inside, command) in cases {
        let words: Vec<&str> = command.split(' ').collect();
        let words = if inside {
            router_words("managed", &words)
        } else {
            words.into_iter().map(str::to_owned).collect()
        };
        let deleted = Instant::now();
        scene.lab.check("h1", &words).unwrap();
        let mut now = String::new();
        let back = loop {
            now = if scene.flows() { scene.kernel() } else { now };
            if now == before || deleted.elapsed() > LIMIT {
                break deleted.elapsed();
            }
        };
        println!("{what}: back, and traffic flows, after {} ms", back.as_millis());
        if now != before {
            now = scene.kernel();
            let only = |one: &str, other: &str| {
                one.lines()
                    .filter(|line| !other.contains(line))
                    .map(str::to_owned)
                    .take(20)
                    .collect::<Vec<_>>()
            };
            let agent = says(&scene.lab, "h1", &["droveway", "status"]);
            let (lacks, more) = (only(&before, &now), only(&now, &before));
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
