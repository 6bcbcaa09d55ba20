//! What goes past the kernel's stack by a router's programs, and what they leave to it: packets sent through a router of the
//! plan's own objects, in real namespaces. The stack's share is what its forward hook counts.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod sandbox;

use std::io::IoSlice;
use std::net::{Ipv4Addr, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use linux::Kernel;
use linux::netns::Netns;
use linux::tun::{self, Queue};
use plan::{Key, Scope, diff};
use sandbox::scene::{BEHIND_PEER, CONTAINER, ELSEWHERE, bring, datagram, heard, left, made, scene};
use sandbox::{
    await_drift, checksum, container, converge, in_router, ip_packet, name, next_packet, router, sh,
    takes_programs, udp_packet, underlay,
};

/// Flags of TCP.
const SYN: u8 = 0x02;
const ACK: u8 = 0x10;

/// Runs the test where the kernel takes programs; elsewhere it is said that it does not.
fn run(test: &str, body: impl FnOnce(&Path) + Send + 'static) {
    sandbox::run(test, |dir| {
        if takes_programs() {
            body(dir);
        } else {
            println!("skipped: this user namespace may not load programs");
        }
    });
}

/// The scene made, each end known to the other, and its forward hook counting.
struct Scene {
    kernel: Kernel,
    inside: Netns,
    socket: UdpSocket,
    queue: Queue,
}

impl Scene {
    fn made(dir: &Path) -> Self {
        let (kernel, inside, socket, queue) = made(dir);
        let scene = Self { kernel, inside, socket, queue };
        in_router(
            &scene.kernel,
            "nft 'table ip seen {
               counter stack { }
               chain c {
                 type filter hook forward priority -400;
                 counter name stack
               }
             }'",
        );
        // The container is a neighbour once the stack has asked for it.
        bring(&scene.queue, &datagram(ELSEWHERE, CONTAINER, "first"));
        assert_eq!(heard(&scene.socket).1, "first");
        scene
    }

    /// How many packets the stack has forwarded.
    fn by_stack(&self) -> u64 {
        let text = in_router(&self.kernel, "nft list counter ip seen stack");
        text.split_whitespace().skip_while(|word| *word != "packets").nth(1).unwrap().parse().unwrap()
    }

    /// Counts in the container what comes in and matches.
    fn count_inside(&self, rule: &str) {
        let script = format!(
            "nft 'table ip seen {{
               counter hits {{ }}
               chain c {{
                 type filter hook prerouting priority -400;
                 {rule} counter name hits
               }}
             }}'"
        );
        self.inside.run(|| sh(&script)).unwrap();
    }

    fn await_hits(&self, count: u64) {
        let deadline = Instant::now() + Duration::from_secs(5);
        let expected = format!("packets {count} ");
        loop {
            let text = self.inside.run(|| sh("nft list counter ip seen hits")).unwrap();
            if text.contains(&expected) {
                return;
            }
            assert!(Instant::now() < deadline, "{text}");
        }
    }

    /// The kind and the code of the next ICMP message by the TUN device, whatever else leaves meanwhile.
    fn icmp(&self) -> (u8, u8) {
        loop {
            let (_, packet) = next_packet(&self.queue);
            if packet[9] == 1 {
                return (packet[20], packet[21]);
            }
        }
    }
}

/// The IP header made anew after `change`.
fn changed(mut packet: Vec<u8>, change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    change(&mut packet);
    packet[10..12].fill(0);
    let header = usize::from(packet[0] & 15) * 4;
    let sum = checksum(&packet[..header]);
    packet[10..12].copy_from_slice(&sum);
    packet
}

/// A TCP segment, its checksum left out, with an MSS option of 9,000 where it is a SYN.
fn segment(from: &str, flags: u8, payload: usize) -> Vec<u8> {
    let options: &[u8] = if flags & SYN == 0 { &[] } else { &[2, 4, 0x23, 0x28] };
    let offset = (20 + options.len() as u8) << 2;
    let mut bytes = vec![0, 9, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, offset, flags, 16, 0, 0, 0, 0, 0];
    bytes.extend(options);
    bytes.resize(bytes.len() + payload, 7);
    ip_packet(6, from.parse().unwrap(), CONTAINER.parse().unwrap(), &bytes)
}

/// Lets a TCP superpacket come by the TUN device (`struct virtio_net_hdr`): to be cut into segments of so many bytes.
fn bring_super(queue: &Queue, packet: &[u8], size: u16) {
    const NEEDS_CHECKSUM: u8 = 1;
    const TCPV4: u8 = 1;
    let [s0, s1] = size.to_ne_bytes();
    let [h0, h1] = 40_u16.to_ne_bytes();
    let [c0, c1] = 20_u16.to_ne_bytes();
    let [o0, o1] = 16_u16.to_ne_bytes();
    let header: [u8; tun::HEADER] = [NEEDS_CHECKSUM, TCPV4, h0, h1, s0, s1, c0, c1, o0, o1];
    assert!(queue.write(&[IoSlice::new(&header), IoSlice::new(packet)]).unwrap());
}

#[test]
fn datagrams_between_a_container_and_another_host_go_past_the_stack_both_ways() {
    run("datagrams_between_a_container_and_another_host_go_past_the_stack_both_ways", |dir| {
        let scene = Scene::made(dir);
        scene.count_inside("ip ttl 63 ip saddr 10.42.128.5");
        let before = scene.by_stack();
        for round in 0..10 {
            bring(&scene.queue, &datagram(ELSEWHERE, CONTAINER, "question"));
            assert_eq!(heard(&scene.socket), (ELSEWHERE.to_owned(), "question".to_owned()), "{round}");
            scene.socket.send_to(b"answer", (ELSEWHERE, 9)).unwrap();
            let (_, packet) = next_packet(&scene.queue);
            assert_eq!((packet[8], &packet[28..]), (63, &b"answer"[..]), "one router on the way");
            assert_eq!(checksum(&packet[..20]), [0, 0], "the header's checksum is right");
        }
        scene.await_hits(10);
        assert_eq!(scene.by_stack(), before);
        // The checksum's carry: one packet for each sum there can be near it.
        for id in 0..=u16::MAX {
            if id % 257 != 0 {
                continue;
            }
            let packet = changed(datagram(ELSEWHERE, CONTAINER, "checksum"), |packet| {
                packet[4..6].copy_from_slice(&id.to_be_bytes());
            });
            bring(&scene.queue, &packet);
            assert_eq!(heard(&scene.socket).1, "checksum", "id {id}");
        }
        assert_eq!(scene.by_stack(), before);
    });
}

#[test]
fn what_needs_the_stack_is_left_to_it_and_comes_through() {
    run("what_needs_the_stack_is_left_to_it_and_comes_through", |dir| {
        let scene = Scene::made(dir);
        let plain = || datagram(ELSEWHERE, CONTAINER, "text");
        let with_options = changed(plain(), |packet| {
            packet.splice(20..20, [1, 1, 1, 0]);
            packet[0] = 0x46;
            packet[3] += 4;
        });
        let cases = [
            ("with IP options", with_options),
            ("from behind a foreign peer", datagram(BEHIND_PEER, CONTAINER, "text")),
            ("with a priority", changed(plain(), |packet| packet[1] = 0x10)),
        ];
        for (what, packet) in cases {
            let before = scene.by_stack();
            bring(&scene.queue, &packet);
            assert_eq!(heard(&scene.socket).1, "text", "{what}");
            assert_eq!(scene.by_stack(), before + 1, "{what}");
        }
        // In two fragments.
        let before = scene.by_stack();
        let whole = udp_packet(&format!("{ELSEWHERE}:9"), &format!("{CONTAINER}:7"), &[b'x'; 16]);
        for (from, to, bits) in [(20, 36, [0x20, 0]), (36, 44, [0, 2])] {
            let part = [&whole[..20], &whole[from..to]].concat();
            bring(
                &scene.queue,
                &changed(part, |packet| {
                    packet[3] = packet.len() as u8;
                    packet[5] = 9;
                    packet[6..8].copy_from_slice(&bits);
                }),
            );
        }
        assert_eq!(heard(&scene.socket).1, "x".repeat(16));
        assert!(scene.by_stack() > before);
        // Padded: cut to what the header says.
        bring(&scene.queue, &[plain(), vec![0; 9]].concat());
        assert_eq!(heard(&scene.socket).1, "text");
        // A query of another host, for a server in the container.
        let server = scene.inside.run(|| UdpSocket::bind((CONTAINER, 53)).unwrap()).unwrap();
        server.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let before = scene.by_stack();
        bring(&scene.queue, &udp_packet(&format!("{ELSEWHERE}:9"), &format!("{CONTAINER}:53"), b"question"));
        assert_eq!(heard(&server).1, "question");
        assert_eq!(scene.by_stack(), before + 1);
    });
}

#[test]
fn a_syn_has_its_mss_clamped_and_what_follows_goes_past_the_stack() {
    run("a_syn_has_its_mss_clamped_and_what_follows_goes_past_the_stack", |dir| {
        let scene = Scene::made(dir);
        scene.count_inside("tcp flags syn tcp option maxseg size < 1461");
        let before = scene.by_stack();
        bring(&scene.queue, &segment(ELSEWHERE, SYN, 0));
        scene.await_hits(1);
        assert_eq!(scene.by_stack(), before + 1);
        scene.inside.run(|| sh("nft delete table ip seen")).unwrap();
        scene.count_inside("tcp flags ack");
        bring(&scene.queue, &segment(ELSEWHERE, ACK, 100));
        scene.await_hits(1);
        assert_eq!(scene.by_stack(), before + 1);
    });
}

#[test]
fn a_superpacket_stays_whole_if_its_segments_fit_and_is_refused_if_not() {
    run("a_superpacket_stays_whole_if_its_segments_fit_and_is_refused_if_not", |dir| {
        let scene = Scene::made(dir);
        scene.count_inside("tcp flags ack meta length > 20000");
        let before = scene.by_stack();
        let long = changed(segment(ELSEWHERE, ACK, 30_000), |packet| packet[6] = 0x40);
        bring_super(&scene.queue, &long, 1000);
        scene.await_hits(1);
        assert_eq!(scene.by_stack(), before);
        bring_super(&scene.queue, &long, 2000);
        assert_eq!(scene.icmp(), (3, 4), "fragmentation needed");
        scene.await_hits(1);
    });
}

#[test]
fn a_superpacket_that_is_longer_than_its_header_can_say_goes_past_the_stack_whole() {
    run("a_superpacket_that_is_longer_than_its_header_can_say_goes_past_the_stack_whole", |dir| {
        let scene = Scene::made(dir);
        if !scene.queue.takes_long() {
            return;
        }
        scene.count_inside("tcp flags ack meta length > 65535");
        let before = scene.by_stack();
        // No `segment` is so long: the rest is put behind one, and the length is taken out.
        let mut long = segment(ELSEWHERE, ACK, 1000);
        long.resize(long.len() + 150_000, 7);
        let long = changed(long, |packet| packet[2..4].fill(0));
        bring_super(&scene.queue, &long, 1000);
        scene.await_hits(1);
        assert_eq!(scene.by_stack(), before);
        // Of anything else the length must be true.
        let lying = changed(segment(ELSEWHERE, ACK, 100), |packet| packet[2..4].fill(0));
        bring(&scene.queue, &lying);
        bring(
            &scene.queue,
            &changed(datagram(ELSEWHERE, CONTAINER, "no length"), |packet| packet[2..4].fill(0)),
        );
        bring(&scene.queue, &datagram(ELSEWHERE, CONTAINER, "welcome"));
        assert_eq!(heard(&scene.socket).1, "welcome");
        scene.await_hits(1);
    });
}

#[test]
fn what_cannot_be_handed_on_is_answered_for_by_the_stack() {
    run("what_cannot_be_handed_on_is_answered_for_by_the_stack", |dir| {
        let scene = Scene::made(dir);
        // First: the kernel sends one of these a second to each, and counts other errors.
        bring(&scene.queue, &datagram(ELSEWHERE, "10.42.250.1", "nobody's block"));
        assert_eq!(scene.icmp(), (3, 1), "host unreachable");
        let ends = changed(datagram(ELSEWHERE, CONTAINER, "text"), |packet| packet[8] = 1);
        bring(&scene.queue, &ends);
        assert_eq!(scene.icmp(), (11, 0), "time exceeded");
        let last = changed(datagram(ELSEWHERE, CONTAINER, "the last"), |packet| packet[8] = 2);
        let before = scene.by_stack();
        bring(&scene.queue, &last);
        assert_eq!(heard(&scene.socket).1, "the last");
        assert_eq!(scene.by_stack(), before);
        bring(&scene.queue, &datagram(ELSEWHERE, "10.42.64.120", "nobody's address"));
        assert_eq!(scene.icmp(), (3, 1), "host unreachable");
        let long = datagram(ELSEWHERE, CONTAINER, &"x".repeat(2000));
        bring(&scene.queue, &changed(long.clone(), |packet| packet[6] = 0x40));
        assert_eq!(scene.icmp(), (3, 4), "fragmentation needed");
        bring(&scene.queue, &long);
        assert_eq!(heard(&scene.socket).1.len(), 2000, "in fragments");
    });
}

#[test]
fn who_speaks_in_the_routers_name_or_a_strangers_is_judged_by_the_stack() {
    run("who_speaks_in_the_routers_name_or_a_strangers_is_judged_by_the_stack", |dir| {
        let scene = Scene::made(dir);
        let own =
            in_router(&scene.kernel, "ip -4 -o addr show dev br0 | grep -o '10.42.64[0-9.]*' | head -1");
        // The data path itself may speak in the router's name: the stack allows that of this device.
        for from in [own.trim(), "10.42.0.1"] {
            let before = scene.by_stack();
            bring(&scene.queue, &datagram(from, CONTAINER, "the router's"));
            assert_eq!(heard(&scene.socket).1, "the router's");
            assert_eq!(scene.by_stack(), before + 1, "{from}");
        }
        for from in ["10.43.0.1", "192.0.2.1"] {
            bring(&scene.queue, &datagram(from, CONTAINER, "forbidden"));
        }
        let before = scene.by_stack();
        let elsewhere: Ipv4Addr = "10.42.128.6".parse().unwrap();
        bring(&scene.queue, &datagram(ELSEWHERE, &elsewhere.to_string(), "on"));
        assert_eq!(left(&scene.queue).3, "on");
        assert_eq!(scene.by_stack(), before + 1, "the stack's business");
        bring(&scene.queue, &datagram(ELSEWHERE, CONTAINER, "welcome"));
        assert_eq!(heard(&scene.socket).1, "welcome", "and nothing before it");
    });
}

#[test]
fn a_program_that_is_taken_away_or_crowded_or_whose_device_is_another_is_made_anew() {
    run("a_program_that_is_taken_away_or_crowded_or_whose_device_is_another_is_made_anew", |dir| {
        underlay();
        let (_inside, path) = container(dir, "c98");
        let mut kernel = Kernel::open(dir).unwrap();
        let desired = scene(&path);
        assert!(converge(&mut kernel, &desired) <= 3);
        for (command, expected) in [
            ("tc qdisc del dev br0 clsact", "br0"),
            ("tc filter del dev tun0 ingress", "tun0"),
            ("tc filter add dev br0 ingress prio 5 protocol ip u32 match u32 0 0", "br0"),
            ("ip link del tun0", "br0"),
        ] {
            in_router(&kernel, command);
            let started = Instant::now();
            let mut drift = await_drift(&mut kernel, &desired);
            // The device goes first, and what named it is seen with it or after it.
            drift.extend(
                diff(kernel.observe(&desired).unwrap(), &desired, &Scope::Everything).into_iter().map(
                    |step| match step {
                        plan::Step::Remove(place, key)
                        | plan::Step::Add(place, key, _)
                        | plan::Step::Change(place, key, ..) => (place, key),
                    },
                ),
            );
            assert!(drift.contains(&(router(), Key::Program(name(expected)))), "{command}: {drift:?}");
            assert!(converge(&mut kernel, &desired) <= 3, "{command}");
            assert!(started.elapsed() < Duration::from_secs(5), "{command}: took {:?}", started.elapsed());
            let observed = kernel.observe(&desired).unwrap().clone();
            kernel.resync().unwrap();
            assert_eq!(*kernel.observe(&desired).unwrap(), observed, "{command}: events and dump agree");
        }
        // Who comes after us finds all as it should be.
        drop(kernel);
        let mut kernel = Kernel::open(dir).unwrap();
        assert_eq!(converge(&mut kernel, &desired), 0);
    });
}

#[test]
fn a_kernel_that_takes_no_programs_says_so_and_for_good() {
    const TEST: &str = "a_kernel_that_takes_no_programs_says_so_and_for_good";
    sandbox::run(TEST, |dir| {
        if takes_programs() {
            // Again, where it does not.
            let mut unshare = Command::new("unshare");
            unshare
                .args(["--user", "--map-root-user", "--net", "--mount"])
                .arg(std::env::current_exe().unwrap());
            match unshare.args(["--exact", TEST, "--nocapture"]).status() {
                Ok(status) => assert!(status.success()),
                Err(error) => panic!("util-linux is installed: {error}"),
            }
            return;
        }
        underlay();
        let (_inside, path) = container(dir, "c98");
        let mut kernel = Kernel::open(dir).unwrap();
        let mut wanted = scene(&path);
        converge(&mut kernel, &wanted);
        let (place, key, program) = sandbox::scene::a_program();
        wanted.insert((place, key), program);
        let steps = diff(kernel.observe(&wanted).unwrap(), &wanted, &Scope::Everything);
        assert_eq!(steps.len(), 1, "{steps:?}");
        let refused = kernel.apply(&steps[0]).unwrap_err();
        assert!(!refused.source.is_passing(), "{refused}");
        assert!(refused.to_string().contains("load a program"), "{refused}");
    });
}
