//! What is sent in which order, cut into blocks and symbols.
//!
//! STUB

use thiserror::Error;

use super::form::{Page, Run, Terms};
use crate::ranges::ByteRange;

/// Why there is nothing that can be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum LayoutError {
    /// All of it is zero, or nothing was named.
    #[error("there is nothing to send: all of it is zero")]
    Empty,
    /// Chunks or blocks are numbered with 32 bits.
    #[error("the image has too many chunks")]
    TooLarge,
    /// The terms or the plan make no sense.
    #[error("the plan makes no sense")]
    Broken,
}

/// What a session sends. Sender and receivers make the same one, from the terms, the plan, and what the manifest says is
/// zero.
#[derive(Debug)]
pub struct Layout;

impl Layout {
    /// The layout of a session whose plan is `runs`: what is sent first, in this order. A chunk that the plan has twice is
    /// sent the first time. `is_zero` is asked once for each chunk of the manifest.
    pub fn new(terms: &Terms, runs: Vec<Run>, is_zero: impl Fn(u64) -> bool) -> Result<Self, LayoutError> {
        let _ = (terms, runs, is_zero);
        unimplemented!()
    }

    /// The number of blocks, those with one chunk at least.
    pub fn blocks(&self) -> u32 {
        unimplemented!()
    }

    /// Bytes of image in all blocks.
    pub fn bytes(&self) -> u64 {
        unimplemented!()
    }

    /// Bytes of image in a block.
    pub fn length(&self, block: u32) -> u64 {
        let _ = block;
        unimplemented!()
    }

    /// Data symbols of a block. The last one is filled up with zeroes.
    pub fn symbols(&self, block: u32) -> u16 {
        let _ = block;
        unimplemented!()
    }

    /// Where the bytes of a block are in the image, in the order in which they are in the block.
    pub fn ranges(&self, block: u32) -> Vec<ByteRange> {
        let _ = block;
        unimplemented!()
    }

    /// What the session brings, zeroes in between included: in order, apart from each other, merged.
    pub fn covers(&self) -> Vec<ByteRange> {
        unimplemented!()
    }
}

/// Cuts a plan into pages that fit a datagram of so many bytes, and gives a digest of it. Of a plan that would need more
/// than [`MOST_PAGES`] the smallest gaps are closed first.
pub fn pages(runs: &[Run], datagram: usize) -> (Vec<Page>, u64) {
    let _ = (runs, datagram);
    unimplemented!()
}

/// Puts the pages of a plan together as they come.
#[derive(Debug, Default)]
pub struct Plan;

impl Plan {
    /// Takes a page. Gives the plan once it is whole.
    pub fn take(&mut self, terms: &Terms, page: Page) -> Option<Vec<Run>> {
        let _ = (terms, page);
        unimplemented!()
    }
}

/// Pages of a plan.
pub const MOST_PAGES: u16 = 64;
