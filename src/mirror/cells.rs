//! A picture of what is here: the image cut into cells of equal length, and what there is in each.
//!
//! Owns: the walk over all chunks that makes it, and the form of cells. Does not own: how a picture is shown.

use super::Mirror;
use super::chunks::{Chunk, Geometry, State};
use crate::ranges::ByteRange;
use crate::units::to_usize;

/// An image cut into cells of equal length (the last one may be shorter), each of whole chunks; of each cell, bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Cells {
    /// Bytes of the image.
    pub size: u64,
    /// Bytes of a cell.
    pub length: u64,
    /// Bytes of resident chunks, durable ones only: together as in [`Share`](super::Share).
    pub resident: Vec<u64>,
    /// Bytes known to be zero.
    pub zero: Vec<u64>,
    /// Bytes of pinned ranges, here or not.
    pub pinned: Vec<u64>,
    /// Bytes of chunks that were brought ahead of demand and that nobody has read.
    pub unread: Vec<u64>,
    /// Bytes of chunks that are being fetched.
    pub fetching: Vec<u64>,
}

/// What is known of one chunk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Look {
    is_resident: bool,
    is_zero: bool,
    is_unread: bool,
}

impl Cells {
    /// Cuts an image of `size` bytes into at most `most` cells (1 at least), each of whole units of `unit` bytes, of which
    /// nothing is known.
    pub fn empty(size: u64, unit: u64, most: u64) -> Self {
        let length = size.div_ceil(most.max(1)).max(1).next_multiple_of(unit.max(1));
        let count = to_usize(size.div_ceil(length));
        let none = || vec![0; count];
        Self { size, length, resident: none(), zero: none(), pinned: none(), unread: none(), fetching: none() }
    }

    /// As [`Self::empty`], of an image that is here as a whole.
    pub fn full(size: u64, unit: u64, most: u64) -> Self {
        let mut cells = Self::empty(size, unit, most);
        let mut left = size;
        for resident in &mut cells.resident {
            *resident = left.min(cells.length);
            left -= *resident;
        }
        cells
    }

    /// Counts what is known of all chunks, the pinned ranges, and the chunks that are on their way.
    fn walk(
        geometry: Geometry,
        most: u64,
        look: impl Fn(Chunk) -> Look,
        pins: &[ByteRange],
        flying: impl IntoIterator<Item = Chunk>,
    ) -> Self {
        let mut cells = Self::empty(geometry.size(), geometry.chunk_size(), most);
        for chunk in geometry.chunks(ByteRange::between(0, geometry.size())) {
            let length = geometry.range(chunk).length();
            let at = cells.index(geometry.range(chunk).start());
            let Look { is_resident, is_zero, is_unread } = look(chunk);
            cells.resident[at] += if is_resident { length } else { 0 };
            cells.zero[at] += if is_zero { length } else { 0 };
            cells.unread[at] += if is_unread { length } else { 0 };
        }
        for pin in pins {
            cells.pin(*pin);
        }
        for chunk in flying {
            let at = cells.index(geometry.range(chunk).start());
            cells.fetching[at] += geometry.range(chunk).length();
        }
        cells
    }

    fn index(&self, offset: u64) -> usize {
        to_usize(offset / self.length)
    }

    fn pin(&mut self, range: ByteRange) {
        let mut start = range.start();
        while start < range.end() {
            let end = (start / self.length + 1).saturating_mul(self.length).min(range.end());
            let at = self.index(start);
            self.pinned[at] += end - start;
            start = end;
        }
    }
}

impl Mirror {
    /// What is here now, in at most `most` cells. Looks at every chunk, and holds up nobody.
    pub fn cells(&self, most: u64) -> Cells {
        let (geometry, states, origins) = (self.0.geometry, &self.0.states, &self.0.origins);
        // Copied: fetches go on while the picture is made.
        let flying: Vec<_> = self.0.flights.lock().keys().copied().collect();
        let look = |chunk| {
            let state = states.get(chunk);
            Look {
                is_resident: matches!(state, State::Resident | State::Unverified) && origins.is_marked(chunk),
                is_zero: state == State::Zero,
                is_unread: origins.is_unread(geometry.range(chunk)),
            }
        };
        Cells::walk(geometry, most, look, &self.0.pins.ranges(), flying)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn looks() -> impl Strategy<Value = Look> {
        (0u8..4, any::<bool>()).prop_map(|(state, unread)| Look {
            is_resident: state == 1,
            is_zero: state == 2,
            is_unread: unread && state == 1,
        })
    }

    proptest! {
        #[test]
        fn cells_agree_with_a_look_at_every_byte(
            size in 1u64..400, shift in 0u32..6, most in 1u64..40,
            looks in prop::collection::vec(looks(), 400),
            pins in prop::collection::vec((0u64..20, 1u64..60), 0..6),
            flying in prop::collection::btree_set(0u64..400, 0..8),
        ) {
            let geometry = Geometry::new(size, 1 << shift);
            let mut at = 0;
            let pins: Vec<_> = pins.into_iter().map(|(gap, length)| {
                let range = ByteRange::between((at + gap).min(size), (at + gap + length).min(size));
                at = range.end() + 1;
                range
            }).collect();
            let flying: Vec<_> = flying.into_iter().filter_map(|number| geometry.chunk(number)).collect();
            let look = |chunk: Chunk| looks[to_usize(chunk.number())];
            let cells = Cells::walk(geometry, most, look, &pins, flying.iter().copied());

            let count = to_usize(size.div_ceil(cells.length));
            prop_assert!(count >= 1 && u64::try_from(count).unwrap() <= most);
            prop_assert_eq!(cells.length % geometry.chunk_size(), 0);
            let mut oracle = Cells { length: cells.length, ..Cells::empty(size, cells.length, most) };
            for byte in 0..size {
                let (cell, chunk) = (to_usize(byte / cells.length), geometry.chunk(byte >> shift).unwrap());
                let Look { is_resident, is_zero, is_unread } = look(chunk);
                oracle.resident[cell] += u64::from(is_resident);
                oracle.zero[cell] += u64::from(is_zero);
                oracle.unread[cell] += u64::from(is_unread);
                oracle.pinned[cell] += u64::from(pins.iter().any(|pin| pin.start() <= byte && byte < pin.end()));
                oracle.fetching[cell] += u64::from(flying.contains(&chunk));
            }
            prop_assert_eq!(cells, oracle);
        }
    }

    #[test]
    fn cells_are_of_whole_units_and_hold_all_bytes() {
        assert_eq!(Cells::empty(0, 4096, 256).resident.len(), 0);
        let full = Cells::full(10_000, 4096, 2);
        assert_eq!((full.length, full.resident), (8192, vec![8192, 1808]));
        assert_eq!(Cells::empty(u64::MAX, 1 << 16, 4096).length, u64::MAX.div_ceil(4096).next_multiple_of(1 << 16));
    }
}
