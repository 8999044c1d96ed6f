//! Reads whose bytes are checked: whom to ask when they are wrong.
//!
//! The first try is an ordinary read. If its bytes are wrong, all of them are asked for again, from one server alone at
//! a time, so that it is known who sent what: first from servers that have not been asked for these bytes, the trusted
//! ones before those that are set aside. A server that cannot be reached meanwhile is waited for, as with any request;
//! one that has answered wrongly [`MOST`] times has said what it has to say.

use tokio::time::{Instant, sleep_until, timeout_at};

use super::pool::{Attempt, Pool, backoff};
use super::{Remote, joined, read_of, requests, to_pieces};
use crate::error::{Error, ErrorKind, Result};
use crate::export::{Check, Piece, wrong_bytes};
use crate::ranges::ByteRange;

use bytes::Bytes;
use futures_util::future::try_join_all;

/// Wrong replies, and errors, that one server may give to one read. A server whose every 200th reply is wrong fails
/// one read in a billion.
const MOST: u32 = 4;

/// What one server did for one read.
#[derive(Debug, Default, Clone)]
struct Tried {
    wrong: u32,
    errors: u32,
    /// Times that it did not answer.
    silences: u32,
    /// It has another image: asking again is of no use.
    is_other: bool,
}

impl Tried {
    const fn count(&self) -> u32 {
        self.wrong + self.errors + self.silences
    }

    const fn may_be_asked(&self) -> bool {
        self.wrong < MOST && self.errors < MOST && !self.is_other
    }
}

/// Why a read from one server brought nothing to check.
#[derive(Debug)]
struct Miss {
    kind: MissKind,
    reason: String,
}

#[derive(Debug)]
enum MissKind {
    Error,
    Silence,
    OtherImage,
}

impl Remote {
    /// Reads what passes `check`.
    pub(super) async fn read_checked(&self, range: ByteRange, check: &Check<'_>) -> Result<Vec<Piece>> {
        let deadline = Instant::now() + self.patience;
        let (pieces, servers) = self.read_until(range, deadline).await?;
        if range.is_empty() || check(&pieces) {
            return Ok(pieces);
        }
        drop(pieces);
        let mut tried = vec![Tried::default(); self.pool.order().len()];
        // Of several it cannot be said which one was wrong.
        if let [server] = servers[..] {
            self.pool.lied(server, range);
            tried[server].wrong += 1;
        }
        self.read_again(range, check, tried, deadline).await
    }

    async fn read_again(
        &self,
        range: ByteRange,
        check: &Check<'_>,
        mut tried: Vec<Tried>,
        deadline: Instant,
    ) -> Result<Vec<Piece>> {
        let mut last = None;
        loop {
            let candidates = self.pool.order().into_iter().filter(|server| tried[*server].may_be_asked());
            let Some(server) = candidates.min_by_key(|server| tried[*server].count()) else {
                return Err(self.no_right_bytes(ErrorKind::Io, range, &tried, last));
            };
            let pause = match tried[server].errors + tried[server].silences {
                0 => Instant::now(),
                failures => Instant::now() + backoff(failures),
            };
            if pause > deadline || timeout_at(deadline, sleep_until(pause)).await.is_err() {
                return Err(self.no_right_bytes(ErrorKind::Unavailable, range, &tried, last));
            }
            self.pool.stats.retries.add(1);
            let tried = &mut tried[server];
            match self.read_at(server, range, deadline).await {
                Ok(pieces) if check(&pieces) => return Ok(pieces),
                Ok(_) => {
                    self.pool.lied(server, range);
                    tried.wrong += 1;
                }
                Err(Miss { kind, reason }) => {
                    match kind {
                        MissKind::Error => tried.errors += 1,
                        MissKind::Silence => tried.silences += 1,
                        MissKind::OtherImage => tried.is_other = true,
                    }
                    last = Some(format!("{}: {reason}", self.pool.uri(server)));
                }
            }
        }
    }

    /// Reads `range` once, over one connection to `server`.
    async fn read_at(&self, server: usize, range: ByteRange, deadline: Instant) -> Result<Vec<Piece>, Miss> {
        let handle = timeout_at(deadline, Pool::handle_at(&self.pool, server)).await;
        let handle = match handle {
            Ok(Ok(handle)) => handle,
            Ok(Err(unusable)) => {
                let kind = if unusable.is_final { MissKind::OtherImage } else { MissKind::Silence };
                return Err(Miss { kind, reason: unusable.reason });
            }
            Err(_) => return Err(Miss { kind: MissKind::Silence, reason: "no connection in time".into() }),
        };
        let parts = requests(range, handle.agreed.block_sizes, handle.agreed.size).map(|part| {
            let handle = &handle;
            async move {
                let answer = self.pool.ask(handle, read_of(part), Bytes::new(), deadline).await?;
                to_pieces(part, answer, range).map_err(|error| Attempt::Refused { server, error })
            }
        });
        let (kind, reason) = match try_join_all(parts).await {
            Ok(parts) => return Ok(joined(parts)),
            // It is sending, only not fast enough: no reason for others to leave it.
            Err(Attempt::Late) => return Err(Miss { kind: MissKind::Silence, reason: "too slow".into() }),
            Err(Attempt::Refused { error, .. }) if error.kind() != ErrorKind::Shutdown => {
                (MissKind::Error, error.chain())
            }
            Err(Attempt::Refused { error, .. }) => (MissKind::Silence, error.chain()),
            Err(Attempt::Lost { .. }) => (MissKind::Silence, "the connection was lost".into()),
            Err(_) => (MissKind::Silence, "it does not answer".into()),
        };
        // Others need not find out for themselves.
        if self.pool.has_alternatives() {
            self.pool.fail_over(server, &reason);
        }
        Err(Miss { kind, reason })
    }

    fn no_right_bytes(&self, kind: ErrorKind, range: ByteRange, tried: &[Tried], last: Option<String>) -> Error {
        let liars = tried.iter().enumerate().filter(|(_, tried)| tried.wrong > 0);
        let liars = liars.map(|(server, tried)| format!("{} sent others {} times", self.pool.uri(server), tried.wrong));
        let reasons: Vec<_> = std::iter::once(wrong_bytes(range).to_string()).chain(liars).chain(last).collect();
        Error::new(kind, reasons.join("; "))
    }
}
