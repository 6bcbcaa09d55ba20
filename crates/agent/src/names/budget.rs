//! How many things may be under way at once, in all and for one asker, so that no container starves its neighbours.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A bound on what is under way.
#[derive(Debug)]
pub(crate) struct Budget {
    total: usize,
    each: usize,
    used: Mutex<Used>,
}

#[derive(Debug, Default)]
struct Used {
    total: usize,
    each: HashMap<IpAddr, usize>,
}

/// One thing under way; it counts until dropped.
#[derive(Debug)]
pub(crate) struct Permit {
    budget: Arc<Budget>,
    asker: IpAddr,
}

impl Budget {
    /// At most `total`, and at most `each` for one asker.
    pub(crate) fn new(total: usize, each: usize) -> Arc<Self> {
        Arc::new(Self { total, each, used: Mutex::default() })
    }

    /// One more for this asker, unless the budget is used up.
    pub(crate) fn take(self: &Arc<Self>, asker: IpAddr) -> Option<Permit> {
        let mut used = self.used();
        let mine = used.each.get(&asker).copied().unwrap_or_default();
        if used.total >= self.total || mine >= self.each {
            return None;
        }
        used.total += 1;
        used.each.insert(asker, mine + 1);
        drop(used);
        Some(Permit { budget: Arc::clone(self), asker })
    }

    fn used(&self) -> MutexGuard<'_, Used> {
        // The counts are whole after each change, whoever panicked meanwhile.
        self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut used = self.budget.used();
        used.total = used.total.saturating_sub(1);
        match used.each.get_mut(&self.asker) {
            Some(mine) if *mine > 1 => *mine -= 1,
            Some(_) | None => drop(used.each.remove(&self.asker)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_asker_cannot_use_up_what_all_share() {
        let budget = Budget::new(3, 2);
        let (a, b) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        let first = budget.take(a).unwrap();
        let _second = budget.take(a).unwrap();
        assert!(budget.take(a).is_none(), "two for one asker");
        let third = budget.take(b).unwrap();
        assert!(budget.take(b).is_none(), "three in all");
        drop(first);
        drop(third);
        assert!(budget.take(a).is_some());
        assert!(budget.used().each.len() <= 2, "who is done is forgotten");
    }
}
