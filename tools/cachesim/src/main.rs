//! Simulates the eviction of a mirror's cache with its own code, over deployments of some images; and holds a real mirror
//! against that.
//!
//! | file | holds |
//! | --- | --- |
//! | this one | the command line |
//! | `workload` | what is read |
//! | `cache` | the caches that are simulated |
//! | `simulate` | the table of these |
//! | `live` | real servers, with a limited link between them |

mod cache;
mod live;
mod simulate;
mod workload;

use std::path::PathBuf;

use anyhow::ensure;
use clap::{Args, Parser, ValueEnum};
use headwater::mirror::policy::Kind;
use headwater::ranges::ByteRange;
use headwater::units::{ByteSize, GIB, KIB, MIB};

use workload::{Choice, Cut};

/// Says what hit ratio each policy of eviction gets.
///
/// Machines are deployed from some images; each reads a whole image in order, or what a recorded boot read. A cache is
/// as large as a percentage of all bytes of the chunks that are read at least once.
#[derive(Debug, Parser)]
#[command(version)]
enum Command {
    /// Simulates caches.
    ///
    /// Prints CSV: hits in bytes over bytes read, and what was fetched and stored over the same; a chunk is fetched as a
    /// whole. `none` is a cache without a bound, `belady` one that knows the future. `always` stores whatever is
    /// fetched, `measured` stops doing so while that does not pay.
    Simulate(Workload),
    /// Measures mirrors, and holds them against the simulation.
    ///
    /// An origin is reached over a link of limited rate. The deployments read from it directly, then through a mirror
    /// of each size and policy. Prints a table in Markdown; exits with 1 if a bound was not kept, a mirror took longer
    /// than 1.05 times as long as no cache, or its hit ratio is more than 5 % from the simulated one.
    Live(live::Arguments),
}

/// What is read, and through which caches.
#[derive(Debug, Args)]
struct Workload {
    /// How images are chosen; all ways unless told.
    #[arg(long, value_enum, value_delimiter = ',')]
    choice: Vec<Choice>,
    /// Policies; all unless told.
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    policy: Vec<Kind>,
    /// Sizes of the cache, in percent of what is read at least once.
    #[arg(long, value_name = "PERCENT", value_delimiter = ',', default_values_t = [25, 50, 100])]
    cache: Vec<u64>,
    /// Images.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(3..=1000))]
    images: u32,
    /// Deployments.
    #[arg(long, default_value_t = 257, value_parser = clap::value_parser!(u32).range(1..=1_000_000))]
    deployments: u32,
    /// Deployments that read at the same time, in turns.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..))]
    at_once: u16,
    /// The size of each image, all of which is read.
    #[arg(long, default_value_t = ByteSize(64 * MIB), conflicts_with = "boot")]
    image_size: ByteSize,
    /// Instead, each deployment reads what this recorded boot did: CSV with the columns seconds,op,offset,bytes.
    #[arg(long, value_name = "FILE")]
    boot: Option<PathBuf>,
    /// Bytes of a chunk: a power of two, at least 16K.
    #[arg(long, default_value_t = ByteSize(64 * KIB))]
    chunk_size: ByteSize,
    /// Other choices of images for other seeds.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

impl Workload {
    fn cut(&self) -> anyhow::Result<Cut> {
        let chunk = self.chunk_size.0;
        let fits = chunk.is_power_of_two() && (16 * KIB..=4 * MIB).contains(&chunk);
        ensure!(fits, "a chunk is 16K to 4M, a power of two");
        Ok(Cut { chunk })
    }

    /// What each deployment reads.
    fn reads(&self) -> anyhow::Result<Vec<ByteRange>> {
        ensure!((1..=64 * GIB).contains(&self.image_size.0), "an image has 1 byte to 64G");
        match &self.boot {
            Some(path) => workload::recorded_boot(path),
            None => Ok(workload::whole_image(self.image_size.0)),
        }
    }

    fn choices(&self) -> &[Choice] {
        or_all(&self.choice, Choice::value_variants())
    }

    fn policies(&self) -> &[Kind] {
        or_all(&self.policy, &Kind::ALL)
    }

    fn deployments(&self, choice: Choice) -> Vec<u32> {
        workload::choose(choice, self.images, self.deployments, self.seed)
    }
}

fn or_all<'a, T>(chosen: &'a [T], all: &'a [T]) -> &'a [T] {
    if chosen.is_empty() { all } else { chosen }
}

fn main() -> anyhow::Result<std::process::ExitCode> {
    match Command::parse() {
        Command::Simulate(workload) => simulate::run(&workload).map(|()| std::process::ExitCode::SUCCESS),
        Command::Live(arguments) => live::run(&arguments),
    }
}
