//! Devices: made, adjusted, removed.
//!
//! Requests that belong together are sent in a row: a device costs one round trip, whatever it is.

use std::net::IpAddr;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use plan::object::{HOST_DEVICE_PREFIX, Ifname, Link, LinkKind, Peer};
use plan::{Key, Object};

use crate::container;
use crate::error::{At, Error};
use crate::message::Request;
use crate::mirror::Shown;
use crate::namespace::Namespace;
use crate::netlink::{Refusal, Requests};
use crate::netns::Netns;
use crate::uapi::{
    AF_INET6, IFF_UP, IFLA_ADDRESS, IFLA_AF_SPEC, IFLA_BR_FORWARD_DELAY, IFLA_BR_MCAST_SNOOPING,
    IFLA_BR_STP_STATE, IFLA_GROUP, IFLA_IFNAME, IFLA_INET6_ADDR_GEN_MODE, IFLA_INFO_DATA, IFLA_INFO_KIND,
    IFLA_LINKINFO, IFLA_MASTER, IFLA_MTU, IFLA_NET_NS_FD, IFLA_VXLAN_ID, IFLA_VXLAN_LEARNING,
    IFLA_VXLAN_LOCAL, IFLA_VXLAN_LOCAL6, IFLA_VXLAN_PORT, IN6_ADDR_GEN_MODE_NONE, NLM_F_CREATE, NLM_F_EXCL,
    RTM_DELLINK, RTM_NEWLINK, RTM_SETLINK, VETH_INFO_PEER,
};

/// The device group of all that is made, so that it can be removed at once ("dw").
const GROUP: u32 = 0x6477;

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
                    return adjust(site.home, name, want, None);
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
            if found { make(site, shown, name, want) } else { Err(error) }
        }
        outcome => outcome,
    }
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
        return adjust(site.home, name, want, Some(have));
    }
    remove(&mut site.home.route, name)
        .map_err(|refusal| refusal.to_error(format!("replace device {name}")))?;
    // That end comes with the other one, which is next.
    if want.kind == LinkKind::VethEnd { Ok(()) } else { add(site, shown, name, want) }
}

/// Removes a device; says whether it was there.
pub(crate) fn remove(requests: &mut Requests, name: &Ifname) -> Result<bool, Refusal> {
    match requests.request(request(RTM_DELLINK, 0, 0, 0).put_text(IFLA_IFNAME, name.as_str())) {
        Ok(_) => Ok(true),
        Err(refusal) if refusal.errno == Errno::ENODEV => Ok(false),
        Err(refusal) => Err(refusal),
    }
}

/// Removes all devices that were made in the namespace of that socket, at once: whoever still has a socket there
/// keeps the namespace, but no device of it.
pub(crate) fn remove_all(requests: &mut Requests) -> Result<(), Refusal> {
    requests.request(request(RTM_DELLINK, 0, 0, 0).put_u32(IFLA_GROUP, GROUP)).map(drop)
}

fn make(site: &mut Site<'_>, shown: &mut Shown, name: &Ifname, want: &Link) -> Result<(), Error> {
    match (&want.kind, &want.peer) {
        (LinkKind::Bridge, _) => make_bridge(site.home, name, want),
        (LinkKind::Vxlan { vni, port, local }, _) => make_vxlan(site, name, want, (*vni, *port, *local)),
        (LinkKind::Veth, Some(Peer::Host { name: peer, mac, mtu, up })) => {
            let end = End { name: peer, mac: mac.map(|mac| mac.0), mtu: *mtu };
            let host = site.host().ns.as_raw_fd();
            make_pair(site.home, name, want, &end, host)?;
            let device = if *up { IFF_UP } else { 0 };
            let bring_up = request(RTM_SETLINK, 0, device, IFF_UP).put_text(IFLA_IFNAME, peer.as_str());
            let answer = site.host().route.requests(vec![no_link_local(peer), bring_up]).pop();
            if let Some(Err(refusal)) = answer {
                drop(remove(&mut site.home.route, name));
                return Err(refusal.to_error(format!("set up device {peer} of the host")));
            }
            Ok(())
        }
        (LinkKind::Veth, Some(Peer::Container(container))) => {
            let ns = Netns::open(&container.netns)?;
            let end = End { name: &container.ifname, mac: Some(container.mac.0), mtu: container.mtu };
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
                return configured;
            }
            container::announce(ns, container.clone());
            Ok(())
        }
        (LinkKind::Veth | LinkKind::VethEnd, _) => Err(Error::words(
            format!("make device {name}"),
            "one end of a veth pair cannot be made without its other end",
        )),
    }
}

fn make_bridge(home: &mut Namespace, name: &Ifname, want: &Link) -> Result<(), Error> {
    let make = request(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, 0, 0)
        .put_text(IFLA_IFNAME, name.as_str())
        .put_u32(IFLA_GROUP, GROUP)
        .put_some(IFLA_ADDRESS, want.mac.map(|mac| mac.0))
        .nest(IFLA_LINKINFO, |info| {
            info.put_text(IFLA_INFO_KIND, "bridge").nest(IFLA_INFO_DATA, |data| {
                data.put_u32(IFLA_BR_FORWARD_DELAY, 0)
                    .put_u32(IFLA_BR_STP_STATE, 0)
                    .put(IFLA_BR_MCAST_SNOOPING, &[0])
            })
        });
    // The MTU is set on what is made: only then does the bridge keep it, whatever its ports have.
    settle(home, name, want, make, want.mtu)
}

fn make_vxlan(
    site: &mut Site<'_>,
    name: &Ifname,
    want: &Link,
    (vni, port, local): (u32, u16, IpAddr),
) -> Result<(), Error> {
    let home = site.home.ns.as_raw_fd();
    // Asked of the host and made in the router: its underlay socket is the host's.
    let make = request(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, 0, 0)
        .put_text(IFLA_IFNAME, name.as_str())
        .put_u32(IFLA_NET_NS_FD, home.cast_unsigned())
        .put_u32(IFLA_GROUP, GROUP)
        .put_some(IFLA_ADDRESS, want.mac.map(|mac| mac.0))
        .put_some(IFLA_MTU, want.mtu.map(u32::to_ne_bytes))
        .nest(IFLA_LINKINFO, |info| {
            info.put_text(IFLA_INFO_KIND, "vxlan").nest(IFLA_INFO_DATA, |data| {
                let source = match local {
                    IpAddr::V4(_) => IFLA_VXLAN_LOCAL,
                    IpAddr::V6(_) => IFLA_VXLAN_LOCAL6,
                };
                data.put_u32(IFLA_VXLAN_ID, vni)
                    .put(IFLA_VXLAN_PORT, &port.to_be_bytes())
                    .put_ip(source, local)
                    .put(IFLA_VXLAN_LEARNING, &[0])
            })
        });
    let attempted = format!("make device {name} of {}", At(&site.home.place));
    site.host().route.request(make).map_err(|refusal| refusal.to_error(attempted))?;
    let settled = set(site.home, name, want, None);
    if settled.is_err() {
        drop(remove(&mut site.home.route, name));
    }
    settled
}

/// The far end of a veth pair, as it is made: down, for neither end can be up before there are two.
struct End<'a> {
    name: &'a Ifname,
    mac: Option<[u8; 6]>,
    mtu: u32,
}

fn make_pair(home: &mut Namespace, name: &Ifname, want: &Link, end: &End<'_>, ns: i32) -> Result<(), Error> {
    let make = request(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, 0, 0)
        .put_text(IFLA_IFNAME, name.as_str())
        .put_u32(IFLA_GROUP, GROUP)
        .put_some(IFLA_ADDRESS, want.mac.map(|mac| mac.0))
        .put_some(IFLA_MTU, want.mtu.map(u32::to_ne_bytes))
        .nest(IFLA_LINKINFO, |info| {
            info.put_text(IFLA_INFO_KIND, "veth").nest(IFLA_INFO_DATA, |data| {
                data.nest(VETH_INFO_PEER, |peer| {
                    peer.raw(&header(0, 0))
                        .put_text(IFLA_IFNAME, end.name.as_str())
                        .put_some(IFLA_ADDRESS, end.mac)
                        .put_u32(IFLA_MTU, end.mtu)
                        .put_u32(IFLA_NET_NS_FD, ns.cast_unsigned())
                })
            })
        });
    settle(home, name, want, make, None)
}

/// Makes a device in its home and sets what remains, in a row.
fn settle(
    home: &mut Namespace,
    name: &Ifname,
    want: &Link,
    make: Request,
    mtu: Option<u32>,
) -> Result<(), Error> {
    let master = master(home, want)?;
    let attempted = format!("make device {name} of {}", At(&home.place));
    let mut answers =
        home.route.requests(vec![make, no_link_local(name), assignment(name, want, mtu, master)]).into_iter();
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
fn adjust(home: &mut Namespace, name: &Ifname, want: &Link, have: Option<&Link>) -> Result<(), Error> {
    let mut change = want.clone();
    if let Some(have) = have {
        change.mac = change.mac.filter(|mac| Some(*mac) != have.mac);
        change.mtu = change.mtu.filter(|mtu| Some(*mtu) != have.mtu);
    }
    let mtu = change.mtu;
    set(home, name, &change, mtu)
}

fn set(home: &mut Namespace, name: &Ifname, want: &Link, mtu: Option<u32>) -> Result<(), Error> {
    let master = master(home, want)?;
    let mut answers =
        home.route.requests(vec![no_link_local(name), assignment(name, want, mtu, master)]).into_iter();
    match answers.nth(1) {
        Some(Err(refusal)) => Err(refusal.to_error(format!("set up device {name} of {}", At(&home.place)))),
        Some(Ok(_)) | None => Ok(()),
    }
}

fn master(home: &mut Namespace, want: &Link) -> Result<u32, Error> {
    want.master.as_ref().map_or(Ok(0), |master| home.index(master))
}

fn assignment(name: &Ifname, want: &Link, mtu: Option<u32>, master: u32) -> Request {
    request(RTM_SETLINK, 0, if want.up { IFF_UP } else { 0 }, IFF_UP)
        .put_text(IFLA_IFNAME, name.as_str())
        .put_some(IFLA_ADDRESS, want.mac.map(|mac| mac.0))
        .put_some(IFLA_MTU, mtu.map(u32::to_ne_bytes))
        .put_u32(IFLA_MASTER, master)
}

/// Keeps the kernel from giving the device an IPv6 link-local address.
fn no_link_local(name: &Ifname) -> Request {
    request(RTM_SETLINK, 0, 0, 0).put_text(IFLA_IFNAME, name.as_str()).nest(IFLA_AF_SPEC, |families| {
        families
            .nest(u16::from(AF_INET6), |inet6| inet6.put(IFLA_INET6_ADDR_GEN_MODE, &[IN6_ADDR_GEN_MODE_NONE]))
    })
}

/// A request about a device: `struct ifinfomsg` with flags and the mask of flags to change.
pub(crate) fn request(kind: u16, flags: u16, device: u32, change: u32) -> Request {
    Request::new(kind, flags, &header(device, change))
}

fn header(flags: u32, change: u32) -> [u8; 16] {
    let mut header = [0; 16];
    header[8..12].copy_from_slice(&flags.to_ne_bytes());
    header[12..16].copy_from_slice(&change.to_ne_bytes());
    header
}
