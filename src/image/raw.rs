//! Raw files and block devices.
//!
//! Durability: a write is answered when the page cache has it; FUA and flush reach the disk. After a flush has
//! failed nobody can say which writes were lost (Linux reports a failed write-back once and then calls the pages
//! clean), so every later flush of the image fails too, until the server is started again.

use std::io::{self, IoSlice};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use bytes::{Bytes, BytesMut};
use tokio::sync::Mutex as AsyncMutex;

use super::layout::{Layout, WINDOW};
use super::seal::{CannotSeal, Seal};
use crate::disk::{Access, File, Inline, Kind, Span};
use crate::error::{Error, ErrorKind, Result};
use crate::export::{
    Context, Export, Facts, FileRange, LocalFuture, Piece, SharedExport, TryRead, TryWrite, push_extent, push_piece,
};
use crate::nbd::Extent;
use crate::nbd::request::{Durability, ZeroMode};
use crate::nbd::wire::Allocation;
use crate::ranges::ByteRange;
use crate::telemetry::seldom;
use crate::units::{KIB, MIB, to_usize};

/// Spans of one read. A file more fragmented than this has its remaining holes sent as zeroes.
const MAX_SPANS: usize = 1024;

/// Data spans are read together when the hole between them is smaller: one system call costs about as much as
/// copying so many bytes.
const BRIDGED_HOLE: u64 = 32 * KIB;

/// Zeroes are written in pieces of this size where nothing faster works.
const ZERO_PIECE: usize = 256 << 10;
static ZEROES: [u8; ZERO_PIECE] = [0; ZERO_PIECE];

/// Block devices take discards and zeroing in units of their logical block, which is at most this.
const DEVICE_BLOCK: u64 = 4096;

/// A raw file or a block device.
#[derive(Debug)]
pub struct RawImage {
    file: Arc<File>,
    writable: bool,
    seal: Result<Arc<Seal>, CannotSeal>,
    /// Shared with the threads that look at the file for us.
    layout: Arc<Layout>,
    /// What clients are told, for the life of the image, whatever is found out later.
    offers: Offers,
    can_punch: AtomicBool,
    can_zero: AtomicBool,
    /// Changes of the file under way. Meanwhile the file system may keep whoever asks for its layout waiting.
    changes: AtomicUsize,
    syncs: Arc<Syncs>,
}

/// What an image can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Offers {
    trim: bool,
    fast_zero: bool,
}

/// Syncs of the file, one at a time.
#[derive(Debug, Default)]
struct Syncs {
    /// Held while one runs, so that nobody is told of success between a failure and its being noted.
    turn: AsyncMutex<()>,
    begun: AtomicU64,
    done: AtomicU64,
    /// One has failed; see the head of this file.
    is_tainted: AtomicBool,
}

impl Syncs {
    async fn sync(&self, file: &File) -> Result<()> {
        let arrived = self.begun.load(Ordering::Acquire);
        let _turn = self.turn.lock().await;
        // One that began after we came has done our work too.
        if self.done.load(Ordering::Acquire) <= arrived {
            self.begun.fetch_add(1, Ordering::AcqRel);
            let result = file.sync_data().await;
            self.done.store(self.begun.load(Ordering::Acquire), Ordering::Release);
            if let Err(error) = result {
                self.taint(file, &error);
                return Err(Error::from_io("cannot make writes durable", error));
            }
        }
        if self.is_tainted.load(Ordering::Relaxed) {
            return Err(Error::new(ErrorKind::Io, "an earlier flush failed, writes may be lost"));
        }
        Ok(())
    }

    /// Notes that the system has told of a failed write-back, which it does once.
    fn taint(&self, file: &File, error: &io::Error) {
        self.is_tainted.store(true, Ordering::Relaxed);
        let path = file.path().display();
        tracing::error!(%path, %error, "writes may be lost: all flushes fail until the server is restarted");
    }
}

/// Does `work` to its end also when nobody waits for it any more: what the system says of lost writes, it says once.
async fn unstoppable<T: 'static>(work: impl Future<Output = T> + 'static) -> io::Result<T> {
    tokio::task::spawn_local(work).await.map_err(io::Error::other)
}

/// A change of the file under way.
struct Change<'a>(&'a AtomicUsize);

impl<'a> Change<'a> {
    fn begin(changes: &'a AtomicUsize) -> Self {
        changes.fetch_add(1, Ordering::Relaxed);
        Self(changes)
    }
}

impl Drop for Change<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl RawImage {
    /// The image in `file`, which was opened for `access`. Blocks.
    pub fn new(file: File, access: Access) -> Self {
        let writable = access != Access::ReadOnly;
        let can_punch = writable && probe_punch(&file);
        let fast_zero = match file.kind() {
            Kind::Regular => can_punch,
            Kind::BlockDevice => writable && queue_limit(&file, "write_zeroes_max_bytes"),
        };
        let file = Arc::new(file);
        let sealed = || Seal::new(Arc::clone(&file), file.size()).map(Arc::new);
        Self {
            layout: Arc::new(Layout::new(file.size())),
            seal: if writable { Err(CannotSeal::Writable) } else { sealed() },
            file,
            writable,
            offers: Offers { trim: can_punch, fast_zero },
            can_punch: AtomicBool::new(can_punch),
            can_zero: AtomicBool::new(writable),
            changes: AtomicUsize::new(0),
            syncs: Arc::default(),
        }
    }

    /// What gives it its identity; or why it cannot have one.
    pub(super) fn seal(&self) -> Result<Arc<Seal>, CannotSeal> {
        self.seal.clone()
    }

    fn failed(&self, what: &str, range: ByteRange, error: io::Error) -> Error {
        let error = Error::from_io(format!("cannot {what} {} bytes at {}", range.length(), range.start()), error);
        if error.kind() != ErrorKind::NoSpace {
            seldom!(error, path = %self.file.path().display(), error = %error.chain(), "disk error");
        }
        error
    }

    fn check_writable(&self) -> Result<()> {
        if self.writable { Ok(()) } else { Err(Error::new(ErrorKind::Permission, "the image is read-only")) }
    }

    /// The spans of `range`. What the file system has not looked at yet is looked at by a thread that may wait.
    async fn spans(&self, range: ByteRange, limit: usize) -> io::Result<Vec<Span>> {
        if self.file.kind() == Kind::BlockDevice || self.layout.is_data(range) {
            return Ok(vec![Span { range, is_hole: false }]);
        }
        if !self.layout.is_seen(range) {
            self.look_at(range).await?;
        }
        let spans = if self.is_changing() {
            let file = Arc::clone(&self.file);
            blocking(move || file.spans(range, limit)).await?
        } else {
            self.file.spans(range, limit)?
        };
        self.layout.learn(&spans);
        Ok(spans)
    }

    /// Has the file system read its metadata for the windows of `range`.
    async fn look_at(&self, range: ByteRange) -> io::Result<()> {
        let (file, layout) = (Arc::clone(&self.file), Arc::clone(&self.layout));
        blocking(move || {
            let windows = range.start() / WINDOW..range.end().div_ceil(WINDOW);
            for window in windows {
                let range = ByteRange::between(window * WINDOW, file.size().min((window + 1) * WINDOW));
                if !layout.is_seen(range) {
                    layout.saw(range, &file.spans(range, usize::MAX)?);
                }
            }
            Ok(())
        })
        .await
    }

    fn is_changing(&self) -> bool {
        self.changes.load(Ordering::Relaxed) > 0
    }

    async fn read_pieces(&self, range: ByteRange) -> io::Result<Vec<Piece>> {
        let mut spans = self.spans(range, MAX_SPANS).await?;
        let end = spans.last().map_or_else(|| range.start(), |span| span.range.end());
        spans.push(Span { range: ByteRange::between(end, range.end()), is_hole: false });
        let mut pieces = Vec::new();
        let mut rest = &spans[..];
        while let Some(first) = rest.first() {
            let count = if first.is_hole { 1 } else { bridged(rest) };
            let (together, after) = rest.split_at(count);
            if first.is_hole {
                push_piece(&mut pieces, Piece::Hole(first.range.length()));
            } else {
                self.read_together(together, &mut pieces).await?;
            }
            rest = after;
        }
        Ok(pieces)
    }

    /// Reads spans that follow each other by one operation.
    async fn read_together(&self, spans: &[Span], pieces: &mut Vec<Piece>) -> io::Result<()> {
        let (Some(first), Some(last)) = (spans.first(), spans.last()) else { return Ok(()) };
        let whole = ByteRange::between(first.range.start(), last.range.end());
        let length = to_usize(whole.length());
        let mut bytes = self.file.read_exact_at(BytesMut::with_capacity(length), length, whole.start()).await?.freeze();
        for span in spans {
            let data = bytes.split_to(to_usize(span.range.length()));
            push_piece(pieces, if span.is_hole { Piece::Hole(span.range.length()) } else { Piece::Data(data) });
        }
        Ok(())
    }

    async fn make_durable(&self, durability: Durability) -> Result<()> {
        if durability == Durability::Stable { self.sync().await } else { Ok(()) }
    }

    async fn sync(&self) -> Result<()> {
        let (file, syncs) = (Arc::clone(&self.file), Arc::clone(&self.syncs));
        let sync = unstoppable(async move { syncs.sync(&file).await });
        sync.await.map_err(|error| Error::from_io("the server ended before it was done", error))?
    }

    /// Writes to stable storage.
    async fn write_through(&self, data: Bytes, offset: u64) -> io::Result<()> {
        let (file, syncs) = (Arc::clone(&self.file), Arc::clone(&self.syncs));
        let write = async move {
            let result = file.write_all_at(data, offset, true).await;
            if let Err(error) = &result
                && Error::kind_of(error) == ErrorKind::Io
            {
                // It may be about an earlier write by another client, which then would never hear of it.
                syncs.taint(&file, error);
            }
            result
        };
        unstoppable(write).await?
    }

    /// Zeroes `range` by the file system. `Ok(false)`: it cannot, and nothing has changed that matters.
    async fn zero_fast(&self, range: ByteRange, may_punch: bool) -> io::Result<bool> {
        if may_punch && self.can_punch.load(Ordering::Relaxed) {
            match self.file.punch(range).await {
                Err(error) if is_unsupported(&error) => self.can_punch.store(false, Ordering::Relaxed),
                result => return result.map(|()| true),
            }
        }
        if self.can_zero.load(Ordering::Relaxed) {
            match self.file.zero(range).await {
                Err(error) if is_unsupported(&error) => self.can_zero.store(false, Ordering::Relaxed),
                result => return result.map(|()| true),
            }
        }
        // Some file systems (tmpfs) can do it in two steps only.
        if self.can_punch.load(Ordering::Relaxed) && self.file.kind() == Kind::Regular {
            self.file.punch(range).await?;
            return match self.file.allocate(range).await {
                Err(error) if is_unsupported(&error) => Ok(false),
                result => result.map(|()| true),
            };
        }
        Ok(false)
    }

    async fn zero_slowly(&self, range: ByteRange) -> io::Result<()> {
        for piece in range.pieces(ZERO_PIECE as u64) {
            let zeroes = Bytes::from_static(&ZEROES).slice(..to_usize(piece.length()));
            self.file.write_all_at(zeroes, piece.start(), false).await?;
        }
        Ok(())
    }

    async fn zero(&self, range: ByteRange, mode: ZeroMode) -> Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let failed = |error| self.failed("zero", range, error);
        let _change = Change::begin(&self.changes);
        self.layout.forget(range);
        let fast = self.fast_part(range);
        if mode.must_be_fast && fast != range {
            return Err(Error::new(ErrorKind::Unsupported, "zeroing part of a block is no faster than writing"));
        }
        // Without permission to punch, the kernel writes zeroes to a device that cannot zero by itself.
        let may_be_slow = self.file.kind() == Kind::BlockDevice && !(mode.may_punch && self.offers.fast_zero);
        if mode.must_be_fast && may_be_slow {
            return Err(Error::new(ErrorKind::Unsupported, "zeroing may be no faster than writing here"));
        }
        if fast.is_empty() || !self.zero_fast(fast, mode.may_punch).await.map_err(failed)? {
            if mode.must_be_fast {
                return Err(Error::new(ErrorKind::Unsupported, "zeroing is no faster than writing here"));
            }
            return self.zero_slowly(range).await.map_err(failed);
        }
        self.zero_slowly(ByteRange::between(range.start(), fast.start())).await.map_err(failed)?;
        self.zero_slowly(ByteRange::between(fast.end(), range.end())).await.map_err(failed)
    }

    /// The part of `range` that can be zeroed or discarded as a whole.
    fn fast_part(&self, range: ByteRange) -> ByteRange {
        match self.file.kind() {
            Kind::Regular => range,
            Kind::BlockDevice => ByteRange::between(
                range.start().next_multiple_of(DEVICE_BLOCK).min(range.end()),
                range.end() / DEVICE_BLOCK * DEVICE_BLOCK,
            ),
        }
    }
}

/// How many spans from the front, which is data, are worth reading together.
fn bridged(spans: &[Span]) -> usize {
    let mut count = 1;
    while let [hole, data, ..] = &spans[count..]
        && hole.is_hole
        && !data.is_hole
        && hole.range.length() < BRIDGED_HOLE
    {
        count += 2;
    }
    count
}

fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINVAL | libc::ENODEV))
}

/// Whether the file system or the device gives storage back. Punching behind the end of a file changes nothing.
fn probe_punch(file: &File) -> bool {
    use rustix::fs::FallocateFlags;
    match file.kind() {
        Kind::Regular => {
            let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            let behind = file.size().next_multiple_of(MIB);
            rustix::fs::fallocate(file, mode, behind, DEVICE_BLOCK).is_ok()
        }
        Kind::BlockDevice => queue_limit(file, "discard_max_bytes"),
    }
}

/// Whether a limit of a block device, as sysfs has it, is more than none.
fn queue_limit(file: &File, name: &str) -> bool {
    let Ok(status) = rustix::fs::fstat(file) else { return false };
    let (major, minor) = (rustix::fs::major(status.st_rdev), rustix::fs::minor(status.st_rdev));
    let queue = |path: &str| format!("/sys/dev/block/{major}:{minor}/{path}queue/{name}");
    // A partition has its queue one level up.
    let text = std::fs::read_to_string(queue("")).or_else(|_| std::fs::read_to_string(queue("../")));
    text.is_ok_and(|text| text.trim().parse().is_ok_and(|limit: u64| limit > 0))
}

/// Does what may wait for the disk on a thread that may.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    let work = tokio::task::spawn_blocking(work);
    work.await.expect("looking at a file does not panic, and the runtime outlives its tasks")
}

impl Export for RawImage {
    fn facts(&self) -> Facts {
        Facts {
            writable: self.writable,
            can_trim: self.offers.trim,
            can_zero_fast: self.offers.fast_zero,
            identity: self.seal.as_ref().ok().and_then(|seal| seal.identity()),
            ..Facts::read_only(self.file.size(), super::description(self.file.path()))
        }
    }

    fn try_read(&self, range: ByteRange, output: &mut BytesMut) -> TryRead {
        if self.file.kind() == Kind::Regular && !self.layout.is_data(range) {
            if !self.layout.is_seen(range) || range.is_empty() || self.is_changing() {
                return TryRead::Wait;
            }
            match self.file.spans(range, 2).as_deref() {
                Ok([span]) if span.range != range => return TryRead::Wait,
                Ok([span]) if span.is_hole => return TryRead::Hole,
                Ok([span]) => self.layout.learn(std::slice::from_ref(span)),
                Ok(_) | Err(_) => return TryRead::Wait,
            }
        }
        match self.file.try_read_at(output, to_usize(range.length()), range.start()) {
            Inline::Done => TryRead::Data,
            Inline::WouldBlock => TryRead::Wait,
        }
    }

    fn file_id(&self) -> Option<[u64; 2]> {
        self.file.id().ok()
    }

    fn in_file(&self, range: ByteRange) -> Option<FileRange> {
        self.is_in_file(range).then(|| FileRange { file: Arc::clone(&self.file), range, hold: None })
    }

    fn is_in_file(&self, range: ByteRange) -> bool {
        let is_data = self.file.kind() == Kind::BlockDevice || self.layout.is_data(range);
        is_data && self.file.is_in_memory(range)
    }

    fn read(&self, range: ByteRange) -> LocalFuture<'_, Result<Vec<Piece>>> {
        Box::pin(async move { self.read_pieces(range).await.map_err(|error| self.failed("read", range, error)) })
    }

    fn manifest(&self) -> Option<SharedExport> {
        self.seal.as_ref().ok()?.manifest()
    }

    fn try_write(&self, offset: u64, parts: &[IoSlice<'_>]) -> TryWrite {
        if !self.writable {
            return TryWrite::Wait;
        }
        let _change = Change::begin(&self.changes);
        match self.file.try_write_at(parts, offset) {
            Inline::Done => TryWrite::Done,
            Inline::WouldBlock => TryWrite::Wait,
        }
    }

    fn write(&self, offset: u64, data: Bytes, durability: Durability) -> LocalFuture<'_, Result<()>> {
        let range = ByteRange::between(offset, offset + crate::units::to_u64(data.len()));
        Box::pin(async move {
            self.check_writable()?;
            let _change = Change::begin(&self.changes);
            let result = match durability {
                Durability::Stable => self.write_through(data, offset).await,
                Durability::Volatile => self.file.write_all_at(data, offset, false).await,
            };
            result.map_err(|error| self.failed("write", range, error))
        })
    }

    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode, durability: Durability) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            self.check_writable()?;
            self.zero(range, mode).await?;
            self.make_durable(durability).await
        })
    }

    fn trim(&self, range: ByteRange, durability: Durability) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            self.check_writable()?;
            let range = self.fast_part(range);
            if !range.is_empty() && self.can_punch.load(Ordering::Relaxed) {
                let _change = Change::begin(&self.changes);
                self.layout.forget(range);
                match self.file.punch(range).await {
                    // "NBD_CMD_TRIM": the server may discard, and need not.
                    Err(error) if is_unsupported(&error) => self.can_punch.store(false, Ordering::Relaxed),
                    result => result.map_err(|error| self.failed("trim", range, error))?,
                }
            }
            self.make_durable(durability).await
        })
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move { if self.writable { self.sync().await } else { Ok(()) } })
    }

    fn cache(&self, range: ByteRange) -> LocalFuture<'_, Result<()>> {
        let file = Arc::clone(&self.file);
        Box::pin(async move {
            let advise = move || {
                let length = std::num::NonZeroU64::new(range.length());
                rustix::fs::fadvise(&*file, range.start(), length, rustix::fs::Advice::WillNeed)
            };
            if !range.is_empty()
                && let Ok(Err(error)) = tokio::task::spawn_blocking(advise).await
            {
                tracing::debug!(%error, "cannot read ahead");
            }
            Ok(())
        })
    }

    fn extents(&self, range: ByteRange, context: Context, limit: usize) -> LocalFuture<'_, Result<Vec<Extent>>> {
        Box::pin(async move {
            if context != Context::Allocation {
                return Err(Error::new(ErrorKind::Invalid, "a real image has no such context"));
            }
            let file = Arc::clone(&self.file);
            let spans = blocking(move || file.spans(range, limit))
                .await
                .map_err(|error| self.failed("look at", range, error))?;
            let mut extents = Vec::new();
            for span in spans {
                let state = if span.is_hole { Allocation::all() } else { Allocation::empty() };
                push_extent(&mut extents, span.range.length(), u64::from(state.bits()));
            }
            Ok(extents)
        })
    }
}
