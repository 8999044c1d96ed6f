//! Messages with descriptors between two processes of this host (`unix(7)`, SCM_RIGHTS), and descriptors from the
//! service manager.
//!
//! Owns: sending and receiving them whole, and who is at the other end. Does not own: what they mean.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, SocketFlags, SocketType,
};
use socket2::{Domain, SockAddr, Socket, Type};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::socket::{inherit, watch};

/// Descriptors in one message; the kernel takes 253.
pub const MOST_DESCRIPTORS: usize = 64;
/// Bytes of the longest message.
pub const LONGEST_MESSAGE: usize = 64 << 10;

/// One end of a connection that carries messages with descriptors. Of this thread's runtime.
#[derive(Debug)]
pub struct Link {
    socket: AsyncFd<OwnedFd>,
}

/// What has been received.
#[derive(Debug)]
pub struct Message {
    /// Its bytes.
    pub bytes: Vec<u8>,
    /// The descriptors that came with it.
    pub descriptors: Vec<OwnedFd>,
}

impl Link {
    /// Two ends: ours, and one to be given to a child process.
    pub fn pair() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
        Ok((Self::from_fd(ours)?, theirs))
    }

    /// The other end, in the child.
    pub fn from_fd(socket: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        Ok(Self { socket: watch(socket, Interest::READABLE | Interest::WRITABLE)? })
    }

    /// Connects to whoever listens at `path`.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let socket = Socket::new(Domain::UNIX, Type::SEQPACKET.cloexec(), None)?;
        socket.connect(&SockAddr::unix(path)?)?;
        Self::from_fd(socket.into())
    }

    /// The user that the other end's process belonged to when it connected.
    pub fn peer_user(&self) -> io::Result<u32> {
        Ok(rustix::net::sockopt::socket_peercred(&self.socket)?.uid.as_raw())
    }

    /// The other end's process.
    pub fn peer_process(&self) -> Option<u32> {
        let credentials = rustix::net::sockopt::socket_peercred(&self.socket).ok()?;
        u32::try_from(credentials.pid.as_raw_nonzero().get()).ok()
    }

    /// Sends one message.
    ///
    /// Cancel safety: it is sent, or not.
    pub async fn send(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        if bytes.len() > LONGEST_MESSAGE || descriptors.len() > MOST_DESCRIPTORS {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.socket.async_io(Interest::WRITABLE, |socket| send(socket.as_fd(), bytes, descriptors)).await
    }

    /// Receives one message; `None` is the end.
    ///
    /// Cancel safety: it is received, or not.
    pub async fn receive(&self) -> io::Result<Option<Message>> {
        self.socket.async_io(Interest::READABLE, |socket| receive(socket.as_fd())).await
    }
}

fn send(socket: BorrowedFd<'_>, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
    let mut rights = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !rights.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut rights, flags)?;
    Ok(())
}

fn receive(socket: BorrowedFd<'_>) -> io::Result<Option<Message>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
    let mut rights = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = vec![0; LONGEST_MESSAGE];
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let received = rustix::net::recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut rights, flags)?;
    let descriptors: Vec<_> = rights
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(descriptors) => Some(descriptors),
            _ => None,
        })
        .flatten()
        .collect();
    if received.bytes == 0 && descriptors.is_empty() {
        return Ok(None);
    }
    bytes.truncate(received.bytes);
    Ok(Some(Message { bytes, descriptors }))
}

/// Listens for links, in this thread's runtime.
#[derive(Debug)]
pub struct LinkListener {
    socket: AsyncFd<OwnedFd>,
}

impl LinkListener {
    /// Listens at `path`, where nothing is.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let socket = Socket::new(Domain::UNIX, Type::SEQPACKET.nonblocking().cloexec(), None)?;
        socket.bind(&SockAddr::unix(path)?)?;
        socket.listen(1)?;
        Ok(Self { socket: watch(socket.into(), Interest::READABLE)? })
    }

    /// Waits for the next one.
    ///
    /// Cancel safety: none is lost.
    pub async fn accept(&self) -> io::Result<Link> {
        let accept = |socket: &OwnedFd| Ok(rustix::net::accept_with(socket, SocketFlags::CLOEXEC)?);
        Link::from_fd(self.socket.async_io(Interest::READABLE, accept).await?)
    }
}

/// The descriptors that the service manager gives this process (`sd_listen_fds(3)`), with their names. To be called once.
pub fn inherited() -> io::Result<Vec<(String, OwnedFd)>> {
    // A successor that a server starts has its variables, which were for that one. Their names would not fit to no descriptors.
    if sd_notify::listen_fds()?.len() == 0 {
        return Ok(Vec::new());
    }
    let found = sd_notify::listen_fds_with_names()?;
    found.map(|(descriptor, name)| Ok((name, inherit(descriptor)?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Seek, Write};

    #[tokio::test]
    async fn messages_arrive_whole_with_their_descriptors() {
        let (ours, theirs) = Link::pair().unwrap();
        let theirs = Link::from_fd(theirs).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"content").unwrap();
        ours.send(b"one", &[file.as_fd(), file.as_fd()]).await.unwrap();
        ours.send(&vec![7; LONGEST_MESSAGE], &[]).await.unwrap();
        let first = theirs.receive().await.unwrap().unwrap();
        assert_eq!((&*first.bytes, first.descriptors.len()), (&b"one"[..], 2));
        let mut copy = std::fs::File::from(first.descriptors.into_iter().next().unwrap());
        let mut text = String::new();
        copy.rewind().unwrap();
        copy.read_to_string(&mut text).unwrap();
        assert_eq!(text, "content");
        assert_eq!(theirs.receive().await.unwrap().unwrap().bytes.len(), LONGEST_MESSAGE);
        assert!(ours.send(&vec![7; LONGEST_MESSAGE + 1], &[]).await.is_err());
        drop(ours);
        assert!(theirs.receive().await.unwrap().is_none());
    }

    #[tokio::test]
    async fn whoever_connects_is_known() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let listener = LinkListener::bind(&path).unwrap();
        let caller = Link::connect(&path).unwrap();
        let called = listener.accept().await.unwrap();
        assert_eq!(called.peer_user().unwrap(), rustix::process::geteuid().as_raw());
        assert_eq!(called.peer_process(), Some(std::process::id()));
        caller.send(b"x", &[]).await.unwrap();
        assert_eq!(called.receive().await.unwrap().unwrap().bytes, b"x");
    }
}
