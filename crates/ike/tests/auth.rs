//! Proofs between two of us: every kind of key, every way in which a certificate can be the wrong one.

#![allow(clippy::unwrap_used, reason = "these are tests: clippy takes only functions marked so for tests")]

use std::sync::Arc;

use ike::auth::{
    Anchors, Credential, Expiry, Identity, SUPPORTED_HASHES, Scheme, SignedOctets, SigningKey, SpkiHash,
    Trust,
};
use ike::crypto::{Prf, Secret};
use ike::wire::{
    AuthMethod, Authentication, CertEncoding, Certificate, HashAlgorithm, IdType, Identification, Nonce,
};
use ike::{AuthFailure, Error, Incompatible};
use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair, SanType};

const NOW: u64 = 1_800_000_000;

fn octets<R>(id: &Identification, use_them: impl FnOnce(&SignedOctets<'_>) -> R) -> R {
    let sk_p = Secret::new(vec![5; 32]);
    let nonce = Nonce::new(vec![0xbb; 32]).unwrap();
    use_them(&SignedOctets {
        prf: Prf::HmacSha256,
        sk_p: &sk_p,
        message: b"msg",
        nonce: &nonce,
        id,
        int_auth: b"",
    })
}

struct Ca {
    der: Vec<u8>,
    issuer: Issuer<'static, KeyPair>,
}

impl Ca {
    fn root(name: &str) -> Ca {
        let key = KeyPair::generate().unwrap();
        let params = Self::params(name);
        Ca { der: params.self_signed(&key).unwrap().der().to_vec(), issuer: Issuer::new(params, key) }
    }

    fn under(&self, name: &str) -> Ca {
        let key = KeyPair::generate().unwrap();
        let params = Self::params(name);
        Ca {
            der: params.signed_by(&key, &self.issuer).unwrap().der().to_vec(),
            issuer: Issuer::new(params, key),
        }
    }

    fn params(name: &str) -> CertificateParams {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params
    }

    /// A host with a key of this kind and these names.
    fn host(&self, kind: &'static rcgen::SignatureAlgorithm, names: Vec<SanType>) -> Host {
        let key = KeyPair::generate_for(kind).unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "Example");
        params.distinguished_name.push(DnType::CommonName, "Moon");
        params.subject_alt_names = names;
        let der = params.signed_by(&key, &self.issuer).unwrap().der().to_vec();
        Host { key: Arc::new(SigningKey::from_pkcs8(&key.serialize_der()).unwrap()), chain: vec![der] }
    }

    fn trust(&self) -> Trust {
        let anchors = Arc::new(Anchors::new(std::slice::from_ref(&self.der)).unwrap());
        Trust::Authority { anchors, expiry: Expiry::Enforced }
    }
}

struct Host {
    key: Arc<SigningKey>,
    chain: Vec<Vec<u8>>,
}

impl Host {
    fn credential(&self) -> Credential {
        Credential::Key { key: self.key.clone(), chain: self.chain.clone() }
    }

    /// Proves itself as `id` to somebody with `trust`.
    fn shown_to(&self, trust: &Trust, id: &str) -> Result<Option<Scheme>, Error> {
        let id = id.parse::<Identity>().unwrap().to_wire();
        octets(&id, |octets| {
            let auth = self.credential().prove(octets, &SUPPORTED_HASHES)?;
            Ok(trust.verify(octets, &auth, &self.credential().certificates(), NOW)?.scheme)
        })
    }
}

fn dns(name: &str) -> Vec<SanType> {
    vec![SanType::DnsName(name.try_into().unwrap())]
}

#[test]
fn every_kind_of_our_keys_proves_itself() {
    let ca = Ca::root("CA");
    let kinds = [
        (&rcgen::PKCS_ECDSA_P256_SHA256, Scheme::Ecdsa(HashAlgorithm::Sha256)),
        (&rcgen::PKCS_ECDSA_P384_SHA384, Scheme::Ecdsa(HashAlgorithm::Sha384)),
        (&rcgen::PKCS_ED25519, Scheme::Ed25519),
    ];
    for (kind, scheme) in kinds {
        let host = ca.host(kind, dns("moon.example"));
        assert_eq!(host.shown_to(&ca.trust(), "moon.example"), Ok(Some(scheme)));
        let key = SpkiHash::of(host.key.public().spki());
        assert_eq!(key, SpkiHash::of_certificate(&host.chain[0]).unwrap());
        assert_eq!(host.shown_to(&Trust::Key(key), "keyid:anything"), Ok(Some(scheme)));
    }
}

#[test]
fn a_pre_shared_key_makes_the_auth_that_rfc_7296_says() {
    // Computed with Python's hmac.
    let expected = "273f262766b200caefb8e38e619555e5ad235ed54a785d7780151d9df1fb6c77";
    let psk = |text: &str| Secret::new(text.as_bytes().to_vec());
    let id = Identity::Fqdn("a.example".into()).to_wire();
    octets(&id, |octets| {
        let auth = Credential::Psk(psk("secret")).prove(octets, &[]).unwrap();
        assert_eq!(auth.method, AuthMethod::SharedKey);
        let (pairs, _) = expected.as_bytes().as_chunks::<2>();
        let octet = |pair: &[u8; 2]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
        assert_eq!(auth.data, pairs.iter().map(octet).collect::<Vec<_>>());
        assert!(Trust::Psk(psk("secret")).verify(octets, &auth, &[], NOW).is_ok());
        let short = Authentication { data: auth.data[..31].to_vec(), ..auth };
        for (key, auth) in [("Secret", &auth_of(octets)), ("secret", &short)] {
            let wrong = Trust::Psk(psk(key)).verify(octets, auth, &[], NOW);
            assert_eq!(wrong, Err(AuthFailure::PreSharedKey.into()));
        }
    });
}

fn auth_of(octets: &SignedOctets<'_>) -> Authentication {
    Credential::Psk(Secret::new(b"secret".to_vec())).prove(octets, &[]).unwrap()
}

#[test]
fn the_certificate_must_name_the_identity() {
    let ca = Ca::root("CA");
    let names = vec![
        SanType::DnsName("moon.example".try_into().unwrap()),
        SanType::IpAddress("192.0.2.7".parse().unwrap()),
        SanType::IpAddress("2001:db8::7".parse().unwrap()),
        SanType::Rfc822Name("moon@example.org".try_into().unwrap()),
    ];
    let host = ca.host(&rcgen::PKCS_ED25519, names);
    for good in
        ["moon.example", "MOON.Example", "192.0.2.7", "2001:db8::7", "moon@example.org", "O=Example, CN=Moon"]
    {
        assert!(host.shown_to(&ca.trust(), good).is_ok(), "{good}");
    }
    for bad in [
        "sun.example",
        "example",
        "192.0.2.8",
        "2001:db8::8",
        "sun@example.org",
        "CN=Moon",
        "keyid:moon.example",
    ] {
        let wrong = host.shown_to(&ca.trust(), bad).unwrap_err();
        assert!(
            matches!(wrong, Error::Unauthenticated(AuthFailure::IdentityNotInCertificate(_))),
            "{bad}: {wrong}"
        );
    }
}

#[test]
fn a_chain_through_an_intermediate_holds_and_one_without_it_does_not() {
    let root = Ca::root("root");
    let mut host = root.under("intermediate").host(&rcgen::PKCS_ECDSA_P256_SHA256, dns("moon.example"));
    let refused = host.shown_to(&root.trust(), "moon.example").unwrap_err();
    assert!(matches!(refused, Error::Unauthenticated(AuthFailure::Chain(_))), "{refused}");
    let intermediate = root.under("intermediate");
    host = intermediate.host(&rcgen::PKCS_ECDSA_P256_SHA256, dns("moon.example"));
    host.chain.push(intermediate.der.clone());
    assert!(host.shown_to(&root.trust(), "moon.example").is_ok());
}

#[test]
fn another_ca_a_borrowed_certificate_and_a_host_as_ca_are_refused() {
    let (ours, theirs) = (Ca::root("CA"), Ca::root("CA"));
    let host = ours.host(&rcgen::PKCS_ED25519, dns("moon.example"));
    let refused = host.shown_to(&theirs.trust(), "moon.example").unwrap_err();
    assert!(matches!(refused, Error::Unauthenticated(AuthFailure::Chain(_))), "{refused}");
    // The certificate is public; the key is not.
    let thief = Host { key: theirs.host(&rcgen::PKCS_ED25519, Vec::new()).key, chain: host.chain.clone() };
    assert_eq!(thief.shown_to(&ours.trust(), "moon.example"), Err(AuthFailure::Signature.into()));
    // A key of another kind than the certificate's.
    let thief =
        Host { key: ours.host(&rcgen::PKCS_ECDSA_P256_SHA256, Vec::new()).key, chain: host.chain.clone() };
    let refused = thief.shown_to(&ours.trust(), "moon.example").unwrap_err();
    assert!(matches!(refused, Error::PeerIncompatible(Incompatible::Signature(_))), "{refused}");
    assert!(Anchors::new(&host.chain).is_err(), "a host's certificate is no CA");
    assert!(Anchors::new(&[]).is_err());
    assert!(Anchors::new(&[vec![1, 2, 3]]).is_err());
}

#[test]
fn a_raw_public_key_will_do_where_the_key_is_known() {
    let host = Ca::root("CA").host(&rcgen::PKCS_ED25519, Vec::new());
    let spki = host.key.public().spki().to_vec();
    let trust = Trust::Key(SpkiHash::of(&spki));
    let id = Identity::KeyId(b"h1".to_vec()).to_wire();
    octets(&id, |octets| {
        let auth = host.credential().prove(octets, &SUPPORTED_HASHES).unwrap();
        let raw = Certificate { encoding: CertEncoding::RawPublicKey, data: spki };
        assert!(trust.verify(octets, &auth, &[raw], NOW).is_ok());
        assert_eq!(trust.verify(octets, &auth, &[], NOW), Err(AuthFailure::NoCertificate.into()));
        let junk = Certificate::x509(vec![0x30, 0x82, 1, 2, 3]);
        assert_eq!(trust.verify(octets, &auth, &[junk], NOW), Err(AuthFailure::BadCertificate.into()));
    });
}

#[test]
fn a_peer_that_does_not_verify_our_kind_of_key_is_incompatible() {
    let host = Ca::root("CA").host(&rcgen::PKCS_ED25519, Vec::new());
    let id = Identity::KeyId(b"h1".to_vec()).to_wire();
    octets(&id, |octets| {
        for hashes in [&[][..], &[HashAlgorithm::Sha1, HashAlgorithm::Sha256]] {
            let refused = host.credential().prove(octets, hashes).unwrap_err();
            assert!(matches!(refused, Error::PeerIncompatible(Incompatible::Signature(_))));
        }
        // SHA-1 by the old method is not looked at.
        let old = Authentication { method: AuthMethod::RsaSha1, data: vec![0; 256] };
        let trust = Trust::Key(SpkiHash::of(host.key.public().spki()));
        let refused = trust.verify(octets, &old, &host.credential().certificates(), NOW);
        assert_eq!(refused, Err(AuthFailure::Method(1).into()));
    });
}

#[test]
fn a_certificate_request_names_the_cas_wanted() {
    let ca = Ca::root("CA");
    let request = ca.trust().cert_request().unwrap();
    assert_eq!((request.encoding, request.authorities.len()), (CertEncoding::X509Signature, 20));
    assert_eq!(Trust::Key(SpkiHash([0; 32])).cert_request().unwrap().authorities.len(), 0);
    assert_eq!(Trust::Psk(Secret::new(vec![1])).cert_request(), None);
}

#[test]
fn identities_are_written_as_people_write_them() {
    let cases = [
        ("moon.example", IdType::Fqdn, "moon.example"),
        ("@moon", IdType::Fqdn, "moon"),
        ("carol@example.org", IdType::Rfc822Addr, "carol@example.org"),
        ("192.0.2.7", IdType::Ipv4Addr, "192.0.2.7"),
        ("2001:db8::7", IdType::Ipv6Addr, "2001:db8::7"),
        ("keyid:host-1", IdType::KeyId, "keyid:host-1"),
        ("keyid:0x00ff", IdType::KeyId, "keyid:0x00ff"),
        ("C=CH, O=A\\, B, CN=moon", IdType::DerAsn1Dn, "C=CH, O=A, B, CN=moon"),
    ];
    for (text, kind, shown) in cases {
        let identity: Identity = text.parse().unwrap();
        let wire = identity.to_wire();
        assert_eq!(wire.kind, kind, "{text}");
        assert_eq!(Identity::try_from(&wire).unwrap(), identity);
        assert_eq!(identity.to_string(), shown);
    }
    for bad in ["", " ", "two words", "@", "a@", "keyid:", "keyid:0xf", "keyid:0xé", "=", "XX=1", "CN="] {
        assert!(bad.parse::<Identity>().is_err(), "{bad:?}");
    }
}

#[test]
fn a_distinguished_name_matches_by_its_parts_and_not_by_its_encoding() {
    let dn = |text: &str| text.parse::<Identity>().unwrap();
    assert!(dn("C=CH, O=Example, CN=Moon").matches(&dn("c=CH,o=example,cn=moon")));
    assert!(!dn("C=CH, O=Example, CN=Moon").matches(&dn("O=Example, C=CH, CN=Moon")));
    assert!(!dn("C=CH, CN=Moon").matches(&dn("C=CH, O=Moon")));
    assert!(!dn("CN=moon.example").matches(&dn("moon.example")));
    // The same text as PrintableString, which is what many CAs write.
    let Identity::DistinguishedName(utf8) = dn("CN=Moon") else { panic!() };
    let printable = utf8.iter().map(|o| if *o == 0x0c { 0x13 } else { *o }).collect();
    assert!(dn("CN=Moon").matches(&Identity::DistinguishedName(printable)));
}

#[test]
fn an_identity_from_the_wire_that_makes_no_sense_is_refused_and_never_shown_raw() {
    for (kind, data) in
        [(IdType::Ipv4Addr, 3), (IdType::Ipv6Addr, 4), (IdType::Null, 0), (IdType::Other(99), 1)]
    {
        assert!(Identity::try_from(&Identification::new(kind, vec![0; data])).is_err());
    }
    assert!(Identity::try_from(&Identification::new(IdType::Fqdn, vec![0xff])).is_err());
    let nasty = Identification::new(IdType::Fqdn, b"a\x1b[2Jb\n".to_vec());
    assert_eq!(Identity::try_from(&nasty).unwrap().to_string(), "a\\u{1b}[2Jb\\n");
    let nasty = Identity::DistinguishedName(vec![1, 2, 3]);
    assert_eq!(nasty.to_string(), "dn:0x010203");
}

#[test]
fn no_key_is_printed() {
    let host = Ca::root("CA").host(&rcgen::PKCS_ED25519, Vec::new());
    assert_eq!(format!("{:?}", host.key), "SigningKey(Ed25519)");
    assert_eq!(format!("{:?}", Credential::Psk(Secret::new(b"hunter2".to_vec()))), "Psk(Secret(7 octets))");
}
