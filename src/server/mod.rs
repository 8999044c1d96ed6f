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
mod limits;
mod lobby;
mod long_reads;
mod notices;
mod orders;
mod outbox;
mod requests;
mod seat;
mod spin;
mod steering;
mod transmission;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::task::JoinSet;

use crate::clock;
use crate::export::{Access, Origin, Registry, Visitor};
use crate::net::{Detached, Family, Listener};
use crate::telemetry::seldom;
use crate::worker::Workers;
pub use clients::{ClientStatus, ClientTable};
pub use directory::flags as transmission_flags;
use limits::SharedBudget;
use lobby::Lobby;
pub use notices::{MOST_GROUPS, News, Notices};
pub use orders::{SwitchError, Switched};
pub use steering::{ClientHandle, Gate, Steering};

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
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            max_connections: 16_384,
            handshake_timeout: Duration::from_secs(10),
            shared_bytes: 512 << 20,
            grace: Duration::from_secs(10),
            access: Access::default(),
        }
    }
}

/// A running server.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    workers: Arc<Workers>,
    slots: Arc<Semaphore>,
    draining: watch::Sender<bool>,
    accepting: JoinSet<()>,
}

/// What all connections share.
#[derive(Debug)]
struct Shared {
    registry: Arc<Registry>,
    settings: Settings,
    budget: Arc<SharedBudget>,
    draining: watch::Receiver<bool>,
    steering: Steering,
    lobby: Lobby,
}

impl Server {
    /// Serves the exports of `registry`, now and as it changes, to whoever connects to `listeners`. Call within the
    /// `LocalRuntime` that the listeners belong to; connections are served by `workers`.
    pub fn start(registry: Arc<Registry>, listeners: Vec<Listener>, workers: Arc<Workers>, settings: Settings) -> Self {
        let (draining, receiver) = watch::channel(false);
        let slots = Arc::new(Semaphore::new(settings.max_connections.clamp(1, Semaphore::MAX_PERMITS)));
        let budget = Arc::new(SharedBudget::new(settings.shared_bytes));
        let steering = Steering { access: settings.access.clone(), ..Steering::default() };
        let lobby = Lobby::of(settings.max_connections);
        let shared = Arc::new(Shared { registry, settings, budget, draining: receiver, steering, lobby });
        let mut accepting = JoinSet::new();
        for listener in listeners {
            let acceptor =
                Acceptor { shared: Arc::clone(&shared), workers: Arc::clone(&workers), slots: Arc::clone(&slots) };
            accepting.spawn_local(acceptor.run(listener));
        }
        Self { shared, workers, slots, draining, accepting }
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
        // Nobody listens if there is no connection.
        let _ = self.draining.send(true);
        let all = u32::try_from(self.shared.settings.max_connections.clamp(1, Semaphore::MAX_PERMITS));
        let idle = self.slots.acquire_many(all.unwrap_or(u32::MAX));
        let clean = tokio::time::timeout(self.shared.settings.grace, idle).await.is_ok();
        drop(self.workers);
        clean
    }
}

/// Accepts on one listener.
struct Acceptor {
    shared: Arc<Shared>,
    workers: Arc<Workers>,
    slots: Arc<Semaphore>,
}

impl Acceptor {
    async fn run(self, listener: Listener) {
        loop {
            match listener.accept().await {
                Ok(socket) => {
                    self.shared.steering.figures.connections().note_accepted();
                    // After accepting: an idle listener must not keep a place that another one's client could have.
                    let Some(slot) = self.slot().await else { return };
                    self.hand_over(socket, slot).await;
                }
                Err(error) => {
                    seldom!(warn, %listener, %error, "cannot accept a connection");
                    pause_if_exhausted(&error).await;
                }
            }
        }
    }

    /// A place for a connection; `None`: the server is gone. While there is none, those who only negotiate make room.
    async fn slot(&self) -> Option<OwnedSemaphorePermit> {
        if let Ok(slot) = Arc::clone(&self.slots).try_acquire_owned() {
            return Some(slot);
        }
        let limit = self.shared.settings.max_connections;
        seldom!(warn, limit, "too many connections: newcomers wait");
        loop {
            self.shared.lobby.make_room(clock::now());
            let slot = Arc::clone(&self.slots).acquire_owned();
            if let Ok(slot) = tokio::time::timeout(LOOK, slot).await {
                return slot.ok();
            }
        }
    }

    async fn hand_over(&self, socket: Detached, slot: OwnedSemaphorePermit) {
        let (peer, shared) = (socket.peer(), Arc::clone(&self.shared));
        let visitor = Visitor { address: origin(&socket), tls: None };
        let serve = move || async move {
            let _slot = slot;
            match socket.attach() {
                Ok(stream) => connection::serve(stream, peer, visitor, &shared).await,
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

/// After an error that comes back at once (no descriptors, no memory), waiting is all that helps.
async fn pause_if_exhausted(error: &io::Error) {
    if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM)) {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
}
