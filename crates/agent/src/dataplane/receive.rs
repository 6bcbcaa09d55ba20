//! From the underlay to the devices: receive, tell IKE from ESP, open, check, merge, write.

use std::io::IoSlice;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use esp::{Entry, Opened, SaTable};
use linux::tun;
use linux::udp::{self, Received};
use packet::ecn::{self, Ecn};
use packet::encap::{self, Kind};
use packet::merge::{Merged, Merger, Offloads};
use packet::{ip, protocol};

use crate::dataplane::count::{Counts, Reason};
use crate::dataplane::limit::{OfAll, PerSource};
use crate::dataplane::state::{Device, Origin, Peer, Ports, Shared, State};
use crate::dataplane::tuning::RECEIVE_MAX;
use crate::dataplane::watch::{Waker, Watch, Work};
use crate::dataplane::{Direction, Error, Signal};

/// The bytes of a message: as much as UDP GRO puts together.
const MESSAGE: usize = 65_536;
/// Packets that are merged at once.
const BATCH: usize = 512;
/// Pieces of most superpackets, and of all: the header and what [`packet::merge`] joins.
const PIECES: usize = 66;
const PIECES_MAX: usize = 514;
/// IKE datagrams a second from one address: many hosts behind one NAT may come back at once.
const IKE_EACH: u32 = 256;
/// First requests of IKE a second from where no peer is expected, those without a cookie: more than are answered.
const IKE_STRANGERS: u32 = 256;
/// Where the responder's SPI lies in a message of IKE, and what the first payload is (RFC 7296 §3.1).
const RESPONDER_SPI: std::ops::Range<usize> = 8..16;
const NEXT_PAYLOAD: usize = 16;
/// A notification: in a first request, a cookie that it was asked for (RFC 7296 §2.6).
const NOTIFY: u8 = 41;
/// ICMP echo replies (RFC 792, RFC 4443 §4.2), and the bytes before their data.
const ECHO_REPLY_V4: u8 = 0;
const ECHO_REPLY_V6: u8 = 129;
const ECHO_LEN: usize = 8;

/// The receiving thread.
pub(super) struct Receiver {
    shared: Arc<Shared>,
    worker: usize,
    stop: Arc<AtomicBool>,
    watch: Watch<Source>,
    /// Room for all messages of one call: what they hold is merged across them.
    arena: Box<[u8]>,
    received: Vec<Received>,
    inner: Inner,
    /// Those of port 500 that are watched.
    ike: Arc<Ports>,
}

/// What does not depend on the buffers.
struct Inner {
    worker: usize,
    merger: Merger,
    ike: PerSource,
    strangers: OfAll,
    unknown: PerSource,
}

/// A socket that is watched.
struct Source {
    socket: Arc<udp::Socket>,
    /// IKE alone comes here, without a marker.
    ike: bool,
}

/// Packets of one security association that follow each other.
struct Run<'a> {
    spi: u32,
    receiver: esp::Receiver<'a>,
    entry: &'a Entry<Origin>,
    /// `None` while control removes the peer.
    peer: Option<&'a Peer>,
    device: Option<&'a Device>,
    counts: &'a Counts,
}

impl Receiver {
    pub fn new(shared: Arc<Shared>, worker: usize, stop: Arc<AtomicBool>) -> Result<Self, Error> {
        let mut watch = Watch::new(shared.tuning.spin)?;
        let messages = shared.tuning.receive;
        for socket in shared.ports[worker].sockets() {
            watch.add(Source { socket: Arc::clone(socket), ike: false })?;
        }
        Ok(Self {
            ike: Arc::default(),
            shared,
            worker,
            stop,
            watch,
            arena: vec![0; messages * MESSAGE].into(),
            received: Vec::with_capacity(messages),
            inner: Inner {
                worker,
                merger: Merger::new(BATCH, Offloads { tcp: false, udp: false, long: false }),
                ike: PerSource::new(IKE_EACH),
                strangers: OfAll::new(IKE_STRANGERS),
                unknown: PerSource::new(1),
            },
        })
    }

    pub fn waker(&self) -> Waker {
        self.watch.waker()
    }

    pub fn run(mut self) {
        let mut states = self.shared.state.reader();
        let mut tables = self.shared.inbound.reader();
        while !self.stop.load(Ordering::Relaxed) {
            let Self { worker, watch, shared, arena, received, inner, ike, .. } = &mut self;
            let sockets = &states.get().ike;
            // Of port 500 there is one socket, and the first worker has it.
            if *worker == 0 && !Arc::ptr_eq(ike, sockets) {
                watch_ike(watch, sockets, &shared.drops.receive);
                *ike = Arc::clone(sockets);
            }
            let worked = watch.round(|source| {
                let mut buffers = arena.chunks_exact_mut(MESSAGE);
                let mut buffers: [_; RECEIVE_MAX] =
                    std::array::from_fn(|_| buffers.next().unwrap_or_default());
                match source.socket.receive(&mut buffers[..shared.tuning.receive], received) {
                    Ok(0) => return Work::Dry,
                    Ok(_) => {}
                    Err(_) => {
                        // Not of a peer: the kernel is short of memory. It comes again or it does not.
                        shared.drops.receive.add(Reason::SocketRefused, 1);
                        return Work::Dry;
                    }
                }
                // After the packets came: what was published before they were sent is known now.
                inner.take_in(shared, states.get(), tables.get(), source.ike, received, arena);
                let datagrams = received.iter().map(|it| it.len.div_ceil(it.stride.max(1))).sum();
                Work::Done(datagrams, received.iter().map(|it| it.len).sum())
            });
            // Who sleeps keeps no key that was removed.
            tables.get();
            self.watch.rest(worked, None);
        }
    }
}

/// Watches these sockets of port 500 instead of others.
fn watch_ike(watch: &mut Watch<Source>, ports: &Ports, counts: &Counts) {
    watch.retain(|source| !source.ike);
    for socket in ports.sockets() {
        if watch.add(Source { socket: Arc::clone(socket), ike: true }).is_err() {
            counts.add(Reason::SocketRefused, 1);
        }
    }
}

impl AsFd for Source {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Inner {
    /// All datagrams of some messages, each at its place in `bytes`.
    fn take_in(
        &mut self,
        shared: &Shared,
        state: &State,
        table: &SaTable<Origin>,
        ike: bool,
        messages: &[Received],
        bytes: &mut [u8],
    ) {
        let mut run: Option<Run<'_>> = None;
        // The device that packets wait for in the merger.
        let mut merging: Option<&Device> = None;
        let datagrams = messages.iter().enumerate().flat_map(|(index, message)| {
            let start = index * MESSAGE;
            let end = start + message.len.min(MESSAGE);
            let stride = message.stride.max(1);
            (start..end).step_by(stride).map(move |at| (message, at..end.min(at + stride)))
        });
        for (message, range) in datagrams {
            let datagram = &bytes[range.clone()];
            let kind = if ike { Kind::Ike(datagram) } else { encap::classify(datagram) };
            let spi = match kind {
                Kind::Esp(spi) => spi,
                Kind::Keepalive => continue,
                Kind::Ike(header) => {
                    self.take_ike(shared, state, message, datagram, begins(header));
                    continue;
                }
                Kind::Runt => {
                    shared.drops.receive.add(Reason::Runt, 1);
                    continue;
                }
            };
            if run.as_ref().is_none_or(|run| run.spi != spi) {
                // The old one gives back its window first: it may be for the same association.
                drop(run.take());
                run = Run::begin(shared, state, table, spi);
            }
            let Some(run) = &mut run else {
                self.take_unknown(shared, message);
                continue;
            };
            let Some(inner) = run.open(shared, message, &mut bytes[range.clone()]) else { continue };
            let Some(device) = run.device else {
                run.counts.add(Reason::NoDevice, 1);
                continue;
            };
            if let Some(other) = merging
                && (!std::ptr::eq(other, device) || self.merger.is_full())
            {
                self.write(shared, other, bytes);
                merging = None;
            }
            if merging.is_none() {
                let offloads = device.queues.bulk[self.queue_of(device)].offloads();
                let merge = !shared.tuning.no_merge;
                let onward = state.routes.get(&device.index).is_some_and(|routes| routes.onward());
                self.merger.set_offloads(Offloads {
                    tcp: merge && offloads.tso,
                    udp: merge && offloads.uso,
                    long: !shared.tuning.no_long && !onward && device.takes_long(),
                });
                merging = Some(device);
            }
            let inner = range.start + inner.start..range.start + inner.end;
            if self.merger.push(bytes, inner).is_err() {
                run.counts.add(Reason::Esp(esp::Reason::BadInner), 1);
            }
        }
        if let Some(device) = merging {
            self.write(shared, device, bytes);
        }
    }

    #[cold]
    fn take_ike(
        &mut self,
        shared: &Shared,
        state: &State,
        message: &Received,
        datagram: &[u8],
        begins: bool,
    ) {
        let (from, now) = (message.path.remote.ip(), Instant::now());
        // A flood of them costs a look here, and the threads that answer nothing.
        let mut may_begin =
            || !begins || state.expected.contains(&from.to_canonical()) || self.strangers.pass(now);
        if self.ike.pass(from, now) && may_begin() {
            let signal = Signal::Ike { path: message.path, payload: datagram.to_vec() };
            shared.signal(signal, &shared.drops.receive);
        } else {
            shared.drops.receive.add(Reason::IkeRate, 1);
        }
    }

    #[cold]
    fn take_unknown(&mut self, shared: &Shared, message: &Received) {
        shared.drops.receive.add(Reason::Esp(esp::Reason::UnknownSpi), 1);
        if self.unknown.pass(message.path.remote.ip(), Instant::now()) {
            shared.signal(Signal::UnknownSpi { path: message.path }, &shared.drops.receive);
        }
    }

    /// This worker's queue of a device. Where nobody steers, answers come back by the same (`tun_automq_select_queue`).
    fn queue_of(&self, device: &Device) -> usize {
        self.worker % device.queues.bulk.len()
    }

    /// Writes what was merged, all of it in `bytes`.
    fn write(&mut self, shared: &Shared, device: &Device, bytes: &mut [u8]) {
        let queue = &device.queues.bulk[self.queue_of(device)];
        let batch = self.merger.finish(bytes);
        for merged in batch.packets() {
            let written = if merged.segments() < PIECES {
                write_one::<PIECES>(queue, &merged, bytes)
            } else {
                write_one::<PIECES_MAX>(queue, &merged, bytes)
            };
            match written {
                Ok(true) => {}
                Ok(false) => shared.drops.receive.add(Reason::DeviceFull, merged.segments()),
                Err(error) => {
                    if merged.len() > usize::from(u16::MAX) && !tun::is_gone(&error) {
                        // Memory is in small pieces, or the kernel is older than 6.6. TCP sends again what was in this one.
                        device.short.store(true, Ordering::Relaxed);
                    }
                    shared.drops.receive.add(Reason::DeviceRefused, merged.segments());
                }
            }
        }
    }
}

/// Whether a message of IKE is a first request that brings no cookie.
fn begins(message: &[u8]) -> bool {
    message.get(RESPONDER_SPI) == Some(&[0; 8]) && message.get(NEXT_PAYLOAD) != Some(&NOTIFY)
}

fn write_one<const N: usize>(queue: &tun::Queue, merged: &Merged<'_>, bytes: &[u8]) -> std::io::Result<bool> {
    let header = merged.header().emit();
    let mut pieces = [IoSlice::new(&[]); N];
    pieces[0] = IoSlice::new(&header);
    let mut count = 1;
    for (slot, range) in pieces[1..].iter_mut().zip(merged.pieces()) {
        *slot = IoSlice::new(&bytes[range]);
        count += 1;
    }
    queue.write(&pieces[..count])
}

impl<'a> Run<'a> {
    fn begin(shared: &'a Shared, state: &'a State, table: &'a SaTable<Origin>, spi: u32) -> Option<Self> {
        let entry = table.get(spi)?;
        let peer = state.peers.get(&entry.context.peer).map(AsRef::as_ref);
        let device = state.devices.get(&entry.context.device).map(AsRef::as_ref);
        let counts = peer.map_or(&shared.drops.receive, |peer| &peer.lasting.drops.receive);
        Some(Self { spi, receiver: entry.sa.begin(), entry, peer, device, counts })
    }

    /// Opens an ESP packet in place; where the inner packet for the device is, if there is one.
    #[inline]
    fn open(&mut self, shared: &Shared, message: &Received, bytes: &mut [u8]) -> Option<Range<usize>> {
        let highest = self.receiver.highest();
        let range = match self.receiver.open(bytes, &self.entry.policy) {
            Ok(Opened::Packet(range)) => range,
            Ok(Opened::Dummy) => return None,
            Err(reason) => {
                self.counts.add(Reason::Esp(reason), 1);
                return None;
            }
        };
        if let Some(peer) = self.peer {
            if peer.path != Some(message.path) && self.receiver.highest() > highest {
                self.say_moved(shared, peer, message.path);
            }
            if let Some(tap) = &peer.tap {
                tap.copy(Direction::In, self.entry.context.device, &bytes[range.clone()], self.counts);
            }
        }
        let packet = &mut bytes[range.clone()];
        match ecn::decapsulate_packet(packet, Ecn::of(message.tos)) {
            Ok(egress) if egress.ecn.is_some() => {}
            Ok(_) => {
                self.counts.add(Reason::Ecn, 1);
                return None;
            }
            Err(_) => {
                self.counts.add(Reason::Esp(esp::Reason::BadInner), 1);
                return None;
            }
        }
        if is_answer(packet, &shared.probe) {
            let Origin { peer, device } = self.entry.context;
            shared.signal(Signal::Answer { peer, device, packet: packet.to_vec() }, self.counts);
            return None;
        }
        Some(range)
    }

    #[cold]
    fn say_moved(&self, shared: &Shared, peer: &Peer, path: udp::Path) {
        if peer.lasting.moved.pass() {
            let inbound = self.entry.sa.spi();
            shared.signal(Signal::Moved { peer: peer.index, inbound, path }, self.counts);
        }
    }
}

/// Whether a packet that was opened is the reply to a probe of ours.
#[inline]
fn is_answer(packet: &[u8], magic: &[u8]) -> bool {
    let (protocol, kind) = match packet.first().map(|first| first >> 4) {
        Some(4) => (packet.get(9), (protocol::ICMP, ECHO_REPLY_V4)),
        Some(_) | None => (packet.get(6), (protocol::ICMPV6, ECHO_REPLY_V6)),
    };
    protocol == Some(&kind.0)
        && ip::locate(packet).is_ok_and(|layout| {
            let echo = &packet[layout.transport..layout.end];
            !layout.fragment
                && echo.first() == Some(&kind.1)
                && echo.get(ECHO_LEN..).is_some_and(|data| data.starts_with(magic))
        })
}
