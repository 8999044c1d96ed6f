//! The client's side of the negotiation.
//!
//! Asks for the most capable form that the server has and falls back step by step: extended headers, structured
//! replies, simple replies; GO, then EXPORT_NAME. Limits: one reply carries at most [`MAX_REPLY`] bytes, and all
//! replies to one option together at most [`MAX_REPLIES`].

use bytes::{Buf, BufMut, BytesMut};
use thiserror::Error;

use super::{ReplyMode, checked_string, length_u32, put_string, take_string};
use crate::nbd::BlockSizes;
use crate::nbd::wire::{self, HandshakeFlags, TransmissionFlags, info, option, option_reply};

/// The longest reply to an option that is read: two strings and some numbers.
pub const MAX_REPLY: u32 = 16 << 10;
/// The most bytes of replies to one option that are read; room for a hundred thousand short export names.
pub const MAX_REPLIES: usize = 4 << 20;

const GREETING: usize = 18;
const REPLY_HEADER: usize = 20;

/// What a client wants.
#[derive(Debug, Clone)]
pub enum Ask {
    /// To enter the transmission phase.
    Open {
        /// The export's name; empty for the default one.
        export: String,
        /// Metadata contexts to select, those of them that the server has.
        contexts: Vec<String>,
        /// What to list of the contexts that the server has: those that match one of these queries, or all of them
        /// if there is none.
        list: Option<Vec<String>>,
    },
    /// The names of all exports.
    List,
    /// What the server lists of an export's contexts, without opening it: those that match one of these queries.
    Contexts {
        /// The export's name; empty for the default one.
        export: String,
        /// What to list.
        list: Vec<String>,
    },
}

/// What was agreed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The server is ready for TLS: turn to it, then call [`ClientHandshake::secured`] and go on.
    StartTls,
    /// The transmission phase begins. What is left of the input belongs to it.
    Opened(Agreed),
    /// Name and description of each export; the connection is at its end.
    Listed(Vec<(String, String)>),
    /// The names that the server listed; none if it would not. The connection is at its end.
    Contexts(Vec<String>),
}

/// What was agreed on an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agreed {
    /// Size in bytes.
    pub size: u64,
    /// What the export can do.
    pub flags: TransmissionFlags,
    /// Which requests are allowed; sound in the sense of [`BlockSizes::is_sound`].
    pub block_sizes: BlockSizes,
    /// How replies look.
    pub replies: ReplyMode,
    /// The contexts that BLOCK_STATUS answers, with their ids.
    pub contexts: Vec<(u32, String)>,
    /// The names that the server listed.
    pub listed: Vec<String>,
    /// The canonical name, if the server said one.
    pub name: Option<String>,
    /// A line for a human, if the server sent one.
    pub description: Option<String>,
}

/// Why there was no agreement.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum Refusal {
    /// The peer does not speak NBD.
    #[error("this is not an NBD server")]
    NotNbd,
    /// The peer speaks the form of NBD of before 2011.
    #[error("the server speaks only oldstyle NBD, without export names")]
    OldStyle,
    /// The server has no such export.
    #[error("the server has no export {export:?}{}", said(.message))]
    UnknownExport {
        /// The name asked for.
        export: String,
        /// What the server said.
        message: String,
    },
    /// The server is going down.
    #[error("the server is shutting down")]
    Shutdown,
    /// The server wants TLS first.
    #[error("the server requires TLS: name it by nbds:// instead of nbd://")]
    TlsRequired,
    /// The server has no TLS, and nothing is said without.
    #[error("the server does not offer TLS{}", said(.message))]
    NoTls {
        /// What the server said.
        message: String,
    },
    /// The server refused for another reason.
    #[error("the server refused option {option} with error {code:#x}{}", said(.message))]
    Other {
        /// The option's number.
        option: u32,
        /// The reply's number.
        code: u32,
        /// What the server said.
        message: String,
    },
    /// The server broke the protocol.
    #[error("the server broke the protocol: {0}")]
    Broken(&'static str),
}

fn said(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(" ({})", message.trim_end()) }
}

/// What the client is waiting for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Greeting,
    /// The replies to this option.
    Replies(u32),
    /// The answer to EXPORT_NAME, with its padding or without.
    ExportName {
        padding: usize,
    },
}

/// A negotiation in progress.
#[derive(Debug)]
pub struct ClientHandshake {
    ask: Ask,
    state: State,
    no_zeroes: bool,
    /// The most capable form of replies that is asked for.
    at_most: ReplyMode,
    /// Contexts are listed also without structured replies.
    lists_anyway: bool,
    /// Nothing is asked before TLS.
    wants_tls: bool,
    replies: ReplyMode,
    contexts: Vec<(u32, String)>,
    listed: Vec<String>,
    exports: Vec<(String, String)>,
    size_and_flags: Option<(u64, TransmissionFlags)>,
    block_sizes: BlockSizes,
    name: Option<String>,
    description: Option<String>,
    /// Bytes of replies to the current option so far.
    seen: usize,
}

impl ClientHandshake {
    /// Starts a negotiation; the server speaks first.
    pub const fn new(ask: Ask) -> Self {
        Self {
            ask,
            state: State::Greeting,
            no_zeroes: false,
            at_most: ReplyMode::Extended,
            lists_anyway: false,
            wants_tls: false,
            replies: ReplyMode::Simple,
            contexts: Vec::new(),
            listed: Vec::new(),
            exports: Vec::new(),
            size_and_flags: None,
            block_sizes: BlockSizes::DEFAULT,
            name: None,
            description: None,
            seen: 0,
        }
    }

    /// Asks for no more capable form of replies than `mode`: what measures a server speaks to it as others do.
    #[must_use]
    pub const fn at_most(mut self, mode: ReplyMode) -> Self {
        self.at_most = mode;
        self
    }

    /// Lists contexts also if replies are simple. The protocol discourages this and servers may refuse it, so it is for
    /// those that are known to answer.
    #[must_use]
    pub const fn listing_anyway(mut self) -> Self {
        self.lists_anyway = true;
        self
    }

    /// Asks for TLS before anything else, and for nothing without it.
    #[must_use]
    pub const fn with_tls(mut self) -> Self {
        self.wants_tls = true;
        self
    }

    /// The connection speaks TLS from here on.
    pub fn secured(&mut self, output: &mut BytesMut) -> Result<(), Refusal> {
        self.wants_tls = false;
        self.begin(output)
    }

    /// Takes all whole messages from `input`, appending what the server must be told to `output`. `None` means
    /// that more bytes are needed.
    pub fn advance(&mut self, input: &mut BytesMut, output: &mut BytesMut) -> Result<Option<Outcome>, Refusal> {
        loop {
            let progress = match self.state {
                State::Greeting => self.take_greeting(input, output)?,
                State::Replies(number) => match self.take_reply(number, input, output)? {
                    Taken::Outcome(outcome) => return Ok(Some(outcome)),
                    Taken::Reply => true,
                    Taken::Nothing => false,
                },
                State::ExportName { padding } => {
                    if input.len() < 10 + padding {
                        return Ok(None);
                    }
                    self.size_and_flags = Some((input.get_u64(), take_flags(input.get_u16())));
                    input.advance(padding);
                    return self.opened().map(Some);
                }
            };
            if !progress {
                return Ok(None);
            }
        }
    }

    fn take_greeting(&mut self, input: &mut BytesMut, output: &mut BytesMut) -> Result<bool, Refusal> {
        if input.len() >= 8 && (&input[..8]).get_u64() != wire::INIT_MAGIC {
            return Err(Refusal::NotNbd);
        }
        if input.len() >= 16 {
            match (&input[8..16]).get_u64() {
                wire::OPTION_MAGIC => {}
                wire::OLDSTYLE_MAGIC => return Err(Refusal::OldStyle),
                _ => return Err(Refusal::NotNbd),
            }
        }
        if input.len() < GREETING {
            return Ok(false);
        }
        input.advance(16);
        let offered = HandshakeFlags::from_bits_truncate(input.get_u16());
        output.put_u32(u32::from(offered.bits()));
        self.no_zeroes = offered.contains(HandshakeFlags::NO_ZEROES);
        if !offered.contains(HandshakeFlags::FIXED_NEWSTYLE) {
            if self.wants_tls {
                return Err(Refusal::NoTls { message: String::new() });
            }
            self.send_export_name(output)?;
        } else if self.wants_tls {
            self.send(option::STARTTLS, &[], output);
        } else {
            self.begin(output)?;
        }
        Ok(true)
    }

    /// Sends the first option of those that what is wanted takes.
    fn begin(&mut self, output: &mut BytesMut) -> Result<(), Refusal> {
        if matches!(self.ask, Ask::List) {
            self.send(option::LIST, &[], output);
        } else {
            match self.at_most {
                ReplyMode::Extended => self.send(option::EXTENDED_HEADERS, &[], output),
                ReplyMode::Structured => self.send(option::STRUCTURED_REPLY, &[], output),
                // What is not asked for is as good as refused.
                ReplyMode::Simple => drop(self.next_option(option::STRUCTURED_REPLY, false, output)?),
            }
        }
        Ok(())
    }

    fn take_reply(&mut self, number: u32, input: &mut BytesMut, output: &mut BytesMut) -> Result<Taken, Refusal> {
        if input.len() < REPLY_HEADER {
            return Ok(Taken::Nothing);
        }
        let mut header = &input[..REPLY_HEADER];
        if header.get_u64() != wire::OPTION_REPLY_MAGIC {
            return Err(Refusal::Broken("a reply to an option without its magic number"));
        }
        let (option, reply, length) = (header.get_u32(), header.get_u32(), header.get_u32());
        if option != number {
            return Err(Refusal::Broken("a reply to an option that was not sent"));
        }
        if length > MAX_REPLY {
            return Err(Refusal::Broken("a reply to an option that is too long"));
        }
        let whole = REPLY_HEADER + length as usize;
        if input.len() < whole {
            return Ok(Taken::Nothing);
        }
        self.seen += whole;
        if self.seen > MAX_REPLIES {
            return Err(Refusal::Broken("too many replies to one option"));
        }
        let message = input.split_to(whole);
        let data = &message[REPLY_HEADER..];
        match reply {
            // Whoever sits between could have put it there, to have it taken for what the server says under TLS.
            option_reply::ACK if number == option::STARTTLS && !input.is_empty() => {
                Err(Refusal::Broken("bytes between STARTTLS and TLS"))
            }
            option_reply::ACK if number == option::STARTTLS => Ok(Taken::Outcome(Outcome::StartTls)),
            option_reply::ACK => self.next_option(number, true, output),
            error if error & option_reply::ERROR_BIT != 0 => self.refused(number, error, data, output),
            _ => self.take_item(number, reply, data).map(|()| Taken::Reply),
        }
    }

    /// A reply that is neither the last one nor an error.
    fn take_item(&mut self, number: u32, reply: u32, mut data: &[u8]) -> Result<(), Refusal> {
        match (number, reply) {
            (option::LIST, option_reply::SERVER) => {
                let name = take_string(&mut data).ok_or(Refusal::Broken("an export name that is not a string"))?;
                self.exports.push((name.to_owned(), String::from_utf8_lossy(data).into_owned()));
            }
            (option::LIST_META_CONTEXT | option::SET_META_CONTEXT, option_reply::META_CONTEXT) => {
                let id = data.try_get_u32().map_err(|_| Refusal::Broken("a context without an id"))?;
                let name = checked_string(data).ok_or(Refusal::Broken("a context name that is not a string"))?;
                if number == option::SET_META_CONTEXT {
                    self.contexts.push((id, name.to_owned()));
                } else {
                    self.listed.push(name.to_owned());
                }
            }
            (option::GO, option_reply::INFO) => self.take_info(data)?,
            _ => return Err(Refusal::Broken("a reply of a type that does not belong to its option")),
        }
        Ok(())
    }

    fn take_info(&mut self, mut data: &[u8]) -> Result<(), Refusal> {
        const SHORT: Refusal = Refusal::Broken("information about an export with the wrong length");
        match data.try_get_u16().map_err(|_| SHORT)? {
            info::EXPORT => {
                if data.len() != 10 {
                    return Err(SHORT);
                }
                self.size_and_flags = Some((data.get_u64(), take_flags(data.get_u16())));
            }
            info::BLOCK_SIZE => {
                if data.len() != 12 {
                    return Err(SHORT);
                }
                let (minimum, preferred, maximum) = (data.get_u32(), data.get_u32(), data.get_u32());
                self.block_sizes = BlockSizes { minimum, preferred, maximum };
                if !self.block_sizes.is_sound() {
                    return Err(Refusal::Broken("block sizes that contradict each other"));
                }
            }
            info::NAME => self.name = checked_string(data).map(str::to_owned),
            info::DESCRIPTION => self.description = checked_string(data).map(str::to_owned),
            // "NBD_OPT_GO": unknown information is ignored.
            _ => {}
        }
        Ok(())
    }

    /// What follows an option that has been answered for good.
    fn next_option(&mut self, number: u32, accepted: bool, output: &mut BytesMut) -> Result<Taken, Refusal> {
        match number {
            option::EXTENDED_HEADERS if accepted => self.replies = ReplyMode::Extended,
            option::EXTENDED_HEADERS => {
                self.send(option::STRUCTURED_REPLY, &[], output);
                return Ok(Taken::Reply);
            }
            option::STRUCTURED_REPLY if accepted => self.replies = ReplyMode::Structured,
            option::LIST => {
                self.send(option::ABORT, &[], output);
                return Ok(Taken::Outcome(Outcome::Listed(std::mem::take(&mut self.exports))));
            }
            option::GO => return self.opened().map(Taken::Outcome),
            option::SET_META_CONTEXT if !accepted => self.contexts.clear(),
            option::LIST_META_CONTEXT if !accepted => self.listed.clear(),
            _ => {}
        }
        let (export, contexts, list) = match &self.ask {
            Ask::Open { export, contexts, list } => (export, contexts, list),
            Ask::Contexts { export, list } => return Ok(self.list_only(number, export.clone(), list.clone(), output)),
            Ask::List => return Err(Refusal::Broken("a reply to an option that was not sent")),
        };
        let mut data = BytesMut::new();
        put_string(&mut data, export);
        let after_headers = matches!(number, option::EXTENDED_HEADERS | option::STRUCTURED_REPLY);
        if after_headers
            && (self.replies.has_chunks() || self.lists_anyway)
            && let Some(queries) = list
        {
            put_queries(&mut data, queries);
            self.send(option::LIST_META_CONTEXT, &data, output);
        } else if (after_headers || number == option::LIST_META_CONTEXT)
            && self.replies.has_chunks()
            && !contexts.is_empty()
        {
            put_queries(&mut data, contexts);
            self.send(option::SET_META_CONTEXT, &data, output);
        } else {
            let items = [info::NAME, info::DESCRIPTION, info::BLOCK_SIZE];
            data.put_u16(3);
            items.iter().for_each(|item| data.put_u16(*item));
            self.send(option::GO, &data, output);
        }
        Ok(Taken::Reply)
    }

    /// What follows where the listing is all that is wanted. Without chunks there is none: those who cannot reply with
    /// chunks must not be asked.
    fn list_only(&mut self, number: u32, export: String, list: Vec<String>, output: &mut BytesMut) -> Taken {
        if number != option::LIST_META_CONTEXT && self.replies.has_chunks() {
            let mut data = BytesMut::new();
            put_string(&mut data, &export);
            put_queries(&mut data, &list);
            self.send(option::LIST_META_CONTEXT, &data, output);
            return Taken::Reply;
        }
        self.send(option::ABORT, &[], output);
        Taken::Outcome(Outcome::Contexts(std::mem::take(&mut self.listed)))
    }

    fn refused(&mut self, number: u32, code: u32, data: &[u8], output: &mut BytesMut) -> Result<Taken, Refusal> {
        let message: String = String::from_utf8_lossy(&data[..data.len().min(wire::MAX_STRING)]).into_owned();
        match (number, code) {
            (_, option_reply::ERR_SHUTDOWN) => Err(Refusal::Shutdown),
            (option::STARTTLS, _) => Err(Refusal::NoTls { message }),
            (_, option_reply::ERR_TLS_REQD) => Err(Refusal::TlsRequired),
            (option::GO, option_reply::ERR_UNSUP) if self.replies != ReplyMode::Extended => {
                self.send_export_name(output)?;
                Ok(Taken::Reply)
            }
            (option::GO, option_reply::ERR_UNKNOWN) => {
                let Ask::Open { export, .. } = &self.ask else { return Err(Refusal::Shutdown) };
                Err(Refusal::UnknownExport { export: export.clone(), message })
            }
            (option::GO | option::LIST, _) => Err(Refusal::Other { option: number, code, message }),
            // Whatever else is refused is done without.
            _ => self.next_option(number, false, output),
        }
    }

    fn send(&mut self, number: u32, data: &[u8], output: &mut BytesMut) {
        put_option(output, number, data);
        self.state = State::Replies(number);
        self.seen = 0;
    }

    fn send_export_name(&mut self, output: &mut BytesMut) -> Result<(), Refusal> {
        let Ask::Open { export, .. } = &self.ask else {
            return Err(Refusal::Broken("a server without fixed newstyle cannot list anything"));
        };
        put_option(output, option::EXPORT_NAME, export.as_bytes());
        let padding = if self.no_zeroes { 0 } else { wire::EXPORT_NAME_PADDING };
        self.state = State::ExportName { padding };
        Ok(())
    }

    fn opened(&mut self) -> Result<Outcome, Refusal> {
        let (size, flags) = self.size_and_flags.ok_or(Refusal::Broken("an export without size and flags"))?;
        Ok(Outcome::Opened(Agreed {
            size,
            flags,
            block_sizes: self.block_sizes,
            replies: self.replies,
            contexts: std::mem::take(&mut self.contexts),
            listed: std::mem::take(&mut self.listed),
            name: self.name.take(),
            description: self.description.take(),
        }))
    }
}

/// What a reply came to.
enum Taken {
    Nothing,
    Reply,
    Outcome(Outcome),
}

/// "Transmission flags": unknown ones are ignored.
const fn take_flags(bits: u16) -> TransmissionFlags {
    TransmissionFlags::from_bits_truncate(bits)
}

fn put_option(output: &mut BytesMut, number: u32, data: &[u8]) {
    output.put_u64(wire::OPTION_MAGIC);
    output.put_u32(number);
    output.put_u32(length_u32(data.len()));
    output.put_slice(data);
}

fn put_queries(data: &mut BytesMut, queries: &[String]) {
    data.put_u32(length_u32(queries.len()));
    queries.iter().for_each(|query| put_string(data, query));
}

/// Feeds arbitrary bytes to a negotiation as if a server had sent them.
#[doc(hidden)]
pub fn fuzz(data: &[u8]) {
    let open =
        Ask::Open { export: "a".into(), contexts: vec!["base:allocation".into()], list: Some(vec!["x:".into()]) };
    let contexts = Ask::Contexts { export: "a".into(), list: vec!["x:".into()] };
    let handshakes = [open.clone(), Ask::List, contexts].map(ClientHandshake::new);
    for mut handshake in handshakes.into_iter().chain([ClientHandshake::new(open).with_tls()]) {
        let (mut input, mut output) = (BytesMut::new(), BytesMut::new());
        for piece in data.chunks(usize::from(data.first().copied().unwrap_or(0)) + 1) {
            input.put_slice(piece);
            match handshake.advance(&mut input, &mut output) {
                Ok(None) => {}
                Ok(Some(Outcome::StartTls)) => {
                    assert!(input.is_empty(), "something is left for TLS");
                    if handshake.secured(&mut output).is_err() {
                        break;
                    }
                }
                Ok(Some(Outcome::Opened(agreed))) => {
                    assert!(agreed.block_sizes.is_sound(), "unsound block sizes were let through");
                    break;
                }
                Ok(Some(Outcome::Listed(_) | Outcome::Contexts(_))) | Err(_) => break,
            }
            assert!(input.len() <= REPLY_HEADER + MAX_REPLY as usize + 256, "input piles up");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::server::{Directory, Progress, ServerHandshake};
    use super::*;
    use crate::nbd::Listing;
    use proptest::prelude::*;

    struct Server {
        /// Options that this server does not know, as an older one would not.
        unknown: Vec<u32>,
    }

    fn listing() -> Listing {
        Listing {
            name: "debian12".into(),
            description: "a real image".into(),
            size: 12345,
            flags: TransmissionFlags::READ_ONLY | TransmissionFlags::CAN_MULTI_CONN,
            block_sizes: BlockSizes { minimum: 1, preferred: 8192, maximum: 1 << 20 },
            contexts: vec!["base:allocation".into(), "x-headwater:residency".into()],
            facts: vec!["x-headwater:node=abc".into()],
        }
    }

    impl Directory for Server {
        type Export = ();
        fn find(&self, name: &str) -> Option<((), Listing)> {
            (name == "debian12").then(|| ((), listing()))
        }
        fn list(&self) -> Vec<(String, String)> {
            vec![("debian12".into(), "a real image".into()), ("other".into(), String::new())]
        }
        fn is_draining(&self) -> bool {
            false
        }
    }

    /// Lets a client and a server of ours negotiate; options that the server shall not know are renamed on the way.
    fn negotiate(ask: Ask, server: &Server) -> Result<Outcome, Refusal> {
        negotiate_as(ClientHandshake::new(ask), server)
    }

    fn negotiate_as(mut client: ClientHandshake, server: &Server) -> Result<Outcome, Refusal> {
        let (mut to_client, mut to_server) = (BytesMut::new(), BytesMut::new());
        let mut serving = ServerHandshake::new(&mut to_client);
        for _ in 0..100 {
            if let Some(outcome) = client.advance(&mut to_client, &mut to_server)? {
                return Ok(outcome);
            }
            let mut renamed = None;
            if to_server.len() >= 16 {
                let at = if to_server.starts_with(&wire::OPTION_MAGIC.to_be_bytes()) { 8 } else { 12 };
                let number = (&to_server[at..]).get_u32();
                if server.unknown.contains(&number) {
                    to_server[at..at + 4].copy_from_slice(&999u32.to_be_bytes());
                    renamed = Some(number);
                }
            }
            while let Progress::Continue = serving.advance(&mut to_server, server, &mut to_client).unwrap() {}
            if let Some(number) = renamed {
                to_client[8..12].copy_from_slice(&number.to_be_bytes());
            }
        }
        panic!("the negotiation does not end");
    }

    fn open(export: &str) -> Ask {
        Ask::Open {
            export: export.into(),
            contexts: vec!["base:allocation".into(), "x-headwater:residency".into(), "qemu:nope".into()],
            list: Some(vec!["x-headwater:".into()]),
        }
    }

    fn agreed(unknown: &[u32]) -> Agreed {
        match negotiate(open("debian12"), &Server { unknown: unknown.to_vec() }) {
            Ok(Outcome::Opened(agreed)) => agreed,
            other => panic!("not opened: {other:?}"),
        }
    }

    #[test]
    fn everything_is_agreed_with_a_server_that_has_everything() {
        let agreed = agreed(&[]);
        assert_eq!(agreed.replies, ReplyMode::Extended);
        assert_eq!(agreed.size, 12345);
        assert_eq!(agreed.block_sizes.preferred, 8192);
        assert_eq!(agreed.contexts, [(1, "base:allocation".into()), (2, "x-headwater:residency".into())]);
        assert_eq!(agreed.listed, ["x-headwater:residency", "x-headwater:node=abc"]);
        assert_eq!(agreed.name.as_deref(), Some("debian12"));
        assert_eq!(agreed.description.as_deref(), Some("a real image"));
    }

    #[test]
    fn older_servers_are_met_where_they_are() {
        assert_eq!(agreed(&[option::EXTENDED_HEADERS]).replies, ReplyMode::Structured);
        let simple = agreed(&[option::EXTENDED_HEADERS, option::STRUCTURED_REPLY]);
        assert_eq!(simple.replies, ReplyMode::Simple);
        assert!(simple.contexts.is_empty());
        let ancient = agreed(&[option::EXTENDED_HEADERS, option::STRUCTURED_REPLY, option::GO]);
        assert_eq!(ancient.size, 12345);
        assert_eq!(ancient.block_sizes, BlockSizes::DEFAULT);
        let no_contexts = agreed(&[option::SET_META_CONTEXT, option::LIST_META_CONTEXT]);
        assert!(no_contexts.contexts.is_empty() && no_contexts.listed.is_empty());
    }

    #[test]
    fn no_more_is_agreed_than_was_asked_for() {
        for mode in [ReplyMode::Simple, ReplyMode::Structured, ReplyMode::Extended] {
            let client = ClientHandshake::new(open("debian12")).at_most(mode);
            let Ok(Outcome::Opened(agreed)) = negotiate_as(client, &Server { unknown: vec![] }) else {
                panic!("not opened");
            };
            assert_eq!((agreed.replies, agreed.contexts.is_empty()), (mode, !mode.has_chunks()));
        }
    }

    #[test]
    fn a_server_that_lists_nothing_without_structured_replies_opens_all_the_same() {
        let client = ClientHandshake::new(open("debian12")).at_most(ReplyMode::Simple).listing_anyway();
        let server = Server { unknown: vec![option::LIST_META_CONTEXT] };
        let Outcome::Opened(agreed) = negotiate_as(client, &server).unwrap() else { panic!("it was not opened") };
        assert_eq!((agreed.replies, agreed.listed, agreed.contexts), (ReplyMode::Simple, vec![], vec![]));
        assert_eq!(agreed.size, 12345);
    }

    #[test]
    fn an_unknown_export_is_named_in_the_refusal() {
        let refusal = negotiate(open("debian13"), &Server { unknown: vec![] }).unwrap_err();
        assert_eq!(refusal.to_string(), "the server has no export \"debian13\" (no such export)");
    }

    #[test]
    fn exports_are_listed() {
        let listed = negotiate(Ask::List, &Server { unknown: vec![] }).unwrap();
        let expected = vec![("debian12".into(), "a real image".into()), ("other".into(), String::new())];
        assert_eq!(listed, Outcome::Listed(expected));
    }

    #[test]
    fn contexts_are_listed_without_opening_the_export() {
        let ask = |export: &str| Ask::Contexts { export: export.into(), list: vec!["x-headwater:".into()] };
        let listed = |unknown: &[u32], export| negotiate(ask(export), &Server { unknown: unknown.to_vec() });
        let all = Outcome::Contexts(vec!["x-headwater:residency".into(), "x-headwater:node=abc".into()]);
        // It must not matter whether the export may be opened.
        for unknown in [&[][..], &[option::EXTENDED_HEADERS], &[option::GO, option::EXPORT_NAME]] {
            assert_eq!(listed(unknown, "debian12").as_ref(), Ok(&all), "{unknown:?}");
        }
        for (unknown, export) in [
            (&[][..], "other"),
            (&[option::LIST_META_CONTEXT], "debian12"),
            (&[option::EXTENDED_HEADERS, option::STRUCTURED_REPLY], "debian12"),
        ] {
            assert_eq!(listed(unknown, export), Ok(Outcome::Contexts(vec![])), "{unknown:?}");
        }
    }

    #[test]
    fn strangers_are_told_apart() {
        for (greeting, refusal) in [
            (&b"HTTP/1.1 400 Bad Request\r\n"[..], Refusal::NotNbd),
            (b"NBDMAGIC\x00\x00\x42\x02\x81\x86\x12\x53", Refusal::OldStyle),
            (b"NBDMAGICSOMETHINGELSE", Refusal::NotNbd),
        ] {
            let step = ClientHandshake::new(open("a")).advance(&mut greeting.into(), &mut BytesMut::new());
            assert_eq!(step, Err(refusal));
        }
    }

    proptest! {
        #[test]
        fn no_bytes_break_the_negotiation(data in prop::collection::vec(any::<u8>(), 0..400)) {
            fuzz(&data);
            let mut greeted = b"NBDMAGICIHAVEOPT\x00\x03".to_vec();
            greeted.extend(&data);
            fuzz(&greeted);
        }
    }
}
