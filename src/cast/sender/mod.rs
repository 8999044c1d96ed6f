//! Which datagram is next, and what is sent again.
//!
//! | phase | what is sent | until |
//! | --- | --- | --- |
//! | waiting | announcements and the plan | enough receivers are there, or patience ends |
//! | sending | each block once, [`DEPTH`] at a time in turns, with parity; in between what is asked for | all were sent |
//! | ending | what is asked for | all that are still heard are complete or have left |
//! | ended | the word that it is over, three times | |
//!
//! | file | holds |
//! | --- | --- |
//! | this one | the phases |
//! | `turns` | blocks whose symbols take turns |
//! | `listeners` | receivers, one by one |
//! | `words` | what is told to the sender, and by it |
//!
//! Owns: the order of datagrams. Does not own: their bytes, when exactly they leave (`multicast`), how fast (`rate`), what
//! is worth being sent again (`repair`).

mod listeners;
#[cfg(test)]
mod tests;
mod turns;
mod words;

use std::collections::{BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use super::chance::Chance;
use super::form::{self, Announce, Phase, Report, Standing, Terms, Word};
use super::layout::Layout;
use super::rate::{Rate, Reception, Verdict};
use super::repair::{self, Ask, Needs, Parity};
use super::{DEPTH, ReceiverId};
use crate::units::to_usize;

use listeners::Listeners;
use turns::Turns;
pub use words::{Listener, MOST_LISTENERS, Packet, Progress, Repair, Settings, Step};

/// Announcements while it waits or ends.
const OFTEN: Duration = Duration::from_millis(200);
/// Announcements while it sends.
const SELDOM: Duration = Duration::from_millis(500);
/// Announcements that are wanted now still keep so far apart.
const SOONEST: Duration = Duration::from_millis(20);
/// Words that are wanted now do, too.
const WORDS: Duration = Duration::from_millis(20);
/// When the pages of the plan are sent again: at first, and then.
const PAGES: [Duration; 3] = [Duration::from_millis(300), Duration::from_millis(1000), Duration::from_secs(3)];
/// A listener that is not heard for so long has fallen silent: while it ends, and before. Three reports must have been due.
const SILENT: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(30));
/// If nobody ever reported, it ends so long after everything was sent.
const GRACE: Duration = Duration::from_secs(2);
/// The end is said so often, so far apart.
const FAREWELLS: u32 = 3;
const FAREWELL: Duration = Duration::from_millis(100);
/// Blocks that are sent again at the same time while others are sent for the first time.
const MENDING: usize = 4;
/// Blocks of so many batches are looked at to learn how much parity is enough.
const LEARNT_AFTER: usize = 3;
/// Receivers that are told at once that they were dropped.
const MOST_DROPPED: usize = 8;

/// The sender of one session. Times are since it was made.
///
/// Ask [`Self::step`] what to do until it says to wait; hand [`Self::report`] what comes meanwhile, and ask again.
#[derive(Debug)]
pub struct Sender {
    layout: Arc<Layout>,
    terms: Terms,
    settings: Settings,
    chance: Chance,
    phase: Phase,
    /// The number of the next datagram.
    number: u32,
    /// The symbol of each block that is next, where those that were sent before are counted at least once.
    next: Vec<u32>,
    /// The first pass: the batch that is being sent, and the first block after it.
    batch: Turns,
    begun: u32,
    passed: u32,
    mending: Turns,
    /// Whether a symbol that somebody asked for was the last; first ones take turns with them.
    was_mending: bool,
    needs: Needs,
    parity: Parity,
    /// Batches of which is still to be seen how many blocks are asked for: their first blocks, and whether they had parity.
    recent: VecDeque<(u32, bool)>,
    asked: BTreeSet<u32>,
    rate: Rate,
    listeners: Listeners,
    dropped: BTreeSet<ReceiverId>,
    times: Times,
    progress: (u64, u64, u64),
    farewells: u32,
}

/// When things are next.
#[derive(Debug, Default)]
struct Times {
    announce: Duration,
    announced: Option<Duration>,
    /// The next page, when, and how often all of them were sent.
    page: (u16, Duration, usize),
    word: Duration,
    /// Since when everything has been sent.
    ending: Duration,
    /// Something was sent since everybody was asked what is lacking.
    is_news: bool,
}

impl Sender {
    /// A session that sends `layout`. The same `seed` gives the same choices.
    pub fn new(layout: Arc<Layout>, terms: Terms, settings: Settings, seed: u64) -> Self {
        let percent = match settings.repair {
            Repair::Auto => None,
            Repair::Percent(percent) => Some(percent.max(0.0)),
        };
        Self {
            phase: if settings.wait_for == 0 { Phase::Sending } else { Phase::Waiting },
            number: 0,
            next: vec![0; to_usize(u64::from(layout.blocks()))],
            batch: Turns::default(),
            begun: 0,
            passed: 0,
            mending: Turns::default(),
            was_mending: false,
            needs: Needs::default(),
            parity: Parity::new(percent),
            recent: VecDeque::new(),
            asked: BTreeSet::new(),
            rate: Rate::new(settings.min_rate, settings.rate),
            listeners: Listeners::new(settings.wait_for),
            dropped: BTreeSet::new(),
            times: Times::default(),
            progress: (0, 0, 0),
            farewells: 0,
            chance: Chance::new(seed),
            layout,
            terms,
            settings,
        }
    }

    /// What to do now.
    pub fn step(&mut self, now: Duration) -> Step {
        if let Phase::Ended(_) = self.phase {
            return self.farewell(now);
        }
        self.rate.tick(now);
        if let Some(packet) = self.control(now) {
            return self.send(packet);
        }
        match self.phase {
            Phase::Waiting => self.wait(now),
            Phase::Sending => self.first_pass(now),
            Phase::Ending => self.ending(now),
            Phase::Ended(_) => self.farewell(now),
        }
    }

    fn send(&mut self, packet: Packet) -> Step {
        self.number = self.number.wrapping_add(1);
        Step::Send(packet)
    }

    /// What is to be said, if it is time.
    fn control(&mut self, now: Duration) -> Option<Packet> {
        if now >= self.times.announce {
            return Some(self.announce(now));
        }
        if now >= self.times.word && (self.needs.has_news() || !self.dropped.is_empty()) {
            let word = self.word();
            if word != Word::default() {
                self.times.word = now + WORDS;
                return Some(Packet::Word(word));
            }
        }
        let (page, when, round) = self.times.page;
        if self.terms.pages == 0 || now < when {
            return None;
        }
        let is_last = page + 1 >= self.terms.pages;
        let pause = PAGES[round.min(PAGES.len() - 1)];
        self.times.page = if is_last { (0, now + pause, round + 1) } else { (page + 1, when, round) };
        Some(Packet::Page(page))
    }

    fn announce(&mut self, now: Duration) -> Packet {
        self.sweep(now);
        self.listeners.pace(now);
        let pause = if self.phase == Phase::Sending { SELDOM } else { OFTEN };
        self.times.announce = now + pause.mul_f64(0.9 + self.chance.unit() / 5.0);
        self.times.announced = Some(now);
        Packet::Announce(Announce {
            terms: self.terms,
            phase: self.phase,
            passed: self.passed,
            rate: self.rate.current(),
            report_every: self.listeners.report_every(),
            spread: self.listeners.spread(),
        })
    }

    /// Something changed that everybody should know now.
    fn announce_soon(&mut self, now: Duration) {
        let soonest = self.times.announced.map_or(now, |last| last + SOONEST);
        self.times.announce = self.times.announce.min(soonest.max(now));
    }

    fn word(&mut self) -> Word {
        let most = form::most_needs(usize::from(self.terms.symbol)).saturating_sub(2 * MOST_DROPPED) / 2;
        let most = most.max(1);
        let mending = &self.mending;
        let (coming, unicast) = self.needs.news(most, |block| mending.left(block));
        let dropped: Vec<_> = self.dropped.iter().copied().take(MOST_DROPPED).collect();
        for receiver in &dropped {
            self.dropped.remove(receiver);
        }
        Word { coming, unicast, dropped }
    }

    /// Listeners that have not been heard for long.
    fn sweep(&mut self, now: Duration) {
        let least = if self.phase == Phase::Ending { SILENT.0 } else { SILENT.1 };
        for receiver in self.listeners.sweep(now, least) {
            self.rate.gone(receiver);
        }
    }

    fn wait(&mut self, now: Duration) -> Step {
        let (there, enough) = (self.listeners.there(), self.settings.wait_for);
        if there >= to_usize(u64::from(enough)) || (now >= self.settings.patience && there > 0) {
            self.phase = Phase::Sending;
            self.announce_soon(now);
            return self.step(now);
        }
        if now >= self.settings.patience && !self.settings.carousel {
            return self.end(now, true);
        }
        let patience = if self.settings.carousel { Duration::MAX } else { self.settings.patience };
        self.idle(now, patience)
    }

    /// Nothing before the next thing that is to be said.
    fn idle(&self, now: Duration, until: Duration) -> Step {
        let page = if self.terms.pages == 0 { Duration::MAX } else { self.times.page.1 };
        let has_news = self.needs.has_news() || !self.dropped.is_empty();
        let word = if has_news { self.times.word } else { Duration::MAX };
        Step::Wait(self.times.announce.min(page).min(word).min(until).max(now + Duration::from_micros(1)))
    }

    fn first_pass(&mut self, now: Duration) -> Step {
        self.fill_mending(now);
        if self.batch.is_empty() {
            self.passed = self.begun;
            if self.begun >= self.layout.blocks() {
                return self.all_passed(now);
            }
            self.next_batch();
        }
        let mends = !self.mending.is_empty() && !self.was_mending;
        self.was_mending = mends;
        if mends { self.mend() } else { self.first() }
    }

    fn all_passed(&mut self, now: Duration) -> Step {
        self.phase = Phase::Ending;
        self.times.ending = now;
        self.times.is_news = true;
        self.needs.passed(now + self.listeners.gather());
        self.step(now)
    }

    fn next_batch(&mut self) {
        self.learn();
        let until = self.layout.blocks().min(self.begun + u32::try_from(DEPTH).expect("a few"));
        let mut has_parity = false;
        for block in self.begun..until {
            let data = self.layout.symbols(block);
            let parity = self.parity.unasked(data, self.listeners.worst(), self.listeners.there());
            let parity = parity.min(u32::from(self.terms.parity));
            has_parity |= parity > 0;
            self.batch.add(block, u32::from(data) + parity);
        }
        if self.listeners.there() > 0 {
            self.recent.push_back((self.begun, has_parity));
        }
        self.begun = until;
    }

    fn learn(&mut self) {
        if self.recent.len() <= LEARNT_AFTER {
            return;
        }
        let Some((first, has_parity)) = self.recent.pop_front() else { return };
        let later = self.asked.split_off(&(first + u32::try_from(DEPTH).expect("a few")));
        let asked = std::mem::replace(&mut self.asked, later).len();
        if has_parity {
            let part =
                f64::from(u32::try_from(asked).expect("a few")) / f64::from(u32::try_from(DEPTH).expect("a few"));
            self.parity.learn(part, self.listeners.there());
        }
    }

    fn first(&mut self) -> Step {
        let Some(block) = self.batch.next() else { return self.mend() };
        let data = u32::from(self.layout.symbols(block));
        if self.next[to_usize(u64::from(block))] < data {
            self.progress.0 += 1;
        } else {
            self.progress.1 += 1;
        }
        self.symbol(block)
    }

    fn mend(&mut self) -> Step {
        let block = self.mending.next().expect("somebody looked");
        self.needs.sent(block, self.number);
        self.progress.2 += 1;
        self.times.is_news = true;
        self.symbol(block)
    }

    /// The next symbol of a block: its data, its parity, and again.
    fn symbol(&mut self, block: u32) -> Step {
        let all = self.all(block);
        let next = &mut self.next[to_usize(u64::from(block))];
        let index = u16::try_from(*next % all).expect("data and parity are less than 2^16");
        *next += 1;
        if *next >= 2 * all {
            *next -= all;
        }
        self.send(Packet::Symbol { block, index })
    }

    /// Symbols of a block that differ.
    fn all(&self, block: u32) -> u32 {
        u32::from(self.layout.symbols(block)) + u32::from(self.terms.parity)
    }

    fn fill_mending(&mut self, now: Duration) {
        let is_ending = self.phase == Phase::Ending;
        let room = if is_ending { DEPTH } else { MENDING };
        let terms = repair::Terms { whole: is_ending, always: self.settings.carousel, symbol: self.terms.symbol };
        while self.mending.len() < room {
            let Some(mend) = self.needs.take(now, terms) else { break };
            self.mending.add(mend.block, mend.symbols);
        }
    }

    fn ending(&mut self, now: Duration) -> Step {
        self.fill_mending(now);
        if !self.mending.is_empty() {
            return self.mend();
        }
        if self.is_over(now) {
            return self.end(now, true);
        }
        if self.times.is_news && self.needs.is_empty() {
            self.times.is_news = false;
            self.announce_soon(now);
            if now >= self.times.announce {
                return self.step(now);
            }
        }
        let grace = if self.listeners.is_empty() { self.times.ending + GRACE } else { Duration::MAX };
        let due = self.needs.next().unwrap_or(Duration::MAX);
        self.idle(now, grace.min(due))
    }

    fn is_over(&self, now: Duration) -> bool {
        let is_quiet = self.needs.is_empty() && !self.settings.carousel;
        let has_gone = !self.listeners.is_empty() || now >= self.times.ending + GRACE;
        is_quiet && has_gone && self.listeners.are_complete()
    }

    fn end(&mut self, now: Duration, well: bool) -> Step {
        self.phase = Phase::Ended(well);
        self.times.announce = now;
        self.farewell(now)
    }

    fn farewell(&mut self, now: Duration) -> Step {
        if self.farewells == FAREWELLS {
            return Step::Ended;
        }
        if self.farewells > 0 && now < self.times.announce {
            return Step::Wait(self.times.announce);
        }
        self.farewells += 1;
        let packet = self.announce(now);
        self.times.announce = now + FAREWELL;
        self.send(packet)
    }

    /// A receiver has reported.
    pub fn report(&mut self, now: Duration, report: &Report) {
        if let Phase::Ended(_) = self.phase {
            return;
        }
        let is_new = self.listeners.report(now, report);
        if self.listeners.is_dropped(report.receiver) {
            if report.standing == Standing::Joined {
                self.dropped.insert(report.receiver);
            }
            return;
        }
        if is_new && self.listeners.has_doubled() {
            self.announce_soon(now);
        }
        if report.standing == Standing::Joined {
            self.judge(now, report);
            self.ask(now, report);
        } else {
            self.rate.gone(report.receiver);
        }
    }

    fn judge(&mut self, now: Duration, report: &Report) {
        let reception = Reception { seen: report.seen, lost: report.lost, overflowed: report.overflowed };
        let before = self.rate.current();
        if self.rate.report(now, report.receiver, reception) == Verdict::Dropped {
            self.listeners.drop(report.receiver);
            self.dropped.insert(report.receiver);
        }
        if self.rate.current() < before {
            self.announce_soon(now);
        }
    }

    fn ask(&mut self, now: Duration, report: &Report) {
        let blocks = report.needs.iter().flat_map(|need| {
            let first = need.first.min(self.passed);
            let until = first.saturating_add(u32::from(need.count)).min(self.passed);
            (first..until).map(|block| (block, need.symbols))
        });
        let asks: Vec<_> = blocks.take(repair::MOST_PENDING).collect();
        for (block, lacks) in asks {
            self.ask_block(now, report, block, lacks);
        }
    }

    fn ask_block(&mut self, now: Duration, report: &Report, block: u32, lacks: u16) {
        let data = self.layout.symbols(block);
        let lacks = lacks.min(data);
        if lacks == 0 {
            return;
        }
        let is_whole = lacks > data / 2;
        let is_recent = self.recent.front().is_some_and(|(first, _)| block >= *first);
        if is_recent && !is_whole {
            self.asked.insert(block);
        }
        let coming = self.mending.left(block);
        let alone = u64::from(lacks) * u64::from(self.terms.shape.chunk_size);
        self.needs.ask(Ask {
            who: report.receiver,
            block,
            lacks,
            wants: self.wants(block, lacks),
            coming,
            heard: report.heard,
            data,
            alone: alone.min(self.layout.length(block)),
            due: now + if is_whole { self.listeners.gather() } else { self.listeners.hold() },
        });
    }

    /// Symbols to send to a receiver that lacks some. Once all have been sent, it may have what comes next.
    fn wants(&self, block: u32, lacks: u16) -> u32 {
        let (all, data) = (self.all(block), u32::from(self.layout.symbols(block)));
        let wants = self.parity.wanted(lacks, self.listeners.worst(), self.listeners.there());
        let fresh = all.saturating_sub(self.next[to_usize(u64::from(block))]);
        let again = wants.saturating_sub(fresh);
        let lacking = u32::from(self.terms.parity) + u32::from(lacks);
        let again = u64::from(again) * u64::from(all) / u64::from(lacking.clamp(1, all.max(data)));
        let again = u32::try_from(again).unwrap_or(all);
        (wants.min(fresh) + again).min(all)
    }

    /// Ends the session: receivers fetch what they lack from their upstreams.
    pub fn cancel(&mut self) {
        if !matches!(self.phase, Phase::Ended(_)) {
            self.phase = Phase::Ended(false);
        }
    }

    /// How far it is.
    pub const fn phase(&self) -> Phase {
        self.phase
    }

    /// Bytes of datagrams per second, now.
    pub const fn rate(&self) -> u64 {
        self.rate.current()
    }

    /// The blocks whose symbols are sent now or next, soonest first, at most `2 * DEPTH`: to be read ahead. What is not
    /// among them any more can be forgotten.
    pub fn window(&self) -> Vec<u32> {
        let soon = self.needs.soon(self.phase == Phase::Ending).take(MENDING);
        let next = self.begun..self.layout.blocks();
        let mut window = Vec::with_capacity(2 * DEPTH);
        for block in self.mending.blocks().chain(self.batch.blocks()).chain(soon).chain(next) {
            if window.len() == 2 * DEPTH {
                break;
            }
            if !window.contains(&block) {
                window.push(block);
            }
        }
        window
    }

    /// How far it is.
    pub fn progress(&self) -> Progress {
        Progress {
            passed: self.passed,
            data: self.progress.0,
            parity: self.progress.1,
            repairs: self.progress.2,
            listeners: self.listeners.all(),
            is_complete: self.listeners.are_complete(),
        }
    }
}
