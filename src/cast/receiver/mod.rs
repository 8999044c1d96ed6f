//! What has come, what is lacking, and when to say so.
//!
//! | file | holds |
//! | --- | --- |
//! | this one | what happens to blocks, and when to report |
//! | `open` | which symbols of which blocks have come |
//! | `gaps` | losses, by the gaps in the numbers of datagrams |
//! | `asks` | what was asked for, and when to ask again |
//!
//! What is lacking is told once its batch has been passed, after a random time: others may lack more, and what the sender
//! then says is coming need not be asked for. Reports are lost too, so it is asked again, ever more rarely; and at once when
//! the sender has nothing more to send.
//!
//! Owns: what a receiver knows of a session. Does not own: bytes (`assembly`), what they are worth (the manifest).

mod asks;
mod gaps;
mod open;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::chance::Chance;
use super::form::{Announce, Need, Phase, Report, Standing, Word};
use super::layout::Layout;
use super::{DEPTH, MOST_PARITY, ReceiverId};
use crate::units::to_usize;

use asks::Asks;
use gaps::Gaps;
use open::{Open, Opens};

/// What to do with a symbol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Take {
    /// Keep it.
    Keep,
    /// Keep it, and forget what has come of another block: there is no room for so many.
    KeepInstead(u32),
    /// Keep it: with it the block can be made whole. What comes of that is to be said ([`Receiver::delivered`]).
    Complete,
    /// Throw it away: it is here already, or nobody wants it.
    Skip,
    /// Throw it away: the layout has no such symbol.
    Foreign,
}

/// What came of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Delivery {
    /// It is here.
    Stored,
    /// Its bytes are wrong: somebody has forged symbols. Twice, and it is left to the upstream.
    Wrong,
    /// It cannot be kept. It is left to the upstream.
    NoRoom,
}

/// Whether a receiver still takes part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It does.
    Receiving,
    /// It has everything.
    Complete,
    /// The session is over, or it was dropped, and something is lacking: that is to be fetched.
    Lacking,
    /// Nothing has been heard from the sender for so long that it must be dead; the same.
    Abandoned,
}

/// Blocks that may have come in part at the same time.
pub const MOST_OPEN: usize = 64;

/// A sender that is not heard for so long is dead; while it waits for receivers, and otherwise.
const SILENCE: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(15));
/// As long as nothing else has been announced.
const REPORT_EVERY: Duration = Duration::from_millis(500);
const SPREAD: Duration = Duration::from_millis(30);
/// Who hears of a session does not know how many others do: as many as this, perhaps.
const PERHAPS: f64 = 1000.0;
/// Receivers report so often that about so many come in a second (twice that of [`Announce::report_every`]).
const REPORTS: f64 = 25.0;
/// One of so many datagrams lost, of so many at least, is worth a report before it is due: perhaps it is too fast.
const MUCH: (u64, u64) = (6, 1000);
/// Such reports come within this: many may have lost the same.
const COMPLAIN: Duration = Duration::from_secs(5);
/// Runs of needs in a report: they fit the smallest datagram that IPv6 promises.
pub const MOST_NEEDS: usize = 128;
/// Blocks that are asked for in one report.
const MOST_ASKED: usize = 1024;
/// Times that the bytes of a block may be wrong before it is left to the upstream.
const MOST_WRONG: u8 = 2;

/// What has become of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// Nothing of it is here.
    Missing,
    /// A part: in which slot.
    Open(u8),
    /// All of it came; whether it is right is not known yet.
    Whole,
    /// It is here.
    Done,
    /// It is left to the upstream.
    Left,
}

/// One receiver of one session. Times are since it was made.
///
/// Hand it whatever comes, in its order: [`Self::heard`] for each datagram of the sender, then what it is. An announcement
/// should be the first. Ask [`Self::report`] at the time that [`Self::next`] says, until [`Self::is_over`].
#[derive(Debug)]
pub struct Receiver {
    id: ReceiverId,
    layout: Arc<Layout>,
    chance: Chance,
    fates: Vec<Fate>,
    opens: Opens,
    wrong: BTreeMap<u32, u8>,
    /// Blocks that are here, that are left to the upstream, and of which it is not known yet.
    done: u32,
    left: u32,
    whole: u32,
    /// All blocks before this one are here or left.
    low: u32,
    /// All symbols of the blocks before this one have been sent once.
    passed: u32,
    asks: Asks,
    gaps: Gaps,
    /// Symbols that came.
    symbols: u64,
    overflowed: (u32, u32),
    /// What the sender last announced.
    parity: u16,
    phase: Option<Phase>,
    report_every: Duration,
    spread: Duration,
    last_heard: Duration,
    due: Due,
    /// It was told to leave, and has said so.
    leaves: (bool, bool),
    is_dropped: bool,
    is_abandoned: bool,
}

/// When reports are due.
#[derive(Debug)]
struct Due {
    /// One that is due anyhow.
    regular: Duration,
    /// One that asks for something, if it still must then.
    needs: Option<Duration>,
    /// One that complains.
    losses: Option<Duration>,
    last: Duration,
}

impl Receiver {
    /// A receiver of `layout` that has some blocks already. The same `seed` gives the same choices.
    pub fn new(id: ReceiverId, layout: Arc<Layout>, has: impl Fn(u32) -> bool, seed: u64) -> Self {
        let fates: Vec<_> =
            (0..layout.blocks()).map(|block| if has(block) { Fate::Done } else { Fate::Missing }).collect();
        let done = fates.iter().filter(|fate| **fate == Fate::Done).count();
        Self {
            id,
            chance: Chance::new(seed),
            done: u32::try_from(done).expect("blocks are numbered with 32 bits"),
            fates,
            opens: Opens::default(),
            wrong: BTreeMap::new(),
            left: 0,
            whole: 0,
            low: 0,
            passed: 0,
            asks: Asks::default(),
            gaps: Gaps::default(),
            symbols: 0,
            overflowed: (0, 0),
            parity: MOST_PARITY,
            phase: None,
            report_every: REPORT_EVERY,
            spread: SPREAD,
            last_heard: Duration::ZERO,
            due: Due { regular: Duration::MAX, needs: None, losses: None, last: Duration::ZERO },
            leaves: (false, false),
            is_dropped: false,
            is_abandoned: false,
            layout,
        }
    }

    /// A datagram of the sender has come, whatever it is: they are counted, and gaps in their numbers are losses.
    pub fn heard(&mut self, now: Duration, number: u32) {
        self.last_heard = now;
        self.gaps.heard(number);
        if self.due.regular == Duration::MAX {
            self.due.regular = now + self.chance.late_within(self.report_every, PERHAPS);
        }
        let (seen, lost) = self.gaps.count();
        let all = u64::from(seen) + u64::from(lost);
        if u64::from(lost) * MUCH.0 > all && all >= MUCH.1 && self.due.losses.is_none() {
            let soonest = now.max(self.due.last + REPORT_EVERY);
            self.due.losses = Some(soonest + self.chance.within(self.report_every.min(COMPLAIN)));
        }
    }

    /// About how many receivers there are, by how often they are to report.
    fn group(&self) -> f64 {
        self.report_every.as_secs_f64() * REPORTS
    }

    /// An announcement.
    pub fn announced(&mut self, now: Duration, announce: &Announce) {
        self.phase = Some(announce.phase);
        self.parity = announce.terms.parity.min(MOST_PARITY);
        let every = announce.report_every.max(Duration::from_millis(1));
        if self.due.regular > now && self.due.regular < Duration::MAX && every > self.report_every {
            // Those that join do so evenly once it is known how many they are.
            let longer = every.as_secs_f64() / self.report_every.as_secs_f64();
            let later = (self.due.regular - now).mul_f64(longer);
            let is_joining = self.due.last.is_zero();
            self.due.regular = now + if is_joining { self.chance.within(every) } else { later };
        }
        self.report_every = every;
        self.spread = announce.spread;
        self.advance(now, announce.passed);
        if announce.phase == Phase::Ending && self.lacks_passed() {
            self.asks.forget(now.saturating_sub(self.spread * 2));
            self.ask_soon(now);
        }
    }

    /// All symbols of the blocks before `passed` have been sent.
    fn advance(&mut self, now: Duration, passed: u32) {
        let passed = passed.min(self.layout.blocks());
        if passed <= self.passed {
            return;
        }
        let fresh = to_usize(u64::from(self.passed))..to_usize(u64::from(passed));
        self.passed = passed;
        if self.fates[fresh].iter().any(|fate| fate.is_lacking()) {
            self.ask_soon(now);
        }
    }

    fn lacks_passed(&mut self) -> bool {
        while self.low < self.passed && !self.fate(self.low).is_lacking() {
            self.low += 1;
        }
        self.low < self.passed
    }

    fn ask_soon(&mut self, now: Duration) {
        let at = now + self.chance.late_within(self.spread, self.group());
        self.due.needs = Some(self.due.needs.map_or(at, |due| if due > now { due.min(at) } else { at }));
    }

    fn fate(&self, block: u32) -> Fate {
        self.fates[to_usize(u64::from(block))]
    }

    fn set(&mut self, block: u32, fate: Fate) {
        self.fates[to_usize(u64::from(block))] = fate;
    }

    /// Word from the sender.
    pub fn told(&mut self, now: Duration, word: &Word) {
        self.is_dropped |= word.dropped.contains(&self.id);
        for need in &word.coming {
            for block in self.lacking_of(*need) {
                if self.lacks(block) <= need.symbols {
                    self.asks.comes(now, block, self.spread);
                }
            }
        }
        for need in &word.unicast {
            for block in self.lacking_of(*need) {
                self.leave_to_upstream(now, block);
            }
        }
    }

    /// Blocks of a need that are lacking.
    fn lacking_of(&self, need: Need) -> Vec<u32> {
        let until = need.first.saturating_add(u32::from(need.count)).min(self.passed);
        (need.first.max(self.low)..until).filter(|block| self.fate(*block).is_lacking()).collect()
    }

    fn leave_to_upstream(&mut self, now: Duration, block: u32) {
        self.set(block, Fate::Left);
        self.asks.settled(block);
        self.left += 1;
        self.look_whether_all(now);
    }

    /// Who has nothing more to wait for says so, and soon: but not all at once.
    fn look_whether_all(&mut self, now: Duration) {
        if self.done + self.left < self.layout.blocks() {
            return;
        }
        let within = if self.report_every > REPORT_EVERY { self.report_every * 3 / 4 } else { self.spread * 2 };
        self.due.regular = self.due.regular.min(now + self.chance.within(within));
    }

    /// Symbols that it lacks of a block.
    fn lacks(&self, block: u32) -> u16 {
        match self.fate(block) {
            Fate::Missing => self.layout.symbols(block),
            Fate::Open(slot) => self.opens.get(slot).map_or(0, Open::lacks),
            Fate::Whole | Fate::Done | Fate::Left => 0,
        }
    }

    /// A symbol.
    pub fn symbol(&mut self, now: Duration, block: u32, index: u16) -> Take {
        if block >= self.layout.blocks() || index >= self.layout.symbols(block) + self.parity {
            return Take::Foreign;
        }
        let depth = u32::try_from(DEPTH).expect("a few");
        self.advance(now, block - block % depth);
        self.symbols += 1;
        let (slot, take) = match self.fate(block) {
            Fate::Open(slot) => (slot, Take::Keep),
            Fate::Missing if self.takes_part() => match self.open(block) {
                Some((slot, take)) => (slot, take),
                None => return Take::Skip,
            },
            _ => return Take::Skip,
        };
        self.keep(block, slot, index, take)
    }

    fn keep(&mut self, block: u32, slot: u8, index: u16, take: Take) -> Take {
        let touched = self.symbols;
        let Some(open) = self.opens.get_mut(slot) else { return Take::Skip };
        open.touched = touched;
        if !open.set(index) {
            return Take::Skip;
        }
        if !open.is_enough() {
            return take;
        }
        self.opens.close(slot);
        self.set(block, Fate::Whole);
        self.asks.settled(block);
        self.whole += 1;
        Take::Complete
    }

    /// Makes room for a block.
    fn open(&mut self, block: u32) -> Option<(u8, Take)> {
        let data = self.layout.symbols(block);
        let open = Open::new(block, data, data + self.parity, self.symbols);
        let open = match self.opens.open(open) {
            Ok(slot) => {
                self.set(block, Fate::Open(slot));
                return Some((slot, Take::Keep));
            }
            Err(open) => open,
        };
        // First what nobody waits for; then of those that nothing comes of, the one that lacks most; then the oldest.
        let worth = |open: &Open| {
            let is_left = self.fate(open.block) == Fate::Left;
            let is_passed = open.block < self.passed;
            (!is_left, !is_passed, if is_passed { u64::from(u16::MAX - open.lacks()) } else { open.touched })
        };
        let slot = self.opens.least(worth)?;
        let gone = self.opens.close(slot)?.block;
        if self.fate(gone) == Fate::Open(slot) {
            self.set(gone, Fate::Missing);
        }
        let slot = self.opens.open(open).ok()?;
        self.set(block, Fate::Open(slot));
        Some((slot, Take::KeepInstead(gone)))
    }

    /// What came of a block that was complete.
    pub fn delivered(&mut self, now: Duration, block: u32, delivery: Delivery) {
        if block >= self.layout.blocks() || self.fate(block) != Fate::Whole {
            return;
        }
        self.whole -= 1;
        match delivery {
            Delivery::Stored => {
                self.set(block, Fate::Done);
                self.done += 1;
                self.look_whether_all(now);
            }
            Delivery::NoRoom => self.leave_to_upstream(now, block),
            Delivery::Wrong => self.was_wrong(now, block),
        }
    }

    /// A block that was here has left again: the cache had to give it back. It is left to the upstream.
    pub fn evicted(&mut self, now: Duration, block: u32) {
        if block < self.layout.blocks() && self.fate(block) == Fate::Done {
            self.done -= 1;
            self.leave_to_upstream(now, block);
        }
    }

    fn was_wrong(&mut self, now: Duration, block: u32) {
        let wrong = self.wrong.entry(block).or_default();
        *wrong += 1;
        if *wrong >= MOST_WRONG {
            self.leave_to_upstream(now, block);
            return;
        }
        self.set(block, Fate::Missing);
        self.low = self.low.min(block);
        if block < self.passed {
            self.ask_soon(now);
        }
    }

    /// Datagrams that the own host threw away so far, in all.
    pub const fn overflowed(&mut self, total: u32) {
        self.overflowed.0 = total;
    }

    /// A report, if one is due.
    pub fn report(&mut self, now: Duration) -> Option<Report> {
        let silence = self.silence();
        if now.saturating_sub(self.last_heard) >= silence {
            self.is_abandoned = true;
        }
        if self.is_over() || now < self.due.next() {
            return None;
        }
        let standing = self.standing();
        let needs = if standing == Standing::Joined && self.lacks_passed() { self.needs(now) } else { Vec::new() };
        let again = self.asks.next().filter(|_| standing == Standing::Joined).map(|at| at.max(now));
        let again = again.map(|at| at + SPREAD / 8 + self.chance.late_within(self.spread, self.group()));
        let is_regular = now >= self.due.regular.min(self.due.losses.unwrap_or(Duration::MAX));
        self.due.needs = again;
        if needs.is_empty() && !is_regular {
            return None;
        }
        Some(self.make(now, standing, needs))
    }

    fn make(&mut self, now: Duration, standing: Standing, needs: Vec<Need>) -> Report {
        let (seen, lost) = self.gaps.take();
        let (total, told) = self.overflowed;
        self.overflowed.1 = total;
        self.due.regular = now + self.report_every.mul_f64(0.5 + self.chance.unit());
        self.due.losses = None;
        self.due.last = now;
        self.leaves.1 |= standing == Standing::Leaving;
        Report {
            receiver: self.id,
            standing,
            done: self.done,
            seen,
            lost,
            overflowed: total.wrapping_sub(told).min(lost),
            heard: self.gaps.last(),
            needs,
        }
    }

    fn standing(&self) -> Standing {
        let blocks = self.layout.blocks();
        match () {
            () if self.done == blocks => Standing::Complete,
            () if self.leaves.0 || self.done + self.left == blocks => Standing::Leaving,
            () => Standing::Joined,
        }
    }

    /// What is to be asked for now, oldest first. It counts as asked for.
    fn needs(&mut self, now: Duration) -> Vec<Need> {
        let mut needs: Vec<Need> = Vec::new();
        let mut blocks = 0;
        for block in self.low..self.passed {
            let lacks = self.lacks(block);
            if lacks == 0 || !self.asks.may(now, block) {
                continue;
            }
            let need = Need { first: block, count: 1, symbols: lacks };
            if !super::repair::extend(&mut needs, need) {
                if needs.len() == MOST_NEEDS {
                    break;
                }
                needs.push(need);
            }
            self.asks.asked(now, block, self.spread);
            blocks += 1;
            if blocks == MOST_ASKED {
                break;
            }
        }
        if blocks == MOST_ASKED || needs.len() == MOST_NEEDS {
            self.asks.more(now);
        }
        needs
    }

    const fn silence(&self) -> Duration {
        match self.phase {
            None | Some(Phase::Waiting) => SILENCE.0,
            Some(_) => SILENCE.1,
        }
    }

    /// When to ask for a report again, at the latest.
    pub fn next(&self) -> Duration {
        if self.is_over() {
            return Duration::MAX;
        }
        self.due.next().min(self.last_heard + self.silence())
    }

    /// Leaves: the next report says so, and then the state is no longer [`State::Receiving`].
    pub const fn leave(&mut self) {
        self.leaves.0 = true;
        self.due.regular = Duration::ZERO;
    }

    fn takes_part(&self) -> bool {
        !self.leaves.0 && !self.is_dropped && !self.is_abandoned && !matches!(self.phase, Some(Phase::Ended(_)))
    }

    /// Whether it still takes part.
    pub fn state(&self) -> State {
        let is_ended = self.is_dropped || self.leaves.1 || matches!(self.phase, Some(Phase::Ended(_)));
        match () {
            () if self.done == self.layout.blocks() => State::Complete,
            () if self.is_abandoned => State::Abandoned,
            () if is_ended && self.whole == 0 => State::Lacking,
            () => State::Receiving,
        }
    }

    /// Whether it has nothing more to say. Who has everything goes on saying so until the session is over: reports are lost.
    pub fn is_over(&self) -> bool {
        match self.state() {
            State::Receiving => false,
            State::Lacking | State::Abandoned => true,
            State::Complete => matches!(self.phase, Some(Phase::Ended(_))) || self.is_abandoned,
        }
    }

    /// Blocks that are here, of all.
    pub fn done(&self) -> (u32, u32) {
        (self.done, self.layout.blocks())
    }

    /// Blocks that are not here.
    pub fn lacking(&self) -> Vec<u32> {
        (0..self.layout.blocks()).filter(|block| self.fate(*block) != Fate::Done).collect()
    }
}

impl Fate {
    const fn is_lacking(self) -> bool {
        matches!(self, Self::Missing | Self::Open(_))
    }
}

impl Due {
    fn next(&self) -> Duration {
        [Some(self.regular), self.needs, self.losses].into_iter().flatten().min().unwrap_or(Duration::MAX)
    }
}
