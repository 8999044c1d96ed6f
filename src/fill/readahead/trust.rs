//! Whether wishing pays on a connection: what was wished and read, against what was wished and never read.

use super::Limits;
use crate::units::MIB;

/// Bytes of matched and unmatched wishes that are remembered: beyond, both count half.
const MEMORY: u64 = 32 * MIB;
/// Unmatched bytes that nobody is blamed for.
const CREDIT: u64 = MIB;
/// Reads that must continue a candidate before it is believed: two, so that three in a row are a run.
const PROOF: u32 = 2;

/// What became of wishes, in bytes. What is neither is still waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Figures {
    /// Wished for.
    pub wished: u64,
    /// Wished for, and read by the stream that wished.
    pub matched: u64,
    /// Wished for by streams that ended before they came there.
    pub unmatched: u64,
}

/// How much a connection's streams are believed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Trust {
    figures: Figures,
    /// As in the figures, but fading, and also of runs that were silent.
    matched: u64,
    unmatched: u64,
}

/// In order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    Silent,
    Wary,
    Cautious,
    Full,
}

impl Trust {
    pub(super) const fn new() -> Self {
        Self { figures: Figures { wished: 0, matched: 0, unmatched: 0 }, matched: 0, unmatched: 0 }
    }

    pub(super) const fn figures(&self) -> Figures {
        self.figures
    }

    pub(super) const fn note_wish(&mut self, bytes: u64) {
        self.figures.wished += bytes;
    }

    /// Bytes that were wished, or would have been, have been read.
    pub(super) const fn credit(&mut self, bytes: u64, was_silent: bool) {
        self.matched += bytes;
        if !was_silent {
            self.figures.matched += bytes;
        }
        self.fade();
    }

    /// Bytes that were wished, or would have been, are given up.
    pub(super) const fn debit(&mut self, bytes: u64, was_silent: bool) {
        self.unmatched += bytes;
        if !was_silent {
            self.figures.unmatched += bytes;
        }
        self.fade();
    }

    const fn fade(&mut self) {
        if self.matched + self.unmatched > MEMORY {
            self.matched /= 2;
            self.unmatched /= 2;
        }
    }

    const fn level(&self) -> Level {
        let blame = self.unmatched.saturating_sub(CREDIT);
        if blame > 2 * self.matched {
            Level::Silent
        } else if blame > self.matched / 2 {
            Level::Wary
        } else if blame > self.matched / 8 {
            Level::Cautious
        } else {
            Level::Full
        }
    }

    /// Reads that must continue a candidate.
    pub(super) const fn proof(&self) -> u32 {
        match self.level() {
            Level::Full => PROOF,
            Level::Cautious => 2 * PROOF,
            Level::Wary | Level::Silent => 4 * PROOF,
        }
    }

    /// Bytes that a run may be ahead of its reader.
    pub(super) fn most(&self, limits: Limits) -> u64 {
        let most = match self.level() {
            Level::Full => limits.most,
            Level::Cautious => limits.most / 4,
            Level::Wary | Level::Silent => limits.first,
        };
        most.max(limits.first).min(limits.most)
    }

    /// Of so many bytes that a run would like to wish as many as usually come true, and fewer: what comes true costs
    /// one reader less waiting, what does not costs all of them a part of the link.
    pub(super) const fn discount(&self, bytes: u64) -> u64 {
        let true_ones = self.matched + CREDIT;
        // Both factors are far below 2^31.
        bytes * true_ones / (true_ones + 2 * self.unmatched)
    }

    /// Whether runs keep their wishes to themselves, until what they would have wished is read.
    pub(super) fn is_silent(&self) -> bool {
        self.level() == Level::Silent
    }
}
