//! `headwater mirror`.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, bail};
use futures_util::future::join_all;

use super::args::{self, NamedUris};
use super::daemon::{self, Exports};
use crate::control::status::{
    CacheStatus, ImageStatus, Kind, MirrorStatus, PinReport, Role, UpstreamStatus, VerifyOrder,
};
use crate::control::{Answer, Jobs, Operated, Refusal};
use crate::export::{DuplicateName, Facts, Registry};
use crate::mirror::{self, Cache, Header, Mirror, Share};
use crate::nbd::Uri;
use crate::net::Listener;
use crate::ranges::ByteRange;
use crate::units::ByteSize;
use crate::upstream::{Expectation, Remote, Settings};
use crate::worker::Workers;

pub(super) fn run(arguments: args::Mirror) -> anyhow::Result<()> {
    let patience = arguments.upstream_timeout;
    let defaults = Settings::default();
    let of_upstream = Settings {
        connections: usize::from(arguments.upstream_connections),
        // A second server, or a second try, must fit in.
        stall_timeout: defaults.stall_timeout.min(patience / 2),
        // A little less than the mirror's own: the upstream can say better what went wrong.
        patience: patience.mul_f32(0.98),
        ..defaults
    };
    let args::Mirror { images, cache, chunk_size, daemon, .. } = arguments;
    let of_mirror = mirror::Settings { chunk_size, patience };
    daemon::run(daemon, Mirrors { images, cache, of_mirror, of_upstream, running: Vec::new() })
}

struct Mirrors {
    images: Vec<NamedUris>,
    cache: PathBuf,
    of_mirror: mirror::Settings,
    of_upstream: Settings,
    running: Vec<Arc<Running>>,
}

#[derive(Debug)]
struct Running {
    name: String,
    uris: Vec<Uri>,
    directory: PathBuf,
    chunk_size: u32,
    mirror: Mirror,
    remote: Arc<Remote>,
}

impl Mirrors {
    async fn open_one(&self, name: &str, uris: &[Uri], workers: &Workers) -> anyhow::Result<Running> {
        // What is there already decides what the upstream must be. A directory for a new image is not made before the
        // upstream has answered.
        let existing = if Cache::exists(&self.cache, name) { Some(Cache::open(&self.cache, name)?) } else { None };
        let header = existing.as_ref().and_then(Cache::header).copied();
        let remote = Arc::new(self.reach(name, uris, header, workers).await?);
        let cache = match existing {
            Some(cache) => cache,
            None => Cache::open(&self.cache, name)?,
        };
        let directory = cache.directory().to_owned();
        let mirror = Mirror::open(name, cache, Arc::<Remote>::clone(&remote), &self.of_mirror)?;
        remote.expect(mirror.image(), mirror.node());
        let of_new = self.of_mirror.chunk_size.unwrap_or(mirror::DEFAULT_CHUNK_SIZE);
        let chunk_size = header.map_or(of_new, |header| header.chunk_size);
        Ok(Running { name: name.to_owned(), uris: uris.to_vec(), directory, chunk_size, mirror, remote })
    }

    /// Connects to the upstream. A cache that knows its image does without for now.
    async fn reach(
        &self,
        name: &str,
        uris: &[Uri],
        header: Option<Header>,
        workers: &Workers,
    ) -> anyhow::Result<Remote> {
        // Size and identity are left to the cache, which can say more about them.
        let expectation = Expectation { not_through: header.map(|header| header.node), ..Expectation::default() };
        let (uris, settings) = (uris.to_vec(), self.of_upstream.clone());
        // On a worker, where the connection will be used.
        let open = {
            let (uris, settings) = (uris.clone(), settings.clone());
            move || Remote::open(uris, expectation, settings)
        };
        match (workers.ask(open).await.context("a worker died")?, header) {
            (Ok(remote), _) => Ok(remote),
            (Err(error), Some(header)) if !error.is_final() => {
                tracing::warn!(name, %error, "the upstream is away: serving what is here, waiting for what is not");
                Ok(Remote::offline(uris, Facts::read_only(header.image_size, ""), expectation, settings))
            }
            (Err(error), _) => Err(error).with_context(|| format!("cannot mirror {name:?}")),
        }
    }
}

/// Refuses servers that are this one.
fn refuse_self(uris: &[Uri], listeners: &[Listener]) -> anyhow::Result<()> {
    for uri in uris {
        if let Some(listener) = listeners.iter().find(|listener| listener.is_reached_by(&uri.address)) {
            bail!("{uri} is this very server, which listens on {listener}: a mirror cannot feed from itself");
        }
    }
    Ok(())
}

/// Refuses two images with one name, which would have one directory.
fn refuse_same_names(images: &[NamedUris]) -> anyhow::Result<()> {
    let mut names: Vec<_> = images.iter().map(|image| &image.name).collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        bail!(DuplicateName(pair[0].clone()));
    }
    Ok(())
}

impl Exports for Mirrors {
    async fn open(&mut self, registry: &Registry, workers: &Workers, listeners: &[Listener]) -> anyhow::Result<()> {
        refuse_same_names(&self.images)?;
        for NamedUris { name, uris } in &self.images {
            refuse_self(uris, listeners)?;
            let running = self.open_one(name, uris, workers).await?;
            let Share { size, resident, zero } = running.mirror.share();
            let upstream = running.remote.current();
            tracing::info!(name, %upstream, size, resident, zero, "mirroring, {} here", ByteSize(resident));
            registry.insert(name, Arc::new(running.mirror.clone()))?;
            let flusher = running.mirror.clone();
            workers.run(move || flusher.run_flusher()).await;
            self.running.push(Arc::new(running));
        }
        Ok(())
    }

    fn operated(&self) -> Arc<dyn Operated> {
        Arc::new(Operations { cache: self.cache.clone(), running: self.running.clone(), jobs: Jobs::default() })
    }

    async fn settle(&self, _: &Registry, workers: &Workers) -> anyhow::Result<()> {
        join_all(self.running.iter().map(|running| running.settle(workers))).await;
        Ok(())
    }
}

impl Running {
    async fn settle(&self, workers: &Workers) {
        let Self { name, mirror, remote, .. } = self;
        let settling = mirror.clone();
        if workers.ask(move || async move { settling.settle().await }).await.is_none() {
            tracing::error!(name, "cannot make everything durable: its worker died");
        }
        let Share { resident, zero, .. } = mirror.share();
        let (stats, upstream) = (mirror.stats(), remote.stats());
        tracing::info!(
            name,
            resident,
            zero,
            fetched_bytes = upstream.received_bytes.value(),
            fetch_requests = upstream.requests.value(),
            retries = upstream.retries.value(),
            damaged_chunks = stats.damaged_chunks.value(),
            unstored_chunks = stats.unstored_chunks.value(),
            "mirror closed"
        );
    }
}

/// Mirrors as operators see them.
#[derive(Debug)]
struct Operations {
    cache: PathBuf,
    running: Vec<Arc<Running>>,
    jobs: Jobs,
}

impl Operations {
    fn refuse<T>(&self, image: String, why: &'static str) -> Answer<'_, T> {
        let is_here = self.running.iter().any(|running| running.name == image);
        let refusal = if is_here { Refusal::Conflict(why.to_owned()) } else { Refusal::UnknownImage(image) };
        Box::pin(async move { Err(refusal) })
    }
}

impl Running {
    /// Looks at every chunk.
    fn status(&self) -> ImageStatus {
        let Share { size, resident, zero } = self.mirror.share();
        let (stats, upstream) = (self.mirror.stats(), self.remote.stats());
        ImageStatus {
            name: self.name.clone(),
            kind: Kind::Mirror,
            size,
            writable: false,
            chunk_size: Some(self.chunk_size),
            identity: self.mirror.image().map(|identity| identity.to_string()),
            path: self.directory.display().to_string(),
            clients: 0,
            mirror: Some(MirrorStatus {
                resident_bytes: resident,
                zero_bytes: zero,
                verify_failures: stats.damaged_chunks.value(),
                unstored_chunks: stats.unstored_chunks.value(),
                upstream_bytes: upstream.received_bytes.value(),
                upstreams: self.upstreams(),
                ..MirrorStatus::default()
            }),
        }
    }

    /// What is counted is counted for all servers together, and told of the one in use.
    fn upstreams(&self) -> Vec<UpstreamStatus> {
        let (current, stats) = (self.remote.current(), self.remote.stats());
        let one = |uri: &Uri| {
            let of_current = if *uri == current { Some(stats) } else { None };
            UpstreamStatus {
                uri: uri.to_string(),
                current: of_current.is_some(),
                reachable: of_current.map(|_| self.remote.is_reachable()),
                received_bytes: of_current.map_or(0, |stats| stats.received_bytes.value()),
                requests: of_current.map_or(0, |stats| stats.requests.value()),
                ..UpstreamStatus::default()
            }
        };
        self.uris.iter().map(one).collect()
    }
}

const NOTHING_LEAVES: &str = "nothing leaves this cache, which has no bound: there is no need to pin";
const CHECKED_WHEN_READ: &str = "this cache is checked as clients read it, and in no other way";

impl Operated for Operations {
    fn role(&self) -> Role {
        Role::Mirror
    }

    fn images(&self) -> Vec<ImageStatus> {
        let mut images: Vec<_> = self.running.iter().map(|running| running.status()).collect();
        images.sort_by(|a, b| a.name.cmp(&b.name));
        images
    }

    fn cache(&self) -> Option<CacheStatus> {
        let free = rustix::fs::statvfs(&self.cache).ok();
        Some(CacheStatus {
            path: self.cache.display().to_string(),
            free_bytes: free.map(|system| system.f_bavail * system.f_frsize),
            ..CacheStatus::default()
        })
    }

    fn jobs(&self) -> &Jobs {
        &self.jobs
    }

    fn pin(&self, image: String, _: Option<Vec<ByteRange>>) -> Answer<'_, PinReport> {
        self.refuse(image, NOTHING_LEAVES)
    }

    fn unpin(&self, image: String, _: Option<Vec<ByteRange>>) -> Answer<'_, PinReport> {
        self.refuse(image, NOTHING_LEAVES)
    }

    fn verify(&self, image: String, _: VerifyOrder) -> Answer<'_, u64> {
        self.refuse(image, CHECKED_WHEN_READ)
    }
}
