//! The lab's outermost process, and pid 1 of the lab.
//!
//! The outer one stays in the caller's namespace of process ids: it is what `down` kills. The inner one dies with it
//! (`PR_SET_PDEATHSIG`), and with a pid 1 the kernel kills all that lives in its namespace.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::process::{Child, Stdio};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::{dup2_stdout, getegid, geteuid, sethostname, setsid};

use super::node::UNDERLAY_BRIDGE;
use super::process::{hold_sigchld, ip, ourselves, put_down, reap_forever};
use super::state::{Supervisor, read_json};
use super::{LabSpec, Pin, mounts, nat, place};

/// What the inner process prints when the underlay is there.
pub(super) const READY: &str = "ready";
/// What the caller writes to let the lab outlive it.
pub(super) const KEEP: &[u8] = b"k";

/// The outer process. `tied` to a process, whose end of our standard input it is, the lab ends when that does, unless [`KEEP`]
/// is read from it.
pub(super) fn outer(dir: &Path, tied: Option<u32>) -> Result<()> {
    // Fails only for a session leader, which then has its own session already.
    let _ = setsid();
    let supervisor = Pin::of(std::process::id())?;
    // One that is gone already has no start.
    let caller = tied.map(|pid| Pin::of(pid).unwrap_or(Pin { pid, start: 0 }));
    Supervisor { supervisor, init: None, caller }.save(dir)?;
    let spec = spec(dir)?;
    own_processes()?;

    let mut events = SigSet::empty();
    events.add(Signal::SIGCHLD);
    events.thread_block()?;
    let events = SignalFd::with_flags(&events, SfdFlags::SFD_CLOEXEC)?;
    let mut command = ourselves();
    command.args(["lab-init", "--inner"]).arg(dir).stdin(Stdio::piped());
    let mut child = command.spawn().context("cannot start pid 1 of the lab")?;
    Supervisor { supervisor, init: Some(Pin::of(child.id())?), caller }.save(dir)?;
    dup2_stdout(io::stderr())?;

    if watch(&mut child, &events, tied.is_some())? == End::CallerGone {
        put_down(&mut child);
        place::remove_leftovers(&spec);
    }
    Ok(())
}

#[derive(PartialEq, Eq)]
enum End {
    LabGone,
    CallerGone,
}

/// Waits for the end of the lab, or of the caller whom it is tied to.
fn watch(child: &mut Child, events: &SignalFd, mut tied: bool) -> Result<End> {
    loop {
        if child.try_wait()?.is_some() {
            return Ok(End::LabGone);
        }
        let stdin = io::stdin();
        let mut fds = vec![PollFd::new(events.as_fd(), PollFlags::POLLIN)];
        if tied {
            fds.push(PollFd::new(stdin.as_fd(), PollFlags::POLLIN));
        }
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let any = |fd: Option<&PollFd>| fd.and_then(PollFd::any).unwrap_or(false);
        let (child_event, caller_event) = (any(fds.first()), any(fds.get(1)));
        if child_event {
            events.read_signal()?;
        }
        if caller_event {
            let mut byte = [0; 1];
            let read = io::stdin().read(&mut byte)?;
            if byte[..read] == *KEEP {
                tied = false;
            } else {
                return Ok(End::CallerGone);
            }
        }
    }
}

/// Has the next process begin a namespace of process ids; where that takes a privilege we lack, in a user namespace
/// where we have it. Of the caller's files and devices we lose nothing: we may have to clean up.
fn own_processes() -> Result<()> {
    match unshare(CloneFlags::CLONE_NEWPID) {
        Ok(()) => return Ok(()),
        Err(Errno::EPERM) => {}
        Err(error) => return Err(error).context("the kernel makes no namespaces"),
    }
    let (uid, gid) = (geteuid(), getegid());
    unshare(CloneFlags::CLONE_NEWUSER).context(
        "the kernel makes no user namespace for this user (see sysctl user.max_user_namespaces, \
         kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns), and none at all in a chroot; \
         run it as root",
    )?;
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("0 {uid} 1"))?;
    fs::write("/proc/self/gid_map", format!("0 {gid} 1"))?;
    unshare(CloneFlags::CLONE_NEWPID).context("the kernel makes no namespaces")
}

/// Leaves the namespaces we were started in, but for users and process ids: these our parent has left already.
pub(super) fn own_surroundings() -> Result<()> {
    let wanted = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC;
    unshare(wanted).context("the kernel makes no namespaces")
}

/// Pid 1 of the lab: the underlay, then a life of reaping.
pub(super) fn inner(dir: &Path) -> Result<()> {
    die_with_parent()?;
    let spec = spec(dir)?;
    let sigchld = hold_sigchld()?;
    own_surroundings()?;
    sethostname(format!("lab-{}", spec.name))?;
    mounts::own_root()?;
    mounts::fresh_proc()?;
    mounts::fresh_run(&[dir, &spec.program])?;
    mounts::fresh_sys();
    // Absent unless the machine has br_netfilter: then the underlay must not pass through its rules.
    let _ = fs::write("/proc/sys/net/bridge/bridge-nf-call-iptables", "0");
    ip(&format!(
        "link set lo up\nlink add {UNDERLAY_BRIDGE} address 02:00:0a:ff:ff:01 mtu {} type bridge\n\
         {}link set {UNDERLAY_BRIDGE} up\n",
        spec.mtu,
        spec.add_address(spec.gateway(), UNDERLAY_BRIDGE),
    ))
    .context("cannot make the underlay")?;
    for i in 0..spec.nats.len() {
        let (bridge, mtu) = (nat::bridge(i), spec.mtu);
        ip(&format!("link add {bridge} mtu {mtu} type bridge\nlink set {bridge} up\n"))
            .context("cannot make the net behind a NAT box")?;
    }
    say(READY)?;
    dup2_stdout(io::stderr())?;
    reap_forever(&sigchld)
}

/// Ends with the parent, who holds the other end of our standard input: also if it died before we could ask for it.
pub(super) fn die_with_parent() -> Result<()> {
    set_pdeathsig(Signal::SIGKILL)?;
    let stdin = io::stdin();
    let mut fds = [PollFd::new(stdin.as_fd(), PollFlags::empty())];
    poll(&mut fds, PollTimeout::ZERO)?;
    anyhow::ensure!(
        !fds[0].revents().is_some_and(|events| events.contains(PollFlags::POLLHUP)),
        "the parent is gone"
    );
    Ok(())
}

/// Says a line to whoever reads our standard output.
pub(super) fn say(line: &str) -> Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()?;
    Ok(())
}

pub(super) fn spec(dir: &Path) -> Result<LabSpec> {
    let path = dir.join("spec.json");
    read_json(&path)?.with_context(|| format!("there is no {}", path.display()))
}
