//! An export of another server, as an export here.
//!
//! | file | holds |
//! | --- | --- |
//! | this one | [`Remote`]: requests, split, retried, mapped to and from the protocol |
//! | `verified` | reads whose bytes are checked: whom to ask when they are wrong |
//! | `pool` | connections: opening, sharing, losing, failing over |
//! | `redirect` | other servers in place of those that were used |
//! | `server` | what is known of one server |
//! | `common` | what stays when the servers are replaced |
//! | `trust` | which servers are set aside because they send wrong bytes |
//! | `expectation` | what a server must be, and what is told when it is something else |
//! | `opening` | opening a connection: introduction, negotiation |
//! | `connection` | one connection: requests in flight, replies |
//! | `notices` | asking a server for news: where else the image is to be fetched |
//!
//! Owns: everything that makes a server on the network dependable: several connections with pipelined requests, a
//! list of servers of which the next is tried when one fails or lies, patience with an end. Does not own: what is done
//! with the bytes, and how they are checked: that is told with the request.
//!
//! **Time.** A request is tried again, on a new connection or another server, until its patience is at an end; then
//! it fails with an I/O error. So the patience here must stay under the time-out of whoever asks. What cannot be helped
//! by waiting fails at once: servers that all have another image now, or that all send wrong bytes.

mod common;
mod connection;
mod expectation;
pub mod notices;
mod opening;
mod pool;
mod redirect;
mod server;
#[cfg(test)]
mod tests;
mod trust;
mod verified;

use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::{join_all, try_join_all};
use thiserror::Error;
use tokio::sync::{Mutex as AsyncMutex, watch};
use tokio::time::Instant;

use crate::error::{Error, ErrorKind, Result};
use crate::export::{Check, Context, Export, Facts, ImageId, LocalFuture, NodeId, Piece, push_extent, push_piece};
use crate::nbd::client::{Answer, Request};
use crate::nbd::request::{Durability, ZeroMode};
use crate::nbd::wire::{CommandFlags, MAX_PAYLOAD_BYTES, command};
use crate::nbd::{BlockSizes, Extent, Uri};
use crate::ranges::ByteRange;
use crate::units::{to_u64, to_usize};
use common::Common;
pub use common::{Place, Role};
pub use expectation::{Changed, Expectation};
pub use opening::{OpenFailure, inspect, list};
use pool::{Attempt, Pool, Stage};
pub use redirect::Route;
use server::Server;
pub use server::{ServerStatus, Stats};

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
    /// Who servers are told that we are, at first.
    pub role: Role,
}

impl Default for Settings {
    /// Requests fail after 25 seconds: under the 30 seconds after which clients commonly give up.
    fn default() -> Self {
        Self {
            connections: 4,
            connect_timeout: Duration::from_secs(5),
            stall_timeout: Duration::from_secs(10),
            patience: Duration::from_secs(25),
            role: Role::Plain,
        }
    }
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
    /// Replaced as a whole when the servers are. A request takes what is there each time it is tried.
    pool: RwLock<Arc<Pool>>,
    common: Arc<Common>,
    patience: Duration,
    /// Held while the servers are replaced.
    redirecting: AsyncMutex<()>,
}

/// An export that a Headwater server has beside an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// What the image holds.
    Manifest,
    /// What clients read of it.
    Profile,
    /// Takes what clients of mirrors read of it.
    ProfileInbox,
}

impl Side {
    /// What stands behind the image's name and an `@`.
    const fn name(self) -> &'static str {
        match self {
            Self::Manifest => "manifest",
            Self::Profile => "profile",
            Self::ProfileInbox => "profile-inbox",
        }
    }
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
        let size = Pool::open(&remote.pool()).await?.agreed.size;
        remote.change_expectation(|terms| terms.expectation.size = Some(size));
        Ok(remote)
    }

    /// Takes the export's facts from elsewhere and connects when the first request comes.
    pub fn offline(uris: Vec<Uri>, facts: Facts, expectation: Expectation, settings: Settings) -> Self {
        let expectation = Expectation { size: Some(facts.size), ..expectation };
        Self::new(uris, facts, expectation, settings)
    }

    fn new(uris: Vec<Uri>, facts: Facts, expectation: Expectation, settings: Settings) -> Self {
        let patience = settings.patience;
        let common = Arc::new(Common::new(facts, expectation, settings));
        let servers = uris.into_iter().map(|uri| Arc::new(Server::new(uri))).collect();
        let pool = Arc::new(Pool::new(servers, Arc::clone(&common), Stage::InUse));
        Self { pool: RwLock::new(pool), common, patience, redirecting: AsyncMutex::default() }
    }

    /// The servers that are used now.
    fn pool(&self) -> Arc<Pool> {
        Arc::clone(&self.pool.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// From now on, servers with another image than this are refused, and those whose bytes pass through `node`. A
    /// mirror has this name from then on, for connections that are opened later.
    pub fn expect(&self, identity: Option<ImageId>, node: NodeId) {
        self.change_expectation(|terms| {
            terms.expectation.identity = identity;
            terms.expectation.not_through = Some(node);
            if matches!(terms.role, Role::Mirror | Role::Named(_)) {
                terms.role = Role::Named(node);
            }
        });
    }

    fn change_expectation(&self, change: impl FnOnce(&mut common::Terms)) {
        self.common.change_terms(change);
        // Whoever was refused until now is asked again.
        self.pool().forgive();
        self.common.changed.send_if_modified(|list| !std::mem::take(list).is_empty());
    }

    /// How much came over.
    pub fn stats(&self) -> &Stats {
        &self.common.stats
    }

    /// Whether a connection is open, or the last attempt to open one did not fail.
    pub fn is_reachable(&self) -> bool {
        self.pool().is_reachable()
    }

    /// Where requests go now.
    pub fn current(&self) -> Uri {
        self.pool().current()
    }

    /// Where requests go, whenever that changes.
    pub fn place(&self) -> watch::Receiver<Place> {
        self.common.place.subscribe()
    }

    /// All servers, in the order of the list.
    pub fn uris(&self) -> Vec<Uri> {
        self.pool().uris()
    }

    /// How each server is doing, in the order of the list. Cheap enough to be asked each second.
    pub fn servers(&self) -> Vec<ServerStatus> {
        self.pool().status()
    }

    /// The servers that said, when they were last connected to or inspected, that they have another image than is
    /// expected: another size or another identity. Empty while all have the right one. A server that does not tell its
    /// identity is not among them.
    pub fn changed(&self) -> watch::Receiver<Vec<Changed>> {
        self.common.changed.subscribe()
    }

    /// Asks each server what it says of the export now, by a connection of its own that asks nothing else. What comes
    /// out is in [`Self::changed`] too. Requests and their connections are left alone.
    pub async fn inspect(&self) -> Vec<(Uri, Result<Facts, OpenFailure>)> {
        let pool = self.pool();
        let looks = pool.order().into_iter().map(|server| {
            let pool = &pool;
            async move {
                let uri = pool.uri(server).clone();
                let look = opening::look(&uri, pool.connect_timeout).await;
                let facts = look.map(|(facts, tells_news)| {
                    // The answer is for whoever watches; these facts are returned whatever they are.
                    let _ = pool.admit(server, &facts);
                    pool.learn_of_news(server, tells_news);
                    facts
                });
                (uri, facts)
            }
        });
        join_all(looks).await
    }

    /// Where a side export of the image is on each server, in the order in which they are to be tried.
    pub fn beside(&self, side: Side) -> Vec<Uri> {
        let pool = self.pool();
        let of = |server| {
            let uri = pool.uri(server);
            Uri { export: format!("{}@{}", uri.export, side.name()), ..uri.clone() }
        };
        pool.order().into_iter().map(of).collect()
    }

    /// Connects to one that [`Self::beside`] named. It may be anything: some servers have one export under all names.
    pub async fn open_beside(&self, uri: Uri) -> Result<Self, OpenError> {
        let (settings, role) = (self.common.settings.clone(), self.common.terms().role);
        let settings = Settings { connections: 1, patience: self.patience, role, ..settings };
        Self::open(vec![uri], Expectation::default(), settings).await
    }

    /// The manifest of the image, as each server offers it, in the order in which they are to be tried. Who has none is
    /// left out.
    pub async fn manifests(&self) -> Vec<Self> {
        let mut offers = Vec::new();
        for uri in self.beside(Side::Manifest) {
            offers.extend(self.open_beside(uri).await.ok());
        }
        offers
    }

    /// Sends a request until it is answered or patience ends.
    async fn ask(&self, request: Request, data: Bytes) -> Result<Answer> {
        let (answer, _) = self.ask_until(request, data, Instant::now() + self.patience).await?;
        Ok(answer)
    }

    /// Sends a request until it is answered or `deadline` has come. Tells which server has answered.
    async fn ask_until(&self, request: Request, data: Bytes, deadline: Instant) -> Result<(Answer, Arc<Server>)> {
        let mut tries = Tries::of(request.command);
        loop {
            let pool = self.pool();
            let now = match Pool::attempt(&pool, request, data.clone(), deadline).await {
                Ok(answer) => return Ok(answer),
                // Whatever it was: the servers that are used now have not been asked.
                Err(_) if pool.was_left() => Instant::now(),
                Err(attempt) => {
                    tries.note(attempt, &pool)?;
                    let paused = tokio::time::timeout_at(deadline, pool.pause(tries.count)).await;
                    paused.map_or(deadline, |()| Instant::now())
                }
            };
            if now >= deadline {
                return Err(self.gave_up(tries.last));
            }
            self.note_retry(self.pool().current_server());
        }
    }

    /// Counts a request that `server` is asked again.
    fn note_retry(&self, server: &Server) {
        [&self.common.stats, &server.stats].into_iter().for_each(|stats| stats.retries.add(1));
    }

    fn gave_up(&self, last: Option<String>) -> Error {
        let seconds = self.patience.as_secs_f32();
        let uri = self.current();
        let reason = last.map_or_else(String::new, |reason| format!(": {reason}"));
        Error::new(ErrorKind::Unavailable, format!("no answer from {uri} in {seconds} s{reason}"))
    }

    fn facts_now(&self) -> Facts {
        self.common.with_facts(Facts::clone)
    }

    fn block_sizes(&self) -> BlockSizes {
        self.common.with_facts(|facts| facts.block_sizes)
    }

    /// Reads `range`, and tells the servers that the bytes are from, each once.
    async fn read_until(&self, range: ByteRange, deadline: Instant) -> Result<(Vec<Piece>, Vec<Arc<Server>>)> {
        let (block_sizes, size) = (self.block_sizes(), self.facts_now().size);
        let parts = requests(range, block_sizes, size).map(|part| async move {
            let (answer, server) = self.ask_until(read_of(part), Bytes::new(), deadline).await?;
            Ok::<_, Error>((to_pieces(part, answer, range)?, server))
        });
        let (parts, mut servers): (Vec<_>, Vec<_>) = try_join_all(parts).await?.into_iter().unzip();
        servers.sort_unstable_by_key(Arc::as_ptr);
        servers.dedup_by(|one, other| Arc::ptr_eq(one, other));
        Ok((joined(parts), servers))
    }

    async fn write_data(&self, offset: u64, data: Bytes, durability: Durability) -> Result<()> {
        let whole = ByteRange::between(offset, offset + to_u64(data.len()));
        let parts = whole.pieces(longest(self.block_sizes())).map(|part| {
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
        let wide = widened(range, facts.block_sizes, facts.size);
        let block = u64::from(facts.block_sizes.minimum);
        // An odd end of the image lies beyond what may be asked; it is left out if there is something before it.
        let end = wide.end().min(wide.start() + LONGEST_COMPACT) / block * block;
        let wide = ByteRange::between(wide.start(), if end > wide.start() { end } else { wide.end() });
        let request = Request { command: command::BLOCK_STATUS, flags: CommandFlags::empty(), range: wide };
        let Answer::Status(contexts) = self.ask(request, Bytes::new()).await? else {
            return Err(Error::new(ErrorKind::Io, "a question for extents was answered without any"));
        };
        // The connection has translated the ids to positions in `Context`'s own order.
        let extents = contexts.into_iter().find(|(id, _)| *id == opening::position(context)).map(|(_, list)| list);
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
            Attempt::Left => {}
            // Waiting would not help.
            Attempt::OtherImage(error) => return Err(error),
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

/// The longest payload that a server takes.
fn longest(block_sizes: BlockSizes) -> u64 {
    let block = u64::from(block_sizes.minimum);
    (u64::from(block_sizes.maximum).min(MAX_PAYLOAD_BYTES) / block * block).max(block)
}

/// `range`, up to whole blocks of the server; `size` is that of the export.
fn widened(range: ByteRange, block_sizes: BlockSizes, size: u64) -> ByteRange {
    let block = u64::from(block_sizes.minimum);
    let start = range.start() / block * block;
    ByteRange::between(start, range.end().next_multiple_of(block).min(size.max(range.end())))
}

/// The ranges that a server is asked for to have `range`.
fn requests(range: ByteRange, block_sizes: BlockSizes, size: u64) -> impl Iterator<Item = ByteRange> {
    widened(range, block_sizes, size).pieces(longest(block_sizes))
}

const fn read_of(range: ByteRange) -> Request {
    Request { command: command::READ, flags: CommandFlags::empty(), range }
}

/// The pieces of several answers, one behind the other.
fn joined(parts: Vec<Vec<Piece>>) -> Vec<Piece> {
    let mut pieces = Vec::new();
    parts.into_iter().flatten().for_each(|piece| push_piece(&mut pieces, piece));
    pieces
}

/// The pieces of `wanted` in the answer to a read of `part`.
fn to_pieces(part: ByteRange, answer: Answer, wanted: ByteRange) -> Result<Vec<Piece>> {
    let Answer::Data { bytes, holes } = answer else {
        return Err(Error::new(ErrorKind::Io, "a read was answered without data"));
    };
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
    Ok(pieces)
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
        Box::pin(async move {
            let (pieces, _) = self.read_until(range, Instant::now() + self.patience).await?;
            Ok(pieces)
        })
    }

    fn read_verified<'a>(&'a self, range: ByteRange, check: &'a Check<'a>) -> LocalFuture<'a, Result<Vec<Piece>>> {
        Box::pin(self.read_checked(range, check))
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
