//! The two sides of an SA against each other, against a model, and against other implementations' vectors.

mod known_answers;
mod properties;
mod wycheproof;

use std::ops::Range;

use packet::{esp, ipv4, ipv6, protocol};

use crate::{
    Inbound, InnerPolicy, KeyMaterial, Limits, Opened, Outbound, Reason, Sequence, Spi, Suite, key::Key,
    window::Window,
};

/// 10.42.0.0/26 and fd00::/64 may send to 10.42.0.64/26 and fd00::/64.
fn policy() -> InnerPolicy {
    let nets = |list: [&str; 2]| list.map(|net| net.parse().unwrap());
    InnerPolicy::new(nets(["10.42.0.0/26", "fd00::/64"]), nets(["10.42.0.64/26", "fd00::/64"]))
}

fn material() -> KeyMaterial {
    KeyMaterial::new(Suite::Aes256Gcm16, &[0x5a; 36]).unwrap()
}

fn spi() -> Spi {
    Spi::new(0x1234_5678).unwrap()
}

fn pair(sequence: Sequence) -> (Outbound, Inbound) {
    pair_at(1, sequence, Limits::of(sequence))
}

fn pair_at(first: u64, sequence: Sequence, limits: Limits) -> (Outbound, Inbound) {
    (
        Outbound::starting_at(first, spi(), &material(), sequence, limits).unwrap(),
        Inbound::new(spi(), &material(), sequence).unwrap(),
    )
}

fn inner_v4(length: usize) -> Vec<u8> {
    let mut packet = vec![0x11; length];
    let repr = ipv4::Repr {
        protocol: protocol::UDP,
        source: [10, 42, 0, 5].into(),
        destination: [10, 42, 0, 70].into(),
        payload_len: (length - 20) as u16,
        ..ipv4::Repr::default()
    };
    repr.emit(&mut packet);
    packet
}

fn inner_v6(length: usize) -> Vec<u8> {
    let mut packet = vec![0x22; length];
    let repr = ipv6::Repr {
        source: "fd00::5".parse().unwrap(),
        destination: "fd00::6".parse().unwrap(),
        payload_len: (length - 40) as u16,
        ..ipv6::Repr::default()
    };
    repr.emit(&mut packet);
    packet
}

fn seal_one(sa: &Outbound, inner: &[u8]) -> Result<Vec<u8>, Reason> {
    let mut buffer = vec![0; esp::sealed_len(inner.len())];
    buffer[esp::HEAD_ROOM..][..inner.len()].copy_from_slice(inner);
    let length = sa.begin(1)?.seal(&mut buffer, inner.len())?;
    assert_eq!(length, buffer.len());
    Ok(buffer)
}

fn open_one(sa: &Inbound, packet: &mut [u8], policy: &InnerPolicy) -> Result<Opened, Reason> {
    sa.begin().open(packet, policy)
}

/// Seals any plaintext, trailer included, as no honest sender would.
fn seal_raw(number: u64, plain: &[u8]) -> Vec<u8> {
    let mut packet = vec![0; esp::HEAD_ROOM + plain.len() + esp::ICV_LEN];
    let header = esp::Header { spi: spi().get(), sequence: number as u32 };
    packet[..8].copy_from_slice(&header.emit());
    packet[8..16].copy_from_slice(&number.to_be_bytes());
    let (body, icv) = packet[16..].split_at_mut(plain.len());
    body.copy_from_slice(plain);
    let key = Key::new(&material(), spi(), Sequence::Extended).unwrap();
    assert!(key.seal(number, number.to_be_bytes(), body, icv));
    packet
}

fn range(opened: Opened) -> Range<usize> {
    match opened {
        Opened::Packet(range) => range,
        Opened::Dummy => panic!("a dummy"),
    }
}

#[test]
fn packets_of_either_family_and_every_length_go_through() {
    for sequence in [Sequence::Short, Sequence::Extended] {
        let (out, inbound) = pair(sequence);
        for inner in (20..70).map(inner_v4).chain((40..90).map(inner_v6)).chain([inner_v4(65_000)]) {
            let mut packet = seal_one(&out, &inner).unwrap();
            let range = range(open_one(&inbound, &mut packet, &policy()).unwrap());
            assert_eq!(packet[range], inner);
        }
        assert_eq!(out.counters(), inbound.counters());
        assert_eq!(inbound.counters().packets, 101);
        assert_eq!(inbound.counters().drops().count(), 0);
    }
}

#[test]
fn a_packet_is_accepted_once_and_its_copy_never() {
    let (out, inbound) = pair(Sequence::Extended);
    let packet = seal_one(&out, &inner_v4(100)).unwrap();
    assert!(open_one(&inbound, &mut packet.clone(), &policy()).is_ok());
    for _ in 0..3 {
        assert_eq!(open_one(&inbound, &mut packet.clone(), &policy()), Err(Reason::Replayed));
    }
    assert_eq!(inbound.counters().dropped(Reason::Replayed), 3);
}

#[test]
fn a_false_packet_does_not_move_the_window_nor_burn_its_number() {
    let (out, inbound) = pair(Sequence::Extended);
    let good = seal_one(&out, &inner_v4(100)).unwrap();
    let mut far = good.clone();
    far[4..8].copy_from_slice(&1_000_000u32.to_be_bytes());
    assert_eq!(open_one(&inbound, &mut far, &policy()), Err(Reason::Authentication));
    let mut broken = good.clone();
    broken[40] ^= 1;
    assert_eq!(open_one(&inbound, &mut broken, &policy()), Err(Reason::Authentication));
    assert_eq!(inbound.begin().highest(), 0);
    assert!(open_one(&inbound, &mut good.clone(), &policy()).is_ok());
}

#[test]
fn a_replay_is_refused_before_any_cryptography() {
    let (out, inbound) = pair(Sequence::Extended);
    let mut packet = seal_one(&out, &inner_v4(100)).unwrap();
    open_one(&inbound, &mut packet.clone(), &policy()).unwrap();
    packet[30] ^= 1;
    let before = packet.clone();
    assert_eq!(open_one(&inbound, &mut packet, &policy()), Err(Reason::Replayed), "not Authentication");
    assert_eq!(packet, before, "not decrypted");
}

#[test]
fn what_was_wrong_inside_an_authentic_packet_is_told_and_its_number_is_used_up() {
    let sealed = |number, inner: &[u8], trailer: &[u8]| seal_raw(number, &[inner, trailer].concat());
    let spoofed = |at: usize, byte: u8| {
        let mut inner = inner_v4(22);
        inner[at] = byte;
        inner
    };
    let cases = [
        (sealed(1, &inner_v4(22), &[0, 4]), Ok(())),
        (sealed(2, &inner_v4(22), &[2, 1, 2, 4]), Err(Reason::BadPadding)),
        (sealed(3, &[0; 4], &[200, 4]), Err(Reason::BadPadding)),
        (sealed(4, &inner_v4(22), &[0, 50]), Err(Reason::BadNextHeader)),
        (sealed(5, &inner_v4(22), &[0, 41]), Err(Reason::BadInner)),
        (sealed(6, &inner_v6(42), &[0, 4]), Err(Reason::BadInner)),
        (sealed(7, &inner_v4(22)[..18], &[0, 4]), Err(Reason::BadInner)),
        (sealed(8, &spoofed(15, 64), &[0, 4]), Err(Reason::InnerSource)),
        (sealed(9, &spoofed(19, 5), &[0, 4]), Err(Reason::InnerDestination)),
        (sealed(10, &[], &[1, 2, 2, 4]), Err(Reason::BadInner)),
    ];
    let inbound = Inbound::new(spi(), &material(), Sequence::Extended).unwrap();
    for (packet, expected) in cases {
        let opened = open_one(&inbound, &mut packet.clone(), &policy());
        assert_eq!(opened.map(drop), expected);
        assert_eq!(open_one(&inbound, &mut packet.clone(), &policy()), Err(Reason::Replayed));
        if let Err(reason) = expected {
            assert!(inbound.counters().dropped(reason) > 0);
        }
    }
    assert_eq!(inbound.counters().packets, 1);
}

#[test]
fn dummies_are_passed_over_and_padding_for_confidentiality_is_cut_off() {
    let inbound = Inbound::new(spi(), &material(), Sequence::Extended).unwrap();
    let mut dummy = seal_raw(1, &[0xff, 0xff, 0, 59]);
    assert_eq!(open_one(&inbound, &mut dummy, &policy()), Ok(Opened::Dummy));
    let padded = [&inner_v4(30)[..], &[0; 500], &[0, 4]].concat();
    let mut packet = seal_raw(2, &padded);
    let range = range(open_one(&inbound, &mut packet, &policy()).unwrap());
    assert_eq!(packet[range], inner_v4(30));
    assert_eq!(inbound.counters().bytes, 30);
}

#[test]
fn nobody_s_addresses_are_allowed_by_default() {
    let (out, inbound) = pair(Sequence::Extended);
    let mut packet = seal_one(&out, &inner_v4(30)).unwrap();
    assert_eq!(open_one(&inbound, &mut packet, &InnerPolicy::default()), Err(Reason::InnerSource));
}

#[test]
fn sealing_needs_room_and_an_ip_packet_and_failing_uses_up_no_number() {
    let (out, inbound) = pair(Sequence::Extended);
    let mut burst = out.begin(10).unwrap();
    let inner = inner_v4(30);
    let mut buffer = vec![0; esp::sealed_len(30)];
    buffer[esp::HEAD_ROOM..][..30].copy_from_slice(&inner);
    assert_eq!(burst.seal(&mut buffer[..esp::sealed_len(30) - 1], 30), Err(Reason::NoRoom));
    assert_eq!(burst.seal(&mut vec![0x45; 70_000], 65_536), Err(Reason::NoRoom));
    assert_eq!(burst.seal(&mut [0x45; 100], 0), Err(Reason::BadInner));
    assert_eq!(burst.seal(&mut [0x75; 100], 30), Err(Reason::BadInner));
    assert_eq!(burst.left(), 10);
    burst.seal(&mut buffer, 30).unwrap();
    assert_eq!(burst.left(), 9);
    drop(burst);
    open_one(&inbound, &mut buffer, &policy()).unwrap();
    assert_eq!(inbound.begin().highest(), 1);
    assert_eq!(out.counters().dropped(Reason::NoRoom), 2);
}

#[test]
fn sealing_stops_before_the_numbers_end_and_never_starts_again() {
    for (sequence, last) in [(Sequence::Short, u64::from(u32::MAX)), (Sequence::Extended, u64::MAX - 1)] {
        let (out, _) = pair_at(last - 2, sequence, Limits::of(sequence));
        let mut burst = out.begin(100).unwrap();
        assert_eq!(burst.left(), 3, "no more than there are");
        let mut buffer = vec![0; 200];
        for _ in 0..3 {
            buffer[esp::HEAD_ROOM..][..30].copy_from_slice(&inner_v4(30));
            burst.seal(&mut buffer, 30).unwrap();
        }
        buffer[esp::HEAD_ROOM..][..30].copy_from_slice(&inner_v4(30));
        assert_eq!(burst.seal(&mut buffer, 30), Err(Reason::Exhausted));
        drop(burst);
        assert!(out.wants_rekey());
        for _ in 0..3 {
            assert_eq!(out.begin(1).unwrap_err(), Reason::Exhausted);
        }
        assert_eq!(out.counters().packets, 3);
        assert_eq!(out.counters().dropped(Reason::Exhausted), 4);
    }
}

#[test]
fn soft_limits_ask_for_a_rekey_and_hard_ones_end_the_sa() {
    let limits = Limits { soft_packets: 3, soft_bytes: 1000, hard_packets: 5 };
    let (out, _) = pair_at(1, Sequence::Extended, limits);
    (0..3).for_each(|_| drop(seal_one(&out, &inner_v4(30)).unwrap()));
    assert!(out.wants_rekey());
    (0..2).for_each(|_| drop(seal_one(&out, &inner_v4(30)).unwrap()));
    assert_eq!(seal_one(&out, &inner_v4(30)), Err(Reason::Exhausted));

    let (out, _) = pair_at(1, Sequence::Extended, Limits { soft_packets: 100, hard_packets: 100, ..limits });
    seal_one(&out, &inner_v4(999)).unwrap();
    assert!(!out.wants_rekey());
    seal_one(&out, &inner_v4(20)).unwrap();
    assert!(out.wants_rekey());
}

#[test]
fn numbers_that_a_burst_did_not_use_are_skipped_and_not_given_out_again() {
    let (out, inbound) = pair(Sequence::Extended);
    drop(out.begin(1000).unwrap());
    let mut packet = seal_one(&out, &inner_v4(30)).unwrap();
    open_one(&inbound, &mut packet, &policy()).unwrap();
    assert_eq!(inbound.begin().highest(), 1001);
}

#[test]
fn a_stopped_sa_neither_seals_nor_opens() {
    let (out, inbound) = pair(Sequence::Extended);
    let mut packet = seal_one(&out, &inner_v4(30)).unwrap();
    out.stop();
    inbound.stop();
    assert_eq!(seal_one(&out, &inner_v4(30)), Err(Reason::Stopped));
    assert_eq!(open_one(&inbound, &mut packet, &policy()), Err(Reason::Stopped));
}

#[test]
fn extended_numbers_run_over_the_end_of_the_low_half_with_loss_and_reorder() {
    let start = (1u64 << 32) - 500;
    let (out, inbound) = pair_at(start, Sequence::Extended, Limits::of(Sequence::Extended));
    inbound.set_window(Window::at(start - 1));
    let mut packets: Vec<_> = (0..1000).map(|_| seal_one(&out, &inner_v4(30)).unwrap()).collect();
    packets.chunks_mut(7).for_each(<[_]>::reverse);
    for (index, packet) in packets.iter_mut().enumerate().filter(|(index, _)| index % 10 != 0) {
        assert!(open_one(&inbound, packet, &policy()).is_ok(), "packet {index}");
    }
    assert_eq!(inbound.counters().packets, 900);
}

#[test]
fn keys_are_never_printed_and_must_have_their_suite_s_length() {
    let material = KeyMaterial::new(Suite::Aes128Gcm16, &[0xab; 20]).unwrap();
    let (out, inbound) = pair(Sequence::Extended);
    let text = format!("{material:?} {out:?} {inbound:?}");
    assert!(!text.contains("171") && !text.contains("90") && !text.contains("5a"), "{text}");
    let error = KeyMaterial::new(Suite::Aes256Gcm16, &[0; 32]).unwrap_err();
    assert_eq!(error.to_string(), "AES_GCM_16-256 takes 36 bytes of key material, 32 were given");
    assert!(Spi::new(255).is_none() && Spi::new(0).is_none());
    assert_eq!(Spi::new(0x00c0_ffee).unwrap().to_string(), "00c0ffee");
}
