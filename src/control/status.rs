//! What is said over the admin API, as types that the server writes and the command line reads. Field names are those
//! of the JSON; all sizes are in bytes, all counts are since the server started.
//!
//! What a server says may grow new fields, so whoever reads it skips those that it does not know. What a server is
//! asked is held to the letter: an unknown field is an error.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

pub use super::casts::order::{
    CastList, CastOrder, CastState, CastStatus, CastTaken, HeardStatus, ReceiverState, ReceiverStatus, ReceptionStatus,
};
pub use super::prefetch::{Late, OrderList, OrderState, OrderStatus, PrefetchOrder, PrefetchReport};
pub use super::redirect::order::{
    ClientReport, ClientState, Counts, DrainOrder, DrainStatus, RedirectList, RedirectOrder, RedirectState,
    RedirectStatus, RedirectTaken, Way,
};
pub use crate::server::ClientStatus;

/// `GET /v1/status`: all that is to be known of a server.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Status {
    /// The version of the program.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// What it does.
    pub role: Role,
    /// How long it has been serving.
    pub uptime_seconds: f64,
    /// Its images, by name.
    pub images: Vec<ImageStatus>,
    /// Its clients, oldest first.
    pub clients: Vec<ClientStatus>,
    /// The cache that all mirrors share; `null` if there is none.
    pub cache: Option<CacheStatus>,
    /// How it is filled ahead of demand; `null` if nothing is.
    #[serde(default)]
    pub link: Option<LinkStatus>,
    /// The active orders to prefetch, oldest first.
    #[serde(default)]
    pub orders: Vec<OrderStatus>,
    /// The active orders to move clients, oldest first.
    #[serde(default)]
    pub redirects: Vec<RedirectStatus>,
    /// The casts at work, oldest first.
    #[serde(default)]
    pub casts: Vec<CastStatus>,
    /// The groups that mirrors hear.
    #[serde(default)]
    pub receptions: Vec<ReceptionStatus>,
    /// What is out of service.
    #[serde(default)]
    pub draining: DrainStatus,
    /// Where clients connect to: URIs without the name of an export, as they are seen from this machine.
    #[serde(default)]
    pub listen: Vec<String>,
    /// Names this process, as long as it runs: drawn at random.
    #[serde(default)]
    pub server: String,
    /// The name of the machine.
    #[serde(default)]
    pub host: String,
    /// The jobs at work, oldest first.
    #[serde(default)]
    pub jobs: Vec<JobStatus>,
}

/// What a server does.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// `headwater serve`.
    #[default]
    Serve,
    /// `headwater mirror`.
    Mirror,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Serve => "serve",
            Self::Mirror => "mirror",
        })
    }
}

/// Where the bytes of an image are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// All of them are here.
    Real,
    /// They come from an upstream.
    Mirror,
}

/// One image.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ImageStatus {
    /// Its name.
    pub name: String,
    /// Where its bytes are.
    pub kind: Kind,
    /// Its size.
    pub size: u64,
    /// Whether clients may write to it.
    pub writable: bool,
    /// The unit of digests, for a mirror of fetching too; `null` for a real image without a manifest.
    pub chunk_size: Option<u32>,
    /// What it holds, as `blake3-...`; `null` if that is not known.
    pub identity: Option<String>,
    /// The file of a real image, the cache directory of a mirror.
    pub path: String,
    /// How many clients use it now.
    #[serde(default)]
    pub clients: u64,
    /// The rest, for a mirror; `null` for a real image.
    pub mirror: Option<MirrorStatus>,
}

/// What a mirror has and has done.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct MirrorStatus {
    /// Whether there is a manifest that everything is held against.
    pub verified: bool,
    /// Here, checked and durable.
    pub resident_bytes: u64,
    /// Of the chunks that are pinned: never evicted. A part of them may not be here yet.
    pub pinned_bytes: u64,
    /// Known to be zero and not stored.
    pub zero_bytes: u64,
    /// Not fetched because another image of this cache had them.
    pub deduplicated_bytes: u64,
    /// Chunks that were here when they were asked for.
    pub hits: u64,
    /// Chunks that were not.
    pub misses: u64,
    /// Bytes answered from here.
    pub hit_bytes: u64,
    /// Bytes that clients had to wait for.
    pub miss_bytes: u64,
    /// Chunks removed to make room.
    pub evictions: u64,
    /// Their bytes.
    pub evicted_bytes: u64,
    /// Chunks, fetched or in the cache, whose bytes were not what they should be.
    pub verify_failures: u64,
    /// Pages of the map that could not be read at the start; what they named is fetched again.
    pub damaged_pages: u64,
    /// Chunks that were answered but could not be stored.
    pub unstored_chunks: u64,
    /// Bytes that came from upstreams.
    pub upstream_bytes: u64,
    /// What came of what was brought, by why it was: `demand`, `readahead`, `profile`, `prefetch`, `background`, `multicast`.
    pub fill: BTreeMap<String, CauseStatus>,
    /// Where they come from, in order of preference.
    pub upstreams: Vec<UpstreamStatus>,
}

/// What came of what was brought because of one thing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct CauseStatus {
    /// Brought here, whole chunks.
    pub brought_bytes: u64,
    /// Of them, chunks that a client read.
    pub used_bytes: u64,
    /// Of them, chunks that were evicted, or never stored, before a client read them.
    pub unused_bytes: u64,
    /// Of them, chunks that are here and that no client has read.
    pub unread_bytes: u64,
    /// Of what was used, chunks that a client wanted while they were on their way.
    pub late_bytes: u64,
}

/// How the link to the upstreams is used by what nobody waits for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct LinkStatus {
    /// Bytes that may be on their way.
    pub window_bytes: u64,
    /// Bytes that are.
    pub in_flight_bytes: u64,
    /// Bytes per second, lately; `null` while that is not known.
    pub rate: Option<u64>,
}

/// One server that a mirror is filled from.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct UpstreamStatus {
    /// Its address.
    pub uri: String,
    /// Whether requests go there now.
    pub current: bool,
    /// Whether the last attempt to use it succeeded; `null` if there was none.
    pub reachable: Option<bool>,
    /// Bytes received from it.
    pub received_bytes: u64,
    /// Requests that it answered.
    pub requests: u64,
    /// Replies with wrong bytes.
    pub wrong_replies: u64,
    /// It is not asked for so long, because it lied; `null` if it may be asked.
    pub set_aside_seconds: Option<f64>,
    /// What went wrong last.
    pub last_error: Option<String>,
}

/// The cache of a server's mirrors.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct CacheStatus {
    /// Its directory.
    pub path: String,
    /// The bound, `--cache-size`; `null` if there is none.
    pub limit_bytes: Option<u64>,
    /// Allocated on disk now.
    pub allocated_bytes: u64,
    /// Reserved for what is being fetched.
    pub in_flight_bytes: u64,
    /// Allocated, and never evicted.
    pub pinned_bytes: u64,
    /// What is left free of the file system, `--reserve`.
    pub reserve_bytes: u64,
    /// Free in the file system now; `null` if it cannot say.
    pub free_bytes: Option<u64>,
    /// The order of eviction, `--policy`; `null` if nothing is evicted.
    pub policy: Option<String>,
    /// Chunks removed to make room.
    pub evictions: u64,
    /// Chunks answered without being stored, because storing them would not have paid.
    pub bypassed: u64,
    /// Whether the working set is larger than the cache.
    pub thrashing: bool,
    /// Whether the disk has failed so often that it is not used any more.
    pub failed: bool,
    /// Saved by chunks that several images share.
    pub deduplicated_bytes: u64,
}

/// A part of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Range {
    /// Its first byte.
    pub start: u64,
    /// Its bytes.
    #[schema(minimum = 1)]
    pub length: u64,
}

/// `POST /v1/images/NAME/pin` and `.../unpin`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PinOrder {
    /// Which parts; `null` for all of it.
    pub ranges: Option<Vec<Range>>,
}

/// The answer to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PinReport {
    /// Pinned of the image now.
    pub pinned_bytes: u64,
    /// Of them, not here yet.
    pub missing_bytes: u64,
}

/// `POST /v1/images/NAME/verify`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct VerifyOrder {
    /// Bytes per second at most; `null`: as fast as the disk allows.
    #[schema(minimum = 1)]
    pub rate: Option<u64>,
    /// Whether what is wrong is fetched again.
    pub repair: bool,
}

impl Default for VerifyOrder {
    fn default() -> Self {
        Self { rate: None, repair: true }
    }
}

/// The answer to orders that take long: ask for `GET /v1/jobs/ID`, or call them off with `DELETE`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct JobStarted {
    /// The number of the job.
    pub job: u64,
}

/// `GET /v1/jobs/ID`: how far a job has come.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct JobStatus {
    /// Its number.
    pub job: u64,
    /// The image that it works on.
    pub image: String,
    /// Whether it is at work, and if not, why.
    pub state: JobState,
    /// Why it failed.
    pub error: Option<String>,
    /// How long it has run.
    pub seconds: f64,
    /// Bytes to be looked at.
    pub total_bytes: u64,
    /// Bytes looked at.
    pub done_bytes: u64,
    /// Chunks that were checked.
    pub checked_chunks: u64,
    /// Those that were wrong.
    pub damaged_chunks: u64,
    /// Those of them that are right again.
    pub repaired_chunks: u64,
    /// Those of them that are not.
    pub unrepaired_chunks: u64,
}

/// Whether a job is at work.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum JobState {
    /// It is at work.
    Running,
    /// It came to its end.
    Done,
    /// It was called off.
    Cancelled,
    /// It could not go on.
    Failed,
}

/// The answer to `PUT` and `DELETE /v1/images/NAME/profile`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ProfileReport {
    /// Profiles that were replaced, or forgotten.
    pub tags: u64,
}

/// `GET /v1/exports`: what clients can connect to, by name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ExportList {
    /// Each of them.
    pub exports: Vec<ExportStatus>,
}

/// One export.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ExportStatus {
    /// Its name.
    pub name: String,
    /// Its size.
    pub size: u64,
    /// Whether clients may write to it.
    pub writable: bool,
    /// What clients are told that it can do, as `headwater info` prints it.
    pub flags: Vec<String>,
    /// How many clients use it now.
    pub clients: u64,
    /// Whether newcomers are sent away.
    pub draining: bool,
    /// What it holds, as `blake3-...`; `null` if that is not known.
    pub identity: Option<String>,
    /// A line for a human.
    pub description: String,
}

/// `GET /v1/clients`: who is connected, oldest first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ClientList {
    /// Each of them.
    pub clients: Vec<ClientStatus>,
}

/// `GET /v1/images`: all images, by name.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ImageList {
    /// Each of them.
    pub images: Vec<ImageStatus>,
}

/// `GET /v1/upstreams`: the servers that mirrors are filled from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct UpstreamList {
    /// By image, in order of preference.
    pub upstreams: Vec<ImageUpstream>,
}

/// A server that an image is filled from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ImageUpstream {
    /// The image.
    pub image: String,
    /// The server.
    #[serde(flatten)]
    pub upstream: UpstreamStatus,
}

/// `GET /v1/jobs`: those at work and the last that ended, oldest first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct JobList {
    /// Each of them.
    pub jobs: Vec<JobStatus>,
}

/// What everything that cannot be done is answered with, beside the status code.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Complaint {
    /// Why, for a human.
    pub error: String,
}
