//! Traffic Selector payloads (RFC 7296 §3.13) and security labels among them (RFC 9478).
#![allow(clippy::len_without_is_empty)]

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::Reader;
use crate::error::{Error, Misbehaved, syntax};

/// Most selectors of one payload that are read.
pub const MAX_SELECTORS: usize = 128;

const TS_IPV4_ADDR_RANGE: u8 = 7;
const TS_IPV6_ADDR_RANGE: u8 = 8;
const TS_SECLABEL: u8 = 10;

/// A range of addresses and ports of one protocol. Both ends are of one family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct IpSelector {
    /// IP protocol; 0 means any.
    pub protocol: u8,
    /// First port. OPAQUE is written `start_port` 65535, `end_port` 0.
    pub start_port: u16,
    /// Last port.
    pub end_port: u16,
    /// First address.
    pub start: IpAddr,
    /// Last address.
    pub end: IpAddr,
}

impl IpSelector {
    /// Any protocol and port between two addresses, both included.
    pub fn range(start: IpAddr, end: IpAddr) -> Self {
        IpSelector { protocol: 0, start_port: 0, end_port: u16::MAX, start, end }
    }

    /// Any protocol and port of a prefix; host bits are ignored, and a length too long is taken as the longest.
    pub fn prefix(address: IpAddr, len: u8) -> Self {
        match address {
            IpAddr::V4(a) => {
                let mask = u32::MAX.checked_shl(32 - u32::from(len.min(32))).unwrap_or(0);
                let (start, end) = (a.to_bits() & mask, a.to_bits() | !mask);
                Self::range(Ipv4Addr::from_bits(start).into(), Ipv4Addr::from_bits(end).into())
            }
            IpAddr::V6(a) => {
                let mask = u128::MAX.checked_shl(128 - u32::from(len.min(128))).unwrap_or(0);
                let (start, end) = (a.to_bits() & mask, a.to_bits() | !mask);
                Self::range(Ipv6Addr::from_bits(start).into(), Ipv6Addr::from_bits(end).into())
            }
        }
    }

    /// What both selectors cover, or `None` if nothing.
    pub fn intersection(&self, other: &Self) -> Option<Self> {
        if self.start.is_ipv4() != other.start.is_ipv4() {
            return None;
        }
        let protocol = match (self.protocol, other.protocol) {
            (0, p) | (p, 0) => p,
            (p, q) if p == q => p,
            _ => return None,
        };
        let (start, end) = (self.start.max(other.start), self.end.min(other.end));
        let (start_port, end_port) = if self.is_opaque() && other.is_opaque() {
            (u16::MAX, 0)
        } else {
            let ports = (self.start_port.max(other.start_port), self.end_port.min(other.end_port));
            if ports.0 > ports.1 {
                return None;
            }
            ports
        };
        (start <= end).then_some(IpSelector { protocol, start_port, end_port, start, end })
    }

    /// Whether all that `other` covers is covered by this.
    pub fn contains(&self, other: &Self) -> bool {
        self.intersection(other).as_ref() == Some(other)
    }

    /// Whether it selects only packets whose ports cannot be seen (RFC 7296 §3.13.1).
    pub fn is_opaque(&self) -> bool {
        self.start_port == u16::MAX && self.end_port == 0
    }
}

/// A security label (RFC 9478): opaque, never empty, compared whole.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SecurityLabel(Vec<u8>);

impl SecurityLabel {
    /// A label.
    ///
    /// # Errors
    /// Empty, or too long for the wire.
    pub fn new(label: Vec<u8>) -> Result<Self, Error> {
        if label.is_empty() || label.len() > usize::from(u16::MAX) - 64 {
            return Err(syntax("security label"));
        }
        Ok(SecurityLabel(label))
    }

    /// The label.
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// One traffic selector.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum TrafficSelector {
    /// Addresses, ports, protocol.
    Ip(IpSelector),
    /// A label: a CHILD_SA carries exactly one, the same in TSi and TSr.
    Label(SecurityLabel),
    /// A type that is not known here; ignored in narrowing.
    Other {
        /// Its number.
        kind: u8,
        /// The octet after it.
        protocol: u8,
        /// The rest.
        body: Vec<u8>,
    },
}

impl TrafficSelector {
    fn len(&self) -> usize {
        match self {
            TrafficSelector::Ip(ip) if ip.start.is_ipv4() => 16,
            TrafficSelector::Ip(_) => 40,
            TrafficSelector::Label(label) => 4 + label.0.len(),
            TrafficSelector::Other { body, .. } => 4 + body.len(),
        }
    }

    fn emit(&self, out: &mut Vec<u8>) {
        let len = (self.len() as u16).to_be_bytes();
        match self {
            TrafficSelector::Ip(ip) => {
                let kind = if ip.start.is_ipv4() { TS_IPV4_ADDR_RANGE } else { TS_IPV6_ADDR_RANGE };
                out.extend_from_slice(&[kind, ip.protocol]);
                out.extend_from_slice(&len);
                out.extend_from_slice(&ip.start_port.to_be_bytes());
                out.extend_from_slice(&ip.end_port.to_be_bytes());
                for address in [ip.start, ip.end] {
                    match address {
                        IpAddr::V4(a) => out.extend_from_slice(&a.octets()),
                        IpAddr::V6(a) => out.extend_from_slice(&a.octets()),
                    }
                }
            }
            TrafficSelector::Label(label) => {
                out.extend_from_slice(&[TS_SECLABEL, 0]);
                out.extend_from_slice(&len);
                out.extend_from_slice(&label.0);
            }
            TrafficSelector::Other { kind, protocol, body } => {
                out.extend_from_slice(&[*kind, *protocol]);
                out.extend_from_slice(&len);
                out.extend_from_slice(body);
            }
        }
    }

    fn parse(r: &mut Reader<'_>) -> Result<Self, Error> {
        const WHAT: &str = "traffic selector";
        let kind = r.u8(WHAT)?;
        let protocol = r.u8(WHAT)?;
        let len = usize::from(r.u16(WHAT)?);
        let body = r.take(len.checked_sub(4).ok_or_else(|| syntax(WHAT))?, WHAT)?;
        let mut r = Reader::new(body);
        let selector = match kind {
            TS_IPV4_ADDR_RANGE => {
                let (start_port, end_port) = (r.u16(WHAT)?, r.u16(WHAT)?);
                let (start, end) = (r.array::<4>(WHAT)?.into(), r.array::<4>(WHAT)?.into());
                TrafficSelector::Ip(IpSelector { protocol, start_port, end_port, start, end })
            }
            TS_IPV6_ADDR_RANGE => {
                let (start_port, end_port) = (r.u16(WHAT)?, r.u16(WHAT)?);
                let (start, end) = (r.array::<16>(WHAT)?.into(), r.array::<16>(WHAT)?.into());
                TrafficSelector::Ip(IpSelector { protocol, start_port, end_port, start, end })
            }
            TS_SECLABEL => TrafficSelector::Label(SecurityLabel::new(r.rest().to_vec())?),
            kind => TrafficSelector::Other { kind, protocol, body: r.rest().to_vec() },
        };
        if !r.is_empty() {
            return Err(syntax(WHAT));
        }
        Ok(selector)
    }
}

/// A TSi or TSr payload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TrafficSelectors(pub Vec<TrafficSelector>);

impl TrafficSelectors {
    /// The address selectors.
    pub fn ips(&self) -> impl Iterator<Item = &IpSelector> {
        self.0.iter().filter_map(|ts| match ts {
            TrafficSelector::Ip(ip) => Some(ip),
            TrafficSelector::Label(_) | TrafficSelector::Other { .. } => None,
        })
    }

    /// The labels.
    pub fn labels(&self) -> impl Iterator<Item = &SecurityLabel> {
        self.0.iter().filter_map(|ts| match ts {
            TrafficSelector::Label(label) => Some(label),
            TrafficSelector::Ip(_) | TrafficSelector::Other { .. } => None,
        })
    }

    /// Octets of the body.
    pub fn len(&self) -> usize {
        4 + self.0.iter().map(TrafficSelector::len).sum::<usize>()
    }

    /// Appends the body.
    pub fn emit(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&[self.0.len() as u8, 0, 0, 0]);
        for selector in &self.0 {
            selector.emit(out);
        }
    }

    /// Reads a body.
    ///
    /// # Errors
    /// Lengths and counts that do not agree, none at all, or more than [`MAX_SELECTORS`].
    pub fn parse(body: &[u8]) -> Result<Self, Error> {
        let mut r = Reader::new(body);
        let count = usize::from(r.u8("TS payload")?);
        r.array::<3>("TS payload")?;
        if count > MAX_SELECTORS {
            return Err(Misbehaved::Limit("traffic selectors").into());
        }
        let mut selectors = Vec::new();
        for _ in 0..count {
            selectors.push(TrafficSelector::parse(&mut r)?);
        }
        if selectors.is_empty() || !r.is_empty() {
            return Err(syntax("TS payload"));
        }
        Ok(TrafficSelectors(selectors))
    }
}
