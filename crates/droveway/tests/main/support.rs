//! What scenarios share: labs, containers, waiting, captures.

use std::io::{BufRead, BufReader, Write};
use std::net::Ipv4Addr;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use droveway::lab::{Container, Lab, LabSpec, RunSpec};

use crate::watch::{Watched, carried, pattern};

/// How long anything may take that is no subject of a test.
pub const LIMIT: Duration = Duration::from_secs(15);

/// What a lab of the tests shall be.
pub fn spec(hosts: u32) -> LabSpec {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let name = format!("m{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let program = std::env::var(PROGRAM).unwrap_or_else(|_| env!("CARGO_BIN_EXE_droveway").to_owned()).into();
    LabSpec { hosts, program, ..LabSpec::new(&name).unwrap() }
}

/// A lab with server and agents, all connected, in which the canary must not be seen.
pub fn lab(hosts: u32) -> Watched {
    Watched::up(spec(hosts))
}

/// Says that the test that calls cannot be made here, and why: to the terminal, past the harness that keeps what passing
/// tests say, and to the list that `scripts/test.sh` counts.
pub fn skipped(why: &str) {
    let test = std::thread::current().name().unwrap_or_default().to_owned();
    let line = format!("skipped: {test}: {why}\n");
    let _ = std::io::stderr().write_all(line.as_bytes());
    if let Some(list) = std::env::var_os("DROVEWAY_SKIPPED") {
        let mut file = std::fs::OpenOptions::new().create(true).append(true).open(list).unwrap();
        file.write_all(line.as_bytes()).unwrap();
    }
}

/// The program that labs run, if it is not the one that was made with the tests: `make soak` has one that is made to be fast.
const PROGRAM: &str = "SOAK_PROGRAM";

/// Whether `make soak` runs the test, with a fast program and nothing beside it.
pub fn soak() -> bool {
    std::env::var_os(PROGRAM).is_some()
}

/// A number from the environment, by which `make soak` asks for the long form of a test.
pub fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{variable}={text} is not a number")))
}

/// Waits until it is so, and says how long that took.
#[track_caller]
pub fn until(limit: Duration, what: &str, mut done: impl FnMut() -> bool) -> Duration {
    let begin = Instant::now();
    while !done() {
        assert!(begin.elapsed() < limit, "not within {limit:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
    begin.elapsed()
}

/// Whether a host has routers, and the kernel shows all that should be in them.
pub fn converged(lab: &Lab, host: &str) -> bool {
    let routers = lab.agent_status(host).map(|status| status.routers).unwrap_or_default();
    !routers.is_empty() && routers.iter().all(|router| router.converged)
}

/// A container that does nothing, in `managed`.
pub fn idle(name: &str) -> RunSpec {
    RunSpec::new(name, &["sleep", "infinity"]).unwrap()
}

/// [`idle`] in a network.
pub fn idle_in(network: &str, name: &str) -> RunSpec {
    RunSpec { network: network.to_owned(), ..idle(name) }
}

/// A network whose packets travel as VXLAN.
pub fn network_in_clear(lab: &Lab, name: &str, subnet: &str) {
    let words = ["droveway", "network", "create", name, "--subnet", subnet, "--driver", "vxlan"];
    lab.check("server", &words).unwrap();
}

/// Runs a container in a network that its host may not have heard of yet.
pub fn run_soon(lab: &Lab, host: &str, run: &RunSpec) -> Container {
    let mut answer = lab.run(host, run);
    until(LIMIT, &format!("{} is known on {host}", run.network), || {
        if answer.is_err() {
            answer = lab.run(host, run);
        }
        answer.is_ok()
    });
    answer.unwrap()
}

pub trait Look {
    fn ip(&self) -> Ipv4Addr;
    fn mac(&self) -> String;
}

impl Look for Container {
    fn ip(&self) -> Ipv4Addr {
        self.address().unwrap().to_string().parse().unwrap()
    }

    fn mac(&self) -> String {
        self.attached.endpoint.mac.to_string()
    }
}

/// All that a command says, on both streams, however it ends.
pub fn says(lab: &Lab, target: &str, words: &[&str]) -> String {
    let output = lab.exec(target, words).unwrap();
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// Lines of their own.
pub fn lines(text: &str) -> Vec<String> {
    text.lines().map(str::to_owned).collect()
}

/// Whether a command succeeds.
pub fn succeeds(lab: &Lab, target: &str, words: &[&str]) -> bool {
    lab.exec(target, words).unwrap().status.success()
}

/// Runs a command in a host's router and gives its standard output.
pub fn in_router(lab: &Lab, host: &str, network: &str, words: &[&str]) -> String {
    lab.check(host, &router_words(network, words)).unwrap()
}

/// A command in the words that run it in a network's router.
pub fn router_words(network: &str, words: &[&str]) -> Vec<String> {
    let netns = format!("droveway-{network}");
    let prefix = ["ip", "netns", "exec", &netns];
    prefix.iter().chain(words).map(|&word| word.to_owned()).collect()
}

/// The router's own address in a network, and the blocks of its host.
pub fn router(lab: &Lab, host: &str, network: &str) -> model::agent_api::RouterStatus {
    let status = lab.agent_status(host).unwrap();
    status.routers.into_iter().find(|router| router.name.as_str() == network).unwrap()
}

/// The time to live with which an address answers one ping, if it does.
pub fn ttl(lab: &Lab, from: &str, to: &str) -> Option<u8> {
    ttl_of(&ping(lab, from, &["-n", "-c", "1", "-W", "1", to]))
}

/// What ping says, its last word being the address. From a container to another it carries the canary.
pub fn ping(lab: &Lab, from: &str, words: &[&str]) -> String {
    let inner = from.contains('/') && words.last().is_some_and(|to| !to.starts_with("10.0.0."));
    let pattern = pattern();
    let canary: &[&str] = if inner { &["-p", &pattern] } else { &[] };
    let text = says(lab, from, &[&["ping"], canary, words].concat());
    // On one host there is no router between.
    if inner && ttl_of(&text).is_some_and(|left| left < 64) {
        carried(lab);
    }
    text
}

/// Whether an address does not answer pings.
pub fn silent(lab: &Lab, from: &str, to: &str) -> bool {
    ttl_of(&ping(lab, from, &["-n", "-c", "2", "-i", "0.1", "-W", "0.4", to])).is_none()
}

pub fn ttl_of(text: &str) -> Option<u8> {
    let rest = text.split("ttl=").nth(1)?;
    rest.split(' ').next()?.parse().ok()
}

/// Waits until one container reaches another: its host has to hear of a new one first.
#[track_caller]
pub fn meet(lab: &Lab, from: &Container, to: &Container) {
    let what = format!("{} reaches {}", from.path(), to.path());
    until(LIMIT, &what, || ttl(lab, &from.path(), &to.ip().to_string()).is_some());
}

/// Packets seen at one place, as tcpdump prints them: one line each.
///
/// They are taken by a probe there and printed by tcpdump here: tcpdump itself insists on giving up privileges, which
/// root in a user namespace cannot.
pub struct Capture {
    children: [Child; 2],
    lines: Arc<Mutex<Vec<String>>>,
    threads: Vec<JoinHandle<()>>,
}

impl Capture {
    /// Begins to capture; comes back when nothing is missed any more. `words` runs before the probe.
    pub fn start(lab: &Lab, target: &str, words: &[&str], interface: &str, filter: &str) -> Self {
        let probe = crate::probe::capture_words(interface);
        let command: Vec<&str> = words.iter().copied().chain(probe.iter().map(String::as_str)).collect();
        let mut taker = lab.command(target, &command).unwrap();
        taker.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut taker = taker.spawn().unwrap();
        let mut printer = Command::new("tcpdump")
            .args(["-r", "-", "-l", "-n", "-e", filter])
            .stdin(taker.stderr.take().unwrap())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("tcpdump: {error}; is it installed?"));
        let lines = Arc::new(Mutex::new(Vec::new()));
        let errors = Arc::new(Mutex::new(Vec::new()));
        let threads = vec![
            collect(printer.stdout.take().unwrap(), &lines),
            collect(printer.stderr.take().unwrap(), &errors),
        ];
        let capture = Self { children: [taker, printer], lines, threads };
        until(LIMIT, &format!("packets on {interface} of {target} are captured"), || {
            errors.lock().unwrap().iter().any(|line: &String| line.contains("reading from"))
        });
        capture
    }

    /// On a network's router.
    pub fn in_router(lab: &Lab, host: &str, network: &str, interface: &str, filter: &str) -> Self {
        let netns = format!("droveway-{network}");
        Self::start(lab, host, &["ip", "netns", "exec", &netns], interface, filter)
    }

    pub fn lines(&self) -> Vec<String> {
        self.lines.lock().unwrap().clone()
    }

    /// Waits until a line has that in it: packets are seen in their order, so nothing before it is still to come.
    #[track_caller]
    pub fn sees(&self, what: &str) {
        until(LIMIT, &format!("a packet with {what:?}; seen: {:#?}", self.lines()), || {
            self.lines().iter().any(|line| line.contains(what))
        });
    }
}

fn collect(from: impl std::io::Read + Send + 'static, to: &Arc<Mutex<Vec<String>>>) -> JoinHandle<()> {
    let to = Arc::clone(to);
    std::thread::spawn(move || {
        for line in BufReader::new(from).lines().map_while(Result::ok) {
            to.lock().unwrap().push(line);
        }
    })
}

impl Drop for Capture {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// All of a router that shall be as it was, without what the kernel numbers anew.
const ROUTER: &str = "
    ip -o -4 addr | sed 's/^[0-9]*: //'
    ip -4 route show table main; ip -4 rule
    bridge fdb show dev vxlan0 2>/dev/null | grep permanent | sed 's/link-netnsid.*//'
    ip neigh show nud permanent
    bridge link | sed 's/^[0-9]*: //; s/@[^:]*//; s/<.*> mtu/mtu/'
    ip -br link | sed 's/@/ /' | cut -d' ' -f1
    grep -H . /proc/sys/net/ipv4/conf/br0/proxy_arp /proc/sys/net/ipv4/neigh/br0/proxy_delay /proc/sys/net/ipv4/ip_forward
    for dev in br0 tun0 vxlan0; do
        tc filter show dev $dev ingress 2>/dev/null | grep -o 'droveway.*[0-9] direct-action' | sed 's/[0-9]* direct/direct/'
    done
    nft -s list ruleset";
const HOST: &str = "
    ip -o -4 addr | sed 's/^[0-9]*: //'; ip -4 route
    grep -H . /proc/sys/net/ipv4/conf/dw0/route_localnet
    ip -br link | sed 's/@/ /' | cut -d' ' -f1
    nft -s list ruleset; ls /run/netns";

/// What the kernel has of a host and of its router for a network, line by line, in order.
pub fn kernel(lab: &Lab, host: &str, network: &str) -> String {
    let router = router_words(network, &["sh", "-c", ROUTER]);
    let router: Vec<&str> = router.iter().map(String::as_str).collect();
    let text = says(lab, host, &router) + &says(lab, host, &["sh", "-c", HOST]);
    let mut lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    lines.sort_unstable();
    lines.join("\n")
}
