//! A connection, of either family.
//!
//! The runtime is asked to watch for input only. Watching for room to write as well would wake this thread each time
//! the peer takes a reply from a unix socket. A second descriptor watches for that, from the first time that the
//! socket is full until it has not been for a while.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::net::{IpAddr, TcpStream as StdTcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{BufMut, BytesMut};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags};
use serde::{Deserialize, Serialize};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::{TcpStream, UnixStream, lookup_host};
use tokio::task::coop::consume_budget;

use super::socket::{receive, watch};
use super::tls::{SavedTls, SecureError, Tls};
use crate::disk::File;
use crate::nbd::uri::Address;
use crate::tls::{Handshake, Progress};
use crate::units::to_usize;

/// A connected socket, of no thread's runtime.
#[derive(Debug)]
pub struct Detached {
    socket: OwnedFd,
    family: Family,
}

/// What kind of socket it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Family {
    /// TCP.
    Tcp,
    /// Unix.
    Unix,
}

/// A connected socket of this thread's runtime.
#[derive(Debug)]
pub struct Stream {
    socket: AsyncFd<OwnedFd>,
    family: Family,
    /// Watches for room to write.
    room: RefCell<Option<AsyncFd<OwnedFd>>>,
    /// Sends since the last one that was not taken whole.
    roomy: Cell<u32>,
    /// What is between the socket and whoever reads and writes here.
    tls: Option<Box<RefCell<Tls>>>,
}

/// A connection of no thread's runtime, with all that this process knows of it: to go on elsewhere.
#[derive(Debug)]
pub struct Dismantled {
    /// The connected socket.
    pub socket: OwnedFd,
    /// What kind of socket it is.
    pub family: Family,
    /// Its TLS, if it has turned to it. It must go on in one place only.
    pub tls: Option<SavedTls>,
}

/// Bytes received at once during a TLS handshake.
const HANDSHAKE_INPUT: usize = 16 << 10;

/// After so many sends that were taken whole, room to write is not watched for any more.
const ROOMY: u32 = 64;

/// A peer that has vanished without a word (power loss, cut cable) is found out after two minutes of silence.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_RETRIES: u32 = 6;

impl Detached {
    /// Takes a connected TCP socket, setting its options.
    ///
    /// Small replies must not wait for more to come ("Protocol phases" asks both sides to disable Nagle).
    pub fn from_tcp(socket: StdTcpStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        socket.set_nodelay(true)?;
        let keepalive = TcpKeepalive::new()
            .with_time(KEEPALIVE_IDLE)
            .with_interval(KEEPALIVE_INTERVAL)
            .with_retries(KEEPALIVE_RETRIES);
        SockRef::from(&socket).set_tcp_keepalive(&keepalive)?;
        Ok(Self { socket: socket.into(), family: Family::Tcp })
    }

    /// Takes a connected unix socket.
    pub fn from_unix(socket: StdUnixStream) -> io::Result<Self> {
        socket.set_nonblocking(true)?;
        Ok(Self { socket: socket.into(), family: Family::Unix })
    }

    /// Joins the runtime of this thread.
    pub fn attach(self) -> io::Result<Stream> {
        let socket = watch(self.socket, Interest::READABLE)?;
        Ok(Stream { socket, family: self.family, room: RefCell::default(), roomy: Cell::default(), tls: None })
    }

    /// Takes a connected socket that another process has had.
    pub fn from_fd(socket: OwnedFd) -> io::Result<Self> {
        let address = SockRef::from(&socket).local_addr()?;
        let family = if address.is_unix() { Family::Unix } else { Family::Tcp };
        Ok(Self { socket, family })
    }

    /// Joins the runtime of this thread, and goes on with TLS if there was any.
    pub fn assemble(self, tls: Option<SavedTls>) -> io::Result<Stream> {
        Stream::assemble(Dismantled { socket: self.socket, family: self.family, tls })
    }

    /// What kind of socket it is.
    pub const fn family(&self) -> Family {
        self.family
    }

    /// The address of the other end; `None` on a unix socket, and when it has left.
    pub fn peer_address(&self) -> Option<IpAddr> {
        let address = SockRef::from(&self.socket).peer_addr().ok()?.as_socket()?;
        Some(address.ip().to_canonical())
    }

    /// Who is at the other end, for logs.
    pub fn peer(&self) -> String {
        match self.family {
            Family::Tcp => {
                let address = SockRef::from(&self.socket).peer_addr().ok().and_then(|address| address.as_socket());
                address.map_or_else(|| "tcp".into(), |address| address.to_string())
            }
            Family::Unix => match rustix::net::sockopt::socket_peercred(&self.socket) {
                Ok(credentials) => format!("unix:pid={}", credentials.pid.as_raw_nonzero()),
                Err(_) => "unix".into(),
            },
        }
    }
}

fn full() -> io::Error {
    io::ErrorKind::WouldBlock.into()
}

impl Stream {
    /// What kind of socket it is.
    pub const fn family(&self) -> Family {
        self.family
    }

    /// Turns to TLS. Nothing else is sent or received meanwhile, and nothing may have arrived before.
    pub async fn secure(&mut self, mut handshake: Handshake) -> Result<(), SecureError> {
        let (mut input, mut output) = (BytesMut::new(), BytesMut::new());
        loop {
            let progress = handshake.advance(&mut input, &mut output);
            // Also when it failed: the peer is told why.
            let sent = self.write_all(&mut output).await;
            match progress? {
                Progress::Finished => break,
                Progress::NeedInput => sent?,
            }
            input.reserve(HANDSHAKE_INPUT);
            if self.read_buf(&mut input).await? == 0 {
                return Err(SecureError::Closed);
            }
        }
        self.tls = Some(Box::new(RefCell::new(Tls::new(handshake.finish()?, input))));
        Ok(())
    }

    /// Whom the peer's certificate names, if this is TLS.
    pub fn peer_names(&self) -> Option<Vec<String>> {
        self.tls.as_ref().map(|tls| tls.borrow().peer_names().to_vec())
    }

    /// Whether stretches of files can be sent without a copy ([`Self::try_send_file`]), and that is worth it.
    pub const fn takes_files(&self) -> bool {
        matches!(self.family, Family::Unix) && self.tls.is_none()
    }

    /// Leaves the runtime of this thread, to go on elsewhere ([`Self::assemble`]).
    ///
    /// Bytes that TLS has sealed and the socket has not taken are not sent yet, as [`Self::try_write_vectored`] has said:
    /// whoever goes on sends the same bytes first.
    pub fn dismantle(self) -> Dismantled {
        let tls = self.tls.as_ref().map(|tls| tls.borrow().save());
        Dismantled { socket: self.socket.into_inner(), family: self.family, tls }
    }

    /// Joins the runtime of this thread with a connection that was dismantled, here or in another process.
    pub fn assemble(dismantled: Dismantled) -> io::Result<Self> {
        let Dismantled { socket, family, tls } = dismantled;
        let tls = tls.map(Tls::restore).transpose().map_err(io::Error::other)?;
        let stream = Detached { socket, family }.attach()?;
        Ok(Self { tls: tls.map(|tls| Box::new(RefCell::new(tls))), ..stream })
    }

    /// Appends what has arrived to the room that `buffer` has; `Ok(0)` is the end.
    pub fn try_read_buf(&self, buffer: &mut impl BufMut) -> io::Result<usize> {
        match &self.tls {
            None => self.try_receive(buffer),
            Some(tls) => tls.borrow_mut().read(buffer, |room| self.try_receive(room)),
        }
    }

    fn try_receive(&self, buffer: &mut impl BufMut) -> io::Result<usize> {
        let (received, is_all_room) =
            self.socket.try_io(Interest::READABLE, |socket| receive(socket.as_fd(), buffer))?;
        if received > 0 && !is_all_room {
            self.is_drained();
        }
        Ok(received)
    }

    /// Puts what has arrived into `buffer`; `Ok(0)` is the end.
    pub fn try_read(&self, mut buffer: &mut [u8]) -> io::Result<usize> {
        self.try_read_buf(&mut buffer)
    }

    /// Fewer bytes came than there was room for, so there are none left, and asking would only be told so ("epoll(7)",
    /// questions and answers, 9). The runtime hears of the next ones by themselves.
    fn is_drained(&self) {
        // The runtime takes it for the answer of a system call.
        let _ = self.socket.try_io(Interest::READABLE, |_| Err::<(), _>(full()));
    }

    /// How many bytes have arrived and were not received yet; with TLS, how many there are at most.
    pub fn queued(&self) -> io::Result<usize> {
        let opened = self.tls.as_ref().map_or(0, |tls| tls.borrow().queued());
        Ok(opened + to_usize(rustix::io::ioctl_fionread(self)?))
    }

    /// Puts what has arrived into `buffer`, asking the socket itself: the runtime may not have heard of it yet.
    pub fn receive_queued(&self, mut buffer: &mut [u8]) -> io::Result<usize> {
        match &self.tls {
            None => Ok(rustix::net::recv(self, buffer, RecvFlags::DONTWAIT)?.0),
            Some(tls) => tls.borrow_mut().read(&mut buffer, |room| Ok(receive(self.as_fd(), room)?.0)),
        }
    }

    /// Sends as much as the socket takes. With `more`, something is to follow at once.
    ///
    /// What it has not said to be sent must come again, at the front.
    pub fn try_write_vectored(&self, buffers: &[IoSlice<'_>], more: bool) -> io::Result<usize> {
        if let Some(tls) = &self.tls {
            return tls.borrow_mut().write(buffers, |sealed| self.send_sealed(sealed));
        }
        let mut flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        flags.set(SendFlags::MORE, more);
        let length = buffers.iter().map(|buffer| buffer.len()).sum();
        self.try_send(length, |socket| {
            Ok(match buffers {
                [only] => rustix::net::send(socket, only, flags)?,
                _ => rustix::net::sendmsg(socket, buffers, &mut SendAncillaryBuffer::default(), flags)?,
            })
        })
    }

    /// Sends `length` bytes of a file from `offset` on, or as much of them as the socket takes, without copying them.
    /// `Ok(0)`: the file ends before that.
    ///
    /// Waits for the disk if they are not in memory.
    pub fn try_send_file(&self, file: &File, mut offset: u64, length: usize) -> io::Result<usize> {
        self.try_send(length, |socket| Ok(rustix::fs::sendfile(socket, file, Some(&mut offset), length)?))
    }

    fn send_sealed(&self, sealed: &[u8]) -> io::Result<usize> {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        self.try_send(sealed.len(), |socket| Ok(rustix::net::send(socket, sealed, flags)?))
    }

    fn try_send(&self, length: usize, send: impl FnOnce(BorrowedFd<'_>) -> io::Result<usize>) -> io::Result<usize> {
        let mut room = self.room.borrow_mut();
        let result = match &*room {
            Some(room) => room.try_io(Interest::WRITABLE, |_| send(self.as_fd())),
            None => send(self.as_fd()),
        };
        let is_full = match &result {
            Ok(sent) => *sent < length,
            Err(error) => error.kind() == io::ErrorKind::WouldBlock,
        };
        match &*room {
            _ if !is_full => {
                self.roomy.set(self.roomy.get().saturating_add(1));
                if self.roomy.get() > ROOMY {
                    *room = None;
                }
                return result;
            }
            // If it took a part of it, the runtime has not been told yet that it is full.
            Some(room) => drop(room.try_io(Interest::WRITABLE, |_| Err::<(), _>(full()))),
            None => *room = Some(watch(self.as_fd().try_clone_to_owned()?, Interest::WRITABLE)?),
        }
        self.roomy.set(0);
        result
    }

    /// Whether the runtime has heard of something to read, or of the end.
    pub fn is_readable(&self) -> bool {
        self.has_input() || self.socket.try_io(Interest::READABLE, |_| Ok(())).is_ok()
    }

    /// Whether something has been received that nobody has taken yet.
    fn has_input(&self) -> bool {
        self.tls.as_ref().is_some_and(|tls| tls.borrow().has_input())
    }

    /// Waits until there is something to read, or the end.
    pub fn poll_readable(&self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.has_input() {
            return Poll::Ready(Ok(()));
        }
        self.socket.poll_read_ready(context).map_ok(drop)
    }

    /// Waits until there may be room to write.
    pub fn poll_writable(&self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &*self.room.borrow() {
            Some(room) => room.poll_write_ready(context).map_ok(drop),
            None => Poll::Ready(Ok(())),
        }
    }

    /// Waits until there is something to read, or the end.
    ///
    /// Cancel safety: nothing is lost.
    pub async fn readable(&self) -> io::Result<()> {
        poll_fn(|context| self.poll_readable(context)).await
    }

    /// Waits until there may be room to write.
    ///
    /// Cancel safety: nothing is lost.
    pub async fn writable(&self) -> io::Result<()> {
        poll_fn(|context| self.poll_writable(context)).await
    }

    /// Sends all of `buffer`, which is emptied as it goes.
    ///
    /// Cancel safety: what has been sent has left the buffer.
    pub async fn write_all(&self, buffer: &mut BytesMut) -> io::Result<()> {
        while !buffer.is_empty() {
            // Others on this thread, time-outs among them, get their turn also while the peer is quick.
            consume_budget().await;
            match self.try_write_vectored(&[IoSlice::new(buffer)], false) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(sent) => bytes::Buf::advance(buffer, sent),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.writable().await?,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Appends at least one byte to `buffer`, or says that the peer has closed (`Ok(0)`). The buffer has room.
    ///
    /// Cancel safety: nothing is lost.
    pub async fn read_buf(&self, buffer: &mut BytesMut) -> io::Result<usize> {
        loop {
            consume_budget().await;
            match self.try_read_buf(buffer) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable().await?,
                result => return result,
            }
        }
    }

    /// Tells the peer that nothing more will come, after all that was sent.
    pub fn shutdown_write(&self) -> io::Result<()> {
        self.end_tls();
        SockRef::from(self).shutdown(std::net::Shutdown::Write)
    }
}

impl Stream {
    /// Tells the peer that TLS ends here, if there is any and the socket takes it: then its end is known to be no cut.
    pub fn end_tls(&self) {
        if let Some(tls) = &self.tls {
            tls.borrow_mut().end(|sealed| self.send_sealed(sealed));
        }
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Connects to a server. All addresses of a host name are tried in turn, each for its share of `limit`; the last
/// failure is reported.
///
/// Cancel safety: the attempt is given up.
pub async fn connect(address: &Address, limit: Duration) -> io::Result<Stream> {
    match address {
        Address::Unix(path) => Detached::from_unix(UnixStream::connect(path).await?.into_std()?)?.attach(),
        Address::Tcp { host, port } => {
            let mut failure = None;
            let addresses: Vec<_> = lookup_host((host.as_str(), *port)).await?.collect();
            let share = limit / u32::try_from(addresses.len().max(1)).unwrap_or(u32::MAX);
            for address in addresses {
                let attempt = tokio::time::timeout(share, TcpStream::connect(address)).await;
                match attempt.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
                    Ok(socket) => return Detached::from_tcp(socket.into_std()?)?.attach(),
                    Err(error) => failure = Some(error),
                }
            }
            Err(failure.unwrap_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the host has no address")))
        }
    }
}
