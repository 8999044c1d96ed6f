//! Datagrams: their bytes, and the tag by which a forged one is known.
//!
//! | file | holds |
//! | --- | --- |
//! | this one | what there is to say, its bounds, the key |
//! | `write` | to bytes |
//! | `read` | from bytes, and from bytes that a stranger made |
//!
//! All numbers are little-endian. A datagram is a head of [`HEAD`] bytes, a body, and a tag of [`TAG`] bytes; the tables are
//! in `docs/formats.md`. There is one way to write each, and no other is read.
//!
//! Owns: the form, and which numbers make sense. Does not own: what is done with it (`sender`, `receiver`), whether a
//! symbol belongs to the layout (`receiver`).

mod read;
#[cfg(test)]
mod tests;
mod write;

use std::fmt;
use std::time::{Duration, SystemTime};

use thiserror::Error;

use super::layout::MOST_PAGES;
use super::{MOST_PARITY, ReceiverId, SessionId};
use crate::manifest::{CHUNK_SIZES, ImageId, Shape};
pub(super) use read::{TOLD, terms_of};
pub use read::{decode, fuzz, peek};
pub use write::encode;

/// Bytes before the body: what it is, the session, the number.
pub const HEAD: usize = 14;
/// Bytes behind the body.
pub const TAG: usize = 8;
/// Bytes of the largest datagram that is read: more than a frame of 9000 bytes holds.
pub const MOST_BYTES: usize = 9000;
/// Bytes of a symbol, at least and at most; an even number.
pub const SYMBOLS: std::ops::RangeInclusive<u16> = 64..=symbol_for(MOST_BYTES);
/// Bytes of the largest block.
pub const MOST_BLOCK: u32 = 4 << 20;
/// Data symbols that a block has at most: half of the code's field, so that parity always has room.
pub const MOST_SYMBOLS: u32 = 32768;
/// The longest time between reports, and the longest to spread them over; the shortest is 1 ms.
pub const LONGEST: Duration = Duration::from_secs(3600);

/// The first byte of every datagram.
const MAGIC: u8 = 0xCA;
/// The upper half of the second byte. The lower one is what it is.
const VERSION: u8 = 1;
const ANNOUNCE: u8 = 1;
const PAGE: u8 = 2;
const SYMBOL: u8 = 3;
const WORD: u8 = 4;
const REPORT: u8 = 5;

/// What keys are derived with; see BLAKE3's `derive_key`.
const CONTEXT: &str = "Headwater 2026-11-22 cast datagram, version 1";

/// Bytes of a symbol's body before its bytes.
const SYMBOL_HEAD: usize = 6;
/// Bytes of a page's body before its runs.
const PAGE_HEAD: usize = 2;
/// Bytes of a word's body before its lists.
const WORD_HEAD: usize = 6;
/// Bytes of a report's body before its needs.
const REPORT_HEAD: usize = 37;
/// Bytes of a run, and of a need.
pub(super) const ITEM: usize = 8;
/// Milliseconds from 1970 to the year 10000, after which nobody has a deadline.
const LAST_MOMENT: u64 = 253_402_300_800_000;

/// What does not change during a session. Every announcement has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Terms {
    /// The session.
    pub session: SessionId,
    /// The image. Who has another one, or does not know what it has, takes no part.
    pub image: ImageId,
    /// How the image's manifest cuts it.
    pub shape: Shape,
    /// Bytes of a block: a multiple of the chunk size.
    pub block: u32,
    /// Bytes of a symbol; even.
    pub symbol: u16,
    /// Parity symbols that each block has.
    pub parity: u16,
    /// Pages of the plan: of the runs of chunks that are sent first.
    pub pages: u16,
    /// A digest of the plan, so that pages of different plans are not mixed.
    pub plan: u64,
    /// Whether the rest of the image follows.
    pub rest: bool,
    /// When everything is to be there.
    pub deadline: Option<SystemTime>,
}

/// How far a session is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// It waits for receivers.
    Waiting,
    /// Blocks are sent.
    Sending,
    /// Everything was sent; who lacks something is to say so now.
    Ending,
    /// It is over. `true`: well; `false`: called off.
    Ended(bool),
}

/// Says what the session is and how far.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Announce {
    /// What it is.
    pub terms: Terms,
    /// How far it is.
    pub phase: Phase,
    /// Blocks of the first pass whose symbols have all been sent.
    pub passed: u32,
    /// Bytes per second, of datagrams.
    pub rate: u64,
    /// A receiver reports once in so long (by chance half as long to one and a half times as long).
    pub report_every: Duration,
    /// What is lacking is told after a random part of this.
    pub spread: Duration,
}

/// Chunks that follow each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The first.
    pub first: u32,
    /// How many.
    pub count: u32,
}

/// A part of the plan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    /// Its number.
    pub page: u16,
    /// Runs of chunks, in the order in which they are sent.
    pub runs: Vec<Run>,
}

/// Blocks that follow each other and lack equally many symbols.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Need {
    /// The first.
    pub first: u32,
    /// How many.
    pub count: u16,
    /// Symbols of each.
    pub symbols: u16,
}

/// What the sender tells everybody.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Word {
    /// Will be sent: whoever lacks no more than this need not ask.
    pub coming: Vec<Need>,
    /// Will not be sent again: to be fetched from the upstream. `symbols` means nothing here.
    pub unicast: Vec<Need>,
    /// Receivers that are too slow: they are to leave.
    pub dropped: Vec<ReceiverId>,
}

/// What a receiver is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// It takes part.
    Joined,
    /// It has everything.
    Complete,
    /// It leaves without having everything, and fetches the rest from its upstream.
    Leaving,
}

/// What a receiver tells the sender.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Who.
    pub receiver: ReceiverId,
    /// What it is about.
    pub standing: Standing,
    /// Blocks that it has.
    pub done: u32,
    /// Datagrams of the session that came since its last report.
    pub seen: u32,
    /// Those that did not, by the gaps in their numbers.
    pub lost: u32,
    /// Of these, those that its own host threw away because it was too slow.
    pub overflowed: u32,
    /// The number of the last datagram that it had heard: what was sent later is not in `needs`.
    pub heard: u32,
    /// What it lacks of what has been sent.
    pub needs: Vec<Need>,
}

/// A datagram.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Datagram<'a> {
    /// From the sender.
    Announce(Announce),
    /// From the sender.
    Page(Page),
    /// From the sender: symbol `index` of `block`. Those with indexes from the number of data symbols on are parity.
    Symbol {
        /// The block.
        block: u32,
        /// The symbol in it.
        index: u16,
        /// Its bytes.
        bytes: &'a [u8],
    },
    /// From the sender.
    Word(Word),
    /// From a receiver.
    Report(Report),
}

/// Why a datagram is none of ours, or not to be believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Malformed {
    /// It is something else, or of another version.
    #[error("it is no datagram of this protocol")]
    Foreign,
    /// It is cut off, or has numbers that make no sense.
    #[error("it is malformed")]
    Broken,
    /// Its tag is wrong.
    #[error("its tag is wrong")]
    Forged,
}

/// What every datagram begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// The session.
    pub session: SessionId,
    /// Counts the datagrams of who sent it.
    pub number: u32,
}

/// What the tags of a session are made with: derived from the identity of the image and the session, so only who knows what
/// the image is can make one. That keeps strangers from costing us anything; what the bytes are worth is seen by the manifest.
#[derive(Clone)]
pub struct Key([u8; 32]);

impl Key {
    /// The key of a session.
    pub fn new(image: ImageId, session: SessionId) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key(CONTEXT);
        hasher.update(&image.0).update(&session.0.to_le_bytes());
        Self(*hasher.finalize().as_bytes())
    }

    /// The tag of a head and a body: the first bytes of the keyed hash.
    ///
    /// Eight bytes, because a forger learns nothing from a wrong guess and has to make one for each datagram; and they may
    /// be compared byte by byte, because nothing is answered from which the time that this took could be told.
    fn tag(&self, bytes: &[u8]) -> [u8; TAG] {
        let hash = blake3::keyed_hash(&self.0, bytes);
        std::array::from_fn(|index| hash.as_bytes()[index])
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key")
    }
}

impl Terms {
    /// Whether the numbers make sense together. Nothing in a [`super::layout::Layout`] of terms that do is larger than
    /// their shape is: whoever hears them compares that with the manifest first.
    pub fn is_sound(&self) -> bool {
        let Shape { image_size, chunk_size } = self.shape;
        let is_shape = chunk_size.is_power_of_two()
            && CHUNK_SIZES.contains(&chunk_size)
            && image_size > 0
            && self.shape.count() <= u64::from(u32::MAX);
        is_shape
            && (1..=MOST_BLOCK).contains(&self.block)
            && self.block.is_multiple_of(chunk_size)
            && SYMBOLS.contains(&self.symbol)
            && self.symbol.is_multiple_of(2)
            && self.block.div_ceil(u32::from(self.symbol)) <= MOST_SYMBOLS
            && (1..=MOST_PARITY).contains(&self.parity)
            && self.pages <= MOST_PAGES
            && (self.pages > 0 || self.rest)
    }
}

/// Bytes of the largest symbol that fits a datagram of so many bytes (without the headers of UDP and IP): an even number.
/// 1444 of the 1472 that an Ethernet frame has for IPv4, 1424 of the 1452 for IPv6.
pub const fn symbol_for(datagram: usize) -> u16 {
    let datagram = if datagram > MOST_BYTES { MOST_BYTES } else { datagram };
    let room = datagram.saturating_sub(HEAD + SYMBOL_HEAD + TAG);
    #[expect(clippy::cast_possible_truncation, reason = "at most 9000")]
    let room = room as u16;
    room - room % 2
}

/// Runs that fit a page in a datagram of so many bytes.
pub const fn most_runs(datagram: usize) -> usize {
    datagram.saturating_sub(HEAD + PAGE_HEAD + TAG) / ITEM
}

/// Needs that fit a report in a datagram of so many bytes. A word fits if `coming`, `unicast` and twice `dropped` are no
/// more together.
pub const fn most_needs(datagram: usize) -> usize {
    datagram.saturating_sub(HEAD + REPORT_HEAD + TAG) / ITEM
}

const _: () = assert!(WORD_HEAD <= REPORT_HEAD, "what fits a report fits a word");
