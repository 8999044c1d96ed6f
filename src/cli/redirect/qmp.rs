//! `headwater redirect` at virtual machines.

use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde::Serialize;

use super::args::Redirect;
use crate::agent::qmp::{MonitorError, Order, Outcome, RedirectError, Report, State, Way, redirect};
use crate::cli::output;
use crate::cli::running::block_on;
use crate::cli::table::Table;

/// Sockets in one directory.
const MAX_SOCKETS: usize = 4096;

/// Some were moved, and some could not be.
const SOME_LEFT: u8 = 3;

pub(super) fn run(arguments: Redirect) -> anyhow::Result<ExitCode> {
    let sockets = sockets(&arguments.qmp)?;
    let order = Order { targets: arguments.to, devices: arguments.device, force: arguments.force };
    let machines = block_on(async {
        let mut machines = Vec::new();
        for (socket, is_found) in sockets {
            // One after another: what one machine costs the new server, the next one need not pay for.
            match redirect(&socket, &order).await {
                Err(error) if is_found && is_nobodys(&error) => {}
                result => machines.push(Machine::new(&socket, is_found, result)),
            }
        }
        Ok(machines)
    })?;
    if arguments.json {
        output::print(&format!("{}\n", serde_json::to_string_pretty(&machines)?))?;
    } else {
        output::print(&text(&machines))?;
    }
    verdict(&machines, order.devices.is_empty())
}

/// The sockets that were named, and those in directories that were named, each with whether it was only found.
fn sockets(paths: &[PathBuf]) -> anyhow::Result<Vec<(PathBuf, bool)>> {
    let mut sockets = Vec::new();
    for path in paths {
        if !path.is_dir() {
            sockets.push((path.clone(), false));
            continue;
        }
        let shown = || path.display().to_string();
        let mut found = Vec::new();
        for entry in fs::read_dir(path).with_context(shown)? {
            let entry = entry.with_context(shown)?;
            // One that is gone by now is no socket.
            if entry.file_type().is_ok_and(|kind| kind.is_socket()) {
                ensure!(found.len() < MAX_SOCKETS, "{} has more than {MAX_SOCKETS} sockets", shown());
                found.push(entry.path());
            }
        }
        ensure!(!found.is_empty(), "{} has no sockets", shown());
        found.sort();
        sockets.extend(found.into_iter().map(|path| (path, true)));
    }
    Ok(sockets)
}

/// Whether a socket that was only found is none of ours: left behind, of another program, or of a machine without the
/// disk that is meant.
fn is_nobodys(error: &RedirectError) -> bool {
    match error {
        RedirectError::NoDisk(_) => true,
        RedirectError::Monitor(error) => {
            matches!(error, MonitorError::Connect(_) | MonitorError::Lost(_) | MonitorError::Malformed(_))
        }
        RedirectError::Answer(_) => false,
    }
}

/// One machine, in the form of the JSON.
#[derive(Debug, Serialize)]
struct Machine {
    monitor: PathBuf,
    /// Why it was not looked at.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    disks: Vec<Disk>,
    /// Nodes that an earlier run had left.
    removed: Vec<String>,
    /// It stopped itself on an I/O error, and waits for `cont`.
    halted: bool,
}

#[derive(Debug, Serialize)]
struct Disk {
    disks: Vec<String>,
    node: String,
    state: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    way: Option<&'static str>,
    from: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    to: Option<String>,
    pause_ms: f64,
    errors: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    why: Option<String>,
}

impl Machine {
    fn new(socket: &Path, is_found: bool, result: Result<Report, RedirectError>) -> Self {
        let (report, mut error) = match result {
            Ok(report) => (report, None),
            Err(error) => (Report::default(), Some(error.to_string())),
        };
        if report.outcomes.is_empty() && error.is_none() && !is_found {
            error = Some("no disk of this machine is a client of an NBD server".into());
        }
        Self {
            monitor: socket.to_owned(),
            error,
            disks: report.outcomes.into_iter().map(Disk::from).collect(),
            removed: report.removed,
            halted: report.is_halted,
        }
    }
}

impl From<Outcome> for Disk {
    fn from(outcome: Outcome) -> Self {
        Self {
            disks: outcome.disks,
            node: outcome.node,
            state: state(outcome.state),
            way: outcome.way.map(way),
            from: outcome.from,
            to: outcome.to.map(|uri| uri.to_string()),
            pause_ms: milliseconds(outcome.pause),
            errors: outcome.errors,
            why: outcome.why,
        }
    }
}

fn milliseconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

const fn state(state: State) -> &'static str {
    match state {
        State::Moved => "moved",
        State::Already => "already",
        State::Other => OTHER,
        State::Refused => "refused",
        State::Failed => "failed",
        State::Unknown => "unknown",
    }
}

const OTHER: &str = "other";

const fn way(way: Way) -> &'static str {
    match way {
        Way::Reopen => "reopen",
        Way::Device => "device",
    }
}

fn text(machines: &[Machine]) -> String {
    let mut table = Table::new(&["MONITOR", "DISK", "STATE", "WAY", ">PAUSE ms", ">ERRORS", "FROM", "TO"]);
    let mut remarks = String::new();
    for machine in machines {
        let monitor = machine.monitor.display().to_string();
        let mut remark = |text: &str| remarks.push_str(&format!("{monitor}: {}\n", crate::cli::table::printable(text)));
        for disk in &machine.disks {
            let name = disk.disks.join(",");
            table.row(vec![
                monitor.clone(),
                name.clone(),
                disk.state.to_owned(),
                disk.way.unwrap_or("-").to_owned(),
                format!("{:.1}", disk.pause_ms),
                disk.errors.to_string(),
                disk.from.clone(),
                disk.to.clone().unwrap_or_else(|| "-".into()),
            ]);
            if let Some(why) = &disk.why {
                remark(&format!("{name}: {why}"));
            }
        }
        machine.error.iter().for_each(|error| remark(error));
        for node in &machine.removed {
            remark(&format!("removed the node {node}, which an earlier run had left"));
        }
        if machine.halted {
            remark("the machine has stopped itself on an I/O error: the command cont in its monitor lets it go on");
        }
    }
    let has_disks = machines.iter().any(|machine| !machine.disks.is_empty());
    if has_disks { format!("{table}{remarks}") } else { remarks }
}

/// The exit status. Disks that hold another image are not meant unless they were named.
fn verdict(machines: &[Machine], is_anyone_meant: bool) -> anyhow::Result<ExitCode> {
    let disks = || machines.iter().flat_map(|machine| &machine.disks);
    let done = disks().filter(|disk| matches!(disk.state, "moved" | "already")).count();
    let is_left = |disk: &&Disk| !(matches!(disk.state, "moved" | "already") || is_anyone_meant && disk.state == OTHER);
    let left = disks().filter(is_left).count() + machines.iter().filter(|machine| machine.error.is_some()).count();
    ensure!(done > 0, "no disk was moved");
    Ok(if left == 0 { ExitCode::SUCCESS } else { ExitCode::from(SOME_LEFT) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(states: &[&'static str], error: Option<&str>) -> Machine {
        let disk = |state: &&'static str| Disk {
            disks: vec!["vd0".into()],
            node: "n".into(),
            state,
            way: None,
            from: "nbd://a/x".into(),
            to: None,
            pause_ms: 0.0,
            errors: 0,
            why: Some("be\u{1b}cause".into()),
        };
        let disks = states.iter().map(disk).collect();
        Machine { monitor: "/q".into(), error: error.map(Into::into), disks, removed: Vec::new(), halted: true }
    }

    #[test]
    fn the_exit_status_tells_who_is_left() {
        let of = |states: &[&'static str], error, anyone| {
            verdict(&[machine(states, error)], anyone).ok().map(|code| format!("{code:?}"))
        };
        let code = |code: u8| Some(format!("{:?}", ExitCode::from(code)));
        assert_eq!(of(&["moved", "already"], None, true), code(0));
        assert_eq!(of(&["moved", "other"], None, true), code(0));
        assert_eq!(of(&["moved", "other"], None, false), code(3));
        assert_eq!(of(&["moved"], Some("busy"), true), code(3));
        for state in ["refused", "failed", "unknown"] {
            assert_eq!(of(&["already", state], None, true), code(3));
            assert_eq!(of(&[state], None, true), None);
        }
        assert_eq!(of(&["other"], None, true), None);
        assert_eq!(of(&[], None, true), None);
    }

    #[test]
    fn people_are_told_why() {
        let told = text(&[machine(&["refused"], Some("odd"))]);
        assert!(told.contains("/q: vd0: be\u{fffd}cause\n/q: odd\n/q: the machine has stopped"), "{told}");
    }
}
