//! The doctor names each kind of thing that can be wrong, and finds nothing where all is well.

use std::collections::BTreeSet;

use agent::doctor::{Finding, Kind};
use droveway::lab::{Container, Lab, SERVER};

use crate::support::{
    LIMIT, Look, idle, idle_in, lab, meet, network_in_clear, router_words, run_soon, until,
};

/// What the doctor finds on a host, asked once.
pub fn findings(lab: &Lab, host: &str, settle: u32) -> Vec<Finding> {
    let settle = settle.to_string();
    let words = ["droveway", "doctor", "--consistency", "-o", "json", "--settle", &settle];
    let output = lab.exec(host, &words).unwrap();
    let found: Vec<Finding> = serde_json::from_slice(&output.stdout).unwrap_or_else(|error| {
        panic!("{host}: {error}: {}", String::from_utf8_lossy(&output.stderr));
    });
    assert_eq!(output.status.code(), Some(if found.is_empty() { 0 } else { 8 }));
    found
}

/// All is as it should be, on all hosts and at the server.
#[track_caller]
pub fn well(lab: &Lab) {
    for host in lab.hosts() {
        let found = findings(lab, &host, 25);
        let lines: Vec<String> = found.iter().map(ToString::to_string).collect();
        assert!(found.is_empty(), "{host}:\n{}", lines.join("\n"));
    }
}

fn kinds(found: &[Finding]) -> BTreeSet<Kind> {
    found.iter().map(|finding| finding.kind).collect()
}

/// Does that on a host, or in its router for `managed` if `inside`, and sees it named.
#[track_caller]
fn names(lab: &Lab, inside: bool, script: &str, kind: Kind, what: &str) {
    let words = ["sh", "-c", script];
    let words = if inside { router_words("clear", &words) } else { words.map(str::to_owned).to_vec() };
    lab.check("h1", &words).unwrap();
    let found = findings(lab, "h1", 0);
    let named = |finding: &Finding| finding.kind == kind && finding.what.contains(what);
    assert!(found.iter().any(named), "{script}: {kind:?} of {what:?} is not among {found:#?}");
}

#[test]
fn the_doctor_finds_nothing_where_all_is_well_and_names_each_thing_that_is_not() {
    let lab = lab(2);
    network_in_clear(&lab, "clear", "10.60.0.0/16");
    let near = run_soon(&lab, "h1", &idle_in("clear", "near"));
    let far = run_soon(&lab, "h2", &idle_in("clear", "far"));
    let (secret, there) = (lab.run("h1", &idle("secret")).unwrap(), lab.run("h2", &idle("there")).unwrap());
    crate::table::meet_in_clear(&lab, &near, &far);
    meet(&lab, &secret, &there);
    well(&lab);

    // A cut is seen by its tunnel, and by the server's silence.
    lab.cut("h1", "h2").unwrap();
    lab.cut("h1", SERVER).unwrap();
    until(LIMIT * 4, "the tunnel and the server are missed", || {
        kinds(&findings(&lab, "h1", 0)).is_superset(&[Kind::TunnelDown, Kind::ServerAway].into())
    });
    lab.heal().unwrap();
    lab.wait_connected("h1").unwrap();
    well(&lab);

    // What the agent would mend at once is seen while it is away.
    lab.kill_agent("h1").unwrap();
    let found = findings(&lab, "h1", 0);
    assert!(kinds(&found).is_subset(&[Kind::AgentAway, Kind::HostAway].into()), "{found:#?}");
    assert!(kinds(&found).contains(&Kind::AgentAway));
    assert!(!found.iter().any(|one| one.what.contains("no ledger")), "a lab's verbs find it: {found:#?}");
    let elsewhere = ["droveway", "doctor", "--settle", "0", "--state-dir", "/nowhere"];
    let output = lab.exec("h1", &elsewhere).unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("/nowhere has no ledger") && text.contains("--state-dir"), "{text}");
    let block = lab.check("h1", &router_words("clear", &["sh", "-c", "ip route show dev vxlan0"])).unwrap();
    let block = block.split(' ').next().unwrap().to_owned();
    let mac = &near.mac();
    for (script, kind, what) in [
        (format!("ip route del {block}"), Kind::Missing, block.as_str()),
        (format!("ip route add {block} dev br0"), Kind::Altered, block.as_str()),
        ("ip route add 10.60.99.0/26 dev br0".to_owned(), Kind::Leftover, "10.60.99.0/26"),
        (
            "ip neigh add 10.60.99.1 lladdr 02:00:00:00:00:99 dev vxlan0".to_owned(),
            Kind::Leftover,
            "10.60.99.1",
        ),
        (
            "bridge fdb add 02:00:00:00:00:99 dev vxlan0 dst 10.0.0.99".to_owned(),
            Kind::Leftover,
            "forwarding entry 02:00:00:00:00:99",
        ),
        (
            "bridge fdb flush dev vxlan0 2>/dev/null; ip neigh flush dev vxlan0 nud permanent".to_owned(),
            Kind::Missing,
            "neighbour",
        ),
        ("nft flush set bridge droveway port_mac".to_owned(), Kind::Missing, "port_mac"),
        ("sysctl -qw net.ipv4.conf.br0.proxy_arp=0".to_owned(), Kind::Altered, "proxy_arp"),
        ("ip link add p-nobody type veth peer name other".to_owned(), Kind::Leftover, "p-nobody"),
        ("ip addr del 169.254.169.250/32 dev br0".to_owned(), Kind::Missing, "169.254.169.250"),
        ("ip link set br0 mtu 1280".to_owned(), Kind::Altered, "br0"),
    ] {
        names(&lab, true, &script, kind, what);
    }
    for (script, kind, what) in [
        ("ip link add dv0123456789 type veth peer name other", Kind::LeakedDevice, "dv0123456789"),
        ("ip netns add droveway-ghost", Kind::LeakedNamespace, "droveway-ghost"),
        ("touch /run/netns/droveway-file", Kind::LeakedNamespace, "droveway-file"),
        ("nft delete table inet droveway", Kind::Missing, "nft table inet droveway"),
    ] {
        names(&lab, false, script, kind, what);
    }
    let in_container = |container: &Container, words: &[&str]| lab.check(&container.path(), words).unwrap();
    in_container(&near, &["ip", "neigh", "replace", &far.ip().to_string(), "lladdr", mac, "dev", "eth0"]);
    names(&lab, false, "true", Kind::StaleNeighbour, &far.ip().to_string());
    in_container(&near, &["ip", "link", "set", "eth0", "down"]);
    names(&lab, false, "true", Kind::ContainerInterface, "is down");
    in_container(&secret, &["ip", "addr", "flush", "dev", "eth0"]);
    names(&lab, false, "true", Kind::ContainerInterface, "lacks");

    // The agent mends what is its own; what is not, it leaves.
    lab.start_agent("h1").unwrap();
    lab.wait_connected("h1").unwrap();
    let expected: BTreeSet<Kind> =
        [Kind::ContainerInterface, Kind::LeakedDevice, Kind::StaleNeighbour].into();
    let found = findings(&lab, "h1", 25);
    assert!(kinds(&found).is_subset(&expected), "{found:#?}");
    assert!(kinds(&found).contains(&Kind::LeakedDevice));
}

#[test]
fn a_container_that_died_unseen_a_name_nobody_answers_and_what_the_server_says_otherwise_are_named() {
    let lab = lab(2);
    lab.check("h1", &["ip", "netns", "add", "dies"]).unwrap();
    crate::table::attach(&lab, "h1", "managed", "dies").unwrap();
    let stays = lab.run("h1", &idle("stays")).unwrap();
    let far = lab.run("h2", &idle("far")).unwrap();
    meet(&lab, &stays, &far);
    well(&lab);

    // The server goes, and hears of nothing: it knows what is gone, and does not know what is new.
    lab.kill_server().unwrap();
    let new = lab.run("h2", &idle("new")).unwrap();
    lab.kill_agent("h2").unwrap();
    lab.start_server().unwrap();
    lab.wait_connected("h1").unwrap();
    let found = findings(&lab, "h2", 0);
    let differs = |finding: &Finding| {
        finding.kind == Kind::EndpointDiffers
            && finding.place.contains("new")
            && finding.what.contains("does not know")
    };
    assert!(found.iter().any(differs), "{}: {found:#?}", new.ip());
    let found = findings(&lab, "h1", 0);
    let away = |finding: &Finding| finding.kind == Kind::HostAway && finding.place == "h2";
    assert!(found.iter().any(away), "{found:#?}");
    lab.start_agent("h2").unwrap();
    lab.wait_connected("h2").unwrap();
    well(&lab);

    // A router whose DNS is not there: a rule in its way.
    let drop = "nft add table ip x; nft add chain ip x i '{ type filter hook input priority -10; }'; \
        nft add rule ip x i udp dport 53 drop";
    lab.check("h1", &router_words("managed", &["sh", "-c", drop])).unwrap();
    let found = findings(&lab, "h1", 0);
    assert!(kinds(&found).contains(&Kind::NameUnanswered), "{found:#?}");
    lab.check("h1", &router_words("managed", &["nft", "delete", "table", "ip", "x"])).unwrap();
    well(&lab);

    lab.kill_agent("h1").unwrap();
    lab.check("h1", &["ip", "netns", "del", "dies"]).unwrap();
    names(&lab, false, "true", Kind::DeadContainer, "dies");
    lab.start_agent("h1").unwrap();
    lab.wait_connected("h1").unwrap();
    well(&lab);
}
