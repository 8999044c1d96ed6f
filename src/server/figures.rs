//! STUB (part M). What the clients of each export have asked for, and how long it took.
//!
//! Owns: the counts of exports. Does not own: those of clients (`clients`), and who tells them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use crate::telemetry::latency::Spread;

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
}

impl Operation {
    /// Each of them.
    pub const ALL: [Self; 7] =
        [Self::Read, Self::Write, Self::Flush, Self::Trim, Self::WriteZeroes, Self::BlockStatus, Self::Cache];

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
        }
    }
}

/// What came of the requests of one kind, so far.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct OperationCounts {
    /// Requests that were answered, errors too.
    pub requests: u64,
    /// Bytes of the image that were read or written.
    pub bytes: u64,
    /// Answers with an error, by the name of its errno (`EIO`).
    pub errors: BTreeMap<&'static str, u64>,
    /// From when a request had arrived until its answer was on its way.
    pub latency: Spread,
}

/// The counts of one export; they outlive its clients.
#[derive(Debug, Default)]
pub struct ExportFigures {}

impl ExportFigures {
    /// What was asked for so far.
    pub fn counts(&self, operation: Operation) -> OperationCounts {
        let _ = operation;
        OperationCounts::default()
    }
}

/// Those of all exports that had clients, by their full names. Cheap to clone; all clones are one.
#[derive(Debug, Clone, Default)]
pub struct Figures(Arc<Mutex<BTreeMap<String, Arc<ExportFigures>>>>);

impl Figures {
    /// Each export that had clients, by name.
    pub fn all(&self) -> Vec<(String, Arc<ExportFigures>)> {
        let _ = &self.0;
        Vec::new()
    }
}
