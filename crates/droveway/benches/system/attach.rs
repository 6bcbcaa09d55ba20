//! Attaching: how long the agent takes, how soon another host reaches the container, and whether either grows with
//! the number of endpoints on the host.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use droveway::lab::Lab;
use serde::Serialize;

use crate::figures::{Report, Samples};
use crate::host::{Host, settle};
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

/// Attach with more and more endpoints on the host.
pub fn scale(
    lab: &Lab,
    h1: &mut Host<'_>,
    others: &[&Host<'_>],
    counts: &[usize],
    report: &mut Report,
) -> Result<()> {
    const TURNS: usize = 5;
    // A bridge takes 1,023 ports.
    const EACH: usize = 20;
    #[derive(Serialize)]
    struct Raw {
        present: usize,
        attach_ms: Samples,
        detach_ms: Samples,
    }
    let mut raw: Vec<Raw> = Vec::new();
    while h1.attached() > 1 {
        h1.detach()?;
    }
    for &present in counts {
        h1.fill(present)?;
        let (mut attach, mut detach) = (Vec::new(), Vec::new());
        for _ in 0..TURNS {
            h1.prepare(EACH)?;
            let all: Vec<&Host<'_>> = [&*h1].into_iter().chain(others.iter().copied()).collect();
            settle(lab, &all)?;
            for _ in 0..EACH {
                attach.push(milliseconds(h1.attach()?.2));
            }
            for _ in 0..EACH {
                detach.push(milliseconds(h1.detach()?));
            }
        }
        let row = Raw { present, attach_ms: Samples::of(attach), detach_ms: Samples::of(detach) };
        println!("  {present:>5} endpoints: attach ms: {}", row.attach_ms);
        println!("  {:>5}            detach ms: {}", "", row.detach_ms);
        raw.push(row);
    }
    report.keep("scale", &raw)?;
    let (Some(first), Some(last)) = (raw.first(), raw.last()) else { return Ok(()) };
    let ratio = last.attach_ms.median() / first.attach_ms.median();
    let figure = format!(
        "{ratio:.2} ({:.1} ms at {}, {:.1} ms at {})",
        first.attach_ms.median(),
        first.present,
        last.attach_ms.median(),
        last.present
    );
    report.judged("attach at 1,000 endpoints, of that at 1", figure, "<= 1.5", ratio <= 1.5);
    Ok(())
}
