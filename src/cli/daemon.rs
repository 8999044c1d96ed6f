//! What `serve` and `mirror` have in common: listening, serving, ending.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::runtime::{Builder, LocalOptions};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::args::{AdminChoice, Daemon, TokenFile};
use super::config::{Live, Reloader, refuse_strangers};
use super::output;
use super::running::clients;
use crate::control::casts::Casts;
use crate::control::place::Surroundings;
use crate::control::redirect::{Redirects, StatePlace};
use crate::control::tree::MOST_NEIGHBOURS;
use crate::control::{Admin, AdminListener, Client, Operated, Site, Token, TokenCell};
use crate::export::{Access, Registry};
use crate::net::{ListenAddress, Listener};
use crate::server::{Server, Settings};
use crate::worker::Workers;

/// Descriptors that are kept for files, upstreams and the rest when connections are bounded.
const SPARE_DESCRIPTORS: u64 = 256;
/// How long exports may take to make things durable at the end.
const SETTLE: Duration = Duration::from_secs(10);

/// What a command adds to a server.
pub(super) trait Exports {
    /// Opens the exports and puts them into the registry. `listeners` are those of this server.
    async fn open(
        &mut self,
        registry: &Arc<Registry>,
        workers: &Arc<Workers>,
        listeners: &[Listener],
    ) -> anyhow::Result<()>;

    /// What operators may ask of the exports, once they are open.
    fn operated(&self) -> Option<Arc<dyn Operated>>;

    /// Where the orders to move clients are kept.
    fn state(&self, listeners: &[Listener]) -> Option<StatePlace>;

    /// Makes everything durable, once there are no clients any more.
    async fn settle(&self, registry: &Registry, workers: &Workers) -> anyhow::Result<()>;
}

/// Serves `exports` until a signal comes.
pub(super) fn run(daemon: Daemon, exports: impl Exports, reloader: Reloader) -> anyhow::Result<()> {
    let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default())?;
    runtime.block_on(serve(daemon, exports, reloader))
}

async fn serve(daemon: Daemon, mut exports: impl Exports, reloader: Reloader) -> anyhow::Result<()> {
    // From here on a signal is an order to end well.
    let mut signals = Signals::new()?;
    let hangup = signal(SignalKind::hangup())?;
    let settings = settings(&daemon);
    let token = token(&daemon)?;
    let neighbours = neighbours(&daemon)?;
    let listeners = listen(&daemon)?;
    let count = daemon.workers.map_or_else(default_workers, usize::from);
    let workers = Workers::start(count, daemon.disk_io.into()).context("cannot start the workers")?;
    let workers = Arc::new(workers);
    let registry = Arc::new(Registry::new());
    tokio::select! {
        result = exports.open(&registry, &workers, &listeners) => result?,
        () = signals.next() => return Ok(()),
    }
    refuse_strangers(&settings.access.rules(), &registry)?;
    let admin = listen_to_operators(daemon.admin, token.as_ref().map(|(token, _)| token))?;
    let greeting = greeting(&registry, &listeners)?;
    let listen: Vec<_> = listeners.iter().filter_map(|listener| Some(listener.uri("").ok()?.to_string())).collect();
    for listener in &listeners {
        tracing::info!(%listener, workers = count, "listening");
    }
    let state = exports.state(&listeners);
    let server = Server::start(Arc::clone(&registry), listeners, Arc::clone(&workers), settings);
    let steering = server.steering();
    let redirects = Redirects::start(steering.clone(), Arc::clone(&registry), &workers, state).await;
    let casts = exports.operated().map(|operated| {
        let casts = Casts::start(steering.clone(), Arc::clone(&registry), Arc::clone(&operated), &workers);
        (operated, casts)
    });
    let live = Live {
        steering: steering.clone(),
        registry: Arc::clone(&registry),
        operated: exports.operated(),
        casts: casts.as_ref().map(|(_, casts)| casts.clone()),
        token,
    };
    let admin = admin.zip(casts.clone()).map(|(listener, (operated, casts))| {
        Admin::start(listener, Site { operated, steering, redirects, casts, listen, neighbours })
    });
    output::print(&greeting)?;
    notify_manager(&sd_notify::NotifyState::Ready);
    tokio::select! {
        () = signals.next() => {}
        () = reloader.run(hangup, live) => {}
    }
    notify_manager(&sd_notify::NotifyState::Stopping);
    tracing::info!("shutting down");
    if let Some((_, casts)) = &casts {
        // Receivers are told, so that they need not find out by the silence.
        casts.close().await;
    }
    let is_clean = tokio::select! {
        clean = server.drain() => {
            if !clean {
                tracing::warn!("some clients had to be cut off");
            }
            clean
        }
        () = signals.next() => {
            tracing::warn!("a second signal: not waiting for clients");
            false
        }
    };
    drop((admin, casts));
    tokio::time::timeout(SETTLE, exports.settle(&registry, &workers))
        .await
        .context("making things durable took too long")??;
    // What has not ended by now may never end (a disk that hangs): then the threads end with the process.
    if is_clean && let Ok(workers) = Arc::try_unwrap(workers) {
        workers.stop();
    }
    Ok(())
}

/// The other servers of its tree.
fn neighbours(daemon: &Daemon) -> anyhow::Result<Vec<Client>> {
    ensure!(daemon.neighbours.len() <= MOST_NEIGHBOURS, "--neighbours: at most {MOST_NEIGHBOURS}");
    let token = TokenFile { file: daemon.neighbours_token.clone().or_else(|| daemon.admin_token.clone()) };
    clients(daemon.neighbours.clone(), &token)
}

/// What operators must show by TCP, and where it was read from.
fn token(daemon: &Daemon) -> anyhow::Result<Option<(TokenCell, PathBuf)>> {
    let Some(path) = &daemon.admin_token else { return Ok(None) };
    Ok(Some((TokenCell::new(Token::read(path)?), path.clone())))
}

fn default_workers() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn settings(daemon: &Daemon) -> Settings {
    let wanted = u64::from(daemon.max_connections);
    let allowed = raise_descriptor_limit().saturating_sub(SPARE_DESCRIPTORS).max(1);
    if allowed < wanted {
        tracing::debug!(wanted, allowed, "fewer connections than wanted: the limit of open files");
    }
    Settings {
        max_connections: crate::units::to_usize(wanted.min(allowed)),
        handshake_timeout: daemon.handshake_timeout,
        access: Access::new(daemon.access.rules()),
        ..Settings::default()
    }
}

/// Raises the limit of open files as far as we may, and tells it.
fn raise_descriptor_limit() -> u64 {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::debug!(%error, "cannot raise the limit of open files");
    }
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// All sockets: those of the service manager and those of the command line, or the default one.
fn listen(daemon: &Daemon) -> anyhow::Result<Vec<Listener>> {
    let mut listeners = Listener::inherited().context("cannot take over the service manager's sockets")?;
    let mut addresses = daemon.listen.clone();
    addresses.extend(daemon.unix.iter().cloned().map(ListenAddress::Unix));
    if listeners.is_empty() && addresses.is_empty() {
        addresses.push("127.0.0.1".parse()?);
    }
    for address in addresses {
        listeners.extend(Listener::bind(&address)?);
    }
    Ok(listeners)
}

/// The admin socket. One that was asked for must be had; without the default one, clients can still be served.
fn listen_to_operators(
    choice: Option<AdminChoice>,
    token: Option<&TokenCell>,
) -> anyhow::Result<Option<AdminListener>> {
    let listener = match choice {
        Some(AdminChoice::None) => return Ok(None),
        Some(AdminChoice::At(address)) => AdminListener::bind(&address, token)?,
        None => match default_admin() {
            Ok(listener) => listener,
            Err(error) => {
                let error = format!("{error:#}");
                tracing::warn!(error, "no admin API: --admin names another place for it");
                return Ok(None);
            }
        },
    };
    let address = listener.address()?;
    if address.socket().is_some_and(|socket| !socket.ip().is_loopback()) {
        tracing::warn!(
            %address,
            "the admin API is not encrypted: who can listen on the network can learn its token; use ssh -L across networks that are not yours"
        );
    }
    tracing::info!(%address, "admin API");
    Ok(Some(listener))
}

fn default_admin() -> anyhow::Result<AdminListener> {
    let place =
        Surroundings::of_process().default_place(std::process::id()).context("cannot use the runtime directory")?;
    Ok(AdminListener::bind(&place, None)?)
}

/// One line for each export: how to reach it by the first listener.
fn greeting(registry: &Registry, listeners: &[Listener]) -> anyhow::Result<String> {
    let listener = listeners.first().context("there is no socket to listen on")?;
    let mut text = String::new();
    for (name, _) in registry.all() {
        text.push_str(&listener.uri(&name)?.to_string());
        text.push('\n');
    }
    Ok(text)
}

fn notify_manager(state: &sd_notify::NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(std::slice::from_ref(state)) {
        tracing::debug!(%error, "cannot tell the service manager");
    }
}

/// SIGTERM and SIGINT.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> anyhow::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}
