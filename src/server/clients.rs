//! Who is connected, and what each has done.
//!
//! Owns: the table and what it tells. Does not own: orders to clients (`steering`, `orders`).
//!
//! Each connection counts for itself: its numbers have one writer, the connection's worker, and cost it a plain load
//! and store. The table is locked when a client comes, when it goes, and when somebody asks.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::frozen::Done;
use super::orders::Desk;
use super::steering::ClientHandle;
use crate::clock;
use crate::export::{NodeId, Visitor, split_content_name};
use crate::nbd::Uri;
use crate::nbd::handshake::server::Id;
use crate::units::to_u64;

/// A number that one thread changes and any thread may read.
#[derive(Default)]
pub(super) struct Tally(AtomicU64);

impl Tally {
    /// Only the thread whose number it is may do this: what two threads add at once may be lost.
    pub(super) fn add(&self, amount: u64) {
        self.set(self.get() + amount);
    }

    /// As [`Self::add`].
    pub(super) fn set(&self, value: u64) {
        self.0.store(value, Ordering::Relaxed);
    }

    pub(super) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl fmt::Debug for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.get().fmt(f)
    }
}

/// What a connection has done and is doing. On cache lines of its own: a worker's neighbours write to theirs.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(super) struct Counts {
    pub(super) requests: Tally,
    pub(super) read_bytes: Tally,
    pub(super) written_bytes: Tally,
    pub(super) errors: Tally,
    /// Requests answered whose time is known.
    pub(super) timed_requests: Tally,
    /// How long these took together.
    pub(super) latency_nanoseconds: Tally,
    /// Requests that were asked of a second export.
    pub(super) replayed: Tally,
    /// Requests that wait for something, as of the connection's last turn.
    pub(super) requests_in_flight: Tally,
    /// Bytes that requests and replies hold, as of the connection's last turn.
    pub(super) bytes_in_flight: Tally,
}

/// One client, as operators see it. The field names are those of the JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ClientStatus {
    /// Names this connection as long as the server runs.
    pub id: u64,
    /// Its address: `ADDR:PORT`, or `unix:pid=N`.
    pub peer: String,
    /// The export that it uses.
    pub export: String,
    /// How long it has been connected, since the end of its negotiation.
    pub connected_seconds: f64,
    /// Requests taken.
    pub requests: u64,
    /// Bytes of the image that were read.
    pub read_bytes: u64,
    /// Bytes of the image that were written.
    pub written_bytes: u64,
    /// Requests answered with an error.
    pub errors: u64,
    /// Requests taken that wait for something now: a disk, an upstream, their turn.
    pub requests_in_flight: u64,
    /// Bytes that its requests and replies hold now.
    pub bytes_in_flight: u64,
    /// The mirror that it belongs to, if it is one and says which.
    #[serde(default)]
    pub mirror: Option<String>,
    /// Whether news reach it at once, because it waits for them.
    #[serde(default)]
    pub hears_notices: bool,
    /// Where it is served from, if not from here: a URI.
    #[serde(default)]
    pub relayed_to: Option<String>,
    /// Whether it is another server, which asks for clients of its own that it relays to here.
    #[serde(default)]
    pub is_relay: bool,
    /// Requests that were asked of a second export after the first one had been left.
    #[serde(default)]
    pub replayed: u64,
    /// Requests answered whose time is known: all but those for notices.
    #[serde(default)]
    pub timed_requests: u64,
    /// How long these took together, from their arrival until their answers were on their way.
    #[serde(default)]
    pub latency_seconds: f64,
    /// Whether it speaks TLS.
    #[serde(default)]
    pub tls: bool,
    /// The names in its certificate; none if it showed none.
    #[serde(default)]
    pub tls_names: Vec<String>,
}

/// All clients of a server. Cheap to clone; all clones are one table.
#[derive(Debug, Clone, Default)]
pub struct ClientTable(Arc<Mutex<Table>>);

#[derive(Debug, Default)]
struct Table {
    /// How many there were.
    count: u64,
    clients: BTreeMap<u64, Arc<Client>>,
    /// Bytes that were sent over the network to clients that have left.
    sent_before: u64,
}

/// One connection, as others see it.
#[derive(Debug)]
pub(super) struct Client {
    pub(super) peer: String,
    is_remote: bool,
    pub(super) export: String,
    pub(super) mirror: Option<NodeId>,
    is_relay: bool,
    connection: Option<Id>,
    pub(super) visitor: Visitor,
    since: Instant,
    pub(super) counts: Arc<Counts>,
    pub(super) desk: Desk,
    hears_notices: AtomicBool,
    relayed_to: Mutex<Option<String>>,
    /// For how long it had been connected to the predecessor.
    before: OnceLock<Duration>,
}

/// Who comes.
#[derive(Debug, Default)]
pub(super) struct Newcomer {
    /// Its address.
    pub(super) peer: String,
    /// The full name of its export.
    pub(super) export: String,
    pub(super) mirror: Option<NodeId>,
    /// What it calls this connection.
    pub(super) connection: Option<Id>,
    /// Whether it is a relay of another server.
    pub(super) is_relay: bool,
    /// Who it is to the rules.
    pub(super) visitor: Visitor,
}

impl ClientTable {
    /// All who are connected and have negotiated, oldest first.
    pub fn list(&self) -> Vec<ClientStatus> {
        let now = clock::now();
        self.lock().clients.iter().map(|(id, client)| client.status(*id, now)).collect()
    }

    /// The client with this number, if it is connected.
    pub fn find(&self, id: u64) -> Option<ClientHandle> {
        self.lock().clients.get(&id).map(|client| ClientHandle::new(id, Arc::clone(client)))
    }

    /// All who are connected and have negotiated.
    pub(super) fn all(&self) -> Vec<ClientHandle> {
        self.lock().clients.iter().map(|(id, client)| ClientHandle::new(*id, Arc::clone(client))).collect()
    }

    /// The clients of an export now, oldest first: under its own name and under `NAME@blake3-...`; not those of what
    /// is beside it.
    pub fn of_export(&self, export: &str) -> Vec<ClientHandle> {
        let table = self.lock();
        let of_it = table.clients.iter().filter(|(_, client)| is_of(&client.export, export));
        of_it.map(|(id, client)| ClientHandle::new(*id, Arc::clone(client))).collect()
    }

    /// Closes the connections to the export of this full name that call themselves `connection`, of those that `may` says
    /// yes to, by the full names of their exports.
    pub(super) fn close(&self, export: &str, connection: Id, may: impl Fn(&str) -> bool) {
        let export = split_content_name(export).0;
        let table = self.lock();
        let is_named = |client: &Client| client.connection == Some(connection) && is_of(&client.export, export);
        let is_meant = |client: &&Arc<Client>| is_named(client) && may(&client.export);
        table.clients.values().filter(is_meant).for_each(|client| client.desk.close());
    }

    /// Adds a client, who stays until what this gives is dropped.
    pub(super) fn enter(&self, newcomer: Newcomer) -> Entry {
        self.enter_as(newcomer, None)
    }

    /// Sees to it that nobody else gets the number of a client of the predecessor.
    pub(super) fn reserve(&self, id: u64) {
        let mut table = self.lock();
        table.count = table.count.max(id);
    }

    fn enter_as(&self, newcomer: Newcomer, id: Option<u64>) -> Entry {
        let Newcomer { peer, export, mirror, connection, is_relay, visitor } = newcomer;
        let client = Arc::new(Client {
            is_remote: is_remote(&peer),
            peer,
            export,
            mirror,
            is_relay,
            connection,
            visitor,
            since: clock::now(),
            counts: Arc::default(),
            desk: Desk::default(),
            hears_notices: AtomicBool::new(false),
            relayed_to: Mutex::default(),
            before: OnceLock::new(),
        });
        let mut table = self.lock();
        let id = id.filter(|id| !table.clients.contains_key(id)).unwrap_or_else(|| {
            table.count += 1;
            table.count
        });
        table.clients.insert(id, Arc::clone(&client));
        Entry { table: self.clone(), id, client }
    }

    /// Adds a client of the predecessor, with what it has done there.
    pub(super) fn enter_again(&self, newcomer: Newcomer, done: &Done) -> Entry {
        let entry = self.enter_as(newcomer, Some(done.id));
        let counts = entry.counts();
        let all = [
            (&counts.requests, done.requests),
            (&counts.read_bytes, done.read_bytes),
            (&counts.written_bytes, done.written_bytes),
            (&counts.errors, done.errors),
            (&counts.replayed, done.replayed),
            (&counts.timed_requests, done.timed_requests),
            (&counts.latency_nanoseconds, done.latency_nanoseconds),
        ];
        all.into_iter().for_each(|(tally, value)| tally.set(value));
        if done.hears_notices {
            entry.client().note_hearing();
        }
        let before = Duration::try_from_secs_f64(done.connected_seconds).unwrap_or_default();
        let _ = entry.client().before.set(before);
        entry
    }

    /// Bytes of answers that have gone over the network so far, those to this host not counted; and how many clients had
    /// to be asked.
    pub fn sent(&self) -> (u64, usize) {
        let table = self.lock();
        let remote = table.clients.values().filter(|client| client.is_remote);
        (table.sent_before + remote.map(|client| client.counts.read_bytes.get()).sum::<u64>(), table.clients.len())
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether what is sent to a peer goes over a network.
fn is_remote(peer: &str) -> bool {
    peer.parse().is_ok_and(|address: SocketAddr| !address.ip().to_canonical().is_loopback())
}

/// Whether a full name is that of `export`, perhaps with an identity.
fn is_of(name: &str, export: &str) -> bool {
    name == export || split_content_name(name).0 == export
}

impl Client {
    pub(super) fn status(&self, id: u64, now: Instant) -> ClientStatus {
        let Self { peer, export, counts, .. } = self;
        ClientStatus {
            id,
            peer: peer.clone(),
            export: export.clone(),
            connected_seconds: self.connected_by(now).as_secs_f64(),
            requests: counts.requests.get(),
            read_bytes: counts.read_bytes.get(),
            written_bytes: counts.written_bytes.get(),
            errors: counts.errors.get(),
            requests_in_flight: counts.requests_in_flight.get(),
            bytes_in_flight: counts.bytes_in_flight.get(),
            mirror: self.mirror.map(|mirror| mirror.to_string()),
            hears_notices: self.hears_notices(),
            relayed_to: self.lock_relayed().clone(),
            is_relay: self.is_relay,
            replayed: counts.replayed.get(),
            timed_requests: counts.timed_requests.get(),
            latency_seconds: Duration::from_nanos(counts.latency_nanoseconds.get()).as_secs_f64(),
            tls: self.visitor.tls.is_some(),
            tls_names: self.visitor.tls.as_ref().map_or_else(Vec::new, |tls| tls.names.clone()),
        }
    }

    /// For how long it has been connected.
    pub(super) fn connected(&self) -> Duration {
        self.connected_by(clock::now())
    }

    fn connected_by(&self, now: Instant) -> Duration {
        self.before.get().copied().unwrap_or_default() + now.saturating_duration_since(self.since)
    }

    /// What it has done so far, for a successor.
    pub(super) fn done(&self, id: u64) -> Done {
        let counts = &self.counts;
        Done {
            id,
            connected_seconds: self.connected().as_secs_f64(),
            requests: counts.requests.get(),
            read_bytes: counts.read_bytes.get(),
            written_bytes: counts.written_bytes.get(),
            errors: counts.errors.get(),
            replayed: counts.replayed.get(),
            timed_requests: counts.timed_requests.get(),
            latency_nanoseconds: counts.latency_nanoseconds.get(),
            hears_notices: self.hears_notices(),
        }
    }

    /// Where it is served from, if not from here.
    pub(super) fn relayed_to(&self) -> Option<String> {
        self.lock_relayed().clone()
    }

    /// Notes where it is served from; `None`: from here.
    pub(super) fn note_relayed(&self, to: Option<String>) {
        *self.lock_relayed() = to;
    }

    /// Whether it is served from elsewhere over a connection that nothing protects.
    pub(super) fn is_relayed_bare(&self) -> bool {
        // What cannot be read is not known to be protected.
        let is_bare = |to: &String| Uri::parse_list(to).map_or(true, |uris| !uris.iter().all(Uri::is_protected));
        self.lock_relayed().as_ref().is_some_and(is_bare)
    }

    /// Notes that it waits for notices.
    pub(super) fn note_hearing(&self) {
        self.hears_notices.store(true, Ordering::Relaxed);
    }

    pub(super) fn hears_notices(&self) -> bool {
        self.hears_notices.load(Ordering::Relaxed)
    }

    fn lock_relayed(&self) -> MutexGuard<'_, Option<String>> {
        self.relayed_to.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Counts {
    /// Notes requests that took so long each.
    pub(super) fn note_timed(&self, requests: u64, took: Duration) {
        let nanoseconds = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.timed_requests.add(requests);
        self.latency_nanoseconds
            .set(self.latency_nanoseconds.get().saturating_add(nanoseconds.saturating_mul(requests)));
    }

    /// Notes what is in flight now.
    pub(super) fn note_in_flight(&self, requests: usize, bytes: usize) {
        self.requests_in_flight.set(to_u64(requests));
        self.bytes_in_flight.set(to_u64(bytes));
    }
}

/// A client's place in the table.
#[derive(Debug)]
pub(super) struct Entry {
    table: ClientTable,
    id: u64,
    client: Arc<Client>,
}

impl Entry {
    pub(super) const fn id(&self) -> u64 {
        self.id
    }

    pub(super) const fn client(&self) -> &Arc<Client> {
        &self.client
    }

    pub(super) fn counts(&self) -> &Arc<Counts> {
        &self.client.counts
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut table = self.table.lock();
        if table.clients.remove(&self.id).is_some_and(|client| client.is_remote) {
            table.sent_before += self.client.counts.read_bytes.get();
        }
        drop(table);
        self.client.desk.leave();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn newcomer(peer: &str, export: &str) -> Newcomer {
        Newcomer { peer: peer.into(), export: export.into(), ..Newcomer::default() }
    }

    #[test]
    fn what_went_over_the_network_is_counted_also_when_clients_have_left() {
        let table = ClientTable::default();
        let far = table.enter(newcomer("192.0.2.1:7", "a"));
        let near =
            ["127.0.0.1:7", "[::1]:7", "[::ffff:127.0.0.1]:7", "unix"].map(|peer| table.enter(newcomer(peer, "a")));
        near.iter().chain([&far]).for_each(|entry| entry.counts().read_bytes.add(10));
        assert_eq!(table.sent(), (10, 5));
        drop(near);
        drop(far);
        assert_eq!(table.sent(), (10, 0));
    }

    #[test]
    fn clients_are_listed_from_their_coming_to_their_going() {
        let table = ClientTable::default();
        assert_eq!(table.list(), []);
        let first = table.enter(newcomer("[::1]:9", "a"));
        let second = table.enter(newcomer("unix:pid=1", "b"));
        first.counts().requests.add(2);
        first.counts().requests.add(3);
        second.counts().note_in_flight(7, 4096);
        let listed = table.list();
        assert_eq!([listed[0].id, listed[1].id], [1, 2]);
        assert_eq!((&*listed[0].peer, &*listed[0].export, listed[0].requests), ("[::1]:9", "a", 5));
        assert_eq!((listed[1].requests_in_flight, listed[1].bytes_in_flight), (7, 4096));
        drop(first);
        let third = table.enter(newcomer("[::1]:9", "a"));
        assert_eq!(table.list().iter().map(|client| client.id).collect::<Vec<_>>(), [2, 3], "numbers are given once");
        drop((second, third));
        assert_eq!(table.list(), []);
    }

    #[test]
    fn clients_are_found_by_what_they_are() {
        let table = ClientTable::default();
        let whole = format!("a@blake3-{}", "ab".repeat(32));
        let mut entries: Vec<_> = ["a", &whole, "a@manifest", "b"].map(|name| table.enter(newcomer("p", name))).into();
        entries.push(table.enter(Newcomer { connection: Some([7; 16]), ..newcomer("p", &whole) }));
        let ids = |export: &str| table.of_export(export).iter().map(ClientHandle::id).collect::<Vec<_>>();
        assert_eq!(ids("a"), [1, 2, 5]);
        assert_eq!(ids(&whole), [2, 5]);
        assert_eq!(ids("c"), [0; 0]);
        assert_eq!(table.find(4).and_then(|client| client.status()).map(|status| status.export), Some("b".into()));
        let client = table.find(5).unwrap();
        drop(entries);
        assert!(table.find(5).is_none() && client.status().is_none());
    }

    #[test]
    fn a_status_of_an_older_server_is_understood() {
        let entry = ClientTable::default();
        let kept = entry.enter(newcomer("p", "a"));
        let mut json = serde_json::to_value(&entry.list()[0]).unwrap();
        for new in ["mirror", "hears_notices", "relayed_to", "replayed", "timed_requests", "latency_seconds"] {
            assert!(json.as_object_mut().unwrap().remove(new).is_some());
        }
        let status: ClientStatus = serde_json::from_value(json).unwrap();
        assert_eq!((status.mirror, status.hears_notices, status.relayed_to, status.replayed), (None, false, None, 0));
        drop(kept);
    }
}
