//! Endpoints of this host that are not what they were attached for any more.

use model::Endpoint;

use super::Book;
use crate::doctor::server::Rights;

impl Book {
    /// Each of them, for a person: cut off, or at an address that is not this host's.
    pub(crate) fn troubles(&self) -> Vec<String> {
        let rights = Rights::of(&self.catalog, &self.host);
        let of = |endpoint: &Endpoint| -> Vec<String> {
            let network = &endpoint.network;
            let name = endpoint.name.as_ref().map_or("an endpoint", model::Name::as_str);
            let called = format!("{name} ({})", endpoint.id);
            if self.catalog.networks.contains_key(network) {
                let foreign = endpoint.addresses.iter().filter(|address| !rights.has(network, **address));
                let tell = |address| {
                    format!(
                        "{called} has {address}, which is in no block and no claim of this host: another may be given it; \
                         remove it and start it again"
                    )
                };
                foreign.map(tell).collect()
            } else if self.epoch.is_some() {
                vec![format!(
                    "{called} is cut off: its network {network} was removed while this host was away; stop it, or start it \
                     on another"
                )]
            } else {
                Vec::new()
            }
        };
        self.records().flat_map(|record| of(&record.endpoint)).collect()
    }
}
