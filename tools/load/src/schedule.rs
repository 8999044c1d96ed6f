//! When a request is due, and when it is over.

use std::time::{Duration, Instant};

use crate::order::Member;

/// When the requests of one connection are due.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Schedule {
    /// As soon as there is room.
    Closed,
    /// At their time, whether there is room or not.
    Open {
        /// When the first request of all connections is due.
        start: Instant,
        /// Requests per second of all connections.
        rate: f64,
        /// The connections take turns.
        member: Member,
    },
}

impl Schedule {
    /// When the `nth` request of this connection is due, counted from zero; `None`: when there is room.
    pub(crate) fn due(&self, nth: u64) -> Option<Instant> {
        match *self {
            Self::Closed => None,
            Self::Open { start, rate, member } => Some(start + offset(nth * member.of + member.index, rate)),
        }
    }

    /// How many requests of this connection were due before `end`.
    pub(crate) fn due_before(&self, end: Instant) -> u64 {
        let due_by_then = |nth: u64| self.due(nth).is_some_and(|due| due < end);
        // The answer lies below the first power of two that is not due any more.
        let Some(mut high) = (0..u64::BITS - 12).map(|bit| 1 << bit).find(|nth| !due_by_then(*nth)) else { return 0 };
        let mut low = 0;
        while low < high {
            let middle = low + (high - low) / 2;
            if due_by_then(middle) { low = middle + 1 } else { high = middle }
        }
        low
    }
}

#[expect(clippy::cast_precision_loss, reason = "2^53 requests take years")]
fn offset(nth: u64, rate: f64) -> Duration {
    Duration::try_from_secs_f64(nth as f64 / rate).unwrap_or(Duration::MAX / 4)
}

/// What ends a run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// What is finished earlier does not count.
    pub(crate) measure_from: Instant,
    /// No request is started after this, and what is finished later does not count.
    pub(crate) until: Option<Instant>,
    /// Requests of this connection.
    pub(crate) requests: Option<u64>,
}

impl Limits {
    /// Whether something that is finished `now` counts.
    pub(crate) fn counts(&self, now: Instant) -> bool {
        now >= self.measure_from && self.until.is_none_or(|until| now < until)
    }

    /// Whether the time is up.
    pub(crate) fn is_over(&self, now: Instant) -> bool {
        self.until.is_some_and(|until| now >= until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use headwater::clock;

    fn open(rate: f64, index: u64, of: u64) -> (Instant, Schedule) {
        let start = clock::now();
        (start, Schedule::Open { start, rate, member: Member { index, of } })
    }

    #[test]
    fn requests_are_due_in_turns_at_the_rate_of_all() {
        let (start, first) = open(1000.0, 0, 2);
        let (other_start, second) = open(1000.0, 1, 2);
        assert_eq!(first.due(0), Some(start));
        assert_eq!(second.due(0), Some(other_start + Duration::from_millis(1)));
        assert_eq!(first.due(5), Some(start + Duration::from_millis(10)));
        assert_eq!(Schedule::Closed.due(5), None);
    }

    #[test]
    fn a_schedule_does_not_drift() {
        let (start, schedule) = open(3.0, 0, 1);
        let error = schedule.due(3_000_000).unwrap().duration_since(start).as_secs_f64() - 1_000_000.0;
        assert!(error.abs() < 1e-6, "{error}");
    }

    #[test]
    fn what_was_due_can_be_counted() {
        let (start, schedule) = open(1000.0, 0, 1);
        for milliseconds in [0, 1, 2, 10, 1000, 3_600_000] {
            assert_eq!(schedule.due_before(start + Duration::from_millis(milliseconds)), milliseconds);
        }
        assert_eq!(Schedule::Closed.due_before(start), 0);
    }

    #[test]
    fn the_ramp_and_what_is_late_do_not_count() {
        let start = clock::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let limits = Limits { measure_from: at(1), until: Some(at(3)), requests: None };
        assert_eq!([0, 1, 2, 3].map(|second| limits.counts(at(second))), [false, true, true, false]);
        assert_eq!([2, 3].map(|second| limits.is_over(at(second))), [false, true]);
        assert!(!Limits { until: None, ..limits }.is_over(at(1000)));
    }
}
