//! One namespace that is looked after: its sockets and its mirror.

use netlink_packet_netfilter::NetfilterMessage;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::RouteNetlinkMessage::{self, GetAddress, GetLink, GetNeighbour, GetRoute, GetRule};
use netlink_packet_route::address::AddressMessage;
use netlink_packet_route::link::{LinkAttribute, LinkExtentMask, LinkMessage};
use netlink_packet_route::neighbour::NeighbourMessage;
use netlink_packet_route::route::RouteMessage;
use netlink_packet_route::rule::RuleMessage;
use nix::errno::Errno;
use nix::libc;
use plan::Place;
use plan::object::{Family, Ifname};

use crate::bpf;
use crate::error::{At, Error};
use crate::link;
use crate::mirror::{Mirror, Shown};
use crate::netlink::{Events, Refusal, Requests, Seen, messages, request};
use crate::netns::Netns;
use crate::nft;

const GROUPS: [u32; 8] = [
    libc::RTNLGRP_LINK,
    libc::RTNLGRP_TC,
    libc::RTNLGRP_NEIGH,
    libc::RTNLGRP_IPV4_IFADDR,
    libc::RTNLGRP_IPV4_ROUTE,
    libc::RTNLGRP_IPV4_RULE,
    libc::RTNLGRP_IPV6_IFADDR,
    libc::RTNLGRP_IPV6_ROUTE,
];

/// How often in a row what is stale is read anew before giving the rest to the next look.
const ROUNDS: usize = 4;

/// A namespace with its sockets and its mirror.
#[derive(Debug)]
pub(crate) struct Namespace {
    pub(crate) place: Place,
    pub(crate) ns: Netns,
    pub(crate) route: Requests<RouteNetlinkMessage>,
    pub(crate) nft: Requests<NetfilterMessage>,
    pub(crate) route_events: Events,
    pub(crate) nft_events: Events,
    pub(crate) mirror: Mirror,
}

impl Namespace {
    /// Opens all sockets in the namespace. Subscribes before anything is read, so that no change is missed.
    pub(crate) fn open(place: Place, ns: Netns) -> Result<Self, Error> {
        let (route_events, nft_events, route, nft) = ns.run(|| {
            Ok::<_, Error>((
                Events::open::<RouteNetlinkMessage>(&GROUPS)?,
                Events::open::<NetfilterMessage>(&[libc::NFNLGRP_NFTABLES as u32])?,
                Requests::open()?,
                Requests::open()?,
            ))
        })??;
        let mirror = Mirror::new(place.clone());
        Ok(Self { place, ns, route, nft, route_events, nft_events, mirror })
    }

    /// Takes in all events that wait, then reads anew what has become stale.
    pub(crate) fn drain(&mut self, shown: &mut Shown) -> Result<(), Error> {
        for _ in 0..ROUNDS {
            self.take_events(shown)?;
            let stale = &mut self.mirror.stale;
            if std::mem::take(&mut stale.all) {
                self.read_all(shown)?;
            } else if std::mem::take(&mut stale.routes) {
                self.mirror.forget_routes(shown);
                self.dump(shown, routes()).inspect_err(|_| self.mirror.stale.routes = true)?;
            } else if std::mem::take(&mut stale.rules) {
                self.mirror.forget_rules(shown);
                self.dump(shown, rules()).inspect_err(|_| self.mirror.stale.rules = true)?;
            } else if std::mem::take(&mut stale.programs) {
                self.read_programs(shown).inspect_err(|_| self.mirror.stale.programs = true)?;
            } else if let Some(family) = stale.tables.pop_first() {
                self.reread_table(shown, family, false)?;
            } else {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Reads everything anew, sysctls apart.
    pub(crate) fn resync(&mut self, shown: &mut Shown) -> Result<(), Error> {
        self.mirror.stale.all = true;
        self.mirror.stale.tables.extend(nft::FAMILIES);
        self.drain(shown)
    }

    /// Reads an nft table anew. `ours`: we have just loaded it.
    pub(crate) fn reread_table(
        &mut self,
        shown: &mut Shown,
        family: Family,
        ours: bool,
    ) -> Result<(), Error> {
        let read = nft::reread(&mut self.nft, &mut self.mirror, shown, family, ours);
        if read.is_err() {
            self.mirror.stale.tables.insert(family);
        }
        read
    }

    /// The index of a device, which may have been made since events were last taken in.
    pub(crate) fn index(&mut self, name: &Ifname) -> Result<u32, Error> {
        if let Some(index) = self.mirror.index(name) {
            return Ok(index);
        }
        let attempted = || format!("find device {name} of {}", At(&self.place));
        let answer = index_of(&mut self.route, name);
        answer.map_err(|refusal| refusal.to_error(attempted()))
    }

    fn take_events(&mut self, shown: &mut Shown) -> Result<(), Error> {
        let attempted = |place: &Place| format!("read events of {}", At(place));
        loop {
            match self.route_events.next().map_err(|errno| Error::errno(attempted(&self.place), errno))? {
                Seen::Datagram(datagram) => {
                    messages(datagram).for_each(|message| self.mirror.take_event(shown, &message));
                }
                Seen::Nothing => break,
                Seen::Lost => {
                    tracing::warn!(place = %At(&self.place), "events were lost: reading everything anew");
                    self.mirror.stale.all = true;
                }
            }
        }
        loop {
            match self.nft_events.next().map_err(|errno| Error::errno(attempted(&self.place), errno))? {
                Seen::Datagram(datagram) => {
                    messages(datagram).for_each(|message| nft::take(&mut self.mirror, shown, &message));
                }
                Seen::Nothing => return Ok(()),
                Seen::Lost => self.mirror.stale.tables.extend(nft::FAMILIES),
            }
        }
    }

    fn read_all(&mut self, shown: &mut Shown) -> Result<(), Error> {
        let read = self.try_read_all(shown);
        if read.is_err() {
            self.mirror.stale.all = true;
        }
        read
    }

    fn try_read_all(&mut self, shown: &mut Shown) -> Result<(), Error> {
        self.mirror.forget_all(shown);
        // Twice: a port may come before its bridge, and is shown with its name.
        self.dump(shown, links(AddressFamily::Unspec))?;
        self.dump(shown, links(AddressFamily::Unspec))?;
        self.dump(shown, links(AddressFamily::Bridge))?;
        self.dump(shown, GetAddress(AddressMessage::default()))?;
        self.dump(shown, neighbours(AddressFamily::Unspec))?;
        self.dump(shown, neighbours(AddressFamily::Bridge))?;
        self.dump(shown, routes())?;
        self.dump(shown, rules())?;
        self.read_programs(shown)
    }

    fn read_programs(&mut self, shown: &mut Shown) -> Result<(), Error> {
        self.mirror.stale.programs = false;
        if self.place == Place::Host {
            return Ok(());
        }
        match bpf::read(self) {
            Ok(found) => {
                self.mirror.show_programs(shown, &found);
                Ok(())
            }
            // A kernel without queueing disciplines.
            Err(refusal) if refusal.errno == Errno::EOPNOTSUPP => Ok(()),
            Err(refusal) => {
                self.mirror.stale.programs = true;
                Err(refusal.to_error(format!("read the programs of {}", At(&self.place))))
            }
        }
    }

    fn dump(&mut self, shown: &mut Shown, query: RouteNetlinkMessage) -> Result<(), Error> {
        let replies = match self.route.dump(&request(query, 0)) {
            Ok(replies) => replies,
            // A kernel without bridges has no ports and no forwarding entries.
            Err(refusal) if refusal.errno == Errno::EOPNOTSUPP => Vec::new(),
            Err(refusal) => return Err(refusal.to_error(format!("read what {} has", At(&self.place)))),
        };
        for reply in replies {
            self.mirror.take(shown, reply, false);
        }
        Ok(())
    }
}

/// The index of a device in the namespace of that socket.
pub(crate) fn index_of(requests: &mut Requests<RouteNetlinkMessage>, name: &Ifname) -> Result<u32, Refusal> {
    get_link(requests, name)?.map(|link| link.header.index).ok_or(Errno::ENODEV.into())
}

/// Asks for a device. The kernel brings its carrier up to date before it answers.
pub(crate) fn get_link(
    requests: &mut Requests<RouteNetlinkMessage>,
    name: &Ifname,
) -> Result<Option<LinkMessage>, Refusal> {
    let replies = requests.request(request(GetLink(link::named(name, [skip_statistics()])), 0))?;
    Ok(replies.into_iter().find_map(|reply| match reply {
        RouteNetlinkMessage::NewLink(link) => Some(link),
        _ => None,
    }))
}

/// Asks for all devices, or all ports of bridges.
pub(crate) fn links(family: AddressFamily) -> RouteNetlinkMessage {
    let mut message = LinkMessage::default();
    message.header.interface_family = family;
    message.attributes.push(skip_statistics());
    GetLink(message)
}

fn skip_statistics() -> LinkAttribute {
    LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats])
}

pub(crate) fn neighbours(family: AddressFamily) -> RouteNetlinkMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family;
    GetNeighbour(message)
}

/// Asks for all routes.
pub(crate) fn routes() -> RouteNetlinkMessage {
    GetRoute(RouteMessage::default())
}

fn rules() -> RouteNetlinkMessage {
    let mut message = RuleMessage::default();
    message.header.family = AddressFamily::Inet;
    GetRule(message)
}
