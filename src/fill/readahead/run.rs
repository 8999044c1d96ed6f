//! A stream that is one: where its reader is, what was wished for it, and how far ahead that may be.
//!
//! A run that goes down is the mirror image of one that goes up: it sees the image from its other end.

use super::Limits;
use super::candidate::Candidate;
use super::trust::Trust;
use crate::ranges::ByteRange;
use crate::units::MIB;

/// Lengths of a read that one may be before or behind the head: what clients keep in flight.
const REACH: u64 = 64;
/// Lengths of a read that one may begin behind the last wish.
const GAP: u64 = 4;
/// Lengths of a read after which it is known whether the reader leaves out: what clients keep in flight.
const TELLING: u64 = REACH;
/// Bytes by which the wishes of a wide window go on: a window stays nearly as far ahead as it is wide.
const STEP: u64 = MIB;
/// A run that has read so much is believed: few files are as long, and most runs end with a file.
const LONG: u64 = 4 * MIB;
/// Pieces of a stride that are wished ahead at most.
const MOST_PIECES: u64 = 64;

/// Where a run goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Up,
    Down,
    /// Up, by so many bytes from the start of a read to the start of the next.
    Stride(u64),
}

/// A run. Offsets are as it sees them: of one that goes down, from the end of the image.
#[derive(Debug, Clone, Copy)]
pub(super) struct Run {
    way: Way,
    /// Where it began: it has no reads before.
    low: u64,
    /// Where the next read begins if all come in order.
    head: u64,
    /// Wishes lie in `first_wish..wished`.
    first_wish: u64,
    wished: u64,
    /// Bytes wished and not read.
    unread: u64,
    /// Length of the last read; of a stride, of all.
    length: u64,
    /// Bytes wished ahead of the head.
    window: u64,
    /// The head when the window last changed.
    changed: u64,
    /// Bytes read since then: as many as the head passed, or the reader leaves out.
    read: u64,
    /// Bytes read since it began, its candidate's too, none twice.
    proven: u64,
    /// How far behind the head reads have begun lately.
    disorder: u64,
    is_silent: bool,
}

/// `range` from the other end of the image.
const fn reflect(range: ByteRange, size: u64) -> ByteRange {
    ByteRange::between(size.saturating_sub(range.end()), size.saturating_sub(range.start()))
}

impl Run {
    /// Of a candidate whose last read was `read`.
    pub(super) fn new(from: &Candidate, way: Way, read: ByteRange, limits: Limits, size: u64, is_silent: bool) -> Self {
        let span = if way == Way::Down { reflect(from.span(), size) } else { from.span() };
        let (low, head) = match way {
            Way::Up | Way::Down => (span.start(), span.end()),
            Way::Stride(stride) => (read.start(), read.start() + stride),
        };
        let disorder = from.disorder();
        let window = limits.first.max(2 * from.length());
        Self {
            way,
            low,
            head,
            first_wish: head,
            wished: head,
            unread: 0,
            length: from.length(),
            window,
            changed: head,
            read: 0,
            proven: from.proven(way),
            disorder,
            is_silent,
        }
    }

    /// A read as the run sees it. A stride takes each with what lies between it and the next, so that lengths and
    /// distances agree.
    const fn view(&self, read: ByteRange, size: u64) -> ByteRange {
        match self.way {
            Way::Up => read,
            Way::Down => reflect(read, size),
            Way::Stride(stride) => ByteRange::between(read.start(), read.start().saturating_add(stride)),
        }
    }

    /// The distance between the starts of reads.
    const fn stride(&self) -> u64 {
        if let Way::Stride(stride) = self.way { stride } else { self.length }
    }

    /// Bytes of the image over which so many wished bytes lie.
    fn spread(&self, bytes: u64) -> u64 {
        match self.way {
            Way::Up | Way::Down => bytes,
            Way::Stride(stride) => (bytes / self.length.max(1)).clamp(1, MOST_PIECES).saturating_mul(stride),
        }
    }

    /// Where reads begin, as it sees them, that may belong to it.
    fn near(&self) -> ByteRange {
        let reach = REACH * self.stride();
        let last = self.wished.max(self.head).saturating_add(GAP * self.stride() + 2 * self.disorder);
        ByteRange::between(
            self.low.max(self.head.saturating_sub(reach)),
            last.min(self.head.saturating_add(reach)).saturating_add(1),
        )
    }

    /// Where reads begin that may belong to it: first and number.
    pub(super) fn door(&self, size: u64) -> (u64, u64) {
        let near = self.near();
        match self.way {
            Way::Up | Way::Stride(_) => (near.start(), near.length()),
            Way::Down => {
                let range = reflect(near, size);
                let from = range.start().saturating_sub(2 * self.length);
                (from, range.end() - from)
            }
        }
    }

    /// How far a read within the door is from the head; nothing if it is not of this run.
    pub(super) fn distance(&self, read: ByteRange, size: u64) -> Option<u64> {
        let start = self.view(read, size).start();
        let near = self.near();
        let fits = match self.way {
            Way::Up | Way::Down => true,
            Way::Stride(stride) => start.abs_diff(self.head).is_multiple_of(stride) && read.length() == self.length,
        };
        (fits && near.start() <= start && start < near.end()).then(|| start.abs_diff(self.head))
    }

    /// Notes a read of it, and tells how many wished bytes it was.
    pub(super) fn add(&mut self, read: ByteRange, size: u64) -> u64 {
        let seen = self.view(read, size);
        self.length = read.length();
        self.disorder = self.disorder.max(self.head.saturating_sub(seen.end()));
        self.head = self.head.max(seen.end());
        self.read += seen.length();
        self.proven = self.most_proven(self.proven.saturating_add(read.length()));
        let wished = ByteRange::between(self.first_wish, self.wished).intersect(seen).length();
        let matched = match self.way {
            Way::Stride(_) if wished > 0 => self.length.min(self.unread),
            _ => wished.min(self.unread),
        };
        self.unread -= matched;
        matched
    }

    /// `bytes`, without what was read twice.
    fn most_proven(&self, bytes: u64) -> u64 {
        bytes.min(if self.is_stride() { u64::MAX } else { self.head - self.low })
    }

    const fn is_stride(&self) -> bool {
        matches!(self.way, Way::Stride(_))
    }

    /// Whether it leaves out most of what it passes.
    pub(super) fn has_lost_the_reader(&self) -> bool {
        let passed = self.head - self.changed;
        passed > self.telling() && self.read < passed / 4
    }

    /// Bytes that the head must pass before what was read of them says anything.
    fn telling(&self) -> u64 {
        // What is out of order may be read yet.
        self.spread(self.window).max(TELLING * self.stride()).max(2 * self.disorder)
    }

    pub(super) const fn is_silent(&self) -> bool {
        self.is_silent
    }

    /// From now on its wishes are heard. What it kept to itself is not waited for.
    pub(super) const fn speak(&mut self) {
        self.is_silent = false;
        (self.unread, self.first_wish, self.wished) = (0, self.head, self.head);
    }

    /// Bytes wished and not read.
    pub(super) const fn unread(&self) -> u64 {
        self.unread
    }

    /// Whether the reader has come so far that it is time to wish again: to the middle of a narrow window, a step into
    /// a wide one.
    pub(super) fn is_due(&self, limits: Limits, trust: &Trust) -> bool {
        let window = self.reach(trust.most(limits), trust);
        let ahead = self.wished.saturating_sub(self.head);
        ahead <= self.spread(window).saturating_sub(self.spread(STEP.min(window / 2)))
    }

    /// Bytes that it may wish ahead now: no more than half of what it has read, less what it left out, and of that as
    /// much as wishes of the connection come true.
    fn reach(&self, most: u64, trust: &Trust) -> u64 {
        let passed = if self.is_stride() { 0 } else { self.head - self.low };
        let left_out = passed.saturating_sub(self.proven);
        let earned = self.proven.saturating_sub(left_out);
        let earned = if earned < LONG { trust.discount(earned / 2) } else { earned };
        self.window.min(most).min(earned)
    }

    /// Adds what the reader will come to next to `wishes`, and tells how many bytes that is.
    pub(super) fn wish(&mut self, limits: Limits, trust: &Trust, size: u64, wishes: &mut Vec<ByteRange>) -> u64 {
        let most = trust.most(limits);
        self.resize(limits.first, most);
        let target = self.head.saturating_add(self.spread(self.reach(most, trust))).min(size);
        let from = if self.wished > self.head { self.wished } else { self.head };
        if target <= from {
            return 0;
        }
        if self.wished <= self.head && self.unread == 0 {
            self.first_wish = from;
        }
        let bytes = match self.way {
            Way::Stride(stride) => self.wish_pieces(from, target, stride, limits.chunk, size, wishes),
            Way::Up | Way::Down => self.wish_whole(from, target, limits.chunk, size, wishes),
        };
        self.unread += bytes;
        bytes
    }

    /// Widens the window of a reader that follows, narrows that of one that leaves out.
    fn resize(&mut self, first: u64, most: u64) {
        let (passed, span) = (self.head - self.changed, self.spread(self.window));
        let follows = passed >= span && self.read >= span;
        let leaves_out = passed > self.telling() && self.read < passed / 2;
        if leaves_out {
            self.window = (self.window / 2).max(first);
        } else if follows {
            self.window *= 2;
        }
        if leaves_out || follows {
            (self.changed, self.read, self.disorder) = (self.head, 0, self.disorder / 2);
        }
        if self.way == Way::Up {
            // What comes next may begin so far ahead.
            self.window = self.window.max(2 * self.disorder);
        }
        self.window = self.window.min(most);
    }

    /// Wishes for all of `from..target`, to the ends of chunks. The chunk that the head is in is being fetched.
    fn wish_whole(&mut self, from: u64, target: u64, chunk: u64, size: u64, wishes: &mut Vec<ByteRange>) -> u64 {
        let range = match self.way {
            Way::Down => {
                let range = reflect(ByteRange::between(from, target), size);
                ByteRange::between(floor(range.start(), chunk), floor(range.end(), chunk))
            }
            _ => ByteRange::between(ceil(from, chunk).min(size), ceil(target, chunk).min(size)),
        };
        let seen = if self.way == Way::Down { reflect(range, size) } else { range };
        self.wished = self.wished.max(seen.end());
        if !range.is_empty() {
            wishes.push(range);
        }
        range.length()
    }

    /// Wishes for the reads that begin in `from..target`, as one range where fewer bytes than a chunk lie between.
    fn wish_pieces(
        &mut self,
        from: u64,
        target: u64,
        stride: u64,
        chunk: u64,
        size: u64,
        wishes: &mut Vec<ByteRange>,
    ) -> u64 {
        let first = wishes.len();
        let mut start = from;
        let mut bytes = 0;
        while start < target {
            let piece = ByteRange::between(start, start.saturating_add(self.length).min(size));
            bytes += piece.length();
            let joined = match wishes[first..].last_mut() {
                Some(last) if stride < self.length + chunk => {
                    *last = ByteRange::between(last.start(), piece.end());
                    true
                }
                _ => false,
            };
            if !joined {
                wishes.push(piece);
            }
            start = start.saturating_add(stride);
        }
        self.wished = start;
        bytes
    }

    /// Takes over another run that goes the same way, if each might as well be given the reads of the other. Whether it
    /// was so.
    pub(super) fn absorb(&mut self, other: &Self) -> bool {
        let is_same_way = match (self.way, other.way) {
            (Way::Up, Way::Up) | (Way::Down, Way::Down) => true,
            (Way::Stride(one), Way::Stride(two)) => {
                one == two && self.length == other.length && self.head.abs_diff(other.head).is_multiple_of(one)
            }
            _ => false,
        };
        let (one, two) = (self.head, other.head);
        let takes = |run: &Self, start| run.near().start() <= start && start < run.near().end();
        let overlap = takes(self, two) && takes(other, one);
        if !is_same_way || !overlap || self.is_silent != other.is_silent {
            return false;
        }
        self.low = self.low.min(other.low);
        self.head = self.head.max(other.head);
        self.first_wish = self.first_wish.min(other.first_wish);
        self.wished = self.wished.max(other.wished);
        self.window = self.window.max(other.window);
        self.unread += other.unread;
        self.proven = self.most_proven(self.proven.saturating_add(other.proven));
        self.disorder = self.disorder.max(other.disorder).max(one.abs_diff(two).min(REACH * self.stride()));
        (self.changed, self.read) = (self.head, 0);
        true
    }
}

const fn floor(offset: u64, chunk: u64) -> u64 {
    offset - offset % chunk
}

const fn ceil(offset: u64, chunk: u64) -> u64 {
    floor(offset.saturating_add(chunk - 1), chunk)
}
