//! From a claimed chunk to a stored one.
//!
//! Claims of one turn of a worker gather in a queue; a task that runs after everybody else's turn sorts them, joins
//! neighbours into runs and sends each run upstream as one request. That is how the misses of a whole batch of
//! requests, and of several clients, travel together without anybody waiting for more to come.
//!
//! A run is under way until its bytes are in the data file or have been refused there; so long it counts against a
//! [`BUDGET`], which bounds the memory of all runs together. Chunks that are here and only have to be checked have
//! queues and a budget of their own, because a hit must not wait for misses.

use std::collections::BTreeMap;
use std::io::IoSlice;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::BytesMut;
use futures_util::future::join_all;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

use super::chunks::{Chunk, Geometry, State, checksum};
use super::flight::{ChunkData, Claim, Slice};
use super::{EXTENTS_PATIENCE, Inner};
use crate::clock;
use crate::disk::Inline;
use crate::error::{Error, ErrorKind, Result};
use crate::export::Piece;
use crate::ranges::ByteRange;
use crate::units::{MIB, to_u64, to_usize};

/// Bytes of all runs with one need that are under way together.
const BUDGET: u64 = 128 * MIB;
/// The longest run: enough to make the round trip small beside the transfer, and short enough not to delay others.
const LONGEST_RUN: u64 = MIB;
/// The budget is counted in the smallest chunks.
const PERMIT: u64 = 4096;
/// Queues; workers with numbers beyond share them.
const QUEUES: usize = 64;

/// What has to be done to a claimed chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Need {
    /// Its bytes are not here.
    Fetch,
    /// Its bytes are in the data file and must be held against their checksum.
    Verify,
}

/// Claims that were made together, by what has to be done.
#[derive(Debug, Default)]
pub(super) struct Claims {
    pub(super) fetch: Vec<Claim>,
    pub(super) verify: Vec<Claim>,
}

/// Claims on their way to being worked on.
#[derive(Debug)]
pub(super) struct Queues {
    fetch: Lane,
    verify: Lane,
}

/// Claims with one need.
#[derive(Debug)]
struct Lane {
    queues: Box<[Mutex<Queue>]>,
    budget: Arc<Semaphore>,
}

#[derive(Debug, Default)]
struct Queue {
    claims: Vec<Claim>,
    /// Whether a task has been started that will take them.
    is_attended: bool,
}

impl Queues {
    pub(super) fn new() -> Self {
        Self { fetch: Lane::new(), verify: Lane::new() }
    }

    const fn lane(&self, need: Need) -> &Lane {
        match need {
            Need::Fetch => &self.fetch,
            Need::Verify => &self.verify,
        }
    }
}

impl Lane {
    fn new() -> Self {
        let permits = to_usize(BUDGET / PERMIT);
        Self { queues: (0..QUEUES).map(|_| Mutex::default()).collect(), budget: Arc::new(Semaphore::new(permits)) }
    }

    /// Never held across an await.
    fn with_queue<T>(&self, number: usize, act: impl FnOnce(&mut Queue) -> T) -> T {
        act(&mut self.queues[number].lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Lets another task attend to a queue when the one that did so panics.
struct Attended<'a> {
    lane: &'a Lane,
    number: usize,
}

impl Drop for Attended<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.lane.with_queue(self.number, |queue| queue.is_attended = false);
        }
    }
}

/// Neighbouring chunks with the same need.
#[derive(Debug)]
struct Run {
    claims: Vec<Claim>,
    /// Given back when the run is over.
    _permit: OwnedSemaphorePermit,
}

impl Inner {
    /// Has claimed chunks worked on by this worker.
    pub(super) fn launch(self: &Arc<Self>, claims: Claims) {
        self.start(Need::Fetch, claims.fetch);
        self.start(Need::Verify, claims.verify);
    }

    fn start(self: &Arc<Self>, need: Need, claims: Vec<Claim>) {
        if claims.is_empty() {
            return;
        }
        let number = crate::worker::index().unwrap_or(0) % QUEUES;
        let attended = self.queues.lane(need).with_queue(number, |queue| {
            queue.claims.extend(claims);
            std::mem::replace(&mut queue.is_attended, true)
        });
        if !attended {
            tokio::task::spawn_local(Arc::clone(self).attend(need, number));
        }
    }

    /// Waits until nothing is being fetched: what came over has been written to the data file or refused there.
    pub(super) async fn stored(&self) {
        let all = u32::try_from(BUDGET / PERMIT).unwrap_or(u32::MAX);
        // It fails only when the budget is closed, which it never is.
        let _ = self.queues.fetch.budget.acquire_many(all).await;
    }

    /// Turns claims into runs until there are none.
    async fn attend(self: Arc<Self>, need: Need, number: usize) {
        let _attended = Attended { lane: self.queues.lane(need), number };
        loop {
            let claims = self.queues.lane(need).with_queue(number, |queue| {
                queue.is_attended = !queue.claims.is_empty();
                std::mem::take(&mut queue.claims)
            });
            if claims.is_empty() {
                return;
            }
            let mut waiting: BTreeMap<Chunk, Claim> = claims.into_iter().map(|claim| (claim.chunk, claim)).collect();
            while let Some(run) = self.next_run(need, &mut waiting).await {
                tokio::task::spawn_local(Arc::clone(&self).work(need, run));
            }
        }
    }

    /// The first claim and its neighbours, as far as the budget and the length of a run go. Claims whose time is
    /// over before there is room for them fail.
    async fn next_run(&self, need: Need, waiting: &mut BTreeMap<Chunk, Claim>) -> Option<Run> {
        let budget = &self.queues.lane(need).budget;
        let each = u32::try_from(self.geometry.chunk_size() / PERMIT).unwrap_or(u32::MAX).max(1);
        let mut permit = loop {
            if let Ok(permit) = Arc::clone(budget).try_acquire_many_owned(each) {
                break permit;
            }
            let first_call = waiting.values().map(|claim| claim.deadline).min()?;
            if let Ok(permit) = timeout_at(first_call, Arc::clone(budget).acquire_many_owned(each)).await {
                break permit.expect("the budget is never closed");
            }
            waiting.retain(|_, claim| {
                let is_in_time = claim.deadline > first_call;
                if !is_in_time {
                    self.fail(claim, &self.late());
                }
                is_in_time
            });
        };
        let (_, first) = waiting.pop_first()?;
        // Who has just begun to wait must not fail with those who have waited long.
        let age = first.deadline;
        let is_as_old = |claim: &Claim| claim.deadline.max(age) - claim.deadline.min(age) <= self.patience / 10;
        let mut claims = vec![first];
        while to_u64(claims.len() + 1) * self.geometry.chunk_size() <= LONGEST_RUN
            && let Some(neighbour) = claims.last().and_then(|last| self.geometry.chunk(last.chunk.number() + 1))
            && waiting.get(&neighbour).is_some_and(is_as_old)
            && let Ok(more) = Arc::clone(budget).try_acquire_many_owned(each)
        {
            permit.merge(more);
            claims.extend(waiting.remove(&neighbour));
        }
        Some(Run { claims, _permit: permit })
    }

    async fn work(self: Arc<Self>, need: Need, run: Run) {
        let Run { claims, _permit } = run;
        match need {
            Need::Fetch => self.fetch(&claims).await,
            Need::Verify => {
                let bad = self.verify(claims).await;
                self.start(Need::Fetch, bad);
            }
        }
    }

    /// Lands those chunks whose bytes here are right. Gives back the others, which are absent now.
    async fn verify(&self, claims: Vec<Claim>) -> Vec<Claim> {
        let range = self.range_of(&claims);
        let bytes = match self.read_stored(range).await {
            Ok(bytes) => bytes.freeze(),
            // One bad sector must not cost its neighbours.
            Err(_) if claims.len() > 1 => {
                let alone = claims.into_iter().map(|claim| Box::pin(self.verify(vec![claim])));
                return join_all(alone).await.into_iter().flatten().collect();
            }
            Err(error) => {
                self.warn_of_disk("cannot read the cache: fetching instead", &error);
                claims.iter().for_each(|claim| self.forget(claim.chunk));
                return claims;
            }
        };
        let mut bad = Vec::new();
        for claim in claims {
            let part = self.geometry.range(claim.chunk);
            let start = to_usize(part.start() - range.start());
            let bytes = Slice { whole: bytes.clone(), range: start..start + to_usize(part.length()) };
            if checksum(&bytes) == self.states.checksum(claim.chunk) {
                self.states.change(claim.chunk, State::Unverified, State::Resident);
                // The flight leaves the table with its claim, here.
                claim.flight.land(Ok(ChunkData::Bytes(bytes)));
                continue;
            }
            tracing::warn!(
                image = self.name,
                offset = part.start(),
                "a chunk in the cache is damaged: fetching it again"
            );
            self.stats.damaged_chunks.add(1);
            self.forget(claim.chunk);
            // If it turns out to be zero, nothing will be written over what is there.
            if let Err(error) = self.store.data().punch(part).await {
                tracing::debug!(image = self.name, %error, "cannot punch a damaged chunk out");
            }
            bad.push(claim);
        }
        bad
    }

    /// What the data file has, which for chunks that have just been stored is in the page cache.
    async fn read_stored(&self, range: ByteRange) -> std::io::Result<BytesMut> {
        let length = to_usize(range.length());
        let mut bytes = BytesMut::with_capacity(length);
        match self.store.data().try_read_at(&mut bytes, length, range.start()) {
            Inline::Done => Ok(bytes),
            Inline::WouldBlock => self.store.data().read_exact_at(bytes, length, range.start()).await,
        }
    }

    /// Makes a chunk absent that is not what the map says.
    fn forget(&self, chunk: Chunk) {
        let _table = self.flights.lock();
        if self.states.get(chunk) == State::Volatile {
            self.pending.distrust();
        }
        self.states.set(chunk, State::Absent);
        self.pending.changed(chunk, chunk);
    }

    fn range_of(&self, claims: &[Claim]) -> ByteRange {
        match claims {
            [first, .., last] => {
                ByteRange::between(self.geometry.range(first.chunk).start(), self.geometry.range(last.chunk).end())
            }
            [only] => self.geometry.range(only.chunk),
            [] => ByteRange::between(0, 0),
        }
    }

    /// Brings neighbouring chunks over, lands them, stores them.
    async fn fetch(&self, claims: &[Claim]) {
        let Some(deadline) = claims.iter().map(|claim| claim.deadline).min() else { return };
        let now = Instant::now();
        let left = deadline.saturating_duration_since(now);
        // Too little to be answered in.
        if left < self.patience / 100 {
            return claims.iter().for_each(|claim| self.fail(claim, &self.late()));
        }
        self.cover(self.range_of(claims), now + EXTENTS_PATIENCE.min(left / 2)).await;
        // The chart may have shown some to be zero.
        let (zero, data): (Vec<_>, Vec<_>) =
            claims.iter().partition(|claim| self.states.get(claim.chunk) == State::Zero);
        for claim in zero {
            claim.flight.land(Ok(ChunkData::Zero));
            self.flights.lock().remove(&claim.chunk);
        }
        let groups = data.chunk_by(|left, right| left.chunk.number() + 1 == right.chunk.number());
        join_all(groups.map(|group| self.fetch_data(group, deadline))).await;
    }

    async fn fetch_data(&self, claims: &[&Claim], deadline: Instant) {
        let Some((first, last)) = claims.first().zip(claims.last()) else { return };
        let range = ByteRange::between(self.geometry.range(first.chunk).start(), self.geometry.range(last.chunk).end());
        let answer = timeout_at(deadline, self.lower.read(range)).await;
        match answer.unwrap_or_else(|_| Err(self.late())) {
            Ok(pieces) => self.arrived(claims, range, pieces).await,
            // One bad sector must not fail its neighbours. If nobody answers, asking more often does not help.
            Err(error) if claims.len() > 1 && error.kind() != ErrorKind::Unavailable => {
                join_all(claims.iter().map(|claim| Box::pin(self.fetch_data(std::slice::from_ref(claim), deadline))))
                    .await;
            }
            Err(error) => claims.iter().for_each(|claim| self.fail(claim, &error)),
        }
    }

    fn late(&self) -> Error {
        Error::new(ErrorKind::Unavailable, format!("no answer in {} s", self.patience.as_secs_f32()))
    }

    fn fail(&self, claim: &Claim, error: &Error) {
        if let Some(unsaid) = self.fetch_warnings.now(clock::now()) {
            let (offset, error) = (self.geometry.range(claim.chunk).start(), error.chain());
            tracing::warn!(image = self.name, offset, error, unsaid, "cannot fetch: clients get an I/O error");
        }
        // Before the flight lands: whoever hears of the failure and asks again starts a new fetch.
        self.flights.lock().remove(&claim.chunk);
        // Whatever the upstream's reason, for a client of this mirror it is an error of the disk.
        let kind = if error.kind() == ErrorKind::Unavailable { ErrorKind::Unavailable } else { ErrorKind::Io };
        let offset = self.geometry.range(claim.chunk).start();
        let message = format!("{}: cannot fetch the chunk at {offset}: {}", self.name, error.chain());
        claim.flight.land(Err(Error::new(kind, message)));
    }

    /// Lands what came for `range`, then stores it.
    async fn arrived(&self, claims: &[&Claim], range: ByteRange, pieces: Vec<Piece>) {
        let arrivals = match split(self.geometry, claims.iter().map(|claim| claim.chunk), range, &pieces) {
            Ok(arrivals) => arrivals,
            Err(error) => return claims.iter().for_each(|claim| self.fail(claim, &error)),
        };
        drop(pieces);
        for (claim, arrival) in claims.iter().zip(&arrivals) {
            claim.flight.land(Ok(arrival.data.clone()));
        }
        for zero in arrivals.iter().filter(|arrival| arrival.data == ChunkData::Zero) {
            let mut table = self.flights.lock();
            self.states.set(zero.chunk, State::Zero);
            table.remove(&zero.chunk);
            drop(table);
            self.pending.changed(zero.chunk, zero.chunk);
        }
        // Whoever waited sends the bytes to its clients first, while they are in the processor's caches.
        tokio::task::yield_now().await;
        for write in contiguous(&arrivals) {
            self.store_chunks(write).await;
        }
    }

    /// Writes chunks to the data file. If that fails they are absent: they have been answered, and that is all.
    async fn store_chunks(&self, write: Write<'_>) {
        let Write { arrivals, slice } = write;
        let Some(first) = arrivals.first() else { return };
        let offset = self.geometry.range(first.chunk).start();
        let checksums: Vec<_> = arrivals.iter().map(Arrival::checksum).collect();
        let epoch = self.pending.epoch();
        let result = match self.store.data().try_write_at(&[IoSlice::new(&slice)], offset) {
            Inline::Done => Ok(()),
            Inline::WouldBlock => self.store.data().write_all_at(slice.bytes(), offset, false).await,
        };
        let mut table = self.flights.lock();
        for (arrival, checksum) in arrivals.iter().zip(checksums) {
            if result.is_ok() {
                self.states.set_checksum(arrival.chunk, checksum);
                self.states.set(arrival.chunk, State::Volatile);
            }
            table.remove(&arrival.chunk);
        }
        drop(table);
        match result {
            Ok(()) => {
                for arrival in arrivals {
                    self.pending.wrote(arrival.chunk, self.geometry.range(arrival.chunk).length(), epoch);
                }
            }
            Err(error) => {
                self.stats.unstored_chunks.add(to_u64(arrivals.len()));
                self.warn_of_disk("cannot store what was fetched: serving without storing", &error);
            }
        }
    }
}

/// A chunk that came over.
#[derive(Debug)]
struct Arrival {
    chunk: Chunk,
    data: ChunkData,
}

impl Arrival {
    fn checksum(&self) -> u32 {
        match &self.data {
            ChunkData::Bytes(bytes) => checksum(bytes),
            ChunkData::Zero => 0,
        }
    }
}

/// Cuts the pieces of `range` into its chunks.
fn split(
    geometry: Geometry,
    chunks: impl Iterator<Item = Chunk>,
    range: ByteRange,
    pieces: &[Piece],
) -> Result<Vec<Arrival>> {
    let total: u64 = pieces.iter().map(Piece::length).sum();
    if total != range.length() {
        return Err(Error::new(ErrorKind::Io, format!("{total} bytes came where {} were asked for", range.length())));
    }
    let mut cursor = Cursor { pieces, index: 0, at: 0 };
    Ok(chunks.map(|chunk| Arrival { chunk, data: cursor.take(geometry.range(chunk).length()) }).collect())
}

/// A place in a list of pieces.
struct Cursor<'a> {
    pieces: &'a [Piece],
    index: usize,
    /// Bytes of the current piece that are used up.
    at: u64,
}

impl Cursor<'_> {
    /// The next `length` bytes, where they are if they are all from one piece.
    fn take(&mut self, length: u64) -> ChunkData {
        if let Some(piece) = self.pieces.get(self.index)
            && piece.length() - self.at >= length
        {
            let start = to_usize(self.at);
            self.advance(length);
            return match piece {
                Piece::Hole(_) => ChunkData::Zero,
                Piece::Data(bytes) => {
                    ChunkData::of(Slice { whole: bytes.clone(), range: start..start + to_usize(length) })
                }
            };
        }
        let mut bytes = BytesMut::zeroed(to_usize(length));
        let mut filled = 0;
        while filled < bytes.len()
            && let Some(piece) = self.pieces.get(self.index)
        {
            let count = to_usize((piece.length() - self.at).min(to_u64(bytes.len() - filled)));
            if let Piece::Data(data) = piece {
                let start = to_usize(self.at);
                bytes[filled..filled + count].copy_from_slice(&data[start..start + count]);
            }
            filled += count;
            self.advance(to_u64(count));
        }
        ChunkData::of(bytes.freeze().into())
    }

    fn advance(&mut self, length: u64) {
        self.at += length;
        if self.pieces.get(self.index).is_some_and(|piece| piece.length() == self.at) {
            (self.index, self.at) = (self.index + 1, 0);
        }
    }
}

/// Neighbouring chunks that one write can store.
#[derive(Debug)]
struct Write<'a> {
    arrivals: &'a [Arrival],
    slice: Slice,
}

/// Groups neighbours whose bytes lie side by side in one piece. `arrivals` are neighbours.
fn contiguous(arrivals: &[Arrival]) -> impl Iterator<Item = Write<'_>> {
    let together = |left: &Arrival, right: &Arrival| match (&left.data, &right.data) {
        (ChunkData::Bytes(left), ChunkData::Bytes(right)) => left.clone().join(right),
        _ => false,
    };
    arrivals.chunk_by(together).filter_map(|group| match (&group.first()?.data, &group.last()?.data) {
        (ChunkData::Bytes(first), ChunkData::Bytes(last)) => {
            let slice = Slice { whole: first.whole.clone(), range: first.range.start..last.range.end };
            Some(Write { arrivals: group, slice })
        }
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::is_zero;
    use bytes::Bytes;
    use proptest::prelude::*;

    fn chunks(geometry: Geometry) -> impl Iterator<Item = Chunk> {
        geometry.chunks(ByteRange::between(0, geometry.size()))
    }

    proptest! {
        #[test]
        fn any_pieces_are_cut_into_chunks_and_written_where_they_belong(
            lengths in prop::collection::vec((1u64..90, any::<bool>(), 0u8..3), 1..20),
        ) {
            let mut contents = Vec::new();
            let mut pieces = Vec::new();
            for (length, hole, byte) in lengths {
                contents.resize(contents.len() + to_usize(length), if hole { 0 } else { byte });
                let data = Bytes::from(vec![byte; to_usize(length)]);
                pieces.push(if hole { Piece::Hole(length) } else { Piece::Data(data) });
            }
            let geometry = Geometry::new(to_u64(contents.len()), 32);
            let whole = ByteRange::between(0, geometry.size());
            let arrivals = split(geometry, chunks(geometry), whole, &pieces).unwrap();
            let mut written = vec![0; contents.len()];
            let mut stored = 0;
            for write in contiguous(&arrivals) {
                let start = to_usize(geometry.range(write.arrivals[0].chunk).start());
                written[start..start + write.slice.len()].copy_from_slice(&write.slice);
                stored += write.arrivals.len();
            }
            prop_assert_eq!(&written, &contents);
            let with_bytes = arrivals.iter().filter(|arrival| arrival.data != ChunkData::Zero);
            prop_assert_eq!(stored, with_bytes.count(), "zero chunks are known, not stored");
            for arrival in &arrivals {
                let range = geometry.range(arrival.chunk);
                let expected = &contents[to_usize(range.start())..to_usize(range.end())];
                match &arrival.data {
                    ChunkData::Zero => prop_assert!(is_zero(expected)),
                    ChunkData::Bytes(bytes) => {
                        prop_assert_eq!(&bytes[..], expected);
                        prop_assert_eq!(arrival.checksum(), checksum(expected));
                        prop_assert!(!is_zero(expected));
                    }
                }
            }
        }
    }

    #[test]
    fn a_run_that_came_whole_is_one_write() {
        let geometry = Geometry::new(1000, 64);
        let pieces = [Piece::Data(Bytes::from(vec![1; 1000]))];
        let arrivals = split(geometry, chunks(geometry), ByteRange::between(0, 1000), &pieces).unwrap();
        assert_eq!(contiguous(&arrivals).count(), 1);
    }

    #[test]
    fn too_few_bytes_are_not_taken_for_zeroes() {
        let geometry = Geometry::new(100, 64);
        let pieces = [Piece::Data(Bytes::from(vec![1; 99]))];
        let error = split(geometry, chunks(geometry), ByteRange::between(0, 100), &pieces).unwrap_err();
        assert_eq!(error.to_string(), "99 bytes came where 100 were asked for");
    }
}
