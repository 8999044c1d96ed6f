//! The needs of all receivers together: what is sent again, and what is left to upstreams.
//!
//! So many fresh symbols of a block as the receiver has that lacks most of them mend it for all. What costs less by unicast
//! is left to it: a block that one receiver alone lacks as a whole. Who lacks whole blocks has joined late, or was away;
//! others may have too, so those wait until everything has been sent once, and go together.
//!
//! A report is older than what was sent meanwhile. It says which datagram its receiver heard last, and [`Bursts`] knows
//! what of a block has been sent since: that is not sent twice.
//!
//! Owns: what is asked for, and how much parity is sent unasked ([`Parity`]). Does not own: when it is sent (`sender`).

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::ReceiverId;
use super::form::Need;

/// Blocks that are asked for and not yet sent, at most. More are refused: they will be asked for again.
pub(super) const MOST_PENDING: usize = 4096;
/// Of these, blocks that somebody lacks as a whole: they wait longer, and must leave room.
const MOST_WHOLE: usize = MOST_PENDING / 2;
/// How often a block is sent again before what is lacking is left to upstreams.
const MOST_ROUNDS: u8 = 16;
/// Blocks that the next [`Need`]s to be told are about, at most.
const MOST_NEWS: usize = 4096;

/// Whether datagram `a` was sent after datagram `b`. Their numbers wrap around.
const fn is_after(a: u32, b: u32) -> bool {
    a != b && a.wrapping_sub(b) < 1 << 31
}

/// The last two times that symbols of a block were sent again.
#[derive(Debug, Clone, Copy, Default)]
struct Bursts([Burst; 2]);

#[derive(Debug, Clone, Copy, Default)]
struct Burst {
    first: u32,
    last: u32,
    count: u32,
}

impl Burst {
    /// Its symbols that were sent after a datagram. They take turns with others, evenly.
    fn after(self, heard: u32) -> u32 {
        if self.count == 0 || !is_after(self.last, heard) {
            return 0;
        }
        if is_after(self.first, heard) {
            return self.count;
        }
        let (left, all) = (self.last.wrapping_sub(heard), self.last.wrapping_sub(self.first).max(1));
        u32::try_from(u64::from(self.count) * u64::from(left) / u64::from(all)).unwrap_or(self.count).min(self.count)
    }
}

impl Bursts {
    const fn begin(&mut self) {
        self.0 = [self.0[1], Burst { first: 0, last: 0, count: 0 }];
    }

    const fn sent(&mut self, number: u32) {
        let burst = &mut self.0[1];
        if burst.count == 0 {
            burst.first = number;
        }
        burst.last = number;
        burst.count += 1;
    }

    fn after(&self, heard: u32) -> u32 {
        self.0.iter().map(|burst| burst.after(heard)).sum()
    }
}

/// What became of a block that was asked for before.
#[derive(Debug, Default)]
struct Past {
    rounds: u8,
    bursts: Bursts,
    /// Left to upstreams.
    is_left: bool,
}

/// A block that is asked for.
#[derive(Debug)]
struct Pending {
    /// To be sent, beyond what is being sent.
    symbols: u32,
    /// Whether somebody lacks about all of it.
    is_whole: bool,
    /// Two of those who asked; whether there are more does not matter.
    askers: [Option<ReceiverId>; 2],
    /// What it costs one receiver by unicast, in bytes.
    alone: u64,
    due: Duration,
}

/// What a receiver asks for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ask {
    pub(super) who: ReceiverId,
    pub(super) block: u32,
    /// What it lacks.
    pub(super) lacks: u16,
    /// Symbols to send so that it has enough, losses considered.
    pub(super) wants: u32,
    /// Of these, those that are being sent.
    pub(super) coming: u32,
    /// The last datagram that it had heard.
    pub(super) heard: u32,
    /// Data symbols of the block.
    pub(super) data: u16,
    /// Bytes that it would fetch.
    pub(super) alone: u64,
    /// Not before this: others may ask for more.
    pub(super) due: Duration,
}

/// What is decided of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mend {
    pub(super) block: u32,
    pub(super) symbols: u32,
}

/// How blocks are taken.
#[derive(Debug, Clone, Copy)]
pub(super) struct Terms {
    /// Whole blocks too: everything has been sent once.
    pub(super) whole: bool,
    /// Nothing is left to upstreams.
    pub(super) always: bool,
    /// Bytes of a symbol.
    pub(super) symbol: u16,
}

/// What is asked for.
#[derive(Debug, Default)]
pub(super) struct Needs {
    pending: BTreeMap<u32, Pending>,
    wholes: usize,
    /// Blocks that were ever asked for; at most all.
    past: BTreeMap<u32, Past>,
    /// Blocks of which is to be told that they come.
    coming: BTreeSet<u32>,
    /// Blocks of which is to be told that they do not.
    left: BTreeSet<u32>,
    /// Something may be due then.
    next: Option<Duration>,
}

impl Needs {
    /// A receiver asks for a block.
    pub(super) fn ask(&mut self, ask: Ask) {
        let past = self.past.get(&ask.block);
        if past.is_some_and(|past| past.is_left) {
            note(&mut self.left, ask.block);
            return;
        }
        let sent = ask.coming + past.map_or(0, |past| past.bursts.after(ask.heard));
        let Some(symbols) = ask.wants.checked_sub(sent).filter(|symbols| *symbols > 0) else { return };
        let is_whole = ask.lacks > ask.data / 2;
        if !self.pending.contains_key(&ask.block) && !self.has_room(is_whole) {
            return;
        }
        if !is_whole {
            note(&mut self.coming, ask.block);
        }
        self.enter(ask, symbols, is_whole);
    }

    fn has_room(&self, is_whole: bool) -> bool {
        self.pending.len() < MOST_PENDING && !(is_whole && self.wholes >= MOST_WHOLE)
    }

    fn enter(&mut self, ask: Ask, symbols: u32, is_whole: bool) {
        let fresh = Pending { symbols: 0, is_whole: false, askers: [None; 2], alone: 0, due: ask.due };
        let pending = self.pending.entry(ask.block).or_insert(fresh);
        pending.symbols = pending.symbols.max(symbols);
        pending.alone = pending.alone.max(ask.alone);
        if is_whole && !pending.is_whole {
            pending.is_whole = true;
            self.wholes += 1;
        }
        match pending.askers {
            [None, _] => pending.askers[0] = Some(ask.who),
            [Some(first), None] if first != ask.who => pending.askers[1] = Some(ask.who),
            _ => {}
        }
        self.next = Some(self.next.map_or(pending.due, |next| next.min(pending.due)));
    }

    /// Takes the first block that is due. What is left to upstreams on the way is told by [`Self::left`].
    pub(super) fn take(&mut self, now: Duration, terms: Terms) -> Option<Mend> {
        if self.next.is_none_or(|next| now < next) {
            return None;
        }
        loop {
            let fits = |pending: &Pending| terms.whole || !pending.is_whole;
            let due = self.pending.iter().find(|(_, pending)| pending.due <= now && fits(pending));
            let Some((&block, _)) = due else {
                self.next = self.pending.values().filter(|pending| fits(pending)).map(|pending| pending.due).min();
                return None;
            };
            if let Some(mend) = self.decide(block, terms) {
                return Some(mend);
            }
        }
    }

    fn decide(&mut self, block: u32, terms: Terms) -> Option<Mend> {
        let pending = self.pending.remove(&block)?;
        self.wholes -= usize::from(pending.is_whole);
        let past = self.past.entry(block).or_default();
        let bytes = u64::from(pending.symbols) * u64::from(terms.symbol);
        let is_dear = pending.askers[1].is_none() && bytes >= pending.alone;
        if !terms.always && (is_dear || past.rounds >= MOST_ROUNDS) {
            past.is_left = true;
            self.coming.remove(&block);
            note(&mut self.left, block);
            return None;
        }
        past.rounds = past.rounds.saturating_add(1);
        past.bursts.begin();
        note(&mut self.coming, block);
        Some(Mend { block, symbols: pending.symbols })
    }

    /// A symbol of a block that was taken has been sent.
    pub(super) fn sent(&mut self, block: u32, number: u32) {
        if let Some(past) = self.past.get_mut(&block) {
            past.bursts.sent(number);
        }
    }

    /// Everything has been sent once: what waited for that is to be looked at.
    pub(super) fn passed(&mut self, due: Duration) {
        for pending in self.pending.values_mut().filter(|pending| pending.is_whole) {
            pending.due = pending.due.max(due);
        }
        self.next = self.pending.values().map(|pending| pending.due).min();
    }

    /// When something is due.
    pub(super) const fn next(&self) -> Option<Duration> {
        self.next
    }

    /// The next blocks that will be taken, if nothing else is asked for.
    pub(super) fn soon(&self, whole: bool) -> impl Iterator<Item = u32> + '_ {
        self.pending.iter().filter(move |(_, pending)| whole || !pending.is_whole).map(|(block, _)| *block)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }

    /// Whether there is something to tell.
    pub(super) fn has_news(&self) -> bool {
        !self.coming.is_empty() || !self.left.is_empty()
    }

    /// What comes, and what does not: at most so many needs of each, to be told to all. `sending` knows what is being sent.
    pub(super) fn news(&mut self, most: usize, sending: impl Fn(u32) -> u32) -> (Vec<Need>, Vec<Need>) {
        let pending = &self.pending;
        let symbols = |block| {
            let more = pending.get(&block).map_or(0, |pending| pending.symbols);
            u16::try_from(sending(block) + more).unwrap_or(u16::MAX)
        };
        let coming = runs(&mut self.coming, most, symbols);
        let left = runs(&mut self.left, most, |_| 0);
        (coming.into_iter().filter(|need| need.symbols > 0).collect(), left)
    }
}

fn note(news: &mut BTreeSet<u32>, block: u32) {
    if news.len() < MOST_NEWS {
        news.insert(block);
    }
}

/// Takes blocks out of a set as at most so many needs.
fn runs(blocks: &mut BTreeSet<u32>, most: usize, symbols: impl Fn(u32) -> u16) -> Vec<Need> {
    let mut needs: Vec<Need> = Vec::new();
    while let Some(block) = blocks.first().copied() {
        let next = Need { first: block, count: 1, symbols: symbols(block) };
        if !extend(&mut needs, next) {
            if needs.len() == most {
                break;
            }
            needs.push(next);
        }
        blocks.pop_first();
    }
    needs
}

/// Whether a need of one block was added to the last one.
pub(super) fn extend(needs: &mut [Need], next: Need) -> bool {
    let Some(last) = needs.last_mut() else { return false };
    let follows = last.first.checked_add(u32::from(last.count)) == Some(next.first);
    let fits = follows && last.symbols == next.symbols && last.count < u16::MAX;
    last.count += u16::from(fits);
    fits
}

/// How much parity is sent unasked: what is lost on average, and a margin that is as many deviations of chance as it takes
/// for most blocks to need nothing more. Where losses are shared, one receiver's luck is everybody's, and a small margin
/// does; where they are not, the unluckiest of a thousand counts. So the margin is learnt: from the part of blocks that
/// were asked for.
#[derive(Debug)]
pub(super) struct Parity {
    fixed: Option<f64>,
    deviations: Option<f64>,
}

/// The part of blocks that may be asked for: as many more symbols would be wasted otherwise.
const ASKED: f64 = 0.3;
/// How fast the margin is learnt.
const LEARN: f64 = 0.8;
/// Bounds of the margin.
const MARGIN: (f64, f64) = (-1.0, 8.0);
/// No more than this part of all datagrams is believed to be lost.
const MOST_LOSS: f64 = 0.5;

impl Parity {
    /// `percent`: always so much, of the data.
    pub(super) const fn new(percent: Option<f64>) -> Self {
        Self { fixed: percent, deviations: None }
    }

    /// What the unluckiest of so many receivers has, in deviations, roughly: the margin before anything is learnt.
    fn unluckiest(receivers: usize) -> f64 {
        let receivers = f64::from(u32::try_from(receivers.max(1)).unwrap_or(u32::MAX));
        (2.0 * receivers.ln()).sqrt() * 0.85
    }

    fn margin(&self, receivers: usize) -> f64 {
        self.deviations.unwrap_or_else(|| Self::unluckiest(receivers))
    }

    /// Symbols for a block of `data` symbols when the worst receiver loses this part of all datagrams.
    pub(super) fn unasked(&self, data: u16, loss: f64, receivers: usize) -> u32 {
        let data = f64::from(data);
        if let Some(percent) = self.fixed {
            return whole(data * percent / 100.0);
        }
        let loss = loss.clamp(0.0, MOST_LOSS);
        let lost = data * loss / (1.0 - loss);
        whole(lost + self.margin(receivers) * lost.sqrt())
    }

    /// Symbols to send so that a receiver that lacks some has enough, and others that were less lucky too.
    pub(super) fn wanted(&self, lacks: u16, loss: f64, receivers: usize) -> u32 {
        let loss = loss.clamp(0.0, MOST_LOSS);
        let lacks = f64::from(lacks);
        let others = if receivers > 1 { self.margin(receivers).max(0.0) / 2.0 } else { 0.0 };
        whole(lacks / (1.0 - loss) + others * (lacks * loss.max(0.01)).sqrt()).max(whole(lacks))
    }

    /// This part of blocks that had parity was asked for all the same.
    pub(super) fn learn(&mut self, asked: f64, receivers: usize) {
        let margin = self.margin(receivers) + LEARN * (asked - ASKED);
        self.deviations = Some(margin.clamp(MARGIN.0, MARGIN.1));
    }
}

/// The nearest whole number, not below zero.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "clamped")]
fn whole(number: f64) -> u32 {
    number.round().clamp(0.0, 1e6) as u32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TERMS: Terms = Terms { whole: true, always: false, symbol: 1000 };

    fn ask(who: u8, block: u32, lacks: u16, heard: u32) -> Ask {
        Ask {
            who: ReceiverId([who; 16]),
            block,
            lacks,
            wants: u32::from(lacks),
            coming: 0,
            heard,
            data: 100,
            alone: (u64::from(lacks) * 16 * 1024).min(100_000),
            due: Duration::ZERO,
        }
    }

    fn take(needs: &mut Needs) -> Option<(u32, u32)> {
        needs.take(Duration::ZERO, TERMS).map(|mend| (mend.block, mend.symbols))
    }

    #[test]
    fn the_most_that_anybody_lacks_mends_all() {
        let mut needs = Needs::default();
        for (who, lacks) in [(1, 3), (2, 5), (3, 1)] {
            needs.ask(ask(who, 7, lacks, 0));
        }
        assert_eq!(needs.news(9, |_| 0).0, [Need { first: 7, count: 1, symbols: 5 }]);
        assert_eq!((take(&mut needs), take(&mut needs)), (Some((7, 5)), None));
    }

    #[test]
    fn a_whole_block_is_sent_again_for_two_and_left_for_one() {
        let mut needs = Needs::default();
        needs.ask(ask(1, 7, 100, 0));
        needs.ask(ask(1, 7, 100, 0));
        needs.ask(ask(1, 8, 100, 0));
        needs.ask(ask(2, 8, 100, 0));
        assert_eq!((take(&mut needs), take(&mut needs)), (Some((8, 100)), None));
        assert_eq!(needs.news(9, |_| 0).1, [Need { first: 7, count: 1, symbols: 0 }]);
        needs.ask(ask(3, 7, 2, 0));
        assert_eq!(needs.news(9, |_| 0).1.len(), 1, "who asks for it later is told again");
    }

    #[test]
    fn whole_blocks_wait_until_everything_has_been_sent_and_others_do_not() {
        let mut needs = Needs::default();
        for who in 1..=2 {
            needs.ask(ask(who, 7, 100, 0));
        }
        needs.ask(ask(1, 9, 2, 0));
        let terms = Terms { whole: false, ..TERMS };
        assert_eq!(needs.take(Duration::ZERO, terms), Some(Mend { block: 9, symbols: 2 }));
        assert_eq!(needs.take(Duration::ZERO, terms), None);
        needs.passed(Duration::from_secs(1));
        assert_eq!(take(&mut needs), None);
        assert_eq!(needs.take(Duration::from_secs(1), TERMS), Some(Mend { block: 7, symbols: 100 }));
    }

    #[test]
    fn what_a_report_could_not_know_is_not_sent_twice() {
        let mut needs = Needs::default();
        needs.ask(ask(1, 7, 4, 100));
        assert_eq!(take(&mut needs), Some((7, 4)));
        for number in 201..=204 {
            needs.sent(7, number);
        }
        needs.ask(ask(2, 7, 4, 200));
        assert_eq!(take(&mut needs), None, "it had heard none of them");
        needs.ask(ask(2, 7, 4, 202));
        assert_eq!(take(&mut needs), Some((7, 2)), "it had heard two of them");
        needs.ask(ask(3, 7, 4, 204));
        assert_eq!(take(&mut needs), Some((7, 4)), "it had heard all of them");
    }

    #[test]
    fn datagrams_after_the_last_number_are_later() {
        let mut bursts = Bursts::default();
        bursts.begin();
        for number in [u32::MAX - 1, u32::MAX, 0, 1] {
            bursts.sent(number);
        }
        assert_eq!([u32::MAX - 2, 1, 5].map(|heard| bursts.after(heard)), [4, 0, 0]);
    }

    #[test]
    fn a_block_is_not_sent_again_for_ever() {
        let mut needs = Needs::default();
        for _ in 0..MOST_ROUNDS {
            needs.ask(ask(1, 7, 1, 0));
            assert_eq!(take(&mut needs), Some((7, 1)));
        }
        needs.ask(ask(1, 7, 1, 0));
        assert_eq!(take(&mut needs), None);
        assert_eq!(needs.news(9, |_| 0).1.len(), 1);
    }

    #[test]
    fn late_receivers_leave_room_for_what_was_lost() {
        let mut needs = Needs::default();
        for block in 0..10_000 {
            needs.ask(ask(1, block, 100, 0));
        }
        assert_eq!(needs.pending.len(), MOST_WHOLE);
        for block in 20_000..30_000 {
            needs.ask(ask(1, block, 1, 0));
        }
        assert_eq!(needs.pending.len(), MOST_PENDING);
    }

    #[test]
    fn nothing_lost_is_no_parity() {
        let parity = Parity::new(None);
        assert_eq!(parity.unasked(727, 0.0, 1000), 0);
        assert!((7..12).contains(&parity.unasked(727, 0.01, 1)));
        assert!(parity.unasked(727, 0.01, 1000) > 12);
        assert_eq!(Parity::new(Some(10.0)).unasked(727, 0.0, 1), 73);
    }

    #[test]
    fn the_margin_follows_what_is_asked_for() {
        let mut parity = Parity::new(None);
        let before = parity.unasked(727, 0.01, 8);
        for _ in 0..20 {
            parity.learn(1.0, 8);
        }
        let more = parity.unasked(727, 0.01, 8);
        for _ in 0..100 {
            parity.learn(0.0, 8);
        }
        assert!(parity.unasked(727, 0.01, 8) < before && before < more);
    }

    proptest! {
        #[test]
        fn runs_say_the_same_as_their_blocks(blocks in prop::collection::btree_set(0_u32..300, 0..100), most in 1_usize..40) {
            let symbols = |block: u32| u16::try_from(block % 50 / 20).unwrap();
            let (mut left, mut told) = (blocks.clone(), Vec::new());
            while !left.is_empty() {
                let needs = runs(&mut left, most, symbols);
                prop_assert!(!needs.is_empty() && needs.len() <= most);
                for need in needs {
                    for block in need.first..need.first + u32::from(need.count) {
                        prop_assert_eq!(need.symbols, symbols(block));
                        told.push(block);
                    }
                }
            }
            prop_assert_eq!(told, blocks.into_iter().collect::<Vec<_>>());
        }
    }
}
