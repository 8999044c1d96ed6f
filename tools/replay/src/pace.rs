//! When a read is due.
//!
//! Three ways to repeat a recording that has starts and no ends:
//!
//! - **As fast as possible**: asks what a disk can do. No machine boots like that: it leaves no time to be ahead.
//! - **By the clock**: each read is due when the recorded one began, whatever came before. It is the same load for each
//!   server, and the hardest for one that fills ahead: the machine does not slow down while it waits. But a slow server is
//!   asked as no machine would ask it: reads pile up that a real one would not have begun yet.
//! - **By thinking**: a machine that waits for a page does not compute, so what it would have done next comes later. Each
//!   read is due as long after the previous one as in the recording, but that time begins only when fewer than `depth`
//!   reads are waited for. With a depth of one: after the previous one was *answered*. That errs by what the recorded disk
//!   took, which was a local file.
//!
//! Thinking is the honest one for a boot. A difference between two servers should show in both.

use std::time::{Duration, Instant};

/// How a recording is repeated.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Pace {
    /// As soon as there is room.
    Fast,
    /// When the machine did, so many times as fast.
    Clock(f64),
    /// As long after the read before, so many times as fast.
    Thinking(f64),
}

/// The state of a replay: what is due when.
#[derive(Debug)]
pub struct Schedule {
    pace: Pace,
    start: Instant,
    /// When the read before began in the recording.
    before: Option<Duration>,
}

impl Schedule {
    /// For a replay that begins at `start`.
    pub const fn new(pace: Pace, start: Instant) -> Self {
        Self { pace, start, before: None }
    }

    /// When a read that was recorded at `at` is due.
    ///
    /// `room`: since when there is room for it, which is when the read before was begun if there was room at once.
    pub fn due(&mut self, at: Duration, room: Instant) -> Instant {
        let gap = at.saturating_sub(self.before.unwrap_or_default());
        self.before = Some(at);
        match self.pace {
            Pace::Fast => room,
            Pace::Clock(factor) => self.start + at.div_f64(factor),
            Pace::Thinking(factor) => room + gap.div_f64(factor),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_slow_answer_delays_what_follows_only_if_the_machine_thinks() {
        let start = headwater::clock::now();
        // Recorded at 10 and at 14 ms; the first one is answered after 100 ms only.
        for (pace, first, second) in [
            (Pace::Fast, 0, 100),
            (Pace::Clock(1.0), 10, 14),
            (Pace::Clock(2.0), 5, 7),
            (Pace::Thinking(1.0), 10, 104),
            (Pace::Thinking(2.0), 5, 102),
        ] {
            let mut schedule = Schedule::new(pace, start);
            assert_eq!(schedule.due(ms(10), start), start + ms(first), "{pace:?}");
            assert_eq!(schedule.due(ms(14), start + ms(100)), start + ms(second), "{pace:?}");
        }
    }

    #[test]
    fn a_recording_whose_clock_went_back_does_not_wait() {
        let start = headwater::clock::now();
        let mut schedule = Schedule::new(Pace::Thinking(1.0), start);
        schedule.due(ms(10), start);
        assert_eq!(schedule.due(ms(9), start + ms(20)), start + ms(20));
    }
}
