//! The command line: what was typed, and the parsers of its words.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, ValueEnum};
use headwater::nbd::Uri;
use headwater::nbd::handshake::ReplyMode;
use headwater::ranges::ByteRange;
use headwater::units::ByteSize;

/// A load generator for NBD servers that costs less than the server it measures.
///
/// Each connection has a thread that keeps DEPTH requests in flight: one system call receives all replies that have
/// arrived, and one sends all requests that follow.
#[derive(Debug, Parser)]
#[command(name = "load", version, after_help = EXAMPLES)]
pub struct Arguments {
    /// The server, as in nbd://host/export or nbd+unix:///export?socket=PATH.
    pub uri: Uri,

    /// What to ask for.
    #[arg(long, value_enum, default_value_t = Mix::Read)]
    pub rw: Mix,
    /// Per cent of the requests of --rw mixed that are reads.
    #[arg(long, value_name = "PERCENT", default_value_t = 70, value_parser = clap::value_parser!(u8).range(0..=100))]
    pub mix: u8,
    /// Which blocks to ask for; sequential with several connections: each its own share of the region.
    #[arg(long, value_enum, default_value_t = Pattern::Random)]
    pub pattern: Pattern,
    /// Bytes of each request.
    #[arg(long, value_name = "BYTES", default_value = "4K", value_parser = block_size)]
    pub size: u32,
    /// Requests in flight on each connection.
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub depth: u32,
    /// Connections, each with a thread of its own.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1024))]
    pub connections: u32,
    /// Stay within this part of the export, as in 1G+512M. [default: all of it]
    #[arg(long, value_name = "START+LENGTH", value_parser = region)]
    pub region: Option<ByteRange>,

    /// How long to measure, as in 5s, 200ms or 2m.
    #[arg(long, default_value = "5s", value_parser = duration, conflicts_with = "amount")]
    pub time: Duration,
    /// How long to run before that.
    #[arg(long, default_value = "0s", value_parser = duration, conflicts_with = "amount")]
    pub ramp: Duration,
    /// Stop after this many requests.
    #[arg(long, value_name = "N", group = "amount", value_parser = clap::value_parser!(u64).range(1..))]
    pub requests: Option<u64>,
    /// Stop after this many bytes.
    #[arg(long, value_name = "BYTES", group = "amount")]
    pub total: Option<ByteSize>,
    /// Ask for each block of the region exactly once.
    #[arg(long, group = "amount")]
    pub once: bool,
    /// Start this many requests per second on all connections together, whether the server keeps up or not.
    ///
    /// A request's latency counts from the moment when it was due, so that what had to queue behind a slow one
    /// shows. No request is left out.
    #[arg(long, value_name = "N", value_parser = rate)]
    pub rate: Option<f64>,

    /// Ask for writes to be on stable storage before they are answered.
    #[arg(long)]
    pub fua: bool,
    /// Send a flush after every N writes of a connection.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub flush_every: Option<u64>,
    /// Where random offsets begin; also a part of the pattern that --verify knows.
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// The form of replies to negotiate; a server that lacks it is an error. [default: structured, or else simple]
    #[arg(long, value_enum)]
    pub replies: Option<Replies>,

    /// Check data: each piece that is written says where it belongs, by which seed, and how often it was rewritten.
    ///
    /// Writes are read back at the end; reads are held against what was written before with the same --seed and
    /// --size, or against --image. Wrong bytes are reported with their offset.
    #[arg(long)]
    pub verify: bool,
    /// Before measuring, write the pattern of --verify to all of the region.
    #[arg(long)]
    pub fill: bool,
    /// With --verify: the server must have the bytes of this file.
    #[arg(long, value_name = "FILE", requires = "verify", conflicts_with = "fill")]
    pub image: Option<PathBuf>,

    /// The server's process: tell its CPU time and context switches per request, with those of its children.
    #[arg(long)]
    pub pid: Option<u32>,
    /// Also count the server's system calls with perf, which slows it down.
    #[arg(long, requires = "pid")]
    pub syscalls: bool,
    /// Run on these CPUs only, as in 0,2-3.
    #[arg(long, value_name = "LIST", value_parser = cpus)]
    pub cpus: Option<CpuList>,
    /// Print JSON.
    #[arg(long)]
    pub json: bool,
}

const EXAMPLES: &str = "\
Examples:
  load nbd://localhost/debian12
  load 'nbd+unix:///?socket=s.sock' --rw write --fua --depth 8 --time 10s
  load nbd://localhost/ --once --size 64K --verify --image debian12.raw
  load nbd://localhost/ --rate 20000 --depth 256 --connections 4

The exit status is 1 if a request failed, a connection was lost or bytes were wrong.";

/// What to ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Mix {
    /// Reads.
    Read,
    /// Writes.
    Write,
    /// Both, as --mix says.
    Mixed,
}

/// Which blocks to ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Pattern {
    /// Any; with --once, in an order that --seed decides.
    Random,
    /// One after the other.
    Sequential,
}

/// How replies look.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Replies {
    /// One header and the data, as older clients have them.
    Simple,
    /// Chunks.
    Structured,
    /// Chunks with 64-bit lengths.
    Extended,
}

impl From<Replies> for ReplyMode {
    fn from(replies: Replies) -> Self {
        match replies {
            Replies::Simple => Self::Simple,
            Replies::Structured => Self::Structured,
            Replies::Extended => Self::Extended,
        }
    }
}

/// CPUs by number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CpuList(pub Vec<usize>);

fn block_size(text: &str) -> Result<u32, String> {
    let ByteSize(bytes) = text.parse().map_err(|error: headwater::units::ParseSizeError| error.to_string())?;
    u32::try_from(bytes)
        .ok()
        .filter(|size| (1..=headwater::nbd::wire::MAX_PAYLOAD).contains(size))
        .ok_or_else(|| "a request has 1 byte to 32M".to_owned())
}

fn region(text: &str) -> Result<ByteRange, String> {
    let (start, length) = text.split_once('+').ok_or("write START+LENGTH, as in 1G+512M")?;
    let size = |text: &str| text.parse::<ByteSize>().map_err(|error| format!("{text:?}: {error}"));
    let (ByteSize(start), ByteSize(length)) = (size(start)?, size(length)?);
    ByteRange::new(start, length).ok_or_else(|| "it ends beyond 16 exbibytes".to_owned())
}

/// A time with its unit; seconds without one.
pub fn duration(text: &str) -> Result<Duration, String> {
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let scale = match unit.trim() {
        "" | "s" => 1.0,
        "ms" => 1e-3,
        "us" => 1e-6,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return Err(format!("unknown unit {unit:?}: use us, ms, s, m or h")),
    };
    let number: f64 = number.parse().map_err(|_| "write a number and a unit, as in 500ms".to_owned())?;
    Duration::try_from_secs_f64(number * scale).map_err(|error| error.to_string())
}

fn rate(text: &str) -> Result<f64, String> {
    let rate: f64 = text.parse().map_err(|_| "not a number".to_owned())?;
    // Slower than one an hour is a slip, and faster than the clock can tell apart is no schedule.
    if (1.0 / 3600.0..=1e9).contains(&rate) { Ok(rate) } else { Err("from 1 an hour to 1000000000".to_owned()) }
}

fn cpus(text: &str) -> Result<CpuList, String> {
    let number = |text: &str| text.trim().parse::<usize>().map_err(|_| format!("{text:?} is not the number of a CPU"));
    let mut list = Vec::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last) = (number(first)?, number(last)?);
        if first > last || last >= rustix::thread::CpuSet::MAX_CPU {
            return Err(format!("{part:?} is not a range of CPUs"));
        }
        list.extend(first..=last);
    }
    Ok(CpuList(list))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn regions_are_a_start_and_a_length() {
        assert_eq!(region("1G+512M"), Ok(ByteRange::between(1 << 30, (1 << 30) + (512 << 20))));
        assert_eq!(region("0+4096"), Ok(ByteRange::between(0, 4096)));
        for text in ["1G", "1G-2G", "+", "x+1", "15E+15E"] {
            assert!(region(text).is_err(), "{text}");
        }
    }

    #[test]
    fn times_have_units() {
        for (text, milliseconds) in [("5s", 5000), ("0.5s", 500), ("200ms", 200), ("3", 3000), ("2m", 120_000)] {
            assert_eq!(duration(text), Ok(Duration::from_millis(milliseconds)), "{text}");
        }
        for text in ["", "s", "-1s", "5 days", "1..2s"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn cpus_are_lists_of_numbers_and_ranges() {
        assert_eq!(cpus("0,2-4"), Ok(CpuList(vec![0, 2, 3, 4])));
        for text in ["", "a", "3-1", "0-", "99999999"] {
            assert!(cpus(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_and_rates_are_checked() {
        assert_eq!(block_size("4K"), Ok(4096));
        for text in ["0", "33M", "8G", "x"] {
            assert!(block_size(text).is_err(), "{text}");
        }
        assert_eq!(rate("2.5"), Ok(2.5));
        for text in ["0", "-3", "NaN", "inf", "1e10"] {
            assert!(rate(text).is_err(), "{text}");
        }
    }

    #[test]
    fn options_that_contradict_each_other_are_refused() {
        for words in [
            &["--time", "1s", "--once"][..],
            &["--requests", "1", "--total", "1M"],
            &["--image", "x"],
            &["--verify", "--image", "x", "--fill"],
            &["--syscalls"],
            &["--mix", "101"],
        ] {
            let line = ["load", "nbd://h/"].iter().chain(words);
            assert!(Arguments::try_parse_from(line).is_err(), "{words:?}");
        }
        let line = ["load", "nbd://h/", "--once", "--verify", "--image", "x"];
        assert!(Arguments::try_parse_from(line).is_ok());
    }
}
