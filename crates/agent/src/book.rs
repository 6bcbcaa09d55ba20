//! What the agent keeps books of: the snapshot, its endpoints and their addresses, in memory and in the ledger alike.
//!
//! Nothing here touches the kernel. A request is checked, written to the ledger, then done in memory; a refused one has
//! changed nothing.
//!
//! Invariant: memory holds what the ledger holds. Of the snapshot, which the server has, memory may hold more while the
//! disk takes nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;

use ipnet::IpNet;
use linux::netns::Netns;
use model::agent_api::{AttachRequest, Attached};
use model::api::{ApiError, ErrorCode};
use model::{
    Candidate, Catalog, Endpoint, EndpointId, EndpointKind, Epoch, HostId, Key, Mac, Name, Network,
    NetworkId, Object, PublishedPort, Revision, UnixMillis, Watch,
};
use plan::{Attachment, End, Local};

use crate::control::{Description, Handed, LocalEndpoint, Refusal};
use crate::ipam::Pool;
use crate::ledger::{Ledger, LedgerError, Record, Sandbox};
use crate::{now_millis, random};

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
    records: BTreeMap<EndpointId, Record>,
    foreign: BTreeMap<String, EndpointId>,
    reservations: BTreeSet<(NetworkId, IpAddr)>,
    used: BTreeMap<NetworkId, BTreeSet<IpAddr>>,
    released: BTreeMap<(NetworkId, IpAddr), UnixMillis>,
    slots: BTreeMap<NetworkId, u16>,
    /// The ledger missed something of the snapshot: it is written whole as soon as that can be done.
    behind: bool,
    /// Blocks and claims that the server is being given back, and may have: no address is given from them.
    leaving: BTreeSet<Key>,
}

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
            records: BTreeMap::new(),
            foreign: BTreeMap::new(),
            reservations: BTreeSet::new(),
            used: BTreeMap::new(),
            released: contents.released,
            slots: contents.slots,
            behind: false,
            leaving: BTreeSet::new(),
        };
        for record in contents.records {
            book.remember(record);
        }
        for (network, address) in contents.reservations {
            book.used.entry(network.clone()).or_default().insert(address);
            book.reservations.insert((network, address));
        }
        Ok(book)
    }

    // ---- what others ask ----

    pub(crate) fn records(&self) -> impl Iterator<Item = &Record> {
        self.records.values()
    }

    pub(crate) fn record(&self, id: &EndpointId) -> Option<&Record> {
        self.records.get(id)
    }

    pub(crate) fn by_foreign(&self, foreign: &str) -> Option<&EndpointId> {
        self.foreign.get(foreign)
    }

    pub(crate) fn reservations(&self) -> Vec<(NetworkId, IpAddr)> {
        self.reservations.iter().cloned().collect()
    }

    pub(crate) fn list(&self) -> Vec<LocalEndpoint> {
        let tell = |record: &Record| LocalEndpoint {
            endpoint: record.endpoint.clone(),
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
        match message {
            Watch::Snapshot { epoch, revision, domain, objects, .. } => {
                self.catalog = Catalog::from_objects(objects);
                self.epoch = Some(epoch);
                self.revision = revision;
                self.domain = domain;
                self.behind = true;
            }
            Watch::Delta { revision, changes } => {
                let written = if self.behind { Ok(()) } else { self.ledger.apply(revision, &changes) };
                self.revision = revision;
                for change in changes {
                    self.catalog.apply(change);
                }
                self.behind |= written.is_err();
                written?;
            }
            Watch::Heartbeat { .. } => {}
        }
        let catalog = &self.catalog;
        self.leaving.retain(|key| match key {
            Key::Block(network, cidr) => catalog.blocks.contains_key(&(network.clone(), *cidr)),
            Key::Claim(network, address) => catalog.claims.contains_key(&(network.clone(), *address)),
            Key::Host(_) | Key::Network(_) | Key::Endpoint(_) | Key::Peer(_) => false,
        });
        self.catch_up()
    }

    /// Writes the snapshot whole, if the ledger missed something of it.
    fn catch_up(&mut self) -> Result<(), LedgerError> {
        if let Some(epoch) = self.epoch.as_ref().filter(|_| self.behind) {
            self.ledger.set_snapshot(epoch, self.revision, &self.domain, &self.catalog)?;
            self.behind = false;
        }
        Ok(())
    }

    /// Takes in what the server answered to a lease or claim: addresses may be given from it at once.
    pub(crate) fn granted(&mut self, object: Object) -> Result<(), LedgerError> {
        self.ledger.put_object(&object)?;
        self.leaving.remove(&object.key());
        self.catalog.put(object);
        Ok(())
    }

    /// Lets go of a block or claim before the server is told: whether no address of it is used here. From now on none is
    /// given from it, unless the server grants it again; a ledger that is opened again does not know it.
    pub(crate) fn let_go(&mut self, key: &Key) -> Result<bool, LedgerError> {
        let idle = match key {
            Key::Block(network, _) => {
                !self.uses_addresses(network) && !self.catalog.gateway_of(&self.host).any(|id| id == network)
            }
            Key::Claim(network, address) => !self.is_used(network, *address),
            Key::Host(_) | Key::Network(_) | Key::Endpoint(_) | Key::Peer(_) => false,
        };
        if idle {
            self.ledger.delete_object(key)?;
            self.leaving.insert(key.clone());
        }
        Ok(idle)
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

    // ---- addresses ----

    /// Chooses an address, or says what is missing.
    fn choose(&self, network: &Network, wish: Option<IpAddr>) -> Result<IpAddr, Refusal> {
        let blocks = self.own_blocks(&network.id);
        let need_block = Refusal::NeedBlock { network: network.id.clone(), held: blocks.len() };
        // The router's address comes from a block, so a host with only claimed addresses needs one too.
        let router = self.catalog.router_address(&network.id, &self.host);
        let Some(router) = router.filter(|router| blocks.iter().any(|block| block.contains(router))) else {
            return Err(need_block);
        };
        let Some(wish) = wish else {
            let mut used = self.used.get(&network.id).cloned().unwrap_or_default();
            used.insert(router);
            let pool = Pool {
                network: &network.id,
                geometry: network.geometry(),
                blocks: &blocks,
                used: &used,
                released: &self.released,
            };
            return pool.pick(now_millis()).ok_or(need_block);
        };
        if !network.geometry().assignable(wish) {
            let (pool, name) = (network.pool(), &network.name);
            let message = if pool.contains(&wish) {
                format!(
                    "address {wish} is the network's, broadcast or gateway address of network \"{name}\"; choose another"
                )
            } else {
                format!("address {wish} is not in the pool {pool} of network \"{name}\"; choose one that is")
            };
            return Err(ApiError::new(ErrorCode::Invalid, message).into());
        }
        if let Some(holder) =
            self.holder(&network.id, wish).or((wish == router).then(|| "this host's router".to_owned()))
        {
            let message = format!(
                "address {wish} of network \"{}\" is in use by {holder}; choose another",
                network.name
            );
            return Err(ApiError::new(ErrorCode::Conflict, message).into());
        }
        let name = (network.id.clone(), wish);
        let claimed = self.catalog.claims.get(&name).is_some_and(|claim| claim.host == self.host)
            && !self.leaving.contains(&Key::Claim(name.0, name.1));
        if claimed || blocks.iter().any(|block| block.contains(&wish)) {
            Ok(wish)
        } else {
            Err(Refusal::NeedClaim { network: network.id.clone(), address: wish })
        }
    }

    /// The blocks of a network that this host holds, and keeps.
    fn own_blocks(&self, network: &NetworkId) -> Vec<IpNet> {
        let kept =
            |block: &&model::Block| !self.leaving.contains(&Key::Block(block.network.clone(), block.cidr));
        let blocks = self.catalog.blocks_of(network).filter(|block| block.host == self.host).filter(kept);
        blocks.map(|block| block.cidr).collect()
    }

    fn holder(&self, network: &NetworkId, address: IpAddr) -> Option<String> {
        let holds = |record: &&Record| {
            record.endpoint.network == *network && record.endpoint.addresses.contains(&address)
        };
        match self.records.values().find(holds) {
            Some(record) => Some(match &record.endpoint.name {
                Some(name) => format!("container {name} on this host"),
                None => format!("endpoint {} on this host", record.endpoint.id),
            }),
            None => self
                .is_used(network, address)
                .then(|| "a container that is being started on this host".to_owned()),
        }
    }

    /// A network whose free addresses run low, and how many blocks of it there are: to be fetched early.
    pub(crate) fn low(&self, network: &NetworkId) -> Option<usize> {
        let network = self.catalog.networks.get(network)?;
        let blocks = self.own_blocks(&network.id);
        let empty = BTreeSet::new();
        let pool = Pool {
            network: &network.id,
            geometry: network.geometry(),
            blocks: &blocks,
            used: self.used.get(&network.id).unwrap_or(&empty),
            released: &self.released,
        };
        pool.is_low().then_some(blocks.len())
    }

    pub(crate) fn reserve(&mut self, network: &NetworkId, wish: Option<IpAddr>) -> Result<IpAddr, Refusal> {
        let network = self.network(network.as_str())?;
        let id = network.id.clone();
        let address = match wish {
            // An engine that starts again asks for what it had.
            Some(wish) if self.is_used(&id, wish) => return Ok(wish),
            wish => self.choose(network, wish)?,
        };
        self.ledger.reserve(&id, address).map_err(unwritten)?;
        self.used.entry(id.clone()).or_default().insert(address);
        self.reservations.insert((id, address));
        Ok(address)
    }

    pub(crate) fn unreserve(&mut self, network: &NetworkId, address: IpAddr) -> Result<(), Refusal> {
        let name = (network.clone(), address);
        if self.reservations.contains(&name) {
            let now = now_millis();
            self.ledger.unreserve(network, address, now).map_err(unwritten)?;
            self.reservations.remove(&name);
            self.released.insert(name, now);
            self.unuse(network, address);
        }
        Ok(())
    }

    // ---- endpoints ----

    pub(crate) fn create(
        &mut self,
        network: &NetworkId,
        foreign: &str,
        address: IpAddr,
        mac: Option<Mac>,
    ) -> Result<Endpoint, Refusal> {
        let network = self.network(network.as_str())?.id.clone();
        if let Some(record) = self.foreign.get(foreign).and_then(|id| self.records.get(id)) {
            return Ok(record.endpoint.clone());
        }
        if !self.reservations.contains(&(network.clone(), address)) {
            let message = format!(
                "address {address} was not reserved on this host before; the engine must ask for it first"
            );
            return Err(ApiError::new(ErrorCode::Conflict, message).into());
        }
        let endpoint = Endpoint {
            id: crate::random_endpoint_id(),
            network,
            host: self.host.clone(),
            name: None,
            stack: None,
            service: None,
            aliases: Vec::new(),
            addresses: vec![address],
            mac: mac.unwrap_or_else(|| Mac::from_random(random())),
            kind: EndpointKind::Docker,
            container: None,
            labels: BTreeMap::new(),
            ports: Vec::new(),
            healthy: true,
            created: now_millis(),
        };
        let record = Record { endpoint: endpoint.clone(), foreign: Some(foreign.to_owned()), sandbox: None };
        self.ledger.put_record(&record).map_err(unwritten)?;
        self.remember(record);
        Ok(endpoint)
    }

    pub(crate) fn set_sandbox(&mut self, id: &EndpointId, sandbox: Option<Sandbox>) -> Result<(), ApiError> {
        self.update(id, |record| record.sandbox = sandbox)
    }

    pub(crate) fn set_ports(
        &mut self,
        id: &EndpointId,
        ports: Vec<PublishedPort>,
    ) -> Result<Vec<PublishedPort>, ApiError> {
        let ports = self.check_ports(Some(id), ports)?;
        self.update(id, |record| record.endpoint.ports.clone_from(&ports))?;
        Ok(ports)
    }

    pub(crate) fn describe(&mut self, id: &EndpointId, description: Description) -> Result<(), ApiError> {
        self.update(id, |record| {
            let endpoint = &mut record.endpoint;
            endpoint.name = description.name;
            endpoint.stack = description.stack;
            endpoint.service = description.service;
            endpoint.aliases = description.aliases;
            endpoint.container = description.container;
            endpoint.labels = description.labels;
            endpoint.healthy = description.healthy;
        })
    }

    /// Checks an attach and writes it down.
    pub(crate) fn attach(&mut self, id: &EndpointId, request: AttachRequest) -> Result<Attached, Refusal> {
        let network = self.network(&request.network)?.clone();
        let inode = Self::inode(&request.netns)?;
        check_ifname(&request.ifname)?;
        let same = |record: &&Record| {
            record.sandbox.as_ref().is_some_and(|sandbox| {
                sandbox.inode == Some(inode) && sandbox.ifname.as_deref() == Some(request.ifname.as_str())
            })
        };
        if let Some(record) = self.records.values().find(same) {
            let message = format!(
                "{} has an interface {} of endpoint {} already; detach that, or choose another ifname",
                request.netns.display(),
                request.ifname,
                record.endpoint.id
            );
            return Err(ApiError::new(ErrorCode::Conflict, message).into());
        }
        let ports = self.check_ports(None, request.ports)?;
        let address = self.choose(&network, request.address)?;
        let endpoint = Endpoint {
            id: id.clone(),
            network: network.id.clone(),
            host: self.host.clone(),
            name: request.name,
            stack: request.stack,
            service: request.service,
            aliases: request.aliases,
            addresses: vec![address],
            mac: Mac::from_random(random()),
            kind: EndpointKind::Socket,
            container: None,
            labels: request.labels,
            ports,
            healthy: true,
            created: now_millis(),
        };
        let sandbox = Sandbox { path: request.netns, ifname: Some(request.ifname), inode: Some(inode) };
        let record = Record { endpoint: endpoint.clone(), foreign: None, sandbox: Some(sandbox) };
        self.ledger.put_record(&record).map_err(unwritten)?;
        self.remember(record);
        Ok(Attached {
            addresses: vec![
                IpNet::new(address, network.pool().prefix_len()).unwrap_or_else(|_| address.into()),
            ],
            gateway: (!network.internal).then(|| network.gateway()),
            mtu: plan::network_mtu(&self.catalog, &self.local_of(None), &network),
            resolv_conf: String::new(),
            endpoint,
        })
    }

    /// Forgets an endpoint. With `keep` its addresses stay reserved.
    pub(crate) fn forget(&mut self, id: &EndpointId, keep: bool) -> Result<(), ApiError> {
        let Some(record) = self.records.get(id) else { return Ok(()) };
        let now = now_millis();
        self.ledger.delete_record(record, keep, now).map_err(unwritten)?;
        let Some(record) = self.records.remove(id) else { return Ok(()) };
        if let Some(foreign) = &record.foreign {
            self.foreign.remove(foreign);
        }
        let network = &record.endpoint.network;
        for address in record.endpoint.addresses {
            let name = (network.clone(), address);
            if keep {
                self.reservations.insert(name);
            } else {
                self.released.insert(name, now);
                self.unuse(network, address);
            }
        }
        Ok(())
    }

    /// Endpoints that were attached by the socket and whose namespace is gone.
    pub(crate) fn orphans(&self, port_is_there: impl Fn(&EndpointId) -> bool) -> Vec<EndpointId> {
        let orphaned = |record: &&Record| {
            let Some(sandbox) = &record.sandbox else { return false };
            sandbox.ifname.is_some()
                && !port_is_there(&record.endpoint.id)
                && Self::inode(&sandbox.path).ok() != sandbox.inode
        };
        self.records.values().filter(orphaned).map(|record| record.endpoint.id.clone()).collect()
    }

    // ---- for the plan ----

    /// What the plan has to know of this host; of attachments only `only`, or none.
    pub(crate) fn local_of(&self, only: Option<(&EndpointId, End)>) -> Local {
        let attachments = only
            .and_then(|(id, end)| Some((id.clone(), attachment(self.records.get(id)?, end))))
            .into_iter()
            .collect();
        Local {
            host: self.host.clone(),
            underlay: self.candidates.first().cloned(),
            routers: self.slots.clone(),
            attachments,
        }
    }

    /// What the plan has to know of this host, with routers for `routers` alone.
    pub(crate) fn local(
        &self,
        routers: &BTreeSet<NetworkId>,
        port_is_there: impl Fn(&EndpointId) -> bool,
    ) -> Local {
        let mut local = self.local_of(None);
        local.routers.retain(|id, _| routers.contains(id));
        for (id, record) in &self.records {
            let end = Self::end(record, port_is_there(id));
            local.attachments.insert(id.clone(), attachment(record, end));
        }
        local
    }

    /// Where the container's end of an endpoint should be, given whether the router's end is there.
    ///
    /// Docker moves the device we hand it. Should it be lost later, it is made again right inside the container.
    fn end(record: &Record, port_is_there: bool) -> End {
        match &record.sandbox {
            None => End::Nowhere,
            Some(Sandbox { path, ifname: Some(ifname), .. }) => {
                End::Inside { netns: path.clone(), ifname: ifname.clone() }
            }
            Some(_) if port_is_there => End::Handed,
            Some(Sandbox { path, .. }) => match free_ifname(path) {
                Some(ifname) => End::Inside { netns: path.clone(), ifname },
                None => End::Nowhere,
            },
        }
    }

    // ---- helpers ----

    fn inode(netns: &Path) -> Result<(u64, u64), ApiError> {
        Netns::open(netns).and_then(|netns| netns.inode()).map_err(|error| {
            let message =
                format!("{} is not a network namespace that can be opened: {error}", netns.display());
            ApiError::new(ErrorCode::Invalid, message)
        })
    }

    fn check_ports(
        &self,
        own: Option<&EndpointId>,
        mut ports: Vec<PublishedPort>,
    ) -> Result<Vec<PublishedPort>, ApiError> {
        let mut taken: BTreeMap<(model::Protocol, u16), String> = BTreeMap::new();
        for record in self.records.values().filter(|record| Some(&record.endpoint.id) != own) {
            for port in &record.endpoint.ports {
                let holder = record.endpoint.name.as_ref().map_or(record.endpoint.id.as_str(), Name::as_str);
                taken.insert((port.protocol, port.host_port), format!("container {holder}"));
            }
        }
        let own_ports: BTreeSet<_> = own
            .and_then(|id| self.records.get(id))
            .map(|record| record.endpoint.ports.iter().map(|port| (port.protocol, port.host_port)).collect())
            .unwrap_or_default();
        for port in &mut ports {
            let free = |number: u16, taken: &BTreeMap<_, _>| {
                let name = (port.protocol, number);
                !taken.contains_key(&name) && (own_ports.contains(&name) || can_bind(port.protocol, number))
            };
            if port.host_port == 0 {
                port.host_port = (32_768..=60_999).find(|number| free(*number, &taken)).ok_or_else(|| {
                    ApiError::new(ErrorCode::Exhausted, "no port from 32768 to 60999 is free on this host")
                })?;
            } else if !free(port.host_port, &taken) {
                let holder = taken.get(&(port.protocol, port.host_port)).cloned();
                let holder = holder.unwrap_or_else(|| "another program of this host".to_owned());
                let message =
                    format!("port {} is published by {holder} already; choose another", port.host_port);
                return Err(ApiError::new(ErrorCode::Conflict, message));
            }
            taken.insert((port.protocol, port.host_port), "this container".to_owned());
        }
        Ok(ports)
    }

    fn update(&mut self, id: &EndpointId, change: impl FnOnce(&mut Record)) -> Result<(), ApiError> {
        let Some(record) = self.records.get_mut(id) else {
            return Err(ApiError::new(
                ErrorCode::NotFound,
                format!("endpoint {id} does not exist on this host"),
            ));
        };
        let mut changed = record.clone();
        change(&mut changed);
        if changed != *record {
            self.ledger.put_record(&changed).map_err(unwritten)?;
            *record = changed;
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
        if let Some(foreign) = &record.foreign {
            self.foreign.insert(foreign.clone(), endpoint.id.clone());
        }
        self.records.insert(endpoint.id.clone(), record);
    }

    fn unuse(&mut self, network: &NetworkId, address: IpAddr) {
        if let Some(used) = self.used.get_mut(network) {
            used.remove(&address);
        }
    }
}

/// What Docker needs to know of a joined endpoint.
pub(crate) fn handed(network: &Network, id: &EndpointId) -> Handed {
    Handed {
        ifname: plan::handed_name(id).to_string(),
        gateway: (!network.internal).then(|| network.gateway()),
        on_link: vec![IpAddr::V4(model::SERVICE_ADDRESS).into()],
    }
}

/// A ledger that could not be written refuses the request and changes nothing.
pub(crate) fn unwritten(error: LedgerError) -> ApiError {
    ApiError::new(ErrorCode::Internal, error.to_string())
}

fn attachment(record: &Record, end: End) -> Attachment {
    let endpoint = &record.endpoint;
    Attachment {
        network: endpoint.network.clone(),
        addresses: endpoint.addresses.clone(),
        mac: endpoint.mac,
        end,
        ports: endpoint.ports.clone(),
    }
}

fn check_ifname(name: &str) -> Result<(), ApiError> {
    let good = (1..=15).contains(&name.len())
        && name != "."
        && name != ".."
        && name.bytes().all(|b| b.is_ascii_graphic() && b != b'/' && b != b':');
    if good {
        Ok(())
    } else {
        let message =
            format!("{name:?} is no interface name; use 1 to 15 printable characters without / and :");
        Err(ApiError::new(ErrorCode::Invalid, message))
    }
}

/// The first `ethN` that is free in a namespace; none if it cannot be looked at.
fn free_ifname(netns: &Path) -> Option<String> {
    let netns = Netns::open(netns).ok()?;
    let names: Vec<String> = netns
        .run(|| {
            let devices = nix::net::if_::if_nameindex().ok()?;
            Some(devices.iter().map(|device| device.name().to_string_lossy().into_owned()).collect())
        })
        .ok()??;
    (0..64).map(|n| format!("eth{n}")).find(|name| !names.contains(name))
}

fn can_bind(protocol: model::Protocol, port: u16) -> bool {
    let address = (std::net::Ipv4Addr::UNSPECIFIED, port);
    match protocol {
        model::Protocol::Tcp => std::net::TcpListener::bind(address).is_ok(),
        model::Protocol::Udp => std::net::UdpSocket::bind(address).is_ok(),
    }
}

#[cfg(test)]
#[path = "book_tests.rs"]
mod tests;
