//! Readahead held against readers that are known: what it fetches of what they read, how far ahead, and how much else.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::units::{GIB, to_u64, to_usize};

const CHUNK: u64 = 64 * KIB;

/// A small generator: the same numbers in each run (xorshift, Marsaglia 2003).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 11) % bound
    }

    /// Zipf with an exponent of about 1: the rank is `count^u`.
    fn zipf(&mut self, count: u64) -> u64 {
        #[expect(
            clippy::cast_precision_loss,
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "small"
        )]
        let rank = (count as f64).powf(self.below(1 << 40) as f64 / (1u64 << 40) as f64) as u64 - 1;
        rank.min(count - 1)
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for index in (1..items.len()).rev() {
            items.swap(index, to_usize(self.below(to_u64(index) + 1)));
        }
    }
}

/// What a mirror would fetch, in chunks.
struct Cache {
    readahead: Readahead,
    size: u64,
    here: BTreeSet<u64>,
    demanded: BTreeSet<u64>,
    misses: u64,
    wishes: Vec<ByteRange>,
}

impl Cache {
    fn new(size: u64) -> Self {
        let readahead = Readahead::new(Limits::default(), size);
        Self { readahead, size, here: BTreeSet::new(), demanded: BTreeSet::new(), misses: 0, wishes: Vec::new() }
    }

    /// Reads, and has all wishes fetched before the next read. Whether the read found all its bytes.
    fn read(&mut self, start: u64, length: u64) -> bool {
        let range = ByteRange::new(start, length).unwrap();
        let missing = chunks(range).filter(|chunk| self.here.insert(*chunk)).count();
        self.misses += to_u64(missing);
        self.demanded.extend(chunks(range));
        self.wishes.clear();
        self.readahead.note(range, &mut self.wishes);
        assert!(self.wishes.len() <= 64);
        for wish in &self.wishes {
            assert!(wish.end() <= self.size && !wish.is_empty(), "{wish:?}");
            self.here.extend(chunks(*wish));
        }
        missing == 0
    }

    /// Chunks fetched for each that a reader needed.
    fn cost(&self) -> f64 {
        ratio(self.here.len(), self.demanded.len())
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts of a test")]
fn ratio(one: usize, other: usize) -> f64 {
    one as f64 / other as f64
}

fn chunks(range: ByteRange) -> std::ops::RangeInclusive<u64> {
    range.start() / CHUNK..=(range.end() - 1) / CHUNK
}

#[test]
fn random_reads_cost_next_to_nothing() {
    for (size, reads) in [(16 * MIB, 256), (16 * MIB, 4096), (64 * MIB, 2000), (GIB, 20_000), (64 * GIB, 50_000)] {
        for seed in 1..6 {
            let (mut uniform, mut zipf, mut sorted) = (Cache::new(size), Cache::new(size), Cache::new(size));
            let mut random = Random(seed * 0x9e37_79b9_7f4a_7c15);
            for _ in 0..reads {
                uniform.read(random.below(size / 4096) * 4096, 4096);
                let rank = random.zipf(size / 4096);
                zipf.read(rank.wrapping_mul(0x9e37_79b1) % (size / 4096) * 4096, 4096);
                sorted.read(rank * 4096, 4096);
            }
            println!("{size} {reads}: {:.3} {:.3} {:.3}", uniform.cost(), zipf.cost(), sorted.cost());
        }
    }
}

#[test]
fn the_recorded_boot_is_fetched_with_little_else() {
    let text = include_str!("../../../tests/data/boot-debian12-web.csv");
    let mut cache = Cache::new(2 * GIB);
    for line in text.lines().skip(1) {
        let fields: Vec<_> = line.split(',').collect();
        if fields[1] == "read" {
            cache.read(fields[2].parse().unwrap(), fields[3].parse().unwrap());
        }
    }
    println!("boot: {:.3} of {}, misses {}", cache.cost(), cache.demanded.len(), cache.misses);
    println!("{:?}", cache.readahead.figures());
}

fn sequential(length: u64, depth: usize, total: u64) -> (u64, u64, u64) {
    let mut cache = Cache::new(GIB);
    let mut order: Vec<u64> = (0..total / length).collect();
    let mut random = Random(7);
    for part in order.chunks_mut(depth) {
        random.shuffle(part);
    }
    let mut late = 0;
    for block in order {
        late += u64::from(!cache.read(block * length, length));
    }
    (late, to_u64(cache.here.len()) * CHUNK, cache.readahead.figures().unmatched)
}

#[test]
fn a_sequential_reader_is_met() {
    for length in [512, 4096, 16384, 65536, 131_072, 1 << 20] {
        for depth in [1, 2, 4, 16, 64] {
            println!("{length} x{depth}: {:?}", sequential(length, depth, 128 * MIB));
        }
    }
}

proptest! {
    #[test]
    fn wishes_stay_within_image_and_window(
        size in 1u64..40 * MIB,
        reads in prop::collection::vec((any::<u64>(), 1u64..200_000, 1u64..40), 1..40),
    ) {
        let mut cache = Cache::new(size);
        for (start, length, count) in reads {
            let start = start % size;
            for index in 0..count {
                let at = start + index * length;
                if at + length <= size {
                    cache.read(at, length);
                }
            }
        }
        let figures = cache.readahead.figures();
        prop_assert!(figures.matched + figures.unmatched <= figures.wished);
    }
}
