//! Room for routers in the host's iptables.
//!
//! Docker gives the chain `FORWARD` the policy `DROP`, which would drop what routers send and get. Where that is so,
//! two rules let their devices through. The chains of our own nft table stand beside that chain and still judge.

use std::io;
use std::process::{Command, Output};

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
    for side in ["-i", "-o"] {
        let rule = rule(chain, side, devices);
        let there = run(&with("-C", &rule))?.is_some_and(|output| output.status.success());
        if there {
            continue;
        }
        match run(&with("-I", &rule))? {
            Some(output) if !output.status.success() => return Err(failed("add a rule to", &output)),
            Some(_) | None => {}
        }
    }
    Ok(Forwarding::Accepted(chain))
}

/// Takes the rules away again; not being there is fine.
pub fn remove(devices: &str) -> Result<(), Error> {
    /// So many times one rule may have been added by hand before somebody has to look.
    const COPIES: usize = 16;
    for chain in CHAINS {
        for side in ["-i", "-o"] {
            let rule = rule(chain, side, devices);
            for _ in 0..COPIES {
                match run(&with("-D", &rule))? {
                    Some(output) if output.status.success() => {}
                    Some(_) => break,
                    None => return Ok(()),
                }
            }
        }
    }
    Ok(())
}

fn rule<'a>(chain: &'a str, side: &'a str, devices: &'a str) -> Vec<&'a str> {
    vec![chain, side, devices, "-m", "comment", "--comment", COMMENT, "-j", "ACCEPT"]
}

fn with<'a>(verb: &'a str, rule: &[&'a str]) -> Vec<&'a str> {
    [&[verb], rule].concat()
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
