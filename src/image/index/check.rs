//! Holding an image against its manifest.
//!
//! Raw files are read from the disk and not from the page cache, as far as nobody has pages of them in use. qcow2 files
//! are read through the cache. A chunk that cannot be read is damaged like one that is wrong, and the next is read.
//!
//! Owns: the comparison. Does not own: repair; nobody else has the bytes of a real image.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use thiserror::Error;

use super::pace::{Pace, Rate};
use super::reader::{Reader, reader_of};
use super::walk::{Failure, Walk};
use super::{IndexError, changes, open};
use crate::disk::File;
use crate::image::seal::{Seal, Unfit, Written, differences, state_of};
use crate::image::{Format, Image};
use crate::manifest::{Digest, Header, Source};
use crate::ranges::ByteRange;
use crate::units::to_u64;

/// Why an image could not be held against its manifest.
#[derive(Debug, Error)]
pub enum CheckError {
    /// It cannot be opened, or can have no manifest.
    #[error(transparent)]
    Image(#[from] IndexError),
    /// It has none.
    #[error("{} has no manifest, so nothing says what it ought to hold: headwater index makes one", .0.display())]
    NoManifest(PathBuf),
    /// It has one that says nothing.
    #[error("the manifest of {} cannot be used", path.display())]
    Unfit {
        /// The image.
        path: PathBuf,
        /// Why.
        source: Unfit,
    },
    /// What is served is not what lies at its path now.
    #[error("{} is not the file any more that is served (other {})", path.display(), what.join(", "))]
    Replaced {
        /// The image.
        path: PathBuf,
        /// What of its state is another.
        what: Vec<&'static str>,
    },
    /// Its state or its manifest cannot be read.
    #[error("cannot check {}", path.display())]
    Read {
        /// The image.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Somebody wrote to it meanwhile.
    #[error("{} was changed while it was checked (other {})", path.display(), what.join(", "))]
    Changed {
        /// The image.
        path: PathBuf,
        /// What of its state is not as it was.
        what: Vec<&'static str>,
    },
    /// It was told to stop.
    #[error("stopped before the end")]
    Cancelled,
}

/// What is wrong with a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Damage {
    /// It has other bytes than its manifest says.
    Wrong,
    /// It cannot be read, or lies behind the end of the file.
    Unreadable,
}

/// A damaged chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Damaged {
    /// Its bytes.
    pub range: ByteRange,
    /// How.
    pub damage: Damage,
}

/// A part of an image that was checked: up to 4 MiB.
#[derive(Debug)]
pub struct Checked {
    /// Its bytes.
    pub range: ByteRange,
    /// How many chunks these are.
    pub chunks: u64,
    /// Those that are damaged, in order.
    pub damaged: Vec<Damaged>,
}

/// An image and its manifest, which may have been made from another state of it.
#[derive(Debug)]
pub struct Check {
    image: Image,
    file: Arc<File>,
    written: Written,
    /// The state of the file when it was opened.
    source: Source,
}

impl Check {
    /// Opens the image at `path` and the manifest beside it. Blocks.
    pub fn open(path: &Path, format: Format) -> Result<Self, CheckError> {
        let (image, seal) = open(path, format)?;
        let file = Arc::clone(seal.file());
        let unfit = |source| CheckError::Unfit { path: path.to_owned(), source };
        let written = Written::open(path).map_err(unfit)?.ok_or_else(|| CheckError::NoManifest(path.to_owned()))?;
        let source = state_of(&file).map_err(|source| CheckError::Read { path: path.to_owned(), source })?;
        Ok(Self { image, file, written, source })
    }

    /// The same for an image that is being served. Refused if its manifest is of another state of it, or what is served
    /// has no path any more. Blocks.
    pub fn of_served(seal: &Seal, format: Format) -> Result<Self, CheckError> {
        let path = seal.path();
        let check = Self::open(path, format)?;
        let state = state_of(seal.file()).map_err(|source| CheckError::Read { path: path.to_owned(), source })?;
        let what = differences(state, check.source);
        if !what.is_empty() {
            return Err(CheckError::Replaced { path: path.to_owned(), what });
        }
        match check.differences() {
            what if what.is_empty() => Ok(check),
            what => Err(CheckError::Unfit { path: path.to_owned(), source: Unfit::Changed(what) }),
        }
    }

    /// What the manifest says of itself.
    pub fn header(&self) -> &Header {
        &self.written.header
    }

    /// Bytes of the image as it is; its manifest may say something else.
    pub fn image_size(&self) -> u64 {
        self.image.export.facts().size
    }

    /// What of the file's state is not as it was when the manifest was made. Servers do not use the manifest then.
    pub fn differences(&self) -> Vec<&'static str> {
        differences(self.written.source, self.source)
    }

    /// Reads all that the manifest tells of, with up to so many `threads` if the image is raw, and so many bytes per
    /// second if there is a `rate`. `found` is called from any of them. Blocks.
    pub fn run(
        &self,
        threads: usize,
        rate: Option<u64>,
        is_cancelled: &(dyn Fn() -> bool + Sync),
        found: &(dyn Fn(Checked) + Sync),
    ) -> Result<(), CheckError> {
        let path = self.file.path();
        let read_error = |source| CheckError::Read { path: path.to_owned(), source };
        self.written.check().map_err(|source| CheckError::Unfit { path: path.to_owned(), source })?;
        let shape = self.header().shape;
        let walk = Walk::new(shape.image_size, 0, Pace::new(Rate::new(rate), is_cancelled));
        let result = walk.run(
            if self.image.is_raw { threads } else { 1 },
            || reader_of(&self.image, &self.file, shape.chunk_size),
            |reader, _, range| {
                found(self.check(reader, &walk.pace, range).map_err(Failure::Read)?);
                Ok(())
            },
        );
        // First of all: whatever was found may have come of it.
        if let Some(what) = changes(path, &self.file, self.source).map_err(read_error)? {
            return Err(CheckError::Changed { path: path.to_owned(), what });
        }
        match result {
            Ok(()) if is_cancelled() => Err(CheckError::Cancelled),
            Ok(()) => Ok(()),
            Err(Failure::Read(source) | Failure::Write(source)) => Err(read_error(source)),
        }
    }

    /// Checks the chunks of `range`. An error is one of the manifest, or the order to stop.
    fn check(&self, reader: &mut dyn Reader, pace: &Pace<'_>, range: ByteRange) -> io::Result<Checked> {
        let expected = self.written.digests(range)?;
        if self.image.is_raw {
            self.file.drop_pages(range, range);
        }
        let chunk_size = u64::from(self.header().shape.chunk_size);
        let mut digests = Vec::new();
        let mut is_read = range.end() <= self.image_size();
        if is_read {
            is_read = is_done(reader.digests(range, pace, &mut digests))?;
        }
        let mut checked = Checked { range, chunks: to_u64(expected.len() / Digest::ZERO.0.len()), damaged: Vec::new() };
        let mut found = Digest::split(&digests).map(Some);
        for (chunk, expected) in range.pieces(chunk_size).zip(Digest::split(&expected)) {
            // One by one if it cannot be read as a whole.
            let digest = if is_read { found.next().flatten() } else { self.digest(reader, pace, chunk)? };
            let damage = match digest {
                Some(digest) if digest == expected => continue,
                Some(_) => Damage::Wrong,
                None => Damage::Unreadable,
            };
            checked.damaged.push(Damaged { range: chunk, damage });
        }
        Ok(checked)
    }

    /// The digest of one chunk; `None` if it cannot be read.
    fn digest(&self, reader: &mut dyn Reader, pace: &Pace<'_>, chunk: ByteRange) -> io::Result<Option<Digest>> {
        let mut digest = Vec::new();
        let is_read = chunk.end() <= self.image_size() && is_done(reader.digests(chunk, pace, &mut digest))?;
        Ok(Digest::split(&digest).next().filter(|_| is_read))
    }
}

/// Whether it was read. An error: it is to stop.
fn is_done(result: io::Result<u64>) -> io::Result<bool> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Err(error),
        Err(error) => {
            tracing::debug!(%error, "cannot read a part of an image");
            Ok(false)
        }
        Ok(_) => Ok(true),
    }
}
