//! How fast, for receivers of different strength.
//!
//! Losses up to [`RANDOM`] are taken for chance: parity mends them, and a lower rate would not. Who surely loses more, twice
//! running, or whose own host throws datagrams away, cannot take the rate: it falls to what that receiver gets.
//! What it can take is tried again later, more and more rarely and in the end no more, so a rate that is too high for
//! somebody does not come back for ever. Who cannot take the lowest rate is dropped.
//!
//! Owns: the rate. Does not own: pacing (`multicast`), what is lost by chance (`repair`).

use std::collections::BTreeMap;
use std::time::Duration;

use super::ReceiverId;

/// The part of datagrams that may be lost by chance.
const RANDOM: f64 = 0.10;
/// Chance takes datagrams in rows of about so many: fewer rows prove less.
const ROW: f64 = 20.0;
/// The part of datagrams that a host may throw away without being too slow.
const OVERFLOW: f64 = 0.01;
/// So many datagrams are looked at together, or those of so long if there were more than a few.
const ENOUGH: u64 = 2000;
const LONG: Duration = Duration::from_secs(2);
const FEW: u64 = 50;
/// Looks running that must say the same.
const STRIKES: u32 = 2;
/// At the lowest rate, where a receiver is dropped: a host that is busy for a moment is not to lose the session for it.
const LAST_STRIKES: u32 = 6;
/// The first trial of a higher rate comes so long after it fell, each further one twice as long after the last.
const PROBE: Duration = Duration::from_secs(4);
/// A trial that does no harm is followed by the next after this.
const CLIMB: Duration = Duration::from_secs(1);
/// What a trial multiplies what a receiver is believed to take with.
const STEP: f64 = 1.06;
/// Trials that did harm before it is left at that.
const MOST_PROBES: u32 = 4;
/// Receivers that are too slow, at most; more of them do not lower the rate further.
const MOST_SLOW: usize = 4096;

/// What a report says of the datagrams since the last one.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Reception {
    pub(super) seen: u32,
    pub(super) lost: u32,
    pub(super) overflowed: u32,
}

impl Reception {
    /// Datagrams, whether they came or not.
    pub(super) fn all(self) -> u64 {
        u64::from(self.seen) + u64::from(self.lost)
    }

    #[expect(clippy::cast_precision_loss, reason = "less than 2^33")]
    fn part(self, of: u32) -> f64 {
        f64::from(of) / self.all().max(1) as f64
    }

    const fn and(self, other: Self) -> Self {
        Self {
            seen: self.seen.saturating_add(other.seen),
            lost: self.lost.saturating_add(other.lost),
            overflowed: self.overflowed.saturating_add(other.overflowed),
        }
    }

    /// Whether it is more than chance: by two deviations, if losses come in rows whose lengths are by chance, too.
    #[expect(clippy::cast_precision_loss, reason = "less than 2^33")]
    fn is_bad(self) -> bool {
        let lost = self.part(self.lost);
        let deviation = (lost * (1.0 - lost) * 2.0 * ROW / self.all().max(1) as f64).sqrt();
        lost - 2.0 * deviation > RANDOM || self.part(self.overflowed) > OVERFLOW
    }
}

/// What follows for a receiver.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Stays,
    Dropped,
}

/// A receiver that something is known of.
#[derive(Debug)]
struct Hearer {
    /// What was reported since the last look, and when that was.
    gathered: Reception,
    looked: Duration,
    /// Bad looks running.
    strikes: u32,
    /// How often the rate had been lowered when it reported last: a report that covers both rates says nothing.
    falls: u64,
    /// What it takes, in bytes per second, and when to try more. `None`: whatever is sent.
    cap: Option<Cap>,
}

#[derive(Debug)]
struct Cap {
    rate: f64,
    probes: u32,
    again: Duration,
}

/// The rate.
#[derive(Debug)]
pub(super) struct Rate {
    least: f64,
    most: f64,
    current: f64,
    falls: u64,
    climbed: Duration,
    hearers: BTreeMap<ReceiverId, Hearer>,
}

#[expect(clippy::cast_precision_loss, reason = "rates are far below 2^52")]
fn rate_of(bytes: u64) -> f64 {
    bytes as f64
}

impl Rate {
    /// Begins at `most`. Bytes per second.
    pub(super) fn new(least: u64, most: u64) -> Self {
        let most = most.max(1);
        let least = least.clamp(1, most);
        Self {
            least: rate_of(least),
            most: rate_of(most),
            current: rate_of(most),
            falls: 0,
            climbed: Duration::ZERO,
            hearers: BTreeMap::new(),
        }
    }

    /// Bytes per second.
    #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "between two rates that were u64")]
    pub(super) const fn current(&self) -> u64 {
        self.current as u64
    }

    /// A receiver that takes part has reported.
    pub(super) fn report(&mut self, now: Duration, who: ReceiverId, reception: Reception) -> Verdict {
        if self.hearers.len() >= MOST_SLOW && !self.hearers.contains_key(&who) {
            return Verdict::Stays;
        }
        let falls = self.falls;
        let fresh = || Hearer { gathered: Reception::default(), looked: now, strikes: 0, falls, cap: None };
        let hearer = self.hearers.entry(who).or_insert_with(fresh);
        if hearer.falls != falls {
            *hearer = Hearer { cap: hearer.cap.take(), ..fresh() };
            return Verdict::Stays;
        }
        hearer.gathered = hearer.gathered.and(reception);
        let all = hearer.gathered.all();
        let is_enough = all >= ENOUGH || (all >= FEW && now.saturating_sub(hearer.looked) >= LONG);
        if !is_enough {
            return Verdict::Stays;
        }
        let reception = std::mem::take(&mut hearer.gathered);
        hearer.looked = now;
        hearer.strikes = if reception.is_bad() { hearer.strikes + 1 } else { 0 };
        let enough = if self.current <= self.least { LAST_STRIKES } else { STRIKES };
        if hearer.strikes < enough {
            return Verdict::Stays;
        }
        hearer.strikes = 0;
        let lost = reception.part(reception.lost).max(reception.part(reception.overflowed));
        self.fall(now, who, self.current * (1.0 - lost))
    }

    /// A receiver gets so much only.
    fn fall(&mut self, now: Duration, who: ReceiverId, gets: f64) -> Verdict {
        if self.current <= self.least {
            self.gone(who);
            return Verdict::Dropped;
        }
        let probes = self.hearers.get(&who).and_then(|hearer| hearer.cap.as_ref()).map_or(0, |cap| cap.probes + 1);
        let again = now + PROBE * 2_u32.pow(probes.min(MOST_PROBES));
        let rate = gets.max(self.least);
        if let Some(hearer) = self.hearers.get_mut(&who) {
            hearer.cap = Some(Cap { rate, probes, again });
        }
        self.falls += 1;
        self.current = self.current.min(rate);
        self.climbed = now;
        Verdict::Stays
    }

    /// A receiver is complete, silent, gone or dropped: the rate is no longer for it.
    pub(super) fn gone(&mut self, who: ReceiverId) {
        self.hearers.remove(&who);
    }

    /// Time has passed.
    pub(super) fn tick(&mut self, now: Duration) {
        if self.current >= self.most || now < self.climbed + CLIMB {
            return;
        }
        self.climbed = now;
        let goal = (self.current * STEP).min(self.most);
        for cap in self.hearers.values_mut().filter_map(|hearer| hearer.cap.as_mut()).filter(|cap| cap.rate < goal) {
            if now < cap.again || cap.probes >= MOST_PROBES {
                return;
            }
        }
        for cap in self.hearers.values_mut().filter_map(|hearer| hearer.cap.as_mut()) {
            cap.rate = cap.rate.max(goal);
        }
        self.current = goal;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id(number: u8) -> ReceiverId {
        ReceiverId([number; 16])
    }

    /// What a receiver that takes `capacity` bytes per second reports after half a second of 1000-byte datagrams.
    fn reception(rate: u64, capacity: u64, chance: f64) -> Reception {
        let sent = u32::try_from(rate / 2000).unwrap();
        let takes = u32::try_from(capacity / 2000).unwrap().min(sent);
        let seen = (f64::from(takes) * (1.0 - chance)).floor();
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a few thousands")]
        let seen = seen as u32;
        Reception { seen, lost: sent - seen, overflowed: 0 }
    }

    /// Rates of a run of some seconds, one each half second.
    fn run(rate: &mut Rate, capacities: &[u64], chance: f64, seconds: u64) -> (Vec<u64>, Vec<usize>) {
        let (mut rates, mut dropped) = (Vec::new(), Vec::new());
        for half in 1..=seconds * 2 {
            let now = Duration::from_millis(500 * half);
            let current = rate.current();
            for (index, capacity) in
                capacities.iter().enumerate().filter(|(index, _)| !dropped.contains(index)).collect::<Vec<_>>()
            {
                let who = id(u8::try_from(index).unwrap());
                if rate.report(now, who, reception(current, *capacity, chance)) == Verdict::Dropped {
                    dropped.push(index);
                }
            }
            rate.tick(now);
            rates.push(rate.current());
        }
        (rates, dropped)
    }

    #[test]
    fn five_per_cent_by_chance_change_nothing() {
        let mut rate = Rate::new(1_000_000, 25_000_000);
        let (rates, dropped) = run(&mut rate, &[u64::MAX >> 32; 8], 0.05, 60);
        assert!(rates.iter().all(|rate| *rate == 25_000_000));
        assert!(dropped.is_empty());
    }

    #[test]
    fn one_bad_report_changes_nothing_and_two_do() {
        let mut rate = Rate::new(1_000_000, 25_000_000);
        let bad = Reception { seen: 1000, lost: 1000, overflowed: 0 };
        let fine = Reception { seen: 2000, lost: 0, overflowed: 0 };
        let mut now = Duration::ZERO;
        for reception in [bad, fine, bad, fine, bad] {
            now += Duration::from_millis(500);
            rate.report(now, id(1), reception);
            assert_eq!(rate.current(), 25_000_000);
        }
        rate.report(now, id(1), bad);
        assert_eq!(rate.current(), 12_500_000);
    }

    #[test]
    fn what_a_host_throws_away_itself_is_never_chance() {
        let mut rate = Rate::new(1_000_000, 25_000_000);
        for _ in 0..2 {
            rate.report(Duration::ZERO, id(1), Reception { seen: 1920, lost: 80, overflowed: 80 });
        }
        assert_eq!(rate.current(), 24_000_000);
    }

    #[test]
    fn who_cannot_take_the_lowest_rate_is_dropped_and_the_others_are_fast_again() {
        let mut rate = Rate::new(5_000_000, 25_000_000);
        let (rates, dropped) = run(&mut rate, &[40_000_000, 3_000_000], 0.0, 120);
        assert_eq!(dropped, [1]);
        assert_eq!(rates.iter().min(), Some(&5_000_000));
        assert_eq!(rates.last(), Some(&25_000_000));
    }

    #[test]
    fn who_was_slow_and_is_gone_holds_nobody_up() {
        let mut rate = Rate::new(1_000_000, 25_000_000);
        let (rates, _) = run(&mut rate, &[12_000_000], 0.0, 10);
        assert!(rates.last().is_some_and(|rate| *rate < 15_000_000));
        rate.gone(id(0));
        for second in 11..60 {
            rate.tick(Duration::from_secs(second));
        }
        assert_eq!(rate.current(), 25_000_000);
    }

    proptest! {
        #[test]
        fn it_stays_within_its_bounds(
            least in 1_u64..40_000_000,
            most in 1_u64..40_000_000,
            reports in prop::collection::vec((0_u8..4, 0_u32..5000, 0_u32..5000, 0_u32..5000, 0_u64..3000, any::<bool>()), 0..300),
        ) {
            let mut rate = Rate::new(least, most);
            let mut now = Duration::ZERO;
            for (who, seen, lost, overflowed, pause, goes) in reports {
                now += Duration::from_millis(pause);
                rate.report(now, id(who), Reception { seen, lost, overflowed });
                if goes {
                    rate.gone(id(who));
                }
                rate.tick(now);
                prop_assert!((least.min(most)..=most).contains(&rate.current()));
            }
        }

        #[test]
        fn it_comes_to_rest_at_what_the_slowest_takes(
            capacities in prop::collection::vec(6_000_000_u64..40_000_000, 1..6),
            chance in 0.0_f64..0.03,
        ) {
            let mut rate = Rate::new(5_000_000, 25_000_000);
            let (rates, dropped) = run(&mut rate, &capacities, chance, 600);
            prop_assert_eq!(dropped, Vec::<usize>::new());
            let slowest = (*capacities.iter().min().unwrap()).min(25_000_000);
            // What may be lost by chance is not seen to be too fast.
            let last = &rates[rates.len() - 400..];
            let (lowest, highest) = (*last.iter().min().unwrap(), *last.iter().max().unwrap());
            prop_assert_eq!(lowest, highest, "it still moves after 400 of 600 seconds: {:?}", capacities);
            prop_assert!(highest <= slowest * 125 / 100, "{} for {}", highest, slowest);
            prop_assert!(lowest >= slowest * 85 / 100, "{} for {}", lowest, slowest);
        }
    }
}
