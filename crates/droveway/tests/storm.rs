//! A lab under a storm: containers come and go while agents and the server are killed and packets are lost.
//!
//! By itself it is over in seconds. `make soak` lets it blow for `SOAK_SECONDS`, with the seed `SOAK_SEED`.
#![allow(clippy::unwrap_used, reason = "these are tests: clippy takes only functions marked so for tests")]

use std::collections::{BTreeMap, BTreeSet};
use std::env;
use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use droveway::lab::capture::Capture;
use droveway::lab::{Container, Daemon, Lab, LabSpec, RunSpec, SERVER};

const HOSTS: [&str; 3] = ["h1", "h2", "h3"];
/// So many containers at most, on all hosts.
const CONTAINERS: usize = 24;
/// Steps between two looks at whether all is as it should be.
const CALM_EVERY: u32 = 12;
/// How long the system may take to be as it should be, once nothing disturbs it.
const CALM: Duration = Duration::from_secs(20);

#[test]
fn after_a_storm_all_that_lives_reaches_all_that_lives_and_nothing_else_is_left() {
    let length = Duration::from_secs(number("SOAK_SECONDS").unwrap_or(0));
    let seed = number("SOAK_SEED").unwrap_or(1);
    let mut storm = Storm::new(seed);
    let started = Instant::now();
    let mut steps = 0;
    while steps < 2 * CALM_EVERY || started.elapsed() < length {
        storm.step();
        steps += 1;
        if steps % CALM_EVERY == 0 {
            storm.calm();
        }
    }
    storm.calm();
    storm.clear();
    storm.underlay.report().unwrap().clean().unwrap();
    println!("{steps} steps, seed {seed}: {:?}", storm.done);
    drop(storm.underlay);
    storm.lab.down().unwrap();
}

fn number(variable: &str) -> Option<u64> {
    let text = env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable}={text} is not a number")))
}

struct Storm {
    // Before the lab: it has to end first.
    underlay: Capture,
    /// What pings carry and the underlay must not show, as `ping -p` takes it.
    pattern: String,
    lab: Lab,
    random: Random,
    alive: BTreeMap<String, Container>,
    named: u32,
    down: BTreeSet<&'static str>,
    done: BTreeMap<&'static str, u32>,
}

impl Storm {
    fn new(seed: u64) -> Self {
        let program = env!("CARGO_BIN_EXE_droveway").into();
        let spec = LabSpec {
            hosts: HOSTS.len() as u32,
            program,
            ..LabSpec::new(&format!("s{}", std::process::id())).unwrap()
        };
        let lab = Lab::up(spec).unwrap();
        let canary = RandomState::new().hash_one("canary");
        Self {
            underlay: lab.capture(&[canary.to_be_bytes()]).unwrap(),
            pattern: format!("{canary:016x}"),
            lab,
            random: Random(seed.max(1)),
            alive: BTreeMap::new(),
            named: 0,
            down: BTreeSet::new(),
            done: BTreeMap::new(),
        }
    }

    fn step(&mut self) {
        let host = HOSTS[self.random.below(HOSTS.len())];
        let what = match self.random.below(100) {
            0..45 if self.alive.len() < CONTAINERS => self.attach(),
            45..75 => self.detach(),
            75..85 => self.kill(host),
            85..88 => self.kill(SERVER),
            88..96 => self.restart(),
            96..98 => self.lose(),
            _ => self.heal(),
        };
        *self.done.entry(what).or_default() += 1;
    }

    fn attach(&mut self) -> &'static str {
        let up: Vec<&str> = HOSTS.into_iter().filter(|host| !self.down.contains(host)).collect();
        let Some(host) = up.get(self.random.below(up.len().max(1))) else { return self.restart() };
        self.named += 1;
        let name = format!("c{}", self.named);
        match self.lab.run(host, &RunSpec::new(&name, &["sleep", "100000"]).unwrap()) {
            Ok(container) => {
                self.alive.insert(container.path(), container);
                "attached"
            }
            // A host without a block cannot get one while the server is away. Nothing else is an excuse.
            Err(error) if self.down.contains(SERVER) => {
                assert!(!self.has_block(host), "{host} has a block, yet: {error:#}");
                "had no block"
            }
            Err(error) => panic!("{name} on {host}: {error:#}"),
        }
    }

    fn has_block(&self, host: &str) -> bool {
        self.lab.agent_status(host).unwrap().routers.iter().any(|router| !router.blocks.is_empty())
    }

    fn detach(&mut self) -> &'static str {
        // The lab's shim detaches, and for that the agent has to be there.
        let there: Vec<String> = self
            .alive
            .values()
            .filter(|c| !self.down.contains(c.host.as_str()))
            .map(Container::path)
            .collect();
        let Some(path) = there.get(self.random.below(there.len().max(1))) else {
            return self.attach_or_restart();
        };
        let container = self.alive.remove(path).unwrap();
        self.lab.kill_container(&container.host, &container.name).unwrap();
        "detached"
    }

    fn attach_or_restart(&mut self) -> &'static str {
        if self.alive.is_empty() { self.attach() } else { self.restart() }
    }

    fn kill(&mut self, node: &'static str) -> &'static str {
        if !self.down.insert(node) {
            return self.restart();
        }
        let daemon = if node == SERVER { Daemon::Server } else { Daemon::Agent };
        self.lab.kill_daemon(node, daemon).unwrap();
        if node == SERVER { "killed the server" } else { "killed an agent" }
    }

    fn restart(&mut self) -> &'static str {
        let Some(node) = self.down.pop_first() else { return "did nothing" };
        let daemon = if node == SERVER { Daemon::Server } else { Daemon::Agent };
        self.lab.start_daemon(node, daemon).unwrap();
        "started again"
    }

    fn lose(&mut self) -> &'static str {
        self.lab.loss("h1", "h2", 0.2).unwrap();
        self.lab.loss(SERVER, "h3", 0.2).unwrap();
        "lost packets"
    }

    fn heal(&mut self) -> &'static str {
        self.lab.heal().unwrap();
        "healed"
    }

    /// Ends every fault; then all must become as it should be.
    fn calm(&mut self) {
        self.lab.heal().unwrap();
        while !self.down.is_empty() {
            self.restart();
        }
        for host in self.lab.hosts() {
            self.lab.wait_connected(&host).unwrap();
        }
        let deadline = Instant::now() + CALM;
        until(deadline, || self.books_agree());
        until(deadline, || self.pings());
    }

    /// Each agent has exactly the containers that live on it, no address twice, and no router is behind; the server
    /// has heard of all.
    fn books_agree(&self) -> Result<(), String> {
        let mut seen: BTreeSet<IpAddr> = BTreeSet::new();
        for host in self.lab.hosts() {
            let status = self.lab.agent_status(&host).unwrap();
            if let Some(router) = status.routers.iter().find(|router| !router.converged) {
                return Err(format!("{host}: {} has not converged: {:?}", router.netns, status.troubles));
            }
            let endpoints = self.lab.endpoints(&host).unwrap();
            for endpoint in &endpoints {
                for address in &endpoint.addresses {
                    assert!(seen.insert(*address), "{address} is there twice");
                }
            }
            let have: BTreeSet<String> =
                endpoints.iter().filter_map(|e| Some(format!("{host}/{}", e.name.as_ref()?))).collect();
            let want: BTreeSet<String> =
                self.alive.values().filter(|c| c.host == host).map(Container::path).collect();
            if have != want {
                return Err(format!("{host} has {have:?}, and {want:?} live there"));
            }
        }
        let listed = self.lab.check(SERVER, &["droveway", "endpoint", "ls", "-o", "json"]).unwrap();
        let listed: Vec<model::Endpoint> = serde_json::from_str(&listed).unwrap();
        if listed.len() == self.alive.len() {
            Ok(())
        } else {
            Err(format!("the server lists {} endpoints, and {} live", listed.len(), self.alive.len()))
        }
    }

    /// Each container reaches the one after it, so that every pair of hosts with containers is likely to be tried.
    fn pings(&self) -> Result<(), String> {
        let ring = self.alive.values().zip(self.alive.values().skip(1).chain(self.alive.values().take(1)));
        for (from, to) in ring {
            let address = to.address().unwrap().to_string();
            let ping = ["ping", "-c", "1", "-W", "1", "-p", &self.pattern, &address];
            let ping = self.lab.exec(&from.path(), &ping).unwrap();
            if !ping.status.success() {
                return Err(format!("{} does not reach {} at {address}", from.path(), to.path()));
            }
        }
        Ok(())
    }

    /// Takes all containers away: no port is left on any bridge.
    fn clear(&mut self) {
        while !self.alive.is_empty() {
            self.detach();
        }
        until(Instant::now() + CALM, || self.books_agree());
        for host in self.lab.hosts() {
            for router in self.lab.agent_status(&host).unwrap().routers {
                let links = self.lab.check(&host, &["ip", "-n", &router.netns, "-o", "link"]).unwrap();
                assert!(!links.contains(": p-"), "{host}: ports without containers: {links}");
            }
        }
    }
}

/// Tries until it is so.
fn until(deadline: Instant, mut so: impl FnMut() -> Result<(), String>) {
    while let Err(why) = so() {
        assert!(Instant::now() < deadline, "not within {CALM:?}: {why}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// xorshift64 (Marsaglia 2003): the same storm for the same seed.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 33).unwrap() % bound
    }
}
