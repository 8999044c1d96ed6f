//! A connection under orders: another export under it, a close when all is answered, a notice that is held back.
//!
//! Owns: how far each of them is. Does not own: the orders' way here (`orders`), and what the news are (`notices`).

use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context as TaskContext, Poll};
use std::time::{Duration, Instant};

use tokio::time::{Sleep, sleep};

use super::{End, Event, Phase, Transmission};
use crate::clock;
use crate::error::{ErrorKind, Result};
use crate::nbd::request::{Command, Extents};
use crate::ranges::ByteRange;
use crate::server::answered::Asked;
use crate::server::orders::{Order, SwitchError, SwitchOrder, Switched};
use crate::server::requests::{Session, cost, refusal};
use crate::units::to_u64;

/// How long a connection that is told to close waits for a moment in which nothing is under way. A client that sends a
/// request into the closing (the kernel's does) has to send it again elsewhere, which may take it long.
const QUIET: Duration = Duration::from_secs(1);
/// How long requests under way may keep a writable connection from being switched. Clients give up after 30 seconds.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a connection has been told and not done yet.
#[derive(Default)]
pub(super) struct Steered {
    /// No requests are taken meanwhile.
    switching: Option<Switching>,
    /// When this ends it leaves, whatever is under way.
    leaving: Option<Pin<Box<Sleep>>>,
    notice: Option<HeldNotice>,
}

/// A switch that waits for what is under way, on a writable connection.
struct Switching {
    order: SwitchOrder,
    since: Instant,
    in_flight: u64,
    limit: Pin<Box<Sleep>>,
    /// The last request on the old export.
    flush: Option<Pin<Box<dyn Future<Output = Result<()>>>>>,
}

/// A BLOCK_STATUS whose answer is held back.
struct HeldNotice {
    asked: Asked,
    range: ByteRange,
    extents: Extents,
    news: Pin<Box<dyn Future<Output = bool>>>,
}

/// Something happened that an order waits for, or an order came.
pub(super) enum Steer {
    Ordered(Order),
    /// The old export is flushed, or not.
    Flushed(Result<()>),
    /// Whoever ordered the switch waits for it no longer.
    TakenBack,
    TookTooLong,
    /// It is time to leave.
    Leave,
    /// The held notice is to be answered: whether there are news.
    Heard(bool),
}

async fn flush(session: Rc<Session>) -> Result<()> {
    session.seat.now().export.flush().await
}

impl Switching {
    fn poll(&mut self, context: &mut TaskContext<'_>) -> Poll<Steer> {
        if let Some(flush) = &mut self.flush
            && let Poll::Ready(result) = flush.as_mut().poll(context)
        {
            return Poll::Ready(Steer::Flushed(result));
        }
        if self.order.report.poll_closed(context).is_ready() {
            return Poll::Ready(Steer::TakenBack);
        }
        self.limit.as_mut().poll(context).map(|()| Steer::TookTooLong)
    }
}

impl Steered {
    /// Whether no requests may be taken now, as long as the connection is not about to end.
    pub(super) const fn is_paused(&self) -> bool {
        self.switching.is_some()
    }

    /// How a drain of this connection is called.
    pub(super) const fn end(&self) -> End {
        if self.leaving.is_some() { End::Dismissed } else { End::Drained }
    }
}

impl Transmission {
    /// Waits for what orders wait for.
    pub(super) fn poll_steered(&mut self, context: &mut TaskContext<'_>) -> Poll<Event> {
        let Steered { switching, leaving, notice } = &mut self.steered;
        if matches!(self.phase, Phase::Open) {
            if let Poll::Ready(order) = self.session.client.desk.poll_order(context, switching.is_none()) {
                return Poll::Ready(Event::Steer(Steer::Ordered(order)));
            }
            if let Some(switching) = switching
                && let Poll::Ready(steer) = switching.poll(context)
            {
                return Poll::Ready(Event::Steer(steer));
            }
            if let Some(leaving) = leaving
                && leaving.as_mut().poll(context).is_ready()
            {
                return Poll::Ready(Event::Steer(Steer::Leave));
            }
        }
        match notice {
            Some(notice) => notice.news.as_mut().poll(context).map(|is_news| Event::Steer(Steer::Heard(is_news))),
            None => Poll::Pending,
        }
    }

    pub(super) fn steer(&mut self, steer: Steer) -> Result<(), End> {
        match steer {
            Steer::Ordered(Order::Close) => {
                self.steered.leaving.get_or_insert_with(|| Box::pin(sleep(QUIET)));
            }
            Steer::Ordered(Order::Switch(order)) => self.begin_switch(order),
            Steer::Flushed(result) => self.end_switch(result),
            Steer::TakenBack => self.steered.switching = None,
            Steer::TookTooLong => self.give_up_switch(SwitchError::TooLong),
            Steer::Leave => self.phase = Phase::Draining { queued: self.stream.queued()? },
            Steer::Heard(is_news) => self.answer_notice(is_news),
        }
        Ok(())
    }

    /// Does what can be done for orders now. To be called when requests have been taken.
    pub(super) fn carry_on(&mut self) {
        let is_open = matches!(self.phase, Phase::Open);
        if !is_open || self.steered.leaving.is_some() {
            // A client that is held asks again, whoever answers it then.
            self.answer_notice(false);
        }
        if !is_open {
            self.give_up_switch(SwitchError::Gone);
        }
        let is_under_way = !self.work.is_empty() || !self.long_reads.is_empty() || self.payload.is_some();
        if let Some(switching) = &mut self.steered.switching
            && switching.flush.is_none()
            && !is_under_way
        {
            switching.flush = Some(Box::pin(flush(Rc::clone(&self.session))));
        }
    }

    /// Whether this is the moment to close that an order waits for.
    pub(super) fn may_leave(&self) -> Result<bool, End> {
        let is_quiet = || self.input.is_empty() && self.payload.is_none() && self.is_idle();
        let is_told = self.steered.leaving.is_some() && matches!(self.phase, Phase::Open);
        Ok(is_told && is_quiet() && self.stream.queued()? == 0)
    }

    fn begin_switch(&mut self, order: SwitchOrder) {
        if let Some((export, _)) = &order.export
            && !self.session.seat.is_same_image(&**export)
        {
            // Whoever ordered it may have given up.
            return drop(order.report.send(Err(SwitchError::OtherImage)));
        }
        let (since, in_flight) = (clock::now(), to_u64(self.work.len() + self.long_reads.len()));
        if self.session.seat.is_read_only() {
            self.complete_switch(order, since, in_flight);
        } else {
            let limit = Box::pin(sleep(PATIENCE));
            self.steered.switching = Some(Switching { order, since, in_flight, limit, flush: None });
        }
    }

    fn end_switch(&mut self, flushed: Result<()>) {
        let Some(Switching { order, since, in_flight, .. }) = self.steered.switching.take() else { return };
        match flushed {
            Ok(()) => self.complete_switch(order, since, in_flight),
            // Whoever ordered it may have given up.
            Err(error) => drop(order.report.send(Err(SwitchError::Flush(error)))),
        }
    }

    fn complete_switch(&self, order: SwitchOrder, since: Instant, in_flight: u64) {
        let (export, label) = order.export.unzip();
        self.session.seat.put(export, clock::now());
        self.session.client.note_relayed(label);
        let pause = clock::now().saturating_duration_since(since);
        // Whoever ordered it may have given up just now.
        let _ = order.report.send(Ok(Switched { pause, in_flight }));
    }

    fn give_up_switch(&mut self, why: SwitchError) {
        if let Some(switching) = self.steered.switching.take() {
            // As above.
            let _ = switching.order.report.send(Err(why));
        }
    }

    /// Holds the answer to a BLOCK_STATUS back until there are news.
    pub(super) fn hold_notice(&mut self, asked: Asked, range: ByteRange, extents: Extents) {
        if self.steered.notice.is_some() {
            let error = refusal(ErrorKind::Invalid, "one notice at a time");
            return self.session.fail(asked, &error, None);
        }
        self.session.client.note_hearing();
        let news = Box::pin(self.session.ears.listen());
        self.steered.notice = Some(HeldNotice { asked: asked.untimed(), range, extents, news });
    }

    fn answer_notice(&mut self, is_news: bool) {
        if let Some(HeldNotice { asked, range, extents, .. }) = self.steered.notice.take() {
            let session = Rc::clone(&self.session);
            let cost = cost(&Command::BlockStatus(range, extents), session.contexts.len());
            self.start(cost, async move { session.block_status(asked, range, extents, is_news).await });
        }
    }
}
