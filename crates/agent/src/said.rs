//! What the server was told of endpoints a moment ago, and what it refused to hear.
//!
//! Invariant: what the server always refuses is told again and again, with pauses that grow, and slows nothing else down.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use model::{Endpoint, EndpointId};
use tokio::time::Instant;

use crate::chores::Chores;
use crate::link::Backoff;

/// How long to wait for the snapshot to show what was told before telling it again.
const ECHO: Duration = Duration::from_secs(10);

/// See the module. An endpoint is as it was told, or none if that it is gone was.
#[derive(Default)]
pub(crate) struct Said {
    told: BTreeMap<EndpointId, (Instant, Option<Arc<Endpoint>>)>,
    refused: BTreeMap<EndpointId, Refused>,
}

struct Refused {
    what: Option<Arc<Endpoint>>,
    again: Instant,
    backoff: Backoff,
}

impl Said {
    /// Forgets what is over.
    pub(crate) fn keep(&mut self, chores: &Chores) {
        self.told.retain(|_, (at, _)| at.elapsed() < ECHO);
        self.refused.retain(|id, _| chores.delete.contains(id) || chores.put.iter().any(|it| it.id == *id));
    }

    /// Whether to tell it now: it was neither told like this a moment ago nor refused like this.
    pub(crate) fn is_due(&self, id: &EndpointId, what: Option<&Arc<Endpoint>>, now: Instant) -> bool {
        let told = self.told.get(id).is_some_and(|(_, told)| told.as_ref() == what);
        let waits = |refused: &Refused| refused.what.as_ref() == what && now < refused.again;
        !told && !self.refused.get(id).is_some_and(waits)
    }

    /// It was told, and taken or refused.
    pub(crate) fn note(&mut self, id: &EndpointId, what: Option<&Arc<Endpoint>>, taken: bool, now: Instant) {
        let before = self.refused.remove(id).filter(|before| before.what.as_ref() == what);
        if taken {
            self.told.insert(id.clone(), (now, what.cloned()));
            return;
        }
        let mut backoff = before.map_or_else(Backoff::new, |before| before.backoff);
        let again = now + backoff.next();
        self.refused.insert(id.clone(), Refused { what: what.cloned(), again, backoff });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_refused_waits_ever_longer_and_what_is_new_does_not() {
        let (mut said, id, other) =
            (Said::default(), EndpointId::from_random([1; 8]), EndpointId::from_random([2; 8]));
        let mut now = Instant::now();
        let mut times = 0;
        let end = now + Duration::from_secs(600);
        while now < end {
            if said.is_due(&id, None, now) {
                said.note(&id, None, false, now);
                times += 1;
            }
            assert!(said.is_due(&other, None, now), "another one is told at once");
            now += Duration::from_millis(100);
        }
        assert!((20..60).contains(&times), "{times}");
        said.note(&id, None, true, now);
        assert!(!said.is_due(&id, None, now), "it was told a moment ago");
    }
}
