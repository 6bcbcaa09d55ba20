//! IPv4 (RFC 791).

use std::net::Ipv4Addr;

use crate::{Malformed, checksum, field};

/// Bytes of a header without options.
pub const HEADER_LEN: usize = 20;

/// A view of an IPv4 packet.
#[derive(Clone, Copy, Debug)]
pub struct Packet<T>(T);

impl<T: AsRef<[u8]>> Packet<T> {
    /// A view of bytes whose header is whole and whose total length is there. More bytes may follow it.
    pub fn new_checked(bytes: T) -> Result<Self, Malformed> {
        let b = bytes.as_ref();
        if b.len() < HEADER_LEN {
            return Err(Malformed::Truncated("IPv4 header"));
        }
        if b[0] >> 4 != 4 {
            return Err(Malformed::Version("IPv4"));
        }
        let header = usize::from(b[0] & 0x0f) * 4;
        let total = usize::from(field::be16(b, 2));
        if header < HEADER_LEN || total < header || b.len() < total {
            return Err(Malformed::Length("IPv4"));
        }
        Ok(Self(bytes))
    }

    fn bytes(&self) -> &[u8] {
        self.0.as_ref()
    }

    /// Bytes of the header with its options.
    pub fn header_len(&self) -> usize {
        usize::from(self.bytes()[0] & 0x0f) * 4
    }

    /// Type of service: DSCP and ECN.
    pub fn tos(&self) -> u8 {
        self.bytes()[1]
    }

    /// Bytes of header and payload.
    pub fn total_len(&self) -> usize {
        usize::from(field::be16(self.bytes(), 2))
    }

    /// Identification.
    pub fn ident(&self) -> u16 {
        field::be16(self.bytes(), 4)
    }

    /// "Don't fragment".
    pub fn dont_fragment(&self) -> bool {
        self.bytes()[6] & 0x40 != 0
    }

    /// Whether this is a part of a fragmented packet, the first included.
    pub fn is_fragment(&self) -> bool {
        field::be16(self.bytes(), 6) & 0x3fff != 0
    }

    /// Where this fragment belongs, in bytes; 0 for a whole packet too.
    pub fn fragment_offset(&self) -> usize {
        usize::from(field::be16(self.bytes(), 6) & 0x1fff) * 8
    }

    /// Time to live.
    pub fn ttl(&self) -> u8 {
        self.bytes()[8]
    }

    /// Protocol number.
    pub fn protocol(&self) -> u8 {
        self.bytes()[9]
    }

    /// Source.
    pub fn source(&self) -> Ipv4Addr {
        Ipv4Addr::from(field::array(self.bytes(), 12))
    }

    /// Destination.
    pub fn destination(&self) -> Ipv4Addr {
        Ipv4Addr::from(field::array(self.bytes(), 16))
    }

    /// What follows the header, up to the total length.
    pub fn payload(&self) -> &[u8] {
        &self.bytes()[self.header_len()..self.total_len()]
    }

    /// Whether the header checksum holds.
    pub fn verify_checksum(&self) -> bool {
        checksum::Sum::default().bytes(&self.bytes()[..self.header_len()]).is_valid()
    }
}

/// An IPv4 header without options, as plain values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Repr {
    /// Type of service: DSCP and ECN.
    pub tos: u8,
    /// Identification.
    pub ident: u16,
    /// "Don't fragment".
    pub dont_fragment: bool,
    /// Time to live.
    pub ttl: u8,
    /// Protocol number of the payload.
    pub protocol: u8,
    /// Source.
    pub source: Ipv4Addr,
    /// Destination.
    pub destination: Ipv4Addr,
    /// Bytes after the header; at most 65,515.
    pub payload_len: u16,
}

impl Default for Repr {
    fn default() -> Self {
        Self {
            tos: 0,
            ident: 0,
            dont_fragment: false,
            ttl: 64,
            protocol: 0,
            source: Ipv4Addr::UNSPECIFIED,
            destination: Ipv4Addr::UNSPECIFIED,
            payload_len: 0,
        }
    }
}

impl Repr {
    /// The header's values. Options and fragments are refused: this form cannot hold them.
    pub fn parse(packet: &Packet<impl AsRef<[u8]>>) -> Result<Self, Malformed> {
        if packet.header_len() != HEADER_LEN || packet.is_fragment() {
            return Err(Malformed::Unsupported("IPv4 with options or in fragments"));
        }
        if !packet.verify_checksum() {
            return Err(Malformed::Checksum("IPv4"));
        }
        Ok(Self {
            tos: packet.tos(),
            ident: packet.ident(),
            dont_fragment: packet.dont_fragment(),
            ttl: packet.ttl(),
            protocol: packet.protocol(),
            source: packet.source(),
            destination: packet.destination(),
            payload_len: (packet.total_len() - HEADER_LEN) as u16,
        })
    }

    /// Bytes that [`Repr::emit`] writes.
    pub fn buffer_len(&self) -> usize {
        HEADER_LEN
    }

    /// Writes the header with its checksum to the first [`HEADER_LEN`] bytes of `out`; more are left alone, fewer
    /// write nothing.
    pub fn emit(&self, out: &mut [u8]) {
        let Some(header) = out.first_chunk_mut::<HEADER_LEN>() else { return };
        header[0] = 0x45;
        header[1] = self.tos;
        field::put16(header, 2, self.payload_len.saturating_add(HEADER_LEN as u16));
        field::put16(header, 4, self.ident);
        field::put16(header, 6, if self.dont_fragment { DONT_FRAGMENT } else { 0 });
        header[8] = self.ttl;
        header[9] = self.protocol;
        field::put16(header, 10, 0);
        header[12..16].copy_from_slice(&self.source.octets());
        header[16..20].copy_from_slice(&self.destination.octets());
        let sum = checksum::checksum(header);
        field::put16(header, 10, sum);
    }
}

/// Bits of the word at 6: "don't fragment", "more fragments", and the offset in units of eight bytes.
const DONT_FRAGMENT: u16 = 0x4000;
const MORE_FRAGMENTS: u16 = 0x2000;
const OFFSET: u16 = 0x1fff;
const NO_OPERATION: u8 = 1;

/// A packet being cut into fragments (RFC 791 §3.2). It may be a fragment itself.
#[derive(Clone, Debug)]
pub struct Fragments<'a> {
    packet: &'a [u8],
    header: usize,
    /// Payload of each fragment but the last, a multiple of eight.
    step: usize,
    /// Payload already given out.
    done: usize,
}

impl<'a> Fragments<'a> {
    /// Cuts a packet into fragments of at most `mtu` bytes. `None` for a packet that may not be fragmented or is not
    /// IPv4, and for an MTU that does not even hold its header and eight bytes.
    pub fn new(packet: &'a [u8], mtu: usize) -> Option<Self> {
        let view = Packet::new_checked(packet).ok()?;
        let header = view.header_len();
        let step = mtu.checked_sub(header)? & !7;
        if view.dont_fragment() || step == 0 {
            return None;
        }
        Some(Self { packet: &packet[..view.total_len()], header, step, done: 0 })
    }

    /// Writes the next fragment to the start of `out` and returns its length; `None` after the last, or when `out` is
    /// shorter than it.
    pub fn emit(&mut self, out: &mut [u8]) -> Option<usize> {
        let payload = &self.packet[self.header..];
        let rest = payload.get(self.done..).filter(|rest| !rest.is_empty() || self.done == 0)?;
        // A packet without payload is its own only fragment.
        let data = &rest[..rest.len().min(self.step)];
        let length = self.header + data.len();
        let (header, room) = out.get_mut(..length)?.split_at_mut(self.header);
        header.copy_from_slice(&self.packet[..self.header]);
        room.copy_from_slice(data);
        if self.done > 0 {
            blank_options(&mut header[HEADER_LEN..]);
        }
        let word = field::be16(header, 6);
        let last = self.done + data.len() == payload.len();
        let more = if last { word & MORE_FRAGMENTS } else { MORE_FRAGMENTS };
        let offset = (word & OFFSET).wrapping_add((self.done / 8) as u16) & OFFSET;
        field::put16(header, 2, length as u16);
        field::put16(header, 6, more | offset);
        field::put16(header, 10, 0);
        let sum = checksum::checksum(header);
        field::put16(header, 10, sum);
        self.done += data.len().max(1);
        Some(length)
    }
}

/// Makes no-operations of options that only the first fragment has: those without the copied flag.
fn blank_options(mut options: &mut [u8]) {
    while let [kind, rest @ ..] = options {
        let length = match (*kind, rest.first()) {
            // The end of the list, or what is no list.
            (0, _) => return,
            (NO_OPERATION, _) => 1,
            (_, Some(length)) => usize::from(*length).max(2),
            (_, None) => return,
        };
        let (option, rest) = std::mem::take(&mut options).split_at_mut_checked(length).unwrap_or_default();
        if option.first().is_some_and(|kind| kind & 0x80 == 0) {
            option.fill(NO_OPERATION);
        }
        options = rest;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A header from the wire: 10.0.0.6 to 10.0.0.7, UDP, 84 bytes in all.
    const GOLDEN: [u8; 20] = [
        0x45, 0x00, 0x00, 0x54, 0x1c, 0x46, 0x40, 0x00, 0x40, 0x11, 0x0a, 0x47, 0x0a, 0x00, 0x00, 0x06, 0x0a,
        0x00, 0x00, 0x07,
    ];

    #[test]
    fn a_header_parses_and_emits_to_the_same_bytes() {
        let mut bytes = GOLDEN.to_vec();
        bytes.resize(84, 0);
        let packet = Packet::new_checked(&bytes).unwrap();
        let repr = Repr::parse(&packet).unwrap();
        assert_eq!(repr.source, Ipv4Addr::new(10, 0, 0, 6));
        assert_eq!(repr.payload_len, 64);
        assert!(repr.dont_fragment);
        let mut out = [0; 20];
        repr.emit(&mut out);
        assert_eq!(out, GOLDEN);
    }

    #[test]
    fn lengths_that_lie_are_refused() {
        assert!(Packet::new_checked(&GOLDEN[..]).is_err(), "84 bytes promised, 20 there");
        assert!(Packet::new_checked(&GOLDEN[..19]).is_err());
        let mut short_header = GOLDEN;
        short_header[0] = 0x44;
        short_header[3] = 20;
        assert_eq!(Packet::new_checked(&short_header[..]).unwrap_err(), Malformed::Length("IPv4"));
        let mut short_total = GOLDEN;
        short_total[3] = 19;
        assert!(Packet::new_checked(&short_total[..]).is_err());
    }

    /// A packet with one option that is copied and one that is not, and `payload` bytes that count.
    fn with_options(payload: usize, word: u16) -> Vec<u8> {
        let options = [0x94, 4, 0, 0, 7, 3, 4, 0];
        let mut packet = GOLDEN.to_vec();
        packet.extend(options);
        packet.extend((0..payload).map(|at| at as u8));
        packet[0] = 0x47;
        let total = packet.len() as u16;
        field::put16(&mut packet, 2, total);
        field::put16(&mut packet, 6, word);
        packet
    }

    #[test]
    fn fragments_put_together_are_the_packet() {
        for (payload, mtu, word) in
            [(100, 60, 0), (96, 60, 0), (1480, 576, MORE_FRAGMENTS | 5), (8, 36, 0), (0, 36, 0)]
        {
            let packet = with_options(payload, word);
            let mut fragments = Fragments::new(&packet, mtu).unwrap();
            let (mut out, mut joined, mut more) = ([0; 2000], Vec::new(), true);
            while let Some(length) = fragments.emit(&mut out) {
                assert!(more && length <= mtu);
                let view = Packet::new_checked(&out[..length]).unwrap();
                assert!(view.verify_checksum() && !view.dont_fragment());
                assert_eq!(view.fragment_offset(), usize::from(word & OFFSET) * 8 + joined.len());
                assert_eq!(out[20..24], packet[20..24], "the copied option");
                assert_eq!(out[24..27] == packet[24..27], joined.is_empty(), "the other one");
                more = field::be16(&out, 6) & MORE_FRAGMENTS != 0;
                joined.extend_from_slice(view.payload());
            }
            assert_eq!(joined, packet[28..]);
            assert_eq!(more, word & MORE_FRAGMENTS != 0);
        }
    }

    #[test]
    fn what_may_not_or_cannot_be_cut_is_left_alone() {
        assert!(Fragments::new(&with_options(100, DONT_FRAGMENT), 60).is_none());
        assert!(Fragments::new(&with_options(100, 0), 35).is_none(), "header and seven bytes");
        assert!(Fragments::new(&with_options(100, 0), 0).is_none());
        assert!(Fragments::new(&[0x60; 60], 60).is_none());
        assert_eq!(Fragments::new(&with_options(100, 0), 60).unwrap().emit(&mut [0; 59]), None);
    }
}
