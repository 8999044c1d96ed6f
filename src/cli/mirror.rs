//! `headwater mirror`.

use std::sync::Arc;

use anyhow::{Context, bail};
use futures_util::future::join_all;

use super::args::{self, NamedUris};
use super::daemon::{self, Exports};
use crate::export::{DuplicateName, Facts, Registry};
use crate::mirror::{self, Cache, Header, Mirror, Share, Space, SpaceSettings};
use crate::nbd::Uri;
use crate::net::Listener;
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
    cache: std::path::PathBuf,
    of_mirror: mirror::Settings,
    of_upstream: Settings,
    running: Vec<Running>,
}

struct Running {
    name: String,
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
        let space = Space::new(&self.cache, SpaceSettings::default());
        let mirror = Mirror::open(name, cache, Arc::<Remote>::clone(&remote), None, &space, &self.of_mirror)?;
        remote.expect(mirror.image(), mirror.node());
        Ok(Running { name: name.to_owned(), mirror, remote })
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
            let Share { size, resident, zero, .. } = running.mirror.share();
            let upstream = running.remote.current();
            tracing::info!(name, %upstream, size, resident, zero, "mirroring, {} here", ByteSize(resident));
            registry.insert(name, Arc::new(running.mirror.clone()))?;
            let flusher = running.mirror.clone();
            workers.run(move || flusher.run_flusher()).await;
            self.running.push(running);
        }
        Ok(())
    }

    async fn settle(&self, _: &Registry, workers: &Workers) -> anyhow::Result<()> {
        join_all(self.running.iter().map(|running| running.settle(workers))).await;
        Ok(())
    }
}

impl Running {
    async fn settle(&self, workers: &Workers) {
        let Self { name, mirror, remote } = self;
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
