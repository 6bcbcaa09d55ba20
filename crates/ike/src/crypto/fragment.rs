//! Messages from their fragments (RFC 7383 §2.6).
//!
//! Invariant: only authenticated fragments are held, of one message, at most [`MAX_FRAGMENTS`] and
//! [`MAX_MESSAGE`] octets of them.

use std::collections::BTreeMap;

use super::OpenedFragment;
use crate::error::{Error, Misbehaved};
use crate::wire::{Fragment, MAX_MESSAGE, Message, PayloadType, parse_chain};

/// Most fragments of one message.
pub const MAX_FRAGMENTS: usize = 256;

/// Collects the fragments of the message of one Message ID, in one direction.
#[derive(Debug, Default)]
pub struct Reassembly {
    message_id: u32,
    total: u16,
    octets: usize,
    first: Option<PayloadType>,
    parts: BTreeMap<u16, Vec<u8>>,
}

impl Reassembly {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether a fragment is worth decrypting: not held yet, and not of an older way to cut the message.
    pub fn wants(&self, fragment: &Fragment<'_>) -> bool {
        usize::from(fragment.total) <= MAX_FRAGMENTS
            && (fragment.header.message_id != self.message_id
                || fragment.total > self.total
                || (fragment.total == self.total && !self.parts.contains_key(&fragment.number)))
    }

    /// Takes a fragment in; gives the message when it was the last one missing. A fragment of another message, or of
    /// the same one cut smaller, drops what was held.
    ///
    /// # Errors
    /// [`Misbehaved::Limit`]; the errors of [`parse_chain`] when the whole message is malformed.
    pub fn add(&mut self, fragment: OpenedFragment) -> Result<Option<Message>, Error> {
        if usize::from(fragment.total) > MAX_FRAGMENTS {
            return Err(Misbehaved::Limit("fragments of a message").into());
        }
        if fragment.header.message_id != self.message_id || fragment.total > self.total {
            *self = Reassembly {
                message_id: fragment.header.message_id,
                total: fragment.total,
                ..Reassembly::default()
            };
        }
        if fragment.total < self.total || self.parts.contains_key(&fragment.number) {
            return Ok(None);
        }
        self.octets += fragment.content.len();
        if self.octets > MAX_MESSAGE {
            *self = Reassembly::default();
            return Err(Misbehaved::Limit("fragments of a message").into());
        }
        if fragment.number == 1 {
            self.first = Some(fragment.first);
        }
        self.parts.insert(fragment.number, fragment.content);
        if self.parts.len() < usize::from(self.total) {
            return Ok(None);
        }
        let held = std::mem::take(self);
        let content: Vec<u8> = held.parts.into_values().flatten().collect();
        let payloads = parse_chain(held.first.unwrap_or(PayloadType::None), &content)?;
        Ok(Some(Message { header: fragment.header, payloads }))
    }
}
