//! The packet path of the encrypted driver: threads between the routers' TUN devices and the tunnel's UDP sockets.
//!
//! It knows security associations, routes and devices, and neither IKE nor the catalogue. The [`transmit`] thread reads
//! superpackets of all devices, finds the peer, cuts, seals (RFC 4303) and sends; the [`receive`] thread opens, checks,
//! merges and writes. Both together are a worker; there may be several ([`Tuning`]). Control gives them what they need by
//! publishing a new [`State`]; they answer by [`Signal`]s that are never waited for.
//!
//! Invariant: an inner packet leaves sealed or not at all. Without a security association it waits for a while
//! ([`early`]) and is then dropped.
//! Invariant: neither thread takes a lock that control holds while it works, and none allocates per packet.
//! Invariant: nothing that comes from the network ends a thread.

mod capture;
mod count;
mod early;
mod limit;
mod output;
mod receive;
mod route;
mod state;
mod transmit;
mod tuning;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::SystemTime;

use ipnet::IpNet;
use linux::{tun, udp};

pub use state::PROBE_MAGIC_LEN;
pub use tuning::{NoSuchSetting, Tuning, WORKERS_MAX, workers_here};

use crate::dataplane::capture::Tap;
use crate::dataplane::count::Drops;
use crate::dataplane::route::Routes;
use crate::dataplane::state::{Device, Origin, Shared, State};
use crate::dataplane::watch::Waker;

/// A peer, by a number that control chooses and does not use again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerIndex(pub u64);

/// A TUN device, one for each router, by a number that control chooses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct DeviceIndex(pub u32);

/// Where ESP and IKE come and go. A family without a socket is a family without tunnels.
#[derive(Debug, Default)]
pub struct Sockets {
    /// The tunnel's port of IPv4: ESP, and IKE behind the non-ESP marker (RFC 3948).
    pub v4: Option<udp::Socket>,
    /// The tunnel's port of IPv6.
    pub v6: Option<udp::Socket>,
}

/// What the path has to say. The sender of signals never waits: what does not fit into the channel is dropped and
/// counted as `signal_full`.
#[derive(Debug)]
pub enum Signal {
    /// An IKE datagram: the whole payload, with the marker where the local port has one. So many a second from one
    /// address at most ([`limit`]).
    Ike {
        /// How it came.
        path: udp::Path,
        /// All of it.
        payload: Vec<u8>,
    },
    /// Packets wait, and there is no security association. At most once a second for each peer and device.
    Waiting {
        /// Where they want to go.
        peer: PeerIndex,
        /// From which device.
        device: DeviceIndex,
    },
    /// An authenticated packet, newer than all before it, came by a path that is not the peer's. At most once a second
    /// for each peer and path.
    Moved {
        /// Who sent it.
        peer: PeerIndex,
        /// On which inbound security association.
        inbound: esp::Spi,
        /// How it came.
        path: udp::Path,
    },
    /// ESP that no security association is for. At most once a second from one address.
    UnknownSpi {
        /// How it came.
        path: udp::Path,
    },
    /// The answer to a probe: an ICMP echo reply whose data begins with [`Dataplane::probe_magic`]. It goes to no
    /// device.
    Answer {
        /// Who sent it.
        peer: PeerIndex,
        /// The device that it was for.
        device: DeviceIndex,
        /// The reply, from its IP header on.
        packet: Vec<u8>,
    },
    /// The underlay takes no datagrams as large as were sent to this peer. At most once a second for each peer.
    TooBig {
        /// Who did not get them.
        peer: PeerIndex,
        /// The largest IP packet that the underlay takes, in bytes.
        path_mtu: u32,
    },
}

/// The way of a captured packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// To the peer.
    Out,
    /// From the peer.
    In,
}

/// An inner packet as it is between decryption and device.
#[derive(Debug, Clone)]
pub struct Captured {
    /// When it came by.
    pub at: SystemTime,
    /// Which way.
    pub direction: Direction,
    /// Of which device.
    pub device: DeviceIndex,
    /// The packet, from its IP header on.
    pub packet: Vec<u8>,
}

/// Why the path cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused something that every process may have.
    #[error("packet path: cannot {attempted}: {error}; look at the limits of open files and threads")]
    Kernel {
        /// What was to be done.
        attempted: &'static str,
        /// What the kernel said.
        error: std::io::Error,
    },
}

/// The packet path. Both threads end when it is dropped.
pub struct Dataplane {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    wakers: Vec<Waker>,
    stop: Arc<AtomicBool>,
}

impl Dataplane {
    /// Starts the threads of all workers, in the calling thread's namespace, which must be that of the sockets: for each
    /// worker its own ([`udp::Socket::bind_group`]). `signals` should hold a few hundred: what does not fit is dropped and
    /// counted.
    pub fn start<S: From<Signal> + Send + 'static>(
        mut sockets: Vec<Sockets>,
        signals: SyncSender<S>,
        tuning: Tuning,
    ) -> Result<Self, Error> {
        for socket in sockets.iter_mut().flat_map(|it| it.v4.iter_mut().chain(&mut it.v6)) {
            if tuning.no_gso {
                socket.refuse_gso();
            }
            if tuning.no_gro {
                socket.refuse_gro();
            }
        }
        let mut probe = [0; PROBE_MAGIC_LEN];
        aws_lc_rs::rand::fill(&mut probe).map_err(|_| Error::Kernel {
            attempted: "get random numbers",
            error: std::io::ErrorKind::Other.into(),
        })?;
        let shared = Arc::new(Shared {
            state: Arc::new(esp::Published::new(State::default())),
            inbound: Arc::new(esp::Published::new(esp::SaTable::default())),
            ports: sockets.into_iter().map(Into::into).collect(),
            signals: Box::new(move |signal| signals.try_send(signal.into()).is_ok()),
            drops: Drops::default(),
            probe,
            tuning,
        });
        let stop = Arc::new(AtomicBool::new(false));
        let mut dataplane = Self { shared, threads: Vec::new(), wakers: Vec::new(), stop };
        for worker in 0..dataplane.workers() {
            let (shared, stop) = (&dataplane.shared, &dataplane.stop);
            let transmit = transmit::Transmitter::new(Arc::clone(shared), worker, Arc::clone(stop))?;
            let receive = receive::Receiver::new(Arc::clone(shared), worker, Arc::clone(stop))?;
            dataplane.wakers.extend([transmit.waker(), receive.waker()]);
            dataplane.spawn(&format!("droveway-tx{worker}"), move || transmit.run())?;
            dataplane.spawn(&format!("droveway-rx{worker}"), move || receive.run())?;
        }
        Ok(dataplane)
    }

    /// How many workers there are: as many as there were sockets for.
    pub fn workers(&self) -> usize {
        self.shared.ports.len()
    }

    fn spawn(&mut self, name: &str, run: impl FnOnce() + Send + 'static) -> Result<(), Error> {
        let thread = crate::vital::spawn(name, || {
            // So that a nap of microseconds is one (`watch`). Refused, naps are longer.
            let _ = nix::sys::prctl::set_timerslack(1);
            run();
        });
        self.threads.push(thread.map_err(|error| Error::Kernel { attempted: "start a thread", error })?);
        Ok(())
    }

    /// IKE alone, without marker, comes and goes by these sockets of port 500 too; none closes those there were.
    pub fn set_ike_sockets(&self, sockets: Sockets) {
        let ports = Arc::new(sockets.into());
        self.change(|state| State { ike: ports, ..state.clone() });
    }

    /// Where peers may come from, as far as that is known: they begin IKE however many strangers do.
    pub fn set_expected(&self, addresses: BTreeSet<IpAddr>) {
        let expected = Arc::new(addresses);
        self.change(|state| State { expected, ..state.clone() });
    }

    /// Moves packets of this device from now on, by queues of each worker. A flow stays with one of them: the kernel chooses
    /// by its hash.
    pub fn add_device(&self, device: DeviceIndex, mut queues: tun::Queues) {
        let Some(offered) = queues.bulk.first().map(tun::Queue::offloads) else { return };
        let offloads = self.shared.tuning.offloads(offered);
        if offloads != offered
            && let Err(error) = queues.restrict(offloads)
        {
            tracing::warn!("a TUN device goes on with all offloads: {error}");
        }
        if self.shared.tuning.no_sparse {
            // The kernel has what was theirs wait with the rest.
            queues.sparse.clear();
        }
        let queue = Arc::new(Device { index: device, queues, short: AtomicBool::new(false) });
        self.change(|state| {
            let mut state = state.clone();
            state.devices.insert(device, queue);
            state
        });
    }

    /// Closes the device's queues and forgets its routes. Its security associations are for the caller to remove.
    pub fn remove_device(&self, device: DeviceIndex) -> Closing {
        let queues = self.shared.state.load().devices.get(&device).map_or_else(Weak::new, Arc::downgrade);
        self.change(|state| {
            let mut state = state.clone();
            state.devices.remove(&device);
            state.routes.remove(&device);
            state
        });
        Closing(queues)
    }

    /// Which peer an inner destination belongs to, by the longest prefix. Replaces all routes of the device. `onward`: what one
    /// peer sends may leave by the device again, to another; then it is put together no longer than the device takes.
    pub fn set_routes(&self, device: DeviceIndex, routes: Vec<(IpNet, PeerIndex)>, onward: bool) {
        let routes = Arc::new(Routes::new(routes, onward));
        self.change(|state| {
            let mut state = state.clone();
            state.routes.insert(device, routes);
            state
        });
    }

    /// Begins to receive on this security association.
    pub fn add_inbound(
        &self,
        sa: Arc<esp::Inbound>,
        policy: Arc<esp::InnerPolicy>,
        peer: PeerIndex,
        device: DeviceIndex,
    ) {
        // So that its drops are counted, whatever else is known of it.
        self.change_peer(peer, |_| {});
        let context = Origin { peer, device };
        self.shared.inbound.update(|table| table.with(esp::Entry { sa, policy, context }));
        self.wake();
    }

    /// Changes what may come from a peer to a device, on all its security associations.
    pub fn set_policy(&self, peer: PeerIndex, device: DeviceIndex, policy: Arc<esp::InnerPolicy>) {
        self.shared.inbound.update(|table| {
            esp::SaTable::new(table.entries().cloned().map(|mut entry| {
                if (entry.context.peer, entry.context.device) == (peer, device) {
                    entry.policy = Arc::clone(&policy);
                }
                entry
            }))
        });
        self.wake();
    }

    /// Seals what a worker has for a peer from a device on this security association from now on, and sends all that goes to
    /// the peer by this path. Packets that waited go first.
    pub fn set_outbound(
        &self,
        peer: PeerIndex,
        (device, worker): (DeviceIndex, usize),
        sa: Arc<esp::Outbound>,
        path: udp::Path,
    ) {
        self.change_peer(peer, |peer| {
            peer.outbound.insert((device, worker), sa);
            peer.path = Some(path);
        });
    }

    /// Sends nothing more on what this worker had for packets from the device to the peer. It uses what others have; with
    /// none left nothing is sent: no security association, no packet.
    pub fn remove_outbound(&self, peer: PeerIndex, device: DeviceIndex, worker: usize) {
        self.change_peer(peer, |peer| {
            if let Some(sa) = peer.outbound.remove(&(device, worker)) {
                sa.stop();
            }
        });
    }

    /// As [`remove_outbound`](Self::remove_outbound), of all workers.
    pub fn remove_all_outbound(&self, peer: PeerIndex, device: DeviceIndex) {
        self.change_peer(peer, |peer| {
            for (_, sa) in peer.outbound.extract_if((device, 0)..=(device, usize::MAX), |_, _| true) {
                sa.stop();
            }
        });
    }

    /// Receives nothing more on this security association.
    pub fn remove_inbound(&self, spi: esp::Spi) {
        self.shared.inbound.update(|table| {
            if let Some(entry) = table.get(spi.get()) {
                entry.sa.stop();
            }
            table.without(spi.get())
        });
        self.wake();
    }

    /// Sends what goes to the peer by this path from now on.
    pub fn set_path(&self, peer: PeerIndex, path: udp::Path) {
        self.change_peer(peer, |peer| peer.path = Some(path));
    }

    /// The largest inner packet that the peer gets, in bytes. Larger ones are fragmented, or where they may not be, their
    /// sender is told by ICMP (RFC 4301 §8.2). `None` for no other limit than the device's.
    pub fn set_mtu(&self, peer: PeerIndex, mtu: Option<u32>) {
        self.change_peer(peer, |peer| peer.mtu = mtu);
    }

    /// Forgets a peer: its security associations in both directions, its path, MTU, tap and counts. Its routes are for
    /// the caller to replace.
    pub fn remove_peer(&self, peer: PeerIndex) {
        self.shared.inbound.update(|table| {
            let (gone, kept): (Vec<_>, Vec<_>) =
                table.entries().cloned().partition(|entry| entry.context.peer == peer);
            for entry in gone {
                entry.sa.stop();
            }
            esp::SaTable::new(kept)
        });
        self.change(|state| {
            let mut state = state.clone();
            if let Some(peer) = state.peers.remove(&peer) {
                peer.outbound.values().for_each(|sa| sa.stop());
            }
            state
        });
    }

    /// Sends a datagram as it is, IKE or a keepalive, from the socket of the path's local port. What the kernel refuses is
    /// lost and counted; IKE sends again.
    pub fn send(&self, path: udp::Path, payload: &[u8]) {
        output::send_plain(&self.shared, path, payload);
    }

    /// Seals a packet of our own and sends it at once, on the calling thread and whatever the peer's MTU: probes.
    pub fn inject(&self, peer: PeerIndex, device: DeviceIndex, packet: &[u8]) {
        transmit::inject(&self.shared, peer, device, packet);
    }

    /// What the data of an ICMP echo begins with for its reply to become [`Signal::Answer`].
    pub fn probe_magic(&self) -> [u8; PROBE_MAGIC_LEN] {
        self.shared.probe
    }

    /// Copies all inner packets of a peer from now on, or no longer. Nobody waits for who reads the copies.
    pub fn set_capture(&self, peer: PeerIndex, tap: Option<SyncSender<Captured>>) {
        self.change_peer(peer, |peer| peer.tap = tap.map(Tap));
    }

    /// What the kernel or a device refuses, and what is done instead; nothing where all is as fast as it can be.
    pub fn refused(&self) -> Vec<&'static str> {
        let sockets = || self.shared.ports.iter().flat_map(state::Ports::sockets);
        let state = self.shared.state.load();
        let offloads = || state.devices.values().flat_map(|it| it.queues.iter()).map(tun::Queue::offloads);
        let long = |it: &Arc<Device>| it.takes_long();
        let all = [
            (
                state.devices.values().any(|it| it.queues.sparse.is_empty()),
                "steering of TUN devices: flows that send little wait behind those that send much",
            ),
            (
                !state.devices.values().all(long),
                "TCP superpackets of more than 64 KB (Linux 6.6, and memory in large pieces): what is received passes the device in shorter ones",
            ),
            (offloads().any(|it| !it.tso), "TUN segmentation: every segment passes the device alone"),
            (offloads().any(|it| !it.uso), "TUN segmentation of UDP: every datagram passes the device alone"),
            (sockets().any(|it| !it.gso()), "UDP segmentation: every datagram is sent alone"),
            (sockets().any(|it| !it.gro()), "UDP coalescing: every datagram is received alone"),
        ];
        all.into_iter().filter_map(|(refused, what)| refused.then_some(what)).collect()
    }

    /// Packets of a peer that got no further, by reason.
    pub fn drops(&self, peer: PeerIndex) -> BTreeMap<&'static str, u64> {
        let mut sum = BTreeMap::new();
        if let Some(peer) = self.shared.state.load().peers.get(&peer) {
            peer.lasting.drops.add_to(&mut sum);
        }
        sum
    }

    /// Packets of all peers that got no further, and of none: unknown SPIs, destinations without a route.
    pub fn total_drops(&self) -> BTreeMap<&'static str, u64> {
        let mut sum = BTreeMap::new();
        self.shared.drops.add_to(&mut sum);
        for peer in self.shared.state.load().peers.values() {
            peer.lasting.drops.add_to(&mut sum);
        }
        sum
    }

    fn change_peer(&self, peer: PeerIndex, change: impl FnOnce(&mut state::Peer)) {
        self.change(|state| state.with_peer(peer, change));
    }

    fn change(&self, make: impl FnOnce(&State) -> State) {
        self.shared.state.update(make);
        self.wake();
    }

    /// Threads that sleep take in the change, and let go of keys that it removed.
    fn wake(&self) {
        self.wakers.iter().for_each(Waker::wake);
    }
}

/// Queues of a device on their way to be closed: threads let go of them when they have seen the change.
#[derive(Default)]
pub struct Closing(Weak<Device>);

impl Closing {
    /// Whether they are closed. The kernel counts queues of a device in the order in which they were opened, so none is opened
    /// before.
    pub fn is_over(&self) -> bool {
        self.0.strong_count() == 0
    }
}

impl Drop for Dataplane {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        self.wake();
        for thread in self.threads.drain(..) {
            // A panic would have ended the process.
            let _ = thread.join();
        }
    }
}

impl std::fmt::Debug for Dataplane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Dataplane").finish_non_exhaustive()
    }
}
