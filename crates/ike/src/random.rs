//! Where randomness comes from: outside, always.

use aws_lc_rs::hmac;

/// A source of unpredictable bytes. The agent passes the system's; tests pass [`Seeded`].
pub trait Random {
    /// Fills `out`.
    fn fill(&mut self, out: &mut [u8]);

    /// `N` bytes.
    fn bytes<const N: usize>(&mut self) -> [u8; N]
    where
        Self: Sized,
    {
        let mut out = [0; N];
        self.fill(&mut out);
        out
    }
}

/// HMAC-SHA-256 in counter mode over a seed: the same seed gives the same bytes.
///
/// After each use the key is replaced by one made of it. Private values of key exchanges come from here, so a key that stayed
/// would give whoever reads this memory later every key that was ever agreed.
pub struct Seeded {
    key: hmac::Key,
}

/// What the next key is made of; blocks that are given out count from 1.
const NEXT_KEY: u64 = 0;

impl Seeded {
    /// A source that is as unpredictable as `seed` is.
    pub fn new(seed: &[u8]) -> Self {
        Seeded { key: hmac::Key::new(hmac::HMAC_SHA256, seed) }
    }

    fn block(&self, number: u64) -> hmac::Tag {
        hmac::sign(&self.key, &number.to_be_bytes())
    }
}

impl Random for Seeded {
    fn fill(&mut self, out: &mut [u8]) {
        for (number, chunk) in (NEXT_KEY + 1..).zip(out.chunks_mut(32)) {
            chunk.copy_from_slice(&self.block(number).as_ref()[..chunk.len()]);
        }
        // The library wipes the old one.
        self.key = hmac::Key::new(hmac::HMAC_SHA256, self.block(NEXT_KEY).as_ref());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_bytes_and_another_seed_others() {
        let (mut a, mut b, mut c) = (Seeded::new(b"one"), Seeded::new(b"one"), Seeded::new(b"two"));
        let first: [u8; 48] = a.bytes();
        assert_eq!(first, b.bytes::<48>());
        assert_ne!(first, c.bytes::<48>());
        assert_ne!(first, a.bytes::<48>(), "the stream moves on");
    }

    #[test]
    fn what_was_given_out_cannot_be_made_again_of_what_is_left() {
        let mut source = Seeded::new(b"seed");
        let given: [u8; 96] = source.bytes();
        for number in 0..10 {
            let block = source.block(number);
            assert!(given.chunks(32).all(|it| it != block.as_ref()), "block {number}");
        }
    }
}
