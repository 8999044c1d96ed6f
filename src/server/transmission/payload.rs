//! Payload: that of writes, on its way from the input to the export, and what is skipped.
//!
//! A write is made from the input buffer as far as its payload has arrived, if the export takes it without waiting,
//! and together with its neighbours. Otherwise the payload is gathered in segments, each of which becomes a future of
//! the connection.

use std::io::IoSlice;
use std::rc::Rc;

use bytes::{Buf, BytesMut};

use super::Transmission;
use crate::error::ErrorKind;
use crate::export::TryWrite;
use crate::nbd::reply::ReplyTo;
use crate::nbd::request::{self, Checked, Command, Durability, header_length};
use crate::ranges::ByteRange;
use crate::server::answered::Asked;
use crate::server::figures::Answers;
use crate::server::requests::{Held, Session, WriteJob, refusal};
use crate::units::{to_u64, to_usize};

/// Writes that are made together at most.
const RUN: usize = 64;
/// The page of the page cache: a write of a part of one may have to read the rest from disk first.
const PAGE: u64 = 4096;
/// A write's payload is written in segments of this size as it arrives.
const WRITE_SEGMENT: u64 = 1 << 20;

/// Payload that belongs to the last request.
#[derive(Debug)]
pub(super) enum Payload {
    /// It is of no use; then the request is answered with the error.
    Skip { left: u64, asked: Asked, kind: ErrorKind, message: &'static str },
    /// It is to be written.
    Write { job: Rc<WriteJob>, rest: ByteRange, segment: Option<Segment> },
}

/// A part of a write's payload that is arriving.
#[derive(Debug)]
pub(super) struct Segment {
    pub(super) bytes: BytesMut,
    length: usize,
    held: Held,
}

impl Segment {
    pub(super) fn missing(&self) -> usize {
        self.length - self.bytes.len()
    }
}

/// Answers writes that have been made, of so many bytes together, once they are durable.
async fn flush_run(session: Rc<Session>, answers: Vec<ReplyTo>, first: Asked, bytes: u64) {
    match session.seat.now().export.flush().await {
        Ok(()) => answer_run(&session, &answers, first, bytes),
        Err(error) => answers.into_iter().for_each(|to| session.fail(Asked { to, ..first }, &error, None)),
    }
}

/// Answers writes that arrived together with `first`, which is one of them.
fn answer_run(session: &Session, answers: &[ReplyTo], first: Asked, bytes: u64) {
    answers.iter().for_each(|to| session.put_done(*to));
    let requests = to_u64(answers.len());
    session.ledger.note(Answers { operation: first.operation, requests, bytes, error: None }, first.began);
}

fn try_write(session: &Session, offset: u64, parts: &[IoSlice<'_>]) -> TryWrite {
    session.seat.with(|export| export.try_write(offset, parts))
}

/// The write at the front of `input`, if there is one of this durability that goes on at `offset`.
fn following(input: &[u8], rules: &request::Rules, offset: u64, wanted: Durability) -> Option<(ReplyTo, ByteRange)> {
    let header = request::decode(input, rules.mode).ok()??;
    match request::check(&header, rules) {
        Ok(Checked::Accepted(Command::Write(range, durability))) if range.start() == offset && durability == wanted => {
            Some((ReplyTo { cookie: header.cookie, offset: header.offset }, range))
        }
        _ => None,
    }
}

/// How much of `rest` can be written with `here` bytes of it: all, or whole pages.
fn whole_pages(rest: ByteRange, here: usize) -> ByteRange {
    let end = (rest.start() + to_u64(here)).min(rest.end());
    let end = if end == rest.end() { end } else { end / PAGE * PAGE };
    ByteRange::between(rest.start(), end.max(rest.start()))
}

impl Transmission {
    pub(super) fn take_write(&mut self, asked: Asked, rest: ByteRange, durability: Durability) {
        if self.write_run(asked, rest, durability) {
            return;
        }
        let job = WriteJob::new(&self.session, asked, durability);
        self.payload = Some(Payload::Write { job, rest, segment: None });
    }

    /// Makes a write whose payload is here, if that needs no waiting, together with those that follow it both in the
    /// input and in the image.
    fn write_run(&mut self, first: Asked, range: ByteRange, durability: Durability) -> bool {
        let session = &*self.session;
        let header = header_length(session.rules.mode);
        let mut slices = [IoSlice::new(&[]); RUN];
        let mut answers = [first.to; RUN];
        let (mut count, mut next, mut used) = (0, Some((first.to, range)), 0);
        let mut end = range.start();
        while count < RUN
            && let Some((to, part)) = next
            && let Some(payload) = self.input.get(used..used + to_usize(part.length()))
        {
            (slices[count], answers[count]) = (IoSlice::new(payload), to);
            (count, end, used) = (count + 1, part.end(), used + payload.len());
            next = following(&self.input[used..], &session.rules, end, durability);
            used += header;
        }
        if count == 0 || try_write(session, range.start(), &slices[..count]) == TryWrite::Wait {
            return false;
        }
        // The header of the first is gone already, and there is none behind the last.
        self.input.advance(used - header);
        session.counts.requests.add(to_u64(count - 1));
        let bytes = end - range.start();
        session.counts.written_bytes.add(bytes);
        match durability {
            Durability::Volatile => answer_run(session, &answers[..count], first, bytes),
            // One flush for all that wait for one, of whatever client, costs less than many durable writes.
            Durability::Stable => {
                let (session, answers) = (Rc::clone(&self.session), answers[..count].to_vec());
                self.start(0, flush_run(session, answers, first, bytes));
            }
        }
        true
    }

    /// Takes payload from the input. `false`: it needs more input, or must wait.
    pub(super) fn take_payload(&mut self) -> bool {
        match self.payload.take() {
            Some(Payload::Skip { left, asked, kind, message }) => {
                let skipped = left.min(to_u64(self.input.len()));
                self.input.advance(to_usize(skipped));
                if left > skipped {
                    self.payload = Some(Payload::Skip { left: left - skipped, asked, kind, message });
                    return false;
                }
                self.session.fail(asked, &refusal(kind, message), None);
                true
            }
            Some(Payload::Write { job, rest, segment }) => self.take_segment(job, rest, segment),
            None => true,
        }
    }

    /// Fills one segment of a write and starts it.
    fn take_segment(&mut self, job: Rc<WriteJob>, rest: ByteRange, segment: Option<Segment>) -> bool {
        if rest.is_empty() {
            job.arrived(self.arrivals.of(self.input.len()));
            return true;
        }
        if segment.is_none() && job.durability() == Durability::Volatile {
            let here = whole_pages(rest, self.input.len());
            if here.is_empty() {
                self.payload = Some(Payload::Write { job, rest, segment: None });
                return false;
            }
            let payload = &self.input[..to_usize(here.length())];
            if try_write(&self.session, here.start(), &[IoSlice::new(payload)]) == TryWrite::Done {
                self.input.advance(payload.len());
                self.session.counts.written_bytes.add(here.length());
                let rest = ByteRange::between(here.end(), rest.end());
                self.payload = Some(Payload::Write { job, rest, segment: None });
                return true;
            }
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
