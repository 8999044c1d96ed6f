//! S3-FIFO (Yang, Zhang, Qiu, Yue, Vinayak: FIFO queues are all you need for cache eviction, SOSP 2023).
//!
//! | queue | holds | leaves at its old end |
//! | --- | --- | --- |
//! | small | a tenth: what is new | used twice or more since it came: to main, else evicted and remembered as a ghost |
//! | main | the rest | used since it was last looked at: to the new end with one use less, else evicted |
//! | ghosts | names of as many as are in main, as hashes of 32 bits | forgotten. Who comes back as a ghost goes to main |
//!
//! The paper counts uses up to 3 in the entry. Here hits count in the word, so an entry keeps the count that it has
//! seen, and takes the difference when it comes up. 12 bytes a segment and about 24 bytes a ghost.

use std::collections::{HashMap, HashSet, VecDeque};

use super::left_over::LeftOver;
use super::{Policy, Segment, Word, WordOf};

/// One in so many segments is in the small queue.
const SMALL_SHARE: usize = 10;
/// Uses beyond these are not counted.
const MOST_USES: u8 = 3;
/// With fewer uses a segment does not go from the small queue to main.
const USES_OF_MAIN: u8 = 2;

/// S3-FIFO over segments.
#[derive(Debug, Default)]
pub struct S3Fifo {
    small: VecDeque<Entry>,
    main: VecDeque<Entry>,
    ghosts: Ghosts,
    /// Victims of main of which it is not known yet whether they can go. These do not become ghosts.
    leaving_main: HashSet<Segment>,
    left_over: LeftOver,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    segment: Segment,
    /// The count of its word when it was last looked at, in 24 bits, and the uses it has been credited with in 8.
    seen_and_uses: u32,
}

impl Entry {
    /// The use that brings a segment here does not count for it, whether it is in the word by now or not.
    fn new(segment: Segment, word: Word, uses: u8) -> Self {
        Self { segment, seen_and_uses: 0 }.with(word.count().max(1), uses)
    }

    fn with(self, seen: u64, uses: u8) -> Self {
        let seen = u32::try_from(seen).expect("a word counts with 24 bits");
        Self { segment: self.segment, seen_and_uses: seen << 8 | u32::from(uses) }
    }

    /// As it is now, with the uses since it was last looked at.
    fn looked_at(self, word: Word) -> (Self, u8) {
        let [credited, ..] = self.seen_and_uses.to_le_bytes();
        // A count that does not grow any more stands for a segment in steady use.
        let more = if word.is_full() { MOST_USES.into() } else { word.count().saturating_sub(self.seen()) };
        let uses = u8::try_from(u64::from(credited).saturating_add(more)).unwrap_or(MOST_USES).min(MOST_USES);
        (self.with(word.count().max(1), uses), uses)
    }

    fn seen(self) -> u64 {
        u64::from(self.seen_and_uses >> 8)
    }
}

impl S3Fifo {
    fn without_left_over(&mut self, entries: VecDeque<Entry>) -> VecDeque<Entry> {
        entries.into_iter().filter(|entry| !self.left_over.take(entry.segment)).collect()
    }
}

impl Policy for S3Fifo {
    fn insert(&mut self, segment: Segment, word: Word) {
        let entry = Entry::new(segment, word, 0);
        if self.ghosts.take(segment) {
            self.main.push_back(entry);
        } else {
            self.small.push_back(entry);
        }
    }

    /// What was used twice or more had come to main, or was on its way.
    fn restore(&mut self, segment: Segment, word: Word) {
        let uses = u8::try_from(word.count()).unwrap_or(u8::MAX);
        if uses >= USES_OF_MAIN {
            self.main.push_back(Entry::new(segment, word, (uses - 1).min(MOST_USES)));
        } else {
            self.small.push_back(Entry::new(segment, word, 0));
        }
    }

    fn victim(&mut self, word_of: WordOf<'_>) -> Option<Segment> {
        // Each entry can go to main once and come round as often as it has uses, unless it is used while we look.
        let mut patience = (self.small.len() + self.main.len()) * (usize::from(MOST_USES) + 2);
        loop {
            let from_small = self.small.len() * SMALL_SHARE >= self.small.len() + self.main.len();
            let oldest = if from_small { self.small.pop_front() } else { self.main.pop_front() };
            let entry = oldest?;
            if self.left_over.take(entry.segment) {
                continue;
            }
            let word = word_of(entry.segment);
            let (entry, uses) = entry.looked_at(word);
            match (from_small, uses) {
                (true, USES_OF_MAIN..) if patience > 0 => self.main.push_back(Entry::new(entry.segment, word, 0)),
                (false, 1..) if patience > 0 => self.main.push_back(entry.with(entry.seen(), uses - 1)),
                (true, _) => return Some(entry.segment),
                (false, _) => {
                    self.leaving_main.insert(entry.segment);
                    return Some(entry.segment);
                }
            }
            patience -= 1;
        }
    }

    fn put_back(&mut self, segment: Segment, word: Word, _now: u64) {
        self.leaving_main.remove(&segment);
        self.main.push_back(Entry::new(segment, word, 0));
    }

    fn evicted(&mut self, segment: Segment) {
        if self.leaving_main.remove(&segment) {
            return;
        }
        self.ghosts.push(segment, self.len() - self.len() / SMALL_SHARE);
    }

    fn remove(&mut self, segment: Segment) {
        self.left_over.add(segment);
        if self.left_over.are_many(self.small.len() + self.main.len()) {
            let (small, main) = (std::mem::take(&mut self.small), std::mem::take(&mut self.main));
            self.small = self.without_left_over(small);
            self.main = self.without_left_over(main);
        }
    }

    fn len(&self) -> usize {
        self.small.len() + self.main.len() - self.left_over.count()
    }
}

/// Names of evicted segments, the last ones only. Two that share a hash of 32 bits are one: that costs a place in main.
#[derive(Debug, Default)]
struct Ghosts {
    /// Oldest first. One that was taken keeps its place until it is the oldest.
    order: VecDeque<u32>,
    /// The number that each has in the order, counted from the first there ever was.
    numbers: HashMap<u32, u64>,
    /// The number of the oldest.
    first: u64,
}

impl Ghosts {
    #[expect(clippy::cast_possible_truncation, reason = "the lower half of a hash is one too")]
    fn fingerprint(segment: Segment) -> u32 {
        segment.hash(0) as u32
    }

    fn push(&mut self, segment: Segment, capacity: usize) {
        let fingerprint = Self::fingerprint(segment);
        self.numbers.insert(fingerprint, self.first + crate::units::to_u64(self.order.len()));
        self.order.push_back(fingerprint);
        while self.order.len() > capacity {
            let Some(oldest) = self.order.pop_front() else { break };
            if self.numbers.get(&oldest) == Some(&self.first) {
                self.numbers.remove(&oldest);
            }
            self.first += 1;
        }
    }

    fn take(&mut self, segment: Segment) -> bool {
        self.numbers.remove(&Self::fingerprint(segment)).is_some()
    }
}
