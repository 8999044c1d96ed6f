//! A manifest that is being made: `PATH.manifest.part`.
//!
//! | bytes | meaning |
//! | --- | --- |
//! | 0..8 | `HEADPART` |
//! | 8..12 | version, 1 |
//! | 12..16 | chunk size |
//! | 16..24 | image size |
//! | 24..32 | chunks whose digests are there, counted from the first |
//! | 32..64 | the file that is read: length, seconds, nanoseconds, 0, inode, as in a manifest |
//! | 64..96 | BLAKE3 of what comes before |
//! | 4096.. | digests, where they lie in a manifest |
//!
//! Numbers are little-endian. The header fits one sector, so that a crash leaves the old one or the new one.
//!
//! Crash rule: digests are synced before the header that counts them is written. What lies behind those is cleared
//! before the file is gone on with. When all are there the header of a manifest replaces this one, is synced, and only
//! then the file gets its name; so what is called `.manifest` is whole.

use std::fs;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Timespec, Timestamps, UTIME_NOW, UTIME_OMIT};

use super::IndexError;
use crate::image::seal::{hash_digests, manifest_path, state_of};
use crate::manifest::{DIGEST, Header, ImageId, Shape, Source, digest_at};

const MAGIC: &[u8; 8] = b"HEADPART";
const VERSION: u32 = 1;
/// Bytes that are hashed, and behind them the hash.
const HASHED: usize = 64;
const LENGTH: usize = HASHED + DIGEST;

/// What a `.part` says of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PartHeader {
    pub(super) shape: Shape,
    pub(super) source: Source,
    /// Chunks from the first on whose digests are durable.
    pub(super) done: u64,
}

impl PartHeader {
    fn encode(&self) -> [u8; LENGTH] {
        let mut bytes = [0; LENGTH];
        bytes[..8].copy_from_slice(MAGIC);
        bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.shape.chunk_size.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.shape.image_size.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.done.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.source.length.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.source.modified_seconds.to_le_bytes());
        bytes[48..52].copy_from_slice(&self.source.modified_nanoseconds.to_le_bytes());
        bytes[56..64].copy_from_slice(&self.source.inode.to_le_bytes());
        let sum = blake3::hash(&bytes[..HASHED]);
        bytes[HASHED..].copy_from_slice(sum.as_bytes());
        bytes
    }

    /// The number of chunks done, if `bytes` are a header that differs from this one in nothing else.
    fn continued_by(&self, bytes: &[u8; LENGTH]) -> Option<u64> {
        let mut done = [0; 8];
        done.copy_from_slice(&bytes[24..32]);
        let done = u64::from_le_bytes(done);
        (done <= self.shape.count() && Self { done, ..*self }.encode() == *bytes).then_some(done)
    }
}

/// The file, which nobody else writes to.
#[derive(Debug)]
pub(super) struct Part {
    file: fs::File,
    path: PathBuf,
    header: PartHeader,
}

impl Part {
    /// Opens or makes the file for the image at `image`.
    pub(super) fn open(image: &Path, shape: Shape, source: Source) -> Result<Self, IndexError> {
        let path = part_path(image);
        let failed = |source| IndexError::Write { path: path.clone(), source };
        let file = loop {
            let file = fs::File::options().read(true).write(true).create(true).truncate(false).open(&path);
            let file = file.map_err(failed)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(fs::TryLockError::WouldBlock) => return Err(IndexError::InUse(path)),
                Err(fs::TryLockError::Error(error)) => return Err(failed(error)),
            }
            // Whoever had the lock may have given the file its final name, or removed it, since it was opened here.
            let opened = file.metadata().map_err(failed)?;
            if fs::metadata(&path).is_ok_and(|named| (named.dev(), named.ino()) == (opened.dev(), opened.ino())) {
                break file;
            }
        };
        Ok(Self { file, path, header: PartHeader { shape, source, done: 0 } })
    }

    /// Takes up what an earlier run has left, if it was about the same, and clears the rest.
    pub(super) fn begin(&mut self) -> io::Result<()> {
        let mut bytes = [0; LENGTH];
        let found = self.file.read_exact_at(&mut bytes, 0).is_ok();
        let length = self.file.metadata()?.len();
        match self.header.continued_by(&bytes).filter(|done| found && digest_at(*done) <= length) {
            // What the earlier run wrote behind its mark may be there in part.
            Some(done) => {
                self.header.done = done;
                self.file.set_len(digest_at(done))?;
            }
            // Gone for good before anything else is written: an old header must never count new digests.
            None => {
                self.file.set_len(0)?;
                self.file.sync_data()?;
            }
        }
        self.file.set_len(self.header.shape.manifest_length())?;
        self.file.write_all_at(&self.header.encode(), 0)
    }

    /// Sets the state of the image that is to be held on to.
    pub(super) fn set_source(&mut self, source: Source) {
        self.header.source = source;
    }

    /// The file's own state.
    pub(super) fn state(&self) -> io::Result<Source> {
        state_of(&self.file)
    }

    /// Changes its time of modification to now.
    pub(super) fn touch(&self) -> io::Result<()> {
        let kept = Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT };
        let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
        Ok(rustix::fs::futimens(&self.file, &Timestamps { last_access: kept, last_modification: now })?)
    }

    /// Chunks that an earlier run has done.
    pub(super) fn done(&self) -> u64 {
        self.header.done
    }

    /// Writes the digests of chunks from `first` on.
    pub(super) fn write(&self, first: u64, digests: &[u8]) -> io::Result<()> {
        self.file.write_all_at(digests, digest_at(first))
    }

    /// Makes what was written durable, and then that the first `done` chunks are there.
    pub(super) fn mark(&self, done: u64) -> io::Result<()> {
        self.file.sync_data()?;
        self.file.write_all_at(&PartHeader { done, ..self.header }.encode(), 0)?;
        self.file.sync_data()
    }

    /// Makes it a manifest, all digests being there, and gives it its name.
    pub(super) fn finish(self, image: &Path) -> io::Result<Header> {
        let PartHeader { shape, source, .. } = self.header;
        let unnamed = Header { shape, id: ImageId([0; DIGEST]), source: Some(source) };
        let header = Header { id: hash_digests(&self.file, unnamed)?, ..unnamed };
        self.file.write_all_at(&header.encode(), 0)?;
        self.file.sync_all()?;
        fs::rename(&self.path, manifest_path(image))?;
        let directory = match image.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        fs::File::open(directory)?.sync_all()?;
        Ok(header)
    }

    /// Removes the file: what is in it is of no use.
    pub(super) fn remove(self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::debug!(path = %self.path.display(), %error, "cannot remove an unfinished manifest");
        }
    }
}

/// Where the unfinished manifest of the image at `path` lies.
pub fn part_path(path: &Path) -> PathBuf {
    let mut name = manifest_path(path).into_os_string();
    name.push(".part");
    name.into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const HEADER: PartHeader = PartHeader {
        shape: Shape { image_size: 10_000_001, chunk_size: 4096 },
        source: Source { length: 10_000_001, modified_seconds: -5, modified_nanoseconds: 7, inode: 9 },
        done: 0,
    };

    #[test]
    fn only_the_same_work_is_continued() {
        let found = PartHeader { done: 17, ..HEADER }.encode();
        assert_eq!(HEADER.continued_by(&found), Some(17));
        let touched = Source { modified_nanoseconds: 8, ..HEADER.source };
        assert_eq!(PartHeader { source: touched, ..HEADER }.continued_by(&found), None);
        let other = Shape { chunk_size: 8192, ..HEADER.shape };
        assert_eq!(PartHeader { shape: other, ..HEADER }.continued_by(&found), None);
        let beyond = PartHeader { done: HEADER.shape.count() + 1, ..HEADER }.encode();
        assert_eq!(HEADER.continued_by(&beyond), None);
    }

    proptest! {
        #[test]
        fn no_flipped_bit_is_believed(bit in 0usize..8 * LENGTH) {
            let mut bytes = PartHeader { done: 17, ..HEADER }.encode();
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(HEADER.continued_by(&bytes), None);
        }
    }
}
