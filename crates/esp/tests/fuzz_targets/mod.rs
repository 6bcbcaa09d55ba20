//! Bodies of the fuzz targets of this room. `fuzz/` runs them on what a fuzzer makes up, `replay.rs` on the
//! committed corpus.

#![allow(missing_docs, clippy::missing_panics_doc, clippy::unwrap_used)]

use aws_lc_rs::aead::{AES_128_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use esp::{Inbound, InnerPolicy, KeyMaterial, Opened, Reason, Sequence, Spi, Suite};

const SPI: u32 = 0x1000;
const KEY: [u8; 20] = [0x42; 20];

/// Datagrams to one SA, first as they are and then sealed with its key, so that the fuzzer gets past the ICV.
///
/// The input is one byte of options and then datagrams: two bytes of length (the high bit: sealed by us), eight of
/// sequence number and IV, and the bytes.
pub fn esp_open(data: &[u8]) {
    let Some((options, mut rest)) = data.split_first() else { return };
    let sequence = if options & 1 == 0 { Sequence::Short } else { Sequence::Extended };
    let material = KeyMaterial::new(Suite::Aes128Gcm16, &KEY).unwrap();
    let sa = Inbound::new(Spi::new(SPI).unwrap(), &material, sequence).unwrap();
    let nets = ["0.0.0.0/1".parse().unwrap(), "::/1".parse().unwrap()];
    let policy = InnerPolicy::new(nets, nets);
    let mut accepted = std::collections::BTreeSet::new();
    while let Some((length, more)) = rest.split_first_chunk::<2>() {
        let length = u16::from_be_bytes(*length);
        let (datagram, more) = more.split_at(usize::from(length & 0x7fff).min(more.len()));
        rest = more;
        let mut packet = datagram.to_vec();
        let number = if length & 0x8000 != 0 && datagram.len() >= 8 {
            packet = seal(datagram, sequence);
            let number = u64::from_be_bytes(*datagram.first_chunk().unwrap());
            Some(if sequence == Sequence::Short { number & 0xffff_ffff } else { number })
        } else {
            None
        };
        let length = packet.len();
        let opened = sa.begin().open(&mut packet, &policy);
        match (&opened, number) {
            (Ok(_), None) => panic!("a packet that nobody sealed was opened"),
            (Ok(_) | Err(Reason::BadPadding | Reason::BadInner), Some(number)) => {
                assert!(accepted.insert(number), "{number} twice");
            }
            _ => {}
        }
        if let Ok(Opened::Packet(range)) = opened {
            assert!(range.start == 16 && range.end <= length - 18 && !range.is_empty());
            assert!(matches!(packet[range.start] >> 4, 4 | 6));
        }
    }
    let counters = sa.counters();
    assert!(counters.packets <= accepted.len() as u64);
}

/// Eight bytes of sequence number and IV, then the plaintext with its trailer.
fn seal(datagram: &[u8], sequence: Sequence) -> Vec<u8> {
    let (number, plain) = datagram.split_first_chunk::<8>().unwrap();
    let mut packet = SPI.to_be_bytes().to_vec();
    packet.extend(&number[4..]);
    packet.extend(number);
    let mut aad = SPI.to_be_bytes().to_vec();
    aad.extend(if sequence == Sequence::Short { &number[4..] } else { number });
    let key = LessSafeKey::new(UnboundKey::new(&AES_128_GCM, &KEY[..16]).unwrap());
    let mut nonce = [0x42; 12];
    nonce[4..].copy_from_slice(number);
    let mut sealed = plain.to_vec();
    key.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), Aad::from(aad), &mut sealed).unwrap();
    packet.extend(sealed);
    packet
}
