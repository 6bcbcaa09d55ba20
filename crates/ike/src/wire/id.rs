//! Identification payloads (RFC 7296 §3.5).

use super::Reader;
use super::code::codes;
use crate::error::Error;

codes! {
    /// What kind of identity (RFC 7296 §3.5).
    pub enum IdType: u8 {
        Ipv4Addr = 1 => "ID_IPV4_ADDR",
        Fqdn = 2 => "ID_FQDN",
        Rfc822Addr = 3 => "ID_RFC822_ADDR",
        Ipv6Addr = 5 => "ID_IPV6_ADDR",
        DerAsn1Dn = 9 => "ID_DER_ASN1_DN",
        DerAsn1Gn = 10 => "ID_DER_ASN1_GN",
        KeyId = 11 => "ID_KEY_ID",
        Null = 13 => "ID_NULL",
    }
}

/// The body of IDi or IDr exactly as it travels: AUTH is computed over it, reserved octets included.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identification {
    /// The kind.
    pub kind: IdType,
    /// Sent as zero; kept as received, since AUTH covers it.
    pub reserved: [u8; 3],
    /// The identity itself.
    pub data: Vec<u8>,
}

impl Identification {
    /// An identity to send.
    pub fn new(kind: IdType, data: Vec<u8>) -> Self {
        Identification { kind, reserved: [0; 3], data }
    }

    /// Octets of the body.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        4 + self.data.len()
    }

    /// Appends the body: `RestOfIDPayload` of RFC 7296 §2.15.
    pub fn emit(&self, out: &mut Vec<u8>) {
        out.push(self.kind.into());
        out.extend_from_slice(&self.reserved);
        out.extend_from_slice(&self.data);
    }

    /// Reads a body.
    ///
    /// # Errors
    /// Shorter than its fixed part.
    pub fn parse(body: &[u8]) -> Result<Self, Error> {
        let mut r = Reader::new(body);
        let kind = IdType::from(r.u8("ID payload")?);
        let reserved = r.array("ID payload")?;
        Ok(Identification { kind, reserved, data: r.rest().to_vec() })
    }
}
