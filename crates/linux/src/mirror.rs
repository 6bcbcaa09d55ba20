//! The mirror of one namespace: what its kernel was last heard to have, kept up by events.
//!
//! The mirror writes what is in scope into the state that all namespaces share, and keeps to itself what names and
//! indices are needed for that.
//!
//! Invariant: after all events were read and nothing is stale, the state shows what the kernel has. What the kernel
//! does without an event is known and leads to `stale`: it drops IPv4 routes in silence when their device goes down, or
//! their source address or the last IPv4 address of their device goes away. Only a `gso_max_size` that someone else changes
//! shows no sooner than a resync.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use netlink_packet_core::{NLM_F_REPLACE, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::AddressMessage;
use netlink_packet_route::link::{LinkFlags, LinkMessage};
use netlink_packet_route::neighbour::NeighbourMessage;
use netlink_packet_route::route::RouteMessage;
use netlink_packet_route::rule::RuleMessage;
use netlink_packet_route::tc::TcMessage;
use plan::object::{Family, HOST_DEVICE_PREFIX, Ifname, Link, LinkKind, Program, Route, Rule};
use plan::{Key, Object, Place, Scope, State};

use crate::bpf;
use crate::netlink::{Incoming, unread};
use crate::nft::Fingerprint;
use crate::parse::{self, Parsed};

/// So many changed names are kept apart; beyond, everything is called changed.
const NAMES_APART: usize = 1 << 14;

/// The state of all namespaces, and which names in it changed since someone asked.
#[derive(Debug)]
pub(crate) struct Shown {
    pub(crate) state: State,
    changed: Scope,
}

impl Shown {
    pub(crate) fn new() -> Self {
        Self { state: State::new(), changed: Scope::Everything }
    }

    /// What changed since the last call.
    pub(crate) fn take_changes(&mut self) -> Scope {
        std::mem::replace(&mut self.changed, Scope::Only(BTreeSet::new()))
    }

    /// Shows an object, or no longer shows it.
    pub(crate) fn set(&mut self, name: (Place, Key), object: Option<Object>) {
        if self.state.get(&name) == object.as_ref() {
            return;
        }
        match &mut self.changed {
            Scope::Only(names) if names.len() < NAMES_APART => drop(names.insert(name.clone())),
            Scope::Only(_) | Scope::Everything => self.changed = Scope::Everything,
        }
        match object {
            Some(object) => self.state.insert(name, object),
            None => self.state.remove(&name),
        };
    }
}

/// What must be read anew before the state can be believed.
#[derive(Debug, Default)]
pub(crate) struct Stale {
    /// Everything that rtnetlink tells.
    pub(crate) all: bool,
    /// The routes.
    pub(crate) routes: bool,
    /// The rules.
    pub(crate) rules: bool,
    /// What hangs at the ingress of devices.
    pub(crate) programs: bool,
    /// These nft tables.
    pub(crate) tables: BTreeSet<Family>,
}

/// The mirror of one namespace.
#[derive(Debug)]
pub(crate) struct Mirror {
    place: Place,
    devices: BTreeMap<u32, Device>,
    indices: BTreeMap<Ifname, u32>,
    routes: BTreeMap<(u32, IpNet), Vec<Held>>,
    rules: BTreeMap<u32, Vec<Rule>>,
    /// What our tables were made of when they were last applied or first seen.
    pub(crate) fingerprints: BTreeMap<Family, Fingerprint>,
    pub(crate) stale: Stale,
    /// An address came or went that is not on a device of ours, since someone asked.
    pub(crate) moved: bool,
}

#[derive(Debug)]
struct Device {
    name: Ifname,
    /// `None` for a device of a kind that is not ours to judge: loopback, say.
    link: Option<Link>,
    /// Whether its bridge lets frames through its port.
    forwarding: bool,
    /// Addresses, neighbours and forwarding entries on it.
    hanging: BTreeSet<Key>,
}

impl Device {
    /// Whether programs at it are ours to judge: ports belong to containers.
    fn has_programs(&self) -> bool {
        matches!(
            &self.link,
            Some(Link { kind: LinkKind::Bridge { .. } | LinkKind::Vxlan { .. } | LinkKind::Tun, .. })
        )
    }

    fn has_ipv4(&self) -> bool {
        self.hanging.iter().any(|key| matches!(key, Key::Address(_, address) if address.addr().is_ipv4()))
    }
}

#[derive(Debug, PartialEq)]
struct Held {
    route: Route,
    index: Option<u32>,
}

impl Mirror {
    pub(crate) fn new(place: Place) -> Self {
        Self {
            place,
            devices: BTreeMap::new(),
            indices: BTreeMap::new(),
            routes: BTreeMap::new(),
            rules: BTreeMap::new(),
            fingerprints: BTreeMap::new(),
            stale: Stale {
                all: true,
                routes: false,
                rules: false,
                programs: false,
                tables: [Family::Inet, Family::Bridge].into(),
            },
            moved: false,
        }
    }

    /// The index of a device.
    pub(crate) fn index(&self, name: &Ifname) -> Option<u32> {
        self.indices.get(name).copied()
    }

    /// Whether the device's bridge lets frames through; `None` if there is no such device.
    pub(crate) fn forwarding(&self, name: &Ifname) -> Option<bool> {
        self.devices.get(self.indices.get(name)?).map(|device| device.forwarding)
    }

    /// All routes held under a table and destination.
    pub(crate) fn routes_to(&self, table: u32, destination: IpNet) -> impl Iterator<Item = &Route> {
        self.routes.get(&(table, destination)).into_iter().flatten().map(|held| &held.route)
    }

    /// Takes in an event. One that cannot be read means that the rest is to be read anew.
    pub(crate) fn take_event(&mut self, shown: &mut Shown, message: &Incoming<'_>) {
        match message.read() {
            Ok(NetlinkPayload::InnerMessage(inner)) => {
                self.take(shown, inner, message.header.flags & NLM_F_REPLACE != 0);
            }
            Ok(_) => {}
            Err(error) => {
                unread(message.header, &error);
                self.stale.all = true;
            }
        }
    }

    /// Takes in an rtnetlink message: an event, or part of a dump. `replaces`: it takes the place of another.
    pub(crate) fn take(&mut self, shown: &mut Shown, message: RouteNetlinkMessage, replaces: bool) {
        use RouteNetlinkMessage as Message;
        match message {
            Message::NewLink(link) => self.link(shown, &link, true),
            Message::DelLink(link) => self.link(shown, &link, false),
            Message::NewAddress(address) => self.address(shown, &address, true),
            Message::DelAddress(address) => self.address(shown, &address, false),
            Message::NewNeighbour(neighbour) => self.neighbour(shown, &neighbour, true),
            Message::DelNeighbour(neighbour) => self.neighbour(shown, &neighbour, false),
            Message::NewRoute(route) => self.new_route(shown, &route, replaces),
            Message::DelRoute(route) => self.lost_route(shown, &route),
            Message::NewRule(rule) => self.rule(shown, &rule, true),
            Message::DelRule(rule) => self.rule(shown, &rule, false),
            Message::NewQueueDiscipline(change)
            | Message::DelQueueDiscipline(change)
            | Message::NewTrafficFilter(change)
            | Message::DelTrafficFilter(change) => self.stale.programs |= bpf::concerns(&change),
            _ => {}
        }
    }

    /// Forgets all that rtnetlink tells, and the sysctls: a device's may be another device's by now.
    pub(crate) fn forget_all(&mut self, shown: &mut Shown) {
        self.devices.clear();
        self.indices.clear();
        self.routes.clear();
        self.rules.clear();
        self.stale.routes = false;
        self.stale.rules = false;
        self.stale.programs = false;
        self.drop_from(shown, |key| !matches!(key, Key::Netns | Key::Table(_) | Key::Element(..)));
    }

    /// Forgets the routes.
    pub(crate) fn forget_routes(&mut self, shown: &mut Shown) {
        self.routes.clear();
        self.drop_from(shown, |key| matches!(key, Key::Route(..)));
    }

    /// Shows what hangs at the ingress of the bridge and of overlay devices, and nothing else there.
    pub(crate) fn show_programs(&mut self, shown: &mut Shown, found: &[(u32, Vec<TcMessage>)]) {
        let have: BTreeMap<_, _> = found
            .iter()
            .filter_map(|(index, filters)| {
                let device = self.devices.get(index).filter(|device| device.has_programs())?;
                let digest = bpf::digest(filters, |name| self.index(&Ifname::new(name)));
                Some((device.name.clone(), Program { text: String::new(), digest }))
            })
            .collect();
        self.drop_from(shown, |key| matches!(key, Key::Program(name) if !have.contains_key(name)));
        for (name, program) in have {
            self.set(shown, Key::Program(name), Some(Object::Program(program)));
        }
    }

    /// Forgets the rules.
    pub(crate) fn forget_rules(&mut self, shown: &mut Shown) {
        self.rules.clear();
        self.drop_from(shown, |key| matches!(key, Key::Rule(_)));
    }

    /// Removes from the state what is in this place and to be dropped.
    pub(crate) fn drop_from(&self, shown: &mut Shown, drop: impl Fn(&Key) -> bool) {
        self.drop_range(shown, Key::Netns, |_| true, drop);
    }

    /// The same, among the keys from `first` on as long as `within`.
    fn drop_range(
        &self,
        shown: &mut Shown,
        first: Key,
        within: impl Fn(&Key) -> bool,
        drop: impl Fn(&Key) -> bool,
    ) {
        let names: Vec<_> = shown
            .state
            .range((self.place.clone(), first)..)
            .take_while(|((place, key), _)| *place == self.place && within(key))
            .filter(|((_, key), _)| drop(key))
            .map(|(name, _)| name.clone())
            .collect();
        for name in names {
            shown.set(name, None);
        }
    }

    pub(crate) fn set(&self, shown: &mut Shown, key: Key, object: Option<Object>) {
        shown.set((self.place.clone(), key), object);
    }

    fn in_scope(&self, name: &Ifname) -> bool {
        self.place != Place::Host || name.as_str().starts_with(HOST_DEVICE_PREFIX)
    }

    fn link(&mut self, shown: &mut Shown, message: &LinkMessage, present: bool) {
        let parsed = match parse::link(message) {
            Some(Parsed::Link(parsed)) => parsed,
            Some(Parsed::Port { index, forwarding }) => {
                if let Some(device) = self.devices.get_mut(&index) {
                    device.forwarding = present && forwarding;
                }
                return;
            }
            None => return,
        };
        if !present {
            self.forget_device(shown, parsed.index);
            return;
        }
        let name = parsed.name;
        let up = parsed.flags.contains(LinkFlags::Up);
        let mut device = match self.devices.remove(&parsed.index) {
            Some(known) if known.name == name => known,
            Some(known) => {
                // Renamed: everything that hangs on it has another name now.
                self.indices.remove(&known.name);
                self.set(shown, Key::Link(known.name), None);
                self.stale.all = true;
                Device { name: name.clone(), link: None, forwarding: false, hanging: BTreeSet::new() }
            }
            None => Device { name: name.clone(), link: None, forwarding: false, hanging: BTreeSet::new() },
        };
        let was_up = device.link.as_ref().is_some_and(|link| link.up);
        device.link = parsed.kind.map(|kind| Link {
            kind,
            mac: parsed.mac,
            mtu: parsed.mtu,
            gso_max_size: parsed.gso_max_size,
            gso_ipv4_max_size: parsed.gso_ipv4_max_size,
            master: parsed.master.map(|index| self.name(index)),
            up,
            peer: None,
        });
        if was_up && !up && self.routes.values().flatten().any(|held| held.index == Some(parsed.index)) {
            self.stale.routes = true;
        }
        if self.in_scope(&name) {
            self.set(shown, Key::Link(name.clone()), device.link.clone().map(Object::Link));
        }
        self.indices.insert(name, parsed.index);
        self.devices.insert(parsed.index, device);
    }

    fn forget_device(&mut self, shown: &mut Shown, index: u32) {
        let Some(device) = self.devices.remove(&index) else { return };
        if self.indices.get(&device.name) == Some(&index) {
            self.indices.remove(&device.name);
        }
        // A program elsewhere that names this device has lost it.
        self.stale.programs |= device.has_programs();
        for key in device.hanging {
            self.set(shown, key, None);
        }
        self.set(shown, Key::Program(device.name.clone()), None);
        let routes: Vec<_> = self
            .routes
            .iter_mut()
            .filter_map(|(key, held)| {
                let before = held.len();
                held.retain(|held| held.index != Some(index));
                (held.len() != before).then_some(*key)
            })
            .collect();
        for (table, destination) in routes {
            self.show_route(shown, table, destination);
        }
        let name = device.name.as_str();
        self.drop_range(
            shown,
            Key::Sysctl(String::new()),
            |key| matches!(key, Key::Sysctl(_)),
            |key| matches!(key, Key::Sysctl(path) if path.split('/').any(|part| part == name)),
        );
        self.set(shown, Key::Link(device.name), None);
    }

    /// The device's name, or a stand-in for one in another namespace or not yet heard of.
    fn name(&self, index: u32) -> Ifname {
        self.devices
            .get(&index)
            .map_or_else(|| Ifname::new(&format!("if{index}")), |device| device.name.clone())
    }

    fn address(&mut self, shown: &mut Shown, message: &AddressMessage, present: bool) {
        let Some((index, address)) = parse::address(message) else { return };
        let key = |name| Key::Address(name, address);
        self.moved |= !self.name(index).as_str().starts_with(HOST_DEVICE_PREFIX);
        self.hang(shown, index, key, present.then_some(Object::Address));
        if present {
            return;
        }
        let last = self.devices.get(&index).is_some_and(|device| !device.has_ipv4());
        let with_it =
            |held: &Held| held.route.src == Some(address.addr()) || (last && held.index == Some(index));
        if self.routes.values().flatten().any(with_it) {
            self.stale.routes = true;
        }
    }

    fn neighbour(&mut self, shown: &mut Shown, message: &NeighbourMessage, present: bool) {
        let Some(entry) = parse::neighbour(message) else { return };
        match entry {
            parse::Entry::Neighbour { index, address, mac } => {
                let object = mac.filter(|_| present).map(Object::Neighbour);
                self.hang(shown, index, |name| Key::Neighbour(name, address), object);
            }
            parse::Entry::Fdb { index, mac, via, permanent } => {
                let Some(device) = self.devices.get(&index) else { return };
                if !matches!(device.link, Some(Link { kind: LinkKind::Vxlan { .. }, .. })) {
                    return;
                }
                let key = Key::Fdb(device.name.clone(), mac);
                let known = shown.state.get(&(self.place.clone(), key.clone()));
                // The end of one of several destinations of a MAC is not the end of the entry.
                if present && permanent || known == Some(&Object::Fdb(via)) {
                    self.hang(shown, index, |_| key, (present && permanent).then_some(Object::Fdb(via)));
                }
            }
        }
    }

    /// Shows, or no longer shows, something that hangs on a device.
    fn hang(
        &mut self,
        shown: &mut Shown,
        index: u32,
        key: impl FnOnce(Ifname) -> Key,
        object: Option<Object>,
    ) {
        let Some(device) = self.devices.get(&index) else { return };
        if !self.in_scope(&device.name) {
            return;
        }
        let key = key(device.name.clone());
        let Some(device) = self.devices.get_mut(&index) else { return };
        if object.is_some() {
            device.hanging.insert(key.clone())
        } else {
            device.hanging.remove(&key)
        };
        self.set(shown, key, object);
    }

    fn route(&self, message: &RouteMessage) -> Option<(u32, IpNet, Held)> {
        let parsed = parse::route(message)?;
        let dev = parsed.index.map(|index| self.name(index));
        if self.place == Place::Host && !dev.as_ref().is_some_and(|dev| self.in_scope(dev)) {
            return None;
        }
        let route = Route { kind: parsed.kind, via: parsed.via, dev, src: parsed.src, metric: parsed.metric };
        Some((parsed.table, parsed.destination, Held { route, index: parsed.index }))
    }

    fn new_route(&mut self, shown: &mut Shown, message: &RouteMessage, replaces: bool) {
        let Some((table, destination, new)) = self.route(message) else { return };
        let held = self.routes.entry((table, destination)).or_default();
        if replaces {
            held.retain(|old| old.route.metric != new.route.metric);
        }
        if !held.contains(&new) {
            held.push(new);
        }
        // The one with the lowest metric is the one that counts.
        held.sort_by_key(|held| held.route.metric);
        self.show_route(shown, table, destination);
    }

    fn lost_route(&mut self, shown: &mut Shown, message: &RouteMessage) {
        let Some((table, destination, gone)) = self.route(message) else { return };
        let held = self.routes.entry((table, destination)).or_default();
        match held.iter().position(|held| *held == gone) {
            Some(position) => drop(held.remove(position)),
            None => self.stale.routes |= !held.is_empty(),
        }
        self.show_route(shown, table, destination);
    }

    fn show_route(&mut self, shown: &mut Shown, table: u32, destination: IpNet) {
        let first = self.routes.get(&(table, destination)).and_then(|held| held.first());
        let object = first.map(|held| Object::Route(held.route.clone()));
        if object.is_none() {
            self.routes.remove(&(table, destination));
        }
        self.set(shown, Key::Route(table, destination), object);
    }

    fn rule(&mut self, shown: &mut Shown, message: &RuleMessage, present: bool) {
        if self.place == Place::Host {
            return;
        }
        let Some((priority, rule)) = parse::rule(message) else { return };
        let held = self.rules.entry(priority).or_default();
        match held.iter().position(|held| *held == rule) {
            Some(_) if present => {}
            Some(position) => drop(held.remove(position)),
            None if present => held.push(rule),
            None => self.stale.rules |= !held.is_empty(),
        }
        let object = held.first().cloned().map(Object::Rule);
        self.set(shown, Key::Rule(priority), object);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netlink::messages;

    #[test]
    fn an_event_that_cannot_be_read_makes_everything_be_read_anew() {
        const RTM_NEWLINK: u16 = 16;
        let mut mirror = Mirror::new(Place::Host);
        mirror.stale.all = false;
        let mut bytes = 20_u32.to_ne_bytes().to_vec();
        bytes.extend(RTM_NEWLINK.to_ne_bytes());
        bytes.resize(20, 0);
        let message = messages(&bytes).next().unwrap();
        mirror.take_event(&mut Shown::new(), &message);
        assert!(mirror.stale.all);
    }
}
