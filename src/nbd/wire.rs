//! Numbers on the wire and the limits that go with them ("Values" in the protocol document).

use bitflags::bitflags;

use crate::units::MIB;

/// First words of a server: `NBDMAGIC`.
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Start of the newstyle greeting and of every option: `IHAVEOPT`.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// What an oldstyle server sends instead of [`OPTION_MAGIC`].
pub const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// Start of every reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Start of a compact request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Start of a request with 64-bit length.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Start of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Start of a structured reply chunk.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// Start of an extended reply chunk.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// The port that IANA gave NBD.
pub const DEFAULT_PORT: u16 = 10809;

/// Strings (names, queries, messages) are at most this long ("Conventions").
pub const MAX_STRING: usize = 4096;
/// The largest payload of one request or of one read, announced as such ("Size constraints").
pub const MAX_PAYLOAD: u32 = 32 << 20;
/// [`MAX_PAYLOAD`] as a length in memory.
pub const MAX_PAYLOAD_BYTES: u64 = 32 * MIB;
/// What a client may ask for that was told no maximum: not all of them know the protocol's default, which is
/// [`MAX_PAYLOAD`] (nbd's own test suite asks for 48 MiB). nbdkit draws the line here too.
pub const MAX_PAYLOAD_UNTOLD: u64 = 64 * MIB;
/// Status descriptors in one reply chunk (`NBD_REPLY_TYPE_BLOCK_STATUS`).
pub const MAX_EXTENTS: usize = 1 << 20;
/// Zero bytes behind the answer to EXPORT_NAME, unless both sides agreed on `NO_ZEROES`.
pub const EXPORT_NAME_PADDING: usize = 124;

/// Options a client can send.
pub mod option {
    #![expect(missing_docs, reason = "the names are the protocol's own")]
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Replies to options.
pub mod option_reply {
    #![expect(missing_docs, reason = "the names are the protocol's own")]
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERROR_BIT: u32 = 1 << 31;
    pub const ERR_UNSUP: u32 = ERROR_BIT + 1;
    pub const ERR_POLICY: u32 = ERROR_BIT + 2;
    pub const ERR_INVALID: u32 = ERROR_BIT + 3;
    pub const ERR_PLATFORM: u32 = ERROR_BIT + 4;
    pub const ERR_TLS_REQD: u32 = ERROR_BIT + 5;
    pub const ERR_UNKNOWN: u32 = ERROR_BIT + 6;
    pub const ERR_SHUTDOWN: u32 = ERROR_BIT + 7;
    pub const ERR_BLOCK_SIZE_REQD: u32 = ERROR_BIT + 8;
    pub const ERR_TOO_BIG: u32 = ERROR_BIT + 9;
    pub const ERR_EXT_HEADER_REQD: u32 = ERROR_BIT + 10;
}

/// Items of information about an export.
pub mod info {
    #![expect(missing_docs, reason = "the names are the protocol's own")]
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// Commands of the transmission phase.
pub mod command {
    #![expect(missing_docs, reason = "the names are the protocol's own")]
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// Types of structured and extended reply chunks.
pub mod chunk {
    #![expect(missing_docs, reason = "the names are the protocol's own")]
    pub const FLAG_DONE: u16 = 1;
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    pub const BLOCK_STATUS_EXT: u16 = 6;
    pub const ERROR_BIT: u16 = 1 << 15;
    pub const ERROR: u16 = ERROR_BIT + 1;
    pub const ERROR_OFFSET: u16 = ERROR_BIT + 2;
}

bitflags! {
    /// Sent by the server in its greeting, and echoed by the client.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct HandshakeFlags: u16 {
        /// Options other than EXPORT_NAME are understood.
        const FIXED_NEWSTYLE = 1 << 0;
        /// No padding behind the answer to EXPORT_NAME.
        const NO_ZEROES = 1 << 1;
    }

    /// What an export can do ("Transmission flags").
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct TransmissionFlags: u16 {
        /// Always set.
        const HAS_FLAGS = 1 << 0;
        /// Writes are refused.
        const READ_ONLY = 1 << 1;
        /// FLUSH is understood.
        const SEND_FLUSH = 1 << 2;
        /// The FUA flag is understood.
        const SEND_FUA = 1 << 3;
        /// The medium rotates.
        const ROTATIONAL = 1 << 4;
        /// TRIM is understood.
        const SEND_TRIM = 1 << 5;
        /// WRITE_ZEROES is understood.
        const SEND_WRITE_ZEROES = 1 << 6;
        /// The DF flag is understood; only with structured or extended replies.
        const SEND_DF = 1 << 7;
        /// All connections see one view of what has been flushed.
        const CAN_MULTI_CONN = 1 << 8;
        /// CACHE is understood.
        const SEND_CACHE = 1 << 10;
        /// The FAST_ZERO flag is understood.
        const SEND_FAST_ZERO = 1 << 11;
        /// BLOCK_STATUS may name the contexts that it wants; only with extended headers.
        const BLOCK_STATUS_PAYLOAD = 1 << 12;
    }

    /// Flags of one request ("Command flags").
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct CommandFlags: u16 {
        /// Answer only when the effect is on stable storage.
        const FUA = 1 << 0;
        /// WRITE_ZEROES must leave the range allocated.
        const NO_HOLE = 1 << 1;
        /// READ must be answered in one chunk.
        const DF = 1 << 2;
        /// BLOCK_STATUS wants one extent per context.
        const REQ_ONE = 1 << 3;
        /// WRITE_ZEROES must be faster than a write, or fail.
        const FAST_ZERO = 1 << 4;
        /// The length counts payload bytes; only with extended headers.
        const PAYLOAD_LEN = 1 << 5;
    }

    /// States of `base:allocation`.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Allocation: u32 {
        /// No storage is allocated.
        const HOLE = 1 << 0;
        /// Reads as zeroes.
        const ZERO = 1 << 1;
    }
}

/// The metadata context of allocation, defined by the protocol itself.
pub const BASE_ALLOCATION: &str = "base:allocation";

/// A query by which a Headwater mirror says in LIST_META_CONTEXT that it is one. No context has this name.
pub const MIRROR: &str = "x-headwater:mirror";

/// The same with the name of the mirror: `x-headwater:mirror=NODE`.
pub const MIRROR_NODE: &str = "x-headwater:mirror=";

/// A query by which a Headwater server says in LIST_META_CONTEXT that it asks for clients of its own, which it relays.
pub const RELAY: &str = "x-headwater:relay";

/// The metadata context whose BLOCK_STATUS is held back until there is news for the client.
pub const NOTICE: &str = "x-headwater:notice";

/// A query by which a client names this connection: `x-headwater:connection=TOKEN`, 32 hexadecimal digits that nobody
/// can guess.
pub const CONNECTION: &str = "x-headwater:connection=";

/// A query that asks the server to close the connection with that name as soon as all that it received is answered:
/// `x-headwater:close=TOKEN`.
pub const CLOSE: &str = "x-headwater:close=";
