//! The least latency that was seen lately, for requests of each size.

use std::time::{Duration, Instant};

/// How long a minimum is certain to be remembered; at most twice as long. Roads change, but clients that fill the link
/// must not be taken for a longer road as soon as that. (RFC 6817 remembers ten minutes.)
const MEMORY: Duration = Duration::from_secs(60);
/// Requests up to 2^12 bytes are one class, those from 2^24 bytes another.
const SMALLEST: u32 = 12;
const CLASSES: usize = 13;

/// Least latencies by powers of two: a minimum over two periods, of which the younger is still running.
#[derive(Debug, Default)]
pub(super) struct Bases {
    began: Option<Instant>,
    current: [Option<Duration>; CLASSES],
    before: [Option<Duration>; CLASSES],
}

impl Bases {
    /// Notes a latency.
    pub(super) fn note(&mut self, now: Instant, bytes: u64, latency: Duration) {
        let began = *self.began.get_or_insert(now);
        if now.saturating_duration_since(began) > MEMORY {
            self.before = std::mem::take(&mut self.current);
            self.began = Some(now);
        }
        let least = &mut self.current[class(bytes)];
        *least = Some(least.map_or(latency, |least| least.min(latency)));
    }

    /// The least latency of a request of `bytes`, if a rate is known also from those of other sizes: it takes no longer
    /// than a longer request, and no longer than a shorter one and its own bytes. So a class that is rare, or was never
    /// alone, has no base of its own that hides a queue.
    pub(super) fn least(&self, bytes: u64, rate: Option<u64>) -> Option<Duration> {
        let own = class(bytes);
        let bytes_take = rate.map(|rate| super::time_for(bytes, rate));
        let of = |class: usize| {
            let least = [self.current[class], self.before[class]].into_iter().flatten().min()?;
            if class >= own { Some(least) } else { bytes_take.map(|time| least + time) }
        };
        (0..CLASSES).filter_map(of).min()
    }
}

fn class(bytes: u64) -> usize {
    let power = bytes.max(1).ilog2().max(SMALLEST) - SMALLEST;
    usize::try_from(power).map_or(CLASSES - 1, |class| class.min(CLASSES - 1))
}
