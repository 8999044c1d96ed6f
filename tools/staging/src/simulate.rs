//! The table of simulated traces.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, ensure};
use clap::Args;
use headwater::units::to_u64;

use crate::chart;
use crate::schedule::{self, Got, Link, Staging};
use crate::trace::{self, Shape};

#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// Traces; both unless told.
    #[arg(long, value_enum, value_delimiter = ',')]
    trace: Vec<Shape>,
    /// Work that the images are, as a part of what the link could do meanwhile, if no node kept any.
    #[arg(long, value_name = "SHARE", value_delimiter = ',', default_values_t = [0.3, 0.6, 0.9, 1.2, 1.5])]
    load: Vec<f64>,
    /// Traces of each kind, all of which are made with other seeds.
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..=100_000))]
    seeds: u64,
    /// Megabits per second of the link.
    #[arg(long, value_name = "MBIT", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..))]
    link: u32,
    /// Megabytes (of 1000000 bytes) of an image.
    #[arg(long, value_name = "MB", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..=1_000_000))]
    image: u64,
    /// Print JSON.
    #[arg(long)]
    json: bool,
    /// Writes the plot here: nodes that keep nothing.
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

/// Traces of one kind.
#[derive(Debug, Clone)]
pub(crate) struct Row {
    pub(crate) shape: Shape,
    pub(crate) load: f64,
    pub(crate) keeps_images: bool,
    /// How many there were.
    traces: u64,
    /// Of these, such in which everybody could have got all.
    feasible: u64,
    /// In the order of [`Staging::ALL`].
    pub(crate) results: Vec<Sum>,
    /// Traces in which a hybrid schedule was below another one, or not at 100 % although that could be.
    failures: Vec<u64>,
}

/// What came of one way to stage, over all traces of one kind.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Sum {
    deployments: u64,
    satisfied: u64,
    shares: f64,
    /// The same of the feasible ones.
    feasible_deployments: u64,
    feasible_satisfied: u64,
}

impl Sum {
    fn add(&mut self, got: &[Got], is_feasible: bool) {
        let (all, satisfied) = (to_u64(got.len()), schedule::satisfied(got));
        self.deployments += all;
        self.satisfied += satisfied;
        self.shares += got.iter().map(|got| got.share).sum::<f64>();
        if is_feasible {
            self.feasible_deployments += all;
            self.feasible_satisfied += satisfied;
        }
    }

    /// The share of deployments that got all.
    pub(crate) fn satisfied(self) -> f64 {
        self.satisfied as f64 / self.deployments.max(1) as f64
    }

    /// What a deployment got on average.
    pub(crate) fn mean(self) -> f64 {
        self.shares / self.deployments.max(1) as f64
    }

    /// As [`Sum::satisfied`], where everybody could have got all; `None` if there was no such trace.
    fn satisfied_of_feasible(self) -> Option<f64> {
        let (part, whole) = (self.feasible_satisfied as f64, self.feasible_deployments as f64);
        (self.feasible_deployments > 0).then(|| part / whole)
    }
}

#[expect(clippy::print_stdout, reason = "this is what the program is for")]
pub(crate) fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    ensure!(arguments.load.iter().all(|load| (0.01..=100.0).contains(load)), "a load is from 0.01 to 100");
    let link = Link { bytes_per_second: f64::from(arguments.link) * 125_000.0, image: arguments.image * 1_000_000 };
    let shapes = if arguments.trace.is_empty() { &Shape::ALL[..] } else { &arguments.trace };
    let mut rows = Vec::new();
    for shape in shapes {
        for keeps_images in [false, true] {
            rows.extend(arguments.load.iter().map(|load| row(*shape, *load, keeps_images, arguments.seeds, link)));
        }
    }
    if arguments.json {
        let rows: Vec<_> = rows.iter().map(json).collect();
        println!("{}", serde_json::to_string_pretty(&rows)?);
    } else {
        println!("{}", table(&rows));
    }
    if let Some(path) = &arguments.svg {
        std::fs::write(path, chart::draw(&rows)).with_context(|| path.display().to_string())?;
    }
    Ok(if rows.iter().any(|row| !row.failures.is_empty()) { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

fn row(shape: Shape, load: f64, keeps_images: bool, seeds: u64, link: Link) -> Row {
    let results = vec![Sum::default(); Staging::ALL.len()];
    let mut row = Row { shape, load, keeps_images, traces: seeds, feasible: 0, results, failures: Vec::new() };
    for seed in 0..seeds {
        let deployments = trace::make(shape, load, keeps_images, seed);
        let is_feasible = schedule::is_feasible(&deployments);
        row.feasible += u64::from(is_feasible);
        let (mut best, mut hybrid) = (0, 0);
        for (staging, sum) in Staging::ALL.into_iter().zip(&mut row.results) {
            let got = schedule::play(&deployments, staging, link);
            sum.add(&got, is_feasible);
            let satisfied = schedule::satisfied(&got);
            best = best.max(satisfied);
            hybrid = if staging == Staging::Hybrid { satisfied } else { hybrid };
        }
        if hybrid < best || is_feasible && hybrid < to_u64(deployments.len()) {
            row.failures.push(seed);
        }
    }
    row
}

fn table(rows: &[Row]) -> String {
    let names = Staging::ALL.map(|staging| staging.to_string()).join(" | ");
    let mut lines = vec![
        format!("| trace | nodes keep | load | feasible | {names} |"),
        format!("| --- | --- | --- | --- |{}", " --- |".repeat(Staging::ALL.len())),
    ];
    for row in rows {
        let Row { shape, load, traces, feasible, .. } = row;
        let keeps = if row.keeps_images { "3 images" } else { "nothing" };
        let cell = |sum: &Sum| {
            let of_feasible = sum.satisfied_of_feasible().map_or_else(|| "-".to_owned(), percent);
            format!("{} ({}), {}", percent(sum.satisfied()), of_feasible, percent(sum.mean()))
        };
        let cells: Vec<_> = row.results.iter().map(cell).collect();
        let fails = if row.failures.is_empty() { String::new() } else { format!(" FAILS at {:?}", row.failures) };
        lines.push(format!("| {shape} | {keeps} | {load} | {feasible} of {traces} | {} |{fails}", cells.join(" | ")));
    }
    lines.join("\n")
}

/// With one place, rounded down: 100 is all.
fn percent(share: f64) -> String {
    format!("{:.1}", (share * 1000.0 + 1e-6).floor() / 10.0)
}

fn json(row: &Row) -> serde_json::Value {
    let result = |(staging, sum): (Staging, &Sum)| {
        let value = serde_json::json!({
            "satisfied": sum.satisfied(),
            "satisfied_of_feasible": sum.satisfied_of_feasible(),
            "mean_share_of_time": sum.mean(),
        });
        (staging.to_string(), value)
    };
    let results: serde_json::Map<_, _> = Staging::ALL.into_iter().zip(&row.results).map(result).collect();
    serde_json::json!({
        "trace": row.shape.to_string(),
        "nodes_keep_images": row.keeps_images,
        "load": row.load,
        "traces": row.traces,
        "feasible": row.feasible,
        "staging": results,
        "failed_seeds": row.failures,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINK: Link = Link { bytes_per_second: 12_500_000.0, image: 600_000_000 };

    #[test]
    fn a_kind_of_traces_is_summed_up() {
        let row = row(Shape::Bursts, 0.5, false, 10, LINK);
        let (job, hybrid) = (row.results[0], row.results[4]);
        assert_eq!((job.deployments, job.satisfied()), (350, 0.0));
        assert!(job.mean() > 0.5 && job.mean() < hybrid.mean(), "{row:?}");
        assert!(row.failures.is_empty(), "{row:?}");
        let text = table(std::slice::from_ref(&row));
        assert!(text.lines().nth(2).unwrap().starts_with("| bursts | nothing | 0.5 | "), "{text}");
        assert_eq!(json(&row)["staging"]["job"]["satisfied"], 0.0);
    }

    #[test]
    fn almost_all_is_not_all() {
        assert_eq!(percent(0.9999), "99.9");
        assert_eq!(percent(1.0), "100.0");
    }
}
