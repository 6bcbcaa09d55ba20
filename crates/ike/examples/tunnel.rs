//! One IKE SA with one peer by pre-shared key, over a UDP socket, told as it happens: to try this room against
//! another implementation. It carries no traffic.
//!
//! ```text
//! tunnel LOCAL:4500 REMOTE:4500 OUR_ID THEIR_ID PSK OUR_CIDR THEIR_CIDR [first|never] [rekey=SECONDS] [for=SECONDS]
//! ```
#![allow(clippy::disallowed_methods, reason = "someone has to ask the clock")]

use std::error::Error;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant, SystemTime};

use ike::auth::{Credential, Trust};
use ike::crypto::Secret;
use ike::proposal::{EspOffer, IkeOffer};
use ike::wire::IpSelector;
use ike::{
    ChildConfig, ChildId, Config, Endpoint, Event, Initiate, Path, PeerConfig, PeerId, PeerKind, Timing,
};

const PEER: PeerId = PeerId(1);

fn cidr(text: &str) -> Result<IpSelector, Box<dyn Error>> {
    let (address, len) = text.split_once('/').ok_or("a CIDR is ADDRESS/LENGTH")?;
    Ok(IpSelector::prefix(address.parse::<IpAddr>()?, len.parse()?))
}

fn main() -> Result<(), Box<dyn Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [local, remote, our_id, id, psk, our_cidr, cidr_there, options @ ..] = args.as_slice() else {
        return Err(
            "arguments: LOCAL REMOTE OUR_ID THEIR_ID PSK OUR_CIDR THEIR_CIDR [first|never] [rekey=S] [for=S]"
                .into(),
        );
    };
    let (local, remote): (SocketAddr, SocketAddr) = (local.parse()?, remote.parse()?);
    let option =
        |name: &str| options.iter().find_map(|it| it.strip_prefix(name)).and_then(|it| it.parse().ok());
    let never = options.iter().any(|it| it == "never");
    let psk = Secret::new(psk.as_bytes().to_vec());
    let peer = PeerConfig {
        id: id.parse()?,
        our_id: our_id.parse()?,
        trust: Trust::Psk(psk.clone()),
        credential: Credential::Psk(psk),
        paths: vec![Path { local, remote }],
        initiate: if never { Initiate::Never } else { Initiate::First },
        kind: PeerKind::Foreign,
        ike: IkeOffer::default(),
        children: vec![ChildConfig {
            id: ChildId(1),
            label: None,
            worker: None,
            local: vec![cidr(our_cidr)?],
            remote: vec![cidr(cidr_there)?],
            esp: EspOffer::default(),
        }],
    };
    let mut timing = Timing::default();
    if let Some(seconds) = option("rekey=") {
        timing.child_rekey = Duration::from_secs(seconds);
        timing.ike_rekey = Duration::from_secs(seconds * 2);
    }
    if let Some(size) = option("fragment=") {
        timing.fragment = size as usize;
    }
    let end = Instant::now() + Duration::from_secs(option("for=").unwrap_or(3600));
    let mut seed = [0; 32];
    aws_lc_rs::rand::fill(&mut seed).map_err(|_| "no randomness")?;
    let unix = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs();
    let mut endpoint = Endpoint::new(Config { timing, ..Config::default() }, &seed, Instant::now(), unix);
    endpoint.add_peer(PEER, peer, Instant::now());
    // A second socket on port 500 hears a foreign peer's first messages, which have no marker there.
    let sockets = [Some(UdpSocket::bind(local)?), UdpSocket::bind((local.ip(), 500)).ok()];
    let sockets: Vec<UdpSocket> = sockets.into_iter().flatten().collect();
    for socket in &sockets {
        socket.set_read_timeout(Some(Duration::from_millis(5)))?;
    }
    let begun = Instant::now();
    let mut buffer = vec![0; 65_536];
    while Instant::now() < end {
        while let Some(transmit) = endpoint.poll_transmit() {
            let from = sockets
                .iter()
                .find(|it| it.local_addr().is_ok_and(|at| at.port() == transmit.path.local.port()));
            if let Some(socket) = from {
                socket.send_to(&transmit.bytes, transmit.path.remote)?;
            }
        }
        while let Some(event) = endpoint.poll_event() {
            tell(&event, begun.elapsed());
        }
        for socket in &sockets {
            match socket.recv_from(&mut buffer) {
                Ok((len, from)) => {
                    let path = Path { local: socket.local_addr()?, remote: from };
                    endpoint.handle_datagram(&buffer[..len], path, Instant::now());
                }
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
                Err(error) => eprintln!("receive: {error}"),
            }
        }
        endpoint.handle_timeout(Instant::now());
    }
    for sa in endpoint.sas(PEER) {
        println!(
            "at the end: {:?} nat {:?} suite {}",
            sa.spis,
            sa.nat,
            sa.suite.map_or("-".into(), |it| it.to_string())
        );
        for child in sa.children {
            println!("  child in {:08x} out {:08x} {}", child.inbound.0, child.outbound.0, child.suite);
        }
    }
    Ok(())
}

fn tell(event: &Event, at: Duration) {
    let at = format!("{:8.3}", at.as_secs_f64());
    match event {
        Event::PeerUp { path, .. } => println!("{at} up: {} to {}", path.local, path.remote),
        Event::PeerDown { why, .. } => println!("{at} down: {why}"),
        Event::PeerFailed { why, .. } => println!("{at} failed: {why}"),
        Event::PeerMoved { path, .. } => println!("{at} the peer moved to {}", path.remote),
        Event::ChildInbound(sa) => println!("{at} receive on {:08x} {}", sa.spi.0, sa.suite),
        Event::ChildOutbound(sa) => println!("{at} send on {:08x} {}", sa.spi.0, sa.suite),
        Event::ChildDeleted { inbound, outbound, why, .. } => {
            println!("{at} child {:08x}/{:08x} is gone: {why}", inbound.0, outbound.0);
        }
        Event::Refused { path, why } => println!("{at} refused {}: {why}", path.remote),
        Event::ChildFailed { why, .. } => println!("{at} child failed: {why}"),
    }
}
