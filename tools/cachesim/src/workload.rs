//! What is read: deployments of machines from some images.

use std::fmt;
use std::path::Path;

use anyhow::{Context, ensure};
use clap::ValueEnum;
use headwater::mirror::policy::Segment;
use headwater::ranges::ByteRange;
use headwater::units::{MIB, to_usize};

/// Bytes of one read where a whole image is read in order: what Linux reads ahead from a block device.
const READ: u64 = 128 << 10;

/// How the image of the next deployment is chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Choice {
    /// Each image is as likely as any other.
    Uniform,
    /// Two images make 80 % of the deployments.
    Skewed,
    /// Like skewed, but after each quarter two other images are the popular ones.
    Moving,
    /// One image after another, in turn.
    Cyclic,
    /// Every second deployment is of one of two images, the others take the rest in turn.
    Scan,
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Uniform => "uniform",
            Self::Skewed => "skewed",
            Self::Moving => "moving",
            Self::Cyclic => "cyclic",
            Self::Scan => "scan",
        })
    }
}

/// A chunk that is read, or a part of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Access {
    pub(crate) segment: Segment,
    /// Counted within the segment.
    pub(crate) chunk: u32,
    /// That are read of it.
    pub(crate) bytes: u64,
}

/// How an image is cut.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cut {
    /// Bytes of a chunk.
    pub(crate) chunk: u64,
}

impl Cut {
    /// Bytes of a segment.
    pub(crate) fn segment(self) -> u64 {
        self.chunk.max(MIB)
    }

    fn accesses(self, image: u32, read: ByteRange) -> impl Iterator<Item = Access> {
        let (first, last) = (read.start() / self.chunk, (read.end() - 1) / self.chunk);
        (first..=last).map(move |chunk| {
            let start = chunk * self.chunk;
            let bytes = ByteRange::between(start, start + self.chunk).intersect(read).length();
            let per_segment = self.segment() / self.chunk;
            let number = u32::try_from(chunk / per_segment).expect("image sizes are checked");
            let chunk = u32::try_from(chunk % per_segment).expect("at most a MiB of chunks");
            Access { segment: Segment { image, number }, chunk, bytes }
        })
    }
}

/// The reads of a deployment that reads all of an image.
pub(crate) fn whole_image(size: u64) -> Vec<ByteRange> {
    ByteRange::between(0, size).pieces(READ).collect()
}

/// The reads of a recorded boot: a CSV file with the columns `seconds,op,offset,bytes`.
pub(crate) fn recorded_boot(path: &Path) -> anyhow::Result<Vec<ByteRange>> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let mut reads = Vec::new();
    for (index, line) in text.lines().enumerate().skip(1) {
        let columns: Vec<_> = line.split(',').collect();
        let [_, operation, offset, bytes] = columns[..] else { anyhow::bail!("line {}: not four columns", index + 1) };
        if operation == "read" {
            let range = ByteRange::new(offset.parse()?, bytes.parse()?).context("a read beyond 64 bits")?;
            reads.extend((!range.is_empty()).then_some(range));
        }
    }
    ensure!(!reads.is_empty(), "{}: no reads", path.display());
    Ok(reads)
}

/// Numbers that look random and are the same for the same seed (SplitMix64).
#[derive(Debug)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    /// Less than `end`. The bias of the remainder is far below what is looked at here.
    fn below(&mut self, end: u32) -> u32 {
        u32::try_from((self.next() >> 32) % u64::from(end)).expect("less than end")
    }
}

/// The images of the deployments, in order. There must be three images at least.
pub(crate) fn choose(choice: Choice, images: u32, deployments: u32, seed: u64) -> Vec<u32> {
    let mut random = Random(seed);
    let skewed = |random: &mut Random| {
        if random.below(100) < 80 { random.below(2) } else { 2 + random.below(images - 2) }
    };
    let one = |number: u32| match choice {
        Choice::Uniform => random.below(images),
        Choice::Skewed => skewed(&mut random),
        Choice::Moving => (skewed(&mut random) + 2 * (4 * number / deployments)) % images,
        Choice::Cyclic => number % images,
        Choice::Scan if number.is_multiple_of(2) => random.below(2),
        Choice::Scan => 2 + number / 2 % (images - 2),
    };
    (0..deployments).map(one).collect()
}

/// What these deployments read, `at_once` of them at a time: each makes a read, then the next one does.
pub(crate) fn accesses(deployments: &[u32], reads: &[ByteRange], cut: Cut, at_once: usize) -> Vec<Access> {
    let mut accesses = Vec::new();
    let mut waiting = deployments.iter();
    let mut running: Vec<_> = waiting.by_ref().take(at_once).map(|image| (*image, reads.iter())).collect();
    while !running.is_empty() {
        let mut slot = 0;
        while slot < running.len() {
            let (image, left) = &mut running[slot];
            if let Some(read) = left.next() {
                accesses.extend(cut.accesses(*image, *read));
                slot += 1;
            } else if let Some(image) = waiting.next() {
                running[slot] = (*image, reads.iter());
            } else {
                drop(running.remove(slot));
            }
        }
    }
    accesses
}

/// A chunk as one number, for tables.
pub(crate) fn name(access: Access, cut: Cut) -> u64 {
    let per_segment = cut.segment() / cut.chunk;
    u64::from(access.segment.image) << 40 | (u64::from(access.segment.number) * per_segment + u64::from(access.chunk))
}

/// Chunks that are read at least once.
pub(crate) fn distinct(accesses: &[Access], cut: Cut) -> usize {
    let mut names: Vec<_> = accesses.iter().map(|access| name(*access, cut)).collect();
    names.sort_unstable();
    names.dedup();
    names.len()
}

/// The number of segments of the longest image.
pub(crate) fn segments(accesses: &[Access]) -> u32 {
    accesses.iter().map(|access| access.segment.number + 1).max().unwrap_or(0)
}

/// The number of images.
pub(crate) fn images(accesses: &[Access]) -> usize {
    accesses.iter().map(|access| to_usize(access.segment.image.into()) + 1).max().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_are_cut_at_chunks_and_chunks_belong_to_segments() {
        let cut = Cut { chunk: 65_536 };
        let read = ByteRange::new(MIB - 100, 200).unwrap();
        let segment = |number| Segment { image: 3, number };
        let expected = [
            Access { segment: segment(0), chunk: 15, bytes: 100 },
            Access { segment: segment(1), chunk: 0, bytes: 100 },
        ];
        assert_eq!(cut.accesses(3, read).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn two_images_make_four_fifths_of_a_skewed_choice() {
        let chosen = choose(Choice::Skewed, 8, 10_000, 1);
        let popular = chosen.iter().filter(|image| **image < 2).count();
        assert!((7_800..8_200).contains(&popular), "{popular}");
        assert_eq!(chosen, choose(Choice::Skewed, 8, 10_000, 1));
        assert_ne!(chosen, choose(Choice::Skewed, 8, 10_000, 2));
    }

    #[test]
    fn deployments_at_once_take_turns_and_all_are_finished() {
        let cut = Cut { chunk: MIB };
        let reads = [ByteRange::new(0, 1).unwrap(), ByteRange::new(MIB, 1).unwrap()];
        let order: Vec<_> = accesses(&[0, 1, 2], &reads, cut, 2)
            .iter()
            .map(|access| (access.segment.image, access.segment.number))
            .collect();
        assert_eq!(order, [(0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (2, 1)]);
    }
}
