//! IKEv2 (RFC 7296) in both roles: state in, bytes out.
//!
//! From the bottom: [`wire`] turns bytes into values and back, [`crypto`] makes and uses keys, [`proposal`]
//! agrees on a suite, [`auth`] proves who speaks.
//!
//! Invariant: this room is pure. Time and randomness come in; nothing here opens a socket, reads a file or asks
//! a clock, and no key is ever printed.

pub mod auth;
pub mod crypto;
mod error;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
pub mod proposal;
mod random;
pub mod wire;

pub use error::{AuthFailure, Error, Incompatible, Misbehaved, Misuse};
pub use random::{Random, Seeded};
