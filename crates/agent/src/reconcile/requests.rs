//! What others ask of the reconciler that touches the kernel: attach and detach, join and leave, ports.
//!
//! Invariant: the books come first. What the kernel then refuses is taken back out of them, and out of the kernel.

use std::collections::BTreeSet;
use std::path::PathBuf;

use model::agent_api::{AttachRequest, Attached, Routes};
use model::api::{ApiError, ErrorCode};
use model::{EndpointId, EndpointKind, NetworkId, Object};
use nix::errno::Errno;
use plan::object::Set;
use plan::{Bridge, End, Key, Place, Scope};

use super::{ROUNDS, Reconciler, unknown};
use crate::book::{self, handed};
use crate::control::{Handed, Refusal};
use crate::ledger::Sandbox;

impl Reconciler {
    pub(super) fn attach(
        &mut self,
        id: &EndpointId,
        request: AttachRequest,
        foreign: Option<String>,
        retain: bool,
    ) -> Result<Attached, Refusal> {
        self.book.counts()?;
        let inode = book::inode(&request.netns)?;
        if let Some(whose) = self.kernel.whose(inode) {
            let whose = match whose {
                Place::Host => "this host's own network namespace",
                Place::Router(_) => "the network namespace of a router of Droveway",
            };
            let message = format!(
                "{} is {whose}; attach a container's: /run/netns/NAME, or /proc/PID/ns/net of a process in it",
                request.netns.display()
            );
            return Err(ApiError::new(ErrorCode::Invalid, message).into());
        }
        let attached = self.book.attach(id, request, (foreign, retain), inode)?;
        self.put_up(id, None)?;
        self.announce_here(id);
        Ok(attached)
    }

    pub(super) fn join(&mut self, foreign: &str, sandbox: PathBuf) -> Result<Handed, Refusal> {
        self.book.counts()?;
        let id = self.book.by_foreign(foreign).cloned().ok_or_else(|| unknown(foreign))?;
        self.book.set_sandbox(
            &id,
            Some(Sandbox { path: sandbox, ifname: None, inode: None, routes: Routes::All }),
        )?;
        self.put_up(&id, Some(End::Handed))?;
        self.announce_here(&id);
        let record = self.book.record(&id).ok_or_else(|| unknown(foreign))?;
        let network = self.book.network(record.endpoint.network.as_str())?;
        Ok(handed(network, &id))
    }

    pub(super) fn leave(&mut self, foreign: &str) -> Result<(), Refusal> {
        let Some(id) = self.book.by_foreign(foreign).cloned() else { return Ok(()) };
        let names = self.names_of(&id);
        self.book.set_sandbox(&id, None)?;
        self.take_down(names);
        Ok(())
    }

    pub(super) fn publish_ports(
        &mut self,
        foreign: &str,
        ports: Vec<model::PublishedPort>,
    ) -> Result<Vec<model::PublishedPort>, Refusal> {
        let id = self.book.by_foreign(foreign).cloned().ok_or_else(|| unknown(foreign))?;
        let mut names = self.names_of(&id);
        let ports = self.book.set_ports(&id, ports)?;
        names.retain(|(_, key)| matches!(key, Key::Element(Set::Publish, _)));
        self.take_down(names);
        if self.book.record(&id).is_some_and(|record| record.sandbox.is_some()) {
            self.put_up(&id, Some(End::Handed))?;
        }
        Ok(ports)
    }

    /// Makes what a new attachment needs. If the kernel refuses, the attachment is undone.
    fn put_up(&mut self, id: &EndpointId, end: Option<End>) -> Result<(), Refusal> {
        let Some(network) = self.book.record(id).map(|record| record.endpoint.network.clone()) else {
            return Ok(());
        };
        let outcome = self.try_put_up(id, &network, end);
        self.unpublished = true;
        if outcome.is_err() {
            let names = self.names_of(id);
            let undone = if self.is_engines(id) {
                self.book.set_sandbox(id, None)
            } else {
                self.book.forget(id, false)
            };
            if let Err(error) = undone {
                self.trouble(error.message);
            }
            self.take_down(names);
        }
        outcome.map_err(Refusal::from)
    }

    fn try_put_up(&mut self, id: &EndpointId, network: &NetworkId, end: Option<End>) -> Result<(), ApiError> {
        self.book.slot(network)?;
        self.lingering.remove(network);
        let bridge = (Place::Router(network.clone()), Key::Link(Bridge::ROOT.name()));
        if self.stale || !self.wanted.contains_key(&bridge) || !self.kernel.state().contains_key(&bridge) {
            // The router first, and all else with it.
            self.converge_all(Some(id));
        }
        let end = end.or_else(|| self.inside(id)).unwrap_or(End::Nowhere);
        let local = self.book.local_of(Some((id, end)));
        let mut part = plan::desired_attachment(&self.book.catalog, &local, id);
        part.extend(plan::desired_bridge(&self.book.catalog, &local, id));
        let names: BTreeSet<_> = part.keys().cloned().collect();
        self.wanted.extend(part);
        let scope = Scope::Only(names);
        for _ in 0..ROUNDS {
            let steps = self.difference(&scope).map_err(refused_attachment)?;
            if steps.is_empty() {
                let Scope::Only(names) = scope else { return Ok(()) };
                self.look(&names);
                return Ok(());
            }
            for step in &steps {
                self.kernel.apply(step).map_err(|why| match why.source.errno {
                    Some(Errno::EEXIST) => {
                        let remedy = "where it has such a device or route already, choose another ifname, or which routes to bring (\"routes\")";
                        ApiError::new(ErrorCode::Conflict, format!("{why}; {remedy}"))
                    }
                    Some(_) | None => refused_attachment(why),
                })?;
            }
        }
        Err(refused_attachment(format!("it was not there after {ROUNDS} tries")))
    }

    /// Takes objects away that are wanted no more.
    pub(super) fn take_down(&mut self, names: BTreeSet<(Place, Key)>) {
        for name in &names {
            self.wanted.remove(name);
        }
        let scope = Scope::Only(names);
        self.converge(&scope);
        if let Scope::Only(names) = scope {
            self.look(&names);
        }
        self.unpublished = true;
    }

    fn inside(&self, id: &EndpointId) -> Option<End> {
        let sandbox = self.book.record(id)?.sandbox.as_ref()?;
        let (netns, ifname) = (sandbox.path.clone(), sandbox.ifname.clone()?);
        Some(End::Inside { netns, ifname, routes: sandbox.routes })
    }

    /// Whether an engine made the endpoint on a network of its own: it takes the device and gives the address back.
    pub(super) fn is_engines(&self, id: &EndpointId) -> bool {
        self.book.record(id).is_some_and(|record| record.endpoint.kind == EndpointKind::Docker)
    }

    pub(super) fn forget(&mut self, id: &EndpointId, keep: bool) -> Result<(), Refusal> {
        let names = self.names_of(id);
        let network = self.book.record(id).map(|record| record.endpoint.network.clone());
        self.book.forget(id, keep)?;
        self.moved.stirred = true;
        self.take_down(names);
        self.linger(network);
        Ok(())
    }

    pub(super) fn keep(&mut self, object: Object) {
        if let Err(error) = self.book.granted(object) {
            self.trouble(error.to_string());
        }
        self.stale = true;
    }
}

fn refused_attachment(why: impl std::fmt::Display) -> ApiError {
    ApiError::new(ErrorCode::Internal, format!("the kernel refused the attachment: {why}"))
}
