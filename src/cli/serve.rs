//! `headwater serve`.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, anyhow, ensure};
use futures_util::future::join_all;

use super::args::{FormatArgument, NamedPath, Serve};
use super::config::Reloader;
use super::daemon::{self, Ending, Exports};
use crate::control::Operated;
use crate::control::real::{RealImage, RealImages};
use crate::control::redirect::StatePlace;
use crate::control::redirect::file::{default_directory, name_of};
use crate::control::status::Role;
use crate::export::{Registry, SharedExport};
use crate::fill::profile::{Kept, Store, profile_path};
use crate::image::index::{Background, Rate, Settings};
use crate::image::{self, Options};
use crate::net::Listener;
use crate::worker::Workers;

pub(super) fn run(arguments: Serve, reloader: Reloader) -> anyhow::Result<()> {
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
        backing_directories: arguments.backing.clone(),
    };
    // One thread: it has the time.
    let rate = Rate::new(Some(arguments.index_rate));
    let settings = Settings { threads: 1, rate: rate.clone(), ..Settings::default() };
    let Serve { images, index, state, daemon, .. } = arguments;
    let images = || {
        Ok(Images {
            images: images.clone(),
            options: options.clone(),
            index: index.then(|| settings.clone()),
            index_rate: index.then(|| rate.clone()),
            state: state.clone(),
            indexing: Mutex::default(),
            open: Vec::new(),
        })
    };
    daemon::run(daemon, Role::Serve, images, reloader)
}

struct Images {
    images: Vec<NamedPath>,
    options: Options,
    /// How missing manifests are made, if they are to be.
    index: Option<Settings>,
    /// How fast, which operators may change.
    index_rate: Option<Rate>,
    /// Where orders are kept, if that was said.
    state: Option<PathBuf>,
    /// That being done.
    indexing: Mutex<Option<Background>>,
    open: Vec<RealImage>,
}

impl Exports for Images {
    async fn open(&mut self, registry: &Arc<Registry>, _: &Arc<Workers>, _: &[Listener]) -> anyhow::Result<()> {
        let mut seals = Vec::new();
        for NamedPath { name, path } in &self.images {
            let image = image::open_image(path, &self.options)?;
            if self.index.is_some() {
                let reason = |reason| anyhow!("--index: {} can have no manifest: {reason}", path.display());
                seals.push(image.seal.as_ref().map(Arc::clone).map_err(reason)?);
            }
            let facts = image.export.facts();
            tracing::info!(name, path = %path.display(), size = facts.size, writable = facts.writable, "serving");
            // Nothing is written beside a device.
            let profile = path.is_file().then(|| profile_path(path));
            let profiles = Arc::new(Store::open(profile, facts.size, facts.identity));
            let export: SharedExport = Arc::new(Kept::new(image.export, Arc::clone(&profiles)));
            registry.insert(name, Arc::clone(&export))?;
            let path = path.display().to_string();
            self.open.push(RealImage { name: name.clone(), path, export, seal: image.seal, profiles });
        }
        if let Some(settings) = self.index.take() {
            let indexing = Background::start(seals, self.options.format, settings).context("cannot start indexing")?;
            self.indexing = Mutex::new(Some(indexing));
        }
        Ok(())
    }

    fn operated(&self) -> Option<Arc<dyn Operated>> {
        Some(Arc::new(RealImages::new(self.open.clone(), self.options.format, self.index_rate.clone())))
    }

    fn state(&self, listeners: &[Listener]) -> Option<StatePlace> {
        let usual = || default_directory(|name| std::env::var_os(name), rustix::process::geteuid().is_root());
        let directory = self.state.clone().or_else(usual)?;
        let name = name_of(&listeners.first()?.to_string());
        Some(StatePlace { directory, name, space: None })
    }

    async fn make_ready(&self, registry: &Registry, workers: &Workers) {
        // What a crash of the machine would lose is not more for a takeover, and is less at the end of a service.
        if let Err(error) = flush_all(registry, workers).await {
            tracing::warn!(error = format!("{error:#}"), "not everything could be flushed before a takeover");
        }
    }

    fn release(&self) {}

    async fn settle(&self, registry: &Registry, workers: &Workers, ending: Ending) -> anyhow::Result<()> {
        let indexing = self.indexing.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(indexing) = indexing {
            tokio::task::spawn_blocking(|| indexing.stop()).await?;
        }
        if ending == Ending::Takeover { Ok(()) } else { flush_all(registry, workers).await }
    }
}

/// Flushes all exports, also when one fails.
async fn flush_all(registry: &Registry, workers: &Workers) -> anyhow::Result<()> {
    let flushes = registry.all().into_iter().map(|(name, export)| async move {
        let result = workers.ask(move || async move { export.flush().await.map_err(|error| error.chain()) }).await;
        let result = result.unwrap_or_else(|| Err("its worker died".into())).map_err(anyhow::Error::msg);
        result.with_context(|| format!("cannot flush {name:?}: writes may be lost"))
    });
    join_all(flushes).await.into_iter().collect()
}
