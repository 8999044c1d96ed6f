//! Orders that are being carried out: how far each has come, and what it wants next.
//!
//! An order is gone through from its first byte to its last, and again as long as something of it is missing: because it
//! could not be had, or has been evicted since. It is done when all of it is here and durable, and that is asked of the
//! mirror, never counted. What is counted (`remaining`) is only what the schedule expects.
//!
//! Owns: places in orders, and pauses after a pass that brought nothing. Does not own: which order goes first
//! (`deadline`), which orders there are (`orders`).

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::budget::Budget;
use super::deadline::{self, Choice};
use super::engine::earlier;
use super::image::Image;
use super::orders::Order;
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
    /// What was missing when this pass began.
    at_begin: u64,
    /// Nothing is asked for before.
    rests: Option<Instant>,
    fruitless: u32,
    is_started: bool,
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

impl Tasks {
    /// Carries an order out, unless that is being done.
    pub(super) fn add(&mut self, order: Arc<Order>, image: Arc<Image>, source: Option<SharedExport>) {
        if self.has(order.id) {
            return;
        }
        let remaining = order.total_bytes() - image.mirror.here(&order.ranges).done();
        let budget = Budget::new(order.rate);
        let place = (0, order.ranges.first().map_or(0, |range| range.start()));
        self.tasks.push(Task {
            order,
            image,
            source,
            budget,
            remaining,
            place,
            at_begin: remaining,
            rests: None,
            fruitless: 0,
            is_started: false,
        });
        self.chosen = None;
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

    /// The orders, as the schedule sees them.
    pub(super) fn schedule(&self, now: Moment) -> Vec<deadline::Task> {
        self.tasks.iter().map(|task| task.seen(now)).collect()
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
                Choice::WaitUntil(at) => return Wish::Later(earlier(self.wake(now), now.steady.checked_add(at))),
                Choice::Nothing => return Wish::Later(self.wake(now)),
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
        Wish::Later(self.wake(now))
    }

    /// Which order is next, of those that do not rest. Times are from now on.
    fn choose(&mut self, now: Moment, rate: f64) -> Choice {
        if let Some((until, choice)) = self.chosen
            && until > now.steady
        {
            return choice;
        }
        let ready = self.tasks.iter().filter(|task| task.wait(now.steady).is_none());
        let ready: Vec<_> = ready.map(|task| task.seen(now)).collect();
        let choice = deadline::choose(Duration::ZERO, &ready, rate);
        self.chosen = match choice {
            Choice::Fetch { .. } => Some((now.steady + CHOICE_HOLDS, choice)),
            // They are told as times from now.
            Choice::WaitUntil(_) | Choice::Nothing => None,
        };
        choice
    }

    /// When the first of those that rest goes on.
    fn wake(&self, now: Moment) -> Option<Instant> {
        self.tasks.iter().filter_map(|task| task.wait(now.steady)).min()
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
            ordered: Duration::from_nanos(self.order.id),
            is_started: self.is_started,
        }
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
        let is_fruitless = self.remaining >= self.at_begin;
        self.fruitless = if is_fruitless { self.fruitless + 1 } else { 0 };
        self.at_begin = self.remaining;
        self.place = (0, self.order.ranges.first().map_or(0, |range| range.start()));
        self.rests = Some(now + (DURABLE_SOON * (1 << self.fruitless.min(7))).min(LONGEST_PAUSE));
    }
}
