//! Chance within bounds: jitter for lifetimes and retries.

use std::time::Duration;

use crate::random::Random;

/// A number below `bound`; zero if `bound` is.
pub(crate) fn below(random: &mut dyn Random, bound: u64) -> u64 {
    let mut bytes = [0; 8];
    random.fill(&mut bytes);
    u64::from_be_bytes(bytes).checked_rem(bound).unwrap_or(0)
}

/// A time shorter than `bound`.
pub(crate) fn within(random: &mut dyn Random, bound: Duration) -> Duration {
    Duration::from_nanos(below(random, u64::try_from(bound.as_nanos()).unwrap_or(u64::MAX)))
}

/// `whole`, less by chance up to `tenths` tenths of it.
pub(crate) fn less(random: &mut dyn Random, whole: u64, tenths: u32) -> u64 {
    whole - below(random, (whole / 10).saturating_mul(tenths.min(9).into()))
}

/// As [`less`], of a time.
pub(crate) fn sooner(random: &mut dyn Random, whole: Duration, tenths: u32) -> Duration {
    whole.saturating_sub(within(random, whole / 10 * tenths.min(9)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::Seeded;

    #[test]
    fn jitter_only_shortens_and_by_no_more_than_its_share() {
        let mut random = Seeded::new(b"jitter");
        for _ in 0..1000 {
            assert!((800..=1000).contains(&less(&mut random, 1000, 2)));
            let time = sooner(&mut random, Duration::from_secs(100), 2);
            assert!((Duration::from_secs(80)..=Duration::from_secs(100)).contains(&time));
        }
        assert_eq!(less(&mut random, 0, 2), 0);
        assert_eq!(within(&mut random, Duration::ZERO), Duration::ZERO);
    }
}
