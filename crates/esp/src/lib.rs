//! ESP in tunnel mode (RFC 4303) with AES-GCM-16 (RFC 4106): seal, open, replay window, SA table.
//!
//! [`Outbound`] seals inner packets in place, [`Inbound`] opens what came from the peer, and [`SaTable`] finds the
//! inbound SA of an SPI. All of them are shared between control and workers by `Arc`; a worker takes a [`Burst`] or
//! a [`Receiver`] once per batch, so that per packet there is neither lock nor atomic operation.
//!
//! Invariant: an outbound sequence number, and with it a nonce, is never used twice (RFC 4106 §3.1).
//! Invariant: the replay window is asked before authentication and moved only after it (RFC 4303 §3.4.3).
//! Invariant: no inner packet is given out whose source and destination the policy does not allow.
//! Invariant: workers never wait for control, and miss nothing that it published ([`Published`]).

mod counters;
mod inbound;
mod key;
mod outbound;
mod policy;
mod reason;
mod table;
mod window;

#[cfg(test)]
mod tests;

pub use counters::{Counters, Snapshot};
pub use inbound::{Inbound, Opened, Receiver};
pub use key::{BadKey, KeyMaterial, Suite};
pub use outbound::{Burst, Limits, Outbound};
pub use policy::InnerPolicy;
pub use reason::Reason;
pub use table::{Entry, Published, Reader, SaTable};
pub use window::WINDOW;

/// Security parameters index: names an SA at its receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Spi(u32);

impl Spi {
    /// `None` for 0, which is never on the wire, and for 1 to 255, which are reserved (RFC 4303 §2.1).
    pub fn new(spi: u32) -> Option<Self> {
        (spi > 255).then_some(Self(spi))
    }

    /// As it is on the wire.
    pub fn get(self) -> u32 {
        self.0
    }
}

impl std::fmt::Display for Spi {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:08x}", self.0)
    }
}

/// Whether sequence numbers have 64 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sequence {
    /// 32 bits; the SA ends with them.
    Short,
    /// Extended sequence numbers (RFC 4303 §2.2.1): 64 bits, of which 32 are sent.
    Extended,
}
