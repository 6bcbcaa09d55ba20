//! `make bench`: what Droveway costs, as ratios and latencies taken in one run on one machine.
//!
//! A lab of three hosts is brought up; what is compared with it is made by hand beside it. A figure that misses its target is
//! said plainly and is no failure: a timing is never a test. Needs root, `iperf3` and `ping` (`scripts/deps.sh bench`).
//!
//! `cargo bench -p droveway --bench system -- [--quick] [--rounds N] [--seconds N] [stream] [peers] [many] [flood] [attach]
//! [ping] [memory] [scale] [agents]`

mod agents;
mod attach;
#[allow(clippy::unwrap_used, reason = "shared with the tests")]
#[path = "../../tests/main/bogus.rs"]
mod bogus;
mod crowd;
mod figures;
mod flood;
mod host;
#[allow(clippy::unwrap_used, reason = "shared with an example, where what fails has no result")]
#[path = "../../../agent/examples/path/layout.rs"]
mod layout;
mod many;
#[allow(clippy::cast_precision_loss, reason = "figures")]
#[path = "../../../agent/examples/path/measure.rs"]
mod measure;
mod memory;
mod peers;
mod plain;
mod plot;
mod ports;
mod probe;
#[allow(dead_code, clippy::unwrap_used, clippy::expect_used, reason = "shared with the tests")]
#[path = "../../../agent/tests/dataplane/rig.rs"]
mod rig;
#[allow(dead_code, clippy::unwrap_used, clippy::expect_used, reason = "shared with the tests")]
#[path = "../../../linux/tests/sandbox/mod.rs"]
mod sandbox;
mod stream;
mod turns;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use droveway::lab::{Lab, LabSpec};

use figures::Report;
use host::{Host, settle};
use probe::Probe;

/// Measured, unless `DROVEWAY_PROGRAM` names another build to compare.
const PROGRAM: &str = env!("CARGO_BIN_EXE_droveway");
const PHASES: [&str; 9] = ["stream", "peers", "many", "flood", "attach", "ping", "memory", "scale", "agents"];
/// These have no use for the lab that the others share.
const APART: [&str; 4] = ["peers", "many", "flood", "agents"];

/// How much of everything.
struct Size {
    /// Leaves out what takes long and is seldom looked at.
    short: bool,
    rounds: u32,
    seconds: u32,
    /// Other hosts that one has tunnels to.
    peers: u32,
    /// Seconds of doing nothing, before a look at what that costs, and for it.
    rest: u64,
    attaches: usize,
    endpoints: usize,
    counts: &'static [usize],
    agents: usize,
    changing: u64,
}

const FULL: Size = Size {
    short: false,
    rounds: 5,
    seconds: 2,
    peers: 1000,
    rest: 20,
    attaches: 200,
    endpoints: 500,
    counts: &[1, 10, 100, 500, 1000],
    agents: 1000,
    changing: 60,
};
const QUICK: Size = Size {
    short: true,
    rounds: 2,
    seconds: 1,
    peers: 200,
    rest: 5,
    attaches: 50,
    endpoints: 60,
    counts: &[1, 50, 100],
    agents: 200,
    changing: 10,
};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    // Cargo adds `--bench`.
    let words: Vec<String> = std::env::args().skip(1).filter(|word| word != "--bench").collect();
    let mut size = if words.iter().any(|word| word == "--quick") { QUICK } else { FULL };
    let mut wanted = Vec::new();
    let mut words = words.iter().map(String::as_str);
    while let Some(word) = words.next() {
        let mut number = || -> Result<u32> {
            let number = words.next().with_context(|| format!("{word} wants a number"))?;
            number
                .parse()
                .ok()
                .filter(|it| *it > 0)
                .with_context(|| format!("{word} {number}: not a number above 0"))
        };
        match word {
            "--quick" => {}
            "--rounds" => size.rounds = number()?,
            "--seconds" => size.seconds = number()?,
            phase => wanted.push(phase),
        }
    }
    let size = &size;
    if let Some(unknown) = wanted.iter().find(|word| !PHASES.contains(word)) {
        anyhow::bail!("{unknown:?} is nothing to measure; choose of {}", PHASES.join(", "));
    }
    ensure!(nix::unistd::geteuid().is_root(), "the benches open raw sockets in containers: run them as root");
    let does = |phase: &str| wanted.is_empty() || wanted.contains(&phase);

    let target = Path::new(PROGRAM).ancestors().nth(2).context("the program has no target directory")?;
    let mut report = Report::new(target.join("bench"))?;
    println!("machine: {}", machine());
    let program = std::env::var_os("DROVEWAY_PROGRAM").unwrap_or_else(|| PROGRAM.into());
    if does("agents") {
        println!("{} simulated agents on one server, {} s of changes", size.agents, size.changing);
        let outcome = agents::measure(Path::new(&program), size.agents, size.changing, &mut report);
        outcome.unwrap_or_else(|error| report.failed("agents", &error));
    }
    let spec = |suffix: &str| -> Result<LabSpec> {
        let spec = LabSpec::new(&format!("bench{}{suffix}", std::process::id()))?;
        Ok(LabSpec { hosts: 3, program: PathBuf::from(&program), ..spec })
    };
    if does("peers") {
        println!("beside other implementations, without containers");
        let outcome = plain::measure(&target.join("tools/bin"), size, &mut report);
        outcome.unwrap_or_else(|error| report.failed("peers", &error));
    }
    if does("many") {
        println!("one agent with {} peers", size.peers);
        let outcome = many::measure(&spec, size, &mut report);
        outcome.unwrap_or_else(|error| report.failed("many", &error));
    }
    if does("flood") {
        println!("a flood of bogus requests to begin IKE");
        let outcome = flood::measure(&spec, size, &mut report);
        outcome.unwrap_or_else(|error| report.failed("flood", &error));
    }
    if !wanted.is_empty() && wanted.iter().all(|phase| APART.contains(phase)) {
        return report.print();
    }
    println!("bringing up a lab of three hosts");
    let lab = Lab::up(spec("")?)?;

    if does("stream") {
        println!("container to container, two hosts ({} rounds of {} s each)", size.rounds, size.seconds);
        let outcome = stream::measure(&lab, &spec, size, &mut report);
        outcome.unwrap_or_else(|error| report.failed("stream", &error));
    }
    let outcome = endpoints(&lab, size, &does, &mut report);
    outcome.unwrap_or_else(|error| report.failed("the rest", &error));
    println!("taking the lab down");
    lab.down()?;
    report.print()
}

fn endpoints(lab: &Lab, size: &Size, does: &impl Fn(&str) -> bool, report: &mut Report) -> Result<()> {
    let (mut h1, mut h2, mut h3) = (Host::new(lab, "h1")?, Host::new(lab, "h2")?, Host::new(lab, "h3")?);
    // Routers come with the first endpoint: one on each host, so that no measure contains that.
    h1.fill(1)?;
    h3.fill(1)?;
    let (netns, ..) = h2.attach()?;
    let mut probe = Probe::open(lab, "h2", &netns)?;
    settle(lab, &[&h1, &h2, &h3])?;

    if does("attach") {
        println!("attach and detach by the agent's socket ({} of each)", size.attaches);
        attach::latency(&mut h1, size.attaches, report)?;
        settle(lab, &[&h1, &h2, &h3])?;
    }
    if does("ping") {
        println!("attach on h1 until a ping from h2 is answered ({} times)", size.attaches);
        attach::first_ping(&mut h1, &mut probe, size.attaches, report)?;
        settle(lab, &[&h1, &h2, &h3])?;
    }
    if does("memory") {
        println!("resident memory with 3 hosts and {} endpoints", size.endpoints);
        let rest = size.endpoints.saturating_sub(h1.attached());
        h2.fill(rest / 2)?;
        h3.fill(rest - rest / 2)?;
        settle(lab, &[&h1, &h2, &h3])?;
        memory::measure(lab, report)?;
    }
    if does("scale") {
        println!("attach with more and more endpoints on the host");
        attach::scale(lab, &mut h1, &[&h2, &h3], size.counts, report)?;
    }
    Ok(())
}

/// On what figures are taken.
fn machine() -> String {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let (kernel, load) = (read("/proc/sys/kernel/osrelease"), read("/proc/loadavg"));
    let load = load.split(' ').next().unwrap_or("?").to_owned();
    format!("{cores} cores, Linux {}, load {load}", kernel.trim())
}
