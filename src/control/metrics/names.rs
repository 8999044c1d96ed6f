//! All metrics there are: names, kinds, and what they say.
//!
//! `docs/metrics.md` is about the same; tests hold one against the other, and the dashboard against both.

use super::text::{Kind, Metric};

macro_rules! metrics {
    ($($constant:ident: $kind:ident $name:literal $help:literal;)*) => {
        $(pub(super) const $constant: Metric = Metric { name: $name, kind: Kind::$kind, help: $help };)*

        /// Each of them, in the order in which they are written.
        #[cfg(test)]
        pub(super) const ALL: &[Metric] = &[$($constant),*];
    };
}

metrics! {
    BUILD: Gauge "headwater_build_info" "Always 1; the labels say which program it is and what it does";
    UPTIME: Gauge "headwater_uptime_seconds" "How long the server has been serving";
    DRAINING: Gauge "headwater_draining" "Whether newcomers to any export are sent away";
    DRAINING_EXPORTS: Gauge "headwater_draining_exports" "Exports whose newcomers are sent away by name";

    ACCEPTED: Counter "headwater_connections_accepted_total" "Connections accepted";
    ENDED: Counter "headwater_connections_ended_total" "Connections that have ended, by reason";
    CLIENTS: Gauge "headwater_clients" "Clients that are connected";
    RELAYED: Gauge "headwater_clients_relayed" "Of these, clients that are served from another server";
    IN_FLIGHT: Gauge "headwater_requests_in_flight" "Requests that wait for something, as of each connection's last turn";
    BYTES_IN_FLIGHT: Gauge "headwater_request_bytes_in_flight" "Bytes that requests and replies hold";

    REQUESTS: Counter "headwater_requests_total" "Requests answered, errors too";
    REQUEST_BYTES: Counter "headwater_request_bytes_total" "Bytes of the image that requests without an error were about";
    REQUEST_ERRORS: Counter "headwater_request_errors_total" "Requests answered with an error";
    REQUEST_DURATION: Histogram "headwater_request_duration_seconds"
        "From when a request had arrived until its answer was on its way";

    IMAGE: Gauge "headwater_image_bytes" "The size of the image";
    RESIDENT: Gauge "headwater_image_resident_bytes" "Bytes of a mirror that are here, durably";
    ZERO: Gauge "headwater_image_zero_bytes" "Bytes of a mirror that are known to be zero";
    PINNED: Gauge "headwater_image_pinned_bytes" "Bytes of a mirror that are never evicted";
    VERIFIED: Gauge "headwater_image_verified" "Whether a mirror has a manifest that everything is held against";

    HITS: Counter "headwater_mirror_hits_total" "Chunks that were here when a client asked for them";
    MISSES: Counter "headwater_mirror_misses_total" "Chunks that were not";
    JOINS: Counter "headwater_mirror_joins_total" "Of the misses, chunks for which a fetch was under way already";
    HIT_BYTES: Counter "headwater_mirror_hit_bytes_total" "Bytes answered from here";
    MISS_BYTES: Counter "headwater_mirror_miss_bytes_total" "Bytes that clients had to wait for";
    EVICTED: Counter "headwater_mirror_evicted_chunks_total" "Chunks removed to make room";
    VERIFY_FAILURES: Counter "headwater_mirror_verify_failures_total"
        "Chunks whose bytes were not those of the image, by where they came from";
    UNSTORED: Counter "headwater_mirror_unstored_chunks_total" "Chunks that were answered but could not be stored";
    DEDUPLICATED: Counter "headwater_mirror_deduplicated_bytes_total"
        "Bytes that were not fetched because another image here had them";
    MAP_DAMAGED: Counter "headwater_mirror_damaged_map_pages_total" "Pages of the map that could not be read at the start";

    FILL: Counter "headwater_fill_bytes_total" "Bytes brought here, whole chunks, by why they were";
    FILL_USED: Counter "headwater_fill_used_bytes_total" "Of these, chunks that a client read";
    FILL_UNUSED: Counter "headwater_fill_unused_bytes_total" "Of these, chunks that went before a client read them";
    FILL_LATE: Counter "headwater_fill_late_bytes_total"
        "Of what was used, chunks that a client wanted while they were on their way";
    FILL_UNREAD: Gauge "headwater_fill_unread_bytes" "Of what was brought, chunks that are here and that no client has read";

    UPSTREAM_UP: Gauge "headwater_upstream_up" "Whether the last attempt to use the server succeeded";
    UPSTREAM_CURRENT: Gauge "headwater_upstream_current" "Whether requests go to the server now";
    UPSTREAM_ASIDE: Gauge "headwater_upstream_set_aside" "Whether it is used only if no other can be, because it sent wrong bytes";
    UPSTREAM_CONNECTIONS: Gauge "headwater_upstream_connections" "Connections to the server that are open";
    UPSTREAM_IN_FLIGHT: Gauge "headwater_upstream_requests_in_flight" "Requests to the server that wait for an answer";
    UPSTREAM_REQUESTS: Counter "headwater_upstream_requests_total" "Requests that the server answered";
    UPSTREAM_BYTES: Counter "headwater_upstream_received_bytes_total" "Bytes of data received from the server, holes not counted";
    UPSTREAM_RETRIES: Counter "headwater_upstream_retries_total"
        "Requests that the server was asked after they had failed, there or elsewhere";
    UPSTREAM_WRONG: Counter "headwater_upstream_wrong_replies_total" "Replies of the server with wrong bytes";
    UPSTREAM_DURATION: Histogram "headwater_upstream_request_duration_seconds"
        "From when a request was handed to a connection until its answer was there";

    CACHE: Gauge "headwater_cache_allocated_bytes" "Bytes of the disk that the cache takes";
    CACHE_LIMIT: Gauge "headwater_cache_limit_bytes" "Bytes that it may take; not there if there is no limit";
    CACHE_IN_FLIGHT: Gauge "headwater_cache_in_flight_bytes" "Bytes that it will take when what is being fetched has come";
    CACHE_PINNED: Gauge "headwater_cache_pinned_bytes" "Bytes of it that are never evicted";
    CACHE_RESERVE: Gauge "headwater_cache_reserve_bytes" "Bytes of its file system that are to be left free";
    CACHE_FREE: Gauge "headwater_cache_free_bytes" "Bytes of its file system that are free";
    CACHE_EVICTED: Counter "headwater_cache_evicted_chunks_total" "Chunks removed to make room, of all images";
    CACHE_BYPASSED: Counter "headwater_cache_bypassed_chunks_total" "Chunks that were answered and not kept, because there was no room";
    CACHE_THRASHING: Gauge "headwater_cache_thrashing" "Whether chunks are evicted that are fetched again soon after";
    CACHE_FAILED: Gauge "headwater_cache_failed" "Whether its disk has failed, so that nothing is kept";

    LINK_WINDOW: Gauge "headwater_fill_window_bytes" "Bytes of fills that may be under way together";
    LINK_IN_FLIGHT: Gauge "headwater_fill_in_flight_bytes" "Bytes of fills that are under way";
    PREFETCH_ORDERS: Gauge "headwater_prefetch_orders" "Orders to prefetch that are known, by state";
    PREFETCH_MISSING: Gauge "headwater_prefetch_missing_bytes" "Bytes that active orders are for and that are not here yet";
    PREFETCH_LATE: Gauge "headwater_prefetch_late_orders" "Active orders that are expected to miss their deadlines";

    REDIRECTS_ACTIVE: Gauge "headwater_redirects_active" "Orders to move clients that are at work";
    REDIRECTS: Counter "headwater_redirects_ended_total" "Orders to move clients that have ended, by result";
    REDIRECT_PENDING: Gauge "headwater_redirect_clients_pending" "Clients that wait to be moved, or are being moved";
    REDIRECT_CLIENTS: Counter "headwater_redirect_clients_total" "Clients of orders to move them, by result";

    CASTS: Gauge "headwater_casts" "Casts at work, by how far they are";
    CASTS_ENDED: Counter "headwater_casts_ended_total" "Casts that have ended, by result";
    CAST_SENT: Counter "headwater_cast_sent_bytes_total" "Bytes sent to groups";
    CAST_RECEIVERS: Gauge "headwater_cast_receivers" "Receivers of the casts at work, by how they are";
    HEARD: Counter "headwater_cast_heard_bytes_total" "Bytes of all datagrams heard in a group, as long as it is listened to";
    HEARD_OVERFLOWED: Counter "headwater_cast_heard_overflowed_datagrams_total"
        "Datagrams that the system threw away because they were not taken in time";
    HEARD_REJECTED: Counter "headwater_cast_heard_rejected_datagrams_total" "Datagrams with a wrong tag, or malformed";

    PROCESS_CPU: Counter "process_cpu_seconds_total" "Time of processors that the process has used, in user mode and in the kernel";
    PROCESS_RESIDENT: Gauge "process_resident_memory_bytes" "Memory of the process, its share of caches of files not counted";
    PROCESS_VIRTUAL: Gauge "process_virtual_memory_bytes" "Address space of the process";
    PROCESS_THREADS: Gauge "process_threads" "Threads of the process";
    PROCESS_START: Gauge "process_start_time_seconds" "When the process started, since 1970";
    PROCESS_FDS: Gauge "process_open_fds" "Open file descriptors";
    PROCESS_MAX_FDS: Gauge "process_max_fds" "The limit of open file descriptors";
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Value;
    use std::collections::{BTreeMap, BTreeSet};

    const TABLE: &str = include_str!("../../../docs/metrics.md");
    const DASHBOARD: &str = include_str!("../../../docs/grafana.json");

    /// Rows of the document that are about a metric: its name and its type.
    fn documented() -> BTreeMap<&'static str, &'static str> {
        let rows = TABLE.lines().filter_map(|line| line.strip_prefix("| `")?.split_once('`'));
        let metrics = rows.filter(|(name, _)| name.starts_with("headwater_") || name.starts_with("process_"));
        metrics.map(|(name, rest)| (name, rest.split('|').nth(1).unwrap_or_default().trim())).collect()
    }

    /// All words in a text that may be names of metrics.
    fn mentioned(text: &str) -> impl Iterator<Item = &str> {
        let words = text.split(|character: char| !character.is_ascii_alphanumeric() && character != '_');
        words.filter(|word| word.starts_with("headwater_") || word.starts_with("process_"))
    }

    /// The name of the metric that a series belongs to.
    fn metric_of(series: &str) -> &str {
        let mut histograms = ALL.iter().filter(|metric| metric.kind == Kind::Histogram).map(|metric| metric.name);
        let is_of = |name: &&str| matches!(series.strip_prefix(*name), Some("_bucket" | "_sum" | "_count"));
        histograms.find(is_of).unwrap_or(series)
    }

    fn expressions(value: &Value, found: &mut Vec<String>) {
        match value {
            Value::Object(fields) => {
                for (name, field) in fields {
                    match field.as_str() {
                        Some(text) if name == "expr" || name == "query" => found.push(text.to_owned()),
                        _ => expressions(field, found),
                    }
                }
            }
            Value::Array(items) => items.iter().for_each(|item| expressions(item, found)),
            _ => {}
        }
    }

    #[test]
    fn names_say_what_they_are() {
        let names: BTreeSet<_> = ALL.iter().map(|metric| metric.name).collect();
        assert_eq!(names.len(), ALL.len(), "each is there once");
        for Metric { name, kind, help } in ALL {
            assert_eq!(name.ends_with("_total"), *kind == Kind::Counter, "{name}");
            assert!(*kind != Kind::Histogram || name.ends_with("_seconds"), "{name}");
            assert!(!help.is_empty() && !help.ends_with('.') && !help.contains('\n'), "{name}");
        }
    }

    #[test]
    fn the_document_has_each_of_them_and_no_other() {
        let ours: BTreeMap<_, _> = ALL.iter().map(|metric| (metric.name, metric.kind.name())).collect();
        assert_eq!(documented(), ours);
        for word in mentioned(TABLE) {
            assert!(ours.contains_key(metric_of(word)), "the document speaks of {word}, which there is not");
        }
    }

    #[test]
    fn the_dashboard_shows_what_there_is() {
        let dashboard: Value = serde_json::from_str(DASHBOARD).unwrap();
        let mut found = Vec::new();
        expressions(&dashboard, &mut found);
        let words: BTreeSet<_> = found.iter().flat_map(|text| mentioned(text)).map(metric_of).collect();
        let unknown: Vec<_> = words.iter().filter(|word| ALL.iter().all(|metric| metric.name != **word)).collect();
        assert_eq!(unknown, Vec::<&&str>::new());
        assert!(words.len() > 30, "{words:?}");
    }
}
