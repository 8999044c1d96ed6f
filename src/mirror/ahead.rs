//! Fetching ahead of demand: what is missing, and bringing it.
//!
//! Such a fetch is one like any other, but it stands behind those that clients wait for, it is cut into requests that
//! leave when a [`Pace`] lets them, and its failure fails nobody: a client that waits for it asks anew. As soon as one
//! does wait, what is left of it leaves at once.
//!
//! Owns: the traits by which whoever plans ([`Pace`], [`Observer`]) is asked and told. Does not own: what is fetched
//! ahead and when.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use super::chunks::State;
use super::fetch::Claims;
use super::read::Source;
use super::{Cause, Inner, Mirror};
use crate::clock;
use crate::error::Result;
use crate::export::{LocalFuture, Piece, SharedExport};
use crate::ranges::ByteRange;

/// Chunks that one look for what is missing goes over, at most: so many take some 50 microseconds.
const LOOKED_AT: usize = 64 << 10;

/// Says when the requests of one fetch may leave.
///
/// *Who implements it*: whoever plans. *Who calls it*: the fetch, on its worker, for one request after the other:
/// [`Self::turn`], then [`Self::ended`].
pub trait Pace: fmt::Debug + Send + Sync {
    /// Bytes of the next request, at most; not none.
    fn part(&self) -> u64;

    /// Waits until a request of so many bytes may leave.
    ///
    /// Cancel safety: it has not left.
    fn turn(&self, bytes: u64) -> LocalFuture<'_, ()>;

    /// A request has left without waiting for its turn, because a client waits for its bytes.
    fn hurried(&self, bytes: u64);

    /// The request of so many bytes has been answered after `latency`; `None`: it failed.
    fn ended(&self, bytes: u64, latency: Option<Duration>);
}

/// Is told of the requests that clients wait for.
///
/// *Who implements it*: whoever plans. *Who calls it*: all mirrors of a server, on any worker.
pub trait Observer: fmt::Debug + Send + Sync {
    /// One has left.
    fn began(&self);

    /// It has been answered after `latency`; `None`: it failed, or nobody waits for it any more.
    fn ended(&self, bytes: u64, latency: Option<Duration>);
}

/// One fetch ahead of demand.
#[derive(Debug)]
pub struct Ahead {
    pub(super) cause: Cause,
    /// Without one its requests leave at once, and whole.
    pace: Option<Arc<dyn Pace>>,
    source: Option<SharedExport>,
    /// Whether a client waits for it.
    is_wanted: AtomicBool,
    wanted: Notify,
}

impl Ahead {
    /// A fetch because of `cause`, whose requests leave when `pace` lets them. The bytes come from `source` if there is
    /// one and a manifest to hold them against; what it does not have right comes from the mirror's own upstream.
    pub fn paced(cause: Cause, pace: Arc<dyn Pace>, source: Option<SharedExport>) -> Self {
        Self { pace: Some(pace), source, ..Self::new(cause) }
    }

    /// A fetch because of `cause` that leaves at once.
    pub(super) fn new(cause: Cause) -> Self {
        Self { cause, pace: None, source: None, is_wanted: AtomicBool::new(false), wanted: Notify::new() }
    }

    /// Whether it is read otherwise than for a client: paced, or from elsewhere.
    pub(super) fn is_special(&self) -> bool {
        (self.pace.is_some() && !self.is_wanted()) || self.source.is_some()
    }

    /// A client waits for it now.
    pub(super) fn hurry(&self) {
        self.is_wanted.store(true, Ordering::Release);
        self.wanted.notify_waiters();
    }

    fn is_wanted(&self) -> bool {
        self.is_wanted.load(Ordering::Acquire)
    }

    /// Waits until a request of so many bytes may leave, or a client waits for it.
    async fn turn(&self, pace: &dyn Pace, bytes: u64) {
        let wanted = self.wanted.notified();
        if !self.is_wanted() {
            tokio::select! {
                biased;
                () = pace.turn(bytes) => return,
                () = wanted => {}
            }
        }
        pace.hurried(bytes);
    }
}

/// What came of a fetch ahead of demand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Brought {
    /// Bytes that were missing, were asked for, and are here now.
    pub bytes: u64,
    /// Bytes that were asked for and are not here: there was no space, or they could not be had.
    pub missed: u64,
}

impl Mirror {
    /// The first stretch of `range` that is missing and that nobody is fetching: whole chunks, at most `most` bytes but
    /// one chunk at least. The second value is where to look for the next one; before the end of `range`, there may be more.
    pub fn missing(&self, range: ByteRange, most: u64) -> (Option<ByteRange>, u64) {
        let inner = &self.0;
        let table = inner.flights.lock();
        let is_missing = |chunk| inner.states.get(chunk) == State::Absent && !table.contains_key(&chunk);
        let mut found: Option<ByteRange> = None;
        let mut looked = range.start();
        for chunk in inner.geometry.chunks(range).take(LOOKED_AT) {
            let part = inner.geometry.range(chunk);
            match &mut found {
                None if is_missing(chunk) => found = Some(part),
                None => {}
                Some(found) if is_missing(chunk) && part.end() - found.start() <= most => {
                    *found = ByteRange::between(found.start(), part.end());
                }
                Some(found) => return (Some(*found), found.end()),
            }
            looked = part.end();
        }
        (found, looked)
    }

    /// Brings over what is absent in `range`, for nobody in particular. Ends when it is stored, or is not going to be.
    ///
    /// Cancel safety: what has begun goes on.
    pub async fn bring(&self, range: ByteRange, ahead: Ahead) -> Brought {
        let inner = &self.0;
        let ahead = Arc::new(ahead);
        let (mut claims, mut flights) = (Claims::default(), Vec::new());
        for chunk in inner.geometry.chunks(range) {
            if inner.states.get(chunk) == State::Absent
                && let Source::Flight(flight) = inner.claim(chunk, &mut claims, Some(&ahead))
            {
                flights.push((chunk, flight));
            }
        }
        inner.launch(claims);
        let mut brought = Brought::default();
        for (chunk, flight) in flights {
            // Whatever comes of it is seen in the state.
            let _ = flight.wait().await;
            flight.over().await;
            let length = inner.geometry.range(chunk).length();
            match inner.states.get(chunk) {
                State::Absent | State::Leaving => brought.missed += length,
                State::Resident | State::Volatile | State::Unverified | State::Zero => brought.bytes += length,
            }
        }
        brought
    }

    /// Bytes that may be brought ahead of demand for one purpose without pushing out what was brought for it just now: half
    /// of what the cache keeps.
    pub fn most_ahead(&self) -> u64 {
        self.0.space.most_kept() / 2
    }

    /// Has everything asked of `source` first from now on, where there is a manifest to hold it against: what clients
    /// wait for too, because those who are filled from here wait for it. What it does not have right comes from the tier
    /// below. `None`: no longer.
    pub fn prefer(&self, source: Option<SharedExport>) {
        *self.0.preferred.write().unwrap_or_else(PoisonError::into_inner) = source;
    }

    /// Whether some of `range` is here and has bytes.
    pub fn has_some(&self, range: ByteRange) -> bool {
        let inner = &self.0;
        let is_here = |state| matches!(state, State::Resident | State::Volatile | State::Unverified);
        inner.geometry.chunks(range).any(|chunk| is_here(inner.states.get(chunk)))
    }

    /// Whether some of `range` is missing, or was brought ahead of demand and has not been read.
    pub fn is_news(&self, range: ByteRange) -> bool {
        let Inner { geometry, states, origins, .. } = &*self.0;
        let is_missing = |state| matches!(state, State::Absent | State::Leaving);
        geometry.chunks(range).any(|chunk| is_missing(states.get(chunk))) || origins.is_unread(range)
    }

    /// Whether nothing is missing, as far as anybody looked: the whole image is here.
    pub fn is_complete(&self) -> bool {
        let inner = &self.0;
        let all = ByteRange::between(0, inner.geometry.size());
        let is_here = |state| !matches!(state, State::Absent | State::Leaving);
        inner.geometry.chunks(all).all(|chunk| is_here(inner.states.get(chunk)))
    }
}

impl Inner {
    /// Reads `range` from the tier below for somebody who waits for it, or ahead of demand.
    pub(super) async fn ask_below(&self, range: ByteRange, ahead: Option<&Ahead>) -> Result<Vec<Piece>> {
        let Some(ahead) = ahead else {
            let asked = Asked::new(self.observer.as_deref(), range.length());
            let answer = self.lower.read(range).await;
            asked.answered(answer.is_ok());
            return answer;
        };
        // Nothing is believed of others that cannot be held against a manifest.
        let source = ahead.source.clone().or_else(|| self.preferred()).filter(|_| self.truth.get().is_some());
        let source = source.as_ref();
        let Some(pace) = &ahead.pace else { return self.ask_either(source, range).await };
        let mut pieces = Vec::new();
        let mut rest = range;
        while !rest.is_empty() {
            let length = if ahead.is_wanted() { rest.length() } else { pace.part().clamp(1, rest.length()) };
            let part = ByteRange::between(rest.start(), rest.start() + length);
            ahead.turn(&**pace, length).await;
            let left = Left { pace: &**pace, bytes: length, began: clock::now(), is_answered: false };
            let answer = self.ask_either(source, part).await;
            left.answered(answer.is_ok());
            pieces.extend(answer?);
            rest = ByteRange::between(part.end(), rest.end());
        }
        Ok(pieces)
    }

    /// Who is asked before the tier below.
    pub(super) fn preferred(&self) -> Option<SharedExport> {
        self.preferred.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What `source` does not give comes from the tier below, as a part of the same request: it has waited for its turn.
    async fn ask_either(&self, source: Option<&SharedExport>, range: ByteRange) -> Result<Vec<Piece>> {
        if let Some(source) = source
            && let Ok(pieces) = source.read(range).await
        {
            return Ok(pieces);
        }
        self.lower.read(range).await
    }
}

/// A request that a client waits for, under way. Dropped, it has failed.
pub(super) struct Asked<'a> {
    observer: Option<&'a dyn Observer>,
    bytes: u64,
    began: Instant,
    latency: Option<Duration>,
}

impl<'a> Asked<'a> {
    pub(super) fn new(observer: Option<&'a dyn Observer>, bytes: u64) -> Self {
        observer.inspect(|observer| observer.began());
        Self { observer, bytes, began: clock::now(), latency: None }
    }

    pub(super) fn answered(mut self, is_right: bool) {
        self.latency = is_right.then(|| self.began.elapsed());
    }
}

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        self.observer.inspect(|observer| observer.ended(self.bytes, self.latency));
    }
}

/// A request of a fetch ahead of demand, under way. Dropped, it has failed.
struct Left<'a> {
    pace: &'a dyn Pace,
    bytes: u64,
    began: Instant,
    is_answered: bool,
}

impl Left<'_> {
    fn answered(mut self, is_right: bool) {
        self.is_answered = is_right;
    }
}

impl Drop for Left<'_> {
    fn drop(&mut self) {
        self.pace.ended(self.bytes, self.is_answered.then(|| self.began.elapsed()));
    }
}
