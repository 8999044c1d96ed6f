//! Which cache belongs to which image, and its manifest.
//!
//! The first cache of an image has its name. When the upstream's image is replaced, the new one gets a cache with a part
//! of its identity in its name. What belongs to what is said by the caches themselves: by their maps and manifests.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::remembered;
use super::{Generation, KEPT_GENERATIONS, MirrorError, Mirrors, PlannedImage};
use crate::export::{Export, Facts, ImageId, NodeId, SharedExport};
use crate::fill::profile::Store;
use crate::mirror::{Cache, CacheError, ManifestError, Mirror, Space, Truth};
use crate::upstream::{self, Expectation, OpenError, Remote, Role};
use crate::worker::Workers;

/// What a mirror's directory has beside the cache for the next clients; it counts in `space`. Blocks.
fn with_profiles(mirror: Mirror, space: &Arc<Space>) -> (Mirror, Arc<Store>) {
    let path = mirror.directory().join("profile");
    let profiles = Arc::new(Store::open_within(space, path, mirror.size(), mirror.image()));
    (mirror, profiles)
}

impl Mirrors {
    /// Connects to the upstream of an image and opens the cache that belongs to what it has.
    pub(super) async fn open_newest(
        &self,
        image: &PlannedImage,
        workers: &Arc<Workers>,
    ) -> Result<Generation, MirrorError> {
        let latest = self.latest_cache(&image.name)?;
        let (remote, identity) = self.reach(image, latest.as_ref(), workers).await?;
        if let Some(wanted) = image.wanted
            && identity.is_some_and(|identity| identity != wanted)
        {
            let found = identity.map(|identity| identity.to_string()).unwrap_or_default();
            return Err(MirrorError::OtherContent { name: image.name.clone(), wanted, found });
        }
        drop(latest);
        let identity = identity.or(image.wanted);
        self.open_generation(image, remote, identity, workers).await
    }

    /// Opens the cache of one identity of an image, or makes one.
    pub(super) async fn open_generation(
        &self,
        image: &PlannedImage,
        remote: Arc<Remote>,
        identity: Option<ImageId>,
        workers: &Arc<Workers>,
    ) -> Result<Generation, MirrorError> {
        let cache = self.cache_of(&image.name, identity, remote.facts().size)?;
        let (cache, truth) = self.manifest_of(image, cache, identity, &remote, workers).await?;
        if let (Some(truth), Some(wanted), None) = (&truth, self.0.plan.mirror.chunk_size, cache.header())
            && wanted < truth.chunk_size()
        {
            return Err(MirrorError::ChunkSize { name: image.name.clone(), manifest: truth.chunk_size(), wanted });
        }
        let lower: SharedExport = Arc::<Remote>::clone(&remote);
        let (space, settings) = (Arc::clone(&self.0.space), self.0.plan.mirror.clone());
        let name = image.name.clone();
        let open = move || Ok(with_profiles(Mirror::open(name, cache, lower, truth, &space, &settings)?, &space));
        let opened: Result<_, CacheError> =
            tokio::task::spawn_blocking(open).await.map_err(|_| MirrorError::Died(image.name.clone()))?;
        let (mirror, profiles) = opened?;
        remote.expect(mirror.image(), mirror.node());
        let filled = self.fill(image, &mirror, &remote, &profiles, true);
        Ok(Generation { image: image.clone(), mirror, filled, remote, profiles })
    }

    /// The cache that was used last, of all that an image has.
    fn latest_cache(&self, name: &str) -> Result<Option<Cache>, MirrorError> {
        let root = &self.0.plan.cache;
        let mut paths = Cache::versions(root, name);
        if Cache::exists(root, name) {
            paths.extend(Cache::path(root, name).ok());
        }
        paths.sort_by_key(|path| std::cmp::Reverse(Cache::last_used(path)));
        // One whose making was cut off says nothing.
        for path in paths {
            let cache = Cache::reopen(&path)?;
            if cache.header().is_some() {
                return Ok(Some(cache));
            }
        }
        Ok(None)
    }

    /// Connects to the upstream. A cache that knows its image does without for now. Tells what image it is, if that is
    /// known.
    async fn reach(
        &self,
        image: &PlannedImage,
        latest: Option<&Cache>,
        workers: &Arc<Workers>,
    ) -> Result<(Arc<Remote>, Option<ImageId>), MirrorError> {
        let header = latest.and_then(Cache::header).copied();
        // Size and identity are left to the cache, which can say more about them.
        let not_through = header.map(|header| header.node);
        let expectation = Expectation { not_through, identity: image.wanted, ..Expectation::default() };
        let settings = self.named(not_through);
        let told = latest.and_then(|cache| remembered::servers(cache.directory(), &image.uris));
        // Nobody but us knows of those that were told: they count only as long as they have what the cache has.
        let strict = Expectation {
            size: header.map(|header| header.image_size),
            identity: image.wanted.or_else(|| latest.and_then(Cache::identity)),
            not_through,
        };
        // On a worker, where the connection will be used.
        let open = {
            let (uris, told, settings) = (image.uris.clone(), told.clone(), settings.clone());
            move || async move {
                let mut remote = None;
                if let Some(told) = told {
                    remote = Remote::open(told, strict, settings.clone()).await.ok();
                }
                let remote = match remote {
                    Some(remote) => remote,
                    None => Remote::open(uris, expectation, settings).await?,
                };
                let identity = identity_of(&remote).await;
                Ok::<_, OpenError>((remote, identity))
            }
        };
        let uris = told.unwrap_or_else(|| image.uris.clone());
        match (workers.ask(open).await.ok_or_else(|| MirrorError::Died(image.name.clone()))?, header) {
            (Ok((remote, identity)), _) => Ok((Arc::new(remote), identity)),
            (Err(error), Some(header)) if !error.is_final() => {
                let name = &image.name;
                tracing::warn!(name, %error, "the upstream is away: serving what is here, waiting for what is not");
                let facts = Facts::read_only(header.image_size, "");
                let remote = Remote::offline(uris, facts, expectation, settings);
                Ok((Arc::new(remote), latest.and_then(Cache::identity)))
            }
            (Err(source), _) => Err(MirrorError::Upstream { name: image.name.clone(), source }),
        }
    }

    /// How upstreams are used by the mirror with this name.
    pub(super) fn named(&self, node: Option<NodeId>) -> upstream::Settings {
        let settings = self.0.plan.upstream.clone();
        upstream::Settings { role: node.map_or(settings.role, Role::Named), ..settings }
    }

    /// The cache of what is known to be `identity`, or a new one.
    fn cache_of(&self, name: &str, identity: Option<ImageId>, size: u64) -> Result<Cache, MirrorError> {
        let root = &self.0.plan.cache;
        let Some(identity) = identity else { return Ok(Cache::open(root, name)?) };
        for path in Cache::versions(root, name) {
            // What is in use here holds something else.
            if self.is_open(&path) {
                continue;
            }
            let cache = Cache::reopen(&path)?;
            if cache.identity() == Some(identity) {
                return Ok(cache);
            }
        }
        if self.is_open(&Cache::path(root, name)?) {
            return Ok(Cache::open_version(root, name, identity)?);
        }
        let first = Cache::open(root, name)?;
        let is_same = match first.identity() {
            Some(known) => known == identity,
            // Filled when nothing was known of it. Each chunk will be held against the manifest.
            None => first.header().is_none_or(|header| header.image_size == size),
        };
        if is_same { Ok(first) } else { Ok(Cache::open_version(root, name, identity)?) }
    }

    /// Whether a cache is in use here.
    fn is_open(&self, path: &Path) -> bool {
        self.generations().iter().any(|generation| generation.mirror.directory() == path)
    }

    /// The manifest of an image: what the cache has, or what the upstream gives.
    async fn manifest_of(
        &self,
        image: &PlannedImage,
        cache: Cache,
        identity: Option<ImageId>,
        remote: &Arc<Remote>,
        workers: &Arc<Workers>,
    ) -> Result<(Cache, Option<Truth>), MirrorError> {
        let Some(identity) = identity else { return Ok((cache, None)) };
        let name = image.name.clone();
        let (cache, truth) = tokio::task::spawn_blocking(move || {
            let truth = cache.manifest(&name).filter(|truth| truth.id() == identity);
            (cache, truth)
        })
        .await
        .map_err(|_| MirrorError::Died(image.name.clone()))?;
        if truth.is_some() || !remote.is_reachable() {
            return Ok((cache, truth));
        }
        let (remote, directory) = (Arc::clone(remote), cache.directory().to_owned());
        let fetched = workers.ask(move || fetch_manifest(remote, identity, directory)).await;
        match fetched.ok_or_else(|| MirrorError::Died(image.name.clone()))? {
            Ok(truth) => Ok((cache, Some(truth))),
            Err(source) if image.wanted.is_some() => Err(MirrorError::Manifest { name: image.name.clone(), source }),
            Err(error) => {
                tracing::warn!(name = image.name, %error, "no manifest: what is fetched is not verified");
                Ok((cache, None))
            }
        }
    }

    /// Opens the caches of older generations: they count, can be evicted, and serve what they hold. The oldest and the
    /// empty ones are removed.
    pub(super) async fn reopen_older(&self, image: &PlannedImage, workers: &Arc<Workers>) {
        let root = &self.0.plan.cache;
        let mut paths = Cache::versions(root, &image.name);
        paths.extend(Cache::path(root, &image.name).ok().filter(|path| path.exists()));
        paths.retain(|path| !self.is_open(path));
        for (index, path) in paths.into_iter().enumerate() {
            if let Err(error) = self.reopen_one(image, &path, index < KEPT_GENERATIONS, workers).await {
                tracing::warn!(path = %path.display(), %error, "cannot use the cache of an older generation");
            }
        }
    }

    async fn reopen_one(
        &self,
        image: &PlannedImage,
        path: &Path,
        keep: bool,
        workers: &Arc<Workers>,
    ) -> Result<(), MirrorError> {
        let cache = Cache::reopen(path)?;
        let (Some(header), Some(identity), true) = (cache.header().copied(), cache.identity(), keep) else {
            tracing::info!(path = %path.display(), "removing the cache of an older generation");
            return cache.remove().map_err(|source| {
                let path = path.to_owned();
                CacheError::System { what: "remove", path, source }.into()
            });
        };
        let mut facts = Facts::read_only(header.image_size, "an older generation");
        facts.identity = Some(identity);
        let settings = crate::mirror::Settings { chunk_size: None, ..self.0.plan.mirror.clone() };
        let (name, space) = (image.name.clone(), Arc::clone(&self.0.space));
        // Its servers are asked only when somebody reads what is not here.
        let expectation =
            Expectation { identity: Some(identity), not_through: Some(header.node), ..Expectation::default() };
        let uris = remembered::servers(path, &image.uris).unwrap_or_else(|| image.uris.clone());
        let remote = Arc::new(Remote::offline(uris, facts, expectation, self.named(Some(header.node))));
        let lower: SharedExport = Arc::<Remote>::clone(&remote);
        let open = move || Ok(with_profiles(Mirror::open(name, cache, lower, None, &space, &settings)?, &space));
        let opened: Result<_, CacheError> =
            tokio::task::spawn_blocking(open).await.map_err(|_| MirrorError::Died(image.name.clone()))?;
        let (mirror, profiles) = opened?;
        let filled = self.fill(image, &mirror, &remote, &profiles, false);
        let generation = Generation { image: image.clone(), mirror, filled, remote, profiles };
        self.register_older(image, identity, generation.export());
        self.start(&generation, workers).await;
        self.generations().insert(0, Arc::new(generation));
        Ok(())
    }

    /// Lets clients that know an older generation by its content still have it.
    pub(super) fn register_older(&self, image: &PlannedImage, identity: ImageId, export: SharedExport) {
        let name = format!("{}@{identity}", image.name);
        if let Err(error) = self.0.registry.insert(&name, export) {
            tracing::debug!(%error, "not exported by its content");
        }
    }
}

/// What image the servers have: what the one in use says, or if it says nothing, what another says that has as many
/// bytes.
pub(super) async fn identity_of(remote: &Remote) -> Option<ImageId> {
    let facts = remote.facts();
    if facts.identity.is_some() {
        return facts.identity;
    }
    let looks = remote.inspect().await.into_iter().filter_map(|(_, look)| look.ok());
    looks.filter(|look| look.size == facts.size).find_map(|look| look.identity)
}

/// Fetches the manifest of `identity` from the first server that has it.
pub(super) async fn fetch_manifest(
    remote: Arc<Remote>,
    identity: ImageId,
    directory: PathBuf,
) -> Result<Truth, ManifestError> {
    let mut last = None;
    for source in remote.manifests().await {
        match Truth::fetch(&source, identity, &directory).await {
            Ok(truth) => return Ok(truth),
            Err(error) => last = Some(error),
        }
    }
    Err(last.unwrap_or(ManifestError::None))
}
