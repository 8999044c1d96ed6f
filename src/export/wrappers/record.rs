//! Remembers what was asked of an export.

use std::io::IoSlice;
use std::sync::{Mutex, PoisonError};

use bytes::{Bytes, BytesMut};

use crate::error::Result;
use crate::export::{
    Check, Client, Context, Export, Facts, FileRange, LocalFuture, Piece, SharedExport, TryRead, TryWrite,
};
use crate::nbd::Extent;
use crate::nbd::request::{Durability, ZeroMode};
use crate::ranges::ByteRange;

/// A call that reached the export below.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recorded {
    /// A read, inline or not.
    Read(ByteRange),
    /// A write, of data or of zeroes, or a trim.
    Write(ByteRange),
    /// A flush.
    Flush,
    /// A prefetch hint.
    Cache(ByteRange),
    /// A question for extents.
    Extents(ByteRange),
}

/// An export that remembers all calls.
#[derive(Debug)]
pub struct Record {
    below: SharedExport,
    calls: Mutex<Vec<Recorded>>,
}

impl Record {
    /// Records what reaches `below`.
    pub const fn new(below: SharedExport) -> Self {
        Self { below, calls: Mutex::new(Vec::new()) }
    }

    /// All calls so far, which are forgotten.
    pub fn take(&self) -> Vec<Recorded> {
        std::mem::take(&mut *self.calls.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The ranges of all reads so far, which are forgotten with all other calls.
    pub fn take_reads(&self) -> Vec<ByteRange> {
        let reads = |call| if let Recorded::Read(range) = call { Some(range) } else { None };
        self.take().into_iter().filter_map(reads).collect()
    }

    fn note(&self, call: Recorded) {
        self.calls.lock().unwrap_or_else(PoisonError::into_inner).push(call);
    }
}

#[deny(clippy::missing_trait_methods)]
impl Export for Record {
    fn facts(&self) -> Facts {
        self.below.facts()
    }

    fn try_read(&self, range: ByteRange, output: &mut BytesMut) -> TryRead {
        let result = self.below.try_read(range, output);
        if result != TryRead::Wait {
            self.note(Recorded::Read(range));
        }
        result
    }

    fn file_id(&self) -> Option<[u64; 2]> {
        self.below.file_id()
    }

    fn in_file(&self, range: ByteRange) -> Option<FileRange> {
        let place = self.below.in_file(range);
        if place.is_some() {
            self.note(Recorded::Read(range));
        }
        place
    }

    fn is_in_file(&self, range: ByteRange) -> bool {
        self.below.is_in_file(range)
    }

    fn read(&self, range: ByteRange) -> LocalFuture<'_, Result<Vec<Piece>>> {
        self.note(Recorded::Read(range));
        self.below.read(range)
    }

    fn read_verified<'a>(&'a self, range: ByteRange, check: &'a Check<'a>) -> LocalFuture<'a, Result<Vec<Piece>>> {
        self.note(Recorded::Read(range));
        self.below.read_verified(range, check)
    }

    fn manifest(&self) -> Option<SharedExport> {
        self.below.manifest()
    }

    fn profile(&self) -> Option<SharedExport> {
        self.below.profile()
    }

    fn profile_inbox(&self) -> Option<SharedExport> {
        self.below.profile_inbox()
    }

    /// One for all connections: what is below would go around this.
    fn connect(&self, _: Client) -> Option<SharedExport> {
        None
    }

    fn try_write(&self, offset: u64, parts: &[IoSlice<'_>]) -> TryWrite {
        let result = self.below.try_write(offset, parts);
        if result == TryWrite::Done {
            let length: usize = parts.iter().map(|part| part.len()).sum();
            self.note(Recorded::Write(ByteRange::between(offset, offset + crate::units::to_u64(length))));
        }
        result
    }

    fn write(&self, offset: u64, data: Bytes, durability: Durability) -> LocalFuture<'_, Result<()>> {
        let end = offset + crate::units::to_u64(data.len());
        self.note(Recorded::Write(ByteRange::between(offset, end)));
        self.below.write(offset, data, durability)
    }

    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode, durability: Durability) -> LocalFuture<'_, Result<()>> {
        self.note(Recorded::Write(range));
        self.below.write_zeroes(range, mode, durability)
    }

    fn trim(&self, range: ByteRange, durability: Durability) -> LocalFuture<'_, Result<()>> {
        self.note(Recorded::Write(range));
        self.below.trim(range, durability)
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        self.note(Recorded::Flush);
        self.below.flush()
    }

    fn cache(&self, range: ByteRange) -> LocalFuture<'_, Result<()>> {
        self.note(Recorded::Cache(range));
        self.below.cache(range)
    }

    fn extents(&self, range: ByteRange, context: Context, limit: usize) -> LocalFuture<'_, Result<Vec<Extent>>> {
        self.note(Recorded::Extents(range));
        self.below.extents(range, context, limit)
    }
}
