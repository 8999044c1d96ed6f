//! Chunks: where they are and what is known of them.
//!
//! | state | reads get the bytes from | in `map` | after a crash |
//! | --- | --- | --- | --- |
//! | absent | the upstream (*in flight* while an entry of the flight table stands for it) | no | absent |
//! | volatile | `data`, checked each time: the write may still fail on its way to the disk | no | absent |
//! | resident | `data` | yes, or about to be | unverified, or absent if the map was not written yet |
//! | unverified | `data`, checked, after which it is resident | yes | unverified |
//! | zero | nowhere | yes, or about to be | zero, or absent |
//! | leaving: it is being evicted | the upstream, without being stored | not any more | absent |
//!
//! A state is one atomic byte, so that a hit costs one test. It changes from absent and back only under the lock of
//! the flight table; from volatile to resident by the flusher alone, after the data has been made durable; to leaving
//! and from there by the evictor alone.

use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use crate::ranges::ByteRange;
use crate::units::to_usize;

/// The number of a chunk, valid for the [`Geometry`] that made it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Chunk(u64);

impl Chunk {
    pub(super) const fn number(self) -> u64 {
        self.0
    }

    fn index(self) -> usize {
        to_usize(self.0)
    }
}

/// How an image is cut into chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Geometry {
    size: u64,
    chunk_size: u32,
}

impl Geometry {
    pub(super) const fn new(size: u64, chunk_size: u32) -> Self {
        Self { size, chunk_size }
    }

    pub(super) const fn size(self) -> u64 {
        self.size
    }

    pub(super) const fn chunk_size(self) -> u64 {
        self.chunk_size as u64
    }

    /// The number of chunks.
    pub(super) const fn count(self) -> u64 {
        self.size.div_ceil(self.chunk_size())
    }

    /// All chunks with a byte in `range`, which lies within the image.
    pub(super) fn chunks(self, range: ByteRange) -> impl Iterator<Item = Chunk> + Clone {
        let end = if range.is_empty() { 0 } else { range.end().div_ceil(self.chunk_size()) };
        (range.start() / self.chunk_size()..end).map(Chunk)
    }

    /// The number of chunks with a byte in `range`.
    pub(super) fn span(self, range: ByteRange) -> u64 {
        if range.is_empty() { 0 } else { range.end().div_ceil(self.chunk_size()) - range.start() / self.chunk_size() }
    }

    /// The chunks that lie in `range` from their first byte to their last.
    pub(super) fn whole_chunks(self, range: ByteRange) -> impl DoubleEndedIterator<Item = Chunk> {
        let end = if range.end() == self.size { self.count() } else { range.end() / self.chunk_size() };
        (range.start().div_ceil(self.chunk_size())..end).map(Chunk)
    }

    /// The bytes of a chunk; the last one may be short.
    pub(super) fn range(self, chunk: Chunk) -> ByteRange {
        let start = chunk.0 * self.chunk_size();
        ByteRange::between(start, (start + self.chunk_size()).min(self.size))
    }

    /// The bytes of all chunks from `first` to `last`.
    pub(super) fn run(self, first: Chunk, last: Chunk) -> ByteRange {
        ByteRange::between(self.range(first).start(), self.range(last).end())
    }

    /// `range`, up to whole chunks.
    pub(super) fn widened(self, range: ByteRange) -> ByteRange {
        let start = range.start() / self.chunk_size() * self.chunk_size();
        ByteRange::between(start, range.end().next_multiple_of(self.chunk_size()).min(self.size))
    }

    /// The chunk with this number, if there is one.
    pub(super) fn chunk(self, number: u64) -> Option<Chunk> {
        (number < self.count()).then_some(Chunk(number))
    }
}

/// What is known of a chunk; see the head of this file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum State {
    Absent = 0,
    Volatile = 1,
    Resident = 2,
    Unverified = 3,
    Zero = 4,
    Leaving = 5,
}

impl State {
    const fn from_byte(byte: u8) -> Self {
        match byte {
            1 => Self::Volatile,
            2 => Self::Resident,
            3 => Self::Unverified,
            4 => Self::Zero,
            5 => Self::Leaving,
            _ => Self::Absent,
        }
    }
}

/// The states of all chunks of an image, and the checksums of those that have bytes. Five bytes of memory a chunk:
/// 80 MiB for a TiB in chunks of 64 KiB.
#[derive(Debug)]
pub(super) struct States {
    states: Box<[AtomicU8]>,
    checksums: Box<[AtomicU32]>,
}

impl States {
    /// All absent.
    pub(super) fn new(geometry: Geometry) -> Self {
        let count = geometry.count();
        Self {
            states: (0..count).map(|_| AtomicU8::new(State::Absent as u8)).collect(),
            checksums: (0..count).map(|_| AtomicU32::new(0)).collect(),
        }
    }

    pub(super) fn get(&self, chunk: Chunk) -> State {
        // Pairs with the release in `set`: who sees the state sees the checksum, and the bytes in the file.
        State::from_byte(self.states[chunk.index()].load(Ordering::Acquire))
    }

    pub(super) fn set(&self, chunk: Chunk, state: State) {
        self.states[chunk.index()].store(state as u8, Ordering::Release);
    }

    /// Changes the state if it is still `from`.
    pub(super) fn change(&self, chunk: Chunk, from: State, to: State) -> bool {
        let state = &self.states[chunk.index()];
        state.compare_exchange(from as u8, to as u8, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    }

    pub(super) fn checksum(&self, chunk: Chunk) -> u32 {
        self.checksums[chunk.index()].load(Ordering::Relaxed)
    }

    /// To be called before the state that makes the bytes readable.
    pub(super) fn set_checksum(&self, chunk: Chunk, checksum: u32) {
        self.checksums[chunk.index()].store(checksum, Ordering::Relaxed);
    }
}

/// The checksum that is kept of each chunk's bytes: CRC-32C (RFC 3720, B.4).
pub(super) fn checksum(bytes: &[u8]) -> u32 {
    u32::try_from(crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes)).expect("CRC-32C has 32 bits")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_checksum_is_crc_32c() {
        assert_eq!(checksum(b"123456789"), 0xe306_9283);
        assert_eq!(checksum(&[0; 32]), 0x8a91_36aa);
    }

    proptest! {
        #[test]
        fn chunks_of_a_range_agree_with_a_look_at_every_byte(
            size in 1u64..300, shift in 2u32..7, start in 0u64..300, length in 0u64..300,
        ) {
            let geometry = Geometry::new(size, 1 << shift);
            let range = ByteRange::between(start.min(size), (start + length).min(size));
            let mut touched: Vec<_> = (range.start()..range.end()).map(|byte| byte >> shift).collect();
            touched.dedup();
            let chunks: Vec<_> = geometry.chunks(range).map(Chunk::number).collect();
            prop_assert_eq!(&chunks, &touched);
            let whole: Vec<_> = geometry.whole_chunks(range).map(Chunk::number).collect();
            touched.retain(|number| {
                let chunk = geometry.range(geometry.chunk(*number).unwrap());
                range.start() <= chunk.start() && chunk.end() <= range.end()
            });
            prop_assert_eq!(whole, touched);
            prop_assert_eq!(geometry.chunk(geometry.count()), None);
        }
    }
}
