//! The machine as a whole, against whoever may send to it.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crate::auth::{Credential, Identity, Trust};
use crate::crypto::Secret;
use crate::proposal::{EspOffer, IkeOffer};
use crate::wire::{EspSpi, ExchangeType, IpSelector, NON_ESP_MARKER, PayloadType};
use crate::{ChildConfig, ChildId, Config, Endpoint, Event, Initiate, Path, PeerConfig, PeerId, PeerKind};

const PEER: PeerId = PeerId(1);
const HOUR: Duration = Duration::from_hours(1);

fn address(host: usize) -> SocketAddr {
    SocketAddr::from(([192, 0, 2, 1 + host as u8], 4500))
}

fn config(host: usize, secret: &str) -> PeerConfig {
    let name = |host: usize| Identity::KeyId(vec![b'h', b'0' + host as u8]);
    let net = |host: usize| vec![IpSelector::prefix([10, 42, host as u8, 0].into(), 24)];
    let psk = || Secret::new(secret.as_bytes().to_vec());
    PeerConfig {
        id: name(1 - host),
        our_id: name(host),
        trust: Trust::Psk(psk()),
        credential: Credential::Psk(psk()),
        paths: vec![Path { local: address(host), remote: address(1 - host) }],
        initiate: if host == 0 { Initiate::First } else { Initiate::Never },
        kind: PeerKind::Native,
        ike: IkeOffer::default(),
        children: vec![ChildConfig {
            id: ChildId(1),
            label: None,
            worker: None,
            local: net(host),
            remote: net(1 - host),
            esp: EspOffer::default(),
        }],
    }
}

/// One of the two hosts, and the SPIs that it was told to receive on.
struct Host {
    endpoint: Endpoint,
    receives: BTreeSet<EspSpi>,
    up: bool,
}

impl Host {
    fn new(host: usize, secret: &str, now: Instant) -> Self {
        let mut endpoint = Endpoint::new(Config::default(), &[host as u8; 32], now, 0);
        endpoint.add_peer(PEER, config(host, secret), now);
        Self { endpoint, receives: BTreeSet::new(), up: false }
    }

    /// What it tells must make sense: it sends on and forgets what it has.
    fn hear(&mut self) {
        while let Some(event) = self.endpoint.poll_event() {
            match event {
                Event::ChildInbound(sa) => {
                    assert!(self.receives.insert(sa.spi), "told twice of {:?}", sa.spi);
                }
                Event::ChildOutbound(sa) => assert!(self.receives.contains(&sa.inbound)),
                Event::ChildDeleted { inbound, .. } => assert!(self.receives.remove(&inbound)),
                Event::PeerUp { .. } => self.up = true,
                Event::PeerDown { .. } => self.up = false,
                Event::PeerFailed { .. }
                | Event::PeerMoved { .. }
                | Event::Refused { .. }
                | Event::ChildFailed { .. } => {}
            }
        }
    }

    /// All that is due until `now`. Time must not stand still.
    fn pass(&mut self, now: Instant) {
        for _ in 0..1000 {
            self.hear();
            match self.endpoint.poll_timeout().filter(|at| *at <= now) {
                Some(at) => self.endpoint.handle_timeout(at),
                None => return,
            }
        }
        panic!("time stands still");
    }
}

/// Cuts the next part off: its length in two octets comes first.
fn part<'a>(bytes: &mut &'a [u8]) -> Option<&'a [u8]> {
    let (len, rest) = bytes.split_first_chunk::<2>()?;
    let len = usize::from(u16::from_be_bytes(*len)).min(rest.len());
    let (part, rest) = rest.split_at(len);
    *bytes = rest;
    Some(part)
}

/// Datagrams of somebody without keys, to a host that has begun with a peer: before each its ways (bits: with the SPI
/// that the host began with; with the responder's SPI that it last gave; from the peer's address; a second later; with
/// a length in the header that fits), and its length.
pub fn stranger(mut bytes: &[u8], begin: Instant) {
    let mut now = begin;
    let mut host = Host::new(0, "a secret that is not in any input", now);
    let (mut first, mut given) = ([0; 8], [0; 8]);
    while let Some((ways, rest)) = bytes.split_first() {
        bytes = rest;
        let Some(part) = part(&mut bytes) else { return };
        super::datagram(part);
        let mut datagram = part.to_vec();
        while let Some(sent) = host.endpoint.poll_transmit() {
            if let Some(header) = sent.bytes.get(4..20) {
                // A request of its own, or an answer.
                let to = if header[8..] == [0; 8] { &mut first } else { &mut given };
                to.copy_from_slice(if header[8..] == [0; 8] { &header[..8] } else { &header[8..] });
            }
        }
        if datagram.len() >= 28 {
            if ways & 1 != 0 {
                datagram[..8].copy_from_slice(&first);
            }
            if ways & 2 != 0 {
                datagram[8..16].copy_from_slice(&given);
            }
            if ways & 16 != 0 {
                let len = datagram.len() as u32;
                datagram[24..28].copy_from_slice(&len.to_be_bytes());
            }
        }
        if ways & 8 != 0 {
            now += Duration::from_secs(1);
            host.pass(now);
        }
        let remote = if ways & 4 != 0 { address(1) } else { SocketAddr::from(([198, 51, 100, 7], 4500)) };
        let payload = [&NON_ESP_MARKER[..], &datagram].concat();
        host.endpoint.handle_datagram(&payload, Path { local: address(0), remote }, now);
        host.hear();
    }
    assert!(!host.up && host.receives.is_empty(), "somebody without keys became a peer");
    host.pass(now + HOUR / 30);
    assert_eq!(host.endpoint.half_open(), 0);
}

/// What a peer that holds the keys may send, and what both may do meanwhile. Each step begins with what it is:
/// anything under the peer's keys (exchange, ways, type of the first payload, content), time, or an honest act.
pub fn insider(mut bytes: &[u8], begin: Instant) {
    let mut now = begin;
    let mut hosts = [0, 1].map(|host| Host::new(host, "known to both", now));
    exchange(&mut hosts, now);
    assert!(hosts[0].up && hosts[1].up);
    while let Some((step, rest)) = bytes.split_first() {
        bytes = rest;
        match step % 16 {
            0..8 => {
                let Some(([kind, ways, first], rest)) = bytes.split_first_chunk::<3>() else { return };
                bytes = rest;
                let Some(content) = part(&mut bytes) else { return };
                let content = (PayloadType::from(*first), content);
                super::authenticated(&[&[*first], content.1].concat());
                let made = forge(&mut hosts, ExchangeType::from(*kind), *ways, content);
                if let Some(datagram) = made {
                    let payload = [&NON_ESP_MARKER[..], &datagram].concat();
                    let path = Path { local: address(0), remote: address(1) };
                    hosts[0].endpoint.handle_datagram(&payload, path, now);
                    hosts[0].hear();
                }
            }
            8 => hosts[0].endpoint.rekey_children(PEER, now),
            9 => hosts[0].endpoint.rekey_ike(PEER, now),
            10 => hosts[0].endpoint.reauthenticate(PEER, now),
            11 => hosts[1].endpoint.rekey_children(PEER, now),
            12 => hosts[1].endpoint.rekey_ike(PEER, now),
            13 => {
                // What is under way is lost.
                for host in &mut hosts {
                    while host.endpoint.poll_transmit().is_some() {}
                }
            }
            14 => exchange(&mut hosts, now),
            15 => {
                now += Duration::from_secs(1);
                for host in &mut hosts {
                    host.pass(now);
                }
            }
            _ => {}
        }
        hosts.iter_mut().for_each(Host::hear);
    }
    // Whatever was said, the two have their tunnel again.
    let end = now + HOUR;
    while now < end {
        now += Duration::from_secs(1);
        for host in &mut hosts {
            host.pass(now);
        }
        exchange(&mut hosts, now);
        if now > begin + HOUR / 12 && hosts.iter().all(settled) {
            return;
        }
    }
    panic!("not within an hour: {}", hosts.map(|it| it.endpoint.story()).concat());
}

fn settled(host: &Host) -> bool {
    let sas = host.endpoint.sas(PEER);
    host.up && sas.len() == 1 && sas[0].up && sas[0].children.iter().any(|it| it.up)
}

/// Lets the two talk until they have said all.
fn exchange(hosts: &mut [Host; 2], now: Instant) {
    for _ in 0..100 {
        let mut quiet = true;
        for from in [0, 1] {
            while let Some(sent) = hosts[from].endpoint.poll_transmit() {
                quiet = false;
                let path = Path { local: address(1 - from), remote: address(from) };
                hosts[1 - from].endpoint.handle_datagram(&sent.bytes, path, now);
                hosts[1 - from].hear();
            }
            hosts[from].hear();
        }
        if quiet {
            return;
        }
    }
    panic!("the two never stop talking");
}

/// A datagram under the keys of the second host's IKE SA. Ways, as bits: an answer to what the first host has under
/// way; a repetition; a fragment of so many.
fn forge(
    hosts: &mut [Host; 2],
    kind: ExchangeType,
    ways: u8,
    content: (PayloadType, &[u8]),
) -> Option<Vec<u8>> {
    let spis = hosts[0].endpoint.sas(PEER).first()?.spis;
    let (expected, outstanding) = hosts[0].endpoint.ids(&spis)?;
    let id = match (ways & 1 != 0, ways & 2 != 0) {
        (true, _) => outstanding?,
        (false, false) => expected,
        (false, true) => expected.wrapping_sub(1),
    };
    let fragment = (ways & 0x80 != 0).then_some((u16::from(ways >> 2 & 3) + 1, u16::from(ways >> 4 & 3) + 1));
    hosts[1].endpoint.forge(&spis, (kind, id, ways & 1 != 0), fragment, content)
}
