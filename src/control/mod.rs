//! The admin API: HTTP and JSON, on a unix socket or on TCP.
//!
//! | file | holds |
//! | --- | --- |
//! | this one | [`Admin`]: accepts and bounds connections |
//! | `status` | what is said, as types that server and command line share |
//! | [`mirrors`] | the mirrors of a server: opened, watched, replaced, operated |
//! | [`real`] | the real images of a server, operated |
//! | [`redirect`] | orders to move clients: taken, carried out, reported |
//! | [`casts`] | sending images to groups |
//! | [`prefetch`] | what is said of orders to prefetch |
//! | `operated` | [`Operated`]: what a server must be able to do to be operated |
//! | `jobs` | orders that take long: their progress, and calling them off |
//! | `api` | all routes, and what they are answered from |
//! | `access` | who may ask |
//! | `parts` | the parts of the status, each by itself |
//! | `images` | orders for images, and those that take long |
//! | `document` | the API described for programs (OpenAPI) |
//! | `settings` | what may be changed while a server runs |
//! | [`figures`] | what happened to images, as counters |
//! | [`load`] | what a server does just now |
//! | [`residency`] | pictures of what is here of an image |
//! | [`takeover`] | a server is replaced while its clients stay |
//! | [`tree`] | several servers, and what flows between them |
//! | `metrics` | what it has done, for Prometheus |
//! | `page` | the status page |
//! | [`balance`] | which clients should be moved where (pure) |
//! | `profiles` | those for profiles |
//! | `place` | where admin sockets are, and finding the only running server |
//! | `listen` | the listening socket |
//! | `client` | the other side: requests to a running server |
//!
//! Owns: how operators reach a server, and how their orders look. Does not own: what an order does; the server's roles
//! do it behind [`Operated`].
//!
//! Whoever can open the unix socket, or has the token on TCP, may do everything.
//!
//! It runs on the main thread, beside accepting. What may block (counting chunks, asking a file system) goes to a
//! thread of its own, one at a time.

mod access;
mod api;
pub mod balance;
pub mod casts;
mod client;
mod document;
pub mod figures;
mod images;
mod jobs;
mod listen;
pub mod load;
mod metrics;
pub mod mirrors;
mod operated;
mod page;
mod parts;
pub mod place;
pub mod prefetch;
mod profiles;
pub mod real;
pub mod redirect;
pub mod residency;
pub mod settings;
pub mod status;
pub mod takeover;
pub mod tree;

use std::cell::Cell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::{AbortHandle, JoinSet};

use crate::telemetry::seldom;

pub use access::{Token, TokenCell, TokenError};
use api::Api;
pub use api::Site;
pub use client::{CallError, Client};
pub use jobs::{Jobs, Outcome, RunningJob};
use listen::Socket;
pub use listen::{AdminListener, BindError};
use load::Loads;
pub use operated::{Answer, Operated, Refusal};
pub use place::AdminAddress;

/// Connections at the same time. Of more, those go first whose request has not come; else newcomers wait.
const CONNECTIONS: usize = 64;
/// How long the head of a request may take to arrive.
const HEAD_PATIENCE: Duration = Duration::from_secs(10);
/// How long a connection, which carries one request, may last in all.
const LIFE: Duration = Duration::from_secs(60);
/// Bytes of the head of a request, and of what hyper keeps of anything that arrives.
const HEAD_BYTES: usize = 16 << 10;
/// After accepting failed, which it may do again at once.
const PAUSE: Duration = Duration::from_millis(100);

/// The admin API of a running server. Dropping it ends it and removes its socket.
#[derive(Debug)]
pub struct Admin {
    _serving: JoinSet<()>,
}

impl Admin {
    /// Answers requests about `site`. Call within the `LocalRuntime` that the listener belongs to.
    pub fn start(listener: AdminListener, site: Site) -> Self {
        let mut serving = JoinSet::new();
        let (loads, sampling) = Loads::keep(&site);
        serving.spawn_local(sampling);
        let service = TowerToHyperService::new(Api::new(site, loads).router(listener.token()));
        serving.spawn_local(accept(listener, service));
        Self { _serving: serving }
    }
}

type Service = TowerToHyperService<axum::Router>;

/// Connections whose request has not come yet, oldest first.
type Silent = VecDeque<(Rc<Cell<bool>>, AbortHandle)>;

async fn accept(listener: AdminListener, service: Service) {
    let mut connections = JoinSet::new();
    let mut silent = Silent::new();
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(socket) => {
                    make_room(&mut connections, &mut silent).await;
                    let heard = Rc::new(Cell::new(false));
                    let (service, is_heard) = (service.clone(), Rc::clone(&heard));
                    let handle = match socket {
                        Socket::Unix(socket) => connections.spawn_local(serve(socket, service, is_heard)),
                        Socket::Tcp(socket) => connections.spawn_local(serve(socket, service, is_heard)),
                    };
                    silent.push_back((heard, handle));
                }
                Err(error) => {
                    seldom!(warn, %error, "cannot accept an admin connection");
                    tokio::time::sleep(PAUSE).await;
                }
            },
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
        }
    }
}

/// Waits until there is a place for another connection. Whoever has come and asks nothing keeps nobody out.
async fn make_room(connections: &mut JoinSet<()>, silent: &mut Silent) {
    silent.retain(|(heard, handle)| !heard.get() && !handle.is_finished());
    while connections.len() >= CONNECTIONS {
        if let Some((_, oldest)) = silent.pop_front() {
            oldest.abort();
        }
        connections.join_next().await;
    }
}

/// Answers the one request of a connection, and notes when it has come.
async fn serve(socket: impl AsyncRead + AsyncWrite + Unpin + 'static, service: Service, heard: Rc<Cell<bool>>) {
    let service = service_fn(move |request| {
        heard.set(true);
        service.call(request)
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEAD_PATIENCE).keep_alive(false).max_buf_size(HEAD_BYTES);
    match tokio::time::timeout(LIFE, http.serve_connection(TokioIo::new(socket), service)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "an admin connection ended early"),
        Err(_) => tracing::debug!("an admin connection took too long"),
    }
}
