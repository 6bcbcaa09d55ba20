//! Packets that came before there was a security association for them.
//!
//! The first packet to a peer is what makes control connect; it and a few behind it wait here. All is bounded: packets
//! for each peer and device, bytes in all, and time.

use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};

use crate::dataplane::{DeviceIndex, PeerIndex};

/// Packets that wait for one peer from one device.
const EACH: usize = 64;
/// Bytes that wait in all.
const BYTES: usize = 1024 * 1024;
/// How long a packet is worth sending. Who waits longer has sent it again.
const AGE: Duration = Duration::from_secs(5);
/// How often control is told that packets wait.
const SAY_EVERY: Duration = Duration::from_secs(1);

/// Who waits for what.
pub(super) type Key = (PeerIndex, DeviceIndex);

/// What [`Early::hold`] made of a packet.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Held {
    /// Packets that lost their place, this one or older ones.
    pub dropped: usize,
    /// Control should be told.
    pub say: bool,
}

/// All packets that wait.
#[derive(Default)]
pub(super) struct Early {
    queues: HashMap<Key, Queue>,
    bytes: usize,
}

struct Queue {
    packets: VecDeque<(Instant, Box<[u8]>)>,
    said: Instant,
}

impl Early {
    pub fn is_empty(&self) -> bool {
        self.queues.is_empty()
    }

    /// Those for whom packets wait.
    pub fn keys(&self) -> impl Iterator<Item = Key> {
        self.queues.keys().copied()
    }

    /// Keeps a packet as the device gave it. The oldest for the same peer make room for it.
    pub fn hold(&mut self, key: Key, packet: &[u8], now: Instant) -> Held {
        let queue = self.queues.entry(key);
        let mut say = false;
        let queue = queue.or_insert_with(|| {
            say = true;
            Queue { packets: VecDeque::new(), said: now }
        });
        if now.saturating_duration_since(queue.said) >= SAY_EVERY {
            say = true;
            queue.said = now;
        }
        let mut dropped = 0;
        while queue.packets.len() == EACH || self.bytes + packet.len() > BYTES {
            let Some((_, oldest)) = queue.packets.pop_front() else {
                return Held { dropped: dropped + 1, say };
            };
            self.bytes -= oldest.len();
            dropped += 1;
        }
        self.bytes += packet.len();
        queue.packets.push_back((now, packet.into()));
        Held { dropped, say }
    }

    /// Gives out what waits, oldest first.
    pub fn take(&mut self, key: Key) -> impl Iterator<Item = Box<[u8]>> + use<> {
        let packets = self.queues.remove(&key).map(|queue| queue.packets).unwrap_or_default();
        self.bytes -= packets.iter().map(|(_, packet)| packet.len()).sum::<usize>();
        packets.into_iter().map(|(_, packet)| packet)
    }

    /// Drops what is too old: whose, and how many.
    pub fn expire(&mut self, now: Instant, mut dropped: impl FnMut(PeerIndex, usize)) {
        let bytes = &mut self.bytes;
        self.queues.retain(|(peer, _), queue| {
            let old = |(since, _): &(Instant, _)| now.saturating_duration_since(*since) >= AGE;
            let mut count = 0;
            while let Some((_, packet)) = queue.packets.pop_front_if(|packet| old(packet)) {
                *bytes -= packet.len();
                count += 1;
            }
            if count > 0 {
                dropped(*peer, count);
            }
            !queue.packets.is_empty() || now.saturating_duration_since(queue.said) < SAY_EVERY
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RED: Key = (PeerIndex(1), DeviceIndex(1));
    const BLUE: Key = (PeerIndex(2), DeviceIndex(1));

    #[test]
    fn the_newest_packets_wait_in_order_and_control_hears_once_a_second() {
        let mut early = Early::default();
        let start = Instant::now();
        assert_eq!(early.hold(RED, &[0], start), Held { dropped: 0, say: true });
        for number in 1..=EACH as u8 {
            let held = early.hold(RED, &[number], start);
            assert_eq!(held, Held { dropped: usize::from(number == EACH as u8), say: false });
        }
        assert!(early.hold(RED, &[65], start + SAY_EVERY).say);
        let taken: Vec<_> = early.take(RED).map(|packet| packet[0]).collect();
        assert_eq!(taken, (2..=65).collect::<Vec<_>>());
        assert!(early.is_empty() && early.bytes == 0);
    }

    #[test]
    fn all_peers_together_have_so_many_bytes_and_none_takes_those_of_another() {
        let mut early = Early::default();
        let start = Instant::now();
        let large = vec![0; 60_000];
        let held = (0..EACH).filter(|_| early.hold(RED, &large, start).dropped == 0).count();
        assert_eq!(held, BYTES / large.len());
        assert_eq!(early.hold(BLUE, &large, start).dropped, 1);
        assert_eq!(early.take(BLUE).count(), 0);
        assert_eq!(early.take(RED).count(), held);
        assert_eq!(early.bytes, 0);
    }

    #[test]
    fn a_packet_that_waited_too_long_is_dropped() {
        let mut early = Early::default();
        let start = Instant::now();
        early.hold(RED, &[1], start);
        early.hold(RED, &[2], start + AGE / 2);
        let mut dropped = Vec::new();
        early.expire(start + AGE, |peer, count| dropped.push((peer, count)));
        assert_eq!(dropped, [(PeerIndex(1), 1)]);
        assert_eq!(early.take(RED).count(), 1);
        early.hold(RED, &[3], start + AGE);
        early.expire(start + 3 * AGE, |_, _| {});
        assert!(early.is_empty() && early.bytes == 0);
    }
}
