//! Whether misses should be answered by multicast: many machines boot from one image at about the same time, and a chunk
//! that several mirrors ask for within a window is sent once to all.
//!
//! A machine thinks as long between two reads as it did in the recording; what it waits for delays all that follows. Each
//! node has one link out, on which answers queue; an answer takes the delay and its turn on that link. Nothing is lost,
//! which flatters multicast: its losses would have to be mended first.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::path::PathBuf;

use clap::Args;
use replay::trace::Trace;

use crate::chance::Chance;
use crate::out;

/// Bytes of a chunk.
const CHUNK: u64 = 64 * 1024;
/// Microseconds one way, and bytes per second.
const DELAY: u64 = 1000;
const RATE: u64 = 25_000_000;
/// The same within the rack.
const NEAR: (u64, u64) = (100, 1_250_000_000);

/// Whether misses of the same chunk should be answered once, by multicast: a table in Markdown.
#[derive(Debug, Args)]
pub(crate) struct Demand {
    /// A recorded boot: CSV with the columns seconds,op,offset,bytes.
    #[arg(long, default_value = "tests/data/boot-debian12-web.csv")]
    boot: PathBuf,
    /// Machines.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 8, 40])]
    machines: Vec<usize>,
    /// The last starts so many milliseconds after the first.
    #[arg(long, value_delimiter = ',', default_values_t = [0, 100, 1000, 10_000])]
    skew: Vec<u64>,
    /// Other starts for other seeds.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

/// Who answers a miss.
#[derive(Debug, Clone, Copy)]
enum Way {
    /// The origin, each.
    Star,
    /// A mirror between, in the rack.
    Tier,
    /// Each the next, which keeps it.
    Chain,
    /// Each two others.
    Tree,
    /// The origin, by multicast after so many microseconds; those that asked keep it, or all.
    Multicast { window: u64, all: bool },
}

const WAYS: [(&str, Way); 10] = [
    ("star", Way::Star),
    ("tier", Way::Tier),
    ("chain", Way::Chain),
    ("tree", Way::Tree),
    ("multicast 5 ms", Way::Multicast { window: 5000, all: false }),
    ("multicast 20 ms", Way::Multicast { window: 20_000, all: false }),
    ("multicast 100 ms", Way::Multicast { window: 100_000, all: false }),
    ("multicast 5 ms, all keep it", Way::Multicast { window: 5000, all: true }),
    ("multicast 20 ms, all keep it", Way::Multicast { window: 20_000, all: true }),
    ("multicast 100 ms, all keep it", Way::Multicast { window: 100_000, all: true }),
];

impl Demand {
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        let trace = Trace::parse(&std::fs::read_to_string(&self.boot)?)?;
        out(
            "| machines | skew | way | origin sends | copies | stall, mean | stall, longest |\n| --- | --- | --- | --- | --- | --- | --- |",
        )?;
        for machines in &self.machines {
            for skew in &self.skew {
                for (name, way) in WAYS {
                    self.row(&trace, *machines, *skew, name, way)?;
                }
            }
        }
        Ok(())
    }

    fn row(&self, trace: &Trace, machines: usize, skew: u64, name: &str, way: Way) -> anyhow::Result<()> {
        let mut chance = Chance::new(self.seed);
        let starts: Vec<_> = (0..machines).map(|_| chance.next() % (skew * 1000 + 1)).collect();
        let mut nodes = Nodes::new(way);
        let stalls = boot(trace, &starts, &mut nodes);
        let mean = stalls.iter().sum::<u64>() as f64 / machines as f64 / 1e6;
        let longest = stalls.iter().max().copied().unwrap_or(0) as f64 / 1e6;
        let copies = nodes.sent as f64 / trace.footprint(CHUNK) as f64;
        let sent = nodes.sent as f64 / 1e6;
        out(&format!("| {machines} | {skew} ms | {name} | {sent:.0} MB | {copies:.2} | {mean:.2} s | {longest:.2} s |"))
    }
}

/// Boots machines that start then, and says how long each waited. Times in microseconds.
fn boot(trace: &Trace, starts: &[u64], nodes: &mut Nodes) -> Vec<u64> {
    let mut stalls = vec![0; starts.len()];
    let mut due: BinaryHeap<_> =
        starts.iter().enumerate().map(|(machine, start)| Reverse((*start, machine, 0))).collect();
    let at = |read: usize| u64::try_from(trace.reads[read].at.as_micros()).unwrap_or(u64::MAX);
    while let Some(Reverse((now, machine, read))) = due.pop() {
        let range = trace.reads[read].range;
        let chunks = range.start() / CHUNK..range.end().div_ceil(CHUNK);
        let there = chunks.map(|chunk| nodes.fetch(machine + 1, chunk, now)).max().unwrap_or(now).max(now);
        stalls[machine] += there - now;
        if read + 1 < trace.reads.len() {
            due.push(Reverse((there + at(read + 1).saturating_sub(at(read)), machine, read + 1)));
        }
    }
    stalls
}

/// Who has what from when on. Node 0 is the mirror between; machines follow.
struct Nodes {
    way: Way,
    there: BTreeMap<(usize, u64), u64>,
    /// When the link out of each is free; that of the origin is apart.
    free: BTreeMap<usize, u64>,
    origin: u64,
    /// By multicast: when a chunk leaves.
    leaves: BTreeMap<u64, (u64, u64)>,
    sent: u64,
}

impl Nodes {
    const fn new(way: Way) -> Self {
        Self { way, there: BTreeMap::new(), free: BTreeMap::new(), origin: 0, leaves: BTreeMap::new(), sent: 0 }
    }

    /// When a node has a chunk that it wants now.
    fn fetch(&mut self, node: usize, chunk: u64, now: u64) -> u64 {
        let is_kept_by_all = matches!(self.way, Way::Multicast { all: true, .. });
        let key = (if is_kept_by_all { 1 } else { node }, chunk);
        if let Some(there) = self.there.get(&key) {
            return *there;
        }
        let there = match self.way {
            Way::Star => self.ask_origin(now),
            Way::Tier if node == 0 => self.ask_origin(now),
            Way::Tier => self.ask(0, chunk, now, NEAR),
            Way::Chain | Way::Tree if node == 1 => self.ask_origin(now),
            Way::Chain => self.ask(node - 1, chunk, now, (DELAY, RATE)),
            Way::Tree => self.ask(node / 2, chunk, now, (DELAY, RATE)),
            Way::Multicast { window, .. } => self.ask_all(chunk, now, window),
        };
        self.there.insert(key, there);
        there
    }

    fn ask_origin(&mut self, now: u64) -> u64 {
        self.sent += CHUNK;
        self.origin = self.origin.max(now + DELAY) + CHUNK * 1_000_000 / RATE;
        self.origin + DELAY
    }

    fn ask(&mut self, other: usize, chunk: u64, now: u64, (delay, rate): (u64, u64)) -> u64 {
        let there = self.fetch(other, chunk, now + delay).max(now + delay);
        let free = self.free.entry(other).or_default();
        *free = (*free).max(there) + CHUNK * 1_000_000 / rate;
        *free + delay
    }

    /// Who asks before it leaves gets it, too.
    fn ask_all(&mut self, chunk: u64, now: u64, window: u64) -> u64 {
        if let Some((leaves, there)) = self.leaves.get(&chunk)
            && now + DELAY <= *leaves
        {
            return *there;
        }
        let there = self.ask_origin(now + window);
        self.leaves.insert(chunk, (there - DELAY - CHUNK * 1_000_000 / RATE, there));
        there
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "seconds,op,offset,bytes\n0,read,0,4096\n1,read,0,4096\n2,read,65536,131072\n";

    fn booted(way: Way, starts: &[u64]) -> (Vec<u64>, u64) {
        let mut nodes = Nodes::new(way);
        let stalls = boot(&Trace::parse(TRACE).unwrap(), starts, &mut nodes);
        (stalls, nodes.sent / CHUNK)
    }

    #[test]
    fn a_machine_alone_waits_for_each_chunk_once() {
        let turn = CHUNK * 1_000_000 / RATE;
        assert_eq!(booted(Way::Star, &[0]), (vec![4 * DELAY + 3 * turn], 3));
    }

    #[test]
    fn a_tier_fetches_once_and_a_window_groups_those_that_ask_within_it() {
        assert_eq!(booted(Way::Star, &[0, 0]).1, 6);
        assert_eq!(booted(Way::Tier, &[0, 0]).1, 3);
        assert_eq!(booted(Way::Chain, &[0, 5_000_000]).1, 3);
        let window = |starts: &[u64]| booted(Way::Multicast { window: 5000, all: false }, starts).1;
        assert_eq!((window(&[0, 4000]), window(&[0, 9_000_000])), (3, 6));
        assert_eq!(booted(Way::Multicast { window: 5000, all: true }, &[0, 9_000_000]).1, 3);
    }
}
