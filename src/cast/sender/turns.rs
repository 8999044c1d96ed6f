//! Blocks whose symbols take turns: a burst of losses takes little of each.

use std::collections::VecDeque;

/// Blocks, and how many symbols of each are still to be sent. A few: they are looked for one by one.
#[derive(Debug, Default)]
pub(super) struct Turns(VecDeque<(u32, u32)>);

impl Turns {
    /// So many symbols of a block more.
    pub(super) fn add(&mut self, block: u32, symbols: u32) {
        if symbols == 0 {
            return;
        }
        match self.0.iter_mut().find(|(other, _)| *other == block) {
            Some((_, left)) => *left += symbols,
            None => self.0.push_back((block, symbols)),
        }
    }

    /// The block whose turn it is.
    pub(super) fn next(&mut self) -> Option<u32> {
        let (block, left) = self.0.pop_front()?;
        if left > 1 {
            self.0.push_back((block, left - 1));
        }
        Some(block)
    }

    /// Symbols of a block that are still to be sent.
    pub(super) fn left(&self, block: u32) -> u32 {
        self.0.iter().find(|(other, _)| *other == block).map_or(0, |(_, left)| *left)
    }

    pub(super) fn blocks(&self) -> impl Iterator<Item = u32> + '_ {
        self.0.iter().map(|(block, _)| *block)
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_has_its_turn_until_it_has_no_more() {
        let mut turns = Turns::default();
        for (block, symbols) in [(5, 1), (6, 3), (7, 0), (5, 1)] {
            turns.add(block, symbols);
        }
        assert_eq!((turns.len(), turns.left(5), turns.left(7)), (2, 2, 0));
        let order: Vec<_> = std::iter::from_fn(|| turns.next()).collect();
        assert_eq!(order, [5, 6, 5, 6, 6]);
        assert!(turns.is_empty());
    }
}
