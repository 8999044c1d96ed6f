//! The transmission phase of one connection.
//!
//! One loop: take all whole requests from the input, answer what can be answered at once, send, wait for whatever
//! comes first: more input, room to send, a request that is done, an order. State changes only between
//! waits, so that nothing is cut in half by a future that is dropped.

mod freezing;
mod payload;
mod steered;

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context as TaskContext, Poll};

use bytes::{Buf, BufMut, BytesMut};
use futures_util::stream::{FuturesUnordered, StreamExt};
use thiserror::Error;

pub(super) use self::freezing::Rest;
use self::payload::Payload;
use self::steered::{Steer, Steered};
use super::answered::{Arrivals, Asked};
use super::buffers;
use super::figures::Operation;
use super::limits::{ConnectionBudget, REQUESTS};
use super::long_reads::{self, LongReads, SHORT, Step, is_long};
use super::outbox::HIGH_WATER;
use super::requests::{Held, STREAMED, Session, cost, perform};
use super::spin::Spin;
use super::stage::{Place, Stage, Stages};
use crate::clock;
use crate::export::{FileRange, assemble};
use crate::nbd::reply::{Last, ReplyTo};
use crate::nbd::request::{self, Checked, Command, Fragments, Header, Violation, header_length};
use crate::net::Stream;
use crate::ranges::ByteRange;
use crate::telemetry::seldom;
use crate::units::{KIB, to_usize};

/// Input is taken in pieces of this size: room for eight thousand request headers, and for payload to be written while
/// it is still in the second-level cache.
const INPUT: usize = 256 << 10;
/// Payload that is still to come is received straight into its place when it is at least this long.
const STRAIGHT: usize = 16 << 10;
/// Replies are sent when this much has gathered, also in the middle of a batch.
const BATCH: usize = 256 << 10;
/// Bytes read and written for one connection before others on its worker get their turn: some 200 microseconds' worth.
const TURN: u64 = 1 << 20;
/// What is looked at of a long read to find out whether it is here.
const PROBED: u64 = 64 * KIB;
/// A client that is quick enough keeps its connection awake for ever. Once in so many times orders are looked for.
const AWAKE_IN_A_ROW: u32 = 64;

/// Why a connection ended.
#[derive(Debug, Error)]
pub(super) enum End {
    /// The client said so.
    #[error("the client disconnected")]
    Disconnected,
    /// The client closed its side without a word.
    #[error("the client closed the connection")]
    Closed,
    /// The server is going down.
    #[error("the server is shutting down")]
    Drained,
    /// An operator, or the client by another connection, has ordered it.
    #[error("the connection was closed by order")]
    Dismissed,
    /// The client broke the protocol.
    #[error("the client broke the protocol: {0}")]
    Violation(#[from] Violation),
    /// A reply could not be completed.
    #[error("a reply could not be completed")]
    Broken,
    /// The socket failed.
    #[error("the connection was lost: {0}")]
    Lost(#[from] io::Error),
    /// A successor of this server goes on with it.
    #[error("the connection goes to the successor of this server")]
    Frozen,
}

/// Whether requests are still taken.
#[derive(Debug)]
enum Phase {
    Open,
    /// None, until the server goes on, or freezes the connection.
    Holding {
        freezes: bool,
    },
    /// Only those that had arrived when the order came: this many bytes of the socket's queue.
    Draining {
        queued: usize,
    },
    /// None; what is in flight is answered.
    Closing(End),
}

/// What comes after requests have been taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Turn {
    /// All that could be done has been done.
    Done,
    /// There is more, but others on this worker come first.
    Others,
}

/// A connection that has come to its end here.
#[derive(Debug)]
pub(super) struct Left {
    /// For a last goodbye, or for a successor.
    pub(super) stream: Stream,
    pub(super) end: End,
    /// What a successor has to do, if it ended with [`End::Frozen`].
    pub(super) rest: Option<Rest>,
}

enum Event {
    Progress,
    Readable,
    Stage(Stage),
    Steer(Steer),
}

type Work = Pin<Box<dyn Future<Output = ()>>>;

/// Reads what has left the memory while it waited to be sent.
async fn thaw(session: Rc<Session>, place: FileRange) {
    let length = to_usize(place.range.length());
    let read = place.file.read_exact_at(BytesMut::new(), length, place.range.start()).await;
    let bytes = match read {
        Ok(bytes) => Ok(bytes.freeze()),
        // A mirror whose disk fails has another source.
        Err(_) => session.pieces(place.range).await.map(|pieces| assemble(&pieces).into()),
    };
    match bytes {
        Ok(bytes) => session.outbox.thaw(bytes),
        Err(error) => {
            // The header has gone, with the promise that data follows.
            seldom!(warn, %error, "a read failed in the middle: closing the connection");
            session.is_broken.set(true);
        }
    }
}

/// A connection in its transmission phase.
pub(super) struct Transmission {
    stream: Stream,
    session: Rc<Session>,
    budget: ConnectionBudget,
    input: BytesMut,
    arrivals: Arrivals,
    payload: Option<Payload>,
    work: FuturesUnordered<Work>,
    long_reads: LongReads,
    spin: Spin,
    /// How often in a row the next request was waited for awake.
    awake: u32,
    phase: Phase,
    steered: Steered,
    /// Whether taking more requests waits for input, and not for something in flight to end.
    wants_input: bool,
    /// What the server does with its connections.
    stages: Stages,
    place: Place,
}

impl Transmission {
    pub(super) fn new(
        stream: Stream,
        session: Rc<Session>,
        budget: ConnectionBudget,
        input: BytesMut,
        stages: Stages,
        place: Place,
    ) -> Self {
        Self {
            stream,
            session,
            budget,
            input,
            arrivals: Arrivals::new(clock::now()),
            payload: None,
            work: FuturesUnordered::new(),
            long_reads: LongReads::default(),
            spin: Spin::default(),
            awake: 0,
            phase: Phase::Open,
            steered: Steered::default(),
            wants_input: true,
            stages,
            place,
        }
    }

    /// Serves until the connection ends, or is frozen.
    pub(super) async fn run(mut self) -> Left {
        loop {
            match self.turn().await {
                Ok(None) => {}
                Ok(Some(End::Frozen)) => return self.freeze().await,
                Ok(Some(end)) | Err(end) => return Left { stream: self.stream, end, rest: None },
            }
        }
    }

    async fn turn(&mut self) -> Result<Option<End>, End> {
        if self.session.is_broken.get() {
            // Not a byte more: it would be taken for the rest of the reply that was cut short.
            return Err(End::Broken);
        }
        let turn = self.take_requests()?;
        self.carry_on();
        let used = self.used();
        self.flush()?;
        let turn = turn.max(self.answer_long_reads()?);
        self.budget.settle(self.used());
        self.session.counts.note_in_flight(self.work.len() + self.long_reads.len(), self.used());
        if turn == Turn::Others {
            tokio::task::yield_now().await;
            // What has come meanwhile is looked at before more of a long read is sent.
            if let Poll::Ready(event) = poll_fn(|context| Poll::Ready(self.poll_event(context))).await {
                self.take_note(event)?;
            }
            return Ok(None);
        }
        if !self.wants_input && self.used() < used {
            // What was sent has made room: whatever waited for it must be looked at again, because nothing else may
            // ever wake this connection.
            tokio::task::coop::consume_budget().await;
            return Ok(None);
        }
        if self.may_leave()? {
            self.phase = Phase::Closing(End::Dismissed);
        }
        if matches!(self.phase, Phase::Closing(_)) && self.is_idle() {
            let Phase::Closing(end) = std::mem::replace(&mut self.phase, Phase::Open) else { return Ok(None) };
            return Ok(Some(end));
        }
        if let Phase::Draining { queued } = self.phase
            && self.wants_input
        {
            self.phase = self.receive_queued(queued)?;
            return Ok(None);
        }
        let is_waiting = matches!(self.phase, Phase::Open) && self.wants_input && self.input.is_empty();
        if is_waiting && self.is_idle() && self.wait_awake().await {
            self.receive()?;
            return Ok(None);
        }
        if self.input.is_empty() {
            // Idle connections, of which there may be thousands, keep no buffer.
            buffers::give_back(&mut self.input);
        }
        if self.stands_still()? {
            return Ok(Some(End::Frozen));
        }
        let event = poll_fn(|context| self.poll_event(context)).await;
        self.take_note(event)?;
        Ok(None)
    }

    fn take_note(&mut self, event: Event) -> Result<(), End> {
        match event {
            Event::Progress => {}
            Event::Readable => self.receive()?,
            Event::Steer(steer) => self.steer(steer)?,
            Event::Stage(stage) => self.enter(stage)?,
        }
        Ok(())
    }

    /// Looks for input for a short while. Says whether there is some.
    async fn wait_awake(&mut self) -> bool {
        self.awake = (self.awake + 1) % AWAKE_IN_A_ROW;
        if self.awake == 0 {
            return false;
        }
        let Some(mut awake) = self.spin.begin(clock::now()) else { return false };
        loop {
            // Everything else on this worker goes first, and the runtime looks what has arrived.
            tokio::task::yield_now().await;
            if self.stream.is_readable() {
                awake.found();
                return true;
            }
            if awake.is_over(clock::now()) {
                return false;
            }
            std::thread::yield_now();
        }
    }

    fn poll_event(&mut self, context: &mut TaskContext<'_>) -> Poll<Event> {
        let mut finished = false;
        while let Poll::Ready(Some(())) = self.work.poll_next_unpin(context) {
            finished = true;
        }
        if finished {
            return Poll::Ready(Event::Progress);
        }
        let is_open = matches!(self.phase, Phase::Open);
        if (is_open || matches!(self.phase, Phase::Holding { .. }))
            && let Poll::Ready(stage) = self.stages.poll(context)
        {
            return Poll::Ready(Event::Stage(stage));
        }
        if let Poll::Ready(event) = self.poll_steered(context) {
            return Poll::Ready(event);
        }
        // An error of the socket counts as readiness here: the call that follows reports it.
        if is_open && self.wants_input && self.stream.poll_readable(context).is_ready() {
            return Poll::Ready(Event::Readable);
        }
        if self.session.outbox.has_something_to_send() && self.stream.poll_writable(context).is_ready() {
            return Poll::Ready(Event::Progress);
        }
        Poll::Pending
    }

    /// Receives what there is, if there is anything.
    fn receive(&mut self) -> Result<(), End> {
        let received = match &mut self.payload {
            Some(Payload::Write { segment: Some(segment), .. })
                if self.input.is_empty() && segment.missing() >= STRAIGHT =>
            {
                let missing = segment.missing();
                let received = self.stream.try_read_buf(&mut (&mut segment.bytes).limit(missing));
                self.arrivals.note(0, usize::MAX, clock::now());
                received
            }
            _ => {
                buffers::lend(&mut self.input);
                if self.input.capacity() - self.input.len() < INPUT {
                    self.input.reserve(INPUT);
                }
                let before = self.input.len();
                let received = self.stream.try_read_buf(&mut (&mut self.input).limit(INPUT));
                self.arrivals.note(before, self.input.len() - before, clock::now());
                received
            }
        };
        match received {
            Ok(0) => {
                self.phase = Phase::Closing(End::Closed);
                Ok(())
            }
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Receives a part of the `queued` bytes that are the last to be received.
    fn receive_queued(&mut self, queued: usize) -> Result<Phase, End> {
        let mut bytes = vec![0; queued.min(INPUT)];
        match self.stream.receive_queued(&mut bytes) {
            Ok(0) => Ok(Phase::Closing(self.steered.end())),
            Ok(received) => {
                self.arrivals.note(self.input.len(), received, clock::now());
                self.input.extend_from_slice(&bytes[..received]);
                Ok(Phase::Draining { queued: queued - received })
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Phase::Closing(self.steered.end())),
            Err(error) => Err(error.into()),
        }
    }

    fn used(&self) -> usize {
        self.session.executing.get() + self.session.outbox.queued()
    }

    /// Whether every request has been answered and the answers have been sent.
    fn is_idle(&self) -> bool {
        self.work.is_empty() && self.long_reads.is_empty() && self.session.outbox.queued() == 0
    }

    /// Sends as much as the socket takes.
    fn flush(&self) -> Result<(), End> {
        self.session.ledger.publish();
        if let Some(place) = self.session.outbox.flush(&self.stream)? {
            self.work.push(Box::pin(thaw(Rc::clone(&self.session), place)));
        }
        Ok(())
    }

    /// Answers segments of long reads, each when all that came before it has left, up to a turn's worth. Short reads
    /// come first, and next.
    fn answer_long_reads(&mut self) -> Result<Turn, End> {
        let moved_before = self.moved();
        let is_over = |this: &Self| this.moved() - moved_before >= TURN;
        let mut has_answered = false;
        while !is_over(self) && self.answer_segment()? {
            has_answered = true;
        }
        let may_go_on = is_over(self) && self.session.outbox.is_clear() && !self.long_reads.is_empty();
        // Requests that waited for fewer to be in flight must be looked at again.
        Ok(if may_go_on || (has_answered && !self.wants_input) { Turn::Others } else { Turn::Done })
    }

    /// Answers one segment, or has the first long read wait for its bytes. `false`: neither can be done now.
    fn answer_segment(&mut self) -> Result<bool, End> {
        if !self.session.outbox.is_clear() {
            return Ok(false);
        }
        match self.long_reads.step(&self.session, self.stream.takes_files()) {
            Step::Nothing => return Ok(false),
            Step::Sent => self.flush()?,
            Step::MustWait => {
                let rest = self.long_reads.first().map_or(0, |read| read.rest.length());
                let cost = to_usize(rest.min(STREAMED));
                if !self.budget.admit(self.used(), cost) {
                    return Ok(false);
                }
                if let Some(read) = self.long_reads.pop() {
                    self.start(cost, long_reads::finish(Rc::clone(&self.session), read));
                }
            }
        }
        Ok(true)
    }

    /// Lets `work`, which holds up to `cost` bytes, go on by itself.
    fn start(&self, cost: usize, work: impl Future<Output = ()> + 'static) {
        let held = Held::new(&self.session, cost);
        self.work.push(Box::pin(async move {
            work.await;
            drop(held);
        }));
    }

    /// Bytes read and written so far.
    fn moved(&self) -> u64 {
        self.session.counts.read_bytes.get() + self.session.counts.written_bytes.get()
    }

    /// Takes all requests that are whole and may start now, up to a turn's worth.
    fn take_requests(&mut self) -> Result<Turn, End> {
        self.wants_input = true;
        let moved_before = self.moved();
        while !matches!(self.phase, Phase::Closing(_) | Phase::Holding { .. }) {
            if self.moved() - moved_before >= TURN {
                self.wants_input = false;
                return Ok(Turn::Others);
            }
            if self.payload.is_some() {
                if !self.take_payload() {
                    return Ok(Turn::Done);
                }
                continue;
            }
            if self.steered.is_paused() && matches!(self.phase, Phase::Open) {
                self.wants_input = false;
                return Ok(Turn::Done);
            }
            let in_flight = self.work.len() + self.long_reads.len();
            if in_flight >= REQUESTS || self.session.outbox.queued() >= HIGH_WATER {
                self.wants_input = false;
                return Ok(Turn::Done);
            }
            let Some(header) = request::decode(&self.input, self.session.rules.mode)? else { return Ok(Turn::Done) };
            if !self.take_request(&header)? {
                self.wants_input = false;
                return Ok(Turn::Done);
            }
            if self.session.outbox.queued() >= BATCH {
                self.flush()?;
            }
        }
        Ok(Turn::Done)
    }

    /// Starts the request whose header is at the front of the input. `false`: it must wait its turn.
    fn take_request(&mut self, header: &Header) -> Result<bool, End> {
        let checked = request::check(header, &self.session.rules)?;
        if let Checked::Accepted(command) = &checked {
            let used = self.used();
            if !self.budget.admit(used, cost(command, self.session.contexts.len())) {
                return Ok(false);
            }
        }
        let asked = self.asked(header, &checked);
        self.input.advance(header_length(self.session.rules.mode));
        self.session.counts.requests.add(1);
        match checked {
            Checked::Refused { kind, message, payload } => {
                self.payload = Some(Payload::Skip { left: payload, asked, kind, message });
            }
            Checked::Accepted(Command::Disconnect) => self.phase = Phase::Closing(End::Disconnected),
            Checked::Accepted(Command::Write(range, durability)) => self.take_write(asked, range, durability),
            Checked::Accepted(Command::Read(range, fragments)) if self.read_at_once(asked, range, fragments) => {}
            Checked::Accepted(Command::BlockStatus(range, extents)) if self.session.has_notice => {
                self.hold_notice(asked, range, extents);
            }
            Checked::Accepted(command) => {
                let cost = cost(&command, self.session.contexts.len());
                self.start(cost, perform(Rc::clone(&self.session), asked, command));
            }
        }
        Ok(true)
    }

    /// The request whose header is at the front of the input, for whoever answers it.
    fn asked(&self, header: &Header, checked: &Checked) -> Asked {
        let bytes = match checked {
            Checked::Accepted(Command::BlockStatus(..)) | Checked::Refused { .. } => 0,
            Checked::Accepted(_) => header.length,
        };
        let payload =
            if matches!(checked, Checked::Accepted(Command::Write(..))) { to_usize(header.length) } else { 0 };
        let behind = self.input.len().saturating_sub(header_length(self.session.rules.mode) + payload);
        Asked {
            to: ReplyTo { cookie: header.cookie, offset: header.offset },
            operation: Operation::of(header.command),
            bytes,
            began: Some(self.arrivals.of(behind)),
        }
    }

    /// Answers a read without waiting, if that is possible, or has it answered in segments.
    fn read_at_once(&mut self, asked: Asked, range: ByteRange, fragments: Fragments) -> bool {
        let (session, takes_files) = (&*self.session, self.stream.takes_files());
        if range.is_empty() {
            return false;
        }
        if is_long(range.length(), takes_files) {
            // What has to be fetched is asked for now, whatever is being sent. A look at the beginning will do.
            let first = ByteRange::between(range.start(), range.end().min(range.start() + PROBED));
            let is_here = session.seat.with(|export| export.is_in_file(first));
            if is_here {
                self.long_reads.push(asked, range, fragments);
            }
            return is_here || (range.length() <= SHORT && self.read_inline(asked, range, fragments));
        }
        self.read_inline(asked, range, fragments)
    }

    fn read_inline(&self, asked: Asked, range: ByteRange, fragments: Fragments) -> bool {
        // With a copy: many short replies leave in one send.
        let answered = long_reads::send_chunk(&self.session, asked.to, range, fragments, Last::Yes, None);
        if answered {
            self.session.counts.read_bytes.add(range.length());
            self.session.ledger.note_one(&asked, None);
        }
        answered
    }
}
