//! From a claimed chunk to one that has arrived.
//!
//! Claims of one turn of a worker gather in a queue; a task that runs after everybody else's turn sorts them, joins
//! neighbours into runs and sends each run upstream as one request. That is how the misses of a whole batch of
//! requests, and of several clients, travel together without anybody waiting for more to come.
//!
//! A run is under way until its bytes are in the data file or have been refused there; so long it counts against a
//! [`BUDGET`], which bounds the memory of all runs together. Chunks that are here and only have to be checked have
//! queues and a budget of their own, because a hit must not wait for misses.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{Bytes, BytesMut};
use futures_util::future::{join, join_all};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

use super::ahead::{Ahead, Asked};
use super::arrival::{Arrival, split};
use super::chunks::{Chunk, State};
use super::flight::{ChunkData, Claim, Slice};
use super::landing::Room;
use super::{EXTENTS_PATIENCE, Inner, Truth};
use crate::clock;
use crate::disk::Inline;
use crate::error::{Error, ErrorKind, Result};
use crate::export::{Piece, wrong_bytes};
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

impl Claims {
    pub(super) fn count(&self) -> usize {
        self.fetch.len() + self.verify.len()
    }
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

/// Claims in the order in which they are worked on: those for which clients wait come first.
type Waiting = BTreeMap<(bool, Chunk), Claim>;

fn place_of(claim: &Claim) -> (bool, Chunk) {
    (claim.flight.ahead.is_some(), claim.chunk)
}

/// Whether two claims may travel together: on demand, or by one order to fetch ahead.
fn is_of_one_fetch(one: &Claim, other: &Claim) -> bool {
    match (&one.flight.ahead, &other.flight.ahead) {
        (None, None) => true,
        (Some(one), Some(other)) => Arc::ptr_eq(one, other),
        _ => false,
    }
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

    /// Waits for room in the budget for a run of so many chunks that is brought otherwise than by a fetch.
    pub(super) async fn fetch_permit(&self, chunks: u64) -> Option<OwnedSemaphorePermit> {
        let permits = (self.geometry.chunk_size() / PERMIT).max(1) * chunks;
        let permits = u32::try_from(permits.min(BUDGET / PERMIT)).unwrap_or(u32::MAX);
        Arc::clone(&self.queues.fetch.budget).acquire_many_owned(permits).await.ok()
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
            let mut waiting: Waiting = claims.into_iter().map(|claim| (place_of(&claim), claim)).collect();
            while let Some(run) = self.next_run(need, &mut waiting).await {
                tokio::task::spawn_local(Arc::clone(&self).work(need, run));
            }
        }
    }

    /// The first claim and its neighbours, as far as the budget and the length of a run go. Claims whose time is
    /// over before there is room for them fail.
    async fn next_run(&self, need: Need, waiting: &mut Waiting) -> Option<Run> {
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
            && let Some(last) = claims.last()
            && let Some(neighbour) = self.geometry.chunk(last.chunk.number() + 1)
            && let neighbour = (last.flight.ahead.is_some(), neighbour)
            && waiting.get(&neighbour).is_some_and(|claim| is_as_old(claim) && is_of_one_fetch(last, claim))
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
                self.disk_failed("cannot read the cache: fetching instead", &error);
                claims.iter().for_each(|claim| self.forget(claim.chunk));
                return claims;
            }
        };
        let mut bad = Vec::new();
        for claim in claims {
            let part = self.geometry.range(claim.chunk);
            let start = to_usize(part.start() - range.start());
            let bytes = Slice { whole: bytes.clone(), range: start..start + to_usize(part.length()) };
            if self.is_right(claim.chunk, &bytes) {
                self.space.disk_worked();
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
            if self.is_unused(claim.chunk) {
                self.give_back(claim.chunk).await;
            }
            bad.push(claim);
        }
        bad
    }

    /// What the data file has, which for chunks that have just been stored is in the page cache.
    async fn read_stored(&self, range: ByteRange) -> io::Result<BytesMut> {
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
        self.origins.left(chunk);
        self.segments.depart(self.segments.of(chunk));
        self.pending.changed(chunk, chunk);
    }

    /// Whether nobody sends from a chunk that is absent, so that it may be punched out.
    fn is_unused(&self, chunk: Chunk) -> bool {
        let range = self.geometry.range(chunk);
        !self.segments.is_held(self.segments.of(chunk)) && self.store.data().drop_pages(range, range)
    }

    /// Punches out what a chunk left that is absent, and for which there is a claim. What cannot be punched out stays
    /// charged, until it is written over or evicted.
    pub(super) async fn give_back(&self, chunk: Chunk) {
        match self.store.data().punch(self.geometry.range(chunk)).await {
            Ok(()) => {
                let _table = self.flights.lock();
                self.discharge(chunk);
            }
            Err(error) => tracing::debug!(image = self.name, %error, "cannot punch a chunk out"),
        }
    }

    fn range_of(&self, claims: &[Claim]) -> ByteRange {
        match claims {
            [first, .., last] => self.geometry.run(first.chunk, last.chunk),
            [only] => self.geometry.range(only.chunk),
            [] => ByteRange::between(0, 0),
        }
    }

    /// Brings neighbouring chunks over, lands them, stores them.
    async fn fetch(&self, claims: &[Claim]) {
        let Some(deadline) = claims.iter().map(|claim| claim.deadline).min() else { return };
        let epoch = self.pending.epoch();
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
        let is_ahead = data.first().is_some_and(|claim| claim.flight.ahead.is_some());
        let kept = data.iter().map(|claim| claim.chunk).filter(|chunk| is_ahead || self.should_keep(*chunk)).collect();
        let room = Room::new(kept, epoch, is_ahead);
        if is_ahead && !data.is_empty() && !self.reserve(&room).await {
            let error = Error::new(ErrorKind::NoSpace, "there is no space for it");
            return data.into_iter().for_each(|claim| self.fail(claim, &error));
        }
        self.space.stats().bypassed_chunks.add(to_u64(data.len() - room.kept.len()));
        let bring = async {
            let data = self.copy_twins(data, &room).await;
            let groups = data.chunk_by(|left, right| left.chunk.number() + 1 == right.chunk.number());
            join_all(groups.map(|group| self.fetch_data(group, deadline, &room))).await;
        };
        // Nobody waits for an eviction: what comes is answered, and stored when there is space for it.
        join(self.reserve(&room), bring).await;
    }

    /// Whether the segment of a chunk is worth its space.
    fn should_keep(&self, chunk: Chunk) -> bool {
        let number = self.segments.of(chunk);
        self.segments.count(number) > 0
            || self.pins.touch(self.geometry.range(chunk))
            || self.space.should_admit(self.segment(number), self.segments.within_segment(chunk))
    }

    /// Takes what other chunks on this disk have the bytes of. Gives back the claims for which there is none.
    async fn copy_twins<'a>(&self, claims: Vec<&'a Claim>, room: &Room) -> Vec<&'a Claim> {
        let Some(truth) = self.truth.get() else { return claims };
        let mut rest = Vec::new();
        for claim in claims {
            match self.read_twin(truth, claim.chunk).await {
                Some(bytes) => {
                    let length = to_u64(bytes.len());
                    self.stats.deduplicated_bytes.add(length);
                    self.space.stats().deduplicated_bytes.add(length);
                    let data = ChunkData::Bytes(bytes.into());
                    self.land(&[claim], vec![Arrival { chunk: claim.chunk, data, is_kept: false }], room).await;
                }
                None => rest.push(claim),
            }
        }
        rest
    }

    /// The bytes of a chunk from another one with the same digest.
    async fn read_twin(&self, truth: &Truth, chunk: Chunk) -> Option<Bytes> {
        let place = self.space.twins.find(truth.key(self.geometry, chunk)?)?;
        let member = self.space.member(place.image)?;
        let range = member.geometry.range(member.geometry.chunk(place.chunk)?);
        let bytes = member.read_stored(range).await.ok()?.freeze();
        truth.is_right(self.geometry, chunk, &bytes).then_some(bytes)
    }

    async fn fetch_data(&self, claims: &[&Claim], deadline: Instant, room: &Room) {
        let Some((first, last)) = claims.first().zip(claims.last()) else { return };
        let range = self.geometry.run(first.chunk, last.chunk);
        let answer = timeout_at(deadline, self.read_below(claims, range)).await;
        match answer.unwrap_or_else(|_| Err(self.late())) {
            Ok(arrivals) => self.land(claims, arrivals, room).await,
            // One bad sector must not fail its neighbours. If nobody answers, asking more often does not help.
            Err(error) if claims.len() > 1 && error.kind() != ErrorKind::Unavailable => {
                let alone = |claim| Box::pin(self.fetch_data(std::slice::from_ref(claim), deadline, room));
                join_all(claims.iter().map(alone)).await;
            }
            Err(error) => claims.iter().for_each(|claim| self.fail(claim, &error)),
        }
    }

    /// Reads neighbouring chunks from the tier below; what has a manifest comes right or not at all.
    async fn read_below(&self, claims: &[&Claim], range: ByteRange) -> Result<Vec<Arrival>> {
        let cut = |pieces: &[Piece]| split(self.geometry, claims.iter().map(|claim| claim.chunk), range, pieces);
        let ahead = claims.first().and_then(|claim| claim.flight.ahead.as_deref());
        let Some(truth) = self.truth.get() else {
            let arrivals = cut(&self.ask_below(range, ahead).await?)?;
            // A manifest that has come meanwhile has not been asked.
            return if self.truth.get().is_none() { Ok(arrivals) } else { Err(wrong_bytes(range)) };
        };
        let is_right = |pieces: &[Piece]| {
            let is_right = |arrival: &Arrival| match &arrival.data {
                ChunkData::Bytes(bytes) => truth.is_right(self.geometry, arrival.chunk, bytes),
                ChunkData::Zero => truth.is_zero(self.geometry, arrival.chunk),
            };
            let right = cut(pieces).is_ok_and(|arrivals| arrivals.iter().all(is_right));
            if !right {
                self.stats.wrong_replies.add(1);
            }
            right
        };
        if ahead.is_some_and(Ahead::is_special)
            && let Ok(pieces) = self.ask_below(range, ahead).await
            && is_right(&pieces)
        {
            return cut(&pieces);
        }
        let asked = Asked::new(self.observer.as_deref(), range.length());
        if let Some(source) = self.preferred()
            && let Ok(pieces) = source.read(range).await
            && is_right(&pieces)
        {
            asked.answered(true);
            return cut(&pieces);
        }
        let answer = self.lower.read_verified(range, &is_right).await;
        asked.answered(answer.is_ok());
        cut(&answer?)
    }

    fn late(&self) -> Error {
        Error::new(ErrorKind::Unavailable, format!("no answer in {} s", self.patience.as_secs_f32()))
    }

    fn fail(&self, claim: &Claim, error: &Error) {
        let is_ahead = claim.flight.ahead.is_some();
        if is_ahead {
            tracing::debug!(
                image = self.name,
                chunk = claim.chunk.number(),
                error = error.chain(),
                "not fetched ahead"
            );
        } else if let Some(unsaid) = self.fetch_warnings.now(clock::now()) {
            let (offset, error) = (self.geometry.range(claim.chunk).start(), error.chain());
            tracing::warn!(image = self.name, offset, error, unsaid, "cannot fetch: clients get an I/O error");
        }
        // Before the flight lands: whoever hears of the failure and asks again starts a new fetch.
        self.flights.lock().remove(&claim.chunk);
        // Whatever the upstream's reason, for a client of this mirror it is an error of the disk.
        let kind = match error.kind() {
            ErrorKind::Unavailable => ErrorKind::Unavailable,
            ErrorKind::NoSpace if is_ahead => ErrorKind::NoSpace,
            _ => ErrorKind::Io,
        };
        let offset = self.geometry.range(claim.chunk).start();
        let message = format!("{}: cannot fetch the chunk at {offset}: {}", self.name, error.chain());
        claim.flight.land(Err(Error::new(kind, message)));
    }
}
