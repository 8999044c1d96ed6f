//! A bare server, to mark what the machine can do at most.
//!
//! It receives all requests that have come in one system call, reads the file for each, and sends all replies in one.
//! With `--sendfile`, long replies go from the page cache to the socket instead: that is half of the server's CPU time,
//! and on some machines more than that of the client's, so each of the two marks another limit. It is no peer: one file, one thread per
//! connection, no errors, no fairness, no safety. Nobody has to reach it, only to come near.

use std::ffi::OsString;
use std::fs::File;
use std::net::TcpListener;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, bail, ensure};
use bytes::{Buf, BytesMut};
use clap::Parser;
use headwater::nbd::handshake::ReplyMode;
use headwater::nbd::handshake::server::{Directory, Progress, ServerHandshake};
use headwater::nbd::reply::{self, Last, ReplyTo};
use headwater::nbd::request::{self, Header};
use headwater::nbd::wire::{CommandFlags, MAX_PAYLOAD_BYTES, TransmissionFlags, command};
use headwater::nbd::{BlockSizes, Listing};
use headwater::units::{MIB, to_u64, to_usize};
use rustix::net::{RecvFlags, SendFlags};

/// Replies are sent when there are this many bytes of them.
const BATCH: u64 = MIB;
/// From this length on, copying costs the server more than a system call for each reply.
const BY_SENDFILE: u64 = 32 << 10;
/// Bytes that one system call receives at most.
const INPUT: usize = 256 << 10;

#[derive(Debug, Parser)]
struct Arguments {
    /// The file to serve.
    image: PathBuf,
    #[arg(long)]
    unix: Option<PathBuf>,
    #[arg(long)]
    tcp: Option<u16>,
    #[arg(long)]
    sendfile: bool,
}

/// Serves until it is killed.
pub(crate) fn main(words: impl IntoIterator<Item = OsString>) -> anyhow::Result<()> {
    let arguments = Arguments::parse_from(words);
    let file = File::options().read(true).write(true).open(&arguments.image).context("opening the image")?;
    let served = Arc::new(Served { size: file.metadata()?.len(), file, sendfile: arguments.sendfile });
    if let Some(path) = &arguments.unix {
        for socket in UnixListener::bind(path)?.incoming() {
            begin(socket?.into(), Arc::clone(&served))?;
        }
    }
    let port = arguments.tcp.context("neither --unix nor --tcp")?;
    for socket in TcpListener::bind(("127.0.0.1", port))?.incoming() {
        let socket = socket?;
        socket.set_nodelay(true)?;
        begin(socket.into(), Arc::clone(&served))?;
    }
    Ok(())
}

fn begin(socket: OwnedFd, served: Arc<Served>) -> anyhow::Result<()> {
    // A client that has gone or errs loses its connection, which is all that it needs to know.
    let work = move || drop(Connection::new(socket, &served).and_then(|mut connection| connection.serve()));
    std::thread::Builder::new().name("limit".into()).spawn(work)?;
    Ok(())
}

struct Served {
    file: File,
    size: u64,
    sendfile: bool,
}

impl Directory for Served {
    type Export = ();

    fn find(&self, name: &str) -> Option<((), Listing)> {
        use TransmissionFlags as Flags;
        let listing = Listing {
            name: name.to_owned(),
            description: String::new(),
            size: self.size,
            flags: Flags::HAS_FLAGS | Flags::SEND_FLUSH | Flags::SEND_FUA | Flags::CAN_MULTI_CONN,
            block_sizes: BlockSizes::DEFAULT,
            contexts: Vec::new(),
            facts: Vec::new(),
        };
        Some(((), listing))
    }

    fn list(&self) -> Vec<(String, String)> {
        Vec::new()
    }

    fn is_draining(&self) -> bool {
        false
    }
}

fn receive(socket: &OwnedFd, buffer: &mut [u8]) -> anyhow::Result<usize> {
    let (_, received) = rustix::net::recv(socket, buffer, RecvFlags::empty())?;
    ensure!(received > 0, "the client has gone");
    Ok(received)
}

fn send_all(socket: &OwnedFd, mut bytes: &[u8], flags: SendFlags) -> anyhow::Result<()> {
    while !bytes.is_empty() {
        bytes = &bytes[rustix::net::send(socket, bytes, SendFlags::NOSIGNAL | flags)?..];
    }
    Ok(())
}

/// One client.
struct Connection<'a> {
    socket: OwnedFd,
    served: &'a Served,
    mode: ReplyMode,
    input: Vec<u8>,
    /// What of the input has not been taken.
    filled: std::ops::Range<usize>,
    /// Replies, headers and data as they will be sent.
    output: Vec<u8>,
    used: usize,
    header: BytesMut,
}

impl<'a> Connection<'a> {
    fn new(socket: OwnedFd, served: &'a Served) -> anyhow::Result<Self> {
        let (mut received, mut output) = (BytesMut::new(), BytesMut::new());
        let mut handshake = ServerHandshake::new(&mut output);
        let mut input = vec![0; INPUT];
        let negotiated = loop {
            send_all(&socket, &output, SendFlags::empty())?;
            output.clear();
            match handshake.advance(&mut received, served, &mut output)? {
                Progress::Finished(negotiated) => break negotiated,
                Progress::Aborted | Progress::StartTls => bail!("the client has gone"),
                Progress::Continue => {}
                Progress::NeedInput => {
                    send_all(&socket, &output, SendFlags::empty())?;
                    output.clear();
                    let count = receive(&socket, &mut input)?;
                    received.extend_from_slice(&input[..count]);
                }
            }
        };
        send_all(&socket, &output, SendFlags::empty())?;
        let left = received.len();
        input[..left].copy_from_slice(&received);
        let output = vec![0; to_usize(MAX_PAYLOAD_BYTES + BATCH)];
        let (mode, header) = (negotiated.replies, BytesMut::new());
        Ok(Self { socket, served, mode, input, filled: 0..left, output, used: 0, header })
    }

    fn serve(&mut self) -> anyhow::Result<()> {
        loop {
            while let Some(header) = request::decode(&self.input[self.filled.clone()], self.mode)? {
                self.filled.start += request::header_length(self.mode);
                self.answer(header)?;
            }
            self.flush(SendFlags::empty())?;
            self.input.copy_within(self.filled.clone(), 0);
            self.filled = 0..self.filled.len();
            self.filled.end += receive(&self.socket, &mut self.input[self.filled.end..])?;
        }
    }

    fn answer(&mut self, request: Header) -> anyhow::Result<()> {
        let inside = request.offset.checked_add(request.length).is_some_and(|end| end <= self.served.size);
        ensure!(inside && request.length <= MAX_PAYLOAD_BYTES, "a request that a bare server does not answer");
        match request.command {
            command::READ => self.read(request),
            command::WRITE => {
                self.write(request)?;
                if request.flags & CommandFlags::FUA.bits() != 0 {
                    self.served.file.sync_data()?;
                }
                self.put_done(request)
            }
            command::FLUSH => {
                self.served.file.sync_data()?;
                self.put_done(request)
            }
            command::DISC => bail!("the client has said goodbye"),
            number => bail!("a bare server has no command {number}"),
        }
    }

    fn read(&mut self, request: Header) -> anyhow::Result<()> {
        let Header { cookie, offset, length, .. } = request;
        self.header.clear();
        let to = ReplyTo { cookie, offset };
        reply::put_data_header(&mut self.header, self.mode, to, offset, length, Last::Yes);
        self.put_header();
        if self.served.sendfile && length >= BY_SENDFILE {
            self.flush(SendFlags::MORE)?;
            return self.send_file(offset, length);
        }
        let data = &mut self.output[self.used..self.used + to_usize(length)];
        self.served.file.read_exact_at(data, offset)?;
        self.used += data.len();
        if to_u64(self.used) >= BATCH { self.flush(SendFlags::empty()) } else { Ok(()) }
    }

    fn send_file(&self, mut offset: u64, length: u64) -> anyhow::Result<()> {
        let end = offset + length;
        while offset < end {
            let left = to_usize(end - offset);
            let sent = rustix::fs::sendfile(&self.socket, &self.served.file, Some(&mut offset), left)?;
            ensure!(sent > 0, "the file has become shorter");
        }
        Ok(())
    }

    fn write(&mut self, request: Header) -> anyhow::Result<()> {
        let length = to_usize(request.length);
        let here = length.min(self.filled.len());
        let start = self.filled.start;
        self.filled.start += here;
        if here == length {
            self.served.file.write_all_at(&self.input[start..start + here], request.offset)?;
            return Ok(());
        }
        // What is missing comes in behind it, where replies would be.
        self.flush(SendFlags::empty())?;
        self.output[..here].copy_from_slice(&self.input[start..start + here]);
        let mut at = here;
        while at < length {
            at += receive(&self.socket, &mut self.output[at..length])?;
        }
        self.served.file.write_all_at(&self.output[..length], request.offset)?;
        Ok(())
    }

    fn put_done(&mut self, request: Header) -> anyhow::Result<()> {
        self.header.clear();
        reply::put_done(&mut self.header, self.mode, ReplyTo { cookie: request.cookie, offset: request.offset });
        self.put_header();
        if to_u64(self.used) >= BATCH { self.flush(SendFlags::empty()) } else { Ok(()) }
    }

    fn put_header(&mut self) {
        let length = self.header.remaining();
        self.output[self.used..self.used + length].copy_from_slice(&self.header);
        self.used += length;
    }

    fn flush(&mut self, flags: SendFlags) -> anyhow::Result<()> {
        send_all(&self.socket, &self.output[..self.used], flags)?;
        self.used = 0;
        Ok(())
    }
}
