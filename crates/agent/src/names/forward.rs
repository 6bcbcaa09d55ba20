//! Asks the host's own resolvers what is not ours (RFC 5625: a forwarder passes on what came).
//!
//! Sockets are opened where the agent lives, in the host's namespace, so a resolver on the host's loopback serves too.
//! Each query leaves with an id and a source port of its own (RFC 5452 §9.2); what comes back is taken only from the
//! server asked, with that id and that question.
//!
//! Invariant: no router is ever asked.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use model::SERVICE_ADDRESS;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;
use tracing::debug;

use super::message::{Forward, Raw, Transport};
use super::resolv::Resolv;

/// How long one server has, as patient as a client's five seconds allow.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often each server is asked.
const ROUNDS: usize = 2;
/// How long one that did not answer is left alone, unless nobody else answers: each query would wait for it otherwise.
const REST: Duration = Duration::from_secs(30);
/// How many servers of a file are used (resolv.conf(5), `MAXNS`).
const SERVERS_MAX: usize = 3;
const PORT: u16 = 53;
/// SERVFAIL, NOTIMP and REFUSED: another server may do better.
const NO_HELP: [u8; 3] = [2, 4, 5];

/// Where the servers to ask are known from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Upstreams {
    /// A `resolv.conf`, read again when it changes.
    File(PathBuf),
    /// These.
    Given(Vec<SocketAddr>),
}

/// Why there is no answer from outside.
#[derive(Debug, thiserror::Error)]
pub enum Unanswered {
    /// Nobody to ask.
    #[error("{0} names no resolver that may be asked; add a nameserver to it")]
    NoServers(String),
    /// Nobody answered.
    #[error("none of the resolvers {0:?} answered")]
    Silent(Vec<SocketAddr>),
}

/// Asks others. One serves all routers of a host.
#[derive(Debug)]
pub struct Forwarder {
    upstreams: Upstreams,
    own: Vec<IpAddr>,
    patience: Duration,
    known: Mutex<Known>,
    answered: AtomicU64,
    forwarded: AtomicU64,
    failed: AtomicU64,
}

/// What is known of the servers.
#[derive(Debug, Default)]
struct Known {
    /// The file's inode, length and time of change (seconds, nanoseconds) when it was read.
    stamp: Option<(u64, u64, i64, i64)>,
    servers: Arc<[SocketAddr]>,
    /// Which answered last: the next query goes there first.
    first: usize,
    /// Those that did not answer lately, and when.
    silent: BTreeMap<SocketAddr, Instant>,
}

impl Forwarder {
    /// Asks `upstreams`, but never the service address nor one of `own`.
    pub fn new(upstreams: Upstreams, own: Vec<IpAddr>) -> Self {
        Self {
            upstreams,
            own,
            patience: PATIENCE,
            known: Mutex::default(),
            answered: AtomicU64::new(0),
            forwarded: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        }
    }

    /// A query of a container was answered from what this host knows.
    pub(super) fn count_answered(&self) {
        self.answered.fetch_add(1, Ordering::Relaxed);
    }

    /// A query went to others, and was answered or not.
    pub(super) fn count_forwarded(&self, good: bool) {
        (if good { &self.forwarded } else { &self.failed }).fetch_add(1, Ordering::Relaxed);
    }

    /// How many queries there were of all routers' containers, by what became of them.
    pub(crate) fn queries(&self) -> [(&'static str, u64); 3] {
        [("answered", &self.answered), ("forwarded", &self.forwarded), ("failed", &self.failed)]
            .map(|(outcome, count)| (outcome, count.load(Ordering::Relaxed)))
    }

    /// With other than two seconds for one server.
    #[must_use]
    pub fn with_patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// The answer to a query, with the query's id.
    pub(super) async fn ask(&self, forward: &Forward) -> Result<Vec<u8>, Unanswered> {
        let (servers, first) = self.servers();
        if servers.is_empty() {
            return Err(Unanswered::NoServers(match &self.upstreams {
                Upstreams::File(path) => path.display().to_string(),
                Upstreams::Given(_) => "the agent's configuration".to_owned(),
            }));
        }
        let turn = (0..servers.len()).map(|i| (first + i) % servers.len());
        let (resting, awake): (Vec<usize>, Vec<usize>) = turn.partition(|at| self.rests(servers[*at]));
        let mut no_help = None;
        for _ in 0..ROUNDS {
            for some in [&awake, &resting] {
                for &at in some {
                    let server = servers[at];
                    match timeout(self.patience, exchange(server, forward)).await {
                        Ok(Ok(answer)) => {
                            self.known().silent.remove(&server);
                            if Raw::new(&answer).is_none_or(|raw| !NO_HELP.contains(&raw.rcode())) {
                                self.prefer(&servers, at);
                                return Ok(answer);
                            }
                            no_help = no_help.or(Some(answer));
                        }
                        Ok(Err(error)) => self.was_silent(server, &error),
                        Err(_) => self.was_silent(server, &"no answer in time"),
                    }
                }
                if let Some(answer) = no_help {
                    return Ok(answer);
                }
            }
        }
        Err(Unanswered::Silent(servers.to_vec()))
    }

    fn rests(&self, server: SocketAddr) -> bool {
        self.known().silent.get(&server).is_some_and(|since| since.elapsed() < REST)
    }

    fn was_silent(&self, server: SocketAddr, why: &dyn std::fmt::Display) {
        debug!(%server, %why, "resolver is silent");
        self.known().silent.insert(server, Instant::now());
    }

    /// The servers, and which to ask first.
    fn servers(&self) -> (Arc<[SocketAddr]>, usize) {
        let mut known = self.known();
        match &self.upstreams {
            Upstreams::Given(given) if known.servers.is_empty() => {
                known.servers = self.allowed(given.clone());
            }
            Upstreams::Given(_) => {}
            Upstreams::File(path) => {
                let stamp = fs::metadata(path)
                    .ok()
                    .map(|meta| (meta.ino(), meta.len(), meta.ctime(), meta.ctime_nsec()));
                if stamp.is_none() || stamp != known.stamp || known.servers.is_empty() {
                    // Without the file the resolver on the local host is asked, as resolv.conf(5) has it; a file that
                    // was there a moment ago is being replaced.
                    let text = fs::read_to_string(path).ok();
                    if text.is_some() || known.stamp.is_none() {
                        let resolv = Resolv::parse(&text.unwrap_or_default());
                        let servers = resolv.nameservers.into_iter().map(|a| SocketAddr::new(a, PORT));
                        *known = Known {
                            stamp,
                            servers: self.allowed(servers.collect()),
                            first: 0,
                            silent: BTreeMap::new(),
                        };
                    }
                }
            }
        }
        (Arc::clone(&known.servers), known.first)
    }

    fn allowed(&self, servers: Vec<SocketAddr>) -> Arc<[SocketAddr]> {
        let service = IpAddr::V4(SERVICE_ADDRESS);
        servers
            .into_iter()
            .filter(|server| {
                let address = server.ip().to_canonical();
                address != service && !self.own.contains(&address)
            })
            .take(SERVERS_MAX)
            .collect()
    }

    fn prefer(&self, servers: &Arc<[SocketAddr]>, at: usize) {
        let mut known = self.known();
        if Arc::ptr_eq(&known.servers, servers) {
            known.first = at;
        }
    }

    fn known(&self) -> MutexGuard<'_, Known> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One question to one server. A client that came by TCP gets the whole answer; another is told to come again so.
async fn exchange(server: SocketAddr, forward: &Forward) -> io::Result<Vec<u8>> {
    let mut query = forward.query.clone();
    let client_id = [query[0], query[1]];
    query[..2].copy_from_slice(&crate::random::<2>());
    let mut answer = by_udp(server, &query, forward.limit()).await?;
    let truncated = Raw::new(&answer).is_some_and(Raw::is_truncated);
    if truncated && forward.transport == Transport::Tcp {
        answer = by_tcp(server, &query).await?;
    }
    answer[..2].copy_from_slice(&client_id);
    Ok(answer)
}

async fn by_udp(server: SocketAddr, query: &[u8], limit: usize) -> io::Result<Vec<u8>> {
    let any: IpAddr = match server {
        SocketAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        SocketAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    socket.send(query).await?;
    let mut buffer = vec![0; limit.max(4096)];
    loop {
        let length = socket.recv(&mut buffer).await?;
        let (Some(answer), Some(asked)) = (Raw::new(&buffer[..length]), Raw::new(query)) else { continue };
        if answer.answers(asked) {
            buffer.truncate(length);
            return Ok(buffer);
        }
        debug!(%server, "a datagram that answers nothing we asked");
    }
}

async fn by_tcp(server: SocketAddr, query: &[u8]) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    stream.write_all(&framed(query)).await?;
    let length = stream.read_u16().await?;
    let mut answer = vec![0; usize::from(length)];
    stream.read_exact(&mut answer).await?;
    match (Raw::new(&answer), Raw::new(query)) {
        (Some(reply), Some(asked)) if reply.answers(asked) => Ok(answer),
        (_, _) => Err(io::Error::new(io::ErrorKind::InvalidData, "the answer is not to what was asked")),
    }
}

/// A message behind its length (RFC 1035 §4.2.2). A longer one than the length can say is not made.
pub(super) fn framed(message: &[u8]) -> Vec<u8> {
    let length = u16::try_from(message.len()).unwrap_or_default();
    let mut frame = length.to_be_bytes().to_vec();
    frame.extend_from_slice(&message[..usize::from(length)]);
    frame
}

#[cfg(test)]
#[path = "forward_tests.rs"]
mod tests;
