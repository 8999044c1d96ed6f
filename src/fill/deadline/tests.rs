//! The schedule against slow and plain ways to say the same: all subsets, and a link that is played request by request.

use std::slice::from_ref;
use std::time::Duration;

use proptest::prelude::*;
use proptest::strategy::Strategy as _;

use super::batches::SPARE;
use super::{Choice, Forecast, Strategy, Task, choose, forecast};
use crate::units::{to_u64, to_usize};

/// Of one request. All times here are whole numbers of what a request takes.
const REQUEST: u64 = 100;
/// Bytes per second: a request takes a second.
const RATE: f64 = 100.0;

const fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn task(id: u64, remaining: u64, deadline: Option<u64>, strategy: Strategy) -> Task {
    let deadline = deadline.map(seconds);
    Task { id, batch: id, remaining, deadline, strategy, ordered: seconds(0), is_started: false }
}

fn hybrid(id: u64, requests: u64, deadline: u64) -> Task {
    task(id, requests * REQUEST, Some(deadline), Strategy::Hybrid)
}

fn fetch(id: u64, is_urgent: bool) -> Choice {
    Choice::Fetch { id, is_urgent }
}

/// A link that is played request by request.
struct Played {
    /// When each order began and ended.
    spans: Vec<(Duration, Duration)>,
    /// Whether the link was idle while there was something to do that is not just in time.
    was_lazy: bool,
    /// Changes from one order to another that was not ended.
    preemptions: usize,
}

impl Played {
    fn late(&self, tasks: &[Task]) -> usize {
        let mut late: Vec<_> = tasks
            .iter()
            .zip(&self.spans)
            .filter(|(task, (_, end))| task.deadline.is_some_and(|deadline| *end > deadline + Duration::from_millis(1)))
            .map(|(task, _)| (task.batch, task.deadline))
            .collect();
        late.sort_unstable();
        late.dedup();
        late.len()
    }
}

/// Whatever is ordered is known from `ordered` on. `rate` is what the link really brings at a time, `measured` what it
/// is thought to bring, given what it brought in the last second.
fn play(tasks: &[Task], rate: impl Fn(Duration) -> f64, mut measured: impl FnMut(f64) -> f64) -> Played {
    let mut left = tasks.to_vec();
    let mut spans = vec![(Duration::MAX, Duration::MAX); tasks.len()];
    let (mut now, mut thought, mut last) = (seconds(0), measured(rate(seconds(0))), None);
    let (mut was_lazy, mut preemptions) = (false, 0);
    loop {
        let known: Vec<_> = left.iter().filter(|task| task.ordered <= now).cloned().collect();
        let next_order = left.iter().map(|task| task.ordered).filter(|ordered| *ordered > now).min();
        match choose(now, &known, thought) {
            Choice::Fetch { id, .. } => {
                let index = tasks.iter().position(|task| task.id == id).unwrap();
                if last.replace(index).is_some_and(|last: usize| last != index && left[last].remaining > 0) {
                    preemptions += 1;
                }
                let bytes = left[index].remaining.min(REQUEST);
                spans[index].0 = spans[index].0.min(now);
                left[index].remaining -= bytes;
                left[index].is_started = true;
                thought = measured(rate(now));
                now += Duration::from_secs_f64(bytes as f64 / rate(now));
                if left[index].remaining == 0 {
                    spans[index].1 = now;
                }
            }
            idle => {
                was_lazy |= known.iter().any(|task| {
                    task.remaining > 0 && (task.strategy != Strategy::Jit || task.is_started || task.deadline.is_none())
                });
                let until = if let Choice::WaitUntil(until) = idle { until } else { Duration::MAX };
                assert!(until > now, "a wait for what is over");
                now = until.min(next_order.unwrap_or(Duration::MAX));
                if now == Duration::MAX {
                    assert!(left.iter().all(|task| task.remaining == 0), "something was forgotten: {left:?}");
                    return Played { spans, was_lazy, preemptions };
                }
            }
        }
    }
}

fn play_steadily(tasks: &[Task]) -> Played {
    play(tasks, |_| RATE, |rate| rate)
}

/// Whether earliest deadline first, second by second, meets all.
fn is_feasible(tasks: &[Task]) -> bool {
    let mut left: Vec<_> = tasks.iter().map(|task| (task.deadline, task.ordered, task.remaining / REQUEST)).collect();
    let mut now = 0;
    while left.iter().any(|(_, _, requests)| *requests > 0) {
        let ready = left.iter_mut().filter(|(_, ordered, requests)| *ordered <= seconds(now) && *requests > 0);
        let first = ready.min_by_key(|(deadline, _, _)| *deadline);
        now += 1;
        if let Some((deadline, _, requests)) = first {
            *requests -= 1;
            if *requests == 0 && deadline.is_some_and(|deadline| deadline < seconds(now)) {
                return false;
            }
        }
    }
    true
}

/// How many batches are late at least, if all is known from the start: all subsets are tried.
fn fewest_late(tasks: &[Task]) -> usize {
    let mut batches: Vec<_> = tasks.iter().filter(|task| task.deadline.is_some()).map(|task| task.batch).collect();
    batches.sort_unstable();
    batches.dedup();
    let fits = |subset: usize| {
        let is_in = |batch| subset >> batches.iter().position(|other| *other == batch).unwrap() & 1 == 1;
        let chosen = tasks.iter().filter(|task| task.deadline.is_some() && is_in(task.batch));
        is_feasible(&chosen.cloned().collect::<Vec<_>>())
    };
    let most = (0_usize..1 << batches.len()).filter(|subset| fits(*subset)).map(usize::count_ones).max();
    batches.len() - to_usize(most.unwrap_or(0).into())
}

prop_compose! {
    /// Whole requests, one of three loads, orders that come within the first `comes` seconds.
    fn orders(most: usize, comes: u64)(
        load in 4..20_u64,
        parts in prop::collection::vec((1..12_u64, 0..comes, 0..1000_u64), 1..=most),
    ) -> Vec<Task> {
        let spare = |looseness: u64| looseness * load * to_u64(parts.len()) / 2000;
        let until = |requests: u64, ordered: u64, looseness: u64| ordered + requests + spare(looseness);
        let build = |(id, (requests, ordered, looseness)): (usize, &(u64, u64, u64))| Task {
            ordered: seconds(*ordered),
            ..hybrid(to_u64(id), *requests, until(*requests, *ordered, *looseness))
        };
        parts.iter().enumerate().map(build).collect()
    }
}

fn with(tasks: &[Task], strategy: Strategy) -> Vec<Task> {
    tasks.iter().map(|task| Task { strategy, ..task.clone() }).collect()
}

/// Some of each strategy, some without a deadline.
fn mixed(most: usize) -> impl proptest::strategy::Strategy<Value = Vec<Task>> {
    let kinds = prop::collection::vec((0..3_usize, 0..6_u8), most);
    (orders(most, 1), kinds).prop_map(|(tasks, kinds)| {
        let change = |(task, (strategy, is_without)): (Task, (usize, u8))| Task {
            strategy: Strategy::ALL[strategy],
            deadline: task.deadline.filter(|_| is_without > 0),
            ..task
        };
        tasks.into_iter().zip(kinds).map(change).collect()
    })
}

proptest! {
    #[test]
    fn hybrid_meets_all_deadlines_that_can_be_met(tasks in orders(12, 60)) {
        prop_assume!(is_feasible(&tasks));
        prop_assert_eq!(play_steadily(&tasks).late(&tasks), 0);
    }

    #[test]
    fn hybrid_gives_up_as_few_as_possible_and_never_more_than_others(tasks in orders(8, 1)) {
        let played = play_steadily(&tasks);
        prop_assert_eq!(played.late(&tasks), fewest_late(&tasks));
        for strategy in [Strategy::Jit, Strategy::Aggressive] {
            let others = with(&tasks, strategy);
            prop_assert!(played.late(&tasks) <= play_steadily(&others).late(&others));
        }
    }

    #[test]
    fn a_batch_is_met_or_given_up_as_a_whole(tasks in orders(9, 1)) {
        let together = |task: &Task| tasks[to_usize(task.id / 3 * 3)].deadline;
        let tasks: Vec<_> = tasks
            .iter()
            .map(|task| Task { batch: task.id / 3, deadline: together(task), ..task.clone() })
            .collect();
        prop_assert_eq!(play_steadily(&tasks).late(&tasks), fewest_late(&tasks));
    }

    #[test]
    fn an_order_that_was_begun_is_left_only_for_a_new_one_or_one_that_must_begin(tasks in orders(12, 60)) {
        // Each order that comes, and none else, may interrupt one.
        prop_assume!(is_feasible(&tasks));
        prop_assert!(play_steadily(&tasks).preemptions <= tasks.len());
        let known: Vec<_> = tasks.iter().map(|task| Task { ordered: seconds(0), ..task.clone() }).collect();
        prop_assert_eq!(play_steadily(&known).preemptions, 0);
    }

    #[test]
    fn the_link_is_never_idle_while_there_is_work_that_need_not_be_late(tasks in mixed(8)) {
        prop_assert!(!play_steadily(&tasks).was_lazy);
    }

    #[test]
    fn just_in_time_meets_what_is_known_and_begins_nothing_before_it_must(tasks in orders(8, 1)) {
        let tasks: Vec<_> = with(&tasks, Strategy::Jit)
            .into_iter()
            .map(|task| Task { deadline: task.deadline.map(|deadline| deadline * 2 + seconds(10)), ..task })
            .collect();
        prop_assume!(is_feasible(&tasks));
        let played = play_steadily(&tasks);
        prop_assert_eq!(played.late(&tasks), 0);
        for (task, (began, _)) in tasks.iter().zip(&played.spans) {
            prop_assert!(began.as_secs_f64() >= must_begin(task, &tasks) - 0.001, "{:?} began at {:?}", task, began);
        }
    }

    #[test]
    fn hybrid_and_just_in_time_meet_their_deadlines_whatever_aggressive_ones_do(tasks in mixed(8)) {
        let kept: Vec<_> = tasks
            .iter()
            .filter(|task| task.deadline.is_some() && task.strategy != Strategy::Aggressive)
            .map(|task| Task { deadline: task.deadline.map(|deadline| deadline + seconds(2)), ..task.clone() })
            .collect();
        prop_assume!(is_feasible(&kept));
        let of_kept = |task: &Task| kept.iter().find(|other| other.id == task.id).unwrap_or(task).clone();
        let all: Vec<_> = tasks.iter().map(of_kept).collect();
        let played = play_steadily(&all);
        for (task, (_, end)) in all.iter().zip(&played.spans).filter(|(task, _)| kept.contains(task)) {
            prop_assert!(Some(*end) <= task.deadline.map(|deadline| deadline + Duration::from_millis(1)));
        }
    }

    #[test]
    fn what_was_forecast_happens(tasks in mixed(8)) {
        let played = play_steadily(&tasks);
        let foreseen = forecast(seconds(0), &tasks, RATE);
        // A request is not cut when something else must begin, and turns of aggressive ones have other lengths.
        let apart = seconds(to_u64(tasks.len()) + 2);
        let kept = |task: &Task| task.deadline.filter(|_| task.strategy != Strategy::Aggressive);
        let is_late = |(forecast, task): (&Forecast, &Task)| forecast.late_by.is_some() && kept(task).is_some();
        // Which of two is given up may hang on a part of a request.
        if !foreseen.iter().zip(&tasks).any(is_late) {
            for (task, (_, end)) in tasks.iter().zip(&played.spans) {
                prop_assert!(kept(task).is_none_or(|deadline| *end <= deadline + apart), "{:?} ended at {:?}", task, end);
            }
        }
        let last = |ends: &mut dyn Iterator<Item = Duration>| ends.max().unwrap();
        let foreseen = last(&mut foreseen.iter().map(|forecast| forecast.ends.unwrap()));
        prop_assert!(foreseen.abs_diff(last(&mut played.spans.iter().map(|(_, end)| *end))) <= apart);
    }

    #[test]
    fn it_is_said_at_once_what_will_be_late(tasks in orders(8, 1)) {
        for strategy in [Strategy::Hybrid, Strategy::Aggressive] {
            let tasks = with(&tasks, strategy);
            let played = play_steadily(&tasks);
            let foreseen = forecast(seconds(0), &tasks, RATE);
            for (forecast, (task, (_, end))) in foreseen.iter().zip(tasks.iter().zip(&played.spans)) {
                prop_assert!(forecast.ends.unwrap().abs_diff(*end) < Duration::from_micros(1));
                prop_assert_eq!(forecast.late_by.is_some(), *end > task.deadline.unwrap());
            }
        }
    }

    #[test]
    fn no_numbers_are_too_large(
        numbers in prop::collection::vec((any::<u64>(), any::<u64>(), 0..3_usize, any::<u64>()), 0..6),
        now in any::<u64>(),
        rate in any::<f64>(),
    ) {
        let build = |(id, (bytes, deadline, strategy, batch)): (usize, &(u64, u64, usize, u64))| Task {
            batch: *batch,
            ..task(to_u64(id), *bytes, Some(*deadline).filter(|deadline| *deadline > 0), Strategy::ALL[*strategy])
        };
        let tasks: Vec<_> = numbers.iter().enumerate().map(build).collect();
        let has_work = tasks.iter().any(|task| task.remaining > 0);
        prop_assert_eq!(choose(seconds(now), &tasks, rate) == Choice::Nothing, !has_work);
        prop_assert_eq!(forecast(seconds(now), &tasks, rate).len(), tasks.len());
    }
}

/// When one of a set that is just in time must begin: for each that ends after it or with it, before all between them.
fn must_begin(task: &Task, tasks: &[Task]) -> f64 {
    let key = |task: &Task| (task.deadline, task.id);
    let before = |last: &&Task| {
        let between = tasks.iter().filter(|other| key(other) >= key(task) && key(other) <= key(last));
        let work = between.map(|task| task.remaining).sum::<u64>() as f64 / (0.9 * RATE);
        last.deadline.unwrap().as_secs_f64() - work
    };
    let last_ones = tasks.iter().filter(|last| key(last) >= key(task));
    last_ones.map(|last| before(&last)).fold(f64::INFINITY, f64::min) - SPARE
}

#[test]
fn names_are_read_as_they_are_written() {
    for strategy in Strategy::ALL {
        assert_eq!(strategy.to_string().parse(), Ok(strategy));
        assert_eq!(serde_json::to_string(&strategy).unwrap(), format!("\"{strategy}\""));
    }
    let error = "late".parse::<Strategy>().unwrap_err();
    assert_eq!(error.to_string(), "there is no strategy \"late\": use jit, aggressive or hybrid");
    assert_eq!(Strategy::default(), Strategy::Hybrid);
}

#[test]
fn a_tight_deadline_goes_first_and_is_urgent_when_it_can_hardly_wait() {
    let tasks = [hybrid(1, 10, 500), hybrid(2, 10, 100), task(3, REQUEST, None, Strategy::Hybrid)];
    assert_eq!(choose(seconds(0), &tasks, RATE), fetch(2, false));
    assert_eq!(choose(seconds(86), &tasks, RATE), fetch(2, false));
    assert_eq!(choose(seconds(87), &tasks, RATE), fetch(2, true));
}

#[test]
fn what_must_follow_makes_the_first_one_urgent() {
    let tasks = [hybrid(1, 10, 100), hybrid(2, 80, 101)];
    assert_eq!(choose(seconds(0), &tasks, RATE), fetch(1, true));
    assert_eq!(choose(seconds(0), &tasks[..1], RATE), fetch(1, false));
}

#[test]
fn what_will_be_late_by_far_gives_way_and_a_near_miss_does_not() {
    let (by_far, nearly) = (hybrid(1, 50, 20), hybrid(2, 21, 20));
    assert_eq!(choose(seconds(0), &[by_far.clone(), hybrid(3, 5, 1000)], RATE), fetch(3, false));
    assert_eq!(choose(seconds(0), &[by_far], RATE), fetch(1, false));
    assert_eq!(choose(seconds(0), &[nearly], RATE), fetch(2, true));
}

#[test]
fn aggressive_ones_go_in_the_order_of_their_orders_until_others_are_due() {
    let aggressive = |id, ordered, deadline| Task {
        ordered: seconds(ordered),
        ..task(id, 50 * REQUEST, Some(deadline), Strategy::Aggressive)
    };
    let tasks = [aggressive(1, 5, 60), aggressive(2, 4, 900), hybrid(3, 10, 100)];
    assert_eq!(choose(seconds(5), &tasks, RATE), fetch(2, false));
    assert_eq!(choose(seconds(87), &tasks, RATE), fetch(3, true));
}

#[test]
fn just_in_time_waits_until_it_must_begin_and_goes_on_then() {
    let mut order = task(1, 90 * REQUEST, Some(1000), Strategy::Jit);
    let Choice::WaitUntil(then) = choose(seconds(0), from_ref(&order), RATE) else { panic!("it began at once") };
    assert_eq!(then.as_millis(), 898_000);
    let idle = [order.clone(), task(2, REQUEST, None, Strategy::Jit)];
    assert_eq!(choose(seconds(0), &idle, RATE), fetch(2, false));
    assert_eq!(choose(then, from_ref(&order), RATE), fetch(1, true));
    order.remaining -= 10 * REQUEST;
    order.is_started = true;
    assert_eq!(choose(then + seconds(10), &[order], RATE), fetch(1, false));
}

#[test]
fn without_a_rate_nothing_waits_and_nothing_is_given_up() {
    let tasks = [task(1, 1 << 40, Some(1000), Strategy::Jit), hybrid(2, 1 << 40, 900)];
    for rate in [0.0, -1.0, f64::NAN, f64::INFINITY] {
        assert_eq!(choose(seconds(0), &tasks, rate), fetch(2, false));
        assert_eq!(choose(seconds(0), &tasks[..1], rate), fetch(1, false));
        let foreseen = forecast(seconds(950), &tasks, rate);
        assert_eq!((foreseen[0].ends, foreseen[0].late_by), (None, None));
        assert_eq!((foreseen[1].ends, foreseen[1].late_by), (None, Some(seconds(50))));
    }
}

/// What a server that smooths its rate thinks.
fn smoothed() -> impl FnMut(f64) -> f64 {
    let mut thought = RATE;
    move |seen| {
        thought += (seen - thought) / 5.0;
        thought
    }
}

#[test]
fn when_the_link_becomes_slower_one_is_given_up_and_not_all() {
    // 100 seconds of work, and twice as much time for each; from the 20th second on the link has a third of the rate.
    let tasks: Vec<_> = (1..=5).map(|id| hybrid(id, 20, id * 40)).collect();
    let slow = |now| if now < seconds(20) { RATE } else { RATE / 3.0 };
    let played = play(&tasks, slow, smoothed());
    // The 180 seconds after the first order bring three more. Tried in order, three would be late.
    assert_eq!(played.late(&tasks), 1);
    let in_order = with(&tasks, Strategy::Aggressive);
    assert_eq!(play(&in_order, slow, smoothed()).late(&in_order), 3);
}

#[test]
fn when_the_link_recovers_what_was_given_up_is_taken_up_again() {
    // What is large is given up while the link is slow, and is in time all the same, because it recovers soon enough.
    let tasks = [hybrid(1, 10, 30), hybrid(2, 100, 180), hybrid(3, 10, 185)];
    let dip = |now| if (seconds(15)..seconds(45)).contains(&now) { RATE / 4.0 } else { RATE };
    let given_up = [hybrid(2, 95, 180), hybrid(3, 10, 185)];
    assert_eq!(choose(seconds(20), &given_up, RATE / 4.0), fetch(3, false));
    assert_eq!(play(&tasks, dip, smoothed()).late(&tasks), 0);
}

#[test]
fn just_in_time_bears_a_link_that_is_a_tenth_slower_than_it_was() {
    let tasks: Vec<_> = (1..=5).map(|id| task(id, 20 * REQUEST, Some(100 + id * 20), Strategy::Jit)).collect();
    let slower = |now| if now < seconds(90) { RATE } else { 0.91 * RATE };
    assert_eq!(play(&tasks, slower, smoothed()).late(&tasks), 0);
}
