//! Message ids, windows of one, and retransmission (RFC 7296 §2.1 to §2.3).
//!
//! Invariant: at most one request of ours is under way; the peer's requests are answered in order, each once, and a
//! request seen again gets the same bytes again.

use std::time::{Duration, Instant};

use crate::config::Timing;

/// The two windows of one IKE SA.
#[derive(Debug, Default)]
pub(crate) struct Window {
    /// The id of our next request.
    next: u32,
    outgoing: Option<Outgoing>,
    /// The id of the peer's next request.
    expected: u32,
    /// The answer to the peer's last request, for when it asks again.
    answer: Vec<Vec<u8>>,
}

/// Our request under way.
#[derive(Debug)]
struct Outgoing {
    id: u32,
    datagrams: Vec<Vec<u8>>,
    sent: u32,
    wait: Duration,
    again: Instant,
}

/// What a request's id says of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Seen {
    /// It is the next: process it.
    New,
    /// It is the last one again: send the same answer again.
    Again,
    /// It is older, or beyond the window: drop it.
    Outside,
}

/// What is to be done about a request that has no answer yet.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Due<'a> {
    /// Nothing yet.
    Nothing,
    /// Send these again.
    Resend(&'a [Vec<u8>]),
    /// It has been sent often enough: the peer is gone (RFC 7296 §2.4).
    GiveUp,
}

impl Window {
    /// The windows after a first exchange that took id 0 in one direction: `IKE_SA_INIT`.
    pub(crate) fn next_id(&self) -> u32 {
        self.next
    }

    /// The id of our request under way.
    pub(crate) fn outstanding(&self) -> Option<u32> {
        self.outgoing.as_ref().map(|outgoing| outgoing.id)
    }

    /// A request of ours goes out under [`Self::next_id`].
    pub(crate) fn sent(&mut self, datagrams: Vec<Vec<u8>>, timing: &Timing, now: Instant) {
        let wait = timing.retransmit_first;
        self.outgoing = Some(Outgoing { id: self.next, datagrams, sent: 1, wait, again: now + wait });
        self.next = self.next.wrapping_add(1);
    }

    /// The id that the peer's next request has.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn expected(&self) -> u32 {
        self.expected
    }

    /// The answer to our request came. False if that request is not under way (any more).
    pub(crate) fn answered(&mut self, id: u32) -> bool {
        let ours = self.outstanding() == Some(id);
        if ours {
            self.outgoing = None;
        }
        ours
    }

    /// Our request is sent again from the start, under the same id: an `IKE_SA_INIT` with a cookie or another key
    /// share (RFC 7296 §2.6).
    pub(crate) fn restart(&mut self) {
        self.outgoing = None;
        self.next = 0;
    }

    /// Our request under way is forgotten.
    pub(crate) fn forget(&mut self) {
        self.outgoing = None;
    }

    /// When [`Self::due`] may have something to say.
    pub(crate) fn timeout(&self) -> Option<Instant> {
        self.outgoing.as_ref().map(|outgoing| outgoing.again)
    }

    /// What is to be done about our request now. `tries` counts the first send.
    pub(crate) fn due(&mut self, tries: u32, timing: &Timing, now: Instant) -> Due<'_> {
        let Some(outgoing) = self.outgoing.as_mut().filter(|outgoing| outgoing.again <= now) else {
            return Due::Nothing;
        };
        if outgoing.sent >= tries {
            return Due::GiveUp;
        }
        outgoing.sent += 1;
        outgoing.wait = (outgoing.wait * 2).min(timing.retransmit_max);
        outgoing.again = now + outgoing.wait;
        Due::Resend(&outgoing.datagrams)
    }

    /// Our request again, at once, because there is reason to hope (traffic waits, or our address changed). At most
    /// once in `retransmit_first`.
    pub(crate) fn hurry(&mut self, timing: &Timing, now: Instant) -> Option<&[Vec<u8>]> {
        let outgoing = self.outgoing.as_mut()?;
        let last = outgoing.again.checked_sub(outgoing.wait)?;
        if now.saturating_duration_since(last) < timing.retransmit_first {
            return None;
        }
        outgoing.wait = timing.retransmit_first;
        outgoing.again = now + outgoing.wait;
        Some(&outgoing.datagrams)
    }

    /// What the peer's request `id` is to us.
    pub(crate) fn seen(&self, id: u32) -> Seen {
        if id == self.expected {
            Seen::New
        } else if id.wrapping_add(1) == self.expected {
            Seen::Again
        } else {
            Seen::Outside
        }
    }

    /// The peer's request was answered so; returns the answer to send.
    pub(crate) fn reply(&mut self, answer: Vec<Vec<u8>>) -> &[Vec<u8>] {
        self.expected = self.expected.wrapping_add(1);
        self.answer = answer;
        &self.answer
    }

    /// The answer to the peer's last request.
    pub(crate) fn last_answer(&self) -> &[Vec<u8>] {
        &self.answer
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "an Instant can only be had from the clock")]
mod tests {
    use super::*;

    fn sent(now: Instant) -> (Window, Timing) {
        let (mut window, timing) = (Window::default(), Timing::default());
        window.sent(vec![vec![1]], &timing, now);
        (window, timing)
    }

    #[test]
    fn a_request_is_sent_again_with_growing_waits_until_it_is_given_up() {
        let now = Instant::now();
        let (mut window, timing) = sent(now);
        let mut at = Vec::new();
        for tick in 0..600u64 {
            let then = now + Duration::from_millis(tick * 100);
            match window.due(5, &timing, then) {
                Due::Nothing => {}
                Due::Resend(datagrams) => {
                    assert_eq!(datagrams, [vec![1]]);
                    at.push(tick * 100);
                }
                Due::GiveUp => {
                    assert_eq!(at, [500, 1500, 3500, 5500]);
                    return;
                }
            }
        }
        panic!("never given up");
    }

    #[test]
    fn only_the_answer_to_the_request_under_way_counts_and_only_once() {
        let (mut window, _) = sent(Instant::now());
        assert!(!window.answered(1));
        assert!(window.answered(0));
        assert!(!window.answered(0));
        assert_eq!(window.next_id(), 1);
    }

    #[test]
    fn the_last_request_seen_again_gets_the_same_answer_and_older_ones_none() {
        let mut window = Window::default();
        assert_eq!(window.seen(0), Seen::New);
        assert_eq!(window.seen(1), Seen::Outside);
        window.reply(vec![vec![7]]);
        assert_eq!(window.seen(0), Seen::Again);
        assert_eq!(window.last_answer(), [vec![7]]);
        window.reply(vec![vec![8]]);
        assert_eq!(window.seen(0), Seen::Outside);
        assert_eq!(window.seen(1), Seen::Again);
    }
}
