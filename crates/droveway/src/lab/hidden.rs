//! Verbs by which the lab starts itself in other namespaces. People do not type them; `--help` does not show them.
//!
//! Invariant: [`main`] is called while the process has one thread: the kernel moves no process with several.

use std::os::fd::RawFd;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Subcommand;
use nix::sys::signal::SigSet;

use super::{capture, enter, node, shim, supervisor};

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Hidden {
    /// The lab's outermost process; with --inner, its pid 1.
    #[command(hide = true)]
    LabInit {
        /// Be pid 1.
        #[arg(long)]
        inner: bool,
        /// The process that holds our standard input: end when that does.
        #[arg(long)]
        tied: Option<u32>,
        /// The lab's directory.
        dir: PathBuf,
    },
    /// A node; with --inner, its pid 1.
    #[command(hide = true)]
    LabNode {
        /// Be pid 1.
        #[arg(long)]
        inner: bool,
        /// The lab's directory.
        dir: PathBuf,
        /// The node's name.
        node: String,
    },
    /// Runs one of these verbs in the namespaces of another process.
    #[command(hide = true)]
    LabEnter {
        /// Its directory in a /proc.
        proc_dir: PathBuf,
        /// When it started, in clock ticks since boot.
        start: u64,
        /// The verb.
        #[arg(last = true, required = true)]
        verb: Vec<String>,
    },
    /// Becomes a command that dies with our parent.
    #[command(hide = true)]
    LabStage {
        /// The command.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Starts a command and leaves it to pid 1.
    #[command(hide = true)]
    LabDaemon {
        /// Where it writes what it has to say.
        #[arg(long)]
        log: PathBuf,
        /// Say its process id.
        #[arg(long)]
        report: bool,
        /// The command; `droveway` is this program.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Runs a program in an endpoint of its own.
    #[command(hide = true)]
    LabShim {
        /// Use our standard streams.
        #[arg(long)]
        foreground: bool,
        /// Where records and logs are.
        dir: PathBuf,
        /// What to run, as JSON.
        spec: String,
    },
    /// Takes all frames of the underlay.
    #[command(hide = true)]
    LabCapture {
        /// The server's port.
        #[arg(long)]
        control_port: u16,
        /// What to search for, in hexadecimal.
        #[arg(last = true)]
        texts: Vec<String>,
    },
    /// Becomes a program once it is attached.
    #[command(hide = true)]
    LabBox {
        /// The pipe by which we say that we are ready.
        #[arg(long)]
        ready: RawFd,
        /// The pipe by which we are told to begin.
        #[arg(long)]
        go: RawFd,
        /// Hostname.
        #[arg(long)]
        name: String,
        /// The program.
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
}

/// Does what a verb says.
pub fn main(verb: Hidden) -> Result<ExitCode> {
    // Whoever started us may hold signals for itself, and what we become or start would hold them for ever: a daemon could
    // not be asked to end.
    SigSet::empty().thread_set_mask()?;
    let done = |()| ExitCode::SUCCESS;
    match verb {
        Hidden::LabInit { inner: true, dir, .. } => supervisor::inner(&dir).map(done),
        Hidden::LabInit { inner: false, tied, dir } => supervisor::outer(&dir, tied).map(done),
        Hidden::LabNode { inner: true, dir, node } => node::inner(&dir, &node).map(done),
        Hidden::LabNode { inner: false, dir, node } => node::outer(&dir, &node).map(done),
        Hidden::LabEnter { proc_dir, start, verb } => enter::enter(&proc_dir, start, &verb),
        Hidden::LabStage { command } => enter::stage(&command),
        Hidden::LabDaemon { log, report, command } => enter::daemon(&log, report, &command).map(done),
        Hidden::LabShim { foreground, dir, spec } => {
            let spec = serde_json::from_str(&spec).context("the container's description cannot be read")?;
            shim::shim(&dir, foreground, &spec)
        }
        Hidden::LabCapture { control_port, texts } => capture::main(control_port, &texts).map(done),
        Hidden::LabBox { ready, go, name, command } => shim::inside(ready, go, &name, &command),
    }
}
