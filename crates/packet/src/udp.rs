//! UDP (RFC 768).

use crate::{Malformed, checksum::Sum, field};

/// Bytes of the header.
pub const HEADER_LEN: usize = 8;
/// Where the checksum is.
pub const CHECKSUM_AT: usize = 6;

/// A view of a UDP datagram.
#[derive(Clone, Copy, Debug)]
pub struct Datagram<T>(T);

impl<T: AsRef<[u8]>> Datagram<T> {
    /// A view of bytes that hold the header and the length it promises. More bytes may follow.
    pub fn new_checked(bytes: T) -> Result<Self, Malformed> {
        let b = bytes.as_ref();
        if b.len() < HEADER_LEN {
            return Err(Malformed::Truncated("UDP header"));
        }
        let length = usize::from(field::be16(b, 4));
        if length < HEADER_LEN || length > b.len() {
            return Err(Malformed::Length("UDP"));
        }
        Ok(Self(bytes))
    }

    fn bytes(&self) -> &[u8] {
        self.0.as_ref()
    }

    /// Source port.
    pub fn source_port(&self) -> u16 {
        field::be16(self.bytes(), 0)
    }

    /// Destination port.
    pub fn destination_port(&self) -> u16 {
        field::be16(self.bytes(), 2)
    }

    /// Bytes of header and payload. Never less than [`HEADER_LEN`].
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        usize::from(field::be16(self.bytes(), 4))
    }

    /// The checksum; 0 is "none".
    pub fn checksum(&self) -> u16 {
        field::be16(self.bytes(), CHECKSUM_AT)
    }

    /// What follows the header.
    pub fn payload(&self) -> &[u8] {
        &self.bytes()[HEADER_LEN..self.len()]
    }

    /// Whether the checksum holds, given the sum over the pseudo-header (length included). "None" holds.
    pub fn verify_checksum(&self, pseudo: Sum) -> bool {
        self.checksum() == 0 || pseudo.bytes(&self.bytes()[..self.len()]).is_valid()
    }
}

/// A UDP header as plain values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Repr {
    /// Source port.
    pub source_port: u16,
    /// Destination port.
    pub destination_port: u16,
    /// Bytes after the header; at most 65,527.
    pub payload_len: u16,
}

impl Repr {
    /// The header's values.
    pub fn parse(datagram: &Datagram<impl AsRef<[u8]>>) -> Self {
        Self {
            source_port: datagram.source_port(),
            destination_port: datagram.destination_port(),
            payload_len: (datagram.len() - HEADER_LEN) as u16,
        }
    }

    /// Bytes of header and payload.
    pub fn buffer_len(&self) -> usize {
        HEADER_LEN + usize::from(self.payload_len)
    }

    /// Writes the header before a payload that is already in `out`, with a checksum over both that begins from the
    /// sum over the pseudo-header. An `out` shorter than [`Repr::buffer_len`] is left alone.
    pub fn emit(&self, out: &mut [u8], pseudo: Sum) {
        let Some(out) = out.get_mut(..self.buffer_len()) else { return };
        field::put16(out, 0, self.source_port);
        field::put16(out, 2, self.destination_port);
        field::put16(out, 4, self.payload_len.saturating_add(HEADER_LEN as u16));
        field::put16(out, CHECKSUM_AT, 0);
        let sum = pseudo.bytes(out).checksum_not_zero();
        field::put16(out, CHECKSUM_AT, sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ip, protocol};

    #[test]
    fn a_datagram_parses_and_emits_to_the_same_bytes() {
        // 127.0.0.1:43019 to 127.0.0.1:53, "hi".
        let golden = [0xa8, 0x0b, 0x00, 0x35, 0x00, 0x0a, 0xf1, 0x2d, 0x68, 0x69];
        let local = "127.0.0.1".parse().unwrap();
        let pseudo = ip::pseudo_header(local, local, protocol::UDP, 10).unwrap();
        let datagram = Datagram::new_checked(&golden).unwrap();
        assert_eq!(datagram.payload(), b"hi");
        assert!(datagram.verify_checksum(pseudo));
        let mut out = [0; 10];
        out[8..].copy_from_slice(b"hi");
        Repr::parse(&datagram).emit(&mut out, pseudo);
        assert_eq!(out, golden);
    }

    #[test]
    fn a_length_shorter_than_the_header_or_longer_than_the_bytes_is_refused() {
        assert!(Datagram::new_checked([0, 1, 0, 2, 0, 7, 0, 0]).is_err());
        assert!(Datagram::new_checked([0, 1, 0, 2, 0, 9, 0, 0]).is_err());
        assert!(Datagram::new_checked([0; 7]).is_err());
    }
}
