//! The server's view against itself, and against one host's books. Pure.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnet::IpNet;
use model::api::{HostView, IpamView};
use model::{Catalog, Claim, Endpoint, EndpointId, HostId, NetworkId, Object};

use super::{Books, Finding, Kind, called, name_of};

/// What the server says of a whole environment.
#[derive(Debug, Clone)]
pub struct View {
    /// Its hosts.
    pub hosts: Vec<HostView>,
    /// Its endpoints.
    pub endpoints: Vec<Endpoint>,
    /// Who may give which addresses.
    pub ipam: IpamView,
}

impl View {
    /// The objects, indexed.
    pub fn catalog(&self) -> Catalog {
        let hosts = self.hosts.iter().map(|view| Object::Host(view.host.clone()));
        let networks = self.ipam.networks.iter().cloned().map(Object::Network);
        let blocks = self.ipam.blocks.iter().cloned().map(Object::Block);
        let claims = self.ipam.claims.iter().cloned().map(Object::Claim);
        let endpoints = self.endpoints.iter().cloned().map(Object::Endpoint);
        Catalog::from_objects(hosts.chain(networks).chain(blocks).chain(claims).chain(endpoints))
    }

    fn host(&self, id: &HostId) -> String {
        let host = self.hosts.iter().find(|view| view.host.id == *id);
        host.map_or_else(|| id.to_string(), |view| view.host.name.to_string())
    }
}

/// Whether a host may use an address: it lies in a block of it that nobody else has a claim in, or it has the claim.
pub fn may_use(catalog: &Catalog, host: &HostId, network: &NetworkId, address: IpAddr) -> bool {
    match catalog.claims.get(&(network.clone(), address)).filter(|claim| !claim.asked) {
        Some(claim) => claim.host == *host,
        None => catalog.blocks_of(network).any(|block| block.host == *host && block.cidr.contains(&address)),
    }
}

/// Which addresses one host may use: as [`may_use`] has it, for many addresses.
pub(crate) struct Rights<'a> {
    host: &'a HostId,
    claims: &'a BTreeMap<(NetworkId, IpAddr), Claim>,
    blocks: BTreeMap<&'a NetworkId, Vec<IpNet>>,
}

impl<'a> Rights<'a> {
    /// Looks once at all blocks.
    pub(crate) fn of(catalog: &'a Catalog, host: &'a HostId) -> Self {
        let mut blocks: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for block in catalog.blocks.values().filter(|block| block.host == *host) {
            blocks.entry(&block.network).or_default().push(block.cidr);
        }
        Self { host, claims: &catalog.claims, blocks }
    }

    /// Whether the host may use the address.
    pub(crate) fn has(&self, network: &NetworkId, address: IpAddr) -> bool {
        match self.claims.get(&(network.clone(), address)).filter(|claim| !claim.asked) {
            Some(claim) => claim.host == *self.host,
            None => {
                let blocks = self.blocks.get(network);
                blocks.is_some_and(|blocks| blocks.iter().any(|block| block.contains(&address)))
            }
        }
    }
}

/// What the server's view says by itself: addresses held twice or without right, hosts that are away.
pub fn environment(view: &View) -> Vec<Finding> {
    let mut findings = addresses(view);
    for host in view.hosts.iter().filter(|host| !host.connected) {
        let since =
            if host.seen.is_some() { "it is silent" } else { "it was not heard of since the server started" };
        findings.push(Finding::new(Kind::HostAway, host.host.name.to_string(), since));
    }
    findings
}

/// What the server's view says of addresses alone.
pub fn addresses(view: &View) -> Vec<Finding> {
    let catalog = view.catalog();
    let mut findings = Vec::new();
    let mut seen: BTreeMap<(&NetworkId, IpAddr), &Endpoint> = BTreeMap::new();
    for endpoint in &view.endpoints {
        let place = format!("{}, endpoint {}", view.host(&endpoint.host), name(endpoint));
        for &address in &endpoint.addresses {
            if let Some(other) = seen.insert((&endpoint.network, address), endpoint) {
                let what = format!("{address} is also that of {} on {}", name(other), view.host(&other.host));
                findings.push(Finding::new(Kind::AddressTwice, &place, what));
            }
            if !may_use(&catalog, &endpoint.host, &endpoint.network, address) {
                let what = format!("{address} is in no block and no claim of its host");
                findings.push(Finding::new(Kind::NoRight, &place, what));
            }
        }
        if !catalog.hosts.contains_key(&endpoint.host) {
            findings.push(Finding::new(Kind::EndpointDiffers, &place, "its host is not there"));
        }
    }
    for block in &view.ipam.blocks {
        if !catalog.hosts.contains_key(&block.host) {
            let place = format!("block {} of {}", block.cidr, name_of(&catalog, &block.network));
            findings.push(Finding::new(Kind::LeaseDiffers, place, "its host is not there"));
        }
    }
    for claim in
        view.ipam.claims.iter().filter(|claim| !claim.router && !claim.asked && claim.retained.is_none())
    {
        if !seen.contains_key(&(&claim.network, claim.address)) {
            let place = format!("address {} of {}", claim.address, name_of(&catalog, &claim.network));
            let what = format!("it is claimed for {} on {}", claim.endpoint, view.host(&claim.host));
            findings.push(Finding::new(Kind::HeldForNobody, place, what));
        }
    }
    for withdrawn in &view.ipam.withdrawn {
        let place = format!("block {} of {}", withdrawn.cidr, name_of(&catalog, &withdrawn.network));
        let away = |host: &&HostId| view.hosts.iter().any(|view| view.host.id == **host && !view.connected);
        let silent: Vec<String> =
            withdrawn.waits_for.iter().filter(away).map(|host| view.host(host)).collect();
        if !silent.is_empty() {
            let what = format!("it waits for {}", silent.join(", "));
            findings.push(Finding::new(Kind::Withdrawn, place, what));
        }
    }
    findings
}

/// One host's books against the server's view of it.
pub fn host(books: &Books, view: &View) -> Vec<Finding> {
    let catalog = view.catalog();
    let mut findings = Vec::new();
    let of_host: BTreeMap<&EndpointId, &Endpoint> = view
        .endpoints
        .iter()
        .filter(|endpoint| endpoint.host == books.host)
        .map(|endpoint| (&endpoint.id, endpoint))
        .collect();
    let place = |name: String| format!("{}, endpoint {name}", books.name);
    for record in books.records.iter().filter(|record| !books.is_stranded(record)) {
        let what = match of_host.get(&record.endpoint.id) {
            Some(known) if **known == *record.endpoint => continue,
            Some(_) => "the server knows it otherwise",
            None => "the server does not know it",
        };
        findings.push(Finding::new(Kind::EndpointDiffers, place(Books::called(record)), what));
    }
    let own = |id: &EndpointId| books.records.iter().any(|record| record.endpoint.id == *id);
    for (_, endpoint) in of_host.iter().filter(|(id, _)| !own(id)) {
        let what = format!("the server lists it with {:?}, and it is not there", endpoint.addresses);
        findings.push(Finding::new(Kind::EndpointDiffers, place(name(endpoint)), what));
    }
    let known = books.catalog();
    let names = |network: &NetworkId| format!("{}, network {}", books.name, name_of(&catalog, network));
    let held = |catalog: &Catalog| -> BTreeMap<(NetworkId, String), &'static str> {
        let blocks = catalog.blocks.values().filter(|block| block.host == books.host);
        let claims = catalog.claims.values().filter(|claim| claim.host == books.host && !claim.asked);
        let blocks = blocks.map(|block| ((block.network.clone(), block.cidr.to_string()), "block"));
        blocks
            .chain(claims.map(|claim| ((claim.network.clone(), claim.address.to_string()), "claim")))
            .collect()
    };
    let (ours, theirs) = (held(&known), held(&catalog));
    for ((network, what), kind) in ours.iter().filter(|(key, _)| !theirs.contains_key(key)) {
        let what = format!("this host takes {kind} {what} for its own, and the server does not");
        findings.push(Finding::new(Kind::LeaseDiffers, names(network), what));
    }
    for ((network, what), kind) in theirs.iter().filter(|(key, _)| !ours.contains_key(key)) {
        let what = format!("the server has leased {kind} {what} to this host, which does not know");
        findings.push(Finding::new(Kind::LeaseDiffers, names(network), what));
    }
    findings
}

fn name(endpoint: &Endpoint) -> String {
    called(endpoint.name.as_ref(), &endpoint.id)
}
