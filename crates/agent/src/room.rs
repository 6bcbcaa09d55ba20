//! Whether the ledger takes anything: what its last write came to, and whether its disk has room for more.
//!
//! A full disk is not seen in the last write alone. While nothing is attached nothing is written, and what the ledger has
//! taken before may be written over for a while. So a file is written beside it that has no name by then: a crash
//! leaves nothing, and nothing waits for the disk.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::time::{Duration, Instant};

const NAME: &str = ".probe";
/// More than an attach writes.
const SIZE: usize = 64 * 1024;
/// How long an answer is good.
const GOOD: Duration = Duration::from_secs(5);

/// What is known of it.
#[derive(Default)]
pub(crate) struct Room {
    /// The last write failed.
    failed: bool,
    /// When somebody asked last, and what the answer was.
    told: Option<(Instant, Result<(), String>)>,
}

impl Room {
    /// A write came to an end.
    pub(crate) fn wrote(&mut self, failed: bool) {
        if self.failed != failed {
            *self = Self { failed, told: None };
        }
    }

    /// Whether the last write failed.
    pub(crate) fn failed(&self) -> bool {
        self.failed
    }

    /// The answer that is good still.
    pub(crate) fn told(&self) -> Option<Result<(), String>> {
        self.told.as_ref().filter(|(at, _)| at.elapsed() < GOOD).map(|(_, answer)| answer.clone())
    }

    /// Keeps an answer.
    pub(crate) fn tell(&mut self, answer: Result<(), String>) -> Result<(), String> {
        self.told = Some((Instant::now(), answer.clone()));
        answer
    }
}

/// Whether the disk of that directory has room.
pub(crate) fn probe(directory: &Path) -> Result<(), String> {
    let write = || -> io::Result<()> {
        let path = directory.join(NAME);
        let mut file = OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&path)?;
        fs::remove_file(&path)?;
        file.write_all(&vec![0; SIZE])
    };
    write().map_err(|error| {
        format!(
            "its disk takes nothing ({error}), and attach and detach are refused; make room on the disk of {}",
            directory.display()
        )
    })
}
