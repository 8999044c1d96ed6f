//! The window on a link that is known: a queue, first in first out, simulated.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use super::*;
use crate::units::{GIB, MIB};

const KEEP: u64 = 64 * KIB;
const MOST: u64 = GIB;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Fill,
    Demand,
}

/// A link, a server that answers at once, a fill that never ends, and clients.
struct Link {
    window: Window,
    epoch: Instant,
    /// Nanoseconds since then.
    now: u64,
    /// Bytes per second.
    rate: u64,
    round_trip: u64,
    /// Latencies are multiplied by 1 +- so many hundredths.
    noise: u64,
    /// When the queue will be empty.
    free: u64,
    /// Arrivals: when, sent when, bytes, of whom.
    flying: BinaryHeap<Reverse<(u64, u64, u64, Kind)>>,
    sizes: &'static [u64],
    sent: usize,
    /// Fills that wait to be sent; by default they never end.
    backlog: u64,
    /// Requests of 64 KiB that clients keep in flight.
    readers: u64,
    random: u64,
    filled: u64,
    demanded: u64,
    /// Sum and number of the queues that fills met, in nanoseconds.
    queued: (u64, u64),
}

const MS: u64 = 1_000_000;
const SECOND: u64 = 1000 * MS;
const MIXED: &[u64] = &[64 * KIB, 256 * KIB, 64 * KIB, 16 * KIB, 1 << 20, 64 * KIB, 128 * KIB];
const EVEN: &[u64] = &[64 * KIB];

impl Link {
    fn new(megabits: u64, round_trip: u64, sizes: &'static [u64]) -> Self {
        Self {
            window: Window::new(KEEP, MOST),
            epoch: crate::clock::now(),
            now: 0,
            rate: megabits * 1_000_000 / 8,
            round_trip,
            noise: 0,
            free: 0,
            flying: BinaryHeap::new(),
            sizes,
            sent: 0,
            backlog: u64::MAX,
            readers: 0,
            random: 0x9e37_79b9_7f4a_7c15,
            filled: 0,
            demanded: 0,
            queued: (0, 0),
        }
    }

    fn instant(&self) -> Instant {
        self.epoch + Duration::from_nanos(self.now)
    }

    fn send(&mut self, bytes: u64, kind: Kind) {
        let start = self.free.max(self.now);
        if kind == Kind::Fill {
            self.queued = (self.queued.0 + (start - self.now), self.queued.1 + 1);
        }
        self.free = start + bytes * SECOND / self.rate;
        let latency = self.free + self.round_trip - self.now;
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let hundredths = 100 - self.noise + (self.random >> 11) % (2 * self.noise + 1);
        self.flying.push(Reverse((self.now + latency * hundredths / 100, self.now, bytes, kind)));
    }

    /// Sends what may be sent.
    fn fill(&mut self) {
        loop {
            let bytes = self.sizes[self.sent % self.sizes.len()];
            if self.backlog < bytes || !self.window.allows(bytes) {
                return;
            }
            self.backlog -= bytes;
            self.sent += 1;
            self.window.sent(self.instant(), bytes);
            self.send(bytes, Kind::Fill);
        }
    }

    fn set_readers(&mut self, readers: u64) {
        for _ in self.readers..readers {
            self.send(KEEP, Kind::Demand);
        }
        self.readers = readers;
    }

    /// Goes on for so long. What part of the link's bytes was used, and the mean queue that fills met.
    fn run(&mut self, time: u64) -> (f64, Duration) {
        let end = self.now + time;
        (self.filled, self.demanded, self.queued) = (0, 0, (0, 0));
        self.fill();
        while let Some(Reverse((at, sent, bytes, kind))) = self.flying.pop() {
            if at > end {
                self.flying.push(Reverse((at, sent, bytes, kind)));
                break;
            }
            self.now = at;
            let latency = Duration::from_nanos(at - sent);
            match kind {
                Kind::Fill => {
                    self.filled += bytes;
                    self.window.landed(self.instant(), bytes, latency);
                }
                Kind::Demand => {
                    self.demanded += bytes;
                    self.window.demand_landed(self.instant(), bytes, latency);
                    if self.readers > 0 {
                        self.send(KEEP, Kind::Demand);
                    }
                }
            }
            self.fill();
        }
        self.now = end;
        let mean = self.queued.0 / self.queued.1.max(1);
        (self.share(self.filled + self.demanded, time), Duration::from_nanos(mean))
    }

    #[expect(clippy::cast_precision_loss, reason = "a ratio")]
    fn share(&self, bytes: u64, time: u64) -> f64 {
        bytes as f64 / (self.rate as f64 * time as f64 / SECOND as f64)
    }

    /// The longest queue that is fine: three of the longest requests, some of the way, and what a processor may take.
    fn fine(&self) -> Duration {
        let longest = self.sizes.iter().max().unwrap();
        Duration::from_nanos(longest * SECOND / self.rate * 3 + self.round_trip * 3 / 10) + LEAST_TARGET
    }
}

/// Megabits per second, nanoseconds.
const LINKS: [(u64, u64); 9] = [
    (10, 50 * MS),
    (10, MS),
    (100, 20 * MS),
    (200, 2 * MS),
    (1000, MS / 2),
    (1000, 50 * MS),
    (10_000, MS / 20),
    (10_000, 10 * MS),
    (10_000, 50 * MS),
];

#[test]
fn a_link_is_used_and_its_queue_stays_short() {
    for (megabits, round_trip) in LINKS {
        for sizes in [EVEN, MIXED] {
            let mut link = Link::new(megabits, round_trip, sizes);
            link.run(4 * SECOND);
            // The longest request takes most of a second on the slowest link.
            let (used, queue) = link.run(if megabits < 100 { 60 * SECOND } else { 2 * SECOND });
            let name = format!("{megabits} Mbit/s, {round_trip} ns");
            println!("{name}: {used:.3} {queue:?} of {:?}, limit {}", link.fine(), link.window.limit());
            assert!(used >= 0.9, "{name}: {used:.3} used");
            assert!(queue <= link.fine(), "{name}: {queue:?} of queue");
        }
    }
}

#[test]
fn it_stays_so_while_bases_age_and_windows_are_drained() {
    for (megabits, round_trip) in [(100, 20 * MS), (1000, MS), (1000, 50 * MS)] {
        let mut link = Link::new(megabits, round_trip, MIXED);
        link.run(5 * SECOND);
        for period in 0..10 {
            let (used, queue) = link.run(20 * SECOND);
            println!("{megabits} {period}: {used:.3} {queue:?}");
            assert!(used >= 0.9, "{megabits} Mbit/s, {period}: {used:.3} used");
            assert!(queue <= link.fine(), "{megabits} Mbit/s, {period}: {queue:?} of queue");
        }
    }
}

#[test]
fn it_follows_a_link_that_becomes_slower_or_faster() {
    for (megabits, round_trip) in [(10, 20 * MS), (100, 20 * MS), (1000, MS), (10_000, 10 * MS)] {
        let mut link = Link::new(megabits, round_trip, EVEN);
        link.run(5 * SECOND);
        for factor in [1, 2, 4, 2] {
            link.rate = megabits * 1_000_000 / 8 * factor / 2;
            link.run(4 * SECOND);
            let (used, queue) = link.run(4 * SECOND);
            assert!(used >= 0.9, "{megabits} * {factor} / 2 Mbit/s: {used:.3} used");
            assert!(queue <= link.fine() * 2, "{megabits} * {factor} / 2 Mbit/s: {queue:?} of queue");
        }
    }
}

#[test]
fn beside_clients_that_fill_the_link_it_falls_to_its_floor_and_comes_back() {
    for (megabits, round_trip) in [(200, 2 * MS), (1000, MS), (1000, 20 * MS)] {
        let mut link = Link::new(megabits, round_trip, EVEN);
        link.run(3 * SECOND);
        let capacity = link.rate * round_trip / SECOND / KEEP;
        link.set_readers(2 * capacity + 32);
        link.run(3 * SECOND);
        assert_eq!(link.window.limit(), KEEP, "{megabits} Mbit/s");
        link.readers = 0;
        link.run(5 * SECOND);
        let (used, _) = link.run(3 * SECOND);
        assert!(used >= 0.9, "{megabits} Mbit/s: {used:.3} used afterwards");
    }
}

#[test]
fn noise_does_not_make_it_shy() {
    for (megabits, round_trip) in LINKS {
        let mut link = Link::new(megabits, round_trip, EVEN);
        link.noise = 30;
        link.run(5 * SECOND);
        let (used, _) = link.run(3 * SECOND);
        println!("{megabits} {round_trip}: {used:.3}");
        assert!(used >= 0.8, "{megabits} Mbit/s, {round_trip} ns: {used:.3} used");
    }
}

#[test]
fn failures_that_come_together_halve_it_once() {
    let mut link = Link::new(1000, 20 * MS, EVEN);
    link.run(3 * SECOND);
    let (limit, flying) = (link.window.limit(), link.window.in_flight());
    let now = link.instant();
    for _ in 0..flying / KEEP / 2 {
        link.window.failed(now, KEEP);
    }
    assert_eq!(link.window.limit(), limit / 2);
    assert!(link.window.in_flight() <= flying / 2 + KEEP);
    for _ in 0..10_000 {
        link.window.failed(now, KEEP);
    }
    assert_eq!(link.window.limit(), KEEP);
    assert!(link.window.allows(MIB), "one may always be tried");
}

#[test]
fn the_rate_is_that_of_the_link() {
    let mut link = Link::new(200, 2 * MS, MIXED);
    assert_eq!(link.window.rate(), None);
    link.run(5 * SECOND);
    let rate = link.window.rate().unwrap();
    assert!(rate.abs_diff(link.rate) <= link.rate / 10, "{rate} of {}", link.rate);
}

#[test]
fn fills_that_come_and_go_leave_it_the_rate_and_the_window_of_the_link() {
    for (megabits, round_trip) in [(200, 2 * MS), (1000, MS), (1000, 20 * MS)] {
        let mut link = Link::new(megabits, round_trip, EVEN);
        link.run(3 * SECOND);
        let (rate, limit) = (link.window.rate().unwrap(), link.window.limit());
        for _ in 0..50 {
            // Some windows' worth, and then nothing for long.
            link.backlog = limit * 5;
            link.run(5 * SECOND);
        }
        let (now, limit_now) = (link.window.rate().unwrap(), link.window.limit());
        let name = format!("{megabits} Mbit/s, {round_trip} ns");
        assert!(now >= rate / 2 && now <= rate * 5 / 4, "{name}: {now} after {rate}");
        assert!(limit_now >= limit / 2 && limit_now <= 2 * limit, "{name}: {limit_now} after {limit}");
    }
}

#[test]
fn what_lands_together_is_not_taken_for_a_faster_link() {
    let mut window = Window::new(KEEP, MOST);
    let (mut now, mut least) = (crate::clock::now(), u64::MAX);
    // A processor that is busy for 4 ms at a time finds all that came meanwhile: at most 100 MB/s.
    for turn in 0..1000 {
        let most = (window.limit() / KEEP).clamp(1, 100 * 4000 / 65);
        (0..most).for_each(|_| window.sent(now, KEEP));
        now += Duration::from_millis(4 * most.div_ceil(6));
        (0..most).for_each(|_| {
            now += Duration::from_nanos(100);
            window.landed(now, KEEP, Duration::from_millis(4 * most.div_ceil(6)));
        });
        if turn > 100 {
            least = least.min(window.limit());
        }
    }
    let rate = window.rate().unwrap();
    assert!(rate <= 200_000_000, "{rate}");
    assert!(least > KEEP, "{least}");
}
