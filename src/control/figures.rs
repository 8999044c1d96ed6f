//! What happened to images since the server started, as counters that are cheap to ask for: once a second, or more
//! often. What takes a look at every chunk is in `status`.

use std::collections::BTreeMap;

use super::status::CauseStatus;
use crate::telemetry::latency::Spread;

/// What happened to one mirror.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct MirrorFigures {
    /// The image, as operators name it.
    pub image: String,
    /// Names its cache.
    pub node: String,
    /// Chunks that were here when they were asked for.
    pub hits: u64,
    /// Chunks that were not.
    pub misses: u64,
    /// Of these, chunks for which a fetch was under way already: no fetch of their own.
    pub joins: u64,
    /// Bytes answered from here.
    pub hit_bytes: u64,
    /// Bytes that clients had to wait for.
    pub miss_bytes: u64,
    /// Chunks removed to make room.
    pub evicted_chunks: u64,
    /// Chunks in the cache whose bytes were not what they should be.
    pub damaged_chunks: u64,
    /// Replies of upstreams that were not the bytes of the image.
    pub wrong_replies: u64,
    /// Chunks that were answered but could not be stored.
    pub unstored_chunks: u64,
    /// Bytes that were not fetched because another image of this cache had them.
    pub deduplicated_bytes: u64,
    /// What came of what was brought, by why it was.
    pub fill: BTreeMap<&'static str, CauseStatus>,
    /// Where it comes from, in order of preference.
    pub upstreams: Vec<UpstreamFigures>,
}

/// What happened between a mirror and one server that it is filled from.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct UpstreamFigures {
    /// Its address.
    pub uri: String,
    /// Whether requests go there now.
    pub is_current: bool,
    /// Whether the last attempt to use it succeeded; `None` if there was none.
    pub is_reachable: Option<bool>,
    /// Connections that are open.
    pub connections: u64,
    /// Requests that were sent and are not answered yet.
    pub in_flight: u64,
    /// Bytes of data received, holes not counted.
    pub received_bytes: u64,
    /// Requests that it answered.
    pub requests: u64,
    /// Requests that it was asked after they had failed, there or elsewhere.
    pub retries: u64,
    /// Replies with wrong bytes.
    pub wrong_replies: u64,
    /// Whether it is not asked for a while, because it lied.
    pub is_set_aside: bool,
    /// From a request to its answer.
    pub latency: Spread,
}
