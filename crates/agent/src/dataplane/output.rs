//! Sealed packets on their way to the sockets.
//!
//! ESP packets are sealed where they are sent from, one after another in one buffer. Neighbours for one peer and of one
//! size become one message that the kernel cuts (UDP GSO), filled across superpackets; one flush is one `sendmmsg` for as
//! many messages as fit. What a socket refuses is counted for its peer and forgotten: IP promises no more.

use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use linux::udp;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::dataplane::count::Reason;
use crate::dataplane::state::{IKE_PORT, Peer, Shared, State};
use crate::dataplane::{PeerIndex, Signal};

/// The largest ESP packet: that of the largest inner one.
const PACKET_MAX: usize = packet::esp::sealed_len(u16::MAX as usize);
/// Bytes of one message: what one UDP datagram of IPv4 holds. The kernel refuses more even when it is to cut them.
const MESSAGE_MAX: usize = 65_507;
/// Datagrams of one message (`UDP_MAX_SEGMENTS` before Linux 6.9).
const SEGMENTS_MAX: usize = 64;
/// Messages that wait at once, and those given to the kernel in one call.
const MESSAGES_MAX: usize = 1024;
const CALL_MAX: usize = 16;
/// How long a full socket buffer is waited for before what is left of the flush is dropped.
const FULL_WAIT: Duration = Duration::from_millis(5);
/// IP and UDP headers around an ESP packet.
const OVERHEAD_V4: u32 = 20 + 8;
const OVERHEAD_V6: u32 = 40 + 8;
/// What every IPv6 link takes, and in practice every IPv4 one; said where the kernel does not know better.
const MTU_SAFE: u32 = 1280;

/// ESP packets that wait for a flush.
pub(super) struct Output {
    buffer: Box<[u8]>,
    used: usize,
    /// A flush is due when so many bytes wait.
    flush: usize,
    /// Whose sockets it leaves by.
    worker: usize,
    messages: Vec<Message>,
}

/// Datagrams of one size but for the last, for one path.
#[derive(Debug, Clone, Copy)]
struct Message {
    peer: PeerIndex,
    path: udp::Path,
    tos: u8,
    start: usize,
    len: usize,
    segment: usize,
    /// The last datagram was shorter: nothing may follow it.
    closed: bool,
}

impl Output {
    /// For a thread's stream of packets.
    pub fn new(flush: usize, worker: usize) -> Self {
        Self { flush, worker, ..Self::with_room(flush + PACKET_MAX, MESSAGES_MAX) }
    }

    /// For one ESP packet of so many bytes.
    pub fn for_one(bytes: usize) -> Self {
        Self::with_room(bytes, 1)
    }

    fn with_room(bytes: usize, messages: usize) -> Self {
        Self {
            buffer: vec![0; bytes].into(),
            used: 0,
            flush: bytes,
            worker: 0,
            messages: Vec::with_capacity(messages),
        }
    }

    /// Whose packets wait here.
    #[inline]
    pub fn worker(&self) -> usize {
        self.worker
    }

    /// Whether it should be flushed before another packet is sealed.
    #[inline]
    pub fn is_full(&self) -> bool {
        self.used >= self.flush || self.messages.len() == self.messages.capacity()
    }

    /// Where the next ESP packet is to be sealed.
    #[inline]
    pub fn room(&mut self) -> &mut [u8] {
        &mut self.buffer[self.used..]
    }

    /// Takes the ESP packet of so many bytes that was sealed in [`Output::room`].
    #[inline]
    pub fn push(&mut self, peer: PeerIndex, path: udp::Path, tos: u8, len: usize) {
        let start = self.used;
        self.used += len;
        if let Some(last) = self.messages.last_mut()
            && !last.closed
            && len <= last.segment
            && last.len + len <= MESSAGE_MAX
            && last.len < last.segment * SEGMENTS_MAX
            && (last.peer, last.path, last.tos) == (peer, path, tos)
        {
            last.len += len;
            last.closed = len < last.segment;
            return;
        }
        self.messages.push(Message { peer, path, tos, start, len, segment: len, closed: false });
    }

    /// Sends all that waits.
    pub fn flush(&mut self, shared: &Shared, state: &State) {
        let ports = &shared.ports[self.worker];
        let mut patience = Patience::default();
        let mut next = 0;
        while let Some(message) = self.messages.get(next) {
            let Some(socket) = ports.of(&message.path) else {
                let count = message.count();
                state.transmit_counts(shared, message.peer).add(Reason::SocketRefused, count);
                next += 1;
                continue;
            };
            let mut call = [message.send(&self.buffer); CALL_MAX];
            let mut length = 0;
            for (slot, message) in call.iter_mut().zip(&self.messages[next..]) {
                if !ports.of(&message.path).is_some_and(|other| std::ptr::eq(other, socket)) {
                    break;
                }
                *slot = message.send(&self.buffer);
                length += 1;
            }
            let (sent, result) = socket.send(&call[..length]);
            next += sent;
            let Err(error) = result else {
                // Less than all without a reason is not to be expected; never turn in circles for it.
                next += usize::from(sent == 0);
                continue;
            };
            let Some(message) = self.messages.get_mut(next) else { break };
            match Errno::from_raw(error.raw_os_error().unwrap_or_default()) {
                Errno::EINTR => {}
                Errno::EAGAIN if patience.wait(socket) => {}
                Errno::EAGAIN => {
                    for message in &self.messages[next..] {
                        state.transmit_counts(shared, message.peer).add(Reason::SocketFull, message.count());
                    }
                    break;
                }
                // This host has lost the address. It has another, and the peer will see that it moved.
                Errno::EINVAL | Errno::ENETUNREACH if !message.path.local.ip().is_unspecified() => {
                    message.path.local = any(&message.path.remote);
                }
                Errno::EMSGSIZE => {
                    let message = *message;
                    self.too_big(socket, message, shared, state);
                    next += 1;
                }
                _ => {
                    state.transmit_counts(shared, message.peer).add(Reason::SocketRefused, message.count());
                    next += 1;
                }
            }
        }
        self.messages.clear();
        self.used = 0;
    }

    /// The underlay takes less than we thought: what fits goes on its own, and control hears of the rest.
    #[cold]
    fn too_big(&self, socket: &udp::Socket, message: Message, shared: &Shared, state: &State) {
        let overhead = overhead(&message.path);
        let known = socket.path_mtu(message.path.remote.ip());
        let mtu = known.unwrap_or(MTU_SAFE);
        let fits = mtu.saturating_sub(overhead) as usize;
        if message.segment > fits
            && let Some(peer) = state.peers.get(&message.peer)
        {
            say_too_big(shared, peer, mtu);
        }
        let counts = state.transmit_counts(shared, message.peer);
        for bytes in message.bytes(&self.buffer).chunks(message.segment) {
            if bytes.len() > fits {
                counts.add(Reason::PathMtu, 1);
            } else if socket.send(&[udp::Send { bytes, ..message.send(&self.buffer) }]).0 == 0 {
                counts.add(Reason::SocketRefused, 1);
            }
        }
    }
}

impl Message {
    fn bytes<'a>(&self, buffer: &'a [u8]) -> &'a [u8] {
        &buffer[self.start..self.start + self.len]
    }

    fn send<'a>(&self, buffer: &'a [u8]) -> udp::Send<'a> {
        udp::Send { path: self.path, bytes: self.bytes(buffer), segment: self.segment, tos: self.tos }
    }

    /// Datagrams.
    fn count(&self) -> usize {
        self.len.div_ceil(self.segment)
    }
}

/// What one flush may wait for full buffers, all in all.
#[derive(Default)]
struct Patience {
    until: Option<Instant>,
}

impl Patience {
    /// Waits until the socket takes more; `false` when the time is over.
    #[cold]
    fn wait(&mut self, socket: &udp::Socket) -> bool {
        let now = Instant::now();
        let until = *self.until.get_or_insert(now + FULL_WAIT);
        let Some(left) = until.checked_duration_since(now) else { return false };
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::ZERO);
        // At least the time passes, so the loop around this ends.
        let _ = poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)], timeout);
        Instant::now() < until
    }
}

/// Sends a datagram that is not ours to seal.
pub(super) fn send_plain(shared: &Shared, path: udp::Path, payload: &[u8]) {
    let state = shared.state.load();
    let ports = if path.local.port() == IKE_PORT { &state.ike } else { &shared.ports[0] };
    let sent = ports.of(&path).map_or(0, |socket| {
        socket.send(&[udp::Send { path, bytes: payload, segment: payload.len().max(1), tos: 0 }]).0
    });
    if sent == 0 {
        shared.drops.transmit.add(Reason::SocketRefused, 1);
    }
}

/// Tells control that the underlay takes no more than `path_mtu` bytes of IP on the way to a peer.
fn say_too_big(shared: &Shared, peer: &Peer, path_mtu: u32) {
    if peer.lasting.too_big.pass() {
        shared.signal(Signal::TooBig { peer: peer.index, path_mtu }, &peer.lasting.drops.transmit);
    }
}

/// No address in particular, of the same family.
fn any(remote: &SocketAddr) -> SocketAddr {
    match remote {
        SocketAddr::V4(_) => SocketAddr::from(([0; 4], 0)),
        SocketAddr::V6(_) => SocketAddr::from(([0; 16], 0)),
    }
}

fn overhead(path: &udp::Path) -> u32 {
    match path.remote {
        SocketAddr::V4(_) => OVERHEAD_V4,
        SocketAddr::V6(_) => OVERHEAD_V6,
    }
}
