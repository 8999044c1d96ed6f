//! Fails operations as a plan says.

use std::io::IoSlice;
use std::sync::{Mutex, PoisonError};

use bytes::{Bytes, BytesMut};

use crate::error::{Error, Result};
use crate::export::{
    Check, Client, Context, Export, Facts, FileRange, LocalFuture, Piece, SharedExport, TryRead, TryWrite,
};
use crate::nbd::Extent;
use crate::nbd::request::{Durability, ZeroMode};
use crate::ranges::ByteRange;

type Plan = Box<dyn FnMut(ByteRange) -> Option<Error> + Send>;

/// An export that fails what its plan wants to fail. Flushes are planned as the empty range at 0.
pub struct Fault {
    below: SharedExport,
    plan: Mutex<Plan>,
}

impl std::fmt::Debug for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fault").field("below", &self.below).finish_non_exhaustive()
    }
}

impl Fault {
    /// Asks `plan` before each operation on `below` which error it shall have, if any.
    pub fn new(below: SharedExport, plan: impl FnMut(ByteRange) -> Option<Error> + Send + 'static) -> Self {
        Self { below, plan: Mutex::new(Box::new(plan)) }
    }

    fn check<'a, T: 'a>(
        &self,
        range: ByteRange,
        go_on: impl FnOnce() -> LocalFuture<'a, Result<T>>,
    ) -> LocalFuture<'a, Result<T>> {
        let failure = (self.plan.lock().unwrap_or_else(PoisonError::into_inner))(range);
        match failure {
            Some(error) => Box::pin(std::future::ready(Err(error))),
            None => go_on(),
        }
    }
}

#[deny(clippy::missing_trait_methods)]
impl Export for Fault {
    fn facts(&self) -> Facts {
        self.below.facts()
    }

    fn try_read(&self, _: ByteRange, _: &mut BytesMut) -> TryRead {
        TryRead::Wait
    }

    fn file_id(&self) -> Option<[u64; 2]> {
        self.below.file_id()
    }

    fn in_file(&self, _: ByteRange) -> Option<FileRange> {
        None
    }

    fn is_in_file(&self, _: ByteRange) -> bool {
        false
    }

    fn read(&self, range: ByteRange) -> LocalFuture<'_, Result<Vec<Piece>>> {
        self.check(range, || self.below.read(range))
    }

    fn read_verified<'a>(&'a self, range: ByteRange, check: &'a Check<'a>) -> LocalFuture<'a, Result<Vec<Piece>>> {
        self.check(range, || self.below.read_verified(range, check))
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

    fn try_write(&self, _: u64, _: &[IoSlice<'_>]) -> TryWrite {
        TryWrite::Wait
    }

    fn write(&self, offset: u64, data: Bytes, durability: Durability) -> LocalFuture<'_, Result<()>> {
        let range = ByteRange::between(offset, offset + crate::units::to_u64(data.len()));
        self.check(range, || self.below.write(offset, data, durability))
    }

    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode, durability: Durability) -> LocalFuture<'_, Result<()>> {
        self.check(range, || self.below.write_zeroes(range, mode, durability))
    }

    fn trim(&self, range: ByteRange, durability: Durability) -> LocalFuture<'_, Result<()>> {
        self.check(range, || self.below.trim(range, durability))
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        self.check(ByteRange::between(0, 0), || self.below.flush())
    }

    fn cache(&self, range: ByteRange) -> LocalFuture<'_, Result<()>> {
        self.check(range, || self.below.cache(range))
    }

    fn extents(&self, range: ByteRange, context: Context, limit: usize) -> LocalFuture<'_, Result<Vec<Extent>>> {
        self.check(range, || self.below.extents(range, context, limit))
    }
}
