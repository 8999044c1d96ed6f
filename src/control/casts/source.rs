//! What is to be sent of an image: whether it has a manifest, and whether all of it is here.

use crate::control::Refusal;
use crate::error::Error;
use crate::export::{Context, Residency, SharedExport};
use crate::multicast::terms::Zeroes;
use crate::ranges::ByteRange;
use crate::units::ByteSize;

/// Extents that are asked for at once.
const EXTENTS: usize = 4096;

/// How the manifest of an export cuts it, and which chunks it says are zero. Call on a worker.
pub(super) async fn read(name: &str, export: &SharedExport) -> Result<Zeroes, Refusal> {
    let none = || {
        let why = "has no manifest, so nobody could check what comes: make one with headwater index, and serve it --read-only";
        Refusal::Conflict(format!("{name:?} {why}"))
    };
    let identity = export.facts().identity.filter(|_| export.manifest().is_some()).ok_or_else(none)?;
    let failed = |error: Error| Refusal::Failed(format!("the manifest of {name:?} cannot be read: {error}"));
    let zeroes = Zeroes::of(&**export).await.map_err(failed)?;
    // It may have been made anew a moment ago.
    if zeroes.image == identity { Ok(zeroes) } else { Err(none()) }
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
        let refusal = read("a", &export).await.unwrap_err();
        assert!(matches!(&refusal, Refusal::Conflict(why) if why.contains("headwater index")), "{refusal}");
        assert_eq!(refuse_gaps("a", &export, &[ByteRange::between(0, 8192)]).await, Ok(()), "a real image has no gaps");
    }
}
