//! What a server and its successor say to each other.
//!
//! ```text
//! successor                          predecessor
//! Hello {form, version, role}  ──▶
//!                              ◀──   Welcome {listening}      or Refused {reason}
//! Ready                        ──▶                            it could start; what it has of its own is there
//!                              ◀──   Sockets (64 at a time), Account (a descriptor)
//! Opened                       ──▶                            or Failed {reason}: the predecessor goes on
//!                              ◀──   Go                       or Stop {reason}
//! ```
//!
//! Until Go the successor touches no client, and from Go on the predecessor does not. An end without Go is a Stop.
//!
//! Owns: the order of these, their bounds, and who may be a successor. Does not own: what either does meanwhile.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::time::timeout;

use super::{Belongings, Estate, EstateError};
use crate::control::listen::is_dead;
use crate::control::status::Role;
use crate::net::link::{Link, LinkListener, MOST_DESCRIPTORS, Message};

/// What is said here. Another number is another order of messages.
const FORM: u32 = 1;
/// How long a successor may take to start.
const STARTING: Duration = Duration::from_secs(60);
/// How long it may take to open the images. Clients wait meanwhile, and give up after 30 seconds.
const OPENING: Duration = Duration::from_secs(10);
/// How long the other one may take to say anything else.
const ANSWER: Duration = Duration::from_secs(5);
/// How long a successor waits for what goes to it. What is under way has its own limit there.
const HANDING_OVER: Duration = Duration::from_secs(40);
/// Characters of a reason that the other one is told.
const LONGEST_REASON: usize = 1000;
/// Sockets that are taken at most.
const MOST_SOCKETS: usize = 1 << 20;

/// One message.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "say", rename_all = "lowercase")]
enum Say {
    Hello { form: u32, version: String, role: Role },
    Welcome { version: String, listening: Vec<Option<String>> },
    Refused { reason: String },
    Ready,
    Sockets,
    Account,
    Opened,
    Failed { reason: String },
    Go,
    Stop { reason: String },
}

/// Why a server is not replaced. Whoever was serving goes on.
#[derive(Debug, Error)]
pub enum TalkError {
    /// The system refused.
    #[error("cannot talk to the other server")]
    System(#[from] io::Error),
    /// It has gone.
    #[error("the other server has gone")]
    Gone,
    /// It takes too long.
    #[error("the other server does not answer")]
    Silent,
    /// It says something else.
    #[error("the other server says something that makes no sense here")]
    Senseless,
    /// The account.
    #[error(transparent)]
    Estate(#[from] EstateError),
    /// It will not.
    #[error("{0}")]
    Refused(String),
    /// Not everybody may replace a server.
    #[error("user {0} may not replace this server: only its own user and root may")]
    Stranger(u32),
    /// Nobody is there.
    #[error(
        "no running server to take over from was found; headwater --takeover=PID names one, and {0} is where they wait"
    )]
    Nobody(String),
    /// Which?
    #[error("several servers are running: name the one to take over from, as in --takeover={0}")]
    Several(u32),
}

async fn say(link: &Link, say: &Say) -> Result<(), TalkError> {
    let bytes = serde_json::to_vec(say).map_err(|_| TalkError::Senseless)?;
    timeout(ANSWER, link.send(&bytes, &[])).await.map_err(|_| TalkError::Silent)?.map_err(gone)
}

fn gone(error: io::Error) -> TalkError {
    match error.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => TalkError::Gone,
        _ => error.into(),
    }
}

async fn hear(link: &Link, limit: Duration) -> Result<(Say, Vec<OwnedFd>), TalkError> {
    let message = timeout(limit, link.receive()).await.map_err(|_| TalkError::Silent)?.map_err(gone)?;
    let Message { bytes, descriptors } = message.ok_or(TalkError::Gone)?;
    match serde_json::from_slice(&bytes).map_err(|_| TalkError::Senseless)? {
        Say::Refused { reason } | Say::Failed { reason } | Say::Stop { reason } => Err(TalkError::Refused(reason)),
        said => Ok((said, descriptors)),
    }
}

/// Where a server waits for successors. Dropped, it removes its socket.
#[derive(Debug)]
pub struct Waiting {
    listener: LinkListener,
    path: PathBuf,
}

impl Waiting {
    /// Waits at `path`, in this thread's runtime.
    pub fn at(path: PathBuf) -> io::Result<Self> {
        if fs::symlink_metadata(&path).is_ok() && is_dead(&path) {
            fs::remove_file(&path)?;
        }
        let listener = LinkListener::bind(&path)?;
        Ok(Self { listener, path })
    }

    /// The next one that asks.
    ///
    /// Cancel safety: nobody is lost.
    pub async fn next(&self) -> io::Result<Link> {
        self.listener.accept().await
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            tracing::debug!(path = %self.path.display(), %error, "cannot remove the socket for successors");
        }
    }
}

/// A successor that has started and waits for what this server has.
#[derive(Debug)]
pub struct Successor {
    link: Link,
    /// The version of its program.
    pub version: String,
}

impl Successor {
    /// Hears a candidate until it is ready. `listening` are the addresses that it need not listen at itself, as
    /// [`Predecessor::listening`] has them.
    ///
    /// Cancel safety: the candidate is sent away.
    pub async fn hear(link: Link, role: Role, listening: &[Option<String>]) -> Result<Self, TalkError> {
        let (user, own) = (link.peer_user()?, rustix::process::geteuid().as_raw());
        if user != own && user != 0 {
            return Err(TalkError::Stranger(user));
        }
        let (said, _) = hear(&link, STARTING).await?;
        let Say::Hello { form, version, role: theirs } = said else { return Err(TalkError::Senseless) };
        let refuse = |reason: String| async {
            // What it is told is the reason anyway.
            let _ = say(&link, &Say::Refused { reason: reason.clone() }).await;
            Err(TalkError::Refused(reason))
        };
        if form != FORM {
            return refuse(format!("this server talks to successors in form {FORM}, not {form}")).await;
        }
        if theirs != role {
            return refuse(format!("this server is a headwater {role}, and its successor a headwater {theirs}")).await;
        }
        let welcome = Say::Welcome { version: env!("CARGO_PKG_VERSION").to_owned(), listening: listening.to_vec() };
        say(&link, &welcome).await?;
        match hear(&link, STARTING).await? {
            (Say::Ready, _) => Ok(Self { link, version }),
            _ => Err(TalkError::Senseless),
        }
    }

    /// The number of its process.
    pub fn process(&self) -> Option<u32> {
        self.link.peer_process()
    }

    /// Gives it everything, and waits until it has opened its images. [`Self::go`] or [`Self::stop`] is to follow.
    pub async fn give(&self, belongings: &Belongings) -> Result<(), TalkError> {
        let bytes = serde_json::to_vec(&Say::Sockets).map_err(|_| TalkError::Senseless)?;
        for some in belongings.sockets(true).chunks(MOST_DESCRIPTORS) {
            timeout(ANSWER, self.link.send(&bytes, some)).await.map_err(|_| TalkError::Silent)?.map_err(gone)?;
        }
        let account = belongings.estate().write()?;
        let bytes = serde_json::to_vec(&Say::Account).map_err(|_| TalkError::Senseless)?;
        let sent = timeout(ANSWER, self.link.send(&bytes, &[account.as_fd()])).await;
        sent.map_err(|_| TalkError::Silent)?.map_err(gone)?;
        match hear(&self.link, OPENING).await? {
            (Say::Opened, _) => Ok(()),
            _ => Err(TalkError::Senseless),
        }
    }

    /// From here on the clients are its own.
    pub async fn go(self) -> Result<(), TalkError> {
        say(&self.link, &Say::Go).await
    }

    /// Sends it away, and waits until it has gone: it may have the images open.
    pub async fn stop(self, reason: &str) {
        let gone = async {
            // It may have gone already, or say something that does not matter any more.
            let _ = say(&self.link, &Say::Stop { reason: reason.to_owned() }).await;
            while self.link.receive().await.is_ok_and(|message| message.is_some()) {}
        };
        if timeout(ANSWER, gone).await.is_err() {
            tracing::warn!(process = self.process(), "the successor was sent away and stays");
        }
    }
}

/// The server that this one is to replace.
#[derive(Debug)]
pub struct Predecessor {
    link: Link,
    /// The version of its program.
    pub version: String,
    /// The addresses that it listens at, as they were written, whose sockets come from it; `None` stands for one of the
    /// service manager.
    pub listening: Vec<Option<String>>,
}

impl Predecessor {
    /// Asks the server at the other end of `link`.
    pub async fn ask(link: Link, role: Role) -> Result<Self, TalkError> {
        let version = env!("CARGO_PKG_VERSION").to_owned();
        say(&link, &Say::Hello { form: FORM, version, role }).await?;
        match hear(&link, ANSWER).await? {
            (Say::Welcome { version, listening }, _) => Ok(Self { link, version, listening }),
            _ => Err(TalkError::Senseless),
        }
    }

    /// Its process.
    pub fn process(&self) -> Option<u32> {
        self.link.peer_process()
    }

    /// Says that this server could start, and waits for everything. The images are closed there then.
    pub async fn take(&self) -> Result<Belongings, TalkError> {
        say(&self.link, &Say::Ready).await?;
        let mut sockets = Vec::new();
        loop {
            match hear(&self.link, HANDING_OVER).await? {
                (Say::Sockets, some) if sockets.len() + some.len() <= MOST_SOCKETS => sockets.extend(some),
                (Say::Account, mut account) => {
                    let account = account.pop().ok_or(TalkError::Senseless)?;
                    return Ok(Belongings::from_parts(Estate::read(account)?, sockets));
                }
                _ => return Err(TalkError::Senseless),
            }
        }
    }

    /// Says that the images are open, and waits for the word.
    pub async fn opened(&self) -> Result<(), TalkError> {
        say(&self.link, &Say::Opened).await?;
        match hear(&self.link, ANSWER).await? {
            (Say::Go, _) => Ok(()),
            _ => Err(TalkError::Senseless),
        }
    }

    /// Says that this server cannot go on.
    pub async fn failed(&self, reason: String) {
        // It may have gone.
        let reason = reason.chars().take(LONGEST_REASON).collect();
        let _ = say(&self.link, &Say::Failed { reason }).await;
    }
}

/// The way to a server that waits at `path`, which may be the number of its process; or to the only one at `places`.
pub fn reach(wanted: Option<&Path>, places: &[PathBuf]) -> Result<Link, TalkError> {
    let number = wanted.and_then(|wanted| wanted.to_str()?.parse::<u32>().ok());
    if let (Some(path), None) = (wanted, number) {
        return Ok(Link::connect(path)?);
    }
    let process = |path: &Path| path.file_stem()?.to_str()?.parse::<u32>().ok();
    let mut found = Vec::new();
    for path in places {
        if number.is_none() || number == process(path) {
            found.extend(Link::connect(path).ok().map(|link| (link, process(path))));
        }
    }
    match found.pop() {
        Some((link, _)) if found.is_empty() => Ok(link),
        Some((_, process)) => Err(TalkError::Several(process.unwrap_or_default())),
        None => {
            let directories: Vec<_> = places.iter().filter_map(|path| path.parent()).collect();
            let place =
                directories.first().map_or_else(|| "the runtime directory".into(), |path| path.display().to_string());
            Err(TalkError::Nobody(place))
        }
    }
}

/// Reads arbitrary bytes as a message.
#[doc(hidden)]
pub fn fuzz(data: &[u8]) {
    if let Ok(said) = serde_json::from_slice::<Say>(data) {
        assert!(serde_json::to_vec(&said).is_ok());
    }
}
