//! What a router of an encrypted network lets through: between containers, other hosts and foreign peers, whose packets
//! come and go by the queue of its TUN device; in real namespaces, of the plan's own objects.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod sandbox;

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use linux::udp::path_mtu;
use sandbox::scene::{BEHIND_PEER, CONTAINER, ELSEWHERE, bring, datagram, heard, left, made};
use sandbox::{await_readable, checksum, in_router, ip, ip_packet, network, next_packet, sh, udp_packet};

fn words<const N: usize>(words: [&str; N]) -> [String; N] {
    words.map(str::to_owned)
}

#[test]
fn a_container_and_what_is_behind_a_foreign_peer_reach_each_other() {
    sandbox::run("a_container_and_what_is_behind_a_foreign_peer_reach_each_other", |dir| {
        let (_kernel, _inside, socket, queue) = made(dir);
        for far in [BEHIND_PEER, "172.16.9.9", ELSEWHERE] {
            bring(&queue, &datagram(far, CONTAINER, "question"));
            assert_eq!(heard(&socket), (far.to_owned(), "question".to_owned()));
            socket.send_to(b"answer", (far, 9)).unwrap();
            let (source, destination, ttl, said) = left(&queue);
            assert_eq!([source, destination, said], words([CONTAINER, far, "answer"]));
            assert_eq!(ttl, 63);
        }
        // Without a question, too.
        socket.send_to(b"hello", ("192.168.7.77", 9)).unwrap();
        assert_eq!(left(&queue).1, "192.168.7.77");
    });
}

#[test]
fn a_gateway_hands_on_between_a_foreign_peer_and_other_hosts() {
    sandbox::run("a_gateway_hands_on_between_a_foreign_peer_and_other_hosts", |dir| {
        let (_kernel, _inside, _socket, queue) = made(dir);
        for (from, to) in [(BEHIND_PEER, ELSEWHERE), (ELSEWHERE, BEHIND_PEER)] {
            for said in ["first", "second"] {
                bring(&queue, &datagram(from, to, said));
                let (source, destination, ttl, heard) = left(&queue);
                assert_eq!(
                    [source, destination, heard],
                    words([from, to, said]),
                    "and nobody is told a better way"
                );
                assert_eq!(ttl, 63);
            }
        }
    });
}

#[test]
fn what_is_neither_of_the_pool_nor_behind_a_peer_gets_nowhere() {
    sandbox::run("what_is_neither_of_the_pool_nor_behind_a_peer_gets_nowhere", |dir| {
        let (kernel, _inside, socket, queue) = made(dir);
        let router = in_router(&kernel, "ip -4 -o addr show dev br0 | grep -o '10.42.64[0-9.]*' | head -1");
        let router = router.trim();
        let at_router =
            kernel.router_netns(&network()).unwrap().run(|| UdpSocket::bind((router, 7)).unwrap()).unwrap();
        at_router.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        for from in ["192.168.7.200", "192.0.2.1", "10.43.0.1"] {
            for to in [CONTAINER, router, ELSEWHERE, BEHIND_PEER] {
                bring(&queue, &datagram(from, to, "forbidden"));
            }
        }
        // From one peer to what is behind another, or out into the world: that is not what it was joined for.
        for to in ["172.16.9.9", "192.168.7.10", "192.0.2.1"] {
            bring(&queue, &datagram(BEHIND_PEER, to, "forbidden"));
        }
        for (to, socket) in [(CONTAINER, &socket), (router, &at_router)] {
            bring(&queue, &datagram(BEHIND_PEER, to, "welcome"));
            assert_eq!(heard(socket).1, "welcome");
        }
        bring(&queue, &datagram(BEHIND_PEER, ELSEWHERE, "welcome"));
        assert_eq!(left(&queue).3, "welcome");
    });
}

#[test]
fn a_query_goes_to_the_routers_own_service_whoever_is_asked() {
    sandbox::run("a_query_goes_to_the_routers_own_service_whoever_is_asked", |dir| {
        let (kernel, inside, _socket, queue) = made(dir);
        let router = kernel.router_netns(&network()).unwrap();
        let patient = |socket: UdpSocket| {
            socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            socket
        };
        let service = patient(router.run(|| UdpSocket::bind("169.254.169.250:53").unwrap()).unwrap());
        for asked in [BEHIND_PEER, ELSEWHERE, "10.42.0.1", "169.254.169.250", "192.0.2.1"] {
            let client = patient(inside.run(|| UdpSocket::bind((CONTAINER, 0)).unwrap()).unwrap());
            client.connect((asked, 53)).unwrap();
            client.send(asked.as_bytes()).unwrap();
            let mut buffer = [0; 64];
            let (length, from) = service.recv_from(&mut buffer).expect(asked);
            assert_eq!(&buffer[..length], asked.as_bytes());
            assert_eq!(from, client.local_addr().unwrap());
            service.send_to(b"answer", from).unwrap();
            // A connected socket takes answers only from whom it asked.
            assert_eq!(client.recv(&mut buffer).expect(asked), 6);
        }
        // What comes by a tunnel is for whom it says.
        let server = patient(inside.run(|| UdpSocket::bind((CONTAINER, 53)).unwrap()).unwrap());
        for far in [BEHIND_PEER, ELSEWHERE] {
            bring(&queue, &udp_packet(&format!("{far}:9"), &format!("{CONTAINER}:53"), b"question"));
            assert_eq!(heard(&server), (far.to_owned(), "question".to_owned()));
            server.send_to(b"answer", (far, 9)).unwrap();
            assert_eq!(left(&queue).1, far);
        }
    });
}

#[test]
fn what_stays_within_the_network_and_its_peers_is_not_tracked() {
    sandbox::run("what_stays_within_the_network_and_its_peers_is_not_tracked", |dir| {
        let (kernel, _inside, socket, queue) = made(dir);
        in_router(
            &kernel,
            "nft 'table ip seen {
               counter tracked { }
               chain c {
                 type filter hook forward priority -400;
                 ct state != untracked counter name tracked
               }
             }'",
        );
        for far in [BEHIND_PEER, ELSEWHERE] {
            bring(&queue, &datagram(far, CONTAINER, "question"));
            assert_eq!(heard(&socket).0, far);
            socket.send_to(b"answer", (far, 9)).unwrap();
            assert_eq!(left(&queue).1, far);
            bring(&queue, &datagram(far, if far == ELSEWHERE { BEHIND_PEER } else { ELSEWHERE }, "on"));
            assert_eq!(left(&queue).0, far);
        }
        let tracked = in_router(&kernel, "nft list counter ip seen tracked");
        assert!(tracked.contains("packets 0 "), "{tracked}");
        // Such as this one.
        socket.send_to(b"hello", ("192.0.2.1", 9)).unwrap();
        let deadline = Instant::now() + Duration::from_secs(5);
        while in_router(&kernel, "nft list counter ip seen tracked").contains("packets 0 ") {
            assert!(Instant::now() < deadline, "a packet to the world is tracked");
        }
    });
}

#[test]
fn nothing_for_a_foreign_peer_leaves_in_clear_nor_comes_in_its_name() {
    sandbox::run("nothing_for_a_foreign_peer_leaves_in_clear_nor_comes_in_its_name", |dir| {
        let (kernel, inside, socket, _queue) = made(dir);
        sh("nft 'table ip seen {
              counter peer { }
              counter world { }
              chain c {
                type filter hook prerouting priority -400;
                iifname \"dw*\" ip daddr { 192.168.7.0/25, 172.16.0.0/12 } counter name peer
                iifname \"dw*\" ip daddr 192.0.2.1 counter name world
              }
            }'
            ip addr add 192.168.7.9/32 dev lo");
        let counted = |what: &str| sh(&format!("nft list counter ip seen {what}"));
        // The host sends to the router's published port, once in the name of what is behind the peer.
        let way = in_router(&kernel, "ip -4 -o addr show dev up0 | grep -o '169.254[0-9.]*' | head -1");
        for (from, said) in [(BEHIND_PEER, "forged"), ("10.9.0.1", "true")] {
            let host = UdpSocket::bind((from, 9)).unwrap();
            host.send_to(said.as_bytes(), (way.trim(), 7007)).unwrap();
        }
        assert_eq!(heard(&socket).1, "true");

        // Without its device everything else would leave by the default route.
        in_router(&kernel, "ip link del tun0");
        for peer in [BEHIND_PEER, "172.16.9.9"] {
            let _ = socket.send_to(b"secret", (peer, 9));
            let sent = kernel.router_netns(&network()).unwrap().run(|| {
                UdpSocket::bind("0.0.0.0:0")
                    .unwrap()
                    .send_to(b"secret", (peer, 9))
                    .map_err(|error| error.kind())
            });
            assert_eq!(sent.unwrap(), Err(std::io::ErrorKind::PermissionDenied));
        }
        inside.run(|| socket.send_to(b"hello", ("192.0.2.1", 9)).unwrap()).unwrap();
        let deadline = Instant::now() + Duration::from_secs(5);
        while counted("world").contains("packets 0") {
            assert!(Instant::now() < deadline, "{}", counted("world"));
        }
        assert!(counted("peer").contains("packets 0"), "{}", counted("peer"));
    });
}

#[test]
fn what_the_data_path_says_in_the_routers_name_reaches_a_container() {
    sandbox::run("what_the_data_path_says_in_the_routers_name_reaches_a_container", |dir| {
        let (_kernel, inside, socket, queue) = made(dir);
        socket.send_to(&[7; 1300], (BEHIND_PEER, 9)).unwrap();
        await_readable(&queue);
        let (_, packet) = next_packet(&queue);
        // RFC 792, RFC 1191 §4: fragmentation needed, the next hop takes 1200 bytes.
        let mut message = [&[3, 4, 0, 0, 0, 0], &1200_u16.to_be_bytes()[..], &packet[..28]].concat();
        let sum = checksum(&message);
        message[2..4].copy_from_slice(&sum);
        let router = "10.42.64.65".parse().unwrap();
        bring(&queue, &ip_packet(1, router, CONTAINER.parse().unwrap(), &message));
        let deadline = Instant::now() + Duration::from_secs(5);
        let known = || inside.run(|| path_mtu(ip(BEHIND_PEER))).unwrap();
        while known() != Some(1200) {
            assert!(Instant::now() < deadline, "{:?}", known());
        }
    });
}
