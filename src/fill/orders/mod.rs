//! What operators ordered to be fetched ahead of demand; durable.
//!
//! | file | holds |
//! | --- | --- |
//! | this one | [`Orders`]: the table of a server |
//! | [`order`] | [`Order`]: one order, its deadline, its state |
//! | [`form`] | the form of the file |
//!
//! The table is one file, replaced as a whole before anything that changes it is answered. It does not hold how far an
//! order has come: that is what the mirror has of its ranges, so it cannot be wrong after a crash.
//!
//! Owns: which orders there are, and how each ended. Does not own: fetching (the engine), progress (`mirror`), which
//! ranges a profile stands for.
//!
//! **Bounds.** 1000 active orders, 10,000 ranges in one, 256 ended orders remembered, 4 MiB of file: when that is full,
//! the oldest ended ones are forgotten, and then new orders are refused.

pub mod form;
pub mod order;

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, SystemTime};

use thiserror::Error;
use tokio::sync::watch;

use crate::clock;
use crate::mirror::Space;
pub use crate::ranges::merged;
use crate::telemetry::crash_point;
use crate::units::to_u64;
pub use order::{Deadline, Order, Spec, State, What};

/// The file in the directory of all caches. No image has a directory of that name: an `@` never comes first in one.
pub const NAME: &str = "@orders";
/// One that is being made.
const NEW_NAME: &str = "@orders.new";
/// One that could not be read, kept for whoever wants to look at it.
const DAMAGED_NAME: &str = "@orders.damaged";

/// Orders that may be active.
pub const MOST_ACTIVE: usize = 1000;
/// Ranges in one order.
pub const MOST_RANGES: usize = 10_000;
/// Ended orders that are remembered.
pub const MOST_ENDED: usize = 256;
/// Bytes of the file.
const MOST_BYTES: usize = 4 << 20;

/// The orders of a server. Cheap to clone; all clones are one table.
#[derive(Debug, Clone)]
pub struct Orders(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    file: File,
    table: Mutex<Table>,
    changed: watch::Sender<u64>,
    forecaster: OnceLock<Forecaster>,
}

/// All orders. Whoever changes them has the lock until the change is durable, so it is never taken on a worker.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Table {
    /// The number of the last order that there was.
    last: u64,
    orders: BTreeMap<u64, Arc<Order>>,
}

/// Why an order is not taken.
#[derive(Debug, Error)]
pub enum OrderError {
    /// Too many are active.
    #[error("{MOST_ACTIVE} orders are active: cancel one, or wait for it")]
    TooMany,
    /// It has too many ranges.
    #[error("an order can have {MOST_RANGES} ranges, and this has {0}: order larger ones")]
    TooManyRanges(usize),
    /// The file would be too long.
    #[error("the orders would take more than 4 MiB to write down: cancel some, or order fewer ranges")]
    TooLong,
    /// `--cache-size` has no room for the file.
    #[error("the cache is full up to the last byte: there is no room to write the order down")]
    NoRoom,
    /// Another process keeps its orders there.
    #[error(
        "another server uses the cache directory and keeps its orders there: give each its own --cache to order here"
    )]
    Elsewhere,
    /// It cannot be made durable.
    #[error("cannot write the orders: {0}")]
    Disk(#[from] io::Error),
}

/// When orders will be done, as whoever fetches expects it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Forecast {
    /// Bytes per second that come over for all orders together.
    pub rate: f64,
    /// Each active order.
    pub orders: Vec<Expected>,
}

/// When one order will be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expected {
    /// The order.
    pub id: u64,
    /// From now on.
    pub end: Duration,
    /// So much after its deadline, if that is missed.
    pub late_by: Option<Duration>,
}

struct Forecaster(Box<dyn Fn() -> Option<Forecast> + Send + Sync>);

impl fmt::Debug for Forecaster {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Forecaster")
    }
}

impl Orders {
    /// The orders of the server whose caches are in `directory`, which is made if it is missing. A table that cannot be
    /// read is put aside with a warning, and a new one begun. Its file counts in `space`. While another process has the
    /// table of this directory, there are no orders here. Blocks.
    pub fn open(directory: &Path, space: &Arc<Space>) -> Self {
        let lock = lock_directory(directory).inspect_err(|error| {
            tracing::warn!(%error, "another server may use this cache directory: orders to prefetch are not taken");
        });
        let (directory, space) = (directory.to_owned(), Arc::clone(space));
        let file = File { directory, space, charge: Mutex::new(0), lock: lock.ok() };
        let table = file.load();
        let inner =
            Inner { file, table: Mutex::new(table), changed: watch::Sender::new(0), forecaster: OnceLock::new() };
        Self(Arc::new(inner))
    }

    /// Takes an order. When this has returned it is durable. Blocks.
    pub fn add(&self, spec: Spec, now: SystemTime) -> Result<Arc<Order>, OrderError> {
        if spec.ranges.len() > MOST_RANGES {
            return Err(OrderError::TooManyRanges(spec.ranges.len()));
        }
        if self.0.file.lock.is_none() {
            return Err(OrderError::Elsewhere);
        }
        let mut table = self.lock();
        if table.active().count() >= MOST_ACTIVE {
            return Err(OrderError::TooMany);
        }
        let mut next = table.clone();
        next.last += 1;
        let order = Arc::new(Order::new(next.last, spec, now));
        next.orders.insert(order.id, Arc::clone(&order));
        self.0.file.replace(&mut next)?;
        *table = next;
        drop(table);
        self.tell();
        Ok(order)
    }

    /// Calls an order off. `None`: there is no such order. One that has ended stays as it is. Blocks.
    ///
    /// It is called off in any case; on an error it will be active again after a restart.
    pub fn cancel(&self, id: u64, now: SystemTime) -> Result<Option<Arc<Order>>, OrderError> {
        self.change(id, State::Cancelled, now)
    }

    /// Notes how an order has ended, unless it has ended already. An end that cannot be written down is found out again
    /// after a restart. Blocks: within a runtime use [`Self::end`].
    pub fn end_now(&self, id: u64, state: State, now: SystemTime) {
        if let Err(error) = self.change(id, state, now) {
            tracing::warn!(order = id, %error, "an order has ended, which cannot be written down");
        }
    }

    /// As [`Self::end_now`], from a worker.
    ///
    /// Cancel safety: it is noted all the same.
    pub async fn end(&self, id: u64, state: State) {
        let (this, now) = (self.clone(), clock::moment().wall);
        // A panic has been reported by the thread itself.
        let _ = tokio::task::spawn_blocking(move || this.end_now(id, state, now)).await;
    }

    fn change(&self, id: u64, state: State, now: SystemTime) -> Result<Option<Arc<Order>>, OrderError> {
        let mut table = self.lock();
        let Some(order) = table.orders.get(&id) else { return Ok(None) };
        if order.state != State::Active {
            return Ok(Some(Arc::clone(order)));
        }
        let order = Arc::new(Order { state, ended_at: Some(now), ..Order::clone(order) });
        table.orders.insert(id, Arc::clone(&order));
        let written = self.0.file.replace(&mut table);
        drop(table);
        self.tell();
        written.map(|()| Some(order))
    }

    /// Those that are to be carried out, oldest first.
    pub fn active(&self) -> Vec<Arc<Order>> {
        self.lock().active().cloned().collect()
    }

    /// All that are known, oldest first.
    pub fn list(&self) -> Vec<Arc<Order>> {
        self.lock().orders.values().cloned().collect()
    }

    /// One of them.
    pub fn get(&self, id: u64) -> Option<Arc<Order>> {
        self.lock().orders.get(&id).cloned()
    }

    /// Changes when an order comes or ends.
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.0.changed.subscribe()
    }

    /// Names who knows when orders will be done. The first one stays.
    pub fn set_forecaster(&self, forecaster: impl Fn() -> Option<Forecast> + Send + Sync + 'static) {
        // A second one would say the same.
        let _ = self.0.forecaster.set(Forecaster(Box::new(forecaster)));
    }

    /// When orders will be done; `None` while nobody knows how fast the link is.
    pub fn forecast(&self) -> Option<Forecast> {
        self.0.forecaster.get().and_then(|forecaster| (forecaster.0)())
    }

    fn tell(&self) {
        self.0.changed.send_modify(|count| *count += 1);
    }

    /// Lets another process have the table. For when nothing takes or ends orders here any more.
    pub fn release(&self) {
        if let Some(lock) = &self.0.file.lock
            && let Err(error) = rustix::fs::flock(lock, rustix::fs::FlockOperation::Unlock)
        {
            tracing::warn!(%error, "cannot give the lock of the orders back");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn active(&self) -> impl Iterator<Item = &Arc<Order>> {
        self.orders.values().filter(|order| order.state == State::Active)
    }

    /// Forgets ended orders, those first that ended first as far as their numbers say, until `most` are left.
    fn forget(&mut self, most: usize) {
        let ended: Vec<_> = self.orders.values().filter(|order| order.state != State::Active).collect();
        let ids: Vec<_> = ended.iter().take(ended.len().saturating_sub(most)).map(|order| order.id).collect();
        ids.iter().for_each(|id| drop(self.orders.remove(id)));
    }

    fn ended(&self) -> usize {
        self.orders.len() - self.active().count()
    }
}

/// The file, and what the space of the cache keeps for it: the old one and the new one, each as long as the longer.
#[derive(Debug)]
struct File {
    directory: PathBuf,
    space: Arc<Space>,
    charge: Mutex<u64>,
    /// The directory itself, locked by whoever has the table. None: that is somebody else.
    lock: Option<fs::File>,
}

fn lock_directory(directory: &Path) -> io::Result<fs::File> {
    fs::create_dir_all(directory)?;
    let opened = fs::File::open(directory)?;
    rustix::fs::flock(&opened, rustix::fs::FlockOperation::NonBlockingLockExclusive)?;
    Ok(opened)
}

impl File {
    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// What is there, or nothing.
    fn load(&self) -> Table {
        if self.lock.is_none() {
            return Table::default();
        }
        // What was being made when a process ended counts for nothing.
        let _ = fs::remove_file(self.path(NEW_NAME));
        let table = self.read();
        if let Ok(damaged) = fs::metadata(self.path(DAMAGED_NAME)) {
            self.space.take_anyway(damaged.len().next_multiple_of(4096));
        }
        table
    }

    fn read(&self) -> Table {
        let bytes = match fs::read(self.path(NAME)) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Table::default(),
            Err(error) => {
                tracing::warn!(%error, "cannot read the orders: beginning without any");
                return Table::default();
            }
        };
        let charge = cost(bytes.len());
        self.space.take_anyway(charge);
        *self.charge() = charge;
        form::decode(&bytes).unwrap_or_else(|| {
            let aside = self.path(DAMAGED_NAME);
            let kept = fs::rename(self.path(NAME), &aside)
                .map_or_else(|error| error.to_string(), |()| aside.display().to_string());
            tracing::warn!(kept, "the table of orders is damaged: beginning without any");
            Table::default()
        })
    }

    /// Replaces the file by one that holds `table`, which forgets what is too much. On an error the old one is there
    /// still. Blocks.
    fn replace(&self, table: &mut Table) -> Result<(), OrderError> {
        table.forget(MOST_ENDED);
        let mut bytes = form::encode(table);
        while bytes.len() > MOST_BYTES && table.ended() > 0 {
            table.forget(table.ended() / 2);
            bytes = form::encode(table);
        }
        if bytes.len() > MOST_BYTES {
            return Err(OrderError::TooLong);
        }
        let mut charge = self.charge();
        let (before, after) = (*charge, cost(bytes.len()));
        if after > before {
            if !self.space.take(after - before) {
                return Err(OrderError::NoRoom);
            }
            *charge = after;
        }
        self.write(&bytes)?;
        if after < before {
            self.space.give_back(before - after);
            *charge = after;
        }
        Ok(())
    }

    fn write(&self, bytes: &[u8]) -> io::Result<()> {
        let Some(directory) = &self.lock else { return Ok(()) };
        let (path, new_path) = (self.path(NAME), self.path(NEW_NAME));
        let mut options = fs::OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&new_path)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        crash_point("orders written");
        fs::rename(&new_path, &path)?;
        directory.sync_all()
    }

    fn charge(&self) -> MutexGuard<'_, u64> {
        self.charge.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Bytes of the disk that a table of this length takes while it is replaced.
fn cost(length: usize) -> u64 {
    2 * to_u64(length).next_multiple_of(4096)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mirror::SpaceSettings;
    use crate::ranges::ByteRange;
    use proptest::prelude::*;

    fn time(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn open(directory: &Path) -> Orders {
        Orders::open(directory, &Space::new(directory, SpaceSettings::default()))
    }

    fn spec(image: &str, ranges: &[(u64, u64)]) -> Spec {
        let ranges = ranges.iter().map(|(start, end)| ByteRange::between(*start, *end)).collect();
        Spec { ranges, ..Spec::all(image, 0) }
    }

    #[test]
    fn what_was_answered_is_there_after_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let orders = open(directory.path());
        let first = orders.add(spec("a", &[(0, 10), (20, 30)]), time(1)).unwrap();
        let second = orders
            .add(Spec { rate: Some(5), what: What::Profile("boot".into()), ..spec("b", &[(0, 9)]) }, time(2))
            .unwrap();
        let third = orders.add(spec("c", &[]), time(3)).unwrap();
        orders.end_now(second.id, State::Done, time(4));
        orders.end_now(third.id, State::Failed("gone".into()), time(5));
        assert_eq!((first.id, second.id, third.id, first.total_bytes()), (1, 2, 3, 20));
        let list = orders.list();
        drop(orders);
        let again = open(directory.path());
        assert_eq!(again.list(), list);
        assert_eq!(again.active(), [first]);
        assert_eq!(again.get(3).unwrap().state, State::Failed("gone".into()));
        assert_eq!(again.add(spec("d", &[]), time(6)).unwrap().id, 4, "no number is given twice");
    }

    #[test]
    fn an_order_ends_once() {
        let directory = tempfile::tempdir().unwrap();
        let orders = open(directory.path());
        let mut changed = orders.changed();
        let id = orders.add(spec("a", &[(0, 1)]), time(1)).unwrap().id;
        assert!(changed.has_changed().unwrap());
        changed.mark_unchanged();
        assert_eq!(orders.cancel(id, time(2)).unwrap().unwrap().state, State::Cancelled);
        assert!(changed.has_changed().unwrap());
        orders.end_now(id, State::Done, time(3));
        assert_eq!(orders.cancel(id, time(4)).unwrap().unwrap().ended_at, Some(time(2)));
        assert!(orders.cancel(99, time(4)).unwrap().is_none());
        assert!(orders.active().is_empty());
    }

    #[test]
    fn a_damaged_table_is_put_aside() {
        let directory = tempfile::tempdir().unwrap();
        open(directory.path()).add(spec("a", &[(0, 1)]), time(1)).unwrap();
        let path = directory.path().join(NAME);
        let mut bytes = fs::read(&path).unwrap();
        bytes[20] ^= 1;
        fs::write(&path, &bytes).unwrap();
        let orders = open(directory.path());
        assert!(orders.list().is_empty());
        assert_eq!(fs::read(directory.path().join(DAMAGED_NAME)).unwrap(), bytes);
        orders.add(spec("b", &[(0, 1)]), time(1)).unwrap();
        drop(orders);
        assert_eq!(open(directory.path()).list().len(), 1);
    }

    #[test]
    fn ended_orders_are_forgotten_and_active_ones_are_not() {
        let directory = tempfile::tempdir().unwrap();
        let orders = open(directory.path());
        let kept = orders.add(spec("kept", &[(0, 1)]), time(0)).unwrap();
        for _ in 0..MOST_ENDED + 5 {
            let id = orders.add(spec("short", &[(0, 1)]), time(1)).unwrap().id;
            orders.end_now(id, State::Done, time(2));
        }
        assert_eq!(orders.list().len(), MOST_ENDED + 1);
        assert_eq!(orders.active(), [kept]);
    }

    #[test]
    fn too_much_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let orders = open(directory.path());
        let many: Vec<_> = (0..to_u64(MOST_RANGES)).map(|number| (number << 40, (number << 40) + 1)).collect();
        let long = spec("a", &many);
        let more =
            Spec { ranges: [long.ranges.clone(), vec![ByteRange::between(1 << 60, 1 << 61)]].concat(), ..long.clone() };
        assert!(matches!(orders.add(more, time(1)), Err(OrderError::TooManyRanges(10_001))));
        let mut taken = 0;
        while orders.add(long.clone(), time(1)).is_ok() {
            taken += 1;
        }
        assert!(taken > 5, "{taken}");
        assert!(matches!(orders.add(long.clone(), time(1)), Err(OrderError::TooLong)));
        drop(orders);
        let orders = open(directory.path());
        assert_eq!(orders.active().len(), taken);
        orders.cancel(1, time(2)).unwrap();
        assert!(orders.add(long, time(3)).is_ok(), "the ended one makes room");
    }

    #[test]
    fn the_file_counts_in_the_space_of_the_cache() {
        let directory = tempfile::tempdir().unwrap();
        let settings = SpaceSettings { limit: Some(4096 + 2 * 4096), ..SpaceSettings::default() };
        let space = Space::new(directory.path(), settings);
        let orders = Orders::open(directory.path(), &space);
        orders.add(spec("a", &[(0, 1)]), time(1)).unwrap();
        assert_eq!(space.usage().used, 3 * 4096);
        let many: Vec<_> = (0..1000).map(|number| (2 * number, 2 * number + 1)).collect();
        assert!(matches!(orders.add(spec("b", &many), time(1)), Err(OrderError::NoRoom)));
        assert_eq!(orders.active().len(), 1);
        assert_eq!(space.usage().used, 3 * 4096);
    }

    #[test]
    fn two_servers_do_not_share_a_table() {
        let directory = tempfile::tempdir().unwrap();
        let first = open(directory.path());
        first.add(spec("a", &[(0, 1)]), time(1)).unwrap();
        let second = open(directory.path());
        assert!(second.list().is_empty());
        assert!(matches!(second.add(spec("b", &[(0, 1)]), time(1)), Err(OrderError::Elsewhere)));
        drop((first, second));
        assert_eq!(open(directory.path()).list().len(), 1);
    }

    #[test]
    fn the_forecast_is_that_of_whoever_fetches() {
        let directory = tempfile::tempdir().unwrap();
        let orders = open(directory.path());
        assert_eq!(orders.forecast(), None);
        let forecast = Forecast { rate: 1.0, orders: Vec::new() };
        let told = forecast.clone();
        orders.set_forecaster(move || Some(told.clone()));
        assert_eq!(orders.forecast(), Some(forecast));
    }

    proptest! {
        #[test]
        fn merged_ranges_are_the_same_bytes(ranges in prop::collection::vec((0u64..60, 0u64..20), 0..12)) {
            let ranges: Vec<_> = ranges.iter().map(|(start, length)| ByteRange::between(*start, start + length)).collect();
            let bytes = |ranges: &[ByteRange]| -> Vec<bool> {
                (0..100).map(|at| ranges.iter().any(|range| range.start() <= at && at < range.end())).collect()
            };
            let joined = merged(&ranges);
            prop_assert_eq!(bytes(&joined), bytes(&ranges));
            prop_assert!(joined.windows(2).all(|pair| pair[0].end() < pair[1].start()));
            prop_assert!(joined.iter().all(|range| !range.is_empty()));
        }
    }
}
