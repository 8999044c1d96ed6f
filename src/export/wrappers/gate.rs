//! Holds reads back until the gate is opened, which is how a test makes "slow" exact.

use std::io::IoSlice;

use bytes::{Bytes, BytesMut};
use tokio::sync::Semaphore;

use crate::error::Result;
use crate::export::{
    Check, Client, Context, Export, Facts, FileRange, LocalFuture, Piece, SharedExport, TryRead, TryWrite,
};
use crate::nbd::Extent;
use crate::nbd::request::{Durability, ZeroMode};
use crate::ranges::ByteRange;

/// An export whose reads wait until they are let through. Everything else passes at once.
#[derive(Debug)]
pub struct Gate {
    below: SharedExport,
    passes: Semaphore,
    waiting: tokio::sync::watch::Sender<usize>,
}

impl Gate {
    /// A closed gate before `below`.
    pub fn new(below: SharedExport) -> Self {
        Self { below, passes: Semaphore::new(0), waiting: tokio::sync::watch::Sender::new(0) }
    }

    /// Lets `count` reads through, now or when they come.
    pub fn admit(&self, count: usize) {
        self.passes.add_permits(count);
    }

    /// Lets everything through from now on.
    pub fn open(&self) {
        self.passes.close();
    }

    async fn pass(&self) {
        self.waiting.send_modify(|arrived| *arrived += 1);
        if let Ok(pass) = self.passes.acquire().await {
            pass.forget();
        }
    }

    /// Waits until `count` reads have arrived at the gate since it was made.
    pub async fn arrived(&self, count: usize) {
        let mut waiting = self.waiting.subscribe();
        // It fails only when the sender is gone, and this is it.
        let _ = waiting.wait_for(|arrived| *arrived >= count).await;
    }
}

#[deny(clippy::missing_trait_methods)]
impl Export for Gate {
    fn facts(&self) -> Facts {
        self.below.facts()
    }

    fn try_read(&self, range: ByteRange, output: &mut BytesMut) -> TryRead {
        if self.passes.is_closed() { self.below.try_read(range, output) } else { TryRead::Wait }
    }

    fn file_id(&self) -> Option<[u64; 2]> {
        self.below.file_id()
    }

    fn in_file(&self, range: ByteRange) -> Option<FileRange> {
        if self.passes.is_closed() { self.below.in_file(range) } else { None }
    }

    fn is_in_file(&self, range: ByteRange) -> bool {
        self.passes.is_closed() && self.below.is_in_file(range)
    }

    fn read(&self, range: ByteRange) -> LocalFuture<'_, Result<Vec<Piece>>> {
        Box::pin(async move {
            self.pass().await;
            self.below.read(range).await
        })
    }

    fn read_verified<'a>(&'a self, range: ByteRange, check: &'a Check<'a>) -> LocalFuture<'a, Result<Vec<Piece>>> {
        Box::pin(async move {
            self.pass().await;
            self.below.read_verified(range, check).await
        })
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
        if self.passes.is_closed() { self.below.try_write(offset, parts) } else { TryWrite::Wait }
    }

    fn write(&self, offset: u64, data: Bytes, durability: Durability) -> LocalFuture<'_, Result<()>> {
        self.below.write(offset, data, durability)
    }

    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode, durability: Durability) -> LocalFuture<'_, Result<()>> {
        self.below.write_zeroes(range, mode, durability)
    }

    fn trim(&self, range: ByteRange, durability: Durability) -> LocalFuture<'_, Result<()>> {
        self.below.trim(range, durability)
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        self.below.flush()
    }

    fn cache(&self, range: ByteRange) -> LocalFuture<'_, Result<()>> {
        self.below.cache(range)
    }

    fn extents(&self, range: ByteRange, context: Context, limit: usize) -> LocalFuture<'_, Result<Vec<Extent>>> {
        self.below.extents(range, context, limit)
    }
}
