//! One order: what is to be fetched, by when, how, and what came of it.

use std::time::{Duration, Instant, SystemTime};

use crate::cast::SessionId;
use crate::clock::Moment;
use crate::export::ImageId;
use crate::fill::deadline::Strategy;
use crate::ranges::ByteRange;

/// An order. It never changes: one that ends is replaced in the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Order {
    /// Its number: larger for later ones, and never given twice.
    pub id: u64,
    /// The image, as operators name it.
    pub image: String,
    /// What the image held when it was ordered. An order is for these bytes and no others.
    pub identity: Option<ImageId>,
    /// What is to be fetched: in order and apart from each other.
    pub ranges: Vec<ByteRange>,
    /// What that is, for people.
    pub what: What,
    /// Bytes per second at most.
    pub rate: Option<u64>,
    /// When it is to be done.
    pub deadline: Option<Deadline>,
    /// How it uses the time until then.
    pub strategy: Strategy,
    /// URIs of servers that are asked before the image's own upstream. What they send counts only where a manifest says
    /// that it is right.
    pub source: Vec<String>,
    /// When it was ordered.
    pub ordered_at: SystemTime,
    /// Whether it is still to be carried out.
    pub state: State,
    /// When it ended.
    pub ended_at: Option<SystemTime>,
}

/// What an operator orders: the fields of an [`Order`] that are theirs.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "they are those of `Order`")]
pub struct Spec {
    pub image: String,
    pub identity: Option<ImageId>,
    pub ranges: Vec<ByteRange>,
    pub what: What,
    pub rate: Option<u64>,
    pub deadline: Option<Deadline>,
    pub strategy: Strategy,
    pub source: Vec<String>,
}

impl Spec {
    /// All of an image of `size` bytes, without haste.
    pub fn all(image: &str, size: u64) -> Self {
        Self {
            image: image.to_owned(),
            identity: None,
            ranges: super::merged(&[ByteRange::between(0, size)]),
            what: What::All,
            rate: None,
            deadline: None,
            strategy: Strategy::default(),
            source: Vec::new(),
        }
    }
}

/// What an order is for, for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// The image.
    All,
    /// What earlier runs read; the name of the profile.
    Profile(String),
    /// Parts that were named.
    Ranges,
    /// What a session of multicast was to bring: all of it that has not come when that is over.
    Cast(SessionId),
}

/// Whether an order is still to be carried out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    /// It is.
    Active,
    /// All of it has come, and was here and durable at that moment.
    Done,
    /// It was called off.
    Cancelled,
    /// It cannot be carried out any more, and why.
    Failed(String),
}

/// When an order is to be done: at a time of day, or after a time that runs. The first goes with a clock that is set,
/// the second does not, except over a restart.
#[derive(Debug, Clone, Copy)]
pub struct Deadline {
    wall: SystemTime,
    /// For one that was given as a length of time.
    steady: Option<Instant>,
}

impl Deadline {
    /// At a time of day.
    pub const fn at(wall: SystemTime) -> Self {
        Self { wall, steady: None }
    }

    /// So long after `now`. `None`: nobody will see that day.
    pub fn after(time: Duration, now: Moment) -> Option<Self> {
        Some(Self { wall: now.wall.checked_add(time)?, steady: Some(now.steady.checked_add(time)?) })
    }

    /// As people name it.
    pub const fn wall(self) -> SystemTime {
        self.wall
    }

    /// How much time is left; none if it has passed.
    pub fn left(self, now: Moment) -> Duration {
        match self.steady {
            Some(steady) => steady.saturating_duration_since(now.steady),
            None => self.wall.duration_since(now.wall).unwrap_or_default(),
        }
    }
}

impl PartialEq for Deadline {
    /// Whether both name the same time of day, to the millisecond: what a file holds of them.
    fn eq(&self, other: &Self) -> bool {
        super::form::milliseconds(self.wall) == super::form::milliseconds(other.wall)
    }
}

impl Eq for Deadline {}

impl Order {
    pub(super) fn new(id: u64, spec: Spec, now: SystemTime) -> Self {
        let Spec { image, identity, ranges, what, rate, deadline, strategy, source } = spec;
        Self {
            id,
            image,
            identity,
            ranges,
            what,
            rate,
            deadline,
            strategy,
            source,
            ordered_at: now,
            state: State::Active,
            ended_at: None,
        }
    }

    /// Bytes of its ranges.
    pub fn total_bytes(&self) -> u64 {
        self.ranges.iter().map(|range| range.length()).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_is_set_moves_times_of_day_only() {
        let now = crate::clock::moment();
        let later = |steady, wall: i64| {
            let wall_now = now.wall + Duration::from_secs(1_000_000);
            let wall = match u64::try_from(wall) {
                Ok(ahead) => wall_now + Duration::from_secs(ahead),
                Err(_) => wall_now - Duration::from_secs(wall.unsigned_abs()),
            };
            Moment { steady: now.steady + Duration::from_secs(steady), wall }
        };
        let at = Deadline::at(now.wall + Duration::from_secs(1_000_060));
        let after = Deadline::after(Duration::from_secs(60), later(0, 0)).unwrap();
        for (moment, left_at, left_after) in [
            (later(0, 0), 60, 60),
            (later(10, 10), 50, 50),
            (later(10, 3600), 0, 50),
            (later(10, -3600), 3660, 50),
            (later(70, 10), 50, 0),
        ] {
            assert_eq!((at.left(moment).as_secs(), after.left(moment).as_secs()), (left_at, left_after));
        }
        assert!(Deadline::after(Duration::MAX, now).is_none());
    }
}
