//! Which of several orders goes first, and which will be late.
//!
//! | file | holds |
//! | --- | --- |
//! | this one | orders as the schedule sees them, and the choice |
//! | `batches` | what can be met, what is given up, and when each must begin |
//! | [`forecast()`] | when each will end |
//!
//! Deadline-driven staging is after Sotomayor, Keahey, Foster and Freeman (*Overhead matters*). What is chosen is what
//! the next request to the upstream is for, so all of it can be preempted between two requests:
//!
//! 1. *Earliest deadline first*, among what can be met. On one link that meets every deadline that any order of work can
//!    meet, also when more is ordered meanwhile (Jackson 1955; Liu and Layland, JACM 1973). Least slack first meets
//!    the same ones, but two orders with equal slack take turns for each request; here one ends before the next begins,
//!    so what is fetched first is of use first.
//! 2. When not all can be met, as few *batches* as possible are given up: those of Moore and Hodgson (Moore, *An n job, one
//!    machine sequencing algorithm*, Management Science 1968). That is the least for what has been ordered; nobody
//!    can promise it for what may be ordered later. It is judged anew each time, with what is left of each order and the
//!    rate of now, so an order that was given up is taken up again when the link becomes faster.
//! 3. What was given up takes what time the others leave, least work first: that makes the sum of the delays least
//!    (Smith 1956).
//!
//! An order is *due* when it must be worked on from now on: as late as it and all that is to follow it still ends in time,
//! if the rate is a tenth less than measured, and two seconds before that. Whatever is due is urgent.
//!
//! Owns: the order of work, and nothing else. It has no clock, keeps nothing from one choice to the next, and knows
//! neither chunks nor links.

mod batches;
mod forecast;
#[cfg(test)]
mod tests;

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use batches::{Batch, SPARE, seconds_until};
pub use forecast::{Forecast, forecast};

/// When the bytes of an order are fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Strategy {
    /// Just in time: not before it must be. Keeps the link and the cache free as long as it can, and is late when
    /// something gets in its way.
    Jit,
    /// At once, in the order in which they were ordered, whatever the deadlines are. Only what is due of the other two
    /// goes first.
    Aggressive,
    /// Early if the link is idle, tight deadlines before loose ones.
    #[default]
    Hybrid,
}

impl Strategy {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Jit, Self::Aggressive, Self::Hybrid];
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Jit => "jit",
            Self::Aggressive => "aggressive",
            Self::Hybrid => "hybrid",
        })
    }
}

/// Why a text is not a strategy.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("there is no strategy {0:?}: use jit, aggressive or hybrid")]
pub struct ParseStrategyError(String);

impl FromStr for Strategy {
    type Err = ParseStrategyError;

    fn from_str(text: &str) -> Result<Self, ParseStrategyError> {
        let found = Self::ALL.into_iter().find(|strategy| strategy.to_string() == text);
        found.ok_or_else(|| ParseStrategyError(text.to_owned()))
    }
}

/// An order, as the schedule sees it. Times are since some moment that is the same for all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    /// Names it. Of two that are equal otherwise the smaller one goes first.
    pub id: u64,
    /// What was ordered together and is of use only together has the same number here: as one batch it is met or given
    /// up. An order that stands alone has a number of its own, such as its `id`.
    pub batch: u64,
    /// Bytes that are still to come. One with none is passed over.
    pub remaining: u64,
    /// When they should all be here. Those of one batch that differ in it count as several batches.
    pub deadline: Option<Duration>,
    /// When to work on it. Without a deadline it makes no difference.
    pub strategy: Strategy,
    /// When it was ordered.
    pub ordered: Duration,
    /// Whether it was chosen before. One that is just in time is not held back any more then, or it would be for a moment
    /// after each request, in which it won a little time.
    pub is_started: bool,
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Choice {
    /// Ask for some bytes of an order.
    Fetch {
        /// Of this one.
        id: u64,
        /// Whether it can hardly wait: it goes before what is fetched ahead for running clients, and yields to demand only. What
        /// would be late by far is not urgent: it would cost running clients, and saves nobody.
        is_urgent: bool,
    },
    /// There is nothing to do before that time.
    WaitUntil(Duration),
    /// There is nothing to do.
    Nothing,
}

/// What the next request should be for.
///
/// `rate` is what the link brings for orders, in bytes per second, measured and smoothed over some seconds. While it is
/// unknown (not a positive number), nothing is given up, and nothing held back.
///
/// Those without a deadline come last, in the order in which they were ordered. `O(n log n)`: some ten microseconds
/// for a hundred orders.
pub fn choose(now: Duration, tasks: &[Task], rate: f64) -> Choice {
    Plan::new(now, tasks, rate).choice()
}

/// All orders, sorted into what they are at one moment.
#[derive(Debug)]
struct Plan<'a> {
    now: Duration,
    /// Seconds for each byte; 0 while that is unknown.
    pace: f64,
    /// Just in time and hybrid ones that can be met, earliest deadline first.
    kept: Vec<Batch<'a>>,
    /// Such that cannot.
    given_up: Vec<Batch<'a>>,
    /// The first of those that are aggressive.
    aggressive: Option<&'a Task>,
    /// The first of those without a deadline.
    leisurely: Option<&'a Task>,
}

impl<'a> Plan<'a> {
    fn new(now: Duration, tasks: &'a [Task], rate: f64) -> Self {
        let pace = if rate.is_normal() && rate > 0.0 { rate.recip() } else { 0.0 };
        let (mut aggressive, mut leisurely, mut by_deadline) = (None, None, Vec::new());
        for task in tasks.iter().filter(|task| task.remaining > 0) {
            match (task.deadline, task.strategy) {
                (None, _) => keep_first(&mut leisurely, task),
                (Some(_), Strategy::Aggressive) => keep_first(&mut aggressive, task),
                (Some(_), Strategy::Jit | Strategy::Hybrid) => by_deadline.push(task),
            }
        }
        by_deadline.sort_unstable_by_key(|task| (task.deadline, task.batch, task.id));
        let (kept, given_up) = batches::divide(now, &by_deadline, pace);
        Self { now, pace, kept, given_up, aggressive, leisurely }
    }

    fn choice(&self) -> Choice {
        let next = self.next();
        let fetch = |task: &Task, is_urgent| Choice::Fetch { id: task.id, is_urgent };
        if let Some((batch, task)) = next
            && batch.is_due()
        {
            return fetch(task, true);
        }
        if let Some(task) = self.aggressive {
            return fetch(task, self.is_close(task, task.remaining));
        }
        if let Some((_, task)) = next {
            return fetch(task, false);
        }
        if let Some(batch) = self.given_up.iter().min_by_key(|batch| batch.bytes) {
            let task = batch.tasks[0];
            return fetch(task, self.is_close(task, batch.bytes));
        }
        if let Some(task) = self.leisurely {
            return fetch(task, false);
        }
        let first = self.kept.first().map(|batch| batch.begins_within);
        first.map_or(Choice::Nothing, |seconds| Choice::WaitUntil(self.after(seconds)))
    }

    /// Of what can be met, the first that is not held back.
    fn next(&self) -> Option<(&Batch<'a>, &'a Task)> {
        let is_held_back = |batch: &Batch<'_>, task: &Task| {
            task.strategy == Strategy::Jit && !task.is_started && !batch.is_due() && self.pace > 0.0
        };
        self.kept.iter().find_map(|batch| {
            let task = batch.tasks.iter().find(|task| !is_held_back(batch, task))?;
            Some((batch, *task))
        })
    }

    /// Whether that much work would end about when `task` should, if it began now.
    fn is_close(&self, task: &Task, bytes: u64) -> bool {
        let takes = bytes as f64 * self.pace;
        let slack = task.deadline.map_or(f64::INFINITY, |deadline| seconds_until(deadline, self.now)) - takes;
        slack.abs() < SPARE.max(takes / 10.0)
    }

    fn after(&self, seconds: f64) -> Duration {
        let wait = Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX);
        self.now.saturating_add(wait)
    }
}

/// Of two, the one that was ordered first.
fn keep_first<'a>(first: &mut Option<&'a Task>, task: &'a Task) {
    let key = |task: &Task| (task.ordered, task.batch, task.id);
    if first.is_none_or(|first| key(task) < key(first)) {
        *first = Some(task);
    }
}
