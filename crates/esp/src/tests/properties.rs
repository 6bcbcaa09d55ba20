//! Random loss, doubling, reordering and garbage.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::{inner_v4, open_one, pair_at, policy, seal_one, seal_raw};
use crate::{Limits, Reason, Sequence, WINDOW, window::Window};

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn the_receiver_agrees_with_a_set_under_loss_doubling_and_reordering(
        start in prop_oneof![Just(1u64), Just((1 << 32) - 300), 1u64..1 << 40],
        extended in any::<bool>(),
        deliveries in proptest::collection::vec((0usize..600, any::<bool>()), 1..900),
        gap in prop_oneof![Just(0u32), 0u32..20_000],
    ) {
        let sequence = if extended { Sequence::Extended } else { Sequence::Short };
        let start = if extended { start } else { start % (1 << 30) + 1 };
        let (out, inbound) = pair_at(start, sequence, Limits::of(sequence));
        inbound.set_window(Window::at(start - 1));
        let mut numbered = Vec::new();
        for index in 0..600u64 {
            if index == 300 && gap > 0 {
                drop(out.begin(gap).unwrap());
            }
            let number = start + index + if index >= 300 { u64::from(gap) } else { 0 };
            numbered.push((number, seal_one(&out, &inner_v4(30)).unwrap()));
        }
        let mut received = BTreeSet::from([start - 1]);
        let mut sorted = deliveries;
        // Mostly in order, with some far out of it.
        sorted.sort_by_key(|(index, in_order)| if *in_order { *index } else { index / 2 });
        for (index, _) in sorted {
            let (number, packet) = &numbered[index];
            let top = *received.last().unwrap();
            let expected = if number + WINDOW <= top {
                // Beyond the window an extended number is taken for one of the next round, and is no good there.
                Err(if extended { Reason::Authentication } else { Reason::TooOld })
            } else if received.contains(number) {
                Err(Reason::Replayed)
            } else {
                Ok(())
            };
            let got = open_one(&inbound, &mut packet.clone(), &policy()).map(drop);
            prop_assert_eq!(got, expected, "number {} top {}", number, top);
            received.insert(*number);
        }
    }

    #[test]
    fn garbage_is_refused_without_harm(bytes in proptest::collection::vec(any::<u8>(), 0..200), as_ours in any::<bool>()) {
        let (out, inbound) = pair_at(1, Sequence::Extended, Limits::of(Sequence::Extended));
        let mut garbage = bytes;
        if as_ours && garbage.len() > 4 {
            garbage[..4].copy_from_slice(&super::spi().get().to_be_bytes());
        }
        prop_assert!(open_one(&inbound, &mut garbage, &policy()).is_err());
        let mut good = seal_one(&out, &inner_v4(30)).unwrap();
        prop_assert!(open_one(&inbound, &mut good, &policy()).is_ok());
    }

    #[test]
    fn any_authentic_plaintext_yields_a_packet_inside_it_or_a_reason(
        mut plain in proptest::collection::vec(any::<u8>(), 4..200), next in prop_oneof![Just(4u8), Just(41), any::<u8>()],
        honest in any::<bool>(),
    ) {
        let last = plain.len() - 1;
        plain[last] = next;
        if honest {
            plain[last - 1] = 0;
            plain[0] = if next == 41 { 0x60 } else { 0x45 };
        }
        let (_, inbound) = pair_at(1, Sequence::Extended, Limits::of(Sequence::Extended));
        let mut packet = seal_raw(1, &plain);
        if let Ok(crate::Opened::Packet(range)) = open_one(&inbound, &mut packet, &policy()) {
            prop_assert!(range.start == 16 && range.end <= 16 + plain.len() - 2);
        }
    }
}
