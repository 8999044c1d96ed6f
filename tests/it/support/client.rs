//! A client that says exactly what a test wants it to say, with blocking sockets.
//!
//! It uses the codecs of the library for what is right, and raw bytes for what is wrong.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;

use bytes::{Buf, BytesMut};
use headwater::error::ErrorKind;
use headwater::nbd::Uri;
use headwater::nbd::handshake::ReplyMode;
use headwater::nbd::handshake::client::{Agreed, Ask, ClientHandshake, Outcome};
use headwater::nbd::reply::{self, Last};
use headwater::nbd::request::{self, Header};
use headwater::nbd::uri::Address;
use headwater::nbd::wire::{self, CommandFlags, chunk, command};

use super::SOON;

/// A blocking socket of either family.
pub(crate) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Socket {
    pub(crate) fn connect(uri: &str) -> Self {
        Self::try_connect(uri).unwrap_or_else(|error| panic!("{uri}: {error}"))
    }

    pub(crate) fn try_connect(uri: &str) -> io::Result<Self> {
        let socket = match uri.parse::<Uri>().unwrap().address {
            Address::Tcp { host, port } => Self::Tcp(TcpStream::connect((host.as_str(), port))?),
            Address::Unix(path) => Self::Unix(UnixStream::connect(path)?),
        };
        match &socket {
            Self::Tcp(socket) => socket.set_read_timeout(Some(SOON))?,
            Self::Unix(socket) => socket.set_read_timeout(Some(SOON))?,
        }
        Ok(socket)
    }

    pub(crate) fn half_close(&self) {
        match self {
            Self::Tcp(socket) => socket.shutdown(std::net::Shutdown::Write).unwrap(),
            Self::Unix(socket) => socket.shutdown(std::net::Shutdown::Write).unwrap(),
        }
    }

    /// Whether the server closes without another byte.
    pub(crate) fn is_closed_by_peer(&mut self) -> bool {
        let mut rest = Vec::new();
        match self.read_to_end(&mut rest) {
            Ok(_) => rest.is_empty(),
            Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
        }
    }
}

impl Read for Socket {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(socket) => socket.read(buffer),
            Self::Unix(socket) => socket.read(buffer),
        }
    }
}

impl Write for Socket {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(socket) => socket.write(buffer),
            Self::Unix(socket) => socket.write(buffer),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The flags of a client, as bytes.
pub(crate) const FLAGS: [u8; 4] = [0, 0, 0, 3];

/// An option, as bytes.
pub(crate) fn option(number: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = wire::OPTION_MAGIC.to_be_bytes().to_vec();
    bytes.extend(number.to_be_bytes());
    bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
    bytes.extend(data);
    bytes
}

/// Type and data of the next reply to an option.
pub(crate) fn reply(socket: &mut Socket) -> (u32, Vec<u8>) {
    let mut header = [0; 20];
    socket.read_exact(&mut header).unwrap();
    let word = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().unwrap());
    let mut data = vec![0; word(16) as usize];
    socket.read_exact(&mut data).unwrap();
    (word(12), data)
}

/// A whole reply.
#[derive(Debug, PartialEq)]
pub(crate) struct Reply {
    pub(crate) cookie: u64,
    pub(crate) error: Option<ErrorKind>,
    /// Data by offset, as chunks brought it; holes are `None` with their length.
    pub(crate) content: Vec<(u64, Result<Vec<u8>, u32>)>,
    /// Raw payloads of other chunks.
    pub(crate) other: Vec<(u16, Vec<u8>)>,
}

/// A simple reply, or one chunk of a reply.
#[derive(Debug)]
pub(crate) struct Frame {
    pub(crate) cookie: u64,
    pub(crate) part: Part,
    pub(crate) last: Last,
}

/// What a frame carries.
#[derive(Debug)]
pub(crate) enum Part {
    Nothing,
    Data(u64, Vec<u8>),
    Hole(u64, u32),
    Failure(ErrorKind),
    Other(u16, Vec<u8>),
}

impl Reply {
    const fn to(cookie: u64) -> Self {
        Self { cookie, error: None, content: Vec::new(), other: Vec::new() }
    }

    fn add(&mut self, frame: Frame) -> Last {
        match frame.part {
            Part::Nothing => {}
            Part::Data(offset, data) => self.content.push((offset, Ok(data))),
            Part::Hole(offset, length) => self.content.push((offset, Err(length))),
            Part::Failure(error) => self.error = Some(error),
            Part::Other(kind, payload) => self.other.push((kind, payload)),
        }
        frame.last
    }

    /// The bytes that the content stands for.
    pub(crate) fn bytes(&self) -> Vec<u8> {
        assert_eq!(self.error, None);
        let mut content: Vec<_> = self.content.iter().collect();
        content.sort_by_key(|(offset, _)| *offset);
        let mut bytes = Vec::new();
        for (_, piece) in content {
            match piece {
                Ok(data) => bytes.extend_from_slice(data),
                Err(hole) => bytes.resize(bytes.len() + *hole as usize, 0),
            }
        }
        bytes
    }
}

/// A connection in its transmission phase.
pub(crate) struct Client {
    pub(crate) socket: Socket,
    input: BytesMut,
    pub(crate) agreed: Agreed,
    /// Lengths of reads in flight, for simple replies.
    reads: std::collections::HashMap<u64, usize>,
}

impl Client {
    /// Negotiates the best that both have, with `base:allocation`.
    pub(crate) fn open(uri: &str) -> Self {
        Self::try_open(uri, &[]).unwrap_or_else(|error| panic!("{uri}: {error}"))
    }

    /// Negotiates as a client that does not know some options.
    pub(crate) fn open_without(uri: &str, unknown: &[u32]) -> Self {
        Self::try_open(uri, unknown).unwrap_or_else(|error| panic!("{uri}: {error}"))
    }

    /// The oldest kind of client that there still is.
    pub(crate) fn open_simple(uri: &str) -> Self {
        Self::open_without(uri, &[wire::option::EXTENDED_HEADERS, wire::option::STRUCTURED_REPLY])
    }

    pub(crate) fn open_structured(uri: &str) -> Self {
        Self::open_without(uri, &[wire::option::EXTENDED_HEADERS])
    }

    pub(crate) fn try_open(uri: &str, unknown: &[u32]) -> io::Result<Self> {
        Self::try_open_asking(uri, &["base:allocation"], None, unknown)
    }

    /// Negotiates the best that both have, with other contexts, and lists what `list` asks for.
    pub(crate) fn open_asking(uri: &str, contexts: &[&str], list: &[&str]) -> Self {
        let opened = Self::try_open_asking(uri, contexts, Some(list), &[]);
        opened.unwrap_or_else(|error| panic!("{uri}: {error}"))
    }

    fn try_open_asking(uri: &str, contexts: &[&str], list: Option<&[&str]>, unknown: &[u32]) -> io::Result<Self> {
        let mut socket = Socket::try_connect(uri)?;
        let export = uri.parse::<Uri>().unwrap().export;
        let all = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
        let ask = Ask::Open { export, contexts: all(contexts), list: list.map(all) };
        let mut handshake = ClientHandshake::new(ask);
        let (mut input, mut output) = (BytesMut::new(), BytesMut::new());
        loop {
            let outcome = handshake.advance(&mut input, &mut output).map_err(io::Error::other)?;
            if let Some(Outcome::Opened(agreed)) = outcome {
                return Ok(Self { socket, input, agreed, reads: std::collections::HashMap::new() });
            }
            // An option that this client does not know is not sent; it is as if the server had refused it.
            if output.len() == 16 && unknown.contains(&(&output[8..]).get_u32()) {
                let option = (&output[8..]).get_u32();
                output.clear();
                input.extend_from_slice(&wire::OPTION_REPLY_MAGIC.to_be_bytes());
                input.extend_from_slice(&option.to_be_bytes());
                input.extend_from_slice(&wire::option_reply::ERR_UNSUP.to_be_bytes());
                input.extend_from_slice(&[0; 4]);
                continue;
            }
            // The client's flags and its first option leave together, unless that option is one not to be sent.
            if output.len() == 20 && unknown.contains(&(&output[12..]).get_u32()) {
                socket.write_all(&output.split_to(4))?;
                continue;
            }
            socket.write_all(&output)?;
            output.clear();
            read_some(&mut socket, &mut input)?;
        }
    }

    pub(crate) fn mode(&self) -> ReplyMode {
        self.agreed.replies
    }

    /// Sends a request, with a payload if there is one.
    pub(crate) fn send(
        &mut self,
        number: u16,
        flags: CommandFlags,
        cookie: u64,
        offset: u64,
        length: u64,
        data: &[u8],
    ) {
        self.send_raw(Header { flags: flags.bits(), command: number, cookie, offset, length }, data);
    }

    pub(crate) fn send_raw(&mut self, header: Header, data: &[u8]) {
        let mut output = BytesMut::new();
        request::encode(&mut output, self.mode(), header);
        output.extend_from_slice(data);
        if header.command == command::READ {
            self.reads.insert(header.cookie, usize::try_from(header.length).unwrap());
        }
        self.socket.write_all(&output).unwrap();
    }

    /// Sends requests without payload by one call. (A client that goes on writing without reading may at last wait
    /// for itself.)
    pub(crate) fn send_together(&mut self, headers: impl Iterator<Item = Header>) {
        let mut output = BytesMut::new();
        for header in headers {
            request::encode(&mut output, self.mode(), header);
            if header.command == command::READ {
                self.reads.insert(header.cookie, usize::try_from(header.length).unwrap());
            }
        }
        self.socket.write_all(&output).unwrap();
    }

    /// Receives the next whole reply, in whatever order they come. Chunks of several replies must not mix.
    pub(crate) fn receive(&mut self) -> Reply {
        self.try_receive().unwrap()
    }

    pub(crate) fn try_receive(&mut self) -> io::Result<Reply> {
        let mut reply: Option<Reply> = None;
        loop {
            let frame = self.try_receive_frame()?;
            let reply = reply.get_or_insert_with(|| Reply::to(frame.cookie));
            assert_eq!(reply.cookie, frame.cookie, "chunks of several replies are mixed");
            if reply.add(frame) == Last::Yes {
                return Ok(std::mem::replace(reply, Reply::to(0)));
            }
        }
    }

    /// Receives so many replies whose chunks may be mixed, in the order in which they end.
    pub(crate) fn receive_mixed(&mut self, count: usize) -> Vec<Reply> {
        let (mut begun, mut whole) = (std::collections::HashMap::new(), Vec::new());
        while whole.len() < count {
            let frame = self.try_receive_frame().unwrap();
            let cookie = frame.cookie;
            let reply = begun.entry(cookie).or_insert_with(|| Reply::to(cookie));
            if reply.add(frame) == Last::Yes {
                whole.extend(begun.remove(&cookie));
            }
        }
        assert!(begun.is_empty(), "there are more replies than requests: {:?}", begun.keys());
        whole
    }

    /// Receives a simple reply, or one chunk.
    pub(crate) fn try_receive_frame(&mut self) -> io::Result<Frame> {
        let (header, length) = loop {
            if let Some(found) = reply::decode(&self.input, self.agreed.replies).map_err(io::Error::other)? {
                break found;
            }
            read_some(&mut self.socket, &mut self.input)?;
        };
        self.input.advance(length);
        match header {
            reply::Header::Simple { cookie, error } => {
                let part = match (self.reads.remove(&cookie), error) {
                    (_, Some(error)) => Part::Failure(error),
                    (Some(length), None) => Part::Data(0, self.take(length)?),
                    (None, None) => Part::Nothing,
                };
                Ok(Frame { cookie, part, last: Last::Yes })
            }
            reply::Header::Chunk { cookie, kind, length, last } => {
                let payload = self.take(usize::try_from(length).unwrap())?;
                let part = match kind {
                    chunk::OFFSET_DATA => Part::Data((&payload[..]).get_u64(), payload[8..].to_vec()),
                    chunk::OFFSET_HOLE => {
                        let (offset, hole) = reply::decode_hole(&payload).map_err(io::Error::other)?;
                        Part::Hole(offset, hole)
                    }
                    chunk::NONE => Part::Nothing,
                    kind if kind & chunk::ERROR_BIT != 0 => {
                        Part::Failure(reply::decode_error(kind, &payload).map_err(io::Error::other)?.0)
                    }
                    kind => Part::Other(kind, payload),
                };
                if last == Last::Yes {
                    self.reads.remove(&cookie);
                }
                Ok(Frame { cookie, part, last })
            }
        }
    }

    fn take(&mut self, length: usize) -> io::Result<Vec<u8>> {
        while self.input.len() < length {
            read_some(&mut self.socket, &mut self.input)?;
        }
        Ok(self.input.split_to(length).to_vec())
    }

    /// Sends a request and receives its reply, with nothing else in flight.
    pub(crate) fn ask(&mut self, number: u16, offset: u64, length: u64) -> Reply {
        self.ask_with(number, CommandFlags::empty(), offset, length, &[])
    }

    pub(crate) fn ask_with(
        &mut self,
        number: u16,
        flags: CommandFlags,
        offset: u64,
        length: u64,
        data: &[u8],
    ) -> Reply {
        self.send(number, flags, 0xc00c1e, offset, length, data);
        let reply = self.receive();
        assert_eq!(reply.cookie, 0xc00c1e);
        reply
    }

    pub(crate) fn read(&mut self, offset: u64, length: u64) -> Vec<u8> {
        self.ask(command::READ, offset, length).bytes()
    }

    /// As [`Self::read`], from a server that may answer with an error or die.
    pub(crate) fn try_read(&mut self, offset: u64, length: u64) -> io::Result<Vec<u8>> {
        let mut output = BytesMut::new();
        let header = Header { flags: 0, command: command::READ, cookie: offset, offset, length };
        request::encode(&mut output, self.mode(), header);
        self.reads.insert(offset, usize::try_from(length).unwrap());
        self.socket.write_all(&output)?;
        let reply = self.try_receive()?;
        reply.error.map_or_else(|| Ok(reply.bytes()), |error| Err(io::Error::other(format!("{error:?}"))))
    }

    pub(crate) fn write(&mut self, offset: u64, data: &[u8]) -> Option<ErrorKind> {
        self.ask_with(command::WRITE, CommandFlags::empty(), offset, data.len() as u64, data).error
    }

    pub(crate) fn flush(&mut self) -> Option<ErrorKind> {
        self.ask(command::FLUSH, 0, 0).error
    }

    pub(crate) fn disconnect(mut self) {
        self.send(command::DISC, CommandFlags::empty(), 0, 0, 0, &[]);
        assert!(self.input.is_empty() && self.socket.is_closed_by_peer());
    }
}

fn read_some(socket: &mut Socket, input: &mut BytesMut) -> io::Result<()> {
    let mut buffer = [0; 64 << 10];
    loop {
        match socket.read(&mut buffer) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                input.extend_from_slice(&buffer[..count]);
                return Ok(());
            }
            // The rings of a server in this process send signals to its threads.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}
