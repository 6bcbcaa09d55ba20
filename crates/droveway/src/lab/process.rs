//! Processes: naming one for good, waiting for a condition, running the system's tools, reaping.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};

use super::state::Pin;

/// How often a condition is looked at that the kernel does not announce.
const POLL: Duration = Duration::from_millis(10);

/// Looks until there is an answer, for at most `limit`.
pub(super) fn wait_for<T>(limit: Duration, mut look: impl FnMut() -> Result<Option<T>>) -> Result<Option<T>> {
    let deadline = Instant::now() + limit;
    loop {
        if let Some(answer) = look()? {
            return Ok(Some(answer));
        }
        if Instant::now() >= deadline {
            return Ok(None);
        }
        std::thread::sleep(POLL);
    }
}

/// Waits until that process is gone.
pub(super) fn wait_gone(pin: Pin, limit: Duration) -> Result<()> {
    wait_for(limit, || Ok((!pin.alive()).then_some(())))?
        .with_context(|| format!("process {} does not die; look at /proc/{}/stack", pin.pid, pin.pid))
}

/// This program again: also where its path is hidden, and also after it was replaced on the disk.
pub(super) fn ourselves() -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.arg0("droveway");
    command
}

/// Starts a command as pid 1 of a new namespace of process ids. What is started after it is again where we are.
pub(super) fn spawn_as_pid_1(command: &mut Command) -> Result<Child> {
    let own = File::open("/proc/self/ns/pid")?;
    unshare(CloneFlags::CLONE_NEWPID)?;
    let child = command.spawn();
    setns(own.as_fd(), CloneFlags::CLONE_NEWPID)?;
    child.context("cannot start a pid 1")
}

/// The caller's `PATH`, with the administrator's directories that a plain user's often lacks.
pub(super) fn search_path() -> String {
    let given = std::env::var("PATH").unwrap_or_default();
    let given = if given.is_empty() { "/usr/local/bin:/usr/bin:/bin" } else { &given };
    format!("{given}:/usr/local/sbin:/usr/sbin:/sbin")
}

/// Runs a tool of the system with `input` on its standard input; an error says what it said.
pub(super) fn tool(mut command: Command, input: &str) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let mut child = command
        .env("PATH", search_path())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| missing(&name, error))?;
    let stdin = child.stdin.take();
    // A tool that stops reading says why on its standard error.
    let _ = stdin.map(|mut stdin| stdin.write_all(input.as_bytes()));
    let output = child.wait_with_output()?;
    if !output.status.success() {
        bail!("{name} failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// Several commands of `ip`, in one process.
pub(super) fn ip(script: &str) -> Result<()> {
    let mut command = Command::new("ip");
    command.args(["-batch", "-"]);
    tool(command, script)
}

fn missing(name: &str, error: io::Error) -> anyhow::Error {
    if error.kind() == io::ErrorKind::NotFound {
        let package = match name {
            "ip" => "iproute2",
            "nft" => "nftables",
            other => other,
        };
        anyhow::anyhow!("{name} is not installed; apt-get install {package}")
    } else {
        anyhow::Error::new(error).context(format!("cannot run {name}"))
    }
}

/// The last lines of a log, to be shown under an error.
pub(super) fn tail(log: &Path) -> String {
    let Ok(text) = std::fs::read(log) else { return String::new() };
    let text = String::from_utf8_lossy(&text);
    let mut last = VecDeque::new();
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        if last.len() == 15 {
            last.pop_front();
        }
        last.push_back(line);
    }
    if last.is_empty() {
        return format!("\n  ({} is empty)", log.display());
    }
    let lines: Vec<&str> = last.into();
    format!("\n  the end of {}:\n  | {}", log.display(), lines.join("\n  | "))
}

/// Blocks `SIGCHLD` for this thread: [`reap_forever`] takes it from there. What is started later begins
/// with [`super::hidden::main`], which lets go of it.
pub(super) fn hold_sigchld() -> Result<SigSet> {
    let mut set = SigSet::empty();
    set.add(Signal::SIGCHLD);
    set.thread_block()?;
    Ok(set)
}

/// The life of a process that is pid 1: it buries those who die.
pub(super) fn reap_forever(sigchld: &SigSet) -> Result<()> {
    loop {
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => break,
                Ok(_) | Err(Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        sigchld.wait()?;
    }
}

/// The exit code by which a shell would show that status.
pub(super) fn exit_code(status: std::process::ExitStatus) -> u8 {
    use std::os::unix::process::ExitStatusExt;
    match (status.code(), status.signal()) {
        (Some(code), _) => u8::try_from(code).unwrap_or(1),
        (None, Some(signal)) => u8::try_from(128 + signal).unwrap_or(255),
        (None, None) => 1,
    }
}

/// Kills a child and buries it; for error paths.
pub(super) fn put_down(child: &mut Child) {
    // It may be dead already: then there is nothing to do.
    let _ = child.kill();
    let _ = child.wait();
}

/// Arguments as text, for messages.
pub(super) fn shown<S: AsRef<OsStr>>(args: &[S]) -> String {
    args.iter().map(|arg| arg.as_ref().to_string_lossy()).collect::<Vec<_>>().join(" ")
}
