//! Whether it pays to store everything that is fetched: a duel of two small models of the cache.
//!
//! When more is read in turn than fits, LRU evicts each segment just before it is wanted again: all of the work of a
//! cache and none of the hits. The remedy is to let in only one segment of some dozens (bimodal insertion: Qureshi,
//! Jaleel, Patt, Steely, Emer: Adaptive insertion policies for high performance caching, ISCA 2007). What is here then
//! stays long enough to be hit, and what is refused costs what it would without a cache. But where popularity moves, a
//! cache that learns so slowly is worse.
//!
//! Which of the two is better now is measured as in that paper (DIP), by a duel: both ways are followed for a sample
//! of the segments, and the score of the better one decides for all. There the sample are some sets of the hardware
//! cache. We have no sets, and segments that were always let in would live off the room of those that are not. So each
//! way has a model of its own: names only, with the real policy, in proportion to the cache (Waldspurger, Saemundsson,
//! Ahmad, Park: Cache modeling and optimization using miniature simulations, USENIX ATC 2017).
//!
//! The number to decide by "evicted segments were not used again" was not taken: under bimodal insertion what is
//! evicted was useful, for that is what it achieves, and the mode would end itself. And it says nothing about the
//! case between: a cache of a quarter under a uniform choice, where storing everything gets as many hits as storing
//! next to nothing, and pays for three useless stores with each hit. The score has the price of a store in it.
//!
//! Uses are learnt from misses, all of which are seen, and from the words of those segments of the sample that are
//! here, at which we look once in a while. So a hit tells nobody anything.
//!
//! Limits: a working set that changes by less than the sample shows; uses of one segment less than a burst apart are
//! one; all of the sample counts as equally large.

use std::collections::HashMap;

use super::{BURST, Kind, Policy, Segment, Space, Word, WordOf};
use crate::units::to_u64;

/// Segments of the sample that are here: from this number on every second one is enough. The models, and what is known
/// of the sample, take less than 100 KiB.
const SAMPLE: usize = 512;
/// One segment of so many is let in where few are. More (16) cost hits of a cyclic scan and learnt no faster: see
/// `tools/cachesim`.
const ONE_IN: u64 = 32;
/// What a hit is worth, if to store a segment costs 1: it is fetched from another server and not from the disk, and
/// to store it means to write it, to make it durable, to mark it, and to punch it out in the end. Over a link of
/// 1 Gbit/s a hit is worth some 20 stores if only the processor counts, and 2 if all of the disk's time does, of one that
/// takes 244 MB/s: `docs/caching.md`. Nobody waits for the disk, but it is not free.
const HIT: i64 = 8;
/// Looks at the words of the sample while as many are asked for as the cache has.
const LOOKS: usize = 32;

/// How long ago a segment was wanted that is wanted again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Distance {
    /// So lately that the refusal is still remembered, if it was refused.
    Short,
    /// Longer ago, or never.
    Long,
}

#[derive(Debug)]
pub(super) struct Duel {
    /// The bits of a segment's hash that are 0 if it is in the sample.
    mask: u64,
    /// The segments of the sample that are really here, and the time of the last use that was told to the models.
    here: HashMap<Segment, u64>,
    /// Lets in all.
    always: Model,
    /// Lets in few.
    seldom: Model,
    /// In stores: > 0, letting in few was better. It ends at what a hit of each segment in the model is worth, and the
    /// way is changed at half of that on the other side: chance alone seldom gets so far.
    score: i64,
    thrashing: bool,
    /// How often it was drawn, so that each draw differs.
    draws: u64,
    asked: usize,
}

impl Duel {
    pub(super) fn new(kind: Kind) -> Self {
        Self {
            mask: 0,
            here: HashMap::new(),
            always: Model::new(kind),
            seldom: Model::new(kind),
            score: 0,
            thrashing: false,
            draws: 0,
            asked: 0,
        }
    }

    pub(super) const fn is_thrashing(&self) -> bool {
        self.thrashing
    }

    /// Whether a segment that has to displace another is let in.
    pub(super) fn admits(&mut self, segment: Segment) -> bool {
        !self.thrashing || self.draw(segment)
    }

    fn draw(&mut self, segment: Segment) -> bool {
        self.draws += 1;
        segment.hash(self.draws).is_multiple_of(ONE_IN)
    }

    fn samples(&self, segment: Segment) -> bool {
        // Not the bits that a draw looks at.
        segment.hash(0) >> 32 & self.mask == 0
    }

    /// A segment has come to the cache.
    pub(super) fn came(&mut self, segment: Segment, now: u64) {
        if self.samples(segment) {
            self.here.insert(segment, now);
            if self.here.len() > SAMPLE {
                self.mask = self.mask << 1 | 1;
                let mask = self.mask;
                let sampled = |segment: &Segment| segment.hash(0) >> 32 & mask == 0;
                self.here.retain(|segment, _| sampled(segment));
                self.always.retain(&sampled);
                self.seldom.retain(&sampled);
            }
        }
    }

    /// A segment is gone from the cache.
    pub(super) fn went(&mut self, segment: Segment) {
        self.here.remove(&segment);
    }

    /// Looks, once in a while, which segments of the sample were used since.
    pub(super) fn poll(&mut self, resident: usize, word_of: WordOf<'_>) {
        self.asked += 1;
        if self.asked * LOOKS < resident {
            return;
        }
        self.asked = 0;
        // In a very small cache even what comes soon after is another use.
        let burst = BURST.min(to_u64(resident) / 8);
        let remembered = to_u64(resident) / 8;
        let mut used = Vec::new();
        for (segment, told) in &mut self.here {
            let time = word_of(*segment).time();
            if time > *told + burst {
                used.push((time, *segment, if time - *told <= remembered { Distance::Short } else { Distance::Long }));
                *told = time;
            }
        }
        used.sort_unstable_by_key(|(time, segment, _)| (*time, *segment));
        for (_, segment, distance) in used {
            self.used(segment, distance, resident, Space::Taken);
        }
    }

    /// A segment that is not here was wanted.
    pub(super) fn missed(&mut self, segment: Segment, distance: Distance, resident: usize, space: Space) {
        if self.samples(segment) {
            self.used(segment, distance, resident, space);
        }
    }

    fn used(&mut self, segment: Segment, distance: Distance, resident: usize, space: Space) {
        let share = (resident >> self.mask.count_ones()).max(1);
        // While the cache grows so do the models.
        let capacity = if space == Space::Free { usize::MAX } else { share };
        let admit = distance == Distance::Short || self.seldom.len() < capacity || self.draw(segment);
        self.score += self.seldom.worth(segment, capacity, admit) - self.always.worth(segment, capacity, true);
        let cacheful = i64::try_from(share).unwrap_or(i64::MAX).saturating_mul(HIT);
        self.score = self.score.clamp(-cacheful, cacheful);
        // What lies between leaves it as it is.
        if self.score > cacheful / 2 {
            self.thrashing = true;
        } else if self.score < -cacheful / 2 {
            self.thrashing = false;
        }
    }
}

/// A cache of names.
#[derive(Debug)]
struct Model {
    policy: Box<dyn Policy>,
    words: HashMap<Segment, Word>,
    /// Moves with each use.
    now: u64,
}

impl Model {
    fn new(kind: Kind) -> Self {
        Self { policy: kind.policy(), words: HashMap::new(), now: 0 }
    }

    fn len(&self) -> usize {
        self.words.len()
    }

    /// What a use is worth to this cache.
    fn worth(&mut self, segment: Segment, capacity: usize, admit: bool) -> i64 {
        self.now += 1;
        if let Some(word) = self.words.get_mut(&segment) {
            *word = Word::new(self.now, word.count() + 1);
            return HIT;
        }
        if !admit {
            return 0;
        }
        while self.words.len() >= capacity {
            let words = &self.words;
            let Some(victim) = self.policy.victim(&|segment| words.get(&segment).copied().unwrap_or_default()) else {
                break;
            };
            self.words.remove(&victim);
            self.policy.evicted(victim);
        }
        let word = Word::new(self.now, 1);
        self.words.insert(segment, word);
        self.policy.insert(segment, word);
        -1
    }

    fn retain(&mut self, keep: &dyn Fn(&Segment) -> bool) {
        let mut gone: Vec<_> = self.words.keys().copied().filter(|segment| !keep(segment)).collect();
        gone.sort_unstable();
        for segment in gone {
            self.words.remove(&segment);
            self.policy.remove(segment);
        }
    }
}
