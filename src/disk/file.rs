//! Files and block devices.

use std::fmt;
use std::fs::OpenOptions;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::{Buf, Bytes, BytesMut};
use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;

use super::engine;
use super::inline_writes::InlineWrites;
use super::op::{Op, Task, check};
use crate::clock;
use crate::ranges::ByteRange;
use crate::units::to_u64;

/// What a file is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Reading.
    ReadOnly,
    /// Reading and writing.
    ReadWrite,
    /// Reading and writing; made if it is not there, readable by its owner alone.
    Create,
}

/// What a path leads to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A regular file.
    Regular,
    /// A block device.
    BlockDevice,
}

/// How an inline read ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inline {
    /// All bytes have been appended.
    Done,
    /// Not all bytes are in memory, or this file cannot be asked; nothing has been appended.
    WouldBlock,
}

/// A stretch of a file that is all data or all hole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// Where it is, within what was asked for.
    pub range: ByteRange,
    /// Whether the file system has no data there.
    pub is_hole: bool,
}

/// An open file or block device, for any thread.
///
/// Every `async` operation goes on to its end when its future is dropped (cancellation rule of this room).
pub struct File {
    fd: Arc<OwnedFd>,
    path: PathBuf,
    kind: Kind,
    size: u64,
    /// Whether inline reads are worth trying; cleared for good when the file system does not know them.
    inline: AtomicBool,
    /// Whether the kernel says what is in memory; cleared for good when it does not.
    residency: AtomicBool,
    writes: InlineWrites,
}

impl File {
    /// Opens the file or block device at `path`. Blocks.
    pub fn open(path: &Path, access: Access) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        options.read(true).write(access != Access::ReadOnly).create(access == Access::Create).mode(0o600);
        // A FIFO would otherwise make the open itself wait for a writer.
        options.custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK);
        let file = options.open(path)?;
        let metadata = file.metadata()?;
        let kind = if metadata.is_file() {
            Kind::Regular
        } else if metadata.file_type().is_block_device() {
            Kind::BlockDevice
        } else {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "neither a file nor a block device"));
        };
        let fd = OwnedFd::from(file);
        let size = match kind {
            Kind::Regular => metadata.size(),
            Kind::BlockDevice => rustix::fs::seek(&fd, SeekFrom::End(0))?,
        };
        let inline = AtomicBool::new(inline_reads_work());
        Ok(Self {
            fd: Arc::new(fd),
            path: path.to_owned(),
            kind,
            size,
            inline,
            residency: AtomicBool::new(true),
            writes: InlineWrites::default(),
        })
    }

    /// The path that it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What it is.
    pub const fn kind(&self) -> Kind {
        self.kind
    }

    /// Its size in bytes when it was opened.
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// What it is called whatever its path is: device and inode; of a device its own number.
    pub fn id(&self) -> io::Result<[u64; 2]> {
        let found = rustix::fs::fstat(&self.fd)?;
        Ok(if self.kind == Kind::BlockDevice { [u64::MAX, found.st_rdev] } else { [found.st_dev, found.st_ino] })
    }

    /// Takes the lock of this file for as long as it is open; `false` when another open file has it.
    pub fn try_lock(&self) -> io::Result<bool> {
        match rustix::fs::flock(&self.fd, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(true),
            Err(Errno::WOULDBLOCK) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Gives the lock back while the file stays open.
    pub fn unlock(&self) {
        if let Err(error) = rustix::fs::flock(&self.fd, rustix::fs::FlockOperation::Unlock) {
            tracing::warn!(path = %self.path.display(), %error, "cannot give a lock back");
        }
    }

    /// Sets the size of a regular file. Blocks.
    pub fn set_size(&mut self, size: u64) -> io::Result<()> {
        rustix::fs::ftruncate(&self.fd, size)?;
        self.size = size;
        Ok(())
    }

    /// Bytes of storage that the file system has given the file. Blocks.
    pub fn allocated(&self) -> io::Result<u64> {
        Ok(u64::try_from(rustix::fs::fstat(&self.fd)?.st_blocks).unwrap_or(0) * 512)
    }

    /// Appends `length` bytes from `offset` to `output`, if that needs no waiting for the disk.
    ///
    /// An error of the disk comes back as [`Inline::WouldBlock`] too: the read that follows will report it.
    pub fn try_read_at(&self, output: &mut BytesMut, length: usize, offset: u64) -> Inline {
        if !self.inline.load(Ordering::Relaxed) {
            return Inline::WouldBlock;
        }
        let Ok(position) = i64::try_from(offset) else { return Inline::WouldBlock };
        output.reserve(length);
        let spare = &mut output.spare_capacity_mut()[..length];
        let vector = libc::iovec { iov_base: spare.as_mut_ptr().cast(), iov_len: length };
        // SAFETY: the vector denotes `length` bytes of spare capacity that we borrow exclusively.
        let read =
            check(unsafe { libc::preadv2(self.fd.as_raw_fd(), &raw const vector, 1, position, libc::RWF_NOWAIT) });
        match read {
            Ok(bytes) if bytes == length => {
                // SAFETY: `reserve` made room for `length` more bytes, and the kernel has written all of them.
                unsafe { output.set_len(output.len() + length) };
                Inline::Done
            }
            Err(error) if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ENOSYS)) => {
                tracing::debug!(path = %self.path.display(), "inline reads are not supported here");
                self.inline.store(false, Ordering::Relaxed);
                Inline::WouldBlock
            }
            Ok(_) | Err(_) => Inline::WouldBlock,
        }
    }

    /// Writes `parts` at `offset`, one behind the other, if the page cache takes them without waiting for the disk. If
    /// not, some of them may have been written. An error of the disk counts as waiting: the write that follows will
    /// report it.
    pub fn try_write_at(&self, parts: &[IoSlice<'_>], offset: u64) -> Inline {
        let Ok(position) = i64::try_from(offset) else { return Inline::WouldBlock };
        let length = parts.iter().map(|part| part.len()).sum();
        let began = clock::now();
        let range = ByteRange::between(offset, offset + to_u64(length));
        let Some(flags) = self.writes.admit(self, range, began) else { return Inline::WouldBlock };
        let count = libc::c_int::try_from(parts.len()).unwrap_or(libc::c_int::MAX);
        // SAFETY: `IoSlice` has the layout of `iovec`, and the slices live through the call, which only reads them.
        let written =
            check(unsafe { libc::pwritev2(self.fd.as_raw_fd(), parts.as_ptr().cast(), count, position, flags) });
        self.writes.note(flags, &written, began, clock::now());
        if written.is_ok_and(|written| written == length) { Inline::Done } else { Inline::WouldBlock }
    }

    /// Whether all of the range is in memory now. Where that cannot be asked, and on a file of somebody else's that we
    /// must not write to, the answer is no.
    pub fn is_in_memory(&self, range: ByteRange) -> bool {
        let page = to_u64(rustix::param::page_size());
        let all = range.end().div_ceil(page) - range.start() / page;
        range.is_empty() || self.pages_in_memory(range) == Some(all)
    }

    /// Lets go of the page cache of `around`, as far as nobody uses its pages, and says whether none of `range`, which
    /// lies in it, is in memory any more. A page that a socket still refers to stays, and so does what has not been
    /// written to the disk yet. Where the kernel cannot be asked nothing is ever sent from the page cache, so the
    /// answer is yes.
    pub fn drop_pages(&self, around: ByteRange, range: ByteRange) -> bool {
        if let Some(length) = std::num::NonZero::new(around.length()) {
            // Only advice: what counts is what is there afterwards.
            let _ = rustix::fs::fadvise(&self.fd, around.start(), Some(length), rustix::fs::Advice::DontNeed);
        }
        self.pages_in_memory(range).is_none_or(|pages| pages == 0)
    }

    /// Where the page cache is all the storage there is (tmpfs), it never lets go of anything. From now on such a file is
    /// not asked for what is in memory: nothing is sent from its pages, and [`Self::drop_pages`] says yes.
    pub fn forgo_pages_that_stay(&self) {
        const TMPFS: rustix::fs::FsWord = 0x0102_1994;
        if rustix::fs::fstatfs(&self.fd).is_ok_and(|figures| figures.f_type == TMPFS) {
            self.residency.store(false, Ordering::Relaxed);
        }
    }

    /// The pages of the range, which is not empty, that are in memory ("cachestat(2)", Linux 6.5). `None` where that
    /// cannot be asked.
    fn pages_in_memory(&self, range: ByteRange) -> Option<u64> {
        /// The same on all architectures.
        const SYS_CACHESTAT: libc::c_long = 451;
        if !self.residency.load(Ordering::Relaxed) {
            return None;
        }
        let asked = [range.start(), range.length()];
        // The pages there are, and four figures that do not matter here.
        let mut counts = [0_u64; 5];
        let fd = self.fd.as_raw_fd();
        // SAFETY: both arrays have the shape of the structures that the call reads and writes, and outlive it.
        let result = unsafe { libc::syscall(SYS_CACHESTAT, fd, asked.as_ptr(), counts.as_mut_ptr(), 0) };
        if result != 0 {
            let error = io::Error::last_os_error();
            tracing::debug!(path = %self.path.display(), %error, "cannot ask what is in memory");
            self.residency.store(false, Ordering::Relaxed);
            return None;
        }
        Some(counts[0])
    }

    /// Makes the range a hole that reads as zeroes. Blocks.
    pub fn punch_now(&self, range: ByteRange) -> io::Result<()> {
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::io::retry_on_intr(|| rustix::fs::fallocate(&self.fd, mode, range.start(), range.length()))?;
        Ok(())
    }

    /// Appends `length` bytes from `offset` to `buffer` and gives it back. A file that ends before that is an
    /// error, never zeroes.
    pub async fn read_exact_at(&self, mut buffer: BytesMut, length: usize, offset: u64) -> io::Result<BytesMut> {
        let end = buffer.len() + length;
        buffer.reserve(length);
        let mut at = offset;
        while buffer.len() < end {
            let missing = end - buffer.len();
            let (result, op) = self.run(Task::Read { buffer, length: missing, offset: at }).await;
            let Task::Read { buffer: filled, .. } = op.task else { unreachable!("operations keep their task") };
            buffer = filled;
            match result {
                Ok(0) => {
                    return Err(end_of_file());
                }
                Ok(bytes) => at += to_u64(bytes),
                Err(error) if is_transient(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(buffer)
    }

    /// Writes all of `data` at `offset`; with `stable`, it is on stable storage afterwards.
    pub async fn write_all_at(&self, mut data: Bytes, mut offset: u64, stable: bool) -> io::Result<()> {
        while !data.is_empty() {
            let (result, op) = self.run(Task::Write { data, offset, stable }).await;
            let Task::Write { data: written, .. } = op.task else { unreachable!("operations keep their task") };
            data = written;
            match result {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(bytes) => {
                    data.advance(bytes);
                    offset += to_u64(bytes);
                }
                Err(error) if is_transient(&error) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Makes all writes that have completed durable, with the metadata needed to read them.
    pub async fn sync_data(&self) -> io::Result<()> {
        self.run(Task::SyncData).await.0.map(drop)
    }

    /// Makes the range a hole that reads as zeroes.
    pub async fn punch(&self, range: ByteRange) -> io::Result<()> {
        self.allocate_with(FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, range).await
    }

    /// Makes the range allocated and read as zeroes.
    pub async fn zero(&self, range: ByteRange) -> io::Result<()> {
        self.allocate_with(FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE, range).await
    }

    /// Makes the range allocated and changes no byte of it.
    pub async fn allocate(&self, range: ByteRange) -> io::Result<()> {
        self.allocate_with(FallocateFlags::empty(), range).await
    }

    async fn allocate_with(&self, mode: FallocateFlags, range: ByteRange) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let mode = mode.bits().cast_signed();
        loop {
            let task = Task::Allocate { mode, offset: range.start(), length: range.length() };
            match self.run(task).await.0 {
                Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
                result => return result.map(drop),
            }
        }
    }

    async fn run(&self, task: Task) -> (io::Result<usize>, Op) {
        engine::run(Op { file: Arc::clone(&self.fd), task }).await
    }

    /// The data and the holes of `range`, in order, as the file system knows them: at most `limit` spans, the rest
    /// left out, and so is what lies behind the end of a file that has become shorter. At least one span, or an
    /// error. On files without this knowledge (block devices) all is data.
    ///
    /// Blocks if the file system must read its own metadata from disk, which it keeps in memory afterwards.
    pub fn spans(&self, range: ByteRange, limit: usize) -> io::Result<Vec<Span>> {
        let mut spans = Vec::new();
        let mut start = range.start();
        while start < range.end() && spans.len() < limit {
            let (is_hole, end) = match self.span_at(start) {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof && !spans.is_empty() => break,
                result => result?,
            };
            // Data that was punched out between the two questions ends where it begins; read, it gives its zeroes.
            let end = if end > start { end.min(range.end()) } else { range.end() };
            spans.push(Span { range: ByteRange::between(start, end), is_hole });
            start = end;
        }
        Ok(spans)
    }

    /// Whether `offset` lies in a hole, and where that hole or data ends.
    fn span_at(&self, offset: u64) -> io::Result<(bool, u64)> {
        if self.kind == Kind::BlockDevice {
            return Ok((false, self.size));
        }
        match rustix::fs::seek(&self.fd, SeekFrom::Data(offset)) {
            Ok(data) if data > offset => Ok((true, data)),
            Ok(_) => match rustix::fs::seek(&self.fd, SeekFrom::Hole(offset)) {
                Ok(hole) => Ok((false, hole)),
                Err(error) => Err(error.into()),
            },
            // No data from here to the end, wherever that is now.
            Err(Errno::NXIO) => {
                let size = u64::try_from(rustix::fs::fstat(&self.fd)?.st_size).unwrap_or(0);
                if offset < size { Ok((true, size)) } else { Err(end_of_file()) }
            }
            // The file system does not know.
            Err(Errno::INVAL | Errno::OPNOTSUPP) => Ok((false, self.size)),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for File {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl fmt::Debug for File {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("File").field("path", &self.path).field("size", &self.size).finish_non_exhaustive()
    }
}

fn end_of_file() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the file ends before its size")
}

/// Errors after which the same operation may succeed at once.
fn is_transient(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN))
}

/// Before Linux 5.11 `RWF_NOWAIT` could return too few bytes in the middle of a file (tokio issue 3803).
fn inline_reads_work() -> bool {
    let system = rustix::system::uname();
    let mut numbers = system.release().to_bytes().split(|byte| !byte.is_ascii_digit());
    let mut number = || numbers.next().and_then(|text| std::str::from_utf8(text).ok()?.parse::<u32>().ok());
    let (major, minor) = (number().unwrap_or(0), number().unwrap_or(0));
    (major, minor) >= (5, 11)
}
