//! A real virtual machine that boots: over a local file, over a cold mirror, over a cold mirror with a profile.

use clap::Args;
use serde_json::{Value, json};

use crate::machine::Machine;
use crate::servers::{Mirror, Origin, demand_only, fetched, knows};
use crate::table::{Cell, Row, Table};
use crate::{Lab, image, tell};

/// The command line.
#[derive(Debug, Args)]
pub(crate) struct Options {
    #[command(flatten)]
    machine: Machine,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Over {
    File,
    Demand,
    Profile,
}

impl Over {
    const fn name(self) -> &'static str {
        match self {
            Self::File => "a local file",
            Self::Demand => "a cold mirror, on demand",
            Self::Profile => "a cold mirror with the profile",
        }
    }
}

/// Runs the scenario.
pub(crate) fn run(lab: &Lab, options: &Options) -> anyhow::Result<Table> {
    let machine = &options.machine;
    image::index(lab, &machine.image)?;
    let bed = lab.bed(1)?;
    let origin = Origin::start(lab, &bed, &machine.image)?;
    let boot = |words: &[&str]| -> anyhow::Result<(f64, Value)> {
        let mirror = Mirror::start(lab, &bed.mirrors[0], &origin.uri, words)?;
        let seconds = machine.boot(lab, &mirror.uri())?;
        let status = mirror.status()?;
        // It hands its profile on at the end.
        mirror.stop()?;
        Ok((seconds, status))
    };
    let mut kinds = vec![Over::File, Over::Demand];
    if knows(lab, "--fill")? {
        tell("the boot that the profile is learnt from");
        boot(&[])?;
        kinds.push(Over::Profile);
    }
    let demand = demand_only(lab)?;
    let runs = lab.in_turns(
        &kinds,
        |kind| kind.name().into(),
        |kind| match kind {
            Over::File => Ok((machine.boot(lab, &machine.image.display().to_string())?, Value::Null)),
            Over::Demand => boot(&demand),
            Over::Profile => boot(&[]),
        },
    )?;
    let seconds = |index: usize| runs[index].iter().map(|run| run.0).collect::<Vec<_>>();
    let rows = kinds.iter().enumerate().map(|(index, kind)| {
        let megabytes = runs[index].iter().map(|run| fetched(&run.1) / 1e6).collect();
        let ratio = if index == 0 { Cell::none() } else { Cell::ratio(&seconds(index), &seconds(0)) };
        Row::new(kind.name(), vec![Cell::of(seconds(index)), ratio, Cell::of(megabytes)])
    });
    let details = kinds.iter().zip(&runs).flat_map(|(kind, runs)| runs.iter().map(|run| (kind.name(), run)));
    Ok(Table {
        title: format!("A machine boots from {}, {}", machine.image.display(), bed.link),
        columns: vec!["seconds", "of a local file", "fetched MB"],
        rows: rows.collect(),
        details: details.map(|(name, run)| json!({ "variant": name, "seconds": run.0, "mirror": run.1 })).collect(),
        ..Table::default()
    })
}
