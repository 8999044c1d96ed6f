//! What `headwater balance` is told.

use std::time::Duration;

use clap::{Args, ValueEnum};

use crate::cli::args::Servers;
use crate::cli::prefetch::args::Target;
use crate::cli::prefetch::when::length_of_time;
use crate::control::AdminAddress;
use crate::control::balance::fleet::Measure;

const EXAMPLES: &str = "\
Examples:
  headwater balance --dry-run
  headwater balance --servers /run/hw/a.sock,/run/hw/b.sock --tolerance 10%
  headwater balance --servers 127.0.0.1:9001,127.0.0.1:9002 \\
      --uri 127.0.0.1:9001=nbd://first --uri 127.0.0.1:9002=nbd://second --watch
  headwater balance --servers /run/hw/a.sock --standby /run/hw/s1.sock,/run/hw/s2.sock \\
      --target-latency 20ms --export debian12 --watch

Exit status: 0 when all servers are within tolerance at the end, 3 when they are not (with --watch: when Ctrl-C ended
it), 1 when a server or a move has failed, 2 when the command line makes no sense.";

/// Move clients between servers of the same images until the servers share their load.
///
/// Asks each server what it does, and has as few clients as possible moved (headwater redirect). With --watch it goes on
/// until Ctrl-C. With --standby it is a manager of standbys: while requests take longer than --target-latency, the next
/// standby is brought in and takes a share of the clients; when the load falls for long it is stood down again.
#[derive(Debug, Clone, Args)]
#[command(after_help = EXAMPLES)]
pub(in crate::cli) struct Balance {
    #[command(flatten)]
    pub(super) servers: Servers,
    /// Where clients and other servers reach a server, if not where it says itself: a server knows the addresses that it
    /// listens on as they are seen from its own machine (repeatable).
    #[arg(long, value_name = "ADDR=URI")]
    pub(super) uri: Vec<Target>,
    /// Move the clients of this export alone. [default: of all]
    #[arg(long, value_name = "NAME")]
    pub(super) export: Option<String>,
    /// Go on until Ctrl-C. A server must be out of tolerance in three looks in a row before anything is moved.
    #[arg(long)]
    pub(super) watch: bool,
    /// Time between two looks, which rates are taken of, as in 5s; 60 seconds at most.
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = interval)]
    pub(super) interval: Duration,
    /// Say what would be moved, and move nobody.
    #[arg(long)]
    pub(super) dry_run: bool,
    /// How far from its fair share a server may be, as a part of the mean: 20% or 0.2.
    #[arg(long, value_name = "PART", default_value = "20%", value_parser = tolerance)]
    pub(super) tolerance: f64,
    /// What is shared evenly.
    #[arg(long, value_enum, default_value = "mix")]
    pub(super) by: By,
    /// Mirrors that take part when they are needed, in this order: their --admin addresses.
    #[arg(long, value_name = "ADDR,...", value_delimiter = ',', requires_all = ["target_latency", "watch"])]
    pub(super) standby: Vec<AdminAddress>,
    /// How long 99 % of the requests may take at most, as in 20ms.
    #[arg(long, value_name = "TIME", requires = "standby", value_parser = milliseconds)]
    pub(super) target_latency: Option<f64>,
    /// Print JSON: an object on a line for each look.
    #[arg(long)]
    pub(super) json: bool,
}

/// What is shared evenly.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum By {
    /// Bytes per second, and 16 KiB for each request.
    Mix,
    /// Bytes per second.
    Bytes,
    /// Requests per second.
    Requests,
    /// Clients, busy or not.
    Clients,
    /// How long requests take: slow servers are given fewer of them.
    P99,
}

impl By {
    pub(super) const fn measure(self) -> Measure {
        match self {
            Self::Mix => Measure::Mix,
            Self::Bytes => Measure::Bytes,
            Self::Requests => Measure::Requests,
            Self::Clients => Measure::Clients,
            Self::P99 => Measure::P99,
        }
    }
}

impl Balance {
    /// The same in whole seconds, as servers are asked for rates.
    pub(super) fn window(&self) -> u32 {
        u32::try_from(self.interval.as_secs()).unwrap_or(60).clamp(1, 60)
    }
}

fn interval(text: &str) -> Result<Duration, String> {
    let interval = length_of_time(text)?;
    if (1..=60).contains(&interval.as_secs()) { Ok(interval) } else { Err("1s to 60s".to_owned()) }
}

fn tolerance(text: &str) -> Result<f64, String> {
    let (number, scale) = text.strip_suffix('%').map_or((text, 1.0), |number| (number, 100.0));
    let part = number.parse::<f64>().map_err(|_| "write a part as in 20% or 0.2".to_owned())? / scale;
    if (0.01..=1.0).contains(&part) { Ok(part) } else { Err("1% to 100%".to_owned()) }
}

/// As in `20ms`, `1.5s` or `500us`; more than nothing.
fn milliseconds(text: &str) -> Result<f64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let scale = match &text[digits.len()..] {
        "us" => 1e-3,
        "ms" => 1.0,
        "s" => 1e3,
        _ => return Err("write a time with its unit, as in 20ms, 1.5s or 500us".to_owned()),
    };
    let number: f64 = digits.parse().map_err(|_| format!("{digits:?} is no number"))?;
    let milliseconds = number * scale;
    if milliseconds > 0.0 && milliseconds <= 60_000.0 {
        Ok(milliseconds)
    } else {
        Err("more than nothing, and a minute at most".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latencies_have_a_unit() {
        for (text, parsed) in [("20ms", 20.0), ("1.5s", 1500.0), ("500us", 0.5)] {
            assert_eq!(milliseconds(text), Ok(parsed), "{text}");
        }
        for text in ["", "20", "ms", "-1ms", "0ms", "nans", "2m", "61s", "infs"] {
            assert!(milliseconds(text).is_err(), "{text}");
        }
    }

    #[test]
    fn tolerances_are_parts() {
        assert_eq!((tolerance("20%"), tolerance("0.2")), (Ok(0.2), Ok(0.2)));
        for text in ["", "%", "0", "0.5%", "101%", "nan", "-20%"] {
            assert!(tolerance(text).is_err(), "{text}");
        }
        assert!(interval("5s").is_ok() && interval("61s").is_err() && interval("0s").is_err());
    }
}
