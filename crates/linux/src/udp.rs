//! UDP sockets for tunnels: many datagrams in one call, from and to any address of this machine.
//!
//! One message to the kernel may be several datagrams of one length, the last maybe shorter (`UDP_SEGMENT`, `UDP_GRO`,
//! udp(7)); one call takes many messages (sendmmsg(2), recvmmsg(2)). Beside each travels which address of this machine
//! it comes from or goes to (`IP_PKTINFO`, RFC 3542 §6) and its DSCP and ECN (RFC 6040 §3, RFC 8200 §7).
//!
//! Nothing is fragmented: `IP_PMTUDISC_DO` sets DF and has the kernel remember what ICMP says of a path, so that what is
//! too large for it is refused with `EMSGSIZE` instead of being lost, and [`path_mtu`] tells what would pass. The other
//! choice, `IP_PMTUDISC_PROBE`, sets DF too, but is deaf to ICMP. The price is that forged ICMP can make a path smaller
//! for ten minutes, down to 552 bytes with IPv4 and 1280 with IPv6 (`net.ipv4.route.min_pmtu`, `mtu_expires`).
//!
//! Invariant: no call allocates, and none takes a lock: any thread may send while another does. What ICMP says of one
//! peer never fails a call about another (`IP_RECVERR` is off).

use std::io;
use std::mem::MaybeUninit;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use nix::errno::Errno;
use nix::libc::{self, c_int};

use crate::cmsg::{CONTROL, Control, Name, get, message, read, set};
use crate::error::Error;

/// How much may wait in the kernel each way, in bytes, where that is allowed.
const BUFFER: c_int = 7 << 20;
/// Messages for one sendmmsg(2).
const SEND_BATCH: usize = 64;
/// Messages for one recvmmsg(2).
const RECEIVE_BATCH: usize = 16;
/// Datagrams in one message: what all kernels with `UDP_SEGMENT` take (`UDP_MAX_SEGMENTS`).
const SEGMENTS: usize = 64;
/// Bytes in one message: an IPv4 packet of 65,535 without headers.
const MESSAGE: usize = 65_507;

/// A UDP socket on one port of all addresses of one family. It does not block.
#[derive(Debug)]
pub struct Socket {
    fd: OwnedFd,
    family: Family,
    port: u16,
    gso: AtomicBool,
    gro: bool,
}

/// The family of addresses that a socket speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6 alone.
    V6,
}

/// Between which addresses a datagram travels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Path {
    /// This machine's. Unspecified when sending: the kernel chooses. Its port is always the socket's.
    pub local: SocketAddr,
    /// The other's.
    pub remote: SocketAddr,
}

/// A message to send: datagrams of `segment` bytes each, the last maybe shorter.
#[derive(Debug, Clone, Copy)]
pub struct Send<'a> {
    /// Where from and to.
    pub path: Path,
    /// All datagrams one after the other.
    pub bytes: &'a [u8],
    /// The length of each datagram. `bytes.len()` or more: there is one.
    pub segment: usize,
    /// DSCP and ECN.
    pub tos: u8,
}

/// A message received: datagrams of `stride` bytes each, the last maybe shorter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Received {
    /// Where to and from.
    pub path: Path,
    /// The length of all datagrams together. 0: nothing of use.
    pub len: usize,
    /// The length of each datagram, never 0.
    pub stride: usize,
    /// DSCP and ECN. Datagrams that differ are not in one message.
    pub tos: u8,
}

impl Socket {
    /// Opens a socket on `port` (0: any that is free) in the calling thread's namespace.
    pub fn bind(family: Family, port: u16) -> Result<Self, Error> {
        let any = match family {
            Family::V4 => SocketAddr::from((Ipv4Addr::UNSPECIFIED, port)),
            Family::V6 => SocketAddr::from((Ipv6Addr::UNSPECIFIED, port)),
        };
        Self::open(family, any, false).map_err(|errno| {
            let error = Error::errno(format!("open UDP socket {any}"), errno);
            if errno == Errno::EADDRINUSE {
                error.with_remedy("another program has this port: stop that program, or set another port")
            } else {
                error
            }
        })
    }

    /// Opens several sockets on one port, the calling thread's namespace's. ESP comes to the socket whose place is the
    /// remainder of the SPI divided by their number; all else, IKE above all, to the first.
    pub fn bind_group(family: Family, port: u16, count: usize) -> Result<Vec<Self>, Error> {
        // Alone at first, so that a port which another program has is noticed.
        let first = Self::bind(family, port)?;
        if count <= 1 {
            return Ok(vec![first]);
        }
        let any = match family {
            Family::V4 => SocketAddr::from((Ipv4Addr::UNSPECIFIED, first.port)),
            Family::V6 => SocketAddr::from((Ipv6Addr::UNSPECIFIED, first.port)),
        };
        let failed =
            |errno| Error::errno(format!("share UDP port {} among {count} sockets", first.port), errno);
        set(&first.fd, libc::SOL_SOCKET, libc::SO_REUSEPORT, 1).map_err(failed)?;
        let more: Result<Vec<_>, Errno> = (1..count).map(|_| Self::open(family, any, true)).collect();
        let more = more.map_err(failed)?;
        steer_by_spi(&first.fd, count).map_err(failed)?;
        Ok(std::iter::once(first).chain(more).collect())
    }

    fn open(family: Family, any: SocketAddr, shared: bool) -> Result<Self, Errno> {
        let domain = match family {
            Family::V4 => libc::AF_INET,
            Family::V6 => libc::AF_INET6,
        };
        let kind = libc::SOCK_DGRAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: the call takes no pointers; the descriptor it returns is owned by nobody else.
        let fd = unsafe { OwnedFd::from_raw_fd(Errno::result(libc::socket(domain, kind, 0))?) };
        match family {
            Family::V4 => {
                set(&fd, libc::IPPROTO_IP, libc::IP_PKTINFO, 1)?;
                set(&fd, libc::IPPROTO_IP, libc::IP_RECVTOS, 1)?;
                set(&fd, libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_DO)?;
            }
            Family::V6 => {
                set(&fd, libc::IPPROTO_IPV6, libc::IPV6_V6ONLY, 1)?;
                set(&fd, libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO, 1)?;
                set(&fd, libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS, 1)?;
                set(&fd, libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER, libc::IPV6_PMTUDISC_DO)?;
            }
        }
        for (force, ask) in [(libc::SO_RCVBUFFORCE, libc::SO_RCVBUF), (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF)]
        {
            if set(&fd, libc::SOL_SOCKET, force, BUFFER).is_err() {
                // Without CAP_NET_ADMIN in the first user namespace: as much as the system's limit allows.
                let _ = set(&fd, libc::SOL_SOCKET, ask, BUFFER);
            }
        }
        let gro = set(&fd, libc::SOL_UDP, libc::UDP_GRO, 1).is_ok();
        let gso = AtomicBool::new(get(&fd, libc::SOL_UDP, libc::UDP_SEGMENT).is_ok());
        if shared {
            set(&fd, libc::SOL_SOCKET, libc::SO_REUSEPORT, 1)?;
        }
        let (address, length) = Name::of(any);
        // SAFETY: the address is a valid one of that length.
        Errno::result(unsafe { libc::bind(fd.as_raw_fd(), (&raw const address).cast(), length) })?;
        let socket = UdpSocket::from(fd);
        let port = socket.local_addr().map_err(|error| errno(&error))?.port();
        Ok(Self { fd: socket.into(), family, port, gso, gro })
    }

    /// The family of addresses it speaks.
    pub fn family(&self) -> Family {
        self.family
    }

    /// The port it is bound to.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Whether a message of many datagrams is one to the kernel. Where the kernel or a device refuses that, each
    /// datagram goes alone from then on.
    pub fn gso(&self) -> bool {
        self.gso.load(Relaxed)
    }

    /// Whether datagrams received may come together.
    pub fn gro(&self) -> bool {
        self.gro
    }

    /// From now on each datagram goes alone.
    pub fn refuse_gso(&self) {
        self.gso.store(false, Relaxed);
    }

    /// From now on each datagram comes alone. What waits already may still come together.
    pub fn refuse_gro(&mut self) {
        self.gro = set(&self.fd, libc::SOL_UDP, libc::UDP_GRO, 0).is_err() && self.gro;
    }

    /// Sends messages in order: how many went, and why the next one did not. Of that one the first datagrams may have
    /// gone, if it has more than 64, or more than 65,507 bytes, or there is no [`gso`](Self::gso).
    ///
    /// `WouldBlock` if the kernel's buffer is full, `EMSGSIZE` if `segment` is too large for the path ([`path_mtu`]),
    /// `EINVAL` or `ENETUNREACH` if `path.local` is not, or no longer, this machine's; `ENETUNREACH` and its like if
    /// there is no route; `EPERM` if a firewall forbids it.
    pub fn send(&self, messages: &[Send<'_>]) -> (usize, io::Result<()>) {
        let mut at = Cursor { message: 0, offset: 0 };
        // One datagram alone, to see whether segmentation is what was refused.
        let mut alone = false;
        loop {
            let gso = self.gso() && !alone;
            let batch = if alone { 1 } else { SEND_BATCH };
            match self.send_batch(messages, at, gso, batch) {
                Ok(0) => return (messages.len(), Ok(())),
                Ok(count) => {
                    for _ in 0..count {
                        at = chunk(messages, at, gso).map_or(at, |chunk| chunk.next);
                    }
                    if std::mem::take(&mut alone) && self.gso.swap(false, Relaxed) {
                        tracing::warn!(
                            port = self.port,
                            "datagrams are sent one by one: segmentation was refused"
                        );
                    }
                }
                Err(Errno::EINTR) => {}
                Err(Errno::EIO | Errno::EINVAL)
                    if chunk(messages, at, gso).is_some_and(|chunk| chunk.is_many()) =>
                {
                    alone = true;
                }
                Err(errno) => return (at.message, Err(errno.into())),
            }
        }
    }

    /// One sendmmsg(2): how many chunks went; 0 if there are none.
    fn send_batch(
        &self,
        messages: &[Send<'_>],
        mut at: Cursor,
        gso: bool,
        limit: usize,
    ) -> Result<usize, Errno> {
        let mut names = [const { MaybeUninit::<Name>::uninit() }; SEND_BATCH];
        let mut parts = [const { MaybeUninit::<libc::iovec>::uninit() }; SEND_BATCH];
        let mut controls = [const { MaybeUninit::<Control>::uninit() }; SEND_BATCH];
        let mut headers = [const { MaybeUninit::<libc::mmsghdr>::uninit() }; SEND_BATCH];
        let mut count: libc::c_uint = 0;
        let room = names.iter_mut().zip(&mut parts).zip(&mut controls).zip(&mut headers).take(limit);
        for (((name, part), control), header) in room {
            let Some(chunk) = chunk(messages, at, gso) else { break };
            let (to, to_length) = Name::of(chunk.path.remote);
            let control = control.write(Control::new());
            let mut length = control.put_source(0, chunk.path.local);
            length = match self.family {
                Family::V4 => control.put(length, libc::IPPROTO_IP, libc::IP_TOS, c_int::from(chunk.tos)),
                Family::V6 => {
                    control.put(length, libc::IPPROTO_IPV6, libc::IPV6_TCLASS, c_int::from(chunk.tos))
                }
            };
            if chunk.is_many() {
                length = control.put(length, libc::SOL_UDP, libc::UDP_SEGMENT, chunk.segment as u16);
            }
            let part = part.write(libc::iovec {
                iov_base: chunk.bytes.as_ptr().cast_mut().cast(),
                iov_len: chunk.bytes.len(),
            });
            let message = message(name.write(to), to_length, part, control, length);
            header.write(libc::mmsghdr { msg_hdr: message, msg_len: 0 });
            at = chunk.next;
            count += 1;
        }
        if count == 0 {
            return Ok(0);
        }
        // SAFETY: the first `count` headers are written; what they point to is too and outlives the call, which only
        // reads it.
        let sent = unsafe {
            libc::sendmmsg(
                self.fd.as_raw_fd(),
                headers.as_mut_ptr().cast(),
                count as libc::c_uint,
                FLAGS as _,
            )
        };
        Errno::result(sent).map(|sent| usize::try_from(sent).unwrap_or_default())
    }

    /// Receives messages, each into the buffer of its place; how many, and what they are in `out`, which is emptied
    /// before. 0 if none waits. Buffers are used as long as they are: with 64 KB nothing is cut. A datagram that was cut
    /// all the same is in `out` with a length of 0.
    pub fn receive<B: AsMut<[u8]>>(&self, buffers: &mut [B], out: &mut Vec<Received>) -> io::Result<usize> {
        out.clear();
        let mut names = [const { MaybeUninit::<Name>::uninit() }; RECEIVE_BATCH];
        let mut parts = [const { MaybeUninit::<libc::iovec>::uninit() }; RECEIVE_BATCH];
        let mut controls = [const { MaybeUninit::<Control>::uninit() }; RECEIVE_BATCH];
        let mut headers = [const { MaybeUninit::<libc::mmsghdr>::uninit() }; RECEIVE_BATCH];
        let mut count: libc::c_uint = 0;
        let room = names.iter_mut().zip(&mut parts).zip(&mut controls).zip(&mut headers);
        for ((((name, part), control), header), buffer) in room.zip(buffers) {
            let buffer = buffer.as_mut();
            let part =
                part.write(libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() });
            let control = control.write(Control::new());
            let length = size_of::<Name>() as libc::socklen_t;
            let message = message(name.write(Name::zero()), length, part, control, CONTROL);
            header.write(libc::mmsghdr { msg_hdr: message, msg_len: 0 });
            count += 1;
        }
        let received = loop {
            // SAFETY: the first `count` headers are written and point to buffers of the lengths they say, which outlive
            // the call.
            let received = unsafe {
                let none = std::ptr::null_mut();
                let headers = headers.as_mut_ptr().cast();
                libc::recvmmsg(self.fd.as_raw_fd(), headers, count, FLAGS as _, none)
            };
            match Errno::result(received) {
                Ok(received) => break usize::try_from(received).unwrap_or_default(),
                Err(Errno::EAGAIN) => return Ok(0),
                // Of one peer, and with this look at it gone.
                Err(errno) if errno == Errno::EINTR || is_of_a_peer(errno) => {}
                Err(errno) => return Err(errno.into()),
            }
        };
        for ((header, name), control) in headers.iter().zip(&names).zip(&controls).take(received) {
            // SAFETY: as many headers, names and controls were written above, and filled by the kernel.
            let (header, name, control) =
                unsafe { (header.assume_init_ref(), name.assume_init_ref(), control.assume_init_ref()) };
            out.push(self.received(header, name, control));
        }
        Ok(received)
    }

    fn received(&self, header: &libc::mmsghdr, name: &Name, control: &Control) -> Received {
        let length = header.msg_len as usize;
        let mut received = Received {
            path: Path { local: self.local(None), remote: name.read(self.family) },
            len: if header.msg_hdr.msg_flags & libc::MSG_TRUNC == 0 { length } else { 0 },
            stride: length.max(1),
            tos: 0,
        };
        #[allow(clippy::unnecessary_cast, reason = "its type is another with other C libraries")]
        let beside = header.msg_hdr.msg_controllen as usize;
        for (level, kind, value) in control.iter(beside) {
            match (level, kind) {
                (libc::IPPROTO_IP, libc::IP_PKTINFO) => {
                    if let Some(info) = read::<libc::in_pktinfo>(value) {
                        let address = Ipv4Addr::from(info.ipi_addr.s_addr.to_ne_bytes());
                        received.path.local = self.local(Some((IpAddr::V4(address), 0)));
                    }
                }
                (libc::IPPROTO_IPV6, libc::IPV6_PKTINFO) => {
                    if let Some(info) = read::<libc::in6_pktinfo>(value) {
                        let address = Ipv6Addr::from(info.ipi6_addr.s6_addr);
                        let scope = if address.is_unicast_link_local() { info.ipi6_ifindex } else { 0 };
                        received.path.local = self.local(Some((IpAddr::V6(address), scope)));
                    }
                }
                (libc::IPPROTO_IP, libc::IP_TOS) => {
                    received.tos = value.first().copied().unwrap_or_default();
                }
                (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) => {
                    received.tos =
                        read::<c_int>(value).and_then(|class| u8::try_from(class).ok()).unwrap_or_default();
                }
                (libc::SOL_UDP, libc::UDP_GRO) => {
                    let stride = read::<c_int>(value).and_then(|stride| usize::try_from(stride).ok());
                    received.stride = stride.filter(|stride| *stride > 0).unwrap_or(received.stride);
                }
                _ => {}
            }
        }
        received
    }

    fn local(&self, address: Option<(IpAddr, u32)>) -> SocketAddr {
        match (address, self.family) {
            (Some((IpAddr::V4(address), _)), _) => SocketAddrV4::new(address, self.port).into(),
            (Some((IpAddr::V6(address), scope)), _) => SocketAddrV6::new(address, self.port, 0, scope).into(),
            (None, Family::V4) => SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, self.port).into(),
            (None, Family::V6) => SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, self.port, 0, 0).into(),
        }
    }

    /// The largest IP packet, in bytes, that is believed to reach an address: what ICMP said, or what the device takes;
    /// in the calling thread's namespace. `None` if there is no route.
    pub fn path_mtu(&self, remote: IpAddr) -> Option<u32> {
        path_mtu(remote)
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Has the kernel choose among the sockets of a port by what a datagram begins with: the SPI, or zeroes before IKE. What
/// is shorter than that goes to the first.
fn steer_by_spi(fd: &OwnedFd, count: usize) -> Result<(), Errno> {
    let count = u32::try_from(count).map_err(|_| Errno::EINVAL)?;
    let step = |code: u32, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf: 0, k };
    let mut program = [
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0),
        step(libc::BPF_ALU | libc::BPF_MOD | libc::BPF_K, count),
        step(libc::BPF_RET | BPF_A, 0),
    ];
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    let length = size_of::<libc::sock_fprog>() as libc::socklen_t;
    // SAFETY: the kernel reads one `sock_fprog` and the program it points to, which both outlive the call.
    let outcome = unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_REUSEPORT_CBPF,
            (&raw const program).cast(),
            length,
        )
    };
    Errno::result(outcome).map(drop)
}

/// "Return the accumulator" (`linux/filter.h`).
const BPF_A: u32 = 0x10;

/// As [`Socket::path_mtu`]: the path belongs to the namespace, not to a socket.
pub fn path_mtu(remote: IpAddr) -> Option<u32> {
    let (any, level, option) = match remote {
        IpAddr::V4(_) => (IpAddr::V4(Ipv4Addr::UNSPECIFIED), libc::IPPROTO_IP, libc::IP_MTU),
        IpAddr::V6(_) => (IpAddr::V6(Ipv6Addr::UNSPECIFIED), libc::IPPROTO_IPV6, libc::IPV6_MTU),
    };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    // Connecting a UDP socket sends nothing, but looks up the route. Any port will do.
    socket.connect((remote, 9)).ok()?;
    get(&socket, level, option).ok().and_then(|mtu| u32::try_from(mtu).ok())
}

const FLAGS: c_int = libc::MSG_DONTWAIT;

/// Where in a row of messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cursor {
    message: usize,
    offset: usize,
}

/// What one message to the kernel is.
struct Chunk<'a> {
    path: Path,
    bytes: &'a [u8],
    segment: usize,
    tos: u8,
    next: Cursor,
}

impl Chunk<'_> {
    fn is_many(&self) -> bool {
        self.bytes.len() > self.segment
    }
}

/// The largest piece of a message from there on that the kernel takes at once; `None` at the end.
fn chunk<'a>(messages: &[Send<'a>], at: Cursor, gso: bool) -> Option<Chunk<'a>> {
    let message = messages.get(at.message)?;
    let segment = message.segment.max(1);
    let count = if gso { (MESSAGE / segment).clamp(1, SEGMENTS) } else { 1 };
    let rest = message.bytes.get(at.offset..).unwrap_or_default();
    let bytes = rest.get(..segment.saturating_mul(count)).unwrap_or(rest);
    let next = if bytes.len() == rest.len() {
        Cursor { message: at.message + 1, offset: 0 }
    } else {
        Cursor { message: at.message, offset: at.offset + bytes.len() }
    };
    Some(Chunk { path: message.path, bytes, segment, tos: message.tos, next })
}

/// Whether an error waiting on a socket is what ICMP or a route said of some peer.
fn is_of_a_peer(errno: Errno) -> bool {
    matches!(
        errno,
        Errno::ECONNREFUSED
            | Errno::ECONNRESET
            | Errno::EHOSTUNREACH
            | Errno::EHOSTDOWN
            | Errno::ENETUNREACH
            | Errno::ENETDOWN
            | Errno::EMSGSIZE
            | Errno::EPROTO
            | Errno::ENOPROTOOPT
            | Errno::EACCES
            | Errno::EPERM
            | Errno::ETIMEDOUT
    )
}

fn errno(error: &io::Error) -> Errno {
    error.raw_os_error().map_or(Errno::EIO, Errno::from_raw)
}
