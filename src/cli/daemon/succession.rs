//! Where a server comes from, and who comes after it.
//!
//! Owns: finding a predecessor or what one has left, waiting for successors, starting one (SIGUSR2). Does not own: what
//! is said between them (`control::takeover`), and what a server does before and after (`daemon`).

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::process::{Command, Stdio};

use anyhow::Context;

use crate::control::place::Surroundings;
use crate::control::status::Role;
use crate::control::takeover::talk::{Predecessor, Successor, TalkError, Waiting, reach};
use crate::control::takeover::{Belongings, Inherited, manager};
use crate::net::Listener;
use crate::net::link::{self, Link};

/// The name of the flag, and what it says to a successor that was started by its predecessor.
const FLAG: &str = "--takeover";
const BY_STANDARD_INPUT: &str = "-";

/// Where a server comes from.
pub(super) enum Origin {
    /// Nowhere; the service manager may have opened sockets for it.
    Nowhere { managers: Vec<OwnedFd> },
    /// A server that runs.
    Predecessor { predecessor: Predecessor, managers: Vec<OwnedFd> },
    /// One that has ended, or could not be replaced.
    Left { belongings: Box<Belongings>, managers: Vec<OwnedFd> },
}

impl Origin {
    /// That of this process. To be called once.
    pub(super) async fn of_process(takeover: Option<&Option<PathBuf>>, role: Role) -> anyhow::Result<Self> {
        let given = link::inherited().context("cannot take the service manager's sockets")?;
        let (stored, managers) = manager::find(given);
        if let Some(takeover) = takeover {
            let predecessor = ask(takeover.as_deref(), role).await.context("cannot take over")?;
            return Ok(Self::Predecessor { predecessor, managers });
        }
        Ok(match stored {
            Some(Ok(belongings)) => Self::Left { belongings: Box::new(belongings), managers },
            Some(Err(error)) => {
                tracing::error!(error = %chain(error), "connections that were kept are lost");
                Self::Nowhere { managers }
            }
            None => Self::Nowhere { managers },
        })
    }

    /// The addresses at which it need not begin to listen; `None` stands for those of the service manager.
    pub(super) fn listening(&self) -> Vec<Option<String>> {
        let (mut opened, managers) = match self {
            Self::Nowhere { managers } => (Vec::new(), managers),
            Self::Predecessor { predecessor, managers } => (predecessor.listening.clone(), managers),
            Self::Left { belongings, managers } => {
                let listeners = belongings.estate().listeners.iter();
                (listeners.map(|(_, listening)| listening.asked.clone()).collect(), managers)
            }
        };
        opened.extend(managers.iter().map(|_| None));
        opened
    }

    /// What it begins with. A predecessor has closed its images then, and waits to hear how this one gets on.
    pub(super) async fn take(self) -> anyhow::Result<(Inherited, Option<Predecessor>)> {
        let (managers, mut inherited, predecessor) = match self {
            Self::Nowhere { managers } => (managers, Inherited::default(), None),
            Self::Left { belongings, managers } => (managers, belongings.unpack()?, None),
            Self::Predecessor { predecessor, managers } => {
                let belongings = predecessor.take().await.context("cannot take over")?;
                (managers, belongings.unpack()?, Some(predecessor))
            }
        };
        for socket in managers {
            inherited.listeners.extend(Listener::from_fd(socket, None)?.ok());
        }
        Ok((inherited, predecessor))
    }
}

/// Asks the server that was named, or the only one there is.
async fn ask(takeover: Option<&Path>, role: Role) -> Result<Predecessor, TalkError> {
    if takeover == Some(Path::new(BY_STANDARD_INPUT)) {
        let link = Link::from_fd(std::io::stdin().as_fd().try_clone_to_owned()?)?;
        return Predecessor::ask(link, role).await;
    }
    Predecessor::ask(reach(takeover, &Surroundings::of_process().takeover_places())?, role).await
}

type Hearing = Pin<Box<dyn Future<Output = Result<Successor, TalkError>>>>;

/// Who may come after this server: one candidate at a time is heard, while it serves.
pub(super) struct Succession {
    role: Role,
    waiting: Option<Waiting>,
    hearing: Option<Hearing>,
}

impl Succession {
    /// Of a server of this kind.
    pub(super) const fn new(role: Role) -> Self {
        Self { role, waiting: None, hearing: None }
    }

    /// Waits for candidates where they look for this server. Without such a place SIGUSR2 is left.
    pub(super) fn open(&mut self) {
        if self.waiting.is_some() {
            return;
        }
        let place = Surroundings::of_process().takeover_place(std::process::id());
        match place.and_then(Waiting::at) {
            Ok(waiting) => self.waiting = Some(waiting),
            Err(error) => tracing::debug!(%error, "no place for successors"),
        }
    }

    /// Starts a successor: the program that is at the place of this one now, with the same arguments.
    pub(super) fn begin(&mut self, listening: &[Option<String>]) {
        match start_successor() {
            Ok(link) => self.hear(link, listening),
            Err(error) => {
                tracing::error!(error = format!("{error:#}"), "cannot start a successor: this server goes on")
            }
        }
    }

    fn hear(&mut self, link: Link, listening: &[Option<String>]) {
        let (role, listening) = (self.role, listening.to_vec());
        tracing::info!(process = link.peer_process(), "another server wants to take over");
        self.hearing = Some(Box::pin(async move { Successor::hear(link, role, &listening).await }));
    }

    /// A successor that has started.
    ///
    /// Cancel safety: no candidate is lost.
    pub(super) async fn next(&mut self, listening: &[Option<String>]) -> Successor {
        loop {
            let Self { waiting, hearing, .. } = self;
            let heard = async {
                match hearing {
                    Some(hearing) => hearing.await,
                    None => std::future::pending().await,
                }
            };
            let candidate = async {
                match waiting {
                    Some(waiting) => waiting.next().await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                heard = heard => {
                    self.hearing = None;
                    match heard {
                        Ok(successor) => return successor,
                        Err(error) => tracing::error!(error = %chain(error), "the successor could not start: this server goes on"),
                    }
                }
                candidate = candidate => match candidate {
                    Ok(link) if self.hearing.is_none() => self.hear(link, listening),
                    Ok(_) => tracing::warn!("another server wants to take over already: the second is sent away"),
                    Err(error) => {
                        tracing::warn!(%error, "cannot hear successors any more");
                        self.waiting = None;
                    }
                },
            }
        }
    }
}

/// The program may have been replaced since this process began; then the path of the old one is marked.
fn program() -> std::io::Result<PathBuf> {
    let path = std::env::current_exe()?;
    let text = path.to_string_lossy();
    Ok(match text.strip_suffix(" (deleted)") {
        Some(path) if !std::fs::exists(&*text).unwrap_or(false) => path.into(),
        _ => path,
    })
}

fn start_successor() -> anyhow::Result<Link> {
    let (ours, theirs) = Link::pair()?;
    let program = program()?;
    let arguments = std::env::args_os().skip(1).filter(|argument| !argument.to_string_lossy().starts_with(FLAG));
    let mut child = Command::new(&program)
        .args(arguments)
        .arg(format!("{FLAG}={BY_STANDARD_INPUT}"))
        .stdin(Stdio::from(theirs))
        .spawn()
        .with_context(|| format!("cannot start {}", program.display()))?;
    // Somebody must take note of its end, else it stays in the table of processes for as long as this one lives.
    std::thread::Builder::new().name("successor".into()).spawn(move || child.wait())?;
    Ok(ours)
}

/// An error and its causes, as one line.
pub(super) fn chain(error: impl Into<anyhow::Error>) -> String {
    format!("{:#}", error.into())
}
