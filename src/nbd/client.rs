//! The client's side of the transmission phase: requests in flight and the assembly of their replies.
//!
//! Owns: cookies, the buffers that replies are assembled in, and the checks that make a reply believable: data
//! covers what was asked exactly once, chunks belong to a request in flight and have a type that answers it. Does
//! not own: the socket, time-outs, retries. Any [`Violation`] leaves the connection useless; whoever holds it drops
//! it and fails or repeats what is in flight.
//!
//! Memory: what was asked for, from the first byte of its reply on, plus at most one chunk that is not data, plus [`MAX_ISLANDS`] entries per read.

use std::ops::Range;

use bytes::{Buf, Bytes, BytesMut};
use slab::Slab;

use super::buffers::Buffer;
use super::export::Extent;
use super::handshake::ReplyMode;
use super::reply::{self, Last, Violation};
use super::request;
use super::wire::{CommandFlags, chunk, command};
use crate::error::{Error, ErrorKind};
use crate::ranges::{ByteRange, Coverage};
use crate::units::{KIB, to_usize};

/// Pieces of one read that may be outstanding out of order, before the server is taken to be hostile.
pub const MAX_ISLANDS: u64 = 4096;

/// Data of at least this length is worth a system call of its own.
const LONG: u64 = 16 * KIB;

fn is_long(request: &Request) -> bool {
    request.command == command::READ && request.range.length() >= LONG
}

/// A request to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Command number; not DISC.
    pub command: u16,
    /// Its flags.
    pub flags: CommandFlags,
    /// Offset and length.
    pub range: ByteRange,
}

/// What a reply brought.
#[derive(Debug)]
pub enum Answer {
    /// The data of a read, with the parts of it that came as holes (offsets of the export, sorted, disjoint).
    Data {
        /// All bytes asked for; zero where there are holes.
        bytes: Bytes,
        /// The holes.
        holes: Vec<ByteRange>,
    },
    /// The extents from the request's offset on, for each context id.
    Status(Vec<(u32, Vec<Extent>)>),
    /// Success of any other command.
    Done,
}

/// A reply that is complete.
#[derive(Debug)]
pub struct Completion<T> {
    /// What was handed over with the request.
    pub tag: T,
    /// The answer, or the server's refusal.
    pub result: Result<Answer, Error>,
}

/// Requests in flight on one connection. `T` is handed over with each request and comes back with its reply.
#[derive(Debug)]
pub struct InFlight<T> {
    mode: ReplyMode,
    requests: Slab<Pending<T>>,
    /// Those that are reads of at least [`LONG`] bytes.
    long_reads: usize,
    /// Counts submissions, so that a late reply to an old request is not taken for one to a new request.
    generation: u32,
    /// Data that is arriving: the request's key, where it goes, how much is missing, whether the reply ends with it.
    arriving: Option<Arriving>,
}

#[derive(Debug)]
struct Pending<T> {
    tag: T,
    generation: u32,
    request: Request,
    assembly: Assembly,
    failure: Option<Error>,
}

#[derive(Debug)]
enum Assembly {
    /// The buffer is there from the first byte on. What `coverage` does not have is not filled.
    Read {
        buffer: Buffer,
        coverage: Coverage,
        holes: Vec<ByteRange>,
    },
    Status(Vec<(u32, Vec<Extent>)>),
    Plain,
}

#[derive(Debug, Clone, Copy)]
struct Arriving {
    key: usize,
    at: usize,
    left: usize,
    last: Last,
}

impl<T> InFlight<T> {
    /// Nothing in flight.
    pub const fn new(mode: ReplyMode) -> Self {
        Self { mode, requests: Slab::new(), long_reads: 0, generation: 0, arriving: None }
    }

    /// The number of requests that wait for their reply.
    pub fn len(&self) -> usize {
        self.requests.len()
    }

    /// Whether no request waits for a reply.
    pub fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    /// Appends a request to `output` and remembers it. The payload of a write must follow in the output.
    pub fn submit(&mut self, request: Request, tag: T, output: &mut BytesMut) {
        let assembly = match request.command {
            command::READ => {
                Assembly::Read { buffer: Buffer::default(), coverage: Coverage::new(request.range), holes: Vec::new() }
            }
            command::BLOCK_STATUS => Assembly::Status(Vec::new()),
            _ => Assembly::Plain,
        };
        self.long_reads += usize::from(is_long(&request));
        self.generation = self.generation.wrapping_add(1);
        let generation = self.generation;
        let key = self.requests.insert(Pending { tag, generation, request, assembly, failure: None });
        let header = request::Header {
            flags: request.flags.bits(),
            command: request.command,
            cookie: cookie(generation, key),
            offset: request.range.start(),
            length: request.range.length(),
        };
        request::encode(output, self.mode, header);
    }

    /// Gives up all requests, in no order, because the connection is lost.
    pub fn abandon(&mut self) -> impl Iterator<Item = T> {
        self.arriving = None;
        self.long_reads = 0;
        std::mem::take(&mut self.requests).into_iter().map(|(_, pending)| pending.tag)
    }

    /// Whether all that may come next is data that is long enough to be received straight into its place, behind a
    /// short header.
    pub fn expects_long_data(&self) -> bool {
        self.long_reads > 0 && self.long_reads == self.requests.len()
    }

    /// Where data that is arriving goes, so that it can be received without a copy. Only when the input given to
    /// [`Self::receive`] is used up. Report what was filled to [`Self::filled`].
    pub fn data_target(&mut self) -> Option<&mut [u8]> {
        let Arriving { key, at, left, .. } = self.arriving?;
        match &mut self.requests[key].assembly {
            Assembly::Read { buffer, .. } => Some(&mut buffer[at..at + left]),
            Assembly::Status(_) | Assembly::Plain => None,
        }
    }

    /// The first `bytes` of [`Self::data_target`] have been filled.
    pub fn filled(&mut self, bytes: usize) -> Result<Option<Completion<T>>, Violation> {
        let Some(arriving) = &mut self.arriving else { return Ok(None) };
        arriving.at += bytes;
        arriving.left -= bytes;
        let Arriving { key, left, last, .. } = *arriving;
        if left > 0 {
            return Ok(None);
        }
        self.arriving = None;
        if last == Last::Yes { self.complete(key).map(Some) } else { Ok(None) }
    }

    /// Takes the next whole message, or as much data as there is, from `input`. Call again while it returns
    /// [`Received::Progress`] or [`Received::Reply`].
    pub fn receive(&mut self, input: &mut BytesMut) -> Result<Received<T>, Violation> {
        if let Some(target) = self.data_target() {
            if input.is_empty() {
                return Ok(Received::NeedInput);
            }
            let count = target.len().min(input.len());
            target[..count].copy_from_slice(&input[..count]);
            input.advance(count);
            return Ok(self.filled(count)?.map_or(Received::Progress, Received::Reply));
        }
        let Some((header, length)) = reply::decode(input, self.mode)? else { return Ok(Received::NeedInput) };
        match header {
            reply::Header::Simple { cookie, error } => {
                input.advance(length);
                self.take_simple(cookie, error)
            }
            reply::Header::Chunk { cookie, kind, length: payload, last } => {
                self.take_chunk(input, length, Chunk { cookie, kind, payload: to_usize(payload), last })
            }
        }
    }

    fn take_simple(&mut self, cookie: u64, error: Option<ErrorKind>) -> Result<Received<T>, Violation> {
        let key = self.find(cookie)?;
        let pending = &mut self.requests[key];
        pending.failure = error.map(refused);
        if let Assembly::Read { buffer, coverage, .. } = &mut pending.assembly {
            // "Structured reply chunk message": reads must not be answered by a simple reply.
            if self.mode != ReplyMode::Simple {
                return Err(Violation::Unexpected(chunk::NONE));
            }
            if error.is_none() && !pending.request.range.is_empty() {
                coverage.add(pending.request.range).map_err(|_| Violation::BadCoverage)?;
                *buffer = Buffer::of(to_usize(pending.request.range.length()));
                self.arriving = Some(Arriving { key, at: 0, left: buffer.len(), last: Last::Yes });
                return Ok(Received::Progress);
            }
        }
        self.complete(key).map(Received::Reply)
    }

    fn take_chunk(&mut self, input: &mut BytesMut, header: usize, chunk: Chunk) -> Result<Received<T>, Violation> {
        // All of a chunk but its data must be there; of a data chunk, its offset.
        let needed = if chunk.kind == chunk::OFFSET_DATA { chunk.payload.min(8) } else { chunk.payload };
        if input.len() < header + needed {
            return Ok(Received::NeedInput);
        }
        let key = self.find(chunk.cookie)?;
        input.advance(header);
        let payload = input.split_to(needed);
        let pending = &mut self.requests[key];
        match (chunk.kind, &mut pending.assembly) {
            (chunk::NONE, _) if chunk.payload == 0 && chunk.last == Last::Yes => {}
            (chunk::OFFSET_DATA, Assembly::Read { buffer, coverage, .. }) => {
                let piece = data_piece(&payload, chunk.payload)?;
                let place = cover(buffer, coverage, pending.request.range, piece)?;
                self.arriving = Some(Arriving { key, at: place.start, left: place.len(), last: chunk.last });
                return Ok(Received::Progress);
            }
            (chunk::OFFSET_HOLE, Assembly::Read { buffer, coverage, holes }) => {
                let (offset, length) = reply::decode_hole(&payload)?;
                let hole = ByteRange::new(offset, u64::from(length)).ok_or(Violation::BadCoverage)?;
                let place = cover(buffer, coverage, pending.request.range, hole)?;
                buffer[place].fill(0);
                holes.push(hole);
            }
            (chunk::BLOCK_STATUS | chunk::BLOCK_STATUS_EXT, Assembly::Status(contexts)) => {
                let (context, extents) = reply::decode_block_status(chunk.kind, &payload)?;
                if contexts.iter().any(|(seen, _)| *seen == context) {
                    return Err(Violation::BadCoverage);
                }
                contexts.push((context, extents));
            }
            // An error of a type that we do not know is still an error ("Structured reply types").
            (kind, _) if kind & chunk::ERROR_BIT != 0 => {
                let (error, message) = reply::decode_error(kind, &payload)?;
                pending.failure.get_or_insert_with(|| refused_because(error, message));
            }
            (kind, _) => return Err(Violation::Unexpected(kind)),
        }
        if chunk.last == Last::Yes {
            return self.complete(key).map(Received::Reply);
        }
        Ok(Received::Progress)
    }

    fn find(&self, wanted: u64) -> Result<usize, Violation> {
        let key = to_usize(wanted & u64::from(u32::MAX));
        match self.requests.get(key) {
            Some(pending) if cookie(pending.generation, key) == wanted => Ok(key),
            _ => Err(Violation::UnknownCookie),
        }
    }

    fn complete(&mut self, key: usize) -> Result<Completion<T>, Violation> {
        let Pending { tag, request, assembly, failure, .. } = self.requests.remove(key);
        self.long_reads -= usize::from(is_long(&request));
        let answer = match assembly {
            // A failed read need not have brought everything.
            _ if failure.is_some() => Answer::Done,
            Assembly::Read { coverage, .. } if !coverage.is_complete() => return Err(Violation::BadCoverage),
            Assembly::Read { buffer, mut holes, .. } => {
                holes.sort_unstable_by_key(|hole| hole.start());
                Answer::Data { bytes: buffer.freeze(), holes }
            }
            Assembly::Status(contexts) => Answer::Status(contexts),
            Assembly::Plain => Answer::Done,
        };
        Ok(Completion { tag, result: failure.map_or(Ok(answer), Err) })
    }
}

/// What [`InFlight::receive`] found in the input.
#[derive(Debug)]
pub enum Received<T> {
    /// Nothing whole: more bytes are needed.
    NeedInput,
    /// Something that does not finish a reply.
    Progress,
    /// The end of a reply.
    Reply(Completion<T>),
}

#[derive(Debug, Clone, Copy)]
struct Chunk {
    cookie: u64,
    kind: u16,
    payload: usize,
    last: Last,
}

fn cookie(generation: u32, key: usize) -> u64 {
    u64::from(generation) << 32 | u64::from(u32::try_from(key).expect("far fewer than 2^32 requests are in flight"))
}

/// The range that a data chunk covers, from its first eight bytes and its length.
fn data_piece(mut payload: &[u8], length: usize) -> Result<ByteRange, Violation> {
    let malformed = Violation::Malformed(chunk::OFFSET_DATA);
    let offset = payload.try_get_u64().map_err(|_| malformed)?;
    let data = crate::units::to_u64(length - 8);
    ByteRange::new(offset, data).filter(|piece| !piece.is_empty()).ok_or(malformed)
}

/// Accounts for a piece of what was asked for. Gives its place in the buffer.
fn cover(
    buffer: &mut Buffer,
    coverage: &mut Coverage,
    whole: ByteRange,
    piece: ByteRange,
) -> Result<Range<usize>, Violation> {
    coverage.add(piece).map_err(|_| Violation::BadCoverage)?;
    if coverage.islands() > MAX_ISLANDS {
        return Err(Violation::BadCoverage);
    }
    if buffer.is_empty() {
        *buffer = Buffer::of(to_usize(whole.length()));
    }
    Ok(to_usize(piece.start() - whole.start())..to_usize(piece.end() - whole.start()))
}

fn refused(kind: ErrorKind) -> Error {
    Error::new(kind, format!("the server answered {}", super::errno::name(kind)))
}

fn refused_because(kind: ErrorKind, message: String) -> Error {
    if message.is_empty() {
        return refused(kind);
    }
    Error::new(kind, format!("the server answered {}: {message}", super::errno::name(kind)))
}

/// Feeds arbitrary bytes to a client that has a read, a block status and a flush in flight.
#[doc(hidden)]
pub fn fuzz(data: &[u8]) {
    for mode in [ReplyMode::Simple, ReplyMode::Structured, ReplyMode::Extended] {
        let mut in_flight = InFlight::new(mode);
        let mut output = BytesMut::new();
        let range = ByteRange::between(100, 1100);
        for number in [command::READ, command::BLOCK_STATUS, command::FLUSH] {
            in_flight.submit(Request { command: number, flags: CommandFlags::empty(), range }, number, &mut output);
        }
        let mut input = BytesMut::new();
        for piece in data.chunks(usize::from(data.first().copied().unwrap_or(0)) + 1) {
            input.extend_from_slice(piece);
            loop {
                match in_flight.receive(&mut input) {
                    Ok(Received::Reply(Completion {
                        tag: command::READ,
                        result: Ok(Answer::Data { bytes, holes }),
                    })) => {
                        assert_eq!(bytes.len(), 1000);
                        let empty = |hole: &ByteRange| {
                            bytes[to_usize(hole.start() - 100)..to_usize(hole.end() - 100)]
                                .iter()
                                .all(|byte| *byte == 0)
                        };
                        assert!(holes.iter().all(empty), "a hole with bytes in it");
                    }
                    Ok(Received::Progress | Received::Reply(_)) => {}
                    Ok(Received::NeedInput) => break,
                    Err(_) => return,
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::reply::ReplyTo;
    use crate::nbd::wire::MAX_PAYLOAD;
    use bytes::BufMut;
    use proptest::prelude::*;

    struct Peer {
        in_flight: InFlight<&'static str>,
        /// What the server will say.
        input: BytesMut,
        mode: ReplyMode,
    }

    impl Peer {
        fn new(mode: ReplyMode) -> Self {
            Self { in_flight: InFlight::new(mode), input: BytesMut::new(), mode }
        }

        fn submit(&mut self, number: u16, start: u64, length: u64, tag: &'static str) -> ReplyTo {
            let mut output = BytesMut::new();
            let range = ByteRange::new(start, length).unwrap();
            self.in_flight.submit(Request { command: number, flags: CommandFlags::empty(), range }, tag, &mut output);
            let header = request::decode(&output, self.mode).unwrap().unwrap();
            ReplyTo { cookie: header.cookie, offset: header.offset }
        }

        fn data(&mut self, to: ReplyTo, offset: u64, bytes: &[u8], last: Last) {
            let length = crate::units::to_u64(bytes.len());
            reply::put_data_header(&mut self.input, self.mode, to, offset, length, last);
            self.input.put_slice(bytes);
        }

        fn hole(&mut self, to: ReplyTo, offset: u64, length: u32, last: Last) {
            reply::put_hole(&mut self.input, self.mode, to, offset, length, last);
        }

        fn drain(&mut self) -> Result<Vec<Completion<&'static str>>, Violation> {
            let mut completions = Vec::new();
            loop {
                match self.in_flight.receive(&mut self.input)? {
                    Received::NeedInput => return Ok(completions),
                    Received::Progress => {}
                    Received::Reply(completion) => completions.push(completion),
                }
            }
        }

        fn only(&mut self) -> Completion<&'static str> {
            let mut completions = self.drain().unwrap();
            assert_eq!(completions.len(), 1);
            completions.remove(0)
        }
    }

    fn data_of(completion: Completion<&'static str>) -> (Bytes, Vec<ByteRange>) {
        match completion.result {
            Ok(Answer::Data { bytes, holes }) => (bytes, holes),
            other => panic!("no data: {other:?}"),
        }
    }

    #[test]
    fn replies_out_of_order_find_their_requests() {
        let mut peer = Peer::new(ReplyMode::Simple);
        let first = peer.submit(command::READ, 0, 3, "first");
        let second = peer.submit(command::READ, 3, 3, "second");
        peer.data(second, 3, b"def", Last::Yes);
        peer.data(first, 0, b"abc", Last::Yes);
        let completions = peer.drain().unwrap();
        let got: Vec<_> = completions.into_iter().map(|c| (c.tag, data_of(c).0)).collect();
        assert_eq!(got, [("second", Bytes::from("def")), ("first", Bytes::from("abc"))]);
        assert!(peer.in_flight.is_empty());
    }

    #[test]
    fn chunks_in_any_order_make_the_data_and_the_holes() {
        for mode in [ReplyMode::Structured, ReplyMode::Extended] {
            let mut peer = Peer::new(mode);
            let to = peer.submit(command::READ, 10, 9, "read");
            peer.data(to, 16, b"ghi", Last::No);
            peer.hole(to, 13, 3, Last::No);
            peer.data(to, 10, b"abc", Last::No);
            reply::put_read_done(&mut peer.input, mode, to);
            let (bytes, holes) = data_of(peer.only());
            assert_eq!(&bytes[..], b"abc\0\0\0ghi");
            assert_eq!(holes, [ByteRange::between(13, 16)]);
        }
    }

    #[test]
    fn data_can_be_received_straight_into_its_place() {
        let mut peer = Peer::new(ReplyMode::Structured);
        let to = peer.submit(command::READ, 0, 6, "read");
        peer.data(to, 0, b"ab", Last::Yes);
        // The header said two bytes of six; make it six.
        let at = peer.input.len() - 2 - 8 - 4;
        peer.input[at..at + 4].copy_from_slice(&14u32.to_be_bytes());
        assert!(peer.drain().unwrap().is_empty());
        peer.in_flight.data_target().unwrap()[..3].copy_from_slice(b"cde");
        assert!(peer.in_flight.filled(3).unwrap().is_none());
        peer.in_flight.data_target().unwrap().copy_from_slice(b"f");
        let (bytes, _) = data_of(peer.in_flight.filled(1).unwrap().unwrap());
        assert_eq!(&bytes[..], b"abcdef");
    }

    #[test]
    fn a_hole_is_zero_whatever_its_memory_was_used_for_before() {
        let mut peer = Peer::new(ReplyMode::Structured);
        for round in 0..2 {
            let to = peer.submit(command::READ, 0, 5000, "read");
            if round == 0 {
                peer.data(to, 0, &[0xff; 5000], Last::Yes);
            } else {
                peer.data(to, 0, b"x", Last::No);
                peer.hole(to, 1, 4999, Last::Yes);
            }
            let (bytes, _) = data_of(peer.only());
            let expected = if round == 0 { vec![0xff; 5000] } else { [&b"x"[..], &[0; 4999]].concat() };
            assert!(bytes == expected, "round {round}");
        }
    }

    #[test]
    fn long_data_is_expected_while_nothing_else_can_come() {
        let mut peer = Peer::new(ReplyMode::Structured);
        assert!(!peer.in_flight.expects_long_data());
        let first = peer.submit(command::READ, 0, LONG, "long");
        peer.submit(command::READ, 0, LONG, "long too");
        assert!(peer.in_flight.expects_long_data());
        let short = peer.submit(command::READ, 0, LONG - 1, "short");
        assert!(!peer.in_flight.expects_long_data());
        for to in [short, first] {
            reply::put_error(&mut peer.input, peer.mode, to, ErrorKind::Io, "", None);
            peer.only();
            assert!(peer.in_flight.expects_long_data());
        }
        assert_eq!(peer.in_flight.abandon().count(), 1);
        assert!(!peer.in_flight.expects_long_data());
    }

    #[test]
    fn data_that_does_not_cover_the_request_exactly_once_is_not_believed() {
        let too_little = |peer: &mut Peer, to| peer.data(to, 10, b"abc", Last::Yes);
        let twice = |peer: &mut Peer, to| {
            peer.data(to, 10, b"abcd", Last::No);
            peer.hole(to, 13, 3, Last::Yes);
        };
        let outside = |peer: &mut Peer, to| peer.data(to, 9, b"abcdef", Last::Yes);
        let beyond = |peer: &mut Peer, to| peer.hole(to, 10, 7, Last::Yes);
        let nothing = |peer: &mut Peer, to| reply::put_read_done(&mut peer.input, ReplyMode::Structured, to);
        let cases: [fn(&mut Peer, ReplyTo); 5] = [too_little, twice, outside, beyond, nothing];
        for case in cases {
            let mut peer = Peer::new(ReplyMode::Structured);
            let to = peer.submit(command::READ, 10, 6, "read");
            case(&mut peer, to);
            assert_eq!(peer.drain().unwrap_err(), Violation::BadCoverage);
        }
    }

    #[test]
    fn a_read_that_is_answered_in_dust_is_not_believed() {
        let mut peer = Peer::new(ReplyMode::Structured);
        let to = peer.submit(command::READ, 0, u64::from(MAX_PAYLOAD), "read");
        for offset in 0..=MAX_ISLANDS {
            peer.data(to, 2 * offset, b"x", Last::No);
        }
        assert_eq!(peer.drain().unwrap_err(), Violation::BadCoverage);
    }

    #[test]
    fn errors_come_with_the_servers_words() {
        let mut peer = Peer::new(ReplyMode::Structured);
        let to = peer.submit(command::READ, 0, 4, "read");
        peer.data(to, 0, b"ab", Last::No);
        reply::put_error(&mut peer.input, peer.mode, to, ErrorKind::Io, "bad sector", Some(2));
        let error = peer.only().result.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        assert_eq!(error.to_string(), "the server answered EIO: bad sector");
    }

    #[test]
    fn a_simple_error_leaves_the_connection_in_step() {
        let mut peer = Peer::new(ReplyMode::Simple);
        let bad = peer.submit(command::READ, 0, 4, "bad");
        let good = peer.submit(command::READ, 4, 2, "good");
        reply::put_error(&mut peer.input, peer.mode, bad, ErrorKind::Io, "", None);
        peer.data(good, 4, b"ok", Last::Yes);
        let mut completions = peer.drain().unwrap();
        assert!(completions.remove(0).result.is_err());
        assert_eq!(data_of(completions.remove(0)).0, "ok");
    }

    #[test]
    fn replies_to_nothing_in_flight_break_the_connection() {
        let mut peer = Peer::new(ReplyMode::Structured);
        let to = peer.submit(command::FLUSH, 0, 0, "flush");
        reply::put_done(&mut peer.input, peer.mode, to);
        assert!(peer.only().result.is_ok());
        peer.submit(command::FLUSH, 0, 0, "flush");
        // The first cookie again: same key, older generation.
        reply::put_done(&mut peer.input, peer.mode, to);
        assert_eq!(peer.drain().unwrap_err(), Violation::UnknownCookie);
    }

    #[test]
    fn a_chunk_that_does_not_answer_its_request_breaks_the_connection() {
        let mut peer = Peer::new(ReplyMode::Structured);
        let to = peer.submit(command::FLUSH, 0, 0, "flush");
        peer.hole(to, 0, 1, Last::Yes);
        assert_eq!(peer.drain().unwrap_err(), Violation::Unexpected(chunk::OFFSET_HOLE));
        let mut peer = Peer::new(ReplyMode::Structured);
        let to = peer.submit(command::READ, 0, 1, "read");
        reply::put_done(&mut peer.input, peer.mode, to);
        assert_eq!(peer.drain().unwrap_err(), Violation::Unexpected(chunk::NONE));
    }

    #[test]
    fn block_status_brings_each_context_once() {
        let mut peer = Peer::new(ReplyMode::Structured);
        let to = peer.submit(command::BLOCK_STATUS, 0, 100, "status");
        let extents = [Extent { length: 100, status: 1 }];
        reply::put_block_status(&mut peer.input, peer.mode, to, 1, &extents, Last::No);
        reply::put_block_status(&mut peer.input, peer.mode, to, 2, &extents, Last::Yes);
        let Ok(Answer::Status(contexts)) = peer.only().result else { panic!("no status") };
        assert_eq!(contexts, [(1, extents.to_vec()), (2, extents.to_vec())]);
        let to = peer.submit(command::BLOCK_STATUS, 0, 100, "status");
        reply::put_block_status(&mut peer.input, peer.mode, to, 1, &extents, Last::No);
        reply::put_block_status(&mut peer.input, peer.mode, to, 1, &extents, Last::Yes);
        assert_eq!(peer.drain().unwrap_err(), Violation::BadCoverage);
    }

    #[test]
    fn a_lost_connection_gives_back_what_was_in_flight() {
        let mut peer = Peer::new(ReplyMode::Simple);
        peer.submit(command::READ, 0, 4, "one");
        peer.submit(command::READ, 4, 4, "two");
        let mut tags: Vec<_> = peer.in_flight.abandon().collect();
        tags.sort_unstable();
        assert_eq!(tags, ["one", "two"]);
        assert!(peer.in_flight.is_empty());
    }

    proptest! {
        #[test]
        fn no_bytes_break_the_client(
            data in prop::collection::vec(any::<u8>(), 0..300), kind in 0u16..8, key in 0u32..3, length in 0u32..64,
        ) {
            fuzz(&data);
            // A chunk that finds its request.
            let mut framed = BytesMut::new();
            framed.put_u32(crate::nbd::wire::STRUCTURED_REPLY_MAGIC);
            framed.put_u16(1);
            framed.put_u16(kind);
            framed.put_u64(u64::from(key + 1) << 32 | u64::from(key));
            framed.put_u32(length);
            framed.put_slice(&data);
            fuzz(&framed);
        }

        #[test]
        fn any_cut_of_a_read_into_chunks_is_assembled(
            cuts in prop::collection::btree_set(1u64..400, 0..12), shuffle: u64, holes: u16, extended: bool,
        ) {
            let mode = if extended { ReplyMode::Extended } else { ReplyMode::Structured };
            let mut peer = Peer::new(mode);
            let to = peer.submit(command::READ, 1000, 400, "read");
            let edges: Vec<_> = std::iter::once(0).chain(cuts).chain([400]).collect();
            let mut pieces: Vec<_> = edges.windows(2).map(|edge| (edge[0], edge[1])).collect();
            let count = pieces.len();
            pieces.rotate_left(to_usize(shuffle) % count);
            let mut expected = vec![0; 400];
            for (index, (start, end)) in pieces.iter().enumerate() {
                if holes >> index & 1 == 1 {
                    peer.hole(to, 1000 + start, u32::try_from(end - start).unwrap(), Last::No);
                } else {
                    let bytes: Vec<u8> = (*start..*end).map(|byte| (byte % 251) as u8 + 1).collect();
                    expected[to_usize(*start)..to_usize(*end)].copy_from_slice(&bytes);
                    peer.data(to, 1000 + start, &bytes, Last::No);
                }
            }
            reply::put_read_done(&mut peer.input, mode, to);
            let (bytes, _) = data_of(peer.only());
            prop_assert_eq!(&bytes[..], &expected[..]);
        }
    }
}
