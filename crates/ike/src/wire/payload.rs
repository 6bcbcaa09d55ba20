//! The chain of payloads (RFC 7296 §3.2).

use super::code::codes;
use super::{
    Authentication, CertRequest, Certificate, Delete, Identification, KeyExchange, Nonce, Notify, Reader,
    SaPayload, TrafficSelectors,
};
use crate::error::{Error, Misbehaved, Misuse, syntax};

/// Most payloads of one message that are read.
pub const MAX_PAYLOADS: usize = 64;

codes! {
    /// The type of a payload, in the "next payload" of the one before it.
    pub enum PayloadType: u8 {
        None = 0 => "none",
        Sa = 33 => "SA",
        Ke = 34 => "KE",
        IdInitiator = 35 => "IDi",
        IdResponder = 36 => "IDr",
        Cert = 37 => "CERT",
        CertReq = 38 => "CERTREQ",
        Auth = 39 => "AUTH",
        Nonce = 40 => "Nonce",
        Notify = 41 => "Notify",
        Delete = 42 => "Delete",
        VendorId = 43 => "Vendor ID",
        TsInitiator = 44 => "TSi",
        TsResponder = 45 => "TSr",
        Encrypted = 46 => "SK",
        Configuration = 47 => "CP",
        Eap = 48 => "EAP",
        EncryptedFragment = 53 => "SKF",
    }
}

/// One payload, but for SK and SKF, which [`super::Datagram`] knows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Payload {
    /// Proposals.
    Sa(SaPayload),
    /// A public value.
    Ke(KeyExchange),
    /// Who the initiator is.
    IdInitiator(Identification),
    /// Who the responder is, or should be.
    IdResponder(Identification),
    /// A certificate.
    Cert(Certificate),
    /// Which certificates are wanted.
    CertReq(CertRequest),
    /// The proof.
    Auth(Authentication),
    /// A nonce.
    Nonce(Nonce),
    /// A notification.
    Notify(Notify),
    /// SAs that are no more.
    Delete(Delete),
    /// Who made the software.
    VendorId(Vec<u8>),
    /// The initiator's end of the traffic.
    TsInitiator(TrafficSelectors),
    /// The responder's end of the traffic.
    TsResponder(TrafficSelectors),
    /// Configuration, not spoken here.
    Configuration(Vec<u8>),
    /// EAP, not spoken here.
    Eap(Vec<u8>),
}

impl Payload {
    /// Its type.
    pub fn kind(&self) -> PayloadType {
        match self {
            Payload::Sa(_) => PayloadType::Sa,
            Payload::Ke(_) => PayloadType::Ke,
            Payload::IdInitiator(_) => PayloadType::IdInitiator,
            Payload::IdResponder(_) => PayloadType::IdResponder,
            Payload::Cert(_) => PayloadType::Cert,
            Payload::CertReq(_) => PayloadType::CertReq,
            Payload::Auth(_) => PayloadType::Auth,
            Payload::Nonce(_) => PayloadType::Nonce,
            Payload::Notify(_) => PayloadType::Notify,
            Payload::Delete(_) => PayloadType::Delete,
            Payload::VendorId(_) => PayloadType::VendorId,
            Payload::TsInitiator(_) => PayloadType::TsInitiator,
            Payload::TsResponder(_) => PayloadType::TsResponder,
            Payload::Configuration(_) => PayloadType::Configuration,
            Payload::Eap(_) => PayloadType::Eap,
        }
    }

    /// Octets with the generic header.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        4 + match self {
            Payload::Sa(p) => p.len(),
            Payload::Ke(p) => p.len(),
            Payload::IdInitiator(p) | Payload::IdResponder(p) => p.len(),
            Payload::Cert(p) => p.len(),
            Payload::CertReq(p) => p.len(),
            Payload::Auth(p) => p.len(),
            Payload::Nonce(p) => p.len(),
            Payload::Notify(p) => p.len(),
            Payload::Delete(p) => p.len(),
            Payload::TsInitiator(p) | Payload::TsResponder(p) => p.len(),
            Payload::VendorId(p) | Payload::Configuration(p) | Payload::Eap(p) => p.len(),
        }
    }

    fn emit(&self, out: &mut Vec<u8>, next: PayloadType) -> Result<(), Error> {
        let len = u16::try_from(self.len()).map_err(|_| Misuse::TooLong("a payload"))?;
        if !self.counts_fit() {
            return Err(Misuse::TooLong("a count within a payload").into());
        }
        out.extend_from_slice(&[next.into(), 0]);
        out.extend_from_slice(&len.to_be_bytes());
        match self {
            Payload::Sa(p) => p.emit(out),
            Payload::Ke(p) => p.emit(out),
            Payload::IdInitiator(p) | Payload::IdResponder(p) => p.emit(out),
            Payload::Cert(p) => p.emit(out),
            Payload::CertReq(p) => p.emit(out),
            Payload::Auth(p) => p.emit(out),
            Payload::Nonce(p) => p.emit(out),
            Payload::Notify(p) => p.emit(out),
            Payload::Delete(p) => p.emit(out),
            Payload::TsInitiator(p) | Payload::TsResponder(p) => p.emit(out),
            Payload::VendorId(p) | Payload::Configuration(p) | Payload::Eap(p) => out.extend_from_slice(p),
        }
        Ok(())
    }

    /// Whether what is counted in one octet can be.
    fn counts_fit(&self) -> bool {
        let octet = usize::from(u8::MAX);
        match self {
            Payload::Sa(sa) => {
                sa.proposals.iter().all(|p| p.spi.len() <= octet && p.transforms.len() <= octet)
            }
            Payload::Notify(notify) => notify.spi.len() <= octet,
            Payload::TsInitiator(ts) | Payload::TsResponder(ts) => ts.0.len() <= octet,
            Payload::Ke(_)
            | Payload::IdInitiator(_)
            | Payload::IdResponder(_)
            | Payload::Cert(_)
            | Payload::CertReq(_)
            | Payload::Auth(_)
            | Payload::Nonce(_)
            | Payload::Delete(_)
            | Payload::VendorId(_)
            | Payload::Configuration(_)
            | Payload::Eap(_) => true,
        }
    }

    /// The payload, or `None` if its type is not known here.
    fn parse(kind: PayloadType, body: &[u8]) -> Result<Option<Self>, Error> {
        Ok(Some(match kind {
            PayloadType::Sa => Payload::Sa(SaPayload::parse(body)?),
            PayloadType::Ke => Payload::Ke(KeyExchange::parse(body)?),
            PayloadType::IdInitiator => Payload::IdInitiator(Identification::parse(body)?),
            PayloadType::IdResponder => Payload::IdResponder(Identification::parse(body)?),
            PayloadType::Cert => Payload::Cert(Certificate::parse(body)?),
            PayloadType::CertReq => Payload::CertReq(CertRequest::parse(body)?),
            PayloadType::Auth => Payload::Auth(Authentication::parse(body)?),
            PayloadType::Nonce => Payload::Nonce(Nonce::parse(body)?),
            PayloadType::Notify => Payload::Notify(Notify::parse(body)?),
            PayloadType::Delete => Payload::Delete(Delete::parse(body)?),
            PayloadType::VendorId => Payload::VendorId(body.to_vec()),
            PayloadType::TsInitiator => Payload::TsInitiator(TrafficSelectors::parse(body)?),
            PayloadType::TsResponder => Payload::TsResponder(TrafficSelectors::parse(body)?),
            PayloadType::Configuration => Payload::Configuration(body.to_vec()),
            PayloadType::Eap => Payload::Eap(body.to_vec()),
            // An encrypted payload inside another, or not last, has no meaning.
            PayloadType::Encrypted | PayloadType::EncryptedFragment => {
                return Err(Misbehaved::Unexpected(kind).into());
            }
            PayloadType::None | PayloadType::Other(_) => return Ok(None),
        }))
    }
}

/// Appends a chain; gives the type of its first payload (`None` if there is none) for the header before it.
///
/// # Errors
/// A payload that is longer than 65,535 octets: [`Misuse::TooLong`].
pub fn emit_chain(payloads: &[Payload], out: &mut Vec<u8>) -> Result<PayloadType, Error> {
    for (i, payload) in payloads.iter().enumerate() {
        let next = payloads.get(i + 1).map_or(PayloadType::None, Payload::kind);
        payload.emit(out, next)?;
    }
    Ok(payloads.first().map_or(PayloadType::None, Payload::kind))
}

/// Reads a whole chain that begins with a payload of type `first` and must fill `bytes`.
///
/// Payloads of unknown type are skipped, or refused if they are critical (RFC 7296 §2.5).
///
/// # Errors
/// [`Misbehaved::Syntax`], [`Misbehaved::CriticalPayload`], [`Misbehaved::Limit`].
pub fn parse_chain(first: PayloadType, bytes: &[u8]) -> Result<Vec<Payload>, Error> {
    let mut chain = Chain::new(first, bytes);
    let mut payloads = Vec::new();
    while let Some(raw) = chain.next()? {
        payloads.extend(raw.parse()?);
    }
    Ok(payloads)
}

/// A payload whose body has not been read yet.
pub(super) struct Raw<'a> {
    pub(super) kind: PayloadType,
    pub(super) next: PayloadType,
    pub(super) critical: bool,
    pub(super) body: &'a [u8],
}

impl Raw<'_> {
    /// `None` for a payload to be skipped.
    pub(super) fn parse(&self) -> Result<Option<Payload>, Error> {
        let payload = Payload::parse(self.kind, self.body)?;
        if payload.is_none() && self.critical {
            return Err(Misbehaved::CriticalPayload(self.kind.into()).into());
        }
        Ok(payload)
    }
}

/// Walks the generic headers.
pub(super) struct Chain<'a> {
    next: PayloadType,
    reader: Reader<'a>,
    count: usize,
}

impl<'a> Chain<'a> {
    pub(super) fn new(first: PayloadType, bytes: &'a [u8]) -> Self {
        Chain { next: first, reader: Reader::new(bytes), count: 0 }
    }

    pub(super) fn next(&mut self) -> Result<Option<Raw<'a>>, Error> {
        const WHAT: &str = "payload header";
        let kind = self.next;
        if kind == PayloadType::None {
            return if self.reader.is_empty() { Ok(None) } else { Err(syntax("end of the payload chain")) };
        }
        if self.count == MAX_PAYLOADS {
            return Err(Misbehaved::Limit("payloads").into());
        }
        self.count += 1;
        let next = PayloadType::from(self.reader.u8(WHAT)?);
        let critical = self.reader.u8(WHAT)? & 0x80 != 0;
        let len = usize::from(self.reader.u16(WHAT)?);
        let body = self.reader.take(len.checked_sub(4).ok_or_else(|| syntax(WHAT))?, WHAT)?;
        // After SK and SKF "next payload" tells of what is inside them, so nothing may follow (RFC 7296 §3.14).
        self.next = match kind {
            PayloadType::Encrypted | PayloadType::EncryptedFragment => PayloadType::None,
            _ => next,
        };
        Ok(Some(Raw { kind, next, critical, body }))
    }

    /// Octets not walked yet.
    pub(super) fn remaining(&self) -> usize {
        self.reader.remaining()
    }
}
