//! The orders of a server: at work, or ended and remembered.
//!
//! Owns: their numbers, their states, when they are written down. Does not own: the form of the file (`file`), moving
//! clients (`runner`).
//!
//! An order is written down before it is answered, when it ends, and while it is at work once a second at most. One that
//! cannot be written down is taken all the same, and says so: the clients that it is for matter more.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::{Notify, watch};

use super::file::{File, FileError, Kept, MOST_ACTIVE, MOST_CLIENTS, MOST_ENDED, StatePlace, shorten};
use super::order::{ClientReport, ClientState, Counts, RedirectState, RedirectStatus};
use crate::clock;
use crate::control::operated::Refusal;
use crate::server::ClientHandle;

/// The least time between two writes of what is at work.
const BETWEEN_WRITES: Duration = Duration::from_secs(1);

/// One order.
#[derive(Debug)]
pub(super) struct Order {
    pub(super) id: u64,
    inner: Mutex<Inner>,
    ended: watch::Sender<bool>,
}

#[derive(Debug)]
struct Inner {
    /// Whether it has ended, and that is not written down yet: nobody is told before.
    is_ending: bool,
    /// Without clients, which are in `rows`.
    status: RedirectStatus,
    rows: Vec<Row>,
}

/// A client of an order.
#[derive(Debug, Default)]
pub(super) struct Row {
    pub(super) report: ClientReport,
    /// Its connections as long as it may be of interest what they do.
    pub(super) followed: Vec<Followed>,
}

/// A connection, and what it had counted before it was moved.
#[derive(Debug)]
pub(super) struct Followed {
    pub(super) handle: ClientHandle,
    pub(super) errors: u64,
    pub(super) replayed: u64,
    /// What it has counted since, when it was last seen.
    seen: (u64, u64),
}

impl Followed {
    pub(super) fn new(handle: ClientHandle) -> Self {
        let errors = handle.status().map_or(0, |status| status.errors);
        let replayed = handle.replayed();
        Self { handle, errors, replayed, seen: (0, 0) }
    }

    fn look(&mut self) -> (u64, u64) {
        if let Some(status) = self.handle.status() {
            let errors = status.errors.saturating_sub(self.errors);
            self.seen = (errors, self.handle.replayed().saturating_sub(self.replayed));
        }
        self.seen
    }
}

impl Row {
    /// Takes over what its connections have counted.
    fn look(&mut self) {
        if self.followed.is_empty() {
            return;
        }
        let seen: Vec<_> = self.followed.iter_mut().map(Followed::look).collect();
        self.report.errors = seen.iter().map(|(errors, _)| errors).sum();
        self.report.replayed = seen.iter().map(|(_, replayed)| replayed).sum();
    }
}

impl Order {
    fn new(id: u64, status: RedirectStatus, rows: Vec<Row>) -> Self {
        let is_over = status.state != RedirectState::Active;
        let inner = Inner { is_ending: false, status: RedirectStatus { order: id, ..status }, rows };
        Self { id, inner: Mutex::new(inner), ended: watch::Sender::new(is_over) }
    }

    /// As it is now, for whoever asks.
    pub(super) fn status(&self) -> RedirectStatus {
        let status = self.kept();
        if !self.lock().is_ending {
            return status;
        }
        RedirectStatus { state: RedirectState::Active, error: None, ended: None, ..status }
    }

    /// As it is to be written down.
    fn kept(&self) -> RedirectStatus {
        let mut inner = self.lock();
        let is_active = inner.status.state == RedirectState::Active;
        inner.rows.iter_mut().for_each(Row::look);
        let clients: Vec<_> = inner.rows.iter().map(|row| row.report.clone()).collect();
        let mut status = inner.status.clone();
        // Of one that was read from the file, not all clients need be known.
        if to_total(&clients) >= status.counts.total {
            status.counts = Counts::of(&clients);
        }
        status.clients = clients;
        if !is_active {
            shorten(&mut status, MOST_CLIENTS);
        }
        status
    }

    /// What came of it so far.
    fn outcome(&self) -> (RedirectState, Counts) {
        let inner = self.lock();
        let counts = Counts::of(inner.rows.iter().map(|row| &row.report));
        let state = if inner.is_ending { RedirectState::Active } else { inner.status.state };
        // Of one that was read from the file, not all clients need be known.
        (state, if counts.total >= inner.status.counts.total { counts } else { inner.status.counts })
    }

    pub(super) fn is_active(&self) -> bool {
        self.lock().status.state == RedirectState::Active
    }

    /// Becomes true when it has ended, however that was.
    pub(super) fn ended(&self) -> watch::Receiver<bool> {
        self.ended.subscribe()
    }

    /// Its clients, by their places.
    pub(super) fn rows(&self) -> usize {
        self.lock().rows.len()
    }

    /// Looks at a client, or changes what is said of it.
    pub(super) fn row<T>(&self, index: usize, look: impl FnOnce(&mut Row) -> T) -> T {
        look(&mut self.lock().rows[index])
    }

    /// Ends it, unless it has ended; to be settled when that is written down. Clients whose turn has not come stay.
    fn end(&self, state: RedirectState, error: Option<String>, now: SystemTime) {
        let mut inner = self.lock();
        if inner.status.state == RedirectState::Active {
            inner.is_ending = true;
            inner.status.state = state;
            inner.status.error = error.or_else(|| inner.status.error.take());
            inner.status.ended = Some(seconds(now));
            let why = match state {
                RedirectState::Cancelled => "the order was called off",
                _ => "the order ended before its turn came",
            };
            for row in inner.rows.iter_mut().filter(|row| row.report.state == ClientState::Waiting) {
                (row.report.state, row.report.why) = (ClientState::Stayed, Some(why.to_owned()));
            }
        }
        drop(inner);
        self.ended.send_replace(true);
    }

    fn settle(&self) {
        self.lock().is_ending = false;
    }

    fn set_durable(&self, error: Option<&FileError>) {
        let mut inner = self.lock();
        inner.status.durable = error.is_none();
        if let Some(error) = error {
            inner.status.warnings.push(format!("a restart forgets this order: it cannot be written down: {error}"));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn to_total(clients: &[ClientReport]) -> u64 {
    crate::units::to_u64(clients.len())
}

/// All orders of a server.
#[derive(Debug)]
pub(super) struct Table {
    orders: Mutex<Orders>,
    file: Arc<tokio::sync::Mutex<Result<File, FileError>>>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Orders {
    last: u64,
    all: BTreeMap<u64, Arc<Order>>,
    /// Of those that are not known any more.
    forgotten: Totals,
}

/// What came of all orders so far, those included that were remembered from before the server started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(in crate::control) struct Totals {
    /// Orders at work.
    pub(in crate::control) active: u64,
    /// Orders that came to their ends.
    pub(in crate::control) done: u64,
    /// Orders that could not go on.
    pub(in crate::control) failed: u64,
    /// Orders that were called off.
    pub(in crate::control) cancelled: u64,
    /// Clients of all of them.
    pub(in crate::control) clients: Counts,
}

impl Totals {
    fn add(&mut self, state: RedirectState, clients: &Counts) {
        match state {
            RedirectState::Active => self.active += 1,
            RedirectState::Done => self.done += 1,
            RedirectState::Failed => self.failed += 1,
            RedirectState::Cancelled => self.cancelled += 1,
        }
        self.clients.add(clients);
    }
}

impl Table {
    /// Reads what was written down. Blocks.
    pub(super) fn open(place: Option<StatePlace>) -> Self {
        let opened = place.map_or_else(|| Err(FileError::NoPlace), File::open);
        let (file, kept) = match opened {
            Ok((file, kept)) => (Ok(file), kept),
            Err(error) => {
                tracing::debug!(%error, "orders to redirect will not be known after a restart");
                (Err(error), Kept::default())
            }
        };
        let read = |mut status: RedirectStatus| {
            let rows = std::mem::take(&mut status.clients).into_iter();
            let rows = rows.map(|report| Row { report, followed: Vec::new() }).collect();
            (status.order, Arc::new(Order::new(status.order, status, rows)))
        };
        let all = kept.orders.into_iter().map(read).collect();
        let orders = Orders { last: kept.last, all, forgotten: Totals::default() };
        Self { orders: Mutex::new(orders), file: Arc::new(tokio::sync::Mutex::new(file)), changed: Notify::new() }
    }

    /// Takes an order. When this is answered it is durable, or says that it is not.
    pub(super) async fn add(&self, status: RedirectStatus, rows: Vec<Row>) -> Result<Arc<Order>, Refusal> {
        let order = {
            let mut orders = self.lock();
            if orders.all.values().filter(|order| order.is_active()).count() >= MOST_ACTIVE {
                let why = format!("{MOST_ACTIVE} orders to redirect are active: cancel one, or wait for it");
                return Err(Refusal::Conflict(why));
            }
            orders.last += 1;
            let order = Arc::new(Order::new(orders.last, RedirectStatus { durable: true, ..status }, rows));
            orders.all.insert(order.id, Arc::clone(&order));
            orders.forget();
            order
        };
        let written = self.write().await;
        order.set_durable(written.as_ref().err());
        Ok(order)
    }

    /// One of them.
    pub(super) fn get(&self, id: u64) -> Option<Arc<Order>> {
        self.lock().all.get(&id).cloned()
    }

    /// All that are known, oldest first.
    pub(super) fn list(&self) -> Vec<Arc<Order>> {
        self.lock().all.values().cloned().collect()
    }

    /// What came of all orders so far. Only those at work, and their clients, can become fewer.
    pub(super) fn totals(&self) -> Totals {
        let orders = self.lock();
        let mut totals = orders.forgotten;
        for order in orders.all.values() {
            let (state, clients) = order.outcome();
            totals.add(state, &clients);
        }
        totals
    }

    /// Ends an order, unless it has ended. It is told to have ended when that is written down, if it can be.
    pub(super) async fn end(&self, order: &Order, state: RedirectState, error: Option<String>) {
        order.end(state, error, wall());
        self.write_down().await;
        order.settle();
    }

    /// Has what is at work written down soon.
    pub(super) fn note(&self) {
        self.changed.notify_one();
    }

    /// Writes down what is noted, for ever.
    pub(super) async fn keep_writing(&self) {
        loop {
            self.changed.notified().await;
            self.write_down().await;
            tokio::time::sleep(BETWEEN_WRITES).await;
        }
    }

    /// Writes all of it down; tells the log if that fails.
    pub(super) async fn write_down(&self) {
        if let Err(error) = self.write().await
            && !matches!(error, FileError::NoPlace | FileError::Elsewhere(_))
        {
            tracing::warn!(%error, "cannot write the orders to redirect down");
        }
    }

    async fn write(&self) -> Result<(), FileError> {
        let mut file = Arc::clone(&self.file).lock_owned().await;
        let kept = self.kept();
        let writing = move || match &mut *file {
            Ok(file) => file.replace(&kept),
            Err(FileError::Disk(path, error)) => Err(FileError::Disk(path.clone(), std::io::Error::from(error.kind()))),
            Err(FileError::Elsewhere(path)) => Err(FileError::Elsewhere(path.clone())),
            Err(_) => Err(FileError::NoPlace),
        };
        // A panic has been reported by the thread itself.
        tokio::task::spawn_blocking(writing).await.unwrap_or(Err(FileError::NoPlace))
    }

    fn kept(&self) -> Kept {
        let (last, orders) = {
            let orders = self.lock();
            (orders.last, orders.all.values().cloned().collect::<Vec<_>>())
        };
        Kept::new(last, orders.iter().map(|order| order.kept()).collect())
    }

    fn lock(&self) -> MutexGuard<'_, Orders> {
        self.orders.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Orders {
    fn forget(&mut self) {
        let ended: Vec<_> = self.all.values().filter(|order| !order.is_active()).map(|order| order.id).collect();
        for id in ended.iter().take(ended.len().saturating_sub(MOST_ENDED)) {
            if let Some(order) = self.all.remove(id) {
                let (state, clients) = order.outcome();
                self.forgotten.add(state, &clients);
            }
        }
    }
}

/// Since 1970, to the millisecond. A clock before that is taken for one at that.
pub(super) fn seconds(time: SystemTime) -> f64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Duration::from_millis(u64::try_from(since.as_millis()).unwrap_or(u64::MAX)).as_secs_f64()
}

/// A length of time, to the microsecond; an hour at most.
pub(super) fn milliseconds(time: Duration) -> f64 {
    f64::from(u32::try_from(time.as_micros()).unwrap_or(u32::MAX)) / 1000.0
}

/// The time of day, as orders tell it.
pub(super) fn wall() -> SystemTime {
    clock::moment().wall
}

#[cfg(test)]
mod tests {
    use super::super::order::Way;
    use super::*;
    use std::path::Path;

    fn place(directory: &Path) -> Option<StatePlace> {
        Some(StatePlace { directory: directory.to_owned(), name: "redirects".into(), space: None })
    }

    fn rows(count: u64) -> Vec<Row> {
        let row =
            |id| Row { report: ClientReport { id, way: Way::Notice, ..ClientReport::default() }, followed: Vec::new() };
        (0..count).map(row).collect()
    }

    fn spec() -> RedirectStatus {
        RedirectStatus { export: "a".into(), to: vec!["nbd://b/a".into()], ..RedirectStatus::default() }
    }

    #[tokio::test]
    async fn orders_survive_a_restart_with_their_reports() {
        let scratch = tempfile::tempdir().unwrap();
        let table = Table::open(place(scratch.path()));
        let first = table.add(spec(), rows(2)).await.unwrap();
        let second = table.add(spec(), rows(1)).await.unwrap();
        assert!(first.status().durable);
        first.row(0, |row| row.report.state = ClientState::Moved);
        table.end(&first, RedirectState::Cancelled, None).await;
        let listed: Vec<_> = table.list().iter().map(|order| order.status()).collect();
        assert_eq!(listed[0].counts, Counts { total: 2, moved: 1, stayed: 1, ..Counts::default() });
        assert_eq!(listed[0].clients[1].why.as_deref(), Some("the order was called off"));
        assert!(second.is_active() && !first.is_active());
        drop(table);
        let table = Table::open(place(scratch.path()));
        assert_eq!(table.list().iter().map(|order| order.status()).collect::<Vec<_>>(), listed);
        assert_eq!(table.add(spec(), Vec::new()).await.unwrap().id, 3, "no number is given twice");
    }

    #[tokio::test]
    async fn an_order_ends_once() {
        let table = Table::open(None);
        let order = table.add(spec(), Vec::new()).await.unwrap();
        assert!(!*order.ended().borrow());
        order.end(RedirectState::Failed, Some("no".into()), wall());
        assert_eq!(order.status().state, RedirectState::Active, "it is not written down yet");
        table.end(&order, RedirectState::Done, None).await;
        assert!(*order.ended().borrow());
        assert_eq!((order.status().state, order.status().error.as_deref()), (RedirectState::Failed, Some("no")));
    }

    #[tokio::test]
    async fn without_a_place_orders_are_taken_with_a_warning() {
        let table = Table::open(None);
        let status = table.add(spec(), Vec::new()).await.unwrap().status();
        assert!(!status.durable && status.warnings[0].contains("a restart forgets"), "{:?}", status.warnings);
    }

    #[tokio::test]
    async fn there_are_bounds() {
        let table = Table::open(None);
        let kept = table.add(spec(), Vec::new()).await.unwrap();
        for _ in 0..MOST_ENDED + 5 {
            let order = table.add(spec(), Vec::new()).await.unwrap();
            order.end(RedirectState::Done, None, wall());
            order.settle();
        }
        assert!(table.list().len() <= MOST_ENDED + 2);
        assert!(table.get(kept.id).is_some());
        let ended = crate::units::to_u64(MOST_ENDED) + 5;
        assert_eq!((table.totals().active, table.totals().done), (1, ended), "none is lost");
        for _ in 1..MOST_ACTIVE {
            table.add(spec(), Vec::new()).await.unwrap();
        }
        assert!(matches!(table.add(spec(), Vec::new()).await, Err(Refusal::Conflict(_))));
    }
}
