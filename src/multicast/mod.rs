//! Sending an image to a group, and filling mirrors with what is heard.
//!
//! | file | holds |
//! | --- | --- |
//! | [`send`] | a session as its sender: reading, encoding, pacing, listening to reports |
//! | `pace` | when the next datagrams may leave |
//! | [`receive`] | a group as its hearers: finding the mirror, putting blocks together, handing them over |
//!
//! Sending and hearing have a thread of their own each: encoding and decoding take milliseconds, for which no client of a
//! worker is to wait. Workers read the image and store what has come.
//!
//! Owns: threads, sockets and pacing of sessions. Does not own: the protocol (`cast`), who ordered a session and what
//! becomes of what it did not bring (`control`).

mod pace;
pub mod receive;
pub mod send;
