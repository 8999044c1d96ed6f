//! The export that takes runs from mirrors below.
//!
//! A mirror writes [`Profiles`](super::Profiles) from offset 0 on and flushes; they are one run for each workload in
//! them. What is not right is answered with `EINVAL` at the flush, and is gone. A message belongs to its connection:
//! nobody reads or spoils another's.
//!
//! Memory: [`MOST_MESSAGES`] messages at a time for one image, of [`INBOX`] bytes at most; one that is too many is
//! answered with `ENOMEM`, and so is a run too many: [`BURST`] at once, then one a second.
//!
//! Owns: a message until it is whole. Does not own: what is learnt from it (`store`).

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::form::measure;
use super::store::{INBOX, Rejected, Store};
use crate::clock;
use crate::error::{Error, ErrorKind, Result};
use crate::export::{Client, Export, Facts, LocalFuture, Piece, SharedExport, push_piece};
use crate::nbd::request::{Durability, ZeroMode};
use crate::ranges::ByteRange;
use crate::units::{to_u64, to_usize};

/// What an inbox says of itself. Only an export that says so is written to: servers that ignore the name of an export
/// would have their image written over.
pub(super) const DESCRIPTION: &str = "headwater profile inbox, version 1";

/// Messages being written at the same time, for one image: 16 MiB and some.
const MOST_MESSAGES: usize = 8;
/// Runs that are taken at once: those of a rack of mirrors after a power cut.
const BURST: u32 = 64;
/// Then there is room for one more after each such time.
const REFILL: Duration = Duration::from_secs(1);

/// How many runs may come.
#[derive(Debug)]
pub(super) struct Rate {
    /// As many as were taken lately, in units of [`REFILL`], lie between now and this.
    full_until: Option<Instant>,
}

impl Rate {
    pub(super) const fn new() -> Self {
        Self { full_until: None }
    }

    /// Whether another one may come at `now`, which counts it. A token bucket, as the time at which it is full again.
    pub(super) fn admits(&mut self, now: Instant) -> bool {
        let level = self.full_until.map_or(now, |until| until.max(now));
        let fits = level.duration_since(now) + REFILL <= REFILL * BURST;
        if fits {
            self.full_until = Some(level + REFILL);
        }
        fits
    }
}

/// An inbox: of everybody, which takes nothing, or of one connection.
#[derive(Debug)]
pub(super) struct Inbox {
    store: Arc<Store>,
    message: Option<Mutex<Message>>,
}

/// What one connection has written. What lies behind its end is zero.
#[derive(Debug)]
struct Message {
    store: Arc<Store>,
    bytes: Vec<u8>,
    /// Whether it is counted among [`Store::messages`]: as long as it has memory.
    is_counted: bool,
}

impl Message {
    /// Makes room for bytes up to `end`.
    fn grow(&mut self, end: u64) -> Result<()> {
        if !self.is_counted {
            let count = |count| (count < MOST_MESSAGES).then_some(count + 1);
            let counted = self.store.messages.fetch_update(Ordering::Relaxed, Ordering::Relaxed, count);
            counted.map_err(|_| Error::new(ErrorKind::NoMemory, "too many profiles are being written"))?;
            self.is_counted = true;
        }
        let end = to_usize(end);
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        Ok(())
    }

    fn clear(&mut self) -> Vec<u8> {
        if std::mem::take(&mut self.is_counted) {
            self.store.messages.fetch_sub(1, Ordering::Relaxed);
        }
        std::mem::take(&mut self.bytes)
    }
}

impl Drop for Message {
    fn drop(&mut self) {
        self.clear();
    }
}

impl Inbox {
    pub(super) const fn new(store: Arc<Store>) -> Self {
        Self { store, message: None }
    }

    /// Never held across an await.
    fn message(&self) -> Result<MutexGuard<'_, Message>> {
        let message = self.message.as_ref();
        let message = message.ok_or_else(|| Error::new(ErrorKind::Invalid, "an inbox belongs to a connection"))?;
        Ok(message.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn put(&self, offset: u64, data: &[u8]) -> Result<()> {
        let mut message = self.message()?;
        let end = offset + to_u64(data.len());
        message.grow(end)?;
        message.bytes[to_usize(offset)..to_usize(end)].copy_from_slice(data);
        Ok(())
    }

    fn clear(&self, range: ByteRange) -> Result<()> {
        let mut message = self.message()?;
        let end = to_usize(range.end()).min(message.bytes.len());
        if let Some(bytes) = message.bytes.get_mut(to_usize(range.start())..end) {
            bytes.fill(0);
        }
        Ok(())
    }

    fn get(&self, range: ByteRange) -> Result<Vec<Piece>> {
        let message = self.message()?;
        let end = to_usize(range.end()).min(message.bytes.len());
        let written = message.bytes.get(to_usize(range.start())..end).unwrap_or_default();
        let mut pieces = Vec::new();
        push_piece(&mut pieces, Piece::Data(Bytes::copy_from_slice(written)));
        push_piece(&mut pieces, Piece::Hole(range.length() - to_u64(written.len())));
        Ok(pieces)
    }

    /// Takes what has been written, if anything has.
    async fn deliver(&self) -> Result<()> {
        let bytes = self.message()?.clear();
        if bytes.is_empty() {
            return Ok(());
        }
        let store = Arc::clone(&self.store);
        // A thread of its own: two mebibytes take some milliseconds to be merged, and then they are saved.
        let taken = tokio::task::spawn_blocking(move || {
            let length = measure(&bytes).map_err(super::store::Refused::from)?;
            let (bytes, rest) = bytes.split_at_checked(length).unwrap_or((&[], &[]));
            if rest.iter().any(|byte| *byte != 0) {
                return Err(Rejected::Refused(super::FormatError::Damaged.into()));
            }
            store.take_message(bytes, clock::now())?;
            store.save();
            Ok(())
        });
        let taken = taken.await.map_err(|_| Error::new(ErrorKind::Io, "the thread died"))?;
        if let Err(error) = &taken {
            tracing::debug!(%error, "a profile from below is not taken");
        }
        taken.map_err(|rejected| match rejected {
            Rejected::Refused(refused) => refused.into(),
            Rejected::TooMany => Error::new(ErrorKind::NoMemory, rejected.to_string()),
        })
    }
}

fn done<'a, T: 'a>(result: Result<T>) -> LocalFuture<'a, Result<T>> {
    Box::pin(std::future::ready(result))
}

impl Export for Inbox {
    fn facts(&self) -> Facts {
        Facts { writable: true, is_shared: false, ..Facts::read_only(INBOX, DESCRIPTION) }
    }

    fn connect(&self, _: Client) -> Option<SharedExport> {
        let message = Message { store: Arc::clone(&self.store), bytes: Vec::new(), is_counted: false };
        Some(Arc::new(Self { store: Arc::clone(&self.store), message: Some(Mutex::new(message)) }))
    }

    fn read(&self, range: ByteRange) -> LocalFuture<'_, Result<Vec<Piece>>> {
        done(self.get(range))
    }

    /// Nothing of a message is durable before it is flushed, and then all of it.
    fn write(&self, offset: u64, data: Bytes, _: Durability) -> LocalFuture<'_, Result<()>> {
        done(self.put(offset, &data))
    }

    fn write_zeroes(&self, range: ByteRange, _: ZeroMode, _: Durability) -> LocalFuture<'_, Result<()>> {
        done(self.clear(range))
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.deliver())
    }
}

#[cfg(test)]
mod tests {
    use super::super::form::tests::{SIZE, run, tag};
    use super::super::{FormatError, Profiles};
    use super::*;
    use crate::export::assemble;

    fn store() -> Arc<Store> {
        Arc::new(Store::open(None, SIZE, None))
    }

    fn message() -> Bytes {
        Profiles::of_run(SIZE, None, tag("boot"), &run(0, 100)).encode().into()
    }

    async fn write(inbox: &SharedExport, offset: u64, data: Bytes) -> Result<()> {
        inbox.write(offset, data, Durability::Volatile).await
    }

    #[tokio::test]
    async fn what_is_written_and_flushed_is_one_run() {
        let store = store();
        let inbox = store.inbox();
        assert!(write(&inbox, 0, message()).await.is_err(), "it is nobody's");
        let mine = inbox.connect(Client::default()).unwrap();
        assert_eq!(mine.facts(), inbox.facts());
        mine.flush().await.unwrap();
        for runs in 1..=2 {
            let (first, rest) = (message().slice(..20), message().slice(20..));
            write(&mine, 20, rest).await.unwrap();
            write(&mine, 0, first).await.unwrap();
            let read = mine.read(ByteRange::between(0, INBOX)).await.unwrap();
            assert_eq!(assemble(&read)[..message().len()], message());
            mine.flush().await.unwrap();
            mine.flush().await.unwrap();
            assert_eq!(store.get(&tag("boot")).unwrap().runs(), runs, "each message once");
            assert_eq!(mine.read(ByteRange::between(0, INBOX)).await.unwrap(), [Piece::Hole(INBOX)]);
        }
    }

    #[tokio::test]
    async fn what_is_not_right_is_refused_and_forgotten() {
        let store = store();
        let mine = store.inbox().connect(Client::default()).unwrap();
        let foreign = Profiles::of_run(SIZE + 1, None, tag("boot"), &run(0, 100)).encode();
        let more = [&message()[..], b"x"].concat();
        let late = message().slice(1..);
        for wrong in [foreign.into(), more.into(), late, Bytes::from_static(b"x"), Bytes::from(vec![255; 2 << 20])] {
            write(&mine, 0, wrong).await.unwrap();
            assert_eq!(mine.flush().await.unwrap_err().kind(), ErrorKind::Invalid);
            mine.flush().await.unwrap();
        }
        assert!(store.is_empty());
        // The end of the inbox is a place like others, and what is cleared is zero.
        write(&mine, INBOX - 1, Bytes::from_static(b"x")).await.unwrap();
        write(&mine, 0, message()).await.unwrap();
        let zeroes = ZeroMode { may_punch: true, must_be_fast: false };
        mine.write_zeroes(ByteRange::between(INBOX - 1, INBOX), zeroes, Durability::Volatile).await.unwrap();
        mine.flush().await.unwrap();
        assert!(!store.is_empty());
        assert_eq!(Profiles::decode(&[]), Err(FormatError::NotOne));
    }

    #[tokio::test]
    async fn messages_have_a_bound() {
        let store = store();
        let inbox = store.inbox();
        let mut open: Vec<_> = (0..=MOST_MESSAGES).map(|_| inbox.connect(Client::default()).unwrap()).collect();
        for (index, one) in open.iter().enumerate() {
            assert_eq!(write(one, 0, message()).await.is_ok(), index < MOST_MESSAGES);
        }
        open[0].flush().await.unwrap();
        write(&open[MOST_MESSAGES], 0, message()).await.unwrap();
        open.truncate(MOST_MESSAGES);
        write(&open[0], 0, message()).await.unwrap();
        drop(open);
        assert_eq!(store.messages.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn runs_come_in_a_burst_and_then_one_a_second() {
        let (mut rate, start) = (Rate::new(), clock::now());
        let taken = |rate: &mut Rate, now| (0..1000).filter(|_| rate.admits(now)).count();
        assert_eq!(taken(&mut rate, start), 64);
        assert_eq!(taken(&mut rate, start + Duration::from_secs(3)), 3);
        assert_eq!(taken(&mut rate, start + Duration::from_secs(1000)), 64);
    }
}
