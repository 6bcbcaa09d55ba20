//! The IKE header (RFC 7296 §3.1).
//!
//! ```text
//!                      1                   2                   3
//!  0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1 2 3 4 5 6 7 8 9 0 1
//! +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
//! |                       IKE SA Initiator's SPI                  |
//! |                                                               |
//! |                       IKE SA Responder's SPI                  |
//! |                                                               |
//! |  Next Payload | MjVer | MnVer | Exchange Type |     Flags     |
//! |                          Message ID                           |
//! |                            Length                             |
//! +-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+-+
//! ```

use std::fmt;

use super::code::codes;
use super::{PayloadType, Reader};
use crate::error::{Error, Misbehaved};

/// Octets of the IKE header.
pub const HEADER_LEN: usize = 28;

/// One side's SPI of an IKE SA. Zero means "not chosen yet".
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct IkeSpi(pub u64);

impl IkeSpi {
    /// The responder's SPI in the first request.
    pub const ZERO: IkeSpi = IkeSpi(0);

    /// Whether nothing was chosen yet.
    pub fn is_zero(self) -> bool {
        self.0 == 0
    }

    /// As on the wire.
    pub fn to_bytes(self) -> [u8; 8] {
        self.0.to_be_bytes()
    }

    /// From the wire.
    pub fn from_bytes(bytes: [u8; 8]) -> Self {
        IkeSpi(u64::from_be_bytes(bytes))
    }
}

impl fmt::Display for IkeSpi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for IkeSpi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "IkeSpi({self})")
    }
}

/// Both SPIs of an IKE SA: its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IkeSpis {
    /// Chosen by the original initiator of this IKE SA.
    pub initiator: IkeSpi,
    /// Chosen by its responder.
    pub responder: IkeSpi,
}

codes! {
    /// What kind of exchange a message belongs to (RFC 7296 §3.1).
    pub enum ExchangeType: u8 {
        IkeSaInit = 34 => "IKE_SA_INIT",
        IkeAuth = 35 => "IKE_AUTH",
        CreateChildSa = 36 => "CREATE_CHILD_SA",
        Informational = 37 => "INFORMATIONAL",
        IkeIntermediate = 43 => "IKE_INTERMEDIATE",
        IkeFollowupKe = 44 => "IKE_FOLLOWUP_KE",
    }
}

/// The flags of the header; those not named here are sent as zero and ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Flags {
    /// From the original initiator of the IKE SA.
    pub initiator: bool,
    /// The sender could speak a higher major version.
    pub version: bool,
    /// A response to the request of the same Message ID.
    pub response: bool,
}

impl Flags {
    const INITIATOR: u8 = 0x08;
    const VERSION: u8 = 0x10;
    const RESPONSE: u8 = 0x20;

    fn to_byte(self) -> u8 {
        (if self.initiator { Self::INITIATOR } else { 0 })
            | (if self.version { Self::VERSION } else { 0 })
            | (if self.response { Self::RESPONSE } else { 0 })
    }

    fn from_byte(byte: u8) -> Self {
        Flags {
            initiator: byte & Self::INITIATOR != 0,
            version: byte & Self::VERSION != 0,
            response: byte & Self::RESPONSE != 0,
        }
    }
}

/// The header without what belongs to the body: `next payload` and `length` are given at [`Header::emit`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Both SPIs.
    pub spis: IkeSpis,
    /// The exchange.
    pub exchange: ExchangeType,
    /// The flags.
    pub flags: Flags,
    /// The Message ID.
    pub message_id: u32,
}

impl Header {
    /// Appends the header of a message of `length` octets in all whose first payload is `first`.
    pub fn emit(&self, out: &mut Vec<u8>, first: PayloadType, length: u32) {
        out.extend_from_slice(&self.spis.initiator.to_bytes());
        out.extend_from_slice(&self.spis.responder.to_bytes());
        out.push(first.into());
        out.push(0x20);
        out.push(self.exchange.into());
        out.push(self.flags.to_byte());
        out.extend_from_slice(&self.message_id.to_be_bytes());
        out.extend_from_slice(&length.to_be_bytes());
    }

    /// The header, the type of the first payload, and the length that the header states.
    ///
    /// # Errors
    /// Too short, or another major version than 2. A higher minor version is accepted (RFC 7296 §2.5).
    pub fn parse(bytes: &[u8]) -> Result<(Self, PayloadType, u32), Error> {
        let (header, first, major, length) = Self::parse_any_version(bytes)?;
        if major != 2 {
            return Err(Misbehaved::MajorVersion(major).into());
        }
        Ok((header, first, length))
    }

    /// The header of a message that may not have parsed, so that it can be answered: of INVALID_MAJOR_VERSION,
    /// INVALID_SYNTAX and UNSUPPORTED_CRITICAL_PAYLOAD. `None` if there is not even a header.
    pub fn peek(bytes: &[u8]) -> Option<Self> {
        Self::parse_any_version(bytes).ok().map(|(header, ..)| header)
    }

    fn parse_any_version(bytes: &[u8]) -> Result<(Self, PayloadType, u8, u32), Error> {
        let mut r = Reader::new(bytes);
        let initiator = IkeSpi::from_bytes(r.array("IKE header")?);
        let responder = IkeSpi::from_bytes(r.array("IKE header")?);
        let first = PayloadType::from(r.u8("IKE header")?);
        let major = r.u8("IKE header")? >> 4;
        let exchange = ExchangeType::from(r.u8("IKE header")?);
        let flags = Flags::from_byte(r.u8("IKE header")?);
        let message_id = r.u32("IKE header")?;
        let length = r.u32("IKE header")?;
        let spis = IkeSpis { initiator, responder };
        Ok((Header { spis, exchange, flags, message_id }, first, major, length))
    }
}
