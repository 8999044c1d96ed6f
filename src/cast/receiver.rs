//! What has come, what is lacking, and when to say so.
//!
//! STUB

use std::sync::Arc;
use std::time::Duration;

use super::ReceiverId;
use super::form::{Announce, Report, Word};
use super::layout::Layout;

/// What to do with a symbol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Take {
    /// Keep it.
    Keep,
    /// Keep it, and forget what has come of another block: there is no room for so many.
    KeepInstead(u32),
    /// Keep it: with it the block can be made whole. What comes of that is to be said ([`Receiver::delivered`]).
    Complete,
    /// Throw it away: it is here already, or nobody wants it.
    Skip,
    /// Throw it away: the layout has no such symbol.
    Foreign,
}

/// What came of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// It is here.
    Stored,
    /// Its bytes are wrong: somebody has forged symbols. Twice, and it is left to the upstream.
    Wrong,
    /// It cannot be kept. It is left to the upstream.
    NoRoom,
}

/// Whether a receiver still takes part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It does.
    Receiving,
    /// It has everything.
    Complete,
    /// The session is over, or it was dropped, and something is lacking: that is to be fetched.
    Lacking,
    /// Nothing has been heard from the sender for so long that it must be dead; the same.
    Abandoned,
}

/// Blocks that may have come in part at the same time.
pub const MOST_OPEN: usize = 64;

/// One receiver of one session. Times are since it was made.
#[derive(Debug)]
pub struct Receiver;

impl Receiver {
    /// A receiver of `layout` that has some blocks already. The same `seed` gives the same choices.
    pub fn new(id: ReceiverId, layout: Arc<Layout>, has: impl Fn(u32) -> bool, seed: u64) -> Self {
        let _ = (id, layout, has, seed);
        unimplemented!()
    }

    /// A datagram of the sender has come, whatever it is: they are counted, and gaps in their numbers are losses.
    pub fn heard(&mut self, now: Duration, number: u32) {
        let _ = (now, number);
        unimplemented!()
    }

    /// An announcement.
    pub fn announced(&mut self, now: Duration, announce: &Announce) {
        let _ = (now, announce);
        unimplemented!()
    }

    /// Word from the sender.
    pub fn told(&mut self, now: Duration, word: &Word) {
        let _ = (now, word);
        unimplemented!()
    }

    /// A symbol.
    pub fn symbol(&mut self, now: Duration, block: u32, index: u16) -> Take {
        let _ = (now, block, index);
        unimplemented!()
    }

    /// What came of a block that was complete.
    pub fn delivered(&mut self, now: Duration, block: u32, delivery: Delivery) {
        let _ = (now, block, delivery);
        unimplemented!()
    }

    /// Datagrams that the own host threw away so far, in all.
    pub fn overflowed(&mut self, total: u32) {
        let _ = total;
        unimplemented!()
    }

    /// A report, if one is due.
    pub fn report(&mut self, now: Duration) -> Option<Report> {
        let _ = now;
        unimplemented!()
    }

    /// When to ask for a report again, at the latest.
    pub fn next(&self) -> Duration {
        unimplemented!()
    }

    /// Leaves: the next report says so, and then the state is no longer [`State::Receiving`].
    pub fn leave(&mut self) {
        unimplemented!()
    }

    /// Whether it still takes part.
    pub fn state(&self) -> State {
        unimplemented!()
    }

    /// Blocks that are here, of all.
    pub fn done(&self) -> (u32, u32) {
        unimplemented!()
    }

    /// Blocks that are not here.
    pub fn lacking(&self) -> Vec<u32> {
        unimplemented!()
    }
}
