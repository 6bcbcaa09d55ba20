//! The order in which addresses come from the server and go back to it.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use model::{Block, HostId, Key, Revision};

use super::*;
use crate::names::fixtures;

/// A reconciler with at most one block, and a server that leases one.
#[derive(Default)]
struct World {
    has_block: AtomicBool,
    /// How often it said that it lacks a block.
    lacked: AtomicUsize,
    /// The server has taken the block back.
    given: AtomicBool,
    /// A block was leased before that.
    leased_too_soon: AtomicBool,
}

fn block() -> Block {
    let (network, host) = (fixtures::network(), HostId::from_random(fixtures::H1));
    Block { network, cidr: "10.42.64.0/26".parse().unwrap(), host, leased: Revision(1) }
}

impl World {
    fn take(&self, command: Command) {
        match command {
            Command::Reserve { network, reply, .. } if !self.has_block.load(Ordering::SeqCst) => {
                drop(reply.send(Err(Refusal::NeedBlock { network, held: 0 })));
                self.lacked.fetch_add(1, Ordering::SeqCst);
            }
            Command::Reserve { reply, .. } => drop(reply.send(Ok("10.42.64.2".parse().unwrap()))),
            Command::LetGo { reply, .. } => {
                drop(reply.send(Ok(self.has_block.swap(false, Ordering::SeqCst))));
            }
            Command::Leaving { reply } => drop(reply.send(Ok(Vec::new()))),
            Command::Leased { .. } => self.has_block.store(true, Ordering::SeqCst),
            _ => panic!("nobody asks that here"),
        }
    }
}

/// A server that leases blocks as the function does, and has nothing else to give.
pub(crate) struct Blocks<F>(pub(crate) F);

impl<F: Fn() -> Result<Block, ApiError> + Send + Sync> Lessor for Blocks<F> {
    fn lease(&self, _: NetworkId, _: usize) -> BoxFuture<Result<Block, ApiError>> {
        let leased = (self.0)();
        Box::pin(async { leased })
    }

    fn give_back(&self, _: model::Object) -> BoxFuture<Result<(), ApiError>> {
        nothing()
    }

    fn claim(
        &self,
        _: NetworkId,
        _: Option<IpAddr>,
        _: EndpointId,
        _: bool,
    ) -> BoxFuture<Result<model::Claim, ApiError>> {
        nothing()
    }

    fn retained(&self, _: NetworkId, _: String, _: EndpointId) -> BoxFuture<Result<model::Claim, ApiError>> {
        nothing()
    }
}

fn nothing<T>() -> BoxFuture<Result<T, ApiError>> {
    Box::pin(async {
        Err(ApiError::new(ErrorCode::Unavailable, "the server of this test leases blocks alone"))
    })
}

#[tokio::test]
async fn who_needs_an_address_while_a_block_goes_back_waits_and_then_asks_for_another() {
    let world = Arc::new(World::default());
    world.has_block.store(true, Ordering::SeqCst);
    let (commands, inbox) = std::sync::mpsc::channel();
    let reconciler = world.clone();
    std::thread::spawn(move || {
        while let Ok(command) = inbox.recv() {
            reconciler.take(command);
        }
    });
    let (_views, view) = watch::channel(Arc::new(fixtures::view("droveway.internal", Vec::new())));
    let lease = {
        let world = world.clone();
        move || {
            if !world.given.load(Ordering::SeqCst) {
                world.leased_too_soon.store(true, Ordering::SeqCst);
            }
            Ok(block())
        }
    };
    let control = Control::new(commands, Arc::new(|| {}), view, Arc::new(Blocks(lease)));

    let (begun, has_begun) = oneshot::channel();
    let (go, gone) = oneshot::channel::<()>();
    let giving = tokio::spawn({
        let (control, world) = (control.clone(), world.clone());
        async move {
            let give = async {
                begun.send(()).unwrap();
                gone.await.unwrap();
                world.given.store(true, Ordering::SeqCst);
                Ok(())
            };
            control.give_back(Key::Block(fixtures::network(), block().cidr), give).await
        }
    });
    has_begun.await.unwrap();
    let reserving = tokio::spawn(async move { control.reserve(&fixtures::network(), None).await });
    let deadline = Instant::now() + Duration::from_secs(10);
    while world.lacked.load(Ordering::SeqCst) == 0 {
        assert!(Instant::now() < deadline, "nobody asked");
        tokio::task::yield_now().await;
    }
    // Whoever does not wait for the outcome would be at the server by now.
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
    go.send(()).unwrap();
    giving.await.unwrap().unwrap();
    assert_eq!(reserving.await.unwrap().unwrap().to_string(), "10.42.64.2");
    assert!(!world.leased_too_soon.load(Ordering::SeqCst), "a block was leased while one went back");
}

#[test]
fn who_finds_all_addresses_used_up_is_told_what_can_be_done() {
    let refused = |code| used_up(ApiError::new(code, "no block is free; create a larger network"));
    let message = refused(ErrorCode::Exhausted).message;
    for part in ["no block is free; create a larger network", "remove containers"] {
        assert!(message.contains(part), "{message}");
    }
    assert_eq!(refused(ErrorCode::NotFound).message, "no block is free; create a larger network");
}
