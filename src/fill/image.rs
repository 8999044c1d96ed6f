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
/// Looks at the mirror in one go, and how far each goes: readers wait for the plan meanwhile.
const LOOKS: usize = 64;
const SPAN: u64 = 16 * REGION;

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
    /// Whether the upstream has another image by now, so that this one is not completed any more.
    is_retired: AtomicBool,
    /// Whether a session of multicast brings it, so that it is not completed meanwhile.
    is_held: AtomicBool,
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
            budget: Budget::new(None),
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
            is_retired: AtomicBool::new(false),
            is_held: AtomicBool::new(false),
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
        if !self.has_gaps() {
            return;
        }
        self.evicted.store(self.mirror.stats().evicted_chunks.value(), Ordering::Relaxed);
        self.is_complete.store(self.mirror.is_complete(), Ordering::Relaxed);
    }

    /// What of readahead nobody reads speaks against more of it (the threshold of Nicolae and Rafique on what is unmatched).
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

    /// The upstream has another image now, or has this one again.
    pub fn retire(&self, is_retired: bool) {
        self.is_retired.store(is_retired, Ordering::Relaxed);
    }

    /// A session of multicast brings it now, or does not any more. What clients are expected to read is fetched in any
    /// case.
    pub fn hold(&self, is_held: bool) {
        self.is_held.store(is_held, Ordering::Relaxed);
    }

    /// Whether it is being completed.
    pub fn has_background(&self) -> bool {
        self.filling.background && !self.is_retired.load(Ordering::Relaxed)
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
            plan.profile = fitting(profile.wishes(self.mirror.size()), self.mirror.most_ahead()).into();
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

    /// Bytes per second at most; `None`: no limit of its own.
    pub fn rate(&self) -> Option<u64> {
        self.plan().budget.rate()
    }

    /// Changes that; without, there is none.
    pub(super) fn set_rate(&self, now: Instant, rate: Option<u64>) {
        self.plan().budget.set_rate(now, rate);
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

    /// So many of them have not left after all.
    pub fn refund(&self, bytes: u64) {
        self.plan().budget.refund(bytes);
    }

    /// Bytes came, or could not be had.
    pub fn ended(&self, now: Instant, brought: u64, missed: u64) {
        let mut plan = self.plan();
        if brought > 0 {
            plan.failures = 0;
        } else if missed > 0 && plan.paused.is_none_or(|until| until <= now) {
            // What was sent together fails together, and that is one failure.
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
        if !self.has_background() || self.is_held.load(Ordering::Relaxed) {
            return (None, None);
        }
        let mut plan = self.plan();
        let sweep = &mut plan.background;
        if let Some(rests) = sweep.rests {
            if rests > now {
                return (None, Some(rests));
            }
            // Nothing has left since.
            if !self.has_gaps() {
                sweep.rests = Some(now + AGAIN);
                return (None, sweep.rests);
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
                let rests = Some(now + AGAIN);
                sweep.rests = rests;
                drop(plan);
                self.look();
                (None, rests)
            }
        }
    }

    /// Goes on with the sweep.
    fn sweep(&self, sweep: &mut Sweep, most: u64) -> Swept {
        let size = self.mirror.size();
        for _ in 0..LOOKS {
            if sweep.at < size {
                let step = if sweep.everything { SPAN } else { REGION };
                let end = size.min(sweep.at / step * step + step);
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

/// The first of these ranges, at most so many bytes.
fn fitting(ranges: impl IntoIterator<Item = ByteRange>, most: u64) -> Vec<ByteRange> {
    let mut left = most;
    let fits = |range: &ByteRange| {
        let fits = range.length() <= left;
        left = left.saturating_sub(range.length());
        fits
    };
    ranges.into_iter().take_while(fits).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use std::path::Path;

    use super::*;
    use crate::export::Facts;
    use crate::export::memory::Memory;
    use crate::fill::profile::{Recording, Settings, Store};
    use crate::mirror::{self, Cache, Space, SpaceSettings};
    use crate::upstream::{self, Expectation, Remote};

    /// A cold mirror of `size` bytes of nothing, in `directory`, with a limit.
    pub(in crate::fill) fn image(directory: &Path, size: u64, filling: Filling, limit: Option<u64>) -> Arc<Image> {
        let space = Space::new(directory, SpaceSettings { limit, ..SpaceSettings::default() });
        let lower = Arc::new(Memory::zeroed(size).read_only());
        let settings = mirror::Settings { chunk_size: Some(64 << 10), ..mirror::Settings::default() };
        let cache = Cache::open(directory, "x").unwrap();
        let mirror = Mirror::open("x", cache, lower, None, &space, &settings).unwrap();
        let settings = upstream::Settings::default();
        let remote = Remote::offline(Vec::new(), Facts::read_only(size, ""), Expectation::default(), settings);
        let store = Arc::new(Store::open(None, size, None));
        let exchange = Exchange::new(store, Arc::new(remote), Recording::new(Settings::default()));
        Image::new("x".to_owned(), mirror, filling, Arc::new(exchange))
    }

    #[test]
    fn of_a_profile_only_what_fits_is_played() {
        let ranges = [(0, 10), (20, 25), (30, 40)].map(|(start, end)| ByteRange::between(start, end));
        assert_eq!(fitting(ranges, 25), ranges);
        assert_eq!(fitting(ranges, 24), ranges[..2]);
        assert!(fitting(ranges, 9).is_empty());
    }

    #[test]
    fn what_is_not_the_newest_any_more_is_not_completed() {
        let directory = tempfile::tempdir().unwrap();
        let filling = Filling { background: true, ..Filling::default() };
        let image = image(directory.path(), MIB, filling, None);
        let now = clock::now();
        image.retire(true);
        assert_eq!(image.next_of_background(now, 64 << 10), (None, None));
        image.retire(false);
        let next = |image: &Image| image.next_of_background(now, 64 << 10).0;
        assert!((0..3).any(|_| next(&image).is_some()));
    }

    #[test]
    fn what_fails_together_pauses_once() {
        let directory = tempfile::tempdir().unwrap();
        let image = image(directory.path(), MIB, Filling::default(), None);
        let now = clock::now();
        (0..20).for_each(|_| image.ended(now, 0, 64 << 10));
        assert_eq!(image.wait(now), Some(now + FIRST_PAUSE));
        image.ended(now + FIRST_PAUSE, 0, 64 << 10);
        assert_eq!(image.wait(now + FIRST_PAUSE), Some(now + FIRST_PAUSE * 3), "and the next one for twice as long");
    }
}
