//! Bodies of the fuzz targets of this room. `fuzz/` runs them on what a fuzzer makes up, `replay.rs` on the
//! committed corpus.

#![allow(dead_code, missing_docs, clippy::missing_panics_doc, clippy::unwrap_used)]

use packet::{
    Malformed, checksum, ecn, encap, esp, icmp,
    ip::{self, Version},
    ipv4, ipv6,
    merge::{Merger, Offloads},
    protocol,
    split::Split,
    tcp, udp, vnet,
};

/// Every view over any bytes: no panic, and what parses as plain emits as itself.
pub fn packet_parse(data: &[u8]) {
    if let Ok(layout) = ip::locate(data) {
        let packet = &data[..layout.end];
        let transport = &packet[layout.transport..];
        let pseudo = ip::pseudo_sum(packet, layout.version, layout.protocol, transport.len());
        if let Ok(segment) = tcp::Segment::new_checked(transport) {
            segment.options().for_each(drop);
            let mut out = transport.to_vec();
            tcp::Repr::parse(&segment).emit(&mut out, pseudo);
            assert_eq!(tcp::Segment::new_checked(&out).unwrap().payload(), segment.payload());
            assert!(tcp::Segment::new_checked(&out).unwrap().verify_checksum(pseudo));
        }
        if let Ok(datagram) = udp::Datagram::new_checked(transport) {
            let mut out = transport.to_vec();
            udp::Repr::parse(&datagram).emit(&mut out, pseudo);
            assert_eq!(udp::Datagram::new_checked(&out).unwrap().payload(), datagram.payload());
        }
        let mut out = [0; icmp::MESSAGE_LEN_MAX];
        if let Ok(Some(length)) = icmp::too_big(packet, [10, 42, 0, 1].into(), 1400, &mut out) {
            let read = icmp::TooBig::parse(&out[..length]).unwrap().unwrap();
            assert_eq!(read.mtu, 1400);
            assert!(packet.starts_with(read.original));
        }
        let _ = icmp::TooBig::parse(packet);
        let before = packet.to_vec();
        for outer in [ecn::Ecn::NotEct, ecn::Ecn::Ect0, ecn::Ecn::Ect1, ecn::Ecn::Ce] {
            let mut marked = before.clone();
            let egress = ecn::decapsulate_packet(&mut marked, outer).unwrap();
            let got = ecn::Ecn::of(ecn::tos(&marked).unwrap());
            assert_eq!(got, egress.ecn.unwrap_or(ecn::Ecn::NotEct));
        }
    }
    if let Ok(view) = ipv4::Packet::new_checked(data)
        && let Ok(repr) = ipv4::Repr::parse(&view)
    {
        let mut out = [0; 20];
        repr.emit(&mut out);
        // Zero has two forms in ones' complement, and one bit of the header is reserved.
        if data[10..12] != [0xff, 0xff] && data[6] & 0x80 == 0 {
            assert_eq!(out, data[..20]);
        }
    }
    if let Ok(view) = ipv6::Packet::new_checked(data) {
        let mut out = [0; 40];
        ipv6::Repr::parse(&view).emit(&mut out);
        assert_eq!(out, data[..40]);
    }
    if let Ok((inner, next)) = esp::take_trailer(data) {
        let mut buffer = data.to_vec();
        buffer.resize(data.len() + esp::TAIL_ROOM_MAX, 0);
        let end = esp::put_trailer(&mut buffer, inner.len(), next).unwrap();
        assert_eq!(esp::take_trailer(&buffer[..end]).unwrap(), (inner, next));
    }
    let _ = encap::classify(data);
    if let Some(header) = vnet::Repr::parse(data) {
        assert_eq!(header.emit(), data[..vnet::LEN]);
    }
}

/// A superpacket is cut and put together again; then any packets are pushed and what comes out, cut, is them.
///
/// The input is a virtio header, two bytes of length, a packet, and then more lengths and packets.
pub fn tcp_split_merge(data: &[u8]) {
    let Some((header, rest)) = data.split_at_checked(vnet::LEN) else { return };
    let mut packets = Vec::new();
    let mut rest = rest;
    while let Some((length, more)) = rest.split_first_chunk::<2>() {
        let length = usize::from(u16::from_be_bytes(*length)).min(more.len());
        let (packet, more) = more.split_at(length);
        packets.push(packet.to_vec());
        rest = more;
    }
    if let Some(superpacket) = packets.first().cloned() {
        let segments = split(&vnet::Repr::parse(header).unwrap(), &superpacket, 300);
        assert_merge_is_undone(&segments);
        packets.extend(segments);
    }
    assert_merge_is_undone(&packets);
}

/// The segments of a superpacket, at most so many.
pub fn split(header: &vnet::Repr, packet: &[u8], at_most: usize) -> Vec<Vec<u8>> {
    let Ok(mut split) = Split::new(header, packet) else { return Vec::new() };
    let mut segments = Vec::new();
    let mut out = vec![0; 70_000];
    while let Some(length) = split.next_len().filter(|_| segments.len() < at_most) {
        assert_eq!(split.emit(&mut out[..length - 1]), None);
        assert_eq!(split.emit(&mut out), Some(length));
        segments.push(out[..length].to_vec());
    }
    segments
}

/// What came out of one merged packet: the packets that the receiving kernel sees after it is cut again.
pub struct Out {
    pub merged: usize,
    pub packets: Vec<Vec<u8>>,
}

/// Pushes packets as one batch or several, and cuts what comes out.
pub fn merge_and_cut(packets: &[Vec<u8>]) -> (Vec<Vec<u8>>, Vec<Out>) {
    let mut arena = Vec::new();
    let mut merger = Merger::new(packets.len().max(1), Offloads::ALL);
    let mut ranges = Vec::new();
    for packet in packets {
        ranges.push(arena.len()..arena.len() + packet.len());
        arena.extend(packet);
    }
    let mut pushed = Vec::new();
    for (range, packet) in ranges.into_iter().zip(packets) {
        match merger.push(&arena, range) {
            Ok(()) => pushed.push(packet[..ip::locate(packet).unwrap().end].to_vec()),
            Err(error) => assert_eq!(ip::locate(packet).unwrap_err(), error),
        }
    }
    let batch = merger.finish(&mut arena);
    let mut out = Vec::new();
    for merged in batch.packets() {
        let bytes: Vec<u8> = merged.pieces().flat_map(|piece| arena[piece].to_vec()).collect();
        assert_eq!(bytes.len(), merged.len());
        if bytes.len() > usize::from(u16::MAX) {
            assert_eq!(bytes[2..4], [0, 0], "longer than its header can say");
        } else {
            assert_eq!(ip::locate(&bytes).map(|layout| layout.end), Ok::<_, Malformed>(bytes.len()));
        }
        let packets = split(&merged.header(), &bytes, usize::MAX);
        assert_eq!(packets.len(), merged.segments());
        out.push(Out { merged: merged.segments(), packets });
    }
    drop(batch);
    assert!(merger.is_empty());
    (pushed, out)
}

/// The kernel that gets what the merger made sees exactly the packets that were pushed, in order within each flow.
pub fn assert_merge_is_undone(packets: &[Vec<u8>]) {
    let (mut pushed, out) = merge_and_cut(packets);
    let mut seen = Vec::new();
    for group in out {
        for packet in group.packets {
            if group.merged > 1 {
                assert!(checksums_hold(&packet), "a segment of a merged packet has a wrong checksum");
            }
            seen.push(packet);
        }
    }
    for packet in pushed.iter_mut().chain(&mut seen) {
        normalize(packet);
    }
    // A stable sort by flow keeps the order within each.
    pushed.sort_by_key(|packet| flow(packet));
    seen.sort_by_key(|packet| flow(packet));
    assert_eq!(pushed.len(), seen.len());
    for (pushed, seen) in pushed.iter().zip(&seen) {
        assert_eq!(pushed, seen);
    }
}

fn flow(packet: &[u8]) -> Vec<u8> {
    let layout = ip::locate(packet).unwrap();
    let mut key = ip::addresses(packet, layout.version).to_vec();
    key.push(layout.protocol);
    let has_ports = matches!(layout.protocol, protocol::TCP | protocol::UDP) && !layout.fragment;
    if let Some(ports) = packet.get(layout.transport..layout.transport + 4).filter(|_| has_ports) {
        key.extend(ports);
    }
    key
}

/// Takes out what may differ: an identification that means nothing, PSH, which the last segment gets for all, and the two
/// forms of a zero checksum.
fn normalize(packet: &mut [u8]) {
    let layout = ip::locate(packet).unwrap();
    if layout.protocol == protocol::TCP
        && !layout.fragment
        && let transport = &mut packet[layout.transport..layout.end]
        && tcp::Segment::new_checked(&*transport).is_ok()
    {
        let word = |bytes: &[u8], at: usize| u16::from_be_bytes([bytes[at], bytes[at + 1]]);
        let before = word(transport, tcp::FLAGS_AT - 1);
        transport[tcp::FLAGS_AT] &= !tcp::flags::PSH;
        let sum =
            checksum::adjust(word(transport, tcp::CHECKSUM_AT), before, word(transport, tcp::FLAGS_AT - 1));
        transport[tcp::CHECKSUM_AT..tcp::CHECKSUM_AT + 2].copy_from_slice(&sum.to_be_bytes());
    }
    if layout.version == Version::V4 {
        if packet[6] & 0x40 != 0 {
            packet[4..6].fill(0);
        }
        packet[10..12].fill(0);
    }
    let checksum_at = match layout.protocol {
        protocol::TCP => tcp::CHECKSUM_AT,
        protocol::UDP => udp::CHECKSUM_AT,
        _ => return,
    };
    let at = layout.transport + checksum_at;
    if layout.plain
        && let Some([0xff, 0xff]) = packet.get(at..at + 2)
    {
        packet[at..at + 2].fill(0);
    }
}

pub fn checksums_hold(packet: &[u8]) -> bool {
    let layout = ip::locate(packet).unwrap();
    let transport = &packet[layout.transport..layout.end];
    let pseudo = ip::pseudo_sum(packet, layout.version, layout.protocol, transport.len());
    let ip = layout.version == Version::V6 || ipv4::Packet::new_checked(packet).unwrap().verify_checksum();
    ip && match layout.protocol {
        protocol::TCP => tcp::Segment::new_checked(transport).unwrap().verify_checksum(pseudo),
        protocol::UDP => udp::Datagram::new_checked(transport).unwrap().verify_checksum(pseudo),
        _ => true,
    }
}
