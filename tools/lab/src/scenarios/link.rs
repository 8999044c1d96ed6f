//! The bed itself: what the link carries and how long it takes, without any mirror. A bed that is not as it should be
//! makes every other figure worthless, so this comes first.

use clap::Args;
use headwater::units::MIB;

use crate::servers::{Origin, load};
use crate::table::{Cell, Row, Table};
use crate::{Lab, image};

/// The command line.
#[derive(Debug, Args)]
pub(crate) struct Options {}

/// Reads from the origin over the link: much at once, one byte sector at a time, and 4K.
pub(crate) fn run(lab: &Lab, _: &Options) -> anyhow::Result<Table> {
    let image = image::full(lab, 256 * MIB)?;
    let bed = lab.bed(1)?;
    let origin = Origin::start(lab, &bed, &image)?;
    let host = &bed.mirrors[0];
    let variants: [(&str, &[&str]); 3] = [
        ("1M, 8 in flight", &["--pattern=sequential", "--size=1M", "--depth=8", "--time=3s", "--ramp=500ms"]),
        ("512 bytes, one at a time", &["--size=512", "--depth=1", "--time=2s"]),
        ("4K, one at a time", &["--size=4K", "--depth=1", "--time=2s"]),
    ];
    let samples = lab.in_turns(
        &[0, 1, 2],
        |index| variants[index].0.into(),
        |index| load(Some(host), &origin.uri, variants[index].1),
    )?;
    let rows = variants.iter().zip(&samples).map(|((name, _), reports)| {
        let of = |value: fn(&load::report::Report) -> f64| Cell::of(reports.iter().map(value).collect());
        let megabits = of(|report| report.bytes_per_second * 8.0 / 1e6);
        let micros = |value: fn(&load::report::Report) -> f64| of(value);
        Row::new(*name, vec![megabits, micros(|r| r.latency.p50 / 1e3), micros(|r| r.latency.p99 / 1e3)])
    });
    Ok(Table {
        title: format!("The link itself, {}", bed.link),
        columns: vec!["Mbit/s of data", "median ms", "99 % ms"],
        rows: rows.collect(),
        ..Table::default()
    })
}
