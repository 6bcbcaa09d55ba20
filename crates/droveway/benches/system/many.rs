//! Phase `many`: one agent with a thousand peers. How long until all tunnels are up, what each costs in memory, what they cost
//! while nothing is sent, and whether a stream through one of the tunnels is as fast as it is without the others.
//!
//! The agent is real, with IKE, liveness and probes as ever; so is the peer `h2` that the stream goes to. The others are played
//! ([`crowd`](crate::crowd)), each with its own key, certificate, address and block.

#![expect(clippy::cast_precision_loss, reason = "figures for people: counts far below 2^52")]

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use droveway::lab::{Daemon, Lab, LabSpec};
use serde::Serialize;

use crate::Size;
use crate::crowd::Crowd;
use crate::figures::{Bar, Report};
use crate::host::{Host, settle};
use crate::measure::MEASURES;
use crate::stream;
use crate::turns;

const NETWORK: &str = "crowd";
const CROWDED: &str = "with the others";
const ALONE: &str = "without";

#[derive(Debug, Default, Serialize)]
struct Raw {
    peers: u32,
    /// From the attach that makes the agent a member of the network until the last of the first peers has keys.
    first_up_seconds: f64,
    /// From the start of an agent until the last of all peers has keys.
    all_up_seconds: f64,
    kilobytes_each: f64,
    /// Percent of a processor while nothing is sent, and how many probes a second were answered meanwhile.
    idle: Vec<Idle>,
}

#[derive(Debug, Serialize)]
struct Idle {
    peers: usize,
    percent: f64,
    probes_per_second: f64,
}

/// Takes the measures, in labs of its own.
pub fn measure(spec: &dyn Fn(&str) -> Result<LabSpec>, size: &Size, report: &mut Report) -> Result<()> {
    let played = LabSpec { hosts: 2, others: vec!["crowd".parse()?], ..spec("m")? };
    let lab = Lab::up(played)?;
    let words = ["droveway", "network", "create", NETWORK, "--subnet", "10.64.0.0/14", "--block-size", "/28"];
    lab.check("server", &words)?;
    let (mut h1, mut h2) = (Host::new(&lab, "h1")?, Host::new(&lab, "h2")?);
    let (way, _) = stream::ours(&lab, &mut h1, &mut h2, "managed")?;
    let mut raw = Raw { peers: size.peers, ..Raw::default() };
    raw.idle.push(idle(&lab, None, size)?);

    // The agent has a block and a router in the network, and nobody to share it with.
    stream::soon(&mut h1, NETWORK)?;
    settle(&lab, &[&h1, &h2])?;
    let before = resident(&lab)?;
    let mut crowd = Crowd::new(&lab, "crowd", NETWORK)?;
    let begun = Instant::now();
    crowd.grow(size.peers / 10)?;
    crowd.all_up()?;
    raw.first_up_seconds = begun.elapsed().as_secs_f64();
    println!("  {} peers joined and up in {:.1} s", crowd.count(), raw.first_up_seconds);
    raw.idle.push(idle(&lab, Some(&crowd), size)?);
    crowd.grow(size.peers)?;
    crowd.all_up()?;
    raw.idle.push(idle(&lab, Some(&crowd), size)?);
    raw.kilobytes_each = (resident(&lab)? - before) / f64::from(size.peers);

    println!("  the agent is killed and started");
    lab.kill_agent("h1")?;
    crowd.forget();
    let begun = Instant::now();
    lab.start_agent("h1")?;
    crowd.all_up()?;
    raw.all_up_seconds = begun.elapsed().as_secs_f64();
    println!("  all {} up again after {:.2} s", crowd.count(), raw.all_up_seconds);

    let alone = Lab::up(LabSpec { hosts: 2, ..spec("n")? })?;
    let (mut a1, mut a2) = (Host::new(&alone, "h1")?, Host::new(&alone, "h2")?);
    let (lone, _) = stream::ours(&alone, &mut a1, &mut a2, "managed")?;
    let ways = [(CROWDED.to_owned(), way.ends()?), (ALONE.to_owned(), lone.ends()?)];
    let rows = turns::take(&ways, &MEASURES[..1], size.rounds, size.seconds);
    drop(ways);
    alone.down()?;
    drop(crowd);
    lab.down()?;
    tell(&raw, &rows, report)
}

fn tell(raw: &Raw, rows: &[turns::Row], report: &mut Report) -> Result<()> {
    let peers = raw.peers;
    report.told(format!("{peers} peers: all up after a start"), format!("{:.2} s", raw.all_up_seconds));
    let figure = format!("{:.1} KB", raw.kilobytes_each);
    let bar = Bar { must: 64.0, aim: 64.0, more: false };
    report.barred(format!("{peers} peers: memory of each"), figure, raw.kilobytes_each, bar);
    for Idle { peers, percent, probes_per_second } in &raw.idle {
        let figure = format!("{percent:.2} % of a processor, {probes_per_second:.0} probes a second");
        let what = format!("{peers} peers: idle");
        if *peers == 0 {
            report.told(what, figure);
            continue;
        }
        let aim = if *peers <= 100 { 0.2 } else { 1.0 };
        report.barred(what, figure, *percent, Bar { must: 1.0, aim, more: false });
    }
    if let Some(ratio) = rows.first().and_then(|row| row.ratio(CROWDED, ALONE)) {
        let figure =
            format!("{:.3} ({:.2} to {:.2})", ratio.median(), ratio.quantile(0.25), ratio.quantile(0.75));
        let what = format!("{peers} peers: a stream × one without the others");
        report.barred(what, figure, ratio.median(), Bar { must: 0.95, aim: 0.95, more: true });
    }
    report.keep("many", &serde_json::json!({ "machine": crate::machine(), "raw": raw, "rows": rows }))
}

/// What the agent of `h1` needs while nothing is sent, once it has come to rest.
fn idle(lab: &Lab, crowd: Option<&Crowd>, size: &Size) -> Result<Idle> {
    std::thread::sleep(Duration::from_secs(size.rest));
    let pings = || crowd.map_or(0, Crowd::pings);
    let (spent, answered, begun) = (on_processor(lab)?, pings(), Instant::now());
    std::thread::sleep(Duration::from_secs(size.rest));
    let took = begun.elapsed().as_secs_f64();
    let idle = Idle {
        peers: crowd.map_or(0, Crowd::count),
        percent: (on_processor(lab)? - spent) / took * 100.0,
        probes_per_second: (pings() - answered) as f64 / took,
    };
    let Idle { peers, percent, probes_per_second } = &idle;
    println!("  {peers} peers, idle: {percent:.2} % of a processor, {probes_per_second:.1} probes a second");
    Ok(idle)
}

fn agent(lab: &Lab) -> Result<u32> {
    lab.daemon_pid("h1", Daemon::Agent)?.context("the agent of h1 does not run")
}

/// Seconds that all threads of the agent were on a processor: exact, where `stat` counts ticks.
fn on_processor(lab: &Lab) -> Result<f64> {
    let mut nanoseconds = 0.0;
    for task in std::fs::read_dir(format!("/proc/{}/task", agent(lab)?))? {
        // A thread may end meanwhile.
        let text = std::fs::read_to_string(task?.path().join("schedstat")).unwrap_or_default();
        nanoseconds += text.split_whitespace().next().map_or(Ok(0.0), str::parse::<f64>)?;
    }
    Ok(nanoseconds / 1e9)
}

/// Resident memory of the agent, KB of 1,000 bytes.
fn resident(lab: &Lab) -> Result<f64> {
    let text = std::fs::read_to_string(format!("/proc/{}/status", agent(lab)?))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kibibytes = line.and_then(|rest| rest.split_whitespace().next()).context("no VmRSS")?;
    Ok(kibibytes.parse::<f64>()? * 1.024)
}
