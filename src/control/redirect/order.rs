//! What is said over the admin API about moving clients, as types that the server writes and the command line reads.
//!
//! Times of day are seconds since 1970 as JSON numbers with fractions; all other times say their unit.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::units::to_u64;

/// `POST /v1/exports/NAME/redirect`. Of `clients`, `fraction` and `count` at most one; none of them means all.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RedirectOrder {
    /// Where to: URIs of servers that hold the same image. The next is used when one fails.
    pub to: Vec<String>,
    /// These clients, by their numbers. Any connection of a mirror stands for the mirror.
    pub clients: Option<Vec<u64>>,
    /// This part of them, above 0 and at most 1.
    pub fraction: Option<f64>,
    /// So many of them.
    pub count: Option<u64>,
    /// All of them.
    pub all: bool,
    /// How.
    pub way: Way,
    /// Also where the other server does not say what it holds, or would lose something.
    pub force: bool,
}

/// The answer to it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct RedirectTaken {
    /// The number of the order.
    pub order: u64,
    /// Clients that it is for.
    pub clients: u64,
    /// What whoever ordered it should know.
    pub warnings: Vec<String>,
}

/// How clients are moved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Way {
    /// The best that each has: mirrors are told, everybody else is relayed.
    #[default]
    Auto,
    /// Mirrors are told, and leave by themselves.
    Notice,
    /// qemu is told, by its monitor: on its own host.
    Qmp,
    /// The kernel is told, by netlink: on its own host.
    Kernel,
    /// They stay connected here, and are served from there.
    Relay,
    /// Their connections are closed when all is answered.
    Close,
}

impl Way {
    /// As it is written in JSON and on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Notice => "notice",
            Self::Qmp => "qmp",
            Self::Kernel => "kernel",
            Self::Relay => "relay",
            Self::Close => "close",
        }
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Whether an order is at work.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum RedirectState {
    /// It is at work.
    #[default]
    Active,
    /// It has come to its end; what came of each client is in its report.
    Done,
    /// It could not go on.
    Failed,
    /// It was called off.
    Cancelled,
}

/// What came of one client.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ClientState {
    /// Its turn has not come.
    #[default]
    Waiting,
    /// It is being moved.
    Moving,
    /// It is served from the other server, or has left for it.
    Moved,
    /// It is served from here as before.
    Stayed,
    /// It left by itself before it was moved.
    Left,
    /// It could not be moved, and is served as well as may be.
    Failed,
}

impl ClientState {
    /// Whether nothing more is done about it.
    pub const fn is_final(self) -> bool {
        !matches!(self, Self::Waiting | Self::Moving)
    }

    /// As it is written in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Moving => "moving",
            Self::Moved => "moved",
            Self::Stayed => "stayed",
            Self::Left => "left",
            Self::Failed => "failed",
        }
    }
}

/// One client of an order. All connections of a mirror are one.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct ClientReport {
    /// Its number; for a mirror, that of its oldest connection.
    pub id: u64,
    /// Its address.
    pub peer: String,
    /// The mirror, by the name of its cache.
    pub mirror: Option<String>,
    /// Its connections.
    pub connections: u64,
    /// How it is moved.
    pub way: Way,
    /// What came of it.
    pub state: ClientState,
    /// For how long no request of it was taken; `null` if it was not moved yet.
    pub pause_ms: Option<f64>,
    /// Requests under way when it was moved.
    pub in_flight: u64,
    /// Requests that failed on the old server and were asked of the new one.
    pub replayed: u64,
    /// Requests that were answered with an error since the move began, as far as this server has seen.
    pub errors: u64,
    /// Why it is in this state, for a human.
    pub why: Option<String>,
}

/// How many clients of an order are in each state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Counts {
    /// All.
    pub total: u64,
    /// [`ClientState::Waiting`].
    pub waiting: u64,
    /// [`ClientState::Moving`].
    pub moving: u64,
    /// [`ClientState::Moved`].
    pub moved: u64,
    /// [`ClientState::Stayed`].
    pub stayed: u64,
    /// [`ClientState::Left`].
    pub left: u64,
    /// [`ClientState::Failed`].
    pub failed: u64,
}

impl Counts {
    /// Counts them.
    pub fn of<'a>(clients: impl IntoIterator<Item = &'a ClientReport>) -> Self {
        let mut counts = Self::default();
        for client in clients {
            counts.total += 1;
            *counts.place(client.state) += 1;
        }
        counts
    }

    /// Adds others.
    pub(super) fn add(&mut self, other: &Self) {
        let Self { total, waiting, moving, moved, stayed, left, failed } = other;
        self.total += total;
        self.waiting += waiting;
        self.moving += moving;
        self.moved += moved;
        self.stayed += stayed;
        self.left += left;
        self.failed += failed;
    }

    fn place(&mut self, state: ClientState) -> &mut u64 {
        match state {
            ClientState::Waiting => &mut self.waiting,
            ClientState::Moving => &mut self.moving,
            ClientState::Moved => &mut self.moved,
            ClientState::Stayed => &mut self.stayed,
            ClientState::Left => &mut self.left,
            ClientState::Failed => &mut self.failed,
        }
    }
}

/// `GET /v1/redirects/N`: one order.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct RedirectStatus {
    /// Its number.
    pub order: u64,
    /// The export whose clients are moved.
    pub export: String,
    /// Where to.
    pub to: Vec<String>,
    /// How, as ordered.
    pub way: Way,
    /// Whether it was forced.
    pub force: bool,
    /// Whether it is at work.
    pub state: RedirectState,
    /// Why it failed, or ended before its time.
    pub error: Option<String>,
    /// Whether it is written down, so that it is known after a restart.
    pub durable: bool,
    /// What whoever ordered it should know.
    pub warnings: Vec<String>,
    /// When it was ordered.
    pub ordered: f64,
    /// When it ended.
    pub ended: Option<f64>,
    /// How many clients are in each state, all of them.
    pub counts: Counts,
    /// Its clients, oldest first. Of an order that has ended, so many as are remembered: those first that were not moved.
    pub clients: Vec<ClientReport>,
}

impl RedirectStatus {
    /// Clients that the report has left out.
    pub fn left_out(&self) -> u64 {
        self.counts.total.saturating_sub(to_u64(self.clients.len()))
    }
}

/// `GET /v1/redirects`: the active ones and the last that ended, oldest first.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct RedirectList {
    /// Each of them.
    pub redirects: Vec<RedirectStatus>,
}

/// `POST /v1/drain` and `POST /v1/exports/NAME/drain`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct DrainOrder {
    /// Where mirrors go. Without the name of an export, each export's own is taken.
    pub to: Vec<String>,
    /// Also where the other server does not say what it holds, or would lose something.
    pub force: bool,
    /// Closes the connections of those who cannot be told, when all is answered.
    pub close: bool,
}

/// `GET /v1/drain`: what is out of service, and who is still there.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct DrainStatus {
    /// Whether newcomers to any export are sent away.
    pub all: bool,
    /// Or those to these exports.
    pub exports: Vec<String>,
    /// Clients that are still connected to what is out of service.
    pub clients: Vec<u64>,
    /// The orders that move them.
    pub orders: Vec<u64>,
}

impl DrainStatus {
    /// Whether newcomers to the export of this full name are sent away.
    pub fn covers(&self, export: &str) -> bool {
        let is_of = |name: &String| {
            export.strip_prefix(name.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('@'))
        };
        self.all || self.exports.iter().any(is_of)
    }

    /// Whether anything is out of service.
    pub fn is_draining(&self) -> bool {
        self.all || !self.exports.is_empty()
    }
}
