//! Netlink messages as bytes: building requests, walking replies (RFC 3549; `linux/netlink.h`).
//!
//! One codec serves both rtnetlink and nftables. It reads only the attributes it is asked for, so a kernel that says
//! more than this program knows is no error.
//!
//! Invariant: nothing here panics, whatever the bytes; what is cut short is not there.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::uapi::{AF_INET, AF_INET6, NLA_F_NESTED, NLA_TYPE_MASK, NLM_F_REQUEST};

/// Length of `struct nlmsghdr`.
pub(crate) const HEADER: usize = 16;

/// A message being built.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    bytes: Vec<u8>,
}

impl Request {
    /// A request of that type; `NLM_F_REQUEST` is added to `flags`. `header` is the family's own fixed header.
    pub(crate) fn new(kind: u16, flags: u16, header: &[u8]) -> Self {
        let mut bytes = Vec::with_capacity(256);
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&(flags | NLM_F_REQUEST).to_ne_bytes());
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(header);
        Self { bytes }.padded()
    }

    /// Appends an attribute.
    pub(crate) fn put(mut self, kind: u16, value: &[u8]) -> Self {
        let length = u16::try_from(value.len() + 4).unwrap_or(u16::MAX);
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.padded()
    }

    /// Appends an attribute if there is a value for it.
    pub(crate) fn put_some<T: AsRef<[u8]>>(self, kind: u16, value: Option<T>) -> Self {
        match value {
            Some(value) => self.put(kind, value.as_ref()),
            None => self,
        }
    }

    /// Appends text with its closing NUL.
    pub(crate) fn put_text(self, kind: u16, text: &str) -> Self {
        let mut value = text.as_bytes().to_vec();
        value.push(0);
        self.put(kind, &value)
    }

    /// Appends a number in the machine's byte order.
    pub(crate) fn put_u32(self, kind: u16, value: u32) -> Self {
        self.put(kind, &value.to_ne_bytes())
    }

    /// Appends an address in network order.
    pub(crate) fn put_ip(self, kind: u16, address: IpAddr) -> Self {
        match address {
            IpAddr::V4(address) => self.put(kind, &address.octets()),
            IpAddr::V6(address) => self.put(kind, &address.octets()),
        }
    }

    /// Appends an attribute made of what `fill` appends.
    pub(crate) fn nest(mut self, kind: u16, fill: impl FnOnce(Self) -> Self) -> Self {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 2]);
        self.bytes.extend_from_slice(&(kind | NLA_F_NESTED).to_ne_bytes());
        let mut inner = fill(self);
        let length = u16::try_from(inner.bytes.len() - start).unwrap_or(u16::MAX);
        inner.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        inner
    }

    /// Appends bytes that are not an attribute: a header within a nest.
    pub(crate) fn raw(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend_from_slice(bytes);
        self.padded()
    }

    /// Adds header flags.
    pub(crate) fn with_flags(mut self, flags: u16) -> Self {
        let old = u16::from_ne_bytes([self.bytes[6], self.bytes[7]]);
        self.bytes[6..8].copy_from_slice(&(old | flags).to_ne_bytes());
        self
    }

    /// The finished bytes, with that sequence number.
    pub(crate) fn finish(mut self, sequence: u32) -> Vec<u8> {
        let length = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        self.bytes[0..4].copy_from_slice(&length.to_ne_bytes());
        self.bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.bytes
    }

    fn padded(mut self) -> Self {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self
    }
}

/// A message that came in.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Message<'a> {
    pub(crate) kind: u16,
    pub(crate) flags: u16,
    pub(crate) sequence: u32,
    pub(crate) payload: &'a [u8],
}

/// The messages of a datagram.
pub(crate) fn messages(mut datagram: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let length = u32_at(datagram, 0)? as usize;
        let payload = datagram.get(HEADER..length)?;
        let message = Message {
            kind: u16_at(datagram, 4)?,
            flags: u16_at(datagram, 6)?,
            sequence: u32_at(datagram, 8)?,
            payload,
        };
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

/// The attributes in `bytes`: type without flag bits, and value.
pub(crate) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = u16_at(bytes, 0)? as usize;
        let kind = u16_at(bytes, 2)? & NLA_TYPE_MASK;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The first attribute of that type.
pub(crate) fn attribute(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(kind, _)| *kind == wanted).map(|(_, value)| value)
}

/// Text up to its NUL.
pub(crate) fn text(value: &[u8]) -> String {
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(value.len());
    String::from_utf8_lossy(&value[..end]).into_owned()
}

/// An address of 4 or 16 bytes.
pub(crate) fn ip(value: &[u8]) -> Option<IpAddr> {
    if let Ok(octets) = <[u8; 4]>::try_from(value) {
        return Some(IpAddr::V4(Ipv4Addr::from(octets)));
    }
    <[u8; 16]>::try_from(value).ok().map(|octets| IpAddr::V6(Ipv6Addr::from(octets)))
}

/// Two bytes in the machine's order.
pub(crate) fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..at + 2)?.try_into().ok().map(u16::from_ne_bytes)
}

/// Four bytes in the machine's order.
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.try_into().ok().map(u32::from_ne_bytes)
}

/// `AF_INET` or `AF_INET6`.
pub(crate) fn family(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => AF_INET,
        IpAddr::V6(_) => AF_INET6,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_built_is_read_back() {
        let bytes = Request::new(16, 4, &[1, 2, 3, 4])
            .put_text(3, "br0")
            .nest(18, |inner| inner.put_u32(1, 7).put(2, &[9]))
            .finish(42);
        let message = messages(&bytes).next().unwrap();
        assert_eq!((message.kind, message.flags, message.sequence), (16, 5, 42));
        let body = &message.payload[4..];
        assert_eq!(text(attribute(body, 3).unwrap()), "br0");
        let inner = attribute(body, 18).unwrap();
        assert_eq!(u32_at(attribute(inner, 1).unwrap(), 0), Some(7));
        assert_eq!(attribute(inner, 2), Some(&[9][..]));
    }

    #[test]
    fn bytes_cut_anywhere_are_read_without_panic() {
        let bytes =
            Request::new(16, 4, &[0; 16]).put_text(3, "br0").nest(18, |inner| inner.put_u32(1, 7)).finish(1);
        for end in 0..bytes.len() {
            let mut cut = bytes[..end].to_vec();
            for message in messages(&cut) {
                let _ = attributes(message.payload).count();
            }
            if cut.len() >= 4 {
                cut[..4].copy_from_slice(&(end as u32).to_ne_bytes());
                for message in messages(&cut) {
                    let _ = attributes(message.payload.get(16..).unwrap_or_default()).count();
                }
            }
        }
        assert_eq!(messages(&[0; 64]).count(), 0, "a message of no length ends the walk");
        assert_eq!(attributes(&[0; 64]).count(), 0, "an attribute of no length ends the walk");
    }
}
