//! Reading all that is here again, from the disk, and fetching again what is not right.
//!
//! Owns: the walk, its rate, its findings. Does not own: mending, which is what reads do with a damaged chunk.

use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::time::{Instant, sleep_until};

use super::chunks::{Chunk, State};
use super::{Inner, Mirror};
use crate::ranges::ByteRange;
use crate::telemetry::Counter;
use crate::units::{MIB, to_usize};

/// What is read at once.
const WINDOW: u64 = MIB;

/// What a scrub has found so far. Any thread may look.
#[derive(Debug, Default)]
pub struct Findings {
    /// Bytes looked at, those that are not here included.
    pub done_bytes: Counter,
    /// Chunks that were checked.
    pub checked_chunks: Counter,
    /// Those that were wrong, or could not be read.
    pub damaged_chunks: Counter,
    /// Those of them that are right again.
    pub repaired_chunks: Counter,
    /// Those of them that are not: they are fetched when somebody reads them.
    pub unrepaired_chunks: Counter,
}

/// How to scrub.
#[derive(Debug, Clone, Copy, Default)]
pub struct Scrub {
    /// Bytes that are read in a second. `None`: as fast as the disk.
    pub rate: Option<u64>,
    /// Whether damaged chunks are fetched again now, instead of when they are read next.
    pub repair: bool,
}

impl Mirror {
    /// Checks each chunk that is here. What is damaged is never read as it is, whether it is repaired or not.
    ///
    /// Cancel safety: it ends early.
    pub async fn scrub(&self, scrub: Scrub, findings: &Findings) {
        let inner = &self.0;
        let mut pace = Pace { rate: scrub.rate, due: Instant::now() };
        for window in ByteRange::between(0, inner.geometry.size()).pieces(WINDOW.max(inner.geometry.chunk_size())) {
            inner.store.data().drop_pages(window, window);
            for chunk in inner.geometry.chunks(window) {
                if matches!(inner.states.get(chunk), State::Resident | State::Unverified) {
                    pace.wait(inner.geometry.range(chunk).length()).await;
                    inner.scrub_chunk(chunk, scrub.repair, findings).await;
                }
            }
            findings.done_bytes.add(window.length());
        }
    }
}

impl Inner {
    async fn scrub_chunk(self: &Arc<Self>, chunk: Chunk, repair: bool, findings: &Findings) {
        let range = self.geometry.range(chunk);
        let departures = self.segments.departures(range);
        let length = to_usize(range.length());
        let bytes = self.store.data().read_exact_at(BytesMut::with_capacity(length), length, range.start()).await;
        findings.checked_chunks.add(1);
        let is_right = match &bytes {
            Ok(bytes) => self.is_as_it_was(chunk, bytes),
            Err(error) => {
                self.disk_failed("cannot read the cache", error);
                false
            }
        };
        let is_here = matches!(self.states.get(chunk), State::Resident | State::Unverified);
        if is_right || !is_here || self.segments.departures(range) != departures {
            return;
        }
        findings.damaged_chunks.add(1);
        // From now on it is a miss: whoever reads it checks it first.
        self.states.change(chunk, State::Resident, State::Unverified);
        let is_repaired = repair && self.read_pieces(range).await.is_ok();
        let count = if is_repaired { &findings.repaired_chunks } else { &findings.unrepaired_chunks };
        count.add(1);
    }
}

/// Keeps a rate.
#[derive(Debug)]
struct Pace {
    rate: Option<u64>,
    /// When what was let through before is paid for.
    due: Instant,
}

impl Pace {
    async fn wait(&mut self, bytes: u64) {
        let Some(rate) = self.rate else { return tokio::task::yield_now().await };
        sleep_until(self.due).await;
        let cost = u128::from(bytes) * 1_000_000_000 / u128::from(rate.max(1));
        self.due = self.due.max(Instant::now()) + Duration::from_nanos(u64::try_from(cost).unwrap_or(u64::MAX));
    }
}
