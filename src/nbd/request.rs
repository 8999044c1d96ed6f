//! Requests of the transmission phase: what a client writes, what a server reads and checks.
//!
//! [`decode`] only takes a header apart. [`check`] holds it against what was negotiated and gives either a
//! [`Command`] that cannot be wrong any more or the error that the protocol wants for it, with the number of
//! payload bytes that must be skipped to stay in step.

use bytes::{Buf, BufMut, BytesMut};
use thiserror::Error;

use super::handshake::ReplyMode;
use super::wire::{self, CommandFlags, MAX_PAYLOAD_BYTES, TransmissionFlags, command};
use crate::error::ErrorKind;
use crate::ranges::ByteRange;

/// A request header as it is on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Command flags, unknown ones included.
    pub flags: u16,
    /// Command number.
    pub command: u16,
    /// Chosen by the client, repeated in every reply.
    pub cookie: u64,
    /// Start of the effect.
    pub offset: u64,
    /// Bytes of effect or of payload.
    pub length: u64,
}

/// Why a client is dropped in the transmission phase: it is out of step, or asks too much.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Violation {
    /// A request did not start with its magic number.
    #[error("a request without its magic number")]
    BadMagic,
    /// An extended request announced a payload over the maximum ("Request message").
    #[error("a payload of {0} bytes")]
    PayloadTooLong(u64),
}

/// The length of a request header under `mode`.
pub const fn header_length(mode: ReplyMode) -> usize {
    match mode {
        ReplyMode::Simple | ReplyMode::Structured => 28,
        ReplyMode::Extended => 32,
    }
}

/// Takes the header at the front of `input` apart; `None` when there is not enough input.
pub fn decode(mut input: &[u8], mode: ReplyMode) -> Result<Option<Header>, Violation> {
    let magic = match mode {
        ReplyMode::Simple | ReplyMode::Structured => wire::REQUEST_MAGIC,
        ReplyMode::Extended => wire::EXTENDED_REQUEST_MAGIC,
    };
    if input.len() >= 4 && (&input[..4]).get_u32() != magic {
        return Err(Violation::BadMagic);
    }
    if input.len() < header_length(mode) {
        return Ok(None);
    }
    input.advance(4);
    Ok(Some(Header {
        flags: input.get_u16(),
        command: input.get_u16(),
        cookie: input.get_u64(),
        offset: input.get_u64(),
        length: if mode == ReplyMode::Extended { input.get_u64() } else { u64::from(input.get_u32()) },
    }))
}

/// Appends a request. The payload of a write follows; it is `length` bytes long.
pub fn encode(output: &mut BytesMut, mode: ReplyMode, header: Header) {
    if mode == ReplyMode::Extended {
        let with_payload = if header.command == command::WRITE { CommandFlags::PAYLOAD_LEN.bits() } else { 0 };
        output.put_u32(wire::EXTENDED_REQUEST_MAGIC);
        output.put_u16(header.flags | with_payload);
    } else {
        output.put_u32(wire::REQUEST_MAGIC);
        output.put_u16(header.flags);
    }
    output.put_u16(header.command);
    output.put_u64(header.cookie);
    output.put_u64(header.offset);
    if mode == ReplyMode::Extended {
        output.put_u64(header.length);
    } else {
        output.put_u32(u32::try_from(header.length).expect("callers cut requests to 32 bits for compact headers"));
    }
}

/// When a write counts as done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Durability {
    /// When later reads see it; a flush makes it durable.
    Volatile,
    /// When it is on stable storage (FUA).
    Stable,
}

/// Whether a read may be answered in pieces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fragments {
    /// Any number of data and hole chunks.
    Allowed,
    /// One content chunk (DF).
    Forbidden,
}

/// How a range is to be zeroed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ZeroMode {
    /// Whether the range may lose its storage (no NO_HOLE flag).
    pub may_punch: bool,
    /// Whether to fail rather than to write zeroes one by one (FAST_ZERO).
    pub must_be_fast: bool,
}

/// How many extents a block status request wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extents {
    /// As many as cover the range.
    Many,
    /// The first one, cut to the range (REQ_ONE).
    One,
}

/// A request that has passed all checks. Ranges lie within the export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Send the range.
    Read(ByteRange, Fragments),
    /// Replace the range by the payload, which has its length.
    Write(ByteRange, Durability),
    /// Answer what is in flight, then close.
    Disconnect,
    /// Make completed writes durable.
    Flush,
    /// The range is not needed any more.
    Trim(ByteRange, Durability),
    /// Zero the range.
    WriteZeroes(ByteRange, ZeroMode, Durability),
    /// The range will be needed.
    Cache(ByteRange),
    /// Describe the range.
    BlockStatus(ByteRange, Extents),
}

/// What was negotiated, as far as requests are concerned.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// Size of the export in bytes.
    pub size: u64,
    /// Its flags.
    pub flags: TransmissionFlags,
    /// Smallest unit of offset and length, in bytes.
    pub minimum_block: u32,
    /// The largest payload of a write or a read, in bytes.
    pub maximum_payload: u64,
    /// The form of requests and replies.
    pub mode: ReplyMode,
    /// Whether at least one metadata context was selected.
    pub has_contexts: bool,
}

/// What [`check`] made of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checked {
    /// Do it.
    Accepted(Command),
    /// Skip `payload` bytes, then answer with the error.
    Refused {
        /// The error.
        kind: ErrorKind,
        /// Its reason, for the client's log.
        message: &'static str,
        /// Bytes of payload that follow the header.
        payload: u64,
    },
}

/// Holds a request against the rules ("Request types", "Error values", "Size constraints").
pub fn check(header: &Header, rules: &Rules) -> Result<Checked, Violation> {
    let payload = payload_length(header, rules)?;
    Ok(match classify(header, rules) {
        Ok(command) => Checked::Accepted(command),
        Err((kind, message)) => Checked::Refused { kind, message, payload },
    })
}

/// The number of payload bytes behind a header.
fn payload_length(header: &Header, rules: &Rules) -> Result<u64, Violation> {
    let has_payload = match rules.mode {
        ReplyMode::Simple | ReplyMode::Structured => header.command == command::WRITE,
        // qemu's client (10.0 at least) leaves the flag out of its writes and sends the payload all the same; qemu's
        // server lets it pass. No client means a write without data.
        ReplyMode::Extended => header.command == command::WRITE || header.flags & CommandFlags::PAYLOAD_LEN.bits() != 0,
    };
    match has_payload {
        // A compact write of up to 4 GiB costs nothing but the client's own time to skip; with 64 bits there is
        // no end to it, and the protocol wants the connection closed.
        true if rules.mode == ReplyMode::Extended && header.length > rules.maximum_payload => {
            Err(Violation::PayloadTooLong(header.length))
        }
        true => Ok(header.length),
        false => Ok(0),
    }
}

type Refusal = (ErrorKind, &'static str);

fn classify(header: &Header, rules: &Rules) -> Result<Command, Refusal> {
    if header.command == command::DISC {
        return Ok(Command::Disconnect);
    }
    let flags = known_flags(header, rules)?;
    let durability = if flags.contains(CommandFlags::FUA) { Durability::Stable } else { Durability::Volatile };
    match header.command {
        command::READ => {
            let df = flags.contains(CommandFlags::DF);
            let fragments = if df { Fragments::Forbidden } else { Fragments::Allowed };
            if header.length > rules.maximum_payload {
                return Err((ErrorKind::Invalid, "a read of more than the maximum payload"));
            }
            Ok(Command::Read(range(header, rules, ErrorKind::Invalid)?, fragments))
        }
        command::WRITE => {
            writable(rules)?;
            if header.length > rules.maximum_payload {
                return Err((ErrorKind::Invalid, "a write of more than the maximum payload"));
            }
            Ok(Command::Write(range(header, rules, ErrorKind::NoSpace)?, durability))
        }
        command::FLUSH => {
            if (header.offset, header.length) != (0, 0) {
                return Err((ErrorKind::Invalid, "a flush with an offset or a length"));
            }
            Ok(Command::Flush)
        }
        command::TRIM => {
            writable(rules)?;
            offered(rules, TransmissionFlags::SEND_TRIM)?;
            Ok(Command::Trim(range(header, rules, ErrorKind::Invalid)?, durability))
        }
        command::WRITE_ZEROES => {
            writable(rules)?;
            offered(rules, TransmissionFlags::SEND_WRITE_ZEROES)?;
            let mode = ZeroMode {
                may_punch: !flags.contains(CommandFlags::NO_HOLE),
                must_be_fast: flags.contains(CommandFlags::FAST_ZERO),
            };
            Ok(Command::WriteZeroes(range(header, rules, ErrorKind::NoSpace)?, mode, durability))
        }
        command::CACHE => Ok(Command::Cache(range(header, rules, ErrorKind::Invalid)?)),
        command::BLOCK_STATUS => {
            if !rules.has_contexts {
                return Err((ErrorKind::Invalid, "no metadata context was selected"));
            }
            if header.length == 0 {
                return Err((ErrorKind::Invalid, "block status of nothing"));
            }
            let extents = if flags.contains(CommandFlags::REQ_ONE) { Extents::One } else { Extents::Many };
            Ok(Command::BlockStatus(range(header, rules, ErrorKind::Invalid)?, extents))
        }
        _ => Err((ErrorKind::Invalid, "unknown command")),
    }
}

/// The flags of a request, if each of them is documented for its command ("Error values"). FUA is accepted
/// everywhere, because clients are known to set it on reads ("Command flags").
fn known_flags(header: &Header, rules: &Rules) -> Result<CommandFlags, Refusal> {
    let mut allowed = CommandFlags::FUA;
    match header.command {
        command::READ if rules.flags.contains(TransmissionFlags::SEND_DF) => allowed |= CommandFlags::DF,
        command::WRITE if rules.mode == ReplyMode::Extended => allowed |= CommandFlags::PAYLOAD_LEN,
        command::WRITE_ZEROES => {
            allowed |= CommandFlags::NO_HOLE;
            if rules.flags.contains(TransmissionFlags::SEND_FAST_ZERO) {
                allowed |= CommandFlags::FAST_ZERO;
            }
        }
        command::BLOCK_STATUS => allowed |= CommandFlags::REQ_ONE,
        _ => {}
    }
    CommandFlags::from_bits(header.flags)
        .filter(|flags| allowed.contains(*flags))
        .ok_or((ErrorKind::Invalid, "a flag that this command does not have"))
}

fn writable(rules: &Rules) -> Result<(), Refusal> {
    if rules.flags.contains(TransmissionFlags::READ_ONLY) {
        return Err((ErrorKind::Permission, "the export is read-only"));
    }
    Ok(())
}

fn offered(rules: &Rules, feature: TransmissionFlags) -> Result<(), Refusal> {
    if rules.flags.contains(feature) {
        return Ok(());
    }
    Err((ErrorKind::Invalid, "a command that the export does not offer"))
}

/// The range of a request; `beyond` is the error for one that leaves the export.
fn range(header: &Header, rules: &Rules, beyond: ErrorKind) -> Result<ByteRange, Refusal> {
    let range = ByteRange::new(header.offset, header.length)
        .filter(|range| range.end() <= rules.size)
        .ok_or((beyond, "a request beyond the end of the export"))?;
    let block = u64::from(rules.minimum_block);
    if !range.start().is_multiple_of(block) || !range.length().is_multiple_of(block) {
        return Err((ErrorKind::Invalid, "a request that is not aligned to the minimum block size"));
    }
    Ok(range)
}

/// Takes arbitrary bytes as a stream of requests.
#[doc(hidden)]
pub fn fuzz(data: &[u8]) {
    for mode in [ReplyMode::Simple, ReplyMode::Structured, ReplyMode::Extended] {
        for flags in [TransmissionFlags::all(), TransmissionFlags::READ_ONLY] {
            let rules = Rules {
                size: 1 << 40,
                flags,
                minimum_block: 1,
                maximum_payload: MAX_PAYLOAD_BYTES,
                mode,
                has_contexts: true,
            };
            let mut rest = data;
            while let Ok(Some(header)) = decode(rest, mode) {
                rest = &rest[header_length(mode)..];
                let skip = match check(&header, &rules) {
                    Ok(Checked::Accepted(Command::Write(range, _))) => range.length(),
                    Ok(Checked::Accepted(_)) => 0,
                    Ok(Checked::Refused { payload, .. }) => payload,
                    Err(_) => return,
                };
                rest = rest.get(crate::units::to_usize(skip)..).unwrap_or_default();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const RULES: Rules = Rules {
        size: 1000,
        flags: TransmissionFlags::all().difference(TransmissionFlags::READ_ONLY),
        minimum_block: 1,
        maximum_payload: MAX_PAYLOAD_BYTES,
        mode: ReplyMode::Structured,
        has_contexts: true,
    };

    fn request(number: u16, offset: u64, length: u64) -> Header {
        Header { flags: 0, command: number, cookie: 1, offset, length }
    }

    fn refusal(header: &Header, rules: &Rules) -> (ErrorKind, u64) {
        match check(header, rules) {
            Ok(Checked::Refused { kind, payload, .. }) => (kind, payload),
            other => panic!("not refused: {other:?}"),
        }
    }

    fn accepted(header: &Header, rules: &Rules) -> Command {
        match check(header, rules) {
            Ok(Checked::Accepted(command)) => command,
            other => panic!("not accepted: {other:?}"),
        }
    }

    #[test]
    fn a_compact_header_is_28_bytes_and_an_extended_one_32() {
        let header = Header { flags: 1, command: command::WRITE, cookie: 0x0102_0304_0506_0708, offset: 9, length: 10 };
        let mut output = BytesMut::new();
        encode(&mut output, ReplyMode::Simple, header);
        assert_eq!(
            &output[..],
            b"\x25\x60\x95\x13\0\x01\0\x01\x01\x02\x03\x04\x05\x06\x07\x08\0\0\0\0\0\0\0\x09\0\0\0\x0a"
        );
        output.clear();
        encode(&mut output, ReplyMode::Extended, header);
        assert_eq!(
            &output[..],
            b"\x21\xe4\x1c\x71\0\x21\0\x01\x01\x02\x03\x04\x05\x06\x07\x08\0\0\0\0\0\0\0\x09\0\0\0\0\0\0\0\x0a"
        );
    }

    #[test]
    fn a_wrong_magic_number_is_seen_after_four_bytes() {
        assert_eq!(decode(b"\x25\x60\x95", ReplyMode::Simple), Ok(None));
        assert_eq!(decode(b"\x25\x60\x95\x14", ReplyMode::Simple), Err(Violation::BadMagic));
        assert_eq!(decode(b"\x25\x60\x95\x13", ReplyMode::Extended), Err(Violation::BadMagic));
    }

    #[test]
    fn requests_beyond_the_end_get_the_error_that_their_kind_deserves() {
        for (number, kind, payload) in [
            (command::READ, ErrorKind::Invalid, 0),
            (command::WRITE, ErrorKind::NoSpace, 2),
            (command::TRIM, ErrorKind::Invalid, 0),
            (command::WRITE_ZEROES, ErrorKind::NoSpace, 0),
            (command::CACHE, ErrorKind::Invalid, 0),
            (command::BLOCK_STATUS, ErrorKind::Invalid, 0),
        ] {
            assert_eq!(refusal(&request(number, 999, 2), &RULES), (kind, payload), "{number}");
            assert_eq!(refusal(&request(number, u64::MAX, 2), &RULES), (kind, payload), "{number}");
            accepted(&request(number, 999, 1), &RULES);
        }
    }

    #[test]
    fn four_gibibytes_are_refused_and_a_write_of_them_is_skipped() {
        let rules = Rules { size: 1 << 40, ..RULES };
        let all = u64::from(u32::MAX);
        assert_eq!(refusal(&request(command::READ, 0, all), &rules), (ErrorKind::Invalid, 0));
        assert_eq!(refusal(&request(command::WRITE, 0, all), &rules), (ErrorKind::Invalid, all));
        accepted(&request(command::TRIM, 0, all), &rules);
        accepted(&request(command::READ, 0, MAX_PAYLOAD_BYTES), &rules);
        let extended = Rules { mode: ReplyMode::Extended, ..rules };
        let huge = Header { flags: CommandFlags::PAYLOAD_LEN.bits(), ..request(command::WRITE, 0, all) };
        assert_eq!(check(&huge, &extended), Err(Violation::PayloadTooLong(all)));
        accepted(&request(command::WRITE_ZEROES, 0, 1 << 40), &extended);
    }

    #[test]
    fn a_read_only_export_refuses_all_that_write() {
        let rules = Rules { flags: TransmissionFlags::READ_ONLY, ..RULES };
        for number in [command::WRITE, command::TRIM, command::WRITE_ZEROES] {
            let payload = if number == command::WRITE { 8 } else { 0 };
            assert_eq!(refusal(&request(number, 0, 8), &rules), (ErrorKind::Permission, payload));
        }
        accepted(&request(command::FLUSH, 0, 0), &rules);
    }

    #[test]
    fn flags_are_accepted_where_they_are_documented_only() {
        let commands = [
            (command::READ, CommandFlags::FUA | CommandFlags::DF),
            (command::WRITE, CommandFlags::FUA),
            (command::FLUSH, CommandFlags::FUA),
            (command::TRIM, CommandFlags::FUA),
            (command::CACHE, CommandFlags::FUA),
            (command::WRITE_ZEROES, CommandFlags::FUA | CommandFlags::NO_HOLE | CommandFlags::FAST_ZERO),
            (command::BLOCK_STATUS, CommandFlags::FUA | CommandFlags::REQ_ONE),
        ];
        for (number, allowed) in commands {
            for bit in 0..16 {
                let length = if number == command::FLUSH { 0 } else { 4 };
                let header = Header { flags: 1 << bit, ..request(number, 0, length) };
                let known = CommandFlags::from_bits(1 << bit).is_some_and(|flag| allowed.contains(flag));
                let checked = check(&header, &RULES).unwrap();
                assert_eq!(matches!(checked, Checked::Accepted(_)), known, "command {number}, bit {bit}");
            }
        }
    }

    #[test]
    fn features_that_were_not_offered_are_refused() {
        let plain = Rules { flags: TransmissionFlags::HAS_FLAGS, mode: ReplyMode::Simple, ..RULES };
        refusal(&request(command::TRIM, 0, 1), &plain);
        refusal(&request(command::WRITE_ZEROES, 0, 1), &plain);
        refusal(&Header { flags: CommandFlags::DF.bits(), ..request(command::READ, 0, 1) }, &plain);
        refusal(&request(command::BLOCK_STATUS, 0, 1), &Rules { has_contexts: false, ..RULES });
    }

    #[test]
    fn unknown_commands_are_invalid_and_carry_a_payload_only_when_they_say_so() {
        assert_eq!(refusal(&request(8, 0, 500), &RULES), (ErrorKind::Invalid, 0));
        let extended = Rules { mode: ReplyMode::Extended, ..RULES };
        let header = Header { flags: CommandFlags::PAYLOAD_LEN.bits(), ..request(command::BLOCK_STATUS, 0, 12) };
        assert_eq!(refusal(&header, &extended), (ErrorKind::Invalid, 12));
    }

    #[test]
    fn an_extended_write_has_its_payload_with_or_without_the_flag() {
        let extended = Rules { mode: ReplyMode::Extended, ..RULES };
        let bare = request(command::WRITE, 990, 12);
        let marked = Header { flags: CommandFlags::PAYLOAD_LEN.bits(), ..bare };
        for header in [bare, marked] {
            assert_eq!(refusal(&header, &extended), (ErrorKind::NoSpace, 12));
            accepted(&Header { offset: 0, ..header }, &extended);
        }
    }

    #[test]
    fn unaligned_requests_are_refused_when_the_export_has_a_minimum() {
        let rules = Rules { size: 1024, minimum_block: 512, ..RULES };
        assert_eq!(refusal(&request(command::READ, 1, 512), &rules).0, ErrorKind::Invalid);
        assert_eq!(refusal(&request(command::READ, 512, 1), &rules).0, ErrorKind::Invalid);
        accepted(&request(command::READ, 512, 512), &rules);
    }

    proptest! {
        #[test]
        fn no_bytes_break_the_decoder(data in prop::collection::vec(any::<u8>(), 0..200)) {
            fuzz(&data);
        }

        #[test]
        fn what_is_encoded_is_decoded(
            flags in 0u16..32, number in 0u16..8, cookie: u64, offset: u64, length: u32, extended: bool,
        ) {
            let mode = if extended { ReplyMode::Extended } else { ReplyMode::Structured };
            let header = Header { flags, command: number, cookie, offset, length: u64::from(length) };
            let mut output = BytesMut::new();
            encode(&mut output, mode, header);
            prop_assert_eq!(output.len(), header_length(mode));
            let mut decoded = decode(&output, mode).unwrap().unwrap();
            decoded.flags &= !CommandFlags::PAYLOAD_LEN.bits();
            prop_assert_eq!(decoded, header);
        }
    }
}
