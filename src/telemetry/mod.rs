//! What is told about a running server: logs, and counters that are cheap enough to keep always.
//!
//! Owns: the form of logs, the types of counters and of histograms. Does not own: what is counted and what it means (each
//! room counts its own), and how it is told (`control`).

pub mod latency;

use std::fmt;
use std::io::{self, IsTerminal};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tracing::level_filters::LevelFilter;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Registry, reload};

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Starts logging to the standard error stream. Without a `format`, a terminal gets text and anything else JSON.
/// Only the first call in a process counts.
pub fn start_logging(level: LevelFilter, format: Option<LogFormat>) {
    let terminal = io::stderr().is_terminal();
    let format = format.unwrap_or(if terminal { LogFormat::Text } else { LogFormat::Json });
    let (filter, handle) = reload::Layer::new(level);
    let layer = tracing_subscriber::fmt::layer().with_writer(io::stderr).with_target(false);
    let layer = match format {
        LogFormat::Text => layer.with_ansi(terminal).compact().boxed(),
        LogFormat::Json => layer.json().flatten_event(true).with_current_span(false).boxed(),
    };
    // A second subscriber is refused, which is what the contract says.
    if tracing_subscriber::registry().with(filter).with(layer).try_init().is_ok() {
        LOG_LEVEL.get_or_init(|| handle);
    }
}

/// That of the process, which has one log.
static LOG_LEVEL: OnceLock<reload::Handle<LevelFilter, Registry>> = OnceLock::new();

/// How much is logged; `None`: this process has no log.
pub fn log_level() -> Option<LevelFilter> {
    LOG_LEVEL.get()?.clone_current()
}

/// Logs so much from now on. Gives whether there is a log.
pub fn set_log_level(level: LevelFilter) -> bool {
    LOG_LEVEL.get().is_some_and(|handle| handle.reload(level).is_ok())
}

/// A number that only grows. Any thread may add; readers see some recent value.
#[derive(Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Zero.
    pub const fn new() -> Self {
        Self(AtomicU64::new(0))
    }

    /// Adds `amount`.
    pub fn add(&self, amount: u64) {
        self.0.fetch_add(amount, Ordering::Relaxed);
    }

    /// The value now.
    pub fn value(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for Counter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.value().fmt(f)
    }
}

/// Places of what is counted by thread; threads beyond share them.
const SHARDS: usize = 16;

static NEXT_SHARD: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    /// Where this thread adds.
    static SHARD: usize = NEXT_SHARD.fetch_add(1, Ordering::Relaxed) % SHARDS;
}

/// Where this thread adds.
fn shard() -> usize {
    SHARD.with(|shard| *shard)
}

/// A [`Counter`] for what happens a million times a second: each thread adds in a place of its own, so that no two
/// processors want the same cache line.
#[derive(Default)]
pub struct ShardedCounter([Shard; SHARDS]);

/// As large as what processors fetch together.
#[derive(Default)]
#[repr(align(128))]
struct Shard(AtomicU64);

impl ShardedCounter {
    /// Adds `amount`.
    pub fn add(&self, amount: u64) {
        self.0[shard()].0.fetch_add(amount, Ordering::Relaxed);
    }

    /// The value now.
    pub fn value(&self) -> u64 {
        self.0.iter().map(|shard| shard.0.load(Ordering::Relaxed)).sum()
    }
}

impl fmt::Debug for ShardedCounter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.value().fmt(f)
    }
}

/// Lets one message through, then none of its kind for a while.
#[derive(Debug)]
pub struct Seldom {
    every: Duration,
    /// When the last one went through, and how many were held back since.
    last: Mutex<(Option<Instant>, u64)>,
}

impl Seldom {
    /// At most one message in each period of this length.
    pub const fn new(every: Duration) -> Self {
        Self { every, last: Mutex::new((None, 0)) }
    }

    /// Whether to say it now; if so, how many were held back before.
    pub fn now(&self, now: Instant) -> Option<u64> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.0.is_some_and(|time| now.saturating_duration_since(time) < self.every) {
            last.1 += 1;
            return None;
        }
        last.0 = Some(now);
        Some(std::mem::take(&mut last.1))
    }
}

/// How often a line is logged that strangers can cause.
pub const SELDOM: Duration = Duration::from_secs(1);

/// Logs, with the level and the fields of `tracing`, what strangers can cause: at most once in [`SELDOM`] for each place in
/// the code that says so, with how many were left out before. Those that are left out are logged with the level `debug`.
macro_rules! seldom {
    ($level:ident, $($line:tt)+) => {{
        static LAST: $crate::telemetry::Seldom = $crate::telemetry::Seldom::new($crate::telemetry::SELDOM);
        match LAST.now($crate::clock::now()) {
            Some(0) => tracing::$level!($($line)+),
            Some(left_out) => tracing::$level!(left_out, $($line)+),
            None => tracing::debug!($($line)+),
        }
    }};
}
pub(crate) use seldom;

/// Letters of a stranger's text that are logged.
const SHOWN: usize = 64;

/// A stranger's text as it is logged: its beginning, with everything escaped that could look like something else.
pub fn foreign(text: &str) -> String {
    let mut shown: String = text.chars().take(SHOWN).flat_map(char::escape_debug).collect();
    if text.chars().nth(SHOWN).is_some() {
        shown.push_str("...");
    }
    shown
}

/// Ends the process here, as a crash would, if the environment names this point in `HEADWATER_CRASH_AT`. Only in
/// debug builds: tests stop at each step of the order of writing, and look at what the next start finds.
pub fn crash_point(name: &str) {
    if is_crash_point(name) {
        std::process::abort();
    }
}

/// Whether the process is to end at this point.
pub fn is_crash_point(name: &str) -> bool {
    cfg!(debug_assertions) && std::env::var("HEADWATER_CRASH_AT").is_ok_and(|wanted| wanted == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_thread_loses_a_count() {
        let counter = ShardedCounter::default();
        std::thread::scope(|scope| {
            for _ in 0..SHARDS + 3 {
                scope.spawn(|| (0..1000).for_each(|_| counter.add(2)));
            }
        });
        assert_eq!(counter.value(), 2000 * (SHARDS as u64 + 3));
    }

    #[test]
    fn what_strangers_say_is_cut_and_escaped() {
        assert_eq!(foreign("debian12"), "debian12");
        assert_eq!(foreign("a\n\u{1b}[31m\"b\u{202e}"), "a\\n\\u{1b}[31m\\\"b\\u{202e}");
        let long = foreign(&"é".repeat(5000));
        assert_eq!((long.chars().count(), &long[long.len() - 3..]), (SHOWN + 3, "..."));
        assert_eq!(foreign(&"x".repeat(SHOWN)), "x".repeat(SHOWN));
    }

    #[test]
    fn seldom_lets_one_through_and_counts_the_rest() {
        let seldom = Seldom::new(Duration::from_secs(10));
        let start = crate::clock::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(seldom.now(at(0)), Some(0));
        assert_eq!(seldom.now(at(5)), None);
        assert_eq!(seldom.now(at(9)), None);
        assert_eq!(seldom.now(at(10)), Some(2));
        assert_eq!(seldom.now(at(11)), None);
    }
}
