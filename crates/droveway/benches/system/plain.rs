//! Phase `peers`: the packet path beside other implementations, all in the same plain layout: two hosts, a cable, and no
//! containers, bridges or routers. What is asked of us is that we are many times as fast as what runs in user space.

use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;

use agent::dataplane::Tuning;
use anyhow::{Context, Result};
use esp::Suite;
use nix::mount::{MsFlags, mount};

use crate::Size;
use crate::figures::Report;
use crate::layout;
use crate::measure::{MEASURES, Measure};
use crate::peers::{KNOWN, Peer};
use crate::rig::{self, Pair};
use crate::sandbox;
use crate::turns::{self, OURS, Row, Target, VXLAN};

/// One TCP stream 8, 12 and 80 times as fast, hoped for 12, 18 and 120 times; four times the small datagrams, hoped for six.
const TARGETS: [Target; 4] = [
    Target { measure: "one TCP stream", of: Some("gotatun"), must: 8.0, aim: 12.0 },
    Target { measure: "one TCP stream", of: Some("wireguard-go"), must: 12.0, aim: 18.0 },
    Target { measure: "one TCP stream", of: Some("strongSwan libipsec"), must: 80.0, aim: 120.0 },
    Target { measure: "UDP of 64 bytes", of: Some("gotatun"), must: 4.0, aim: 6.0 },
];

/// Takes the measures; in a short run those that have targets.
pub fn measure(tools: &Path, size: &Size, report: &mut Report) -> Result<()> {
    let (tools, rounds, seconds) = (tools.to_owned(), size.rounds, size.seconds);
    let wanted = |it: &&Measure| !size.short || TARGETS.iter().any(|target| target.measure == it.name);
    let measures: Vec<&'static Measure> = MEASURES.iter().filter(wanted).collect();
    let (done, rows) = channel();
    sandbox::run("peers", move |dir| {
        // The receiver waits.
        let _ = done.send(take(dir, tools, &measures, rounds, seconds));
    });
    let rows = rows.recv().context("the measurement panicked")?.map_err(anyhow::Error::msg)?;
    let title = "Between two hosts over one cable, without containers";
    turns::tell("peers", title, &rows, &TARGETS, report)
}

fn take(
    dir: &Path,
    tools: PathBuf,
    measures: &[&'static Measure],
    rounds: u32,
    seconds: u32,
) -> Result<Vec<Row>, String> {
    // Their sockets are in a `/run` of our own.
    let none = None::<&str>;
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), none).map_err(|error| error.to_string())?;
    let ours = pair(&dir.join("aes256"), Suite::Aes256Gcm16)?;
    let shorter = pair(&dir.join("aes128"), Suite::Aes128Gcm16)?;
    layout::vxlan(&ours, &dir.join("aes256"));
    let peers: Vec<Peer> = KNOWN
        .iter()
        .filter_map(|known| {
            let started = known.start(&dir.join(known.name.replace(' ', "-")), &tools);
            started.inspect_err(|why| eprintln!("bench: {} is left out: {why}", known.name)).ok()
        })
        .collect();
    let mut ways = vec![
        (OURS.to_owned(), layout::by_path(&ours)),
        (format!("{OURS}, AES-128"), layout::by_path(&shorter)),
        (VXLAN.to_owned(), layout::by_vxlan(&ours)),
    ];
    for peer in &peers {
        ways.push((peer.name.to_owned(), peer.ends()?));
    }
    Ok(turns::take(&ways, measures.iter().copied(), rounds, seconds))
}

/// Two hosts with the packet path of the agent between them.
fn pair(dir: &Path, suite: Suite) -> Result<Pair, String> {
    std::fs::create_dir(dir).map_err(|error| error.to_string())?;
    let settings = Tuning::default();
    let mut pair = rig::strangers_tuned(dir, [&settings, &settings]);
    for host in [&mut pair.a, &mut pair.b] {
        host.suite = suite;
        // As the agent makes its devices.
        host.sh("ip link set tun0 txqueuelen 32");
    }
    pair.connect();
    Ok(pair)
}
