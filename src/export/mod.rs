//! What every tier of the stack is: an [`Export`].
//!
//! | file | holds |
//! | --- | --- |
//! | this one | the trait and its contract |
//! | [`facts`] | what an export says of itself: size, capabilities, identity, contexts |
//! | [`file`](mod@file) | a file as an export, for side exports |
//! | [`registry`] | the exports of one server, by name |
//! | [`memory`] | an image in memory, for tests and tools |
//! | [`wrappers`] | exports over an export: record, gate, fault |
//! | [`conformance`] | the suite that every implementation passes |
//!
//! Owns: the contract between tiers. Does not own: any bytes, except those of [`memory`].

pub mod access;
pub mod conformance;
pub mod facts;
pub mod file;
pub mod memory;
pub mod registry;
pub mod wrappers;

use std::fmt;
use std::io::IoSlice;
use std::pin::Pin;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};

pub use access::{Access, Origin, TlsPeer, Visitor};
pub use facts::{Context, Facts, ImageId, NodeId, Residency};
pub use file::FileExport;
pub use registry::{DuplicateName, Registry, image_name, split_content_name};

use crate::disk::File;
use crate::error::{Error, ErrorKind, Result};
use crate::nbd::Extent;
use crate::nbd::request::{Durability, ZeroMode};
use crate::ranges::ByteRange;

/// A future that stays on its worker.
pub type LocalFuture<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// An export that many share.
pub type SharedExport = Arc<dyn Export>;

/// A part of what a read brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Piece {
    /// Bytes; not empty.
    Data(Bytes),
    /// So many zeroes, which are not carried as bytes; not none.
    Hole(u64),
}

impl Piece {
    /// The number of bytes of the image that this stands for.
    pub fn length(&self) -> u64 {
        match self {
            Self::Data(bytes) => crate::units::to_u64(bytes.len()),
            Self::Hole(length) => *length,
        }
    }
}

/// A stretch of a file that holds a part of an export.
#[derive(Debug, Clone)]
pub struct FileRange {
    /// The file.
    pub file: Arc<File>,
    /// Where in the file, which is where in the export; never empty.
    pub range: ByteRange,
    /// Whoever keeps this keeps the file's owner from changing those bytes.
    pub hold: Option<Hold>,
}

/// Keeps something from being taken away; what it is depends on who gave it.
pub type Hold = Arc<dyn fmt::Debug + Send + Sync>;

/// Says whether pieces are the bytes that they should be.
pub type Check<'a> = dyn Fn(&[Piece]) -> bool + 'a;

/// Who has connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Client {
    /// Whether it is a mirror, as it says.
    pub is_mirror: bool,
}

/// How [`Export::try_read`] ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TryRead {
    /// All bytes of the range were appended.
    Data,
    /// The whole range reads as zeroes; nothing was appended.
    Hole,
    /// It would have to wait, or the range is mixed; nothing was appended. Use [`Export::read`].
    Wait,
}

/// How [`Export::try_write`] ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TryWrite {
    /// All bytes have been written.
    Done,
    /// It would have to wait, or has failed; some bytes may have been written. Use [`Export::write`] for all of them.
    Wait,
}

/// One tier: a fixed-size sequence of bytes that can be read and perhaps written.
///
/// # Contract
///
/// *Who implements it*: real images, mirrors, remote exports, and wrappers over any of them. *Who calls it*: the
/// server for its clients, and the tier above.
///
/// - Callers stay within [`Facts::size`] and call only what [`Facts`] says the export can do; implementations may
///   panic on a range outside, and answer other calls with an error.
/// - Ranges need no alignment and may be empty.
/// - Reads give exactly the bytes of the range, or an error; never zeroes in place of bytes that cannot be had.
/// - An operation that was answered is seen by every later one, on any worker. Operations in flight at the same
///   time on the same bytes may take effect in any order, byte by byte.
/// - After [`Export::flush`] everything that was answered before it was called is on stable storage, whoever wrote
///   it.
/// - Futures belong to the worker that made them. Dropping one gives up the answer; it does not undo or tear the
///   operation, and fails nobody else who waits for the same bytes.
/// - Calls may come from any worker at once. No call blocks its thread.
///
/// Wrappers forward every method and carry `#[deny(clippy::missing_trait_methods)]`, so that a new method cannot
/// fall back to its default behind them.
pub trait Export: fmt::Debug + Send + Sync {
    /// What this export is and can do. The size and the capabilities never change; the rest may.
    fn facts(&self) -> Facts;

    /// Reads `range` if that needs no waiting, appending to `output`. This is the hot path: no allocation, no
    /// lock that is held across I/O.
    fn try_read(&self, range: ByteRange, output: &mut BytesMut) -> TryRead {
        let _ = (range, output);
        TryRead::Wait
    }

    /// Where `range`, which is not empty, lies in a file and can be sent from without waiting: its bytes are in memory
    /// now. `None`: read it.
    ///
    /// A socket takes such bytes when its peer does, which may be long after they were given to it. An export whose file
    /// changes otherwise than by its clients' own writes must see to it that these bytes stay right until then: as long
    /// as its hold lives, and as long as the kernel has references to the pages.
    fn in_file(&self, range: ByteRange) -> Option<FileRange> {
        let _ = range;
        None
    }

    /// Whether [`Self::in_file`] would say where `range` lies. Nobody reads it yet, so it counts as no read.
    fn is_in_file(&self, range: ByteRange) -> bool {
        let _ = range;
        false
    }

    /// The file that all of its bytes are in, as device and inode, if there is one. Where there is no identity, this says
    /// whether two openings of an image have the same bytes.
    fn file_id(&self) -> Option<[u64; 2]> {
        None
    }

    /// Reads `range`: pieces in order that add up to it.
    fn read(&self, range: ByteRange) -> LocalFuture<'_, Result<Vec<Piece>>>;

    /// Reads `range` like [`Self::read`], and gives only what passes `check`. An export that has several sources asks
    /// the next one when the bytes of one are wrong; when none is left it fails.
    fn read_verified<'a>(&'a self, range: ByteRange, check: &'a Check<'a>) -> LocalFuture<'a, Result<Vec<Piece>>> {
        Box::pin(async move {
            let pieces = self.read(range).await?;
            if check(&pieces) { Ok(pieces) } else { Err(wrong_bytes(range)) }
        })
    }

    /// The manifest of the image that [`Facts::identity`] names, as an export of its own: the bytes of
    /// [`manifest`](crate::manifest) without a source. `None` if there is none.
    fn manifest(&self) -> Option<SharedExport> {
        None
    }

    /// What clients read of this image in earlier runs, as an export of its own. `None` if nothing is known.
    fn profile(&self) -> Option<SharedExport> {
        None
    }

    /// An export of one connection to which a mirror below writes what its clients have read, and flushes. `None`: that
    /// is not taken.
    fn profile_inbox(&self) -> Option<SharedExport> {
        None
    }

    /// This export for one connection, if it makes a difference between them; its facts are the same.
    fn connect(&self, client: Client) -> Option<SharedExport> {
        let _ = client;
        None
    }

    /// Replaces the bytes from `offset` on by `parts`, one behind the other, if that needs no waiting. Like
    /// [`Self::write`] without durability.
    fn try_write(&self, offset: u64, parts: &[IoSlice<'_>]) -> TryWrite {
        let _ = (offset, parts);
        TryWrite::Wait
    }

    /// Replaces the bytes from `offset` on by `data`.
    fn write(&self, offset: u64, data: Bytes, durability: Durability) -> LocalFuture<'_, Result<()>> {
        let _ = (offset, data, durability);
        refuse_writes()
    }

    /// Makes `range` read as zeroes.
    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode, durability: Durability) -> LocalFuture<'_, Result<()>> {
        let _ = (range, mode, durability);
        refuse_writes()
    }

    /// Tells that the bytes of `range` are not needed any more; they may read as anything afterwards.
    fn trim(&self, range: ByteRange, durability: Durability) -> LocalFuture<'_, Result<()>> {
        let _ = (range, durability);
        refuse_writes()
    }

    /// Makes all writes that were answered durable.
    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// Brings `range` near, so that reading it later is fast.
    fn cache(&self, range: ByteRange) -> LocalFuture<'_, Result<()>> {
        let _ = range;
        Box::pin(std::future::ready(Ok(())))
    }

    /// The status of `range` in one of the contexts of [`Facts`]: at least one and at most `limit` extents from
    /// its start on, which need not reach its end and never go beyond it. `range` and `limit` are not empty.
    fn extents(&self, range: ByteRange, context: Context, limit: usize) -> LocalFuture<'_, Result<Vec<Extent>>> {
        let _ = (context, limit);
        Box::pin(std::future::ready(Ok(vec![Extent { length: range.length(), status: 0 }])))
    }
}

/// The bytes that pieces stand for.
pub fn assemble(pieces: &[Piece]) -> Vec<u8> {
    let mut bytes = Vec::new();
    append(pieces, &mut bytes);
    bytes
}

/// Appends the bytes that pieces stand for.
pub fn append(pieces: &[Piece], bytes: &mut Vec<u8>) {
    for piece in pieces {
        match piece {
            Piece::Data(data) => bytes.extend_from_slice(data),
            Piece::Hole(length) => bytes.resize(bytes.len() + crate::units::to_usize(*length), 0),
        }
    }
}

/// What a read of wrong bytes ends with.
pub fn wrong_bytes(range: ByteRange) -> Error {
    let (length, start) = (range.length(), range.start());
    Error::new(ErrorKind::Io, format!("{length} bytes at {start} are not those of the image"))
}

fn refuse_writes<'a>() -> LocalFuture<'a, Result<()>> {
    Box::pin(std::future::ready(Err(Error::new(ErrorKind::Permission, "the export is read-only"))))
}

/// Appends an extent, joining it to the last one if the status is the same.
pub fn push_extent(extents: &mut Vec<Extent>, length: u64, status: u64) {
    match extents.last_mut() {
        _ if length == 0 => {}
        Some(last) if last.status == status => last.length += length,
        _ => extents.push(Extent { length, status }),
    }
}

/// Appends a piece, joining holes.
pub fn push_piece(pieces: &mut Vec<Piece>, piece: Piece) {
    match (pieces.last_mut(), piece) {
        (_, piece) if piece.length() == 0 => {}
        (Some(Piece::Hole(last)), Piece::Hole(length)) => *last += length,
        (_, piece) => pieces.push(piece),
    }
}
