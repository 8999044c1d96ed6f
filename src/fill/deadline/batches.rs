//! What of a set with deadlines can be met, what is given up, and when each must begin.

use std::collections::BinaryHeap;
use std::time::Duration;

use super::Task;

/// Seconds before the last moment at which work begins: for what is under way of something else, and until what has
/// arrived is durable.
pub(super) const SPARE: f64 = 2.0;
/// The part of the measured rate that is counted on when something is held back.
const PRUDENT: f64 = 0.9;
/// Less than this late, in seconds, is in time, and so near is now: a float's rounding must not give up an order.
pub(super) const TOLERANCE: f64 = 0.001;

/// Orders that are met or given up together. They have one deadline.
#[derive(Debug)]
pub(super) struct Batch<'a> {
    /// At least one.
    pub(super) tasks: Vec<&'a Task>,
    /// What is still to come of all.
    pub(super) bytes: u64,
    /// Seconds from now until the deadline; negative afterwards.
    left: f64,
    /// Seconds from now until it must be worked on, so that it and whatever follows it ends in time. Negative if that is
    /// over. They never fall from one batch to the next.
    pub(super) begins_within: f64,
}

impl Batch<'_> {
    /// Whether it must be worked on from now on.
    pub(super) fn is_due(&self) -> bool {
        self.begins_within <= TOLERANCE
    }
}

/// Seconds from `now` until `deadline`, negative if it is over.
pub(super) fn seconds_until(deadline: Duration, now: Duration) -> f64 {
    match deadline.checked_sub(now) {
        Some(left) => left.as_secs_f64(),
        None => -now.saturating_sub(deadline).as_secs_f64(),
    }
}

/// Takes orders with deadlines, sorted by deadline and batch, and gives the largest set of batches of which none is late, in
/// the same order, and the others. A byte takes `pace` seconds.
pub(super) fn divide<'a>(now: Duration, tasks: &[&'a Task], pace: f64) -> (Vec<Batch<'a>>, Vec<Batch<'a>>) {
    let batches: Vec<_> = tasks
        .chunk_by(|one, other| (one.deadline, one.batch) == (other.deadline, other.batch))
        .map(|tasks| Batch {
            tasks: tasks.to_vec(),
            bytes: tasks.iter().fold(0, |sum, task| sum.saturating_add(task.remaining)),
            left: tasks[0].deadline.map_or(f64::INFINITY, |deadline| seconds_until(deadline, now)),
            begins_within: f64::INFINITY,
        })
        .collect();
    let is_given_up = give_up(&batches, pace);
    let (mut kept, mut given_up) = (Vec::new(), Vec::new());
    for (batch, is_given_up) in batches.into_iter().zip(is_given_up) {
        if is_given_up { given_up.push(batch) } else { kept.push(batch) }
    }
    begin_as_late_as_possible(&mut kept, pace);
    (kept, given_up)
}

/// The algorithm of Moore and Hodgson: whenever the next deadline cannot be met, the longest work so far is given up. Of
/// equals, the last.
fn give_up(batches: &[Batch<'_>], pace: f64) -> Vec<bool> {
    let mut is_given_up = vec![false; batches.len()];
    let (mut longest, mut sum) = (BinaryHeap::new(), 0_u128);
    for (index, batch) in batches.iter().enumerate() {
        longest.push((batch.bytes, index));
        sum += u128::from(batch.bytes);
        if sum as f64 * pace > batch.left + TOLERANCE
            && let Some((bytes, index)) = longest.pop()
        {
            sum -= u128::from(bytes);
            is_given_up[index] = true;
        }
    }
    is_given_up
}

/// Finds out from the last to the first when each must begin.
fn begin_as_late_as_possible(batches: &mut [Batch<'_>], pace: f64) {
    let mut next_begins = f64::INFINITY;
    for batch in batches.iter_mut().rev() {
        next_begins = batch.left.min(next_begins) - batch.bytes as f64 * pace / PRUDENT;
        batch.begins_within = next_begins - SPARE;
    }
}
