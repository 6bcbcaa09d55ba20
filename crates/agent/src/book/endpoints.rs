//! The endpoints of this host: made, described, forgotten.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use ipnet::IpNet;
use linux::netns::Netns;
use model::agent_api::{AttachRequest, Attached, Routes};
use model::api::{ApiError, ErrorCode};
use model::{Endpoint, EndpointId, EndpointKind, Mac, NetworkId, PublishedPort};
use plan::Bridge;

use super::{Book, Inode, attached_to, unwritten};
use crate::control::{Description, Refusal};
use crate::ledger::{Record, Sandbox};
use crate::now_millis;

impl Book {
    pub(crate) fn create(
        &mut self,
        network: &NetworkId,
        foreign: &str,
        address: IpAddr,
        mac: Option<Mac>,
    ) -> Result<Endpoint, Refusal> {
        let network = self.network(network.as_str())?.id.clone();
        if let Some(record) = self.foreign.get(foreign).and_then(|id| self.records.get(id)) {
            return Ok(Endpoint::clone(&record.endpoint));
        }
        if !self.reservations.contains(&(network.clone(), address)) {
            let message = format!(
                "address {address} was not reserved on this host before; the engine must ask for it first"
            );
            return Err(ApiError::new(ErrorCode::Conflict, message).into());
        }
        let mac = mac.unwrap_or_else(|| plan::endpoint_mac(&network, address));
        let endpoint = Endpoint {
            id: crate::random_endpoint_id(),
            network,
            host: self.host.clone(),
            name: None,
            stack: None,
            service: None,
            aliases: Vec::new(),
            addresses: vec![address],
            mac,
            kind: EndpointKind::Docker,
            container: None,
            labels: BTreeMap::new(),
            ports: Vec::new(),
            healthy: true,
            created: now_millis(),
        };
        let shared = Arc::new(endpoint.clone());
        let bridge = self.bridge_for(&endpoint.network);
        let record = Record { endpoint: shared, foreign: Some(foreign.to_owned()), sandbox: None, bridge };
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
        self.update(id, |record| Arc::make_mut(&mut record.endpoint).ports.clone_from(&ports))?;
        Ok(ports)
    }

    pub(crate) fn describe(&mut self, id: &EndpointId, description: Description) -> Result<(), ApiError> {
        self.update(id, |record| {
            let endpoint = Arc::make_mut(&mut record.endpoint);
            endpoint.name = description.name;
            endpoint.stack = description.stack;
            endpoint.service = description.service;
            endpoint.aliases = description.aliases;
            endpoint.container = description.container;
            endpoint.labels = description.labels;
            endpoint.healthy = description.healthy;
        })
    }

    /// Checks an attach to the namespace that `inode` is of, and writes it down. With `foreign` it is for a container's
    /// label, and that is what it is known by. With `retain` a container whose label asks for that gets the address that it
    /// had, or one that it will have again.
    pub(crate) fn attach(
        &mut self,
        id: &EndpointId,
        request: AttachRequest,
        (foreign, retain): (Option<String>, bool),
        inode: Inode,
    ) -> Result<Attached, Refusal> {
        let network = self.network(&request.network)?.clone();
        check_ifname(&request.ifname)?;
        if let Some(holder) = self.attached.get(&(inode, request.ifname.clone())) {
            let message = format!(
                "{} has an interface {} of endpoint {holder} already; detach that, or choose another ifname",
                request.netns.display(),
                request.ifname,
            );
            return Err(ApiError::new(ErrorCode::Conflict, message).into());
        }
        let ports = self.check_ports(None, request.ports)?;
        let routes = request.routes.unwrap_or_else(|| self.routes_left(inode));
        let (stack, service) = (request.stack.as_ref(), request.service.as_ref());
        let owner = Endpoint::retained_for(&request.labels, stack, service, request.name.as_ref());
        let retained = match owner.filter(|_| retain && request.address.is_none()) {
            Some(owner) => self.retained(&network, &owner)?,
            None => None,
        };
        let address = match retained {
            Some(address) => address,
            None => self.choose(&network, request.address)?,
        };
        let endpoint = Endpoint {
            id: id.clone(),
            network: network.id.clone(),
            host: self.host.clone(),
            name: request.name,
            stack: request.stack,
            service: request.service,
            aliases: request.aliases,
            addresses: vec![address],
            mac: plan::endpoint_mac(&network.id, address),
            kind: if foreign.is_some() { EndpointKind::Label } else { EndpointKind::Socket },
            container: None,
            labels: request.labels,
            ports,
            healthy: true,
            created: now_millis(),
        };
        // What the server would refuse later is refused now.
        endpoint.check().map_err(|why| ApiError::new(ErrorCode::Invalid, format!("the endpoint: {why}")))?;
        let sandbox =
            Sandbox { path: request.netns, ifname: Some(request.ifname), inode: Some(inode), routes };
        let shared = Arc::new(endpoint.clone());
        let bridge = self.bridge_for(&endpoint.network);
        let record = Record { endpoint: shared, foreign, sandbox: Some(sandbox), bridge };
        self.ledger.put_record(&record).map_err(unwritten)?;
        self.remember(record);
        Ok(Attached {
            addresses: vec![
                IpNet::new(address, network.pool().prefix_len()).unwrap_or_else(|_| address.into()),
            ],
            gateway: (routes == Routes::All && !network.internal).then(|| network.gateway()),
            mtu: plan::network_mtu(&self.catalog, &self.local_of(None), &network),
            resolv_conf: String::new(),
            endpoint,
        })
    }

    /// The routes that a further attachment of that namespace brings: a route can be there once.
    fn routes_left(&self, inode: Inode) -> Routes {
        let there = self.attached.range((inode, String::new())..).take_while(|((of, _), _)| *of == inode);
        let mut sandboxes = there.filter_map(|(_, id)| self.records.get(id)?.sandbox.as_ref());
        if sandboxes.all(|sandbox| sandbox.routes == Routes::None) { Routes::All } else { Routes::None }
    }

    /// Forgets an endpoint. With `keep` its addresses stay reserved.
    pub(crate) fn forget(&mut self, id: &EndpointId, keep: bool) -> Result<(), ApiError> {
        let Some(record) = self.records.get(id) else { return Ok(()) };
        self.ledger.delete_record(record, keep, now_millis()).map_err(unwritten)?;
        let now = self.clock();
        let Some(record) = self.records.remove(id) else { return Ok(()) };
        self.compare(id);
        if let Some(foreign) = &record.foreign {
            self.foreign.remove(foreign);
        }
        if let Some(place) = attached_to(&record) {
            self.attached.remove(&place);
        }
        let network = &record.endpoint.network;
        if let Some(ports) = self.ports.get_mut(&(network.clone(), Bridge(record.bridge))) {
            *ports = ports.saturating_sub(1);
        }
        for &address in &record.endpoint.addresses {
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

    /// Endpoints that were attached by the socket or for a label and whose namespace is gone.
    pub(crate) fn orphans(&self, port_is_there: impl Fn(&EndpointId) -> bool) -> Vec<EndpointId> {
        let orphaned = |record: &&Record| {
            let Some(sandbox) = &record.sandbox else { return false };
            sandbox.ifname.is_some() && !port_is_there(&record.endpoint.id) && is_gone(sandbox)
        };
        self.records.values().filter(orphaned).map(|record| record.endpoint.id.clone()).collect()
    }
}

/// What tells the namespace that a file names from others.
pub(crate) fn inode(netns: &Path) -> Result<Inode, ApiError> {
    Netns::open(netns).and_then(|netns| netns.inode()).map_err(|error| {
        let message = format!("{} is not a network namespace that can be opened: {error}", netns.display());
        ApiError::new(ErrorCode::Invalid, message)
    })
}

/// Whether there is no file there any more, or one of something else. One that cannot be looked at now is not gone.
fn is_gone(sandbox: &Sandbox) -> bool {
    match std::fs::metadata(&sandbox.path) {
        Ok(there) => Some((there.dev(), there.ino())) != sandbox.inode,
        Err(error) => error.kind() == std::io::ErrorKind::NotFound,
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
