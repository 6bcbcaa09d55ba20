//! The reconciler: one thread that makes the kernel what the plan says, and the only one that changes it.
//!
//! It waits for three things: requests (by [`crate::Control`]), the kernel's own events, and its deadlines. After each
//! it compares what the kernel shows with what should be and applies the difference until none is left. A step that
//! the kernel refuses is told, kept as a trouble, and tried again with growing pauses.
//!
//! Invariant: only this thread applies steps, and only steps that `plan::diff` gave.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, TryRecvError};
use std::time::{Duration, Instant};

use linux::{Kernel, Woken};
use model::api::{ApiError, ErrorCode};
use model::{Change, EndpointId, NetworkId, Object, Watch};
use plan::{Bridge, End, Key, Place, Scope, State, Step};
use tokio::sync::watch;

use crate::book::{Book, unwritten};
use crate::chores::Chores;
use crate::control::{Command, Refusal};
use crate::counts::Counts;
use crate::doctor::Books;
use crate::view::View;

mod moved;
mod publish;
mod requests;

use moved::Moved;

/// How long a router stays after its last endpoint.
pub(crate) const LINGER: Duration = Duration::from_secs(60);
/// And one of its leaves: a host may have now one endpoint more than its other bridges take, and now one less.
const LEAF_LINGER: Duration = Duration::from_secs(10);
/// Diffs that may follow each other before the rest is left to the next wake-up.
const ROUNDS: usize = 6;
/// For how long a start waits with tunnels until the server has said whether its ledger counts: a copy of another host's
/// would take tunnels over from it.
const HOLD: Duration = Duration::from_secs(1);
const RETRY: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(10));
const TROUBLES_KEPT: usize = 20;

/// The reconciler's thread.
pub(crate) struct Reconciler {
    kernel: Kernel,
    book: Book,
    requests: Receiver<Command>,
    published: watch::Sender<Arc<View>>,
    chores: watch::Sender<Arc<Chores>>,
    counts: Arc<Counts>,
    /// Networks without endpoints whose routers stay until then.
    lingering: BTreeMap<NetworkId, Instant>,
    /// Bridges without endpoints that stay until then.
    spare: BTreeMap<(NetworkId, Bridge), Instant>,
    generations: BTreeMap<NetworkId, u64>,
    /// The same for their TUN devices.
    tuns: BTreeMap<NetworkId, u64>,
    tunnels: Arc<BTreeMap<plan::Far, plan::Tunnel>>,
    unconverged: BTreeSet<Place>,
    /// What was to go, when all was last compared, is gone.
    clean: bool,
    /// How often an address of this host came or went.
    moves: u64,
    /// What the kernel refuses now.
    refused: Vec<String>,
    /// What else went wrong lately, newest last.
    troubles: VecDeque<String>,
    /// What the kernel should show, as of the last look at the books; attachments are kept up to date in it.
    wanted: State,
    /// Something changed for which `wanted` has to be worked out anew.
    stale: bool,
    /// Something changed that others should know.
    unpublished: bool,
    last_published: Instant,
    publish_pause: Duration,
    /// When an address has rested: a block may be spare by then.
    rested: Option<Instant>,
    retry: Option<(Instant, Duration)>,
    /// No tunnels before this.
    held: Option<Instant>,
    moved: Moved,
}

impl Reconciler {
    pub(crate) fn new(
        kernel: Kernel,
        book: Book,
        requests: Receiver<Command>,
        published: watch::Sender<Arc<View>>,
        chores: watch::Sender<Arc<Chores>>,
        counts: Arc<Counts>,
    ) -> Self {
        Self {
            counts,
            kernel,
            book,
            requests,
            published,
            chores,
            lingering: BTreeMap::new(),
            spare: BTreeMap::new(),
            generations: BTreeMap::new(),
            tuns: BTreeMap::new(),
            tunnels: Arc::default(),
            unconverged: BTreeSet::new(),
            clean: false,
            moves: 0,
            refused: Vec::new(),
            troubles: VecDeque::new(),
            wanted: State::new(),
            stale: true,
            unpublished: true,
            last_published: Instant::now(),
            publish_pause: publish::EVERY,
            rested: None,
            retry: None,
            held: Some(Instant::now() + HOLD),
            moved: Moved::default(),
        }
    }

    /// Runs until told to stop, or until the kernel cannot be listened to any more.
    pub(crate) fn run(mut self) -> Result<(), linux::Error> {
        self.adopt()?;
        loop {
            loop {
                match self.requests.try_recv() {
                    Ok(Command::Stop) | Err(TryRecvError::Disconnected) => return Ok(()),
                    Ok(command) => self.handle(command),
                    Err(TryRecvError::Empty) => break,
                }
            }
            self.drop_lingered();
            if self.stale {
                self.converge_all(None);
            }
            self.announce_elsewhere();
            self.publish();
            match self.kernel.wait(self.deadline())? {
                Woken::Kernel => self.look(&BTreeSet::new()),
                Woken::Waker => {}
                Woken::Timeout => {}
            }
            self.unpublished |= self.rested.is_some_and(|at| Instant::now() >= at);
            if self.retry.is_some_and(|(at, _)| Instant::now() >= at) {
                self.stale = true;
            }
            if self.held.is_some_and(|at| Instant::now() >= at) {
                self.settled();
            }
        }
    }

    /// Nothing is waited for any more before tunnels are made.
    fn settled(&mut self) {
        self.stale |= self.held.take().is_some();
    }

    /// A router that is there at start and has no endpoint lingers, as if its last one had just gone.
    fn adopt(&mut self) -> Result<(), linux::Error> {
        let observed = self.kernel.observe(&State::new())?;
        let until = Instant::now() + LINGER;
        for (place, key) in observed.keys() {
            if let (Place::Router(network), Key::Netns) = (place, key) {
                self.lingering.insert(network.clone(), until);
            }
        }
        Ok(())
    }

    fn handle(&mut self, command: Command) {
        // Whoever asked may have gone away; then there is nobody to answer, and what was done stays done.
        match command {
            Command::Reserve { network, wish, reply } => {
                let counts = self.book.counts().map_err(Refusal::from);
                drop(reply.send(counts.and_then(|()| self.book.reserve(&network, wish))));
            }
            Command::Unreserve { network, address, reply } => {
                drop(reply.send(self.book.unreserve(&network, address)));
                self.unpublished = true;
            }
            Command::Create { network, foreign, address, mac, reply } => {
                let counts = self.book.counts().map_err(Refusal::from);
                drop(reply.send(counts.and_then(|()| self.book.create(&network, &foreign, address, mac))));
                self.unpublished = true;
            }
            Command::Join { foreign, sandbox, reply } => drop(reply.send(self.join(&foreign, sandbox))),
            Command::Leave { foreign, reply } => drop(reply.send(self.leave(&foreign))),
            Command::Delete { foreign, reply } => {
                let outcome = match self.book.by_foreign(&foreign).cloned() {
                    Some(id) => self.forget(&id, self.is_engines(&id)),
                    None => Ok(()),
                };
                drop(reply.send(outcome));
            }
            Command::Publish { foreign, ports, reply } => {
                drop(reply.send(self.publish_ports(&foreign, ports)));
            }
            Command::Describe { foreign, description, reply } => {
                let outcome = match self.book.by_foreign(&foreign).cloned() {
                    Some(id) => self.book.describe(&id, *description).map_err(Refusal::from),
                    None => Err(unknown(&foreign).into()),
                };
                self.unpublished = true;
                drop(reply.send(outcome));
            }
            Command::Attach { id, request, foreign, retain, reply } => {
                drop(reply.send(self.attach(&id, *request, foreign, retain)));
            }
            Command::Detach { id, reply } => {
                let outcome = match self.book.record(&id) {
                    Some(record) if record.foreign.is_some() => {
                        let message = format!("endpoint {id} belongs to Docker; stop its container instead");
                        Err(ApiError::new(ErrorCode::Forbidden, message).into())
                    }
                    Some(_) => self.forget(&id, false),
                    None => {
                        let message = format!("endpoint {id} does not exist on this host");
                        Err(ApiError::new(ErrorCode::NotFound, message).into())
                    }
                };
                drop(reply.send(outcome));
            }
            Command::List { reply } => drop(reply.send(Ok(self.book.list()))),
            Command::Reservations { reply } => drop(reply.send(Ok(self.book.reservations()))),
            Command::Consent { claim, reply } => {
                drop(reply.send(self.book.consent(&claim).map_err(|e| unwritten(e).into())));
            }
            Command::Leaving { reply } => {
                drop(reply.send(Ok(self.book.leaving().cloned().collect())));
            }
            Command::Books { reply } => {
                let routers = self.routers_wanted();
                drop(reply.send(Ok(Box::new(Books::of(&self.book, routers)))));
            }
            Command::Leased { block } => self.keep(Object::Block(block)),
            Command::Claimed { claim } => {
                self.note_claim(claim.network.clone(), claim.address);
                self.keep(Object::Claim(claim));
            }
            Command::LetGo { key, reply } => {
                drop(reply.send(self.book.let_go(&key).map_err(|e| unwritten(e).into())));
            }
            Command::Certified { identity, reply } => {
                drop(reply.send(self.book.certified(&identity).map_err(|e| unwritten(e).into())));
            }
            Command::Begin { reply } => drop(reply.send(Ok(self.book.begin()))),
            Command::Begun { to, reply } => {
                self.book.begun(&to);
                drop(reply.send(Ok(())));
            }
            Command::Settled => self.settled(),
            Command::Counts { reply } => drop(reply.send(self.book.counts().map_err(Refusal::from))),
            Command::Takes { reply } => drop(reply.send(self.book.takes().map_err(Refusal::from))),
            Command::Copied { why, reply } => {
                self.stale = true;
                drop(reply.send(self.book.set_copied(why).map_err(|e| unwritten(e).into())));
            }
            Command::Watch(message) => {
                self.note(&message);
                self.stale |= matters_to_the_kernel(&message);
                self.unpublished = true;
                if let Err(error) = self.book.watch(*message) {
                    self.trouble(error.to_string());
                }
            }
            Command::Underlay(candidates) => {
                self.stale |= self.book.candidates != candidates;
                self.book.candidates = candidates;
            }
            Command::EngineFirewall => self.open_forwarding(),
            Command::Stop => {}
        }
    }

    // ---- towards the kernel ----

    /// Takes in what happened in the kernel, and mends what it did to us. `ours` is what we have just done ourselves.
    fn look(&mut self, ours: &BTreeSet<(Place, Key)>) {
        if let Err(error) = self.kernel.observe(&self.wanted) {
            self.try_later();
            return self.trouble(error.to_string());
        }
        if self.kernel.take_moved() {
            self.moves += 1;
            self.unpublished = true;
        }
        match self.kernel.take_changes() {
            Scope::Everything => self.stale = true,
            Scope::Only(mut names) => {
                names.retain(|name| !ours.contains(name));
                // A lost device may be made in another way than it was at first: that is worked out anew.
                if names.iter().any(|(_, key)| matches!(key, Key::Netns | Key::Link(_))) {
                    self.stale = true;
                } else if !names.is_empty() {
                    self.converge(&Scope::Only(names));
                }
            }
        }
    }

    /// Works out anew what should be, and makes it so; making the device of attachment `except` is left to its caller.
    fn converge_all(&mut self, except: Option<&EndpointId>) {
        self.stale = false;
        self.unpublished = true;
        if let Err(error) = self.kernel.observe(&self.wanted) {
            self.try_later();
            return self.trouble(error.to_string());
        }
        let observed = self.kernel.state();
        for id in self.book.orphans(|id| port_is_there(observed, &self.book, id)) {
            tracing::info!(endpoint = %id, "its namespace is gone: detached");
            let network = self.book.record(&id).map(|record| record.endpoint.network.clone());
            match self.book.forget(&id, false) {
                Ok(()) => self.linger(network),
                Err(error) => self.troubles.push_back(error.message),
            }
        }
        let tunnels = match self.held {
            None => plan::tunnels(&self.book.drawn(), &self.book.local_of(None)),
            Some(_) => BTreeMap::new(),
        };
        if *self.tunnels != tunnels {
            self.tunnels = Arc::new(tunnels);
        }
        let had_routers = self.has_routers();
        self.wanted = self.work_out(except);
        if !had_routers && self.has_routers() {
            self.open_forwarding();
        }
        self.converge(&Scope::Everything);
        // What this did is not to be looked at again.
        if self.kernel.observe(&self.wanted).is_ok() {
            self.kernel.take_changes();
        }
    }

    /// Docker's engine sets the host to forward nothing but its own; packets of our routers have to pass.
    fn open_forwarding(&mut self) {
        match linux::forward::ensure(&format!("{}+", plan::object::HOST_DEVICE_PREFIX)) {
            Ok(forwarding) => tracing::debug!(?forwarding, "the host's own firewall"),
            Err(error) => self.trouble(format!("containers may not reach the outside: {error}")),
        }
    }

    fn converge(&mut self, scope: &Scope) {
        let begun = Instant::now();
        let done = self.converge_within(scope);
        self.counts.reconciled(begun.elapsed(), done);
    }

    /// Diffs and applies until nothing is left or nothing helps; whether nothing is left.
    fn converge_within(&mut self, scope: &Scope) -> bool {
        let mut refused: Vec<String> = Vec::new();
        for _ in 0..ROUNDS {
            let steps = match self.difference(scope) {
                Ok(steps) => steps,
                Err(error) => {
                    self.try_later();
                    self.trouble(error);
                    return false;
                }
            };
            if *scope == Scope::Everything {
                self.unconverged = steps.iter().map(|step| place_of(step).clone()).collect();
                self.clean = !steps.iter().any(|step| matches!(step, Step::Remove(..) | Step::Change(..)));
            }
            if steps.is_empty() {
                if *scope == Scope::Everything {
                    self.retry = None;
                    self.refused(Vec::new());
                }
                return true;
            }
            refused.clear();
            for step in &steps {
                tracing::debug!(?step, "apply");
                match self.kernel.apply(step) {
                    Ok(()) => match step {
                        Step::Add(Place::Router(network), Key::Netns, _) => {
                            *self.generations.entry(network.clone()).or_default() += 1;
                        }
                        Step::Add(Place::Router(network), Key::Link(name), _)
                            if name.as_str() == plan::TUN =>
                        {
                            *self.tuns.entry(network.clone()).or_default() += 1;
                        }
                        Step::Add(..) | Step::Change(..) | Step::Remove(..) => {}
                    },
                    Err(error) if self.goes_without(step, &error) => {}
                    Err(error) => refused.push(error.to_string()),
                }
            }
            if refused.len() == steps.len() {
                break;
            }
        }
        self.try_later();
        self.refused(refused);
        false
    }

    /// Whether the kernel takes no programs for packets, as it has just shown: then routers go without, until the next start.
    fn goes_without(&mut self, step: &Step, error: &linux::StepError) -> bool {
        let (Step::Add(_, Key::Program(_), _) | Step::Change(_, Key::Program(_), ..)) = step else {
            return false;
        };
        if error.source.is_passing() {
            return false;
        }
        if self.book.no_shortcut.is_none() {
            let why = format!("the kernel takes no such programs: {}", error.source);
            tracing::warn!(
                "packets between containers and other hosts take no shortcut past the kernel's stack: {why}"
            );
            self.book.no_shortcut = Some(why);
        }
        self.wanted.retain(|(_, key), _| !matches!(key, Key::Program(_)));
        // One that it took before it refused another goes.
        self.stale = true;
        self.unpublished = true;
        true
    }

    fn try_later(&mut self) {
        let pause = self.retry.map_or(RETRY.0, |(_, pause)| (pause * 2).min(RETRY.1));
        self.retry = Some((Instant::now() + pause, pause));
    }

    fn has_routers(&self) -> bool {
        self.wanted.keys().any(|(place, _)| *place != Place::Host)
    }

    fn difference(&mut self, scope: &Scope) -> Result<Vec<Step>, String> {
        let observed = self.kernel.observe(&self.wanted).map_err(|error| error.to_string())?;
        Ok(plan::diff(observed, &self.wanted, scope))
    }

    /// Tells what the kernel refuses now; what it refused before is not told again.
    fn refused(&mut self, now: Vec<String>) {
        for why in now.iter().filter(|why| !self.refused.contains(why)) {
            tracing::warn!("{why}");
        }
        self.unpublished |= self.refused != now;
        self.refused = now;
    }

    fn work_out(&mut self, except: Option<&EndpointId>) -> State {
        if let Err(error) = self.book.forget_gone_networks() {
            self.trouble(error.to_string());
        }
        let routers = self.routers_wanted();
        for network in &routers {
            if self.book.catalog.networks.contains_key(network)
                && let Err(error) = self.book.slot(network)
            {
                self.trouble(error.message);
            }
        }
        let observed = self.kernel.state();
        let mut local = self.book.local(&routers, |id| port_is_there(observed, &self.book, id));
        // One that is there already stays: its container's end would go with it.
        if let Some(id) = except.filter(|id| !port_is_there(observed, &self.book, id)) {
            local.attachments.remove(id);
        }
        plan::desired(&self.book.drawn(), &local)
    }

    /// The networks that are to have a router here.
    fn routers_wanted(&self) -> BTreeSet<NetworkId> {
        self.book
            .records()
            .map(|record| record.endpoint.network.clone())
            .chain(self.lingering.keys().cloned())
            .chain(self.book.catalog.gateway_of(&self.book.host).cloned())
            .collect()
    }

    /// The names of everything an attachment has, or would have.
    fn names_of(&self, id: &EndpointId) -> BTreeSet<(Place, Key)> {
        let local = self.book.local_of(Some((id, End::Handed)));
        plan::desired_attachment(&self.book.catalog, &local, id).into_keys().collect()
    }

    fn trouble(&mut self, why: String) {
        if self.troubles.back() != Some(&why) {
            tracing::warn!("{why}");
            self.troubles.push_back(why);
            while self.troubles.len() > TROUBLES_KEPT {
                self.troubles.pop_front();
            }
            self.unpublished = true;
        }
    }

    // ---- time ----

    /// The router of a network that has no endpoint any more stays for a while.
    fn linger(&mut self, network: Option<NetworkId>) {
        if let Some(network) = network.filter(|network| !self.book.has_endpoints(network)) {
            self.lingering.insert(network, Instant::now() + LINGER);
        }
    }

    fn drop_lingered(&mut self) {
        let now = Instant::now();
        let before = self.lingering.len();
        self.lingering.retain(|network, until| now < *until && !self.book.has_endpoints(network));
        self.stale |= self.lingering.len() != before;

        let spare = self.book.spare_leaves();
        self.spare.retain(|leaf, _| spare.contains(leaf));
        for leaf in spare {
            if *self.spare.entry(leaf.clone()).or_insert(now + LEAF_LINGER) <= now {
                self.spare.remove(&leaf);
                self.book.forget_leaf(&leaf);
                self.stale = true;
            }
        }
    }

    fn deadline(&self) -> Option<Duration> {
        let publish = self.unpublished.then(|| self.last_published + self.publish_pause);
        let retry = self.retry.map(|(at, _)| at);
        let linger = self.lingering.values().chain(self.spare.values()).min().copied();
        let next = [publish, retry, linger, self.rested, self.held].into_iter().flatten().min()?;
        Some(next.saturating_duration_since(Instant::now()))
    }
}

/// Whether the plan can come out otherwise: it does not look at endpoints of other hosts, and has this host's from the
/// ledger.
fn matters_to_the_kernel(message: &Watch) -> bool {
    let of_an_endpoint = |change: &Change| {
        matches!(change, Change::Put(Object::Endpoint(_)) | Change::Delete(model::Key::Endpoint(_)))
    };
    match message {
        Watch::Snapshot { .. } => true,
        Watch::Delta { changes, .. } => !changes.iter().all(of_an_endpoint),
        Watch::Servers { .. } | Watch::Heartbeat { .. } | Watch::Prove => false,
    }
}

fn port_is_there(observed: &State, book: &Book, id: &EndpointId) -> bool {
    book.record(id).is_some_and(|record| {
        let place = Place::Router(record.endpoint.network.clone());
        observed.contains_key(&(place, Key::Link(plan::port_name(id))))
    })
}

fn place_of(step: &Step) -> &Place {
    let (Step::Remove(place, _) | Step::Add(place, ..) | Step::Change(place, ..)) = step;
    place
}

fn unknown(foreign: &str) -> ApiError {
    let message = format!("endpoint {foreign} is not known on this host; the engine must create it first");
    ApiError::new(ErrorCode::NotFound, message)
}
