//! The suite that every [`Export`] passes: real images on both disk engines, mirrors, remote exports, wrappers.
//!
//! Everything is held against a plain vector of bytes. Sizes and offsets are chosen by what they reach (edges of
//! blocks and chunks, single bytes, the end, everything), the rest by a generator with a fixed seed.

use bytes::{Bytes, BytesMut};

use super::{Context, Export, TryRead, assemble};
use crate::error::ErrorKind;
use crate::nbd::request::{Durability, ZeroMode};
use crate::nbd::wire::Allocation;
use crate::ranges::ByteRange;
use crate::units::{to_u64, to_usize};

/// Holds `export` against `contents`, which are its bytes now. A writable export is changed.
///
/// # Panics
///
/// With the operation that gave something else than the contract says.
pub async fn check(export: &dyn Export, mut contents: Vec<u8>) {
    let facts = export.facts();
    assert_eq!(facts.size, to_u64(contents.len()), "size");
    assert!(facts.block_sizes.is_sound(), "block sizes");
    check_reads(export, &contents).await;
    check_extents(export, &contents).await;
    if facts.writable {
        check_writes(export, &mut contents).await;
        check_extents(export, &contents).await;
    } else {
        check_refusals(export).await;
    }
    export.cache(ByteRange::between(0, facts.size)).await.expect("cache");
    check_reads(export, &contents).await;
}

/// Bytes without a pattern that a mistake of offset could hide in, with stretches of zeroes in them.
pub fn sample_contents(length: usize, seed: u64) -> Vec<u8> {
    let mut random = Random(seed | 1);
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        if random.below(50) == 0 {
            let zeroes = to_usize(random.below(200_000));
            bytes.resize((bytes.len() + zeroes).min(length), 0);
        } else {
            (0..64).for_each(|_| bytes.extend(random.number().to_le_bytes()));
        }
    }
    bytes.truncate(length);
    bytes
}

/// A small generator (xorshift64*, Vigna 2016), so that failures repeat.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// A generator that starts from `seed`.
    pub const fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    /// Any number.
    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `bound`, which is not zero.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.number() % bound
    }

    /// A range within `size` bytes, of at most `longest`; may be empty.
    pub fn range(&mut self, size: u64, longest: u64) -> ByteRange {
        let start = self.below(size + 1);
        let length = self.below(longest.min(size - start) + 1);
        ByteRange::between(start, start + length)
    }
}

/// Ranges that reach edges: of blocks, of chunks, of the image.
fn interesting(size: u64) -> Vec<ByteRange> {
    let mut ranges = vec![ByteRange::between(0, size), ByteRange::between(0, 0), ByteRange::between(size, size)];
    for edge in [1, 512, 4096, 65_536, 131_072, 1 << 20, size / 2, size] {
        for start in [edge.saturating_sub(1), edge, edge + 1, edge.saturating_sub(4096)] {
            for length in [1, 2, 511, 4096, 4097, 65_536, 100_000] {
                ranges.push(ByteRange::between(start.min(size), (start + length).min(size)));
            }
        }
    }
    ranges
}

async fn check_read(export: &dyn Export, contents: &[u8], range: ByteRange) {
    let expected = &contents[to_usize(range.start())..to_usize(range.end())];
    let pieces = export.read(range).await.unwrap_or_else(|error| panic!("read {range:?}: {}", error.chain()));
    assert!(pieces.iter().all(|piece| piece.length() > 0), "an empty piece in {range:?}");
    assert!(assemble(&pieces) == expected, "wrong bytes in {range:?}");
    let mut output = BytesMut::from(&b"before"[..]);
    match export.try_read(range, &mut output) {
        TryRead::Data => assert!(&output[6..] == expected, "wrong bytes inline in {range:?}"),
        TryRead::Hole => assert!(expected.iter().all(|byte| *byte == 0), "a hole over data in {range:?}"),
        TryRead::Wait => assert_eq!(&output[..], b"before", "bytes although it would wait in {range:?}"),
    }
    assert!(output.starts_with(b"before"), "what was there before {range:?} is gone");
}

async fn check_reads(export: &dyn Export, contents: &[u8]) {
    let size = to_u64(contents.len());
    for range in interesting(size) {
        check_read(export, contents, range).await;
    }
    let mut random = Random::new(7);
    for _ in 0..100 {
        check_read(export, contents, random.range(size, 200_000)).await;
    }
}

async fn check_extents(export: &dyn Export, contents: &[u8]) {
    let size = to_u64(contents.len());
    let mut random = Random::new(11);
    let mut ranges: Vec<_> = (0..20).map(|_| random.range(size, size)).collect();
    ranges.push(ByteRange::between(0, size));
    for range in ranges.into_iter().filter(|range| !range.is_empty()) {
        for context in export.facts().contexts {
            for limit in [1, 3, 100_000] {
                let extents = export.extents(range, context, limit).await.expect("extents");
                assert!((1..=limit).contains(&extents.len()), "{} extents of {limit}", extents.len());
                let mut at = range.start();
                for extent in extents {
                    assert!(extent.length > 0 && at + extent.length <= range.end(), "extents leave {range:?}");
                    let bytes = &contents[to_usize(at)..to_usize(at + extent.length)];
                    let zero = extent.status & u64::from(Allocation::ZERO.bits()) != 0;
                    if context == Context::Allocation && zero {
                        assert!(bytes.iter().all(|byte| *byte == 0), "data at {at} is called zero");
                    }
                    at += extent.length;
                }
            }
        }
    }
}

/// A change to an image.
#[derive(Debug)]
enum Change {
    Write(ByteRange, Bytes, Durability),
    Zero(ByteRange, ZeroMode, Durability),
    Trim(ByteRange, Durability),
    Flush,
}

fn any_change(random: &mut Random, size: u64) -> Change {
    let longest = if random.below(10) == 0 { 300_000 } else { 9_000 };
    let range = random.range(size, longest);
    let durability = if random.below(4) == 0 { Durability::Stable } else { Durability::Volatile };
    match random.below(10) {
        0..6 => {
            let data: Vec<u8> = (0..range.length()).map(|_| random.number().to_le_bytes()[3]).collect();
            Change::Write(range, data.into(), durability)
        }
        6..8 => Change::Zero(range, ZeroMode { may_punch: random.below(2) == 0, must_be_fast: false }, durability),
        8 => Change::Trim(range, durability),
        _ => Change::Flush,
    }
}

async fn check_writes(export: &dyn Export, contents: &mut [u8]) {
    let size = to_u64(contents.len());
    let mut random = Random::new(13);
    for _ in 0..200 {
        let change = any_change(&mut random, size);
        let result = match &change {
            Change::Write(range, data, durability) => {
                contents[to_usize(range.start())..to_usize(range.end())].copy_from_slice(data);
                export.write(range.start(), data.clone(), *durability).await
            }
            Change::Zero(range, mode, durability) => {
                contents[to_usize(range.start())..to_usize(range.end())].fill(0);
                export.write_zeroes(*range, *mode, *durability).await
            }
            Change::Trim(range, durability) => {
                let result = export.trim(*range, *durability).await;
                // Anything may be there now; whatever it is must stay.
                let now = assemble(&export.read(*range).await.expect("read after trim"));
                contents[to_usize(range.start())..to_usize(range.end())].copy_from_slice(&now);
                result
            }
            Change::Flush => export.flush().await,
        };
        if let Err(error) = result {
            panic!("{change:?}: {}", error.chain());
        }
        check_read(export, contents, random.range(size, 20_000)).await;
    }
    if export.facts().can_zero_fast {
        check_fast_zero(export, contents, size).await;
    }
    check_reads(export, contents).await;
}

/// A fast zeroing is either done or refused as unsupported without any effect.
async fn check_fast_zero(export: &dyn Export, contents: &mut [u8], size: u64) {
    for may_punch in [true, false] {
        let range = ByteRange::between(size / 3, size / 2);
        let mode = ZeroMode { may_punch, must_be_fast: true };
        match export.write_zeroes(range, mode, Durability::Volatile).await {
            Ok(()) => contents[to_usize(range.start())..to_usize(range.end())].fill(0),
            Err(error) => assert_eq!(error.kind(), ErrorKind::Unsupported, "fast zero"),
        }
        check_read(export, contents, range).await;
    }
}

async fn check_refusals(export: &dyn Export) {
    let range = ByteRange::between(0, 1.min(export.facts().size));
    let mode = ZeroMode { may_punch: true, must_be_fast: false };
    let results = [
        export.write(0, Bytes::from_static(b"x"), Durability::Volatile).await,
        export.write_zeroes(range, mode, Durability::Volatile).await,
        export.trim(range, Durability::Volatile).await,
    ];
    for result in results {
        assert_eq!(result.expect_err("a read-only export took a write").kind(), ErrorKind::Permission);
    }
    export.flush().await.expect("flush");
}
