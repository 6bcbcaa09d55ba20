//! What a lab is, on disk: which processes, which faults. Every change is made under a lock and written whole.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::LabSpec;
use super::daemons::Daemon;
use crate::cli::{Exit, Failure};

/// A process named for good: its number may be given to another, its number and start time not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pin {
    /// The process id.
    pub pid: u32,
    /// When it started, in clock ticks since boot (proc_pid_stat(5), field 22).
    pub start: u64,
}

impl Pin {
    /// Names the process that has this number now.
    pub fn of(pid: u32) -> io::Result<Self> {
        Self::at(&Self::dir(pid), pid)
    }

    /// Names a process by its directory in some `/proc`; `pid` is its number there.
    pub(super) fn at(proc_dir: &Path, pid: u32) -> io::Result<Self> {
        let (_, start) = read_stat(proc_dir)?;
        Ok(Self { pid, start })
    }

    /// Whether it runs: it is there and no zombie.
    pub fn alive(self) -> bool {
        self.alive_at(&Self::dir(self.pid))
    }

    /// [`Pin::alive`], with its directory in some `/proc`.
    pub(super) fn alive_at(self, proc_dir: &Path) -> bool {
        read_stat(proc_dir).is_ok_and(|(state, start)| start == self.start && !matches!(state, b'Z' | b'X'))
    }

    /// Sends a signal, unless it is gone.
    pub fn signal(self, signal: Signal) -> Result<()> {
        if !self.alive() {
            return Ok(());
        }
        match kill(Pid::from_raw(self.pid.try_into()?), signal) {
            Ok(()) | Err(Errno::ESRCH) => Ok(()),
            Err(error) => Err(error).with_context(|| format!("cannot send {signal} to process {}", self.pid)),
        }
    }

    /// Its directory in this `/proc`.
    pub(super) fn dir(pid: u32) -> PathBuf {
        PathBuf::from(format!("/proc/{pid}"))
    }
}

/// State letter and start time. The name before them may hold anything, so reading begins after its last parenthesis.
fn read_stat(proc_dir: &Path) -> io::Result<(u8, u64)> {
    let stat = fs::read_to_string(proc_dir.join("stat"))?;
    let fields = stat.rfind(')').map(|at| stat[at + 1..].split_ascii_whitespace());
    let mut fields = fields.ok_or(io::ErrorKind::InvalidData)?;
    let state = fields.next().and_then(|field| field.bytes().next()).ok_or(io::ErrorKind::InvalidData)?;
    let start = fields.nth(18).and_then(|field| field.parse().ok()).ok_or(io::ErrorKind::InvalidData)?;
    Ok((state, start))
}

/// A node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct NodeState {
    /// The address of its `eth0`.
    pub address: IpAddr,
    /// Its pid 1, as the caller's machine sees it; none while it is powered off.
    pub init: Option<Pin>,
    /// How often a NAT box was told to forget.
    #[serde(default)]
    pub rebinds: u16,
    /// What was started on it.
    #[serde(default)]
    pub daemons: BTreeMap<Daemon, Pin>,
}

impl NodeState {
    /// Its pid 1, if it is powered on.
    pub fn running(&self) -> Option<Pin> {
        self.init.filter(|pin| pin.alive())
    }
}

/// Packets between two nodes are lost, in both directions.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Fault {
    /// One node: the one whose name sorts first.
    pub a: String,
    /// The other.
    pub b: String,
    /// How many of 10,000 packets are lost; 10,000 is a cut.
    pub lost: u32,
}

/// What a lab is.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
    /// What it shall be.
    pub spec: LabSpec,
    /// Its pid 1, as the caller's machine sees it.
    pub init: Option<Pin>,
    /// The nodes.
    pub nodes: BTreeMap<String, NodeState>,
    /// What is wrong with the underlay.
    #[serde(default)]
    pub faults: Vec<Fault>,
}

impl State {
    /// A lab in which nothing runs yet.
    pub(super) fn new(spec: LabSpec) -> Self {
        let fresh = |address| NodeState { address, init: None, rebinds: 0, daemons: BTreeMap::new() };
        let nodes = spec.nodes().map(|node| (node.name, fresh(node.address))).collect();
        Self { spec, init: None, nodes, faults: Vec::new() }
    }

    /// What the directory says; nothing if there is no lab in it.
    pub(super) fn load(dir: &Path) -> Result<Option<Self>> {
        read_json(&dir.join("state.json"))
    }

    pub(super) fn save(&self) -> Result<()> {
        write_json(&self.spec.dir.join("state.json"), self)
    }

    /// A node by name.
    pub(super) fn node(&self, name: &str) -> Result<&NodeState> {
        self.nodes.get(name).ok_or_else(|| {
            let known: Vec<&str> = self.nodes.keys().map(String::as_str).collect();
            let why = format!("lab {} has no host {name:?}; it has {}", self.spec.name, known.join(", "));
            Failure::new(Exit::NotFound, why).into()
        })
    }

    /// A node that is powered on, and its pid 1.
    pub(super) fn running(&self, name: &str) -> Result<Pin> {
        let Some(pin) = self.node(name)?.running() else {
            bail!("{name} is powered off; `droveway lab start {name}` brings it back");
        };
        Ok(pin)
    }
}

/// The process that outlives `up`: what [`super::Lab::down`] kills. It writes this itself, before it does anything else.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Supervisor {
    pub(super) supervisor: Pin,
    pub(super) init: Option<Pin>,
    /// Whose lab it is, until it is let go: it ends with this process.
    pub(super) caller: Option<Pin>,
}

impl Supervisor {
    pub(super) fn load(dir: &Path) -> Result<Option<Self>> {
        read_json(&dir.join("supervisor.json"))
    }

    pub(super) fn save(&self, dir: &Path) -> Result<()> {
        write_json(&dir.join("supervisor.json"), self)
    }

    /// Whether there is a lab, and not only what comes before it or is left of it.
    pub(super) fn up(&self) -> bool {
        self.caller.is_none_or(Pin::alive) && self.init.is_some_and(Pin::alive)
    }

    pub(super) fn alive(&self) -> bool {
        self.supervisor.alive() || self.init.is_some_and(Pin::alive)
    }
}

/// Keeps others from changing the lab while it is held.
pub(super) fn lock(dir: &Path) -> Result<Flock<File>> {
    let file = File::open(dir).with_context(|| format!("cannot open {}", dir.display()))?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, error)| error)
        .with_context(|| format!("cannot lock {}", dir.display()))
}

pub(super) fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    match fs::read(path) {
        // Made, but not written yet.
        Ok(bytes) if bytes.is_empty() => Ok(None),
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .with_context(|| format!("{} is damaged; remove its directory", path.display())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("cannot read {}", path.display())),
    }
}

pub(super) fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let new = path.with_extension("new");
    fs::write(&new, serde_json::to_vec_pretty(value)?)
        .and_then(|()| fs::rename(&new, path))
        .with_context(|| format!("cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pin_knows_its_process_from_a_later_one_with_its_number() {
        let mut child = std::process::Command::new("sleep").arg("60").spawn().unwrap();
        let pin = Pin::of(child.id()).unwrap();
        assert!(pin.alive());
        assert!(!Pin { start: pin.start + 1, ..pin }.alive());
        pin.signal(Signal::SIGKILL).unwrap();
        super::super::process::wait_gone(pin, std::time::Duration::from_secs(5)).unwrap();
        child.wait().unwrap();
        pin.signal(Signal::SIGKILL).unwrap();
    }
}
