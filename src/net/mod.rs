//! Sockets: TCP and unix behind one type, for servers and clients.
//!
//! Owns: socket options, listening, connecting, inherited sockets, what a peer is called. Does not own: anything
//! that is said over them.

mod interface;
pub mod link;
mod listen;
pub mod multicast;
mod socket;
mod stream;

pub use listen::{BindError, ListenAddress, Listener, ListeningAt, ParseListenError};
pub use stream::{Detached, Family, Stream, connect};
