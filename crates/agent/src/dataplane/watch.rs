//! Waiting for descriptors: a bounded spin, then epoll.
//!
//! A source is active from when epoll names it until it was found dry so many times in a row. Active ones are read
//! without asking; when all are dry, the thread yields and tries again a few times before it sleeps (measured: half the
//! latency and a fifth more throughput for less CPU than it costs to wake up; a hundred tries are worse than none). One that
//! was woken after a long sleep does not: what comes now and then, such as the pings of idle peers, comes alone.
//!
//! A flood of small packets would wake the thread for each: that costs whoever sends them more than the packet does, and each
//! goes on alone. A thread that is woken again and again for little takes naps, from which nobody wakes it, for as long as
//! each nap brings several packets: what network cards call interrupt moderation.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::dataplane::Error;

/// Empty reads after which a source is left to epoll while others are active.
const DRY: u32 = 64;
/// Rounds with work, or bytes of it, after which epoll is asked for sources that are not active.
const ASK_EVERY: u32 = 16;
const ASK_EVERY_BYTES: usize = 128 << 10;
/// Woken after less than this, with less than so many bytes to show for it, so many times in a row: from then on, naps. They
/// last so long, and end when one brings fewer packets than that; or so many that the queue may have been full.
const HASTE: Duration = Duration::from_micros(20);
const HASTE_BYTES: usize = 16 << 10;
const HASTES: u32 = 8;
const NAP: Duration = Duration::from_micros(100);
const NAP_WORTH: std::ops::Range<usize> = 4..24;
/// A sleep that was longer is no pause between two packets that belong together.
const PAUSE: Duration = Duration::from_micros(500);
const EVENTS: usize = 64;
const WAKER: u64 = u64::MAX;

/// Wakes a [`Watch`] from other threads.
#[derive(Debug, Clone)]
pub(super) struct Waker(Arc<EventFd>);

impl Waker {
    pub fn wake(&self) {
        // Fails only when it is woken already, 2^64 - 2 times.
        let _ = self.0.write(1);
    }
}

/// What came of a visit to a source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Work {
    /// So many packets and bytes were there; maybe there are more.
    Done(usize, usize),
    /// Nothing is there.
    Dry,
    /// Nothing will ever be there again: the source is no longer watched.
    Gone,
}

/// Sources of work, each with its value.
pub(super) struct Watch<T> {
    epoll: Epoll,
    waker: Waker,
    sources: Vec<Source<T>>,
    events: [EpollEvent; EVENTS],
    next_token: u64,
    rounds: u32,
    /// Bytes since epoll was asked.
    unasked: usize,
    idle: u32,
    /// Tries after the last success before the thread sleeps.
    spin: u32,
    /// The last sleep was short: it is worth trying again.
    busy: bool,
    /// Packets and bytes since the last rest.
    packets: usize,
    bytes: usize,
    /// Times in a row that it was woken soon and for little.
    hastes: u32,
}

struct Source<T> {
    token: u64,
    value: T,
    active: bool,
    dry: u32,
}

impl<T: AsFd> Watch<T> {
    pub fn new(spin: u32) -> Result<Self, Error> {
        let failed =
            |attempted: &'static str| move |error: Errno| Error::Kernel { attempted, error: error.into() };
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).map_err(failed("make an event poll"))?;
        let waker = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)
            .map_err(failed("make an event counter"))?;
        epoll
            .add(&waker, EpollEvent::new(EpollFlags::EPOLLIN, WAKER))
            .map_err(failed("watch an event counter"))?;
        Ok(Self {
            epoll,
            waker: Waker(Arc::new(waker)),
            sources: Vec::new(),
            events: [EpollEvent::empty(); EVENTS],
            next_token: 0,
            rounds: 0,
            unasked: 0,
            idle: 0,
            spin,
            busy: true,
            packets: 0,
            bytes: 0,
            hastes: 0,
        })
    }

    pub fn waker(&self) -> Waker {
        self.waker.clone()
    }

    /// Watches one more. It begins active: what it has may have been there before.
    pub fn add(&mut self, value: T) -> Result<(), Error> {
        let token = self.next_token;
        self.next_token += 1;
        self.epoll
            .add(&value, EpollEvent::new(EpollFlags::EPOLLIN, token))
            .map_err(|error| Error::Kernel { attempted: "watch a device or socket", error: error.into() })?;
        self.sources.push(Source { token, value, active: true, dry: 0 });
        Ok(())
    }

    /// Watches no longer what `keep` refuses.
    pub fn retain(&mut self, mut keep: impl FnMut(&T) -> bool) {
        let epoll = &self.epoll;
        self.sources.retain(|source| {
            let kept = keep(&source.value);
            if !kept {
                // It may be closed already, which ends the watch too.
                let _ = epoll.delete(&source.value);
            }
            kept
        });
    }

    pub fn values(&self) -> impl Iterator<Item = &T> {
        self.sources.iter().map(|source| &source.value)
    }

    /// Visits all active sources once, and says whether any had something.
    pub fn round(&mut self, mut visit: impl FnMut(&T) -> Work) -> bool {
        let (mut worked, mut gone) = (false, false);
        for source in self.sources.iter_mut().filter(|source| source.active) {
            match visit(&source.value) {
                Work::Done(packets, bytes) => {
                    source.dry = 0;
                    worked = true;
                    self.packets += packets;
                    self.bytes += bytes;
                    self.unasked += bytes;
                }
                Work::Dry => {
                    source.dry += 1;
                    source.active = source.dry < DRY;
                }
                Work::Gone => {
                    source.active = false;
                    source.dry = u32::MAX;
                    gone = true;
                }
            }
        }
        if gone {
            for source in self.sources.iter().filter(|source| source.dry == u32::MAX) {
                let _ = self.epoll.delete(&source.value);
            }
            self.sources.retain(|source| source.dry != u32::MAX);
        }
        worked
    }

    /// Between two rounds: returns at once after work, soon after little, and else when there is some, when woken, or
    /// after `timeout`.
    pub fn rest(&mut self, worked: bool, timeout: Option<Duration>) {
        if worked {
            self.idle = 0;
            self.rounds += 1;
            if self.rounds >= ASK_EVERY || self.unasked >= ASK_EVERY_BYTES {
                (self.rounds, self.unasked) = (0, 0);
                self.ask(EpollTimeout::ZERO);
            }
            return;
        }
        if self.hastes >= HASTES && self.nap() {
            return;
        }
        if self.busy && self.idle < self.spin {
            self.idle += 1;
            std::thread::yield_now();
        } else {
            self.idle = 0;
            let little = std::mem::take(&mut self.bytes) < HASTE_BYTES;
            self.packets = 0;
            for source in &mut self.sources {
                source.active = false;
            }
            let timeout = timeout.map_or(EpollTimeout::NONE, |timeout| {
                EpollTimeout::try_from(timeout).unwrap_or(EpollTimeout::MAX)
            });
            let slept = Instant::now();
            self.ask(timeout);
            let slept = slept.elapsed();
            self.busy = slept < PAUSE;
            self.hastes = if little && slept < HASTE { self.hastes + 1 } else { 0 };
        }
    }

    /// Sleeps for a moment, unless the last such sleep was not worth it.
    fn nap(&mut self) -> bool {
        let (packets, bytes) = (std::mem::take(&mut self.packets), std::mem::take(&mut self.bytes));
        let first = self.hastes == HASTES;
        if !first && (!NAP_WORTH.contains(&packets) || bytes >= HASTE_BYTES) {
            self.hastes = 0;
            return false;
        }
        self.hastes = HASTES + 1;
        std::thread::sleep(NAP);
        // What came meanwhile elsewhere does not wait for longer.
        self.ask(EpollTimeout::ZERO);
        true
    }

    fn ask(&mut self, timeout: EpollTimeout) {
        // Interrupted is as good as nothing: the caller comes again.
        let count = self.epoll.wait(&mut self.events, timeout).unwrap_or(0);
        for event in &self.events[..count] {
            if event.data() == WAKER {
                let _ = self.waker.0.read();
            } else if let Some(source) = self.sources.iter_mut().find(|source| source.token == event.data()) {
                source.active = true;
                source.dry = 0;
            }
        }
    }
}
