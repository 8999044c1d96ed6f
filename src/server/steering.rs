//! What can be done to connected clients from outside: put another export under them, tell mirrors the news, close
//! them when all is answered, and send newcomers away.
//!
//! Owns: the orders to connections and what came of them. Does not own: whom to move and where to (`control`), how
//! each connection carries it out (`connection`, `transmission`).

use std::time::Duration;

use crate::export::{NodeId, SharedExport};
use crate::nbd::Uri;

use super::clients::{ClientStatus, ClientTable};

/// What operators can do to the clients of a running server. Cheap to clone; all clones are one.
#[derive(Debug, Clone)]
pub struct Steering {
    /// Names this process.
    pub node: NodeId,
    /// Who is connected.
    pub clients: ClientTable,
    /// What mirrors are told.
    pub notices: Notices,
    /// Who may come.
    pub gate: Gate,
}

/// One connected client. It may be gone at any time.
#[derive(Debug, Clone)]
pub struct ClientHandle {
    id: u64,
}

/// What came of putting another export under a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Switched {
    /// For how long no request of the client was taken.
    pub pause: Duration,
    /// Requests that were under way when it was done.
    pub in_flight: u64,
}

/// The client is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the client has left")]
pub struct Gone;

/// The news for one mirror.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum News {
    /// It is to fetch from these servers from now on, and to leave this one: `x-headwater:moved=URI,...`.
    Moved(Vec<Uri>),
    /// These are the servers that have the image; no need to leave: `x-headwater:upstreams=URI,...`.
    Upstreams(Vec<Uri>),
}

/// What mirrors are told, by the name of the export and the mirror.
#[derive(Debug, Clone, Default)]
pub struct Notices;

/// Who may come.
#[derive(Debug, Clone, Default)]
pub struct Gate;

impl ClientHandle {
    /// Its number in the table.
    pub const fn id(&self) -> u64 {
        self.id
    }

    /// What operators see of it; `None` once it has left.
    pub fn status(&self) -> Option<ClientStatus> {
        None
    }

    /// The mirror that it belongs to, if it is one and says which.
    pub fn node(&self) -> Option<NodeId> {
        None
    }

    /// Whether it waits for notices, so that news reach it at once.
    pub fn hears_notices(&self) -> bool {
        false
    }

    /// Has the client served from `export`, which has the same size and flags, from the next request on; the client
    /// notices nothing. `label` is what operators see of it (the URI); `None`: its own export again.
    /// On a writable export the requests under way are finished and flushed on the old one first. On a read-only one
    /// they finish where they are, and are asked of the new one if that fails (`Self::replayed`).
    pub async fn switch(&self, export: Option<(SharedExport, String)>) -> Result<Switched, Gone> {
        let _ = export;
        Err(Gone)
    }

    /// Requests that failed on an old export and were asked of the new one, so far.
    pub fn replayed(&self) -> u64 {
        0
    }

    /// Answers what has been received, then closes the connection.
    pub fn close(&self) {}

    /// Waits until it has left.
    ///
    /// Cancel safety: nothing is lost.
    pub async fn gone(&self) {}
}

impl ClientTable {
    /// The clients of an export now, oldest first: under its own name and under `NAME@blake3-...`; not those of what
    /// is beside it.
    pub fn of_export(&self, export: &str) -> Vec<ClientHandle> {
        let _ = export;
        Vec::new()
    }
}

impl Notices {
    /// Tells a mirror that has (or will have) connections to `export`, in place of what it was told before.
    pub fn tell(&self, export: &str, node: NodeId, news: News) {
        let _ = (export, node, news);
    }

    /// There is nothing to be told any more.
    pub fn forget(&self, export: &str, node: NodeId) {
        let _ = (export, node);
    }
}

impl Gate {
    /// Sends newcomers to an export, or to all, away with ERR_SHUTDOWN.
    pub fn shut(&self, export: Option<&str>) {
        let _ = export;
    }

    /// Lets them in again.
    pub fn open(&self, export: Option<&str>) {
        let _ = export;
    }
}
