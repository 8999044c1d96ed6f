//! Hostile connections of every kind, 50 at a time, while clients of one server read: their delay with and without, the
//! server's memory, and how often it logs what.
//!
//! Everything is on this machine, over loopback, without a bed: the attackers take processor time of their own, which is in
//! the figures.

use std::collections::BTreeMap;
use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, ensure};
use clap::Args;
use headwater::units::MIB;
use load::children::{self, Cpus, Guard};
use load::report::Report;
use serde_json::{Value, json};

use super::forge::resident_kib;
use crate::attack::{self, Outcome, Victim};
use crate::servers::{load, wait_for_line};
use crate::table::{Cell, Row, Table};
use crate::{Lab, image};

/// The command line.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Hostile connections at a time.
    #[arg(long, default_value_t = 50)]
    at_once: u64,
    /// How long clients read in each run, as the load generator takes it.
    #[arg(long, default_value = "30s")]
    time: String,
    /// Requests that clients make per second: far below what the server can do, so that the delay is that of the server.
    #[arg(long, default_value_t = 2000)]
    requests: u32,
}

/// What came of one run.
struct Run {
    report: Report,
    made: u64,
    kib: [u64; 3],
    /// The most lines of one kind in one second, and which.
    lines: (u64, String),
}

/// The programs of a run.
struct Ground {
    server: Guard,
    log: std::path::PathBuf,
    victim: Victim,
}

impl Ground {
    fn start(lab: &Lab, open: &Path, run: &str) -> anyhow::Result<Self> {
        let shut = lab.scratch().join("shut.raw");
        fs::write(&shut, [1; 4096])?;
        let token = lab.scratch().join("token");
        fs::write(&token, "a-token-that-nobody-guesses")?;
        fs::set_permissions(&token, fs::Permissions::from_mode(0o600))?;
        let [nbd, admin] = [free_port()?, free_port()?];
        let mut command = children::command(Cpus::Free, &lab.headwater);
        command.args(["--log-format=json", "serve", "--read-only", "--allow=shut=192.0.2.1"]);
        command.arg(format!("--listen={nbd}")).arg(format!("--admin={admin}")).arg("--admin-token").arg(token);
        command.arg("--state").arg(lab.scratch()).arg(format!("open={}", open.display())).arg(&shut);
        let log = lab.scratch().join(format!("server-{run}.log"));
        let mut server = Guard::spawn(command, &log)?;
        wait_for_line(&mut server, &log, |line| line.starts_with("nbd"))?;
        let victim = Victim { nbd, admin: Some(admin), open: "open".to_owned(), shut: "shut".to_owned() };
        Ok(Self { server, log, victim })
    }

    fn uri(&self) -> String {
        format!("nbd://{}/{}", self.victim.nbd, self.victim.open)
    }
}

/// Reads with and without an attack, in turns.
pub(crate) fn run(lab: &Lab, options: &Options) -> anyhow::Result<Table> {
    let image = image::full(lab, 256 * MIB)?;
    let mut number = 0;
    let name = |attacked: bool| if attacked { "under attack" } else { "in peace" }.to_owned();
    let runs = lab.in_turns(&[false, true], name, |attacked| {
        number += 1;
        one(&Ground::start(lab, &image, &number.to_string())?, options, attacked)
    })?;
    let of = |index: usize, value: fn(&Run) -> f64| runs[index].iter().map(value).collect::<Vec<_>>();
    let rows = [false, true].into_iter().enumerate().map(|(index, attacked)| {
        type Of = fn(&Run) -> f64;
        let times: [Of; 2] = [|run| run.report.latency.p50, |run| run.report.latency.p99];
        let cells = times.into_iter().flat_map(|value| {
            let ratio = if attacked { Cell::ratio(&of(1, value), &of(0, value)) } else { Cell::none() };
            [Cell::of(of(index, value)), ratio]
        });
        let others: [Of; 5] = [
            |run| run.made as f64,
            |run| run.kib[0] as f64 / 1024.0,
            |run| run.kib[1] as f64 / 1024.0,
            |run| run.kib[2] as f64 / 1024.0,
            |run| run.lines.0 as f64,
        ];
        let cells: Vec<_> = cells.chain(others.into_iter().map(|value| Cell::of(of(index, value)))).collect();
        Row::new(name(attacked), cells)
    });
    let details =
        runs.iter().flatten().map(|run| json!({ "client": run.report, "lines": run.lines, "made": run.made }));
    Ok(Table {
        title: format!(
            "4K reads, {} per second over 4 connections, and hostile connections, {} at a time, for {}",
            options.requests, options.at_once, options.time
        ),
        columns: vec![
            "median us",
            "ratio",
            "99 % us",
            "ratio",
            "hostile",
            "MiB before",
            "MiB at most",
            "MiB after",
            "lines of a kind in 1 s",
        ],
        rows: rows.collect(),
        details: details.collect(),
        ..Table::default()
    })
}

fn one(ground: &Ground, options: &Options, attacked: bool) -> anyhow::Result<Run> {
    let words = [
        "--size=4K",
        "--connections=4",
        "--depth=8",
        "--ramp=1s",
        &format!("--rate={}", options.requests),
        &format!("--time={}", options.time),
    ];
    // What it takes at most without anybody hostile is no cost of the attack.
    load(None, &ground.uri(), &["--pattern=sequential", "--size=1M", "--once"])?;
    let pid = ground.server.pid();
    let before = resident_kib(pid)?;
    let (stop, most, outcome) = (AtomicBool::new(false), AtomicU64::new(before), Outcome::default());
    let report = std::thread::scope(|scope| {
        if attacked {
            scope.spawn(|| attack::run(&ground.victim, u64::MAX, options.at_once, &stop, &outcome));
        }
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                most.fetch_max(resident_kib(pid).unwrap_or(0), Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(20));
            }
        });
        let report = load(None, &ground.uri(), &words);
        stop.store(true, Ordering::Relaxed);
        report
    })?;
    ensure!(outcome.leaks.load(Ordering::Relaxed) == 0, "something was told of an export that is not to be had");
    ensure!(outcome.guessed.load(Ordering::Relaxed) == 0, "a guess was answered");
    let kib = [before, most.into_inner(), resident_kib(pid)?];
    Ok(Run { report, made: outcome.total(), kib, lines: lines(&fs::read_to_string(&ground.log)?)? })
}

/// The kind of line that was logged most often within one second of the clock, and how often, but for those of the start.
fn lines(log: &str) -> anyhow::Result<(u64, String)> {
    let mut counts = BTreeMap::<(String, String), u64>::new();
    for line in log.lines().filter(|line| line.starts_with('{')) {
        let line: Value = serde_json::from_str(line)?;
        let text = |key: &str| line[key].as_str().map(str::to_owned).with_context(|| line.to_string());
        let message = text("message")?;
        if matches!(message.as_str(), "serving" | "listening") {
            continue;
        }
        let second = text("timestamp")?.split('.').next().unwrap_or_default().to_owned();
        *counts.entry((message, second)).or_default() += 1;
    }
    let most = counts.into_iter().max_by_key(|(_, count)| *count);
    Ok(most.map_or_else(Default::default, |((message, _), count)| (count, message)))
}

fn free_port() -> anyhow::Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_counted_by_kind_and_second() {
        let line = |second: u32, message: &str| {
            format!("{{\"timestamp\":\"2026-01-01T00:00:0{second}.5Z\",\"message\":\"{message}\"}}")
        };
        let log = [line(0, "serving"), line(0, "serving"), line(1, "a"), line(1, "b"), line(2, "b"), line(2, "b")];
        assert_eq!(lines(&format!("nbd://h/x\n{}", log.join("\n"))).unwrap(), (2, "b".to_owned()));
    }
}
