//! The tables of `headwater top`: what servers said, as rows that can be sorted.
//!
//! Pure. Owns: columns, rows, what hurts most. Does not own: what is chosen (`state`), how it looks (`draw`).

use std::cmp::Ordering;
use std::time::Duration;

use super::super::status::{short_name, size};
use super::super::table::printable;
use crate::control::load::{ClientLoad, ExportLoad, Load, Rates, UpstreamLoad};
use crate::control::status::{CacheStatus, DrainStatus, Status};

/// One server.
#[derive(Debug)]
pub(super) struct Server {
    /// Its admin address.
    pub(super) address: String,
    /// What it is called here.
    pub(super) name: String,
    pub(super) condition: Condition,
}

/// Whether a server answers.
#[derive(Debug)]
pub(super) enum Condition {
    /// It was not asked before, and its answer is not here yet.
    Asked,
    /// It does not, and why.
    Silent(String),
    /// It does.
    Answers(Box<Seen>),
}

/// What a server said last.
#[derive(Debug, Clone, Default)]
pub(super) struct Seen {
    pub(super) load: Load,
    pub(super) drain: DrainStatus,
    /// Asked less often.
    pub(super) status: Option<Status>,
}

impl Server {
    pub(super) fn seen(&self) -> Option<&Seen> {
        match &self.condition {
            Condition::Answers(seen) => Some(seen),
            Condition::Asked | Condition::Silent(_) => None,
        }
    }
}

/// The tables that there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum View {
    Servers,
    Exports,
    Clients,
}

impl View {
    pub(super) const ALL: [Self; 3] = [Self::Servers, Self::Exports, Self::Clients];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Servers => "servers",
            Self::Exports => "exports",
            Self::Clients => "clients",
        }
    }

    pub(super) const fn columns(self) -> &'static [Column] {
        match self {
            Self::Servers => &SERVERS,
            Self::Exports => &EXPORTS,
            Self::Clients => &CLIENTS,
        }
    }

    /// The rows, unsorted.
    pub(super) fn rows(self, servers: &[Server]) -> Vec<Row> {
        let all = servers.iter().enumerate();
        match self {
            Self::Servers => all.map(|(index, server)| server_row(index, server)).collect(),
            Self::Exports => all.flat_map(|(index, server)| export_rows(index, server)).collect(),
            Self::Clients => all.flat_map(|(index, server)| client_rows(index, server)).collect(),
        }
    }
}

/// One column.
#[derive(Debug)]
pub(super) struct Column {
    pub(super) title: &'static str,
    /// Characters that it takes: of figures always, of texts at most.
    pub(super) width: usize,
    /// Whether it has figures, which stand to the right.
    pub(super) is_figure: bool,
    /// Columns with higher ranks go first where there is no room.
    pub(super) rank: u8,
}

const fn text(title: &'static str, width: usize, rank: u8) -> Column {
    Column { title, width, is_figure: false, rank }
}

const fn figure(title: &'static str, width: usize, rank: u8) -> Column {
    Column { title, width, is_figure: true, rank }
}

const SERVERS: [Column; 11] = [
    text("SERVER", 40, 0),
    text("ROLE", 6, 8),
    figure("BYTES/S", 7, 1),
    figure("REQ/S", 6, 4),
    figure("P99 ms", 7, 0),
    figure("ERR/S", 5, 5),
    figure("CLIENTS", 7, 3),
    figure("HIT %", 5, 6),
    figure("CACHE %", 7, 7),
    text("UPSTREAM", 12, 9),
    text("STATE", 16, 2),
];

const EXPORTS: [Column; 10] = [
    text("EXPORT", 40, 0),
    text("SERVER", 24, 3),
    figure("BYTES/S", 7, 1),
    figure("REQ/S", 6, 4),
    figure("P99 ms", 7, 0),
    figure("MEAN ms", 7, 8),
    figure("ERR/S", 5, 5),
    figure("CLIENTS", 7, 2),
    figure("HIT %", 5, 6),
    text("STATE", 12, 7),
];

const CLIENTS: [Column; 10] = [
    text("CLIENT", 40, 0),
    figure("ID", 5, 4),
    text("EXPORT", 24, 2),
    text("SERVER", 24, 6),
    figure("BYTES/S", 7, 1),
    figure("REQ/S", 6, 3),
    figure("MEAN ms", 7, 0),
    figure("ERR/S", 5, 5),
    figure("WAITING", 7, 8),
    text("STATE", 24, 7),
];

/// What a row is about.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Subject {
    /// A server, by its place among them.
    Server(usize),
    /// An export of one.
    Export(usize, String),
    /// A client of one, by its number.
    Client(usize, u64),
}

impl Subject {
    /// The place of the server among them.
    pub(super) const fn server(&self) -> usize {
        match self {
            Self::Server(index) | Self::Export(index, _) | Self::Client(index, _) => *index,
        }
    }
}

/// How a row looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tone {
    Plain,
    /// Somebody should know.
    Warning,
    /// Somebody should do something.
    Bad,
}

/// One cell.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Cell {
    Text(String),
    /// A number, and how it is written; those without a number come last.
    Figure(Option<f64>, String),
}

impl Cell {
    pub(super) fn written(&self) -> &str {
        match self {
            Self::Text(text) | Self::Figure(_, text) => text,
        }
    }

    /// Texts from a to z, figures from the largest down.
    fn order(&self, other: &Self) -> Ordering {
        match (self, other) {
            (Self::Text(one), Self::Text(other)) => one.cmp(other),
            (Self::Figure(one, _), Self::Figure(other, _)) => {
                let of = |figure: &Option<f64>| figure.unwrap_or(f64::NEG_INFINITY);
                of(other).total_cmp(&of(one))
            }
            (Self::Text(_), Self::Figure(..)) => Ordering::Less,
            (Self::Figure(..), Self::Text(_)) => Ordering::Greater,
        }
    }
}

/// How much a row hurts: first whether something is out of order, then whether there are errors, then how slow it is by
/// doublings of time (so that rows do not change places all the time), then bytes per second.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Pain {
    is_broken: bool,
    has_errors: bool,
    doublings: u32,
    bytes: u64,
}

impl Pain {
    fn of(rates: &Rates, slow_ms: Option<f64>, is_broken: bool) -> Self {
        let microseconds = whole(slow_ms.unwrap_or(0.0) * 1e3);
        Self {
            is_broken,
            has_errors: rates.errors_per_second > 0.0,
            doublings: microseconds.checked_ilog2().map_or(0, |log| log + 1),
            bytes: whole(bytes_per_second(rates)),
        }
    }
}

/// One row.
#[derive(Debug, Clone)]
pub(super) struct Row {
    pub(super) subject: Subject,
    /// One for each column of its table.
    pub(super) cells: Vec<Cell>,
    pub(super) pain: Pain,
    pub(super) tone: Tone,
    /// What is said behind the first cell instead of the others.
    pub(super) remark: Option<String>,
}

impl Row {
    /// Whether `filter` is in one of its texts, however written.
    fn has(&self, filter: &str) -> bool {
        let filter = filter.to_lowercase();
        let texts = self.cells.iter().filter(|cell| matches!(cell, Cell::Text(_))).map(Cell::written);
        texts.chain(self.remark.as_deref()).any(|text| text.to_lowercase().contains(&filter))
    }
}

/// Those with `filter` in them, by a column, or by what hurts.
pub(super) fn arrange(mut rows: Vec<Row>, filter: &str, column: Option<usize>) -> Vec<Row> {
    rows.retain(|row| filter.is_empty() || row.has(filter));
    rows.sort_by(|one, other| {
        let by_column = column.and_then(|column| Some(one.cells.get(column)?.order(other.cells.get(column)?)));
        let by_pain = || other.pain.cmp(&one.pain);
        by_column.unwrap_or_else(by_pain).then_with(|| one.subject.cmp(&other.subject))
    });
    rows
}

fn server_row(index: usize, server: &Server) -> Row {
    let silent = |why: &str, tone| Row {
        subject: Subject::Server(index),
        cells: SERVERS
            .iter()
            .enumerate()
            .map(|(column, of)| match (column, of.is_figure) {
                (0, _) => Cell::Text(server.name.clone()),
                (_, true) => Cell::Figure(None, String::new()),
                (_, false) => Cell::Text(String::new()),
            })
            .collect(),
        pain: Pain { is_broken: tone == Tone::Bad, ..Pain::of(&Rates::default(), None, false) },
        tone,
        remark: Some(printable(why)),
    };
    match &server.condition {
        Condition::Asked => silent("asking...", Tone::Plain),
        Condition::Silent(why) => silent(&format!("NO ANSWER: {why}"), Tone::Bad),
        Condition::Answers(seen) => answering_row(index, &server.name, seen),
    }
}

fn answering_row(index: usize, name: &str, seen: &Seen) -> Row {
    let Seen { load, drain, status } = seen;
    let cache = status.as_ref().and_then(|status| status.cache.as_ref());
    let p99 = load.total.latency.map(|latency| latency.p99_ms);
    let (upstream, is_away) = upstream(&load.upstreams);
    let (state, is_failed) = state(drain, cache);
    let hits = load.exports.iter().map(|export| export.hit_bytes_per_second).sum();
    let misses = load.exports.iter().map(|export| export.miss_bytes_per_second).sum();
    let is_warned = is_away || !state.is_empty() || load.total.errors_per_second > 0.0;
    Row {
        subject: Subject::Server(index),
        cells: vec![
            Cell::Text(name.to_owned()),
            Cell::Text(status.as_ref().map(|status| status.role.to_string()).unwrap_or_default()),
            bytes(bytes_per_second(&load.total)),
            number(load.total.requests_per_second),
            milliseconds(p99),
            number(load.total.errors_per_second),
            number(load.clients.len() as f64),
            hit_rate(hits, misses),
            fullness(cache),
            Cell::Text(upstream),
            Cell::Text(state),
        ],
        pain: Pain::of(&load.total, p99, is_failed || is_away),
        tone: tone(is_failed, is_warned),
        remark: None,
    }
}

const fn tone(is_bad: bool, is_warned: bool) -> Tone {
    match (is_bad, is_warned) {
        (true, _) => Tone::Bad,
        (_, true) => Tone::Warning,
        _ => Tone::Plain,
    }
}

/// What an operator should know of a server, and whether its disk has failed.
fn state(drain: &DrainStatus, cache: Option<&CacheStatus>) -> (String, bool) {
    let is_failed = cache.is_some_and(|cache| cache.failed);
    let mut words = Vec::new();
    if is_failed {
        words.push("DISK FAILED".to_owned());
    }
    if drain.all {
        words.push("draining".to_owned());
    } else if !drain.exports.is_empty() {
        words.push(format!("draining {}", drain.exports.len()));
    }
    if cache.is_some_and(|cache| cache.thrashing) {
        words.push("thrashing".to_owned());
    }
    (words.join(", "), is_failed)
}

/// In what state the upstreams of a server's mirrors are, and whether one has none that can be used.
fn upstream(upstreams: &[UpstreamLoad]) -> (String, bool) {
    if upstreams.is_empty() {
        return ("-".to_owned(), false);
    }
    let mut nodes: Vec<_> = upstreams.iter().map(|upstream| &*upstream.node).collect();
    nodes.dedup();
    let is_away = |node: &&&str| {
        let mut of_it = upstreams.iter().filter(|upstream| upstream.node == ***node);
        !of_it.any(|upstream| upstream.current && upstream.reachable != Some(false))
    };
    match nodes.iter().filter(is_away).count() {
        0 => ("ok".to_owned(), false),
        away if away == nodes.len() => ("AWAY".to_owned(), true),
        away => (format!("{away} of {} away", nodes.len()), true),
    }
}

fn fullness(cache: Option<&CacheStatus>) -> Cell {
    // Without a bound the file system is it.
    let room = cache.and_then(|cache| {
        let allocated = cache.allocated_bytes;
        let limit = cache.limit_bytes.or_else(|| Some(cache.free_bytes?.saturating_add(allocated)))?;
        (limit > 0).then(|| allocated as f64 * 100.0 / limit as f64)
    });
    percent(room)
}

fn export_rows(index: usize, server: &Server) -> Vec<Row> {
    let Some(Seen { load, drain, status }) = server.seen() else { return Vec::new() };
    let mut rows: Vec<_> = load.exports.iter().map(|export| export_row(index, server, drain, export)).collect();
    // Also those that nobody has used yet.
    let images = status.iter().flat_map(|status| &status.images);
    for image in images.filter(|image| !load.exports.iter().any(|export| export.export == image.name)) {
        let export = ExportLoad { export: image.name.clone(), ..ExportLoad::default() };
        rows.push(export_row(index, server, drain, &export));
    }
    rows
}

fn export_row(index: usize, server: &Server, drain: &DrainStatus, export: &ExportLoad) -> Row {
    let rates = &export.rates;
    let p99 = rates.latency.map(|latency| latency.p99_ms);
    let is_drained = is_drained(drain, &export.export);
    Row {
        subject: Subject::Export(index, export.export.clone()),
        cells: vec![
            Cell::Text(printable(&short_name(&export.export))),
            Cell::Text(server.name.clone()),
            bytes(bytes_per_second(rates)),
            number(rates.requests_per_second),
            milliseconds(p99),
            milliseconds(rates.latency.map(|latency| latency.mean_ms)),
            number(rates.errors_per_second),
            number(export.clients as f64),
            hit_rate(export.hit_bytes_per_second, export.miss_bytes_per_second),
            Cell::Text(if is_drained { "draining" } else { "" }.to_owned()),
        ],
        pain: Pain::of(rates, p99, false),
        tone: tone(false, is_drained || rates.errors_per_second > 0.0),
        remark: None,
    }
}

/// Whether newcomers to an export are sent away.
pub(super) fn is_drained(drain: &DrainStatus, export: &str) -> bool {
    drain.all || drain.exports.iter().any(|name| name == export)
}

fn client_rows(index: usize, server: &Server) -> Vec<Row> {
    let Some(Seen { load, status, .. }) = server.seen() else { return Vec::new() };
    let relayed = |client: &ClientLoad| {
        let mut known = status.iter().flat_map(|status| &status.clients);
        known.find(|known| known.id == client.id && known.peer == client.peer)?.relayed_to.clone()
    };
    load.clients.iter().map(|client| client_row(index, server, client, relayed(client))).collect()
}

fn client_row(index: usize, server: &Server, client: &ClientLoad, relayed_to: Option<String>) -> Row {
    let rates = &client.rates;
    let state = match (&relayed_to, &client.mirror) {
        (Some(to), _) => format!("from {to}"),
        (None, Some(node)) => format!("mirror {node:.8}"),
        (None, None) => String::new(),
    };
    Row {
        subject: Subject::Client(index, client.id),
        cells: vec![
            Cell::Text(printable(&client.peer)),
            number(client.id as f64),
            Cell::Text(printable(&short_name(&client.export))),
            Cell::Text(server.name.clone()),
            bytes(bytes_per_second(rates)),
            number(rates.requests_per_second),
            milliseconds(client.mean_ms),
            number(rates.errors_per_second),
            number(rates.in_flight as f64),
            Cell::Text(printable(&state)),
        ],
        pain: Pain::of(rates, client.mean_ms, false),
        tone: tone(false, rates.errors_per_second > 0.0),
        remark: None,
    }
}

pub(super) fn bytes_per_second(rates: &Rates) -> f64 {
    rates.read_bytes_per_second + rates.written_bytes_per_second
}

/// Bytes per second, to three digits.
pub(super) fn bytes(rate: f64) -> Cell {
    Cell::Figure(Some(rate), size(whole(rate.round())))
}

/// A number: whole where it is large.
pub(super) fn number(number: f64) -> Cell {
    let written = match number {
        0.0 => "0".to_owned(),
        1e6.. => format!("{:.1}M", number / 1e6),
        10.0.. => format!("{number:.0}"),
        number if number.fract() == 0.0 => format!("{number:.0}"),
        number => format!("{number:.1}"),
    };
    Cell::Figure(Some(number), written)
}

/// A length of time, to three digits.
pub(super) fn milliseconds(time: Option<f64>) -> Cell {
    let written = match time {
        None => "-".to_owned(),
        Some(time @ 100.0..) => format!("{time:.0}"),
        Some(time @ 10.0..) => format!("{time:.1}"),
        Some(time) => format!("{time:.2}"),
    };
    Cell::Figure(time, written)
}

fn hit_rate(hits: f64, misses: f64) -> Cell {
    let all = hits + misses;
    percent((all > 0.0).then(|| hits * 100.0 / all))
}

fn percent(part: Option<f64>) -> Cell {
    Cell::Figure(part, part.map_or_else(|| "-".to_owned(), |part| format!("{part:.0}")))
}

/// What stands before the point; 0 for what is negative or no number.
fn whole(number: f64) -> u64 {
    Duration::try_from_secs_f64(number).unwrap_or_default().as_secs()
}
