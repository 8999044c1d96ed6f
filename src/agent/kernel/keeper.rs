//! Connects anew what a device has lost.
//!
//! The keeper looks when the kernel says that a connection died, and once at its start, as one may have died before.
//! It cannot be told which, or how many: so it gives the kernel sockets until one is not taken. It keeps nothing in
//! memory; the record has all there is to know, and another keeper can go on from it.
//!
//! A server that fails is tried again with pauses from 100 ms to 5 s, for as long as the device is bound. The keeper ends
//! when the device is detached, by whomever, or when the record names another one.

use std::path::Path;
use std::process;
use std::time::{Duration, Instant};

use super::attach::connection;
use super::device::{Device, SYSTEM};
use super::dial;
use super::handover::{Given, give};
use super::netlink::{Listener, Netlink, News};
use super::record::{Lock, Record, peek};
use super::rules::{Strictness, check};
use super::{Error, sockets};
use crate::clock;
use crate::nbd::Uri;

const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How often it looks whether the device is still there: the kernel does not tell.
const GLANCE: Duration = Duration::from_secs(1);

/// Keeps a device until it is detached.
pub fn keep(directory: &Path, index: u32) -> Result<(), Error> {
    let mut netlink = Netlink::open()?;
    let listener = netlink.listen()?;
    let mut pause = FIRST_PAUSE;
    let mut due = Some(clock::now());
    loop {
        if due.is_some_and(|due| due <= clock::now()) {
            due = match mend(&mut netlink, directory, index)? {
                Mended::Gone => return Ok(()),
                Mended::All => {
                    pause = FIRST_PAUSE;
                    None
                }
                Mended::Not(reason) => {
                    tracing::warn!(device = index, %reason, "cannot connect anew");
                    pause = (pause * 2).min(LONGEST_PAUSE);
                    Some(clock::now() + pause)
                }
            };
        }
        if !is_mine(directory, index)? {
            return Ok(());
        }
        if was_lost(&listener, index, due)? && due.is_none() {
            due = Some(clock::now());
        }
    }
}

/// Waits for news of the device, until something is due.
fn was_lost(listener: &Listener, index: u32, due: Option<Instant>) -> Result<bool, Error> {
    let end = clock::now() + GLANCE;
    let end = due.map_or(end, |due| due.min(end));
    Ok(match listener.next(end)? {
        News::Dead(dead) => dead == index,
        News::Lost => true,
        News::Nothing => false,
    })
}

/// What came of an attempt.
enum Mended {
    /// All connections are alive.
    All,
    /// The device is not bound any more, or not ours to keep.
    Gone,
    /// Some are not, and why.
    Not(String),
}

fn is_mine(directory: &Path, index: u32) -> Result<bool, Error> {
    let Some(device) = Device::read(Path::new(SYSTEM), index)? else { return Ok(false) };
    Ok(peek(directory, index, &device).is_some_and(|record| record.keeper == Some(process::id())))
}

/// The record, while the device is bound and this process is its keeper. A record whose device is gone is removed.
fn mine(lock: &Lock, index: u32) -> Result<Option<Record>, Error> {
    let Some(device) = Device::read(Path::new(SYSTEM), index)? else {
        lock.remove()?;
        return Ok(None);
    };
    Ok(lock.load(&device)?.filter(|record| record.keeper == Some(process::id())))
}

/// Connects what is dead, to the first server of the record that works.
fn mend(netlink: &mut Netlink, directory: &Path, index: u32) -> Result<Mended, Error> {
    let lock = match Lock::take(directory, index) {
        Ok(lock) => lock,
        // Whoever has it for so long is at work on it.
        Err(error) => return Ok(Mended::Not(error.to_string())),
    };
    let Some(mut record) = mine(&lock, index)? else { return Ok(Mended::Gone) };
    let mut trouble = "the record has no server".to_owned();
    for uri in record.servers() {
        match replace_dead(netlink, index, &lock, &mut record, &uri) {
            Ok(replaced) => {
                if replaced > 0 {
                    tracing::info!(device = index, server = %uri, connections = replaced, "connected anew");
                }
                if record.trouble.take().is_some() {
                    lock.save(&record)?;
                }
                return Ok(Mended::All);
            }
            // It was detached meanwhile: a device that is not bound cannot be changed.
            Err(Error::Kernel { .. }) if Device::read(Path::new(SYSTEM), index)?.is_none() => return Ok(Mended::Gone),
            Err(error) => trouble = error.to_string(),
        }
    }
    if record.trouble.as_ref() != Some(&trouble) {
        record.trouble = Some(trouble.clone());
        lock.save(&record)?;
    }
    Ok(Mended::Not(trouble))
}

/// Gives the kernel sockets to this server until nothing is dead. Says how many it took.
pub(super) fn replace_dead(
    netlink: &mut Netlink,
    index: u32,
    lock: &Lock,
    record: &mut Record,
    uri: &Uri,
) -> Result<u64, Error> {
    let failed = |source| Error::Server { uri: Box::new(uri.clone()), source };
    let offer = dial::look(uri).map_err(failed)?;
    let strictness = if record.forced { Strictness::Forced } else { Strictness::Again };
    let fit = check(&record.wanted(), &offer, strictness);
    fit.map_err(|reason| Error::Unfit { uri: Box::new(uri.clone()), reason })?;
    // One more than there are, as the last one is not taken.
    for replaced in 0..=crate::units::to_u64(record.connections.len()) {
        let opened = dial::open(uri, &offer).map_err(failed)?;
        let new = connection(uri, &opened);
        match give(netlink, index, record, opened)? {
            Given::NoneDead(_) => return Ok(replaced),
            Given::Taken => {
                record.reconnected += 1;
                note(record, new)?;
                lock.save(record)?;
            }
        }
    }
    Ok(crate::units::to_u64(record.connections.len()))
}

/// Notes a connection in the record, in place of one that is gone.
pub(super) fn note(record: &mut Record, new: super::record::Connection) -> Result<(), Error> {
    let mut gone = None;
    for (position, old) in record.connections.iter().enumerate() {
        if !sockets::is_there(old.inode).map_err(Error::system("/proc/net"))? {
            gone = Some(position);
            break;
        }
    }
    match gone {
        Some(position) => record.connections[position] = new,
        None => record.connections.push(new),
    }
    Ok(())
}
