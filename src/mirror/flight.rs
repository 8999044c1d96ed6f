//! Single flight: one fetch for all who want a chunk.
//!
//! A flight is an entry of the table from the moment somebody claims a chunk until its bytes are stored (or could
//! not be). The fetch belongs to the mirror, not to whoever claimed: if all readers go away it still ends, and none
//! of them can fail another by leaving. Readers that come between arrival and storing get the bytes from the flight.

use std::collections::HashMap;
use std::ops::{Deref, Range};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use bytes::Bytes;
use tokio::sync::Notify;
use tokio::time::Instant;

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
    landed: Notify,
}

impl Flight {
    fn has_landed(&self) -> bool {
        self.result.get().is_some()
    }

    /// Gives everybody the result. Only the first call counts.
    pub(super) fn land(&self, result: Result<ChunkData>) {
        if self.result.set(result).is_ok() {
            self.landed.notify_waiters();
        }
    }

    /// Waits for the chunk.
    ///
    /// Cancel safety: the flight goes on.
    pub(super) async fn wait(&self) -> Result<ChunkData> {
        loop {
            let landed = self.landed.notified();
            // Asked after the notification is armed, so that it cannot come in between.
            if let Some(result) = self.result.get() {
                return result.clone();
            }
            landed.await;
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
    ) -> Self {
        let flight = Arc::new(Flight::default());
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
        let begin = || Claim::begin(&flights, &mut flights.lock(), chunk, Instant::now());
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
