//! Inner packets as a pcapng stream (draft-ietf-opsawg-pcapng): what Wireshark reads from a pipe.
//!
//! One interface for each network, told of before its first packet. Integers are in little-endian order, as the
//! section header says.

use std::collections::BTreeMap;
use std::time::{Duration, SystemTime};

/// LINKTYPE_RAW: packets begin with their IP header.
const LINKTYPE_RAW: u16 = 101;
const SECTION_HEADER: u32 = 0x0a0d_0d0a;
const INTERFACE: u32 = 1;
const ENHANCED_PACKET: u32 = 6;
const OPT_END: u16 = 0;
const SHB_USERAPPL: u16 = 4;
const IF_NAME: u16 = 2;
const IF_TSRESOL: u16 = 9;
const EPB_FLAGS: u16 = 2;

/// Which way a packet went.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    /// From the peer.
    In,
    /// To the peer.
    Out,
}

/// A stream being written.
#[derive(Debug, Default)]
pub(super) struct Writer {
    /// By what the caller calls them, in the order of their blocks.
    interfaces: BTreeMap<u32, u32>,
}

impl Writer {
    /// What every stream begins with.
    pub(super) fn begin() -> Vec<u8> {
        let mut body = Vec::new();
        body.extend(0x1a2b_3c4d_u32.to_le_bytes());
        body.extend(1u16.to_le_bytes());
        body.extend(0u16.to_le_bytes());
        // How long the section is, is not known.
        body.extend(u64::MAX.to_le_bytes());
        option(&mut body, SHB_USERAPPL, concat!("droveway ", env!("CARGO_PKG_VERSION")).as_bytes());
        option(&mut body, OPT_END, &[]);
        let mut out = Vec::new();
        block(&mut out, SECTION_HEADER, &body);
        out
    }

    /// A packet of an interface, which is called `name` when it is new.
    pub(super) fn packet(
        &mut self,
        interface: u32,
        name: impl FnOnce() -> String,
        at: SystemTime,
        way: Way,
        packet: &[u8],
    ) -> Vec<u8> {
        let mut out = Vec::with_capacity(packet.len() + 64);
        let next = self.interfaces.len() as u32;
        let number = *self.interfaces.entry(interface).or_insert_with(|| {
            let mut body = Vec::new();
            body.extend(LINKTYPE_RAW.to_le_bytes());
            body.extend(0u16.to_le_bytes());
            // Whole packets.
            body.extend(0u32.to_le_bytes());
            option(&mut body, IF_NAME, name().as_bytes());
            // Nanoseconds.
            option(&mut body, IF_TSRESOL, &[9]);
            option(&mut body, OPT_END, &[]);
            block(&mut out, INTERFACE, &body);
            next
        });
        let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO);
        let nanos = u64::try_from(since.as_nanos()).unwrap_or(u64::MAX);
        let length = packet.len() as u32;
        let mut body = Vec::with_capacity(packet.len() + 40);
        for word in [number, (nanos >> 32) as u32, nanos as u32, length, length] {
            body.extend(word.to_le_bytes());
        }
        padded(&mut body, packet);
        let flags: u32 = match way {
            Way::In => 1,
            Way::Out => 2,
        };
        option(&mut body, EPB_FLAGS, &flags.to_le_bytes());
        option(&mut body, OPT_END, &[]);
        block(&mut out, ENHANCED_PACKET, &body);
        out
    }
}

/// Type, length of the whole, body, and the length again.
fn block(out: &mut Vec<u8>, kind: u32, body: &[u8]) {
    let length = (body.len() as u32 + 12).to_le_bytes();
    out.extend(kind.to_le_bytes());
    out.extend(length);
    out.extend(body);
    out.extend(length);
}

fn option(out: &mut Vec<u8>, code: u16, value: &[u8]) {
    out.extend(code.to_le_bytes());
    out.extend((value.len() as u16).to_le_bytes());
    padded(out, value);
}

/// Bytes, and zeros up to a multiple of four.
fn padded(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend(bytes);
    out.resize(out.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_header_is_these_bytes() {
        let begin = Writer::begin();
        assert_eq!(begin[..4], [0x0a, 0x0d, 0x0d, 0x0a]);
        assert_eq!(begin[8..16], [0x4d, 0x3c, 0x2b, 0x1a, 1, 0, 0, 0]);
        assert_eq!(begin[16..24], [0xff; 8]);
        assert_eq!(begin[4..8], begin[begin.len() - 4..], "the length is at both ends");
        assert_eq!(u32::from_le_bytes(begin[4..8].try_into().unwrap()) as usize, begin.len());
    }

    #[test]
    fn an_interface_is_told_of_once_before_its_first_packet() {
        let mut writer = Writer::default();
        let at = SystemTime::UNIX_EPOCH + Duration::from_nanos(0x1_0000_0002);
        let first = writer.packet(7, || "red".to_owned(), at, Way::Out, &[0x45, 1, 2, 3, 4]);
        let blocks = walk(&first);
        assert_eq!(blocks.iter().map(|(kind, _)| *kind).collect::<Vec<_>>(), [INTERFACE, ENHANCED_PACKET]);
        assert_eq!(blocks[0].1[..4], [101, 0, 0, 0]);
        assert_eq!(blocks[0].1[8..16], [2, 0, 3, 0, b'r', b'e', b'd', 0]);
        let packet = blocks[1].1;
        assert_eq!(packet[..20], [0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0, 5, 0, 0, 0, 5, 0, 0, 0]);
        assert_eq!(packet[20..28], [0x45, 1, 2, 3, 4, 0, 0, 0], "padded to four");
        assert_eq!(packet[28..36], [2, 0, 4, 0, 2, 0, 0, 0], "outbound");

        let second = writer.packet(7, || panic!("told already"), at, Way::In, &[0x60; 4]);
        assert_eq!(walk(&second).len(), 1);
        let other = writer.packet(1, || "blue".to_owned(), at, Way::In, &[0x60; 4]);
        assert_eq!(walk(&other)[1].1[0], 1, "the second interface, whatever the caller's number");
    }

    fn walk(mut bytes: &[u8]) -> Vec<(u32, &[u8])> {
        let word = |bytes: &[u8], at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let mut blocks = Vec::new();
        while !bytes.is_empty() {
            let length = word(bytes, 4) as usize;
            assert_eq!(length % 4, 0);
            assert_eq!(word(bytes, length - 4) as usize, length);
            blocks.push((word(bytes, 0), &bytes[8..length - 4]));
            bytes = &bytes[length..];
        }
        blocks
    }
}
