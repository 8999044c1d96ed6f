//! Images of random bytes: nothing in them is a hole, is alike, or can be made smaller.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use headwater::units::{MIB, to_usize};
use replay::trace::Trace;

use crate::Lab;
use crate::bed::output;

/// Data are made in blocks of this size. Around each read of a trace there is so much, so that what is fetched in vain
/// costs what it would cost with a real image; the rest is a hole.
const BLOCK: u64 = MIB;

/// An image in which a recorded machine finds data wherever it reads.
pub(crate) fn for_trace(lab: &Lab, trace: &Trace) -> anyhow::Result<PathBuf> {
    let path = lab.scratch().join("image.raw");
    make(&path, trace.end().next_multiple_of(BLOCK), blocks(trace))?;
    Ok(path)
}

/// An image that is full.
pub(crate) fn full(lab: &Lab, size: u64) -> anyhow::Result<PathBuf> {
    let path = lab.scratch().join("image.raw");
    let size = size.next_multiple_of(BLOCK);
    make(&path, size, (0..size / BLOCK).collect())?;
    Ok(path)
}

/// An image with so many bytes of data, and a hole after every fourth block of them.
pub(crate) fn with_holes(lab: &Lab, data: u64) -> anyhow::Result<PathBuf> {
    let path = lab.scratch().join("image.raw");
    let count = data.div_ceil(BLOCK);
    let blocks: Vec<u64> = (0..count).map(|index| index + index / 4).collect();
    make(&path, (count + count.div_ceil(4)) * BLOCK, blocks)?;
    Ok(path)
}

/// An image of this name, whose first half is full and whose second half has holes.
pub(crate) fn named(lab: &Lab, name: &str, half: u64) -> anyhow::Result<PathBuf> {
    let path = lab.scratch().join(format!("{name}.raw"));
    let half = half / BLOCK;
    let sparse = (half..half * 2).filter(|block| block / 32 % 3 == 0);
    make(&path, half * 2 * BLOCK, (0..half).chain(sparse).collect())?;
    Ok(path)
}

/// The blocks that a trace touches, in order.
fn blocks(trace: &Trace) -> Vec<u64> {
    let of = |range: headwater::ranges::ByteRange| range.start() / BLOCK..range.end().div_ceil(BLOCK);
    let mut blocks: Vec<u64> = trace.reads.iter().flat_map(|read| of(read.range)).collect();
    blocks.sort_unstable();
    blocks.dedup();
    blocks
}

fn make(path: &Path, size: u64, blocks: Vec<u64>) -> anyhow::Result<()> {
    let file = File::create(path)?;
    file.set_len(size)?;
    let mut bytes = vec![0; to_usize(BLOCK)];
    for block in blocks {
        fill(&mut bytes, block);
        file.write_all_at(&bytes, block * BLOCK)?;
    }
    Ok(())
}

/// Bytes without a pattern: a linear congruential generator, whose upper bits are the good ones.
fn fill(bytes: &mut [u8], seed: u64) {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    for word in bytes.chunks_exact_mut(8) {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        word.copy_from_slice(&(state ^ (state >> 32)).to_le_bytes());
    }
}

/// Makes an image's manifest, which gives it an identity; profiles are kept by it.
pub(crate) fn index(lab: &Lab, image: &Path) -> anyhow::Result<()> {
    if !lab.common.no_manifest {
        crate::tell("making the manifest");
        output(Command::new(&lab.headwater).arg("index").arg(image))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_data_around_each_read_and_nowhere_else() {
        let trace = Trace::parse("seconds,op,offset,bytes\n0,read,1048575,2\n1,read,5242880,1\n2,read,0,1\n").unwrap();
        assert_eq!(blocks(&trace), [0, 1, 5]);
    }

    #[test]
    fn blocks_differ_and_are_the_same_each_time() {
        let of = |seed| {
            let mut bytes = vec![0; 65536];
            fill(&mut bytes, seed);
            bytes
        };
        assert_eq!(of(1), of(1));
        let mut chunks: Vec<Vec<u8>> = [of(0), of(1), of(2)].concat().chunks(4096).map(<[u8]>::to_vec).collect();
        let count = chunks.len();
        chunks.sort_unstable();
        chunks.dedup();
        assert_eq!(chunks.len(), count);
    }
}
