//! Multicast sockets: groups, interfaces, batches.
//!
//! STUB

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::str::FromStr;

use thiserror::Error;

/// A multicast group and its port, as in `239.1.2.3:7000` or `[ff15::7]:7000`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Group(SocketAddr);

/// Why a text is no group.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0:?} is no multicast group: they look like 239.1.2.3:7000 or [ff15::7]:7000")]
pub struct ParseGroupError(String);

impl FromStr for Group {
    type Err = ParseGroupError;

    fn from_str(text: &str) -> Result<Self, ParseGroupError> {
        let address = text.parse::<SocketAddr>().ok();
        let group = address.filter(|address| address.ip().is_multicast() && address.port() != 0);
        group.map(Self).ok_or_else(|| ParseGroupError(text.to_owned()))
    }
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// How datagrams leave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leaving {
    /// The interface, by its name or by an address of it. `None`: the route to the group decides.
    pub interface: Option<String>,
    /// Routers that may forward them.
    pub hops: u8,
    /// Bytes of the longest packet that the path takes, headers included; `None`: what the interface takes, 1500 at most.
    pub mtu: Option<u16>,
}

/// Sends to a group, and hears what is answered.
#[derive(Debug)]
pub struct Outlet;

impl Outlet {
    /// A socket of its own. Call within a tokio runtime.
    pub fn open(group: Group, leaving: &Leaving) -> io::Result<Self> {
        let _ = (group, leaving);
        unimplemented!()
    }

    /// Bytes of the longest datagram that fits the path.
    pub fn longest(&self) -> usize {
        unimplemented!()
    }

    /// Sends datagrams that lie one after the other in `bytes`, each of `size` bytes, the last perhaps shorter: by as few
    /// system calls as the system allows.
    pub async fn send(&self, bytes: &[u8], size: usize) -> io::Result<()> {
        let _ = (bytes, size);
        unimplemented!()
    }

    /// Waits for datagrams that were sent to this socket, and hands each to `each` with its sender.
    pub async fn receive(&self, each: impl FnMut(&[u8], SocketAddr)) -> io::Result<()> {
        let _ = each;
        unimplemented!()
    }
}

/// Hears a group.
#[derive(Debug)]
pub struct Inlet;

impl Inlet {
    /// Joins a group by one interface; `None`: the route to the group decides. Call within a tokio runtime.
    pub fn join(group: Group, interface: Option<&str>) -> io::Result<Self> {
        let _ = (group, interface);
        unimplemented!()
    }

    /// Waits for datagrams, takes all that are there (up to a bound), and hands each to `each` with its sender.
    pub async fn receive(&mut self, each: impl FnMut(&[u8], SocketAddr)) -> io::Result<()> {
        let _ = each;
        unimplemented!()
    }

    /// Sends a datagram to whoever sends to the group.
    pub async fn answer(&self, bytes: &[u8], to: SocketAddr) -> io::Result<()> {
        let _ = (bytes, to);
        unimplemented!()
    }

    /// Datagrams that the system threw away because this socket's queue was full, so far.
    pub fn overflowed(&self) -> u32 {
        unimplemented!()
    }
}
