//! `headwater check-config`: everything about a file that can be known without serving.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::bail;
use clap::{Args, CommandFactory, Parser};

use super::arguments::{added, join, relaxed};
use super::file::ConfigFile;
use super::{daemon_of, tell, whole_line};
use crate::cli::args::{Arguments, Command};
use crate::cli::output;
use crate::control::Token;
use crate::export::split_content_name;

const EXAMPLES: &str = "\
Examples:
  headwater check-config /etc/headwater/headwater.toml";

/// Check a configuration file without starting a server.
///
/// Keys and values, files that are named, and exports that rules are for. Prints one line for each table, or what is wrong
/// with its file, line and key.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(in crate::cli) struct CheckConfig {
    /// The file.
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

/// Checks it.
pub(in crate::cli) fn run(arguments: &CheckConfig) -> anyhow::Result<ExitCode> {
    let file = ConfigFile::read(&arguments.file).map_err(|fault| anyhow::anyhow!(fault.to_string()))?;
    let mut faults = Vec::new();
    let mut sound = String::new();
    for name in ["serve", "mirror"] {
        match check_table(&file, name) {
            Ok(false) => {}
            Ok(true) => sound.push_str(&format!("[{name}] ok\n")),
            Err(mut more) => faults.append(&mut more),
        }
    }
    faults.sort();
    faults.dedup();
    output::print(&sound)?;
    if !faults.is_empty() {
        bail!("{}", faults.join("\n"));
    }
    if sound.is_empty() {
        output::print("ok, without [serve] and [mirror]\n")?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Whether there is such a table, which is sound then.
fn check_table(file: &ConfigFile, name: &str) -> Result<bool, Vec<String>> {
    let added = added(file, &relaxed(Arguments::command()), name, None)
        .map_err(|faults| faults.iter().map(|fault| tell(std::slice::from_ref(fault))).collect::<Vec<_>>())?;
    let Some(table) = file.table(name) else { return Ok(false) };
    let fault = |why: String| file.fault(table.line, format!("[{name}]: {why}")).to_string();
    let typed: [OsString; 2] = ["headwater".into(), name.into()];
    let arguments =
        Arguments::try_parse_from(join(&typed, name, &added)).map_err(|error| vec![fault(whole_line(&error))])?;
    let faults = complaints(&arguments.command).into_iter().map(|(key, why)| {
        let line = table.entries.iter().find(|entry| entry.key == key).map_or(table.line, |entry| entry.line);
        file.fault(line, format!("[{name}] {key}: {why}")).to_string()
    });
    let faults: Vec<_> = faults.collect();
    if faults.is_empty() { Ok(true) } else { Err(faults) }
}

/// What is wrong with values that make sense by themselves, with the keys that they belong to.
fn complaints(command: &Command) -> Vec<(&'static str, String)> {
    let mut faults = Vec::new();
    let mut note = |key: &'static str, why: Result<(), String>| faults.extend(why.err().map(|why| (key, why)));
    match command {
        Command::Serve(serve) => {
            serve.images.iter().for_each(|image| note("images", can_be_read(&image.path)));
            serve.backing.iter().for_each(|place| note("backing", is_directory(place)));
        }
        Command::Mirror(mirror) if mirror.cache.exists() => note("cache", is_directory(&mirror.cache)),
        _ => {}
    }
    if let Some(daemon) = daemon_of(command) {
        for (key, file) in [("admin-token", &daemon.admin_token), ("neighbours-token", &daemon.neighbours_token)] {
            let read = file.iter().try_for_each(|file| Token::read(file).map(drop));
            note(key, read.map_err(|error| error.to_string()));
        }
        let protection = daemon.tls.protection();
        let has_tls = protection.as_ref().is_ok_and(Option::is_some);
        note("tls-certificates", protection.map(drop).map_err(|error| format!("{error:#}")));
        note("allow", knows_exports(command, daemon));
        note("require-tls", super::reload::without_tls(&daemon.access.rules(), has_tls));
    }
    faults
}

/// The names of the exports that a command serves.
pub(super) fn exports(command: &Command) -> BTreeSet<&str> {
    match command {
        Command::Serve(serve) => serve.images.iter().map(|image| image.name.as_str()).collect(),
        Command::Mirror(mirror) => mirror.images.iter().map(|image| split_content_name(&image.name).0).collect(),
        _ => BTreeSet::new(),
    }
}

fn knows_exports(command: &Command, daemon: &crate::cli::args::Daemon) -> Result<(), String> {
    let (rules, known) = (daemon.access.rules(), exports(command));
    super::reload::strangers(&rules, |name| known.contains(name))
}

fn can_be_read(path: &Path) -> Result<(), String> {
    File::open(path).map(drop).map_err(|error| format!("{}: {error}", path.display()))
}

fn is_directory(path: &Path) -> Result<(), String> {
    if path.is_dir() { Ok(()) } else { Err(format!("{}: there is no such directory", path.display())) }
}
