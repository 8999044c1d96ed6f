//! How long a machine waited for its disk.
//!
//! A read's *stall* is its latency, from the moment it was due until it was answered. The *total stall* is the time
//! during which at least one read was waited for: several that wait at the same time count once, as the machine waits
//! once. The plain sum stands beside it; with one read at a time and thinking the two are the same.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// The latency from which a read counts as slow: a resident image answers in a tenth of it, a link never.
pub const SLOW: Duration = Duration::from_millis(1);

/// Reads and when they were waited for.
#[derive(Debug, Default)]
pub struct Waits(Vec<(Instant, Instant)>);

/// What they came to. Times are in seconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Stall {
    /// The time during which at least one read was waited for: the total stall.
    pub seconds: f64,
    /// The sum of all latencies.
    pub sum_seconds: f64,
    /// Reads that took longer than [`SLOW`].
    pub slow_reads: u64,
}

impl Waits {
    /// A read that was due and was answered then.
    pub fn add(&mut self, due: Instant, answered: Instant) {
        self.0.push((due, answered.max(due)));
    }

    /// Adds it all up.
    pub fn total(&self) -> Stall {
        let mut waits = self.0.clone();
        waits.sort_unstable();
        let (mut union, mut sum, mut slow_reads) = (Duration::ZERO, Duration::ZERO, 0);
        let mut covered: Option<Instant> = None;
        for (due, answered) in waits {
            let latency = answered - due;
            sum += latency;
            slow_reads += u64::from(latency > SLOW);
            let from = covered.map_or(due, |covered| covered.max(due));
            union += answered.saturating_duration_since(from);
            covered = Some(from.max(answered));
        }
        Stall { seconds: union.as_secs_f64(), sum_seconds: sum.as_secs_f64(), slow_reads }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn total(waits: &[(u64, u64)]) -> (u64, u64, u64) {
        let start = headwater::clock::now();
        let mut all = Waits::default();
        let at = |us| start + Duration::from_micros(us);
        waits.iter().for_each(|(due, answered)| all.add(at(*due), at(*answered)));
        let Stall { seconds, sum_seconds, slow_reads } = all.total();
        let us = |seconds: f64| format!("{:.0}", seconds * 1e6).parse().unwrap();
        (us(seconds), us(sum_seconds), slow_reads)
    }

    #[test]
    fn what_is_waited_for_at_the_same_time_counts_once() {
        assert_eq!(total(&[]), (0, 0, 0));
        // One after the other: union and sum are the same.
        assert_eq!(total(&[(0, 500), (500, 1000), (3000, 3200)]), (1200, 1200, 0));
        // Overlapping, one within another, in any order.
        assert_eq!(total(&[(1000, 3000), (0, 2000), (2500, 2600)]), (3000, 4100, 2));
        assert_eq!(total(&[(0, 10), (0, 10), (0, 10)]), (10, 30, 0));
    }

    #[test]
    fn the_union_is_what_a_clock_that_looks_each_microsecond_would_count() {
        let mut state = 7_u64;
        for _ in 0..200 {
            let mut waits = Vec::new();
            for _ in 0..20 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let due = (state >> 33) % 300;
                waits.push((due, due + (state >> 50) % 40));
            }
            let seen = (0..400).filter(|at| waits.iter().any(|(due, answered)| due <= at && at < answered)).count();
            assert_eq!(usize::try_from(total(&waits).0).unwrap(), seen, "{waits:?}");
        }
    }

    #[test]
    fn slow_is_more_than_a_millisecond() {
        assert_eq!(total(&[(0, 1000), (2000, 3001)]).2, 1);
    }
}
