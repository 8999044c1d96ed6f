//! Makes what was stored durable, in groups, and only then marks it in the map.
//!
//! Order: the data file is synced; the chunks whose writes had completed before that are resident; the pages of the
//! map that name them are written; the map is synced. A crash at any point leaves a map that names a subset of what is
//! durable. If the data cannot be synced, the chunks of the group are forgotten: the file system may have dropped
//! their bytes, so they are fetched again.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Mutex as AsyncMutex, Notify};

use super::Inner;
use super::chunks::{Chunk, State};
use super::map::page_of;
use crate::clock;
use crate::ranges::ByteRange;

/// A group is closed at the latest this long after its first chunk. A crash loses at most so much of the fill.
const DELAY: Duration = Duration::from_secs(1);
/// A group is closed when it has this many bytes.
const BYTES: u64 = 64 << 20;

/// What is not durable yet.
#[derive(Debug, Default)]
pub(super) struct Pending {
    group: Mutex<Group>,
    /// Something has been added to an empty group.
    begun: Notify,
    /// A group is large enough.
    full: Notify,
    /// Held by whoever flushes.
    flushing: AsyncMutex<()>,
}

#[derive(Debug, Default)]
struct Group {
    /// Chunks that have been written to the data file.
    chunks: Vec<Chunk>,
    bytes: u64,
    /// Pages of the map that are to be written anyway: chunks became zero or absent.
    pages: BTreeSet<u64>,
}

impl Group {
    fn is_empty(&self) -> bool {
        self.chunks.is_empty() && self.pages.is_empty()
    }
}

impl Pending {
    /// Never held across an await.
    fn group(&self) -> MutexGuard<'_, Group> {
        self.group.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A chunk has been written to the data file, and its state says so.
    pub(super) fn wrote(&self, chunk: Chunk, bytes: u64) {
        self.change(|group| {
            group.chunks.push(chunk);
            group.bytes += bytes;
        });
    }

    /// The states of chunks from `first` to `last` changed in a way that the map should tell.
    pub(super) fn changed(&self, first: Chunk, last: Chunk) {
        self.change(|group| group.pages.extend(page_of(first)..=page_of(last)));
    }

    fn change(&self, change: impl FnOnce(&mut Group)) {
        let mut group = self.group();
        let was_empty = group.is_empty();
        change(&mut group);
        if was_empty && !group.is_empty() {
            self.begun.notify_one();
        }
        if group.bytes >= BYTES {
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
            if let Err(error) = self.store.data().sync_data().await {
                return self.forget_group(&chunks, pages, &error);
            }
            for chunk in chunks {
                // It may have been forgotten meanwhile; then it stays so.
                if self.states.change(chunk, State::Volatile, State::Resident) {
                    pages.insert(page_of(chunk));
                }
            }
        }
        if pages.is_empty() {
            return;
        }
        let list: Vec<_> = pages.iter().copied().collect();
        if let Err(error) = self.store.write_pages(&self.states, &list).await {
            // What is marked in memory is durable, so nothing is wrong but that a restart would fetch it again.
            self.warn_of_disk("cannot write the map", &error);
            self.pending.group().pages.extend(pages);
            // The next group takes them along; they do not begin one, or a broken disk would be asked for ever.
        }
    }

    fn forget_group(&self, chunks: &[Chunk], pages: BTreeSet<u64>, error: &std::io::Error) {
        self.warn_of_disk("cannot make fetched chunks durable: they will be fetched again", error);
        let _table = self.flights.lock();
        for chunk in chunks {
            self.states.change(*chunk, State::Volatile, State::Absent);
        }
        self.pending.group().pages.extend(pages);
    }

    /// Warns of the cache disk, seldom.
    pub(super) fn warn_of_disk(&self, what: &str, error: &std::io::Error) {
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
