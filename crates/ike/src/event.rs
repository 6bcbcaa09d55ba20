//! What an [`Endpoint`](crate::Endpoint) tells its owner.
//!
//! Invariant: traffic keys leave through [`Event::ChildInbound`] and [`Event::ChildOutbound`] and nowhere else. The
//! order within a rekey: the new child receives, the peer has confirmed it, the new child sends, the old one goes.

use std::fmt;
use std::net::SocketAddr;
use std::time::Instant;

use crate::config::{ChildId, PeerId};
use crate::crypto::TrafficKey;
use crate::proposal::EspSuite;
use crate::wire::{EspSpi, IpSelector, NotifyType, SecurityLabel};

/// Both ends of a path, from our side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Path {
    /// Our address and port.
    pub local: SocketAddr,
    /// The peer's address and port, as we see them.
    pub remote: SocketAddr,
}

/// A datagram to send: the whole UDP payload, marker included (RFC 7296 §2.23).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transmit {
    /// From where to where.
    pub path: Path,
    /// The UDP payload.
    pub bytes: Vec<u8>,
}

/// Something that happened.
#[derive(Debug)]
pub enum Event {
    /// An IKE SA with this peer is up; before there was none.
    PeerUp {
        /// Which.
        peer: PeerId,
        /// Where it is.
        path: Path,
    },
    /// The last IKE SA with this peer is gone, and its children with it.
    PeerDown {
        /// Which.
        peer: PeerId,
        /// Why.
        why: Failure,
    },
    /// An attempt to connect failed.
    PeerFailed {
        /// Which.
        peer: PeerId,
        /// Why.
        why: Failure,
        /// When we try again by ourselves.
        retry_at: Option<Instant>,
    },
    /// The peer is at another address now (or we are): all its children use this path.
    PeerMoved {
        /// Which.
        peer: PeerId,
        /// The path from now on.
        path: Path,
    },
    /// Begin to receive on this SA.
    ChildInbound(ChildSa),
    /// Send this child's packets on this SA from now on, and no longer on any other with the same
    /// [`ChildSa::slot`].
    ChildOutbound(ChildSa),
    /// Forget this SA, in both directions; a later one may have replaced it in its slot.
    ChildDeleted {
        /// Whose.
        peer: PeerId,
        /// Which wanted child.
        slot: Slot,
        /// The SPI that we received on.
        inbound: EspSpi,
        /// The SPI that we sent on.
        outbound: EspSpi,
        /// Why.
        why: Failure,
    },
    /// Someone could not prove to be a peer of ours, or had no suite in common with us.
    Refused {
        /// Where it came from.
        path: Path,
        /// Why.
        why: Failure,
    },
    /// A wanted child could not be made.
    ChildFailed {
        /// Whose.
        peer: PeerId,
        /// Which wanted child.
        child: ChildId,
        /// Why.
        why: Failure,
        /// When we try again.
        retry_at: Instant,
    },
}

/// The wanted child that an SA serves, and the peer's worker that it was made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot {
    /// Which wanted child.
    pub child: ChildId,
    /// The worker that the SA was made for, as whoever made it said (RFC 9611).
    pub worker: Option<u32>,
}

/// What went over a CHILD_SA so far.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ChildUse {
    /// Bytes received.
    pub bytes_in: u64,
    /// Packets received.
    pub packets_in: u64,
    /// Bytes sent.
    pub bytes_out: u64,
    /// Packets sent.
    pub packets_out: u64,
}

/// One direction of a CHILD_SA, with its key.
#[derive(Debug, Clone)]
pub struct ChildSa {
    /// Whose.
    pub peer: PeerId,
    /// What it serves.
    pub slot: Slot,
    /// The SPI of this direction.
    pub spi: EspSpi,
    /// The SPI that we receive on: the name of the pair of SAs.
    pub inbound: EspSpi,
    /// The key and salt of this direction.
    pub key: TrafficKey,
    /// The suite, ESN included.
    pub suite: EspSuite,
    /// The security label, if it has one.
    pub label: Option<SecurityLabel>,
    /// Our side's addresses, as agreed.
    pub local: Vec<IpSelector>,
    /// The peer's side's addresses, as agreed.
    pub remote: Vec<IpSelector>,
    /// Where the peer is now.
    pub path: Path,
}

/// How it stands with a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Status {
    /// It is for the peer to begin, or there is no address to try.
    Waiting,
    /// An attempt is under way.
    Connecting,
    /// An IKE SA is up.
    Up {
        /// Since when without a break.
        since: Instant,
        /// Where the peer is.
        path: Path,
    },
    /// The last attempt failed.
    Failed {
        /// Why.
        why: Failure,
        /// When the next begins.
        retry_at: Instant,
    },
}

/// Why something ended or could not begin.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    /// No answer.
    Silent,
    /// The peer refused our proof of identity.
    RefusedUs,
    /// We refuse the peer's proof of identity; the reason says how it failed.
    RefusedPeer(String),
    /// The peer cannot do what is asked of it, or we what it asks.
    Refused(String),
    /// This host's own settings cannot work.
    Ours(String),
    /// No suite in common.
    NoProposal,
    /// The traffic selectors (or the label) do not fit together.
    NoSelectors,
    /// The peer sent what the standard forbids.
    Misbehaved(String),
    /// The peer answered with an error that has no better name here.
    PeerError(NotifyType),
    /// The peer closed it.
    ClosedByPeer,
    /// We closed it, because we were told to.
    ClosedByUs,
    /// Another took its place.
    Replaced,
    /// It lived too long and could not be renewed.
    Expired,
    /// The peer began anew and knows nothing of it.
    PeerRestarted,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Silent => f.write_str("no answer from the peer; is its UDP port open to us?"),
            Self::RefusedUs => f.write_str("the peer refused our identity or key (AUTHENTICATION_FAILED)"),
            Self::RefusedPeer(how) => write!(f, "the peer did not prove its identity: {how}"),
            Self::Refused(how) => f.write_str(how),
            Self::Ours(how) => write!(f, "this host is at fault: {how}"),
            Self::NoProposal => f.write_str("no cipher suite in common (NO_PROPOSAL_CHOSEN)"),
            Self::NoSelectors => {
                f.write_str("the two sides' addresses or networks do not fit together (TS_UNACCEPTABLE)")
            }
            Self::Misbehaved(how) => write!(f, "the peer broke the protocol: {how}"),
            Self::PeerError(notify) => write!(f, "the peer answered {notify}"),
            Self::ClosedByPeer => f.write_str("closed by the peer"),
            Self::ClosedByUs => f.write_str("closed here"),
            Self::Replaced => f.write_str("replaced by another"),
            Self::Expired => f.write_str("its lifetime ended before it could be renewed"),
            Self::PeerRestarted => f.write_str("the peer began anew"),
        }
    }
}
