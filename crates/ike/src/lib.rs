//! IKEv2 (RFC 7296) in both roles: state in, bytes out.
//!
//! From the bottom: [`wire`] turns bytes into values and back, [`crypto`] makes and uses keys, [`proposal`]
//! agrees on a suite, [`auth`] proves who speaks. On them stands the machine: an [`Endpoint`] has all IKE SAs of one
//! host, each a queue of tasks and one exchange each way; what comes out is datagrams and [`Event`]s.
//!
//! Invariant: this room is pure. Time and randomness come in; nothing here opens a socket, reads a file or asks
//! a clock, and no key is ever printed.

pub mod auth;
mod chance;
mod config;
pub mod crypto;
mod endpoint;
mod error;
mod event;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod proposal;
mod random;
mod sa;
pub mod wire;

pub use config::{ChildConfig, ChildId, Config, Initiate, Limits, PeerConfig, PeerId, PeerKind, Timing};
pub use endpoint::{Endpoint, SaView};
pub use error::{AuthFailure, Error, Incompatible, Misbehaved, Misuse};
pub use event::{ChildSa, ChildUse, Event, Failure, Path, Slot, Status, Transmit};
pub use random::{Random, Seeded};
