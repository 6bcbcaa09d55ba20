//! How much one may ask for: connections of strangers, requests of everybody.
//!
//! A *stranger* is a connection that has shown no certificate of a host and sent no valid key: half-open ones, handshakes
//! under way, joins, looks at `/healthz`. There may be so many, and so many of one source. The oldest makes room for the
//! newest, so a flood of connections that say nothing ends connections that say nothing, and whoever means it, who needs
//! milliseconds, gets through. Everybody else is bounded by [`Limits::connections`].
//!
//! Requests are counted by who sends them: a key, a host, or a stranger's source (GCRA, a leaky bucket without a clock of
//! its own).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::Hash;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use model::api::{ApiError, ErrorCode};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::sync::oneshot;
use tokio::time::Instant;

use crate::metrics::Metrics;

/// Files that are open besides connections: the store, the log, the audit log's readers.
const OTHER_FILES: usize = 512;
/// How many seconds' worth of requests may come at once.
const BURST: u32 = 10;
/// How many of those who ask are remembered.
const REMEMBERED: usize = 16_384;

/// How much the server takes on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// How many connections may be open.
    pub connections: usize,
    /// How many of them may be strangers'.
    pub strangers: usize,
    /// How many strangers' connections may come from one address (IPv6: one /64).
    pub strangers_of_source: usize,
    /// How long a TLS handshake may take, and then the first request to come.
    pub handshake: Duration,
    /// How long a request's header may take.
    pub header: Duration,
    /// How long a stranger's connection may stay in all.
    pub stranger_stays: Duration,
    /// How long a body may take to begin with; each 16 KiB that came add as much as [`Limits::body_each`].
    pub body: Duration,
    /// See [`Limits::body`].
    pub body_each: Duration,
    /// How many requests a second one may send; ten times as many at once. None is no limit.
    pub rate: Option<u32>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 16_384,
            strangers: 4096,
            strangers_of_source: 1024,
            handshake: Duration::from_secs(10),
            header: Duration::from_secs(30),
            stranger_stays: Duration::from_secs(60),
            body: Duration::from_secs(5),
            body_each: Duration::from_secs(1),
            rate: Some(200),
        }
    }
}

impl Limits {
    /// Allows the process as many open files as these limits need, and takes on less where it may not.
    pub(crate) fn fit(mut self) -> Self {
        let wanted = (self.connections + OTHER_FILES) as u64;
        let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return self };
        let mut now = soft;
        // Only root may raise the hard one.
        for (soft, hard) in [(wanted, hard.max(wanted)), (hard.min(wanted), hard)] {
            if now < wanted && soft > now && setrlimit(Resource::RLIMIT_NOFILE, soft, hard).is_ok() {
                now = soft;
            }
        }
        if now < wanted {
            let connections = usize::try_from(now).unwrap_or(usize::MAX).saturating_sub(OTHER_FILES).max(64);
            tracing::warn!(
                open_files = now,
                wanted,
                connections,
                "the system allows fewer open files than the server wants; it takes fewer connections (systemd: LimitNOFILE)"
            );
            self.connections = connections;
        }
        self.strangers = self.strangers.min(self.connections / 2);
        self.strangers_of_source = self.strangers_of_source.min(self.strangers);
        self
    }
}

/// Where a stranger comes from: one who has an IPv6 network has all addresses in it.
fn source(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() & (u128::MAX << 64))),
        v4 @ IpAddr::V4(_) => v4,
    }
}

/// Which connections are open.
pub(crate) struct Doors {
    limits: Limits,
    inside: Mutex<Inside>,
    metrics: Arc<Metrics>,
}

#[derive(Default)]
struct Inside {
    next: u64,
    /// Strangers, the oldest first, with what tells them to go.
    strangers: BTreeMap<u64, (IpAddr, oneshot::Sender<()>)>,
    of_source: HashMap<IpAddr, BTreeSet<u64>>,
    known: usize,
}

/// Ready when a stranger has to make room; never for one who became known.
pub(crate) async fn told(go: oneshot::Receiver<()>) {
    if go.await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// A connection's place. It is free again when this is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    doors: Arc<Doors>,
    number: u64,
    known: AtomicBool,
}

impl std::fmt::Debug for Doors {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Doors").finish_non_exhaustive()
    }
}

impl Doors {
    pub(crate) fn new(limits: Limits, metrics: Arc<Metrics>) -> Self {
        Self { limits, inside: Mutex::default(), metrics }
    }

    /// Lets a stranger in. The receiver hears when it has to make room.
    pub(crate) fn enter(self: &Arc<Self>, address: IpAddr) -> (Place, oneshot::Receiver<()>) {
        let source = source(address);
        let (go, told) = oneshot::channel();
        let mut inside = self.lock();
        let number = inside.next;
        inside.next += 1;
        let full = inside.of_source.get(&source).filter(|of| of.len() >= self.limits.strangers_of_source);
        let mut oldest = full.and_then(|of| of.first().copied());
        if oldest.is_none() && inside.strangers.len() >= self.limits.strangers {
            oldest = inside.strangers.first_key_value().map(|(number, _)| *number);
        }
        if let Some((_, go)) = oldest.and_then(|oldest| inside.leave(oldest)) {
            self.metrics.made_room();
            // One that ends by itself has made room already.
            let _ = go.send(());
        }
        inside.strangers.insert(number, (source, go));
        inside.of_source.entry(source).or_default().insert(number);
        drop(inside);
        (Place { doors: self.clone(), number, known: AtomicBool::new(false) }, told)
    }

    /// How many connections there are: strangers', and others'.
    pub(crate) fn count(&self) -> (usize, usize) {
        let inside = self.lock();
        (inside.strangers.len(), inside.known)
    }

    fn lock(&self) -> MutexGuard<'_, Inside> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inside {
    fn leave(&mut self, number: u64) -> Option<(IpAddr, oneshot::Sender<()>)> {
        let (source, go) = self.strangers.remove(&number)?;
        if let Some(of) = self.of_source.get_mut(&source) {
            of.remove(&number);
            if of.is_empty() {
                self.of_source.remove(&source);
            }
        }
        Some((source, go))
    }
}

impl Place {
    /// Whether the other side showed who it is.
    pub(crate) fn is_known(&self) -> bool {
        self.known.load(Ordering::Relaxed)
    }

    /// The other side showed who it is. Where all places are taken it stays a stranger.
    pub(crate) fn introduce(&self) {
        if self.is_known() {
            return;
        }
        let mut inside = self.doors.lock();
        let room =
            self.doors.limits.connections - self.doors.limits.strangers.min(self.doors.limits.connections);
        if inside.known < room
            && let Some((_, go)) = inside.leave(self.number)
        {
            inside.known += 1;
            self.known.store(true, Ordering::Relaxed);
            // Nobody tells it to go any more: see `told`.
            drop(go);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut inside = self.doors.lock();
        if *self.known.get_mut() {
            inside.known = inside.known.saturating_sub(1);
        } else {
            inside.leave(self.number);
        }
    }
}

/// How many requests came from whom.
#[derive(Debug)]
pub(crate) struct Rates {
    rate: Option<u32>,
    keys: Mutex<Buckets<String>>,
    hosts: Mutex<Buckets<String>>,
    strangers: Mutex<Buckets<IpAddr>>,
    refused: AtomicU64,
}

impl Rates {
    pub(crate) fn new(rate: Option<u32>) -> Self {
        let rate = rate.filter(|rate| *rate > 0);
        let (keys, hosts, strangers) = Default::default();
        Self { rate, keys, hosts, strangers, refused: AtomicU64::new(0) }
    }

    /// One request of a person's key.
    pub(crate) fn key(&self, name: &str) -> Result<(), ApiError> {
        self.take(&self.keys, name.to_owned(), || format!("key {name:?}"))
    }

    /// One request of a host.
    pub(crate) fn host(&self, id: &str) -> Result<(), ApiError> {
        self.take(&self.hosts, id.to_owned(), || format!("host {id}"))
    }

    /// One request of a stranger.
    pub(crate) fn stranger(&self, address: IpAddr) -> Result<(), ApiError> {
        let source = source(address);
        self.take(&self.strangers, source, || format!("requests without valid credentials from {source}"))
    }

    /// How many requests were refused.
    pub(crate) fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    fn take<K: Eq + Hash>(
        &self,
        buckets: &Mutex<Buckets<K>>,
        who: K,
        name: impl FnOnce() -> String,
    ) -> Result<(), ApiError> {
        let Some(rate) = self.rate else { return Ok(()) };
        let mut buckets = buckets.lock().unwrap_or_else(PoisonError::into_inner);
        buckets.take(who, rate, Instant::now()).map_err(|wait| {
            self.refused.fetch_add(1, Ordering::Relaxed);
            let seconds = wait.as_secs() + 1;
            let message = format!(
                "too many requests: {} may be {rate} a second; try again in {seconds} s, or raise --rate-limit of the server",
                name()
            );
            ApiError { retry_after: Some(seconds), ..ApiError::new(ErrorCode::TooMany, message) }
        })
    }
}

/// When each would have sent all that it did, had it kept to the rate.
#[derive(Debug)]
struct Buckets<K>(HashMap<K, Instant>);

impl<K> Default for Buckets<K> {
    fn default() -> Self {
        Self(HashMap::new())
    }
}

impl<K: Eq + Hash> Buckets<K> {
    fn take(&mut self, who: K, rate: u32, now: Instant) -> Result<(), Duration> {
        if self.0.len() >= REMEMBERED && !self.0.contains_key(&who) {
            self.0.retain(|_, at| *at > now);
            if self.0.len() >= REMEMBERED {
                // So many at the limit at once: that is nobody's traffic, and remembering is bounded.
                self.0.clear();
            }
        }
        let each = Duration::from_secs(1) / rate;
        let at = self.0.entry(who).or_insert(now);
        let next = (*at).max(now) + each;
        let ahead = next.saturating_duration_since(now);
        let wait = ahead.saturating_sub(each * rate.saturating_mul(BURST));
        if !wait.is_zero() {
            return Err(wait);
        }
        *at = next;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn doors(strangers: usize, of_source: usize) -> Arc<Doors> {
        let limits = Limits {
            connections: strangers + 1,
            strangers,
            strangers_of_source: of_source,
            ..Limits::default()
        };
        Arc::new(Doors::new(limits, Arc::default()))
    }

    #[test]
    fn the_oldest_stranger_of_a_source_makes_room_for_its_newest_and_no_other_source_is_touched() {
        let doors = doors(4, 2);
        let at = |last| IpAddr::from([192, 0, 2, last]);
        let mut other = doors.enter(at(9));
        let mut first = doors.enter(at(1));
        let mut second = doors.enter(at(1));
        let mut third = doors.enter(at(1));
        assert!(first.1.try_recv().is_ok());
        for place in [&mut other, &mut second, &mut third] {
            assert_eq!(place.1.try_recv(), Err(oneshot::error::TryRecvError::Empty));
        }
        assert_eq!(doors.count(), (3, 0));
        drop(first);
        assert_eq!(doors.count(), (3, 0), "its place was given away already");
        let _fourth = doors.enter(at(2));
        let _fifth = doors.enter(at(3));
        assert!(other.1.try_recv().is_ok(), "the oldest of all");
        drop(third);
        assert_eq!(doors.count(), (3, 0));
    }

    #[test]
    fn who_is_known_makes_room_for_nobody_and_there_are_so_many_of_them() {
        let doors = doors(2, 2);
        let at = IpAddr::from([192, 0, 2, 1]);
        let mut known = doors.enter(at);
        known.0.introduce();
        let places: Vec<_> = (0..5).map(|_| doors.enter(at)).collect();
        assert!(known.0.is_known() && known.1.try_recv().is_err());
        assert_eq!(doors.count(), (2, 1));
        places[4].0.introduce();
        assert!(!places[4].0.is_known(), "one place for those who are known");
        drop(known);
        places[4].0.introduce();
        assert!(places[4].0.is_known());
        drop(places);
        assert_eq!(doors.count(), (0, 0));
    }

    #[test]
    fn an_ipv6_network_is_one_source() {
        let of = |text: &str| source(text.parse().unwrap());
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:1"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_eq!(of("::ffff:192.0.2.1"), of("192.0.2.1"));
    }

    #[test]
    fn ten_seconds_worth_may_come_at_once_and_then_the_rate_holds() {
        let mut buckets = Buckets::default();
        let now = Instant::now();
        for _ in 0..50 {
            buckets.take("a", 5, now).unwrap();
        }
        let wait = buckets.take("a", 5, now).unwrap_err();
        assert_eq!(wait, Duration::from_millis(200));
        buckets.take("b", 5, now).unwrap();
        buckets.take("a", 5, now + wait).unwrap();
        buckets.take("a", 5, now + wait).unwrap_err();
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut buckets = Buckets::default();
        let now = Instant::now();
        for who in 0..REMEMBERED * 2 {
            buckets.take(who, 5, now).unwrap();
        }
        assert!(buckets.0.len() <= REMEMBERED);
    }
}
