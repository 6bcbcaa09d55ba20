//! What strangers may cost us (RFC 7296 §2.6): half-open IKE SAs counted in all and by source, cookies once there are
//! many, and a bound on unprotected answers, with one of its own for addresses where peers are expected.
//!
//! Invariant: before a cookie proves that a source receives what we send to it, and while many are half-open, a
//! request costs one hash and leaves nothing behind.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::time::{Duration, Instant};

use aws_lc_rs::hmac;

use crate::config::{Limits, Timing};
use crate::random::{Random, Seeded};

/// How long a cookie secret is used; the one before it is honoured as long again.
const SECRET_AGE: Duration = Duration::from_mins(1);

/// The half-open IKE SAs of strangers and the secrets of their cookies.
pub(super) struct Strangers {
    /// By our SPI.
    half_open: BTreeMap<u64, HalfOpen>,
    by_source: BTreeMap<IpAddr, usize>,
    secrets: [Secret; 2],
    /// Where peers are expected.
    expected: BTreeSet<IpAddr>,
    /// Unprotected answers of this second: to strangers, and to where peers are expected.
    answers: [u32; 2],
    refilled: Instant,
}

struct HalfOpen {
    source: IpAddr,
    until: Instant,
}

struct Secret {
    version: u8,
    key: hmac::Key,
    since: Instant,
}

/// What is to be done with a first request.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Go on with it.
    Proceed,
    /// Answer with this cookie and remember nothing.
    Cookie(Vec<u8>),
    /// Drop it.
    Drop,
}

impl Secret {
    fn new(version: u8, rng: &mut Seeded, since: Instant) -> Self {
        Self { version, key: hmac::Key::new(hmac::HMAC_SHA256, &rng.bytes::<32>()), since }
    }

    /// `Cookie = <VersionIDofSecret> | Hash(Ni | IPi | SPIi | <secret>)` (RFC 7296 §2.6).
    fn cookie(&self, nonce: &[u8], from: SocketAddr, spi: u64) -> Vec<u8> {
        let mut hash = hmac::Context::with_key(&self.key);
        hash.update(nonce);
        match from.ip() {
            IpAddr::V4(ip) => hash.update(&ip.octets()),
            IpAddr::V6(ip) => hash.update(&ip.octets()),
        }
        hash.update(&spi.to_be_bytes());
        let mut cookie = vec![self.version];
        cookie.extend_from_slice(hash.sign().as_ref());
        cookie
    }
}

impl Strangers {
    pub(super) fn new(rng: &mut Seeded, now: Instant) -> Self {
        Self {
            half_open: BTreeMap::new(),
            by_source: BTreeMap::new(),
            secrets: [Secret::new(1, rng, now), Secret::new(0, rng, now)],
            expected: BTreeSet::new(),
            answers: [0, 0],
            refilled: now,
        }
    }

    /// Whether a first request may go on. `cookie` is what it brought.
    pub(super) fn judge(
        &mut self,
        limits: &Limits,
        rng: &mut Seeded,
        from: SocketAddr,
        (spi, nonce, cookie): (u64, &[u8], Option<&[u8]>),
        now: Instant,
    ) -> Verdict {
        self.expire(now);
        if now.saturating_duration_since(self.secrets[0].since) >= SECRET_AGE {
            let version = self.secrets[0].version.wrapping_add(1);
            self.secrets.swap(0, 1);
            self.secrets[0] = Secret::new(version, rng, now);
        }
        if self.half_open.len() >= limits.cookie_threshold {
            let proven = cookie.is_some_and(|cookie| {
                self.secrets.iter().any(|secret| {
                    let expected = secret.cookie(nonce, from, spi);
                    aws_lc_rs::constant_time::verify_slices_are_equal(&expected, cookie).is_ok()
                })
            });
            if !proven {
                return Verdict::Cookie(self.secrets[0].cookie(nonce, from, spi));
            }
        }
        let of_source = self.by_source.get(&source(from)).copied().unwrap_or(0);
        if self.half_open.len() >= limits.half_open || of_source >= limits.half_open_per_source {
            return Verdict::Drop;
        }
        Verdict::Proceed
    }

    /// A half-open IKE SA was made for a source.
    pub(super) fn opened(&mut self, local_spi: u64, from: SocketAddr, timing: &Timing, now: Instant) {
        let source = source(from);
        self.half_open.insert(local_spi, HalfOpen { source, until: now + timing.half_open });
        *self.by_source.entry(source).or_default() += 1;
    }

    /// It authenticated: it is no stranger's any more.
    pub(super) fn authenticated(&mut self, local_spi: u64) {
        if let Some(half_open) = self.half_open.remove(&local_spi) {
            self.release(half_open.source);
        }
    }

    /// Where peers are expected from now on.
    pub(super) fn expect(&mut self, addresses: BTreeSet<IpAddr>) {
        self.expected = addresses;
    }

    /// Whether one more unprotected answer may go there this second.
    pub(super) fn may_answer(&mut self, limits: &Limits, to: SocketAddr, now: Instant) -> bool {
        if now.saturating_duration_since(self.refilled) >= Duration::from_secs(1) {
            self.refilled = now;
            self.answers = [0, 0];
        }
        let limit = [limits.unprotected_per_second, limits.unprotected_to_expected];
        let kind = usize::from(self.expected.contains(&to.ip().to_canonical()));
        self.answers[kind] = self.answers[kind].saturating_add(1);
        self.answers[kind] <= limit[kind]
    }

    /// How many are half-open.
    pub(super) fn count(&self) -> usize {
        self.half_open.len()
    }

    /// Forgets those whose time is over.
    pub(super) fn expire(&mut self, now: Instant) {
        let over: Vec<u64> =
            self.half_open.iter().filter(|(_, it)| it.until <= now).map(|(spi, _)| *spi).collect();
        for spi in over {
            self.authenticated(spi);
        }
    }

    fn release(&mut self, source: IpAddr) {
        if let Some(count) = self.by_source.get_mut(&source) {
            *count -= 1;
            if *count == 0 {
                self.by_source.remove(&source);
            }
        }
    }
}

/// What counts as one source: an IPv4 address, or an IPv6 /64, which one owner has whole.
fn source(from: SocketAddr) -> IpAddr {
    match from.ip().to_canonical() {
        IpAddr::V4(ip) => IpAddr::V4(ip),
        IpAddr::V6(ip) => IpAddr::V6(Ipv6Addr::from(u128::from(ip) >> 64 << 64)),
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "an Instant can only be had from the clock")]
mod tests {
    use super::*;

    struct Rig {
        strangers: Strangers,
        rng: Seeded,
        limits: Limits,
        timing: Timing,
        now: Instant,
    }

    impl Rig {
        fn new() -> Self {
            let (mut rng, now) = (Seeded::new(b"strangers"), Instant::now());
            let limits =
                Limits { half_open: 8, half_open_per_source: 3, cookie_threshold: 5, ..Limits::default() };
            Self { strangers: Strangers::new(&mut rng, now), rng, limits, timing: Timing::default(), now }
        }

        fn judge(&mut self, from: &str, spi: u64, cookie: Option<&[u8]>) -> Verdict {
            let from = from.parse().unwrap();
            self.strangers.judge(&self.limits, &mut self.rng, from, (spi, b"nonce", cookie), self.now)
        }

        fn open(&mut self, from: &str, spi: u64) {
            self.strangers.opened(spi, from.parse().unwrap(), &self.timing, self.now);
        }
    }

    #[test]
    fn one_source_has_a_bounded_number_of_half_open_sas_until_they_expire() {
        let mut rig = Rig::new();
        for spi in 0..3 {
            assert_eq!(rig.judge("[2001:db8::1]:500", spi, None), Verdict::Proceed);
            rig.open("[2001:db8::1]:500", spi);
        }
        assert_eq!(rig.judge("[2001:db8::2]:9", 9, None), Verdict::Drop, "the same /64");
        assert_eq!(rig.judge("192.0.2.1:9", 9, None), Verdict::Proceed);
        rig.now += rig.timing.half_open;
        assert_eq!(rig.judge("[2001:db8::2]:9", 9, None), Verdict::Proceed);
        assert_eq!(rig.strangers.count(), 0);
    }

    #[test]
    fn under_load_only_who_returns_its_own_cookie_goes_on() {
        let mut rig = Rig::new();
        for spi in 0..5u64 {
            rig.open(&format!("192.0.2.{spi}:500"), spi);
        }
        let Verdict::Cookie(cookie) = rig.judge("198.51.100.1:500", 77, None) else {
            panic!("no cookie asked")
        };
        assert_eq!(rig.judge("198.51.100.1:500", 77, Some(&cookie)), Verdict::Proceed);
        assert!(matches!(rig.judge("198.51.100.2:500", 77, Some(&cookie)), Verdict::Cookie(_)));
        assert!(matches!(rig.judge("198.51.100.1:500", 78, Some(&cookie)), Verdict::Cookie(_)));
        rig.strangers.authenticated(0);
        assert_eq!(rig.judge("198.51.100.2:500", 77, None), Verdict::Proceed);
    }

    #[test]
    fn a_cookie_outlives_one_change_of_secret_and_not_two() {
        let mut rig = Rig::new();
        rig.timing.half_open = Duration::from_hours(1);
        for spi in 0..5u64 {
            rig.open(&format!("192.0.2.{spi}:500"), spi);
        }
        let Verdict::Cookie(cookie) = rig.judge("198.51.100.1:500", 77, None) else {
            panic!("no cookie asked")
        };
        rig.now += SECRET_AGE;
        assert_eq!(rig.judge("198.51.100.1:500", 77, Some(&cookie)), Verdict::Proceed);
        rig.now += SECRET_AGE;
        assert!(matches!(rig.judge("198.51.100.1:500", 77, Some(&cookie)), Verdict::Cookie(_)));
    }

    #[test]
    fn unprotected_answers_are_bounded_in_every_second_and_a_flood_leaves_peers_theirs() {
        let mut rig = Rig::new();
        (rig.limits.unprotected_per_second, rig.limits.unprotected_to_expected) = (2, 3);
        rig.strangers.expect(["192.0.2.1".parse().unwrap()].into());
        let allowed = |rig: &mut Rig, to: &str| {
            let to = to.parse().unwrap();
            (0..5).filter(|_| rig.strangers.may_answer(&rig.limits, to, rig.now)).count()
        };
        assert_eq!(allowed(&mut rig, "198.51.100.1:500"), 2);
        assert_eq!(allowed(&mut rig, "198.51.100.2:500"), 0, "whoever they are");
        assert_eq!(allowed(&mut rig, "192.0.2.1:500"), 3);
        rig.now += Duration::from_secs(1);
        assert_eq!(allowed(&mut rig, "[::ffff:192.0.2.1]:500"), 3);
        assert_eq!(allowed(&mut rig, "198.51.100.1:500"), 2);
    }
}
