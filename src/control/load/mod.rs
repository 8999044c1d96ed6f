//! STUB (part O). What a server does just now: rates and latencies of the last seconds, as types that the server writes and
//! commands, the status page and the balancer read.
//!
//! Owns: one sample a second, of counters that others keep, and what follows from two of them. Does not own: the
//! counters (`server::figures`, [`super::figures`]).

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;

use super::api::Api;
use std::sync::Arc;

/// `GET /v1/load?seconds=N`: what a server did in the last N seconds, 5 unless told, 60 at most.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Load {
    /// The number of the last sample; there is one each second.
    pub sample: u64,
    /// When it was taken: seconds since 1970.
    pub at: f64,
    /// How long the time is that the rates are about; 0 before the second sample.
    pub seconds: f64,
    /// All clients together.
    pub total: Rates,
    /// Each export that had clients, by name.
    pub exports: Vec<ExportLoad>,
    /// Each client that is connected, oldest first.
    pub clients: Vec<ClientLoad>,
    /// Each server that mirrors here are filled from.
    pub upstreams: Vec<UpstreamLoad>,
}

/// How much, and how fast.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Rates {
    /// Requests answered per second.
    pub requests_per_second: f64,
    /// Bytes read per second.
    pub read_bytes_per_second: f64,
    /// Bytes written per second.
    pub written_bytes_per_second: f64,
    /// Answers with an error per second.
    pub errors_per_second: f64,
    /// Requests that wait for something now.
    pub in_flight: u64,
    /// How long requests took; `null` if there was none.
    pub latency: Option<Latency>,
}

/// How long requests took, from their arrival until the answer was on its way, in milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Latency {
    /// On average.
    pub mean_ms: f64,
    /// Half of them took at most so long.
    pub p50_ms: f64,
    /// 99 % of them.
    pub p99_ms: f64,
    /// The longest.
    pub longest_ms: f64,
}

/// One export.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct ExportLoad {
    /// Its full name.
    pub export: String,
    /// Clients now.
    pub clients: u64,
    /// What they did.
    pub rates: Rates,
    /// Bytes per second answered from a mirror's cache; 0 for a real image.
    pub hit_bytes_per_second: f64,
    /// Bytes per second that clients of a mirror had to wait for.
    pub miss_bytes_per_second: f64,
}

/// One client.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct ClientLoad {
    /// Its number, as in the status.
    pub id: u64,
    /// Its address.
    pub peer: String,
    /// The export that it uses.
    pub export: String,
    /// The mirror that it belongs to, if it is one and says which.
    pub mirror: Option<String>,
    /// What it did. Of its latency only the average is known: the other figures are `null` or left at 0.
    pub rates: Rates,
    /// How long its requests took on average, in milliseconds; `null` if there was none.
    pub mean_ms: Option<f64>,
}

/// One server that a mirror is filled from.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct UpstreamLoad {
    /// The image of the mirror.
    pub image: String,
    /// The name of the mirror's cache, as the upstream sees it in [`ClientLoad::mirror`].
    pub node: String,
    /// The server.
    pub uri: String,
    /// Whether requests go there now.
    pub current: bool,
    /// Whether the last attempt to use it succeeded; `null` if there was none.
    pub reachable: Option<bool>,
    /// Bytes received per second.
    pub bytes_per_second: f64,
    /// Requests answered per second.
    pub requests_per_second: f64,
    /// How long they took; `null` if there was none.
    pub latency: Option<Latency>,
}

/// `GET /v1/history`: the last minutes, a value each second, oldest first; all lists are equally long.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct History {
    /// The number of the last sample.
    pub sample: u64,
    /// When each sample was taken: seconds since 1970.
    pub at: Vec<f64>,
    /// Each export that had clients, by name.
    pub exports: Vec<ExportHistory>,
}

/// One export. Before it had its first client the values are 0 and `null`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct ExportHistory {
    /// Its full name.
    pub export: String,
    /// Requests answered in that second.
    pub requests: Vec<u64>,
    /// Bytes read and written in that second.
    pub bytes: Vec<u64>,
    /// Half of its requests took at most so long, in milliseconds.
    pub p50_ms: Vec<Option<f64>>,
    /// 99 % of them.
    pub p99_ms: Vec<Option<f64>>,
}

/// `GET /v1/load` and `GET /v1/history`.
pub(super) fn routes() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::new()
}
