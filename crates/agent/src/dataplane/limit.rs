//! How often something may happen: for each source address, for all together, and at most once a second.

use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

/// Addresses that are told apart; more of them share what they may do.
const SLOTS: usize = 1024;
const WINDOW: Duration = Duration::from_secs(1);

/// So many events a second from each source address. Its memory is fixed, and who shares a slot cannot be chosen from
/// outside.
pub(super) struct PerSource {
    slots: Box<[Slot]>,
    hasher: RandomState,
    each: u32,
}

/// So many events a second, whoever causes them.
pub(super) struct OfAll {
    slot: Slot,
    each: u32,
}

#[derive(Clone, Copy, Default)]
struct Slot {
    since: Option<Instant>,
    count: u32,
}

impl Slot {
    fn pass(&mut self, each: u32, now: Instant) -> bool {
        if self.since.is_none_or(|since| now.saturating_duration_since(since) >= WINDOW) {
            *self = Self { since: Some(now), count: 0 };
        }
        self.count = self.count.saturating_add(1);
        self.count <= each
    }
}

impl OfAll {
    pub fn new(each: u32) -> Self {
        Self { slot: Slot::default(), each }
    }

    /// Whether one more may pass.
    pub fn pass(&mut self, now: Instant) -> bool {
        self.slot.pass(self.each, now)
    }
}

impl PerSource {
    pub fn new(each: u32) -> Self {
        Self { slots: vec![Slot::default(); SLOTS].into(), hasher: RandomState::new(), each }
    }

    /// Whether one more may pass.
    pub fn pass(&mut self, source: IpAddr, now: Instant) -> bool {
        self.slots[self.hasher.hash_one(source) as usize % SLOTS].pass(self.each, now)
    }
}

/// Lets one pass a second, for whichever threads ask.
#[derive(Debug)]
pub(super) struct EverySecond {
    start: Instant,
    /// Milliseconds after the start from which the next may pass.
    next: AtomicU64,
}

impl EverySecond {
    pub fn new() -> Self {
        Self { start: Instant::now(), next: AtomicU64::new(0) }
    }

    pub fn pass(&self) -> bool {
        self.pass_at(Instant::now())
    }

    fn pass_at(&self, now: Instant) -> bool {
        let now = now.saturating_duration_since(self.start).as_millis() as u64;
        let next = now + WINDOW.as_millis() as u64;
        self.next.try_update(Relaxed, Relaxed, |from| (from <= now).then_some(next)).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_may_do_so_much_a_second_whatever_others_do() {
        let mut limit = PerSource::new(3);
        let start = Instant::now();
        let source = |last: u8| IpAddr::from([192, 0, 2, last]);
        let passed = |limit: &mut PerSource, at| (0..10).filter(|_| limit.pass(source(1), at)).count();
        assert_eq!(passed(&mut limit, start), 3);
        let others = (2..=200).filter(|last| limit.pass(source(*last), start)).count();
        assert!(others > 150, "only who shares a slot with others is held back: {others} of 199");
        assert_eq!(passed(&mut limit, start + WINDOW), 3);
        let mut all = OfAll::new(3);
        assert_eq!((0..10).filter(|_| all.pass(start)).count(), 3);
        assert!(all.pass(start + WINDOW));
    }

    #[test]
    fn one_passes_a_second() {
        let every = EverySecond::new();
        let at = |millis| every.start + Duration::from_millis(millis);
        assert!(every.pass_at(at(0)) && !every.pass_at(at(999)) && every.pass_at(at(1000)));
        assert!(!every.pass_at(at(1999)) && every.pass_at(at(5000)));
    }
}
