//! The service manager keeps the connections while there is no process: its fd store (`systemd.service(5)`,
//! FileDescriptorStoreMax=).
//!
//! The one that ends stores what it leaves behind, and the next one of the unit finds it among its sockets. So a plain
//! restart loses no client. If there is no next one, the manager closes all of it.
//!
//! Owns: storing and finding it. Does not own: sockets that the manager itself has opened (`net::link::inherited` has
//! both).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use sd_notify::NotifyState;
use thiserror::Error;

use super::{Belongings, Estate, EstateError};
use crate::net::link::MOST_DESCRIPTORS;

/// What the manager calls what we store.
const NAME: &str = "headwater";
/// How long the manager may take to have stored everything.
const PATIENCE: Duration = Duration::from_secs(5);

/// Why what is left behind cannot be stored.
#[derive(Debug, Error)]
pub enum StoreError {
    /// The account cannot be written.
    #[error(transparent)]
    Estate(#[from] EstateError),
    /// The manager cannot be told.
    #[error("the service manager does not take the connections")]
    Manager(#[from] io::Error),
    /// There is no room.
    #[error("the service manager keeps {room} descriptors for this unit, and there are {wanted}")]
    NoRoom {
        /// FileDescriptorStoreMax=.
        room: usize,
        /// Connections, and one for the account.
        wanted: usize,
    },
}

/// For how many descriptors the manager has room; 0 if it keeps none. It says so (`$FDSTORE`) from systemd 254 on; in our
/// units it is said for older ones.
pub fn room() -> usize {
    let has_manager = std::env::var_os("NOTIFY_SOCKET").is_some();
    let room = std::env::var("FDSTORE").ok().and_then(|room| room.parse().ok());
    if has_manager { room.unwrap_or(0) } else { 0 }
}

fn notify(state: &[NotifyState<'_>], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    sd_notify::notify_with_fds(state, descriptors)
}

/// Has the manager keep what is left behind. Blocks until it has it.
pub fn store(belongings: &Belongings) -> Result<(), StoreError> {
    let account = belongings.estate().write()?;
    let mut all = vec![account.as_fd()];
    all.extend(belongings.sockets(false));
    if all.len() > room() {
        return Err(StoreError::NoRoom { room: room(), wanted: all.len() });
    }
    // What a process before this one has stored and nobody has taken is of no use any more.
    notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(NAME)], &[])?;
    for some in all.chunks(MOST_DESCRIPTORS) {
        notify(&[NotifyState::FdStore, NotifyState::FdName(NAME)], some)?;
    }
    barrier()?;
    Ok(())
}

/// Waits until the manager has read all that was sent to it (`sd_notify_barrier(3)`): what comes from a process that has
/// ended may not be taken for its unit's.
fn barrier() -> io::Result<()> {
    let (ours, theirs) = io::pipe()?;
    notify(&[NotifyState::Custom("BARRIER=1")], &[theirs.as_fd()])?;
    drop(theirs);
    let limit = Timespec { tv_sec: i64::try_from(PATIENCE.as_secs()).unwrap_or(5), tv_nsec: 0 };
    match poll(&mut [PollFd::new(&ours, PollFlags::empty())], Some(&limit))? {
        0 => Err(io::ErrorKind::TimedOut.into()),
        _ => Ok(()),
    }
}

/// What a process before this one has left with the manager, among the sockets that this one was given; the others come
/// back.
pub fn find(given: Vec<(String, OwnedFd)>) -> (Option<Result<Belongings, EstateError>>, Vec<OwnedFd>) {
    let (stored, others): (Vec<_>, Vec<_>) = given.into_iter().partition(|(name, _)| name == NAME);
    let others = others.into_iter().map(|(_, socket)| socket).collect();
    let (accounts, sockets): (Vec<_>, Vec<_>) =
        stored.into_iter().map(|(_, descriptor)| descriptor).partition(|descriptor| !is_socket(descriptor));
    // The last one stored, if an earlier one could not be removed.
    let account = accounts.into_iter().next_back();
    (account.map(|account| Ok(Belongings::from_parts(Estate::read(account)?, sockets))), others)
}

/// Has the manager forget what it has kept: this process has all of it. Else a connection would stay open after both
/// sides have closed it.
pub fn forget() {
    if room() > 0
        && let Err(error) = notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(NAME)], &[])
    {
        tracing::warn!(%error, "the service manager cannot be told to forget the connections: they may not close");
    }
}

fn is_socket(descriptor: &OwnedFd) -> bool {
    rustix::fs::fstat(descriptor)
        .is_ok_and(|found| rustix::fs::FileType::from_raw_mode(found.st_mode) == rustix::fs::FileType::Socket)
}
