//! A capture of all that is on the underlay: which packets there are, and whether a given text is in any of them.
//!
//! ```text
//! caller ── report, write FILE ──▶ lab-capture, in the network namespace of the underlay
//!        ◀── a line of JSON ─────    AF_PACKET on all ports, each frame once, where it leaves a node
//! ```
//! Invariant: a report counts all frames that left a node before it was asked for; what the kernel had to drop is in
//! [`Report::missed`]. Memory is bounded, whatever comes.

mod look;
mod search;
mod sniff;

use std::fmt;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::enter::Door;
use super::{Lab, UNDERLAY};

pub use look::{Side, What};
pub(super) use sniff::main;

/// A capture that runs until it is dropped.
#[derive(Debug)]
pub struct Capture {
    child: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

/// What was seen.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// All frames, by where they come from and what they are.
    pub flows: Vec<Flow>,
    /// The first frames in which a text was.
    pub found: Vec<Found>,
    /// In how many frames a text was.
    pub finds: u64,
    /// Frames looked at; large ones count as one until the network card would cut them.
    pub frames: u64,
    /// Bytes looked at.
    pub bytes: u64,
    /// Frames that came faster than they were taken: nothing can be said of them.
    pub missed: u64,
    /// Frames of flows that came after the first few thousand flows.
    pub unlisted: u64,
}

/// Frames of one kind from one place to another.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Flow {
    /// The node that sent them, `nat1 inside` for a box's other side, or `underlay` for the bridge itself.
    pub node: String,
    /// Where they say they come from.
    pub source: Side,
    /// Where they go.
    pub destination: Side,
    /// What they are.
    pub what: What,
    /// How many.
    pub frames: u64,
    /// How long, with all headers.
    pub bytes: u64,
}

/// A frame in which a text was.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Found {
    /// Which text, by its number from 0.
    pub text: usize,
    /// The node that sent the frame.
    pub node: String,
    /// Where the frame says it comes from.
    pub source: Side,
    /// Where it goes.
    pub destination: Side,
    /// What it is.
    pub what: What,
}

impl Lab {
    /// Begins to look at everything on the underlay, also behind NAT boxes, for any of these texts. Comes back when
    /// nothing is missed any more.
    pub fn capture<S: AsRef<[u8]>>(&self, texts: &[S]) -> Result<Capture> {
        let mut command = self.enter(&Door::of(self.init_of(UNDERLAY)?));
        command.args(["lab-capture", "--control-port", &super::spec::SERVER_PORT.to_string(), "--"]);
        command.args(texts.iter().map(|text| search::hex(text.as_ref())));
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let (to, from) = (child.stdin.take(), child.stdout.take());
        let (to, from) = to.zip(from).context("the capture has no pipes")?;
        let mut capture = Capture { child, to, from: BufReader::new(from) };
        capture.report().context("the capture does not start")?;
        Ok(capture)
    }
}

impl Capture {
    /// What was seen until now.
    pub fn report(&mut self) -> Result<Report> {
        let line = self.ask("report")?;
        serde_json::from_str(&line).context("the capture's report cannot be read")
    }

    /// Writes the last frames, and those in which a text was, as a pcap file.
    pub fn write(&mut self, file: &Path) -> Result<()> {
        let file = std::path::absolute(file)?;
        let answer = self.ask(&format!("write {}", file.display()))?;
        let answer = answer.trim();
        ensure!(answer == sniff::WRITTEN, "{} was not written: {answer}", file.display());
        Ok(())
    }

    fn ask(&mut self, what: &str) -> Result<String> {
        writeln!(self.to, "{what}").context("the capture has ended")?;
        let mut line = String::new();
        self.from.read_line(&mut line)?;
        ensure!(line.ends_with('\n'), "the capture has ended");
        Ok(line)
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        super::process::put_down(&mut self.child);
    }
}

impl Report {
    /// Whether every frame was looked at and none had any of the texts in it; if not, why.
    pub fn clean(&self) -> Result<()> {
        ensure!(
            self.missed == 0,
            "{} frames came faster than the capture took them: nothing can be said of them",
            self.missed
        );
        let first: Vec<String> = self.found.iter().map(ToString::to_string).collect();
        ensure!(self.finds == 0, "{} frames have a text in clear: {}", self.finds, first.join("; "));
        Ok(())
    }

    /// How many frames there are of flows for which this is so.
    pub fn count(&self, mut which: impl FnMut(&Flow) -> bool) -> u64 {
        self.flows.iter().filter(|flow| which(flow)).map(|flow| flow.frames).sum()
    }

    /// The frames since an earlier report of the same capture.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let before = |flow: &Flow| {
            let same = |old: &&Flow| {
                (&old.node, old.source, old.destination, old.what)
                    == (&flow.node, flow.source, flow.destination, flow.what)
            };
            earlier.flows.iter().find(same).map_or((0, 0), |old| (old.frames, old.bytes))
        };
        let rest = self.flows.iter().filter_map(|flow| {
            let (frames, bytes) = before(flow);
            let rest = Flow { frames: flow.frames - frames, bytes: flow.bytes - bytes, ..flow.clone() };
            (rest.frames > 0).then_some(rest)
        });
        Self {
            flows: rest.collect(),
            found: self.found.iter().skip(earlier.found.len()).cloned().collect(),
            finds: self.finds - earlier.finds,
            frames: self.frames - earlier.frames,
            bytes: self.bytes - earlier.bytes,
            missed: self.missed - earlier.missed,
            unlisted: self.unlisted - earlier.unlisted,
        }
    }
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { node, source, destination, what, .. } = self;
        write!(f, "{what} of {node}, {source} to {destination}")
    }
}

/// As a table, without ARP and the like.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rows = vec![["FROM", "SOURCE", "DESTINATION", "WHAT", "FRAMES", "BYTES"].map(str::to_owned)];
        for flow in self.flows.iter().filter(|flow| !flow.what.is_local()) {
            rows.push([
                flow.node.clone(),
                flow.source.to_string(),
                flow.destination.to_string(),
                flow.what.to_string(),
                flow.frames.to_string(),
                flow.bytes.to_string(),
            ]);
        }
        let mut widths = [0; 6];
        for row in &rows {
            for (width, cell) in widths.iter_mut().zip(row) {
                *width = cell.len().max(*width);
            }
        }
        for row in &rows {
            let cells = row.iter().zip(widths).enumerate();
            let cells: Vec<String> = cells
                .map(
                    |(i, (cell, width))| {
                        if i < 4 { format!("{cell:width$}") } else { format!("{cell:>width$}") }
                    },
                )
                .collect();
            writeln!(f, "{}", cells.join("  "))?;
        }
        if self.unlisted > 0 {
            writeln!(f, "and {} frames of more flows", self.unlisted)?;
        }
        Ok(())
    }
}
