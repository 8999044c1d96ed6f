//! A profile: what is learnt from runs, and what it wishes to have fetched.
//!
//! A page that was read in a run moves half of the way to weight 1, one that was not half of the way to 0, and is
//! forgotten below 1/8: an exponential moving average with the factor 1/2. So a page that was read in both of the last
//! two runs weighs 3/4 at least, and one that was in neither weighs 1/4 at most; what an image reads after a change is
//! learnt in two runs. Measurements of others (sets of clones overlap by 93 %) say that little more memory is needed.
//!
//! Owns: the arithmetic. Does not own: what a run is, nor how profiles are kept.

use std::collections::HashMap;
use std::fmt;

use super::recording::Run;
use super::spans::{Span, Spans};
use super::{MOST_PAGES, MOST_SPANS, PAGE};
use crate::ranges::ByteRange;
use crate::units::{KIB, MIB, to_u64};

/// Runs with fewer bytes than this are looks at the image: partition table, superblock, a magic number.
const LEAST_RUN: u64 = 64 * KIB;
/// So are runs with less than this part of what the profile is rather sure of.
const LEAST_SHARE: u64 = 10;
/// Wishes whose first touch lies in one slot of so many milliseconds are near in time.
const NEAR_MS: u32 = 1000;
/// Neighbours are joined up to this: one request of a mirror.
const LONGEST_WISH: u64 = MIB / PAGE;

/// How likely a page is to be read in the next run: the byte `w` stands for (w + 1) / 256, so that halves and quarters of
/// 1 are exact.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Weight(pub u8);

impl Weight {
    /// 1: read in the only run.
    pub const WHOLE: Self = Self(255);
    /// 3/4: read in each of the last two runs.
    pub const THREE_QUARTERS: Self = Self(191);
    /// 1/2: read in the last run, or nearly always before.
    pub const HALF: Self = Self(127);
    /// 1/8: what is less is forgotten.
    pub const EIGHTH: Self = Self(31);

    /// After a run in which the page was read.
    const fn read(self) -> Self {
        Self(self.0 / 2 + 128)
    }

    /// After one in which it was not.
    fn missed(self) -> Option<Self> {
        // From (w + 1) / 256 to half of it, rounded down.
        let half = Self((self.0.saturating_sub(1)) / 2);
        (half >= Self::EIGHTH).then_some(half)
    }
}

impl fmt::Display for Weight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        (f32::from(self.0).mul_add(1.0 / 256.0, 1.0 / 256.0)).fmt(f)
    }
}

/// What is known of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Known {
    pub(super) weight: Weight,
    /// Milliseconds from the connection of the client to its first touch, weighted over runs.
    pub(super) first_ms: u32,
}

/// What runs of one workload on one image have in common. At most [`MOST_PAGES`] pages in [`MOST_SPANS`] spans: some
/// 1.5 MiB.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Profile {
    pub(super) runs: u32,
    pub(super) spans: Spans<Known>,
}

/// What came of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Merged {
    /// The profile has learnt from it.
    Learnt,
    /// It was a look at the image, and no run of the workload; nothing has changed.
    Inspection,
}

/// A profile in figures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Tally {
    /// Runs that it was learnt from.
    pub runs: u32,
    /// Runs of neighbouring pages that have one weight and one time.
    pub spans: u64,
    /// Bytes with a weight of 3/4 and more.
    pub sure_bytes: u64,
    /// Bytes from 1/2 to 3/4.
    pub likely_bytes: u64,
    /// Bytes under 1/2: not fetched.
    pub unlikely_bytes: u64,
    /// The last first touch of what is fetched, in milliseconds.
    pub last_ms: u32,
}

impl Profile {
    /// That of one run.
    pub fn of_run(run: &Run) -> Self {
        let mut profile = Self::default();
        profile.learn(run, MOST_SPANS);
        profile
    }

    /// Learns from a run.
    pub fn merge(&mut self, run: &Run) -> Merged {
        self.merge_within(run, MOST_SPANS)
    }

    /// As [`Self::merge`], but with so many spans at most.
    pub(super) fn merge_within(&mut self, run: &Run, most_spans: usize) -> Merged {
        let likely = self.bytes_from(Weight::HALF);
        if run.bytes() < LEAST_RUN || run.bytes() < likely / LEAST_SHARE {
            return Merged::Inspection;
        }
        self.learn(run, most_spans);
        Merged::Learnt
    }

    fn learn(&mut self, run: &Run, most_spans: usize) {
        let merged = if self.runs == 0 {
            let first = |touch: &Span<u32>| {
                let value = Known { weight: Weight::WHOLE, first_ms: touch.value };
                Span { start: touch.start, end: touch.end, value }
            };
            run.touches().iter().map(first).collect()
        } else {
            self.spans.combine(run.touches(), average)
        };
        self.spans = merged.bounded(MOST_PAGES, most_spans.min(MOST_SPANS), |known| known.first_ms);
        self.runs = self.runs.saturating_add(1);
    }

    /// How many runs it was learnt from.
    pub const fn runs(&self) -> u32 {
        self.runs
    }

    /// Whether there is nothing in it.
    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// What is likely to be read as a run that somebody else can learn from.
    pub fn to_run(&self) -> Run {
        let likely = self.spans.iter().filter(|span| span.value.weight >= Weight::HALF);
        Run::of(likely.map(|span| Span { start: span.start, end: span.end, value: span.value.first_ms }).collect())
    }

    fn bytes_from(&self, least: Weight) -> u64 {
        self.spans.iter().filter(|span| span.value.weight >= least).map(|span| span.pages() * PAGE).sum()
    }

    /// The figures.
    pub fn tally(&self) -> Tally {
        let (sure, half) = (self.bytes_from(Weight::THREE_QUARTERS), self.bytes_from(Weight::HALF));
        let likely = self.spans.iter().filter(|span| span.value.weight >= Weight::HALF);
        Tally {
            runs: self.runs,
            spans: to_u64(self.spans.len()),
            sure_bytes: sure,
            likely_bytes: half - sure,
            unlikely_bytes: self.bytes_from(Weight(0)) - half,
            last_ms: likely.map(|span| span.value.first_ms).max().unwrap_or(0),
        }
    }

    /// What to fetch of an image of `image_size` bytes, in this order, each byte once: pages with a weight of at least
    /// 1/2, by first touch.
    ///
    /// Time decides, because a page that comes late is of no use however sure it was. But clones differ by some hundred
    /// milliseconds in when they read what, so within a second the order of touch says little, and what is sure (3/4 and
    /// more) goes before what is not: on a link that is full, a doubtful page costs a sure one its place. Only what is as
    /// near and as sure is joined, up to a mebibyte; so joining never brings anything forward by more than a second.
    pub fn wishes(&self, image_size: u64) -> Vec<ByteRange> {
        let mut likely: Vec<_> = self.spans.iter().filter(|span| span.value.weight >= Weight::HALF).copied().collect();
        likely.sort_by_key(|span| (urgency(span.value), span.value.first_ms, span.start));
        let mut wishes: Vec<Span<Urgency>> = Vec::new();
        let mut ends = HashMap::new();
        for span in likely {
            let urgency = urgency(span.value);
            let before = ends.get(&span.start).copied().filter(|index: &usize| {
                let wish = &wishes[*index];
                wish.value == urgency && wish.pages() + span.pages() <= LONGEST_WISH
            });
            let index = before.unwrap_or(wishes.len());
            match before {
                Some(index) => {
                    ends.remove(&span.start);
                    wishes[index].end = span.end;
                }
                None => wishes.push(Span { start: span.start, end: span.end, value: urgency }),
            }
            ends.insert(span.end, index);
        }
        let bytes = |wish: Span<Urgency>| {
            let byte = |page: u64| page.saturating_mul(PAGE).min(image_size);
            ByteRange::between(byte(wish.start), byte(wish.end))
        };
        wishes.into_iter().map(bytes).filter(|range| !range.is_empty()).collect()
    }
}

/// Less goes first: the slot of the first touch, and whether it is unsure.
type Urgency = (u32, bool);

fn urgency(known: Known) -> Urgency {
    (known.first_ms / NEAR_MS, known.weight < Weight::THREE_QUARTERS)
}

/// What is known of a page after a run. A new one begins at 1/2: from nothing, half of the way to 1.
fn average(before: Option<Known>, touched: Option<u32>) -> Option<Known> {
    match (before, touched) {
        (None, None) => None,
        (None, Some(first_ms)) => Some(Known { weight: Weight::HALF, first_ms }),
        (Some(before), None) => Some(Known { weight: before.weight.missed()?, ..before }),
        (Some(before), Some(now)) => {
            // The same average as of the weight: the runs before count as much as they weigh, this one counts 1.
            let weight = u64::from(before.weight.0) + 1;
            let mean = (u64::from(before.first_ms) * weight + u64::from(now) * 256) / (weight + 256);
            // The mean of two numbers of 32 bits has no more.
            let first_ms = u32::try_from(mean).unwrap_or(u32::MAX);
            Some(Known { weight: before.weight.read(), first_ms })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::spans::tests::{Naive, naive, of_naive};
    use super::*;
    use proptest::prelude::*;

    /// So many pages make a run.
    const ENOUGH: u64 = LEAST_RUN / PAGE;

    fn run(pages: &Naive<u32>) -> Run {
        Run::of(of_naive(pages))
    }

    fn touches() -> impl Strategy<Value = Naive<u32>> {
        prop::collection::btree_map(0u64..80, 0u32..5000, 0..70)
    }

    /// The rules, page by page and in fractions.
    fn merge_naively(profile: &Naive<(f64, f64)>, is_first: bool, run: &Naive<u32>) -> Naive<(f64, f64)> {
        let mut after = Naive::new();
        for page in 0..80 {
            let known = match (profile.get(&page), run.get(&page)) {
                (None, None) => continue,
                (None, Some(first)) => (if is_first { 1.0 } else { 0.5 }, f64::from(*first)),
                (Some((weight, first)), None) => (weight / 2.0, *first),
                (Some((weight, first)), Some(now)) => {
                    (weight / 2.0 + 0.5, (first * weight + f64::from(*now)) / (weight + 1.0))
                }
            };
            if known.0 >= 0.125 {
                after.insert(page, known);
            }
        }
        after
    }

    proptest! {
        #[test]
        fn runs_merge_as_the_rules_say(runs in prop::collection::vec(touches(), 1..6)) {
            let (mut profile, mut oracle, mut count) = (Profile::default(), Naive::new(), 0);
            for touched in runs {
                let likely = oracle.values().filter(|(weight, _)| *weight >= 0.5).count() as u64;
                let pages = touched.len() as u64;
                let is_inspection = pages < ENOUGH || pages * PAGE < likely * PAGE / LEAST_SHARE;
                let merged = profile.merge(&run(&touched));
                prop_assert_eq!(merged == Merged::Inspection, is_inspection);
                if !is_inspection {
                    oracle = merge_naively(&oracle, count == 0, &touched);
                    count += 1;
                }
                prop_assert_eq!(profile.runs(), count);
                let known = naive(&profile.spans);
                prop_assert_eq!(known.keys().collect::<Vec<_>>(), oracle.keys().collect::<Vec<_>>());
                for (page, (weight, first)) in &oracle {
                    let Known { weight: found, first_ms } = known[page];
                    // So few runs lose nothing to rounding, but milliseconds are whole.
                    prop_assert_eq!(f64::from(found.0) + 1.0, weight * 256.0);
                    prop_assert!((f64::from(first_ms) - first).abs() <= 6.0, "{first_ms} {first}");
                }
            }
        }

        #[test]
        fn wishes_are_what_is_likely_in_order_of_urgency(
            pages in prop::collection::btree_map(0u64..2000, (31u8..=255, 0u32..4000), 0..200),
            shift in 0u64..3, short in 0u64..PAGE,
        ) {
            // Runs of pages, some of them longer than a wish may be.
            let known = |(weight, first_ms): (u8, u32)| Known { weight: Weight(weight), first_ms: first_ms / 500 * 500 };
            let pages: Naive<Known> = pages.into_iter()
                .flat_map(|(page, value)| (0..1 + shift * 10).map(move |more| (page + more, known(value)))).collect();
            let profile = Profile { runs: 1, spans: of_naive(&pages) };
            let size = pages.last_key_value().map_or(0, |(last, _)| (last + 1) * PAGE - short);
            let mut seen = Naive::new();
            let mut last = (0, false);
            for wish in profile.wishes(size) {
                prop_assert!(!wish.is_empty() && wish.end() <= size && wish.start() % PAGE == 0);
                prop_assert!(wish.end() % PAGE == 0 || wish.end() == size);
                let of_wish: Vec<_> = (wish.start() / PAGE..wish.end().div_ceil(PAGE)).collect();
                let urgencies: Vec<_> = of_wish.iter().map(|page| urgency(pages[page])).collect();
                prop_assert!(urgencies.iter().all(|urgency| *urgency == urgencies[0]), "one wish, one urgency");
                prop_assert!(last <= urgencies[0], "in order");
                last = urgencies[0];
                of_wish.into_iter().for_each(|page| *seen.entry(page).or_insert(0) += 1);
            }
            let wanted: Naive<i32> =
                pages.iter().filter(|(_, known)| known.weight >= Weight::HALF).map(|(page, _)| (*page, 1)).collect();
            prop_assert_eq!(seen, wanted, "each likely page once, and no other");
        }
    }

    #[test]
    fn neighbours_are_fetched_together_up_to_a_mebibyte() {
        let touched: Naive<u32> = (0..600).map(|page| (page, u32::try_from(page).unwrap())).collect();
        let profile = Profile::of_run(&run(&touched));
        let wishes: Vec<_> = profile.wishes(1 << 30).iter().map(|wish| (wish.start(), wish.length())).collect();
        assert_eq!(wishes, [(0, MIB), (MIB, MIB), (2 * MIB, 88 * PAGE)]);
    }

    #[test]
    fn a_page_of_every_run_stays_whole_and_one_that_is_read_no_more_goes() {
        let mut profile = Profile::default();
        let both: Naive<u32> = (0..40).map(|page| (page, 10)).collect();
        let half: Naive<u32> = (0..20).map(|page| (page, 10)).collect();
        assert_eq!(profile.merge(&run(&both)), Merged::Learnt);
        for left in [20, 20, 20, 0] {
            let weights = naive(&profile.spans);
            assert_eq!(weights[&0].weight, Weight::WHOLE);
            assert_eq!(profile.merge(&run(&half)), Merged::Learnt);
            assert_eq!(profile.spans.pages(), 20 + left, "1/2, 1/4 and 1/8 are kept");
        }
        assert_eq!(
            profile.tally(),
            Tally { runs: 5, spans: 1, sure_bytes: 20 * PAGE, last_ms: 10, ..Tally::default() }
        );
    }

    #[test]
    fn a_look_at_the_image_teaches_nothing() {
        let mut profile = Profile::default();
        let of = |count: u64| run(&(0..count).map(|page| (page, 0)).collect());
        assert_eq!(profile.merge(&of(ENOUGH - 1)), Merged::Inspection);
        assert!(profile.is_empty());
        assert_eq!(profile.merge(&of(1000)), Merged::Learnt);
        let before = profile.clone();
        assert_eq!(profile.merge(&of(99)), Merged::Inspection);
        assert_eq!(profile, before);
        assert_eq!(profile.merge(&of(100)), Merged::Learnt);
    }

    #[test]
    fn what_is_touched_last_finds_no_room() {
        let touches = (0..MOST_SPANS as u64 + 10).map(|index| Span {
            start: index * 2,
            end: index * 2 + 1,
            value: u32::try_from(index).unwrap(),
        });
        let mut profile = Profile::default();
        profile.merge(&Run::of(touches.collect()));
        assert_eq!(profile.spans.len(), MOST_SPANS);
        assert_eq!(profile.tally().last_ms, u32::try_from(MOST_SPANS).unwrap() - 1);
    }
}
