//! The clients that make the load, and what they say.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use headwater::clock;
use load::children::{self, Cpus};
use load::process;
use load::report::Report;
use serde_json::Value;

use crate::servers::Programs;
use crate::table::Sample;

/// What is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unit {
    /// Requests per second; CPU time in microseconds per request.
    Requests,
    /// Megabytes per second; CPU time in seconds per gigabyte.
    Megabytes,
}

/// A load of `fio`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Fio {
    pub(crate) rw: &'static str,
    pub(crate) size: u32,
    pub(crate) depth: u32,
}

/// Runs a client to its end and gives what it printed.
fn output(mut command: Command) -> anyhow::Result<String> {
    let output = command.output().with_context(|| format!("starting {:?}", command.get_program()))?;
    let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    if !output.status.success() {
        bail!("{}: {said}{complained}", output.status);
    }
    Ok(said.into_owned())
}

/// The command of the load generator.
pub(crate) fn load_command(programs: &Programs, cpus: Cpus, uri: &str, words: &[&str]) -> Command {
    let mut command = children::command(cpus, &programs.own);
    command.args(["load", uri, "--json"]).args(words);
    command
}

/// Runs the load generator; a request that fails is an error.
pub(crate) fn load(programs: &Programs, cpus: Cpus, uri: &str, words: &[&str]) -> anyhow::Result<Report> {
    let text = output(load_command(programs, cpus, uri, words)).context("load")?;
    serde_json::from_str(&text).context("what load printed")
}

/// What a report of the load generator comes to.
pub(crate) fn sample(report: &Report, unit: Unit) -> Sample {
    let (rate, cpu_scale) = match unit {
        Unit::Requests => (report.requests_per_second, 1.0),
        Unit::Megabytes => (report.bytes_per_second / 1e6, 1e3 / f64::from(report.size)),
    };
    Sample {
        rate,
        cpu: report.server.as_ref().map(|server| server.cpu_per_request * cpu_scale),
        p99: Some(report.latency.p99),
        share: (report.connections > 1).then_some(report.fairness.smallest_share),
    }
}

/// Runs fio against a server whose process is `pid`.
pub(crate) fn fio(fio: Fio, cpus: Cpus, uri: &str, pid: u32, time: Duration, bytes: u64) -> anyhow::Result<Totals> {
    let mut command = children::command(cpus, "fio");
    command.args(["--name=x", "--ioengine=nbd", "--time_based", "--norandommap", "--output-format=json"]);
    // Its libnbd may not read files that a URI names, and looks for certificates at home.
    let (uri, certificates) = uri.split_once("?tls-certificates=").map_or((uri, None), |(uri, at)| (uri, Some(at)));
    if let Some(certificates) = certificates {
        command.env("HOME", home_with(Path::new(certificates))?);
    }
    command.args(["--percentile_list=99", &format!("--uri={uri}"), &format!("--rw={}", fio.rw)]);
    command.args([format!("--bs={}", fio.size), format!("--iodepth={}", fio.depth), format!("--size={bytes}")]);
    command.arg(format!("--runtime={}ms", time.as_millis()));
    let before = process::Sample::take(pid)?;
    let text = output(command).context("fio")?;
    let cpu = process::Sample::take(pid)?.since(&before).cpu_seconds;
    parse_fio(&text, cpu)
}

/// A home whose certificates are those in a directory.
fn home_with(certificates: &Path) -> anyhow::Result<PathBuf> {
    let home = certificates.join("home");
    let place = home.join(".pki/libnbd");
    if !place.exists() {
        std::fs::create_dir_all(home.join(".pki"))?;
        std::os::unix::fs::symlink(certificates, &place)?;
    }
    Ok(home)
}

/// What fio or nbdcopy came to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Totals {
    requests: f64,
    bytes: f64,
    seconds: f64,
    cpu_seconds: f64,
    p99: Option<f64>,
}

impl Totals {
    pub(crate) fn sample(&self, unit: Unit) -> Sample {
        let (rate, cpu) = match unit {
            Unit::Requests => (self.requests / self.seconds, self.cpu_seconds * 1e6 / self.requests),
            Unit::Megabytes => (self.bytes / 1e6 / self.seconds, self.cpu_seconds * 1e9 / self.bytes),
        };
        Sample { rate, cpu: Some(cpu), p99: self.p99, share: None }
    }
}

fn parse_fio(text: &str, cpu_seconds: f64) -> anyhow::Result<Totals> {
    // Messages may stand before it.
    let json = text.find('{').map(|start| &text[start..]).context("fio printed no JSON")?;
    let whole: Value = serde_json::from_str(json).context("what fio printed")?;
    let job = &whole["jobs"][0];
    let side = ["read", "write"].map(|side| &job[side]).into_iter().find(|side| side["total_ios"] != 0);
    let side = side.context("fio made no requests")?;
    ensure!(job["error"] == 0, "fio: error {}", job["error"]);
    let number = |value: &Value| value.as_f64().context("a number is missing in what fio printed");
    let nanoseconds = side["clat_ns"]["percentile"]["99.000000"].as_f64();
    Ok(Totals {
        requests: number(&side["total_ios"])?,
        bytes: number(&side["io_bytes"])?,
        seconds: number(&side["runtime"])? / 1000.0,
        cpu_seconds,
        p99: nanoseconds.map(|nanoseconds| nanoseconds / 1000.0),
    })
}

/// Copies an export of `bytes` to nowhere.
pub(crate) fn nbdcopy(cpus: Cpus, uri: &str, pid: u32, bytes: u64) -> anyhow::Result<Totals> {
    let mut command = children::command(cpus, "nbdcopy");
    command.args([uri, "null:"]);
    let (before, start) = (process::Sample::take(pid)?, clock::now());
    output(command).context("nbdcopy")?;
    let seconds = start.elapsed().as_secs_f64();
    let cpu_seconds = process::Sample::take(pid)?.since(&before).cpu_seconds;
    let bytes = u32::try_from(bytes >> 10).map_or(f64::INFINITY, f64::from) * 1024.0;
    Ok(Totals { requests: 1.0, bytes, seconds, cpu_seconds, p99: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    const FIO: &str = r#"fio: a note
        {"jobs": [{"error": 0, "read": {"total_ios": 0},
         "write": {"total_ios": 2000, "io_bytes": 8192000, "runtime": 500,
                   "clat_ns": {"percentile": {"99.000000": 12000}}}}]}"#;

    #[test]
    fn what_fio_says_is_understood() {
        let report = parse_fio(FIO, 0.004).unwrap();
        let requests = report.sample(Unit::Requests);
        assert_eq!((requests.rate, requests.cpu, requests.p99), (4000.0, Some(2.0), Some(12.0)));
        let megabytes = report.sample(Unit::Megabytes);
        assert_eq!((megabytes.rate, megabytes.cpu), (16.384, Some(0.48828125)));
    }

    #[test]
    fn a_fio_that_failed_is_an_error() {
        assert!(parse_fio(&FIO.replace("\"error\": 0", "\"error\": 5"), 0.0).is_err());
        assert!(parse_fio(&FIO.replace("2000", "0"), 0.0).is_err());
        assert!(parse_fio("fio: no", 0.0).is_err());
    }
}
