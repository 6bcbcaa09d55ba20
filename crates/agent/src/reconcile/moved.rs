//! Addresses that moved to another host, or from one to this: containers here are told by gratuitous ARP.
//!
//! Each address has one MAC on every host, and an address elsewhere the gateway's. So a container's ARP entry is wrong when
//! the address at its other end moves between this host and others, for up to a minute if nobody says so.
//!
//! Invariant: what is announced is what the routes say already.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use model::{Change, EndpointId, Key, NetworkId, Object, Watch};

use super::Reconciler;

/// How long an address that was here may be in an ARP table, in milliseconds.
const REMEMBERED: i64 = 600_000;

/// What moves.
#[derive(Default)]
pub(super) struct Moved {
    /// Addresses that other hosts had claimed.
    far: BTreeSet<(NetworkId, IpAddr)>,
    /// When addresses were released here that were announced elsewhere since.
    announced: BTreeMap<(NetworkId, IpAddr), i64>,
    /// Something changed that may be a move.
    pub(super) stirred: bool,
}

impl Reconciler {
    /// Before a message is taken in: which addresses are other hosts' by now.
    pub(super) fn note(&mut self, message: &Watch) {
        match message {
            Watch::Snapshot { .. } => self.moved.stirred = true,
            Watch::Delta { changes, .. } => {
                for change in changes {
                    match change.key() {
                        Key::Claim(network, address) => self.note_claim(network, address),
                        Key::Block(..) => self.moved.stirred = true,
                        Key::Host(_) | Key::Network(_) | Key::Endpoint(_) | Key::Peer(_) => {}
                    }
                    if let Change::Put(Object::Claim(claim)) = change
                        && claim.host != self.book.host
                    {
                        self.moved.far.insert((claim.network.clone(), claim.address));
                    }
                }
            }
            Watch::Servers { .. } | Watch::Heartbeat { .. } | Watch::Prove => {}
        }
    }

    /// Before a claim changes: whose it was.
    pub(super) fn note_claim(&mut self, network: NetworkId, address: IpAddr) {
        self.moved.stirred = true;
        let name = (network, address);
        if self.book.catalog.claims.get(&name).is_some_and(|claim| claim.host != self.book.host) {
            self.moved.far.insert(name);
        }
    }

    /// Announces addresses that were here a while ago and are on another host now.
    pub(super) fn announce_elsewhere(&mut self) {
        if !std::mem::take(&mut self.moved.stirred) {
            return;
        }
        let now = self.book.clock();
        self.moved.announced.retain(|_, at| now - *at < REMEMBERED);
        let gone: Vec<_> = self.book.released_since(now - REMEMBERED).collect();
        for (name, at) in gone {
            let (network, address) = &name;
            if self.moved.announced.get(&name) == Some(&at) || !self.book.is_elsewhere(network, *address) {
                continue;
            }
            let mac = plan::gateway_mac(network);
            if let Err(error) = self.kernel.announce(network, *address, mac) {
                tracing::debug!("{error}");
            }
            self.moved.announced.insert(name, at);
        }
    }

    /// Announces the addresses of an endpoint that were on another host before.
    pub(super) fn announce_here(&mut self, id: &EndpointId) {
        let Some(record) = self.book.record(id) else { return };
        let endpoint = &record.endpoint;
        for address in &endpoint.addresses {
            if self.moved.far.remove(&(endpoint.network.clone(), *address))
                && let Err(error) = self.kernel.announce(&endpoint.network, *address, endpoint.mac)
            {
                tracing::debug!("{error}");
            }
        }
    }
}
