//! A stream that may be one: reads near each other, or equally far apart.

use super::run::Way;
use crate::ranges::ByteRange;

/// Lengths of a read that may be missing between two that belong together: clients keep several requests in flight,
/// and those overtake each other.
const GAP: u64 = 4;
/// Reads of one length that are farther apart than so many lengths have nothing to do with each other.
pub(super) const LONGEST_STRIDE: u64 = 64;
/// Reads after which a candidate that has come to nothing begins anew.
const MOST_READS: u32 = 96;

/// Reads near each other.
#[derive(Debug, Clone, Copy)]
pub(super) struct Candidate {
    /// All reads lie in `low..high`.
    low: u64,
    high: u64,
    /// Bytes read, at most `high - low`. Bytes read twice count twice.
    bytes: u64,
    reads: u32,
    /// Reads that moved `high` up.
    ups: u32,
    /// Reads that moved `low` down.
    downs: u32,
    /// Reads in a row, up to the last, that ended where the one before began.
    steps_down: u32,
    last: ByteRange,
    /// How far the start of the last read was from that before it; 0 if unknown or not upwards.
    stride: u64,
    /// How often it was just as far, with equal lengths.
    strides: u32,
}

/// What is known of a candidate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Undecided,
    /// Many reads and no direction.
    Wanders,
    Runs(Way),
}

impl Candidate {
    pub(super) const fn new(read: ByteRange) -> Self {
        Self {
            low: read.start(),
            high: read.end(),
            bytes: read.length(),
            reads: 1,
            ups: 0,
            downs: 0,
            steps_down: 0,
            last: read,
            stride: 0,
            strides: 0,
        }
    }

    /// Where reads begin that may belong to it: first and number.
    pub(super) const fn door(&self) -> (u64, u64) {
        let length = self.last.length();
        let from = self.low.saturating_sub((GAP + 1) * length);
        (from, self.high.saturating_add(GAP * length).saturating_add(1) - from)
    }

    /// How far away a read is that is within the door.
    pub(super) const fn distance(&self, read: ByteRange) -> u64 {
        if read.start() >= self.low { read.start().abs_diff(self.high) } else { read.end().abs_diff(self.low) }
    }

    pub(super) fn add(&mut self, read: ByteRange) {
        self.reads += 1;
        if read.end() > self.high {
            self.ups += 1;
        } else if read.start() < self.low {
            self.downs += 1;
        }
        self.steps_down = if read.end() == self.last.start() { self.steps_down + 1 } else { 0 };
        self.note_stride(self.last, read);
        (self.low, self.high) = (self.low.min(read.start()), self.high.max(read.end()));
        self.bytes = (self.bytes + read.length()).min(self.high - self.low);
        self.last = read;
    }

    fn note_stride(&mut self, before: ByteRange, read: ByteRange) {
        let stride = read.start().saturating_sub(before.start());
        let is_equal = stride == self.stride && before.length() == read.length() && stride > 0;
        self.strides = if is_equal { self.strides + 1 } else { u32::from(stride > 0) };
        self.stride = stride;
    }

    /// Notes that the one read of this may be the next after the last of `before`. Of several the best counts: one
    /// that goes on as it did, else the nearest.
    pub(super) const fn follow(&mut self, before: &Self) {
        let stride = self.last.start().saturating_sub(before.last.start());
        let length = self.last.length();
        if stride < 2 * length || stride > LONGEST_STRIDE * length || before.last.length() != length {
            return;
        }
        let strides = if stride == before.stride { before.strides + 1 } else { 1 };
        if strides > self.strides || strides == self.strides && stride < self.stride {
            (self.stride, self.strides) = (stride, strides);
        }
    }

    /// Whether it is a stream. `proof` is how many reads must have continued it.
    pub(super) const fn verdict(&self, proof: u32) -> Verdict {
        let is_dense = self.bytes * 3 >= (self.high - self.low) * 2;
        let length = self.last.length();
        if is_dense && self.ups >= self.downs + proof {
            return Verdict::Runs(Way::Up);
        }
        // Requests that overtake each other also come downwards, but not so many without a gap.
        if self.steps_down >= 2 * proof {
            return Verdict::Runs(Way::Down);
        }
        // All of a place is being read, in whatever order.
        if is_dense && self.ups + self.downs >= 4 * proof {
            return Verdict::Runs(Way::Up);
        }
        if self.strides > proof && self.stride >= 2 * length {
            return Verdict::Runs(Way::Stride(self.stride));
        }
        if self.reads > MOST_READS { Verdict::Wanders } else { Verdict::Undecided }
    }

    pub(super) const fn span(&self) -> ByteRange {
        ByteRange::between(self.low, self.high)
    }

    /// How far reads are out of order: nothing if they came upwards, else all that it spans.
    pub(super) const fn disorder(&self) -> u64 {
        if self.downs == 0 { 0 } else { self.high - self.low }
    }

    /// Bytes that speak for a run of that way, none twice.
    pub(super) fn proven(&self, way: Way) -> u64 {
        match way {
            Way::Up | Way::Down => self.bytes,
            Way::Stride(_) => (u64::from(self.strides) + 1) * self.last.length(),
        }
    }

    /// Where its last read began.
    pub(super) const fn last_start(&self) -> u64 {
        self.last.start()
    }

    /// The length of its last read.
    pub(super) const fn length(&self) -> u64 {
        self.last.length()
    }
}
