//! `make bench`: what Droveway costs, as ratios and latencies taken in one run on one machine.
//!
//! A lab of three hosts is brought up; what is compared with it is made by hand beside it. A figure that misses its target is
//! said plainly and is no failure: a timing is never a test. Needs root, `iperf3` and `ping` (`scripts/deps.sh bench`).
//!
//! `cargo bench -p droveway --bench system -- [--quick] [stream] [attach] [ping] [memory] [scale] [agents]`

mod agents;
mod attach;
mod figures;
mod host;
mod memory;
mod probe;
mod stream;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use droveway::lab::{Lab, LabSpec};

use figures::Report;
use host::{Host, settle};
use probe::Probe;

/// Measured, unless `DROVEWAY_PROGRAM` names another build to compare.
const PROGRAM: &str = env!("CARGO_BIN_EXE_droveway");
const PHASES: [&str; 6] = ["stream", "attach", "ping", "memory", "scale", "agents"];

/// How much of everything.
struct Size {
    rounds: u32,
    seconds: u32,
    attaches: usize,
    endpoints: usize,
    counts: &'static [usize],
    agents: usize,
    changing: u64,
}

const FULL: Size = Size {
    rounds: 15,
    seconds: 3,
    attaches: 200,
    endpoints: 500,
    counts: &[1, 10, 100, 500, 1000],
    agents: 1000,
    changing: 60,
};
const QUICK: Size = Size {
    rounds: 3,
    seconds: 2,
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
    let size = if words.iter().any(|word| word == "--quick") { &QUICK } else { &FULL };
    let wanted: Vec<&str> = words.iter().map(String::as_str).filter(|word| *word != "--quick").collect();
    if let Some(unknown) = wanted.iter().find(|word| !PHASES.contains(word)) {
        anyhow::bail!("{unknown:?} is nothing to measure; choose of {}", PHASES.join(", "));
    }
    ensure!(nix::unistd::geteuid().is_root(), "the benches open raw sockets in containers: run them as root");
    let does = |phase: &str| wanted.is_empty() || wanted.contains(&phase);

    let target = Path::new(PROGRAM).ancestors().nth(2).context("the program has no target directory")?;
    let mut report = Report::new(target.join("bench"))?;
    machine();
    let program = std::env::var_os("DROVEWAY_PROGRAM").unwrap_or_else(|| PROGRAM.into());
    if does("agents") {
        println!("{} simulated agents on one server, {} s of changes", size.agents, size.changing);
        let outcome = agents::measure(Path::new(&program), size.agents, size.changing, &mut report);
        outcome.unwrap_or_else(|error| report.failed("agents", &error));
    }
    if wanted == ["agents"] {
        return report.print();
    }
    let spec = |suffix: &str| -> Result<LabSpec> {
        let spec = LabSpec::new(&format!("bench{}{suffix}", std::process::id()))?;
        Ok(LabSpec { hosts: 3, program: PathBuf::from(&program), ..spec })
    };
    println!("bringing up a lab of three hosts");
    let lab = Lab::up(spec("")?)?;

    if does("stream") {
        println!(
            "one TCP stream, container to container, two hosts ({} rounds of {} s each)",
            size.rounds, size.seconds
        );
        let outcome = stream::measure(&lab, spec("x")?, size.rounds, size.seconds, &mut report);
        outcome.unwrap_or_else(|error| report.failed("VXLAN stream", &error));
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

/// On what the figures were taken.
fn machine() {
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let (kernel, load) = (read("/proc/sys/kernel/osrelease"), read("/proc/loadavg"));
    let load = load.split(' ').next().unwrap_or("?").to_owned();
    println!("machine: {cores} cores, Linux {}, load {load} at the start", kernel.trim());
}
