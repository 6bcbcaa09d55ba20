//! Containers that were started plainly and ask for a network by a label (DESIGN §1): `droveway.network=NAME`, or
//! `io.rancher.container.network=true` for `managed`.
//!
//! The engine knows nothing of it, so the follower attaches such a container when it has started, and detaches it when it
//! has died. A container without any network gets `eth0` with the default route. One on Docker's own bridge keeps what it
//! has there, its default route too, which its published ports need; the network comes as a second interface.
//!
//! Invariant: of one container there is one attachment, and it is to the namespace that the container has now. What the
//! ledger holds says so, over restarts of agent and engine.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;

use model::EndpointKind;
use model::agent_api::{AttachRequest, Attached, Routes};
use model::api::ApiError;
use tokio::task::JoinSet;

use super::engine::{Attachment, Container, Summary};
use super::follow::{Follower, Session};
use super::{NETWORK_KEY, describe};
use crate::Control;
use crate::control::LocalEndpoint;

/// Rancher's label; `true` means the network that Rancher had.
const RANCHER: &str = "io.rancher.container.network";
/// The network of that name.
const MANAGED: &str = "managed";
/// Labels that wish for an address.
const ADDRESS: [&str; 2] = ["droveway.address", "io.rancher.container.requested_ip"];
/// The interface beside Docker's own. Docker counts its own `ethN` and would trip over one that is not in its books.
const BESIDE: &str = "dw0";
/// What the ledger calls such an endpoint: this and the container's id.
const PREFIX: &str = "label/";

/// Attachments under way.
#[derive(Default)]
pub(super) struct Plugs {
    tasks: JoinSet<Plugged>,
    under_way: BTreeSet<String>,
}

/// How one has ended.
pub(super) struct Plugged {
    container: String,
    /// What messages about it begin with.
    about: String,
    netns: PathBuf,
    outcome: Result<Attached, ApiError>,
}

impl Plugs {
    /// The next that ends; `None` while there is none. May be dropped and called again.
    pub(super) async fn next(&mut self) -> Option<Plugged> {
        loop {
            // A task that panicked would be a fault of ours; its container is seen to at the next look.
            if let Ok(plugged) = self.tasks.join_next().await? {
                self.under_way.remove(&plugged.container);
                return Some(plugged);
            }
        }
    }

    fn begin(&mut self, control: Control, container: &Container, about: String, request: AttachRequest) {
        if !self.under_way.insert(container.id.clone()) {
            return;
        }
        let container = container.id.clone();
        self.tasks.spawn(async move {
            let netns = request.netns.clone();
            let outcome = control.plug(&foreign(&container), request).await;
            Plugged { container, about, netns, outcome }
        });
    }
}

/// Whether the labels ask for a network at all. An event has a container's labels among its attributes.
pub(super) fn is_there(labels: &BTreeMap<String, String>) -> bool {
    wished(labels).is_some()
}

/// The network that the labels ask for.
fn wished(labels: &BTreeMap<String, String>) -> Option<&str> {
    let ours = labels.get(NETWORK_KEY).map(String::as_str).filter(|name| !name.is_empty());
    ours.or_else(|| labels.get(RANCHER).filter(|value| *value == "true").map(|_| MANAGED))
}

/// What the container asks for: nothing, or a network, or something that cannot be.
fn request(container: &Container) -> Result<Option<AttachRequest>, String> {
    let labels = &container.config.labels;
    let Some(network) = wished(labels) else { return Ok(None) };
    let (ifname, routes) = match container.host_config.network_mode.as_str() {
        "none" => ("eth0", Routes::All),
        "default" | "bridge" => (BESIDE, Routes::Names),
        other => {
            return Err(format!(
                "its label asks for network \"{network}\", which containers on Docker's bridge or on no network get; this one is on {other:?}: use `--network {network}`"
            ));
        }
    };
    let mut address = None;
    if let Some((key, text)) = ADDRESS.iter().find_map(|key| Some((key, labels.get(*key)?))) {
        let parsed: IpAddr = text.parse().map_err(|_| format!("its label {key}={text} is no address"))?;
        address = Some(parsed);
    }
    // All else is learned when it is described; for whom an address is retained has to be known before.
    let described = describe::describe(container, &Attachment::default());
    let retain = labels.get_key_value(model::RETAIN).map(|(key, value)| (key.clone(), value.clone()));
    Ok(Some(AttachRequest {
        network: network.to_owned(),
        netns: container.network_settings.sandbox_key.clone(),
        ifname: ifname.to_owned(),
        name: described.name,
        stack: described.stack,
        service: described.service,
        aliases: Vec::new(),
        address,
        labels: retain.into_iter().collect(),
        ports: Vec::new(),
        routes: Some(routes),
    }))
}

fn foreign(container: &str) -> String {
    format!("{PREFIX}{container}")
}

impl Follower {
    /// Brings what a container's label asks for about; `None` is a container that is gone.
    pub(super) async fn label(
        &mut self,
        session: &mut Session,
        id: &str,
        container: Option<&Container>,
    ) -> Result<(), ApiError> {
        let foreign = foreign(id);
        let running = container.filter(|container| container.state.running);
        let about = container.map_or_else(String::new, |container| format!("container {}: ", container.name));
        let wanted = match running.map_or(Ok(None), request) {
            Ok(wanted) => wanted,
            Err(why) => {
                self.tell(format!("{about}{why}"));
                None
            }
        };
        let (Some(container), Some(request)) = (running, wanted) else {
            return self.control.delete(&foreign).await;
        };
        let list = self.control.list().await?;
        if let Some(local) = list.iter().find(|local| local.foreign.as_ref() == Some(&foreign)) {
            if local.sandbox.as_ref() == Some(&request.netns) {
                let description = describe::describe(container, &Attachment::default());
                self.control.describe(&foreign, description).await?;
                self.resolv_conf(container, &foreign).await;
                return Ok(());
            }
            // It was started again.
            self.control.delete(&foreign).await?;
        }
        if self.control.view().epoch.is_some() {
            session.plugs.begin(self.control.clone(), container, about, request);
        } else {
            // No network is known yet.
            session.trouble = true;
        }
        Ok(())
    }

    /// An attachment has ended: with success the container is described, if it still runs.
    pub(super) fn plugged(&mut self, session: &mut Session, plugged: Plugged) {
        let Plugged { container, about, netns, outcome } = plugged;
        match outcome {
            Ok(_) => {
                self.settled(&about);
                self.inspect(session, container);
            }
            Err(_) if crate::book::inode(&netns).is_err() => tracing::debug!(container, "it died meanwhile"),
            Err(why) => {
                session.trouble = true;
                self.tell(format!("{about}it is not attached as its label asks: {}", why.message));
            }
        }
    }

    /// Sees to all containers' labels: what was missed while agent, engine or network was away.
    pub(super) async fn labels(
        &mut self,
        session: &mut Session,
        containers: &[Summary],
        endpoints: &[LocalEndpoint],
    ) {
        let plugged = endpoints.iter().filter(|local| local.endpoint.kind == EndpointKind::Label);
        let mut plugged: BTreeSet<String> = plugged.filter_map(|local| local.foreign.clone()).collect();
        for container in containers.iter().filter(|it| it.state == "running" && is_there(&it.labels)) {
            if !plugged.remove(&foreign(&container.id)) {
                self.inspect(session, container.id.clone());
            }
        }
        for foreign in plugged {
            if let Err(why) = self.control.delete(&foreign).await {
                session.trouble = true;
                self.tell(why.to_string());
            }
        }
    }
}
