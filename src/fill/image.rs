//! What is to be fetched ahead of demand of one image.
//!
//! Owns: the image's queues (readahead, profile), how far the background has come, and how long nothing is tried after a
//! failure. Does not own: when it is sent (`engine`).

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::budget::Budget;
use super::engine::Engine;
use super::profile::Exchange;
use crate::clock;
use crate::mirror::{Cause, Mirror, Tally};
use crate::ranges::ByteRange;
use crate::units::MIB;

/// Wishes of readers that wait; when there are more, the oldest goes.
const WISHES: usize = 256;
/// What of readahead may be here unread, if most of it is not read at all.
const UNMATCHED: u64 = 16 * MIB;
/// After a failure nothing is tried for so long, doubled each time.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// The neighbourhood of what is here: so much around it is completed first.
const REGION: u64 = 4 * MIB;
/// After the whole image was gone over, it is gone over again this much later, for what has left meanwhile.
const AGAIN: Duration = Duration::from_secs(60);
/// How long is waited for the upstream to tell what clients read.
const ASKED: Duration = Duration::from_secs(15);
/// Looks at the mirror in one go, each at a region or at many chunks.
const LOOKS: usize = 64;

/// One image that is filled.
#[derive(Debug)]
pub struct Image {
    /// Its name.
    pub name: String,
    /// What is filled.
    pub mirror: Mirror,
    filling: Filling,
    /// What its clients read in earlier runs.
    exchange: Arc<Exchange>,
    /// Whether somebody waits for the upstream to tell that.
    is_asking: AtomicBool,
    /// Whether all of it was here when somebody looked last, and how many chunks had been evicted by then.
    is_complete: AtomicBool,
    evicted: AtomicU64,
    plan: Mutex<Plan>,
}

/// What is to come.
#[derive(Debug)]
struct Plan {
    readahead: VecDeque<ByteRange>,
    /// In the order in which it is wanted.
    profile: VecDeque<ByteRange>,
    background: Sweep,
    budget: Budget,
    /// Nothing is tried before.
    paused: Option<Instant>,
    failures: u32,
    /// When a profile was begun to be played.
    played: Option<Instant>,
}

/// How an image is filled.
#[derive(Debug, Clone, Copy, Default)]
pub struct Filling {
    /// Bytes per second at most.
    pub rate: Option<u64>,
    /// Bytes that one reader's readahead is ahead of it, at most; 0: none.
    pub readahead: u64,
    /// Whether what clients read in earlier runs is fetched when one comes.
    pub profiles: bool,
    /// Whether it is to be completed.
    pub background: bool,
}

/// How the background goes over the image: first the neighbourhood of what is here, then all.
#[derive(Debug, Default)]
struct Sweep {
    at: u64,
    everything: bool,
    /// It came to the end; nothing before.
    rests: Option<Instant>,
}

/// What a part of a sweep came to.
enum Swept {
    Found(ByteRange),
    /// Nothing so far.
    Nothing,
    /// It is over.
    End,
}

impl Image {
    /// An image of which nothing is planned yet.
    pub fn new(name: String, mirror: Mirror, filling: Filling, exchange: Arc<Exchange>) -> Arc<Self> {
        let plan = Plan {
            readahead: VecDeque::new(),
            profile: VecDeque::new(),
            background: Sweep::default(),
            budget: Budget::new(filling.rate),
            paused: None,
            failures: 0,
            played: None,
        };
        Arc::new(Self {
            name,
            mirror,
            filling,
            exchange,
            is_asking: AtomicBool::new(false),
            is_complete: AtomicBool::new(false),
            evicted: AtomicU64::new(0),
            plan: Mutex::new(plan),
        })
    }

    fn plan(&self) -> MutexGuard<'_, Plan> {
        self.plan.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether it is of use to look where readers go.
    pub fn has_gaps(&self) -> bool {
        let evicted = self.mirror.stats().evicted_chunks.value();
        !self.is_complete.load(Ordering::Relaxed) || self.evicted.load(Ordering::Relaxed) != evicted
    }

    /// Looks whether all of it is here.
    pub fn look(&self) {
        self.evicted.store(self.mirror.stats().evicted_chunks.value(), Ordering::Relaxed);
        self.is_complete.store(self.mirror.is_complete(), Ordering::Relaxed);
    }

    /// What of readahead nobody reads speaks against more of it (paper 2's threshold on what is unmatched).
    pub fn is_readahead_wasted(&self) -> bool {
        let Tally { brought_bytes, used_bytes, .. } = self.mirror.tally(Cause::Readahead);
        let (brought, used) = (brought_bytes.value(), used_bytes.value());
        brought.saturating_sub(used) > UNMATCHED && used < brought / 2
    }

    /// A reader is expected at `ranges`, in this order.
    pub fn wish(&self, ranges: impl Iterator<Item = ByteRange>) {
        let mut plan = self.plan();
        for range in ranges {
            if plan.readahead.len() == WISHES {
                plan.readahead.pop_front();
            }
            plan.readahead.push_back(range);
        }
    }

    /// How it is filled.
    pub const fn filling(&self) -> Filling {
        self.filling
    }

    /// What its clients read, and are expected to read.
    pub const fn exchange(&self) -> &Arc<Exchange> {
        &self.exchange
    }

    /// A client has come, or is expected: what clients read in earlier runs is fetched. What is not known here may be
    /// known by the upstream soon. To be called on a worker.
    pub fn play(self: &Arc<Self>, engine: &Engine) {
        if !self.filling.profiles || !self.has_gaps() {
            return;
        }
        if self.begin_to_play() {
            engine.pump();
        } else if !self.is_asking.swap(true, Ordering::Relaxed) {
            tokio::task::spawn_local(Arc::clone(self).ask_and_play(engine.clone()));
        }
    }

    /// Gives whether a profile is known.
    fn begin_to_play(&self) -> bool {
        let Some(profile) = self.exchange.store().get(&self.exchange.recording().settings().tag) else { return false };
        let now = clock::now();
        let mut plan = self.plan();
        let is_recent = plan.played.is_some_and(|played| now.saturating_duration_since(played) < AGAIN / 6);
        if plan.profile.is_empty() && !is_recent {
            plan.played = Some(now);
            plan.profile = profile.wishes(self.mirror.size()).into();
        }
        true
    }

    async fn ask_and_play(self: Arc<Self>, engine: Engine) {
        let answered = self.exchange.answered();
        let mut answered = std::pin::pin!(answered);
        // Armed before it is asked.
        let is_early =
            std::future::poll_fn(|context| std::task::Poll::Ready(answered.as_mut().poll(context).is_ready()));
        if !is_early.await {
            self.exchange.ask_again();
            let _ = tokio::time::timeout(ASKED, answered).await;
        }
        self.is_asking.store(false, Ordering::Relaxed);
        self.begin_to_play();
        engine.pump();
    }

    /// When something may be sent for this image, if not now.
    pub fn wait(&self, now: Instant) -> Option<Instant> {
        let plan = self.plan();
        plan.budget.wait(now).max(plan.paused.filter(|until| *until > now))
    }

    /// So many bytes leave for it.
    pub fn spend(&self, now: Instant, bytes: u64) {
        self.plan().budget.spend(now, bytes);
    }

    /// Bytes came, or could not be had.
    pub fn ended(&self, now: Instant, brought: u64, missed: u64) {
        let mut plan = self.plan();
        if missed == 0 {
            plan.failures = 0;
        } else if brought == 0 {
            let pause = FIRST_PAUSE * (1 << plan.failures.min(6));
            plan.failures += 1;
            plan.paused = Some(now + pause.min(LONGEST_PAUSE));
        }
    }

    /// The next bytes for a reader, at most `most`.
    pub fn next_readahead(&self, most: u64) -> Option<ByteRange> {
        self.next_of(most, |plan| &mut plan.readahead)
    }

    /// The next bytes of the profile, at most `most`.
    pub fn next_of_profile(&self, most: u64) -> Option<ByteRange> {
        self.next_of(most, |plan| &mut plan.profile)
    }

    fn next_of(&self, most: u64, queue: impl Fn(&mut Plan) -> &mut VecDeque<ByteRange>) -> Option<ByteRange> {
        let mut plan = self.plan();
        let queue = queue(&mut plan);
        while let Some(range) = queue.front_mut() {
            let (found, rest) = self.mirror.missing(*range, most);
            if rest >= range.end() {
                queue.pop_front();
            } else {
                *range = ByteRange::between(rest, range.end());
            }
            if found.is_some() {
                return found;
            }
        }
        None
    }

    /// The next bytes of the image as a whole, at most `most`; when there is something again, if not now.
    pub fn next_of_background(&self, now: Instant, most: u64) -> (Option<ByteRange>, Option<Instant>) {
        if !self.filling.background {
            return (None, None);
        }
        let mut plan = self.plan();
        let sweep = &mut plan.background;
        if let Some(rests) = sweep.rests {
            if rests > now {
                return (None, Some(rests));
            }
            *sweep = Sweep::default();
        }
        if !self.mirror.has_room(most) {
            return (None, Some(now + FIRST_PAUSE));
        }
        match self.sweep(sweep, most) {
            Swept::Found(range) => (Some(range), None),
            // Others have their turn.
            Swept::Nothing => (None, Some(now + Duration::from_millis(1))),
            Swept::End => {
                sweep.rests = Some(now + AGAIN);
                self.look();
                (None, sweep.rests)
            }
        }
    }

    /// Goes on with the sweep.
    fn sweep(&self, sweep: &mut Sweep, most: u64) -> Swept {
        let size = self.mirror.size();
        for _ in 0..LOOKS {
            if sweep.at < size {
                let end = if sweep.everything { size } else { size.min(sweep.at / REGION * REGION + REGION) };
                let range = ByteRange::between(sweep.at, end);
                if !sweep.everything && !self.mirror.has_some(ByteRange::between(sweep.at / REGION * REGION, end)) {
                    sweep.at = end;
                    continue;
                }
                let (found, rest) = self.mirror.missing(range, most);
                sweep.at = rest.max(sweep.at + 1);
                if let Some(found) = found {
                    return Swept::Found(found);
                }
            } else if std::mem::replace(&mut sweep.everything, true) {
                return Swept::End;
            } else {
                sweep.at = 0;
            }
        }
        Swept::Nothing
    }
}
