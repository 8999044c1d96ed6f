//! Taking bytes that nobody asked for: what others have sent to all who hear.
//!
//! They are held against the manifest before anything else is done with them, so wrong ones make no claim, keep no client
//! waiting and cost only their hashing. Right ones are stored as what is fetched ahead of demand is: there is room for
//! them first, or they are not kept. What somebody is fetching at the moment is left to that.
//!
//! Owns: the judgement of such bytes and their way to a landing. Does not own: where they came from.

use bytes::Bytes;
use std::sync::Arc;
use tokio::time::Instant;

use super::ahead::Ahead;
use super::arrival::Arrival;
use super::chunks::{Chunk, State};
use super::flight::{ChunkData, Claim, Slice};
use super::flusher::Epoch;
use super::landing::Room;
use super::{Cause, Inner, Mirror, Truth};
use crate::manifest::Shape;
use crate::ranges::ByteRange;
use crate::units::{MIB, to_u64, to_usize};

/// Bytes that are hashed and written in one turn of the worker.
const TURN: u64 = MIB / 4;

/// What came of bytes that were offered, by whole chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offered {
    /// Bytes that were missing and are here now.
    pub stored: u64,
    /// Bytes that were here, or that somebody was fetching.
    pub unwanted: u64,
    /// Bytes that are not those of the image.
    pub wrong: u64,
    /// Bytes that are right, and could not be kept: there is no space, or no manifest yet, or the disk refused.
    pub unkept: u64,
}

impl Mirror {
    /// Takes bytes of the image for `cause`, each piece with its place: whole chunks. Only with a manifest, which decides
    /// whether they are kept. Ends when they are stored, or are not going to be. To be called on a worker.
    ///
    /// Cancel safety: what has not been stored is as if it had not been offered.
    pub async fn offer(&self, cause: Cause, pieces: Vec<(ByteRange, Bytes)>) -> Offered {
        let mut offered = Offered::default();
        let ahead = Arc::new(Ahead::new(cause));
        for (range, bytes) in pieces {
            let whole = self.0.geometry.chunks(range).filter(|chunk| self.is_within(*chunk, range));
            let chunks: Vec<_> = whole.collect();
            let each = to_usize((TURN / self.chunk_size()).max(1));
            for turn in chunks.chunks(each) {
                self.0.offer(&ahead, turn, range, &bytes, &mut offered).await;
                // A client may have something to be answered.
                tokio::task::yield_now().await;
            }
        }
        offered
    }

    fn is_within(&self, chunk: Chunk, range: ByteRange) -> bool {
        let part = self.0.geometry.range(chunk);
        range.start() <= part.start() && part.end() <= range.end()
    }

    /// How the manifest cuts the image; `None`: there is none.
    pub fn manifest_shape(&self) -> Option<Shape> {
        self.0.truth.get().map(Truth::shape)
    }

    /// Whether the manifest says that its chunk `number` is all zero. `false` without one.
    pub fn is_known_zero(&self, number: u64) -> bool {
        self.0.truth.get().is_some_and(|truth| truth.is_zero_there(number))
    }

    /// Whether all of `range` is here, or zero; it need not be durable yet.
    pub fn holds(&self, range: ByteRange) -> bool {
        let inner = &self.0;
        let is_here = |state| !matches!(state, State::Absent | State::Leaving);
        inner.geometry.chunks(range).all(|chunk| is_here(inner.states.get(chunk)))
    }
}

impl Inner {
    /// Takes neighbouring chunks, whose bytes are in `bytes`, which belong at `range`.
    async fn offer(
        &self,
        ahead: &Arc<Ahead>,
        chunks: &[Chunk],
        range: ByteRange,
        bytes: &Bytes,
        offered: &mut Offered,
    ) {
        let epoch = self.pending.epoch();
        let length = |chunks: &[Chunk]| chunks.iter().map(|chunk| self.geometry.range(*chunk).length()).sum::<u64>();
        let Some(truth) = self.truth.get() else { return offered.unkept += length(chunks) };
        let mut right = Vec::new();
        for chunk in chunks {
            let part = self.geometry.range(*chunk);
            let start = to_usize(part.start() - range.start());
            let end = (start + to_usize(part.length())).min(bytes.len());
            let slice = Slice { whole: bytes.clone(), range: start.min(end)..end };
            if !self.is_missing(*chunk) {
                offered.unwanted += part.length();
            } else if truth.is_right(self.geometry, *chunk, &slice) {
                right.push((*chunk, slice));
            } else {
                offered.wrong += part.length();
            }
        }
        let follows = |left: &(Chunk, Slice), right: &(Chunk, Slice)| left.0.number() + 1 == right.0.number();
        for run in right.chunk_by(follows) {
            self.take_right(ahead, run, epoch, offered).await;
        }
    }

    /// Whether a chunk is absent and nobody fetches it.
    fn is_missing(&self, chunk: Chunk) -> bool {
        let table = self.flights.lock();
        self.states.get(chunk) == State::Absent && !table.contains_key(&chunk)
    }

    /// Stores neighbouring chunks that are right.
    async fn take_right(&self, ahead: &Arc<Ahead>, run: &[(Chunk, Slice)], epoch: Epoch, offered: &mut Offered) {
        let length = |chunk: Chunk| self.geometry.range(chunk).length();
        // As what is fetched: whoever waits until everything is stored waits for this too.
        let _permit = self.fetch_permit(to_u64(run.len())).await;
        let room = Room::new(run.iter().map(|(chunk, _)| *chunk).collect(), epoch, true);
        if !self.reserve(&room).await {
            return offered.unkept += run.iter().map(|(chunk, _)| length(*chunk)).sum::<u64>();
        }
        let (mut claims, mut arrivals) = (Vec::new(), Vec::new());
        for (chunk, slice) in run {
            match self.claim_missing(*chunk, ahead) {
                Some(claim) => {
                    claims.push(claim);
                    arrivals.push(Arrival { chunk: *chunk, data: ChunkData::of(slice.clone()), is_kept: false });
                }
                None => offered.unwanted += length(*chunk),
            }
        }
        self.land(&claims.iter().collect::<Vec<_>>(), arrivals, &room).await;
        for claim in &claims {
            match self.states.get(claim.chunk) {
                State::Absent | State::Leaving => offered.unkept += length(claim.chunk),
                State::Resident | State::Volatile | State::Unverified | State::Zero => {
                    offered.stored += length(claim.chunk);
                }
            }
        }
    }

    /// Claims a chunk that is absent and that nobody fetches.
    fn claim_missing(&self, chunk: Chunk, ahead: &Arc<Ahead>) -> Option<Claim> {
        let mut table = self.flights.lock();
        let is_missing = self.states.get(chunk) == State::Absent && !table.contains_key(&chunk);
        let deadline = Instant::now() + self.patience;
        is_missing.then(|| Claim::begin(&self.flights, &mut table, chunk, deadline, Some(ahead)))
    }
}
