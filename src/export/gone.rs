//! An image that no server is known to have any more: what a mirror of it holds can be read, and nothing else.

use super::{Export, Facts, LocalFuture, Piece};
use crate::error::{Error, ErrorKind, Result};
use crate::ranges::ByteRange;

/// An export of which only the facts are left. All reads fail.
#[derive(Debug)]
pub struct Gone(Facts);

impl Gone {
    /// What is left of the export with these facts.
    pub const fn new(facts: Facts) -> Self {
        Self(facts)
    }
}

impl Export for Gone {
    fn facts(&self) -> Facts {
        self.0.clone()
    }

    fn read(&self, _: ByteRange) -> LocalFuture<'_, Result<Vec<Piece>>> {
        let error = Error::new(ErrorKind::Io, "the upstream does not have this image any more");
        Box::pin(std::future::ready(Err(error)))
    }
}
