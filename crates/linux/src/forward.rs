//! Room for routers in the host's iptables.
//!
//! Docker gives the chain `FORWARD` the policy `DROP`, which would drop what routers send and get. Where that is so,
//! rules let their devices through. The chains of our own nft table stand beside that chain and still judge.
//!
//! Invariant: who may reach the containers on Docker's own bridges, Docker alone decides. What comes from a router and goes to
//! such a bridge is handed back to Docker's rules before ours would let it through.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::process::{Command, Output, Stdio};

use crate::error::Error;

const COMMENT: &str = "droveway";
/// The chain that Docker keeps for others' rules, and the one it is called from.
const CHAINS: [&str; 2] = ["DOCKER-USER", "FORWARD"];

/// What was found and done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Forwarding {
    /// Nothing stands in the way: no iptables, or nothing there that drops.
    Open,
    /// The rules are in this chain.
    Accepted(&'static str),
}

/// Lets what is forwarded from and to devices of that prefix (`dw+`, as iptables writes it) through the host's
/// iptables, if these would drop it. Runs in the namespace of the calling thread; doing it again is fine.
pub fn ensure(devices: &str) -> Result<Forwarding, Error> {
    let Some(rules) = run(&["-S"])? else { return Ok(Forwarding::Open) };
    if !rules.status.success() {
        return Err(failed("list the rules of", &rules));
    }
    let rules = String::from_utf8_lossy(&rules.stdout).into_owned();
    let has_chain = |chain: &str| rules.lines().any(|line| line == format!("-N {chain}"));
    let drops = rules.lines().any(|line| line == "-P FORWARD DROP");
    let chain = match CHAINS {
        [docker, _] if has_chain(docker) => docker,
        [_, forward] if drops => forward,
        _ => return Ok(Forwarding::Open),
    };
    let before = ours(&rules, chain);
    let after = wanted(&rules, chain, devices);
    if before != after {
        replace(&before, &after)?;
    }
    Ok(Forwarding::Accepted(chain))
}

/// Takes the rules away again; not being there is fine.
pub fn remove() -> Result<(), Error> {
    let Some(rules) = run(&["-S"])? else { return Ok(()) };
    let rules = String::from_utf8_lossy(&rules.stdout).into_owned();
    let there: Vec<String> = CHAINS.iter().flat_map(|chain| ours(&rules, chain)).collect();
    if there.is_empty() { Ok(()) } else { replace(&there, &[]) }
}

/// Our rules of a chain, as `iptables -S` tells them, in their order.
fn ours(rules: &str, chain: &str) -> Vec<String> {
    let begin = format!("-A {chain} ");
    let comment = format!(" --comment {COMMENT} ");
    rules.lines().filter(|l| l.starts_with(&begin) && l.contains(&comment)).map(str::to_owned).collect()
}

/// Our rules as they shall be, in the same words.
fn wanted(rules: &str, chain: &str, devices: &str) -> Vec<String> {
    let rule = |of: &str, verdict| format!("-A {chain} {of} -m comment --comment {COMMENT} -j {verdict}");
    let returned =
        bridges(rules).into_iter().map(|bridge| rule(&format!("-i {devices} -o {bridge}"), "RETURN"));
    let accepted = ["-i", "-o"].map(|side| rule(&format!("{side} {devices}"), "ACCEPT"));
    returned.chain(accepted).collect()
}

/// The bridges whose containers Docker's rules guard: what goes out by them is sent to the chain of published ports.
fn bridges(rules: &str) -> BTreeSet<&str> {
    let guarded = rules.lines().filter(|line| line.ends_with(" -j DOCKER"));
    guarded
        .filter_map(|line| {
            let mut words = line.split_ascii_whitespace().skip_while(|word| *word != "-o");
            words.nth(1)
        })
        .collect()
}

/// Takes the old rules away and puts the new ones on top, all at once.
fn replace(old: &[String], new: &[String]) -> Result<(), Error> {
    let mut script = String::from("*filter\n");
    for rule in old {
        let _ = writeln!(script, "-D{}", rule.trim_start_matches("-A"));
    }
    for rule in new.iter().rev() {
        let _ = writeln!(script, "-I{}", rule.trim_start_matches("-A"));
    }
    script.push_str("COMMIT\n");
    let mut child = Command::new("iptables-restore")
        .args(["-w", "--noflush"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| Error::io("run iptables-restore", &error))?;
    // One that stops reading says why on its standard error.
    let _ = child.stdin.take().map(|mut stdin| stdin.write_all(script.as_bytes()));
    let output = child.wait_with_output().map_err(|error| Error::io("run iptables-restore", &error))?;
    if output.status.success() { Ok(()) } else { Err(failed("set our rules in", &output)) }
}

/// Runs iptables, waiting for its lock; `None` if it is not installed.
fn run(arguments: &[&str]) -> Result<Option<Output>, Error> {
    match Command::new("iptables").arg("-w").args(arguments).output() {
        Ok(output) => Ok(Some(output)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io("run iptables", &error)),
    }
}

fn failed(what: &str, output: &Output) -> Error {
    let said = String::from_utf8_lossy(&output.stderr);
    Error::words(format!("{what} the host's iptables"), said.lines().next().unwrap_or("it failed").trim())
}
