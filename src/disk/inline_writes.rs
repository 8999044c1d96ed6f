//! When a worker may write to the page cache by itself.
//!
//! A buffered write is a copy, unless the kernel keeps the writer waiting: until pages have been written back, because
//! too many are dirty, or until the rest of a page has been read that is written in part. XFS and btrfs say so
//! beforehand (`RWF_NOWAIT`). ext4 does not, and io_uring hands its writes to another thread, which costs more than
//! the copy. There, writers are kept waiting only once dirty pages exceed the middle between the two thresholds of
//! `/proc/vmstat` ("free run", `balance_dirty_pages` in the kernel's `mm/page-writeback.c`); below that we write, and
//! above it, or after a write that was slow all the same, the ring does.

use std::fs;
use std::io;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::file::File;
use crate::clock;
use crate::ranges::ByteRange;
use crate::units::to_u64;

/// A copy that takes longer than this has waited for something.
const SLOW: Duration = Duration::from_millis(10);
/// For so long after that, the ring writes.
const PENALTY: Duration = Duration::from_secs(1);
/// The system is asked again after so long, or after [`SHARE`] of what it had room for.
const FRESH: Duration = Duration::from_millis(50);
/// Others dirty pages too.
const SHARE: u64 = 4;

/// What is known of inline writes to one file.
#[derive(Debug, Default)]
pub(super) struct InlineWrites {
    /// The file system does not know `RWF_NOWAIT` for buffered writes.
    lacks_nowait: AtomicBool,
    /// Milliseconds since [`START`] until which the ring writes.
    penalty_until: AtomicU64,
}

/// How many bytes all files together may still dirty before the system is asked again.
#[derive(Debug)]
struct DirtyRoom {
    left: AtomicU64,
    asked_at: AtomicU64,
}

static START: LazyLock<Instant> = LazyLock::new(clock::now);
static ROOM: DirtyRoom = DirtyRoom { left: AtomicU64::new(0), asked_at: AtomicU64::new(0) };

fn milliseconds(instant: Instant) -> u64 {
    u64::try_from(instant.saturating_duration_since(*START).as_millis()).unwrap_or(u64::MAX)
}

fn duration(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

impl InlineWrites {
    /// The flags to write `range` of `file` with, if a worker may.
    pub(super) fn admit(&self, file: &File, range: ByteRange, now: Instant) -> Option<i32> {
        if !self.lacks_nowait.load(Ordering::Relaxed) {
            return Some(libc::RWF_NOWAIT);
        }
        let now = milliseconds(now);
        let page = to_u64(rustix::param::page_size());
        let is_whole = range.start().is_multiple_of(page) && range.end().is_multiple_of(page);
        let may = now >= self.penalty_until.load(Ordering::Relaxed)
            && (is_whole || file.is_in_memory(range))
            && ROOM.take(range.length(), now);
        may.then_some(0)
    }

    /// Takes note of how a write with `flags` went.
    pub(super) fn note(&self, flags: i32, result: &io::Result<usize>, began: Instant, ended: Instant) {
        if flags == libc::RWF_NOWAIT {
            if let Err(error) = result
                && matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::EINVAL))
            {
                self.lacks_nowait.store(true, Ordering::Relaxed);
            }
        } else if ended.saturating_duration_since(began) > SLOW {
            let until = milliseconds(ended).saturating_add(duration(PENALTY));
            self.penalty_until.store(until, Ordering::Relaxed);
        }
    }
}

impl DirtyRoom {
    /// Takes `length` bytes if there is room for them.
    fn take(&self, length: u64, now: u64) -> bool {
        let take =
            || self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(length)).is_ok();
        let is_fresh = now.saturating_sub(self.asked_at.load(Ordering::Relaxed)) < duration(FRESH);
        if is_fresh && take() {
            return true;
        }
        // Two workers may both ask, which is harmless: each takes only a share.
        let room = fs::read_to_string("/proc/vmstat").ok().and_then(|text| free_run(&text)).unwrap_or(0);
        self.left.store(room / SHARE, Ordering::Relaxed);
        self.asked_at.store(now, Ordering::Relaxed);
        take()
    }
}

/// Bytes that can become dirty before the kernel slows writers down.
fn free_run(vmstat: &str) -> Option<u64> {
    let pages = |name: &str| {
        let line = vmstat.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line?.trim().parse::<u64>().ok()
    };
    let limit = u64::midpoint(pages("nr_dirty_threshold")?, pages("nr_dirty_background_threshold")?);
    let used = pages("nr_dirty")? + pages("nr_writeback")?;
    Some(limit.saturating_sub(used) * to_u64(rustix::param::page_size()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn room_is_what_is_left_to_the_middle_of_the_thresholds() {
        let text = "nr_dirty 100\nnr_writeback 20\nnr_dirtied 7\nnr_dirty_threshold 1000\n\
                    nr_dirty_background_threshold 500\n";
        let page = to_u64(rustix::param::page_size());
        assert_eq!(free_run(text), Some((750 - 120) * page));
        assert_eq!(free_run(&text.replace("nr_dirty 100", "nr_dirty 800")), Some(0));
        assert_eq!(free_run("nr_dirty 1\n"), None, "an unknown system has no room");
    }

    #[test]
    fn a_slow_write_leaves_the_next_ones_to_the_ring() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        fs::write(&path, [0; 4096]).unwrap();
        let file = File::open(&path, crate::disk::Access::ReadWrite).unwrap();
        let writes = InlineWrites::default();
        let (now, page) = (clock::now(), ByteRange::between(0, 4096));
        assert_eq!(writes.admit(&file, page, now), Some(libc::RWF_NOWAIT));
        writes.note(libc::RWF_NOWAIT, &Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)), now, now);
        assert_eq!(writes.admit(&file, page, now), Some(0));
        writes.note(0, &Ok(4096), now, now + SLOW * 2);
        assert_eq!(writes.admit(&file, page, now + SLOW * 3), None);
        assert_eq!(writes.admit(&file, page, now + SLOW * 3 + PENALTY), Some(0));
    }
}
