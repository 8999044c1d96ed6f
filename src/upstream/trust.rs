//! Which servers are set aside because they send wrong bytes.
//!
//! Owns: how often a server may lie, and for how long it is set aside then; time comes in as an argument. Does not
//! own: what a lie is (whoever checks the bytes knows) and which server is used instead (`pool`).
//!
//! A wrong reply now and then is a flipped bit: it is asked again elsewhere and nothing else happens. A few within
//! minutes are a server that is broken. It may be repaired, so it comes back; for longer each time it has to go.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// When a server is set aside.
#[derive(Debug, Clone, Copy)]
pub(super) struct Rules {
    /// So many wrong replies…
    pub(super) lies: usize,
    /// …in this time.
    pub(super) within: Duration,
    /// How long for, the first time; doubled each time after.
    pub(super) first: Duration,
    /// The longest, and how long a server must have been back for all to be forgotten.
    pub(super) longest: Duration,
}

impl Default for Rules {
    /// Three wrong replies in 10 minutes cost 5 minutes at first, and an hour at most.
    fn default() -> Self {
        let minutes = |count: u64| Duration::from_secs(60 * count);
        Self { lies: 3, within: minutes(10), first: minutes(5), longest: minutes(60) }
    }
}

/// What is held against one server.
#[derive(Debug, Default)]
pub(super) struct Record {
    /// When its last wrong replies came: fewer than [`Rules::lies`] of them.
    lies: VecDeque<Instant>,
    /// How often it was set aside of late.
    times: u32,
    until: Option<Instant>,
}

impl Record {
    /// Takes note of a wrong reply. Tells for how long the server is set aside, if it is from now on.
    pub(super) fn lied(&mut self, now: Instant, rules: &Rules) -> Option<Duration> {
        // What was in flight when it was set aside, or came because there was nobody else, is not held against it.
        if self.aside(now).is_some() {
            return None;
        }
        if self.until.is_some_and(|until| now.saturating_duration_since(until) >= rules.longest) {
            self.times = 0;
        }
        self.lies.retain(|time| now.saturating_duration_since(*time) < rules.within);
        self.lies.push_back(now);
        if self.lies.len() < rules.lies {
            return None;
        }
        self.lies.clear();
        let length = rules.first.saturating_mul(1 << self.times.min(30)).min(rules.longest);
        self.times += 1;
        self.until = Some(now + length);
        Some(length)
    }

    /// For how much longer the server is set aside, if it is.
    pub(super) fn aside(&self, now: Instant) -> Option<Duration> {
        self.until.map(|until| until.saturating_duration_since(now)).filter(|left| !left.is_zero())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use proptest::prelude::*;

    fn minutes(count: u64) -> Duration {
        Duration::from_secs(60 * count)
    }

    /// Lies three times at once.
    fn lie(record: &mut Record, now: Instant) -> Option<Duration> {
        (0..3).filter_map(|_| record.lied(now, &Rules::default())).next()
    }

    #[test]
    fn a_lie_now_and_then_is_forgiven() {
        let (start, mut record) = (crate::clock::now(), Record::default());
        for count in 0..100 {
            let now = start + minutes(5 * count);
            assert_eq!(record.lied(now, &Rules::default()), None);
            assert_eq!(record.aside(now), None);
        }
        assert_eq!(record.lied(start + minutes(499), &Rules::default()), Some(minutes(5)), "the third in 10 minutes");
    }

    #[test]
    fn the_time_doubles_up_to_an_hour_and_is_forgotten_after_a_good_one() {
        let (mut now, mut record) = (crate::clock::now(), Record::default());
        for expected in [5, 10, 20, 40, 60, 60] {
            assert_eq!(lie(&mut record, now), Some(minutes(expected)));
            assert_eq!(record.aside(now), Some(minutes(expected)));
            assert_eq!(lie(&mut record, now + minutes(1)), None, "it is set aside already");
            now += minutes(expected);
            assert_eq!(record.aside(now), None);
        }
        now += minutes(60);
        assert_eq!(lie(&mut record, now), Some(minutes(5)));
    }

    proptest! {
        /// Held against a list of all that ever happened.
        #[test]
        fn a_server_is_aside_when_the_history_says_so(steps in prop::collection::vec(0u64..400, 1..80)) {
            let rules = Rules { lies: 3, within: minutes(10), first: minutes(5), longest: minutes(60) };
            let start = crate::clock::now();
            let (mut record, mut second) = (Record::default(), 0);
            // Lies since the end of the last time aside, and the times aside as start and end.
            let (mut lies, mut times) = (Vec::<u64>::new(), Vec::<(u64, u64)>::new());
            for step in steps {
                second += step;
                let now = start + Duration::from_secs(second);
                let is_aside = times.last().is_some_and(|(_, end)| second < *end);
                prop_assert_eq!(record.aside(now).is_some(), is_aside);
                record.lied(now, &rules);
                if is_aside {
                    continue;
                }
                lies.push(second);
                if lies.iter().filter(|time| second - **time < 600).count() >= 3 {
                    let mut in_a_row = 0;
                    let mut before = second;
                    for (begin, end) in times.iter().rev() {
                        if before - end >= 3600 {
                            break;
                        }
                        (in_a_row, before) = (in_a_row + 1, *begin);
                    }
                    times.push((second, second + (300 << in_a_row).min(3600)));
                    lies.clear();
                }
            }
        }
    }
}
