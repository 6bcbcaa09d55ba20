//! What this host knows of one peer: what is wanted with it, what is there, and what has happened.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Instant;

use esp::{Inbound, InnerPolicy, Outbound};
use ike::wire::{EspSpi, IkeSpis};
use ike::{ChildId, ChildUse, Path};
use model::{NetworkId, UnixMillis};
use plan::{Inside, Tunnel};

use super::mtu::Search;
use super::probe::Probes;
use super::quiet::Quiet;
use crate::dataplane::{DeviceIndex, PeerIndex};

/// A peer.
pub(super) struct Peer {
    /// What IKE and the packet path call it. Never used again.
    pub(super) number: u64,
    /// What is wanted.
    pub(super) tunnel: Tunnel,
    /// Why it cannot be, if it cannot.
    pub(super) impossible: Option<String>,
    /// The identity that it has to prove.
    pub(super) identity: String,
    /// What IKE was told to try.
    pub(super) paths: Vec<Path>,
    /// The wanted children.
    pub(super) slots: BTreeMap<NetworkId, Slot>,
    /// The children that are there, by the SPI that we receive on.
    pub(super) children: BTreeMap<EspSpi, Child>,
    /// The IKE SAs that are up, since when.
    pub(super) ikes: BTreeMap<IkeSpis, Instant>,
    /// What a foreign peer leaves unanswered.
    pub(super) quiet: Quiet,
    pub(super) search: Option<Search>,
    /// What the packet path was told to refuse larger packets than.
    pub(super) limit: Option<u32>,
    /// What went over children that are gone.
    pub(super) past: ChildUse,
    pub(super) handshakes: u64,
    pub(super) rekeys: u64,
    pub(super) last_seen: Option<Instant>,
    pub(super) last_failure: Option<(UnixMillis, String)>,
    /// It was logged that nothing passes, or that large packets vanish.
    pub(super) told_silent: bool,
    pub(super) told_black_hole: bool,
    /// Someone captures.
    pub(super) captured: bool,
}

/// A wanted child: a network shared with the peer.
pub(super) struct Slot {
    /// What IKE calls it.
    pub(super) child: ChildId,
    /// And those for the workers but the first, in their order.
    pub(super) more: Vec<ChildId>,
    pub(super) inside: Inside,
    pub(super) device: DeviceIndex,
    pub(super) policy: Arc<InnerPolicy>,
    /// By worker the child whose outbound association is in use.
    pub(super) sending: BTreeMap<u32, EspSpi>,
    /// From which router to which, where both have one.
    pub(super) ends: Option<(Ipv4Addr, Ipv4Addr)>,
    /// Runs while there are ends, and an association to send on.
    pub(super) probes: Option<Probes>,
}

/// A pair of security associations.
pub(super) struct Child {
    pub(super) network: NetworkId,
    pub(super) inbound: Arc<Inbound>,
    /// Made when it is first to be used, and kept: its key must not become a second association.
    pub(super) outbound: Option<Arc<Outbound>>,
    pub(super) suite: String,
    pub(super) installed: Instant,
    /// What IKE was last told of its use.
    pub(super) told: ChildUse,
}

impl Peer {
    pub(super) fn new(number: u64, tunnel: Tunnel) -> Self {
        Self {
            number,
            tunnel,
            impossible: None,
            identity: String::new(),
            paths: Vec::new(),
            slots: BTreeMap::new(),
            children: BTreeMap::new(),
            ikes: BTreeMap::new(),
            quiet: Quiet::default(),
            search: None,
            limit: None,
            past: ChildUse::default(),
            handshakes: 0,
            rekeys: 0,
            last_seen: None,
            last_failure: None,
            told_silent: false,
            told_black_hole: false,
            captured: false,
        }
    }

    /// As IKE calls it.
    pub(super) fn id(&self) -> ike::PeerId {
        ike::PeerId(self.number)
    }

    /// As the packet path calls it.
    pub(super) fn index(&self) -> PeerIndex {
        PeerIndex(self.number)
    }

    /// All that went over its children so far.
    pub(super) fn used(&self) -> ChildUse {
        self.children.values().map(Child::used).fold(self.past, add)
    }

    /// Since when nothing passes in at least one network, although keys are agreed; or nothing comes from a foreign peer.
    pub(super) fn silent(&self) -> Option<Instant> {
        let probes = self.slots.values().filter_map(|slot| slot.probes.as_ref());
        probes.filter_map(Probes::silent).chain(self.quiet.silent()).min()
    }
}

impl Slot {
    /// What may come from the peer, and where to.
    pub(super) fn policy_of(inside: &Inside) -> Arc<InnerPolicy> {
        Arc::new(InnerPolicy::new(inside.theirs.iter().copied(), inside.ours.iter().copied()))
    }

    /// Whether a child is one of this network.
    pub(super) fn has(&self, child: ChildId) -> bool {
        self.child == child || self.more.contains(&child)
    }

    /// Probes run exactly while they can be answered.
    pub(super) fn arrange_probes(&mut self, now: Instant) {
        if self.sending.is_empty() || self.ends.is_none() {
            self.probes = None;
        } else if self.probes.is_none() {
            self.probes = Some(Probes::new(now));
        }
    }
}

impl Child {
    /// What went over it so far.
    pub(super) fn used(&self) -> ChildUse {
        let received = self.inbound.counters();
        let sent = self.outbound.as_ref().map(|sa| sa.counters()).unwrap_or_default();
        ChildUse {
            bytes_in: received.bytes,
            packets_in: received.packets,
            bytes_out: sent.bytes,
            packets_out: sent.packets,
        }
    }
}

/// Both together.
pub(super) fn add(a: ChildUse, b: ChildUse) -> ChildUse {
    ChildUse {
        bytes_in: a.bytes_in + b.bytes_in,
        packets_in: a.packets_in + b.packets_in,
        bytes_out: a.bytes_out + b.bytes_out,
        packets_out: a.packets_out + b.packets_out,
    }
}
