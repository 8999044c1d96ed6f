//! The policies against plain ones that do the same in the most obvious way, and admission against its promises.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use proptest::prelude::*;

use super::*;

fn segment(number: u32) -> Segment {
    Segment { image: 1, number }
}

#[test]
fn a_policy_is_read_as_it_is_written() {
    for kind in Kind::ALL {
        assert_eq!(kind.to_string().parse(), Ok(kind));
    }
    assert!("LRU".parse::<Kind>().is_err());
}

#[test]
fn neighbours_have_hashes_that_differ_in_about_half_of_their_bits() {
    let hash = |number| segment(number).hash(0);
    let differing: u32 = (0..1000).map(|number| (hash(number) ^ hash(number + 1)).count_ones()).sum();
    assert!((30_000..34_000).contains(&differing), "{differing}");
}

/// What is done to a policy. Numbers choose among the segments that this can be done to.
#[derive(Debug, Clone, Copy)]
enum Step {
    /// One that is not in the order comes, and is used.
    Come(u32),
    Use(usize),
    Pass(u64),
    /// A victim is found and goes.
    Evict,
    /// A victim is found and stays.
    Keep,
    Remove(usize),
}

fn steps(most: usize) -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0u32..40).prop_map(Step::Come),
        8 => any::<usize>().prop_map(Step::Use),
        4 => (1u64..40).prop_map(Step::Pass),
        3 => Just(Step::Evict),
        1 => Just(Step::Keep),
        1 => any::<usize>().prop_map(Step::Remove),
    ];
    prop::collection::vec(step, 0..most)
}

/// A policy as its definition has it.
trait Plain {
    fn come(&mut self, segment: Segment, word: Word);
    /// The word has changed from one to the other.
    fn used(&mut self, segment: Segment, from: Word, to: Word);
    fn victim(&mut self) -> Option<Segment>;
    fn evicted(&mut self, _segment: Segment, _left: usize) {}
    fn keep(&mut self, segment: Segment, word: Word, now: u64);
    fn remove(&mut self, segment: Segment);
}

/// All segments with the time of their last use.
#[derive(Default)]
struct PlainLru(Vec<(u64, Segment)>);

impl Plain for PlainLru {
    fn come(&mut self, segment: Segment, word: Word) {
        self.0.push((word.time(), segment));
    }
    fn used(&mut self, segment: Segment, _from: Word, to: Word) {
        self.0.iter_mut().filter(|entry| entry.1 == segment).for_each(|entry| entry.0 = to.time());
    }
    fn victim(&mut self) -> Option<Segment> {
        let least = *self.0.iter().min()?;
        self.remove(least.1);
        Some(least.1)
    }
    fn keep(&mut self, segment: Segment, _word: Word, now: u64) {
        self.0.push((now, segment));
    }
    fn remove(&mut self, segment: Segment) {
        self.0.retain(|entry| entry.1 != segment);
    }
}

/// Uses, and the age when the segment was found to have more of them than before; with the word that it has now.
#[derive(Clone, Copy)]
struct Frequent {
    segment: Segment,
    priority: u64,
    time: u64,
    age: u64,
    word: Word,
}

#[derive(Default)]
struct PlainLfu {
    entries: Vec<Frequent>,
    age: u64,
}

impl PlainLfu {
    fn push(&mut self, segment: Segment, word: Word, time: u64) {
        let priority = word.count() + self.age;
        self.entries.push(Frequent { segment, priority, time, age: self.age, word });
    }
}

impl Plain for PlainLfu {
    fn come(&mut self, segment: Segment, word: Word) {
        self.push(segment, word, word.time());
    }
    fn used(&mut self, segment: Segment, _from: Word, to: Word) {
        self.entries.iter_mut().filter(|entry| entry.segment == segment).for_each(|entry| entry.word = to);
    }
    fn victim(&mut self) -> Option<Segment> {
        loop {
            let key = |entry: &Frequent| (entry.priority, entry.time, entry.segment);
            let least = self.entries.iter_mut().min_by_key(|entry| key(entry))?;
            let before = key(least);
            if least.word.count() + least.age > least.priority {
                least.age = self.age;
            }
            let after = (least.word.count() + least.age, least.word.time(), least.segment);
            if after <= before {
                self.age = self.age.max(before.0);
                self.remove(before.2);
                return Some(before.2);
            }
            (least.priority, least.time) = (after.0, after.1);
        }
    }
    fn keep(&mut self, segment: Segment, word: Word, now: u64) {
        self.push(segment, word, now);
    }
    fn remove(&mut self, segment: Segment) {
        self.entries.retain(|entry| entry.segment != segment);
    }
}

/// Algorithm 1 of the paper. A hit counts at once, up to 3.
#[derive(Default)]
struct PlainS3Fifo {
    small: VecDeque<(Segment, u8)>,
    main: VecDeque<(Segment, u8)>,
    /// A place stays taken when its ghost has come back.
    ghosts: VecDeque<Option<Segment>>,
    from_main: bool,
}

impl Plain for PlainS3Fifo {
    fn come(&mut self, segment: Segment, _word: Word) {
        if let Some(ghost) = self.ghosts.iter_mut().find(|ghost| **ghost == Some(segment)) {
            *ghost = None;
            self.main.push_back((segment, 0));
        } else {
            self.small.push_back((segment, 0));
        }
    }
    fn used(&mut self, segment: Segment, from: Word, to: Word) {
        if to.count() > from.count() {
            let entries = self.small.iter_mut().chain(&mut self.main);
            entries.filter(|entry| entry.0 == segment).for_each(|entry| entry.1 = (entry.1 + 1).min(3));
        }
    }
    fn victim(&mut self) -> Option<Segment> {
        loop {
            let size = self.small.len() + self.main.len();
            if 10 * self.small.len() >= size {
                let (segment, frequency) = self.small.pop_front()?;
                if frequency > 1 {
                    self.main.push_back((segment, 0));
                } else {
                    self.from_main = false;
                    return Some(segment);
                }
            } else {
                let (segment, frequency) = self.main.pop_front()?;
                if frequency > 0 {
                    self.main.push_back((segment, frequency - 1));
                } else {
                    self.from_main = true;
                    return Some(segment);
                }
            }
        }
    }
    fn evicted(&mut self, segment: Segment, left: usize) {
        if !self.from_main {
            self.ghosts.push_back(Some(segment));
            while self.ghosts.len() > left - left / 10 {
                self.ghosts.pop_front();
            }
        }
    }
    fn keep(&mut self, segment: Segment, _word: Word, _now: u64) {
        self.main.push_back((segment, 0));
    }
    fn remove(&mut self, segment: Segment) {
        self.small.retain(|entry| entry.0 != segment);
        self.main.retain(|entry| entry.0 != segment);
    }
}

/// Takes both through the same steps. Whatever comes up must come up in both.
fn agree(mut policy: impl Policy, mut plain: impl Plain, steps: &[Step]) -> Result<(), TestCaseError> {
    let mut words: BTreeMap<Segment, Word> = BTreeMap::new();
    let mut here: BTreeSet<Segment> = BTreeSet::new();
    let mut now = 1;
    for step in steps.iter().copied().chain([Step::Evict; 41]) {
        let chosen = |index: usize| here.iter().nth(index % here.len().max(1)).copied();
        match step {
            Step::Come(number) => {
                let new = segment(number);
                if here.insert(new) {
                    let word = words.entry(new).or_default();
                    *word = word.touched(now);
                    policy.insert(new, *word);
                    plain.come(new, *word);
                }
            }
            Step::Use(index) => {
                if let Some(segment) = chosen(index) {
                    let word = words.entry(segment).or_default();
                    let from = std::mem::replace(word, word.touched(now));
                    plain.used(segment, from, *word);
                }
            }
            Step::Pass(time) => now += time,
            Step::Evict | Step::Keep => {
                let victim = policy.victim(&|segment| words[&segment]);
                prop_assert_eq!(victim, plain.victim());
                let Some(victim) = victim else { continue };
                if matches!(step, Step::Keep) {
                    policy.put_back(victim, words[&victim], now);
                    plain.keep(victim, words[&victim], now);
                } else {
                    here.remove(&victim);
                    policy.evicted(victim);
                    plain.evicted(victim, here.len());
                }
            }
            Step::Remove(index) => {
                if let Some(segment) = chosen(index) {
                    here.remove(&segment);
                    policy.remove(segment);
                    plain.remove(segment);
                }
            }
        }
        prop_assert_eq!(policy.len(), here.len());
    }
    prop_assert!(here.is_empty());
    Ok(())
}

proptest! {
    #[test]
    fn lru_is_exact(steps in steps(300)) {
        agree(Lru::default(), PlainLru::default(), &steps)?;
    }

    #[test]
    fn lfu_is_what_its_definition_says(steps in steps(300)) {
        agree(Lfu::default(), PlainLfu::default(), &steps)?;
    }

    #[test]
    fn s3_fifo_is_the_paper_s(steps in steps(300)) {
        // A removed entry keeps its place in a queue for a while, which the paper does not know.
        let steps: Vec<_> = steps.into_iter().filter(|step| !matches!(step, Step::Remove(_))).collect();
        agree(S3Fifo::default(), PlainS3Fifo::default(), &steps)?;
    }

    #[test]
    fn no_segment_is_lost_or_doubled(steps in steps(600), kind in prop::sample::select(&Kind::ALL[..])) {
        let clock = Arc::new(Clock::default());
        let mut order = Order::new(kind, Admission::Measured, Arc::clone(&clock));
        let heat = Heat::new(40);
        let word_of = |segment: Segment| heat.word(segment.number);
        let mut here: BTreeSet<Segment> = BTreeSet::new();
        for step in steps {
            let chosen = |index: usize| here.iter().nth(index % here.len().max(1)).copied();
            match step {
                Step::Come(number) => {
                    if here.insert(segment(number)) {
                        order.admitted(segment(number), word_of(segment(number)));
                        heat.touch(number, clock.now());
                    }
                }
                Step::Use(index) => {
                    if let Some(segment) = chosen(index) {
                        heat.touch(segment.number, clock.now());
                    }
                }
                Step::Pass(time) => (0..time).for_each(|_| _ = clock.advance()),
                Step::Evict => {
                    if let Some(victim) = order.victim(&word_of) {
                        prop_assert!(here.remove(&victim));
                        order.evicted(victim);
                        heat.forget(victim.number);
                    }
                }
                Step::Keep => {
                    if let Some(victim) = order.victim(&word_of) {
                        prop_assert!(here.contains(&victim));
                        order.put_back(victim);
                    }
                }
                Step::Remove(index) => {
                    if let Some(segment) = chosen(index) {
                        here.remove(&segment);
                        order.remove(segment);
                    }
                }
            }
            prop_assert_eq!(order.len(), here.len());
        }
        clock.advance();
        while let Some(victim) = order.victim(&word_of) {
            prop_assert!(here.remove(&victim));
            order.evicted(victim);
        }
        prop_assert!(here.is_empty() && order.is_empty());
    }
}

#[test]
fn what_is_put_back_is_not_found_again_until_time_moves() {
    for kind in Kind::ALL {
        let clock = Arc::new(Clock::default());
        let mut order = Order::new(kind, Admission::Always, Arc::clone(&clock));
        let heat = Heat::new(100);
        let word_of = |segment: Segment| heat.word(segment.number);
        for number in 0..100 {
            order.admitted(segment(number), Word::default());
            heat.touch(number, clock.now());
        }
        for _ in 0..3 {
            let mut seen = BTreeSet::new();
            while let Some(victim) = order.victim(&word_of) {
                assert!(seen.insert(victim), "{kind}: {victim:?} comes up twice");
                order.put_back(victim);
            }
            assert_eq!((seen.len(), order.len()), (100, 100), "{kind}");
            clock.advance();
        }
        // One that is put back is out of the way of the others.
        let kept = order.victim(&word_of).unwrap();
        order.put_back(kept);
        order.remove(kept);
        assert_eq!(order.len(), 99);
    }
}

#[test]
fn restored_segments_go_in_the_order_they_had() {
    for kind in Kind::ALL {
        let mut order = Order::new(kind, Admission::Always, Arc::default());
        let words: Vec<_> =
            (0u32..20).map(|number| Word::new(100 + u64::from(number), u64::from(number / 5) + 1)).collect();
        let word_of = |segment: Segment| words[usize::try_from(segment.number).unwrap()];
        (0..20).for_each(|number| order.restore(segment(number), word_of(segment(number))));
        let goes: Vec<_> = std::iter::from_fn(|| order.victim(&word_of)).map(|victim| victim.number).collect();
        if kind == Kind::S3Fifo {
            // A tenth of the cache is for what is new, so one of those used once stays a little longer.
            assert!(goes.len() == 20 && goes[11..].iter().copied().eq(11..20), "{goes:?}");
        } else {
            assert_eq!(goes, (0..20).collect::<Vec<_>>(), "{kind}");
        }
    }
}

/// A cache of `capacity` whole segments, and what it was asked for.
struct Cache {
    order: Order,
    clock: Arc<Clock>,
    heat: Vec<Heat>,
    here: BTreeSet<Segment>,
    capacity: usize,
    uses: u32,
    hits: u32,
}

const IMAGES: u32 = 8;
const IMAGE: u32 = 128;

impl Cache {
    fn new(kind: Kind, admission: Admission, capacity: usize) -> Self {
        let clock = Arc::new(Clock::default());
        let heat = (0..IMAGES).map(|_| Heat::new(IMAGE)).collect();
        let order = Order::new(kind, admission, Arc::clone(&clock));
        Self { order, clock, heat, here: BTreeSet::new(), capacity, uses: 0, hits: 0 }
    }

    fn read(&mut self, segment: Segment) {
        let heat = |segment: Segment| &self.heat[usize::try_from(segment.image).unwrap()];
        let word_of = |segment: Segment| heat(segment).word(segment.number);
        self.uses += 1;
        if self.here.contains(&segment) {
            self.hits += 1;
            heat(segment).touch(segment.number, self.clock.now());
            return;
        }
        let space = if self.here.len() < self.capacity { Space::Free } else { Space::Taken };
        // The chunks of a segment come one after another. All get the same answer.
        let answers: BTreeSet<_> =
            (0..4).map(|chunk| self.order.should_admit(segment, chunk, space, &word_of)).collect();
        assert_eq!(answers.len(), 1);
        if answers.contains(&true) {
            if space == Space::Taken {
                let victim = self.order.victim(&word_of).unwrap();
                self.order.evicted(victim);
                heat(victim).forget(victim.number);
                assert!(self.here.remove(&victim));
            }
            self.order.admitted(segment, word_of(segment));
            heat(segment).touch(segment.number, self.clock.now());
            self.here.insert(segment);
        }
    }

    /// Deploys machines from these images. Gives back hits in thousandths of uses.
    fn deploy(&mut self, images: impl IntoIterator<Item = u32>) -> u32 {
        (self.uses, self.hits) = (0, 0);
        for image in images {
            (0..IMAGE).for_each(|number| self.read(Segment { image, number }));
            self.clock.advance();
        }
        self.hits * 1000 / self.uses
    }
}

fn deployments(seed: u64, count: u32, choose: impl Fn(u32) -> u32) -> Vec<u32> {
    let random = |number| u32::try_from(segment(number).hash(seed) % 1_000_000).unwrap();
    (0..count).map(|number| choose(random(number))).collect()
}

fn uniform(random: u32) -> u32 {
    random % IMAGES
}

/// Two images make four fifths.
fn skewed(random: u32) -> u32 {
    if random % 10 < 8 { random / 10 % 2 } else { 2 + random / 10 % (IMAGES - 2) }
}

/// A quarter of all images.
const QUARTER: usize = 256;

#[test]
fn of_a_cyclic_scan_what_fits_is_hit() {
    for kind in Kind::ALL {
        let cycles = |count: u32| (0..count * IMAGES).map(|number| number % IMAGES);
        let mut always = Cache::new(kind, Admission::Always, QUARTER);
        assert_eq!(always.deploy(cycles(12)), 0, "{kind}");
        let mut measured = Cache::new(kind, Admission::Measured, QUARTER);
        let all = measured.deploy(cycles(12));
        assert!(all >= 170, "{kind}: {all}");
        assert!(measured.order.counters().thrashing);
        let later = measured.deploy(cycles(12));
        assert!(later >= 210, "{kind}: {later}");
    }
}

#[test]
fn measured_admission_does_no_harm_where_images_are_chosen_at_random() {
    for (name, choose) in [("uniform", uniform as fn(u32) -> u32), ("skewed", skewed)] {
        for kind in Kind::ALL {
            for capacity in [QUARTER, 2 * QUARTER] {
                let run = |admission| {
                    let ratio = |seed| Cache::new(kind, admission, capacity).deploy(deployments(seed, 257, choose));
                    (0..5).map(ratio).sum::<u32>() / 5
                };
                let (always, measured) = (run(Admission::Always), run(Admission::Measured));
                assert!(measured + 25 >= always, "{name} {kind} {capacity}: {measured} against {always}");
            }
        }
    }
}

#[test]
fn a_hot_set_survives_a_scan() {
    // Every second deployment is of an image that fits, the others take turns and do not fit.
    let images = |count: u32| (0..count).map(|number| if number % 2 == 0 { 0 } else { 1 + number / 2 % (IMAGES - 1) });
    for kind in Kind::ALL {
        let always = Cache::new(kind, Admission::Always, QUARTER).deploy(images(200));
        let measured = Cache::new(kind, Admission::Measured, QUARTER).deploy(images(200));
        assert!(measured >= 480 && measured + 10 >= always, "{kind}: {measured} against {always}");
    }
}

#[test]
fn thrashing_ends_when_what_is_read_fits() {
    for kind in Kind::ALL {
        let mut cache = Cache::new(kind, Admission::Measured, QUARTER);
        cache.deploy((0..12 * IMAGES).map(|number| number % IMAGES));
        assert!(cache.order.counters().thrashing, "{kind}");
        // One after another, each image is the only one for a while: who learns slowly misses most.
        let fits = cache.deploy((0..IMAGES * 24).map(|number| number / 24));
        assert!(fits >= 600, "{kind}: {fits}");
        assert!(!cache.order.counters().thrashing, "{kind}");
    }
}

#[test]
fn what_fits_is_let_in_and_stays() {
    for kind in Kind::ALL {
        let mut cache = Cache::new(kind, Admission::Measured, 4 * QUARTER);
        cache.deploy(deployments(7, 100, uniform));
        let counters = cache.order.counters();
        let all = Counters { admitted: u64::from(IMAGES * IMAGE), ..Counters::default() };
        assert_eq!(counters, all, "{kind}");
    }
}

#[test]
fn a_refused_chunk_that_is_wanted_again_is_let_in() {
    let mut cache = Cache::new(Kind::Lru, Admission::Measured, QUARTER);
    cache.deploy((0..12 * IMAGES).map(|number| number % IMAGES));
    assert!(cache.order.counters().thrashing);
    let word_of = |_| Word::default();
    let refused = (0..200).find(|number| {
        let segment = Segment { image: 100, number: *number };
        !cache.order.should_admit(segment, 5, Space::Taken, &word_of)
    });
    let refused = Segment { image: 100, number: refused.unwrap() };
    for chunk in (0..256).filter(|chunk| *chunk != 5) {
        assert!(!cache.order.should_admit(refused, chunk, Space::Taken, &word_of), "{chunk}");
    }
    assert!(cache.order.should_admit(refused, 200, Space::Taken, &word_of));
    assert_eq!(cache.order.counters().regretted, 1);
    // From then on all of it.
    assert!(cache.order.should_admit(refused, 7, Space::Taken, &word_of));
}
