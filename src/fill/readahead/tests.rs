//! Readahead held against readers that are known: what it fetches of what they read, how far ahead, and how much else.

use std::collections::{BTreeMap, BTreeSet};

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
    chunk: u64,
    here: BTreeSet<u64>,
    demanded: BTreeSet<u64>,
    misses: u64,
    wishes: Vec<ByteRange>,
}

impl Cache {
    fn new(size: u64) -> Self {
        Self::with_chunks(size, CHUNK)
    }

    fn with_chunks(size: u64, chunk: u64) -> Self {
        let readahead = Readahead::new(Limits { chunk, ..Limits::default() }, size);
        Self { readahead, size, chunk, here: BTreeSet::new(), demanded: BTreeSet::new(), misses: 0, wishes: Vec::new() }
    }

    /// Reads, and has all wishes fetched before the next read. Whether the read found all its bytes.
    fn read(&mut self, start: u64, length: u64) -> bool {
        let range = ByteRange::new(start, length).unwrap();
        let missing = chunks_of(range, self.chunk).filter(|chunk| self.here.insert(*chunk)).count();
        self.misses += to_u64(missing);
        self.demanded.extend(chunks_of(range, self.chunk));
        self.wishes.clear();
        self.readahead.note(range, &mut self.wishes);
        assert!(self.wishes.len() <= 64);
        for wish in &self.wishes {
            assert!(wish.end() <= self.size && !wish.is_empty(), "{wish:?}");
            self.here.extend(chunks_of(*wish, self.chunk));
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
    chunks_of(range, CHUNK)
}

fn chunks_of(range: ByteRange, chunk: u64) -> std::ops::RangeInclusive<u64> {
    range.start() / chunk..=(range.end() - 1) / chunk
}

/// Whether readahead costs at most one hundredth, or one chunk: nearly nothing is read near its neighbours by chance.
fn costs_nothing(cache: &Cache) -> bool {
    let most = cache.demanded.len() + (cache.demanded.len() / 100).max(2);
    cache.here.len() <= most
}

#[test]
fn random_reads_cost_at_most_a_hundredth_more() {
    for (size, reads) in [(16 * MIB, 256), (16 * MIB, 2048), (64 * MIB, 2000), (GIB, 20_000), (64 * GIB, 50_000)] {
        for seed in 1..9 {
            let (mut uniform, mut zipf) = (Cache::new(size), Cache::new(size));
            let mut random = Random(0x9e37_79b9_7f4a_7c15 >> seed);
            let blocks = size / 4096;
            for _ in 0..reads {
                uniform.read(random.below(blocks) * 4096, 4096);
                // Hot blocks are scattered by multiplying with an odd number.
                zipf.read(random.zipf(blocks).wrapping_mul(0x9e37_79b1) % blocks * 4096, 4096);
            }
            assert!(costs_nothing(&uniform), "uniform, {size}, seed {seed}: {}", uniform.cost());
            assert!(costs_nothing(&zipf), "zipf, {size}, seed {seed}: {}", zipf.cost());
        }
    }
}

#[test]
fn hot_blocks_that_are_neighbours_cost_at_most_a_twentieth_more() {
    for seed in 1..9 {
        let mut cache = Cache::new(16 * MIB);
        let mut random = Random(0x9e37_79b9_7f4a_7c15 >> seed);
        for _ in 0..1000 {
            cache.read(random.zipf(4096) * 4096, 4096);
        }
        assert!(cache.cost() <= 1.05, "seed {seed}: {}", cache.cost());
    }
}

/// The reads of a recorded boot.
fn recorded(text: &str) -> Vec<(u64, u64)> {
    let fields = text.lines().skip(1).map(|line| line.split(',').collect::<Vec<_>>());
    let reads = fields.filter(|fields| fields[1] == "read");
    reads.map(|fields| (fields[2].parse().unwrap(), fields[3].parse().unwrap())).collect()
}

#[test]
fn recorded_boots_are_fetched_with_little_else_and_fewer_misses() {
    let boots = [
        ("web", include_str!("../../../tests/data/boot-debian12-web.csv")),
        ("minimal", include_str!("../../../tests/data/boot-debian12-minimal.csv")),
    ];
    // The finer chunks are, the more of what is wished is a chunk that nobody reads; the coarser, the fewer misses can
    // be spared at all: most files are as long as one.
    for (chunk, most_cost, most_missed) in [(16 * KIB, 1.08, 0.90), (CHUNK, 1.05, 0.90), (256 * KIB, 1.05, 0.98)] {
        for (name, text) in boots {
            let mut cache = Cache::with_chunks(2 * GIB, chunk);
            recorded(text).into_iter().for_each(|(start, length)| _ = cache.read(start, length));
            let missed = ratio(to_usize(cache.misses), cache.demanded.len());
            let (cost, figures) = (cache.cost(), cache.readahead.figures());
            println!("{name}, {chunk}: {cost:.3} fetched, {missed:.3} missed, {figures:?}");
            assert!(cost <= most_cost, "{name}, {chunk}: {cost}");
            assert!(missed <= most_missed, "{name}, {chunk}: {missed}");
        }
    }
}

/// One reader: what it reads, in order.
type Reader = Vec<ByteRange>;

/// `total` bytes from `start` by reads of `length`, of which each `depth` come in any order.
fn upwards(start: u64, length: u64, total: u64, depth: usize, seed: u64) -> Reader {
    let mut reads: Reader = ByteRange::new(start, total).unwrap().pieces(length).collect();
    let mut random = Random(seed);
    reads.chunks_mut(depth).for_each(|part| random.shuffle(part));
    reads
}

fn downwards(length: u64, total: u64) -> Reader {
    let mut reads = upwards(100 * MIB, length, total, 1, 1);
    reads.reverse();
    reads
}

fn strided(length: u64, stride: u64, total: u64, depth: usize) -> Reader {
    let all = upwards(0, length, total, 1, 1);
    let mut reads: Reader =
        all.into_iter().map(|read| ByteRange::new(read.start() / length * stride, length).unwrap()).collect();
    // The first come in order: it takes some to see that they are equally far apart.
    let mut random = Random(5);
    reads[8..].chunks_mut(depth).for_each(|part| random.shuffle(part));
    reads
}

/// What came of reading.
struct Outcome {
    /// Of reads after the first `settled` bytes of their reader: how many bytes this had read between the wish and the
    /// read, at least.
    least_lead: u64,
    /// Reads that found a chunk missing.
    missed: u64,
    /// Bytes fetched that nobody read.
    useless: u64,
    figures: Figures,
}

/// Lets readers take turns over one connection.
fn play(readers: &[Reader], settled: u64) -> Outcome {
    let mut cache = Cache::new(4 * GIB);
    let mut wished: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    let mut done = vec![0; readers.len()];
    let (mut missed, mut least_lead) = (0, u64::MAX);
    for turn in 0..readers.iter().map(Vec::len).max().unwrap_or(0) {
        for (number, reader) in readers.iter().enumerate() {
            let Some(read) = reader.get(turn) else { continue };
            if done[number] >= settled {
                for chunk in chunks(*read) {
                    let at = wished.get(&chunk).map(|positions| done[number] - positions[number]);
                    least_lead = least_lead.min(at.unwrap_or(0));
                }
            }
            missed += u64::from(!cache.read(read.start(), read.length()));
            done[number] += read.length();
            for chunk in cache.wishes.iter().copied().flat_map(chunks) {
                wished.entry(chunk).or_insert_with(|| done.clone());
            }
        }
    }
    let useless = to_u64(cache.here.len() - cache.demanded.len()) * CHUNK;
    Outcome { least_lead, missed, useless, figures: cache.readahead.figures() }
}

#[test]
fn a_sequential_reader_finds_what_it_needs_long_before_it_comes_there() {
    for length in [512, 4096, 16 * KIB, 64 * KIB, 128 * KIB, MIB] {
        let outcome = play(&[upwards(0, length, 128 * MIB, 1, 1)], 64 * MIB);
        assert!(outcome.least_lead >= 14 * MIB, "{length}: {} ahead", outcome.least_lead);
        assert!(outcome.missed <= 3, "{length}: {} missed", outcome.missed);
        assert!(outcome.useless <= 17 * MIB, "{length}: {} useless", outcome.useless);
        assert!(outcome.figures.matched >= 124 * MIB, "{length}: {:?}", outcome.figures);
    }
}

#[test]
fn requests_that_overtake_each_other_are_one_stream() {
    for length in [4096, 16 * KIB, 64 * KIB, 128 * KIB] {
        for depth in [2, 4, 16, 64] {
            for seed in 1..4 {
                let outcome = play(&[upwards(MIB, length, 128 * MIB, depth, seed)], 64 * MIB);
                let name = format!("{length} x{depth}, seed {seed}");
                let Outcome { least_lead, missed, useless, figures } = outcome;
                assert!(least_lead >= 4 * MIB, "{name}: {least_lead} ahead, {missed} missed, {figures:?}");
                // A jump is believed to come from disorder only when that has been seen.
                assert!(missed <= 16 + 2 * to_u64(depth), "{name}: {missed} missed");
                assert!(useless <= 17 * MIB, "{name}: {useless} useless");
            }
        }
    }
}

#[test]
fn interleaved_readers_are_told_apart() {
    for length in [4096, 64 * KIB, 128 * KIB] {
        for apart in [101 * MIB, 128 * MIB] {
            let readers: Vec<_> = (0..8).map(|n| upwards(n * apart, length, 80 * MIB, 4, n + 1)).collect();
            let outcome = play(&readers, 56 * MIB);
            assert!(outcome.least_lead >= 14 * MIB, "{length}: {} ahead", outcome.least_lead);
            assert!(outcome.missed <= 8 * 20, "{length}: {} missed", outcome.missed);
            assert!(outcome.useless <= 8 * 17 * MIB, "{length}: {} useless", outcome.useless);
        }
    }
}

#[test]
fn a_reader_that_goes_down_is_met() {
    for length in [4096, 64 * KIB, 128 * KIB] {
        let outcome = play(&[downwards(length, 128 * MIB)], 64 * MIB);
        assert!(outcome.least_lead >= 14 * MIB, "{length}: {} ahead", outcome.least_lead);
        assert!(outcome.missed <= 8, "{length}: {} missed", outcome.missed);
        assert!(outcome.useless <= 17 * MIB, "{length}: {} useless", outcome.useless);
    }
}

#[test]
fn a_share_of_a_stream_dealt_out_to_several_connections_is_a_stride() {
    for (length, stride) in [(128 * KIB, 512 * KIB), (128 * KIB, 256 * KIB), (64 * KIB, 512 * KIB), (MIB, 4 * MIB)] {
        for depth in [1, 4] {
            let outcome = play(&[strided(length, stride, 256 * length, depth)], 128 * length);
            let name = format!("{length} each {stride}, x{depth}");
            assert!(outcome.least_lead >= 512 * KIB, "{name}: {} ahead", outcome.least_lead);
            assert!(outcome.missed <= 5, "{name}: {} missed", outcome.missed);
            assert!(outcome.useless <= 17 * MIB, "{name}: {} useless", outcome.useless);
        }
    }
}

#[test]
fn streams_are_found_among_random_reads() {
    let mut random = Random(11);
    let noise: Reader =
        (0..1024).map(|_| ByteRange::new(GIB + random.below(GIB / 4096) * 4096, 4096).unwrap()).collect();
    let outcome = play(&[upwards(0, 64 * KIB, 64 * MIB, 1, 1), noise], u64::MAX);
    assert!(outcome.missed <= 1024 + 4, "{} missed", outcome.missed);
}

/// Streams that end as soon as they are believed.
fn deceive(cache: &mut Cache, from: u64, streams: u64) {
    for stream in from..from + streams {
        for read in 0..9 {
            cache.read(stream * 2 * MIB + read * 32 * KIB, 32 * KIB);
        }
    }
}

#[test]
fn a_connection_that_never_reads_on_is_wished_nothing_until_it_does() {
    let mut cache = Cache::new(64 * GIB);
    deceive(&mut cache, 0, 400);
    let before = cache.readahead.figures();
    assert!(before.unmatched > before.matched, "{before:?}");
    deceive(&mut cache, 400, 400);
    assert_eq!(cache.readahead.figures().wished, before.wished, "it wishes on");
    let mut missed = 0;
    for read in 0..2048 {
        missed += u64::from(!cache.read(8 * GIB + read * 64 * KIB, 64 * KIB));
    }
    assert!(missed < 1024, "{missed} missed: it never believes again");
    assert!(cache.readahead.figures().wished > before.wished);
}

#[test]
fn without_a_window_nothing_is_wished() {
    let mut cache = Cache::new(GIB);
    (0..64).for_each(|read| _ = cache.read(read * 64 * KIB, 64 * KIB));
    cache.readahead.set_most(0);
    let before = cache.readahead.figures();
    assert_eq!(before.wished, before.matched + before.unmatched, "all is accounted for");
    for read in 64..512 {
        cache.read(read * 64 * KIB, 64 * KIB);
        assert_eq!(cache.wishes, []);
    }
    cache.readahead.set_most(MIB);
    (512..600).for_each(|read| _ = cache.read(read * 64 * KIB, 64 * KIB));
    assert!(cache.readahead.figures().wished > before.wished);
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
