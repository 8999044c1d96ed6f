//! The NBD protocol without I/O, for both roles.
//!
//! Bytes and facts come in as arguments; bytes and decisions go out as values. Owns: constants, encoding and
//! decoding, the negotiation of both sides, the rules that a request must meet, NBD URIs. Knows no sockets, no
//! tokio, no files and no clock: a time-out or a connection limit belongs to whoever feeds it.
//!
//! Sections named in comments ("Size constraints", …) are those of the protocol document,
//! <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>, and for 64-bit headers those of its
//! `extension-ext-header` branch.
//!
//! | file | holds |
//! | --- | --- |
//! | [`wire`] | magic numbers, option, reply and command numbers, flags, limits |
//! | [`errno`] | the table between our kinds of error and NBD's numbers |
//! | [`export`] | what the protocol says of one export: size, flags, block sizes, contexts |
//! | [`handshake`] | negotiation: `server` and `client`, each a state machine fed with bytes |
//! | [`request`] | requests: encode (client), decode and check (server) |
//! | [`reply`] | replies: encode (server), decode (client) |
//! | [`client`] | requests in flight and the assembly of their replies (client) |
//! | `buffers` | the memory that those are assembled in, used again and again |
//! | [`uri`] | `nbd://`, `nbd+unix://` |

mod buffers;
pub mod client;
pub mod errno;
pub mod export;
pub mod handshake;
pub mod reply;
pub mod request;
pub mod uri;
pub mod wire;

pub use export::{BlockSizes, Extent, Listing};
pub use uri::Uri;
