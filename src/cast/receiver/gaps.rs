//! Losses, by the gaps in the numbers of datagrams.

/// A datagram that is late by more than this is not late: the count has begun again.
const LATE: u32 = 1 << 12;
/// Nor were more than this lost.
const LOST: u32 = 1 << 24;

/// What came and what did not since it was last asked. A datagram that overtakes others counts them as lost until they
/// come; one that comes twice makes up for one that did not.
#[derive(Debug, Default)]
pub(super) struct Gaps {
    last: Option<u32>,
    seen: u32,
    lost: u32,
}

impl Gaps {
    /// A datagram has come.
    pub(super) fn heard(&mut self, number: u32) {
        self.seen = self.seen.saturating_add(1);
        let Some(last) = self.last else {
            self.last = Some(number);
            return;
        };
        let ahead = number.wrapping_sub(last);
        if (1..LOST).contains(&ahead) {
            self.lost = self.lost.saturating_add(ahead - 1);
        } else if last.wrapping_sub(number) < LATE {
            self.lost = self.lost.saturating_sub(1);
            return;
        }
        self.last = Some(number);
    }

    /// The latest number.
    pub(super) fn last(&self) -> u32 {
        self.last.unwrap_or(0)
    }

    /// Datagrams that came and those that did not.
    pub(super) const fn count(&self) -> (u32, u32) {
        (self.seen, self.lost)
    }

    /// The same, and the count begins again.
    pub(super) const fn take(&mut self) -> (u32, u32) {
        let count = self.count();
        (self.seen, self.lost) = (0, 0);
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(numbers: &[u32]) -> (u32, u32) {
        let mut gaps = Gaps::default();
        numbers.iter().for_each(|number| gaps.heard(*number));
        gaps.take()
    }

    #[test]
    fn gaps_are_losses() {
        assert_eq!(counted(&[5, 6, 9]), (3, 2));
        assert_eq!(counted(&[u32::MAX - 1, u32::MAX, 0, 2]), (4, 1), "numbers wrap around");
        assert_eq!(counted(&[5, 8, 6, 7, 9]), (5, 0), "late ones were not lost");
        assert_eq!(counted(&[1_000_000, 0, 1, 2]), (4, 0), "a count that begins again says nothing");
        assert_eq!(counted(&[7, 7]), (2, 0));
    }

    #[test]
    fn the_latest_stays_the_latest() {
        let mut gaps = Gaps::default();
        for number in [5, 8, 6] {
            gaps.heard(number);
        }
        assert_eq!((gaps.last(), gaps.take(), gaps.take()), (8, (3, 1), (0, 0)));
    }
}
