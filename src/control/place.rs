//! Where admin sockets are, and finding the only running server.
//!
//! A server that is not told otherwise listens on `PID.sock` in its user's runtime directory:
//!
//! | environment | directory |
//! | --- | --- |
//! | `RUNTIME_DIRECTORY` (a unit of systemd with `RuntimeDirectory=`) | that one |
//! | `XDG_RUNTIME_DIR` (a user who has logged in) | `headwater` in it |
//! | root | `/run/headwater` |
//! | anybody else | `/tmp/headwater-UID` |
//!
//! Commands look in all of these and in those of the units that the package brings, except that within a unit they look in the
//! unit's own alone.

use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use futures_util::future::join_all;
use thiserror::Error;

use super::client::{CallError, Client};
use super::listen::{is_dead, make_private};
use super::status::Status;

/// Sockets that are looked at in all.
const SOCKETS: usize = 256;
/// The directory of the system's servers, if they run as root.
const OF_ROOT: &str = "/run/headwater";
/// `RuntimeDirectory=` of the units that the package brings, which have a user of their own. Not below root's: that one holds
/// records which nobody else may write.
const OF_UNITS: [&str; 2] = ["/run/headwater-serve", "/run/headwater-mirror"];
/// What the name of a default socket has behind the number of its process.
const EXTENSION: &str = "sock";
/// What that of a socket for successors has.
const TAKEOVER: &str = "takeover";

/// Where operators reach a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AdminAddress {
    /// A unix socket.
    Unix(PathBuf),
    /// `HOST:PORT`; HOST is an address, in brackets if it has colons, or a name that the system can look up.
    Tcp(String),
}

/// A text is no place for the admin API.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[error("write the path of a unix socket with a / in it, or a host and a port, as in 127.0.0.1:9000")]
pub struct ParseAdminError;

impl AdminAddress {
    /// Where a server listens that is told this one; `None` for a unix socket, and for a name.
    pub fn socket(&self) -> Option<SocketAddr> {
        let Self::Tcp(text) = self else { return None };
        match text.strip_prefix("localhost:") {
            Some(port) => port.parse().ok().map(|port| SocketAddr::from((Ipv4Addr::LOCALHOST, port))),
            None => text.parse().ok(),
        }
    }
}

impl FromStr for AdminAddress {
    type Err = ParseAdminError;

    fn from_str(text: &str) -> Result<Self, ParseAdminError> {
        if text.contains('/') {
            return Ok(Self::Unix(text.into()));
        }
        let (host, port) = text.rsplit_once(':').ok_or(ParseAdminError)?;
        let is_name = |host: &str| {
            !host.is_empty() && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._".contains(&byte))
        };
        let is_port = |port: &str| port.parse::<u16>().is_ok() && port.bytes().all(|byte| byte.is_ascii_digit());
        let is_one = text.parse::<SocketAddr>().is_ok() || is_name(host) && is_port(port);
        if is_one { Ok(Self::Tcp(text.to_owned())) } else { Err(ParseAdminError) }
    }
}

impl fmt::Display for AdminAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => path.display().fmt(f),
            Self::Tcp(address) => f.write_str(address),
        }
    }
}

/// What decides where sockets are.
#[derive(Debug, Clone)]
pub struct Surroundings {
    /// `RUNTIME_DIRECTORY`.
    pub unit: Option<OsString>,
    /// `XDG_RUNTIME_DIR`.
    pub session: Option<OsString>,
    /// The user.
    pub user: u32,
}

/// A directory with sockets.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Directory {
    path: PathBuf,
    /// Anybody could have made it: it counts only if it belongs to the user and nobody else may write to it.
    is_in_public: bool,
}

impl Surroundings {
    /// Those of this process.
    pub fn of_process() -> Self {
        Self {
            unit: std::env::var_os("RUNTIME_DIRECTORY"),
            session: std::env::var_os("XDG_RUNTIME_DIR"),
            user: rustix::process::geteuid().as_raw(),
        }
    }

    /// Where sockets may be, likeliest first.
    fn directories(&self) -> Vec<Directory> {
        let known = |path| Directory { path, is_in_public: false };
        if let Some(path) = self.unit.as_ref().and_then(first_path) {
            return vec![known(path)];
        }
        let session = self.session.as_ref().and_then(first_path).map(|path| known(path.join("headwater")));
        let of_system = [OF_ROOT].into_iter().chain(OF_UNITS).map(|path| known(path.into()));
        let of_user = Directory { path: format!("/tmp/headwater-{}", self.user).into(), is_in_public: true };
        session.into_iter().chain(of_system).chain([of_user]).collect()
    }

    /// Where a server of this user has its socket if it is not told otherwise: `PID.sock` in a directory that is made
    /// if it is missing, and from which sockets of dead servers are removed.
    pub fn default_place(&self, pid: u32) -> io::Result<AdminAddress> {
        let mut directories = self.directories().into_iter();
        // Only root can make the directory of the system, and nobody those of units.
        let is_anothers = |path: &Path| {
            OF_UNITS.iter().any(|unit| path == Path::new(unit)) || self.user != 0 && path == Path::new(OF_ROOT)
        };
        let is_in_unit = self.unit.as_ref().and_then(first_path).is_some();
        let mine = directories.find(|directory| is_in_unit || !is_anothers(&directory.path));
        let directory = mine.ok_or(io::ErrorKind::NotFound)?;
        let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", directory.path.display()));
        make_private(&directory.path).map_err(named)?;
        self.check(&directory.path).map_err(named)?;
        remove_dead(&directory.path);
        Ok(AdminAddress::Unix(directory.path.join(format!("{pid}.{EXTENSION}"))))
    }

    /// Where a server of this user waits for its successor: beside the default admin socket.
    pub fn takeover_place(&self, pid: u32) -> io::Result<PathBuf> {
        match self.default_place(pid)? {
            AdminAddress::Unix(path) => Ok(path.with_extension(TAKEOVER)),
            AdminAddress::Tcp(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// All places where servers of this user may wait for successors.
    pub fn takeover_places(&self) -> Vec<PathBuf> {
        let directories = self.directories().into_iter();
        let believed = directories.filter(|directory| self.check(&directory.path).is_ok());
        let named = |path: &PathBuf| path.extension().is_some_and(|extension| extension == TAKEOVER);
        let listed = believed.filter_map(|directory| fs::read_dir(directory.path).ok()).flatten();
        listed.filter_map(|entry| Some(entry.ok()?.path())).filter(named).take(SOCKETS).collect()
    }

    /// Refuses a directory in which others could put a socket of theirs in our place.
    fn check(&self, directory: &Path) -> io::Result<()> {
        let found = fs::symlink_metadata(directory)?;
        let refused = |why: &str| Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
        if !found.is_dir() {
            return refused("this is no directory");
        }
        if found.uid() != self.user {
            return refused("this directory belongs to another user");
        }
        if found.mode() & 0o022 != 0 {
            return refused("others may write to this directory");
        }
        Ok(())
    }

    /// All sockets where there may be servers.
    fn sockets(&self) -> Vec<PathBuf> {
        let directories = self.directories().into_iter();
        let believed = directories.filter(|directory| !directory.is_in_public || self.check(&directory.path).is_ok());
        believed.flat_map(|directory| sockets_in(&directory.path)).take(SOCKETS).collect()
    }

    /// The only server that answers.
    pub async fn find_server(&self) -> Result<Client, FindError> {
        let mut found = self.answering().await?;
        match found.pop() {
            Some((client, _)) if found.is_empty() => Ok(client),
            last => {
                found.extend(last);
                let several = found.into_iter().map(|(client, status)| (client.address().clone(), status));
                Err(FindError::Several(several.collect()))
            }
        }
    }

    /// All servers that answer; one at least.
    pub async fn find_servers(&self) -> Result<Vec<Client>, FindError> {
        Ok(self.answering().await?.into_iter().map(|(client, _)| client).collect())
    }

    async fn answering(&self) -> Result<Vec<(Client, Status)>, FindError> {
        let clients = self.sockets().into_iter().map(|path| Client::new(AdminAddress::Unix(path)));
        let asked = clients.map(|client| async move {
            let answer = client.status().await;
            (client, answer)
        });
        let (mut found, mut silent) = (Vec::new(), Vec::new());
        for (client, answer) in join_all(asked).await {
            match answer {
                Ok((_, status)) => found.push((client, status)),
                // What a dead server left.
                Err(error) if error.is_refused_connection() => {}
                Err(error) => silent.push(error),
            }
        }
        if found.is_empty() {
            let looked_in = self.directories().into_iter().map(|directory| directory.path).collect();
            return Err(FindError::None { looked_in, silent });
        }
        Ok(found)
    }
}

/// The first of a list of paths with colons between them, if it is absolute.
fn first_path(list: &OsString) -> Option<PathBuf> {
    let first = list.as_bytes().split(|byte| *byte == b':').next()?;
    Some(PathBuf::from(std::ffi::OsStr::from_bytes(first))).filter(|path| path.is_absolute())
}

/// Sockets with the names of default ones, by the number of their process. None if the directory cannot be read.
fn sockets_in(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(directory) else { return Vec::new() };
    let number = |path: &PathBuf| {
        let number: u32 = path.file_stem()?.to_str()?.parse().ok()?;
        path.extension().is_some_and(|extension| extension == EXTENSION).then_some(number)
    };
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
    let mut sockets: Vec<_> = paths.filter_map(|path| Some((number(&path)?, path))).take(SOCKETS).collect();
    sockets.sort_unstable();
    sockets.into_iter().map(|(_, path)| path).collect()
}

/// Removes sockets on which nobody listens.
fn remove_dead(directory: &Path) {
    for path in sockets_in(directory).into_iter().filter(|path| is_dead(path)) {
        match fs::remove_file(&path) {
            Ok(()) => tracing::debug!(path = %path.display(), "removed the admin socket of a dead server"),
            Err(error) => tracing::debug!(path = %path.display(), %error, "cannot remove a dead admin socket"),
        }
    }
}

/// Why there is no server to talk to.
#[derive(Debug, Error)]
pub enum FindError {
    /// Nobody answers.
    #[error("{}", describe_none(.looked_in, .silent))]
    None {
        /// Where servers would be.
        looked_in: Vec<PathBuf>,
        /// Sockets that are there and gave no answer, with the reason.
        silent: Vec<CallError>,
    },
    /// More than one.
    #[error("several servers are running, choose one with --at:{}", describe_several(.0))]
    Several(Vec<(AdminAddress, Status)>),
}

fn describe_none(looked_in: &[PathBuf], silent: &[CallError]) -> String {
    let paths: Vec<_> = looked_in.iter().map(|path| path.display().to_string()).collect();
    let mut text = format!("no running server found: looked in {}; --at names another place", paths.join(", "));
    for error in silent {
        text.push_str(&format!("\n  {}", error.chain()));
    }
    text
}

fn describe_several(servers: &[(AdminAddress, Status)]) -> String {
    let line = |(address, status): &(AdminAddress, Status)| {
        let names: Vec<_> = status.images.iter().map(|image| format!("{:?}", image.name)).collect();
        format!("\n  --at {address}  process {}, {} of {}", status.pid, status.role, names.join(", "))
    };
    servers.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn surroundings(unit: Option<&Path>, session: Option<&Path>, user: u32) -> Surroundings {
        let text = |path: Option<&Path>| path.map(|path| path.as_os_str().to_owned());
        Surroundings { unit: text(unit), session: text(session), user }
    }

    fn paths(surroundings: &Surroundings) -> Vec<String> {
        surroundings.directories().iter().map(|directory| directory.path.display().to_string()).collect()
    }

    #[test]
    fn addresses_are_paths_or_hosts_with_a_port() {
        let tcp = |text: &str| Ok(AdminAddress::Tcp(text.to_owned()));
        for (text, address) in [
            ("/run/a.sock", Ok(AdminAddress::Unix("/run/a.sock".into()))),
            ("./a:b", Ok(AdminAddress::Unix("./a:b".into()))),
            ("127.0.0.1:9", tcp("127.0.0.1:9")),
            ("127.9.9.9:0", tcp("127.9.9.9:0")),
            ("[::1]:9", tcp("[::1]:9")),
            ("localhost:9", tcp("localhost:9")),
            ("0.0.0.0:9", tcp("0.0.0.0:9")),
            ("server-2.example:9000", tcp("server-2.example:9000")),
            ("", Err(ParseAdminError)),
            ("a.sock", Err(ParseAdminError)),
            ("127.0.0.1", Err(ParseAdminError)),
            (":9", Err(ParseAdminError)),
            ("::1:9", Err(ParseAdminError)),
            ("a b:9", Err(ParseAdminError)),
            ("a@b:9", Err(ParseAdminError)),
            ("localhost:+9", Err(ParseAdminError)),
            ("localhost:99999", Err(ParseAdminError)),
        ] {
            assert_eq!(text.parse(), address, "{text}");
        }
        let socket = |text: &str| text.parse::<AdminAddress>().unwrap().socket().map(|socket| socket.to_string());
        assert_eq!(socket("localhost:9"), Some("127.0.0.1:9".to_owned()));
        assert_eq!(socket("[::1]:9"), Some("[::1]:9".to_owned()));
        assert_eq!((socket("server2:9"), socket("/run/a.sock")), (None, None));
    }

    #[test]
    fn directories_follow_the_environment() {
        let (unit, session) = (Path::new("/run/unit"), Path::new("/run/user/7"));
        assert_eq!(paths(&surroundings(Some(unit), Some(session), 7)), ["/run/unit"]);
        assert_eq!(
            paths(&surroundings(None, Some(session), 7)),
            [
                "/run/user/7/headwater",
                "/run/headwater",
                "/run/headwater-serve",
                "/run/headwater-mirror",
                "/tmp/headwater-7"
            ]
        );
        let of_root = paths(&surroundings(None, None, 0));
        assert_eq!(of_root, ["/run/headwater", "/run/headwater-serve", "/run/headwater-mirror", "/tmp/headwater-0"]);
        assert_eq!(paths(&surroundings(Some(Path::new("/run/a:/run/b")), None, 0)), ["/run/a"]);
        assert_eq!(paths(&surroundings(Some(Path::new("relative")), None, 7)).len(), 4, "it means nothing");
    }

    #[test]
    fn the_default_place_is_made_and_dead_sockets_in_it_are_removed() {
        let scratch = tempfile::tempdir().unwrap();
        let user = rustix::process::geteuid().as_raw();
        let unit = scratch.path().join("run");
        let place = || surroundings(Some(&unit), None, user).default_place(7);
        assert_eq!(place().unwrap(), AdminAddress::Unix(unit.join("7.sock")));
        assert_eq!(fs::metadata(&unit).unwrap().permissions().mode() & 0o777, 0o700);
        let (dead, alive, other) = (unit.join("5.sock"), unit.join("6.sock"), unit.join("data"));
        drop(std::os::unix::net::UnixListener::bind(&dead).unwrap());
        let _listener = std::os::unix::net::UnixListener::bind(&alive).unwrap();
        fs::write(&other, "data").unwrap();
        place().unwrap();
        assert!(!dead.exists() && alive.exists() && other.exists());
        assert_eq!(sockets_in(&unit), [alive]);
    }

    #[test]
    fn a_directory_that_others_control_is_refused() {
        let scratch = tempfile::tempdir().unwrap();
        let user = rustix::process::geteuid().as_raw();
        let unit = scratch.path().join("run");
        fs::create_dir(&unit).unwrap();
        let place = |user| surroundings(Some(&unit), None, user).default_place(7).map_err(|error| error.to_string());
        fs::set_permissions(&unit, fs::Permissions::from_mode(0o775)).unwrap();
        assert!(place(user).unwrap_err().contains("others may write"));
        fs::set_permissions(&unit, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(place(user).is_ok());
        assert!(place(user + 1).unwrap_err().contains("another user"));
        let link = scratch.path().join("link");
        std::os::unix::fs::symlink(&unit, &link).unwrap();
        let through = surroundings(Some(&link), None, user).default_place(7).map_err(|error| error.to_string());
        assert!(through.unwrap_err().contains("no directory"));
    }
}
