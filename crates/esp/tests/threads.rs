//! What workers and control do at the same time.

#![allow(clippy::unwrap_used)]

use std::sync::{Arc, Barrier};

use esp::{Inbound, InnerPolicy, KeyMaterial, Limits, Outbound, Published, Sequence, Spi, Suite};
use packet::{esp::HEAD_ROOM, ipv4};

#[test]
fn two_workers_on_one_sa_never_use_a_number_twice() {
    let material = KeyMaterial::new(Suite::Aes256Gcm16, &[0x5a; 36]).unwrap();
    let spi = Spi::new(0x1000).unwrap();
    let out = Outbound::new(spi, &material, Sequence::Extended, Limits::of(Sequence::Extended)).unwrap();
    let inbound = Inbound::new(spi, &material, Sequence::Extended).unwrap();
    let everything = ["0.0.0.0/0".parse().unwrap()];
    let policy = InnerPolicy::new(everything, everything);
    std::thread::scope(|scope| {
        for worker in 0..4u32 {
            let (out, inbound, policy) = (&out, &inbound, &policy);
            scope.spawn(move || {
                for round in 0..50 {
                    let mut burst = out.begin(1 + (worker + round) % 7).unwrap();
                    while burst.left() > 0 {
                        let mut buffer = [0; 100];
                        ipv4::Repr::default().emit(&mut buffer[HEAD_ROOM..]);
                        let length = burst.seal(&mut buffer, 20).unwrap();
                        inbound.begin().open(&mut buffer[..length], policy).unwrap();
                    }
                }
            });
        }
    });
    assert_eq!(out.counters(), inbound.counters(), "all opened, so none had a number of another");
    assert_eq!(inbound.begin().highest(), inbound.counters().packets);
}

#[test]
fn values_never_go_backwards_under_many_updates_from_many_threads() {
    let published = Arc::new(Published::new(0u64));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| (0..1000).for_each(|_| published.update(|n| n + 1)));
            scope.spawn(|| {
                let mut reader = published.reader();
                let mut last = 0;
                while last < 2000 {
                    let now = **reader.get();
                    assert!(now >= last);
                    last = now;
                    std::thread::yield_now();
                }
            });
        }
    });
    assert_eq!(*published.load(), 2000);
}

#[test]
fn what_was_published_is_what_every_reader_gets_next_whoever_else_reads_or_looks() {
    const ROUNDS: u64 = 20_000;
    let published = Arc::new(Published::new(0u64));
    // Both readers are let go at once after each update, as workers are that are woken.
    let (begin, end) = (Barrier::new(3), Barrier::new(3));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut reader = published.reader();
                let mut missed = 0;
                for round in 1..=ROUNDS {
                    begin.wait();
                    missed += u64::from(**reader.get() != round);
                    end.wait();
                }
                assert_eq!(missed, 0, "of {ROUNDS}");
            });
        }
        for _ in 0..ROUNDS {
            published.update(|n| n + 1);
            begin.wait();
            // Control looks too.
            drop(published.load());
            end.wait();
        }
    });
}

#[test]
fn a_reader_that_slept_through_a_million_versions_lets_go_of_them_one_by_one() {
    let published = Arc::new(Published::new(0u64));
    let (mut slow, dropped) = (published.reader(), published.reader());
    (0..1_000_000).for_each(|_| published.update(|n| n + 1));
    drop(dropped);
    assert_eq!(**slow.get(), 1_000_000);
}
