//! When and how often each segment of an image was used.
//!
//! One word a segment: the time of its last use in the upper 40 bits, its uses in the lower 24.
//!
//! The form on disk, little-endian, 16 + 5 bytes for each segment:
//!
//! | bytes | meaning |
//! | --- | --- |
//! | 0..8 | `HEADHEAT` |
//! | 8..12 | version, 1 |
//! | 12..12 + 4 n | for each segment: time since its last use, at most 2^32 - 2; 2^32 - 1 if never |
//! | .. + n | for each segment: its uses, at most 255 |
//! | .. + 4 | CRC-32C of what comes before |
//!
//! It is a hint: one that is lost, damaged or of another image costs some misses. So whatever is not right is no heat.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::mirror::chunks::checksum;
use crate::units::to_usize;

/// Uses within so many units of logical time may be one reader on its way through the segment.
///
/// A segment of 16 chunks that is read in order is used 16 times, and each segment that others are admitted for
/// meanwhile moves the time. Were each of these a use, a segment that is read once in its life would look like one that
/// is read again and again: the difference that LFU and S3-FIFO live by. So uses are counted once for each span of this
/// many units; a burst that is shorter crosses one border between spans at most.
pub const BURST: u64 = 16;

const COUNT_BITS: u32 = 24;
const COUNT_MAX: u64 = (1 << COUNT_BITS) - 1;
const TIME_MAX: u64 = (1 << (64 - COUNT_BITS)) - 1;

const MAGIC: &[u8; 8] = b"HEADHEAT";
const VERSION: u32 = 1;
const HEADER: usize = 12;
const SUM: usize = 4;
const NEVER: u32 = u32::MAX;

/// Logical time: it moves by one with each segment that gets its first chunk or is refused one, and once a second.
///
/// So it moves as fast as the order of eviction does. Between two of its steps nothing was let in and nothing went, so
/// which of two uses came first decides nothing; and a hit of a segment that was used in this step writes nothing.
/// The seconds are there for a cache that has all it needs: its hits must leave a trace too, though nothing is admitted.
#[derive(Debug)]
pub struct Clock(AtomicU64);

impl Default for Clock {
    /// Begins at 2^32, so that whatever age a [`Heat`] of an earlier run has lies behind it. 40 bits of time last
    /// 34 years at a thousand steps a second.
    fn default() -> Self {
        Self(AtomicU64::new(1 << 32))
    }
}

impl Clock {
    /// The time.
    pub fn now(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Moves the time by one step, and says what it is then. To be called once a second; [`Order`](super::Order) makes
    /// the steps of admission.
    pub fn advance(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed) + 1
    }
}

/// What is known of the use of one segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Word(u64);

impl Word {
    /// Of a segment used last at `time`, `count` times. What is too large for its bits is the largest there is.
    pub fn new(time: u64, count: u64) -> Self {
        Self(time.min(TIME_MAX) << COUNT_BITS | count.min(COUNT_MAX))
    }

    /// The logical time of the last use; 0 if never.
    pub const fn time(self) -> u64 {
        self.0 >> COUNT_BITS
    }

    /// Uses more than a [`BURST`] apart, at most 2^24 - 1.
    pub const fn count(self) -> u64 {
        self.0 & COUNT_MAX
    }

    /// Whether it cannot count any further.
    pub const fn is_full(self) -> bool {
        self.count() == COUNT_MAX
    }

    /// After a use at `now`.
    #[must_use]
    pub fn touched(self, now: u64) -> Self {
        let counts = self.count() == 0 || self.time() / BURST != now / BURST;
        Self::new(now, self.count() + u64::from(counts))
    }
}

/// The words of all segments of an image: 8 bytes a segment, 8 MiB for a TiB in segments of a MiB.
#[derive(Debug)]
pub struct Heat(Box<[AtomicU64]>);

impl Heat {
    /// None of `segments` segments was ever used.
    pub fn new(segments: u32) -> Self {
        Self((0..segments).map(|_| AtomicU64::new(0)).collect())
    }

    /// Notes a use of segment `number`, which the image must have. In the common case, a use at this time was noted
    /// already, this only reads. Of two threads that note at once one may be lost: this is heat, not accounting.
    pub fn touch(&self, number: u32, now: u64) {
        let slot = self.slot(number);
        let word = Word(slot.load(Ordering::Relaxed));
        if word.time() < now {
            slot.store(word.touched(now).0, Ordering::Relaxed);
        }
    }

    /// The word of segment `number`.
    pub fn word(&self, number: u32) -> Word {
        Word(self.slot(number).load(Ordering::Relaxed))
    }

    /// Segment `number` was evicted: what it was in its life here says nothing of its next one.
    pub fn forget(&self, number: u32) {
        self.slot(number).store(0, Ordering::Relaxed);
    }

    fn slot(&self, number: u32) -> &AtomicU64 {
        &self.0[to_usize(number.into())]
    }

    /// To be kept over a restart.
    pub fn encode(&self, now: u64) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEADER + 5 * self.0.len() + SUM);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        let words: Vec<_> = self.0.iter().map(|slot| Word(slot.load(Ordering::Relaxed))).collect();
        for word in &words {
            let age = u32::try_from(now.saturating_sub(word.time())).unwrap_or(NEVER).min(NEVER - 1);
            bytes.extend(if word.count() == 0 { NEVER } else { age }.to_le_bytes());
        }
        bytes.extend(words.iter().map(|word| u8::try_from(word.count()).unwrap_or(u8::MAX)));
        let sum = checksum(&bytes);
        bytes.extend(sum.to_le_bytes());
        bytes
    }

    /// What `encode` made for an image of `segments` segments, as it is at `now`. `None`: it is something else.
    pub fn decode(bytes: &[u8], segments: u32, now: u64) -> Option<Self> {
        let (body, sum) = bytes.split_last_chunk::<SUM>()?;
        let (header, entries) = body.split_at_checked(HEADER)?;
        let count = to_usize(segments.into());
        if header[..8] != *MAGIC || header[8..] != VERSION.to_le_bytes() || entries.len() != 5 * count {
            return None;
        }
        if u32::from_le_bytes(*sum) != checksum(body) {
            return None;
        }
        let (ages, counts) = entries.split_at(4 * count);
        let (ages, _) = ages.as_chunks::<4>();
        let word = |(age, count): (&[u8; 4], &u8)| match u32::from_le_bytes(*age) {
            NEVER => Word::default(),
            // A time of 0 would say that it was never used.
            age => Word::new(now.saturating_sub(age.into()).max(1), u64::from(*count).max(1)),
        };
        Some(Self(ages.iter().zip(counts).map(|pair| AtomicU64::new(word(pair).0)).collect()))
    }
}

/// For the fuzzer: whatever the bytes are, and whatever stands in a form whose checksum is right.
#[doc(hidden)]
pub fn fuzz(data: &[u8]) {
    let now = Clock::default().now();
    let whole = |bytes: &[u8], segments| {
        if let Some(heat) = Heat::decode(bytes, segments, now) {
            let again = Heat::decode(&heat.encode(now), segments, now).expect("it was just encoded");
            assert!((0..segments).all(|number| heat.word(number) == again.word(number)), "words change on their way");
        }
    };
    let segments = |length: usize| u32::try_from(length / 5).unwrap_or(u32::MAX);
    whole(data, segments(data.len().saturating_sub(HEADER + SUM)));
    let mut made = [MAGIC, &VERSION.to_le_bytes()[..], data].concat();
    let sum = checksum(&made);
    made.extend(sum.to_le_bytes());
    whole(&made, segments(data.len()));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn one_burst_is_one_use_and_a_steady_reader_is_many() {
        let heat = Heat::new(1);
        let start = Clock::default().now();
        assert_eq!(start % BURST, 0);
        for now in start..start + BURST {
            heat.touch(0, now);
            heat.touch(0, now);
        }
        assert_eq!(heat.word(0), Word::new(start + BURST - 1, 1));
        for now in start + BURST..start + 10 * BURST {
            heat.touch(0, now);
        }
        assert_eq!(heat.word(0), Word::new(start + 10 * BURST - 1, 10));
    }

    #[test]
    fn a_use_that_comes_late_does_not_turn_time_back() {
        let heat = Heat::new(2);
        heat.touch(1, 1000);
        heat.touch(1, 900);
        assert_eq!((heat.word(0), heat.word(1)), (Word::default(), Word::new(1000, 1)));
        heat.forget(1);
        assert_eq!(heat.word(1), Word::default());
    }

    #[test]
    fn counts_and_times_end_at_their_largest() {
        let last = Word::new(u64::MAX, u64::MAX);
        assert_eq!((last.time(), last.count()), (TIME_MAX, COUNT_MAX));
        assert_eq!(Word::new(5, u64::MAX).touched(5 + BURST), Word::new(5 + BURST, COUNT_MAX));
    }

    #[test]
    fn what_is_not_ours_is_no_heat() {
        let bytes = Heat::new(3).encode(9);
        assert!(Heat::decode(&bytes, 3, 9).is_some());
        assert!(Heat::decode(&bytes, 4, 9).is_none());
        for length in 0..bytes.len() {
            assert!(Heat::decode(&bytes[..length], 3, 9).is_none());
        }
        for bit in 0..8 * bytes.len() {
            let mut flipped = bytes.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(Heat::decode(&flipped, 3, 9).is_none(), "bit {bit}");
        }
    }

    proptest! {
        #[test]
        fn order_and_frequency_survive_a_restart(
            uses in prop::collection::vec((1u64..5_000_000_000, 0u64..1000), 0..50), later in 0u64..1 << 33,
        ) {
            let count = u32::try_from(uses.len()).unwrap();
            let heat = Heat::new(count);
            for (slot, (time, count)) in heat.0.iter().zip(&uses) {
                let word = if *count == 0 { Word::default() } else { Word::new(*time, *count) };
                slot.store(word.0, Ordering::Relaxed);
            }
            let (before, now) = (6_000_000_000, 6_000_000_000 + later);
            let back = Heat::decode(&heat.encode(before), count, now).unwrap();
            for number in 0..count {
                let (old, new) = (heat.word(number), back.word(number));
                prop_assert_eq!(new.count(), old.count().min(255));
                if old.count() > 0 {
                    prop_assert_eq!(now - new.time(), (before - old.time()).min(u64::from(NEVER) - 1));
                }
            }
        }

        #[test]
        fn any_bytes_are_handled(data in prop::collection::vec(any::<u8>(), 0..200)) {
            fuzz(&data);
        }
    }
}
