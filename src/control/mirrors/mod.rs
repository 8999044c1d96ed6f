//! The mirrors of a server: opened, watched, and replaced when their upstream has another image.
//!
//! | file | holds |
//! | --- | --- |
//! | this one | [`Mirrors`]: which there are, and what they have in common |
//! | `open` | which cache belongs to which image, and its manifest |
//! | `casts` | being filled by what is sent to groups |
//! | `notice` | going to other upstreams, as told by the present one |
//! | `remembered` | which those are, over a restart |
//! | `watch` | noticing that the upstream's image has been replaced, or has got a manifest |
//! | `operate` | mirrors as operators see them |
//! | `prefetch` | orders to fetch ahead of demand: taken, told of, called off |
//! | `runner` | carrying them out |
//!
//! An image has *generations*: one for each identity that its upstream has had. Each has a cache of its own, so what is
//! of one identity never gets into another. New clients get the newest; those that are connected keep theirs for as long
//! as they stay. Older ones are exported as `NAME@blake3-...`, and what they hold serves newer ones where it is the same.
//!
//! Owns: generations, their registration, their watchers. Does not own: caches (`mirror`), connections (`upstream`).

mod casts;
mod notice;
mod open;
mod operate;
mod prefetch;
pub mod remembered;
mod runner;
mod watch;

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use futures_util::future::join_all;
use thiserror::Error;

pub use self::casts::Hear;
use self::casts::Receptions;
use self::notice::Follower;
pub(in crate::control) use self::prefetch::{deadline_of, within};
use self::remembered::Remembered;
use super::Jobs;
use super::redirect::StatePlace;
use crate::export::{DuplicateName, ImageId, Registry, SharedExport};
use crate::fill;
use crate::fill::client::Filled;
use crate::fill::engine::Engine;
use crate::fill::image::{Filling, Image};
use crate::fill::orders::Orders;
use crate::fill::profile::{self, Exchange, Kept, Recording, Store};
use crate::mirror::{self, CacheError, ManifestError, Mirror, Share, Space, SpaceSettings};
use crate::nbd::Uri;
use crate::net::multicast::Group;
use crate::units::ByteSize;
use crate::upstream::{self, Remote};
use crate::worker::Workers;

/// Generations of one image whose caches are kept, beside the newest. Older ones are removed at the start.
const KEPT_GENERATIONS: usize = 4;

/// An image that is to be mirrored.
#[derive(Debug, Clone)]
pub struct PlannedImage {
    /// Its name here.
    pub name: String,
    /// Servers that hold it.
    pub uris: Vec<Uri>,
    /// What it must be, where that was said.
    pub wanted: Option<ImageId>,
}

/// What is to be mirrored, and how.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The images; no name twice.
    pub images: Vec<PlannedImage>,
    /// The directory of all caches.
    pub cache: PathBuf,
    /// Its space.
    pub space: SpaceSettings,
    /// How each is mirrored.
    pub mirror: mirror::Settings,
    /// How upstreams are used.
    pub upstream: upstream::Settings,
    /// What is fetched ahead of demand.
    pub fill: fill::Settings,
    /// How profiles are recorded.
    pub profile: profile::Settings,
    /// Which groups are heard.
    pub hear: Hear,
}

/// Why an image cannot be mirrored.
#[derive(Debug, Error)]
pub enum MirrorError {
    /// Its cache cannot be used.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// No server can be used.
    #[error("cannot mirror {name:?}: {source}")]
    Upstream {
        /// The image.
        name: String,
        /// Why.
        source: upstream::OpenError,
    },
    /// The upstream has another image than was asked for by content.
    #[error("cannot mirror {name:?}: the upstream has {found}, not {wanted}")]
    OtherContent {
        /// The image.
        name: String,
        /// What was asked for.
        wanted: ImageId,
        /// What there is: an identity, or words.
        found: String,
    },
    /// Chunks that are smaller than those of the manifest could not be verified.
    #[error(
        "{name:?}: the image's manifest has chunks of {}, so those of {} could not be verified: leave --chunk-size out, or index the image with --chunk-size {}",
        ByteSize(u64::from(*manifest)), ByteSize(u64::from(*wanted)), ByteSize(u64::from(*wanted))
    )]
    ChunkSize {
        /// The image.
        name: String,
        /// Bytes, in the manifest.
        manifest: u32,
        /// Bytes, as asked for.
        wanted: u32,
    },
    /// Its manifest cannot be had, though the image was asked for by content.
    #[error("cannot mirror {name:?}: its manifest cannot be used: {source}")]
    Manifest {
        /// The image.
        name: String,
        /// Why.
        source: ManifestError,
    },
    /// What cannot be given back is more than the limit.
    #[error(
        "{}: maps, manifests and pins of the images take {} and cannot be evicted: --cache-size must be more than that, not {}",
        path.display(), ByteSize(*used), ByteSize(*limit)
    )]
    TooSmall {
        /// The directory of all caches.
        path: PathBuf,
        /// Bytes.
        used: u64,
        /// Bytes.
        limit: u64,
    },
    /// A group cannot be heard.
    #[error("cannot join {group}: {source}")]
    Join {
        /// The group.
        group: Group,
        /// The reason of the system.
        source: std::io::Error,
    },
    /// Two with one name.
    #[error(transparent)]
    DuplicateName(#[from] DuplicateName),
    /// A thread died.
    #[error("a thread died while {0:?} was opened")]
    Died(String),
}

/// The mirrors of a server. Cheap to clone; all clones are one.
#[derive(Debug, Clone)]
pub struct Mirrors(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    plan: Plan,
    space: Arc<Space>,
    engine: Engine,
    registry: Arc<Registry>,
    /// Not kept alive by us: watchers run on them.
    workers: Weak<Workers>,
    /// Newer ones of an image come later.
    generations: Mutex<Vec<Arc<Generation>>>,
    jobs: Jobs,
    orders: Orders,
    receptions: Arc<Receptions>,
}

/// One image as it was at one time.
#[derive(Debug)]
struct Generation {
    image: PlannedImage,
    mirror: Mirror,
    /// What clients get.
    filled: Arc<Filled>,
    /// Uses servers only as long as they have this very image. Those of older ones may have it again some day.
    remote: Arc<Remote>,
    /// What its clients read.
    profiles: Arc<Store>,
}

impl Mirrors {
    /// Where the orders to move their clients are kept: beside the caches, and in their space.
    pub fn state_place(&self) -> StatePlace {
        let space = Arc::clone(&self.0.space);
        // No image has a directory of that name: an `@` never comes first in one.
        StatePlace { directory: space.root().to_owned(), name: "@redirects".to_owned(), space: Some(space) }
    }

    /// Opens all images of `plan` and puts them into `registry`; keeps them running on `workers`.
    pub async fn open(mut plan: Plan, registry: Arc<Registry>, workers: &Arc<Workers>) -> Result<Self, MirrorError> {
        let space = Space::new(&plan.cache, plan.space);
        let (cache, account) = (plan.cache.clone(), Arc::clone(&space));
        let orders = tokio::task::spawn_blocking(move || Orders::open(&cache, &account)).await;
        let orders = orders.map_err(|_| MirrorError::Died("the table of orders".to_owned()))?;
        let engine = Engine::new(plan.fill.rates, orders.clone());
        plan.mirror.observer = Some(engine.observer());
        let receptions = Receptions::new(plan.hear.clone());
        let shared = Shared {
            plan,
            space,
            engine,
            registry,
            workers: Arc::downgrade(workers),
            generations: Mutex::default(),
            jobs: Jobs::default(),
            orders,
            receptions,
        };
        let this = Self(Arc::new(shared));
        for image in this.0.plan.images.clone() {
            this.open_image(image, workers).await?;
        }
        this.fit(workers).await?;
        let space = Arc::clone(&this.0.space);
        workers.run(move || space.run_evictor()).await;
        let engine = this.0.engine.clone();
        workers.run(move || engine.run()).await;
        let runner = this.clone();
        workers.run(move || runner.run_orders()).await;
        this.listen(workers).await?;
        Ok(this)
    }

    /// Has what is there already evicted down to the limit, before anybody is served.
    async fn fit(&self, workers: &Arc<Workers>) -> Result<(), MirrorError> {
        let space = Arc::clone(&self.0.space);
        // Whether it could is seen next.
        let _ = workers.ask(move || async move { space.make_room().await }).await;
        let (used, limit) = (self.0.space.usage().used, self.0.plan.space.limit.unwrap_or(u64::MAX));
        if used >= limit {
            return Err(MirrorError::TooSmall { path: self.0.plan.cache.clone(), used, limit });
        }
        Ok(())
    }

    /// Opens the newest generation of an image and those that were kept, and has it watched.
    async fn open_image(&self, image: PlannedImage, workers: &Arc<Workers>) -> Result<(), MirrorError> {
        let newest = self.open_newest(&image, workers).await?;
        let Share { size, resident, zero, .. } = newest.mirror.share();
        let upstream = newest.remote.current().to_string();
        let identity = newest.mirror.image().map_or_else(|| "unknown".to_owned(), |id| id.to_string());
        let is_verified = newest.mirror.has_manifest();
        let name = &image.name;
        tracing::info!(
            name,
            upstream,
            size,
            resident,
            zero,
            identity,
            is_verified,
            "mirroring, {} here",
            ByteSize(resident)
        );
        self.0.registry.insert(name, newest.export())?;
        self.start(&newest, workers).await;
        self.generations().push(Arc::new(newest));
        self.reopen_older(&image, workers).await;
        let this = self.clone();
        let name = image.name.clone();
        workers.run(move || this.watch(name)).await;
        Ok(())
    }

    /// Has a mirror filled ahead of demand, as a part of `image`.
    fn fill(
        &self,
        image: &PlannedImage,
        mirror: &Mirror,
        remote: &Arc<Remote>,
        profiles: &Arc<Store>,
        is_newest: bool,
    ) -> Arc<Filled> {
        let fill::Settings { mode, readahead, .. } = self.0.plan.fill;
        let is_ahead = mode != fill::Mode::None;
        let filling = Filling {
            readahead: if is_ahead { readahead } else { 0 },
            profiles: is_ahead,
            background: mode == fill::Mode::Background,
        };
        let recording = Recording::new(self.0.plan.profile.clone());
        let exchange = Arc::new(Exchange::new(Arc::clone(profiles), Arc::clone(remote), recording));
        let image = Image::new(image.name.clone(), mirror.clone(), filling, exchange);
        image.retire(!is_newest);
        self.0.engine.add(Arc::clone(&image));
        Arc::new(Filled::new(self.0.engine.clone(), image))
    }

    /// Keeps a generation running.
    async fn start(&self, generation: &Generation, workers: &Arc<Workers>) {
        let flusher = generation.mirror.clone();
        workers.run(move || flusher.run_flusher()).await;
        let (image, engine) = (Arc::clone(generation.filled.image()), self.0.engine.clone());
        workers
            .run(move || async move {
                if image.has_background() {
                    image.play(&engine);
                }
                let exchange = Arc::clone(image.exchange());
                exchange.run().await;
            })
            .await;
        self.follow(generation, workers).await;
    }

    /// Has a generation go to other upstreams when it is told to.
    async fn follow(&self, generation: &Generation, workers: &Arc<Workers>) {
        let (directory, space) = (generation.mirror.directory().to_owned(), Arc::clone(&self.0.space));
        let PlannedImage { name, uris, .. } = generation.image.clone();
        let opening = tokio::task::spawn_blocking(move || Remembered::open(&directory, &space, uris));
        let Ok(remembered) = opening.await else {
            return tracing::error!(name, "cannot follow the upstream's news: a thread died");
        };
        let receptions = Arc::clone(&self.0.receptions);
        let follower = Follower::new(name, Arc::clone(&generation.remote), remembered, receptions);
        workers.run(move || follower.run()).await;
    }

    fn generations(&self) -> MutexGuard<'_, Vec<Arc<Generation>>> {
        self.0.generations.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The generation of an image that new clients get.
    fn newest(&self, name: &str) -> Option<Arc<Generation>> {
        self.generations().iter().rev().find(|generation| generation.image.name == name).cloned()
    }

    /// The generation of an image that holds this.
    fn of_identity(&self, name: &str, identity: ImageId) -> Option<Arc<Generation>> {
        let is_it = |generation: &&Arc<Generation>| {
            generation.image.name == name && generation.mirror.image() == Some(identity)
        };
        self.generations().iter().find(is_it).cloned()
    }

    /// Makes everything durable, what is on its way too if it comes within `fetches`.
    pub async fn settle(&self, workers: &Workers, fetches: Duration) {
        let generations = self.generations().clone();
        join_all(generations.iter().map(|generation| generation.settle(workers, fetches))).await;
    }

    /// Lets another process have the caches. For when all is settled, and the workers have ended.
    pub fn release(&self) {
        let generations = std::mem::take(&mut *self.generations());
        generations.iter().for_each(|generation| generation.mirror.release());
        self.0.orders.release();
    }

    /// Makes durable what is here, while clients are served: less is left to do at the end.
    pub async fn flush(&self, workers: &Workers) {
        let generations = self.generations().clone();
        let flush = |generation: &Arc<Generation>| {
            let mirror = generation.mirror.clone();
            workers.ask(move || async move { mirror.settle_within(Duration::ZERO).await })
        };
        join_all(generations.iter().map(flush)).await;
    }
}

impl Generation {
    /// What clients get.
    fn export(&self) -> SharedExport {
        let filled: SharedExport = Arc::<Filled>::clone(&self.filled);
        Arc::new(Kept::new(filled, Arc::clone(&self.profiles)))
    }

    async fn settle(&self, workers: &Workers, fetches: Duration) {
        let (name, mirror) = (&self.image.name, &self.mirror);
        let (settling, exchange) = (mirror.clone(), Arc::clone(self.filled.image().exchange()));
        if workers
            .ask(move || async move {
                exchange.settle().await;
                settling.settle_within(fetches).await;
            })
            .await
            .is_none()
        {
            tracing::error!(name, "cannot make everything durable: its worker died");
        }
        let Share { resident, zero, .. } = mirror.share();
        let (stats, upstream) = (mirror.stats(), self.remote.stats());
        tracing::info!(
            name,
            resident,
            zero,
            fetched_bytes = upstream.received_bytes.value(),
            fetch_requests = upstream.requests.value(),
            retries = upstream.retries.value(),
            hits = stats.hits.value(),
            misses = stats.misses.value(),
            evicted_chunks = stats.evicted_chunks.value(),
            deduplicated_bytes = stats.deduplicated_bytes.value(),
            wrong_replies = upstream.wrong_replies.value(),
            damaged_chunks = stats.damaged_chunks.value(),
            damaged_pages = stats.damaged_pages.value(),
            unstored_chunks = stats.unstored_chunks.value(),
            "mirror closed"
        );
    }
}
