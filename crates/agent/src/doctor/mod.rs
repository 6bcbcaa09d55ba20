//! The doctor: what differs between the books, the kernel, the containers, the names, the tunnels and the server.
//!
//! It looks for itself and changes nothing. What the agent has written down comes over its socket ([`Books`]), or from
//! its ledger while it is away; the rest is asked of the kernel ([`kernel`]), of the routers' DNS ([`names`]) and of the
//! server ([`server`]). What should be is worked out by `plan`, as the reconciler does, so that most of this is
//! `diff(observed, desired)`; what lies outside the plan is looked for besides.
//!
//! Invariant: each finding says where, what, what it means and what to do.

pub mod kernel;
pub mod names;
pub mod server;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;
use std::path::Path;

use model::agent_api::{TunnelState, TunnelStatus};
use model::{Candidate, Catalog, EndpointId, Epoch, HostId, Name, NetworkId, Object, Revision};
use serde::{Deserialize, Serialize};

use crate::book::Book;
use crate::ledger::{Ledger, LedgerError, Record};

/// What an agent has written down, and what follows from it for its host.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Books {
    /// This host.
    pub host: HostId,
    /// Its name.
    pub name: Name,
    /// The domain of names.
    pub domain: String,
    /// The life of the store that the snapshot is from.
    pub epoch: Option<Epoch>,
    /// The snapshot's number.
    pub revision: Revision,
    /// This host's addresses on the underlay, as the agent sees them now; none if it is away.
    pub candidates: Vec<Candidate>,
    /// The last snapshot; foreign peers without their secrets.
    pub objects: Vec<Object>,
    /// This host's endpoints.
    pub records: Vec<Record>,
    /// Addresses kept for an endpoint to come.
    pub reservations: Vec<(NetworkId, IpAddr)>,
    /// Addresses that rest.
    pub resting: Vec<(NetworkId, IpAddr)>,
    /// Transit slots of networks.
    pub slots: BTreeMap<NetworkId, u16>,
    /// Bridges that had endpoints lately, by their numbers.
    #[serde(default)]
    pub spare: Vec<(NetworkId, u16)>,
    /// The networks that have a router here by the agent's will; `None` while it is away.
    pub routers: Option<BTreeSet<NetworkId>>,
    /// Whether packets take a shortcut past the kernel's stack here; `None` while the agent is away.
    pub shortcut: Option<bool>,
    /// Whether an engine is served, which may keep addresses for containers to come.
    pub engine: bool,
}

impl Books {
    pub(crate) fn of(book: &Book, routers: BTreeSet<NetworkId>) -> Self {
        let without_secret = |object| match object {
            Object::Peer(peer) => Object::Peer(peer.without_secret()),
            other => other,
        };
        Self {
            host: book.host.clone(),
            name: book.host_name.clone(),
            domain: book.domain.clone(),
            epoch: book.epoch.clone(),
            revision: book.revision,
            candidates: book.candidates.clone(),
            objects: book.catalog.objects().map(without_secret).collect(),
            records: book.records().cloned().collect(),
            reservations: book.reservations(),
            resting: book.resting(),
            slots: book.slots().clone(),
            spare: book.spare_leaves().into_iter().map(|(network, bridge)| (network, bridge.0)).collect(),
            routers: Some(routers),
            shortcut: Some(book.no_shortcut.is_none()),
            engine: true,
        }
    }

    /// Whether an endpoint's network was removed.
    fn is_stranded(&self, record: &Record) -> bool {
        let its = |object: &Object| matches!(object, Object::Network(network) if network.id == record.endpoint.network);
        self.epoch.is_some() && !self.objects.iter().any(its)
    }

    /// The books of an agent that is away, from its state directory; `None` if it never joined.
    pub fn of_ledger(state_dir: &Path) -> Result<Option<Self>, LedgerError> {
        let Some(ledger) = Ledger::look(state_dir)? else { return Ok(None) };
        let Some(identity) = ledger.identity()? else { return Ok(None) };
        let book = Book::open(ledger, identity.host, identity.name)?;
        Ok(Some(Self { routers: None, shortcut: None, ..Self::of(&book, BTreeSet::new()) }))
    }

    /// The snapshot, indexed.
    pub fn catalog(&self) -> Catalog {
        Catalog::from_objects(self.objects.iter().cloned())
    }

    /// What people call the endpoint, or its id.
    fn called(record: &Record) -> String {
        called(record.endpoint.name.as_ref(), &record.endpoint.id)
    }
}

fn called(name: Option<&Name>, id: &EndpointId) -> String {
    name.map_or_else(|| id.to_string(), Name::to_string)
}

/// One thing that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Finding {
    /// What kind of thing.
    pub kind: Kind,
    /// Where: a host, and what of it.
    pub place: String,
    /// What exactly.
    pub what: String,
    /// What it means.
    pub means: String,
    /// What to do.
    pub remedy: String,
}

impl Finding {
    /// A finding of that kind.
    pub fn new(kind: Kind, place: impl Into<String>, what: impl Into<String>) -> Self {
        let (means, remedy) = kind.means();
        let (place, what) = (place.into(), what.into());
        Self { kind, place, what, means: means.to_owned(), remedy: remedy.to_owned() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kind, place, what, means, remedy } = self;
        write!(f, "{place}: {}: {what}: {means}; {remedy}", kind.as_str())
    }
}

/// Kinds of findings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The agent does not answer.
    AgentAway,
    /// The agent is not connected to the server, or the server does not answer.
    ServerAway,
    /// The plan wants a kernel object that is not there.
    Missing,
    /// A kernel object is not as the plan wants it.
    Altered,
    /// A kernel object is there that the plan does not want.
    Leftover,
    /// A router's namespace that belongs to no network here.
    LeakedNamespace,
    /// A device that belongs to no endpoint.
    LeakedDevice,
    /// An endpoint whose container is gone.
    DeadContainer,
    /// An endpoint whose network was removed.
    NetworkGone,
    /// A container's interface is not as its endpoint says.
    ContainerInterface,
    /// An address that is kept and belongs to nobody.
    HeldForNobody,
    /// An address that its host has no right to.
    NoRight,
    /// An address that two endpoints have.
    AddressTwice,
    /// A name is not answered.
    NameUnanswered,
    /// A name is answered with other addresses.
    NameWrong,
    /// A container sends to an Ethernet address that is not where the address is.
    StaleNeighbour,
    /// A tunnel does not carry traffic.
    TunnelDown,
    /// Server and ledger say different things of an endpoint.
    EndpointDiffers,
    /// Server and ledger say different things of a block or claim.
    LeaseDiffers,
    /// A block that was given back waits for a host.
    Withdrawn,
    /// A host is not connected to the server.
    HostAway,
}

impl Kind {
    /// As it is printed.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::AgentAway => "agent-away",
            Self::ServerAway => "server-away",
            Self::Missing => "missing",
            Self::Altered => "altered",
            Self::Leftover => "leftover",
            Self::LeakedNamespace => "leaked-namespace",
            Self::LeakedDevice => "leaked-device",
            Self::DeadContainer => "dead-container",
            Self::NetworkGone => "network-gone",
            Self::ContainerInterface => "container-interface",
            Self::HeldForNobody => "held-for-nobody",
            Self::NoRight => "no-right",
            Self::AddressTwice => "address-twice",
            Self::NameUnanswered => "name-unanswered",
            Self::NameWrong => "name-wrong",
            Self::StaleNeighbour => "stale-neighbour",
            Self::TunnelDown => "tunnel-down",
            Self::EndpointDiffers => "endpoint-differs",
            Self::LeaseDiffers => "lease-differs",
            Self::Withdrawn => "withdrawn",
            Self::HostAway => "host-away",
        }
    }

    /// What it means, and what to do.
    fn means(self) -> (&'static str, &'static str) {
        match self {
            Self::AgentAway => (
                "what runs goes on, nothing is attached, detached or mended, and encrypted traffic stops",
                "start it (systemctl start droveway-agent) and look at its log",
            ),
            Self::ServerAway => (
                "what runs goes on, changes wait, and this host hears of none",
                "look at the server's log, and whether its port is reached from here",
            ),
            Self::Missing | Self::Altered => (
                "traffic through it fails or takes a wrong way",
                "the agent mends it by itself; if this stays, `droveway status` says what the kernel refuses",
            ),
            Self::Leftover => (
                "it is what somebody else made, or what was left behind; packets may take a way that leads nowhere",
                "the agent removes it by itself; if this stays, `droveway status` says what the kernel refuses",
            ),
            Self::LeakedNamespace => (
                "nobody looks after it, and it keeps its devices alive",
                "restart the agent, which removes it, or `ip netns del` it",
            ),
            Self::LeakedDevice => ("nobody looks after it", "remove it with `ip link del`"),
            Self::DeadContainer => (
                "its address is in use for nothing, and names answer with it",
                "the agent forgets it by itself when it works; else detach the endpoint by the agent's socket",
            ),
            Self::NetworkGone => (
                "the container reaches nobody by it; it was removed while this host could not say that it is in use",
                "stop the container, or start it on another network",
            ),
            Self::ContainerInterface => {
                ("the container is not reached at its address", "attach it anew, or restart the container")
            }
            Self::HeldForNobody => (
                "it is not given to anybody else",
                "nothing, if a container is just being started; else restart the agent",
            ),
            Self::NoRight => (
                "another host may be given the same address",
                "remove the container and start it again: it gets an address of its host's",
            ),
            Self::AddressTwice => {
                ("packets reach the one or the other", "remove one of the two containers and start it again")
            }
            Self::NameUnanswered => (
                "containers do not find each other by this name",
                "look at the agent's log; a restart of the agent opens the routers' sockets anew",
            ),
            Self::NameWrong => (
                "containers are led to addresses that are not this name's",
                "wait for the server's next word; if this stays, restart the agent of this host",
            ),
            Self::StaleNeighbour => (
                "its packets to this address get lost until it asks again",
                "nothing: it asks within a minute; at once with `ip neigh flush dev INTERFACE` inside of it",
            ),
            Self::TunnelDown => (
                "encrypted traffic to this peer does not pass",
                "`droveway tunnel inspect` says why; it is tried again by itself",
            ),
            Self::EndpointDiffers => (
                "other hosts know it otherwise than it is",
                "the agent tells the server by itself; if this stays, its log says what the server refuses",
            ),
            Self::LeaseDiffers => (
                "this host and the server do not agree on who may give these addresses",
                "the agent takes the server's word by itself; if this stays, restart the agent",
            ),
            Self::Withdrawn => (
                "it is not leased again before these hosts have heard of its withdrawal",
                "bring them back, or remove those that are gone for good with `droveway host rm`",
            ),
            Self::HostAway => (
                "what runs there goes on, and it hears of no change",
                "look at that host, or remove it with `droveway host rm` if it is gone for good",
            ),
        }
    }
}

/// Tunnels that do not carry traffic, and those that are missing.
pub fn tunnels(books: &Books, said: &[TunnelStatus]) -> Vec<Finding> {
    let local = books.local(&BTreeSet::new(), |_| false);
    let wanted = plan::tunnels(&books.catalog(), &local);
    let place = |name: &Name| format!("{}, tunnel to {name}", books.name);
    let mut findings: Vec<Finding> = said
        .iter()
        .filter_map(|tunnel| {
            let what = match &tunnel.state {
                TunnelState::Up { .. } => return None,
                TunnelState::Waiting { why } => format!("waiting: {why}"),
                TunnelState::Connecting => "connecting".to_owned(),
                TunnelState::Silent { .. } => "keys are agreed, and no probe is answered".to_owned(),
                TunnelState::Failed { why, .. } => format!("failed: {why}"),
            };
            Some(Finding::new(Kind::TunnelDown, place(&tunnel.peer), what))
        })
        .collect();
    let known: BTreeSet<&str> = said.iter().map(|tunnel| tunnel.id.as_str()).collect();
    let missing = wanted.iter().filter(|(far, _)| !known.contains(far.as_str()));
    findings.extend(
        missing.map(|(_, tunnel)| Finding::new(Kind::TunnelDown, place(&tunnel.name), "there is none")),
    );
    let strange = said.iter().filter(|tunnel| !wanted.keys().any(|far| far.as_str() == tunnel.id));
    findings.extend(
        strange
            .map(|tunnel| Finding::new(Kind::Leftover, place(&tunnel.peer), "no network is shared with it")),
    );
    findings
}

/// What the agent's books say by themselves.
pub fn books(books: &Books) -> Vec<Finding> {
    let catalog = books.catalog();
    let rights = server::Rights::of(&catalog, &books.host);
    let mut findings = Vec::new();
    let mut seen: BTreeMap<(&NetworkId, IpAddr), String> = BTreeMap::new();
    for record in &books.records {
        let (endpoint, called) = (&record.endpoint, Books::called(record));
        let place = format!("{}, endpoint {called}", books.name);
        if books.is_stranded(record) {
            findings.push(Finding::new(Kind::NetworkGone, &place, format!("{} is gone", endpoint.network)));
        }
        for &address in &endpoint.addresses {
            if let Some(other) = seen.insert((&endpoint.network, address), called.clone()) {
                let what = format!("{address} is also that of {other}");
                findings.push(Finding::new(Kind::AddressTwice, &place, what));
            }
            if catalog.networks.contains_key(&endpoint.network) && !rights.has(&endpoint.network, address) {
                let what = format!("{address} is in no block and no claim of this host");
                findings.push(Finding::new(Kind::NoRight, &place, what));
            }
        }
    }
    if !books.engine {
        for (network, address) in &books.reservations {
            let place = format!("{}, network {}", books.name, name_of(&catalog, network));
            findings.push(Finding::new(Kind::HeldForNobody, place, format!("{address} is reserved")));
        }
    }
    findings
}

/// What people call a network, or its id.
fn name_of(catalog: &Catalog, network: &NetworkId) -> String {
    catalog.networks.get(network).map_or_else(|| network.to_string(), |it| it.name.to_string())
}
