//! One sending that fills many mirrors: the protocol, without I/O.
//!
//! | file | holds |
//! | --- | --- |
//! | [`form`] | datagrams: their bytes, and the tag by which a forged one is known |
//! | [`layout`] | what is sent in which order, cut into blocks and symbols |
//! | [`code`] | forward error correction of a block: Reed–Solomon |
//! | [`assembly`] | the bytes of blocks that have come in part |
//! | [`sender`] | which datagram is next, and what is sent again |
//! | [`receiver`] | what has come, what is lacking, and when to say so |
//! | `rate` | how fast, for receivers of different strength |
//! | `repair` | the needs of all receivers together |
//! | `chance` | random numbers that repeat |
//!
//! A *session* is one sending of one image to one group. What is sent is a stream: the chunks of a profile first, in its
//! order, then the rest of the image in its own, chunks that are all zero left out. The stream is cut into *blocks*, a
//! block into *symbols* that fill a datagram each; *parity* symbols follow them, and any so many symbols of a block as it
//! has data make it whole. The symbols of [`DEPTH`] blocks take turns, so a burst of losses takes little of each. What is
//! lacking then is told to the sender, which sends parity that nobody has seen yet: one datagram mends what each receiver
//! lacks, whatever it is.
//!
//! After Frisbee (Hibler et al., USENIX 2003: receivers rule, joining in the middle), NORM (RFC 5740: parity on demand,
//! suppression of what others have asked for) and Rizzo (*Effective erasure codes*, CCR 1997).
//!
//! Owns: the protocol. It has no sockets, no clock and no files: time is what callers say. Does not own: sending,
//! receiving and storing (`multicast`), orders (`control`).

pub mod assembly;
mod chance;
pub mod code;
pub mod form;
pub mod layout;
mod rate;
pub mod receiver;
mod repair;
pub mod sender;

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

use crate::units::MIB;

/// Bytes of a block, unless a chunk has more: then it is one chunk.
pub const BLOCK: u64 = MIB;
/// Blocks whose symbols take turns.
pub const DEPTH: usize = 8;
/// Parity symbols that a block has, at most. After them its data come again.
pub const MOST_PARITY: u16 = 256;

/// Names a session. Drawn at random.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SessionId(pub u64);

impl fmt::Display for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for SessionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Why a text does not name a session.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("a session is named by 16 hexadecimal digits")]
pub struct ParseSessionError;

impl FromStr for SessionId {
    type Err = ParseSessionError;

    fn from_str(text: &str) -> Result<Self, ParseSessionError> {
        let is_hex = text.len() == 16 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
        let number = u64::from_str_radix(text, 16).ok().filter(|_| is_hex);
        number.map(Self).ok_or(ParseSessionError)
    }
}

/// Names a receiver: the random name of the mirror's cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReceiverId(pub [u8; 16]);
