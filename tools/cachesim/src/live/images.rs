//! Images of random bytes, of which every block says where it belongs.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::ensure;
use headwater::export::Piece;
use headwater::ranges::ByteRange;
use headwater::units::{MIB, to_usize};

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
        for block in (start.next_multiple_of(BLOCK)..end.saturating_sub(7)).step_by(to_usize(BLOCK)) {
            let Piece::Data(data) = piece else { anyhow::bail!("image {image}: a hole at {block}") };
            let at = to_usize(block - start);
            ensure!(data[at..at + 8] == word(image, block), "image {image}: wrong bytes at {block}");
        }
        start = end;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_elsewhere_are_found() {
        let directory = tempfile::tempdir().unwrap();
        let (path, cut) = (directory.path().join("image"), Cut { chunk: 65_536 });
        make(&path, 3, &[ByteRange::between(70_000, 80_000), ByteRange::between(131_072, 131_073)], cut).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        assert!(bytes[..65_536].iter().all(|byte| *byte == 0));
        let read = |start: usize, end: usize| [Piece::Data(bytes[start..end].to_vec().into())];
        assert!(check(3, 70_000, &read(70_000, 90_000)).is_ok());
        assert!(check(3, 131_072, &read(131_072, 196_608)).is_ok());
        assert!(check(4, 70_000, &read(70_000, 90_000)).is_err());
        assert!(check(3, 70_000, &read(74_096, 94_096)).is_err());
        assert!(check(3, 70_000, &[Piece::Hole(20_000)]).is_err());
    }
}
