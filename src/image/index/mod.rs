//! Making manifests, and holding images against them: reading an image once, whole.
//!
//! | file | holds |
//! | --- | --- |
//! | this one | [`make`]: an image becomes a manifest; how far it is |
//! | `check` | [`Check`]: an image is held against its manifest |
//! | `background` | [`Background`]: making them beside a running server |
//! | `part` | the unfinished manifest, from which an interrupted run goes on |
//! | `walk` | several threads that read one image |
//! | `pace` | how fast, and when to stop |
//! | `reader` | from bytes to digests |
//!
//! Memory: 300 KiB for each thread, whatever the size of the image; digests go to the file, and the hash over all of
//! them is computed from there. Holes of raw files are not read.
//!
//! Owns: `PATH.manifest` until it has its name; reading whole images. Does not own: who uses manifests (`seal`).

mod background;
mod check;
mod pace;
mod part;
mod reader;
mod walk;

use std::collections::BTreeSet;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use thiserror::Error;

use super::seal::{CannotSeal, Seal, Unfit, differences, state_at, state_of};
use super::{Format, OpenError, Options};
use crate::clock;
use crate::disk::File;
use crate::manifest::{DEFAULT_CHUNK_SIZE, Header, Shape, Source};
use crate::ranges::ByteRange;
pub use background::{Background, run_aside};
pub use check::{Check, CheckError, Checked, Damage, Damaged};
use pace::Pace;
pub use pace::Rate;
use part::Part;
pub use part::part_path;
use reader::{Reader, reader_of};
use walk::{BLOCK, Failure, Walk};

/// More threads than this would need more memory than is allowed for.
pub const MAX_THREADS: usize = 64;

/// Two times of modification that are closer than this may be one tick of the file system's clock.
const TICK: Duration = Duration::from_millis(20);

/// How a manifest is made.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Bytes of a chunk: a power of two within [`CHUNK_SIZES`](crate::manifest::CHUNK_SIZES).
    pub chunk_size: u32,
    /// Threads that read and hash, at most [`MAX_THREADS`]; what is not raw is read by one. One per core by default.
    pub threads: usize,
    /// How fast to read at most. By default as fast as it goes.
    pub rate: Rate,
    /// How much work a crash may cost.
    pub checkpoint: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        let threads = thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS);
        Self { chunk_size: DEFAULT_CHUNK_SIZE, threads, rate: Rate::default(), checkpoint: Duration::from_secs(5) }
    }
}

/// Why there is no manifest.
#[derive(Debug, Error)]
pub enum IndexError {
    /// The image cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// It can have none.
    #[error("{} cannot be indexed", path.display())]
    CannotSeal {
        /// The image.
        path: PathBuf,
        /// Why.
        source: CannotSeal,
    },
    /// It cannot be read. What was done is kept.
    #[error("cannot read {}", path.display())]
    Read {
        /// The image.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The manifest cannot be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The unfinished manifest.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another process is at it.
    #[error("{} is being written by another process", .0.display())]
    InUse(PathBuf),
    /// Somebody wrote to the image meanwhile; nothing is kept.
    #[error("{} was changed while it was read (other {}): index it when nobody writes to it", path.display(), what.join(", "))]
    Changed {
        /// The image.
        path: PathBuf,
        /// What of its state is not as it was.
        what: Vec<&'static str>,
    },
    /// It was told to stop. What was done is kept.
    #[error("stopped: the next run goes on from here")]
    Cancelled,
}

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes of the image that are done, those of an earlier run included.
    pub done: u64,
    /// Bytes of the image.
    pub total: u64,
}

/// A manifest that was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Made {
    /// What it says.
    pub header: Header,
    /// Bytes of the image that were read by this run.
    pub read_bytes: u64,
    /// Bytes of the image, from its start on, that an earlier run had done.
    pub resumed_bytes: u64,
}

/// The header of the manifest beside the image at `path`, if there is one and it fits. Why one does not fit is logged.
/// Blocks.
pub fn existing(path: &Path, format: Format) -> Result<Option<Header>, IndexError> {
    let (_, seal) = open(path, format)?;
    match seal.load() {
        Ok(header) => Ok(header),
        Err(unfit) => {
            tell_unfit(path, &unfit);
            Ok(None)
        }
    }
}

fn tell_unfit(path: &Path, unfit: &Unfit) {
    tracing::info!(path = %path.display(), %unfit, "the manifest does not fit: it is made anew");
}

fn open(path: &Path, format: Format) -> Result<(super::Image, Arc<Seal>), IndexError> {
    let options = Options { read_only: true, format, backing_directories: Vec::new() };
    let cannot_seal = |source| IndexError::CannotSeal { path: path.to_owned(), source };
    let image = super::open_unsealed(path, &options, super::FEW_DECODED_BYTES).map_err(|error| match error {
        // Without directories it is the backing file that was refused.
        OpenError::Qcow2 { .. } if super::has_backing_file(path) => cannot_seal(CannotSeal::SeveralFiles),
        error => error.into(),
    })?;
    let seal = image.seal.clone().map_err(cannot_seal)?;
    Ok((image, seal))
}

/// Makes the manifest of the image at `path`, or goes on with what an earlier call has left; one that is there already
/// is replaced. Blocks until it is durable.
///
/// `progress` is called from any thread. Once `cancel` is set it ends with [`IndexError::Cancelled`], after what is
/// being read at that moment.
pub fn make(
    path: &Path,
    format: Format,
    settings: &Settings,
    cancel: &AtomicBool,
    progress: &(dyn Fn(Progress) + Sync),
) -> Result<Made, IndexError> {
    let (image, seal) = open(path, format)?;
    let file = Arc::clone(seal.file());
    let shape = Shape { image_size: image.export.facts().size, chunk_size: settings.chunk_size };
    let (part, source) = begin(path, &file, shape)?;
    let job = Job::new(part, shape, settings.checkpoint, progress);
    let resumed_bytes = job.done_bytes.load(Ordering::Relaxed);
    let is_cancelled = || cancel.load(Ordering::Relaxed);
    let walk = Walk::new(shape.image_size, job.low(), Pace::new(settings.rate.clone(), &is_cancelled));
    let result = walk.run(
        if image.is_raw { settings.threads } else { 1 },
        || reader_of(&image, &file, shape.chunk_size),
        |reader, block, range| job.index(reader, &walk.pace, block, range),
    );
    let read_error = |source| IndexError::Read { path: path.to_owned(), source };
    let write_error = |source| IndexError::Write { path: part_path(path), source };
    // First of all: whatever else went wrong may have come of it.
    if let Some(what) = changes(path, &file, source).map_err(read_error)? {
        job.part.remove();
        return Err(IndexError::Changed { path: path.to_owned(), what });
    }
    let read_bytes = job.read_bytes.load(Ordering::Relaxed);
    match result {
        Ok(()) if job.is_complete() => {
            let header = job.part.finish(path).map_err(write_error)?;
            Ok(Made { header, read_bytes, resumed_bytes })
        }
        Ok(()) => {
            job.mark().map_err(write_error)?;
            Err(IndexError::Cancelled)
        }
        Err(Failure::Read(source)) => {
            job.mark().map_err(write_error)?;
            Err(read_error(source))
        }
        Err(Failure::Write(source)) => Err(write_error(source)),
    }
}

/// Opens the unfinished manifest and holds on to the state of the image.
fn begin(path: &Path, file: &File, shape: Shape) -> Result<(Part, Source), IndexError> {
    let read_error = |source| IndexError::Read { path: path.to_owned(), source };
    let write_error = |source| IndexError::Write { path: part_path(path), source };
    let mut source = state_of(file).map_err(read_error)?;
    let mut part = Part::open(path, shape, source)?;
    // A write within the same tick of the clock as the last one would not be noticed. So that tick has to be over, by
    // the clock of the file system, before anything is read.
    loop {
        part.touch().map_err(write_error)?;
        let now = modified(part.state().map_err(write_error)?);
        source = state_of(file).map_err(read_error)?;
        let last = modified(source);
        if now < last || now >= last + TICK.as_nanos().cast_signed() {
            break;
        }
        thread::sleep(TICK);
    }
    part.set_source(source);
    if let Some(what) = changes(path, file, source).map_err(read_error)? {
        part.remove();
        return Err(IndexError::Changed { path: path.to_owned(), what });
    }
    part.begin().map_err(write_error)?;
    Ok((part, source))
}

/// The time of modification in nanoseconds since 1970.
fn modified(source: Source) -> i128 {
    i128::from(source.modified_seconds) * 1_000_000_000 + i128::from(source.modified_nanoseconds)
}

/// What of the image's state is not as it was, whether by writing to its file or by putting another in its place.
fn changes(path: &Path, file: &File, source: Source) -> io::Result<Option<Vec<&'static str>>> {
    let mut what = differences(source, state_of(file)?);
    what.extend(differences(source, state_at(path)?));
    if source.length != file.size() {
        what.push("size");
    }
    what.sort_unstable();
    what.dedup();
    Ok((!what.is_empty()).then_some(what))
}

/// One image of which a manifest is being made.
struct Job<'a> {
    part: Part,
    shape: Shape,
    checkpoint: Duration,
    progress: &'a (dyn Fn(Progress) + Sync),
    finished: Mutex<Finished>,
    done_bytes: AtomicU64,
    read_bytes: AtomicU64,
}

/// Blocks that are done.
#[derive(Debug)]
struct Finished {
    /// All before this one.
    low: u64,
    /// And these; not more than there are threads.
    beyond: BTreeSet<u64>,
    /// When `low` was made durable; `None` while that is being done.
    marked: Option<Instant>,
}

impl Finished {
    fn add(&mut self, block: u64) {
        self.beyond.insert(block);
        while self.beyond.remove(&self.low) {
            self.low += 1;
        }
    }
}

impl<'a> Job<'a> {
    fn new(part: Part, shape: Shape, checkpoint: Duration, progress: &'a (dyn Fn(Progress) + Sync)) -> Self {
        let marked = (part.done() * u64::from(shape.chunk_size)).min(shape.image_size);
        // The last block may be a short one.
        let low = if marked == shape.image_size { marked.div_ceil(BLOCK) } else { marked / BLOCK };
        let done_bytes = (low * BLOCK).min(shape.image_size);
        Self {
            part,
            shape,
            checkpoint,
            progress,
            finished: Mutex::new(Finished { low, beyond: BTreeSet::new(), marked: Some(clock::now()) }),
            done_bytes: AtomicU64::new(done_bytes),
            read_bytes: AtomicU64::new(0),
        }
    }

    fn is_complete(&self) -> bool {
        self.low() == self.shape.image_size.div_ceil(BLOCK)
    }

    fn low(&self) -> u64 {
        self.finished.lock().unwrap_or_else(PoisonError::into_inner).low
    }

    /// Does one block.
    fn index(&self, reader: &mut dyn Reader, pace: &Pace<'_>, block: u64, range: ByteRange) -> Result<(), Failure> {
        let mut digests = Vec::new();
        let bytes = reader.digests(range, pace, &mut digests).map_err(Failure::Read)?;
        self.read_bytes.fetch_add(bytes, Ordering::Relaxed);
        // The file begins as one hole, and a hole in it stands for holes in the image.
        if !crate::manifest::is_zero(&digests) {
            self.part.write(range.start() / u64::from(self.shape.chunk_size), &digests).map_err(Failure::Write)?;
        }
        self.finish(block).map_err(Failure::Write)?;
        let done = self.done_bytes.fetch_add(range.length(), Ordering::Relaxed) + range.length();
        (self.progress)(Progress { done, total: self.shape.image_size });
        Ok(())
    }

    /// Notes that a block is done, and makes what is done durable if it is time for that.
    fn finish(&self, block: u64) -> io::Result<()> {
        {
            let mut finished = self.finished.lock().unwrap_or_else(PoisonError::into_inner);
            finished.add(block);
            if finished.marked.is_none_or(|marked| clock::now() - marked < self.checkpoint) {
                return Ok(());
            }
            finished.marked = None;
        }
        let result = self.mark();
        self.finished.lock().unwrap_or_else(PoisonError::into_inner).marked = Some(clock::now());
        result
    }

    /// Makes what is done durable.
    fn mark(&self) -> io::Result<()> {
        let done = (self.low() * (BLOCK / u64::from(self.shape.chunk_size))).min(self.shape.count());
        self.part.mark(done)
    }
}

#[cfg(test)]
mod tests;
