//! The container's end of an endpoint: all that is set up inside of the container's namespace.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use netlink_packet_route::RouteNetlinkMessage::{self, SetLink};
use netlink_packet_route::address::AddressFlags;
use netlink_packet_route::route::RouteScope;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
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

/// Sets up the interface: sysctls, addresses, up, routes.
pub(crate) fn configure(ns: &Netns, end: &ContainerEnd) -> Result<(), Error> {
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
        Ok(())
    })?
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
