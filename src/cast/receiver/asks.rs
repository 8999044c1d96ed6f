//! What was asked for, and when to ask again.

use std::collections::BTreeMap;
use std::time::Duration;

/// What is asked for is waited for at least so long, and some spreads.
const LEAST: Duration = Duration::from_millis(200);
const SPREADS: u32 = 4;
/// Each further time it is waited twice as long, so often at most.
const DOUBLINGS: u32 = 5;

#[derive(Debug, Clone, Copy)]
struct Asked {
    /// When that was, or when the sender said that it comes.
    at: Duration,
    until: Duration,
    times: u32,
}

/// Blocks that were asked for, by this receiver or others, and are not here: at most those that are lacking.
#[derive(Debug, Default)]
pub(super) struct Asks {
    asked: BTreeMap<u32, Asked>,
    /// There are more, for which there was no room: they are due then.
    more: Option<Duration>,
}

impl Asks {
    /// Whether to ask for a block now.
    pub(super) fn may(&self, now: Duration, block: u32) -> bool {
        self.asked.get(&block).is_none_or(|asked| asked.until <= now)
    }

    /// Not everything that is lacking could be asked for now.
    pub(super) fn more(&mut self, now: Duration) {
        self.more = Some(now + LEAST);
    }

    /// It is asked for now.
    pub(super) fn asked(&mut self, now: Duration, block: u32, spread: Duration) {
        self.more = None;
        let asked = self.asked.entry(block).or_insert(Asked { at: now, until: now, times: 0 });
        let wait = LEAST.max(spread * SPREADS) * 2_u32.pow(asked.times.min(DOUBLINGS));
        *asked = Asked { at: now, until: now + wait, times: asked.times + 1 };
    }

    /// It comes, says the sender.
    pub(super) fn comes(&mut self, now: Duration, block: u32, spread: Duration) {
        let until = now + LEAST.max(spread * SPREADS);
        self.asked.insert(block, Asked { at: now, until, times: 0 });
    }

    /// Nothing that was asked for by then comes any more.
    pub(super) fn forget(&mut self, by: Duration) {
        for asked in self.asked.values_mut().filter(|asked| asked.at <= by) {
            asked.until = Duration::ZERO;
        }
    }

    /// It is here, or will never be.
    pub(super) fn settled(&mut self, block: u32) {
        self.asked.remove(&block);
    }

    /// When to ask for something again.
    pub(super) fn next(&self) -> Option<Duration> {
        self.asked.values().map(|asked| asked.until).chain(self.more).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPREAD: Duration = Duration::from_millis(30);

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn what_was_asked_for_is_asked_again_ever_more_rarely() {
        let mut asks = Asks::default();
        let (mut now, mut waits) = (ms(0), Vec::new());
        for _ in 0..8 {
            assert!(asks.may(now, 7));
            asks.asked(now, 7, SPREAD);
            assert!(!asks.may(now, 7));
            let next = asks.next().unwrap();
            waits.push(next - now);
            now = next;
        }
        assert_eq!(waits, [200, 400, 800, 1600, 3200, 6400, 6400, 6400].map(ms));
    }

    #[test]
    fn what_comes_is_not_asked_for_until_the_sender_has_nothing_more() {
        let mut asks = Asks::default();
        asks.comes(ms(100), 7, SPREAD);
        assert!(!asks.may(ms(299), 7) && asks.may(ms(300), 7));
        asks.forget(ms(99));
        assert!(!asks.may(ms(150), 7));
        asks.forget(ms(100));
        assert!(asks.may(ms(150), 7));
        asks.settled(7);
        assert_eq!(asks.next(), None);
    }
}
