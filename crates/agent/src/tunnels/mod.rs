//! The tunnels of the encrypted driver: IKE with every peer that the plan wants, keys into the packet path, and how it
//! all stands.
//!
//! One thread, the [`engine`], has the [`ike::Endpoint`] and all that is known of peers. It hears of changed [`View`]s, of
//! what the packet path noticed ([`Signal`]) and of what people ask ([`Tunnels`]), and gives keys, routes and policies to
//! the [`Dataplane`]. What is pure lies apart: [`wanted`], [`probe`], [`mtu`], [`status`], [`pcapng`].
//!
//! Invariant: no association, no packet: whatever fails here, nothing leaves in clear.
//! Invariant: traffic keys go from IKE's events to the packet path ([`keys`]) and nowhere else.
//! Invariant: losing the server changes nothing here: peers, keys and rekeys go on by the last snapshot.

mod devices;
mod engine;
mod events;
pub(crate) mod http;
mod keys;
mod metrics;
mod mtu;
mod pcapng;
mod peer;
mod probe;
mod quiet;
mod status;
mod view;
mod wanted;

use std::sync::Arc;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use linux::udp::{Family, Socket};
use model::NetworkId;
use model::agent_api::TunnelStatus;
use model::api::{ApiError, ErrorCode};
use tokio::sync::{oneshot, watch};

use crate::dataplane::{Captured, Dataplane, DeviceIndex, Signal, Sockets, Tuning, workers_here};
use crate::ledger::Identity;
use crate::tunnels::engine::Engine;
use crate::tunnels::wanted::Own;
use crate::view::View;

/// Things that wait for the engine at most. Signals of the packet path beyond that are dropped and counted there.
const INPUTS: usize = 4096;
/// Packets of a capture that wait to be written.
const CAPTURED: usize = 4096;
/// However often keys are changed, an exchange may take this long before the old ones end.
const GRACE: Duration = Duration::from_secs(30);

/// How tunnels are to be.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Settings {
    /// The UDP port that IKE and ESP share.
    pub port: u16,
    /// How old the keys of traffic may become, instead of an hour.
    pub rekey_every: Option<Duration>,
    /// How many bytes may go under one key, instead of 1 TiB.
    pub rekey_bytes: Option<u64>,
    /// How old an IKE SA may become, instead of four hours.
    pub rekey_ike_every: Option<Duration>,
    /// How the packet path works.
    pub tuning: Tuning,
}

impl Settings {
    fn timing(&self) -> ike::Timing {
        let default = ike::Timing::default();
        let child_rekey = self.rekey_every.unwrap_or(default.child_rekey);
        let ike_rekey = self.rekey_ike_every.unwrap_or(default.ike_rekey);
        let shortest = child_rekey.min(ike_rekey);
        let tenths = (GRACE.as_millis() * 10).div_ceil(shortest.as_millis().max(1));
        ike::Timing {
            child_rekey,
            ike_rekey,
            child_bytes: self.rekey_bytes.unwrap_or(default.child_bytes),
            grace_tenths: default.grace_tenths.max(u32::try_from(tenths).unwrap_or(u32::MAX)),
            ..default
        }
    }
}

/// What the engine hears.
enum Input {
    /// The view is another.
    View,
    /// An address or a route of this host is another.
    Addresses,
    /// The packet path noticed something.
    Signal(Signal),
    /// This host has a new certificate.
    Certified(Box<Own>),
    /// Someone asks.
    Command(Command),
    /// A capture has ended.
    CaptureEnded(u64),
    /// Say farewell and end.
    Stop,
}

impl From<Signal> for Input {
    fn from(signal: Signal) -> Self {
        Self::Signal(signal)
    }
}

/// What people ask.
enum Command {
    List { reply: Reply<Vec<TunnelStatus>> },
    Rekey { peer: String, who: String, reply: Reply<()> },
    Reset { peer: String, who: String, reply: Reply<()> },
    Capture { peer: String, who: String, tap: SyncSender<Captured>, reply: Reply<Captures> },
    Metrics { reply: Reply<String> },
}

type Reply<T> = oneshot::Sender<Result<T, ApiError>>;

/// What a capture is of.
struct Captures {
    /// The peer's number, for [`Input::CaptureEnded`].
    peer: u64,
    /// The names of networks by their device.
    networks: Vec<(DeviceIndex, String)>,
}

/// Asks the engine. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Tunnels {
    inputs: SyncSender<Input>,
}

/// The engine's thread.
pub(crate) struct Running {
    inputs: SyncSender<Input>,
    thread: JoinHandle<()>,
}

/// Opens the sockets and starts the packet path and the engine.
///
/// # Errors
/// What cannot be had, and what to do.
pub(crate) fn start(
    settings: Settings,
    identity: &Identity,
    views: watch::Receiver<Arc<View>>,
) -> Result<(Tunnels, Running), ApiError> {
    let own = Own::of(identity).map_err(|why| {
        crate::internal(format!("this host's own key or certificate cannot be used for tunnels: {why}"))
    })?;
    let workers = settings.tuning.workers.unwrap_or_else(workers_here);
    let sockets = sockets(settings.port, workers).map_err(|error| {
        let message = format!("no tunnels to other hosts: {error} (--tunnel-port)");
        ApiError::new(ErrorCode::Unavailable, message)
    })?;
    let (inputs, inbox) = sync_channel(INPUTS);
    let dataplane =
        Dataplane::start(sockets, inputs.clone(), settings.tuning.clone()).map_err(crate::internal)?;
    let engine = Engine::new(own, settings, dataplane, inbox, views);
    let thread = crate::vital::spawn("tunnels", move || engine.run()).map_err(crate::internal)?;
    Ok((Tunnels { inputs: inputs.clone() }, Running { inputs, thread }))
}

/// A port of both families, for each worker. A machine without IPv6 has tunnels over IPv4.
fn sockets(port: u16, workers: usize) -> Result<Vec<Sockets>, linux::Error> {
    let v4 = Socket::bind_group(Family::V4, port, workers)?;
    let v6 = Socket::bind_group(Family::V6, port, workers)
        .inspect_err(|error| tracing::info!("no tunnels over IPv6: {error}"))
        .unwrap_or_default();
    let v6 = v6.into_iter().map(Some).chain(std::iter::repeat_with(|| None));
    Ok(v4.into_iter().zip(v6).map(|(v4, v6)| Sockets { v4: Some(v4), v6 }).collect())
}

impl Running {
    /// Tells the peers, for a moment at most, and ends.
    pub(crate) fn stop(self) {
        // An engine that has ended takes nothing more.
        drop(self.inputs.send(Input::Stop));
        // A panic would have ended the process.
        let _ = self.thread.join();
    }
}

impl Tunnels {
    /// Tells the engine of each change of the view, and of `addresses`: whatever changes when an address or route of
    /// this host may have.
    pub(crate) async fn follow<T>(
        &self,
        mut views: watch::Receiver<Arc<View>>,
        mut addresses: watch::Receiver<T>,
    ) {
        loop {
            let (changed, input) = tokio::select! {
                changed = views.changed() => (changed, Input::View),
                changed = addresses.changed() => (changed, Input::Addresses),
            };
            if changed.is_err() || self.send(input).await.is_err() {
                return;
            }
        }
    }

    /// All tunnels, by the names of the peers.
    pub(crate) async fn list(&self) -> Result<Vec<TunnelStatus>, ApiError> {
        self.ask(|reply| Command::List { reply }).await
    }

    /// New keys without a gap. `who` asks is logged, as for the others.
    pub(crate) async fn rekey(&self, peer: String, who: String) -> Result<(), ApiError> {
        self.ask(|reply| Command::Rekey { peer, who, reply }).await
    }

    /// Closes the tunnel and begins anew.
    pub(crate) async fn reset(&self, peer: String, who: String) -> Result<(), ApiError> {
        self.ask(|reply| Command::Reset { peer, who, reply }).await
    }

    /// Proves this host by its new certificate from now on. Tunnels go on.
    pub(crate) async fn certified(&self, identity: &Identity) -> Result<(), String> {
        let own = Own::of(identity)?;
        self.send(Input::Certified(Box::new(own))).await.map_err(|error| error.message)
    }

    /// Metrics in Prometheus' text format.
    pub(crate) async fn metrics(&self) -> Result<String, ApiError> {
        self.ask(|reply| Command::Metrics { reply }).await
    }

    async fn ask<T>(&self, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, ApiError> {
        let (reply, answer) = oneshot::channel();
        self.send(Input::Command(command(reply))).await?;
        answer.await.map_err(|_| stopping())?
    }

    async fn send(&self, input: Input) -> Result<(), ApiError> {
        match self.inputs.try_send(input) {
            Ok(()) => Ok(()),
            Err(TrySendError::Disconnected(_)) => Err(stopping()),
            Err(TrySendError::Full(input)) => {
                let inputs = self.inputs.clone();
                let sent = tokio::task::spawn_blocking(move || inputs.send(input).is_ok()).await;
                if matches!(sent, Ok(true)) { Ok(()) } else { Err(stopping()) }
            }
        }
    }
}

/// Nobody by that name or id.
fn unknown(name: &str, known: &[String]) -> ApiError {
    let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
    let message = format!("there is no tunnel to {name:?} here; this host has tunnels to: {known}");
    ApiError::new(ErrorCode::NotFound, message)
}

fn stopping() -> ApiError {
    ApiError::new(ErrorCode::Unavailable, "the agent is stopping; try again")
}

/// What a network is called in a capture.
fn network_name(view: &View, network: &NetworkId) -> String {
    view.catalog.networks.get(network).map_or_else(|| network.to_string(), |it| it.name.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_changed_every_second_still_have_time_for_the_exchange() {
        let often = Settings { rekey_every: Some(Duration::from_secs(1)), ..Settings::default() };
        let timing = often.timing();
        assert_eq!(timing.child_rekey, Duration::from_secs(1));
        assert!(timing.child_rekey / 10 * timing.grace_tenths >= Duration::from_secs(30));
        assert_eq!(Settings::default().timing().grace_tenths, ike::Timing::default().grace_tenths);
    }
}
