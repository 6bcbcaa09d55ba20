//! How large an inner packet gets through to a peer (RFC 4821 in spirit): pings of growing and shrinking size that may
//! not be cut.
//!
//! An underlay that says how much it takes is believed, and then tried. One that drops large packets without a word, a
//! black hole, is found by halving. Nothing is concluded while small pings are lost too.

use std::time::{Duration, Instant};

use model::MTU_MIN;

/// How long a ping of a size is waited for.
const WAIT: Duration = Duration::from_millis(700);
/// How many of a size have to be lost before it counts as too large.
const TRIES: u32 = 3;
/// ESP pads to four bytes: no use in looking closer.
const STEP: u32 = 4;
/// How often more than what is known is tried, where it is less than the network's MTU (RFC 4821 §7.8).
const RAISE: Duration = Duration::from_mins(10);

/// The search for one peer.
#[derive(Debug)]
pub(super) struct Search {
    /// What the network would send.
    wanted: u32,
    /// The largest that got through.
    good: u32,
    /// The smallest that did not.
    bad: Option<u32>,
    /// What the underlay said that it takes, as inner packet.
    said: Option<u32>,
    trying: Option<Try>,
    /// Done; look again then.
    settled: Option<Instant>,
    raise_at: Instant,
}

#[derive(Debug)]
struct Try {
    size: u32,
    /// Those of this size that were sent.
    numbers: Vec<u32>,
    at: Option<Instant>,
}

impl Search {
    /// A search from scratch for a network whose MTU is `wanted` bytes.
    pub(super) fn new(wanted: u32, now: Instant) -> Self {
        Self { wanted, good: 0, bad: None, said: None, trying: None, settled: None, raise_at: now + RAISE }
    }

    /// The MTU that it was begun for.
    pub(super) fn wanted(&self) -> u32 {
        self.wanted
    }

    /// The size of a ping to send now, if one is due; what is known is tried `again` after so long. Small pings are answered at
    /// present.
    pub(super) fn due(&mut self, again: Duration, now: Instant) -> Option<u32> {
        if let Some(attempt) = &self.trying {
            if attempt.at.is_some_and(|at| now.saturating_duration_since(at) < WAIT) {
                return None;
            }
            if (attempt.numbers.len() as u32) < TRIES {
                return Some(attempt.size);
            }
            let size = attempt.size;
            self.trying = None;
            self.failed(size);
        }
        if let Some(at) = self.settled {
            if at > now {
                return None;
            }
            self.settled = None;
            if self.limited() && self.raise_at <= now {
                self.raise_at = now + RAISE;
                (self.bad, self.said) = (None, None);
            } else {
                return Some(self.try_size(self.good.max(MTU_MIN)));
            }
        }
        match self.next() {
            Some(size) => Some(self.try_size(size)),
            None => {
                self.settled = Some(now + again);
                None
            }
        }
    }

    fn try_size(&mut self, size: u32) -> u32 {
        self.trying = Some(Try { size, numbers: Vec::new(), at: None });
        size
    }

    fn failed(&mut self, size: u32) {
        if size <= self.good {
            // What got through before does not any more: the path is another.
            self.good = 0;
        }
        self.bad = Some(size);
    }

    /// The next size to learn from; `None` when enough is known.
    fn next(&self) -> Option<u32> {
        match self.bad {
            None if self.good >= self.wanted => None,
            None => Some(self.wanted),
            Some(bad) => {
                let low = self.good.max(MTU_MIN - STEP);
                let said = self.said.filter(|said| (low + 1..bad).contains(said));
                said.or_else(|| (bad - low > STEP).then(|| low + (bad - low) / 2))
            }
        }
    }

    /// A ping of the size that was due has gone out.
    pub(super) fn sent(&mut self, number: u32, now: Instant) {
        if let Some(attempt) = &mut self.trying {
            attempt.numbers.push(number);
            attempt.at = Some(now);
        }
    }

    /// An answer came; false if it is to no ping of these.
    pub(super) fn answered(&mut self, number: u32) -> bool {
        let Some(attempt) = self.trying.take_if(|attempt| attempt.numbers.contains(&number)) else {
            return false;
        };
        self.good = self.good.max(attempt.size);
        if self.bad.is_some_and(|bad| bad <= self.good) {
            self.bad = None;
        }
        true
    }

    /// The underlay said that inner packets larger than `inner` bytes do not pass.
    pub(super) fn too_big(&mut self, inner: u32, now: Instant) {
        if inner >= self.wanted || self.said == Some(inner) {
            return;
        }
        self.said = Some(inner);
        self.good = self.good.min(inner);
        self.bad = Some(self.bad.map_or(inner + 1, |bad| bad.min(inner + 1)));
        self.trying = None;
        self.settled = None;
        self.raise_at = now + RAISE;
    }

    /// The path is another: what is known of it may be wrong.
    pub(super) fn restart(&mut self, now: Instant) {
        *self = Self::new(self.wanted, now);
    }

    /// The largest inner packet that is known to pass.
    pub(super) fn known(&self) -> Option<u32> {
        (self.good > 0).then_some(self.good)
    }

    /// What larger packets are to be refused with; `None` while the network's own MTU passes, or nothing is known yet.
    pub(super) fn limit(&self) -> Option<u32> {
        match (self.limited(), self.said) {
            (true, _) => Some(self.good),
            (false, said) => said,
        }
    }

    /// Whether large packets vanish without a word.
    pub(super) fn black_hole(&self) -> bool {
        self.limited() && self.said.is_none_or(|said| said > self.good + STEP)
    }

    /// Enough is known, and it is less than wanted.
    fn limited(&self) -> bool {
        self.good > 0 && self.bad.is_some() && self.next().is_none()
    }

    /// Whether the next ping is due within moments. What is known and tried again is not: of a thousand peers one is always.
    pub(super) fn busy(&self) -> bool {
        let known = |attempt: &Try| attempt.size <= self.good && attempt.numbers.len() <= 1;
        self.settled.is_none() && !self.trying.as_ref().is_some_and(known)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const AGAIN: Duration = Duration::from_secs(30);

    struct Story {
        search: Search,
        now: Instant,
        number: u32,
        pings: u32,
    }

    impl Story {
        fn new(wanted: u32) -> Self {
            let now = Instant::now();
            Self { search: Search::new(wanted, now), now, number: 0, pings: 0 }
        }

        /// A path that lets `passes` bytes through, and says so or not.
        fn run(&mut self, span: Duration, passes: u32, says: bool) {
            let end = self.now + span;
            while self.now < end {
                if let Some(size) = self.search.due(AGAIN, self.now) {
                    self.pings += 1;
                    self.number += 1;
                    self.search.sent(self.number, self.now);
                    if size <= passes {
                        assert!(self.search.answered(self.number));
                    } else if says {
                        self.search.too_big(passes, self.now);
                    }
                }
                self.now += Duration::from_millis(100);
            }
        }
    }

    const MINUTE: Duration = Duration::from_mins(1);

    #[test]
    fn where_everything_passes_one_ping_says_so_and_nothing_is_limited() {
        let mut story = Story::new(1438);
        story.run(Duration::from_secs(1), 9000, false);
        assert_eq!(story.pings, 1);
        assert_eq!((story.search.known(), story.search.limit()), (Some(1438), None));
        assert!(!story.search.black_hole() && !story.search.busy());
    }

    #[test]
    fn a_black_hole_is_found_to_four_bytes_within_half_a_minute() {
        for passes in [576, 1280, 1351, 1437] {
            let mut story = Story::new(1438);
            story.run(MINUTE / 2, passes, false);
            let known = story.search.known().unwrap();
            assert!(known <= passes && passes - known <= STEP, "{known} of {passes}");
            assert_eq!(story.search.limit(), Some(known));
            assert!(story.search.black_hole());
        }
    }

    #[test]
    fn an_underlay_that_says_what_it_takes_is_believed_at_once_and_is_no_black_hole() {
        let mut story = Story::new(1438);
        story.run(Duration::from_secs(1), 1338, true);
        assert_eq!((story.search.known(), story.search.limit()), (Some(1338), Some(1338)));
        assert!(!story.search.black_hole());
    }

    #[test]
    fn a_path_that_narrows_and_widens_again_is_followed() {
        let mut story = Story::new(1438);
        story.run(MINUTE, 1438, false);
        story.run(2 * MINUTE, 1300, false);
        assert!(story.search.black_hole());
        assert!((1296..=1300).contains(&story.search.limit().unwrap()));
        story.run(11 * MINUTE, 1438, false);
        assert_eq!((story.search.known(), story.search.limit()), (Some(1438), None));
        let before = story.pings;
        story.run(10 * MINUTE, 1438, false);
        assert!(story.pings - before <= 21, "{} pings in ten quiet minutes", story.pings - before);
    }

    #[test]
    fn a_lost_ping_or_two_mean_nothing() {
        let mut story = Story::new(1438);
        story.run(MINUTE, 1438, false);
        let size = loop {
            story.now += Duration::from_secs(1);
            if let Some(size) = story.search.due(AGAIN, story.now) {
                break size;
            }
        };
        story.search.sent(900, story.now);
        assert!(!story.search.busy(), "what is known is tried again without a hurry");
        story.now += Duration::from_secs(1);
        assert_eq!(story.search.due(AGAIN, story.now), Some(size));
        story.search.sent(901, story.now);
        assert!(story.search.busy(), "unless that is lost");
        assert!(story.search.answered(900), "late, and good enough");
        assert_eq!(story.search.limit(), None);
    }
}
