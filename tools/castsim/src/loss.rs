//! Which datagrams are lost.

use clap::ValueEnum;

use crate::chance::Chance;

/// How losses come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kind {
    /// Each receiver loses datagrams of its own, one by one.
    Independent,
    /// All lose the same: before the switch.
    Shared,
    /// Each receiver loses datagrams of its own, some tens in a row (Gilbert and Elliott).
    Bursts,
}

/// Datagrams that are lost in a row, on average.
const BURST: f64 = 20.0;

impl Kind {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Independent => "independent",
            Self::Shared => "shared",
            Self::Bursts => "bursts",
        }
    }
}

/// What is lost on the way to some receivers.
#[derive(Debug)]
pub(crate) struct Loss {
    kind: Kind,
    part: f64,
    chance: Chance,
    /// Whether a receiver is within a burst.
    within: Vec<bool>,
    /// Whether all lose this one.
    shared: bool,
}

impl Loss {
    pub(crate) fn new(kind: Kind, part: f64, receivers: usize, seed: u64) -> Self {
        Self { kind, part, chance: Chance::new(seed), within: vec![false; receivers], shared: false }
    }

    /// The next datagram.
    pub(crate) fn next(&mut self) {
        self.shared = self.kind == Kind::Shared && self.by_chance();
    }

    /// Whether a receiver loses it. To be asked once for each.
    pub(crate) fn is_lost(&mut self, receiver: usize) -> bool {
        match self.kind {
            Kind::Shared => self.shared,
            Kind::Independent => self.by_chance(),
            Kind::Bursts => self.in_burst(receiver),
        }
    }

    fn in_burst(&mut self, receiver: usize) -> bool {
        if self.part <= 0.0 {
            return false;
        }
        let changes = if self.within[receiver] { 1.0 / BURST } else { self.part / (1.0 - self.part) / BURST };
        if self.chance.unit() < changes {
            self.within[receiver] = !self.within[receiver];
        }
        self.within[receiver]
    }

    /// Whether a datagram on the way back is lost.
    pub(crate) fn by_chance(&mut self) -> bool {
        self.part > 0.0 && self.chance.unit() < self.part
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_much_is_lost_as_was_said() {
        for kind in [Kind::Independent, Kind::Shared, Kind::Bursts] {
            let mut loss = Loss::new(kind, 0.05, 10, 3);
            let mut lost = 0;
            for _ in 0..50_000 {
                loss.next();
                lost += (0..10).filter(|receiver| loss.is_lost(*receiver)).count();
            }
            assert!((23_000..27_000).contains(&lost), "{kind:?}: {lost}");
        }
    }
}
