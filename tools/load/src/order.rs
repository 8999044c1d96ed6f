//! Which block is next.

use crate::arguments::Pattern;
use crate::pattern::mix;

/// The blocks of one connection, in their order.
#[derive(Debug, Clone)]
pub(crate) enum Order {
    /// Any block of a part, for ever.
    Random {
        /// The first block.
        first: u64,
        /// How many.
        count: u64,
        /// The state of the generator.
        state: u64,
    },
    /// One after the other, from the start again at the end.
    Sequential {
        /// The first block.
        first: u64,
        /// How many.
        count: u64,
        /// How many have been given out.
        next: u64,
        /// Whether the end is the end.
        once: bool,
    },
    /// Every so many blocks of a permutation.
    Shuffled {
        /// All blocks of the region.
        all: Permutation,
        /// The next index.
        next: u64,
        /// To the next but one.
        step: u64,
    },
}

/// One connection of several.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Member {
    /// Which.
    pub(crate) index: u64,
    /// Of how many.
    pub(crate) of: u64,
}

impl Member {
    /// This one's share of `blocks`: first and count. The shares are disjoint and together are everything.
    pub(crate) fn share(self, blocks: u64) -> (u64, u64) {
        let bound = |index: u64| {
            let product = u128::from(blocks) * u128::from(index) / u128::from(self.of);
            u64::try_from(product).expect("not more than all blocks")
        };
        (bound(self.index), bound(self.index + 1) - bound(self.index))
    }
}

impl Order {
    /// The order for one connection. Random blocks come from the whole region unless they must be this
    /// connection's `own`.
    pub(crate) fn new(pattern: Pattern, once: bool, own: bool, blocks: u64, member: Member, seed: u64) -> Self {
        let (first, count) = member.share(blocks);
        match pattern {
            Pattern::Sequential => Self::Sequential { first, count, next: 0, once },
            Pattern::Random if once && !own => {
                Self::Shuffled { all: Permutation::new(0, blocks, seed), next: member.index, step: member.of }
            }
            Pattern::Random if once => Self::Shuffled { all: Permutation::new(first, count, seed), next: 0, step: 1 },
            Pattern::Random => {
                let (first, count) = if own { (first, count) } else { (0, blocks) };
                Self::Random { first, count, state: mix(seed ^ mix(member.index + 1)) }
            }
        }
    }

    /// The next block, or `None` at the end of what is to be done once.
    pub(crate) fn next(&mut self) -> Option<u64> {
        match self {
            Self::Random { first, count, state } => {
                if *count == 0 {
                    return None;
                }
                *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
                Some(*first + scale(mix(*state), *count))
            }
            Self::Sequential { first, count, next, once } => {
                if *count == 0 || (*once && next == count) {
                    return None;
                }
                let block = *first + *next % *count;
                *next = if *once { *next + 1 } else { (*next + 1) % *count };
                Some(block)
            }
            Self::Shuffled { all, next, step } => {
                let block = (*next < all.count).then(|| all.at(*next));
                *next += *step;
                block
            }
        }
    }
}

/// A number below `count` from a number of 64 random bits, without a division.
pub(crate) fn scale(random: u64, count: u64) -> u64 {
    u64::try_from((u128::from(random) * u128::from(count)) >> 64).expect("the upper half of a product")
}

/// All numbers from `first` on, `count` of them, in an order that looks random, without a table.
///
/// A Feistel network permutes the numbers of an even number of bits; what falls outside is sent through again until
/// it falls inside, which takes less than four times on average.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Permutation {
    first: u64,
    count: u64,
    /// Bits of each half.
    half: u32,
    seed: u64,
}

impl Permutation {
    pub(crate) fn new(first: u64, count: u64, seed: u64) -> Self {
        let bits = u64::BITS - count.saturating_sub(1).leading_zeros();
        Self { first, count, half: bits.div_ceil(2).max(1), seed }
    }

    /// The number at `index`, which is below the count.
    pub(crate) fn at(&self, index: u64) -> u64 {
        debug_assert!(index < self.count);
        let mut value = self.rounds(index);
        while value >= self.count {
            value = self.rounds(value);
        }
        self.first + value
    }

    fn rounds(&self, value: u64) -> u64 {
        let mask = (1 << self.half) - 1;
        let (mut left, mut right) = (value >> self.half, value & mask);
        for round in 0..4 {
            (left, right) = (right, left ^ (mix(right ^ mix(self.seed ^ round)) & mask));
        }
        left << self.half | right
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn members(of: u64) -> impl Iterator<Item = Member> {
        (0..of).map(move |index| Member { index, of })
    }

    fn all(order: &mut Order) -> Vec<u64> {
        std::iter::from_fn(|| order.next()).collect()
    }

    #[test]
    fn shares_are_disjoint_and_complete() {
        for (blocks, of) in [(10, 3), (3, 10), (1, 1), (1 << 50, 7)] {
            let mut next = 0;
            for member in members(of) {
                let (first, count) = member.share(blocks);
                assert_eq!(first, next);
                next += count;
            }
            assert_eq!(next, blocks);
        }
    }

    #[test]
    fn once_gives_each_block_once_in_any_pattern() {
        for pattern in [Pattern::Random, Pattern::Sequential] {
            for own in [false, true] {
                for (blocks, of) in [(1, 1), (2, 1), (1000, 1), (1000, 3), (4096, 4), (5, 8)] {
                    let given: Vec<u64> = members(of)
                        .flat_map(|member| all(&mut Order::new(pattern, true, own, blocks, member, 5)))
                        .collect();
                    assert_eq!(given.len() as u64, blocks, "{pattern:?} {blocks} {of}");
                    assert_eq!(given.iter().copied().collect::<BTreeSet<_>>(), (0..blocks).collect());
                }
            }
        }
    }

    #[test]
    fn a_permutation_mixes_and_depends_on_its_seed() {
        let listed = |seed| (0..1000).map(|index| Permutation::new(0, 1000, seed).at(index)).collect::<Vec<_>>();
        assert_ne!(listed(1), listed(2));
        // Of a thousand random numbers, two or so stay in step with their neighbour.
        let in_step = listed(1).windows(2).filter(|pair| pair[0].abs_diff(pair[1]) == 1).count();
        assert!(in_step < 20, "{in_step} neighbours");
    }

    #[test]
    fn random_blocks_reach_all_of_the_region_or_of_the_share() {
        let mut order = Order::new(Pattern::Random, false, false, 64, Member { index: 1, of: 4 }, 9);
        let seen: BTreeSet<u64> = (0..2000).filter_map(|_| order.next()).collect();
        assert_eq!(seen, (0..64).collect());
        let mut order = Order::new(Pattern::Random, false, true, 64, Member { index: 1, of: 4 }, 9);
        let seen: BTreeSet<u64> = (0..2000).filter_map(|_| order.next()).collect();
        assert_eq!(seen, (16..32).collect());
    }

    #[test]
    fn sequential_blocks_begin_again_at_the_end() {
        let mut order = Order::new(Pattern::Sequential, false, false, 6, Member { index: 1, of: 2 }, 0);
        let given: Vec<u64> = (0..5).filter_map(|_| order.next()).collect();
        assert_eq!(given, [3, 4, 5, 3, 4]);
    }
}
