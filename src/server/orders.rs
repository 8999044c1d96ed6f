//! Orders to one connection, from wherever operators are to the worker where it lives.
//!
//! Owns: the way there and the reports back. Does not own: carrying them out (`transmission`). At most one order to
//! switch waits for a connection, and those who give more wait for each other.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::task::AtomicWaker;
use thiserror::Error;
use tokio::sync::{Semaphore, oneshot};

use crate::error::Error;
use crate::export::SharedExport;

/// What came of putting another export under a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Switched {
    /// For how long no request of the client was taken.
    pub pause: Duration,
    /// Requests that were under way when it was ordered.
    pub in_flight: u64,
}

/// Why another export could not be put under a client.
#[derive(Debug, Clone, Error)]
pub enum SwitchError {
    /// It has left, or is about to.
    #[error("the client has left")]
    Gone,
    /// What it wrote could not be made durable where it is, and so it stays there.
    #[error("what the client wrote cannot be made durable: {0}")]
    Flush(Error),
    /// It has an older content of the image, and so it stays there.
    #[error("the client has an older content of the image than its name stands for now")]
    OtherImage,
    /// What it had asked took too long, and so it stays where it is.
    #[error("the requests under way took too long")]
    TooLong,
}

/// To put another export under the connection.
pub(super) struct SwitchOrder {
    /// With what operators call it; `None`: the connection's own one.
    pub(super) export: Option<(SharedExport, String)>,
    pub(super) report: oneshot::Sender<Result<Switched, SwitchError>>,
}

impl fmt::Debug for SwitchOrder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let label = self.export.as_ref().map(|(_, label)| label);
        f.debug_struct("SwitchOrder").field("export", &label).finish_non_exhaustive()
    }
}

/// What a connection is told.
#[derive(Debug)]
pub(super) enum Order {
    Switch(SwitchOrder),
    Close,
}

/// Where the orders to one connection lie until it takes them.
#[derive(Debug)]
pub(super) struct Desk {
    tray: Mutex<Tray>,
    /// Whether anything lies there, so that the connection, which looks before each wait, need not lock it.
    is_laden: AtomicBool,
    waker: AtomicWaker,
    /// Held by whoever waits for a switch.
    turnstile: tokio::sync::Mutex<()>,
    /// Has no permits, and is closed when the connection has left.
    left: Semaphore,
}

#[derive(Debug, Default)]
struct Tray {
    switch: Option<SwitchOrder>,
    close: bool,
    is_over: bool,
}

impl Default for Desk {
    fn default() -> Self {
        Self {
            tray: Mutex::default(),
            is_laden: AtomicBool::new(false),
            waker: AtomicWaker::new(),
            turnstile: tokio::sync::Mutex::default(),
            left: Semaphore::new(0),
        }
    }
}

impl Desk {
    /// Orders a switch and waits for the report.
    ///
    /// Cancel safety: an order that is not done yet is given up; the client stays where it is.
    pub(super) async fn switch(&self, export: Option<(SharedExport, String)>) -> Result<Switched, SwitchError> {
        let _turn = self.turnstile.lock().await;
        let (report, reported) = oneshot::channel();
        {
            let mut tray = self.lock();
            if tray.is_over {
                return Err(SwitchError::Gone);
            }
            tray.switch = Some(SwitchOrder { export, report });
        }
        self.ring();
        reported.await.unwrap_or(Err(SwitchError::Gone))
    }

    /// Orders the connection to close when all is answered.
    pub(super) fn close(&self) {
        self.lock().close = true;
        self.ring();
    }

    /// Whether it is ordered to close.
    #[cfg(test)]
    pub(super) fn is_closing(&self) -> bool {
        self.lock().close
    }

    fn ring(&self) {
        self.is_laden.store(true, Ordering::Release);
        self.waker.wake();
    }

    /// Waits for an order. For the one task that the connection is. A switch is left where it is if it is not `free`
    /// for one.
    pub(super) fn poll_order(&self, context: &Context<'_>, free: bool) -> Poll<Order> {
        self.waker.register(context.waker());
        if !self.is_laden.swap(false, Ordering::Acquire) {
            return Poll::Pending;
        }
        let mut tray = self.lock();
        // What is left is looked at again.
        self.is_laden.store(tray.switch.is_some() && (tray.close || !free), Ordering::Relaxed);
        if std::mem::take(&mut tray.close) {
            return Poll::Ready(Order::Close);
        }
        // Those who do not wait for the report any more have taken the order back.
        let switch = if free { tray.switch.take().filter(|order| !order.report.is_closed()) } else { None };
        switch.map_or(Poll::Pending, |order| Poll::Ready(Order::Switch(order)))
    }

    /// The connection is no more: nobody will take orders, and whoever waits is told.
    pub(super) fn leave(&self) {
        let order = {
            let mut tray = self.lock();
            tray.is_over = true;
            tray.switch.take()
        };
        drop(order);
        self.left.close();
    }

    pub(super) fn has_left(&self) -> bool {
        self.left.is_closed()
    }

    /// Waits until the connection has left.
    pub(super) async fn left(&self) {
        // There are no permits: it ends with the semaphore.
        let _ = self.left.acquire().await;
    }

    fn lock(&self) -> MutexGuard<'_, Tray> {
        self.tray.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::future::poll_fn;
    use std::pin::pin;

    #[tokio::test]
    async fn one_order_at_a_time_lies_on_the_desk() {
        let desk = Desk::default();
        let (mut first, mut second) = (pin!(desk.switch(None)), Box::pin(desk.switch(None)));
        assert!(futures_util::poll!(first.as_mut()).is_pending());
        assert!(futures_util::poll!(&mut second).is_pending());
        let order = poll_fn(|context| desk.poll_order(context, true)).await;
        let Order::Switch(order) = order else { panic!("{order:?}") };
        assert!(futures_util::poll!(poll_fn(|context| desk.poll_order(context, true))).is_pending());
        let done = Switched { pause: Duration::ZERO, in_flight: 3 };
        order.report.send(Ok(done)).unwrap();
        assert_eq!(first.await.unwrap(), done);
        assert!(futures_util::poll!(&mut second).is_pending());
        // It is not free for one, and a close comes first.
        assert!(futures_util::poll!(poll_fn(|context| desk.poll_order(context, false))).is_pending());
        desk.close();
        assert!(matches!(poll_fn(|context| desk.poll_order(context, true)).await, Order::Close));
        assert!(matches!(poll_fn(|context| desk.poll_order(context, true)).await, Order::Switch(_)));
        // That one was thrown away without a report.
        assert!(matches!(second.await, Err(SwitchError::Gone)));
    }

    #[tokio::test]
    async fn an_order_that_nobody_waits_for_is_none() {
        let desk = Desk::default();
        {
            let mut given_up = Box::pin(desk.switch(None));
            assert!(futures_util::poll!(&mut given_up).is_pending());
        }
        assert!(futures_util::poll!(poll_fn(|context| desk.poll_order(context, true))).is_pending());
    }

    #[tokio::test]
    async fn all_who_wait_are_told_that_the_connection_has_left() {
        let desk = Desk::default();
        let mut switch = Box::pin(desk.switch(None));
        let mut left = Box::pin(desk.left());
        assert!(futures_util::poll!(&mut switch).is_pending() && futures_util::poll!(&mut left).is_pending());
        desk.leave();
        assert!(matches!(switch.await, Err(SwitchError::Gone)));
        left.await;
        assert!(desk.has_left());
        assert!(matches!(desk.switch(None).await, Err(SwitchError::Gone)));
    }
}
