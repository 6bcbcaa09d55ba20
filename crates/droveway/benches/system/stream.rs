//! Phase `stream`: from container to container on another host, by an encrypted network of Droveway and by a kernel VXLAN made
//! by hand; one stream by a network in clear too.
//!
//! The one made by hand has the same layout and MTU, but no guard, no filter, and no Droveway on its hosts:
//!
//! ```text
//! netns c: eth0 ── veth ── p0 ─ br0   netns r   vxlan0 ─ ─ ─ underlay of the host
//! ```
//! It lives in a lab of its own, so that no table of ours is on its way. All use cubic: a congestion control that paces would
//! measure its timers.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use droveway::lab::{Daemon, Lab, LabSpec};
use linux::netns::Netns;
use model::agent_api::Attached;

use crate::Size;
use crate::figures::{Bar, Report};
use crate::host::{Host, batch};
use crate::measure::{Ends, MEASURES, Measure};
use crate::turns::{self, OURS, Row, Target, VXLAN};

const CLEAR: &str = "Droveway, in clear";
const JUMBO: &str = "stream at 9000 underlay";

/// Of a kernel VXLAN in the same layout: half the speed in clear at least, twice the small datagrams, two and a half times the
/// processor time at most.
const TARGETS: [Target; 8] = [
    Target { measure: "one TCP stream", of: Some(VXLAN), must: 0.5, aim: 0.7 },
    Target { measure: "four TCP streams", of: Some(VXLAN), must: 0.5, aim: 0.8 },
    Target { measure: "both directions", of: Some(VXLAN), must: 0.5, aim: 0.8 },
    Target { measure: "UDP of 64 bytes", of: Some(VXLAN), must: 2.0, aim: 3.0 },
    Target { measure: "request and response", of: Some(VXLAN), must: 1.6, aim: 1.1 },
    Target { measure: "ping under full load", of: None, must: 1.0, aim: 0.3 },
    Target { measure: "CPU of a stream", of: Some(VXLAN), must: 2.5, aim: 2.0 },
    Target { measure: JUMBO, of: Some(VXLAN), must: 0.5, aim: 0.7 },
];

/// From where to where a way goes.
pub struct Way {
    from: Netns,
    to: Netns,
    address: String,
    daemons: Vec<u32>,
}

/// Takes the measures. `lab` has two hosts at least; `another` gives what further labs shall be.
pub fn measure(
    lab: &Lab,
    another: &dyn Fn(&str) -> Result<LabSpec>,
    size: &Size,
    report: &mut Report,
) -> Result<()> {
    let (mut h1, mut h2) = (Host::new(lab, "h1")?, Host::new(lab, "h2")?);
    let words = ["droveway", "network", "create", "clear", "--subnet", "10.43.0.0/16", "--driver", "vxlan"];
    lab.check("server", &words)?;
    let (encrypted, _) = ours(lab, &mut h1, &mut h2, "managed")?;
    let (clear, mtu) = ours(lab, &mut h1, &mut h2, "clear")?;
    let bare = Lab::up(LabSpec { bare: true, hosts: 2, ..another("x")? })?;
    let theirs = by_hand(&bare, mtu)?;
    let ways = [(OURS, &encrypted), (VXLAN, &theirs), (CLEAR, &clear)];
    let ways = ways.map(|(name, way)| Ok((name.to_owned(), way.ends()?)));
    let mut ways = ways.into_iter().collect::<Result<Vec<_>>>()?;
    let (first, others) = MEASURES.split_first().context("there are no measures")?;
    let mut rows = turns::take(&ways, [first], size.rounds, size.seconds);
    ways.truncate(2);
    let others = others.iter().filter(|it| it.name != JUMBO);
    rows.extend(turns::take(&ways, others, size.rounds, size.seconds));
    drop(ways);
    bare.down()?;
    for _ in 0..2 {
        h1.detach()?;
        h2.detach()?;
    }
    if !size.short {
        rows.extend(jumbo(another, first, size)?);
    }
    if let Some(ratio) = rows.first().and_then(|row| row.ratio(CLEAR, VXLAN)) {
        let figure =
            format!("{:.3} ({:.2} to {:.2})", ratio.median(), ratio.quantile(0.25), ratio.quantile(0.75));
        let bar = Bar { must: 0.95, aim: 0.95, more: true };
        report.barred("stream: one TCP stream in clear × kernel VXLAN", figure, ratio.median(), bar);
    }
    let targets = if size.short { &TARGETS[..7] } else { &TARGETS };
    turns::tell("stream", "Container to container, by routers on two hosts", &rows, targets, report)
}

/// One stream on an underlay of 9,000 bytes: labs that have it from the beginning.
fn jumbo(another: &dyn Fn(&str) -> Result<LabSpec>, stream: &Measure, size: &Size) -> Result<Vec<Row>> {
    let lab = Lab::up(LabSpec { mtu: 9000, hosts: 2, ..another("j")? })?;
    let bare = Lab::up(LabSpec { mtu: 9000, hosts: 2, bare: true, ..another("k")? })?;
    let (mut h1, mut h2) = (Host::new(&lab, "h1")?, Host::new(&lab, "h2")?);
    let (encrypted, mtu) = ours(&lab, &mut h1, &mut h2, "managed")?;
    let theirs = by_hand(&bare, mtu)?;
    let ways = [(OURS.to_owned(), encrypted.ends()?), (VXLAN.to_owned(), theirs.ends()?)];
    let stream = Measure { name: JUMBO, ..*stream };
    let rows = turns::take(&ways, [&stream], size.rounds, size.seconds);
    drop(ways);
    bare.down()?;
    lab.down()?;
    Ok(rows)
}

/// A container on each host, in one of our networks, and the inner MTU.
pub fn ours<'a>(lab: &'a Lab, one: &mut Host<'a>, other: &mut Host<'a>, network: &str) -> Result<(Way, u32)> {
    let (from, attached, _) = soon(one, network)?;
    let (to, target, _) = soon(other, network)?;
    let address = target.endpoint.addresses.first().context("no address")?.to_string();
    let agent = |host| lab.daemon_pid(host, Daemon::Agent)?.with_context(|| format!("{host} has no agent"));
    let daemons = vec![agent(one.name())?, agent(other.name())?];
    let (from, to) = (netns(lab, one.name(), &from)?, netns(lab, other.name(), &to)?);
    Ok((Way { from, to, address, daemons }, attached.mtu))
}

fn by_hand(bare: &Lab, mtu: u32) -> Result<Way> {
    make_by_hand(bare, mtu)?;
    let (from, to) = (netns(bare, "h1", "c")?, netns(bare, "h2", "c")?);
    Ok(Way { from, to, address: "10.99.6.2".to_owned(), daemons: Vec::new() })
}

/// A namespace that is bound below `/run/netns` of that host.
fn netns(lab: &Lab, host: &str, name: &str) -> Result<Netns> {
    let path = format!("/proc/{}/root/run/netns/{name}", lab.pid_of(host)?);
    Ok(Netns::open(&PathBuf::from(path))?)
}

/// Attaches to a network that the host may not have heard of yet.
pub fn soon(host: &mut Host<'_>, network: &str) -> Result<(String, Attached, Duration)> {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        match host.attach_to(network) {
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => {}
            attached => return attached,
        }
    }
}

impl Way {
    /// Once it carries something.
    pub fn ends(&self) -> Result<Ends<'_>> {
        let deadline = Instant::now() + Duration::from_secs(10);
        let ping =
            || std::process::Command::new("ping").args(["-n", "-c", "1", "-W", "1", &self.address]).output();
        while !self.from.run(ping)??.status.success() {
            ensure!(Instant::now() < deadline, "{} does not answer", self.address);
        }
        let ends = Ends::new(&self.from, &self.to, &self.address).map_err(anyhow::Error::msg)?;
        Ok(ends.with_daemons(self.daemons.clone()))
    }
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
