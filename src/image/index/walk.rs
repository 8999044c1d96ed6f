//! Several threads that read one image, each block once.
//!
//! Owns: who reads what, and ending when one of them fails. Does not own: what is done with a block.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use super::MAX_THREADS;
use super::pace::Pace;
use super::reader::Reader;
use crate::ranges::ByteRange;
use crate::units::MIB;

/// What a thread takes at a time. A whole number of chunks of any size.
pub(super) const BLOCK: u64 = 4 * MIB;

/// Whose fault it was.
#[derive(Debug)]
pub(super) enum Failure {
    /// The image's. Of kind [`io::ErrorKind::Interrupted`]: nobody's, it was told to stop.
    Read(io::Error),
    /// That of the file into which its digests go.
    Write(io::Error),
}

/// One image being read.
pub(super) struct Walk<'a> {
    /// Bytes of the image.
    size: u64,
    pub(super) pace: Pace<'a>,
    /// The block to be taken next.
    next: AtomicU64,
    /// Another thread has failed.
    has_failed: AtomicBool,
}

impl<'a> Walk<'a> {
    /// Begins with block number `first`.
    pub(super) fn new(size: u64, first: u64, pace: Pace<'a>) -> Self {
        Self { size, pace, next: AtomicU64::new(first), has_failed: AtomicBool::new(false) }
    }

    /// Does `work` with each block, on this thread and up to `threads - 1` more, until there are none left, one failed,
    /// or it is to stop. That it stopped is no failure.
    pub(super) fn run(
        &self,
        threads: usize,
        reader: impl Fn() -> io::Result<Box<dyn Reader>> + Sync,
        work: impl Fn(&mut dyn Reader, u64, ByteRange) -> Result<(), Failure> + Sync,
    ) -> Result<(), Failure> {
        let one = || {
            let result = reader().map_err(Failure::Read).and_then(|mut reader| self.take(&mut *reader, &work));
            self.has_failed.fetch_or(result.is_err(), Ordering::Relaxed);
            result
        };
        thread::scope(|scope| {
            let mut helpers = Vec::new();
            for number in 1..threads.min(MAX_THREADS) {
                match thread::Builder::new().name(format!("index-{number}")).spawn_scoped(scope, one) {
                    Ok(helper) => helpers.push(helper),
                    Err(error) => tracing::debug!(%error, "one thread less"),
                }
            }
            let mut result = one();
            for helper in helpers {
                let other = helper.join().expect("reading and hashing do not panic");
                result = result.and(other);
            }
            result
        })
    }

    fn take(
        &self,
        reader: &mut dyn Reader,
        work: &impl Fn(&mut dyn Reader, u64, ByteRange) -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        while !self.pace.is_cancelled() && !self.has_failed.load(Ordering::Relaxed) {
            let block = self.next.fetch_add(1, Ordering::Relaxed);
            if block >= self.size.div_ceil(BLOCK) {
                break;
            }
            let range = ByteRange::between(block * BLOCK, self.size.min((block + 1) * BLOCK));
            match work(reader, block, range) {
                Err(Failure::Read(error)) if error.kind() == io::ErrorKind::Interrupted => break,
                result => result?,
            }
        }
        Ok(())
    }
}
