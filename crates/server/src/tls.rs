//! TLS 1.3 with a client certificate that is welcome but not demanded, and who is at the other end of a connection.

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use model::{Fingerprint, UnixMillis};
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, ParsedCertificate, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme,
};

use crate::app::now;
use crate::ca::{self, Ca, Identity};
use crate::{Error, secret};

/// The server's own certificate: connections that begin after [`ServerCertificate::renew`] get the new one, those that are
/// open go on.
#[derive(Debug)]
pub(crate) struct ServerCertificate(RwLock<Shown>);

#[derive(Debug)]
struct Shown {
    key: Arc<CertifiedKey>,
    made: UnixMillis,
    expires: UnixMillis,
}

impl Shown {
    fn new(identity: Identity) -> Result<Self, Error> {
        let expires = ca::expires(&identity.certificate).unwrap_or_default();
        let key = aws_lc_rs::sign::any_supported_type(&identity.key).map_err(Error::Tls)?;
        // The CA goes along: a host that joins knows it by its fingerprint alone.
        Ok(Self {
            key: Arc::new(CertifiedKey::new(vec![identity.certificate, identity.ca], key)),
            made: now(),
            expires,
        })
    }
}

impl ServerCertificate {
    pub(crate) fn new(identity: Identity) -> Result<Self, Error> {
        Shown::new(identity).map(|shown| Self(RwLock::new(shown)))
    }

    /// Shows another one from now on.
    pub(crate) fn renew(&self, identity: Identity) -> Result<(), Error> {
        let shown = Shown::new(identity)?;
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = shown;
        Ok(())
    }

    /// When it runs out.
    pub(crate) fn expires(&self) -> UnixMillis {
        self.0.read().unwrap_or_else(PoisonError::into_inner).expires
    }

    /// Whether the next one is to be made: two thirds of its life are over, or it was made by a clock that was set back since.
    pub(crate) fn is_due(&self, now: UnixMillis) -> bool {
        let shown = self.0.read().unwrap_or_else(PoisonError::into_inner);
        now < shown.made || now >= shown.made + shown.expires.saturating_sub(shown.made) / 3 * 2
    }
}

impl ResolvesServerCert for ServerCertificate {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.read().unwrap_or_else(PoisonError::into_inner).key.clone())
    }
}

/// The server's side of TLS: TLS 1.3 alone, HTTP/2 or HTTP/1.1.
pub(crate) fn config(ca: &Ca, certificate: Arc<ServerCertificate>) -> Result<ServerConfig, Error> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let mut roots = RootCertStore::empty();
    roots.add(ca.certificate().clone()).map_err(Error::Tls)?;
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .allow_unauthenticated()
        .build()
        .map_err(|error| Error::Tls(rustls::Error::General(error.to_string())))?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(Error::Tls)?
        .with_client_cert_verifier(Arc::new(Lenient(verifier)))
        .with_cert_resolver(certificate);
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

/// SHA-256 of the key in a certificate (SubjectPublicKeyInfo, RFC 5280 §4.1).
pub(crate) fn key_of(certificate: &CertificateDer<'_>) -> Option<Fingerprint> {
    let parsed = ParsedCertificate::try_from(certificate).ok()?;
    Some(secret::sha256(&parsed.subject_public_key_info()))
}

/// Authority is the key in the store: a certificate that ran out while its host was away locks nobody out, nor does one that
/// was made while the server's clock was ahead.
#[derive(Debug)]
struct Lenient(Arc<dyn ClientCertVerifier>);

impl ClientCertVerifier for Lenient {
    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verdict = self.0.verify_client_cert(end_entity, intermediates, now);
        let good = match &verdict {
            Err(rustls::Error::InvalidCertificate(CertificateError::ExpiredContext {
                not_after, ..
            })) => not_after.as_secs().saturating_sub(1),
            Err(rustls::Error::InvalidCertificate(CertificateError::NotValidYetContext {
                not_before,
                ..
            })) => not_before.as_secs().saturating_add(1),
            _ => return verdict,
        };
        tracing::warn!("a client's certificate ran out, or is not valid yet; its key still counts");
        let good = UnixTime::since_unix_epoch(Duration::from_secs(good));
        self.0.verify_client_cert(end_entity, intermediates, good)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.0.root_hint_subjects()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.0.client_auth_mandatory()
    }

    fn offer_client_auth(&self) -> bool {
        self.0.offer_client_auth()
    }
}
