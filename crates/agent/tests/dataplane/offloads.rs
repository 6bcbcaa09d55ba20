//! What kernels and devices may refuse: whatever it is, the same bytes arrive, in order, once.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use agent::dataplane::Tuning;
use linux::udp;

use crate::relay::Relay;
use crate::rig::{Host, Pair, tuned};
use crate::sandbox;
use crate::traffic::is_whole;

/// Datagrams that travel together.
const TOGETHER: u32 = 40;

/// All that can be refused of three, and what has no partner.
const REFUSED: [&str; 13] = [
    "",
    "no-tso",
    "no-gso",
    "no-gro",
    "no-tso,no-gso",
    "no-tso,no-gro",
    "no-gso,no-gro",
    "no-tso,no-gso,no-gro",
    "no-uso",
    "no-merge",
    "no-long",
    "no-sparse",
    "workers=3,no-uso",
];

/// How many slower ways that means: without segmentation for TCP a device has none for UDP.
fn slower(refused: &str) -> usize {
    let each = |word| match word {
        "no-tso" => 2,
        "no-uso" | "no-gso" | "no-gro" | "no-sparse" => 1,
        _ => 0,
    };
    refused.split(',').map(each).sum()
}

/// Bytes of one stream. `DROVEWAY_SOAK_BYTES` says how many of one with nothing refused, and the others get a tenth.
fn bytes(refused: &str) -> usize {
    std::env::var("DROVEWAY_SOAK_BYTES").map_or(4_000_000, |text| {
        let all: usize = text.parse().unwrap();
        if refused.is_empty() { all } else { all / 10 }
    })
}

fn each(dir: &Path, check: impl Fn(&Pair, &str)) {
    for (refused, number) in REFUSED.iter().zip(0..) {
        let dir = dir.join(format!("{number}"));
        std::fs::create_dir(&dir).unwrap();
        let pair = tuned(&dir, &refused.parse().unwrap());
        check(&pair, refused);
    }
}

#[test]
fn whatever_is_refused_everything_arrives_whole_and_in_order() {
    sandbox::run("offloads::whatever_is_refused_everything_arrives_whole_and_in_order", |dir| {
        each(dir, |pair, refused| {
            let Pair { a, b } = pair;
            let seen: Vec<_> = a.path.refused();
            // Only root of the machine may load the program that steers, and old kernels know no long superpackets.
            let by_kernel = |line: &&&str| line.starts_with("steering") || line.contains("Linux 6.6");
            let allowed = if refused == "no-sparse" { 0 } else { seen.iter().filter(by_kernel).count() };
            assert_eq!(seen.len() - allowed, slower(refused), "{refused}: {seen:?}");
            is_whole(a, b, "10.42.2.1", bytes(refused));
            is_whole(b, a, "fd42:1::1", bytes(refused) / 2);
            let numbers = datagrams(a, b, 50);
            assert_eq!(numbers, (0..50 * TOGETHER).collect::<Vec<_>>(), "{refused}");
        });
    });
}

#[test]
fn on_a_bad_underlay_streams_are_whole_and_no_datagram_comes_twice_whatever_is_refused() {
    sandbox::run(
        "offloads::on_a_bad_underlay_streams_are_whole_and_no_datagram_comes_twice_whatever_is_refused",
        |dir| {
            each(dir, |pair, refused| {
                let relay = Relay::between(pair, 2);
                let Pair { a, b } = pair;
                is_whole(a, b, "10.42.2.1", bytes(refused) / 2);
                let numbers = datagrams(a, b, 50);
                let different: BTreeSet<_> = numbers.iter().collect();
                assert_eq!(different.len(), numbers.len(), "{refused}: none comes twice");
                assert!(numbers.len() > 1500, "{refused}: most arrive, not {}", numbers.len());
                assert!(b.dropped("replayed") > 0, "{refused}: what came twice was refused");
                drop(relay);
            });
        },
    );
}

#[test]
fn a_host_with_more_workers_and_one_with_fewer_understand_each_other() {
    sandbox::run("offloads::a_host_with_more_workers_and_one_with_fewer_understand_each_other", |dir| {
        let tuning = |workers| Tuning { workers: Some(workers), ..Tuning::default() };
        for (number, (ours, theirs)) in [(1, 4), (4, 1), (2, 3)].into_iter().enumerate() {
            let dir = dir.join(format!("{number}"));
            std::fs::create_dir(&dir).unwrap();
            let pair = crate::rig::strangers_tuned(&dir, [&tuning(ours), &tuning(theirs)]);
            pair.connect();
            let Pair { a, b } = &pair;
            std::thread::scope(|scope| {
                for _ in 0..3 {
                    scope.spawn(|| is_whole(a, b, "10.42.2.1", bytes("workers") / 4));
                    scope.spawn(|| is_whole(b, a, "10.42.1.1", bytes("workers") / 4));
                }
            });
            assert_eq!(datagrams(a, b, 20), (0..20 * TOGETHER).collect::<Vec<_>>());
        }
    });
}

/// Sends numbered datagrams, equal ones together and then others, and checks those that come; their numbers in the order
/// in which they came.
fn datagrams(from: &Host, to: &Host, rounds: u32) -> Vec<u32> {
    let (sender, receiver) = (from.socket(0), to.socket(0));
    let local = SocketAddr::new(from.inner(), sender.port());
    let path = udp::Path { local, remote: SocketAddr::new(to.inner(), receiver.port()) };
    let (mut buffers, mut received) = (vec![vec![0; 65_536]; 8], Vec::new());
    let mut numbers = Vec::new();
    for round in 0..rounds {
        let mut bytes = Vec::new();
        for number in round * TOGETHER..(round + 1) * TOGETHER {
            bytes.extend(number.to_be_bytes());
            bytes.resize(bytes.len() + if round.is_multiple_of(2) { 996 } else { 60 }, number as u8);
        }
        let segment = bytes.len() / TOGETHER as usize;
        sender.send(&[udp::Send { path, bytes: &bytes, segment, tos: 0 }]).1.unwrap();
        // Until the last of the round is there, or is not coming.
        let until =
            Instant::now() + Duration::from_millis(if rounds_lose(&numbers, round) { 20 } else { 5000 });
        while Instant::now() < until && numbers.last() != Some(&((round + 1) * TOGETHER - 1)) {
            receiver.receive(&mut buffers, &mut received).unwrap();
            for (message, buffer) in received.iter().zip(&buffers) {
                for datagram in buffer[..message.len].chunks(message.stride) {
                    let number = u32::from_be_bytes(*datagram.first_chunk().unwrap());
                    assert_eq!(datagram.len(), if (number / TOGETHER).is_multiple_of(2) { 1000 } else { 64 });
                    assert!(datagram[4..].iter().all(|byte| *byte == number as u8));
                    numbers.push(number);
                }
            }
            std::thread::yield_now();
        }
    }
    numbers
}

/// Whether datagrams were lost or overtaken before this round.
fn rounds_lose(numbers: &[u32], round: u32) -> bool {
    numbers.len() != (round * TOGETHER) as usize || !numbers.is_sorted()
}
