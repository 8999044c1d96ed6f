//! The first block of a manifest. Numbers are little-endian.
//!
//! | bytes | meaning |
//! | --- | --- |
//! | 0..8 | `HEADMANI` |
//! | 8..12 | version, 1 |
//! | 12..16 | chunk size |
//! | 16..24 | image size |
//! | 24..56 | the identity |
//! | 56 | 1 if the file that the image was read from follows, else 0 |
//! | 57..64 | 0 |
//! | 64..72 | length of that file |
//! | 72..80 | seconds of its time of modification, signed |
//! | 80..84 | nanoseconds of it |
//! | 84..88 | 0 |
//! | 88..96 | its inode |
//! | 96..4064 | 0 |
//! | 4064..4096 | BLAKE3 of what comes before |

use thiserror::Error;

use super::{CHUNK_SIZES, DIGEST, ImageId, Shape};

/// Bytes before the digests.
pub const BLOCK: usize = 4096;

const MAGIC: &[u8; 8] = b"HEADMANI";
const VERSION: u32 = 1;

/// What a manifest says of its image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// How it is cut.
    pub shape: Shape,
    /// The hash over shape and digests.
    pub id: ImageId,
    /// The file that the digests were read from, if the manifest lies beside one.
    pub source: Option<Source>,
}

/// The state of a file, by which a change of its contents is noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Source {
    /// Bytes of the file.
    pub length: u64,
    /// When it was modified: seconds since 1970.
    pub modified_seconds: i64,
    /// The nanoseconds of that time.
    pub modified_nanoseconds: u32,
    /// Its number in the file system.
    pub inode: u64,
}

/// Why bytes are not a manifest that can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum FormatError {
    /// They begin with something else.
    #[error("it is not a Headwater manifest")]
    NotAManifest,
    /// It was written by a newer version.
    #[error("it has version {0}, and this program knows version {VERSION}")]
    Version(u32),
    /// It is damaged.
    #[error("it is damaged")]
    Damaged,
}

impl Header {
    /// The block.
    pub fn encode(&self) -> [u8; BLOCK] {
        let mut block = [0; BLOCK];
        block[..8].copy_from_slice(MAGIC);
        block[8..12].copy_from_slice(&VERSION.to_le_bytes());
        block[12..16].copy_from_slice(&self.shape.chunk_size.to_le_bytes());
        block[16..24].copy_from_slice(&self.shape.image_size.to_le_bytes());
        block[24..56].copy_from_slice(&self.id.0);
        if let Some(source) = self.source {
            block[56] = 1;
            block[64..72].copy_from_slice(&source.length.to_le_bytes());
            block[72..80].copy_from_slice(&source.modified_seconds.to_le_bytes());
            block[80..84].copy_from_slice(&source.modified_nanoseconds.to_le_bytes());
            block[88..96].copy_from_slice(&source.inode.to_le_bytes());
        }
        let sum = blake3::hash(&block[..BLOCK - DIGEST]);
        block[BLOCK - DIGEST..].copy_from_slice(sum.as_bytes());
        block
    }

    /// Reads the block that `bytes` begins with. That the identity is that of the digests is not known by this.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        if bytes.get(..8) != Some(MAGIC) {
            return Err(FormatError::NotAManifest);
        }
        let block: &[u8; BLOCK] = bytes.first_chunk().ok_or(FormatError::Damaged)?;
        match u32::from_le_bytes(array_at(block, 8)) {
            VERSION => {}
            other => return Err(FormatError::Version(other)),
        }
        if *blake3::hash(&block[..BLOCK - DIGEST]).as_bytes() != array_at(block, BLOCK - DIGEST) {
            return Err(FormatError::Damaged);
        }
        let shape = Shape {
            image_size: u64::from_le_bytes(array_at(block, 16)),
            chunk_size: u32::from_le_bytes(array_at(block, 12)),
        };
        let source = (block[56] == 1).then(|| Source {
            length: u64::from_le_bytes(array_at(block, 64)),
            modified_seconds: i64::from_le_bytes(array_at(block, 72)),
            modified_nanoseconds: u32::from_le_bytes(array_at(block, 80)),
            inode: u64::from_le_bytes(array_at(block, 88)),
        });
        let sound = shape.chunk_size.is_power_of_two() && CHUNK_SIZES.contains(&shape.chunk_size);
        // Longer images have no offset in the protocol.
        let sound = sound && i64::try_from(shape.image_size).is_ok();
        if sound { Ok(Self { shape, id: ImageId(array_at(block, 24)), source }) } else { Err(FormatError::Damaged) }
    }
}

fn array_at<const N: usize>(block: &[u8; BLOCK], at: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&block[at..at + N]);
    array
}

/// Takes arbitrary bytes as a manifest.
#[doc(hidden)]
pub fn fuzz(data: &[u8]) {
    if let Ok(header) = Header::decode(data) {
        assert_eq!(Header::decode(&header.encode()), Ok(header));
        assert!(header.shape.manifest_length() >= BLOCK as u64);
        return;
    }
    // A block whose hash is right is rare among arbitrary bytes, so the same one is taken with its hash put right.
    let mut block = [0; BLOCK];
    let length = data.len().min(BLOCK - DIGEST);
    block[..length].copy_from_slice(&data[..length]);
    block[..8].copy_from_slice(MAGIC);
    let sum = blake3::hash(&block[..BLOCK - DIGEST]);
    block[BLOCK - DIGEST..].copy_from_slice(sum.as_bytes());
    if let Ok(header) = Header::decode(&block) {
        assert_eq!(Header::decode(&header.encode()), Ok(header));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HEADER: Header = Header {
        shape: Shape { image_size: 10_000_001, chunk_size: 4096 },
        id: ImageId([7; 32]),
        source: Some(Source {
            length: 10_000_001,
            modified_seconds: -5,
            modified_nanoseconds: 999_999_999,
            inode: u64::MAX,
        }),
    };

    #[test]
    fn headers_read_back() {
        assert_eq!(Header::decode(&HEADER.encode()), Ok(HEADER));
        let without = Header { source: None, ..HEADER };
        assert_eq!(Header::decode(&without.encode()), Ok(without));
        assert_eq!(Header::decode(b"HEADMANI"), Err(FormatError::Damaged));
        assert_eq!(Header::decode(b""), Err(FormatError::NotAManifest));
    }

    proptest! {
        #[test]
        fn no_flipped_bit_is_believed(bit in 0usize..8 * BLOCK) {
            let mut block = HEADER.encode();
            block[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(Header::decode(&block).is_err());
        }

        #[test]
        fn no_bytes_break_the_decoder(data in prop::collection::vec(any::<u8>(), 0..5000)) {
            fuzz(&data);
        }
    }
}
