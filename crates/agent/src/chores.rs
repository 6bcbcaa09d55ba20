//! What this host still has to tell the server. Pure: the difference between the ledger and the snapshot, so nothing
//! has to be remembered, and nothing is lost by a restart of either side.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use model::{Block, Claim, Endpoint, EndpointId, Epoch, NetworkId, Object, Revision};

use crate::book::Book;
use crate::view::Router;

/// What to tell the server.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Chores {
    /// Endpoints it does not know, or knows otherwise.
    pub(crate) put: Vec<Arc<Endpoint>>,
    /// Endpoints of this host that are gone.
    pub(crate) delete: Vec<EndpointId>,
    /// Claims no endpoint has.
    pub(crate) release: Vec<Claim>,
    /// Blocks of networks that are not used here any more.
    pub(crate) give_back: Vec<Block>,
    /// Networks of which another block should be fetched before it is needed, or the first for a router that speaks to
    /// foreign peers, with how many there are.
    pub(crate) lease: Vec<(NetworkId, usize)>,
    /// Addresses in this host's blocks, or retained here, that others ask for.
    pub(crate) consent: Vec<Claim>,
    /// What was withdrawn is gone from this host's kernel.
    pub(crate) heard: Option<Heard>,
}

/// Up to where this host has taken in the server's state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Heard {
    /// The life of the store.
    pub(crate) epoch: Epoch,
    /// The last word of a block that was withdrawn: somebody may wait for it.
    pub(crate) withdrawal: Revision,
    /// All up to this is applied.
    pub(crate) applied: Revision,
}

impl Chores {
    pub(crate) fn of(
        book: &Book,
        routers: &BTreeMap<NetworkId, Router>,
        lingers: impl Fn(&NetworkId) -> bool,
        applied: Revision,
    ) -> Self {
        let Some(epoch) = &book.epoch else { return Self::default() };
        let catalog = &book.catalog;
        let (mut put, mut delete) = (Vec::new(), Vec::new());
        for id in book.differing() {
            match book.record(id) {
                // The server knows, or soon says, of an endpoint's network; of one that is gone there is nothing to tell.
                Some(record) if catalog.networks.contains_key(&record.endpoint.network) => {
                    put.push(Arc::clone(&record.endpoint));
                }
                Some(_) => {}
                None => delete.push(id.clone()),
            }
        }
        let leaving = |claim: &Claim| {
            let claim = Object::Claim(claim.clone());
            book.leaving().any(|object| object.is_same_grant(&claim))
        };
        let release = catalog
            .claims
            .values()
            .filter(|claim| claim.host == book.host && !book.is_used(&claim.network, claim.address))
            // One that another host asks for goes there.
            .filter(|claim| claim.wanted.is_none() && (leaving(claim) || !book.is_retained(claim)))
            .filter(|claim| leaving(claim) || !book.needs_claim_for_router(&claim.network, claim.address))
            .cloned();
        let gateway: BTreeSet<&NetworkId> = catalog.gateway_of(&book.host).collect();
        let idle = |network: &NetworkId| {
            !book.uses_addresses(network) && !lingers(network) && !gateway.contains(network)
        };
        let mut give_back: Vec<Block> = catalog
            .blocks
            .values()
            .filter(|block| {
                block.host == book.host && idle(&block.network) && !routers.contains_key(&block.network)
            })
            .cloned()
            .collect();
        let known = |block: &Block, of: &[Block]| of.iter().any(|other| other.cidr == block.cidr);
        let spare = routers.keys().filter(|network| !idle(network)).flat_map(|id| book.spare_blocks(id));
        give_back.extend(spare.cloned());
        for object in book.leaving() {
            if let Object::Block(block) = object
                && !known(block, &give_back)
            {
                give_back.push(block.clone());
            }
        }
        // The oldest block holds the router's address: it goes last.
        give_back.sort_by_key(|block| std::cmp::Reverse(block.leased));
        let low = routers
            .keys()
            .filter(|network| book.uses_addresses(network))
            .filter_map(|network| Some((network.clone(), book.low(network)?)));
        // A router that speaks to foreign peers needs an address, also where no endpoint is.
        let bare = gateway.iter().filter(|network| catalog.router_address(network, &book.host).is_none());
        let lease = low.chain(bare.map(|network| ((*network).clone(), 0))).collect();
        let own = |claim: &&Claim| {
            let mut blocks = catalog.blocks_of(&claim.network).filter(|block| block.host == book.host);
            let in_block = blocks.any(|block| block.cidr.contains(&claim.address));
            let retained = claim.host == book.host && claim.wanted.is_some();
            retained || (claim.asked && claim.host != book.host && in_block)
        };
        let consent = catalog.claims.values().filter(own).cloned().collect();
        let withdrawal = book.withdrawal();
        let heard = (applied >= withdrawal).then(|| Heard { epoch: epoch.clone(), withdrawal, applied });
        Self { put, delete, release: release.collect(), give_back, lease, consent, heard }
    }

    /// Whether there is nothing that has to be tried again.
    pub(crate) fn is_empty(&self) -> bool {
        let Self { put, delete, release, give_back, lease, consent, heard: _ } = self;
        put.is_empty()
            && delete.is_empty()
            && release.is_empty()
            && give_back.is_empty()
            && lease.is_empty()
            && consent.is_empty()
    }
}
