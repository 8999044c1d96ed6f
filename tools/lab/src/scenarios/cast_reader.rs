//! What a session does to a client that reads at random from one of its mirrors.
//!
//! Residency decides what a read costs, and a session changes it: a mirror that is being filled has more hits. So the client
//! reads where the session brings nothing: in the first quarter of the image, half of which was fetched before. Half of its
//! reads are hits and half go to the origin, over the link that the session uses, and both variants read the same blocks in
//! the same order.

use std::path::Path;

use anyhow::ensure;
use load::children::Guard;
use load::report::Report;
use serde_json::{Value, json};

use super::cast::{self, Options};
use crate::bed::Bed;
use crate::servers::{IMAGE, Mirror, Origin, load};
use crate::table::{Cell, Row, Table};
use crate::{Lab, image};

#[derive(Debug, Clone, Copy)]
struct Variant {
    reads_per_second: u32,
    /// Of the link; 0: no session.
    share: u32,
}

impl Variant {
    fn name(self) -> String {
        let Self { reads_per_second, share } = self;
        match share {
            0 => format!("{reads_per_second} reads a second, alone"),
            share => format!("{reads_per_second} reads a second, beside a cast at {share} % of the link"),
        }
    }
}

/// Runs the scenario.
pub(super) fn run(lab: &Lab, options: &Options) -> anyhow::Result<Table> {
    let image = image::full(lab, options.size.0)?;
    image::index(lab, &image)?;
    let bed = cast::bed(lab, 1)?;
    let origin = Origin::start(lab, &bed, &image)?;
    let size = std::fs::metadata(&image)?.len();
    let variants: Vec<Variant> = options
        .reads_per_second
        .iter()
        .flat_map(|&reads_per_second| {
            let with = move |share| Variant { reads_per_second, share };
            std::iter::once(0).chain(options.share.iter().copied()).map(with)
        })
        .collect();
    let place = Place { size, quarter: size / 4 };
    let runs = lab.in_turns(&variants, Variant::name, |variant| trial(lab, options, &bed, &origin, place, variant))?;
    let all = |index: usize, value: fn(&Report) -> f64| runs[index].iter().map(|run| value(&run.0)).collect::<Vec<_>>();
    let rows = variants.iter().enumerate().map(|(index, variant)| {
        let alone = index - index % (options.share.len() + 1);
        let cells = [|run: &Report| run.latency.p50 / 1e3, |run: &Report| run.latency.p99 / 1e3];
        let cells = cells.into_iter().flat_map(|value| {
            let ratio =
                if variant.share == 0 { Cell::none() } else { Cell::ratio(&all(index, value), &all(alone, value)) };
            [Cell::of(all(index, value)), ratio]
        });
        Row::new(variant.name(), cells.collect())
    });
    let details = variants.iter().zip(&runs).flat_map(|(variant, runs)| runs.iter().map(|run| (variant.name(), run)));
    Ok(Table {
        title: format!("Random 4K reads from a mirror that hears a cast of {}, {}", options.size, bed.link),
        columns: vec!["median ms", "ratio", "99 % ms", "ratio"],
        rows: rows.collect(),
        details: details.map(|(name, run)| json!({ "variant": name, "client": run.0, "mirror": run.1 })).collect(),
        ..Table::default()
    })
}

/// Where is read, and where is sent.
#[derive(Debug, Clone, Copy)]
struct Place {
    size: u64,
    quarter: u64,
}

fn trial(
    lab: &Lab,
    options: &Options,
    bed: &Bed,
    origin: &Origin,
    place: Place,
    variant: Variant,
) -> anyhow::Result<(Report, Value)> {
    let mirrors = cast::receivers(lab, bed, origin)?;
    let mirror = &mirrors[0];
    mirror.order(&["prefetch", IMAGE, "--wait", &format!("--range=..{}", place.quarter / 2)])?;
    let session =
        if variant.share == 0 { None } else { Some(begin(lab, options, bed, origin, mirror, place, variant)?) };
    let rate = format!("--rate={}", variant.reads_per_second);
    let region = format!("--region=0+{}", place.quarter);
    let report = load(None, &mirror.uri(), &["--size=4K", "--depth=64", "--time=5s", &rate, &region])?;
    if let Some(mut session) = session {
        ensure!(session.ended()?.is_none(), "the session ended before the reads: take a larger image (--size)");
        cast::call_off(lab, origin)?;
    }
    Ok((report, mirror.status()?))
}

/// Begins a session of the part that nobody reads, and waits until some of it has come.
fn begin(
    lab: &Lab,
    options: &Options,
    bed: &Bed,
    origin: &Origin,
    mirror: &Mirror,
    place: Place,
    variant: Variant,
) -> anyhow::Result<Guard> {
    let mut command = cast::cast_command(lab, origin, 1);
    command.arg(format!("--rate={}", cast::share(bed.link.rate, variant.share.into())));
    command.arg(format!("--range={}..{}", place.quarter, place.size)).args(&options.cast_option);
    let log = lab.scratch().join("cast.log");
    let mut session = Guard::spawn(command, &log)?;
    let before = brought(&mirror.look()?);
    let deadline = headwater::clock::now() + std::time::Duration::from_secs(60);
    while brought(&mirror.look()?) <= before {
        ensure!(session.ended()?.is_none(), "{}", text(&log));
        ensure!(headwater::clock::now() < deadline, "nothing comes: {}", text(&log));
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    Ok(session)
}

/// Bytes that are there.
fn brought(status: &Value) -> u64 {
    status["images"][0]["mirror"]["resident_bytes"].as_u64().unwrap_or(0)
}

fn text(log: &Path) -> String {
    std::fs::read_to_string(log).unwrap_or_default()
}
