//! Moves the disks of one machine to another server.
//!
//! Owns: what is done in which order, taking it back when it fails, and telling what came of it. Does not own: the
//! monitor, what is in the machine, and the rules by which servers are compared.
//!
//! For each block node that is a client of a server:
//!
//! 1. The new server and the old one are asked what they hold, and compared.
//! 2. `blockdev-add` opens the new server beside the old one; then it is asked once more, since nobody reads from it yet.
//! 3. Whoever holds the old node gets the new one. A node that has it as `file` or `backing` is *reopened*, by the
//!    `reopen` of `qemu-io` in the human monitor. Unlike `blockdev-reopen` that takes nodes without a name of their own,
//!    which is all that `-drive` makes, and keeps every option that is not named; many of them cannot be asked for, so
//!    they could not be given again. A *device* that has it as its whole disk gets it by `qom-set`. Either way qemu holds
//!    the guest's requests back meanwhile, lets those in flight end, and lets the held ones go to the new server.
//! 4. The graph is read again: what qemu says is not enough.
//! 5. `blockdev-del` removes the old node, unless it went away by itself.
//!
//! When a step fails, those before it are taken back, and the machine stays with the old server. When this program dies
//! between two steps, the machine goes on with either server, and the next run removes what was left.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use thiserror::Error;

use super::address::server_option;
use super::compare::{InUse, Offer, compare};
use super::graph::{Graph, Hold, Holder, Node};
use super::monitor::{Monitor, MonitorError};
use crate::clock;
use crate::export::Export;
use crate::nbd::Uri;
use crate::upstream::{self, Expectation, Remote, Settings};

/// How long a server may take to say what it holds.
const ASKING: Duration = Duration::from_secs(5);
/// Seconds for which qemu tries to get a lost server back before the guest gets an error. Under the half minute after
/// which guests give up on requests to SCSI disks.
const RECONNECT_DELAY: u64 = 25;

/// What is wanted.
#[derive(Debug, Clone)]
pub struct Order {
    /// The same image on other servers; the first that can be used is.
    pub targets: Vec<Uri>,
    /// Disks, by the name of their drive, device or block node. None: all that are clients of NBD servers.
    pub devices: Vec<String>,
    /// Also where nobody knows whether it is the same image.
    pub force: bool,
}

/// Why a machine was not looked at any further. Nothing was changed.
#[derive(Debug, Error)]
pub enum RedirectError {
    /// Its monitor.
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    /// What it says of its block devices is not what qemu says.
    #[error("cannot understand what qemu says of its block devices: {0}")]
    Answer(#[from] serde_json::Error),
    /// Nothing is called so, or it is no client of an NBD server.
    #[error("the machine has no disk {0:?} that is a client of an NBD server")]
    NoDisk(String),
}

/// What came of one client of a server.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// The disks that it is for.
    pub disks: Vec<String>,
    /// The block node, as it was called before.
    pub node: String,
    /// Where it was.
    pub from: String,
    /// Where it is now, if it moved.
    pub to: Option<Uri>,
    /// How it ended.
    pub state: State,
    /// How it was done.
    pub way: Option<Way>,
    /// How long the commands took during which qemu holds requests back: the guest waited at most so long.
    pub pause: Duration,
    /// Requests of the guest that failed meanwhile, by qemu's count.
    pub errors: u64,
    /// Why it did not move, or what is not as it should be.
    pub why: Option<String>,
}

/// How it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It is a client of the new server.
    Moved,
    /// It was one before.
    Already,
    /// It is certainly another image than that of the new server, and stays.
    Other,
    /// The new server must not be used for it; it stays.
    Refused,
    /// It could not be done; it stays.
    Failed,
    /// The monitor was lost in the middle. It is with either server, and another run will tell.
    Unknown,
}

/// How a disk gets another node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// The node over it was reopened.
    Reopen,
    /// The device got it.
    Device,
}

/// What came of one machine.
#[derive(Debug, Default)]
pub struct Report {
    /// Clients of servers, each with what came of it.
    pub outcomes: Vec<Outcome>,
    /// Nodes that an earlier run had left and that were removed.
    pub removed: Vec<String>,
    /// The machine stopped itself on an I/O error some time ago, and waits for the command `cont`.
    pub is_halted: bool,
}

/// Moves the disks of the machine with this monitor.
///
/// # Errors
///
/// Those with which nothing could be changed; all others are in the report.
pub async fn redirect(socket: &Path, order: &Order) -> Result<Report, RedirectError> {
    let monitor = Monitor::open(socket).await?;
    let mut mover = Mover { monitor, order, offers: HashMap::new(), credentials: None };
    mover.credentials = mover.find_credentials().await?;
    let mut graph = mover.look().await?;
    let chosen = choose(&graph, &order.devices)?;
    let mut report = Report { removed: mover.clean(&graph).await?, ..Report::default() };
    if !report.removed.is_empty() {
        graph = mover.look().await?;
    }
    for name in chosen {
        let Some(node) = graph.nodes.get(&name) else { continue };
        let (outcome, is_lost) = mover.redirect(&graph, node).await;
        report.outcomes.push(outcome);
        if is_lost {
            return Ok(report);
        }
        match mover.look().await {
            Ok(now) => graph = now,
            Err(_) => return Ok(report),
        }
    }
    // Only a hint: who cannot be asked has been asked enough.
    let status = mover.monitor.call("query-status", json!({})).await.unwrap_or_default();
    report.is_halted = status["status"] == "io-error";
    Ok(report)
}

/// The nodes that are to move.
fn choose(graph: &Graph, devices: &[String]) -> Result<Vec<String>, RedirectError> {
    let clients: Vec<&Node> = graph.clients().collect();
    for device in devices {
        if !clients.iter().any(|node| graph.is_called(&node.name, device)) {
            return Err(RedirectError::NoDisk(device.clone()));
        }
    }
    let is_meant = |node: &&Node| devices.is_empty() || devices.iter().any(|name| graph.is_called(&node.name, name));
    Ok(clients.into_iter().filter(is_meant).map(|node| node.name.clone()).collect())
}

/// Giving one holder of a node another one.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Switch {
    /// By reopening the node over it.
    Reopen { parent: String, role: String },
    /// By telling the device.
    Device { path: String },
}

impl Switch {
    /// How the graph shows that it was done.
    fn hold(&self) -> Hold {
        match self {
            Self::Reopen { parent, role } => Hold { holder: Holder::Node(parent.clone()), role: role.clone() },
            Self::Device { .. } => Hold { holder: Holder::Backend, role: "root".into() },
        }
    }
}

/// What has to be switched for a node to be nobody's any more.
fn plan(graph: &Graph, node: &str) -> Result<Vec<Switch>, String> {
    // To switch, qemu first brings all that is under way to a rest. A job with a limited rate was seen to keep it, its
    // monitor and with them the guest waiting for good (qemu 10.0.2, blockdev-backup).
    if let Some(job) = graph.job() {
        return Err(format!("a {job} is at work in the machine: try again when it has ended"));
    }
    let mut switches = Vec::new();
    let mut backends = 0;
    for hold in graph.holds(node) {
        match &hold.holder {
            Holder::Backend => backends += 1,
            Holder::Node(parent) if !is_plain(parent) => return Err(format!("the node {parent:?} has an odd name")),
            Holder::Node(parent) if matches!(hold.role.as_str(), "file" | "backing") => {
                switches.push(Switch::Reopen { parent: parent.clone(), role: hold.role.clone() });
            }
            Holder::Node(parent) => {
                return Err(format!("the node {parent} has it as {}, which qemu cannot change", hold.role));
            }
            Holder::Other(what) => return Err(format!("a {what} is at work on it")),
        }
    }
    let disks = graph.disks.iter().filter(|disk| disk.root == node);
    let devices: Vec<_> = disks.filter_map(|disk| disk.device.clone()).collect();
    if devices.len() != backends {
        return Err("something uses it that is no device, as an export of qemu's own: that cannot be switched".into());
    }
    switches.extend(devices.into_iter().map(|path| Switch::Device { path }));
    Ok(switches)
}

/// Whether a name can stand in a command of the human monitor as it is. All can that qemu gives or lets pass.
fn is_plain(name: &str) -> bool {
    name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"#-._".contains(&byte))
}

/// Why a try came to nothing.
#[derive(Debug)]
enum Trouble {
    /// All is as before.
    Back(String),
    /// The monitor was lost.
    Lost(String),
}

impl From<MonitorError> for Trouble {
    fn from(error: MonitorError) -> Self {
        if error.is_refusal() { Self::Back(error.to_string()) } else { Self::Lost(error.to_string()) }
    }
}

impl From<RedirectError> for Trouble {
    fn from(error: RedirectError) -> Self {
        match error {
            RedirectError::Monitor(error) => error.into(),
            error => Self::Back(error.to_string()),
        }
    }
}

#[derive(Debug)]
struct Mover<'a> {
    monitor: Monitor,
    order: &'a Order,
    /// What servers said, or why they did not.
    offers: HashMap<Uri, Result<Offer, String>>,
    /// An object with which the machine could speak TLS. Which of its disks do, qemu does not say.
    credentials: Option<String>,
}

impl Mover<'_> {
    async fn look(&mut self) -> Result<Graph, RedirectError> {
        let nodes = self.monitor.call("query-named-block-nodes", json!({ "flat": true })).await?;
        let graph = self.monitor.call("x-debug-query-block-graph", json!({})).await?;
        let disks = self.monitor.call("query-block", json!({})).await?;
        Ok(Graph::new(nodes, graph, disks)?)
    }

    /// TLS credentials that the machine was given, for whatever purpose.
    async fn find_credentials(&mut self) -> Result<Option<String>, MonitorError> {
        let objects = self.monitor.call("qom-list", json!({ "path": "/objects" })).await?;
        let is_meant = |object: &&Value| {
            let kind = object["type"].as_str().unwrap_or_default();
            kind.starts_with("child<tls-creds")
        };
        let found = objects.as_array().into_iter().flatten().find(is_meant);
        Ok(found.map(|object| object["name"].as_str().unwrap_or_default().to_owned()))
    }

    /// Why a disk cannot be moved to these servers, whoever orders it: it may be served by TLS now, and would not be then.
    fn downgrade(&self) -> Option<String> {
        let credentials = self.credentials.as_ref()?;
        let bare = self.order.targets.iter().find(|target| !target.is_protected())?;
        let why = "so its disks may use TLS, which qemu does not tell";
        Some(format!("the machine has the TLS credentials {credentials:?}, {why}, and {bare} has none"))
    }

    /// Removes what an earlier run has left.
    async fn clean(&mut self, graph: &Graph) -> Result<Vec<String>, MonitorError> {
        let mut removed = Vec::new();
        for name in graph.left_over() {
            self.monitor.call("blockdev-del", json!({ "node-name": name })).await?;
            removed.push(name);
        }
        Ok(removed)
    }

    async fn ask(&mut self, server: &Uri) -> Result<Offer, String> {
        if let Some(known) = self.offers.get(server) {
            return known.clone();
        }
        let offer = ask(server).await;
        self.offers.insert(server.clone(), offer.clone());
        offer
    }

    /// Moves one node, to the first server that can be used. Gives back whether the monitor was lost, too.
    async fn redirect(&mut self, graph: &Graph, node: &Node) -> (Outcome, bool) {
        let server = node.server();
        let over = graph.disks_over(&node.name);
        let mut outcome = Outcome {
            disks: over.iter().map(|disk| graph.disks[*disk].name.clone()).collect(),
            node: node.name.clone(),
            from: server.as_ref().map_or_else(|| node.filename().to_owned(), Uri::to_string),
            to: None,
            state: State::Refused,
            way: None,
            pause: Duration::ZERO,
            errors: 0,
            why: None,
        };
        if server.as_ref().is_some_and(|server| self.order.targets.contains(server)) {
            outcome.state = State::Already;
            return (outcome, false);
        }
        if let Some(why) = self.downgrade() {
            outcome.why = Some(why);
            return (outcome, false);
        }
        let switches = match plan(graph, &node.name) {
            Ok(switches) => switches,
            Err(why) => {
                outcome.why = Some(why);
                return (outcome, false);
            }
        };
        let known = match &server {
            Some(server) => self.ask(server).await.ok(),
            None => None,
        };
        let disk = InUse { size: node.size(), is_writable: !node.is_read_only, server: known };
        let before = self.failed_requests(&outcome.disks, graph).await;
        let is_lost = self.try_all(node, &disk, &switches, &mut outcome).await;
        if !is_lost {
            outcome.errors = self.failed_requests(&outcome.disks, graph).await.saturating_sub(before);
        }
        (outcome, is_lost)
    }

    /// Tries one server after another. Gives back whether the monitor was lost.
    async fn try_all(&mut self, node: &Node, disk: &InUse, switches: &[Switch], outcome: &mut Outcome) -> bool {
        let mut reasons = Vec::new();
        let order = self.order;
        let mut others = 0;
        for target in &order.targets {
            let offer = match self.ask(target).await {
                Ok(offer) => offer,
                Err(why) => {
                    reasons.push(format!("{target}: {why}"));
                    outcome.state = State::Failed;
                    continue;
                }
            };
            if let Err(unfit) = compare(disk, &offer, order.force) {
                reasons.push(format!("{target}: {unfit}"));
                others += usize::from(unfit.is_other_image());
                continue;
            }
            match self.move_to(node, switches, target, &mut outcome.pause).await {
                Ok(left) => {
                    outcome.state = State::Moved;
                    outcome.to = Some(target.clone());
                    outcome.way = switches.first().map(|switch| match switch {
                        Switch::Reopen { .. } => Way::Reopen,
                        Switch::Device { .. } => Way::Device,
                    });
                    outcome.why = left;
                    return false;
                }
                Err(Trouble::Back(why)) => {
                    reasons.push(format!("{target}: {why}"));
                    outcome.state = State::Failed;
                }
                Err(Trouble::Lost(why)) => {
                    outcome.state = State::Unknown;
                    outcome.why = Some(why);
                    return true;
                }
            }
        }
        if others == order.targets.len() {
            outcome.state = State::Other;
        }
        outcome.why = Some(reasons.join("; "));
        false
    }

    /// Moves a node to one server. Gives back what could not be tidied up.
    async fn move_to(
        &mut self,
        old: &Node,
        switches: &[Switch],
        target: &Uri,
        pause: &mut Duration,
    ) -> Result<Option<String>, Trouble> {
        let new = self.look().await?.free_name();
        let options = options(&new, old, target).ok_or_else(|| {
            Trouble::Back("the path of its socket is not UTF-8, which qemu has no way to be told".into())
        })?;
        self.monitor.call("blockdev-add", options).await?;
        let mut done = 0;
        let mut result = is_there(target).await;
        for switch in switches {
            if result.is_err() {
                break;
            }
            let began = clock::now();
            result = self.switch(switch, &new).await;
            *pause += clock::now().duration_since(began);
            done += usize::from(result.is_ok());
        }
        if result.is_ok() {
            result = self.verify(&old.name, &new, switches).await;
        }
        match result {
            Ok(()) => self.remove(&old.name).await,
            Err(Trouble::Lost(why)) => Err(Trouble::Lost(why)),
            Err(Trouble::Back(why)) => Err(self.take_back(&old.name, &new, &switches[..done], why).await),
        }
    }

    async fn switch(&mut self, switch: &Switch, to: &str) -> Result<(), Trouble> {
        match switch {
            Switch::Reopen { parent, role } => {
                let line = format!("qemu-io {parent} \"reopen -o {role}={to}\"");
                let said = self.monitor.call("human-monitor-command", json!({ "command-line": line })).await?;
                // It has no other way to say no.
                match said.as_str().map(str::trim) {
                    Some("") => Ok(()),
                    said => Err(Trouble::Back(format!("reopen {parent}: {}", said.unwrap_or("no answer")))),
                }
            }
            Switch::Device { path } => {
                let arguments = json!({ "path": path, "property": "drive", "value": to });
                self.monitor.call("qom-set", arguments).await?;
                Ok(())
            }
        }
    }

    /// Whether the graph shows that all was switched, and that nobody is left.
    async fn verify(&mut self, old: &str, new: &str, switches: &[Switch]) -> Result<(), Trouble> {
        let graph = self.look().await?;
        let is_done = switches.iter().all(|switch| graph.is_held(new, &switch.hold()));
        if is_done && graph.holds(new).len() == switches.len() && graph.holds(old).is_empty() {
            return Ok(());
        }
        Err(Trouble::Back("qemu said that it was done, and its block graph says that it was not".into()))
    }

    /// Removes the old node unless it is gone. Failing that is no failure of the move, but is told.
    async fn remove(&mut self, old: &str) -> Result<Option<String>, Trouble> {
        let graph = self.look().await?;
        if !graph.nodes.contains_key(old) {
            return Ok(None);
        }
        let left = |why: String| Some(format!("the old node {old} is still there: {why}"));
        match self.monitor.call("blockdev-del", json!({ "node-name": old })).await {
            Ok(_) if self.look().await?.nodes.contains_key(old) => Ok(left("qemu did not remove it".into())),
            Ok(_) => Ok(None),
            Err(error) if error.is_refusal() => Ok(left(error.to_string())),
            Err(error) => Err(error.into()),
        }
    }

    /// Has all who were switched hold the old node again, and removes the new one.
    async fn take_back(&mut self, old: &str, new: &str, done: &[Switch], mut why: String) -> Trouble {
        for switch in done.iter().rev() {
            match self.switch(switch, old).await {
                Ok(()) => {}
                Err(Trouble::Back(again)) => why.push_str(&format!("; and taking it back failed: {again}")),
                Err(lost) => return lost,
            }
        }
        match self.remove(new).await {
            Ok(None) => Trouble::Back(why),
            Ok(Some(left)) => Trouble::Back(format!("{why}; {left}")),
            Err(trouble) => trouble,
        }
    }

    /// Requests of these disks that have failed since the machine began. Where qemu does not say, none.
    async fn failed_requests(&mut self, disks: &[String], graph: &Graph) -> u64 {
        let stats = self.monitor.call("query-blockstats", json!({})).await.unwrap_or_default();
        let is_meant = |entry: &&Value| {
            let names = [entry["device"].as_str(), entry["qdev"].as_str()];
            let mut meant = graph.disks.iter().filter(|disk| disks.contains(&disk.name));
            meant.any(|disk| names.iter().flatten().any(|name| disk.is_called(name)))
        };
        let failed = |entry: &Value| {
            let of = |kind: &str| entry["stats"][format!("failed_{kind}_operations")].as_u64().unwrap_or(0);
            of("rd") + of("wr") + of("flush") + of("unmap")
        };
        stats.as_array().into_iter().flatten().filter(is_meant).map(failed).sum()
    }
}

/// Asks a server what it is, and a Headwater what its image holds.
async fn ask(server: &Uri) -> Result<Offer, String> {
    let agreed = upstream::inspect(server, ASKING).await.map_err(|failure| failure.to_string())?;
    let settings = Settings {
        connections: 1,
        connect_timeout: ASKING,
        stall_timeout: ASKING,
        patience: ASKING,
        ..Settings::default()
    };
    let remote = Remote::open(vec![server.clone()], Expectation::default(), settings).await;
    let remote = remote.map_err(|error| error.to_string())?;
    Ok(Offer::of(&agreed, remote.facts().identity))
}

/// Whether a server that qemu has just opened is still there. qemu would not notice before the guest waits for it.
async fn is_there(server: &Uri) -> Result<(), Trouble> {
    match upstream::inspect(server, ASKING).await {
        Ok(_) => Ok(()),
        Err(failure) => Err(Trouble::Back(format!("it went away again: {failure}"))),
    }
}

/// The options of a node for a new server, which treats everything as the old one does.
fn options(name: &str, old: &Node, target: &Uri) -> Option<Value> {
    Some(json!({
        "driver": "nbd",
        "node-name": name,
        "server": server_option(&target.address)?,
        "export": target.export,
        "read-only": old.is_read_only,
        "reconnect-delay": RECONNECT_DELAY,
        "cache": { "direct": old.cache.direct, "no-flush": old.cache.no_flush },
        "detect-zeroes": old.detect_zeroes.as_deref().unwrap_or("off"),
        // What the nodes above let through is wanted; so does qemu itself with what it puts under a format.
        "discard": "unmap",
    }))
}

#[cfg(test)]
mod tests {
    use super::super::graph::tests::graph;
    use super::*;

    const NBD: [(&str, &str); 1] = [("n", "nbd://h:1/x")];

    #[test]
    fn everybody_who_holds_a_node_is_switched() {
        let edges = [("raw", "file", "n"), ("#block12", "backing", "n")];
        let graph = graph(&[("vd0", "raw"), ("vd1", "#block12"), ("vd2", "n")], &edges, &NBD);
        let reopen = |parent: &str, role: &str| Switch::Reopen { parent: parent.into(), role: role.into() };
        let device = Switch::Device { path: "/machine/peripheral/vd2".into() };
        assert_eq!(plan(&graph, "n"), Ok(vec![reopen("raw", "file"), reopen("#block12", "backing"), device]));
    }

    #[test]
    fn what_cannot_be_switched_has_a_reason() {
        for (top, edge, reason) in [
            (vec![("vd0", "q")], ("q", "children.0", "n"), "children.0"),
            (vec![("vd0", "a b")], ("a b", "file", "n"), "odd name"),
        ] {
            let why = plan(&graph(&top, &[edge], &NBD), "n").unwrap_err();
            assert!(why.contains(reason), "{why}");
        }
    }

    #[test]
    fn disks_are_chosen_by_any_name() {
        let edges = [("raw", "file", "n"), ("raw2", "file", "m")];
        let nbd = [("n", "nbd://h:1/x"), ("m", "nbd://h:1/x")];
        let graph = graph(&[("vd0", "raw"), ("vd1", "raw2")], &edges, &nbd);
        let chosen = |names: &[&str]| choose(&graph, &names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>());
        assert_eq!(chosen(&[]).unwrap(), ["m", "n"]);
        assert_eq!(chosen(&["vd1"]).unwrap(), ["m"]);
        assert_eq!(chosen(&["/machine/peripheral/vd0", "m"]).unwrap(), ["m", "n"]);
        assert!(matches!(chosen(&["vd0", "vd9"]), Err(RedirectError::NoDisk(name)) if name == "vd9"));
    }
}
