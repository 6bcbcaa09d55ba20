//! The sockets of one router's DNS: datagrams and streams in, answers out.
//!
//! What is ours is answered at once, in the order it came; what is forwarded is answered when others have. How much may be
//! under way is bounded, in all and for one asker. Dropping the future ends everything.
//!
//! Invariant: a datagram is answered from the address it was sent to, whichever that was.

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::io::{AsyncReadExt, AsyncWriteExt, Interest};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tracing::{debug, warn};

use super::forward::framed;
use super::message::{Forward, Reaction, Transport, react};
use super::{Budget, Forwarder, Permit, Zones};

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

/// Gives a datagram's length, sender and destination.
pub type Receive = fn(&UdpSocket, &mut [u8]) -> io::Result<(usize, SocketAddr, IpAddr)>;
/// Sends a datagram to an address from an address.
pub type Transmit = fn(&UdpSocket, &[u8], SocketAddr, IpAddr) -> io::Result<usize>;

/// A datagram socket, and how to learn where a datagram was sent to and to answer from there.
#[derive(Debug)]
pub struct Udp {
    /// The socket.
    pub socket: UdpSocket,
    /// Gives length, sender and destination.
    pub receive: Receive,
    /// Sends to an address from an address.
    pub send: Transmit,
}

impl Udp {
    /// A socket bound to one address, which is the only destination there can be.
    pub fn bound(socket: UdpSocket) -> Self {
        Self {
            socket,
            receive: |socket, buffer| {
                let (length, from) = socket.recv_from(buffer)?;
                Ok((length, from, socket.local_addr()?.ip()))
            },
            send: |socket, bytes, to, _| socket.send_to(bytes, to),
        }
    }
}

/// Answers on these sockets for as long as it is polled. It returns only if a socket cannot be used at all.
pub async fn serve(
    udp: Udp,
    tcp: TcpListener,
    zones: Arc<Zones>,
    forwarder: Arc<Forwarder>,
) -> io::Result<Infallible> {
    let Udp { socket, receive, send } = udp;
    socket.set_nonblocking(true)?;
    tcp.set_nonblocking(true)?;
    let datagrams =
        Datagrams { ready: tokio::net::UdpSocket::from_std(socket.try_clone()?)?, socket, receive, send };
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
            Reaction::Reply(bytes) => Next::Send(bytes),
            Reaction::Forward(forward) => match self.forwards.take(asker) {
                Some(permit) => Next::Ask(forward, permit),
                None => Next::Send(forward.fail()),
            },
        }
    }

    async fn ask(self, forward: Box<Forward>, permit: Permit) -> Vec<u8> {
        let answer = match self.forwarder.ask(&forward).await {
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

struct Datagrams {
    socket: UdpSocket,
    /// The same socket, to wait for it.
    ready: tokio::net::UdpSocket,
    receive: Receive,
    send: Transmit,
}

impl Datagrams {
    async fn receive(&self, buffer: &mut [u8]) -> io::Result<(usize, SocketAddr, IpAddr)> {
        self.ready.async_io(Interest::READABLE, || (self.receive)(&self.socket, buffer)).await
    }

    /// Sends at once or not at all: a client that missed a datagram asks again.
    fn send(&self, bytes: &[u8], to: SocketAddr, from: IpAddr) {
        if let Err(error) = (self.send)(&self.socket, bytes, to, from) {
            debug!(%to, %from, %error, "answer not sent");
        }
    }
}

async fn serve_datagrams(datagrams: Arc<Datagrams>, desk: Desk) -> Infallible {
    let mut buffer = vec![0; usize::from(u16::MAX)];
    let mut under_way = JoinSet::new();
    loop {
        let received = tokio::select! {
            received = datagrams.receive(&mut buffer) => received,
            Some(ended) = under_way.join_next() => {
                report(ended);
                continue;
            }
        };
        let (length, from, destination) = match received {
            Ok(received) => received,
            Err(error) => {
                warn!(%error, "DNS over UDP: receiving failed");
                sleep(PAUSE).await;
                continue;
            }
        };
        match desk.take(&buffer[..length], from.ip(), Transport::Udp) {
            Next::Nothing => {}
            Next::Send(bytes) => datagrams.send(&bytes, from, destination),
            Next::Ask(forward, permit) => {
                let (datagrams, desk) = (Arc::clone(&datagrams), desk.clone());
                under_way.spawn(async move {
                    let answer = desk.ask(forward, permit).await;
                    datagrams.send(&answer, from, destination);
                });
            }
        }
    }
}

async fn serve_streams(listener: tokio::net::TcpListener, desk: Desk) -> Infallible {
    let budget = Budget::new(CONNECTIONS.0, CONNECTIONS.1);
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(ended) = connections.join_next() => {
                report(ended);
                continue;
            }
        };
        match accepted {
            Ok((stream, from)) => {
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
            Err(error) => {
                warn!(%error, "DNS over TCP: accepting failed");
                sleep(PAUSE).await;
            }
        }
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
