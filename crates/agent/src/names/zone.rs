//! What a network's names are: a pure value, made anew from a view.
//!
//! | name | answers |
//! |---|---|
//! | `service.stack.DOMAIN` | the endpoints of that service |
//! | `container.DOMAIN`, `alias.DOMAIN` | all endpoints so called, on whichever host |
//! | `container.HOST.DOMAIN` | the endpoint so called on that host |
//! | `container.stack.DOMAIN` | the same within a stack, where the stack has no service so called |
//! | `rancher-metadata.DOMAIN` | the metadata service, as programs written for Rancher expect |
//! | `label` | what the asker's search list makes of it, under the name that was asked for |
//! | `name.stack` | as if `.DOMAIN` followed, where that exists |
//! | `d.c.b.a.in-addr.arpa` | for the network's own addresses |
//!
//! A name answers with its healthy endpoints, or with all if none is healthy. Comparison is without case (RFC 4343).
//!
//! Invariant: an answer holds addresses of endpoints of this network only.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use hickory_proto::op::Query;
use hickory_proto::rr::rdata::{PTR, SOA};
use hickory_proto::rr::{Name, RData, RecordType};
use ipnet::IpNet;
use model::{Endpoint, NetworkId, SERVICE_ADDRESS};
use tokio::sync::watch;

use crate::View;

/// How long an answer may be kept, in seconds; also the minimum of the SOA, for negative answers (RFC 2308 §5).
pub const TTL: u32 = 5;

/// The names of one network.
#[derive(Debug)]
pub struct Zone {
    apex: Name,
    /// The network is internal: nothing is asked of resolvers outside, since a query carries data out.
    internal: bool,
    soa: SOA,
    cidrs: Vec<IpNet>,
    /// Addresses by name relative to the domain, lower case; empty where a name is only the parent of others.
    names: HashMap<String, Vec<IpAddr>>,
    /// `.stack`, lower case.
    stacks: BTreeSet<String>,
    /// Names by address.
    reverse: HashMap<IpAddr, Option<Name>>,
    /// What to try after a single label, relative to the domain, by the asker's address.
    search: HashMap<IpAddr, Vec<String>>,
}

/// What a zone says to a question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// These, all under the name that was asked for.
    Records(Vec<RData>),
    /// The name exists, and has nothing of that type.
    NoData {
        /// The name that the SOA belongs to.
        apex: Name,
    },
    /// There is no such name, and nothing below it (RFC 8020).
    NxDomain {
        /// The name that the SOA belongs to.
        apex: Name,
    },
    /// The question is for other servers.
    NotOurs,
}

/// The zone of the newest view, made when someone asks: what it takes to make one grows with the network, a view comes
/// with each attachment, and few views are asked about.
#[derive(Debug)]
pub struct Zones {
    network: NetworkId,
    newest: Mutex<(watch::Receiver<Arc<View>>, Arc<Zone>)>,
}

impl Zones {
    /// The zones of that network.
    pub fn new(mut views: watch::Receiver<Arc<View>>, network: NetworkId) -> Self {
        let view = Arc::clone(&views.borrow_and_update());
        let zone = Arc::new(Zone::new(&view, &network));
        Self { network, newest: Mutex::new((views, zone)) }
    }

    /// The zone of the newest view.
    pub fn newest(&self) -> Arc<Zone> {
        // A thread that panicked here left a zone of some view, and the next view is seen as new.
        let mut newest = self.newest.lock().unwrap_or_else(PoisonError::into_inner);
        let (views, zone) = &mut *newest;
        // Not held while the zone is made: the next view would have to wait.
        let view = {
            let view = views.borrow_and_update();
            view.has_changed().then(|| Arc::clone(&view))
        };
        if let Some(view) = view {
            *zone = Arc::new(Zone::new(&view, &self.network));
        }
        Arc::clone(zone)
    }
}

impl Zone {
    /// The names of that network.
    pub fn new(view: &View, network: &NetworkId) -> Self {
        let endpoints: Vec<&Endpoint> = view.endpoints_of(network).collect();
        let domain = view.domain.trim_matches('.').to_ascii_lowercase();
        let apex = absolute("", &domain).unwrap_or_default();
        let members = members(view, &endpoints);

        let mut names: HashMap<String, Vec<IpAddr>> =
            members.iter().map(|(name, members)| (name.clone(), answerable(members))).collect();
        names.entry("rancher-metadata".to_owned()).or_insert_with(|| vec![SERVICE_ADDRESS.into()]);
        let parents: Vec<String> =
            names.keys().flat_map(|name| parents(name)).map(str::to_owned).chain([String::new()]).collect();
        for parent in parents {
            names.entry(parent).or_default();
        }

        let mut reverse = HashMap::new();
        let mut search = HashMap::new();
        for endpoint in &endpoints {
            let own = own_name(view, endpoint, &members).and_then(|name| absolute(&name, &domain));
            let suffixes: Vec<String> = view
                .search_list(endpoint)
                .iter()
                .map(|item| item.to_ascii_lowercase())
                .filter_map(|item| Some(item.strip_suffix(&domain)?.trim_end_matches('.').to_owned()))
                .collect();
            for address in &endpoint.addresses {
                reverse.insert(*address, own.clone());
                search.insert(*address, suffixes.clone());
            }
        }

        Self {
            soa: SOA::new(
                apex.clone(),
                apex.prepend_label("hostmaster").unwrap_or_else(|_| apex.clone()),
                view.revision.0 as u32,
                3600,
                600,
                86400,
                TTL,
            ),
            apex,
            internal: view.catalog.networks.get(network).is_some_and(|network| network.internal),
            cidrs: view
                .catalog
                .networks
                .get(network)
                .map(|network| network.cidrs.clone())
                .unwrap_or_default(),
            names,
            stacks: endpoints
                .iter()
                .filter_map(|endpoint| endpoint.stack.as_ref())
                .map(|stack| format!(".{}", lower(stack)))
                .collect(),
            reverse,
            search,
        }
    }

    /// What to say to this question of that asker.
    pub fn answer(&self, question: &Query, asker: IpAddr) -> Outcome {
        let name = question.name();
        if let Some(outcome) = self.answer_reverse(name, question.query_type()) {
            return outcome;
        }
        if let Some(relative) = self.relative(name) {
            let apex = self.apex.clone();
            return match self.names.get(&relative) {
                None => Outcome::NxDomain { apex },
                Some(_) if relative.is_empty() && question.query_type() == RecordType::SOA => {
                    Outcome::Records(vec![RData::SOA(self.soa.clone())])
                }
                Some(addresses) => of_type(addresses, question.query_type(), apex),
            };
        }
        match self.complete(&text(name), asker) {
            // A cache takes a negative answer only from an SOA at or above the name (RFC 2308 §5): a completed name is
            // its own zone.
            Some(addresses) => of_type(addresses, question.query_type(), name.clone()),
            None => Outcome::NotOurs,
        }
    }

    /// Whether questions for other servers are refused rather than passed on.
    pub fn is_internal(&self) -> bool {
        self.internal
    }

    /// The SOA for negative answers.
    pub fn soa(&self) -> &SOA {
        &self.soa
    }

    /// A name without our domain, or `None` where it is not below it.
    fn relative(&self, name: &Name) -> Option<String> {
        if self.apex.is_root() || !self.apex.zone_of(name) {
            return None;
        }
        let labels = usize::from(name.num_labels()).checked_sub(usize::from(self.apex.num_labels()))?;
        Some(join(name.iter().take(labels)))
    }

    /// What becomes of a name that is not below our domain when it is completed as the asker's own resolver would.
    fn complete(&self, name: &str, asker: IpAddr) -> Option<&Vec<IpAddr>> {
        if name.is_empty() {
            return None;
        }
        if name.contains('.') {
            let in_stack = self.stacks.iter().any(|stack| name.ends_with(stack.as_str()));
            return if in_stack { self.names.get(name) } else { None };
        }
        let of_domain = [String::new()];
        let suffixes = self.search.get(&asker).map_or(&of_domain[..], Vec::as_slice);
        suffixes.iter().find_map(|suffix| {
            let found = if suffix.is_empty() {
                self.names.get(name)
            } else {
                self.names.get(&format!("{name}.{suffix}"))
            };
            // A mere parent of names, such as a stack or a host, is no name that anyone means.
            found.filter(|addresses| !addresses.is_empty())
        })
    }

    /// An answer where the name is that of an address, or of a range of addresses, of this network.
    fn answer_reverse(&self, name: &Name, kind: RecordType) -> Option<Outcome> {
        let asked = name.parse_arpa_name().ok()?;
        let cidr = self.cidrs.iter().find(|cidr| cidr.contains(&asked))?;
        let (labels, digits) = match cidr {
            IpNet::V4(cidr) => (cidr.prefix_len().div_ceil(8), 8),
            IpNet::V6(cidr) => (cidr.prefix_len().div_ceil(4), 4),
        };
        let apex = name.trim_to(2 + usize::from(labels));
        if asked.prefix_len() + digits <= asked.max_prefix_len() {
            return Some(Outcome::NoData { apex });
        }
        Some(match (self.reverse.get(&asked.addr()), kind) {
            (None, _) => Outcome::NxDomain { apex },
            (Some(Some(own)), RecordType::PTR | RecordType::ANY) => {
                Outcome::Records(vec![RData::PTR(PTR(own.clone()))])
            }
            (Some(_), _) => Outcome::NoData { apex },
        })
    }
}

/// The endpoints of each name, relative to the domain. Where two kinds of name meet, the earlier kind has it.
fn members<'a>(view: &View, endpoints: &[&'a Endpoint]) -> BTreeMap<String, Vec<&'a Endpoint>> {
    let mut members: BTreeMap<String, Vec<&Endpoint>> = BTreeMap::new();
    for kind in [service, container_or_alias, on_host, in_stack] {
        let mut of_kind: BTreeMap<String, Vec<&Endpoint>> = BTreeMap::new();
        for endpoint in endpoints {
            let mut names = kind(view, endpoint);
            names.sort_unstable();
            names.dedup();
            for name in names.into_iter().filter(|name| name.split('.').all(|label| !label.is_empty())) {
                of_kind.entry(name).or_default().push(endpoint);
            }
        }
        for (name, endpoints) in of_kind {
            members.entry(name).or_insert(endpoints);
        }
    }
    members
}

fn service(_: &View, endpoint: &Endpoint) -> Vec<String> {
    match (&endpoint.service, &endpoint.stack) {
        (Some(service), Some(stack)) => vec![format!("{}.{}", lower(service), lower(stack))],
        (_, _) => Vec::new(),
    }
}

fn container_or_alias(_: &View, endpoint: &Endpoint) -> Vec<String> {
    endpoint.name.iter().chain(&endpoint.aliases).map(lower).collect()
}

fn on_host(view: &View, endpoint: &Endpoint) -> Vec<String> {
    match (&endpoint.name, view.host_name(&endpoint.host)) {
        (Some(name), Some(host)) => vec![format!("{}.{}", lower(name), lower(host))],
        (_, _) => Vec::new(),
    }
}

fn in_stack(_: &View, endpoint: &Endpoint) -> Vec<String> {
    match (&endpoint.name, &endpoint.stack) {
        (Some(name), Some(stack)) => vec![format!("{}.{}", lower(name), lower(stack))],
        (_, _) => Vec::new(),
    }
}

/// The name to give for an endpoint's address: the first that leads to it alone, of service, container and container
/// on its host; the first at all if none does.
fn own_name(view: &View, endpoint: &Endpoint, members: &BTreeMap<String, Vec<&Endpoint>>) -> Option<String> {
    let container = endpoint.name.iter().map(lower);
    let candidates: Vec<String> =
        service(view, endpoint).into_iter().chain(container).chain(on_host(view, endpoint)).collect();
    candidates
        .iter()
        .find(|name| {
            members.get(*name).is_some_and(|members| members.len() == 1 && members[0].id == endpoint.id)
        })
        .or(candidates.first())
        .cloned()
}

/// The addresses of the healthy ones, or of all if none is.
fn answerable(members: &[&Endpoint]) -> Vec<IpAddr> {
    let any_healthy = members.iter().any(|endpoint| endpoint.healthy);
    let addresses: BTreeSet<IpAddr> = members
        .iter()
        .filter(|endpoint| endpoint.healthy || !any_healthy)
        .flat_map(|endpoint| endpoint.addresses.iter().copied())
        .collect();
    addresses.into_iter().collect()
}

/// The records of a type. ANY gives addresses, which is as little as RFC 8482 §4.1 allows.
fn of_type(addresses: &[IpAddr], kind: RecordType, apex: Name) -> Outcome {
    let wanted = |address: &IpAddr| match kind {
        RecordType::A => address.is_ipv4(),
        RecordType::AAAA => address.is_ipv6(),
        RecordType::ANY => true,
        // Types are for the world to add to.
        _ => false,
    };
    let records: Vec<RData> = addresses.iter().copied().filter(wanted).map(RData::from).collect();
    if records.is_empty() { Outcome::NoData { apex } } else { Outcome::Records(records) }
}

fn lower(name: &model::Name) -> String {
    name.as_str().to_ascii_lowercase()
}

/// All that a name is below, the name itself and the domain left out.
fn parents(name: &str) -> impl Iterator<Item = &str> {
    name.match_indices('.').map(|(at, _)| &name[at + 1..])
}

/// A name of DNS from a name relative to a domain; `None` if it is too long for one.
fn absolute(relative: &str, domain: &str) -> Option<Name> {
    let labels = relative.split('.').chain(domain.split('.')).filter(|label| !label.is_empty());
    Name::from_labels(labels.map(str::as_bytes)).ok()
}

/// A name as lower-case text without a dot at its end.
fn text(name: &Name) -> String {
    join(name.iter())
}

/// Labels as lower-case text. Bytes that no name of ours has become `\`, a dot within a label among them.
fn join<'a>(labels: impl Iterator<Item = &'a [u8]>) -> String {
    let mut text = String::new();
    for label in labels {
        if !text.is_empty() {
            text.push('.');
        }
        text.extend(label.iter().map(|byte| match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' => byte.to_ascii_lowercase() as char,
            _ => '\\',
        }));
    }
    text
}

#[cfg(test)]
#[path = "zone_tests.rs"]
pub(crate) mod tests;
