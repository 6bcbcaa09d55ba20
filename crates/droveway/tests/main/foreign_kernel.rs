//! `esp` against the ESP of a Debian kernel: packets both ways, counted by both.

use std::fmt::Write;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use droveway::lab::{Lab, LabSpec};
use esp::{Inbound, InnerPolicy, KeyMaterial, Limits, Outbound, Sequence, Spi, Suite};
use ike::{ChildId, Path};
use ipnet::IpNet;

use crate::guest::peer::{PORT, Peer, Sending};
use crate::guest::{self, Guest, Parts};
use crate::support::{skipped, spec};

const CHILD: ChildId = ChildId(1);
const HERE: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 5);
const OURS: Ipv4Addr = Ipv4Addr::new(10, 9, 1, 1);
const THEIRS: Ipv4Addr = Ipv4Addr::new(10, 9, 2, 1);
/// SPIs by who receives on them.
const TO_GUEST: u32 = 0x1000_0001;
const TO_US: u32 = 0x2000_0002;
/// As many echoes as each side sends.
const ECHOES: u16 = 10;

/// Two SAs, each the other's way back.
#[derive(Clone, Copy)]
struct Case {
    suite: Suite,
    sequence: Sequence,
    /// Says where keys come from: no two cases may have the same.
    salt: u8,
    /// What the guest has sent before, as if.
    sent: u64,
}

impl Case {
    fn key(self, towards: u8) -> Vec<u8> {
        (0..self.suite.key_material_len()).map(|i| i as u8 ^ self.salt << 1 ^ towards).collect()
    }

    /// What the guest's kernel is told.
    fn guests(self) -> String {
        let mut script = "ip xfrm state flush; ip xfrm policy flush; set -e\n".to_owned();
        let replay = match self.sequence {
            Sequence::Short => "replay-window 32",
            Sequence::Extended => "replay-window 128 flag esn",
        };
        let guest = guest::ADDRESS;
        for (source, destination, spi, key, sent) in
            [(HERE, guest, TO_GUEST, 1, 0), (guest, HERE, TO_US, 2, self.sent)]
        {
            let mut hex = String::new();
            self.key(key).iter().for_each(|byte| write!(hex, "{byte:02x}").unwrap());
            let (high, low) = (sent >> 32, sent as u32);
            let high = if self.sequence == Sequence::Extended {
                format!("replay-oseq-hi {high}")
            } else {
                String::new()
            };
            writeln!(
                script,
                "ip xfrm state add src {source} dst {destination} proto esp spi {spi:#x} reqid 7 mode tunnel \
                 {replay} replay-oseq {low} {high} aead 'rfc4106(gcm(aes))' 0x{hex} 128 \
                 encap espinudp {PORT} {PORT} 0.0.0.0"
            )
            .unwrap();
        }
        for (direction, source, destination, from, to) in
            [("out", THEIRS, OURS, guest, HERE), ("in", OURS, THEIRS, HERE, guest)]
        {
            writeln!(
                script,
                "ip xfrm policy add dir {direction} src {source}/32 dst {destination}/32 \
                 tmpl src {from} dst {to} proto esp reqid 7 mode tunnel"
            )
            .unwrap();
        }
        script
    }

    /// What we are told.
    fn ours(self, peer: &Peer) {
        let sa = |spi, towards| {
            (Spi::new(spi).unwrap(), KeyMaterial::new(self.suite, &self.key(towards)).unwrap())
        };
        let (spi, material) = sa(TO_US, 2);
        let inbound = Inbound::new(spi, &material, self.sequence).unwrap();
        let (spi, material) = sa(TO_GUEST, 1);
        let outbound = Outbound::new(spi, &material, self.sequence, Limits::of(self.sequence)).unwrap();
        let policy = InnerPolicy::new([IpNet::from(IpAddr::from(THEIRS))], [IpNet::from(IpAddr::from(OURS))]);
        let path = Path { local: (HERE, PORT).into(), remote: SocketAddr::from((guest::ADDRESS, PORT)) };
        peer.with(|state| {
            state.clear();
            state.asked.clear();
            state.add(CHILD, inbound, policy, Sending { sa: outbound, path });
        });
    }
}

/// What the guest's kernel has counted on the SA with this SPI: packets, and what it says of its numbers.
fn counted(guest: &mut Guest, spi: u32) -> (u32, String) {
    let text = guest.check("ip -s xfrm state");
    let states = text.split("\nsrc ").find(|state| state.contains(&format!("spi {spi:#010x}")));
    let state = states.unwrap_or_else(|| panic!("no {spi:#x} in {text}")).to_owned();
    let current = state.split("lifetime current:").nth(1).unwrap();
    let packets = current.split("(bytes), ").nth(1).unwrap().split('(').next().unwrap();
    (packets.parse().unwrap(), state)
}

/// A line of `/proc/net/xfrm_stat`, all of which count what went wrong.
fn wrong(guest: &mut Guest) -> String {
    guest.check("awk '$2 > 0' /proc/net/xfrm_stat")
}

fn guest_pings(guest: &mut Guest, count: u16) {
    let said = guest.run(&format!("ping -c {count} -i 0.02 -W 2 -I {THEIRS} {OURS}")).1;
    assert!(said.contains(&format!("{count} packets transmitted, {count} packets received")), "{said}");
}

fn set_up() -> Option<(Lab, Guest, Peer)> {
    let parts = match Parts::find() {
        Ok(parts) => parts,
        Err(why) => {
            skipped(&why);
            return None;
        }
    };
    let lab = Lab::up(LabSpec { bare: true, ..spec(1) }).unwrap();
    let mut guest = Guest::boot(&lab, &parts);
    // charon has nothing to do but to hold a socket that takes ESP out of UDP: no tool of the kernel's makes one.
    guest.charon("");
    guest.check(&format!(
        "ip link add in0 type dummy && ip addr add {THEIRS}/32 dev in0 && ip link set in0 up && \
         ip route add {OURS} via {HERE} src {THEIRS}"
    ));
    let peer = Peer::on(&lab, "h1", HERE);
    Some((lab, guest, peer))
}

#[test]
fn a_debian_kernel_and_esp_understand_each_other_with_and_without_extended_numbers_and_across_their_border() {
    let Some((lab, mut guest, peer)) = set_up() else { return };
    let suites = [Suite::Aes128Gcm16, Suite::Aes256Gcm16];
    let cases =
        suites.into_iter().flat_map(|suite| [Sequence::Short, Sequence::Extended].map(|it| (suite, it)));
    for (salt, (suite, sequence)) in (0..).zip(cases) {
        let case = Case { suite, sequence, salt, sent: 0 };
        guest.check(&case.guests());
        case.ours(&peer);
        assert_eq!(peer.ping(CHILD, OURS, THEIRS, 1..ECHOES + 1), 0, "{suite} {sequence:?}");
        guest_pings(&mut guest, ECHOES);
        for spi in [TO_GUEST, TO_US] {
            let (packets, state) = counted(&mut guest, spi);
            assert_eq!(packets, u32::from(2 * ECHOES), "{suite} {sequence:?}: {state}");
            assert_eq!(
                state.contains("flag") && state.contains("esn"),
                sequence == Sequence::Extended,
                "{state}"
            );
        }
        let here = peer.with(|state| (state.asked[&CHILD], state.highest(CHILD)));
        assert_eq!(here, (u32::from(ECHOES), u64::from(2 * ECHOES)), "{suite} {sequence:?}");
    }

    assert_eq!(wrong(&mut guest), "");

    // What is not agreed on does not get through, and what went wrong is counted: the checks above can fail.
    let case = Case { suite: Suite::Aes256Gcm16, sequence: Sequence::Extended, salt: 8, sent: 0 };
    guest.check(&case.guests());
    Case { sequence: Sequence::Short, ..case }.ours(&peer);
    assert_eq!(peer.ping(CHILD, OURS, THEIRS, 1..2), 1);
    let refused = wrong(&mut guest);
    assert_eq!(refused.split_whitespace().collect::<Vec<_>>(), ["XfrmInStateProtoError", "1"]);

    // Across 2^32, both ways. The guest begins where we still infer that no wrap has been: more than a window before it.
    let border = 1_u64 << 32;
    let begin = border - 2 * esp::WINDOW;
    let case = Case { suite: Suite::Aes256Gcm16, sequence: Sequence::Extended, salt: 9, sent: begin };
    guest.check(&case.guests());
    case.ours(&peer);
    // Numbers that are taken and not used are skipped; a step is at most half of the space, or it would look like one back.
    let skip = |count| peer.with(|state| drop(state.sending(CHILD).begin(count).unwrap()));
    for step in [1 << 31, (1 << 31) - 5] {
        skip(step);
        assert_eq!(peer.ping(CHILD, OURS, THEIRS, 1..2), 0);
    }
    let before = peer.with(|state| state.highest(CHILD));
    assert_eq!(before, begin + 2, "what the guest has sent");
    // The guest's counter moves as ours did: the same SA with a later number, which no packet has had.
    let case = Case { sent: border - 5, ..case };
    guest.check(&later(case));
    assert_eq!(peer.ping(CHILD, OURS, THEIRS, 2..2 + ECHOES), 0);
    guest_pings(&mut guest, ECHOES);
    let highest = peer.with(|state| state.highest(CHILD));
    assert_eq!(highest, border - 5 + u64::from(2 * ECHOES));
    let (_, received) = counted(&mut guest, TO_GUEST);
    assert!(received.contains("seq-hi 0x1, seq 0x"), "{received}");
    let (_, sent) = counted(&mut guest, TO_US);
    assert!(sent.contains("oseq-hi 0x1, oseq 0x"), "{sent}");
    assert_eq!(wrong(&mut guest), refused, "nothing since");
    assert_eq!(peer.with(|state| state.refused.clone()), [""; 0]);
    drop((guest, peer));
    lab.down().unwrap();
}

/// The guest's sending SA anew, with the number that it now begins after.
fn later(case: Case) -> String {
    let script = case.guests();
    let line = script.lines().find(|line| line.contains(&format!("spi {TO_US:#x}"))).unwrap();
    format!("ip xfrm state delete src {} dst {HERE} proto esp spi {TO_US:#x} && {line}", guest::ADDRESS)
}
