//! The sockets of one router's DNS: datagrams and streams in, answers out.
//!
//! What is ours is answered at once, in the order it came; what is forwarded is answered when others have. How much may be
//! under way is bounded, in all and for one asker. Dropping the future ends everything.
//!
//! Invariant: an answer leaves by the socket that the question came to.

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{debug, warn};

use super::forward::framed;
use super::message::{Forward, Reaction, Transport, react};
use super::{Budget, Forwarder, Permit, Zones};
use crate::accept::accept;

/// Queries under way to others, in all and for one asker.
const FORWARDS: (usize, usize) = (512, 128);
/// Connections, in all and for one asker.
const CONNECTIONS: (usize, usize) = (128, 16);
/// Queries under way on one connection.
const PIPELINE: usize = 32;
/// How long a connection may go without a whole query (RFC 7766 §6.2.3 asks for a few seconds).
const IDLE: Duration = Duration::from_secs(10);
/// How long a client may take to take an answer.
const TAKE: Duration = Duration::from_secs(5);
/// How long to leave a socket alone that failed.
const PAUSE: Duration = Duration::from_millis(100);

/// Answers on these sockets for as long as it is polled. It returns only if a socket cannot be used at all.
pub async fn serve(
    udp: UdpSocket,
    tcp: TcpListener,
    zones: Arc<Zones>,
    forwarder: Arc<Forwarder>,
) -> io::Result<Infallible> {
    udp.set_nonblocking(true)?;
    tcp.set_nonblocking(true)?;
    let datagrams = Datagrams(tokio::net::UdpSocket::from_std(udp)?);
    let listener = tokio::net::TcpListener::from_std(tcp)?;
    let desk = Desk {
        zones,
        forwarder,
        forwards: Budget::new(FORWARDS.0, FORWARDS.1),
        turn: Arc::default(),
        idle: IDLE,
    };
    tokio::select! {
        never = serve_datagrams(Arc::new(datagrams), desk.clone()) => Ok(never),
        never = serve_streams(listener, desk) => Ok(never),
    }
}

/// What answers need, wherever the question came in.
#[derive(Clone)]
struct Desk {
    zones: Arc<Zones>,
    forwarder: Arc<Forwarder>,
    forwards: Arc<Budget>,
    turn: Arc<AtomicUsize>,
    idle: Duration,
}

/// What is left to do about a query.
enum Next {
    Nothing,
    Send(Vec<u8>),
    Ask(Box<Forward>, Permit),
}

impl Desk {
    fn take(&self, query: &[u8], asker: IpAddr, transport: Transport) -> Next {
        let asker = asker.to_canonical();
        let zone = self.zones.newest();
        match react(query, asker, transport, &zone, self.turn.fetch_add(1, Ordering::Relaxed)) {
            Reaction::Ignore => Next::Nothing,
            Reaction::Reply(bytes) => {
                self.forwarder.count_answered();
                Next::Send(bytes)
            }
            Reaction::Forward(forward) => match self.forwards.take(asker) {
                Some(permit) => Next::Ask(forward, permit),
                None => {
                    self.forwarder.count_forwarded(false);
                    Next::Send(forward.fail())
                }
            },
        }
    }

    async fn ask(self, forward: Box<Forward>, permit: Permit) -> Vec<u8> {
        let asked = self.forwarder.ask(&forward).await;
        self.forwarder.count_forwarded(asked.is_ok());
        let answer = match asked {
            Ok(answer) => forward.relay(answer),
            Err(error) => {
                debug!(%error, "not answered");
                forward.fail()
            }
        };
        drop(permit);
        answer
    }
}

struct Datagrams(tokio::net::UdpSocket);

impl Datagrams {
    /// Sends at once or not at all: a client that missed a datagram asks again.
    fn send(&self, bytes: &[u8], to: SocketAddr) {
        if let Err(error) = self.0.try_send_to(bytes, to) {
            debug!(%to, %error, "answer not sent");
        }
    }
}

async fn serve_datagrams(datagrams: Arc<Datagrams>, desk: Desk) -> Infallible {
    let mut buffer = vec![0; usize::from(u16::MAX)];
    let mut under_way = JoinSet::new();
    loop {
        let received = tokio::select! {
            received = datagrams.0.recv_from(&mut buffer) => received,
            Some(ended) = under_way.join_next() => {
                report(ended);
                continue;
            }
        };
        let (length, from) = match received {
            Ok(received) => received,
            Err(error) => {
                warn!(%error, "DNS over UDP: receiving failed");
                sleep(PAUSE).await;
                continue;
            }
        };
        match desk.take(&buffer[..length], from.ip(), Transport::Udp) {
            Next::Nothing => {}
            Next::Send(bytes) => datagrams.send(&bytes, from),
            Next::Ask(forward, permit) => {
                let (datagrams, desk) = (Arc::clone(&datagrams), desk.clone());
                under_way.spawn(async move {
                    let answer = desk.ask(forward, permit).await;
                    datagrams.send(&answer, from);
                });
            }
        }
    }
}

async fn serve_streams(listener: tokio::net::TcpListener, desk: Desk) -> Infallible {
    let budget = Budget::new(CONNECTIONS.0, CONNECTIONS.1);
    let mut connections = JoinSet::new();
    loop {
        let (stream, from) = tokio::select! {
            accepted = accept("DNS over TCP", || listener.accept()) => accepted,
            Some(ended) = connections.join_next() => {
                report(ended);
                continue;
            }
        };
        let asker = from.ip().to_canonical();
        let Some(permit) = budget.take(asker) else {
            debug!(%from, "too many connections");
            continue;
        };
        let desk = desk.clone();
        connections.spawn(async move {
            if let Err(error) = serve_stream(stream, asker, desk).await {
                debug!(%from, %error, "connection ended");
            }
            drop(permit);
        });
    }
}

/// One connection: queries may follow each other before they are answered, answers go out as they are ready (RFC 7766
/// §6.2.1.1), and the client may close its half first.
async fn serve_stream(mut stream: TcpStream, asker: IpAddr, desk: Desk) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut input = Vec::new();
    let mut under_way = FuturesUnordered::new();
    let mut open = true;
    let mut deadline = Instant::now() + desk.idle;
    loop {
        while under_way.len() < PIPELINE {
            let Some(query) = next_frame(&mut input) else { break };
            deadline = Instant::now() + desk.idle;
            match desk.take(&query, asker, Transport::Tcp) {
                // What is no query over TCP is no client.
                Next::Nothing => return Ok(()),
                Next::Send(bytes) => write(&mut stream, &bytes).await?,
                Next::Ask(forward, permit) => under_way.push(desk.clone().ask(forward, permit)),
            }
        }
        if !open && under_way.is_empty() {
            return Ok(());
        }
        tokio::select! {
            Some(answer) = under_way.next(), if !under_way.is_empty() => {
                write(&mut stream, &answer).await?;
                deadline = Instant::now() + desk.idle;
            }
            read = stream.read_buf(&mut input), if open && under_way.len() < PIPELINE => open = read? > 0,
            () = sleep_until(deadline), if under_way.is_empty() => return Ok(()),
        }
    }
}

/// Takes a whole message from the front of what was read.
fn next_frame(input: &mut Vec<u8>) -> Option<Vec<u8>> {
    let (length, rest) = input.split_first_chunk::<2>()?;
    let length = usize::from(u16::from_be_bytes(*length));
    let message = rest.get(..length)?.to_vec();
    input.drain(..2 + length);
    Some(message)
}

async fn write(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    timeout(TAKE, stream.write_all(&framed(message)))
        .await
        .map_err(|_| io::Error::new(io::ErrorKind::TimedOut, "the client does not take its answers"))?
}

fn report(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended {
        warn!(%error, "a query's task failed");
    }
}

#[cfg(test)]
#[path = "serve_tests.rs"]
mod tests;
