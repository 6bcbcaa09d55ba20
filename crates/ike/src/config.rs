//! What the owner of an [`Endpoint`](crate::Endpoint) decides: who we are, who the peers are, which children are
//! wanted, and how long everything may take.
//!
//! Nothing here knows what a host or a network means: a peer is a [`PeerId`] that the owner chose, a child a
//! [`ChildId`] that the owner chose, and a network is at most a security label (RFC 9478).

use std::time::Duration;

use crate::auth::{Credential, Identity, Trust};
use crate::event::Path;
use crate::proposal::{EspOffer, IkeOffer};
use crate::wire::{IpSelector, SecurityLabel};

/// A peer, as its owner names it. Lower ids come first wherever order can show.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerId(pub u64);

/// A wanted child of one peer, as its owner names it: one per shared network and worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ChildId(pub u64);

/// Everything that holds for all peers of one endpoint.
#[derive(Debug, Clone)]
pub struct Config {
    /// Our UDP port that IKE shares with ESP.
    pub port: u16,
    /// What is accepted for an IKE SA from a peer whose address is not known beforehand.
    pub ike: IkeOffer,
    /// Bounds on what strangers may make us hold.
    pub limits: Limits,
    /// How long everything may take.
    pub timing: Timing,
    /// How many workers receive for us. The SPI of a child that is for one of them leaves that worker as its remainder, so
    /// that a socket filter finds the worker of a packet by a division.
    pub workers: u32,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            port: ESP_PORT,
            ike: IkeOffer::default(),
            limits: Limits::default(),
            timing: Timing::default(),
            workers: 1,
        }
    }
}

/// The UDP port that IKE and ESP share (RFC 3948 §2).
pub(crate) const ESP_PORT: u16 = 4500;

/// Who begins the first exchange with a peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Initiate {
    /// We do, at once: the lower id of the two, or the one behind a NAT.
    First,
    /// The peer should; we try as well if it has not after [`Timing::patience`].
    Second,
    /// Only the peer can (it is behind a NAT and we are not reachable from our side of it).
    Never,
}

/// One peer.
#[derive(Debug, Clone)]
pub struct PeerConfig {
    /// The identity that it must prove.
    pub id: Identity,
    /// The identity that we prove to it.
    pub our_id: Identity,
    /// What proves its identity.
    pub trust: Trust,
    /// What proves ours.
    pub credential: Credential,
    /// Ways to where it may be, in the order to try; may be empty if it is to come to us. One from port 500 goes on from
    /// [`Config::port`] to the peer's 4500 as soon as the peer has answered (RFC 7296 §2.23).
    pub paths: Vec<Path>,
    /// Who begins.
    pub initiate: Initiate,
    /// Whether the peer is one of ours, or a standard box of another make.
    pub kind: PeerKind,
    /// Suites for the IKE SA.
    pub ike: IkeOffer,
    /// The children that are wanted with it.
    pub children: Vec<ChildConfig>,
}

/// What may be assumed of a peer beyond the standard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerKind {
    /// Another endpoint of this implementation: follows addresses from any authenticated packet.
    Native,
    /// Another implementation: we feign a NAT so that it encapsulates in UDP always, move it only as RFC 7296
    /// §2.23 and RFC 4555 allow, and tell it of our own moves by MOBIKE.
    Foreign,
}

/// One wanted child. Its id is its identity: a child with other selectors, label or worker takes another id.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChildConfig {
    /// The owner's name of it.
    pub id: ChildId,
    /// The network, for all but the default one (RFC 9478).
    pub label: Option<SecurityLabel>,
    /// The worker that it is for (RFC 9611 `SA_RESOURCE_INFO`), so that equal selectors may have several children.
    pub worker: Option<u32>,
    /// Our side's addresses.
    pub local: Vec<IpSelector>,
    /// The peer's side's addresses.
    pub remote: Vec<IpSelector>,
    /// Suites.
    pub esp: EspOffer,
}

/// Bounds on what strangers, and peers that are not well, may make us hold or compute.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Half-open IKE SAs in all. Beyond it, requests are dropped.
    pub half_open: usize,
    /// Half-open IKE SAs from one address (an IPv6 /64 counts as one). A try that failed keeps its place until it
    /// would have expired, so this also bounds the key exchanges that one address can make us compute.
    pub half_open_per_source: usize,
    /// From this many half-open IKE SAs on, a cookie is asked for (RFC 7296 §2.6).
    pub cookie_threshold: usize,
    /// Unprotected answers (cookies, refusals, `INVALID_IKE_SPI`) a second, to all strangers.
    pub unprotected_per_second: u32,
    /// The same to all addresses where peers are expected ([`Endpoint::expect`](crate::Endpoint::expect)): a flood from elsewhere
    /// leaves them theirs.
    pub unprotected_to_expected: u32,
    /// `CHILD_SA`s that one IKE SA may have for each that is wanted with the peer, those about to be replaced or deleted
    /// counted too. Beyond it the peer is told `NO_ADDITIONAL_SAS` (RFC 7296 §1.3). A peer may have many more workers than we,
    /// each with a child of its own (RFC 9611), and all of them may be about to be replaced.
    pub children_per_wanted: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            half_open: 1024,
            half_open_per_source: 16,
            cookie_threshold: 64,
            unprotected_per_second: 200,
            unprotected_to_expected: 1000,
            children_per_wanted: 256,
        }
    }
}

/// How long everything may take.
#[derive(Debug, Clone)]
pub struct Timing {
    /// Wait before the first retransmission; each next wait is twice as long, up to `retransmit_max`.
    pub retransmit_first: Duration,
    /// The longest wait between retransmissions.
    pub retransmit_max: Duration,
    /// Sends in all before an established IKE SA is given up (RFC 7296 §2.4).
    pub tries: u32,
    /// Sends in all before an attempt to connect is given up.
    pub connect_tries: u32,
    /// Wait after the first failed attempt to connect; doubles, up to `backoff_max`, with jitter.
    pub backoff_first: Duration,
    /// The longest wait between attempts to connect.
    pub backoff_max: Duration,
    /// How long [`Initiate::Second`] waits for the peer to begin, and how long a stranger waits for us to hear of it before it
    /// is refused.
    pub patience: Duration,
    /// Silence after which the peer is asked whether it lives (RFC 7296 §2.4).
    pub liveness: Duration,
    /// Silence towards the peer after which the one behind a NAT sends a keepalive (RFC 3948 §4).
    pub keepalive: Duration,
    /// How long a half-open IKE SA may take to authenticate.
    pub half_open: Duration,
    /// Age at which an IKE SA is rekeyed (less the jitter).
    pub ike_rekey: Duration,
    /// Age at which an IKE SA is authenticated anew, a new one made first; `None`: never, unless the peer asks
    /// (RFC 4478).
    pub reauth: Option<Duration>,
    /// Age at which a child is rekeyed (less the jitter).
    pub child_rekey: Duration,
    /// Bytes, either way, at which a child is rekeyed (less the jitter).
    pub child_bytes: u64,
    /// Packets, either way, at which a child is rekeyed (less the jitter).
    pub child_packets: u64,
    /// Tenths by which each lifetime is shortened at most, by chance, so that two ends seldom begin together.
    pub jitter_tenths: u32,
    /// How much longer than its rekey age anything may live at all, in tenths of that age.
    pub grace_tenths: u32,
    /// How long a replaced child still receives, for packets under way.
    pub linger: Duration,
    /// The largest UDP payload for IKE when the peer can reassemble (RFC 7383 §2.5.1).
    pub fragment: usize,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            retransmit_first: Duration::from_millis(500),
            retransmit_max: Duration::from_secs(2),
            tries: 10,
            connect_tries: 6,
            backoff_first: Duration::from_millis(500),
            backoff_max: Duration::from_secs(30),
            patience: Duration::from_secs(1),
            liveness: Duration::from_secs(10),
            keepalive: Duration::from_secs(20),
            half_open: Duration::from_secs(20),
            ike_rekey: Duration::from_hours(4),
            reauth: None,
            child_rekey: Duration::from_hours(1),
            child_bytes: 1 << 40,
            child_packets: 1 << 36,
            jitter_tenths: 2,
            grace_tenths: 2,
            linger: Duration::from_secs(5),
            fragment: 1200,
        }
    }
}
