//! Sockets: TCP and unix behind one type, for servers and clients.
//!
//! Owns: socket options, listening, connecting, inherited sockets, what a peer is called, TLS inside a connection. Does
//! not own: anything that is said over them.

mod interface;
pub mod link;
mod listen;
pub mod multicast;
mod socket;
mod stream;
mod tls;

pub use listen::{BindError, ListenAddress, Listener, ListeningAt, ParseListenError};
/// Names a socket on this host, whichever process has it. 0 if that cannot be found out.
pub fn inode(socket: &std::os::fd::OwnedFd) -> u64 {
    rustix::fs::fstat(socket).map_or(0, |found| found.st_ino)
}

pub use stream::{Detached, Dismantled, Family, Stream, connect};
pub use tls::{SavedTls, SecureError};
