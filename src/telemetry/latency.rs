//! How long things took: counts by length of time, which any thread may add to without a lock.
//!
//! Owns: recording, and what is computed from it. Does not own: what is measured.
//!
//! Lengths of time fall into the classes of an HDR histogram: 64 ns wide up to 2 us, then sixteen to each power of two, up
//! to 137 s; what took longer counts as that. [`Latencies`] are such a histogram whose counts are atomic, and
//! [`Spread`] is a copy that the crate `hdrhistogram` computes with. The crate's own recorders were not taken because
//! whoever reads them waits until each has recorded once more; `docs/decisions` has more.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hdrhistogram::Histogram;

use super::{SHARDS, shard};
use crate::units::{to_u64, to_usize};

/// The shortest time that is told from none, in nanoseconds, as a power of two.
const UNIT: u32 = 6;
/// Classes that are `1 << UNIT` wide, as a power of two.
const LINEAR: u32 = 5;
/// The longest time that is told from longer ones, in nanoseconds, as a power of two.
const END: u32 = 37;
/// Classes in each power of two beyond those.
const EACH: u32 = 1 << (LINEAR - 1);
/// All classes.
const CLASSES: usize = ((END - UNIT - LINEAR + 2) * EACH) as usize;
/// Decimal digits that `hdrhistogram` has to tell apart for as many classes.
const DIGITS: u8 = 1;

/// The class of a time in nanoseconds: where an HDR histogram of this size counts it.
fn class(nanoseconds: u64) -> usize {
    let value = nanoseconds.min((1 << END) - 1);
    // The power of two, counted from the first in which classes are wider.
    let doublings = (u64::BITS - UNIT - LINEAR).saturating_sub((value | 1).leading_zeros());
    let position = value >> (doublings + UNIT);
    to_usize(u64::from(doublings * EACH) + position)
}

/// The middle of a class, in nanoseconds: no more than 3.2 % away from anything in it, if that took 1 us or longer.
fn middle(class: usize) -> u64 {
    let class = to_u64(class);
    let doublings = (class / u64::from(EACH)).saturating_sub(1);
    let position = class - doublings * u64::from(EACH);
    let width = UNIT + u32::try_from(doublings).expect("there are few powers of two");
    (position << width) + (1 << (width - 1))
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// How long things took, so far. Any thread may add; nobody waits. Up to sixteen times 3.6 KiB of memory: one for each thread
/// that has recorded something.
#[derive(Default)]
pub struct Latencies([OnceLock<Box<Shard>>; SHARDS]);

/// What the threads of one shard have recorded.
struct Shard {
    /// In nanoseconds; after 584 years it begins again.
    sum: AtomicU64,
    counts: [AtomicU64; CLASSES],
}

impl Shard {
    fn new() -> Box<Self> {
        Box::new(Self { sum: AtomicU64::new(0), counts: [const { AtomicU64::new(0) }; CLASSES] })
    }
}

impl Latencies {
    /// Notes that `count` things took so long each.
    pub fn record(&self, took: Duration, count: u64) {
        let nanoseconds = nanoseconds(took);
        let shard = self.0[shard()].get_or_init(Shard::new);
        shard.sum.fetch_add(nanoseconds.wrapping_mul(count), Ordering::Relaxed);
        shard.counts[class(nanoseconds)].fetch_add(count, Ordering::Relaxed);
    }

    /// What was recorded so far. Of what is recorded meanwhile, some is in it.
    pub fn spread(&self) -> Spread {
        let mut spread = Spread::default();
        for shard in self.0.iter().filter_map(OnceLock::get) {
            spread.sum = spread.sum.wrapping_add(shard.sum.load(Ordering::Relaxed));
            for (class, count) in shard.counts.iter().enumerate() {
                let count = count.load(Ordering::Relaxed);
                if count > 0 {
                    *spread.counts.entry(class).or_default() += count;
                }
            }
        }
        spread
    }

    /// How many things were recorded so far.
    pub fn count(&self) -> u64 {
        let counts = self.0.iter().filter_map(OnceLock::get).flat_map(|shard| &shard.counts);
        counts.map(|count| count.load(Ordering::Relaxed)).sum()
    }
}

impl fmt::Debug for Latencies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.spread().fmt(f)
    }
}

/// How long some things took: a histogram as of a moment. Only what is not empty takes space.
///
/// What took less than a microsecond is known to within 32 ns, everything else to within 4 %.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Spread {
    /// In nanoseconds.
    sum: u64,
    /// By class; none is 0.
    counts: BTreeMap<usize, u64>,
}

impl Spread {
    /// Things.
    pub fn count(&self) -> u64 {
        self.counts.values().sum()
    }

    /// How long all of them took together.
    pub const fn sum(&self) -> Duration {
        Duration::from_nanos(self.sum)
    }

    /// How long one took in the middle; `None` if there was none.
    pub fn mean(&self) -> Option<Duration> {
        self.sum.checked_div(self.count()).map(Duration::from_nanos)
    }

    /// As long as this part of them took at most (0.99: the 99th percentile), to within 4 %; `None` if there was none.
    pub fn quantile(&self, part: f64) -> Option<Duration> {
        self.quantiles([part]).map(|[quantile]| quantile)
    }

    /// As [`Self::quantile`], several at once.
    pub fn quantiles<const COUNT: usize>(&self, parts: [f64; COUNT]) -> Option<[Duration; COUNT]> {
        if self.counts.is_empty() {
            return None;
        }
        let histogram = self.histogram();
        Some(parts.map(|part| {
            let value = histogram.value_at_quantile(part);
            Duration::from_nanos(histogram.median_equivalent(value))
        }))
    }

    /// The longest, to within 4 %; `None` if there was none.
    pub fn longest(&self) -> Option<Duration> {
        self.counts.last_key_value().map(|(class, _)| Duration::from_nanos(middle(*class)))
    }

    /// How many took at most so long, to within 4 %: what took a little more or less may be counted or not. Grows with
    /// `limit`, and what has been counted once is counted in each later [`Self`] too.
    pub fn within(&self, limit: Duration) -> u64 {
        let limit = nanoseconds(limit);
        self.counts.iter().take_while(|(class, _)| middle(**class) <= limit).map(|(_, count)| count).sum()
    }

    /// What has been recorded since `earlier`, which is an earlier one of the same.
    #[must_use]
    pub fn since(&self, earlier: &Self) -> Self {
        let new = self.counts.iter().map(|(class, count)| {
            let before = earlier.counts.get(class).copied().unwrap_or(0);
            (*class, count.saturating_sub(before))
        });
        // The sum may have been read a moment before the counts were, and be the smaller one.
        let sum = self.sum.saturating_sub(earlier.sum);
        Self { sum, counts: new.filter(|(_, count)| *count > 0).collect() }
    }

    /// Adds others.
    pub fn add(&mut self, other: &Self) {
        self.sum = self.sum.wrapping_add(other.sum);
        for (class, count) in &other.counts {
            *self.counts.entry(*class).or_default() += count;
        }
    }

    /// The same, to compute with: values are nanoseconds.
    fn histogram(&self) -> Histogram<u64> {
        let mut histogram = empty();
        for (class, count) in &self.counts {
            histogram.record_n(middle(*class), *count).expect("classes are those of this histogram");
        }
        histogram
    }
}

/// The histogram whose classes ours are.
fn empty() -> Histogram<u64> {
    Histogram::new_with_bounds(1 << UNIT, (1 << END) - 1, DIGITS).expect("the bounds are constants that it takes")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn times() -> impl Strategy<Value = u64> {
        // As many short ones as long ones.
        (0..=40_u32, any::<u64>()).prop_map(|(bits, value)| value & ((1 << bits) - 1))
    }

    /// Whether two times are the same as far as we tell them apart.
    fn is_near(one: u64, other: u64) -> bool {
        let (one, other) = (one.min((1 << END) - 1), other.min((1 << END) - 1));
        one.abs_diff(other) <= (one.max(other) / 25).max(32)
    }

    fn recorded(times: &[u64]) -> Spread {
        let latencies = Latencies::default();
        times.iter().for_each(|time| latencies.record(Duration::from_nanos(*time), 1));
        latencies.spread()
    }

    #[test]
    fn classes_are_those_of_the_crate() {
        let histogram = empty();
        assert_eq!(histogram.distinct_values(), CLASSES);
        assert_eq!((class(0), class(u64::MAX)), (0, CLASSES - 1));
        for class_ in 0..CLASSES {
            let middle = middle(class_);
            assert_eq!(class(middle), class_);
            assert_eq!(histogram.median_equivalent(middle), middle);
        }
    }

    #[test]
    fn nothing_has_no_quantiles() {
        let spread = Latencies::default().spread();
        assert_eq!((spread.count(), spread.sum(), spread.mean()), (0, Duration::ZERO, None));
        assert_eq!((spread.quantile(0.5), spread.longest(), spread.within(Duration::MAX)), (None, None, 0));
    }

    #[test]
    fn what_took_very_long_is_counted() {
        let spread = recorded(&[u64::MAX >> 8]);
        assert_eq!(spread.count(), 1);
        assert!(spread.longest().unwrap() > Duration::from_secs(130));
        assert_eq!(spread.within(Duration::from_secs(100)), 0);
    }

    #[test]
    fn no_thread_loses_a_count() {
        let latencies = Latencies::default();
        let threads = SHARDS as u64 + 3;
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| (0..1000).for_each(|_| latencies.record(Duration::from_micros(5), 2)));
            }
        });
        assert_eq!((latencies.count(), latencies.spread().count()), (2000 * threads, 2000 * threads));
        assert_eq!(latencies.spread().sum(), Duration::from_micros(5) * u32::try_from(2000 * threads).unwrap());
    }

    proptest! {
        #[test]
        fn a_time_is_in_the_class_where_the_crate_counts_it(time in times()) {
            let mut histogram = empty();
            let time = time.min((1 << END) - 1);
            histogram.record(time).unwrap();
            let found = histogram.iter_recorded().next().unwrap();
            prop_assert_eq!(histogram.median_equivalent(found.value_iterated_to()), middle(class(time)));
        }

        #[test]
        fn figures_are_those_of_a_sorted_list(mut times in prop::collection::vec(times(), 1..200), part in 0.0..=1.0_f64) {
            let spread = recorded(&times);
            times.sort_unstable();
            prop_assert_eq!(spread.count(), times.len() as u64);
            prop_assert_eq!(spread.sum(), times.iter().map(|time| Duration::from_nanos(*time)).sum::<Duration>());
            let mean = times.iter().sum::<u64>() / times.len() as u64;
            prop_assert_eq!(spread.mean(), Some(Duration::from_nanos(mean)));
            prop_assert!(is_near(nanoseconds(spread.longest().unwrap()), times[times.len() - 1]));
            #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a position in a short list")]
            let position = ((part * times.len() as f64).ceil() as usize).max(1) - 1;
            prop_assert!(is_near(nanoseconds(spread.quantile(part).unwrap()), times[position]));
        }

        #[test]
        fn how_many_are_within_a_limit_is_right_but_for_those_near_it(
            times in prop::collection::vec(times(), 0..200), limit in times(), longer in times()
        ) {
            let spread = recorded(&times);
            let within = spread.within(Duration::from_nanos(limit));
            let clear = |time: &&u64| !is_near(**time, limit);
            let below = times.iter().filter(clear).filter(|time| **time <= limit).count() as u64;
            let above = times.iter().filter(clear).filter(|time| **time > limit).count() as u64;
            prop_assert!(below <= within && within <= times.len() as u64 - above);
            prop_assert!(within <= spread.within(Duration::from_nanos(limit.saturating_add(longer))));
            prop_assert_eq!(spread.within(Duration::MAX), spread.count());
        }

        #[test]
        fn what_came_between_two_looks_is_their_difference(
            earlier in prop::collection::vec(times(), 0..100), later in prop::collection::vec(times(), 0..100)
        ) {
            let latencies = Latencies::default();
            let record = |time: &u64| latencies.record(Duration::from_nanos(*time), 3);
            earlier.iter().for_each(record);
            let first = latencies.spread();
            later.iter().for_each(record);
            let second = latencies.spread();
            let between = second.since(&first);
            let thrice: Vec<_> = later.iter().flat_map(|time| [*time; 3]).collect();
            prop_assert_eq!(&between, &recorded(&thrice));
            let mut sum = first.clone();
            sum.add(&between);
            prop_assert_eq!(sum, second);
            prop_assert_eq!(first.since(&first), Spread::default());
        }
    }
}
