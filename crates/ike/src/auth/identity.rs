//! Identities (RFC 7296 §3.5), as people write them and as the wire has them.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use thiserror::Error;
use x509_parser::prelude::FromDer;
use x509_parser::x509::X509Name;

use crate::error::{AuthFailure, Error};
use crate::wire::{IdType, Identification};

/// Who a peer says it is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Identity {
    /// ID_KEY_ID: octets that both sides know the meaning of.
    KeyId(Vec<u8>),
    /// ID_FQDN; compared without regard to case.
    Fqdn(String),
    /// ID_IPV4_ADDR or ID_IPV6_ADDR.
    Address(IpAddr),
    /// ID_RFC822_ADDR.
    Email(String),
    /// ID_DER_ASN1_DN: the DER of a distinguished name.
    DistinguishedName(Vec<u8>),
}

/// Text that is no identity.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "{0:?} is not an identity; write an address, a name, user@name, keyid:TEXT, or a distinguished name as in \"C=CH, CN=moon\""
)]
pub struct InvalidIdentity(pub String);

impl Identity {
    /// As on the wire.
    pub fn to_wire(&self) -> Identification {
        let (kind, data) = match self {
            Identity::KeyId(octets) => (IdType::KeyId, octets.clone()),
            Identity::Fqdn(name) => (IdType::Fqdn, name.as_bytes().to_vec()),
            Identity::Address(IpAddr::V4(a)) => (IdType::Ipv4Addr, a.octets().to_vec()),
            Identity::Address(IpAddr::V6(a)) => (IdType::Ipv6Addr, a.octets().to_vec()),
            Identity::Email(address) => (IdType::Rfc822Addr, address.as_bytes().to_vec()),
            Identity::DistinguishedName(der) => (IdType::DerAsn1Dn, der.clone()),
        };
        Identification::new(kind, data)
    }

    /// Whether both name the same. Names are compared without regard to case; distinguished names by their parts, for
    /// the same text may be encoded as one string type or another.
    pub fn matches(&self, other: &Identity) -> bool {
        match (self, other) {
            (Identity::Fqdn(a), Identity::Fqdn(b)) | (Identity::Email(a), Identity::Email(b)) => {
                a.eq_ignore_ascii_case(b)
            }
            (Identity::DistinguishedName(a), Identity::DistinguishedName(b)) => {
                a == b || matches!((dn_parts(a), dn_parts(b)), (Some(a), Some(b)) if a == b)
            }
            (
                Identity::KeyId(_)
                | Identity::Fqdn(_)
                | Identity::Address(_)
                | Identity::Email(_)
                | Identity::DistinguishedName(_),
                _,
            ) => self == other,
        }
    }
}

impl TryFrom<&Identification> for Identity {
    type Error = Error;

    fn try_from(id: &Identification) -> Result<Self, Error> {
        let text = || std::str::from_utf8(&id.data).map(str::to_owned).ok();
        let identity = match id.kind {
            IdType::KeyId => Some(Identity::KeyId(id.data.clone())),
            IdType::Fqdn => text().map(Identity::Fqdn),
            IdType::Rfc822Addr => text().map(Identity::Email),
            IdType::Ipv4Addr => <[u8; 4]>::try_from(id.data.as_slice())
                .ok()
                .map(|a| Identity::Address(Ipv4Addr::from(a).into())),
            IdType::Ipv6Addr => <[u8; 16]>::try_from(id.data.as_slice())
                .ok()
                .map(|a| Identity::Address(Ipv6Addr::from(a).into())),
            IdType::DerAsn1Dn => Some(Identity::DistinguishedName(id.data.clone())),
            IdType::DerAsn1Gn | IdType::Null | IdType::Other(_) => None,
        };
        identity.ok_or_else(|| AuthFailure::Unknown(format!("an identity of type {}", id.kind)).into())
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Identity::KeyId(octets) => match std::str::from_utf8(octets) {
                Ok(text) if text.chars().all(|c| c.is_ascii_graphic()) => write!(f, "keyid:{text}"),
                _ => write!(f, "keyid:0x{}", hex(octets)),
            },
            // A peer chose the text: keep control characters out of logs.
            Identity::Fqdn(text) | Identity::Email(text) => write!(f, "{}", text.escape_default()),
            Identity::Address(address) => write!(f, "{address}"),
            Identity::DistinguishedName(der) => match X509Name::from_der(der) {
                Ok((_, name)) => write!(f, "{}", name.to_string().escape_default()),
                Err(_) => write!(f, "dn:0x{}", hex(der)),
            },
        }
    }
}

impl FromStr for Identity {
    type Err = InvalidIdentity;

    fn from_str(text: &str) -> Result<Self, InvalidIdentity> {
        let invalid = || InvalidIdentity(text.to_owned());
        let text = text.trim();
        if let Some(id) = text.strip_prefix("keyid:") {
            return match id.strip_prefix("0x") {
                Some(digits) => unhex(digits).map(Identity::KeyId).ok_or_else(invalid),
                None if id.is_empty() => Err(invalid()),
                None => Ok(Identity::KeyId(id.as_bytes().to_vec())),
            };
        }
        if let Ok(address) = text.parse() {
            return Ok(Identity::Address(address));
        }
        if text.contains('=') {
            return encode_dn(text).map(Identity::DistinguishedName).ok_or_else(invalid);
        }
        if text.is_empty() || text.chars().any(|c| c.is_whitespace() || c.is_control()) {
            return Err(invalid());
        }
        match text.split_once('@') {
            // strongSwan's way to say "a name, whatever it looks like".
            Some(("", name)) if !name.is_empty() => Ok(Identity::Fqdn(name.to_owned())),
            Some((user, host)) if !user.is_empty() && !host.is_empty() => {
                Ok(Identity::Email(text.to_owned()))
            }
            Some(_) => Err(invalid()),
            None => Ok(Identity::Fqdn(text.to_owned())),
        }
    }
}

/// Each relative name's attributes, as (object identifier, text).
fn dn_parts(der: &[u8]) -> Option<Vec<Vec<(String, String)>>> {
    let (rest, name) = X509Name::from_der(der).ok()?;
    if !rest.is_empty() {
        return None;
    }
    let part = |rdn: &x509_parser::x509::RelativeDistinguishedName<'_>| {
        rdn.iter()
            .map(|a| Some((a.attr_type().to_id_string(), a.as_str().ok()?.trim().to_ascii_lowercase())))
            .collect::<Option<Vec<_>>>()
    };
    name.iter().map(part).collect()
}

/// The attribute types that people write, with the content octets of their object identifiers.
const ATTRIBUTES: [(&str, &[u8]); 10] = [
    ("CN", &[0x55, 4, 3]),
    ("SN", &[0x55, 4, 4]),
    ("C", &[0x55, 4, 6]),
    ("L", &[0x55, 4, 7]),
    ("ST", &[0x55, 4, 8]),
    ("O", &[0x55, 4, 10]),
    ("OU", &[0x55, 4, 11]),
    ("SERIALNUMBER", &[0x55, 4, 5]),
    ("E", &[0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 9, 1]),
    ("DC", &[0x09, 0x92, 0x26, 0x89, 0x93, 0xf2, 0x2c, 0x64, 1, 25]),
];

/// `C=CH, O=x, CN=y` in DER. A comma in a value is written `\,`.
fn encode_dn(text: &str) -> Option<Vec<u8>> {
    const OID: u8 = 0x06;
    const UTF8: u8 = 0x0c;
    const PRINTABLE: u8 = 0x13;
    const IA5: u8 = 0x16;
    const SEQUENCE: u8 = 0x30;
    const SET: u8 = 0x31;
    let mut rdns = Vec::new();
    for part in split_unescaped(text) {
        let (name, value) = part.split_once('=')?;
        let (name, value) = (name.trim().to_ascii_uppercase(), value.trim());
        let name = if name == "EMAILADDRESS" { "E" } else { &name };
        let (_, oid) = ATTRIBUTES.iter().find(|(known, _)| *known == name)?;
        let kind = match name {
            "C" | "SERIALNUMBER" => PRINTABLE,
            "E" | "DC" => IA5,
            _ => UTF8,
        };
        if value.is_empty() {
            return None;
        }
        let attribute = tlv(SEQUENCE, &[tlv(OID, oid)?, tlv(kind, value.as_bytes())?].concat())?;
        rdns.extend(tlv(SET, &attribute)?);
    }
    tlv(SEQUENCE, &rdns)
}

fn split_unescaped(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match c {
            ',' => parts.push(String::new()),
            '\\' => {
                if let (Some(last), Some(next)) = (parts.last_mut(), chars.next()) {
                    last.push(next);
                }
            }
            c => {
                if let Some(last) = parts.last_mut() {
                    last.push(c);
                }
            }
        }
    }
    parts
}

fn tlv(tag: u8, content: &[u8]) -> Option<Vec<u8>> {
    let mut out = vec![tag];
    let len = u16::try_from(content.len()).ok()?;
    match len {
        0..=127 => out.push(len as u8),
        128..=255 => out.extend([0x81, len as u8]),
        256.. => {
            out.push(0x82);
            out.extend(len.to_be_bytes());
        }
    }
    out.extend_from_slice(content);
    Some(out)
}

fn hex(octets: &[u8]) -> String {
    use fmt::Write as _;
    octets.iter().fold(String::new(), |mut text, octet| {
        let _ = write!(text, "{octet:02x}");
        text
    })
}

fn unhex(digits: &str) -> Option<Vec<u8>> {
    if digits.is_empty() || !digits.len().is_multiple_of(2) || !digits.is_ascii() {
        return None;
    }
    (0..digits.len()).step_by(2).map(|i| u8::from_str_radix(&digits[i..i + 2], 16).ok()).collect()
}
