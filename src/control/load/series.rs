//! What follows from one sample after the other.
//!
//! Pure. Owns: differences, sums of differences, and forgetting them. Does not own: the clock.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use super::sample::{Counted, Sample, grown};
use super::{ClientLoad, ExportHistory, ExportLoad, History, Latency, Load, Rates, UpstreamLoad};
use crate::control::figures::{MirrorFigures, UpstreamFigures};
use crate::server::ClientStatus;
use crate::telemetry::latency::Spread;
use crate::units::to_u64;

/// Samples that are kept whole.
const SPANS: usize = 60;
/// Samples in the history.
const SECONDS: usize = 300;
/// Exports, and upstreams, that have figures of their own.
const TRACKED: usize = 256;

/// Samples as they come. What it leaves for others is a [`View`].
#[derive(Debug, Default)]
pub(super) struct Series {
    number: u64,
    last: Arc<Sample>,
    spans: VecDeque<Arc<Span>>,
    seconds: VecDeque<Arc<Second>>,
    /// The exports that have figures of their own, and the number of the last sample in which something happened to each.
    tracked: BTreeMap<Arc<str>, u64>,
}

/// As of the last sample.
#[derive(Debug, Default)]
pub(super) struct View {
    number: u64,
    last: Arc<Sample>,
    /// Oldest first; one less than there were samples, at first.
    spans: VecDeque<Arc<Span>>,
    /// Oldest first.
    seconds: VecDeque<Arc<Second>>,
    tracked: Vec<Arc<str>>,
}

/// What happened between two samples.
#[derive(Debug, Default)]
struct Span {
    time: Duration,
    total: Counted,
    /// Of exports to which something happened.
    exports: BTreeMap<Arc<str>, Counted>,
    /// Of clients that are still there and did something, by number.
    clients: BTreeMap<u64, ClientSpan>,
    /// Of mirrors, by the names of their caches.
    mirrors: BTreeMap<String, MirrorSpan>,
    /// Of upstreams, by the names of the caches that they fill and their own.
    upstreams: BTreeMap<(String, String), UpstreamSpan>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct ClientSpan {
    requests: u64,
    read_bytes: u64,
    written_bytes: u64,
    errors: u64,
    timed: u64,
    took_seconds: f64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct MirrorSpan {
    hit_bytes: u64,
    miss_bytes: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct UpstreamSpan {
    requests: u64,
    bytes: u64,
    latency: Spread,
}

/// What of it the history keeps.
#[derive(Debug, Default)]
struct Second {
    at: f64,
    exports: BTreeMap<Arc<str>, Point>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Point {
    requests: u64,
    bytes: u64,
    p50_ms: Option<f64>,
    p99_ms: Option<f64>,
}

impl Series {
    /// Takes the next sample.
    pub(super) fn note(&mut self, sample: Sample) {
        self.number += 1;
        let mut span = match (self.last.steady, sample.steady) {
            (Some(before), Some(now)) => {
                Some(Span::between(&self.last, &sample, now.saturating_duration_since(before)))
            }
            _ => None,
        };
        self.track(&sample, span.as_ref());
        if let Some(span) = &mut span {
            span.exports.retain(|name, _| self.tracked.contains_key(name));
        }
        let exports = span.iter().flat_map(|span| &span.exports);
        let exports = exports.map(|(name, counted)| (Arc::clone(name), Point::of(counted))).collect();
        push(&mut self.seconds, Second { at: sample.at, exports }, SECONDS);
        if let Some(span) = span {
            push(&mut self.spans, span, SPANS);
        }
        self.last = Arc::new(sample);
    }

    /// Notes to which exports something happens, and makes room for new ones among those to which nothing does.
    fn track(&mut self, sample: &Sample, span: Option<&Span>) {
        let (number, is_first) = (self.number, span.is_none());
        let busy = |name: &Arc<str>| is_first || span.is_some_and(|span| span.exports.contains_key(name));
        for name in sample.exports.keys().filter(|name| busy(name)) {
            match self.tracked.get_mut(name) {
                Some(last) => *last = number,
                None => {
                    if self.tracked.len() >= TRACKED {
                        self.tracked.retain(|_, last| *last + to_u64(SECONDS) > number);
                    }
                    if self.tracked.len() < TRACKED {
                        self.tracked.insert(Arc::clone(name), number);
                    }
                }
            }
        }
    }

    /// For others.
    pub(super) fn view(&self) -> Arc<View> {
        Arc::new(View {
            number: self.number,
            last: Arc::clone(&self.last),
            spans: self.spans.clone(),
            seconds: self.seconds.clone(),
            tracked: self.tracked.keys().cloned().collect(),
        })
    }
}

fn push<T>(queue: &mut VecDeque<Arc<T>>, item: T, most: usize) {
    if queue.len() >= most {
        queue.pop_front();
    }
    queue.push_back(Arc::new(item));
}

impl Span {
    fn between(before: &Sample, now: &Sample, time: Duration) -> Self {
        let mut span = Self { time, ..Self::default() };
        let nothing = Counted::default();
        for (name, counted) in &now.exports {
            let counted = counted.since(before.exports.get(name).unwrap_or(&nothing));
            if !counted.is_nothing() {
                span.total.add(&counted);
                span.exports.insert(Arc::clone(name), counted);
            }
        }
        let known: BTreeMap<_, _> = before.clients.iter().map(|client| (client.id, client)).collect();
        for client in &now.clients {
            let did = ClientSpan::between(known.get(&client.id).copied(), client);
            if did != ClientSpan::default() {
                span.clients.insert(client.id, did);
            }
        }
        let known: BTreeMap<_, _> = before.mirrors.iter().map(|mirror| (&*mirror.node, mirror)).collect();
        for mirror in &now.mirrors {
            span.note_mirror(known.get(&*mirror.node).copied(), mirror);
        }
        span
    }

    fn note_mirror(&mut self, before: Option<&MirrorFigures>, now: &MirrorFigures) {
        let was = |figure: fn(&MirrorFigures) -> u64| before.map_or(0, figure);
        let hit_bytes = grown(now.hit_bytes, was(|mirror| mirror.hit_bytes));
        let miss_bytes = grown(now.miss_bytes, was(|mirror| mirror.miss_bytes));
        if hit_bytes > 0 || miss_bytes > 0 {
            self.mirrors.insert(now.node.clone(), MirrorSpan { hit_bytes, miss_bytes });
        }
        for upstream in &now.upstreams {
            let mut known = before.iter().flat_map(|mirror| &mirror.upstreams);
            let span = UpstreamSpan::between(known.find(|known| known.uri == upstream.uri), upstream);
            if span != UpstreamSpan::default() && self.upstreams.len() < TRACKED {
                self.upstreams.insert((now.node.clone(), upstream.uri.clone()), span);
            }
        }
    }

    /// Adds what happened to the same in another time.
    fn add(&mut self, other: &Self) {
        self.time += other.time;
        self.total.add(&other.total);
        for (name, counted) in &other.exports {
            self.exports.entry(Arc::clone(name)).or_default().add(counted);
        }
        for (id, did) in &other.clients {
            self.clients.entry(*id).or_default().add(did);
        }
        for (node, MirrorSpan { hit_bytes, miss_bytes }) in &other.mirrors {
            let mirror = self.mirrors.entry(node.clone()).or_default();
            mirror.hit_bytes += hit_bytes;
            mirror.miss_bytes += miss_bytes;
        }
        for (key, UpstreamSpan { requests, bytes, latency }) in &other.upstreams {
            let upstream = self.upstreams.entry(key.clone()).or_default();
            upstream.requests += requests;
            upstream.bytes += bytes;
            upstream.latency.add(latency);
        }
    }
}

impl ClientSpan {
    fn between(before: Option<&ClientStatus>, now: &ClientStatus) -> Self {
        let was = |figure: fn(&ClientStatus) -> u64| before.map_or(0, figure);
        let is_anew = before.is_some_and(|before| now.timed_requests < before.timed_requests);
        let timed = grown(now.timed_requests, was(|client| client.timed_requests));
        Self {
            requests: grown(now.requests, was(|client| client.requests)),
            read_bytes: grown(now.read_bytes, was(|client| client.read_bytes)),
            written_bytes: grown(now.written_bytes, was(|client| client.written_bytes)),
            errors: grown(now.errors, was(|client| client.errors)),
            timed,
            took_seconds: if is_anew {
                now.latency_seconds
            } else {
                now.latency_seconds - before.map_or(0.0, |it| it.latency_seconds)
            },
        }
    }

    fn add(&mut self, other: &Self) {
        self.requests += other.requests;
        self.read_bytes += other.read_bytes;
        self.written_bytes += other.written_bytes;
        self.errors += other.errors;
        self.timed += other.timed;
        self.took_seconds += other.took_seconds;
    }
}

impl UpstreamSpan {
    fn between(before: Option<&UpstreamFigures>, now: &UpstreamFigures) -> Self {
        let Some(before) = before else {
            return Self { requests: now.requests, bytes: now.received_bytes, latency: now.latency.clone() };
        };
        let is_anew = now.latency.count() < before.latency.count();
        Self {
            requests: grown(now.requests, before.requests),
            bytes: grown(now.received_bytes, before.received_bytes),
            latency: if is_anew { now.latency.clone() } else { now.latency.since(&before.latency) },
        }
    }
}

impl Point {
    fn of(counted: &Counted) -> Self {
        let at = |part| counted.latency.quantile(part).map(milliseconds);
        Self {
            requests: counted.requests,
            bytes: counted.read_bytes + counted.written_bytes,
            p50_ms: at(0.5),
            p99_ms: at(0.99),
        }
    }
}

impl View {
    /// What happened in the last `seconds`, as nearly as samples were taken.
    pub(super) fn load(&self, seconds: u32) -> Load {
        let sum = self.last_spans(seconds);
        let time = sum.time.as_secs_f64();
        let mut exports: Vec<_> = self.tracked.iter().map(|name| self.export_load(name, &sum)).collect();
        exports.retain(|export| self.last.exports.contains_key(&*export.export));
        Load {
            sample: self.number,
            at: self.last.at,
            seconds: time,
            total: rates(&sum.total, time, self.last.clients.iter().map(|client| client.requests_in_flight).sum()),
            exports,
            clients: self.last.clients.iter().map(|client| client_load(client, &sum)).collect(),
            upstreams: self.last.mirrors.iter().flat_map(|mirror| upstream_loads(mirror, &sum)).take(TRACKED).collect(),
        }
    }

    /// The last spans that are about so long together.
    fn last_spans(&self, seconds: u32) -> Span {
        // A sample is seldom taken when a second is just over.
        let enough = Duration::from_secs(seconds.into()).saturating_sub(Duration::from_millis(500));
        let mut sum = Span::default();
        for span in self.spans.iter().rev() {
            sum.add(span);
            if sum.time >= enough {
                break;
            }
        }
        sum
    }

    fn export_load(&self, name: &Arc<str>, sum: &Span) -> ExportLoad {
        let time = sum.time.as_secs_f64();
        let clients = self.last.clients.iter().filter(|client| client.export == **name);
        let (count, in_flight) =
            clients.fold((0, 0), |(count, waiting), client| (count + 1, waiting + client.requests_in_flight));
        let of_it = self.last.mirrors.iter().filter(|mirror| mirror.image == **name);
        let mirror = of_it.filter_map(|mirror| sum.mirrors.get(&mirror.node)).next().copied().unwrap_or_default();
        let nothing = Counted::default();
        ExportLoad {
            export: name.to_string(),
            clients: count,
            rates: rates(sum.exports.get(name).unwrap_or(&nothing), time, in_flight),
            hit_bytes_per_second: per_second(mirror.hit_bytes, time),
            miss_bytes_per_second: per_second(mirror.miss_bytes, time),
        }
    }

    /// A value for each of the last seconds.
    pub(super) fn history(&self) -> History {
        let of = |name: &Arc<str>| {
            let points = || self.seconds.iter().map(|second| second.exports.get(name).copied().unwrap_or_default());
            ExportHistory {
                export: name.to_string(),
                requests: points().map(|point| point.requests).collect(),
                bytes: points().map(|point| point.bytes).collect(),
                p50_ms: points().map(|point| point.p50_ms).collect(),
                p99_ms: points().map(|point| point.p99_ms).collect(),
            }
        };
        History {
            sample: self.number,
            at: self.seconds.iter().map(|second| second.at).collect(),
            exports: self.tracked.iter().map(of).collect(),
        }
    }
}

fn client_load(client: &ClientStatus, sum: &Span) -> ClientLoad {
    let time = sum.time.as_secs_f64();
    let did = sum.clients.get(&client.id).copied().unwrap_or_default();
    ClientLoad {
        id: client.id,
        peer: client.peer.clone(),
        export: client.export.clone(),
        mirror: client.mirror.clone(),
        rates: Rates {
            requests_per_second: per_second(did.requests, time),
            read_bytes_per_second: per_second(did.read_bytes, time),
            written_bytes_per_second: per_second(did.written_bytes, time),
            errors_per_second: per_second(did.errors, time),
            in_flight: client.requests_in_flight,
            latency: None,
        },
        mean_ms: (did.timed > 0).then(|| did.took_seconds * 1e3 / did.timed as f64),
    }
}

fn upstream_loads<'a>(mirror: &'a MirrorFigures, sum: &'a Span) -> impl Iterator<Item = UpstreamLoad> + 'a {
    let time = sum.time.as_secs_f64();
    mirror.upstreams.iter().map(move |upstream| {
        let key = (mirror.node.clone(), upstream.uri.clone());
        let (requests, bytes, latency) = match sum.upstreams.get(&key) {
            Some(span) => (span.requests, span.bytes, summary(&span.latency)),
            None => (0, 0, None),
        };
        UpstreamLoad {
            image: mirror.image.clone(),
            node: mirror.node.clone(),
            uri: upstream.uri.clone(),
            current: upstream.is_current,
            reachable: upstream.is_reachable,
            bytes_per_second: per_second(bytes, time),
            requests_per_second: per_second(requests, time),
            latency,
        }
    })
}

fn rates(counted: &Counted, time: f64, in_flight: u64) -> Rates {
    Rates {
        requests_per_second: per_second(counted.requests, time),
        read_bytes_per_second: per_second(counted.read_bytes, time),
        written_bytes_per_second: per_second(counted.written_bytes, time),
        errors_per_second: per_second(counted.errors, time),
        in_flight,
        latency: summary(&counted.latency),
    }
}

fn per_second(count: u64, time: f64) -> f64 {
    if time > 0.0 { count as f64 / time } else { 0.0 }
}

fn summary(spread: &Spread) -> Option<Latency> {
    Some(Latency {
        mean_ms: milliseconds(spread.mean()?),
        p50_ms: milliseconds(spread.quantile(0.5)?),
        p99_ms: milliseconds(spread.quantile(0.99)?),
        longest_ms: milliseconds(spread.longest()?),
    })
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use proptest::prelude::*;

    use super::*;
    use crate::clock;
    use crate::telemetry::latency::Latencies;

    /// A server whose counters a test turns.
    struct World {
        began: Instant,
        time: Duration,
        exports: BTreeMap<&'static str, (Counted, Latencies)>,
        clients: Vec<ClientStatus>,
        mirrors: Vec<MirrorFigures>,
    }

    impl World {
        fn new() -> Self {
            Self {
                began: clock::now(),
                time: Duration::ZERO,
                exports: BTreeMap::new(),
                clients: Vec::new(),
                mirrors: Vec::new(),
            }
        }

        /// So many reads, of so many bytes each.
        fn read(&mut self, export: &'static str, count: u64, bytes: u64, took: Duration) {
            let (counted, latencies) = self.exports.entry(export).or_default();
            counted.requests += count;
            counted.read_bytes += count * bytes;
            latencies.record(took, count);
        }

        fn sample(&self) -> Sample {
            let counted = |(counted, latencies): &(Counted, Latencies)| Counted {
                latency: latencies.spread(),
                ..counted.clone()
            };
            Sample {
                steady: Some(self.began + self.time),
                at: 1e9 + self.time.as_secs_f64(),
                exports: self.exports.iter().map(|(name, both)| ((*name).into(), counted(both))).collect(),
                clients: self.clients.clone(),
                mirrors: self.mirrors.clone(),
            }
        }

        /// The next sample, after so long.
        fn tick(&mut self, series: &mut Series, time: Duration) {
            self.time += time;
            series.note(self.sample());
        }
    }

    const SECOND: Duration = Duration::from_secs(1);
    const MS: Duration = Duration::from_millis(1);

    fn client(id: u64, export: &str, requests: u64) -> ClientStatus {
        let json = serde_json::json!({
            "id": id, "peer": "p", "export": export, "connected_seconds": 1.0, "requests": requests,
            "read_bytes": requests * 10, "written_bytes": 0, "errors": 0, "requests_in_flight": id, "bytes_in_flight": 0,
        });
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn the_first_sample_has_no_rates() {
        let (mut world, mut series) = (World::new(), Series::default());
        assert_eq!(series.view().load(5), Load::default());
        world.read("a", 7, 100, MS);
        series.note(world.sample());
        let load = series.view().load(5);
        assert_eq!((load.sample, load.at, load.seconds), (1, 1e9, 0.0));
        assert_eq!(load.total, Rates::default());
        assert_eq!(load.exports, [ExportLoad { export: "a".into(), ..ExportLoad::default() }]);
        assert_eq!(series.view().history().at, [1e9]);
    }

    #[test]
    fn rates_are_about_the_time_that_they_say() {
        let (mut world, mut series) = (World::new(), Series::default());
        series.note(world.sample());
        for _ in 0..10 {
            world.read("a", 100, 4096, MS);
            world.tick(&mut series, SECOND);
        }
        // A sample that came late.
        world.read("a", 100, 4096, 3 * MS);
        world.tick(&mut series, 2 * SECOND);
        let load = |seconds| series.view().load(seconds);
        assert_eq!((load(1).seconds, load(1).total.requests_per_second), (2.0, 50.0));
        assert_eq!((load(4).seconds, load(4).total.requests_per_second), (4.0, 75.0));
        assert_eq!((load(60).seconds, load(60).total.requests_per_second), (12.0, 1100.0 / 12.0));
        assert_eq!(load(4).exports[0].rates, load(4).total);
        let latency = load(4).total.latency.unwrap();
        assert!((1.6..1.7).contains(&latency.mean_ms), "{latency:?}");
        assert!((0.95..1.05).contains(&latency.p50_ms) && (2.8..3.2).contains(&latency.p99_ms), "{latency:?}");
        assert_eq!(series.view().history().exports[0].requests.iter().sum::<u64>(), 1100);
    }

    #[test]
    fn what_was_missed_is_not_guessed() {
        let (mut world, mut series) = (World::new(), Series::default());
        series.note(world.sample());
        world.read("a", 10, 1, MS);
        world.tick(&mut series, SECOND);
        world.tick(&mut series, SECOND);
        let load = series.view().load(1);
        assert_eq!(load.total, Rates::default(), "nothing happened in the last second");
        assert_eq!(load.exports[0].rates.latency, None);
        let history = series.view().history();
        assert_eq!(history.exports[0].requests, [0, 10, 0]);
        assert!(history.exports[0].p99_ms[1].is_some() && history.exports[0].p99_ms[2].is_none());
    }

    #[test]
    fn clients_come_and_go_and_their_exports_keep_what_they_did() {
        let (mut world, mut series) = (World::new(), Series::default());
        world.clients = vec![client(1, "a", 50)];
        world.read("a", 50, 10, MS);
        series.note(world.sample());
        // One did something and left, another one came and did something.
        world.clients = vec![client(2, "a", 30)];
        world.read("a", 100, 10, MS);
        world.tick(&mut series, SECOND);
        let load = series.view().load(1);
        assert_eq!(load.total.requests_per_second, 100.0);
        let [one] = &load.clients[..] else { panic!("{:?}", load.clients) };
        assert_eq!((one.id, one.rates.requests_per_second, one.rates.read_bytes_per_second), (2, 30.0, 300.0));
        assert_eq!((load.exports[0].clients, load.exports[0].rates.in_flight, load.total.in_flight), (1, 2, 2));
    }

    #[test]
    fn counters_that_begin_anew_do_not_run_backwards() {
        let (mut world, mut series) = (World::new(), Series::default());
        world.read("a", 1000, 10, MS);
        let mirror = |hit_bytes, requests| MirrorFigures {
            image: "a".into(),
            node: "n".into(),
            hit_bytes,
            upstreams: vec![UpstreamFigures { uri: "u".into(), requests, ..UpstreamFigures::default() }],
            ..MirrorFigures::default()
        };
        world.mirrors = vec![mirror(500, 70)];
        series.note(world.sample());
        world.exports.clear();
        world.read("a", 5, 10, MS);
        world.mirrors = vec![mirror(20, 4)];
        world.tick(&mut series, SECOND);
        let load = series.view().load(1);
        assert_eq!((load.total.requests_per_second, load.exports[0].hit_bytes_per_second), (5.0, 20.0));
        assert_eq!((load.upstreams[0].requests_per_second, &*load.upstreams[0].node), (4.0, "n"));
    }

    #[test]
    fn there_is_a_bound_on_everything() {
        let (mut world, mut series) = (World::new(), Series::default());
        let name = |index: usize| -> &'static str { Box::leak(format!("export{index:04}").into_boxed_str()) };
        series.note(world.sample());
        for index in 0..TRACKED + 10 {
            world.read(name(index), 1, 1, MS);
        }
        world.tick(&mut series, SECOND);
        assert_eq!(series.view().load(1).exports.len(), TRACKED);
        assert_eq!(series.view().load(1).total.requests_per_second, (TRACKED + 10) as f64, "the total has them all");
        let late = name(TRACKED + 9);
        let has_it = |series: &Series| series.view().load(1).exports.iter().any(|export| *export.export == *late);
        for _ in 0..SECONDS {
            assert!(!has_it(&series));
            world.read(late, 1, 1, MS);
            world.tick(&mut series, SECOND);
        }
        assert!(has_it(&series), "the others have done nothing for so long that one gives way");
        let view = series.view();
        assert_eq!((view.spans.len(), view.seconds.len()), (SPANS, SECONDS));
        assert!(view.history().exports.len() <= TRACKED);
    }

    /// What happens between two samples: reads by export, and how long it takes.
    type Happening = (Vec<(usize, u64, u64)>, u64);

    fn happenings() -> impl Strategy<Value = Vec<Happening>> {
        let reads = prop::collection::vec((0..3usize, 1..50u64, 1..5000u64), 0..4);
        prop::collection::vec((reads, 700..3000u64), 1..400)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Against sums over all that ever happened.
        #[test]
        fn rates_are_what_happened_by_the_time(happened in happenings(), seconds in 1..=60u32) {
            const NAMES: [&str; 3] = ["a", "b", "c"];
            let (mut world, mut series) = (World::new(), Series::default());
            series.note(world.sample());
            for (reads, time) in &happened {
                for (export, count, took) in reads {
                    world.read(NAMES[*export], *count, 512, Duration::from_micros(*took));
                }
                world.tick(&mut series, Duration::from_millis(*time));
            }
            let (mut counts, mut longest, mut milliseconds) = ([0; 3], [0; 3], 0);
            let enough = u64::from(seconds) * 1000 - 500;
            for (reads, time) in happened.iter().rev().take(SPANS) {
                for (export, count, took) in reads {
                    counts[*export] += count;
                    longest[*export] = longest[*export].max(*took);
                }
                milliseconds += time;
                if milliseconds >= enough {
                    break;
                }
            }
            let (load, time) = (series.view().load(seconds), milliseconds as f64 / 1e3);
            prop_assert_eq!(load.sample, to_u64(happened.len()) + 1);
            prop_assert!((load.seconds - time).abs() < 1e-6);
            let near = |one: f64, other: f64| (one - other).abs() <= 1e-6 * other.abs().max(1.0);
            prop_assert!(near(load.total.requests_per_second, counts.iter().sum::<u64>() as f64 / time));
            for export in &load.exports {
                let index = NAMES.iter().position(|name| **name == *export.export).unwrap();
                prop_assert!(near(export.rates.requests_per_second, counts[index] as f64 / time));
                prop_assert!(near(export.rates.read_bytes_per_second, (counts[index] * 512) as f64 / time));
                let told = export.rates.latency.map(|latency| latency.longest_ms);
                let longest = (counts[index] > 0).then(|| longest[index] as f64 / 1e3);
                let fits = |(told, longest): (f64, f64)| (told / longest - 1.0).abs() < 0.05;
                prop_assert!(told.is_some() == longest.is_some() && told.zip(longest).is_none_or(fits));
            }
            let history = series.view().history();
            for export in &history.exports {
                let index = NAMES.iter().position(|name| **name == *export.export).unwrap();
                let of = |reads: &[(usize, u64, u64)]| -> u64 {
                    reads.iter().filter(|read| read.0 == index).map(|read| read.1).sum()
                };
                let mut expected: Vec<u64> = happened.iter().map(|(reads, _)| of(reads)).collect();
                expected.insert(0, 0);
                let expected = &expected[expected.len().saturating_sub(SECONDS)..];
                prop_assert_eq!(&export.requests[..], expected);
                prop_assert_eq!(export.bytes.len(), history.at.len());
                prop_assert!(export.p99_ms.iter().zip(expected).all(|(p99, count)| p99.is_some() == (*count > 0)));
            }
        }
    }
}
