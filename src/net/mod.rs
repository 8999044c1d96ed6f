//! Sockets: TCP and unix behind one type, for servers and clients.
//!
//! Owns: socket options, listening, connecting, inherited sockets, what a peer is called, TLS inside a connection. Does
//! not own: anything that is said over them.

mod interface;
mod listen;
pub mod multicast;
mod socket;
mod stream;
mod tls;

pub use listen::{BindError, ListenAddress, Listener, ParseListenError};
pub use stream::{Detached, Dismantled, Family, Stream, connect};
pub use tls::{SavedTls, SecureError};
