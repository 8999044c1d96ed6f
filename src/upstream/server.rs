//! What is known of one server, for as long as it is in the list.
//!
//! Owns: what was counted of it, whether it is trusted, what went wrong last. Does not own: connections, and which server
//! is used (`pool`). A server that is in the list before a redirect and after it stays the same: it is shared by the
//! pools, and so are its counters and what is held against it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Mutex as AsyncMutex;
use tokio::time::Instant;

use super::opening::OpenFailure;
use super::trust::{Record, Rules};
use crate::clock;
use crate::nbd::Uri;
use crate::telemetry::latency::{Latencies, Spread};
use crate::telemetry::{Counter, Seldom};

/// How one server is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerStatus {
    /// The server.
    pub uri: Uri,
    /// Whether requests go there now.
    pub is_current: bool,
    /// Connections that are open.
    pub connections: usize,
    /// Bytes of data received, holes not counted.
    pub received_bytes: u64,
    /// Requests answered.
    pub requests: u64,
    /// Requests that wait for an answer.
    pub in_flight: usize,
    /// Requests that it was asked after they had failed, there or elsewhere.
    pub retries: u64,
    /// From a request to its answer.
    pub latency: Spread,
    /// Reads that it answered with other bytes than those of the image.
    pub wrong_replies: u64,
    /// For how much longer it is used only if no other server can be, because it sent wrong bytes repeatedly.
    pub set_aside_for: Option<Duration>,
    /// What went wrong last, if anything did since a connection was opened.
    pub last_error: Option<String>,
}

/// How much came over.
#[derive(Debug, Default)]
pub struct Stats {
    /// Bytes of data received, holes not counted.
    pub received_bytes: Counter,
    /// Requests answered.
    pub requests: Counter,
    /// Connections opened.
    pub connections: Counter,
    /// Requests that were tried again; of one server: that it was asked after they had failed, there or elsewhere.
    pub retries: Counter,
    /// From when a request was handed to a connection until its answer was there.
    pub latencies: Latencies,
    /// Reads that one server answered with other bytes than those of the image.
    pub wrong_replies: Counter,
}

/// Wrong replies of one server are logged once in this time.
const LIES_EVERY: Duration = Duration::from_secs(10);

/// Why there is no connection to a certain server.
#[derive(Debug, Clone)]
pub(super) struct Unusable {
    /// Whether it answered, and is not what it should be.
    pub(super) is_final: bool,
    pub(super) reason: String,
}

impl From<&OpenFailure> for Unusable {
    fn from(failure: &OpenFailure) -> Self {
        Self { is_final: failure.is_final(), reason: failure.to_string() }
    }
}

/// One server.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) uri: Uri,
    pub(super) stats: Arc<Stats>,
    /// Lets its lies into the log.
    pub(super) lies: Seldom,
    /// Held while a connection to this very server is opened for those who must have its answer.
    pub(super) opening: AsyncMutex<()>,
    /// Whether it said, when it was connected to last, that it tells news.
    tells_news: AtomicBool,
    /// Locked for a moment, also by whoever has locked a pool.
    health: Mutex<Health>,
}

#[derive(Debug, Default)]
struct Health {
    trust: Record,
    /// Why it could not be connected to when it was tried last, if it could not.
    unusable: Option<(Instant, Unusable)>,
    /// The last thing that went wrong since it was connected to.
    last_error: Option<String>,
}

impl Server {
    pub(super) fn new(uri: Uri) -> Self {
        Self {
            uri,
            stats: Arc::default(),
            lies: Seldom::new(LIES_EVERY),
            opening: AsyncMutex::default(),
            tells_news: AtomicBool::new(false),
            health: Mutex::default(),
        }
    }

    fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For how much longer it is set aside, if it is.
    pub(super) fn aside(&self) -> Option<Duration> {
        self.health().trust.aside(clock::now())
    }

    /// Takes note of a wrong reply. Tells for how long the server is set aside, if it is from now on.
    pub(super) fn lied(&self, rules: &Rules) -> Option<Duration> {
        self.health().trust.lied(clock::now(), rules)
    }

    pub(super) fn last_error(&self) -> Option<String> {
        self.health().last_error.clone()
    }

    pub(super) fn went_wrong(&self, reason: String) {
        self.health().last_error = Some(reason);
    }

    /// It was tried to connect to it.
    pub(super) fn tried(&self, unusable: Option<Unusable>) {
        let mut health = self.health();
        health.last_error = unusable.as_ref().map(|unusable| unusable.reason.clone());
        health.unusable = unusable.map(|unusable| (Instant::now(), unusable));
    }

    /// Why it could not be connected to, if that was tried last after `time`.
    pub(super) fn unusable_since(&self, time: Instant) -> Option<Unusable> {
        let health = self.health();
        health.unusable.as_ref().filter(|(at, _)| *at >= time).map(|(_, unusable)| unusable.clone())
    }

    pub(super) fn tells_news(&self) -> bool {
        self.tells_news.load(Ordering::Relaxed)
    }

    pub(super) fn set_tells_news(&self, tells: bool) {
        self.tells_news.store(tells, Ordering::Relaxed);
    }
}
