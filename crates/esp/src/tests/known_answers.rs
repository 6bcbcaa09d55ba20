//! ESP packets made by another implementation.
//!
//! Made once with Python's `cryptography` 48 (OpenSSL's AES-GCM), by a script that builds each packet from RFC 4303
//! §2 and RFC 4106 with `struct` and `AESGCM(key).encrypt(salt + iv, inner + padding + trailer, aad)`: AAD is SPI and
//! sequence number, of 64 bits where they are extended; padding is 1, 2, 3 up to a multiple of four; key material
//! is random, key then salt.

use super::{open_one, policy};
use crate::{Inbound, KeyMaterial, Limits, Opened, Outbound, Reason, Sequence, Spi, Suite, window::Window};
use packet::esp;

struct Case {
    name: &'static str,
    suite: Suite,
    sequence: Sequence,
    number: u64,
    /// Our own packet would be the same: the IV is the counter and there is no extra padding.
    own_iv: bool,
    key: &'static str,
    inner: &'static str,
    packet: &'static str,
}

const CASES: [Case; 8] = [
    Case {
        name: "the first packet of an SA, no padding needed",
        suite: Suite::Aes128Gcm16,
        sequence: Sequence::Short,
        number: 1,
        own_iv: true,
        key: "18a9cac93dccabde3ef89c49145012076cad53b1",
        inner: "4500001600014000401126380a2a00050a2a0046030a",
        packet: "00001000000000010000000000000001158174d69bd521bab8b35ba5876804a31b889d79e7fd9ee744aa59c3ccbb9d05e532b5de72ff7cd7",
    },
    Case {
        name: "256 bits, two bytes of padding",
        suite: Suite::Aes256Gcm16,
        sequence: Sequence::Short,
        number: 2,
        own_iv: true,
        key: "b96e4ca2cf96b62504ed45f2fb819d4c40ec2cbc586b3c39bd7a7c2abd7d0e48eeae4cf1",
        inner: "4500001800014000401126360a2a00050a2a0046030a1118",
        packet: "deadbeef00000002000000000000000291ab28d63beac08d4ea3c20873eb5c685a23d3461033f9f408e46832ffb0331d6bcd8d61fe25f29de242106e",
    },
    Case {
        name: "three bytes of padding, last short number",
        suite: Suite::Aes128Gcm16,
        sequence: Sequence::Short,
        number: 0xffff_ffff,
        own_iv: true,
        key: "59d438db3e9232d88a250124463fd3dd0d3be573",
        inner: "4500001f000140004011262f0a2a00050a2a0046030a11181f262d343b4249",
        packet: "ffffffffffffffff00000000ffffffff7c979958a3fe0bd6e7b75b524a2d6165c67f328d655a8743842aea4c4159afa8e0744dad658e09f81e41ddbd5a45d16296a04271",
    },
    Case {
        name: "extended, high half zero",
        suite: Suite::Aes256Gcm16,
        sequence: Sequence::Extended,
        number: 77,
        own_iv: true,
        key: "05e78574a4fd061fb268fba5ef9dcccf85cbbe7455327796ff1f4e6a714ab0bbc3f6c70d",
        inner: "4500003500014000401126190a2a00050a2a0046030a11181f262d343b424950575e656c737a81888f969da4abb2b9c0c7ced5dce3",
        packet: "123456780000004d000000000000004d558ed9c657f4d70b0d653085d3e9bab929ad922f73ba10651ef04a6b625bd0b2aa73814d6e65cbaaf5805b20bb1339e4cf16287ce26fb774185cf975fcc73e126295acbae2b40302",
    },
    Case {
        name: "extended, high half not zero and not sent",
        suite: Suite::Aes256Gcm16,
        sequence: Sequence::Extended,
        number: 0x3_0000_0007,
        own_iv: true,
        key: "4f434cd39da307a262f74ae1968fa0bf3b74a97cc3fbd7452a27fe4c00fdfaae4d17f256",
        inner: "6000000000111140fd000000000000000000000000000005fd00000000000000000000000000000601060b10151a1f24292e33383d42474c51",
        packet: "12345678000000070000000300000007de8110de5735574db7a72b5be8444eccba5d9d92de39511d9892a84e4f58313ad70d6121697d8688dd224866c40dc0033dc5bb83d8870a5b5a92c83c3428a776b7fb0b52d256701bb2f8a05e",
    },
    Case {
        name: "extended with 128 bits, IPv6",
        suite: Suite::Aes128Gcm16,
        sequence: Sequence::Extended,
        number: 0x1_ffff_ffff,
        own_iv: true,
        key: "1365bc4e76c69374ba0fe0beb5bd40bedce092fa",
        inner: "6000000000001140fd000000000000000000000000000005fd000000000000000000000000000006",
        packet: "00000100ffffffff00000001ffffffff399b1ea863611e8a9bd6f60601a7b8ae98c97bdf7a6a6ff58176ed94257180f2abd09215dcbd2d5bbcae1501bf6ffe3a35d442af20055baaf3d6141d",
    },
    Case {
        name: "an IV that is not the counter",
        suite: Suite::Aes256Gcm16,
        sequence: Sequence::Short,
        number: 9,
        own_iv: false,
        key: "7c69b8f789717c8043f70aab8847bbededf687bd7ead3849c9fa8103d0309a49ad670558",
        inner: "4500002800014000401126260a2a00050a2a0046030a11181f262d343b424950575e656c737a8188",
        packet: "cafe000100000009a1b2c3d4e5f60718c153c24bdbfd66c5cd5069633a65417cd2d41c2a621e4f77f9ce140680c117b445109cf8fbda0b099f99d7243ad2672b77ea2a4a3d33adcbe0836591",
    },
    Case {
        name: "padded for traffic flow confidentiality",
        suite: Suite::Aes256Gcm16,
        sequence: Sequence::Extended,
        number: 10,
        own_iv: false,
        key: "a0ab2e57b217f59d68d3bbbc406fee5ace28802d1bd645eb17b0490951d00e09baf2ebb8",
        inner: "4500002800014000401126260a2a00050a2a0046030a11181f262d343b424950575e656c737a8188",
        packet: "cafe00010000000a000000000000000ac2aea3d25d92ecad13e453524258ad5533ec6299ca3ffbaaec21f0836fedd0808685b0c68b8d053deb8390d7d304af4e8df5e6f7de02e9b68f21cec8027bbc2830523771232ff095fd54c98f939be614c1ae8b870ac436e3d45a484cbda4fcbf9ff83615a95bdf49bce3990e",
    },
];

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

impl Case {
    fn material(&self) -> KeyMaterial {
        KeyMaterial::new(self.suite, &unhex(self.key)).unwrap()
    }

    fn spi(&self) -> Spi {
        Spi::new(u32::from_str_radix(&self.packet[..8], 16).unwrap()).unwrap()
    }

    fn inbound(&self) -> Inbound {
        let sa = Inbound::new(self.spi(), &self.material(), self.sequence).unwrap();
        // Where the number cannot be inferred from nothing, the window is near it.
        if self.number > u64::from(u32::MAX) {
            sa.set_window(Window::at(self.number - 100));
        }
        sa
    }
}

#[test]
fn packets_of_another_implementation_open_to_the_packet_that_was_put_in() {
    for case in CASES {
        let sa = case.inbound();
        let mut packet = unhex(case.packet);
        let Ok(Opened::Packet(range)) = open_one(&sa, &mut packet, &policy()) else {
            panic!("{}: {:?}", case.name, sa.counters());
        };
        assert_eq!(packet[range], unhex(case.inner), "{}", case.name);
    }
}

#[test]
fn our_packets_are_those_of_another_implementation_bit_by_bit() {
    for case in CASES.into_iter().filter(|case| case.own_iv) {
        let limits = Limits::of(case.sequence);
        let sa =
            Outbound::starting_at(case.number, case.spi(), &case.material(), case.sequence, limits).unwrap();
        let inner = unhex(case.inner);
        let mut buffer = vec![0xee; esp::sealed_len(inner.len())];
        buffer[esp::HEAD_ROOM..][..inner.len()].copy_from_slice(&inner);
        let length = sa.begin(1).unwrap().seal(&mut buffer, inner.len()).unwrap();
        assert_eq!(buffer[..length], unhex(case.packet), "{}", case.name);
    }
}

#[test]
fn a_single_changed_bit_anywhere_is_refused() {
    for case in CASES {
        let good = unhex(case.packet);
        for bit in 0..good.len() * 8 {
            let mut packet = good.clone();
            packet[bit / 8] ^= 1 << (bit % 8);
            let reason = open_one(&case.inbound(), &mut packet, &policy()).unwrap_err();
            let expected: &[Reason] = match bit / 8 {
                0..4 => &[Reason::UnknownSpi],
                // Another sequence number may be outside the window before it is found to be false.
                4..8 => &[Reason::Authentication, Reason::TooOld],
                _ => &[Reason::Authentication],
            };
            assert!(expected.contains(&reason), "{} bit {bit}: {reason}", case.name);
        }
    }
}

#[test]
fn the_high_half_of_an_extended_number_is_authenticated_though_not_sent() {
    let case = CASES.iter().find(|case| case.number == 0x3_0000_0007).unwrap();
    let sa = case.inbound();
    sa.set_window(Window::at(0x4_0000_0000));
    assert_eq!(open_one(&sa, &mut unhex(case.packet), &policy()), Err(Reason::Authentication));
}
