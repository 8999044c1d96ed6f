//! The server's side of the negotiation.
//!
//! Limits, all with their own [`Violation`]: option data is kept up to [`MAX_OPTION_DATA`], longer data is skipped
//! unread up to [`MAX_SKIPPED_DATA`], and a client gets [`MAX_OPTIONS`] options. One call handles one option, so
//! that a client that pipelines cannot make the server hold more than one option's replies.

mod directory;
mod fuzz;
mod queries;

use bytes::{Buf, BufMut, BytesMut};
use thiserror::Error;

pub use directory::{Directory, TlsPolicy, Verdict};
#[doc(hidden)]
pub use fuzz::fuzz;
pub use queries::Id;
use queries::{Said, is_namespace_of, parse_queries};

use super::{ReplyMode, checked_string, length_u32, put_string, take_string};
use crate::nbd::Listing;
use crate::nbd::wire::{self, HandshakeFlags, TransmissionFlags, info, option, option_reply};

/// Option data that is looked at; room for fifteen queries of the longest kind.
pub const MAX_OPTION_DATA: u32 = 64 << 10;
/// Option data that is skipped before the client is given up.
pub const MAX_SKIPPED_DATA: u32 = 32 << 20;
/// Options before the client is given up; `nbdinfo --list` sends three for each export.
pub const MAX_OPTIONS: u32 = 64 << 10;

const OPTION_HEADER: usize = 16;

/// What was agreed.
#[derive(Debug)]
pub struct Negotiated<E> {
    /// The chosen export.
    pub export: E,
    /// Its listing.
    pub listing: Listing,
    /// How replies look.
    pub replies: ReplyMode,
    /// Positions in [`Listing::contexts`] of the contexts that BLOCK_STATUS answers. The id of a context on the
    /// wire is [`context_id`] of its position.
    pub contexts: Vec<usize>,
    /// Whether the client was told the block sizes.
    pub knows_block_sizes: bool,
    /// Whether the client is a mirror, as it says.
    pub is_mirror: bool,
    /// Which mirror, if it says that too.
    pub mirror: Option<Id>,
    /// Whether it is another server that asks for its own clients, as it says.
    pub is_relay: bool,
    /// What the client calls this connection.
    pub connection: Option<Id>,
}

/// The metadata context id on the wire of the context at `position` of the listing.
pub fn context_id(position: usize) -> u32 {
    length_u32(position) + 1
}

/// What one call of [`ServerHandshake::advance`] came to.
#[derive(Debug)]
pub enum Progress<E> {
    /// Send the output, then call again once more bytes have arrived.
    NeedInput,
    /// Send the output, then call again: there may be another option in the input.
    Continue,
    /// Send the output and go to the transmission phase. What is left of the input belongs to it.
    Finished(Box<Negotiated<E>>),
    /// Send the output and close: the client said goodbye.
    Aborted,
    /// Send the output, unless something more has arrived meanwhile, then turn to TLS and call
    /// [`ServerHandshake::secured`].
    StartTls,
}

/// Why a client is dropped: it broke a rule, and no reply can say so.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Violation {
    /// The client set flags that nobody defined ("Client flags").
    #[error("unknown client flags {0:#x}")]
    UnknownFlags(u32),
    /// An option did not start with its magic number: this is not an NBD client, or it lost its place.
    #[error("an option without its magic number")]
    BadMagic,
    /// EXPORT_NAME cannot be refused, so the connection is ("NBD_OPT_EXPORT_NAME").
    #[error("no export {:?}", .0.chars().take(64).collect::<String>())]
    UnknownExport(String),
    /// EXPORT_NAME with something that is not a name.
    #[error("an export name that is not a string")]
    BadName,
    /// EXPORT_NAME is forbidden after EXTENDED_HEADERS.
    #[error("EXPORT_NAME after EXTENDED_HEADERS")]
    ExportNameAfterExtended,
    /// EXPORT_NAME while the server is going down.
    #[error("the server is shutting down")]
    Draining,
    /// More than [`MAX_SKIPPED_DATA`] in one option.
    #[error("{0} bytes of option data")]
    OptionTooLong(u32),
    /// More than [`MAX_OPTIONS`] options.
    #[error("more than {MAX_OPTIONS} options")]
    TooManyOptions,
    /// EXPORT_NAME without TLS, where it is required.
    #[error("an export name without TLS, which is required")]
    NeedsTls,
    /// Something came behind STARTTLS and before TLS. Whoever sits between could have put it there, to have it taken
    /// for what the client says under TLS.
    #[error("bytes between STARTTLS and TLS")]
    BytesBeforeTls,
}

#[derive(Debug)]
enum State {
    /// Waiting for the client's flags.
    Flags,
    /// Waiting for an option.
    Option,
    /// Skipping the data of an option that will be answered with an error.
    Skip { option: u32, left: usize, reply: u32, message: &'static str },
}

/// A negotiation in progress.
#[derive(Debug)]
pub struct ServerHandshake {
    state: State,
    no_zeroes: bool,
    knows_block_sizes: bool,
    is_mirror: bool,
    is_relay: bool,
    mirror: Option<Id>,
    connection: Option<Id>,
    replies: ReplyMode,
    /// The last successful SET_META_CONTEXT: canonical export name, positions of the contexts.
    contexts: Option<(String, Vec<usize>)>,
    options: u32,
    policy: TlsPolicy,
    is_secure: bool,
}

impl ServerHandshake {
    /// Starts a negotiation by writing the greeting.
    pub fn new(output: &mut BytesMut) -> Self {
        output.put_u64(wire::INIT_MAGIC);
        output.put_u64(wire::OPTION_MAGIC);
        output.put_u16((HandshakeFlags::FIXED_NEWSTYLE | HandshakeFlags::NO_ZEROES).bits());
        Self {
            state: State::Flags,
            no_zeroes: false,
            knows_block_sizes: false,
            is_mirror: false,
            is_relay: false,
            mirror: None,
            connection: None,
            replies: ReplyMode::Simple,
            contexts: None,
            options: 0,
            policy: TlsPolicy::Off,
            is_secure: false,
        }
    }

    /// The same, with this policy.
    #[must_use]
    pub const fn with_tls(mut self, policy: TlsPolicy) -> Self {
        self.policy = policy;
        self
    }

    /// The connection speaks TLS from here on. Nothing of what the client has said before counts, but its flags
    /// ("NBD_OPT_STARTTLS").
    #[must_use]
    pub fn secured(self) -> Self {
        let Self { no_zeroes, options, policy, .. } = self;
        // The greeting has been said.
        Self { state: State::Option, no_zeroes, options, policy, is_secure: true, ..Self::new(&mut BytesMut::new()) }
    }

    /// Takes at most one step from `input`, appending what the client must be told to `output`.
    pub fn advance<D: Directory>(
        &mut self,
        input: &mut BytesMut,
        directory: &D,
        output: &mut BytesMut,
    ) -> Result<Progress<D::Export>, Violation> {
        match self.state {
            State::Flags => self.take_flags(input),
            State::Option => self.take_option(input, directory, output),
            State::Skip { option, left, reply, message } => {
                let skipped = left.min(input.len());
                input.advance(skipped);
                let left = left - skipped;
                if left > 0 {
                    self.state = State::Skip { option, left, reply, message };
                    return Ok(Progress::NeedInput);
                }
                refuse(output, option, reply, message);
                self.state = State::Option;
                Ok(Progress::Continue)
            }
        }
    }

    fn take_flags<E>(&mut self, input: &mut BytesMut) -> Result<Progress<E>, Violation> {
        if input.len() < 4 {
            return Ok(Progress::NeedInput);
        }
        let bits = input.get_u32();
        // "Client flags": a flag that we did not offer must end the connection. A client that does not claim
        // fixed newstyle is served as one that does, which the section allows.
        let flags = u16::try_from(bits).ok().and_then(HandshakeFlags::from_bits);
        let flags = flags.ok_or(Violation::UnknownFlags(bits))?;
        self.no_zeroes = flags.contains(HandshakeFlags::NO_ZEROES);
        self.state = State::Option;
        Ok(Progress::Continue)
    }

    fn take_option<D: Directory>(
        &mut self,
        input: &mut BytesMut,
        directory: &D,
        output: &mut BytesMut,
    ) -> Result<Progress<D::Export>, Violation> {
        // The magic is checked as soon as it is there, so that a client of another protocol is not kept waiting.
        if input.len() >= 8 && (&input[..8]).get_u64() != wire::OPTION_MAGIC {
            return Err(Violation::BadMagic);
        }
        if input.len() < OPTION_HEADER {
            return Ok(Progress::NeedInput);
        }
        let mut header = &input[8..OPTION_HEADER];
        let (number, length) = (header.get_u32(), header.get_u32());
        if let Some((reply, message)) = self.refuse_unread(number, length, directory.is_draining())? {
            input.advance(OPTION_HEADER);
            self.state = State::Skip { option: number, left: data_length(length), reply, message };
            return Ok(Progress::Continue);
        }
        if input.len() < OPTION_HEADER + data_length(length) {
            return Ok(Progress::NeedInput);
        }
        self.options += 1;
        if self.options > MAX_OPTIONS {
            return Err(Violation::TooManyOptions);
        }
        let data = input.split_to(OPTION_HEADER + data_length(length));
        if number == option::STARTTLS {
            if !input.is_empty() {
                return Err(Violation::BytesBeforeTls);
            }
            acknowledge(output, number);
            return Ok(Progress::StartTls);
        }
        self.answer(number, &data[OPTION_HEADER..], directory, output)
    }

    /// Decides from the header alone whether the option gets an error and its data need not be kept.
    fn refuse_unread(
        &mut self,
        number: u32,
        length: u32,
        draining: bool,
    ) -> Result<Option<(u32, &'static str)>, Violation> {
        if length > MAX_SKIPPED_DATA {
            return Err(Violation::OptionTooLong(length));
        }
        let needs_tls = self.policy == TlsPolicy::Require && !self.is_secure;
        let refusal = match number {
            option::ABORT => None,
            option::EXPORT_NAME if needs_tls => return Err(Violation::NeedsTls),
            option::EXPORT_NAME if draining => return Err(Violation::Draining),
            option::EXPORT_NAME if data_length(length) > wire::MAX_STRING => return Err(Violation::BadName),
            option::EXPORT_NAME => None,
            // "Termination of the session during option haggling".
            _ if draining => Some((option_reply::ERR_SHUTDOWN, "the server is shutting down")),
            option::LIST | option::STARTTLS | option::STRUCTURED_REPLY | option::EXTENDED_HEADERS if length > 0 => {
                Some((option_reply::ERR_INVALID, "this option carries no data"))
            }
            option::STARTTLS if self.is_secure => Some((option_reply::ERR_INVALID, "TLS has begun already")),
            option::STARTTLS if self.policy == TlsPolicy::Off => {
                Some((option_reply::ERR_POLICY, "TLS is not configured on this server"))
            }
            option::STARTTLS => None,
            _ if needs_tls => Some((option_reply::ERR_TLS_REQD, "this server is reached through TLS only")),
            option::LIST
            | option::INFO
            | option::GO
            | option::STRUCTURED_REPLY
            | option::LIST_META_CONTEXT
            | option::SET_META_CONTEXT
            | option::EXTENDED_HEADERS => None,
            _ => Some((option_reply::ERR_UNSUP, "unknown option")),
        };
        let is_too_big = refusal.is_none() && length > MAX_OPTION_DATA;
        self.options += u32::from(refusal.is_some() || is_too_big);
        if self.options > MAX_OPTIONS {
            return Err(Violation::TooManyOptions);
        }
        if !is_too_big {
            return Ok(refusal);
        }
        if number == option::SET_META_CONTEXT {
            self.contexts = None;
        }
        Ok(Some((option_reply::ERR_TOO_BIG, "too much option data")))
    }

    fn answer<D: Directory>(
        &mut self,
        number: u32,
        data: &[u8],
        directory: &D,
        output: &mut BytesMut,
    ) -> Result<Progress<D::Export>, Violation> {
        match number {
            option::EXPORT_NAME => return self.choose(data, directory, output),
            option::GO | option::INFO => {
                if let Some((export, listing)) = self.inform(number, data, directory, output)
                    && number == option::GO
                {
                    return Ok(self.finish(export, listing));
                }
            }
            option::ABORT => {
                acknowledge(output, number);
                return Ok(Progress::Aborted);
            }
            option::LIST => list(directory, output),
            option::STRUCTURED_REPLY if self.replies == ReplyMode::Extended => refuse(
                output,
                number,
                option_reply::ERR_EXT_HEADER_REQD,
                "extended headers have been negotiated and cannot be taken back",
            ),
            option::STRUCTURED_REPLY => {
                self.replies = ReplyMode::Structured;
                acknowledge(output, number);
            }
            option::EXTENDED_HEADERS => {
                self.replies = ReplyMode::Extended;
                acknowledge(output, number);
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                self.contexts(number, data, directory, output);
            }
            // `refuse_unread` has refused all others.
            _ => refuse(output, number, option_reply::ERR_UNSUP, "unknown option"),
        }
        Ok(Progress::Continue)
    }

    /// `NBD_OPT_EXPORT_NAME`.
    fn choose<D: Directory>(
        &mut self,
        data: &[u8],
        directory: &D,
        output: &mut BytesMut,
    ) -> Result<Progress<D::Export>, Violation> {
        if self.replies == ReplyMode::Extended {
            return Err(Violation::ExportNameAfterExtended);
        }
        let name = checked_string(data).ok_or(Violation::BadName)?;
        let (export, listing) = look_up(directory, name).map_err(|_| Violation::UnknownExport(name.to_owned()))?;
        if directory.is_shut(&listing.name) {
            return Err(Violation::Draining);
        }
        output.put_u64(listing.size);
        output.put_u16(self.flags(&listing).bits());
        if !self.no_zeroes {
            output.put_bytes(0, wire::EXPORT_NAME_PADDING);
        }
        Ok(self.finish(export, listing))
    }

    /// `NBD_OPT_INFO` and `NBD_OPT_GO`. Returns the export when it was found.
    fn inform<D: Directory>(
        &mut self,
        number: u32,
        data: &[u8],
        directory: &D,
        output: &mut BytesMut,
    ) -> Option<(D::Export, Listing)> {
        let Some((name, wanted)) = parse_info(data) else {
            refuse(output, number, option_reply::ERR_INVALID, "malformed option data");
            return None;
        };
        let (export, listing) = match look_up(directory, name) {
            Ok(found) => found,
            Err((reply, message)) => {
                refuse(output, number, reply, message);
                return None;
            }
        };
        if directory.is_shut(&listing.name) {
            refuse(output, number, option_reply::ERR_SHUTDOWN, GOES_ELSEWHERE);
            return None;
        }
        let mut item = |kind: u16, write: &dyn Fn(&mut BytesMut), length: usize| {
            reply_header(output, number, option_reply::INFO, 2 + length);
            output.put_u16(kind);
            write(output);
        };
        let flags = self.flags(&listing).bits();
        item(
            info::EXPORT,
            &|output| {
                output.put_u64(listing.size);
                output.put_u16(flags);
            },
            10,
        );
        if wanted.contains(&info::NAME) || name != listing.name {
            item(info::NAME, &|output| output.put_slice(listing.name.as_bytes()), listing.name.len());
        }
        if wanted.contains(&info::DESCRIPTION) && !listing.description.is_empty() {
            let description = listing.description.as_bytes();
            item(info::DESCRIPTION, &|output| output.put_slice(description), description.len());
        }
        if wanted.contains(&info::BLOCK_SIZE) {
            item(
                info::BLOCK_SIZE,
                &|output| {
                    output.put_u32(listing.block_sizes.minimum);
                    output.put_u32(listing.block_sizes.preferred);
                    output.put_u32(listing.block_sizes.maximum);
                },
                12,
            );
            self.knows_block_sizes = true;
        }
        acknowledge(output, number);
        Some((export, listing))
    }

    /// `NBD_OPT_LIST_META_CONTEXT` and `NBD_OPT_SET_META_CONTEXT`.
    fn contexts<D: Directory>(&mut self, number: u32, data: &[u8], directory: &D, output: &mut BytesMut) {
        let set = number == option::SET_META_CONTEXT;
        if set {
            // A failed SET_META_CONTEXT also replaces what was set before.
            self.contexts = None;
        }
        // "NBD_OPT_LIST_META_CONTEXT" leaves it to the server whether a client without structured replies is answered. The
        // kernel's has none, and whoever negotiates for it must be able to name the connection.
        if set && !self.replies.has_chunks() {
            return refuse(output, number, option_reply::ERR_INVALID, "negotiate structured replies first");
        }
        let Some((name, queries)) = parse_queries(data) else {
            return refuse(output, number, option_reply::ERR_INVALID, "malformed option data");
        };
        let listing = match look_up(directory, name) {
            Ok((_, listing)) => listing,
            Err((reply, message)) => return refuse(output, number, reply, message),
        };
        let said = if set { Said::default() } else { Said::by(&queries) };
        if directory.is_shut(&listing.name) && !said.is_let_in() {
            return refuse(output, number, option_reply::ERR_SHUTDOWN, GOES_ELSEWHERE);
        }
        let mut chosen = Vec::new();
        for (position, context) in listing.contexts.iter().enumerate() {
            let matches = |query: &&str| *query == context || !set && is_namespace_of(query, context);
            if (!set && queries.is_empty()) || queries.iter().any(matches) {
                put_context(output, number, if set { context_id(position) } else { 0 }, context);
                chosen.push(position);
            }
        }
        if set {
            self.contexts = Some((listing.name, chosen));
        } else {
            let news = said.mirror.map(|mirror| directory.news(&listing.name, mirror)).unwrap_or_default();
            let facts = listing.facts.iter().chain(&news);
            for fact in facts.filter(|fact| queries.iter().any(|query| is_namespace_of(query, fact))) {
                put_context(output, number, 0, fact);
            }
            self.is_mirror |= said.is_mirror;
            self.is_relay |= said.is_relay;
            self.mirror = said.mirror.or(self.mirror);
            self.connection = said.connection.or(self.connection);
            if let Some(connection) = said.close {
                directory.close(&listing.name, connection);
            }
        }
        acknowledge(output, number);
    }

    fn flags(&self, listing: &Listing) -> TransmissionFlags {
        let mut flags = listing.flags | TransmissionFlags::HAS_FLAGS;
        flags.set(TransmissionFlags::SEND_DF, self.replies.has_chunks());
        flags
    }

    fn finish<E>(&mut self, export: E, mut listing: Listing) -> Progress<E> {
        listing.flags = self.flags(&listing);
        // Contexts that were set for another export do not count ("NBD_OPT_SET_META_CONTEXT").
        let contexts = match self.contexts.take() {
            Some((name, contexts)) if name == listing.name => contexts,
            _ => Vec::new(),
        };
        let Self { replies, knows_block_sizes, is_mirror, is_relay, mirror, connection, .. } = *self;
        Progress::Finished(Box::new(Negotiated {
            export,
            listing,
            replies,
            contexts,
            knows_block_sizes,
            is_mirror,
            is_relay,
            mirror,
            connection,
        }))
    }
}

/// What a newcomer to an export is told that takes no newcomers.
const GOES_ELSEWHERE: &str = "this server takes no new clients for the export";

/// The export called `name`, if this client may have it; else the error that it is told.
fn look_up<D: Directory>(directory: &D, name: &str) -> Result<(D::Export, Listing), (u32, &'static str)> {
    const UNKNOWN: (u32, &str) = (option_reply::ERR_UNKNOWN, "no such export");
    let (export, listing) = directory.find(name).ok_or(UNKNOWN)?;
    match directory.verdict(&listing.name) {
        Verdict::Admitted => Ok((export, listing)),
        Verdict::NeedsTls => Err((option_reply::ERR_TLS_REQD, "this export is served through TLS only")),
        Verdict::Denied => Err(UNKNOWN),
    }
}

/// `NBD_OPT_LIST`.
fn list<D: Directory>(directory: &D, output: &mut BytesMut) {
    for (name, description) in directory.list() {
        reply_header(output, option::LIST, option_reply::SERVER, 4 + name.len() + description.len());
        put_string(output, &name);
        output.put_slice(description.as_bytes());
    }
    acknowledge(output, option::LIST);
}

/// The name and the items asked for in the data of INFO and GO.
fn parse_info(mut data: &[u8]) -> Option<(&str, Vec<u16>)> {
    let name = take_string(&mut data)?;
    let count = usize::from(data.try_get_u16().ok()?);
    if data.len() != 2 * count {
        return None;
    }
    Some((name, data.chunks_exact(2).map(|mut item| item.get_u16()).collect()))
}

fn put_context(output: &mut BytesMut, number: u32, id: u32, name: &str) {
    reply_header(output, number, option_reply::META_CONTEXT, 4 + name.len());
    output.put_u32(id);
    output.put_slice(name.as_bytes());
}

fn acknowledge(output: &mut BytesMut, number: u32) {
    reply_header(output, number, option_reply::ACK, 0);
}

fn refuse(output: &mut BytesMut, number: u32, reply: u32, message: &str) {
    reply_header(output, number, reply, message.len());
    output.put_slice(message.as_bytes());
}

fn reply_header(output: &mut BytesMut, number: u32, reply: u32, length: usize) {
    output.put_u64(wire::OPTION_REPLY_MAGIC);
    output.put_u32(number);
    output.put_u32(reply);
    output.put_u32(length_u32(length));
}

/// The length of option data as a length in memory.
fn data_length(length: u32) -> usize {
    crate::units::to_usize(u64::from(length))
}

#[cfg(test)]
mod tests {
    use super::fuzz::sample;
    use super::*;
    use proptest::prelude::*;
    use std::cell::RefCell;

    #[derive(Default)]
    struct TwoExports {
        draining: bool,
        /// Whether the second takes no newcomers.
        shut: bool,
        closed: RefCell<Vec<(String, Id)>>,
    }

    impl Directory for TwoExports {
        type Export = &'static str;
        fn find(&self, name: &str) -> Option<(&'static str, Listing)> {
            match name {
                "a" => Some(("first", sample())),
                "b" => Some(("second", Listing { name: "b".into(), size: 77, ..sample() })),
                _ => None,
            }
        }
        fn list(&self) -> Vec<(String, String)> {
            vec![("a".into(), "an image".into()), ("b".into(), String::new())]
        }
        fn is_draining(&self) -> bool {
            self.draining
        }
        fn is_shut(&self, name: &str) -> bool {
            self.shut && name == "b"
        }
        fn news(&self, name: &str, mirror: Id) -> Vec<String> {
            if mirror == [0xab; 16] { vec![format!("x-headwater:moved=nbd://c/{name}")] } else { Vec::new() }
        }
        fn close(&self, name: &str, connection: Id) {
            self.closed.borrow_mut().push((name.into(), connection));
        }
    }

    struct Peer {
        handshake: ServerHandshake,
        input: BytesMut,
        output: BytesMut,
        directory: TwoExports,
    }

    type Step = Result<Progress<&'static str>, Violation>;

    impl Peer {
        /// A client that has sent its flags.
        fn greeted(flags: u32) -> Self {
            let mut peer = Self::silent();
            peer.input.put_u32(flags);
            assert!(matches!(peer.step(), Ok(Progress::Continue)));
            peer.output.clear();
            peer
        }

        fn silent() -> Self {
            let mut output = BytesMut::new();
            let handshake = ServerHandshake::new(&mut output);
            assert_eq!(&output[..], b"NBDMAGICIHAVEOPT\x00\x03");
            Self { handshake, input: BytesMut::new(), output, directory: TwoExports::default() }
        }

        fn step(&mut self) -> Step {
            self.handshake.advance(&mut self.input, &self.directory, &mut self.output)
        }

        fn send(&mut self, number: u32, data: &[u8]) -> Step {
            self.input.put_u64(wire::OPTION_MAGIC);
            self.input.put_u32(number);
            self.input.put_u32(length_u32(data.len()));
            self.input.put_slice(data);
            self.output.clear();
            let mut step = self.step();
            while matches!(step, Ok(Progress::Continue)) && (!self.input.is_empty() || self.output.is_empty()) {
                step = self.step();
            }
            step
        }

        /// The replies in the output: option, type, data.
        fn replies(&self) -> Vec<(u32, u32, Vec<u8>)> {
            let mut rest = &self.output[..];
            let mut replies = Vec::new();
            while rest.has_remaining() {
                assert_eq!(rest.get_u64(), wire::OPTION_REPLY_MAGIC);
                let (number, reply, length) = (rest.get_u32(), rest.get_u32(), data_length(rest.get_u32()));
                replies.push((number, reply, rest[..length].to_vec()));
                rest.advance(length);
            }
            replies
        }

        fn last_reply(&self) -> u32 {
            self.replies().last().expect("a reply").1
        }
    }

    fn go(name: &str, items: &[u16]) -> BytesMut {
        let mut data = BytesMut::new();
        put_string(&mut data, name);
        data.put_u16(u16::try_from(items.len()).unwrap());
        items.iter().for_each(|item| data.put_u16(*item));
        data
    }

    fn queries(name: &str, queries: &[&str]) -> BytesMut {
        let mut data = BytesMut::new();
        put_string(&mut data, name);
        data.put_u32(length_u32(queries.len()));
        queries.iter().for_each(|query| put_string(&mut data, query));
        data
    }

    fn finished(step: Step) -> Negotiated<&'static str> {
        match step {
            Ok(Progress::Finished(negotiated)) => *negotiated,
            other => panic!("not finished: {other:?}"),
        }
    }

    #[test]
    fn a_client_without_no_zeroes_gets_124_of_them_behind_export_name() {
        let mut peer = Peer::greeted(1);
        let negotiated = finished(peer.send(option::EXPORT_NAME, b"b"));
        assert_eq!(negotiated.export, "second");
        assert_eq!(negotiated.replies, ReplyMode::Simple);
        assert_eq!(peer.output.len(), 10 + 124);
        assert_eq!((&peer.output[..]).get_u64(), 77);
        assert!(!negotiated.listing.flags.contains(TransmissionFlags::SEND_DF));
    }

    #[test]
    fn a_client_with_no_zeroes_gets_ten_bytes_behind_export_name() {
        let mut peer = Peer::greeted(3);
        finished(peer.send(option::EXPORT_NAME, b"a"));
        assert_eq!(peer.output.len(), 10);
    }

    #[test]
    fn an_old_client_without_fixed_newstyle_is_served() {
        finished(Peer::greeted(0).send(option::EXPORT_NAME, b"a"));
    }

    #[test]
    fn export_name_of_an_unknown_export_ends_the_connection() {
        let step = Peer::greeted(3).send(option::EXPORT_NAME, b"nope");
        assert_eq!(step.unwrap_err(), Violation::UnknownExport("nope".into()));
    }

    #[test]
    fn unknown_client_flags_end_the_connection() {
        for flags in [4, 1 << 16, u32::MAX] {
            let mut peer = Peer::silent();
            peer.input.put_u32(flags);
            assert_eq!(peer.step().unwrap_err(), Violation::UnknownFlags(flags));
        }
    }

    #[test]
    fn go_answers_what_was_asked_and_finishes() {
        let mut peer = Peer::greeted(3);
        peer.send(option::STRUCTURED_REPLY, b"").unwrap();
        let negotiated = finished(peer.send(option::GO, &go("a", &[info::BLOCK_SIZE, info::DESCRIPTION, info::NAME])));
        let items: Vec<_> = peer.replies().iter().filter(|r| r.1 == option_reply::INFO).map(|r| r.2[1]).collect();
        assert_eq!(items, [0, 1, 2, 3]);
        assert_eq!(peer.last_reply(), option_reply::ACK);
        assert_eq!(negotiated.replies, ReplyMode::Structured);
        assert!(negotiated.knows_block_sizes);
        assert!(negotiated.listing.flags.contains(TransmissionFlags::SEND_DF | TransmissionFlags::HAS_FLAGS));
    }

    #[test]
    fn info_stays_in_the_negotiation_and_go_of_an_unknown_export_too() {
        let mut peer = Peer::greeted(3);
        assert!(matches!(peer.send(option::INFO, &go("a", &[])), Ok(Progress::Continue)));
        assert_eq!(peer.last_reply(), option_reply::ACK);
        assert!(matches!(peer.send(option::GO, &go("nope", &[])), Ok(Progress::Continue)));
        assert_eq!(peer.last_reply(), option_reply::ERR_UNKNOWN);
        finished(peer.send(option::GO, &go("b", &[])));
    }

    #[test]
    fn malformed_info_is_invalid_and_the_negotiation_goes_on() {
        let mut peer = Peer::greeted(3);
        let mut long = go("a", &[1, 2]);
        long.put_u8(0);
        let mut lying = BytesMut::new();
        lying.put_u32(u32::MAX);
        lying.put_slice(b"a\0\0");
        let mut nul = BytesMut::new();
        put_string(&mut nul, "a\0b");
        nul.put_u16(0);
        for data in [&b""[..], b"\0\0\0", &long, &lying, &nul] {
            assert!(matches!(peer.send(option::GO, data), Ok(Progress::Continue)));
            assert_eq!(peer.last_reply(), option_reply::ERR_INVALID, "{data:?}");
        }
        finished(peer.send(option::GO, &go("a", &[])));
    }

    #[test]
    fn unknown_options_are_skipped_and_answered_however_they_arrive() {
        let mut peer = Peer::greeted(3);
        peer.send(0x765_4321, &[7; 100_000]).unwrap();
        assert_eq!(peer.replies()[0].0, 0x765_4321);
        assert_eq!(peer.last_reply(), option_reply::ERR_UNSUP);
        peer.send(option::STARTTLS, b"").unwrap();
        assert_eq!(peer.last_reply(), option_reply::ERR_POLICY);
        peer.send(option::STARTTLS, b"x").unwrap();
        assert_eq!(peer.last_reply(), option_reply::ERR_INVALID);
        peer.send(option::LIST, b"x").unwrap();
        assert_eq!(peer.last_reply(), option_reply::ERR_INVALID);
        peer.send(option::GO, &vec![0; data_length(MAX_OPTION_DATA) + 1]).unwrap();
        assert_eq!(peer.last_reply(), option_reply::ERR_TOO_BIG);
        finished(peer.send(option::GO, &go("a", &[])));
    }

    #[test]
    fn an_option_that_could_not_be_skipped_in_reason_ends_the_connection() {
        let mut peer = Peer::greeted(3);
        peer.input.put_u64(wire::OPTION_MAGIC);
        peer.input.put_u32(option::GO);
        peer.input.put_u32(u32::MAX);
        assert_eq!(peer.step().unwrap_err(), Violation::OptionTooLong(u32::MAX));
    }

    #[test]
    fn garbage_ends_the_connection_after_eight_bytes() {
        let mut peer = Peer::greeted(3);
        peer.input.put_slice(b"GET / HT");
        assert_eq!(peer.step().unwrap_err(), Violation::BadMagic);
    }

    #[test]
    fn list_names_all_exports_with_their_descriptions() {
        let mut peer = Peer::greeted(3);
        peer.send(option::LIST, b"").unwrap();
        let replies = peer.replies();
        assert_eq!(replies.len(), 3);
        assert_eq!(replies[0].2, b"\0\0\0\x01aan image");
        assert_eq!(replies[1].2, b"\0\0\0\x01b");
        assert_eq!(replies[2].1, option_reply::ACK);
    }

    #[test]
    fn abort_is_acknowledged() {
        let mut peer = Peer::greeted(3);
        assert!(matches!(peer.send(option::ABORT, b"ignored"), Ok(Progress::Aborted)));
        assert_eq!(peer.last_reply(), option_reply::ACK);
    }

    #[test]
    fn contexts_need_structured_replies_and_belong_to_one_export() {
        let mut peer = Peer::greeted(3);
        peer.send(option::SET_META_CONTEXT, &queries("a", &["base:allocation"])).unwrap();
        assert_eq!(peer.last_reply(), option_reply::ERR_INVALID);
        peer.send(option::STRUCTURED_REPLY, b"").unwrap();
        peer.send(
            option::SET_META_CONTEXT,
            &queries("a", &["base:allocation", "base:", "x-headwater:node=1", "qemu:dirty-bitmap:x"]),
        )
        .unwrap();
        assert_eq!(peer.replies().len(), 2);
        assert_eq!(peer.replies()[0].2, b"\0\0\0\x01base:allocation");
        assert_eq!(finished(peer.send(option::GO, &go("a", &[]))).contexts, [0]);

        let mut peer = Peer::greeted(3);
        peer.send(option::STRUCTURED_REPLY, b"").unwrap();
        peer.send(option::SET_META_CONTEXT, &queries("b", &["base:allocation"])).unwrap();
        assert!(finished(peer.send(option::GO, &go("a", &[]))).contexts.is_empty());
    }

    #[test]
    fn connections_are_named_and_closed_also_without_structured_replies() {
        let mut peer = Peer::greeted(3);
        let (mine, other) = ("cd".repeat(16), "ef".repeat(16));
        let mut ask = |name: &str, query: String| {
            peer.send(option::LIST_META_CONTEXT, &queries(name, &[&query])).unwrap();
            assert_eq!(peer.replies().iter().map(|reply| reply.1).collect::<Vec<_>>(), [option_reply::ACK]);
        };
        ask("a", format!("x-headwater:connection={mine}"));
        ask("b", format!("x-headwater:close={other}"));
        ask("a", format!("x-headwater:close={}", &other[1..]));
        assert_eq!(*peer.directory.closed.borrow(), [("b".to_owned(), [0xef; 16])]);
        let negotiated = finished(peer.send(option::EXPORT_NAME, b"a"));
        assert_eq!(negotiated.connection, Some([0xcd; 16]));
        assert!(!negotiated.is_mirror && negotiated.mirror.is_none());
    }

    #[test]
    fn what_is_asked_in_set_meta_context_is_not_heard() {
        let mut peer = Peer::greeted(3);
        peer.send(option::STRUCTURED_REPLY, b"").unwrap();
        let (mirror, close) =
            (format!("{}{}", wire::MIRROR_NODE, "ab".repeat(16)), format!("{}{}", wire::CLOSE, "ab".repeat(16)));
        peer.send(option::SET_META_CONTEXT, &queries("a", &[wire::MIRROR, &mirror, &close, "x-headwater:"])).unwrap();
        assert_eq!(peer.replies().len(), 1);
        assert!(peer.directory.closed.borrow().is_empty());
        assert!(!finished(peer.send(option::GO, &go("a", &[]))).is_mirror);
    }

    #[test]
    fn a_mirror_that_says_which_gets_its_news() {
        let mut peer = Peer::greeted(3);
        peer.send(option::STRUCTURED_REPLY, b"").unwrap();
        let named = format!("{}{}", wire::MIRROR_NODE, "ab".repeat(16));
        let mut news = |query: &[&str]| {
            peer.send(option::LIST_META_CONTEXT, &queries("a", query)).unwrap();
            assert_eq!(peer.last_reply(), option_reply::ACK);
            peer.replies().iter().any(|reply| reply.2.ends_with(b"x-headwater:moved=nbd://c/a"))
        };
        assert!(news(&["x-headwater:", &named]));
        assert!(!news(&["x-headwater:", "x-headwater:mirror"]), "it did not say which in the same list");
        assert!(!news(&[&named]), "it did not ask for the namespace");
        let negotiated = finished(peer.send(option::GO, &go("a", &[])));
        assert!(negotiated.is_mirror);
        assert_eq!(negotiated.mirror, Some([0xab; 16]));
    }

    #[test]
    fn an_export_that_is_shut_sends_all_away_but_those_who_ask_where_to_go() {
        let mut peer = Peer::greeted(3);
        peer.directory.shut = true;
        peer.send(option::STRUCTURED_REPLY, b"").unwrap();
        for number in [option::GO, option::INFO] {
            peer.send(number, &go("b", &[])).unwrap();
            assert_eq!(peer.last_reply(), option_reply::ERR_SHUTDOWN);
        }
        let mirror = format!("{}{}", wire::MIRROR_NODE, "00".repeat(16));
        let close = format!("{}{}", wire::CLOSE, "00".repeat(16));
        for number in [option::LIST_META_CONTEXT, option::SET_META_CONTEXT] {
            for query in ["base:", "x-headwater:mirror", &mirror, &close] {
                let is_heard = number == option::LIST_META_CONTEXT && query.contains('=');
                peer.send(number, &queries("b", &[query])).unwrap();
                let wanted = if is_heard { option_reply::ACK } else { option_reply::ERR_SHUTDOWN };
                assert_eq!(peer.last_reply(), wanted, "{number} {query}");
            }
        }
        assert_eq!(peer.send(option::EXPORT_NAME, b"b").unwrap_err(), Violation::Draining);
        let mut peer = Peer::greeted(3);
        peer.directory.shut = true;
        finished(peer.send(option::GO, &go("a", &[])));
    }

    #[test]
    fn a_failed_set_meta_context_takes_back_the_one_before() {
        let mut peer = Peer::greeted(3);
        peer.send(option::STRUCTURED_REPLY, b"").unwrap();
        peer.send(option::SET_META_CONTEXT, &queries("a", &["base:allocation"])).unwrap();
        peer.send(option::SET_META_CONTEXT, b"broken").unwrap();
        assert_eq!(peer.last_reply(), option_reply::ERR_INVALID);
        assert!(finished(peer.send(option::GO, &go("a", &[]))).contexts.is_empty());
    }

    #[test]
    fn facts_are_listed_to_those_who_ask_and_to_nobody_else() {
        let mut peer = Peer::greeted(3);
        peer.send(option::STRUCTURED_REPLY, b"").unwrap();
        let mut listed = |query: &[&str]| {
            peer.send(option::LIST_META_CONTEXT, &queries("a", query)).unwrap();
            let texts: Vec<_> = peer.replies().iter().filter(|r| r.1 == option_reply::META_CONTEXT).cloned().collect();
            texts.into_iter().map(|reply| String::from_utf8(reply.2[4..].to_vec()).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(listed(&[]), ["base:allocation", "x-headwater:residency"]);
        assert_eq!(listed(&["base:"]), ["base:allocation"]);
        assert_eq!(listed(&["x-headwater:"]), ["x-headwater:residency", "x-headwater:node=1"]);
        assert_eq!(listed(&["qemu:"]), Vec::<String>::new());
    }

    #[test]
    fn extended_headers_replace_structured_replies_and_exclude_export_name() {
        let mut peer = Peer::greeted(3);
        peer.send(option::EXTENDED_HEADERS, b"").unwrap();
        assert_eq!(peer.last_reply(), option_reply::ACK);
        peer.send(option::STRUCTURED_REPLY, b"").unwrap();
        assert_eq!(peer.last_reply(), option_reply::ERR_EXT_HEADER_REQD);
        peer.send(option::SET_META_CONTEXT, &queries("a", &["base:allocation"])).unwrap();
        let negotiated = finished(peer.send(option::GO, &go("a", &[])));
        assert_eq!(negotiated.replies, ReplyMode::Extended);
        assert_eq!(negotiated.contexts, [0]);

        let mut peer = Peer::greeted(3);
        peer.send(option::EXTENDED_HEADERS, b"").unwrap();
        let step = peer.send(option::EXPORT_NAME, b"a");
        assert_eq!(step.unwrap_err(), Violation::ExportNameAfterExtended);
    }

    #[test]
    fn a_draining_server_sends_newcomers_away() {
        let mut peer = Peer::greeted(3);
        peer.directory.draining = true;
        peer.send(option::GO, &go("a", &[])).unwrap();
        assert_eq!(peer.last_reply(), option_reply::ERR_SHUTDOWN);
        assert!(matches!(peer.send(option::ABORT, b""), Ok(Progress::Aborted)));
    }

    #[test]
    fn endless_haggling_ends() {
        let mut peer = Peer::greeted(3);
        let ended = (0..=MAX_OPTIONS).find_map(|_| peer.send(99, b"").err());
        assert_eq!(ended, Some(Violation::TooManyOptions));
    }

    proptest! {
        #[test]
        fn no_bytes_break_the_negotiation(data in prop::collection::vec(any::<u8>(), 0..600)) {
            fuzz(&data);
        }

        #[test]
        fn no_option_data_breaks_the_negotiation(
            number in 0u32..13,
            data in prop::collection::vec(any::<u8>(), 0..60),
        ) {
            let mut bytes = vec![0, 0, 0, 3];
            bytes.extend(wire::OPTION_MAGIC.to_be_bytes());
            bytes.extend(number.to_be_bytes());
            bytes.extend(length_u32(data.len()).to_be_bytes());
            bytes.extend(data);
            fuzz(&bytes);
        }
    }
}
