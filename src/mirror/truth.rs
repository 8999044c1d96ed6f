//! What the bytes of a mirror should be: the manifest of its image, as a file of the cache and in memory.
//!
//! In memory are the first 16 bytes of each digest, so that a chunk can be checked without a read, also when the disk
//! of the cache fails: 256 MiB for a TiB of 64 KiB chunks. Finding other bytes with the same 16 takes 2^128 attempts.
//!
//! Owns: the file `manifest`, and the judgement of chunks. Does not own: where manifests come from; they are believed
//! only if the hash over them is the identity that was asked for.

use std::fs;
use std::io::{self, Read};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use thiserror::Error;

use super::chunks::{Chunk, Geometry};
use crate::disk::{Access, File};
use crate::error::Error as RequestError;
use crate::export::{Export, FileExport, SharedExport, assemble};
use crate::manifest::{BLOCK, DIGEST, Digest, FormatError, Header, IdHasher, ImageId, Shape};
use crate::ranges::ByteRange;
use crate::units::{MIB, to_u64, to_usize};

/// What is fetched and hashed at once.
const WINDOW: u64 = MIB;

/// The name of the file, and of one that is being fetched.
pub(super) const NAME: &str = "manifest";
pub(super) const NEW_NAME: &str = "manifest.new";

/// Why a manifest cannot be used.
#[derive(Debug, Error)]
pub enum ManifestError {
    /// The cache disk refused.
    #[error("the cache disk: {0}")]
    Disk(#[from] io::Error),
    /// It could not be read from where it is offered.
    #[error("it cannot be fetched: {}", .0.chain())]
    Fetch(RequestError),
    /// It is none.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// It is that of another image, or its digests are not right.
    #[error("it is not the manifest of {wanted}")]
    Other {
        /// The image it should be of.
        wanted: ImageId,
    },
    /// Nobody offers one.
    #[error("no server has it")]
    None,
    /// Its chunks are larger than those of the cache, which can then not be checked.
    #[error("its chunks have {manifest} bytes, and those of the cache {cache}")]
    ChunkSize {
        /// In the manifest.
        manifest: u32,
        /// In the cache.
        cache: u32,
    },
}

/// A manifest that has been checked against its identity.
#[derive(Debug)]
pub struct Truth {
    header: Header,
    /// The first halves of the digests; 0 for zero chunks.
    digests: Box<[u128]>,
    file: Arc<File>,
}

impl Truth {
    /// Reads the manifest in `directory`, if there is one. Blocks.
    pub(super) fn load(directory: &Path) -> Result<Option<Self>, ManifestError> {
        let path = directory.join(NAME);
        match fs::File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            result => Self::read(result?, &path).map(Some),
        }
    }

    fn read(mut source: fs::File, path: &Path) -> Result<Self, ManifestError> {
        let mut block = Vec::with_capacity(BLOCK);
        Read::by_ref(&mut source).take(to_u64(BLOCK)).read_to_end(&mut block)?;
        let header = Header::decode(&block)?;
        // Before memory is taken for what the header promises.
        if source.metadata()?.len() != header.shape.manifest_length() {
            return Err(FormatError::Damaged.into());
        }
        let mut digests = Vec::with_capacity(to_usize(header.shape.count()));
        let mut hasher = IdHasher::new(header.shape);
        let mut window = vec![0; to_usize(WINDOW)];
        let mut left = header.shape.manifest_length() - to_u64(BLOCK);
        while left > 0 {
            let part = &mut window[..to_usize(left.min(WINDOW))];
            source.read_exact(part)?;
            hasher.update(part);
            digests.extend(Digest::split(part).map(short));
            left -= to_u64(part.len());
        }
        if hasher.finish() != header.id {
            return Err(FormatError::Damaged.into());
        }
        let file = Arc::new(File::open(path, Access::ReadOnly)?);
        Ok(Self { header, digests: digests.into(), file })
    }

    /// Fetches the manifest of `wanted` from `source`, an export that holds it, into `directory`. Nothing is there under
    /// its name before it is whole, right and durable.
    pub async fn fetch(source: &dyn Export, wanted: ImageId, directory: &Path) -> Result<Self, ManifestError> {
        let size = source.facts().size;
        let head = ByteRange::between(0, size.min(to_u64(BLOCK)));
        let header = Header::decode(&read(source, head).await?)?;
        if header.id != wanted || header.shape.manifest_length() != size {
            return Err(ManifestError::Other { wanted });
        }
        let new_path = directory.join(NEW_NAME);
        let fetched = Self::fetch_whole(source, header, directory, &new_path).await;
        if fetched.is_err() {
            // Nobody has room set aside for it.
            let _ = fs::remove_file(&new_path);
        }
        fetched
    }

    async fn fetch_whole(
        source: &dyn Export,
        header: Header,
        directory: &Path,
        new_path: &Path,
    ) -> Result<Self, ManifestError> {
        let (size, wanted) = (header.shape.manifest_length(), header.id);
        let mut file = File::open(new_path, Access::Create)?;
        file.set_size(0)?;
        let head = Header { source: None, ..header }.encode();
        file.write_all_at(Bytes::copy_from_slice(&head), 0, false).await?;
        let mut hasher = IdHasher::new(header.shape);
        for window in ByteRange::between(to_u64(BLOCK), size).pieces(WINDOW) {
            let bytes = read(source, window).await?;
            hasher.update(&bytes);
            file.write_all_at(bytes.into(), window.start(), false).await?;
        }
        if hasher.finish() != wanted {
            return Err(ManifestError::Other { wanted });
        }
        file.sync_data().await?;
        let (directory, new_path, path) = (directory.to_owned(), new_path.to_owned(), directory.join(NAME));
        let finish = move || {
            fs::rename(&new_path, &path)?;
            fs::File::open(&directory)?.sync_all()?;
            Self::read(fs::File::open(&path)?, &path)
        };
        // It dies only of a panic.
        tokio::task::spawn_blocking(finish).await.unwrap_or_else(|_| Err(io::Error::other("the thread died").into()))
    }

    /// The identity that the manifest in `directory` has in its header; only reading it whole shows whether it is right.
    pub(super) fn claimed(directory: &Path) -> Option<ImageId> {
        let mut block = Vec::with_capacity(BLOCK);
        fs::File::open(directory.join(NAME)).ok()?.take(to_u64(BLOCK)).read_to_end(&mut block).ok()?;
        Header::decode(&block).ok().map(|header| header.id)
    }

    /// What image it is of.
    pub const fn id(&self) -> ImageId {
        self.header.id
    }

    /// How it cuts the image.
    pub const fn shape(&self) -> Shape {
        self.header.shape
    }

    /// Whether its chunk `number` is all zero; `false` beyond the end.
    pub(super) fn is_zero_there(&self, number: u64) -> bool {
        self.digests.get(to_usize(number)).is_some_and(|digest| *digest == 0)
    }

    /// Bytes of its chunks.
    pub const fn chunk_size(&self) -> u32 {
        self.header.shape.chunk_size
    }

    /// Bytes of the image.
    pub const fn image_size(&self) -> u64 {
        self.header.shape.image_size
    }

    /// Bytes of the disk that the file takes.
    pub(super) const fn file_length(&self) -> u64 {
        self.header.shape.manifest_length().next_multiple_of(BLOCK as u64)
    }

    /// Refuses a cache whose chunks cannot be checked by this.
    pub(super) fn check_geometry(&self, geometry: Geometry) -> Result<(), ManifestError> {
        if geometry.size() != self.image_size() {
            return Err(ManifestError::Other { wanted: self.id() });
        }
        if geometry.chunk_size() < u64::from(self.chunk_size()) {
            let cache = u32::try_from(geometry.chunk_size()).unwrap_or(u32::MAX);
            return Err(ManifestError::ChunkSize { manifest: self.chunk_size(), cache });
        }
        Ok(())
    }

    /// The manifest as an export, for mirrors of this mirror.
    pub(super) fn export(&self) -> SharedExport {
        Arc::new(FileExport::new(Arc::clone(&self.file), Bytes::new(), "manifest"))
    }

    /// The digests of the parts of a chunk, which is as long as one chunk here or several.
    fn of_chunk(&self, geometry: Geometry, chunk: Chunk) -> &[u128] {
        let range = geometry.range(chunk);
        let size = u64::from(self.chunk_size());
        &self.digests[to_usize(range.start() / size)..to_usize(range.end().div_ceil(size))]
    }

    /// Whether a chunk is all zero.
    pub(super) fn is_zero(&self, geometry: Geometry, chunk: Chunk) -> bool {
        self.of_chunk(geometry, chunk).iter().all(|digest| *digest == 0)
    }

    /// What a chunk has in common with all others that hold the same bytes, unless it is zero or has several digests.
    pub(super) fn key(&self, geometry: Geometry, chunk: Chunk) -> Option<u128> {
        match self.of_chunk(geometry, chunk) {
            [digest] if *digest != 0 => Some(*digest),
            _ => None,
        }
    }

    /// Whether these are the bytes of a chunk.
    pub(super) fn is_right(&self, geometry: Geometry, chunk: Chunk, bytes: &[u8]) -> bool {
        let parts = bytes.chunks(to_usize(u64::from(self.chunk_size())));
        let digests = self.of_chunk(geometry, chunk);
        let is_whole = to_u64(bytes.len()) == geometry.range(chunk).length();
        is_whole && parts.zip(digests).all(|(part, digest)| short(Digest::of(part)) == *digest)
    }
}

fn short(digest: Digest) -> u128 {
    u128::from_le_bytes(*digest.0.first_chunk().expect("a digest is longer"))
}

const _: () = assert!(DIGEST >= 16);

async fn read(source: &dyn Export, range: ByteRange) -> Result<Vec<u8>, ManifestError> {
    Ok(assemble(&source.read(range).await.map_err(ManifestError::Fetch)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::{Preference, attach};
    use crate::export::memory::Memory;
    use crate::manifest::of_bytes;
    use std::os::unix::fs::FileExt;

    fn contents() -> Vec<u8> {
        let mut bytes: Vec<u8> = (0..50_000u32).map(|i| u8::try_from(i % 253).unwrap()).collect();
        bytes[8192..16384].fill(0);
        bytes
    }

    #[tokio::test(flavor = "local")]
    async fn a_manifest_is_fetched_whole_or_not_at_all() {
        let _attached = attach(Preference::Auto).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let (header, bytes) = of_bytes(&contents(), 4096);
        let fetch = async |bytes: &[u8]| {
            let source = Memory::holding(bytes).read_only();
            Truth::fetch(&source, header.id, directory.path()).await
        };
        for damage in [0, 30, 4400, bytes.len() - 1] {
            let mut damaged = bytes.clone();
            damaged[damage] ^= 1;
            fetch(&damaged).await.unwrap_err();
            assert!(!directory.path().join(NAME).exists());
        }
        fetch(&bytes[..bytes.len() - 1]).await.unwrap_err();
        assert_eq!(fetch(&bytes).await.unwrap().id(), header.id);
        let truth = Truth::load(directory.path()).unwrap().unwrap();
        assert_eq!(truth.id(), header.id);
        let file = fs::File::options().write(true).open(directory.path().join(NAME)).unwrap();
        file.write_all_at(&[bytes[4300] ^ 4], 4300).unwrap();
        assert!(matches!(Truth::load(directory.path()), Err(ManifestError::Format(FormatError::Damaged))));
    }

    #[tokio::test(flavor = "local")]
    async fn chunks_are_judged_also_when_they_are_several_of_the_manifest() {
        let _attached = attach(Preference::Auto).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let contents = contents();
        let (header, bytes) = of_bytes(&contents, 4096);
        let source = Memory::holding(&*bytes).read_only();
        let truth = Truth::fetch(&source, header.id, directory.path()).await.unwrap();
        for chunk_size in [4096, 8192, 65536] {
            let geometry = Geometry::new(to_u64(contents.len()), chunk_size);
            truth.check_geometry(geometry).unwrap();
            for chunk in geometry.chunks(ByteRange::between(0, geometry.size())) {
                let range = geometry.range(chunk);
                let mut bytes = contents[to_usize(range.start())..to_usize(range.end())].to_vec();
                assert!(truth.is_right(geometry, chunk, &bytes));
                assert_eq!(truth.is_zero(geometry, chunk), bytes.iter().all(|byte| *byte == 0));
                // The last chunk is short enough to be one of the manifest, whatever the others are.
                let is_one = range.length() <= 4096;
                assert_eq!(truth.key(geometry, chunk).is_some(), is_one && !truth.is_zero(geometry, chunk));
                let last = bytes.len() - 1;
                assert!(!truth.is_right(geometry, chunk, &bytes[..last]));
                bytes[last] ^= 0x80;
                assert!(!truth.is_right(geometry, chunk, &bytes));
            }
        }
        let small = Geometry::new(to_u64(contents.len()), 2048);
        assert!(matches!(truth.check_geometry(small), Err(ManifestError::ChunkSize { .. })));
        let other = Geometry::new(1, 4096);
        assert!(matches!(truth.check_geometry(other), Err(ManifestError::Other { .. })));
    }
}
