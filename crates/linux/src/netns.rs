//! Network namespaces: handles, and files that keep one alive as `ip netns` does.
//!
//! The network namespace belongs to a thread, so whatever must happen inside of one happens on a scratch thread that
//! ends with it. Sockets opened there stay in that namespace.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::thread;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

use crate::error::Error;

mod request {
    nix::ioctl_none_bad!(
        /// `NS_GET_NSTYPE` of ioctl_ns(2): the `CLONE_NEW*` of the namespace that a file is.
        ns_get_nstype,
        nix::request_code_none!(0xb7, 0x3)
    );
}

/// A network namespace, held open.
#[derive(Debug)]
pub struct Netns {
    fd: OwnedFd,
}

impl Netns {
    /// Opens the namespace that a file names: `/run/netns/x`, `/proc/123/ns/net`. Any other file is refused.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let attempted = || format!("open network namespace {}", path.display());
        // A pipe without a writer would make us wait.
        let file = OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path);
        let file = file.map_err(|error| Error::io(attempted(), &error))?;
        // SAFETY: the ioctl takes no argument and writes nothing; the descriptor is open.
        match unsafe { request::ns_get_nstype(file.as_raw_fd()) } {
            Ok(kind) if kind == CloneFlags::CLONE_NEWNET.bits() => Ok(Self { fd: file.into() }),
            Ok(_) | Err(_) => {
                let words = Some("the file is no network namespace".to_owned());
                Err(Error::kernel(attempted(), Errno::EINVAL, words))
            }
        }
    }

    /// The namespace of the calling thread.
    pub fn current() -> Result<Self, Error> {
        Self::open(Path::new("/proc/thread-self/ns/net"))
    }

    /// Makes a namespace and binds it at `dir`/`name`. The directory is made, and made to share its mounts.
    pub fn create_bound(dir: &Path, name: &str) -> Result<Self, Error> {
        share(dir)?;
        let path = dir.join(name);
        let attempted = || format!("make network namespace {}", path.display());
        OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o444)
            .open(&path)
            .map_err(|error| Error::io(attempted(), &error))?;
        let made = scratch(|| {
            unshare(CloneFlags::CLONE_NEWNET)?;
            let itself = Path::new("/proc/thread-self/ns/net");
            mount(Some(itself), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
            File::open(itself).map_err(|error| errno_of(&error))
        });
        match made {
            Ok(Ok(file)) => Ok(Self { fd: file.into() }),
            Ok(Err(errno)) => {
                let _ = remove(dir, name);
                Err(Error::errno(attempted(), errno))
            }
            Err(error) => {
                let _ = remove(dir, name);
                Err(error)
            }
        }
    }

    /// Runs `work` on a scratch thread inside the namespace and waits for it.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, Error> {
        scratch(|| setns(&self.fd, CloneFlags::CLONE_NEWNET).map(|()| work()))?
            .map_err(|errno| Error::errno("enter a network namespace", errno))
    }

    /// What tells this namespace from others while any is alive: device and inode of its file.
    pub fn inode(&self) -> Result<(u64, u64), Error> {
        let stat =
            nix::sys::stat::fstat(&self.fd).map_err(|errno| Error::errno("identify a namespace", errno))?;
        Ok((stat.st_dev, stat.st_ino))
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl AsRawFd for Netns {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// Device and inode of the namespace that a file names; `None` if there is no such file.
pub fn inode_at(path: &Path) -> Option<(u64, u64)> {
    fs::metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()))
}

/// Unbinds and unlinks `dir`/`name`; not being there is fine. The namespace ends with its last user.
pub fn remove(dir: &Path, name: &str) -> Result<(), Error> {
    let path = dir.join(name);
    let attempted = || format!("remove network namespace {}", path.display());
    loop {
        match umount2(&path, MntFlags::MNT_DETACH) {
            Ok(()) => {}
            Err(Errno::EINVAL | Errno::ENOENT) => break,
            Err(errno) => return Err(Error::errno(attempted(), errno)),
        }
    }
    match fs::remove_file(&path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(Error::io(attempted(), &error)),
    }
}

/// Makes the directory a mount that is shared, so that a namespace removed here is gone in every mount namespace.
fn share(dir: &Path) -> Result<(), Error> {
    fs::create_dir_all(dir)
        .map_err(|error| Error::io(format!("make directory {}", dir.display()), &error))?;
    let shared =
        || mount(None::<&str>, dir, None::<&str>, MsFlags::MS_SHARED | MsFlags::MS_REC, None::<&str>);
    match shared() {
        Ok(()) => Ok(()),
        Err(Errno::EINVAL) => {
            mount(Some(dir), dir, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
                .and_then(|()| shared())
        }
        Err(errno) => Err(errno),
    }
    .map_err(|errno| Error::errno(format!("share the mounts of {}", dir.display()), errno))
}

/// Runs `work` on a thread of its own, so that what it does to its namespaces ends with it.
fn scratch<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T, Error> {
    thread::scope(|scope| {
        let handle = thread::Builder::new()
            .name("netns".to_owned())
            .stack_size(512 << 10)
            .spawn_scoped(scope, work)
            .map_err(|error| Error::io("start a thread", &error))?;
        handle.join().map_err(|_| Error::words("work in a network namespace", "the thread panicked"))
    })
}

fn errno_of(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}
