//! `struct virtio_net_hdr`: the ten bytes before each packet of a TUN device with `IFF_VNET_HDR`.
//!
//! Fields are in the host's byte order (virtio 1.2 §5.1.6, as Linux's legacy layout has them).

/// Bytes of the header.
pub const LEN: usize = 10;
/// The checksum from `csum_start` on is left to whoever gets the packet.
pub const NEEDS_CSUM: u8 = 1;
/// The checksum was verified.
pub const DATA_VALID: u8 = 2;
/// Set beside a TCP kind: the first segment carries CWR.
const ECN: u8 = 0x80;

/// How a superpacket is to be cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Gso {
    /// Not a superpacket.
    #[default]
    None,
    /// TCP over IPv4.
    Tcp4,
    /// UDP over IPv4 with `IP_FRAGMENT`ation (UFO): never asked for, never sent by Linux to who did not ask.
    Ufo,
    /// TCP over IPv6.
    Tcp6,
    /// UDP datagrams of equal size, of either family.
    UdpL4,
    /// A number that this version does not know.
    Other(u8),
}

impl Gso {
    fn from_byte(byte: u8) -> Self {
        match byte {
            0 => Self::None,
            1 => Self::Tcp4,
            3 => Self::Ufo,
            4 => Self::Tcp6,
            5 => Self::UdpL4,
            other => Self::Other(other),
        }
    }

    fn byte(self) -> u8 {
        match self {
            Self::None => 0,
            Self::Tcp4 => 1,
            Self::Ufo => 3,
            Self::Tcp6 => 4,
            Self::UdpL4 => 5,
            Self::Other(other) => other & !ECN,
        }
    }
}

/// The header as plain values.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Repr {
    /// [`NEEDS_CSUM`], [`DATA_VALID`].
    pub flags: u8,
    /// The kind of superpacket.
    pub gso: Gso,
    /// The first segment carries CWR (RFC 3168 §6.1.2).
    pub ecn: bool,
    /// Bytes of all headers, as a hint: on forwarded packets the kernel says more than there are.
    pub hdr_len: u16,
    /// Payload bytes of each segment but the last.
    pub gso_size: u16,
    /// Where the checksummed part begins.
    pub csum_start: u16,
    /// Where the checksum is, from `csum_start`.
    pub csum_offset: u16,
}

impl Repr {
    /// The header at the start of `bytes`, or `None` when there are fewer than [`LEN`].
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let bytes = bytes.first_chunk::<LEN>()?;
        let u16_at = |at: usize| u16::from_ne_bytes([bytes[at], bytes[at + 1]]);
        Some(Self {
            flags: bytes[0],
            gso: Gso::from_byte(bytes[1] & !ECN),
            ecn: bytes[1] & ECN != 0,
            hdr_len: u16_at(2),
            gso_size: u16_at(4),
            csum_start: u16_at(6),
            csum_offset: u16_at(8),
        })
    }

    /// The header as bytes.
    pub fn emit(&self) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        bytes[0] = self.flags;
        bytes[1] = self.gso.byte() | if self.ecn { ECN } else { 0 };
        bytes[2..4].copy_from_slice(&self.hdr_len.to_ne_bytes());
        bytes[4..6].copy_from_slice(&self.gso_size.to_ne_bytes());
        bytes[6..8].copy_from_slice(&self.csum_start.to_ne_bytes());
        bytes[8..10].copy_from_slice(&self.csum_offset.to_ne_bytes());
        bytes
    }

    /// Whether the checksum is left to be finished.
    pub fn needs_csum(&self) -> bool {
        self.flags & NEEDS_CSUM != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_endian = "little")]
    #[test]
    fn a_tcp_superpacket_header_is_these_bytes() {
        let repr = Repr {
            flags: NEEDS_CSUM,
            gso: Gso::Tcp4,
            ecn: true,
            hdr_len: 52,
            gso_size: 1386,
            csum_start: 20,
            csum_offset: 16,
        };
        assert_eq!(repr.emit(), [1, 0x81, 52, 0, 0x6a, 0x05, 20, 0, 16, 0]);
    }

    #[test]
    fn every_header_survives_the_way_there_and_back() {
        for kind in 0..=0xffu8 {
            let bytes = [1, kind, 1, 2, 3, 4, 5, 6, 7, 8];
            assert_eq!(Repr::parse(&bytes).unwrap().emit(), bytes);
        }
        assert_eq!(Repr::parse(&[0; 9]), None);
    }
}
