//! The engine: what leaves next, on behalf of all fills of a server.
//!
//! Nobody sits at a queue. Whoever changes something (a reader that wishes, a request that ended, a timer) has the
//! engine look whether something may leave, and what may leave is fetched on that very worker.
//!
//! The order: urgent orders (whose deadline would be missed), readahead, profiles, and then, if clients leave the link
//! to them, other orders and the background. What clients wait for is never asked here: it leaves at once.
//!
//! Three things bound what leaves: the *window* of bytes under way, which is what the link takes without a queue that
//! clients would feel; the *budgets* of the server, the image and the order; and, for what can wait, whether clients leave the link to
//! it (`calm`).
//!
//! Locks: the list of images, the orders', an image's plan, the link's or the rates', in this order, and the mirror's own
//! within them. Never held across an await.

mod paced;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use self::paced::Paced;
use super::budget::Budget;
use super::calm::Calm;
use super::image::Image;
use super::orders::{Forecast, Order, Orders, State};
use super::tasks::{Fetch, Tasks, Wish, earlier};
use super::window::Window;
use crate::clock;
use crate::export::SharedExport;
use crate::mirror::Cause;
use crate::mirror::ahead::{Ahead, Brought, Observer};
use crate::ranges::ByteRange;
use crate::units::{KIB, MIB};

/// The window is never smaller or larger than this.
const SMALLEST_WINDOW: u64 = 64 * KIB;
const LARGEST_WINDOW: u64 = 32 * MIB;
/// The longest fetch: that many may be lost to a fetch that is late.
const LONGEST_RUN: u64 = MIB;
/// Fetches that can wait are this long, and their requests too while no client is expected.
const LEISURE_RUN: u64 = 256 * KIB;
/// While clients are expected they are this long, so that few bytes are lost when time runs out.
const SHORT_RUN: u64 = 64 * KIB;
/// While clients are expected, requests that can wait are so short that they are hardly felt.
const SHORT_PART: u64 = 16 * KIB;
/// What leaves beside clients is in this many requests at most, so that the trickle brings a large chunk over in time.
const MOST_PARTS: u64 = 8;
/// Fetches under way at once, and bytes of all of them. That is half of what one mirror brings at a time: the rest is
/// for what clients wait for, however long fills wait for their turn.
const RUNS: usize = 256;
const MOST_CLAIMED: u64 = 64 * MIB;
/// The engine looks this often even if nothing happens.
const LOOK: Duration = Duration::from_secs(1);

/// How fills are bounded.
#[derive(Debug, Clone, Copy, Default)]
pub struct Rates {
    /// Bytes per second of all fills of the server; `None`: what the link takes.
    pub server: Option<u64>,
    /// Bytes per second of the fills of each image.
    pub image: Option<u64>,
}

/// How the link to the upstreams is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LinkStatus {
    /// Bytes of fills that may be under way.
    pub window: u64,
    /// Bytes of fills that are.
    pub in_flight: u64,
    /// Fetches that are under way.
    pub fetches: usize,
    /// Bytes per second that fills have had lately; `None` while that is not known.
    pub rate: Option<u64>,
}

/// The fills of a server. Cheap to clone; all clones are one.
#[derive(Debug, Clone)]
pub struct Engine(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    rates: Mutex<Rates>,
    link: Mutex<Link>,
    images: Mutex<Vec<Arc<Image>>>,
    tasks: Mutex<Tasks>,
    orders: Orders,
    /// Something may leave now that could not before: fetches that have begun go on.
    news: Notify,
    /// And others may begin.
    wake: Notify,
    /// Whose turn it is among images.
    turn: AtomicU64,
}

/// The way to the upstreams, which all images share.
#[derive(Debug)]
struct Link {
    window: Window,
    calm: Calm,
    budget: Budget,
    runs: usize,
    /// Bytes of fetches under way, whether their requests have left or not.
    claimed: u64,
    /// Fetches that have begun and whose next request has to wait.
    resting: usize,
    /// Whether something waits for clients to leave the link to it.
    is_held: bool,
    /// When the engine looks again, if nothing happens before; `None` while it looks.
    next_look: Option<Instant>,
}

/// A fetch that may leave now.
#[derive(Debug)]
struct Run {
    image: Arc<Image>,
    range: ByteRange,
    cause: Cause,
    can_wait: bool,
    /// Bytes of its first request, which are let go.
    first: u64,
    /// Where the bytes come from, if not from the image's upstream.
    source: Option<SharedExport>,
    /// On whose behalf.
    order: Option<u64>,
}

/// What is to leave.
struct Wanted<'a> {
    image: &'a Arc<Image>,
    range: ByteRange,
    cause: Cause,
    source: Option<SharedExport>,
    order: Option<u64>,
}

/// What came of a look.
#[derive(Debug)]
enum Look {
    Leaves(Box<Run>),
    /// Nothing leaves before that, unless something happens.
    Waits(Option<Instant>),
}

/// Near enough: what is told by it is told to some digits.
fn to_f64(bytes: u64) -> f64 {
    u32::try_from(bytes >> 10).map_or(f64::MAX, f64::from) * 1024.0
}

impl Engine {
    /// An engine without images, which says in `orders` what it has done.
    pub fn new(rates: Rates, orders: Orders) -> Self {
        let link = Link::new(rates);
        Self(Arc::new(Shared {
            rates: Mutex::new(rates),
            link: Mutex::new(link),
            images: Mutex::default(),
            tasks: Mutex::default(),
            orders,
            news: Notify::new(),
            wake: Notify::new(),
            turn: AtomicU64::new(0),
        }))
    }

    /// How fills are bounded.
    pub fn rates(&self) -> Rates {
        *self.0.lock_rates()
    }

    /// Bounds them otherwise, from now on. What is under way comes to its end.
    pub fn set_rates(&self, rates: Rates) {
        let now = clock::now();
        // Under the lock of the images, so that one that comes meanwhile gets the old rate and then the new one.
        let images = self.lock_images();
        *self.0.lock_rates() = rates;
        images.iter().for_each(|image| image.set_rate(now, rates.image));
        drop(images);
        self.0.link().budget.set_rate(now, rates.server);
        self.0.news.notify_waiters();
        self.0.wake.notify_one();
    }

    /// Fills `image` too, at the rate that each image has.
    pub fn add(&self, image: Arc<Image>) {
        let mut images = self.lock_images();
        image.set_rate(clock::now(), self.rates().image);
        images.push(image);
        drop(images);
        self.0.wake.notify_one();
    }

    /// The images that are filled.
    pub fn images(&self) -> Vec<Arc<Image>> {
        self.lock_images().clone()
    }

    fn lock_images(&self) -> MutexGuard<'_, Vec<Arc<Image>>> {
        self.0.images.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Carries out an order for `image`, whose bytes come from `source` if that has them. `is_held`: as told to
    /// [`Self::hold`].
    pub fn carry_out(&self, order: Arc<Order>, image: Arc<Image>, source: Option<SharedExport>, is_held: bool) {
        self.0.tasks().add(order, image, source, is_held);
        self.0.wake.notify_one();
    }

    /// Holds those orders for which `is_held` says so, because somebody else brings what they are for, and lets the
    /// others go on. One with a deadline is held only as long as it can still be met without.
    pub fn hold(&self, is_held: impl Fn(&Order) -> bool) {
        if self.0.tasks().hold(is_held) {
            self.0.wake.notify_one();
        }
    }

    /// Whether an order is being carried out.
    pub fn carries_out(&self, id: u64) -> bool {
        self.0.tasks().has(id)
    }

    /// Goes on with those orders only for which `is_active` holds.
    pub fn retain(&self, is_active: impl Fn(u64) -> bool) {
        self.0.tasks().retain(is_active);
    }

    /// When orders will be done; `None` while nobody knows how fast anything is. No order is faster than its own rate,
    /// that of its image, or the server's, which is all that is known before the first bytes have come.
    pub fn forecast(&self) -> Option<Forecast> {
        let rate = self.0.rate();
        let orders = self.0.tasks().forecast(clock::moment(), rate);
        (rate > 0.0 || !orders.is_empty()).then_some(Forecast { rate, orders })
    }

    /// Who is to be told of what clients wait for.
    pub fn observer(&self) -> Arc<dyn Observer> {
        Arc::clone(&self.0) as Arc<dyn Observer>
    }

    /// How the link to the upstreams is used now.
    pub fn link(&self) -> LinkStatus {
        let link = self.0.link();
        let Link { window, runs, .. } = &*link;
        LinkStatus { window: window.limit(), in_flight: window.in_flight(), fetches: *runs, rate: window.rate() }
    }

    /// Looks from time to time, for ever. One task of a worker does this.
    pub async fn run(self) {
        loop {
            // Whoever finds meanwhile that there is more to do later wakes us.
            self.0.link().next_look = None;
            let latest = clock::now() + LOOK;
            let until = self.start_all().map_or(latest, |until| until.min(latest));
            self.0.link().next_look = Some(until);
            // Whether it is news or time does not matter.
            let _ = tokio::time::timeout_at(until.into(), self.0.wake.notified()).await;
        }
    }

    /// Has everything leave that may, now and when its time has come. On a worker at once; elsewhere it is left to one.
    pub fn pump(&self) {
        let until = if crate::worker::index().is_some() { self.start_all() } else { Some(clock::now()) };
        if let Some(until) = until {
            self.0.look_by(until);
        }
    }

    /// The same; gives when there may be more, if nothing happens before.
    fn start_all(&self) -> Option<Instant> {
        loop {
            match self.look(clock::now()) {
                Look::Leaves(run) => {
                    tokio::task::spawn_local(self.clone().fetch(*run));
                }
                Look::Waits(until) => return until,
            }
        }
    }

    async fn fetch(self, run: Run) {
        let Run { image, range, cause, can_wait, first, source, order } = run;
        let length = range.length();
        let under_way = UnderWay { shared: Arc::clone(&self.0), bytes: length, can_wait };
        let (admitted, left) = (AtomicU64::new(first), AtomicU64::new(0));
        let pace = Arc::new(Paced { engine: self.clone(), can_wait, bytes: length, admitted, left });
        let ahead = Ahead::paced(cause, Arc::<Paced>::clone(&pace), source);
        let Brought { bytes, missed } = image.mirror.bring(range, ahead).await;
        image.ended(clock::now(), bytes, missed);
        self.refund(&image, order, length.saturating_sub(pace.left.load(Ordering::Relaxed)));
        drop((under_way, pace));
        self.pump();
    }

    /// Bytes that a rate was charged for have not been asked for: they turned out to be zero, or to be here.
    fn refund(&self, image: &Image, order: Option<u64>, bytes: u64) {
        if bytes == 0 {
            return;
        }
        if let Some(order) = order {
            self.0.tasks().refund(order, bytes);
        }
        image.refund(bytes);
        self.0.link().budget.refund(bytes);
    }

    /// Finds what may leave now, and lets it.
    fn look(&self, now: Instant) -> Look {
        let most = match self.0.link().room(now) {
            Ok(most) => most,
            Err(until) => return Look::Waits(until),
        };
        let images = self.images();
        let turn = usize::try_from(self.0.turn.fetch_add(1, Ordering::Relaxed)).unwrap_or(0);
        let in_turn = (0..images.len()).map(|index| &images[(turn.wrapping_add(index)) % images.len()]);
        let (ready, waiting): (Vec<_>, Vec<_>) = in_turn.partition(|image| image.wait(now).is_none());
        let until = waiting.into_iter().filter_map(|image| image.wait(now)).min();
        let until = match self.look_at_orders(most, true, now) {
            Look::Waits(at) => earlier(until, at),
            leaves => return leaves,
        };
        if let Some(leaves) = self.look_at_clients(&ready, most, now) {
            return leaves;
        }
        if let Some(at) = self.0.link().hold(now) {
            return Look::Waits(earlier(until, Some(at)));
        }
        let leisure = self.0.link().leisure_run(now);
        let until = match self.look_at_orders(leisure, false, now) {
            Look::Waits(at) => earlier(until, at),
            leaves => return leaves,
        };
        match self.look_at_background(&ready, leisure, now) {
            Look::Waits(at) => Look::Waits(earlier(until, at)),
            leaves => leaves,
        }
    }

    /// Readahead and profiles.
    fn look_at_clients(&self, ready: &[&Arc<Image>], most: u64, now: Instant) -> Option<Look> {
        type Next = fn(&Image, u64) -> Option<ByteRange>;
        let sources: [(Cause, Next); 2] =
            [(Cause::Readahead, Image::next_readahead), (Cause::Profile, Image::next_of_profile)];
        sources.into_iter().find_map(|(cause, next)| {
            let (image, range) = ready.iter().find_map(|image| next(image, most).map(|range| (image, range)))?;
            Some(self.leave(Wanted { image, range, cause, source: None, order: None }, false, now))
        })
    }

    fn look_at_orders(&self, most: u64, urgent_only: bool, now: Instant) -> Look {
        let mut done = Vec::new();
        let mut tasks = self.0.tasks();
        if tasks.is_empty() {
            return Look::Waits(None);
        }
        let wish = tasks.next(clock::moment(), self.0.rate(), most, urgent_only, &mut done);
        drop(tasks);
        for id in done {
            tracing::info!(order = id, "an order to prefetch is done");
            let orders = self.0.orders.clone();
            tokio::task::spawn_local(async move { orders.end(id, State::Done).await });
        }
        match wish {
            Wish::Later(until) => Look::Waits(until),
            Wish::Fetch { task: Fetch { image, range, source, order }, is_urgent } => {
                let order = Some(order);
                let wanted = Wanted { image: &image, range, cause: Cause::Prefetch, source, order };
                self.leave(wanted, !is_urgent, now)
            }
        }
    }

    fn look_at_background(&self, ready: &[&Arc<Image>], most: u64, now: Instant) -> Look {
        let mut until = None;
        for image in ready {
            let (range, at) = image.next_of_background(now, most.max(image.mirror.chunk_size()));
            if let Some(range) = range {
                let wanted = Wanted { image, range, cause: Cause::Background, source: None, order: None };
                return self.leave(wanted, true, now);
            }
            until = earlier(until, at);
        }
        Look::Waits(until)
    }

    fn leave(&self, wanted: Wanted<'_>, can_wait: bool, now: Instant) -> Look {
        let Wanted { image, range, cause, source, order } = wanted;
        image.spend(now, range.length());
        let first = self.0.link().leave(range.length(), can_wait, now);
        Look::Leaves(Box::new(Run { image: Arc::clone(image), range, cause, can_wait, first, source, order }))
    }
}

impl Shared {
    fn tasks(&self) -> MutexGuard<'_, Tasks> {
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sees to it that the engine looks at `until`, if not before.
    fn look_by(&self, until: Instant) {
        if self.link().next_look.is_none_or(|next| until < next) {
            self.wake.notify_one();
        }
    }

    fn lock_rates(&self) -> MutexGuard<'_, Rates> {
        self.rates.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Bytes per second that orders can count on; 0 while that is not known.
    fn rate(&self) -> f64 {
        let measured = self.link().window.rate();
        let rate = match (measured, self.lock_rates().server) {
            (Some(measured), Some(limit)) => Some(measured.min(limit)),
            (measured, limit) => measured.or(limit),
        };
        rate.map_or(0.0, to_f64)
    }

    fn link(&self) -> MutexGuard<'_, Link> {
        self.link.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Link {
    fn new(rates: Rates) -> Self {
        let (window, budget) = (Window::new(SMALLEST_WINDOW, LARGEST_WINDOW), Budget::new(rates.server));
        Self { window, calm: Calm::default(), budget, runs: 0, claimed: 0, resting: 0, is_held: false, next_look: None }
    }

    /// How long the next fetch may be; or when there may be one, if nothing happens before.
    fn room(&self, now: Instant) -> Result<u64, Option<Instant>> {
        if let Some(until) = self.budget.wait(now) {
            return Err(Some(until));
        }
        let (limit, in_flight) = (self.window.limit(), self.window.in_flight());
        if self.runs >= RUNS || self.claimed >= MOST_CLAIMED || in_flight >= limit {
            return Err(None);
        }
        Ok((limit / 4).clamp(4 * KIB, LONGEST_RUN))
    }

    /// When what can wait may begin, if not now.
    fn hold(&mut self, now: Instant) -> Option<Instant> {
        // What has begun goes on first: else beginnings would pile up beside clients that never pause, and none of them
        // would come to its end in time.
        let until = if self.resting > 0 { Some(now + LOOK) } else { self.calm.wait(now) };
        self.is_held = until.is_some();
        until
    }

    /// Bytes of a fetch that can wait.
    fn leisure_run(&self, now: Instant) -> u64 {
        if self.calm.is_watched(now) { SHORT_RUN } else { LEISURE_RUN }
    }

    /// A fetch begins. Gives the bytes of its first request.
    fn leave(&mut self, bytes: u64, can_wait: bool, now: Instant) -> u64 {
        self.runs += 1;
        self.claimed += bytes;
        self.budget.spend(now, bytes);
        if can_wait {
            self.calm.left(now);
        } else {
            self.calm.began(now);
        }
        let part = self.part(bytes, can_wait, now).min(bytes);
        self.window.sent(now, part);
        part
    }

    /// It is over.
    fn ended(&mut self, bytes: u64, can_wait: bool, now: Instant) {
        self.runs -= 1;
        self.claimed -= bytes;
        if !can_wait {
            self.calm.ended(now);
        }
    }

    /// Bytes of one request of a fetch of `bytes`.
    fn part(&self, bytes: u64, can_wait: bool, now: Instant) -> u64 {
        if can_wait && self.calm.is_watched(now) { SHORT_PART.max(bytes / MOST_PARTS) } else { LONGEST_RUN }
    }

    /// Whether one more request of a fetch may leave; or when, if nothing happens before.
    fn may_go_on(&self, can_wait: bool, now: Instant) -> Result<(), Option<Instant>> {
        if can_wait && let Some(until) = self.calm.wait(now) {
            return Err(Some(until));
        }
        // Beside clients what can wait is to make no queue at all.
        let limit = self.window.limit() / if can_wait && self.calm.is_watched(now) { 2 } else { 1 };
        if self.window.in_flight() == 0 || self.window.in_flight() < limit { Ok(()) } else { Err(None) }
    }
}

impl Observer for Shared {
    fn began(&self) {
        self.link().calm.began(clock::now());
    }

    fn ended(&self, bytes: u64, latency: Option<Duration>) {
        let now = clock::now();
        let mut link = self.link();
        link.calm.ended(now);
        if let Some(latency) = latency {
            link.window.demand_landed(now, bytes, latency);
        }
        let is_held = link.is_held;
        drop(link);
        self.news.notify_waiters();
        if is_held {
            self.wake.notify_one();
        }
    }
}

/// A fetch under way. Dropped, it is over.
struct UnderWay {
    shared: Arc<Shared>,
    bytes: u64,
    can_wait: bool,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.shared.link().ended(self.bytes, self.can_wait, clock::now());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mirror::{Space, SpaceSettings};
    use futures_util::FutureExt;

    #[test]
    fn only_what_can_wait_leaves_the_link_to_clients() {
        let now = clock::now();
        let mut link = Link::new(Rates::default());
        // A client waits; readahead has begun, and its second request is due.
        link.calm.began(now);
        link.calm.left(now);
        assert_eq!(link.leave(4 * KIB, false, now), 4 * KIB);
        let soon = now + Duration::from_millis(1);
        assert_eq!(link.may_go_on(false, soon), Ok(()));
        assert!(link.may_go_on(true, soon).is_err());
    }

    #[test]
    fn what_may_leave_soon_does_not_wait_for_the_next_look() {
        let scratch = tempfile::tempdir().unwrap();
        let space = Space::new(scratch.path(), SpaceSettings::default());
        let engine = Engine::new(Rates::default(), Orders::open(scratch.path(), &space));
        let is_woken = || std::pin::pin!(engine.0.wake.notified()).now_or_never().is_some();
        let now = clock::now();
        engine.0.link().next_look = Some(now + LOOK);
        engine.0.look_by(now + 2 * LOOK);
        assert!(!is_woken(), "it looks before that");
        engine.0.look_by(now + LOOK / 2);
        assert!(is_woken());
        engine.0.link().next_look = None;
        engine.0.look_by(now + 2 * LOOK);
        assert!(is_woken(), "it may have looked already at what has changed");
    }

    #[test]
    fn nothing_that_can_wait_begins_before_what_has_begun_goes_on() {
        let now = clock::now();
        let mut link = Link::new(Rates::default());
        assert_eq!(link.hold(now), None);
        link.resting = 1;
        assert!(link.hold(now).is_some() && link.is_held);
    }

    #[test]
    fn fills_leave_half_of_what_is_brought_at_a_time_to_clients() {
        let now = clock::now();
        let mut link = Link::new(Rates::default());
        let mut begun = 0;
        // Large chunks, of which little is under way.
        while link.room(now).is_ok() {
            let first = link.leave(4 * MIB, true, now);
            link.window.withdrawn(first);
            begun += 4 * MIB;
        }
        assert_eq!(begun, MOST_CLAIMED);
        link.ended(4 * MIB, true, now);
        assert!(link.room(now).is_ok());
    }

    #[test]
    fn a_large_chunk_comes_over_beside_clients_that_never_pause() {
        let now = clock::now();
        let mut link = Link::new(Rates::default());
        link.calm.began(now);
        for bytes in [64 * KIB, 256 * KIB, 4 * MIB] {
            assert!(link.part(bytes, true, now) * MOST_PARTS >= bytes, "{bytes}");
        }
        assert_eq!(link.part(64 * KIB, true, now), SHORT_PART);
    }
}
