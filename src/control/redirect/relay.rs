//! An export of another server, put under clients that stay connected here.
//!
//! Owns: what happens when the other server cannot answer. Does not own: connections and retries (`upstream`), putting
//! it under clients (`server`).
//!
//! **Read-only exports** have the old export behind them. A server that says nothing for [`SILENCE`], to any request, or
//! that fails, is answered for by the old one; once that has worked the relay *goes back*: it asks the old one first from
//! then on, and whoever made it is told. While the old one cannot answer either, both are asked in turns until
//! [`PATIENCE`] ends.
//!
//! **Writable exports** have nothing behind them: writes to two places would be lost in one. They wait as for any
//! upstream.

use std::io::IoSlice;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use tokio::sync::watch;

use crate::clock;
use crate::error::{Error, ErrorKind, Result};
use crate::export::{
    Check, Client, Context, Export, Facts, FileRange, LocalFuture, Piece, SharedExport, TryRead, TryWrite,
};
use crate::nbd::Extent;
use crate::nbd::request::{Durability, ZeroMode};
use crate::ranges::ByteRange;

/// How long the other server may answer nothing at all while something is asked of it.
pub const SILENCE: Duration = Duration::from_secs(2);
/// How long a request is tried, on both servers: under the 30 seconds after which clients commonly give up.
pub const PATIENCE: Duration = Duration::from_secs(25);
/// Between two rounds in which neither could answer.
const PAUSE: Duration = Duration::from_millis(100);

/// An export of another server in the place of one of ours.
#[derive(Debug)]
pub struct Relay {
    target: SharedExport,
    old: SharedExport,
    /// As clients know them.
    facts: Facts,
    /// What the target can do.
    offered: Facts,
    /// Whether it takes hints about what will be read.
    takes_hints: bool,
    /// When it last answered anything.
    answered: Mutex<Instant>,
    /// Why the old one serves again.
    went_back: watch::Sender<Option<String>>,
}

impl Relay {
    /// Serves what was served from `old` from `target`, which has the same size and access.
    pub fn new(target: SharedExport, old: SharedExport, takes_hints: bool) -> Self {
        let (facts, offered) = (old.facts(), target.facts());
        let (answered, went_back) = (Mutex::new(clock::now()), watch::Sender::new(None));
        Self { target, old, facts, offered, takes_hints, answered, went_back }
    }

    /// Becomes the reason when the old export serves again because the target could not. The channel closes with the
    /// last client.
    pub fn went_back(&self) -> watch::Receiver<Option<String>> {
        self.went_back.subscribe()
    }

    fn is_back(&self) -> bool {
        self.went_back.borrow().is_some()
    }

    /// Asks the target; gives it up when it is silent.
    async fn ask_target<T>(&self, request: LocalFuture<'_, Result<T>>) -> Result<T> {
        let mut since = clock::now();
        let mut request = request;
        loop {
            let silent_at = since + SILENCE;
            tokio::select! {
                biased;
                result = &mut request => {
                    if result.is_ok() {
                        *self.answered() = clock::now();
                    }
                    return result;
                }
                () = tokio::time::sleep_until(silent_at.into()) => {}
            }
            // Others may have been answered meanwhile: then it is slow, and not dead.
            let answered = *self.answered();
            if answered <= since {
                return Err(Error::new(ErrorKind::Unavailable, format!("it says nothing for {SILENCE:?}")));
            }
            since = answered;
        }
    }

    fn answered(&self) -> std::sync::MutexGuard<'_, Instant> {
        self.answered.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Asks the server that serves now, and the other one if it cannot answer, until patience ends.
    async fn ask<'a, T>(&'a self, how: impl Fn(&'a SharedExport) -> LocalFuture<'a, Result<T>>) -> Result<T> {
        if self.facts.writable {
            return how(&self.target).await;
        }
        let deadline = clock::now() + PATIENCE;
        loop {
            let error = match self.ask_both(&how).await {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            if clock::now() + PAUSE >= deadline {
                return Err(error);
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    async fn ask_both<'a, T>(&'a self, how: &impl Fn(&'a SharedExport) -> LocalFuture<'a, Result<T>>) -> Result<T> {
        if self.is_back() {
            return match how(&self.old).await {
                Ok(answer) => Ok(answer),
                Err(error) => self.ask_target(how(&self.target)).await.map_err(|_| error),
            };
        }
        let reason = match self.ask_target(how(&self.target)).await {
            Ok(answer) => return Ok(answer),
            Err(reason) => reason,
        };
        let answer = how(&self.old).await?;
        let reason = reason.chain();
        let is_first = self.went_back.send_if_modified(|known| {
            let is_first = known.is_none();
            known.get_or_insert_with(|| reason.clone());
            is_first
        });
        if is_first {
            tracing::warn!(reason, "the server that clients were moved to cannot answer: serving them from here again");
        }
        Ok(answer)
    }

    /// Whom changes are for. A read-only export refuses them by itself.
    fn written(&self) -> &SharedExport {
        if self.facts.writable { &self.target } else { &self.old }
    }
}

#[deny(clippy::missing_trait_methods)]
impl Export for Relay {
    fn facts(&self) -> Facts {
        self.facts.clone()
    }

    fn try_read(&self, range: ByteRange, output: &mut BytesMut) -> TryRead {
        if self.is_back() { self.old.try_read(range, output) } else { TryRead::Wait }
    }

    fn file_id(&self) -> Option<[u64; 2]> {
        None
    }

    fn in_file(&self, range: ByteRange) -> Option<FileRange> {
        if self.is_back() { self.old.in_file(range) } else { None }
    }

    fn is_in_file(&self, range: ByteRange) -> bool {
        self.is_back() && self.old.is_in_file(range)
    }

    fn read(&self, range: ByteRange) -> LocalFuture<'_, Result<Vec<Piece>>> {
        Box::pin(self.ask(move |export| export.read(range)))
    }

    fn read_verified<'a>(&'a self, range: ByteRange, check: &'a Check<'a>) -> LocalFuture<'a, Result<Vec<Piece>>> {
        Box::pin(self.ask(move |export| export.read_verified(range, check)))
    }

    fn manifest(&self) -> Option<SharedExport> {
        self.old.manifest()
    }

    fn profile(&self) -> Option<SharedExport> {
        self.old.profile()
    }

    fn profile_inbox(&self) -> Option<SharedExport> {
        self.old.profile_inbox()
    }

    /// One for all connections: the old one would serve them from here.
    fn connect(&self, _: Client) -> Option<SharedExport> {
        None
    }

    fn try_write(&self, _: u64, _: &[IoSlice<'_>]) -> TryWrite {
        TryWrite::Wait
    }

    fn write(&self, offset: u64, data: Bytes, durability: Durability) -> LocalFuture<'_, Result<()>> {
        self.written().write(offset, data, durability)
    }

    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode, durability: Durability) -> LocalFuture<'_, Result<()>> {
        if mode.must_be_fast && self.facts.writable && !self.offered.can_zero_fast {
            let error = Error::new(ErrorKind::Unsupported, "the other server cannot zero faster than it writes");
            return Box::pin(std::future::ready(Err(error)));
        }
        self.written().write_zeroes(range, mode, durability)
    }

    fn trim(&self, range: ByteRange, durability: Durability) -> LocalFuture<'_, Result<()>> {
        self.written().trim(range, durability)
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        self.written().flush()
    }

    /// A hint: nobody is told that it was lost.
    fn cache(&self, range: ByteRange) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            if self.is_back() {
                return self.old.cache(range).await;
            }
            if self.takes_hints {
                let _ = self.ask_target(self.target.cache(range)).await;
            }
            Ok(())
        })
    }

    fn extents(&self, range: ByteRange, context: Context, limit: usize) -> LocalFuture<'_, Result<Vec<Extent>>> {
        if !self.is_back() && !self.offered.contexts.contains(&context) {
            // Everything may be data, and nothing is known to be here.
            return Box::pin(std::future::ready(Ok(vec![Extent { length: range.length(), status: 0 }])));
        }
        Box::pin(self.ask(move |export| export.extents(range, context, limit)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::assemble;
    use crate::export::conformance::{check, sample_contents};
    use crate::export::memory::Memory;
    use crate::export::wrappers::{Fault, Gate};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    fn memory(bytes: &[u8]) -> SharedExport {
        Arc::new(Memory::holding(bytes).read_only())
    }

    /// Fails all reads as long as it is told to.
    fn failing(below: SharedExport) -> (SharedExport, Arc<AtomicBool>) {
        let fails = Arc::new(AtomicBool::new(true));
        let asked = Arc::clone(&fails);
        let plan = move |_| asked.load(Ordering::Relaxed).then(|| Error::new(ErrorKind::Io, "broken"));
        (Arc::new(Fault::new(below, plan)), fails)
    }

    async fn first_byte(relay: &Relay) -> Result<u8> {
        Ok(assemble(&relay.read(ByteRange::between(0, 1)).await?)[0])
    }

    #[tokio::test]
    async fn a_relay_conforms() {
        let contents = sample_contents(777_777, 3);
        let relay = Relay::new(memory(&contents), Arc::new(Memory::zeroed(777_777).read_only()), true);
        check(&relay, contents.clone()).await;
        assert!(relay.went_back().borrow().is_none());
        let target = Arc::new(Memory::holding(contents.clone()));
        let old = Arc::new(Memory::zeroed(777_777));
        check(&Relay::new(Arc::clone(&target) as SharedExport, Arc::clone(&old) as SharedExport, false), contents)
            .await;
        let bytes = assemble(&old.read(ByteRange::between(0, 777_777)).await.unwrap());
        assert!(bytes.iter().all(|byte| *byte == 0), "a write went to the old server");
    }

    #[tokio::test]
    async fn a_relay_that_went_back_conforms() {
        let contents = sample_contents(99_999, 4);
        let (target, _) = failing(memory(&contents));
        let relay = Relay::new(target, memory(&contents), true);
        check(&relay, contents).await;
        assert!(relay.is_back());
    }

    #[tokio::test]
    async fn a_server_that_fails_is_left_for_good() {
        let (target, fails) = failing(memory(&[1]));
        let relay = Relay::new(target, memory(&[2]), true);
        let told = relay.went_back();
        assert_eq!(first_byte(&relay).await.unwrap(), 2);
        assert_eq!(told.borrow().as_deref(), Some("broken"));
        fails.store(false, Ordering::Relaxed);
        assert_eq!(first_byte(&relay).await.unwrap(), 2, "it stays where it is");
    }

    #[tokio::test]
    async fn as_long_as_one_of_the_two_answers_there_is_no_error() {
        let (target, target_fails) = failing(memory(&[1]));
        let (old, old_fails) = failing(memory(&[2]));
        let relay = Relay::new(target, old, true);
        let reading = first_byte(&relay);
        let mending = async { target_fails.store(false, Ordering::Relaxed) };
        // Both fail in the first round.
        let (read, ()) = tokio::join!(reading, mending);
        assert_eq!(read.unwrap(), 1);
        assert!(!relay.is_back(), "it never worked");
        target_fails.store(true, Ordering::Relaxed);
        old_fails.store(false, Ordering::Relaxed);
        assert_eq!(first_byte(&relay).await.unwrap(), 2);
        old_fails.store(true, Ordering::Relaxed);
        target_fails.store(false, Ordering::Relaxed);
        assert_eq!(first_byte(&relay).await.unwrap(), 1, "the old one has died since");
    }

    #[tokio::test]
    async fn a_silent_server_costs_a_bounded_wait() {
        let relay = Relay::new(Arc::new(Gate::new(memory(&[1]))), memory(&[2]), true);
        assert_eq!(first_byte(&relay).await.unwrap(), 2);
        assert!(relay.went_back().borrow().as_deref().unwrap().contains("says nothing"));
        let mut output = BytesMut::new();
        assert_eq!(relay.try_read(ByteRange::between(0, 1), &mut output), TryRead::Data, "and nothing from then on");
    }

    #[tokio::test]
    async fn what_the_server_lacks_is_made_up_for() {
        let target =
            Memory::zeroed(4096).with_facts(|facts| (facts.can_zero_fast, facts.contexts) = (false, Vec::new()));
        let relay = Relay::new(Arc::new(target), Arc::new(Memory::zeroed(4096)), false);
        let range = ByteRange::between(0, 4096);
        let mode = ZeroMode { may_punch: true, must_be_fast: true };
        let refusal = relay.write_zeroes(range, mode, Durability::Volatile).await.unwrap_err();
        assert_eq!(refusal.kind(), ErrorKind::Unsupported);
        for context in [Context::Allocation, Context::Residency] {
            let extents = relay.extents(range, context, 9).await.unwrap();
            assert_eq!(extents, [Extent { length: 4096, status: 0 }]);
        }
        relay.cache(range).await.unwrap();
    }
}
