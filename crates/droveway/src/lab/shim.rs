//! A program in an endpoint of its own: what containerd's shim is to a container.
//!
//! ```text
//! lab-shim, in the host          lab-box, in namespaces of its own
//!   starts it ───────────────────▶
//!             ◀─────────── ready    namespaces, /proc, /run, lo
//!   attach at the agent
//!             go, resolv.conf ────▶ executes CMD
//!             ◀─── end of the pipe  (closed by exec)
//!   says the addresses; waits; detaches
//! ```
//! Invariant: CMD does not begin before the attachment is complete, and the attachment does not outlive it.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use model::agent_api::{AttachRequest, Attached, SOCKET};
use model::api::{ApiError, ErrorCode};
use model::{EndpointId, Name, PublishedPort};
use nix::fcntl::OFlag;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{close, pipe2, sethostname};
use serde::{Deserialize, Serialize};

use super::mounts;
use super::process::{exit_code, ip, ourselves, put_down, spawn_as_pid_1, tail, wait_for};
use super::state::{Pin, read_json, write_json};
use super::supervisor::{own_surroundings, say};
use crate::client::{self, ask_agent};

/// How long an agent that is away is asked to detach.
const DETACH_LIMIT: Duration = Duration::from_secs(10);

/// A program in an endpoint of its own.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct RunSpec {
    /// The container's name: also its hostname and a name in DNS.
    pub name: Name,
    /// Name or id of the network.
    pub network: String,
    /// The stack.
    #[serde(default)]
    pub stack: Option<Name>,
    /// The service.
    #[serde(default)]
    pub service: Option<Name>,
    /// Other names in DNS.
    #[serde(default)]
    pub aliases: Vec<Name>,
    /// Labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// A wish for this address.
    #[serde(default)]
    pub address: Option<IpAddr>,
    /// Ports to publish on the host.
    #[serde(default)]
    pub ports: Vec<PublishedPort>,
    /// What to run.
    pub command: Vec<String>,
}

impl RunSpec {
    /// `command` under that name in the network `managed`.
    pub fn new(name: &str, command: &[&str]) -> Result<Self> {
        Ok(Self {
            name: name.parse()?,
            network: "managed".to_owned(),
            stack: None,
            service: None,
            aliases: Vec::new(),
            labels: BTreeMap::new(),
            address: None,
            ports: Vec::new(),
            command: command.iter().map(|&word| word.to_owned()).collect(),
        })
    }
}

/// What is known of a container that runs, in a file of its node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Record {
    /// Its pid 1, by its number in the node; none before its namespaces are there.
    pub(super) init: Option<Pin>,
    /// Its shim, by its number in the node.
    pub(super) shim: Pin,
    /// What it was asked to be.
    pub(super) spec: RunSpec,
    /// Its endpoint, once it is attached.
    pub(super) endpoint: Option<EndpointId>,
    /// Its addresses, once it is attached.
    pub(super) addresses: Vec<IpAddr>,
}

impl Record {
    pub(super) fn path(dir: &Path, name: &str) -> PathBuf {
        dir.join(format!("{name}.json"))
    }

    pub(super) fn log(dir: &Path, name: &str) -> PathBuf {
        dir.join(format!("{name}.log"))
    }

    pub(super) fn load(dir: &Path, name: &str) -> Result<Option<Self>> {
        read_json(&Self::path(dir, name))
    }

    /// All of a node, by name.
    pub(super) fn all(dir: &Path) -> Result<Vec<Self>> {
        let Ok(entries) = fs::read_dir(dir) else { return Ok(Vec::new()) };
        let mut records = Vec::new();
        for entry in entries {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "json") {
                // It may have ended since.
                records.extend(read_json::<Self>(&path)?);
            }
        }
        records.sort_by(|a, b| a.spec.name.cmp(&b.spec.name));
        Ok(records)
    }
}

/// What the shim says: one line on its standard output.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Answer {
    /// It runs.
    Runs(Box<Attached>),
    /// It does not, and nothing is left of it.
    Failed {
        /// What the agent calls it, if it was the agent that refused.
        code: Option<ErrorCode>,
        /// Why.
        why: String,
    },
}

/// What goes to the box before CMD may begin.
#[derive(Serialize, Deserialize)]
struct Go {
    resolv_conf: String,
    hosts: String,
}

/// `lab-shim`. In the foreground the program has our standard streams, and nothing is said but errors.
pub(super) fn shim(dir: &Path, foreground: bool, spec: &RunSpec) -> Result<ExitCode> {
    let events = events()?;
    let mut running = match start(dir, foreground, spec) {
        Ok(running) => running,
        Err(error) if foreground => return Err(error),
        Err(error) => {
            let code = match error.downcast_ref() {
                Some(client::Error::Refused(refusal)) => Some(refusal.code),
                Some(_) | None => None,
            };
            say(&serde_json::to_string(&Answer::Failed { code, why: format!("{error:#}") })?)?;
            return Ok(ExitCode::FAILURE);
        }
    };
    if !foreground {
        let answer = serde_json::to_string(&Answer::Runs(Box::new(running.attached.clone())))?;
        if say(&answer).is_err() {
            // Whoever asked for it was interrupted, and knows of no container.
            put_down(&mut running.child);
        }
    }
    let status = wait(&mut running.child, &events)?;
    end(dir, spec, &running.attached.endpoint.id);
    Ok(ExitCode::from(exit_code(status)))
}

fn events() -> Result<SignalFd> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGCHLD, Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        set.add(signal);
    }
    set.thread_block()?;
    Ok(SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC)?)
}

struct Running {
    child: Child,
    attached: Attached,
}

fn start(dir: &Path, foreground: bool, spec: &RunSpec) -> Result<Running> {
    fs::create_dir_all(dir)?;
    let name = spec.name.as_str();
    take_name(dir, name)?;
    let shim = Pin::of(std::process::id())?;
    let mut record = Record { init: None, shim, spec: spec.clone(), endpoint: None, addresses: Vec::new() };
    let mut opened = write_json(&Record::path(dir, name), &record)
        .and_then(|()| Open::begin(dir, foreground, spec))
        .inspect_err(|_| release_name(dir, name))?;
    match opened.attach(dir, &mut record) {
        Ok(attached) => Ok(Running { child: opened.child, attached }),
        Err(error) => {
            put_down(&mut opened.child);
            release_name(dir, name);
            Err(error)
        }
    }
}

/// The record's file is made before anything else: two containers of one name cannot be.
fn take_name(dir: &Path, name: &str) -> Result<()> {
    let path = Record::path(dir, name);
    if let Err(error) = File::options().write(true).create_new(true).open(&path) {
        if error.kind() != io::ErrorKind::AlreadyExists {
            return Err(error).with_context(|| format!("cannot make {}", path.display()));
        }
        if Record::load(dir, name)?.is_none_or(|record| record.shim.alive()) {
            let why = format!(
                "a container {name:?} runs on this host already; take another --name, or kill that one"
            );
            return Err(client::Error::Refused(ApiError::new(ErrorCode::Conflict, why)).into());
        }
        // Its shim was killed, which takes the container along.
        fs::write(&path, b"")?;
    }
    Ok(())
}

fn release_name(dir: &Path, name: &str) {
    if let Err(error) = fs::remove_file(Record::path(dir, name)) {
        eprintln!("droveway lab: cannot remove the record of {name}: {error}");
    }
}

/// A box that waits for its `go`.
struct Open {
    child: Child,
    ready: File,
    go: File,
}

impl Open {
    fn begin(dir: &Path, foreground: bool, spec: &RunSpec) -> Result<Self> {
        // Without O_CLOEXEC: the box finds them by their numbers.
        let (ready, ready_end) = pipe2(OFlag::empty())?;
        let (go_end, go) = pipe2(OFlag::empty())?;
        for ours in [&ready, &go] {
            keep_to_ourselves(ours)?;
        }
        let mut command = ourselves();
        command
            .args(["lab-box", "--ready", &ready_end.as_raw_fd().to_string()])
            .args(["--go", &go_end.as_raw_fd().to_string(), "--name", spec.name.as_str(), "--"])
            .args(&spec.command);
        if !foreground {
            let log = File::options().create(true).append(true).open(Record::log(dir, spec.name.as_str()))?;
            command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        }
        let child = spawn_as_pid_1(&mut command)?;
        Ok(Self { child, ready: ready.into(), go: go.into() })
    }

    fn attach(&mut self, dir: &Path, record: &mut Record) -> Result<Attached> {
        let spec = record.spec.clone();
        let mut byte = [0; 1];
        if self.ready.read(&mut byte)? == 0 {
            bail!(
                "the container's namespaces could not be made{}",
                tail(&Record::log(dir, spec.name.as_str()))
            );
        }
        let (path, pid) = (Record::path(dir, spec.name.as_str()), self.child.id());
        record.init = Some(Pin::of(pid)?);
        let request = request(&spec, pid);
        let attached = ask_agent(Path::new(SOCKET), async |agent| agent.attach(&request).await)?;
        let endpoint = &attached.endpoint;
        record.endpoint = Some(endpoint.id.clone());
        record.addresses.clone_from(&endpoint.addresses);
        let begun = write_json(&path, record).and_then(|()| self.release(&spec, &attached));
        if let Err(error) = begun {
            put_down(&mut self.child);
            detach(&endpoint.id);
            return Err(error);
        }
        Ok(attached)
    }

    /// Lets the program begin, and learns whether it did.
    fn release(&mut self, spec: &RunSpec, attached: &Attached) -> Result<()> {
        let mut hosts = vec!["127.0.0.1 localhost".to_owned(), "::1 localhost".to_owned()];
        hosts.extend(attached.endpoint.addresses.iter().map(|address| format!("{address} {}", spec.name)));
        let hosts = hosts.join("\n") + "\n";
        let mut go = serde_json::to_vec(&Go { resolv_conf: attached.resolv_conf.clone(), hosts })?;
        go.push(b'\n');
        self.go.write_all(&go).context("the container died before it began")?;
        let mut complaint = String::new();
        self.ready.read_to_string(&mut complaint)?;
        anyhow::ensure!(complaint.is_empty(), "{complaint}");
        Ok(())
    }
}

fn keep_to_ourselves(fd: &OwnedFd) -> Result<()> {
    use nix::fcntl::{FcntlArg, FdFlag, fcntl};
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    Ok(())
}

fn request(spec: &RunSpec, pid: u32) -> AttachRequest {
    AttachRequest {
        network: spec.network.clone(),
        netns: PathBuf::from(format!("/proc/{pid}/ns/net")),
        ifname: "eth0".to_owned(),
        name: Some(spec.name.clone()),
        stack: spec.stack.clone(),
        service: spec.service.clone(),
        aliases: spec.aliases.clone(),
        address: spec.address,
        labels: spec.labels.clone(),
        ports: spec.ports.clone(),
        routes: None,
    }
}

/// Waits for the program's end; whoever asks us to end, ends it.
fn wait(child: &mut Child, events: &SignalFd) -> Result<std::process::ExitStatus> {
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(status);
        }
        let Some(event) = events.read_signal()? else { continue };
        let signal = Signal::try_from(i32::try_from(event.ssi_signo)?)?;
        // What the terminal sends, it sends to the program as well, which may have its own idea of it.
        let from_terminal = event.ssi_code > 0;
        if signal != Signal::SIGCHLD && !(from_terminal && minds(child.id(), signal)) {
            child.kill()?;
        }
    }
}

/// Whether a program catches or ignores that signal. One that does not would end by it, were it not its namespace's pid 1, to
/// which the kernel then does nothing (`SigIgn` and `SigCgt` in proc_pid_status(5)).
fn minds(pid: u32, signal: Signal) -> bool {
    let status = fs::read_to_string(Pin::dir(pid).join("status")).unwrap_or_default();
    let masks = status.lines().filter_map(|line| {
        let mask = line.strip_prefix("SigIgn:").or_else(|| line.strip_prefix("SigCgt:"))?;
        u64::from_str_radix(mask.trim(), 16).ok()
    });
    masks.into_iter().any(|mask| mask & (1 << (signal as i32 - 1)) != 0)
}

fn end(dir: &Path, spec: &RunSpec, endpoint: &EndpointId) {
    detach(endpoint);
    release_name(dir, spec.name.as_str());
}

/// An agent that is away is asked again for a while; after that it finds the namespace gone by itself.
fn detach(endpoint: &EndpointId) {
    let mut last = None;
    let detach = || ask_agent(Path::new(SOCKET), async |agent| agent.detach(endpoint).await);
    let done = wait_for(DETACH_LIMIT, || match detach() {
        Ok(()) => Ok(Some(())),
        Err(error) => {
            last = Some(error);
            Ok(None)
        }
    });
    if let (Ok(None), Some(error)) = (done, last) {
        eprintln!("droveway lab: endpoint {endpoint} was not detached: {error}");
    }
}

/// `lab-box`: makes the namespaces, waits for the `go`, becomes the program.
pub(super) fn inside(ready: RawFd, go: RawFd, name: &str, command: &[String]) -> Result<ExitCode> {
    set_pdeathsig(Signal::SIGKILL)?;
    let mut ready = adopt(ready, true)?;
    let mut go = BufReader::new(adopt(go, false)?);
    own_surroundings()?;
    sethostname(name)?;
    mounts::follow()?;
    mounts::fresh_proc()?;
    mounts::own_run()?;
    mounts::fresh_sys();
    ip("link set lo up\n")?;
    ready.write_all(b".")?;

    let mut line = String::new();
    go.read_line(&mut line)?;
    if line.is_empty() {
        bail!("the container was not attached");
    }
    let Go { resolv_conf, hosts } = serde_json::from_str(&line)?;
    mounts::replace_file("/etc/resolv.conf", "resolv.conf", &resolv_conf)?;
    mounts::replace_file("/etc/hosts", "hosts", &hosts)?;
    let Some((program, args)) = command.split_first() else { bail!("there is no command to run") };
    let error = Command::new(program).args(args).current_dir("/").exec();
    write!(ready, "cannot run {program}: {error}")?;
    Ok(ExitCode::from(127))
}

/// A pipe that was inherited by its number: opened again, so that the number can be closed.
fn adopt(fd: RawFd, write: bool) -> Result<File> {
    let file = File::options().read(!write).write(write).open(format!("/proc/self/fd/{fd}"))?;
    close(fd)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_program_does_with_a_signal_is_known() {
        let script = "trap : INT; trap '' HUP; echo ready; read -r end";
        let mut child = Command::new("sh")
            .args(["-c", script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let signals = [Signal::SIGINT, Signal::SIGHUP, Signal::SIGTERM];
        let minded = signals.map(|signal| minds(child.id(), signal));
        put_down(&mut child);
        assert_eq!(minded, [true, true, false]);
    }
}
