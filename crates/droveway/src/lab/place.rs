//! The directory of a lab, and what else it leaves that is no process: cgroups, and the engines' disks.
//!
//! Invariant: a directory is given to a lab only when no process of another lives in it, and nothing is removed from it before
//! the lab's processes are gone.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{Flock, FlockArg};

use super::LabSpec;
use super::daemons::DEATH_LIMIT;
use super::process::{wait_for, wait_gone};
use super::spec::verb;
use super::state::{Supervisor, lock};

/// How long the kernel may take to empty a cgroup.
const CLEAN_LIMIT: Duration = Duration::from_secs(5);
/// How long to wait for the lock where nobody has to have it.
const LOCK_LIMIT: Duration = Duration::from_secs(1);

/// The lab's directory, locked, once nothing lives in it. What was interrupted a moment ago takes itself away.
pub(super) fn claim(spec: &LabSpec) -> Result<Flock<File>> {
    loop {
        make_dir(spec)?;
        let held = lock(&spec.dir)?;
        match Supervisor::load(&spec.dir)? {
            Some(other) if other.up() => {
                bail!(
                    "lab {0} is up already; `{1} down` first, or give another --lab",
                    spec.name,
                    verb(spec.name.as_str())
                )
            }
            Some(other) if other.alive() => {
                drop(held);
                wait_gone(other.supervisor, DEATH_LIMIT)?;
                other.init.map_or(Ok(()), |init| wait_gone(init, DEATH_LIMIT))?;
            }
            // Its directory may have gone with it.
            Some(_) | None if fs::metadata(&spec.dir).is_ok_and(|now| same_file(&held, &now)) => {
                return Ok(held);
            }
            Some(_) | None => {}
        }
    }
}

fn same_file(held: &File, now: &fs::Metadata) -> bool {
    held.metadata().is_ok_and(|held| (held.dev(), held.ino()) == (now.dev(), now.ino()))
}

/// A directory that only we can read: join token and admin key will be below it.
fn make_dir(spec: &LabSpec) -> Result<()> {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true).mode(0o700);
    // Again, if the last of the other labs took the directory of them all along.
    let made = builder.create(&spec.dir).or_else(|_| builder.create(&spec.dir));
    made.with_context(|| format!("cannot make {}", spec.dir.display()))?;
    let owner = fs::symlink_metadata(&spec.dir)?.uid();
    ensure!(
        owner == nix::unistd::geteuid().as_raw(),
        "{} belongs to user {owner}, who could read the lab's keys; remove it",
        spec.dir.display()
    );
    Ok(())
}

/// Removes what is not a process, when nothing can be said of a failure.
pub(super) fn remove_leftovers(spec: &LabSpec) {
    // Another that is brought up in its place begins when this one is gone.
    let _held = lock_soon(&spec.dir);
    if let Err(error) = clear(spec).and_then(|()| remove_dir(&spec.dir)) {
        eprintln!("lab {}: something is left: {error:#}", spec.name);
    }
}

/// The lock of a lab's directory, if it is to be had soon: who holds it may wait for us.
fn lock_soon(dir: &Path) -> Option<Flock<File>> {
    let take = || Ok(Flock::lock(File::open(dir)?, FlockArg::LockExclusiveNonblock).ok());
    wait_for(LOCK_LIMIT, take).ok().flatten()
}

/// Removes the directory of a lab, and that of all labs if it was the last.
pub(super) fn remove_dir(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot remove {}", dir.display()));
        }
        _ => {}
    }
    let of_all = |parent: &&Path| {
        parent.file_name().is_some_and(|name| name.to_string_lossy().starts_with("droveway-lab"))
    };
    let _ = dir.parent().filter(of_all).map(fs::remove_dir);
    Ok(())
}

/// Removes what a lab leaves that is not a process: cgroups, the engines' disks, and all below its directory.
pub(super) fn clear(spec: &LabSpec) -> Result<()> {
    remove_cgroups(&spec.cgroup())?;
    let docker = spec.docker_root();
    if docker.exists() {
        fs::remove_dir_all(&docker).with_context(|| format!("cannot remove {}", docker.display()))?;
        // The directory of all labs goes with the last.
        let _ = docker.parent().map(fs::remove_dir);
    }
    for entry in fs::read_dir(&spec.dir).into_iter().flatten() {
        let path = entry?.path();
        let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
        removed.with_context(|| format!("cannot remove {}", path.display()))?;
    }
    Ok(())
}

/// Removes a cgroup from every hierarchy (cgroup v2, and each of v1), once the kernel has emptied it.
fn remove_cgroups(cgroup: &str) -> Result<()> {
    let base = Path::new("/sys/fs/cgroup");
    let mut roots = vec![base.to_owned()];
    roots.extend(fs::read_dir(base).into_iter().flatten().flatten().map(|entry| entry.path()));
    for root in roots {
        let path = root.join(cgroup.trim_start_matches('/'));
        if path.is_dir() {
            let gone = wait_for(CLEAN_LIMIT, || Ok(remove_tree(&path).is_ok().then_some(())))?;
            gone.with_context(|| format!("cgroup {} is still in use", path.display()))?;
            // The one of all labs goes with the last.
            let _ = path.parent().map(fs::remove_dir);
        }
    }
    Ok(())
}

/// Cgroups have files that cannot be removed: only the directories go, deepest first.
fn remove_tree(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}
