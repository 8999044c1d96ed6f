//! Datagrams: their bytes, and the tag by which a forged one is known.
//!
//! STUB

use std::time::{Duration, SystemTime};

use thiserror::Error;

use super::{ReceiverId, SessionId};
use crate::manifest::{ImageId, Shape};

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
#[derive(Debug, Clone)]
pub struct Key;

impl Key {
    /// The key of a session.
    pub fn new(image: ImageId, session: SessionId) -> Self {
        let _ = (image, session);
        unimplemented!()
    }
}

/// Appends the bytes of a datagram to `to`.
pub fn encode(head: Head, datagram: &Datagram<'_>, key: &Key, to: &mut Vec<u8>) {
    let _ = (head, datagram, key, to);
    unimplemented!()
}

/// The session of a datagram, and the image if it is an announcement: what is needed to find the key.
pub fn peek(bytes: &[u8]) -> Result<(Head, Option<ImageId>), Malformed> {
    let _ = bytes;
    unimplemented!()
}

/// Reads a datagram.
pub fn decode<'a>(bytes: &'a [u8], key: &Key) -> Result<(Head, Datagram<'a>), Malformed> {
    let _ = (bytes, key);
    unimplemented!()
}

/// Bytes of the largest symbol that fits a datagram of so many bytes (without the headers of UDP and IP).
pub const fn symbol_for(datagram: usize) -> u16 {
    let _ = datagram;
    unimplemented!()
}
