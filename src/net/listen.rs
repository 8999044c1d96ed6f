//! Listening sockets.

use std::fmt;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixStream as StdUnixStream;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use socket2::{Domain, SockAddr, SockRef, Socket, Type};
use thiserror::Error;
use tokio::net::{TcpListener, UnixListener};

use super::stream::Detached;
use crate::nbd::uri::{Address, Uri};
use crate::nbd::wire::DEFAULT_PORT;

/// Connections that may wait to be accepted; the system may allow fewer (`net.core.somaxconn`).
const BACKLOG: i32 = 4096;

/// Bytes of the longest path in a unix socket's address (`unix(7)`).
const LONGEST_PATH: usize = 107;

/// Where to listen, as the operator wrote it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ListenAddress {
    /// `ADDR:PORT`, `ADDR`, `[IPV6]:PORT`, `HOST:PORT` or `:PORT` for all addresses.
    Tcp {
        /// The host, without brackets; empty for all addresses.
        host: String,
        /// The port; 0 for one that the system picks.
        port: u16,
    },
    /// A unix socket.
    Unix(PathBuf),
}

/// Why a text is not a place to listen.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0:?} is not an address: write ADDR:PORT, [IPV6]:PORT or :PORT")]
pub struct ParseListenError(String);

impl FromStr for ListenAddress {
    type Err = ParseListenError;

    fn from_str(text: &str) -> Result<Self, ParseListenError> {
        let error = || ParseListenError(text.to_owned());
        if let Ok(address) = text.parse::<IpAddr>() {
            return Ok(Self::Tcp { host: address.to_string(), port: DEFAULT_PORT });
        }
        let (host, port) = match text.strip_prefix('[') {
            Some(rest) => {
                let (host, port) = rest.split_once(']').ok_or_else(error)?;
                host.parse::<Ipv6Addr>().map_err(|_| error())?;
                (host, port.strip_prefix(':').or_else(|| port.is_empty().then_some("")).ok_or_else(error)?)
            }
            None if text.is_empty() || text.contains(['/', ' ']) => return Err(error()),
            None => text.split_once(':').unwrap_or((text, "")),
        };
        let port = if port.is_empty() { DEFAULT_PORT } else { port.parse().map_err(|_| error())? };
        Ok(Self::Tcp { host: host.to_owned(), port })
    }
}

impl fmt::Display for ListenAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { host, port } if host.contains(':') => write!(f, "[{host}]:{port}"),
            Self::Tcp { host, port } => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

/// Why there is no listening socket.
#[derive(Debug, Error)]
pub enum BindError {
    /// The system refused.
    #[error("cannot listen on {address}")]
    System {
        /// Where.
        address: String,
        /// Its reason.
        source: io::Error,
    },
    /// Another process answers on the unix socket.
    #[error("cannot listen on {0}: another server answers there")]
    InUse(PathBuf),
    /// There is something else at the path of the unix socket.
    #[error("cannot listen on {0}: there is a file that is not a socket")]
    NotASocket(PathBuf),
    /// The kernel has no room for the path.
    #[error("cannot listen on {}: the path of a unix socket can have {LONGEST_PATH} bytes, and this has {}", .0.display(), .0.as_os_str().len())]
    PathTooLong(PathBuf),
}

/// A socket that listens in this thread's runtime.
#[derive(Debug)]
pub struct Listener {
    kind: Kind,
    asked: Option<String>,
    /// Device and inode of a socket file that is another server's until this one has taken over.
    left: Option<(u64, u64)>,
}

/// What another process must know of a listening socket beside its descriptor.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListeningAt {
    /// The address that the operator wrote; `None` for a socket of the service manager.
    pub asked: Option<String>,
    /// Device and inode of the socket file, if a server has made it: whoever has the socket removes it at the end.
    pub made: Option<(u64, u64)>,
}

#[derive(Debug)]
enum Kind {
    Tcp(TcpListener),
    Unix {
        socket: UnixListener,
        path: PathBuf,
        /// Device and inode of the socket file that we made, to remove it and no other at the end.
        made: Option<(u64, u64)>,
    },
}

impl Listener {
    /// Listens at `address`: one socket for a unix path, one for each address of a host. Blocks on name resolution.
    pub fn bind(address: &ListenAddress) -> Result<Vec<Self>, BindError> {
        let mut listeners = Self::bind_all(address)?;
        listeners.iter_mut().for_each(|listener| listener.asked = Some(address.to_string()));
        Ok(listeners)
    }

    fn bind_all(address: &ListenAddress) -> Result<Vec<Self>, BindError> {
        match address {
            ListenAddress::Unix(path) => Ok(vec![bind_unix(path)?]),
            ListenAddress::Tcp { host, port } => {
                let failed = |source| BindError::System { address: address.to_string(), source };
                let addresses = if host.is_empty() {
                    // One socket for both families where IPv6 is there, else IPv4.
                    let all = SocketAddr::from((Ipv6Addr::UNSPECIFIED, *port));
                    match bind_tcp(all) {
                        Ok(listener) => return Ok(vec![listener]),
                        Err(_) => vec![SocketAddr::from((Ipv4Addr::UNSPECIFIED, *port))],
                    }
                } else {
                    (host.as_str(), *port).to_socket_addrs().map_err(failed)?.collect()
                };
                addresses.into_iter().map(|address| bind_tcp(address).map_err(failed)).collect()
            }
        }
    }

    /// Takes a socket that listens already, if it is one: from the service manager, or from another process, which has
    /// said what it is, and whose socket file it is until [`Self::adopt`]. Gives the descriptor back if it is none.
    pub fn from_fd(socket: OwnedFd, known: Option<ListeningAt>) -> io::Result<Result<Self, OwnedFd>> {
        let found = SockRef::from(&socket);
        if !found.is_listener().unwrap_or(false) {
            return Ok(Err(socket));
        }
        found.set_nonblocking(true)?;
        let is_unix = found.local_addr()?.is_unix();
        let known = known.unwrap_or_default();
        let kind = if is_unix {
            let socket = std::os::unix::net::UnixListener::from(socket);
            let address = socket.local_addr()?;
            let path = address.as_pathname().map(Path::to_owned).or_else(|| abstract_path(&address));
            let path = path.unwrap_or_default();
            Kind::Unix { socket: UnixListener::from_std(socket)?, path, made: None }
        } else {
            Kind::Tcp(TcpListener::from_std(socket.into())?)
        };
        Ok(Ok(Self { kind, asked: known.asked, left: known.made }))
    }

    /// From now on the socket file of another server is this one's, which removes it at the end.
    pub fn adopt(&mut self) {
        if let Kind::Unix { made, .. } = &mut self.kind
            && let Some(left) = self.left.take()
        {
            *made = Some(left);
        }
    }

    /// The address that the operator wrote; `None` for a socket of the service manager.
    pub fn asked(&self) -> Option<&str> {
        self.asked.as_deref()
    }

    /// Leaves this process to another one, which will remove the socket file when it ends.
    pub fn into_fd(mut self) -> io::Result<(OwnedFd, ListeningAt)> {
        let socket = match &self.kind {
            Kind::Tcp(socket) => socket.as_fd().try_clone_to_owned()?,
            Kind::Unix { socket, .. } => socket.as_fd().try_clone_to_owned()?,
        };
        let made = match &mut self.kind {
            Kind::Tcp(_) => None,
            Kind::Unix { made, .. } => made.take().or(self.left),
        };
        Ok((socket, ListeningAt { asked: self.asked.take(), made }))
    }

    /// Waits for the next connection.
    ///
    /// Cancel safety: no connection is lost.
    pub async fn accept(&self) -> io::Result<Detached> {
        match &self.kind {
            Kind::Tcp(socket) => Detached::from_tcp(socket.accept().await?.0.into_std()?),
            Kind::Unix { socket, .. } => Detached::from_unix(socket.accept().await?.0.into_std()?),
        }
    }

    /// The URI of `export` here, for somebody on this host.
    pub fn uri(&self, export: &str) -> io::Result<Uri> {
        let address = match &self.kind {
            Kind::Tcp(socket) => {
                let address = socket.local_addr()?;
                let host = match address.ip() {
                    ip if ip.is_unspecified() => "localhost".to_owned(),
                    ip => ip.to_string(),
                };
                Address::Tcp { host, port: address.port() }
            }
            Kind::Unix { path, .. } if is_abstract(path) => Address::Unix(path.clone()),
            Kind::Unix { path, .. } => Address::Unix(std::path::absolute(path)?),
        };
        Ok(Uri::plain(address, export.to_owned()))
    }

    /// Whether a client that connects to `address` would arrive here. Blocks on name resolution.
    pub fn is_reached_by(&self, address: &Address) -> bool {
        match (&self.kind, address) {
            (Kind::Tcp(socket), Address::Tcp { host, port }) => {
                let Ok(local) = socket.local_addr() else { return false };
                let Ok(mut targets) = (host.as_str(), *port).to_socket_addrs() else { return false };
                local.port() == *port
                    && targets.any(|target| {
                        let wildcard = local.ip().is_unspecified() && is_local(target.ip());
                        target.ip() == local.ip() || wildcard
                    })
            }
            (Kind::Unix { path, .. }, Address::Unix(target)) => {
                let identity = |path: &Path| fs::metadata(path).map(|file| (file.dev(), file.ino()));
                matches!((identity(path), identity(target)), (Ok(ours), Ok(theirs)) if ours == theirs)
            }
            _ => false,
        }
    }
}

impl fmt::Display for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.kind {
            Kind::Tcp(socket) => match socket.local_addr() {
                Ok(address) => address.fmt(f),
                Err(_) => f.write_str("tcp"),
            },
            Kind::Unix { path, .. } => path.display().fmt(f),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Kind::Unix { path, made: Some(made), .. } = &self.kind
            && fs::symlink_metadata(path).is_ok_and(|file| (file.dev(), file.ino()) == *made)
            && let Err(error) = fs::remove_file(path)
        {
            tracing::warn!(path = %path.display(), %error, "cannot remove the socket");
        }
    }
}

/// An address in the abstract namespace, as the path that [`Address::Unix`] has for it.
fn abstract_path(address: &std::os::unix::net::SocketAddr) -> Option<PathBuf> {
    use std::os::linux::net::SocketAddrExt;
    let name = [b"\0", address.as_abstract_name()?].concat();
    Some(PathBuf::from(std::ffi::OsStr::from_bytes(&name)))
}

fn is_abstract(path: &Path) -> bool {
    path.as_os_str().as_bytes().first() == Some(&0)
}

/// Whether `address` belongs to this host: a socket can be bound to it.
fn is_local(address: IpAddr) -> bool {
    address.is_loopback() || std::net::UdpSocket::bind((address, 0)).is_ok()
}

fn bind_tcp(address: SocketAddr) -> io::Result<Listener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking().cloexec(), None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(Listener { kind: Kind::Tcp(TcpListener::from_std(socket.into())?), asked: None, left: None })
}

fn bind_unix(path: &Path) -> Result<Listener, BindError> {
    if path.as_os_str().len() > LONGEST_PATH {
        return Err(BindError::PathTooLong(path.to_owned()));
    }
    let failed = |source| BindError::System { address: path.display().to_string(), source };
    let bind = || -> io::Result<UnixListener> {
        let socket = Socket::new(Domain::UNIX, Type::STREAM.nonblocking().cloexec(), None)?;
        socket.bind(&SockAddr::unix(path)?)?;
        socket.listen(BACKLOG)?;
        UnixListener::from_std(socket.into())
    };
    let socket = match bind() {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            remove_stale(path)?;
            bind()
        }
        result => result,
    }
    .map_err(failed)?;
    let made = fs::symlink_metadata(path).map(|file| (file.dev(), file.ino())).ok();
    Ok(Listener { kind: Kind::Unix { socket, path: path.to_owned(), made }, asked: None, left: None })
}

/// Removes a socket file that a dead server left.
fn remove_stale(path: &Path) -> Result<(), BindError> {
    let failed = |source| BindError::System { address: path.display().to_string(), source };
    if !fs::symlink_metadata(path).map_err(failed)?.file_type().is_socket() {
        return Err(BindError::NotASocket(path.to_owned()));
    }
    match StdUnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => fs::remove_file(path).map_err(failed),
        _ => Err(BindError::InUse(path.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_operators_write_them() {
        for (text, host, port) in [
            ("127.0.0.1:1234", "127.0.0.1", 1234),
            ("0.0.0.0", "0.0.0.0", 10809),
            ("[::1]:7", "::1", 7),
            ("[::]", "::", 10809),
            ("::1", "::1", 10809),
            (":0", "", 0),
            ("host.example:99", "host.example", 99),
            ("host", "host", 10809),
        ] {
            assert_eq!(text.parse(), Ok(ListenAddress::Tcp { host: host.into(), port }), "{text}");
        }
        for text in ["", "host:port", "[::1", "[::1]x", "[nope]:1", "1:2:3:x", "a b:1", "/run/x", "h:65536"] {
            assert!(text.parse::<ListenAddress>().is_err(), "{text}");
        }
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("s");
        let address = ListenAddress::Unix(path.clone());
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let listener = Listener::bind(&address).unwrap();
        assert!(matches!(Listener::bind(&address), Err(BindError::InUse(_))));
        assert!(listener[0].is_reached_by(&Address::Unix(path.clone())));
        drop(listener);
        assert!(!path.exists(), "the socket file stays behind");
        fs::write(&path, "data").unwrap();
        assert!(matches!(Listener::bind(&address), Err(BindError::NotASocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"data");
        let long = directory.path().join("x".repeat(100));
        assert!(matches!(Listener::bind(&ListenAddress::Unix(long)), Err(BindError::PathTooLong(_))));
    }

    #[tokio::test]
    async fn a_listener_knows_the_addresses_that_lead_to_it() {
        let listener = Listener::bind(&":0".parse().unwrap()).unwrap().remove(0);
        let uri = listener.uri("x").unwrap();
        let Address::Tcp { host, port } = &uri.address else { panic!("{uri}") };
        assert_eq!(host, "localhost");
        assert!(listener.is_reached_by(&uri.address));
        let at = |host: &str, port| Address::Tcp { host: host.into(), port };
        assert!(listener.is_reached_by(&at("127.0.0.1", *port)));
        assert!(!listener.is_reached_by(&at("127.0.0.1", port.wrapping_sub(1).max(1))));
        assert!(!listener.is_reached_by(&at("192.0.2.1", *port)));
    }
}
