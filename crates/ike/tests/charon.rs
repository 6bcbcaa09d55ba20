//! What a real charon sent is read, decrypted and authenticated: see `charon/README.md`.

#![allow(clippy::unwrap_used, reason = "these are tests: clippy takes only functions marked so for tests")]

use std::sync::Arc;

use ike::AuthFailure;
use ike::auth::{Anchors, Expiry, Identity, Scheme, SignedOctets, SpkiHash, Trust, Verified};
use ike::crypto::{ChildKeys, Encr, Group, IkeKeys, KeyPair, Opener, Prf, Reassembly, Secret};
use ike::proposal::{IkeOffer, IkeSuite};
use ike::wire::{
    Authentication, Certificate, Datagram, ExchangeType, HashAlgorithm, Identification, IkeSpi, IkeSpis,
    Message, Nonce, NotifyType, Payload,
};

const CA: &[u8] = include_bytes!("charon/ca.der");

fn hex(text: &str) -> Vec<u8> {
    let text = text.trim();
    (0..text.len()).step_by(2).map(|i| u8::from_str_radix(&text[i..i + 2], 16).unwrap()).collect()
}

struct Capture(&'static str);

impl Capture {
    fn all(&self, name: &str) -> Vec<&'static str> {
        self.0.lines().filter_map(|l| l.split_once(' ')).filter(|(n, _)| *n == name).map(|(_, v)| v).collect()
    }

    fn one(&self, name: &str) -> &'static str {
        self.all(name)[0]
    }
}

/// All that is needed to check charon's AUTH.
struct Session {
    prf: Prf,
    keys: IkeKeys,
    init: Vec<u8>,
    nonce: Nonce,
    id: Identification,
    auth: Authentication,
    certificates: Vec<Certificate>,
    now: u64,
}

impl Session {
    /// Goes through both responses as the initiator would.
    fn replay(capture: &Capture) -> Session {
        let group = match capture.one("group") {
            "x25519" => Group::X25519,
            "p256" => Group::P256,
            _ => Group::P384,
        };
        let encr = if capture.one("encr") == "128" { Encr::Aes128Gcm16 } else { Encr::Aes256Gcm16 };
        let prf = match capture.one("prf") {
            "256" => Prf::HmacSha256,
            "384" => Prf::HmacSha384,
            _ => Prf::HmacSha512,
        };
        let offer = IkeOffer { encr: vec![encr], prf: vec![prf], groups: vec![group] };
        let nonce = Nonce::new(hex(capture.one("nonce"))).unwrap();
        let pair = KeyPair::from_private(group, &hex(capture.one("private"))).unwrap();

        let init = hex(capture.one("init"));
        let Datagram::Clear(message) = Datagram::parse(&init).unwrap() else { panic!("encrypted") };
        let initiator = IkeSpi(u64::from_str_radix(capture.one("spi"), 16).unwrap());
        assert_eq!(message.header.spis.initiator, initiator);
        assert!(message.header.flags.response);
        let (mut shared, mut peer_nonce) = (None, None);
        for payload in &message.payloads {
            match payload {
                Payload::Sa(answer) => {
                    let selected = offer.accept(&offer.request(None), answer).unwrap();
                    assert_eq!(selected.suite, IkeSuite { encr, prf, group });
                }
                Payload::Ke(ke) => shared = Some(pair.agree(&ke.data).unwrap()),
                Payload::Nonce(nonce) => peer_nonce = Some(nonce.clone()),
                _ => {}
            }
        }
        let (shared, peer_nonce) = (shared.unwrap(), peer_nonce.unwrap());
        let suite = IkeSuite { encr, prf, group };
        let keys = IkeKeys::initial(&suite, &shared, &nonce, &peer_nonce, &message.header.spis);

        let child = ChildKeys::derive(prf, &keys.sk_d, &[], &nonce, &peer_nonce, encr);
        for (name, key) in [("child-initiator", &child.initiator), ("child-responder", &child.responder)] {
            assert_eq!([key.key.expose(), &key.salt].concat(), hex(capture.one(name)), "{name}");
        }

        let message = open_all(&Opener::new(encr, &keys.sk_er).unwrap(), &capture.all("auth"));
        assert_eq!(message.header.exchange, ExchangeType::IkeAuth);
        let (mut id, mut auth, mut certificates) = (None, None, Vec::new());
        for payload in message.payloads {
            match payload {
                Payload::IdResponder(i) => id = Some(i),
                Payload::Auth(a) => auth = Some(a),
                Payload::Cert(c) => certificates.push(c),
                _ => {}
            }
        }
        let now = capture.one("now").parse().unwrap();
        Session { prf, keys, init, nonce, id: id.unwrap(), auth: auth.unwrap(), certificates, now }
    }

    fn verify(&self, trust: &Trust) -> Result<Verified, ike::Error> {
        self.verify_at(trust, self.now)
    }

    fn verify_at(&self, trust: &Trust, now: u64) -> Result<Verified, ike::Error> {
        let octets = SignedOctets {
            prf: self.prf,
            sk_p: &self.keys.sk_pr,
            message: &self.init,
            nonce: &self.nonce,
            id: &self.id,
            int_auth: b"",
        };
        trust.verify(&octets, &self.auth, &self.certificates, now)
    }
}

fn open_all(opener: &Opener, datagrams: &[&str]) -> Message {
    let mut reassembly = Reassembly::new();
    for datagram in datagrams {
        match Datagram::parse(&hex(datagram)).unwrap() {
            Datagram::Encrypted(encrypted) => return opener.open(&encrypted).unwrap(),
            Datagram::Fragment(fragment) => {
                assert!(reassembly.wants(&fragment));
                if let Some(message) = reassembly.add(opener.open_fragment(&fragment).unwrap()).unwrap() {
                    return message;
                }
            }
            Datagram::Clear(message) => panic!("in clear: {message:?}"),
        }
    }
    panic!("fragments are missing");
}

fn authority(expiry: Expiry) -> Trust {
    Trust::Authority { anchors: Arc::new(Anchors::new(&[CA.to_vec()]).unwrap()), expiry }
}

const ECDSA: Capture = Capture(include_str!("charon/ecdsa.txt"));

#[test]
fn charon_proves_itself_by_pre_shared_key() {
    let session = Session::replay(&Capture(include_str!("charon/psk.txt")));
    assert_eq!(Identity::try_from(&session.id).unwrap().to_string(), "charon.example");
    let right = Trust::Psk(Secret::new(b"correct horse battery staple".to_vec()));
    assert_eq!(session.verify(&right), Ok(Verified { scheme: None, certificate: None }));
    let wrong = Trust::Psk(Secret::new(b"correct horse battery stable".to_vec()));
    let error = session.verify(&wrong).unwrap_err();
    assert_eq!(error, AuthFailure::PreSharedKey.into());
    assert_eq!(error.notify().map(|n| n.kind), Some(NotifyType::AuthenticationFailed));
    assert_eq!(session.verify(&authority(Expiry::Enforced)), Err(AuthFailure::NoCertificate.into()));
}

#[test]
fn charon_proves_itself_by_each_kind_of_key_and_its_certificate_chains_to_the_ca() {
    let cases = [
        (ECDSA, Scheme::Ecdsa(HashAlgorithm::Sha256)),
        (Capture(include_str!("charon/p384.txt")), Scheme::Ecdsa(HashAlgorithm::Sha384)),
        (Capture(include_str!("charon/ed25519.txt")), Scheme::Ed25519),
        (Capture(include_str!("charon/rsa.txt")), Scheme::RsaPkcs1(HashAlgorithm::Sha256)),
        (Capture(include_str!("charon/rsapss.txt")), Scheme::RsaPss(HashAlgorithm::Sha256)),
    ];
    for (capture, scheme) in cases {
        let session = Session::replay(&capture);
        let verified = session.verify(&authority(Expiry::Enforced)).unwrap();
        assert_eq!(verified.scheme, Some(scheme));
        let certificate = verified.certificate.unwrap();
        assert_eq!(certificate.subject, "C=CH, O=Example, CN=charon.example");
        assert!(!certificate.expired);
        // The same peer, known by nothing but its key.
        let by_key = session.verify(&Trust::Key(certificate.key)).unwrap();
        assert_eq!(by_key.scheme, Some(scheme));
        assert_eq!(session.verify(&Trust::Key(SpkiHash([7; 32]))), Err(AuthFailure::WrongKey.into()));
        let psk = Trust::Psk(Secret::new(b"x".to_vec()));
        assert_eq!(session.verify(&psk), Err(AuthFailure::Method(14).into()));
    }
}

#[test]
fn a_proof_holds_for_its_own_exchange_only() {
    let trust = authority(Expiry::Enforced);
    let broken: [fn(&mut Session); 6] = [
        |s| s.init[40] ^= 1,
        |s| s.nonce = Nonce::new(vec![1; 32]).unwrap(),
        |s| s.keys.sk_pr = s.keys.sk_pi.clone(),
        |s| s.id.reserved[0] = 1,
        |s| *s.auth.data.last_mut().unwrap() ^= 1,
        |s| s.prf = Prf::HmacSha512,
    ];
    for (i, breaks) in broken.into_iter().enumerate() {
        let mut session = Session::replay(&ECDSA);
        breaks(&mut session);
        assert_eq!(session.verify(&trust), Err(AuthFailure::Signature.into()), "case {i}");
    }
}

#[test]
fn an_expired_certificate_is_refused_or_shown_as_the_policy_says() {
    let session = Session::replay(&ECDSA);
    let later = session.now + 30 * 365 * 86_400;
    assert_eq!(session.verify_at(&authority(Expiry::Enforced), later), Err(AuthFailure::Expired.into()));
    let shown = session.verify_at(&authority(Expiry::Shown), later).unwrap();
    assert!(shown.certificate.unwrap().expired);
    assert_eq!(session.verify_at(&authority(Expiry::Enforced), 1), Err(AuthFailure::NotYetValid.into()));
    let key = SpkiHash::of_certificate(&session.certificates[0].data).unwrap();
    assert!(session.verify_at(&Trust::Key(key), later).unwrap().certificate.unwrap().expired);
}

#[test]
fn charons_first_request_is_read_and_answered_with_the_best_of_ours() {
    let bytes = hex(include_str!("charon/init-request.txt"));
    let Datagram::Clear(message) = Datagram::parse(&bytes).unwrap() else { panic!("encrypted") };
    assert_eq!(message.header.exchange, ExchangeType::IkeSaInit);
    assert_eq!(message.header.spis, IkeSpis { responder: IkeSpi::ZERO, ..message.header.spis });
    // charon writes nothing that is not kept: its message is said again, octet for octet.
    assert_eq!(message.emit_clear().unwrap(), bytes);
    let (mut suite, mut notified) = (None, Vec::new());
    for payload in &message.payloads {
        match payload {
            Payload::Sa(sa) => {
                assert!(sa.proposals.len() >= 3);
                suite = Some(IkeOffer::default().select(sa, Group::X25519.id()).unwrap().suite);
            }
            Payload::Notify(notify) => notified.push(notify.kind),
            _ => {}
        }
    }
    let suite = suite.unwrap();
    assert_eq!((suite.encr, suite.prf), (Encr::Aes256Gcm16, Prf::HmacSha256));
    assert!(notified.contains(&NotifyType::FragmentationSupported));
    assert!(notified.contains(&NotifyType::SignatureHashAlgorithms));
}
