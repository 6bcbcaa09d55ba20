//! Addresses that outlive their containers, and that move: retained ones, requested ones, single ones.

use std::net::IpAddr;
use std::time::Duration;

use droveway::lab::{Container, Lab, RunSpec, SERVER};

use crate::doctor::well;
use crate::support::{LIMIT, Look, idle, idle_in, in_router, lab, meet, run_soon, says, ttl, until};
use crate::table::attach;

/// How long neighbours may take to find an address where it has moved to. An ARP entry that nobody corrects is wrong for
/// longer than that.
const MOVED: Duration = Duration::from_secs(5);

fn kept() -> RunSpec {
    let labels = [(model::RETAIN.to_owned(), "true".to_owned())].into();
    RunSpec { labels, stack: Some("shop".parse().unwrap()), ..idle("db") }
}

fn ipam(lab: &Lab) -> String {
    lab.check(SERVER, &["droveway", "ipam", "ls"]).unwrap()
}

/// The line of `ipam ls` about a claimed address.
fn line_of(lab: &Lab, address: &str) -> Option<String> {
    let about = |line: &&str| line.split_whitespace().skip(1).take(2).eq(["claim", address]);
    ipam(lab).lines().find(about).map(str::to_owned)
}

#[test]
fn a_retained_address_goes_with_its_container_from_host_to_host_and_neighbours_follow() {
    let lab = lab(2);
    let (near, far) = (lab.run("h1", &idle("near")).unwrap(), lab.run("h2", &idle("far")).unwrap());
    let db = lab.run("h1", &kept()).unwrap();
    let address = db.ip().to_string();
    let reach = |from: &Container, what: &str| {
        let took = until(MOVED, what, || ttl(&lab, &from.path(), &address).is_some());
        println!("{what}: {took:?}");
    };
    let again = |host: &str| {
        let db = lab.run(host, &kept()).unwrap();
        assert_eq!(db.ip().to_string(), address, "on {host}");
    };
    meet(&lab, &near, &db);
    meet(&lab, &far, &db);
    assert!(line_of(&lab, &address).unwrap().contains("retained for shop/db"), "{}", ipam(&lab));

    // On its own host, without the server too.
    lab.kill_server().unwrap();
    lab.kill_container("h1", "db").unwrap();
    again("h1");
    lab.start_server().unwrap();
    lab.wait_connected("h1").unwrap();
    lab.wait_connected("h2").unwrap();
    meet(&lab, &near, &db);

    // To the other host and back, while those who spoke to it go on doing so.
    for (from, to) in [("h1", "h2"), ("h2", "h1")] {
        for one in [&near, &far] {
            until(LIMIT, "it is spoken to", || ttl(&lab, &one.path(), &address).is_some());
        }
        lab.kill_container(from, "db").unwrap();
        again(to);
        reach(&near, &format!("a neighbour of old finds it on {to}"));
        reach(&far, &format!("one of the other host finds it on {to}"));
    }
    well(&lab);

    // Another of that name, while it runs: that it runs is worth more.
    let other = lab.run("h2", &kept()).unwrap();
    assert_ne!(other.ip().to_string(), address);
    lab.kill_container("h2", "db").unwrap();

    // It is given up by a person, and goes back when nobody has it.
    lab.check(SERVER, &["droveway", "ipam", "release", "managed", &address]).unwrap();
    assert!(ttl(&lab, &near.path(), &address).is_some(), "who has it keeps it");
    let twice = says(&lab, SERVER, &["droveway", "ipam", "release", "managed", &address]);
    assert!(twice.contains("is not retained"), "{twice}");
    lab.kill_container("h1", "db").unwrap();
    until(LIMIT, "it goes back", || line_of(&lab, &address).is_none());
    well(&lab);
}

/// As if a minute had gone by while the agent was not there.
fn rest(lab: &Lab, host: &str) {
    lab.kill_agent(host).unwrap();
    let ledger = rusqlite::Connection::open(lab.dir().join(host).join("agent/ledger.sqlite")).unwrap();
    ledger.execute("UPDATE released SET at = at - 60000", []).unwrap();
    drop(ledger);
    lab.start_agent(host).unwrap();
    lab.wait_connected(host).unwrap();
}

#[test]
fn an_address_in_anothers_block_is_asked_for_single_ones_are_given_when_no_block_is_free_and_empty_ones_go_back()
 {
    let lab = lab(2);
    // Three blocks of eight, and one for claims.
    let create =
        ["droveway", "network", "create", "small", "--subnet", "10.60.0.0/27", "--block-size", "/29"];
    lab.check(SERVER, &create).unwrap();
    let one = run_soon(&lab, "h1", &idle_in("small", "one"));
    let two = run_soon(&lab, "h2", &idle_in("small", "two"));
    meet(&lab, &one, &two);

    // A free address of the other host's block: that host lets go of it. One that is used it keeps.
    let in_use = IpAddr::from(one.ip());
    let octets = one.ip().octets();
    let base = octets[3] & !7;
    let free = (base + 4..base + 8).map(|last| IpAddr::from([octets[0], octets[1], octets[2], last]));
    let free = free.into_iter().find(|address| *address != in_use).unwrap();
    let asks = |name: &str, address| RunSpec { address: Some(address), ..idle_in("small", name) };
    let error = format!("{:#}", lab.run("h2", &asks("taken", in_use)).unwrap_err());
    assert!(error.contains("one") && error.contains("h1"), "{error}");
    let asked = lab.run("h2", &asks("asked", free)).unwrap();
    assert_eq!(IpAddr::from(asked.ip()), free);
    meet(&lab, &one, &asked);
    let route = in_router(&lab, "h1", "small", &["ip", "route", "get", &free.to_string()]);
    assert!(route.contains("dev tun0"), "{route}");

    // All that blocks have, and more.
    let names: Vec<String> = (0..24).map(|i| format!("many-{i}")).collect();
    let script = format!("for name in {}; do ip netns add $name || exit; done", names.join(" "));
    lab.check("h1", &["sh", "-c", &script]).unwrap();
    let mut ids = Vec::new();
    let mut single = None;
    for name in &names {
        let attached = attach(&lab, "h1", "small", name).unwrap();
        let address = attached.endpoint.addresses[0];
        ids.push(attached.endpoint.id);
        if line_of(&lab, &address.to_string()).is_some() {
            single = Some(address);
            break;
        }
    }
    let single = single.expect("a single address").to_string();
    until(LIMIT, "the single address is reached from the other host", || {
        ttl(&lab, &two.path(), &single).is_some()
    });
    let blocks =
        || ipam(&lab).lines().filter(|line| line.contains("small") && line.contains(" block ")).count();
    assert_eq!(blocks(), 3, "{}", ipam(&lab));

    // They go; when their addresses have rested, so do the blocks that nobody needs. Others' traffic goes on.
    for id in &ids {
        let socket = lab.agent_socket("h1").unwrap();
        droveway::client::ask_agent(&socket, async |agent| agent.detach(id).await).unwrap();
    }
    let script = format!("for name in {}; do ip netns del $name || exit; done", names.join(" "));
    lab.check("h1", &["sh", "-c", &script]).unwrap();
    until(LIMIT, "the single address goes back", || line_of(&lab, &single).is_none());
    rest(&lab, "h1");
    until(LIMIT, "an empty block goes back", || blocks() == 2);
    meet(&lab, &one, &two);
    well(&lab);
}
