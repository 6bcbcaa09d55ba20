//! One IKE SA: a queue of tasks, one exchange each way.
//!
//! ```text
//!  initiator  Init ──────► Auth ──────┐            ┌──► Replaced ──┐   (a rekey's or reauthentication's
//!                                     ├──► Up ─────┼──► Redundant ─┤    successor has its children)
//!  responder  HalfOpen ───────────────┘            └──► Closing ───┴──► Dead
//! ```
//!
//! A [`Task`] is an exchange that we begin: it is built when the exchange before it is over, and processes its own
//! answer. What the peer begins is answered at once. What concerns more than one IKE SA (a successor, children that
//! move to it, a second SA with the same peer) is left to the endpoint as an [`Effect`].
//!
//! Invariant: nothing that was not authenticated by this SA's keys changes it after `IKE_SA_INIT`.

mod ages;
mod auth;
mod body;
mod child;
mod create;
mod early;
#[cfg(any(test, feature = "fuzzing"))]
mod forge;
mod inform;
mod message;
mod open;
mod rekey;
mod window;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

pub(crate) use body::Body;
pub(crate) use child::{Child, Gone, Stage};
pub(crate) use create::CreateChild;
pub(crate) use open::respond_init;
pub(crate) use rekey::RekeyIke;

use crate::auth::UnixSeconds;
use crate::chance;
use crate::config::{ChildId, Config, PeerConfig, PeerId};
use crate::crypto::{IkeKeys, Opener, Reassembly, Sealer};
use crate::error::Error;
use crate::event::{Event, Failure, Path, Transmit};
use crate::proposal::IkeSuite;
use crate::random::{Random, Seeded};
use crate::wire::{EspSpi, HashAlgorithm, IkeSpi, IkeSpis, NON_ESP_MARKER, Nonce, Notify};
use window::Window;

/// The port on which IKE has no marker before it (RFC 7296 §2.23).
pub(crate) const IKE_PORT: u16 = 500;
/// How long an SA that has an heir, or is one too many, waits for the peer to delete it.
const GIVE_UP: Duration = Duration::from_secs(30);
/// How long an SA that is no more still answers the request that ended it.
const REMEMBER: Duration = Duration::from_secs(10);
/// Sends of a last DELETE: a peer that is gone need not be asked for long.
const BYE_TRIES: u32 = 4;

/// What is there for all IKE SAs of an endpoint.
pub(crate) struct Shared {
    pub(crate) random: Seeded,
    /// How many workers receive.
    workers: u32,
    /// Counts what happens, where time is too coarse to tell the order.
    pub(crate) ordinal: u64,
    /// The SPIs that we receive on.
    pub(crate) esp_spis: BTreeSet<EspSpi>,
    pub(crate) transmits: VecDeque<Transmit>,
    pub(crate) events: VecDeque<Event>,
    pub(crate) effects: VecDeque<Effect>,
    pub(crate) gone: Vec<Gone>,
}

impl Shared {
    pub(crate) fn new(random: Seeded, workers: u32) -> Self {
        Self {
            random,
            workers: workers.max(1),
            ordinal: 0,
            esp_spis: BTreeSet::new(),
            transmits: VecDeque::new(),
            events: VecDeque::new(),
            effects: VecDeque::new(),
            gone: Vec::new(),
        }
    }

    pub(crate) fn next_ordinal(&mut self) -> u64 {
        self.ordinal += 1;
        self.ordinal
    }

    /// A new SPI of an IKE SA.
    pub(crate) fn ike_spi(&mut self) -> IkeSpi {
        IkeSpi(u64::from_be_bytes(self.random.bytes()).max(1))
    }

    /// A new SPI to receive ESP on, with the worker as its remainder. The first 256 are not for use (RFC 4303 §2.1).
    pub(crate) fn esp_spi(&mut self, worker: Option<u32>) -> EspSpi {
        let worker = worker.unwrap_or(0) % self.workers;
        loop {
            let any = u32::from_be_bytes(self.random.bytes());
            let Some(spi) = (any - any % self.workers).checked_add(worker).map(EspSpi) else { continue };
            if spi.0 > 255 && self.esp_spis.insert(spi) {
                return spi;
            }
        }
    }

    /// Sends a datagram, with the marker where ESP shares the port.
    pub(crate) fn send(&mut self, path: Path, datagram: &[u8]) {
        let marker: &[u8] = if path.local.port() == IKE_PORT { &[] } else { &NON_ESP_MARKER };
        self.transmits.push_back(Transmit { path, bytes: [marker, datagram].concat() });
    }
}

/// What an IKE SA sees of the world while it works.
pub(crate) struct Cx<'a> {
    pub(crate) now: Instant,
    pub(crate) unix: UnixSeconds,
    pub(crate) config: &'a Config,
    pub(crate) peers: &'a BTreeMap<PeerId, Arc<PeerConfig>>,
    pub(crate) shared: &'a mut Shared,
}

impl Cx<'_> {
    pub(crate) fn effect(&mut self, effect: Effect) {
        self.shared.effects.push_back(effect);
    }
}

/// What the endpoint has to do because of something that happened in one IKE SA.
pub(crate) enum Effect {
    /// This SA authenticated a peer.
    Established { spi: IkeSpi, initial_contact: bool },
    /// A rekey made this SA.
    Made(Box<Sa>),
    /// The children and tasks of one SA are another's now.
    Inherit { from: IkeSpi, to: IkeSpi },
    /// This SA is one too many; whoever made it deletes it.
    Redundant(IkeSpi),
    /// A child could not be made; try again not before `wait` is over.
    ChildFailed { peer: PeerId, child: ChildId, why: Failure, wait: Duration },
    /// The peer may have forgotten this SA; it said so without proof.
    Forgotten(IkeSpi),
}

/// Where an IKE SA stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Our `IKE_SA_INIT` is under way.
    Init,
    /// Our `IKE_AUTH` is under way.
    Auth,
    /// We answered `IKE_SA_INIT`.
    HalfOpen,
    /// Both sides are authenticated.
    Up,
    /// Another has its place and children; only its deletion is left to do.
    Replaced,
    /// One too many of two that were made at once.
    Redundant,
    /// Our deletion of it is under way.
    Closing(Failure),
    /// It is over, but the peer may not have our last answer yet.
    Gone,
    /// It is over.
    Dead(Failure),
}

/// An exchange that we begin.
#[derive(Debug)]
pub(crate) enum Task {
    /// `IKE_SA_INIT`.
    Open(Box<open::Open>),
    /// `IKE_AUTH`.
    Auth(Box<auth::Auth>),
    /// A new child, or one in the place of another.
    Create(Box<CreateChild>),
    /// An IKE SA in the place of this one.
    Rekey(Box<RekeyIke>),
    /// Children to delete, by the SPI that we receive on.
    Close(Vec<EspSpi>),
    /// This IKE SA to delete.
    Bye,
    /// Whether the peer lives.
    Probe,
    /// Our new address, to a peer that speaks MOBIKE.
    Move,
}

/// The keys at work.
struct Crypt {
    suite: IkeSuite,
    keys: IkeKeys,
    sealer: Sealer,
    opener: Opener,
}

/// What the two sides said in the first exchanges.
#[derive(Debug, Clone, Default)]
pub(crate) struct Facts {
    /// The peer reassembles fragments (RFC 7383 §2.3).
    pub(crate) fragments: bool,
    /// The peer speaks MOBIKE (RFC 4555 §3.1).
    pub(crate) mobike: bool,
    /// What signature hashes the peer verifies (RFC 7427 §4).
    pub(crate) hashes: Vec<HashAlgorithm>,
    /// We are behind a NAT.
    pub(crate) nat_here: bool,
    /// The peer is behind a NAT.
    pub(crate) nat_there: bool,
}

/// What AUTH is computed over, kept until then.
#[derive(Debug)]
struct Opening {
    request: Vec<u8>,
    response: Vec<u8>,
    ni: Nonce,
    nr: Nonce,
}

/// One IKE SA.
pub(crate) struct Sa {
    pub(crate) spis: IkeSpis,
    /// Whether we sent its first message: it decides flags and keys.
    pub(crate) opener: bool,
    /// Whether we sent the first message of the authenticated SA that it descends from.
    pub(crate) authenticated_by_us: bool,
    pub(crate) peer: Option<PeerId>,
    pub(crate) phase: Phase,
    pub(crate) path: Path,
    pub(crate) facts: Facts,
    pub(crate) children: BTreeMap<EspSpi, Child>,
    /// When it came about, among all that happened.
    pub(crate) born: u64,
    /// When it, or the SA that it descends from, was authenticated, among all that happened.
    pub(crate) established: u64,
    /// The lowest nonce of its making: it decides between two made at once (RFC 7296 §2.8.1).
    pub(crate) lowest: Vec<u8>,
    /// A rekey of ours and one of the peer's collided, the peer's made this SA, and it is not decided yet: the SA
    /// that both replace.
    pub(crate) undecided: Option<IkeSpi>,
    /// The SA that has this one's children.
    pub(crate) heir: Option<IkeSpi>,
    /// It is to replace this one, authentication and all, once it is up.
    pub(crate) replaces: Option<IkeSpi>,
    pub(crate) reauth_at: Option<Instant>,
    /// Why it is over, if it is.
    pub(crate) over: Option<Failure>,
    /// Our address and port as the peer last said it sees them, hashed (RFC 7296 §2.23); empty if it does not say.
    mapping: Option<Vec<u8>>,
    /// What the peer did wrong in its answer to our first messages: it is told when the SA is deleted.
    parting: Option<Notify>,
    /// Where the message that is being handled came from.
    seen_from: Option<Path>,
    crypt: Option<Crypt>,
    opening: Option<Opening>,
    /// The peer's `IKE_AUTH`, while nobody here knows who that is.
    early: Option<early::Early>,
    window: Window,
    reassembly: [Reassembly; 2],
    tasks: VecDeque<Task>,
    later: Vec<(Instant, Task)>,
    current: Option<Task>,
    last_heard: Instant,
    last_sent: Instant,
    rekey_at: Instant,
    expire_at: Instant,
    give_up_at: Option<Instant>,
    /// Why the first exchange will fail, if the refusal that came without proof was the peer's.
    hint: Option<Failure>,
}

impl Sa {
    fn new(spis: IkeSpis, opener: bool, path: Path, phase: Phase, cx: &mut Cx<'_>) -> Self {
        let (timing, now) = (&cx.config.timing, cx.now);
        let rekey_at = now + chance::sooner(&mut cx.shared.random, timing.ike_rekey, timing.jitter_tenths);
        Self {
            spis,
            opener,
            authenticated_by_us: opener,
            peer: None,
            phase,
            path,
            facts: Facts::default(),
            children: BTreeMap::new(),
            born: cx.shared.next_ordinal(),
            established: 0,
            lowest: Vec::new(),
            undecided: None,
            heir: None,
            replaces: None,
            reauth_at: None,
            over: None,
            mapping: None,
            parting: None,
            seen_from: None,
            crypt: None,
            opening: None,
            early: None,
            window: Window::default(),
            reassembly: [Reassembly::new(), Reassembly::new()],
            tasks: VecDeque::new(),
            later: Vec::new(),
            current: None,
            last_heard: now,
            last_sent: now,
            rekey_at,
            expire_at: now + timing.ike_rekey + timing.ike_rekey / 10 * timing.grace_tenths,
            give_up_at: None,
            hint: None,
        }
    }

    /// Our SPI: the name of the SA on our side.
    pub(crate) fn local_spi(&self) -> IkeSpi {
        if self.opener { self.spis.initiator } else { self.spis.responder }
    }

    /// The peer's SPI.
    pub(crate) fn remote_spi(&self) -> IkeSpi {
        if self.opener { self.spis.responder } else { self.spis.initiator }
    }

    /// Whether children can be made on it.
    pub(crate) fn is_up(&self) -> bool {
        self.phase == Phase::Up
    }

    /// Whether an exchange of ours is under way, or one waits.
    pub(crate) fn is_busy(&self) -> bool {
        self.current.is_some() || !self.tasks.is_empty() || !self.later.is_empty()
    }

    /// The suite, once agreed.
    pub(crate) fn suite(&self) -> Option<IkeSuite> {
        self.crypt.as_ref().map(|crypt| crypt.suite)
    }

    /// Puts the keys to work.
    fn set_keys(&mut self, suite: IkeSuite, keys: IkeKeys) -> Result<(), Error> {
        let (ours, theirs) =
            if self.opener { (&keys.sk_ei, &keys.sk_er) } else { (&keys.sk_er, &keys.sk_ei) };
        let (sealer, opener) = (Sealer::new(suite.encr, ours)?, Opener::new(suite.encr, theirs)?);
        self.crypt = Some(Crypt { suite, keys, sealer, opener });
        Ok(())
    }

    fn set_nonces(&mut self, ni: &Nonce, nr: &Nonce) {
        self.lowest = ni.as_bytes().min(nr.as_bytes()).to_vec();
    }

    fn config<'a>(&self, cx: &Cx<'a>) -> Option<&'a Arc<PeerConfig>> {
        self.peer.and_then(|peer| cx.peers.get(&peer))
    }

    /// All the tasks that are under way or wait.
    pub(crate) fn all_tasks(&self) -> impl Iterator<Item = &Task> {
        self.current.iter().chain(&self.tasks).chain(self.later.iter().map(|(_, task)| task))
    }

    /// Something to do when the exchange under way is over.
    pub(crate) fn push(&mut self, task: Task) {
        self.tasks.push_back(task);
    }

    /// Something to do not before `wait` is over.
    pub(crate) fn push_later(&mut self, wait: Duration, task: Task, now: Instant) {
        self.later.push((now + wait, task));
    }

    /// Begins the next exchange, if none is under way.
    pub(crate) fn begin_next(&mut self, cx: &mut Cx<'_>) {
        while self.current.is_none() {
            let next = match &self.phase {
                Phase::Init | Phase::Auth | Phase::HalfOpen | Phase::Up => Some(0),
                // On its way out it begins nothing but its end; the rest is its heir's.
                Phase::Replaced | Phase::Redundant | Phase::Closing(_) => {
                    self.tasks.iter().position(|task| matches!(task, Task::Bye))
                }
                Phase::Gone | Phase::Dead(_) => None,
            };
            let Some(task) = next.and_then(|at| self.tasks.remove(at)) else { return };
            if let Err(error) = self.build(task, cx) {
                self.die(Failure::from(&error), cx);
            }
        }
    }

    /// Builds a task's request and sends it. A task that has become needless does nothing.
    fn build(&mut self, task: Task, cx: &mut Cx<'_>) -> Result<(), Error> {
        match task {
            Task::Open(task) => self.build_open(task, cx),
            Task::Auth(task) => self.build_auth(task, cx),
            Task::Create(task) => self.build_create(task, cx),
            Task::Rekey(task) => self.build_rekey(task, cx),
            Task::Close(_) | Task::Bye | Task::Probe | Task::Move => self.build_inform(task, cx),
        }
    }

    /// The answer to the exchange under way.
    fn process(&mut self, body: Body, bytes: &[u8], cx: &mut Cx<'_>) -> Result<(), Error> {
        match self.current.take() {
            Some(Task::Open(task)) => self.process_open(task, body, bytes, cx),
            Some(Task::Auth(task)) => self.process_auth(*task, body, cx),
            Some(Task::Create(task)) => self.process_create(task, body, cx),
            Some(Task::Rekey(task)) => self.process_rekey(task, body, cx),
            Some(task @ (Task::Close(_) | Task::Bye | Task::Probe | Task::Move)) => {
                self.process_inform(task, &body, cx);
                Ok(())
            }
            None => Ok(()),
        }
    }

    /// Ends the SA here and now. The endpoint takes it away.
    pub(crate) fn die(&mut self, why: Failure, cx: &mut Cx<'_>) {
        self.drop_children(&why, cx);
        self.forget_current(cx);
        self.over.get_or_insert(why.clone());
        if !matches!(self.phase, Phase::Dead(_)) {
            self.phase = Phase::Dead(why);
        }
        self.tasks.clear();
        self.later.clear();
    }

    /// The exchange under way comes to nothing.
    fn forget_current(&mut self, cx: &mut Cx<'_>) {
        match self.current.take() {
            Some(Task::Create(task)) => create::forget(task.offer(), cx),
            Some(Task::Auth(task)) => create::forget(task.offer(), cx),
            Some(Task::Open(_) | Task::Rekey(_) | Task::Close(_) | Task::Bye | Task::Probe | Task::Move)
            | None => {}
        }
    }

    /// Ends the SA, and the peer is told.
    pub(crate) fn close(&mut self, why: Failure, cx: &mut Cx<'_>) {
        match self.phase {
            Phase::Up | Phase::Replaced | Phase::Redundant => {
                self.drop_children(&why, cx);
                self.over.get_or_insert(why.clone());
                self.phase = Phase::Closing(why);
                self.tasks.clear();
                self.later.clear();
                // Whatever is under way ends first: windows of one. It then finds nothing left to do.
                self.tasks.push_back(Task::Bye);
            }
            Phase::Init | Phase::Auth | Phase::HalfOpen => self.die(why, cx),
            Phase::Closing(_) | Phase::Gone | Phase::Dead(_) => {}
        }
    }

    /// It is over, but answers once more if the peer asks again.
    pub(super) fn linger(&mut self, why: Failure, cx: &mut Cx<'_>) {
        self.die(why, cx);
        self.phase = Phase::Gone;
        self.give_up_at = Some(cx.now + REMEMBER);
    }

    /// It has no more part in anything; the peer deletes it, or it ends by itself.
    pub(crate) fn retire(&mut self, phase: Phase, cx: &mut Cx<'_>) {
        self.phase = phase;
        self.give_up_at = Some(cx.now + GIVE_UP);
    }

    fn drop_children(&mut self, why: &Failure, cx: &mut Cx<'_>) {
        let linger = if *why == Failure::Replaced { cx.config.timing.linger } else { Duration::ZERO };
        for spi in self.children.keys().copied().collect::<Vec<_>>() {
            self.drop_child(spi, why.clone(), linger, cx);
        }
    }

    /// Takes a child away; the owner is told after `linger`.
    pub(crate) fn drop_child(&mut self, spi: EspSpi, why: Failure, linger: Duration, cx: &mut Cx<'_>) {
        let Some(child) = self.children.remove(&spi) else { return };
        match self.peer {
            Some(peer) if child.told => cx.shared.gone.push(Gone {
                at: cx.now + linger,
                peer,
                slot: child.slot,
                inbound: child.inbound,
                outbound: child.outbound,
                why,
            }),
            Some(_) | None => {
                cx.shared.esp_spis.remove(&spi);
            }
        }
    }

    /// The SA that the peer made in this one's place is no more.
    pub(crate) fn forget_rival(&mut self, rival: IkeSpi) {
        if let Some(Task::Rekey(ours)) = &mut self.current
            && ours.collision.as_ref().is_some_and(|(spi, _)| *spi == rival)
        {
            ours.collision = None;
        }
    }

    /// When the peer last sent something that only it can send.
    pub(crate) fn last_heard(&self) -> Instant {
        self.last_heard
    }

    /// The peer sent something that only it can send.
    pub(crate) fn heard(&mut self, now: Instant) {
        self.last_heard = self.last_heard.max(now);
    }

    /// The peer is, or we are, at another address from now on.
    pub(crate) fn set_path(&mut self, path: Path, cx: &mut Cx<'_>) {
        if self.path == path {
            return;
        }
        self.path = path;
        if let (Phase::Up, Some(peer)) = (&self.phase, self.peer) {
            cx.shared.events.push_back(Event::PeerMoved { peer, path });
        }
    }

    /// We send from another address from now on: the peer hears of it at once.
    pub(crate) fn set_local(&mut self, local: SocketAddr, cx: &mut Cx<'_>) {
        self.take_path(Path { local, remote: self.path.remote }, cx);
    }

    /// We send by another path from now on: the peer hears of it at once.
    pub(crate) fn take_path(&mut self, path: Path, cx: &mut Cx<'_>) {
        if self.path == path {
            return;
        }
        self.set_path(path, cx);
        if self.is_up() {
            self.push(if self.facts.mobike { Task::Move } else { Task::Probe });
        }
        self.hurry(cx);
    }

    /// What another SA leaves to this one.
    pub(crate) fn inherit(&mut self, from: &mut Sa) {
        self.children.append(&mut from.children);
        let wanted = |task: &Task| match task {
            Task::Create(_) | Task::Close(_) => true,
            Task::Open(_) | Task::Auth(_) | Task::Rekey(_) | Task::Bye | Task::Probe | Task::Move => false,
        };
        let (left, rest) = from.tasks.drain(..).partition(|task| wanted(task));
        from.tasks = rest;
        self.tasks.extend::<VecDeque<Task>>(left);
        self.later.extend(from.later.extract_if(.., |(_, task)| wanted(task)));
        self.undecided = None;
        from.heir = Some(self.local_spi());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_spi_leaves_its_worker_as_remainder_and_is_never_reserved_or_given_twice() {
        for workers in [1, 2, 3, 7, 64] {
            let mut shared = Shared::new(Seeded::new(&[7; 32]), workers);
            let mut all = BTreeSet::new();
            for worker in (0..200).map(|number| number % 70) {
                let spi = shared.esp_spi(Some(worker));
                assert_eq!(spi.0 % workers, worker % workers);
                assert!(spi.0 > 255 && all.insert(spi));
            }
            assert_eq!(shared.esp_spi(None).0 % workers, 0, "what is for no worker is for the first");
        }
    }
}
