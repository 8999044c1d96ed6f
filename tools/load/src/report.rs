//! What a run came to, for people and for programs.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Instant;

use hdrhistogram::Histogram;
use headwater::nbd::handshake::ReplyMode;
use headwater::units::to_u64;
use serde::{Deserialize, Serialize};

use crate::arguments::Arguments;
use crate::process::{Usage, to_f64};
use crate::traffic::Tally;

/// Wrong blocks and lost connections that are told one by one.
const TOLD: usize = 8;

/// What a run came to. Latencies are in microseconds.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// The form of replies that was negotiated.
    pub replies: String,
    /// Bytes of each request.
    pub size: u32,
    /// Requests in flight on each connection.
    pub depth: u32,
    /// Connections.
    pub connections: u32,
    /// How long it took.
    pub seconds: f64,
    /// Reads that succeeded.
    pub reads: u64,
    /// Writes that succeeded.
    pub writes: u64,
    /// Reads and writes per second.
    pub requests_per_second: f64,
    /// Bytes read and written per second.
    pub bytes_per_second: f64,
    /// Of reads and writes.
    pub latency: Latency,
    /// Flushes that succeeded, and their latency.
    pub flushes: u64,
    /// Of flushes.
    pub flush_latency: Latency,
    /// Failed requests by the name of the error.
    pub errors: BTreeMap<String, u64>,
    /// What became of lost connections.
    pub lost: Vec<String>,
    /// With a rate: requests that were due and were not answered by the end.
    pub behind: u64,
    /// How evenly the connections were served.
    pub fairness: Fairness,
    /// What --verify found.
    pub verified: Option<Verified>,
    /// What the server used.
    pub server: Option<ServerCost>,
}

/// Percentiles, in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the names are usual")]
pub struct Latency {
    pub mean: f64,
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub p99_9: f64,
    pub maximum: f64,
}

/// How evenly connections were served, in requests per second.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Fairness {
    /// Of the connection with the fewest.
    pub least: f64,
    /// Of the connection with the most.
    pub most: f64,
    /// The fewest divided by what each would have if all had the same.
    pub smallest_share: f64,
}

/// What was found of the data.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Verified {
    /// Blocks that were looked at.
    pub blocks: u64,
    /// Blocks that were wrong.
    pub wrong: u64,
    /// The first of them.
    pub first_wrong: Vec<WrongBytes>,
}

/// Wrong data.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WrongBytes {
    /// Where.
    pub offset: u64,
    /// What is there.
    pub what: String,
}

/// What the server used for each request, flushes included.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ServerCost {
    /// All of it.
    pub usage: Usage,
    /// Microseconds of CPU time.
    pub cpu_per_request: f64,
    /// Times that a thread waited.
    pub voluntary_switches_per_request: f64,
    /// Times that a thread had to let others run.
    pub involuntary_switches_per_request: f64,
    /// System calls, if they were counted.
    pub system_calls_per_request: Option<f64>,
    /// Why they were not.
    pub system_calls_missing: Option<String>,
}

/// What [`Report::new`] needs to know beside the tallies.
pub(crate) struct Circumstances<'a> {
    pub(crate) arguments: &'a Arguments,
    pub(crate) replies: ReplyMode,
    pub(crate) measure_from: Instant,
    /// When the time was up, if there was a limit.
    pub(crate) until: Option<Instant>,
    pub(crate) usage: Option<Usage>,
    /// The count, or why there is none.
    pub(crate) system_calls: Option<Result<u64, String>>,
}

impl Report {
    /// Adds up what was measured, and what was found when writes were read back.
    pub(crate) fn new(measured: &[Tally], read_back: &[Tally], of: &Circumstances<'_>) -> anyhow::Result<Self> {
        let arguments = of.arguments;
        let end = of.until.or_else(|| measured.iter().filter_map(|tally| tally.last).max());
        let seconds = end.map_or(0.0, |end| end.saturating_duration_since(of.measure_from).as_secs_f64());
        let sum = |value: fn(&Tally) -> u64| measured.iter().map(value).sum::<u64>();
        let (reads, writes, sent) = (sum(|tally| tally.reads), sum(|tally| tally.writes), sum(|tally| tally.sent));
        let flushes = sum(|tally| tally.flush_latencies.len());
        let requests_per_second = rate(reads + writes, seconds);
        let cost = of.usage.map(|usage| ServerCost::new(usage, reads + writes + flushes, sent, &of.system_calls));
        Ok(Self {
            replies: format!("{:?}", of.replies).to_lowercase(),
            size: arguments.size,
            depth: arguments.depth,
            connections: arguments.connections,
            seconds,
            reads,
            writes,
            requests_per_second,
            bytes_per_second: requests_per_second * f64::from(arguments.size),
            latency: Latency::of(measured.iter().map(|tally| &tally.latencies))?,
            flushes,
            flush_latency: Latency::of(measured.iter().map(|tally| &tally.flush_latencies))?,
            errors: errors(measured.iter().chain(read_back)),
            lost: lost(measured.iter().chain(read_back)),
            behind: sum(|tally| tally.behind),
            fairness: Fairness::new(measured, seconds),
            verified: arguments.verify.then(|| Verified::new(measured.iter().chain(read_back))),
            server: cost,
        })
    }

    /// Whether every request succeeded, no connection was lost and no byte was wrong.
    pub fn is_flawless(&self) -> bool {
        self.errors.is_empty() && self.lost.is_empty() && self.verified.as_ref().is_none_or(|found| found.wrong == 0)
    }
}

fn rate(count: u64, seconds: f64) -> f64 {
    if seconds > 0.0 { to_f64(count) / seconds } else { 0.0 }
}

fn errors<'a>(tallies: impl Iterator<Item = &'a Tally>) -> BTreeMap<String, u64> {
    let mut errors = BTreeMap::new();
    for (name, count) in tallies.flat_map(|tally| &tally.errors) {
        *errors.entry((*name).to_owned()).or_default() += count;
    }
    errors
}

fn lost<'a>(tallies: impl Iterator<Item = &'a Tally>) -> Vec<String> {
    tallies.filter_map(|tally| tally.lost.as_ref()).map(|error| format!("{error:#}")).take(TOLD).collect()
}

impl Latency {
    fn of<'a>(histograms: impl Iterator<Item = &'a Histogram<u64>>) -> anyhow::Result<Self> {
        let mut all = Histogram::<u64>::new(3)?;
        for histogram in histograms {
            all.add(histogram)?;
        }
        if all.is_empty() {
            return Ok(Self::default());
        }
        let at = |quantile| to_f64(all.value_at_quantile(quantile)) / 1000.0;
        Ok(Self {
            mean: all.mean() / 1000.0,
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p99_9: at(0.999),
            maximum: to_f64(all.max()) / 1000.0,
        })
    }
}

impl Fairness {
    fn new(tallies: &[Tally], seconds: f64) -> Self {
        let counts = || tallies.iter().map(|tally| tally.reads + tally.writes);
        let (least, most) = (counts().min().unwrap_or(0), counts().max().unwrap_or(0));
        let all: u64 = counts().sum();
        let fair = to_f64(all) / to_f64(to_u64(tallies.len().max(1)));
        let smallest_share = if fair > 0.0 { to_f64(least) / fair } else { 0.0 };
        Self { least: rate(least, seconds), most: rate(most, seconds), smallest_share }
    }
}

impl Verified {
    fn new<'a>(tallies: impl Iterator<Item = &'a Tally>) -> Self {
        let mut found = Self::default();
        for tally in tallies {
            found.blocks += tally.checked;
            found.wrong += tally.wrong;
            let told = tally.first_wrong.iter();
            found
                .first_wrong
                .extend(told.map(|wrong| WrongBytes { offset: wrong.offset, what: wrong.how.to_string() }));
        }
        found.first_wrong.sort_by_key(|wrong| wrong.offset);
        found.first_wrong.truncate(TOLD);
        found
    }
}

impl ServerCost {
    fn new(usage: Usage, counted: u64, sent: u64, system_calls: &Option<Result<u64, String>>) -> Self {
        let per = |amount: f64, requests: u64| if requests > 0 { amount / to_f64(requests) } else { 0.0 };
        Self {
            usage,
            cpu_per_request: per(usage.cpu_seconds * 1e6, counted),
            voluntary_switches_per_request: per(to_f64(usage.voluntary_switches), counted),
            involuntary_switches_per_request: per(to_f64(usage.involuntary_switches), counted),
            // perf counts from before the first request until after the last.
            system_calls_per_request: system_calls
                .as_ref()
                .and_then(|count| count.as_ref().ok())
                .map(|count| per(to_f64(*count), sent)),
            system_calls_missing: system_calls.as_ref().and_then(|count| count.as_ref().err().cloned()),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<9} {:>11} {:>9} {:>9} {:>9} {:>9} {:>9} {:>9}",
            "", "requests/s", "MB/s", "p50 µs", "p90", "p99", "p99.9", "max"
        )?;
        let megabytes = format!("{:.1}", self.bytes_per_second / 1e6);
        line(f, "all", self.requests_per_second, &megabytes, &self.latency)?;
        if self.flushes > 0 {
            line(f, "flush", rate(self.flushes, self.seconds), "", &self.flush_latency)?;
        }
        write!(
            f,
            "\n{} reads and {} writes of {} bytes in {:.2} s, {} in flight on each of {} connections, {} replies",
            self.reads, self.writes, self.size, self.seconds, self.depth, self.connections, self.replies
        )?;
        if self.connections > 1 {
            let Fairness { least, most, smallest_share } = self.fairness;
            write!(
                f,
                "\nconnections: {least:.0} to {most:.0} requests/s; the least has {smallest_share:.2} of its share"
            )?;
        }
        if self.behind > 0 {
            write!(f, "\nbehind: {} requests were due and not answered at the end", self.behind)?;
        }
        if let Some(server) = &self.server {
            write!(f, "\n{server}")?;
        }
        if let Some(found) = &self.verified {
            write!(f, "\nverified: {} blocks, {} wrong", found.blocks, found.wrong)?;
            for wrong in &found.first_wrong {
                write!(f, "\n  at {}: {}", wrong.offset, wrong.what)?;
            }
        }
        for (name, count) in &self.errors {
            write!(f, "\nerror: {count} requests failed with {name}")?;
        }
        self.lost.iter().try_for_each(|why| write!(f, "\nlost: {why}"))
    }
}

fn line(f: &mut fmt::Formatter<'_>, name: &str, per_second: f64, megabytes: &str, of: &Latency) -> fmt::Result {
    let Latency { p50, p90, p99, p99_9, maximum, .. } = of;
    write!(f, "{name:<9} {per_second:>11.0} {megabytes:>9} {p50:>9.1} {p90:>9.1} {p99:>9.1}")?;
    writeln!(f, " {p99_9:>9.1} {maximum:>9.1}")
}

impl fmt::Display for ServerCost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "server: {:.3} µs of CPU time per request ({:.0} % in user mode), {:.3} voluntary and {:.3} involuntary switches",
            self.cpu_per_request,
            self.usage.user_share * 100.0,
            self.voluntary_switches_per_request,
            self.involuntary_switches_per_request
        )?;
        if let Some(count) = self.system_calls_per_request {
            write!(f, ", {count:.3} system calls")?;
        }
        if let Some(why) = &self.system_calls_missing {
            write!(f, "; system calls were not counted: {why}")?;
        }
        Ok(())
    }
}
