//! What a request does that cannot be answered at once.
//!
//! Reads are cut into segments, so that no request holds more memory than [`STREAMED`] however long it is. With
//! structured replies each segment is sent as chunks of its own. A reply that must be one frame (simple replies, DF)
//! is read whole up to [`WHOLE`] bytes and streamed beyond: then an error in the middle cannot become an error reply
//! any more, and the connection is closed, or the frame is completed with zeroes and followed by the error, as
//! "NBD_CMD_READ" has it.

use std::cell::{Cell, RefCell};
use std::pin::pin;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use futures_util::stream::{self, Stream, StreamExt};
use slab::Slab;

use super::answered::{Asked, Ledger};
use super::clients::{Client, Counts};
use super::directory::Offered;
use super::frozen::Ask;
use super::notices::Ears;
use super::outbox::{Frame, Outbox, Streaming};
use super::seat::{Occupant, Seat};
use crate::error::{Error, ErrorKind, Result};
use crate::export::{Context, Piece};
use crate::nbd::handshake::ReplyMode;
use crate::nbd::reply::{self, Last, ReplyTo};
use crate::nbd::request::{Command, Durability, Extents, Fragments, Rules};
use crate::nbd::{Extent, errno};
use crate::ranges::ByteRange;
use crate::telemetry::seldom;
use crate::units::{KIB, MIB, to_u64, to_usize};

/// The unit of long reads. Fits the second-level cache, so that what is read is still warm when it is sent.
const SEGMENT: u64 = 256 * KIB;
/// Segments of one read that are under way together, so that a mirror's misses overlap.
const WINDOW: usize = 8;
/// The longest read that is one frame and not streamed.
const WHOLE: u64 = MIB;
/// Bytes that a long read holds at most.
pub(super) const STREAMED: u64 = SEGMENT * WINDOW as u64;
/// Extents in one reply to BLOCK_STATUS, per context. A client asks again for the rest.
const EXTENTS: usize = 4096;
/// The most bytes of those on the wire, per context.
const STATUS_COST: usize = 16 * EXTENTS;
/// The longest extent that 32 bits can say, in whole blocks.
const LONGEST_COMPACT: u64 = (1 << 32) - 4096;

static ZEROES: [u8; 256 << 10] = [0; 256 << 10];

/// What all requests of one connection share.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) seat: Seat,
    pub(super) rules: Rules,
    /// Selected metadata contexts with their ids on the wire.
    pub(super) contexts: Vec<(u32, Offered)>,
    /// Whether notices are among them.
    pub(super) has_notice: bool,
    pub(super) ears: Ears,
    pub(super) outbox: Rc<Outbox>,
    /// Bytes that running requests hold.
    pub(super) executing: Cell<usize>,
    /// A reply was cut short: nothing that is sent after it can be understood.
    pub(super) is_broken: Cell<bool>,
    /// As others see this connection.
    pub(super) client: Arc<Client>,
    pub(super) counts: Arc<Counts>,
    /// What has been answered and not sent.
    pub(super) ledger: Ledger,
    /// Requests under way that may be asked again.
    pub(super) running: RefCell<Slab<Rc<Running>>>,
}

/// A request that changes nothing, while a future of the connection answers it.
#[derive(Debug)]
pub(super) struct Running {
    to: ReplyTo,
    command: Command,
    /// What comes before is on its way to the client.
    answered_to: Cell<u64>,
    /// Whether the one frame that the answer is has been begun.
    is_begun: Cell<bool>,
}

impl Running {
    fn has_answered(&self, bytes: usize) {
        self.answered_to.set(self.answered_to.get() + to_u64(bytes));
    }

    /// What somebody else would have to do.
    pub(super) fn rest(&self) -> Option<Ask> {
        Ask::of(self.to, self.command, self.answered_to.get(), self.is_begun.get())
    }
}

/// Keeps a request among those that run.
struct OnTheList<'a> {
    session: &'a Session,
    key: usize,
    running: Rc<Running>,
}

impl Drop for OnTheList<'_> {
    fn drop(&mut self) {
        self.session.running.borrow_mut().remove(self.key);
    }
}

/// Bytes that a request holds, from its start until it is done or dropped.
#[derive(Debug)]
pub(super) struct Held {
    session: Rc<Session>,
    bytes: usize,
}

impl Held {
    pub(super) fn new(session: &Rc<Session>, bytes: usize) -> Self {
        session.executing.set(session.executing.get() + bytes);
        Self { session: Rc::clone(session), bytes }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.session.executing.set(self.session.executing.get() - self.bytes);
    }
}

/// The most bytes that the request will hold. A write's payload is counted as it arrives.
pub(super) fn cost(command: &Command, contexts: usize) -> usize {
    match command {
        Command::Read(range, _) => to_usize(range.length().min(STREAMED)),
        Command::BlockStatus(..) => STATUS_COST * contexts,
        _ => 0,
    }
}

/// Does one request that is neither a write nor a disconnect, and sends its reply.
pub(super) async fn perform(session: Rc<Session>, asked: Asked, command: Command) {
    let result = match command {
        Command::Read(range, fragments) => return session.read(asked, range, fragments).await,
        Command::BlockStatus(range, extents) => return session.block_status(asked, range, extents, false).await,
        Command::Flush => session.seat.ask(async |at| at.export.flush().await).await,
        Command::Trim(range, durability) => session.seat.ask(async |at| at.export.trim(range, durability).await).await,
        Command::WriteZeroes(range, mode, durability) => {
            session.seat.ask(async |at| at.export.write_zeroes(range, mode, durability).await).await
        }
        Command::Cache(range) => {
            let _running = session.note_running(asked, command, range);
            session.seat.ask(async |at| at.export.cache(range).await).await
        }
        Command::Write(..) | Command::Disconnect => return,
    };
    session.finish(asked, result);
}

impl Session {
    fn note_running(&self, asked: Asked, command: Command, range: ByteRange) -> OnTheList<'_> {
        let answered_to = Cell::new(range.start());
        let running = Rc::new(Running { to: asked.to, command, answered_to, is_begun: Cell::new(false) });
        let key = self.running.borrow_mut().insert(Rc::clone(&running));
        OnTheList { session: self, key, running }
    }

    fn mode(&self) -> ReplyMode {
        self.rules.mode
    }

    /// Sends the reply to anything but a read.
    pub(super) fn finish(&self, asked: Asked, result: Result<()>) {
        if let Err(error) = result {
            return self.fail(asked, &error, None);
        }
        self.put_done(asked.to);
        self.ledger.note_one(&asked, None);
    }

    /// Puts a reply that says that it is done, and nothing else.
    pub(super) fn put_done(&self, to: ReplyTo) {
        let put = |output: &mut BytesMut| reply::put_done(output, self.mode(), to);
        let appended = self.outbox.append(|tail| {
            put(tail);
            true
        });
        if !appended {
            let mut frame = Frame::default();
            put(frame.header());
            self.outbox.send(frame);
        }
    }

    /// Sends an error.
    pub(super) fn fail(&self, asked: Asked, error: &Error, at: Option<u64>) {
        tracing::debug!(errno = errno::name(error.kind()), offset = asked.to.offset, error = %error.chain(), "request failed");
        self.counts.errors.add(1);
        self.ledger.note_one(&asked, Some(error.kind()));
        // Kernel and qemu turn "shutting down" into an error of the guest's disk; whatever is going down, it is not
        // this connection.
        let kind = if error.kind() == ErrorKind::Shutdown { ErrorKind::Io } else { error.kind() };
        let mut frame = Frame::default();
        reply::put_error(frame.header(), self.mode(), asked.to, kind, &error.to_string(), at);
        self.outbox.send(frame);
    }

    /// Reads `range` from the export that serves this connection, whichever that is by then.
    pub(super) async fn pieces(&self, range: ByteRange) -> Result<Vec<Piece>> {
        self.seat.ask(async |at| at.export.read(range).await).await
    }

    pub(super) async fn read(&self, asked: Asked, range: ByteRange, fragments: Fragments) {
        let listed = self.note_running(asked, Command::Read(range, fragments), range);
        if range.is_empty() {
            let mut frame = Frame::default();
            reply::put_read_done(frame.header(), self.mode(), asked.to);
            self.outbox.send(frame);
            self.ledger.note_one(&asked, None);
        } else if self.mode().has_chunks() && fragments == Fragments::Allowed {
            self.read_in_chunks(asked, range, &listed.running).await;
        } else if range.length() <= WHOLE {
            match self.pieces(range).await {
                Ok(pieces) => self.send_whole(asked, range, pieces),
                Err(error) => self.fail(asked, &error, None),
            }
        } else {
            self.stream_whole(asked, range, listed).await;
        }
    }

    async fn read_in_chunks(&self, asked: Asked, range: ByteRange, running: &Running) {
        let segments = stream::iter(range.pieces(SEGMENT));
        let mut reads = segments.map(async |part| (part, self.pieces(part).await)).buffered(WINDOW);
        while let Some((part, result)) = reads.next().await {
            let pieces = match result {
                Ok(pieces) => pieces,
                // Dropping the other segments gives up their answers only.
                Err(error) => return self.fail(asked, &error, Some(part.start())),
            };
            self.outbox.room().await;
            let mut at = part.start();
            for piece in pieces {
                let end = at + piece.length();
                let last = if end == range.end() { Last::Yes } else { Last::No };
                self.send_chunk(asked, at, piece, last);
                running.answered_to.set(end);
                at = end;
            }
        }
    }

    fn send_chunk(&self, asked: Asked, at: u64, piece: Piece, last: Last) {
        let mut frame = Frame::default();
        let length = piece.length();
        self.counts.read_bytes.add(length);
        match piece {
            Piece::Data(data) => {
                reply::put_data_header(frame.header(), self.mode(), asked.to, at, length, last);
                frame.data(data);
            }
            Piece::Hole(_) => {
                let length = u32::try_from(length).expect("a segment is far shorter than 4 GiB");
                reply::put_hole(frame.header(), self.mode(), asked.to, at, length, last);
            }
        }
        self.outbox.send(frame);
        if last == Last::Yes {
            self.ledger.note_one(&asked, None);
        }
    }

    fn send_whole(&self, asked: Asked, range: ByteRange, pieces: Vec<Piece>) {
        self.counts.read_bytes.add(range.length());
        let mut frame = Frame::default();
        reply::put_data_header(frame.header(), self.mode(), asked.to, range.start(), range.length(), Last::Yes);
        pieces.into_iter().flat_map(spelled_out).for_each(|data| frame.data(data));
        self.outbox.send(frame);
        self.ledger.note_one(&asked, None);
    }

    async fn stream_whole(&self, asked: Asked, range: ByteRange, listed: OnTheList<'_>) {
        let segments = stream::iter(range.pieces(SEGMENT));
        let reads = segments.map(async |part| (part, self.pieces(part).await)).buffered(WINDOW);
        let mut reads = pin!(reads);
        // An error in the first segment, which is where most are found, can still be told.
        let first = match reads.next().await {
            Some((_, Ok(pieces))) => pieces,
            Some((_, Err(error))) => return self.fail(asked, &error, None),
            None => return,
        };
        let stream = self.outbox.stream().await;
        // With chunks, an error may come behind the data, so the data is not called the last of the reply.
        let mut header = BytesMut::with_capacity(reply::MAX_DATA_HEADER);
        reply::put_data_header(&mut header, self.mode(), asked.to, range.start(), range.length(), Last::No);
        stream.send(header.freeze()).await;
        listed.running.is_begun.set(true);
        for data in first.into_iter().flat_map(spelled_out) {
            let length = data.len();
            stream.send(data).await;
            listed.running.has_answered(length);
        }
        self.stream_reads(stream, asked, range.end(), reads, listed).await;
        self.counts.read_bytes.add(range.length());
    }

    /// Streams `range`, the rest of a frame of which a part has been sent, and ends the reply.
    pub(super) async fn stream_rest(&self, stream: Streaming, asked: Asked, range: ByteRange, fragments: Fragments) {
        let segments = stream::iter(range.pieces(SEGMENT));
        let reads = segments.map(async |part| (part, self.pieces(part).await)).buffered(WINDOW);
        let listed = self.note_running(asked, Command::Read(range, fragments), range);
        listed.running.is_begun.set(true);
        self.stream_reads(stream, asked, range.end(), pin!(reads), listed).await;
        self.counts.read_bytes.add(range.length());
    }

    /// Streams what `reads` bring, up to `end`, where the frame ends, and ends the reply.
    async fn stream_reads(
        &self,
        stream: Streaming,
        asked: Asked,
        end: u64,
        mut reads: impl Stream<Item = (ByteRange, Result<Vec<Piece>>)> + Unpin,
        listed: OnTheList<'_>,
    ) {
        while let Some((part, result)) = reads.next().await {
            match result {
                Ok(pieces) => {
                    for data in pieces.into_iter().flat_map(spelled_out) {
                        let length = data.len();
                        stream.send(data).await;
                        listed.running.has_answered(length);
                    }
                }
                Err(error) if self.mode() == ReplyMode::Simple => {
                    seldom!(warn, error = %error.chain(), "a long read failed in the middle: closing the connection");
                    return self.is_broken.set(true);
                }
                Err(error) => {
                    // From here on these are not the bytes of the image, and nobody else may go on with it.
                    drop(listed);
                    for data in spelled_out(Piece::Hole(end - part.start())) {
                        stream.send(data).await;
                    }
                    drop(stream);
                    return self.fail(asked, &error, Some(part.start()));
                }
            }
        }
        drop(stream);
        self.end_of_frame(asked);
    }

    /// Ends a reply whose data was one frame, which did not say that it was the last.
    pub(super) fn end_of_frame(&self, asked: Asked) {
        self.ledger.note_one(&asked, None);
        if self.mode().has_chunks() {
            let mut frame = Frame::default();
            reply::put_read_done(frame.header(), self.mode(), asked.to);
            self.outbox.send(frame);
        }
    }

    /// Sends the status of `range` in all selected contexts. `is_news` is that of notices.
    pub(super) async fn block_status(&self, asked: Asked, range: ByteRange, extents: Extents, is_news: bool) {
        let limit = if extents == Extents::One { 1 } else { EXTENTS };
        let _listed = self.note_running(asked, Command::BlockStatus(range, extents), range);
        let mut frame = Frame::default();
        for (index, (id, context)) in self.contexts.iter().enumerate() {
            let found = match context {
                Offered::Export(context) => self.extents(range, *context, limit).await,
                Offered::Notice => Ok(vec![Extent { length: range.length(), status: is_news.into() }]),
            };
            let mut found = match found {
                Ok(found) => found,
                Err(error) => return self.fail(asked, &error, None),
            };
            if self.mode() != ReplyMode::Extended {
                cut_to_32_bits(&mut found);
            }
            let last = if index + 1 == self.contexts.len() { Last::Yes } else { Last::No };
            reply::put_block_status(frame.header(), self.mode(), asked.to, *id, &found, last);
        }
        self.outbox.room().await;
        self.outbox.send(frame);
        self.ledger.note_one(&asked, None);
    }

    async fn extents(&self, range: ByteRange, context: Context, limit: usize) -> Result<Vec<Extent>> {
        let ask = async |at: Rc<Occupant>| {
            if at.tells(context) {
                at.export.extents(range, context, limit).await
            } else {
                // "NBD_REPLY_TYPE_BLOCK_STATUS": nothing special may be said of any range.
                Ok(vec![Extent { length: range.length(), status: 0 }])
            }
        };
        self.seat.ask(ask).await
    }
}

/// A piece as bytes.
fn spelled_out(piece: Piece) -> impl Iterator<Item = Bytes> {
    let (data, zeroes) = match piece {
        Piece::Data(data) => (Some(data), 0),
        Piece::Hole(length) => (None, length),
    };
    let zeroes = ByteRange::between(0, zeroes).pieces(to_u64(ZEROES.len()));
    data.into_iter().chain(zeroes.map(|part| Bytes::from_static(&ZEROES).slice(..to_usize(part.length()))))
}

/// Cuts the list at the first extent that 32 bits cannot say, which may be shorter than it is.
fn cut_to_32_bits(extents: &mut Vec<Extent>) {
    if let Some(position) = extents.iter().position(|extent| extent.length > LONGEST_COMPACT) {
        extents[position].length = LONGEST_COMPACT;
        extents.truncate(position + 1);
    }
}

/// A write whose payload arrives in segments. It is answered when all of them have arrived and are done.
#[derive(Debug)]
pub(super) struct WriteJob {
    session: Rc<Session>,
    asked: Cell<Asked>,
    durability: Durability,
    /// Segments under way, and one for the payload that is still to come.
    pending: Cell<usize>,
    failure: RefCell<Option<Error>>,
}

impl WriteJob {
    pub(super) fn new(session: &Rc<Session>, asked: Asked, durability: Durability) -> Rc<Self> {
        Rc::new(Self {
            session: Rc::clone(session),
            asked: Cell::new(asked),
            durability,
            pending: Cell::new(1),
            failure: RefCell::new(None),
        })
    }

    /// Writes one segment.
    pub(super) async fn write(self: Rc<Self>, offset: u64, data: Bytes, held: Held) {
        self.session.counts.written_bytes.add(to_u64(data.len()));
        let at = self.session.seat.now();
        let result = at.export.write(offset, data, self.durability).await;
        drop(held);
        if let Err(error) = result {
            *self.failure.borrow_mut() = Some(error);
        }
        self.one_done();
    }

    /// A write of which a part has been made elsewhere, and what came of it.
    pub(super) fn resumed(
        session: &Rc<Session>,
        asked: Asked,
        durability: Durability,
        so_far: Option<Error>,
    ) -> Rc<Self> {
        let job = Self::new(session, asked, durability);
        *job.failure.borrow_mut() = so_far;
        job
    }

    /// Whom it is answered to, and what has gone wrong so far.
    pub(super) fn so_far(&self) -> (ReplyTo, Option<Error>) {
        (self.asked.get().to, self.failure.borrow().clone())
    }

    pub(super) const fn durability(&self) -> Durability {
        self.durability
    }

    /// Notes that one more segment is under way.
    pub(super) fn one_more(&self) {
        self.pending.set(self.pending.get() + 1);
    }

    /// Notes that all of the payload had arrived at `time`.
    pub(super) fn arrived(&self, time: Instant) {
        self.asked.set(Asked { began: Some(time), ..self.asked.get() });
        self.one_done();
    }

    /// Notes that a segment, or the payload, is done.
    fn one_done(&self) {
        self.pending.set(self.pending.get() - 1);
        if self.pending.get() == 0 {
            self.session.finish(self.asked.get(), self.failure.take().map_or(Ok(()), Err));
        }
    }
}

/// The error for a request that was refused without reaching the export.
pub(super) fn refusal(kind: ErrorKind, message: &'static str) -> Error {
    Error::new(kind, message)
}
