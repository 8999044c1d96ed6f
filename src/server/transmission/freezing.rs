//! A connection that is held, made into what a successor can go on with, and made out of that again.
//!
//! Owns: when a connection stands still, what is left to do for its client then, and going on with that. Does not own:
//! the form (`frozen`), and when it is ordered (`stage`).
//!
//! A held connection takes no requests. It stands still when those under way that change something are done; what only
//! reads goes on until the connection is frozen. Nothing here waits for the client.

use std::io;
use std::rc::Rc;

use bytes::BytesMut;

use super::{End, Left, Phase, Transmission};
use crate::clock;
use crate::error::Error;
use crate::export::assemble;
use crate::nbd::errno;
use crate::nbd::reply::ReplyTo;
use crate::nbd::request::{Command, Durability};
use crate::ranges::ByteRange;
use crate::server::answered::Asked;
use crate::server::figures::Operation;
use crate::server::frozen::{Ask, Blob, Frozen, FrozenPayload, FrozenRest};
use crate::server::long_reads::LongRead;
use crate::server::outbox::{Frame, Part};
use crate::server::requests::{Session, WriteJob, cost, perform};
use crate::server::stage::Stage;
use crate::server::transmission::payload::Payload;
use crate::units::to_usize;

/// What is left to do for the client of a frozen connection.
#[derive(Debug, Default)]
pub(in crate::server) struct Rest {
    pub(in crate::server) input: Vec<u8>,
    pub(in crate::server) output: Vec<u8>,
    pub(in crate::server) held: Vec<u8>,
    pub(in crate::server) payload: Option<FrozenPayload>,
    pub(in crate::server) asks: Vec<Ask>,
}

/// The bytes of what waits to be sent.
async fn spelled_out(session: &Session, parts: Vec<Part>) -> Result<Vec<u8>, End> {
    let mut bytes = Vec::new();
    for part in parts {
        match part {
            Part::Bytes(part) => bytes.extend_from_slice(&part),
            Part::File(part) => {
                let (range, buffer) = (part.place.range, BytesMut::new());
                let read = part.place.file.read_exact_at(buffer, to_usize(range.length()), range.start()).await;
                match read {
                    Ok(read) => bytes.extend_from_slice(&read),
                    Err(_) => {
                        let pieces = session.pieces(range).await.map_err(|_| End::Broken)?;
                        bytes.extend_from_slice(&assemble(&pieces));
                    }
                }
            }
        }
    }
    Ok(bytes)
}

impl Transmission {
    /// Does what the server's stage asks for.
    pub(super) fn enter(&mut self, stage: Stage) -> io::Result<()> {
        match stage {
            Stage::Serving | Stage::Closed => {
                if matches!(self.phase, Phase::Holding { .. }) {
                    self.phase = Phase::Open;
                }
            }
            Stage::Holding => self.phase = Phase::Holding { freezes: false },
            Stage::Freezing => self.phase = Phase::Holding { freezes: true },
            Stage::Draining => self.phase = Phase::Draining { queued: self.stream.queued()? },
        }
        Ok(())
    }

    /// Notes whether the connection stands still, which one that ends does too. Says whether it is to be frozen now.
    pub(super) fn stands_still(&mut self) -> Result<bool, End> {
        // What is under way and may not be asked again is a future that is not on the list.
        let is_done = self.work.len() == self.session.running.borrow().len();
        let (is_still, freezes) = match self.phase {
            Phase::Open => (false, false),
            Phase::Holding { freezes } => (is_done, freezes && is_done),
            Phase::Draining { .. } | Phase::Closing(_) => (true, false),
        };
        self.place.set_still(is_still);
        if self.session.is_broken.get() {
            return Err(End::Broken);
        }
        Ok(freezes)
    }

    /// Makes the connection into what a successor can go on with.
    pub(super) async fn freeze(mut self) -> Left {
        self.session.ledger.publish();
        let (output, held) = self.session.outbox.take();
        let running: Vec<_> = self.session.running.borrow().iter().filter_map(|(_, ask)| ask.rest()).collect();
        let mut asks: Vec<_> = self.long_reads.rests().chain(running).collect();
        // The sort is stable.
        asks.sort_by_key(|ask| !ask.is_begun());
        self.work.clear();
        let mut rest = Rest { asks, ..Rest::default() };
        (rest.payload, rest.input) = self.take_rest();
        let end = match (spelled_out(&self.session, output).await, spelled_out(&self.session, held).await) {
            (Ok(output), Ok(held)) => {
                (rest.output, rest.held) = (output, held);
                End::Frozen
            }
            (Err(end), _) | (_, Err(end)) => end,
        };
        Left { stream: self.stream, end, rest: Some(rest) }
    }

    /// The payload that is arriving, and what has been received and not been dealt with.
    fn take_rest(&mut self) -> (Option<FrozenPayload>, Vec<u8>) {
        let input = std::mem::take(&mut self.input).to_vec();
        let frozen = |to: ReplyTo, rest, error: Option<Error>| {
            let (message, number) = match error {
                Some(error) => (error.to_string(), errno::to_wire(error.kind())),
                None => (String::new(), 0),
            };
            FrozenPayload { cookie: to.cookie, offset: to.offset, rest, error: number, message }
        };
        match self.payload.take() {
            None => (None, input),
            Some(Payload::Skip { left, asked, kind, message }) => {
                (Some(frozen(asked.to, FrozenRest::Skip(left), Some(Error::new(kind, message)))), input)
            }
            Some(Payload::Write { job, rest, segment }) => {
                let (to, failure) = job.so_far();
                let arrived = segment.map_or_else(Vec::new, |segment| segment.bytes.to_vec());
                (Some(frozen(to, FrozenRest::write(rest, job.durability()), failure)), [arrived, input].concat())
            }
        }
    }

    /// Goes on with a connection that has been frozen. `None`: what it says makes no sense.
    pub(in crate::server) fn resume(&mut self, frozen: &Frozen) -> Option<()> {
        let size = self.session.rules.size;
        let now = clock::now();
        let asked = |to, operation, bytes| Asked { to, operation, bytes, began: Some(now) };
        self.session.outbox.send(raw(&frozen.output));
        let has_begun = frozen.asks.first().is_some_and(Ask::is_begun);
        for (index, ask) in frozen.asks.iter().enumerate() {
            let command = ask.command(size)?;
            match command {
                Command::Read(rest, fragments) => {
                    let stream = match ask.is_begun() {
                        true if index > 0 || rest.is_empty() => return None,
                        true => Some(self.session.outbox.try_stream()?),
                        false => None,
                    };
                    let asked = asked(ask.to(), Operation::Read, rest.length());
                    self.long_reads.resume(LongRead { asked, fragments, rest, stream });
                }
                command => {
                    let is_cache = matches!(command, Command::Cache(_));
                    let operation = if is_cache { Operation::Cache } else { Operation::BlockStatus };
                    let asked = asked(ask.to(), operation, 0);
                    let cost = cost(&command, self.session.contexts.len());
                    self.start(cost, perform(Rc::clone(&self.session), asked, command));
                }
            }
            if index == 0 && has_begun {
                self.session.outbox.send(raw(&frozen.held));
            }
        }
        if !has_begun {
            self.session.outbox.send(raw(&frozen.held));
        }
        if let Some(payload) = &frozen.payload {
            self.payload = Some(self.resumed_payload(payload)?);
        }
        Some(())
    }

    fn resumed_payload(&self, payload: &FrozenPayload) -> Option<Payload> {
        let to = ReplyTo { cookie: payload.cookie, offset: payload.offset };
        let kind = errno::from_wire(payload.error);
        match payload.rest {
            FrozenRest::Skip(left) => {
                let asked = Asked { to, operation: Operation::Write, bytes: 0, began: None };
                Some(Payload::Skip { left, asked, kind: kind?, message: "the request was refused" })
            }
            FrozenRest::Write { start, end, stable } => {
                if start > end || end > self.session.rules.size {
                    return None;
                }
                let bytes = end.saturating_sub(payload.offset);
                let asked = Asked { to, operation: Operation::Write, bytes, began: None };
                let durability = if stable { Durability::Stable } else { Durability::Volatile };
                let so_far = kind.map(|kind| Error::new(kind, payload.message.clone()));
                let job = WriteJob::resumed(&self.session, asked, durability, so_far);
                Some(Payload::Write { job, rest: ByteRange::between(start, end), segment: None })
            }
        }
    }
}

/// Bytes that are whole frames, or the end and the beginning of some.
fn raw(bytes: &Blob) -> Frame {
    let mut frame = Frame::default();
    if !bytes.0.is_empty() {
        frame.data(bytes.0.clone().into());
    }
    frame
}
