//! Negotiation ("Handshake"): fixed newstyle, both roles.
//!
//! Each role is a state machine: bytes that arrived go in, bytes to send come out, and when it is finished it
//! says what was agreed. Neither waits, times out or reads a socket.

pub mod client;
pub mod server;

use bytes::{Buf, BufMut, BytesMut};

use super::wire;

/// How replies look after the negotiation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ReplyMode {
    /// One header, then the data, whole or not at all.
    #[default]
    Simple,
    /// Chunks with 32-bit lengths: holes, errors with a text, block status.
    Structured,
    /// Chunks with 64-bit lengths, for 64-bit requests.
    Extended,
}

impl ReplyMode {
    /// Whether replies come in chunks, so that holes and block status can be expressed.
    pub const fn has_chunks(self) -> bool {
        !matches!(self, Self::Simple)
    }
}

/// A string as the protocol allows it: UTF-8, no NUL, at most 4096 bytes ("Conventions").
fn checked_string(bytes: &[u8]) -> Option<&str> {
    if bytes.len() > wire::MAX_STRING || bytes.contains(&0) {
        return None;
    }
    std::str::from_utf8(bytes).ok()
}

/// Takes a string with its 32-bit length from the front of `data`.
fn take_string<'a>(data: &mut &'a [u8]) -> Option<&'a str> {
    let length = crate::units::to_usize(u64::from(data.try_get_u32().ok()?));
    let bytes = data.split_off(..length)?;
    checked_string(bytes)
}

/// Appends a string with its 32-bit length. Strings here are at most [`wire::MAX_STRING`] long.
fn put_string(output: &mut BytesMut, text: &str) {
    output.put_u32(length_u32(text.len()));
    output.put_slice(text.as_bytes());
}

/// A length that is known to be small, for the wire.
fn length_u32(length: usize) -> u32 {
    u32::try_from(length).expect("lengths of strings and options are bounded far below 4 GiB")
}
