//! Real servers: an origin, a link of limited rate, and one mirror that holds an image for each machine of each
//! deployment.
//!
//! One mirror, because one schedule has to see the whole link. Its images have no manifest, so what two machines need
//! is fetched twice, as if each were on a host of its own. When an image has come is seen in the mirror's own figures.
//!
//! | file | holds |
//! | --- | --- |
//! | this one | the runs, and the table |
//! | `admin` | orders, and what the mirror says |
//! | `link` | the limited link |
//! | `servers` | processes of `headwater` |
//!
//! The link is that of `cachesim`.

mod admin;
#[path = "../../../cachesim/src/live/link.rs"]
mod link;
mod servers;

use std::collections::HashMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::ensure;
use clap::Args;
use headwater::clock;
use headwater::fill::deadline::Strategy;

use crate::schedule::{self, Got, Link, Staging};
use crate::trace::{self, Deployment, Random, Shape};
use servers::Server;

/// Between two looks at the mirror.
const PAUSE: Duration = Duration::from_millis(50);
/// What is so much late is in time: two looks, and what a busy machine adds.
const TOLERANCE: Duration = Duration::from_millis(150);
/// Not all of a link is for images: what was asked for, and what the servers take.
const USABLE: f64 = 0.95;

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Traces; both unless told.
    #[arg(long, value_enum, value_delimiter = ',')]
    trace: Vec<Shape>,
    /// How images are staged; job, jit, aggressive and hybrid unless told.
    #[arg(long, value_enum, value_delimiter = ',')]
    staging: Vec<Staging>,
    /// Work that the images are, as a part of what the link could do meanwhile.
    #[arg(long, value_name = "SHARE", default_value_t = 0.7)]
    load: f64,
    /// Another trace for each seed.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The program; the one beside this one unless told.
    #[arg(long, value_name = "PATH")]
    headwater: Option<PathBuf>,
    /// Megabits per second of the origin's link.
    #[arg(long, value_name = "MBIT", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    link: u32,
    /// MiB of an image.
    #[arg(long, value_name = "MIB", default_value_t = 6, value_parser = clap::value_parser!(u64).range(1..=1024))]
    image: u64,
    /// Where images and caches are put while it runs.
    #[arg(long, value_name = "DIR", default_value_os_t = std::env::temp_dir())]
    directory: PathBuf,
}

/// What is common to all runs.
struct Bench<'a> {
    arguments: &'a Arguments,
    headwater: PathBuf,
    directory: PathBuf,
    link: Link,
}

/// The name of an image of a machine of a deployment.
fn name(deployment: usize, machine: u32) -> String {
    format!("{deployment}-{machine}")
}

#[expect(clippy::print_stdout, reason = "this is what the program is for")]
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    ensure!((0.01..=100.0).contains(&arguments.load), "a load is from 0.01 to 100");
    let headwater = match &arguments.headwater {
        Some(path) => path.clone(),
        None => std::env::current_exe()?.with_file_name("headwater"),
    };
    let directory = tempfile::Builder::new().prefix("staging-").tempdir_in(&arguments.directory)?;
    // The trace is as fast as what the link can do for images, so the simulation has the same one.
    let bytes_per_second = f64::from(arguments.link) * 125_000.0 * USABLE;
    let link = Link { bytes_per_second, image: arguments.image << 20 };
    let bench = Bench { arguments, headwater, directory: directory.path().to_owned(), link };
    let shapes = if arguments.trace.is_empty() { &Shape::ALL[..] } else { &arguments.trace };
    let usual = [Staging::Job, Staging::Jit, Staging::Aggressive, Staging::Hybrid];
    let stagings = if arguments.staging.is_empty() { &usual[..] } else { &arguments.staging };
    println!("| trace | feasible | staging | got all | simulated | mean share | simulated |");
    println!("| --- | --- | --- | --- | --- | --- | --- |");
    for shape in shapes {
        let deployments = trace::make(*shape, arguments.load, false, arguments.seed);
        let feasible = if schedule::is_feasible(&deployments) { "yes" } else { "no" };
        for staging in stagings {
            let got = bench.run(&deployments, *staging)?;
            let simulated = schedule::play(&deployments, *staging, link);
            let (all, simulated_all) = (share_of_all(&got), share_of_all(&simulated));
            let (mean, simulated_mean) = (mean(&got), mean(&simulated));
            println!(
                "| {shape} | {feasible} | {staging} | {all:.3} | {simulated_all:.3} | {mean:.3} | {simulated_mean:.3} |"
            );
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn share_of_all(got: &[Got]) -> f64 {
    schedule::satisfied(got) as f64 / got.len() as f64
}

fn mean(got: &[Got]) -> f64 {
    got.iter().map(|got| got.share).sum::<f64>() / got.len() as f64
}

impl Bench<'_> {
    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// One trace against servers that have just been started.
    fn run(&self, deployments: &[Deployment], staging: Staging) -> anyhow::Result<Vec<Got>> {
        let names: Vec<_> = (0..)
            .zip(deployments)
            .flat_map(|(number, deployment)| (0..deployment.transfers).map(move |machine| name(number, machine)))
            .collect();
        let (origin, near, socket, cache) =
            (self.path("origin"), self.path("link"), self.path("mirror"), self.path("cache"));
        let image = self.path("image.raw");
        make_image(&image, self.link.image)?;
        let mut serve = vec!["serve".to_owned(), "--read-only".into()];
        serve.extend(names.iter().map(|name| format!("{name}={}", image.display())));
        let server = Server::start(&self.headwater, &origin, &serve)?;
        link::open(&near, &origin, f64::from(self.arguments.link) * 125_000.0)?;
        let mut mirror = vec!["mirror".to_owned(), "--upstream-connections".into(), "1".into()];
        mirror.extend(names.iter().map(|name| format!("nbd+unix:///{name}?socket={}", near.display())));
        mirror.extend(["--cache".into(), cache.display().to_string()]);
        let mirror = Server::start(&self.headwater, &socket, &mirror)?;
        let ends = self.deploy(deployments, staging, &mirror)?;
        drop((mirror, server));
        for path in [origin, near, socket] {
            std::fs::remove_file(path)?;
        }
        std::fs::remove_dir_all(cache)?;
        let got = |(deployment, end): (&Deployment, &Duration)| Got::new(deployment, self.link, *end, TOLERANCE);
        Ok(deployments.iter().zip(&ends).map(got).collect())
    }

    /// Orders what is to be ordered in time. Gives when all images of each deployment had come.
    fn deploy(&self, deployments: &[Deployment], staging: Staging, mirror: &Server) -> anyhow::Result<Vec<Duration>> {
        let mut coming: Vec<_> = deployments.iter().enumerate().collect();
        let told = |deployment: &Deployment| self.link.time(staging.told(deployment));
        coming.sort_by_key(|(number, deployment)| std::cmp::Reverse((told(deployment), *number)));
        let mut ends: Vec<Option<Duration>> = vec![None; deployments.len()];
        let patience = self.link.time(trace::transfers(deployments) as f64) * 3 + Duration::from_secs(60);
        let begin = clock::now();
        while ends.iter().any(Option::is_none) {
            let now = clock::now().duration_since(begin);
            while let Some((number, deployment)) = coming.pop_if(|(_, deployment)| told(deployment) <= now) {
                for machine in 0..deployment.transfers {
                    self.order(deployment, staging, now, &name(number, machine), mirror)?;
                }
            }
            let received = admin::received(mirror.admin())?;
            let now = clock::now().duration_since(begin);
            for (number, (deployment, end)) in deployments.iter().zip(&mut ends).enumerate() {
                if end.is_none() && self.is_here(number, deployment, &received) {
                    *end = Some(now);
                }
            }
            let last = deployments.last().map_or(Duration::ZERO, |deployment| self.link.time(deployment.starts));
            ensure!(now < last + patience, "{staging}: the images do not come");
            std::thread::sleep(PAUSE);
        }
        Ok(ends.into_iter().flatten().collect())
    }

    fn is_here(&self, number: usize, deployment: &Deployment, received: &HashMap<String, u64>) -> bool {
        let is_whole = |machine| received.get(&name(number, machine)).is_some_and(|bytes| *bytes >= self.link.image);
        (0..deployment.transfers).all(is_whole)
    }

    fn order(
        &self,
        deployment: &Deployment,
        staging: Staging,
        now: Duration,
        image: &str,
        mirror: &Server,
    ) -> anyhow::Result<()> {
        // Whoever stages within the job has no deadline: it is late already.
        let is_planned =
            matches!(staging.strategy(), Strategy::Jit | Strategy::Hybrid) || staging == Staging::Aggressive;
        let left = self.link.time(deployment.starts).saturating_sub(now);
        admin::order(mirror.admin(), image, is_planned.then_some(left), staging.strategy())
    }
}

/// Random bytes: no holes, and nothing that is there twice.
fn make_image(path: &Path, size: u64) -> anyhow::Result<()> {
    let mut file = std::io::BufWriter::new(std::fs::File::create(path)?);
    let mut random = Random(size);
    for _ in 0..size / 8 {
        file.write_all(&random.next().to_le_bytes())?;
    }
    Ok(file.flush()?)
}
