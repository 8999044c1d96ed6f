//! Other servers in place of those that were used, while requests go on.
//!
//! The new servers are tried in a pool of their own, by connections that become the first ones in use. Nothing changes
//! unless one can be used. Then the pools are exchanged: requests that come from then on go to the new one. Requests
//! under way get their answers from the old connections, which close after the last of them; those that fail there are
//! asked of the new pool. A connection that brings nothing while requests wait on it is not waited for (see
//! [`PATIENCE`]).
//!
//! Owns: the exchange, and seeing old connections off. Does not own: where to go (`control`), what a server must be
//! (`expectation`).

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use super::connection::{Handle, Leaving};
use super::opening::{OpenFailure, facts};
use super::pool::{Pool, Stage, State};
use super::server::Server;
use super::{OpenError, Remote, Role};
use crate::nbd::Uri;
use crate::nbd::wire::TransmissionFlags;

/// How long an old connection with requests may bring nothing before they are asked of the new server. A disk takes
/// less; a server that is dead takes for ever. Only on read-only exports: a write that is given up may still happen.
const PATIENCE: Duration = Duration::from_millis(250);

/// Which servers are to be used.
#[derive(Debug, Clone, Copy)]
pub struct Route<'a> {
    /// Those to go to: the first that can be used.
    pub to: &'a [Uri],
    /// Those to turn to when all of these fail. They are not looked at now.
    pub reserve: &'a [Uri],
}

impl Route<'_> {
    /// All of them, each once.
    pub fn servers(&self) -> Vec<Uri> {
        let mut servers: Vec<Uri> = Vec::new();
        for uri in self.to.iter().chain(self.reserve) {
            if !servers.contains(uri) {
                servers.push(uri.clone());
            }
        }
        servers
    }
}

/// Who is current in the new pool, and the connection to it if it is a new one.
type First = (usize, Option<Handle>);

/// When the present server may stay the one that requests go to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stay {
    /// When all servers before it in the list cannot be used.
    InOrder,
    /// When it is in the list.
    Listed,
    /// Never: also it gets a new connection.
    Never,
}

impl Remote {
    /// Sends new requests to the first of `route.to` that can be used, and is what the present servers must be.
    /// Requests under way finish where they are. If none can be used nothing changes. If it is the present server only
    /// the list is replaced.
    ///
    /// Cancel safety: all has happened or nothing. Connections live on the worker that calls.
    pub async fn redirect(&self, route: Route<'_>) -> Result<(), OpenError> {
        self.change(route, Stay::InOrder).await
    }

    /// As [`Self::redirect`], but the present server is not left if it is one of `route.to`.
    ///
    /// Cancel safety: all has happened or nothing.
    pub async fn replace_servers(&self, route: Route<'_>) -> Result<(), OpenError> {
        self.change(route, Stay::Listed).await
    }

    /// Has connections replaced that were opened before the mirror had a name, where that is of use: at a server that
    /// tells news. If that cannot be done they stay.
    ///
    /// Cancel safety: all has happened or nothing.
    pub async fn introduce(&self) {
        let pool = self.pool();
        let role = self.common.terms().role;
        if role.node().is_none() || !pool.knows_us_otherwise(role) {
            return;
        }
        let (current, servers) = (pool.current(), pool.uris());
        let route = Route { to: std::slice::from_ref(&current), reserve: &servers };
        let order = |uri: &Uri| servers.iter().position(|other| other == uri);
        if let Err(error) = self.change_in(route, Stay::Never, |uris| uris.sort_by_key(order)).await {
            tracing::debug!(%error, "no connection by name");
        }
    }

    async fn change(&self, route: Route<'_>, stay: Stay) -> Result<(), OpenError> {
        self.change_in(route, stay, |_| {}).await
    }

    async fn change_in(
        &self,
        route: Route<'_>,
        stay: Stay,
        arrange: impl FnOnce(&mut Vec<Uri>),
    ) -> Result<(), OpenError> {
        let _one_at_a_time = self.redirecting.lock().await;
        let old = self.pool();
        let mut uris = route.servers();
        arrange(&mut uris);
        let new = Arc::new(old.successor(&uris));
        let (number, handle) = Self::first(&old, &new, route, stay).await?;
        if handle.is_none() && uris == old.uris() {
            return Ok(());
        }
        let leaving = self.exchange(&old, new, (number, handle)).map_err(|failure| {
            let uri = uris[number].clone();
            OpenError { failures: vec![(uri, failure)] }
        })?;
        tokio::task::spawn_local(see_off(leaving));
        Ok(())
    }

    /// The server to begin with, connected to unless it is the present one.
    async fn first(old: &Pool, new: &Arc<Pool>, route: Route<'_>, stay: Stay) -> Result<First, OpenError> {
        let present = old.current_if_any();
        let number_of = |uri: &Uri| new.servers.iter().position(|server| server.uri == *uri);
        let is_listed = present.as_ref().is_some_and(|present| route.to.contains(present));
        if let (Stay::Listed, true, Some(number)) = (stay, is_listed, present.as_ref().and_then(number_of)) {
            return Ok((number, None));
        }
        let mut failures = Vec::new();
        for uri in route.to {
            let Some(number) = number_of(uri) else { continue };
            if stay == Stay::InOrder && present.as_ref() == Some(uri) {
                return Ok((number, None));
            }
            match Pool::open_at(new, number).await {
                Ok(handle) => return Ok((number, Some(handle))),
                Err(failure) => failures.push((uri.clone(), failure)),
            }
        }
        Err(OpenError { failures })
    }

    /// Puts `new` in the place of `old`. Gives the connections that are not used any more.
    fn exchange(&self, old: &Pool, new: Arc<Pool>, (number, handle): First) -> Result<Vec<Old>, OpenFailure> {
        // Nobody else locks two pools.
        let (mut before, mut after) = (old.state(), new.state());
        if let Some(handle) = &handle {
            // What is expected may have changed while it was connected to.
            self.common.terms().expectation.check(&facts(&handle.agreed))?;
        }
        let stays = |other: &Handle| handle.is_none() && Arc::ptr_eq(&old.servers[other.server], &new.servers[number]);
        let (staying, leaving): (Vec<_>, Vec<_>) = std::mem::take(&mut before.handles).into_iter().partition(stays);
        after.handles.extend(staying.into_iter().map(|mut kept| {
            kept.server = number;
            kept
        }));
        after.handles.extend(handle.clone());
        (after.current, after.stage) = (number, Stage::InUse);
        *self.pool.write().unwrap_or_else(PoisonError::into_inner) = Arc::clone(&new);
        before.stage = Stage::Left;
        new.publish(&after, handle.as_ref());
        // What was said of servers that are gone is of no interest; those that stay are still what they are.
        self.common.changed.send_if_modified(|list| {
            let count = list.len();
            list.retain(|changed| new.servers.iter().any(|server| server.uri == changed.uri));
            list.len() != count
        });
        drop((before, after));
        old.left.notify_waiters();
        Ok(leaving.into_iter().map(Old::leave).collect())
    }
}

impl Pool {
    /// A pool of these servers; those that are here too are the same.
    fn successor(&self, uris: &[Uri]) -> Self {
        let server = |uri: &Uri| {
            let known = self.servers.iter().find(|server| server.uri == *uri);
            known.map_or_else(|| Arc::new(Server::new(uri.clone())), Arc::clone)
        };
        Self::new(uris.iter().map(server).collect(), Arc::clone(&self.common), Stage::Candidate)
    }

    pub(super) fn uris(&self) -> Vec<Uri> {
        self.servers.iter().map(|server| server.uri.clone()).collect()
    }

    fn current_if_any(&self) -> Option<Uri> {
        let current = self.state().current;
        self.servers.get(current).map(|server| server.uri.clone())
    }

    /// Whether there is a connection that was opened as another, to a server that could do something with the name.
    fn knows_us_otherwise(&self, role: Role) -> bool {
        let state: &State = &self.state();
        state.handles.iter().any(|handle| handle.role != role && self.servers[handle.server].tells_news())
    }
}

/// A connection that has been left.
#[derive(Debug)]
struct Old {
    connection: Leaving,
    is_read_only: bool,
    /// Bytes that had come when it was looked at last.
    received: u64,
}

impl Old {
    fn leave(handle: Handle) -> Self {
        let is_read_only = handle.agreed.flags.contains(TransmissionFlags::READ_ONLY);
        let connection = handle.leave();
        Self { received: connection.received(), connection, is_read_only }
    }

    /// Ends it if it has brought nothing since it was looked at last, though something is waited for.
    fn look(&mut self) {
        let before = std::mem::replace(&mut self.received, self.connection.received());
        if self.is_read_only && self.connection.in_flight() > 0 && self.received == before {
            tracing::debug!("an old connection brings nothing: its requests are asked of the new server");
            self.connection.cut();
        }
    }
}

/// Waits until all have ended. They end with their last request, which takes no longer than the patience of requests.
async fn see_off(mut leaving: Vec<Old>) {
    while !leaving.is_empty() {
        tokio::time::sleep(PATIENCE).await;
        leaving.iter_mut().for_each(Old::look);
        leaving.retain(|old| !old.connection.has_ended());
    }
}
