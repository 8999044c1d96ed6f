//! The kernel's `/dev/nbdN`: attached, moved to another server, detached, by generic netlink.
//!
//! What the kernel does was read in `drivers/block/nbd.c` and `include/uapi/linux/nbd-netlink.h`, and tried on Linux 6.1
//! (`tests/it/attach.rs`). It takes sockets on which the negotiation is over, speaks simple replies on them, and:
//!
//! - replaces a socket only when one is dead. When none is, it reports success and drops the new one (`handover` checks);
//! - compares neither size nor flags of another server (`rules` does), only the backend identifier;
//! - sends on another connection what one has lost, once the request's time-out is over; what finds none alive waits for
//!   the dead-connection time-out;
//! - turns every error that a server answers into EIO, so a server must close, never answer an error;
//! - takes stream sockets of TCP and unix only, and no TLS.
//!
//! Owns: attaching, keeping, moving, detaching. Does not own: the servers, and who is to be moved. After a crash of
//! ours the device goes on with the connections that it has; the record tells the next command of ours of them.
//!
//! | file | holds |
//! | --- | --- |
//! | `messages` | netlink messages, to bytes and back |
//! | `netlink` | the sockets for them: requests, and the news that a connection died |
//! | `sockets` | which of the kernel's sockets are there, and ending one from this side |
//! | `dial` | connecting to a server, up to where the kernel takes over |
//! | `device` | what the system says of a device |
//! | `record` | what we remember of a device, and who may change it |
//! | `rules` | whether a server may take a device over |
//! | `handover` | giving the kernel a socket, and making sure that it took it |
//! | `attach` | attaching and detaching |
//! | `keeper` | connecting anew what was lost |
//! | `redirect` | moving the connections, one after the other |

mod attach;
mod device;
mod dial;
mod handover;
mod keeper;
pub mod messages;
mod netlink;
mod record;
mod redirect;
mod rules;
mod sockets;

use std::io;

use thiserror::Error;

use crate::nbd::Uri;
use crate::nbd::handshake::client::Refusal;

pub use attach::{Attached, Wishes, attach, detach};
pub use device::index_of;
pub use keeper::keep;
pub use record::{Connection, DIRECTORY, Record, name_keeper};
pub use redirect::{Moved, Order, Outcome, Report, redirect};
pub use rules::Unfit;

/// Why a device is not attached, moved or detached.
#[derive(Debug, Error)]
pub enum Error {
    /// The module is missing.
    #[error("this kernel has no NBD client: modprobe nbd")]
    NoModule,
    /// Not root.
    #[error("the kernel wants CAP_SYS_ADMIN for this: run it as root")]
    NotAllowed,
    /// The kernel said no.
    #[error("the kernel refuses to {what}: {source}{}", said(.message))]
    Kernel {
        /// To do what.
        what: &'static str,
        /// Its reason.
        source: io::Error,
        /// Its words, if it has any.
        message: String,
    },
    /// The kernel answers what it should not.
    #[error("the kernel's answer cannot be understood: {0}")]
    Answer(&'static str),
    /// Not a device of ours.
    #[error("{0} is not a device such as /dev/nbd0")]
    NoDevice(String),
    /// There is nothing attached.
    #[error("/dev/nbd{0} is not attached")]
    NotAttached(u32),
    /// Something else is attached already.
    #[error("/dev/nbd{0} is in use")]
    InUse(u32),
    /// No device is free.
    #[error("no device is free: name another one, as in /dev/nbd{0}, and it is made")]
    NoneFree(u32),
    /// A file system or another device is upon it.
    #[error("/dev/nbd{0} is in use by this system (mounted?)")]
    Busy(u32),
    /// A server cannot be used.
    #[error("{uri}: {source}")]
    Server {
        /// Which.
        uri: Box<Uri>,
        /// Why.
        source: DialError,
    },
    /// A server must not take the device over.
    #[error("{uri}: {reason}")]
    Unfit {
        /// Which.
        uri: Box<Uri>,
        /// Why.
        reason: Unfit,
    },
    /// The device cannot be moved.
    #[error("/dev/nbd{index} cannot be moved: {reason}")]
    Immovable {
        /// Which.
        index: u32,
        /// Why.
        reason: String,
    },
    /// A connection to the old server would not end.
    #[error("the old connection would not end: {0}")]
    WouldNotEnd(String),
    /// The system refused something else.
    #[error("{what}: {source}")]
    System {
        /// What.
        what: String,
        /// Its reason.
        source: io::Error,
    },
}

/// Why a server cannot be used.
#[derive(Debug, Error)]
pub enum DialError {
    /// It cannot be reached, or was lost while negotiating.
    #[error("cannot connect: {0}")]
    Connect(io::Error),
    /// It closed the connection while negotiating.
    #[error("it closed the connection during the negotiation")]
    Closed,
    /// It would not.
    #[error(transparent)]
    Refused(#[from] Refusal),
    /// The kernel speaks no TLS.
    #[error("the kernel cannot speak TLS: attach a mirror on this host, or use a tunnel")]
    Tls,
    /// Not a socket that the kernel takes.
    #[error("the kernel takes stream sockets of TCP and unix only")]
    Socket,
}

// By hand: the message has the reason already, and as a source it would be told twice.
impl From<io::Error> for DialError {
    fn from(error: io::Error) -> Self {
        Self::Connect(error)
    }
}

impl Error {
    fn system(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::System { what, source }
    }
}

fn said(message: &str) -> String {
    if message.is_empty() { String::new() } else { format!(" ({message})") }
}
