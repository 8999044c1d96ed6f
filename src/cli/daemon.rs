//! What `serve` and `mirror` have in common: listening, serving, ending.

mod succession;

use std::path::PathBuf;

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rustix::process::{Resource, getrlimit, setrlimit};
use tokio::runtime::{Builder, LocalOptions};
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::args::{AdminChoice, Daemon, TokenFile};
use super::config::{Live, Reloader, refuse_strangers};
use super::output;
use super::running::clients;
use crate::clock;
use crate::control::casts::Casts;
use crate::control::place::Surroundings;
use crate::control::redirect::{Redirects, StatePlace};
use crate::control::status::Role;
use crate::control::takeover::{Belongings, Inherited, manager, talk::Successor};
use crate::control::tree::MOST_NEIGHBOURS;
use crate::control::{Admin, AdminListener, Client, Operated, Site, Token, TokenCell};
use crate::export::{Access, Registry};
use crate::nbd::Uri;
use crate::nbd::uri::Security;
use crate::net::{Detached, ListenAddress, Listener};
use crate::server::frozen::Frozen;
use crate::server::{Homeless, Server, Settings};
use crate::telemetry::crash_point;
use crate::worker::Workers;
use succession::{Origin, Succession, chain};

/// Descriptors that are kept for files, upstreams and the rest when connections are bounded.
const SPARE_DESCRIPTORS: u64 = 256;
/// Milliseconds that whatever uses the workers is given to end.
const PATIENCE_FOR_WORKERS: u32 = 1000;
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

    /// Does what can be done before a takeover while clients are served, so that they wait for less.
    async fn make_ready(&self, registry: &Registry, workers: &Workers);

    /// Makes everything durable, once there are no clients any more.
    async fn settle(&self, registry: &Registry, workers: &Workers, ending: Ending) -> anyhow::Result<()>;

    /// Lets another process have what is locked. After that nothing is asked any more.
    fn release(&self);
}

/// Why exports are closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    /// The server ends, and its clients have gone.
    ForGood,
    /// Clients wait for a successor. What only a crash of the machine would lose need not be durable now: it was not before.
    Takeover,
}

/// Serves what `exports` makes until a signal comes, or a successor. It makes the same each time: this server may have to
/// begin again.
pub(super) fn run<E: Exports>(
    daemon: Daemon,
    role: Role,
    exports: impl Fn() -> anyhow::Result<E>,
    reloader: Reloader,
) -> anyhow::Result<()> {
    let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default())?;
    runtime.block_on(async {
        // From here on a signal is an order to end well.
        let mut signals = Signals::new()?;
        let mut origin = Origin::of_process(daemon.takeover.as_ref(), role).await?;
        // It stays over a successor that fails: the next one may come at once.
        let mut succession = Succession::new(role);
        loop {
            match serve(&daemon, exports()?, origin, &mut signals, &mut succession, &reloader).await? {
                End::Over => return Ok(()),
                End::GoesOn(belongings) => origin = Origin::Left { belongings, managers: Vec::new() },
            }
        }
    })
}

/// How serving came to an end.
enum End {
    /// The process ends.
    Over,
    /// There was to be a successor, and there is none.
    GoesOn(Box<Belongings>),
}

/// A server and what belongs to it.
struct Running<E> {
    exports: E,
    registry: Arc<Registry>,
    workers: Arc<Workers>,
    server: Server,
    admin: Option<Admin>,
    casts: Option<(Arc<dyn Operated>, Casts)>,
    listening: Vec<Option<String>>,
    live: Live,
}

impl<E: Exports> Running<E> {
    async fn make_ready(&self) {
        let ready = self.exports.make_ready(&self.registry, &self.workers);
        if tokio::time::timeout(SETTLE, ready).await.is_err() {
            tracing::warn!("not waiting for a slow disk before a takeover");
        }
    }
}

async fn serve<E: Exports>(
    daemon: &Daemon,
    exports: E,
    origin: Origin,
    signals: &mut Signals,
    succession: &mut Succession,
    reloader: &Reloader,
) -> anyhow::Result<End> {
    let hangup = signal(SignalKind::hangup())?;
    let Some(mut running) = start(daemon, exports, origin, signals).await? else { return Ok(End::Over) };
    succession.open();
    let mut reloading = Box::pin(reloader.clone().run(hangup, running.live.clone()));
    loop {
        tokio::select! {
            signal = signals.next() => match signal {
                Order::Replace => succession.begin(&running.listening),
                Order::End if manager::room() > 0 => {
                    notify_manager(&sd_notify::NotifyState::Stopping);
                    drop(reloading);
                    return leave_to_manager(running, signals).await;
                }
                Order::End => {
                    notify_manager(&sd_notify::NotifyState::Stopping);
                    return end(running, signals).await;
                }
            },
            () = &mut reloading => {}
            successor = succession.next(&running.listening) => {
                running.make_ready().await;
                let since = clock::now();
                if let Err(busy) = running.server.hold().await {
                    tracing::warn!(%busy, "cannot be replaced now");
                    successor.stop(&busy.to_string()).await;
                    continue;
                }
                drop(reloading);
                return hand_over(running, successor, since).await;
            }
        }
    }
}

/// Opens everything and begins to serve. `None`: a signal came.
async fn start<E: Exports>(
    daemon: &Daemon,
    mut exports: E,
    origin: Origin,
    signals: &mut Signals,
) -> anyhow::Result<Option<Running<E>>> {
    let settings = Settings { protection: daemon.tls.protection()?, ..settings(daemon) };
    let security = match &settings.protection {
        Some(protection) if protection.is_required => Security::Tls,
        _ => Security::Plain,
    };
    let certificates = settings.protection.as_ref().map(|protection| protection.clients.clone());
    let token = token(daemon)?;
    let neighbours = neighbours(daemon)?;
    let own = listen(daemon, &origin.listening())?;
    let count = daemon.workers.map_or_else(default_workers, usize::from);
    let workers = Workers::start(count, daemon.disk_io.into()).context("cannot start the workers")?;
    let workers = Arc::new(workers);
    // From here to the end of this function clients of a predecessor wait.
    let (inherited, predecessor) = origin.take().await?;
    let Inherited { listeners: mut passed, clients, shutters } = inherited;
    if predecessor.is_some() {
        crash_point("takeover-taken");
    }
    let wanted: Vec<_> = addresses(daemon).iter().map(ToString::to_string).collect();
    let unwanted = retire(&mut passed, &wanted);
    let mut listeners: Vec<_> = own.into_iter().chain(passed).collect();
    // The first one is the one by which the server is called.
    listeners.sort_by_key(|listener| listener.asked().map(|asked| wanted.iter().position(|one| one == asked)));
    let registry = Arc::new(Registry::new());
    let opening = async {
        tokio::select! {
            result = exports.open(&registry, &workers, &listeners) => result.map(|()| true),
            () = signals.end() => Ok(false),
        }
    };
    let opened = async {
        if !opening.await? {
            return Ok(None);
        }
        refuse_strangers(&settings.access.rules(), &registry, settings.protection.is_some())?;
        let server = Server::prepare(Arc::clone(&registry), Arc::clone(&workers), settings);
        if predecessor.is_some() {
            check_homes(&server, &clients)?;
        }
        Ok(Some((
            server,
            listen_to_operators(daemon.admin.clone(), token.as_ref().map(|(token, _)| token))?,
            greeting(&registry, &listeners, security)?,
        )))
    };
    let (mut server, admin, greeting) = match (opened.await, &predecessor) {
        (Ok(Some(opened)), _) => opened,
        (Ok(None), _) => return Ok(None),
        (Err(error), Some(predecessor)) => {
            predecessor.failed(format!("{error:#}")).await;
            return Err(error);
        }
        (Err(error), None) => return Err(error),
    };
    let uri = |listener: &Listener| Some(Uri { security, ..listener.uri("").ok()? }.to_string());
    let listen: Vec<_> = listeners.iter().filter_map(uri).collect();
    let listening = listeners.iter().map(|listener| listener.asked().map(str::to_owned)).collect();
    for listener in &listeners {
        tracing::info!(%listener, workers = count, "listening");
    }
    let state = exports.state(&listeners);
    let steering = server.steering();
    if let Some(predecessor) = &predecessor {
        crash_point("takeover-open");
        predecessor.opened().await.context("cannot take over")?;
        tracing::info!(
            process = predecessor.process(),
            version = predecessor.version,
            clients = clients.len(),
            "took over from another server"
        );
        notify_manager(&sd_notify::NotifyState::MainPid(std::process::id()));
    }
    listeners.iter_mut().for_each(Listener::adopt);
    for mut listener in unwanted {
        tracing::info!(%listener, "not listening any more");
        // With it goes its socket file.
        listener.adopt();
    }
    shutters.exports.iter().for_each(|export| steering.gate.shut(Some(export)));
    if shutters.all {
        steering.gate.shut(None);
    }
    for (socket, frozen) in clients {
        server.resume(socket, frozen).await;
    }
    server.accept(listeners);
    manager::forget();
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
        certificates,
    };
    let admin = admin.zip(casts.clone()).map(|(listener, (operated, casts))| {
        Admin::start(listener, Site { operated, steering, redirects, casts, listen, neighbours })
    });
    output::print(&greeting)?;
    notify_manager(&sd_notify::NotifyState::Ready);
    Ok(Some(Running { exports, registry, workers, server, admin, casts, listening, live }))
}

/// Ends well: what has been received is answered.
async fn end<E: Exports>(running: Running<E>, signals: &mut Signals) -> anyhow::Result<End> {
    let Running { exports, registry, workers, server, admin, casts, .. } = running;
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
        () = signals.end() => {
            tracing::warn!("a second signal: not waiting for clients");
            false
        }
    };
    drop((admin, casts));
    settle(&exports, &registry, &workers, Ending::ForGood).await?;
    // What has not ended by now may never end (a disk that hangs): then the threads end with the process.
    if is_clean && let Ok(workers) = Arc::try_unwrap(workers) {
        workers.stop();
    }
    Ok(End::Over)
}

async fn settle(exports: &impl Exports, registry: &Registry, workers: &Workers, ending: Ending) -> anyhow::Result<()> {
    let settled = tokio::time::timeout(SETTLE, exports.settle(registry, workers, ending)).await;
    settled.context("making things durable took too long")?
}

/// Closes a server whose connections are held, but for its sockets.
async fn pack<E: Exports>(running: Running<E>) -> anyhow::Result<Belongings> {
    let Running { exports, registry, workers, server, admin, casts, live, .. } = running;
    drop(live);
    let steering = server.steering();
    let (listeners, clients) = server.freeze().await;
    let belongings = Belongings::of(listeners, clients, &steering)?;
    if let Some((_, casts)) = &casts {
        casts.close().await;
    }
    drop((admin, casts, steering));
    if let Err(error) = settle(&exports, &registry, &workers, Ending::Takeover).await {
        tracing::error!(error = format!("{error:#}"), "not everything is durable");
    }
    drop(registry);
    close_workers(workers).await;
    exports.release();
    Ok(belongings)
}

/// Ends the workers, and with them whatever still has an image open.
async fn close_workers(mut workers: Arc<Workers>) {
    for _ in 0..PATIENCE_FOR_WORKERS {
        match Arc::try_unwrap(workers) {
            Ok(workers) => {
                // It fails only if the thread has died, which has said so.
                let _ = tokio::task::spawn_blocking(|| workers.stop()).await;
                return;
            }
            Err(shared) => workers = shared,
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    tracing::error!("something still uses the workers: images may stay open");
}

/// Gives everything to a successor, or goes on if it fails.
async fn hand_over<E: Exports>(running: Running<E>, successor: Successor, since: Instant) -> anyhow::Result<End> {
    let process = successor.process();
    let belongings = pack(running).await?;
    let clients = belongings.estate().clients.len();
    let given = successor.give(&belongings).await;
    let pause = || u64::try_from(clock::now().saturating_duration_since(since).as_millis()).unwrap_or(u64::MAX);
    match given {
        Ok(()) => {
            successor.go().await.context("the successor has gone in the last moment, and the clients with it")?;
            tracing::info!(process, clients, pause_ms = pause(), "another server has taken over");
            Ok(End::Over)
        }
        Err(error) => {
            tracing::error!(process, error = %chain(error), "the successor cannot go on: this server does");
            successor.stop("this server goes on").await;
            Ok(End::GoesOn(Box::new(belongings)))
        }
    }
}

/// Leaves everything to the service manager, or ends well if it does not take it.
async fn leave_to_manager<E: Exports>(mut running: Running<E>, signals: &mut Signals) -> anyhow::Result<End> {
    running.make_ready().await;
    if let Err(busy) = running.server.hold().await {
        tracing::warn!(%busy, "the connections cannot be kept");
        return end(running, signals).await;
    }
    let belongings = pack(running).await?;
    let clients = belongings.estate().clients.len();
    // It blocks for the moment that the manager needs, and there is nothing else to do.
    match manager::store(&belongings) {
        Ok(()) => tracing::info!(clients, "the service manager has the connections"),
        Err(error) => tracing::error!(clients, error = %chain(error), "the connections are lost"),
    }
    Ok(End::Over)
}

/// Refuses to take clients over that could not be served here.
fn check_homes(server: &Server, clients: &[(Detached, Frozen)]) -> anyhow::Result<()> {
    for (_, client) in clients {
        if let Err(reason) = server.can_resume(client)
            // Whoever changes the rules means those who are connected, too.
            && reason != Homeless::Denied
        {
            bail!("cannot go on with client {} of {:?}: {reason}", client.peer, client.export);
        }
    }
    Ok(())
}

/// Takes out the listening sockets that are not wanted any more.
fn retire(passed: &mut Vec<Listener>, wanted: &[String]) -> Vec<Listener> {
    let is_unwanted = |listener: &mut Listener| {
        listener.asked().is_some_and(|asked| !wanted.is_empty() && wanted.iter().all(|one| one != asked))
    };
    passed.extract_if(.., is_unwanted).collect()
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

/// The addresses that were asked for.
fn addresses(daemon: &Daemon) -> Vec<ListenAddress> {
    let unix = daemon.unix.iter().cloned().map(ListenAddress::Unix);
    daemon.listen.iter().cloned().chain(unix).collect()
}

/// Sockets for all addresses that were asked for and are not among those that somebody else has opened (`None`: the
/// service manager), or the default one.
fn listen(daemon: &Daemon, opened: &[Option<String>]) -> anyhow::Result<Vec<Listener>> {
    let mut wanted = addresses(daemon);
    if opened.is_empty() && wanted.is_empty() {
        wanted.push("127.0.0.1".parse()?);
    }
    wanted.retain(|address| !opened.iter().flatten().any(|asked| *asked == address.to_string()));
    let mut listeners = Vec::new();
    for address in wanted {
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
fn greeting(registry: &Registry, listeners: &[Listener], security: Security) -> anyhow::Result<String> {
    let listener = listeners.first().context("there is no socket to listen on")?;
    let mut text = String::new();
    for (name, _) in registry.all() {
        text.push_str(&Uri { security, ..listener.uri(&name)? }.to_string());
        text.push('\n');
    }
    Ok(text)
}

fn notify_manager(state: &sd_notify::NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(std::slice::from_ref(state)) {
        tracing::debug!(%error, "cannot tell the service manager");
    }
}

/// What a signal means.
enum Order {
    /// SIGTERM and SIGINT.
    End,
    /// SIGUSR2.
    Replace,
}

/// The signals that mean something.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    replace: Signal,
}

impl Signals {
    fn new() -> anyhow::Result<Self> {
        let (terminate, interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        Ok(Self { terminate, interrupt, replace: signal(SignalKind::user_defined2())? })
    }

    async fn next(&mut self) -> Order {
        tokio::select! {
            _ = self.terminate.recv() => Order::End,
            _ = self.interrupt.recv() => Order::End,
            _ = self.replace.recv() => Order::Replace,
        }
    }

    /// Waits for the order to end.
    async fn end(&mut self) {
        while !matches!(self.next().await, Order::End) {}
    }
}
