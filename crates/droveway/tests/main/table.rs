//! The fault table: each with traffic that goes on between hosts and must lose nothing, and with the doctor at its end.
//!
//! In CI each is short; `SOAK_FAULTS=1`, as `make soak` sets it, makes them long. What is random prints its seed, and
//! `SOAK_SEED` gives it again.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use droveway::client::{Error, ask_agent};
use droveway::lab::{Container, Daemon, Lab, LabSpec, SECOND, SERVER};
use model::EndpointId;
use model::agent_api::{AttachRequest, Attached, Connection};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::doctor::well;
use crate::steady::Steady;
use crate::support::Look;
use crate::support::{
    LIMIT, idle, idle_in, lab, meet, network_in_clear, run_soon, says, skipped, spec, succeeds, ttl, until,
};
use crate::watch::Watched;

/// What there is in CI, and in the long form.
fn long<T>(short: T, long: T) -> T {
    if std::env::var_os("SOAK_FAULTS").is_some() { long } else { short }
}

/// Attaches the namespace `name` of a host to a network, as an engine would.
pub fn attach(lab: &Lab, host: &str, network: &str, name: &str) -> Result<Attached, Error> {
    let request = AttachRequest {
        network: network.to_owned(),
        netns: PathBuf::from("/run/netns").join(name),
        ifname: "eth0".to_owned(),
        name: Some(name.parse().unwrap()),
        stack: None,
        service: None,
        aliases: Vec::new(),
        address: None,
        labels: BTreeMap::new(),
        ports: Vec::new(),
        routes: None,
    };
    ask_agent(&lab.agent_socket(host).unwrap(), async |agent| agent.attach(&request).await)
}

fn detach(lab: &Lab, host: &str, id: &EndpointId) -> Result<(), Error> {
    ask_agent(&lab.agent_socket(host).unwrap(), async |agent| agent.detach(id).await)
}

/// So many endpoints of network `managed`, in which nothing runs.
pub fn crowd(lab: &Lab, host: &str, count: usize) {
    let names: Vec<String> = (0..count).map(|i| format!("{host}-crowd-{i}")).collect();
    netns(lab, host, "add", &names);
    for name in &names {
        until(LIMIT, "there is a block for it", || attach(lab, host, "managed", name).is_ok());
    }
}

fn netns(lab: &Lab, host: &str, verb: &str, names: &[String]) {
    let script = format!("for name in {}; do ip netns {verb} $name || exit; done", names.join(" "));
    lab.check(host, &["sh", "-c", &script]).unwrap();
}

/// As [`meet`], without the canary.
pub fn meet_in_clear(lab: &Lab, from: &Container, to: &Container) {
    let ping = ["ping", "-n", "-c", "1", "-W", "1", &to.ip().to_string()];
    until(LIMIT, "they reach each other", || succeeds(lab, &from.path(), &ping));
}

/// Traffic of an encrypted network and of one in clear, between two hosts.
struct Traffic<'a> {
    lab: &'a Lab,
    secret: (Container, Container),
    clear: (Container, Container),
}

impl<'a> Traffic<'a> {
    fn between(lab: &'a Lab, one: &str, other: &str) -> Self {
        network_in_clear(lab, "clear", "10.60.0.0/16");
        let run = |host: &str, network: &str, name: &str| run_soon(lab, host, &idle_in(network, name));
        let secret = (run(one, "managed", "from"), run(other, "managed", "to"));
        let clear = (run(one, "clear", "clear-from"), run(other, "clear", "clear-to"));
        meet(lab, &secret.0, &secret.1);
        meet_in_clear(lab, &clear.0, &clear.1);
        Self { lab, secret, clear }
    }

    fn secretly(&self) -> Steady {
        Steady::start(self.lab, &self.secret.0, &self.secret.1)
    }

    fn clearly(&self) -> Steady {
        Steady::start_saying(self.lab, &self.clear.0.path(), &[&self.clear.1.ip().to_string()])
    }

    #[track_caller]
    fn all_arrived(&self, secret: Option<Steady>, clear: Option<Steady>) {
        for (steady, from) in [(secret, &self.secret.0), (clear, &self.clear.0)] {
            if let Some(steady) = steady {
                let (sent, received) = steady.end(self.lab, from);
                assert_eq!(sent, received, "pings of {}", from.path());
            }
        }
    }
}

/// Attaches and detaches on hosts, a round at a time.
#[derive(Default)]
struct Churn {
    count: usize,
    alive: BTreeMap<String, (String, EndpointId)>,
}

impl Churn {
    /// Rounds on all hosts, for so long. Hosts that have no server have a block of 61 addresses each, and what is released
    /// rests: there are no more rounds than that allows.
    fn rounds(&mut self, lab: &Lab, length: Duration) {
        let (begin, rounds) = (Instant::now(), long(6, 20));
        for round in 1..=rounds {
            self.round(lab, &lab.hosts());
            if self.alive.len() > 40 {
                let name = self.alive.keys().next().unwrap().clone();
                self.end(lab, &name);
            }
            std::thread::sleep((length * round / rounds).saturating_sub(begin.elapsed()));
        }
    }

    /// Two attaches on each host, and a detach of the one before.
    fn round(&mut self, lab: &Lab, hosts: &[String]) {
        for host in hosts {
            let names: Vec<String> = (0..2).map(|i| format!("churn-{}-{i}", self.count)).collect();
            self.count += 1;
            netns(lab, host, "add", &names);
            for name in names {
                let attached = attach(lab, host, "managed", &name).unwrap();
                self.alive.insert(name, (host.clone(), attached.endpoint.id));
            }
            let old = self.alive.iter().find(|(_, (on, _))| on == host).map(|(name, _)| name.clone());
            if let Some(name) = old {
                self.end(lab, &name);
            }
        }
    }

    fn end(&mut self, lab: &Lab, name: &str) {
        let (host, id) = self.alive.remove(name).unwrap();
        detach(lab, &host, &id).unwrap();
        netns(lab, &host, "del", &[name.to_owned()]);
    }

    /// Every agent has what lives on it, and no address is there twice.
    #[track_caller]
    fn is_there(&self, lab: &Lab) {
        let mut seen = BTreeSet::new();
        let mut names = BTreeSet::new();
        for host in lab.hosts() {
            for endpoint in lab.endpoints(&host).unwrap() {
                for address in &endpoint.addresses {
                    assert!(seen.insert((endpoint.network.clone(), *address)), "{address} is there twice");
                }
                names.extend(endpoint.name.map(|name| name.to_string()));
            }
        }
        for name in self.alive.keys() {
            assert!(names.contains(name), "{name} is lost: {names:?}");
        }
    }
}

fn seed() -> u64 {
    let seed = std::env::var("SOAK_SEED").ok().and_then(|text| text.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()) << 20 | 1);
    eprintln!("SOAK_SEED={seed}");
    seed
}

/// xorshift64 (Marsaglia 2003).
fn below(state: &mut u64, bound: u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    (*state >> 11) % bound
}

#[test]
fn the_server_is_away_while_all_hosts_attach_and_detach() {
    let lab = lab(2);
    let traffic = Traffic::between(&lab, "h1", "h2");
    let (secret, clear) = (traffic.secretly(), traffic.clearly());
    let mut churn = Churn::default();
    lab.kill_server().unwrap();
    churn.rounds(&lab, long(Duration::from_secs(4), Duration::from_secs(60)));
    // An agent that starts meanwhile has all of it still.
    churn.is_there(&lab);
    lab.start_server().unwrap();
    for host in lab.hosts() {
        lab.wait_connected(&host).unwrap();
    }
    traffic.all_arrived(Some(secret), Some(clear));
    churn.is_there(&lab);
    well(&lab);
}

#[test]
fn an_agent_that_is_killed_at_any_point_of_attach_and_detach_leaves_nothing_and_loses_nothing() {
    let watched = lab(2);
    let lab: &Lab = &watched;
    let traffic = Traffic::between(lab, "h1", "h2");
    let clear = traffic.clearly();
    let (mut random, mut held) = (seed(), BTreeMap::new());
    for point in 0..long(8, 50) {
        let name = format!("point-{point}");
        netns(lab, "h1", "add", std::slice::from_ref(&name));
        let pid = lab.daemon_pid("h1", Daemon::Agent).unwrap().unwrap();
        let after = Duration::from_micros(below(&mut random, 25_000));
        let attaches = point % 2 == 0 || held.is_empty();
        let outcome = std::thread::scope(|scope| {
            let asked = scope.spawn(|| {
                if attaches {
                    return attach(lab, "h1", "managed", &name).map(|it| Some(it.endpoint.id));
                }
                let (_, id): (&String, &EndpointId) = held.iter().next().unwrap();
                detach(lab, "h1", id).map(|()| None)
            });
            // The point of this test: no event to wait for, any moment will do.
            std::thread::sleep(after);
            kill(Pid::from_raw(i32::try_from(pid).unwrap()), Signal::SIGKILL).unwrap();
            asked.join().unwrap()
        });
        lab.kill_agent("h1").unwrap();
        lab.start_agent("h1").unwrap();
        let known: BTreeSet<EndpointId> =
            lab.endpoints("h1").unwrap().into_iter().map(|endpoint| endpoint.id).collect();
        match outcome {
            Ok(Some(id)) => {
                assert!(known.contains(&id), "{name}: attached, and forgotten");
                held.insert(name, id);
            }
            Ok(None) => {
                let (name, id) = held.pop_first().unwrap();
                assert!(!known.contains(&id), "{name}: detached, and there again");
                netns(lab, "h1", "del", &[name]);
            }
            // Whoever asked does without: an engine takes the container away, or asks again.
            Err(_) if attaches => netns(lab, "h1", "del", &[name]),
            Err(_) => {
                let (name, id) = held.pop_first().unwrap();
                detach(lab, "h1", &id).unwrap();
                netns(lab, "h1", "del", &[name]);
            }
        }
    }
    lab.wait_connected("h1").unwrap();
    traffic.all_arrived(None, Some(clear));
    meet(lab, &traffic.secret.0, &traffic.secret.1);
    well(lab);
}

#[test]
fn a_host_that_is_cut_off_and_healed_goes_on_and_no_other_notices() {
    let lab = lab(3);
    let traffic = Traffic::between(&lab, "h2", "h3");
    let cut_off = lab.run("h1", &idle("cut-off")).unwrap();
    meet(&lab, &cut_off, &traffic.secret.0);
    let (secret, clear) = (traffic.secretly(), traffic.clearly());
    for other in ["h2", "h3", SERVER] {
        lab.cut("h1", other).unwrap();
    }
    let mut churn = Churn::default();
    churn.rounds(&lab, long(Duration::from_secs(2), Duration::from_secs(40)));
    lab.heal().unwrap();
    traffic.all_arrived(Some(secret), Some(clear));
    until(LIMIT * 4, "it is reached again", || {
        ttl(&lab, &cut_off.path(), &traffic.secret.0.ip().to_string()).is_some()
    });
    until(LIMIT * 4, "the server hears of it", || {
        matches!(lab.agent_status("h1").unwrap().connection, Connection::Up { .. })
    });
    churn.is_there(&lab);
    well(&lab);
}

#[test]
fn a_host_that_loses_its_power_comes_back_with_its_name_and_without_what_ran_on_it() {
    let lab = lab(3);
    let traffic = Traffic::between(&lab, "h2", "h3");
    let before = lab.run("h1", &idle("before")).unwrap();
    meet(&lab, &before, &traffic.secret.0);
    let (secret, clear) = (traffic.secretly(), traffic.clearly());
    let id = lab.agent_status("h1").unwrap().host;
    lab.kill("h1").unwrap();
    until(LIMIT * 4, "the server says that it is silent", || {
        let text = says(&lab, SERVER, &["droveway", "host", "ls"]);
        text.lines().any(|line| line.starts_with("h1") && line.contains("away") && line.contains("ago"))
    });
    lab.start("h1").unwrap();
    lab.wait_connected("h1").unwrap();
    assert_eq!(lab.agent_status("h1").unwrap().host, id, "its identity is on its disk");
    until(LIMIT, "what ran on it is forgotten", || lab.endpoints("h1").unwrap().is_empty());
    let after = lab.run("h1", &idle("after")).unwrap();
    assert_ne!(after.ip(), before.ip(), "an address rests, through a loss of power too");
    meet(&lab, &after, &traffic.secret.0);
    well(&lab);

    // Removed, and joined again with its disk as it was: another host, of the same name.
    lab.check(SERVER, &["droveway", "host", "rm", "h1"]).unwrap();
    lab.kill("h1").unwrap();
    lab.start("h1").unwrap();
    lab.wait_connected("h1").unwrap();
    assert_ne!(lab.agent_status("h1").unwrap().host, id);
    let again = lab.run("h1", &idle("again")).unwrap();
    meet(&lab, &again, &traffic.secret.0);
    traffic.all_arrived(Some(secret), Some(clear));
    well(&lab);
}

/// Where libfaketime is, on Debian.
pub const FAKETIME: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1";

#[test]
fn a_clock_that_jumps_an_hour_either_way_disturbs_nothing() {
    if !std::path::Path::new(FAKETIME).exists() {
        return skipped("libfaketime is not installed");
    }
    // Server and agents have a clock that this test sets; all else has the machine's.
    let scratch = tempfile::tempdir().unwrap();
    let (clock, program) = (scratch.path().join("clock"), scratch.path().join("droveway"));
    let set = |offset: &str| {
        let new = scratch.path().join("new");
        std::fs::write(&new, format!("{offset}\n")).unwrap();
        std::fs::rename(&new, &clock).unwrap();
    };
    set("+0");
    let script = format!(
        "#!/bin/sh\ncase $1 in server|agent) export LD_PRELOAD={FAKETIME} FAKETIME_TIMESTAMP_FILE={} FAKETIME_NO_CACHE=1 \
         FAKETIME_DONT_FAKE_MONOTONIC=1 DONT_FAKE_MONOTONIC=1;; esac\nexec {} \"$@\"\n",
        clock.display(),
        env!("CARGO_BIN_EXE_droveway")
    );
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    std::fs::set_permissions(scratch.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let lab = Watched::up(droveway::lab::LabSpec { program, ..spec(2) });
    let traffic = Traffic::between(&lab, "h1", "h2");
    let mut churn = Churn::default();
    for (offset, hours) in [("+1h", 1), ("-1h", -1)] {
        let released = lab.run("h1", &idle("released")).unwrap();
        let (secret, clear) = (traffic.secretly(), traffic.clearly());
        lab.kill_container("h1", "released").unwrap();
        set(offset);
        churn.round(&lab, &lab.hosts());
        let made = lab.endpoints("h1").unwrap().into_iter().map(|endpoint| endpoint.created).max().unwrap();
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let ahead = i128::from(made) - now.as_millis().cast_signed();
        assert!(
            (ahead - hours * 3_600_000).abs() < 120_000 || hours < 0,
            "the clock did not jump: {ahead} ms"
        );
        for host in lab.hosts() {
            for endpoint in lab.endpoints(&host).unwrap() {
                assert!(!endpoint.addresses.contains(&IpAddr::V4(released.ip())), "it has to rest");
            }
        }
        // A server that starts by the new clock, and an agent.
        lab.kill_server().unwrap();
        lab.start_server().unwrap();
        for host in lab.hosts() {
            lab.wait_connected(&host).unwrap();
        }
        traffic.all_arrived(Some(secret), Some(clear));
        lab.kill_agent("h1").unwrap();
        lab.start_agent("h1").unwrap();
        lab.wait_connected("h1").unwrap();
        meet(&lab, &traffic.secret.0, &traffic.secret.1);
        well(&lab);
    }
}

/// Waits until all agents are connected: they pause for longer and longer while there is nobody.
fn are_connected(lab: &Lab) {
    until(LIMIT * 4, "all agents are connected", || {
        let up = |host: &String| matches!(lab.agent_status(host).unwrap().connection, Connection::Up { .. });
        lab.hosts().iter().all(up)
    });
}

#[test]
fn two_hundred_attaches_at_once_with_two_servers_that_come_and_go_lose_no_address_and_give_none_twice() {
    let watched = Watched::up(LabSpec { servers: 2, ..spec(3) });
    let lab: &Lab = &watched;
    let hosts = lab.hosts();
    let each = 67;
    let names = |host: &str| -> Vec<String> { (0..each).map(|i| format!("{host}-{i}")).collect() };
    for host in &hosts {
        netns(lab, host, "add", &names(host));
    }
    let over = AtomicBool::new(false);
    let attached: Vec<(String, Attached)> = std::thread::scope(|scope| {
        let flaps = scope.spawn(|| {
            let mut times = 0;
            // One, the other, both; each time when all agents are at one that lives.
            let turns: [&[&str]; 3] = [&[SERVER], &[SECOND], &[SERVER, SECOND]];
            for nodes in turns.iter().cycle() {
                if over.load(Ordering::SeqCst) && times >= turns.len() {
                    break;
                }
                for node in *nodes {
                    lab.kill_daemon(node, Daemon::Server).unwrap();
                }
                for node in *nodes {
                    lab.start_daemon(node, Daemon::Server).unwrap();
                }
                are_connected(lab);
                times += 1;
            }
            times
        });
        let names = &names;
        let asked: Vec<_> = hosts
            .iter()
            .flat_map(|host| names(host).into_iter().map(move |name| (host.clone(), name)))
            .map(|(host, name)| {
                scope.spawn(move || {
                    let begin = Instant::now();
                    loop {
                        match attach(lab, &host, "managed", &name) {
                            Ok(attached) => return (host, attached),
                            // No block and no server to give one: whoever asks, asks again.
                            Err(error) => assert!(begin.elapsed() < LIMIT * 6, "{name}: {error}"),
                        }
                        std::thread::sleep(Duration::from_millis(50));
                    }
                })
            })
            .collect();
        let attached = asked.into_iter().map(|asked| asked.join().unwrap()).collect();
        over.store(true, Ordering::SeqCst);
        eprintln!("servers were killed {} times", flaps.join().unwrap());
        attached
    });
    are_connected(lab);
    assert_eq!(attached.len(), each * hosts.len());
    let addresses: BTreeSet<IpAddr> =
        attached.iter().flat_map(|(_, attached)| attached.endpoint.addresses.clone()).collect();
    assert_eq!(addresses.len(), attached.len(), "an address was given twice");
    for host in &hosts {
        let known: BTreeSet<EndpointId> =
            lab.endpoints(host).unwrap().into_iter().map(|endpoint| endpoint.id).collect();
        let told: BTreeSet<EndpointId> =
            attached.iter().filter(|(on, _)| on == host).map(|(_, it)| it.endpoint.id.clone()).collect();
        assert_eq!(known, told, "{host}");
    }
    well(lab);
    // Something goes from host to host, with the canary in it: what was attached has nothing that runs in it.
    let (one, other) = (lab.run("h1", &idle("one")).unwrap(), lab.run("h2", &idle("other")).unwrap());
    meet(lab, &one, &other);
    for container in [&one, &other] {
        lab.kill_container(&container.host, &container.name).unwrap();
    }
    for (host, attached) in &attached {
        detach(lab, host, &attached.endpoint.id).unwrap();
    }
    for host in &hosts {
        netns(lab, host, "del", &names(host));
    }
    until(LIMIT, "the server forgets them", || {
        says(lab, SERVER, &["droveway", "endpoint", "ls", "-o", "json"]).trim() == "[]"
    });
    well(lab);
}
