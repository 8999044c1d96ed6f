//! The bytes of blocks that have come in part.
//!
//! STUB: which blocks are kept is the receiver's decision (`receiver`); this only holds what it is told to.

use super::layout::Layout;

/// The bytes of one block that has come in part, or whole. Can be sent to another thread to be made whole there.
#[derive(Debug)]
pub struct Partial;

impl Partial {
    /// The bytes of the block, without what fills up its last symbol. `None`: it could not be mended. Takes some
    /// milliseconds if something was lost.
    pub fn into_block(self) -> Option<Vec<u8>> {
        unimplemented!()
    }
}

/// Blocks that have come in part.
#[derive(Debug, Default)]
pub struct Assembly;

impl Assembly {
    /// Keeps a symbol that has not come before.
    pub fn keep(&mut self, layout: &Layout, parity: u16, block: u32, index: u16, bytes: &[u8]) {
        let _ = (layout, parity, block, index, bytes);
        unimplemented!()
    }

    /// Takes a block out.
    pub fn take(&mut self, block: u32) -> Option<Partial> {
        let _ = block;
        unimplemented!()
    }

    /// Throws a block away.
    pub fn forget(&mut self, block: u32) {
        let _ = block;
        unimplemented!()
    }

    /// Bytes of memory.
    pub fn bytes(&self) -> u64 {
        unimplemented!()
    }
}
