//! `ike` and `esp` against charon with the ESP of a Debian kernel: what its userspace ESP cannot show.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Instant;

use droveway::lab::{Lab, LabSpec};
use ike::proposal::EspOffer;
use ike::wire::{IpSelector, SecurityLabel};
use ike::{ChildConfig, ChildId, Initiate};

use crate::guest::peer::{PEER, PORT, Peer, Terms};
use crate::guest::{self, Guest, Parts};
use crate::support::{LIMIT, skipped, spec, until};

const HERE: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 5);
const MOVED: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 66);
const GUEST_MOVED: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 181);
const PSK: &[u8] = b"of a test, and of no other";

const PLAIN: Inner = Inner { id: ChildId(1), name: "plain", third: 0, label: None };
const RED: Inner = Inner { id: ChildId(2), name: "red", third: 10, label: Some("red") };
const BLUE: Inner = Inner { id: ChildId(3), name: "blue", third: 20, label: Some("blue") };
/// What we say instead of [`BLUE`].
const AZURE: Inner = Inner { name: "azure", label: Some("azure"), ..BLUE };

/// A child and its addresses: `10.9.1.1` here and `10.9.2.1` there, or further on.
#[derive(Clone, Copy)]
struct Inner {
    id: ChildId,
    name: &'static str,
    third: u8,
    label: Option<&'static str>,
}

impl Inner {
    fn ours(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 9, 1 + self.third, 1)
    }

    fn theirs(self) -> Ipv4Addr {
        Ipv4Addr::new(10, 9, 2 + self.third, 1)
    }

    fn wanted(self) -> ChildConfig {
        let host = |address: Ipv4Addr| vec![IpSelector::prefix(address.into(), 32)];
        // charon's labels are strings of C, whose end is part of them.
        let label = self.label.map(|label| SecurityLabel::new([label.as_bytes(), &[0]].concat()).unwrap());
        ChildConfig {
            id: self.id,
            label,
            worker: None,
            local: host(self.ours()),
            remote: host(self.theirs()),
            esp: EspOffer::default(),
        }
    }

    /// Its part of `swanctl.conf`.
    fn told(self, esp: &str) -> String {
        let label = self.label.map(|it| format!("label = {it}\n label_mode = simple\n")).unwrap_or_default();
        format!(
            "{} {{\n local_ts = {}/32\n remote_ts = {}/32\n esp_proposals = {esp}\n {label} }}\n",
            self.name,
            self.theirs(),
            self.ours()
        )
    }

    /// Packets that charon's kernel has counted on the child's latest SA: in, out.
    fn counted(self, guest: &mut Guest) -> (u32, u32) {
        let said = guest.check(&format!("swanctl --list-sas --child {}", self.name));
        let of = |way: &str| {
            let line = said.lines().rev().find(|line| line.trim_start().starts_with(way)).unwrap();
            line.split(" packets").next().unwrap().rsplit(' ').next().unwrap().parse().unwrap()
        };
        (of("in "), of("out "))
    }
}

fn config(children: &[String]) -> String {
    format!(
        "connections {{ us {{\n version = 2\n remote_addrs = {HERE}, {MOVED}\n mobike = yes\n \
         proposals = aes256gcm16-prfsha256-x25519\n \
         local {{ auth = psk\n id = guest.example }}\n remote {{ auth = psk\n id = peer.example }}\n \
         children {{ {} }}\n}} }}\nsecrets {{ ike-us {{ secret = \"{}\" }} }}\n",
        children.concat(),
        String::from_utf8_lossy(PSK)
    )
}

fn set_up(children: &[(Inner, &str)]) -> Option<(Lab, Guest, Peer)> {
    let parts = match Parts::find() {
        Ok(parts) => parts,
        Err(why) => {
            skipped(&why);
            return None;
        }
    };
    let lab = Lab::up(LabSpec { bare: true, ..spec(1) }).unwrap();
    let mut guest = Guest::boot(&lab, &parts);
    guest.check("ip link add in0 type dummy && ip link set in0 up");
    for (inner, _) in children {
        guest.check(&format!("ip addr add {}/32 dev in0", inner.theirs()));
    }
    let told: Vec<String> = children.iter().map(|(inner, esp)| inner.told(esp)).collect();
    guest.charon(&config(&told));
    let peer = Peer::on(&lab, "h1", HERE);
    Some((lab, guest, peer))
}

fn begin(peer: &Peer, initiate: Initiate, children: &[Inner]) {
    let remote = SocketAddr::from((guest::ADDRESS, PORT));
    let children = children.iter().map(|inner| inner.wanted()).collect();
    peer.begin(Terms { initiate, remote, psk: PSK, children });
}

/// Echoes both ways, and both ends counted them.
fn traffic(guest: &mut Guest, peer: &Peer, inner: Inner) {
    let before = inner.counted(guest);
    assert_eq!(peer.ping(inner.id, inner.ours(), inner.theirs(), 1..6), 0);
    let said = guest.run(&format!("ping -c 5 -i 0.02 -W 2 -I {} {}", inner.theirs(), inner.ours())).1;
    assert!(said.contains("5 packets transmitted, 5 packets received"), "{said}");
    let after = inner.counted(guest);
    assert_eq!((after.0 - before.0, after.1 - before.1), (10, 10));
}

/// We have another address, and charon hears of it.
fn we_move(lab: &Lab, guest: &mut Guest, peer: &Peer, address: Ipv4Addr) {
    lab.readdress("h1", address.into()).unwrap();
    peer.with(|state| state.moved(address));
    let there = format!("swanctl --list-sas | grep -q 'remote.*@ {address}'");
    until(LIMIT, "charon has heard of our move", || guest.run(&there).0);
}

fn agreed_on(peer: &Peer, inner: Inner) -> (usize, String) {
    peer.with(|state| {
        let mut all = state.agreed.iter().filter(|sa| sa.slot.child == inner.id);
        (all.clone().count(), all.next_back().map(|sa| sa.suite.to_string()).unwrap_or_default())
    })
}

#[test]
fn a_charon_with_its_kernel_agrees_on_extended_numbers_rekeys_under_traffic_and_moves_as_we_do() {
    let Some((lab, mut guest, peer)) = set_up(&[(PLAIN, "aes256gcm16-x25519-esn")]) else { return };
    begin(&peer, Initiate::First, &[PLAIN]);
    peer.until("the child is up", |state| state.agreed.len() == 1);
    let listed = guest.check("swanctl --list-sas");
    assert!(listed.contains("ESP:AES_GCM_16-256/ESN"), "{listed}");
    assert_eq!(agreed_on(&peer, PLAIN), (1, "AES_GCM_16_256/ESN".to_owned()));
    assert!(guest.check("ip xfrm state").contains("esn"));
    peer.settle(PLAIN.id, PLAIN.ours(), PLAIN.theirs());
    traffic(&mut guest, &peer, PLAIN);

    // Rekeyed by each side, with echoes both ways all the time: none is lost.
    let (ours, theirs) = (PLAIN.ours(), PLAIN.theirs());
    guest.check(&format!("ping -c 150 -i 0.02 -W 2 -I {theirs} {ours} >/tmp/pings &"));
    for round in 0..2 {
        assert_eq!(peer.ping(PLAIN.id, ours, theirs, 100..120), 0);
        peer.with(|state| {
            state.endpoint.as_mut().unwrap().rekey_children(PEER, Instant::now());
        });
        peer.until("we have rekeyed", |state| state.agreed.len() == 2 + 2 * round);
        assert_eq!(peer.ping(PLAIN.id, ours, theirs, 120..140), 0);
        guest.check("swanctl --rekey --child plain");
        peer.until("charon has rekeyed", |state| state.agreed.len() == 3 + 2 * round);
        assert_eq!(peer.ping(PLAIN.id, ours, theirs, 140..160), 0);
    }
    let said = guest.check("while ! grep transmitted /tmp/pings; do usleep 20000; done");
    let (told, refused) = peer.with(|state| (state.told.join("\n"), state.refused.clone()));
    let wrong = guest.check("awk '$2 > 0' /proc/net/xfrm_stat");
    assert!(
        said.contains("150 packets transmitted, 150 packets received"),
        "{said}told:\n{told}\nrefused here: {refused:?}\nand there:\n{wrong}"
    );
    assert_eq!(agreed_on(&peer, PLAIN).1, "AES_GCM_16_256/CURVE_25519/ESN");
    let listed = guest.check("swanctl --list-sas");
    assert!(listed.contains("ESP:AES_GCM_16-256/CURVE_25519/ESN"), "{listed}");
    traffic(&mut guest, &peer, PLAIN);
    assert_eq!(peer.with(|state| state.refused.clone()), [""; 0]);

    // We are elsewhere, and say so (RFC 4555 §3.5): packets of the same SA follow. And back again.
    let before = agreed_on(&peer, PLAIN).0;
    for address in [MOVED, HERE] {
        we_move(&lab, &mut guest, &peer, address);
        traffic(&mut guest, &peer, PLAIN);
    }
    assert_eq!(agreed_on(&peer, PLAIN).0, before, "the SAs moved; none was made anew");

    // It is for who began an IKE SA to say where packets go, so charon begins the next.
    begin(&peer, Initiate::Never, &[PLAIN]);
    guest.run("swanctl --terminate --ike us --force --timeout 1");
    guest.check("swanctl --initiate --child plain");
    peer.until("charon has begun", |state| state.agreed.len() == before + 1);
    assert_eq!(agreed_on(&peer, PLAIN).1, "AES_GCM_16_256/ESN");
    peer.settle(PLAIN.id, ours, theirs);
    traffic(&mut guest, &peer, PLAIN);
    guest
        .check(&format!("ip addr del {}/24 dev eth0; ip addr add {GUEST_MOVED}/24 dev eth0", guest::ADDRESS));
    peer.until("the guest has moved", |state| state.goes_to(PLAIN.id).ip() == GUEST_MOVED);
    traffic(&mut guest, &peer, PLAIN);
    assert_eq!(agreed_on(&peer, PLAIN).0, before + 1, "the SAs moved; none was made anew");
    // charon takes our word too when it was not us who began.
    we_move(&lab, &mut guest, &peer, MOVED);
    traffic(&mut guest, &peer, PLAIN);
    assert_eq!(agreed_on(&peer, PLAIN).0, before + 1);
    drop((guest, peer));
    lab.down().unwrap();
}

#[test]
fn a_child_with_a_label_is_agreed_on_with_charon_by_either_side_and_refused_with_another_label() {
    let esp = "aes256gcm16-x25519-esn";
    let children = [(PLAIN, "aes128gcm16-x25519-esn"), (RED, esp), (BLUE, esp)];
    let Some((lab, mut guest, peer)) = set_up(&children) else { return };
    let labels = |peer: &Peer| {
        peer.with(|state| state.agreed.iter().map(|sa| (sa.slot.child, sa.label.clone())).collect::<Vec<_>>())
    };
    // For the addresses of `blue` we ask with another label.
    begin(&peer, Initiate::First, &[PLAIN, RED, AZURE]);
    peer.until("azure was refused", |state| {
        state.told.iter().any(|line| line.starts_with("child 3 failed") && line.contains("TS_UNACCEPTABLE"))
    });
    let both = [(PLAIN.id, None), (RED.id, RED.wanted().label)];
    assert_eq!(labels(&peer), both);
    for inner in [PLAIN, RED] {
        peer.settle(inner.id, inner.ours(), inner.theirs());
        traffic(&mut guest, &peer, inner);
    }
    let listed = guest.check("swanctl --list-sas --child red");
    assert!(
        listed.contains("label  red") && listed.contains("ESP:AES_GCM_16-256/CURVE_25519/ESN"),
        "{listed}"
    );
    peer.with(|state| state.endpoint.as_mut().unwrap().rekey_children(PEER, Instant::now()));
    peer.until("both are rekeyed", |state| state.agreed.len() == 4);
    traffic(&mut guest, &peer, RED);

    // And the other way round.
    begin(&peer, Initiate::Never, &[PLAIN, RED, AZURE]);
    peer.with(|state| state.agreed.clear());
    guest.run("swanctl --terminate --ike us --force --timeout 1");
    guest.check("swanctl --initiate --child plain && swanctl --initiate --child red");
    let (done, said) = guest.run("swanctl --initiate --child blue");
    assert!(!done && said.contains("TS_UNACCEPTABLE"), "{said}");
    assert_eq!(labels(&peer), both);
    peer.settle(RED.id, RED.ours(), RED.theirs());
    traffic(&mut guest, &peer, RED);
    assert!(guest.check("swanctl --list-sas --child red").contains("label  red"));
    drop((guest, peer));
    lab.down().unwrap();
}
