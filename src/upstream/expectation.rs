//! What a server must be, and what is told when it is something else.

use super::OpenError;
use super::opening::OpenFailure;
use super::pool::{Pool, Stage};
use crate::error::{Error, ErrorKind};
use crate::export::{Facts, ImageId, NodeId};
use crate::nbd::Uri;

/// What a server must be to be used. What is `None` is not held against it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Expectation {
    /// The size of the export.
    pub size: Option<u64>,
    /// What the image holds, held against servers that know it.
    pub identity: Option<ImageId>,
    /// The mirror that must not be on the way to the server's bytes: ourselves.
    pub not_through: Option<NodeId>,
}

impl Expectation {
    /// Holds a server against it.
    pub(super) fn check(&self, facts: &Facts) -> Result<(), OpenFailure> {
        if let (Some(expected), Some(found)) = (self.identity, facts.identity)
            && found != expected
        {
            return Err(OpenFailure::OtherImage { found, expected });
        }
        if let Some(expected) = self.size
            && facts.size != expected
        {
            return Err(OpenFailure::OtherSize { found: facts.size, expected });
        }
        if self.not_through.is_some_and(|node| facts.path.contains(&node)) {
            return Err(OpenFailure::Loop);
        }
        Ok(())
    }
}

/// A server that has another image than is expected of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changed {
    /// The server.
    pub uri: Uri,
    /// What it says of its image now: another size or another identity.
    pub facts: Facts,
}

impl OpenError {
    /// What requests end with when every server answers, and none has the image any more.
    pub(super) fn other_image(&self) -> Option<Error> {
        if !self.failures.iter().all(|(_, failure)| failure.is_final()) {
            return None;
        }
        let message = self.failures.iter().find_map(|(_, failure)| match failure {
            OpenFailure::OtherImage { found, expected } => Some(format!("{found}, not {expected}")),
            OpenFailure::OtherSize { found, expected } => Some(format!("{found} bytes, not {expected}")),
            _ => None,
        })?;
        Some(Error::new(ErrorKind::Io, format!("the upstream has another image now: {message}")))
    }
}

impl OpenFailure {
    /// Whether the server has another image than is expected.
    pub(super) const fn is_other_image(&self) -> bool {
        matches!(self, Self::OtherImage { .. } | Self::OtherSize { .. })
    }
}

impl Pool {
    /// Holds what a server says of its image against what is expected, and tells those who want to know when that
    /// changes.
    pub(super) fn admit(&self, server: usize, facts: &Facts) -> Result<(), OpenFailure> {
        let verdict = self.common.terms().expectation.check(facts);
        // What a pool says that is not in use is of interest to nobody but whoever asks.
        if self.state().stage != Stage::InUse {
            return verdict;
        }
        let uri = self.uri(server);
        let other = verdict.as_ref().is_err_and(OpenFailure::is_other_image);
        let is_news = self.common.changed.send_if_modified(|list| {
            let known = list.iter().position(|changed| changed.uri == *uri);
            match known {
                Some(index) if !other => drop(list.remove(index)),
                None if !other => return false,
                Some(index) if is_same(&list[index].facts, facts) => return false,
                Some(index) => list[index].facts = facts.clone(),
                None => list.push(Changed { uri: uri.clone(), facts: facts.clone() }),
            }
            true
        });
        if let (true, Err(reason)) = (is_news, &verdict) {
            tracing::warn!(%uri, %reason, "the upstream has another image now");
        }
        verdict
    }
}

/// Whether both say the same image.
fn is_same(one: &Facts, other: &Facts) -> bool {
    (one.size, one.identity) == (other.size, other.identity)
}
