//! Measures Headwater and other NBD servers in turns, and prints ratios.
//!
//! | module | owns |
//! | --- | --- |
//! | `cases` | what is measured, and how a sample is taken |
//! | `servers` | how each server is started |
//! | `clients` | load, fio and nbdcopy, and what they say |
//! | `limit` | the bare server that marks what is possible |
//! | `table` | medians and ratios, and how they are printed |
//!
//! The load generator and the bare server are this program too, under the names `bench load` and `bench limit`, so
//! that one build has all that is needed.

mod cases;
mod clients;
mod limit;
mod servers;
mod table;

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use clap::Parser;
use headwater::clock;
use headwater::units::{ByteSize, MIB};
use load::children::Stop;

use cases::{Bench, Case, Role, Subject};
use servers::{Programs, Server, TOOLS};
use table::{Outcome, Row};

/// Measures Headwater and other NBD servers in turns.
///
/// Servers take turns within each round, and each ratio is the median of the ratios of all rounds, with their range.
/// A figure whose rounds are more than 25 % apart has a ~. Progress goes to standard error, the table to standard
/// output.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// A few cases and short runs: at most three minutes.
    #[arg(long)]
    quick: bool,
    /// Only cases whose number or name has one of these words, as in `2,cold,tcp`.
    #[arg(long, value_name = "WORDS", value_delimiter = ',')]
    cases: Vec<String>,
    /// Samples of each server in each case. [default: 5; 3 with --quick]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: Option<u32>,
    /// The program to measure. [default: headwater beside this one, as a release build leaves it]
    #[arg(long, value_name = "PATH")]
    headwater: Option<PathBuf>,
    /// Another build of it, to hold it against beside the peers that are named; none unless some are.
    #[arg(long, value_name = "PATH")]
    before: Option<PathBuf>,
    /// Bytes of the image; at least 256M.
    #[arg(long, default_value = "1G")]
    size: ByteSize,
    /// Whom to hold it against. [default: all]
    #[arg(long, value_name = "LIST", value_enum, value_delimiter = ',')]
    peers: Vec<Server>,
    /// Also write all samples to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Where scratch files go; they are removed at the end. [default: the directory for temporary files]
    #[arg(long)]
    dir: Option<PathBuf>,
}

/// The exit status after Ctrl-C.
const STOPPED: u8 = 130;
/// A quick run starts no case after this.
const QUICK: Duration = Duration::from_secs(150);

#[expect(clippy::print_stderr, reason = "this is what the program is for")]
fn main() -> ExitCode {
    let words: Vec<OsString> = std::env::args_os().collect();
    let result = match words.get(1).and_then(|word| word.to_str()) {
        Some("load") => return load::main(words.into_iter().skip(1)),
        Some("limit") => limit::main(words.into_iter().skip(1)).map(|()| ExitCode::SUCCESS),
        _ => run(&Arguments::parse()),
    };
    result.unwrap_or_else(|error| {
        eprintln!("bench: {error:#}");
        ExitCode::FAILURE
    })
}

#[expect(clippy::print_stdout, reason = "this is what the program is for")]
fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let started = clock::now();
    let chosen = choose(arguments)?;
    let mut peers = arguments.peers.clone();
    match &arguments.before {
        Some(_) => peers.insert(0, Server::Before),
        None if peers.is_empty() => peers = Server::PEERS.to_vec(),
        None => {}
    }
    ensure_installed(&peers)?;
    let parent = arguments.dir.clone().unwrap_or_else(std::env::temp_dir);
    let scratch = tempfile::Builder::new().prefix("headwater-bench-").tempdir_in(parent)?;
    let stop = Stop::on_signals()?;
    let bench = prepare(arguments, peers, scratch.path())?;
    let rounds = arguments.rounds.unwrap_or(if arguments.quick { 3 } else { 5 });
    let (mut outcomes, mut failures) = (Vec::new(), Vec::new());
    for case in &chosen {
        if arguments.quick && started.elapsed() > QUICK {
            failures.push(format!("{} {}: left out for lack of time", case.group, case.name));
            continue;
        }
        outcomes.push(measure(&bench, case, rounds, &stop, &mut failures));
        if stop.is_wanted() {
            return Ok(ExitCode::from(STOPPED));
        }
        tell(started, case);
    }
    print!("{}", table::markdown(&outcomes));
    for failure in &failures {
        println!("\n{failure}");
    }
    if let Some(path) = &arguments.json {
        std::fs::write(path, serde_json::to_string_pretty(&outcomes)?).context("writing the samples")?;
    }
    Ok(if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn choose(arguments: &Arguments) -> anyhow::Result<Vec<Case>> {
    let named = |case: &Case| {
        let fits = |word: &String| match word.parse::<u8>() {
            Ok(number) => case.group == number,
            Err(_) => case.name.contains(word.as_str()),
        };
        arguments.cases.is_empty() || arguments.cases.iter().any(fits)
    };
    let chosen: Vec<_> =
        cases::all().into_iter().filter(|case| (case.quick || !arguments.quick) && named(case)).collect();
    ensure!(!chosen.is_empty(), "there is no such case");
    Ok(chosen)
}

/// What is missing is an error: a table without a peer would look like one that has it.
fn ensure_installed(peers: &[Server]) -> anyhow::Result<()> {
    let mut missing = Vec::new();
    // nbdkit is also every mirror's upstream.
    let programs = peers.iter().filter_map(|peer| peer.program()).chain([("nbdkit", "nbdkit")]).chain(TOOLS);
    for (program, package) in programs {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let installed = std::env::split_paths(&path).any(|directory| directory.join(program).is_file());
        if !installed && !missing.contains(&package) {
            missing.push(package);
        }
    }
    if !missing.is_empty() {
        bail!("these packages are missing: {}; install them, or choose others with --peers", missing.join(" "));
    }
    Ok(())
}

fn prepare(arguments: &Arguments, peers: Vec<Server>, scratch: &Path) -> anyhow::Result<Bench> {
    let ByteSize(size) = arguments.size;
    ensure!(size >= 256 * MIB, "the image must have 256M at least");
    let own = std::env::current_exe()?;
    let beside = || own.with_file_name("headwater");
    let headwater = arguments.headwater.clone().unwrap_or_else(beside);
    ensure!(headwater.is_file(), "{} is missing: cargo build --release", headwater.display());
    let (image, write_image) = (scratch.join("image"), scratch.join("write-image"));
    make_image(&image, size, 1, 1 << 20)?;
    // In small pieces: a file that is written in large ones lies in large pieces of memory, and then some file
    // systems take longer for a small write than a server does.
    make_image(&write_image, size / 2, 2, 4096)?;
    read_once(&image)?;
    let time = Duration::from_millis(if arguments.quick { 500 } else { 2000 });
    let before = arguments.before.clone().unwrap_or_else(|| headwater.clone());
    ensure!(before.is_file(), "{} is missing", before.display());
    let programs = Programs { headwater, before, own };
    let (scratch, started) = (scratch.to_owned(), std::cell::Cell::new(0));
    Ok(Bench { programs, peers, scratch, image, write_image, time, started })
}

/// Writes bytes that have no pattern and no holes.
fn make_image(path: &Path, size: u64, seed: u64, piece: usize) -> anyhow::Result<()> {
    let mut file = BufWriter::with_capacity(piece, File::create(path)?);
    let mut state = seed;
    for _ in 0..size / 8 {
        // A linear congruential generator; its upper bits are the good ones.
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        file.write_all(&(state ^ (state >> 32)).to_le_bytes())?;
    }
    file.into_inner().context("writing the image")?.sync_all()?;
    Ok(())
}

/// Brings a file into the page cache.
fn read_once(path: &Path) -> anyhow::Result<()> {
    let (mut file, mut buffer) = (File::open(path)?, vec![0; 1 << 20]);
    while file.read(&mut buffer)? > 0 {}
    Ok(())
}

#[expect(clippy::print_stderr, reason = "this is what the program is for")]
fn tell(started: Instant, case: &Case) {
    eprintln!("{:>4} s  {} {}", started.elapsed().as_secs(), case.group, case.name);
}

/// Takes samples in turns: with each round another one begins.
fn measure(bench: &Bench, case: &Case, rounds: u32, stop: &Stop, failures: &mut Vec<String>) -> Outcome {
    let subjects = case.subjects(&bench.peers);
    let row = |(subject, role): &(Subject, Role)| Row { subject: subject.name(), role: *role, samples: Vec::new() };
    let mut rows: Vec<Row> = subjects.iter().map(row).collect();
    let mut failed = vec![false; rows.len()];
    let mut order: Vec<usize> = (0..rows.len()).collect();
    for _ in 0..rounds {
        for &index in &order {
            // Ratios are of samples of the same round, so who has missed one is out.
            if failed[index] || stop.is_wanted() {
                continue;
            }
            match case.measure(bench, subjects[index].0) {
                Ok(sample) => rows[index].samples.push(sample),
                Err(error) => {
                    failures.push(format!("{} {}: {}: {error:#}", case.group, case.name, rows[index].subject));
                    rows[index].samples.clear();
                    failed[index] = true;
                }
            }
        }
        order.rotate_left(1);
    }
    Outcome { group: case.group, name: case.name.to_owned(), unit: case.unit, rows }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn chosen(words: &[&str]) -> anyhow::Result<Vec<Case>> {
        let words = ["bench"].iter().chain(words);
        choose(&Arguments::try_parse_from(words)?)
    }

    #[test]
    fn the_command_line_is_sound() {
        Arguments::command().debug_assert();
        let arguments = Arguments::parse_from(["bench", "--peers", "nbdkit-t1,qemu-nbd"]);
        assert_eq!(arguments.peers, [Server::NbdkitOneThread, Server::QemuNbd]);
    }

    #[test]
    fn cases_are_chosen_by_number_and_by_word() {
        assert!(chosen(&["--cases", "7"]).unwrap().iter().all(|case| case.group == 7));
        let few = chosen(&["--cases", "2,nbdcopy"]).unwrap();
        assert!(few.iter().all(|case| case.group == 2 || case.name.contains("nbdcopy")));
        assert!(few.len() >= 4 && few.len() < chosen(&[]).unwrap().len());
        assert!(chosen(&["--quick"]).unwrap().len() < 10);
        assert!(chosen(&["--cases", "no such word"]).is_err());
    }

    #[test]
    fn images_have_no_holes_and_no_repetitions() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("image");
        make_image(&path, 64 << 10, 1, 4096).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let mut blocks: Vec<_> = bytes.chunks(16).collect();
        assert_eq!(blocks.len(), 4096);
        blocks.sort_unstable();
        blocks.dedup();
        assert_eq!(blocks.len(), 4096);
    }
}
