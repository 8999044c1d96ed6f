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
//!
//! A list of servers never changes: another list is another pool (`redirect`), which is a candidate first, then the one
//! in use, and in the end has been left. A pool that was left gives no connections any more. Requests on its connections
//! get their answers; whoever waits for anything else of it asks the pool that is in use now.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Mutex as AsyncMutex, Notify};
use tokio::time::{Instant, timeout_at};

use super::common::Common;
use super::connection::{self, Handle};
use super::opening::{Introduction, OpenFailure, facts, tells_news};
use super::server::{Server, Unusable};
use super::{OpenError, ServerStatus};
use crate::clock;
use crate::error::Error;
use crate::export::Facts;
use crate::nbd::Uri;
use crate::nbd::client::{Answer, Request};
use crate::nbd::wire::TransmissionFlags;
use crate::ranges::ByteRange;

/// After a failure of all servers, the next attempt waits this long; doubled each time up to the limit.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// A connection is joined by another one when it has more requests than this in flight.
const BUSY: usize = 1;
/// After a further connection was refused, none is tried for this long; nor is another server, while one is used that
/// is set aside.
const NO_MORE_FOR: Duration = Duration::from_secs(30);

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
    /// There is another pool now.
    Left,
}

/// Connections, and which server is current.
#[derive(Debug)]
pub(super) struct Pool {
    pub(super) servers: Vec<Arc<Server>>,
    pub(super) common: Arc<Common>,
    /// How long opening one connection may take.
    pub(super) connect_timeout: Duration,
    /// Never held across an await.
    state: Mutex<State>,
    /// Held while the first connection is opened, so that requests that come together wait for one attempt instead
    /// of each making its own.
    opening: AsyncMutex<()>,
    /// Told when the pool has been left.
    pub(super) left: Notify,
}

/// What a pool is for its remote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// It is tried whether it can be used. Nobody is told anything.
    Candidate,
    InUse,
    Left,
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) stage: Stage,
    pub(super) current: usize,
    pub(super) handles: Vec<Handle>,
    /// Consecutive failures of all servers; the last one, if it was the last thing that happened.
    failures: u32,
    failed: Option<Failed>,
    /// Whether a further connection is being opened, and when none may be before.
    is_growing: bool,
    no_more_before: Option<Instant>,
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

impl State {
    /// The connection to `server` with least to do: of this worker, or of another as long as this one has none.
    fn least_busy(&mut self, server: usize) -> Option<Handle> {
        self.handles.retain(Handle::is_alive);
        let here = crate::worker::index();
        let of_server = self.handles.iter().filter(|handle| handle.server == server);
        of_server.min_by_key(|handle| (handle.worker != here, handle.in_flight())).cloned()
    }
}

impl Pool {
    pub(super) fn new(servers: Vec<Arc<Server>>, common: Arc<Common>, stage: Stage) -> Self {
        let settings = &common.settings;
        // All servers are to be tried while a request waits, and the one that answers must have time to.
        let share = settings.patience / u32::try_from(servers.len() + 1).unwrap_or(u32::MAX);
        let connect_timeout = settings.connect_timeout.min(share);
        let state = State {
            stage,
            current: 0,
            handles: Vec::new(),
            failures: 0,
            failed: None,
            is_growing: false,
            no_more_before: None,
        };
        Self {
            servers,
            common,
            connect_timeout,
            state: Mutex::new(state),
            opening: AsyncMutex::new(()),
            left: Notify::new(),
        }
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Servers that were refused until now are asked again.
    pub(super) fn forgive(&self) {
        self.state().failed = None;
    }

    pub(super) fn current(&self) -> Uri {
        self.current_server().uri.clone()
    }

    pub(super) fn current_server(&self) -> &Server {
        let current = self.state().current;
        &self.servers[current]
    }

    pub(super) fn is_reachable(&self) -> bool {
        self.state().failures == 0
    }

    pub(super) fn was_left(&self) -> bool {
        self.state().stage == Stage::Left
    }

    /// Does something of which the result is of no use any more once the pool has been left; `None`: it has been.
    pub(super) async fn unless_left<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        let left = self.left.notified();
        if self.was_left() {
            return None;
        }
        tokio::select! {
            biased;
            () = left => None,
            result = work => Some(result),
        }
    }

    /// The servers in the order in which they are to be tried: in a circle from `first` on, those set aside last.
    fn order_from(&self, first: usize) -> Vec<usize> {
        let count = self.servers.len();
        let mut order: Vec<_> = (0..count).map(|step| (first + step) % count).collect();
        order.sort_by_cached_key(|server| self.servers[*server].aside());
        order
    }

    fn is_aside(&self, server: usize) -> bool {
        self.servers[server].aside().is_some()
    }

    /// All servers, in the order in which they are to be tried.
    pub(super) fn order(&self) -> Vec<usize> {
        let current = self.state().current;
        self.order_from(current)
    }

    /// How each server is doing, in the order of the list.
    pub(super) fn status(&self) -> Vec<ServerStatus> {
        fn handles(state: &State, server: usize) -> impl Iterator<Item = &Handle> {
            state.handles.iter().filter(move |handle| handle.server == server)
        }
        let state = self.state();
        let status = |(number, server): (usize, &Arc<Server>)| ServerStatus {
            uri: server.uri.clone(),
            is_current: number == state.current,
            connections: handles(&state, number).filter(|handle| handle.is_alive()).count(),
            received_bytes: server.stats.received_bytes.value(),
            requests: server.stats.requests.value(),
            in_flight: handles(&state, number).map(Handle::in_flight).sum(),
            retries: server.stats.retries.value(),
            latency: server.stats.latencies.spread(),
            wrong_replies: server.stats.wrong_replies.value(),
            set_aside_for: server.aside(),
            last_error: server.last_error(),
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
    ) -> Result<(Answer, Arc<Server>), Attempt> {
        let handle = match Self::ready(pool) {
            Some(handle) => handle,
            None => match timeout_at(deadline, pool.unless_left(Self::handle(pool))).await {
                Ok(handle) => handle.unwrap_or(Err(Attempt::Left))?,
                Err(_) => return Err(Attempt::Unreachable("no connection in time".into())),
            },
        };
        let answer = pool.ask(&handle, request, data, deadline).await?;
        Ok((answer, Arc::clone(&pool.servers[handle.server])))
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
        let verdict = Instant::now() + self.common.settings.patience / 2;
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
        self.servers[server].went_wrong(reason.to_owned());
        if state.current != server || state.stage == Stage::Left {
            return;
        }
        let next = self.order_from(server).into_iter().find(|other| *other != server);
        if let Some(next) = next {
            if self.is_aside(next) {
                state.no_more_before = Some(Instant::now() + NO_MORE_FOR);
            }
            self.make_current(&mut state, next);
            tracing::warn!(from = %self.uri(server), to = %self.uri(next), reason, "turning to another server");
        }
    }

    fn make_current(&self, state: &mut State, server: usize) {
        state.current = server;
        let handle = state.least_busy(server);
        self.publish(state, handle.as_ref());
    }

    /// Tells where requests go now. The facts are those of the current server, as far as a connection to it has told
    /// them.
    pub(super) fn publish(&self, state: &State, handle: Option<&Handle>) {
        if state.stage != Stage::InUse {
            return;
        }
        if let Some(handle) = handle {
            self.common.set_facts(facts(&handle.agreed));
        }
        let server = &self.servers[state.current];
        self.common.publish(&server.uri, server.tells_news());
    }

    /// Takes note that `server` sent other bytes than those of the image for `range`. One that does so repeatedly is
    /// set aside, if there is another.
    pub(super) fn lied(&self, server: usize, range: ByteRange) {
        let Server { uri, stats, lies, .. } = &*self.servers[server];
        let (offset, length) = (range.start(), range.length());
        self.common.stats.wrong_replies.add(1);
        stats.wrong_replies.add(1);
        if let Some(unsaid) = lies.now(clock::now()) {
            tracing::warn!(%uri, offset, length, unsaid, "the upstream sent wrong bytes");
        }
        let reason = format!("it sent wrong bytes: {length} at {offset}");
        if self.has_alternatives()
            && let Some(time) = self.servers[server].lied(&self.common.terms().rules)
        {
            let (count, seconds) = (stats.wrong_replies.value(), time.as_secs());
            tracing::warn!(%uri, count, seconds, "the upstream sends wrong bytes repeatedly: set aside");
            self.fail_over(server, &reason);
        } else {
            self.servers[server].went_wrong(reason);
        }
    }

    /// A server said by the way whether it tells news.
    pub(super) fn learn_of_news(&self, server: usize, tells_news: bool) {
        self.servers[server].set_tells_news(tells_news);
        let state = self.state();
        if state.current == server {
            self.publish(&state, None);
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
        // Another pool need not be waited for.
        self.unless_left(tokio::time::sleep_until(until)).await;
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
        let better = pool.servers.get(state.current)?.aside().map(|_| pool.order_from(state.current)[0]);
        let better = better.filter(|better| !pool.is_aside(*better));
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
            && own.count() < self.common.settings.connections
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
            Ok(_) if state.stage == Stage::Left => {}
            Ok(handle) if state.current == server => state.handles.push(handle),
            Ok(handle) if pool.is_aside(state.current) && !pool.is_aside(server) => {
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
        let first = pool.state().current;
        for server in pool.order_from(first) {
            let uri = pool.uri(server);
            match Self::open_at(pool, server).await {
                Ok(handle) => {
                    let mut state = pool.state();
                    if server != state.current || state.failures > 0 {
                        tracing::info!(%uri, "connected to the upstream");
                    }
                    (state.failures, state.failed) = (0, None);
                    // Unless somebody has turned away from that server while it was connected to.
                    if state.current == first && state.stage != Stage::Left {
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
        if let Some(unusable) = pool.servers[server].unusable_since(began) {
            return Err(unusable);
        }
        let handle = Self::open_at(pool, server).await.map_err(|failure| Unusable::from(&failure))?;
        let mut state = pool.state();
        if state.stage != Stage::Left {
            state.handles.push(handle.clone());
        }
        if state.current == server {
            (state.failures, state.failed) = (0, None);
            pool.publish(&state, Some(&handle));
        }
        Ok(handle)
    }

    /// Opens one more connection to `number`, which nobody uses yet.
    pub(super) async fn open_at(pool: &Arc<Self>, number: usize) -> Result<Handle, OpenFailure> {
        let (server, common) = (&pool.servers[number], &pool.common);
        let counted = [Arc::clone(&server.stats), Arc::clone(&common.stats)];
        let admit = |facts: &Facts| pool.admit(number, facts);
        // A server goes out of the list with the pools that have it.
        let owner = Arc::downgrade(server);
        let lost_uri = server.uri.clone();
        let ended = move |reason: String| {
            tracing::warn!(uri = %lost_uri, reason, "lost a connection to the upstream");
            if let Some(server) = Weak::upgrade(&owner) {
                server.went_wrong(reason);
            }
        };
        let introduction = Introduction { role: common.terms().role, limit: pool.connect_timeout };
        let result =
            connection::start(&server.uri, introduction, common.settings.stall_timeout, counted, admit, ended).await;
        server.tried(result.as_ref().err().map(Unusable::from));
        let mut handle = result?;
        handle.server = number;
        server.set_tells_news(tells_news(&handle.agreed));
        [&server.stats, &common.stats].into_iter().for_each(|stats| stats.connections.add(1));
        Ok(handle)
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
