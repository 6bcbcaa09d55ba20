//! What others are told of the reconciler: its view, and the chores that follow from it.
//!
//! Invariant: no revision is acknowledged before all that it takes away is gone from the kernel.

use std::sync::Arc;
use std::time::{Duration, Instant};

use model::Revision;
use nix::time::ClockId;
use plan::object::Ifname;
use plan::{Key, Place};

use super::Reconciler;
use crate::chores::Chores;
use crate::view::{Router, View};

/// How often a busy reconciler tells others what it knows, and the most of its time that this may take: what is told
/// grows with the network, and an attachment that comes meanwhile waits. Its time is what its thread had of a processor: on a
/// machine where others have them, what takes half a millisecond ends half a second later, and tunnels, names and the server
/// would hear of a change ten seconds after it.
pub(super) const EVERY: Duration = Duration::from_millis(20);
const SHARE: u32 = 20;

impl Reconciler {
    /// Tells it, where something is new and it is time.
    pub(super) fn publish(&mut self) {
        if !self.unpublished || self.last_published.elapsed() < self.publish_pause {
            return;
        }
        self.unpublished = false;
        self.last_published = Instant::now();
        let worked = worked();
        self.rested = self.book.rested_in().map(|ms| Instant::now() + Duration::from_millis(ms + 1));
        let view = self.view();
        let chores = Chores::of(
            &self.book,
            &view.routers,
            |network| self.lingering.contains_key(network),
            if self.stale || !self.clean { Revision::default() } else { self.book.revision },
        );
        self.published.send_replace(Arc::new(view));
        self.chores.send_replace(Arc::new(chores));
        self.publish_pause = pause_after(self::worked().saturating_sub(worked));
    }

    fn view(&self) -> View {
        let book = &self.book;
        let local = book.local_of(None);
        let routers = self
            .kernel
            .routers()
            .filter_map(|(id, netns)| {
                let network = book.catalog.networks.get(id)?;
                let slot = local.routers.get(id).copied()?;
                let tun = (Place::Router(id.clone()), Key::Link(Ifname::new(plan::TUN)));
                let tun = self.kernel.state().contains_key(&tun);
                let router = Router {
                    netns: netns.to_owned(),
                    generation: self.generations.get(id).copied().unwrap_or_default(),
                    address: book.catalog.router_address(id, &book.host),
                    transit: plan::transit::pair(slot).1,
                    mtu: plan::network_mtu(&book.catalog, &local, network),
                    tun: tun.then(|| self.tuns.get(id).copied().unwrap_or_default()),
                    converged: !self.unconverged.contains(&Place::Router(id.clone())),
                };
                Some((id.clone(), router))
            })
            .collect();
        let troubles = self.troubles.iter().chain(&self.refused).cloned().chain(book.troubles()).collect();
        let (tunnels, moves) = (self.tunnels.clone(), self.moves);
        View { routers, tunnels, troubles, moves, ..View::from_book(book) }
    }
}

/// Until it is told again, after telling it took so much work.
fn pause_after(work: Duration) -> Duration {
    EVERY.max(work * SHARE)
}

/// How much work the calling thread has done so far.
fn worked() -> Duration {
    // A kernel that does not count it leaves the pause at its least.
    ClockId::CLOCK_THREAD_CPUTIME_ID.now().map(Duration::from).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_takes_long_is_told_less_often_and_time_without_a_processor_does_not_count() {
        assert_eq!(pause_after(Duration::from_micros(400)), EVERY);
        assert_eq!(pause_after(Duration::from_millis(30)), Duration::from_millis(600));
        let before = worked();
        std::thread::park_timeout(Duration::from_millis(200));
        let after = worked();
        assert!(after < before + Duration::from_millis(100), "{before:?} {after:?}");
        assert!(worked() > after, "but work does");
    }
}
