//! The listening socket.
//!
//! A unix socket is made under another name, given its mode, set to listen, and then renamed. So nobody sees one that
//! is open to more people than it will be, or one that refuses connections although its server lives.

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use socket2::{Domain, SockAddr, Socket as Socket2, Type};
use thiserror::Error;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

use super::access::{HOW, TokenCell};
use super::place::AdminAddress;

/// Bytes of the longest path in a unix socket's address (`unix(7)`).
const LONGEST_PATH: usize = 107;

/// Why there is no admin socket.
#[derive(Debug, Error)]
pub enum BindError {
    /// The system refused.
    #[error("cannot make the admin socket {address}")]
    System {
        /// Where.
        address: AdminAddress,
        /// Its reason.
        source: io::Error,
    },
    /// Another process answers there.
    #[error("cannot make the admin socket {0}: another server answers there")]
    InUse(PathBuf),
    /// A port without a token would be everybody's.
    #[error("the admin API at {0} needs a token: make one by {HOW}, and name it with --admin-token FILE")]
    NoToken(AdminAddress),
    /// A name is no place to listen.
    #[error("cannot listen at {0}: an address is wanted, as in 0.0.0.0:9000")]
    NoAddress(AdminAddress),
    /// There is something else at the path.
    #[error("cannot make the admin socket {0}: there is a file that is not a socket")]
    NotASocket(PathBuf),
    /// The kernel has no room for the path.
    #[error("cannot make the admin socket {0}: its path may have {longest} bytes", longest = LONGEST_PATH - SUFFIX.len())]
    PathTooLong(PathBuf),
}

/// What the name of a socket that is being made has more.
const SUFFIX: &str = ".new";

/// Listens for operators, in this thread's runtime. Dropped, it removes its socket.
#[derive(Debug)]
pub struct AdminListener(Kind);

#[derive(Debug)]
enum Kind {
    Tcp { socket: TcpListener, token: TokenCell },
    Unix { socket: UnixListener, made: SocketFile },
}

/// A connection.
pub(super) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// A socket in the file system that we made: to be removed, and no other.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl AdminListener {
    /// Listens at `address`. The directory of a unix socket is made if only it is missing; the socket is for its owner
    /// alone, and takes the place of one that a dead server left. Requests by TCP must carry `token`.
    pub fn bind(address: &AdminAddress, token: Option<&TokenCell>) -> Result<Self, BindError> {
        match address {
            AdminAddress::Tcp(_) => {
                let failed = |source| BindError::System { address: address.clone(), source };
                let token = token.ok_or_else(|| BindError::NoToken(address.clone()))?.clone();
                let place = address.socket().ok_or_else(|| BindError::NoAddress(address.clone()))?;
                Ok(Self(Kind::Tcp { socket: bind_tcp(place).map_err(failed)?, token }))
            }
            AdminAddress::Unix(path) => bind_unix(path),
        }
    }

    /// Where it listens.
    pub fn address(&self) -> io::Result<AdminAddress> {
        match &self.0 {
            Kind::Tcp { socket, .. } => Ok(AdminAddress::Tcp(socket.local_addr()?.to_string())),
            Kind::Unix { made, .. } => Ok(AdminAddress::Unix(made.path.clone())),
        }
    }

    /// What requests must carry; nothing on a unix socket.
    pub(super) const fn token(&self) -> Option<&TokenCell> {
        match &self.0 {
            Kind::Tcp { token, .. } => Some(token),
            Kind::Unix { .. } => None,
        }
    }

    /// Cancel safety: no connection is lost.
    pub(super) async fn accept(&self) -> io::Result<Socket> {
        Ok(match &self.0 {
            Kind::Tcp { socket, .. } => Socket::Tcp(socket.accept().await?.0),
            Kind::Unix { socket, .. } => Socket::Unix(socket.accept().await?.0),
        })
    }
}

fn bind_tcp(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = std::net::TcpListener::bind(address)?;
    socket.set_nonblocking(true)?;
    TcpListener::from_std(socket)
}

fn bind_unix(path: &Path) -> Result<AdminListener, BindError> {
    // A relative path would mean something else to whoever reads it in a log.
    let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let failed = |source| BindError::System { address: AdminAddress::Unix(path.clone()), source };
    if path.as_os_str().len() + SUFFIX.len() > LONGEST_PATH {
        return Err(BindError::PathTooLong(path));
    }
    if let Some(directory) = path.parent() {
        make_private(directory).map_err(failed)?;
    }
    let mut unfinished = path.clone().into_os_string();
    unfinished.push(SUFFIX);
    let unfinished = PathBuf::from(unfinished);
    // What a server left that died while it made its own, or is making now: then one of the two fails, and says so.
    if is_socket(&unfinished) {
        fs::remove_file(&unfinished).map_err(failed)?;
    }
    let socket = UnixListener::bind(&unfinished).map_err(failed)?;
    let result = finish(&unfinished, &path).map(|made| AdminListener(Kind::Unix { socket, made }));
    if result.is_err() {
        // The failure that is told is the first one.
        let _ = fs::remove_file(&unfinished);
    }
    result
}

/// Gives a socket its mode and its name.
fn finish(unfinished: &Path, path: &Path) -> Result<SocketFile, BindError> {
    let failed = |source| BindError::System { address: AdminAddress::Unix(path.to_owned()), source };
    fs::set_permissions(unfinished, fs::Permissions::from_mode(0o600)).map_err(failed)?;
    let file = fs::symlink_metadata(unfinished).map_err(failed)?;
    let rename = || renameat_with(CWD, unfinished, CWD, path, RenameFlags::NOREPLACE);
    let renamed = match rename() {
        Err(rustix::io::Errno::EXIST) => {
            if !is_socket(path) {
                return Err(BindError::NotASocket(path.to_owned()));
            }
            if !is_dead(path) {
                return Err(BindError::InUse(path.to_owned()));
            }
            fs::remove_file(path).map_err(failed)?;
            rename()
        }
        result => result,
    };
    renamed.map_err(|error| failed(error.into()))?;
    Ok(SocketFile { path: path.to_owned(), device: file.dev(), inode: file.ino() })
}

/// Makes a directory for its owner alone, if it is not there.
pub(super) fn make_private(directory: &Path) -> io::Result<()> {
    match fs::DirBuilder::new().mode(0o700).create(directory) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        result => result,
    }
}

fn is_socket(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|file| file.file_type().is_socket())
}

/// Whether nobody listens any more. Ours listen before they have their name.
pub(super) fn is_dead(path: &Path) -> bool {
    // A server that hangs must not make this one wait for it.
    let connect = || Socket2::new(Domain::UNIX, Type::STREAM.nonblocking(), None)?.connect(&SockAddr::unix(path)?);
    connect().is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let is_ours = |file: fs::Metadata| (file.dev(), file.ino()) == (self.device, self.inode);
        if fs::symlink_metadata(&self.path).is_ok_and(is_ours)
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!(path = %self.path.display(), %error, "cannot remove the admin socket");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[tokio::test]
    async fn a_socket_is_private_and_goes_away_with_its_listener() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("run/a.sock");
        let address = AdminAddress::Unix(path.clone());
        let listener = AdminListener::bind(&address, None).unwrap();
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        assert_eq!(listener.address().unwrap(), address);
        assert!(!is_dead(&path));
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        assert!(matches!(AdminListener::bind(&address, None), Err(BindError::InUse(_))));
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "a failure leaves something behind");
        drop(listener);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_dead_socket_is_replaced_and_anything_else_is_not() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("a.sock");
        let address = AdminAddress::Unix(path.clone());
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(is_dead(&path));
        drop(AdminListener::bind(&address, None).unwrap());
        fs::write(&path, "data").unwrap();
        assert!(matches!(AdminListener::bind(&address, None), Err(BindError::NotASocket(_))));
        assert_eq!(fs::read(&path).unwrap(), b"data");
        let long = scratch.path().join("x".repeat(LONGEST_PATH));
        assert!(matches!(AdminListener::bind(&AdminAddress::Unix(long), None), Err(BindError::PathTooLong(_))));
        let deep = scratch.path().join("no/such/a.sock");
        assert!(matches!(AdminListener::bind(&AdminAddress::Unix(deep), None), Err(BindError::System { .. })));
    }

    #[tokio::test]
    async fn a_socket_that_took_our_place_is_left_alone() {
        let scratch = tempfile::tempdir().unwrap();
        let path = scratch.path().join("a.sock");
        let listener = AdminListener::bind(&AdminAddress::Unix(path.clone()), None).unwrap();
        fs::remove_file(&path).unwrap();
        let other = AdminListener::bind(&AdminAddress::Unix(path.clone()), None).unwrap();
        drop(listener);
        assert!(path.exists());
        drop(other);
    }
}
