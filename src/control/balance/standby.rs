//! When the next standby of an image is brought in, and when the last one is stood down: the manager of Jump-Start Cloud
//! (Wu, Shen, Wu, Lin), whose *background deployment* adds images one by one until the access time is as it should be.
//!
//! Pure. Owns: how many standbys take part. Does not own: which clients go to them (`steady`), and what they hold.
//!
//! | | when | dwell |
//! | --- | --- | --- |
//! | in | the 99th percentile is above the target in [`Settings::samples`] looks in a row | [`Settings::dwell`] since the last change |
//! | out | it is below *half* the target, and the image's load is below 70 % of what it was when the last one was brought in, in [`Settings::idle_samples`] looks in a row | the same, twice as long each time that one was brought in again within four dwells after it was stood down |
//!
//! The second condition is what keeps it still: that an image answers quickly *with* a standby does not say that it would
//! without. The load at which it did not is known. A load that can be carried by fewer servers than there were is one that
//! has fallen.

use std::time::{Duration, Instant};

/// Below this part of the target a standby may go.
const QUIET: f64 = 0.5;
/// Below this part of the load that called for it, a standby may go.
const FALLEN: f64 = 0.7;
/// The longest dwell, in first ones.
const LONGEST: u32 = 8;

/// How standbys are managed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Settings {
    /// The 99th percentile that is wanted, in milliseconds.
    pub target_ms: f64,
    /// Looks in a row above it before one is brought in; 1 at least.
    pub samples: u32,
    /// Looks in a row without need before one is stood down; 1 at least.
    pub idle_samples: u32,
    /// Between two changes.
    pub dwell: Duration,
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// Nothing.
    Stay,
    /// The next one takes part from now on.
    BringIn,
    /// The last one takes part no more.
    StandDown,
    /// The target is missed, and there is no other standby.
    Exhausted,
}

/// Remembers why each standby was brought in.
#[derive(Debug)]
pub struct Manager {
    settings: Settings,
    /// The load of the image when each of those was brought in that take part.
    needed: Vec<f64>,
    above: u32,
    below: u32,
    changed: Option<Instant>,
    stood_down: Option<Instant>,
    /// Dwells before one is stood down.
    reluctance: u32,
}

impl Manager {
    /// None takes part.
    pub const fn new(settings: Settings) -> Self {
        Self { settings, needed: Vec::new(), above: 0, below: 0, changed: None, stood_down: None, reluctance: 1 }
    }

    /// How many take part: the first ones, in the order in which they were named.
    pub fn active(&self) -> usize {
        self.needed.len()
    }

    /// Looks at an image, of which `standbys` can be had in all: its 99th percentile in milliseconds where that is
    /// longest (`None`: nobody asks for anything), and the load of all its clients, in any unit.
    pub fn look(&mut self, now: Instant, p99_ms: Option<f64>, load: f64, standbys: usize) -> Call {
        let p99_ms = p99_ms.unwrap_or(0.0);
        let has_fallen = self.needed.last().is_some_and(|needed| load < needed * FALLEN);
        self.above = if p99_ms > self.settings.target_ms { self.above.saturating_add(1) } else { 0 };
        let is_quiet = has_fallen && p99_ms < self.settings.target_ms * QUIET;
        self.below = if is_quiet { self.below.saturating_add(1) } else { 0 };
        let since = self.changed.map_or(Duration::MAX, |changed| now.saturating_duration_since(changed));
        if self.above >= self.settings.samples && since >= self.settings.dwell {
            return self.bring_in(now, load, standbys);
        }
        if self.below >= self.settings.idle_samples && since >= self.settings.dwell * self.reluctance {
            self.needed.pop();
            self.stood_down = Some(now);
            return self.change(now, Call::StandDown);
        }
        Call::Stay
    }

    fn bring_in(&mut self, now: Instant, load: f64, standbys: usize) -> Call {
        if self.active() >= standbys {
            return Call::Exhausted;
        }
        let soon = self.settings.dwell * self.reluctance * 4;
        let is_again = self.stood_down.is_some_and(|then| now.saturating_duration_since(then) < soon);
        self.reluctance = if is_again { (self.reluctance * 2).min(LONGEST) } else { 1 };
        self.needed.push(load);
        self.change(now, Call::BringIn)
    }

    fn change(&mut self, now: Instant, call: Call) -> Call {
        (self.above, self.below, self.changed) = (0, 0, Some(now));
        call
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;
    use proptest::prelude::*;

    const SETTINGS: Settings =
        Settings { target_ms: 20.0, samples: 3, idle_samples: 6, dwell: Duration::from_secs(30) };
    const LOOK: Duration = Duration::from_secs(5);

    /// How long requests take when `load` is spread over so many images, each of which carries `capacity`: an M/M/1 queue
    /// with a service of 1 ms, and 200 ms where that has no end.
    fn p99(load: f64, images: usize, capacity: f64) -> f64 {
        let used = load / f64::from(u32::try_from(images).unwrap()) / capacity;
        if used < 0.99 { (4.6 / (1.0 - used)).min(200.0) } else { 200.0 }
    }

    /// Looks for so long at a load, and tells the calls that changed something.
    fn run(manager: &mut Manager, now: &mut Instant, looks: u32, p99: impl Fn(usize) -> (f64, f64)) -> Vec<Call> {
        let mut calls = Vec::new();
        for _ in 0..looks {
            *now += LOOK;
            let (p99, load) = p99(manager.active());
            let call = manager.look(*now, Some(p99), load, 3);
            calls.extend(matches!(call, Call::BringIn | Call::StandDown).then_some(call));
        }
        calls
    }

    #[test]
    fn standbys_come_while_it_is_slow_and_go_when_it_is_idle() {
        let (mut manager, mut now) = (Manager::new(SETTINGS), clock::now());
        let busy = |active| (p99(210.0, active + 1, 100.0), 210.0);
        assert_eq!(run(&mut manager, &mut now, 100, busy), [Call::BringIn, Call::BringIn]);
        let idle = |active| (p99(20.0, active + 1, 100.0), 20.0);
        assert_eq!(run(&mut manager, &mut now, 100, idle), [Call::StandDown, Call::StandDown]);
        assert_eq!(manager.active(), 0);
    }

    #[test]
    fn a_burst_and_an_idle_moment_change_nothing() {
        let (mut manager, mut now) = (Manager::new(SETTINGS), clock::now());
        for _ in 0..10 {
            assert!(run(&mut manager, &mut now, 2, |_| (500.0, 100.0)).is_empty());
            assert!(run(&mut manager, &mut now, 1, |_| (1.0, 100.0)).is_empty());
        }
        assert_eq!(run(&mut manager, &mut now, 3, |_| (500.0, 100.0)), [Call::BringIn]);
        for _ in 0..10 {
            assert!(run(&mut manager, &mut now, 5, |_| (1.0, 1.0)).is_empty());
            assert!(run(&mut manager, &mut now, 1, |_| (15.0, 100.0)).is_empty());
        }
    }

    #[test]
    fn when_all_are_in_that_is_said() {
        let (mut manager, mut now) = (Manager::new(SETTINGS), clock::now());
        assert_eq!(run(&mut manager, &mut now, 100, |_| (500.0, 100.0)).len(), 3);
        assert_eq!(manager.look(now + LOOK, Some(500.0), 100.0, 3), Call::Exhausted);
    }

    proptest! {
        /// Whatever the load did before: once it stands still, no standby comes and goes.
        #[test]
        fn with_a_load_that_stands_still_it_comes_to_rest(
            history in prop::collection::vec((0.0f64..400.0, 1u32..30), 0..12),
            load in 0.0f64..400.0,
            noise in prop::collection::vec(0.85f64..1.15, 600),
        ) {
            let (mut manager, mut now) = (Manager::new(SETTINGS), clock::now());
            for (load, looks) in history {
                run(&mut manager, &mut now, looks, |active| (p99(load, active + 1, 100.0), load));
            }
            let mut calls = Vec::new();
            for factor in noise {
                now += LOOK;
                let p99 = p99(load, manager.active() + 1, 100.0) * factor;
                calls.push(manager.look(now, Some(p99), load * factor, 3));
            }
            let changes: Vec<_> = calls.iter().filter(|call| matches!(call, Call::BringIn | Call::StandDown)).collect();
            prop_assert!(changes.len() <= 6, "{changes:?}");
            // The way down to one too few, and up again. Whoever was brought in at this load is needed at it, whatever the
            // noise: the lowest load that is measured is 0.85 / 1.15 of the highest, and that is more than `FALLEN`.
            let first_in = changes.iter().position(|call| **call == Call::BringIn).unwrap_or(changes.len());
            prop_assert!(changes[first_in..].iter().all(|call| **call == Call::BringIn), "{changes:?}");
            let p99 = p99(load, manager.active() + 1, 100.0);
            prop_assert!(manager.active() == 3 || p99 <= SETTINGS.target_ms / 0.85, "{p99} ms with {}", manager.active());
        }
    }
}
