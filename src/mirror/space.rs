//! The disk space that all mirrors of one cache directory share: how much there is, who gets it, who gives it back.
//!
//! Every byte is reserved before it is written and given back when its write has failed or its chunk has been punched
//! out. So what is on the disk and what is on its way there is never more than the limit, at any time. Space is asked for
//! when a fetch begins and waited for beside it, so that no client waits for an eviction. What does not fit is served
//! without being kept.
//!
//! Lock order: a mirror's flight table, then the book with the order of eviction, then the list of members, which is
//! locked for a moment only.
//!
//! Owns: the account, the order of eviction, the members, the table of twins, the health of the disk. Does not own: the
//! chunks (each mirror), the order itself (`policy`), giving back (`evict`).

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::time::Duration;

use thiserror::Error;
use tokio::sync::Notify;
use tokio::time::{Instant, timeout, timeout_at};

use super::Inner;
use super::policy::{self, Admission, Clock, Heat, Kind, Order, Segment, Word};
use super::store::CacheError;
use super::twins::Twins;
use crate::telemetry::Counter;
use crate::units::{ByteSize, MIB};

/// How long bytes that have been answered wait for space before they are let go of.
const PATIENCE: Duration = Duration::from_millis(100);
/// The part of the limit that is kept free, so that fetches need not wait for evictions.
const HEADROOM_PART: u64 = 64;
/// Two of the longest runs, where the limit is not tiny.
const SMALLEST_HEADROOM: u64 = 2 * MIB;
const LARGEST_HEADROOM: u64 = 64 * MIB;
/// Failures of the disk, without a success in between, after which it is not used any more.
const DISK_FAILURES: u32 = 8;
/// Failures that are less apart are one.
const FAILURES_APART: Duration = Duration::from_millis(100);

/// What an operator may set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpaceSettings {
    /// Bytes that all files of the cache may take on the disk together. `None`: as much as there is.
    pub limit: Option<u64>,
    /// Bytes of the file system that are left free.
    pub reserve: u64,
    /// Which chunks go first.
    pub policy: Kind,
    /// Whether all are kept, or only as long as that pays.
    pub admission: Admission,
}

impl Default for SpaceSettings {
    fn default() -> Self {
        Self { limit: None, reserve: 0, policy: Kind::S3Fifo, admission: Admission::default() }
    }
}

/// Why the limit cannot be changed.
#[derive(Debug, Error)]
pub enum ResizeError {
    /// What cannot be given back is more than that.
    #[error("maps, manifests and pins of the images and the room for what comes take {}: the limit must be more than that, not {}", ByteSize(*kept), ByteSize(*limit))]
    TooSmall {
        /// What was wanted, in bytes.
        limit: u64,
        /// What cannot be evicted, in bytes.
        kept: u64,
    },
    /// The file system gives nothing back.
    #[error("nothing can be evicted: {0}")]
    CannotPunch(CacheError),
}

impl SpaceSettings {
    /// Whether anything is evicted.
    pub(super) const fn evicts(&self) -> bool {
        self.limit.is_some() || self.reserve > 0
    }

    /// Bytes of the limit that the evictor keeps free: when less than half of it is left, it makes it whole again.
    pub fn headroom(&self) -> u64 {
        match self.limit {
            Some(limit) => (limit / HEADROOM_PART).clamp(SMALLEST_HEADROOM.min(limit / 8), LARGEST_HEADROOM),
            None if self.reserve > 0 => LARGEST_HEADROOM / 4,
            None => 0,
        }
    }

    /// What more must be free for the cache to count as not full.
    pub fn plenty(&self) -> u64 {
        2 * self.headroom() + 2 * MIB
    }
}

/// What happened in a cache directory.
#[derive(Debug, Default)]
pub struct SpaceStats {
    /// Chunks that were evicted.
    pub evicted_chunks: Counter,
    /// Their bytes.
    pub evicted_bytes: Counter,
    /// Chunks that were served without being kept, for want of space or because keeping them would not pay.
    pub bypassed_chunks: Counter,
    /// Bytes that were copied from another chunk with the same digest instead of being fetched.
    pub deduplicated_bytes: Counter,
}

/// A figure of the account, now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usage {
    /// Bytes on the disk, as far as they are charged, and on their way there.
    pub used: u64,
    /// Of these, bytes on their way.
    pub in_flight: u64,
    /// Bytes that pins keep.
    pub pinned: u64,
    /// Bytes of the file system that are free for us; `None` if it does not say.
    pub free: Option<u64>,
    /// Whether most of what comes is not kept, because it would only push out what is as good.
    pub is_thrashing: bool,
    /// Whether the disk has failed and is not used any more.
    pub is_disk_out: bool,
}

/// The order of eviction, and the segments that have been taken out of it to be evicted.
#[derive(Debug)]
struct Book {
    order: Order,
    leaving: HashSet<Segment>,
}

/// A mirror that shares the space.
#[derive(Debug)]
struct Member {
    mirror: Weak<Inner>,
    /// By itself, because it is looked at under the lock of the book: whoever holds a mirror there for a moment may be
    /// the last, and a mirror that is dropped locks the book.
    heat: Weak<Heat>,
}

/// The account of one cache directory.
#[derive(Debug)]
pub struct Space {
    root: PathBuf,
    /// Locked for a moment only.
    settings: RwLock<SpaceSettings>,
    used: AtomicU64,
    in_flight: AtomicU64,
    pinned: AtomicU64,
    book: Mutex<Book>,
    pub(super) clock: Arc<Clock>,
    members: RwLock<Vec<Member>>,
    pub(super) twins: Twins,
    /// Somebody wants space.
    pub(super) wanted: Notify,
    /// Bytes that a reservation had no room for.
    pub(super) lacking: AtomicU64,
    /// Space that is wanted beyond what the account says: the disk was full.
    pub(super) asked: AtomicU64,
    /// Some has been given back, or none could be.
    pub(super) freed: Notify,
    failures: Mutex<Failures>,
    is_disk_out: AtomicBool,
    stats: SpaceStats,
}

impl Space {
    /// The space below `root`.
    pub fn new(root: &Path, settings: SpaceSettings) -> Arc<Self> {
        let clock = Arc::<Clock>::default();
        let order = Order::new(settings.policy, settings.admission, Arc::clone(&clock));
        Arc::new(Self {
            root: root.to_owned(),
            settings: RwLock::new(settings),
            // The directory itself.
            used: AtomicU64::new(4096),
            in_flight: AtomicU64::new(0),
            pinned: AtomicU64::new(0),
            book: Mutex::new(Book { order, leaving: HashSet::new() }),
            clock,
            members: RwLock::default(),
            twins: Twins::default(),
            wanted: Notify::new(),
            lacking: AtomicU64::new(0),
            asked: AtomicU64::new(0),
            freed: Notify::new(),
            failures: Mutex::default(),
            is_disk_out: AtomicBool::new(false),
            stats: SpaceStats::default(),
        })
    }

    /// Where it is.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// What was set.
    pub fn settings(&self) -> SpaceSettings {
        *self.settings.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets another limit and another reserve, and has evicted what is too much then; or changes nothing. Blocks.
    pub fn resize(&self, limit: Option<u64>, reserve: u64) -> Result<(), ResizeError> {
        let (before, members) = (self.settings(), self.members());
        let wanted = SpaceSettings { limit, reserve, ..before };
        let fixed: u64 = members.iter().map(|member| member.fixed_bytes()).sum();
        let kept = fixed + self.pinned.load(Ordering::Acquire) + wanted.headroom();
        if let Some(limit) = limit.filter(|limit| *limit <= kept) {
            return Err(ResizeError::TooSmall { limit, kept });
        }
        // Nobody has asked yet whether the file system gives anything back.
        if wanted.evicts() && !before.evicts() {
            members.iter().try_for_each(|member| member.store.try_punching()).map_err(ResizeError::CannotPunch)?;
        }
        *self.settings.write().unwrap_or_else(PoisonError::into_inner) = wanted;
        self.wanted.notify_one();
        Ok(())
    }

    /// What happened so far.
    pub const fn stats(&self) -> &SpaceStats {
        &self.stats
    }

    /// How the account stands. Asks the file system.
    pub fn usage(&self) -> Usage {
        Usage {
            used: self.used.load(Ordering::Relaxed),
            in_flight: self.in_flight.load(Ordering::Relaxed),
            pinned: self.pinned.load(Ordering::Relaxed),
            free: self.free_on_disk(),
            is_thrashing: self.book().order.counters().thrashing,
            is_disk_out: self.is_disk_out(),
        }
    }

    /// Never held across an await; see the head of this file for the order of locks.
    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Gives a new member its number.
    pub(super) fn join(&self, member: impl FnOnce(u32) -> Arc<Inner>) -> Arc<Inner> {
        let mut members = self.members.write().unwrap_or_else(PoisonError::into_inner);
        let number = u32::try_from(members.len()).expect("fewer images than 2^32");
        let inner = member(number);
        members.push(Member { mirror: Arc::downgrade(&inner), heat: Arc::downgrade(inner.segments.heat()) });
        inner
    }

    /// The member with this number, if it is still there.
    pub(super) fn member(&self, number: u32) -> Option<Arc<Inner>> {
        let members = self.members.read().unwrap_or_else(PoisonError::into_inner);
        members.get(usize::try_from(number).ok()?)?.mirror.upgrade()
    }

    /// All members that are still there.
    pub(super) fn members(&self) -> Vec<Arc<Inner>> {
        let members = self.members.read().unwrap_or_else(PoisonError::into_inner);
        members.iter().filter_map(|member| member.mirror.upgrade()).collect()
    }

    /// The most that may be used.
    pub(super) fn limit(&self) -> u64 {
        self.settings().limit.unwrap_or(u64::MAX)
    }

    fn headroom(&self) -> u64 {
        self.settings().headroom()
    }

    /// Bytes that have to be given back for the headroom, the reserve, and what was asked for.
    pub(super) fn shortage(&self) -> u64 {
        let used = self.used.load(Ordering::Relaxed);
        let free = self.headroom().max(self.lacking.load(Ordering::Relaxed));
        let over = used.saturating_add(free).saturating_sub(self.limit());
        over.max(self.asked.load(Ordering::Relaxed)).max(self.lack_of_reserve(free))
    }

    /// Bytes by which less is free than the reserve and `more`.
    fn lack_of_reserve(&self, more: u64) -> u64 {
        let reserve = self.settings().reserve;
        if reserve == 0 {
            return 0;
        }
        // A file system that does not say how much is free will say when it is full.
        let free = self.free_on_disk().unwrap_or(u64::MAX);
        reserve.saturating_add(more).saturating_sub(free)
    }

    fn free_on_disk(&self) -> Option<u64> {
        let figures = rustix::fs::statvfs(&self.root).ok()?;
        Some(figures.f_bavail.saturating_mul(figures.f_frsize))
    }

    /// Whether so many bytes fit beside all else, and what is to be kept free is left free.
    pub(super) fn has_room(&self, bytes: u64) -> bool {
        let used = self.used.load(Ordering::Relaxed).saturating_add(bytes);
        let settings = self.settings();
        let fits = settings.limit.is_none_or(|limit| used.saturating_add(settings.plenty()) <= limit);
        fits && !self.is_disk_out() && self.lack_of_reserve(bytes.saturating_add(settings.plenty())) == 0
    }

    /// Reserves space at once, or not at all.
    fn try_reserve(self: &Arc<Self>, bytes: u64) -> Option<Reservation> {
        let fits = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= self.limit());
        let before = self.used.fetch_update(Ordering::AcqRel, Ordering::Relaxed, fits).ok()?;
        self.in_flight.fetch_add(bytes, Ordering::Relaxed);
        let reservation = Reservation { space: Arc::clone(self), bytes };
        // The limit may have become smaller since.
        if self.limit().saturating_sub(before + bytes) < self.headroom() / 2 {
            self.wanted.notify_one();
        }
        let in_flight = self.in_flight.load(Ordering::Relaxed);
        (self.lack_of_reserve(in_flight) == 0).then_some(reservation)
    }

    /// Reserves space for bytes that are being fetched. `None`: they are to be served without being kept.
    pub(super) async fn reserve(self: &Arc<Self>, bytes: u64) -> Option<Reservation> {
        if self.is_disk_out() {
            return None;
        }
        let deadline = Instant::now() + PATIENCE;
        loop {
            let freed = self.freed.notified();
            let evicted = self.stats.evicted_bytes.value();
            if let Some(reservation) = self.try_reserve(bytes) {
                return Some(reservation);
            }
            self.lacking.fetch_max(bytes, Ordering::AcqRel);
            self.wanted.notify_one();
            // Others may have taken what was given back. If nothing was, asking again does not help.
            let in_time = timeout_at(deadline, freed).await.is_ok();
            if !in_time || self.stats.evicted_bytes.value() == evicted {
                return self.try_reserve(bytes);
            }
        }
    }

    /// Has the disk given back so many bytes, after it said that it was full.
    pub(super) async fn ask(&self, bytes: u64) {
        let freed = self.freed.notified();
        self.asked.fetch_max(bytes, Ordering::AcqRel);
        self.wanted.notify_one();
        // Whether it helped is seen by the next write.
        let _ = timeout(PATIENCE * 10, freed).await;
    }

    /// Charges what is there already, whatever the limit.
    pub(super) fn charge(&self, bytes: u64) {
        self.used.fetch_add(bytes, Ordering::AcqRel);
    }

    /// Gives back what was charged.
    pub(super) fn discharge(&self, bytes: u64) {
        self.used.fetch_sub(bytes, Ordering::AcqRel);
    }

    /// Charges a file beside the caches, unless there is no room for it now.
    pub fn take(&self, bytes: u64) -> bool {
        let fits = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= self.limit());
        self.used.fetch_update(Ordering::AcqRel, Ordering::Relaxed, fits).is_ok()
    }

    /// Charges such a file that is there already.
    pub fn take_anyway(&self, bytes: u64) {
        self.charge(bytes);
    }

    /// Takes that back.
    pub fn give_back(&self, bytes: u64) {
        self.discharge(bytes);
    }

    /// Bytes that chunks can take: the limit without maps, manifests and headroom.
    pub(super) fn most_kept(&self) -> u64 {
        let fixed: u64 = self.members().iter().map(|member| member.fixed_bytes()).sum();
        self.limit().saturating_sub(fixed + self.headroom())
    }

    /// Changes what pins keep, unless that would be more than there can be: then gives the sum that does not fit.
    pub(super) fn pin(&self, before: u64, after: u64) -> Result<(), u64> {
        let most = self.most_kept();
        let change = |pinned: u64| {
            let sum = pinned - before + after;
            (sum <= most || after <= before).then_some(sum)
        };
        self.pinned.fetch_update(Ordering::AcqRel, Ordering::Relaxed, change).map(drop).map_err(|_| most)
    }

    /// Changes what pins keep, whatever that comes to.
    pub(super) fn pin_anyway(&self, before: u64, after: u64) {
        self.pinned.fetch_add(after, Ordering::AcqRel);
        self.pinned.fetch_sub(before, Ordering::AcqRel);
    }

    /// The word of a segment, for the order of eviction.
    fn word_of(&self, segment: Segment) -> Word {
        let members = self.members.read().unwrap_or_else(PoisonError::into_inner);
        let heat = usize::try_from(segment.image).ok().and_then(|image| members.get(image)?.heat.upgrade());
        heat.map_or_else(Word::default, |heat| heat.word(segment.number))
    }

    /// Whether a segment without a chunk on the disk shall have one; `chunk` is counted within it.
    pub(super) fn should_admit(&self, segment: Segment, chunk: u32) -> bool {
        let room = if self.has_plenty() { policy::Space::Free } else { policy::Space::Taken };
        self.book().order.should_admit(segment, chunk, room, &|segment| self.word_of(segment))
    }

    /// Whether something can come without anything having to go. What the evictor keeps free is not meant.
    fn has_plenty(&self) -> bool {
        let more = self.settings().plenty();
        self.used.load(Ordering::Relaxed).saturating_add(more) <= self.limit() && self.lack_of_reserve(more) == 0
    }

    /// A segment has its first chunk on the disk. This and the next are called under the lock of its flights.
    pub(super) fn admitted(&self, segment: Segment, word: Word) {
        self.book().order.admitted(segment, word);
    }

    /// A segment has no chunk on the disk any more.
    pub(super) fn emptied(&self, segment: Segment) {
        let mut book = self.book();
        if book.leaving.remove(&segment) { book.order.evicted(segment) } else { book.order.remove(segment) }
    }

    /// Segments that were here before a restart.
    pub(super) fn restore(&self, mut segments: Vec<(Segment, Word)>) {
        segments.sort_unstable_by_key(|(_, word)| word.time());
        let mut book = self.book();
        segments.into_iter().for_each(|(segment, word)| book.order.restore(segment, word));
    }

    /// The next segment to be evicted, which is out of the order until it is empty or put back.
    pub(super) fn victim(&self) -> Option<Segment> {
        let mut book = self.book();
        let segment = book.order.victim(&|segment| self.word_of(segment))?;
        book.leaving.insert(segment);
        Some(segment)
    }

    /// A segment could not be evicted, or not all of it. Nothing happens if it is empty.
    pub(super) fn put_back(&self, segment: Segment) {
        let mut book = self.book();
        if book.leaving.remove(&segment) {
            book.order.put_back(segment);
        }
    }

    /// Whether the disk has failed for good.
    pub(super) fn is_disk_out(&self) -> bool {
        self.is_disk_out.load(Ordering::Acquire)
    }

    fn failures(&self) -> MutexGuard<'_, Failures> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The disk did what it should: it gave bytes, or made them durable. That the page cache took some says nothing.
    pub(super) fn disk_worked(&self) {
        self.failures().count = 0;
    }

    /// The disk failed. A full one has not.
    pub(super) fn disk_failed(&self, error: &std::io::Error) {
        if is_full(error) || !self.failures().add(Instant::now()) {
            return;
        }
        if !self.is_disk_out.swap(true, Ordering::AcqRel) {
            let path = self.root.display();
            tracing::error!(
                %path, %error,
                "the cache disk fails again and again: it is not used any more, and clients are served from the upstream; replace it and restart"
            );
            self.members().iter().for_each(|member| member.abandon_disk());
        }
    }
}

/// Whether a disk has no room, which is no failure of it.
pub(super) fn is_full(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
}

/// Failures of the disk since it worked last.
#[derive(Debug, Default)]
struct Failures {
    count: u32,
    last: Option<Instant>,
}

impl Failures {
    /// Notes a failure; gives whether they are too many. One place that cannot be read fails many chunks at once, and
    /// counts as one.
    fn add(&mut self, now: Instant) -> bool {
        if self.count == 0 || self.last.is_none_or(|last| now.saturating_duration_since(last) >= FAILURES_APART) {
            self.count += 1;
            self.last = Some(now);
        }
        self.count >= DISK_FAILURES
    }
}

/// Space for bytes on their way to the disk. What is not kept is given back when this is dropped.
#[derive(Debug)]
pub(super) struct Reservation {
    space: Arc<Space>,
    bytes: u64,
}

impl Reservation {
    /// So many bytes have arrived on the disk and are charged from now on.
    pub(super) fn keep(&mut self, bytes: u64) {
        let bytes = bytes.min(self.bytes);
        self.bytes -= bytes;
        self.space.in_flight.fetch_sub(bytes, Ordering::Relaxed);
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.space.in_flight.fetch_sub(self.bytes, Ordering::Relaxed);
        self.space.discharge(self.bytes);
    }
}
