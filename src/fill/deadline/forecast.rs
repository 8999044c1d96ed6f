//! When each order will end, if the rate stays and nothing else is ordered.
//!
//! It plays through what [`choose`](super::choose) would choose, with a link on which bytes flow.

use std::time::Duration;

use super::batches::{TOLERANCE, seconds_until};
use super::{Choice, Plan, Task};
use crate::units::to_u64;

/// In how many pieces all work is cut where orders take turns.
const PIECES: usize = 1000;

/// What is to be expected of an order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Forecast {
    /// Which one.
    pub id: u64,
    /// When its last byte comes; `None` if that cannot be said, because the rate is not known.
    pub ends: Option<Duration>,
    /// How long after its deadline that is; `None` if it is in time, has no deadline, or nothing can be said. One whose deadline is over is
    /// late by the time since then at least, also while the rate is not known.
    pub late_by: Option<Duration>,
}

/// When each order will end, in the order in which they are given, and which of them will be late.
///
/// Where aggressive orders stand beside others, they take turns in pieces of a thousandth of all work, so ends may be wrong by
/// as much. `O(n^2 log n)`, some milliseconds for a hundred orders: for when something is ordered, not for each request.
pub fn forecast(now: Duration, tasks: &[Task], rate: f64) -> Vec<Forecast> {
    let mut left = tasks.to_vec();
    let mut ends: Vec<_> = tasks.iter().map(|task| (task.remaining == 0).then_some(now)).collect();
    if rate.is_normal() && rate > 0.0 {
        play(now, &mut left, &mut ends, rate);
    }
    let about = |(task, ends): (&Task, Option<Duration>)| Forecast {
        id: task.id,
        ends,
        late_by: task.deadline.and_then(|deadline| late_by(deadline, ends.unwrap_or(now))),
    };
    tasks.iter().zip(ends).map(about).collect()
}

fn late_by(deadline: Duration, ends: Duration) -> Option<Duration> {
    (seconds_until(deadline, ends) < -TOLERANCE).then(|| ends.saturating_sub(deadline))
}

/// Goes on until nothing is left.
fn play(mut now: Duration, left: &mut [Task], ends: &mut [Option<Duration>], rate: f64) {
    let all = left.iter().fold(0, |sum: u64, task| sum.saturating_add(task.remaining));
    // Each round ends an order, waits for one, or does a piece.
    for _ in 0..4 * left.len() + 2 * PIECES {
        let plan = Plan::new(now, left, rate);
        let piece = if plan.aggressive.is_some() { all.div_ceil(to_u64(PIECES)) } else { 1 };
        match plan.choice() {
            Choice::Nothing => return,
            Choice::WaitUntil(then) => now = then,
            Choice::Fetch { id, .. } => {
                let undisturbed = plan.undisturbed().map_or(u64::MAX, |seconds| whole_bytes(seconds * rate).max(piece));
                let Some(index) = left.iter().position(|task| task.id == id && task.remaining > 0) else { return };
                let task = &mut left[index];
                let bytes = task.remaining.min(undisturbed);
                task.remaining -= bytes;
                task.is_started = true;
                now = now.saturating_add(Duration::try_from_secs_f64(bytes as f64 / rate).unwrap_or(Duration::MAX));
                if task.remaining == 0 {
                    ends[index] = Some(now);
                }
            }
        }
    }
}

impl Plan<'_> {
    /// For how many seconds what is chosen now stays the choice, unless it ends: until what goes before it must begin.
    fn undisturbed(&self) -> Option<f64> {
        let first = self.kept.first()?;
        let is_first = self.next().is_some_and(|(next, _)| std::ptr::eq(next, first));
        match (is_first, first.is_due()) {
            // It will not be due after a moment of work, and then it is the turn of an aggressive one.
            (true, true) => self.aggressive.map(|_| 0.0),
            (true, false) if self.aggressive.is_none() => None,
            _ => Some(first.begins_within.max(0.0)),
        }
    }
}

/// Rounded up, and as large as a number can be at most.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "`as` saturates, which is what is wanted")]
fn whole_bytes(bytes: f64) -> u64 {
    bytes.ceil() as u64
}
