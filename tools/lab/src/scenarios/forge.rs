//! A mirror in a group where somebody says wrong things: what it believes, and what memory it takes.
//!
//! A session fills the mirror, slowly, while millions of datagrams are forged by another host ([`crate::forger`]). At the
//! end everything is read and compared; what was lacking comes from the upstream.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use clap::Args;
use headwater::clock;
use headwater::units::ByteSize;
use load::children::Guard;
use load::process::to_f64;
use serde_json::{Value, json};

use super::cast::{self, GROUP};
use crate::bed::output;
use crate::servers::{Mirror, Origin};
use crate::table::{Cell, Row, Table};
use crate::{Lab, image, tell};

/// How often memory is looked at.
const GLANCE: Duration = Duration::from_millis(20);

/// The command line.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Forged datagrams.
    #[arg(long, default_value_t = 10_000_000)]
    count: u64,
    /// Of these, per second.
    #[arg(long, default_value_t = 60_000, value_parser = clap::value_parser!(u64).range(1..))]
    pace: u64,
    /// Bytes of data in the image.
    #[arg(long, default_value = "64M")]
    size: ByteSize,
    /// Bytes of true datagrams per second.
    #[arg(long, default_value = "1M")]
    cast_rate: ByteSize,
}

/// What one run came to.
struct Trial {
    before_kib: u64,
    most_kib: u64,
    said: String,
    status: Value,
    seconds: f64,
}

/// Runs the scenario.
pub(crate) fn run(lab: &Lab, options: &Options) -> anyhow::Result<Table> {
    let image = image::with_holes(lab, options.size.0)?;
    image::index(lab, &image)?;
    let runs = lab.in_turns(&[()], |()| "forging".into(), |()| trial(lab, options, &image))?;
    let all = |value: &dyn Fn(&Trial) -> f64| Cell::of(runs[0].iter().map(value).collect());
    let counter = |name: &'static str| move |run: &Trial| to_f64(run.status[name].as_u64().unwrap_or(0));
    let wrong = |run: &Trial| {
        let sessions = run.status["sessions"].as_array().cloned().unwrap_or_default();
        to_f64(sessions.iter().map(|session| session["wrong"].as_u64().unwrap_or(0)).sum())
    };
    let cells = vec![
        all(&|run| to_f64(run.before_kib) / 1024.0),
        all(&|run| to_f64(run.most_kib) / 1024.0),
        all(&counter("foreign")),
        all(&counter("forged")),
        all(&counter("broken")),
        all(&counter("overflowed")),
        all(&wrong),
        all(&|run| run.seconds),
    ];
    Ok(Table {
        title: format!("{} forged datagrams beside a cast of {}; all bytes right", options.count, options.size),
        columns: vec!["MiB before", "MiB at most", "foreign", "forged", "broken", "overflowed", "wrong blocks", "s"],
        rows: vec![Row::new("a mirror", cells)],
        details: runs[0].iter().map(|run| json!({ "forger": run.said, "reception": run.status })).collect(),
        ..Table::default()
    })
}

fn trial(lab: &Lab, options: &Options, image: &Path) -> anyhow::Result<Trial> {
    let bed = cast::bed(lab, 2)?;
    let origin = Origin::start(lab, &bed, image)?;
    let joins = cast::joins();
    let words: Vec<&str> = joins.iter().map(String::as_str).collect();
    let mirror = Mirror::start(lab, &bed.mirrors[0], &origin.uri, &words)?;
    let stranger = &bed.mirrors[1];
    stranger.limit(crate::bed::Rate(0))?;
    let before_kib = resident_kib(mirror.pid())?;
    let mut forging = stranger.command(&std::env::current_exe()?);
    forging.args(["forger", "--group", GROUP]).arg(format!("--interface={}", stranger.address));
    forging.arg(format!("--image={}", identity(lab, &origin)?));
    forging.args([format!("--count={}", options.count), format!("--pace={}", options.pace)]);
    let (said, start) = (lab.scratch().join("forger.log"), clock::now());
    std::fs::write(&said, "")?;
    let mut forger = Guard::spawn(forging, &said)?;
    let mut session = cast::cast_command(lab, &origin, 1);
    session.arg("--all").arg(format!("--rate={}", options.cast_rate.0));
    let _session = Guard::spawn(session, &lab.scratch().join("cast.log"))?;
    let mut most_kib = before_kib;
    let status = loop {
        lab.go_on()?;
        let ended = forger.ended()?;
        most_kib = most_kib.max(resident_kib(mirror.pid())?);
        if let Some(status) = ended {
            break status;
        }
        std::thread::sleep(GLANCE);
    };
    let said = std::fs::read_to_string(said)?;
    ensure!(status.success(), "the forger ended with {status}: {said}");
    let seconds = clock::now().duration_since(start).as_secs_f64();
    tell(&format!("{}; comparing", said.trim()));
    let status = mirror.look()?["receptions"][0].take();
    mirror.verify(image)?;
    Ok(Trial { before_kib, most_kib, said, status, seconds })
}

/// What the image is, as its server says.
fn identity(lab: &Lab, origin: &Origin) -> anyhow::Result<String> {
    let mut command = std::process::Command::new(&lab.headwater);
    let text = output(command.args(["status", "--json", "--at"]).arg(origin.admin()))?;
    let status: Value = serde_json::from_str(&text)?;
    Ok(status["images"][0]["identity"].as_str().context("the image has an identity")?.to_owned())
}

/// Memory that a process has now.
pub(crate) fn resident_kib(pid: u32) -> anyhow::Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("it has ended")?;
    Ok(line.split_whitespace().next().context("a figure")?.parse()?)
}
