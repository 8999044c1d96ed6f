//! An export of another server, as an export here.
//!
//! | file | holds |
//! | --- | --- |
//! | this one | [`Remote`]: requests, split, retried, mapped to and from the protocol |
//! | `pool` | connections: opening, sharing, losing, failing over |
//! | `connection` | one connection: negotiation, requests in flight, replies |
//!
//! Owns: everything that makes a server on the network dependable: several connections with pipelined requests, a
//! list of servers of which the next is tried when one fails, patience with an end. Does not own: what is done with
//! the bytes, and whether they are true beyond what the protocol can say.
//!
//! **Time.** A request is tried again, on a new connection or another server, until its patience is at an end; then
//! it fails with an I/O error. So the patience here must stay under the time-out of whoever asks.

mod connection;
mod pool;
#[cfg(test)]
mod tests;

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::try_join_all;
use thiserror::Error;
use tokio::time::Instant;

use crate::error::{Error, ErrorKind, Result};
use crate::export::{Context, Export, Facts, ImageId, LocalFuture, NodeId, Piece, push_extent, push_piece};
use crate::nbd::client::{Answer, Request};
use crate::nbd::request::{Durability, ZeroMode};
use crate::nbd::wire::{CommandFlags, MAX_PAYLOAD_BYTES, command};
use crate::nbd::{Extent, Uri};
use crate::ranges::ByteRange;
use crate::telemetry::Counter;
use crate::units::{to_u64, to_usize};
pub use connection::{OpenFailure, inspect, list};
use pool::{Attempt, Pool};

/// What an operator may set.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Connections to the server, over all workers. More than one only if the server allows it.
    pub connections: usize,
    /// How long opening one connection, negotiation included, may take.
    pub connect_timeout: Duration,
    /// How long a connection with requests in flight may bring nothing before it is given up.
    pub stall_timeout: Duration,
    /// How long a request is tried before it fails.
    pub patience: Duration,
}

impl Default for Settings {
    /// Requests fail after 25 seconds: under the 30 seconds after which clients commonly give up.
    fn default() -> Self {
        Self {
            connections: 4,
            connect_timeout: Duration::from_secs(5),
            stall_timeout: Duration::from_secs(10),
            patience: Duration::from_secs(25),
        }
    }
}

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

/// How much came over.
#[derive(Debug, Default)]
pub struct Stats {
    /// Bytes of data received, holes not counted.
    pub received_bytes: Counter,
    /// Requests answered.
    pub requests: Counter,
    /// Connections opened.
    pub connections: Counter,
    /// Requests that were tried again.
    pub retries: Counter,
}

/// No server can be used.
#[derive(Debug, Error)]
#[error("{}", describe(.failures))]
pub struct OpenError {
    /// Each server that was tried, with what came of it.
    pub failures: Vec<(Uri, OpenFailure)>,
}

fn describe(failures: &[(Uri, OpenFailure)]) -> String {
    let texts: Vec<_> = failures.iter().map(|(uri, failure)| format!("{uri}: {failure}")).collect();
    texts.join("; ")
}

impl OpenError {
    /// Whether a server answered, and is not what it should be; trying again will not help.
    pub fn is_final(&self) -> bool {
        self.failures.iter().any(|(_, failure)| failure.is_final())
    }
}

/// An export on one of several servers that hold the same image.
#[derive(Debug)]
pub struct Remote {
    pool: Arc<Pool>,
    patience: Duration,
    /// As of the last connection.
    facts: Arc<RwLock<Facts>>,
}

/// Errors of the server after which the request is tried elsewhere, or again, before it fails.
const REFUSALS: u32 = 4;
/// Connections that a question for extents may cost. Reads get on without the answer, and share the connection.
const LOSSES_BY_STATUS: u32 = 2;
/// The longest compact request without a payload.
const LONGEST_COMPACT: u64 = (1 << 32) - 4096;

impl Remote {
    /// Connects to the first of `uris` that can be used. The connection lives on the thread that calls.
    pub async fn open(uris: Vec<Uri>, expectation: Expectation, settings: Settings) -> Result<Self, OpenError> {
        // Told by the server, as soon as there is one.
        let facts = Facts::read_only(0, "");
        let remote = Self::new(uris, facts, expectation, settings);
        let size = Pool::open(&remote.pool).await?.agreed.size;
        remote.pool.expect(|expectation| expectation.size = Some(size));
        Ok(remote)
    }

    /// Takes the export's facts from elsewhere and connects when the first request comes.
    pub fn offline(uris: Vec<Uri>, facts: Facts, expectation: Expectation, settings: Settings) -> Self {
        let expectation = Expectation { size: Some(facts.size), ..expectation };
        Self::new(uris, facts, expectation, settings)
    }

    fn new(uris: Vec<Uri>, facts: Facts, expectation: Expectation, settings: Settings) -> Self {
        let patience = settings.patience;
        let facts = Arc::new(RwLock::new(facts));
        Self { pool: Arc::new(Pool::new(uris, expectation, settings, Arc::clone(&facts))), patience, facts }
    }

    /// From now on, servers with another image than this are refused, and those whose bytes pass through `node`.
    pub fn expect(&self, identity: Option<ImageId>, node: NodeId) {
        self.pool.expect(|expectation| {
            expectation.identity = identity;
            expectation.not_through = Some(node);
        });
    }

    /// How much came over.
    pub fn stats(&self) -> &Stats {
        &self.pool.stats
    }

    /// Whether a connection is open, or the last attempt to open one did not fail.
    pub fn is_reachable(&self) -> bool {
        self.pool.is_reachable()
    }

    /// Where requests go now.
    pub fn current(&self) -> Uri {
        self.pool.current()
    }

    /// Sends a request until it is answered or patience ends.
    async fn ask(&self, request: Request, data: Bytes) -> Result<Answer> {
        let deadline = Instant::now() + self.patience;
        let mut tries = Tries::of(request.command);
        loop {
            match Pool::attempt(&self.pool, request, data.clone(), deadline).await {
                Ok(answer) => return Ok(answer),
                Err(attempt) => tries.note(attempt, &self.pool)?,
            }
            let pause = tokio::time::timeout_at(deadline, self.pool.pause(tries.count)).await;
            if pause.is_err() || Instant::now() >= deadline {
                return Err(self.gave_up(tries.last));
            }
            self.pool.stats.retries.add(1);
        }
    }

    fn gave_up(&self, last: Option<String>) -> Error {
        let seconds = self.patience.as_secs_f32();
        let uri = self.pool.current();
        let reason = last.map_or_else(String::new, |reason| format!(": {reason}"));
        Error::new(ErrorKind::Unavailable, format!("no answer from {uri} in {seconds} s{reason}"))
    }

    fn facts_now(&self) -> Facts {
        self.facts.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The longest payload that the server takes.
    fn longest(&self) -> u64 {
        let facts = self.facts.read().unwrap_or_else(PoisonError::into_inner);
        let block = u64::from(facts.block_sizes.minimum);
        (u64::from(facts.block_sizes.maximum).min(MAX_PAYLOAD_BYTES) / block * block).max(block)
    }

    async fn read_pieces(&self, range: ByteRange) -> Result<Vec<Piece>> {
        let wide = self.widened(range);
        let parts = wide.pieces(self.longest()).map(|part| async move {
            let request = Request { command: command::READ, flags: CommandFlags::empty(), range: part };
            match self.ask(request, Bytes::new()).await? {
                Answer::Data { bytes, holes } => Ok(to_pieces(part, bytes, &holes, range)),
                Answer::Status(_) | Answer::Done => Err(Error::new(ErrorKind::Io, "a read was answered without data")),
            }
        });
        let mut pieces = Vec::new();
        for part in try_join_all(parts).await? {
            part.into_iter().for_each(|piece| push_piece(&mut pieces, piece));
        }
        Ok(pieces)
    }

    /// `range`, up to whole blocks of the server.
    fn widened(&self, range: ByteRange) -> ByteRange {
        let facts = self.facts.read().unwrap_or_else(PoisonError::into_inner);
        let block = u64::from(facts.block_sizes.minimum);
        let start = range.start() / block * block;
        ByteRange::between(start, range.end().next_multiple_of(block).min(facts.size.max(range.end())))
    }

    async fn write_data(&self, offset: u64, data: Bytes, durability: Durability) -> Result<()> {
        let whole = ByteRange::between(offset, offset + to_u64(data.len()));
        let parts = whole.pieces(self.longest()).map(|part| {
            let start = to_usize(part.start() - offset);
            let data = data.slice(start..start + to_usize(part.length()));
            self.ask(Request { command: command::WRITE, flags: durability_flag(durability), range: part }, data)
        });
        try_join_all(parts).await.map(drop)
    }

    /// A request without payload on a range of any length.
    async fn effect(&self, number: u16, flags: CommandFlags, range: ByteRange) -> Result<()> {
        for part in range.pieces(LONGEST_COMPACT) {
            self.ask(Request { command: number, flags, range: part }, Bytes::new()).await?;
        }
        Ok(())
    }

    async fn status(&self, range: ByteRange, context: Context, limit: usize) -> Result<Vec<Extent>> {
        let facts = self.facts_now();
        if !facts.contexts.contains(&context) {
            return match context {
                // A server that cannot say is taken to have everything.
                Context::Allocation => Ok(vec![Extent { length: range.length(), status: 0 }]),
                Context::Residency => Err(Error::new(ErrorKind::Unsupported, "the server has no such context")),
            };
        }
        let wide = self.widened(range);
        let block = u64::from(facts.block_sizes.minimum);
        // An odd end of the image lies beyond what may be asked; it is left out if there is something before it.
        let end = wide.end().min(wide.start() + LONGEST_COMPACT) / block * block;
        let wide = ByteRange::between(wide.start(), if end > wide.start() { end } else { wide.end() });
        let request = Request { command: command::BLOCK_STATUS, flags: CommandFlags::empty(), range: wide };
        let Answer::Status(contexts) = self.ask(request, Bytes::new()).await? else {
            return Err(Error::new(ErrorKind::Io, "a question for extents was answered without any"));
        };
        // The connection has translated the ids to positions in `Context`'s own order.
        let extents = contexts.into_iter().find(|(id, _)| *id == connection::position(context)).map(|(_, list)| list);
        let extents = extents.ok_or_else(|| Error::new(ErrorKind::Io, "a reply without the context asked for"))?;
        Ok(cut_extents(wide.start(), extents, range, limit))
    }
}

/// What has been tried for one request.
#[derive(Debug)]
struct Tries {
    command: u16,
    count: u32,
    losses: u32,
    refusals: u32,
    last: Option<String>,
}

impl Tries {
    const fn of(command: u16) -> Self {
        Self { command, count: 0, losses: 0, refusals: 0, last: None }
    }

    /// Takes note of a failure. Fails when there is no point in trying again.
    fn note(&mut self, attempt: Attempt, pool: &Pool) -> Result<()> {
        self.count += 1;
        match attempt {
            Attempt::Unreachable(reason) => self.last = Some(reason),
            Attempt::Lost { server } => {
                self.losses += 1;
                if self.command == command::BLOCK_STATUS && self.losses >= LOSSES_BY_STATUS {
                    return Err(Error::new(ErrorKind::Io, "the connection is lost whenever extents are asked for"));
                }
                self.turn(pool, server, format!("the connection to {} was lost", pool.uri(server)));
            }
            Attempt::Silent { server } => self.turn(pool, server, format!("{} does not answer", pool.uri(server))),
            Attempt::Late => {}
            // The server is going away ("Terminating the transmission phase"): as good as a lost connection.
            Attempt::Refused { server, error } if error.kind() == ErrorKind::Shutdown => {
                pool.fail_over(server, &error.chain());
                self.last = Some(error.chain());
            }
            Attempt::Refused { server, error } => {
                self.refusals += 1;
                // An error of the disk may pass; others may be one server's alone.
                let may_help = error.kind() == ErrorKind::Io || pool.has_alternatives();
                if self.refusals >= REFUSALS || !may_help {
                    return Err(error);
                }
                self.turn(pool, server, error.chain());
            }
        }
        Ok(())
    }

    /// Leaves the server if there is another one.
    fn turn(&mut self, pool: &Pool, server: usize, reason: String) {
        if pool.has_alternatives() {
            pool.fail_over(server, &reason);
        }
        self.last = Some(reason);
    }
}

/// The pieces of `wanted` in the data of `part`.
fn to_pieces(part: ByteRange, bytes: Bytes, holes: &[ByteRange], wanted: ByteRange) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut at = part.start();
    let data = |from: u64, to: u64| {
        let range = ByteRange::between(from, to).intersect(wanted);
        Piece::Data(bytes.slice(to_usize(range.start() - part.start())..to_usize(range.end() - part.start())))
    };
    for hole in holes {
        push_piece(&mut pieces, data(at, hole.start()));
        push_piece(&mut pieces, Piece::Hole(hole.intersect(wanted).length()));
        at = hole.end();
    }
    push_piece(&mut pieces, data(at, part.end()));
    pieces
}

/// Extents from `start` on, cut to `range` and to `limit` of them. What a server reports beyond is left out.
fn cut_extents(start: u64, extents: Vec<Extent>, range: ByteRange, limit: usize) -> Vec<Extent> {
    let mut cut = Vec::new();
    let mut at = start;
    for extent in extents {
        let end = at.saturating_add(extent.length);
        push_extent(&mut cut, ByteRange::between(at, end).intersect(range).length(), extent.status);
        at = end;
        if at >= range.end() || cut.len() > limit {
            break;
        }
    }
    cut.truncate(limit);
    cut
}

fn durability_flag(durability: Durability) -> CommandFlags {
    if durability == Durability::Stable { CommandFlags::FUA } else { CommandFlags::empty() }
}

impl Export for Remote {
    fn facts(&self) -> Facts {
        self.facts_now()
    }

    fn read(&self, range: ByteRange) -> LocalFuture<'_, Result<Vec<Piece>>> {
        Box::pin(self.read_pieces(range))
    }

    fn write(&self, offset: u64, data: Bytes, durability: Durability) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.write_data(offset, data, durability))
    }

    fn write_zeroes(&self, range: ByteRange, mode: ZeroMode, durability: Durability) -> LocalFuture<'_, Result<()>> {
        let mut flags = durability_flag(durability);
        flags.set(CommandFlags::NO_HOLE, !mode.may_punch);
        flags.set(CommandFlags::FAST_ZERO, mode.must_be_fast);
        Box::pin(self.effect(command::WRITE_ZEROES, flags, range))
    }

    fn trim(&self, range: ByteRange, durability: Durability) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.effect(command::TRIM, durability_flag(durability), range))
    }

    fn flush(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(async move {
            let request =
                Request { command: command::FLUSH, flags: CommandFlags::empty(), range: ByteRange::between(0, 0) };
            self.ask(request, Bytes::new()).await.map(drop)
        })
    }

    fn cache(&self, range: ByteRange) -> LocalFuture<'_, Result<()>> {
        Box::pin(self.effect(command::CACHE, CommandFlags::empty(), range))
    }

    fn extents(&self, range: ByteRange, context: Context, limit: usize) -> LocalFuture<'_, Result<Vec<Extent>>> {
        Box::pin(self.status(range, context, limit))
    }
}
