//! Manifests: what an image holds, as one digest for each chunk and one over all.
//!
//! | file | holds |
//! | --- | --- |
//! | this one | [`Digest`], [`ImageId`], the hash over all digests |
//! | `header` | the first block of a manifest: encoding, decoding |
//!
//! A manifest is one block of 4096 bytes ([`Header`]) and then 32 bytes for each chunk: the BLAKE3 digest of its bytes,
//! or 32 zero bytes if all of them are zero. The identity of the image is the BLAKE3 hash, in the mode for deriving
//! keys, of sizes and digests. So whoever knows the identity can tell whether a manifest is right, and whoever has the
//! manifest can tell whether a chunk is.
//!
//! Owns: the form. Does not own: files, who makes manifests (`image`), who believes them (`mirror`).

mod header;

use std::fmt;
use std::str::FromStr;

use thiserror::Error;

use crate::ranges::ByteRange;
use crate::units::to_usize;
pub use header::{BLOCK, FormatError, Header, Source, fuzz};

/// The chunk size of manifests unless told: that of mirrors.
pub const DEFAULT_CHUNK_SIZE: u32 = 64 << 10;

/// The smallest and the largest chunk.
pub const CHUNK_SIZES: std::ops::RangeInclusive<u32> = 4096..=4 << 20;

/// What the hash over all digests begins with, so that it is no other hash; see BLAKE3's `derive_key`.
const CONTEXT: &str = "Headwater 2026-11-21 image manifest, version 1";

/// Bytes of a digest.
pub const DIGEST: usize = 32;

/// The digest of one chunk: BLAKE3 of its bytes, or [`Digest::ZERO`].
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Digest(pub [u8; DIGEST]);

impl Digest {
    /// Stands for a chunk whose bytes are all zero.
    pub const ZERO: Self = Self([0; DIGEST]);

    /// The digest of a chunk.
    pub fn of(bytes: &[u8]) -> Self {
        if is_zero(bytes) { Self::ZERO } else { Self(*blake3::hash(bytes).as_bytes()) }
    }

    /// Whether the chunk is all zero.
    pub fn is_zero(&self) -> bool {
        *self == Self::ZERO
    }

    /// Splits digests that lie side by side; what is too short for one at the end is left out.
    pub fn split(bytes: &[u8]) -> impl ExactSizeIterator<Item = Self> + '_ {
        bytes.as_chunks().0.iter().map(|digest| Self(*digest))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write_hex(f, &self.0)
    }
}

/// Computes the digest of a chunk from its parts, for chunks that nobody wants in memory as a whole.
#[derive(Debug)]
pub struct ChunkHasher {
    hasher: Box<blake3::Hasher>,
    is_zero: bool,
}

impl ChunkHasher {
    /// For the next part to be the first.
    #[expect(clippy::new_without_default, reason = "there is no chunk of no bytes")]
    pub fn new() -> Self {
        Self { hasher: Box::default(), is_zero: true }
    }

    /// Takes the next bytes of the chunk.
    pub fn update(&mut self, bytes: &[u8]) {
        self.is_zero = self.is_zero && is_zero(bytes);
        self.hasher.update(bytes);
    }

    /// The digest.
    pub fn finish(&self) -> Digest {
        if self.is_zero { Digest::ZERO } else { Digest(*self.hasher.finalize().as_bytes()) }
    }
}

/// Whether all bytes are zero. Stops at the first block that is not, which for data is the first.
pub fn is_zero(bytes: &[u8]) -> bool {
    let blocks = bytes.chunks_exact(64);
    let rest = blocks.remainder();
    rest.iter().all(|byte| *byte == 0)
        && blocks.into_iter().all(|block| block.iter().fold(0, |all, byte| all | byte) == 0)
}

/// How an image is cut into the chunks of its manifest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Bytes of the image.
    pub image_size: u64,
    /// Bytes of a chunk, a power of two within [`CHUNK_SIZES`]; the last chunk may be short.
    pub chunk_size: u32,
}

impl Shape {
    /// The number of chunks.
    pub const fn count(self) -> u64 {
        self.image_size.div_ceil(self.chunk_size as u64)
    }

    /// The bytes of chunk `number`.
    pub fn range(self, number: u64) -> ByteRange {
        let start = number * u64::from(self.chunk_size);
        ByteRange::between(start, (start + u64::from(self.chunk_size)).min(self.image_size))
    }

    /// Bytes of a manifest.
    pub const fn manifest_length(self) -> u64 {
        digest_at(self.count())
    }
}

/// Where in a manifest the digest of chunk `number` lies.
pub const fn digest_at(number: u64) -> u64 {
    BLOCK as u64 + number * DIGEST as u64
}

/// Computes an identity from digests in the order of their chunks, without keeping them.
#[derive(Debug)]
pub struct IdHasher(Box<blake3::Hasher>);

impl IdHasher {
    /// For an image of this shape.
    pub fn new(shape: Shape) -> Self {
        let mut hasher = Box::new(blake3::Hasher::new_derive_key(CONTEXT));
        hasher.update(&shape.image_size.to_le_bytes());
        hasher.update(&shape.chunk_size.to_le_bytes());
        Self(hasher)
    }

    /// Takes digests as they lie in a manifest; they may be cut anywhere.
    pub fn update(&mut self, digests: &[u8]) {
        self.0.update(digests);
    }

    /// The identity.
    pub fn finish(&self) -> ImageId {
        ImageId(*self.0.finalize().as_bytes())
    }
}

/// The identity of an image: the hash over its manifest.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ImageId(pub [u8; 32]);

const ID_PREFIX: &str = "blake3-";

impl fmt::Display for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(ID_PREFIX)?;
        write_hex(f, &self.0)
    }
}

impl FromStr for ImageId {
    type Err = ParseIdError;

    fn from_str(text: &str) -> Result<Self, ParseIdError> {
        text.strip_prefix(ID_PREFIX).and_then(parse_hex).map(Self).ok_or(ParseIdError)
    }
}

impl fmt::Debug for ImageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A text is not an identity of this kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("not an identity")]
pub struct ParseIdError;

/// Writes bytes as hexadecimal digits.
pub fn write_hex(f: &mut fmt::Formatter<'_>, bytes: &[u8]) -> fmt::Result {
    bytes.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
}

/// Reads just so many bytes from hexadecimal digits.
pub fn parse_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    if text.len() != 2 * N || !text.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    for (byte, digits) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
        *byte = u8::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()?;
    }
    Some(bytes)
}

/// The manifest of bytes in memory, whole: for tests and tools.
pub fn of_bytes(bytes: &[u8], chunk_size: u32) -> (Header, Vec<u8>) {
    let shape = Shape { image_size: crate::units::to_u64(bytes.len()), chunk_size };
    let mut hasher = IdHasher::new(shape);
    let mut digests = Vec::new();
    for chunk in bytes.chunks(to_usize(u64::from(chunk_size))) {
        digests.extend_from_slice(&Digest::of(chunk).0);
    }
    hasher.update(&digests);
    let header = Header { shape, id: hasher.finish(), source: None };
    (header, [&header.encode()[..], &digests].concat())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeroes_are_recognised_wherever_the_one_is() {
        let mut bytes = vec![0; 200];
        assert!(is_zero(&bytes) && is_zero(&[]));
        for index in 0..200 {
            bytes[index] = 1;
            assert!(!is_zero(&bytes), "{index}");
            bytes[index] = 0;
        }
    }

    #[test]
    fn a_digest_is_plain_blake3_and_zero_has_a_mark() {
        // The test vector of BLAKE3 for one byte, 0 being all zero here.
        assert_eq!(Digest::of(&[0]), Digest::ZERO);
        assert_eq!(
            format!("{:?}", Digest::of(b"abc")),
            "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85"
        );
    }

    #[test]
    fn a_chunk_in_parts_has_the_digest_of_the_whole() {
        for bytes in [[0; 10_000], [7; 10_000], std::array::from_fn(|index| u8::from(index == 9_999))] {
            for length in [1, 64, 1000, 4096, 10_000] {
                let mut hasher = ChunkHasher::new();
                bytes.chunks(length).for_each(|part| hasher.update(part));
                assert_eq!(hasher.finish(), Digest::of(&bytes), "{length}");
            }
        }
    }

    #[test]
    fn an_identity_depends_on_every_digest_and_on_both_sizes() {
        let id = |bytes: &[u8], chunk| of_bytes(bytes, chunk).0.id;
        let bytes: Vec<u8> = (0..20_000u32).map(|i| u8::try_from(i % 251).unwrap()).collect();
        let base = id(&bytes, 4096);
        assert_eq!(base, id(&bytes, 4096));
        assert_ne!(base, id(&bytes, 8192));
        assert_ne!(base, id(&bytes[..19_999], 4096));
        let mut other = bytes;
        other[19_999] ^= 1;
        assert_ne!(base, id(&other, 4096));
        assert_ne!(id(&[0; 4096], 4096), id(&[0; 4095], 4096), "zeroes of different lengths");
    }

    #[test]
    fn identities_read_back() {
        let id = ImageId([0xab; 32]);
        assert_eq!(id.to_string().parse(), Ok(id));
        for text in ["", "blake3-", "blake3-é", "md5-00", &"ab".repeat(32)] {
            assert_eq!(text.parse::<ImageId>(), Err(ParseIdError), "{text}");
        }
    }
}
