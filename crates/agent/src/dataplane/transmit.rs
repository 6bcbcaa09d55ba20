//! From the devices to the underlay: read, find the peer, cut, seal, send.

use std::io::IoSlice;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use linux::{tun, udp};
use packet::ecn::{self, Dscp};
use packet::esp::HEAD_ROOM;
use packet::split::Split;
use packet::{icmp, ipv4, vnet};

use crate::dataplane::count::Reason;
use crate::dataplane::early::{self, Early};
use crate::dataplane::output::Output;
use crate::dataplane::route::destination;
use crate::dataplane::state::{Device, Peer, Shared, State, Watched};
use crate::dataplane::watch::{Waker, Watch, Work};
use crate::dataplane::{DeviceIndex, Direction, Error, PeerIndex, Signal};

/// The underlay sees the class of inner packets (RFC 4301 §5.1.2.1).
const DSCP: Dscp = Dscp::Copy;
/// Packets of the sparse that go before one of the bulk: more than a queue holds.
const AHEAD_MAX: usize = 64;
const INPUT: usize = vnet::LEN + 65_536;
/// How often packets that wait are looked at for their age.
const EXPIRE_EVERY: Duration = Duration::from_secs(1);

/// The sending thread.
pub(super) struct Transmitter {
    shared: Arc<Shared>,
    worker: usize,
    stop: Arc<AtomicBool>,
    watch: Watch<Watched>,
    /// For a packet, and for one that goes before it.
    input: [Box<[u8]>; 2],
    sender: Sender,
    early: Early,
    expired: Instant,
}

/// What makes ESP packets of inner ones.
struct Sender {
    output: Output,
    /// Room for a segment that does not travel as it is, and for a part of it.
    scratch: Box<[u8]>,
}

/// An inner packet, or several in one, with all that is needed to send it.
struct Outgoing<'a> {
    peer: &'a Peer,
    device: DeviceIndex,
    sa: &'a esp::Outbound,
    path: udp::Path,
    /// The largest inner packet.
    mtu: usize,
    header: vnet::Repr,
    packet: &'a [u8],
}

impl Transmitter {
    pub fn new(shared: Arc<Shared>, worker: usize, stop: Arc<AtomicBool>) -> Result<Self, Error> {
        Ok(Self {
            worker,
            stop,
            watch: Watch::new(shared.tuning.spin)?,
            input: [vec![0; INPUT].into(), vec![0; INPUT].into()],
            sender: Sender {
                output: Output::new(shared.tuning.flush, worker),
                scratch: vec![0; 2 * INPUT].into(),
            },
            early: Early::default(),
            expired: Instant::now(),
            shared,
        })
    }

    pub fn waker(&self) -> Waker {
        self.watch.waker()
    }

    pub fn run(mut self) {
        let mut reader = self.shared.state.reader();
        // Tells a new state from the old one, and keeps no key of it.
        let mut seen = std::sync::Weak::new();
        while !self.stop.load(Ordering::Relaxed) {
            let state = reader.get();
            if !std::ptr::eq(seen.as_ptr(), Arc::as_ptr(state)) {
                seen = Arc::downgrade(state);
                self.follow(state);
            }
            let Self { watch, shared, input, sender, early, .. } = &mut self;
            let worked = watch.round(|device| {
                let work = serve(shared, state, device, input, sender, early);
                if sender.output.is_full() {
                    sender.output.flush(shared, state);
                }
                work
            });
            self.sender.output.flush(&self.shared, state);
            self.expire(state);
            let timeout = (!self.early.is_empty()).then_some(EXPIRE_EVERY);
            self.watch.rest(worked, timeout);
        }
    }

    /// Takes in a new state: devices that came and went, and security associations for packets that waited.
    fn follow(&mut self, state: &State) {
        let is_current = |device: &Arc<Device>| {
            state.devices.get(&device.index).is_some_and(|current| Arc::ptr_eq(current, device))
        };
        self.watch.retain(|watched| is_current(&watched.device));
        for device in state.devices.values() {
            if self.watch.values().any(|watched| Arc::ptr_eq(&watched.device, device)) {
                continue;
            }
            for watched in Watched::of(device, self.worker) {
                if let Err(error) = self.watch.add(watched) {
                    tracing::error!(%error, "a queue of a TUN device is left alone: none of its packets is sent");
                }
            }
        }
        let ready: Vec<_> = self.early.keys().filter(|key| state.way(*key, self.worker).is_some()).collect();
        for key in ready {
            for bytes in self.early.take(key) {
                let outcome = self.sender.send_read(&self.shared, state, key, &bytes);
                if outcome.is_err() {
                    state.transmit_counts(&self.shared, key.0).add(Reason::NoAssociation, 1);
                }
            }
            self.sender.output.flush(&self.shared, state);
        }
    }

    fn expire(&mut self, state: &State) {
        if self.early.is_empty() {
            return;
        }
        let now = Instant::now();
        if now.saturating_duration_since(self.expired) < EXPIRE_EVERY {
            return;
        }
        self.expired = now;
        let shared = &self.shared;
        self.early.expire(now, |peer, count| {
            state.transmit_counts(shared, peer).add(Reason::NoAssociation, count);
        });
    }
}

/// Reads a queue for as long as it is its turn. What waits in that of the sparse goes before each packet of the bulk: of the
/// same flow it was sent before it.
fn serve(
    shared: &Shared,
    state: &State,
    watched: &Watched,
    [input, ahead]: &mut [Box<[u8]>; 2],
    sender: &mut Sender,
    early: &mut Early,
) -> Work {
    let mut onward = |bytes: &[u8]| forward(shared, state, watched.device.index, bytes, sender, early);
    let (mut packets, mut total) = (0, 0);
    for _ in 0..shared.tuning.turn {
        let length = match take(shared, watched.queue(), input) {
            Taken::Packet(length) => length,
            Taken::Nothing if packets == 0 => return Work::Dry,
            Taken::Nothing => break,
            Taken::Lost => continue,
            Taken::Gone => return Work::Gone,
        };
        if let Some(queue) = watched.ahead() {
            for _ in 0..AHEAD_MAX {
                let Taken::Packet(length) = take(shared, queue, ahead) else { break };
                onward(&ahead[..length]);
                packets += 1;
                total += length;
            }
        }
        onward(&input[..length]);
        packets += 1;
        total += length;
    }
    if packets == 0 { Work::Dry } else { Work::Done(packets, total) }
}

/// What came of reading a queue.
enum Taken {
    Packet(usize),
    Nothing,
    /// A packet that the kernel could not hand out.
    Lost,
    /// The device is gone; control will find out from the kernel.
    Gone,
}

#[inline]
fn take(shared: &Shared, queue: &tun::Queue, input: &mut [u8]) -> Taken {
    match queue.read(input) {
        Ok(Some(length)) => Taken::Packet(length),
        Ok(None) => Taken::Nothing,
        Err(error) if tun::is_gone(&error) => Taken::Gone,
        Err(_) => {
            shared.drops.transmit.add(Reason::DeviceRefused, 1);
            Taken::Lost
        }
    }
}

/// Sends what was read from a device to where it goes, or keeps it for a while.
#[inline]
fn forward(
    shared: &Shared,
    state: &State,
    device: DeviceIndex,
    bytes: &[u8],
    sender: &mut Sender,
    early: &mut Early,
) {
    let routes = state.routes.get(&device);
    let peer = routes.zip(bytes.get(vnet::LEN..)).and_then(|(routes, packet)| routes.find(packet));
    let Some(peer) = peer else {
        shared.drops.transmit.add(Reason::NoRoute, 1);
        return;
    };
    let key = (peer, device);
    if sender.send_read(shared, state, key, bytes).is_err() {
        hold(shared, state, early, key, bytes);
    }
}

/// Keeps a packet that there is no security association for.
#[cold]
fn hold(shared: &Shared, state: &State, early: &mut Early, key: early::Key, bytes: &[u8]) {
    let held = early.hold(key, bytes, Instant::now());
    let counts = state.transmit_counts(shared, key.0);
    if held.dropped > 0 {
        counts.add(Reason::NoAssociation, held.dropped);
    }
    if held.say {
        shared.signal(Signal::Waiting { peer: key.0, device: key.1 }, counts);
    }
}

/// Seals a packet of our own and sends it, on the calling thread: the association takes two users, and needs it seldom.
pub(super) fn inject(shared: &Shared, peer: PeerIndex, device: DeviceIndex, packet: &[u8]) {
    let state = shared.state.load();
    let sent = state.way((peer, device), 0).ok_or(NoAssociation).and_then(|(peer, sa, path)| {
        let room = packet::esp::sealed_len(packet.len());
        let mut sender = Sender { output: Output::for_one(room), scratch: Box::default() };
        let header = vnet::Repr::default();
        sender.send(shared, &state, &Outgoing { peer, device, sa, path, mtu: usize::MAX, header, packet })?;
        sender.output.flush(shared, &state);
        Ok(())
    });
    if sent.is_err() {
        state.transmit_counts(shared, peer).add(Reason::NoAssociation, 1);
    }
}

/// There is no security association, or none that still seals.
#[derive(Debug)]
struct NoAssociation;

impl Sender {
    /// Sends what was read from a device: a virtio header and a packet.
    #[inline]
    fn send_read(
        &mut self,
        shared: &Shared,
        state: &State,
        key: early::Key,
        bytes: &[u8],
    ) -> Result<(), NoAssociation> {
        let (peer, sa, path) = state.way(key, self.output.worker()).ok_or(NoAssociation)?;
        let Some((header, packet)) = vnet::Repr::parse(bytes).zip(bytes.get(vnet::LEN..)) else {
            peer.lasting.drops.transmit.add(Reason::Malformed, 1);
            return Ok(());
        };
        let mtu = peer.mtu.map_or(usize::MAX, |mtu| mtu as usize);
        self.send(shared, state, &Outgoing { peer, device: key.1, sa, path, mtu, header, packet })
    }

    /// Cuts a packet, and seals what comes of it into the output.
    #[inline]
    fn send(&mut self, shared: &Shared, state: &State, out: &Outgoing<'_>) -> Result<(), NoAssociation> {
        let counts = &out.peer.lasting.drops.transmit;
        let (Ok(mut split), Ok(tos)) = (Split::new(&out.header, out.packet), ecn::tos(out.packet)) else {
            counts.add(Reason::Malformed, 1);
            return Ok(());
        };
        if split.stride() > out.mtu {
            return self.send_large(shared, state, out, split);
        }
        let mut burst = out.begin(split.segments_left())?;
        let tos = ecn::encapsulate(tos, DSCP);
        while let Some(inner) = split.next_len() {
            if self.output.is_full() {
                self.output.flush(shared, state);
            }
            let room = self.output.room();
            let Some(plain) = room.get_mut(HEAD_ROOM..) else { break };
            if split.emit(plain).is_none() {
                break;
            }
            if let Some(tap) = &out.peer.tap {
                tap.copy(Direction::Out, out.device, &plain[..inner], counts);
            }
            match burst.seal(room, inner) {
                Ok(sealed) => self.output.push(out.peer.index, out.path, tos, sealed),
                Err(reason) => counts.add(Reason::Esp(reason), 1),
            }
        }
        Ok(())
    }

    /// What is larger than the peer's MTU goes in fragments, or not at all and its sender is told (RFC 4301 §8.2.1).
    #[cold]
    fn send_large(
        &mut self,
        shared: &Shared,
        state: &State,
        out: &Outgoing<'_>,
        mut split: Split<'_>,
    ) -> Result<(), NoAssociation> {
        let counts = &out.peer.lasting.drops.transmit;
        // Taken out of our hands while we send, and put back whatever comes of it.
        let mut scratch = std::mem::take(&mut self.scratch);
        let (segment, piece) = scratch.split_at_mut(scratch.len() / 2);
        let mut told = false;
        let mut outcome = Ok(());
        while let Some(length) = split.emit(segment) {
            let segment = &segment[..length];
            let mut each = |sender: &mut Self, packet: &[u8]| {
                let header = vnet::Repr::default();
                let sent = sender.send(shared, state, &Outgoing { header, packet, ..*out });
                outcome = std::mem::replace(&mut outcome, Ok(())).and(sent);
            };
            if length <= out.mtu {
                each(self, segment);
            } else if let Some(mut fragments) = ipv4::Fragments::new(segment, out.mtu) {
                while let Some(length) = fragments.emit(piece) {
                    each(self, &piece[..length]);
                }
            } else {
                counts.add(Reason::TooBig, 1);
                if !std::mem::replace(&mut told, true) {
                    tell_too_big(state, out, segment);
                }
            }
        }
        self.scratch = scratch;
        outcome
    }
}

impl<'a> Outgoing<'a> {
    /// Takes sequence numbers.
    #[inline]
    fn begin(&self, packets: usize) -> Result<esp::Burst<'a>, NoAssociation> {
        self.sa.begin(u32::try_from(packets).unwrap_or(u32::MAX)).map_err(|reason| match reason {
            // Control removed it, or did not replace it in time.
            esp::Reason::Stopped | esp::Reason::Exhausted => NoAssociation,
            other => {
                self.peer.lasting.drops.transmit.add(Reason::Esp(other), packets);
                NoAssociation
            }
        })
    }
}

/// Tells the sender of a packet that it does not fit. The message comes from whom the packet was for, as in Linux's own
/// tunnels (`iptunnel_pmtud_build_icmp`): one of the router's own addresses would be refused as a martian.
#[cold]
fn tell_too_big(state: &State, out: &Outgoing<'_>, segment: &[u8]) {
    let mut message = [0; icmp::MESSAGE_LEN_MAX];
    let mtu = u32::try_from(out.mtu).unwrap_or(u32::MAX);
    let told = destination(segment)
        .and_then(|from| icmp::too_big(segment, from, mtu, &mut message).ok().flatten())
        .zip(state.devices.get(&out.device));
    if let Some((length, device)) = told {
        let header = vnet::Repr::default().emit();
        // As good as lost on the way: the sender tries again and is told again.
        let _ = device.queues.bulk[0].write(&[IoSlice::new(&header), IoSlice::new(&message[..length])]);
    }
}
