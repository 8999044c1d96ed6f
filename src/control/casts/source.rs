//! What is to be sent of an image: how its manifest cuts it, which chunks are zero, and whether all of it is here.

use crate::control::Refusal;
use crate::error::Error;
use crate::export::{Context, Residency, SharedExport, assemble};
use crate::manifest::{BLOCK, Digest, Header, ImageId, Shape};
use crate::ranges::ByteRange;
use crate::units::{ByteSize, MIB, to_u64, to_usize};

/// Extents that are asked for at once.
const EXTENTS: usize = 4096;

/// An image, as its manifest has it.
#[derive(Debug)]
pub(super) struct Source {
    /// What it holds.
    pub(super) identity: ImageId,
    /// How it is cut.
    pub(super) shape: Shape,
    /// A bit for each chunk: whether all of it is zero.
    zeros: Vec<u64>,
}

impl Source {
    /// Reads the manifest of an export. Call on a worker.
    pub(super) async fn of(name: &str, export: &SharedExport) -> Result<Self, Refusal> {
        let none = || {
            let why = "has no manifest, so nobody could check what comes: make one with headwater index, and serve it --read-only";
            Refusal::Conflict(format!("{name:?} {why}"))
        };
        let (Some(identity), Some(manifest)) = (export.facts().identity, export.manifest()) else { return Err(none()) };
        let failed = |error: Error| Refusal::Failed(format!("the manifest of {name:?} cannot be read: {error}"));
        let size = manifest.facts().size;
        let head = assemble(&manifest.read(ByteRange::between(0, size.min(to_u64(BLOCK)))).await.map_err(failed)?);
        let header = Header::decode(&head).ok();
        let is_whole = |header: &Header| header.id == identity && header.shape.manifest_length() == size;
        let shape = header.filter(is_whole).ok_or_else(none)?.shape;
        let mut zeros = vec![0; to_usize(shape.count().div_ceil(64))];
        let mut number = 0;
        for window in ByteRange::between(to_u64(BLOCK), size).pieces(MIB) {
            let digests = assemble(&manifest.read(window).await.map_err(failed)?);
            for digest in Digest::split(&digests) {
                zeros[number / 64] |= u64::from(digest.is_zero()) << (number % 64);
                number += 1;
            }
        }
        Ok(Self { identity, shape, zeros })
    }

    /// Whether the manifest says that all of a chunk is zero.
    pub(super) fn is_zero(&self, chunk: u64) -> bool {
        let word = usize::try_from(chunk / 64).ok().and_then(|word| self.zeros.get(word));
        word.is_some_and(|word| word >> (chunk % 64) & 1 != 0)
    }
}

/// Refuses a mirror that does not have all of `ranges`: what it lacks would come from its upstream, as slowly as that is.
pub(super) async fn refuse_gaps(name: &str, export: &SharedExport, ranges: &[ByteRange]) -> Result<(), Refusal> {
    if !export.facts().contexts.contains(&Context::Residency) {
        return Ok(());
    }
    let here = Residency::RESIDENT | Residency::ZERO;
    let mut missing = 0;
    for range in ranges {
        let mut at = range.start();
        while at < range.end() {
            let rest = ByteRange::between(at, range.end());
            let extents = export.extents(rest, Context::Residency, EXTENTS).await;
            for extent in extents.map_err(|error| Refusal::Failed(error.to_string()))? {
                let status = Residency::from_bits_truncate(u32::try_from(extent.status).unwrap_or(0));
                missing += if status.intersects(here) { 0 } else { extent.length };
                at += extent.length;
            }
        }
    }
    if missing == 0 {
        return Ok(());
    }
    let missing = ByteSize(missing);
    Err(Refusal::Conflict(format!(
        "{missing} of {name:?} are not here yet: fetch them first (headwater prefetch), or cast from the server that has the image"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::memory::Memory;
    use std::sync::Arc;

    #[tokio::test]
    async fn an_image_without_a_manifest_is_refused_with_what_to_do() {
        let export: SharedExport = Arc::new(Memory::holding(vec![1; 8192]).read_only());
        let refusal = Source::of("a", &export).await.unwrap_err();
        assert!(matches!(&refusal, Refusal::Conflict(why) if why.contains("headwater index")), "{refusal}");
        assert_eq!(refuse_gaps("a", &export, &[ByteRange::between(0, 8192)]).await, Ok(()), "a real image has no gaps");
    }

    #[test]
    fn zeros_are_bits_by_number() {
        let mut zeros = vec![0; 2];
        zeros[1] = 0b10;
        let shape = Shape { image_size: 100 * 4096, chunk_size: 4096 };
        let source = Source { identity: ImageId([0; 32]), shape, zeros };
        let found: Vec<_> = (0..1000).filter(|chunk| source.is_zero(*chunk)).collect();
        assert_eq!(found, [65]);
    }
}
