//! What the clients of each export have asked for, and how long it took.
//!
//! Owns: the counts of exports. Does not own: those of clients (`clients`), and what a connection notes until it publishes it
//! (`answered`).
//!
//! Numbers only grow, and outlive clients and exports. Workers add to them without a lock, each in a place of its own.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::error::ErrorKind;
use crate::nbd::errno;
use crate::nbd::wire::command;
use crate::telemetry::latency::{Latencies, Spread};
use crate::telemetry::{Counter, ShardedCounter};

/// Exports that are counted by their names.
const MOST: usize = 1024;
/// What all others together are called.
const OTHERS: &str = "@others";

/// What clients can ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Operation {
    /// READ.
    Read,
    /// WRITE.
    Write,
    /// FLUSH.
    Flush,
    /// TRIM.
    Trim,
    /// WRITE_ZEROES.
    WriteZeroes,
    /// BLOCK_STATUS.
    BlockStatus,
    /// CACHE.
    Cache,
    /// A command that the protocol does not know, or we do not.
    Unknown,
}

impl Operation {
    /// Each of them.
    pub const ALL: [Self; 8] = [
        Self::Read,
        Self::Write,
        Self::Flush,
        Self::Trim,
        Self::WriteZeroes,
        Self::BlockStatus,
        Self::Cache,
        Self::Unknown,
    ];

    /// The word for it, as in metrics: `read`, `write_zeroes`.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Trim => "trim",
            Self::WriteZeroes => "write_zeroes",
            Self::BlockStatus => "block_status",
            Self::Cache => "cache",
            Self::Unknown => "unknown",
        }
    }

    /// What a request with this command number asks for.
    pub(super) const fn of(number: u16) -> Self {
        match number {
            command::READ => Self::Read,
            command::WRITE => Self::Write,
            command::FLUSH => Self::Flush,
            command::TRIM => Self::Trim,
            command::WRITE_ZEROES => Self::WriteZeroes,
            command::BLOCK_STATUS => Self::BlockStatus,
            command::CACHE => Self::Cache,
            _ => Self::Unknown,
        }
    }
}

/// What came of the requests of one kind, so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OperationCounts {
    /// Requests that were answered, errors too.
    pub requests: u64,
    /// Bytes of the image that requests answered without an error have read, written, trimmed or zeroed.
    pub bytes: u64,
    /// Answers with an error, by the name of its errno (`EIO`).
    pub errors: BTreeMap<&'static str, u64>,
    /// From when a request had arrived until its answer was on its way. Less than `requests` are in it: a request for
    /// notices waits for as long as there are none, and is not timed.
    pub latency: Spread,
}

/// Some requests of one kind that have been answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Answers {
    pub(super) operation: Operation,
    pub(super) requests: u64,
    /// All of them together.
    pub(super) bytes: u64,
    pub(super) error: Option<ErrorKind>,
}

/// The counts of one export; they outlive its clients. 18 KiB, and 3.6 KiB for each operation that a worker has answered.
#[derive(Debug, Default)]
pub struct ExportFigures([OperationFigures; Operation::ALL.len()]);

#[derive(Debug, Default)]
struct OperationFigures {
    /// Requests whose time is of no interest.
    untimed: Counter,
    bytes: ShardedCounter,
    /// In the order of [`ERRORS`].
    errors: [Counter; ERRORS.len()],
    latencies: Latencies,
}

/// What errors of requests can be on the wire.
const ERRORS: [ErrorKind; 7] = [
    ErrorKind::Io,
    ErrorKind::Permission,
    ErrorKind::NoMemory,
    ErrorKind::Invalid,
    ErrorKind::NoSpace,
    ErrorKind::TooLarge,
    ErrorKind::Unsupported,
];

/// The place of an error in [`ERRORS`]. "Shutting down" is an error of the disk for whoever asked.
const fn place_of(error: ErrorKind) -> usize {
    match error {
        ErrorKind::Io | ErrorKind::Unavailable | ErrorKind::Shutdown => 0,
        ErrorKind::Permission => 1,
        ErrorKind::NoMemory => 2,
        ErrorKind::Invalid => 3,
        ErrorKind::NoSpace => 4,
        ErrorKind::TooLarge => 5,
        ErrorKind::Unsupported => 6,
    }
}

impl ExportFigures {
    /// What was asked for so far.
    pub fn counts(&self, operation: Operation) -> OperationCounts {
        let figures = self.of(operation);
        let latency = figures.latencies.spread();
        let errors = ERRORS.iter().zip(&figures.errors).map(|(kind, count)| (errno::name(*kind), count.value()));
        OperationCounts {
            requests: latency.count() + figures.untimed.value(),
            bytes: figures.bytes.value(),
            errors: errors.filter(|(_, count)| *count > 0).collect(),
            latency,
        }
    }

    /// Notes answers, each of which took so long; `None`: nobody wants to know.
    pub(super) fn note(&self, answers: Answers, took: Option<Duration>) {
        let figures = self.of(answers.operation);
        if answers.bytes > 0 {
            figures.bytes.add(answers.bytes);
        }
        if let Some(kind) = answers.error {
            figures.errors[place_of(kind)].add(answers.requests);
        }
        // Last: whoever counts a request finds what came of it.
        match took {
            Some(took) => figures.latencies.record(took, answers.requests),
            None => figures.untimed.add(answers.requests),
        }
    }

    const fn of(&self, operation: Operation) -> &OperationFigures {
        &self.0[operation as usize]
    }
}

/// Those of all exports that had clients, by their full names. Cheap to clone; all clones are one.
///
/// Of 1024 exports each is counted by itself; those that come later together, as `@others`.
#[derive(Debug, Clone, Default)]
pub struct Figures(Arc<All>);

#[derive(Debug, Default)]
struct All {
    exports: Mutex<BTreeMap<String, Arc<ExportFigures>>>,
    connections: Connections,
}

/// What came of connections.
#[derive(Debug, Default)]
pub struct Connections {
    accepted: Counter,
    /// In the order of [`Parting::ALL`].
    ended: [Counter; Parting::ALL.len()],
}

/// How a connection ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Parting {
    /// The client said so.
    Disconnected,
    /// The client closed it without a word.
    Closed,
    /// The server went down, or the connection was closed by order.
    Drained,
    /// The client broke the protocol.
    Violation,
    /// A reply could not be completed.
    Broken,
    /// The socket failed.
    Lost,
    /// The negotiation came to nothing.
    NotNegotiated,
}

impl Parting {
    /// Each of them.
    pub(super) const ALL: [Self; 7] = [
        Self::Disconnected,
        Self::Closed,
        Self::Drained,
        Self::Violation,
        Self::Broken,
        Self::Lost,
        Self::NotNegotiated,
    ];

    const fn name(self) -> &'static str {
        match self {
            Self::Disconnected => "disconnected",
            Self::Closed => "closed",
            Self::Drained => "drained",
            Self::Violation => "violation",
            Self::Broken => "broken",
            Self::Lost => "lost",
            Self::NotNegotiated => "not_negotiated",
        }
    }
}

impl Connections {
    /// Connections accepted.
    pub fn accepted(&self) -> u64 {
        self.accepted.value()
    }

    /// Connections that have ended, by the word for the reason.
    pub fn ended(&self) -> impl Iterator<Item = (&'static str, u64)> {
        Parting::ALL.iter().zip(&self.ended).map(|(parting, count)| (parting.name(), count.value()))
    }

    pub(super) fn note_accepted(&self) {
        self.accepted.add(1);
    }

    pub(super) fn note_ended(&self, parting: Parting) {
        self.ended[parting as usize].add(1);
    }
}

impl Figures {
    /// What came of connections.
    pub fn connections(&self) -> &Connections {
        &self.0.connections
    }

    /// Each export that had clients, by name.
    pub fn all(&self) -> Vec<(String, Arc<ExportFigures>)> {
        let exports = self.0.exports.lock().unwrap_or_else(PoisonError::into_inner);
        exports.iter().map(|(name, figures)| (name.clone(), Arc::clone(figures))).collect()
    }

    /// Where what is asked of an export is counted.
    pub(super) fn of(&self, export: &str) -> Arc<ExportFigures> {
        let mut exports = self.0.exports.lock().unwrap_or_else(PoisonError::into_inner);
        let name = if exports.contains_key(export) || exports.len() < MOST { export } else { OTHERS };
        Arc::clone(exports.entry(name.to_owned()).or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answers(operation: Operation, requests: u64, bytes: u64, error: Option<ErrorKind>) -> Answers {
        Answers { operation, requests, bytes, error }
    }

    #[test]
    fn each_operation_has_its_place_and_its_name() {
        for (place, operation) in Operation::ALL.into_iter().enumerate() {
            assert_eq!(operation as usize, place);
        }
        let mut names = Operation::ALL.map(Operation::name);
        names.sort_unstable();
        assert!(names.windows(2).all(|pair| pair[0] < pair[1]));
        assert_eq!(
            (Operation::of(0), Operation::of(7), Operation::of(4711)),
            (Operation::Read, Operation::BlockStatus, Operation::Unknown)
        );
    }

    #[test]
    fn connections_are_counted_by_their_ends() {
        for (place, parting) in Parting::ALL.into_iter().enumerate() {
            assert_eq!(parting as usize, place);
        }
        let figures = Figures::default();
        figures.connections().note_accepted();
        figures.connections().note_ended(Parting::Lost);
        assert_eq!(figures.connections().accepted(), 1);
        let ended: Vec<_> = figures.connections().ended().filter(|(_, count)| *count > 0).collect();
        assert_eq!(ended, [("lost", 1)]);
    }

    #[test]
    fn each_error_is_counted_by_its_name_on_the_wire() {
        for (place, kind) in ERRORS.into_iter().enumerate() {
            assert_eq!(place_of(kind), place);
        }
        let figures = ExportFigures::default();
        let took = Some(Duration::from_micros(3));
        for kind in [ErrorKind::Io, ErrorKind::Shutdown, ErrorKind::Unavailable, ErrorKind::NoSpace] {
            figures.note(answers(Operation::Write, 2, 0, Some(kind)), took);
        }
        let counts = figures.counts(Operation::Write);
        assert_eq!((counts.requests, counts.errors), (8, BTreeMap::from([("EIO", 6), ("ENOSPC", 2)])));
    }

    #[test]
    fn requests_are_those_that_were_timed_and_those_that_were_not() {
        let figures = ExportFigures::default();
        figures.note(answers(Operation::BlockStatus, 3, 0, None), Some(Duration::from_micros(7)));
        figures.note(answers(Operation::BlockStatus, 1, 0, None), None);
        figures.note(answers(Operation::Read, 5, 20480, None), Some(Duration::from_micros(7)));
        let status = figures.counts(Operation::BlockStatus);
        assert_eq!((status.requests, status.bytes, status.latency.count()), (4, 0, 3));
        assert_eq!(status.latency.sum(), Duration::from_micros(21));
        let read = figures.counts(Operation::Read);
        assert_eq!((read.requests, read.bytes, read.latency.count()), (5, 20480, 5));
        assert_eq!(figures.counts(Operation::Flush), OperationCounts::default());
    }

    #[test]
    fn exports_that_are_too_many_are_counted_together() {
        let figures = Figures::default();
        for number in 0..MOST + 2 {
            figures.of(&format!("export {number}")).note(answers(Operation::Flush, 1, 0, None), None);
        }
        figures.of("export 7").note(answers(Operation::Flush, 1, 0, None), None);
        let all: BTreeMap<_, _> = figures.all().into_iter().collect();
        assert_eq!(all.len(), MOST + 1);
        assert_eq!(all["export 7"].counts(Operation::Flush).requests, 2);
        assert_eq!(all[OTHERS].counts(Operation::Flush).requests, 2);
    }
}
