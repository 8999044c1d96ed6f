//! What is to be fetched ahead of demand of one image.
//!
//! Owns: the image's queues (readahead, profile), how far the background has come, and how long nothing is tried after a
//! failure. Does not own: when it is sent (`engine`).

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::budget::Budget;
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
/// Looks at the mirror in one go, each at a region or at many chunks.
const LOOKS: usize = 64;

/// One image that is filled.
#[derive(Debug)]
pub struct Image {
    /// Its name.
    pub name: String,
    /// What is filled.
    pub mirror: Mirror,
    /// Whether it is to be completed.
    in_background: bool,
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
    /// An image of which nothing is planned.
    pub fn new(name: String, mirror: Mirror, rate: Option<u64>, in_background: bool) -> Arc<Self> {
        let plan = Plan {
            readahead: VecDeque::new(),
            profile: VecDeque::new(),
            background: Sweep::default(),
            budget: Budget::new(rate),
            paused: None,
            failures: 0,
        };
        Arc::new(Self {
            name,
            mirror,
            in_background,
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

    /// Clients are expected to read `ranges`, in this order. Replaces what was expected before.
    pub fn expect(&self, ranges: Vec<ByteRange>) {
        self.plan().profile = ranges.into();
    }

    /// Whether a profile is being played.
    pub fn is_playing(&self) -> bool {
        !self.plan().profile.is_empty()
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
        if !self.in_background {
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
