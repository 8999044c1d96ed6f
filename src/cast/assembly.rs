//! The bytes of blocks that have come in part.
//!
//! Symbols of data are copied to where they belong, once, and parity is put beside them. The buffer goes on as the block when
//! it is whole, so none comes back to be used again.
//!
//! Owns: the bytes, and that no symbol is counted twice. Does not own: which blocks are kept (`receiver`), and whether their
//! bytes are right (whoever stores them).

use std::collections::HashMap;

use super::code;
use super::layout::Layout;
use crate::units::{to_u64, to_usize};

/// The bytes of one block that has come in part, or whole. Can be sent to another thread to be made whole there.
#[derive(Debug)]
pub struct Partial {
    /// Bytes of the block: `data` without what fills up the last symbol.
    length: u64,
    /// Bytes of a symbol.
    symbol: u16,
    /// Parity symbols that the block has.
    count: u16,
    /// Symbols of data that have not come.
    missing: u16,
    /// All symbols of data, those that have not come being zero.
    data: Vec<u8>,
    /// Which have come, one bit each.
    has: Vec<u64>,
    /// What has come of parity: indexes from 0 on, and bytes.
    parity: Vec<(u16, Box<[u8]>)>,
}

impl Partial {
    fn new(layout: &Layout, count: u16, block: u32) -> Self {
        let (symbol, missing) = (layout.symbol(), layout.symbols(block));
        let data = vec![0; usize::from(missing) * usize::from(symbol)];
        let has = vec![0; usize::from(missing.div_ceil(64))];
        Self { length: layout.length(block), symbol, count, missing, data, has, parity: Vec::new() }
    }

    /// Keeps a symbol, unless it has come before or belongs to no such block. The bytes of memory that it takes anew.
    fn keep(&mut self, index: u16, bytes: &[u8]) -> u64 {
        let width = usize::from(self.symbol);
        if bytes.len() != width {
            return 0;
        }
        match self.data.chunks_exact_mut(width).nth(usize::from(index)) {
            Some(place) => {
                let (word, bit) = (&mut self.has[usize::from(index / 64)], 1 << (index % 64));
                if *word & bit == 0 {
                    *word |= bit;
                    self.missing -= 1;
                    place.copy_from_slice(bytes);
                }
                0
            }
            None => self.keep_parity(index, bytes),
        }
    }

    /// No more of parity is kept than data was missing: with it the block can be mended.
    fn keep_parity(&mut self, index: u16, bytes: &[u8]) -> u64 {
        let symbols = self.data.len() / usize::from(self.symbol);
        let Some(index) = usize::from(index).checked_sub(symbols).and_then(|index| u16::try_from(index).ok()) else {
            return 0;
        };
        let is_new = self.parity.iter().all(|(has, _)| *has != index);
        if index >= self.count || self.parity.len() >= usize::from(self.missing) || !is_new {
            return 0;
        }
        self.parity.push((index, bytes.into()));
        to_u64(bytes.len())
    }

    fn bytes(&self) -> u64 {
        to_u64(self.data.len()) + to_u64(self.parity.len()) * u64::from(self.symbol)
    }

    /// The bytes of the block, without what fills up its last symbol. `None`: it could not be mended. Takes some
    /// milliseconds if something was lost.
    pub fn into_block(mut self) -> Option<Vec<u8>> {
        if self.missing > 0 {
            let has = |index: u16| self.has[usize::from(index / 64)] >> (index % 64) & 1 == 1;
            let parity: Vec<_> = self.parity.iter().map(|(index, bytes)| (*index, &bytes[..])).collect();
            if !code::mend(&mut self.data, self.symbol, self.count, has, &parity) {
                return None;
            }
        }
        self.data.truncate(to_usize(self.length));
        Some(self.data)
    }
}

/// Blocks that have come in part. As many as the caller does not take out or throw away.
#[derive(Debug, Default)]
pub struct Assembly {
    blocks: HashMap<u32, Partial>,
    bytes: u64,
}

impl Assembly {
    /// Keeps a symbol that has not come before. One that has, or that the layout does not have, changes nothing.
    pub fn keep(&mut self, layout: &Layout, parity: u16, block: u32, index: u16, bytes: &[u8]) {
        if block >= layout.blocks() || bytes.len() != usize::from(layout.symbol()) {
            return;
        }
        let partial = self.blocks.entry(block).or_insert_with(|| {
            let partial = Partial::new(layout, parity, block);
            self.bytes += partial.bytes();
            partial
        });
        self.bytes += partial.keep(index, bytes);
    }

    /// Takes a block out.
    pub fn take(&mut self, block: u32) -> Option<Partial> {
        let partial = self.blocks.remove(&block)?;
        self.bytes -= partial.bytes();
        Some(partial)
    }

    /// Throws a block away.
    pub fn forget(&mut self, block: u32) {
        self.take(block);
    }

    /// Bytes of memory.
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::cast::SessionId;
    use crate::cast::form::Terms;
    use crate::manifest::{ImageId, Shape};

    const PARITY: u16 = 32;

    /// Blocks of 64 KiB, the third one shorter; symbols of 1444 bytes.
    fn layout() -> Layout {
        let terms = Terms {
            session: SessionId(1),
            image: ImageId([1; 32]),
            shape: Shape { image_size: 150_000, chunk_size: 4096 },
            block: 65536,
            symbol: 1444,
            parity: PARITY,
            pages: 0,
            plan: 0,
            rest: true,
            deadline: None,
        };
        Layout::new(&terms, Vec::new(), |_| false).unwrap()
    }

    /// A block and all its symbols, data and parity.
    fn symbols(layout: &Layout, block: u32) -> (Vec<u8>, Vec<Vec<u8>>) {
        let mut bytes = vec![0; to_usize(layout.length(block))];
        blake3::Hasher::new().update(&block.to_le_bytes()).finalize_xof().fill(&mut bytes);
        let parity = code::parity(&bytes, 1444, PARITY);
        let mut all = bytes.clone();
        all.resize(bytes.len().next_multiple_of(1444), 0);
        all.extend(parity);
        (bytes, all.chunks(1444).map(<[u8]>::to_vec).collect())
    }

    fn counted(assembly: &Assembly) -> u64 {
        let held = |partial: &Partial| {
            let parity: usize = partial.parity.iter().map(|(_, bytes)| bytes.len()).sum();
            to_u64(partial.data.len() + parity)
        };
        assembly.blocks.values().map(held).sum()
    }

    proptest! {
        #[test]
        fn a_block_is_whole_when_as_many_symbols_have_come_as_it_has_data(
            block in 0u32..3,
            come in prop::collection::vec(any::<prop::sample::Index>(), 0..150),
        ) {
            let layout = layout();
            let (bytes, symbols) = symbols(&layout, block);
            let mut assembly = Assembly::default();
            let mut indexes = std::collections::BTreeSet::new();
            for index in come {
                let index = index.index(symbols.len());
                indexes.insert(index);
                // Twice, so that what is repeated is seen to count once.
                for _ in 0..2 {
                    assembly.keep(&layout, PARITY, block, u16::try_from(index).unwrap(), &symbols[index]);
                    prop_assert_eq!(assembly.bytes(), counted(&assembly));
                }
            }
            let is_enough = indexes.len() >= usize::from(layout.symbols(block));
            let found = assembly.take(block).and_then(Partial::into_block);
            prop_assert_eq!(found, is_enough.then_some(bytes));
            prop_assert_eq!(assembly.bytes(), 0);
        }
    }

    #[test]
    fn blocks_do_not_mix_and_what_is_forgotten_is_gone() {
        let layout = layout();
        let blocks: Vec<_> = (0..3).map(|block| symbols(&layout, block)).collect();
        let mut assembly = Assembly::default();
        for index in 0..46 {
            for (block, (_, symbols)) in (0..).zip(&blocks) {
                if let Some(symbol) = symbols.get(usize::from(index)) {
                    assembly.keep(&layout, PARITY, block, index, symbol);
                }
            }
        }
        assembly.forget(1);
        assert!(assembly.take(1).is_none());
        for block in [0, 2] {
            assert_eq!(assembly.take(block).unwrap().into_block().as_ref(), Some(&blocks[block as usize].0));
        }
        assert_eq!(assembly.bytes(), 0);
    }

    #[test]
    fn what_the_layout_does_not_have_is_not_kept() {
        let layout = layout();
        let mut assembly = Assembly::default();
        assembly.keep(&layout, PARITY, 3, 0, &[1; 1444]);
        assembly.keep(&layout, PARITY, 0, 0, &[1; 1442]);
        assert!(assembly.blocks.is_empty());
        assembly.keep(&layout, PARITY, 0, layout.symbols(0) + PARITY, &[1; 1444]);
        assembly.keep(&layout, PARITY, 0, u16::MAX, &[1; 1444]);
        assert_eq!(assembly.bytes(), counted(&assembly));
        assert!(assembly.take(0).unwrap().parity.is_empty());
    }

    #[test]
    fn a_block_goes_to_another_thread() {
        const fn is_send<T: Send + 'static>() {}
        is_send::<Partial>();
    }
}
