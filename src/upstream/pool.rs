//! The connections to one export on several servers.
//!
//! Each worker prefers connections of its own, so that requests do not cross threads. The first request opens the
//! first connection; more are opened in the background, by workers that have none and while requests overlap, up to
//! the limit and only if the server says that its connections see one view (multi-conn).
//!
//! One server is current. When it cannot be used the next in the list becomes current, in a circle, and stays so until
//! it fails. Servers that are set aside (`trust`) come after all others: one becomes current only when no other can be
//! used, and is left again when another can. Whoever must have the answer of a certain server gets a connection to it,
//! which stays for the next who must.
//!
//! When all servers answer and none has the image any more, requests fail at once, and the servers are asked again
//! after a pause only.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, Weak};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Mutex as AsyncMutex, watch};
use tokio::time::{Instant, timeout_at};

use super::connection::{self, Handle, OpenFailure};
use super::trust::{Record, Rules};
use super::{Changed, Expectation, OpenError, ServerStatus, Settings, Stats};
use crate::clock;
use crate::error::Error;
use crate::export::Facts;
use crate::nbd::Uri;
use crate::nbd::client::{Answer, Request};
use crate::nbd::wire::TransmissionFlags;
use crate::ranges::ByteRange;
use crate::telemetry::Seldom;

/// After a failure of all servers, the next attempt waits this long; doubled each time up to the limit.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// A connection is joined by another one when it has more requests than this in flight.
const BUSY: usize = 1;
/// After a further connection was refused, none is tried for this long; nor is another server, while one is used that
/// is set aside.
const NO_MORE_FOR: Duration = Duration::from_secs(30);
/// Wrong replies of one server are logged once in this time.
const LIES_EVERY: Duration = Duration::from_secs(10);

/// How an attempt failed. `server` is the number of the server that it was made at.
#[derive(Debug)]
pub(super) enum Attempt {
    /// There is no connection to any server.
    Unreachable(String),
    /// All servers answer, and have another image.
    OtherImage(Error),
    /// The connection was lost while the request was under way.
    Lost { server: usize },
    /// The server took too long, and its connection brought nothing at all meanwhile.
    Silent { server: usize },
    /// There was not enough time left.
    Late,
    /// The server answered with an error.
    Refused { server: usize, error: Error },
}

/// Why there is no connection to a certain server.
#[derive(Debug, Clone)]
pub(super) struct Unusable {
    /// Whether it answered, and is not what it should be.
    pub(super) is_final: bool,
    pub(super) reason: String,
}

/// Connections, and which server is current.
#[derive(Debug)]
pub(super) struct Pool {
    servers: Vec<Server>,
    settings: Settings,
    /// Connections that outlive the pool may still add to them.
    pub(super) stats: Arc<Stats>,
    facts: Arc<RwLock<Facts>>,
    /// Never held across an await.
    state: Mutex<State>,
    /// Held while the first connection is opened, so that requests that come together wait for one attempt instead
    /// of each making its own.
    opening: AsyncMutex<()>,
    /// The servers that have another image than is expected.
    pub(super) changed: watch::Sender<Vec<Changed>>,
}

/// What stays of a server, and what is counted of it.
#[derive(Debug)]
struct Server {
    uri: Uri,
    stats: Arc<Stats>,
    /// Lets its lies into the log.
    lies: Seldom,
    /// Held while a connection to this very server is opened for those who must have its answer.
    opening: AsyncMutex<()>,
}

#[derive(Debug)]
struct State {
    expectation: Expectation,
    current: usize,
    handles: Vec<Handle>,
    /// Consecutive failures of all servers; the last one, if it was the last thing that happened.
    failures: u32,
    failed: Option<Failed>,
    /// Whether a further connection is being opened, and when none may be before.
    is_growing: bool,
    no_more_before: Option<Instant>,
    /// By the number of the server.
    health: Vec<Health>,
    rules: Rules,
}

/// A failure of all servers.
#[derive(Debug)]
struct Failed {
    at: Instant,
    reason: String,
    /// What requests end with, if all have another image.
    other_image: Option<Error>,
}

impl Failed {
    fn attempt(&self) -> Attempt {
        self.other_image.clone().map_or_else(|| Attempt::Unreachable(self.reason.clone()), Attempt::OtherImage)
    }
}

/// What is known of one server.
#[derive(Debug, Default)]
struct Health {
    trust: Record,
    /// Why it could not be connected to when it was tried last, if it could not.
    unusable: Option<(Instant, Unusable)>,
    /// The last thing that went wrong since it was connected to.
    last_error: Option<String>,
}

impl State {
    /// The servers in the order in which they are to be tried: in a circle from `first` on, those set aside last.
    fn order(&self, first: usize) -> Vec<usize> {
        let (now, count) = (clock::now(), self.health.len());
        let mut order: Vec<_> = (0..count).map(|step| (first + step) % count).collect();
        order.sort_by_key(|server| self.health[*server].trust.aside(now));
        order
    }

    fn is_aside(&self, server: usize) -> bool {
        self.health[server].trust.aside(clock::now()).is_some()
    }

    /// The connection to `server` with least to do: of this worker, or of another as long as this one has none.
    fn least_busy(&mut self, server: usize) -> Option<Handle> {
        self.handles.retain(Handle::is_alive);
        let here = crate::worker::index();
        let of_server = self.handles.iter().filter(|handle| handle.server == server);
        of_server.min_by_key(|handle| (handle.worker != here, handle.in_flight())).cloned()
    }
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
            health: uris.iter().map(|_| Health::default()).collect(),
            rules: Rules::default(),
        };
        let lies = || Seldom::new(LIES_EVERY);
        let server = |uri| Server { uri, stats: Arc::default(), lies: lies(), opening: AsyncMutex::default() };
        Self {
            servers: uris.into_iter().map(server).collect(),
            settings,
            stats: Arc::default(),
            facts,
            state: Mutex::new(state),
            opening: AsyncMutex::new(()),
            changed: watch::Sender::default(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn expect(&self, change: impl FnOnce(&mut Expectation)) {
        let mut state = self.state();
        change(&mut state.expectation);
        // Whoever was refused until now is asked again.
        state.failed = None;
        drop(state);
        self.changed.send_if_modified(|list| !std::mem::take(list).is_empty());
    }

    pub(super) fn expectation(&self) -> Expectation {
        self.state().expectation
    }

    pub(super) const fn settings(&self) -> &Settings {
        &self.settings
    }

    #[cfg(test)]
    pub(super) fn set_rules(&self, rules: Rules) {
        self.state().rules = rules;
    }

    pub(super) fn current(&self) -> Uri {
        self.uri(self.state().current).clone()
    }

    pub(super) fn is_reachable(&self) -> bool {
        self.state().failures == 0
    }

    /// All servers, in the order in which they are to be tried.
    pub(super) fn order(&self) -> Vec<usize> {
        let state = self.state();
        state.order(state.current)
    }

    /// How each server is doing, in the order of the list.
    pub(super) fn status(&self) -> Vec<ServerStatus> {
        let (state, now) = (self.state(), clock::now());
        let status = |(number, server): (usize, &Server)| ServerStatus {
            uri: server.uri.clone(),
            is_current: number == state.current,
            connections: state.handles.iter().filter(|handle| handle.server == number && handle.is_alive()).count(),
            received_bytes: server.stats.received_bytes.value(),
            requests: server.stats.requests.value(),
            wrong_replies: server.stats.wrong_replies.value(),
            set_aside_for: state.health[number].trust.aside(now),
            last_error: state.health[number].last_error.clone(),
        };
        self.servers.iter().enumerate().map(status).collect()
    }

    /// Tries a request once, on one connection, until `deadline` or for as long as leaves time for another server.
    /// Tells which server has answered.
    pub(super) async fn attempt(
        pool: &Arc<Self>,
        request: Request,
        data: Bytes,
        deadline: Instant,
    ) -> Result<(Answer, usize), Attempt> {
        let handle = timeout_at(deadline, Self::handle(pool)).await;
        let handle = handle.unwrap_or_else(|_| Err(Attempt::Unreachable("no connection in time".into())))?;
        let answer = pool.ask(&handle, request, data, deadline).await?;
        Ok((answer, handle.server))
    }

    /// Sends a request over this connection, with the same limit.
    pub(super) async fn ask(
        &self,
        handle: &Handle,
        request: Request,
        data: Bytes,
        deadline: Instant,
    ) -> Result<Answer, Attempt> {
        let (server, before) = (handle.server, handle.received());
        // Time enough for a verdict, and the rest for another server.
        let verdict = Instant::now() + self.settings.patience / 2;
        let limit = if self.has_alternatives() { deadline.min(verdict) } else { deadline };
        match timeout_at(limit, handle.ask(request, data)).await {
            Ok(Some(result)) => result.map_err(|error| Attempt::Refused { server, error }),
            Ok(None) => Err(Attempt::Lost { server }),
            Err(_) if Instant::now() >= verdict && handle.received() == before => {
                // Whatever is wrong with this connection, the next request shall not depend on it.
                self.state().handles.retain(|other| !other.is_same(handle));
                Err(Attempt::Silent { server })
            }
            Err(_) => Err(Attempt::Late),
        }
    }

    /// Whether there is more than one server.
    pub(super) fn has_alternatives(&self) -> bool {
        self.servers.len() > 1
    }

    /// The server with this number.
    pub(super) fn uri(&self, server: usize) -> &Uri {
        &self.servers[server].uri
    }

    /// After a failure of `server`, turns to the next one, or to new connections if there is no other. Many requests
    /// may find the same failure: only the first of them turns.
    pub(super) fn fail_over(&self, server: usize, reason: &str) {
        let mut state = self.state();
        // Requests in flight on the old connections end there; the connections close after the last of them.
        state.handles.retain(|handle| handle.server != server);
        state.health[server].last_error = Some(reason.to_owned());
        if state.current != server {
            return;
        }
        let next = state.order(server).into_iter().find(|other| *other != server);
        if let Some(next) = next {
            if state.is_aside(next) {
                state.no_more_before = Some(Instant::now() + NO_MORE_FOR);
            }
            self.make_current(&mut state, next);
            tracing::warn!(from = %self.uri(server), to = %self.uri(next), reason, "turning to another server");
        }
    }

    fn make_current(&self, state: &mut State, server: usize) {
        state.current = server;
        if let Some(handle) = state.least_busy(server) {
            self.learn(&handle);
        }
    }

    /// The facts are those of the current server.
    fn learn(&self, handle: &Handle) {
        *self.facts.write().unwrap_or_else(PoisonError::into_inner) = connection::facts(&handle.agreed);
    }

    /// Takes note that `server` sent other bytes than those of the image for `range`. One that does so repeatedly is
    /// set aside, if there is another.
    pub(super) fn lied(&self, server: usize, range: ByteRange) {
        let (now, Server { uri, stats, lies, .. }) = (clock::now(), &self.servers[server]);
        let (offset, length) = (range.start(), range.length());
        self.stats.wrong_replies.add(1);
        stats.wrong_replies.add(1);
        if let Some(unsaid) = lies.now(now) {
            tracing::warn!(%uri, offset, length, unsaid, "the upstream sent wrong bytes");
        }
        let mut state = self.state();
        let rules = state.rules;
        let health = &mut state.health[server];
        let reason = format!("it sent wrong bytes: {length} at {offset}");
        if self.has_alternatives()
            && let Some(time) = health.trust.lied(now, &rules)
        {
            let (count, seconds) = (stats.wrong_replies.value(), time.as_secs());
            tracing::warn!(%uri, count, seconds, "the upstream sends wrong bytes repeatedly: set aside");
            drop(state);
            self.fail_over(server, &reason);
        } else {
            health.last_error = Some(reason);
        }
    }

    /// Waits before the attempt that follows `tries` others: as long as all servers have failed, or a little after
    /// the second failure of the request itself.
    pub(super) async fn pause(&self, tries: u32) {
        let until = {
            let state = self.state();
            match &state.failed {
                Some(failed) => failed.at + backoff(state.failures),
                None if tries > 1 => Instant::now() + backoff(tries - 1),
                None => return,
            }
        };
        tokio::time::sleep_until(until).await;
    }

    /// A connection for this worker.
    async fn handle(pool: &Arc<Self>) -> Result<Handle, Attempt> {
        if let Some(handle) = Self::ready(pool) {
            return Ok(handle);
        }
        let began = Instant::now();
        let _opening = pool.opening.lock().await;
        // Somebody may have opened one, or failed to, while we waited.
        if let Some(handle) = Self::ready(pool) {
            return Ok(handle);
        }
        let before = {
            let state = pool.state();
            if let Some(failed) = &state.failed {
                // Requests that fail at once are repeated at once; the servers are not to suffer from it.
                let rests = failed.other_image.is_some() && Instant::now() < failed.at + backoff(state.failures);
                if failed.at >= began || rests {
                    return Err(failed.attempt());
                }
            }
            state.failed.as_ref().map(|failed| failed.reason.clone())
        };
        Self::open(pool).await.map_err(|error| {
            let (reason, other_image) = (error.to_string(), error.other_image());
            // The first failure and every change of it; not each repetition.
            if before.is_none_or(|before| before != reason) {
                match &other_image {
                    None => tracing::warn!(reason, "no upstream can be used: waiting for one"),
                    Some(_) => tracing::warn!(reason, "no upstream has this image any more: requests fail"),
                }
            }
            other_image.map_or(Attempt::Unreachable(reason), Attempt::OtherImage)
        })
    }

    /// A connection to the current server.
    fn ready(pool: &Arc<Self>) -> Option<Handle> {
        let mut state = pool.state();
        let better = state.is_aside(state.current).then(|| state.order(state.current)[0]);
        let better = better.filter(|better| !state.is_aside(*better));
        if let Some(better) = better
            && state.least_busy(better).is_some()
        {
            pool.turn_back(&mut state, better);
        } else if let Some(better) = better
            && !state.is_growing
            && state.no_more_before.is_none_or(|time| Instant::now() >= time)
        {
            state.is_growing = true;
            tokio::task::spawn_local(Self::grow(Arc::clone(pool), better));
        }
        let current = state.current;
        let least = state.least_busy(current)?;
        let wanted = least.worker != crate::worker::index() || least.in_flight() > BUSY;
        if wanted && !state.is_growing && pool.may_grow(&state) {
            state.is_growing = true;
            tokio::task::spawn_local(Self::grow(Arc::clone(pool), current));
        }
        Some(least)
    }

    fn may_grow(&self, state: &State) -> bool {
        let mut own = state.handles.iter().filter(|handle| handle.server == state.current).peekable();
        let Some(first) = own.peek() else { return false };
        first.agreed.flags.contains(TransmissionFlags::CAN_MULTI_CONN)
            && own.count() < self.settings.connections
            && state.no_more_before.is_none_or(|time| Instant::now() >= time)
    }

    /// Leaves a server that is set aside for one that is not.
    fn turn_back(&self, state: &mut State, better: usize) {
        let aside = state.current;
        state.handles.retain(|handle| handle.server != aside);
        self.make_current(state, better);
        tracing::info!(from = %self.uri(aside), to = %self.uri(better), "turning back to a server that is not set aside");
    }

    /// Opens a further connection to the current server, or one to a `server` that is better.
    async fn grow(pool: Arc<Self>, server: usize) {
        let result = Self::open_at(&pool, server).await;
        let mut state = pool.state();
        state.is_growing = false;
        match result {
            // Another server may have become current meanwhile; then this one is not wanted.
            Ok(handle) if state.current == server => state.handles.push(handle),
            Ok(handle) if state.is_aside(state.current) && !state.is_aside(server) => {
                state.handles.push(handle);
                pool.turn_back(&mut state, server);
            }
            Ok(_) => {}
            Err(error) => {
                tracing::debug!(uri = %pool.uri(server), %error, "no further connection");
                state.no_more_before = Some(Instant::now() + NO_MORE_FOR);
            }
        }
    }

    /// Opens a connection to the current server, or to the next that can be used.
    pub(super) async fn open(pool: &Arc<Self>) -> Result<Handle, OpenError> {
        let mut failures = Vec::new();
        let (first, order) = {
            let state = pool.state();
            (state.current, state.order(state.current))
        };
        for server in order {
            let uri = pool.uri(server);
            match Self::open_at(pool, server).await {
                Ok(handle) => {
                    let mut state = pool.state();
                    if server != state.current || state.failures > 0 {
                        tracing::info!(%uri, "connected to the upstream");
                    }
                    (state.failures, state.failed) = (0, None);
                    // Unless somebody has turned away from that server while it was connected to.
                    if state.current == first {
                        state.handles.push(handle.clone());
                        pool.make_current(&mut state, server);
                    }
                    return Ok(handle);
                }
                Err(failure) => failures.push((uri.clone(), failure)),
            }
        }
        let error = OpenError { failures };
        let mut state = pool.state();
        state.failures = state.failures.saturating_add(1);
        let other_image = error.other_image();
        state.failed = Some(Failed { at: Instant::now(), reason: error.to_string(), other_image });
        Err(error)
    }

    /// A connection to `server` and no other.
    pub(super) async fn handle_at(pool: &Arc<Self>, server: usize) -> Result<Handle, Unusable> {
        let ready = || pool.state().least_busy(server);
        if let Some(handle) = ready() {
            return Ok(handle);
        }
        let began = Instant::now();
        let _opening = pool.servers[server].opening.lock().await;
        // As in `handle`.
        if let Some(handle) = ready() {
            return Ok(handle);
        }
        if let Some((at, unusable)) = &pool.state().health[server].unusable
            && *at >= began
        {
            return Err(unusable.clone());
        }
        let handle = Self::open_at(pool, server).await.map_err(|failure| Unusable::from(&failure))?;
        let mut state = pool.state();
        state.handles.push(handle.clone());
        if state.current == server {
            (state.failures, state.failed) = (0, None);
            pool.learn(&handle);
        }
        Ok(handle)
    }

    async fn open_at(pool: &Arc<Self>, number: usize) -> Result<Handle, OpenFailure> {
        let Server { uri, stats, .. } = &pool.servers[number];
        let counted = [Arc::clone(stats), Arc::clone(&pool.stats)];
        let admit = |facts: &Facts| pool.admit(number, facts);
        // The pool ends its connections by going away.
        let (owner, lost_uri) = (Arc::downgrade(pool), uri.clone());
        let ended = move |reason: String| {
            tracing::warn!(uri = %lost_uri, reason, "lost a connection to the upstream");
            if let Some(pool) = Weak::upgrade(&owner) {
                pool.state().health[number].last_error = Some(reason);
            }
        };
        let result = connection::start(uri, &pool.settings, counted, admit, ended).await;
        let unusable = result.as_ref().err().map(Unusable::from);
        let mut state = pool.state();
        let health = &mut state.health[number];
        health.last_error = unusable.as_ref().map(|unusable| unusable.reason.clone());
        health.unusable = unusable.map(|unusable| (Instant::now(), unusable));
        drop(state);
        let mut handle = result?;
        handle.server = number;
        [stats, &pool.stats].into_iter().for_each(|stats| stats.connections.add(1));
        Ok(handle)
    }
}

impl From<&OpenFailure> for Unusable {
    fn from(failure: &OpenFailure) -> Self {
        Self { is_final: failure.is_final(), reason: failure.to_string() }
    }
}

/// Doubles with each failure, up to the limit, and is spread by a quarter so that many clients of a server that
/// comes back do not all come at once.
pub(super) fn backoff(failures: u32) -> Duration {
    let pause = FIRST_PAUSE.saturating_mul(1 << failures.saturating_sub(1).min(10)).min(LONGEST_PAUSE);
    let mut byte = [0u8];
    // Without randomness there is no spreading, and nothing else is lost.
    let _ = rustix::rand::getrandom(&mut byte, rustix::rand::GetRandomFlags::NONBLOCK);
    pause.mul_f32(1.0 - f32::from(byte[0]) / 1024.0)
}
