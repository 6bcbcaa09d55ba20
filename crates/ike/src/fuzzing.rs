//! Bodies of the fuzz targets in `fuzz/`: each returns for any input, and holds what parses to its round trip.
#![allow(clippy::missing_panics_doc, reason = "to panic is how a fuzz target says that it found something")]

mod machine;

use std::sync::OnceLock;

pub use machine::{insider, stranger};

use crate::auth::{
    Anchors, Credential, Expiry, Identity, PublicKey, SignedOctets, SigningKey, SpkiHash, Trust,
};
use crate::crypto::{Encr, Opener, Prf, Reassembly, Sealer, Secret};
use crate::proposal::{ChildExchange, EspOffer, IkeOffer};
use crate::wire::{
    AuthMethod, Authentication, Certificate, Datagram, ExchangeType, Flags, Header, IkeSpi, IkeSpis, Message,
    Nonce, Payload, PayloadType, SaPayload, TrafficSelectors, parse_chain,
};

/// A datagram from anybody, before anything is authenticated.
pub fn datagram(bytes: &[u8]) {
    match Datagram::parse(bytes) {
        Ok(Datagram::Clear(message)) => {
            // What parses can be said again, and reads back as the same.
            if let Ok(again) = message.emit_clear() {
                assert_eq!(Datagram::parse(&again), Ok(Datagram::Clear(message)));
            }
        }
        Ok(Datagram::Encrypted(encrypted)) => {
            if let Some(opener) = opener() {
                let _ = opener.open(&encrypted);
            }
        }
        Ok(Datagram::Fragment(fragment)) => {
            let _ = Reassembly::new().wants(&fragment);
        }
        Err(error) => {
            let _ = error.notify();
        }
    }
}

/// What a peer that holds the keys may send: `bytes` is the content of an SK payload, type of the first payload first.
pub fn authenticated(bytes: &[u8]) {
    let Some((first, content)) = bytes.split_first() else { return };
    let Ok(payloads) = parse_chain(PayloadType::from(*first), content) else { return };
    let (Some(mut sealer), Some(opener)) = (sealer(), opener()) else { return };
    let header = Header {
        spis: IkeSpis { initiator: IkeSpi(1), responder: IkeSpi(2) },
        exchange: ExchangeType::Informational,
        flags: Flags::default(),
        message_id: 1,
    };
    // What was understood survives being sealed and opened, whole and in fragments.
    let Ok(datagrams) = sealer.seal_fragments(&header, &payloads, 576) else { return };
    let mut reassembly = Reassembly::new();
    let mut got = None;
    for bytes in &datagrams {
        got = match Datagram::parse(bytes) {
            Ok(Datagram::Encrypted(encrypted)) => opener.open(&encrypted).ok(),
            Ok(Datagram::Fragment(fragment)) => {
                opener.open_fragment(&fragment).and_then(|f| reassembly.add(f)).ok().flatten()
            }
            Ok(Datagram::Clear(_)) | Err(_) => None,
        };
    }
    assert_eq!(got, Some(Message { header, payloads }));
}

/// The body of a payload that a stranger may send: the first octet says of which type.
pub fn payload(bytes: &[u8]) {
    match bytes.split_first() {
        Some((b's', body)) => sa_payload(body),
        Some((b't', body)) => ts_payload(body),
        Some((b'c', body)) => cert_payload(body),
        Some((b'a', body)) => auth_payload(body),
        Some(_) | None => {}
    }
}

/// The body of an SA payload: parsed, said again, and selected from as responder.
pub fn sa_payload(bytes: &[u8]) {
    let Ok(sa) = SaPayload::parse(bytes) else { return };
    let mut again = Vec::new();
    sa.emit(&mut again);
    assert_eq!(again.len(), sa.len());
    assert_eq!(SaPayload::parse(&again).as_ref(), Ok(&sa));
    if let Ok(selected) = IkeOffer::default().select(&sa, 31) {
        let answer = selected.answer(selected.peer_spi);
        assert_eq!(IkeOffer::default().accept(&sa, &answer).map(|s| s.suite), Ok(selected.suite));
    }
    for exchange in [ChildExchange::Auth, ChildExchange::Create(Some(31)), ChildExchange::Create(None)] {
        if let Ok(selected) = EspOffer::default().select(&sa, exchange) {
            let answer = selected.answer(selected.peer_spi);
            assert_eq!(
                EspOffer::default().accept(&sa, &answer, exchange).map(|s| s.suite),
                Ok(selected.suite)
            );
        }
    }
}

/// The body of a TSi or TSr payload.
pub fn ts_payload(bytes: &[u8]) {
    if let Ok(ts) = TrafficSelectors::parse(bytes) {
        let mut again = Vec::new();
        ts.emit(&mut again);
        assert_eq!(again.len(), ts.len());
        assert_eq!(TrafficSelectors::parse(&again), Ok(ts));
    }
}

/// The body of a CERT payload, as sent by a peer that proves nothing: as a known key's carrier and as a chain.
pub fn cert_payload(bytes: &[u8]) {
    let Ok(certificate) = Certificate::parse(bytes) else { return };
    let _ = PublicKey::from_spki(&certificate.data);
    let hash = SpkiHash::of_certificate(&certificate.data).unwrap_or(SpkiHash([0; 32]));
    let (sk_p, id) = (Secret::new(vec![0; 32]), Identity::Fqdn("fuzz.example".into()).to_wire());
    let Ok(nonce) = Nonce::new(vec![0; 32]) else { return };
    let octets = SignedOctets {
        prf: Prf::HmacSha256,
        sk_p: &sk_p,
        message: b"",
        nonce: &nonce,
        id: &id,
        int_auth: b"",
    };
    let auth = Authentication {
        method: AuthMethod::DigitalSignature,
        data: vec![7, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 1, 2, 3],
    };
    let certificates = [certificate.clone(), certificate.clone()];
    assert!(Trust::Key(hash).verify(&octets, &auth, &certificates, 0).is_err());
    if let Ok(anchors) = Anchors::new(std::slice::from_ref(&certificate.data)) {
        let trust = Trust::Authority { anchors: anchors.into(), expiry: Expiry::Shown };
        assert!(trust.verify(&octets, &auth, &certificates, 0).is_err());
    }
}

/// The data of an AUTH payload with a digital signature, under a fixed key that it cannot be made with.
pub fn auth_payload(bytes: &[u8]) {
    static KEY: OnceLock<Option<PublicKey>> = OnceLock::new();
    let key = KEY.get_or_init(|| PublicKey::from_spki(FUZZ_SPKI).ok());
    if let Some(key) = key {
        assert!(key.verify(b"message", bytes).is_err());
    }
    // A private key is not the peer's to send, but its reader must not panic either.
    if let Ok(key) = SigningKey::from_pkcs8(bytes) {
        let _ = Credential::Key { key: key.into(), chain: Vec::new() }.certificates();
    }
}

/// The Ed25519 key of RFC 8410 §10.1.
const FUZZ_SPKI: &[u8] = &[
    0x30, 0x2a, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 3, 0x21, 0, 0x19, 0xbf, 0x44, 0x09, 0x69, 0x84, 0xcd, 0xfe,
    0x85, 0x41, 0xba, 0xc1, 0x67, 0xdc, 0x3b, 0x96, 0xc8, 0x50, 0x86, 0xaa, 0x30, 0xb6, 0xb6, 0xcb, 0x0c,
    0x5c, 0x38, 0xad, 0x70, 0x31, 0x66, 0xe1,
];

fn key() -> Secret {
    Secret::new(vec![0; 20])
}

fn sealer() -> Option<Sealer> {
    Sealer::new(Encr::Aes128Gcm16, &key()).ok()
}

fn opener() -> Option<Opener> {
    Opener::new(Encr::Aes128Gcm16, &key()).ok()
}

/// Seeds for the corpora of [`datagram`] and [`authenticated`].
pub fn example() -> Message {
    Message {
        header: Header {
            spis: IkeSpis { initiator: IkeSpi(1), responder: IkeSpi::ZERO },
            exchange: ExchangeType::IkeSaInit,
            flags: Flags { initiator: true, ..Flags::default() },
            message_id: 0,
        },
        payloads: vec![Payload::Sa(IkeOffer::default().request(None))],
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "an Instant can only be had from the clock")]
mod tests {
    use std::time::Instant;

    /// The committed corpus.
    fn replay(name: &str, target: fn(&[u8])) {
        let directory = format!("{}/../../fuzz/corpus/{name}", env!("CARGO_MANIFEST_DIR"));
        let mut count = 0;
        for file in std::fs::read_dir(&directory).unwrap() {
            target(&std::fs::read(file.unwrap().path()).unwrap());
            count += 1;
        }
        assert!(count > 0, "{directory} is empty");
    }

    #[test]
    fn the_corpus_of_ike_stranger_does_no_harm() {
        replay("ike_stranger", |bytes| super::stranger(bytes, Instant::now()));
    }

    #[test]
    fn the_corpus_of_ike_insider_does_no_harm() {
        replay("ike_insider", |bytes| super::insider(bytes, Instant::now()));
    }

    #[test]
    fn the_corpus_of_ike_payload_does_no_harm() {
        replay("ike_payload", super::payload);
    }
}
