//! The Internet checksum (RFC 1071), eight bytes at a time.
//!
//! A [`Sum`] is kept in the machine's byte order, because a ones' complement sum does not mind which (RFC 1071 §2
//! (B)); it turns into a number at [`Sum::fold`].

/// A running ones' complement sum.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sum(u64);

impl Sum {
    /// Adds bytes. A slice of odd length counts as if a zero followed, so only the last one may be odd.
    #[must_use]
    #[inline]
    pub fn bytes(self, data: &[u8]) -> Self {
        let (words, tail) = data.as_chunks::<8>();
        // The halves of each word go to lanes of their own, so that no carry is lost and the compiler can use
        // vectors; a lane overflows after 32 GiB.
        let (mut low, mut high) = (0u64, 0u64);
        for word in words {
            let word = u64::from_ne_bytes(*word);
            low += word & 0xffff_ffff;
            high += word >> 32;
        }
        let mut last = [0; 8];
        last[..tail.len()].copy_from_slice(tail);
        let last = u64::from_ne_bytes(last);
        let sum = low + high + (last & 0xffff_ffff) + (last >> 32);
        Self(self.0 + (sum & 0xffff_ffff) + (sum >> 32))
    }

    /// Adds one 16-bit number.
    #[must_use]
    #[inline]
    pub fn u16(self, value: u16) -> Self {
        Self(self.0 + u64::from(value.to_be()))
    }

    /// Adds one 32-bit number, as two of 16 bits.
    #[must_use]
    #[inline]
    pub fn u32(self, value: u32) -> Self {
        Self(self.0 + u64::from(value.to_be()))
    }

    /// The sum in 16 bits, not complemented: what a device finds in the checksum field when it is to finish it.
    #[inline]
    pub fn fold(self) -> u16 {
        let sum = (self.0 & 0xffff_ffff) + (self.0 >> 32);
        let sum = (sum & 0xffff) + (sum >> 16);
        let sum = (sum & 0xffff) + (sum >> 16);
        let sum = (sum & 0xffff) + (sum >> 16);
        u16::from_be(sum as u16)
    }

    /// The checksum: the complement of the sum.
    #[inline]
    pub fn checksum(self) -> u16 {
        !self.fold()
    }

    /// As [`Sum::checksum`], with 0 written as 0xffff: in UDP a zero says "none" (RFC 768).
    #[inline]
    pub fn checksum_not_zero(self) -> u16 {
        match self.checksum() {
            0 => 0xffff,
            sum => sum,
        }
    }

    /// Whether a sum over data and its checksum says that the data is whole.
    #[inline]
    pub fn is_valid(self) -> bool {
        self.fold() == 0xffff
    }
}

/// The checksum of `data`.
#[inline]
pub fn checksum(data: &[u8]) -> u16 {
    Sum::default().bytes(data).checksum()
}

/// The checksum after a 16-bit field that it covers went from `old` to `new` (RFC 1624 §3, equation 3).
#[inline]
pub fn adjust(checksum: u16, old: u16, new: u16) -> u16 {
    Sum::default().u16(!checksum).u16(!old).u16(new).checksum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// RFC 1071 §4.1, word by word.
    fn plain(data: &[u8]) -> u16 {
        let mut sum = 0u32;
        for pair in data.chunks(2) {
            sum += u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }

    #[test]
    fn the_example_of_rfc_1071_sums_to_ddf2() {
        let data = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(Sum::default().bytes(&data).fold(), 0xddf2);
    }

    #[test]
    fn all_ones_do_not_overflow_a_lane() {
        let data = vec![0xff; 70_000];
        assert_eq!(checksum(&data), plain(&data));
        let sum = (0..1000).fold(Sum::default(), |sum, _| sum.bytes(&data));
        assert_eq!(sum.fold(), 0xffff);
    }

    proptest! {
        #[test]
        fn the_fast_sum_is_the_plain_one(data in proptest::collection::vec(any::<u8>(), 0..3000), skip in 0usize..9) {
            let data = &data[skip.min(data.len())..];
            prop_assert_eq!(checksum(data), plain(data));
        }

        #[test]
        fn numbers_and_bytes_add_up_the_same(a in any::<u16>(), b in any::<u32>(), data in proptest::collection::vec(any::<u8>(), 0..64)) {
            let mut all = a.to_be_bytes().to_vec();
            all.extend(b.to_be_bytes());
            all.extend(&data);
            prop_assert_eq!(Sum::default().u16(a).u32(b).bytes(&data).checksum(), plain(&all));
        }

        #[test]
        fn an_adjusted_checksum_is_that_of_the_changed_data(
            mut data in proptest::collection::vec(any::<u8>(), 20..21), at in 0usize..10, new in any::<u16>(),
        ) {
            data[0] |= 1; // The sum of all zeros has two forms.
            data[19] = 1;
            let before = checksum(&data);
            let at = (at * 2).clamp(2, 16);
            let old = u16::from_be_bytes([data[at], data[at + 1]]);
            data[at..at + 2].copy_from_slice(&new.to_be_bytes());
            prop_assert_eq!(adjust(before, old, new), checksum(&data));
        }
    }
}
