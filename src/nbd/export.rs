//! What the protocol says of one export.

use super::wire::{MAX_PAYLOAD, TransmissionFlags};

/// An export as the negotiation presents it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    /// The canonical name, which is also the one in LIST.
    pub name: String,
    /// A line for a human; may be empty.
    pub description: String,
    /// Size in bytes.
    pub size: u64,
    /// Flags without `SEND_DF` and `BLOCK_STATUS_PAYLOAD`, which depend on what is negotiated.
    pub flags: TransmissionFlags,
    /// Which requests are allowed.
    pub block_sizes: BlockSizes,
    /// Metadata contexts that BLOCK_STATUS can answer. The position in this list is what a server gets back
    /// in [`Negotiated`](super::handshake::server::Negotiated).
    pub contexts: Vec<String>,
    /// Facts for other Headwater servers, as context names (`x-headwater:key=value`). They are listed to those
    /// who ask for the namespace, and cannot be selected.
    pub facts: Vec<String>,
}

/// `NBD_INFO_BLOCK_SIZE`: all in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSizes {
    /// Offsets and lengths are multiples of this power of two.
    pub minimum: u32,
    /// Aligned requests of this size are served well.
    pub preferred: u32,
    /// The longest payload of a read or a write.
    pub maximum: u32,
}

impl BlockSizes {
    /// What a client may assume when the server says nothing ("Size constraints").
    pub const DEFAULT: Self = Self { minimum: 1, preferred: 4096, maximum: MAX_PAYLOAD };

    /// Whether the values are ones that the protocol allows.
    pub const fn is_sound(self) -> bool {
        self.minimum.is_power_of_two()
            && self.minimum <= 1 << 16
            && self.preferred.is_power_of_two()
            && self.preferred >= self.minimum
            && self.maximum >= self.preferred
    }
}

/// A stretch of an export with one status, in a metadata context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Bytes; not zero.
    pub length: u64,
    /// Meaning defined by the context.
    pub status: u64,
}
