//! One trace on a link of constant rate, with the schedule of the mirror itself.

use std::fmt;
use std::time::Duration;

use clap::ValueEnum;
use headwater::fill::deadline::{Choice, Strategy, Task, choose};
use headwater::units::to_u64;

use crate::trace::Deployment;

/// When images are fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Staging {
    /// As a part of each deployment: from its start on, in the time that its machines are promised for.
    Job,
    /// Each just in time as if it had the link for itself, which is what the paper's server does.
    JitAlone,
    /// Just in time, with a view of all.
    Jit,
    /// In the order in which they were ordered.
    Aggressive,
    /// By deadline.
    Hybrid,
}

impl Staging {
    pub(crate) const ALL: [Self; 5] = [Self::Job, Self::JitAlone, Self::Jit, Self::Aggressive, Self::Hybrid];

    /// What a mirror is told, if it is told anything before the deployment starts.
    pub(crate) const fn strategy(self) -> Strategy {
        match self {
            Self::Job | Self::JitAlone | Self::Aggressive => Strategy::Aggressive,
            Self::Jit => Strategy::Jit,
            Self::Hybrid => Strategy::Hybrid,
        }
    }

    /// When the mirror is told of a deployment, in transfers.
    pub(crate) fn told(self, deployment: &Deployment) -> f64 {
        let work = f64::from(deployment.transfers);
        match self {
            Self::Job => deployment.starts,
            // With the tenth that is counted on less by the mirror too.
            Self::JitAlone => (deployment.starts - work / 0.9).max(deployment.ordered),
            Self::Jit | Self::Aggressive | Self::Hybrid => deployment.ordered,
        }
    }
}

impl fmt::Display for Staging {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Job => "job",
            Self::JitAlone => "jit-alone",
            Self::Jit => "jit",
            Self::Aggressive => "aggressive",
            Self::Hybrid => "hybrid",
        })
    }
}

/// A link, and what goes over it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Link {
    pub(crate) bytes_per_second: f64,
    /// Bytes of an image.
    pub(crate) image: u64,
}

impl Link {
    /// So many transfers, as time.
    pub(crate) fn time(self, transfers: f64) -> Duration {
        Duration::from_secs_f64(transfers * self.image as f64 / self.bytes_per_second)
    }
}

/// What a deployment got.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Got {
    /// Of the time that it was promised, from 0 to 1.
    pub(crate) share: f64,
}

impl Got {
    /// Of a deployment whose last image came at `end`. Whatever is less than `tolerance` late is in time.
    pub(crate) fn new(deployment: &Deployment, link: Link, end: Duration, tolerance: Duration) -> Self {
        let late = end.saturating_sub(link.time(deployment.starts));
        let late = if late <= tolerance { Duration::ZERO } else { late };
        let lasts = link.time(deployment.lasts).as_secs_f64();
        Self { share: (1.0 - late.as_secs_f64() / lasts).max(0.0) }
    }

    /// Whether it got all.
    pub(crate) fn is_all(self) -> bool {
        self.share >= 1.0
    }
}

/// Times are exact but for rounding.
const TOLERANCE: Duration = Duration::from_millis(1);
/// The choice is made again after so long at least.
const LONGEST_STEP: Duration = Duration::from_secs(10);

/// The transfers of all deployments as orders; the number of a batch is that of its deployment.
fn orders(deployments: &[Deployment], staging: Staging, link: Link) -> Vec<Task> {
    let of = |(batch, deployment): (u64, &Deployment)| {
        let task = Task {
            id: 0,
            batch,
            remaining: link.image,
            deadline: Some(link.time(deployment.starts)),
            strategy: staging.strategy(),
            ordered: link.time(staging.told(deployment)),
            is_started: false,
        };
        vec![task; usize::try_from(deployment.transfers).expect("few")]
    };
    let mut tasks: Vec<_> = (0..).zip(deployments).flat_map(of).collect();
    for (id, task) in (0..).zip(&mut tasks) {
        task.id = id;
    }
    tasks
}

/// What each deployment gets.
pub(crate) fn play(deployments: &[Deployment], staging: Staging, link: Link) -> Vec<Got> {
    let mut coming = orders(deployments, staging, link);
    coming.sort_by_key(|task| std::cmp::Reverse((task.ordered, task.id)));
    let (mut now, mut known) = (Duration::ZERO, Vec::<Task>::new());
    let mut ends = vec![Duration::ZERO; deployments.len()];
    loop {
        while let Some(task) = coming.pop_if(|task| task.ordered <= now) {
            known.push(task);
        }
        let next = coming.last().map_or(Duration::MAX, |task| task.ordered);
        match choose(now, &known, link.bytes_per_second) {
            Choice::Fetch { id, .. } => {
                let index = known.iter().position(|task| task.id == id).expect("it was given");
                let task = &mut known[index];
                let needs = Duration::from_secs_f64(task.remaining as f64 / link.bytes_per_second);
                let step = needs.min(next - now).min(LONGEST_STEP);
                now += step;
                task.is_started = true;
                if step == needs {
                    let batch = usize::try_from(known.swap_remove(index).batch).expect("few");
                    ends[batch] = now;
                } else {
                    task.remaining = task.remaining.saturating_sub(bytes(step, link)).max(1);
                }
            }
            Choice::WaitUntil(then) => now = then.min(next),
            Choice::Nothing if coming.is_empty() => break,
            Choice::Nothing => now = next,
        }
    }
    let got = |(deployment, end): (&Deployment, &Duration)| Got::new(deployment, link, *end, TOLERANCE);
    deployments.iter().zip(&ends).map(got).collect()
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "what a link brings in some seconds")]
fn bytes(time: Duration, link: Link) -> u64 {
    (time.as_secs_f64() * link.bytes_per_second).round() as u64
}

/// Whether any schedule gives everybody all: whether earliest deadline first does. Not the mirror's own code, which is
/// held against it.
pub(crate) fn is_feasible(deployments: &[Deployment]) -> bool {
    let mut left: Vec<_> = deployments.iter().map(|deployment| f64::from(deployment.transfers)).collect();
    let mut orders: Vec<_> = deployments.iter().map(|deployment| deployment.ordered).collect();
    orders.sort_by(f64::total_cmp);
    let mut now = 0.0;
    for until in orders.into_iter().chain([f64::INFINITY]) {
        // Sorted by start, which is the deadline.
        for (deployment, left) in deployments.iter().zip(&mut left) {
            if deployment.ordered <= now && *left > 0.0 {
                let work = left.min(until - now).max(0.0);
                *left -= work;
                now += work;
                if *left == 0.0 && now > deployment.starts + 1e-9 {
                    return false;
                }
            }
        }
        now = if until.is_finite() { until } else { now };
    }
    true
}

/// How many got all.
pub(crate) fn satisfied(got: &[Got]) -> u64 {
    to_u64(got.iter().filter(|got| got.is_all()).count())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::{self, Shape};

    const LINK: Link = Link { bytes_per_second: 12_500_000.0, image: 600_000_000 };

    fn deployment(ordered: f64, starts: f64, transfers: u32) -> Deployment {
        let nodes = (0..transfers).collect();
        Deployment { ordered, starts, lasts: 10.0, image: 0, nodes, transfers }
    }

    fn shares(deployments: &[Deployment], staging: Staging) -> Vec<f64> {
        let share = |got: &Got| (got.share * 1000.0).round() / 1000.0;
        play(deployments, staging, LINK).iter().map(share).collect()
    }

    #[test]
    fn a_job_pays_for_its_images_and_a_reservation_does_not() {
        let deployments = [deployment(0.0, 10.0, 2), deployment(0.0, 11.0, 4)];
        assert_eq!(shares(&deployments, Staging::Job), [0.8, 0.5]);
        for staging in [Staging::Jit, Staging::Aggressive, Staging::Hybrid] {
            assert_eq!(shares(&deployments, staging), [1.0, 1.0], "{staging}");
        }
        // It does not see that the second needs the link at the same time.
        assert_eq!(shares(&deployments, Staging::JitAlone), [0.744, 1.0]);
    }

    #[test]
    fn whoever_is_loose_gives_way_to_whoever_is_tight_in_a_hybrid_only() {
        let deployments = [deployment(1.0, 4.0, 3), deployment(0.0, 20.0, 4)];
        assert!(is_feasible(&deployments));
        assert_eq!(shares(&deployments, Staging::Hybrid), [1.0, 1.0]);
        assert_eq!(shares(&deployments, Staging::Aggressive), [0.7, 1.0]);
    }

    #[test]
    fn when_not_all_can_be_met_the_fewest_are_late() {
        let deployments = [deployment(0.0, 4.0, 4), deployment(0.0, 4.5, 2), deployment(0.0, 5.0, 2)];
        assert!(!is_feasible(&deployments));
        assert_eq!(shares(&deployments, Staging::Hybrid), [0.6, 1.0, 1.0]);
    }

    #[test]
    fn hybrid_gives_all_to_everybody_if_any_can_and_never_less_than_the_others() {
        let mut feasible = 0;
        for (seed, shape) in (0..100).flat_map(|seed| Shape::ALL.map(|shape| (seed, shape))) {
            for (load, keeps_images) in [(0.5, false), (0.9, false), (1.4, false), (1.8, true)] {
                let deployments = trace::make(shape, load, keeps_images, seed);
                let got = |staging| satisfied(&play(&deployments, staging, LINK));
                let hybrid = got(Staging::Hybrid);
                if is_feasible(&deployments) {
                    feasible += 1;
                    assert_eq!(hybrid, to_u64(deployments.len()), "{shape}, load {load}, seed {seed}");
                }
                for other in [Staging::Job, Staging::JitAlone, Staging::Jit, Staging::Aggressive] {
                    let other_got = got(other);
                    assert!(other_got <= hybrid, "{shape}, load {load}, seed {seed}: {other} {other_got} > {hybrid}");
                }
            }
        }
        assert!((200..700).contains(&feasible), "{feasible} of 800 are feasible: both kinds should be tried");
    }
}
