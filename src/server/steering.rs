//! What can be done to connected clients from outside: put another export under them, tell mirrors the news, close
//! them when all is answered, and send newcomers away.
//!
//! Owns: the handles by which it is ordered, and who may come. Does not own: whom to move and where to (`control`), how
//! the orders reach a connection (`orders`, `notices`) and how it carries them out (`transmission`).

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::clients::{Client, ClientStatus, ClientTable};
use super::figures::Figures;
use super::notices::Notices;
use super::orders::{SwitchError, Switched};
use crate::clock;
use crate::export::access::Rules;
use crate::export::registry::image_name;
use crate::export::{Access, NodeId, SharedExport, Visitor};
use crate::telemetry::seldom;

/// What operators can do to the clients of a running server. Cheap to clone; all clones are one.
#[derive(Debug, Clone)]
pub struct Steering {
    /// Who is connected.
    pub clients: ClientTable,
    /// What mirrors are told.
    pub notices: Notices,
    /// Who may come.
    pub gate: Gate,
    /// Who may have which export.
    pub access: Access,
    /// What clients have asked for.
    pub figures: Figures,
    /// Names this server process: the path of an export that does not come from another server begins with it. Drawn at
    /// random.
    pub node: NodeId,
}

impl Default for Steering {
    fn default() -> Self {
        let (clients, notices, gate) = (ClientTable::default(), Notices::default(), Gate::default());
        let (access, figures) = (Access::default(), Figures::default());
        Self { clients, notices, gate, access, figures, node: NodeId::random() }
    }
}

impl Steering {
    /// Replaces the rules of who may have which export, and closes the connections of those who may not have theirs any
    /// more. Gives how many these are.
    pub fn change_access(&self, rules: Rules) -> usize {
        self.access.set(rules);
        // Who negotiates now and was let in by the old rules is asked again when it has entered the table.
        let mut closed = 0;
        for handle in self.clients.all() {
            let Client { peer, export, visitor, .. } = &*handle.client;
            let why = match self.access.judge(export, visitor) {
                Err(why) => why.to_string(),
                Ok(()) if self.access.needs_tls(export) && handle.client.is_relayed_bare() => {
                    "it is relayed to a server without TLS".to_owned()
                }
                Ok(()) => continue,
            };
            seldom!(info, peer, export, why, "closing a connection: the rules have changed");
            handle.close();
            closed += 1;
        }
        closed
    }
}

/// One connected client. It may be gone at any time. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ClientHandle {
    id: u64,
    client: Arc<Client>,
}

impl ClientHandle {
    pub(super) const fn new(id: u64, client: Arc<Client>) -> Self {
        Self { id, client }
    }

    /// Its number in the table.
    pub const fn id(&self) -> u64 {
        self.id
    }

    /// What operators see of it; `None` once it has left.
    pub fn status(&self) -> Option<ClientStatus> {
        (!self.client.desk.has_left()).then(|| self.client.status(self.id, clock::now()))
    }

    /// The mirror that it belongs to, if it is one and says which.
    pub fn node(&self) -> Option<NodeId> {
        self.client.mirror
    }

    /// Who it is to the rules.
    pub fn visitor(&self) -> &Visitor {
        &self.client.visitor
    }

    /// Whether it has waited for notices at least once. Such a client asks again after each answer, so news reach it at
    /// once.
    pub fn hears_notices(&self) -> bool {
        self.client.hears_notices()
    }

    /// Has the client served from `export`, which has the same size and flags, from the next request on; the client
    /// notices nothing. The text is what operators see of it (the URI); `None`: its own export again.
    ///
    /// On a writable export no more requests are taken until those under way are finished and flushed on the old one. On
    /// a read-only one they finish where they are, and are asked of the new one if that fails or takes long
    /// ([`Self::replayed`]). An error is one of "nothing was changed".
    ///
    /// Cancel safety: an order that is not done yet is given up; the client stays where it is.
    pub async fn switch(&self, export: Option<(SharedExport, String)>) -> Result<Switched, SwitchError> {
        self.client.desk.switch(export).await
    }

    /// Requests that were asked of a new export, because the old one had failed or was slow after a switch, so far.
    pub fn replayed(&self) -> u64 {
        self.client.counts.replayed.get()
    }

    /// Closes the connection when nothing is in flight, or after a second when what has been received is answered.
    pub fn close(&self) {
        self.client.desk.close();
    }

    /// Waits until it has left.
    ///
    /// Cancel safety: nothing is lost.
    pub async fn gone(&self) {
        self.client.desk.left().await;
    }
}

/// Who may come. Cheap to clone; all clones are one.
#[derive(Debug, Clone, Default)]
pub struct Gate(Arc<Mutex<Shut>>);

/// What takes no newcomers.
#[derive(Debug, Default)]
struct Shut {
    all: bool,
    exports: BTreeSet<String>,
}

impl Gate {
    /// Sends newcomers to an export, or to all, away with ERR_SHUTDOWN; also those to what is beside it
    /// (`NAME@manifest`). It is the caller's to name exports that there are.
    pub fn shut(&self, export: Option<&str>) {
        let mut shut = self.lock();
        match export {
            Some(export) => drop(shut.exports.insert(export.to_owned())),
            None => shut.all = true,
        }
    }

    /// Takes back what was said of this export, or of all. Exports that were shut by their names stay shut when all are
    /// opened, and the other way round.
    pub fn open(&self, export: Option<&str>) {
        let mut shut = self.lock();
        match export {
            Some(export) => drop(shut.exports.remove(export)),
            None => shut.all = false,
        }
    }

    /// What takes no newcomers: whether it is all, and the names of exports.
    pub fn shuttered(&self) -> (bool, Vec<String>) {
        let shut = self.lock();
        (shut.all, shut.exports.iter().cloned().collect())
    }

    /// Whether the export with this full name takes no newcomers.
    pub(super) fn is_shut(&self, name: &str) -> bool {
        let shut = self.lock();
        shut.all || !shut.exports.is_empty() && [name, image_name(name)].iter().any(|name| shut.exports.contains(*name))
    }

    fn lock(&self) -> MutexGuard<'_, Shut> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::{Origin, TlsPeer};
    use crate::server::clients::Newcomer;

    #[test]
    fn what_is_shut_is_shut_with_all_that_is_beside_it() {
        let gate = Gate::default();
        let whole = format!("a@blake3-{}", "ab".repeat(32));
        let names = ["a", "a@manifest", "a@profile-inbox", &whole, &format!("{whole}@manifest")];
        let is_shut = || names.map(|name| gate.is_shut(name));
        assert_eq!(is_shut(), [false; 5]);
        gate.shut(Some("a"));
        assert_eq!(is_shut(), [true; 5]);
        assert!(!gate.is_shut("b") && !gate.is_shut("a@b") && !gate.is_shut("b@manifest"));
        gate.shut(None);
        assert!(gate.is_shut("b"));
        gate.open(None);
        assert!(!gate.is_shut("b"));
        assert_eq!(is_shut(), [true; 5], "it was shut by its name");
        gate.open(Some("a"));
        assert_eq!(is_shut(), [false; 5]);
        gate.shut(Some(&whole));
        assert_eq!(is_shut(), [false, false, false, true, false], "another generation is another export");
    }

    /// Rules that change reach those who are there, also those who are served from elsewhere.
    #[test]
    fn new_rules_close_connections() {
        let steering = Steering::default();
        let enter = |address: &str, tls: bool| {
            let address = Origin::Ip(address.parse().unwrap());
            let visitor = Visitor { address, tls: tls.then(TlsPeer::default) };
            steering.clients.enter(Newcomer { export: "a".to_owned(), visitor, ..Newcomer::default() })
        };
        let entries = [enter("10.0.0.1", false), enter("192.0.2.1", true), enter("192.0.2.2", true)];
        entries[1].client().note_relayed(Some("nbd://b/a".to_owned()));
        entries[2].client().note_relayed(Some("nbds://b/a".to_owned()));
        let closing = || entries.each_ref().map(|entry| entry.client().desk.is_closing());
        let mut rules = Rules::default();
        rules.addresses.add(None, vec!["0.0.0.0/0".parse().unwrap()]);
        assert_eq!((steering.change_access(rules.clone()), closing()), (0, [false; 3]));
        rules.tls.insert("a".to_owned());
        assert_eq!((steering.change_access(rules), closing()), (2, [true, true, false]));
    }

    #[test]
    fn each_server_is_somebody_else() {
        assert_ne!(Steering::default().node, Steering::default().node);
    }
}
