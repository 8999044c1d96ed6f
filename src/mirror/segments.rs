//! Segments: the unit in which the space of a cache is given back. For each, how much of it is on the disk, how hot it
//! is, and whether somebody still sends from it.
//!
//! *Charged* chunks have bytes on the disk, or may have, whatever their state is: a chunk whose write could not be made
//! durable is absent and charged. Each chunk is charged once, and what it costs is given back when it has been punched
//! out.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};

use super::chunks::{Chunk, Geometry};
use super::policy::Heat;
use crate::ranges::ByteRange;
use crate::units::{MIB, to_u64, to_usize};

/// Bytes of a segment, unless a chunk is longer.
const SEGMENT: u64 = MIB;
/// What file systems give at least.
const BLOCK: u64 = 4096;
/// What a chunk costs beside its bytes: it may be an extent of its own, of which ext4 has 340 in a block that is full
/// and half as many in one that was split.
const EXTENT: u64 = 32;

/// Bytes of the disk that a chunk of so many bytes takes at most.
pub const fn cost_of(length: u64) -> u64 {
    length.next_multiple_of(BLOCK) + EXTENT
}

fn number(segment: u64) -> u32 {
    u32::try_from(segment).expect("2^32 segments are 4 EiB")
}

fn index(segment: u32) -> usize {
    to_usize(u64::from(segment))
}

#[derive(Debug)]
pub(super) struct Segments {
    geometry: Geometry,
    /// Chunks of a segment.
    chunks_each: u64,
    heat: Arc<Heat>,
    /// One bit for each chunk.
    charged: Box<[AtomicU64]>,
    /// Charged chunks in each segment.
    counts: Box<[AtomicU32]>,
    holds: Arc<[AtomicU32]>,
    /// How often chunks of each have begun to leave.
    departures: Box<[AtomicU32]>,
}

impl Segments {
    /// Without a charged chunk. `heat` gives what is remembered of so many segments.
    pub(super) fn new(geometry: Geometry, heat: impl FnOnce(u32) -> Heat) -> Self {
        let chunks_each = (SEGMENT / geometry.chunk_size()).max(1);
        let count = to_usize(geometry.count().div_ceil(chunks_each));
        Self {
            geometry,
            chunks_each,
            heat: Arc::new(heat(number(to_u64(count)))),
            charged: (0..geometry.count().div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            counts: (0..count).map(|_| AtomicU32::new(0)).collect(),
            holds: (0..count).map(|_| AtomicU32::new(0)).collect(),
            departures: (0..count).map(|_| AtomicU32::new(0)).collect(),
        }
    }

    /// How hot each is.
    pub(super) const fn heat(&self) -> &Arc<Heat> {
        &self.heat
    }

    /// The segment that a chunk lies in.
    pub(super) fn of(&self, chunk: Chunk) -> u32 {
        number(chunk.number() / self.chunks_each)
    }

    /// The number of a chunk within its segment.
    pub(super) fn within_segment(&self, chunk: Chunk) -> u32 {
        u32::try_from(chunk.number() % self.chunks_each).expect("a segment has a few chunks")
    }

    /// The segments of `range`, which is not empty.
    fn within(&self, range: ByteRange) -> std::ops::RangeInclusive<usize> {
        let each = self.chunks_each * self.geometry.chunk_size();
        to_usize(range.start() / each)..=to_usize((range.end() - 1) / each)
    }

    /// Notes that somebody reads `range`, which is not empty.
    pub(super) fn touch(&self, range: ByteRange, now: u64) {
        for segment in self.within(range) {
            self.heat.touch(number(to_u64(segment)), now);
        }
    }

    /// Grows when chunks of the segments of `range`, which is not empty, begin to leave. Whoever reads what is resident
    /// asks before and after: what has left and come back in between may have been read half.
    pub(super) fn departures(&self, range: ByteRange) -> u32 {
        self.departures[self.within(range)].iter().map(|count| count.load(Ordering::Acquire)).fold(0, u32::wrapping_add)
    }

    /// Notes that chunks of a segment begin to leave.
    pub(super) fn depart(&self, segment: u32) {
        self.departures[index(segment)].fetch_add(1, Ordering::AcqRel);
    }

    /// The chunks of a segment.
    pub(super) fn chunks(&self, segment: u32) -> impl Iterator<Item = Chunk> + use<> {
        let geometry = self.geometry;
        let first = u64::from(segment) * self.chunks_each;
        (first..first + self.chunks_each).filter_map(move |number| geometry.chunk(number))
    }

    /// Bytes of the disk that a chunk takes at most.
    pub(super) fn cost(&self, chunk: Chunk) -> u64 {
        cost_of(self.geometry.range(chunk).length())
    }

    /// The number of segments.
    pub(super) fn count_all(&self) -> u32 {
        number(to_u64(self.counts.len()))
    }

    /// Charged chunks of a segment.
    pub(super) fn count(&self, segment: u32) -> u32 {
        self.counts[index(segment)].load(Ordering::Acquire)
    }

    pub(super) fn is_charged(&self, chunk: Chunk) -> bool {
        let (word, bit) = self.place(chunk);
        word.load(Ordering::Acquire) & bit != 0
    }

    /// Charges a chunk. `None` if it is charged already, else how many of its segment are now.
    pub(super) fn charge(&self, chunk: Chunk) -> Option<u32> {
        let (word, bit) = self.place(chunk);
        let was = word.fetch_or(bit, Ordering::AcqRel) & bit != 0;
        let count = &self.counts[index(self.of(chunk))];
        (!was).then(|| count.fetch_add(1, Ordering::AcqRel) + 1)
    }

    /// Takes the charge back. `None` if there is none, else how many of its segment are left.
    pub(super) fn discharge(&self, chunk: Chunk) -> Option<u32> {
        let (word, bit) = self.place(chunk);
        let was = word.fetch_and(!bit, Ordering::AcqRel) & bit != 0;
        let count = &self.counts[index(self.of(chunk))];
        was.then(|| count.fetch_sub(1, Ordering::AcqRel) - 1)
    }

    fn place(&self, chunk: Chunk) -> (&AtomicU64, u64) {
        (&self.charged[to_usize(chunk.number() / 64)], 1 << (chunk.number() % 64))
    }

    /// Keeps the segments of `range` from being punched out. Whoever asks for it must look at the states of its chunks
    /// afterwards: what had begun to leave before goes on leaving.
    pub(super) fn hold(&self, range: ByteRange) -> SegmentHold {
        let hold = SegmentHold { holds: Arc::clone(&self.holds), held: self.within(range) };
        hold.each(|count| count.fetch_add(1, Ordering::AcqRel));
        // With the fence in `is_held`: of two who hold and take out at once, at least one sees the other.
        fence(Ordering::SeqCst);
        hold
    }

    /// Whether somebody holds it. Whoever asks has changed the states of its chunks before.
    pub(super) fn is_held(&self, segment: u32) -> bool {
        fence(Ordering::SeqCst);
        self.holds[index(segment)].load(Ordering::Acquire) > 0
    }
}

/// As long as this lives its segments are not punched out.
#[derive(Debug)]
pub(super) struct SegmentHold {
    holds: Arc<[AtomicU32]>,
    held: std::ops::RangeInclusive<usize>,
}

impl SegmentHold {
    fn each(&self, change: impl Fn(&AtomicU32) -> u32) {
        for count in &self.holds[self.held.clone()] {
            change(count);
        }
    }
}

impl Drop for SegmentHold {
    fn drop(&mut self) {
        self.each(|count| count.fetch_sub(1, Ordering::AcqRel));
    }
}
