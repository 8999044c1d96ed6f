//! All counters of a server at one moment.
//!
//! Owns: asking for them. Does not own: counting, and what follows from two samples (`series`).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::UNIX_EPOCH;

use crate::clock;
use crate::control::Operated;
use crate::control::api::Site;
use crate::control::figures::MirrorFigures;
use crate::server::figures::{ExportFigures, Operation};
use crate::server::{ClientStatus, Steering};
use crate::telemetry::latency::Spread;

/// Where the counters are.
#[derive(Debug)]
pub(super) struct Source {
    operated: Arc<dyn Operated>,
    steering: Steering,
}

impl Source {
    pub(super) fn of(site: &Site) -> Self {
        Self { operated: Arc::clone(&site.operated), steering: site.steering.clone() }
    }

    /// As they are now. Takes as long as there are clients and exports to be asked; no look at any chunk.
    pub(super) fn sample(&self) -> Sample {
        let now = clock::moment();
        let exports = self.steering.figures.all();
        Sample {
            steady: now.steady.into(),
            at: now.wall.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs_f64(),
            exports: exports.into_iter().map(|(name, figures)| (name.into(), Counted::of(&figures))).collect(),
            clients: self.steering.clients.list(),
            mirrors: self.operated.figures(),
        }
    }
}

/// All counters at one moment.
#[derive(Debug, Clone, Default)]
pub(super) struct Sample {
    /// When, by a clock that nobody sets; `None` before there was a sample.
    pub(super) steady: Option<std::time::Instant>,
    /// When, in seconds since 1970.
    pub(super) at: f64,
    /// What the clients of each export have asked for, those that have left too.
    pub(super) exports: BTreeMap<Arc<str>, Counted>,
    /// Who is connected, oldest first.
    pub(super) clients: Vec<ClientStatus>,
    /// What happened to each mirror.
    pub(super) mirrors: Vec<MirrorFigures>,
}

/// What was asked of one export, so far or in some time.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Counted {
    pub(super) requests: u64,
    pub(super) read_bytes: u64,
    pub(super) written_bytes: u64,
    pub(super) errors: u64,
    pub(super) latency: Spread,
}

impl Counted {
    fn of(figures: &ExportFigures) -> Self {
        let mut all = Self::default();
        for operation in Operation::ALL {
            let counts = figures.counts(operation);
            all.requests += counts.requests;
            all.errors += counts.errors.values().sum::<u64>();
            match operation {
                Operation::Read => all.read_bytes += counts.bytes,
                Operation::Write | Operation::WriteZeroes => all.written_bytes += counts.bytes,
                Operation::Flush | Operation::Trim | Operation::BlockStatus | Operation::Cache | Operation::Unknown => {}
            }
            if is_waited_for(operation) {
                all.latency.add(&counts.latency);
            }
        }
        all
    }

    /// What was added since `earlier`. Counters that are lower than they were have begun anew.
    pub(super) fn since(&self, earlier: &Self) -> Self {
        if self.requests < earlier.requests || self.latency.count() < earlier.latency.count() {
            return self.clone();
        }
        Self {
            requests: grown(self.requests, earlier.requests),
            read_bytes: grown(self.read_bytes, earlier.read_bytes),
            written_bytes: grown(self.written_bytes, earlier.written_bytes),
            errors: grown(self.errors, earlier.errors),
            latency: self.latency.since(&earlier.latency),
        }
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.read_bytes += other.read_bytes;
        self.written_bytes += other.written_bytes;
        self.errors += other.errors;
        self.latency.add(&other.latency);
    }

    pub(super) fn is_nothing(&self) -> bool {
        *self == Self::default()
    }
}

/// By how much a counter has grown; all of it if it has begun anew.
pub(super) const fn grown(now: u64, earlier: u64) -> u64 {
    match now.checked_sub(earlier) {
        Some(grown) => grown,
        None => now,
    }
}

/// Whether a machine stands still until it is done: what is asked about the image is not, nor what is fetched for later.
const fn is_waited_for(operation: Operation) -> bool {
    !matches!(operation, Operation::BlockStatus | Operation::Cache)
}
