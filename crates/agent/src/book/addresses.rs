//! Which addresses are given, from which blocks and claims.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use model::api::{ApiError, ErrorCode};
use model::{Block, Claim, Key, Network, NetworkId, Object};

use super::{Book, unwritten};
use crate::control::Refusal;
use crate::ipam::{Pool, QUARANTINE, rests};
use crate::ledger::{LedgerError, Record};
use crate::now_millis;

impl Book {
    /// Chooses an address, or says what is missing.
    pub(super) fn choose(&self, network: &Network, wish: Option<IpAddr>) -> Result<IpAddr, Refusal> {
        let blocks = self.own_blocks(&network.id);
        let need_block = Refusal::NeedBlock { network: network.id.clone(), held: blocks.len() };
        // The router's address comes from a block, so a host with only claimed addresses needs one too; where none is free,
        // it is a claimed one itself.
        let Some(router) = self.kept_router(&network.id, &blocks) else { return Err(need_block) };
        let Some(wish) = wish else {
            let pool = self.pool(network, &blocks, Some(router));
            let single = || self.idle_claim(&network.id);
            return pool.pick(self.clock()).or_else(single).ok_or(need_block);
        };
        if !network.geometry().assignable(wish) {
            let (pool, name) = (network.pool(), &network.name);
            let message = if pool.contains(&wish) {
                format!(
                    "address {wish} is the network's, broadcast or gateway address of network \"{name}\"; choose another"
                )
            } else {
                format!("address {wish} is not in the pool {pool} of network \"{name}\"; choose one that is")
            };
            return Err(ApiError::new(ErrorCode::Invalid, message).into());
        }
        if let Some(holder) =
            self.holder(&network.id, wish).or((wish == router).then(|| "this host's router".to_owned()))
        {
            let message = format!(
                "address {wish} of network \"{}\" is in use by {holder}; choose another",
                network.name
            );
            return Err(ApiError::new(ErrorCode::Conflict, message).into());
        }
        let others = self.catalog.claims.get(&(network.id.clone(), wish)).filter(|it| it.host != self.host);
        let in_block = others.is_none() && blocks.iter().any(|block| block.contains(&wish));
        if in_block || self.has_claim(&network.id, wish) {
            Ok(wish)
        } else {
            Err(Refusal::NeedClaim { network: network.id.clone(), address: wish })
        }
    }

    /// The router's address, in one of these blocks or claimed.
    fn kept_router(&self, network: &NetworkId, blocks: &[IpNet]) -> Option<IpAddr> {
        let kept = |router: &IpAddr| {
            blocks.iter().any(|block| block.contains(router)) || self.has_claim(network, *router)
        };
        self.catalog.router_address(network, &self.host).filter(kept)
    }

    /// The address that is retained for a container; none where a container that is called the same has it. A router has to
    /// have its own first.
    pub(super) fn retained(&self, network: &Network, owner: &str) -> Result<Option<IpAddr>, Refusal> {
        if self.kept_router(&network.id, &self.own_blocks(&network.id)).is_none() {
            return Ok(None);
        }
        let of_owner = |claim: &&Claim| claim.retained.as_ref().is_some_and(|it| it.owner == owner);
        match self.catalog.claims_of(&network.id).find(of_owner) {
            Some(claim) if self.is_used(&network.id, claim.address) => Ok(None),
            Some(claim) if self.has_claim(&network.id, claim.address) => Ok(Some(claim.address)),
            Some(_) | None => {
                Err(Refusal::NeedRetained { network: network.id.clone(), owner: owner.to_owned() })
            }
        }
    }

    /// Whether a claim of this host is kept for a container that is gone: for so long, since it went or since this agent
    /// started.
    pub(crate) fn is_retained(&self, claim: &Claim) -> bool {
        self.retained_until(claim).is_some_and(|until| self.clock() < until)
    }

    fn retained_until(&self, claim: &Claim) -> Option<i64> {
        let retained = claim.retained.as_ref()?;
        let since = self.released.get(&(claim.network.clone(), claim.address)).copied().unwrap_or_default();
        Some(since.saturating_add(i64::try_from(retained.seconds.saturating_mul(1000)).unwrap_or(i64::MAX)))
    }

    /// Whether this host has claimed an address, and keeps it.
    fn has_claim(&self, network: &NetworkId, address: IpAddr) -> bool {
        let name = (network.clone(), address);
        self.catalog.claims.get(&name).is_some_and(|claim| claim.host == self.host && !claim.asked)
            && !self.leaving.contains_key(&Key::Claim(name.0, name.1))
    }

    /// An address that was claimed for no endpoint in particular, or for one that is gone.
    fn idle_claim(&self, network: &NetworkId) -> Option<IpAddr> {
        let own = self.catalog.claims_of(network);
        let own = own.filter(|it| it.host == self.host && !it.router && it.retained.is_none());
        let now = self.clock();
        let rested = |address: &IpAddr| {
            self.released.get(&(network.clone(), *address)).is_none_or(|since| !rests(*since, now))
        };
        let idle = |address: &IpAddr| {
            !self.is_used(network, *address) && self.has_claim(network, *address) && rested(address)
        };
        own.map(|claim| claim.address).find(idle)
    }

    /// Lets go of an address in one of this host's blocks that another host asked for: whether nobody has it here. From now
    /// on nobody gets it, also after a loss of power.
    pub(crate) fn consent(&mut self, claim: &Claim) -> Result<bool, LedgerError> {
        if claim.wanted.is_some() {
            // A retained one: it is on its way from now on, unless the other asks no more.
            let key = Key::Claim(claim.network.clone(), claim.address);
            let as_known = self.catalog.get(&key) == Some(Object::Claim(claim.clone()));
            return Ok(as_known && self.let_go(&key)?);
        }
        let router = self.catalog.router_address(&claim.network, &self.host);
        let free = !self.is_used(&claim.network, claim.address) && router != Some(claim.address);
        if free {
            self.ledger.put_object(&Object::Claim(claim.clone()))?;
            self.catalog.put(Object::Claim(claim.clone()));
        }
        Ok(free)
    }

    /// Addresses that rest since they were released.
    pub(crate) fn resting(&self) -> Vec<(NetworkId, IpAddr)> {
        let now = self.clock();
        let resting = self.released.iter().filter(|(_, at)| rests(**at, now));
        resting.map(|(name, _)| name.clone()).collect()
    }

    /// Addresses that were released since, with when they were, by [`Book::clock`].
    pub(crate) fn released_since(&self, since: i64) -> impl Iterator<Item = ((NetworkId, IpAddr), i64)> {
        self.released.iter().filter(move |(_, at)| **at >= since).map(|(name, at)| (name.clone(), *at))
    }

    /// Whether an address is another host's: claimed by it, or in a block of it.
    pub(crate) fn is_elsewhere(&self, network: &NetworkId, address: IpAddr) -> bool {
        let claim = self.catalog.claims.get(&(network.clone(), address)).filter(|claim| !claim.asked);
        let mut blocks = self.catalog.blocks_of(network);
        match claim {
            Some(claim) => claim.host != self.host,
            None => blocks.any(|block| block.host != self.host && block.cidr.contains(&address)),
        }
    }

    /// In how many milliseconds the next address has rested, or is retained no longer, if one is.
    pub(crate) fn rested_in(&self) -> Option<u64> {
        let now = self.clock();
        let resting = self.released.values().filter(|at| rests(**at, now)).map(|at| at + QUARANTINE);
        let own = self.catalog.claims.values().filter(|claim| claim.host == self.host);
        let retained = own.filter_map(|claim| self.retained_until(claim)).filter(|until| *until > now);
        resting.chain(retained).map(|until| u64::try_from(until - now).unwrap_or_default()).min()
    }

    /// Own blocks of a network that nobody needs: none of their addresses is in use or rests, the router's is in another one,
    /// and there is plenty without them.
    pub(crate) fn spare_blocks<'a>(&'a self, network: &'a NetworkId) -> impl Iterator<Item = &'a Block> + 'a {
        let router = self.catalog.router_address(network, &self.host);
        let now = self.clock();
        let empty = move |block: &&Block| self.is_empty(network, block.cidr, router, now);
        let own = self.catalog.blocks_of(network).filter(|block| block.host == self.host);
        // One at a time, so that what is left is looked at again.
        own.filter(empty).filter(move |block| self.plenty_without(network, block.cidr)).take(1)
    }

    fn is_empty(&self, network: &NetworkId, cidr: IpNet, router: Option<IpAddr>, now: i64) -> bool {
        let (first, last) = (cidr.network(), cidr.broadcast());
        let used = self.used.get(network).is_some_and(|used| used.range(first..=last).next().is_some());
        let (first, last) = ((network.clone(), first), (network.clone(), last));
        let resting = self.released.range(first.clone()..=last.clone()).any(|(_, at)| rests(*at, now));
        let claimed = self.catalog.claims.range(first..=last).next().is_some();
        !used && !resting && !claimed && !router.is_some_and(|router| cidr.contains(&router))
    }

    fn plenty_without(&self, network: &NetworkId, cidr: IpNet) -> bool {
        let Some(network) = self.catalog.networks.get(network) else { return false };
        let blocks: Vec<IpNet> = self.own_blocks(&network.id).into_iter().filter(|it| *it != cidr).collect();
        self.pool(network, &blocks, None).is_plenty(self.clock())
    }

    /// The blocks of a network that this host holds, and keeps.
    fn own_blocks(&self, network: &NetworkId) -> Vec<IpNet> {
        let kept = |block: &&model::Block| {
            !self.leaving.contains_key(&Key::Block(block.network.clone(), block.cidr))
        };
        let blocks = self.catalog.blocks_of(network).filter(|block| block.host == self.host).filter(kept);
        blocks.map(|block| block.cidr).collect()
    }

    fn holder(&self, network: &NetworkId, address: IpAddr) -> Option<String> {
        let holds = |record: &&Record| {
            record.endpoint.network == *network && record.endpoint.addresses.contains(&address)
        };
        match self.records.values().find(holds) {
            Some(record) => Some(match &record.endpoint.name {
                Some(name) => format!("container {name} on this host"),
                None => format!("endpoint {} on this host", record.endpoint.id),
            }),
            None => self
                .is_used(network, address)
                .then(|| "a container that is being started on this host".to_owned()),
        }
    }

    /// A network whose free addresses run low, and how many blocks of it there are: to be fetched early.
    pub(crate) fn low(&self, network: &NetworkId) -> Option<usize> {
        let network = self.catalog.networks.get(network)?;
        let blocks = self.own_blocks(&network.id);
        // Nothing is fetched early where single addresses have to do.
        let single = self.catalog.claims_of(&network.id).any(|claim| claim.router && claim.host == self.host);
        (!single && self.pool(network, &blocks, None).is_low(self.clock())).then_some(blocks.len())
    }

    fn pool<'a>(&'a self, network: &'a Network, blocks: &'a [IpNet], router: Option<IpAddr>) -> Pool<'a> {
        static NONE: BTreeSet<IpAddr> = BTreeSet::new();
        Pool {
            network: &network.id,
            geometry: network.geometry(),
            blocks,
            router,
            used: self.used.get(&network.id).unwrap_or(&NONE),
            claims: &self.catalog.claims,
            released: &self.released,
        }
    }

    pub(crate) fn reserve(&mut self, network: &NetworkId, wish: Option<IpAddr>) -> Result<IpAddr, Refusal> {
        let network = self.network(network.as_str())?;
        let id = network.id.clone();
        let address = match wish {
            // An engine that starts again asks for what it had.
            Some(wish) if self.is_used(&id, wish) => return Ok(wish),
            wish => self.choose(network, wish)?,
        };
        self.ledger.reserve(&id, address).map_err(unwritten)?;
        self.used.entry(id.clone()).or_default().insert(address);
        self.reservations.insert((id, address));
        Ok(address)
    }

    pub(crate) fn unreserve(&mut self, network: &NetworkId, address: IpAddr) -> Result<(), Refusal> {
        let name = (network.clone(), address);
        if self.reservations.contains(&name) {
            self.ledger.unreserve(network, address, now_millis()).map_err(unwritten)?;
            self.reservations.remove(&name);
            self.released.insert(name, self.clock());
            self.unuse(network, address);
        }
        Ok(())
    }
}
