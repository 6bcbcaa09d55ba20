//! The ESP packet (RFC 4303 §2) as AES-GCM fills it (RFC 4106).
//!
//! ```text
//! 0                   4                   8                  16
//! +-------------------+-------------------+-------------------+
//! |        SPI        |  sequence (low)   |   explicit IV     |
//! +-------------------+-------------------+-------------------+
//! | inner packet ... | padding 1 2 3 ... | pad length | next header |   (encrypted)
//! +-----------------------------------------------------------------+
//! |                     integrity check value (16)                  |
//! +-----------------------------------------------------------------+
//! ```

use crate::{Malformed, field};

/// SPI and sequence number.
pub const HEADER_LEN: usize = 8;
/// The explicit IV of RFC 4106 §3.1.
pub const IV_LEN: usize = 8;
/// Pad length and next header.
pub const TRAILER_LEN: usize = 2;
/// The ICV of AES-GCM-16.
pub const ICV_LEN: usize = 16;
/// What is encrypted ends on this boundary (RFC 4303 §2.4).
pub const ALIGN: usize = 4;
/// Bytes before the inner packet.
pub const HEAD_ROOM: usize = HEADER_LEN + IV_LEN;
/// At most so many bytes come after the inner packet.
pub const TAIL_ROOM_MAX: usize = ALIGN - 1 + TRAILER_LEN + ICV_LEN;
/// The shortest ESP packet that can hold anything.
pub const LEN_MIN: usize = HEAD_ROOM + ALIGN + ICV_LEN;

/// Bytes of the ESP packet around an inner packet of `inner` bytes.
pub const fn sealed_len(inner: usize) -> usize {
    HEAD_ROOM + (inner + TRAILER_LEN).next_multiple_of(ALIGN) + ICV_LEN
}

/// The longest inner packet whose ESP packet has at most `outer` bytes (a UDP payload), or `None` for none at all.
pub const fn inner_len_max(outer: usize) -> Option<usize> {
    match outer.checked_sub(HEAD_ROOM + ICV_LEN) {
        Some(room) if room >= ALIGN => Some(room / ALIGN * ALIGN - TRAILER_LEN),
        _ => None,
    }
}

/// SPI and low half of the sequence number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Security parameters index.
    pub spi: u32,
    /// The low 32 bits of the sequence number; the high ones are not sent (RFC 4303 §2.2.1).
    pub sequence: u32,
}

impl Header {
    /// The header at the start of `bytes`.
    #[inline]
    pub fn parse(bytes: &[u8]) -> Result<Self, Malformed> {
        let bytes = bytes.first_chunk::<HEADER_LEN>().ok_or(Malformed::Truncated("ESP header"))?;
        Ok(Self { spi: field::be32(bytes, 0), sequence: field::be32(bytes, 4) })
    }

    /// The header as bytes.
    #[inline]
    pub fn emit(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        field::put32(&mut bytes, 0, self.spi);
        field::put32(&mut bytes, 4, self.sequence);
        bytes
    }
}

/// The explicit IV of an ESP packet.
#[inline]
pub fn iv(packet: &[u8]) -> Option<[u8; IV_LEN]> {
    packet.get(HEADER_LEN..)?.first_chunk().copied()
}

/// Writes padding, pad length and next header after `inner` bytes of plaintext and returns the length of all that
/// is to be encrypted, or `None` when `buffer` is too short.
#[inline]
pub fn put_trailer(buffer: &mut [u8], inner: usize, next_header: u8) -> Option<usize> {
    let end = (inner + TRAILER_LEN).next_multiple_of(ALIGN);
    let trailer = buffer.get_mut(inner..end)?;
    let pad = trailer.len() - TRAILER_LEN;
    for (value, byte) in (1..).zip(&mut trailer[..pad]) {
        *byte = value;
    }
    trailer[pad] = pad as u8;
    trailer[pad + 1] = next_header;
    Some(end)
}

/// Takes the trailer off decrypted bytes: what is before the padding, and the next header. The padding must be 1,
/// 2, 3 and so on (RFC 4303 §2.4).
#[inline]
pub fn take_trailer(plain: &[u8]) -> Result<(&[u8], u8), Malformed> {
    let [rest @ .., pad, next_header] = plain else {
        return Err(Malformed::Truncated("ESP trailer"));
    };
    let inner = rest.len().checked_sub(usize::from(*pad)).ok_or(Malformed::Length("ESP padding"))?;
    let (inner, padding) = rest.split_at(inner);
    if (1..=u8::MAX).zip(padding).any(|(value, byte)| value != *byte) {
        return Err(Malformed::Length("ESP padding"));
    }
    Ok((inner, *next_header))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_survives_the_way_there_and_back() {
        let bytes = [0xde, 0xad, 0xbe, 0xef, 0, 0, 1, 2];
        let header = Header::parse(&bytes).unwrap();
        assert_eq!(header, Header { spi: 0xdead_beef, sequence: 258 });
        assert_eq!(header.emit(), bytes);
        assert!(Header::parse(&bytes[..7]).is_err());
    }

    #[test]
    fn every_length_is_padded_to_four_and_comes_back() {
        for inner in 0..64 {
            let mut buffer = [0xaa; 80];
            let end = put_trailer(&mut buffer, inner, 4).unwrap();
            assert!(end.is_multiple_of(ALIGN) && end - inner < ALIGN + TRAILER_LEN);
            assert_eq!(sealed_len(inner), HEAD_ROOM + end + ICV_LEN);
            assert!(sealed_len(inner) <= HEAD_ROOM + inner + TAIL_ROOM_MAX);
            let (got, next) = take_trailer(&buffer[..end]).unwrap();
            assert_eq!((got.len(), next), (inner, 4));
            assert_eq!(put_trailer(&mut buffer[..end - 1], inner, 4), None);
        }
    }

    #[test]
    fn the_largest_inner_packet_just_fits() {
        assert_eq!(inner_len_max(1472), Some(1438), "1500 - IPv4 - UDP, as measured in the spike");
        for outer in LEN_MIN..2000 {
            let inner = inner_len_max(outer).unwrap();
            assert!(sealed_len(inner) <= outer && sealed_len(inner + 1) > outer);
        }
        assert_eq!(inner_len_max(LEN_MIN - 1), None);
    }

    #[test]
    fn padding_that_counts_wrongly_or_is_longer_than_the_data_is_refused() {
        assert_eq!(take_trailer(&[9, 1, 2, 2, 4]).unwrap(), (&[9][..], 4));
        assert!(take_trailer(&[9, 1, 3, 2, 4]).is_err());
        assert!(take_trailer(&[9, 0, 1, 4, 4]).is_err());
        assert!(take_trailer(&[4]).is_err());
        assert_eq!(take_trailer(&[0, 59]).unwrap(), (&[][..], 59));
    }
}
