//! Which segment of a full cache goes next, and whether a new one is worth the room.
//!
//! | file | holds |
//! | --- | --- |
//! | this one | [`Segment`], [`Kind`], the trait [`Policy`] |
//! | `heat` | when and how often each segment was used; its form on disk |
//! | `ranked` | LRU and LFU: the least rank goes first |
//! | `left_over` | entries of queues whose segments were removed |
//! | `s3fifo` | S3-FIFO: three queues |
//! | `order` | [`Order`]: what the evictor calls, a policy with admission and counters |
//! | `duel` | whether storing everything pays: two small models of the cache |
//!
//! A hit writes one word of [`Heat`] at most, and takes no lock. All else happens at a miss or at an eviction, under
//! the evictor's lock, from these words.
//!
//! Owns: the order of eviction and the decision to admit. Does not own: bytes, budgets, the map, pins. There is no I/O
//! here, no lock and no wall clock: the same calls give the same answers, so that a tool can simulate with this code.

mod duel;
mod heat;
mod left_over;
mod order;
mod ranked;
mod s3fifo;
#[cfg(test)]
mod tests;

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

pub use heat::{BURST, Clock, Heat, Word, fuzz};
pub use order::{Admission, Counters, Order, Space};
pub use ranked::{Lfu, Lru};
pub use s3fifo::S3Fifo;

/// The unit of eviction: some neighbouring chunks of one image.
///
/// A segment counts as one whether all of its chunks are here or only one is. So sizes below are numbers of segments.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Segment {
    /// Names the image among those of this server.
    pub image: u32,
    /// Counted from the start of the image.
    pub number: u32,
}

impl Segment {
    /// All bits of the name, mixed (the finalizer of SplitMix64, Steele et al., OOPSLA 2014).
    fn hash(self, seed: u64) -> u64 {
        let name = u64::from(self.image) << 32 | u64::from(self.number);
        let mut bits = (name ^ seed).wrapping_add(0x9e37_79b9_7f4a_7c15);
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }
}

/// Gives the word of a segment: see [`Heat::word`].
pub type WordOf<'a> = &'a dyn Fn(Segment) -> Word;

/// An order of eviction.
///
/// # Contract
///
/// Called by [`Order`], with segments that have a chunk here. The caller holds each segment in the order once: it does
/// not insert one that is in it, and removes or puts back only what is in it or was the last victim. A policy never
/// writes a word; what it has seen of a word it keeps itself.
pub trait Policy: fmt::Debug + Send {
    /// Takes in a segment that has just got its first chunk.
    fn insert(&mut self, segment: Segment, word: Word);

    /// Takes in a segment that was here before a restart. The caller begins with the one not used for longest.
    fn restore(&mut self, segment: Segment, word: Word) {
        self.insert(segment, word);
    }

    /// Takes the segment out of the order that should go next. `None`: there is none.
    fn victim(&mut self, word_of: WordOf<'_>) -> Option<Segment>;

    /// Takes a victim back that cannot go. It counts as used at `now`.
    fn put_back(&mut self, segment: Segment, word: Word, now: u64);

    /// A victim is really gone.
    fn evicted(&mut self, _segment: Segment) {}

    /// Takes out a segment of the order.
    fn remove(&mut self, segment: Segment);

    /// The number of segments in the order.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The policies there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Least recently used.
    Lru,
    /// Least frequently used, with ageing.
    Lfu,
    /// Three first-in-first-out queues, which what is read once leaves early.
    S3Fifo,
}

impl Kind {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Lru, Self::Lfu, Self::S3Fifo];

    const fn name(self) -> &'static str {
        match self {
            Self::Lru => "lru",
            Self::Lfu => "lfu",
            Self::S3Fifo => "s3fifo",
        }
    }

    /// A policy of this kind, without segments.
    pub fn policy(self) -> Box<dyn Policy> {
        match self {
            Self::Lru => Box::new(Lru::default()),
            Self::Lfu => Box::new(Lfu::default()),
            Self::S3Fifo => Box::new(S3Fifo::default()),
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A text names no policy.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("unknown policy {0:?}: it is lru, lfu or s3fifo")]
pub struct ParseKindError(String);

impl FromStr for Kind {
    type Err = ParseKindError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|kind| kind.name() == text).ok_or_else(|| ParseKindError(text.to_owned()))
    }
}
