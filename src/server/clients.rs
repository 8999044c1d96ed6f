//! Who is connected, and what each has done.
//!
//! Each connection counts for itself: its numbers have one writer, the connection's worker, and cost it a plain load
//! and store. The table is locked when a client comes, when it goes, and when somebody asks.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::clock;
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
    /// Requests that wait for something, as of the connection's last turn.
    pub(super) requests_in_flight: Tally,
    /// Bytes that requests and replies hold, as of the connection's last turn.
    pub(super) bytes_in_flight: Tally,
}

/// One client, as operators see it. The field names are those of the JSON.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
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
}

/// All clients of a server. Cheap to clone; all clones are one table.
#[derive(Debug, Clone, Default)]
pub struct ClientTable(Arc<Mutex<Table>>);

#[derive(Debug, Default)]
struct Table {
    /// How many there were.
    count: u64,
    clients: BTreeMap<u64, Client>,
}

#[derive(Debug)]
struct Client {
    peer: String,
    export: String,
    since: Instant,
    counts: Arc<Counts>,
}

impl ClientTable {
    /// All who are connected and have negotiated, oldest first.
    pub fn list(&self) -> Vec<ClientStatus> {
        let now = clock::now();
        self.lock().clients.iter().map(|(id, client)| client.status(*id, now)).collect()
    }

    /// Adds a client, who stays until what this gives is dropped.
    pub(super) fn enter(&self, peer: &str, export: &str) -> Entry {
        let counts = Arc::<Counts>::default();
        let (peer, export) = (peer.to_owned(), export.to_owned());
        let client = Client { peer, export, since: clock::now(), counts: Arc::clone(&counts) };
        let mut table = self.lock();
        table.count += 1;
        let id = table.count;
        table.clients.insert(id, client);
        Entry { table: self.clone(), id, counts }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Client {
    fn status(&self, id: u64, now: Instant) -> ClientStatus {
        let Self { peer, export, since, counts } = self;
        ClientStatus {
            id,
            peer: peer.clone(),
            export: export.clone(),
            connected_seconds: now.saturating_duration_since(*since).as_secs_f64(),
            requests: counts.requests.get(),
            read_bytes: counts.read_bytes.get(),
            written_bytes: counts.written_bytes.get(),
            errors: counts.errors.get(),
            requests_in_flight: counts.requests_in_flight.get(),
            bytes_in_flight: counts.bytes_in_flight.get(),
        }
    }
}

impl Counts {
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
    counts: Arc<Counts>,
}

impl Entry {
    pub(super) const fn counts(&self) -> &Arc<Counts> {
        &self.counts
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.table.lock().clients.remove(&self.id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_are_listed_from_their_coming_to_their_going() {
        let table = ClientTable::default();
        assert_eq!(table.list(), []);
        let first = table.enter("[::1]:9", "a");
        let second = table.enter("unix:pid=1", "b");
        first.counts().requests.add(2);
        first.counts().requests.add(3);
        second.counts().note_in_flight(7, 4096);
        let listed = table.list();
        assert_eq!([listed[0].id, listed[1].id], [1, 2]);
        assert_eq!((&*listed[0].peer, &*listed[0].export, listed[0].requests), ("[::1]:9", "a", 5));
        assert_eq!((listed[1].requests_in_flight, listed[1].bytes_in_flight), (7, 4096));
        drop(first);
        let third = table.enter("[::1]:9", "a");
        assert_eq!(table.list().iter().map(|client| client.id).collect::<Vec<_>>(), [2, 3], "numbers are given once");
        drop((second, third));
        assert_eq!(table.list(), []);
    }
}
