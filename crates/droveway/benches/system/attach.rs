//! Attaching: how long the agent takes, how soon another host reaches the container, and whether either grows with
//! the number of endpoints on the host.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use droveway::lab::Lab;
use serde::Serialize;

use crate::figures::{Report, Samples};
use crate::host::{Host, settle};
use crate::ports::Ports;
use crate::probe::Probe;

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1000.0
}

/// Attach and detach by the socket.
pub fn latency(h1: &mut Host<'_>, count: usize, report: &mut Report) -> Result<()> {
    #[derive(Serialize)]
    struct Raw {
        attach_ms: Samples,
        detach_ms: Samples,
    }
    h1.prepare(count)?;
    let (mut attach, mut detach) = (Vec::new(), Vec::new());
    for _ in 0..count {
        attach.push(milliseconds(h1.attach()?.2));
    }
    for _ in 0..count {
        detach.push(milliseconds(h1.detach()?));
    }
    let raw = Raw { attach_ms: Samples::of(attach), detach_ms: Samples::of(detach) };
    report.keep("attach", &raw)?;
    println!("  attach ms: {}", raw.attach_ms);
    println!("  detach ms: {}", raw.detach_ms);
    let figure = |s: &Samples| format!("p50 {:.1} ms, p99 {:.1} ms", s.median(), s.p99());
    report.judged("attach", figure(&raw.attach_ms), "p50 <= 10 ms", raw.attach_ms.median() <= 10.0);
    report.told("detach", figure(&raw.detach_ms));
    Ok(())
}

/// From the start of the attach request on one host to the first answer to a ping from a container on another.
pub fn first_ping(h1: &mut Host<'_>, probe: &mut Probe, count: usize, report: &mut Report) -> Result<()> {
    #[derive(Serialize)]
    struct Raw {
        reached_ms: Samples,
        of_that_attach_ms: Samples,
        pings_lost: u32,
    }
    h1.prepare(count)?;
    let (mut reached, mut attach, mut lost) = (Vec::new(), Vec::new(), 0);
    for _ in 0..count {
        let start = Instant::now();
        let (_, attached, took) = h1.attach()?;
        let address = attached.endpoint.addresses.first().context("no address")?;
        lost += probe.until_answered(*address)?;
        reached.push(milliseconds(start.elapsed()));
        attach.push(milliseconds(took));
    }
    let raw =
        Raw { reached_ms: Samples::of(reached), of_that_attach_ms: Samples::of(attach), pings_lost: lost };
    report.keep("first-ping", &raw)?;
    println!("  attach to first ping ms: {}  ({lost} pings were not answered within 1 ms)", raw.reached_ms);
    let figure = format!("p50 {:.1} ms, p99 {:.1} ms", raw.reached_ms.median(), raw.reached_ms.p99());
    let ok = raw.reached_ms.p99() <= 50.0;
    report.judged("attach to first ping from another host", figure, "p99 <= 50 ms", ok);
    Ok(())
}

/// Attach with more and more endpoints on the host; after each, a port is added by hand to one bridge that has as many.
pub fn scale(
    lab: &Lab,
    h1: &mut Host<'_>,
    others: &[&Host<'_>],
    counts: &[usize],
    report: &mut Report,
) -> Result<()> {
    const TURNS: usize = 5;
    // The bridge by hand takes 1,023 ports.
    const EACH: usize = 20;
    #[derive(Serialize)]
    struct Raw {
        present: usize,
        attach_ms: Samples,
        detach_ms: Samples,
        by_hand_ms: Samples,
    }
    let mut raw: Vec<Raw> = Vec::new();
    let mut ports = Ports::new(lab, h1.name())?;
    while h1.attached() > 1 {
        h1.detach()?;
    }
    for &present in counts {
        h1.fill(present)?;
        ports.fill(present)?;
        let (mut attach, mut detach, mut by_hand) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..TURNS {
            h1.prepare(EACH)?;
            ports.prepare(present + EACH)?;
            let all: Vec<&Host<'_>> = [&*h1].into_iter().chain(others.iter().copied()).collect();
            settle(lab, &all)?;
            for _ in 0..EACH {
                attach.push(milliseconds(h1.attach()?.2));
                by_hand.push(milliseconds(ports.add()?));
            }
            for _ in 0..EACH {
                detach.push(milliseconds(h1.detach()?));
                ports.remove()?;
            }
        }
        let [attach_ms, detach_ms, by_hand_ms] = [attach, detach, by_hand].map(Samples::of);
        let row = Raw { present, attach_ms, detach_ms, by_hand_ms };
        println!("  {present:>5} endpoints: attach ms: {}", row.attach_ms);
        println!("  {:>5}            detach ms: {}", "", row.detach_ms);
        println!("  {:>5}    a port by hand ms: {}", "", row.by_hand_ms);
        raw.push(row);
    }
    report.keep("scale", &raw)?;
    let (Some(first), Some(last)) = (raw.first(), raw.last()) else { return Ok(()) };
    let ratio = |of: &dyn Fn(&Raw) -> f64| of(last) / of(first);
    let told = |of: &dyn Fn(&Raw) -> f64| {
        format!(
            "{:.2} ({:.1} ms at {}, {:.1} ms at {})",
            ratio(of),
            of(first),
            first.present,
            of(last),
            last.present
        )
    };
    let attach = |row: &Raw| row.attach_ms.median();
    let by_hand = |row: &Raw| row.by_hand_ms.median();
    report.judged("attach at 1,000 endpoints, of that at 1", told(&attach), "<= 1.5", ratio(&attach) <= 1.5);
    report.told("a port added by hand to one bridge, the same", told(&by_hand));
    Ok(())
}
