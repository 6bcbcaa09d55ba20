//! What people call networks and hosts, in place of ids.

use std::collections::BTreeMap;

use model::{HostId, Name, NetworkId};

use super::exit::Failure;
use crate::client::Client;

/// What networks and hosts are called.
#[derive(Debug, Default)]
pub(super) struct Names {
    pub(super) networks: BTreeMap<NetworkId, Name>,
    pub(super) hosts: BTreeMap<HostId, Name>,
}

impl Names {
    /// Asks the server.
    pub(super) async fn fetch(client: &Client) -> Result<Self, Failure> {
        Ok(Self {
            networks: client
                .networks()
                .await?
                .into_iter()
                .map(|network| (network.id, network.name))
                .collect(),
            hosts: client.hosts().await?.into_iter().map(|view| (view.host.id, view.host.name)).collect(),
        })
    }

    /// What the network is called, or its id.
    pub(super) fn network(&self, id: &NetworkId) -> String {
        self.networks.get(id).map_or_else(|| id.to_string(), Name::to_string)
    }

    /// What the host is called, or its id.
    pub(super) fn host(&self, id: &HostId) -> String {
        self.hosts.get(id).map_or_else(|| id.to_string(), Name::to_string)
    }
}
