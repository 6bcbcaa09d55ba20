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
pub struct Seeded {
    key: hmac::Key,
    counter: u64,
}

impl Seeded {
    /// A source that is as unpredictable as `seed` is.
    pub fn new(seed: &[u8]) -> Self {
        Seeded { key: hmac::Key::new(hmac::HMAC_SHA256, seed), counter: 0 }
    }
}

impl Random for Seeded {
    fn fill(&mut self, out: &mut [u8]) {
        for chunk in out.chunks_mut(32) {
            let block = hmac::sign(&self.key, &self.counter.to_be_bytes());
            self.counter += 1;
            chunk.copy_from_slice(&block.as_ref()[..chunk.len()]);
        }
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
}
