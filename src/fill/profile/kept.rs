//! An export whose profiles are kept.
//!
//! Connections go around it: it only adds names beside the export.

use std::io::IoSlice;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};

use super::Store;
use crate::error::Result;
use crate::export::{
    Check, Client, Context, Export, Facts, FileRange, LocalFuture, Piece, SharedExport, TryRead, TryWrite,
};
use crate::nbd::Extent;
use crate::nbd::request::{Durability, ZeroMode};
use crate::ranges::ByteRange;

/// An export with the profiles of its image: `NAME@profile` and `NAME@profile-inbox`.
#[derive(Debug)]
pub struct Kept {
    lower: SharedExport,
    store: Arc<Store>,
}

impl Kept {
    /// `lower` with the profiles in `store`, which are those of its image.
    pub const fn new(lower: SharedExport, store: Arc<Store>) -> Self {
        Self { lower, store }
    }

    /// The profiles of the image as it is now: an identity may become known, or be taken back.
    fn store(&self) -> &Arc<Store> {
        self.store.identify(self.lower.facts().identity);
        &self.store
    }
}

#[deny(clippy::missing_trait_methods)]
impl Export for Kept {
    fn facts(&self) -> Facts {
        self.lower.facts()
    }

    fn try_read(&self, range: ByteRange, output: &mut BytesMut) -> TryRead {
        self.lower.try_read(range, output)
    }

    fn in_file(&self, range: ByteRange) -> Option<FileRange> {
        self.lower.in_file(range)
    }

    fn file_id(&self) -> Option<[u64; 2]> {
        self.lower.file_id()
    }

    fn is_in_file(&self, range: ByteRange) -> bool {
        self.lower.is_in_file(range)
    }

    fn read(&self, range: ByteRange) -> LocalFuture<'_, Result<Vec<Piece>>> {
        self.lower.read(range)
    }

    fn read_verified<'a>(&'a self, range: ByteRange, check: &'a Check<'a>) -> LocalFuture<'a, Result<Vec<Piece>>> {
        self.lower.read_verified(range, check)
    }

    fn manifest(&self) -> Option<SharedExport> {
        self.lower.manifest()
    }

    fn profile(&self) -> Option<SharedExport> {
        self.store().export()
    }

    fn profile_inbox(&self) -> Option<SharedExport> {
        Some(self.store().inbox())
    }

    /// The export below itself: reads need not come through here.
    fn connect(&self, client: Client) -> Option<SharedExport> {
        Some(self.lower.connect(client).unwrap_or_else(|| Arc::clone(&self.lower)))
    }

    fn try_write(&self, offset: u64, parts: &[IoSlice<'_>]) -> TryWrite {
        self.lower.try_write(offset, parts)
    }

    fn write(&self, offset: u64, data: Bytes, durability: Durability) -> LocalFuture<'_, Result<()>> {
        self.lower.write(offset, data, durability)
    }

    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode, durability: Durability) -> LocalFuture<'_, Result<()>> {
        self.lower.write_zeroes(range, mode, durability)
    }

    fn trim(&self, range: ByteRange, durability: Durability) -> LocalFuture<'_, Result<()>> {
        self.lower.trim(range, durability)
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        self.lower.flush()
    }

    fn cache(&self, range: ByteRange) -> LocalFuture<'_, Result<()>> {
        self.lower.cache(range)
    }

    fn extents(&self, range: ByteRange, context: Context, limit: usize) -> LocalFuture<'_, Result<Vec<Extent>>> {
        self.lower.extents(range, context, limit)
    }
}

#[cfg(test)]
mod tests {
    use super::super::form::tests::{run, tag};
    use super::*;
    use crate::export::conformance;
    use crate::export::memory::Memory;

    #[tokio::test]
    async fn it_conforms_and_has_what_the_store_has() {
        let contents = conformance::sample_contents(100_001, 3);
        let store = Arc::new(Store::open(None, 100_001, None));
        let kept = Kept::new(Arc::new(Memory::holding(contents.clone())), Arc::clone(&store));
        conformance::check(&kept, contents).await;
        assert!(kept.profile().is_none() && kept.profile_inbox().is_some());
        store.merge(&tag("boot"), &run(0, 20)).unwrap();
        assert!(kept.profile().is_some());
        let changed =
            Memory::zeroed(100_001).with_facts(|facts| facts.identity = Some(crate::export::ImageId([1; 32])));
        let kept = Kept::new(Arc::new(changed), Arc::clone(&store));
        assert!(kept.profile().is_some());
        assert!(store.profiles().identity().is_some());
    }
}
