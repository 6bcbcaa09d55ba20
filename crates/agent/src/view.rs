//! What the agent knows, as one immutable value: read by names, metadata, Docker and the socket.
//!
//! The reconciler publishes a new view after it has changed anything; readers hold the one they began with. Views share
//! their endpoints, so that one that differs in one endpoint costs little.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use model::{Catalog, Endpoint, EndpointId, Epoch, HostId, Name, Network, NetworkId, Revision, agent_api};

use crate::book::Book;

/// What the agent knows.
#[derive(Debug, Clone)]
pub struct View {
    /// This host.
    pub host: HostId,
    /// Its name.
    pub host_name: Name,
    /// The domain of names, without a dot at its end.
    pub domain: String,
    /// The life of the store that the catalog is from; `None` before the first snapshot.
    pub epoch: Option<Epoch>,
    /// The catalog's revision.
    pub revision: Revision,
    /// The server's state, as last heard.
    pub catalog: Catalog,
    /// The endpoints of this host, from the ledger. They are right where the catalog is behind.
    pub local: BTreeMap<EndpointId, Arc<Endpoint>>,
    /// The routers on this host.
    pub routers: BTreeMap<NetworkId, Router>,
    /// The tunnels that this host should have; the same value as before where none changed.
    pub tunnels: Arc<BTreeMap<plan::Far, plan::Tunnel>>,
    /// Why packets take no shortcut past the kernel's stack, if they do not.
    pub no_shortcut: Option<String>,
    /// What the kernel refused lately, newest last.
    pub troubles: Vec<String>,
    /// Grows when an address of this host comes or goes.
    pub moves: u64,
}

/// A router that is up on this host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Router {
    /// The name of its namespace below `/run/netns`.
    pub netns: String,
    /// Grows when the namespace is made anew, so that sockets in it are opened again.
    pub generation: u64,
    /// Its address in the network.
    pub address: Option<IpAddr>,
    /// Its own address between router and host.
    pub transit: Ipv4Addr,
    /// Inner MTU, bytes.
    pub mtu: u32,
    /// Grows when the overlay's TUN device is made anew; `None` while there is none.
    pub tun: Option<u64>,
    /// Whether the kernel shows all that should be there.
    pub converged: bool,
}

impl View {
    /// What the books say; nothing of the kernel.
    pub(crate) fn from_book(book: &Book) -> Self {
        Self {
            host: book.host.clone(),
            host_name: book.host_name.clone(),
            domain: book.domain.clone(),
            epoch: book.epoch.clone(),
            revision: book.revision,
            catalog: book.catalog.clone(),
            local: book.records().map(|r| (r.endpoint.id.clone(), Arc::clone(&r.endpoint))).collect(),
            routers: BTreeMap::new(),
            tunnels: Arc::default(),
            no_shortcut: book.no_shortcut.clone(),
            troubles: Vec::new(),
            moves: 0,
        }
    }

    /// The network with that name or id.
    pub fn network(&self, name_or_id: &str) -> Option<&Network> {
        match name_or_id.parse::<NetworkId>() {
            Ok(id) => self.catalog.networks.get(&id),
            Err(_) => self.catalog.network_named(name_or_id),
        }
    }

    /// The endpoints of a network: this host's from the ledger, the others' from the catalog.
    pub fn endpoints_of<'a>(&'a self, network: &'a NetworkId) -> impl Iterator<Item = &'a Endpoint> + 'a {
        let local = self.local.values();
        let remote = self.catalog.endpoints.values().filter(|endpoint| endpoint.host != self.host);
        local.chain(remote).map(Arc::as_ref).filter(move |endpoint| endpoint.network == *network)
    }

    /// The name of a host.
    pub fn host_name(&self, host: &HostId) -> Option<&Name> {
        if *host == self.host {
            Some(&self.host_name)
        } else {
            self.catalog.hosts.get(host).map(|host| &host.name)
        }
    }

    /// The search list of an endpoint: stack, `service.stack`, the domain (DESIGN §8), without the host's own domains.
    pub fn search_list(&self, endpoint: &Endpoint) -> Vec<String> {
        let domain = &self.domain;
        let mut list = Vec::new();
        if let Some(stack) = &endpoint.stack {
            list.push(format!("{stack}.{domain}"));
            if let Some(service) = &endpoint.service {
                list.push(format!("{service}.{stack}.{domain}"));
            }
        }
        list.push(domain.clone());
        list
    }

    /// The routers, as the socket tells them.
    pub fn router_status(&self) -> Vec<agent_api::RouterStatus> {
        self.routers
            .iter()
            .filter_map(|(id, router)| {
                let network = self.catalog.networks.get(id)?;
                Some(agent_api::RouterStatus {
                    network: id.clone(),
                    name: network.name.clone(),
                    netns: router.netns.clone(),
                    address: router.address,
                    blocks: self
                        .catalog
                        .blocks_of(id)
                        .filter(|block| block.host == self.host)
                        .map(|block| block.cidr)
                        .collect(),
                    endpoints: self
                        .local
                        .values()
                        .filter(|endpoint| endpoint.network == *id)
                        .map(|endpoint| endpoint.id.clone())
                        .collect(),
                    mtu: router.mtu,
                    converged: router.converged,
                    no_shortcut: self.no_shortcut.clone(),
                })
            })
            .collect()
    }
}
