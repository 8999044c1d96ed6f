//! Reading without a plan: all of it in order, as `dd` does, and 4K here and there.

use clap::Args;
use headwater::units::{ByteSize, MIB};
use load::report::Report;
use serde_json::{Value, json};

use crate::bed::Bed;
use crate::servers::{Mirror, Origin, demand_only, fetched, knows, load};
use crate::table::{Cell, Row, Table};
use crate::{Lab, image};

/// The command line of sequential reading.
#[derive(Debug, Args)]
pub(crate) struct Sequential {
    /// Bytes of the image, all of which is read.
    #[arg(long, default_value = "1G")]
    size: ByteSize,
    /// Also mirrors that do not fill ahead.
    #[arg(long)]
    demand: bool,
}

/// The command line of random reading.
#[derive(Debug, Args)]
pub(crate) struct Random {
    /// Bytes of the image.
    #[arg(long, default_value = "1G")]
    size: ByteSize,
    /// Reads of each run.
    #[arg(long, default_value_t = 1000)]
    requests: u32,
}

/// A run of a client against a mirror that had nothing.
fn through_a_cold_mirror(
    lab: &Lab,
    bed: &Bed,
    origin: &Origin,
    mirror_words: &[&str],
    words: &[&str],
) -> anyhow::Result<(Report, Value)> {
    let mirror = Mirror::start(lab, &bed.mirrors[0], &origin.uri, mirror_words)?;
    let report = load(None, &mirror.uri(), words)?;
    Ok((report, mirror.status()?))
}

/// Sequential reading, one request at a time, against the same link read with many.
pub(crate) fn sequential(lab: &Lab, options: &Sequential) -> anyhow::Result<Table> {
    let image = image::full(lab, options.size.0)?;
    image::index(lab, &image)?;
    let bed = lab.bed(1)?;
    let origin = Origin::start(lab, &bed, &image)?;
    let demand = demand_only(lab)?;
    let ahead = knows(lab, "--fill")?;
    // Name, size, and whether the mirror fills ahead; the first is the link itself.
    let mut variants = vec![("the link itself, 1M, 8 in flight", "1M", None)];
    if options.demand || !ahead {
        variants.extend([("on demand, 128K", "128K", Some(false)), ("on demand, 1M", "1M", Some(false))]);
    }
    if ahead {
        variants.extend([("readahead, 128K", "128K", Some(true)), ("readahead, 1M", "1M", Some(true))]);
    }
    let runs = lab.in_turns(
        &variants,
        |variant| variant.0.into(),
        |(_, size, through)| {
            let words = |depth: &'static str| ["--pattern=sequential", "--once", "--size", size, "--depth", depth];
            match through {
                None => Ok((load(Some(&bed.mirrors[0]), &origin.uri, &words("8"))?, Value::Null)),
                Some(true) => through_a_cold_mirror(lab, &bed, &origin, &[], &words("1")),
                Some(false) => through_a_cold_mirror(lab, &bed, &origin, &demand, &words("1")),
            }
        },
    )?;
    let rates = |index: usize| runs[index].iter().map(|(report, _)| report.bytes_per_second / 1e6).collect::<Vec<_>>();
    let rows = variants.iter().enumerate().map(|(index, (name, ..))| {
        let megabytes = runs[index].iter().map(|(_, status)| fetched(status) / 1e6).collect();
        let share = if index == 0 { Cell::none() } else { Cell::ratio(&rates(index), &rates(0)) };
        let megabytes = if index == 0 { Cell::none() } else { Cell::of(megabytes) };
        Row::new(*name, vec![Cell::of(rates(index)), share, megabytes])
    });
    Ok(Table {
        title: format!("Sequential reading of {} through a cold mirror, {}", options.size, bed.link),
        columns: vec!["MB/s", "of the link", "fetched MB"],
        rows: rows.collect(),
        details: details(&variants.iter().map(|variant| variant.0.to_owned()).collect::<Vec<_>>(), &runs),
        ..Table::default()
    })
}

/// Random 4K reads, one and 16 at a time, with and without filling ahead.
pub(crate) fn random(lab: &Lab, options: &Random) -> anyhow::Result<Table> {
    let image = image::full(lab, options.size.0.max(64 * MIB))?;
    image::index(lab, &image)?;
    let bed = lab.bed(1)?;
    let origin = Origin::start(lab, &bed, &image)?;
    let demand = demand_only(lab)?;
    let variants: Vec<(u32, bool)> = [(1, false), (1, true), (16, false), (16, true)]
        .into_iter()
        .filter(|(_, ahead)| !ahead || knows(lab, "--fill").unwrap_or(false))
        .collect();
    let name = |(depth, ahead): (u32, bool)| {
        format!("{depth} in flight, {}", if ahead { "filling ahead" } else { "on demand" })
    };
    let requests = format!("--requests={}", options.requests);
    let runs = lab.in_turns(&variants, name, |(depth, ahead)| {
        let mirror_words: &[&str] = if ahead { &[] } else { &demand };
        let depth = format!("--depth={depth}");
        // The same seed: the same offsets for all of them.
        through_a_cold_mirror(lab, &bed, &origin, mirror_words, &["--size=4K", &depth, &requests])
    })?;
    let all = |index: usize, value: fn(&(Report, Value)) -> f64| runs[index].iter().map(value).collect::<Vec<_>>();
    let rows = variants.iter().enumerate().map(|(index, &variant)| {
        type Of = fn(&(Report, Value)) -> f64;
        let cells: [Of; 3] =
            [|run| run.0.latency.mean / 1e3, |run| run.0.latency.p99 / 1e3, |run| fetched(&run.1) / 1e6];
        // The one on demand is the line before it.
        let cells = cells.into_iter().flat_map(|value| {
            let ratio = if variant.1 { Cell::ratio(&all(index, value), &all(index - 1, value)) } else { Cell::none() };
            [Cell::of(all(index, value)), ratio]
        });
        Row::new(name(variant), cells.collect())
    });
    Ok(Table {
        title: format!("{} random 4K reads through a cold mirror, {}", options.requests, bed.link),
        columns: vec!["mean ms", "ratio", "99 % ms", "ratio", "fetched MB", "ratio"],
        rows: rows.collect(),
        details: details(&variants.iter().map(|variant| name(*variant)).collect::<Vec<_>>(), &runs),
        ..Table::default()
    })
}

fn details(names: &[String], runs: &[Vec<(Report, Value)>]) -> Vec<Value> {
    let all = names.iter().zip(runs).flat_map(|(name, runs)| runs.iter().map(move |run| (name, run)));
    all.map(|(name, (report, status))| json!({ "variant": name, "client": report, "mirror": status })).collect()
}
