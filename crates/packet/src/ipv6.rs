//! IPv6 (RFC 8200), the fixed header. The chain of extension headers is walked by [`crate::ip::locate`].

use std::net::Ipv6Addr;

use crate::{Malformed, field};

/// Bytes of the fixed header.
pub const HEADER_LEN: usize = 40;

/// A view of an IPv6 packet.
#[derive(Clone, Copy, Debug)]
pub struct Packet<T>(T);

impl<T: AsRef<[u8]>> Packet<T> {
    /// A view of bytes that hold the fixed header and the payload it promises. More bytes may follow.
    pub fn new_checked(bytes: T) -> Result<Self, Malformed> {
        let b = bytes.as_ref();
        if b.len() < HEADER_LEN {
            return Err(Malformed::Truncated("IPv6 header"));
        }
        if b[0] >> 4 != 6 {
            return Err(Malformed::Version("IPv6"));
        }
        if b.len() < HEADER_LEN + usize::from(field::be16(b, 4)) {
            return Err(Malformed::Length("IPv6"));
        }
        Ok(Self(bytes))
    }

    fn bytes(&self) -> &[u8] {
        self.0.as_ref()
    }

    /// Traffic class: DSCP and ECN.
    pub fn traffic_class(&self) -> u8 {
        let b = self.bytes();
        (b[0] << 4) | (b[1] >> 4)
    }

    /// Flow label, 20 bits.
    pub fn flow_label(&self) -> u32 {
        field::be32(self.bytes(), 0) & 0x000f_ffff
    }

    /// Bytes after the fixed header.
    pub fn payload_len(&self) -> usize {
        usize::from(field::be16(self.bytes(), 4))
    }

    /// Bytes of header and payload.
    pub fn total_len(&self) -> usize {
        HEADER_LEN + self.payload_len()
    }

    /// Number of the header that follows the fixed one.
    pub fn next_header(&self) -> u8 {
        self.bytes()[6]
    }

    /// Hop limit.
    pub fn hop_limit(&self) -> u8 {
        self.bytes()[7]
    }

    /// Source.
    pub fn source(&self) -> Ipv6Addr {
        Ipv6Addr::from(field::array::<16>(self.bytes(), 8))
    }

    /// Destination.
    pub fn destination(&self) -> Ipv6Addr {
        Ipv6Addr::from(field::array::<16>(self.bytes(), 24))
    }

    /// What follows the fixed header, up to the payload length.
    pub fn payload(&self) -> &[u8] {
        &self.bytes()[HEADER_LEN..self.total_len()]
    }
}

/// The fixed header as plain values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Repr {
    /// Traffic class: DSCP and ECN.
    pub traffic_class: u8,
    /// Flow label, 20 bits.
    pub flow_label: u32,
    /// Hop limit.
    pub hop_limit: u8,
    /// Number of the header that follows.
    pub next_header: u8,
    /// Source.
    pub source: Ipv6Addr,
    /// Destination.
    pub destination: Ipv6Addr,
    /// Bytes after the fixed header.
    pub payload_len: u16,
}

impl Default for Repr {
    fn default() -> Self {
        Self {
            traffic_class: 0,
            flow_label: 0,
            hop_limit: 64,
            next_header: crate::protocol::NONE,
            source: Ipv6Addr::UNSPECIFIED,
            destination: Ipv6Addr::UNSPECIFIED,
            payload_len: 0,
        }
    }
}

impl Repr {
    /// The header's values.
    pub fn parse(packet: &Packet<impl AsRef<[u8]>>) -> Self {
        Self {
            traffic_class: packet.traffic_class(),
            flow_label: packet.flow_label(),
            hop_limit: packet.hop_limit(),
            next_header: packet.next_header(),
            source: packet.source(),
            destination: packet.destination(),
            payload_len: packet.payload_len() as u16,
        }
    }

    /// Bytes that [`Repr::emit`] writes.
    pub fn buffer_len(&self) -> usize {
        HEADER_LEN
    }

    /// Writes the header to the first [`HEADER_LEN`] bytes of `out`; more are left alone, fewer write nothing.
    pub fn emit(&self, out: &mut [u8]) {
        let Some(header) = out.first_chunk_mut::<HEADER_LEN>() else { return };
        let first = 6 << 28 | u32::from(self.traffic_class) << 20 | (self.flow_label & 0x000f_ffff);
        field::put32(header, 0, first);
        field::put16(header, 4, self.payload_len);
        header[6] = self.next_header;
        header[7] = self.hop_limit;
        header[8..24].copy_from_slice(&self.source.octets());
        header[24..40].copy_from_slice(&self.destination.octets());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_parses_and_emits_to_the_same_bytes() {
        let mut golden = vec![0x62, 0xea, 0xbc, 0xde, 0x00, 0x08, 0x11, 0x40];
        golden.extend("fd00::1".parse::<Ipv6Addr>().unwrap().octets());
        golden.extend("fd00::2".parse::<Ipv6Addr>().unwrap().octets());
        golden.extend([0; 8]);
        let packet = Packet::new_checked(&golden).unwrap();
        assert_eq!(packet.traffic_class(), 0x2e);
        assert_eq!(packet.flow_label(), 0xabcde);
        assert_eq!(packet.payload().len(), 8);
        let mut out = [0; 40];
        Repr::parse(&packet).emit(&mut out);
        assert_eq!(out, golden[..40]);
    }

    #[test]
    fn a_payload_that_is_not_there_is_refused() {
        let mut bytes = [0; 40];
        Repr { payload_len: 1, ..Repr::default() }.emit(&mut bytes);
        assert_eq!(Packet::new_checked(&bytes[..]).unwrap_err(), Malformed::Length("IPv6"));
        assert_eq!(Packet::new_checked(&bytes[..39]).unwrap_err(), Malformed::Truncated("IPv6 header"));
    }
}
