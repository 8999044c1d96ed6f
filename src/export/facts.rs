//! What an export says of itself.

use std::fmt;
use std::str::FromStr;

pub use crate::manifest::ImageId;
use crate::manifest::{ParseIdError, parse_hex, write_hex};
use crate::nbd::BlockSizes;
use crate::nbd::wire::BASE_ALLOCATION;
use bitflags::bitflags;

/// The facts of an export. [`Facts::size`] and the capabilities are fixed for its life.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// Size in bytes.
    pub size: u64,
    /// Whether it can be written to.
    pub writable: bool,
    /// Whether [`Export::trim`](super::Export::trim) has an effect.
    pub can_trim: bool,
    /// Whether zeroes can be written faster than data; a single request may still refuse.
    pub can_zero_fast: bool,
    /// Whether all connections see one view of what was flushed.
    pub is_shared: bool,
    /// Which requests it serves well.
    pub block_sizes: BlockSizes,
    /// What [`Export::extents`](super::Export::extents) can answer.
    pub contexts: Vec<Context>,
    /// A line for a human.
    pub description: String,
    /// What the image holds, if that is known.
    pub identity: Option<ImageId>,
    /// The mirrors that the bytes pass through on their way here, this one first. Empty for a real image; whoever asks
    /// a server about one is told that server.
    pub path: Vec<NodeId>,
    /// The server that holds the real image at the end of that path, if it says so. Drawn anew at each of its starts.
    pub origin: Option<NodeId>,
}

impl Facts {
    /// A read-only export of `size` bytes that every connection sees alike.
    pub fn read_only(size: u64, description: impl Into<String>) -> Self {
        Self {
            size,
            writable: false,
            can_trim: false,
            can_zero_fast: false,
            is_shared: true,
            block_sizes: BlockSizes::DEFAULT,
            contexts: vec![Context::Allocation],
            description: description.into(),
            identity: None,
            path: Vec::new(),
            origin: None,
        }
    }
}

/// A metadata context.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Context {
    /// `base:allocation`: status is [`Allocation`](crate::nbd::wire::Allocation).
    Allocation,
    /// `x-headwater:residency`: status is [`Residency`].
    Residency,
}

impl Context {
    /// The name on the wire.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Allocation => BASE_ALLOCATION,
            Self::Residency => "x-headwater:residency",
        }
    }
}

bitflags! {
    /// States of `x-headwater:residency`. No bit: the bytes would have to be fetched.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Residency: u32 {
        /// The bytes are here, verified and durable.
        const RESIDENT = 1 << 0;
        /// The bytes are known to be zero, and nothing is stored.
        const ZERO = 1 << 1;
        /// The bytes are kept whatever happens.
        const PINNED = 1 << 2;
        /// The bytes were brought ahead of demand, and nobody has read them yet.
        const UNREAD = 1 << 3;
    }
}

/// Names one mirror's cache, for life; drawn at random when the cache is made. Real images have none: there it names the
/// server's process.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NodeId(pub [u8; 16]);

impl NodeId {
    /// One that nobody else has.
    pub fn random() -> Self {
        let mut id = [0; 16];
        let got = rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty());
        assert_eq!(got, Ok(16), "the kernel has randomness once the system is up");
        Self(id)
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0)
    }
}

impl FromStr for NodeId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        parse_hex(text).map(Self).ok_or(ParseIdError)
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The namespace of everything that only Headwater servers say to each other.
pub const NAMESPACE: &str = "x-headwater:";

impl Facts {
    /// What other Headwater servers are told, as names of metadata contexts.
    pub fn to_strings(&self) -> Vec<String> {
        let mut strings = Vec::new();
        if let Some(identity) = self.identity {
            strings.push(format!("{NAMESPACE}image={identity}"));
        }
        if !self.path.is_empty() {
            let path: Vec<_> = self.path.iter().take(MAX_PATH).map(NodeId::to_string).collect();
            strings.push(format!("{NAMESPACE}path={}", path.join(",")));
        }
        if let Some(origin) = self.origin {
            strings.push(format!("{NAMESPACE}origin={origin}"));
        }
        strings
    }

    /// The servers that the bytes pass through on their way here, this one first.
    pub fn way(&self) -> impl Iterator<Item = NodeId> {
        self.path.iter().copied().chain(self.origin)
    }

    /// Takes over what a server said with [`Facts::to_strings`]. What is not understood is left out.
    pub fn learn(&mut self, strings: &[String]) {
        for fact in strings.iter().filter_map(|text| text.strip_prefix(NAMESPACE)) {
            match fact.split_once('=') {
                Some(("image", id)) => self.identity = id.parse().ok(),
                Some(("origin", id)) => self.origin = id.parse().ok(),
                Some(("path", path)) => self.path = path.split(',').filter_map(|id| id.parse().ok()).collect(),
                _ => {}
            }
        }
    }
}

/// Mirrors in one path that fit a string of 4096 bytes; nobody builds tiers so deep.
const MAX_PATH: usize = 100;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_travel_as_strings() {
        let mut facts = Facts::read_only(1, "");
        facts.identity = Some(ImageId([0xab; 32]));
        facts.path = vec![NodeId([1; 16]), NodeId([0xfe; 16])];
        facts.origin = Some(NodeId([7; 16]));
        let strings = facts.to_strings();
        assert_eq!(strings[0], format!("x-headwater:image=blake3-{}", "ab".repeat(32)));
        let mut learned = Facts::read_only(1, "");
        learned.learn(&strings);
        assert_eq!(learned, facts);
    }

    #[test]
    fn what_is_not_understood_is_left_out() {
        let mut facts = Facts::read_only(1, "");
        facts.learn(&["x-headwater:image=md5-1".into(), "x-headwater:new".into(), "qemu:image=blake3-".into()]);
        facts.learn(&["x-headwater:path=zz,,".into()]);
        assert_eq!(facts, Facts::read_only(1, ""));
        assert!("blake3-é".parse::<ImageId>().is_err());
        assert!("+1".repeat(16).parse::<NodeId>().is_err());
    }

    #[test]
    fn a_path_of_any_depth_fits_a_string() {
        let mut facts = Facts::read_only(1, "");
        facts.path = vec![NodeId([7; 16]); 5000];
        assert!(facts.to_strings()[0].len() <= crate::nbd::wire::MAX_STRING);
    }
}
