//! What is sent in which order, cut into blocks and symbols.
//!
//! A [`Layout`] is a list of *pieces*: runs of chunks that have nothing in common, in the order in which they are sent, first
//! those of the plan, then what lies between them in the order of the image. Which chunks have data is one bit each, with a
//! count for each 512 of them, so that the n-th is found by a search (rank and select: Jacobson, *Space-efficient static
//! trees and graphs*, FOCS 1989). A terabyte in chunks of 64 KiB takes 2.1 MiB, and 16 bytes for each piece.
//!
//! Owns: the order, and the pages that tell it. Does not own: reading and storing what it names.

use std::collections::BTreeMap;

use thiserror::Error;

use super::form::{ITEM, Page, Run, TOLD, Terms, most_runs, terms_of};
use crate::manifest::Shape;
use crate::ranges::{ByteRange, fewer, merged};
use crate::units::to_usize;

/// Pages of a plan.
pub const MOST_PAGES: u16 = 64;

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
pub struct Layout {
    shape: Shape,
    /// Bytes of a symbol.
    symbol: u16,
    /// Chunks of a block.
    per_block: u32,
    data: Chunks,
    pieces: Vec<Piece>,
    /// Chunks that are sent.
    count: u32,
    /// The block with the image's last chunk, and the bytes by which it is shorter than others, if it is.
    short: Option<(u32, u64)>,
}

/// Chunks that are sent one after the other. Those without data are left out.
#[derive(Debug, Clone, Copy)]
struct Piece {
    first: u32,
    end: u32,
    /// Chunks that are sent before it.
    position: u32,
    /// Chunks with data that lie before it in the image.
    rank: u32,
}

impl Layout {
    /// The layout of a session whose plan is `runs`: what is sent first, in this order. A chunk that the plan has twice is
    /// sent the first time. `is_zero` is asked once for each chunk of the manifest.
    ///
    /// Its memory follows from the terms' shape: who has heard them compares that with the manifest first.
    pub fn new(terms: &Terms, runs: Vec<Run>, is_zero: impl Fn(u64) -> bool) -> Result<Self, LayoutError> {
        let chunks = u32::try_from(terms.shape.count()).map_err(|_| LayoutError::TooLarge)?;
        if !terms.is_sound() {
            return Err(LayoutError::Broken);
        }
        let mut order = Order::default();
        for run in runs {
            let end = run.first.checked_add(run.count).filter(|end| run.count > 0 && *end <= chunks);
            order.take(run.first, end.ok_or(LayoutError::Broken)?);
        }
        if terms.rest {
            order.take(0, chunks);
        }
        let data = Chunks::new(chunks, |chunk| !is_zero(u64::from(chunk)));
        let (pieces, count) = placed(&order.pieces, &data);
        if count == 0 {
            return Err(LayoutError::Empty);
        }
        let per_block = terms.block / terms.shape.chunk_size;
        let mut layout = Self { shape: terms.shape, symbol: terms.symbol, per_block, data, pieces, count, short: None };
        layout.short = layout.short_block(chunks - 1);
        Ok(layout)
    }

    /// The block that has the image's last chunk, and what the chunk lacks.
    fn short_block(&self, last: u32) -> Option<(u32, u64)> {
        let lacks = u64::from(self.shape.chunk_size) - self.shape.range(u64::from(last)).length();
        if lacks == 0 || !self.data.has(last) {
            return None;
        }
        let piece = self.pieces.iter().find(|piece| (piece.first..piece.end).contains(&last))?;
        let position = piece.position + (self.data.rank(last) - piece.rank);
        Some((position / self.per_block, lacks))
    }

    /// The number of blocks, those with one chunk at least.
    pub const fn blocks(&self) -> u32 {
        self.count.div_ceil(self.per_block)
    }

    /// Bytes of image in all blocks.
    pub fn bytes(&self) -> u64 {
        let whole = u64::from(self.count) * u64::from(self.shape.chunk_size);
        whole - self.short.map_or(0, |(_, lacks)| lacks)
    }

    /// Bytes of image in a block; none if there is no such block.
    pub fn length(&self, block: u32) -> u64 {
        let (start, end) = self.positions(block);
        let lacks = self.short.filter(|(short, _)| *short == block).map_or(0, |(_, lacks)| lacks);
        u64::from(end - start) * u64::from(self.shape.chunk_size) - lacks
    }

    /// Bytes of a symbol.
    pub const fn symbol(&self) -> u16 {
        self.symbol
    }

    /// Data symbols of a block. The last one is filled up with zeroes.
    pub fn symbols(&self, block: u32) -> u16 {
        let symbols = self.length(block).div_ceil(u64::from(self.symbol));
        u16::try_from(symbols).unwrap_or(u16::MAX)
    }

    /// Where the bytes of a block are in the image, in the order in which they are in the block.
    pub fn ranges(&self, block: u32) -> Vec<ByteRange> {
        let (start, end) = self.positions(block);
        let mut ranges: Vec<ByteRange> = Vec::new();
        let mut index = self.pieces.partition_point(|piece| piece.position <= start).saturating_sub(1);
        for position in start..end {
            while self.pieces.get(index + 1).is_some_and(|next| next.position <= position) {
                index += 1;
            }
            let piece = &self.pieces[index];
            let chunk = self.data.select(piece.rank + (position - piece.position));
            let range = self.shape.range(u64::from(chunk));
            match ranges.last_mut() {
                Some(last) if last.end() == range.start() => *last = ByteRange::between(last.start(), range.end()),
                _ => ranges.push(range),
            }
        }
        ranges
    }

    /// What the session brings, zeroes in between included: in order, apart from each other, merged.
    pub fn covers(&self) -> Vec<ByteRange> {
        let chunk_size = u64::from(self.shape.chunk_size);
        let range = |piece: &Piece| {
            let end = u64::from(piece.end) * chunk_size;
            ByteRange::between(u64::from(piece.first) * chunk_size, end.min(self.shape.image_size))
        };
        merged(&self.pieces.iter().map(range).collect::<Vec<_>>())
    }

    /// The chunks of a block, as positions in what is sent.
    fn positions(&self, block: u32) -> (u32, u32) {
        let start = block.saturating_mul(self.per_block).min(self.count);
        (start, start.saturating_add(self.per_block).min(self.count))
    }
}

/// Pieces with their places, and the number of chunks that are sent.
fn placed(order: &[(u32, u32)], data: &Chunks) -> (Vec<Piece>, u32) {
    let mut position = 0;
    let place = |&(first, end): &(u32, u32)| {
        let rank = data.rank(first);
        let piece = Piece { first, end, position, rank };
        position += data.rank(end) - rank;
        piece
    };
    let pieces = order.iter().map(place).collect();
    (pieces, position)
}

/// Puts runs one behind the other, without what came before. Of n runs that makes 2n pieces and one at most, because each
/// gap that a run is cut at is closed by it.
#[derive(Debug, Default)]
struct Order {
    pieces: Vec<(u32, u32)>,
    /// What the pieces cover: starts and ends of what is apart and does not touch.
    covered: BTreeMap<u32, u32>,
}

impl Order {
    /// Appends what of `first..end` is new.
    fn take(&mut self, first: u32, end: u32) {
        let (mut start, mut next) = (first, first);
        if let Some((&before, &before_end)) = self.covered.range(..=first).next_back()
            && before_end >= first
        {
            (start, next) = (before, before_end);
        }
        while next <= end
            && let Some((&island, &island_end)) = self.covered.range(next..=end).next()
        {
            self.append(next, island);
            self.covered.remove(&island);
            next = island_end;
        }
        self.append(next, end);
        self.covered.insert(start, next.max(end));
    }

    fn append(&mut self, first: u32, end: u32) {
        if first < end {
            self.pieces.push((first, end));
        }
    }
}

/// Chunks that share a count.
const GROUP: u32 = 512;

/// A set of chunks in which the n-th is found quickly.
#[derive(Debug)]
struct Chunks {
    words: Vec<u64>,
    /// Chunks of the set before each group of [`GROUP`], and all.
    counts: Vec<u32>,
}

impl Chunks {
    fn new(count: u32, has: impl Fn(u32) -> bool) -> Self {
        let mut words = vec![0u64; to_usize(u64::from(count.div_ceil(64)))];
        for chunk in (0..count).filter(|chunk| has(*chunk)) {
            words[index(chunk / 64)] |= 1 << (chunk % 64);
        }
        let mut counts = vec![0];
        let mut before = 0;
        for group in words.chunks(index(GROUP / 64)) {
            before += group.iter().map(|word| word.count_ones()).sum::<u32>();
            counts.push(before);
        }
        Self { words, counts }
    }

    fn has(&self, chunk: u32) -> bool {
        self.words[index(chunk / 64)] >> (chunk % 64) & 1 == 1
    }

    /// How many are below `chunk`, which may be the end.
    fn rank(&self, chunk: u32) -> u32 {
        let (group, word) = (index(chunk / GROUP), index(chunk / 64));
        let before = self.words[group * index(GROUP / 64)..word].iter().map(|word| word.count_ones()).sum::<u32>();
        let within = self.words.get(word).map_or(0, |word| (word & !(u64::MAX << (chunk % 64))).count_ones());
        self.counts[group] + before + within
    }

    /// The one that so many are below. There is one.
    fn select(&self, rank: u32) -> u32 {
        let group = self.counts.partition_point(|count| *count <= rank) - 1;
        let mut left = rank - self.counts[group];
        let mut word = group * index(GROUP / 64);
        while self.words[word].count_ones() <= left {
            left -= self.words[word].count_ones();
            word += 1;
        }
        let mut bits = self.words[word];
        for _ in 0..left {
            bits &= bits - 1;
        }
        u32::try_from(word * 64).unwrap_or(u32::MAX) + bits.trailing_zeros()
    }
}

fn index(number: u32) -> usize {
    to_usize(u64::from(number))
}

/// Cuts a plan into pages that fit a datagram of so many bytes, and gives a digest of it. The layout is to be made of the
/// runs in the pages.
///
/// Of a plan that would need more than [`MOST_PAGES`], what fills half of them stays as it is. What comes after it is put
/// into the order of the image, and its smallest gaps are closed until it fits the other half: chunks in them are sent too.
pub fn pages(runs: &[Run], datagram: usize) -> (Vec<Page>, u64) {
    let per_page = most_runs(datagram).max(1);
    let most = per_page * usize::from(MOST_PAGES);
    let mut runs = joined(runs.iter().copied());
    if runs.len() > most {
        let tail = runs.split_off(most / 2);
        runs.extend(coarse(tail, most - most / 2));
    }
    let digest = digest(&runs);
    let page = |(page, runs): (u16, &[Run])| Page { page, runs: runs.to_vec() };
    ((0..MOST_PAGES).zip(runs.chunks(per_page)).map(page).collect(), digest)
}

/// Runs without empty ones, and as one where one begins at the end of the one before.
fn joined(runs: impl Iterator<Item = Run>) -> Vec<Run> {
    let mut joined: Vec<Run> = Vec::new();
    for run in runs.filter(|run| run.count > 0) {
        let last = joined.last_mut().filter(|last| last.first.checked_add(last.count) == Some(run.first));
        let count = last.as_ref().and_then(|last| last.count.checked_add(run.count));
        match (last, count) {
            (Some(last), Some(count)) => last.count = count,
            _ => joined.push(run),
        }
    }
    joined
}

/// At most `most` runs, in order, that cover all of `runs` and as little else as possible.
fn coarse(runs: Vec<Run>, most: usize) -> Vec<Run> {
    let range = |run: Run| ByteRange::between(u64::from(run.first), u64::from(run.first) + u64::from(run.count));
    let apart = merged(&runs.into_iter().map(range).collect::<Vec<_>>());
    let number = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
    fewer(&apart, most)
        .into_iter()
        .map(|range| Run { first: number(range.start()), count: number(range.length()) })
        .collect()
}

/// The first bytes of the hash over all runs, however they are cut into pages.
fn digest(runs: &[Run]) -> u64 {
    let mut hasher = blake3::Hasher::new();
    for run in runs {
        hasher.update(&run.first.to_le_bytes()).update(&run.count.to_le_bytes());
    }
    let hash = hasher.finalize();
    u64::from_le_bytes(std::array::from_fn(|index| hash.as_bytes()[index]))
}

/// Puts the pages of a plan together as they come: at most [`MOST_PAGES`], each of a datagram. A session without pages has
/// an empty plan, and needs none of this.
#[derive(Debug, Default)]
pub struct Plan {
    /// Digest and pages of the plan that these are of.
    of: (u64, u16),
    pages: BTreeMap<u16, Vec<Run>>,
    is_given: bool,
}

impl Plan {
    /// Takes a page. Gives the plan once it is whole, and only then. If it is not the plan of the terms, a page was wrong:
    /// all are thrown away and awaited again.
    pub fn take(&mut self, terms: &Terms, page: Page) -> Option<Vec<Run>> {
        if self.of != (terms.plan, terms.pages) {
            *self = Self { of: (terms.plan, terms.pages), ..Self::default() };
        }
        if self.is_given || page.page >= terms.pages.min(MOST_PAGES) {
            return None;
        }
        self.pages.entry(page.page).or_insert(page.runs);
        if self.pages.len() < usize::from(terms.pages) {
            return None;
        }
        let runs: Vec<Run> = std::mem::take(&mut self.pages).into_values().flatten().collect();
        self.is_given = digest(&runs) == terms.plan;
        self.is_given.then_some(runs)
    }
}

/// Layouts of announcements and pages from anywhere do no harm, and are what they say.
#[doc(hidden)]
pub fn fuzz(data: &[u8]) {
    let (said, listed) = data.split_at(data.len().min(TOLD));
    let Some(mut terms) = terms_of(said) else { return };
    let number = |half: &[u8]| half.iter().fold(0, |all, byte| all << 8 | u32::from(*byte));
    let run = |bytes: &[u8; ITEM]| Run { first: number(&bytes[..4]), count: number(&bytes[4..]) };
    let (made, digest) = pages(&listed.as_chunks().0.iter().map(run).collect::<Vec<_>>(), 100);
    (terms.pages, terms.plan) = (u16::try_from(made.len()).unwrap_or(u16::MAX), digest);
    let mut plan = Plan::default();
    let runs = made.into_iter().rev().filter_map(|page| plan.take(&terms, page)).flatten().collect();
    // A layout is as large as its shape, and that has to be the manifest's: larger ones only cost the fuzzer's time.
    if terms.shape.count() > 1 << 16 {
        return;
    }
    let Ok(layout) = Layout::new(&terms, runs, |chunk| chunk % 7 == 3) else { return };
    let length = |block| layout.ranges(block).iter().map(|range| range.length()).sum::<u64>();
    assert!((0..layout.blocks()).all(|block| layout.length(block) == length(block) && length(block) > 0));
    assert_eq!(layout.bytes(), (0..layout.blocks()).map(length).sum::<u64>());
    assert!(layout.bytes() <= layout.covers().iter().map(|range| range.length()).sum());
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::cast::SessionId;
    use crate::manifest::ImageId;
    use crate::units::to_u64;

    const CHUNK: u64 = 4096;

    fn terms(image_size: u64, per_block: u32, rest: bool) -> Terms {
        Terms {
            session: SessionId(1),
            image: ImageId([1; 32]),
            shape: Shape { image_size, chunk_size: 4096 },
            block: per_block * 4096,
            symbol: 1444,
            parity: 256,
            pages: 1,
            plan: 0,
            rest,
            deadline: None,
        }
    }

    fn layout(terms: &Terms, runs: &[Run], zeroes: &BTreeSet<u64>) -> Result<Layout, LayoutError> {
        Layout::new(terms, runs.to_vec(), |chunk| zeroes.contains(&chunk))
    }

    fn chunks(run: &Run) -> std::ops::Range<u64> {
        u64::from(run.first)..u64::from(run.first) + u64::from(run.count)
    }

    /// Chunks in the order in which they are sent, one by one.
    fn naive(terms: &Terms, runs: &[Run], zeroes: &BTreeSet<u64>) -> Vec<u64> {
        let mut sent = Vec::new();
        let rest = if terms.rest { 0..terms.shape.count() } else { 0..0 };
        for chunk in runs.iter().flat_map(chunks).chain(rest) {
            if !zeroes.contains(&chunk) && !sent.contains(&chunk) {
                sent.push(chunk);
            }
        }
        sent
    }

    fn runs(chunks: u32) -> impl Strategy<Value = Vec<Run>> {
        let run =
            (0..chunks, 1..=chunks).prop_map(move |(first, count)| Run { first, count: count.min(chunks - first) });
        prop::collection::vec(run, 0..12)
    }

    type Case = (Terms, Vec<Run>, BTreeSet<u64>);

    fn case() -> impl Strategy<Value = Case> {
        (1u32..150, 1u64..=CHUNK, 1u32..9, any::<bool>()).prop_flat_map(|(count, last, per_block, rest)| {
            let terms = terms(u64::from(count - 1) * CHUNK + last, per_block, rest);
            // Many zeroes or few.
            let zeroes = prop::collection::btree_set(0..u64::from(count), 0..=to_usize(u64::from(count)));
            (Just(terms), runs(count), zeroes)
        })
    }

    fn total(ranges: &[ByteRange]) -> u64 {
        ranges.iter().map(|range| range.length()).sum()
    }

    proptest! {
        #[test]
        fn what_is_sent_is_the_plan_then_the_rest_without_zeroes_and_doubles((terms, runs, zeroes) in case()) {
            let sent = naive(&terms, &runs, &zeroes);
            let layout = match layout(&terms, &runs, &zeroes) {
                Err(error) => {
                    prop_assert_eq!(error, LayoutError::Empty);
                    prop_assert!(sent.is_empty());
                    return Ok(());
                }
                Ok(layout) => layout,
            };
            let blocks: Vec<&[u64]> = sent.chunks(to_usize(u64::from(terms.block) / CHUNK)).collect();
            prop_assert_eq!(u64::from(layout.blocks()), to_u64(blocks.len()));
            for (block, sent) in (0..).zip(blocks) {
                let ranges = layout.ranges(block);
                let found: Vec<u64> = ranges.iter().flat_map(|range| range.pieces(CHUNK)).map(|piece| piece.start() / CHUNK).collect();
                prop_assert_eq!(&found[..], sent);
                let length: u64 = sent.iter().map(|chunk| terms.shape.range(*chunk).length()).sum();
                prop_assert_eq!(layout.length(block), length);
                prop_assert_eq!(total(&ranges), length);
                prop_assert_eq!(u64::from(layout.symbols(block)), length.div_ceil(1444));
                prop_assert!(ranges.windows(2).all(|pair| pair[0].end() != pair[1].start()), "they are merged");
            }
            let bytes: u64 = sent.iter().map(|chunk| terms.shape.range(*chunk).length()).sum();
            prop_assert_eq!(layout.bytes(), bytes);
            prop_assert_eq!((layout.length(layout.blocks()), layout.length(u32::MAX)), (0, 0));
        }

        #[test]
        fn what_is_covered_is_the_plan_with_its_zeroes_or_everything((terms, runs, zeroes) in case()) {
            let Ok(layout) = layout(&terms, &runs, &zeroes) else { return Ok(()) };
            let covers = layout.covers();
            if terms.rest {
                prop_assert_eq!(covers, [ByteRange::between(0, terms.shape.image_size)]);
            } else {
                let all: BTreeSet<u64> = runs.iter().flat_map(chunks).collect();
                let ranges: Vec<_> = all.iter().map(|chunk| terms.shape.range(*chunk)).collect();
                prop_assert_eq!(covers, merged(&ranges));
            }
        }

        #[test]
        fn the_nth_chunk_is_found(has in prop::collection::vec(prop::bool::weighted(0.1), 1..3000)) {
            let set = Chunks::new(u32::try_from(has.len()).unwrap(), |chunk| has[index(chunk)]);
            let mut rank = 0;
            for (chunk, has) in (0..).zip(&has) {
                prop_assert_eq!((set.has(chunk), set.rank(chunk)), (*has, rank));
                if *has {
                    prop_assert_eq!(set.select(rank), chunk);
                    rank += 1;
                }
            }
            prop_assert_eq!(set.rank(u32::try_from(has.len()).unwrap()), rank);
        }

        #[test]
        fn a_plan_is_put_together_whatever_the_order_of_its_pages(
            runs in prop::collection::vec((0u32..1 << 20, 1u32..50), 0..300),
            seed in any::<prop::sample::Index>(),
        ) {
            let runs: Vec<Run> = runs.into_iter().map(|(first, count)| Run { first, count }).collect();
            let (mut pages, digest) = pages(&runs, 256);
            let fits = most_runs(256);
            prop_assert!(pages.iter().all(|page| (1..=fits).contains(&page.runs.len())));
            let told: Vec<Run> = pages.iter().flat_map(|page| page.runs.clone()).collect();
            prop_assert_eq!(&told, &joined(runs.into_iter()), "it fits as it is");
            let mut terms = terms(1 << 40, 1, true);
            (terms.pages, terms.plan) = (u16::try_from(pages.len()).unwrap(), digest);
            let mut plan = Plan::default();
            let count = pages.len();
            pages.rotate_left(seed.index(count + 1).min(count));
            pages.extend(pages.clone());
            let given: Vec<_> = pages.into_iter().map(|page| plan.take(&terms, page)).collect();
            let whole: Vec<_> = given.iter().flatten().collect();
            if count > 0 {
                prop_assert!(given[count - 1].is_some(), "it is given with its last page");
                prop_assert_eq!(whole, [&told], "and once");
            }
        }

        #[test]
        fn a_plan_of_too_many_runs_loses_nothing_and_gets_little_else(
            runs in prop::collection::vec((0u32..1 << 20, 1u32..5), 600..900),
        ) {
            let runs: Vec<Run> = runs.into_iter().map(|(first, count)| Run { first, count }).collect();
            let most = most_runs(100) * usize::from(MOST_PAGES);
            let (pages, _) = pages(&runs, 100);
            prop_assert!(pages.len() <= usize::from(MOST_PAGES));
            let told: Vec<Run> = pages.iter().flat_map(|page| page.runs.clone()).collect();
            prop_assert!(told.len() <= most && told[..most / 2] == runs[..most / 2], "its beginning is as it was");
            let all = |runs: &[Run]| runs.iter().flat_map(chunks).collect::<BTreeSet<u64>>();
            prop_assert!(all(&told).is_superset(&all(&runs)));
            // The oracle: the gaps of the others, the smallest ones.
            let tail: Vec<u64> = all(&runs[most / 2..]).into_iter().collect();
            let mut gaps: Vec<u64> = tail.windows(2).map(|pair| pair[1] - pair[0] - 1).filter(|gap| *gap > 0).collect();
            gaps.sort_unstable();
            let close = (gaps.len() + 1).saturating_sub(most - most / 2);
            let others = to_u64(all(&told[most / 2..]).len() - tail.len());
            prop_assert_eq!(others, gaps[..close].iter().sum::<u64>());
        }

        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
            fuzz(&bytes);
        }
    }

    #[test]
    fn a_wrong_page_spoils_the_plan_until_the_right_ones_come_again() {
        let runs: Vec<Run> = (0..20).map(|number| Run { first: number * 10, count: 1 }).collect();
        let (pages, digest) = pages(&runs, 104);
        let [first, second] = &pages[..] else { panic!("{pages:?}") };
        let mut terms = terms(1 << 30, 1, true);
        (terms.pages, terms.plan) = (2, digest);
        let mut plan = Plan::default();
        let wrong = Page { page: 1, runs: vec![Run { first: 1, count: 1 }] };
        assert_eq!(plan.take(&terms, wrong), None);
        assert_eq!(plan.take(&terms, first.clone()), None, "the digest is wrong");
        assert_eq!(plan.take(&terms, Page { page: 2, runs: runs.clone() }), None, "there is no third");
        assert_eq!(plan.take(&terms, second.clone()), None);
        assert_eq!(plan.take(&terms, first.clone()), Some(runs));
    }

    #[test]
    fn what_makes_no_sense_has_no_layout() {
        let error = |terms: &Terms, run: Run| Layout::new(terms, vec![run], |_| false).unwrap_err();
        let good = terms(10 * CHUNK, 2, true);
        assert_eq!(error(&good, Run { first: 0, count: 0 }), LayoutError::Broken);
        assert_eq!(error(&good, Run { first: 9, count: 2 }), LayoutError::Broken);
        assert_eq!(error(&good, Run { first: u32::MAX, count: 2 }), LayoutError::Broken);
        assert_eq!(error(&terms(1 << 63, 2, true), Run { first: 0, count: 1 }), LayoutError::TooLarge);
        assert_eq!(error(&terms(10 * CHUNK, 0, true), Run { first: 0, count: 1 }), LayoutError::Broken);
        assert_eq!(Layout::new(&good, Vec::new(), |_| true).unwrap_err(), LayoutError::Empty);
    }

    #[test]
    fn a_terabyte_is_small() {
        let terms =
            Terms { shape: Shape { image_size: 1 << 40, chunk_size: 65536 }, block: 1 << 20, ..terms(1, 1, true) };
        let layout = Layout::new(&terms, vec![Run { first: 5, count: 3 }], |chunk| chunk % 2 == 1).unwrap();
        assert_eq!((layout.blocks(), layout.bytes(), layout.symbols(7)), (1 << 19, 1 << 39, 727));
        assert!(layout.data.words.len() * 8 + layout.data.counts.len() * 4 < 3 << 20);
        assert_eq!(layout.pieces.len(), 3);
        let last = layout.ranges((1 << 19) - 1);
        assert_eq!(last.last().map(|range| range.end()), Some((1 << 40) - 65536));
    }
}
