//! What a server does just now: rates and latencies of the last seconds, as types that the server writes and commands,
//! the status page and the balancer read.
//!
//! | file | holds |
//! | --- | --- |
//! | this one | what is said; one sample a second, for whoever asks |
//! | `sample` | all counters at one moment |
//! | `series` | what follows from one sample after the other (pure) |
//! | `routes` | requests |
//!
//! Owns: one sample a second, of counters that others keep, and what follows from two of them. Does not own: the
//! counters (`server::figures`, [`super::figures`]).
//!
//! A sample that is late counts for the time that it covers; those that were missed meanwhile are not made up for. Whoever
//! asks gets what the last sample left, and waits for nobody.
//!
//! **Bounds.** 60 samples are kept whole, for rates, and 300 as four numbers for each export, for the history. 256 exports
//! and 256 upstreams have rates of their own; what is beyond them counts in the total alone, until one of the 256 has done
//! nothing for 5 minutes. In memory: 300 x 64 bytes for each export (5 MiB at most), 60 x 56 bytes for each client, and for
//! each export and upstream 60 histograms of one second, of some 25 bytes for each class of latencies that occurred in it:
//! nothing for those that nobody uses, 50 to 100 KiB for a busy one, 650 KiB if all 448 classes occur in each second.

mod routes;
mod sample;
mod series;

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio::time::MissedTickBehavior;
use utoipa::ToSchema;

use super::api::Site;
pub(super) use routes::routes;
use sample::Source;
use series::{Series, View};

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

/// How long reads, writes, flushes, trims and zeroing took, from their arrival until the answer was on its way, in
/// milliseconds. BLOCK_STATUS and CACHE are not in it: no machine stands still for them.
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

/// Between two samples.
const PERIOD: Duration = Duration::from_secs(1);

/// What a server does just now, for whoever asks. Cheap to clone; all clones are one.
#[derive(Debug, Clone)]
pub(super) struct Loads(watch::Receiver<Arc<View>>);

impl Loads {
    /// Takes the first sample of a server, and gives the work of taking the others, which never ends.
    pub(super) fn keep(site: &Site) -> (Self, impl Future<Output = ()> + use<>) {
        let (source, mut series) = (Source::of(site), Series::default());
        series.note(source.sample());
        let (sender, receiver) = watch::channel(series.view());
        let work = async move {
            let mut ticks = tokio::time::interval(PERIOD);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
            ticks.tick().await;
            loop {
                ticks.tick().await;
                series.note(source.sample());
                sender.send_replace(series.view());
            }
        };
        (Self(receiver), work)
    }

    /// What it did in the last `seconds`, 1 to 60.
    pub(super) fn load(&self, seconds: u32) -> Load {
        self.view().load(seconds)
    }

    /// Its last minutes.
    pub(super) fn history(&self) -> History {
        self.view().history()
    }

    /// Nothing is computed while others wait to put the next one there.
    fn view(&self) -> Arc<View> {
        Arc::clone(&self.0.borrow())
    }
}
