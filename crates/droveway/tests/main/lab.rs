//! The whole lab: server, agents, and containers that reach one another.

use std::process::Command;
use std::time::{Duration, Instant};

use droveway::lab::{Container, Daemon, Lab};
use nix::sys::signal::Signal;

use crate::support::{LIMIT, idle, lab, ttl, until};

fn sleeper(lab: &Lab, host: &str, name: &str) -> Container {
    lab.run(host, &idle(name)).unwrap()
}

/// Whether a ping arrives before long: the other host has to hear of a new endpoint first.
fn reaches(lab: &Lab, from: &Container, to: &Container) -> bool {
    let (from, to) = (from.path(), to.address().unwrap().to_string());
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        if ttl(lab, &from, &to).is_some() {
            return true;
        }
        if Instant::now() > deadline {
            return false;
        }
    }
}

#[test]
fn containers_of_two_hosts_reach_each_other_until_they_are_cut_off() {
    let lab = lab(2);
    let (one, other) = (sleeper(&lab, "h1", "one"), sleeper(&lab, "h2", "other"));
    assert!(reaches(&lab, &one, &other));
    lab.cut("h1", "h2").unwrap();
    assert!(!reaches(&lab, &one, &other));
    lab.heal().unwrap();
    assert!(reaches(&lab, &other, &one));
    assert_eq!(lab.containers("h1").unwrap(), [("one".to_owned(), vec![one.address().unwrap()])]);
    lab.kill_container("h1", "one").unwrap();
    assert!(lab.endpoints("h1").unwrap().is_empty());
    assert!(!reaches(&lab, &other, &one));
}

#[test]
fn droveways_own_verbs_work_on_every_node_without_options() {
    let lab = lab(1);
    sleeper(&lab, "h1", "one");
    let hosts = lab.check("server", &["droveway", "host", "ls", "-o", "json"]).unwrap();
    assert!(hosts.contains("\"h1\""), "{hosts}");
    lab.check("h1", &["droveway", "status"]).unwrap();
    assert!(lab.check("h1", &["droveway", "endpoint", "ls"]).unwrap().contains("one"));
}

#[test]
fn what_was_killed_is_started_again_and_works() {
    let lab = lab(2);
    let (one, other) = (sleeper(&lab, "h1", "one"), sleeper(&lab, "h2", "other"));
    let beside = sleeper(&lab, "h1", "beside");
    assert!(reaches(&lab, &one, &other));
    lab.kill_agent("h1").unwrap();
    lab.kill_server().unwrap();
    assert_eq!(lab.daemon_pid("h1", Daemon::Agent).unwrap(), None);
    assert!(reaches(&lab, &one, &beside), "traffic on a host does not need them");
    lab.start_server().unwrap();
    lab.start_agent("h1").unwrap();
    lab.wait_connected("h1").unwrap();
    lab.wait_connected("h2").unwrap();
    assert!(lab.start_agent("h1").unwrap_err().to_string().contains("runs already"));
    lab.kill("h2").unwrap();
    lab.start("h2").unwrap();
    lab.wait_connected("h2").unwrap();
    let again = sleeper(&lab, "h2", "other");
    assert!(reaches(&lab, &one, &again));
}

#[test]
fn a_container_whose_caller_was_interrupted_is_not_left_behind() {
    let lab = lab(1);
    // It does not answer before the caller is gone.
    let agent = lab.state().unwrap().nodes["h1"].daemons[&Daemon::Agent];
    agent.signal(Signal::SIGSTOP).unwrap();
    let words =
        ["lab", "--lab", lab.spec().name.as_str(), "run", "h1", "--name", "web", "--", "sleep", "1000"];
    let mut caller = Command::new(&lab.spec().program).args(words).spawn().unwrap();
    let record = lab.dir().join("h1/run/web.json");
    until(LIMIT, "it is on its way", || record.exists());
    caller.kill().unwrap();
    caller.wait().unwrap();
    agent.signal(Signal::SIGCONT).unwrap();
    until(LIMIT, "nothing is left of it", || !record.exists() && lab.endpoints("h1").unwrap().is_empty());
}
