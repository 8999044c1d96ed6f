//! STUB (part M). How long things took: counts by length of time, which any thread may add to without a lock.
//!
//! Owns: recording, and what is computed from it. Does not own: what is measured.

use std::time::Duration;

/// How long things took, so far. Any thread may add; nobody waits.
#[derive(Debug, Default)]
pub struct Latencies {}

impl Latencies {
    /// Notes that `count` things took so long each.
    pub fn record(&self, took: Duration, count: u64) {
        let _ = (took, count);
        unimplemented!()
    }

    /// What was recorded so far.
    pub fn spread(&self) -> Spread {
        unimplemented!()
    }
}

/// How long some things took: a histogram as of a moment. Only what is not empty takes space.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Spread {}

impl Spread {
    /// Things.
    pub fn count(&self) -> u64 {
        unimplemented!()
    }

    /// How long all of them took together.
    pub fn sum(&self) -> Duration {
        unimplemented!()
    }

    /// How long one took in the middle; `None` if there was none.
    pub fn mean(&self) -> Option<Duration> {
        unimplemented!()
    }

    /// As long as this part of them took at most (0.99: the 99th percentile), to within 4 %.
    pub fn quantile(&self, part: f64) -> Option<Duration> {
        let _ = part;
        unimplemented!()
    }

    /// The longest, to within 4 %.
    pub fn longest(&self) -> Option<Duration> {
        unimplemented!()
    }

    /// How many took at most so long, to within 4 %.
    pub fn within(&self, limit: Duration) -> u64 {
        let _ = limit;
        unimplemented!()
    }

    /// What has been recorded since `earlier`, which is an earlier one of the same.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let _ = earlier;
        unimplemented!()
    }

    /// Adds others.
    pub fn add(&mut self, other: &Self) {
        let _ = other;
        unimplemented!()
    }
}
