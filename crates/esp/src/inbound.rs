//! The receiving side of an SA.

use std::{
    ops::Range,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
};

use packet::{esp, protocol};

use crate::{
    BadKey, Counters, InnerPolicy, KeyMaterial, Reason, Sequence, Snapshot, Spi, Suite, key::Key,
    window::Window,
};

/// An SA that opens. Made for one worker: its window is behind a lock that nobody else takes, once per batch, and
/// that keeps it right should packets of one SA come to two workers.
pub struct Inbound {
    key: Key,
    stopped: AtomicBool,
    window: Mutex<Window>,
    counters: Counters,
}

/// What was in an ESP packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Opened {
    /// An IP packet that the policy allows, in this range of the ESP packet's bytes. Padding for traffic flow
    /// confidentiality (RFC 4303 §2.7) is not in it.
    Packet(Range<usize>),
    /// A dummy (RFC 4303 §2.6): to be thrown away in silence.
    Dummy,
}

impl Inbound {
    /// A new SA with an empty window.
    pub fn new(spi: Spi, material: &KeyMaterial, sequence: Sequence) -> Result<Self, BadKey> {
        Ok(Self {
            key: Key::new(material, spi, sequence)?,
            stopped: AtomicBool::new(false),
            window: Mutex::new(Window::new()),
            counters: Counters::new(),
        })
    }

    /// Our SPI.
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

    /// What it has done so far, as of the last batch.
    pub fn counters(&self) -> Snapshot {
        self.counters.snapshot()
    }

    /// Ends it at once, for workers too that hold an old table.
    pub fn stop(&self) {
        self.stopped.store(true, Relaxed);
    }

    #[cfg(test)]
    pub(crate) fn set_window(&self, window: Window) {
        *self.window.lock().unwrap() = window;
    }

    /// Takes the window for a batch of packets. Control never does.
    #[inline]
    pub fn begin(&self) -> Receiver<'_> {
        let window = self.window.lock().unwrap_or_else(PoisonError::into_inner);
        Receiver { sa: self, window, packets: 0, bytes: 0 }
    }
}

impl std::fmt::Debug for Inbound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inbound")
            .field("spi", &self.spi())
            .field("suite", &self.suite())
            .field("sequence", &self.sequence())
            .finish_non_exhaustive()
    }
}

/// An inbound SA in the hands of a worker. Counts are added up when it is dropped.
#[derive(Debug)]
pub struct Receiver<'a> {
    sa: &'a Inbound,
    window: MutexGuard<'a, Window>,
    packets: u64,
    bytes: u64,
}

impl Receiver<'_> {
    /// Opens an ESP packet in place: from its SPI to its ICV, without the UDP header.
    ///
    /// # Errors
    /// Every reason is counted. After an error the bytes are of no use.
    #[inline]
    pub fn open(&mut self, packet: &mut [u8], policy: &InnerPolicy) -> Result<Opened, Reason> {
        self.try_open(packet, policy).inspect_err(|reason| self.sa.counters.drop_packet(*reason))
    }

    /// RFC 4303 §3.4, in its order.
    #[inline]
    fn try_open(&mut self, packet: &mut [u8], policy: &InnerPolicy) -> Result<Opened, Reason> {
        if packet.len() < esp::LEN_MIN {
            return Err(Reason::TooShort);
        }
        let key = &self.sa.key;
        let (head, sealed) = packet.split_at_mut(esp::HEAD_ROOM);
        let header = esp::Header::parse(head).map_err(|_| Reason::TooShort)?;
        if header.spi != key.spi().get() {
            return Err(Reason::UnknownSpi);
        }
        if self.sa.stopped.load(Relaxed) {
            return Err(Reason::Stopped);
        }

        let sequence = self.window.infer(header.sequence, key.sequence())?;
        self.window.check(sequence)?;
        if !key.open(sequence, esp::iv(head).ok_or(Reason::TooShort)?, sealed) {
            return Err(Reason::Authentication);
        }
        self.window.mark(sequence);

        let plain = &sealed[..sealed.len() - esp::ICV_LEN];
        let (inner, next_header) = esp::take_trailer(plain).map_err(|_| Reason::BadPadding)?;
        let length = match next_header {
            protocol::IPV4 => policy.check_v4(inner)?,
            protocol::IPV6 => policy.check_v6(inner)?,
            protocol::NONE => return Ok(Opened::Dummy),
            _ => return Err(Reason::BadNextHeader),
        };
        self.packets += 1;
        self.bytes += length as u64;
        Ok(Opened::Packet(esp::HEAD_ROOM..esp::HEAD_ROOM + length))
    }

    /// The highest sequence number received.
    pub fn highest(&self) -> u64 {
        self.window.top()
    }
}

impl Drop for Receiver<'_> {
    fn drop(&mut self) {
        self.sa.counters.add(self.packets, self.bytes);
    }
}
