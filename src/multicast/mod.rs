//! Sending an image to a group, and filling mirrors with what is heard.
//!
//! | file | holds |
//! | --- | --- |
//! | [`send`] | a session as its sender: reading, encoding, pacing, listening to reports |
//! | `pace` | when the next datagrams may leave |
//! | [`receive`] | a group as its hearers: finding the mirror, putting blocks together, handing them over |
//! | `heard` | one session as its hearer |
//! | `mend` | making blocks whole, and handing them to their mirrors |
//! | [`terms`] | what a session needs to know of its image |
//!
//! Sending and hearing have threads of their own: encoding and decoding take milliseconds, for which no client of a worker
//! is to wait. Workers read the image and store what has come.
//!
//! Owns: threads, sockets and pacing of sessions. Does not own: the protocol (`cast`), who ordered a session and what
//! becomes of what it did not bring (`control`).

mod heard;
mod mend;
mod pace;
pub mod receive;
pub mod send;
pub mod terms;
#[cfg(test)]
mod tests;

/// How nice threads that hear are to all others: what clients wait for comes first.
const NICENESS: i32 = 10;

/// Has this thread stand back behind those that serve clients.
fn stand_back() {
    // Of this thread alone.
    if let Err(error) = rustix::process::setpriority_process(None, NICENESS) {
        tracing::debug!(%error, "cannot lower the priority of a thread");
    }
}
