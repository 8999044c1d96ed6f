//! Orders that are being carried out: how far each has come, and what it wants next.
//!
//! An order is gone through from its first byte to its last, and again as long as something of it is missing: because it
//! could not be had, or has been evicted since. It is done when all of it is here and durable, and that is asked of the
//! mirror, never counted. What is counted (`remaining`) is only what the schedule expects.
//!
//! Owns: places in orders, and pauses after a pass that brought nothing. Does not own: which order goes first
//! (`deadline`), which orders there are (`orders`).

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::budget::{Budget, time_for};
use super::deadline::{self, Choice};
use super::image::Image;
use super::orders::{Expected, Order, What};
use crate::clock::Moment;
use crate::export::SharedExport;
use crate::ranges::ByteRange;

/// A choice holds for so long, unless what was chosen has nothing to send: it costs more than a request when there are
/// many orders.
const CHOICE_HOLDS: Duration = Duration::from_millis(20);
/// What has come is durable after this long, commonly.
const DURABLE_SOON: Duration = Duration::from_millis(250);
/// After a pass that brought nothing, doubled each time.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// A held order begins as if the link brought so much, as long as nobody knows what it brings.
const CAUTIOUS_RATE: f64 = 8.0 * 1024.0 * 1024.0;
/// And so much earlier than it must, for what may get in its way.
const EARLY: Duration = Duration::from_secs(2);
/// Orders of casts are seen as ordered so much later than they were: others without a deadline go first.
const LAST: Duration = Duration::from_secs(1 << 40);

/// Less than this is in time: times are computed in fractions.
const NO_DELAY: Duration = Duration::from_millis(1);

/// The orders of a server that are being carried out.
#[derive(Debug, Default)]
pub(super) struct Tasks {
    tasks: Vec<Task>,
    /// What was chosen last, and until when it holds.
    chosen: Option<(Instant, Choice)>,
}

/// One of them.
struct Task {
    order: Arc<Order>,
    image: Arc<Image>,
    source: Option<SharedExport>,
    budget: Budget,
    /// Bytes that are still to be asked for, as far as is known.
    remaining: u64,
    /// The range that it is at, and the byte in the image.
    place: (usize, u64),
    /// The least that was missing at the end of a pass. One that does not get beyond that was in vain, also if it brought
    /// much: it has been evicted again, perhaps for the sake of another order.
    least: u64,
    /// Nothing is asked for before.
    rests: Option<Instant>,
    fruitless: u32,
    is_started: bool,
    /// Somebody else brings it.
    is_held: bool,
}

impl Drop for Task {
    fn drop(&mut self) {
        if self.source.is_some() {
            self.image.mirror.prefer(None);
        }
    }
}

impl fmt::Debug for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Task")
            .field("order", &self.order.id)
            .field("remaining", &self.remaining)
            .finish_non_exhaustive()
    }
}

/// What an order wants.
#[derive(Debug)]
pub(super) enum Wish {
    /// Some bytes.
    Fetch { task: Fetch, is_urgent: bool },
    /// Nothing before that, if at all.
    Later(Option<Instant>),
}

/// A part of an order that is to be fetched.
pub(super) struct Fetch {
    pub(super) order: u64,
    pub(super) image: Arc<Image>,
    pub(super) range: ByteRange,
    pub(super) source: Option<SharedExport>,
}

impl fmt::Debug for Fetch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Fetch").field("order", &self.order).field("range", &self.range).finish_non_exhaustive()
    }
}

/// An order that is done.
pub(super) type Done = u64;

/// The earlier of two times, either of which may be never.
pub(super) fn earlier(one: Option<Instant>, other: Option<Instant>) -> Option<Instant> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one.min(other)),
        (one, other) => one.or(other),
    }
}

impl Tasks {
    /// Carries an order out, unless that is being done.
    pub(super) fn add(&mut self, order: Arc<Order>, image: Arc<Image>, source: Option<SharedExport>, is_held: bool) {
        if self.has(order.id) {
            return;
        }
        let remaining = order.total_bytes() - image.mirror.here(&order.ranges).done();
        let budget = Budget::new(order.rate);
        let place = (0, order.ranges.first().map_or(0, |range| range.start()));
        if source.is_some() {
            image.mirror.prefer(source.clone());
        }
        self.tasks.push(Task {
            order,
            image,
            source,
            budget,
            remaining,
            place,
            least: remaining,
            rests: None,
            fruitless: 0,
            is_started: false,
            is_held,
        });
        self.chosen = None;
    }

    /// Holds those for which `is_held` says so, and tells whether there are some that are not held any more. What has
    /// come meanwhile of those that are held is counted anew.
    pub(super) fn hold(&mut self, is_held: impl Fn(&Order) -> bool) -> bool {
        let (mut is_freed, mut is_changed) = (false, false);
        for task in &mut self.tasks {
            let held = is_held(&task.order);
            // Counting looks at every chunk.
            if task.is_held && !held || held && task.order.deadline.is_some() {
                let here = task.image.mirror.here(&task.order.ranges);
                task.remaining = here.total - here.done();
                task.least = task.remaining;
            }
            is_freed |= task.is_held && !held;
            is_changed |= task.is_held != held;
            task.is_held = held;
        }
        if is_changed {
            self.chosen = None;
        }
        is_freed
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.tasks.is_empty()
    }

    pub(super) fn has(&self, id: u64) -> bool {
        self.tasks.iter().any(|task| task.order.id == id)
    }

    /// Goes on with those only for which `is_active` holds.
    pub(super) fn retain(&mut self, is_active: impl Fn(u64) -> bool) {
        self.tasks.retain(|task| is_active(task.order.id));
        self.chosen = None;
    }

    /// When orders will be done at `rate` bytes per second of all together (0: unknown), as far as anything is known.
    /// Orders for one image share its rate in the order in which they end otherwise.
    pub(super) fn forecast(&self, now: Moment, rate: f64) -> Vec<Expected> {
        // Nobody here knows when those that are held will go on, and whether they will have to.
        let tasks = || self.tasks.iter().filter(|task| !task.is_held);
        let seen: Vec<_> = tasks().map(|task| task.seen(now)).collect();
        let forecast = deadline::forecast(Duration::ZERO, &seen, rate);
        let mut ends: Vec<_> = tasks().zip(&seen).zip(forecast).collect();
        ends.sort_by_key(|(_, forecast)| forecast.ends);
        let mut of_images: HashMap<*const Image, u64> = HashMap::new();
        let expected = |((task, seen), forecast): ((&Task, &deadline::Task), deadline::Forecast)| {
            let before = of_images.entry(Arc::as_ptr(&task.image)).or_default();
            *before += task.remaining;
            let own = task.order.rate.map(|rate| time_for(task.remaining, rate));
            let image = task.image.rate().map(|rate| time_for(*before, rate));
            let end = forecast.ends.max(own).max(image)?;
            let late_by = seen.deadline.and_then(|deadline| end.checked_sub(deadline)).filter(|late| *late > NO_DELAY);
            Some(Expected { id: task.order.id, end, late_by: late_by.or(forecast.late_by) })
        };
        ends.into_iter().filter_map(expected).collect()
    }

    /// Bytes of an order have not been asked for after all.
    pub(super) fn refund(&mut self, id: u64, bytes: u64) {
        if let Some(task) = self.tasks.iter_mut().find(|task| task.order.id == id) {
            task.budget.refund(bytes);
        }
    }

    /// What is wanted next, at most `most` bytes; of what is urgent only, if that is asked. Orders that turn out to be
    /// done are added to `done`.
    pub(super) fn next(&mut self, now: Moment, rate: f64, most: u64, urgent_only: bool, done: &mut Vec<Done>) -> Wish {
        // Each turn finds something, or puts one of them to rest.
        for _ in 0..=self.tasks.len() {
            let choice = self.choose(now, rate);
            let (id, is_urgent) = match choice {
                Choice::Fetch { id, is_urgent } if is_urgent || !urgent_only => (id, is_urgent),
                Choice::Fetch { .. } => return Wish::Later(None),
                Choice::WaitUntil(at) => return Wish::Later(earlier(self.wake(now, rate), now.steady.checked_add(at))),
                Choice::Nothing => return Wish::Later(self.wake(now, rate)),
            };
            let Some(task) = self.tasks.iter_mut().find(|task| task.order.id == id) else {
                self.chosen = None;
                continue;
            };
            if let Some(range) = task.next(now.steady, most, done) {
                let (image, source) = (Arc::clone(&task.image), task.source.clone());
                return Wish::Fetch { task: Fetch { order: id, image, range, source }, is_urgent };
            }
            self.chosen = None;
            self.tasks.retain(|task| !done.contains(&task.order.id));
        }
        Wish::Later(self.wake(now, rate))
    }

    /// Which order is next, of those that do not rest. Times are from now on.
    fn choose(&mut self, now: Moment, rate: f64) -> Choice {
        if let Some((until, choice)) = self.chosen
            && until > now.steady
            && self.is_ready(choice, now.steady)
        {
            return choice;
        }
        let ready = self.tasks.iter().filter(|task| !task.is_held_at(now, rate) && task.wait(now.steady).is_none());
        let ready: Vec<_> = ready.map(|task| task.pressed(now, rate)).collect();
        let choice = deadline::choose(Duration::ZERO, &ready, rate);
        self.chosen = match choice {
            Choice::Fetch { .. } => Some((now.steady + CHOICE_HOLDS, choice)),
            // They are told as times from now.
            Choice::WaitUntil(_) | Choice::Nothing => None,
        };
        choice
    }

    /// Whether what was chosen may still have its turn: it may have used up its rate since.
    fn is_ready(&self, choice: Choice, now: Instant) -> bool {
        let Choice::Fetch { id, .. } = choice else { return true };
        self.tasks.iter().any(|task| task.order.id == id && task.wait(now).is_none())
    }

    /// When the first of those that rest goes on.
    fn wake(&self, now: Moment, rate: f64) -> Option<Instant> {
        let going = self.tasks.iter().filter(|task| !task.is_held_at(now, rate));
        going.filter_map(|task| task.wait(now.steady)).min()
    }
}

impl Task {
    /// As the schedule sees it, at this moment.
    fn seen(&self, now: Moment) -> deadline::Task {
        deadline::Task {
            id: self.order.id,
            batch: self.order.id,
            // It is passed over when nothing remains, and somebody has to find that out.
            remaining: self.remaining.max(1),
            deadline: self.order.deadline.map(|deadline| deadline.left(now)),
            strategy: self.order.strategy,
            ordered: match self.order.what {
                What::Cast(_) => LAST + Duration::from_nanos(self.order.id),
                _ => Duration::from_nanos(self.order.id),
            },
            is_started: self.is_started,
        }
    }

    /// The same, for the choice of what is next on a link of `rate` bytes per second: an order that is slower than the
    /// link, by its own rate or its image's, has to begin that much earlier.
    fn pressed(&self, now: Moment, rate: f64) -> deadline::Task {
        let seen = self.seen(now);
        let limits = [self.order.rate, self.image.rate()];
        let Some(limit) = limits.into_iter().flatten().min() else { return seen };
        let on_link = Duration::try_from_secs_f64(seen.remaining as f64 / rate).unwrap_or(Duration::ZERO);
        let lost = time_for(seen.remaining, limit).saturating_sub(on_link);
        deadline::Task { deadline: seen.deadline.map(|deadline| deadline.saturating_sub(lost)), ..seen }
    }

    /// Whether it is left to somebody else for now: until it must begin to be done in time, if it has a deadline. That
    /// is looked at from time to time, and so nothing wakes up for it.
    fn is_held_at(&self, now: Moment, rate: f64) -> bool {
        let Some(deadline) = self.order.deadline.filter(|_| self.is_held) else { return self.is_held };
        let rate = if rate > 0.0 { rate } else { CAUTIOUS_RATE };
        let takes = Duration::try_from_secs_f64(self.remaining as f64 / rate).unwrap_or(Duration::MAX);
        deadline.left(now) > takes.saturating_add(takes / 10).saturating_add(EARLY)
    }

    /// When something may be asked for, if not now.
    fn wait(&self, now: Instant) -> Option<Instant> {
        let rests = self.rests.filter(|until| *until > now);
        rests.max(self.budget.wait(now)).max(self.image.wait(now))
    }

    fn next(&mut self, now: Instant, most: u64, done: &mut Vec<Done>) -> Option<ByteRange> {
        let found = self.look(most);
        if let Some(found) = found {
            self.is_started = true;
            self.budget.spend(now, found.length());
            self.remaining = self.remaining.saturating_sub(found.length());
            return Some(found);
        }
        self.end_pass(now, done);
        None
    }

    /// Goes on with the pass.
    fn look(&mut self, most: u64) -> Option<ByteRange> {
        loop {
            let (index, at) = self.place;
            let range = *self.order.ranges.get(index)?;
            if at >= range.end() {
                let next = self.order.ranges.get(index + 1).map_or(0, |range| range.start());
                self.place = (index + 1, next);
                continue;
            }
            let (found, rest) = self.image.mirror.missing(ByteRange::between(at.max(range.start()), range.end()), most);
            self.place = (index, rest);
            if found.is_some() {
                return found;
            }
        }
    }

    /// Looks what is still missing, and rests before the next pass.
    fn end_pass(&mut self, now: Instant, done: &mut Vec<Done>) {
        let here = self.image.mirror.here(&self.order.ranges);
        if here.is_all() {
            return done.push(self.order.id);
        }
        self.remaining = here.total - here.done();
        let is_fruitless = self.remaining >= self.least;
        self.fruitless = if is_fruitless { self.fruitless + 1 } else { 0 };
        self.least = self.least.min(self.remaining);
        self.place = (0, self.order.ranges.first().map_or(0, |range| range.start()));
        self.rests = Some(now + (DURABLE_SOON * (1 << self.fruitless.min(7))).min(LONGEST_PAUSE));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cast::SessionId;
    use crate::clock;
    use crate::fill::deadline::Strategy;
    use crate::fill::image::{Filling, tests::image};
    use crate::fill::orders::{Deadline, Spec, State};
    use crate::units::{KIB, MIB};

    /// An order for all of 1 MiB, which is to be there at a time from now.
    fn order(id: u64, rate: Option<u64>, deadline: Option<Duration>, strategy: Strategy) -> Arc<Order> {
        let Spec { image, identity, ranges, what, source, .. } = Spec::all("x", MIB);
        let now = clock::moment();
        let deadline = deadline.and_then(|left| Deadline::after(left, now));
        let (state, ordered_at) = (State::Active, now.wall);
        let order = Order {
            id,
            image,
            identity,
            ranges,
            what,
            rate,
            deadline,
            strategy,
            source,
            ordered_at,
            state,
            ended_at: None,
        };
        Arc::new(order)
    }

    #[test]
    fn the_rate_of_an_order_holds_though_it_was_just_chosen() {
        let directory = tempfile::tempdir().unwrap();
        let image = image(directory.path(), MIB, Filling::default(), None);
        let mut tasks = Tasks::default();
        tasks.add(order(1, Some(64 * KIB), None, Strategy::Hybrid), image, None, false);
        let (now, mut done) = (clock::moment(), Vec::new());
        assert!(matches!(tasks.next(now, 0.0, 64 * KIB, false, &mut done), Wish::Fetch { .. }));
        let Wish::Later(Some(then)) = tasks.next(now, 0.0, 64 * KIB, false, &mut done) else {
            panic!("one more in the same moment")
        };
        assert_eq!(then, now.steady + Duration::from_secs(1));
    }

    #[test]
    fn an_order_is_expected_at_its_own_rate_also_while_the_link_is_unknown() {
        let directory = tempfile::tempdir().unwrap();
        let (free, limited) = (directory.path().join("free"), directory.path().join("limited"));
        let (free, limited) =
            (image(&free, MIB, Filling::default(), None), image(&limited, MIB, Filling::default(), None));
        limited.set_rate(clock::now(), Some(32 * KIB));
        let mut tasks = Tasks::default();
        let deadline = Some(Duration::from_secs(10));
        tasks.add(order(1, Some(64 * KIB), deadline, Strategy::Hybrid), Arc::clone(&free), None, false);
        tasks.add(order(2, None, None, Strategy::Hybrid), free, None, false);
        tasks.add(order(3, Some(64 * KIB), deadline, Strategy::Hybrid), Arc::clone(&limited), None, false);
        tasks.add(order(4, None, None, Strategy::Hybrid), limited, None, false);
        let told = |rate| {
            let mut told = tasks.forecast(clock::moment(), rate);
            told.sort_by_key(|expected| expected.id);
            let seconds = |expected: &Expected| {
                (expected.id, expected.end.as_secs(), expected.late_by.map(|late| late.as_secs_f64().round()))
            };
            told.iter().map(seconds).collect::<Vec<_>>()
        };
        let known = vec![(1, 16, Some(6.0)), (3, 32, Some(22.0)), (4, 64, None)];
        assert_eq!(told(0.0), known);
        let all: Vec<_> = told(1e9).into_iter().filter(|(id, ..)| *id != 2).collect();
        assert_eq!(all, known);
    }

    #[test]
    fn just_in_time_is_in_time_at_the_rate_of_the_order_too() {
        let directory = tempfile::tempdir().unwrap();
        let image = image(directory.path(), MIB, Filling::default(), None);
        let mut tasks = Tasks::default();
        // 16 s at its own rate, on a link that would need none.
        let deadline = Some(Duration::from_secs(40));
        tasks.add(order(1, Some(64 * KIB), deadline, Strategy::Jit), image, None, false);
        let (now, mut done) = (clock::moment(), Vec::new());
        let Wish::Later(Some(then)) = tasks.next(now, 1e9, 64 * KIB, false, &mut done) else { panic!("it has time") };
        let begins = then.saturating_duration_since(now.steady).as_secs();
        assert!((18..=24).contains(&begins), "it begins in {begins} s");
    }

    #[test]
    fn an_order_that_somebody_else_brings_begins_when_it_must() {
        let directory = tempfile::tempdir().unwrap();
        let image = image(directory.path(), MIB, Filling::default(), None);
        let now = clock::moment();
        let later = |seconds| Moment { steady: now.steady + seconds, wall: now.wall + seconds };
        let fetches = |tasks: &mut Tasks, now, rate| {
            matches!(tasks.next(now, rate, 64 * KIB, false, &mut Vec::new()), Wish::Fetch { .. })
        };
        let mut tasks = Tasks::default();
        tasks.add(order(1, None, None, Strategy::Hybrid), Arc::clone(&image), None, true);
        assert!(!fetches(&mut tasks, later(Duration::from_secs(1 << 20)), 0.0), "without a deadline it waits");
        assert!(tasks.forecast(now, 1e6).is_empty());
        assert!(!tasks.hold(|_| true), "nothing has changed");
        assert!(tasks.hold(|_| false));
        assert!(fetches(&mut tasks, now, 0.0));
        let mut tasks = Tasks::default();
        tasks.add(order(2, None, Some(Duration::from_secs(60)), Strategy::Jit), image, None, true);
        // It takes 32 s at this rate, a tenth more to be sure, and 2 s.
        let rate = 32.0 * 1024.0;
        assert!(!fetches(&mut tasks, later(Duration::from_secs(22)), rate));
        assert!(fetches(&mut tasks, later(Duration::from_secs(23)), rate));
        assert!(!fetches(&mut tasks, later(Duration::from_secs(57)), 0.0), "a link that nobody knows is thought fast");
        assert!(fetches(&mut tasks, later(Duration::from_secs(58)), 0.0));
    }

    #[test]
    fn orders_of_casts_come_after_others_without_a_deadline() {
        let directory = tempfile::tempdir().unwrap();
        let image = image(directory.path(), MIB, Filling::default(), None);
        let cast = Order { what: What::Cast(SessionId(1)), ..Order::clone(&order(1, None, None, Strategy::Hybrid)) };
        let mut tasks = Tasks::default();
        tasks.add(Arc::new(cast), Arc::clone(&image), None, false);
        tasks.add(order(2, None, None, Strategy::Hybrid), image, None, false);
        let Wish::Fetch { task, .. } = tasks.next(clock::moment(), 0.0, 64 * KIB, false, &mut Vec::new()) else {
            panic!("there is something to fetch")
        };
        assert_eq!(task.order, 2);
    }
}
