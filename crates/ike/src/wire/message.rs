//! Whole messages: in clear, encrypted (RFC 7296 §3.14), or a fragment of an encrypted one (RFC 7383 §2.5).

use super::payload::Chain;
use super::{HEADER_LEN, Header, Payload, PayloadType, Reader, emit_chain};
use crate::error::{Error, Misuse, syntax};

/// Longest message, and longest content of a message put together from fragments, in octets.
pub const MAX_MESSAGE: usize = 65_535;

/// What stands before IKE, and never before ESP, on a UDP port that both share (RFC 3948 §2.2).
pub const NON_ESP_MARKER: [u8; 4] = [0; 4];

/// A message with its payloads in clear.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// The header.
    pub header: Header,
    /// The payloads: of an encrypted message, those that were inside.
    pub payloads: Vec<Payload>,
}

impl Message {
    /// The octets of a message that is sent in clear.
    ///
    /// # Errors
    /// [`Misuse::TooLong`].
    pub fn emit_clear(&self) -> Result<Vec<u8>, Error> {
        let length = HEADER_LEN + self.payloads.iter().map(Payload::len).sum::<usize>();
        if length > MAX_MESSAGE {
            return Err(Misuse::TooLong("a message").into());
        }
        let first = self.payloads.first().map_or(PayloadType::None, Payload::kind);
        let mut out = Vec::with_capacity(length);
        self.header.emit(&mut out, first, length as u32);
        emit_chain(&self.payloads, &mut out)?;
        Ok(out)
    }
}

/// A datagram as received, without the non-ESP marker: the header is read, what is encrypted is not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Datagram<'a> {
    /// A message in clear.
    Clear(Message),
    /// A message whose payloads are in an SK payload.
    Encrypted(Encrypted<'a>),
    /// One fragment of such a message.
    Fragment(Fragment<'a>),
}

/// An SK payload and what it is bound to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encrypted<'a> {
    /// The header.
    pub header: Header,
    /// Payloads before SK: authenticated, not encrypted. No exchange of RFC 7296 has any; see them as hints.
    pub clear: Vec<Payload>,
    /// The type of the first payload inside.
    pub first: PayloadType,
    /// The whole datagram up to the body of SK: what the AEAD authenticates (RFC 5282 §5.1).
    pub aad: &'a [u8],
    /// IV, ciphertext and tag.
    pub body: &'a [u8],
}

/// An SKF payload and what it is bound to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fragment<'a> {
    /// The header.
    pub header: Header,
    /// The type of the first payload inside; only the first fragment tells it.
    pub first: PayloadType,
    /// Which fragment, from 1.
    pub number: u16,
    /// How many there are; not less than `number`.
    pub total: u16,
    /// The whole datagram up to the IV, fragment numbers included.
    pub aad: &'a [u8],
    /// IV, ciphertext and tag.
    pub body: &'a [u8],
}

impl<'a> Datagram<'a> {
    /// Reads a datagram.
    ///
    /// # Errors
    /// Whatever an attacker may send: nothing here is authenticated.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, Error> {
        let (header, first, length) = Header::parse(bytes)?;
        if bytes.len() > MAX_MESSAGE || usize::try_from(length) != Ok(bytes.len()) {
            return Err(syntax("length in the IKE header"));
        }
        let mut chain = Chain::new(first, &bytes[HEADER_LEN..]);
        let mut clear = Vec::new();
        while let Some(raw) = chain.next()? {
            // SK and SKF end the message; with "next payload" taken as none the chain itself refuses a tail.
            match raw.kind {
                PayloadType::Encrypted => {
                    let at = bytes.len() - chain.remaining() - raw.body.len();
                    chain.next()?;
                    let (aad, body) = bytes.split_at(at);
                    return Ok(Datagram::Encrypted(Encrypted { header, clear, first: raw.next, aad, body }));
                }
                PayloadType::EncryptedFragment => {
                    let at = bytes.len() - chain.remaining() - raw.body.len();
                    chain.next()?;
                    let mut r = Reader::new(raw.body);
                    let (number, total) = (r.u16("SKF payload")?, r.u16("SKF payload")?);
                    if number == 0 || number > total {
                        return Err(syntax("fragment number"));
                    }
                    let (aad, body) = bytes.split_at(at + 4);
                    let first = raw.next;
                    return Ok(Datagram::Fragment(Fragment { header, first, number, total, aad, body }));
                }
                _ => clear.extend(raw.parse()?),
            }
        }
        Ok(Datagram::Clear(Message { header, payloads: clear }))
    }

    /// The header.
    pub fn header(&self) -> &Header {
        match self {
            Datagram::Clear(message) => &message.header,
            Datagram::Encrypted(encrypted) => &encrypted.header,
            Datagram::Fragment(fragment) => &fragment.header,
        }
    }
}
