//! Sysctls: files below `/proc/sys/net`, which show the namespace of the thread that opens them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use crate::error::Error;
use crate::netns::Netns;

const ROOT: &str = "/proc/sys/net";

/// Parts of the tree that a kernel may be without. There, everything is as wanted: there is nothing to switch.
const OPTIONAL: [&str; 2] = ["ipv6", "bridge"];

/// Reads each; `None` for one that is not there. `wanted` is what is shown where the kernel lacks the whole part.
pub(crate) fn read(
    ns: &Netns,
    wanted: Vec<(String, String)>,
) -> Result<Vec<(String, Option<String>)>, Error> {
    ns.run(|| {
        wanted
            .into_iter()
            .map(|(path, want)| {
                let value = match file(&path).map(fs::read_to_string) {
                    Some(Ok(value)) => Some(value.trim_end().replace('\t', " ")),
                    Some(Err(_)) if part_is_missing(&path) => Some(want),
                    Some(Err(_)) | None => None,
                };
                (path, value)
            })
            .collect()
    })
}

/// Writes one.
pub(crate) fn write(ns: &Netns, path: &str, value: &str) -> Result<(), Error> {
    let attempted = || format!("set sysctl {path} to {value}");
    let Some(file) = file(path) else {
        return Err(Error::words(attempted(), "that is not a path below /proc/sys/net"));
    };
    match ns.run(|| fs::write(file, value))? {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound && part_is_missing(path) => Ok(()),
        Err(error) => Err(Error::io(attempted(), &error)),
    }
}

fn file(path: &str) -> Option<PathBuf> {
    let plain = path.split('/').all(|part| !matches!(part, "" | "." | ".."));
    plain.then(|| Path::new(ROOT).join(path))
}

fn part_is_missing(path: &str) -> bool {
    OPTIONAL
        .into_iter()
        .any(|part| path.split('/').next() == Some(part) && !Path::new(ROOT).join(part).exists())
}
