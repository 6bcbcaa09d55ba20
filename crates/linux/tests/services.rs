//! Sockets for a router's services, facts about the host, and room in its iptables: in real namespaces.
#![allow(clippy::unwrap_used, clippy::expect_used)]

#[allow(dead_code)]
mod sandbox;

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::process::Command;
use std::time::Duration;

use linux::forward::{self, Forwarding};
use linux::socket::{recv_with_destination, send_from, tcp_listener_transparent, udp_transparent};
use linux::{Kernel, host};
use nix::poll::{PollFd, PollFlags, poll};
use plan::Step;
use sandbox::{container, converge, desired, endpoint, ip, network, sh, underlay};

#[test]
fn a_question_to_any_server_is_taken_by_the_router_and_answered_from_that_servers_address() {
    sandbox::run(
        "a_question_to_any_server_is_taken_by_the_router_and_answered_from_that_servers_address",
        |dir| {
            underlay();
            let mut kernel = Kernel::open(dir).unwrap();
            converge(&mut kernel, &desired());
            let (inside, path) = container(dir, "c70");
            let ((place, key), object) = endpoint(path, "e70", 70);
            kernel.apply(&Step::Add(place, key, object)).unwrap();
            let ns = kernel.router_netns(&network()).unwrap();
            let server = udp_transparent(ns, "0.0.0.0:53".parse().unwrap()).unwrap();
            let nothing = recv_with_destination(&server, &mut [0; 64]).unwrap_err();
            assert_eq!(nothing.kind(), ErrorKind::WouldBlock);

            for asked in ["8.8.8.8:53", "169.254.169.250:53", "10.42.64.65:53"] {
                let asked: SocketAddr = asked.parse().unwrap();
                let client = inside
                    .run(|| {
                        let client = UdpSocket::bind("10.42.64.70:0").unwrap();
                        client.connect(asked).unwrap();
                        client.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
                        client
                    })
                    .unwrap();
                let waiting = &mut [PollFd::new(std::os::fd::AsFd::as_fd(&server), PollFlags::POLLIN)];
                // A datagram may be lost: a client asks again.
                let taken = (0..5).any(|_| client.send(b"who?").is_ok() && poll(waiting, 2000_u16) == Ok(1));
                assert!(taken, "{asked}");
                let mut buffer = [0; 64];
                let (length, from, destination) = recv_with_destination(&server, &mut buffer).unwrap();
                assert_eq!(&buffer[..length], b"who?");
                assert_eq!(from, client.local_addr().unwrap());
                assert_eq!(destination, asked);
                send_from(&server, b"me", from, destination.ip()).unwrap();
                // What was asked twice is of no more use.
                while recv_with_destination(&server, &mut buffer).is_ok() {}
                // A connected socket takes answers only from whom it asked.
                let length = client.recv(&mut buffer).unwrap();
                assert_eq!(&buffer[..length], b"me");
            }
        },
    );
}

#[test]
fn a_transparent_listener_takes_connections_and_knows_whom_they_asked_for() {
    sandbox::run("a_transparent_listener_takes_connections_and_knows_whom_they_asked_for", |dir| {
        underlay();
        let mut kernel = Kernel::open(dir).unwrap();
        converge(&mut kernel, &desired());
        let (inside, path) = container(dir, "c70");
        let ((place, key), object) = endpoint(path, "e70", 70);
        kernel.apply(&Step::Add(place, key, object)).unwrap();
        let ns = kernel.router_netns(&network()).unwrap();
        let listener = tcp_listener_transparent(ns, "0.0.0.0:80".parse().unwrap()).unwrap();
        listener.set_nonblocking(false).unwrap();
        let mut client = inside.run(|| TcpStream::connect("169.254.169.250:80").unwrap()).unwrap();
        let (mut connection, _) = listener.accept().unwrap();
        assert_eq!(connection.local_addr().unwrap(), "169.254.169.250:80".parse().unwrap());
        connection.write_all(b"hello").unwrap();
        drop(connection);
        let mut said = String::new();
        client.read_to_string(&mut said).unwrap();
        assert_eq!(said, "hello");
    });
}

#[test]
fn the_hosts_addresses_and_routes_are_told_without_our_own() {
    sandbox::run("the_hosts_addresses_and_routes_are_told_without_our_own", |dir| {
        underlay();
        sh("ip route add 10.8.0.0/16 via 10.9.0.254; ip link set und0 mtu 1400");
        let mut kernel = Kernel::open(dir).unwrap();
        converge(&mut kernel, &desired());
        let addresses = host::addresses().unwrap();
        let found: Vec<_> =
            addresses.iter().map(|a| (a.ifname.as_str(), a.address, a.prefix, a.mtu, a.up)).collect();
        assert_eq!(found, [("und0", ip("10.9.0.1"), 24, 1400, true)]);
        let mut routes: Vec<_> =
            host::routes().unwrap().iter().map(|r| format!("{} {}", r.destination, r.dev)).collect();
        routes.sort();
        assert_eq!(routes, ["10.8.0.0/16 und0", "10.9.0.0/24 und0"]);
        assert_eq!(host::source_for(ip("10.8.0.1")), Some(ip("10.9.0.1")));
        assert_eq!(host::source_for(ip("203.0.113.1")), None);
    });
}

#[test]
fn forwarding_is_let_through_where_iptables_would_drop_it_and_left_alone_elsewhere() {
    sandbox::run("forwarding_is_let_through_where_iptables_would_drop_it_and_left_alone_elsewhere", |_| {
        if Command::new("iptables").arg("-S").output().is_err() {
            assert_eq!(forward::ensure("dw+").unwrap(), Forwarding::Open, "no iptables, nothing in the way");
            return;
        }
        assert_eq!(forward::ensure("dw+").unwrap(), Forwarding::Open);
        sh("iptables -P FORWARD DROP");
        for _ in 0..2 {
            assert_eq!(forward::ensure("dw+").unwrap(), Forwarding::Accepted("FORWARD"));
        }
        assert_eq!(sh("iptables -S FORWARD | grep -c droveway").trim(), "2", "once each way");
        sh("iptables -N DOCKER-USER");
        assert_eq!(forward::ensure("dw+").unwrap(), Forwarding::Accepted("DOCKER-USER"));
        assert_eq!(sh("iptables -S DOCKER-USER | grep -c droveway").trim(), "2");
        forward::remove("dw+").unwrap();
        assert!(!sh("iptables -S").contains("droveway"));
    });
}
