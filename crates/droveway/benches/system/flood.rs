//! Phase `flood`: ten thousand bogus `IKE_SA_INIT` a second, from addresses all over a /16 where nobody answers. Tunnels still
//! come up, also one that the peer alone can begin, being behind a NAT; and a stream loses no more than by the same flood at a
//! port where nobody listens, and five percent.

#![expect(clippy::cast_precision_loss, reason = "figures for people: counts far below 2^52")]

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use droveway::lab::{Lab, LabSpec, boxes};
use linux::netns::Netns;
use model::agent_api::{TunnelState, TunnelStatus, path};
use serde::Serialize;

use crate::Size;
use crate::bogus;
use crate::figures::{Bar, Report, Samples};
use crate::host::Host;
use crate::measure::MEASURES;
use crate::stream;
use crate::turns::{Cell, Row};

/// Requests a second.
const RATE: u32 = 10_000;
const H1: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 5);
/// The node that floods, as the first of a lab's `others`.
const NODE: &str = "10.0.0.201";
/// Nobody listens there.
const CLOSED: u16 = 4600;
const NONE: &str = "no flood";
const AT_CLOSED: &str = "flood at a closed port";
const AT_IKE: &str = "flood at IKE";
/// How long a tunnel may take to come up.
const LIMIT: Duration = Duration::from_secs(60);

/// A flood at `h1`, until it is dropped.
struct Flood {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<u64>>,
    begun: Instant,
}

impl Flood {
    fn start(node: &Netns, port: u16) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let (told, to) = (Arc::clone(&stop), SocketAddr::from((H1, port)));
        // A thread that is made in a namespace stays there.
        let spawn = || std::thread::spawn(move || bogus::flood(to, RATE, &told, || {}));
        Ok(Self { stop, thread: Some(node.run(spawn)?), begun: Instant::now() })
    }

    /// How many went each second.
    fn end(mut self) -> f64 {
        self.stop.store(true, Relaxed);
        let count = self.thread.take().and_then(|thread| thread.join().ok()).unwrap_or_default();
        count as f64 / self.begun.elapsed().as_secs_f64()
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
    }
}

#[derive(Debug, Default, Serialize)]
struct Raw {
    requests_per_second: Vec<f64>,
    /// Seconds until a tunnel that was reset was up again, by what flood there was and who reset it.
    handshakes: Vec<(String, Vec<f64>)>,
}

/// Takes the measures, in a lab of its own.
pub fn measure(spec: &dyn Fn(&str) -> Result<LabSpec>, size: &Size, report: &mut Report) -> Result<()> {
    let behind = boxes(vec!["h3".parse().map_err(anyhow::Error::msg)?]);
    let lab = Lab::up(LabSpec { hosts: 3, others: vec!["flood".parse()?], nats: behind, ..spec("f")? })?;
    lab.check("flood", &["ip", "route", "add", "local", bogus::SOURCES, "dev", "lo"])?;
    lab.check("h1", &["ip", "route", "add", bogus::SOURCES, "via", NODE])?;
    let node = Netns::open(Path::new(&format!("/proc/{}/ns/net", lab.pid_of("flood")?)))?;
    let (mut h1, mut h2, mut h3) = (Host::new(&lab, "h1")?, Host::new(&lab, "h2")?, Host::new(&lab, "h3")?);
    let (way, _) = stream::ours(&lab, &mut h1, &mut h2, "managed")?;
    let (natted, _) = stream::ours(&lab, &mut h3, &mut h1, "managed")?;
    drop(natted.ends()?);
    let ends = way.ends()?;
    let mut raw = Raw::default();
    let floods = [(NONE, None), (AT_CLOSED, Some(CLOSED)), (AT_IKE, Some(model::TUNNEL_PORT))];

    let stream = &MEASURES[0];
    let mut cells = floods.map(|(way, _)| Cell { way: way.to_owned(), figures: Vec::new(), why: None });
    for round in 0..size.rounds as usize {
        for turn in 0..floods.len() {
            let who = (round + turn) % floods.len();
            let flood = floods[who].1.map(|port| Flood::start(&node, port)).transpose()?;
            match (stream.run)(&ends, size.seconds) {
                Ok(rate) => cells[who].figures.push(rate),
                Err(why) => cells[who].why = Some(why),
            }
            raw.requests_per_second.extend(flood.map(Flood::end));
        }
    }
    let row = Row {
        measure: stream.name,
        unit: stream.unit,
        more_is_better: true,
        ways: cells.into_iter().collect(),
    };
    crate::turns::show(&row);

    for (name, port) in floods {
        let flood = port.map(|port| Flood::start(&node, port)).transpose()?;
        for (host, who) in [(&h2, "h2"), (&h3, "h3, behind a NAT")] {
            let times = (0..size.rounds).map(|_| handshake(host)).collect::<Result<Vec<_>>>()?;
            println!("  {name}, begun by {who}: up again after {} s", Samples::of(times.clone()));
            raw.handshakes.push((format!("{name}, begun by {who}"), times));
        }
        raw.requests_per_second.extend(flood.map(Flood::end));
    }
    drop(ends);
    lab.down()?;
    tell(&raw, &row, report)
}

fn tell(raw: &Raw, row: &Row, report: &mut Report) -> Result<()> {
    let rate = Samples::of(raw.requests_per_second.clone());
    report
        .told("flood: bogus requests a second", format!("{:.0} (at least {:.0})", rate.median(), rate.min()));
    if let Some(ratio) = row.ratio(AT_IKE, AT_CLOSED) {
        let figure =
            format!("{:.3} ({:.2} to {:.2})", ratio.median(), ratio.quantile(0.25), ratio.quantile(0.75));
        let bar = Bar { must: 0.95, aim: 0.95, more: true };
        report.barred("flood: a stream × one with a closed port flooded", figure, ratio.median(), bar);
    }
    for (what, times) in &raw.handshakes {
        let times = Samples::of(times.clone());
        let figure = format!("p50 {:.2} s, max {:.2} s", times.median(), times.max());
        if what.starts_with(AT_IKE) {
            let bar = Bar { must: 10.0, aim: 2.0, more: false };
            report.barred(format!("tunnel: {what}"), figure, times.max(), bar);
        } else {
            report.told(format!("tunnel: {what}"), figure);
        }
    }
    report.keep("flood", &serde_json::json!({ "machine": crate::machine(), "raw": raw, "rows": [row] }))
}

/// Makes the tunnel from a host to `h1` anew; seconds until there is another one that carries pings.
fn handshake(host: &Host<'_>) -> Result<f64> {
    let before = tunnel(host)?.ike.map(|ike| ike.initiator_spi);
    let begun = Instant::now();
    host.ask("POST", &path::TUNNEL_RESET.replace("{peer}", "h1"))?;
    while begun.elapsed() < LIMIT {
        let now = tunnel(host)?;
        let another = now.ike.map(|ike| ike.initiator_spi).is_some_and(|spi| Some(spi) != before);
        if another && matches!(now.state, TunnelState::Up { .. }) {
            return Ok(begun.elapsed().as_secs_f64());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    // Worse than any that came up.
    Ok(LIMIT.as_secs_f64())
}

fn tunnel(host: &Host<'_>) -> Result<TunnelStatus> {
    let all: Vec<TunnelStatus> = serde_json::from_slice(&host.ask("GET", path::TUNNELS)?)?;
    all.into_iter().find(|tunnel| tunnel.peer.as_str() == "h1").context("there is no tunnel to h1")
}
