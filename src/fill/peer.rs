//! Another mirror as a source of bytes, which may be gone any time.
//!
//! Owns: not asking a peer again for a while that has failed: what it does not give, the image's own upstream does, and
//! that is no worse than having no peers.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::clock;
use crate::error::{Error, ErrorKind, Result};
use crate::export::{Export, Facts, LocalFuture, Piece, SharedExport};
use crate::ranges::ByteRange;

/// A peer that failed is not asked for so long.
const PAUSE: Duration = Duration::from_secs(30);

/// A peer.
#[derive(Debug)]
pub struct Peer {
    below: SharedExport,
    shunned: Mutex<Option<Instant>>,
}

impl Peer {
    /// The peer `below`.
    pub const fn new(below: SharedExport) -> Self {
        Self { below, shunned: Mutex::new(None) }
    }

    fn is_shunned(&self) -> bool {
        let shunned = *self.shunned.lock().unwrap_or_else(PoisonError::into_inner);
        shunned.is_some_and(|until| until > clock::now())
    }
}

impl Export for Peer {
    fn facts(&self) -> Facts {
        self.below.facts()
    }

    fn read(&self, range: ByteRange) -> LocalFuture<'_, Result<Vec<Piece>>> {
        Box::pin(async move {
            if self.is_shunned() {
                return Err(Error::new(ErrorKind::Unavailable, "the peer failed a moment ago"));
            }
            let answer = self.below.read(range).await;
            if answer.is_err() {
                *self.shunned.lock().unwrap_or_else(PoisonError::into_inner) = Some(clock::now() + PAUSE);
            }
            answer
        })
    }
}
