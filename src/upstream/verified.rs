//! Reads whose bytes are checked: whom to ask when they are wrong.
//!
//! The first try is an ordinary read. If its bytes are wrong, all of them are asked for again, from one server alone at
//! a time, so that it is known who sent what: first from servers that have not been asked for these bytes, the trusted
//! ones before those that are set aside. A server that cannot be reached meanwhile is waited for, as with any request;
//! one that has answered wrongly [`MOST`] times has said what it has to say.
//!
//! Servers have numbers in their pool. When that is replaced by another, the read goes on with the servers of the new
//! one; those that were in both keep what they have done.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::try_join_all;
use tokio::time::{Instant, sleep_until, timeout_at};

use super::pool::{Attempt, Pool, backoff};
use super::server::Server;
use super::{Remote, joined, read_of, requests, to_pieces};
use crate::error::{Error, ErrorKind, Result};
use crate::export::{Check, Piece, wrong_bytes};
use crate::ranges::ByteRange;

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
    /// It is none of the servers any more, or need not be.
    Left,
}

/// What the servers of one pool did for one read.
struct Round {
    pool: Arc<Pool>,
    /// By the number of the server.
    tried: Vec<Tried>,
}

impl Round {
    fn new(pool: Arc<Pool>) -> Self {
        let tried = vec![Tried::default(); pool.servers.len()];
        Self { pool, tried }
    }

    fn number_of(&self, server: &Arc<Server>) -> Option<usize> {
        self.pool.servers.iter().position(|other| Arc::ptr_eq(other, server))
    }

    /// The server sent other bytes than those of the image.
    fn lied(&mut self, server: usize, range: ByteRange) {
        self.pool.lied(server, range);
        self.tried[server].wrong += 1;
    }

    /// Goes on with the servers of another pool.
    fn turn_to(&mut self, pool: Arc<Pool>) {
        let mut next = Self::new(pool);
        for (server, tried) in self.pool.servers.iter().zip(&self.tried) {
            if let Some(number) = next.number_of(server) {
                next.tried[number] = tried.clone();
            }
        }
        *self = next;
    }
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
        let mut round = Round::new(self.pool());
        // Of several it cannot be said which one was wrong. One that has been left since is not asked again.
        if let [server] = &servers[..]
            && let Some(number) = round.number_of(server)
        {
            round.lied(number, range);
        }
        self.read_again(range, check, round, deadline).await
    }

    async fn read_again(
        &self,
        range: ByteRange,
        check: &Check<'_>,
        mut round: Round,
        deadline: Instant,
    ) -> Result<Vec<Piece>> {
        let mut last = None;
        loop {
            if round.pool.was_left() {
                round.turn_to(self.pool());
            }
            let candidates = round.pool.order().into_iter().filter(|server| round.tried[*server].may_be_asked());
            let Some(server) = candidates.min_by_key(|server| round.tried[*server].count()) else {
                return Err(no_right_bytes(ErrorKind::Io, range, &round, last));
            };
            let pause = match round.tried[server].errors + round.tried[server].silences {
                0 => Instant::now(),
                failures => Instant::now() + backoff(failures),
            };
            if pause > deadline || timeout_at(deadline, sleep_until(pause)).await.is_err() {
                return Err(no_right_bytes(ErrorKind::Unavailable, range, &round, last));
            }
            self.note_retry(&round.pool.servers[server]);
            match Self::read_at(&round.pool, server, range, deadline).await {
                Ok(pieces) if check(&pieces) => return Ok(pieces),
                Ok(_) => round.lied(server, range),
                Err(Miss { kind, reason }) => {
                    let tried = &mut round.tried[server];
                    match kind {
                        MissKind::Error => tried.errors += 1,
                        MissKind::Silence => tried.silences += 1,
                        MissKind::OtherImage => tried.is_other = true,
                        MissKind::Left => {}
                    }
                    last = Some(format!("{}: {reason}", round.pool.uri(server)));
                }
            }
        }
    }

    /// Reads `range` once, over one connection to `server`.
    async fn read_at(pool: &Arc<Pool>, server: usize, range: ByteRange, deadline: Instant) -> Result<Vec<Piece>, Miss> {
        let handle = timeout_at(deadline, pool.unless_left(Pool::handle_at(pool, server))).await;
        let handle = match handle {
            Ok(Some(Ok(handle))) => handle,
            Ok(None) => return Err(Miss { kind: MissKind::Left, reason: "other servers are used now".into() }),
            Ok(Some(Err(unusable))) => {
                let kind = if unusable.is_final { MissKind::OtherImage } else { MissKind::Silence };
                return Err(Miss { kind, reason: unusable.reason });
            }
            Err(_) => return Err(Miss { kind: MissKind::Silence, reason: "no connection in time".into() }),
        };
        let parts = requests(range, handle.agreed.block_sizes, handle.agreed.size).map(|part| {
            let handle = &handle;
            async move {
                let answer = pool.ask(handle, read_of(part), Bytes::new(), deadline).await?;
                to_pieces(part, answer, range).map_err(|error| Attempt::Refused { server, error })
            }
        });
        let (kind, reason) = match try_join_all(parts).await {
            Ok(parts) => return Ok(joined(parts)),
            // The others have not been asked.
            Err(_) if pool.was_left() => (MissKind::Left, "other servers are used now".into()),
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
        if pool.has_alternatives() {
            pool.fail_over(server, &reason);
        }
        Err(Miss { kind, reason })
    }
}

fn no_right_bytes(kind: ErrorKind, range: ByteRange, round: &Round, last: Option<String>) -> Error {
    let liars = round.tried.iter().enumerate().filter(|(_, tried)| tried.wrong > 0);
    let liars = liars.map(|(server, tried)| format!("{} sent others {} times", round.pool.uri(server), tried.wrong));
    let reasons: Vec<_> = std::iter::once(wrong_bytes(range).to_string()).chain(liars).chain(last).collect();
    Error::new(kind, reasons.join("; "))
}
