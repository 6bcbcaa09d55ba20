//! Devices: made, adjusted, removed.
//!
//! Requests that belong together are sent in a row: a device costs one round trip, whatever it is.

use std::net::IpAddr;
use std::os::fd::AsRawFd;

use model::Mac;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use netlink_packet_route::RouteNetlinkMessage::{self, DelLink, NewLink, SetLink};
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, BridgeBooleanOptionFlags, BridgeBooleanOptions, BridgeStpState,
    In6AddrGenMode, InfoBridge, InfoData, InfoKind, InfoVeth, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo,
    LinkMessage,
};
use nix::errno::Errno;
use plan::object::{HOST_DEVICE_PREFIX, Ifname, Link, LinkKind, Peer};
use plan::{Key, Object};

use crate::container;
use crate::error::{At, Error};
use crate::mirror::Shown;
use crate::namespace::{Namespace, get_link};
use crate::netlink::{Refusal, Request, Requests, request};
use crate::netns::Netns;
use crate::tun;

/// The device group of all that is made, so that it can be removed at once ("dw").
const GROUP: u32 = 0x6477;

/// How many packets, of up to 64 KB, wait in a queue of a TUN device for the agent. More adds delay under load, and little
/// speed.
const TUN_QUEUE: u32 = 32;

/// Where a device is made, and from where its other half is reached.
pub(crate) struct Site<'a> {
    /// The namespace it lives in.
    pub(crate) home: &'a mut Namespace,
    /// The host's, when that is another: VXLAN sends from there, and veth pairs end there.
    pub(crate) host: Option<&'a mut Namespace>,
}

impl Site<'_> {
    /// The host's namespace, which may be the home.
    fn host(&mut self) -> &mut Namespace {
        match &mut self.host {
            Some(host) => host,
            None => self.home,
        }
    }
}

/// Makes a device. One of that name that is there already stays if it will do, and is replaced if not.
pub(crate) fn add(site: &mut Site<'_>, shown: &mut Shown, name: &Ifname, want: &Link) -> Result<(), Error> {
    let attempted = || format!("make device {name}");
    match make(site, shown, name, want) {
        Err(error) if error.is(Errno::EEXIST) => {
            site.home.drain(shown)?;
            match shown.state.get(&(site.home.place.clone(), Key::Link(name.clone()))) {
                Some(have) if Object::Link(want.clone()).satisfied_by(have) => return Ok(()),
                Some(Object::Link(have)) if want.adjustable_from(have) => {
                    return adjust(site.home, shown, name, want, None);
                }
                // Of a kind that nobody asked for, but under our name.
                Some(_) | None => {}
            }
            let mut found =
                remove(&mut site.home.route, name).map_err(|refusal| refusal.to_error(attempted()))?;
            // On the host only what bears our prefix is ours to remove.
            if let Some(Peer::Host { name, .. }) = &want.peer
                && name.as_str().starts_with(HOST_DEVICE_PREFIX)
            {
                found |=
                    remove(&mut site.host().route, name).map_err(|refusal| refusal.to_error(attempted()))?;
            }
            if !found {
                return Err(error);
            }
            make(site, shown, name, want)?;
        }
        outcome => outcome?,
    }
    widen(site.home, shown, want)
}

/// Makes a device from another.
pub(crate) fn change(
    site: &mut Site<'_>,
    shown: &mut Shown,
    name: &Ifname,
    want: &Link,
    have: &Link,
) -> Result<(), Error> {
    if want.adjustable_from(have) {
        return adjust(site.home, shown, name, want, Some(have));
    }
    remove(&mut site.home.route, name)
        .map_err(|refusal| refusal.to_error(format!("replace device {name}")))?;
    // That end comes with the other one, which is next.
    if want.kind == LinkKind::VethEnd { Ok(()) } else { add(site, shown, name, want) }
}

/// Removes a device; says whether it was there.
pub(crate) fn remove(requests: &mut Requests<RouteNetlinkMessage>, name: &Ifname) -> Result<bool, Refusal> {
    match requests.request(request(DelLink(named(name, [])), 0)) {
        Ok(_) => Ok(true),
        Err(refusal) if refusal.errno == Errno::ENODEV => Ok(false),
        Err(refusal) => Err(refusal),
    }
}

/// Removes all devices that were made in the namespace of that socket, at once: whoever still has a socket there
/// keeps the namespace, but no device of it.
pub(crate) fn remove_all(requests: &mut Requests<RouteNetlinkMessage>) -> Result<(), Refusal> {
    requests.request(request(DelLink(message([LinkAttribute::Group(GROUP)])), 0)).map(drop)
}

fn make(site: &mut Site<'_>, shown: &mut Shown, name: &Ifname, want: &Link) -> Result<(), Error> {
    match (&want.kind, &want.peer) {
        (LinkKind::Bridge { link_local_learning }, _) => {
            make_bridge(site.home, name, want, *link_local_learning)
        }
        (LinkKind::Tun, _) => make_tun(site.home, name, want),
        (LinkKind::Vxlan { vni, port, local }, _) => make_vxlan(site, name, want, (*vni, *port, *local)),
        (LinkKind::Veth, Some(Peer::Host { name: peer, mac, mtu, gso_max_size, up })) => {
            let end = End { name: peer, mac: *mac, mtu: *mtu, gso_max_size: *gso_max_size };
            let host = site.host().ns.as_raw_fd();
            make_pair(site.home, name, want, &end, host)?;
            let bring_up = request(SetLink(set_up(named(peer, []), *up)), 0);
            let answer = site.host().route.requests(vec![no_link_local(peer), bring_up]).pop();
            if let Some(Err(refusal)) = answer {
                drop(remove(&mut site.home.route, name));
                return Err(refusal.to_error(format!("set up device {peer} of the host")));
            }
            Ok(())
        }
        (LinkKind::Veth, Some(Peer::Here { name: peer, master, mtu, gso_max_size })) => {
            let end = End { name: peer, mac: None, mtu: *mtu, gso_max_size: *gso_max_size };
            let here = site.home.ns.as_raw_fd();
            make_pair(site.home, name, want, &end, here)?;
            let rest =
                Link { kind: LinkKind::VethEnd, master: Some(master.clone()), peer: None, ..made(want) };
            let joined = set(site.home, peer, &rest).and_then(|()| {
                [name, peer].into_iter().try_for_each(|end| container::wait_for_port(site.home, shown, end))
            });
            let joined = joined.and_then(|()| widen(site.home, shown, &rest));
            if joined.is_err() {
                drop(remove(&mut site.home.route, name));
            }
            joined
        }
        (LinkKind::Veth, Some(Peer::Container(container))) => {
            let ns = Netns::open(&container.netns)?;
            let end = End {
                name: &container.ifname,
                mac: Some(container.mac),
                mtu: container.mtu,
                gso_max_size: container.gso_max_size,
            };
            make_pair(site.home, name, want, &end, ns.as_raw_fd()).map_err(|error| {
                if error.is(Errno::EEXIST) {
                    error.with_remedy("the container may have an interface of that name already")
                } else {
                    error
                }
            })?;
            let configured = container::configure(&ns, container).and_then(|()| match want.master {
                Some(_) => container::wait_for_port(site.home, shown, name),
                None => Ok(()),
            });
            if configured.is_err() {
                // Nothing is left behind: the other end goes with this one.
                drop(remove(&mut site.home.route, name));
            }
            configured
        }
        (LinkKind::Veth | LinkKind::VethEnd, _) => Err(Error::words(
            format!("make device {name}"),
            "one end of a veth pair cannot be made without its other end",
        )),
    }
}

fn make_bridge(home: &mut Namespace, name: &Ifname, want: &Link, learning: bool) -> Result<(), Error> {
    let info = vec![
        link_local_learning(learning),
        InfoBridge::ForwardDelay(0),
        InfoBridge::StpState(BridgeStpState::Disabled),
        InfoBridge::MulticastSnooping(false),
    ];
    let make = named(
        name,
        [LinkAttribute::Group(GROUP)]
            .into_iter()
            .chain(want.mac.map(address))
            .chain(sizes(None, want.gso_max_size, None))
            .chain([kind(InfoKind::Bridge, InfoData::Bridge(info))]),
    );
    // The MTU is set on what is made: only then does the bridge keep it, whatever its ports have.
    settle(home, name, make, &Link { mtu: want.mtu, ..made(want) })
}

fn link_local_learning(on: bool) -> InfoBridge {
    let mask = BridgeBooleanOptionFlags::NoLinkLocalLearn;
    let value = if on { BridgeBooleanOptionFlags::empty() } else { mask };
    InfoBridge::MultiBoolOpt(BridgeBooleanOptions { value, mask })
}

fn make_vxlan(
    site: &mut Site<'_>,
    name: &Ifname,
    want: &Link,
    (vni, port, local): (u32, u16, IpAddr),
) -> Result<(), Error> {
    let home = site.home.ns.as_raw_fd();
    // Asked of the host and made in the router: its underlay socket is the host's.
    let source = match local {
        IpAddr::V4(local) => InfoVxlan::Local(local),
        IpAddr::V6(local) => InfoVxlan::Local6(local),
    };
    let info = vec![InfoVxlan::Id(vni), InfoVxlan::Port(port), source, InfoVxlan::Learning(false)];
    let make = named(
        name,
        [LinkAttribute::NetNsFd(home), LinkAttribute::Group(GROUP)]
            .into_iter()
            .chain(want.mac.map(address))
            .chain(sizes(want.mtu, want.gso_max_size, want.gso_ipv4_max_size))
            .chain([kind(InfoKind::Vxlan, InfoData::Vxlan(info))]),
    );
    let attempted = format!("make device {name} of {}", At(&site.home.place));
    site.host().route.request(creation(make)).map_err(|refusal| refusal.to_error(attempted))?;
    let settled = set(site.home, name, &made(want));
    if settled.is_err() {
        drop(remove(&mut site.home.route, name));
    }
    settled
}

/// Netlink makes no TUN devices (`tun_validate()`): the device is made by opening it, and the rest is set.
fn make_tun(home: &mut Namespace, name: &Ifname, want: &Link) -> Result<(), Error> {
    tun::make(&home.ns, name.as_str())?;
    let ours = [LinkAttribute::Group(GROUP), LinkAttribute::TxQueueLen(TUN_QUEUE)];
    let answer = home.route.request(request(SetLink(named(name, ours)), 0));
    let settled = match answer {
        Ok(_) => set(home, name, want),
        Err(refusal) => Err(refusal.to_error(format!("set up device {name} of {}", At(&home.place)))),
    };
    if settled.is_err() {
        drop(remove(&mut home.route, name));
    }
    settled
}

/// The far end of a veth pair, as it is made: down, for neither end can be up before there are two.
struct End<'a> {
    name: &'a Ifname,
    mac: Option<Mac>,
    mtu: u32,
    gso_max_size: Option<u32>,
}

fn make_pair(home: &mut Namespace, name: &Ifname, want: &Link, end: &End<'_>, ns: i32) -> Result<(), Error> {
    let far = named(
        end.name,
        [LinkAttribute::NetNsFd(ns)].into_iter().chain(end.mac.map(address)).chain(sizes(
            Some(end.mtu),
            end.gso_max_size,
            None,
        )),
    );
    let make = named(
        name,
        [LinkAttribute::Group(GROUP)]
            .into_iter()
            .chain(want.mac.map(address))
            .chain(sizes(want.mtu, want.gso_max_size, want.gso_ipv4_max_size))
            .chain([kind(InfoKind::Veth, InfoData::Veth(InfoVeth::Peer(far)))]),
    );
    settle(home, name, make, &made(want))
}

/// What is still to be set on a device that was made with addresses and sizes.
fn made(want: &Link) -> Link {
    Link { mac: None, mtu: None, gso_max_size: None, ..want.clone() }
}

/// Makes a device in its home and sets what remains, in a row.
fn settle(home: &mut Namespace, name: &Ifname, make: LinkMessage, rest: &Link) -> Result<(), Error> {
    let master = master(home, rest)?;
    let attempted = format!("make device {name} of {}", At(&home.place));
    let mut answers = home
        .route
        .requests(vec![creation(make), no_link_local(name), assignment(name, rest, master)])
        .into_iter();
    answers
        .next()
        .unwrap_or(Err(Errno::EIO.into()))
        .map_err(|refusal| refusal.to_error(attempted.as_str()))?;
    if let Some(Err(refusal)) = answers.nth(1) {
        drop(remove(&mut home.route, name));
        return Err(refusal.to_error(attempted.as_str()));
    }
    Ok(())
}

/// Makes the device like `want`. What it has already is not set again: that could move it.
fn adjust(
    home: &mut Namespace,
    shown: &mut Shown,
    name: &Ifname,
    want: &Link,
    have: Option<&Link>,
) -> Result<(), Error> {
    let mut change = want.clone();
    let longer = have.is_none_or(|have| want.gso_ipv4_max_size != have.gso_ipv4_max_size);
    if let Some(have) = have {
        change.mac = change.mac.filter(|mac| Some(*mac) != have.mac);
        change.mtu = change.mtu.filter(|mtu| Some(*mtu) != have.mtu);
        change.gso_max_size = change.gso_max_size.filter(|size| Some(*size) != have.gso_max_size);
    }
    if matches!(want.kind, LinkKind::Bridge { .. }) && change.gso_max_size.is_some() {
        // With the one the kernel sets the other.
        change.gso_ipv4_max_size = widest_port(home, shown, name);
    }
    set(home, name, &change)?;
    if let LinkKind::Bridge { link_local_learning: on } = want.kind {
        let info = InfoData::Bridge(vec![link_local_learning(on)]);
        let alter = request(NewLink(named(name, [kind(InfoKind::Bridge, info)])), 0);
        home.route
            .request(alter)
            .map_err(|refusal| refusal.to_error(format!("set up device {name} of {}", At(&home.place))))?;
    }
    if change.gso_max_size.is_some() || (longer && change.gso_ipv4_max_size.is_some()) {
        look_again(home, shown, name)?;
    }
    widen(home, shown, want)
}

fn set(home: &mut Namespace, name: &Ifname, change: &Link) -> Result<(), Error> {
    let master = master(home, change)?;
    let mut answers =
        home.route.requests(vec![no_link_local(name), assignment(name, change, master)]).into_iter();
    match answers.nth(1) {
        Some(Err(refusal)) => Err(refusal.to_error(format!("set up device {name} of {}", At(&home.place)))),
        Some(Ok(_)) | None => Ok(()),
    }
}

fn master(home: &mut Namespace, want: &Link) -> Result<u32, Error> {
    want.master.as_ref().map_or(Ok(0), |master| home.index(master))
}

fn assignment(name: &Ifname, change: &Link, master: u32) -> Request<RouteNetlinkMessage> {
    let sizes = sizes(change.mtu, change.gso_max_size, change.gso_ipv4_max_size);
    let values = change.mac.map(address).into_iter().chain(sizes);
    let message = named(name, values.chain([LinkAttribute::Controller(master)]));
    request(SetLink(set_up(message, change.up)), 0)
}

/// IPv4 has a limit of its own since Linux 6.3; older kernels pass over its attribute.
fn sizes(mtu: Option<u32>, gso: Option<u32>, ipv4: Option<u32>) -> impl Iterator<Item = LinkAttribute> {
    let mtu = mtu.map(LinkAttribute::Mtu);
    let both = gso.map(LinkAttribute::GsoMaxSize);
    let ipv4 = ipv4.or(gso).map(LinkAttribute::GsoIpv4MaxSize);
    [mtu, both, ipv4].into_iter().flatten()
}

/// Has the bridge of a port let through what the port does. The kernel takes no such limit for a bridge without ports, and
/// forgets none with the last. An older one cuts nothing: it has no such limit.
fn widen(home: &mut Namespace, shown: &mut Shown, port: &Link) -> Result<(), Error> {
    let (Some(bridge), Some(size)) = (&port.master, port.gso_ipv4_max_size) else { return Ok(()) };
    let has = match shown.state.get(&(home.place.clone(), Key::Link(bridge.clone()))) {
        Some(Object::Link(link)) => link.gso_ipv4_max_size,
        Some(_) | None => None,
    };
    if has == Some(size) {
        return Ok(());
    }
    let mut message = message([LinkAttribute::GsoIpv4MaxSize(size)]);
    message.header.index = home.index(bridge)?;
    // Refused, long packets are cut for the bridge, as before.
    let _ = home.route.request(request(SetLink(message), 0));
    look_again(home, shown, bridge)
}

/// Reads a device whose change the kernel tells nobody of. Events from before it would hide it again.
fn look_again(home: &mut Namespace, shown: &mut Shown, name: &Ifname) -> Result<(), Error> {
    home.drain(shown)?;
    let link = get_link(&mut home.route, name)
        .map_err(|refusal| refusal.to_error(format!("read device {name} of {}", At(&home.place))))?;
    if let Some(link) = link {
        home.mirror.take(shown, NewLink(link), false);
    }
    Ok(())
}

/// What the ports of a bridge let through of IPv4 ([`widen`]).
fn widest_port(home: &Namespace, shown: &Shown, bridge: &Ifname) -> Option<u32> {
    let of = |((place, _), object): (&(plan::Place, Key), &Object)| match object {
        Object::Link(link) if *place == home.place && link.master.as_ref() == Some(bridge) => {
            link.gso_ipv4_max_size
        }
        _ => None,
    };
    shown.state.iter().filter_map(of).max()
}

/// Keeps the kernel from giving the device an IPv6 link-local address.
pub(crate) fn no_link_local(name: &Ifname) -> Request<RouteNetlinkMessage> {
    let inet6 = AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(In6AddrGenMode::None)]);
    request(SetLink(named(name, [LinkAttribute::AfSpecUnspec(vec![inet6])])), 0)
}

fn creation(message: LinkMessage) -> Request<RouteNetlinkMessage> {
    request(NewLink(message), NLM_F_CREATE | NLM_F_EXCL)
}

fn kind(kind: InfoKind, data: InfoData) -> LinkAttribute {
    LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind), LinkInfo::Data(data)])
}

fn message(attributes: impl IntoIterator<Item = LinkAttribute>) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.attributes.extend(attributes);
    message
}

/// A message about the device of that name.
pub(crate) fn named(name: &Ifname, attributes: impl IntoIterator<Item = LinkAttribute>) -> LinkMessage {
    message([LinkAttribute::IfName(name.as_str().to_owned())].into_iter().chain(attributes))
}

/// The message, also bringing the device up or down.
pub(crate) fn set_up(mut message: LinkMessage, up: bool) -> LinkMessage {
    message.header.flags.set(LinkFlags::Up, up);
    message.header.change_mask |= LinkFlags::Up;
    message
}

/// The attribute of an Ethernet address.
pub(crate) fn address(mac: Mac) -> LinkAttribute {
    LinkAttribute::Address(mac.0.to_vec())
}
