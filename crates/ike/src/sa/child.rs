//! A CHILD_SA, its lifetimes, and what traffic it is for.
//!
//! ```text
//!   made by us:                     made by the peer:
//!     new, rekey ──────► Up           new ──────────────────────────────► Up
//!                                     rekey ──► Receiving ──(confirmed)──► Up
//!   rekeyed by the peer: Up ──► Replaced ──(its delete)──► gone, and lingers for packets under way
//!   rekeyed by us:       Up ──► Closing ──(answer to our delete)──► the same
//! ```

use std::time::Instant;

use crate::chance;
use crate::config::{ChildConfig, PeerId, Timing};
use crate::crypto::TrafficKey;
use crate::event::{ChildSa, ChildUse, Failure, Path, Slot};
use crate::proposal::EspSuite;
use crate::random::Random;
use crate::wire::{EspSpi, IpSelector, SecurityLabel, TrafficSelector, TrafficSelectors};

/// Where a child stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    /// The peer made it to replace another: we receive on it, and send on it once the peer has it for certain,
    /// which its delete of the other one says (RFC 7296 §2.8).
    Receiving,
    /// We send and receive.
    Up,
    /// The peer made another in its place and will delete this one.
    Replaced {
        /// The SPI that we receive the other on.
        by: EspSpi,
    },
    /// We delete it.
    Closing,
}

/// One CHILD_SA: a pair of SAs.
#[derive(Debug)]
pub(crate) struct Child {
    pub(crate) slot: Slot,
    /// We receive on it; it is our name of the pair.
    pub(crate) inbound: EspSpi,
    /// We send on it.
    pub(crate) outbound: EspSpi,
    pub(crate) stage: Stage,
    /// Whether the owner was told of it.
    pub(crate) told: bool,
    pub(crate) key_in: TrafficKey,
    pub(crate) key_out: TrafficKey,
    pub(crate) suite: EspSuite,
    pub(crate) label: Option<SecurityLabel>,
    pub(crate) local: Vec<IpSelector>,
    pub(crate) remote: Vec<IpSelector>,
    /// Later ones have higher ones, over all IKE SAs.
    pub(crate) ordinal: u64,
    pub(crate) life: Life,
    /// Until when it may be [`Stage::Receiving`]: by then the peer has confirmed it, or knows nothing of it.
    pub(crate) confirm_by: Instant,
}

/// When a child is to be rekeyed, and when it must end.
#[derive(Debug)]
pub(crate) struct Life {
    pub(crate) rekey_at: Instant,
    pub(crate) expire_at: Instant,
    bytes: u64,
    packets: u64,
    used: ChildUse,
}

impl Life {
    pub(crate) fn new(timing: &Timing, random: &mut dyn Random, now: Instant) -> Self {
        let age = timing.child_rekey;
        Self {
            rekey_at: now + chance::sooner(random, age, timing.jitter_tenths),
            expire_at: now + age + age / 10 * timing.grace_tenths,
            bytes: chance::less(random, timing.child_bytes, timing.jitter_tenths),
            packets: chance::less(random, timing.child_packets, timing.jitter_tenths),
            used: ChildUse::default(),
        }
    }

    /// Takes note of the use so far; true if anything was received since the last time.
    pub(crate) fn used(&mut self, used: ChildUse, now: Instant) -> bool {
        let received = used.packets_in > self.used.packets_in;
        self.used = used;
        let most = |inbound: u64, outbound: u64| inbound.max(outbound);
        if most(used.bytes_in, used.bytes_out) >= self.bytes
            || most(used.packets_in, used.packets_out) >= self.packets
        {
            self.rekey_at = self.rekey_at.min(now);
            // Not again for the same bytes, should the rekey fail: time goes on to count.
            self.bytes = self.bytes.saturating_add(self.bytes / 10 + 1);
            self.packets = self.packets.saturating_add(self.packets / 10 + 1);
        }
        received
    }
}

impl Child {
    /// The direction that we receive on.
    pub(crate) fn inbound_sa(&self, peer: PeerId, path: Path) -> ChildSa {
        self.direction(peer, path, self.inbound, self.key_in.clone())
    }

    /// The direction that we send on.
    pub(crate) fn outbound_sa(&self, peer: PeerId, path: Path) -> ChildSa {
        self.direction(peer, path, self.outbound, self.key_out.clone())
    }

    fn direction(&self, peer: PeerId, path: Path, spi: EspSpi, key: TrafficKey) -> ChildSa {
        ChildSa {
            peer,
            slot: self.slot,
            spi,
            inbound: self.inbound,
            key,
            suite: self.suite,
            label: self.label.clone(),
            local: self.local.clone(),
            remote: self.remote.clone(),
            path,
        }
    }

    /// How good it is to send on: the least is the best. `None`: not at all.
    pub(crate) fn rank(&self) -> Option<u8> {
        match self.stage {
            Stage::Up => Some(0),
            Stage::Replaced { .. } => Some(1),
            Stage::Receiving => Some(2),
            Stage::Closing => None,
        }
    }
}

/// A CHILD_SA that is no more, for the owner to be told at `at`.
#[derive(Debug)]
pub(crate) struct Gone {
    pub(crate) at: Instant,
    pub(crate) peer: PeerId,
    pub(crate) slot: Slot,
    pub(crate) inbound: EspSpi,
    pub(crate) outbound: EspSpi,
    pub(crate) why: Failure,
}

/// What both sides want of the traffic, from our side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Narrowed {
    pub(crate) label: Option<SecurityLabel>,
    pub(crate) local: Vec<IpSelector>,
    pub(crate) remote: Vec<IpSelector>,
}

impl Narrowed {
    /// As TSi or TSr: the addresses, and the label with them (RFC 9478 §3).
    pub(crate) fn payload(label: Option<&SecurityLabel>, ips: &[IpSelector]) -> TrafficSelectors {
        let ips = ips.iter().copied().map(TrafficSelector::Ip);
        TrafficSelectors(ips.chain(label.cloned().map(TrafficSelector::Label)).collect())
    }

    /// What of the peer's selectors fits a wanted child (RFC 7296 §2.9): the intersection of the addresses, and the
    /// very same label or none on either side (RFC 9478 §2.2).
    pub(crate) fn of(
        child: &ChildConfig,
        local: &TrafficSelectors,
        remote: &TrafficSelectors,
    ) -> Option<Self> {
        let fits = |selectors: &TrafficSelectors| match &child.label {
            None => selectors.labels().next().is_none(),
            Some(label) => selectors.labels().any(|it| it == label),
        };
        if !fits(local) || !fits(remote) {
            return None;
        }
        let (local, remote) = (common(&child.local, local), common(&child.remote, remote));
        (!local.is_empty() && !remote.is_empty()).then_some(Self {
            label: child.label.clone(),
            local,
            remote,
        })
    }
}

fn common(ours: &[IpSelector], theirs: &TrafficSelectors) -> Vec<IpSelector> {
    let mut all: Vec<IpSelector> = Vec::new();
    for both in ours.iter().flat_map(|a| theirs.ips().filter_map(move |b| a.intersection(b))) {
        if !all.iter().any(|it| it.contains(&both)) {
            all.retain(|it| !both.contains(it));
            all.push(both);
        }
    }
    all
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "an Instant can only be had from the clock")]
mod tests {
    use super::*;
    use crate::config::ChildId;
    use crate::proposal::EspOffer;

    fn net(text: &str) -> IpSelector {
        let (address, len) = text.split_once('/').unwrap();
        IpSelector::prefix(address.parse().unwrap(), len.parse().unwrap())
    }

    fn wanted(label: Option<&str>) -> ChildConfig {
        ChildConfig {
            id: ChildId(1),
            label: label.map(|it| SecurityLabel::new(it.into()).unwrap()),
            worker: None,
            local: vec![net("10.1.0.0/16")],
            remote: vec![net("10.2.0.0/16"), net("10.3.0.0/16")],
            esp: EspOffer::default(),
        }
    }

    fn offer(label: Option<&str>, ips: &[&str]) -> TrafficSelectors {
        let label = label.map(|it| SecurityLabel::new(it.into()).unwrap());
        Narrowed::payload(label.as_ref(), &ips.iter().map(|it| net(it)).collect::<Vec<_>>())
    }

    #[test]
    fn selectors_are_narrowed_to_what_both_sides_want() {
        let got = Narrowed::of(&wanted(None), &offer(None, &["0.0.0.0/0"]), &offer(None, &["10.2.3.0/24"]))
            .unwrap();
        assert_eq!(got.local, [net("10.1.0.0/16")]);
        assert_eq!(got.remote, [net("10.2.3.0/24")]);
        assert_eq!(
            Narrowed::of(&wanted(None), &offer(None, &["10.9.0.0/16"]), &offer(None, &["10.2.0.0/16"])),
            None
        );
    }

    #[test]
    fn a_label_must_be_the_same_on_both_sides_or_on_neither() {
        let try_label = |ours, theirs| {
            Narrowed::of(&wanted(ours), &offer(theirs, &["0.0.0.0/0"]), &offer(theirs, &["0.0.0.0/0"]))
                .is_some()
        };
        assert!(try_label(None, None));
        assert!(try_label(Some("red"), Some("red")));
        assert!(!try_label(Some("red"), Some("blue")));
        assert!(!try_label(Some("red"), None));
        assert!(!try_label(None, Some("red")));
    }

    #[test]
    fn use_beyond_the_bound_makes_a_rekey_due_at_once() {
        let now = Instant::now();
        let timing = Timing { child_packets: 100, ..Timing::default() };
        let mut life = Life::new(&timing, &mut crate::Seeded::new(b"life"), now);
        assert!(life.used(ChildUse { packets_in: 10, ..ChildUse::default() }, now));
        assert!(life.rekey_at > now);
        assert!(!life.used(ChildUse { packets_in: 10, packets_out: 100, ..ChildUse::default() }, now));
        assert_eq!(life.rekey_at, now);
    }
}
