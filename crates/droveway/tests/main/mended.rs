//! What happens to tunnels and heals by itself, under load and with a canary in it.
//!
//! How long something takes is printed; that it takes no longer than it should is asked for where the machine is quiet, by
//! `make soak`. Elsewhere so many times that.

use std::thread;
use std::time::{Duration, Instant};

use droveway::lab::Daemon;
use model::agent_api::TunnelState;

use crate::load::{Load, Rate};
use crate::red::{Red, drop_incoming, drop_nothing, lost, tunnel, up};
use crate::support::{LIMIT, Look, idle_in, meet, number, soak, ttl, until};

/// How much longer than on a quiet machine anything may take on a busy one.
const BUSY: u32 = 8;
/// What every machine carries.
const LIGHT: Rate = Rate { tcp: 8_000_000, udp: 4_000_000 };
/// Longer than any test: a load is over when its test is.
const LONG: Duration = Duration::from_mins(2);

/// Tells how long it took, and that it is no longer than it may be.
#[track_caller]
fn back(what: &str, took: Duration, limit: Duration) {
    println!("{what}: back after {took:?}");
    let limit = if soak() { limit } else { limit * BUSY };
    assert!(took <= limit, "{what}: back after {took:?}, and not within {limit:?}");
}

/// Waits for the load to go on, and tells how long after `since` that was.
#[track_caller]
fn resumes(load: &Load, since: Instant) -> Duration {
    until(LIMIT, "traffic is back", || load.back_after(since).is_some());
    load.back_after(since).unwrap() - since
}

#[test]
fn an_agent_killed_under_load_has_its_traffic_back_in_half_a_second() {
    let red = Red::new(2).met();
    let load = Load::start(&red, LIGHT, LONG);
    for host in ["h1", "h2"] {
        red.lab.kill_agent(host).unwrap();
        assert!(!red.reaches(), "no agent, no packet");
        let begun = Instant::now();
        red.lab.start_agent(host).unwrap();
        let took = resumes(&load, begun);
        back(&format!("the agent of {host} was killed"), took, Duration::from_millis(500));
        until(LIMIT, "both ways", || red.reaches() && red.reaches_back());
    }
}

#[test]
fn hosts_restarted_at_once_find_each_other() {
    let red = Red::new(2).met();
    let load = Load::start(&red, LIGHT, LONG);
    let hosts = ["h1", "h2"];
    for host in hosts {
        red.lab.kill_agent(host).unwrap();
    }
    assert!(!red.reaches(), "no agent, no packet");
    let begun = Instant::now();
    thread::scope(|scope| {
        for host in hosts {
            scope.spawn(|| red.lab.start_agent(host).unwrap());
        }
    });
    back("both agents were killed", resumes(&load, begun), Duration::from_secs(1));
    until(LIMIT, "both ways", || red.reaches() && red.reaches_back());
    until(LIMIT, "there is one tunnel", || hosts_have_one_tunnel(&red));
}

fn hosts_have_one_tunnel(red: &Red) -> bool {
    let (here, there) = (tunnel(&red.lab, "h1", "h2"), tunnel(&red.lab, "h2", "h1"));
    let same = here.ike.zip(there.ike).is_some_and(|(a, b)| a.initiator_spi == b.initiator_spi);
    same && here.children.len() == 1 && there.children.len() == 1
}

#[test]
fn hosts_cut_off_until_both_have_given_up_are_joined_by_the_first_packet_after() {
    let red = Red::new(2).met();
    until(LIMIT, "all is well", || up(&red.lab, "h1", "h2") && up(&red.lab, "h2", "h1"));
    let cut = Instant::now();
    red.lab.cut("h1", "h2").unwrap();
    // Nothing is sent meanwhile that could keep them trying.
    let mut failed = [false; 2];
    until(Duration::from_mins(2), "both have given up, tried again and failed", || {
        for (failed, (host, peer)) in failed.iter_mut().zip([("h1", "h2"), ("h2", "h1")]) {
            *failed |= matches!(tunnel(&red.lab, host, peer).state, TunnelState::Failed { .. });
        }
        failed == [true; 2]
    });
    let length = Duration::from_secs(number("SOAK_CUT_SECONDS").unwrap_or(0));
    until(length + LIMIT, "the cut is long enough", || cut.elapsed() >= length);
    println!("cut off for {:?}", cut.elapsed());
    red.lab.heal().unwrap();
    let begun = Instant::now();
    until(LIMIT, "traffic is back", || red.reaches());
    back("healed", begun.elapsed(), Duration::from_secs(2));
    until(LIMIT, "both ways", || red.reaches_back() && hosts_have_one_tunnel(&red));
}

#[test]
fn without_the_server_keys_of_traffic_and_of_ike_are_changed_again_and_again() {
    let red = Red::with_agents(2, &["--rekey-every", "1", "--rekey-ike-every", "2"]).met();
    until(LIMIT, "all is well", || up(&red.lab, "h1", "h2") && up(&red.lab, "h2", "h1"));
    let steady = red.steady();
    red.lab.kill_server().unwrap();
    let before = tunnel(&red.lab, "h1", "h2");
    let mut sas = std::collections::BTreeSet::new();
    until(Duration::from_secs(60), "each was changed three times", || {
        let now = tunnel(&red.lab, "h1", "h2");
        sas.extend(now.ike.map(|ike| ike.initiator_spi));
        sas.len() > 3 && now.rekeys >= before.rekeys + 3
    });
    let (sent, received) = steady.end(&red.lab, &red.near);
    assert_eq!(sent, received, "pings all the while");
    for (host, peer) in [("h1", "h2"), ("h2", "h1")] {
        let status = tunnel(&red.lab, host, peer);
        assert!(lost(&status) == 0 && status.last_failure.is_none(), "{status:#?}");
    }
    red.lab.start_server().unwrap();
    for host in ["h1", "h2"] {
        red.lab.wait_connected(host).unwrap();
    }
    assert!(red.reaches());
}

#[test]
fn a_host_that_moves_under_load_is_followed() {
    let red = Red::new(2).met();
    until(LIMIT, "all is well", || up(&red.lab, "h1", "h2"));
    let load = Load::start(&red, LIGHT, LONG);
    let since = tunnel(&red.lab, "h1", "h2").handshakes;
    for (host, address) in [("h2", "10.0.0.77"), ("h1", "10.0.0.78")] {
        red.lab.readdress(host, address.parse().unwrap()).unwrap();
        let moved = Instant::now();
        back(&format!("{host} moved"), resumes(&load, moved), Duration::from_secs(2));
        until(LIMIT, "both ways", || red.reaches() && red.reaches_back());
    }
    let now = tunnel(&red.lab, "h1", "h2");
    assert_eq!(now.handshakes, since, "by the same IKE SA");
    let path = now.path.unwrap();
    assert_eq!((path.0.ip(), path.1.ip()), ("10.0.0.78".parse().unwrap(), "10.0.0.77".parse().unwrap()));
}

#[test]
fn two_hosts_that_meet_have_nothing_to_complain_of() {
    let red = Red::new(2).met();
    for (host, peer) in [("h1", "h2"), ("h2", "h1")] {
        let status = tunnel(&red.lab, host, peer);
        let log = std::fs::read_to_string(red.lab.daemon_log(host, Daemon::Agent)).unwrap();
        assert!(status.last_failure.is_none(), "{status:#?}\n{log}");
        assert!(!log.contains("AUTHENTICATION_FAILED") && !log.contains("was refused"), "{log}");
    }
}

#[test]
fn a_pair_that_is_dead_while_others_work_is_seen_begun_anew_and_mended() {
    let red = Red::new(3).met();
    let third = red.lab.run("h3", &idle_in("red", "third")).unwrap();
    meet(&red.lab, &red.near, &third);
    until(LIMIT, "all is well", || up(&red.lab, "h1", "h2") && up(&red.lab, "h1", "h3"));
    let before = tunnel(&red.lab, "h1", "h2");
    // IKE passes, ESP does not: its first word is not zero.
    drop_incoming(&red.lab, "h2", "ip saddr 10.0.0.5 udp dport 4500 @th,64,32 != 0");
    until(LIMIT, "it is seen that nothing passes", || {
        matches!(tunnel(&red.lab, "h1", "h2").state, TunnelState::Silent { .. })
    });
    assert!(up(&red.lab, "h1", "h3"), "the others are well");
    let list = red.lab.check("h1", &["droveway", "tunnel", "ls"]).unwrap();
    let state = |peer: &str| {
        let line = list.lines().find(|line| line.starts_with(peer)).unwrap_or_else(|| panic!("{list}"));
        line.split_whitespace().nth(1).unwrap().to_owned()
    };
    assert_eq!(["h2", "h3"].map(state), ["silent", "up"], "{list}");
    assert!(ttl(&red.lab, &red.near.path(), &third.ip().to_string()).is_some());
    until(LIMIT, "the tunnel is made anew", || {
        let now = tunnel(&red.lab, "h1", "h2");
        now.handshakes > before.handshakes
    });
    drop_nothing(&red.lab, "h2");
    until(LIMIT, "and it is well again", || up(&red.lab, "h1", "h2") && red.reaches());
}
