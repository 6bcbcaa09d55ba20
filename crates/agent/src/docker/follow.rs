//! The follower: makes the engine show Droveway's networks, and learns from it what its containers are called.
//!
//! Watch first, then look at everything, then follow events: nothing that happens between is lost. When the engine goes
//! away, all that was begun with it is dropped, and it is tried again for ever, with backoff and jitter.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use model::NetworkId;
use model::agent_api::DockerStatus;
use model::api::{ApiError, ErrorCode};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::engine::{Container, Engine, EngineError, Event, Network};
use super::state::State;
use super::sweep::{self, Leftover, Sweep};
use super::{DRIVER, NETWORK_KEY, describe, label, resolv};
use crate::Control;
use crate::control::Command;

/// The wait before the second attempt to reach the engine, and the longest. To try costs one connect(2).
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));
/// How often it is checked whether something is still to be done.
const TICK: Duration = Duration::from_secs(10);
/// How often everything is looked at, though no event asked for it.
const LOOK: Duration = Duration::from_mins(5);

/// Follows one engine.
pub(super) struct Follower {
    engine: Engine,
    pub(super) control: Control,
    state: Arc<State>,
    status: watch::Sender<DockerStatus>,
    /// How many events were taken in.
    events: Arc<AtomicU64>,
    resolv_conf: PathBuf,
    sweep: Sweep,
    /// What was said already, so that it is said once and again only after it was over.
    told: BTreeSet<String>,
    /// The remedy for a resolv.conf out of reach was said.
    told_dns: bool,
}

/// What a session has under way.
#[derive(Default)]
pub(super) struct Session {
    /// Inspections: one per container at a time.
    inspections: JoinSet<(String, Result<Option<Container>, EngineError>)>,
    /// Containers under inspection, and whether to inspect again at its end.
    inspecting: BTreeMap<String, bool>,
    /// Attachments for labels: one per container at a time.
    pub(super) plugs: label::Plugs,
    /// Docker's networks that are Droveway's.
    ours: BTreeMap<String, NetworkId>,
    /// Something could not be done; try again at the next tick.
    pub(super) trouble: bool,
}

impl Follower {
    pub(super) fn new(
        engine: Engine,
        control: Control,
        state: Arc<State>,
        status: watch::Sender<DockerStatus>,
        events: Arc<AtomicU64>,
        resolv_conf: PathBuf,
    ) -> Self {
        Self {
            engine,
            control,
            state,
            status,
            events,
            resolv_conf,
            sweep: Sweep::default(),
            told: BTreeSet::new(),
            told_dns: false,
        }
    }

    /// Follows for ever.
    pub(super) async fn run(mut self) -> Infallible {
        let mut wait = BACKOFF.0;
        loop {
            let begun = Instant::now();
            let why = match self.session().await {
                Ok(()) => "the engine closed the connection".to_owned(),
                Err(why) => why.to_string(),
            };
            // Nothing is certain of an engine that is away, and its missing endpoints are no leftovers.
            self.state.lose_engine();
            self.sweep = Sweep::default();
            let before = self.status.send_replace(DockerStatus::Waiting { why: why.clone() });
            if !matches!(before, DockerStatus::Waiting { why: ref old } if *old == why) {
                tracing::info!(%why, "waiting for Docker's engine");
            }
            if begun.elapsed() > BACKOFF.1 {
                wait = BACKOFF.0;
            }
            let [jitter] = crate::random::<1>();
            tokio::time::sleep(wait.mul_f64(0.75 + f64::from(jitter) / 512.0)).await;
            wait = (wait * 2).min(BACKOFF.1);
        }
    }

    async fn session(&mut self) -> Result<(), EngineError> {
        let version = self.engine.connect().await?;
        let mut events = self.engine.events().await?;
        let mut views = self.control.views();
        views.mark_unchanged();
        let mut session = Session::default();
        let mut known = self.wanted();
        self.networks(&mut session).await?;
        for container in self.engine.containers().await? {
            let attached = container.network_settings.networks.values();
            if attached.into_iter().any(|part| !part.endpoint_id.is_empty()) {
                self.inspect(&mut session, container.id);
            }
        }
        self.look(&mut session).await?;
        tracing::info!(version = version.engine, api = version.newest, "following Docker's engine");
        self.status.send_replace(DockerStatus::Up { version: version.engine });

        let mut tick = tokio::time::interval_at(tokio::time::Instant::now() + TICK, TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut looked = Instant::now();
        let mut died = false;
        loop {
            tokio::select! {
                event = events.next() => match event? {
                    None => return Ok(()),
                    Some(event) => {
                        self.events.fetch_add(1, Ordering::Relaxed);
                        died |= matches!(event.action.as_str(), "die" | "destroy" | "disconnect");
                        self.happened(&mut session, event).await?;
                    }
                },
                Some(done) = session.inspections.join_next() => {
                    // A task that panicked would be a fault of ours; its container is inspected at the next event.
                    if let Ok((id, result)) = done {
                        self.inspected(&mut session, &id, result?).await;
                    }
                }
                Some(plugged) = session.plugs.next() => self.plugged(&mut session, plugged),
                changed = views.changed() => {
                    if changed.is_err() {
                        // The reconciler has ended, and with it the agent.
                        return std::future::pending().await;
                    }
                    // Most changes are of endpoints and do not matter to the engine.
                    let wanted = self.wanted();
                    if wanted != known {
                        known = wanted;
                        self.networks(&mut session).await?;
                        self.look(&mut session).await?;
                    }
                }
                _ = tick.tick() => {
                    if session.trouble || died || self.sweep.suspects() || looked.elapsed() >= LOOK {
                        (looked, died) = (Instant::now(), false);
                        self.networks(&mut session).await?;
                        self.look(&mut session).await?;
                    }
                }
            }
        }
    }

    /// The networks that the engine should show; `None` as long as nothing is known.
    fn wanted(&self) -> Option<BTreeMap<NetworkId, model::Network>> {
        let view = self.control.view();
        view.epoch.as_ref().map(|_| view.catalog.networks.clone())
    }

    /// Makes the engine's networks those of the catalog.
    async fn networks(&mut self, session: &mut Session) -> Result<(), EngineError> {
        session.trouble = false;
        let before = self.state.networks();
        let mut there = self.engine.networks().await?;
        if let Some(wanted) = self.wanted() {
            let mut changed = false;
            for old in
                there.iter().filter(|network| mark(network).is_some_and(|id| !wanted.contains_key(&id)))
            {
                changed |= self.remove(session, old).await?;
            }
            for network in wanted.values() {
                if !there.iter().any(|docker| mark(docker).as_ref() == Some(&network.id)) {
                    changed |= self.create(session, network, &there).await?;
                }
            }
            if changed {
                there = self.engine.networks().await?;
            }
        }
        let view = self.control.view();
        let ours = there.iter().filter(|network| network.driver == DRIVER).filter_map(|network| {
            // What was kept at creation is right even if the option was a name that means another network by now.
            let id = self.state.network(&network.id).or_else(|| {
                let option = network.options.get(NETWORK_KEY)?;
                option.parse().ok().or_else(|| view.network(option).map(|network| network.id.clone()))
            })?;
            Some((network.id.clone(), id))
        });
        session.ours = ours.collect();
        if let Err(why) = self.state.learn_networks(&before, &session.ours) {
            session.trouble = true;
            self.tell(why.to_string());
        }
        Ok(())
    }

    async fn create(
        &mut self,
        session: &mut Session,
        network: &model::Network,
        there: &[Network],
    ) -> Result<bool, EngineError> {
        let name = network.name.as_str();
        let clash = format!("network {name:?} cannot appear on Docker's engine: ");
        if let Some(other) = there.iter().find(|docker| docker.name == name) {
            if other.driver == DRIVER && self.state.network(&other.id).as_ref() == Some(&network.id) {
                return Ok(false);
            }
            session.trouble = true;
            self.tell(format!(
                "{clash}it has another network of that name (driver {}, id {:.12}); `docker network rm {name}`, or use ours by another name: docker network create -d {DRIVER} --ipam-driver {DRIVER} -o {NETWORK_KEY}={name} --ipam-opt {NETWORK_KEY}={name} NAME",
                other.driver, other.id
            ));
            return Ok(false);
        }
        match self.engine.create_network(network).await {
            Ok(()) => {
                self.settled(&clash);
                tracing::info!(network = name, "the network is on Docker's engine");
                Ok(true)
            }
            Err(why @ EngineError::Refused { .. }) => {
                session.trouble = true;
                self.tell(format!("{clash}{why}; it is tried again"));
                Ok(false)
            }
            Err(why) => Err(why),
        }
    }

    async fn remove(&mut self, session: &mut Session, old: &Network) -> Result<bool, EngineError> {
        let stays = format!("network {:?} is gone and cannot be taken off Docker's engine: ", old.name);
        let Some(full) = self.engine.network(&old.id).await? else { return Ok(true) };
        let why = if full.containers.is_empty() {
            match self.engine.remove_network(&old.id).await {
                Ok(()) => {
                    self.settled(&stays);
                    tracing::info!(network = old.name, "the network is off Docker's engine");
                    return Ok(true);
                }
                Err(why @ EngineError::Refused { .. }) => why.to_string(),
                Err(why) => return Err(why),
            }
        } else {
            let users: Vec<&str> = full.containers.values().map(|part| part.name.as_str()).collect();
            format!("it is used by {}; remove them", users.join(", "))
        };
        session.trouble = true;
        self.tell(format!("{stays}{why}"));
        Ok(false)
    }

    /// One event. Which container it is about, and whether that has to be looked at again.
    async fn happened(&mut self, session: &mut Session, event: Event) -> Result<(), EngineError> {
        let Event { r#type, action, actor } = event;
        match (r#type.as_str(), action.as_str()) {
            ("network", "create" | "destroy") => {
                self.control.send(Command::EngineFirewall);
                self.networks(session).await?;
            }
            ("network", "connect") => {
                if let Some(container) = actor.attributes.get("container") {
                    self.inspect(session, container.clone());
                }
            }
            ("container", "start" | "rename") => self.inspect(session, actor.id),
            ("container", "die" | "destroy") if label::is_there(&actor.attributes) => {
                self.inspect(session, actor.id);
            }
            ("container", health) if health.starts_with("health_status") => self.inspect(session, actor.id),
            (_, _) => {}
        }
        Ok(())
    }

    /// Inspects a container beside everything else: the engine holds its lock while it starts.
    pub(super) fn inspect(&self, session: &mut Session, id: String) {
        if let Some(again) = session.inspecting.get_mut(&id) {
            *again = true;
            return;
        }
        session.inspecting.insert(id.clone(), false);
        let engine = self.engine.clone();
        session.inspections.spawn(async move {
            let result = engine.container(&id).await;
            (id, result)
        });
    }

    async fn inspected(&mut self, session: &mut Session, id: &str, container: Option<Container>) {
        if session.inspecting.remove(id) == Some(true) {
            self.inspect(session, id.to_owned());
        }
        if let Err(why) = self.label(session, id, container.as_ref()).await {
            session.trouble = true;
            self.tell(why.to_string());
        }
        let Some(container) = container else { return };
        for attachment in container.network_settings.networks.values() {
            let foreign = &attachment.endpoint_id;
            if foreign.is_empty() || !session.ours.contains_key(&attachment.network_id) {
                continue;
            }
            match self.control.describe(foreign, describe::describe(&container, attachment)).await {
                Ok(()) => {
                    if resolv::bypasses_containers(&self.resolv_conf) || self.is_shut_in(session, &container)
                    {
                        self.resolv_conf(&container, foreign).await;
                    }
                }
                // It has left meanwhile, or it is from before this agent's ledger.
                Err(why) if why.code == ErrorCode::NotFound => {}
                Err(why) => self.tell(format!("container {}: {why}", container.name)),
            }
        }
    }

    /// Makes the container ask the router itself, where Docker's own resolver would not: where the host's resolver is a
    /// loopback one, where all its networks are internal, and where it is attached for its label.
    pub(super) async fn resolv_conf(&mut self, container: &Container, foreign: &str) {
        // Servers that were given by `--dns` are asked from the container's namespace, loopback or not.
        let path = PathBuf::from(&container.resolv_conf_path);
        if container.resolv_conf_path.is_empty() || !container.host_config.dns.is_empty() {
            return;
        }
        let list = self.control.list().await.unwrap_or_default();
        let Some(local) = list.into_iter().find(|local| local.foreign.as_deref() == Some(foreign)) else {
            return;
        };
        let search = self.control.view().search_list(&local.endpoint);
        if let Err(why) = resolv::rewrite(&path, &search)
            && !std::mem::replace(&mut self.told_dns, true)
        {
            tracing::warn!(
                file = %path.display(), %why,
                "nobody asks the router here but the container itself, and the container's resolv.conf is out of reach: other hosts' names will not resolve; run containers, or the engine, with --dns {}",
                model::SERVICE_ADDRESS
            );
        }
    }

    /// Whether all networks of the container are Droveway's and internal: then Docker's resolver asks nobody, by its own
    /// choice or for want of a route.
    fn is_shut_in(&self, session: &Session, container: &Container) -> bool {
        let view = self.control.view();
        container.network_settings.networks.values().all(|attachment| {
            let network = session.ours.get(&attachment.network_id);
            network.and_then(|id| view.catalog.networks.get(id)).is_some_and(|network| network.internal)
        })
    }

    /// Compares what the ledger holds for the engine with what it has.
    async fn look(&mut self, session: &mut Session) -> Result<(), EngineError> {
        // Ours first: what the engine gets in between, it has when it is asked.
        let ours =
            async { Ok::<_, ApiError>((self.control.list().await?, self.control.reservations().await?)) };
        let (endpoints, reservations) = match ours.await {
            Ok(both) => both,
            Err(why) => {
                session.trouble = true;
                self.tell(why.to_string());
                return Ok(());
            }
        };
        let mut there = sweep::Engine::default();
        for (docker, id) in &session.ours {
            let Some(network) = self.engine.network(docker).await? else { continue };
            for part in network.containers.into_values() {
                if let Some(address) = bare(&part.ipv4_address) {
                    there.addresses.insert((id.clone(), address));
                }
                there.endpoints.insert(part.endpoint_id);
            }
            let aux = network.ipam.config.iter().flat_map(|config| config.auxiliary_addresses.values());
            there.addresses.extend(aux.filter_map(|text| bare(text)).map(|address| (id.clone(), address)));
        }
        let containers = self.engine.containers().await?;
        self.labels(session, &containers, &endpoints).await;
        for container in containers {
            there
                .endpoints
                .extend(container.network_settings.networks.into_values().map(|part| part.endpoint_id));
        }
        let before: BTreeSet<_> = endpoints.iter().filter_map(|local| local.foreign.clone()).collect();
        self.state.confirm_all(before.intersection(&there.endpoints));
        let state = &self.state;
        let leftovers =
            self.sweep.look(Instant::now(), &endpoints, &reservations, &there, |network, address| {
                state.in_flight(network, address)
            });
        for leftover in leftovers {
            if let Err(why) = self.clear(&leftover, &endpoints).await {
                session.trouble = true;
                self.tell(format!("what Docker's engine has forgotten cannot be cleared away: {why}"));
            }
        }
        Ok(())
    }

    async fn clear(
        &self,
        leftover: &Leftover,
        endpoints: &[crate::control::LocalEndpoint],
    ) -> Result<(), ApiError> {
        tracing::info!(?leftover, "clearing away what Docker's engine has forgotten");
        match leftover {
            Leftover::Address(network, address) => self.control.unreserve(network, *address).await,
            Leftover::Endpoint(foreign) => {
                self.control.leave(foreign).await?;
                self.control.delete(foreign).await?;
                self.state.forget(foreign);
                let local = endpoints.iter().find(|local| local.foreign.as_ref() == Some(foreign));
                if let Some(local) = local {
                    for address in &local.endpoint.addresses {
                        self.control.unreserve(&local.endpoint.network, *address).await?;
                    }
                }
                Ok(())
            }
        }
    }

    /// What was said of this is over: the next time it is said again.
    pub(super) fn settled(&mut self, about: &str) {
        self.told.retain(|told| !told.starts_with(about));
    }

    /// Says something once.
    pub(super) fn tell(&mut self, what: String) {
        if !self.told.contains(&what) {
            tracing::warn!("{what}");
            if self.told.len() > 256 {
                self.told.clear();
            }
            self.told.insert(what);
        }
    }
}

/// The Droveway network that the follower made this Docker network for.
fn mark(network: &Network) -> Option<NetworkId> {
    let label = network.labels.get(NETWORK_KEY).filter(|_| network.driver == DRIVER)?;
    label.parse().ok()
}

/// An address without its prefix.
fn bare(text: &str) -> Option<IpAddr> {
    text.split('/').next()?.parse().ok()
}
