//! What tunnels stand on: TUN devices and their queues, and UDP sockets; in real namespaces.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod sandbox;

use std::io::IoSlice;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path as FilePath;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use linux::Kernel;
use linux::netns::Netns;
use linux::tun::{self, Queue, Queues};
use linux::udp::{Family, Path, Received, Send, Socket, path_mtu};
use nix::errno::Errno;
use nix::libc;
use plan::object::{Link, LinkKind, Route, RouteKind, TABLE_MAIN};
use plan::{Key, Object, Scope, State, Step, diff};
use sandbox::{
    await_drift, await_readable, converge, in_router, ip, name, network, next_packet, router, sh, udp_packet,
};

/// A router with a TUN device, and a route into it.
fn with_tun() -> State {
    let link = |kind| {
        let (mtu, gso_max_size) = (Some(1400), Some(60_000));
        Object::Link(Link {
            kind,
            mac: None,
            mtu,
            gso_max_size,
            gso_ipv4_max_size: None,
            master: None,
            up: true,
            peer: None,
        })
    };
    let route = |kind, dev: Option<&str>, src: Option<&str>| {
        Object::Route(Route { kind, via: None, dev: dev.map(name), src: src.map(ip), metric: 0 })
    };
    let net = |text: &str| text.parse().unwrap();
    [
        (Key::Netns, Object::Netns { name: "droveway-test".to_owned() }),
        (Key::Link(name("br0")), link(LinkKind::Bridge { link_local_learning: false })),
        (Key::Link(name("tun0")), link(LinkKind::Tun)),
        (Key::Address(name("br0"), net("10.42.64.65/16")), Object::Address),
        (Key::Route(TABLE_MAIN, net("10.42.0.0/16")), route(RouteKind::Unreachable, None, None)),
        (
            Key::Route(TABLE_MAIN, net("10.42.65.0/26")),
            route(RouteKind::Unicast, Some("tun0"), Some("10.42.64.65")),
        ),
    ]
    .into_iter()
    .map(|(key, object)| ((router(), key), object))
    .collect()
}

fn queue(kernel: &Kernel) -> Queue {
    Queue::open(kernel.router_netns(&network()).unwrap(), "tun0").unwrap()
}

#[test]
fn a_tun_device_is_made_of_a_diff_and_is_what_was_asked_for() {
    sandbox::run("a_tun_device_is_made_of_a_diff_and_is_what_was_asked_for", |dir| {
        let mut kernel = Kernel::open(dir).unwrap();
        let desired = with_tun();
        assert!(converge(&mut kernel, &desired) <= 2);
        let observed = kernel.observe(&desired).unwrap().clone();
        assert_eq!(observed.len(), desired.len(), "{observed:#?}");
        kernel.resync().unwrap();
        assert_eq!(*kernel.observe(&desired).unwrap(), observed, "what events told is what a dump tells");
        let shown = in_router(&kernel, "ip -d link show tun0; ip addr show tun0");
        for expected in
            ["persist on", "multi_queue", "vnet_hdr on", "qlen 32", "mtu 1400", "gso_max_size 60000"]
        {
            assert!(shown.contains(expected), "{expected}: {shown}");
        }
        assert!(!shown.contains("fe80"), "{shown}");
        // Doing it again is fine.
        let (key, object) = desired.get_key_value(&(router(), Key::Link(name("tun0")))).unwrap();
        kernel.apply(&Step::Add(key.0.clone(), key.1.clone(), object.clone())).unwrap();
        assert_eq!(converge(&mut kernel, &desired), 0);
        converge(&mut kernel, &State::new());
        assert_eq!(*kernel.observe(&State::new()).unwrap(), State::new());
    });
}

#[test]
fn whatever_is_done_to_a_tun_device_is_seen_and_healed() {
    sandbox::run("whatever_is_done_to_a_tun_device_is_seen_and_healed", |dir| {
        let mut kernel = Kernel::open(dir).unwrap();
        let desired = with_tun();
        converge(&mut kernel, &desired);
        for command in [
            "ip link del tun0",
            "ip link set tun0 down",
            "ip link set tun0 mtu 1300",
            "ip link set tun0 down; ip link set tun0 name other",
            "ip link del tun0; ip link add tun0 type bridge",
            "ip link del tun0; ip tuntap add tun0 mode tap multi_queue vnet_hdr",
            "ip link del tun0; ip tuntap add tun0 mode tun",
        ] {
            in_router(&kernel, command);
            let drift = await_drift(&mut kernel, &desired);
            assert!(drift.contains(&(router(), Key::Link(name("tun0")))), "{command}: {drift:?}");
            assert!(converge(&mut kernel, &desired) <= 3, "{command}");
            let observed = kernel.observe(&desired).unwrap().clone();
            kernel.resync().unwrap();
            assert_eq!(*kernel.observe(&desired).unwrap(), observed, "{command}: events and dump agree");
            drop(queue(&kernel));
        }
    });
}

#[test]
fn who_sends_little_does_not_wait_behind_who_sends_much_and_keeps_its_order() {
    sandbox::run("who_sends_little_does_not_wait_behind_who_sends_much_and_keeps_its_order", |dir| {
        let mut kernel = Kernel::open(dir).unwrap();
        converge(&mut kernel, &with_tun());
        let ns = kernel.router_netns(&network()).unwrap();
        let queues = Queues::open(ns, "tun0", 2).unwrap();
        if let Some(why) = &queues.unsteered {
            assert!(queues.sparse.is_empty(), "{why}");
            assert!(why.to_string().contains("user namespace"), "only for want of privileges: {why}");
            return;
        }
        let open = || ns.run(|| Socket::bind(Family::V4, 0).unwrap()).unwrap();
        let path = Path { local: any(Family::V4, 0), remote: "10.42.65.3:7".parse().unwrap() };
        let send = |socket: &Socket, number: u8| {
            let bytes = [number; 1300];
            assert_eq!(sent(socket, &[Send { path, bytes: &bytes, segment: 1300, tos: 0 }]), Ok(1));
        };
        // Where the next packet waits, sparse queues first: whether in one of those, which worker's, and its number.
        let next = || {
            let mut buffer = [0; 2048];
            [(true, &queues.sparse), (false, &queues.bulk)].into_iter().find_map(|(sparse, queues)| {
                queues.iter().enumerate().find_map(|(worker, queue)| {
                    let length = queue.read(&mut buffer).unwrap()?;
                    Some((sparse, worker, buffer[length - 1]))
                })
            })
        };
        // A bucket leaks by the clock, and a slow machine is no fault: then another flow tries it again.
        let until = Instant::now() + Duration::from_secs(20);
        let much = loop {
            assert!(Instant::now() < until, "this machine sends no hundred datagrams in 10 ms");
            let (much, little, begun) = (open(), open(), Instant::now());
            // One flow fills its bucket, and is with the same worker all along.
            let mut seen = Vec::new();
            for number in 0..60 {
                send(&much, number);
                seen.push(next().expect("a packet"));
            }
            let nothing = next();
            // Beside it, another does not wait.
            for number in 100..105 {
                send(&much, number);
            }
            send(&little, 200);
            let order: Vec<_> =
                std::iter::from_fn(next).map(|(sparse, _, number)| (sparse, number)).collect();
            assert!(nothing.is_none());
            assert_eq!(seen.iter().map(|it| it.2).collect::<Vec<_>>(), (0..60).collect::<Vec<_>>());
            assert!(seen.iter().all(|it| it.1 == seen[0].1), "{seen:?}");
            if begun.elapsed() > Duration::from_millis(10) {
                continue;
            }
            let turned = seen.iter().position(|it| !it.0).expect("it becomes bulk");
            assert!((20..40).contains(&turned) && seen[turned..].iter().all(|it| !it.0), "{seen:?}");
            let bulk = (100..105).map(|number| (false, number));
            if order == std::iter::once((true, 200)).chain(bulk).collect::<Vec<_>>() {
                break much;
            }
            // Two flows in five hundred share a bucket.
            assert!(order.iter().all(|it| !it.0), "{order:?}");
        };
        // After a pause it is sparse again: time is what is waited for.
        let until = Instant::now() + Duration::from_secs(10);
        loop {
            std::thread::sleep(Duration::from_millis(100));
            send(&much, 1);
            if next().expect("a packet").0 {
                break;
            }
            assert!(Instant::now() < until, "it stays bulk");
        }
    });
}

#[test]
fn a_queue_reads_what_the_router_sends_and_what_it_writes_arrives() {
    sandbox::run("a_queue_reads_what_the_router_sends_and_what_it_writes_arrives", |dir| {
        let mut kernel = Kernel::open(dir).unwrap();
        converge(&mut kernel, &with_tun());
        let queue = queue(&kernel);
        assert!(queue.offloads().checksum && queue.offloads().tso, "{:?}", queue.offloads());
        assert_eq!(queue.read(&mut [0; 2048]).unwrap(), None);
        let ns = kernel.router_netns(&network()).unwrap();
        let socket = ns.run(|| Socket::bind(Family::V4, 0).unwrap()).unwrap();
        let path = Path { local: any(Family::V4, 0), remote: "10.42.65.3:7".parse().unwrap() };
        assert_eq!(sent(&socket, &[Send { path, bytes: b"question", segment: 8, tos: 0 }]), Ok(1));
        let (_, packet) = next_packet(&queue);
        assert_eq!(packet[12..20], [10, 42, 64, 65, 10, 42, 65, 3]);
        assert_eq!(&packet[28..], b"question");

        let answer = udp_packet("10.42.65.3:7", &format!("10.42.64.65:{}", socket.port()), b"answer");
        let (before, after) = answer.split_at(20);
        let header = [0; tun::HEADER];
        assert!(queue.write(&[IoSlice::new(&header), IoSlice::new(before), IoSlice::new(after)]).unwrap());
        let (received, bytes) = next_message(&socket);
        assert_eq!((received.path.remote, &bytes[..]), (path.remote, &b"answer"[..]));
        assert_eq!(received.path.local.ip(), ip("10.42.64.65"));

        // Many datagrams are one packet to read, where the kernel leaves the cutting to us.
        if queue.offloads().uso {
            let bytes = vec![7; 40 * 1200];
            assert_eq!(sent(&socket, &[Send { path, bytes: &bytes, segment: 1200, tos: 0 }]), Ok(1));
            let (header, packet) = next_packet(&queue);
            assert_eq!((header[1], u16::from_ne_bytes([header[4], header[5]])), (5, 1200));
            assert_eq!(packet.len(), 28 + bytes.len());
        }
    });
}

#[test]
fn a_tun_device_outlives_a_killed_reader_and_its_routes_stay() {
    sandbox::run("a_tun_device_outlives_a_killed_reader_and_its_routes_stay", |dir| {
        let mut kernel = Kernel::open(dir).unwrap();
        let desired = with_tun();
        converge(&mut kernel, &desired);
        let reader = queue(&kernel);
        let held = reader.as_fd().try_clone_to_owned().unwrap();
        let mut child = Command::new("sleep").arg("60").stdin(Stdio::from(held)).spawn().unwrap();
        drop(reader);
        let shown = || in_router(&kernel, "ip link show tun0");
        assert!(shown().contains("LOWER_UP"), "its queue is open: {}", shown());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(shown().contains("NO-CARRIER"), "{}", shown());
        // Nothing is sent anywhere else.
        let ns = kernel.router_netns(&network()).unwrap();
        let socket = ns.run(|| Socket::bind(Family::V4, 0).unwrap()).unwrap();
        let path = Path { local: any(Family::V4, 0), remote: "10.42.65.3:7".parse().unwrap() };
        assert_eq!(sent(&socket, &[Send { path, bytes: b"lost", segment: 4, tos: 0 }]), Ok(1));
        for _ in 0..2 {
            let steps = diff(kernel.observe(&desired).unwrap(), &desired, &Scope::Everything);
            assert_eq!(steps, []);
            kernel.resync().unwrap();
        }
        // An agent that starts now finds all there.
        drop(kernel);
        let mut kernel = Kernel::open(dir).unwrap();
        assert_eq!(converge(&mut kernel, &desired), 0);
        let reader = queue(&kernel);
        assert_eq!(sent(&socket, &[Send { path, bytes: b"found", segment: 5, tos: 0 }]), Ok(1));
        assert_eq!(&next_packet(&reader).1[28..], b"found");
        assert_eq!(converge(&mut kernel, &desired), 0);
    });
}

#[test]
fn opening_a_queue_makes_no_device_and_a_device_that_goes_is_told() {
    sandbox::run("opening_a_queue_makes_no_device_and_a_device_that_goes_is_told", |dir| {
        let mut kernel = Kernel::open(dir).unwrap();
        converge(&mut kernel, &with_tun());
        let ns = kernel.router_netns(&network()).unwrap();
        for (device, errno) in [("tun1", Errno::ENODEV), ("br0", Errno::EINVAL), ("", Errno::EINVAL)] {
            let error = Queue::open(ns, device).unwrap_err();
            assert_eq!(error.errno, Some(errno), "{device}: {error}");
        }
        assert!(!in_router(&kernel, "ip link").contains("tun1"));
        let queue = queue(&kernel);
        in_router(&kernel, "ip link del tun0");
        await_readable(&queue);
        let error = queue.read(&mut [0; 2048]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADFD), "{error}");
        let header = [0; tun::HEADER];
        assert!(queue.write(&[IoSlice::new(&header), IoSlice::new(&[0x45; 20])]).is_err());
    });
}

fn any(family: Family, port: u16) -> SocketAddr {
    match family {
        Family::V4 => SocketAddr::new(ip("0.0.0.0"), port),
        Family::V6 => SocketAddr::new(ip("::"), port),
    }
}

/// How many messages went, if all did; or how many did before the one that did not, and why.
fn sent(socket: &Socket, messages: &[Send<'_>]) -> Result<usize, (usize, Errno)> {
    match socket.send(messages) {
        (count, Ok(())) => Ok(count),
        (count, Err(error)) => Err((count, Errno::from_raw(error.raw_os_error().unwrap()))),
    }
}

/// The next message, and its bytes.
fn next_message(socket: &Socket) -> (Received, Vec<u8>) {
    let mut buffers = [vec![0; 65_536]];
    let mut out = Vec::new();
    await_readable(socket);
    assert_eq!(socket.receive(&mut buffers, &mut out).unwrap(), 1);
    let [bytes] = buffers;
    (out[0], bytes[..out[0].len].to_vec())
}

/// Two addresses of each family on loopback.
fn addresses() {
    sh("ip addr add 10.9.9.1/32 dev lo; ip addr add 10.9.9.2/32 dev lo; \
        ip addr add fd09::1/128 dev lo nodad; ip addr add fd09::2/128 dev lo nodad");
    await_local("fd09::1");
    await_local("fd09::2");
}

/// The kernel takes a new IPv6 address as its own by and by.
fn await_local(address: &str) {
    let deadline = Instant::now() + Duration::from_secs(5);
    while !sh("ip -6 route show table local").contains(&format!("local {address} ")) {
        assert!(Instant::now() < deadline, "{address} is not there");
    }
}

const FAMILIES: [(Family, &str, &str); 2] =
    [(Family::V4, "10.9.9.1", "10.9.9.2"), (Family::V6, "fd09::1", "fd09::2")];

#[test]
fn a_message_of_many_datagrams_arrives_as_one_with_its_stride_or_as_many() {
    sandbox::run("a_message_of_many_datagrams_arrives_as_one_with_its_stride_or_as_many", |_| {
        addresses();
        for (family, near, far) in FAMILIES {
            let sender = Socket::bind(family, 0).unwrap();
            let receiver = Socket::bind(family, 0).unwrap();
            assert!(sender.gso() && receiver.gro());
            let bytes: Vec<u8> = (0..10_500_u32).map(|n| n as u8).collect();
            let to =
                |port| Path { local: SocketAddr::new(ip(near), 0), remote: SocketAddr::new(ip(far), port) };
            let message = Send { path: to(receiver.port()), bytes: &bytes, segment: 1000, tos: 0 };
            assert_eq!(sent(&sender, &[message]), Ok(1));
            let (received, whole) = next_message(&receiver);
            assert_eq!((received.len, received.stride), (10_500, 1000));
            assert!(whole == bytes);

            let plain = UdpSocket::bind((ip(far), 0)).unwrap();
            let path = to(plain.local_addr().unwrap().port());
            assert_eq!(sent(&sender, &[Send { path, ..message }]), Ok(1));
            plain.set_nonblocking(true).unwrap();
            let mut lengths = Vec::new();
            let mut whole = Vec::new();
            let mut buffer = vec![0; 65_536];
            while let Ok(length) = plain.recv(&mut buffer) {
                lengths.push(length);
                whole.extend_from_slice(&buffer[..length]);
            }
            assert_eq!(lengths, [[1000; 10].as_slice(), &[500]].concat());
            assert!(whole == bytes);
        }
    });
}

#[test]
fn a_message_larger_than_the_kernel_takes_at_once_arrives_whole() {
    sandbox::run("a_message_larger_than_the_kernel_takes_at_once_arrives_whole", |_| {
        let (sender, receiver) = (Socket::bind(Family::V4, 0).unwrap(), Socket::bind(Family::V4, 0).unwrap());
        let path =
            Path { local: any(Family::V4, 0), remote: SocketAddr::new(ip("127.0.0.1"), receiver.port()) };
        for (length, segment, parts) in [(200_000, 1472, 4), (5_000, 10, 8), (65_507, 65_507, 1), (0, 0, 1)] {
            let bytes: Vec<u8> = (0..length).map(|n: u32| (n % 251) as u8).collect();
            assert_eq!(sent(&sender, &[Send { path, bytes: &bytes, segment, tos: 0 }]), Ok(1));
            let mut whole = Vec::new();
            for _ in 0..parts {
                let (received, part) = next_message(&receiver);
                assert!(part.len() <= received.stride || received.stride == segment, "{received:?}");
                whole.extend(part);
            }
            assert!(whole == bytes, "{length} bytes by {segment}");
        }
        assert_eq!(receiver.receive(&mut [vec![0; 9]], &mut Vec::new()).unwrap(), 0, "nothing is left");
    });
}

#[test]
fn many_messages_go_and_come_in_one_call_each_in_order() {
    sandbox::run("many_messages_go_and_come_in_one_call_each_in_order", |_| {
        let (sender, receiver) = (Socket::bind(Family::V4, 0).unwrap(), Socket::bind(Family::V4, 0).unwrap());
        let path =
            Path { local: any(Family::V4, 0), remote: SocketAddr::new(ip("127.0.0.1"), receiver.port()) };
        let bytes: Vec<[u8; 2]> = (0..150_u16).map(u16::to_be_bytes).collect();
        let messages: Vec<_> =
            bytes.iter().map(|bytes| Send { path, bytes, segment: usize::MAX, tos: 0 }).collect();
        assert_eq!(sent(&sender, &messages), Ok(150));
        let mut buffers = vec![vec![0; 2048]; 16];
        let mut out = Vec::new();
        let mut came = Vec::new();
        for expected in [16, 16, 16, 16, 16, 16, 16, 16, 16, 6, 0] {
            assert_eq!(receiver.receive(&mut buffers, &mut out).unwrap(), expected);
            assert_eq!(out.len(), expected);
            came.extend(out.iter().zip(&buffers).map(|(received, buffer)| buffer[..received.len].to_vec()));
        }
        assert_eq!(came, bytes);
    });
}

#[test]
fn a_datagram_tells_to_which_address_it_came_and_is_answered_from_there() {
    sandbox::run("a_datagram_tells_to_which_address_it_came_and_is_answered_from_there", |_| {
        addresses();
        for (family, near, far) in FAMILIES {
            let (a, b) = (Socket::bind(family, 0).unwrap(), Socket::bind(family, 0).unwrap());
            for (from, to) in [(near, far), (far, near), (far, far)] {
                let there = Path {
                    local: SocketAddr::new(ip(from), a.port()),
                    remote: SocketAddr::new(ip(to), b.port()),
                };
                assert_eq!(sent(&a, &[Send { path: there, bytes: b"?", segment: 1, tos: 0 }]), Ok(1));
                let (received, _) = next_message(&b);
                assert_eq!(received.path, Path { local: there.remote, remote: there.local });
                assert_eq!(sent(&b, &[Send { path: received.path, bytes: b"!", segment: 1, tos: 0 }]), Ok(1));
                assert_eq!(next_message(&a).0.path, there);
            }
            let elsewhere = if family == Family::V4 { "10.9.9.3" } else { "fd09::3" };
            let path = Path {
                local: SocketAddr::new(ip(elsewhere), 0),
                remote: SocketAddr::new(ip(near), b.port()),
            };
            let bytes = [0; 100];
            let refused = sent(&a, &[Send { path, bytes: &bytes, segment: 10, tos: 0 }]).unwrap_err();
            assert!(matches!(refused, (0, Errno::EINVAL | Errno::ENETUNREACH)), "{family:?} {refused:?}");
            assert!(a.gso(), "that is no reason to give up segmentation");
        }
    });
}

#[test]
fn a_link_local_path_leads_back() {
    sandbox::run("a_link_local_path_leads_back", |_| {
        sh("ip link add va type veth peer name vb; ip link set va up; ip link set vb up; \
            ip addr add fe80::a/64 dev va nodad");
        await_local("fe80::a");
        let index = |device: &str| nix::net::if_::if_nametoindex(device).unwrap();
        let (a, b) = (Socket::bind(Family::V6, 0).unwrap(), Socket::bind(Family::V6, 0).unwrap());
        // Both are this machine's: what is sent to its own address comes by the same device.
        let address = |text: &str, port, device| {
            SocketAddr::V6(std::net::SocketAddrV6::new(text.parse().unwrap(), port, 0, index(device)))
        };
        let path =
            Path { local: address("fe80::a", a.port(), "va"), remote: address("fe80::a", b.port(), "va") };
        assert_eq!(sent(&a, &[Send { path, bytes: b"?", segment: 1, tos: 0 }]), Ok(1));
        let (received, _) = next_message(&b);
        assert_eq!(received.path, Path { local: path.remote, remote: path.local });
        assert_eq!(sent(&b, &[Send { path: received.path, bytes: b"!", segment: 1, tos: 0 }]), Ok(1));
        assert_eq!(next_message(&a).0.path, path);
    });
}

#[test]
fn dscp_and_ecn_travel_with_each_message() {
    sandbox::run("dscp_and_ecn_travel_with_each_message", |_| {
        addresses();
        for (family, near, far) in FAMILIES {
            let (a, b) = (Socket::bind(family, 0).unwrap(), Socket::bind(family, 0).unwrap());
            let path = Path {
                local: SocketAddr::new(ip(near), a.port()),
                remote: SocketAddr::new(ip(far), b.port()),
            };
            let back = Path { local: path.remote, remote: path.local };
            for tos in [0, 1, 2, 3, 0xb8, 0xba, 0xff] {
                let bytes = [7; 30];
                assert_eq!(sent(&a, &[Send { path, bytes: &bytes, segment: 10, tos }]), Ok(1));
                assert_eq!(next_message(&b).0.tos, tos);
                assert_eq!(sent(&b, &[Send { path: back, bytes: &bytes, segment: 30, tos }]), Ok(1));
                assert_eq!(next_message(&a).0.tos, tos);
            }
        }
    });
}

#[test]
fn what_is_too_large_for_the_device_is_refused_after_what_fits_was_sent() {
    sandbox::run("what_is_too_large_for_the_device_is_refused_after_what_fits_was_sent", |_| {
        addresses();
        sh("ip link set lo mtu 1500");
        for ((family, near, far), largest) in FAMILIES.into_iter().zip([1472, 1452]) {
            let (a, b) = (Socket::bind(family, 0).unwrap(), Socket::bind(family, 0).unwrap());
            let path = Path {
                local: SocketAddr::new(ip(near), a.port()),
                remote: SocketAddr::new(ip(far), b.port()),
            };
            let bytes = [7; 4000];
            let message = |length: usize, segment| Send { path, bytes: &bytes[..length], segment, tos: 0 };
            let fits = [message(100, 100), message(4000, largest), message(largest, largest)];
            assert_eq!(sent(&a, &fits), Ok(3));
            for large in [message(largest + 1, 4000), message(4000, largest + 1)] {
                assert_eq!(sent(&a, &[fits[0], fits[1], large, fits[2]]), Err((2, Errno::EMSGSIZE)));
                assert!(a.gso(), "that is no reason to give up segmentation");
            }
            let mut lengths = Vec::new();
            while lengths.len() < 7 {
                lengths.push(next_message(&b).1.len());
            }
            assert_eq!(lengths, [100, 4000, largest, 100, 4000, 100, 4000]);
            assert_eq!(a.path_mtu(ip(far)), Some(1500));
            assert_eq!(path_mtu(ip(if family == Family::V4 { "10.77.0.1" } else { "fd77::1" })), None);
        }
    });
}

/// `near` and `far` with a router between, whose way to `far` takes packets of 1280 bytes.
fn narrow(dir: &FilePath) -> (Netns, Netns) {
    let [near, between, far] = ["near", "between", "far"].map(|name| Netns::create_bound(dir, name).unwrap());
    let path = |name: &str| dir.join(name).display().to_string();
    sh(&format!(
        "ip link add va type veth peer name vb; ip link add vc mtu 1280 type veth peer name vd mtu 1280
         ip link set va netns {near}; ip link set vd netns {far}
         ip link set vb netns {between}; ip link set vc netns {between}",
        near = path("near"),
        between = path("between"),
        far = path("far")
    ));
    for (ns, commands) in [
        (&near, "ip addr add 10.1.0.1/24 dev va; ip link set va up; ip route add default via 10.1.0.2"),
        (&far, "ip addr add 10.2.0.1/24 dev vd; ip link set vd up; ip route add default via 10.2.0.2"),
        (
            &between,
            "ip addr add 10.1.0.2/24 dev vb; ip addr add 10.2.0.2/24 dev vc; ip link set vb up; \
             ip link set vc up; sysctl -qw net.ipv4.ip_forward=1",
        ),
    ] {
        ns.run(|| sh(commands)).unwrap();
    }
    (near, far)
}

#[test]
fn a_narrow_path_is_learned_from_icmp_and_then_refuses_what_is_too_large() {
    sandbox::run("a_narrow_path_is_learned_from_icmp_and_then_refuses_what_is_too_large", |dir| {
        let (near, far) = narrow(dir);
        let receiver = far.run(|| Socket::bind(Family::V4, 0).unwrap()).unwrap();
        near.run(|| {
            let sender = Socket::bind(Family::V4, 0).unwrap();
            let path = Path {
                local: SocketAddr::new(ip("10.1.0.1"), 0),
                remote: SocketAddr::new(ip("10.2.0.1"), receiver.port()),
            };
            assert_eq!(sender.path_mtu(path.remote.ip()), Some(1500));
            let bytes = [7; 1472 * 3];
            let large = Send { path, bytes: &bytes, segment: 1472, tos: 0 };
            let _ = sender.send(&[large]);
            let deadline = Instant::now() + Duration::from_secs(5);
            while sender.path_mtu(path.remote.ip()) != Some(1280) {
                assert!(Instant::now() < deadline, "{:?}", sender.path_mtu(path.remote.ip()));
                std::thread::yield_now();
            }
            assert_eq!(sent(&sender, &[large]), Err((0, Errno::EMSGSIZE)));
            // The router itself is nearer than the narrow place, and what fits passes.
            let nearer = Path { remote: SocketAddr::new(ip("10.1.0.2"), 9), ..path };
            let small = Send { segment: 1252, ..large };
            assert_eq!(sent(&sender, &[Send { path: nearer, ..large }, small]), Ok(2));
            assert!(sender.gso());
            // Nothing of all this shows to who reads.
            assert_eq!(sender.receive(&mut [vec![0; 2048]], &mut Vec::new()).unwrap(), 0);
        })
        .unwrap();
        let mut length = 0;
        while length < 1472 * 3 {
            length += next_message(&receiver).1.len();
        }
        assert_eq!(length, 1472 * 3, "only what fits arrived");
    });
}

#[test]
fn a_peer_that_is_not_there_disturbs_no_other() {
    sandbox::run("a_peer_that_is_not_there_disturbs_no_other", |_| {
        let (a, b) = (Socket::bind(Family::V4, 0).unwrap(), Socket::bind(Family::V4, 0).unwrap());
        let to = |port| Path { local: any(Family::V4, 0), remote: SocketAddr::new(ip("127.0.0.1"), port) };
        let nobody = UdpSocket::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        for _ in 0..5 {
            let lost = Send { path: to(nobody), bytes: b"x", segment: 1, tos: 0 };
            assert_eq!(sent(&a, &[lost, Send { path: to(b.port()), ..lost }, lost]), Ok(3));
            assert_eq!(next_message(&b).1, b"x");
            assert_eq!(a.receive(&mut [vec![0; 2048]], &mut Vec::new()).unwrap(), 0);
        }
    });
}

#[test]
fn where_segmentation_is_refused_each_datagram_goes_alone_from_then_on() {
    sandbox::run("where_segmentation_is_refused_each_datagram_goes_alone_from_then_on", |_| {
        let (a, b) = (Socket::bind(Family::V4, 0).unwrap(), Socket::bind(Family::V4, 0).unwrap());
        // The kernel refuses to segment what has no checksum (udp_send_skb()).
        let yes: libc::c_int = 1;
        // SAFETY: the kernel reads one int, which outlives the call.
        #[allow(unsafe_code)]
        let set = unsafe {
            let fd = a.as_fd().as_raw_fd();
            libc::setsockopt(fd, libc::SOL_SOCKET, libc::SO_NO_CHECK, (&raw const yes).cast(), 4)
        };
        assert_eq!(set, 0);
        let path = Path { local: any(Family::V4, 0), remote: SocketAddr::new(ip("127.0.0.1"), b.port()) };
        let bytes: Vec<u8> = (0..2500_u32).map(|n| n as u8).collect();
        assert!(a.gso());
        for _ in 0..2 {
            let message = Send { path, bytes: &bytes, segment: 1000, tos: 0 };
            assert_eq!(sent(&a, &[message, message]), Ok(2));
            assert!(!a.gso());
            let mut whole = Vec::new();
            let mut lengths = Vec::new();
            for _ in 0..6 {
                let (received, part) = next_message(&b);
                lengths.push(received.len);
                whole.extend(part);
            }
            assert_eq!(lengths, [1000, 1000, 500, 1000, 1000, 500]);
            assert!(whole == [bytes.as_slice(), &bytes].concat());
        }
    });
}

#[test]
fn both_families_may_have_one_port_and_a_second_socket_is_told_that_it_is_taken() {
    sandbox::run("both_families_may_have_one_port_and_a_second_socket_is_told_that_it_is_taken", |_| {
        let v4 = Socket::bind(Family::V4, 4500).unwrap();
        let v6 = Socket::bind(Family::V6, 4500).unwrap();
        assert_eq!((v4.port(), v6.port()), (4500, 4500));
        let error = Socket::bind(Family::V4, 4500).unwrap_err();
        assert_eq!(error.errno, Some(Errno::EADDRINUSE));
        assert!(error.to_string().contains("0.0.0.0:4500") && error.remedy.is_some(), "{error}");
    });
}

#[test]
fn a_datagram_that_is_cut_is_passed_over_and_those_around_it_are_not() {
    sandbox::run("a_datagram_that_is_cut_is_passed_over_and_those_around_it_are_not", |_| {
        let (a, b) = (Socket::bind(Family::V4, 0).unwrap(), Socket::bind(Family::V4, 0).unwrap());
        let path = Path { local: any(Family::V4, 0), remote: (Ipv4Addr::LOCALHOST, b.port()).into() };
        let bytes = [7; 300];
        let message = |length: usize| Send { path, bytes: &bytes[..length], segment: length, tos: 0 };
        assert_eq!(sent(&a, &[message(100), message(300), message(200)]), Ok(3));
        let mut out = Vec::new();
        await_readable(&b);
        assert_eq!(b.receive(&mut vec![vec![0; 256]; 4], &mut out).unwrap(), 3);
        assert_eq!(out.iter().map(|received| received.len).collect::<Vec<_>>(), [100, 0, 200]);
    });
}
