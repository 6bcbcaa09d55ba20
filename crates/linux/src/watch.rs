//! A watch over a directory: whether files came or went (`inotify(7)`).

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;
use nix::libc;
use nix::unistd::read;

use crate::error::Error;

/// A watch over one directory.
#[derive(Debug)]
pub(crate) struct Watch {
    fd: OwnedFd,
}

impl Watch {
    /// Watches for files that are made, removed or renamed in `dir`.
    pub(crate) fn open(dir: &Path) -> Result<Self, Error> {
        let attempted = || format!("watch directory {}", dir.display());
        let path = CString::new(dir.as_os_str().as_bytes())
            .map_err(|_| Error::words(attempted(), "its name has a NUL in it"))?;
        // SAFETY: the call takes no pointers; the descriptor it returns is owned by nobody else.
        let fd = unsafe {
            let fd = Errno::result(libc::inotify_init1(libc::IN_NONBLOCK | libc::IN_CLOEXEC)).map_err(
                |errno| Error::errno(attempted(), errno).with_remedy("raise fs.inotify.max_user_instances"),
            )?;
            OwnedFd::from_raw_fd(fd)
        };
        let mask =
            libc::IN_CREATE | libc::IN_DELETE | libc::IN_MOVED_FROM | libc::IN_MOVED_TO | libc::IN_ONLYDIR;
        // SAFETY: the path is NUL-terminated and outlives the call.
        let watch = unsafe { libc::inotify_add_watch(fd.as_raw_fd(), path.as_ptr(), mask) };
        Errno::result(watch).map_err(|errno| Error::errno(attempted(), errno))?;
        Ok(Self { fd })
    }

    /// Whether anything happened since the last call.
    pub(crate) fn drain(&self) -> Result<bool, Error> {
        let mut buffer = [0; 4096];
        let mut happened = false;
        loop {
            match read(&self.fd, &mut buffer) {
                Ok(0) | Err(Errno::EAGAIN) => return Ok(happened),
                Ok(_) => happened = true,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(Error::errno("read what happened to the namespaces' files", errno)),
            }
        }
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
