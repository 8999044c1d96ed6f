//! Whether clients leave the link to what can wait.
//!
//! Fills that nobody waits for (background, orders with time to spare) leave the link to clients: none of their requests
//! leaves while a client waits for the upstream, nor until it has been quiet for a while. What counts as quiet is
//! learned from the clients: four times the usual time between two of their requests, within bounds, so that a client
//! that reads one chunk after the other is not met in the gaps between them. This is idle detection by the recent mean,
//! as disks schedule scrubbing (Mi, Riska, Zhang, Smirni, Riedel: "Efficient management of idleness in storage systems",
//! ACM TOS 5(2), 2009).
//!
//! So that they come to an end beside clients that never pause, one request leaves each [`TRICKLE`] whatever clients do.

use std::time::{Duration, Instant};

/// Quiet is at least this long, and at most as long as [`LONGEST_HOLD`].
const SHORTEST_HOLD: Duration = Duration::from_millis(2);
const LONGEST_HOLD: Duration = Duration::from_millis(250);
/// How many usual gaps it has to be quiet.
const GAPS: u32 = 4;
/// Longer gaps count as this long.
const LONGEST_GAP: Duration = Duration::from_millis(500);
/// One request that can wait leaves this often, in any case.
const TRICKLE: Duration = Duration::from_millis(250);
/// After this long without clients nobody is expected soon.
const FORGOTTEN: Duration = Duration::from_secs(10);

/// What clients, and what they wait for, do to the link.
#[derive(Debug, Default)]
pub(super) struct Calm {
    /// Requests that clients wait for, or soon will.
    in_flight: u32,
    last_began: Option<Instant>,
    last_ended: Option<Instant>,
    /// The usual time between two beginnings: a moving average that weighs the newest by an eighth. As long as nothing
    /// is known of it, it is long: a client's first requests are not to be met either.
    gap: Option<Duration>,
    trickled: Option<Instant>,
}

impl Calm {
    /// A request began that somebody waits for.
    pub(super) fn began(&mut self, now: Instant) {
        self.in_flight += 1;
        if let Some(last) = self.last_began {
            let gap = now.saturating_duration_since(last).min(LONGEST_GAP);
            self.gap = Some(self.gap.map_or(gap, |usual| (usual * 7 + gap) / 8));
        }
        self.last_began = Some(now);
    }

    /// One of them ended.
    pub(super) fn ended(&mut self, now: Instant) {
        self.in_flight = self.in_flight.saturating_sub(1);
        self.last_ended = Some(now);
    }

    /// When something that can wait may leave: `None`: now.
    pub(super) fn wait(&self, now: Instant) -> Option<Instant> {
        let trickle = self.trickled.map_or(now, |last| last + TRICKLE);
        let quiet = match (self.in_flight, self.last_ended) {
            (0, None) => return None,
            (0, Some(ended)) => ended + (self.gap.unwrap_or(LONGEST_GAP) * GAPS).clamp(SHORTEST_HOLD, LONGEST_HOLD),
            _ => trickle,
        };
        Some(quiet.min(trickle)).filter(|at| *at > now)
    }

    /// Something that can wait leaves.
    pub(super) const fn left(&mut self, now: Instant) {
        self.trickled = Some(now);
    }

    /// Whether a client may come soon, so that what leaves now must not be felt then.
    pub(super) fn is_watched(&self, now: Instant) -> bool {
        let last = self.last_ended.max(self.last_began);
        self.in_flight > 0 || last.is_some_and(|last| now.saturating_duration_since(last) < FORGOTTEN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock;

    /// Clients read one after the other, each in 5 ms; tries to send each millisecond. Gives how many were sent.
    fn beside(pause: Duration, seconds: u64) -> u32 {
        let mut now = clock::now();
        let end = now + Duration::from_secs(seconds);
        let mut calm = Calm::default();
        let mut sent = 0;
        let mut attempt = |calm: &mut Calm, now: Instant| {
            if calm.wait(now).is_none() {
                calm.left(now);
                sent += 1;
            }
        };
        while now < end {
            calm.began(now);
            for _ in 0..5 {
                now += Duration::from_millis(1);
                attempt(&mut calm, now);
            }
            calm.ended(now);
            let next = now + pause;
            while now < next {
                attempt(&mut calm, now);
                now += Duration::from_millis(1);
            }
        }
        sent
    }

    #[test]
    fn beside_clients_that_never_pause_it_trickles() {
        for (pause, why) in [(0, "four a second"), (10, "the gaps are theirs too"), (50, "longer ones too")] {
            let sent = beside(Duration::from_millis(pause), 10);
            assert!((38..=44).contains(&sent), "{why}: {sent}");
        }
    }

    #[test]
    fn seldom_clients_leave_it_most_of_the_time() {
        let sent = beside(Duration::from_secs(1), 20);
        assert!(sent > 20 * 600, "{sent} of some 20,000 attempts");
    }

    #[test]
    fn without_clients_nothing_waits() {
        let now = clock::now();
        let mut calm = Calm::default();
        calm.left(now);
        assert_eq!(calm.wait(now), None);
        assert!(!calm.is_watched(now));
        calm.began(now);
        calm.ended(now);
        assert!(calm.is_watched(now) && calm.wait(now + LONGEST_HOLD).is_none());
        assert!(!calm.is_watched(now + FORGOTTEN));
    }
}
