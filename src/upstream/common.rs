//! What stays when the servers of a remote are replaced by others.
//!
//! Owns: counters, the facts of the export, what servers are held against, who we say we are, and those who watch. Does
//! not own: servers and connections (`pool`).

use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use tokio::sync::watch;

use super::trust::Rules;
use super::{Changed, Expectation, Settings, Stats};
use crate::export::{Facts, NodeId};
use crate::nbd::Uri;

/// Who servers are told that we are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Role {
    /// A client like any other.
    #[default]
    Plain,
    /// A server that asks for clients of its own, which it relays.
    Relay,
    /// A mirror: its servers need not learn from what it reads. It has no name yet: see [`super::Remote::expect`].
    Mirror,
    /// The mirror with this name.
    Named(NodeId),
}

impl Role {
    /// The name of the mirror, if it has one.
    pub const fn node(self) -> Option<NodeId> {
        match self {
            Self::Named(node) => Some(node),
            Self::Plain | Self::Relay | Self::Mirror => None,
        }
    }
}

/// Where requests go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// The server; `None` before there ever was a connection, or if there are no servers.
    pub uri: Option<Uri>,
    /// Whether that server said, when it was connected to last, that it tells news.
    pub tells_news: bool,
}

/// What may change while a remote is in use.
#[derive(Debug, Clone, Copy)]
pub(super) struct Terms {
    pub(super) expectation: Expectation,
    pub(super) role: Role,
    pub(super) rules: Rules,
}

#[derive(Debug)]
pub(super) struct Common {
    pub(super) settings: Settings,
    /// Connections that outlive the remote may still add to them.
    pub(super) stats: Arc<Stats>,
    /// As of the last connection to the current server.
    facts: RwLock<Facts>,
    /// Locked for a moment, also by whoever has locked a pool.
    terms: Mutex<Terms>,
    /// The servers that have another image than is expected.
    pub(super) changed: watch::Sender<Vec<Changed>>,
    pub(super) place: watch::Sender<Place>,
}

impl Common {
    pub(super) fn new(facts: Facts, expectation: Expectation, settings: Settings) -> Self {
        let terms = Terms { expectation, role: settings.role, rules: Rules::default() };
        Self {
            settings,
            stats: Arc::default(),
            facts: RwLock::new(facts),
            terms: Mutex::new(terms),
            changed: watch::Sender::default(),
            place: watch::Sender::new(Place { uri: None, tells_news: false }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Terms> {
        self.terms.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn terms(&self) -> Terms {
        *self.lock()
    }

    pub(super) fn change_terms(&self, change: impl FnOnce(&mut Terms)) {
        change(&mut self.lock());
    }

    /// A look at the facts.
    pub(super) fn with_facts<T>(&self, look: impl FnOnce(&Facts) -> T) -> T {
        look(&self.facts.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(super) fn set_facts(&self, facts: Facts) {
        *self.facts.write().unwrap_or_else(PoisonError::into_inner) = facts;
    }

    /// Tells those who watch where requests go now.
    pub(super) fn publish(&self, uri: &Uri, tells_news: bool) {
        self.place.send_if_modified(|place| {
            let is_news = place.uri.as_ref() != Some(uri) || place.tells_news != tells_news;
            if is_news {
                *place = Place { uri: Some(uri.clone()), tells_news };
            }
            is_news
        });
    }
}
