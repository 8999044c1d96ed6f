//! The netlink sockets: requests and their answers, and the news that a connection died.
//!
//! They block: what is asked is done within the call, and is asked rarely. Answers are waited for [`PATIENCE`] long, as
//! detaching waits for requests that are under way.

use std::io;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

use bytes::BytesMut;
use netlink_sys::Socket;
use netlink_sys::protocols::{NETLINK_GENERIC, NETLINK_SOCK_DIAG};
use socket2::SockRef;

use super::Error;
use super::messages::{MAX_DATAGRAM, Message, Request, decode, encode_destroy};
use crate::clock;

/// How long the kernel may take to answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// A way to ask the kernel's NBD client. Sequence numbers tell late answers from those that are waited for.
#[derive(Debug)]
pub(super) struct Netlink {
    socket: Socket,
    family: u16,
    group: Option<u32>,
    sequence: u32,
}

/// Hears of connections that die, from when it is made.
#[derive(Debug)]
pub(super) struct Listener {
    socket: Socket,
    family: u16,
}

/// What a [`Listener`] has heard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum News {
    /// A connection of this device died.
    Dead(u32),
    /// Some news were lost: there were too many.
    Lost,
    /// Nothing for so long.
    Nothing,
}

impl Netlink {
    pub(super) fn open() -> Result<Self, Error> {
        let socket = open(NETLINK_GENERIC).map_err(Error::system("generic netlink"))?;
        let mut netlink = Self { socket, family: 0, group: None, sequence: 0 };
        match netlink.ask(&Request::Family) {
            Ok(messages) => {
                for message in messages {
                    if let Message::Family { id, group } = message {
                        (netlink.family, netlink.group) = (id, group);
                    }
                }
            }
            Err(Error::Kernel { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Err(Error::NoModule);
            }
            Err(error) => return Err(error),
        }
        if netlink.family == 0 { Err(Error::NoModule) } else { Ok(netlink) }
    }

    /// Begins to listen for connections that die.
    pub(super) fn listen(&self) -> Result<Listener, Error> {
        let group = self.group.ok_or(Error::Answer("it has no group for news"))?;
        let listen = || {
            let socket = open(NETLINK_GENERIC)?;
            socket.add_membership(group)?;
            Ok(socket)
        };
        let socket = listen().map_err(Error::system("news of the kernel"))?;
        Ok(Listener { socket, family: self.family })
    }

    /// Asks, and waits until it is done. The messages that came before that are the answer.
    pub(super) fn ask(&mut self, request: &Request) -> Result<Vec<Message>, Error> {
        self.sequence = self.sequence.wrapping_add(1);
        let datagram = request.encode(self.family, self.sequence);
        let answer = exchange(&self.socket, &datagram, self.family, self.sequence)?;
        match answer {
            (messages, 0, _) => Ok(messages),
            (_, errno, _) if errno == libc::EPERM => Err(Error::NotAllowed),
            (_, errno, message) => {
                Err(Error::Kernel { what: request.what(), source: io::Error::from_raw_os_error(errno), message })
            }
        }
    }

    /// Devices, and whether they are bound (or merely open).
    pub(super) fn status(&mut self, index: Option<u32>) -> Result<Vec<(u32, bool)>, Error> {
        let messages = self.ask(&Request::Status { index })?;
        let lists = messages.into_iter().filter_map(|message| match message {
            Message::Status(devices) => Some(devices),
            _ => None,
        });
        Ok(lists.flatten().collect())
    }
}

impl Listener {
    /// Waits for news until `end`.
    pub(super) fn next(&self, end: Instant) -> Result<News, Error> {
        loop {
            let left = end.saturating_duration_since(clock::now());
            if left.is_zero() {
                return Ok(News::Nothing);
            }
            match receive(&self.socket, left) {
                Ok(datagram) => {
                    let messages = decode(&datagram, self.family).map_err(|error| Error::Answer(error.0))?;
                    let dead = messages.iter().find_map(|message| match message {
                        Message::LinkDead { index } => Some(*index),
                        _ => None,
                    });
                    if let Some(index) = dead {
                        return Ok(News::Dead(index));
                    }
                }
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => return Ok(News::Lost),
                Err(error) if is_nothing(&error) => {}
                Err(error) => return Err(Error::system("news of the kernel")(error)),
            }
        }
    }

    /// Waits until a connection of the device dies; `false` if none has until `end`.
    pub(super) fn wait_for(&self, index: u32, end: Instant) -> Result<bool, Error> {
        loop {
            match self.next(end)? {
                News::Dead(dead) if dead == index => return Ok(true),
                // It may have been ours: whoever relies on it looks closer.
                News::Lost => return Ok(true),
                News::Dead(_) => {}
                News::Nothing => return Ok(false),
            }
        }
    }

    /// Forgets what it has heard so far.
    pub(super) fn clear(&self) {
        let mut buffer = BytesMut::with_capacity(MAX_DATAGRAM);
        while self.socket.recv(&mut buffer, libc::MSG_DONTWAIT).is_ok() {
            buffer.clear();
            buffer.reserve(MAX_DATAGRAM);
        }
    }
}

/// Ends a TCP connection of this system, whoever has it. Wants CAP_NET_ADMIN and a kernel with INET_DIAG_DESTROY.
pub(super) fn destroy(local: SocketAddr, remote: SocketAddr) -> io::Result<()> {
    let Some(datagram) = encode_destroy(local, remote, 1) else { return Err(io::ErrorKind::InvalidInput.into()) };
    let socket = open(NETLINK_SOCK_DIAG)?;
    let (_, errno, _) = exchange(&socket, &datagram, 0, 1).map_err(|error| match error {
        Error::System { source, .. } => source,
        error => io::Error::other(error),
    })?;
    if errno == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(errno)) }
}

fn open(protocol: isize) -> io::Result<Socket> {
    let mut socket = Socket::new(protocol)?;
    socket.bind_auto()?;
    socket.connect(&netlink_sys::SocketAddr::new(0, 0))?;
    // Old kernels have neither; then refusals come without words.
    let _ = (socket.set_ext_ack(true), socket.set_cap_ack(true));
    Ok(socket)
}

type Answer = (Vec<Message>, i32, String);

fn exchange(socket: &Socket, datagram: &[u8], family: u16, sequence: u32) -> Result<Answer, Error> {
    socket.send(datagram, 0).map_err(Error::system("netlink"))?;
    let end = clock::now() + PATIENCE;
    let mut messages = Vec::new();
    loop {
        let left = end.saturating_duration_since(clock::now()).max(Duration::from_millis(1));
        let datagram = match receive(socket, left) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            received => received.map_err(Error::system("no answer of the kernel"))?,
        };
        for message in decode(&datagram, family).map_err(|error| Error::Answer(error.0))? {
            match message {
                Message::Done { sequence: number, errno, text } if number == sequence => {
                    return Ok((messages, errno, text));
                }
                Message::Done { .. } => {}
                // The answer to one request is a few messages at most.
                message if messages.len() < 64 => messages.push(message),
                _ => return Err(Error::Answer("too many messages for one request")),
            }
        }
    }
}

fn receive(socket: &Socket, limit: Duration) -> io::Result<BytesMut> {
    SockRef::from(socket).set_read_timeout(Some(limit.max(Duration::from_millis(1))))?;
    let mut buffer = BytesMut::with_capacity(MAX_DATAGRAM);
    socket.recv(&mut buffer, 0)?;
    Ok(buffer)
}

fn is_nothing(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted)
}
