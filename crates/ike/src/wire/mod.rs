//! IKEv2 on the wire (RFC 7296 §3): bytes to values and back.
//!
//! ```text
//!                      1                   2                   3
//!  0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
//! +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
//! | Next Payload  |C|  RESERVED   |         Payload Length        |
//! +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
//! ```
//!
//! Invariant: for each type `parse(emit(x)) == x` and `emit(x).len() == x.len()`; no input panics, and what an
//! input makes us allocate is bounded by a small multiple of its own length.

mod code;
mod header;
mod id;
mod message;
mod notify;
mod payload;
mod sa;
mod simple;
mod ts;

pub use header::{ExchangeType, Flags, HEADER_LEN, Header, IkeSpi, IkeSpis};
pub use id::{IdType, Identification};
pub use message::{Datagram, Encrypted, Fragment, MAX_MESSAGE, Message, NON_ESP_MARKER};
pub use notify::{HashAlgorithm, Notify, NotifyType};
pub use payload::{MAX_PAYLOADS, Payload, PayloadType, emit_chain, parse_chain};
pub use sa::{
    Attribute, AttributeValue, MAX_PROPOSALS, MAX_TRANSFORMS, Proposal, Protocol, SaPayload, Transform,
    TransformType,
};
pub use simple::{
    AuthMethod, Authentication, CertEncoding, CertRequest, Certificate, Delete, KeyExchange, NONCE_MAX,
    NONCE_MIN, Nonce,
};
pub use ts::{IpSelector, MAX_SELECTORS, SecurityLabel, TrafficSelector, TrafficSelectors};

use crate::error::{Error, syntax};

/// The SPI of an ESP SA, as its receiver chose it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct EspSpi(pub u32);

/// Reads a slice from its front; each read names what it reads for the error.
pub(crate) struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Self {
        Reader { rest: bytes }
    }

    pub(crate) fn remaining(&self) -> usize {
        self.rest.len()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    pub(crate) fn take(&mut self, len: usize, what: &'static str) -> Result<&'a [u8], Error> {
        let (taken, rest) = self.rest.split_at_checked(len).ok_or_else(|| syntax(what))?;
        self.rest = rest;
        Ok(taken)
    }

    pub(crate) fn array<const N: usize>(&mut self, what: &'static str) -> Result<[u8; N], Error> {
        let (taken, rest) = self.rest.split_first_chunk::<N>().ok_or_else(|| syntax(what))?;
        self.rest = rest;
        Ok(*taken)
    }

    pub(crate) fn u8(&mut self, what: &'static str) -> Result<u8, Error> {
        Ok(self.array::<1>(what)?[0])
    }

    pub(crate) fn u16(&mut self, what: &'static str) -> Result<u16, Error> {
        Ok(u16::from_be_bytes(self.array(what)?))
    }

    pub(crate) fn u32(&mut self, what: &'static str) -> Result<u32, Error> {
        Ok(u32::from_be_bytes(self.array(what)?))
    }

    pub(crate) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.rest)
    }
}

#[cfg(test)]
mod tests;
