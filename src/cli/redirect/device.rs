//! `headwater redirect` at a device of the kernel.

use std::path::Path;
use std::process::ExitCode;

use anyhow::bail;
use serde::Serialize;

use super::args::{Redirect, Way};
use crate::agent::kernel::{self, DIRECTORY, Order, Outcome, Report};
use crate::cli::attach::index_of;
use crate::cli::output;
use crate::cli::table::Table;

/// Some clients could not be moved and are served as before.
const SOME_STAYED: u8 = 3;

/// What came of one device, for programs.
#[derive(Debug, Serialize)]
struct Told<'a> {
    device: &'a str,
    report: Option<&'a Report>,
    error: Option<String>,
}

pub(super) fn run(arguments: Redirect) -> anyhow::Result<ExitCode> {
    if arguments.export.is_some() {
        bail!("--device is for a device of this host, and has no export of a server: leave {:?} out", arguments.export);
    }
    if !matches!(arguments.way, Way::Auto | Way::Kernel) {
        bail!("a device of the kernel is moved by the kernel: --way kernel, or none");
    }
    let devices: Vec<_> = arguments.device.iter().map(|device| Ok((device, index_of(Path::new(device))?))).collect();
    let devices = devices.into_iter().collect::<anyhow::Result<Vec<_>>>()?;
    let mut outcomes = Vec::new();
    for (device, index) in devices {
        let (to, from, force) = (arguments.to.clone(), arguments.from.clone(), arguments.force);
        outcomes.push((device, kernel::redirect(Path::new(DIRECTORY), &Order { index, to, from, force })));
    }
    if arguments.json {
        let told = outcomes.iter().map(|(device, outcome)| Told {
            device,
            report: outcome.as_ref().ok(),
            error: outcome.as_ref().err().map(ToString::to_string),
        });
        output::print(&format!("{}\n", serde_json::to_string_pretty(&told.collect::<Vec<_>>())?))?;
    } else {
        show(outcomes.iter().filter_map(|(_, outcome)| outcome.as_ref().ok()))?;
    }
    let mut stayed = false;
    let mut failures = Vec::new();
    for (device, outcome) in outcomes {
        match outcome {
            Ok(report) => stayed |= report.outcome != Outcome::Moved,
            Err(error) => failures.push(format!("{device}: {error}")),
        }
    }
    if !failures.is_empty() {
        bail!("{}", failures.join("; "));
    }
    Ok(if stayed { ExitCode::from(SOME_STAYED) } else { ExitCode::SUCCESS })
}

fn show<'a>(reports: impl Iterator<Item = &'a Report>) -> anyhow::Result<()> {
    let mut table = Table::new(&["DEVICE", "FROM", "TO", "WAY", ">PAUSE", "ERROR"]);
    let mut notes = String::new();
    let mut is_empty = true;
    for report in reports {
        for moved in &report.connections {
            is_empty = false;
            table.row(vec![
                report.device.clone(),
                moved.from.clone(),
                moved.to.clone().unwrap_or_default(),
                moved.way.to_owned(),
                format!("{:.1} ms", moved.pause_ms),
                moved.error.clone().unwrap_or_default(),
            ]);
        }
        report.notes.iter().for_each(|note| notes += &format!("  {}: {note}\n", report.device));
    }
    if is_empty { Ok(()) } else { output::print(&format!("{table}{notes}")) }
}
