//! A session as its sender: reading, encoding, pacing, listening to reports.
//!
//! STUB

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use crate::cast::ReceiverId;
use crate::cast::form::{Phase, Run, Terms};
use crate::cast::layout::Layout;
use crate::cast::sender::{Progress, Settings};
use crate::export::SharedExport;
use crate::net::multicast::Outlet;
use crate::worker::Workers;

/// What is to be sent, and how.
#[derive(Debug)]
pub struct Session {
    /// Where the bytes come from. What it reads is believed: receivers hold it against the manifest.
    pub export: SharedExport,
    /// What the session is.
    pub terms: Terms,
    /// The plan of the terms.
    pub plan: Vec<Run>,
    /// Their layout.
    pub layout: Arc<Layout>,
    /// How it is sent.
    pub settings: Settings,
}

/// A session under way, or over. Cheap to clone; all clones are one. Dropping all of them does not end it.
#[derive(Debug, Clone)]
pub struct Sending;

/// What has become of a session so far.
#[derive(Debug, Clone)]
pub struct Sent {
    /// How far it is.
    pub phase: Phase,
    /// The same by receivers and symbols.
    pub progress: Progress,
    /// Where receivers are.
    pub addresses: Vec<(ReceiverId, SocketAddr)>,
    /// Bytes of all datagrams, without the headers of UDP and IP.
    pub bytes: u64,
    /// Bytes of datagrams per second, now.
    pub rate: u64,
    /// Reports that could not be believed.
    pub malformed: u64,
    /// Why it ended early.
    pub error: Option<String>,
}

impl Sending {
    /// Begins a session on a thread of its own. `outlet` makes the socket there.
    pub fn start(
        session: Session,
        outlet: impl FnOnce() -> io::Result<Outlet> + Send + 'static,
        workers: &Arc<Workers>,
    ) -> io::Result<Self> {
        let _ = (session, outlet, workers);
        unimplemented!()
    }

    /// How far it is.
    pub fn status(&self) -> Sent {
        unimplemented!()
    }

    /// Calls it off: receivers are told, and fetch what they lack from their upstreams.
    pub fn cancel(&self) {
        unimplemented!()
    }

    /// Waits until it is over.
    pub async fn over(&self) {
        unimplemented!()
    }
}
