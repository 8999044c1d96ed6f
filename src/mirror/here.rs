//! How much of some ranges is here, and whether all of them could be.

use thiserror::Error;

use super::Mirror;
use super::chunks::State;
use crate::ranges::ByteRange;
use crate::units::ByteSize;

/// How much of some ranges of an image is here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Here {
    /// Bytes of the ranges.
    pub total: u64,
    /// Of these, bytes of resident chunks, durable ones only.
    pub resident: u64,
    /// Of these, bytes known to be zero, after a crash too.
    pub zero: u64,
}

/// Ranges that can never be here together.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "{image}: this takes {} on the disk; of the {} of --cache-size {} can be filled, and pins of something else keep {} of that: {} too much",
    ByteSize(*wanted), ByteSize(*limit), ByteSize(*most), ByteSize(*pinned), ByteSize((wanted + pinned).saturating_sub(*most))
)]
pub struct NeverFits {
    /// The image.
    pub image: String,
    /// Bytes of the disk that they need.
    pub wanted: u64,
    /// Bytes that other pins keep.
    pub pinned: u64,
    /// Bytes that chunks can take: the limit without maps, manifests and headroom.
    pub most: u64,
    /// The limit of the cache.
    pub limit: u64,
}

impl Here {
    /// What does not have to be fetched.
    pub const fn done(self) -> u64 {
        self.resident + self.zero
    }

    /// Whether nothing has to be fetched.
    pub const fn is_all(self) -> bool {
        self.done() == self.total
    }
}

impl Mirror {
    /// How much of `ranges`, which are apart from each other, is here now. What lies beyond the image counts as missing.
    /// Looks at every chunk of them.
    pub fn here(&self, ranges: &[ByteRange]) -> Here {
        let (geometry, states) = (self.0.geometry, &self.0.states);
        let image = ByteRange::between(0, geometry.size());
        let mut here = Here::default();
        for range in ranges {
            here.total += range.length();
            let range = range.intersect(image);
            for chunk in geometry.chunks(range) {
                let length = geometry.range(chunk).intersect(range).length();
                match states.get(chunk) {
                    State::Resident | State::Unverified if self.0.origins.is_marked(chunk) => here.resident += length,
                    State::Zero if self.0.origins.is_marked(chunk) => here.zero += length,
                    State::Resident
                    | State::Unverified
                    | State::Zero
                    | State::Absent
                    | State::Leaving
                    | State::Volatile => {}
                }
            }
        }
        here
    }

    /// Refuses ranges that can never be here together: more than the limit of the cache less what else is never evicted.
    /// They are in order and apart from each other. Looks at every chunk of them.
    pub fn check_room(&self, ranges: &[ByteRange]) -> Result<(), NeverFits> {
        let inner = &self.0;
        let own = inner.pinned_cost(&intersection(&inner.pins.ranges(), ranges));
        let pinned = inner.space.usage().pinned.saturating_sub(own);
        let (wanted, most) = (inner.pinned_cost(ranges), inner.space.most_kept());
        if wanted.saturating_add(pinned) <= most {
            return Ok(());
        }
        Err(NeverFits { image: inner.name.clone(), wanted, pinned, most, limit: inner.space.limit() })
    }
}

/// The bytes that are in both of two lists of ranges, each in order and apart from each other.
fn intersection(one: &[ByteRange], other: &[ByteRange]) -> Vec<ByteRange> {
    let (mut one, mut other) = (one.iter().peekable(), other.iter().peekable());
    let mut both = Vec::new();
    while let (Some(a), Some(b)) = (one.peek(), other.peek()) {
        let common = a.intersect(**b);
        both.extend((!common.is_empty()).then_some(common));
        if a.end() <= b.end() {
            one.next();
        } else {
            other.next();
        }
    }
    both
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn common_bytes_are_in_both(
            one in prop::collection::vec((1u64..9, 1u64..9), 0..8), other in prop::collection::vec((1u64..9, 1u64..9), 0..8),
        ) {
            let list = |parts: &[(u64, u64)]| {
                let mut at = 0;
                let mut part = |(gap, length): &(u64, u64)| {
                    let range = ByteRange::between(at + gap, at + gap + length);
                    at = range.end();
                    range
                };
                parts.iter().map(&mut part).collect::<Vec<_>>()
            };
            let holds = |list: &[ByteRange], at: u64| list.iter().any(|range| range.start() <= at && at < range.end());
            let (one, other) = (list(&one), list(&other));
            let both = intersection(&one, &other);
            for at in 0..160 {
                prop_assert_eq!(holds(&both, at), holds(&one, at) && holds(&other, at));
            }
        }
    }
}
