//! Ranges of bytes and sets of them.
//!
//! Owns: the arithmetic of offsets, so that no other room computes an end that overflows or a piece that is
//! counted twice.

use crate::units::to_u64;

/// A non-wrapping range of bytes: `start <= end`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ByteRange {
    start: u64,
    end: u64,
}

impl ByteRange {
    /// `length` bytes from `start`, or `None` when the end does not fit in 64 bits.
    pub const fn new(start: u64, length: u64) -> Option<Self> {
        match start.checked_add(length) {
            Some(end) => Some(Self { start, end }),
            None => None,
        }
    }

    /// The range between two offsets; empty when `end` lies before `start`.
    pub const fn between(start: u64, end: u64) -> Self {
        Self { start, end: if end < start { start } else { end } }
    }

    /// The first byte.
    pub const fn start(self) -> u64 {
        self.start
    }

    /// One past the last byte.
    pub const fn end(self) -> u64 {
        self.end
    }

    /// The number of bytes.
    pub const fn length(self) -> u64 {
        self.end - self.start
    }

    /// Whether there is no byte in it.
    pub const fn is_empty(self) -> bool {
        self.start == self.end
    }

    /// The bytes that are in both.
    #[must_use]
    pub fn intersect(self, other: Self) -> Self {
        let start = self.start.max(other.start);
        Self::between(start, self.end.min(other.end).max(start))
    }

    /// The range cut into pieces of at most `length` bytes, in order. `length` is not zero.
    pub fn pieces(self, length: u64) -> impl Iterator<Item = Self> {
        let mut start = self.start;
        std::iter::from_fn(move || {
            let end = self.end.min(start.saturating_add(length));
            let piece = Self::between(start, end);
            start = end;
            (!piece.is_empty()).then_some(piece)
        })
    }
}

/// Which bytes of one range have been accounted for, for checking that a peer's pieces cover what was asked
/// exactly once.
///
/// Holds one entry for each gap or island, so in-order pieces cost nothing; the caller bounds how many pieces it
/// lets a peer send.
#[derive(Debug)]
pub struct Coverage {
    whole: ByteRange,
    /// Sorted, disjoint, not touching: `covered[i].end < covered[i + 1].start`.
    covered: Vec<ByteRange>,
}

/// Why a piece cannot be added to a [`Coverage`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overlap {
    /// The piece has bytes outside the whole.
    Outside,
    /// The piece repeats bytes that came before.
    Repeated,
}

impl Coverage {
    /// Nothing of `whole` is covered yet.
    pub const fn new(whole: ByteRange) -> Self {
        Self { whole, covered: Vec::new() }
    }

    /// Accounts for `piece`. An empty piece changes nothing.
    pub fn add(&mut self, piece: ByteRange) -> Result<(), Overlap> {
        if piece.start < self.whole.start || piece.end > self.whole.end {
            return Err(Overlap::Outside);
        }
        if piece.is_empty() {
            return Ok(());
        }
        let next = self.covered.partition_point(|range| range.start < piece.start);
        let touches_before = next > 0 && self.covered[next - 1].end >= piece.start;
        let touches_after = next < self.covered.len() && self.covered[next].start <= piece.end;
        if touches_before && self.covered[next - 1].end > piece.start
            || touches_after && self.covered[next].start < piece.end
        {
            return Err(Overlap::Repeated);
        }
        match (touches_before, touches_after) {
            (true, true) => {
                self.covered[next - 1].end = self.covered[next].end;
                self.covered.remove(next);
            }
            (true, false) => self.covered[next - 1].end = piece.end,
            (false, true) => self.covered[next].start = piece.start,
            (false, false) => self.covered.insert(next, piece),
        }
        Ok(())
    }

    /// Whether every byte of the whole is covered.
    pub fn is_complete(&self) -> bool {
        self.whole.is_empty() || self.covered == [self.whole]
    }

    /// The number of separate islands held, which is what this costs in memory.
    pub fn islands(&self) -> u64 {
        to_u64(self.covered.len())
    }
}

/// `ranges` without empty ones, in order and joined where they touch.
pub fn merged(ranges: &[ByteRange]) -> Vec<ByteRange> {
    let mut all: Vec<_> = ranges.iter().copied().filter(|range| !range.is_empty()).collect();
    all.sort_unstable_by_key(|range| range.start());
    let mut joined: Vec<ByteRange> = Vec::with_capacity(all.len());
    for range in all {
        match joined.last_mut() {
            Some(last) if range.start() <= last.end() => {
                *last = ByteRange::between(last.start(), last.end().max(range.end()));
            }
            _ => joined.push(range),
        }
    }
    joined
}

/// At most `most` ranges, but one at least, that cover these, which are in order and apart, and as little else as possible: the
/// smallest gaps are closed, of equal ones the first.
pub fn fewer(ranges: &[ByteRange], most: usize) -> Vec<ByteRange> {
    let excess = ranges.len().saturating_sub(most);
    let gap = |pair: &[ByteRange]| pair[1].start() - pair[0].end();
    let mut gaps: Vec<_> = ranges.windows(2).map(gap).enumerate().map(|(index, gap)| (gap, index)).collect();
    gaps.sort_unstable();
    let mut is_closed = vec![false; ranges.len()];
    gaps.iter().take(excess).for_each(|(_, index)| is_closed[index + 1] = true);
    let mut all: Vec<ByteRange> = Vec::new();
    for (range, is_closed) in ranges.iter().zip(is_closed) {
        match all.last_mut() {
            Some(last) if is_closed => *last = ByteRange::between(last.start(), range.end()),
            _ => all.push(*range),
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_range_whose_end_overflows_does_not_exist() {
        assert_eq!(ByteRange::new(u64::MAX, 1), None);
        assert_eq!(ByteRange::new(u64::MAX, 0).map(ByteRange::length), Some(0));
    }

    #[test]
    fn pieces_cover_the_range_in_order() {
        let range = ByteRange::new(3, 10).unwrap();
        let pieces: Vec<_> = range.pieces(4).map(|p| (p.start(), p.length())).collect();
        assert_eq!(pieces, [(3, 4), (7, 4), (11, 2)]);
        assert_eq!(ByteRange::new(3, 0).unwrap().pieces(4).count(), 0);
    }

    proptest! {
        #[test]
        fn coverage_agrees_with_a_count_per_byte(pieces in prop::collection::vec((0u64..70, 0u64..20), 0..30)) {
            let whole = ByteRange::new(8, 48).unwrap();
            let mut coverage = Coverage::new(whole);
            let mut oracle = [false; 128];
            for (start, length) in pieces {
                let piece = ByteRange::new(start, length).unwrap();
                let bytes = || (start..start + length).map(crate::units::to_usize);
                let outside = start < whole.start() || piece.end() > whole.end();
                let repeated = bytes().any(|byte| oracle[byte]);
                let expected = match (outside, repeated) {
                    (true, _) => Err(Overlap::Outside),
                    (_, true) => Err(Overlap::Repeated),
                    _ => Ok(()),
                };
                prop_assert_eq!(coverage.add(piece), expected);
                if expected.is_ok() {
                    bytes().for_each(|byte| oracle[byte] = true);
                }
                prop_assert_eq!(coverage.is_complete(), oracle[8..56].iter().all(|covered| *covered));
            }
        }

        #[test]
        fn intersection_agrees_with_membership(a in 0u64..50, b in 0u64..50, c in 0u64..50, d in 0u64..50) {
            let (left, right) = (ByteRange::between(a, b), ByteRange::between(c, d));
            let both = left.intersect(right);
            let within = |range: ByteRange, byte| range.start() <= byte && byte < range.end();
            for byte in 0..60 {
                prop_assert_eq!(within(both, byte), within(left, byte) && within(right, byte));
            }
        }
    }

    proptest! {
        #[test]
        fn fewer_ranges_cover_the_same_and_as_little_more_as_can_be(
            lengths in prop::collection::vec((1u64..20, 1u64..20), 1..30), most in 1usize..40
        ) {
            let mut at = 0;
            let ranges: Vec<_> = lengths.iter().map(|(gap, length)| {
                let range = ByteRange::between(at + gap, at + gap + length);
                at = range.end();
                range
            }).collect();
            let covering = fewer(&ranges, most);
            prop_assert_eq!(covering.len(), ranges.len().min(most));
            prop_assert!(covering.windows(2).all(|pair| pair[0].end() < pair[1].start()));
            let is_covered = |range: &ByteRange| covering.iter().any(|wide| wide.start() <= range.start() && range.end() <= wide.end());
            prop_assert!(ranges.iter().all(is_covered));
            let total = |ranges: &[ByteRange]| ranges.iter().map(|range| range.length()).sum::<u64>();
            let mut gaps: Vec<_> = ranges.windows(2).map(|pair| pair[1].start() - pair[0].end()).collect();
            gaps.sort_unstable();
            let closed: u64 = gaps.iter().take(ranges.len().saturating_sub(most)).sum();
            prop_assert_eq!(total(&covering), total(&ranges) + closed);
        }
    }
}
