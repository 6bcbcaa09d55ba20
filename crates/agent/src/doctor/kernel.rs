//! What the kernel shows against what the plan wants, and what lies outside the plan: namespaces and devices of nobody,
//! and the containers' own ends.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;

use linux::look::{Inside, inside};
use linux::netns::Netns;
use linux::{Error, Kernel};
use model::{EndpointId, Mac, NetworkId, SERVICE_ADDRESS};
use plan::object::Ifname;
use plan::{Bridge, Key, Local, Place, Scope, State, Step};

use super::{Books, Finding, Kind, name_of};
use crate::book::local_with;
use crate::ledger::Record;

/// What the names of devices begin with that wait to be taken by an engine.
const HANDED: &str = "dv";

/// Looks at this host's namespaces, and into those of its containers.
pub fn examine(books: &Books, netns_dir: &Path) -> Result<Vec<Finding>, Error> {
    let (mut kernel, strays) = Kernel::look(netns_dir)?;
    let catalog = books.catalog();
    let observed = kernel.observe(&State::new())?;
    let mut routers: BTreeSet<NetworkId> = match &books.routers {
        Some(routers) => routers.clone(),
        // A router may linger after its last endpoint: the agent knows when it is back.
        None => observed
            .keys()
            .filter_map(|(place, _)| match place {
                Place::Router(network) => Some(network.clone()),
                Place::Host => None,
            })
            .filter(|network| catalog.networks.contains_key(network) && books.slots.contains_key(network))
            .collect(),
    };
    routers.extend(books.records.iter().map(|record| record.endpoint.network.clone()));
    routers.extend(catalog.gateway_of(&books.host).cloned());
    let has_port = |network: &NetworkId, id: &EndpointId| {
        observed.contains_key(&(Place::Router(network.clone()), Key::Link(plan::port_name(id))))
    };
    let ports: BTreeSet<EndpointId> = books
        .records
        .iter()
        .filter(|record| has_port(&record.endpoint.network, &record.endpoint.id))
        .map(|record| record.endpoint.id.clone())
        .collect();
    let mut local = books.local(&routers, |id| ports.contains(id));
    if local.underlay.is_none() {
        // An agent that is away says of no address what a VXLAN device was made with: what is there is taken for right.
        local.underlay = catalog.hosts.get(&books.host).and_then(|host| host.underlay()).cloned();
    }
    // Nor does it say whether it was to do without programs for packets.
    local.shortcut =
        books.shortcut.unwrap_or_else(|| observed.keys().any(|(_, key)| matches!(key, Key::Program(_))));
    let wanted = plan::desired(&catalog, &local);
    let observed = kernel.observe(&wanted)?;

    let place_of = |place: &Place| match place {
        Place::Host => books.name.to_string(),
        Place::Router(network) => format!("{}, router of {}", books.name, name_of(&catalog, network)),
    };
    let mut findings = Vec::new();
    for step in plan::diff(observed, &wanted, &Scope::Everything) {
        let (kind, place, key) = match &step {
            Step::Add(place, key, _) => (Kind::Missing, place, key),
            Step::Change(place, key, ..) => (Kind::Altered, place, key),
            Step::Remove(place, Key::Netns) => (Kind::LeakedNamespace, place, &Key::Netns),
            Step::Remove(place, key) => (Kind::Leftover, place, key),
        };
        let what = match (&step, observed.get(&(place.clone(), key.clone()))) {
            (Step::Change(_, _, want, _), Some(have)) => {
                format!("{}: {have:?} in place of {want:?}", linux::name_of(key))
            }
            _ => linux::name_of(key),
        };
        findings.push(Finding::new(kind, place_of(place), what));
    }
    let stray = |name| {
        let what = format!("{} is called like a router and is none", netns_dir.join(name).display());
        Finding::new(Kind::LeakedNamespace, books.name.to_string(), what)
    };
    findings.extend(strays.iter().map(stray));
    let known: BTreeSet<Ifname> =
        books.records.iter().map(|record| plan::handed_name(&record.endpoint.id)).collect();
    let host = inside(kernel.host_netns())?;
    let leaked = host.devices.keys().filter(|name| {
        let rest = name.strip_prefix(HANDED).unwrap_or_default();
        rest.len() >= 6 && !known.contains(&Ifname::new(name))
    });
    findings.extend(leaked.map(|name| {
        Finding::new(Kind::LeakedDevice, books.name.to_string(), format!("device {name} is no endpoint's"))
    }));
    findings.extend(containers(books, &local));
    Ok(findings)
}

impl Books {
    pub(super) fn local(
        &self,
        routers: &BTreeSet<NetworkId>,
        port_is_there: impl Fn(&EndpointId) -> bool,
    ) -> Local {
        let mut slots = self.slots.clone();
        slots.retain(|id, _| routers.contains(id));
        let shortcut = self.shortcut.unwrap_or_default();
        let spare = self.spare.iter().map(|(network, bridge)| (network.clone(), Bridge(*bridge))).collect();
        local_with(&self.host, self.candidates.first(), slots, shortcut, &self.records, spare, port_is_there)
    }
}

/// The containers' own ends.
fn containers(books: &Books, local: &Local) -> Vec<Finding> {
    let catalog = books.catalog();
    let mut macs: BTreeMap<(NetworkId, IpAddr), Mac> = BTreeMap::new();
    for endpoint in catalog.endpoints().filter(|endpoint| endpoint.host != books.host) {
        for address in &endpoint.addresses {
            let name = (endpoint.network.clone(), *address);
            macs.insert(name, plan::gateway_mac(&endpoint.network));
        }
    }
    for network in local.routers.keys() {
        let routers = catalog.hosts.keys().filter_map(|host| catalog.router_address(network, host));
        let gateway = catalog.networks.get(network).map(model::Network::gateway);
        for address in routers.chain(gateway).chain([IpAddr::V4(SERVICE_ADDRESS)]) {
            macs.insert((network.clone(), address), plan::gateway_mac(network));
        }
    }
    for record in &books.records {
        for address in &record.endpoint.addresses {
            macs.insert((record.endpoint.network.clone(), *address), record.endpoint.mac);
        }
    }
    let attached = books.records.iter().filter(|record| !books.is_stranded(record));
    attached.flat_map(|record| container(books, record, &macs)).collect()
}

fn container(books: &Books, record: &Record, macs: &BTreeMap<(NetworkId, IpAddr), Mac>) -> Vec<Finding> {
    let endpoint = &record.endpoint;
    let place = format!("{}, endpoint {}", books.name, Books::called(record));
    let Some(sandbox) = &record.sandbox else { return Vec::new() };
    let finding = |kind, what: String| vec![Finding::new(kind, &place, what)];
    let opened = Netns::open(&sandbox.path).and_then(|netns| Ok((netns.inode()?, netns)));
    let netns = match opened {
        Ok((inode, netns)) if sandbox.inode.is_none_or(|known| known == inode) => netns,
        Ok(_) => {
            let what = format!("{} is another namespace by now", sandbox.path.display());
            return finding(Kind::DeadContainer, what);
        }
        Err(error) => return finding(Kind::DeadContainer, error.to_string()),
    };
    let seen: Inside = match inside(&netns) {
        Ok(seen) => seen,
        Err(error) => return finding(Kind::ContainerInterface, error.to_string()),
    };
    let by_name = sandbox.ifname.as_ref().and_then(|name| seen.devices.get_key_value(name));
    let by_mac = || seen.devices.iter().find(|(_, device)| device.mac == Some(endpoint.mac));
    let Some((name, device)) = by_name.or_else(by_mac) else {
        let name = sandbox.ifname.as_deref().unwrap_or("interface");
        return finding(Kind::ContainerInterface, format!("its {name} is not there"));
    };
    let mut findings = Vec::new();
    let mut wrong = |what: String| findings.push(Finding::new(Kind::ContainerInterface, &place, what));
    if !device.up {
        wrong(format!("{name} is down"));
    }
    if device.mac != Some(endpoint.mac) {
        let has = device.mac.map_or_else(|| "none".to_owned(), |mac| mac.to_string());
        wrong(format!("{name} has Ethernet address {has} in place of {}", endpoint.mac));
    }
    for address in &endpoint.addresses {
        if !device.addresses.iter().any(|has| has.addr() == *address) {
            wrong(format!("{name} lacks {address}"));
        }
    }
    for (_, address, mac) in seen.neighbours.iter().filter(|(device, ..)| device == name) {
        match macs.get(&(endpoint.network.clone(), *address)) {
            Some(right) if right != mac => {
                let what = format!("it sends to {address} at {mac}, which is at {right}");
                findings.push(Finding::new(Kind::StaleNeighbour, &place, what));
            }
            Some(_) | None => {}
        }
    }
    findings
}
