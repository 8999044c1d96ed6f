//! Reads: where each part comes from, and what is claimed for it.
//!
//! Owns: the walk of a read over the states of its chunks. Does not own: how a claimed chunk is brought (`fetch`).

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use tokio::time::Instant;

use super::ahead::Ahead;
use super::chunks::{Chunk, State, checksum};
use super::fetch::Claims;
use super::flight::{ChunkData, Claim, Flight, Slice};
use super::{Cause, EXTENTS_PATIENCE, Inner};
use crate::disk::Inline;
use crate::error::{Error, ErrorKind, Result};
use crate::export::{FileRange, Piece, Residency, TryRead, push_extent, push_piece};
use crate::nbd::Extent;
use crate::nbd::wire::Allocation;
use crate::ranges::ByteRange;
use crate::units::{KIB, MIB, to_usize};

/// What is prefetched together when a client asks for a whole range to be cached.
const CACHE_WINDOW: u64 = 8 * MIB;
/// Chunks that one answer to a question for extents looks at, at most.
const EXTENTS_CHUNKS: u64 = 128 << 10;
/// Bytes that are checked for one read without letting others have their turn.
const CHECKED_INLINE: u64 = 256 * KIB;
/// A chunk that cannot be read, is found right, and cannot be read again is given up after so many times.
const READS_OF_A_CHUNK: usize = 3;
/// How many times as long as a read a fetch ahead of demand may take.
const AHEAD_PATIENCE: u32 = 4;

/// Where a part of a read comes from.
#[derive(Debug)]
pub(super) enum Source {
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
            let state = self.states.get(chunk);
            self.note_read(part, state);
            let source = match state {
                State::Resident => Source::File,
                State::Zero => Source::Zero,
                State::Absent | State::Leaving => self.claim_absent(chunk, &mut claims),
                State::Volatile | State::Unverified => self.claim(chunk, &mut claims, None),
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

    /// Counts a read of a part of a chunk in this state, and remembers it for the order of eviction.
    fn note_read(&self, part: ByteRange, state: State) {
        match state {
            State::Zero => return,
            State::Absent | State::Leaving => {
                self.stats.misses.add(1);
                self.stats.miss_bytes.add(part.length());
            }
            State::Resident | State::Volatile | State::Unverified => {
                self.stats.hits.add(1);
                self.stats.hit_bytes.add(part.length());
            }
        }
        self.origins.read_all(part);
        self.segments.touch(part, self.space.clock.now());
    }

    /// Counts what was read at once, all of it from here.
    fn note_hits(&self, range: ByteRange) {
        self.stats.hits.add(self.geometry.span(range));
        self.stats.hit_bytes.add(range.length());
        self.origins.read_all(range);
        self.segments.touch(range, self.space.clock.now());
    }

    /// As [`Self::claim`], for a client, and counts whether it had to be fetched for it.
    fn claim_absent(&self, chunk: Chunk, claims: &mut Claims) -> Source {
        let before = claims.count();
        let source = self.claim(chunk, claims, None);
        if matches!(source, Source::Flight(_)) && claims.count() == before {
            self.stats.joins.add(1);
        }
        source
    }

    /// Joins the flight of a chunk, or begins one: for a client that waits, or ahead of demand.
    pub(super) fn claim(&self, chunk: Chunk, claims: &mut Claims, ahead: Option<&Arc<Ahead>>) -> Source {
        let mut table = self.flights.lock();
        if let Some(flight) = table.get(&chunk) {
            if ahead.is_none() {
                self.want(chunk, flight);
            }
            return Source::Flight(Arc::clone(flight));
        }
        let lane = match self.states.get(chunk) {
            State::Absent | State::Leaving => &mut claims.fetch,
            State::Volatile | State::Unverified => &mut claims.verify,
            // It landed since we looked.
            State::Resident => return Source::File,
            State::Zero => return Source::Zero,
        };
        // What nobody waits for may have to wait for its turn.
        let patience = if ahead.is_some() { self.patience * AHEAD_PATIENCE } else { self.patience };
        let claim = Claim::begin(&self.flights, &mut table, chunk, Instant::now() + patience, ahead);
        let flight = Arc::clone(&claim.flight);
        lane.push(claim);
        Source::Flight(flight)
    }

    /// A client wants a chunk that is under way. To be called under the lock of the flights.
    fn want(&self, chunk: Chunk, flight: &Flight) {
        if flight.cause() == Cause::Demand {
            return;
        }
        if !flight.has_landed() && flight.want() {
            self.origins.late(chunk, flight.cause());
        }
        // It may just have been marked.
        self.origins.read(chunk);
    }

    pub(super) async fn read_pieces(self: &Arc<Self>, range: ByteRange) -> Result<Vec<Piece>> {
        let mut pieces = Vec::new();
        // What the last flights brought, as long as it lies in one piece.
        let mut brought: Option<Slice> = None;
        for Part { range, source } in self.plan(range) {
            if let Source::Flight(flight) = &source
                && let ChunkData::Bytes(slice) = self.wait_for(flight, range).await?
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

    /// Waits for the chunk in which `range` lies. Failures of what was fetched ahead of demand are not the client's: it
    /// was not asked for with its patience.
    async fn wait_for(self: &Arc<Self>, flight: &Flight, range: ByteRange) -> Result<ChunkData> {
        match flight.wait().await {
            Err(_) if flight.cause() != Cause::Demand => {}
            result => return result,
        }
        let chunk = self.geometry.chunks(range).next().expect("a part of a read is not empty");
        let whole = self.geometry.range(chunk);
        Ok(match self.read_chunk(chunk, whole).await? {
            Piece::Data(bytes) => ChunkData::Bytes(bytes.into()),
            Piece::Hole(_) => ChunkData::Zero,
        })
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
    pub(super) async fn read_resident(&self, range: ByteRange) -> Option<Bytes> {
        let length = to_usize(range.length());
        let departures = self.departures_of_resident(range)?;
        match self.store.data().read_exact_at(BytesMut::with_capacity(length), length, range.start()).await {
            Ok(bytes) => self.is_still_resident(range, departures).then(|| bytes.freeze()),
            Err(error) => {
                self.disk_failed("cannot read the cache: fetching instead", &error);
                for chunk in self.geometry.chunks(range) {
                    self.states.change(chunk, State::Resident, State::Unverified);
                }
                None
            }
        }
    }

    /// What [`is_still_resident`](Self::is_still_resident) has to be asked with after a read that begins now. `None`:
    /// some of the chunks are not resident.
    fn departures_of_resident(&self, range: ByteRange) -> Option<u32> {
        // In this order: what is resident after the count was taken cannot leave without being counted.
        let departures = self.segments.departures(range);
        self.all_are(range, State::Resident).then_some(departures)
    }

    /// Whether what was just read is what it was when it was found resident: a chunk that was found bad or evicted
    /// meanwhile may have been punched out before it was read.
    fn is_still_resident(&self, range: ByteRange, departures: u32) -> bool {
        self.all_are(range, State::Resident) && self.segments.departures(range) == departures
    }

    /// Reads what is resident, or has to be checked only, if it is in the page cache.
    pub(super) fn try_read_here(&self, range: ByteRange, output: &mut BytesMut) -> TryRead {
        if range.is_empty() {
            return TryRead::Data;
        }
        if self.all_are(range, State::Zero) {
            return TryRead::Hole;
        }
        let result = match self.departures_of_resident(range) {
            Some(departures) => self.try_read_resident(range, departures, output),
            None => self.try_read_checked(range, output),
        };
        if result == TryRead::Data {
            self.note_hits(range);
        }
        result
    }

    fn try_read_resident(&self, range: ByteRange, departures: u32, output: &mut BytesMut) -> TryRead {
        let start = output.len();
        match self.store.data().try_read_at(output, to_usize(range.length()), range.start()) {
            Inline::Done if self.is_still_resident(range, departures) => TryRead::Data,
            Inline::Done => {
                output.truncate(start);
                TryRead::Wait
            }
            Inline::WouldBlock => TryRead::Wait,
        }
    }

    /// Whether `range` is resident and in the page cache now.
    pub(super) fn is_in_file(&self, range: ByteRange) -> bool {
        self.all_are(range, State::Resident) && self.store.data().is_in_memory(range)
    }

    /// Where `range` can be sent from; see [`Export::in_file`](crate::export::Export::in_file).
    pub(super) fn in_file(&self, range: ByteRange) -> Option<FileRange> {
        if !self.is_in_file(range) {
            return None;
        }
        let file = self.store.data();
        let hold = self.segments.hold(range);
        // What had begun to leave before it was held goes on leaving.
        self.all_are(range, State::Resident).then(|| {
            self.note_hits(range);
            FileRange { file: Arc::clone(file), range, hold: Some(Arc::new(hold)) }
        })
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
            if !self.is_right(chunk, bytes) {
                output.truncate(start);
                return TryRead::Wait;
            }
            rest = others;
        }
        let (from, length) = (to_usize(range.start() - whole.start()), to_usize(range.length()));
        output.copy_within(start + from..start + from + length, start);
        output.truncate(start + length);
        TryRead::Data
    }

    /// Whether these are the bytes of a chunk that is here. What has not been used since the start is held against the
    /// manifest, if there is one, and is resident if it is right; what came over since then has been, and its checksum
    /// will do.
    pub(super) fn is_right(&self, chunk: Chunk, bytes: &[u8]) -> bool {
        if self.states.get(chunk) != State::Unverified {
            return checksum(bytes) == self.states.checksum(chunk);
        }
        let had_truth = self.truth.get().is_some();
        let is_right = self.is_as_it_was(chunk, bytes);
        if is_right {
            let _table = self.flights.lock();
            // A manifest that has come meanwhile has not been asked.
            if had_truth == self.truth.get().is_some() {
                self.states.change(chunk, State::Unverified, State::Resident);
            }
        }
        is_right
    }

    /// Whether these bytes are what the manifest says, or without one what was fetched.
    pub(super) fn is_as_it_was(&self, chunk: Chunk, bytes: &[u8]) -> bool {
        match self.truth.get() {
            Some(truth) => truth.is_right(self.geometry, chunk, bytes),
            None => checksum(bytes) == self.states.checksum(chunk),
        }
    }

    /// Reads a part of one chunk, whatever becomes of it meanwhile.
    async fn read_chunk(self: &Arc<Self>, chunk: Chunk, part: ByteRange) -> Result<Piece> {
        for _ in 0..READS_OF_A_CHUNK {
            let mut claims = Claims::default();
            let source = self.claim(chunk, &mut claims, None);
            self.launch(claims);
            match source {
                Source::Flight(flight) => match flight.wait().await {
                    Ok(ChunkData::Zero) => return Ok(Piece::Hole(part.length())),
                    Ok(ChunkData::Bytes(slice)) => return Ok(Piece::Data(self.cut(&slice, part).bytes())),
                    Err(error) if flight.cause() == Cause::Demand => return Err(error),
                    Err(_) => flight.over().await,
                },
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
    pub(super) async fn fill(self: &Arc<Self>, range: ByteRange) -> Result<()> {
        let ahead = Arc::new(Ahead::new(Cause::Prefetch));
        for window in range.pieces(CACHE_WINDOW) {
            let (mut claims, mut flights) = (Claims::default(), Vec::new());
            for chunk in self.geometry.chunks(window) {
                if matches!(self.states.get(chunk), State::Absent | State::Leaving)
                    && let Source::Flight(flight) = self.claim(chunk, &mut claims, Some(&ahead))
                {
                    flights.push(flight);
                }
            }
            self.launch(claims);
            for flight in flights {
                match flight.wait().await {
                    // It was a hint.
                    Err(error) if error.kind() == ErrorKind::NoSpace => return Ok(()),
                    result => result?,
                };
            }
        }
        Ok(())
    }

    /// Asks the upstream what of `range` is zero, unless that is known.
    ///
    /// Who has the manifest need not ask, and must not believe.
    pub(super) async fn cover(&self, range: ByteRange, deadline: Instant) {
        if self.truth.get().is_some() {
            return;
        }
        self.chart.cover(range, deadline, &self.lower, |range| self.mark_zeroes(range)).await;
    }

    /// Marks the chunks of `range`, which the upstream says is zero.
    fn mark_zeroes(&self, range: ByteRange) {
        let table = self.flights.lock();
        // It may have come while we asked.
        if self.truth.get().is_some() {
            return;
        }
        for chunk in self.geometry.whole_chunks(range) {
            // A chunk in flight is absent too; its fetch finds it marked and lands at once.
            self.mark_zero(chunk);
        }
        drop(table);
        self.note_zeroes(range);
    }

    pub(super) async fn allocation(&self, range: ByteRange, limit: usize) -> Vec<Extent> {
        let range = self.describable(range);
        if self.geometry.chunks(range).any(|chunk| self.states.get(chunk) == State::Absent) {
            // Without the upstream's answer what is absent counts as data.
            self.cover(range, Instant::now() + EXTENTS_PATIENCE).await;
        }
        self.describe(range, limit, |_, state| match state {
            State::Zero => Allocation::all().bits(),
            _ => Allocation::empty().bits(),
        })
    }

    pub(super) fn residency(&self, range: ByteRange, limit: usize) -> Vec<Extent> {
        let pinned = |part| if self.pins.touch(part) { Residency::PINNED } else { Residency::empty() };
        let unread = |part| if self.origins.is_unread(part) { Residency::UNREAD } else { Residency::empty() };
        let is_marked = |part| self.geometry.chunks(part).all(|chunk| self.origins.is_marked(chunk));
        self.describe(self.describable(range), limit, |part, state| {
            let state = match state {
                State::Resident | State::Unverified if !is_marked(part) => Residency::empty(),
                State::Resident | State::Unverified => Residency::RESIDENT | unread(part),
                State::Zero => Residency::ZERO,
                State::Absent | State::Leaving | State::Volatile => Residency::empty(),
            };
            (state | pinned(part)).bits()
        })
    }

    /// As much of `range` as is looked at without keeping others waiting.
    fn describable(&self, range: ByteRange) -> ByteRange {
        let span = EXTENTS_CHUNKS * self.geometry.chunk_size();
        ByteRange::between(range.start(), range.end().min(range.start().saturating_add(span)))
    }

    fn describe(&self, range: ByteRange, limit: usize, status: impl Fn(ByteRange, State) -> u32) -> Vec<Extent> {
        let mut extents = Vec::new();
        for chunk in self.geometry.chunks(range) {
            let part = self.geometry.range(chunk).intersect(range);
            push_extent(&mut extents, part.length(), u64::from(status(part, self.states.get(chunk))));
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
