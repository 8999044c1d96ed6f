//! `headwater mirror`.

use std::sync::Arc;
use std::time::Duration;

use anyhow::bail;

use super::args::{self, NamedUris};
use super::config::Reloader;
use super::daemon::{self, Ending, Exports};
use crate::control::mirrors::{Mirrors, Plan, PlannedImage};
use crate::control::redirect::StatePlace;
use crate::control::{self, Operated};
use crate::export::access::Rules;
use crate::export::{DuplicateName, Registry, split_content_name};
use crate::mirror::policy::Admission;
use crate::mirror::{self, SpaceSettings};
use crate::nbd::Uri;
use crate::nbd::uri::Security;
use crate::net::Listener;
use crate::upstream::{Role, Settings};
use crate::worker::Workers;

/// How long what is on its way is waited for while clients wait for a successor.
const TAKEOVER_FETCHES: Duration = Duration::from_millis(10);

pub(super) fn run(arguments: args::Mirror, reloader: Reloader) -> anyhow::Result<()> {
    let patience = arguments.upstream_timeout;
    let fill = arguments.fill.settings();
    let defaults = Settings::default();
    let upstream = Settings {
        connections: usize::from(arguments.upstream_connections),
        // A second server, or a second try, must fit in.
        stall_timeout: defaults.stall_timeout.min(patience / 2),
        // A little less than the mirror's own: the upstream can say better what went wrong.
        patience: patience.mul_f32(0.98),
        role: Role::Mirror,
        ..defaults
    };
    let args::Mirror { images, cache, chunk_size, cache_size, reserve, policy, profile, receive, daemon, .. } =
        arguments;
    let plan = Plan {
        images: images.into_iter().map(plan).collect::<anyhow::Result<_>>()?,
        cache,
        space: SpaceSettings { limit: cache_size, reserve, policy, admission: Admission::default() },
        mirror: mirror::Settings { chunk_size, patience, observer: None },
        upstream,
        fill,
        profile: profile.into(),
        hear: receive.into(),
    };
    warn_of_open_doors(&plan, &daemon.access.rules());
    let images = || Ok(Images { plan: Some(plan.clone()), mirrors: None });
    daemon::run(daemon, control::status::Role::Mirror, images, reloader)
}

/// What was fetched through TLS is served to everybody where there is no rule: that may be meant, and may be forgotten.
fn warn_of_open_doors(plan: &Plan, rules: &Rules) {
    let is_fetched_by_tls = |image: &&PlannedImage| image.uris.iter().any(|uri| uri.security == Security::Tls);
    for PlannedImage { name, .. } in plan.images.iter().filter(is_fetched_by_tls) {
        if !rules.is_restricted(name) {
            tracing::warn!(
                name,
                "the upstream is reached by TLS, and there is no rule here: whoever can connect may have it (--allow, --allow-client, --require-tls)"
            );
        }
    }
}

/// What a name says about the content of an image is held against what its servers have.
fn plan(image: NamedUris) -> anyhow::Result<PlannedImage> {
    let NamedUris { name, uris } = image;
    let mut wanted = None;
    for uri in &uris {
        let (_, content) = split_content_name(&uri.export);
        if let (Some(one), Some(other)) = (wanted, content)
            && one != other
        {
            bail!("{name:?}: its servers are to have {one} and {other}: one image has one content");
        }
        wanted = wanted.or(content);
    }
    let name = split_content_name(&name).0.to_owned();
    Ok(PlannedImage { name, uris, wanted })
}

struct Images {
    /// Until they are opened.
    plan: Option<Plan>,
    /// From then on.
    mirrors: Option<Mirrors>,
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
fn refuse_same_names(images: &[PlannedImage]) -> anyhow::Result<()> {
    let mut names: Vec<_> = images.iter().map(|image| &image.name).collect();
    names.sort_unstable();
    if let Some(pair) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        bail!(DuplicateName(pair[0].clone()));
    }
    Ok(())
}

impl Exports for Images {
    async fn open(
        &mut self,
        registry: &Arc<Registry>,
        workers: &Arc<Workers>,
        listeners: &[Listener],
    ) -> anyhow::Result<()> {
        let Some(plan) = self.plan.take() else { bail!("the images are open already") };
        refuse_same_names(&plan.images)?;
        plan.images.iter().try_for_each(|image| refuse_self(&image.uris, listeners))?;
        self.mirrors = Some(Mirrors::open(plan, Arc::clone(registry), workers).await?);
        Ok(())
    }

    fn operated(&self) -> Option<Arc<dyn Operated>> {
        self.mirrors.clone().map(|mirrors| Arc::new(mirrors) as Arc<dyn Operated>)
    }

    fn state(&self, _: &[Listener]) -> Option<StatePlace> {
        self.mirrors.as_ref().map(Mirrors::state_place)
    }

    async fn make_ready(&self, _: &Registry, workers: &Workers) {
        if let Some(mirrors) = &self.mirrors {
            mirrors.flush(workers).await;
        }
    }

    fn release(&self) {
        if let Some(mirrors) = &self.mirrors {
            mirrors.release();
        }
    }

    async fn settle(&self, _: &Registry, workers: &Workers, ending: Ending) -> anyhow::Result<()> {
        let fetches = if ending == Ending::Takeover { TAKEOVER_FETCHES } else { mirror::LAST_FETCHES };
        if let Some(mirrors) = &self.mirrors {
            mirrors.settle(workers, fetches).await;
        }
        Ok(())
    }
}
