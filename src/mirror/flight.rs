//! Single flight: one fetch for all who want a chunk.
//!
//! A flight is an entry of the table from the moment somebody claims a chunk until its bytes are stored (or could
//! not be). The fetch belongs to the mirror, not to whoever claimed: if all readers go away it still ends, and none
//! of them can fail another by leaving. Readers that come between arrival and storing get the bytes from the flight.

use std::collections::HashMap;
use std::ops::{Deref, Range};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use bytes::Bytes;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::Cause;
use super::ahead::Ahead;
use super::chunks::Chunk;
use crate::error::{Error, ErrorKind, Result};
use crate::manifest::is_zero;

/// The bytes of one chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ChunkData {
    /// All of them.
    Bytes(Slice),
    /// They are all zero.
    Zero,
}

impl ChunkData {
    /// Looks whether the bytes are all zero.
    pub(super) fn of(slice: Slice) -> Self {
        if is_zero(&slice) { Self::Zero } else { Self::Bytes(slice) }
    }
}

/// A part of a buffer. Unlike two [`Bytes`], two neighbours in one buffer can be made one again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Slice {
    pub(super) whole: Bytes,
    pub(super) range: Range<usize>,
}

impl Slice {
    /// Takes the bytes of `next` too, if they come right after these.
    pub(super) fn join(&mut self, next: &Self) -> bool {
        let is_same = self.whole.as_ptr() == next.whole.as_ptr() && self.whole.len() == next.whole.len();
        let joins = is_same && self.range.end == next.range.start;
        if joins {
            self.range.end = next.range.end;
        }
        joins
    }

    /// A part of these bytes.
    pub(super) fn part(&self, start: usize, length: usize) -> Self {
        let start = self.range.start + start;
        Self { whole: self.whole.clone(), range: start..start + length }
    }

    /// The bytes, as one of their own.
    pub(super) fn bytes(&self) -> Bytes {
        self.whole.slice(self.range.clone())
    }
}

impl From<Bytes> for Slice {
    fn from(whole: Bytes) -> Self {
        let range = 0..whole.len();
        Self { whole, range }
    }
}

impl Deref for Slice {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.whole[self.range.clone()]
    }
}

/// A chunk on its way.
#[derive(Debug, Default)]
pub(super) struct Flight {
    result: OnceLock<Result<ChunkData>>,
    /// It has landed, or is over.
    news: Notify,
    /// Whether its chunk is stored by now, or is not going to be.
    is_over: AtomicBool,
    /// What it belongs to, if it is ahead of demand.
    pub(super) ahead: Option<Arc<Ahead>>,
    /// Whether a client waits for it.
    is_wanted: AtomicBool,
}

impl Flight {
    pub(super) fn has_landed(&self) -> bool {
        self.result.get().is_some()
    }

    /// Why it flies.
    pub(super) fn cause(&self) -> Cause {
        self.ahead.as_ref().map_or(Cause::Demand, |ahead| ahead.cause)
    }

    /// A client waits for it, who would not have to if it were on demand. Gives whether that is new.
    pub(super) fn want(&self) -> bool {
        let is_new = !self.is_wanted.swap(true, Ordering::AcqRel);
        if is_new && let Some(ahead) = &self.ahead {
            ahead.hurry();
        }
        is_new
    }

    /// Whether a client waits for it, or began it.
    pub(super) fn is_wanted(&self) -> bool {
        self.ahead.is_none() || self.is_wanted.load(Ordering::Acquire)
    }

    /// Gives everybody the result. Only the first call counts.
    pub(super) fn land(&self, result: Result<ChunkData>) {
        if self.result.set(result).is_ok() {
            self.news.notify_waiters();
        }
    }

    /// Waits for the chunk.
    ///
    /// Cancel safety: the flight goes on.
    pub(super) async fn wait(&self) -> Result<ChunkData> {
        loop {
            let landed = self.news.notified();
            // Asked after the notification is armed, so that it cannot come in between.
            if let Some(result) = self.result.get() {
                return result.clone();
            }
            landed.await;
        }
    }

    /// Waits until its chunk is stored, or is not going to be.
    ///
    /// Cancel safety: the flight goes on.
    pub(super) async fn over(&self) {
        loop {
            let news = self.news.notified();
            if self.is_over.load(Ordering::Acquire) {
                return;
            }
            news.await;
        }
    }
}

/// All flights of a mirror. The lock is never held across an await or a system call.
#[derive(Debug, Default)]
pub(super) struct Flights {
    table: Mutex<HashMap<Chunk, Arc<Flight>>>,
}

impl Flights {
    /// The table, under its lock. States change from absent and to absent only while it is held.
    pub(super) fn lock(&self) -> MutexGuard<'_, HashMap<Chunk, Arc<Flight>>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A chunk that somebody has claimed, and its flight. Whoever holds it sees to the landing; if it is dropped before
/// (by a panic, or because its worker ends), all who wait get an error instead of waiting for ever.
#[derive(Debug)]
pub(super) struct Claim {
    pub(super) chunk: Chunk,
    pub(super) flight: Arc<Flight>,
    /// When those who wait have waited long enough.
    pub(super) deadline: Instant,
    flights: Arc<Flights>,
}

impl Claim {
    /// Begins a flight, for which `table`, the locked table of `flights`, has no entry yet.
    pub(super) fn begin(
        flights: &Arc<Flights>,
        table: &mut HashMap<Chunk, Arc<Flight>>,
        chunk: Chunk,
        deadline: Instant,
        ahead: Option<&Arc<Ahead>>,
    ) -> Self {
        let flight = Arc::new(Flight { ahead: ahead.cloned(), ..Flight::default() });
        table.insert(chunk, Arc::clone(&flight));
        Self { chunk, flight, deadline, flights: Arc::clone(flights) }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut table = self.flights.lock();
        if table.get(&self.chunk).is_some_and(|flight| Arc::ptr_eq(flight, &self.flight)) {
            table.remove(&self.chunk);
        }
        drop(table);
        if !self.flight.has_landed() {
            self.flight.land(Err(Error::new(ErrorKind::Io, "the fetch was given up")));
        }
        self.flight.is_over.store(true, Ordering::Release);
        self.flight.news.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mirror::chunks::Geometry;
    use futures_util::poll;
    use std::pin::pin;

    #[tokio::test]
    async fn all_who_wait_get_the_same_result_and_so_does_who_comes_late() {
        let flight = Flight::default();
        let mut first = pin!(flight.wait());
        let mut second = pin!(flight.wait());
        assert!(poll!(&mut first).is_pending() && poll!(&mut second).is_pending());
        let data = ChunkData::Bytes(Bytes::from_static(b"x").into());
        flight.land(Ok(data.clone()));
        assert_eq!(first.await.unwrap(), data);
        assert_eq!(second.await.unwrap(), data);
        assert_eq!(flight.wait().await.unwrap(), data);
    }

    #[tokio::test]
    async fn a_waiter_that_leaves_fails_nobody() {
        let flight = Flight::default();
        let mut stays = pin!(flight.wait());
        {
            let mut leaves = pin!(flight.wait());
            assert!(poll!(&mut leaves).is_pending());
            assert!(poll!(&mut stays).is_pending());
        }
        flight.land(Ok(ChunkData::Zero));
        assert_eq!(stays.await.unwrap(), ChunkData::Zero);
    }

    #[tokio::test]
    async fn a_claim_that_is_dropped_fails_who_waits_and_makes_way() {
        let flights = Arc::new(Flights::default());
        let chunk = Geometry::new(1, 4096).chunk(0).unwrap();
        let begin = || Claim::begin(&flights, &mut flights.lock(), chunk, Instant::now(), None);
        let claim = begin();
        let flight = Arc::clone(&claim.flight);
        drop(claim);
        assert_eq!(flight.wait().await.unwrap_err().to_string(), "the fetch was given up");
        assert!(flights.lock().is_empty());
        let (old, new) = (begin(), begin());
        old.flight.land(Ok(ChunkData::Zero));
        drop(old);
        assert!(Arc::ptr_eq(&flights.lock()[&chunk], &new.flight), "only its own entry goes");
    }

    #[tokio::test]
    async fn a_failure_is_everybodys_and_final() {
        let flight = Flight::default();
        flight.land(Err(Error::new(ErrorKind::Io, "no")));
        flight.land(Ok(ChunkData::Zero));
        assert_eq!(flight.wait().await.unwrap_err().to_string(), "no");
    }
}
