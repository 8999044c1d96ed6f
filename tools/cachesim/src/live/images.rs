//! Images of random bytes, of which every block says where it belongs.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::ensure;
use headwater::export::Piece;
use headwater::ranges::ByteRange;
use headwater::units::{MIB, to_u64};

use crate::workload::{Cut, Random};

/// The first word of each block of so many bytes is looked at when it is read.
const BLOCK: u64 = 4096;

/// The word at `offset` of an image.
fn word(image: u32, offset: u64) -> [u8; 8] {
    Random(u64::from(image) << 48 | offset).next().to_le_bytes()
}

/// Writes what `reads` touch of an image, in whole chunks. The rest is a hole.
pub(super) fn make(path: &Path, image: u32, reads: &[ByteRange], cut: Cut) -> anyhow::Result<()> {
    let file = File::create(path)?;
    let end = reads.iter().map(|read| read.end()).max().unwrap_or(0);
    file.set_len(end.next_multiple_of(MIB))?;
    let mut chunks: Vec<_> =
        reads.iter().flat_map(|read| read.start() / cut.chunk..read.end().div_ceil(cut.chunk)).collect();
    chunks.sort_unstable();
    chunks.dedup();
    for chunk in chunks {
        let start = chunk * cut.chunk;
        let words = (start..start + cut.chunk).step_by(8);
        let bytes: Vec<_> = words.flat_map(|offset| word(image, offset)).collect();
        file.write_all_at(&bytes, start)?;
    }
    Ok(())
}

/// Whether what was read at `offset` is of there.
pub(super) fn check(image: u32, offset: u64, pieces: &[Piece]) -> anyhow::Result<()> {
    let mut start = offset;
    for piece in pieces {
        let end = start + piece.length();
        for block in (start.next_multiple_of(BLOCK)..end.saturating_sub(7)).step_by(8 * 512) {
            let Piece::Data(data) = piece else { anyhow::bail!("image {image}: a hole at {block}") };
            let at = usize::try_from(block - start)?;
            ensure!(data[at..at + 8] == word(image, block), "image {image}: wrong bytes at {block}");
        }
        ensure!(to_u64(usize::try_from(piece.length())?) == piece.length(), "too long");
        start = end;
    }
    Ok(())
}
