//! Entries of a queue that stand for nothing any more: their segments were removed, and looking for them would cost more
//! than passing over them when they come up.

use std::collections::HashMap;

use super::Segment;

/// Entries that are not worth a search.
const FEW: usize = 64;

#[derive(Debug, Default)]
pub(super) struct LeftOver {
    /// How many entries of each segment.
    entries: HashMap<Segment, u32>,
    /// The sum of these.
    count: usize,
}

impl LeftOver {
    /// One more entry of this segment stands for nothing.
    pub(super) fn add(&mut self, segment: Segment) {
        *self.entries.entry(segment).or_default() += 1;
        self.count += 1;
    }

    /// Whether the entry of this segment that has come up is one; then it is dropped, and the next one counts again.
    pub(super) fn take(&mut self, segment: Segment) -> bool {
        if self.count == 0 {
            return false;
        }
        let Some(count) = self.entries.get_mut(&segment) else { return false };
        *count -= 1;
        if *count == 0 {
            self.entries.remove(&segment);
        }
        self.count -= 1;
        true
    }

    /// How many there are.
    pub(super) const fn count(&self) -> usize {
        self.count
    }

    /// Whether so many of `entries` are left over that a search for them pays.
    pub(super) const fn are_many(&self, entries: usize) -> bool {
        self.count > FEW + entries / 2
    }
}
