//! Replies of the transmission phase: what a server writes, what a client reads.
//!
//! | form | header | when |
//! | --- | --- | --- |
//! | simple | magic, error, cookie: 16 bytes | nothing negotiated; also "done" under structured replies |
//! | structured | magic, flags, type, cookie, length: 20 bytes | STRUCTURED_REPLY |
//! | extended | magic, flags, type, cookie, offset of the request, length: 32 bytes | EXTENDED_HEADERS |

use bytes::{Buf, BufMut, BytesMut};
use thiserror::Error;

use super::errno;
use super::export::Extent;
use super::handshake::ReplyMode;
use super::wire::{self, MAX_EXTENTS, MAX_PAYLOAD_BYTES, chunk};
use crate::error::ErrorKind;
use crate::units::{to_u64, to_usize};

/// What every reply to one request repeats.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReplyTo {
    /// The client's cookie.
    pub cookie: u64,
    /// The request's offset, which extended replies repeat.
    pub offset: u64,
}

/// Whether a chunk is the last of its reply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Last {
    /// The reply is complete with it.
    Yes,
    /// More follows.
    No,
}

/// The most bytes that [`put_data_header`] writes.
pub const MAX_DATA_HEADER: usize = 40;

/// Success without data. Under structured replies a simple reply is allowed for all but reads and is shorter.
pub fn put_done(output: &mut BytesMut, mode: ReplyMode, to: ReplyTo) {
    match mode {
        ReplyMode::Simple | ReplyMode::Structured => put_simple(output, to, 0),
        ReplyMode::Extended => put_chunk(output, mode, to, chunk::NONE, 0, Last::Yes),
    }
}

/// Success of a read of nothing, or the end of a read whose chunks were all sent with [`Last::No`].
pub fn put_read_done(output: &mut BytesMut, mode: ReplyMode, to: ReplyTo) {
    match mode {
        ReplyMode::Simple => put_simple(output, to, 0),
        ReplyMode::Structured | ReplyMode::Extended => put_chunk(output, mode, to, chunk::NONE, 0, Last::Yes),
    }
}

/// Failure, final. `at` names the offset, for reads that were answered in part.
pub fn put_error(output: &mut BytesMut, mode: ReplyMode, to: ReplyTo, kind: ErrorKind, message: &str, at: Option<u64>) {
    if mode == ReplyMode::Simple {
        return put_simple(output, to, errno::to_wire(kind));
    }
    let message = cut(message, wire::MAX_STRING);
    let text_length = u16::try_from(message.len()).expect("messages are cut to 4096 bytes");
    let (kind_of_chunk, fixed) = if at.is_some() { (chunk::ERROR_OFFSET, 14) } else { (chunk::ERROR, 6) };
    put_chunk(output, mode, to, kind_of_chunk, fixed + u64::from(text_length), Last::Yes);
    output.put_u32(errno::to_wire(kind));
    output.put_u16(text_length);
    output.put_slice(message.as_bytes());
    if let Some(offset) = at {
        output.put_u64(offset);
    }
}

/// The header of `length` bytes of data from `offset`, which must follow. In the simple form this is the whole
/// reply to the request, and must be called once.
pub fn put_data_header(output: &mut BytesMut, mode: ReplyMode, to: ReplyTo, offset: u64, length: u64, last: Last) {
    match mode {
        ReplyMode::Simple => put_simple(output, to, 0),
        ReplyMode::Structured | ReplyMode::Extended => {
            put_chunk(output, mode, to, chunk::OFFSET_DATA, 8 + length, last);
            output.put_u64(offset);
        }
    }
}

/// `length` bytes of zeroes from `offset`, not carried as bytes. Only where `mode` has chunks.
pub fn put_hole(output: &mut BytesMut, mode: ReplyMode, to: ReplyTo, offset: u64, length: u32, last: Last) {
    debug_assert!(mode.has_chunks() && length > 0);
    put_chunk(output, mode, to, chunk::OFFSET_HOLE, 12, last);
    output.put_u64(offset);
    output.put_u32(length);
}

/// The status of consecutive extents in one context, from the request's offset on. There is at least one and at
/// most [`MAX_EXTENTS`].
pub fn put_block_status(
    output: &mut BytesMut,
    mode: ReplyMode,
    to: ReplyTo,
    context: u32,
    extents: &[Extent],
    last: Last,
) {
    debug_assert!(mode.has_chunks() && !extents.is_empty() && extents.len() <= MAX_EXTENTS);
    let count = to_u64(extents.len());
    if mode == ReplyMode::Extended {
        put_chunk(output, mode, to, chunk::BLOCK_STATUS_EXT, 8 + 16 * count, last);
        output.put_u32(context);
        output.put_u32(u32::try_from(count).expect("bounded by MAX_EXTENTS"));
        for extent in extents {
            output.put_u64(extent.length);
            output.put_u64(extent.status);
        }
    } else {
        put_chunk(output, mode, to, chunk::BLOCK_STATUS, 4 + 8 * count, last);
        output.put_u32(context);
        for extent in extents {
            output.put_u32(u32::try_from(extent.length).expect("callers cut extents to 32 bits for compact headers"));
            output.put_u32(u32::try_from(extent.status).expect("only 32-bit statuses are offered"));
        }
    }
}

fn put_simple(output: &mut BytesMut, to: ReplyTo, error: u32) {
    output.put_u32(wire::SIMPLE_REPLY_MAGIC);
    output.put_u32(error);
    output.put_u64(to.cookie);
}

fn put_chunk(output: &mut BytesMut, mode: ReplyMode, to: ReplyTo, kind: u16, length: u64, last: Last) {
    let flags = if last == Last::Yes { chunk::FLAG_DONE } else { 0 };
    if mode == ReplyMode::Extended {
        output.put_u32(wire::EXTENDED_REPLY_MAGIC);
        output.put_u16(flags);
        output.put_u16(kind);
        output.put_u64(to.cookie);
        output.put_u64(to.offset);
        output.put_u64(length);
    } else {
        output.put_u32(wire::STRUCTURED_REPLY_MAGIC);
        output.put_u16(flags);
        output.put_u16(kind);
        output.put_u64(to.cookie);
        output.put_u32(u32::try_from(length).expect("chunks are cut far below 4 GiB"));
    }
}

/// The longest prefix of `text` that has at most `limit` bytes and ends between characters.
fn cut(text: &str, limit: usize) -> &str {
    let end = (0..=limit.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
    &text[..end.unwrap_or(0)]
}

/// A reply's header, as a client reads it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Header {
    /// The whole reply; the data of a successful read follows.
    Simple {
        /// The request's cookie.
        cookie: u64,
        /// The failure, if it is one.
        error: Option<ErrorKind>,
    },
    /// One chunk; `length` bytes of payload follow.
    Chunk {
        /// The request's cookie.
        cookie: u64,
        /// The chunk's type.
        kind: u16,
        /// Bytes of payload.
        length: u64,
        /// Whether it is the last one.
        last: Last,
    },
}

/// How a server broke the protocol in a reply. The connection is of no use after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Violation {
    /// Not a reply of a form that was negotiated.
    #[error("a reply without its magic number")]
    BadMagic,
    /// A chunk is longer than anything that was asked for.
    #[error("a reply chunk of {0} bytes")]
    TooLong(u64),
    /// The payload does not have the form of its type.
    #[error("a reply chunk of type {0} with a payload that it cannot have")]
    Malformed(u16),
    /// A chunk of a type that does not answer this request.
    #[error("a reply chunk of type {0}, which does not answer the request")]
    Unexpected(u16),
    /// A reply to a request that is not in flight.
    #[error("a reply to no request")]
    UnknownCookie,
    /// Data that was not asked for, that was sent twice, or too little of it.
    #[error("data that does not cover what was asked for exactly once")]
    BadCoverage,
}

/// The longest payload of a chunk that is not data: block status of [`MAX_EXTENTS`] extents.
const MAX_CHUNK: u64 = 8 + 16 * (1 << 20);

/// Takes the header at the front of `input`, with its length; `None` when there is not enough input.
pub fn decode(mut input: &[u8], mode: ReplyMode) -> Result<Option<(Header, usize)>, Violation> {
    if input.len() < 4 {
        return Ok(None);
    }
    let magic = (&input[..4]).get_u32();
    let length = match (magic, mode) {
        (wire::SIMPLE_REPLY_MAGIC, ReplyMode::Simple | ReplyMode::Structured) => 16,
        (wire::STRUCTURED_REPLY_MAGIC, ReplyMode::Structured) => 20,
        (wire::EXTENDED_REPLY_MAGIC, ReplyMode::Extended) => 32,
        _ => return Err(Violation::BadMagic),
    };
    if input.len() < length {
        return Ok(None);
    }
    input.advance(4);
    if magic == wire::SIMPLE_REPLY_MAGIC {
        let error = errno::from_wire(input.get_u32());
        return Ok(Some((Header::Simple { cookie: input.get_u64(), error }, length)));
    }
    let (flags, kind, cookie) = (input.get_u16(), input.get_u16(), input.get_u64());
    let payload = if mode == ReplyMode::Extended {
        input.advance(8);
        input.get_u64()
    } else {
        u64::from(input.get_u32())
    };
    let limit = if kind == chunk::OFFSET_DATA { 8 + MAX_PAYLOAD_BYTES } else { MAX_CHUNK };
    if payload > limit {
        return Err(Violation::TooLong(payload));
    }
    let last = if flags & chunk::FLAG_DONE != 0 { Last::Yes } else { Last::No };
    Ok(Some((Header::Chunk { cookie, kind, length: payload, last }, length)))
}

/// Takes the payload of an `OFFSET_HOLE` chunk apart: offset and length.
pub fn decode_hole(mut payload: &[u8]) -> Result<(u64, u32), Violation> {
    if payload.len() != 12 {
        return Err(Violation::Malformed(chunk::OFFSET_HOLE));
    }
    match (payload.get_u64(), payload.get_u32()) {
        (_, 0) => Err(Violation::Malformed(chunk::OFFSET_HOLE)),
        hole => Ok(hole),
    }
}

/// Takes the payload of an error chunk of any type apart: kind and message.
pub fn decode_error(kind: u16, mut payload: &[u8]) -> Result<(ErrorKind, String), Violation> {
    let malformed = Violation::Malformed(kind);
    if payload.len() < 6 {
        return Err(malformed);
    }
    let error = errno::from_wire(payload.get_u32()).ok_or(malformed)?;
    let length = usize::from(payload.get_u16());
    let text = payload.get(..length).filter(|text| text.len() <= wire::MAX_STRING).ok_or(malformed)?;
    Ok((error, String::from_utf8_lossy(text).into_owned()))
}

/// Takes the payload of a block status chunk apart: context id and extents, none of them empty.
pub fn decode_block_status(kind: u16, mut payload: &[u8]) -> Result<(u32, Vec<Extent>), Violation> {
    let malformed = Violation::Malformed(kind);
    let context = payload.try_get_u32().map_err(|_| malformed)?;
    let extents: Vec<_> = if kind == chunk::BLOCK_STATUS_EXT {
        let count = u64::from(payload.try_get_u32().map_err(|_| malformed)?);
        if to_u64(payload.len()) != 16 * count {
            return Err(malformed);
        }
        payload.chunks_exact(16).map(|mut e| Extent { length: e.get_u64(), status: e.get_u64() }).collect()
    } else {
        if !payload.len().is_multiple_of(8) {
            return Err(malformed);
        }
        let short = |mut e: &[u8]| Extent { length: u64::from(e.get_u32()), status: u64::from(e.get_u32()) };
        payload.chunks_exact(8).map(short).collect()
    };
    if extents.is_empty() || extents.iter().any(|extent| extent.length == 0) {
        return Err(malformed);
    }
    Ok((context, extents))
}

/// Takes arbitrary bytes as a stream of replies.
#[doc(hidden)]
pub fn fuzz(data: &[u8]) {
    for mode in [ReplyMode::Simple, ReplyMode::Structured, ReplyMode::Extended] {
        let mut rest = data;
        while let Ok(Some((header, length))) = decode(rest, mode) {
            rest = &rest[length..];
            let Header::Chunk { kind, length, .. } = header else { continue };
            let Some(payload) = rest.get(..to_usize(length)) else { break };
            let _ = decode_hole(payload);
            let _ = decode_error(kind, payload);
            let _ = decode_block_status(kind, payload);
            rest = &rest[payload.len()..];
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TO: ReplyTo = ReplyTo { cookie: 0x1122_3344_5566_7788, offset: 0x10 };
    const CHUNKED: [ReplyMode; 2] = [ReplyMode::Structured, ReplyMode::Extended];

    fn written(write: impl FnOnce(&mut BytesMut)) -> BytesMut {
        let mut output = BytesMut::new();
        write(&mut output);
        output
    }

    fn chunk_of(output: &BytesMut, mode: ReplyMode) -> (u16, Last, Vec<u8>) {
        let (header, length) = decode(output, mode).unwrap().unwrap();
        let Header::Chunk { cookie, kind, length: payload, last } = header else { panic!("{header:?}") };
        assert_eq!(cookie, TO.cookie);
        assert_eq!(to_u64(output.len() - length), payload);
        (kind, last, output[length..].to_vec())
    }

    #[test]
    fn replies_have_the_bytes_of_the_protocol() {
        let simple = written(|output| put_error(output, ReplyMode::Simple, TO, ErrorKind::Io, "not sent", None));
        assert_eq!(&simple[..], b"\x67\x44\x66\x98\0\0\0\x05\x11\x22\x33\x44\x55\x66\x77\x88");
        let hole = written(|output| put_hole(output, ReplyMode::Structured, TO, 0x20, 0x30, Last::Yes));
        assert_eq!(
            &hole[..],
            b"\x66\x8e\x33\xef\0\x01\0\x02\x11\x22\x33\x44\x55\x66\x77\x88\0\0\0\x0c\0\0\0\0\0\0\0\x20\0\0\0\x30"
        );
        let data = written(|output| put_data_header(output, ReplyMode::Extended, TO, 0x20, 4, Last::No));
        assert_eq!(
            &data[..],
            b"\x6e\x8a\x27\x8c\0\0\0\x01\x11\x22\x33\x44\x55\x66\x77\x88\0\0\0\0\0\0\0\x10\
              \0\0\0\0\0\0\0\x0c\0\0\0\0\0\0\0\x20"
        );
        assert!(data.len() <= MAX_DATA_HEADER);
    }

    #[test]
    fn errors_carry_their_text_and_their_place() {
        for mode in CHUNKED {
            for at in [None, Some(77)] {
                let output = written(|output| put_error(output, mode, TO, ErrorKind::NoSpace, "full", at));
                let (kind, last, payload) = chunk_of(&output, mode);
                assert_eq!(last, Last::Yes);
                assert_eq!(decode_error(kind, &payload), Ok((ErrorKind::NoSpace, "full".into())));
            }
        }
    }

    #[test]
    fn long_messages_are_cut_between_characters() {
        let message = "ü".repeat(3000);
        let output = written(|output| put_error(output, ReplyMode::Structured, TO, ErrorKind::Io, &message, None));
        let (kind, _, payload) = chunk_of(&output, ReplyMode::Structured);
        assert_eq!(decode_error(kind, &payload).unwrap().1, "ü".repeat(2048));
        assert_eq!(cut("aü", 2), "a");
    }

    #[test]
    fn block_status_reads_back() {
        let extents = [Extent { length: 5, status: 3 }, Extent { length: 1 << 20, status: 0 }];
        for mode in CHUNKED {
            let output = written(|output| put_block_status(output, mode, TO, 7, &extents, Last::No));
            let (kind, last, payload) = chunk_of(&output, mode);
            assert_eq!(last, Last::No);
            assert_eq!(decode_block_status(kind, &payload), Ok((7, extents.to_vec())));
        }
    }

    #[test]
    fn broken_payloads_are_refused() {
        assert!(decode_hole(&[0; 12]).is_err());
        assert!(decode_hole(&[1; 11]).is_err());
        assert!(decode_error(chunk::ERROR, b"\0\0\0\x05\0\x02x").is_err());
        assert!(decode_error(chunk::ERROR, b"\0\0\0\0\0\0").is_err());
        assert!(decode_block_status(chunk::BLOCK_STATUS, b"\0\0\0\x01").is_err());
        assert!(decode_block_status(chunk::BLOCK_STATUS, &[0; 12]).is_err());
        assert!(decode_block_status(chunk::BLOCK_STATUS_EXT, b"\0\0\0\x01\0\0\0\x02aaaaaaaabbbbbbbb").is_err());
    }

    #[test]
    fn forms_that_were_not_negotiated_are_refused() {
        let simple = written(|output| put_done(output, ReplyMode::Simple, TO));
        let structured = written(|output| put_read_done(output, ReplyMode::Structured, TO));
        let extended = written(|output| put_done(output, ReplyMode::Extended, TO));
        assert!(decode(&simple, ReplyMode::Structured).is_ok());
        assert_eq!(decode(&simple, ReplyMode::Extended), Err(Violation::BadMagic));
        assert_eq!(decode(&structured, ReplyMode::Simple), Err(Violation::BadMagic));
        assert_eq!(decode(&structured, ReplyMode::Extended), Err(Violation::BadMagic));
        assert_eq!(decode(&extended, ReplyMode::Structured), Err(Violation::BadMagic));
    }

    #[test]
    fn a_chunk_that_nobody_could_have_asked_for_is_too_long() {
        let output = written(|output| {
            put_data_header(output, ReplyMode::Structured, TO, 0, MAX_PAYLOAD_BYTES + 1, Last::Yes);
        });
        assert_eq!(decode(&output, ReplyMode::Structured), Err(Violation::TooLong(MAX_PAYLOAD_BYTES + 9)));
    }

    proptest! {
        #[test]
        fn no_bytes_break_the_decoder(data in prop::collection::vec(any::<u8>(), 0..200), magic in 0usize..4) {
            fuzz(&data);
            let magics =
                [wire::SIMPLE_REPLY_MAGIC, wire::STRUCTURED_REPLY_MAGIC, wire::EXTENDED_REPLY_MAGIC, wire::REQUEST_MAGIC];
            let mut framed = magics[magic].to_be_bytes().to_vec();
            framed.extend(data);
            fuzz(&framed);
        }
    }
}
