//! The tree of tiers: several servers and what flows between them, as the status page shows it.
//!
//! | file | holds |
//! | --- | --- |
//! | this one | its form in JSON, and the route |
//! | `gather` | asking the other servers, one gathering at a time |
//! | `join` | what they say, put together (pure) |
//!
//! Owns: asking the other servers of a tree, and joining what they say. Does not own: what each says of itself.

mod gather;
mod join;

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::api::{Answered, Api, Shared};
use super::load::{ExportLoad, Latency, Rates};
pub use gather::{MOST_NEIGHBOURS, Neighbours};
pub use join::{Said, Seen, join};

/// `GET /v1/tree`: this server, its neighbours (`--neighbours`), and what flows between them. At most a second old.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Tree {
    /// Each server once, this one first; those that were only heard of come last.
    pub servers: Vec<TreeServer>,
    /// What flows between two of them, by the mirror's image.
    pub edges: Vec<TreeEdge>,
    /// Clients that are no mirrors, by server and export.
    pub clients: Vec<TreeClients>,
    /// Mirrors that no neighbour knows and that are left out, because there are too many.
    pub left_out: u64,
}

/// One server.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct TreeServer {
    /// Names it within this answer.
    pub id: String,
    /// A short name for people: not always one of its own.
    pub name: String,
    /// Whether it is the one that was asked for the tree.
    pub this: bool,
    /// Whether it answers; `null` for one that was not asked, because it is no neighbour.
    pub reachable: Option<bool>,
    /// Why it does not answer.
    pub error: Option<String>,
    /// How long ago it answered last, if it does not now; what is said of it is of then. `null` if it never did.
    pub seen_seconds_ago: Option<f64>,
    /// Its admin API, if it is a neighbour.
    pub admin: Option<String>,
    /// The name of its machine.
    pub host: Option<String>,
    /// `serve` or `mirror`.
    pub role: Option<String>,
    /// The version of its program.
    pub version: Option<String>,
    /// Its process.
    pub pid: Option<u32>,
    /// How long it has been serving.
    pub uptime_seconds: Option<f64>,
    /// Where clients connect to.
    pub listen: Vec<String>,
    /// The number of its sample that the rates are of.
    pub sample: u64,
    /// When that was taken: seconds since 1970.
    pub at: f64,
    /// Clients that are connected, mirrors too.
    pub connections: u64,
    /// All its clients together.
    pub total: Rates,
    /// Each export.
    pub exports: Vec<ExportLoad>,
    /// Each image.
    pub images: Vec<TreeImage>,
    /// Whether it is out of service, or an export of it is.
    pub draining: bool,
    /// Whether its cache has failed.
    pub cache_failed: bool,
    /// Whether its cache is too small for its load.
    pub thrashing: bool,
}

/// How much of an image is on a server.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct TreeImage {
    /// Its name there.
    pub name: String,
    /// Its bytes.
    pub size: u64,
    /// Here, checked and durable: all of it for a real image.
    pub resident_bytes: u64,
    /// Known to be zero and not stored.
    pub zero_bytes: u64,
    /// Pinned.
    pub pinned_bytes: u64,
}

/// What flows from a server to a mirror.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct TreeEdge {
    /// The server that is read from, by [`TreeServer::id`].
    pub from: String,
    /// The mirror.
    pub to: String,
    /// The image, by its name at the mirror if that is known.
    pub image: String,
    /// The name of the mirror's cache.
    pub node: String,
    /// How the mirror names the server; `null` if only the server tells of it.
    pub uri: Option<String>,
    /// Connections that the server sees.
    pub connections: u64,
    /// Whether the mirror's requests go there now.
    pub current: bool,
    /// Whether the last attempt to use it succeeded; `null` if there was none.
    pub reachable: Option<bool>,
    /// Bytes per second.
    pub bytes_per_second: f64,
    /// Requests answered per second.
    pub requests_per_second: f64,
    /// How long they took, as the mirror saw it; `null` if there was none.
    pub latency: Option<Latency>,
}

/// The clients of one export that are no mirrors.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct TreeClients {
    /// Their server.
    pub server: String,
    /// The export.
    pub export: String,
    /// How many there are.
    pub count: u64,
    /// Requests answered per second.
    pub requests_per_second: f64,
    /// Bytes read per second.
    pub read_bytes_per_second: f64,
    /// Bytes written per second.
    pub written_bytes_per_second: f64,
    /// Answers with an error per second.
    pub errors_per_second: f64,
    /// Requests that wait for something.
    pub in_flight: u64,
    /// How long requests took on average, in milliseconds; `null` if there was none.
    pub mean_ms: Option<f64>,
}

/// `GET /v1/tree`.
pub(super) fn routes() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::new().routes(routes!(tree))
}

/// This server, its neighbours, and what flows between them.
///
/// The neighbours (`--neighbours`) are asked by their own admin API; the answer is a second old at most.
#[utoipa::path(get, path = "/v1/tree", tag = "figures", responses((status = 200, body = Tree)))]
async fn tree(State(api): Shared) -> Answered<Tree> {
    Ok(Json((*gather::tree(&api).await?).clone()))
}
