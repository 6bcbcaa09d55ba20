//! Whether traffic passes: small pings from router to router through the tunnel. Any kernel answers them.
//!
//! Invariant: nothing here is a judgement of IKE's; a tunnel whose keys are agreed and whose pings are not answered is
//! what this exists to find.

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use packet::{checksum, ipv4, protocol};

/// Between two pings to a peer while all is well and there are few peers.
const EVERY: Duration = Duration::from_secs(2);
/// And while there are many: less than the silence after which IKE asks, which costs more than a ping.
const EVERY_MAX: Duration = Duration::from_secs(8);
/// Between two pings to any of many peers.
const EACH: Duration = Duration::from_millis(20);
/// Between two after one was not answered.
const HURRY: Duration = Duration::from_millis(500);
/// Without an answer for so long, a ping counts as lost. An answer that comes later still counts as one.
const WAIT: Duration = Duration::from_secs(1);
/// After so long, nobody waits for an answer any more.
const FORGET: Duration = Duration::from_secs(10);
/// So many lost in a row make a tunnel silent.
const SILENT: u32 = 3;
/// So long without an answer, where there were some, and the tunnel is made anew.
const RESET: Duration = Duration::from_secs(10);
/// How many are remembered.
const REMEMBERED: usize = 30;

/// The bytes of an IPv4 header and an ICMP echo header.
const HEADERS: usize = ipv4::HEADER_LEN + 8;
/// After the magic: which ping it is.
const NUMBER_LEN: usize = 4;

/// The pings to one peer in one network.
#[derive(Debug)]
pub(super) struct Probes {
    sent: VecDeque<Ping>,
    begun: Instant,
    next: Instant,
    answered: Option<Instant>,
    /// Lost since the last answer.
    lost: u32,
    /// There were answers since the tunnel was last made anew for want of them.
    armed: bool,
}

#[derive(Debug)]
struct Ping {
    number: u32,
    at: Instant,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Waiting,
    Lost,
    Answered(Duration),
}

/// How often each of so many peers is pinged.
pub(super) fn every(peers: usize) -> Duration {
    EACH.saturating_mul(u32::try_from(peers).unwrap_or(u32::MAX)).clamp(EVERY, EVERY_MAX)
}

/// What is to be done now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Due {
    /// Send a ping.
    pub(super) ping: bool,
    /// One more was lost: ask by IKE whether the peer lives.
    pub(super) doubt: bool,
    /// Make the tunnel anew.
    pub(super) reset: bool,
}

impl Probes {
    pub(super) fn new(now: Instant) -> Self {
        Self { sent: VecDeque::new(), begun: now, next: now, answered: None, lost: 0, armed: false }
    }

    /// A new security association is in use, or a new path: do not wait to try it.
    pub(super) fn hurry(&mut self, now: Instant) {
        self.next = now;
    }

    /// `every` is how often a peer that answers is pinged.
    pub(super) fn due(&mut self, every: Duration, now: Instant) -> Due {
        let mut due = Due::default();
        for ping in &mut self.sent {
            if ping.state == State::Waiting && now.saturating_duration_since(ping.at) >= WAIT {
                ping.state = State::Lost;
                self.lost += 1;
                due.doubt = true;
            }
        }
        let last = self.answered.unwrap_or(self.begun);
        if self.armed && self.lost >= SILENT && now.saturating_duration_since(last) >= RESET {
            self.armed = false;
            due.reset = true;
        }
        if self.next <= now {
            due.ping = true;
            self.next = now + if self.lost > 0 { HURRY } else { every };
        } else if self.lost > 0 {
            self.next = self.next.min(now + HURRY);
        }
        due
    }

    pub(super) fn sent(&mut self, number: u32, now: Instant) {
        self.sent.push_back(Ping { number, at: now, state: State::Waiting });
        if self.sent.len() > REMEMBERED {
            self.sent.pop_front();
        }
    }

    /// An answer came; false if it is to no ping of these.
    pub(super) fn answered(&mut self, number: u32, now: Instant) -> bool {
        let fits = |ping: &&mut Ping| {
            ping.number == number
                && !matches!(ping.state, State::Answered(_))
                && now.saturating_duration_since(ping.at) < FORGET
        };
        let Some(ping) = self.sent.iter_mut().find(fits) else { return false };
        ping.state = State::Answered(now.saturating_duration_since(ping.at));
        if self.answered.replace(now).is_none() {
            // Before its first answer the other side was not there yet.
            self.sent.retain(|ping| ping.state != State::Lost);
        }
        self.lost = 0;
        self.armed = true;
        true
    }

    /// Whether all is well: pings are answered.
    pub(super) fn alive(&self) -> bool {
        self.answered.is_some() && self.lost == 0
    }

    /// Since when nothing passes, if that is so.
    pub(super) fn silent(&self) -> Option<Instant> {
        (self.lost >= SILENT).then(|| self.answered.unwrap_or(self.begun))
    }

    /// The median round-trip time of those remembered.
    pub(super) fn rtt(&self) -> Option<Duration> {
        let mut times: Vec<Duration> = self
            .sent
            .iter()
            .filter_map(|ping| match ping.state {
                State::Answered(time) => Some(time),
                State::Waiting | State::Lost => None,
            })
            .collect();
        times.sort_unstable();
        times.get(times.len() / 2).copied()
    }

    /// How many of those remembered were lost, per mille.
    pub(super) fn loss_permille(&self) -> Option<u16> {
        let judged = self.sent.iter().filter(|ping| ping.state != State::Waiting).count();
        let lost = self.sent.iter().filter(|ping| ping.state == State::Lost).count();
        (judged > 0).then(|| (lost * 1000 / judged) as u16)
    }
}

/// An ICMP echo request (RFC 792) of `size` bytes in all that may not be cut. Its data begins with `magic` and the
/// number; it is as long as these need at least.
pub(super) fn ping(
    source: Ipv4Addr,
    destination: Ipv4Addr,
    magic: &[u8],
    number: u32,
    size: usize,
) -> Vec<u8> {
    let size = size.clamp(smallest(magic), usize::from(u16::MAX));
    let mut out = vec![0; size];
    let header = ipv4::Repr {
        dont_fragment: true,
        protocol: protocol::ICMP,
        source,
        destination,
        payload_len: (size - ipv4::HEADER_LEN) as u16,
        ..ipv4::Repr::default()
    };
    header.emit(&mut out);
    let icmp = &mut out[ipv4::HEADER_LEN..];
    icmp[0] = 8;
    icmp[6..8].copy_from_slice(&(number as u16).to_be_bytes());
    icmp[8..8 + magic.len()].copy_from_slice(magic);
    icmp[8 + magic.len()..8 + magic.len() + NUMBER_LEN].copy_from_slice(&number.to_be_bytes());
    let sum = checksum::checksum(icmp);
    icmp[2..4].copy_from_slice(&sum.to_be_bytes());
    out
}

/// The length of the smallest ping.
pub(super) fn smallest(magic: &[u8]) -> usize {
    HEADERS + magic.len() + NUMBER_LEN
}

/// Which ping an echo reply is for. That its data begins with the magic is the packet path's to check.
pub(super) fn number_of(packet: &[u8], magic: &[u8]) -> Option<u32> {
    let reply = ipv4::Packet::new_checked(packet).ok()?;
    let data = reply.payload().get(8 + magic.len()..)?;
    Some(u32::from_be_bytes(*data.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Lets time pass in steps of a quarter second, answering pings or not.
    struct Story {
        probes: Probes,
        now: Instant,
        number: u32,
        doubts: u32,
        resets: u32,
        pings: u32,
    }

    impl Story {
        fn new() -> Self {
            let now = Instant::now();
            Self { probes: Probes::new(now), now, number: 0, doubts: 0, resets: 0, pings: 0 }
        }

        fn run(&mut self, span: Duration, answers: bool) {
            let end = self.now + span;
            while self.now < end {
                let due = self.probes.due(every(1), self.now);
                self.doubts += u32::from(due.doubt);
                self.resets += u32::from(due.reset);
                if due.ping {
                    self.pings += 1;
                    self.number += 1;
                    self.probes.sent(self.number, self.now);
                    if answers {
                        assert!(self.probes.answered(self.number, self.now + Duration::from_millis(3)));
                    }
                }
                self.now += Duration::from_millis(250);
            }
        }
    }

    #[test]
    fn a_tunnel_that_answers_is_pinged_every_two_seconds_and_nothing_is_doubted() {
        let mut story = Story::new();
        story.run(60 * SECOND, true);
        assert_eq!((story.pings, story.doubts, story.resets), (30, 0, 0));
        assert_eq!(story.probes.rtt(), Some(Duration::from_millis(3)));
        assert_eq!(story.probes.loss_permille(), Some(0));
        assert!(story.probes.alive());
        assert_eq!(story.probes.silent(), None);
    }

    #[test]
    fn many_peers_are_pinged_less_often_each_but_before_ike_asks() {
        assert_eq!([0, 1, 100].map(every), [2 * SECOND; 3]);
        assert_eq!([200, 400, 1000, usize::MAX].map(every), [4 * SECOND, 8 * SECOND, 8 * SECOND, 8 * SECOND]);
        assert!(EVERY_MAX + WAIT < ike::Timing::default().liveness);
    }

    #[test]
    fn silence_is_doubted_within_three_seconds_shown_within_five_and_ends_in_one_reset() {
        let mut story = Story::new();
        story.run(20 * SECOND, true);
        story.run(3 * SECOND + SECOND / 4, false);
        assert!(story.doubts > 0);
        story.run(2 * SECOND, false);
        assert!(story.probes.silent().is_some());
        assert_eq!(story.resets, 0);
        story.run(7 * SECOND, false);
        assert_eq!(story.resets, 1);
        story.run(60 * SECOND, false);
        assert_eq!(story.resets, 1, "not again before an answer came");
        story.run(SECOND, true);
        assert_eq!(story.probes.silent(), None);
        story.run(30 * SECOND, false);
        assert_eq!(story.resets, 2);
    }

    #[test]
    fn a_tunnel_that_never_answered_is_silent_but_not_made_anew() {
        let mut story = Story::new();
        story.run(60 * SECOND, false);
        assert!(story.probes.silent().is_some());
        assert_eq!(story.resets, 0);
        assert_eq!(story.probes.loss_permille(), Some(1000));
        assert_eq!(story.probes.rtt(), None);
    }

    #[test]
    fn a_late_answer_is_an_answer_and_a_second_one_or_a_strangers_is_not() {
        let now = Instant::now();
        let mut probes = Probes::new(now);
        probes.sent(6, now);
        probes.sent(7, now);
        probes.due(every(1), now + 2 * SECOND);
        assert_eq!(probes.loss_permille(), Some(1000));
        assert!(probes.answered(7, now + 3 * SECOND), "and what came before the first answer is no loss");
        assert_eq!((probes.loss_permille(), probes.rtt()), (Some(0), Some(3 * SECOND)));
        assert!(!probes.answered(7, now + 3 * SECOND));
        assert!(!probes.answered(8, now));
        probes.sent(9, now);
        assert!(!probes.answered(9, now + FORGET));
    }

    #[test]
    fn a_ping_is_a_valid_echo_request_of_the_size_asked_for_and_its_reply_tells_its_number() {
        let (source, destination) = (Ipv4Addr::new(10, 42, 0, 2), Ipv4Addr::new(10, 42, 64, 2));
        let mut bytes = ping(source, destination, b"magic456", 0x1234_5678, 1438);
        assert_eq!(bytes.len(), 1438);
        let packet = ipv4::Packet::new_checked(&bytes).unwrap();
        assert!(packet.verify_checksum() && packet.dont_fragment());
        assert_eq!((packet.source(), packet.destination()), (source, destination));
        assert!(checksum::Sum::default().bytes(packet.payload()).is_valid());
        assert_eq!(packet.payload()[8..16], *b"magic456");
        bytes[20] = 0;
        assert_eq!(number_of(&bytes, b"magic456"), Some(0x1234_5678));
        assert_eq!(ping(source, destination, b"magic456", 1, 0).len(), smallest(b"magic456"));
        assert_eq!(number_of(&bytes[..30], b"magic456"), None);
    }
}
