//! `headwater mirror`.

use std::sync::Arc;

use anyhow::{Context, bail};
use futures_util::future::join_all;
use tokio::sync::oneshot;

use super::args::{self, NamedUris};
use super::daemon::{self, Exports};
use crate::export::{Facts, Registry};
use crate::mirror::{Cache, Mirror, Share};
use crate::nbd::Uri;
use crate::net::Listener;
use crate::units::ByteSize;
use crate::upstream::{Expectation, Remote, Settings};
use crate::worker::Workers;

pub(super) fn run(arguments: args::Mirror) -> anyhow::Result<()> {
    let patience = arguments.upstream_timeout;
    let defaults = Settings::default();
    let settings = Settings {
        connections: usize::from(arguments.upstream_connections),
        connect_timeout: defaults.connect_timeout.min(patience),
        // A second server, or a second try, must fit in.
        stall_timeout: defaults.stall_timeout.min(patience / 2),
        patience,
    };
    let args::Mirror { images, cache, chunk_size, daemon, .. } = arguments;
    daemon::run(daemon, Mirrors { images, cache, chunk_size, settings, running: Vec::new() })
}

struct Mirrors {
    images: Vec<NamedUris>,
    cache: std::path::PathBuf,
    chunk_size: Option<u32>,
    settings: Settings,
    running: Vec<Running>,
}

struct Running {
    name: String,
    mirror: Mirror,
    remote: Arc<Remote>,
}

impl Mirrors {
    async fn open_one(&self, name: &str, uris: &[Uri]) -> anyhow::Result<Running> {
        let cache = Cache::open(&self.cache, name)?;
        let remote = Arc::new(self.reach(name, uris, &cache).await?);
        let mirror = Mirror::open(name, cache, Arc::<Remote>::clone(&remote), self.chunk_size)?;
        remote.expect(mirror.image(), mirror.node());
        Ok(Running { name: name.to_owned(), mirror, remote })
    }

    /// Connects to the upstream. A cache that knows its image does without for now.
    async fn reach(&self, name: &str, uris: &[Uri], cache: &Cache) -> anyhow::Result<Remote> {
        let header = cache.header();
        // Size and identity are left to the cache, which can say more about them.
        let expectation = Expectation { not_through: header.map(|header| header.node), ..Expectation::default() };
        match (Remote::open(uris.to_vec(), expectation, self.settings.clone()).await, header) {
            (Ok(remote), _) => Ok(remote),
            (Err(error), Some(header)) if !error.is_final() => {
                tracing::warn!(name, %error, "the upstream is away: serving what is here, waiting for what is not");
                let facts = Facts::read_only(header.image_size, "");
                Ok(Remote::offline(uris.to_vec(), facts, expectation, self.settings.clone()))
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

impl Exports for Mirrors {
    async fn open(&mut self, registry: &Registry, workers: &Workers, listeners: &[Listener]) -> anyhow::Result<()> {
        for NamedUris { name, uris } in &self.images {
            refuse_self(uris, listeners)?;
            let running = self.open_one(name, uris).await?;
            let Share { size, resident, zero } = running.mirror.share();
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
        let (report, settled) = oneshot::channel();
        let settling = mirror.clone();
        let settle = move || async move {
            settling.settle().await;
            // Whoever waited has given up.
            let _ = report.send(());
        };
        workers.run(settle).await;
        // It fails only if the worker died, which has been reported.
        let _ = settled.await;
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
