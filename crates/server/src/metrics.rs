//! What the server counts, and all its metrics as text ([`model::exposition`]).
//!
//! What is counted as it happens is here; all else is looked up when somebody asks.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use axum::http::{Method, StatusCode};
use model::UnixMillis;
use model::exposition::{Exposition, Histogram, Kind, Value};

use crate::app::{App, now};

/// What happened since the start.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    /// Requests by method, route and status.
    requests: Mutex<BTreeMap<(String, String, u16), u64>>,
    /// How long they took, by route.
    took: Mutex<BTreeMap<String, Histogram>>,
    /// How long the store's transactions took.
    stored: Mutex<Histogram>,
    store_failures: AtomicU64,
    /// Strangers' connections that were ended because newer ones came.
    made_room: AtomicU64,
    handshakes_failed: AtomicU64,
    copies_refused: AtomicU64,
    /// The store's files, where it has some.
    store_files: Vec<PathBuf>,
}

fn with<T, R>(locked: &Mutex<T>, act: impl FnOnce(&mut T) -> R) -> R {
    act(&mut locked.lock().unwrap_or_else(PoisonError::into_inner))
}

impl Metrics {
    /// Of a server whose store is in these files.
    pub(crate) fn of(store_files: Vec<PathBuf>) -> Self {
        Self { store_files, ..Self::default() }
    }

    pub(crate) fn answered(&self, method: &Method, route: &str, status: StatusCode, took: Duration) {
        // HTTP has as many methods as somebody thinks of.
        let known = [Method::GET, Method::POST, Method::PUT, Method::PATCH, Method::DELETE, Method::HEAD];
        let method = if known.contains(method) { method.as_str() } else { "other" };
        let key = (method.to_owned(), route.to_owned(), status.as_u16());
        with(&self.requests, |requests| *requests.entry(key).or_default() += 1);
        with(&self.took, |all| all.entry(route.to_owned()).or_default().observe(took.as_secs_f64()));
    }

    pub(crate) fn stored(&self, took: Duration, good: bool) {
        with(&self.stored, |stored| stored.observe(took.as_secs_f64()));
        if !good {
            self.store_failures.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(crate) fn made_room(&self) {
        self.made_room.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn copy_refused(&self) {
        self.copies_refused.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn handshake_failed(&self) {
        self.handshakes_failed.fetch_add(1, Ordering::Relaxed);
    }
}

/// All of the server's metrics.
pub(crate) fn text(app: &App) -> String {
    let (metrics, mut out) = (&app.upkeep.metrics, Exposition::default());
    out.family("droveway_build_info", Kind::Gauge, "1, with the version of the program.");
    out.sample("droveway_build_info", &[("version", env!("CARGO_PKG_VERSION"))], Value::Count(1));
    out.family("droveway_requests_total", Kind::Counter, "Requests by method, route and status.");
    with(&metrics.requests, |requests| {
        for ((method, route, status), count) in requests {
            let labels = [("method", method.as_str()), ("route", route), ("code", &status.to_string())];
            out.sample("droveway_requests_total", &labels, Value::Count(*count));
        }
    });
    let name = "droveway_request_duration_seconds";
    out.family(name, Kind::Histogram, "How long answers took; a watch until its first byte.");
    with(&metrics.took, |all| {
        for (route, took) in all.iter() {
            out.histogram(name, &[("route", route)], took);
        }
    });
    let refused = Value::Count(app.upkeep.rates.refused());
    out.single(
        "droveway_rate_limited_total",
        Kind::Counter,
        "Requests refused because they were too many.",
        refused,
    );
    connections(app, &mut out);
    store(app, &mut out);
    for_each_environment(app, &mut out);
    let expires = "droveway_certificate_expiry_timestamp_seconds";
    out.family(expires, Kind::Gauge, "When a certificate runs out, in seconds since 1970.");
    out.sample(expires, &[("certificate", "ca")], seconds(app.ca.expires()));
    out.sample(expires, &[("certificate", "server")], seconds(app.upkeep.certificate.expires()));
    let failures = Value::Count(app.upkeep.audit.failures());
    let help = "Lines that could not be written to the audit log.";
    out.single("droveway_audit_failures_total", Kind::Counter, help, failures);
    out.finish()
}

fn seconds(at: UnixMillis) -> Value {
    Value::Count(at / 1000)
}

fn connections(app: &App, out: &mut Exposition) {
    let metrics = &app.upkeep.metrics;
    let (strangers, known) = app.upkeep.doors.count();
    let name = "droveway_connections";
    out.family(name, Kind::Gauge, "Open connections, by whether the other side showed who it is.");
    for (who, count) in [("stranger", strangers), ("known", known)] {
        out.sample(name, &[("peer", who)], Value::Count(count as u64));
    }
    let count = |count: &AtomicU64| Value::Count(count.load(Ordering::Relaxed));
    let help = "Strangers' connections ended because newer ones came.";
    out.single("droveway_connections_evicted_total", Kind::Counter, help, count(&metrics.made_room));
    let help = "TLS handshakes that failed or took too long.";
    out.single("droveway_handshake_failures_total", Kind::Counter, help, count(&metrics.handshakes_failed));
    let help = "Agents refused because their state directory is a copy of a host's, or an old one.";
    out.single("droveway_copies_refused_total", Kind::Counter, help, count(&metrics.copies_refused));
}

fn store(app: &App, out: &mut Exposition) {
    let name = "droveway_store_transaction_duration_seconds";
    out.family(name, Kind::Histogram, "How long the store's transactions took, until durable.");
    with(&app.upkeep.metrics.stored, |stored| out.histogram(name, &[], stored));
    let failures = Value::Count(app.upkeep.metrics.store_failures.load(Ordering::Relaxed));
    out.single(
        "droveway_store_failures_total",
        Kind::Counter,
        "Transactions that the store could not do.",
        failures,
    );
    if !app.upkeep.metrics.store_files.is_empty() {
        let sizes = app
            .upkeep
            .metrics
            .store_files
            .iter()
            .filter_map(|path| Some(std::fs::metadata(path).ok()?.len()));
        out.single(
            "droveway_store_size_bytes",
            Kind::Gauge,
            "Size of the store's files.",
            Value::Count(sizes.sum()),
        );
    }
    let revision = Value::Count(app.shared.read().revision.0);
    out.single("droveway_store_revision", Kind::Gauge, "The state's number.", revision);
}

/// A family, by its name and help.
type Family = (&'static str, &'static str);
/// A sample, by its environment, a label more, and its value.
type Sample<'a> = (&'a str, Option<(&'static str, &'static str)>, usize);
const HOSTS: Family = ("droveway_hosts", "Hosts, by whether their agent is connected.");
const WATCHERS: Family = ("droveway_watchers", "Open watches of agents.");
const RAN_OUT: Family =
    ("droveway_host_certificates_expired", "Hosts whose agent last showed a certificate that has run out.");
const NETWORKS: Family = ("droveway_networks", "Networks.");
const ENDPOINTS: Family = ("droveway_endpoints", "Endpoints.");
const LEASES: Family = ("droveway_leases", "Blocks and single addresses that hosts hold.");
const TOKENS: Family = ("droveway_tokens", "Join tokens, by whether they still let a host in.");
const KEYS: Family = ("droveway_api_keys", "Keys of people, by whether they still count.");

fn for_each_environment(app: &App, out: &mut Exposition) {
    let state = app.shared.read();
    let mut samples: BTreeMap<Family, Vec<Sample<'_>>> = BTreeMap::new();
    let now = now();
    for (environment, env) in &state.environments {
        let mut put = |family, more, count| {
            samples.entry(family).or_default().push((environment.as_str(), more, count));
        };
        let seen: Vec<_> = env.catalog.hosts.keys().map(|host| app.presence.of(host)).collect();
        let up = seen.iter().filter(|seen| seen.is_some_and(|seen| seen.watches > 0)).count();
        put(HOSTS, Some(("state", "up")), up);
        put(HOSTS, Some(("state", "away")), seen.len() - up);
        put(WATCHERS, None, seen.iter().flatten().map(|seen| seen.watches).sum());
        let expire = seen.iter().flatten().filter_map(|seen| seen.certificate_expires);
        put(RAN_OUT, None, expire.filter(|at| *at <= now).count());
        put(NETWORKS, None, env.catalog.networks.len());
        put(ENDPOINTS, None, env.catalog.endpoints().count());
        put(LEASES, Some(("kind", "block")), env.catalog.blocks.len());
        put(LEASES, Some(("kind", "claim")), env.catalog.claims.len());
        let good = env.tokens.values().filter(|token| token.is_good(now)).count();
        put(TOKENS, Some(("state", "good")), good);
        put(TOKENS, Some(("state", "spent")), env.tokens.len() - good);
        let good = env.api_keys.values().filter(|key| !key.has_ended(now)).count();
        put(KEYS, Some(("state", "good")), good);
        put(KEYS, Some(("state", "ended")), env.api_keys.len() - good);
    }
    for ((family, help), samples) in samples {
        out.family(family, Kind::Gauge, help);
        for (environment, more, count) in samples {
            let labels: Vec<_> = [("environment", environment)].into_iter().chain(more).collect();
            out.sample(family, &labels, Value::Count(count as u64));
        }
    }
}
