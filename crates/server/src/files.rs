//! The data directory: private, one server at a time, each file whole or absent.
//!
//! Invariant: a file is written beside its place, synced, renamed into it, and the directory synced; a crash leaves the
//! old file or the new one.

use std::fs::{self, DirBuilder, File, OpenOptions, Permissions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::Error;

pub(crate) const CA_CERTIFICATE: &str = "ca.pem";
pub(crate) const CA_KEY: &str = "ca.key";
pub(crate) const SERVER_CERTIFICATE: &str = "server.pem";
pub(crate) const SERVER_KEY: &str = "server.key";
pub(crate) const STORE: &str = "store.sqlite";
pub(crate) const ADMIN_KEY: &str = "admin.key";
/// What the server is called in the store.
pub(crate) const SERVER_ID: &str = "server.id";
/// The epoch of an etcd that was seen to go back to an earlier state.
pub(crate) const SET_BACK: &str = "etcd.set-back";
const LOCK: &str = "lock";

/// An open data directory. The lock goes with it, and with the process.
pub(crate) struct DataDir {
    path: PathBuf,
    _lock: File,
}

impl DataDir {
    /// Opens the directory, made if it is not there, and keeps other servers out of it.
    pub(crate) fn open(path: &Path) -> Result<Self, Error> {
        let fault = |what: &'static str| move |error| Error::File { what, path: path.to_owned(), error };
        match fs::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let made: Vec<&Path> = path.ancestors().take_while(|path| !path.exists()).collect();
                DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(fault("make"))?;
                for parent in made.iter().filter_map(|path| path.parent()) {
                    // What is in a directory that is not on disk is lost with it. One that may not be read is its owner's.
                    drop(sync(parent));
                }
            }
            Err(error) => return Err(fault("open")(error)),
            Ok(meta) if !meta.is_dir() => return Err(Error::NotADirectory(path.to_owned())),
            Ok(meta) => {
                let ours = path.join(CA_KEY).exists() || path.join(LOCK).exists();
                let empty = || Ok(fs::read_dir(path)?.next().is_none());
                if meta.permissions().mode() & 0o077 != 0 {
                    if !ours && !empty().map_err(fault("read"))? {
                        return Err(Error::NotOurs(path.to_owned()));
                    }
                    fs::set_permissions(path, Permissions::from_mode(0o700))
                        .map_err(fault("make private"))?;
                }
            }
        }
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(path.join(LOCK))
            .map_err(fault("lock"))?;
        match lock.try_lock() {
            Ok(()) => Ok(Self { path: path.to_owned(), _lock: lock }),
            Err(TryLockError::WouldBlock) => Err(Error::Locked(path.to_owned())),
            Err(TryLockError::Error(error)) => Err(fault("lock")(error)),
        }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The file's text, or `None` where there is no such file.
    pub(crate) fn read(&self, name: &'static str) -> Result<Option<String>, Error> {
        match fs::read_to_string(self.path(name)) {
            Ok(text) => Ok(Some(text)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            // No text at all.
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                Err(Error::Unreadable(self.path(name)))
            }
            Err(error) => Err(Error::File { what: "read", path: self.path(name), error }),
        }
    }

    /// Writes the file, whole or not at all.
    pub(crate) fn write(&self, name: &'static str, text: &str) -> Result<(), Error> {
        let write = || {
            let temporary = self.path(&format!(".{name}.new"));
            let mut file =
                OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&temporary)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&temporary, self.path(name))?;
            sync(&self.path)
        };
        write().map_err(|error| Error::File { what: "write", path: self.path(name), error })
    }

    /// Makes an empty file of mode 0600 where there is none, for those who would make it with another mode.
    pub(crate) fn touch(&self, name: &'static str) -> Result<(), Error> {
        let path = self.path(name);
        OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map(drop)
            .map_err(|error| Error::File { what: "make", path, error })
    }
}

/// Has what a directory holds on disk: which files there are, not what is in them.
pub(crate) fn sync(directory: &Path) -> io::Result<()> {
    let directory = if directory.as_os_str().is_empty() { Path::new(".") } else { directory };
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directory_is_private_and_takes_one_server() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data");
        let first = DataDir::open(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        let Err(error) = DataDir::open(&path) else { panic!("two servers share a directory") };
        assert!(error.to_string().contains("another server"), "{error}");
        drop(first);
        DataDir::open(&path).unwrap();
    }

    #[test]
    fn a_directory_full_of_other_things_is_not_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        fs::write(dir.path().join("thesis.tex"), "").unwrap();
        let Err(error) = DataDir::open(dir.path()) else { panic!("taken over") };
        assert!(error.to_string().contains("--data-dir"), "{error}");
        assert_eq!(fs::metadata(dir.path()).unwrap().permissions().mode() & 0o777, 0o755);
    }

    #[test]
    fn a_file_reads_back_and_is_private() {
        let dir = tempfile::tempdir().unwrap();
        let data = DataDir::open(dir.path()).unwrap();
        assert_eq!(data.read(ADMIN_KEY).unwrap(), None);
        data.write(ADMIN_KEY, "secret").unwrap();
        data.write(ADMIN_KEY, "other").unwrap();
        assert_eq!(data.read(ADMIN_KEY).unwrap().as_deref(), Some("other"));
        assert_eq!(fs::metadata(data.path(ADMIN_KEY)).unwrap().permissions().mode() & 0o777, 0o600);
    }
}
