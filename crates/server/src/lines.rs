//! Lines of watches, written once for all who are told the same.
//!
//! A thousand hosts in one network are told of a change in the same words: they are made, and compressed, once. Each
//! piece is a gzip member of its own (RFC 1952 §2.2), so pieces can be put together, and no connection needs a compressor
//! that remembers.
//!
//! Invariant: nothing here is one host's alone; what is goes past it.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::body::Bytes;
use flate2::Compression;
use flate2::write::GzEncoder;
use model::Revision;
use serde::Serialize;

use crate::view::{Scope, Touched};

/// How long a snapshot is kept for others who want the same.
const FRESH: Duration = Duration::from_secs(2);
/// How many different snapshots are kept.
const SNAPSHOTS: usize = 4;

/// Part of a line, or a whole one, in both forms.
#[derive(Debug, Clone)]
pub(crate) struct Piece {
    plain: Bytes,
    gzip: Bytes,
}

impl Piece {
    /// The value as JSON.
    pub(crate) fn json(value: &impl Serialize) -> Result<Self, serde_json::Error> {
        Ok(Self::new(serde_json::to_vec(value)?))
    }

    /// The value as a line of JSON.
    pub(crate) fn line(value: &impl Serialize) -> Result<Self, serde_json::Error> {
        let mut text = serde_json::to_vec(value)?;
        text.push(b'\n');
        Ok(Self::new(text))
    }

    /// This text.
    pub(crate) fn new(text: Vec<u8>) -> Self {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
        // Writing to memory does not fail.
        let gzip = encoder.write_all(&text).and_then(|()| encoder.finish()).unwrap_or_default();
        Self { plain: text.into(), gzip: gzip.into() }
    }

    /// Its bytes, compressed or not.
    pub(crate) fn bytes(&self, gzip: bool) -> Bytes {
        if gzip { self.gzip.clone() } else { self.plain.clone() }
    }
}

/// What was written lately.
#[derive(Debug, Default)]
pub(crate) struct Lines {
    deltas: Mutex<(Revision, BTreeMap<Touched, Arc<Piece>>)>,
    snapshots: Mutex<Vec<Snapshot>>,
}

#[derive(Debug, Clone)]
struct Snapshot {
    made: Instant,
    revision: Revision,
    scope: Scope,
    objects: Arc<Piece>,
}

impl Lines {
    /// The line that tells what was touched at this revision.
    pub(crate) fn delta(
        &self,
        revision: Revision,
        touched: &Touched,
        write: impl FnOnce() -> Result<Piece, serde_json::Error>,
    ) -> Result<Arc<Piece>, serde_json::Error> {
        let mut deltas = self.deltas.lock().unwrap_or_else(PoisonError::into_inner);
        if deltas.0 != revision {
            *deltas = (revision, BTreeMap::new());
        }
        if let Some(line) = deltas.1.get(touched) {
            return Ok(line.clone());
        }
        let line = Arc::new(write()?);
        deltas.1.insert(touched.clone(), line.clone());
        Ok(line)
    }

    /// A snapshot's objects as a JSON list.
    pub(crate) fn snapshot(
        &self,
        revision: Revision,
        scope: Scope,
        write: impl FnOnce() -> Result<Piece, serde_json::Error>,
    ) -> Result<Arc<Piece>, serde_json::Error> {
        // Held while it is written: the thousand others who want the same wait for it.
        let mut snapshots = self.snapshots.lock().unwrap_or_else(PoisonError::into_inner);
        snapshots.retain(|known| known.revision == revision);
        if let Some(known) = snapshots.iter().find(|known| known.scope == scope) {
            return Ok(known.objects.clone());
        }
        let objects = Arc::new(write()?);
        snapshots.truncate(SNAPSHOTS - 1);
        snapshots.insert(0, Snapshot { made: Instant::now(), revision, scope, objects: objects.clone() });
        Ok(objects)
    }

    /// Lets go of snapshots that nobody asked for lately.
    pub(crate) fn forget_old(&self) {
        let mut snapshots = self.snapshots.lock().unwrap_or_else(PoisonError::into_inner);
        snapshots.retain(|known| known.made.elapsed() < FRESH);
    }
}
