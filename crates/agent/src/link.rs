//! Two tasks that keep server and agent in step: one follows the watch stream, the other tells what happened here.
//!
//! Both try again for ever, with pauses that grow and jitter, so that a server that comes back is not stormed.
//!
//! Invariant: nothing here keeps state that a restart would lose; chores are computed from ledger and snapshot.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use model::agent_api::Connection;
use model::api::{ApiError, ErrorCode, Held, HeldAnswer, HostReport};
use model::{Candidate, Key, Watch};
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

use crate::chores::{Chores, Heard};
use crate::control::{Command, Control, Lessor};
use crate::counts::Counts;
use crate::ledger::Identity;
use crate::said::Said;
use crate::server::Server;
use crate::{View, incarnation, now_millis, random};

/// How long a claim or block must have been idle before it is given back: an attach may be on its way to use it.
const IDLE: Duration = Duration::from_secs(5);
/// How often to say how far this host is where nobody is known to wait for it.
const HEARD: Duration = Duration::from_secs(30);

/// Pauses that double from a quarter of a second to half a minute, each cut by up to a half.
pub(crate) struct Backoff(u32);

impl Backoff {
    pub(crate) fn new() -> Self {
        Self(0)
    }

    pub(crate) fn next(&mut self) -> Duration {
        let full = Duration::from_millis(250 << self.0.min(7)).min(Duration::from_secs(30));
        self.0 += 1;
        let [byte] = random::<1>();
        full.mul_f64(0.5 + f64::from(byte) / 512.0)
    }
}

/// What the two tasks work with.
pub(crate) struct Link {
    pub(crate) server: Server,
    pub(crate) control: Control,
    pub(crate) connection: watch::Sender<Connection>,
    pub(crate) chores: watch::Receiver<Arc<Chores>>,
    pub(crate) report: watch::Receiver<HostReport>,
    pub(crate) counts: Arc<Counts>,
}

impl Link {
    /// Runs both tasks, and begins again with a new connection when the host's addresses change.
    pub(crate) async fn keep(
        self,
        identity: watch::Receiver<Identity>,
        mut candidates: watch::Receiver<Vec<Candidate>>,
    ) {
        let Self { server, control, connection, chores, report, counts } = self;
        // What the server knows of this host is not of this start, or of an old backup: it is told again.
        let doubted = Notify::new();
        loop {
            let told = (chores.clone(), report.clone());
            tokio::select! {
                () = follow(&server, &control, &connection, &counts, &doubted) => return,
                () = tell(&server, &control, told, connection.subscribe(), &doubted) => return,
                changed = candidates.changed() => if changed.is_err() { return },
            }
            let identity = identity.borrow().clone();
            if let Err(error) = server.reconnect(&identity) {
                tracing::warn!("{error}; the old connection to the server is kept");
            }
        }
    }
}

/// Follows the watch stream and hands its messages to the reconciler.
async fn follow(
    server: &Server,
    control: &Control,
    state: &watch::Sender<Connection>,
    counts: &Counts,
    doubted: &Notify,
) {
    let mut backoff = Backoff::new();
    // How many servers were tried in vain.
    let mut turned = 0;
    'opened: loop {
        let view = control.view();
        let resume = view.epoch.as_ref().map(|epoch| (epoch, view.revision));
        let announced = incarnation::announce(server, control).await;
        control.send(Command::Settled);
        let mut outcome = match announced {
            Ok(()) => server.watch(resume).await,
            // There is nothing to come back to: whoever has the right to this host's name goes on with it.
            Err(error) if error.code == ErrorCode::Copied => {
                down(state, &error);
                return std::future::pending().await;
            }
            Err(error) => Err(error),
        };
        // Another life of the ledger counts: whether this one is a copy is said when it is announced anew.
        if matches!(&outcome, Err(error) if error.code == ErrorCode::Copied) {
            server.set_incarnation(None);
            continue;
        }
        if matches!(&outcome, Err(error) if error.code == ErrorCode::Compacted) {
            outcome = server.watch(None).await;
        }
        // The store was restored: what it knows of us is old, and what we know is not to be lost by taking that in.
        if matches!(&outcome, Err(error) if error.code == ErrorCode::Unreported) {
            outcome = match server.held(&held(&control.view())).await {
                Ok(HeldAnswer { conflicts }) => {
                    for conflict in conflicts {
                        tracing::warn!("after a restore of the server: {conflict}");
                    }
                    doubted.notify_one();
                    server.watch(None).await
                }
                Err(error) => Err(error),
            };
        }
        let error = match outcome {
            Ok(mut stream) => loop {
                match stream.next().await {
                    Ok(message) => {
                        counts.watch_messages.fetch_add(1, Ordering::Relaxed);
                        counts.heard.store(now_millis(), Ordering::Relaxed);
                        state.send_if_modified(|connection| {
                            let was_down = matches!(connection, Connection::Down { .. });
                            if was_down {
                                tracing::info!(server = %server.url(), "connected");
                                *connection = Connection::Up { since: now_millis() };
                            }
                            was_down
                        });
                        backoff = Backoff::new();
                        turned = 0;
                        match &message {
                            Watch::Servers { urls } => server.learn(urls),
                            Watch::Prove => match incarnation::prove(server, control).await {
                                // The server ends the watch of the life before.
                                Ok(()) => continue 'opened,
                                Err(error) => tracing::warn!(
                                    "showing the server that this agent lives: {}",
                                    error.message
                                ),
                            },
                            Watch::Snapshot { .. } | Watch::Delta { .. } | Watch::Heartbeat { .. } => {}
                        }
                        control.send(Command::Watch(Box::new(message)));
                    }
                    Err(error) => break error,
                }
            },
            Err(error) => error,
        };
        down(state, &error);
        // Whatever one server says, the next may say otherwise; only all of them together are worth a longer pause.
        server.turn();
        turned += 1;
        let pause = if turned < server.count() { Backoff::new().next() } else { backoff.next() };
        tokio::time::sleep(pause.max(wished(&error))).await;
    }
}

/// How long the server wishes to be left alone; a minute at most, whatever it says.
fn wished(error: &ApiError) -> Duration {
    Duration::from_secs(error.retry_after.unwrap_or_default().min(60))
}

/// What this host holds.
fn held(view: &View) -> Held {
    let catalog = &view.catalog;
    let mut blocks: Vec<_> =
        catalog.blocks.values().filter(|block| block.host == view.host).cloned().collect();
    blocks.sort_by_key(|block| block.leased);
    let claims = catalog.claims.values().filter(|claim| claim.host == view.host).cloned();
    Held { blocks, claims: claims.collect() }
}

fn down(state: &watch::Sender<Connection>, error: &ApiError) {
    state.send_if_modified(|connection| {
        let since = match connection {
            Connection::Down { since, why } if *why == error.message => return false,
            Connection::Down { since, .. } => *since,
            Connection::Up { .. } => now_millis(),
        };
        tracing::warn!("{}; what runs goes on, changes wait", error.message);
        *connection = Connection::Down { since, why: error.message.clone() };
        true
    });
}

/// Tells the server what happened here.
async fn tell(
    server: &Server,
    control: &Control,
    (mut chores, mut report): (watch::Receiver<Arc<Chores>>, watch::Receiver<HostReport>),
    mut connection: watch::Receiver<Connection>,
    doubted: &Notify,
) {
    let mut teller = Teller {
        server: server.clone(),
        control: control.clone(),
        said: Said::default(),
        idle: BTreeMap::new(),
        heard: None,
    };
    let mut backoff = Backoff::new();
    report.mark_changed();
    loop {
        // While the watch is down there is nobody to tell; it comes up by itself.
        if connection.wait_for(|state| matches!(state, Connection::Up { .. })).await.is_err() {
            return;
        }
        let now = chores.borrow_and_update().clone();
        let mut outcome = Ok(());
        if report.has_changed().unwrap_or(false) {
            let said = report.borrow_and_update().clone();
            outcome = teller.server.report(&said).await;
            if outcome.is_err() {
                report.mark_changed();
            }
        }
        if outcome.is_ok() {
            outcome = teller.work(&now).await;
        }
        if let Err(error) = outcome {
            let request = error.request.as_deref();
            tracing::warn!(request, "telling the server: {}", error.message);
            tokio::time::sleep(backoff.next().max(wished(&error))).await;
            continue;
        }
        backoff = Backoff::new();
        let again = if now.is_empty() { Duration::from_secs(3600) } else { Duration::from_secs(1) };
        tokio::select! {
            changed = chores.changed() => if changed.is_err() { return },
            changed = report.changed() => if changed.is_err() { return },
            () = doubted.notified() => report.mark_changed(),
            () = tokio::time::sleep(again) => {}
        }
    }
}

struct Teller {
    server: Server,
    control: Control,
    said: Said,
    /// Since when something has been idle, by its name.
    idle: BTreeMap<String, Instant>,
    /// Up to where the server knows that withdrawn blocks are gone here, and since when.
    heard: Option<(Instant, Heard)>,
}

impl Teller {
    async fn work(&mut self, chores: &Chores) -> Result<(), ApiError> {
        self.said.keep(chores);
        // What the server refuses is in nobody else's way.
        let mut first = Ok(());
        for endpoint in &chores.put {
            if self.said.is_due(&endpoint.id, Some(endpoint), Instant::now()) {
                let done = refusal_is_kept(self.server.put_endpoint(endpoint).await, &mut first)?;
                self.said.note(&endpoint.id, Some(endpoint), done, Instant::now());
            }
        }
        for id in &chores.delete {
            if self.said.is_due(id, None, Instant::now()) {
                let outcome = missing_is_fine(self.server.delete_endpoint(id).await);
                let done = refusal_is_kept(outcome, &mut first)?;
                self.said.note(id, None, done, Instant::now());
            }
        }
        for claim in &chores.consent {
            let consents = self.control.consent(claim).await?;
            refusal_is_kept(missing_is_fine(self.server.consent(claim, consents).await), &mut first)?;
        }
        if let Some(heard) = chores.heard.as_ref().filter(|heard| self.is_news(heard)) {
            let outcome = self.server.heard(&heard.epoch, heard.applied).await;
            if refusal_is_kept(outcome, &mut first)? {
                self.heard = Some((Instant::now(), heard.clone()));
            }
        }
        for (network, held) in &chores.lease {
            match self.server.lease(network.clone(), *held).await {
                Ok(block) => self.control.send(Command::Leased { block }),
                // What is free is enough for now; an attach that finds none says so.
                Err(error) if error.code == ErrorCode::Exhausted && *held > 0 => {}
                Err(error) => drop(refusal_is_kept(Err(error), &mut first)?),
            }
        }
        let mut still_idle = BTreeMap::new();
        for claim in &chores.release {
            let name = format!("{} {}", claim.network, claim.address);
            if self.has_been_idle(name, &mut still_idle) {
                let key = Key::Claim(claim.network.clone(), claim.address);
                let outcome = self.control.give_back(key, self.server.release(claim)).await;
                refusal_is_kept(missing_is_fine(outcome), &mut first)?;
            }
        }
        for block in &chores.give_back {
            let name = format!("{} {}", block.network, block.cidr);
            if self.has_been_idle(name, &mut still_idle) {
                let key = Key::Block(block.network.clone(), block.cidr);
                let outcome = self.control.give_back(key, self.server.give_back(block)).await;
                refusal_is_kept(missing_is_fine(outcome), &mut first)?;
            }
        }
        self.idle = still_idle;
        first
    }

    /// Whether the server should hear how far this host is: at once where it may wait for it, else now and then.
    fn is_news(&self, heard: &Heard) -> bool {
        self.heard.as_ref().is_none_or(|(at, known)| {
            known.epoch != heard.epoch
                || heard.withdrawal > known.applied
                || (heard.applied > known.applied && at.elapsed() >= HEARD)
        })
    }

    fn has_been_idle(&self, name: String, still_idle: &mut BTreeMap<String, Instant>) -> bool {
        let since = self.idle.get(&name).copied().unwrap_or_else(Instant::now);
        still_idle.insert(name, since);
        since.elapsed() >= IDLE
    }
}

/// Whether it was done. A server that cannot be asked is an error; a refusal is kept, if it is the first, and told later.
fn refusal_is_kept(
    outcome: Result<(), ApiError>,
    first: &mut Result<(), ApiError>,
) -> Result<bool, ApiError> {
    match outcome {
        Err(error)
            if matches!(
                error.code,
                ErrorCode::Unavailable | ErrorCode::Unauthenticated | ErrorCode::TooMany
            ) =>
        {
            Err(error)
        }
        Err(error) => {
            if first.is_ok() {
                *first = Err(error);
            }
            Ok(false)
        }
        Ok(()) => Ok(true),
    }
}

fn missing_is_fine(outcome: Result<(), ApiError>) -> Result<(), ApiError> {
    match outcome {
        Err(error) if error.code == ErrorCode::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_half_a_minute_and_differ() {
        let mut backoff = Backoff::new();
        let pauses: Vec<Duration> = (0..12).map(|_| backoff.next()).collect();
        assert!(pauses[0] <= Duration::from_millis(250));
        assert!(pauses[11] >= Duration::from_secs(15) && pauses[11] <= Duration::from_secs(30));
    }
}
