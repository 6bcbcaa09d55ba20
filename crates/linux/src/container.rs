//! The container's end of an endpoint: all that is set up inside of the container's namespace.

use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use model::Mac;
use netlink_packet_route::RouteNetlinkMessage::{self, SetLink};
use netlink_packet_route::address::AddressFlags;
use netlink_packet_route::route::RouteScope;
use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType};
use plan::object::{ContainerEnd, Ifname};

use crate::address;
use crate::error::Error;
use crate::link;
use crate::mirror::Shown;
use crate::namespace::{Namespace, get_link, index_of};
use crate::netlink::{Request, Requests, request};
use crate::netns::Netns;
use crate::route::{self, Hop};

/// How long a bridge may take to let frames through a new port.
const PORT_DEADLINE: Duration = Duration::from_secs(2);

/// Sets up the interface: sysctls, addresses, up, routes. Says its index.
pub(crate) fn configure(ns: &Netns, end: &ContainerEnd) -> Result<u32, Error> {
    ns.run(|| {
        let attempted = |what: &str| format!("set up {} in {}: {what}", end.ifname, end.netns.display());
        let mut requests = Requests::open()?;
        let index = index_of(&mut requests, &end.ifname)
            .map_err(|refusal| refusal.to_error(attempted("find the device")))?;
        // No link-local address on this interface, so no wait for duplicate address detection. Asked by netlink: the
        // sysctl's path is looked up among those of all namespaces, which takes longer with each endpoint. A kernel
        // without IPv6 has nothing to switch off.
        drop(requests.requests(vec![link::no_link_local(&end.ifname)]));

        let mut steps = vec![("bring up lo".to_owned(), up(&Ifname::new("lo")))];
        for address in &end.addresses {
            steps.push((format!("add {address}"), address::addition(index, *address, AddressFlags::empty())));
        }
        steps.push(("bring it up".to_owned(), up(&end.ifname)));
        for destination in &end.on_link {
            let hop = Hop { via: None, index: Some(index), scope: RouteScope::Link };
            steps.push((format!("route {destination}"), route::addition(*destination, &hop)));
        }
        if let Some(gateway) = end.gateway {
            let hop = Hop { via: Some(gateway), index: Some(index), scope: RouteScope::Universe };
            let any = route::default_of(gateway);
            steps.push((format!("route by {gateway}"), route::addition(any, &hop)));
        }
        let (names, messages): (Vec<_>, Vec<_>) = steps.into_iter().unzip();
        for (name, answer) in names.iter().zip(requests.requests(messages)) {
            answer.map_err(|refusal| refusal.to_error(attempted(name)))?;
        }
        Ok(index)
    })?
}

/// Announces the addresses by gratuitous ARP (RFC 5227, 3), on a thread of its own: the frame goes to each port of the
/// bridge, and with a thousand of them that takes longer than all the rest. The kernel would announce by itself
/// (`arp_notify`), but with the lock held that the next attachment needs. It is a courtesy to those with an old entry in
/// their ARP table; that it failed is only logged.
pub(crate) fn announce(ns: Netns, end: ContainerEnd, index: u32) {
    let announce = move || {
        let attempted = || format!("announce {} in {}", end.ifname, end.netns.display());
        let failed = |errno| Error::errno(attempted(), errno);
        let (family, kind) = (AddressFamily::Packet, SockType::Datagram);
        // Of no protocol: it only sends.
        let socket = socket::socket(family, kind, SockFlag::SOCK_CLOEXEC, None).map_err(failed)?;
        for address in &end.addresses {
            if let IpAddr::V4(address) = address.addr() {
                broadcast_arp(&socket, index, &gratuitous_arp(end.mac, address)).map_err(failed)?;
            }
        }
        Ok(())
    };
    let started = thread::Builder::new().name("announce".to_owned()).spawn(move || match ns.run(announce) {
        Ok(Ok(())) => {}
        Ok(Err(error)) | Err(error) => tracing::debug!(%error, "a container was not announced"),
    });
    if let Err(error) = started {
        tracing::debug!(%error, "a container was not announced");
    }
}

/// A request for the sender's own address (RFC 826).
fn gratuitous_arp(mac: Mac, address: Ipv4Addr) -> [u8; 28] {
    // Ethernet, IPv4, lengths of their addresses, request; sender; target.
    let mut packet = [0; 28];
    packet[..8].copy_from_slice(&[0, 1, 8, 0, 6, 4, 0, 1]);
    packet[8..14].copy_from_slice(&mac.0);
    packet[14..18].copy_from_slice(&address.octets());
    packet[24..28].copy_from_slice(&address.octets());
    packet
}

/// Sends to the broadcast address of a device; the kernel writes the Ethernet header.
fn broadcast_arp(socket: &OwnedFd, index: u32, packet: &[u8]) -> Result<(), Errno> {
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

/// A port lets frames through when its carrier was noticed: the kernel does that by itself, some time, or on being
/// asked for the device.
pub(crate) fn wait_for_port(home: &mut Namespace, shown: &mut Shown, name: &Ifname) -> Result<(), Error> {
    let attempted = || format!("wait for port {name}");
    let deadline = Instant::now() + PORT_DEADLINE;
    get_link(&mut home.route, name).map_err(|refusal| refusal.to_error(attempted()))?;
    loop {
        home.drain(shown)?;
        if home.mirror.forwarding(name) == Some(true) {
            return Ok(());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            // Not an error: the port is made and will do its work; only its first frames may be lost.
            tracing::warn!(%name, "the bridge does not let frames through its new port yet");
            return Ok(());
        }
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(home.route_events.as_fd(), PollFlags::POLLIN)], timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(Error::errno(attempted(), errno)),
        }
    }
}

fn up(name: &Ifname) -> Request<RouteNetlinkMessage> {
    request(SetLink(link::set_up(link::named(name, []), true)), 0)
}
