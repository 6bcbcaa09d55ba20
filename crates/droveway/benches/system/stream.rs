//! One TCP stream from container to container on another host: an encrypted network of Droveway, and one in clear, each
//! against a kernel VXLAN made by hand.
//!
//! The one made by hand has the same layout and MTU, but no guard, no filter, and no Droveway on its hosts:
//!
//! ```text
//! netns c: eth0 ── veth ── p0 ─ br0   netns r   vxlan0 ─ ─ ─ underlay of the host
//! ```
//! It lives in a lab of its own, so that no table of ours is on its way. The three take turns, and change who begins:
//! whatever else the machine does hits all. All use cubic: a congestion control that paces would measure its
//! timers.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use droveway::lab::{Lab, LabSpec};
use model::agent_api::Attached;
use serde::Serialize;

use crate::figures::{Report, Samples};
use crate::host::{Host, batch};

const CLEAR: &str = "VXLAN stream, of one made by hand";
const ENCRYPTED: &str = "encrypted stream, of a VXLAN made by hand";

/// From where to where a stream runs.
struct Way<'a> {
    lab: &'a Lab,
    from: String,
    to: String,
    address: String,
}

/// What one stream did.
#[derive(Debug, Serialize)]
struct Stream {
    gbit_per_second: f64,
    retransmits: u64,
}

#[derive(Debug, Serialize)]
struct Raw {
    seconds_each: u32,
    encrypted: Vec<Stream>,
    clear: Vec<Stream>,
    by_hand: Vec<Stream>,
}

/// Takes the measure.
pub fn measure(lab: &Lab, by_hand: LabSpec, rounds: u32, seconds: u32, report: &mut Report) -> Result<()> {
    let (mut h1, mut h2) = (Host::new(lab, "h1")?, Host::new(lab, "h2")?);
    let words = ["droveway", "network", "create", "clear", "--subnet", "10.43.0.0/16", "--driver", "vxlan"];
    lab.check("server", &words)?;
    let (encrypted, _) = ours(lab, &mut h1, &mut h2, "managed")?;
    let (clear, mtu) = ours(lab, &mut h1, &mut h2, "clear")?;
    let bare = Lab::up(LabSpec { bare: true, hosts: 2, ..by_hand })?;
    make_by_hand(&bare, mtu)?;
    let theirs =
        Way { lab: &bare, from: "c".to_owned(), to: "c".to_owned(), address: "10.99.6.2".to_owned() };
    let ways = [&encrypted, &clear, &theirs];
    for way in ways {
        way.until_it_answers()?;
    }

    let mut streams = [Vec::new(), Vec::new(), Vec::new()];
    for round in 0..rounds as usize {
        for turn in 0..ways.len() {
            let who = (round + turn) % ways.len();
            streams[who].push(ways[who].stream(seconds)?);
        }
        let [encrypted, clear, by_hand] = streams.each_ref().map(|all| all[round].gbit_per_second);
        println!(
            "  round {}: encrypted {encrypted:.2} Gbit/s, clear {clear:.2} Gbit/s, by hand {by_hand:.2} Gbit/s",
            round + 1
        );
    }
    bare.down()?;
    for _ in 0..2 {
        h1.detach()?;
        h2.detach()?;
    }

    let [encrypted, clear, by_hand] = streams;
    let raw = Raw { seconds_each: seconds, encrypted, clear, by_hand };
    report.keep("stream", &raw)?;
    let samples = |streams: &[Stream]| Samples::of(streams.iter().map(|s| s.gbit_per_second).collect());
    let theirs = samples(&raw.by_hand);
    println!("  by hand   Gbit/s: {theirs}");
    let measures = [(CLEAR, &raw.clear, ">= 0.95", 0.95), (ENCRYPTED, &raw.encrypted, ">= 0.5", 0.5)];
    for (measure, streams, target, least) in measures {
        let own = samples(streams);
        // Of each round, as the machine's other work changes from round to round.
        let pairs = streams.iter().zip(&raw.by_hand).map(|(a, b)| a.gbit_per_second / b.gbit_per_second);
        let ratios = Samples::of(pairs.collect());
        println!("  {measure}: {own} Gbit/s, ratio of each round {ratios}");
        let ratio = ratios.median();
        let figure = format!("{ratio:.3} (medians {:.2}, {:.2} Gbit/s)", own.median(), theirs.median());
        report.judged(measure, figure, target, ratio >= least);
    }
    Ok(())
}

/// A container on each host, in one of our networks, and the inner MTU.
fn ours<'a>(lab: &'a Lab, h1: &mut Host<'a>, h2: &mut Host<'a>, network: &str) -> Result<(Way<'a>, u32)> {
    let (from, attached, _) = soon(h1, network)?;
    let (to, target, _) = soon(h2, network)?;
    let address = target.endpoint.addresses.first().context("no address")?.to_string();
    Ok((Way { lab, from, to, address }, attached.mtu))
}

/// Attaches to a network that the host may not have heard of yet.
fn soon(host: &mut Host<'_>, network: &str) -> Result<(String, Attached, Duration)> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match host.attach_to(network) {
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => {}
            attached => return attached,
        }
    }
}

impl Way<'_> {
    /// A command in the namespace of that end.
    fn inside(&self, host: &str, netns: &str, words: &[&str]) -> Result<Command> {
        self.lab.command(host, &[&["ip", "netns", "exec", netns], words].concat())
    }

    /// Waits until there is a way, and takes pacing away on it: a socket made where the default algorithm paces (bbr) goes
    /// on doing so, whatever algorithm it is told to use.
    fn until_it_answers(&self) -> Result<()> {
        for (host, netns) in [("h1", &self.from), ("h2", &self.to)] {
            let unpaced = ["sysctl", "-qw", "net.ipv4.tcp_congestion_control=reno"];
            let output = self.inside(host, netns, &unpaced)?.output()?;
            ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
        let ping = ["ping", "-c", "1", "-W", "1", self.address.as_str()];
        let deadline = Instant::now() + Duration::from_secs(10);
        while !self.inside("h1", &self.from, &ping)?.output()?.status.success() {
            ensure!(Instant::now() < deadline, "{} does not answer from {}", self.address, self.from);
        }
        Ok(())
    }

    fn stream(&self, seconds: u32) -> Result<Stream> {
        let mut server = self.inside("h2", &self.to, &["iperf3", "-s", "-1", "-J", "--forceflush"])?;
        let mut server = server.stdout(std::process::Stdio::null()).spawn()?;
        let outcome = self.client(seconds);
        if outcome.is_err() {
            // It serves one client only: without one it would wait for ever.
            server.kill()?;
        }
        server.wait()?;
        outcome
    }

    fn client(&self, seconds: u32) -> Result<Stream> {
        let (time, limit) = (seconds.to_string(), (seconds + 20).to_string());
        let words = ["timeout", &limit, "iperf3", "-c", &self.address, "-t", &time, "-C", "cubic", "-J"];
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let output = self.inside("h1", &self.from, &words)?.output()?;
            let said = String::from_utf8_lossy(&output.stdout);
            if output.status.success() && !said.contains("\"error\"") {
                return parse(&output.stdout);
            }
            // The server begins to listen some time after it was started.
            if !said.contains("Connection refused") || Instant::now() > deadline {
                bail!("iperf3 failed: {said}{}", String::from_utf8_lossy(&output.stderr));
            }
        }
    }
}

fn parse(json: &[u8]) -> Result<Stream> {
    let json: serde_json::Value = serde_json::from_slice(json)?;
    let end = &json["end"];
    let rate = end["sum_received"]["bits_per_second"].as_f64().context("iperf3 gave no rate")?;
    let retransmits = end["sum_sent"]["retransmits"].as_u64().unwrap_or_default();
    Ok(Stream { gbit_per_second: rate / 1e9, retransmits })
}

/// Host `h1` is .5 on the underlay and has 10.99.5.0/26 inside, `h2` is .6.
fn make_by_hand(lab: &Lab, mtu: u32) -> Result<()> {
    for (host, own, other) in [("h1", 5, 6), ("h2", 6, 5)] {
        let script = format!(
            "netns add r\n\
             netns add c\n\
             link add vxlan0 netns r address 02:00:00:00:99:0{own} mtu {mtu} type vxlan id 99 dstport 4789 \
                 local 10.0.0.{own} nolearning\n\
             link add p0 netns r mtu {mtu} type veth peer name eth0 mtu {mtu} netns c\n"
        );
        batch(lab, host, &script.replace("  ", ""))?;
        let router = format!(
            "link set lo up\n\
             link add br0 address 02:00:00:00:99:99 type bridge forward_delay 0 stp_state 0 mcast_snooping 0\n\
             link set br0 mtu {mtu} up\n\
             link set p0 master br0 up\n\
             link set vxlan0 up\n\
             addr add 10.99.{own}.1/16 dev br0 noprefixroute\n\
             addr add 10.99.0.1/32 dev br0\n\
             route add unreachable 10.99.0.0/16\n\
             route add 10.99.{own}.0/26 dev br0 src 10.99.{own}.1\n\
             neigh add 10.99.{other}.1 lladdr 02:00:00:00:99:0{other} dev vxlan0 nud permanent\n\
             route add 10.99.{other}.0/26 via 10.99.{other}.1 dev vxlan0 onlink src 10.99.{own}.1\n"
        );
        let container = format!(
            "link set lo up\n\
             addr add 10.99.{own}.2/16 dev eth0\n\
             link set eth0 up\n\
             route add default via 10.99.0.1\n"
        );
        let fdb =
            format!("bridge fdb append 02:00:00:00:99:0{other} dev vxlan0 dst 10.0.0.{other} self permanent");
        let all = format!(
            "set -e\n\
             ip -n r -batch - <<EOF\n{router}EOF\n\
             ip -n c -batch - <<EOF\n{container}EOF\n\
             ip netns exec r {fdb}\n\
             ip netns exec r sh -ec 'cd /proc/sys/net/ipv4; echo 1 >ip_forward; echo 0 >conf/all/rp_filter; \
                 echo 0 >conf/all/send_redirects; echo 0 >conf/br0/send_redirects; \
                 echo 1 >conf/br0/proxy_arp; echo 0 >neigh/br0/proxy_delay; \
                 for f in ../bridge/bridge-nf-call-*; do [ ! -e $f ] || echo 0 >$f; done'\n"
        );
        lab.check(host, &["sh", "-c", &all])?;
    }
    Ok(())
}
