//! Files, without ever blocking a worker.
//!
//! | file | holds |
//! | --- | --- |
//! | `op` | one operation and all memory that it needs |
//! | `ring` | io_uring: the table of operations, one submit per batch, completions |
//! | `engine` | which way the current thread does its operations: its ring, or a pool of blocking threads |
//! | `inline_writes` | when a worker may write to the page cache by itself |
//! | `file` | [`File`]: read, write, sync, punch, zero, extents; inline reads of what is in the page cache |
//!
//! Owns: every system call on image and cache files, and all `unsafe` code of the crate but that of `net/socket.rs`. Does not own: what is in
//! the files.
//!
//! **Ownership rule.** Memory that the kernel may touch belongs to the operation's entry in the ring's table until
//! the operation's last completion, also when the future that waits for it has been dropped.
//!
//! **Cancellation rule.** Dropping a future never cancels the operation: a write that was started is done, and
//! its result is forgotten.
#![expect(unsafe_code, reason = "system calls on raw buffers; each block names the invariants that it relies on")]

mod engine;
mod file;
mod inline_writes;
mod op;
mod ring;

pub use engine::{Attached, Preference, attach};
pub use file::{Access, File, Inline, Kind, Span};

#[cfg(test)]
mod tests;
