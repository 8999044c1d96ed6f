//! Reads that are longer than a segment, or worth sending without a copy, as long as they need no waiting.
//!
//! They are answered one segment at a time, in the order in which they came, each when the one before has left. So
//! they hold no memory while they wait, and a short read waits for one segment of a long one at most. What is not at
//! hand makes the rest of a read a future of the connection, like any other that has to wait.

use std::collections::VecDeque;
use std::rc::Rc;

use bytes::{BufMut, BytesMut};

use super::answered::Asked;
use super::outbox::Streaming;
use super::requests::Session;
use crate::export::{FileRange, TryRead};
use crate::nbd::handshake::ReplyMode;
use crate::nbd::reply::{self, Last, ReplyTo};
use crate::nbd::request::Fragments;
use crate::ranges::ByteRange;
use crate::units::{KIB, MIB, to_usize};

/// From this length on, data goes from the page cache to a unix socket without a copy. Shorter ones cost less when
/// many leave in one send. TCP is faster with a copy whatever the length; see `docs/decisions`.
const UNCOPIED: u64 = 64 * KIB;

/// Up to this length, reads that are copied are answered as soon as they come.
pub(super) const SHORT: u64 = 256 * KIB;
/// A segment that is copied: it and what is sent with it fit a lent buffer.
const COPIED_SEGMENT: u64 = 512 * KIB;
/// A segment that is not. Clients pay for each chunk of a reply; most requests are no longer than this.
const UNCOPIED_SEGMENT: u64 = MIB;

/// The reads of one connection that are being answered in segments.
#[derive(Debug, Default)]
pub(super) struct LongReads {
    queue: VecDeque<LongRead>,
}

#[derive(Debug)]
pub(super) struct LongRead {
    pub(super) asked: Asked,
    pub(super) fragments: Fragments,
    /// What has not been answered yet.
    pub(super) rest: ByteRange,
    /// The frame that has been begun, if the reply is one.
    pub(super) stream: Option<Streaming>,
}

/// What came of a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// A segment is on its way; there may be more.
    Sent,
    /// Nothing can be done now.
    Nothing,
    /// The first read must wait for its bytes.
    MustWait,
}

/// Whether a read of `length` bytes belongs here on a socket that takes files, or none. Shorter ones are answered at once.
pub(super) const fn is_long(length: u64, takes_files: bool) -> bool {
    length > SHORT || (length >= UNCOPIED && takes_files)
}

/// The segment that `rest` begins with.
fn first_segment(rest: ByteRange, takes_files: bool) -> ByteRange {
    let longest = if takes_files { UNCOPIED_SEGMENT } else { COPIED_SEGMENT };
    ByteRange::between(rest.start(), rest.end().min(rest.start() + longest))
}

impl LongReads {
    pub(super) fn len(&self) -> usize {
        self.queue.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    pub(super) fn push(&mut self, asked: Asked, rest: ByteRange, fragments: Fragments) {
        self.queue.push_back(LongRead { asked, fragments, rest, stream: None });
    }

    /// The read that [`Step::MustWait`] was about.
    pub(super) fn pop(&mut self) -> Option<LongRead> {
        self.queue.pop_front()
    }

    /// The first read.
    pub(super) fn first(&self) -> Option<&LongRead> {
        self.queue.front()
    }

    /// Answers one more segment. For when nothing waits to be sent.
    pub(super) fn step(&mut self, session: &Session, takes_files: bool) -> Step {
        let Some(first) = self.queue.front_mut() else { return Step::Nothing };
        let step = first.step(session, takes_files);
        if first.rest.is_empty() {
            self.queue.pop_front();
        }
        step
    }
}

impl LongRead {
    /// Whether the reply may be several frames.
    fn is_in_chunks(&self, session: &Session) -> bool {
        session.rules.mode.has_chunks() && self.fragments == Fragments::Allowed
    }

    fn step(&mut self, session: &Session, takes_files: bool) -> Step {
        if self.stream.is_none() && session.outbox.is_streaming() {
            return Step::Nothing;
        }
        let segment = first_segment(self.rest, takes_files);
        let sent = if self.is_in_chunks(session) || (self.stream.is_none() && segment == self.rest) {
            let last = if segment == self.rest { Last::Yes } else { Last::No };
            send_chunk(session, self.asked.to, segment, self.fragments, last, in_file(session, segment, takes_files))
        } else {
            self.send_part(session, segment, takes_files)
        };
        if !sent {
            return Step::MustWait;
        }
        session.counts.read_bytes.add(segment.length());
        self.rest = ByteRange::between(segment.end(), self.rest.end());
        if self.rest.is_empty() {
            match self.stream.take() {
                Some(stream) => {
                    drop(stream);
                    session.end_of_frame(self.asked);
                }
                None => session.ledger.note_one(&self.asked, None),
            }
        }
        Step::Sent
    }

    /// Sends a part of the one frame that the reply is, and its header before the first.
    fn send_part(&mut self, session: &Session, segment: ByteRange, takes_files: bool) -> bool {
        let mode = session.rules.mode;
        let (to, whole) = (self.asked.to, self.rest);
        let begin = self.stream.is_none();
        let Some(stream) = self.stream.take().or_else(|| session.outbox.try_stream()) else { return false };
        // An error may come behind the data, so the data is not called the last of the reply.
        let header = |tail: &mut BytesMut| {
            if begin {
                reply::put_data_header(tail, mode, to, whole.start(), whole.length(), Last::No);
            }
        };
        let sent = if let Some(place) = in_file(session, segment, takes_files) {
            stream.append(|tail| {
                header(tail);
                true
            });
            stream.send_file(place);
            true
        } else {
            stream.append(|tail| {
                header(tail);
                is_filled(session.seat.with(|export| export.try_read(segment, tail)), segment, tail)
            })
        };
        // A frame of which nothing has been said has not begun.
        if sent || !begin {
            self.stream = Some(stream);
        }
        sent
    }
}

fn in_file(session: &Session, range: ByteRange, takes_files: bool) -> Option<FileRange> {
    (takes_files && range.length() >= UNCOPIED).then(|| session.seat.with(|export| export.in_file(range))).flatten()
}

/// Completes what was read of `range`: a hole becomes zeroes. Whether it could be read.
fn is_filled(read: TryRead, range: ByteRange, tail: &mut BytesMut) -> bool {
    if read == TryRead::Hole {
        tail.put_bytes(0, to_usize(range.length()));
    }
    read != TryRead::Wait
}

/// Sends `range`, which is a reply or a chunk of one, if that needs no waiting: from `place`, or with a copy.
pub(super) fn send_chunk(
    session: &Session,
    to: ReplyTo,
    range: ByteRange,
    fragments: Fragments,
    last: Last,
    place: Option<FileRange>,
) -> bool {
    let mode = session.rules.mode;
    let header = |tail: &mut BytesMut| reply::put_data_header(tail, mode, to, range.start(), range.length(), last);
    if session.outbox.is_streaming() {
        return false;
    }
    if let Some(place) = place {
        session.outbox.send_file(header, place);
        return true;
    }
    session.outbox.append(|tail| {
        let start = tail.len();
        header(tail);
        match session.seat.with(|export| export.try_read(range, tail)) {
            TryRead::Hole if mode != ReplyMode::Simple && fragments == Fragments::Allowed => {
                tail.truncate(start);
                let length = u32::try_from(range.length()).expect("segments are short");
                reply::put_hole(tail, mode, to, range.start(), length, last);
                true
            }
            read => is_filled(read, range, tail),
        }
    })
}

/// What becomes of a read that has to wait after all.
pub(super) async fn finish(session: Rc<Session>, read: LongRead) {
    match read.stream {
        Some(stream) => session.stream_rest(stream, read.asked, read.rest).await,
        None => session.read(read.asked, read.rest, read.fragments).await,
    }
}
