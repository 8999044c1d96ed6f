//! The clients that make the load, and what they say.

use std::path::Path;
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
    command.args(["--percentile_list=99", &format!("--uri={uri}"), &format!("--rw={}", fio.rw)]);
    command.args([format!("--bs={}", fio.size), format!("--iodepth={}", fio.depth), format!("--size={bytes}")]);
    command.arg(format!("--runtime={}ms", time.as_millis()));
    let before = process::Sample::take(pid)?;
    let text = output(command).context("fio")?;
    let cpu = process::Sample::take(pid)?.since(&before).cpu_seconds;
    parse_fio(&text, cpu)
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

/// Reads of `qemu-img bench`, one behind the other, which is a client that speaks TLS at any depth.
#[derive(Debug, Clone, Copy)]
pub(crate) struct QemuImg {
    pub(crate) size: u32,
    pub(crate) depth: u32,
    pub(crate) count: u32,
}

/// Runs `qemu-img bench` against a server whose process is `pid`, by TLS.
pub(crate) fn qemu_img(bench: QemuImg, cpus: Cpus, certificates: &Path, port: u16, pid: u32) -> anyhow::Result<Totals> {
    let QemuImg { size, depth, count } = bench;
    let mut command = children::command(cpus, "qemu-img");
    command.args(["bench", "--object"]);
    command.arg(format!("tls-creds-x509,id=t,endpoint=client,dir={}", certificates.display()));
    command.args([format!("-c{count}"), format!("-d{depth}"), format!("-s{size}"), "--image-opts".into()]);
    let server = format!("server.type=inet,server.host=localhost,server.port={port}");
    command.arg(format!("driver=nbd,{server},export=image,tls-creds=t"));
    let before = process::Sample::take(pid)?;
    let text = output(command).context("qemu-img bench")?;
    let cpu_seconds = process::Sample::take(pid)?.since(&before).cpu_seconds;
    Ok(Totals {
        requests: f64::from(count),
        bytes: f64::from(count) * f64::from(size),
        seconds: parse_qemu_img(&text)?,
        cpu_seconds,
        p99: None,
    })
}

/// The seconds in "Run completed in 1.234 seconds."
fn parse_qemu_img(text: &str) -> anyhow::Result<f64> {
    let seconds = text.split("completed in ").nth(1).and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    seconds.with_context(|| format!("qemu-img printed {text:?}"))
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
    fn what_qemu_img_says_is_understood() {
        assert_eq!(parse_qemu_img("Sending 100 read requests\nRun completed in 0.25 seconds.\n").unwrap(), 0.25);
        assert!(parse_qemu_img("qemu-img: no").is_err());
    }

    #[test]
    fn a_fio_that_failed_is_an_error() {
        assert!(parse_fio(&FIO.replace("\"error\": 0", "\"error\": 5"), 0.0).is_err());
        assert!(parse_fio(&FIO.replace("2000", "0"), 0.0).is_err());
        assert!(parse_fio("fio: no", 0.0).is_err());
    }
}
