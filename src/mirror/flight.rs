//! Single flight: one fetch for all who want a chunk.
//!
//! A flight is an entry of the table from the moment somebody claims a chunk until its bytes are stored (or could
//! not be). The fetch belongs to the mirror, not to whoever claimed: if all readers go away it still ends, and none
//! of them can fail another by leaving. Readers that come between arrival and storing get the bytes from the flight.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use bytes::Bytes;
use tokio::sync::Notify;

use super::chunks::Chunk;
use crate::error::Result;

/// The bytes of one chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum ChunkData {
    /// All of them.
    Bytes(Bytes),
    /// They are all zero.
    Zero,
}

/// A chunk on its way.
#[derive(Debug, Default)]
pub(super) struct Flight {
    result: OnceLock<Result<ChunkData>>,
    landed: Notify,
}

impl Flight {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::{Error, ErrorKind};
    use futures_util::poll;
    use std::pin::pin;

    #[tokio::test]
    async fn all_who_wait_get_the_same_result_and_so_does_who_comes_late() {
        let flight = Flight::default();
        let mut first = pin!(flight.wait());
        let mut second = pin!(flight.wait());
        assert!(poll!(&mut first).is_pending() && poll!(&mut second).is_pending());
        let data = ChunkData::Bytes(Bytes::from_static(b"x"));
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
    async fn a_failure_is_everybodys_and_final() {
        let flight = Flight::default();
        flight.land(Err(Error::new(ErrorKind::Io, "no")));
        flight.land(Ok(ChunkData::Zero));
        assert_eq!(flight.wait().await.unwrap_err().to_string(), "no");
    }
}
