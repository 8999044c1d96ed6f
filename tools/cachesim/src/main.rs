//! Simulates the eviction of a mirror's cache with its own code, over deployments of some images.

mod cache;
mod workload;

use std::path::PathBuf;

use anyhow::ensure;
use clap::{Parser, ValueEnum};
use headwater::mirror::policy::{Admission, Kind};
use headwater::units::{ByteSize, GIB, KIB, MIB, to_u64};

use cache::Outcome;
use workload::{Choice, Cut};

/// Says what hit ratio each policy of eviction would get.
///
/// Machines are deployed from some images; each reads a whole image in order, or what a recorded boot read. A cache is
/// as large as a percentage of all bytes of the chunks that are read at least once. Prints CSV: hits and misses in
/// bytes over bytes read, and what was fetched and stored over the same; a chunk is fetched as a whole.
///
/// `none` is a cache without a bound, `belady` one that knows the future. `always` stores whatever is fetched,
/// `measured` stops doing so while that does not pay.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// How images are chosen; all ways unless told.
    #[arg(long, value_enum)]
    choice: Vec<Choice>,
    /// Policies; all unless told.
    #[arg(long, value_name = "NAME")]
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
    #[arg(long, default_value_t = ByteSize(600 * MIB), conflicts_with = "boot")]
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

#[expect(clippy::print_stdout, reason = "this is what the program is for")]
fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let chunk = arguments.chunk_size.0;
    ensure!(chunk.is_power_of_two() && (16 * KIB..=4 * MIB).contains(&chunk), "a chunk is 16K to 4M, a power of two");
    ensure!((1..=64 * GIB).contains(&arguments.image_size.0), "an image has 1 byte to 64G");
    let cut = Cut { chunk };
    let reads = match &arguments.boot {
        Some(path) => workload::recorded_boot(path)?,
        None => workload::whole_image(arguments.image_size.0),
    };
    let choices = or_all(&arguments.choice, Choice::value_variants());
    let kinds = or_all(&arguments.policy, &Kind::ALL);
    println!("choice,cache_percent,policy,admission,hit,fetched,stored,evicted_segments,bypassed_segments");
    for choice in choices {
        let deployments = workload::choose(*choice, arguments.images, arguments.deployments, arguments.seed);
        let accesses = workload::accesses(&deployments, &reads, cut, arguments.at_once.into());
        let all = to_u64(workload::distinct(&accesses, cut)) * chunk;
        let name = choice.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default();
        println!("{name},,none,,{}", columns(cache::unbounded(&accesses, cut)));
        for percent in &arguments.cache {
            let bound = all * percent / 100;
            println!("{name},{percent},belady,,{}", columns(cache::clairvoyant(&accesses, cut, bound)));
            for kind in kinds {
                for (admission, label) in [(Admission::Always, "always"), (Admission::Measured, "measured")] {
                    let outcome = cache::ours(&accesses, cut, bound, *kind, admission);
                    println!("{name},{percent},{kind},{label},{}", columns(outcome));
                }
            }
        }
    }
    Ok(())
}

fn or_all<'a, T>(chosen: &'a [T], all: &'a [T]) -> &'a [T] {
    if chosen.is_empty() { all } else { chosen }
}

fn columns(outcome: Outcome) -> String {
    let Outcome { read, hit, stored, evicted, bypassed, fetched } = outcome;
    format!("{},{},{},{evicted},{bypassed}", share(hit, read), share(fetched, read), share(stored, read))
}

/// With four places.
fn share(part: u64, whole: u64) -> String {
    let places = u128::from(part) * 10_000 / u128::from(whole.max(1));
    format!("{}.{:04}", places / 10_000, places % 10_000)
}
