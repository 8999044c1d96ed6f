//! Which symbols of which blocks have come, of blocks that have come in part.

use super::MOST_OPEN;

/// One block.
#[derive(Debug)]
pub(super) struct Open {
    pub(super) block: u32,
    /// One bit for each symbol.
    bits: Box<[u64]>,
    /// Symbols that have come.
    pub(super) count: u16,
    /// Data symbols.
    pub(super) data: u16,
    /// When this was last touched, in symbols of the session.
    pub(super) touched: u64,
}

impl Open {
    pub(super) fn new(block: u32, data: u16, symbols: u16, touched: u64) -> Self {
        Self { block, bits: vec![0; usize::from(symbols).div_ceil(64)].into(), count: 0, data, touched }
    }

    /// A symbol has come. `false`: it had before.
    pub(super) fn set(&mut self, index: u16) -> bool {
        let (word, bit) = (usize::from(index / 64), 1_u64 << (index % 64));
        let Some(word) = self.bits.get_mut(word) else { return false };
        let is_new = *word & bit == 0;
        *word |= bit;
        self.count += u16::from(is_new);
        is_new
    }

    pub(super) const fn is_enough(&self) -> bool {
        self.count >= self.data
    }

    /// Symbols that it lacks.
    pub(super) const fn lacks(&self) -> u16 {
        self.data.saturating_sub(self.count)
    }
}

/// Blocks that have come in part: at most [`MOST_OPEN`].
#[derive(Debug, Default)]
pub(super) struct Opens(Vec<Option<Open>>);

impl Opens {
    pub(super) fn get(&self, slot: u8) -> Option<&Open> {
        self.0.get(usize::from(slot))?.as_ref()
    }

    pub(super) fn get_mut(&mut self, slot: u8) -> Option<&mut Open> {
        self.0.get_mut(usize::from(slot))?.as_mut()
    }

    pub(super) fn close(&mut self, slot: u8) -> Option<Open> {
        self.0.get_mut(usize::from(slot))?.take()
    }

    /// Opens a block, if there is room. Gives its slot.
    pub(super) fn open(&mut self, open: Open) -> Result<u8, Open> {
        let free = self.0.iter().position(Option::is_none);
        let slot = match free {
            Some(slot) => slot,
            None if self.0.len() < MOST_OPEN => {
                self.0.push(None);
                self.0.len() - 1
            }
            None => return Err(open),
        };
        let Ok(number) = u8::try_from(slot) else { return Err(open) };
        self.0[slot] = Some(open);
        Ok(number)
    }

    /// The block that is worth least: `rank` says how much.
    pub(super) fn least<R: Ord>(&self, rank: impl Fn(&Open) -> R) -> Option<u8> {
        let open = self.0.iter().enumerate().filter_map(|(slot, open)| Some((slot, open.as_ref()?)));
        let (slot, _) = open.min_by_key(|(_, open)| rank(open))?;
        u8::try_from(slot).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_symbol_counts_once() {
        let mut open = Open::new(3, 70, 100, 0);
        assert!(open.set(69) && open.set(0) && open.set(99));
        assert!(!open.set(69) && !open.set(128), "again, and out of bounds");
        assert_eq!((open.count, open.lacks(), open.is_enough()), (3, 67, false));
    }

    #[test]
    fn there_is_room_for_so_many() {
        let mut opens = Opens::default();
        for block in 0..u32::try_from(MOST_OPEN).unwrap() {
            assert_eq!(u32::from(opens.open(Open::new(block, 1, 1, 0)).unwrap()), block);
        }
        assert!(opens.open(Open::new(99, 1, 1, 0)).is_err());
        assert_eq!(opens.close(5).unwrap().block, 5);
        assert_eq!(opens.open(Open::new(99, 1, 1, 0)).unwrap(), 5);
        assert_eq!(opens.least(|open| open.block), Some(0));
    }
}
