//! `/metrics`: what a server has done, for Prometheus.
//!
//! | file | holds |
//! | --- | --- |
//! | this one | the request, and the values of all metrics |
//! | `names` | which there are |
//! | `text` | the form |
//! | `process` | what the kernel says of the process |
//!
//! Owns: which figures are told, and by which labels. Does not own: the figures. Labels are names of exports and images,
//! addresses of upstreams and groups, and words of ours; never clients, of which there may be any number.
//!
//! **Bounds.** 1024 exports of 8 operations, of which those are told that were asked for; images, upstreams and groups as
//! far as they are configured.

mod names;
mod process;
mod text;

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use self::text::Text;
use super::api::{Api, Problem, Shared, gather};
use super::casts::order::{CastState, ReceiverState};
use super::figures::MirrorFigures;
use super::prefetch::OrderState;
use super::status::{CacheStatus, ImageStatus, MirrorStatus, Status};
use crate::server::figures::{ExportFigures, Operation};
use crate::units::to_u64;

/// The exposition format, and its version.
const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// `GET /metrics`.
pub(super) fn routes() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::new().routes(routes!(metrics))
}

/// What the server has done, for Prometheus.
///
/// In the text format, version 0.0.4. `docs/metrics.md` says what each metric means.
#[utoipa::path(get, path = "/metrics", tag = "figures",
    responses((status = 200, description = "Metrics", body = String, content_type = "text/plain")))]
async fn metrics(State(api): Shared) -> Result<impl IntoResponse, Problem> {
    let text = gather(api, write).await?;
    Ok(([(header::CONTENT_TYPE, CONTENT_TYPE)], text))
}

/// All metrics. Blocks.
fn write(api: &Api) -> String {
    let mut text = Text::default();
    // First what is counted, last what it may be a part of: a request is counted before its client is seen without it.
    let exports = api.site().steering.figures.all();
    let mirrors = api.operated().figures();
    let status = api.status();
    write_server(&mut text, api, &status);
    write_clients(&mut text, &status, &exports);
    write_exports(&mut text, &exports);
    write_images(&mut text, &status.images);
    write_mirrors(&mut text, &mirrors);
    write_fills(&mut text, &mirrors);
    write_upstreams(&mut text, &mirrors);
    write_cache(&mut text, status.cache.as_ref());
    write_orders(&mut text, api, &status);
    write_redirects(&mut text, api);
    write_casts(&mut text, api, &status);
    process::write(&mut text);
    text.into_string()
}

fn write_server(text: &mut Text, api: &Api, status: &Status) {
    text.add(&names::BUILD, &[("version", &status.version), ("role", &status.role.to_string())], 1);
    text.add(&names::UPTIME, &[], status.uptime_seconds);
    text.add(&names::DRAINING, &[], status.draining.all);
    text.add(&names::DRAINING_EXPORTS, &[], to_u64(status.draining.exports.len()));
    let connections = api.site().steering.figures.connections();
    text.add(&names::ACCEPTED, &[], connections.accepted());
    for (reason, count) in connections.ended() {
        text.add(&names::ENDED, &[("reason", reason)], count);
    }
}

/// Clients of one export.
#[derive(Debug, Default)]
struct Crowd {
    clients: u64,
    relayed: u64,
    requests_in_flight: u64,
    bytes_in_flight: u64,
}

fn write_clients(text: &mut Text, status: &Status, exports: &[(String, Arc<ExportFigures>)]) {
    // Those whose clients have left have none.
    let mut crowds: BTreeMap<&str, Crowd> = exports.iter().map(|(name, _)| (&**name, Crowd::default())).collect();
    for client in &status.clients {
        let crowd = crowds.entry(&client.export).or_default();
        crowd.clients += 1;
        crowd.relayed += u64::from(client.relayed_to.is_some());
        crowd.requests_in_flight += client.requests_in_flight;
        crowd.bytes_in_flight += client.bytes_in_flight;
    }
    for (metric, of) in [
        (&names::CLIENTS, (|crowd| crowd.clients) as fn(&Crowd) -> u64),
        (&names::RELAYED, |crowd| crowd.relayed),
        (&names::IN_FLIGHT, |crowd| crowd.requests_in_flight),
        (&names::BYTES_IN_FLIGHT, |crowd| crowd.bytes_in_flight),
    ] {
        crowds.iter().for_each(|(export, crowd)| text.add(metric, &[("export", export)], of(crowd)));
    }
}

fn write_exports(text: &mut Text, exports: &[(String, Arc<ExportFigures>)]) {
    let operations = exports.iter().flat_map(|(export, figures)| {
        Operation::ALL.into_iter().map(move |operation| (&**export, operation, figures.counts(operation)))
    });
    // Each export has reads: what is there from the beginning can be seen to grow.
    let is_told = |requests: u64, operation| requests > 0 || operation == Operation::Read;
    let all: Vec<_> = operations.filter(|(_, operation, counts)| is_told(counts.requests, *operation)).collect();
    let labels = |export, operation: Operation| [("export", export), ("operation", operation.name())];
    for (export, operation, counts) in &all {
        text.add(&names::REQUESTS, &labels(*export, *operation), counts.requests);
    }
    for (export, operation, counts) in &all {
        text.add(&names::REQUEST_BYTES, &labels(*export, *operation), counts.bytes);
    }
    for (export, operation, counts) in &all {
        let [export, operation] = labels(export, *operation);
        // The one that alarms are about is there before it is needed.
        let mut errors = BTreeMap::from([("EIO", 0)]);
        errors.extend(&counts.errors);
        for (errno, count) in errors {
            text.add(&names::REQUEST_ERRORS, &[export, operation, ("errno", errno)], count);
        }
    }
    for (export, operation, counts) in &all {
        text.add_histogram(&names::REQUEST_DURATION, &labels(*export, *operation), &counts.latency);
    }
}

fn write_images(text: &mut Text, images: &[ImageStatus]) {
    for image in images {
        text.add(&names::IMAGE, &[("image", &image.name)], image.size);
    }
    for (metric, of) in [
        (&names::RESIDENT, (|mirror| mirror.resident_bytes) as fn(&MirrorStatus) -> u64),
        (&names::ZERO, |mirror| mirror.zero_bytes),
        (&names::PINNED, |mirror| mirror.pinned_bytes),
        (&names::VERIFIED, |mirror| mirror.verified.into()),
        (&names::MAP_DAMAGED, |mirror| mirror.damaged_pages),
    ] {
        for image in images {
            if let Some(mirror) = &image.mirror {
                text.add(metric, &[("image", &image.name)], of(mirror));
            }
        }
    }
}

fn write_mirrors(text: &mut Text, mirrors: &[MirrorFigures]) {
    for (metric, of) in [
        (&names::HITS, (|mirror| mirror.hits) as fn(&MirrorFigures) -> u64),
        (&names::MISSES, |mirror| mirror.misses),
        (&names::JOINS, |mirror| mirror.joins),
        (&names::HIT_BYTES, |mirror| mirror.hit_bytes),
        (&names::MISS_BYTES, |mirror| mirror.miss_bytes),
        (&names::EVICTED, |mirror| mirror.evicted_chunks),
        (&names::UNSTORED, |mirror| mirror.unstored_chunks),
        (&names::DEDUPLICATED, |mirror| mirror.deduplicated_bytes),
    ] {
        mirrors.iter().for_each(|mirror| text.add(metric, &[("image", &mirror.image)], of(mirror)));
    }
    for mirror in mirrors {
        let from = |place| [("image", &*mirror.image), ("source", place)];
        text.add(&names::VERIFY_FAILURES, &from("cache"), mirror.damaged_chunks);
        text.add(&names::VERIFY_FAILURES, &from("upstream"), mirror.wrong_replies);
    }
}

fn write_fills(text: &mut Text, mirrors: &[MirrorFigures]) {
    for (metric, of) in [
        (&names::FILL, (|fill| fill.brought_bytes) as fn(&super::status::CauseStatus) -> u64),
        (&names::FILL_USED, |fill| fill.used_bytes),
        (&names::FILL_UNUSED, |fill| fill.unused_bytes),
        (&names::FILL_LATE, |fill| fill.late_bytes),
        (&names::FILL_UNREAD, |fill| fill.unread_bytes),
    ] {
        for mirror in mirrors {
            for (cause, fill) in &mirror.fill {
                text.add(metric, &[("image", &mirror.image), ("cause", cause)], of(fill));
            }
        }
    }
}

fn write_upstreams(text: &mut Text, mirrors: &[MirrorFigures]) {
    let all = || mirrors.iter().flat_map(|mirror| mirror.upstreams.iter().map(move |upstream| (mirror, upstream)));
    for (mirror, upstream) in all() {
        // One that nobody has tried is neither up nor down.
        if let Some(is_up) = upstream.is_reachable {
            text.add(&names::UPSTREAM_UP, &[("image", &mirror.image), ("upstream", &upstream.uri)], is_up);
        }
    }
    for (metric, of) in [
        (&names::UPSTREAM_CURRENT, (|one| one.is_current.into()) as fn(&super::figures::UpstreamFigures) -> u64),
        (&names::UPSTREAM_ASIDE, |one| one.is_set_aside.into()),
        (&names::UPSTREAM_CONNECTIONS, |one| one.connections),
        (&names::UPSTREAM_IN_FLIGHT, |one| one.in_flight),
        (&names::UPSTREAM_REQUESTS, |one| one.requests),
        (&names::UPSTREAM_BYTES, |one| one.received_bytes),
        (&names::UPSTREAM_RETRIES, |one| one.retries),
        (&names::UPSTREAM_WRONG, |one| one.wrong_replies),
    ] {
        for (mirror, upstream) in all() {
            text.add(metric, &[("image", &mirror.image), ("upstream", &upstream.uri)], of(upstream));
        }
    }
    for (mirror, upstream) in all() {
        let labels = [("image", &*mirror.image), ("upstream", &*upstream.uri)];
        text.add_histogram(&names::UPSTREAM_DURATION, &labels, &upstream.latency);
    }
}

fn write_cache(text: &mut Text, cache: Option<&CacheStatus>) {
    let Some(cache) = cache else { return };
    text.add(&names::CACHE, &[], cache.allocated_bytes);
    if let Some(limit) = cache.limit_bytes {
        text.add(&names::CACHE_LIMIT, &[], limit);
    }
    text.add(&names::CACHE_IN_FLIGHT, &[], cache.in_flight_bytes);
    text.add(&names::CACHE_PINNED, &[], cache.pinned_bytes);
    text.add(&names::CACHE_RESERVE, &[], cache.reserve_bytes);
    if let Some(free) = cache.free_bytes {
        text.add(&names::CACHE_FREE, &[], free);
    }
    text.add(&names::CACHE_EVICTED, &[], cache.evictions);
    text.add(&names::CACHE_BYPASSED, &[], cache.bypassed);
    text.add(&names::CACHE_THRASHING, &[], cache.thrashing);
    text.add(&names::CACHE_FAILED, &[], cache.failed);
}

fn write_orders(text: &mut Text, api: &Api, status: &Status) {
    let Some(link) = status.link else { return };
    text.add(&names::LINK_WINDOW, &[], link.window_bytes);
    text.add(&names::LINK_IN_FLIGHT, &[], link.in_flight_bytes);
    let orders = api.operated().orders();
    for (state, name) in [
        (OrderState::Active, "active"),
        (OrderState::Done, "done"),
        (OrderState::Cancelled, "cancelled"),
        (OrderState::Failed, "failed"),
    ] {
        let count = to_u64(orders.iter().filter(|order| order.state == state).count());
        text.add(&names::PREFETCH_ORDERS, &[("state", name)], count);
    }
    let active = || orders.iter().filter(|order| order.state == OrderState::Active);
    let missing = active().map(|order| order.total_bytes.saturating_sub(order.here_bytes)).sum::<u64>();
    text.add(&names::PREFETCH_MISSING, &[], missing);
    let is_late = |late: Option<f64>| late.is_some_and(|late| late > 0.0);
    text.add(&names::PREFETCH_LATE, &[], to_u64(active().filter(|order| is_late(order.late_by_seconds)).count()));
}

fn write_redirects(text: &mut Text, api: &Api) {
    let totals = api.redirects().totals();
    text.add(&names::REDIRECTS_ACTIVE, &[], totals.active);
    for (result, count) in [("done", totals.done), ("failed", totals.failed), ("cancelled", totals.cancelled)] {
        text.add(&names::REDIRECTS, &[("result", result)], count);
    }
    let clients = &totals.clients;
    text.add(&names::REDIRECT_PENDING, &[], clients.waiting + clients.moving);
    for (result, count) in
        [("moved", clients.moved), ("stayed", clients.stayed), ("left", clients.left), ("failed", clients.failed)]
    {
        text.add(&names::REDIRECT_CLIENTS, &[("result", result)], count);
    }
}

fn write_casts(text: &mut Text, api: &Api, status: &Status) {
    for state in [CastState::Waiting, CastState::Sending, CastState::Ending] {
        let count = to_u64(status.casts.iter().filter(|cast| cast.state == state).count());
        text.add(&names::CASTS, &[("state", state.name())], count);
    }
    let totals = api.casts().totals();
    for (result, count) in [("done", totals.done), ("failed", totals.failed), ("cancelled", totals.cancelled)] {
        text.add(&names::CASTS_ENDED, &[("result", result)], count);
    }
    text.add(&names::CAST_SENT, &[], totals.sent_bytes);
    for state in [
        ReceiverState::Receiving,
        ReceiverState::Complete,
        ReceiverState::Left,
        ReceiverState::Dropped,
        ReceiverState::Silent,
    ] {
        let receivers = status.casts.iter().flat_map(|cast| &cast.receivers);
        let count = to_u64(receivers.filter(|receiver| receiver.state == state).count());
        text.add(&names::CAST_RECEIVERS, &[("state", state.name())], count);
    }
    for (metric, of) in [
        (&names::HEARD, (|heard| heard.bytes) as fn(&super::status::ReceptionStatus) -> u64),
        (&names::HEARD_OVERFLOWED, |heard| heard.overflowed),
        (&names::HEARD_REJECTED, |heard| heard.forged + heard.broken),
    ] {
        // By several interfaces it is one group.
        let mut groups: BTreeMap<&str, u64> = BTreeMap::new();
        status.receptions.iter().for_each(|heard| *groups.entry(&heard.group).or_default() += of(heard));
        groups.iter().for_each(|(group, count)| text.add(metric, &[("group", group)], *count));
    }
}
