//! Receivers, one by one, as far as they have reported; and how often they are to.
//!
//! However many they are, about [`REPORTS`] reports come in a second. Those that are due are spread over the time that
//! takes. Those that ask for something go by chance, most of them late ([`Chance::late_within`]), and the first speak for
//! the others; if too many come all the same, they are spread further.
//!
//! [`Chance::late_within`]: super::super::chance::Chance

use std::collections::BTreeMap;
use std::time::Duration;

use super::super::ReceiverId;
use super::super::form::{Report, Standing};
use super::{Listener, MOST_LISTENERS};

/// Reports per second, about.
const REPORTS: u32 = 50;
/// A receiver need not report more often.
const SOONEST: Duration = Duration::from_millis(500);
/// So many receivers may ask at the same time, within the first spread.
const FEW: f64 = 8.0;
const SPREAD: Duration = Duration::from_millis(30);
/// The spread of more receivers is longer, at most so many times.
const MOST_FLOOD: f64 = 16.0;
/// Reports are counted over so long.
const COUNTED: Duration = Duration::from_millis(500);
/// Losses of so many datagrams are remembered.
const REMEMBERED: f64 = 20_000.0;
/// Before anything is known, as if so many had come: a few datagrams prove nothing.
const PRIOR: f64 = 300.0;

#[derive(Debug)]
struct Known {
    listener: Listener,
    /// Datagrams, and those that were lost; what is older counts for less.
    all: f64,
    lost: f64,
}

/// Receivers that have reported.
#[derive(Debug)]
pub(super) struct Listeners {
    known: BTreeMap<ReceiverId, Known>,
    expected: u32,
    /// Those that take part or have everything.
    there: usize,
    /// Those that are waited for.
    waited: usize,
    worst: f64,
    /// Reports that asked for something since a time, and how much further than usual they are spread for that.
    counted: (u32, Duration),
    flood: f64,
    doubling: usize,
}

impl Listeners {
    pub(super) const fn new(expected: u32) -> Self {
        Self {
            known: BTreeMap::new(),
            expected,
            there: 0,
            waited: 0,
            worst: 0.0,
            counted: (0, Duration::ZERO),
            flood: 1.0,
            doubling: 8,
        }
    }

    /// A report has come. Whether it is of a new one.
    pub(super) fn report(&mut self, now: Duration, report: &Report) -> bool {
        self.counted.0 += u32::from(!report.needs.is_empty());
        let is_new = !self.known.contains_key(&report.receiver);
        if is_new && self.known.len() >= MOST_LISTENERS {
            return false;
        }
        let known = self.known.entry(report.receiver).or_insert_with(|| Known::new(report.receiver));
        known.hear(now, report);
        self.count();
        is_new
    }

    /// Whether there are twice as many as when this last said so: then they are to report less often.
    pub(super) fn has_doubled(&mut self) -> bool {
        let has = self.known.len() >= self.doubling;
        if has {
            self.doubling = self.known.len() * 2;
        }
        has
    }

    fn count(&mut self) {
        let standing = |wanted| self.known.values().filter(move |known| known.listener.standing == Some(wanted));
        self.waited = standing(Standing::Joined).count();
        self.there = self.waited + standing(Standing::Complete).count();
        self.worst = standing(Standing::Joined).map(|known| known.listener.loss).fold(0.0, f64::max);
    }

    /// Those that have not been heard for so long, or three reports, have fallen silent.
    pub(super) fn sweep(&mut self, now: Duration, least: Duration) -> Vec<ReceiverId> {
        let longest = least.max(self.report_every() * 3);
        let mut silent = Vec::new();
        for (receiver, known) in &mut self.known {
            let listener = &mut known.listener;
            if listener.standing == Some(Standing::Joined) && now.saturating_sub(listener.heard) > longest {
                listener.standing = None;
                silent.push(*receiver);
            }
        }
        if !silent.is_empty() {
            self.count();
        }
        silent
    }

    /// It is too slow, and no longer served.
    pub(super) fn drop(&mut self, receiver: ReceiverId) {
        if let Some(known) = self.known.get_mut(&receiver) {
            known.listener.dropped = true;
            known.listener.standing = None;
        }
        self.count();
    }

    pub(super) fn is_dropped(&self, receiver: ReceiverId) -> bool {
        self.known.get(&receiver).is_some_and(|known| known.listener.dropped)
    }

    /// Spreads reports further if too many came lately, and less if few did.
    pub(super) fn pace(&mut self, now: Duration) {
        let (count, since) = self.counted;
        let elapsed = now.saturating_sub(since);
        if elapsed < COUNTED {
            return;
        }
        let rate = f64::from(count) / elapsed.as_secs_f64();
        if rate > f64::from(REPORTS) {
            self.flood = (self.flood * 2.0).min(MOST_FLOOD);
        } else if rate < f64::from(REPORTS) / 3.0 {
            self.flood = (self.flood / 1.5).max(1.0);
        }
        self.counted = (0, now);
    }

    /// Those that are there, or expected.
    fn group(&self) -> u32 {
        u32::try_from(self.there).unwrap_or(u32::MAX).max(self.expected)
    }

    /// A receiver reports once in so long: together they take half of what may come.
    pub(super) fn report_every(&self) -> Duration {
        (Duration::from_secs(2) * self.group() / REPORTS).max(SOONEST)
    }

    /// Who asks for something does so within this. Who has everything asks for nothing.
    pub(super) fn spread(&self) -> Duration {
        let asking = u32::try_from(self.waited).unwrap_or(u32::MAX);
        let more = (f64::from(asking) / FEW).max(1.0).log2() + 1.0;
        SPREAD.mul_f64(more * self.flood)
    }

    /// How long to wait for others to ask for more of the same.
    pub(super) fn hold(&self) -> Duration {
        if self.there > 1 { self.spread() / 2 } else { Duration::ZERO }
    }

    /// How long to wait for others to ask for whole blocks.
    pub(super) fn gather(&self) -> Duration {
        self.spread() * 2 + Duration::from_millis(100)
    }

    pub(super) const fn there(&self) -> usize {
        self.there
    }

    /// The part of the datagrams that the unluckiest loses.
    pub(super) const fn worst(&self) -> f64 {
        self.worst
    }

    /// Whether nobody has ever reported.
    pub(super) fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// Whether nobody is waited for.
    pub(super) const fn are_complete(&self) -> bool {
        self.waited == 0
    }

    pub(super) fn all(&self) -> Vec<Listener> {
        let mut all = Vec::with_capacity(self.known.len());
        all.extend(self.known.values().map(|known| known.listener.clone()));
        all
    }
}

impl Known {
    const fn new(receiver: ReceiverId) -> Self {
        let listener = Listener { receiver, standing: None, dropped: false, done: 0, loss: 0.0, heard: Duration::ZERO };
        Self { listener, all: 0.0, lost: 0.0 }
    }

    fn hear(&mut self, now: Duration, report: &Report) {
        let all = f64::from(report.seen) + f64::from(report.lost);
        let keep = if self.all + all > REMEMBERED { (1.0 - all / REMEMBERED).max(0.0) } else { 1.0 };
        self.all = self.all * keep + all;
        self.lost = self.lost * keep + f64::from(report.lost);
        let listener = &mut self.listener;
        listener.loss = self.lost / (self.all + PRIOR);
        listener.heard = now;
        listener.done = report.done;
        if !listener.dropped {
            listener.standing = Some(report.standing);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(who: u16, standing: Standing, seen: u32, lost: u32) -> Report {
        let mut receiver = ReceiverId([0; 16]);
        receiver.0[..2].copy_from_slice(&who.to_le_bytes());
        Report { receiver, standing, done: 0, seen, lost, overflowed: 0, heard: 0, needs: Vec::new() }
    }

    #[test]
    fn a_thousand_report_as_often_as_fifty() {
        let mut listeners = Listeners::new(0);
        assert_eq!(listeners.report_every(), SOONEST);
        for who in 0..1000 {
            listeners.report(Duration::ZERO, &report(who, Standing::Joined, 0, 0));
        }
        assert_eq!(listeners.report_every(), Duration::from_secs(40));
        assert!(listeners.spread() > SPREAD * 5);
    }

    #[test]
    fn more_than_can_be_known_one_by_one_are_not() {
        let mut listeners = Listeners::new(0);
        for who in 0..u16::try_from(MOST_LISTENERS + 10).unwrap() {
            listeners.report(Duration::ZERO, &report(who, Standing::Joined, 0, 0));
        }
        assert_eq!(listeners.all().len(), MOST_LISTENERS);
        assert_eq!(listeners.there(), MOST_LISTENERS);
    }

    #[test]
    fn the_silent_and_the_dropped_are_not_waited_for() {
        let mut listeners = Listeners::new(0);
        for who in 0..2 {
            listeners.report(Duration::ZERO, &report(who, Standing::Joined, 0, 0));
        }
        let second = report(1, Standing::Joined, 0, 0).receiver;
        assert!(!listeners.are_complete());
        listeners.drop(second);
        listeners.report(Duration::from_secs(1), &report(1, Standing::Joined, 0, 0));
        assert_eq!(listeners.sweep(Duration::from_secs(4), Duration::from_secs(5)), []);
        assert_eq!(listeners.sweep(Duration::from_secs(6), Duration::from_secs(5)).len(), 1);
        assert!(listeners.are_complete());
    }

    #[test]
    fn a_few_datagrams_prove_little() {
        let mut listeners = Listeners::new(0);
        listeners.report(Duration::ZERO, &report(0, Standing::Joined, 9, 1));
        assert!(listeners.worst() < 0.01);
        for _ in 0..20 {
            listeners.report(Duration::ZERO, &report(0, Standing::Joined, 1900, 100));
        }
        assert!((0.045..0.055).contains(&listeners.worst()));
    }
}
