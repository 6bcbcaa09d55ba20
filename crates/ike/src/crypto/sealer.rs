//! SK and SKF payloads with AES-GCM (RFC 5282, RFC 7383 §2.5).
//!
//! ```text
//! | IKE header | … | Next, C, Length [| Number | Total ] | IV (8) | ciphertext: payloads, pad length | tag (16) |
//! |<------------------- authenticated ---------------->|
//! ```
//!
//! The nonce is salt ‖ IV; the IV counts from zero under a key that is new with each IKE SA, so it never repeats.

use aws_lc_rs::aead::{Aad, LessSafeKey, NONCE_LEN, Nonce as AeadNonce, UnboundKey};

use super::keys::SALT_LEN;
use super::{Encr, MAX_FRAGMENTS, Secret};
use crate::error::{Error, Misbehaved, Misuse, syntax};
use crate::wire::{
    Encrypted, Fragment, HEADER_LEN, Header, MAX_MESSAGE, Message, Payload, PayloadType, emit_chain,
    parse_chain,
};

const IV_LEN: usize = 8;
const TAG_LEN: usize = 16;
/// The generic payload header.
const GENERIC: usize = 4;
/// What SK adds to the payloads: headers, IV, pad length, tag.
const SK_OVERHEAD: usize = HEADER_LEN + GENERIC + IV_LEN + 1 + TAG_LEN;
/// What SKF adds: the fragment numbers more.
const SKF_OVERHEAD: usize = SK_OVERHEAD + 4;

struct Key {
    aead: LessSafeKey,
    salt: [u8; SALT_LEN],
}

impl Key {
    fn new(encr: Encr, sk_e: &Secret) -> Result<Self, Error> {
        let wrong = Misuse::Key("SK_e has another length than the cipher wants");
        let (key, salt) = sk_e.expose().split_at_checked(encr.key_len()).ok_or(wrong.clone())?;
        let salt = salt.try_into().map_err(|_| wrong.clone())?;
        let key = UnboundKey::new(encr.algorithm(), key).map_err(|_| wrong)?;
        Ok(Key { aead: LessSafeKey::new(key), salt })
    }

    fn nonce(&self, iv: [u8; IV_LEN]) -> AeadNonce {
        let mut nonce = [0; NONCE_LEN];
        nonce[..SALT_LEN].copy_from_slice(&self.salt);
        nonce[SALT_LEN..].copy_from_slice(&iv);
        AeadNonce::assume_unique_for_key(nonce)
    }

    /// The content of a body, without padding.
    fn open(&self, aad: &[u8], body: &[u8]) -> Result<Vec<u8>, Error> {
        let (iv, ciphertext) = body.split_first_chunk::<IV_LEN>().ok_or_else(|| syntax("SK payload"))?;
        let mut buffer = ciphertext.to_vec();
        let plain = self
            .aead
            .open_in_place(self.nonce(*iv), Aad::from(aad), &mut buffer)
            .map_err(|_| Misbehaved::Integrity)?;
        let (pad, content) = plain.split_last().ok_or_else(|| syntax("padding of the SK payload"))?;
        let len = content
            .len()
            .checked_sub(usize::from(*pad))
            .ok_or_else(|| syntax("padding of the SK payload"))?;
        buffer.truncate(len);
        Ok(buffer)
    }
}

/// Encrypts what this side sends.
pub struct Sealer {
    key: Key,
    next_iv: u64,
}

impl std::fmt::Debug for Sealer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sealer").field("sealed", &self.next_iv).finish_non_exhaustive()
    }
}

impl Sealer {
    /// With SK_ei for the original initiator, SK_er for the responder. One sealer per key, ever: its counter is what
    /// keeps nonces apart.
    ///
    /// # Errors
    /// [`Misuse::Key`].
    pub fn new(encr: Encr, sk_e: &Secret) -> Result<Self, Error> {
        Ok(Sealer { key: Key::new(encr, sk_e)?, next_iv: 0 })
    }

    /// The datagram with all payloads in one SK payload.
    ///
    /// # Errors
    /// [`Misuse::TooLong`], [`Misuse::KeyExhausted`].
    pub fn seal(&mut self, header: &Header, payloads: &[Payload]) -> Result<Vec<u8>, Error> {
        let mut content = Vec::new();
        let first = emit_chain(payloads, &mut content)?;
        self.seal_content(header, first, None, &content)
    }

    /// The datagrams of a message of which none is longer than `max` octets, non-ESP marker, UDP and IP headers not
    /// counted: one SK payload if that fits, SKF payloads otherwise.
    ///
    /// # Errors
    /// As [`Sealer::seal`]; more than [`MAX_FRAGMENTS`]; a `max` with no room for content.
    pub fn seal_fragments(
        &mut self,
        header: &Header,
        payloads: &[Payload],
        max: usize,
    ) -> Result<Vec<Vec<u8>>, Error> {
        let mut content = Vec::new();
        let first = emit_chain(payloads, &mut content)?;
        if SK_OVERHEAD + content.len() <= max {
            return Ok(vec![self.seal_content(header, first, None, &content)?]);
        }
        let room = max.saturating_sub(SKF_OVERHEAD);
        if room == 0 {
            return Err(Misuse::Config("the path is too narrow for IKE fragments").into());
        }
        if content.len() > MAX_MESSAGE || content.len().div_ceil(room) > MAX_FRAGMENTS {
            return Err(Misuse::TooLong("a message").into());
        }
        let total = content.len().div_ceil(room) as u16;
        content
            .chunks(room)
            .zip(1..)
            .map(|(chunk, number)| {
                let first = if number == 1 { first } else { PayloadType::None };
                self.seal_content(header, first, Some((number, total)), chunk)
            })
            .collect()
    }

    fn seal_content(
        &mut self,
        header: &Header,
        first: PayloadType,
        fragment: Option<(u16, u16)>,
        content: &[u8],
    ) -> Result<Vec<u8>, Error> {
        let (kind, overhead) = match fragment {
            None => (PayloadType::Encrypted, SK_OVERHEAD),
            Some(_) => (PayloadType::EncryptedFragment, SKF_OVERHEAD),
        };
        let length = overhead + content.len();
        let payload_len =
            u16::try_from(length - HEADER_LEN).map_err(|_| Misuse::TooLong("an encrypted message"))?;
        if length > MAX_MESSAGE {
            return Err(Misuse::TooLong("an encrypted message").into());
        }
        let iv = self.next_iv.to_be_bytes();
        self.next_iv = self.next_iv.checked_add(1).ok_or(Misuse::KeyExhausted)?;

        let mut out = Vec::with_capacity(length);
        header.emit(&mut out, kind, length as u32);
        out.extend_from_slice(&[first.into(), 0]);
        out.extend_from_slice(&payload_len.to_be_bytes());
        if let Some((number, total)) = fragment {
            out.extend_from_slice(&number.to_be_bytes());
            out.extend_from_slice(&total.to_be_bytes());
        }
        let aad_len = out.len();
        out.extend_from_slice(&iv);
        let content_at = out.len();
        out.extend_from_slice(content);
        // No padding is needed, but its length is always there (RFC 5282 §3).
        out.push(0);
        let (aad, rest) = out.split_at_mut(aad_len);
        let tag = self
            .key
            .aead
            .seal_in_place_separate_tag(
                self.key.nonce(iv),
                Aad::from(&*aad),
                &mut rest[content_at - aad_len..],
            )
            .map_err(|_| Misuse::Crypto("seal a message"))?;
        out.extend_from_slice(tag.as_ref());
        Ok(out)
    }
}

/// Decrypts what the peer sends.
pub struct Opener {
    key: Key,
}

impl std::fmt::Debug for Opener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Opener").finish_non_exhaustive()
    }
}

/// One fragment, authenticated; see [`super::Reassembly`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenedFragment {
    /// The header.
    pub header: Header,
    /// The type of the first payload of the message, in fragment 1.
    pub first: PayloadType,
    /// Which fragment, from 1.
    pub number: u16,
    /// Of how many.
    pub total: u16,
    /// Its part of the payloads.
    pub content: Vec<u8>,
}

impl Opener {
    /// With SK_er for the original initiator, SK_ei for the responder.
    ///
    /// # Errors
    /// [`Misuse::Key`].
    pub fn new(encr: Encr, sk_e: &Secret) -> Result<Self, Error> {
        Ok(Opener { key: Key::new(encr, sk_e)? })
    }

    /// The message inside.
    ///
    /// # Errors
    /// [`Misbehaved::Integrity`]: nobody knows who sent this, drop it. Any other error is the authenticated peer's.
    pub fn open(&self, encrypted: &Encrypted<'_>) -> Result<Message, Error> {
        let content = self.key.open(encrypted.aad, encrypted.body)?;
        Ok(Message { header: encrypted.header, payloads: parse_chain(encrypted.first, &content)? })
    }

    /// The part of a message inside.
    ///
    /// # Errors
    /// As [`Opener::open`].
    pub fn open_fragment(&self, fragment: &Fragment<'_>) -> Result<OpenedFragment, Error> {
        Ok(OpenedFragment {
            header: fragment.header,
            first: fragment.first,
            number: fragment.number,
            total: fragment.total,
            content: self.key.open(fragment.aad, fragment.body)?,
        })
    }
}
