//! The environment's certificate authority (RFC 5280), and the server's own certificate.
//!
//! The CA lives as long as its environment. The server's certificate is made anew at each start, and when two thirds of its
//! life are over, from a key that stays. Hosts' certificates come from signing requests: their keys never leave them, and
//! they ask for the next one in good time. Nothing outlives the CA.

use std::net::IpAddr;
use std::time::{Duration, SystemTime};

use model::{Fingerprint, HostId, SERVER_NAME, UnixMillis};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType, ExtendedKeyUsagePurpose,
    IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, DnsName, PrivateKeyDer};

use crate::app::now;
use crate::files::{self, DataDir};
use crate::{Error, secret};

const YEAR: Duration = Duration::from_hours(365 * 24);

/// No clock that is right is before this.
const RELEASED: (UnixMillis, &str) = (1_767_225_600_000, "2026-01-01");

/// How long certificates are good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lives {
    /// The CA's.
    pub ca: Duration,
    /// The server's own, and those of hosts. A host's that ran out is shown, not enforced: see `tls`.
    pub leaf: Duration,
}

impl Default for Lives {
    fn default() -> Self {
        Self { ca: 50 * YEAR, leaf: Duration::from_hours(90 * 24) }
    }
}

/// The certificate authority.
pub(crate) struct Ca {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    pem: String,
    expires: UnixMillis,
    leaf: Duration,
}

/// A certificate with its private key.
pub(crate) struct Identity {
    pub(crate) certificate: CertificateDer<'static>,
    pub(crate) ca: CertificateDer<'static>,
    pub(crate) key: PrivateKeyDer<'static>,
}

/// Why a signing request is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadRequest {
    #[error("csr is not a certificate signing request in PEM")]
    Unreadable,
    #[error("csr is not signed with the key in it")]
    Signature,
    #[error("csr asks for what no host's certificate has, or its key is of a kind that is not supported")]
    Unsupported,
}

/// A signing request whose sender has shown to hold its key.
pub(crate) struct Request(CertificateSigningRequestParams);

impl Request {
    pub(crate) fn parse(pem: &str) -> Result<Self, BadRequest> {
        match CertificateSigningRequestParams::from_pem(pem) {
            Ok(request) => Ok(Self(request)),
            Err(rcgen::Error::CouldNotParseCertificationRequest) => Err(BadRequest::Unreadable),
            Err(rcgen::Error::InvalidCertificationRequestSignature) => Err(BadRequest::Signature),
            Err(_) => Err(BadRequest::Unsupported),
        }
    }

    /// SHA-256 of the key (SubjectPublicKeyInfo): the authority of its holder.
    pub(crate) fn key(&self) -> Fingerprint {
        secret::sha256(&self.0.public_key.subject_public_key_info())
    }
}

impl Ca {
    /// Reads the CA, or makes it where there is none. Its key is written before its certificate, so a first start that
    /// was cut short goes on with the same key. `established`: hosts may already hold certificates of a CA, so none is made.
    /// `known` is the certificate that the store has: a server that joins others brings the CA's key alone.
    pub(crate) fn load_or_make(
        data: &DataDir,
        established: bool,
        known: Option<&str>,
        lives: Lives,
    ) -> Result<Self, Error> {
        let (key, mut pem) = (data.read(files::CA_KEY)?, data.read(files::CA_CERTIFICATE)?);
        if let Some(known) = known {
            if let Some(pem) = pem.as_ref().filter(|pem| *pem != known) {
                let path = data.path(files::CA_CERTIFICATE);
                let readable = CertificateDer::from_pem_slice(pem.as_bytes()).is_ok();
                return Err(if readable { Error::OtherCa(path) } else { Error::Unreadable(path) });
            }
            // Of several servers each has its own data directory; one that had the certificate had the key, too.
            if key.is_none() && pem.is_none() {
                return Err(Error::NoCaKey(data.path(files::CA_KEY)));
            }
            if key.is_some() && pem.is_none() {
                data.write(files::CA_CERTIFICATE, known)?;
                pem = Some(known.to_owned());
            }
        }
        if established && (key.is_none() || pem.is_none()) || key.is_none() && pem.is_some() {
            let missing = if key.is_none() { files::CA_KEY } else { files::CA_CERTIFICATE };
            return Err(Error::Missing(data.path(missing)));
        }
        if pem.is_none() && now() < RELEASED.0 {
            return Err(Error::Clock(RELEASED.1));
        }
        let key = key_pair(data, files::CA_KEY, key)?;
        let pem = if let Some(pem) = pem {
            pem
        } else {
            let pem = ca_params(lives.ca)?.self_signed(&key).map_err(Error::Certificate)?.pem();
            data.write(files::CA_CERTIFICATE, &pem)?;
            pem
        };
        let unreadable = || Error::Unreadable(data.path(files::CA_CERTIFICATE));
        let certificate = CertificateDer::from_pem_slice(pem.as_bytes()).map_err(|_| unreadable())?;
        let spki = rustls::server::ParsedCertificate::try_from(&certificate)
            .map_err(|_| unreadable())?
            .subject_public_key_info();
        if spki.as_ref() != key.subject_public_key_info() {
            return Err(Error::Mismatch(data.path(files::CA_CERTIFICATE), data.path(files::CA_KEY)));
        }
        let issuer = Issuer::from_ca_cert_der(&certificate, key).map_err(|_| unreadable())?;
        let expires = expires(&certificate).ok_or_else(unreadable)?;
        Ok(Self { issuer, certificate, pem, expires, leaf: lives.leaf })
    }

    /// When its certificate runs out.
    pub(crate) fn expires(&self) -> UnixMillis {
        self.expires
    }

    /// How long a certificate that is made now is good for.
    fn life(&self) -> Duration {
        self.leaf.min(Duration::from_millis(self.expires.saturating_sub(now())))
    }

    pub(crate) fn fingerprint(&self) -> Fingerprint {
        secret::sha256(&self.certificate)
    }

    pub(crate) fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    pub(crate) fn pem(&self) -> &str {
        &self.pem
    }

    /// The server's certificate for these names and addresses, besides [`SERVER_NAME`] and `localhost`.
    pub(crate) fn server(
        &self,
        data: &DataDir,
        names: &[String],
        addresses: &[IpAddr],
    ) -> Result<Identity, Error> {
        let key = key_pair(data, files::SERVER_KEY, data.read(files::SERVER_KEY)?)?;
        let mut params = params("droveway server", self.life())?;
        let mut push = |name: SanType| {
            if !params.subject_alt_names.contains(&name) {
                params.subject_alt_names.push(name);
            }
        };
        for name in [SERVER_NAME, "localhost"].into_iter().chain(names.iter().map(String::as_str)) {
            push(if let Ok(address) = name.parse() {
                SanType::IpAddress(address)
            } else {
                let bad = || Error::BadName(name.to_owned());
                DnsName::try_from(name).map_err(|_| bad())?;
                SanType::DnsName(name.try_into().map_err(|_| bad())?)
            });
        }
        for address in addresses {
            push(SanType::IpAddress(*address));
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let certificate = params.signed_by(&key, &self.issuer).map_err(Error::Certificate)?;
        // For people to look at; nobody reads it. A full disk keeps no server from starting.
        if let Err(error) = data.write(files::SERVER_CERTIFICATE, &certificate.pem()) {
            tracing::warn!("{error}; the server starts all the same");
        }
        let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
        Ok(Identity { certificate: certificate.into(), ca: self.certificate.clone(), key })
    }

    /// A certificate for a host, PEM. Nothing of the request is taken over but its key.
    pub(crate) fn sign(&self, request: &Request, host: &HostId) -> Result<String, Error> {
        let mut params = params(host.as_str(), self.life())?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        // For client authentication alone: a host is never taken for the server.
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        Ok(params.signed_by(&request.0.public_key, &self.issuer).map_err(Error::Certificate)?.pem())
    }
}

fn key_pair(data: &DataDir, name: &'static str, pem: Option<String>) -> Result<KeyPair, Error> {
    if let Some(pem) = pem {
        return KeyPair::from_pem(&pem).map_err(|_| Error::Unreadable(data.path(name)));
    }
    let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(Error::Certificate)?;
    data.write(name, &key.serialize_pem())?;
    Ok(key)
}

/// When a certificate runs out; `None` if it is none.
pub(crate) fn expires(certificate: &CertificateDer<'_>) -> Option<UnixMillis> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    u64::try_from(parsed.validity().not_after.timestamp()).ok()?.checked_mul(1000)
}

fn ca_params(life: Duration) -> Result<CertificateParams, Error> {
    let mut params = params("droveway CA", life)?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

/// A clock that is behind by up to a year does no harm.
fn params(name: &str, life: Duration) -> Result<CertificateParams, Error> {
    let now = SystemTime::now();
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, name);
    params.not_before = (now - YEAR).into();
    params.not_after = (now + life).into();
    params.use_authority_key_identifier_extension = true;
    let mut serial = secret::random::<16>()?;
    serial[0] &= 0x7f;
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    Ok(params)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_first_start_cut_short_goes_on_with_the_same_key() {
        let dir = tempfile::tempdir().unwrap();
        let data = DataDir::open(dir.path()).unwrap();
        Ca::load_or_make(&data, false, None, Lives::default()).unwrap();
        let key = data.read(files::CA_KEY).unwrap();
        std::fs::remove_file(data.path(files::CA_CERTIFICATE)).unwrap();
        let ca = Ca::load_or_make(&data, false, None, Lives::default()).unwrap();
        assert_eq!(data.read(files::CA_KEY).unwrap(), key);
        assert_eq!(
            Ca::load_or_make(&data, true, None, Lives::default()).unwrap().fingerprint(),
            ca.fingerprint()
        );
    }

    #[test]
    fn a_lost_or_foreign_ca_key_is_said_and_nothing_is_made_in_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let data = DataDir::open(dir.path()).unwrap();
        let fail = |established| match Ca::load_or_make(&data, established, None, Lives::default()) {
            Ok(_) => panic!("accepted"),
            Err(error) => error.to_string(),
        };
        assert!(fail(true).contains("ca.key"));
        Ca::load_or_make(&data, false, None, Lives::default()).unwrap();
        data.write(files::CA_KEY, &KeyPair::generate().unwrap().serialize_pem()).unwrap();
        assert!(fail(false).contains("do not belong together"));
        for rubbish in [&b"rubbish"[..], b"\xff\xfe\x00rubbish"] {
            std::fs::write(data.path(files::CA_KEY), rubbish).unwrap();
            let error = fail(false);
            assert!(error.contains("ca.key cannot be understood; restore it from a backup"), "{error}");
        }
        std::fs::remove_file(data.path(files::CA_KEY)).unwrap();
        assert!(fail(false).contains("ca.key"));
        assert!(!data.path(files::CA_KEY).exists());
    }

    #[test]
    fn a_signing_request_must_prove_its_key() {
        let key = KeyPair::generate().unwrap();
        let csr = CertificateParams::default().serialize_request(&key).unwrap();
        let request = Request::parse(&csr.pem().unwrap()).unwrap();
        assert_eq!(request.key(), secret::sha256(&key.subject_public_key_info()));
        assert_eq!(Request::parse("hello").err(), Some(BadRequest::Unreadable));
        let mut der = csr.der().to_vec();
        *der.last_mut().unwrap() ^= 1;
        let forged = format!(
            "-----BEGIN CERTIFICATE REQUEST-----\n{}\n-----END CERTIFICATE REQUEST-----\n",
            base64::Engine::encode(&base64::prelude::BASE64_STANDARD, der)
        );
        assert_eq!(Request::parse(&forged).err(), Some(BadRequest::Signature));
    }

    #[test]
    fn nothing_outlives_the_ca() {
        let dir = tempfile::tempdir().unwrap();
        let data = DataDir::open(dir.path()).unwrap();
        let lives = Lives { ca: Duration::from_secs(1000), leaf: Duration::from_secs(5000) };
        let ca = Ca::load_or_make(&data, false, None, lives).unwrap();
        assert!(ca.expires() <= now() + 1_000_000);
        let server = ca.server(&data, &[], &[]).unwrap();
        assert!(expires(&server.certificate).unwrap() <= ca.expires() + 1000);
    }
}
