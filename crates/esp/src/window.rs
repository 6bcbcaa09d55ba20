//! The replay window (RFC 4303 §3.4.3), as a ring of bitmap blocks that is never shifted (RFC 6479), and the
//! inference of the sequence bits that are not sent (RFC 4303 appendix A2).

use crate::{Reason, Sequence};

/// How far behind the highest number a packet may come, in packets.
pub const WINDOW: u64 = 8192;

const BLOCK_BITS: u64 = u64::BITS as u64;
/// One more than the window has, because it seldom begins on a block's border.
const BLOCKS: u64 = WINDOW / BLOCK_BITS + 1;

/// Which sequence numbers have been received.
#[derive(Clone, Debug)]
pub struct Window {
    /// The highest; 0 before the first packet, since a sender begins with 1.
    top: u64,
    blocks: [u64; BLOCKS as usize],
}

impl Window {
    pub const fn new() -> Self {
        Self { top: 0, blocks: [0; BLOCKS as usize] }
    }

    /// As if this number, and none before it, had been received.
    #[cfg(test)]
    pub fn at(top: u64) -> Self {
        let mut window = Self::new();
        window.mark(top);
        window
    }

    /// The highest number received.
    pub fn top(&self) -> u64 {
        self.top
    }

    /// The whole of a sequence number whose low half was received (RFC 4303 A2.1).
    ///
    /// Numbers before the first of all are [`Reason::TooOld`].
    #[inline]
    pub fn infer(&self, low: u32, sequence: Sequence) -> Result<u64, Reason> {
        const SPAN: u32 = WINDOW as u32 - 1;
        if sequence == Sequence::Short {
            return Ok(low.into());
        }
        let (top_high, top_low) = ((self.top >> 32) as u32, self.top as u32);
        let bottom = top_low.wrapping_sub(SPAN);
        let high = if top_low >= SPAN {
            // Case A: the window lies within one subspace.
            if low >= bottom { Some(top_high) } else { top_high.checked_add(1) }
        } else {
            // Case B: it reaches back into the one before.
            if low >= bottom { top_high.checked_sub(1) } else { Some(top_high) }
        };
        high.map(|high| u64::from(high) << 32 | u64::from(low)).ok_or(Reason::TooOld)
    }

    /// Whether a number may be accepted. Changes nothing, so it can be asked before authentication.
    #[inline]
    pub fn check(&self, sequence: u64) -> Result<(), Reason> {
        if sequence > self.top {
            return Ok(());
        }
        // 0 is never sent (RFC 4303 §2.2).
        if sequence == 0 || self.top - sequence >= WINDOW {
            return Err(Reason::TooOld);
        }
        let (block, bit) = place(sequence);
        if self.blocks[block] & bit != 0 { Err(Reason::Replayed) } else { Ok(()) }
    }

    /// Marks a number that was checked and whose packet was authentic.
    #[inline]
    pub fn mark(&mut self, sequence: u64) {
        if sequence > self.top {
            let (old, new) = (self.top / BLOCK_BITS, sequence / BLOCK_BITS);
            // Blocks that come into the window hold numbers of a round before.
            for block in (old + 1..=new).rev().take(BLOCKS as usize) {
                self.blocks[(block % BLOCKS) as usize] = 0;
            }
            self.top = sequence;
        }
        let (block, bit) = place(sequence);
        self.blocks[block] |= bit;
    }
}

#[inline]
fn place(sequence: u64) -> (usize, u64) {
    (((sequence / BLOCK_BITS) % BLOCKS) as usize, 1 << (sequence % BLOCK_BITS))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    /// What the window should be: all numbers received.
    #[derive(Default)]
    struct Model(BTreeSet<u64>);

    impl Model {
        fn check(&self, sequence: u64) -> Result<(), Reason> {
            let top = self.0.last().copied().unwrap_or(0);
            if sequence == 0 || sequence + WINDOW <= top {
                Err(Reason::TooOld)
            } else if self.0.contains(&sequence) {
                Err(Reason::Replayed)
            } else {
                Ok(())
            }
        }

        /// The number nearest to the window with these low bits: the definition behind A2.1.
        fn infer(&self, low: u32) -> Result<u64, Reason> {
            let top = self.0.last().copied().unwrap_or(0);
            let bottom = i128::from(top) - i128::from(WINDOW) + 1;
            let least = bottom.rem_euclid(1 << 32);
            let ahead = (i128::from(low) - least).rem_euclid(1 << 32);
            u64::try_from(bottom + ahead).map_err(|_| Reason::TooOld)
        }
    }

    fn received(numbers: impl IntoIterator<Item = u64>) -> Window {
        let mut window = Window::new();
        numbers.into_iter().for_each(|sequence| window.mark(sequence));
        window
    }

    #[test]
    fn the_window_is_exactly_as_wide_as_it_says() {
        for top in WINDOW + 1..WINDOW + 200 {
            let window = received([top]);
            assert_eq!(window.check(top - WINDOW + 1), Ok(()));
            assert_eq!(window.check(top - WINDOW), Err(Reason::TooOld));
            assert_eq!(window.check(top), Err(Reason::Replayed));
        }
        assert_eq!(Window::new().check(0), Err(Reason::TooOld));
        assert_eq!(Window::new().check(1), Ok(()));
    }

    #[test]
    fn high_bits_are_inferred_as_in_the_cases_of_appendix_a() {
        let infer = |top: u64, low: u32| received([top]).infer(low, Sequence::Extended);
        let two = |low: u64| (2 << 32) + low;
        // Case A: ahead, inside, and left of the window, which means the next subspace.
        assert_eq!(infer(two(100_000), 200_000), Ok(two(200_000)));
        assert_eq!(infer(two(100_000), 100_000 - 8191), Ok(two(100_000 - 8191)));
        assert_eq!(infer(two(100_000), 100_000 - 8192), Ok((3 << 32) + 100_000 - 8192));
        // Case B: the window reaches back into the subspace before.
        assert_eq!(infer(two(10), 11), Ok(two(11)));
        assert_eq!(infer(two(10), 0xffff_ffff), Ok(two(0) - 1));
        assert_eq!(infer(10, 0xffff_ffff), Err(Reason::TooOld));
        assert_eq!(received([10]).infer(0xffff_ffff, Sequence::Short), Ok(0xffff_ffff));
        assert_eq!(infer(u64::MAX, 5), Err(Reason::TooOld), "beyond the last of all");
    }

    /// Numbers around a place that moves forward, so that all cases are met often.
    fn numbers(start: u64) -> impl Strategy<Value = Vec<u64>> {
        let step = prop_oneof![
            6 => 0u64..4,
            2 => 0u64..200,
            1 => 0u64..3 * WINDOW,
        ];
        let back = prop_oneof![4 => 0u64..8, 2 => 0u64..300, 1 => 0u64..WINDOW + 50];
        proptest::collection::vec((step, back), 1..400).prop_map(move |steps| {
            let mut at = start;
            steps
                .into_iter()
                .map(|(step, back)| {
                    at += step;
                    at.saturating_sub(back)
                })
                .collect()
        })
    }

    fn compare(sequences: Vec<u64>) {
        let (mut window, mut model) = (Window::new(), Model::default());
        for sequence in sequences {
            let inferred = window.infer(sequence as u32, Sequence::Extended);
            assert_eq!(inferred, model.infer(sequence as u32));
            assert_eq!(window.check(sequence), model.check(sequence), "{sequence}");
            // What the packet would be taken for: itself, unless it is beyond what 32 bits can tell.
            let Ok(sequence) = inferred else { continue };
            if window.check(sequence).is_ok() {
                window.mark(sequence);
                model.0.insert(sequence);
            }
            assert_eq!(window.top(), model.0.last().copied().unwrap_or(0));
        }
    }

    proptest! {
        #[test]
        fn the_window_agrees_with_a_set_of_numbers(sequences in numbers(0)) {
            compare(sequences);
        }

        #[test]
        fn the_window_agrees_with_a_set_of_numbers_across_the_low_half_s_end(
            sequences in numbers((1 << 32) - 2000),
        ) {
            // A window learns where it is by steps of less than half the space.
            let way = (1..4).map(|quarter| quarter << 30);
            compare(way.chain(sequences).collect());
        }

        #[test]
        fn numbers_within_half_the_space_ahead_are_inferred_whole(top in 1u64..1 << 40, ahead in 0u64..1 << 31) {
            prop_assert_eq!(received([top]).infer((top + ahead) as u32, Sequence::Extended), Ok(top + ahead));
        }
    }
}
