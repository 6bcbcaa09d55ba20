//! Which addresses are given, from which blocks and claims.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use model::api::{ApiError, ErrorCode};
use model::{Key, Network, NetworkId};

use super::{Book, unwritten};
use crate::control::Refusal;
use crate::ipam::Pool;
use crate::ledger::Record;
use crate::now_millis;

impl Book {
    /// Chooses an address, or says what is missing.
    pub(super) fn choose(&self, network: &Network, wish: Option<IpAddr>) -> Result<IpAddr, Refusal> {
        let blocks = self.own_blocks(&network.id);
        let need_block = Refusal::NeedBlock { network: network.id.clone(), held: blocks.len() };
        // The router's address comes from a block, so a host with only claimed addresses needs one too.
        let router = self.catalog.router_address(&network.id, &self.host);
        let Some(router) = router.filter(|router| blocks.iter().any(|block| block.contains(router))) else {
            return Err(need_block);
        };
        let Some(wish) = wish else {
            let pool = self.pool(network, &blocks, Some(router));
            return pool.pick(now_millis()).ok_or(need_block);
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
        let name = (network.id.clone(), wish);
        let claimed = self.catalog.claims.get(&name).is_some_and(|claim| claim.host == self.host)
            && !self.leaving.contains(&Key::Claim(name.0, name.1));
        if claimed || blocks.iter().any(|block| block.contains(&wish)) {
            Ok(wish)
        } else {
            Err(Refusal::NeedClaim { network: network.id.clone(), address: wish })
        }
    }

    /// The blocks of a network that this host holds, and keeps.
    fn own_blocks(&self, network: &NetworkId) -> Vec<IpNet> {
        let kept =
            |block: &&model::Block| !self.leaving.contains(&Key::Block(block.network.clone(), block.cidr));
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
        self.pool(network, &blocks, None).is_low().then_some(blocks.len())
    }

    fn pool<'a>(&'a self, network: &'a Network, blocks: &'a [IpNet], router: Option<IpAddr>) -> Pool<'a> {
        static NONE: BTreeSet<IpAddr> = BTreeSet::new();
        Pool {
            network: &network.id,
            geometry: network.geometry(),
            blocks,
            router,
            used: self.used.get(&network.id).unwrap_or(&NONE),
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
            let now = now_millis();
            self.ledger.unreserve(network, address, now).map_err(unwritten)?;
            self.reservations.remove(&name);
            self.released.insert(name, now);
            self.unuse(network, address);
        }
        Ok(())
    }
}
