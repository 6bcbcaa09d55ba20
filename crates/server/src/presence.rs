//! Which agents are there, and since when the others are silent.
//!
//! Who is there is known in memory alone. So that a server that starts again can say since when a host is silent, and other
//! servers that share the store who is there, each writes what it saw to one key of its own: when a host goes, and every two
//! minutes. What a server that was killed saw last is no older.
//!
//! Invariant: no request waits for this, and nothing but what people are shown depends on it.

use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use model::{EnvironmentId, HostId, Incarnation, UnixMillis};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::Instant;

use crate::app::{App, now, put};
use crate::keys::Keys;
use crate::state::Environment;
use crate::store::Txn;

/// How often what is seen is written, if nobody goes.
const EVERY: Duration = Duration::from_mins(2);
/// Who goes at the same time is written together.
const TOGETHER: Duration = Duration::from_secs(1);
/// For how long what another server saw counts, in milliseconds: it may have been killed.
const FRESH: u64 = 250_000;

/// What a server wrote of whom it saw.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Noted {
    /// When it wrote that.
    pub(crate) at: UnixMillis,
    /// Who was there.
    pub(crate) here: BTreeSet<HostId>,
    /// When it last heard of those who were not.
    pub(crate) gone: BTreeMap<HostId, UnixMillis>,
}

/// Which agents are there.
#[derive(Debug)]
pub(crate) struct Presence {
    hosts: Mutex<BTreeMap<HostId, Known>>,
    /// Grows when an agent comes or goes.
    moves: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Known {
    seen: Seen,
    /// Its open watches, by the incarnation that opened them.
    open: BTreeMap<Option<Incarnation>, usize>,
    /// The incarnation that went last, or has not begun to watch: nobody here goes by it.
    gone: Option<Incarnation>,
}

/// What is known of an agent's connection.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Seen {
    /// How many watches it has open.
    pub(crate) watches: usize,
    /// When it was last heard of.
    pub(crate) at: UnixMillis,
    /// When the certificate runs out that it showed last.
    pub(crate) certificate_expires: Option<UnixMillis>,
}

/// A watch that is open.
#[derive(Debug)]
pub(crate) struct Watching(Arc<Presence>, HostId, Option<Incarnation>);

impl Default for Presence {
    fn default() -> Self {
        Self { hosts: Mutex::default(), moves: watch::Sender::new(0) }
    }
}

impl Presence {
    pub(crate) fn of(&self, host: &HostId) -> Option<Seen> {
        self.lock().get(host).map(|known| known.seen)
    }

    /// The agent said something, on a connection for which it showed a certificate that runs out then.
    pub(crate) fn saw(&self, host: &HostId, certificate_expires: Option<UnixMillis>) {
        let mut all = self.lock();
        let seen = &mut all.entry(host.clone()).or_default().seen;
        seen.at = now();
        // An old connection may still be in use beside a new one.
        seen.certificate_expires = seen.certificate_expires.max(certificate_expires);
    }

    /// The agent watches, until the answer is dropped.
    pub(crate) fn watch(self: &Arc<Self>, host: &HostId, incarnation: Option<Incarnation>) -> Watching {
        let mut all = self.lock();
        let known = all.entry(host.clone()).or_default();
        known.seen.watches += 1;
        *known.open.entry(incarnation.clone()).or_default() += 1;
        known.gone = None;
        drop(all);
        self.moved();
        Watching(self.clone(), host.clone(), incarnation)
    }

    /// Whether who goes by that incarnation has a watch open here, or, if this server is not the only one or has not seen it
    /// go, may have one elsewhere.
    pub(crate) fn may_live(&self, host: &HostId, incarnation: &Incarnation, shared: bool) -> bool {
        let all = self.lock();
        let Some(known) = all.get(host) else { return true };
        known.open.contains_key(&Some(incarnation.clone()))
            || shared
            || known.gone.as_ref() != Some(incarnation)
    }

    /// The incarnation was taken, and watches nothing yet.
    pub(crate) fn begins(&self, host: &HostId, incarnation: &Incarnation) {
        self.lock().entry(host.clone()).or_default().gone = Some(incarnation.clone());
    }

    /// Tells when an agent comes or goes.
    pub(crate) fn subscribe(&self) -> watch::Receiver<u64> {
        self.moves.subscribe()
    }

    pub(crate) fn forget(&self, host: &HostId) {
        self.lock().remove(host);
    }

    fn moved(&self) {
        self.moves.send_modify(|moves| *moves += 1);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<HostId, Known>> {
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Watching {
    /// The connection takes what is sent, so the agent is there.
    pub(crate) fn saw(&self) {
        if let Some(known) = self.0.lock().get_mut(&self.1) {
            known.seen.at = now();
        }
    }
}

impl Drop for Watching {
    fn drop(&mut self) {
        if let Some(known) = self.0.lock().get_mut(&self.1) {
            known.seen.watches = known.seen.watches.saturating_sub(1);
            known.seen.at = now();
            if let Some(count) = known.open.get_mut(&self.2) {
                *count -= 1;
                if *count == 0 {
                    known.open.remove(&self.2);
                    known.gone.clone_from(&self.2);
                }
            }
        }
        self.0.moved();
    }
}

/// Whether a host's agent is there, and when it was last heard of: by this server, or by another that wrote it down.
pub(crate) fn of(app: &App, env: &Environment, host: &HostId) -> (bool, Option<UnixMillis>) {
    let seen = app.presence.of(host);
    let noted = env.noted.values().filter_map(|noted| {
        noted.here.contains(host).then_some(noted.at).or_else(|| noted.gone.get(host).copied())
    });
    let at = noted.chain(seen.map(|seen| seen.at)).max();
    // Who went from here is not elsewhere by what was written before.
    let since = seen.map_or(0, |seen| seen.at).max(now().saturating_sub(FRESH));
    let elsewhere = || {
        let mut others = env.noted.iter().filter(|(server, _)| **server != app.name);
        others.any(|(_, noted)| noted.at >= since && noted.here.contains(host))
    };
    (seen.is_some_and(|seen| seen.watches > 0) || elsewhere(), at)
}

/// Writes down who is there, for as long as the server runs.
pub(crate) async fn keep(app: &App, environment: &EnvironmentId) -> Infallible {
    let mut moves = app.presence.subscribe();
    loop {
        let due = Instant::now() + EVERY;
        while tokio::time::timeout_at(due, moves.changed()).await.is_ok() {
            if app.shares_store || has_news(app, environment) {
                tokio::time::sleep(TOGETHER).await;
                moves.mark_unchanged();
                break;
            }
        }
        note(app, environment).await;
    }
}

/// Whether somebody went who is written down as there, or not at all.
fn has_news(app: &App, environment: &EnvironmentId) -> bool {
    let state = app.shared.read();
    let Some(env) = state.environments.get(environment) else { return false };
    let noted = env.noted.get(&app.name);
    let all = app.presence.lock();
    all.iter().any(|(host, known)| {
        known.seen.watches == 0 && noted.is_none_or(|noted| noted.gone.get(host) != Some(&known.seen.at))
    })
}

/// Writes down who is there. If that fails, there is another time.
pub(crate) async fn note(app: &App, environment: &EnvironmentId) {
    let Some(noted) = seen(app, environment) else { return };
    let place = Keys(environment).presence(&app.name);
    let Ok(op) = put(place, &noted) else { return };
    if let Err(error) = app.store.txn(Txn::new(vec![], vec![op])).await {
        tracing::debug!(%error, "who is there was not written down");
    }
}

/// Who is there; `None` if there is nothing new to tell.
fn seen(app: &App, environment: &EnvironmentId) -> Option<Noted> {
    let state = app.shared.read();
    let env = state.environments.get(environment)?;
    let before = env.noted.get(&app.name).cloned().unwrap_or_default();
    let mut now = Noted { at: now(), here: BTreeSet::new(), gone: BTreeMap::new() };
    let all = app.presence.lock();
    for host in env.catalog.hosts.keys() {
        match all.get(host).map(|known| known.seen) {
            Some(seen) if seen.watches > 0 => drop(now.here.insert(host.clone())),
            Some(seen) => drop(now.gone.insert(host.clone(), seen.at)),
            None => {
                let at = before.here.contains(host).then_some(before.at);
                if let Some(at) = at.or_else(|| before.gone.get(host).copied()) {
                    now.gone.insert(host.clone(), at);
                }
            }
        }
    }
    (!now.here.is_empty() || now.here != before.here || now.gone != before.gone).then_some(now)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_goes_by_an_incarnation_may_live_until_it_was_seen_to_go() {
        let presence = Arc::new(Presence::default());
        let host = HostId::from_random([1; 8]);
        let (one, two): (Incarnation, Incarnation) =
            ("1-0000000000000001".parse().unwrap(), "2-0000000000000002".parse().unwrap());
        assert!(presence.may_live(&host, &one, false), "this server has just started");
        let first = presence.watch(&host, Some(one.clone()));
        let again = presence.watch(&host, Some(one.clone()));
        drop(first);
        assert!(presence.may_live(&host, &one, false));
        drop(again);
        assert!(!presence.may_live(&host, &one, false));
        assert!(presence.may_live(&host, &one, true), "another server may see it");
        presence.begins(&host, &two);
        assert!(!presence.may_live(&host, &two, false), "it has not begun");
        assert!(presence.may_live(&host, &one, false));
    }
}
