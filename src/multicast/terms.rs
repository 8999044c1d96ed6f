//! What a session needs to know of its image: the manifest's shape, and which chunks are zero.
//!
//! Owns: reading that from a manifest. Does not own: the manifest.

use crate::error::{Error, ErrorKind, Result};
use crate::export::{Export, append};
use crate::manifest::{BLOCK, Digest, Header, ImageId, Shape};
use crate::ranges::ByteRange;
use crate::units::{MIB, to_u64, to_usize};

/// What is read of a manifest at once.
const WINDOW: u64 = MIB;

/// Which chunks of an image are zero: one bit for each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Zeroes {
    /// The image.
    pub image: ImageId,
    /// How its manifest cuts it.
    pub shape: Shape,
    bits: Vec<u64>,
}

impl Zeroes {
    /// Reads the manifest of `export`. To be called on a worker. It fails without a manifest.
    ///
    /// The digests are not held against the identity: whoever serves a manifest has done that, and receivers hold the bytes
    /// against their own.
    pub async fn of(export: &dyn Export) -> Result<Self> {
        let none = || Error::new(ErrorKind::Unsupported, "the image has no manifest");
        let manifest = export.manifest().ok_or_else(none)?;
        let mut bytes = Vec::new();
        append(&manifest.read(ByteRange::between(0, to_u64(BLOCK))).await?, &mut bytes);
        let header = Header::decode(&bytes).map_err(|error| Error::new(ErrorKind::Io, error.to_string()))?;
        let count = header.shape.count();
        let mut bits = vec![0; to_usize(count.div_ceil(64))];
        let mut chunk = 0;
        for window in ByteRange::between(to_u64(BLOCK), header.shape.manifest_length()).pieces(WINDOW) {
            bytes.clear();
            append(&manifest.read(window).await?, &mut bytes);
            for digest in Digest::split(&bytes) {
                if digest.is_zero() {
                    bits[chunk / 64] |= 1 << (chunk % 64);
                }
                chunk += 1;
            }
        }
        Ok(Self { image: header.id, shape: header.shape, bits })
    }

    /// Whether a chunk is all zero; those beyond the end are not.
    pub fn is_zero(&self, chunk: u64) -> bool {
        self.bits.get(to_usize(chunk / 64)).is_some_and(|bits| bits >> (chunk % 64) & 1 == 1)
    }
}
