//! What control tells the threads: an immutable state, replaced whole.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use esp::{Published, SaTable};
use linux::{tun, udp};

use crate::dataplane::capture::Tap;
use crate::dataplane::count::{Counts, Drops, Reason};
use crate::dataplane::limit::EverySecond;
use crate::dataplane::route::Routes;
use crate::dataplane::{DeviceIndex, PeerIndex, Signal, Sockets, Tuning};

/// Octets at the start of an echo's data by which an answer to a probe is known.
pub const PROBE_MAGIC_LEN: usize = 8;
/// IKE's own port, where nothing is before the message (RFC 7296 §2.23).
pub(super) const IKE_PORT: u16 = 500;

/// What both threads and control have in common.
pub(super) struct Shared {
    pub state: Arc<Published<State>>,
    pub inbound: Arc<Published<SaTable<Origin>>>,
    /// Of each worker its own, by number.
    pub ports: Vec<Ports>,
    /// Hands a signal to control; false if there is no room, or nobody listens.
    pub signals: Box<dyn Fn(Signal) -> bool + Send + Sync>,
    /// What belongs to no peer.
    pub drops: Drops,
    pub probe: [u8; PROBE_MAGIC_LEN],
    pub tuning: Tuning,
}

/// The sockets of a port, as [`Sockets`] has them.
#[derive(Default)]
pub(super) struct Ports {
    pub v4: Option<Arc<udp::Socket>>,
    pub v6: Option<Arc<udp::Socket>>,
}

/// Devices, routes and peers.
#[derive(Clone, Default)]
pub(super) struct State {
    pub devices: HashMap<DeviceIndex, Arc<Device>>,
    pub routes: HashMap<DeviceIndex, Arc<Routes>>,
    pub peers: HashMap<PeerIndex, Arc<Peer>>,
    /// Port 500, while it is open.
    pub ike: Arc<Ports>,
    /// Where peers may come from, as far as that is known.
    pub expected: Arc<BTreeSet<IpAddr>>,
}

/// A TUN device.
pub(super) struct Device {
    pub index: DeviceIndex,
    /// Of each worker its own, by number.
    pub queues: tun::Queues,
    /// The kernel had no memory for a superpacket of more than 64 KB: it gets none any more.
    pub short: AtomicBool,
}

impl Device {
    /// Whether superpackets of more than 64 KB may be written.
    pub fn takes_long(&self) -> bool {
        self.queues.bulk.iter().all(tun::Queue::takes_long) && !self.short.load(Ordering::Relaxed)
    }
}

/// How a peer is reached.
#[derive(Clone)]
pub(super) struct Peer {
    pub index: PeerIndex,
    pub path: Option<udp::Path>,
    /// The largest inner packet in bytes; without it, what the device lets through.
    pub mtu: Option<u32>,
    pub tap: Option<Tap>,
    /// By device and the worker that they are for.
    pub outbound: BTreeMap<(DeviceIndex, usize), Arc<esp::Outbound>>,
    /// What outlives a change of the rest.
    pub lasting: Arc<Lasting>,
}

/// What a peer keeps while control changes other things of it.
pub(super) struct Lasting {
    pub drops: Drops,
    pub moved: EverySecond,
    pub too_big: EverySecond,
}

/// Whose packets an inbound security association brings.
#[derive(Clone)]
pub(super) struct Origin {
    pub peer: PeerIndex,
    pub device: DeviceIndex,
}

impl Shared {
    /// Tells control, or counts that it did not listen.
    pub fn signal(&self, signal: Signal, counts: &Counts) {
        if !(self.signals)(signal) {
            counts.add(Reason::SignalFull, 1);
        }
    }
}

impl State {
    /// A state in which this peer, made if need be, is changed.
    #[must_use]
    pub fn with_peer(&self, index: PeerIndex, change: impl FnOnce(&mut Peer)) -> Self {
        let mut state = self.clone();
        let mut peer = state.peers.get(&index).map_or_else(|| Peer::new(index), |peer| Peer::clone(peer));
        change(&mut peer);
        state.peers.insert(index, Arc::new(peer));
        state
    }

    /// A peer with the security association for packets of a device, and the path. `None` while one of them is missing. A
    /// worker without an association of its own uses the first there is: foreign peers have but one.
    #[inline]
    pub fn way(
        &self,
        (peer, device): (PeerIndex, DeviceIndex),
        worker: usize,
    ) -> Option<(&Peer, &esp::Outbound, udp::Path)> {
        let peer = self.peers.get(&peer)?;
        let all = &peer.outbound;
        let first = || all.range((device, 0)..=(device, usize::MAX)).next().map(|(_, sa)| sa);
        Some((peer, all.get(&(device, worker)).or_else(first)?, peer.path?))
    }

    /// Where drops of a peer that the sending thread notices are counted: with those of none for one that is not known.
    pub fn transmit_counts<'a>(&'a self, shared: &'a Shared, peer: PeerIndex) -> &'a Counts {
        self.peers.get(&peer).map_or(&shared.drops.transmit, |peer| &peer.lasting.drops.transmit)
    }
}

impl Peer {
    fn new(index: PeerIndex) -> Self {
        Self {
            index,
            path: None,
            mtu: None,
            tap: None,
            outbound: BTreeMap::new(),
            lasting: Arc::new(Lasting {
                drops: Drops::default(),
                moved: EverySecond::new(),
                too_big: EverySecond::new(),
            }),
        }
    }
}

impl From<Sockets> for Ports {
    fn from(sockets: Sockets) -> Self {
        let Sockets { v4, v6 } = sockets;
        Self { v4: v4.map(Arc::new), v6: v6.map(Arc::new) }
    }
}

impl Ports {
    /// All of them.
    pub fn sockets(&self) -> impl Iterator<Item = &Arc<udp::Socket>> {
        self.v4.iter().chain(&self.v6)
    }

    /// The socket for a path. `None` where its family has none.
    #[inline]
    pub fn of(&self, path: &udp::Path) -> Option<&udp::Socket> {
        match path.remote {
            SocketAddr::V4(_) => self.v4.as_deref(),
            SocketAddr::V6(_) => self.v6.as_deref(),
        }
    }
}

/// A device in the hands of the worker that watches one of its queues.
pub(super) struct Watched {
    pub device: Arc<Device>,
    pub worker: usize,
    /// The queue of flows that send little.
    pub sparse: bool,
}

impl Watched {
    /// The queues of a worker, in the order in which they are to be read. None of a device with fewer queues than workers.
    pub fn of(device: &Arc<Device>, worker: usize) -> impl Iterator<Item = Self> {
        let both = [(true, &device.queues.sparse), (false, &device.queues.bulk)];
        both.into_iter().filter(move |(_, queues)| worker < queues.len()).map(move |(sparse, _)| Self {
            device: Arc::clone(device),
            worker,
            sparse,
        })
    }

    /// Packets that wait for this worker.
    #[inline]
    pub fn queue(&self) -> &tun::Queue {
        let queues = if self.sparse { &self.device.queues.sparse } else { &self.device.queues.bulk };
        &queues[self.worker]
    }

    /// What goes before each packet of this queue.
    #[inline]
    pub fn ahead(&self) -> Option<&tun::Queue> {
        self.device.queues.sparse.get(self.worker).filter(|_| !self.sparse)
    }
}

impl AsFd for Watched {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.queue().as_fd()
    }
}
