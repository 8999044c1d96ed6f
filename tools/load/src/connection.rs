//! A blocking connection to a server, and what goes out on it.

use std::io::{self, IoSlice};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use bytes::BytesMut;
use headwater::clock;
use headwater::nbd::handshake::ReplyMode;
use headwater::nbd::handshake::client::{Agreed, Ask, ClientHandshake, Outcome};
use headwater::nbd::request::{self, Header};
use headwater::nbd::uri::{Address, Security};
use headwater::nbd::{Uri, wire};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags};
use socket2::SockRef;

/// How long nothing may come while something is awaited. Longer than a mirror waits for its upstream.
const PATIENCE: Duration = Duration::from_secs(60);
/// Buffers of one vectored send; writes beyond them go with the next.
const SLICES: usize = 64;

/// A connected socket.
#[derive(Debug)]
pub(crate) struct Socket(OwnedFd);

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Whether a system call may wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wait {
    Yes,
    No,
}

impl Socket {
    fn connect(address: &Address) -> io::Result<Self> {
        let socket = match address {
            Address::Tcp { host, port } => {
                let socket = TcpStream::connect((host.as_str(), *port))?;
                // Requests must not wait for more to come.
                socket.set_nodelay(true)?;
                OwnedFd::from(socket)
            }
            Address::Unix(path) => UnixStream::connect(path)?.into(),
        };
        SockRef::from(&socket).set_read_timeout(Some(PATIENCE))?;
        Ok(Self(socket))
    }

    /// Receives what has come; `None` when that is nothing. An end is an error.
    pub(crate) fn receive(&self, buffer: &mut [u8], wait: Wait) -> anyhow::Result<Option<usize>> {
        let flags = if wait == Wait::Yes { RecvFlags::empty() } else { RecvFlags::DONTWAIT };
        loop {
            match rustix::net::recv(self, &mut *buffer, flags) {
                Ok((_, 0)) => bail!("the server closed the connection"),
                Ok((received, _)) => return Ok(Some(received)),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) if wait == Wait::No => return Ok(None),
                Err(Errno::AGAIN) => bail!("the server has said nothing for {} s", PATIENCE.as_secs()),
                Err(error) => return Err(error).context("receiving"),
            }
        }
    }

    /// Waits until something has come, there is room to send (if `to_send`), or it is `until`.
    pub(crate) fn wait(&self, to_send: bool, until: Option<Instant>) -> anyhow::Result<()> {
        let flags = if to_send { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
        let limit = until.map_or(PATIENCE, |until| until.saturating_duration_since(clock::now()));
        let mut sockets = [PollFd::new(self, flags)];
        let limit = Timespec::try_from(limit.min(PATIENCE))?;
        match rustix::event::poll(&mut sockets, Some(&limit)) {
            Ok(0) if until.is_none() => bail!("the server has said nothing for {} s", PATIENCE.as_secs()),
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error).context("waiting for the server"),
        }
    }

    fn send_all(&self, mut bytes: &[u8]) -> anyhow::Result<()> {
        while !bytes.is_empty() {
            let sent = rustix::net::send(self, bytes, SendFlags::NOSIGNAL).context("sending")?;
            bytes = &bytes[sent..];
        }
        Ok(())
    }
}

/// Connects and negotiates. Gives what came behind the negotiation too.
pub(crate) fn open(uri: &Uri, replies: Option<ReplyMode>) -> anyhow::Result<(Socket, Agreed, BytesMut)> {
    ensure!(uri.security == Security::Plain, "TLS is not supported yet");
    let socket = Socket::connect(&uri.address).context("cannot connect")?;
    let ask = Ask::Open { export: uri.export.clone(), contexts: Vec::new(), list: None };
    let mut negotiation = ClientHandshake::new(ask).at_most(replies.unwrap_or(ReplyMode::Structured));
    let (mut input, mut output) = (BytesMut::new(), BytesMut::new());
    let mut buffer = [0; 4096];
    loop {
        if let Some(outcome) = negotiation.advance(&mut input, &mut output)? {
            let Outcome::Opened(agreed) = outcome else { bail!("the server listed exports instead of opening one") };
            if let Some(mode) = replies {
                ensure!(agreed.replies == mode, "the server has no {mode:?} replies, only {:?} ones", agreed.replies);
            }
            return Ok((socket, agreed, input));
        }
        socket.send_all(&output)?;
        output.clear();
        let received = socket.receive(&mut buffer, Wait::Yes)?.unwrap_or(0);
        input.extend_from_slice(&buffer[..received]);
    }
}

/// Requests on their way out. Holds headers; payloads stay where they are.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    headers: BytesMut,
    segments: Vec<Segment>,
    /// Segments that are sent.
    done: usize,
}

/// A stretch of bytes to send.
#[derive(Debug, Clone, Copy)]
struct Segment {
    of_payload: bool,
    start: usize,
    end: usize,
}

impl Outbox {
    pub(crate) fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// Adds a request.
    pub(crate) fn push(&mut self, mode: ReplyMode, header: Header) {
        let start = self.headers.len();
        request::encode(&mut self.headers, mode, header);
        let end = self.headers.len();
        match self.segments.last_mut() {
            Some(last) if !last.of_payload => last.end = end,
            _ => self.segments.push(Segment { of_payload: false, start, end }),
        }
    }

    /// Adds the payload of the last request, which lies at `start` of the payloads.
    pub(crate) fn push_payload(&mut self, start: usize, length: usize) {
        self.segments.push(Segment { of_payload: true, start, end: start + length });
    }

    /// Sends as much as the socket takes.
    pub(crate) fn send(&mut self, socket: &Socket, payloads: &[u8]) -> anyhow::Result<()> {
        while self.done < self.segments.len() {
            let slice = |segment: &Segment| {
                let bytes = if segment.of_payload { payloads } else { &self.headers[..] };
                &bytes[segment.start..segment.end]
            };
            let mut slices = [IoSlice::new(&[]); SLICES];
            let pending = self.segments[self.done..].iter().take(SLICES);
            let count = pending.clone().count();
            for (place, segment) in slices.iter_mut().zip(pending) {
                *place = IoSlice::new(slice(segment));
            }
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            let control = &mut SendAncillaryBuffer::default();
            match rustix::net::sendmsg(socket, &slices[..count], control, flags) {
                Ok(sent) => self.advance(sent),
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error).context("sending"),
            }
        }
        self.headers.clear();
        self.segments.clear();
        self.done = 0;
        Ok(())
    }

    fn advance(&mut self, mut sent: usize) {
        while sent > 0 {
            let segment = &mut self.segments[self.done];
            let taken = sent.min(segment.end - segment.start);
            segment.start += taken;
            sent -= taken;
            if segment.start == segment.end {
                self.done += 1;
            }
        }
    }
}

/// Says goodbye; whether it arrives makes no difference any more.
pub(crate) fn disconnect(socket: &Socket, mode: ReplyMode) {
    let mut outbox = Outbox::default();
    outbox.push(mode, Header { flags: 0, command: wire::command::DISC, cookie: 0, offset: 0, length: 0 });
    let _ = outbox.send(socket, &[]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn requests_and_payloads_leave_in_order_through_a_narrow_socket() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        SockRef::from(&ours).set_send_buffer_size(4096).unwrap();
        let socket = Socket(ours.into());
        let payloads: Vec<u8> = (0..=250).cycle().take(40_000).collect();
        let mut outbox = Outbox::default();
        let mut expected = BytesMut::new();
        for nth in 0..100u64 {
            let header = Header { flags: 0, command: wire::command::WRITE, cookie: nth, offset: nth, length: 400 };
            outbox.push(ReplyMode::Structured, header);
            request::encode(&mut expected, ReplyMode::Structured, header);
            let start = usize::try_from(nth * 400).unwrap();
            outbox.push_payload(start, 400);
            expected.extend_from_slice(&payloads[start..start + 400]);
        }
        let mut received = vec![0; expected.len()];
        let mut at = 0;
        while at < received.len() {
            outbox.send(&socket, &payloads).unwrap();
            at += theirs.read(&mut received[at..]).unwrap();
        }
        assert!(outbox.is_empty() && received == expected);
    }
}
