//! The caches: ours by its own policies, one without a bound, and one that knows the future.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use headwater::mirror::policy::{Admission, Clock, Heat, Kind, Order, Segment, Space};
use headwater::mirror::{SpaceSettings, cost_of};
use headwater::units::{MIB, to_u64, to_usize};

use crate::workload::{self, Access, Cut};

/// The logical time moves once a second; this much is taken to be read in one.
const READ_IN_A_SECOND: u64 = 100 * MIB;

/// What a cache did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Outcome {
    /// Bytes that were read.
    pub(crate) read: u64,
    /// Bytes of these that were here.
    pub(crate) hit: u64,
    /// Bytes that were written to the cache.
    pub(crate) stored: u64,
    /// Segments.
    pub(crate) evicted: u64,
    /// Segments that were refused.
    pub(crate) bypassed: u64,
    /// Misses of whole chunks, in bytes.
    pub(crate) fetched: u64,
}

/// How much a cache of ours may take of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Room {
    /// `--cache-size`.
    pub(crate) limit: u64,
    /// Of it, what is taken by other things than chunks.
    pub(crate) fixed: u64,
}

/// Our cache, with the account of `headwater::mirror::Space`.
pub(crate) fn ours(accesses: &[Access], cut: Cut, room: Room, kind: Kind, admission: Admission) -> Outcome {
    let clock = Arc::new(Clock::default());
    let mut order = Order::new(kind, admission, Arc::clone(&clock));
    let segments = workload::segments(accesses);
    let heat: Vec<_> = (0..workload::images(accesses)).map(|_| Heat::new(segments)).collect();
    let heat_of = |segment: Segment| &heat[to_usize(segment.image.into())];
    let word_of = |segment: Segment| heat_of(segment).word(segment.number);
    // A bit for each chunk, so that a chunk of 16 KiB is the smallest.
    let mut here: HashMap<Segment, u64> = HashMap::new();
    let mut outcome = Outcome::default();
    let mut seconds = 0;
    let cost = cost_of(cut.chunk);
    let settings = SpaceSettings { limit: Some(room.limit), policy: kind, admission, ..SpaceSettings::default() };
    let mut used = room.fixed;
    for access in accesses {
        let Access { segment, chunk, bytes } = *access;
        outcome.read += bytes;
        if outcome.read / READ_IN_A_SECOND > seconds {
            seconds += 1;
            clock.advance();
        }
        let resident = here.get(&segment).copied();
        // A mirror notes what is missed too; what is not stored is not asked for its heat.
        heat_of(segment).touch(segment.number, clock.now());
        if resident.is_some_and(|chunks| chunks >> chunk & 1 == 1) {
            outcome.hit += bytes;
            continue;
        }
        outcome.fetched += cut.chunk;
        let space = if used + settings.plenty() > room.limit { Space::Taken } else { Space::Free };
        if resident.is_none() && !order.should_admit(segment, chunk, space, &word_of) {
            continue;
        }
        // The evictor works ahead, and as soon as less than half of what it keeps free is left.
        if used + cost + settings.headroom() / 2 > room.limit {
            while used + settings.headroom() > room.limit {
                let Some(victim) = order.victim(&word_of) else { break };
                if victim == segment {
                    order.put_back(victim);
                    continue;
                }
                used -= u64::from(here.remove(&victim).unwrap_or(0).count_ones()) * cost;
                order.evicted(victim);
                heat_of(victim).forget(victim.number);
                outcome.evicted += 1;
            }
        }
        if used + cost > room.limit {
            continue;
        }
        if resident.is_none() {
            order.admitted(segment, word_of(segment));
        }
        *here.entry(segment).or_default() |= 1 << chunk;
        used += cost;
        outcome.stored += cut.chunk;
    }
    outcome.bypassed = order.counters().bypassed;
    outcome
}

/// A cache that keeps everything.
pub(crate) fn unbounded(accesses: &[Access], cut: Cut) -> Outcome {
    clairvoyant(accesses, cut, u64::MAX)
}

/// A cache of chunks that knows when each is read again, and keeps those that are read soonest (Belady's MIN; what is
/// not worth its room is not stored).
pub(crate) fn clairvoyant(accesses: &[Access], cut: Cut, bound: u64) -> Outcome {
    const NEVER: usize = usize::MAX;
    let mut next_use = vec![NEVER; accesses.len()];
    let mut later: HashMap<u64, usize> = HashMap::new();
    for (index, access) in accesses.iter().enumerate().rev() {
        next_use[index] = later.insert(workload::name(*access, cut), index).unwrap_or(NEVER);
    }
    let mut here: BTreeSet<(usize, u64)> = BTreeSet::new();
    let mut outcome = Outcome::default();
    for (index, access) in accesses.iter().enumerate() {
        let name = workload::name(*access, cut);
        outcome.read += access.bytes;
        if here.remove(&(index, name)) {
            outcome.hit += access.bytes;
        } else {
            outcome.fetched += cut.chunk;
            if next_use[index] == NEVER {
                continue;
            }
            outcome.stored += cut.chunk;
        }
        here.insert((next_use[index], name));
        if to_u64(here.len()) > bound / cut.chunk {
            here.pop_last();
            outcome.evicted += 1;
        }
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::workload::{Choice, accesses, choose, whole_image};

    const CUT: Cut = Cut { chunk: 64 << 10 };

    fn reads(choice: Choice) -> Vec<Access> {
        accesses(&choose(choice, 8, 64, 1), &whole_image(16 * MIB), CUT, 1)
    }

    #[test]
    fn a_cache_that_all_fits_in_misses_each_chunk_once() {
        let accesses = reads(Choice::Uniform);
        let size = to_u64(workload::distinct(&accesses, CUT)) * CUT.chunk;
        // With what the evictor keeps free, and what a chunk takes beside its bytes.
        let room = Room { limit: size + 16 * MIB, fixed: 0 };
        for kind in Kind::ALL {
            let ours = ours(&accesses, CUT, room, kind, Admission::Measured);
            let best = unbounded(&accesses, CUT);
            assert_eq!((ours.hit, ours.evicted), (best.hit, 0));
            assert_eq!(ours.read - ours.hit, size);
        }
    }

    #[test]
    fn nobody_is_better_than_the_clairvoyant() {
        for choice in [Choice::Uniform, Choice::Skewed, Choice::Cyclic, Choice::Scan] {
            let accesses = reads(choice);
            let bound = 32 * MIB;
            let best = clairvoyant(&accesses, CUT, bound);
            for kind in Kind::ALL {
                for admission in [Admission::Always, Admission::Measured] {
                    assert!(ours(&accesses, CUT, Room { limit: bound, fixed: 0 }, kind, admission).hit <= best.hit);
                }
            }
        }
    }

    #[test]
    fn a_cyclic_scan_hits_what_fits_if_one_knows_the_future() {
        let accesses = reads(Choice::Cyclic);
        let best = clairvoyant(&accesses, CUT, 32 * MIB);
        // A quarter fits, and of eight rounds the first one misses.
        let share = best.hit * 1000 / best.read;
        assert!((200..260).contains(&share), "{share}");
        assert_eq!(ours(&accesses, CUT, Room { limit: 32 * MIB, fixed: 0 }, Kind::Lru, Admission::Always).hit, 0);
    }
}
