//! The file systems of a node and of a container: what is its own, and what it shares with the machine.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{OFlag, readlinkat};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns};

const NONE: Option<&str> = None;

/// Mounts made here stay here, and namespaces made from this one follow what happens to them.
pub(super) fn shared() -> Result<()> {
    propagate(MsFlags::MS_PRIVATE)?;
    propagate(MsFlags::MS_SHARED)
}

/// Follows what is unmounted in the namespace this one was made from, and passes nothing back.
pub(super) fn follow() -> Result<()> {
    propagate(MsFlags::MS_SLAVE)
}

fn propagate(how: MsFlags) -> Result<()> {
    mount(NONE, "/", NONE, MsFlags::MS_REC | how, NONE).context("cannot set the propagation of mounts")
}

/// Makes our root that of our mount namespace, which in a chroot is another: whoever enters the namespace (setns(2)), and an
/// engine that leaves it for a container (pivot_root(2)), begins at the namespace's. Mounts made here stay here.
pub(super) fn own_root() -> Result<()> {
    let ours = open(Path::new("/"))?;
    let process = open(Path::new("/proc/self")).context("the lab needs a /proc; mount one")?;
    let namespace = File::open("/proc/self/ns/mnt")?;
    // Entering it anew leads to its root.
    let go = || setns(&namespace, CloneFlags::CLONE_NEWNS).context("cannot enter our own mount namespace");
    go()?;
    propagate(MsFlags::MS_PRIVATE)?;
    let chroot = readlinkat(&process, format!("fd/{}", ours.as_raw_fd()).as_str())?;
    if chroot == "/" {
        return Ok(());
    }
    mount(Some(chroot.as_os_str()), "/", NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE)
        .with_context(|| format!("cannot make {} the root of the lab", chroot.display()))?;
    go()
}

/// A `/proc` of this namespace of process ids.
pub(super) fn fresh_proc() -> Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("proc"), "/proc", Some("proc"), flags, NONE).context("cannot mount /proc")
}

/// A `/sys` of this network namespace, with the machine's cgroups in it. Where the kernel does not allow it, the
/// machine's stays: nothing of Droveway reads it.
pub(super) fn fresh_sys() {
    let cgroups = open(Path::new("/sys/fs/cgroup"));
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    if mount(Some("sysfs"), "/sys", Some("sysfs"), flags, NONE).is_err() {
        return;
    }
    if let Ok(cgroups) = cgroups
        && let Err(error) = bind(&cgroups, Path::new("/sys/fs/cgroup"))
    {
        eprintln!("droveway lab: /sys/fs/cgroup is not there: {error:#}");
    }
}

/// An empty `/run`, in which only `keep` of the old one is seen. `/var/run` follows where it is no link to it.
pub(super) fn fresh_run(keep: &[&Path]) -> Result<()> {
    let hidden = |path: &&Path| path.starts_with("/run") || path.starts_with("/var/run");
    let kept: Vec<(&Path, File)> = keep
        .iter()
        .copied()
        .filter(hidden)
        .map(|path| open(path).map(|file| (path, file)))
        .collect::<Result<_>>()?;
    tmpfs(Path::new("/run"))?;
    if fs::symlink_metadata("/var/run").is_ok_and(|meta| meta.is_dir()) {
        tmpfs(Path::new("/var/run"))?;
    }
    for (path, file) in kept {
        if file.metadata()?.is_dir() {
            fs::create_dir_all(path)?;
        } else {
            path.parent().map(fs::create_dir_all).transpose()?;
            File::create(path)?;
        }
        bind(&file, path)?;
    }
    fs::create_dir_all("/run/lock")?;
    Ok(())
}

/// Takes away what the node has in `/run` and gives an empty one.
pub(super) fn own_run() -> Result<()> {
    match umount2("/run", MntFlags::MNT_DETACH) {
        Ok(()) | Err(Errno::EINVAL) => {}
        Err(error) => return Err(error).context("cannot unmount the host's /run"),
    }
    tmpfs(Path::new("/run"))
}

fn tmpfs(at: &Path) -> Result<()> {
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("tmpfs"), at, Some("tmpfs"), flags, Some("mode=0755"))
        .with_context(|| format!("cannot mount a tmpfs on {}", at.display()))
}

/// Puts `text` in the place of a file of the machine; the machine's own is not touched. `name` is the scratch file's.
pub(super) fn replace_file(target: &str, name: &str, text: &str) -> Result<()> {
    let scratch = PathBuf::from("/run/droveway-lab-files");
    fs::create_dir_all(&scratch)?;
    let file = scratch.join(name);
    fs::write(&file, text)?;
    let Some(place) = resolve(Path::new(target))? else {
        eprintln!("droveway lab: the machine has no {target}, so the lab's is in {}", file.display());
        return Ok(());
    };
    mount(Some(&file), &place, NONE, MsFlags::MS_BIND, NONE)
        .with_context(|| format!("cannot put {} in the place of {target}", file.display()))
}

/// Where a mount on `target` has to go. A link that leads into the old `/run` (as systemd-resolved makes it) is made
/// whole in the new one; anywhere else nothing is made.
fn resolve(target: &Path) -> Result<Option<PathBuf>> {
    let place = match fs::read_link(target) {
        Ok(link) => target.parent().unwrap_or(Path::new("/")).join(link),
        Err(_) => target.to_owned(),
    };
    if place.exists() {
        return Ok(Some(place));
    }
    let place = without_dots(&place);
    if !place.starts_with("/run") {
        return Ok(None);
    }
    place.parent().map(fs::create_dir_all).transpose()?;
    File::create(&place).with_context(|| format!("cannot make {}", place.display()))?;
    Ok(Some(place))
}

fn without_dots(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => drop(plain.pop()),
            Component::CurDir => {}
            Component::Prefix(_) | Component::RootDir | Component::Normal(_) => plain.push(part),
        }
    }
    plain
}

fn open(path: &Path) -> Result<File> {
    let opened = File::options().read(true).custom_flags(OFlag::O_PATH.bits()).open(path);
    opened.with_context(|| format!("cannot open {}", path.display()))
}

/// Shows an open file or directory at another place, also when its own place is hidden by now.
fn bind(file: &File, at: &Path) -> Result<()> {
    let source = format!("/proc/self/fd/{}", file.as_raw_fd());
    mount(Some(source.as_str()), at, NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE)
        .map_err(io::Error::from)
        .with_context(|| format!("cannot show {} in the lab", at.display()))
}
