//! TLS 1.3 without I/O: handshakes, records, certificates, and who is at the other end.
//!
//! Owns: which certificates are shown and believed, when a handshake is over, and every record after it. `rustls` makes
//! the handshake, and `aws-lc` all cryptography. The records are ours for two reasons: they are encrypted straight from
//! and to the buffers of the connection, and a session can be written down and go on in another process
//! ([`Session::save`]), which takes the traffic secrets and the numbers of the next records, and nothing else.
//! Does not own: sockets (`net`), when a connection turns to TLS (`nbd::handshake`), what a name may do
//! (`export::access`).
//!
//! There are no tickets, no resumption and no early data: an NBD connection lives for days, and what is replayed would
//! be written twice.

mod certificates;
mod handshake;
mod keys;
mod names;
mod records;

pub use certificates::{
    CertificateError, ClientIdentity, Clients, ServerIdentity, default_certificates, set_default_certificates,
};
pub use handshake::{Failure, Handshake, MAX_HANDSHAKE, Progress, fuzz as fuzz_handshake};
pub use keys::Suite;
pub use names::{Facts, certificate_facts};
pub use records::{MAX_PLAIN, MAX_SEALED, OVERHEAD, Opened, RecordError, Saved, Session, fuzz as fuzz_records};

#[cfg(test)]
pub(crate) mod tests;
