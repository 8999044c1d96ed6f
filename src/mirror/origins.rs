//! Why each chunk came, whether anybody has read it since, and whether the map tells of it.
//!
//! One byte a chunk, of this run of the server alone: what was here at the start counts as read. A hit costs one look
//! at it. Whether what is fetched ahead of demand is of use is known from here (papers call it matched and unmatched).

use std::sync::atomic::{AtomicU8, Ordering};

use super::Cause;
use super::chunks::{Chunk, Geometry};
use crate::ranges::ByteRange;
use crate::telemetry::Counter;
use crate::units::to_usize;

/// Nobody has read it.
const UNREAD: u8 = 1 << 7;
/// The map does not tell of it yet: after a crash it would be gone.
const UNMARKED: u8 = 1 << 6;
/// The rest is the cause.
const FLAGS: u8 = UNREAD | UNMARKED;

/// What came of all chunks that were fetched because of one thing.
///
/// What was brought and is neither used nor unused is here, and unread.
#[derive(Debug, Default)]
pub struct Tally {
    /// Bytes that came, by the upstream or from another chunk here.
    pub brought_bytes: Counter,
    /// Of them, what was read by a client before it left.
    pub used_bytes: Counter,
    /// Of them, what left unread: was evicted, or never stored.
    pub unused_bytes: Counter,
    /// Of what was used, what a client wanted while it was under way, and had to wait for.
    pub late_bytes: Counter,
}

#[derive(Debug)]
pub(super) struct Origins {
    geometry: Geometry,
    marks: Box<[AtomicU8]>,
    tallies: [Tally; Cause::ALL.len()],
}

impl Origins {
    pub(super) fn new(geometry: Geometry) -> Self {
        let marks = (0..geometry.count()).map(|_| AtomicU8::new(0)).collect();
        Self { geometry, marks, tallies: Default::default() }
    }

    pub(super) const fn tally(&self, cause: Cause) -> &Tally {
        &self.tallies[cause as usize]
    }

    fn mark(&self, chunk: Chunk) -> &AtomicU8 {
        &self.marks[to_usize(chunk.number())]
    }

    fn length(&self, chunk: Chunk) -> u64 {
        self.geometry.range(chunk).length()
    }

    /// A chunk came; whoever wants it has had it if `is_read`.
    pub(super) fn came(&self, chunk: Chunk, cause: Cause, is_read: bool) {
        let length = self.length(chunk);
        let tally = self.tally(cause);
        tally.brought_bytes.add(length);
        if is_read {
            tally.used_bytes.add(length);
        }
        let unread = if is_read { 0 } else { UNREAD };
        self.mark(chunk).store(cause as u8 | unread, Ordering::Relaxed);
    }

    /// A client has read some of a chunk.
    pub(super) fn read(&self, chunk: Chunk) {
        let mark = self.mark(chunk);
        if mark.load(Ordering::Relaxed) & UNREAD != 0 {
            self.end(chunk, |tally| &tally.used_bytes);
        }
    }

    /// A client has read `range`.
    pub(super) fn read_all(&self, range: ByteRange) {
        self.geometry.chunks(range).for_each(|chunk| self.read(chunk));
    }

    /// A chunk has left.
    pub(super) fn left(&self, chunk: Chunk) {
        self.end(chunk, |tally| &tally.unused_bytes);
    }

    /// A client has to wait for a chunk that is under way.
    pub(super) fn late(&self, chunk: Chunk, cause: Cause) {
        self.tally(cause).late_bytes.add(self.length(chunk));
    }

    /// Whether the chunk in which `part` lies was brought ahead of demand and nobody has read it.
    pub(super) fn is_unread(&self, part: ByteRange) -> bool {
        self.geometry.chunks(part).any(|chunk| self.mark(chunk).load(Ordering::Relaxed) & UNREAD != 0)
    }

    /// Whether the map tells of a chunk that is here and durable, or zero.
    pub(super) fn set_marked(&self, chunk: Chunk, is_marked: bool) {
        let mark = self.mark(chunk);
        // Pairs with the load in `is_marked`.
        if is_marked {
            mark.fetch_and(!UNMARKED, Ordering::Release);
        } else {
            mark.fetch_or(UNMARKED, Ordering::Relaxed);
        }
    }

    /// Whether a chunk that is here would be here after a crash too.
    pub(super) fn is_marked(&self, chunk: Chunk) -> bool {
        self.mark(chunk).load(Ordering::Acquire) & UNMARKED == 0
    }

    fn end(&self, chunk: Chunk, counter: impl Fn(&Tally) -> &Counter) {
        let before = self.mark(chunk).fetch_and(!UNREAD, Ordering::Relaxed);
        if before & UNREAD == 0 {
            return;
        }
        let cause = Cause::ALL.into_iter().find(|cause| *cause as u8 == before & !FLAGS);
        if let Some(cause) = cause {
            counter(self.tally(cause)).add(self.length(chunk));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_brought_is_used_or_unused_or_unread() {
        let geometry = Geometry::new(4096 * 3 + 100, 4096);
        let origins = Origins::new(geometry);
        let chunks: Vec<_> = (0..4).filter_map(|number| geometry.chunk(number)).collect();
        chunks[..3].iter().for_each(|chunk| origins.came(*chunk, Cause::Profile, false));
        origins.came(chunks[3], Cause::Demand, true);
        let unread = |number: usize| origins.is_unread(geometry.range(chunks[number]));
        assert!(unread(0) && !unread(3));
        for _ in 0..2 {
            origins.read(chunks[0]);
            origins.left(chunks[1]);
            origins.left(chunks[0]);
            origins.left(chunks[3]);
        }
        let tally = origins.tally(Cause::Profile);
        let values = [&tally.brought_bytes, &tally.used_bytes, &tally.unused_bytes].map(Counter::value);
        assert_eq!(values, [4096 * 3, 4096, 4096], "once each; one is here, unread");
        let tally = origins.tally(Cause::Demand);
        let values = [&tally.brought_bytes, &tally.used_bytes, &tally.unused_bytes].map(Counter::value);
        assert_eq!(values, [100, 100, 0]);
    }
}
