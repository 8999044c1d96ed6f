//! How many bytes may be under way without being felt.
//!
//! All fills of a server share one window towards an upstream; what its clients read goes beside it and is not held
//! back. The controller looks at delay, not loss: what waits in a queue is late before anything is lost, and a reader
//! feels it at once. Latencies are compared with the least that was seen lately, as in TCP Vegas (Brakmo and Peterson,
//! 1995), for a target delay that is the same whoever makes the queue, as in LEDBAT (RFC 6817): beside clients that
//! fill the link the window falls to its floor. It moves by proportion, as in FAST TCP (Wei, Jin, Low and Hegde,
//! 2006): with a latency of `base + queue`, the window that leaves `target` of queue is `window * (base + target) /
//! (base + queue)`. Once in a while it is drained to see the least latency again, as in BBR (Cardwell et al., 2016).
//!
//! Requests of different sizes take different times, so each power of two has its own least latency (`base`). The queue of a
//! round is the *least* among its samples: noise only ever adds, and what even the luckiest request waited for stands.
//!
//! Limits: a base that has never been seen without a queue of others cannot be told from a longer road.
//!
//! Owns: the limit, the rate, what is in flight. Does not own: requests, order, time. Pure.

mod base;

#[cfg(test)]
mod tests;

use std::time::{Duration, Instant};

use base::Bases;

use super::budget::time_for;
use crate::units::KIB;

/// Requests' worth of queue that are aimed at while no client reads.
const REQUESTS: u32 = 2;
/// What part of the latency may be queue.
const PART: u32 = 4;
/// A queue shorter than this is a busy processor, not a link.
const LEAST_TARGET: Duration = Duration::from_micros(200);
/// Samples that a round has at least.
const SAMPLES: u32 = 4;
/// How often the window is drained, unless the least latency was met meanwhile.
const PROBE: Duration = Duration::from_secs(15);
/// A rate is taken over at least this long, and a latency: what lands in less may have come together.
const PERIOD: Duration = Duration::from_millis(5);
/// A latency of less than so many eighths of the least is as good as the least.
const AS_GOOD: u32 = 9;

/// The window of all fills from one upstream.
#[derive(Debug)]
pub struct Window {
    floor: u64,
    ceiling: u64,
    /// `floor <= limit <= ceiling`.
    limit: u64,
    in_flight: u64,
    bases: Bases,
    round: Option<Round>,
    /// The window has not met a queue yet: it doubles.
    is_starting: bool,
    /// Since when no latency was near the least.
    last_good: Option<Instant>,
    /// While it drains: what the limit was.
    drained: Option<u64>,
    meter: Option<Meter>,
    /// Bytes per second, of fills alone and of all.
    rate: Option<u64>,
    delivered: Option<u64>,
    /// Of the last fill that landed.
    latency: Duration,
    /// The mean request of fills in the last round, in bytes.
    request: u64,
}

/// What landed since the window last changed.
#[derive(Debug, Clone, Copy)]
struct Round {
    /// Bytes of fills that land in it: the window when it began.
    bytes: u64,
    filled: u64,
    requests: u64,
    samples: u32,
    /// The least queue that was met, and the least latency of that class.
    queue: Option<(Duration, Duration)>,
    longest: u64,
    /// Bytes of fills that failed in it. They count as one reason to send less until as many have failed again as fit
    /// into the window: what is sent together fails together.
    failed: u64,
    /// Whether it began after a pause: then even the first into an empty link met no queue, whatever the window.
    is_opening: bool,
    /// Whether the window was all used at a time: else nothing is learned from a fast link.
    was_full: bool,
}

/// What landed since a rate was last taken.
#[derive(Debug, Clone, Copy)]
struct Meter {
    began: Instant,
    /// Since when nothing is in flight, and how long it was so before: that time tells nothing of the link.
    idle_since: Option<Instant>,
    idle: Duration,
    filled: u64,
    demanded: u64,
    /// Whether all rounds used the whole window.
    is_telling: bool,
}

impl Meter {
    const fn new(now: Instant, is_idle: bool) -> Self {
        let idle_since = if is_idle { Some(now) } else { None };
        Self { began: now, idle_since, idle: Duration::ZERO, filled: 0, demanded: 0, is_telling: true }
    }

    /// Something is sent. Gives how long nothing was.
    fn sent(&mut self, now: Instant) -> Duration {
        let pause = self.idle_since.take().map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        self.idle += pause;
        pause
    }
}

impl Round {
    const fn new(bytes: u64, was_full: bool) -> Self {
        Self {
            bytes,
            filled: 0,
            requests: 0,
            samples: 0,
            queue: None,
            longest: 0,
            failed: 0,
            is_opening: false,
            was_full,
        }
    }
}

impl Window {
    /// A window of `floor` bytes, which must be enough for one request, that grows to `ceiling` at most.
    pub fn new(floor: u64, ceiling: u64) -> Self {
        let floor = floor.max(4 * KIB);
        Self {
            floor,
            ceiling: ceiling.max(floor),
            limit: floor,
            in_flight: 0,
            bases: Bases::default(),
            round: None,
            is_starting: true,
            last_good: None,
            drained: None,
            meter: None,
            rate: None,
            delivered: None,
            latency: Duration::ZERO,
            request: 0,
        }
    }

    /// Bytes of fills that may be in flight.
    pub const fn limit(&self) -> u64 {
        if self.drained.is_some() { self.floor } else { self.limit }
    }

    /// Bytes of fills that are.
    pub const fn in_flight(&self) -> u64 {
        self.in_flight
    }

    /// Whether a request of `bytes` may be sent now. One at a time always may.
    pub const fn allows(&self, bytes: u64) -> bool {
        self.in_flight == 0 || self.in_flight.saturating_add(bytes) <= self.limit()
    }

    /// Bytes per second that fills were given lately while they used the whole window, smoothed.
    pub const fn rate(&self) -> Option<u64> {
        self.rate
    }

    /// A fill of `bytes` was sent.
    pub fn sent(&mut self, now: Instant, bytes: u64) {
        let pause = self.meter.get_or_insert_with(|| Meter::new(now, false)).sent(now);
        if pause > self.latency {
            let failed = self.round.map_or(0, |round| round.failed);
            self.round = Some(Round { failed, is_opening: true, ..Round::new(self.limit(), false) });
        }
        self.in_flight += bytes;
        let is_full = self.in_flight + bytes > self.limit();
        let limit = self.limit();
        let round = self.round.get_or_insert_with(|| Round::new(limit, is_full));
        round.was_full |= is_full;
    }

    /// A fill that was counted as sent has not been sent after all.
    pub fn withdrawn(&mut self, bytes: u64) {
        self.in_flight = self.in_flight.saturating_sub(bytes);
        if self.in_flight == 0 {
            // Since when nothing is in flight is not known.
            self.meter = None;
        }
    }

    /// A fill of `bytes` arrived, `latency` after it was sent.
    pub fn landed(&mut self, now: Instant, bytes: u64, latency: Duration) {
        self.in_flight = self.in_flight.saturating_sub(bytes);
        self.latency = latency;
        self.sample(now, bytes, latency);
        if let Some(meter) = &mut self.meter {
            meter.filled += bytes;
            meter.idle_since = (self.in_flight == 0).then_some(now);
        }
        if let Some(round) = &mut self.round {
            round.filled += bytes;
            round.requests += 1;
            round.longest = round.longest.max(bytes);
            if round.filled >= round.bytes && round.samples >= SAMPLES {
                self.end_round(now);
            }
        }
    }

    /// A fill of `bytes` did not arrive: an error, or nothing in time.
    pub fn failed(&mut self, now: Instant, bytes: u64) {
        self.in_flight = self.in_flight.saturating_sub(bytes);
        self.is_starting = false;
        self.drained = None;
        self.meter = Some(Meter::new(now, self.in_flight == 0));
        let before = self.round.map_or(0, |round| round.failed);
        let is_new = before == 0 || before + bytes > self.limit;
        if is_new {
            self.limit = (self.limit / 2).max(self.floor);
        }
        let failed = if is_new { bytes } else { before + bytes };
        self.round = Some(Round { failed, ..Round::new(self.limit, false) });
    }

    /// What a client read arrived: `bytes`, `latency` after it was asked for.
    pub fn demand_landed(&mut self, now: Instant, bytes: u64, latency: Duration) {
        self.sample(now, bytes, latency);
        if let Some(meter) = self.meter.as_mut().filter(|meter| meter.idle_since.is_none()) {
            meter.demanded += bytes;
        }
    }

    fn sample(&mut self, now: Instant, bytes: u64, latency: Duration) {
        self.bases.note(now, bytes, latency);
        let base = self.bases.least(bytes, self.delivered).unwrap_or(latency).min(latency);
        if latency * 8 <= base * AS_GOOD || self.last_good.is_none() {
            self.last_good = Some(now);
        }
        if let Some(round) = &mut self.round {
            round.samples += 1;
            let queue = latency.saturating_sub(base);
            if round.queue.is_none_or(|(least, _)| queue < least) {
                round.queue = Some((queue, base));
            }
        }
    }

    fn end_round(&mut self, now: Instant) {
        let Some(round) = self.round.take() else { return };
        self.request = round.filled / round.requests.max(1);
        self.measure(&round, now);
        if let Some(limit) = self.drained.take() {
            self.limit = limit;
            self.last_good = Some(now);
        } else if let Some((queue, base)) = round.queue {
            self.steer(&round, queue, base);
            let is_stale = self.last_good.is_some_and(|good| now.duration_since(good) > PROBE);
            self.drained = (is_stale && self.limit > self.floor).then_some(self.limit);
        }
        let is_full = self.in_flight + round.longest > self.limit();
        // A drain waits for what is still on its way, and then for what is sent into an empty queue.
        let bytes = if self.drained.is_some() { self.in_flight + self.floor } else { self.limit };
        self.round = Some(Round::new(bytes, is_full));
    }

    /// Takes the rates, if it is time. Rounds that did not use their window tell only that it is at least so much.
    fn measure(&mut self, round: &Round, now: Instant) {
        let is_idle = self.in_flight == 0;
        let meter = self.meter.get_or_insert_with(|| Meter::new(now, is_idle));
        meter.is_telling &= round.was_full && self.drained.is_none();
        let took = now.saturating_duration_since(meter.began).saturating_sub(meter.idle);
        let latency = round.queue.map_or(Duration::ZERO, |(queue, base)| queue + base);
        if took < PERIOD.max(latency) {
            return;
        }
        let Meter { filled, demanded, is_telling, .. } = std::mem::replace(meter, Meter::new(now, is_idle));
        for (rate, bytes) in [(&mut self.rate, filled), (&mut self.delivered, filled + demanded)] {
            let now = per_second(bytes, took);
            *rate = match *rate {
                None => is_telling.then_some(now),
                Some(before) if is_telling => Some(before - before / 4 + now / 4),
                Some(before) => Some(before.max(now)),
            };
        }
    }

    /// The queue to aim at: some requests' worth, or a part of the latency.
    fn target(&self, base: Duration) -> Duration {
        let one = self.delivered.map_or(Duration::ZERO, |rate| time_for(self.request, rate));
        (one * REQUESTS).max(base / PART).max(LEAST_TARGET)
    }

    fn steer(&mut self, round: &Round, queue: Duration, base: Duration) {
        let target = self.target(base);
        if queue >= target / 2 {
            self.is_starting = false;
        }
        if queue < target && (round.is_opening || !round.was_full) {
            return;
        }
        if self.is_starting {
            self.limit = self.limit.saturating_mul(2).min(self.ceiling);
            return;
        }
        let aim = scale(self.limit, base + target, base + queue);
        let next = self.limit / 2 + aim / 2;
        // Additive at least, where the proportion is lost in rounding.
        let next = if queue < target { next.max(self.limit + self.floor / 8) } else { next };
        self.limit = next.min(self.limit.saturating_mul(2)).clamp(self.floor, self.ceiling);
    }
}

/// `bytes * numerator / denominator`.
fn scale(bytes: u64, numerator: Duration, denominator: Duration) -> u64 {
    let scaled = u128::from(bytes) * numerator.as_nanos() / denominator.as_nanos().max(1);
    u64::try_from(scaled).unwrap_or(u64::MAX)
}

fn per_second(bytes: u64, took: Duration) -> u64 {
    scale(bytes, Duration::from_secs(1), took)
}
