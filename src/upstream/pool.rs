//! The connections to one export on several servers.
//!
//! Each worker prefers connections of its own, so that requests do not cross threads. The first request opens the
//! first connection; more are opened in the background, by workers that have none and while requests overlap, up to
//! the limit and only if the server says that its connections see one view (multi-conn).
//!
//! One server is current. When it cannot be used the next in the list becomes current, in a circle, and stays so until
//! it fails.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Mutex as AsyncMutex;
use tokio::time::{Instant, timeout_at};

use super::connection::{self, Handle, OpenFailure};
use super::{Expectation, OpenError, Settings, Stats};
use crate::error::Error;
use crate::export::Facts;
use crate::nbd::Uri;
use crate::nbd::client::{Answer, Request};
use crate::nbd::wire::TransmissionFlags;

/// After a failure of all servers, the next attempt waits this long; doubled each time up to the limit.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// A connection is joined by another one when it has more requests than this in flight.
const BUSY: usize = 1;
/// After a further connection was refused, none is tried for this long.
const NO_MORE_FOR: Duration = Duration::from_secs(30);

/// How an attempt failed. `server` is the number of the server that it was made at.
#[derive(Debug)]
pub(super) enum Attempt {
    /// There is no connection to any server.
    Unreachable(String),
    /// The connection was lost while the request was under way.
    Lost { server: usize },
    /// The server took too long, and its connection brought nothing at all meanwhile.
    Silent { server: usize },
    /// There was not enough time left.
    Late,
    /// The server answered with an error.
    Refused { server: usize, error: Error },
}

/// Connections, and which server is current.
#[derive(Debug)]
pub(super) struct Pool {
    uris: Vec<Uri>,
    settings: Settings,
    /// Connections that outlive the pool may still add to them.
    pub(super) stats: Arc<Stats>,
    facts: Arc<RwLock<Facts>>,
    /// Never held across an await.
    state: Mutex<State>,
    /// Held while the first connection is opened, so that requests that come together wait for one attempt instead
    /// of each making its own.
    opening: AsyncMutex<()>,
}

#[derive(Debug)]
struct State {
    expectation: Expectation,
    current: usize,
    handles: Vec<Handle>,
    /// Consecutive failures of all servers; the last one's time and text, if it was the last thing that happened.
    failures: u32,
    failed: Option<(Instant, String)>,
    /// Whether a further connection is being opened, and when none may be before.
    is_growing: bool,
    no_more_before: Option<Instant>,
}

impl Pool {
    pub(super) fn new(
        uris: Vec<Uri>,
        expectation: Expectation,
        mut settings: Settings,
        facts: Arc<RwLock<Facts>>,
    ) -> Self {
        // All servers are to be tried while a request waits, and the one that answers must have time to.
        let share = settings.patience / u32::try_from(uris.len() + 1).unwrap_or(u32::MAX);
        settings.connect_timeout = settings.connect_timeout.min(share);
        let state = State {
            expectation,
            current: 0,
            handles: Vec::new(),
            failures: 0,
            failed: None,
            is_growing: false,
            no_more_before: None,
        };
        Self { uris, settings, stats: Arc::default(), facts, state: Mutex::new(state), opening: AsyncMutex::new(()) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn expect(&self, change: impl FnOnce(&mut Expectation)) {
        change(&mut self.state().expectation);
    }

    pub(super) fn current(&self) -> Uri {
        self.uris[self.state().current].clone()
    }

    pub(super) fn is_reachable(&self) -> bool {
        self.state().failures == 0
    }

    /// Tries a request once, on one connection, until `deadline` or for as long as leaves time for another server.
    pub(super) async fn attempt(
        pool: &Arc<Self>,
        request: Request,
        data: Bytes,
        deadline: Instant,
    ) -> Result<Answer, Attempt> {
        let handle = timeout_at(deadline, Self::handle(pool)).await;
        let handle = handle.unwrap_or_else(|_| Err("no connection in time".into())).map_err(Attempt::Unreachable)?;
        let (server, before) = (handle.server, handle.received());
        // Time enough for a verdict, and the rest for another server.
        let verdict = Instant::now() + pool.settings.patience / 2;
        let limit = if pool.has_alternatives() { deadline.min(verdict) } else { deadline };
        match timeout_at(limit, handle.ask(request, data)).await {
            Ok(Some(result)) => result.map_err(|error| Attempt::Refused { server, error }),
            Ok(None) => Err(Attempt::Lost { server }),
            Err(_) if Instant::now() >= verdict && handle.received() == before => {
                // Whatever is wrong with this connection, the next request shall not depend on it.
                pool.state().handles.retain(|other| !other.is_same(&handle));
                Err(Attempt::Silent { server })
            }
            Err(_) => Err(Attempt::Late),
        }
    }

    /// Whether there is more than one server.
    pub(super) fn has_alternatives(&self) -> bool {
        self.uris.len() > 1
    }

    /// The server with this number.
    pub(super) fn uri(&self, server: usize) -> &Uri {
        &self.uris[server]
    }

    /// After a failure of `server`, turns to the next one, or to new connections if there is no other. Many requests
    /// may find the same failure: only the first of them turns.
    pub(super) fn fail_over(&self, server: usize, reason: &str) {
        let mut state = self.state();
        // Requests in flight on the old connections end there; the connections close after the last of them.
        state.handles.retain(|handle| handle.server != server);
        if state.current == server && self.has_alternatives() {
            state.current = (server + 1) % self.uris.len();
            let (from, to) = (&self.uris[server], &self.uris[state.current]);
            tracing::warn!(%from, %to, reason, "turning to another server");
        }
    }

    /// Waits before the attempt that follows `tries` others: as long as all servers have failed, or a little after
    /// the second failure of the request itself.
    pub(super) async fn pause(&self, tries: u32) {
        let until = {
            let state = self.state();
            match &state.failed {
                Some((at, _)) => *at + backoff(state.failures),
                None if tries > 1 => Instant::now() + backoff(tries - 1),
                None => return,
            }
        };
        tokio::time::sleep_until(until).await;
    }

    /// A connection for this worker.
    async fn handle(pool: &Arc<Self>) -> Result<Handle, String> {
        if let Some(handle) = Self::ready(pool) {
            return Ok(handle);
        }
        let began = Instant::now();
        let _opening = pool.opening.lock().await;
        // Somebody may have opened one, or failed to, while we waited.
        if let Some(handle) = Self::ready(pool) {
            return Ok(handle);
        }
        if let Some((at, reason)) = &pool.state().failed
            && *at >= began
        {
            return Err(reason.clone());
        }
        let before = pool.state().failed.as_ref().map(|(_, reason)| reason.clone());
        Self::open(pool).await.map_err(|error| {
            let reason = error.to_string();
            // The first failure and every change of it; not each repetition.
            if before.is_none_or(|before| before != reason) {
                tracing::warn!(reason, "no upstream can be used: waiting for one");
            }
            reason
        })
    }

    /// The connection with least to do: of this worker, or of another as long as this one has none.
    fn ready(pool: &Arc<Self>) -> Option<Handle> {
        let mut state = pool.state();
        state.handles.retain(Handle::is_alive);
        let here = crate::worker::index();
        let least = state.handles.iter().min_by_key(|handle| (handle.worker != here, handle.in_flight())).cloned()?;
        let wanted = least.worker != here || least.in_flight() > BUSY;
        if wanted && !state.is_growing && pool.may_grow(&state) {
            state.is_growing = true;
            drop(state);
            tokio::task::spawn_local(Self::grow(Arc::clone(pool)));
        }
        Some(least)
    }

    fn may_grow(&self, state: &State) -> bool {
        let Some(first) = state.handles.first() else { return false };
        first.agreed.flags.contains(TransmissionFlags::CAN_MULTI_CONN)
            && state.handles.len() < self.settings.connections
            && state.no_more_before.is_none_or(|time| Instant::now() >= time)
    }

    /// Opens a further connection to the current server.
    async fn grow(pool: Arc<Self>) {
        let current = pool.state().current;
        let result = Self::open_at(&pool, current).await;
        let mut state = pool.state();
        state.is_growing = false;
        match result {
            // Another server may have become current meanwhile; then this one is not wanted.
            Ok(handle) if state.current == current => state.handles.push(handle),
            Ok(_) => {}
            Err(error) => {
                tracing::debug!(uri = %pool.uris[current], %error, "no further connection");
                state.no_more_before = Some(Instant::now() + NO_MORE_FOR);
            }
        }
    }

    /// Opens a connection to the current server, or to the next that can be used.
    pub(super) async fn open(pool: &Arc<Self>) -> Result<Handle, OpenError> {
        let mut failures = Vec::new();
        let first = pool.state().current;
        for index in (0..pool.uris.len()).map(|step| (first + step) % pool.uris.len()) {
            let uri = &pool.uris[index];
            match Self::open_at(pool, index).await {
                Ok(handle) => {
                    let mut state = pool.state();
                    if index != state.current || state.failures > 0 {
                        tracing::info!(%uri, "connected to the upstream");
                    }
                    (state.failures, state.failed) = (0, None);
                    // Unless somebody has turned away from that server while it was connected to.
                    if state.current == first {
                        state.current = index;
                        state.handles.push(handle.clone());
                    }
                    return Ok(handle);
                }
                Err(failure) => failures.push((uri.clone(), failure)),
            }
        }
        let error = OpenError { failures };
        let mut state = pool.state();
        state.failures = state.failures.saturating_add(1);
        state.failed = Some((Instant::now(), error.to_string()));
        Err(error)
    }

    async fn open_at(pool: &Arc<Self>, index: usize) -> Result<Handle, OpenFailure> {
        let uri = pool.uris[index].clone();
        let expectation = pool.state().expectation;
        let Settings { connect_timeout, stall_timeout, .. } = pool.settings;
        let stats = Arc::clone(&pool.stats);
        let lost_uri = uri.clone();
        let ended = move |reason: String| tracing::warn!(uri = %lost_uri, reason, "lost a connection to the upstream");
        let mut handle = connection::start(&uri, &expectation, connect_timeout, stall_timeout, stats, ended).await?;
        handle.server = index;
        pool.stats.connections.add(1);
        *pool.facts.write().unwrap_or_else(PoisonError::into_inner) = connection::facts(&handle.agreed);
        Ok(handle)
    }
}

/// Doubles with each failure, up to the limit, and is spread by a quarter so that many clients of a server that
/// comes back do not all come at once.
fn backoff(failures: u32) -> Duration {
    let pause = FIRST_PAUSE.saturating_mul(1 << failures.saturating_sub(1).min(10)).min(LONGEST_PAUSE);
    let mut byte = [0u8];
    // Without randomness there is no spreading, and nothing else is lost.
    let _ = rustix::rand::getrandom(&mut byte, rustix::rand::GetRandomFlags::NONBLOCK);
    pause.mul_f32(1.0 - f32::from(byte[0]) / 1024.0)
}
