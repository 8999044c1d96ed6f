//! An image in memory, for tests and tools. It knows holes to the byte.

use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::{Bytes, BytesMut};

use super::{Context, Export, Facts, LocalFuture, Piece, TryRead, push_extent, push_piece};
use crate::error::{Error, ErrorKind, Result};
use crate::nbd::Extent;
use crate::nbd::request::{Durability, ZeroMode};
use crate::nbd::wire::Allocation;
use crate::ranges::ByteRange;
use crate::units::{to_u64, to_usize};

/// An image in memory. All operations are done when their call returns.
#[derive(Debug)]
pub struct Memory {
    facts: Facts,
    image: Mutex<Image>,
}

#[derive(Debug)]
struct Image {
    bytes: Vec<u8>,
    /// Runs of allocated and unallocated bytes, as the byte at which each begins and whether it is allocated; sorted,
    /// the first at 0.
    runs: Vec<(u64, bool)>,
}

impl Memory {
    /// A writable image without any storage.
    pub fn zeroed(size: u64) -> Self {
        Self::from_image(Image { bytes: vec![0; to_usize(size)], runs: vec![(0, false)] })
    }

    /// A writable image with these contents, all of it allocated.
    pub fn holding(bytes: impl Into<Vec<u8>>) -> Self {
        Self::from_image(Image { bytes: bytes.into(), runs: vec![(0, true)] })
    }

    fn from_image(image: Image) -> Self {
        let facts = Facts {
            writable: true,
            can_trim: true,
            can_zero_fast: true,
            ..Facts::read_only(to_u64(image.bytes.len()), "memory")
        };
        Self { facts, image: Mutex::new(image) }
    }

    /// The same image, read-only.
    #[must_use]
    pub fn read_only(mut self) -> Self {
        self.facts = Facts::read_only(self.facts.size, "memory");
        self
    }

    /// The same image with other facts. The size must stay.
    #[must_use]
    pub fn with_facts(mut self, change: impl FnOnce(&mut Facts)) -> Self {
        change(&mut self.facts);
        assert_eq!(self.facts.size, to_u64(self.image().bytes.len()), "the size of an export is fixed");
        self
    }

    /// A copy of all bytes.
    pub fn contents(&self) -> Vec<u8> {
        self.image().bytes.clone()
    }

    /// Never held across an await.
    fn image(&self) -> MutexGuard<'_, Image> {
        self.image.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Image {
    fn slice(&mut self, range: ByteRange) -> &mut [u8] {
        &mut self.bytes[to_usize(range.start())..to_usize(range.end())]
    }

    /// The runs within `range`.
    fn runs_in(&self, range: ByteRange) -> impl Iterator<Item = (ByteRange, bool)> + '_ {
        self.runs.iter().enumerate().filter_map(move |(index, (start, allocated))| {
            let end = self.runs.get(index + 1).map_or_else(|| to_u64(self.bytes.len()), |(next, _)| *next);
            let run = ByteRange::between(*start, end).intersect(range);
            (!run.is_empty()).then_some((run, *allocated))
        })
    }

    fn mark(&mut self, range: ByteRange, allocated: bool) {
        let size = to_u64(self.bytes.len());
        let before: Vec<_> = self.runs_in(ByteRange::between(0, range.start())).collect();
        let after: Vec<_> = self.runs_in(ByteRange::between(range.end(), size)).collect();
        self.runs.clear();
        for (run, allocated) in before.into_iter().chain([(range, allocated)]).chain(after) {
            if !run.is_empty() && self.runs.last().is_none_or(|(_, last)| *last != allocated) {
                self.runs.push((run.start(), allocated));
            }
        }
    }
}

fn done<'a, T: 'a>(value: T) -> LocalFuture<'a, Result<T>> {
    Box::pin(std::future::ready(Ok(value)))
}

impl Export for Memory {
    fn facts(&self) -> Facts {
        self.facts.clone()
    }

    fn try_read(&self, range: ByteRange, output: &mut BytesMut) -> TryRead {
        let mut image = self.image();
        let mut runs = image.runs_in(range);
        match (runs.next(), runs.next()) {
            (Some((_, true)), None) => {
                drop(runs);
                output.extend_from_slice(image.slice(range));
                TryRead::Data
            }
            (Some((_, false)), None) => TryRead::Hole,
            _ => TryRead::Wait,
        }
    }

    fn read(&self, range: ByteRange) -> LocalFuture<'_, Result<Vec<Piece>>> {
        let mut image = self.image();
        let runs: Vec<_> = image.runs_in(range).collect();
        let mut pieces = Vec::new();
        for (run, allocated) in runs {
            let piece = if allocated {
                Piece::Data(Bytes::copy_from_slice(image.slice(run)))
            } else {
                Piece::Hole(run.length())
            };
            push_piece(&mut pieces, piece);
        }
        done(pieces)
    }

    fn write(&self, offset: u64, data: Bytes, _: Durability) -> LocalFuture<'_, Result<()>> {
        if !self.facts.writable {
            return super::refuse_writes();
        }
        let range = ByteRange::between(offset, offset + to_u64(data.len()));
        let mut image = self.image();
        image.slice(range).copy_from_slice(&data);
        image.mark(range, true);
        done(())
    }

    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode, _: Durability) -> LocalFuture<'_, Result<()>> {
        if !self.facts.writable {
            return super::refuse_writes();
        }
        let mut image = self.image();
        image.slice(range).fill(0);
        image.mark(range, !mode.may_punch);
        done(())
    }

    fn trim(&self, range: ByteRange, durability: Durability) -> LocalFuture<'_, Result<()>> {
        self.write_zeroes(range, ZeroMode { may_punch: true, must_be_fast: false }, durability)
    }

    fn extents(&self, range: ByteRange, context: Context, limit: usize) -> LocalFuture<'_, Result<Vec<Extent>>> {
        if context != Context::Allocation {
            let error = Error::new(ErrorKind::Invalid, "memory has no such context");
            return Box::pin(std::future::ready(Err(error)));
        }
        let mut extents = Vec::new();
        for (run, allocated) in self.image().runs_in(range).take(limit) {
            let state = if allocated { Allocation::empty() } else { Allocation::all() };
            push_extent(&mut extents, run.length(), u64::from(state.bits()));
        }
        done(extents)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::conformance;

    #[tokio::test]
    async fn memory_conforms() {
        conformance::check(&Memory::zeroed(300_000), vec![0; 300_000]).await;
        let contents = conformance::sample_contents(123_457, 1);
        conformance::check(&Memory::holding(contents.clone()), contents.clone()).await;
        conformance::check(&Memory::holding(contents.clone()).read_only(), contents).await;
    }
}
