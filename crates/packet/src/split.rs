//! Cuts a superpacket from a TUN device with virtio offloads into the packets that travel.
//!
//! What Linux does in `tcp_gso_segment` and `__udp_gso_segment`, as bytes: every segment has the headers of the
//! whole, its own lengths and checksums; the IPv4 identification counts up; the TCP sequence number advances by
//! the payload before it; FIN and PSH stay for the last, CWR is for the first (RFC 3168 §6.1.2).
//!
//! Invariant: the payloads of the segments, one after another, are the payload of the superpacket.

use crate::{
    checksum::Sum,
    field,
    ip::{self, Version},
    ipv4, ipv6, tcp, udp, vnet,
};

/// Why a packet from the device cannot be cut. The caller drops and counts it.
#[derive(thiserror::Error, Clone, Copy, Debug, PartialEq, Eq)]
pub enum SplitError {
    /// Not an IP packet of the version that the virtio header says.
    #[error("the packet is not of the IP version that its virtio header says")]
    Version,
    /// An offset of the virtio header or a header's length points outside the packet.
    #[error("headers reach beyond the packet")]
    Bounds,
    /// A superpacket whose segments have no size.
    #[error("superpacket with gso_size 0")]
    NoSize,
    /// A kind of superpacket that was not asked for.
    #[error("superpacket of kind {0:?}, which was not asked for")]
    Kind(vnet::Gso),
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    /// Passed on as it is, but for a checksum that may be left to finish, at this place over what follows the
    /// start.
    Whole {
        checksum: Option<(usize, usize)>,
    },
    Tcp {
        sequence: u32,
    },
    Udp,
}

/// A packet from the device, being cut.
#[derive(Clone, Debug)]
pub struct Split<'a> {
    packet: &'a [u8],
    kind: Kind,
    version: Version,
    /// Where the transport header begins, and where its payload does.
    transport: usize,
    payload: usize,
    /// Payload bytes of each segment but the last.
    size: usize,
    /// Payload bytes already given out, and segments.
    done: usize,
    index: usize,
    count: usize,
    /// The sum over the pseudo-header but for its length.
    pseudo: Sum,
    /// The sum over the IPv4 header but for length, identification and checksum.
    header: Sum,
}

impl<'a> Split<'a> {
    /// Takes a packet as it was read from the device, with the header that came before it.
    #[inline]
    pub fn new(header: &vnet::Repr, packet: &'a [u8]) -> Result<Self, SplitError> {
        let version = match packet.first().map(|first| first >> 4) {
            Some(4) if packet.len() >= ipv4::HEADER_LEN => Version::V4,
            Some(6) if packet.len() >= ipv6::HEADER_LEN => Version::V6,
            _ => return Err(SplitError::Version),
        };
        let transport = usize::from(header.csum_start);
        let (kind, payload, protocol) = match (header.gso, version) {
            (vnet::Gso::None, _) => return Self::whole(header, packet, version),
            (vnet::Gso::Tcp4, Version::V4) | (vnet::Gso::Tcp6, Version::V6) => {
                let segment = packet.get(transport..).ok_or(SplitError::Bounds)?;
                let segment = tcp::Segment::new_checked(segment).map_err(|_| SplitError::Bounds)?;
                // hdr_len is not asked: on forwarded packets it may be the length of a whole segment.
                let payload = transport + segment.header_len();
                (Kind::Tcp { sequence: segment.sequence() }, payload, crate::protocol::TCP)
            }
            (vnet::Gso::Tcp4, Version::V6) | (vnet::Gso::Tcp6, Version::V4) => {
                return Err(SplitError::Version);
            }
            (vnet::Gso::UdpL4, _) => (Kind::Udp, transport + udp::HEADER_LEN, crate::protocol::UDP),
            (kind @ (vnet::Gso::Ufo | vnet::Gso::Other(_)), _) => return Err(SplitError::Kind(kind)),
        };
        let ip_header = match version {
            Version::V4 => usize::from(packet[0] & 0x0f) * 4,
            Version::V6 => ipv6::HEADER_LEN,
        };
        let size = usize::from(header.gso_size);
        let total = packet.len().checked_sub(payload).ok_or(SplitError::Bounds)?;
        if size == 0 {
            return Err(SplitError::NoSize);
        }
        if ip_header < ipv4::HEADER_LEN || transport < ip_header || payload + size > usize::from(u16::MAX) {
            return Err(SplitError::Bounds);
        }
        Ok(Self {
            packet,
            kind,
            version,
            transport,
            payload,
            size,
            done: 0,
            index: 0,
            count: total.div_ceil(size).max(1),
            pseudo: ip::pseudo_sum(packet, version, protocol, 0),
            header: match version {
                Version::V4 => {
                    Sum::default().bytes(&packet[..2]).bytes(&packet[6..10]).bytes(&packet[12..ip_header])
                }
                Version::V6 => Sum::default(),
            },
        })
    }

    fn whole(header: &vnet::Repr, packet: &'a [u8], version: Version) -> Result<Self, SplitError> {
        let checksum = if header.needs_csum() {
            let start = usize::from(header.csum_start);
            let place = start + usize::from(header.csum_offset);
            if place + 2 > packet.len() {
                return Err(SplitError::Bounds);
            }
            Some((start, place))
        } else {
            None
        };
        Ok(Self {
            packet,
            kind: Kind::Whole { checksum },
            version,
            transport: 0,
            payload: 0,
            size: packet.len(),
            done: 0,
            index: 0,
            count: 1,
            pseudo: Sum::default(),
            header: Sum::default(),
        })
    }

    /// Bytes of each segment but the last: what `gso_size` of the outer socket derives from.
    #[inline]
    pub fn stride(&self) -> usize {
        self.packet.len().min(self.payload + self.size)
    }

    /// Segments not written yet.
    #[inline]
    pub fn segments_left(&self) -> usize {
        self.count - self.index
    }

    /// Bytes of the segment that [`Split::emit`] writes next, or `None` after the last.
    #[inline]
    pub fn next_len(&self) -> Option<usize> {
        (self.index < self.count).then(|| self.payload + self.next_payload())
    }

    fn next_payload(&self) -> usize {
        self.size.min(self.packet.len() - self.payload - self.done)
    }

    /// Writes the next segment to the start of `out` and returns its length; `None` after the last, or when `out`
    /// is shorter than [`Split::next_len`].
    #[inline]
    pub fn emit(&mut self, out: &mut [u8]) -> Option<usize> {
        let length = self.next_len()?;
        let out = out.get_mut(..length)?;
        let from = self.payload + self.done;
        let (headers, data) = out.split_at_mut(self.payload);
        headers.copy_from_slice(&self.packet[..self.payload]);
        data.copy_from_slice(&self.packet[from..from + data.len()]);
        match self.kind {
            Kind::Whole { checksum: None } => {}
            Kind::Whole { checksum: Some((start, place)) } => {
                // The field already holds the pseudo-header's sum.
                let sum = Sum::default().bytes(&out[start..]).checksum_not_zero();
                field::put16(out, place, sum);
            }
            Kind::Tcp { sequence } => {
                self.finish_ip(out);
                self.finish_tcp(&mut out[self.transport..], sequence);
            }
            Kind::Udp => {
                self.finish_ip(out);
                let datagram = &mut out[self.transport..];
                let length = datagram.len();
                field::put16(datagram, 4, length as u16);
                field::put16(datagram, udp::CHECKSUM_AT, 0);
                let sum = self.pseudo.u16(length as u16).bytes(datagram).checksum_not_zero();
                field::put16(datagram, udp::CHECKSUM_AT, sum);
            }
        }
        self.done += length - self.payload;
        self.index += 1;
        Some(length)
    }

    fn finish_ip(&self, segment: &mut [u8]) {
        let length = segment.len();
        match self.version {
            Version::V4 => {
                field::put16(segment, 2, length as u16);
                let ident = field::be16(segment, 4).wrapping_add(self.index as u16);
                field::put16(segment, 4, ident);
                field::put16(segment, 10, self.header.u16(length as u16).u16(ident).checksum());
            }
            Version::V6 => field::put16(segment, 4, (length - ipv6::HEADER_LEN) as u16),
        }
    }

    fn finish_tcp(&self, segment: &mut [u8], sequence: u32) {
        field::put32(segment, 4, sequence.wrapping_add(self.done as u32));
        let mut flags = segment[tcp::FLAGS_AT];
        if self.index != 0 {
            flags &= !tcp::flags::CWR;
        }
        if self.index + 1 != self.count {
            flags &= !(tcp::flags::FIN | tcp::flags::PSH);
        }
        segment[tcp::FLAGS_AT] = flags;
        field::put16(segment, tcp::CHECKSUM_AT, 0);
        let sum = self.pseudo.u16(segment.len() as u16).bytes(segment).checksum();
        field::put16(segment, tcp::CHECKSUM_AT, sum);
    }
}
