//! The NBD server: accepts, negotiates, serves.
//!
//! | file | holds |
//! | --- | --- |
//! | this one | accepting, handing connections to workers, draining |
//! | `directory` | exports as the negotiation presents them |
//! | `connection` | one connection from its first byte to its last |
//! | `transmission` | its transmission phase: batches of requests in, batches of replies out |
//! | `requests` | what a request does that cannot be answered at once |
//! | `long_reads` | long reads that need no waiting: one segment at a time |
//! | `outbox` | replies on their way to the socket |
//! | `buffers` | memory for both directions, shared by the connections of a worker |
//! | `spin` | waiting for the next request awake |
//! | `clients` | who is connected, and what each has done |
//! | `figures` | what the clients of each export have asked for, and how long it took |
//! | `answered` | what a connection has answered, on its way there |
//! | `steering` | what can be done to clients from outside: switch, tell, close, send away |
//! | `orders` | how that reaches a connection |
//! | `notices` | what mirrors are told |
//! | `seat` | the place of a connection's export, which may be replaced |
//! | `stage` | how far the end of the server is, and who is ready for it |
//! | [`frozen`] | a connection between this server and its successor |
//! | `lobby` | connections that negotiate: how many may, and who goes first |
//! | `limits` | how much one connection, and all together, may have in flight |
//!
//! A connection lives and dies on one worker. All requests that have arrived together are parsed together; what can
//! be answered without waiting is appended to one buffer and leaves in one system call; what has to wait becomes a
//! future of that connection. A slow reader stalls itself only: the connection stops taking requests while replies
//! pile up.

mod answered;
mod buffers;
mod clients;
mod connection;
mod directory;
pub mod figures;
pub mod frozen;
mod limits;
mod lobby;
mod long_reads;
mod notices;
mod orders;
mod outbox;
mod requests;
mod seat;
mod spin;
mod stage;
mod steering;
mod transmission;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::task::JoinSet;

use crate::clock;
use crate::export::{Access, Origin, Registry, Visitor};
use crate::net::{Detached, Family, Listener};
use crate::telemetry::seldom;
use crate::tls;
use crate::worker::Workers;
pub use clients::{ClientStatus, ClientTable};
pub use connection::Homeless;
pub use directory::flags as transmission_flags;
use frozen::Frozen;
use limits::SharedBudget;
use lobby::Lobby;
pub use notices::{MOST_GROUPS, News, Notices};
pub use orders::{SwitchError, Switched};
use stage::{Muster, Negotiating, Stage};
pub use steering::{ClientHandle, Gate, Steering};

/// How long those that negotiate are waited for before connections are held.
const NEGOTIATIONS: Duration = Duration::from_secs(1);
/// How long requests that change something may keep a server from being replaced. Clients give up after 30 seconds.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long connections that are being closed may take while the others are frozen.
const PARTING: Duration = Duration::from_millis(50);
/// How often those who negotiate are looked at while newcomers wait.
const LOOK: Duration = Duration::from_millis(100);

/// What an operator may set.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Connections at the same time; more wait to be accepted.
    pub max_connections: usize,
    /// How long a client may take to negotiate.
    pub handshake_timeout: Duration,
    /// Bytes that all connections together may have in flight beyond what each is guaranteed. Worst-case memory of
    /// the server is this plus 2 MiB for each connection.
    pub shared_bytes: usize,
    /// How long a shutdown waits for requests that have been received.
    pub grace: Duration,
    /// Who may have which export.
    pub access: Access,
    /// TLS, if there is any.
    pub protection: Option<Protection>,
}

/// How clients are met that speak TLS.
#[derive(Debug, Clone)]
pub struct Protection {
    /// Whether those that do not get nothing.
    pub is_required: bool,
    /// What they are shown, and whom of them we believe.
    pub clients: tls::Clients,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            max_connections: 16_384,
            handshake_timeout: Duration::from_secs(10),
            shared_bytes: 512 << 20,
            grace: Duration::from_secs(10),
            access: Access::default(),
            protection: None,
        }
    }
}

/// A running server.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    workers: Arc<Workers>,
    slots: Arc<Semaphore>,
    stage: watch::Sender<Stage>,
    /// Each gives its listener back when there are to be no newcomers.
    accepting: JoinSet<Listener>,
    /// Those that have done so.
    closed: Vec<Listener>,
    thawed: mpsc::Receiver<(OwnedFd, Frozen)>,
}

/// What all connections share.
#[derive(Debug)]
struct Shared {
    registry: Arc<Registry>,
    settings: Settings,
    budget: Arc<SharedBudget>,
    stages: watch::Receiver<Stage>,
    muster: Arc<Muster>,
    frozen: mpsc::Sender<(OwnedFd, Frozen)>,
    steering: Steering,
    lobby: Lobby,
}

impl Server {
    /// Serves the exports of `registry`, now and as it changes, to whoever connects to `listeners`. Call within the
    /// `LocalRuntime` that the listeners belong to; connections are served by `workers`.
    pub fn start(registry: Arc<Registry>, listeners: Vec<Listener>, workers: Arc<Workers>, settings: Settings) -> Self {
        let mut server = Self::prepare(registry, workers, settings);
        server.accept(listeners);
        server
    }

    /// A server that has no listeners yet.
    pub fn prepare(registry: Arc<Registry>, workers: Arc<Workers>, settings: Settings) -> Self {
        let (stage, stages) = watch::channel(Stage::Serving);
        let most = settings.max_connections.clamp(1, Semaphore::MAX_PERMITS);
        let (frozen, thawed) = mpsc::channel(most);
        let slots = Arc::new(Semaphore::new(most));
        let budget = Arc::new(SharedBudget::new(settings.shared_bytes));
        let steering = Steering { access: settings.access.clone(), ..Steering::default() };
        let (muster, lobby) = (Arc::default(), Lobby::of(settings.max_connections));
        let shared = Arc::new(Shared { registry, settings, budget, stages, muster, frozen, steering, lobby });
        Self { shared, workers, slots, stage, accepting: JoinSet::new(), closed: Vec::new(), thawed }
    }

    /// Serves whoever connects to `listeners`, too. Call within the `LocalRuntime` that they belong to.
    pub fn accept(&mut self, listeners: Vec<Listener>) {
        for listener in listeners {
            let (shared, workers, slots) =
                (Arc::clone(&self.shared), Arc::clone(&self.workers), Arc::clone(&self.slots));
            self.accepting.spawn_local(Acceptor { shared, workers, slots }.run(listener));
        }
    }

    /// Who is connected, now and later.
    pub fn clients(&self) -> ClientTable {
        self.shared.steering.clients.clone()
    }

    /// What operators can do to clients, now and later.
    pub fn steering(&self) -> Steering {
        self.shared.steering.clone()
    }

    /// Stops accepting, answers what has been received, closes all connections. Says whether all of it was done
    /// within the grace period; what was not is cut off.
    pub async fn drain(mut self) -> bool {
        self.accepting.shutdown().await;
        self.stage.send_replace(Stage::Draining);
        let clean = tokio::time::timeout(self.shared.settings.grace, self.all_slots()).await.is_ok();
        drop(self.workers);
        clean
    }

    /// Takes no newcomers, and no requests of those who are there. Returns when nothing is under way that may not be asked
    /// again: then [`Self::freeze`] can follow. If that takes too long, all goes on as before.
    ///
    /// Those that negotiate are given a moment to finish.
    pub async fn hold(&mut self) -> Result<(), StillBusy> {
        self.stage.send_replace(Stage::Closed);
        while let Some(listener) = self.accepting.join_next().await {
            // One that has died has said so.
            self.closed.extend(listener);
        }
        let Shared { muster, .. } = &*self.shared;
        // Whoever is slower is closed, and has not been served yet.
        let _ = tokio::time::timeout(NEGOTIATIONS, muster.nobody_negotiates()).await;
        self.stage.send_replace(Stage::Holding);
        if tokio::time::timeout(PATIENCE, muster.all_still()).await.is_ok() {
            return Ok(());
        }
        let connections = muster.moving();
        self.stage.send_replace(Stage::Serving);
        let listeners = std::mem::take(&mut self.closed);
        self.accept(listeners);
        Err(StillBusy { connections })
    }

    /// Makes all connections into what a successor can go on with. After [`Self::hold`].
    pub async fn freeze(mut self) -> (Vec<Listener>, Vec<(OwnedFd, Frozen)>) {
        self.stage.send_replace(Stage::Freezing);
        // Those that are closing anyway may wait for their clients; these are left.
        let _ = tokio::time::timeout(PARTING, self.all_slots()).await;
        let mut frozen = Vec::new();
        while let Ok(one) = self.thawed.try_recv() {
            frozen.push(one);
        }
        (std::mem::take(&mut self.closed), frozen)
    }

    async fn all_slots(&self) {
        let all = u32::try_from(self.shared.settings.max_connections.clamp(1, Semaphore::MAX_PERMITS));
        // It is never closed.
        let _ = self.slots.acquire_many(all.unwrap_or(u32::MAX)).await;
    }

    /// Whether this server could go on with a connection of its predecessor.
    pub fn can_resume(&self, frozen: &Frozen) -> Result<(), Homeless> {
        connection::home_of(frozen, &self.shared).map(drop)
    }

    /// Goes on with a connection of the predecessor. One that has no home here is closed.
    pub async fn resume(&self, socket: Detached, mut frozen: Frozen) {
        let home = connection::home_of(&frozen, &self.shared);
        let export = match home {
            Ok(export) => export,
            Err(reason) => {
                let Frozen { peer, export, .. } = &frozen;
                return tracing::warn!(peer, export, %reason, "cannot go on with a client: closing it");
            }
        };
        let Ok(slot) = Arc::clone(&self.slots).try_acquire_owned() else {
            return tracing::warn!(peer = frozen.peer, "too many connections: closing one of the predecessor");
        };
        let shared = Arc::clone(&self.shared);
        shared.steering.clients.reserve(frozen.done.id);
        let serve = move || async move {
            let _slot = slot;
            match socket.assemble(frozen.tls.take()) {
                Ok(stream) => connection::resume(stream, frozen, export, &shared).await,
                Err(error) => tracing::warn!(peer = frozen.peer, %error, "cannot take a connection over"),
            }
        };
        self.workers.run(serve).await;
    }
}

/// Accepts on one listener.
struct Acceptor {
    shared: Arc<Shared>,
    workers: Arc<Workers>,
    slots: Arc<Semaphore>,
}

impl Acceptor {
    /// Until there are to be no newcomers.
    async fn run(self, listener: Listener) -> Listener {
        let mut stages = self.shared.stages.clone();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                // It fails only when the server is gone.
                _ = stages.wait_for(|stage| *stage != Stage::Serving) => return listener,
            };
            match accepted {
                Ok(socket) => {
                    self.shared.steering.figures.connections().note_accepted();
                    let negotiating = self.shared.muster.negotiates();
                    // After accepting: an idle listener must not keep a place that another one's client could have.
                    let Some(slot) = self.slot().await else { return listener };
                    self.hand_over(socket, slot, negotiating).await;
                }
                Err(error) => {
                    seldom!(warn, %listener, %error, "cannot accept a connection");
                    pause_if_exhausted(&error).await;
                }
            }
        }
    }

    /// A place for a connection; `None`: there are to be no newcomers. While there is none, those who only negotiate make
    /// room.
    async fn slot(&self) -> Option<OwnedSemaphorePermit> {
        if let Ok(slot) = Arc::clone(&self.slots).try_acquire_owned() {
            return Some(slot);
        }
        let limit = self.shared.settings.max_connections;
        seldom!(warn, limit, "too many connections: newcomers wait");
        while *self.shared.stages.borrow() == Stage::Serving {
            self.shared.lobby.make_room(clock::now());
            let slot = Arc::clone(&self.slots).acquire_owned();
            if let Ok(slot) = tokio::time::timeout(LOOK, slot).await {
                return slot.ok();
            }
        }
        None
    }

    async fn hand_over(&self, socket: Detached, slot: OwnedSemaphorePermit, negotiating: Negotiating) {
        let (peer, shared) = (socket.peer(), Arc::clone(&self.shared));
        let visitor = Visitor { address: origin(&socket), tls: None };
        let serve = move || async move {
            let _slot = slot;
            match socket.attach() {
                Ok(stream) => connection::serve(stream, peer, visitor, negotiating, &shared).await,
                Err(error) => seldom!(warn, peer, %error, "cannot take a connection over"),
            }
        };
        self.workers.run(serve).await;
    }
}

/// Where a client comes from. Of one that has left already nobody knows.
fn origin(socket: &Detached) -> Origin {
    match socket.family() {
        Family::Unix => Origin::Unix,
        Family::Tcp => socket.peer_address().map_or(Origin::Unknown, Origin::Ip),
    }
}

/// Requests under way that could not be finished, so that the server cannot be replaced now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("what {connections} clients have asked to be written or flushed is not done after {} seconds", PATIENCE.as_secs())]
pub struct StillBusy {
    /// Clients that wait for them.
    pub connections: usize,
}

/// After an error that comes back at once (no descriptors, no memory), waiting is all that helps.
async fn pause_if_exhausted(error: &io::Error) {
    if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM)) {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
