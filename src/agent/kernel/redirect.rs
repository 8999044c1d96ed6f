//! Moving a device to another server: its connections, one after the other, while it is read.
//!
//! For each: a connection to the new server is negotiated; the old one ends; the kernel is given the new one. Whoever
//! reads meanwhile is served by the other connections. The old one ends by one of these ways, tried in this order:
//!
//! | way | how | requests under way |
//! | --- | --- | --- |
//! | drained | a server of ours is asked to close it when all is answered | none is lost, but what was sent at that very moment |
//! | cut | a TCP connection is ended from this side, as `ss -K` does | asked again after the time-out |
//! | dead | it was dead before | as above |
//!
//! So that what was lost is asked again soon, the time-out is shortened to [`SHORT`] while an old connection ends, and
//! is what it was when the new one is there. That is for requests that are sent from then on: before a connection is
//! cut, those that were sent earlier are given [`CALM`] to be answered.
//!
//! A device that another program attached by netlink is moved as well. Its connections are found among those TCP
//! connections that no process has; if it is not sure which they are, nothing is touched.
//!
//! When the new server fails on the way, the connections that are not moved yet stay, and the one that was ended is
//! given to whichever server works, the new one or the old ones.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use super::Error;
use super::attach::connection;
use super::device::{self, Device, SYSTEM, in_flight};
use super::dial::{self, Offer, Opened};
use super::handover::{Given, give, ordinary};
use super::keeper::{note, replace_dead};
use super::messages::{Change, Request};
use super::netlink::{Listener, Netlink, destroy};
use super::record::{self, Connection, Lock, Record};
use super::rules::{Strictness, check};
use super::sockets::{self, Tcp};
use crate::clock;
use crate::nbd::Uri;
use crate::nbd::wire::TransmissionFlags;

/// The time-out of requests while an old connection ends.
const SHORT: Duration = Duration::from_secs(2);
/// What is sent before the time-out is short has this long to be answered.
const CALM: Duration = Duration::from_millis(300);
/// How long a server may take to close a connection that it was asked to close.
const CLOSING: Duration = Duration::from_secs(5);
const GLANCE: Duration = Duration::from_millis(1);
/// Connections that are moved beyond those that were there: replacements that die at once are no reason to go on for ever.
const SPARE: usize = 8;
/// How long readers of a device that another program attached wait for a server. The kernel does not tell what it was.
const DEAD_TIMEOUT: Duration = Duration::from_secs(120);

/// What is ordered.
#[derive(Debug, Clone)]
pub struct Order {
    /// The device.
    pub index: u32,
    /// Where to: the first that may take it.
    pub to: Vec<Uri>,
    /// The server that it is at, if another program attached it.
    pub from: Option<Uri>,
    /// What cannot be known is believed.
    pub force: bool,
}

/// What came of a device.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Report {
    /// The device.
    pub device: String,
    /// Where it was.
    pub from: Vec<String>,
    /// Where it is now, as far as it was moved.
    pub to: String,
    /// In all.
    pub outcome: Outcome,
    /// Its connections, in the order in which they were moved.
    pub connections: Vec<Moved>,
    /// What the operator should know.
    pub notes: Vec<String>,
}

/// What came of it in all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// All connections were moved.
    Moved,
    /// Some were, and the device is served.
    Partly,
    /// None was, and the device is served as before.
    Stayed,
}

/// What came of one connection.
#[derive(Debug, Clone, serde::Serialize)]
pub struct Moved {
    /// Where it was, as far as that is known.
    pub from: String,
    /// Where it is now; `None` if it is where it was.
    pub to: Option<String>,
    /// How the old connection ended: `drained`, `cut`, `dead`; empty if it did not.
    pub way: &'static str,
    /// Milliseconds without this connection.
    pub pause_ms: f64,
    /// Why it was not moved.
    pub error: Option<String>,
}

/// A connection that is to end.
#[derive(Debug, Clone)]
enum Old {
    /// We opened it.
    Known(Connection),
    /// Another program did.
    Foreign(Tcp),
}

impl Old {
    const fn inode(&self) -> u64 {
        match self {
            Self::Known(connection) => connection.inode,
            Self::Foreign(socket) => socket.inode,
        }
    }

    fn server(&self) -> String {
        match self {
            Self::Known(connection) => connection.uri.clone(),
            Self::Foreign(socket) => socket.remote.to_string(),
        }
    }
}

/// What came of an attempt at one connection.
#[derive(Debug)]
enum Exchanged {
    /// The kernel has a new one.
    Done,
    /// There is no old one any more.
    NoneLeft,
    /// The old one has ended, when it did, and why there is no new one.
    Lost(Instant, Error),
}

/// All that a move needs.
#[derive(Debug)]
struct Mover<'a> {
    netlink: Netlink,
    listener: Listener,
    lock: Lock,
    index: u32,
    record: Record,
    to: &'a Uri,
    offer: Offer,
    force: bool,
}

/// Moves a device.
pub fn redirect(directory: &Path, order: &Order) -> Result<Report, Error> {
    let index = order.index;
    let mut netlink = Netlink::open()?;
    let lock = Lock::take(directory, index)?;
    let device = Device::read(Path::new(SYSTEM), index)?.ok_or(Error::NotAttached(index))?;
    check_that_it_can_be_changed(&mut netlink, index, &device)?;
    let known = lock.load(&device)?;
    let mut notes = Vec::new();
    let (record, old) = match known {
        Some(record) => {
            let old = record.connections.iter().cloned().map(Old::Known).collect();
            (record, old)
        }
        None => adopt(directory, &mut netlink, order, &device, &mut notes)?,
    };
    let (to, offer) = first_that_fits(&record, order)?;
    let listener = netlink.listen()?;
    if old.len().max(device.connections) < 2 {
        notes.push("it has one connection: readers waited while that was changed".into());
    }
    let mover = Mover { netlink, listener, lock, index, record, to, offer, force: order.force };
    mover.flush();
    mover.run(old, notes)
}

fn first_that_fits<'a>(record: &Record, order: &'a Order) -> Result<(&'a Uri, Offer), Error> {
    let strictness = if order.force { Strictness::Forced } else { Strictness::Sure };
    let mut failure = None;
    for uri in &order.to {
        match dial::look(uri) {
            Ok(offer) => match check(&record.wanted(), &offer, strictness) {
                Ok(()) => return Ok((uri, offer)),
                // Another image is a mistake in the order, and no reason to look at the next.
                Err(reason) => return Err(Error::Unfit { uri: Box::new(uri.clone()), reason }),
            },
            Err(source) => failure = Some(Error::Server { uri: Box::new(uri.clone()), source }),
        }
    }
    Err(failure.unwrap_or(Error::Answer("there is no server to go to")))
}

/// What is to be known of a device that another program attached.
fn adopt(
    directory: &Path,
    netlink: &mut Netlink,
    order: &Order,
    device: &Device,
    notes: &mut Vec<String>,
) -> Result<(Record, Vec<Old>), Error> {
    let immovable = |reason: String| Error::Immovable { index: order.index, reason };
    let failed = || Error::system("/proc");
    let known = record::known_inodes(directory).map_err(failed())?;
    let mut candidates = sockets::of_kernel().map_err(failed())?;
    candidates.retain(|socket| !known.contains(&socket.inode));
    let others = foreign_devices(netlink, directory, order.index)?;
    let from = order.from.as_ref().map(dial::addresses).transpose().map_err(failed())?;
    let count = if device.connections < device::possible_processors().map_err(failed())? {
        Count::Exactly(device.connections)
    } else {
        Count::AtLeast(device.connections)
    };
    let found = choose(candidates, count, from.as_deref(), others, dial::is_nbd_server);
    let found = found.map_err(|reason| immovable(reason.into()))?;
    let mut record = Record::of(order.index, device);
    record.dead_timeout_seconds = DEAD_TIMEOUT.as_secs();
    record.uris = order.from.iter().map(Uri::to_string).collect();
    notes.push(format!(
        "another program attached it: requests wait {} s for a server from now on, if none is connected",
        record.dead_timeout_seconds
    ));
    Ok((record, found.into_iter().map(Old::Foreign).collect()))
}

/// Devices other than this one that are bound and not known to us.
fn foreign_devices(netlink: &mut Netlink, directory: &Path, index: u32) -> Result<usize, Error> {
    let mut count = 0;
    for (other, _) in netlink.status(None)?.into_iter().filter(|(other, is_bound)| *is_bound && *other != index) {
        let Some(device) = Device::read(Path::new(SYSTEM), other)? else { continue };
        count += usize::from(record::peek(directory, other, &device).is_none());
    }
    Ok(count)
}

/// How many connections a device has. The system shows its queues: one for each, but not more than it has processors.
#[derive(Debug, Clone, Copy)]
enum Count {
    Exactly(usize),
    AtLeast(usize),
}

impl Count {
    const fn allows(self, number: usize) -> bool {
        match self {
            Self::Exactly(count) => number == count,
            Self::AtLeast(count) => number >= count,
        }
    }

    /// Whether some of them may have died.
    const fn allows_with_dead(self, number: usize) -> bool {
        match self {
            Self::Exactly(count) => number <= count,
            Self::AtLeast(_) => true,
        }
    }
}

/// Which of the kernel's TCP connections are those of a device with so many of them. `from`: the addresses of its server,
/// if the operator said which it is. `others`: how many other devices they could belong to.
fn choose(
    mut candidates: Vec<Tcp>,
    count: Count,
    from: Option<&[std::net::SocketAddr]>,
    others: usize,
    is_nbd_server: impl Fn(std::net::SocketAddr) -> bool,
) -> Result<Vec<Tcp>, &'static str> {
    const NONE: &str = "another program attached it, and none of the kernel's TCP connections can be its own: those on \
                        unix sockets cannot be ended from outside (detach it, and attach it with headwater attach)";
    const SEVERAL: &str = "another program attached it, and it is not certain which of the kernel's TCP connections are \
                           its own (--from tells the server that it is at; if other devices are at that server too, \
                           nothing can tell them apart)";
    if others > 0 && from.is_none() {
        return Err(SEVERAL);
    }
    if let Some(addresses) = from {
        candidates.retain(|socket| addresses.contains(&socket.remote));
    }
    let mut remotes: Vec<_> = candidates.iter().map(|socket| socket.remote).collect();
    remotes.sort_unstable();
    remotes.dedup();
    let of = |remote| candidates.iter().filter(move |socket| socket.remote == remote).count();
    // The kernel has connections of other kinds too: of file systems, of other block devices.
    remotes.retain(|remote| from.is_some() || (count.allows(of(*remote)) && is_nbd_server(*remote)));
    match remotes[..] {
        [] => Err(NONE),
        [remote] if (others == 0 || count.allows(of(remote))) && count.allows_with_dead(of(remote)) => {
            candidates.retain(|socket| socket.remote == remote);
            Ok(candidates)
        }
        _ => Err(SEVERAL),
    }
}

/// Sets the time-out that it has. What was attached by ioctl refuses that.
fn check_that_it_can_be_changed(netlink: &mut Netlink, index: u32, device: &Device) -> Result<(), Error> {
    const BY_IOCTL: &str = "it was attached by ioctl (nbd-client -nonetlink, or an old one), and the kernel binds it to \
                            the process that did that";
    let timeout = Some(device.timeout.as_secs().max(1));
    let change = Change { timeout, backend: device.backend.clone(), ..Change::default() };
    match netlink.ask(&Request::Reconfigure { index, change }) {
        Err(Error::Kernel { source, .. }) if source.raw_os_error() == Some(libc::EINVAL) => {
            Err(Error::Immovable { index, reason: BY_IOCTL.into() })
        }
        result => result.map(drop),
    }
}

impl Mover<'_> {
    /// What was written before the move is at the old server's storage.
    fn flush(&self) {
        if TransmissionFlags::from_bits_truncate(self.record.flags).contains(TransmissionFlags::READ_ONLY) {
            return;
        }
        // An error shows where it belongs: at whoever wrote.
        let _ = std::fs::File::open(format!("/dev/nbd{}", self.index)).and_then(|device| device.sync_all());
    }

    fn run(mut self, mut left: Vec<Old>, mut notes: Vec<String>) -> Result<Report, Error> {
        let from = self.record.uris.clone();
        // Whoever keeps the device after a crash in the middle goes on with the new server.
        self.record.uris = std::iter::once(self.to.to_string()).chain(from.iter().cloned()).collect();
        self.record.uris.dedup();
        let was_forced = self.record.forced;
        self.record.forced |= self.force;
        let mut moved: Vec<Moved> = Vec::new();
        for _ in 0..left.len() + SPARE {
            let Some(one) = self.move_one(&mut left) else { break };
            let goes_on = one.to.is_some();
            moved.push(one);
            if !goes_on {
                break;
            }
        }
        let done = moved.iter().filter(|one| one.to.is_some()).count();
        let count = moved.len();
        if done == count {
            self.record.uris = vec![self.to.to_string()];
            self.record.forced &= self.offer.identity.is_none();
            self.record.identity = self.record.identity.take().or_else(|| self.offer.identity.map(|id| id.to_string()));
        } else if done == 0 {
            self.record.uris.clone_from(&from);
            self.record.forced = was_forced;
        }
        // A failure to set them back is told, and is no failure of the move.
        let change = ordinary(&self.record);
        if let Err(error) = self.netlink.ask(&Request::Reconfigure { index: self.index, change }) {
            notes.push(format!("the time-outs could not be set back: {error}"));
        }
        if done > 0 || self.record.keeper.is_some() {
            self.lock.save(&self.record)?;
        }
        let outcome = match done {
            0 => Outcome::Stayed,
            done if done == count => Outcome::Moved,
            _ => Outcome::Partly,
        };
        let device = self.record.device.clone();
        Ok(Report { device, from, to: self.to.to_string(), outcome, connections: moved, notes })
    }

    /// Moves one connection; `None` if there is none left. One without `to` ends the move.
    fn move_one(&mut self, left: &mut Vec<Old>) -> Option<Moved> {
        let mut moved = Moved { from: String::new(), to: None, way: "", pause_ms: 0.0, error: None };
        let began = match self.exchange(left, &mut moved) {
            Ok(Exchanged::NoneLeft) => return None,
            Ok(Exchanged::Done) => return Some(moved),
            Ok(Exchanged::Lost(began, error)) => {
                moved.error = Some(error.to_string());
                began
            }
            Err(error) => {
                moved.error = Some(error.to_string());
                return Some(moved);
            }
        };
        // It has ended, and the new server does not take its place: anyone who can shall.
        for uri in self.record.servers() {
            match replace_dead(&mut self.netlink, self.index, &self.lock, &mut self.record, &uri) {
                Ok(_) => {
                    moved.to = Some(uri.to_string()).filter(|uri| *uri == self.to.to_string());
                    break;
                }
                Err(error) => moved.error = Some(error.to_string()),
            }
        }
        moved.pause_ms = milliseconds(clock::now().saturating_duration_since(began));
        Some(moved)
    }

    /// Ends an old connection and gives the kernel a new one; or, if one was dead already, gives it a new one only.
    fn exchange(&mut self, left: &mut Vec<Old>, moved: &mut Moved) -> Result<Exchanged, Error> {
        let failed = |source| Error::Server { uri: Box::new(self.to.clone()), source };
        let opened = dial::open(self.to, &self.offer).map_err(failed)?;
        let new = connection(self.to, &opened);
        let opened = match give(&mut self.netlink, self.index, &self.record, opened)? {
            Given::Taken => {
                self.taken(new, moved)?;
                moved.way = "dead";
                return Ok(Exchanged::Done);
            }
            Given::NoneDead(opened) => opened,
        };
        let Some(old) = next_alive(left)? else { return Ok(Exchanged::NoneLeft) };
        moved.from = old.server();
        let began = match self.end(&old) {
            Ok((way, began)) => {
                moved.way = way;
                began
            }
            Err(error) => {
                self.calm_down();
                return Err(error);
            }
        };
        let given = self.give_until_taken(opened, &new);
        moved.pause_ms = milliseconds(clock::now().saturating_duration_since(began));
        match given {
            Ok(()) => {
                self.taken(new, moved)?;
                Ok(Exchanged::Done)
            }
            Err(error) => Ok(Exchanged::Lost(began, error)),
        }
    }

    fn taken(&mut self, new: Connection, moved: &mut Moved) -> Result<(), Error> {
        moved.to = Some(new.uri.clone());
        note(&mut self.record, new)?;
        self.lock.save(&self.record)
    }

    fn give_until_taken(&mut self, opened: Opened, new: &Connection) -> Result<(), Error> {
        match give(&mut self.netlink, self.index, &self.record, opened)? {
            Given::Taken => Ok(()),
            Given::NoneDead(_) => Err(Error::Immovable {
                index: self.index,
                reason: format!("the kernel says that a connection died, and does not take the one to {}", new.uri),
            }),
        }
    }

    /// Ends an old connection, so that the kernel knows that it is dead. Says how, and since when it is of no use.
    fn end(&mut self, old: &Old) -> Result<(&'static str, Instant), Error> {
        self.listener.clear();
        self.hurry()?;
        let mut reason = "its server is none of ours".to_owned();
        if let Old::Known(Connection { uri, token: Some(token), .. }) = old {
            let asked = uri.parse::<Uri>().map_err(|error| error.to_string());
            match asked.and_then(|uri| dial::ask_to_close(&uri, token).map_err(|error| error.to_string())) {
                Ok(()) if self.listener.wait_for(self.index, clock::now() + CLOSING)? => {
                    return Ok(("drained", clock::now()));
                }
                Ok(()) => reason = "its server does not close it".into(),
                Err(error) => reason = error,
            }
        }
        self.cut(old, &reason)
    }

    fn cut(&self, old: &Old, reason: &str) -> Result<(&'static str, Instant), Error> {
        let sockets = sockets::established().map_err(Error::system("/proc/net"))?;
        let Some(socket) = sockets.into_iter().find(|socket| socket.inode == old.inode()) else {
            if !sockets::is_there(old.inode()).map_err(Error::system("/proc/net"))? {
                return Ok(("dead", clock::now()));
            }
            return Err(Error::WouldNotEnd(format!("{reason}, and a unix socket cannot be ended from outside")));
        };
        self.wait_for_calm();
        let began = clock::now();
        match destroy(socket.local, socket.remote) {
            Err(error) if error.raw_os_error() != Some(libc::ENOENT) => {
                return Err(Error::WouldNotEnd(format!(
                    "{reason}, and this kernel cannot end it from this side: {error}"
                )));
            }
            _ => {}
        }
        if self.listener.wait_for(self.index, clock::now() + CLOSING)? {
            Ok(("cut", began))
        } else {
            Err(Error::WouldNotEnd(format!("{reason}; it was ended from this side, and belonged to another device")))
        }
    }

    /// Has the kernel ask again soon what is lost with a connection.
    fn hurry(&mut self) -> Result<(), Error> {
        let timeout = self.record.timeout_seconds.min(SHORT.as_secs());
        let change = Change { timeout: Some(timeout), ..ordinary(&self.record) };
        self.netlink.ask(&Request::Reconfigure { index: self.index, change }).map(drop)
    }

    fn calm_down(&mut self) {
        let change = ordinary(&self.record);
        // It is tried again at the end, and told if that fails.
        let _ = self.netlink.ask(&Request::Reconfigure { index: self.index, change });
    }

    /// Waits for a moment without requests under way. Where there is none, those that were sent before the time-out
    /// was short have had their time.
    fn wait_for_calm(&self) {
        let end = clock::now() + CALM;
        while clock::now() < end && in_flight(Path::new(SYSTEM), self.index).is_ok_and(|requests| requests > 0) {
            thread::sleep(GLANCE);
        }
    }
}

/// The next of the old connections that is alive.
fn next_alive(left: &mut Vec<Old>) -> Result<Option<Old>, Error> {
    while !left.is_empty() {
        let old = left.remove(0);
        if sockets::is_there(old.inode()).map_err(Error::system("/proc/net"))? {
            return Ok(Some(old));
        }
    }
    Ok(None)
}

fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e5).round() / 100.0
}

#[cfg(test)]
mod tests {
    use super::Count::{AtLeast, Exactly};
    use super::*;
    use std::net::SocketAddr;

    fn sockets(remotes: &[&str]) -> Vec<Tcp> {
        let local = "10.0.0.1:4000".parse().unwrap();
        let sockets =
            remotes.iter().zip(1..).map(|(remote, inode)| Tcp { local, remote: remote.parse().unwrap(), inode });
        sockets.collect()
    }

    fn inodes(found: Result<Vec<Tcp>, &str>) -> Option<Vec<u64>> {
        found.ok().map(|found| found.iter().map(|socket| socket.inode).collect())
    }

    const NFS: &str = "10.0.0.9:2049";

    fn is_nbd(address: SocketAddr) -> bool {
        address.port() == 10809
    }

    #[test]
    fn the_connections_of_a_foreign_device_are_those_of_one_nbd_server() {
        let mixed = sockets(&[NFS, "10.0.0.2:10809", NFS, "10.0.0.2:10809"]);
        assert_eq!(inodes(choose(mixed.clone(), Exactly(2), None, 0, is_nbd)), Some(vec![2, 4]));
        assert!(choose(mixed.clone(), Exactly(4), None, 0, is_nbd).is_err(), "it has another number of them");
        assert!(choose(mixed, AtLeast(1), None, 1, is_nbd).is_err(), "they may be those of another device");
        assert!(choose(sockets(&[NFS]), AtLeast(1), None, 0, is_nbd).is_err());
        assert!(choose(Vec::new(), Exactly(1), None, 0, is_nbd).unwrap_err().contains("unix"));
    }

    #[test]
    fn where_it_is_not_certain_the_operator_has_to_say() {
        let two = sockets(&["10.0.0.2:10809", "10.0.0.3:10809"]);
        assert!(choose(two.clone(), AtLeast(1), None, 0, is_nbd).is_err());
        let from: [SocketAddr; 1] = ["10.0.0.3:10809".parse().unwrap()];
        assert_eq!(inodes(choose(two, Exactly(1), Some(&from), 1, is_nbd)), Some(vec![2]));
        // A connection is dead already.
        let one = sockets(&["10.0.0.3:10809", NFS]);
        assert_eq!(inodes(choose(one, Exactly(2), Some(&from), 0, is_nbd)), Some(vec![1]));
        let both = sockets(&["10.0.0.3:10809", "10.0.0.3:10809"]);
        assert!(choose(both, Exactly(1), Some(&from), 1, is_nbd).is_err(), "two devices are at this server");
    }
}
