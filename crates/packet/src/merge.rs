//! Puts received segments together into superpackets for a TUN device with virtio offloads.
//!
//! What Linux's GRO does, on decrypted packets: segments of one flow that follow each other become one packet whose
//! payload is gathered from where the segments lie. The kernel trusts what it is given, so a segment joins only
//! after its checksum was verified, and only where cutting the result again would yield the same segments: next
//! sequence number, same acknowledgement, window, options, TOS, TTL, "don't fragment", no longer than the first.
//! A short segment closes; all else goes alone. PSH does not close, as it does in GRO: what follows in the same batch is
//! already here, and whoever reads gets both (RFC 9293 §3.9.1 lets successive pushes be one). The last segment has it then.
//!
//! Where the kernel takes it ([`Offloads::long`]), TCP over IPv4 becomes longer than an IP header can say, up to
//! [`LONG_MAX`]; the header then says zero (Linux's "BIG TCP", since 6.3). What the kernel does with a superpacket costs about
//! the same whatever its length, and so does its acknowledgement.
//!
//! Packets are pushed as ranges of one arena, the receive buffer. [`Merger::finish`] writes the headers of the
//! superpackets in place and gives, for each, a virtio header and the ranges to gather with one `writev`.
//!
//! Invariant: packets of one flow come out in the order in which they were pushed.
//! Invariant: nothing is allocated after [`Merger::new`].

use std::ops::Range;

use crate::{
    Malformed,
    checksum::Sum,
    field,
    ip::{self, Layout, Version},
    ipv4, ipv6, protocol, tcp, udp, vnet,
};

/// Segments in a UDP superpacket: Linux's own `UDP_GRO_CNT_MAX`, which every version takes back.
const UDP_SEGMENTS_MAX: u16 = 64;
/// Bytes of the longest superpacket. Devices must let it through, with an Ethernet header before it.
pub const LONG_MAX: usize = 256_000;
/// Segments in a TCP superpacket: ranges must fit into one `writev` with the virtio header (`UIO_MAXIOV` is 1024).
const TCP_SEGMENTS_MAX: u16 = 512;
/// Slots in the table of open flows.
const SLOTS: usize = 256;
/// Slots that are looked at for one flow.
const PROBES: usize = 4;
const NO_PIECE: u32 = u32::MAX;

/// What may be merged; a device that refused an offload gets the slower way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offloads {
    /// TCP superpackets.
    pub tcp: bool,
    /// UDP superpackets (`GSO_UDP_L4`, Linux 6.2 and later).
    pub udp: bool,
    /// TCP superpackets of IPv4 that are longer than 65,535 bytes (Linux 6.3 and later).
    pub long: bool,
}

impl Offloads {
    /// All of them.
    pub const ALL: Self = Self { tcp: true, udp: true, long: true };

    /// Bytes of the longest superpacket of a kind.
    fn longest(self, kind: Kind, version: Version) -> usize {
        match (kind, version) {
            (Kind::Tcp, Version::V4) if self.long => LONG_MAX,
            (Kind::Tcp, Version::V4 | Version::V6) | (Kind::Udp, _) => usize::from(u16::MAX),
        }
    }
}

/// A part of the arena, and the part that follows it in the same superpacket.
#[derive(Clone, Copy, Debug)]
struct Piece {
    start: u32,
    length: u32,
    next: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Tcp,
    Udp,
}

/// A packet, or several that have become one.
#[derive(Clone, Copy, Debug)]
struct Group {
    version: Version,
    protocol: u8,
    hash: u32,
    first_piece: u32,
    last_piece: u32,
    /// Where the transport header and its payload begin, from the start of the packet.
    transport: u16,
    payload: u16,
    /// Payload of the first segment: no later one is longer.
    size: u16,
    /// Headers and all payload.
    total: u32,
    segments: u16,
    /// What the next segment must have.
    sequence: u32,
    /// The first segment's checksum has been verified.
    verified: bool,
    /// One of the segments carries PSH.
    push: bool,
    /// The first segment carries CWR.
    reduced: bool,
}

/// A parsed packet that is about to join or to stand alone.
#[derive(Clone, Copy)]
struct Candidate {
    layout: Layout,
    start: usize,
    /// `None` for what is never merged.
    kind: Option<Kind>,
    payload: usize,
    sequence: u32,
    flags: u8,
}

/// Gathers one batch of packets for one device.
#[derive(Debug)]
pub struct Merger {
    offloads: Offloads,
    groups: Vec<Group>,
    pieces: Vec<Piece>,
    /// Open flows: index of the group plus one, or 0.
    slots: [u32; SLOTS],
}

impl Merger {
    /// Room for `capacity` packets a batch.
    pub fn new(capacity: usize, offloads: Offloads) -> Self {
        Self {
            offloads,
            groups: Vec::with_capacity(capacity),
            pieces: Vec::with_capacity(capacity),
            slots: [0; SLOTS],
        }
    }

    /// Whether the batch must be finished before another packet is pushed.
    pub fn is_full(&self) -> bool {
        self.pieces.len() == self.pieces.capacity()
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.pieces.is_empty()
    }

    /// Changes what is merged from now on.
    pub fn set_offloads(&mut self, offloads: Offloads) {
        self.offloads = offloads;
    }

    /// Takes the IP packet in `range` of `arena`, which must stay as it is until [`Merger::finish`]. Bytes after the
    /// packet's own length are left out.
    ///
    /// # Errors
    /// A packet whose IP header does not hold, or that is not inside the arena. A full batch
    /// ([`Merger::is_full`]) refuses too.
    #[inline]
    pub fn push(&mut self, arena: &[u8], range: Range<usize>) -> Result<(), Malformed> {
        if self.is_full() || u32::try_from(arena.len()).is_err() {
            return Err(Malformed::Unsupported("packet beyond the batch's capacity"));
        }
        let start = range.start;
        let packet = arena.get(range).ok_or(Malformed::Truncated("packet"))?;
        let layout = ip::locate(packet)?;
        let packet = &packet[..layout.end];
        if layout.fragment {
            // Fragments carry no ports, so nothing may overtake them.
            self.slots.fill(0);
            self.add(alone(layout, start), 0);
            return Ok(());
        }
        let candidate = match layout.protocol {
            protocol::TCP => self.tcp_candidate(packet, layout, start),
            protocol::UDP => self.udp_candidate(packet, layout, start),
            _ => None,
        };
        if !has_ports(layout) {
            self.add(alone(layout, start), 0);
            return Ok(());
        }
        // With a header that does not hold it goes alone, but no other of its flow may overtake it.
        let candidate = candidate.unwrap_or(alone(layout, start));
        let hash = flow_hash(packet, layout);
        let slot = self.find(arena, packet, layout, hash);
        if let Some((slot, index)) = slot {
            if self.join(arena, packet, candidate, index) {
                return Ok(());
            }
            self.slots[slot] = 0;
        }
        let index = self.add(candidate, hash);
        if candidate.kind.is_some() {
            self.open(hash, index);
        }
        Ok(())
    }

    fn tcp_candidate(&self, packet: &[u8], layout: Layout, start: usize) -> Option<Candidate> {
        let segment = tcp::Segment::new_checked(&packet[layout.transport..]).ok()?;
        let flags = segment.flags();
        let payload = layout.transport + segment.header_len();
        let plain_data = flags & !(tcp::flags::PSH | tcp::flags::CWR | tcp::flags::ECE) == tcp::flags::ACK
            && payload < layout.end;
        let kind = (self.offloads.tcp && layout.plain && plain_data).then_some(Kind::Tcp);
        Some(Candidate { layout, start, kind, payload, sequence: segment.sequence(), flags })
    }

    fn udp_candidate(&self, packet: &[u8], layout: Layout, start: usize) -> Option<Candidate> {
        let datagram = udp::Datagram::new_checked(&packet[layout.transport..]).ok()?;
        let payload = layout.transport + udp::HEADER_LEN;
        let whole = datagram.len() == layout.end - layout.transport && payload < layout.end;
        let kind =
            (self.offloads.udp && layout.plain && whole && datagram.checksum() != 0).then_some(Kind::Udp);
        Some(Candidate { layout, start, kind, payload, sequence: 0, flags: 0 })
    }

    /// The open group of the packet's flow, and its slot.
    fn find(&self, arena: &[u8], packet: &[u8], layout: Layout, hash: u32) -> Option<(usize, usize)> {
        (0..PROBES).map(|probe| slot_of(hash, probe)).find_map(|slot| {
            let index = (self.slots[slot] as usize).checked_sub(1)?;
            let group = &self.groups[index];
            if group.hash != hash || group.version != layout.version || group.protocol != layout.protocol {
                return None;
            }
            let head = self.head(arena, group);
            let ports = |bytes: &[u8], at: usize| field::be32(bytes, at);
            let same = ip::addresses(head, layout.version) == ip::addresses(packet, layout.version)
                && ports(head, group.transport.into()) == ports(packet, layout.transport);
            same.then_some((slot, index))
        })
    }

    fn head<'a>(&self, arena: &'a [u8], group: &Group) -> &'a [u8] {
        let piece = self.pieces[group.first_piece as usize];
        &arena[piece.start as usize..][..piece.length as usize]
    }

    /// Remembers a group that more segments may join. Where all its slots are taken, one flow is closed early.
    fn open(&mut self, hash: u32, index: usize) {
        let free = (0..PROBES).map(|probe| slot_of(hash, probe)).find(|slot| self.slots[*slot] == 0);
        self.slots[free.unwrap_or(slot_of(hash, 0))] = index as u32 + 1;
    }

    /// Begins a group of one.
    fn add(&mut self, candidate: Candidate, hash: u32) -> usize {
        let piece = self.pieces.len() as u32;
        self.pieces.push(Piece {
            start: candidate.start as u32,
            length: candidate.layout.end as u32,
            next: NO_PIECE,
        });
        let size = candidate.layout.end - candidate.payload;
        self.groups.push(Group {
            version: candidate.layout.version,
            protocol: candidate.layout.protocol,
            hash,
            first_piece: piece,
            last_piece: piece,
            transport: candidate.layout.transport as u16,
            payload: candidate.payload as u16,
            size: size as u16,
            total: candidate.layout.end as u32,
            segments: 1,
            sequence: candidate.sequence.wrapping_add(size as u32),
            verified: false,
            push: candidate.flags & tcp::flags::PSH != 0,
            reduced: candidate.flags & tcp::flags::CWR != 0,
        });
        self.groups.len() - 1
    }

    /// Appends the packet to a group if it may, and says whether it did.
    fn join(&mut self, arena: &[u8], packet: &[u8], candidate: Candidate, index: usize) -> bool {
        let group = self.groups[index];
        let Some(kind) = candidate.kind else { return false };
        let size = candidate.layout.end - candidate.payload;
        let total = group.total as usize + size;
        let segments_max = match kind {
            Kind::Tcp => TCP_SEGMENTS_MAX,
            Kind::Udp => UDP_SEGMENTS_MAX,
        };
        let payload = usize::from(group.payload);
        if candidate.payload != payload
            || size > usize::from(group.size)
            || total > self.offloads.longest(kind, group.version)
            || group.segments == segments_max
        {
            return false;
        }
        let head = self.head(arena, &group);
        let transport = candidate.layout.transport;
        if !same_ip(head, packet, candidate.layout.version, group.segments) {
            return false;
        }
        if kind == Kind::Tcp
            && (candidate.sequence != group.sequence
                || candidate.flags & tcp::flags::CWR != 0
                || !same_tcp(&head[transport..payload], &packet[transport..payload]))
        {
            return false;
        }
        if !checksum_holds(packet, candidate.layout)
            || !(group.verified
                || checksum_holds(
                    head,
                    Layout { end: payload + usize::from(group.size), ..candidate.layout },
                ))
        {
            return false;
        }

        let piece = self.pieces.len() as u32;
        self.pieces.push(Piece {
            start: (candidate.start + payload) as u32,
            length: size as u32,
            next: NO_PIECE,
        });
        self.pieces[group.last_piece as usize].next = piece;
        let group = &mut self.groups[index];
        group.last_piece = piece;
        group.verified = true;
        group.total = total as u32;
        group.segments += 1;
        group.sequence = group.sequence.wrapping_add(size as u32);
        group.push |= candidate.flags & tcp::flags::PSH != 0;
        if size < usize::from(group.size) {
            self.close(index);
        }
        true
    }

    fn close(&mut self, index: usize) {
        let hash = self.groups[index].hash;
        for probe in 0..PROBES {
            let slot = slot_of(hash, probe);
            if self.slots[slot] == index as u32 + 1 {
                self.slots[slot] = 0;
            }
        }
    }

    /// Ends the batch: writes the headers of the superpackets into `arena`, the one that all packets were pushed
    /// from, and gives them to be written out. Dropping the result makes the merger ready for the next batch.
    pub fn finish<'m>(&'m mut self, arena: &mut [u8]) -> Batch<'m> {
        for group in &self.groups {
            if group.segments > 1 {
                let start = self.pieces[group.first_piece as usize].start as usize;
                write_headers(&mut arena[start..], group);
            }
        }
        Batch { merger: self }
    }
}

/// A finished batch.
#[derive(Debug)]
pub struct Batch<'m> {
    merger: &'m mut Merger,
}

impl Batch<'_> {
    /// The packets to write, in order.
    pub fn packets(&self) -> impl Iterator<Item = Merged<'_>> {
        self.merger.groups.iter().map(|group| Merged { group, pieces: &self.merger.pieces })
    }
}

impl Drop for Batch<'_> {
    fn drop(&mut self) {
        self.merger.groups.clear();
        self.merger.pieces.clear();
        self.merger.slots.fill(0);
    }
}

/// One packet to write, of one segment or more.
#[derive(Clone, Copy, Debug)]
pub struct Merged<'m> {
    group: &'m Group,
    pieces: &'m [Piece],
}

impl<'m> Merged<'m> {
    /// The virtio header to write before it.
    pub fn header(&self) -> vnet::Repr {
        let group = self.group;
        if group.segments == 1 {
            return vnet::Repr::default();
        }
        let (gso, csum_offset) = match (group.protocol, group.version) {
            (protocol::TCP, Version::V4) => (vnet::Gso::Tcp4, tcp::CHECKSUM_AT),
            (protocol::TCP, Version::V6) => (vnet::Gso::Tcp6, tcp::CHECKSUM_AT),
            _ => (vnet::Gso::UdpL4, udp::CHECKSUM_AT),
        };
        vnet::Repr {
            flags: vnet::NEEDS_CSUM,
            gso,
            ecn: group.reduced,
            hdr_len: group.payload,
            gso_size: group.size,
            csum_start: group.transport,
            csum_offset: csum_offset as u16,
        }
    }

    /// How many received packets are in it.
    pub fn segments(&self) -> usize {
        self.group.segments.into()
    }

    /// Bytes of it, the virtio header not counted.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.group.total as usize
    }

    /// Ranges of the arena that make it up: the first with all headers.
    pub fn pieces(&self) -> impl Iterator<Item = Range<usize>> + 'm {
        let pieces = self.pieces;
        let mut next = self.group.first_piece;
        std::iter::from_fn(move || {
            let piece = pieces.get(next as usize)?;
            next = piece.next;
            Some(piece.start as usize..(piece.start + piece.length) as usize)
        })
    }
}

fn alone(layout: Layout, start: usize) -> Candidate {
    Candidate { layout, start, kind: None, payload: layout.end, sequence: 0, flags: 0 }
}

/// Whether a packet that is no fragment tells its flow by ports.
fn has_ports(layout: Layout) -> bool {
    matches!(layout.protocol, protocol::TCP | protocol::UDP) && layout.end - layout.transport >= 4
}

fn slot_of(hash: u32, probe: usize) -> usize {
    (hash as usize + probe) % SLOTS
}

/// Mixes addresses and ports; collisions cost merging, never order.
fn flow_hash(packet: &[u8], layout: Layout) -> u32 {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
    let ports = u64::from(field::be32(packet, layout.transport)) << 8 | u64::from(layout.protocol);
    let (words, _) = ip::addresses(packet, layout.version).as_chunks::<8>();
    let hash = words.iter().fold(ports.wrapping_mul(ODD), |hash, word| {
        (hash.rotate_left(29) ^ u64::from_ne_bytes(*word)).wrapping_mul(ODD)
    });
    (hash >> 32) as u32
}

/// Whether all that IP headers say is the same but for length, checksum and an identification that counts.
fn same_ip(head: &[u8], packet: &[u8], version: Version, segments: u16) -> bool {
    match version {
        Version::V4 => {
            let dont_fragment = head[6] & 0x40 != 0;
            let ident = field::be16(head, 4).wrapping_add(segments);
            // With "don't fragment" the identification means nothing (RFC 6864 §4.1).
            head[..2] == packet[..2]
                && head[6..10] == packet[6..10]
                && head[12..20] == packet[12..20]
                && (dont_fragment || field::be16(packet, 4) == ident)
        }
        Version::V6 => head[..4] == packet[..4] && head[6..40] == packet[6..40],
    }
}

/// Whether two TCP headers are the same but for sequence number, checksum, PSH, and a CWR on the first.
fn same_tcp(head: &[u8], segment: &[u8]) -> bool {
    let flags = |header: &[u8]| header[tcp::FLAGS_AT] & !(tcp::flags::PSH | tcp::flags::CWR);
    head[8..13] == segment[8..13]
        && flags(head) == flags(segment)
        && head[14..16] == segment[14..16]
        && head[18..] == segment[18..]
}

fn checksum_holds(packet: &[u8], layout: Layout) -> bool {
    let length = layout.end - layout.transport;
    ip::pseudo_sum(packet, layout.version, layout.protocol, length)
        .bytes(&packet[layout.transport..layout.end])
        .is_valid()
        && (layout.version == Version::V6 || Sum::default().bytes(&packet[..layout.transport]).is_valid())
}

/// Makes the headers of the first segment those of the whole.
fn write_headers(packet: &mut [u8], group: &Group) {
    let total = group.total as usize;
    match group.version {
        Version::V4 => {
            // Longer than it can say: zero, and the kernel goes by what it was given.
            field::put16(packet, 2, u16::try_from(total).unwrap_or(0));
            field::put16(packet, 10, 0);
            let sum = Sum::default().bytes(&packet[..ipv4::HEADER_LEN]).checksum();
            field::put16(packet, 10, sum);
        }
        Version::V6 => field::put16(packet, 4, (total - ipv6::HEADER_LEN) as u16),
    }
    let transport = usize::from(group.transport);
    let length = total - transport;
    let pseudo = ip::pseudo_sum(packet, group.version, group.protocol, length).fold();
    let header = &mut packet[transport..];
    if group.protocol == protocol::TCP {
        if group.push {
            header[tcp::FLAGS_AT] |= tcp::flags::PSH;
        }
        field::put16(header, tcp::CHECKSUM_AT, pseudo);
    } else {
        field::put16(header, 4, length as u16);
        field::put16(header, udp::CHECKSUM_AT, pseudo);
    }
}
