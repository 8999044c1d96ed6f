//! What a connection knows of the data on the server, and holds replies against.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use headwater::units::{to_u64, to_usize};

use crate::pattern::{How, Stamp, Wrong};

/// How data are checked.
#[derive(Debug)]
pub(crate) enum Ledger {
    /// Not at all.
    Unchecked,
    /// By the pattern.
    Pattern(Blocks),
    /// By the bytes of a file.
    Image {
        /// The file.
        file: Arc<File>,
        /// What is read from it.
        buffer: Vec<u8>,
    },
}

/// What one connection has written to its share of the blocks.
#[derive(Debug)]
pub(crate) struct Blocks {
    stamp: Stamp,
    /// The first block of the share.
    first: u64,
    /// The version of each block, [`UNKNOWN`] or one with the [`BUSY`] bit.
    versions: Vec<u64>,
    /// The version that was written last. No two writes have the same.
    last: u64,
}

/// Not written by this run.
const UNKNOWN: u64 = 0;
/// A request for the block is in flight: another one now could be answered by either state.
const BUSY: u64 = 1 << 63;

impl Ledger {
    /// A ledger of `count` blocks from `first` on, of which nothing is known.
    pub(crate) fn pattern(stamp: Stamp, first: u64, count: u64) -> Self {
        Self::Pattern(Blocks { stamp, first, versions: vec![UNKNOWN; to_usize(count)], last: UNKNOWN })
    }

    /// Whether replies are looked at.
    pub(crate) const fn checks(&self) -> bool {
        !matches!(self, Self::Unchecked)
    }

    /// Whether the bytes of `block` are known from a write of this run.
    pub(crate) fn knows(&self, block: u64) -> bool {
        match self {
            Self::Pattern(blocks) => *blocks.version(block) & !BUSY != UNKNOWN,
            Self::Unchecked | Self::Image { .. } => false,
        }
    }

    /// Begins a request for `block`; false if one is in flight.
    pub(crate) fn claim(&mut self, block: u64) -> bool {
        let Self::Pattern(blocks) = self else { return true };
        let version = blocks.version_mut(block);
        let free = *version & BUSY == 0;
        *version |= BUSY;
        free
    }

    /// Fills the payload of a write that begins, and gives its version.
    pub(crate) fn fill(&mut self, payload: &mut [u8], offset: u64) -> u64 {
        let Self::Pattern(blocks) = self else { return UNKNOWN };
        blocks.last += 1;
        blocks.stamp.write(payload, offset, blocks.last);
        blocks.last
    }

    /// A write of `block` is over. After a failure, either state may be there.
    pub(crate) fn written(&mut self, block: u64, version: u64, succeeded: bool) {
        if let Self::Pattern(blocks) = self {
            *blocks.version_mut(block) = if succeeded { version } else { UNKNOWN };
        }
    }

    /// A read of `block` has brought `data`, or nothing.
    pub(crate) fn read(&mut self, block: u64, offset: u64, data: Option<&[u8]>) -> anyhow::Result<Result<(), Wrong>> {
        match self {
            Self::Unchecked => Ok(Ok(())),
            Self::Pattern(blocks) => {
                let version = blocks.version_mut(block);
                *version &= !BUSY;
                let wanted = (*version != UNKNOWN).then_some(*version);
                Ok(data.map_or(Ok(()), |data| blocks.stamp.check(data, offset, wanted)))
            }
            Self::Image { file, buffer } => {
                let Some(data) = data else { return Ok(Ok(())) };
                buffer.resize(data.len(), 0);
                file.read_exact_at(buffer, offset)?;
                Ok(compare(data, buffer, offset))
            }
        }
    }
}

/// The first byte that differs.
fn compare(data: &[u8], image: &[u8], offset: u64) -> Result<(), Wrong> {
    // Almost always equal, which one comparison of all finds out fastest.
    if data == image {
        return Ok(());
    }
    let at = data.iter().zip(image).take_while(|(left, right)| left == right).count();
    Err(Wrong { offset: offset + to_u64(at), how: How::NotTheImage })
}

impl Blocks {
    fn version(&self, block: u64) -> &u64 {
        &self.versions[to_usize(block - self.first)]
    }

    fn version_mut(&mut self, block: u64) -> &mut u64 {
        &mut self.versions[to_usize(block - self.first)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u32 = 512;

    fn ledger() -> Ledger {
        Ledger::pattern(Stamp::new(1, SIZE, 0).unwrap(), 10, 4)
    }

    fn write(ledger: &mut Ledger, block: u64) -> Vec<u8> {
        let mut data = vec![0; SIZE as usize];
        assert!(ledger.claim(block));
        let version = ledger.fill(&mut data, block * 512);
        ledger.written(block, version, true);
        data
    }

    fn read(ledger: &mut Ledger, block: u64, data: &[u8]) -> Option<How> {
        assert!(ledger.claim(block));
        ledger.read(block, block * 512, Some(data)).unwrap().err().map(|wrong| wrong.how)
    }

    #[test]
    fn only_the_last_write_is_right() {
        let mut ledger = ledger();
        let old = write(&mut ledger, 12);
        let new = write(&mut ledger, 12);
        assert_eq!(read(&mut ledger, 12, &new), None);
        assert_eq!(read(&mut ledger, 12, &old), Some(How::OtherVersion { found: 1, wanted: 2 }));
        assert!(ledger.knows(12) && !ledger.knows(13));
    }

    #[test]
    fn without_a_write_any_version_is_right_and_no_other_data() {
        let mut ledger = ledger();
        let data = write(&mut ledger, 12);
        ledger.written(12, 0, false);
        assert_eq!(read(&mut ledger, 12, &data), None);
        assert_eq!(read(&mut ledger, 13, &data), Some(How::Misplaced { from: 12 * 512 }));
    }

    #[test]
    fn a_block_has_one_request_at_a_time() {
        let mut ledger = ledger();
        assert!(ledger.claim(11));
        assert!(!ledger.claim(11));
        ledger.written(11, 1, true);
        assert!(ledger.claim(11));
        assert!(ledger.read(11, 0, None).unwrap().is_ok());
        assert!(ledger.claim(11));
        assert!(Ledger::Unchecked.claim(11) && Ledger::Unchecked.claim(11));
    }

    #[test]
    fn images_are_compared_to_the_byte() {
        let mut data = vec![7; 100];
        assert_eq!(compare(&data, &[7; 100], 5000), Ok(()));
        data[60] = 8;
        assert_eq!(compare(&data, &[7; 100], 5000), Err(Wrong { offset: 5060, how: How::NotTheImage }));
    }
}
