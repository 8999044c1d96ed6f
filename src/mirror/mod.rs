//! A mirror: an image that starts empty and is filled from the tier below, chunk by chunk, as clients ask.
//!
//! | file | holds |
//! | --- | --- |
//! | this one | [`Mirror`]: opening, settings, figures |
//! | `read` | reads, and what they claim |
//! | `chunks` | what is known of each chunk; the table of states |
//! | `cause` | why a chunk is fetched |
//! | `flight` | one fetch for all who want a chunk |
//! | `fetch` | from a claimed chunk to one that has arrived: joining, fetching, checking |
//! | `landing` | from there to a stored one, or one that is let go of |
//! | [`ahead`] | fetching what nobody waits for |
//! | `offer` | taking what came without being asked for |
//! | `origins` | why each chunk came, and whether it was read |
//! | `arrival` | what came over, cut into chunks |
//! | `truth` | what the bytes should be: the manifest |
//! | `chart` | what the upstream says is zero, where there is no manifest |
//! | `store` | the directory: `data`, `map`, `lock`, `heat` |
//! | `map` | the form of the `map` file, and its crash rule |
//! | `flusher` | making stored chunks durable, and only then marking them |
//! | `space` | the disk space that all mirrors of a cache directory share |
//! | `segments` | the unit in which it is given back: charges, heat, holds |
//! | `policy` | which segments go first, and which never come |
//! | `evict` | giving space back |
//! | `twins` | chunks with the same bytes, in one image or several |
//! | `pins` | what is never evicted |
//! | `here` | how much of some ranges is here, and whether all of them could be |
//! | `cells` | a picture of what is here |
//! | `scrub` | reading all that is here again, and mending it |
//!
//! Order of events for a chunk: its bytes arrive, are answered to all who wait, are written to `data`, are made
//! durable in a group, are marked in `map`. Whatever stops in between, the map names no chunk that is not there.
//!
//! Owns: the cache of one image. Does not own: where the bytes come from (any [`Export`] below) and what is to be
//! fetched ahead of demand.

pub mod ahead;
mod arrival;
mod cause;
mod cells;
mod chart;
mod chunks;
mod evict;
mod fetch;
mod flight;
mod flusher;
mod here;
mod landing;
pub mod map;
mod offer;
mod origins;
pub mod pins;
pub mod policy;
mod read;
mod scrub;
mod segments;
pub mod space;
mod store;
#[cfg(test)]
mod tests;
mod truth;
mod twins;

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock};
use std::time::Duration;

use bytes::BytesMut;

use crate::error::Result;
use crate::export::{Context, Export, Facts, FileRange, ImageId, LocalFuture, NodeId, Piece, SharedExport, TryRead};
use crate::nbd::Extent;
use crate::ranges::ByteRange;
use crate::telemetry::{Counter, Seldom, ShardedCounter};
use ahead::Observer;
pub use cause::Cause;
pub use cells::Cells;
use chart::Chart;
use chunks::{Chunk, Geometry, State, States};
use fetch::Queues;
use flight::Flights;
use flusher::Pending;
pub use here::{Here, NeverFits};
pub use map::{CHUNK_SIZES, Header};
pub use offer::Offered;
use origins::Origins;
pub use origins::Tally;
use pins::Pins;
pub use pins::{PinError, Pinned};
use policy::{Heat, Segment};
pub use scrub::{Findings, Scrub};
use segments::Segments;
pub use segments::cost_of;
pub use space::{ResizeError, Space, SpaceSettings, Usage};
use store::Store;
pub use store::{Cache, CacheError};
pub use truth::{ManifestError, Truth};
use twins::Place;

/// The chunk size of new caches. A recorded boot of Debian 12 fetches 1.21 times what it reads with it; see
/// `docs/decisions` for other sizes.
pub const DEFAULT_CHUNK_SIZE: u32 = 64 << 10;

/// How long a question for extents waits for the upstream before it is answered from what is known here.
const EXTENTS_PATIENCE: Duration = Duration::from_secs(2);
/// The troubles of the disk, and those of the upstream, are told at most this often.
const WARNINGS: Duration = Duration::from_secs(10);
/// How long the end of a mirror waits for what is on its way.
pub const LAST_FETCHES: Duration = Duration::from_secs(3);

/// What an operator may set.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Bytes of a chunk of a new cache; an old one is refused if it has another. Unset: the default, or what it has.
    pub chunk_size: Option<u32>,
    /// How long a read waits for what is not here before it fails.
    pub patience: Duration,
    /// Who is told of the requests that clients wait for.
    pub observer: Option<Arc<dyn Observer>>,
}

impl Default for Settings {
    /// Under the 30 seconds after which clients commonly give up.
    fn default() -> Self {
        Self { chunk_size: None, patience: Duration::from_secs(25), observer: None }
    }
}

/// What happened in a mirror.
#[derive(Debug, Default)]
pub struct Stats {
    /// Parts of reads that were answered from here, one for each chunk; zeroes are not counted.
    pub hits: ShardedCounter,
    /// Their bytes.
    pub hit_bytes: ShardedCounter,
    /// Parts of reads for which the upstream was asked, or somebody was waiting for it already.
    pub misses: Counter,
    /// Their bytes.
    pub miss_bytes: Counter,
    /// Of the misses, those for which a fetch was under way already, so that there was none for them.
    pub joins: Counter,
    /// Chunks that were evicted.
    pub evicted_chunks: Counter,
    /// Bytes that another chunk here had, and that were not fetched.
    pub deduplicated_bytes: Counter,
    /// Chunks in the cache whose bytes were not what they should be.
    pub damaged_chunks: Counter,
    /// Replies of the upstream that were not the bytes of the image.
    pub wrong_replies: Counter,
    /// Pages of the map that could not be read at the start.
    pub damaged_pages: Counter,
    /// Chunks that were answered but could not be stored.
    pub unstored_chunks: Counter,
}

/// How much of a mirror is here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Share {
    /// Bytes of the image.
    pub size: u64,
    /// Bytes of resident chunks, durable ones only.
    pub resident: u64,
    /// Bytes known to be zero.
    pub zero: u64,
    /// Bytes of pinned ranges.
    pub pinned: u64,
}

/// A mirror of the export below it. Cheap to clone; all clones are one mirror.
#[derive(Clone)]
pub struct Mirror(Arc<Inner>);

struct Inner {
    name: String,
    lower: SharedExport,
    header: Header,
    geometry: Geometry,
    states: States,
    origins: Origins,
    observer: Option<Arc<dyn Observer>>,
    flights: Arc<Flights>,
    queues: Queues,
    /// Who is asked before the tier below, for now.
    preferred: RwLock<Option<SharedExport>>,
    chart: Chart,
    pending: Pending,
    store: Store,
    space: Arc<Space>,
    /// The number of this mirror in its space.
    number: u32,
    /// Bytes of the disk that are taken whatever is in the cache.
    fixed: u64,
    /// And bytes of the manifest.
    manifest: AtomicU64,
    segments: Segments,
    /// Chunks that have left but whose bytes somebody still sends.
    lingering: Mutex<Vec<Chunk>>,
    pins: Pins,
    truth: OnceLock<Truth>,
    stats: Stats,
    disk_warnings: Seldom,
    fetch_warnings: Seldom,
    /// How long a read waits for what is not here.
    patience: Duration,
}

impl fmt::Debug for Mirror {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mirror").field("name", &self.0.name).field("header", &self.0.header).finish_non_exhaustive()
    }
}

impl Mirror {
    /// The mirror `name` of `lower`, in `cache`, which is refused if it was made for another image. `truth` is the
    /// manifest, if it has been fetched; else the one of the cache is used. What is there already is charged to `space`,
    /// also when that is more than the limit: see [`Space::make_room`]. Blocks.
    pub fn open(
        name: impl Into<String>,
        cache: Cache,
        lower: SharedExport,
        truth: Option<Truth>,
        space: &Arc<Space>,
        settings: &Settings,
    ) -> Result<Self, CacheError> {
        let chunk_size = settings.chunk_size;
        let facts = lower.facts();
        let name = name.into();
        let truth = truth.or_else(|| cache.manifest(&name));
        let header = match cache.header() {
            Some(header) => {
                check(&cache, header, &facts, chunk_size)?;
                *header
            }
            None => Header {
                image_size: facts.size,
                chunk_size: chunk_size.or_else(|| truth.as_ref().map(Truth::chunk_size)).unwrap_or(DEFAULT_CHUNK_SIZE),
                node: NodeId::random(),
                identity: truth.as_ref().map(Truth::id).or(facts.identity),
            },
        };
        let geometry = header.geometry();
        let (store, states, loaded) = Store::attach(cache, &header)?;
        loaded.tell(&name);
        if space.settings().evicts() {
            store.try_punching()?;
        }
        let (pins, pins_error) = Pins::load(store.directory(), geometry.size());
        if let Some(error) = pins_error {
            tracing::warn!(image = name, error, "cannot read the pins: nothing is pinned");
        }
        let now = space.clock.now();
        let segments = Segments::new(geometry, |count| {
            let saved = store.load_heat().and_then(|bytes| Heat::decode(&bytes, count, now));
            saved.unwrap_or_else(|| Heat::new(count))
        });
        let inner = space.join(|number| {
            Arc::new(Inner {
                name,
                lower,
                header,
                geometry,
                states,
                origins: Origins::new(geometry),
                observer: settings.observer.clone(),
                flights: Arc::default(),
                queues: Queues::new(),
                preferred: RwLock::default(),
                chart: Chart::new(geometry),
                pending: Pending::new(space.limit()),
                fixed: store::fixed_bytes(geometry, segments.count_all()),
                manifest: AtomicU64::new(0),
                store,
                space: Arc::clone(space),
                number,
                segments,
                lingering: Mutex::default(),
                pins,
                truth: OnceLock::new(),
                stats: Stats::default(),
                disk_warnings: Seldom::new(WARNINGS),
                fetch_warnings: Seldom::new(WARNINGS),
                patience: settings.patience,
            })
        });
        inner.stats.damaged_pages.add(loaded.damaged_pages);
        inner.take_stock();
        let mirror = Self(inner);
        if let Some(truth) = truth
            && let Err(error) = mirror.adopt(truth)
        {
            tracing::warn!(image = mirror.0.name, %error, "the manifest cannot be used: chunks are not verified");
        }
        Ok(mirror)
    }

    /// From now on, holds everything against this manifest: what is here too, when it is used next.
    pub fn adopt(&self, truth: Truth) -> Result<(), ManifestError> {
        // It is there, whether it can be used or not.
        let length = truth.file_length();
        self.0.space.charge(length);
        self.0.space.discharge(self.0.manifest.swap(length, Ordering::Relaxed));
        truth.check_geometry(self.0.geometry)?;
        self.0.adopt(truth);
        Ok(())
    }

    /// Makes stored chunks durable and marks them, for ever. One task of a worker does this.
    pub async fn run_flusher(self) {
        self.0.run_flusher().await;
    }

    /// Makes everything durable that is stored and marks it, also what is on its way and arrives soon.
    pub async fn settle(&self) {
        self.settle_within(LAST_FETCHES).await;
    }

    /// As [`Self::settle`], waiting for what is on its way for so long. What comes later is fetched again some day.
    pub async fn settle_within(&self, fetches: Duration) {
        // First of all what is here, should the rest take longer than we are given.
        self.0.flush_group().await;
        if tokio::time::timeout(fetches, self.0.stored()).await.is_err() {
            tracing::debug!(image = self.0.name, "not waiting for an upstream that does not answer");
        }
        self.0.flush_group().await;
        self.0.save_heat().await;
    }

    /// Lets another process have the directory. For when this is settled and nothing asks it any more, but for what
    /// keeps it in memory.
    pub fn release(&self) {
        self.0.store.release();
    }

    /// Names this cache.
    pub fn node(&self) -> NodeId {
        self.0.header.node
    }

    /// What the image holds, if that is known: what the cache was made for or its manifest says, else what the tier
    /// below says now.
    pub fn image(&self) -> Option<ImageId> {
        self.0.known_identity().or_else(|| self.0.lower.facts().identity)
    }

    /// Whether there is a manifest, so that everything is verified.
    pub fn has_manifest(&self) -> bool {
        self.0.truth.get().is_some()
    }

    /// Bytes of the image.
    pub fn size(&self) -> u64 {
        self.0.geometry.size()
    }

    /// Bytes of a chunk.
    pub fn chunk_size(&self) -> u64 {
        self.0.geometry.chunk_size()
    }

    /// Where the cache is.
    pub fn directory(&self) -> &Path {
        self.0.store.directory()
    }

    /// What is pinned.
    pub fn pins(&self) -> Vec<ByteRange> {
        self.0.pins.ranges()
    }

    /// What happened so far.
    pub fn stats(&self) -> &Stats {
        &self.0.stats
    }

    /// What came of what was fetched because of `cause`.
    pub fn tally(&self, cause: Cause) -> &Tally {
        self.0.origins.tally(cause)
    }

    /// Whether so many bytes fit into the cache beside all else, without evicting anything.
    pub fn has_room(&self, bytes: u64) -> bool {
        self.0.space.has_room(bytes)
    }

    /// How much is here now. Looks at every chunk.
    pub fn share(&self) -> Share {
        let Inner { geometry, states, .. } = &*self.0;
        let mut share = Share { size: geometry.size(), ..Share::default() };
        for chunk in geometry.chunks(ByteRange::between(0, geometry.size())) {
            let length = geometry.range(chunk).length();
            match states.get(chunk) {
                State::Resident | State::Unverified if self.0.origins.is_marked(chunk) => share.resident += length,
                State::Resident | State::Unverified => {}
                State::Zero => share.zero += length,
                State::Absent | State::Leaving | State::Volatile => {}
            }
        }
        share.pinned = self.0.pins.ranges().iter().map(|range| range.length()).sum();
        share
    }
}

fn check(cache: &Cache, header: &Header, facts: &Facts, chunk_size: Option<u32>) -> Result<(), CacheError> {
    let path = cache.directory().to_owned();
    if header.image_size != facts.size {
        return Err(CacheError::OtherSize { path, cached: header.image_size, upstream: facts.size });
    }
    if let (Some(cached), Some(upstream)) = (header.identity, facts.identity)
        && cached != upstream
    {
        return Err(CacheError::OtherIdentity { path, cached, upstream });
    }
    if let Some(wanted) = chunk_size
        && wanted != header.chunk_size
    {
        return Err(CacheError::OtherChunkSize { path, cached: header.chunk_size, wanted });
    }
    Ok(())
}

impl Inner {
    fn known_identity(&self) -> Option<ImageId> {
        self.truth.get().map(Truth::id).or(self.header.identity)
    }

    /// Charges what was found in the cache, and puts it into the order of eviction.
    fn take_stock(&self) {
        let mut bytes = self.fixed;
        let all = ByteRange::between(0, self.geometry.size());
        let here = self.geometry.chunks(all).filter(|chunk| self.states.get(*chunk) == State::Unverified);
        let mut segments = BTreeSet::new();
        for chunk in here {
            self.segments.charge(chunk);
            bytes += self.segments.cost(chunk);
            segments.insert(self.segments.of(chunk));
        }
        self.space.charge(bytes);
        let word = |number| self.segments.heat().word(number);
        self.space.restore(segments.into_iter().map(|number| (self.segment(number), word(number))).collect());
        self.restore_pins();
    }

    fn adopt(&self, truth: Truth) {
        let all = ByteRange::between(0, self.geometry.size());
        let _table = self.flights.lock();
        // What is on its way, or is being made durable, was not held against it.
        self.pending.distrust();
        for chunk in self.geometry.chunks(all) {
            self.states.change(chunk, State::Volatile, State::Absent);
            self.states.change(chunk, State::Resident, State::Unverified);
            if truth.is_zero(self.geometry, chunk) {
                // The manifest tells of it after a crash too.
                self.become_zero(chunk);
                continue;
            }
            self.states.change(chunk, State::Zero, State::Absent);
            if self.states.get(chunk) == State::Unverified
                && let Some(key) = truth.key(self.geometry, chunk)
            {
                self.space.twins.add(key, self.place(chunk));
            }
        }
        // Another one cannot have come in between: mirrors are given one manifest.
        let _ = self.truth.set(truth);
    }

    /// Marks a chunk that is known to be zero, as [`become_zero`](Self::become_zero) does; the map is yet to tell of it.
    fn mark_zero(&self, chunk: Chunk) -> bool {
        if self.states.get(chunk) == State::Absent {
            // First: nobody is to count it before the map tells of it.
            self.origins.set_marked(chunk, false);
        }
        self.become_zero(chunk)
    }

    /// Turns a chunk that is known to be zero from absent to zero. What has bytes on the disk stays absent, and can be
    /// evicted. To be called under the lock of the flights.
    fn become_zero(&self, chunk: Chunk) -> bool {
        !self.segments.is_charged(chunk) && self.states.change(chunk, State::Absent, State::Zero)
    }

    const fn segment(&self, number: u32) -> Segment {
        Segment { image: self.number, number }
    }

    const fn place(&self, chunk: Chunk) -> Place {
        Place { image: self.number, chunk: chunk.number() }
    }

    fn fixed_bytes(&self) -> u64 {
        self.fixed + self.manifest.load(Ordering::Relaxed)
    }

    fn lingering(&self) -> MutexGuard<'_, Vec<Chunk>> {
        self.lingering.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that the disk of the cache has failed, and warns, seldom.
    fn disk_failed(&self, what: &str, error: &io::Error) {
        self.warn_of_disk(what, error);
        self.space.disk_failed(error);
    }

    /// Forgets all that is on the disk, which has failed for good. Only in memory: what the map says stays true.
    fn abandon_disk(&self) {
        let _table = self.flights.lock();
        self.pending.distrust();
        for chunk in self.geometry.chunks(ByteRange::between(0, self.geometry.size())) {
            self.states.change(chunk, State::Resident, State::Absent);
            self.states.change(chunk, State::Unverified, State::Absent);
            self.states.change(chunk, State::Volatile, State::Absent);
        }
    }
}

impl Drop for Inner {
    /// Leaves the space: nothing of this mirror is charged any more, and its bytes serve no other image.
    fn drop(&mut self) {
        let mut bytes = self.fixed_bytes();
        for number in 0..self.segments.count_all() {
            if self.segments.count(number) > 0 {
                self.space.emptied(self.segment(number));
                let charged = self.segments.chunks(number).filter(|chunk| self.segments.is_charged(*chunk));
                bytes += charged.map(|chunk| self.segments.cost(chunk)).sum::<u64>();
            }
        }
        self.space.discharge(bytes);
        self.let_go_of_pins();
        self.space.twins.remove_image(self.number);
    }
}

impl Export for Mirror {
    fn facts(&self) -> Facts {
        let lower = self.0.lower.facts();
        let mut facts = Facts::read_only(self.0.geometry.size(), format!("mirror of {}", lower.description));
        facts.contexts.push(Context::Residency);
        facts.identity = self.image();
        facts.path = std::iter::once(self.node()).chain(lower.path).collect();
        facts.origin = lower.origin;
        facts
    }

    fn try_read(&self, range: ByteRange, output: &mut BytesMut) -> TryRead {
        self.0.try_read_here(range, output)
    }

    fn in_file(&self, range: ByteRange) -> Option<FileRange> {
        self.0.in_file(range)
    }

    fn is_in_file(&self, range: ByteRange) -> bool {
        self.0.is_in_file(range)
    }

    fn manifest(&self) -> Option<SharedExport> {
        self.0.truth.get().map(Truth::export)
    }

    fn read(&self, range: ByteRange) -> LocalFuture<'_, Result<Vec<Piece>>> {
        Box::pin(self.0.read_pieces(range))
    }

    fn cache(&self, range: ByteRange) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.0.fill(range))
    }

    fn extents(&self, range: ByteRange, context: Context, limit: usize) -> LocalFuture<'_, Result<Vec<Extent>>> {
        Box::pin(async move {
            match context {
                Context::Allocation => Ok(self.0.allocation(range, limit).await),
                Context::Residency => Ok(self.0.residency(range, limit)),
            }
        })
    }
}
