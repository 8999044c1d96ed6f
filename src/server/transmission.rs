//! The transmission phase of one connection.
//!
//! One loop: take all whole requests from the input, answer what can be answered at once, send, wait for whatever
//! comes first: more input, room to send, a request that is done, the order to drain. State changes only between
//! waits, so that nothing is cut in half by a future that is dropped.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context as TaskContext, Poll};

use bytes::{Buf, BufMut, BytesMut};
use futures_util::stream::{FuturesUnordered, StreamExt};
use thiserror::Error;

use super::limits::{ConnectionBudget, REQUESTS};
use super::outbox::HIGH_WATER;
use super::requests::{Counts, Held, Session, WriteJob, cost, perform, refusal};
use crate::error::ErrorKind;
use crate::export::TryRead;
use crate::nbd::handshake::ReplyMode;
use crate::nbd::reply::{self, Last, ReplyTo};
use crate::nbd::request::{self, Checked, Command, Durability, Fragments, Header, Violation, header_length};
use crate::net::Stream;
use crate::ranges::ByteRange;
use crate::units::{KIB, to_u64, to_usize};

/// Input is taken in pieces of this size: room for two thousand request headers.
const INPUT: usize = 64 << 10;
/// Payload that is still to come is received straight into its place when it is at least this long.
const STRAIGHT: usize = 16 << 10;
/// Reads up to this length are tried inline.
const INLINE: u64 = 256 * KIB;
/// Replies are sent when this much has gathered, also in the middle of a batch.
const BATCH: usize = 256 << 10;
/// Bytes read for one connection before others on its worker get their turn: some 200 microseconds' worth.
const TURN: u64 = 1 << 20;
/// A write's payload is written in segments of this size as it arrives.
const WRITE_SEGMENT: u64 = 1 << 20;

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
    /// The client broke the protocol.
    #[error("the client broke the protocol: {0}")]
    Violation(#[from] Violation),
    /// A reply could not be completed.
    #[error("a reply could not be completed")]
    Broken,
    /// The socket failed.
    #[error("the connection was lost: {0}")]
    Lost(#[from] io::Error),
}

/// Whether requests are still taken.
#[derive(Debug)]
enum Phase {
    Open,
    /// Only those that had arrived when the order came: this many bytes of the socket's queue.
    Draining {
        queued: usize,
    },
    /// None; what is in flight is answered.
    Closing(End),
}

/// Payload that belongs to the last request.
#[derive(Debug)]
enum Payload {
    /// It is of no use; then the request is answered with the error.
    Skip { left: u64, to: ReplyTo, kind: ErrorKind, message: &'static str },
    /// It is to be written.
    Write { job: Rc<WriteJob>, rest: ByteRange, segment: Option<Segment> },
}

/// A part of a write's payload that is arriving.
#[derive(Debug)]
struct Segment {
    bytes: BytesMut,
    length: usize,
    held: Held,
}

impl Segment {
    fn missing(&self) -> usize {
        self.length - self.bytes.len()
    }
}

/// What comes after requests have been taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// All that could be done has been done.
    Done,
    /// There is more, but others on this worker come first.
    Others,
}

enum Event {
    Progress,
    Readable,
    Draining,
}

type Work = Pin<Box<dyn Future<Output = ()>>>;

/// A connection in its transmission phase.
pub(super) struct Transmission<D> {
    stream: Stream,
    session: Rc<Session>,
    budget: ConnectionBudget,
    input: BytesMut,
    payload: Option<Payload>,
    work: FuturesUnordered<Work>,
    phase: Phase,
    /// Whether taking more requests waits for input, and not for something in flight to end.
    wants_input: bool,
    /// Ends when the server is to be drained.
    drain: Pin<Box<D>>,
}

impl<D: Future<Output = ()>> Transmission<D> {
    pub(super) fn new(
        stream: Stream,
        session: Rc<Session>,
        budget: ConnectionBudget,
        input: BytesMut,
        drain: Pin<Box<D>>,
    ) -> Self {
        Self {
            stream,
            session,
            budget,
            input,
            payload: None,
            work: FuturesUnordered::new(),
            phase: Phase::Open,
            wants_input: true,
            drain,
        }
    }

    /// Serves until the connection ends. Gives the socket back for a last goodbye.
    pub(super) async fn run(mut self) -> (Stream, End) {
        let end = loop {
            match self.turn().await {
                Ok(None) => {}
                Ok(Some(end)) | Err(end) => break end,
            }
        };
        (self.stream, end)
    }

    async fn turn(&mut self) -> Result<Option<End>, End> {
        if self.session.is_broken.get() {
            // Not a byte more: it would be taken for the rest of the reply that was cut short.
            return Err(End::Broken);
        }
        let turn = self.take_requests()?;
        let used = self.used();
        self.session.outbox.flush(&self.stream)?;
        self.budget.settle(self.used());
        if turn == Turn::Others {
            tokio::task::yield_now().await;
            return Ok(None);
        }
        if !self.wants_input && self.used() < used {
            // What was sent has made room: whatever waited for it must be looked at again, because nothing else may
            // ever wake this connection.
            tokio::task::coop::consume_budget().await;
            return Ok(None);
        }
        if matches!(self.phase, Phase::Closing(_)) && self.work.is_empty() && self.session.outbox.queued() == 0 {
            let Phase::Closing(end) = std::mem::replace(&mut self.phase, Phase::Open) else { return Ok(None) };
            return Ok(Some(end));
        }
        if let Phase::Draining { queued } = self.phase
            && self.wants_input
        {
            self.phase = self.receive_queued(queued)?;
            return Ok(None);
        }
        match poll_fn(|context| self.poll_event(context)).await {
            Event::Progress => {}
            Event::Readable => self.receive()?,
            Event::Draining => self.phase = Phase::Draining { queued: self.stream.queued()? },
        }
        Ok(None)
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
        if is_open && self.drain.as_mut().poll(context).is_ready() {
            return Poll::Ready(Event::Draining);
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
                self.stream.try_read_buf(&mut (&mut segment.bytes).limit(missing))
            }
            _ => {
                if self.input.capacity() - self.input.len() < header_length(ReplyMode::Extended) {
                    self.input.reserve(INPUT);
                }
                self.stream.try_read_buf(&mut self.input)
            }
        };
        match received {
            Ok(0) => {
                self.phase = Phase::Closing(End::Closed);
                Ok(())
            }
            Ok(_) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if self.input.is_empty() && self.work.is_empty() {
                    // Idle connections, of which there may be thousands, keep no buffer.
                    self.input = BytesMut::new();
                }
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Receives a part of the `queued` bytes that are the last to be received.
    fn receive_queued(&mut self, queued: usize) -> Result<Phase, End> {
        let mut bytes = vec![0; queued.min(INPUT)];
        match self.stream.receive_queued(&mut bytes) {
            Ok(0) => Ok(Phase::Closing(End::Drained)),
            Ok(received) => {
                self.input.extend_from_slice(&bytes[..received]);
                Ok(Phase::Draining { queued: queued - received })
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Phase::Closing(End::Drained)),
            Err(error) => Err(error.into()),
        }
    }

    fn used(&self) -> usize {
        self.session.executing.get() + self.session.outbox.queued()
    }

    /// Takes all requests that are whole and may start now, up to a turn's worth.
    fn take_requests(&mut self) -> Result<Turn, End> {
        self.wants_input = true;
        let read_before = self.session.counts.read_bytes.get();
        while !matches!(self.phase, Phase::Closing(_)) {
            if self.payload.is_some() {
                if !self.take_payload() {
                    return Ok(Turn::Done);
                }
                continue;
            }
            if self.work.len() >= REQUESTS || self.session.outbox.queued() >= HIGH_WATER {
                self.wants_input = false;
                return Ok(Turn::Done);
            }
            let Some(header) = request::decode(&self.input, self.session.rules.mode)? else { return Ok(Turn::Done) };
            if !self.take_request(&header)? {
                self.wants_input = false;
                return Ok(Turn::Done);
            }
            if self.session.outbox.queued() >= BATCH {
                self.session.outbox.flush(&self.stream)?;
            }
            if self.session.counts.read_bytes.get() - read_before >= TURN {
                return Ok(Turn::Others);
            }
        }
        Ok(Turn::Done)
    }

    /// Starts the request whose header is at the front of the input. `false`: it must wait its turn.
    fn take_request(&mut self, header: &Header) -> Result<bool, End> {
        let to = ReplyTo { cookie: header.cookie, offset: header.offset };
        let checked = request::check(header, &self.session.rules)?;
        if let Checked::Accepted(command) = &checked {
            let used = self.used();
            if !self.budget.admit(used, cost(command, self.session.contexts.len())) {
                return Ok(false);
            }
        }
        self.input.advance(header_length(self.session.rules.mode));
        Counts::add(&self.session.counts.requests, 1);
        match checked {
            Checked::Refused { kind, message, payload } => {
                self.payload = Some(Payload::Skip { left: payload, to, kind, message });
            }
            Checked::Accepted(Command::Disconnect) => self.phase = Phase::Closing(End::Disconnected),
            Checked::Accepted(Command::Write(range, durability)) => self.take_write(to, range, durability),
            Checked::Accepted(Command::Read(range, fragments)) if self.read_inline(to, range, fragments) => {}
            Checked::Accepted(command) => {
                let held = Held::new(&self.session, cost(&command, self.session.contexts.len()));
                let work = perform(Rc::clone(&self.session), to, command);
                self.work.push(Box::pin(async move {
                    work.await;
                    drop(held);
                }));
            }
        }
        Ok(true)
    }

    fn take_write(&mut self, to: ReplyTo, rest: ByteRange, durability: Durability) {
        let job = WriteJob::new(&self.session, to, durability);
        self.payload = Some(Payload::Write { job, rest, segment: None });
    }

    /// Answers a read without waiting, if that is possible.
    fn read_inline(&self, to: ReplyTo, range: ByteRange, fragments: Fragments) -> bool {
        if range.length() > INLINE || range.is_empty() {
            return false;
        }
        let Session { export, rules, outbox, counts, .. } = &*self.session;
        let answered = outbox.append(|tail| {
            let start = tail.len();
            reply::put_data_header(tail, rules.mode, to, range.start(), range.length(), Last::Yes);
            match export.try_read(range, tail) {
                TryRead::Data => true,
                TryRead::Hole if rules.mode.has_chunks() && fragments == Fragments::Allowed => {
                    tail.truncate(start);
                    let length = u32::try_from(range.length()).expect("inline reads are short");
                    reply::put_hole(tail, rules.mode, to, range.start(), length, Last::Yes);
                    true
                }
                TryRead::Hole => {
                    tail.put_bytes(0, to_usize(range.length()));
                    true
                }
                TryRead::Wait => false,
            }
        });
        if answered {
            Counts::add(&counts.read_bytes, range.length());
        }
        answered
    }

    /// Takes payload from the input. `false`: it needs more input, or must wait.
    fn take_payload(&mut self) -> bool {
        match self.payload.take() {
            Some(Payload::Skip { left, to, kind, message }) => {
                let skipped = left.min(to_u64(self.input.len()));
                self.input.advance(to_usize(skipped));
                if left > skipped {
                    self.payload = Some(Payload::Skip { left: left - skipped, to, kind, message });
                    return false;
                }
                self.session.fail(to, &refusal(kind, message), None);
                true
            }
            Some(Payload::Write { job, rest, segment }) => self.take_segment(job, rest, segment),
            None => true,
        }
    }

    /// Fills one segment of a write and starts it.
    fn take_segment(&mut self, job: Rc<WriteJob>, rest: ByteRange, segment: Option<Segment>) -> bool {
        if rest.is_empty() {
            job.one_done();
            return true;
        }
        let length = to_usize(rest.length().min(WRITE_SEGMENT));
        let mut segment = match segment {
            Some(segment) => segment,
            None if self.budget.admit(self.used(), length) => {
                Segment { bytes: BytesMut::with_capacity(length), length, held: Held::new(&self.session, length) }
            }
            None => {
                self.wants_input = false;
                self.payload = Some(Payload::Write { job, rest, segment: None });
                return false;
            }
        };
        let count = segment.missing().min(self.input.len());
        segment.bytes.extend_from_slice(&self.input[..count]);
        self.input.advance(count);
        if segment.missing() > 0 {
            self.payload = Some(Payload::Write { job, rest, segment: Some(segment) });
            return false;
        }
        job.one_more();
        let Segment { bytes, held, .. } = segment;
        self.work.push(Box::pin(Rc::clone(&job).write(rest.start(), bytes.freeze(), held)));
        let rest = ByteRange::between(rest.start() + to_u64(length), rest.end());
        self.payload = Some(Payload::Write { job, rest, segment: None });
        true
    }
}
