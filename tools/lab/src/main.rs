//! Measures mirrors over links that have a rate and a latency, on this machine alone.
//!
//! | module | owns |
//! | --- | --- |
//! | `attack` | hostile connections of every kind |
//! | `bed` | network namespaces, the links between them, and their end |
//! | `browser` | a browser without a screen |
//! | `delay` | a proxy that makes a link long |
//! | `forger` | who says wrong things in a group |
//! | `servers` | the origin, mirrors, and clients: how they are started, and what they say |
//! | `image` | images of random bytes |
//! | `machine` | real virtual machines: how long they boot, and what they read |
//! | `poisson` | what many machines ask for |
//! | `scenarios` | what is measured |
//! | `table` | what came of it |
//!
//! Each scenario takes turns between its variants, for several rounds, with a new mirror and an empty cache each time.

mod attack;
mod bed;
mod browser;
mod delay;
mod forger;
mod image;
mod machine;
mod poisson;
mod scenarios;
mod servers;
mod table;

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, ensure};
use clap::{Args, Parser, Subcommand};
use load::children::Stop;

use bed::{Bed, Link, Rate};
use scenarios::{background, balance, boot, cast, chain, cloud, forge, hostile, link, page, reads, redirect, vm};
use table::Table;

/// Measures mirrors over links that have a rate and a latency.
///
/// It must run as root: it makes network namespaces with a link each, and removes them, also after Ctrl-C. The programs
/// are those beside it: `cargo build --release --workspace`. Progress goes to standard error, tables to standard output.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    what: What,
    #[command(flatten)]
    common: Common,
}

/// What all scenarios have.
#[derive(Debug, Clone, Args)]
struct Common {
    /// Bits per second that a host can send, as in 200M; 0 is no limit.
    #[arg(long, global = true, default_value = "200M")]
    rate: Rate,
    /// How long a byte and the answer to it take in all beside that, as in 2ms.
    #[arg(long, global = true, default_value = "2ms", value_parser = load::arguments::duration)]
    latency: Duration,
    /// Runs of each variant, in turns.
    #[arg(long, global = true, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// The program to measure. [default: headwater beside this one]
    #[arg(long, global = true, value_name = "PATH")]
    headwater: Option<PathBuf>,
    /// More words for each mirror, as in `--mirror-option=--readahead=8M` (repeatable).
    #[arg(long, global = true, value_name = "WORD", allow_hyphen_values = true)]
    mirror_option: Vec<String>,
    /// Serve the image without a manifest.
    #[arg(long, global = true)]
    no_manifest: bool,
    /// Print JSON.
    #[arg(long, global = true)]
    json: bool,
    /// Where scratch files go; they are removed at the end. [default: the directory for temporary files]
    #[arg(long, global = true)]
    dir: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
enum What {
    /// The bed itself: the rate and the latency of the link, without a mirror.
    Link(link::Options),
    /// A recorded boot over a cold mirror, without and with a profile of an earlier run.
    Boot(boot::Options),
    /// Sequential reading through a cold mirror, one request at a time, against the link.
    Sequential(reads::Sequential),
    /// Random 4K reads through a cold mirror, with and without filling ahead.
    Random(reads::Random),
    /// What a fill in the background does to the latency of clients.
    Background(background::Options),
    /// A real virtual machine that boots over a local file and over cold mirrors.
    Vm(vm::Options),
    /// A real virtual machine that checks all that it reads and writes while it is redirected back and forth.
    Redirect(redirect::Options),
    /// One image to many mirrors: what the origin sends.
    Chain(chain::Options),
    /// One sending that fills many mirrors, by loss, against one unicast copy.
    Cast(cast::Options),
    /// Cloud time against the number of images: deployment by unicast, chain and multicast, then many machines that read.
    Cloud(cloud::Options),
    /// Clients moved until servers share their load; standbys brought in, and what becomes of the delay of reads.
    Balance(balance::Options),
    /// A mirror in a group where another host says millions of wrong things.
    Forge(forge::Options),
    /// Hostile connections of every kind while clients are served: what becomes of their delay, and of the server's memory.
    Hostile(hostile::Options),
    /// Pictures of the status page of a tree of three tiers under load.
    Page(page::Options),
    /// Records what a virtual machine reads while it boots, as a trace for replay.
    Record(machine::Record),
    /// The proxy that makes a link long; the bed runs it.
    #[command(hide = true)]
    Delay(delay::Options),
    /// Who says wrong things; `forge` runs it.
    #[command(hide = true)]
    Forger(forger::Options),
}

#[expect(clippy::print_stderr, reason = "this is what the program is for")]
fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[expect(clippy::print_stdout, reason = "this is what the program is for")]
fn run(arguments: &Arguments) -> anyhow::Result<()> {
    if let What::Delay(options) = &arguments.what {
        return delay::run(options);
    }
    if let What::Forger(options) = &arguments.what {
        return forger::run(options);
    }
    let lab = Lab::new(&arguments.common)?;
    let table = match &arguments.what {
        What::Link(options) => link::run(&lab, options)?,
        What::Boot(options) => boot::run(&lab, options)?,
        What::Sequential(options) => reads::sequential(&lab, options)?,
        What::Random(options) => reads::random(&lab, options)?,
        What::Background(options) => background::run(&lab, options)?,
        What::Vm(options) => vm::run(&lab, options)?,
        What::Redirect(options) => redirect::run(&lab, options)?,
        What::Chain(options) => chain::run(&lab, options)?,
        What::Cast(options) => cast::run(&lab, options)?,
        What::Cloud(options) => cloud::run(&lab, options)?,
        What::Balance(options) => balance::run(&lab, options)?,
        What::Forge(options) => forge::run(&lab, options)?,
        What::Hostile(options) => hostile::run(&lab, options)?,
        What::Page(options) => return page::run(&lab, options),
        What::Record(options) => return machine::record(&lab, options),
        What::Delay(_) | What::Forger(_) => Table::default(),
    };
    let text = if arguments.common.json { serde_json::to_string_pretty(&table)? } else { table.to_string() };
    println!("{text}");
    Ok(())
}

/// What each scenario needs.
#[derive(Debug)]
struct Lab {
    common: Common,
    headwater: PathBuf,
    scratch: tempfile::TempDir,
    stop: Stop,
}

impl Lab {
    fn new(common: &Common) -> anyhow::Result<Self> {
        ensure!(rustix::process::geteuid().is_root(), "network namespaces need root");
        let headwater = common.headwater.clone().map_or_else(|| beside("headwater"), Ok)?;
        ensure!(headwater.is_file(), "{} is missing: cargo build --release --workspace", headwater.display());
        let parent = common.dir.clone().unwrap_or_else(std::env::temp_dir);
        let scratch = tempfile::Builder::new().prefix("headwater-lab-").tempdir_in(parent)?;
        Ok(Self { common: common.clone(), headwater, scratch, stop: Stop::on_signals()? })
    }

    fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    /// A bed of the kind that the command line says, with so many hosts beside the origin.
    fn bed(&self, mirrors: u8) -> anyhow::Result<Bed> {
        Bed::new(Link { rate: self.common.rate, latency: self.common.latency }, mirrors)
    }

    /// An error once somebody wants us to stop.
    fn go_on(&self) -> anyhow::Result<()> {
        ensure!(!self.stop.is_wanted(), "stopped");
        Ok(())
    }

    /// Runs all variants in turns, each round beginning with another one.
    fn in_turns<V: Copy, T>(
        &self,
        variants: &[V],
        name: impl Fn(V) -> String,
        mut run: impl FnMut(V) -> anyhow::Result<T>,
    ) -> anyhow::Result<Vec<Vec<T>>> {
        let mut samples: Vec<Vec<T>> = variants.iter().map(|_| Vec::new()).collect();
        let mut order: Vec<usize> = (0..variants.len()).collect();
        for round in 1..=self.common.rounds {
            for &index in &order {
                self.go_on()?;
                tell(&format!("round {round}: {}", name(variants[index])));
                samples[index].push(run(variants[index]).with_context(|| name(variants[index]))?);
            }
            order.rotate_left(1.min(variants.len()));
        }
        Ok(samples)
    }
}

/// A program in the directory of this one.
fn beside(name: &str) -> anyhow::Result<PathBuf> {
    let path = std::env::current_exe()?.with_file_name(name);
    ensure!(path.is_file(), "{} is missing: cargo build --release --workspace", path.display());
    Ok(path)
}

#[expect(clippy::print_stderr, reason = "progress")]
fn tell(text: &str) {
    eprintln!("lab: {text}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Arguments::command().debug_assert();
        let words = ["lab", "boot", "--trace", "t.csv", "--rate", "1G", "--latency", "500us"];
        let Arguments { common, .. } = Arguments::parse_from(words);
        assert_eq!((common.rate, common.latency), (Rate(1_000_000_000), Duration::from_micros(500)));
    }
}
