//! A flood of requests to begin IKE, from addresses that nobody can be asked at. Used by tests, and by `benches/system`.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use ike::auth::{Credential, Trust};
use ike::proposal::{EspOffer, IkeOffer};
use ike::wire::IpSelector;
use ike::{ChildConfig, ChildId, Initiate, PeerConfig, PeerId, PeerKind};
use linux::udp;

/// Where they come from. It must lead to the sender's node, and be local there.
pub const SOURCES: &str = "10.2.0.0/16";
/// The initiator's SPI, behind the non-ESP marker (RFC 3948 §2.2, RFC 7296 §3.1).
const SPI: std::ops::Range<usize> = 4..12;
/// More half-open IKE SAs than a host lets strangers have before it asks for cookies (`ike::Limits`).
const ENOUGH: u64 = 1_000;
const TICK: Duration = Duration::from_millis(1);

/// Sends so many a second until told to stop, in the calling thread's namespace; how many went. `begun` is called when there were as many as
/// make a host ask for cookies.
pub fn flood(to: SocketAddr, rate: u32, stop: &AtomicBool, mut begun: impl FnMut()) -> u64 {
    let mut request = request(to);
    let socket = udp::Socket::bind(udp::Family::V4, 0).unwrap();
    let (start, mut count) = (Instant::now(), 0_u64);
    while !stop.load(Relaxed) {
        let due = start.elapsed().as_micros() as u64 * u64::from(rate) / 1_000_000;
        while count < due {
            // Another SPI and another source for each, neither in an order that could be followed.
            let number = (count + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            request[SPI].copy_from_slice(&number.to_be_bytes());
            let [.., a, b] = ((number >> 40) as u32).to_be_bytes();
            let local = SocketAddr::from((Ipv4Addr::new(10, 2, a, b), socket.port()));
            let path = udp::Path { local, remote: to };
            let message = udp::Send { path, bytes: &request, segment: request.len(), tos: 0 };
            // Where nobody listens, the kernel tells of it by an error.
            let _ = socket.send(&[message]);
            count += 1;
            if count == ENOUGH {
                begun();
            }
        }
        std::thread::sleep(TICK);
    }
    count
}

/// A well-formed request, as a host of ours makes it.
fn request(to: SocketAddr) -> Vec<u8> {
    let now = Instant::now();
    let mut endpoint = ike::Endpoint::new(ike::Config::default(), &[7; 32], now, 0);
    let secret = ike::crypto::Secret::from(&b"nobody's"[..]);
    let everything = vec![IpSelector::prefix(Ipv4Addr::UNSPECIFIED.into(), 0)];
    let child = ChildConfig {
        id: ChildId(1),
        label: None,
        worker: None,
        local: everything.clone(),
        remote: everything,
        esp: EspOffer::default(),
    };
    let local = SocketAddr::from((Ipv4Addr::new(10, 2, 0, 1), 4500));
    let peer = PeerConfig {
        id: "nobody.example".parse().unwrap(),
        our_id: "nobody.example".parse().unwrap(),
        trust: Trust::Psk(secret.clone()),
        credential: Credential::Psk(secret),
        paths: vec![ike::Path { local, remote: SocketAddr::new(to.ip(), 4500) }],
        initiate: Initiate::First,
        kind: PeerKind::Native,
        ike: IkeOffer::default(),
        children: vec![child],
    };
    endpoint.add_peer(PeerId(1), peer, now);
    endpoint.handle_timeout(now);
    endpoint.poll_transmit().unwrap().bytes
}
