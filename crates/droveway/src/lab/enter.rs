//! Going into a node or a container that is there already, and starting something there.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{Pid, setsid};

use super::Pin;
use super::process::{exit_code, ourselves, shown};
use super::supervisor::say;

/// In this order: the first gives the right to enter the others, and the last hides the paths that lead to them.
const NAMESPACES: [(&str, CloneFlags); 6] = [
    ("user", CloneFlags::CLONE_NEWUSER),
    ("pid", CloneFlags::CLONE_NEWPID),
    ("net", CloneFlags::CLONE_NEWNET),
    ("uts", CloneFlags::CLONE_NEWUTS),
    ("ipc", CloneFlags::CLONE_NEWIPC),
    ("mnt", CloneFlags::CLONE_NEWNS),
];

/// Where to go: a process by its directory in a `/proc`, of which `pin.pid` need not be its number here.
#[derive(Debug, Clone)]
pub(super) struct Door {
    pub(super) proc_dir: PathBuf,
    pub(super) pin: Pin,
}

impl Door {
    /// Into the namespaces of a process of this machine.
    pub(super) fn of(pin: Pin) -> Self {
        Self { proc_dir: Pin::dir(pin.pid), pin }
    }

    /// Into those of a process of a node, by its number there.
    pub(super) fn inside(node: Pin, pin: Pin) -> Self {
        Self { proc_dir: root_of(node).join(format!("proc/{}", pin.pid)), pin }
    }

    /// The arguments of the verb that goes there.
    pub(super) fn args(&self) -> [String; 3] {
        ["lab-enter".to_owned(), self.proc_dir.display().to_string(), self.pin.start.to_string()]
    }
}

/// A node's files, as seen from outside.
pub(super) fn root_of(node: Pin) -> PathBuf {
    Pin::dir(node.pid).join("root")
}

/// `lab-enter`: runs `verb`, one of this program's, in the namespaces of another process. Passes on signals and the
/// exit status; if it dies, `lab-stage` sees to it that the other does, too.
pub(super) fn enter(proc_dir: &Path, start: u64, verb: &[String]) -> Result<ExitCode> {
    let events = signals()?;
    let here = std::env::current_dir().ok();
    go(proc_dir, start)?;
    if here.is_none_or(|dir| std::env::set_current_dir(dir).is_err()) {
        std::env::set_current_dir("/")?;
    }
    let mut child = ourselves().args(verb).spawn().context("cannot start a process in the lab")?;
    let pid = Pid::from_raw(child.id().try_into()?);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(ExitCode::from(exit_code(status)));
        }
        let Some(event) = events.read_signal()? else { continue };
        let signal = Signal::try_from(i32::try_from(event.ssi_signo)?)?;
        // What the terminal sends, it sends to the child as well.
        let from_terminal = event.ssi_code > 0;
        if signal != Signal::SIGCHLD && !from_terminal {
            match kill(pid, signal) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn signals() -> Result<SignalFd> {
    let mut set = SigSet::empty();
    for signal in [
        Signal::SIGCHLD,
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGQUIT,
        Signal::SIGHUP,
        Signal::SIGUSR1,
        Signal::SIGUSR2,
    ] {
        set.add(signal);
    }
    set.thread_block()?;
    Ok(SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC)?)
}

/// Moves this process; into the namespace of process ids, only its children.
fn go(proc_dir: &Path, start: u64) -> Result<()> {
    let mut doors = Vec::new();
    for (name, flag) in NAMESPACES {
        let there = proc_dir.join("ns").join(name);
        let opened = File::open(&there).with_context(|| format!("cannot enter {}", there.display()))?;
        let same = fs::read_link(&there)? == fs::read_link(format!("/proc/self/ns/{name}"))?;
        if !same {
            doors.push((name, flag, opened));
        }
    }
    let pin = Pin { pid: 0, start };
    ensure!(pin.alive_at(proc_dir), "the process whose namespaces were to be entered is gone");
    for (name, flag, door) in doors {
        setns(door.as_fd(), flag).with_context(|| format!("cannot enter its {name} namespace"))?;
    }
    Ok(())
}

/// `lab-stage`: becomes `command`, which dies with the one who started us.
pub(super) fn stage(command: &[String]) -> Result<ExitCode> {
    set_pdeathsig(Signal::SIGKILL)?;
    Ok(become_command(command))
}

/// Never returns but with the code for a program that cannot be run: 127 if it is not there, 126 otherwise, as a shell.
fn become_command(command: &[String]) -> ExitCode {
    let Some((program, args)) = command.split_first() else { return ExitCode::from(126) };
    let error = Command::new(program).args(args).exec();
    eprintln!("droveway: cannot run {program}: {error}");
    ExitCode::from(if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 })
}

/// `lab-daemon`: starts `command` in a session of its own and leaves it to pid 1. With `report` it says the number of
/// the process; without, the process itself has our standard output to say something.
pub(super) fn daemon(log: &Path, report: bool, command: &[String]) -> Result<()> {
    setsid()?;
    let (program, args) = command.split_first().context("there is no command")?;
    let log = File::options().create(true).append(true).open(log)?;
    let mut daemon = if program == "droveway" { ourselves() } else { Command::new(program) };
    daemon.args(args).stdin(Stdio::null()).stderr(log.try_clone()?);
    if report {
        daemon.stdout(log);
    }
    let child = daemon.spawn().with_context(|| format!("cannot run {}", shown(command)))?;
    if report {
        say(&child.id().to_string())?;
    }
    Ok(())
}
