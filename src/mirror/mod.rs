//! A mirror: an image that starts empty and is filled from the tier below, chunk by chunk, as clients ask.
//!
//! | file | holds |
//! | --- | --- |
//! | this one | [`Mirror`]: reads, and what they claim |
//! | `chunks` | what is known of each chunk; the table of states |
//! | `flight` | one fetch for all who want a chunk |
//! | `fetch` | from a claimed chunk to a stored one: joining, fetching, checking, storing |
//! | `chart` | what the upstream says is zero |
//! | `store` | the directory: `data`, `map`, `lock` |
//! | `map` | the form of the `map` file, and its crash rule |
//! | `flusher` | making stored chunks durable, and only then marking them |
//!
//! Order of events for a chunk: its bytes arrive, are answered to all who wait, are written to `data`, are made
//! durable in a group, are marked in `map`. Whatever stops in between, the map names no chunk that is not there.
//!
//! Owns: the cache of one image. Does not own: where the bytes come from (any [`Export`] below) and what is to be
//! fetched ahead of demand.

mod chart;
mod chunks;
mod fetch;
mod flight;
mod flusher;
pub mod map;
pub mod policy;
mod store;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::time::Instant;

use crate::disk::Inline;
use crate::error::{Error, ErrorKind, Result};
use crate::export::{
    Context, Export, Facts, FileRange, ImageId, LocalFuture, NodeId, Piece, Residency, SharedExport, TryRead,
    push_extent, push_piece,
};
use crate::nbd::Extent;
use crate::nbd::wire::Allocation;
use crate::ranges::ByteRange;
use crate::telemetry::{Counter, Seldom};
use crate::units::{KIB, MIB, to_usize};
use chart::Chart;
use chunks::{Chunk, Geometry, State, States, checksum};
use fetch::{Claims, Queues};
use flight::{ChunkData, Claim, Flight, Flights, Slice};
use flusher::Pending;
pub use map::{CHUNK_SIZES, Header};
use store::Store;
pub use store::{Cache, CacheError};

/// The chunk size of new caches. A recorded boot of Debian 12 fetches 1.21 times what it reads with it; see
/// `docs/decisions` for other sizes.
pub const DEFAULT_CHUNK_SIZE: u32 = 64 << 10;

/// What is prefetched together when a client asks for a whole range to be cached.
const CACHE_WINDOW: u64 = 8 * MIB;
/// Chunks that one answer to a question for extents looks at, at most.
const EXTENTS_CHUNKS: u64 = 128 << 10;
/// How long a question for extents waits for the upstream before it is answered from what is known here.
const EXTENTS_PATIENCE: Duration = Duration::from_secs(2);
/// Bytes that are checked for one read without letting others have their turn.
const CHECKED_INLINE: u64 = 256 * KIB;
/// The troubles of the disk, and those of the upstream, are told at most this often.
const WARNINGS: Duration = Duration::from_secs(10);
/// A chunk that cannot be read, is found right, and cannot be read again is given up after so many times.
const READS_OF_A_CHUNK: usize = 3;
/// How long the end of a mirror waits for what is on its way.
const LAST_FETCHES: Duration = Duration::from_secs(3);

/// What an operator may set.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Bytes of a chunk of a new cache; an old one is refused if it has another. Unset: the default, or what it has.
    pub chunk_size: Option<u32>,
    /// How long a read waits for what is not here before it fails.
    pub patience: Duration,
}

impl Default for Settings {
    /// Under the 30 seconds after which clients commonly give up.
    fn default() -> Self {
        Self { chunk_size: None, patience: Duration::from_secs(25) }
    }
}

/// What happened in a mirror.
#[derive(Debug, Default)]
pub struct Stats {
    /// Chunks in the cache whose bytes were not what they should be.
    pub damaged_chunks: Counter,
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
    flights: Arc<Flights>,
    queues: Queues,
    chart: Chart,
    pending: Pending,
    store: Store,
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
    /// The mirror `name` of `lower`, in `cache`, which is refused if it was made for another image. Blocks.
    pub fn open(
        name: impl Into<String>,
        cache: Cache,
        lower: SharedExport,
        settings: &Settings,
    ) -> Result<Self, CacheError> {
        let chunk_size = settings.chunk_size;
        let facts = lower.facts();
        let header = match cache.header() {
            Some(header) => {
                check(&cache, header, &facts, chunk_size)?;
                *header
            }
            None => Header {
                image_size: facts.size,
                chunk_size: chunk_size.unwrap_or(DEFAULT_CHUNK_SIZE),
                node: random_node(),
                identity: facts.identity,
            },
        };
        let name = name.into();
        let geometry = header.geometry();
        let (store, states, loaded) = Store::attach(cache, &header)?;
        if loaded.damaged_pages > 0 {
            let pages = loaded.damaged_pages;
            tracing::warn!(image = name, pages, "parts of the map are damaged: what they named is fetched again");
        }
        Ok(Self(Arc::new(Inner {
            name,
            lower,
            header,
            geometry,
            states,
            flights: Arc::default(),
            queues: Queues::new(),
            chart: Chart::new(geometry),
            pending: Pending::default(),
            store,
            stats: Stats::default(),
            disk_warnings: Seldom::new(WARNINGS),
            fetch_warnings: Seldom::new(WARNINGS),
            patience: settings.patience,
        })))
    }

    /// Makes stored chunks durable and marks them, for ever. One task of a worker does this.
    pub async fn run_flusher(self) {
        self.0.run_flusher().await;
    }

    /// Makes everything durable that is stored and marks it, also what is on its way and arrives soon.
    pub async fn settle(&self) {
        // First of all what is here, should the rest take longer than we are given.
        self.0.flush_group().await;
        if tokio::time::timeout(LAST_FETCHES, self.0.stored()).await.is_err() {
            tracing::debug!(image = self.0.name, "not waiting for an upstream that does not answer");
        }
        self.0.flush_group().await;
    }

    /// Names this cache.
    pub fn node(&self) -> NodeId {
        self.0.header.node
    }

    /// What the image holds: what the cache was made for, else what the tier below says now.
    pub fn image(&self) -> Option<ImageId> {
        self.0.header.identity.or_else(|| self.0.lower.facts().identity)
    }

    /// What happened so far.
    pub fn stats(&self) -> &Stats {
        &self.0.stats
    }

    /// How much is here now. Looks at every chunk.
    pub fn share(&self) -> Share {
        let Inner { geometry, states, .. } = &*self.0;
        let mut share = Share { size: geometry.size(), ..Share::default() };
        for chunk in geometry.chunks(ByteRange::between(0, geometry.size())) {
            let length = geometry.range(chunk).length();
            match states.get(chunk) {
                State::Resident | State::Unverified => share.resident += length,
                State::Zero => share.zero += length,
                State::Absent | State::Volatile => {}
            }
        }
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

fn random_node() -> NodeId {
    let mut id = [0; 16];
    let got = rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty());
    assert_eq!(got, Ok(16), "the kernel has randomness once the system is up");
    NodeId(id)
}

/// Where a part of a read comes from.
#[derive(Debug)]
enum Source {
    /// The data file, for one chunk or several.
    File,
    Zero,
    /// One chunk, by this flight.
    Flight(Arc<Flight>),
}

/// A part of a read, and the chunks it lies in.
#[derive(Debug)]
struct Part {
    range: ByteRange,
    source: Source,
}

impl Inner {
    /// Finds out where the bytes of `range` come from, and starts whatever has to be done for them.
    fn plan(self: &Arc<Self>, range: ByteRange) -> Vec<Part> {
        let mut parts: Vec<Part> = Vec::new();
        let mut claims = Claims::default();
        for chunk in self.geometry.chunks(range) {
            let part = self.geometry.range(chunk).intersect(range);
            let source = match self.states.get(chunk) {
                State::Resident => Source::File,
                State::Zero => Source::Zero,
                State::Absent | State::Volatile | State::Unverified => self.claim(chunk, &mut claims),
            };
            match (parts.last_mut(), &source) {
                (Some(Part { range, source: Source::File }), Source::File)
                | (Some(Part { range, source: Source::Zero }), Source::Zero) => {
                    *range = ByteRange::between(range.start(), part.end());
                }
                _ => parts.push(Part { range: part, source }),
            }
        }
        self.launch(claims);
        parts
    }

    /// Joins the flight of a chunk, or begins one.
    fn claim(&self, chunk: Chunk, claims: &mut Claims) -> Source {
        let mut table = self.flights.lock();
        if let Some(flight) = table.get(&chunk) {
            return Source::Flight(Arc::clone(flight));
        }
        let lane = match self.states.get(chunk) {
            State::Absent => &mut claims.fetch,
            State::Volatile | State::Unverified => &mut claims.verify,
            // It landed since we looked.
            State::Resident => return Source::File,
            State::Zero => return Source::Zero,
        };
        let claim = Claim::begin(&self.flights, &mut table, chunk, Instant::now() + self.patience);
        let flight = Arc::clone(&claim.flight);
        lane.push(claim);
        Source::Flight(flight)
    }

    async fn read_pieces(self: &Arc<Self>, range: ByteRange) -> Result<Vec<Piece>> {
        let mut pieces = Vec::new();
        // What the last flights brought, as long as it lies in one piece.
        let mut brought: Option<Slice> = None;
        for Part { range, source } in self.plan(range) {
            if let Source::Flight(flight) = &source
                && let ChunkData::Bytes(slice) = flight.wait().await?
            {
                let slice = self.cut(&slice, range);
                if !brought.as_mut().is_some_and(|brought| brought.join(&slice)) {
                    pieces.extend(brought.replace(slice).map(|slice| Piece::Data(slice.bytes())));
                }
                continue;
            }
            pieces.extend(brought.take().map(|slice| Piece::Data(slice.bytes())));
            match source {
                Source::File => self.read_file(range, &mut pieces).await?,
                Source::Zero | Source::Flight(_) => push_piece(&mut pieces, Piece::Hole(range.length())),
            }
        }
        pieces.extend(brought.map(|slice| Piece::Data(slice.bytes())));
        Ok(pieces)
    }

    /// The part `range` of the chunk that it lies in.
    fn cut(&self, chunk: &Slice, range: ByteRange) -> Slice {
        chunk.part(to_usize(range.start() % self.geometry.chunk_size()), to_usize(range.length()))
    }

    /// Reads resident chunks. What the disk does not give is checked chunk by chunk, and fetched again.
    async fn read_file(self: &Arc<Self>, range: ByteRange, pieces: &mut Vec<Piece>) -> Result<()> {
        if let Some(bytes) = self.read_resident(range).await {
            push_piece(pieces, Piece::Data(bytes));
            return Ok(());
        }
        for chunk in self.geometry.chunks(range) {
            let part = self.geometry.range(chunk).intersect(range);
            push_piece(pieces, self.read_chunk(chunk, part).await?);
        }
        Ok(())
    }

    /// `None`: some of the chunks are not resident, now at the latest.
    async fn read_resident(&self, range: ByteRange) -> Option<Bytes> {
        let length = to_usize(range.length());
        match self.store.data().read_exact_at(BytesMut::with_capacity(length), length, range.start()).await {
            // Still: a chunk that was found bad meanwhile may have been punched out before it was read.
            Ok(bytes) => self.all_are(range, State::Resident).then(|| bytes.freeze()),
            Err(error) => {
                self.warn_of_disk("cannot read the cache: fetching instead", &error);
                for chunk in self.geometry.chunks(range) {
                    self.states.change(chunk, State::Resident, State::Unverified);
                }
                None
            }
        }
    }

    /// Reads chunks that are here and have to be checked, if they are in the page cache. Whatever is wrong is left to
    /// the read that may wait.
    fn try_read_checked(&self, range: ByteRange, output: &mut BytesMut) -> TryRead {
        let is_here = |chunk| matches!(self.states.get(chunk), State::Resident | State::Volatile | State::Unverified);
        let whole = self.geometry.widened(range);
        if whole.length() > CHECKED_INLINE || !self.geometry.chunks(range).all(is_here) {
            return TryRead::Wait;
        }
        let start = output.len();
        if self.store.data().try_read_at(output, to_usize(whole.length()), whole.start()) == Inline::WouldBlock {
            return TryRead::Wait;
        }
        let mut rest = &output[start..];
        for chunk in self.geometry.chunks(range) {
            let (bytes, others) = rest.split_at(to_usize(self.geometry.range(chunk).length()));
            // Right is what has the checksum, whatever its state has become meanwhile.
            if checksum(bytes) != self.states.checksum(chunk) {
                output.truncate(start);
                return TryRead::Wait;
            }
            self.states.change(chunk, State::Unverified, State::Resident);
            rest = others;
        }
        let (from, length) = (to_usize(range.start() - whole.start()), to_usize(range.length()));
        output.copy_within(start + from..start + from + length, start);
        output.truncate(start + length);
        TryRead::Data
    }

    /// Reads a part of one chunk, whatever becomes of it meanwhile.
    async fn read_chunk(self: &Arc<Self>, chunk: Chunk, part: ByteRange) -> Result<Piece> {
        for _ in 0..READS_OF_A_CHUNK {
            let mut claims = Claims::default();
            let source = self.claim(chunk, &mut claims);
            self.launch(claims);
            match source {
                Source::Flight(flight) => {
                    return Ok(match flight.wait().await? {
                        ChunkData::Zero => Piece::Hole(part.length()),
                        ChunkData::Bytes(slice) => Piece::Data(self.cut(&slice, part).bytes()),
                    });
                }
                Source::Zero => return Ok(Piece::Hole(part.length())),
                Source::File => {
                    if let Some(bytes) = self.read_resident(part).await {
                        return Ok(Piece::Data(bytes));
                    }
                }
            }
        }
        Err(Error::new(ErrorKind::Io, format!("{}: the cache disk fails", self.name)))
    }

    /// Brings over what is absent in `range`.
    async fn fill(self: &Arc<Self>, range: ByteRange) -> Result<()> {
        for window in range.pieces(CACHE_WINDOW) {
            let (mut claims, mut flights) = (Claims::default(), Vec::new());
            for chunk in self.geometry.chunks(window) {
                if self.states.get(chunk) == State::Absent
                    && let Source::Flight(flight) = self.claim(chunk, &mut claims)
                {
                    flights.push(flight);
                }
            }
            self.launch(claims);
            for flight in flights {
                flight.wait().await?;
            }
        }
        Ok(())
    }

    /// Asks the upstream what of `range` is zero, unless that is known.
    async fn cover(&self, range: ByteRange, deadline: Instant) {
        let marked = |range| self.note_zeroes(range);
        self.chart.cover(range, deadline, &self.lower, (&self.states, &self.flights), marked).await;
    }

    async fn allocation(&self, range: ByteRange, limit: usize) -> Vec<Extent> {
        let range = self.describable(range);
        if self.geometry.chunks(range).any(|chunk| self.states.get(chunk) == State::Absent) {
            // Without the upstream's answer what is absent counts as data.
            self.cover(range, Instant::now() + EXTENTS_PATIENCE).await;
        }
        self.describe(range, limit, |state| match state {
            State::Zero => Allocation::all().bits(),
            _ => Allocation::empty().bits(),
        })
    }

    fn residency(&self, range: ByteRange, limit: usize) -> Vec<Extent> {
        self.describe(self.describable(range), limit, |state| match state {
            State::Resident | State::Unverified => Residency::RESIDENT.bits(),
            State::Zero => Residency::ZERO.bits(),
            State::Absent | State::Volatile => Residency::empty().bits(),
        })
    }

    /// As much of `range` as is looked at without keeping others waiting.
    fn describable(&self, range: ByteRange) -> ByteRange {
        let span = EXTENTS_CHUNKS * self.geometry.chunk_size();
        ByteRange::between(range.start(), range.end().min(range.start().saturating_add(span)))
    }

    fn describe(&self, range: ByteRange, limit: usize, status: impl Fn(State) -> u32) -> Vec<Extent> {
        let mut extents = Vec::new();
        for chunk in self.geometry.chunks(range) {
            let part = self.geometry.range(chunk).intersect(range);
            push_extent(&mut extents, part.length(), u64::from(status(self.states.get(chunk))));
            if extents.len() > limit {
                extents.truncate(limit);
                break;
            }
        }
        extents
    }

    fn all_are(&self, range: ByteRange, wanted: State) -> bool {
        self.geometry.chunks(range).all(|chunk| self.states.get(chunk) == wanted)
    }
}

impl Export for Mirror {
    fn facts(&self) -> Facts {
        let lower = self.0.lower.facts();
        let mut facts = Facts::read_only(self.0.geometry.size(), format!("mirror of {}", lower.description));
        facts.contexts.push(Context::Residency);
        facts.identity = self.0.header.identity.or(lower.identity);
        facts.path = std::iter::once(self.node()).chain(lower.path).collect();
        facts
    }

    fn try_read(&self, range: ByteRange, output: &mut BytesMut) -> TryRead {
        let Inner { store, .. } = &*self.0;
        if self.0.all_are(range, State::Resident) {
            let start = output.len();
            return match store.data().try_read_at(output, to_usize(range.length()), range.start()) {
                Inline::Done if self.0.all_are(range, State::Resident) => TryRead::Data,
                // One was found bad, and perhaps punched out, while it was read.
                Inline::Done => {
                    output.truncate(start);
                    TryRead::Wait
                }
                Inline::WouldBlock => TryRead::Wait,
            };
        }
        if self.0.all_are(range, State::Zero) { TryRead::Hole } else { self.0.try_read_checked(range, output) }
    }

    fn in_file(&self, range: ByteRange) -> Option<FileRange> {
        let file = self.0.store.data();
        (self.0.all_are(range, State::Resident) && file.is_in_memory(range)).then(|| FileRange {
            file: Arc::clone(file),
            range,
            hold: None,
        })
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
