//! What is dropped, by peer and reason.
//!
//! Each thread counts on cache lines of its own, and only when it drops: a path that drops nothing writes nothing here.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Why a packet got no further.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reason {
    /// Of the security association.
    Esp(esp::Reason),
    /// No peer has the inner destination.
    NoRoute,
    /// It waited for a security association, and none came or others took its place.
    NoAssociation,
    /// What a device handed out is no packet that can be cut.
    Malformed,
    /// Larger than the peer's MTU; its sender was told where it may be.
    TooBig,
    /// The underlay takes none so large.
    PathMtu,
    /// No way to the peer, a firewall, no memory: the socket refused it.
    SocketRefused,
    /// The socket's buffer stayed full.
    SocketFull,
    /// The device's queue is full.
    DeviceFull,
    /// The device is down or gone, or refused it.
    DeviceRefused,
    /// It came for a network whose device is not there: the router comes up later than the tunnel, or went before it.
    NoDevice,
    /// Congestion was marked on what does not take part in ECN (RFC 6040 §4.2).
    Ecn,
    /// A datagram too short to be anything.
    Runt,
    /// More IKE from one address than it may send.
    IkeRate,
    /// A signal for which there was no room.
    SignalFull,
    /// A captured copy for which there was no room; the packet itself went on.
    CaptureFull,
}

const OWN: [Reason; 15] = [
    Reason::NoRoute,
    Reason::NoAssociation,
    Reason::Malformed,
    Reason::TooBig,
    Reason::PathMtu,
    Reason::SocketRefused,
    Reason::SocketFull,
    Reason::DeviceFull,
    Reason::DeviceRefused,
    Reason::Ecn,
    Reason::Runt,
    Reason::IkeRate,
    Reason::SignalFull,
    Reason::CaptureFull,
    Reason::NoDevice,
];
const REASONS: usize = esp::Reason::ALL.len() + OWN.len();

impl Reason {
    fn all() -> impl Iterator<Item = Self> {
        esp::Reason::ALL.into_iter().map(Self::Esp).chain(OWN)
    }

    fn index(self) -> usize {
        let own = match self {
            Self::Esp(reason) => return reason as usize,
            Self::NoRoute => 0,
            Self::NoAssociation => 1,
            Self::Malformed => 2,
            Self::TooBig => 3,
            Self::PathMtu => 4,
            Self::SocketRefused => 5,
            Self::SocketFull => 6,
            Self::DeviceFull => 7,
            Self::DeviceRefused => 8,
            Self::Ecn => 9,
            Self::Runt => 10,
            Self::IkeRate => 11,
            Self::SignalFull => 12,
            Self::CaptureFull => 13,
            Self::NoDevice => 14,
        };
        esp::Reason::ALL.len() + own
    }

    /// A short word for metrics.
    fn label(self) -> &'static str {
        match self {
            Self::Esp(reason) => reason.label(),
            Self::NoRoute => "no_route",
            Self::NoAssociation => "no_association",
            Self::Malformed => "malformed",
            Self::TooBig => "too_big",
            Self::PathMtu => "path_mtu",
            Self::SocketRefused => "socket_refused",
            Self::SocketFull => "socket_full",
            Self::DeviceFull => "device_full",
            Self::DeviceRefused => "device_refused",
            Self::NoDevice => "no_device",
            Self::Ecn => "ecn",
            Self::Runt => "runt",
            Self::IkeRate => "ike_rate",
            Self::SignalFull => "signal_full",
            Self::CaptureFull => "capture_full",
        }
    }
}

/// Drops as one thread counts them.
#[derive(Debug)]
#[repr(align(64))]
pub(super) struct Counts([AtomicU64; REASONS]);

impl Counts {
    #[cold]
    pub fn add(&self, reason: Reason, packets: usize) {
        self.0[reason.index()].fetch_add(packets as u64, Relaxed);
    }
}

impl Default for Counts {
    fn default() -> Self {
        Self(std::array::from_fn(|_| AtomicU64::new(0)))
    }
}

/// Drops of one peer, or of none.
#[derive(Debug, Default)]
pub(super) struct Drops {
    /// Counted by the sending thread, and by control for what it injects.
    pub transmit: Counts,
    /// Counted by the receiving thread.
    pub receive: Counts,
}

impl Drops {
    /// Adds what there is now to a sum; reasons that did not occur are left out.
    pub fn add_to(&self, sum: &mut BTreeMap<&'static str, u64>) {
        for reason in Reason::all() {
            let index = reason.index();
            let count = self.transmit.0[index].load(Relaxed) + self.receive.0[index].load(Relaxed);
            if count > 0 {
                *sum.entry(reason.label()).or_default() += count;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_reason_is_counted_apart_from_all_others() {
        let drops = Drops::default();
        for (count, reason) in (1..).zip(Reason::all()) {
            drops.transmit.add(reason, count);
            drops.receive.add(reason, 1);
        }
        let mut sum = BTreeMap::new();
        drops.add_to(&mut sum);
        assert_eq!(sum.values().copied().collect::<BTreeSet<_>>(), (2..2 + REASONS as u64).collect());
    }
}
