//! How far the end of this server is, as its connections see it, and who is ready for it.
//!
//! A server ends by draining, or is replaced by a successor that goes on with its connections: then it takes no
//! newcomers, waits for those that negotiate, holds all connections, and freezes them. Until they are frozen all of it
//! can be taken back.
//!
//! Owns: the stages, and counting who has reached which. Does not own: what a connection does at each (`connection`,
//! `transmission`).

use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use tokio::sync::{Notify, watch};

/// What a server is doing with its connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// Serving them.
    Serving,
    /// The same, and there are no newcomers.
    Closed,
    /// No requests are taken; those that change something are finished.
    Holding,
    /// Each is made into what a successor can go on with.
    Freezing,
    /// What has been received is answered, and then they are closed.
    Draining,
}

type Change = Pin<Box<dyn Future<Output = (watch::Receiver<Stage>, Stage)>>>;

/// The stages, as one connection learns of them.
pub(super) struct Stages {
    next: Change,
}

async fn change(mut stages: watch::Receiver<Stage>, known: Stage) -> (watch::Receiver<Stage>, Stage) {
    // It fails only when the server is gone, which is the end of draining.
    let stage = stages.wait_for(|stage| *stage != known).await.map_or(Stage::Draining, |stage| *stage);
    (stages, stage)
}

impl Stages {
    /// Those that come after [`Stage::Serving`].
    pub(super) fn of(stages: watch::Receiver<Stage>) -> Self {
        Self { next: Box::pin(change(stages, Stage::Serving)) }
    }

    /// Waits for the stage to change.
    pub(super) fn poll(&mut self, context: &mut Context<'_>) -> Poll<Stage> {
        let Poll::Ready((stages, stage)) = self.next.as_mut().poll(context) else { return Poll::Pending };
        self.next = Box::pin(change(stages, stage));
        Poll::Ready(stage)
    }
}

/// How many connections there are, and how many of them stand still.
#[derive(Debug, Default)]
pub(super) struct Muster {
    counts: Mutex<Counts>,
    changed: Notify,
}

#[derive(Debug, Default, Clone, Copy)]
struct Counts {
    negotiating: usize,
    serving: usize,
    still: usize,
}

impl Muster {
    /// Notes a newcomer, until what this gives is dropped.
    pub(super) fn negotiates(self: &Arc<Self>) -> Negotiating {
        self.lock().negotiating += 1;
        Negotiating(Arc::clone(self))
    }

    /// Notes a connection in its transmission phase, until what this gives is dropped.
    pub(super) fn serves(self: &Arc<Self>) -> Place {
        self.lock().serving += 1;
        Place { muster: Arc::clone(self), is_still: false }
    }

    /// Waits until nobody negotiates.
    pub(super) async fn nobody_negotiates(&self) {
        self.wait_for(|counts| counts.negotiating == 0).await;
    }

    /// Waits until all connections stand still.
    pub(super) async fn all_still(&self) {
        self.wait_for(|counts| counts.still == counts.serving).await;
    }

    /// How many connections do not stand still.
    pub(super) fn moving(&self) -> usize {
        let counts = *self.lock();
        counts.serving - counts.still
    }

    async fn wait_for(&self, reached: impl Fn(Counts) -> bool) {
        loop {
            let changed = self.changed.notified();
            if reached(*self.lock()) {
                return;
            }
            changed.await;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A newcomer.
#[derive(Debug)]
pub(super) struct Negotiating(Arc<Muster>);

impl Drop for Negotiating {
    fn drop(&mut self) {
        self.0.lock().negotiating -= 1;
        self.0.changed.notify_waiters();
    }
}

/// A connection's place among those that are served.
#[derive(Debug)]
pub(super) struct Place {
    muster: Arc<Muster>,
    is_still: bool,
}

impl Place {
    /// Notes whether it stands still.
    pub(super) fn set_still(&mut self, is_still: bool) {
        if self.is_still != is_still {
            self.is_still = is_still;
            let still = &mut self.muster.lock().still;
            *still = if is_still { *still + 1 } else { *still - 1 };
            self.muster.changed.notify_waiters();
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.set_still(false);
        self.muster.lock().serving -= 1;
        self.muster.changed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::future::poll_fn;
    use std::pin::pin;

    #[tokio::test]
    async fn a_connection_hears_of_each_stage() {
        let (sender, receiver) = watch::channel(Stage::Serving);
        let mut stages = Stages::of(receiver);
        let mut next = pin!(poll_fn(|context| stages.poll(context)));
        assert!(futures_util::poll!(&mut next).is_pending());
        sender.send(Stage::Holding).unwrap();
        assert_eq!(next.await, Stage::Holding);
        sender.send(Stage::Serving).unwrap();
        assert_eq!(poll_fn(|context| stages.poll(context)).await, Stage::Serving);
        drop(sender);
        assert_eq!(poll_fn(|context| stages.poll(context)).await, Stage::Draining);
    }

    #[tokio::test]
    async fn all_stand_still_when_the_last_does_or_leaves() {
        let muster = Arc::new(Muster::default());
        let newcomer = muster.negotiates();
        let (mut first, second) = (muster.serves(), muster.serves());
        let mut still = pin!(muster.all_still());
        let mut quiet = pin!(muster.nobody_negotiates());
        assert!(futures_util::poll!(&mut still).is_pending() && futures_util::poll!(&mut quiet).is_pending());
        drop(newcomer);
        quiet.await;
        first.set_still(true);
        first.set_still(true);
        assert!(futures_util::poll!(&mut still).is_pending());
        assert_eq!(muster.moving(), 1);
        drop(second);
        still.await;
        first.set_still(false);
        assert!(futures_util::poll!(pin!(muster.all_still())).is_pending());
        drop(first);
        muster.all_still().await;
    }
}
