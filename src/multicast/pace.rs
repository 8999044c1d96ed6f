//! When the next datagrams may leave.
//!
//! A schedule of absolute times: what one wait was too long is made up for by the next being shorter, so the rate holds
//! however coarse the timers are. A sender that was held up for long is not to catch up at once, which would be the burst
//! that pacing is there to avoid: only [`CATCH_UP`] of it is made good.
//!
//! Clients of the same server share its link, and come first: for each byte that they are sent the session waits as long
//! as its own would take. What it leaves them is bounded: it goes on at the lowest rate that was set.
//!
//! Owns: the arithmetic. Does not own: the clock, waiting, how fast.

use std::time::Duration;

use crate::units::to_u64;

/// What a late sender makes good, at most.
const CATCH_UP: Duration = Duration::from_millis(4);
/// Datagrams that leave together may take the line for so long.
const BURST: Duration = Duration::from_millis(2);

/// What clients are still to be given way for is forgotten beyond so many parts of a second.
const REMEMBERED: u64 = 10;
/// The part of a second for which the session may stand still for them.
const STANDSTILL: u64 = 20;

/// The schedule of one sender. Times are since it began.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// When the next datagram may leave.
    due: Duration,
    /// Bytes that clients were sent, and for which it has not waited yet.
    owed: u64,
    /// Bytes for which it may wait.
    may_yield: u64,
}

impl Pace {
    /// How long to wait before the next datagram may leave; nothing: it may.
    pub(super) fn wait(&self, now: Duration) -> Duration {
        self.due.saturating_sub(now)
    }

    /// So many bytes leave, at `rate` bytes per second; `least` is what the session goes on with beside busy clients.
    pub(super) fn leave(&mut self, now: Duration, bytes: usize, rate: u64, least: u64) {
        let begin = self.due.max(now.saturating_sub(CATCH_UP));
        self.due = begin + time_of(to_u64(bytes), rate);
        let least = least.clamp(1, rate.max(1));
        let earned = u128::from(to_u64(bytes)) * u128::from(rate.saturating_sub(least)) / u128::from(least);
        let earned = u64::try_from(earned).unwrap_or(u64::MAX);
        self.may_yield = self.may_yield.saturating_add(earned).min(rate / STANDSTILL);
    }

    /// Clients have been sent so many bytes: they have the line first.
    pub(super) fn give_way(&mut self, now: Duration, bytes: u64, rate: u64) {
        self.owed = self.owed.saturating_add(bytes).min(rate / REMEMBERED);
        let way = self.owed.min(self.may_yield);
        if way > 0 {
            self.owed -= way;
            self.may_yield -= way;
            self.due = self.due.max(now.saturating_sub(CATCH_UP)) + time_of(way, rate);
        }
    }

    /// How many datagrams of `size` bytes may leave together: at least one, at most `most`.
    pub(super) fn burst(size: usize, rate: u64, most: usize) -> usize {
        let each = time_of(to_u64(size), rate).max(Duration::from_nanos(1));
        usize::try_from(BURST.as_nanos() / each.as_nanos()).unwrap_or(most).clamp(1, most.max(1))
    }
}

/// How long so many bytes take.
fn time_of(bytes: u64, rate: u64) -> Duration {
    let nanoseconds = u128::from(bytes) * 1_000_000_000 / u128::from(rate.max(1));
    Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Whatever the timers do, as long as they are no more than a few milliseconds late.
        #[test]
        fn the_rate_holds(
            rate in 100_000u64..500_000_000, late in prop::collection::vec(0u64..3_000, 100..300), size in 500usize..9000,
        ) {
            let mut pace = Pace::default();
            let (mut now, mut sent) = (Duration::ZERO, 0);
            for late in late {
                now += pace.wait(now);
                prop_assert!(pace.wait(now).is_zero());
                now += Duration::from_micros(late);
                let count = Pace::burst(size, rate, 16);
                prop_assert!(count == 1 || time_of(to_u64(size * count), rate) <= BURST);
                pace.leave(now, size * count, rate, rate);
                sent += size * count;
            }
            // What left last may still be on the line.
            let seconds = now.as_secs_f64() + time_of(to_u64(size * 16), rate).as_secs_f64() + 0.000_001;
            prop_assert!(sent as f64 <= rate as f64 * seconds, "{sent} in {now:?}");
        }
    }

    #[test]
    fn a_late_timer_costs_no_rate_and_a_long_pause_brings_no_burst() {
        let mut pace = Pace::default();
        let rate = 1_000_000;
        let mut now = Duration::ZERO;
        // Every wait is one millisecond too long.
        for _ in 0..1000 {
            now += pace.wait(now) + Duration::from_millis(1);
            pace.leave(now, 2000, rate, rate);
        }
        assert!((Duration::from_millis(1999)..Duration::from_millis(2003)).contains(&now), "{now:?}");
        now += Duration::from_secs(10);
        let mut burst = 0;
        while pace.wait(now).is_zero() {
            pace.leave(now, 1000, rate, rate);
            burst += 1;
        }
        assert_eq!(burst, 5, "four milliseconds of it, and one");
    }

    #[test]
    fn slow_lines_get_their_datagrams_one_by_one() {
        assert_eq!([100_000, 5_000_000, 25_000_000, u64::MAX].map(|rate| Pace::burst(1450, rate, 16)), [1, 6, 16, 16]);
    }

    /// Sends for ten seconds beside clients that are sent `beside` bytes per second. Gives bytes per second.
    fn sent_beside(beside: u64, rate: u64, least: u64) -> u64 {
        let mut pace = Pace::default();
        let (mut now, mut sent) = (Duration::ZERO, 0);
        while now < Duration::from_secs(10) {
            now += Duration::from_millis(1);
            pace.give_way(now, beside / 1000, rate);
            while pace.wait(now).is_zero() {
                pace.leave(now, 1000, rate, least);
                sent += 1000;
            }
        }
        sent / 10
    }

    #[test]
    fn clients_come_first_and_leave_something() {
        let (rate, least) = (20_000_000, 5_000_000);
        for (beside, expected) in [(0, rate), (4_000_000, 16_000_000), (15_000_000, least), (50_000_000, least)] {
            let sent = sent_beside(beside, rate, least);
            assert!(sent.abs_diff(expected) < expected / 20, "{sent} beside {beside}");
        }
        assert!(sent_beside(50_000_000, rate, rate).abs_diff(rate) < rate / 20, "nothing may be given away");
    }

    #[test]
    fn what_was_sent_long_ago_costs_nothing_now() {
        let (rate, mut pace) = (1_000_000, Pace::default());
        pace.give_way(Duration::from_secs(1), u64::MAX, rate);
        assert!(pace.wait(Duration::from_secs(1)).is_zero(), "nothing was earned");
        pace.leave(Duration::from_secs(1), 100_000, rate, 1);
        pace.give_way(Duration::from_secs(1), 0, rate);
        assert!(pace.wait(Duration::from_secs(1)) <= Duration::from_millis(150));
    }
}
