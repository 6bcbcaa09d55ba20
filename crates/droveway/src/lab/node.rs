//! One node: the process that makes its namespaces and plugs it in, and its pid 1.

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::net::IpAddr;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use nix::unistd::{dup2_stdout, sethostname};

use super::process::{hold_sigchld, ip, ourselves, put_down, reap_forever, spawn_as_pid_1};
use super::supervisor::{die_with_parent, own_surroundings, say, spec};
use super::{Kind, LabSpec, Node, mounts, nat};

/// The bridge that all nodes are on but those behind a NAT box.
pub(super) const UNDERLAY_BRIDGE: &str = "ul0";
/// The inner process has its network namespace.
const UNPLUGGED: &str = "unplugged";
/// The outer process has put `eth0` into it.
const PLUGGED: &str = "plugged";
/// The node is there.
const READY: &str = "ready";

/// The process that stays outside, in the lab: says the number that pid 1 of the node has there.
pub(super) fn outer(dir: &Path, node: &str) -> Result<()> {
    let spec = spec(dir)?;
    let mut command = ourselves();
    command.args(["lab-node", "--inner"]).arg(dir).arg(node);
    let mut child = spawn_as_pid_1(command.stdin(Stdio::piped()).stdout(Stdio::piped()))?;
    // Both pipes stay open as long as the child lives: it takes the end of the one as ours.
    let (Some(mut to), Some(from)) = (child.stdin.take(), child.stdout.take()) else {
        bail!("{node}: the pipes to pid 1 are not there");
    };
    let mut from = BufReader::new(from);
    let pid = child.id();
    let planned = spec.node(node)?;
    let mut bring_up = || -> Result<()> {
        expect(&mut from, UNPLUGGED)?;
        plug(&spec, &planned, pid)?;
        writeln!(to, "{PLUGGED}")?;
        expect(&mut from, READY)
    };
    if let Err(error) = bring_up() {
        put_down(&mut child);
        return Err(error.context(format!("{node} does not start")));
    }
    say(&pid.to_string())?;
    dup2_stdout(io::stderr())?;
    // Its end, however it comes, is the node's.
    child.wait()?;
    Ok(())
}

/// A cable between a bridge of the underlay and a node.
struct Cable {
    /// Its end at the bridge.
    port: String,
    bridge: String,
    /// Its end at the node.
    device: &'static str,
    address: IpAddr,
}

/// The cables of a node: one, and a second where it is a NAT box.
fn cables(spec: &LabSpec, node: &Node) -> Vec<Cable> {
    let Node { name, kind, address, behind } = node;
    let bridge = behind.map_or_else(|| UNDERLAY_BRIDGE.to_owned(), nat::bridge);
    let mut cables = vec![Cable { port: port(name), bridge, device: "eth0", address: *address }];
    let inside = spec.nats.iter().enumerate().filter(|(i, _)| *kind == Kind::Nat && nat::name(*i) == *name);
    cables.extend(inside.map(|(i, nat)| Cable {
        port: format!("ln-{name}"),
        bridge: nat::bridge(i),
        device: "lan0",
        address: nat.gateway(),
    }));
    cables
}

/// Lays the node's cables.
fn plug(spec: &LabSpec, node: &Node, pid: u32) -> Result<()> {
    let mtu = spec.mtu;
    for Cable { port, bridge, device, address } in cables(spec, node) {
        // What is left of a node that was powered off a moment ago: the kernel takes its time.
        let _ = ip(&format!("link del {port}\n"));
        let [c, d] = match address {
            IpAddr::V4(address) => [address.octets()[2], address.octets()[3]],
            IpAddr::V6(address) => [address.octets()[14], address.octets()[15]],
        };
        ip(&format!(
            "link add {port} mtu {mtu} type veth peer name {device} mtu {mtu} address 02:00:0a:00:{c:02x}:{d:02x} netns {pid}\n\
             link set {port} master {bridge} up\n"
        ))?;
    }
    Ok(())
}

/// The bridge's end of a node's `eth0`.
pub(super) fn port(node: &str) -> String {
    format!("ul-{node}")
}

/// Pid 1 of the node.
pub(super) fn inner(dir: &Path, node: &str) -> Result<()> {
    die_with_parent()?;
    let spec = spec(dir)?;
    let sigchld = hold_sigchld()?;
    own_surroundings()?;
    say(UNPLUGGED)?;
    sethostname(node)?;
    mounts::shared()?;
    mounts::fresh_proc()?;
    mounts::fresh_run(&[dir, &spec.program])?;
    mounts::fresh_sys();
    mounts::replace_file("/etc/resolv.conf", "resolv.conf", &spec.resolv_conf())?;
    mounts::replace_file("/etc/hosts", "hosts", &spec.hosts_file())?;
    expect(&mut io::stdin().lock(), PLUGGED)?;
    let node = spec.node(node)?;
    for Cable { device, address, .. } in cables(&spec, &node) {
        ip(&format!("{}link set {device} up\n", spec.add_address(address, device)))?;
    }
    let gateway = node.behind.map_or(spec.gateway(), |nat| spec.nats[nat].gateway());
    ip(&format!("link set lo up\nroute add default via {gateway}\n"))?;
    if node.kind == Kind::Nat {
        fs::write("/proc/sys/net/ipv4/ip_forward", "1").context("cannot make the NAT box forward")?;
    }
    say(READY)?;
    dup2_stdout(io::stderr())?;
    reap_forever(&sigchld)
}

fn expect(from: &mut impl BufRead, word: &str) -> Result<()> {
    let mut line = String::new();
    from.read_line(&mut line)?;
    anyhow::ensure!(line.trim_end() == word, "the other side ended before it said {word:?}");
    Ok(())
}
