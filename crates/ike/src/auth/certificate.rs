//! X.509 certificates: as carriers of a known key, or as chains to a CA.
//!
//! Chains are built and checked by webpki (path building with bounds, signatures, constraints, validity); what webpki
//! does not show (identities other than DNS names, validity) is read with x509-parser. See
//! `docs/decisions/012-x509-by-webpki.md` for why. Extended key usage is not looked at: the CA is one that was named for this peer.

use std::fmt;
use std::time::Duration;

use aws_lc_rs::digest;
use rustls_pki_types::{CertificateDer, SignatureVerificationAlgorithm, TrustAnchor, UnixTime};
use webpki::{EndEntityCert, ExtendedKeyUsageValidator, KeyPurposeIdIter, anchor_from_trusted_cert};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;

use super::{Identity, PublicKey, UnixSeconds};
use crate::crypto::spki_sha1;
use crate::error::{AuthFailure, Error, Misuse};
use crate::wire::{CertEncoding, Certificate};

/// Most certificates of a peer that are looked at.
const MAX_CHAIN: usize = 8;

/// SHA-256 of a SubjectPublicKeyInfo in DER: the name of a key.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SpkiHash(pub [u8; 32]);

impl SpkiHash {
    /// The name of this key.
    pub fn of(spki: &[u8]) -> Self {
        let mut hash = [0; 32];
        hash.copy_from_slice(digest::digest(&digest::SHA256, spki).as_ref());
        SpkiHash(hash)
    }

    /// The name of the key in a certificate in DER.
    ///
    /// # Errors
    /// [`AuthFailure::BadCertificate`].
    pub fn of_certificate(der: &[u8]) -> Result<Self, Error> {
        Ok(Self::of(parse(der)?.public_key().raw))
    }
}

impl fmt::Display for SpkiHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|octet| write!(f, "{octet:02x}"))
    }
}

impl fmt::Debug for SpkiHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SpkiHash({self})")
    }
}

/// What an expired certificate means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expiry {
    /// No.
    Enforced,
    /// It is shown in [`CertInfo`], and the peer is let in.
    Shown,
}

/// What a peer's certificate says, to be shown.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertInfo {
    /// The subject, as text.
    pub subject: String,
    /// The issuer, as text.
    pub issuer: String,
    /// First second of validity.
    pub not_before: UnixSeconds,
    /// Last second of validity.
    pub not_after: UnixSeconds,
    /// Whether it, or for a chain one above it, was outside its validity.
    pub expired: bool,
    /// The name of its key.
    pub key: SpkiHash,
}

/// The key that `hash` names, from the peer's CERT payloads.
pub(super) fn pinned_key(
    certificates: &[Certificate],
    hash: &SpkiHash,
    now: UnixSeconds,
) -> Result<(PublicKey, Option<CertInfo>), Error> {
    // The first CERT is the one that AUTH is to be verified with (RFC 7296 §3.6).
    let first = certificates.first().ok_or(AuthFailure::NoCertificate)?;
    let (spki, info) = match first.encoding {
        CertEncoding::X509Signature => {
            let certificate = parse(&first.data)?;
            let info = info(&certificate, now);
            (certificate.public_key().raw.to_vec(), Some(info))
        }
        CertEncoding::RawPublicKey => (first.data.clone(), None),
        CertEncoding::Crl
        | CertEncoding::HashAndUrl
        | CertEncoding::HashAndUrlBundle
        | CertEncoding::Other(_) => return Err(AuthFailure::NoCertificate.into()),
    };
    if SpkiHash::of(&spki) != *hash {
        return Err(AuthFailure::WrongKey.into());
    }
    Ok((PublicKey::from_spki(&spki)?, info))
}

/// CAs that certificates may chain to.
#[derive(Debug, Clone)]
pub struct Anchors {
    anchors: Vec<TrustAnchor<'static>>,
    key_ids: Vec<u8>,
}

/// Takes every extended key usage: IKE has none that everybody sets.
struct AnyUsage;

impl ExtendedKeyUsageValidator for AnyUsage {
    fn validate(&self, _: KeyPurposeIdIter<'_, '_>) -> Result<(), webpki::Error> {
        Ok(())
    }
}

/// How certificates of a chain may be signed.
static CHAIN_ALGORITHMS: &[&dyn SignatureVerificationAlgorithm] = &[
    webpki::aws_lc_rs::ECDSA_P256_SHA256,
    webpki::aws_lc_rs::ECDSA_P256_SHA384,
    webpki::aws_lc_rs::ECDSA_P256_SHA512,
    webpki::aws_lc_rs::ECDSA_P384_SHA256,
    webpki::aws_lc_rs::ECDSA_P384_SHA384,
    webpki::aws_lc_rs::ECDSA_P384_SHA512,
    webpki::aws_lc_rs::ED25519,
    webpki::aws_lc_rs::RSA_PKCS1_2048_8192_SHA256,
    webpki::aws_lc_rs::RSA_PKCS1_2048_8192_SHA384,
    webpki::aws_lc_rs::RSA_PKCS1_2048_8192_SHA512,
    webpki::aws_lc_rs::RSA_PSS_2048_8192_SHA256_LEGACY_KEY,
    webpki::aws_lc_rs::RSA_PSS_2048_8192_SHA384_LEGACY_KEY,
    webpki::aws_lc_rs::RSA_PSS_2048_8192_SHA512_LEGACY_KEY,
];

impl Anchors {
    /// The CAs with these certificates, in DER.
    ///
    /// # Errors
    /// [`Misuse::Config`] if there is none, or one does not parse.
    pub fn new(certificates: &[Vec<u8>]) -> Result<Self, Error> {
        if certificates.is_empty() {
            return Err(Misuse::Config("no CA certificate given").into());
        }
        let mut anchors = Vec::new();
        let mut key_ids = Vec::new();
        for der in certificates {
            let malformed = Misuse::Config("a CA certificate is malformed");
            let parsed = parse(der).map_err(|_| malformed.clone())?;
            if !parsed.is_ca() {
                return Err(Misuse::Config("a certificate given as CA is not one (basicConstraints)").into());
            }
            key_ids.extend(spki_sha1(parsed.public_key().raw));
            let der = CertificateDer::from(der.as_slice());
            anchors.push(anchor_from_trusted_cert(&der).map_err(|_| malformed)?.to_owned());
        }
        Ok(Anchors { anchors, key_ids })
    }

    /// The CAs as CERTREQ names them.
    pub(super) fn key_ids(&self) -> Vec<u8> {
        self.key_ids.clone()
    }

    /// The key of the peer's certificate, if it chains to one of these and names `id`.
    pub(super) fn check(
        &self,
        certificates: &[Certificate],
        id: &Identity,
        expiry: Expiry,
        now: UnixSeconds,
    ) -> Result<(PublicKey, CertInfo), Error> {
        let x509: Vec<_> = certificates
            .iter()
            .filter(|c| c.encoding == CertEncoding::X509Signature)
            .take(MAX_CHAIN)
            .map(|c| CertificateDer::from(c.data.as_slice()))
            .collect();
        let (own, above) = x509.split_first().ok_or(AuthFailure::NoCertificate)?;
        let parsed = parse(own)?;
        let mut info = info(&parsed, now);
        match self.chain(own, above, now) {
            Ok(()) => {}
            Err(AuthFailure::Expired | AuthFailure::NotYetValid) if expiry == Expiry::Shown => {
                info.expired = true;
                // At the birth of the youngest, all of them are valid, if they ever were together.
                let births =
                    x509.iter().filter_map(|der| parse(der).ok().map(|c| seconds(c.validity().not_before)));
                self.chain(own, above, births.max().unwrap_or(now))?;
            }
            Err(failure) => return Err(failure.into()),
        }
        if !names(&parsed, id) {
            return Err(AuthFailure::IdentityNotInCertificate(id.to_string()).into());
        }
        Ok((PublicKey::from_spki(parsed.public_key().raw)?, info))
    }

    fn chain(
        &self,
        own: &CertificateDer<'_>,
        above: &[CertificateDer<'_>],
        at: UnixSeconds,
    ) -> Result<(), AuthFailure> {
        let failed = |error| match error {
            webpki::Error::CertExpired { .. } => AuthFailure::Expired,
            webpki::Error::CertNotValidYet { .. } => AuthFailure::NotYetValid,
            other => AuthFailure::Chain(other.to_string()),
        };
        let at = UnixTime::since_unix_epoch(Duration::from_secs(at));
        let own = EndEntityCert::try_from(own).map_err(failed)?;
        own.verify_for_usage(CHAIN_ALGORITHMS, &self.anchors, above, at, AnyUsage, None, None)
            .map(|_| ())
            .map_err(failed)
    }
}

fn parse(der: &[u8]) -> Result<X509Certificate<'_>, Error> {
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        _ => Err(AuthFailure::BadCertificate.into()),
    }
}

fn info(certificate: &X509Certificate<'_>, now: UnixSeconds) -> CertInfo {
    let (not_before, not_after) =
        (seconds(certificate.validity().not_before), seconds(certificate.validity().not_after));
    CertInfo {
        subject: certificate.subject().to_string().escape_default().to_string(),
        issuer: certificate.issuer().to_string().escape_default().to_string(),
        not_before,
        not_after,
        expired: !(not_before..=not_after).contains(&now),
        key: SpkiHash::of(certificate.public_key().raw),
    }
}

fn seconds(time: x509_parser::time::ASN1Time) -> UnixSeconds {
    u64::try_from(time.timestamp()).unwrap_or(0)
}

/// Whether a certificate carries an identity: in its subject for a distinguished name, else in subjectAltName.
fn names(certificate: &X509Certificate<'_>, id: &Identity) -> bool {
    let alternatives = certificate.subject_alternative_name().ok().flatten();
    let any = |wanted: &dyn Fn(&GeneralName<'_>) -> bool| {
        alternatives.as_ref().is_some_and(|san| san.value.general_names.iter().any(wanted))
    };
    match id {
        Identity::DistinguishedName(_) => {
            Identity::DistinguishedName(certificate.subject().as_raw().to_vec()).matches(id)
        }
        Identity::Fqdn(name) => {
            any(&|n| matches!(n, GeneralName::DNSName(dns) if dns.eq_ignore_ascii_case(name)))
        }
        Identity::Email(mail) => {
            any(&|n| matches!(n, GeneralName::RFC822Name(m) if m.eq_ignore_ascii_case(mail)))
        }
        Identity::Address(address) => any(&|n| match (n, address) {
            (GeneralName::IPAddress(octets), std::net::IpAddr::V4(a)) => *octets == a.octets(),
            (GeneralName::IPAddress(octets), std::net::IpAddr::V6(a)) => *octets == a.octets(),
            _ => false,
        }),
        // No field of a certificate is a key id by its issuer's word.
        Identity::KeyId(_) => false,
    }
}
