//! Attaching and detaching.

use std::fs::OpenOptions;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::thread;
use std::time::Duration;

use super::device::{Device, SYSTEM};
use super::dial::{self, Offer, Opened};
use super::messages::{Change, Request};
use super::netlink::Netlink;
use super::record::{Connection, Lock, Record};
use super::rules::{USED, Unfit};
use super::{DialError, Error};
use crate::clock;
use crate::nbd::Uri;
use crate::nbd::wire::TransmissionFlags;

/// The smallest and the largest logical block that every kernel takes: a sector, and a page.
const BLOCKS: std::ops::RangeInclusive<u32> = 512..=4096;
/// Devices that are tried when any will do.
const MOST_DEVICES: u32 = 256;
/// How long a device may take to have its size, and to be gone.
const SETTLING: Duration = Duration::from_secs(10);
const GLANCE: Duration = Duration::from_millis(5);

/// What is to be attached.
#[derive(Debug, Clone)]
pub struct Wishes {
    /// Where the image is; with several, the next is used when one fails.
    pub uris: Vec<Uri>,
    /// The device; `None` for the first that is free.
    pub index: Option<u32>,
    /// Connections.
    pub connections: usize,
    /// After this a request is sent again; whole seconds, at least one.
    pub timeout: Duration,
    /// So long requests wait while no connection is alive; whole seconds, at least one.
    pub dead_timeout: Duration,
    /// Nobody writes.
    pub read_only: bool,
}

/// A device that was attached.
#[derive(Debug, Clone)]
pub struct Attached {
    /// Its number.
    pub index: u32,
    /// What is remembered of it.
    pub record: Record,
    /// What the operator should know.
    pub notes: Vec<String>,
}

/// Attaches an image to a device. When this returns the device has its size and its partitions.
pub fn attach(directory: &Path, wishes: &Wishes) -> Result<Attached, Error> {
    let mut netlink = Netlink::open()?;
    let (uri, offer, opened) = first_that_works(wishes)?;
    let mut notes = Vec::new();
    if opened.len() < wishes.connections {
        notes.push(format!(
            "{uri} does not say that its connections see one view (multi-conn): there is one connection, and while it \
             is changed readers wait"
        ));
    }
    if !offer.size.is_multiple_of(512) {
        notes.push(format!("the last {} bytes make no whole sector and cannot be reached", offer.size % 512));
    }
    let (index, lock) = bind(&mut netlink, directory, wishes, &offer, &opened)?;
    let device = settle(index, offer.size / 512 * 512)?;
    let connections = opened.into_iter().map(|one| connection(&uri, &one)).collect();
    // The one that works comes first: whoever connects anew begins with it.
    let mut uris = vec![uri.to_string()];
    uris.extend(wishes.uris.iter().filter(|other| **other != uri).map(Uri::to_string));
    let record = Record {
        uris,
        // As the server has it: another one must have the same, to the byte.
        size: offer.size,
        flags: flags(wishes, &offer).bits(),
        identity: offer.identity.map(|identity| identity.to_string()),
        timeout_seconds: seconds(wishes.timeout),
        dead_timeout_seconds: seconds(wishes.dead_timeout),
        connections,
        ..Record::of(index, &device)
    };
    lock.save(&record)?;
    Ok(Attached { index, record, notes })
}

/// Gives a device back. Refused while a file system or another device is upon it.
pub fn detach(directory: &Path, index: u32) -> Result<(), Error> {
    let mut netlink = Netlink::open()?;
    let lock = Lock::take(directory, index)?;
    if Device::read(Path::new(SYSTEM), index)?.is_none() {
        lock.remove()?;
        return Err(Error::NotAttached(index));
    }
    let path = format!("/dev/nbd{index}");
    // Without O_CREAT this means: unless somebody else in this system claims it (open(2)).
    let exclusive = OpenOptions::new().read(true).custom_flags(libc::O_EXCL | libc::O_NONBLOCK).open(&path);
    match exclusive {
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => return Err(Error::Busy(index)),
        // Open, it would keep the kernel from letting go. If nothing can be read from it, all the more reason.
        other => drop(other),
    }
    netlink.ask(&Request::Disconnect { index })?;
    lock.remove()?;
    let end = clock::now() + SETTLING;
    while Device::read(Path::new(SYSTEM), index)?.is_some() {
        if clock::now() > end {
            // Somebody has it open; the kernel lets go of it when that ends.
            return Err(Error::InUse(index));
        }
        thread::sleep(GLANCE);
    }
    Ok(())
}

pub(super) fn connection(uri: &Uri, opened: &Opened) -> Connection {
    Connection { uri: uri.to_string(), token: opened.token.clone(), inode: opened.inode }
}

fn seconds(duration: Duration) -> u64 {
    duration.as_secs().max(1)
}

fn first_that_works(wishes: &Wishes) -> Result<(Uri, Offer, Vec<Opened>), Error> {
    let mut failure = None;
    for uri in &wishes.uris {
        let failed = |source| Error::Server { uri: Box::new(uri.clone()), source };
        match open_all(uri, wishes.connections) {
            Ok((offer, opened)) => match block_size(&offer) {
                Ok(_) => return Ok((uri.clone(), offer, opened)),
                Err(reason) => failure = Some(Error::Unfit { uri: Box::new(uri.clone()), reason }),
            },
            Err(source) => failure = Some(failed(source)),
        }
    }
    Err(failure.unwrap_or(Error::Answer("there is no server to attach")))
}

fn open_all(uri: &Uri, connections: usize) -> Result<(Offer, Vec<Opened>), DialError> {
    let offer = dial::look(uri)?;
    let is_shared = offer.flags.contains(TransmissionFlags::CAN_MULTI_CONN);
    let count = if is_shared { connections } else { 1 };
    let opened: Result<Vec<_>, _> = (0..count).map(|_| dial::open(uri, &offer)).collect();
    Ok((offer, opened?))
}

/// The smallest that the server takes: a sector, as a rule. With larger ones partitions and file systems that were made
/// with sectors would not be found.
fn block_size(offer: &Offer) -> Result<u32, Unfit> {
    let smallest = offer.block_sizes.minimum.max(*BLOCKS.start());
    if smallest > *BLOCKS.end() {
        return Err(Unfit::BlockSize { here: u64::from(*BLOCKS.end()), there: smallest });
    }
    Ok(smallest)
}

/// What the kernel is told that the server can do.
fn flags(wishes: &Wishes, offer: &Offer) -> TransmissionFlags {
    let mut flags = TransmissionFlags::HAS_FLAGS | (offer.flags & USED);
    if wishes.read_only || flags.contains(TransmissionFlags::READ_ONLY) {
        // Nothing is written, so what belongs to writing is not asked for, nor expected of another server.
        flags -= USED - TransmissionFlags::CAN_MULTI_CONN;
        flags |= TransmissionFlags::READ_ONLY;
    }
    flags
}

fn bind(
    netlink: &mut Netlink,
    directory: &Path,
    wishes: &Wishes,
    offer: &Offer,
    opened: &[Opened],
) -> Result<(u32, Lock), Error> {
    let candidates = match wishes.index {
        Some(index) => vec![index],
        None => {
            let mut devices = netlink.status(None)?;
            devices.retain(|(_, is_bound)| !is_bound);
            devices.sort_unstable();
            devices.into_iter().map(|(index, _)| index).take(crate::units::to_usize(u64::from(MOST_DEVICES))).collect()
        }
    };
    let sockets = opened.iter().filter_map(|one| u32::try_from(one.socket.as_raw_fd()).ok()).collect();
    let change = Change {
        timeout: Some(seconds(wishes.timeout)),
        dead_timeout: Some(seconds(wishes.dead_timeout)),
        sockets,
        backend: offer.identity.map(|identity| identity.to_string()),
    };
    let block_size = block_size(offer).map(u64::from).unwrap_or(512);
    for index in &candidates {
        let lock = Lock::take(directory, *index)?;
        let flags = u64::from(flags(wishes, offer).bits());
        let size = offer.size;
        let request = Request::Connect { index: *index, size, block_size, flags, change: change.clone() };
        match netlink.ask(&request) {
            Ok(_) => return Ok((*index, lock)),
            Err(Error::Kernel { source, .. }) if source.raw_os_error() == Some(libc::EBUSY) => {
                if wishes.index.is_some() {
                    return Err(Error::InUse(*index));
                }
            }
            Err(error) => return Err(error),
        }
    }
    Err(Error::NoneFree(netlink.status(None)?.iter().map(|(index, _)| index + 1).max().unwrap_or(0)))
}

/// Waits until the device has its size. Opening it has the kernel look for partitions.
fn settle(index: u32, size: u64) -> Result<Device, Error> {
    let end = clock::now() + SETTLING;
    loop {
        match Device::read(Path::new(SYSTEM), index)? {
            Some(device) if device.size == size => {
                let path = format!("/dev/nbd{index}");
                // Without udev there may be no node for it.
                drop(std::fs::File::open(path));
                return Ok(device);
            }
            _ if clock::now() > end => return Err(Error::Answer("the device does not get its size")),
            _ => thread::sleep(GLANCE),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::BlockSizes;

    fn wishes(read_only: bool) -> Wishes {
        let (timeout, dead_timeout) = (Duration::from_millis(1500), Duration::ZERO);
        Wishes { uris: Vec::new(), index: None, connections: 2, timeout, dead_timeout, read_only }
    }

    fn offer(flags: TransmissionFlags, minimum: u32) -> Offer {
        let block_sizes = BlockSizes { minimum, preferred: minimum.max(4096), ..BlockSizes::DEFAULT };
        Offer { size: 1 << 20, flags, block_sizes, identity: None, is_ours: false }
    }

    #[test]
    fn blocks_are_sectors_unless_the_server_wants_larger_ones() {
        for (minimum, expected) in [(1, Ok(512)), (512, Ok(512)), (4096, Ok(4096))] {
            assert_eq!(block_size(&offer(TransmissionFlags::HAS_FLAGS, minimum)), expected);
        }
        assert!(block_size(&offer(TransmissionFlags::HAS_FLAGS, 8192)).is_err());
    }

    #[test]
    fn a_device_that_nobody_writes_to_needs_little_of_its_server() {
        let all = TransmissionFlags::all() - TransmissionFlags::READ_ONLY;
        let reading = TransmissionFlags::HAS_FLAGS | TransmissionFlags::READ_ONLY | TransmissionFlags::CAN_MULTI_CONN;
        assert_eq!(flags(&wishes(true), &offer(all, 1)), reading);
        assert_eq!(flags(&wishes(false), &offer(all | TransmissionFlags::READ_ONLY, 1)), reading);
        let writing = flags(&wishes(false), &offer(all, 1));
        assert!(writing.contains(TransmissionFlags::SEND_FLUSH | TransmissionFlags::SEND_TRIM));
        assert!(!writing.intersects(TransmissionFlags::READ_ONLY | TransmissionFlags::SEND_CACHE));
    }

    #[test]
    fn no_time_out_is_nothing() {
        // The kernel takes 0 for "never", and for "at once".
        assert_eq!((seconds(Duration::from_millis(1500)), seconds(Duration::ZERO)), (1, 1));
    }
}
