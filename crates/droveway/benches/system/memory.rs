//! Resident memory of server and agents.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result};
use droveway::lab::{Daemon, Lab, SERVER};

use crate::figures::Report;

/// Reads what the daemons of that lab hold.
pub fn measure(lab: &Lab, report: &mut Report) -> Result<()> {
    let mut raw = BTreeMap::new();
    raw.insert(SERVER.to_owned(), resident(lab, SERVER, Daemon::Server)?);
    for host in lab.hosts() {
        let megabytes = resident(lab, &host, Daemon::Agent)?;
        raw.insert(host, megabytes);
    }
    report.keep("memory", &raw)?;
    for (name, megabytes) in &raw {
        println!("  {name}: {megabytes:.1} MB");
    }
    let server = raw.remove(SERVER).unwrap_or(f64::NAN);
    let agent = raw.into_values().fold(0.0, f64::max);
    report.judged("resident memory, largest agent", format!("{agent:.1} MB"), "<= 40 MB", agent <= 40.0);
    report.judged("resident memory, server", format!("{server:.1} MB"), "<= 60 MB", server <= 60.0);
    Ok(())
}

/// In MB of 1,000,000 bytes, shared pages of the program's file included.
fn resident(lab: &Lab, node: &str, daemon: Daemon) -> Result<f64> {
    let pid = lab.daemon_pid(node, daemon)?.with_context(|| format!("{daemon} of {node} does not run"))?;
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kibibytes = line.and_then(|rest| rest.split_ascii_whitespace().next()).context("no VmRSS")?;
    Ok(kibibytes.parse::<f64>()? * 1024.0 / 1e6)
}
