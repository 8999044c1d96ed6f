//! How fast an image may be read for its digests, and when that is to stop.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::clock;

/// Waiting threads look this often whether they are to stop.
const GLANCE: Duration = Duration::from_millis(20);

/// How fast images are read, which may change meanwhile. Cheap to clone; all clones are one.
#[derive(Debug, Clone, Default)]
pub struct Rate(Arc<AtomicU64>);

/// In the place of a rate. One of 0 would never end.
const NO_LIMIT: u64 = 0;

impl Rate {
    /// Bytes per second; `None`: as fast as it goes.
    pub fn new(rate: Option<u64>) -> Self {
        Self(Arc::new(AtomicU64::new(rate.unwrap_or(NO_LIMIT))))
    }

    /// What it is now.
    pub fn get(&self) -> Option<u64> {
        Some(self.0.load(Ordering::Relaxed)).filter(|rate| *rate != NO_LIMIT)
    }

    /// Changes it, for what is read from now on.
    pub fn set(&self, rate: Option<u64>) {
        self.0.store(rate.unwrap_or(NO_LIMIT), Ordering::Relaxed);
    }
}

/// Shared by all threads that read one image.
pub(super) struct Pace<'a> {
    is_cancelled: &'a (dyn Fn() -> bool + Sync),
    rate: Rate,
    /// When the next read may begin.
    due: Mutex<Instant>,
}

impl<'a> Pace<'a> {
    pub(super) fn new(rate: Rate, is_cancelled: &'a (dyn Fn() -> bool + Sync)) -> Self {
        Self { is_cancelled, rate, due: Mutex::new(clock::now()) }
    }

    /// Waits until `bytes` may be read. An error of kind [`io::ErrorKind::Interrupted`]: it is to stop.
    pub(super) fn admit(&self, bytes: u64) -> io::Result<()> {
        if let Some(rate) = self.rate.get() {
            let due = {
                let mut due = self.due.lock().unwrap_or_else(PoisonError::into_inner);
                // Time that nobody used is not made up for.
                let begin = (*due).max(clock::now());
                *due = begin + cost(bytes, rate);
                begin
            };
            while !self.is_cancelled() && clock::now() < due {
                if self.rate.get() != Some(rate) {
                    // What was read is paid for at the old rate no longer.
                    *self.due.lock().unwrap_or_else(PoisonError::into_inner) = clock::now();
                    break;
                }
                thread::sleep(due.saturating_duration_since(clock::now()).min(GLANCE));
            }
        }
        if self.is_cancelled() { Err(io::ErrorKind::Interrupted.into()) } else { Ok(()) }
    }

    pub(super) fn is_cancelled(&self) -> bool {
        (self.is_cancelled)()
    }
}

fn cost(bytes: u64, rate: u64) -> Duration {
    let nanoseconds = u128::from(bytes) * 1_000_000_000 / u128::from(rate.max(1));
    Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[test]
    fn bytes_cost_time() {
        assert_eq!(cost(100, 100), Duration::from_secs(1));
        assert_eq!(cost(1 << 20, 4 << 20), Duration::from_millis(250));
        assert_eq!(cost(1, 0), Duration::from_secs(1));
    }

    #[test]
    fn a_new_rate_ends_the_waiting_for_the_old_one() {
        let rate = Rate::new(Some(1));
        let pace = Pace::new(rate.clone(), &|| false);
        pace.admit(1 << 40).unwrap();
        thread::scope(|scope| {
            let waiting = scope.spawn(|| pace.admit(1));
            rate.set(None);
            waiting.join().unwrap().unwrap();
        });
        assert_eq!(rate.get(), None);
        pace.admit(1 << 40).unwrap();
    }

    #[test]
    fn readers_share_one_rate_and_stop_when_told() {
        let cancel = AtomicBool::new(false);
        let is_cancelled = || cancel.load(Ordering::Relaxed);
        let pace = Pace::new(Rate::new(Some(1000)), &is_cancelled);
        let began = clock::now();
        // The first begins at once, and the second when the first is paid for.
        pace.admit(50).unwrap();
        pace.admit(1_000_000_000).unwrap();
        assert!(clock::now() - began >= Duration::from_millis(50));
        cancel.store(true, Ordering::Relaxed);
        assert_eq!(pace.admit(1).unwrap_err().kind(), io::ErrorKind::Interrupted);
    }
}
