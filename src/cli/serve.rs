//! `headwater serve`.

use anyhow::{Context, ensure};
use futures_util::future::join_all;

use super::args::{FormatArgument, NamedPath, Serve};
use super::daemon::{self, Exports};
use crate::export::Registry;
use crate::image::{self, Options};
use crate::net::Listener;
use crate::worker::Workers;

pub(super) fn run(arguments: Serve) -> anyhow::Result<()> {
    ensure!(
        arguments.backing.is_empty() || matches!(arguments.format, FormatArgument::Qcow2),
        "--backing needs --format qcow2: a raw image whose guest writes a qcow2 header into it must not become one"
    );
    for directory in &arguments.backing {
        ensure!(directory.is_dir(), "--backing {}: there is no such directory", directory.display());
    }
    let options = Options {
        read_only: arguments.read_only,
        format: arguments.format.into(),
        backing_directories: arguments.backing,
    };
    daemon::run(arguments.daemon, Images { images: arguments.images, options })
}

struct Images {
    images: Vec<NamedPath>,
    options: Options,
}

impl Exports for Images {
    async fn open(&mut self, registry: &Registry, _: &Workers, _: &[Listener]) -> anyhow::Result<()> {
        for NamedPath { name, path } in &self.images {
            let image = image::open(path, &self.options)?;
            let facts = image.facts();
            tracing::info!(name, path = %path.display(), size = facts.size, writable = facts.writable, "serving");
            registry.insert(name, image)?;
        }
        Ok(())
    }

    async fn settle(&self, registry: &Registry, workers: &Workers) -> anyhow::Result<()> {
        let flushes = registry.all().into_iter().map(|(name, export)| async move {
            let result = workers.ask(move || async move { export.flush().await.map_err(|error| error.chain()) }).await;
            let result = result.unwrap_or_else(|| Err("its worker died".into())).map_err(anyhow::Error::msg);
            result.with_context(|| format!("cannot flush {name:?}: writes may be lost"))
        });
        // All of them, also when one fails.
        join_all(flushes).await.into_iter().collect()
    }
}
