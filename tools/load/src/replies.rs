//! Takes a stream of replies apart where it was received.
//!
//! Data are not gathered: each stretch of them is reported as it lies in the input, and whoever does not look at it
//! has skipped it.

use std::ops::Range;

use anyhow::{Context, bail};
use headwater::error::ErrorKind;
use headwater::nbd::handshake::ReplyMode;
use headwater::nbd::reply::{self, Header, Last};
use headwater::nbd::wire::chunk;
use headwater::units::{to_u64, to_usize};

/// Bytes that one system call receives at most. All replies of 32 requests of 4K fit.
const INPUT: usize = 256 << 10;

/// What a stretch of the input means.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// Data from `offset` of the export on.
    Data {
        /// The request.
        cookie: u64,
        /// Where in the export.
        offset: u64,
        /// Where in the input.
        range: Range<usize>,
    },
    /// Zeroes that were not sent.
    Hole {
        /// The request.
        cookie: u64,
        /// Where in the export.
        offset: u64,
        /// Bytes.
        length: u32,
    },
    /// The request has failed, and its reply goes on.
    Failure {
        /// The request.
        cookie: u64,
        /// How.
        kind: ErrorKind,
    },
    /// The reply is at its end.
    End {
        /// The request.
        cookie: u64,
    },
}

/// The input of one connection.
#[derive(Debug)]
pub(crate) struct Replies {
    mode: ReplyMode,
    input: Vec<u8>,
    /// What of the input has been received and not been taken.
    filled: Range<usize>,
    arriving: Option<Arriving>,
    /// The reply that ends before anything else is taken.
    ending: Option<u64>,
}

/// Data that are announced and not yet taken.
#[derive(Debug, Clone, Copy)]
struct Arriving {
    cookie: u64,
    offset: u64,
    left: u64,
    last: Last,
}

impl Replies {
    /// Nothing has come yet but `left_over` of the negotiation.
    pub(crate) fn new(mode: ReplyMode, left_over: &[u8]) -> Self {
        let mut input = vec![0; INPUT];
        input[..left_over.len()].copy_from_slice(left_over);
        Self { mode, input, filled: 0..left_over.len(), arriving: None, ending: None }
    }

    /// Where to receive into. What has not been taken moves to the front; it is less than a message.
    pub(crate) fn room(&mut self) -> &mut [u8] {
        self.input.copy_within(self.filled.clone(), 0);
        self.filled = 0..self.filled.len();
        &mut self.input[self.filled.end..]
    }

    /// The first `bytes` of the room have been filled.
    pub(crate) fn received(&mut self, bytes: usize) {
        self.filled.end += bytes;
    }

    /// What lies at a range of the input that an event has named.
    pub(crate) fn bytes(&self, range: Range<usize>) -> &[u8] {
        &self.input[range]
    }

    /// The next event, or `None` when more must be received. `range_of` says what a read asked for: offset and
    /// length.
    pub(crate) fn next(&mut self, range_of: impl Fn(u64) -> Option<(u64, u32)>) -> anyhow::Result<Option<Event>> {
        loop {
            if let Some(cookie) = self.ending.take() {
                return Ok(Some(Event::End { cookie }));
            }
            if let Some(arriving) = self.arriving {
                return Ok(self.take_data(arriving));
            }
            let Some((header, length)) = reply::decode(&self.input[self.filled.clone()], self.mode)? else {
                return Ok(None);
            };
            match header {
                Header::Simple { cookie, error } => {
                    self.filled.start += length;
                    match (error, range_of(cookie)) {
                        (Some(kind), _) => {
                            self.ending = Some(cookie);
                            return Ok(Some(Event::Failure { cookie, kind }));
                        }
                        (None, Some((offset, length))) if self.mode == ReplyMode::Simple => {
                            self.arriving = Some(Arriving { cookie, offset, left: length.into(), last: Last::Yes });
                        }
                        (None, Some(_)) => bail!("a read was answered with a simple reply"),
                        (None, None) => self.ending = Some(cookie),
                    }
                }
                Header::Chunk { cookie, kind, length: payload, last } => {
                    match self.take_chunk(length, to_usize(payload), cookie, kind, last)? {
                        Chunk::Incomplete => return Ok(None),
                        Chunk::Event(event) => return Ok(Some(event)),
                        Chunk::Silent => {}
                    }
                }
            }
        }
    }

    fn take_data(&mut self, arriving: Arriving) -> Option<Event> {
        let Arriving { cookie, offset, left, last } = arriving;
        let length = self.filled.len().min(to_usize(left));
        if length == 0 {
            return None;
        }
        let range = self.filled.start..self.filled.start + length;
        self.filled.start = range.end;
        let taken = to_u64(length);
        self.arriving = (taken < left).then_some(Arriving { offset: offset + taken, left: left - taken, ..arriving });
        self.ending = (taken == left && last == Last::Yes).then_some(cookie);
        Some(Event::Data { cookie, offset, range })
    }

    fn take_chunk(
        &mut self,
        header: usize,
        payload: usize,
        cookie: u64,
        kind: u16,
        last: Last,
    ) -> anyhow::Result<Chunk> {
        // All of a chunk but its data must be there; of a data chunk, its offset.
        let needed = if kind == chunk::OFFSET_DATA { 8 } else { payload };
        if needed > INPUT / 2 || payload < needed {
            bail!("a reply chunk of type {kind} with {payload} bytes");
        }
        if self.filled.len() < header + needed {
            return Ok(Chunk::Incomplete);
        }
        let start = self.filled.start + header;
        let bytes = &self.input[start..start + needed];
        let event = match kind {
            chunk::NONE if payload == 0 => None,
            chunk::OFFSET_DATA => {
                let offset = u64::from_be_bytes(bytes.try_into().context("an offset has eight bytes")?);
                self.arriving = Some(Arriving { cookie, offset, left: to_u64(payload - needed), last });
                None
            }
            chunk::OFFSET_HOLE => {
                let (offset, length) = reply::decode_hole(bytes)?;
                Some(Event::Hole { cookie, offset, length })
            }
            kind if kind & chunk::ERROR_BIT != 0 => {
                let (kind, _) = reply::decode_error(kind, bytes)?;
                Some(Event::Failure { cookie, kind })
            }
            kind => bail!("a reply chunk of type {kind}, which does not answer a read or a write"),
        };
        self.filled.start = start + needed;
        if self.arriving.is_none() && last == Last::Yes {
            self.ending = Some(cookie);
        }
        Ok(event.map_or(Chunk::Silent, Chunk::Event))
    }
}

/// What a chunk came to.
enum Chunk {
    /// More of it must be received.
    Incomplete,
    Event(Event),
    /// Nothing by itself.
    Silent,
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::{BufMut, BytesMut};
    use headwater::nbd::reply::{ReplyTo, put_data_header, put_done, put_error, put_hole, put_read_done};

    const READ: ReplyTo = ReplyTo { cookie: 1, offset: 100 };
    const WRITE: ReplyTo = ReplyTo { cookie: 2, offset: 100 };
    const MODES: [ReplyMode; 3] = [ReplyMode::Simple, ReplyMode::Structured, ReplyMode::Extended];

    fn range_of(cookie: u64) -> Option<(u64, u32)> {
        (cookie == READ.cookie).then_some((READ.offset, 10))
    }

    /// What comes out when the input arrives in pieces of `step` bytes: data, and everything else.
    fn taken(mode: ReplyMode, input: &[u8], step: usize) -> (Vec<(u64, u8)>, Vec<Event>) {
        let mut replies = Replies::new(mode, &[]);
        let (mut data, mut others) = (Vec::new(), Vec::new());
        for piece in input.chunks(step) {
            replies.room()[..piece.len()].copy_from_slice(piece);
            replies.received(piece.len());
            while let Some(event) = replies.next(range_of).unwrap() {
                match event {
                    Event::Data { cookie, offset, range } => {
                        assert_eq!(cookie, READ.cookie);
                        data.extend((offset..).zip(replies.bytes(range).iter().copied()));
                    }
                    other => others.push(other),
                }
            }
        }
        (data, others)
    }

    fn expected_data() -> Vec<(u64, u8)> {
        (100..).zip(*b"0123456789").collect()
    }

    #[test]
    fn replies_come_out_whole_however_they_arrive() {
        for mode in MODES {
            let mut input = BytesMut::new();
            put_done(&mut input, mode, WRITE);
            put_data_header(&mut input, mode, READ, 100, 10, Last::Yes);
            input.put_slice(b"0123456789");
            put_error(&mut input, mode, WRITE, ErrorKind::NoSpace, "full", None);
            for step in [1, 2, 7, 19, 1000] {
                let (data, others) = taken(mode, &input, step);
                assert_eq!(data, expected_data(), "{mode:?} {step}");
                let end = |to: ReplyTo| Event::End { cookie: to.cookie };
                let failure = Event::Failure { cookie: 2, kind: ErrorKind::NoSpace };
                assert_eq!(others, [end(WRITE), end(READ), failure, end(WRITE)], "{mode:?} {step}");
            }
        }
    }

    #[test]
    fn pieces_and_holes_are_told() {
        let mode = ReplyMode::Structured;
        let mut input = BytesMut::new();
        put_data_header(&mut input, mode, READ, 100, 4, Last::No);
        input.put_slice(b"0123");
        put_hole(&mut input, mode, READ, 104, 6, Last::No);
        put_read_done(&mut input, mode, READ);
        for step in [1, 5, 1000] {
            let (data, others) = taken(mode, &input, step);
            assert_eq!(data, expected_data()[..4]);
            assert_eq!(others, [Event::Hole { cookie: 1, offset: 104, length: 6 }, Event::End { cookie: 1 }]);
        }
    }

    #[test]
    fn what_breaks_the_protocol_is_an_error() {
        let failing = |mode, input: &[u8]| {
            let mut replies = Replies::new(mode, input);
            (0..10).any(|_| replies.next(range_of).is_err())
        };
        let mut simple = BytesMut::new();
        put_done(&mut simple, ReplyMode::Simple, READ);
        assert!(failing(ReplyMode::Structured, &simple), "a read with a simple reply");
        assert!(failing(ReplyMode::Simple, b"HTTP/1.1 200 OK\r\n\r\n"));
        let mut short = BytesMut::new();
        put_data_header(&mut short, ReplyMode::Structured, READ, 100, 10, Last::Yes);
        short[16..20].copy_from_slice(&4u32.to_be_bytes());
        assert!(failing(ReplyMode::Structured, &short), "a data chunk without its offset");
    }
}
