//! Profiles from the upstream, and runs to it.
//!
//! A mirror takes the upstream's profiles when it starts, and again at its first clients while it knows nothing. It
//! hands up each run of its own clients and of the mirrors below it, so that the second host's first boot can be fetched
//! ahead because of the first host's. All of that is an attempt: an upstream that is no Headwater, or that is away,
//! costs a line in the log of details.
//!
//! Owns: when to ask, and how long to wait. Does not own: connections (`upstream`), what is learnt (`store`).

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::Notify;

use super::inbox::DESCRIPTION;
use super::store::INBOX;
use super::{LARGEST, Profiles, Recording, Run, Store};
use crate::clock;
use crate::error::Result;
use crate::export::{Export, assemble};
use crate::nbd::request::Durability;
use crate::ranges::ByteRange;
use crate::telemetry::seldom;
use crate::upstream::{Remote, Side};

/// How long an upstream may take to give or take profiles, over all servers.
const PATIENCE: Duration = Duration::from_secs(10);
/// An upstream that had nothing is asked again after this time at the earliest.
const PAUSE: Duration = Duration::from_secs(10);

/// What one mirror and its upstream tell each other of one image.
#[derive(Debug)]
pub struct Exchange {
    store: Arc<Store>,
    remote: Arc<Remote>,
    recording: Recording,
    /// Told when somebody would like to have profiles.
    wanted: Notify,
    /// Told when the upstream has been asked.
    answered: Notify,
    asked: Mutex<Option<Instant>>,
}

/// What there is to be done.
enum Event {
    Recorded(Run),
    Outgoing,
    Wanted,
}

impl Exchange {
    /// Between `store`, with what `recording` records, and `remote`. Nothing happens before [`Self::run`].
    pub fn new(store: Arc<Store>, remote: Arc<Remote>, recording: Recording) -> Self {
        store.begin_to_relay();
        Self { store, remote, recording, wanted: Notify::new(), answered: Notify::new(), asked: Mutex::default() }
    }

    /// Takes what the upstream knows, then learns from runs and hands them up, for ever. One task of a worker does this.
    ///
    /// Cancel safety: what was learnt by then is in the store; a run that is being handed up may be lost to the upstream.
    pub async fn run(&self) {
        self.take().await;
        loop {
            let event = tokio::select! {
                run = self.recording.next_run() => Event::Recorded(run),
                () = self.store.has_outgoing.notified() => Event::Outgoing,
                () = self.wanted.notified() => Event::Wanted,
            };
            match event {
                Event::Recorded(run) => {
                    let told = self.learn(&run);
                    self.store.save_aside().await;
                    if let Some(profiles) = told {
                        self.give(&profiles).await;
                    }
                }
                Event::Outgoing => {
                    while let Some(profiles) = self.store.take_outgoing() {
                        self.give(&profiles).await;
                    }
                }
                Event::Wanted => self.take().await,
            }
        }
    }

    /// A client has come, and nothing is known: the upstream may know something by now. It is asked once in 10 s at most.
    pub fn ask_again(&self) {
        let asked = *self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        let is_due = asked.is_none_or(|asked| clock::now().duration_since(asked) >= PAUSE);
        if is_due && self.store.is_empty() {
            self.wanted.notify_one();
        }
    }

    /// Learns from what is recorded at the end of a server, and makes it durable. Nothing is handed up any more.
    pub async fn settle(&self) {
        for run in self.recording.finish() {
            self.learn(&run);
        }
        self.store.save_aside().await;
    }

    /// Says what the image is, once the upstream has said it: what is handed up must be of the same.
    fn identify(&self) {
        if let Some(identity) = self.remote.facts().identity {
            self.store.identify(Some(identity));
        }
    }

    /// Learns from a run of our own clients; gives what the upstream is to be told, unless it was a mere look.
    fn learn(&self, run: &Run) -> Option<Profiles> {
        self.identify();
        let tag = &self.recording.settings().tag;
        let merged = self.store.merge(tag, run);
        let (image, bytes) = (self.remote.current(), run.bytes());
        match merged {
            Ok(super::Merged::Learnt) => seldom!(info, %image, %tag, bytes, "recorded what clients read"),
            Ok(super::Merged::Inspection) => {
                tracing::debug!(%image, %tag, bytes, "clients read too little to learn from");
                return None;
            }
            Err(error) => seldom!(warn, %image, %tag, %error, "cannot keep what clients read"),
        }
        let known = self.store.profiles();
        Some(Profiles::of_run(known.image_size(), known.identity(), tag.clone(), run))
    }

    /// Waits until the upstream has been asked once more.
    ///
    /// Cancel safety: nothing is lost.
    pub async fn answered(&self) {
        self.answered.notified().await;
    }

    /// What is recorded here.
    pub const fn recording(&self) -> &Recording {
        &self.recording
    }

    /// What was learnt.
    pub const fn store(&self) -> &Arc<Store> {
        &self.store
    }

    /// Takes what the upstream knows.
    async fn take(&self) {
        self.take_once().await;
        self.answered.notify_waiters();
    }

    async fn take_once(&self) {
        *self.asked.lock().unwrap_or_else(PoisonError::into_inner) = Some(clock::now());
        let Some(theirs) = fetch_profile(&self.remote).await else { return };
        self.identify();
        match self.store.adopt(&theirs) {
            Ok(0) => {}
            Ok(tags) => {
                tracing::info!(upstream = %self.remote.current(), tags, "took the profiles of the upstream");
                self.store.save_aside().await;
            }
            Err(error) => tracing::debug!(%error, "the upstream has profiles of another image"),
        }
    }

    async fn give(&self, profiles: &Profiles) {
        if !hand_up(&self.remote, profiles.encode().into()).await {
            tracing::debug!(upstream = %self.remote.current(), "no upstream takes what clients read");
        }
    }
}

/// The profiles of the image as the first server tells them that has any. `None`: there are none to be had within 10 s.
///
/// Cancel safety: safe. Connections live on the worker that calls.
pub async fn fetch_profile(remote: &Remote) -> Option<Profiles> {
    let fetching = async {
        for uri in remote.beside(Side::Profile) {
            let Ok(side) = remote.open_beside(uri.clone()).await else { continue };
            match read(&side).await {
                Ok(profiles) => return Some(profiles),
                Err(reason) => tracing::debug!(%uri, reason, "no profile is to be had"),
            }
        }
        None
    };
    tokio::time::timeout(PATIENCE, fetching).await.ok().flatten()
}

/// Reads profiles from an export that may be anything: some servers have one image under all names.
async fn read(side: &Remote) -> std::result::Result<Profiles, String> {
    let size = side.facts().size;
    if size > LARGEST {
        return Err("it is too large for a profile".to_owned());
    }
    let pieces = side.read(ByteRange::between(0, size)).await.map_err(|error| error.chain())?;
    Profiles::decode(&assemble(&pieces)).map_err(|error| error.to_string())
}

/// Writes encoded profiles of one run into the inbox of the first server that takes them. Says whether one did within
/// 10 s.
///
/// Cancel safety: it may have been taken. Connections live on the worker that calls.
pub async fn hand_up(remote: &Remote, message: Bytes) -> bool {
    let giving = async {
        for uri in remote.beside(Side::ProfileInbox) {
            let Ok(side) = remote.open_beside(uri.clone()).await else { continue };
            let facts = side.facts();
            // Whatever else answers to this name is somebody's data.
            if !facts.writable || facts.size != INBOX || facts.description != DESCRIPTION {
                tracing::debug!(%uri, "this is no inbox");
                continue;
            }
            match write(&side, message.clone()).await {
                Ok(()) => return true,
                Err(error) => tracing::debug!(%uri, error = %error.chain(), "the run is not taken"),
            }
        }
        false
    };
    tokio::time::timeout(PATIENCE, giving).await.unwrap_or(false)
}

async fn write(side: &Remote, message: Bytes) -> Result<()> {
    side.write(0, message, Durability::Volatile).await?;
    side.flush().await
}
