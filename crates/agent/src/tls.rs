//! TLS towards the server: only a certificate that the environment's CA signed is believed.
//!
//! The server's address may be anything (an IP, a name, a balancer), so its certificate is checked for the fixed name
//! [`SERVER_NAME`], which the CA gives to servers only. A host that joins knows the CA by the fingerprint in its token.

use std::sync::Arc;

use aws_lc_rs::digest;
use model::Fingerprint;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};

/// The name that every server's certificate carries.
pub const SERVER_NAME: &str = "droveway-server";

/// Why a TLS configuration cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A certificate or key is not PEM, or not usable.
    #[error("{what} cannot be used: {why}")]
    Material {
        /// Which.
        what: &'static str,
        /// Why.
        why: String,
    },
}

/// Whom to believe.
#[derive(Debug, Clone)]
pub enum Trust {
    /// The CA with this certificate, PEM.
    Ca(String),
    /// The CA whose certificate, which the server sends along, has this SHA-256.
    Fingerprint(Fingerprint),
}

/// A client's certificate and key, both PEM.
#[derive(Clone)]
pub struct ClientIdentity {
    /// The certificate.
    pub certificate: String,
    /// The private key.
    pub key: String,
}

/// TLS 1.3 with HTTP/2 or HTTP/1.1, believing `trust`, showing `identity`.
pub fn client_config(trust: Trust, identity: Option<ClientIdentity>) -> Result<ClientConfig, TlsError> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier: Arc<dyn ServerCertVerifier> = match trust {
        Trust::Ca(pem) => Arc::new(Named(by_root(&certificate("the CA certificate", &pem)?, &provider)?)),
        Trust::Fingerprint(fingerprint) => Arc::new(Pinned { fingerprint, provider: provider.clone() }),
    };
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| TlsError::Material { what: "TLS 1.3", why: e.to_string() })?
        .dangerous()
        .with_custom_certificate_verifier(verifier);
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some(identity) => {
            let chain = vec![certificate("the client certificate", &identity.certificate)?];
            let key = PrivateKeyDer::from_pem_slice(identity.key.as_bytes())
                .map_err(|e| TlsError::Material { what: "the client key", why: e.to_string() })?;
            builder
                .with_client_auth_cert(chain, key)
                .map_err(|e| TlsError::Material { what: "the client key", why: e.to_string() })?
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

/// The SHA-256 of a certificate.
pub fn fingerprint(certificate: &CertificateDer<'_>) -> Fingerprint {
    let mut octets = [0; 32];
    octets.copy_from_slice(digest::digest(&digest::SHA256, certificate).as_ref());
    Fingerprint(octets)
}

fn certificate(what: &'static str, pem: &str) -> Result<CertificateDer<'static>, TlsError> {
    CertificateDer::from_pem_slice(pem.as_bytes())
        .map_err(|e| TlsError::Material { what, why: e.to_string() })
}

fn by_root(
    root: &CertificateDer<'static>,
    provider: &Arc<CryptoProvider>,
) -> Result<Arc<WebPkiServerVerifier>, TlsError> {
    let unusable = |why: String| TlsError::Material { what: "the CA certificate", why };
    let mut roots = RootCertStore::empty();
    roots.add(root.clone()).map_err(|e| unusable(e.to_string()))?;
    WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider.clone())
        .build()
        .map_err(|e| unusable(e.to_string()))
}

/// Checks for [`SERVER_NAME`], whatever the URL says.
#[derive(Debug)]
struct Named(Arc<WebPkiServerVerifier>);

/// Takes for the CA the sent certificate that has the fingerprint.
#[derive(Debug)]
struct Pinned {
    fingerprint: Fingerprint,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Named {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _url_name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let name = ServerName::try_from(SERVER_NAME).map_err(|e| rustls::Error::General(e.to_string()))?;
        self.0.verify_server_cert(end_entity, intermediates, &name, ocsp, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        url_name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let root = intermediates.iter().find(|cert| fingerprint(cert) == self.fingerprint).ok_or_else(|| {
            let shown = intermediates.last().map_or_else(|| "none".to_owned(), |cert| fingerprint(cert).to_string());
            rustls::Error::General(format!(
                "the server's CA has fingerprint {shown}, the token says {}: this is another server, or somebody in \
                 between; check --server, or make a new token there",
                self.fingerprint
            ))
        })?;
        let verifier = by_root(&root.clone().into_owned(), &self.provider)
            .map_err(|e| rustls::Error::General(e.to_string()))?;
        Named(verifier).verify_server_cert(end_entity, intermediates, url_name, ocsp, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(
            message,
            cert,
            dss,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            cert,
            dss,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
