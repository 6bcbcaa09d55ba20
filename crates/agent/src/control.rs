//! The handle by which the agent's asynchronous parts (socket, Docker, reporter) ask the reconciler for something.
//!
//! Each request is one message to the reconciler's thread and one answer. The reconciler never waits for the server:
//! where it lacks a block or a claim it says so, and this handle asks the server and tries again.
//!
//! Invariant: when a request that changes something is answered, the ledger holds it on disk.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use model::agent_api::{AttachRequest, Attached};
use model::api::{ApiError, ErrorCode};
use model::{Endpoint, EndpointId, Mac, Name, NetworkId, PublishedPort};
use tokio::sync::{oneshot, watch};

use crate::View;
use crate::doctor::Books;
use crate::ledger::Identity;

/// Asks the reconciler. Cheap to clone.
#[derive(Clone)]
pub struct Control {
    sender: std::sync::mpsc::Sender<Command>,
    wake: Arc<dyn Fn() + Send + Sync>,
    view: watch::Receiver<Arc<View>>,
    lessor: Arc<dyn Lessor>,
    /// Held by whoever gets addresses from the server, until they are used, or gives some back.
    turn: Arc<tokio::sync::Mutex<()>>,
}

/// Who leases blocks and grants claims: the server. Apart, so that control needs no HTTP.
pub trait Lessor: Send + Sync {
    /// Gets one more block of the network for this host, which has `held` of them.
    fn lease(&self, network: NetworkId, held: usize) -> BoxFuture<Result<model::Block, ApiError>>;
    /// Gives a block or claim back.
    fn give_back(&self, held: model::Object) -> BoxFuture<Result<(), ApiError>>;
    /// Gets one address for an endpoint: the given one, or any where no block is free; or one for the `router` of a host
    /// that got no block.
    fn claim(
        &self,
        network: NetworkId,
        address: Option<IpAddr>,
        endpoint: EndpointId,
        router: bool,
    ) -> BoxFuture<Result<model::Claim, ApiError>>;
    /// Gets the address that is retained for a container, or a new one that will be.
    fn retained(
        &self,
        network: NetworkId,
        owner: String,
        endpoint: EndpointId,
    ) -> BoxFuture<Result<model::Claim, ApiError>>;
}

/// A future in a box.
pub type BoxFuture<T> = std::pin::Pin<Box<dyn Future<Output = T> + Send>>;

/// What Docker has to tell a container about its interface.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Handed {
    /// The device to be moved into the container, in the host's namespace.
    pub ifname: String,
    /// The default gateway, unless the network is internal.
    pub gateway: Option<IpAddr>,
    /// Destinations on link besides the network itself.
    pub on_link: Vec<ipnet::IpNet>,
}

/// What is learned of a container after it was attached.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Description {
    /// Its name.
    pub name: Option<Name>,
    /// Its stack.
    pub stack: Option<Name>,
    /// Its service.
    pub service: Option<Name>,
    /// Its other names on this network.
    pub aliases: Vec<Name>,
    /// Its id in its engine.
    pub container: Option<String>,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Whether names may answer with it.
    pub healthy: bool,
}

/// An endpoint with what the ledger keeps about it for this host alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LocalEndpoint {
    /// The endpoint.
    pub endpoint: Endpoint,
    /// What its engine calls it (libnetwork's endpoint id).
    pub foreign: Option<String>,
    /// The namespace of its container, once joined.
    pub sandbox: Option<PathBuf>,
}

/// Requests to the reconciler's thread.
pub(crate) enum Command {
    /// Keep an address that no endpoint has yet.
    Reserve { network: NetworkId, wish: Option<IpAddr>, reply: Reply<IpAddr> },
    /// Give such an address back.
    Unreserve { network: NetworkId, address: IpAddr, reply: Reply<()> },
    /// Make an endpoint of a reserved address.
    Create { network: NetworkId, foreign: String, address: IpAddr, mac: Option<Mac>, reply: Reply<Endpoint> },
    /// Make its device.
    Join { foreign: String, sandbox: PathBuf, reply: Reply<Handed> },
    /// Take its device away.
    Leave { foreign: String, reply: Reply<()> },
    /// Forget it; an engine's address is a reserved one again.
    Delete { foreign: String, reply: Reply<()> },
    /// Publish exactly these ports of it.
    Publish { foreign: String, ports: Vec<PublishedPort>, reply: Reply<Vec<PublishedPort>> },
    /// Tell what was learned of it.
    Describe { foreign: String, description: Box<Description>, reply: Reply<()> },
    /// Attach a namespace; for a container's label, whose endpoint is known as `foreign`. With `retain`, at the address that is
    /// retained for it, if its label asks for that.
    Attach {
        id: EndpointId,
        request: Box<AttachRequest>,
        foreign: Option<String>,
        retain: bool,
        reply: Reply<Attached>,
    },
    /// Detach it.
    Detach { id: EndpointId, reply: Reply<()> },
    /// Everything the ledger holds of endpoints.
    List { reply: Reply<Vec<LocalEndpoint>> },
    /// Addresses kept for no endpoint.
    Reservations { reply: Reply<Vec<(NetworkId, IpAddr)>> },
    /// The server leased a block.
    Leased { block: model::Block },
    /// The server granted a claim.
    Claimed { claim: model::Claim },
    /// Let go of an address that another host asks for; whether nobody has it.
    Consent { claim: model::Claim, reply: Reply<bool> },
    /// What is on its way back to the server.
    Leaving { reply: Reply<Vec<model::Object>> },
    /// What is written down, for whoever checks it.
    Books { reply: Reply<Box<Books>> },
    /// Let go of a block or claim that is to be given back; whether it is idle still.
    LetGo { key: model::Key, reply: Reply<bool> },
    /// This host has a new certificate.
    Certified { identity: Box<Identity>, reply: Reply<()> },
    /// Another life of the ledger begins: what to tell the server, and whether it is of this start; or what to go by where the
    /// disk takes nothing.
    Begin { reply: Reply<Beginning> },
    /// The server took it.
    Begun { to: model::Incarnation, reply: Reply<()> },
    /// The server was asked whether the ledger counts, and answered or could not be reached.
    Settled,
    /// Whether the ledger counts.
    Counts { reply: Reply<()> },
    /// Whether the ledger counts and takes what is to be written.
    Takes { reply: Reply<()> },
    /// The ledger does not count any more.
    Copied { why: String, reply: Reply<()> },
    /// A message of the watch stream.
    Watch(Box<model::Watch>),
    /// The host's own addresses or settings changed.
    Underlay(Vec<model::Candidate>),
    /// Docker's engine has started, or has another bridge: it may have changed the host's firewall.
    EngineFirewall,
    /// End the thread; the kernel stays as it is.
    Stop,
}

/// See [`Command::Begin`].
pub(crate) type Beginning = Result<(model::Step, bool), Option<model::Incarnation>>;

/// How the reconciler answers.
pub(crate) type Reply<T> = oneshot::Sender<Result<T, Refusal>>;

/// Why not.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// A block is needed: this host has so many.
    NeedBlock { network: NetworkId, held: usize },
    /// A claim is needed: the address is in none of this host's blocks.
    NeedClaim { network: NetworkId, address: IpAddr },
    /// What is retained for a container is not held here, if anything is.
    NeedRetained { network: NetworkId, owner: String },
    /// Anything else.
    Error(ApiError),
}

/// Why there is no address.
#[derive(Debug)]
enum Lacking {
    /// The one that is retained cannot be had.
    Retained(ApiError),
    /// Anything else.
    Error(ApiError),
}

impl From<ApiError> for Lacking {
    fn from(error: ApiError) -> Self {
        Self::Error(error)
    }
}

impl From<Lacking> for ApiError {
    fn from(lacking: Lacking) -> Self {
        let (Lacking::Retained(error) | Lacking::Error(error)) = lacking;
        error
    }
}

impl From<ApiError> for Refusal {
    fn from(error: ApiError) -> Self {
        Self::Error(error)
    }
}

impl Control {
    pub(crate) fn new(
        sender: std::sync::mpsc::Sender<Command>,
        wake: Arc<dyn Fn() + Send + Sync>,
        view: watch::Receiver<Arc<View>>,
        lessor: Arc<dyn Lessor>,
    ) -> Self {
        Self { sender, wake, view, lessor, turn: Arc::default() }
    }

    /// What the agent knows now.
    pub fn view(&self) -> Arc<View> {
        self.view.borrow().clone()
    }

    /// Tells of each change of the view.
    pub fn views(&self) -> watch::Receiver<Arc<View>> {
        self.view.clone()
    }

    /// Keeps an address of the network for an endpoint to come: `wish`, or one of this host's blocks.
    pub async fn reserve(&self, network: &NetworkId, wish: Option<IpAddr>) -> Result<IpAddr, ApiError> {
        // A claim is made for an endpoint; one that has no id yet gets a random one.
        let id = crate::random_endpoint_id();
        Ok(self
            .with_addresses(&id, |reply| Command::Reserve { network: network.clone(), wish, reply })
            .await?)
    }

    /// Keeps this host's new certificate.
    pub(crate) async fn certified(&self, identity: &Identity) -> Result<(), ApiError> {
        self.ask(|reply| Command::Certified { identity: Box::new(identity.clone()), reply }).await
    }

    /// Begins another life of the ledger: see [`Command::Begin`].
    pub(crate) async fn begin(&self) -> Result<Beginning, ApiError> {
        self.ask(|reply| Command::Begin { reply }).await
    }

    /// The server took it.
    pub(crate) async fn begun(&self, to: &model::Incarnation) -> Result<(), ApiError> {
        self.ask(|reply| Command::Begun { to: to.clone(), reply }).await
    }

    /// Whether the ledger counts; if not, why.
    pub(crate) async fn counts(&self) -> Result<(), ApiError> {
        self.ask(|reply| Command::Counts { reply }).await
    }

    /// Whether the ledger counts and takes what is to be written; if not, why, and what to do.
    pub(crate) async fn takes(&self) -> Result<(), ApiError> {
        self.ask(|reply| Command::Takes { reply }).await
    }

    /// The ledger does not count any more: nothing is attached from now on, and no other host is spoken to.
    pub(crate) async fn copied(&self, why: String) -> Result<(), ApiError> {
        self.ask(|reply| Command::Copied { why, reply }).await
    }

    /// Gives a reserved address back. One that an endpoint has, or nobody, stays as it is.
    pub async fn unreserve(&self, network: &NetworkId, address: IpAddr) -> Result<(), ApiError> {
        self.ask(|reply| Command::Unreserve { network: network.clone(), address, reply }).await
    }

    /// Makes an endpoint of a reserved address for an engine that calls it `foreign`.
    pub async fn create(
        &self,
        network: &NetworkId,
        foreign: &str,
        address: IpAddr,
        mac: Option<Mac>,
    ) -> Result<Endpoint, ApiError> {
        self.ask(|reply| Command::Create {
            network: network.clone(),
            foreign: foreign.to_owned(),
            address,
            mac,
            reply,
        })
        .await
    }

    /// Makes the endpoint's device; the engine moves it into `sandbox`.
    pub async fn join(&self, foreign: &str, sandbox: PathBuf) -> Result<Handed, ApiError> {
        self.ask(|reply| Command::Join { foreign: foreign.to_owned(), sandbox, reply }).await
    }

    /// Takes the endpoint's device away. No such endpoint is fine.
    pub async fn leave(&self, foreign: &str) -> Result<(), ApiError> {
        self.ask(|reply| Command::Leave { foreign: foreign.to_owned(), reply }).await
    }

    /// Forgets the endpoint; one of an engine's networks leaves its address reserved until [`Control::unreserve`]. No such
    /// endpoint is fine.
    pub async fn delete(&self, foreign: &str) -> Result<(), ApiError> {
        self.ask(|reply| Command::Delete { foreign: foreign.to_owned(), reply }).await
    }

    /// Publishes exactly these ports of the endpoint; a host port of 0 is chosen. Answers what was published.
    pub async fn publish(
        &self,
        foreign: &str,
        ports: Vec<PublishedPort>,
    ) -> Result<Vec<PublishedPort>, ApiError> {
        self.ask(|reply| Command::Publish { foreign: foreign.to_owned(), ports, reply }).await
    }

    /// Tells what was learned of the endpoint's container.
    pub async fn describe(&self, foreign: &str, description: Description) -> Result<(), ApiError> {
        let description = Box::new(description);
        self.ask(|reply| Command::Describe { foreign: foreign.to_owned(), description, reply }).await
    }

    /// Attaches a network namespace.
    pub async fn attach(&self, request: AttachRequest) -> Result<Attached, ApiError> {
        self.attach_as(None, request).await
    }

    /// Attaches the namespace of a container that asks for it by its label. [`Control::delete`] takes it away.
    pub async fn plug(&self, foreign: &str, request: AttachRequest) -> Result<Attached, ApiError> {
        self.attach_as(Some(foreign.to_owned()), request).await
    }

    async fn attach_as(&self, foreign: Option<String>, request: AttachRequest) -> Result<Attached, ApiError> {
        let id = crate::random_endpoint_id();
        let retain = AtomicBool::new(true);
        let command = |reply| Command::Attach {
            id: id.clone(),
            request: Box::new(request.clone()),
            foreign: foreign.clone(),
            retain: retain.load(Ordering::Relaxed),
            reply,
        };
        match self.with_addresses(&id, command).await {
            // What runs is worth more than where: it gets another address, as any container.
            Err(Lacking::Retained(why)) => {
                let name = request.name.as_ref().map_or("", |name| name.as_str());
                tracing::warn!("container {name} gets an address that is not retained: {}", why.message);
                retain.store(false, Ordering::Relaxed);
                Ok(self.with_addresses(&id, command).await?)
            }
            outcome => Ok(outcome?),
        }
    }

    /// Detaches an endpoint that was attached by [`Control::attach`].
    pub async fn detach(&self, id: &EndpointId) -> Result<(), ApiError> {
        self.ask(|reply| Command::Detach { id: id.clone(), reply }).await
    }

    /// This host's endpoints.
    pub async fn list(&self) -> Result<Vec<LocalEndpoint>, ApiError> {
        self.ask(|reply| Command::List { reply }).await
    }

    /// What is written down, for whoever checks it.
    pub async fn books(&self) -> Result<Books, ApiError> {
        self.ask(|reply| Command::Books { reply }).await.map(|books| *books)
    }

    /// Lets go of an address that another host asks for, if nobody has it here.
    pub(crate) async fn consent(&self, claim: &model::Claim) -> Result<bool, ApiError> {
        self.ask(|reply| Command::Consent { claim: claim.clone(), reply }).await
    }

    /// Addresses that are kept and belong to no endpoint.
    pub async fn reservations(&self) -> Result<Vec<(NetworkId, IpAddr)>, ApiError> {
        self.ask(|reply| Command::Reservations { reply }).await
    }

    /// Gives a block or claim back with `give`, if it is idle: an attach that began meanwhile keeps it, and one that begins
    /// now waits for the outcome and then asks for another.
    pub(crate) async fn give_back(
        &self,
        key: model::Key,
        give: impl Future<Output = Result<(), ApiError>>,
    ) -> Result<(), ApiError> {
        let _turn = self.turn.lock().await;
        if self.ask(|reply| Command::LetGo { key, reply }).await? { give.await } else { Ok(()) }
    }

    pub(crate) fn send(&self, command: Command) {
        // A reconciler that has ended takes nothing more; whoever waits for an answer learns it from its reply.
        drop(self.sender.send(command));
        (self.wake)();
    }

    /// Asks, and gets from the server what the reconciler says it lacks, a few times at most: others take addresses too.
    async fn with_addresses<T>(
        &self,
        id: &EndpointId,
        command: impl Fn(Reply<T>) -> Command,
    ) -> Result<T, Lacking> {
        let mut turn = None;
        for _ in 0..5 {
            match self.once(&command).await? {
                Ok(value) => return Ok(value),
                // What is missing may be there by then.
                Err(Refusal::NeedBlock { .. } | Refusal::NeedClaim { .. } | Refusal::NeedRetained { .. })
                    if turn.is_none() =>
                {
                    turn = Some(self.turn.lock().await);
                }
                Err(Refusal::NeedBlock { network, held }) => {
                    // What is on its way back counts as held at the server.
                    for object in self.going_back().await? {
                        self.lessor.give_back(object).await?;
                    }
                    match self.lessor.lease(network.clone(), held).await {
                        Ok(block) => self.send(Command::Leased { block }),
                        Err(error) if error.code == ErrorCode::Exhausted => {
                            self.singles(&network, held, id).await?;
                        }
                        Err(error) => return Err(error.into()),
                    }
                }
                Err(Refusal::NeedRetained { network, owner }) => {
                    let key = |claim: &model::Claim| {
                        claim.retained.as_ref().is_some_and(|retained| retained.owner == owner)
                    };
                    for object in self.going_back().await? {
                        if matches!(&object, model::Object::Claim(claim) if key(claim)) {
                            self.lessor.give_back(object).await.map_err(Lacking::Retained)?;
                        }
                    }
                    let claim = self.lessor.retained(network, owner, id.clone()).await;
                    self.send(Command::Claimed { claim: claim.map_err(Lacking::Retained)? });
                }
                Err(Refusal::NeedClaim { network, address }) => {
                    let claim = self.lessor.claim(network, Some(address), id.clone(), false).await?;
                    self.send(Command::Claimed { claim });
                }
                Err(Refusal::Error(error)) => return Err(error.into()),
            }
        }
        let message = "addresses were taken by others faster than they could be leased; try again";
        Err(ApiError::new(ErrorCode::Unavailable, message).into())
    }

    /// What is on its way back to the server. What goes to another host goes by consent alone.
    async fn going_back(&self) -> Result<Vec<model::Object>, ApiError> {
        let mut all = self.ask(|reply| Command::Leaving { reply }).await?;
        all.retain(|object| !matches!(object, model::Object::Claim(claim) if claim.wanted.is_some()));
        Ok(all)
    }

    /// Where no block is free: one address for the endpoint, and one for the router if this host has no block at all.
    async fn singles(&self, network: &NetworkId, held: usize, id: &EndpointId) -> Result<(), ApiError> {
        let view = self.view();
        if held == 0 && view.catalog.router_address(network, &view.host).is_none() {
            let own = crate::random_endpoint_id();
            let claim = self.lessor.claim(network.clone(), None, own, true).await.map_err(used_up)?;
            self.send(Command::Claimed { claim });
        }
        let claim = self.lessor.claim(network.clone(), None, id.clone(), false).await.map_err(used_up)?;
        self.send(Command::Claimed { claim });
        Ok(())
    }

    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, ApiError> {
        match self.once(command).await? {
            Ok(value) => Ok(value),
            Err(Refusal::Error(error)) => Err(error),
            Err(Refusal::NeedBlock { .. } | Refusal::NeedClaim { .. } | Refusal::NeedRetained { .. }) => {
                Err(ApiError::new(
                    ErrorCode::Internal,
                    "the reconciler asked for addresses where none are needed",
                ))
            }
        }
    }

    async fn once<T>(
        &self,
        command: impl FnOnce(Reply<T>) -> Command,
    ) -> Result<Result<T, Refusal>, ApiError> {
        let (reply, answer) = oneshot::channel();
        self.send(command(reply));
        answer.await.map_err(|_| ApiError::new(ErrorCode::Unavailable, "the agent is stopping; try again"))
    }
}

/// What the server says where neither a block nor an address is left, and what can be done on this host.
fn used_up(error: ApiError) -> ApiError {
    if error.code != ErrorCode::Exhausted {
        return error;
    }
    let message = format!(
        "{}; or remove containers of it that are not needed: what a host's containers leave, its new ones get",
        error.message
    );
    ApiError { message, ..error }
}

#[cfg(test)]
#[path = "control_tests.rs"]
pub(crate) mod tests;
