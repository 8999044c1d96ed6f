//! Real servers: an origin, a link of limited rate, mirrors with a bounded cache, and deployments that read through them.
//!
//! | file | holds |
//! | --- | --- |
//! | this one | the runs, and what is demanded of them |
//! | `images` | bytes that say where they belong |
//! | `link` | the limited link |
//! | `servers` | processes of `headwater` |
//! | `sampler` | what the cache takes on the disk, all the time |
//! | `chart` | the plot |

mod chart;
mod images;
mod link;
mod sampler;
mod servers;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;
use futures_util::stream::{self, StreamExt, TryStreamExt};
use headwater::clock;
use headwater::export::Export;
use headwater::mirror::policy::{Admission, Kind};
use headwater::nbd::Uri;
use headwater::ranges::ByteRange;
use headwater::units::{ByteSize, to_u64};
use headwater::upstream::{Expectation, Remote, Settings};
use tokio::runtime::{Builder, LocalOptions};

use crate::Workload;
use crate::cache::{self, Room};
use crate::workload::{self, Access, Choice};
use sampler::{Sampler, Seen};
use servers::Server;

/// The longest time, as a part of that without a cache.
const LONGEST: f64 = 1.05;
/// The largest difference of hit ratios.
const FARTHEST: f64 = 0.05;

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    #[command(flatten)]
    workload: Workload,
    /// The program; the one beside this one unless told.
    #[arg(long, value_name = "PATH")]
    headwater: Option<PathBuf>,
    /// Megabits per second that the origin's link carries; 0 for a link without a limit.
    #[arg(long, value_name = "MBIT", default_value_t = 1000)]
    link: u32,
    /// Reads in flight of each deployment.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..))]
    depth: u16,
    /// Where images and caches are put while it runs.
    #[arg(long, value_name = "DIR", default_value_os_t = std::env::temp_dir())]
    directory: PathBuf,
    /// Writes the plot here.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// What a run came to.
#[derive(Debug, Clone)]
struct Row {
    choice: Choice,
    percent: u64,
    policy: Kind,
    limit: u64,
    /// As `du` sees it.
    seen: Seen,
    /// A part of the time without a cache.
    time: f64,
    seconds: f64,
    hit: f64,
    simulated: f64,
    /// What came over the link, as a part of what was read.
    fetched: f64,
    bypassed_chunks: u64,
    /// Of the mirror, for each GB read.
    cpu: f64,
}

impl Row {
    fn fails(&self) -> bool {
        self.seen.most > self.limit || self.time > LONGEST || (self.hit - self.simulated).abs() > FARTHEST
    }
}

/// One choice of images, without a cache.
struct Direct<'a> {
    choice: Choice,
    deployments: Vec<u32>,
    accesses: Vec<Access>,
    /// That it took.
    seconds: f64,
    /// Where the mirrors find the images too.
    upstream: &'a Path,
}

/// What is common to all runs.
struct Bench<'a> {
    arguments: &'a Arguments,
    headwater: PathBuf,
    directory: PathBuf,
    reads: Vec<ByteRange>,
}

pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let workload = &arguments.workload;
    let (cut, reads) = (workload.cut()?, workload.reads()?);
    let headwater = match &arguments.headwater {
        Some(path) => path.clone(),
        None => std::env::current_exe()?.with_file_name("headwater"),
    };
    let directory = tempfile::Builder::new().prefix("cachesim-").tempdir_in(&arguments.directory)?;
    let bench = Bench { arguments, headwater, directory: directory.path().to_owned(), reads };
    let mut serve = vec!["serve".into(), "--read-only".into()];
    for image in 0..workload.images {
        let path = bench.path(&format!("{image}.raw"));
        images::make(&path, image, &bench.reads, cut)?;
        serve.push(format!("{image}={}", path.display()));
    }
    let (origin, near) = (bench.path("origin"), bench.path("link"));
    let _origin = Server::start(&bench.headwater, &origin, &serve)?;
    let near = if arguments.link == 0 { &origin } else { &near };
    if arguments.link > 0 {
        link::open(near, &origin, f64::from(arguments.link) * 125_000.0)?;
    }
    let mut rows = Vec::new();
    for choice in workload.choices() {
        let deployments = workload.deployments(*choice);
        let accesses = workload::accesses(&deployments, &bench.reads, cut, workload.at_once.into());
        let seconds = bench.deploy(&deployments, near)?;
        say(&format!("{choice}: {seconds:.1} s without a cache"))?;
        let direct = Direct { choice: *choice, deployments, accesses, seconds, upstream: near };
        for percent in &workload.cache {
            for policy in workload.policies() {
                let row = bench.mirror(&direct, *percent, *policy)?;
                say(&line(&row))?;
                rows.push(row);
            }
        }
    }
    print(&rows);
    if let Some(path) = &arguments.svg {
        std::fs::write(path, chart::draw(&rows)).with_context(|| path.display().to_string())?;
    }
    Ok(if rows.iter().any(Row::fails) { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

impl Bench<'_> {
    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// One run through a mirror.
    fn mirror(&self, direct: &Direct<'_>, percent: u64, policy: Kind) -> anyhow::Result<Row> {
        let cut = self.arguments.workload.cut()?;
        let Direct { choice, deployments, accesses, seconds: without_cache, upstream } = direct;
        let limit = to_u64(workload::distinct(accesses, cut)) * cut.chunk * percent / 100;
        let (cache, socket) = (self.path("cache"), self.path("mirror"));
        let mut command = vec!["mirror".into()];
        command.extend((0..self.arguments.workload.images).map(|image| uri(image, upstream)));
        command.extend(["--cache".into(), cache.display().to_string(), "--cache-size".into(), limit.to_string()]);
        command.extend(["--policy".into(), policy.to_string(), "--chunk-size".into(), cut.chunk.to_string()]);
        let mirror = Server::start(&self.headwater, &socket, &command)?;
        // Before the first chunk, so it is what the rest takes.
        let fixed = mirror.status()?.cache.context("a mirror has a cache")?.allocated_bytes;
        let (sampler, cpu) = (Sampler::start(cache.clone())?, mirror.cpu_seconds()?);
        let seconds = self.deploy(deployments, &socket)?;
        let cpu = mirror.cpu_seconds()? - cpu;
        let status = mirror.status()?;
        let seen = sampler.finish()?;
        drop(mirror);
        std::fs::remove_dir_all(&cache)?;
        let _ = std::fs::remove_file(&socket);
        let sum = |part: fn(&headwater::control::status::MirrorStatus) -> u64| {
            status.images.iter().filter_map(|image| image.mirror.as_ref()).map(part).sum::<u64>()
        };
        let (hit, missed) = (sum(|mirror| mirror.hit_bytes), sum(|mirror| mirror.miss_bytes));
        let admission = Admission::default();
        let simulated = cache::ours(accesses, cut, Room { limit, fixed }, policy, admission);
        Ok(Row {
            choice: *choice,
            percent,
            policy,
            limit,
            seen,
            time: seconds / without_cache,
            seconds,
            hit: share(hit, hit + missed),
            simulated: share(simulated.hit, simulated.read),
            fetched: share(sum(|mirror| mirror.upstream_bytes), simulated.read),
            bypassed_chunks: status.cache.map_or(0, |cache| cache.bypassed),
            cpu: cpu / share(simulated.read, 1_000_000_000),
        })
    }

    /// All deployments, through the server at `socket`. Gives the seconds that they took.
    fn deploy(&self, deployments: &[u32], socket: &Path) -> anyhow::Result<f64> {
        let runtime = Builder::new_current_thread().enable_all().build_local(LocalOptions::default())?;
        let start = clock::now();
        runtime.block_on(
            stream::iter(deployments)
                .map(|image| self.deployment(*image, socket))
                .buffer_unordered(self.arguments.workload.at_once.into())
                .try_collect::<()>(),
        )?;
        Ok(clock::now().duration_since(start).as_secs_f64())
    }

    async fn deployment(&self, image: u32, socket: &Path) -> anyhow::Result<()> {
        let uri: Uri = uri(image, socket).parse()?;
        let settings = Settings { connections: 1, ..Settings::default() };
        let remote = Remote::open(vec![uri], Expectation::default(), settings).await?;
        let remote = &remote;
        stream::iter(&self.reads)
            .map(async |read| images::check(image, read.start(), &remote.read(*read).await?))
            .buffered(self.arguments.depth.into())
            .try_collect()
            .await
    }
}

fn uri(image: u32, socket: &Path) -> String {
    format!("nbd+unix:///{image}?socket={}", socket.display())
}

fn share(part: u64, whole: u64) -> f64 {
    part as f64 / whole.max(1) as f64
}

fn say(text: &str) -> anyhow::Result<()> {
    Ok(writeln!(std::io::stderr(), "{text}")?)
}

fn line(row: &Row) -> String {
    let Row { choice, percent, policy, limit, seen, time, seconds, hit, simulated, fetched, bypassed_chunks, cpu } =
        row;
    format!(
        "{choice} | {percent} % | {policy} | {time:.2} | {seconds:.1} s | {hit:.3} | {simulated:.3} | {fetched:.3} \
         | {bypassed_chunks} | {cpu:.2} | {} of {} in {} looks{}",
        ByteSize(seen.most),
        ByteSize(*limit),
        seen.looks,
        if row.fails() { " | FAILS" } else { "" },
    )
}

#[expect(clippy::print_stdout, reason = "this is what the program is for")]
fn print(rows: &[Row]) {
    println!(
        "| choice | cache | policy | time, of no cache | hit ratio | simulated | fetched | most on disk, of the bound |"
    );
    println!("| --- | --- | --- | --- | --- | --- | --- | --- |");
    for row in rows {
        let Row { choice, percent, policy, limit, seen, time, hit, simulated, fetched, .. } = row;
        let most = share(seen.most, *limit);
        println!(
            "| {choice} | {percent} % | {policy} | {time:.2} | {hit:.3} | {simulated:.3} | {fetched:.3} | {most:.3} |"
        );
    }
}
