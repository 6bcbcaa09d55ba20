//! Payloads with a short fixed part and a tail: KE, CERT, CERTREQ, AUTH, Nonce, Delete (RFC 7296 §3.4 – §3.11).
#![allow(clippy::len_without_is_empty)]

use super::code::codes;
use super::{EspSpi, Protocol, Reader};
use crate::error::{Error, Misbehaved, syntax};

/// A KE payload (RFC 7296 §3.4): the group's number and the public value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyExchange {
    /// The Key Exchange Method (once: Diffie-Hellman group) number.
    pub group: u16,
    /// The public value.
    pub data: Vec<u8>,
}

impl KeyExchange {
    /// Octets of the body.
    pub fn len(&self) -> usize {
        4 + self.data.len()
    }

    /// Appends the body.
    pub fn emit(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.group.to_be_bytes());
        out.extend_from_slice(&[0; 2]);
        out.extend_from_slice(&self.data);
    }

    /// Reads a body.
    pub fn parse(body: &[u8]) -> Result<Self, Error> {
        let mut r = Reader::new(body);
        let group = r.u16("KE payload")?;
        r.u16("KE payload")?;
        Ok(KeyExchange { group, data: r.rest().to_vec() })
    }
}

codes! {
    /// How a certificate is encoded (RFC 7296 §3.6, RFC 7670).
    pub enum CertEncoding: u8 {
        X509Signature = 4 => "X.509 certificate",
        Crl = 7 => "CRL",
        HashAndUrl = 12 => "hash and URL",
        HashAndUrlBundle = 13 => "hash and URL of bundle",
        RawPublicKey = 15 => "raw public key",
    }
}

/// A CERT payload (RFC 7296 §3.6).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certificate {
    /// How `data` is encoded.
    pub encoding: CertEncoding,
    /// For X.509: the DER of one certificate.
    pub data: Vec<u8>,
}

impl Certificate {
    /// An X.509 certificate in DER.
    pub fn x509(der: Vec<u8>) -> Self {
        Certificate { encoding: CertEncoding::X509Signature, data: der }
    }

    /// Octets of the body.
    pub fn len(&self) -> usize {
        1 + self.data.len()
    }

    /// Appends the body.
    pub fn emit(&self, out: &mut Vec<u8>) {
        out.push(self.encoding.into());
        out.extend_from_slice(&self.data);
    }

    /// Reads a body.
    pub fn parse(body: &[u8]) -> Result<Self, Error> {
        let mut r = Reader::new(body);
        let encoding = CertEncoding::from(r.u8("CERT payload")?);
        Ok(Certificate { encoding, data: r.rest().to_vec() })
    }
}

/// A CERTREQ payload (RFC 7296 §3.7). For X.509, `authorities` is a list of SHA-1 hashes, 20 octets each, of the
/// SubjectPublicKeyInfo of trusted CAs; it may be empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertRequest {
    /// The encoding wanted.
    pub encoding: CertEncoding,
    /// The hashes, one after the other.
    pub authorities: Vec<u8>,
}

impl CertRequest {
    /// Octets of the body.
    pub fn len(&self) -> usize {
        1 + self.authorities.len()
    }

    /// Appends the body.
    pub fn emit(&self, out: &mut Vec<u8>) {
        out.push(self.encoding.into());
        out.extend_from_slice(&self.authorities);
    }

    /// Reads a body.
    pub fn parse(body: &[u8]) -> Result<Self, Error> {
        let mut r = Reader::new(body);
        let encoding = CertEncoding::from(r.u8("CERTREQ payload")?);
        Ok(CertRequest { encoding, authorities: r.rest().to_vec() })
    }
}

codes! {
    /// How AUTH was made (RFC 7296 §3.8).
    pub enum AuthMethod: u8 {
        RsaSha1 = 1 => "RSA digital signature",
        SharedKey = 2 => "shared key",
        EcdsaSha256P256 = 9 => "ECDSA with SHA-256 on P-256",
        EcdsaSha384P384 = 10 => "ECDSA with SHA-384 on P-384",
        EcdsaSha512P521 = 11 => "ECDSA with SHA-512 on P-521",
        Null = 13 => "NULL",
        DigitalSignature = 14 => "digital signature",
    }
}

/// An AUTH payload (RFC 7296 §3.8). For [`AuthMethod::DigitalSignature`] `data` is that of RFC 7427 §3: length of
/// the AlgorithmIdentifier, the AlgorithmIdentifier, the signature.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Authentication {
    /// The method.
    pub method: AuthMethod,
    /// The value.
    pub data: Vec<u8>,
}

impl Authentication {
    /// Octets of the body.
    pub fn len(&self) -> usize {
        4 + self.data.len()
    }

    /// Appends the body.
    pub fn emit(&self, out: &mut Vec<u8>) {
        out.push(self.method.into());
        out.extend_from_slice(&[0; 3]);
        out.extend_from_slice(&self.data);
    }

    /// Reads a body.
    pub fn parse(body: &[u8]) -> Result<Self, Error> {
        let mut r = Reader::new(body);
        let method = AuthMethod::from(r.u8("AUTH payload")?);
        r.array::<3>("AUTH payload")?;
        Ok(Authentication { method, data: r.rest().to_vec() })
    }
}

/// Least octets of a nonce (RFC 7296 §2.10).
pub const NONCE_MIN: usize = 16;
/// Most octets of a nonce.
pub const NONCE_MAX: usize = 256;

/// A Nonce payload (RFC 7296 §3.9), 16 to 256 octets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Nonce(Vec<u8>);

impl Nonce {
    /// A nonce of these octets.
    ///
    /// # Errors
    /// Shorter than 16 or longer than 256 octets.
    pub fn new(data: Vec<u8>) -> Result<Self, Error> {
        if (NONCE_MIN..=NONCE_MAX).contains(&data.len()) { Ok(Nonce(data)) } else { Err(syntax("nonce")) }
    }

    /// A fresh nonce of 32 octets: half the key size of every PRF offered, or more.
    pub fn random(random: &mut dyn crate::Random) -> Self {
        let mut data = vec![0; 32];
        random.fill(&mut data);
        Nonce(data)
    }

    /// The octets.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// Octets of the body.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Appends the body.
    pub fn emit(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.0);
    }

    /// Reads a body.
    pub fn parse(body: &[u8]) -> Result<Self, Error> {
        Nonce::new(body.to_vec())
    }
}

/// A Delete payload (RFC 7296 §3.11).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Delete {
    /// The IKE SA that the message is protected by.
    Ike,
    /// ESP SAs, by the SPIs under which the sender of this payload receives.
    Esp(Vec<EspSpi>),
    /// SAs of a protocol not spoken here, with their SPIs as they came.
    Other {
        /// The protocol.
        protocol: Protocol,
        /// Octets of each SPI.
        spi_len: u8,
        /// The SPIs, one after the other.
        spis: Vec<u8>,
    },
}

impl Delete {
    /// Octets of the body.
    pub fn len(&self) -> usize {
        4 + match self {
            Delete::Ike => 0,
            Delete::Esp(spis) => 4 * spis.len(),
            Delete::Other { spis, .. } => spis.len(),
        }
    }

    /// Appends the body.
    pub fn emit(&self, out: &mut Vec<u8>) {
        match self {
            Delete::Ike => out.extend_from_slice(&[Protocol::Ike.into(), 0, 0, 0]),
            Delete::Esp(spis) => {
                out.extend_from_slice(&[Protocol::Esp.into(), 4]);
                out.extend_from_slice(&(spis.len() as u16).to_be_bytes());
                for spi in spis {
                    out.extend_from_slice(&spi.0.to_be_bytes());
                }
            }
            Delete::Other { protocol, spi_len, spis } => {
                out.extend_from_slice(&[(*protocol).into(), *spi_len]);
                let count = if *spi_len == 0 { 0 } else { spis.len() / usize::from(*spi_len) };
                out.extend_from_slice(&(count as u16).to_be_bytes());
                out.extend_from_slice(spis);
            }
        }
    }

    /// Reads a body.
    pub fn parse(body: &[u8]) -> Result<Self, Error> {
        let mut r = Reader::new(body);
        let protocol = Protocol::from(r.u8("Delete payload")?);
        let spi_len = r.u8("Delete payload")?;
        let count = usize::from(r.u16("Delete payload")?);
        if r.remaining() != count * usize::from(spi_len) {
            return Err(syntax("Delete payload"));
        }
        match (protocol, spi_len) {
            // With no SPI the count says nothing.
            (Protocol::Ike, 0) => Ok(Delete::Ike),
            (Protocol::Esp, 4) => {
                let mut spis = Vec::with_capacity(count);
                while !r.is_empty() {
                    spis.push(EspSpi(r.u32("Delete payload")?));
                }
                Ok(Delete::Esp(spis))
            }
            (Protocol::Ike | Protocol::Esp, _) => {
                Err(Misbehaved::Syntax("SPI size in Delete payload").into())
            }
            (Protocol::Ah | Protocol::Other(_), _) => {
                Ok(Delete::Other { protocol, spi_len, spis: r.rest().to_vec() })
            }
        }
    }
}
