//! Nanoseconds per packet to seal, to open, and to cut and seal superpackets, on one core.
//!
//! `cargo run --release -p esp --example seal`

#![allow(clippy::unwrap_used, clippy::cast_precision_loss, clippy::disallowed_methods)]

use std::time::Instant;

use esp::{Inbound, InnerPolicy, KeyMaterial, Limits, Outbound, Sequence, Spi, Suite};
use packet::{
    esp::{HEAD_ROOM, sealed_len},
    ipv4,
    merge::{Merger, Offloads},
    protocol,
    split::Split,
    vnet,
};

const PACKETS: usize = 44;
const ROUNDS: usize = 4000;

fn main() {
    println!("{:<16} {:>6} {:>14} {:>14}", "suite", "bytes", "seal ns (GB/s)", "open ns (GB/s)");
    for suite in [Suite::Aes128Gcm16, Suite::Aes256Gcm16] {
        for length in [64, 1400, 8900] {
            let (seal, open) = seal_and_open(suite, length);
            let rate = |ns: f64| length as f64 / ns;
            println!(
                "{:<16} {length:>6} {seal:>8.0} ({:.1}) {open:>8.0} ({:.1})",
                suite.to_string(),
                rate(seal),
                rate(open)
            );
        }
    }
    let (split, split_seal, merge) = superpackets();
    println!(
        "superpacket of 47 x 1386, per segment: split {split:.0} ns, split and seal {split_seal:.0} ns, merge {merge:.0} ns"
    );
}

fn sas(suite: Suite) -> (Outbound, Inbound) {
    let material = KeyMaterial::new(suite, &vec![7; suite.key_material_len()]).unwrap();
    let spi = Spi::new(0x1000).unwrap();
    let out = Outbound::new(spi, &material, Sequence::Extended, Limits::of(Sequence::Extended)).unwrap();
    (out, Inbound::new(spi, &material, Sequence::Extended).unwrap())
}

fn inner(length: usize) -> Vec<u8> {
    let mut bytes = vec![1; length];
    ipv4::Repr {
        protocol: protocol::UDP,
        source: [10, 42, 0, 5].into(),
        destination: [10, 42, 0, 70].into(),
        payload_len: (length - 20) as u16,
        ..ipv4::Repr::default()
    }
    .emit(&mut bytes);
    bytes
}

fn seal_and_open(suite: Suite, length: usize) -> (f64, f64) {
    let (out, inbound) = sas(suite);
    let policy = InnerPolicy::new(["10.42.0.0/24".parse().unwrap()], ["10.42.0.0/24".parse().unwrap()]);
    let inner = inner(length);
    let stride = sealed_len(length);
    let mut buffer = vec![0; stride * PACKETS];
    let (mut seal, mut open) = (f64::MAX, f64::MAX);
    for _ in 0..ROUNDS {
        for packet in buffer.chunks_mut(stride) {
            packet[HEAD_ROOM..HEAD_ROOM + length].copy_from_slice(&inner);
        }
        let start = Instant::now();
        let mut burst = out.begin(PACKETS as u32).unwrap();
        for packet in buffer.chunks_mut(stride) {
            burst.seal(packet, length).unwrap();
        }
        drop(burst);
        seal = seal.min(start.elapsed().as_nanos() as f64);
        let start = Instant::now();
        let mut receiver = inbound.begin();
        for packet in buffer.chunks_mut(stride) {
            receiver.open(packet, &policy).unwrap();
        }
        drop(receiver);
        open = open.min(start.elapsed().as_nanos() as f64);
    }
    (seal / PACKETS as f64, open / PACKETS as f64)
}

fn superpackets() -> (f64, f64, f64) {
    let (out, _) = sas(Suite::Aes256Gcm16);
    let mut packet = inner(52 + 47 * 1386);
    packet[9] = protocol::TCP;
    packet[32] = 0x80;
    packet[33] = packet::tcp::flags::ACK;
    let header = vnet::Repr {
        flags: vnet::NEEDS_CSUM,
        gso: vnet::Gso::Tcp4,
        gso_size: 1386,
        csum_start: 20,
        csum_offset: 16,
        ..vnet::Repr::default()
    };
    let mut buffer = vec![0; 80_000];
    let mut merger = Merger::new(64, Offloads::ALL);
    let (mut split_only, mut split_seal, mut merge) = (f64::MAX, f64::MAX, f64::MAX);
    for _ in 0..ROUNDS {
        let start = Instant::now();
        let mut split = Split::new(&header, &packet).unwrap();
        let mut at = 0;
        while let Some(length) = split.emit(&mut buffer[at..]) {
            at += length;
        }
        split_only = split_only.min(start.elapsed().as_nanos() as f64);

        let start = Instant::now();
        for index in 0..47 {
            let range = index * 1438..(index + 1) * 1438;
            merger.push(&buffer, range).unwrap();
        }
        let merged = merger.finish(&mut buffer).packets().count();
        merge = merge.min(start.elapsed().as_nanos() as f64);
        assert_eq!(merged, 1);

        let start = Instant::now();
        let mut split = Split::new(&header, &packet).unwrap();
        let mut burst = out.begin(split.segments_left() as u32).unwrap();
        let mut at = 0;
        while let Some(length) = split.emit(&mut buffer[at + HEAD_ROOM..]) {
            at += burst.seal(&mut buffer[at..], length).unwrap();
        }
        split_seal = split_seal.min(start.elapsed().as_nanos() as f64);
    }
    (split_only / 47.0, split_seal / 47.0, merge / 47.0)
}
