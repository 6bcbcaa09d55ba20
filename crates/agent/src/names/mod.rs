//! The names of one network, answered on `169.254.169.250` in its router on this host (DESIGN §8).
//!
//! ```text
//! container ──▶ router :53 (by NAT, whatever its destination) ──▶ serve ──▶ Zone::answer      ours
//!                                                                   └────▶ Forwarder::ask     the rest
//! ```
//!
//! [`Zone`] is a pure value made from the [`View`](crate::View); [`serve()`] holds the sockets of one router and reads the
//! newest zone for each question; [`Forwarder`] asks the host's own resolvers from the host's own namespace.
//!
//! Invariants: a new zone never closes a socket; a name below our own domain never leaves the host; an answer comes
//! from the address that was asked (the router's NAT sees to it). RFC 1035, 2181, 2308, 6891 (EDNS(0)), 7766 (TCP), 8020,
//! 8482, 5625 (forwarding).

mod budget;
mod forward;
mod message;
mod resolv;
mod serve;
mod zone;

pub(crate) use budget::{Budget, Permit};
pub use forward::{Forwarder, Unanswered, Upstreams};
pub(crate) use resolv::nameservers;
pub use resolv::{Resolv, resolv_conf};
pub use serve::serve;
pub use zone::{Outcome, TTL, Zone, Zones};

#[cfg(test)]
pub(crate) use zone::tests as fixtures;
