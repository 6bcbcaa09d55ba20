//! What an SA, or a worker, has done: written by workers, read by control at any time.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::Reason;

/// Counters on cache lines of their own, so that two workers do not slow each other.
#[derive(Debug, Default)]
#[repr(align(64))]
pub struct Counters {
    packets: AtomicU64,
    bytes: AtomicU64,
    drops: [AtomicU64; Reason::ALL.len()],
}

/// Counters at one moment. Packets and bytes are of inner packets that went through.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Inner packets.
    pub packets: u64,
    /// Bytes of inner packets, from their IP header on.
    pub bytes: u64,
    drops: [u64; Reason::ALL.len()],
}

impl Counters {
    /// All at zero.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds packets that went through, and returns how many packets and bytes there are now.
    #[inline]
    pub fn add(&self, packets: u64, bytes: u64) -> (u64, u64) {
        (self.packets.fetch_add(packets, Relaxed) + packets, self.bytes.fetch_add(bytes, Relaxed) + bytes)
    }

    /// Adds a dropped packet.
    #[cold]
    pub fn drop_packet(&self, reason: Reason) {
        self.drops[reason as usize].fetch_add(1, Relaxed);
    }

    /// What there is now. The fields are read one after another.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            packets: self.packets.load(Relaxed),
            bytes: self.bytes.load(Relaxed),
            drops: std::array::from_fn(|index| self.drops[index].load(Relaxed)),
        }
    }
}

impl Snapshot {
    /// Packets dropped for this reason.
    pub fn dropped(&self, reason: Reason) -> u64 {
        self.drops[reason as usize]
    }

    /// All reasons for which packets were dropped, with their number.
    pub fn drops(&self) -> impl Iterator<Item = (Reason, u64)> {
        Reason::ALL.into_iter().zip(self.drops).filter(|(_, count)| *count > 0)
    }
}
