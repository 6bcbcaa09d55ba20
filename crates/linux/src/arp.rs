//! Announcing where an address is now: gratuitous ARP (RFC 826; RFC 5227 §3), from a router's bridge to all its ports.
//!
//! A neighbour that had the address on its own link holds on to its old entry for up to a minute. What is announced changes
//! nothing in this kernel.

use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsRawFd, OwnedFd};

use model::Mac;
use nix::errno::Errno;
use nix::libc;
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType};

use crate::error::Error;
use crate::netns::Netns;

/// Tells all on the link of `device` that `address` is at `mac`. IPv6 has its own way, and is left alone.
pub(crate) fn announce(ns: &Netns, device: &str, address: IpAddr, mac: Mac) -> Result<(), Error> {
    let IpAddr::V4(address) = address else { return Ok(()) };
    let failed = |errno| Error::errno(format!("announce {address} on {device}"), errno);
    ns.run(|| {
        let index = nix::net::if_::if_nametoindex(device)?;
        let (family, kind) = (AddressFamily::Packet, SockType::Datagram);
        // Of no protocol: it only sends.
        let socket = socket::socket(family, kind, SockFlag::SOCK_CLOEXEC, None)?;
        broadcast(&socket, index, &gratuitous(mac, address))
    })?
    .map_err(failed)
}

/// A request for the sender's own address.
fn gratuitous(mac: Mac, address: Ipv4Addr) -> [u8; 28] {
    // Ethernet, IPv4, lengths of their addresses, request; sender; target.
    let mut packet = [0; 28];
    packet[..8].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 1]);
    packet[8..14].copy_from_slice(&mac.0);
    packet[14..18].copy_from_slice(&address.octets());
    packet[24..28].copy_from_slice(&address.octets());
    packet
}

/// Sends to the broadcast address of a device; the kernel writes the Ethernet header.
fn broadcast(socket: &OwnedFd, index: u32, packet: &[u8]) -> Result<(), Errno> {
    let to = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: (libc::ETH_P_ARP as u16).to_be(),
        sll_ifindex: index.cast_signed(),
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 6,
        sll_addr: [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0],
    };
    // SAFETY: both pointers are to values that live through the call, with the lengths given.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            packet.as_ptr().cast(),
            packet.len(),
            0,
            (&raw const to).cast(),
            size_of::<libc::sockaddr_ll>() as libc::socklen_t,
        )
    };
    Errno::result(sent).map(drop)
}
