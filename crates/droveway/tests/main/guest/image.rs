//! The first and only file system of a guest: an archive (`newc`, as the kernel's `init/initramfs.c` reads it) of busybox,
//! modules, programs of this machine with the libraries that they need, and a script that begins.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Files by their path in the guest.
#[derive(Default)]
pub struct Image {
    files: BTreeMap<PathBuf, (u32, Vec<u8>)>,
    /// In the order in which they can be loaded.
    modules: Vec<String>,
}

impl Image {
    pub fn file(&mut self, path: &str, mode: u32, bytes: impl Into<Vec<u8>>) {
        self.files.insert(path.into(), (mode, bytes.into()));
    }

    /// A program or library of this machine at its own place, and what it is linked with.
    pub fn program(&mut self, path: &Path) -> Result<(), String> {
        self.copy(path)?;
        let listed = Command::new("ldd").arg(path).output().map_err(|error| format!("ldd: {error}"))?;
        for word in String::from_utf8_lossy(&listed.stdout).split_whitespace() {
            if word.starts_with('/') && !self.files.contains_key(Path::new(word)) {
                self.copy(Path::new(word))?;
            }
        }
        Ok(())
    }

    /// The path that a file of this name has where a file is that is there already.
    pub fn beside(&self, there: &str, name: &str) -> Result<PathBuf, String> {
        let found = self.files.keys().find(|path| path.file_name().is_some_and(|it| it == there));
        found.map(|path| path.with_file_name(name)).ok_or_else(|| format!("nothing needs {there}"))
    }

    fn copy(&mut self, path: &Path) -> Result<(), String> {
        let bytes = fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
        let mode = fs::metadata(path).map_err(|error| error.to_string())?.permissions().mode() & 0o777;
        self.files.insert(path.to_owned(), (mode, bytes));
        Ok(())
    }

    /// A module and, before it, those that it needs: a module names them itself.
    pub fn module(&mut self, tree: &Path, name: &str) -> Result<(), String> {
        let name = name.replace('-', "_");
        if self.modules.contains(&name) {
            return Ok(());
        }
        let path = find(tree, &name).ok_or_else(|| format!("no module {name} in {}", tree.display()))?;
        let bytes = fs::read(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        let key = b"\0depends=";
        let at = bytes.windows(key.len()).position(|window| window == key).map(|at| at + key.len());
        let depends = at.and_then(|at| bytes[at..].split(|byte| *byte == 0).next()).unwrap_or_default();
        for other in String::from_utf8_lossy(depends).split(',').filter(|other| !other.is_empty()) {
            self.module(tree, other)?;
        }
        self.file(&format!("/modules/{name}.ko"), 0o644, bytes);
        self.modules.push(name);
        Ok(())
    }

    pub fn modules(&self) -> &[String] {
        &self.modules
    }

    pub fn archive(&self) -> Vec<u8> {
        let mut out = Vec::new();
        let mut directories = std::collections::BTreeSet::new();
        for directory in ["/dev", "/proc", "/sys", "/tmp", "/run", "/var/run", "/var/log", "/etc"] {
            directories.extend(Path::new(directory).ancestors().map(Path::to_owned));
        }
        for path in self.files.keys() {
            directories.extend(path.ancestors().skip(1).map(Path::to_owned));
        }
        for directory in directories.iter().filter(|it| it.parent().is_some()) {
            entry(&mut out, directory, 0o040_755, &[]);
        }
        for (path, (mode, bytes)) in &self.files {
            entry(&mut out, path, 0o100_000 | mode, bytes);
        }
        entry(&mut out, Path::new("/TRAILER!!!"), 0, &[]);
        out
    }
}

fn entry(out: &mut Vec<u8>, path: &Path, mode: u32, bytes: &[u8]) {
    let name = path.strip_prefix("/").unwrap().to_str().unwrap();
    // Inode, mode, owner, group, links, time, size, four numbers of devices, length of the name, checksum.
    let fields = [0, mode, 0, 0, 1, 0, bytes.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
    out.extend(b"070701");
    for field in fields {
        out.extend(format!("{field:08x}").into_bytes());
    }
    out.extend(name.bytes());
    out.push(0);
    out.resize(out.len().next_multiple_of(4), 0);
    out.extend(bytes);
    out.resize(out.len().next_multiple_of(4), 0);
}

fn find(tree: &Path, name: &str) -> Option<PathBuf> {
    let mut below = Vec::new();
    for entry in fs::read_dir(tree).ok()?.flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            below.push(path);
        } else if path.extension().is_some_and(|it| it == "ko")
            && path.file_stem().is_some_and(|stem| stem.to_string_lossy().replace('-', "_") == name)
        {
            return Some(path);
        }
    }
    below.iter().find_map(|directory| find(directory, name))
}
