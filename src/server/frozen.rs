//! A connection between two processes: what was negotiated, and what has been asked and not answered.
//!
//! Owns: its form, and making the parts of a connection out of it again. Does not own: freezing (`transmission`), and the
//! way to the other process (`control::takeover`).
//!
//! Each request is answered by one of the two. What changes something has been done by the first, which has also put its
//! answer into `output`. What only reads and was not answered whole is asked again by the second, from where the answer
//! stops. Both know that from this description alone.

use std::fmt;

use data_encoding::BASE64;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::directory::Offered;
use crate::export::Visitor;
use crate::nbd::handshake::ReplyMode;
use crate::nbd::reply::ReplyTo;
use crate::nbd::request::{Command, Durability, Extents, Fragments, Rules};
use crate::nbd::wire::TransmissionFlags;
use crate::net::SavedTls;
use crate::ranges::ByteRange;

/// A connection in its transmission phase, of no process.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Frozen {
    /// Names its socket: the number of its inode.
    pub socket: u64,
    /// Its address, as operators see it.
    pub peer: String,
    /// Who it is.
    pub visitor: Visitor,
    /// Its TLS, if it has turned to it. The keys are in it.
    #[serde(default)]
    pub tls: Option<SavedTls>,
    /// The full name of its export.
    pub export: String,
    /// What the export held, as far as anybody knows.
    #[serde(default)]
    pub identity: Option<String>,
    /// The file of the export, if its bytes are those of one file: device and inode.
    #[serde(default)]
    pub file: Option<[u64; 2]>,
    /// Whether it is a mirror.
    #[serde(default)]
    pub is_mirror: bool,
    /// The mirror that it belongs to.
    #[serde(default)]
    pub mirror: Option<String>,
    /// What it calls the connection, in hexadecimal digits.
    #[serde(default)]
    pub connection: Option<String>,
    /// Whether it is a relay of another server.
    #[serde(default)]
    pub is_relay: bool,
    /// Where it was served from, if not from here.
    #[serde(default)]
    pub relayed_to: Option<String>,
    /// What was agreed.
    pub agreed: Agreed,
    /// What it has done.
    pub done: Done,
    /// Received, and not looked at.
    pub input: Blob,
    /// To be sent first.
    pub output: Blob,
    /// To be sent behind the answer that has been begun.
    pub held: Blob,
    /// The payload that is arriving.
    #[serde(default)]
    pub payload: Option<FrozenPayload>,
    /// What has been asked, changes nothing, and is not answered whole. One that has been begun comes first.
    pub asks: Vec<Ask>,
}

/// What client and server have agreed upon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agreed {
    /// The size of the export in bytes.
    pub size: u64,
    /// The transmission flags, as on the wire.
    pub flags: u16,
    /// The smallest unit of offset and length.
    pub minimum_block: u32,
    /// The largest payload.
    pub maximum_payload: u64,
    /// How replies look.
    pub replies: FrozenMode,
    /// Metadata contexts with their ids on the wire.
    pub contexts: Vec<(u32, String)>,
}

/// [`ReplyMode`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FrozenMode {
    /// One header, then the data.
    Simple,
    /// Chunks.
    Structured,
    /// Chunks with 64-bit lengths.
    Extended,
}

/// What a client has done, for operators.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Done {
    /// The number by which operators know the client.
    #[serde(default)]
    pub id: u64,
    /// For how long it has been connected.
    pub connected_seconds: f64,
    /// Requests taken.
    pub requests: u64,
    /// Bytes of the image that were read.
    pub read_bytes: u64,
    /// Bytes of the image that were written.
    pub written_bytes: u64,
    /// Requests answered with an error.
    pub errors: u64,
    /// Requests that were asked twice.
    pub replayed: u64,
    /// Requests whose time is known.
    pub timed_requests: u64,
    /// How long these took together.
    pub latency_nanoseconds: u64,
    /// Whether it waits for news.
    pub hears_notices: bool,
}

/// A request that changes nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ask {
    /// The client's cookie.
    pub cookie: u64,
    /// The offset in its request, which answers may have to repeat.
    pub offset: u64,
    /// What it asked for.
    pub what: What,
    /// First byte of what is still to be answered.
    pub start: u64,
    /// One past the last.
    pub end: u64,
}

/// What is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum What {
    /// The bytes.
    Read {
        /// Whether it must be one chunk (DF).
        whole: bool,
        /// Whether the one frame that the answer is has been begun: only bytes follow.
        begun: bool,
    },
    /// Their status.
    BlockStatus {
        /// Of the first extent only (REQ_ONE).
        one: bool,
    },
    /// Nothing; they will be needed.
    Cache,
}

/// Payload of which a part has arrived, and has been dealt with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrozenPayload {
    /// The client's cookie.
    pub cookie: u64,
    /// The offset in its request.
    pub offset: u64,
    /// The rest of the payload.
    pub rest: FrozenRest,
    /// The error that the request will be answered with, as on the wire; 0 if there is none.
    pub error: u32,
    /// Its text.
    pub message: String,
}

/// What becomes of the rest of a payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FrozenRest {
    /// So many bytes are skipped.
    Skip(u64),
    /// It is written here.
    Write {
        /// First byte.
        start: u64,
        /// One past the last.
        end: u64,
        /// Whether it must be durable before the answer (FUA).
        stable: bool,
    },
}

/// Bytes; in JSON as base64 (RFC 4648, section 4). They may be of an image, and are not shown.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Blob(pub Vec<u8>);

impl fmt::Debug for Blob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes", self.0.len())
    }
}

impl Serialize for Blob {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&BASE64.encode_display(&self.0))
    }
}

impl<'de> Deserialize<'de> for Blob {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = <std::borrow::Cow<'de, str>>::deserialize(deserializer)?;
        BASE64.decode(text.as_bytes()).map(Self).map_err(serde::de::Error::custom)
    }
}

impl From<ReplyMode> for FrozenMode {
    fn from(mode: ReplyMode) -> Self {
        match mode {
            ReplyMode::Simple => Self::Simple,
            ReplyMode::Structured => Self::Structured,
            ReplyMode::Extended => Self::Extended,
        }
    }
}

impl From<FrozenMode> for ReplyMode {
    fn from(mode: FrozenMode) -> Self {
        match mode {
            FrozenMode::Simple => Self::Simple,
            FrozenMode::Structured => Self::Structured,
            FrozenMode::Extended => Self::Extended,
        }
    }
}

impl Agreed {
    pub(super) fn of(rules: &Rules, contexts: &[(u32, Offered)]) -> Self {
        let Rules { size, flags, minimum_block, maximum_payload, mode, .. } = *rules;
        let contexts = contexts.iter().map(|(id, context)| (*id, context.name().to_owned())).collect();
        Self { size, flags: flags.bits(), minimum_block, maximum_payload, replies: mode.into(), contexts }
    }

    pub(super) fn flags(&self) -> TransmissionFlags {
        TransmissionFlags::from_bits_truncate(self.flags)
    }

    pub(super) fn rules(&self) -> Rules {
        Rules {
            size: self.size,
            flags: self.flags(),
            minimum_block: self.minimum_block,
            maximum_payload: self.maximum_payload,
            mode: self.replies.into(),
            has_contexts: !self.contexts.is_empty(),
        }
    }

    /// The contexts, as far as this program knows them.
    pub(super) fn contexts(&self) -> Vec<(u32, Offered)> {
        self.contexts.iter().filter_map(|(id, name)| Some((*id, Offered::named(name)?))).collect()
    }
}

impl Ask {
    /// What is still to be done for `to`, who has been given what comes before `answered_to`. `None` if it may not be
    /// asked twice.
    pub(super) fn of(to: ReplyTo, command: Command, answered_to: u64, begun: bool) -> Option<Self> {
        let (what, range) = match command {
            Command::Read(range, fragments) => (What::Read { whole: fragments == Fragments::Forbidden, begun }, range),
            Command::BlockStatus(range, extents) => (What::BlockStatus { one: extents == Extents::One }, range),
            Command::Cache(range) => (What::Cache, range),
            _ => return None,
        };
        let ReplyTo { cookie, offset } = to;
        Some(Self { cookie, offset, what, start: answered_to.max(range.start()), end: range.end() })
    }

    pub(super) const fn to(&self) -> ReplyTo {
        ReplyTo { cookie: self.cookie, offset: self.offset }
    }

    pub(super) const fn is_begun(&self) -> bool {
        matches!(self.what, What::Read { begun: true, .. })
    }

    /// The command, over what is left of it. `None` if it makes no sense in an image of `size` bytes.
    pub(super) fn command(&self, size: u64) -> Option<Command> {
        if self.start > self.end || self.end > size {
            return None;
        }
        let range = ByteRange::between(self.start, self.end);
        Some(match self.what {
            What::Read { whole, .. } => {
                Command::Read(range, if whole { Fragments::Forbidden } else { Fragments::Allowed })
            }
            What::BlockStatus { one } => Command::BlockStatus(range, if one { Extents::One } else { Extents::Many }),
            What::Cache => Command::Cache(range),
        })
    }
}

impl FrozenRest {
    pub(super) fn write(rest: ByteRange, durability: Durability) -> Self {
        Self::Write { start: rest.start(), end: rest.end(), stable: durability == Durability::Stable }
    }
}
