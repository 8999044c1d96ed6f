//! LRU and LFU: each segment has a rank, and the least goes first.
//!
//! A hit changes a word and not the order. So the order is a heap with ranks that may be too low, as ranks only grow:
//! what comes up as the least is looked at again, and goes back if it was used meanwhile. What comes up twice with the
//! same rank is the least for certain. Each segment goes back once at most unless it is used during the search itself.
//!
//! A segment that is removed stays in the heap until it comes up or until such are half of it.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fmt::Debug;

use super::left_over::LeftOver;
use super::{Policy, Segment, Word, WordOf};

/// How segments are ranked.
trait Rank: Debug + Default + Send {
    /// What is kept for each segment besides its rank.
    type Note: Debug + Copy + Ord + Default + Send;

    /// Of a segment that is new or was noticed before, with the note of then.
    fn rank(&self, word: Word, noted: Option<(u64, Self::Note)>) -> (u64, Self::Note);

    /// A segment of this rank is the least there is.
    fn least(&mut self, _rank: u64) {}
}

/// An entry of the heap. The segment decides between equals, so that the order is the same in each run.
type Entry<N> = Reverse<(u64, Segment, N)>;

#[derive(Debug, Default)]
struct Ranked<R: Rank> {
    ranks: R,
    heap: BinaryHeap<Entry<R::Note>>,
    left_over: LeftOver,
}

impl<R: Rank> Ranked<R> {
    fn push(&mut self, segment: Segment, word: Word) {
        let (rank, note) = self.ranks.rank(word, None);
        self.heap.push(Reverse((rank, segment, note)));
    }
}

impl<R: Rank> Policy for Ranked<R> {
    fn insert(&mut self, segment: Segment, word: Word) {
        self.push(segment, word);
    }

    fn victim(&mut self, word_of: WordOf<'_>) -> Option<Segment> {
        // Only as many may go back as there are: whoever uses them while we look cannot keep us here.
        let mut patience = self.heap.len();
        loop {
            let Reverse((rank, segment, note)) = self.heap.pop()?;
            if self.left_over.take(segment) {
                continue;
            }
            let (now, note) = self.ranks.rank(word_of(segment), Some((rank, note)));
            if now <= rank || patience == 0 {
                self.ranks.least(rank);
                return Some(segment);
            }
            patience -= 1;
            self.heap.push(Reverse((now, segment, note)));
        }
    }

    fn put_back(&mut self, segment: Segment, word: Word, now: u64) {
        self.push(segment, Word::new(now, word.count()));
    }

    fn remove(&mut self, segment: Segment) {
        self.left_over.add(segment);
        if self.left_over.are_many(self.heap.len()) {
            // From the least on, as they would have come up.
            let sorted = std::mem::take(&mut self.heap).into_sorted_vec();
            for entry in sorted.into_iter().rev() {
                let Reverse((_, segment, _)) = entry;
                if !self.left_over.take(segment) {
                    self.heap.push(entry);
                }
            }
        }
    }

    fn len(&self) -> usize {
        self.heap.len() - self.left_over.count()
    }
}

/// The rank is the time of the last use.
#[derive(Debug, Default)]
struct Recency;

impl Rank for Recency {
    type Note = ();

    fn rank(&self, word: Word, _noted: Option<(u64, ())>) -> (u64, ()) {
        (word.time(), ())
    }
}

/// The rank is uses plus age in its upper bits, and the time of the last use below.
///
/// The age is the rank of what was evicted last: LFU-DA (Arlitt, Friedrich, Jin: Performance evaluation of web proxy
/// cache replacement policies, 2000). Without it what was popular once would stay for ever. There a hit sets the age
/// of its segment; here that is done when the segment comes up next.
#[derive(Debug, Default)]
struct Frequency {
    age: u32,
}

const TIME_BITS: u32 = 40;
const PRIORITY_MAX: u64 = (1 << (64 - TIME_BITS)) - 1;

impl Rank for Frequency {
    /// The age at which the segment was last seen with more uses than before.
    type Note = u32;

    fn rank(&self, word: Word, noted: Option<(u64, u32)>) -> (u64, u32) {
        // A new segment is about to be used, if it was not yet.
        let count = word.count().max(1);
        let age = match noted {
            Some((rank, age)) if count + u64::from(age) <= rank >> TIME_BITS => age,
            _ => self.age,
        };
        // Ranks that have reached the largest are in the order of LRU.
        let priority = (count + u64::from(age)).min(PRIORITY_MAX);
        (priority << TIME_BITS | word.time(), age)
    }

    fn least(&mut self, rank: u64) {
        self.age = self.age.max(u32::try_from(rank >> TIME_BITS).unwrap_or(u32::MAX));
    }
}

/// Least recently used, exactly. 16 bytes a segment.
#[derive(Debug, Default)]
pub struct Lru(Ranked<Recency>);

/// Least frequently used, with ageing. 24 bytes a segment.
#[derive(Debug, Default)]
pub struct Lfu(Ranked<Frequency>);

macro_rules! policy_of_its_field {
    ($policy:ident) => {
        impl Policy for $policy {
            fn insert(&mut self, segment: Segment, word: Word) {
                self.0.insert(segment, word);
            }
            fn victim(&mut self, word_of: WordOf<'_>) -> Option<Segment> {
                self.0.victim(word_of)
            }
            fn put_back(&mut self, segment: Segment, word: Word, now: u64) {
                self.0.put_back(segment, word, now);
            }
            fn remove(&mut self, segment: Segment) {
                self.0.remove(segment);
            }
            fn len(&self) -> usize {
                self.0.len()
            }
        }
    };
}

policy_of_its_field!(Lru);
policy_of_its_field!(Lfu);
