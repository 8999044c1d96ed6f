//! Random numbers that repeat: the same seed gives the same run, so a failure can be looked at again.

use std::time::Duration;

/// SplitMix64 (Steele, Lea, Flood: *Fast splittable pseudorandom number generators*, OOPSLA 2014).
#[derive(Debug, Clone)]
pub(super) struct Chance(u64);

impl Chance {
    pub(super) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// At least 0, less than 1.
    pub(super) fn unit(&mut self) -> f64 {
        let high = u32::try_from(self.next() >> 32).expect("32 bits");
        f64::from(high) / (f64::from(u32::MAX) + 1.0)
    }

    /// A time up to `most`; all are equally likely.
    pub(super) fn within(&mut self, most: Duration) -> Duration {
        most.mul_f64(self.unit())
    }

    /// A time up to `most`, of one out of `group` that draw one each: few draw an early one, however many they are, and
    /// those can speak for the others (the truncated exponential distribution of Nonnenmacher and Biersack, *Optimal
    /// multicast feedback*, INFOCOM 1998, as in NORM, RFC 5740).
    pub(super) fn late_within(&mut self, most: Duration, group: f64) -> Duration {
        let steep = group.max(1.0).ln() + 1.0;
        most.mul_f64((self.unit() * (steep.exp() - 1.0)).ln_1p() / steep)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn few_of_many_are_early_and_all_are_in_time() {
        let mut chance = Chance::new(7);
        let most = Duration::from_secs(1);
        let drawn: Vec<_> = (0..1000).map(|_| chance.late_within(most, 1000.0)).collect();
        assert!(drawn.iter().all(|time| *time <= most));
        let early = drawn.iter().filter(|time| **time < most / 3).count();
        assert!((1..30).contains(&early), "{early}");
        let alone = (0..1000).filter(|_| chance.late_within(most, 1.0) < most / 2).count();
        assert!((300..500).contains(&alone), "{alone}");
    }

    #[test]
    fn the_same_seed_gives_the_same_numbers() {
        let drawn = |seed| {
            let mut chance = Chance::new(seed);
            [chance.unit(), chance.unit(), chance.unit()]
        };
        assert_eq!(drawn(3).map(f64::to_bits), drawn(3).map(f64::to_bits));
        assert_ne!(drawn(3).map(f64::to_bits), drawn(4).map(f64::to_bits));
    }
}
