//! The pace of one fetch: each of its requests leaves when the link has room for it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::{Engine, LOOK, Shared};
use crate::clock;
use crate::export::LocalFuture;
use crate::mirror::ahead::Pace;

/// The pace of one fetch.
#[derive(Debug)]
pub(super) struct Paced {
    pub(super) engine: Engine,
    pub(super) can_wait: bool,
    /// Of the whole fetch.
    pub(super) bytes: u64,
    /// Bytes that were let go and have not left yet.
    pub(super) admitted: AtomicU64,
    /// Bytes that have left.
    pub(super) left: AtomicU64,
}

/// A fetch that has begun and whose next request has to wait. Dropped, it does not any more.
struct Resting<'a>(&'a Shared);

impl<'a> Resting<'a> {
    fn new(shared: &'a Shared) -> Self {
        shared.link().resting += 1;
        Self(shared)
    }
}

impl Drop for Resting<'_> {
    fn drop(&mut self) {
        self.0.link().resting -= 1;
    }
}

impl Paced {
    /// What was let go, if it has not left yet.
    fn take_admitted(&self) -> u64 {
        self.admitted.swap(0, Ordering::Relaxed)
    }
}

impl Pace for Paced {
    fn part(&self) -> u64 {
        match self.admitted.load(Ordering::Relaxed) {
            0 => self.engine.0.link().part(self.bytes, self.can_wait, clock::now()),
            admitted => admitted,
        }
    }

    fn turn(&self, bytes: u64) -> LocalFuture<'_, ()> {
        Box::pin(async move {
            let shared = &self.engine.0;
            if self.admitted.load(Ordering::Relaxed) > 0 {
                // It may be less than was let go, at the end of an image.
                let admitted = self.take_admitted();
                shared.link().window.withdrawn(admitted.saturating_sub(bytes));
                self.left.fetch_add(bytes, Ordering::Relaxed);
                return;
            }
            let mut resting = None;
            loop {
                let news = shared.news.notified();
                let now = clock::now();
                let until = {
                    let mut link = shared.link();
                    match link.may_go_on(self.can_wait, now) {
                        Ok(()) => {
                            if self.can_wait {
                                link.calm.left(now);
                            }
                            link.window.sent(now, bytes);
                            self.left.fetch_add(bytes, Ordering::Relaxed);
                            drop(link);
                            drop(resting);
                            return;
                        }
                        Err(until) => until,
                    }
                };
                resting.get_or_insert_with(|| Resting::new(shared));
                let until = until.unwrap_or(now + LOOK);
                tokio::select! {
                    () = news => {}
                    () = tokio::time::sleep_until(until.into()) => {}
                }
            }
        })
    }

    fn hurried(&self, bytes: u64) {
        let admitted = self.take_admitted();
        self.left.fetch_add(bytes, Ordering::Relaxed);
        let mut link = self.engine.0.link();
        link.window.withdrawn(admitted);
        link.window.sent(clock::now(), bytes);
    }

    fn ended(&self, bytes: u64, latency: Option<Duration>) {
        let now = clock::now();
        let mut link = self.engine.0.link();
        match latency {
            Some(latency) => link.window.landed(now, bytes, latency),
            None => link.window.failed(now, bytes),
        }
        drop(link);
        self.engine.0.news.notify_waiters();
        self.engine.pump();
    }
}

impl Drop for Paced {
    fn drop(&mut self) {
        // It never left: there was nothing to fetch after all.
        let admitted = self.take_admitted();
        if admitted > 0 {
            self.engine.0.link().window.withdrawn(admitted);
            self.engine.0.wake.notify_one();
        }
    }
}
