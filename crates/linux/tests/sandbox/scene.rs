//! A router of an encrypted network, of the plan's own objects: one container, another host, two nets behind a foreign peer.

use std::collections::BTreeMap;
use std::io::IoSlice;
use std::net::UdpSocket;
use std::path::Path;
use std::time::Duration;

use linux::Kernel;
use linux::netns::Netns;
use linux::tun::{self, Queue};
use model::agent_api::Routes;
use model::{
    Block, Candidate, Catalog, EndpointId, Host, HostId, Mac, NetworkId, NetworkSpec, Object, Peer, PeerId,
    PeerProof, Protocol, PublishedPort, Revision, Source,
};
use plan::object::Program;
use plan::{Attachment, End, Key, Local, Place, State, desired};

use super::{container, converge, ip, network, next_packet, udp_packet, underlay};

pub(crate) const CONTAINER: &str = "10.42.64.98";
pub(crate) const ELSEWHERE: &str = "10.42.128.5";
pub(crate) const BEHIND_PEER: &str = "192.168.7.9";

/// A host with one container, which is the gateway to a foreign peer; another host has the block of [`ELSEWHERE`].
pub(crate) fn scene(netns: &Path) -> State {
    let candidate =
        |address: &str| Candidate { address: ip(address), port: None, mtu: 1500, source: Source::Interface };
    let host = |n: u8, address| {
        Object::Host(Host {
            id: HostId::from_random([n; 8]),
            name: format!("h{n}").parse().unwrap(),
            candidates: vec![candidate(address)],
            labels: BTreeMap::new(),
            key: String::new(),
            joined: 0,
        })
    };
    let block = |n: u8, cidr: &str| {
        let host = HostId::from_random([n; 8]);
        Object::Block(Block { network: network(), cidr: cidr.parse().unwrap(), host, leased: Revision(1) })
    };
    let mut spec = NetworkSpec::new("test".parse().unwrap(), "10.42.0.0/16".parse().unwrap());
    spec.driver = Some("ipsec".to_owned());
    let peer = Peer {
        id: PeerId::from_random([5; 8]),
        name: "branch".parse().unwrap(),
        network: network(),
        host: HostId::from_random([1; 8]),
        address: ip("198.51.100.7"),
        port: None,
        identity: None,
        local_identity: None,
        proof: PeerProof::Psk { secret: None },
        remote_cidrs: vec!["192.168.7.0/25".parse().unwrap(), "172.16.0.0/12".parse().unwrap()],
        created: 0,
    };
    let catalog = Catalog::from_objects([
        host(1, "10.9.0.1"),
        host(2, "10.9.0.2"),
        Object::Network(spec.validate(network(), 7, 0).unwrap()),
        block(1, "10.42.64.64/26"),
        block(2, "10.42.128.0/26"),
        Object::Peer(peer),
    ]);
    let attachment = Attachment {
        network: network(),
        addresses: vec![ip(CONTAINER)],
        mac: Mac([2, 0, 0, 0, 0, 9]),
        end: End::Inside { netns: netns.to_owned(), ifname: "eth0".to_owned(), routes: Routes::All },
        ports: vec![PublishedPort { protocol: Protocol::Udp, host_port: 7007, port: 7 }],
        bridge: plan::Bridge::ROOT,
    };
    let local = Local {
        host: HostId::from_random([1; 8]),
        underlay: Some(candidate("10.9.0.1")),
        routers: BTreeMap::<NetworkId, u16>::from([(network(), 0)]),
        shortcut: super::takes_programs(),
        attachments: BTreeMap::from([(EndpointId::from_random([3; 8]), attachment)]),
        spare: std::collections::BTreeSet::new(),
    };
    desired(&catalog, &local)
}

/// The least of programs, at the bridge.
pub(crate) fn a_program() -> (Place, Key, plan::Object) {
    let program = Program { text: "r0 = 0\nexit".to_owned(), digest: "droveway 0".to_owned() };
    (super::router(), Key::Program(super::name("br0")), plan::Object::Program(program))
}

/// All of the scene made: its kernel, the container and a socket in it, and the other end of the TUN device.
pub(crate) fn made(dir: &Path) -> (Kernel, Netns, UdpSocket, Queue) {
    underlay();
    let (inside, path) = container(dir, "c98");
    let mut kernel = Kernel::open(dir).unwrap();
    let desired = scene(&path);
    assert!(converge(&mut kernel, &desired) <= 3);
    let socket = inside.run(|| UdpSocket::bind((CONTAINER, 7)).unwrap()).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let queue = Queue::open(kernel.router_netns(&network()).unwrap(), "tun0").unwrap();
    (kernel, inside, socket, queue)
}

/// Lets a packet come by the TUN device.
pub(crate) fn bring(queue: &Queue, packet: &[u8]) {
    assert!(queue.write(&[IoSlice::new(&[0; tun::HEADER]), IoSlice::new(packet)]).unwrap());
}

pub(crate) fn datagram(from: &str, to: &str, words: &str) -> Vec<u8> {
    udp_packet(&format!("{from}:9"), &format!("{to}:7"), words.as_bytes())
}

/// From whom the next datagram is, and what it says.
pub(crate) fn heard(socket: &UdpSocket) -> (String, String) {
    let mut buffer = [0; 2048];
    let (length, from) = socket.recv_from(&mut buffer).expect("a datagram");
    (from.ip().to_string(), String::from_utf8(buffer[..length].to_vec()).unwrap())
}

/// Source and destination of the next packet that leaves by the TUN device, its TTL, and what it says.
pub(crate) fn left(queue: &Queue) -> (String, String, u8, String) {
    let (_, packet) = next_packet(queue);
    let address = |at: usize| packet[at..at + 4].iter().map(u8::to_string).collect::<Vec<_>>().join(".");
    (address(12), address(16), packet[8], String::from_utf8_lossy(&packet[28..]).into_owned())
}
