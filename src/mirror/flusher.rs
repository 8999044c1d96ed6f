//! Makes what was stored durable, in groups, and only then marks it in the map.
//!
//! Order: the data file is synced; the chunks whose writes had completed before that are resident; the pages of the
//! map that name them are written; the map is synced. A crash at any point leaves a map that names a subset of what is
//! durable.
//!
//! If the data cannot be synced, everything whose write had begun by then is forgotten and fetched again, not only the
//! group: the file system tells of a failure once, and may have dropped any bytes that it had not written. That is
//! what *epochs* are for: each failure begins a new one, and only chunks of the current one become resident.

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Mutex as AsyncMutex, Notify};

use super::Inner;
use super::chunks::{Chunk, State};
use super::map::{chunks_of, page_of};
use crate::clock;
use crate::ranges::ByteRange;
use crate::telemetry::crash_point;

/// A group is closed at the latest this long after its first chunk. A crash loses at most so much of the fill.
const DELAY: Duration = Duration::from_secs(1);
/// A group is closed when it has this many bytes: few enough that the kernel does not make writers wait on a machine of
/// some memory, and so many that syncing does not compete with the fetching of a whole small image.
const BYTES: u64 = 256 << 20;
/// It is closed earlier when it has this part of a bounded cache, so that there is always something that can leave.
const PART: u64 = 16;

/// What is not durable yet.
#[derive(Debug)]
pub(super) struct Pending {
    /// Bytes of a group that is large enough.
    full_at: u64,
    group: Mutex<Group>,
    /// Something has been added to the group.
    begun: Notify,
    /// A group is large enough.
    full: Notify,
    /// Held by whoever flushes.
    flushing: AsyncMutex<()>,
    epoch: AtomicU64,
}

/// A time in which no write to the data file is known to have been lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Epoch(u64);

#[derive(Debug, Default)]
struct Group {
    /// Chunks that have been written to the data file, with the epoch in which their writes began.
    chunks: Vec<(Chunk, Epoch)>,
    bytes: u64,
    /// Pages of the map that are to be written anyway: chunks became zero or absent.
    pages: BTreeSet<u64>,
}

impl Pending {
    /// Nothing yet, of a cache of at most so many bytes.
    pub(super) fn new(limit: u64) -> Self {
        Self {
            full_at: BYTES.min(limit / PART),
            group: Mutex::default(),
            begun: Notify::new(),
            full: Notify::new(),
            flushing: AsyncMutex::new(()),
            epoch: AtomicU64::new(0),
        }
    }

    /// Never held across an await.
    fn group(&self) -> MutexGuard<'_, Group> {
        self.group.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The current epoch. To be asked before what is to be written is fetched: a manifest that comes meanwhile begins a new
    /// one too.
    pub(super) fn epoch(&self) -> Epoch {
        Epoch(self.epoch.load(Ordering::SeqCst))
    }

    /// Something that was written has been lost: nothing that is not durable yet is to be trusted.
    pub(super) fn distrust(&self) {
        self.epoch.fetch_add(1, Ordering::SeqCst);
    }

    /// A chunk has been written to the data file, and its state says so.
    pub(super) fn wrote(&self, chunk: Chunk, bytes: u64, epoch: Epoch) {
        self.change(|group| {
            group.chunks.push((chunk, epoch));
            group.bytes += bytes;
        });
    }

    /// The states of chunks from `first` to `last` changed in a way that the map should tell.
    pub(super) fn changed(&self, first: Chunk, last: Chunk) {
        self.change(|group| group.pages.extend(page_of(first)..=page_of(last)));
    }

    /// Waits until something has been added.
    #[cfg(test)]
    pub(super) async fn take_signal(&self) {
        self.begun.notified().await;
    }

    fn change(&self, change: impl FnOnce(&mut Group)) {
        let mut group = self.group();
        change(&mut group);
        self.begun.notify_one();
        if group.bytes >= self.full_at {
            self.full.notify_one();
        }
    }
}

impl Inner {
    /// Flushes group after group, for ever.
    pub(super) async fn run_flusher(&self) {
        loop {
            self.pending.begun.notified().await;
            // Either way the group is flushed.
            let _ = tokio::time::timeout(DELAY, self.pending.full.notified()).await;
            self.flush_group().await;
        }
    }

    /// Makes everything durable that has been stored so far.
    pub(super) async fn flush_group(&self) {
        let _flushing = self.pending.flushing.lock().await;
        let Group { chunks, mut pages, .. } = std::mem::take(&mut *self.pending.group());
        if !chunks.is_empty() {
            match self.store.data().sync_data().await {
                Ok(()) => self.space.disk_worked(),
                Err(error) => {
                    self.disk_failed("cannot make fetched chunks durable: they will be fetched again", &error);
                    self.pending.distrust();
                }
            }
            crash_point("synced, not marked");
            for (chunk, epoch) in chunks {
                if epoch != self.pending.epoch() {
                    let _table = self.flights.lock();
                    self.states.change(chunk, State::Volatile, State::Absent);
                } else {
                    // First: nobody is to count it before the map tells of it.
                    self.origins.set_marked(chunk, false);
                    // It may have been forgotten meanwhile; then it stays so.
                    if self.states.change(chunk, State::Volatile, State::Resident) {
                        pages.insert(page_of(chunk));
                    }
                }
            }
        }
        if pages.is_empty() || self.space.is_disk_out() {
            return;
        }
        let list: Vec<_> = pages.iter().copied().collect();
        // Before they are written: a chunk that becomes zero meanwhile is told of by the next group.
        let news = self.unmarked(&list);
        if let Err(error) = self.store.write_pages(&self.states, &list).await {
            // What is marked in memory is durable, so nothing is wrong but that a restart would fetch it again.
            self.disk_failed("cannot write the map", &error);
            // The next group takes them along; they do not begin one, or a broken disk would be asked for ever.
            self.pending.group().pages.extend(pages);
            return;
        }
        news.into_iter().for_each(|chunk| self.origins.set_marked(chunk, true));
    }

    /// The chunks of pages that are here or zero, and that the map does not tell of yet.
    fn unmarked(&self, pages: &[u64]) -> Vec<Chunk> {
        let is_news = |chunk: &Chunk| {
            let is_known = matches!(self.states.get(*chunk), State::Resident | State::Unverified | State::Zero);
            is_known && !self.origins.is_marked(*chunk)
        };
        pages.iter().flat_map(|page| chunks_of(self.geometry, *page)).filter(is_news).collect()
    }

    /// Writes pages of the map as the states are now, and makes them durable.
    pub(super) async fn write_map(&self, pages: BTreeSet<u64>) -> io::Result<()> {
        if pages.is_empty() {
            return Ok(());
        }
        let _flushing = self.pending.flushing.lock().await;
        let list: Vec<_> = pages.into_iter().collect();
        self.store.write_pages(&self.states, &list).await
    }

    /// Warns of the cache disk, seldom.
    pub(super) fn warn_of_disk(&self, what: &str, error: &io::Error) {
        if let Some(unsaid) = self.disk_warnings.now(clock::now()) {
            tracing::warn!(image = self.name, %error, unsaid, "{what}");
        }
    }

    /// Notes that chunks within `range` have become zero.
    pub(super) fn note_zeroes(&self, range: ByteRange) {
        let mut chunks = self.geometry.whole_chunks(range);
        if let Some(first) = chunks.next() {
            self.pending.changed(first, chunks.next_back().unwrap_or(first));
        }
    }
}
