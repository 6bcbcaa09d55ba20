//! What must not pass, what does not fit, and what comes from anywhere.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use agent::dataplane::Signal;
use linux::udp;

use crate::rig::{DEVICE, Host, PEER, PORT, Pair, eventually, outbound, pair, spi, strangers, way};
use crate::sandbox::{self, sh};

/// UDP messages that a host has sent. Nothing else of it could carry what is inside.
fn on_the_wire(host: &Host) -> u64 {
    let script = "awk '/^Udp: [0-9]/ { n += $5 } /^Udp6OutDatagrams/ { n += $2 } END { print n }' \
        /proc/net/snmp /proc/net/snmp6";
    host.host.run(|| sh(script)).unwrap().trim().parse().unwrap()
}

/// A socket of nobody in particular, beside a host.
fn stranger(host: &Host) -> UdpSocket {
    host.host.run(|| UdpSocket::bind("192.0.2.11:0").unwrap()).unwrap()
}

/// Sends one datagram of 100 bytes with this TOS from one router to the other; the TOS that it arrives with.
fn tos_after(a: &Host, b: &Host, sender: &udp::Socket, receiver: &udp::Socket, tos: u8) -> Option<u8> {
    let path = udp::Path {
        local: SocketAddr::new(a.inner(), sender.port()),
        remote: SocketAddr::new(b.inner(), receiver.port()),
    };
    let dropped = b.dropped("ecn");
    sender.send(&[udp::Send { path, bytes: &[0; 100], segment: 100, tos }]).1.unwrap();
    let (mut buffers, mut received) = (vec![vec![0; 2000]], Vec::new());
    let mut arrived = None;
    eventually("it arrives or is dropped", || {
        receiver.receive(&mut buffers, &mut received).unwrap();
        arrived = received.first().map(|message| message.tos);
        arrived.is_some() || b.dropped("ecn") > dropped
    });
    arrived
}

#[test]
fn without_an_association_nothing_is_on_the_wire() {
    sandbox::run("trouble::without_an_association_nothing_is_on_the_wire", |dir| {
        let pair = strangers(dir);
        let before = on_the_wire(&pair.a);
        pair.a.sh("! ping -c 70 -i 0.002 -W 1 10.42.2.1");
        pair.a.sh("! ping -c 2 -i 0.2 -W 1 10.42.2.77; ! ping -c 1 -W 1 fd42:2::9");
        assert_eq!(on_the_wire(&pair.a), before);
        assert!(pair.a.dropped_in_all("no_association") > 0, "more than may wait");
        pair.connect();
        let connected = on_the_wire(&pair.a);
        pair.a.sh("ping -c 3 -i 0.2 10.42.2.1");
        assert!(on_the_wire(&pair.a) > connected, "the count counts");
        eventually("all that waited has gone", || {
            let now = on_the_wire(&pair.a);
            std::thread::sleep(Duration::from_millis(50));
            now == on_the_wire(&pair.a)
        });
        pair.a.path.remove_outbound(PEER, DEVICE, 0);
        let before = on_the_wire(&pair.a);
        pair.a.sh("! ping -c 3 -i 0.2 -W 1 10.42.2.1");
        assert_eq!(on_the_wire(&pair.a), before);
    });
}

#[test]
fn a_source_or_destination_that_is_not_the_peers_is_dropped_and_counted() {
    sandbox::run("trouble::a_source_or_destination_that_is_not_the_peers_is_dropped_and_counted", |dir| {
        let Pair { a, b } = pair(dir);
        a.sh("ip addr add 10.42.9.9/32 dev tun0; ip route add 10.42.3.0/24 dev tun0");
        a.sh("! ping -c 3 -i 0.2 -W 1 -I 10.42.9.9 10.42.2.1");
        assert_eq!(b.dropped("inner_source"), 3);
        a.path.set_routes(
            DEVICE,
            vec![("10.42.3.0/24".parse().unwrap(), PEER), ("10.42.2.0/24".parse().unwrap(), PEER)],
            false,
        );
        a.sh("! ping -c 2 -i 0.2 -W 1 10.42.3.1");
        assert_eq!(b.dropped("inner_destination"), 2);
        a.sh("ip route add 10.77.0.0/16 dev tun0; ! ping -c 2 -i 0.2 -W 1 10.77.0.1");
        assert!(a.dropped_in_all("no_route") >= 2);
        a.sh("ping -c 1 -W 2 10.42.2.1");
    });
}

#[test]
fn what_is_larger_than_the_peers_mtu_is_told_to_its_sender_or_fragmented() {
    sandbox::run("trouble::what_is_larger_than_the_peers_mtu_is_told_to_its_sender_or_fragmented", |dir| {
        let Pair { a, b } = pair(dir);
        a.path.set_mtu(PEER, Some(1280));
        let said = a.sh("ping -c 2 -i 0.3 -W 1 -M do -s 1300 10.42.2.1 2>&1 || true");
        assert!(said.contains("mtu = 1280") || said.contains("mtu=1280"), "{said}");
        let said = a.sh("ping -c 2 -i 0.3 -W 1 -M do -s 1300 fd42:2::1 2>&1 || true");
        assert!(said.contains("mtu = 1280") || said.contains("mtu=1280"), "{said}");
        assert!(a.dropped("too_big") >= 2);
        a.sh("ip route flush cache; ping -c 2 -i 0.2 -W 2 -M dont -s 4000 10.42.2.1");
        // Segments that were cut for more than that are told of too, and TCP goes on with less.
        crate::traffic::is_whole(&a, &b, "10.42.2.1", 3_000_000);
    });
}

#[test]
fn what_the_underlay_does_not_take_is_told_to_control() {
    sandbox::run("trouble::what_the_underlay_does_not_take_is_told_to_control", |dir| {
        let Pair { a, b } = pair(dir);
        a.host.run(|| sh("ip link set und1 mtu 1400")).unwrap();
        a.sh("! ping -c 1 -W 1 -M do -s 1400 10.42.2.1");
        let told = a.await_signal(|signal| match signal {
            Signal::TooBig { peer, path_mtu } => Some((peer, path_mtu)),
            _ => None,
        });
        assert_eq!(told, (PEER, 1400));
        assert!(a.dropped("path_mtu") > 0);
        a.path.set_mtu(PEER, packet::esp::inner_len_max(1400 - 28).map(|mtu| mtu as u32));
        let before = a.dropped("path_mtu");
        crate::traffic::is_whole(&a, &b, "10.42.2.1", 3_000_000);
        assert_eq!(a.dropped("path_mtu"), before);
    });
}

#[test]
fn congestion_marked_on_the_way_arrives_inside_and_is_never_hidden() {
    sandbox::run("trouble::congestion_marked_on_the_way_arrives_inside_and_is_never_hidden", |dir| {
        let Pair { a, b } = pair(dir);
        let (sender, receiver) = (a.socket(7000), b.socket(7000));
        let tos_after = |tos| tos_after(&a, &b, &sender, &receiver, tos);
        for tos in [0, 1, 2, 3, (46 << 2) | 2] {
            assert_eq!(tos_after(tos), Some(tos));
        }
        b.host
            .run(|| {
                sh("nft add table marking; \
                    nft 'add chain marking in { type filter hook prerouting priority -300; }'; \
                    nft add rule marking in udp dport 4500 ip ecn set ce")
            })
            .unwrap();
        assert_eq!(tos_after((46 << 2) | 2), Some((46 << 2) | 3));
        assert_eq!(tos_after(1), Some(3));
        assert_eq!(tos_after(0), None, "it would not react, so it is lost, as RFC 6040 has it");
    });
}

#[test]
fn a_peer_that_moves_is_noticed_by_its_packets_and_followed() {
    sandbox::run("trouble::a_peer_that_moves_is_noticed_by_its_packets_and_followed", |dir| {
        let Pair { a, b } = pair(dir);
        a.sh("ping -c 1 -W 2 10.42.2.1");
        a.path.set_path(PEER, way("192.0.2.11", "192.0.2.2"));
        a.sh("ping -c 1 -W 2 10.42.2.1");
        let moved = b.await_signal(|signal| match signal {
            Signal::Moved { peer, inbound, path } => Some((peer, inbound, path)),
            _ => None,
        });
        assert_eq!(moved, (PEER, spi(1, 1), way("192.0.2.2", "192.0.2.11")));
        b.path.set_path(PEER, moved.2);
        a.sh("ping -c 2 -i 0.2 -W 2 10.42.2.1");
    });
}

#[test]
fn a_host_that_loses_its_address_goes_on_with_another() {
    sandbox::run("trouble::a_host_that_loses_its_address_goes_on_with_another", |dir| {
        let Pair { a, b } = pair(dir);
        a.sh("ping -c 1 -W 2 10.42.2.1");
        a.host.run(|| sh("ip addr flush dev und1; ip addr add 192.0.2.11/24 dev und1")).unwrap();
        a.sh("! ping -c 1 -W 1 10.42.2.1");
        let path = |signal| match signal {
            Signal::Moved { path, .. } => Some(path),
            _ => None,
        };
        let moved = b.await_signal(path);
        assert_eq!(moved, way("192.0.2.2", "192.0.2.11"));
        b.path.set_path(PEER, moved);
        a.sh("ping -c 1 -W 2 10.42.2.1");
        assert_eq!(a.await_signal(path), way("192.0.2.11", "192.0.2.2"));
    });
}

#[test]
fn an_association_removed_under_load_ends_at_once_and_harms_nothing() {
    sandbox::run("trouble::an_association_removed_under_load_ends_at_once_and_harms_nothing", |dir| {
        let Pair { a, b } = pair(dir);
        let target = SocketAddr::new(b.inner(), 9000);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let sender = a.router.run(|| UdpSocket::bind("10.42.1.1:0").unwrap()).unwrap();
            let stop = &stop;
            scope.spawn(move || {
                while !stop.load(Relaxed) {
                    // Refused while the device's queue is full.
                    let _ = sender.send_to(&[0x5a; 1000], target);
                }
            });
            for salt in 2..40 {
                a.path.remove_outbound(PEER, DEVICE, 0);
                b.path.remove_inbound(spi(1, salt - 1));
                b.path.remove_device(DEVICE);
                b.add_device();
                b.receives(&a, salt);
                a.path.set_outbound(PEER, (DEVICE, 0), outbound(1, salt), way("192.0.2.1", "192.0.2.2"));
                let used = b.inbound(salt);
                eventually("packets go on", || used.counters().packets > 100);
            }
            stop.store(true, Relaxed);
        });
        let sa = b.inbound(39);
        a.path.remove_peer(PEER);
        b.path.remove_peer(PEER);
        // What the receiving thread had in its hands may still have been opened.
        a.sh("! ping -c 1 -W 1 10.42.2.1");
        let last = sa.counters();
        a.sh("! ping -c 1 -W 1 10.42.2.1");
        assert_eq!(sa.counters(), last);
        assert!(a.path.drops(PEER).is_empty(), "forgotten");
    });
}

#[test]
fn an_unknown_spi_is_told_once_a_second_and_counted_each_time() {
    sandbox::run("trouble::an_unknown_spi_is_told_once_a_second_and_counted_each_time", |dir| {
        let Pair { a, b } = pair(dir);
        b.path.remove_inbound(spi(1, 1));
        a.sh("! ping -c 10 -i 0.01 -W 1 10.42.2.1");
        assert_eq!(b.dropped_in_all("unknown_spi"), 10);
        let told = b.signals();
        let [Signal::UnknownSpi { path }] = told[..] else { panic!("{told:?}") };
        assert_eq!(path, way("192.0.2.2", "192.0.2.1"));
    });
}

#[test]
fn ike_reaches_control_whole_by_its_port_and_no_more_of_it_than_one_source_may_send() {
    sandbox::run(
        "trouble::ike_reaches_control_whole_by_its_port_and_no_more_of_it_than_one_source_may_send",
        |dir| {
            let Pair { a, b } = pair(dir);
            let message: Vec<u8> = [0, 0, 0, 0].into_iter().chain(1..=200).collect();
            let ike = |signal| match signal {
                Signal::Ike { path, payload } => Some((path, payload)),
                _ => None,
            };
            a.path.send(way("192.0.2.1", "192.0.2.2"), &message);
            assert_eq!(b.await_signal(ike), (way("192.0.2.2", "192.0.2.1"), message.clone()));
            b.path.send(way("2001:db8::2", "2001:db8::1"), &message);
            assert_eq!(a.await_signal(ike), (way("2001:db8::1", "2001:db8::2"), message.clone()));
            let port_500 = |from: &str, to: &str| udp::Path {
                local: SocketAddr::new(from.parse().unwrap(), 500),
                remote: SocketAddr::new(to.parse().unwrap(), 500),
            };
            a.path.send(port_500("192.0.2.1", "192.0.2.2"), &message[4..]);
            assert_eq!(b.await_signal(ike), (port_500("192.0.2.2", "192.0.2.1"), message[4..].to_vec()));
            a.path.send(way("192.0.2.1", "192.0.2.2"), &[0xff]);

            let flood = stranger(&a);
            for _ in 0..2000 {
                let _ = flood.send_to(&message, ("192.0.2.2", PORT));
            }
            eventually("all of it is seen", || b.dropped_in_all("ike_rate") > 2000 - 3 * 256);
            let passed = b.signals().into_iter().filter_map(ike).count();
            assert!((1..=3 * 256).contains(&passed), "{passed}");
            a.sh("ping -c 1 -W 2 10.42.2.1");
        },
    );
}

#[test]
fn thousands_of_garbage_datagrams_are_counted_and_nothing_else_happens() {
    sandbox::run("trouble::thousands_of_garbage_datagrams_are_counted_and_nothing_else_happens", |dir| {
        let Pair { a, b } = pair(dir);
        a.sh("ping -c 1 -W 2 10.42.2.1");
        let from = stranger(&a);
        let mut state = 88_172_645_463_325_252u64;
        let mut random = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        let known = spi(1, 1).get().to_be_bytes();
        let mut sent = 0;
        for round in 0..20_000 {
            let length = (random() % if round % 10 == 0 { 65_000 } else { 200 }) as usize;
            let mut bytes: Vec<u8> = (0..length).map(|_| random() as u8).collect();
            // Half of it for an association that there is.
            if round % 2 == 0 && length >= 4 {
                bytes[..4].copy_from_slice(&known);
            }
            sent += u64::from(from.send_to(&bytes, ("192.0.2.2", PORT)).is_ok());
            if round % 100 == 0 {
                a.sh("true");
            }
        }
        assert!(sent > 15_000);
        let counted = |reason| b.dropped_in_all(reason);
        eventually("most is counted", || {
            counted("unknown_spi")
                + counted("authentication")
                + counted("too_short")
                + counted("runt")
                + counted("too_old")
                > sent / 2
        });
        assert!(
            counted("authentication") > 1000 && counted("unknown_spi") > 1000,
            "{:?}",
            b.path.total_drops()
        );
        assert!(
            !b.signals().into_iter().any(|signal| matches!(signal, Signal::Moved { .. })),
            "not by a forger"
        );
        a.sh("ping -c 3 -i 0.2 -W 2 10.42.2.1");
    });
}

#[test]
fn of_strangers_that_begin_few_are_heard_a_second_and_all_that_are_expected_or_bring_a_cookie() {
    sandbox::run(
        "trouble::of_strangers_that_begin_few_are_heard_a_second_and_all_that_are_expected_or_bring_a_cookie",
        |dir| {
            let Pair { a, b } = pair(dir);
            // The marker, SPIs, the kind of the first payload, and the rest.
            let message = |first: u8| {
                let mut bytes = [7; 32];
                bytes[..4].fill(0);
                bytes[12..20].fill(0);
                bytes[20] = first;
                bytes
            };
            // 80 each: three that are counted as one may do so.
            let few = 256 * b.path.workers();
            let count = u8::try_from(2 * few / 80).unwrap();
            let addresses = |kind: u8| (0..count).map(move |n| IpAddr::from([198, 51, 100 + kind, n]));
            b.host.run(|| sh("ip route add 198.51.0.0/16 via 192.0.2.11")).unwrap();
            let begin = |kind: u8, first: u8| {
                b.signals();
                let dropped = b.dropped_in_all("ike_rate");
                let (mut sent, mut heard) = (0, 0);
                for address in addresses(kind) {
                    let bound = || {
                        sh(&format!("ip addr add {address}/32 dev lo"));
                        UdpSocket::bind((address, 0)).unwrap()
                    };
                    let socket = a.host.run(bound).unwrap();
                    for _ in 0..80 {
                        sent += usize::from(socket.send_to(&message(first), ("192.0.2.2", PORT)).is_ok());
                    }
                }
                eventually("all have come", || {
                    let signals = b.signals();
                    heard += signals.iter().filter(|it| matches!(it, Signal::Ike { .. })).count();
                    heard + (b.dropped_in_all("ike_rate") - dropped) as usize == sent
                });
                assert_eq!(sent, 80 * usize::from(count));
                heard
            };
            let (all, heard) = (80 * usize::from(count), begin(0, 33));
            assert!(heard >= 200 && heard < all, "of strangers {heard} of {all}");
            assert_eq!(begin(1, 41), all, "with a cookie");
            b.path.set_expected(addresses(2).collect());
            assert_eq!(begin(2, 33), all, "expected");
            a.sh("ping -c 1 -W 2 10.42.2.1");
        },
    );
}

#[test]
fn a_device_that_vanishes_and_comes_back_is_used_again() {
    sandbox::run("trouble::a_device_that_vanishes_and_comes_back_is_used_again", |dir| {
        let Pair { a, b } = pair(dir);
        a.sh("ping -c 1 -W 2 10.42.2.1; ip link del tun0");
        b.sh("! ping -c 1 -W 1 10.42.1.1");
        assert!(a.dropped_in_all("device_refused") > 0);
        a.make_device();
        a.add_device();
        a.sh("ping -c 1 -W 2 10.42.2.1");
    });
}

#[test]
fn with_the_path_its_threads_end_and_its_ports_are_free() {
    sandbox::run("trouble::with_the_path_its_threads_end_and_its_ports_are_free", |dir| {
        let Pair { a, b } = pair(dir);
        a.sh("ping -c 1 -W 2 10.42.2.1");
        let host = a.host;
        let bind = || host.run(|| udp::Socket::bind(udp::Family::V4, PORT)).unwrap();
        assert!(bind().is_err());
        drop(a.path);
        bind().unwrap();
        drop(b.path);
    });
}
