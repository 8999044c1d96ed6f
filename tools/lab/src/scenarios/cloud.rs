//! Cloud time, after Jump-Start Cloud (Wu, Shen, Wu, Lin; figures 4 and 5): the time until images are on so many servers,
//! and the time that virtual machines, spread over them, then take.
//!
//! The first image is the real one, so one image has no deployment; so many more are mirrors. They are deployed by
//! *unicast* (each fetches all of it from the origin, at the same time), in a *chain* (`headwater prefetch --to`), or by
//! *multicast* (`headwater cast`). How long machines run does not depend on how images came to where they are, so that is
//! measured once for each number of images, on the servers of the last deployment.
//!
//! In the paper the disk of an image server is what is short: 160 Mbit/s for sequential and 2 MB/s for random reading, on a
//! network of 1 Gbit/s. Here a bucket on each server's cable stands for the disk while machines run, with the same ratio to
//! the link. It counts bytes, where a real disk also counts seeks; and it does not slow down deployment, for which the link
//! alone is short.
//!
//! A machine asks as [`crate::poisson`] has it, for a fixed number of requests, with at most [`DEPTH`] in flight: a
//! machine that waits does little else. All it reads is compared.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};
use clap::{Args, ValueEnum};
use headwater::clock;
use headwater::units::{ByteSize, MIB, to_usize};
use load::children::Guard;
use serde::Deserialize;

use super::cast;
use crate::bed::{Bed, Host, Rate, output};
use crate::poisson::{Machine, Pattern};
use crate::servers::{IMAGE, Mirror, Origin};
use crate::table::{Cell, Row, Table};
use crate::{Lab, beside, image, tell};

/// Requests that a machine has in flight at most.
const DEPTH: u32 = 4;
/// How long machines may run.
const PATIENCE: Duration = Duration::from_secs(900);
/// How much worse a time may be before it counts: what the same run differs by.
const NOISE: f64 = 1.05;

/// The command line.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Numbers of images, in ascending order.
    #[arg(long, value_delimiter = ',', value_name = "N", default_value = "1,2,4,8",
        value_parser = clap::value_parser!(u8).range(1..=32))]
    images: Vec<u8>,
    /// How images are deployed.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "unicast,chain,multicast")]
    ways: Vec<Way>,
    /// Virtual machines, spread evenly over the images.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..=128))]
    machines: u16,
    /// Bytes of the image.
    #[arg(long, default_value = "64M")]
    size: ByteSize,
    /// Requests per second of each machine that reads at random, 4K to 64K.
    #[arg(long, value_delimiter = ',', value_name = "N", default_value = "5,20")]
    random: Vec<u32>,
    /// Requests of each.
    #[arg(long, value_name = "N", default_value_t = 30)]
    random_requests: usize,
    /// What an image server's disk gives them. [default: 2 MB/s for each Gbit/s of the link]
    #[arg(long, value_name = "RATE")]
    random_disk: Option<Rate>,
    /// Requests per second of each machine that reads sequentially, 64K each.
    #[arg(long, value_delimiter = ',', value_name = "N", default_value = "50,200")]
    sequential: Vec<u32>,
    /// Requests of each.
    #[arg(long, value_name = "N", default_value_t = 96)]
    sequential_requests: usize,
    /// What an image server's disk gives them. [default: 160 Mbit/s for each Gbit/s of the link]
    #[arg(long, value_name = "RATE")]
    sequential_disk: Option<Rate>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Way {
    Unicast,
    Chain,
    Multicast,
}

impl Way {
    const fn name(self) -> &'static str {
        match self {
            Self::Unicast => "unicast",
            Self::Chain => "chain",
            Self::Multicast => "multicast",
        }
    }
}

/// What machines do.
#[derive(Debug, Clone, Copy)]
struct Work {
    pattern: Pattern,
    rate: u32,
    requests: usize,
    disk: Rate,
}

impl Work {
    fn name(self) -> String {
        let pattern = if self.pattern == Pattern::Random { "random" } else { "sequential" };
        format!("{pattern}, {}/s", self.rate)
    }
}

/// What one number of images came to.
#[derive(Debug)]
struct Trial {
    /// Seconds, by way.
    deployment: Vec<f64>,
    /// By work.
    running: Vec<Running>,
}

/// What machines told, together.
#[derive(Debug, Clone, Copy)]
struct Running {
    /// Until the last one was through.
    seconds: f64,
    /// The mean of the machines' medians, in seconds.
    delay: f64,
}

/// Runs the scenario.
pub(crate) fn run(lab: &Lab, options: &Options) -> anyhow::Result<Table> {
    ensure!(options.images.is_sorted(), "the numbers of images are to be in ascending order");
    let most = options.images.last().copied().context("no number of images")?;
    let image = image::full(lab, options.size.0.max(4 * MIB))?;
    image::index(lab, &image)?;
    // One host more is where the machines are.
    let bed = cast::bed(lab, most)?;
    let origin = Origin::start(lab, &bed, &image)?;
    let works = works(options, bed.link.rate);
    let runs = lab.in_turns(
        &options.images,
        |images| format!("{images} images"),
        |images| trial(lab, options, &Ground { bed: &bed, origin: &origin, image: &image }, &works, images),
    )?;
    Ok(table(options, &bed, &works, &runs))
}

/// All that machines do, one after the other.
fn works(options: &Options, link: Rate) -> Vec<Work> {
    let random = options.random_disk.unwrap_or(Rate(link.0 * 16 / 1000));
    let sequential = options.sequential_disk.unwrap_or(Rate(link.0 * 160 / 1000));
    let random = options.random.iter().map(|&rate| {
        let requests = options.random_requests;
        Work { pattern: Pattern::Random, rate, requests, disk: random }
    });
    let sequential = options.sequential.iter().map(|&rate| {
        let requests = options.sequential_requests;
        Work { pattern: Pattern::Sequential, rate, requests, disk: sequential }
    });
    random.chain(sequential).collect()
}

/// Where it happens.
struct Ground<'a> {
    bed: &'a Bed,
    origin: &'a Origin,
    image: &'a Path,
}

impl Ground<'_> {
    /// Servers of so many images beside the real one.
    fn hosts(&self, images: u8) -> &[Host] {
        &self.bed.mirrors[..usize::from(images) - 1]
    }

    /// Where machines are.
    fn machines(&self) -> anyhow::Result<&Host> {
        self.bed.mirrors.last().context("there is a host for machines")
    }
}

fn trial(lab: &Lab, options: &Options, ground: &Ground<'_>, works: &[Work], images: u8) -> anyhow::Result<Trial> {
    let mut deployment = Vec::new();
    let mut mirrors = Vec::new();
    for way in &options.ways {
        // The caches of the way before go first.
        mirrors.clear();
        mirrors = empty(lab, ground, images, *way)?;
        let seconds = if images == 1 { 0.0 } else { deploy(lab, ground, &mirrors, *way)? };
        tell(&format!("{}: {seconds:.2} s", way.name()));
        deployment.push(seconds);
    }
    mirrors.iter().try_for_each(|mirror| mirror.verify(ground.image))?;
    let servers: Vec<&Host> = std::iter::once(&ground.bed.origin).chain(ground.hosts(images)).collect();
    let mut running = Vec::new();
    for work in works {
        lab.go_on()?;
        servers.iter().try_for_each(|host| host.limit(work.disk))?;
        let told = machines(lab, options, ground, &servers, *work)?;
        tell(&format!("{}: {:.2} s, {:.1} ms", work.name(), told.seconds, told.delay * 1e3));
        running.push(told);
        servers.iter().try_for_each(|host| host.limit(ground.bed.link.rate))?;
    }
    Ok(Trial { deployment, running })
}

/// Mirrors that have nothing.
fn empty(lab: &Lab, ground: &Ground<'_>, images: u8, way: Way) -> anyhow::Result<Vec<Mirror>> {
    let joins = cast::joins();
    let words: Vec<&str> = match way {
        Way::Multicast => joins.iter().map(String::as_str).collect(),
        Way::Unicast | Way::Chain => vec!["--fill=none"],
    };
    ground.hosts(images).iter().map(|host| Mirror::start(lab, host, &ground.origin.uri, &words)).collect()
}

/// Has mirrors filled, and tells how long that took.
fn deploy(lab: &Lab, ground: &Ground<'_>, mirrors: &[Mirror], way: Way) -> anyhow::Result<f64> {
    let (bed, origin) = (ground.bed, ground.origin);
    let trial = match way {
        Way::Multicast => {
            let rate = cast::share(bed.link.rate, 99);
            cast::cast(lab, bed, origin, mirrors, &["--all".into(), format!("--rate={rate}")])?
        }
        Way::Unicast => cast::measured(bed, origin, mirrors, || {
            mirrors.iter().try_for_each(|mirror| mirror.order(&["prefetch", IMAGE, "--all"]).map(drop))
        })?,
        Way::Chain => cast::measured(bed, origin, mirrors, || {
            let target = |(mirror, host): (&Mirror, &Host)| {
                format!("{}=nbd://{}/{IMAGE}", mirror.admin().display(), host.address)
            };
            let targets: Vec<String> = mirrors.iter().zip(&bed.mirrors).map(target).collect();
            let words = ["prefetch", IMAGE, "--all", "--to", &targets.join(",")];
            output(std::process::Command::new(&lab.headwater).args(words)).map(drop)
        })?,
    };
    Ok(trial.seconds)
}

/// What one machine's `replay` says.
#[derive(Debug, Deserialize)]
struct Replayed {
    seconds: f64,
    latency: Latency,
}

#[derive(Debug, Deserialize)]
struct Latency {
    median: f64,
}

/// Runs all machines at the same time, each on its server.
fn machines(
    lab: &Lab,
    options: &Options,
    ground: &Ground<'_>,
    servers: &[&Host],
    work: Work,
) -> anyhow::Result<Running> {
    let size = std::fs::metadata(ground.image)?.len();
    let traces = (0..options.machines)
        .map(|number| {
            let path = lab.scratch().join(format!("machine{number}.csv"));
            let machine = Machine::new(number.into(), work.rate.into(), work.pattern, size);
            std::fs::write(&path, machine.trace(work.requests))?;
            Ok(path)
        })
        .collect::<anyhow::Result<Vec<PathBuf>>>()?;
    let mut running = Vec::new();
    for (number, trace) in traces.iter().enumerate() {
        let server = servers[number % servers.len()];
        let mut command = ground.machines()?.command(&beside("replay")?);
        command.arg(trace).arg(format!("nbd://{}/{IMAGE}", server.address)).arg("--image").arg(ground.image);
        command.args(["--json", "--pace=1"]).arg(format!("--depth={DEPTH}"));
        let log = trace.with_extension("log");
        std::fs::write(&log, "")?;
        running.push((Guard::spawn(command, &log)?, log));
    }
    let told = running.into_iter().map(|(machine, log)| ended(lab, machine, &log)).collect::<Result<Vec<_>, _>>()?;
    let delay = told.iter().map(|told| told.latency.median).sum::<f64>() / f64::from(options.machines);
    Ok(Running { seconds: told.iter().map(|told| told.seconds).fold(0.0, f64::max), delay })
}

fn ended(lab: &Lab, mut machine: Guard, log: &Path) -> anyhow::Result<Replayed> {
    let deadline = clock::now() + PATIENCE;
    loop {
        lab.go_on()?;
        let ended = machine.ended()?;
        let text = std::fs::read_to_string(log)?;
        match ended {
            Some(status) if status.success() => return serde_json::from_str(&text).context(text),
            Some(status) => anyhow::bail!("a machine ended with {status}: {text}"),
            None => ensure!(clock::now() < deadline, "a machine does not end: {text}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn table(options: &Options, bed: &Bed, works: &[Work], runs: &[Vec<Trial>]) -> Table {
    // A row has a cell for each number of images.
    let row = |name: String, value: &dyn Fn(&Trial) -> f64| {
        Row::new(name, runs.iter().map(|trials| Cell::of(trials.iter().map(value).collect())).collect())
    };
    let ways = || options.ways.iter().enumerate();
    let mut rows: Vec<Row> =
        ways().map(|(way, name)| row(format!("deployment, {}", name.name()), &|trial| trial.deployment[way])).collect();
    let mut remarks = Vec::new();
    for (at, work) in works.iter().enumerate() {
        rows.push(row(format!("running, {}", work.name()), &|trial| trial.running[at].seconds));
        rows.push(row(format!("delay ms, {}", work.name()), &|trial| trial.running[at].delay * 1e3));
        for (way, name) in ways() {
            let cloud = row(format!("cloud time, {}, {}", work.name(), name.name()), &|trial| {
                trial.deployment[way] + trial.running[at].seconds
            });
            remarks.push(remark(&options.images, &cloud));
            rows.push(cloud);
        }
    }
    let columns = options.images.iter().map(|images| COLUMNS[to_usize(u64::from(*images)) - 1]).collect();
    let (random, sequential) = (
        works.iter().find(|work| work.pattern == Pattern::Random).map_or(Rate(0), |work| work.disk),
        works.iter().find(|work| work.pattern == Pattern::Sequential).map_or(Rate(0), |work| work.disk),
    );
    Table {
        title: format!(
            "Cloud time in seconds by the number of images: {} machines, an image of {}, {}; disks of {random} (random) \
             and {sequential} (sequential)",
            options.machines, options.size, bed.link
        ),
        columns,
        rows,
        remarks,
        ..Table::default()
    }
}

/// Whether more images ever hurt.
fn remark(images: &[u8], row: &Row) -> String {
    let medians: Vec<f64> =
        row.cells.iter().map(|cell| cell.figure.as_ref().map_or(f64::NAN, |figure| figure.median)).collect();
    let best = (0..medians.len()).min_by(|one, other| medians[*one].total_cmp(&medians[*other])).unwrap_or(0);
    let worse: Vec<String> = worse(&medians).map(|at| images[at].to_string()).collect();
    let name = &row.name;
    match worse.as_slice() {
        [] => format!("{name}: best with {}, and more images never hurt", images[best]),
        worse => format!("{name}: best with {}; WORSE than with fewer: {}", images[best], worse.join(", ")),
    }
}

/// Numbers of images, by their index, that take longer than the number before.
fn worse(medians: &[f64]) -> impl Iterator<Item = usize> {
    (1..medians.len()).filter(|at| medians[*at] > medians[*at - 1] * NOISE)
}

/// The heads of columns.
const COLUMNS: [&str; 32] = [
    "1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "11", "12", "13", "14", "15", "16", "17", "18", "19", "20",
    "21", "22", "23", "24", "25", "26", "27", "28", "29", "30", "31", "32",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_hurts_is_told_apart_from_noise() {
        let row = |samples: &[f64]| Row::new("x", samples.iter().map(|sample| Cell::of(vec![*sample])).collect());
        let of = |samples: &[f64]| remark(&[1, 2, 4], &row(samples));
        assert_eq!(of(&[3.0, 2.0, 2.05]), "x: best with 2, and more images never hurt");
        assert_eq!(of(&[3.0, 2.0, 2.5]), "x: best with 2; WORSE than with fewer: 4");
        assert_eq!(of(&[1.0, 2.0, 3.0]), "x: best with 1; WORSE than with fewer: 2, 4");
    }
}
