//! Hosts behind NAT boxes, and hosts that move: what the lab makes of the underlay.

use std::net::{Ipv4Addr, SocketAddr};
use std::process::Child;

use droveway::lab::{Lab, LabSpec, boxes};

use crate::probe;
use crate::red::{ask, tunnel};
use crate::support::{LIMIT, idle, idle_in, meet, spec, succeeds, until};

/// A process that is ended with the test.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn behind(nat: &str, hosts: u32) -> LabSpec {
    let together = nat.split(',').map(|together| together.parse().unwrap());
    LabSpec { nats: boxes(together.collect()), ..spec(hosts) }
}

fn bare(nat: &str, hosts: u32) -> Lab {
    Lab::up(LabSpec { bare: true, ..behind(nat, hosts) }).unwrap()
}

fn pings(lab: &Lab, from: &str, to: &str) -> bool {
    succeeds(lab, from, &["ping", "-n", "-c", "1", "-W", "0.5", to])
}

const BOX: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 101);

#[test]
fn a_host_behind_a_nat_is_seen_as_the_box_and_begun_with_by_nobody() {
    let lab = bare("h2,h3", 3);
    let at = SocketAddr::from((Ipv4Addr::new(10, 0, 0, 5), 4500));
    let _mirror = Running(probe::mirror_at(&lab, "h1", at));
    let seen = probe::seen_as(&lab, "h2", 4500, at).unwrap();
    assert_eq!(seen.ip(), BOX);
    assert!((20_000..21_000).contains(&seen.port()), "{seen}: a port of the box, whatever the host's");
    assert_eq!(probe::seen_as(&lab, "h2", 4500, at), Some(seen), "the same flow again");
    assert_eq!(probe::seen_as(&lab, "h3", 4500, at).unwrap().ip(), Ipv4Addr::new(10, 0, 0, 102));
    assert_eq!(probe::seen_as(&lab, "server", 4500, at).unwrap().to_string(), "10.0.0.2:4500");
    // Nobody outside gets in: not to the host's own address, and not by the port to anyone but the mirror.
    assert!(!pings(&lab, "h1", "192.168.101.6") && !pings(&lab, "h3", "192.168.101.6"));
    let inside = SocketAddr::from((Ipv4Addr::new(192, 168, 101, 6), 4500));
    let _inside = Running(probe::mirror_at(&lab, "h2", inside));
    assert_eq!(probe::seen_as(&lab, "server", 4500, seen), None);
    assert!(probe::seen_as(&lab, "h1", 4501, seen).is_none(), "another port of the same host is another");
}

#[test]
fn hosts_behind_one_nat_reach_each_other_and_one_can_be_cut_off_from_outside_alone() {
    let lab = bare("h1+h2", 3);
    assert!(pings(&lab, "h1", "h2") && pings(&lab, "h1", "h3") && pings(&lab, "h2", "h3"));
    lab.cut("h1", "h3").unwrap();
    assert!(!pings(&lab, "h1", "h3"));
    assert!(pings(&lab, "h2", "h3") && pings(&lab, "h1", "h2") && pings(&lab, "h1", "server"));
    lab.heal().unwrap();
    assert!(pings(&lab, "h1", "h3"));
}

#[test]
fn a_nat_that_forgets_takes_another_port_and_lets_nothing_in_by_the_old_one() {
    let lab = bare("h2", 2);
    let at = SocketAddr::from((Ipv4Addr::new(10, 0, 0, 5), 4500));
    let mirror = Running(probe::mirror_at(&lab, "h1", at));
    let first = probe::seen_as(&lab, "h2", 4500, at).unwrap();
    lab.rebind("h2").unwrap();
    let second = probe::seen_as(&lab, "h2", 4500, at).unwrap();
    assert_eq!(second.ip(), first.ip());
    assert!((21_000..22_000).contains(&second.port()), "{first} became {second}");
    drop(mirror);
    // From the port that both flows lead to.
    let inside = SocketAddr::from((Ipv4Addr::new(192, 168, 101, 6), 4500));
    let _inside = Running(probe::mirror_at(&lab, "h2", inside));
    assert_eq!(probe::seen_as(&lab, "h1", 4500, first), None, "the old one is closed");
    assert_eq!(probe::seen_as(&lab, "h1", 4500, second), Some(at), "the new one is open");
    lab.rebind("nat1").unwrap();
    assert_eq!(probe::seen_as(&lab, "h1", 4500, second), None);
    let error = lab.rebind("h1").unwrap_err().to_string();
    assert!(error.contains("h1 is behind no NAT"), "{error}");
}

#[test]
fn a_host_that_moved_is_at_its_new_address_only_and_cuts_follow_it() {
    let lab = bare("h3", 3);
    lab.cut("h1", "h2").unwrap();
    let there = Ipv4Addr::new(10, 0, 0, 77);
    lab.readdress("h2", there.into()).unwrap();
    assert!(!pings(&lab, "h1", "10.0.0.77") && !pings(&lab, "h2", "10.0.0.5"));
    assert!(!pings(&lab, "server", "10.0.0.6"));
    assert!(
        pings(&lab, "server", "10.0.0.77") && pings(&lab, "h3", "10.0.0.77") && pings(&lab, "h2", "server")
    );
    lab.heal().unwrap();
    assert!(pings(&lab, "h1", "10.0.0.77"));
    lab.readdress("h3", Ipv4Addr::new(192, 168, 101, 99).into()).unwrap();
    assert!(pings(&lab, "h3", "10.0.0.77"));
    for (address, why) in
        [([10, 0, 0, 5], "is h1's"), ([10, 9, 0, 5], "is not in"), ([10, 0, 0, 1], "the gateway's")]
    {
        let error = lab.readdress("h2", Ipv4Addr::from(address).into()).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }
    lab.kill("h2").unwrap();
    lab.start("h2").unwrap();
    assert!(pings(&lab, "h1", "10.0.0.6"), "switched on, it is where it began");
}

/// Only the host behind the NAT can begin, and the other has to hear it among ten thousand strangers a second. The underlay is
/// not watched: that is more than a capture holds.
fn a_tunnel_comes_up_in_a_flood(lab: &Lab) {
    let (near, far) = (lab.run("h1", &idle("near")).unwrap(), lab.run("h2", &idle("far")).unwrap());
    meet(lab, &near, &far);
    let begun = || tunnel(lab, "h2", "h1").ike.map(|ike| ike.initiator_spi);
    let before = begun();
    let at = SocketAddr::from((Ipv4Addr::new(10, 0, 0, 5), 4500));
    let mut flood = Running(probe::flood_from(lab, "stranger", "h1", at, 10_000));
    assert_eq!(ask(lab, "h2", "POST", "/v1/tunnels/h1/reset").0, 204);
    let took = until(LIMIT, "there is another tunnel", || begun().is_some_and(|spi| Some(spi) != before));
    meet(lab, &far, &near);
    println!("in a flood: a new tunnel after {took:?}");
    assert!(flood.0.try_wait().unwrap().is_none(), "it went on until then");
}

#[test]
fn an_agent_behind_a_nat_joins_connects_again_after_the_box_was_off_and_has_its_tunnel_in_a_flood() {
    let others = vec!["stranger".parse().unwrap()];
    let lab = Lab::up(LabSpec { others, ..behind("h2", 2) }).unwrap();
    lab.wait_connected("h2").unwrap();
    lab.kill("nat1").unwrap();
    lab.start("nat1").unwrap();
    lab.kill_agent("h2").unwrap();
    lab.start_agent("h2").unwrap();
    lab.wait_connected("h2").unwrap();
    let (dir, hosts) = (lab.dir().to_owned(), lab.check("server", &["droveway", "host", "ls"]).unwrap());
    assert!(hosts.contains("h2"), "{hosts}");
    a_tunnel_comes_up_in_a_flood(&lab);
    lab.down().unwrap();
    assert!(!dir.exists());
}

#[test]
fn a_host_behind_a_nat_is_shown_and_refused_on_a_network_in_clear_with_the_reason() {
    let lab = Lab::up(behind("h2", 2)).unwrap();
    let clear = ["droveway", "network", "create", "fast", "--subnet", "10.51.0.0/16", "--driver", "vxlan"];
    lab.check("server", &clear).unwrap();
    let hosts = lab.check("server", &["droveway", "host", "ls"]).unwrap();
    let shown = |host: &str| hosts.lines().find(|line| line.starts_with(host)).unwrap().to_owned();
    assert!(shown("h2").contains(&format!("behind NAT ({BOX})")), "{hosts}");
    assert!(!shown("h1").contains("NAT"), "{hosts}");
    let error = lab.run("h2", &idle_in("fast", "web")).unwrap_err().to_string();
    for part in
        ["\"fast\" is vxlan", "host h2 is behind one", &BOX.to_string(), "--driver ipsec", "--address"]
    {
        assert!(error.contains(part), "{part}: {error}");
    }
    lab.run("h1", &idle_in("fast", "web")).unwrap();
    let network = lab.check("server", &["droveway", "network", "inspect", "fast"]).unwrap();
    assert!(network.contains(&format!("h2 is behind NAT ({BOX})")), "{network}");
}
