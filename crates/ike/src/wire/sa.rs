//! Security Association payloads: proposals of transforms of attributes (RFC 7296 §3.3).
//!
//! ```text
//! | Last Substruc |   RESERVED    |         Proposal Length       |
//! | Proposal Num  |  Protocol ID  |    SPI Size   |Num  Transforms|
//! |                        SPI (variable)                         |
//! |                        <Transforms>                           |
//! ```
#![allow(clippy::len_without_is_empty)]

use super::Reader;
use super::code::codes;
use crate::error::{Error, Misbehaved, syntax};

/// Most proposals of one SA payload that are read.
pub const MAX_PROPOSALS: usize = 32;
/// Most transforms of one proposal that are read.
pub const MAX_TRANSFORMS: usize = 128;
/// Most attributes of one transform that are read.
const MAX_ATTRIBUTES: usize = 8;

codes! {
    /// Which protocol an SA is for (RFC 7296 §3.3.1).
    pub enum Protocol: u8 {
        Ike = 1 => "IKE",
        Ah = 2 => "AH",
        Esp = 3 => "ESP",
    }
}

codes! {
    /// What a transform chooses (RFC 7296 §3.3.2, RFC 9370 §4.1).
    pub enum TransformType: u8 {
        Encryption = 1 => "ENCR",
        Prf = 2 => "PRF",
        Integrity = 3 => "INTEG",
        KeyExchange = 4 => "KE",
        Esn = 5 => "ESN",
        AdditionalKeyExchange1 = 6 => "ADDKE1",
        AdditionalKeyExchange2 = 7 => "ADDKE2",
        AdditionalKeyExchange3 = 8 => "ADDKE3",
        AdditionalKeyExchange4 = 9 => "ADDKE4",
        AdditionalKeyExchange5 = 10 => "ADDKE5",
        AdditionalKeyExchange6 = 11 => "ADDKE6",
        AdditionalKeyExchange7 = 12 => "ADDKE7",
    }
}

/// The value of an attribute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AttributeValue {
    /// Two octets in place of the length.
    Short(u16),
    /// A length and that many octets.
    Long(Vec<u8>),
}

/// An attribute of a transform (RFC 7296 §3.3.5). `kind` has 15 bits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attribute {
    /// The attribute's number.
    pub kind: u16,
    /// Its value.
    pub value: AttributeValue,
}

impl Attribute {
    /// Key Length, in bits: the one attribute there is.
    pub const KEY_LENGTH: u16 = 14;

    fn len(&self) -> usize {
        match &self.value {
            AttributeValue::Short(_) => 4,
            AttributeValue::Long(data) => 4 + data.len(),
        }
    }

    fn emit(&self, out: &mut Vec<u8>) {
        match &self.value {
            AttributeValue::Short(value) => {
                out.extend_from_slice(&(self.kind | 0x8000).to_be_bytes());
                out.extend_from_slice(&value.to_be_bytes());
            }
            AttributeValue::Long(data) => {
                out.extend_from_slice(&(self.kind & 0x7fff).to_be_bytes());
                out.extend_from_slice(&(data.len() as u16).to_be_bytes());
                out.extend_from_slice(data);
            }
        }
    }

    fn parse(r: &mut Reader<'_>) -> Result<Self, Error> {
        let kind = r.u16("transform attribute")?;
        let word = r.u16("transform attribute")?;
        let value = if kind & 0x8000 != 0 {
            AttributeValue::Short(word)
        } else {
            AttributeValue::Long(r.take(usize::from(word), "transform attribute")?.to_vec())
        };
        Ok(Attribute { kind: kind & 0x7fff, value })
    }
}

/// One transform.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transform {
    /// What it chooses.
    pub kind: TransformType,
    /// The number of the choice.
    pub id: u16,
    /// Its attributes.
    pub attributes: Vec<Attribute>,
}

impl Transform {
    /// A transform without attributes.
    pub fn new(kind: TransformType, id: u16) -> Self {
        Transform { kind, id, attributes: Vec::new() }
    }

    /// A cipher with its key length in bits.
    pub fn with_key_len(kind: TransformType, id: u16, bits: u16) -> Self {
        let attribute = Attribute { kind: Attribute::KEY_LENGTH, value: AttributeValue::Short(bits) };
        Transform { kind, id, attributes: vec![attribute] }
    }

    /// The key length in bits, if that is the transform's one attribute. A transform with any other attribute is
    /// not understood and must not be chosen (RFC 7296 §3.3.6): see [`Transform::understood`].
    pub fn key_len(&self) -> Option<u16> {
        match self.attributes.as_slice() {
            [Attribute { kind: Attribute::KEY_LENGTH, value: AttributeValue::Short(bits) }] => Some(*bits),
            _ => None,
        }
    }

    /// Whether every attribute is known.
    pub fn understood(&self) -> bool {
        self.attributes.is_empty() || self.key_len().is_some()
    }

    fn len(&self) -> usize {
        8 + self.attributes.iter().map(Attribute::len).sum::<usize>()
    }

    fn emit(&self, out: &mut Vec<u8>, last: bool) {
        out.extend_from_slice(&[if last { 0 } else { 3 }, 0]);
        out.extend_from_slice(&(self.len() as u16).to_be_bytes());
        out.extend_from_slice(&[self.kind.into(), 0]);
        out.extend_from_slice(&self.id.to_be_bytes());
        for attribute in &self.attributes {
            attribute.emit(out);
        }
    }

    /// The transform and whether it says that it is the last.
    fn parse(r: &mut Reader<'_>) -> Result<(Self, bool), Error> {
        let last = match r.u8("transform")? {
            0 => true,
            3 => false,
            _ => return Err(syntax("transform")),
        };
        r.u8("transform")?;
        let len = usize::from(r.u16("transform")?);
        let body = r.take(len.checked_sub(4).ok_or_else(|| syntax("transform"))?, "transform")?;
        let mut r = Reader::new(body);
        let kind = TransformType::from(r.u8("transform")?);
        r.u8("transform")?;
        let id = r.u16("transform")?;
        let mut attributes = Vec::new();
        while !r.is_empty() {
            if attributes.len() == MAX_ATTRIBUTES {
                return Err(Misbehaved::Limit("attributes of a transform").into());
            }
            attributes.push(Attribute::parse(&mut r)?);
        }
        Ok((Transform { kind, id, attributes }, last))
    }
}

/// One proposal: for each transform type, one of its transforms is to be chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proposal {
    /// Its number, from 1.
    pub number: u8,
    /// The protocol.
    pub protocol: Protocol,
    /// The sender's SPI: empty in IKE_SA_INIT, 8 octets when an IKE SA is rekeyed, 4 for ESP.
    pub spi: Vec<u8>,
    /// The transforms.
    pub transforms: Vec<Transform>,
}

impl Proposal {
    /// The transforms of one type, in the sender's order of preference.
    pub fn of(&self, kind: TransformType) -> impl Iterator<Item = &Transform> {
        self.transforms.iter().filter(move |t| t.kind == kind)
    }

    fn len(&self) -> usize {
        8 + self.spi.len() + self.transforms.iter().map(Transform::len).sum::<usize>()
    }

    fn emit(&self, out: &mut Vec<u8>, last: bool) {
        out.extend_from_slice(&[if last { 0 } else { 2 }, 0]);
        out.extend_from_slice(&(self.len() as u16).to_be_bytes());
        out.extend_from_slice(&[
            self.number,
            self.protocol.into(),
            self.spi.len() as u8,
            self.transforms.len() as u8,
        ]);
        out.extend_from_slice(&self.spi);
        for (i, transform) in self.transforms.iter().enumerate() {
            transform.emit(out, i + 1 == self.transforms.len());
        }
    }

    /// The proposal and whether it says that it is the last.
    fn parse(r: &mut Reader<'_>) -> Result<(Self, bool), Error> {
        let last = match r.u8("proposal")? {
            0 => true,
            2 => false,
            _ => return Err(syntax("proposal")),
        };
        r.u8("proposal")?;
        let len = usize::from(r.u16("proposal")?);
        let body = r.take(len.checked_sub(4).ok_or_else(|| syntax("proposal"))?, "proposal")?;
        let mut r = Reader::new(body);
        let number = r.u8("proposal")?;
        let protocol = Protocol::from(r.u8("proposal")?);
        let spi_len = usize::from(r.u8("proposal")?);
        let count = usize::from(r.u8("proposal")?);
        let spi = r.take(spi_len, "SPI of a proposal")?.to_vec();
        if count > MAX_TRANSFORMS {
            return Err(Misbehaved::Limit("transforms of a proposal").into());
        }
        let mut transforms = Vec::new();
        for i in 1..=count {
            let (transform, last) = Transform::parse(&mut r)?;
            if last != (i == count) {
                return Err(syntax("number of transforms"));
            }
            transforms.push(transform);
        }
        if !r.is_empty() {
            return Err(syntax("proposal"));
        }
        Ok((Proposal { number, protocol, spi, transforms }, last))
    }
}

/// An SA payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SaPayload {
    /// The proposals in the sender's order of preference; exactly one in a response.
    pub proposals: Vec<Proposal>,
}

impl SaPayload {
    /// Octets of the body.
    pub fn len(&self) -> usize {
        self.proposals.iter().map(Proposal::len).sum()
    }

    /// Appends the body.
    pub fn emit(&self, out: &mut Vec<u8>) {
        for (i, proposal) in self.proposals.iter().enumerate() {
            proposal.emit(out, i + 1 == self.proposals.len());
        }
    }

    /// Reads a body.
    ///
    /// # Errors
    /// Lengths, counts or "last" marks that do not agree, no proposal, or more than the limits.
    pub fn parse(body: &[u8]) -> Result<Self, Error> {
        let mut r = Reader::new(body);
        let mut proposals = Vec::new();
        loop {
            if proposals.len() == MAX_PROPOSALS {
                return Err(Misbehaved::Limit("proposals").into());
            }
            let (proposal, last) = Proposal::parse(&mut r)?;
            proposals.push(proposal);
            if last {
                break;
            }
        }
        if !r.is_empty() {
            return Err(syntax("SA payload"));
        }
        Ok(SaPayload { proposals })
    }
}
