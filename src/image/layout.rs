//! What is remembered of where a sparse file has its data.
//!
//! Two bitmaps, both hints that may lag behind the file. A block's bit says "all data when last looked at", so that
//! reading it need not ask the file system; if it is wrong, a hole travels as zeroes, which is right too. A window's
//! bit says "the file system has read its metadata for this once", so that asking again does not wait for the disk.
//! That something is a *hole* is never remembered: it would be wrong bytes as soon as somebody writes there.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::disk::Span;
use crate::ranges::ByteRange;
use crate::units::{KIB, MIB, to_usize};

/// The grain of "all data". Costs 2 MiB of memory per TiB of image.
const BLOCK: u64 = 64 * KIB;

/// What is looked at together, the first time.
pub(super) const WINDOW: u64 = 64 * MIB;

#[derive(Debug)]
pub(super) struct Layout {
    data: Bitmap,
    seen: Bitmap,
}

impl Layout {
    /// Nothing is known of a file of `size` bytes.
    pub(super) fn new(size: u64) -> Self {
        Self { data: Bitmap::new(size.div_ceil(BLOCK)), seen: Bitmap::new(size.div_ceil(WINDOW)) }
    }

    /// Whether `range` was all data when it was last looked at.
    pub(super) fn is_data(&self, range: ByteRange) -> bool {
        (range.start() / BLOCK..range.end().div_ceil(BLOCK)).all(|block| self.data.get(block))
    }

    /// Whether the file system has looked at all of `range` before.
    pub(super) fn is_seen(&self, range: ByteRange) -> bool {
        (range.start() / WINDOW..range.end().div_ceil(WINDOW)).all(|window| self.seen.get(window))
    }

    /// Takes over what the file system said of the windows that hold `range`: all spans of them.
    pub(super) fn saw(&self, range: ByteRange, spans: &[Span]) {
        self.learn(spans);
        for window in range.start() / WINDOW..range.end().div_ceil(WINDOW) {
            self.seen.set(window);
        }
    }

    /// Takes over what the file system said of some spans.
    pub(super) fn learn(&self, spans: &[Span]) {
        for span in spans.iter().filter(|span| !span.is_hole) {
            // Whole blocks only.
            for block in span.range.start().div_ceil(BLOCK)..span.range.end() / BLOCK {
                self.data.set(block);
            }
        }
    }

    /// `range` is about to become a hole, or may.
    pub(super) fn forget(&self, range: ByteRange) {
        for block in range.start() / BLOCK..range.end().div_ceil(BLOCK) {
            self.data.clear(block);
        }
    }
}

#[derive(Debug)]
struct Bitmap(Box<[AtomicU64]>);

impl Bitmap {
    fn new(bits: u64) -> Self {
        Self((0..bits.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    fn word(&self, bit: u64) -> (&AtomicU64, u64) {
        (&self.0[to_usize(bit / 64)], 1 << (bit % 64))
    }

    fn get(&self, bit: u64) -> bool {
        let (word, mask) = self.word(bit);
        word.load(Ordering::Relaxed) & mask != 0
    }

    fn set(&self, bit: u64) {
        let (word, mask) = self.word(bit);
        word.fetch_or(mask, Ordering::Relaxed);
    }

    fn clear(&self, bit: u64) {
        let (word, mask) = self.word(bit);
        word.fetch_and(!mask, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(start: u64, end: u64, is_hole: bool) -> Span {
        Span { range: ByteRange::between(start, end), is_hole }
    }

    #[test]
    fn only_whole_blocks_of_data_are_remembered() {
        let layout = Layout::new(10 * BLOCK + 5);
        layout.saw(
            ByteRange::between(0, 10 * BLOCK + 5),
            &[span(0, BLOCK / 2, true), span(BLOCK / 2, 3 * BLOCK, false), span(3 * BLOCK, 10 * BLOCK + 5, true)],
        );
        assert!(!layout.is_data(ByteRange::between(BLOCK / 2, BLOCK)));
        assert!(layout.is_data(ByteRange::between(BLOCK, 3 * BLOCK)));
        assert!(!layout.is_data(ByteRange::between(BLOCK, 3 * BLOCK + 1)));
        assert!(layout.is_seen(ByteRange::between(7, 10 * BLOCK + 5)));
        layout.forget(ByteRange::between(2 * BLOCK + 9, 2 * BLOCK + 10));
        assert!(!layout.is_data(ByteRange::between(BLOCK, 3 * BLOCK)));
        assert!(layout.is_data(ByteRange::between(BLOCK, 2 * BLOCK)));
    }

    #[test]
    fn windows_are_seen_one_by_one() {
        let layout = Layout::new(3 * WINDOW);
        layout.saw(ByteRange::between(WINDOW, 2 * WINDOW), &[]);
        assert!(layout.is_seen(ByteRange::between(WINDOW, 2 * WINDOW)));
        assert!(!layout.is_seen(ByteRange::between(WINDOW - 1, WINDOW + 1)));
        assert!(!layout.is_seen(ByteRange::between(2 * WINDOW, 2 * WINDOW + 1)));
    }
}
