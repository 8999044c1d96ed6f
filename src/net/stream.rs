//! A connection, of either family.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{BufMut, BytesMut};
use socket2::{SockRef, TcpKeepalive};
use tokio::io::Interest;
use tokio::net::{TcpStream, UnixStream, lookup_host};
use tokio::task::coop::consume_budget;

use crate::nbd::uri::Address;

/// A connected socket of this thread's runtime.
#[derive(Debug)]
pub enum Stream {
    /// TCP.
    Tcp(TcpStream),
    /// Unix.
    Unix(UnixStream),
}

/// A peer that has vanished without a word (power loss, cut cable) is found out after two minutes of silence.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(60);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_RETRIES: u32 = 6;

/// Calls the same method of whichever socket there is.
macro_rules! either {
    ($stream:expr, $socket:ident => $call:expr) => {
        match $stream {
            Stream::Tcp($socket) => $call,
            Stream::Unix($socket) => $call,
        }
    };
}

impl Stream {
    /// Takes a connected TCP socket, setting its options.
    ///
    /// Small replies must not wait for more to come ("Protocol phases" asks both sides to disable Nagle).
    pub fn from_tcp(socket: TcpStream) -> io::Result<Self> {
        socket.set_nodelay(true)?;
        let keepalive = TcpKeepalive::new()
            .with_time(KEEPALIVE_IDLE)
            .with_interval(KEEPALIVE_INTERVAL)
            .with_retries(KEEPALIVE_RETRIES);
        SockRef::from(&socket).set_tcp_keepalive(&keepalive)?;
        Ok(Self::Tcp(socket))
    }

    /// Leaves this thread's runtime, so that another can take the socket.
    pub fn detach(self) -> io::Result<Detached> {
        Ok(match self {
            Self::Tcp(socket) => Detached::Tcp(socket.into_std()?),
            Self::Unix(socket) => Detached::Unix(socket.into_std()?),
        })
    }

    /// Who is at the other end, for logs.
    pub fn peer(&self) -> String {
        match self {
            Self::Tcp(socket) => socket.peer_addr().map_or_else(|_| "tcp".into(), |address| address.to_string()),
            Self::Unix(socket) => match socket.peer_cred().ok().and_then(|cred| cred.pid()) {
                Some(pid) => format!("unix:pid={pid}"),
                None => "unix".into(),
            },
        }
    }

    /// Appends what has arrived to `buffer`, up to its room; `Ok(0)` is the end.
    pub fn try_read_buf(&self, buffer: &mut impl BufMut) -> io::Result<usize> {
        either!(self, socket => socket.try_read_buf(buffer))
    }

    /// Puts what has arrived into `buffer`; `Ok(0)` is the end.
    pub fn try_read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        either!(self, socket => socket.try_read(buffer))
    }

    /// How many bytes have arrived and were not received yet.
    pub fn queued(&self) -> io::Result<usize> {
        Ok(crate::units::to_usize(rustix::io::ioctl_fionread(self)?))
    }

    /// Puts what has arrived into `buffer`, asking the socket itself: the runtime may not have heard of it yet.
    pub fn receive_queued(&self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::net::recv(self, buffer, rustix::net::RecvFlags::DONTWAIT)?.0)
    }

    /// Sends as much as the socket takes.
    pub fn try_write_vectored(&self, buffers: &[IoSlice<'_>]) -> io::Result<usize> {
        either!(self, socket => socket.try_write_vectored(buffers))
    }

    /// Waits until there is something to read, or the end.
    pub fn poll_readable(&self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, socket => socket.poll_read_ready(context))
    }

    /// Waits until there is room to write.
    pub fn poll_writable(&self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        either!(self, socket => socket.poll_write_ready(context))
    }

    /// Waits until there is something to read, or the end.
    ///
    /// Cancel safety: nothing is lost.
    pub async fn readable(&self) -> io::Result<()> {
        either!(self, socket => socket.ready(Interest::READABLE).await.map(drop))
    }

    /// Waits until there is room to write.
    ///
    /// Cancel safety: nothing is lost.
    pub async fn writable(&self) -> io::Result<()> {
        either!(self, socket => socket.ready(Interest::WRITABLE).await.map(drop))
    }

    /// Sends all of `buffer`, which is emptied as it goes.
    ///
    /// Cancel safety: what has been sent has left the buffer.
    pub async fn write_all(&self, buffer: &mut BytesMut) -> io::Result<()> {
        while !buffer.is_empty() {
            // Others on this thread, time-outs among them, get their turn also while the peer is quick.
            consume_budget().await;
            match self.try_write_vectored(&[IoSlice::new(buffer)]) {
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
        SockRef::from(self).shutdown(std::net::Shutdown::Write)
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        either!(self, socket => socket.as_fd())
    }
}

/// A connected socket on its way to another thread's runtime.
#[derive(Debug)]
pub enum Detached {
    /// TCP.
    Tcp(std::net::TcpStream),
    /// Unix.
    Unix(std::os::unix::net::UnixStream),
}

impl Detached {
    /// Joins the runtime of this thread.
    pub fn attach(self) -> io::Result<Stream> {
        match self {
            Self::Tcp(socket) => TcpStream::from_std(socket).map(Stream::Tcp),
            Self::Unix(socket) => UnixStream::from_std(socket).map(Stream::Unix),
        }
    }
}

/// Connects to a server. All addresses of a host name are tried in turn, each for its share of `limit`; the last
/// failure is reported.
///
/// Cancel safety: the attempt is given up.
pub async fn connect(address: &Address, limit: Duration) -> io::Result<Stream> {
    match address {
        Address::Unix(path) => UnixStream::connect(path).await.map(Stream::Unix),
        Address::Tcp { host, port } => {
            let mut failure = None;
            let addresses: Vec<_> = lookup_host((host.as_str(), *port)).await?.collect();
            let share = limit / u32::try_from(addresses.len().max(1)).unwrap_or(u32::MAX);
            for address in addresses {
                let attempt = tokio::time::timeout(share, TcpStream::connect(address)).await;
                match attempt.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
                    Ok(socket) => return Stream::from_tcp(socket),
                    Err(error) => failure = Some(error),
                }
            }
            Err(failure.unwrap_or_else(|| io::Error::new(io::ErrorKind::NotFound, "the host has no address")))
        }
    }
}
