//! Which address an endpoint gets. Pure: the reconciler knows what is in use, and writes down what was given.
//!
//! Invariant: an address is given only from a block of this host, and only when nobody has it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use model::{Claim, Geometry, NetworkId};

/// How long a released address rests before it is given again, in milliseconds: others may still have it in a cache.
pub const QUARANTINE: i64 = 60_000;

/// Whether an address that was released at `at` still rests at `now`.
pub fn rests(at: i64, now: i64) -> bool {
    now - at < QUARANTINE
}

/// What there is to choose from in one network.
pub struct Pool<'a> {
    /// The network.
    pub network: &'a NetworkId,
    /// The pool's layout.
    pub geometry: Geometry,
    /// This host's blocks.
    pub blocks: &'a [IpNet],
    /// What the router has, where it is not among them.
    pub router: Option<IpAddr>,
    /// What endpoints and reservations have.
    pub used: &'a BTreeSet<IpAddr>,
    /// What hosts have claims for: none of it is given from a block, whoever has the claim.
    pub claims: &'a BTreeMap<(NetworkId, IpAddr), Claim>,
    /// When addresses were last released, in milliseconds of a clock that nobody sets.
    pub released: &'a BTreeMap<(NetworkId, IpAddr), i64>,
}

impl Pool<'_> {
    /// The next address to give at `now`: one never used, else the one that has rested longest; none if all are in use
    /// or resting.
    pub fn pick(&self, now: i64) -> Option<IpAddr> {
        let mut best: Option<(i64, IpAddr)> = None;
        for address in self.free() {
            match self.released.get(&(self.network.clone(), address)) {
                None => return Some(address),
                Some(at) if rests(*at, now) => {}
                Some(at) if best.is_none_or(|(oldest, _)| *at < oldest) => best = Some((*at, address)),
                Some(_) => {}
            }
        }
        best.map(|(_, address)| address)
    }

    /// Whether so little can be given at `now` that another block should be fetched before it is needed: less than half of
    /// one. Other hosts hear of it some 75 ms later, in which many containers may be started.
    pub fn is_low(&self, now: i64) -> bool {
        !self.has((1, 2), now)
    }

    /// Whether so much is there that a block of it is not missed: five eighths of one, so that what was fetched early is not
    /// given back when the next container ends.
    pub fn is_plenty(&self, now: i64) -> bool {
        !self.blocks.is_empty() && self.has((5, 8), now)
    }

    /// Whether that part of a block could be given, or there is no block to speak of.
    fn has(&self, (part, of): (usize, usize), now: i64) -> bool {
        let Some(block) = self.blocks.first() else { return true };
        let enough = (self.geometry.addresses(*block).count() * part).div_ceil(of);
        let resting = |address: &IpAddr| {
            let released = self.released.get(&(self.network.clone(), *address));
            released.is_some_and(|at| rests(*at, now))
        };
        self.free().filter(|address| !resting(address)).take(enough).count() == enough
    }

    fn free(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.blocks.iter().flat_map(move |block| {
            // Both go up: each is walked once. This is done for each container, over all addresses of the host: as numbers.
            let mut used = self.used.range(block.network()..=block.broadcast()).map(number).peekable();
            self.geometry.addresses(*block).filter(move |address| {
                let this = number(address);
                while used.next_if(|used| *used < this).is_some() {}
                used.peek() != Some(&this)
                    && Some(*address) != self.router
                    && !odd(*address)
                    && (self.claims.is_empty()
                        || !self.claims.contains_key(&(self.network.clone(), *address)))
            })
        })
    }
}

/// Numbers are compared faster than addresses. Those of one block are of one family.
fn number(address: &IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u32::from(*address).into(),
        IpAddr::V6(address) => u128::from(*address),
    }
}

/// Addresses that end in .0 or .255 are legal inside a larger prefix, but enough software refuses them: they are given
/// only on request.
fn odd(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => matches!(address.octets()[3], 0 | 255),
        IpAddr::V6(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Scene {
        network: NetworkId,
        geometry: Geometry,
        blocks: Vec<IpNet>,
        used: BTreeSet<IpAddr>,
        released: BTreeMap<(NetworkId, IpAddr), i64>,
        claims: BTreeMap<(NetworkId, IpAddr), Claim>,
    }

    impl Scene {
        fn new() -> Self {
            let geometry = Geometry::new("10.42.0.0/16".parse().unwrap(), 29);
            let network = NetworkId::from_random([1; 8]);
            let blocks = vec!["10.42.64.8/29".parse().unwrap()];
            Self {
                network,
                geometry,
                blocks,
                used: BTreeSet::new(),
                released: BTreeMap::new(),
                claims: BTreeMap::new(),
            }
        }

        fn pool(&self) -> Pool<'_> {
            Pool {
                network: &self.network,
                geometry: self.geometry,
                blocks: &self.blocks,
                router: None,
                used: &self.used,
                released: &self.released,
                claims: &self.claims,
            }
        }

        fn give(&mut self, now: i64) -> Option<IpAddr> {
            let address = self.pool().pick(now)?;
            self.used.insert(address);
            Some(address)
        }

        fn take_back(&mut self, address: IpAddr, now: i64) {
            self.used.remove(&address);
            self.released.insert((self.network.clone(), address), now);
        }
    }

    #[test]
    fn every_address_is_given_once_and_then_none() {
        let mut scene = Scene::new();
        let given: BTreeSet<IpAddr> = std::iter::from_fn(|| scene.give(0)).collect();
        assert_eq!(given.len(), 8);
        assert!(given.iter().all(|address| scene.blocks[0].contains(address)));
    }

    #[test]
    fn a_released_address_rests_and_the_one_that_rested_longest_comes_first() {
        let mut scene = Scene::new();
        let given: Vec<IpAddr> = std::iter::from_fn(|| scene.give(0)).collect();
        scene.take_back(given[3], 1_000);
        scene.take_back(given[1], 2_000);
        assert_eq!(scene.pool().pick(30_000), None);
        assert_eq!(scene.pool().pick(1_000 + QUARANTINE), Some(given[3]));
        assert_eq!(scene.pool().pick(2_000 + QUARANTINE), Some(given[3]));
    }

    #[test]
    fn the_pool_is_low_below_half_of_a_block_and_plenty_from_five_eighths() {
        let mut scene = Scene::new();
        let size = scene.pool().free().count();
        let free = |scene: &Scene| scene.pool().free().count();
        while free(&scene) > 0 {
            let pool = scene.pool();
            assert_eq!(pool.is_low(0), free(&scene) * 2 < size, "{} of {size}", free(&scene));
            assert_eq!(pool.is_plenty(0), free(&scene) * 8 >= size * 5, "{} of {size}", free(&scene));
            scene.give(0);
        }
        assert!(scene.pool().is_low(0) && !scene.pool().is_plenty(0));
    }

    #[test]
    fn addresses_that_rest_are_not_counted_on() {
        let mut scene = Scene::new();
        let given: Vec<IpAddr> = std::iter::from_fn(|| scene.give(0)).collect();
        for address in given {
            scene.take_back(address, 1_000);
        }
        assert!(scene.pool().is_low(2_000) && !scene.pool().is_plenty(2_000));
        assert!(!scene.pool().is_low(1_000 + QUARANTINE) && scene.pool().is_plenty(1_000 + QUARANTINE));
    }
}
