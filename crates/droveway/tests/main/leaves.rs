//! More endpoints on a host than one bridge is given, and more than one could take.

use droveway::lab::{Container, Daemon, Lab};
use plan::Bridge;

use crate::support::{
    LIMIT, Look, converged, idle, in_router, kernel, lab, meet, says, soak, succeeds, ttl, until,
};
use crate::table::{attach, crowd};

/// The most ports that the kernel lets a bridge have.
const KERNEL_PORTS: usize = 1023;

/// The ports of a router's bridge.
fn ports(lab: &Lab, host: &str, bridge: &str) -> Vec<String> {
    let text = in_router(lab, host, "managed", &["ip", "-br", "link", "show", "master", bridge]);
    text.lines().filter_map(|line| line.split(['@', ' ']).next().map(str::to_owned)).collect()
}

fn port(container: &Container) -> String {
    format!("p-{}", container.attached.endpoint.id.short())
}

#[test]
fn a_host_has_more_endpoints_than_a_bridge_takes_and_the_walk_is_the_same_for_all() {
    // All that fit on bridges before the last leaf: more than the kernel lets one bridge have, in the long form.
    let crowded = if soak() { KERNEL_PORTS } else { 2 * Bridge::PORTS - 1 };
    let last_leaf = (crowded + 1) / Bridge::PORTS;
    let lab = lab(2);
    let run = |host: &str, name: &str| lab.run(host, &idle(name)).unwrap();
    let (first, far) = (run("h1", "first"), run("h2", "far"));
    crowd(&lab, "h1", crowded);
    let (last, beside) = (run("h1", "last"), run("h1", "beside"));
    assert_eq!(lab.endpoints("h1").unwrap().len(), crowded + 3);

    let leaf = format!("leaf{last_leaf}");
    assert!(ports(&lab, "h1", "br0").contains(&port(&first)));
    let there = ports(&lab, "h1", &leaf);
    assert!(there.contains(&port(&last)) && there.contains(&port(&beside)), "{there:?}");
    for full in 1..last_leaf {
        let ports = ports(&lab, "h1", &format!("leaf{full}"));
        assert_eq!(ports.len(), Bridge::PORTS + 1, "endpoints, and the way to br0");
    }

    meet(&lab, &last, &far);
    meet(&lab, &far, &beside);
    let hops = |from: &Container, to: &Container| ttl(&lab, &from.path(), &to.ip().to_string());
    for neighbour in [&beside, &first] {
        until(LIMIT, "neighbours meet", || hops(&last, neighbour).is_some());
        assert_eq!((hops(&last, neighbour), hops(neighbour, &last)), (Some(64), Some(64)));
        let entry = |at: &Container, of: &Container| {
            lab.check(&at.path(), &["ip", "neigh", "show", &of.ip().to_string()]).unwrap()
        };
        assert!(entry(&last, neighbour).contains(&neighbour.mac()));
        assert!(entry(neighbour, &last).contains(&last.mac()));
    }
    assert_eq!((hops(&last, &far), hops(&far, &last)), (Some(62), Some(62)));
    let gateway = in_router(&lab, "h1", "managed", &["cat", "/sys/class/net/br0/address"]);
    for asked in ["10.42.0.1", "169.254.169.250"] {
        assert_eq!(ttl(&lab, &last.path(), asked), Some(64));
        let entry = lab.check(&last.path(), &["ip", "neigh", "show", asked]).unwrap();
        assert!(entry.contains(gateway.trim()), "a leaf answers in nobody's name: {entry}");
    }
    let named = lab.check(&last.path(), &["getent", "hosts", "far"]).unwrap();
    assert!(named.contains(&far.ip().to_string()), "{named}");
    assert!(succeeds(&lab, &last.path(), &["ping", "-n", "-c", "1", "-W", "2", "10.0.0.2"]), "the way out");

    // An agent that comes back leaves all as it is.
    let before = kernel(&lab, "h1", "managed");
    lab.kill_daemon("h1", Daemon::Agent).unwrap();
    lab.start_daemon("h1", Daemon::Agent).unwrap();
    until(LIMIT, "the agent is back", || converged(&lab, "h1"));
    assert_eq!(kernel(&lab, "h1", "managed"), before, "{}", says(&lab, "h1", &["droveway", "status"]));

    // Soon after its last endpoint a leaf goes.
    let leaves = || in_router(&lab, "h1", "managed", &["ip", "-br", "link", "show", "type", "bridge"]);
    assert!(leaves().contains(&leaf));
    for container in [&last, &beside] {
        lab.kill_container(&container.host, &container.name).unwrap();
    }
    assert!(leaves().contains(&leaf), "it is kept for the next one for a while");
    let doctor = says(&lab, "h1", &["droveway", "doctor"]);
    assert!(!doctor.contains(&leaf), "{doctor}");
    until(2 * LIMIT, "the last leaf is gone", || !leaves().contains(&leaf) && converged(&lab, "h1"));
    assert!(leaves().contains("leaf1"));
    // Nor is anything amiss with one whose first endpoint the kernel refuses.
    lab.check("h1", &["ip", "netns", "add", "odd"]).unwrap();
    lab.check("h1", &["ip", "-n", "odd", "link", "add", "eth0", "type", "veth", "peer", "name", "other"])
        .unwrap();
    let refused = attach(&lab, "h1", "managed", "odd").unwrap_err().to_string();
    assert!(refused.contains("choose another ifname"), "{refused}");
    let doctor = says(&lab, "h1", &["droveway", "doctor"]);
    assert!(!doctor.contains(&leaf), "{doctor}");
    assert!(hops(&first, &far).is_some());
}
