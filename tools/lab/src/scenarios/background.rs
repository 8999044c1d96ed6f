//! What a fill in the background does to those who wait.
//!
//! The run must be short against the fill: once much of the image is here, most reads are hits, and a percentile over
//! hits says nothing about the link. So the image is large, and the table shows how much of it was brought over.

use clap::Args;
use headwater::units::ByteSize;
use load::report::Report;
use serde_json::{Value, json};

use crate::bed::{Bed, Link, Rate};
use crate::servers::{Mirror, Origin, demand_only, fetched, knows, load};
use crate::table::{Cell, Row, Table};
use crate::{Lab, image};

/// The command line.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Bytes of the image.
    #[arg(long, default_value = "2G")]
    size: ByteSize,
    /// How long a client reads.
    #[arg(long, default_value = "8s")]
    time: String,
    /// Over a link without a limit and a latency instead.
    #[arg(long)]
    local: bool,
}

/// How clients ask: the name, and the words for load.
const PATTERNS: [(&str, &[&str]); 4] = [
    ("one in flight", &["--depth=1"]),
    ("four in flight", &["--depth=4"]),
    ("20 a second", &["--rate=20", "--depth=64"]),
    ("200 a second", &["--rate=200", "--depth=64"]),
];

/// Runs the scenario.
pub(crate) fn run(lab: &Lab, options: &Options) -> anyhow::Result<Table> {
    let image = image::full(lab, options.size.0)?;
    image::index(lab, &image)?;
    let local = Link { rate: Rate(0), latency: std::time::Duration::ZERO };
    let bed = if options.local { Bed::new(local, 1)? } else { lab.bed(1)? };
    let origin = Origin::start(lab, &bed, &image)?;
    let kinds: &[bool] = if knows(lab, "--fill")? { &[false, true] } else { &[false] };
    let variants: Vec<(usize, bool)> =
        (0..PATTERNS.len()).flat_map(|pattern| kinds.iter().map(move |fill| (pattern, *fill))).collect();
    let name = |(pattern, fill): (usize, bool)| {
        format!("{}, {}", PATTERNS[pattern].0, if fill { "with a fill" } else { "without" })
    };
    let demand = demand_only(lab)?;
    let runs = lab.in_turns(&variants, name, |(pattern, fill)| -> anyhow::Result<(Report, Value)> {
        let words: &[&str] = if fill { &["--fill=background"] } else { &demand };
        let mirror = Mirror::start(lab, &bed.mirrors[0], &origin.uri, words)?;
        let mut words = vec!["--size=4K", "--ramp=1s", "--time", &options.time];
        words.extend(PATTERNS[pattern].1);
        Ok((load(None, &mirror.uri(), &words)?, mirror.status()?))
    })?;
    let all = |index: usize, value: fn(&(Report, Value)) -> f64| runs[index].iter().map(value).collect::<Vec<_>>();
    let rows = variants.iter().enumerate().map(|(index, &variant)| {
        let ratio =
            |value| if variant.1 { Cell::ratio(&all(index, value), &all(index - 1, value)) } else { Cell::none() };
        let p99: fn(&(Report, Value)) -> f64 = |run| run.0.latency.p99 / 1e3;
        let cells = vec![
            Cell::of(all(index, |run| run.0.latency.p50 / 1e3)),
            ratio(|run| run.0.latency.p50),
            Cell::of(all(index, p99)),
            ratio(p99),
            Cell::of(all(index, |run| run.0.requests_per_second)),
            Cell::of(all(index, |run| fetched(&run.1) / 1e6)),
        ];
        Row::new(name(variant), cells)
    });
    let details = variants.iter().zip(&runs).flat_map(|(variant, runs)| runs.iter().map(|run| (*variant, run)));
    Ok(Table {
        title: format!("Random 4K reads of {} beside a fill of it, {}", options.size, bed.link),
        columns: vec!["median ms", "ratio", "99 % ms", "ratio", "reads/s", "fetched MB"],
        rows: rows.collect(),
        details: details
            .map(|(variant, (report, status))| json!({ "variant": name(variant), "client": report, "mirror": status }))
            .collect(),
        ..Table::default()
    })
}
