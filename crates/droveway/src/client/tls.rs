//! Whom the client trusts: a certificate that the environment's CA signed, for the name that every Droveway server
//! has, whatever address or host name it is reached by (RFC 5280 §6, RFC 9525 with a fixed reference identity).

use std::error::Error as StdError;
use std::io;
use std::sync::Arc;

use aws_lc_rs::digest::{SHA256, digest};
use model::Fingerprint;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, OtherError, RootCertStore, SignatureScheme,
};

use super::Error;

/// The DNS name in every server's certificate.
pub const SERVER_NAME: &str = "droveway-server";

/// Why a server's certificate was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{why}{}", self.fingerprints())]
pub struct Untrusted {
    /// What is wrong with it.
    pub why: String,
    /// Whether another CA signed it: the likely case, another or a newly made server.
    pub other_ca: bool,
    /// The CA that it should come from.
    pub expected: Fingerprint,
    /// The CA that the server showed, or its own certificate if it showed no CA.
    pub presented: Fingerprint,
    /// Whether `presented` is a CA's.
    pub is_ca: bool,
}

impl Untrusted {
    /// Both fingerprints, where they say something.
    fn fingerprints(&self) -> String {
        let Self { expected, presented, .. } = self;
        match (self.other_ca, self.is_ca) {
            (true, true) => {
                format!(": expected is the CA {expected}, presented was the CA {presented} (SHA-256)")
            }
            (true, false) => {
                format!(
                    ": expected is the CA {expected}, presented was the certificate {presented} (SHA-256)"
                )
            }
            (false, _) => String::new(),
        }
    }
}

/// The TLS configuration that trusts the first certificate in `pem`, and that certificate's fingerprint; `None` when
/// there is none in it.
pub(super) fn config(pem: &[u8]) -> Result<Option<(ClientConfig, Fingerprint)>, Error> {
    let Some(Ok(ca)) = CertificateDer::pem_slice_iter(pem).next() else { return Ok(None) };
    let expected = fingerprint(&ca);
    let mut roots = RootCertStore::empty();
    if roots.add(ca).is_err() {
        return Ok(None);
    }
    let setup = |error: &dyn StdError| Error::Setup(error.to_string());
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let inner = WebPkiServerVerifier::builder_with_provider(roots.into(), Arc::clone(&provider))
        .build()
        .map_err(|error| setup(&error))?;
    let name = ServerName::try_from(SERVER_NAME).map_err(|error| setup(&error))?;
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| setup(&error))?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(ByFixedName { inner, name, expected }))
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Some((config, expected)))
}

/// A configuration that trusts nobody: for clients that never speak TLS, and that must not look for system-wide roots.
pub(super) fn nobody() -> Result<ClientConfig, Error> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    let config = config.map_err(|error| Error::Setup(error.to_string()))?;
    Ok(config.with_root_certificates(RootCertStore::empty()).with_no_client_auth())
}

/// The refusal of the verifier, if that is what is at the bottom of `error`.
pub(super) fn untrusted(error: &(dyn StdError + 'static)) -> Option<Untrusted> {
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

fn fingerprint(certificate: &CertificateDer<'_>) -> Fingerprint {
    let mut bytes = [0; 32];
    bytes.copy_from_slice(digest(&SHA256, certificate).as_ref());
    Fingerprint(bytes)
}

/// Verifies against [`SERVER_NAME`], not against the host in the URL, and says more when it refuses.
#[derive(Debug)]
struct ByFixedName {
    inner: Arc<WebPkiServerVerifier>,
    name: ServerName<'static>,
    expected: Fingerprint,
}

impl ByFixedName {
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
        let presented = fingerprint(rest.last().unwrap_or(leaf));
        Untrusted { why, other_ca, expected: self.expected, presented, is_ca: !rest.is_empty() }
    }
}

impl ServerCertVerifier for ByFixedName {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.inner.verify_server_cert(end_entity, intermediates, &self.name, ocsp_response, now).map_err(
            |error| {
                let refusal = self.refusal(&error, end_entity, intermediates);
                rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(refusal))))
            },
        )
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_found_below_layers_of_io_errors() {
        let refusal = Untrusted {
            why: "its certificate was signed by another CA".to_owned(),
            other_ca: true,
            expected: Fingerprint([1; 32]),
            presented: Fingerprint([2; 32]),
            is_ca: true,
        };
        let tls =
            rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(refusal.clone()))));
        let error = io::Error::other(io::Error::new(io::ErrorKind::InvalidData, tls));
        assert_eq!(untrusted(&error), Some(refusal.clone()));
        assert_eq!(untrusted(&io::Error::other("reset")), None);
        let text = refusal.to_string();
        assert!(
            text.contains(&"01".repeat(32)) && text.contains(&"02".repeat(32)),
            "both fingerprints are shown: {text}"
        );
    }
}
