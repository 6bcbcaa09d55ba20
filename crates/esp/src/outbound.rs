//! The sending side of an SA.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};

use packet::{esp, protocol};

use crate::{BadKey, Counters, KeyMaterial, Reason, Sequence, Snapshot, Spi, Suite, key::Key};

/// When an SA should be replaced, and when it must end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// [`Outbound::wants_rekey`] after so many packets.
    pub soft_packets: u64,
    /// And after so many bytes of inner packets.
    pub soft_bytes: u64,
    /// Nothing is sealed after so many packets. The end of the sequence numbers is a limit of its own.
    pub hard_packets: u64,
}

impl Limits {
    /// Rekey with a quarter of the sequence numbers left, and no other limit.
    pub fn of(sequence: Sequence) -> Self {
        let last = last(sequence);
        Self { soft_packets: last - last / 4, soft_bytes: u64::MAX, hard_packets: last }
    }
}

/// The last number that is used: after it the counter would come round (RFC 4303 §3.3.3).
fn last(sequence: Sequence) -> u64 {
    match sequence {
        Sequence::Short => u32::MAX.into(),
        Sequence::Extended => u64::MAX - 1,
    }
}

/// The next number, on a cache line that only the sealing worker writes.
#[derive(Debug)]
#[repr(align(64))]
struct Next(AtomicU64);

/// An SA that seals. Made for one worker; should two use it at once, it stays right.
pub struct Outbound {
    key: Key,
    limits: Limits,
    last: u64,
    stopped: AtomicBool,
    wants_rekey: AtomicBool,
    next: Next,
    counters: Counters,
}

impl Outbound {
    /// A new SA, whose first packet has number 1. Keys must never have been used before.
    pub fn new(spi: Spi, material: &KeyMaterial, sequence: Sequence, limits: Limits) -> Result<Self, BadKey> {
        Self::starting_at(1, spi, material, sequence, limits)
    }

    /// As [`Outbound::new`], for tests that cannot wait for 2^32 packets.
    pub(crate) fn starting_at(
        first: u64,
        spi: Spi,
        material: &KeyMaterial,
        sequence: Sequence,
        limits: Limits,
    ) -> Result<Self, BadKey> {
        Ok(Self {
            key: Key::new(material, spi, sequence)?,
            limits,
            last: limits.hard_packets.min(last(sequence)),
            stopped: AtomicBool::new(false),
            wants_rekey: AtomicBool::new(false),
            next: Next(AtomicU64::new(first)),
            counters: Counters::new(),
        })
    }

    /// The SPI at the peer.
    pub fn spi(&self) -> Spi {
        self.key.spi()
    }

    /// The cipher.
    pub fn suite(&self) -> Suite {
        self.key.suite()
    }

    /// The kind of sequence numbers.
    pub fn sequence(&self) -> Sequence {
        self.key.sequence()
    }

    /// What it has done so far.
    pub fn counters(&self) -> Snapshot {
        self.counters.snapshot()
    }

    /// Whether a soft limit has been passed. Stays so.
    pub fn wants_rekey(&self) -> bool {
        self.wants_rekey.load(Relaxed)
    }

    /// Ends it at once, for workers too that hold an old table.
    pub fn stop(&self) {
        self.stopped.store(true, Relaxed);
    }

    /// Takes sequence numbers for at most `packets` packets. Those not used are skipped, which costs nothing but
    /// the numbers.
    ///
    /// # Errors
    /// [`Reason::Exhausted`] when none is left, [`Reason::Stopped`] after [`Outbound::stop`]; both are counted.
    #[inline]
    pub fn begin(&self, packets: u32) -> Result<Burst<'_>, Reason> {
        let mut error = Reason::Exhausted;
        if self.stopped.load(Relaxed) {
            error = Reason::Stopped;
        } else {
            let end = |first: u64| first.saturating_add(packets.into()).min(self.last.saturating_add(1));
            let taken =
                self.next.0.try_update(Relaxed, Relaxed, |first| (first <= self.last).then(|| end(first)));
            if let Ok(first) = taken {
                return Ok(Burst { sa: self, next: first, end: end(first), packets: 0, bytes: 0 });
            }
        }
        self.counters.drop_packet(error);
        Err(error)
    }
}

impl std::fmt::Debug for Outbound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Outbound")
            .field("spi", &self.spi())
            .field("suite", &self.suite())
            .field("sequence", &self.sequence())
            .field("next", &self.next.0)
            .finish_non_exhaustive()
    }
}

/// Sequence numbers that were taken, to be used one by one. Counts are added up when it is dropped.
#[derive(Debug)]
pub struct Burst<'a> {
    sa: &'a Outbound,
    next: u64,
    end: u64,
    packets: u64,
    bytes: u64,
}

impl Burst<'_> {
    /// Packets that can still be sealed.
    pub fn left(&self) -> u64 {
        self.end - self.next
    }

    /// Seals the IP packet of `inner` bytes that begins at [`esp::HEAD_ROOM`] of `buffer`, in place, and returns the
    /// length of the ESP packet, which begins at 0: [`esp::sealed_len`] of `inner`. The buffer must be so long; what
    /// lies after the inner packet is overwritten.
    ///
    /// # Errors
    /// [`Reason::Exhausted`] when the burst is used up, [`Reason::NoRoom`], and [`Reason::BadInner`] for what is not
    /// an IP packet. All are counted, and none uses up a sequence number.
    #[inline]
    pub fn seal(&mut self, buffer: &mut [u8], inner: usize) -> Result<usize, Reason> {
        self.try_seal(buffer, inner).inspect_err(|reason| self.sa.counters.drop_packet(*reason))
    }

    #[inline]
    fn try_seal(&mut self, buffer: &mut [u8], inner: usize) -> Result<usize, Reason> {
        // A UDP datagram could not carry more, and the lengths below cannot overflow.
        if inner > usize::from(u16::MAX) {
            return Err(Reason::NoRoom);
        }
        let length = esp::sealed_len(inner);
        let buffer = buffer.get_mut(..length).ok_or(Reason::NoRoom)?;
        let next_header = match buffer[esp::HEAD_ROOM] >> 4 {
            4 if inner > 0 => protocol::IPV4,
            6 if inner > 0 => protocol::IPV6,
            _ => return Err(Reason::BadInner),
        };
        if self.next == self.end {
            return Err(Reason::Exhausted);
        }
        let sequence = self.next;
        self.next += 1;
        let (head, rest) = buffer.split_at_mut(esp::HEAD_ROOM);
        let (plain, icv) = rest.split_at_mut(rest.len() - esp::ICV_LEN);
        // The counter itself is the IV: unique for the key, as RFC 4106 §3.1 asks.
        let iv = sequence.to_be_bytes();
        let header = esp::Header { spi: self.sa.spi().get(), sequence: sequence as u32 };
        head[..esp::HEADER_LEN].copy_from_slice(&header.emit());
        head[esp::HEADER_LEN..].copy_from_slice(&iv);
        esp::put_trailer(plain, inner, next_header).ok_or(Reason::NoRoom)?;
        if !self.sa.key.seal(sequence, iv, plain, icv) {
            return Err(Reason::NoRoom);
        }
        self.packets += 1;
        self.bytes += inner as u64;
        Ok(length)
    }
}

impl Drop for Burst<'_> {
    fn drop(&mut self) {
        let sa = self.sa;
        let (_, bytes) = sa.counters.add(self.packets, self.bytes);
        // Numbers, not packets: those that were skipped are gone too.
        if self.next > sa.limits.soft_packets || bytes >= sa.limits.soft_bytes {
            sa.wants_rekey.store(true, Relaxed);
        }
    }
}
