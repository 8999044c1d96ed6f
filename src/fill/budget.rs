//! A byte rate that holds on average: a token bucket that may be overdrawn.
//!
//! What is to be sent is not cut to what is left: it leaves as long as there is no debt, and the debt is waited off. So
//! requests of any size pass, and the rate holds to within one of them.

use std::time::{Duration, Instant};

/// What may be saved up: this long at the full rate.
const BURST: Duration = Duration::from_millis(50);
/// Nothing waits longer than this.
const LONGEST: Duration = Duration::from_secs(3600);

/// One limit.
#[derive(Debug, Clone)]
pub(super) struct Budget {
    /// Bytes per second; `None`: no limit.
    rate: Option<u64>,
    /// When there is no debt; more than [`BURST`] ago counts as that.
    due: Option<Instant>,
}

impl Budget {
    /// At most `rate` bytes per second.
    pub(super) const fn new(rate: Option<u64>) -> Self {
        Self { rate, due: None }
    }

    /// Bytes per second; `None`: no limit.
    pub(super) const fn rate(&self) -> Option<u64> {
        self.rate
    }

    /// From now on at most `rate` bytes per second. What has left is still owed, and is waited off at the new rate.
    pub(super) fn set_rate(&mut self, now: Instant, rate: Option<u64>) {
        let debt = self.wait(now).map_or(Duration::ZERO, |due| due - now);
        let owed = self.rate.map_or(0, |rate| bytes_in(debt, rate));
        self.rate = rate;
        self.due = rate.map(|rate| now + time_for(owed, rate).min(LONGEST));
    }

    /// When something may leave, if not now.
    pub(super) fn wait(&self, now: Instant) -> Option<Instant> {
        self.due.filter(|due| *due > now)
    }

    /// So many bytes leave.
    pub(super) fn spend(&mut self, now: Instant, bytes: u64) {
        let Some(rate) = self.rate else { return };
        let earliest = now.checked_sub(BURST).unwrap_or(now);
        let from = self.due.map_or(now, |due| due.max(earliest));
        self.due = Some(from + time_for(bytes, rate).min(LONGEST));
    }

    /// So many bytes have not left after all.
    pub(super) fn refund(&mut self, bytes: u64) {
        if let Some((rate, due)) = self.rate.zip(self.due) {
            self.due = due.checked_sub(time_for(bytes, rate).min(LONGEST));
        }
    }
}

/// How long `bytes` take at `rate` bytes per second.
pub(super) fn time_for(bytes: u64, rate: u64) -> Duration {
    let nanoseconds = u128::from(bytes) * 1_000_000_000 / u128::from(rate.max(1));
    u64::try_from(nanoseconds).map_or(Duration::MAX, Duration::from_nanos)
}

/// How many bytes `time` is for at `rate` bytes per second.
fn bytes_in(time: Duration, rate: u64) -> u64 {
    u64::try_from(time.as_nanos() * u128::from(rate) / 1_000_000_000).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn the_rate_holds_over_any_time(
            rate in 1_000u64..1_000_000_000,
            steps in prop::collection::vec((0u64..200, 1u64..1_000_000), 1..100),
        ) {
            let start = clock::now();
            let mut budget = Budget::new(Some(rate));
            let (mut now, mut sent, mut largest) = (start, 0, 0);
            for (pause, bytes) in steps {
                now += Duration::from_millis(pause);
                now = budget.wait(now).unwrap_or(now);
                // All that has left by now, without this one.
                let took = time_for(sent, rate);
                let allowed = now - start + BURST + time_for(largest, rate);
                prop_assert!(took <= allowed, "{sent} sent, which takes {took:?}; allowed {allowed:?}");
                budget.spend(now, bytes);
                sent += bytes;
                largest = largest.max(bytes);
            }
        }
    }

    #[test]
    fn without_a_limit_nothing_waits() {
        let now = clock::now();
        let mut budget = Budget::new(None);
        budget.spend(now, u64::MAX);
        assert_eq!(budget.wait(now), None);
    }

    #[test]
    fn what_has_not_left_is_given_back() {
        let now = clock::now();
        let mut budget = Budget::new(Some(1_000_000));
        budget.spend(now, 3_000_000);
        budget.refund(2_000_000);
        assert_eq!(budget.wait(now), Some(now + Duration::from_secs(1)));
        budget.refund(1_000_000);
        assert_eq!(budget.wait(now), None);
    }

    #[test]
    fn a_new_rate_holds_at_once_and_forgets_no_debt() {
        let now = clock::now();
        let mut budget = Budget::new(Some(1_000_000));
        budget.spend(now, 10_000_000);
        budget.set_rate(now, Some(5_000_000));
        assert_eq!(budget.wait(now), Some(now + Duration::from_secs(2)));
        budget.set_rate(now, Some(2_000_000));
        assert_eq!(budget.wait(now), Some(now + Duration::from_secs(5)));
        budget.set_rate(now, None);
        assert_eq!(budget.wait(now), None);
        budget.spend(now, u64::MAX);
        budget.set_rate(now, Some(1_000_000));
        assert_eq!(budget.wait(now), None, "nothing is owed for what left without a limit");
        budget.spend(now, 1_000_000);
        assert_eq!(budget.wait(now), Some(now + Duration::from_secs(1)));
    }

    #[test]
    fn who_pauses_does_not_save_up_much() {
        let now = clock::now();
        let mut budget = Budget::new(Some(1_000_000));
        budget.spend(now, 1000);
        let later = now + Duration::from_secs(100);
        budget.spend(later, 100_000);
        assert_eq!(budget.wait(later), Some(later + Duration::from_millis(50)));
    }
}
