//! One namespace that is looked after: its sockets and its mirror.

use nix::errno::Errno;
use plan::Place;
use plan::object::{Family, Ifname};

use crate::error::{At, Error};
use crate::message::{Message, Request, messages, u32_at};
use crate::mirror::{Mirror, Shown};
use crate::netlink::{Answer, Events, Protocol, Requests, Seen};
use crate::netns::Netns;
use crate::nft;
use crate::uapi::{
    AF_BRIDGE, AF_INET, AF_UNSPEC, IFLA_EXT_MASK, IFLA_IFNAME, NFNLGRP_NFTABLES, RTEXT_FILTER_SKIP_STATS,
    RTM_GETADDR, RTM_GETLINK, RTM_GETNEIGH, RTM_GETROUTE, RTM_GETRULE, RTNLGRP_IPV4_IFADDR,
    RTNLGRP_IPV4_ROUTE, RTNLGRP_IPV4_RULE, RTNLGRP_IPV6_IFADDR, RTNLGRP_IPV6_ROUTE, RTNLGRP_LINK,
    RTNLGRP_NEIGH,
};

const GROUPS: [u32; 7] = [
    RTNLGRP_LINK,
    RTNLGRP_NEIGH,
    RTNLGRP_IPV4_IFADDR,
    RTNLGRP_IPV4_ROUTE,
    RTNLGRP_IPV4_RULE,
    RTNLGRP_IPV6_IFADDR,
    RTNLGRP_IPV6_ROUTE,
];

/// How often in a row what is stale is read anew before giving the rest to the next look.
const ROUNDS: usize = 4;

/// A namespace with its sockets and its mirror.
#[derive(Debug)]
pub(crate) struct Namespace {
    pub(crate) place: Place,
    pub(crate) ns: Netns,
    pub(crate) route: Requests,
    pub(crate) nft: Requests,
    pub(crate) route_events: Events,
    pub(crate) nft_events: Events,
    pub(crate) mirror: Mirror,
}

impl Namespace {
    /// Opens all sockets in the namespace. Subscribes before anything is read, so that no change is missed.
    pub(crate) fn open(place: Place, ns: Netns) -> Result<Self, Error> {
        let (route_events, nft_events, route, nft) = ns.run(|| {
            Ok::<_, Error>((
                Events::open(Protocol::Route, &GROUPS)?,
                Events::open(Protocol::Netfilter, &[NFNLGRP_NFTABLES])?,
                Requests::open(Protocol::Route)?,
                Requests::open(Protocol::Netfilter)?,
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
                self.dump(shown, &query(RTM_GETROUTE, AF_UNSPEC))?;
            } else if std::mem::take(&mut stale.rules) {
                self.mirror.forget_rules(shown);
                self.dump(shown, &query(RTM_GETRULE, AF_INET))?;
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
                    messages(datagram).for_each(|message| self.mirror.take(shown, &message));
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
        let links = query(RTM_GETLINK, AF_UNSPEC).put_u32(IFLA_EXT_MASK, RTEXT_FILTER_SKIP_STATS);
        self.dump(shown, &links)?;
        self.dump(shown, &links)?;
        self.dump(shown, &query(RTM_GETLINK, AF_BRIDGE))?;
        self.dump(shown, &query(RTM_GETADDR, AF_UNSPEC))?;
        self.dump(shown, &query(RTM_GETNEIGH, AF_UNSPEC))?;
        self.dump(shown, &query(RTM_GETNEIGH, AF_BRIDGE))?;
        self.dump(shown, &query(RTM_GETROUTE, AF_UNSPEC))?;
        self.dump(shown, &query(RTM_GETRULE, AF_INET))
    }

    fn dump(&mut self, shown: &mut Shown, request: &Request) -> Result<(), Error> {
        let replies = match self.route.dump(request) {
            Ok(replies) => replies,
            // A kernel without bridges has no ports and no forwarding entries.
            Err(refusal) if refusal.errno == Errno::EOPNOTSUPP => Vec::new(),
            Err(refusal) => return Err(refusal.to_error(format!("read what {} has", At(&self.place)))),
        };
        for reply in replies {
            let message = Message { kind: reply.kind, flags: 0, sequence: 0, payload: &reply.payload };
            self.mirror.take(shown, &message);
        }
        Ok(())
    }
}

/// The index of a device in the namespace of that socket.
pub(crate) fn index_of(requests: &mut Requests, name: &Ifname) -> Result<u32, crate::netlink::Refusal> {
    let replies = get_link(requests, name)?;
    let index = replies.first().and_then(|reply| u32_at(&reply.payload, 4));
    index.ok_or(Errno::ENODEV.into())
}

/// Asks for a device. The kernel brings its carrier up to date before it answers.
pub(crate) fn get_link(requests: &mut Requests, name: &Ifname) -> Answer {
    requests.request(query(RTM_GETLINK, AF_UNSPEC).put_text(IFLA_IFNAME, name.as_str()))
}

/// A `GET` of that family. Its header is long enough for each kind: the kernel looks at the family alone.
fn query(kind: u16, family: u8) -> Request {
    let length = match kind {
        RTM_GETLINK => 16,
        RTM_GETADDR => 8,
        _ => 12,
    };
    let mut header = [0; 16];
    header[0] = family;
    Request::new(kind, 0, &header[..length])
}
