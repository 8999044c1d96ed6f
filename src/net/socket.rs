//! What sockets need beyond safe Rust.
//!
//! Owns: the `unsafe` code of this room, three system calls' worth. Does not own: when to make them.
#![expect(
    unsafe_code,
    reason = "receiving into memory that is not initialised, choosing what epoll reports, and inheriting descriptors"
)]

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};

use bytes::BufMut;
use rustix::net::RecvFlags;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Has this thread's runtime watch `fd`, for `interest` only.
pub(super) fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the watch owns the descriptor, which thereby stays open and the same for as long as it is registered.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}

/// A descriptor that the service manager has opened for this process. To be called once for each.
pub(super) fn inherit(descriptor: RawFd) -> io::Result<OwnedFd> {
    // SAFETY: the descriptor is open and ours alone: the manager has left it to this process, and its number is given to
    // this function once.
    let owned = unsafe { OwnedFd::from_raw_fd(descriptor) };
    rustix::io::fcntl_setfd(&owned, rustix::io::FdFlags::CLOEXEC)?;
    Ok(owned)
}

/// Receives what has arrived into the first stretch of `buffer`'s room. Says how much, and whether that was all that
/// there was room for.
pub(super) fn receive(socket: BorrowedFd<'_>, buffer: &mut impl BufMut) -> io::Result<(usize, bool)> {
    // SAFETY: nothing but the kernel writes to the slice, and it writes only initialised bytes.
    let room = unsafe { buffer.chunk_mut().as_uninit_slice_mut() };
    let length = room.len();
    let (_, received) = rustix::net::recv(socket, room, RecvFlags::DONTWAIT)?;
    // SAFETY: the kernel has written that many bytes to the room.
    unsafe { buffer.advance_mut(received) };
    Ok((received, received == length))
}
