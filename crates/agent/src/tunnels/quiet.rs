//! Whether a foreign peer lives, from what goes to it and comes from it (RFC 7296 §2.4): nobody there answers our pings,
//! so it is asked when packets go out and nothing comes back.
//!
//! A peer that is merely asked costs one exchange of IKE in three seconds of traffic one way. Without traffic nobody
//! misses it, and IKE asks at its own leisure.

use std::time::{Duration, Instant};

/// Packets went out for so long and nothing came: it is asked.
const DOUBT: Duration = Duration::from_secs(3);
/// It has been asked, and this is shown.
const SILENT: Duration = Duration::from_secs(5);
/// So long without anything, and the tunnel is made anew: as with pings between hosts.
const RESET: Duration = Duration::from_secs(10);

/// What one foreign peer leaves unanswered.
#[derive(Debug, Default)]
pub(super) struct Quiet {
    /// Packets sent to it when last looked.
    sent: u64,
    /// When the first packet went out after it was last heard.
    since: Option<Instant>,
    /// Whether it is so long by now that it is shown.
    shown: bool,
}

/// What is to be done now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Due {
    /// Ask by IKE whether it lives.
    pub(super) doubt: bool,
    /// Make the tunnel anew.
    pub(super) reset: bool,
}

impl Quiet {
    /// `sent`: all packets sent to it so far; `heard`: when something came that only it can have sent, if it is up.
    pub(super) fn due(&mut self, sent: u64, heard: Option<Instant>, now: Instant) -> Due {
        let more = std::mem::replace(&mut self.sent, sent) < sent;
        let Some(heard) = heard else {
            // There is no tunnel to be silent.
            (self.since, self.shown) = (None, false);
            return Due::default();
        };
        if self.since.is_some_and(|since| heard >= since) {
            self.since = None;
        }
        if more && self.since.is_none() {
            self.since = Some(now);
        }
        let quiet = self.since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        self.shown = quiet >= SILENT;
        let reset = quiet >= RESET;
        if reset {
            (self.since, self.shown) = (None, false);
        }
        Due { doubt: quiet >= DOUBT && !reset, reset }
    }

    /// Since when it leaves us without an answer.
    pub(super) fn silent(&self) -> Option<Instant> {
        self.since.filter(|_| self.shown)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Looks once a second for so long, with a packet out before each look.
    fn look(quiet: &mut Quiet, at: &mut (u64, Instant), seconds: u32, heard: Instant) -> (u32, u32) {
        let mut all = (0, 0);
        for _ in 0..seconds {
            *at = (at.0 + 1, at.1 + SECOND);
            let due = quiet.due(at.0, Some(heard), at.1);
            all = (all.0 + u32::from(due.doubt), all.1 + u32::from(due.reset));
        }
        all
    }

    #[test]
    fn a_peer_that_answers_nothing_is_asked_shown_and_after_ten_seconds_made_anew_once() {
        let begun = Instant::now();
        let (mut quiet, mut at) = (Quiet::default(), (0, begun));
        assert_eq!(look(&mut quiet, &mut at, 3, begun), (0, 0));
        assert_eq!(look(&mut quiet, &mut at, 1, begun), (1, 0));
        assert_eq!(quiet.silent(), None);
        assert_eq!(look(&mut quiet, &mut at, 2, begun), (2, 0));
        assert_eq!(quiet.silent(), Some(begun + SECOND));
        assert_eq!(look(&mut quiet, &mut at, 5, begun), (4, 1));
        assert_eq!(quiet.silent(), None);
    }

    #[test]
    fn an_answer_ends_the_doubt_and_without_traffic_there_is_none() {
        let begun = Instant::now();
        let (mut quiet, mut at) = (Quiet::default(), (0, begun));
        look(&mut quiet, &mut at, 6, begun);
        assert!(quiet.silent().is_some());
        let heard = at.1;
        assert_eq!(quiet.due(at.0, Some(heard), at.1 + SECOND), Due::default());
        assert_eq!(quiet.silent(), None);
        for second in 2..100 {
            assert_eq!(quiet.due(at.0, Some(heard), at.1 + second * SECOND), Due::default());
        }
        assert_eq!(quiet.due(at.0 + 1, None, at.1 + 100 * SECOND), Due::default(), "no tunnel, no doubt");
    }
}
