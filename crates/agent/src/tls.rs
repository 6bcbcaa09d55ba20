//! TLS towards the server: only a certificate that the environment's CA signed is believed, for the name that every
//! Droveway server has, whatever address or host name it is reached by (RFC 5280 §6, RFC 9525 with a fixed reference
//! identity). A host that joins knows the CA by the fingerprint in its token; all others know its certificate.
//!
//! Invariant: this is the only place that makes a client's TLS, and it speaks TLS 1.3 alone (RFC 8446).

use std::error::Error as StdError;
use std::io;
use std::sync::Arc;

use aws_lc_rs::digest::{SHA256, digest};
use model::{Fingerprint, SERVER_NAME, UnixMillis};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls13_signature};
use rustls::{
    CertificateError, ClientConfig, ConfigBuilder, DigitallySignedStruct, OtherError, PeerIncompatible,
    RootCertStore, SignatureScheme, WantsVerifier,
};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};

/// Why a TLS configuration cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// What should be the CA's certificate is none.
    #[error("the CA certificate cannot be used: {0}")]
    Ca(String),
    /// The client's certificate or key is none, or they do not belong together.
    #[error("the client certificate and key cannot be used: {0}")]
    Identity(String),
    /// The client itself cannot be made.
    #[error("the client cannot start: {0}")]
    Setup(String),
}

/// Whom to believe.
#[derive(Debug, Clone)]
pub enum Trust {
    /// The CA with this certificate.
    Ca(CertificateDer<'static>),
    /// The CA whose certificate, which the server sends along, has this SHA-256: what a join token says.
    Fingerprint(Fingerprint),
}

impl Trust {
    /// The CA whose certificate is the first in `pem`.
    pub fn ca(pem: &[u8]) -> Result<Self, TlsError> {
        CertificateDer::from_pem_slice(pem).map(Self::Ca).map_err(|error| TlsError::Ca(error.to_string()))
    }

    /// SHA-256 of the CA's certificate.
    pub fn fingerprint(&self) -> Fingerprint {
        match self {
            Self::Ca(certificate) => fingerprint(certificate),
            Self::Fingerprint(fingerprint) => *fingerprint,
        }
    }
}

/// A client's certificate and key, both PEM.
#[derive(Clone)]
pub struct ClientIdentity {
    /// The certificate.
    pub certificate: String,
    /// The private key.
    pub key: String,
}

/// TLS with HTTP/2 or HTTP/1.1, believing `trust`, showing `identity`.
pub fn client_config(trust: Trust, identity: Option<ClientIdentity>) -> Result<ClientConfig, TlsError> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let verifier = Verifier::new(trust, Arc::clone(&provider))?;
    let builder = builder(provider)?.dangerous().with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match identity {
        None => builder.with_no_client_auth(),
        Some(ClientIdentity { certificate, key }) => {
            let unusable = |error: &dyn StdError| TlsError::Identity(error.to_string());
            let certificate =
                CertificateDer::from_pem_slice(certificate.as_bytes()).map_err(|error| unusable(&error))?;
            let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(|error| unusable(&error))?;
            builder.with_client_auth_cert(vec![certificate], key).map_err(|error| unusable(&error))?
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

/// When the first certificate in `pem` runs out; `None` if there is none.
pub fn expires(pem: &str) -> Option<UnixMillis> {
    let certificate = CertificateDer::from_pem_slice(pem.as_bytes()).ok()?;
    let (_, parsed) = x509_parser::parse_x509_certificate(&certificate).ok()?;
    u64::try_from(parsed.validity().not_after.timestamp()).ok()?.checked_mul(1000)
}

/// A configuration that trusts nobody: for clients of Unix sockets, which never speak TLS and must not look for
/// system-wide roots.
pub fn nobody() -> Result<ClientConfig, TlsError> {
    let builder = builder(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))?;
    Ok(builder.with_root_certificates(RootCertStore::empty()).with_no_client_auth())
}

fn builder(provider: Arc<CryptoProvider>) -> Result<ConfigBuilder<ClientConfig, WantsVerifier>, TlsError> {
    ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| TlsError::Setup(error.to_string()))
}

/// Why a server's certificate was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{why}{}", self.other())]
pub struct Untrusted {
    /// What is wrong with it.
    pub why: String,
    /// Whether another CA signed it: the likely case, another or a newly made server.
    pub other_ca: bool,
    /// Whether the CA is known by a token's fingerprint alone.
    pub by_token: bool,
    /// The CA that it should come from.
    pub expected: Fingerprint,
    /// The CA that the server showed, or its own certificate if it showed no other CA.
    pub presented: Fingerprint,
    /// Whether `presented` is a CA's.
    pub is_ca: bool,
}

impl Untrusted {
    /// Both fingerprints, where they say something, and what to do where only the token can be wrong.
    fn other(&self) -> String {
        let Self { expected, presented, .. } = self;
        if !self.other_ca {
            return String::new();
        }
        let kind = if self.is_ca { "CA" } else { "certificate" };
        if self.by_token {
            format!(
                ": the token expects the CA {expected}, presented was the {kind} {presented} (SHA-256); this is \
                 another server, or somebody is in between: check --server, or make a new token there"
            )
        } else {
            format!(": expected is the CA {expected}, presented was the {kind} {presented} (SHA-256)")
        }
    }
}

/// The refusal of a server's certificate, if that is what is at the bottom of `error`.
pub fn untrusted(error: &(dyn StdError + 'static)) -> Option<Untrusted> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(why)))) =
            error.downcast_ref()
        {
            return why.downcast_ref::<Untrusted>().cloned();
        }
        // An `io::Error` hides what it wraps from `source`.
        next = match error.downcast_ref::<io::Error>().and_then(io::Error::get_ref) {
            Some(wrapped) => Some(wrapped),
            None => error.source(),
        };
    }
    None
}

/// The last cause alone: what the system said, without the layers that passed it on.
pub fn root_cause(error: &(dyn StdError + 'static)) -> String {
    let mut last = error;
    while let Some(cause) = last.source() {
        last = cause;
    }
    match last.downcast_ref::<io::Error>() {
        // Of TLS it says more than there is to know.
        Some(error) if error.kind() == io::ErrorKind::UnexpectedEof => "it ended the connection".to_owned(),
        Some(_) | None => last.to_string(),
    }
}

fn fingerprint(certificate: &CertificateDer<'_>) -> Fingerprint {
    let mut octets = [0; 32];
    octets.copy_from_slice(digest(&SHA256, certificate).as_ref());
    Fingerprint(octets)
}

fn by_root(
    root: CertificateDer<'_>,
    provider: Arc<CryptoProvider>,
) -> Result<Arc<WebPkiServerVerifier>, rustls::Error> {
    let mut roots = RootCertStore::empty();
    roots.add(root.into_owned())?;
    WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider)
        .build()
        .map_err(|error| rustls::Error::General(error.to_string()))
}

/// Verifies for [`SERVER_NAME`], not for the host in the URL, and says more when it refuses.
#[derive(Debug)]
struct Verifier {
    expected: Fingerprint,
    /// None where the CA is known by its fingerprint alone: then the server has to send it along.
    known: Option<Arc<WebPkiServerVerifier>>,
    name: ServerName<'static>,
    provider: Arc<CryptoProvider>,
}

impl Verifier {
    fn new(trust: Trust, provider: Arc<CryptoProvider>) -> Result<Self, TlsError> {
        let expected = trust.fingerprint();
        let known = match trust {
            Trust::Ca(root) => {
                let verifier = by_root(root, Arc::clone(&provider));
                Some(verifier.map_err(|error| TlsError::Ca(error.to_string()))?)
            }
            Trust::Fingerprint(_) => None,
        };
        let name = ServerName::try_from(SERVER_NAME).map_err(|error| TlsError::Setup(error.to_string()))?;
        Ok(Self { expected, known, name, provider })
    }

    /// What verifies the chain, once the CA is found.
    fn root(&self, sent: &[CertificateDer<'_>]) -> Result<Arc<WebPkiServerVerifier>, rustls::Error> {
        if let Some(known) = &self.known {
            return Ok(Arc::clone(known));
        }
        let root = sent.iter().find(|certificate| fingerprint(certificate) == self.expected);
        by_root(root.ok_or(CertificateError::UnknownIssuer)?.clone(), Arc::clone(&self.provider))
    }

    fn refusal(
        &self,
        error: &rustls::Error,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
    ) -> Untrusted {
        let certificate = match error {
            rustls::Error::InvalidCertificate(certificate) => Some(certificate),
            _ => None,
        };
        // A CA of the same name with another key shows as a bad signature.
        let other_ca =
            matches!(certificate, Some(CertificateError::UnknownIssuer | CertificateError::BadSignature));
        let why = match certificate {
            Some(_) if other_ca => "its certificate was signed by another CA".to_owned(),
            Some(CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. }) => {
                format!("its certificate is not a Droveway server's (it lacks the name {SERVER_NAME})")
            }
            Some(CertificateError::Expired | CertificateError::ExpiredContext { .. }) => {
                "its certificate has expired, or this machine's clock is wrong".to_owned()
            }
            Some(CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. }) => {
                "its certificate is not valid yet; is this machine's clock wrong?".to_owned()
            }
            Some(_) | None => error.to_string(),
        };
        // Whoever sends the right CA along with a certificate of their own is known by the latter.
        let other = rest.iter().map(fingerprint).rfind(|sent| *sent != self.expected);
        Untrusted {
            why,
            other_ca,
            by_token: self.known.is_none(),
            expected: self.expected,
            presented: other.unwrap_or_else(|| fingerprint(leaf)),
            is_ca: other.is_some(),
        }
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _url_name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.root(intermediates)
            .and_then(|root| root.verify_server_cert(end_entity, intermediates, &self.name, ocsp, now))
            .map_err(|error| {
                let refusal = self.refusal(&error, end_entity, intermediates);
                CertificateError::Other(OtherError(Arc::new(refusal))).into()
            })
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(PeerIncompatible::Tls12NotOffered.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let known = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, known)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
#[path = "tls_tests.rs"]
pub(crate) mod tests;
