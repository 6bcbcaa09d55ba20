//! What the plan has to know of this host.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;

use linux::netns::Netns;
use model::{Candidate, EndpointId, HostId, Network, NetworkId};
use plan::{Attachment, Bridge, End, Local};

use super::Book;
use crate::control::Handed;
use crate::ledger::{Record, Sandbox};

impl Book {
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
            shortcut: self.no_shortcut.is_none(),
            attachments,
            spare: BTreeSet::new(),
        }
    }

    /// What the plan has to know of this host, with routers for `routers` alone.
    pub(crate) fn local(
        &self,
        routers: &BTreeSet<NetworkId>,
        port_is_there: impl Fn(&EndpointId) -> bool,
    ) -> Local {
        let mut slots = self.slots.clone();
        slots.retain(|id, _| routers.contains(id));
        local_with(
            &self.host,
            self.candidates.first(),
            slots,
            self.no_shortcut.is_none(),
            self.records.values(),
            self.spare_leaves(),
            port_is_there,
        )
    }
}

/// What the plan has to know of a host with these endpoints, and with routers for the networks that have a slot in `slots`.
pub(crate) fn local_with<'a>(
    host: &HostId,
    underlay: Option<&Candidate>,
    slots: BTreeMap<NetworkId, u16>,
    shortcut: bool,
    records: impl IntoIterator<Item = &'a Record>,
    spare: BTreeSet<(NetworkId, Bridge)>,
    port_is_there: impl Fn(&EndpointId) -> bool,
) -> Local {
    let attachments = records.into_iter().map(|record| {
        let id = &record.endpoint.id;
        (id.clone(), attachment(record, end(record, port_is_there(id))))
    });
    Local {
        host: host.clone(),
        underlay: underlay.cloned(),
        routers: slots,
        shortcut,
        attachments: attachments.collect(),
        spare,
    }
}

/// Where the container's end of an endpoint should be, given whether the router's end is there.
///
/// Docker moves the device we hand it. Should it be lost later, it is made again right inside the container.
fn end(record: &Record, port_is_there: bool) -> End {
    match &record.sandbox {
        None => End::Nowhere,
        Some(Sandbox { path, ifname: Some(ifname), routes, .. }) => {
            End::Inside { netns: path.clone(), ifname: ifname.clone(), routes: *routes }
        }
        Some(_) if port_is_there => End::Handed,
        Some(Sandbox { path, routes, .. }) => match free_ifname(path) {
            Some(ifname) => End::Inside { netns: path.clone(), ifname, routes: *routes },
            None => End::Nowhere,
        },
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

fn attachment(record: &Record, end: End) -> Attachment {
    let endpoint = &record.endpoint;
    Attachment {
        network: endpoint.network.clone(),
        addresses: endpoint.addresses.clone(),
        mac: endpoint.mac,
        end,
        ports: endpoint.ports.clone(),
        bridge: Bridge(record.bridge),
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
