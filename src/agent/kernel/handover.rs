//! Giving the kernel a socket in place of a dead one, and making sure that it took it.
//!
//! `NBD_CMD_RECONFIGURE` reports success also when no connection is dead, and drops the socket. But of one that it takes
//! it sets the time-out for sending, to that of the device, which is never 0 here. That is looked at while the
//! descriptor is ours; once it is closed, the socket must still be there.

use std::os::fd::AsRawFd;
use std::time::Duration;

use super::dial::Opened;
use super::messages::{Change, Request};
use super::netlink::Netlink;
use super::record::Record;
use super::{Error, sockets};

/// What became of a socket.
#[derive(Debug)]
pub(super) enum Given {
    /// The kernel has it.
    Taken,
    /// Nothing was dead: here it is again.
    NoneDead(Opened),
}

/// What a device's time-outs are when it is not being moved.
pub(super) fn ordinary(record: &Record) -> Change {
    Change {
        timeout: Some(record.timeout_seconds.max(1)),
        dead_timeout: Some(record.dead_timeout_seconds).filter(|seconds| *seconds > 0),
        sockets: Vec::new(),
        backend: record.backend.clone(),
    }
}

/// Gives the kernel a socket. The device's time-outs are then the ordinary ones: the kernel gives the socket the one
/// that it has at that moment.
pub(super) fn give(netlink: &mut Netlink, index: u32, record: &Record, opened: Opened) -> Result<Given, Error> {
    let mut change = ordinary(record);
    let fd = u32::try_from(opened.socket.as_raw_fd()).map_err(|_| Error::Answer("a descriptor that is none"))?;
    change.sockets = vec![fd];
    opened.socket.set_write_timeout(None).map_err(Error::system("a socket"))?;
    netlink.ask(&Request::Reconfigure { index, change })?;
    let timeout = opened.socket.write_timeout().map_err(Error::system("a socket"))?;
    if timeout.unwrap_or(Duration::ZERO).is_zero() {
        return Ok(Given::NoneDead(opened));
    }
    let inode = opened.inode;
    drop(opened);
    match sockets::is_there(inode) {
        Ok(true) => Ok(Given::Taken),
        Ok(false) => Err(Error::Answer("it has taken a connection, which is gone already")),
        Err(error) => Err(Error::system("/proc/net")(error)),
    }
}
