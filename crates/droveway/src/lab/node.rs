//! One node: the process that makes its namespaces and plugs it in, and its pid 1.

use std::io::{self, BufRead, BufReader, Write};
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context, Result, bail};
use nix::unistd::{dup2_stdout, sethostname};

use super::process::{hold_sigchld, ip, ourselves, put_down, reap_forever, spawn_as_pid_1};
use super::supervisor::{die_with_parent, own_surroundings, say, spec};
use super::{LabSpec, mounts};

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
    let mut bring_up = || -> Result<()> {
        expect(&mut from, UNPLUGGED)?;
        plug(&spec, node, pid)?;
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

/// A cable from the underlay bridge to the node.
fn plug(spec: &LabSpec, node: &str, pid: u32) -> Result<()> {
    let (mtu, port) = (spec.mtu, port(node));
    // What is left of a node that was powered off a moment ago: the kernel takes its time.
    let _ = ip(&format!("link del {port}\n"));
    let [_, _, c, d] = address_of(spec, node)?.octets();
    ip(&format!(
        "link add {port} mtu {mtu} type veth peer name eth0 mtu {mtu} address 02:00:0a:00:{c:02x}:{d:02x} netns {pid}\n\
         link set {port} master ul0 up\n"
    ))
}

fn port(node: &str) -> String {
    format!("ul-{node}")
}

fn address_of(spec: &LabSpec, node: &str) -> Result<std::net::Ipv4Addr> {
    let found = spec.nodes().find(|(name, _)| name == node);
    found.map(|(_, address)| address).with_context(|| format!("the lab has no node {node}"))
}

/// Pid 1 of the node.
pub(super) fn inner(dir: &Path, node: &str) -> Result<()> {
    die_with_parent()?;
    let spec = spec(dir)?;
    let sigchld = hold_sigchld()?;
    own_surroundings()?;
    say(UNPLUGGED)?;
    sethostname(node)?;
    mounts::private(true)?;
    mounts::fresh_proc()?;
    mounts::fresh_run(&[dir, &spec.program])?;
    mounts::fresh_sys();
    mounts::replace_file("/etc/resolv.conf", "resolv.conf", &spec.resolv_conf())?;
    mounts::replace_file("/etc/hosts", "hosts", &spec.hosts_file())?;
    expect(&mut io::stdin().lock(), PLUGGED)?;
    let address = spec.on_link(address_of(&spec, node)?);
    ip(&format!(
        "link set lo up\naddr add {address} dev eth0\nlink set eth0 up\nroute add default via {}\n",
        spec.gateway()
    ))?;
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
