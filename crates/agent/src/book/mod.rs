//! What the agent keeps books of: the snapshot, its endpoints and their addresses, in memory and in the ledger alike.
//!
//! Nothing here touches the kernel. A request is checked, written to the ledger, then done in memory; a refused one has
//! changed nothing. Here is what the server says; the rest by concern: which [`addresses`] are given, the [`endpoints`],
//! their published [`ports`], what is wrong with them ([`troubles`]), and what the plan has to know of them ([`local`]).
//!
//! Invariant: memory holds what the ledger holds. Of the snapshot, which the server has, memory may hold more while the
//! disk takes nothing.

mod addresses;
mod endpoints;
mod local;
mod ports;
mod troubles;

pub(crate) use endpoints::inode;
pub(crate) use local::{handed, local_with};

use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Instant;

use model::api::{ApiError, ErrorCode};
use model::{
    Candidate, Catalog, Change, Endpoint, EndpointId, Epoch, HostId, Incarnation, Key, Lineage, Name,
    Network, NetworkId, Object, PeerId, Revision, Step, UnixMillis, Watch,
};
use plan::Bridge;

use crate::control::LocalEndpoint;
use crate::ipam::rests;
use crate::ledger::{Identity, Ledger, LedgerError, Record};
use crate::now_millis;

/// The books.
pub(crate) struct Book {
    ledger: Ledger,
    pub(crate) host: HostId,
    pub(crate) host_name: Name,
    pub(crate) domain: String,
    pub(crate) epoch: Option<Epoch>,
    pub(crate) revision: Revision,
    pub(crate) catalog: Catalog,
    pub(crate) candidates: Vec<Candidate>,
    /// Why routers have no programs that hand packets on past the kernel's stack; `None` if they shall have them.
    pub(crate) no_shortcut: Option<String>,
    records: BTreeMap<EndpointId, Record>,
    foreign: BTreeMap<String, EndpointId>,
    reservations: BTreeSet<(NetworkId, IpAddr)>,
    used: BTreeMap<NetworkId, BTreeSet<IpAddr>>,
    /// How many endpoints the bridges of routers have.
    ports: BTreeMap<(NetworkId, Bridge), usize>,
    /// When addresses were released, by [`Book::clock`].
    released: BTreeMap<(NetworkId, IpAddr), i64>,
    began: Instant,
    /// The revision of the last word of a block that was withdrawn.
    withdrawal: Revision,
    slots: BTreeMap<NetworkId, u16>,
    /// The ledger missed something of the snapshot: it is written whole as soon as that can be done.
    behind: bool,
    /// Blocks and claims that the server is being given back, and may have: no address is given from them until it has
    /// granted them anew. A restart does not change that: what was asked of the server may come to it late.
    leaving: BTreeMap<Key, Object>,
    /// This host's endpoints that the catalog does not have like this, or has and should not.
    differing: BTreeSet<EndpointId>,
    /// Endpoints by the namespace and interface that they were attached to.
    attached: BTreeMap<(Inode, String), EndpointId>,
    lineage: Lineage,
    /// The life that this start began.
    life: Option<Incarnation>,
    /// Why the ledger does not count any more, if so: nothing is attached, and no other host is spoken to.
    copied: Option<String>,
}

/// When it was by [`Book::clock`] that began just now. A clock that was set back makes it now; an hour and more is all one.
fn before(at: UnixMillis) -> i64 {
    -i64::try_from(now_millis().saturating_sub(at)).unwrap_or(i64::MAX)
}

/// What tells a namespace from others: device and inode of its file.
type Inode = (u64, u64);

impl Book {
    pub(crate) fn open(ledger: Ledger, host: HostId, host_name: Name) -> Result<Self, LedgerError> {
        let contents = ledger.load()?;
        let mut book = Self {
            ledger,
            host,
            host_name,
            domain: contents.domain.unwrap_or_else(|| model::DEFAULT_DOMAIN.to_owned()),
            epoch: contents.epoch,
            revision: contents.revision,
            catalog: contents.catalog,
            candidates: Vec::new(),
            no_shortcut: None,
            records: BTreeMap::new(),
            foreign: BTreeMap::new(),
            reservations: BTreeSet::new(),
            used: BTreeMap::new(),
            ports: BTreeMap::new(),
            released: contents.released.into_iter().map(|(name, at)| (name, before(at))).collect(),
            began: Instant::now(),
            withdrawal: contents.revision,
            slots: contents.slots,
            behind: false,
            leaving: BTreeMap::new(),
            differing: BTreeSet::new(),
            attached: BTreeMap::new(),
            lineage: contents.lineage,
            life: None,
            copied: contents.copied,
        };
        for record in contents.records {
            book.remember(record);
        }
        for (network, address) in contents.reservations {
            book.used.entry(network.clone()).or_default().insert(address);
            book.reservations.insert((network, address));
        }
        for key in contents.leaving {
            if let Some(object) = book.catalog.get(&key) {
                book.leaving.insert(key, object);
            }
        }
        book.compare_all();
        Ok(book)
    }

    /// Keeps this host's new certificate.
    pub(crate) fn certified(&mut self, identity: &Identity) -> Result<(), LedgerError> {
        self.ledger.certified(identity)
    }

    // ---- which life of the ledger this is ----

    /// What to tell the server of this start, and whether it is of this start: what an earlier one may have told is settled
    /// first. Where the disk takes nothing this start goes by the life before.
    pub(crate) fn begin(&mut self) -> Result<(Step, bool), Option<Incarnation>> {
        let mut lineage = self.lineage.clone();
        let step = lineage.begin(crate::random());
        if lineage != self.lineage {
            if let Err(error) = self.ledger.set_lineage(&lineage) {
                tracing::warn!("{error}; this start goes by the one before");
                return Err(self.lineage.last.clone());
            }
            self.lineage = lineage;
            self.life = Some(step.to.clone());
        }
        let ours = self.life.as_ref() == Some(&step.to);
        Ok((step, ours))
    }

    /// The server took it. That is written down without haste: what it may have taken is.
    pub(crate) fn begun(&mut self, to: &Incarnation) {
        self.lineage.taken(to);
        if let Err(error) = self.ledger.set_lineage(&self.lineage) {
            tracing::warn!("{error}; it is settled when the agent starts again");
        }
    }

    /// This ledger does not count any more.
    pub(crate) fn set_copied(&mut self, why: String) -> Result<(), LedgerError> {
        let written = self.ledger.set_copied(&why);
        self.copied = Some(why);
        written
    }

    /// Refuses what a ledger that does not count must not do.
    pub(crate) fn counts(&self) -> Result<(), ApiError> {
        match &self.copied {
            None => Ok(()),
            Some(why) => Err(ApiError::new(ErrorCode::Copied, why.clone())),
        }
    }

    /// Whether the ledger takes what is to be written; if not, why, and what to do.
    pub(crate) fn takes(&mut self) -> Result<(), ApiError> {
        self.counts()?;
        self.ledger.takes().map_err(|why| ApiError::new(ErrorCode::Internal, why))
    }

    /// What the kernel and the tunnels are made from: the snapshot, or this host's own part of it alone where the ledger does
    /// not count.
    pub(crate) fn drawn(&self) -> Cow<'_, Catalog> {
        match &self.copied {
            None => Cow::Borrowed(&self.catalog),
            Some(_) => Cow::Owned(self.catalog.alone(&self.host)),
        }
    }

    // ---- what others ask ----

    /// Milliseconds since these books were opened: no jump of the machine's clock makes an address rest for less, or for ever.
    pub(crate) fn clock(&self) -> i64 {
        i64::try_from(self.began.elapsed().as_millis()).unwrap_or(i64::MAX)
    }

    /// The revision of the last word of a block that was withdrawn: the server waits to hear that it arrived.
    pub(crate) fn withdrawal(&self) -> Revision {
        self.withdrawal
    }

    pub(crate) fn slots(&self) -> &BTreeMap<NetworkId, u16> {
        &self.slots
    }

    pub(crate) fn records(&self) -> impl Iterator<Item = &Record> {
        self.records.values()
    }

    pub(crate) fn record(&self, id: &EndpointId) -> Option<&Record> {
        self.records.get(id)
    }

    /// This host's endpoints of which the server has to be told: it does not know them like this, or they are gone.
    pub(crate) fn differing(&self) -> impl Iterator<Item = &EndpointId> {
        self.differing.iter()
    }

    pub(crate) fn by_foreign(&self, foreign: &str) -> Option<&EndpointId> {
        self.foreign.get(foreign)
    }

    pub(crate) fn reservations(&self) -> Vec<(NetworkId, IpAddr)> {
        self.reservations.iter().cloned().collect()
    }

    pub(crate) fn list(&self) -> Vec<LocalEndpoint> {
        let tell = |record: &Record| LocalEndpoint {
            endpoint: Endpoint::clone(&record.endpoint),
            foreign: record.foreign.clone(),
            sandbox: record.sandbox.as_ref().map(|sandbox| sandbox.path.clone()),
        };
        self.records.values().map(tell).collect()
    }

    /// Whether the network has endpoints here.
    pub(crate) fn has_endpoints(&self, network: &NetworkId) -> bool {
        self.records.values().any(|record| record.endpoint.network == *network)
    }

    /// Whether any address of the network is in use or promised here.
    pub(crate) fn uses_addresses(&self, network: &NetworkId) -> bool {
        self.used.get(network).is_some_and(|used| !used.is_empty())
    }

    pub(crate) fn is_used(&self, network: &NetworkId, address: IpAddr) -> bool {
        self.used.get(network).is_some_and(|used| used.contains(&address))
    }

    pub(crate) fn network(&self, name_or_id: &str) -> Result<&Network, ApiError> {
        let found = match name_or_id.parse::<NetworkId>() {
            Ok(id) => self.catalog.networks.get(&id),
            Err(_) => self.catalog.network_named(name_or_id),
        };
        found.ok_or_else(|| {
            if self.epoch.is_none() {
                let message = "this host has just joined, and was not told of any network yet; try again in a moment (`droveway \
                    status` says whether the server is reached)";
                return ApiError::new(ErrorCode::Unavailable, message);
            }
            let names: Vec<&str> =
                self.catalog.networks.values().map(|network| network.name.as_str()).collect();
            let known = if names.is_empty() { "none yet".to_owned() } else { names.join(", ") };
            let message = format!(
                "network {name_or_id:?} does not exist; this host knows: {known} (droveway network ls)"
            );
            ApiError::new(ErrorCode::NotFound, message)
        })
    }

    // ---- the server's side ----

    /// Takes in a message of the watch stream. A ledger that cannot be written is told, and is behind until it can: the
    /// stream says each change once, so it is taken in all the same.
    pub(crate) fn watch(&mut self, message: Watch) -> Result<(), LedgerError> {
        let peers: Vec<PeerId> = self.catalog.peers.keys().cloned().collect();
        self.take_in(message)?;
        // Their secrets go with them.
        let gone = |peer: &PeerId| !self.catalog.peers.contains_key(peer);
        if !self.behind && peers.iter().any(gone) { self.ledger.wipe() } else { Ok(()) }
    }

    fn take_in(&mut self, message: Watch) -> Result<(), LedgerError> {
        match message {
            Watch::Snapshot { epoch, revision, domain, objects, .. } => {
                let before = std::mem::replace(&mut self.catalog, Catalog::from_objects(objects));
                // As if each had been told.
                let gone = before.claims.into_keys().filter(|name| !self.catalog.claims.contains_key(name));
                let now = self.clock();
                self.released.extend(gone.map(|name| (name, now)));
                self.epoch = Some(epoch);
                self.revision = revision;
                self.withdrawal = revision;
                self.domain = domain;
                self.behind = true;
                self.compare_all();
            }
            Watch::Delta { revision, changes } => {
                let written =
                    if self.behind { Ok(()) } else { self.ledger.apply(revision, &changes, now_millis()) };
                self.revision = revision;
                let now = self.clock();
                for change in changes {
                    match &change {
                        Change::Delete(Key::Block(..)) => self.withdrawal = revision,
                        // Others may send to the host that had it for a moment.
                        Change::Delete(Key::Claim(network, address)) => {
                            self.released.insert((network.clone(), *address), now);
                        }
                        Change::Delete(_) | Change::Put(_) => {}
                    }
                    let endpoint = match change.key() {
                        Key::Endpoint(id) => Some(id),
                        Key::Host(_) | Key::Network(_) | Key::Block(..) | Key::Claim(..) | Key::Peer(_) => {
                            None
                        }
                    };
                    self.catalog.apply(change);
                    if let Some(id) = endpoint {
                        self.compare(&id);
                    }
                }
                self.behind |= written.is_err();
                written?;
            }
            Watch::Servers { urls } => self.ledger.set_servers(&urls)?,
            Watch::Heartbeat { revision } => self.revision = revision,
            // Answered where it comes in.
            Watch::Prove => {}
        }
        let catalog = &self.catalog;
        let settled: Vec<Key> = self
            .leaving
            .iter()
            .filter(|(key, object)| !object.is_on_its_way(catalog.get(key).as_ref()))
            .map(|(key, _)| key.clone())
            .collect();
        for key in settled {
            self.leaving.remove(&key);
            self.ledger.set_leaving(&key, false)?;
        }
        self.catch_up()
    }

    /// Writes the snapshot whole, if the ledger missed something of it.
    fn catch_up(&mut self) -> Result<(), LedgerError> {
        if let Some(epoch) = self.epoch.as_ref().filter(|_| self.behind) {
            let (clock, now) = (self.clock(), now_millis());
            let since = |at: i64| now.saturating_sub((clock - at).unsigned_abs());
            let resting = self.released.iter().filter(|(_, at)| rests(**at, clock));
            let resting: Vec<_> =
                resting.map(|((network, address), at)| (network.clone(), *address, since(*at))).collect();
            self.ledger.set_snapshot(epoch, self.revision, &self.domain, &self.catalog, &resting)?;
            self.behind = false;
        }
        Ok(())
    }

    /// Takes in what the server answered to a lease or claim: addresses may be given from it at once.
    pub(crate) fn granted(&mut self, object: Object) -> Result<(), LedgerError> {
        let key = object.key();
        if self.leaving.get(&key).is_some_and(|left| left.is_same_grant(&object)) {
            // As it was, from before the server had it back.
            return Ok(());
        }
        self.ledger.put_object(&object)?;
        if self.leaving.remove(&key).is_some() {
            self.ledger.set_leaving(&key, false)?;
        }
        self.catalog.put(object);
        Ok(())
    }

    /// Lets go of a block or claim before the server is told: whether no address of it is used here. From now on none is
    /// given from it, unless the server grants it anew.
    pub(crate) fn let_go(&mut self, key: &Key) -> Result<bool, LedgerError> {
        if self.leaving.contains_key(key) {
            return Ok(true);
        }
        let idle = match key {
            Key::Block(network, cidr) => {
                let unused = !self.uses_addresses(network)
                    && !self.catalog.gateway_of(&self.host).any(|id| id == network);
                unused || self.spare_blocks(network).any(|block| block.cidr == *cidr)
            }
            Key::Claim(network, address) => {
                !self.is_used(network, *address) && !self.needs_claim_for_router(network, *address)
            }
            Key::Host(_) | Key::Network(_) | Key::Endpoint(_) | Key::Peer(_) => false,
        };
        let Some(object) = self.catalog.get(key).filter(|_| idle) else { return Ok(false) };
        self.ledger.set_leaving(key, true)?;
        self.leaving.insert(key.clone(), object);
        Ok(true)
    }

    /// What of a network is on its way back to the server.
    pub(crate) fn leaving(&self) -> impl Iterator<Item = &Object> {
        self.leaving.values()
    }

    /// Whether an address is that of this host's router, which has no block to have one from.
    pub(crate) fn needs_claim_for_router(&self, network: &NetworkId, address: IpAddr) -> bool {
        self.uses_addresses(network) && self.catalog.router_address(network, &self.host) == Some(address)
    }

    /// Forgets what is kept of networks that are gone.
    pub(crate) fn forget_gone_networks(&mut self) -> Result<(), LedgerError> {
        if self.epoch.is_none() {
            return Ok(());
        }
        let gone: Vec<NetworkId> = self
            .slots
            .keys()
            .filter(|id| !self.catalog.networks.contains_key(*id) && !self.has_endpoints(id))
            .cloned()
            .collect();
        for network in gone {
            self.ledger.forget_network(&network)?;
            self.slots.remove(&network);
            self.reservations.retain(|(id, _)| *id != network);
            self.released.retain(|(id, _), _| *id != network);
            self.used.remove(&network);
        }
        Ok(())
    }

    /// The transit slot of a network, chosen when it is first needed.
    pub(crate) fn slot(&mut self, network: &NetworkId) -> Result<u16, ApiError> {
        if let Some(slot) = self.slots.get(network) {
            return Ok(*slot);
        }
        let taken: BTreeSet<u16> = self.slots.values().copied().collect();
        let slot = (0..plan::transit::SLOTS).find(|slot| !taken.contains(slot)).ok_or_else(|| {
            ApiError::new(
                ErrorCode::Exhausted,
                "this host has a router in 2048 networks already; detach from some",
            )
        })?;
        self.ledger.set_slot(network, slot).map_err(unwritten)?;
        self.slots.insert(network.clone(), slot);
        Ok(slot)
    }

    fn update(&mut self, id: &EndpointId, change: impl FnOnce(&mut Record)) -> Result<(), ApiError> {
        let Some(record) = self.records.get(id) else {
            return Err(ApiError::new(
                ErrorCode::NotFound,
                format!("endpoint {id} does not exist on this host"),
            ));
        };
        let mut changed = record.clone();
        change(&mut changed);
        if changed != *record {
            self.ledger.put_record(&changed).map_err(unwritten)?;
            self.remember(changed);
        }
        Ok(())
    }

    fn remember(&mut self, record: Record) {
        let endpoint = &record.endpoint;
        let used = self.used.entry(endpoint.network.clone()).or_default();
        for address in &endpoint.addresses {
            used.insert(*address);
            self.reservations.remove(&(endpoint.network.clone(), *address));
        }
        let id = endpoint.id.clone();
        if let Some(foreign) = &record.foreign {
            self.foreign.insert(foreign.clone(), id.clone());
        }
        if let Some(place) = self.records.get(&id).and_then(attached_to) {
            self.attached.remove(&place);
        }
        if let Some(place) = attached_to(&record) {
            self.attached.insert(place, id.clone());
        }
        if !self.records.contains_key(&id) {
            *self.ports.entry((record.endpoint.network.clone(), Bridge(record.bridge))).or_default() += 1;
        }
        self.records.insert(id.clone(), record);
        self.compare(&id);
    }

    /// Notes whether the catalog has an endpoint as this host has it.
    fn compare(&mut self, id: &EndpointId) {
        let differs = match (self.records.get(id), self.catalog.endpoints.get_mut(id)) {
            (Some(record), Some(known)) => {
                let same = record.endpoint == *known;
                if same {
                    // One copy is enough.
                    known.clone_from(&record.endpoint);
                }
                !same
            }
            (Some(_), None) => true,
            (None, Some(known)) => known.host == self.host,
            (None, None) => false,
        };
        if differs {
            self.differing.insert(id.clone());
        } else {
            self.differing.remove(id);
        }
    }

    fn compare_all(&mut self) {
        self.differing.clear();
        let all: Vec<EndpointId> =
            self.records.keys().chain(self.catalog.endpoints.keys()).cloned().collect();
        for id in all {
            self.compare(&id);
        }
    }

    /// The first bridge of a router that takes one endpoint more.
    fn bridge_for(&self, network: &NetworkId) -> u16 {
        let ports =
            |bridge: &Bridge| self.ports.get(&(network.clone(), *bridge)).copied().unwrap_or_default();
        Bridge::all().find(|bridge| ports(bridge) < Bridge::PORTS).unwrap_or_default().0
    }

    /// Leaves that had endpoints and have none.
    pub(crate) fn spare_leaves(&self) -> BTreeSet<(NetworkId, Bridge)> {
        let spare = self.ports.iter().filter(|((_, bridge), ports)| *bridge != Bridge::ROOT && **ports == 0);
        spare.map(|(leaf, _)| leaf.clone()).collect()
    }

    /// Forgets a leaf that has no endpoint.
    pub(crate) fn forget_leaf(&mut self, leaf: &(NetworkId, Bridge)) {
        if self.ports.get(leaf) == Some(&0) {
            self.ports.remove(leaf);
        }
    }

    fn unuse(&mut self, network: &NetworkId, address: IpAddr) {
        if let Some(used) = self.used.get_mut(network) {
            used.remove(&address);
        }
    }
}

/// The namespace and interface that an endpoint was attached to by the socket.
fn attached_to(record: &Record) -> Option<(Inode, String)> {
    let sandbox = record.sandbox.as_ref()?;
    Some((sandbox.inode?, sandbox.ifname.clone()?))
}

/// A ledger that could not be written refuses the request and changes nothing.
pub(crate) fn unwritten(error: LedgerError) -> ApiError {
    let code = if matches!(error, LedgerError::Full(..)) { ErrorCode::Full } else { ErrorCode::Internal };
    ApiError::new(code, error.to_string())
}

#[cfg(test)]
mod tests;
