//! Orders to move clients to another server, and to take a server out of service.
//!
//! | file | holds |
//! | --- | --- |
//! | this one | [`Redirects`]: taking orders |
//! | `order` | what is said of them, as types that server and command line share |
//! | `compare`, `targets` | whether another server can take the clients: judging, and asking it |
//! | `select` | which clients |
//! | `runner` | moving them, each by its way |
//! | [`relay`] | the other server's export under clients that stay connected here |
//! | `claims` | which order moves whom, when there are several |
//! | `table`, [`file`](mod@file) | the orders, and how they are written down |
//! | `drain` | sending newcomers away, and waiting until all have left |
//! | `routes` | requests |
//!
//! Owns: whom to move, where to, in which way, and the report. Does not own: what connections do (`server`), what mirrors
//! do with news (`mirrors`), the client's own host (`agent`).
//!
//! Nobody is touched before the other server has been asked and fits. Orders run on a worker; whoever ordered may hang up.
//!
//! **Bounds.** 64 active orders and 64 that are remembered, 32 clients of an order at once, 16 servers in an order; 30 s
//! for a client to leave, 10 minutes after a restart for a mirror to come back.

mod claims;
mod compare;
mod drain;
pub mod file;
pub mod order;
pub mod relay;
pub(super) mod routes;
mod runner;
mod select;
mod table;
mod targets;

use std::sync::{Arc, Mutex, Weak};

use super::operated::Refusal;
use crate::export::{Facts, NodeId, Registry, SharedExport, split_content_name};
use crate::nbd::Uri;
use crate::server::{ClientHandle, ClientTable, Steering, transmission_flags};
use crate::worker::Workers;
use claims::Claims;
use compare::{Ours, Wanted};
use drain::Drained;
pub use file::StatePlace;
use order::{ClientReport, RedirectOrder, RedirectState, RedirectStatus, RedirectTaken, Way};
use runner::Move;
use select::{Candidate, Choice, Group, choose, group};
use table::{Followed, Order, Row, Table, seconds, wall};
use targets::{Targets, parse, survey};

/// The orders of a server to move its clients. Cheap to clone; all clones are one.
#[derive(Debug, Clone)]
pub struct Redirects(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    steering: Steering,
    registry: Arc<Registry>,
    /// Not kept alive by us: orders run on them.
    workers: Weak<Workers>,
    table: Table,
    claims: Claims,
    drained: Mutex<Drained>,
}

/// What is to be done to some clients of an export.
struct Plan {
    export: String,
    old: SharedExport,
    targets: Targets,
    choice: Choice,
    way: Way,
    force: bool,
    /// Whether clients that cannot be told stay where they are: a relay would not empty the server.
    is_drain: bool,
}

impl Redirects {
    /// The orders of the server that is steered so, whose exports are in `registry`. Goes on with those that are in
    /// `place`.
    pub async fn start(
        steering: Steering,
        registry: Arc<Registry>,
        workers: &Arc<Workers>,
        place: Option<StatePlace>,
    ) -> Self {
        let opened = tokio::task::spawn_blocking(move || Table::open(place)).await;
        let table = opened.unwrap_or_else(|_| Table::open(None));
        let shared = Shared {
            steering,
            registry,
            workers: Arc::downgrade(workers),
            table,
            claims: Claims::default(),
            drained: Mutex::default(),
        };
        let this = Self(Arc::new(shared));
        this.resume(workers).await;
        let writing = this.clone();
        workers.run(move || async move { writing.0.table.keep_writing().await }).await;
        this
    }

    /// What clients can connect to.
    pub fn registry(&self) -> &Registry {
        &self.0.registry
    }

    /// Who is connected.
    pub fn clients(&self) -> &ClientTable {
        &self.0.steering.clients
    }

    /// The orders that are active and the last that ended, oldest first.
    pub fn list(&self) -> Vec<RedirectStatus> {
        self.0.table.list().iter().map(|order| order.status()).collect()
    }

    /// What came of all orders so far.
    pub(super) fn totals(&self) -> table::Totals {
        self.0.table.totals()
    }

    /// One of them.
    pub fn get(&self, id: u64) -> Option<RedirectStatus> {
        self.0.table.get(id).map(|order| order.status())
    }

    /// Calls an order off: clients that were moved stay where they are, the others are left alone. `None`: there is none
    /// with this number.
    pub async fn cancel(&self, id: u64) -> Option<RedirectStatus> {
        let order = self.0.table.get(id)?;
        self.0.table.end(&order, RedirectState::Cancelled, None).await;
        Some(order.status())
    }

    /// Takes an order to move clients of `export`, after the other servers were asked.
    ///
    /// Cancel safety: the order is carried out whole or not at all.
    pub async fn redirect(&self, export: String, order: RedirectOrder) -> Result<RedirectTaken, Refusal> {
        let this = self.clone();
        self.on_worker(move || async move {
            let plan = this.plan(export, order).await?;
            this.begin(plan).await
        })
        .await
    }

    /// Does something on a worker, to its end.
    async fn on_worker<T: Send + 'static, F: Future<Output = Result<T, Refusal>> + 'static>(
        &self,
        make: impl FnOnce() -> F + Send + 'static,
    ) -> Result<T, Refusal> {
        let ended = || Refusal::Failed("the server is going down".to_owned());
        let workers = self.0.workers.upgrade().ok_or_else(ended)?;
        workers.ask(make).await.unwrap_or_else(|| Err(ended()))
    }

    async fn plan(&self, export: String, order: RedirectOrder) -> Result<Plan, Refusal> {
        let RedirectOrder { to, way, force, .. } = &order;
        if to.is_empty() {
            return Err(Refusal::Invalid("where to? an order names at least one server".to_owned()));
        }
        refuse_other_hosts(*way, to)?;
        let old = self.find(&export)?;
        let choice = Choice::of(&order)?;
        let wanted = Wanted { directly: *way == Way::Close, force: *force };
        let uris = parse(to)?;
        self.refuse_downgrade(&export, &uris, &[])?;
        let targets = self.survey(&export, &old, uris, wanted).await?;
        Ok(Plan { export, old, targets, choice, way: *way, force: *force, is_drain: false })
    }

    fn find(&self, name: &str) -> Result<SharedExport, Refusal> {
        let found = self.0.registry.find(name).filter(|(full, _)| full == name);
        found.map(|(_, export)| export).ok_or_else(|| Refusal::UnknownImage(name.to_owned()))
    }

    /// Refuses to have an export that is served through TLS only, or clients that came by TLS, served over a connection
    /// without TLS: whatever the operator would put up with, they did not agree to it.
    fn refuse_downgrade(&self, export: &str, uris: &[Uri], clients: &[ClientHandle]) -> Result<(), Refusal> {
        let Some(bare) = uris.iter().find(|uri| !uri.is_protected()) else { return Ok(()) };
        let whose = if self.0.steering.access.needs_tls(export) {
            format!("{export:?} is served through TLS only")
        } else if clients.iter().any(|client| client.visitor().tls.is_some()) {
            format!("clients of {export:?} use TLS")
        } else {
            return Ok(());
        };
        Err(Refusal::Conflict(format!("{whose}, and {bare} has none: name it with nbds://, or by a unix socket")))
    }

    async fn survey(&self, name: &str, old: &SharedExport, uris: Vec<Uri>, wanted: Wanted) -> Result<Targets, Refusal> {
        let ours = self.ours(name, old);
        let has_our_name = |uri: &Uri| {
            let found = self.0.registry.find(&uri.export);
            found.is_some_and(|(full, _)| split_content_name(&full).0 == split_content_name(name).0)
        };
        survey(uris, &ours, wanted, has_our_name).await
    }

    fn ours(&self, name: &str, export: &SharedExport) -> Ours {
        let node_of = |facts: &Facts| facts.path.first().copied().unwrap_or(self.0.steering.node);
        let facts = export.facts();
        let mut nodes: Vec<NodeId> = self.0.registry.all().iter().map(|(_, export)| node_of(&export.facts())).collect();
        nodes.push(self.0.steering.node);
        let written = self.0.steering.clients.of_export(name);
        let written = written.iter().filter_map(ClientHandle::status).map(|status| status.written_bytes).sum();
        Ours {
            export: name.to_owned(),
            flags: transmission_flags(&facts),
            node: node_of(&facts),
            facts,
            nodes,
            written,
        }
    }

    /// Selects the clients, writes the order down, and has it carried out.
    async fn begin(&self, plan: Plan) -> Result<RedirectTaken, Refusal> {
        let handles = self.0.steering.clients.of_export(&plan.export);
        let groups = self.select(&plan, &handles)?;
        if !plan.targets.is_here {
            let is_chosen = |handle: &&ClientHandle| groups.iter().any(|group| group.ids.contains(&handle.id()));
            let chosen: Vec<_> = handles.iter().filter(is_chosen).cloned().collect();
            self.refuse_downgrade(&plan.export, &plan.targets.uris, &chosen)?;
        }
        let (rows, moves): (Vec<_>, Vec<_>) = groups.iter().map(|group| self.row(&plan, group, &handles)).unzip();
        let Plan { export, old, targets, way, force, .. } = plan;
        let status = RedirectStatus {
            export: export.clone(),
            to: targets.uris.iter().map(Uri::to_string).collect(),
            way,
            force,
            warnings: targets.warnings.clone(),
            ordered: seconds(wall()),
            counts: order::Counts { total: crate::units::to_u64(rows.len()), ..order::Counts::default() },
            ..RedirectStatus::default()
        };
        let order = self.0.table.add(status, rows).await?;
        tracing::info!(order = order.id, export, to = ?targets.uris, clients = moves.len(), %way, "redirecting clients");
        self.0.claims.take(order.id, moves.iter().map(|each| each.subject), &self.0.steering.clients);
        let (id, taken) = (order.id, order.status());
        let this = self.clone();
        self.spawn(move || async move { this.carry_out(order, moves, targets, old).await }).await;
        Ok(RedirectTaken { order: id, clients: taken.counts.total, warnings: taken.warnings })
    }

    async fn spawn<F: Future<Output = ()> + 'static>(&self, make: impl FnOnce() -> F + Send + 'static) {
        if let Some(workers) = self.0.workers.upgrade() {
            workers.run(make).await;
        }
    }

    fn select(&self, plan: &Plan, handles: &[ClientHandle]) -> Result<Vec<Group>, Refusal> {
        let candidate = |handle: &ClientHandle| Candidate {
            id: handle.id(),
            node: handle.node(),
            hears: handle.hears_notices(),
            is_relayed: self.0.claims.is_relayed(handle.id()),
        };
        let mut candidates: Vec<_> = handles.iter().map(candidate).collect();
        // A server is not sent to itself, nor those that it gets its bytes from on the way here.
        candidates.retain(|one| one.node.is_none_or(|node| !plan.targets.path.contains(&node)));
        if plan.targets.is_here {
            if !matches!(plan.choice, Choice::Ids(_)) {
                candidates.retain(|candidate| candidate.is_relayed);
            }
            let chosen = choose(group(&candidates), &plan.choice)?;
            let is_relayed = |group: &Group| group.ids.iter().any(|id| self.0.claims.is_relayed(*id));
            if !chosen.iter().any(is_relayed) {
                let why = "that is this very server, and no client of it is served from elsewhere: there is nobody to bring back";
                return Err(Refusal::Conflict(why.to_owned()));
            }
            return Ok(chosen);
        }
        choose(group(&candidates), &plan.choice)
    }

    /// What is said of a client, and what is done to it.
    fn row(&self, plan: &Plan, group: &Group, handles: &[ClientHandle]) -> (Row, Move) {
        let handles: Vec<_> = handles.iter().filter(|handle| group.ids.contains(&handle.id())).cloned().collect();
        let way = runner::way_of(plan, group);
        let report = ClientReport {
            id: group.ids.first().copied().unwrap_or_default(),
            peer: handles.iter().find_map(|handle| Some(handle.status()?.peer)).unwrap_or_default(),
            mirror: group.node.map(|node| node.to_string()),
            connections: crate::units::to_u64(group.ids.len()),
            way: way.unwrap_or(plan.way),
            ..ClientReport::default()
        };
        let followed = handles.iter().cloned().map(Followed::new).collect();
        (Row { report, followed }, Move::new(group, way, handles))
    }

    /// Goes on with what was at work when the server ended.
    async fn resume(&self, workers: &Arc<Workers>) {
        for order in self.0.table.list().into_iter().filter(|order| order.is_active()) {
            let moves = runner::after_restart(&order);
            let Some((targets, old)) = self.targets_after_restart(&order).filter(|_| moves.iter().any(Move::is_open))
            else {
                let why = "interrupted by a restart".to_owned();
                self.0.table.end(&order, RedirectState::Failed, Some(why)).await;
                continue;
            };
            self.0.claims.take(order.id, moves.iter().map(|each| each.subject), &self.0.steering.clients);
            let this = self.clone();
            workers.run(move || async move { this.carry_out(order, moves, targets, old).await }).await;
        }
        self.0.table.note();
    }

    fn targets_after_restart(&self, order: &Order) -> Option<(Targets, SharedExport)> {
        let status = order.status();
        let old = self.find(&status.export).ok()?;
        let uris = parse(&status.to).ok().filter(|uris| !uris.is_empty())?;
        // The rules may be others now.
        self.refuse_downgrade(&status.export, &uris, &[]).ok()?;
        let targets = Targets { uris, is_here: false, warnings: Vec::new(), path: Vec::new(), takes_hints: false };
        Some((targets, old))
    }
}

/// What this server cannot reach is ordered where it can be reached.
fn refuse_other_hosts(way: Way, to: &[String]) -> Result<(), Refusal> {
    let (whom, option) = match way {
        Way::Qmp => ("the monitors of virtual machines", "--qmp SOCKET"),
        Way::Kernel => ("devices of the kernel", "--device /dev/nbdN"),
        _ => return Ok(()),
    };
    let to = to.join(",");
    let why = format!("{whom} are reached on the clients' own hosts: run there: headwater redirect {option} --to {to}");
    Err(Refusal::Invalid(why))
}
