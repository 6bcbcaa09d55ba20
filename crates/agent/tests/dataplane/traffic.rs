//! What a network is for: packets arrive, whole and in order.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use agent::dataplane::{Direction, Signal};
use aws_lc_rs::digest::{Context, Digest, SHA256};
use linux::udp;

use crate::rig::{DEVICE, Host, PEER, Pair, eventually, pair, spi, strangers, way};
use crate::sandbox;

/// Bytes that follow no pattern, the same each time.
struct Noise(u64);

impl Noise {
    fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            chunk.copy_from_slice(&self.0.to_ne_bytes()[..chunk.len()]);
        }
    }
}

/// Sends so many bytes over TCP from one router to the other; what was sent and what was received.
fn stream(from: &Host, to: &Host, address: &str, length: usize) -> (Digest, Digest) {
    let listener = to.router.run(|| TcpListener::bind((address, 0)).unwrap()).unwrap();
    let target = listener.local_addr().unwrap();
    std::thread::scope(|scope| {
        let reader = scope.spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
            let (mut digest, mut buffer) = (Context::new(&SHA256), vec![0; 1 << 20]);
            loop {
                match stream.read(&mut buffer).unwrap() {
                    0 => return digest.finish(),
                    count => digest.update(&buffer[..count]),
                }
            }
        });
        let mut stream = from.router.run(|| TcpStream::connect(target).unwrap()).unwrap();
        let (mut digest, mut buffer, mut left) = (Context::new(&SHA256), vec![0; 100_000], length);
        let mut noise = Noise(0x1234_5678_9abc_def1);
        while left > 0 {
            let part = &mut buffer[..left.min(100_000)];
            noise.fill(part);
            digest.update(part);
            stream.write_all(part).unwrap();
            left -= part.len();
        }
        drop(stream);
        (digest.finish(), reader.join().unwrap())
    })
}

pub fn is_whole(from: &Host, to: &Host, address: &str, length: usize) {
    let (sent, received) = stream(from, to, address, length);
    assert_eq!(sent.as_ref(), received.as_ref());
}

#[test]
fn pings_of_either_family_come_back_over_either_underlay() {
    sandbox::run("traffic::pings_of_either_family_come_back_over_either_underlay", |dir| {
        let pair = pair(dir);
        pair.a.sh("ping -c 3 -i 0.2 -W 2 10.42.2.1 && ping -c 3 -i 0.2 -W 2 fd42:2::1");
        pair.connect_by(2, way("2001:db8::1", "2001:db8::2"));
        pair.b.sh("ping -c 3 -i 0.2 -W 2 10.42.1.1 && ping -c 3 -i 0.2 -W 2 fd42:1::1");
        assert_eq!(pair.a.path.drops(PEER), pair.b.path.drops(PEER), "none of either");
    });
}

#[test]
fn a_tcp_stream_arrives_bit_for_bit_in_both_directions_and_families() {
    sandbox::run("traffic::a_tcp_stream_arrives_bit_for_bit_in_both_directions_and_families", |dir| {
        let Pair { a, b } = pair(dir);
        is_whole(&a, &b, "10.42.2.1", 50_000_000);
        is_whole(&b, &a, "fd42:1::1", 50_000_000);
        std::thread::scope(|scope| {
            scope.spawn(|| is_whole(&a, &b, "10.42.2.1", 20_000_000));
            scope.spawn(|| is_whole(&b, &a, "10.42.1.1", 20_000_001));
        });
    });
}

#[test]
fn a_stream_is_given_to_the_kernel_in_more_than_64_kb_at_once_only_where_it_takes_that_and_goes_no_further() {
    sandbox::run(
        "traffic::a_stream_is_given_to_the_kernel_in_more_than_64_kb_at_once_only_where_it_takes_that_and_goes_no_further",
        |dir| {
            let Pair { a, b } = pair(dir);
            b.sh("nft 'add table ip seen; add chain ip seen in { type filter hook input priority 0; }; \
                  add rule ip seen in meta length > 65535 counter'");
            let long = || !b.sh("nft list table ip seen").contains("packets 0 ");
            let carry = || is_whole(&a, &b, "10.42.2.1", 20_000_000);
            if b.path.refused().iter().any(|line| line.contains("Linux 6.6")) {
                carry();
                assert!(!long());
                return;
            }
            eventually("a long superpacket", || {
                carry();
                long()
            });
            let slower = b.path.refused();
            // What may leave by the device again is no longer than the device takes.
            b.path.set_routes(DEVICE, vec![("10.42.1.0/24".parse().unwrap(), PEER)], true);
            b.sh("nft flush table ip seen; nft add rule ip seen in meta length \\> 65535 counter");
            carry();
            carry();
            assert!(!long());
            assert_eq!(b.path.refused(), slower, "and that is not the kernel's doing");
        },
    );
}

#[test]
fn a_stream_arrives_whole_beside_a_thousand_other_peers_that_come_meanwhile() {
    sandbox::run(
        "traffic::a_stream_arrives_whole_beside_a_thousand_other_peers_that_come_meanwhile",
        |dir| {
            let Pair { a, b } = pair(dir);
            std::thread::scope(|scope| {
                scope.spawn(|| is_whole(&a, &b, "10.42.2.1", 20_000_000));
                scope.spawn(|| a.crowd(1000));
                b.crowd(1000);
            });
            is_whole(&b, &a, "10.42.1.1", 5_000_000);
        },
    );
}

#[test]
fn flows_that_come_to_send_much_are_not_reordered_beside_a_stream() {
    sandbox::run("traffic::flows_that_come_to_send_much_are_not_reordered_beside_a_stream", |dir| {
        let Pair { a, b } = pair(dir);
        std::thread::scope(|scope| {
            let stream = scope.spawn(|| is_whole(&a, &b, "10.42.2.1", 150_000_000));
            let receiver = b.socket(7000);
            let (mut buffers, mut received) = (vec![vec![0; 65_536]; 8], Vec::new());
            let to = SocketAddr::new(b.inner(), 7000);
            let mut all = 0;
            let mut flow = 0u16;
            while !stream.is_finished() {
                // A port of its own: a flow that nothing is known of. Its bucket is full after half of this.
                flow += 1;
                let sender = a.socket(10_000 + flow % 20_000);
                let path = udp::Path { local: SocketAddr::new(a.inner(), sender.port()), remote: to };
                for number in 0..50u8 {
                    let bytes = [number; 1300];
                    // What does not fit its queue is lost, which is no matter of order.
                    let _ = sender.send(&[udp::Send { path, bytes: &bytes, segment: 1300, tos: 0 }]);
                }
                let mut last = None;
                let until = std::time::Instant::now() + Duration::from_millis(20);
                while std::time::Instant::now() < until && last != Some(49) {
                    let _ = receiver.receive(&mut buffers, &mut received);
                    for (message, bytes) in received.iter().zip(&buffers) {
                        for datagram in bytes[..message.len].chunks(message.stride) {
                            let of = message.path.remote.port();
                            if of == sender.port() {
                                assert!(last < Some(datagram[0]), "{last:?} before {}", datagram[0]);
                                last = Some(datagram[0]);
                                all += 1;
                            }
                        }
                    }
                    received.clear();
                }
            }
            stream.join().unwrap();
            assert!(all > 100, "{all} datagrams of {flow} flows came");
        });
        assert_eq!(b.dropped("replayed"), 0);
    });
}

#[test]
fn udp_is_not_reordered_and_keeps_its_boundaries() {
    sandbox::run("traffic::udp_is_not_reordered_and_keeps_its_boundaries", |dir| {
        let Pair { a, b } = pair(dir);
        let (sender, receiver) = (a.socket(7000), b.socket(7000));
        let path =
            udp::Path { local: SocketAddr::new(a.inner(), 7000), remote: SocketAddr::new(b.inner(), 7000) };
        let (mut buffers, mut received) = (vec![vec![0; 65_536]; 8], Vec::new());
        let (mut next, mut count) = (0, 0);
        for round in 0..200u32 {
            // Equal sizes, so that they travel as one, and then others between them.
            let mut bytes = Vec::new();
            for number in round * 40..(round + 1) * 40 {
                bytes.extend(number.to_be_bytes());
                bytes.resize(bytes.len() + if round % 2 == 0 { 996 } else { 60 }, 0x5a);
            }
            let segment = bytes.len() / 40;
            sender.send(&[udp::Send { path, bytes: &bytes, segment, tos: 0 }]).1.unwrap();
            while receiver.receive(&mut buffers, &mut received).unwrap() > 0 {
                for (message, buffer) in received.iter().zip(&buffers) {
                    for datagram in buffer[..message.len].chunks(message.stride) {
                        let number = u32::from_be_bytes(*datagram.first_chunk().unwrap());
                        assert!(number >= next, "{number} after {next}");
                        assert_eq!(datagram.len(), if number / 40 % 2 == 0 { 1000 } else { 64 });
                        assert!(datagram[4..].iter().all(|byte| *byte == 0x5a));
                        next = number + 1;
                        count += 1;
                    }
                }
            }
        }
        eventually("the last arrives", || {
            receiver.receive(&mut buffers, &mut received).unwrap();
            for (message, buffer) in received.iter().zip(&buffers) {
                count += buffer[..message.len].chunks(message.stride).len();
            }
            count > 7900
        });
    });
}

#[test]
fn a_packet_that_came_too_early_is_the_first_to_go() {
    sandbox::run("traffic::a_packet_that_came_too_early_is_the_first_to_go", |dir| {
        let pair = strangers(dir);
        std::thread::scope(|scope| {
            let ping = scope.spawn(|| pair.a.sh("ping -c 1 -W 5 10.42.2.1"));
            let waiting = pair.a.await_signal(|signal| match signal {
                Signal::Waiting { peer, device } => Some((peer, device)),
                _ => None,
            });
            assert_eq!(waiting, (PEER, DEVICE));
            pair.connect();
            ping.join().unwrap();
        });
        assert!(pair.a.path.total_drops().is_empty(), "{:?}", pair.a.path.total_drops());
    });
}

#[test]
fn a_new_association_takes_over_from_the_old_one_without_loss() {
    sandbox::run("traffic::a_new_association_takes_over_from_the_old_one_without_loss", |dir| {
        let pair = pair(dir);
        let path = way("192.0.2.1", "192.0.2.2");
        std::thread::scope(|scope| {
            let ping = scope.spawn(|| pair.a.sh("ping -c 600 -i 0.002 -W 2 10.42.2.1"));
            for salt in 2..20 {
                // As a rekey does it: both receive, then both send, then what is old goes.
                pair.connect_by(salt, path);
                let used = pair.b.inbound(salt);
                eventually("the new one is used", || used.counters().packets > 5);
                pair.a.path.remove_inbound(spi(2, salt - 1));
                pair.b.path.remove_inbound(spi(1, salt - 1));
            }
            assert!(ping.join().unwrap().contains(" 0% packet loss"));
        });
    });
}

#[test]
fn a_probe_is_answered_to_control_and_to_nobody_else() {
    sandbox::run("traffic::a_probe_is_answered_to_control_and_to_nobody_else", |dir| {
        let Pair { a, b } = pair(dir);
        let mut probe = vec![0; 20 + 8 + 100];
        let counts = "cat /proc/net/dev | awk '/tun0/ { print $3 }'";
        let before = a.sh(counts);
        packet::ipv4::Repr {
            protocol: packet::protocol::ICMP,
            source: "10.42.1.1".parse().unwrap(),
            destination: "10.42.2.1".parse().unwrap(),
            payload_len: 108,
            ..packet::ipv4::Repr::default()
        }
        .emit(&mut probe);
        probe[20] = 8;
        probe[28..36].copy_from_slice(&a.path.probe_magic());
        let sum = packet::checksum::checksum(&probe[20..]);
        probe[22..24].copy_from_slice(&sum.to_be_bytes());
        a.path.inject(PEER, DEVICE, &probe);
        let answer = a.await_signal(|signal| match signal {
            Signal::Answer { peer, device, packet } => {
                assert_eq!((peer, device), (PEER, DEVICE));
                Some(packet)
            }
            _ => None,
        });
        assert_eq!((answer[20], &answer[28..]), (0, &probe[28..]));
        assert_eq!(answer.len(), probe.len());
        assert_eq!(a.sh(counts), before, "the device got nothing");
        drop(b);
    });
}

#[test]
fn who_looks_on_sees_both_directions_as_they_are_inside() {
    sandbox::run("traffic::who_looks_on_sees_both_directions_as_they_are_inside", |dir| {
        let Pair { a, b } = pair(dir);
        let (tap, captured) = sync_channel(100);
        a.path.set_capture(PEER, Some(tap));
        a.sh("ping -c 1 -W 2 -s 200 -p 5a 10.42.2.1");
        let seen: Vec<_> = (0..2).map(|_| captured.recv_timeout(Duration::from_secs(5)).unwrap()).collect();
        assert_eq!(seen.iter().map(|one| one.direction).collect::<Vec<_>>(), [Direction::Out, Direction::In]);
        for one in &seen {
            assert_eq!((one.device, one.packet.len()), (DEVICE, 228));
            assert!(one.packet[60..].iter().all(|byte| *byte == 0x5a));
        }
        a.path.set_capture(PEER, None);
        a.sh("ping -c 1 -W 2 10.42.2.1");
        assert!(
            captured.recv_timeout(Duration::from_secs(5)).is_err(),
            "nothing more, and the sender is gone"
        );
        drop(b);
    });
}
