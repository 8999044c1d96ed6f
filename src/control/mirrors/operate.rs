//! Mirrors as operators see them.

use std::sync::Arc;

use super::{Generation, Mirrors};
use crate::control::casts::Words;
use crate::control::figures::{MirrorFigures, UpstreamFigures};
use crate::control::settings::Settings;
use crate::control::status::{
    CacheStatus, CauseStatus, ImageStatus, Kind, LinkStatus, MirrorStatus, OrderStatus, PinReport, PrefetchOrder,
    PrefetchReport, ReceptionStatus, Role, UpstreamStatus, VerifyOrder,
};
use crate::control::{Answer, Jobs, Operated, Outcome, Refusal, RunningJob};
use crate::fill::engine::Rates;
use crate::fill::profile::Store;
use crate::mirror::{Cause, Mirror, PinError, Pinned, Scrub, Share, Tally};
use crate::ranges::ByteRange;
use crate::telemetry::Counter;
use crate::units::to_u64;
use crate::upstream::ServerStatus;

impl Generation {
    /// Looks at every chunk.
    fn status(&self, name: String) -> ImageStatus {
        let Share { size, resident, zero, pinned } = self.mirror.share();
        let stats = self.mirror.stats();
        let identity = self.mirror.image().map(|identity| identity.to_string());
        ImageStatus {
            name,
            kind: Kind::Mirror,
            size,
            writable: false,
            chunk_size: u32::try_from(self.mirror.chunk_size()).ok(),
            identity,
            path: self.mirror.directory().display().to_string(),
            clients: 0,
            mirror: Some(MirrorStatus {
                verified: self.mirror.has_manifest(),
                resident_bytes: resident,
                pinned_bytes: pinned,
                zero_bytes: zero,
                deduplicated_bytes: stats.deduplicated_bytes.value(),
                hits: stats.hits.value(),
                misses: stats.misses.value(),
                hit_bytes: stats.hit_bytes.value(),
                miss_bytes: stats.miss_bytes.value(),
                evictions: stats.evicted_chunks.value(),
                evicted_bytes: stats.evicted_chunks.value() * self.mirror.chunk_size(),
                verify_failures: stats.damaged_chunks.value() + stats.wrong_replies.value(),
                damaged_pages: stats.damaged_pages.value(),
                unstored_chunks: stats.unstored_chunks.value(),
                upstream_bytes: self.remote.stats().received_bytes.value(),
                fill: Cause::ALL
                    .into_iter()
                    .map(|cause| (cause.name().to_owned(), tally(self.mirror.tally(cause))))
                    .collect(),
                upstreams: self.remote.servers().into_iter().map(upstream).collect(),
            }),
        }
    }
}

impl Generation {
    /// Looks at counters only.
    fn figures(&self, image: String) -> MirrorFigures {
        let stats = self.mirror.stats();
        let fill = Cause::ALL.into_iter().map(|cause| (cause.name(), tally(self.mirror.tally(cause))));
        MirrorFigures {
            image,
            node: self.mirror.node().to_string(),
            hits: stats.hits.value(),
            misses: stats.misses.value(),
            joins: stats.joins.value(),
            hit_bytes: stats.hit_bytes.value(),
            miss_bytes: stats.miss_bytes.value(),
            evicted_chunks: stats.evicted_chunks.value(),
            damaged_chunks: stats.damaged_chunks.value(),
            wrong_replies: stats.wrong_replies.value(),
            unstored_chunks: stats.unstored_chunks.value(),
            deduplicated_bytes: stats.deduplicated_bytes.value(),
            fill: fill.collect(),
            upstreams: self.remote.servers().into_iter().map(upstream_figures).collect(),
        }
    }
}

fn tally(tally: &Tally) -> CauseStatus {
    let [used_bytes, unused_bytes, late_bytes, brought_bytes] =
        [&tally.used_bytes, &tally.unused_bytes, &tally.late_bytes, &tally.brought_bytes].map(Counter::value);
    let unread_bytes = brought_bytes.saturating_sub(used_bytes.saturating_add(unused_bytes));
    CauseStatus { brought_bytes, used_bytes, unused_bytes, unread_bytes, late_bytes }
}

/// Whether the last attempt to use it succeeded, if there was one.
fn is_reachable(server: &ServerStatus) -> Option<bool> {
    match (server.connections, &server.last_error) {
        (0, None) => None,
        (connections, _) => Some(connections > 0),
    }
}

fn upstream_figures(server: ServerStatus) -> UpstreamFigures {
    UpstreamFigures {
        uri: server.uri.to_string(),
        is_current: server.is_current,
        is_reachable: is_reachable(&server),
        connections: to_u64(server.connections),
        in_flight: to_u64(server.in_flight),
        received_bytes: server.received_bytes,
        requests: server.requests,
        retries: server.retries,
        wrong_replies: server.wrong_replies,
        is_set_aside: server.set_aside_for.is_some(),
        latency: server.latency,
    }
}

fn upstream(server: ServerStatus) -> UpstreamStatus {
    UpstreamStatus {
        uri: server.uri.to_string(),
        current: server.is_current,
        reachable: is_reachable(&server),
        received_bytes: server.received_bytes,
        requests: server.requests,
        wrong_replies: server.wrong_replies,
        set_aside_seconds: server.set_aside_for.map(|time| time.as_secs_f64()),
        last_error: server.last_error,
    }
}

impl Mirrors {
    /// How operators name a generation: by its image, an older one by its content too.
    pub(super) fn operated_name(&self, generation: &Arc<Generation>) -> String {
        let name = &generation.image.name;
        let is_newest = self.newest(name).is_some_and(|newest| Arc::ptr_eq(&newest, generation));
        match generation.mirror.image() {
            Some(identity) if !is_newest => format!("{name}@{identity}"),
            _ => name.clone(),
        }
    }

    /// The generation that an operator names: by its image, or an older one by its content too.
    pub(super) fn find(&self, name: &str) -> Result<Arc<Generation>, Refusal> {
        let of_content = || {
            let generations = self.generations();
            let is_it = |generation: &&Arc<Generation>| {
                let identity = generation.mirror.image();
                identity.is_some_and(|identity| format!("{}@{identity}", generation.image.name) == name)
            };
            generations.iter().find(is_it).cloned()
        };
        self.newest(name).or_else(of_content).ok_or_else(|| Refusal::UnknownImage(name.to_owned()))
    }

    async fn change_pins(
        &self,
        image: String,
        ranges: Option<Vec<ByteRange>>,
        is_pinned: bool,
    ) -> Result<PinReport, Refusal> {
        let generation = self.find(&image)?;
        let mirror = &generation.mirror;
        let size = mirror.size();
        let ranges = ranges.unwrap_or_else(|| vec![ByteRange::between(0, size)]);
        if let Some(range) = ranges.iter().find(|range| range.end() > size) {
            let end = range.end();
            return Err(Refusal::Invalid(format!("{image:?} has {size} bytes, and the range ends at {end}")));
        }
        let result = if is_pinned { mirror.pin(&ranges).await } else { mirror.unpin(&ranges).await };
        match result {
            Ok(Pinned { bytes, here }) => Ok(PinReport { pinned_bytes: bytes, missing_bytes: bytes - here }),
            Err(error @ PinError::NoRoom { .. }) => Err(Refusal::Conflict(error.to_string())),
            Err(error @ PinError::Disk(_)) => Err(Refusal::Failed(error.to_string())),
        }
    }

    async fn begin_scrub(&self, image: String, order: VerifyOrder) -> Result<u64, Refusal> {
        let generation = self.find(&image)?;
        let workers = self.0.workers.upgrade().ok_or_else(|| Refusal::Failed("the server is ending".to_owned()))?;
        let job = self.0.jobs.begin(&image, generation.mirror.size())?;
        let id = job.id();
        let mirror = generation.mirror.clone();
        workers.run(move || async move { scrub(&mirror, job, order).await }).await;
        Ok(id)
    }
}

async fn scrub(mirror: &Mirror, job: RunningJob, order: VerifyOrder) {
    let scrub = Scrub { rate: order.rate, repair: order.repair };
    let outcome = tokio::select! {
        () = mirror.scrub(scrub, job.progress()) => Outcome::Done,
        () = job.cancelled() => Outcome::Cancelled,
    };
    job.end(outcome);
}

impl Operated for Mirrors {
    fn role(&self) -> Role {
        Role::Mirror
    }

    fn images(&self) -> Vec<ImageStatus> {
        let generations = self.generations().clone();
        let status = |generation: &Arc<Generation>| generation.status(self.operated_name(generation));
        let mut images: Vec<_> = generations.iter().map(status).collect();
        images.sort_by(|one, other| one.name.cmp(&other.name));
        images
    }

    fn figures(&self) -> Vec<MirrorFigures> {
        let generations = self.generations().clone();
        let figures = |generation: &Arc<Generation>| generation.figures(self.operated_name(generation));
        let mut figures: Vec<_> = generations.iter().map(figures).collect();
        figures.sort_by(|one, other| one.image.cmp(&other.image));
        figures
    }

    fn cache(&self) -> Option<CacheStatus> {
        let (space, usage) = (&self.0.space, self.0.space.usage());
        let (settings, stats) = (space.settings(), space.stats());
        Some(CacheStatus {
            path: space.root().display().to_string(),
            limit_bytes: settings.limit,
            // Two figures that are not of the same moment.
            allocated_bytes: usage.used.saturating_sub(usage.in_flight),
            in_flight_bytes: usage.in_flight,
            pinned_bytes: usage.pinned,
            reserve_bytes: settings.reserve,
            free_bytes: usage.free,
            policy: Some(settings.policy.to_string()),
            evictions: stats.evicted_chunks.value(),
            bypassed: stats.bypassed_chunks.value(),
            thrashing: usage.is_thrashing,
            failed: usage.is_disk_out,
            deduplicated_bytes: stats.deduplicated_bytes.value(),
        })
    }

    fn link(&self) -> Option<LinkStatus> {
        let link = self.0.engine.link();
        Some(LinkStatus { window_bytes: link.window, in_flight_bytes: link.in_flight, rate: link.rate })
    }

    fn jobs(&self) -> &Jobs {
        &self.0.jobs
    }

    fn pin(&self, image: String, ranges: Option<Vec<ByteRange>>) -> Answer<'_, PinReport> {
        Box::pin(self.change_pins(image, ranges, true))
    }

    fn unpin(&self, image: String, ranges: Option<Vec<ByteRange>>) -> Answer<'_, PinReport> {
        Box::pin(self.change_pins(image, ranges, false))
    }

    fn profiles(&self, image: &str) -> Result<Arc<Store>, Refusal> {
        let generation = self.find(image)?;
        generation.profiles.identify(generation.mirror.image());
        Ok(Arc::clone(&generation.profiles))
    }

    fn verify(&self, image: String, order: VerifyOrder) -> Answer<'_, u64> {
        Box::pin(self.begin_scrub(image, order))
    }

    fn prefetch(&self, image: String, order: PrefetchOrder) -> Answer<'_, PrefetchReport> {
        Box::pin(self.take_order(image, order))
    }

    fn orders(&self) -> Vec<OrderStatus> {
        self.order_list()
    }

    fn order(&self, id: u64) -> Option<OrderStatus> {
        self.order_status(id)
    }

    fn receptions(&self) -> Vec<ReceptionStatus> {
        self.reception_list()
    }

    fn words(&self) -> Words {
        self.0.receptions.words().clone()
    }

    fn settings(&self) -> Settings {
        let (rates, space) = (self.0.engine.rates(), self.0.space.settings());
        Settings {
            fill_rate: Some(rates.server),
            image_fill_rate: Some(rates.image),
            cache_size: Some(space.limit),
            reserve: Some(space.reserve),
            ..Settings::default()
        }
    }

    fn change_settings(&self, order: &Settings) -> Result<(), Refusal> {
        let (rates, space) = (self.0.engine.rates(), self.0.space.settings());
        if order.cache_size.is_some() || order.reserve.is_some() {
            let resized =
                self.0.space.resize(order.cache_size.unwrap_or(space.limit), order.reserve.unwrap_or(space.reserve));
            resized.map_err(|error| Refusal::Conflict(error.to_string()))?;
        }
        // From here on nothing is refused.
        self.0.engine.set_rates(Rates {
            server: order.fill_rate.unwrap_or(rates.server),
            image: order.image_fill_rate.unwrap_or(rates.image),
        });
        Ok(())
    }

    fn cancel_order(&self, id: u64) -> Answer<'_, Option<OrderStatus>> {
        Box::pin(self.call_off(id))
    }
}
