//! TCP (RFC 9293): the header and its options.

use crate::{Malformed, checksum::Sum, field};

/// Bytes of a header without options.
pub const HEADER_LEN: usize = 20;
/// Where the checksum is.
pub const CHECKSUM_AT: usize = 16;
/// Where the flags are.
pub const FLAGS_AT: usize = 13;

/// Flag bits of the byte at [`FLAGS_AT`].
pub mod flags {
    /// No more data.
    pub const FIN: u8 = 0x01;
    /// Synchronise sequence numbers.
    pub const SYN: u8 = 0x02;
    /// Reset.
    pub const RST: u8 = 0x04;
    /// Push.
    pub const PSH: u8 = 0x08;
    /// Acknowledgement.
    pub const ACK: u8 = 0x10;
    /// Urgent.
    pub const URG: u8 = 0x20;
    /// ECN echo.
    pub const ECE: u8 = 0x40;
    /// Congestion window reduced.
    pub const CWR: u8 = 0x80;
}

/// A view of a TCP segment, from the first byte of its header to its end.
#[derive(Clone, Copy, Debug)]
pub struct Segment<T>(T);

impl<T: AsRef<[u8]>> Segment<T> {
    /// A view of bytes that hold the header with its options.
    pub fn new_checked(bytes: T) -> Result<Self, Malformed> {
        let b = bytes.as_ref();
        if b.len() < HEADER_LEN {
            return Err(Malformed::Truncated("TCP header"));
        }
        let header = usize::from(b[12] >> 4) * 4;
        if header < HEADER_LEN || header > b.len() {
            return Err(Malformed::Length("TCP"));
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

    /// Sequence number.
    pub fn sequence(&self) -> u32 {
        field::be32(self.bytes(), 4)
    }

    /// Acknowledgement number.
    pub fn acknowledgement(&self) -> u32 {
        field::be32(self.bytes(), 8)
    }

    /// Bytes of the header with its options.
    pub fn header_len(&self) -> usize {
        usize::from(self.bytes()[12] >> 4) * 4
    }

    /// The bits of [`flags`].
    pub fn flags(&self) -> u8 {
        self.bytes()[FLAGS_AT]
    }

    /// Window, unscaled.
    pub fn window(&self) -> u16 {
        field::be16(self.bytes(), 14)
    }

    /// The options, walked.
    pub fn options(&self) -> Options<'_> {
        Options(&self.bytes()[HEADER_LEN..self.header_len()])
    }

    /// What follows the header.
    pub fn payload(&self) -> &[u8] {
        &self.bytes()[self.header_len()..]
    }

    /// Whether the checksum holds, given the sum over the pseudo-header (length included).
    pub fn verify_checksum(&self, pseudo: Sum) -> bool {
        pseudo.bytes(self.bytes()).is_valid()
    }
}

/// One option of a header (RFC 9293 §3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TcpOption<'a> {
    /// Maximum segment size.
    MaxSegmentSize(u16),
    /// Window scale (RFC 7323 §2).
    WindowScale(u8),
    /// Selective acknowledgement permitted (RFC 2018 §2).
    SackPermitted,
    /// Timestamps: value and echo (RFC 7323 §3).
    Timestamps(u32, u32),
    /// Any other, SACK blocks included: kind and what follows the length.
    Other(u8, &'a [u8]),
}

/// Iterator over options. No-operations are passed over; it ends at the end of the list, and after one error.
#[derive(Clone, Debug)]
pub struct Options<'a>(&'a [u8]);

impl<'a> Iterator for Options<'a> {
    type Item = Result<TcpOption<'a>, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            match *self.0 {
                [] | [0, ..] => return None,
                [1, ref rest @ ..] => self.0 = rest,
                [kind, length, ..] if length >= 2 && usize::from(length) <= self.0.len() => {
                    let (option, rest) = self.0.split_at(usize::from(length));
                    self.0 = rest;
                    let data = &option[2..];
                    return Some(Ok(match (kind, data) {
                        (2, [a, b]) => TcpOption::MaxSegmentSize(u16::from_be_bytes([*a, *b])),
                        (3, [shift]) => TcpOption::WindowScale(*shift),
                        (4, []) => TcpOption::SackPermitted,
                        (8, data) if data.len() == 8 => {
                            TcpOption::Timestamps(field::be32(data, 0), field::be32(data, 4))
                        }
                        (kind, data) => TcpOption::Other(kind, data),
                    }));
                }
                _ => {
                    self.0 = &[];
                    return Some(Err(Malformed::Length("TCP option")));
                }
            }
        }
    }
}

/// A TCP header as plain values, with options as bytes (a multiple of four, at most 40).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Repr<'a> {
    /// Source port.
    pub source_port: u16,
    /// Destination port.
    pub destination_port: u16,
    /// Sequence number.
    pub sequence: u32,
    /// Acknowledgement number.
    pub acknowledgement: u32,
    /// The bits of [`flags`].
    pub flags: u8,
    /// Window, unscaled.
    pub window: u16,
    /// Options with their padding.
    pub options: &'a [u8],
}

impl<'a> Repr<'a> {
    /// The header's values.
    pub fn parse<T: AsRef<[u8]>>(segment: &'a Segment<T>) -> Self {
        Self {
            source_port: segment.source_port(),
            destination_port: segment.destination_port(),
            sequence: segment.sequence(),
            acknowledgement: segment.acknowledgement(),
            flags: segment.flags(),
            window: segment.window(),
            options: segment.options().0,
        }
    }

    /// Bytes of the header.
    pub fn buffer_len(&self) -> usize {
        HEADER_LEN + self.options.len()
    }

    /// Writes the header before a payload that fills the rest of `out`, with a checksum over all of `out` that
    /// begins from the sum over the pseudo-header. An `out` shorter than the header is left alone, as it is when
    /// the options are no multiple of four or too long.
    pub fn emit(&self, out: &mut [u8], pseudo: Sum) {
        let header = self.buffer_len();
        if out.len() < header || header > 60 || !header.is_multiple_of(4) {
            return;
        }
        field::put16(out, 0, self.source_port);
        field::put16(out, 2, self.destination_port);
        field::put32(out, 4, self.sequence);
        field::put32(out, 8, self.acknowledgement);
        out[12] = ((header / 4) as u8) << 4;
        out[FLAGS_AT] = self.flags;
        field::put16(out, 14, self.window);
        field::put32(out, CHECKSUM_AT, 0);
        out[HEADER_LEN..header].copy_from_slice(self.options);
        let sum = pseudo.bytes(out).checksum();
        field::put16(out, CHECKSUM_AT, sum);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ip, protocol};

    #[test]
    fn the_options_of_a_linux_syn_are_walked_in_order() {
        let mut syn = vec![0; 20];
        syn[12] = 0xa0;
        syn.extend([2, 4, 0x05, 0xb4, 4, 2, 8, 10, 0, 0, 0, 7, 0, 0, 0, 0, 1, 3, 3, 7]);
        let segment = Segment::new_checked(&syn).unwrap();
        let options: Vec<_> = segment.options().map(Result::unwrap).collect();
        assert_eq!(
            options,
            [
                TcpOption::MaxSegmentSize(1460),
                TcpOption::SackPermitted,
                TcpOption::Timestamps(7, 0),
                TcpOption::WindowScale(7),
            ]
        );
    }

    #[test]
    fn an_option_whose_length_lies_ends_the_walk_with_an_error() {
        for bad in [[5u8, 0, 0, 0], [5, 1, 0, 0], [5, 5, 0, 0], [1, 1, 1, 5]] {
            let mut bytes = vec![0; 20];
            bytes[12] = 0x60;
            bytes.extend(bad);
            let segment = Segment::new_checked(&bytes).unwrap();
            let options: Vec<_> = segment.options().collect();
            assert_eq!(options, [Err(Malformed::Length("TCP option"))]);
        }
    }

    #[test]
    fn a_segment_parses_and_emits_to_the_same_bytes() {
        let pseudo =
            ip::pseudo_header("10.42.0.1".parse().unwrap(), "10.42.0.2".parse().unwrap(), protocol::TCP, 28)
                .unwrap();
        let repr = Repr {
            source_port: 80,
            destination_port: 4000,
            sequence: 7,
            acknowledgement: 9,
            flags: flags::ACK | flags::PSH,
            window: 500,
            options: &[1, 1, 1, 0],
        };
        let mut out = [0; 28];
        out[24..].copy_from_slice(b"data");
        repr.emit(&mut out, pseudo);
        let segment = Segment::new_checked(&out).unwrap();
        assert!(segment.verify_checksum(pseudo));
        assert_eq!(segment.payload(), b"data");
        assert_eq!(Repr::parse(&segment), repr);
        assert!(Segment::new_checked([0; 20]).is_err(), "data offset 0");
        assert!(Segment::new_checked([0xff; 20]).is_err(), "data offset 60");
    }
}
