//! What is deployed: reservations of some machines, each with a time from which they are promised.
//!
//! All times are given in *transfers*: what one image takes on the link. So the same trace can be played with images
//! and links of any size. 600 MB at 100 Mbit/s make 48 s.

use std::fmt;

use clap::ValueEnum;
use headwater::units::{to_u64, to_usize};

/// Machines in all.
const NODES: u32 = 10;
/// Images that are deployed.
const IMAGES: u32 = 8;
/// How many images a node keeps, if it keeps any: 1.8 GB of 600 MB each.
const KEPT: usize = 3;
/// Deployments of one burst.
const BURST: u32 = 5;

/// Which trace of the paper.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Shape {
    /// 36 deployments that start at equal distances.
    Uniform,
    /// 35 deployments that start in bursts of five.
    Bursts,
}

impl Shape {
    pub(crate) const ALL: [Self; 2] = [Self::Uniform, Self::Bursts];

    const fn deployments(self) -> u32 {
        match self {
            Self::Uniform => 36,
            Self::Bursts => 35,
        }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Uniform => "uniform",
            Self::Bursts => "bursts",
        })
    }
}

/// Some machines that are wanted together.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Deployment {
    /// When it is asked for.
    pub(crate) ordered: f64,
    /// From when on its machines are promised.
    pub(crate) starts: f64,
    /// For how long.
    pub(crate) lasts: f64,
    pub(crate) image: u32,
    pub(crate) nodes: Vec<u32>,
    /// How many of its nodes have to get the image.
    pub(crate) transfers: u32,
}

/// Numbers that look random and are the same for the same seed (SplitMix64).
#[derive(Debug)]
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = self.0;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        bits ^ (bits >> 31)
    }

    /// Less than `end`. The bias of the remainder is far below what is looked at here.
    fn below(&mut self, end: u32) -> u32 {
        u32::try_from((self.next() >> 32) % u64::from(end)).expect("less than end")
    }

    /// From `low` to `high`.
    fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * f64::from(self.below(1 << 20)) / f64::from(1 << 20)
    }

    /// Different ones, less than `end`.
    fn choose(&mut self, count: u32, end: u32) -> Vec<u32> {
        let mut all: Vec<_> = (0..end).collect();
        (0..count)
            .map(|_| all.swap_remove(to_usize(self.below(u32::try_from(all.len()).expect("few")).into())))
            .collect()
    }
}

/// The deployments of a trace, by when they start. Their transfers, were each made, would keep the link busy for `load`
/// of the time between the first start and the last.
pub(crate) fn make(shape: Shape, load: f64, keeps_images: bool, seed: u64) -> Vec<Deployment> {
    // The same seed makes unrelated traces of different shapes.
    let mut random = Random(seed << 1 | u64::from(shape == Shape::Bursts));
    let mut deployments: Vec<_> = (0..shape.deployments()).map(|_| deployment(&mut random)).collect();
    let work: u32 = deployments.iter().map(|deployment| deployment.transfers).sum();
    let distance = f64::from(work) / load / f64::from(shape.deployments());
    for (number, deployment) in (0..).zip(&mut deployments) {
        let starts = match shape {
            Shape::Uniform => f64::from(number) * distance,
            // All of a burst within a minute.
            Shape::Bursts => f64::from(number / BURST * BURST) * distance + random.between(0.0, 1.25),
        };
        deployment.starts += starts;
        deployment.ordered += starts;
    }
    deployments.sort_by(|one, other| one.starts.total_cmp(&other.starts));
    if keeps_images {
        skip_what_is_kept(&mut deployments);
    }
    deployments
}

/// One that starts at 75, so that nothing is ordered before 0.
fn deployment(random: &mut Random) -> Deployment {
    let starts = 75.0;
    // Every second one is asked for 5 to 15 minutes before it starts, the others half an hour to an hour.
    let lead = if random.below(2) == 0 { random.between(6.25, 18.75) } else { random.between(37.5, starts) };
    let nodes = 2 + random.below(3);
    Deployment {
        ordered: starts - lead,
        starts,
        // Half an hour to an hour.
        lasts: random.between(37.5, 75.0),
        image: random.below(IMAGES),
        nodes: random.choose(nodes, NODES),
        transfers: nodes,
    }
}

/// Each node keeps the images of its last deployments: least recently used goes first.
fn skip_what_is_kept(deployments: &mut [Deployment]) {
    let mut kept = vec![Vec::new(); to_usize(NODES.into())];
    for deployment in deployments {
        deployment.transfers = 0;
        for node in &deployment.nodes {
            let images = &mut kept[to_usize((*node).into())];
            let place = images.iter().position(|image| *image == deployment.image);
            deployment.transfers += u32::from(place.is_none());
            if let Some(place) = place {
                images.remove(place);
            } else if images.len() == KEPT {
                images.remove(0);
            }
            images.push(deployment.image);
        }
    }
}

/// All images that have to get to a node.
pub(crate) fn transfers(deployments: &[Deployment]) -> u64 {
    to_u64(deployments.iter().map(|deployment| to_usize(deployment.transfers.into())).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traces_are_what_they_are_said_to_be() {
        for shape in Shape::ALL {
            let deployments = make(shape, 0.5, false, 7);
            assert_eq!(deployments, make(shape, 0.5, false, 7));
            assert_ne!(deployments, make(shape, 0.5, false, 8));
            assert_eq!(deployments.len(), if shape == Shape::Uniform { 36 } else { 35 });
            for deployment in &deployments {
                assert!((2..=4).contains(&deployment.nodes.len()), "{deployment:?}");
                assert!(deployment.ordered >= 0.0 && deployment.starts >= deployment.ordered + 6.0, "{deployment:?}");
                assert_eq!(to_usize(deployment.transfers.into()), deployment.nodes.len());
            }
            let span = deployments.last().unwrap().starts - deployments[0].starts;
            let load = transfers(&deployments) as f64 / span;
            assert!((0.45..0.62).contains(&load), "{shape}: {load}");
        }
    }

    #[test]
    fn bursts_are_close_together_and_uniform_ones_are_not() {
        let closest = |shape| {
            let starts: Vec<_> = make(shape, 0.5, false, 1).iter().map(|deployment| deployment.starts).collect();
            starts.windows(2).filter(|pair| pair[1] - pair[0] <= 1.25).count()
        };
        assert_eq!(closest(Shape::Uniform), 0);
        assert_eq!(closest(Shape::Bursts), 28);
    }

    #[test]
    fn what_a_node_has_kept_is_not_fetched_again() {
        let of = |image, nodes: &[u32]| Deployment { image, nodes: nodes.to_vec(), ..deployment(&mut Random(1)) };
        let mut deployments =
            [of(0, &[0, 1]), of(1, &[0]), of(2, &[0]), of(0, &[0, 2]), of(3, &[0]), of(1, &[0]), of(0, &[0, 1])];
        skip_what_is_kept(&mut deployments);
        let transfers: Vec<_> = deployments.iter().map(|deployment| deployment.transfers).collect();
        assert_eq!(transfers, [2, 1, 1, 1, 1, 1, 0]);
    }
}
