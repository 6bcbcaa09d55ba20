//! Cutting superpackets and putting segments together, against each other and against golden bytes.

#![allow(clippy::unwrap_used)]

mod fuzz_targets;

use fuzz_targets::{assert_merge_is_undone, checksums_hold, merge_and_cut, split};
use packet::{
    ip, ipv4, ipv6,
    merge::{Merger, Offloads},
    protocol,
    split::{Split, SplitError},
    tcp::{self, flags},
    udp, vnet,
};
use proptest::prelude::*;

/// What is needed to make a superpacket.
#[derive(Clone, Debug)]
struct Flow {
    v6: bool,
    udp: bool,
    port: u16,
    dont_fragment: bool,
    ident: u16,
    sequence: u32,
    flags: u8,
    options: usize,
    size: u16,
    payload: Vec<u8>,
}

impl Flow {
    fn tcp(size: u16, payload: &[u8]) -> Self {
        Self {
            v6: false,
            udp: false,
            port: 4000,
            dont_fragment: true,
            ident: 100,
            sequence: 1000,
            flags: flags::ACK,
            options: 12,
            size,
            payload: payload.to_vec(),
        }
    }

    /// The superpacket as the kernel hands it out, and the header before it.
    fn superpacket(&self) -> (vnet::Repr, Vec<u8>) {
        let ip = if self.v6 { 40 } else { 20 };
        let l4 = if self.udp { 8 } else { 20 + self.options };
        let protocol = if self.udp { protocol::UDP } else { protocol::TCP };
        let mut bytes = vec![0; ip + l4];
        bytes.extend(&self.payload);
        let length = bytes.len() - ip;
        if self.v6 {
            ipv6::Repr {
                traffic_class: 2,
                flow_label: 0x12345,
                source: "fd00::5".parse().unwrap(),
                destination: "fd00::6".parse().unwrap(),
                next_header: protocol,
                payload_len: length as u16,
                ..ipv6::Repr::default()
            }
            .emit(&mut bytes);
        } else {
            ipv4::Repr {
                tos: 2,
                ident: self.ident,
                dont_fragment: self.dont_fragment,
                protocol,
                source: [10, 42, 0, 5].into(),
                destination: [10, 42, 0, 70].into(),
                payload_len: length as u16,
                ..ipv4::Repr::default()
            }
            .emit(&mut bytes);
        }
        let version = if self.v6 { ip::Version::V6 } else { ip::Version::V4 };
        let pseudo = ip::pseudo_sum(&bytes, version, protocol, length);
        let options = [1u8, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2].repeat(3);
        let transport = &mut bytes[ip..];
        let place = if self.udp {
            udp::Repr { source_port: self.port, destination_port: 53, payload_len: (length - 8) as u16 }
                .emit(transport, pseudo);
            udp::CHECKSUM_AT
        } else {
            tcp::Repr {
                source_port: self.port,
                destination_port: 80,
                sequence: self.sequence,
                acknowledgement: 77,
                flags: self.flags,
                window: 512,
                options: &options[..self.options],
            }
            .emit(transport, pseudo);
            tcp::CHECKSUM_AT
        };
        transport[place..place + 2].copy_from_slice(&pseudo.fold().to_be_bytes());
        let gso = match (self.udp, self.v6) {
            (true, _) => vnet::Gso::UdpL4,
            (false, true) => vnet::Gso::Tcp6,
            (false, false) => vnet::Gso::Tcp4,
        };
        let header = vnet::Repr {
            flags: vnet::NEEDS_CSUM,
            gso,
            ecn: self.flags & flags::CWR != 0,
            hdr_len: (ip + l4) as u16,
            gso_size: self.size,
            csum_start: ip as u16,
            csum_offset: place as u16,
        };
        (header, bytes)
    }

    fn segments(&self) -> Vec<Vec<u8>> {
        let (header, bytes) = self.superpacket();
        split(&header, &bytes, usize::MAX)
    }

    fn headers(&self) -> usize {
        self.superpacket().1.len() - self.payload.len()
    }
}

fn view(segment: &[u8]) -> tcp::Segment<&[u8]> {
    tcp::Segment::new_checked(&segment[20..]).unwrap()
}

fn merged_counts(packets: &[Vec<u8>]) -> Vec<usize> {
    merge_and_cut(packets).1.iter().map(|out| out.merged).collect()
}

/// A merger that has taken these packets, and the arena that they lie in.
fn pushed(packets: &[Vec<u8>], offloads: Offloads) -> (Merger, Vec<u8>) {
    let (mut merger, arena) = (Merger::new(packets.len(), offloads), packets.concat());
    let mut start = 0;
    for packet in packets {
        merger.push(&arena, start..start + packet.len()).unwrap();
        start += packet.len();
    }
    (merger, arena)
}

/// Makes the TCP checksum of an IPv4 packet right after a change.
fn reseal(packet: &mut [u8]) {
    packet[10..12].fill(0);
    let sum = packet::checksum::checksum(&packet[..20]);
    packet[10..12].copy_from_slice(&sum.to_be_bytes());
    packet[36..38].fill(0);
    let pseudo = ip::pseudo_sum(packet, ip::Version::V4, protocol::TCP, packet.len() - 20);
    let sum = pseudo.bytes(&packet[20..]).checksum();
    packet[36..38].copy_from_slice(&sum.to_be_bytes());
}

#[test]
fn a_small_superpacket_is_cut_into_these_bytes() {
    let flow = Flow { options: 0, flags: flags::ACK | flags::PSH, ..Flow::tcp(4, b"abcdef") };
    let segments = flow.segments();
    #[rustfmt::skip]
    let golden = [
        vec![
            0x45, 0x02, 0x00, 0x2c, 0x00, 0x64, 0x40, 0x00, 0x40, 0x06, 0x25, 0xc8, 10, 42, 0, 5, 10, 42, 0, 70,
            0x0f, 0xa0, 0x00, 0x50, 0, 0, 0x03, 0xe8, 0, 0, 0, 77, 0x50, 0x10, 0x02, 0x00, 0xc0, 0x46, 0, 0,
            b'a', b'b', b'c', b'd',
        ],
        vec![
            0x45, 0x02, 0x00, 0x2a, 0x00, 0x65, 0x40, 0x00, 0x40, 0x06, 0x25, 0xc9, 10, 42, 0, 5, 10, 42, 0, 70,
            0x0f, 0xa0, 0x00, 0x50, 0, 0, 0x03, 0xec, 0, 0, 0, 77, 0x50, 0x18, 0x02, 0x00, 0x1f, 0x9d, 0, 0,
            b'e', b'f',
        ],
    ];
    assert_eq!(segments, golden);
}

#[test]
fn fin_and_psh_stay_for_the_last_segment_and_cwr_for_the_first() {
    let all = flags::ACK | flags::PSH | flags::FIN | flags::CWR | flags::ECE;
    let segments = Flow { flags: all, ..Flow::tcp(10, &[7; 25]) }.segments();
    let seen: Vec<u8> = segments.iter().map(|segment| view(segment).flags()).collect();
    let (ack, echo) = (flags::ACK, flags::ECE);
    assert_eq!(seen, [ack | echo | flags::CWR, ack | echo, ack | echo | flags::PSH | flags::FIN]);
    assert!(segments.iter().all(|segment| checksums_hold(segment)));
}

#[test]
fn numbers_run_over_their_ends_rightly() {
    let segments = Flow { sequence: u32::MAX - 4, ident: u16::MAX, ..Flow::tcp(10, &[7; 25]) }.segments();
    let seen: Vec<_> =
        segments.iter().map(|s| (view(s).sequence(), u16::from_be_bytes([s[4], s[5]]))).collect();
    assert_eq!(seen, [(u32::MAX - 4, u16::MAX), (5, 0), (15, 1)]);
}

#[test]
fn a_packet_that_is_no_superpacket_only_gets_its_checksum() {
    for udp in [false, true] {
        let flow = Flow { udp, ..Flow::tcp(100, &[9; 51]) };
        let (header, bytes) = flow.superpacket();
        let plain = vnet::Repr { gso: vnet::Gso::None, gso_size: 0, ..header };
        let segments = split(&plain, &bytes, 9);
        assert_eq!(segments.len(), 1);
        assert!(checksums_hold(&segments[0]));
        assert_eq!(segments, flow.segments(), "one segment of a superpacket is the same");
        assert_eq!(split(&vnet::Repr::default(), &segments[0], 9), segments, "nothing asked, nothing done");
    }
}

#[test]
fn a_forwarded_superpacket_whose_header_length_is_too_long_is_cut_all_the_same() {
    let flow = Flow::tcp(10, &[7; 25]);
    let (header, bytes) = flow.superpacket();
    let odd = vnet::Repr { hdr_len: 62, ..header };
    assert_eq!(split(&odd, &bytes, 9), flow.segments());
}

#[test]
fn nonsense_from_the_device_is_refused_with_its_reason() {
    let (header, bytes) = Flow::tcp(10, &[7; 25]).superpacket();
    let error = |header: vnet::Repr, bytes: &[u8]| Split::new(&header, bytes).unwrap_err();
    assert_eq!(error(vnet::Repr { gso_size: 0, ..header }, &bytes), SplitError::NoSize);
    assert_eq!(error(vnet::Repr { gso: vnet::Gso::Tcp6, ..header }, &bytes), SplitError::Version);
    assert_eq!(error(vnet::Repr { gso: vnet::Gso::Ufo, ..header }, &bytes), SplitError::Kind(vnet::Gso::Ufo));
    assert_eq!(error(vnet::Repr { csum_start: 60, ..header }, &bytes), SplitError::Bounds);
    assert_eq!(error(vnet::Repr { csum_start: 8, ..header }, &bytes), SplitError::Bounds);
    assert_eq!(error(header, &bytes[..30]), SplitError::Bounds);
    assert_eq!(error(header, &[]), SplitError::Version);
    let whole = vnet::Repr { gso: vnet::Gso::None, csum_offset: 70, ..header };
    assert_eq!(error(whole, &bytes), SplitError::Bounds);
}

#[test]
fn forty_seven_segments_come_back_as_one_packet() {
    let flow = Flow { flags: flags::ACK | flags::PSH, ..Flow::tcp(1386, &vec![3; 47 * 1386 - 300]) };
    let segments = flow.segments();
    assert_eq!(segments.len(), 47);
    assert_eq!(merged_counts(&segments), [47]);
    assert_merge_is_undone(&segments);
}

#[test]
fn a_merged_packet_has_the_header_that_the_kernel_gave_for_it() {
    for (udp, v6) in [(false, false), (false, true), (true, false), (true, true)] {
        let flow = Flow { udp, v6, flags: flags::ACK | flags::CWR, ..Flow::tcp(100, &[9; 950]) };
        let (mut header, bytes) = flow.superpacket();
        header.ecn &= !udp;
        let (mut merger, mut arena) = pushed(&flow.segments(), Offloads::ALL);
        let batch = merger.finish(&mut arena);
        let merged: Vec<_> = batch.packets().collect();
        assert_eq!(merged.len(), 1);
        assert_eq!(merged[0].header(), header);
        let gathered: Vec<u8> = merged[0].pieces().flat_map(|piece| arena[piece].to_vec()).collect();
        assert_eq!(gathered, bytes, "byte for byte, the checksum field included");
    }
}

#[test]
fn a_short_segment_closes_and_what_follows_begins_anew() {
    let mut first = Flow::tcp(10, &[1; 25]).segments();
    let mut second = Flow { sequence: 1025, ident: 103, ..Flow::tcp(10, &[2; 20]) }.segments();
    first.append(&mut second);
    assert_eq!(merged_counts(&first), [3, 2]);
}

#[test]
fn pushes_that_follow_each_other_become_one_at_the_end() {
    let pushed = Flow { flags: flags::ACK | flags::PSH, ..Flow::tcp(10, &[1; 20]) };
    let mut packets = pushed.segments();
    packets.extend(Flow { sequence: 1020, ident: 102, ..Flow::tcp(10, &[2; 20]) }.segments());
    let (_, out) = merge_and_cut(&packets);
    assert_eq!(out.len(), 1);
    let seen: Vec<bool> =
        out[0].packets.iter().map(|segment| view(segment).flags() & flags::PSH != 0).collect();
    assert_eq!(seen, [false, false, false, true]);
    assert_merge_is_undone(&packets);

    let last = [packets[2].clone(), packets[3].clone()];
    let none =
        merge_and_cut(&last).1[0].packets.iter().all(|segment| view(segment).flags() & flags::PSH == 0);
    assert!(none, "where nobody pushed, nobody does");
}

#[test]
fn whatever_differs_in_a_header_keeps_segments_apart() {
    let segments = Flow { dont_fragment: false, ..Flow::tcp(10, &[1; 20]) }.segments();
    assert_eq!(merged_counts(&segments), [2]);
    let changes: [(&str, usize, u8); 12] = [
        ("TOS", 1, 0xff),
        ("identification", 5, 0xff),
        ("don't fragment", 6, 0x40),
        ("TTL", 8, 1),
        ("source", 15, 1),
        ("port", 21, 1),
        ("sequence", 27, 1),
        ("acknowledgement", 31, 1),
        ("window", 35, 1),
        ("urgent pointer", 39, 1),
        ("option", 51, 1),
        ("flag", 33, flags::URG),
    ];
    for (name, at, bits) in changes {
        let mut changed = segments.clone();
        changed[1][at] ^= bits;
        reseal(&mut changed[1]);
        assert_eq!(merged_counts(&changed), [1, 1], "{name}");
        assert_merge_is_undone(&changed);
    }
}

#[test]
fn a_segment_with_a_wrong_checksum_goes_alone_first_or_later() {
    for broken in 0..4 {
        let mut segments = Flow::tcp(10, &[1; 40]).segments();
        let last = segments[broken].len() - 1;
        segments[broken][last] ^= 1;
        let (_, out) = merge_and_cut(&segments);
        let alone = out.iter().find(|group| group.packets.contains(&segments[broken])).unwrap();
        assert_eq!(alone.merged, 1);
        assert_merge_is_undone(&segments);
    }
}

#[test]
fn pure_acks_and_handshakes_go_alone_and_nothing_overtakes_them() {
    for odd in [flags::ACK, flags::SYN | flags::ACK, flags::FIN | flags::ACK, flags::RST] {
        let mut packets = Flow::tcp(10, &[1; 20]).segments();
        packets.extend(Flow { sequence: 1020, flags: odd, ..Flow::tcp(10, &[]) }.segments());
        packets.extend(Flow { sequence: 1020, ident: 102, ..Flow::tcp(10, &[1; 20]) }.segments());
        assert_eq!(merged_counts(&packets), [2, 1, 2]);
    }
}

#[test]
fn a_datagram_whose_length_lies_goes_alone_and_is_not_overtaken() {
    let mut packets = Flow { udp: true, ..Flow::tcp(10, &[1; 30]) }.segments();
    packets[1][25] ^= 0x80;
    assert_eq!(merged_counts(&packets), [1, 1, 1]);
    assert_merge_is_undone(&packets);
}

#[test]
fn what_the_device_refused_is_not_merged() {
    for (offloads, tcp, udp) in
        [(Offloads { tcp: false, ..Offloads::ALL }, 2, 1), (Offloads { udp: false, ..Offloads::ALL }, 1, 2)]
    {
        for (is_udp, expected) in [(false, tcp), (true, udp)] {
            let mut merger = Merger::new(8, Offloads::ALL);
            merger.set_offloads(offloads);
            let segments = Flow { udp: is_udp, ..Flow::tcp(10, &[1; 20]) }.segments();
            let mut arena = segments.concat();
            let cut = segments[0].len();
            merger.push(&arena, 0..cut).unwrap();
            merger.push(&arena, cut..arena.len()).unwrap();
            assert_eq!(merger.finish(&mut arena).packets().count(), expected);
        }
    }
}

#[test]
fn a_full_batch_refuses_and_works_again_after_it_was_taken() {
    let mut merger = Merger::new(2, Offloads::ALL);
    let mut arena = Flow::tcp(100, &[1; 20]).segments().concat();
    let all = 0..arena.len();
    for _ in 0..3 {
        while !merger.is_full() {
            merger.push(&arena, all.clone()).unwrap();
        }
        assert!(merger.push(&arena, all.clone()).is_err());
        assert!(merger.finish(&mut arena).packets().count() >= 2);
    }
    assert!(merger.push(&arena, 0..arena.len() + 1).is_err(), "beyond the arena");
}

#[test]
fn superpackets_grow_beyond_their_length_field_only_where_the_kernel_takes_that() {
    let part = |number: u32, v6: bool| {
        let sequence = 1000 + number * 40_000;
        Flow { v6, sequence, ..Flow::tcp(1000, &vec![5; 40_000]) }.segments()
    };
    let stream: Vec<_> = (0..7).flat_map(|number| part(number, false)).collect();
    assert_eq!(merged_counts(&stream), [255, 25], "280,000 bytes, in superpackets of 256,000 at most");
    assert_merge_is_undone(&stream);
    let stream: Vec<_> = (0..3).flat_map(|number| part(number, true)).collect();
    assert_eq!(merged_counts(&stream), [65, 55], "of IPv6 the kernel wants an option for it");

    let segments: Vec<_> = (0..3).flat_map(|number| part(number, false)).collect();
    let (mut merger, mut arena) = pushed(&segments, Offloads { long: false, ..Offloads::ALL });
    let counts: Vec<_> = merger.finish(&mut arena).packets().map(|merged| merged.segments()).collect();
    assert_eq!(counts, [65, 55]);
}

#[test]
fn a_superpacket_beyond_its_length_field_has_the_header_that_the_kernel_makes_for_one() {
    let parts = [(1000, 40_000), (41_000, 40_000), (81_000, 500)];
    let segments = parts
        .iter()
        .flat_map(|(sequence, length)| {
            Flow { sequence: *sequence, ..Flow::tcp(1000, &vec![5; *length]) }.segments()
        })
        .collect::<Vec<_>>();
    let (mut merger, mut arena) = pushed(&segments, Offloads::ALL);
    let batch = merger.finish(&mut arena);
    let merged: Vec<_> = batch.packets().collect();
    assert_eq!(merged.len(), 1);
    let bytes: Vec<u8> = merged[0].pieces().flat_map(|piece| arena[piece].to_vec()).collect();
    assert_eq!(bytes.len(), 52 + 80_500);
    assert_eq!(bytes[2..4], [0, 0], "the length: zero");
    assert_eq!(packet::checksum::checksum(&bytes[..20]), 0, "the IP header's checksum holds");
    // `__tcp_v4_send_check`: the pseudo-header has the whole length, in 32 bits.
    let pseudo = ip::pseudo_sum(&bytes, ip::Version::V4, protocol::TCP, bytes.len() - 20).fold();
    assert_eq!(bytes[36..38], pseudo.to_be_bytes());
    let header = merged[0].header();
    assert_eq!((header.gso, header.gso_size, header.hdr_len), (vnet::Gso::Tcp4, 1000, 52));
}

fn flow() -> impl Strategy<Value = Flow> {
    (
        (any::<bool>(), any::<bool>(), 0u16..4, any::<bool>(), any::<u16>(), any::<u32>()),
        (
            prop_oneof![Just(0u8), Just(flags::PSH), Just(flags::FIN), Just(flags::CWR), Just(flags::ECE)],
            0usize..4,
        ),
        (1u16..1500, 1usize..40),
        any::<u8>(),
    )
        .prop_flat_map(|(base, (extra, options), (size, segments), fill)| {
            let most = (usize::from(size) * segments).min(60_000);
            (Just(base), Just((extra, options, size, fill)), 0..=most)
        })
        .prop_map(
            |((v6, udp, port, dont_fragment, ident, sequence), (extra, options, size, fill), length)| Flow {
                v6,
                udp,
                port: 4000 + port,
                dont_fragment,
                ident,
                sequence,
                flags: flags::ACK | extra,
                options: options * 12,
                size,
                payload: (0..length).map(|i| (i as u8).wrapping_mul(31) ^ fill).collect(),
            },
        )
}

/// Interleaves, keeping the order within each list.
fn interleave(lists: Vec<Vec<Vec<u8>>>, mut seed: u64) -> Vec<Vec<u8>> {
    let mut lists: Vec<_> = lists.into_iter().map(std::collections::VecDeque::from).collect();
    let mut out = Vec::new();
    while lists.iter().any(|list| !list.is_empty()) {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        let index = (seed >> 33) as usize % lists.len();
        out.extend(lists[index].pop_front());
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn segments_carry_the_payload_whole_with_right_checksums(flow in flow()) {
        let headers = flow.headers();
        let segments = flow.segments();
        let payload: Vec<u8> = segments.iter().flat_map(|segment| segment[headers..].to_vec()).collect();
        prop_assert_eq!(&payload, &flow.payload);
        for segment in &segments {
            prop_assert!(checksums_hold(segment));
            prop_assert!(segment.len() <= headers + usize::from(flow.size));
        }
    }

    #[test]
    fn split_then_merge_then_split_is_the_identity_for_interleaved_flows(
        flows in proptest::collection::vec(flow(), 1..5), seed in any::<u64>(),
    ) {
        let packets = interleave(flows.iter().map(Flow::segments).collect(), seed);
        assert_merge_is_undone(&packets);
    }

    #[test]
    fn whole_superpackets_come_back_whole(flow in flow()) {
        let few = flow.payload.len().div_ceil(flow.size.into()) <= 64;
        let fits = flow.superpacket().1.len() <= 65_535;
        let mergeable = !flow.payload.is_empty() && flow.flags & flags::FIN == 0;
        prop_assume!(few && fits && mergeable);
        prop_assert_eq!(merged_counts(&flow.segments()).len(), 1);
    }

    #[test]
    fn lost_doubled_swapped_and_broken_packets_come_out_as_they_went_in(
        flows in proptest::collection::vec(flow(), 1..4),
        seed in any::<u64>(),
        faults in proptest::collection::vec((0u8..4, any::<prop::sample::Index>(), any::<prop::sample::Index>()), 0..12),
    ) {
        let mut packets = interleave(flows.iter().map(Flow::segments).collect(), seed);
        for (fault, one, other) in faults {
            if packets.is_empty() { break }
            let (one, other) = (one.index(packets.len()), other.index(packets.len()));
            match fault {
                0 => drop(packets.remove(one)),
                1 => packets.insert(other, packets[one].clone()),
                2 => packets.swap(one, other),
                _ => {
                    let bit = seed as usize % (packets[one].len() * 8);
                    packets[one][bit / 8] ^= 1 << (bit % 8);
                }
            }
        }
        assert_merge_is_undone(&packets);
    }
}
