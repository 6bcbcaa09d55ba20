//! Sockets inside of a namespace, for the services that a router offers at addresses that are not all its own.
//!
//! A transparent socket (`IP_TRANSPARENT`) takes packets for any address that routing calls local, and may send from
//! such an address. Who was asked, and who answers, travels beside each datagram (`IP_PKTINFO`, `ip(7)`).

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{
    self, AddressFamily, Backlog, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType,
    SockaddrIn, recvmsg, sendmsg, sockopt,
};

use crate::error::Error;
use crate::netns::Netns;

/// A UDP socket at an IPv4 address in the namespace. It does not block; it takes what is sent to any local address if
/// bound to `0.0.0.0`, and tells to which ([`recv_with_destination`]).
pub fn udp_transparent(ns: &Netns, address: SocketAddrV4) -> Result<UdpSocket, Error> {
    ns.run(|| {
        let fd = transparent(SockType::Datagram, address)?;
        socket::setsockopt(&fd, sockopt::Ipv4PacketInfo, &true)?;
        socket::setsockopt(&fd, sockopt::Ipv4OrigDstAddr, &true)?;
        Ok(UdpSocket::from(fd))
    })?
    .map_err(|errno| Error::errno(format!("open UDP socket {address}"), errno))
}

/// A TCP listener at an IPv4 address in the namespace. It does not block. The address that a client asked for is the
/// local address of its connection.
pub fn tcp_listener_transparent(ns: &Netns, address: SocketAddrV4) -> Result<TcpListener, Error> {
    ns.run(|| {
        let fd = transparent(SockType::Stream, address)?;
        socket::listen(&fd, Backlog::new(1024)?)?;
        Ok(TcpListener::from(fd))
    })?
    .map_err(|errno| Error::errno(format!("listen on TCP {address}"), errno))
}

/// An ordinary UDP socket in the namespace, to ask from there. It does not block.
pub fn udp(ns: &Netns, address: SocketAddr) -> Result<UdpSocket, Error> {
    ns.run(|| {
        let socket = UdpSocket::bind(address)?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    })?
    .map_err(|error: io::Error| Error::io(format!("open UDP socket {address}"), &error))
}

fn transparent(kind: SockType, address: SocketAddrV4) -> Result<OwnedFd, Errno> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket::socket(AddressFamily::Inet, kind, flags, None)?;
    socket::setsockopt(&fd, sockopt::ReuseAddr, &true)?;
    socket::setsockopt(&fd, sockopt::IpTransparent, &true)?;
    socket::bind(fd.as_raw_fd(), &SockaddrIn::from(address))?;
    Ok(fd)
}

/// Takes a datagram: its length, who sent it, and to which address and port. `WouldBlock` if none waits.
pub fn recv_with_destination(
    socket: &UdpSocket,
    buffer: &mut [u8],
) -> io::Result<(usize, SocketAddr, SocketAddr)> {
    let mut control = nix::cmsg_space!(libc::in_pktinfo, libc::sockaddr_in);
    let mut parts = [IoSliceMut::new(buffer)];
    let message =
        recvmsg::<SockaddrIn>(socket.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::empty())?;
    let from = message.address.map(SocketAddrV4::from);
    let mut asked = None;
    let mut original = None;
    for control in message.cmsgs()? {
        match control {
            ControlMessageOwned::Ipv4PacketInfo(info) => {
                asked = Some(Ipv4Addr::from(u32::from_be(info.ipi_addr.s_addr)));
            }
            ControlMessageOwned::Ipv4OrigDstAddr(address) => {
                original = Some(SocketAddrV4::from(SockaddrIn::from(address)));
            }
            _ => {}
        }
    }
    let local = socket.local_addr()?;
    let destination = match (original, asked) {
        (Some(original), _) => SocketAddr::V4(original),
        (None, Some(asked)) => SocketAddr::new(IpAddr::V4(asked), local.port()),
        (None, None) => local,
    };
    let from = from.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))?;
    Ok((message.bytes, SocketAddr::V4(from), destination))
}

/// Sends a datagram from that address, which need not be this machine's if the socket is transparent. Its port is the
/// socket's.
pub fn send_from(socket: &UdpSocket, bytes: &[u8], to: SocketAddr, from: IpAddr) -> io::Result<usize> {
    let (SocketAddr::V4(to), IpAddr::V4(from)) = (to, from) else {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "these sockets speak IPv4"));
    };
    let info = libc::in_pktinfo {
        ipi_ifindex: 0,
        ipi_spec_dst: libc::in_addr { s_addr: u32::from(from).to_be() },
        ipi_addr: libc::in_addr { s_addr: 0 },
    };
    let parts = [IoSlice::new(bytes)];
    let control = [ControlMessage::Ipv4PacketInfo(&info)];
    let to = SockaddrIn::from(to);
    Ok(sendmsg(socket.as_raw_fd(), &parts, &control, MsgFlags::empty(), Some(&to))?)
}
