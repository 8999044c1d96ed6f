//! Noticing that the upstream's image has been replaced, or has got a manifest.
//!
//! Connections tell, when they are opened, that a server has another image. Old connections may live on for long, so the
//! servers are also asked once a minute.
//!
//! An image counts as replaced when every server answers and none has it any more. As long as one cannot be reached, it
//! may be the one that still has it.

use std::sync::Arc;
use std::time::Duration;

use super::open::fetch_manifest;
use super::{Generation, MirrorError, Mirrors};
use crate::export::{Facts, ImageId};
use crate::mirror::ManifestError;
use crate::upstream::{Expectation, Remote};
use crate::worker::Workers;

/// How often the servers are asked.
const EVERY: Duration = Duration::from_secs(60);
/// How often they are asked in a debug build: tests set it here, in seconds.
const EVERY_VARIABLE: &str = "HEADWATER_WATCH_SECONDS";
/// After a replacement failed.
const PAUSE: Duration = Duration::from_secs(10);

impl Mirrors {
    /// Watches the newest generation of an image, for ever.
    pub(super) async fn watch(self, name: String) {
        let every = period();
        // What was tried and will never do.
        let mut refused = None;
        while let Some(newest) = self.newest(&name) {
            let remote = Arc::clone(&newest.remote);
            let mut changed = remote.changed();
            if changed.borrow_and_update().is_empty() {
                // Either way it is looked at. The sender lives as long as the remote.
                let _ = tokio::time::timeout(every, changed.changed()).await;
            }
            let looks: Vec<_> = remote.inspect().await.into_iter().map(|(_, look)| look.ok()).collect();
            let size = newest.mirror.size();
            if let Some(facts) = replacement(&looks, size, newest.mirror.image()) {
                if let Err(error) = self.replace(&newest, facts).await {
                    tracing::error!(name, %error, "the upstream has another image now, and it cannot be mirrored");
                    tokio::time::sleep(PAUSE).await;
                }
            } else if !changed.borrow().is_empty() {
                tokio::time::sleep(PAUSE).await;
            } else if !newest.mirror.has_manifest() {
                let identity = sought(&looks, newest.mirror.image()).filter(|identity| refused != Some(*identity));
                if let Some(identity) = identity
                    && let Err(ManifestError::ChunkSize { .. }) = self.take_manifest(&newest, identity).await
                {
                    refused = Some(identity);
                }
            }
        }
    }

    /// Opens what the upstream has now beside what it had, for all who connect from now on.
    async fn replace(&self, old: &Arc<Generation>, facts: &Facts) -> Result<(), MirrorError> {
        let image = &old.image;
        let Some(workers) = self.0.workers.upgrade() else { return Ok(()) };
        let kept = facts.identity.and_then(|identity| self.of_identity(&image.name, identity));
        let new = match kept {
            Some(kept) => {
                // Its servers are asked again at once, though none had it.
                kept.remote.expect(facts.identity, kept.mirror.node());
                kept
            }
            None => self.open_replacement(old, facts, &workers).await?,
        };
        let (from, to) = (identity_text(old.mirror.image()), identity_text(facts.identity));
        tracing::warn!(
            name = image.name,
            from,
            to,
            "the upstream's image has been replaced: new clients get the new one; those that are connected keep the old one, as far as it is here"
        );
        self.0.registry.replace(&image.name, new.export());
        old.filled.image().retire(true);
        new.filled.image().retire(false);
        let mut generations = self.generations();
        generations.retain(|generation| !Arc::ptr_eq(generation, &new));
        generations.push(new);
        drop(generations);
        if let Some(identity) = old.mirror.image() {
            self.register_older(image, identity, old.export());
        }
        Ok(())
    }

    /// Opens what the upstream has now and never had before, as far as is known here.
    async fn open_replacement(
        &self,
        old: &Generation,
        facts: &Facts,
        workers: &Arc<Workers>,
    ) -> Result<Arc<Generation>, MirrorError> {
        let image = &old.image;
        let expectation =
            Expectation { size: Some(facts.size), identity: facts.identity, not_through: Some(old.mirror.node()) };
        // Also those that were told: one of them has it.
        let (uris, settings) = (old.remote.uris(), self.0.plan.upstream.clone());
        let remote = Remote::open(uris, expectation, settings).await;
        let remote = remote.map_err(|source| MirrorError::Upstream { name: image.name.clone(), source })?;
        let new = self.open_generation(image, Arc::new(remote), facts.identity, workers).await?;
        self.start(&new, workers).await;
        Ok(Arc::new(new))
    }

    /// Takes the manifest of an image that had none.
    async fn take_manifest(&self, newest: &Generation, identity: ImageId) -> Result<(), ManifestError> {
        let (name, remote) = (&newest.image.name, Arc::clone(&newest.remote));
        let directory = newest.mirror.directory().to_owned();
        let adopted = match fetch_manifest(remote, identity, directory).await {
            Ok(truth) => newest.mirror.adopt(truth),
            Err(error) => Err(error),
        };
        match &adopted {
            Ok(()) => {
                newest.remote.expect(Some(identity), newest.mirror.node());
                tracing::info!(name, %identity, "the image has a manifest now: everything is verified from now on");
            }
            Err(error) => tracing::warn!(name, %error, "the image has a manifest that cannot be used"),
        }
        adopted
    }
}

/// What the servers have instead of an image of this size and identity, if all of them answer and none has it.
fn replacement(looks: &[Option<Facts>], size: u64, identity: Option<ImageId>) -> Option<&Facts> {
    let is_other = |facts: &Facts| {
        let is_other_identity = facts.identity.zip(identity).is_some_and(|(theirs, ours)| theirs != ours);
        facts.size != size || is_other_identity
    };
    let all_other = looks.iter().all(|look| look.as_ref().is_some_and(is_other));
    // Without an identity nobody could tell the new cache from the next one.
    looks.iter().flatten().find(|facts| all_other && facts.identity.is_some())
}

/// The identity whose manifest is of use: our own, or where that is not known the one that all servers have that tell
/// one. Whatever was fetched from them before is held against it.
fn sought(looks: &[Option<Facts>], identity: Option<ImageId>) -> Option<ImageId> {
    let mut told = looks.iter().flatten().filter_map(|facts| facts.identity);
    identity.or_else(|| told.next().filter(|first| told.all(|other| other == *first)))
}

/// How often the servers are asked.
fn period() -> Duration {
    let set = std::env::var(EVERY_VARIABLE).ok().filter(|_| cfg!(debug_assertions));
    let seconds = set.and_then(|text| text.parse().ok());
    seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()).unwrap_or(EVERY)
}

fn identity_text(identity: Option<ImageId>) -> String {
    identity.map_or_else(|| "unknown".to_owned(), |identity| identity.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_is_replaced_when_nobody_can_still_have_it() {
        let facts = |size, identity: Option<u8>| {
            let mut facts = Facts::read_only(size, "");
            facts.identity = identity.map(|byte| ImageId([byte; 32]));
            Some(facts)
        };
        let ours = Some(ImageId([1; 32]));
        let found = |looks: &[Option<Facts>]| replacement(looks, 10, ours).and_then(|facts| facts.identity);
        assert_eq!(found(&[facts(10, Some(2))]), Some(ImageId([2; 32])));
        assert_eq!(found(&[facts(11, Some(2)), facts(10, Some(3))]), Some(ImageId([2; 32])));
        assert_eq!(found(&[facts(10, Some(2)), facts(10, Some(1))]), None, "one still has it");
        assert_eq!(found(&[facts(10, Some(2)), None]), None, "one may still have it");
        assert_eq!(found(&[facts(10, Some(2)), facts(10, None)]), None, "one does not say");
        assert_eq!(found(&[facts(11, None)]), None, "nobody knows what it is");
        assert_eq!(replacement(&[facts(10, Some(2))], 10, None), None, "it has got a name");
        let wanted = |looks: &[Option<Facts>], own: Option<u8>| {
            sought(looks, own.map(|byte| ImageId([byte; 32]))).map(|identity| identity.0[0])
        };
        assert_eq!(wanted(&[None, facts(10, None), facts(10, Some(2)), facts(10, Some(2))], None), Some(2));
        assert_eq!(wanted(&[facts(10, Some(2)), facts(10, Some(3))], None), None, "it may be either");
        assert_eq!(wanted(&[facts(10, Some(2)), facts(10, Some(1))], Some(1)), Some(1), "what is here is ours");
        assert_eq!(wanted(&[None], None), None);
    }
}
